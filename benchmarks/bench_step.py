"""One training step, column by column: seconds, clips/s, hours of audio an hour, tokens/s, memory.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k step --benchmark-json=benchmarks/results/step_cpu.json
python -m pytest benchmarks -k step --benchmark-disable            every column once, at toy sizes

A step draws its masks, runs forward and backward from gradients that are None, clips the gradient's norm at 10 and
updates with AdamW (fused): the same for all columns. The front end is not in it. Dropout 0.1, no layerdrop.

    original          benchmarks/original.py, the paper's implementation style, in fp32
    original bf16     the same under autocast
    reference         MAEAST(impl="torch"), eager, in fp32
    reference bf16    the same under autocast
    compiled          torch.compile of the reference, fp32, and
    compiled bf16     under autocast. Graph breaks are allowed, since packing reads counts back; masks are drawn outside
                      the compiled part: Inductor makes C++ of Philox's shifts that does not compile (torch 2.14).

Before anything is timed, the losses of all columns on the same weights and the same mask, without dropout, must agree
within tests/policy.py.

The case ``mixed`` has clips of unequal length. The paper's setting (``pad_audio`` false, ``random_crop`` true,
``max_sample_size`` 250000) crops every clip of a batch to the shortest and to 15.6 s; its batches are neighbours in a
list sorted by length, the shortest and the longest among them, so that little but the cap is lost. The packed columns
take the same clips in random batches, whole. Each column is credited with the audio that it trains on. Compiled columns
are left out there: every batch has another shape.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from original import Original
from policy import BF16_LOSS, ONE_STEP
from torch import Tensor, nn

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.fairseq import convert_state_dict
from mae_ast_fast.masking import sample_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 30 if DEVICE.type == "cuda" else 5
SECONDS = 10.0
CROP = 250_000 / 16_000  # seconds; the paper's max_sample_size


@dataclass(frozen=True)
class Case:
    """A model and clips; ``mixed``: of unequal length, ``batches`` of them instead of one."""

    name: str
    preset: str
    clips: int
    mixed: bool = False
    batches: int = 1
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> MAEASTConfig:
        return MAEASTConfig.preset(self.preset, encoder_layerdrop=0.0, **self.sizes)

    def toy(self) -> Case:
        """The same at a size that takes a second."""
        sizes = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 1}
        return replace(self, clips=2, batches=min(self.batches, 2), sizes=sizes)


CASES = (
    Case("patch_small", "patch_small", 8),
    Case("frame_small", "frame_small", 8),
    Case("patch_base", "patch_base", 4),
    Case("mixed", "patch_tiny", 4, mixed=True, batches=4),
)


@dataclass
class Batch:
    """Log-mel (B, T, F) with frame counts (B,), and the seconds that each clip lasts."""

    features: Tensor
    frames: Tensor
    seconds: list[float]


@dataclass
class Column:
    """One way to do the step; ``loss`` takes (batch, mask or None)."""

    name: str
    model: nn.Module
    norm: nn.Module
    loss: Callable[[Batch, Tensor | None], Tensor]
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    bf16: bool

    def run(self, clock: Callable[[str], None] = lambda stage: None) -> float:
        """One update a batch; returns the last loss. ``clock`` is told of every stage as it ends."""
        tells = isinstance(self.model, Original)
        if tells:
            self.model.clock = clock
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(batch, None)
            if not tells:
                clock("forward")
            loss.backward()
            clock("backward")
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            clock("optimizer")
        return loss.item()

    def without_dropout(self, batch: Batch, mask: Tensor) -> float:
        """The loss as in training, with batch statistics, but without dropout."""
        self.model.eval()
        self.norm.train()
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch, mask).item()
        self.model.train()
        return loss


def make_batch(seconds: list[float], config: MAEASTConfig, generator: torch.Generator) -> Batch:
    """Noise with the mean and the spread of log-mel, in clips of these lengths (25 ms windows every 10 ms)."""
    frames = torch.tensor([1 + int(100 * second - 2.5) for second in seconds])
    features = torch.randn(len(seconds), int(frames.max()), config.num_mel_bins, generator=generator) * 4.0 - 6.0
    return Batch(features.to(DEVICE), frames.to(DEVICE), seconds)


def make_batches(case: Case) -> tuple[list[Batch], list[Batch]]:
    """Batches of the column ``original`` and of the packed ones."""
    config, generator = case.config, torch.Generator().manual_seed(0)
    if not case.mixed:
        batches = [make_batch([SECONDS] * case.clips, config, generator)]
        return batches, batches
    # Half of the corpus lasts 10 s, as AudioSet's clips; half 2 to 35 s, 12 in the mean, about as LibriSpeech's.
    random = np.random.default_rng(0)
    corpus = np.sort(np.concatenate((np.full(128, SECONDS), 2.0 + 33.0 * random.beta(2.2, 5.0, 128))))
    every = corpus.reshape(-1, case.clips)
    neighbours = every[np.linspace(0, len(every) - 1, case.batches).round().astype(int)]  # both ends included
    cropped = np.minimum(neighbours.min(1, keepdims=True), CROP).repeat(case.clips, 1)
    packed = random.permutation(neighbours.ravel()).reshape(neighbours.shape)
    return tuple([make_batch(row.tolist(), config, generator) for row in rows] for rows in (cropped, packed))


def make_columns(case: Case, compiled: bool = True) -> list[Column]:
    """The columns of a case, with equal weights; those of one implementation share them."""
    torch.manual_seed(0)
    config = case.config
    original = Original(config).to(DEVICE)
    reference = MAEAST(config, impl="torch").to(DEVICE)
    reference.load_state_dict(convert_state_dict(original.state_dict(), config))
    for_original, packed = make_batches(case)
    torch.compiler.reset()  # a case's graphs must not use up the recompilations of the next one's ...
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and end in eager code unnoticed

    def packed_loss(model: Callable[..., Any]) -> Callable[[Batch, Tensor | None], Tensor]:
        def loss(batch: Batch, mask: Tensor | None) -> Tensor:
            return model(batch.features, batch.frames, draw_mask(config, batch) if mask is None else mask).loss

        return loss

    def original_loss(batch: Batch, mask: Tensor | None) -> Tensor:
        return original(batch.features, mask).loss

    kinds = [
        ("original", original, original.batch_norm, original_loss, for_original),
        ("reference", reference, reference.input_norm, packed_loss(reference), packed),
    ]
    if compiled and not case.mixed:
        kinds.append(("compiled", reference, reference.input_norm, packed_loss(torch.compile(reference)), packed))
    optimizers = {
        model: torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
        for model in (original, reference)
    }
    return [
        Column(f"{name} bf16" if bf16 else name, model.train(), norm, loss, optimizers[model], batches, bf16)
        for name, model, norm, loss, batches in kinds
        for bf16 in (False, True)
    ]


def draw_mask(config: MAEASTConfig, batch: Batch, seed: int | None = None) -> Tensor:
    """(B, L) bool, True = masked: a mask for each clip."""
    tokens = batch.frames // config.patch_size[0] * config.grid_f
    width = batch.features.shape[1] // config.patch_size[0] * config.grid_f
    return sample_mask(config.masking, tokens, config.grid_f, config.mask_ratio, seed=seed, max_tokens=width)


def check(columns: list[Column], config: MAEASTConfig) -> dict[str, float]:
    """Relative distance of each column's loss from the fp32 reference's: same weights, same mask, no dropout.

    Raises:
        AssertionError: It is larger than the policy allows.
    """
    reference = next(column for column in columns if column.name == "reference")
    errors: dict[str, float] = {}
    for column in columns:
        # The original takes clips of one length only; the reference takes those too.
        for batch in column.batches:
            mask = draw_mask(config, batch, seed=1)
            expected = reference.without_dropout(batch, mask)
            error = abs(column.without_dropout(batch, mask) - expected) / abs(expected)
            allowed = BF16_LOSS if column.bf16 else ONE_STEP
            assert error <= allowed, f"{column.name}: loss {error:.3g} off the reference's, allowed {allowed:.3g}"
            errors[column.name] = max(error, errors.get(column.name, 0.0))
    return errors


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Adds up the seconds between its calls under the names that they bring; it does not wait for a GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def peak_bytes(column: Column) -> int | None:
    """Largest memory of a run over what lies there anyway (weights, optimizer state); None where nobody counts it."""
    column.optimizer.zero_grad(set_to_none=True)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        column.run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the run finds memory that others freed but the process kept
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forgets the peak so far
    except OSError:
        return None

    def status(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    before = status("VmRSS:")
    column.run()
    return status("VmHWM:") - before


@contextmanager
def load_average(into: dict[str, Any]) -> Iterator[None]:
    into["load_average_before"] = os.getloadavg()
    yield
    into["load_average_after"] = os.getloadavg()


def measure(case: Case, compiled: bool = True) -> tuple[Callable[[], None], dict[str, Any]]:
    """Checks and warms up the columns of a case.

    Returns:
        A round, which runs every column once in turn and keeps their times, and where they are kept.
    """
    columns = make_columns(case, compiled)
    errors = check(columns, case.config)
    patch, grid_f = case.config.patch_size[0], case.config.grid_f
    record: dict[str, Any] = {"preset": case.preset, "clips_a_batch": case.clips, "mixed": case.mixed, "columns": {}}
    for column in columns:
        column.run()
        peak = peak_bytes(column)
        record["columns"][column.name] = {
            "loss_error": errors[column.name],
            "steps": len(column.batches),
            "clips": sum(len(batch.frames) for batch in column.batches),
            "audio_seconds": sum(sum(batch.seconds) for batch in column.batches),
            "clip_seconds": [[round(second, 2) for second in batch.seconds] for batch in column.batches],
            "tokens": sum(int((batch.frames // patch * grid_f).sum()) for batch in column.batches),
            "peak_bytes_a_clip": None if peak is None else peak // case.clips,
            "seconds": [],
            "cpu_seconds": [],
            "stages": [],
        }

    def one_round() -> None:
        for column in columns:
            kept = record["columns"][column.name]
            synchronize()
            clock = Clock()
            began, worked = time.perf_counter(), time.process_time()
            loss = column.run(clock)
            synchronize()
            kept["seconds"].append(time.perf_counter() - began)
            kept["cpu_seconds"].append(time.process_time() - worked)
            if DEVICE.type == "cpu":  # a GPU is still at work when its stages end
                kept["stages"].append(clock.seconds)
            assert np.isfinite(loss), f"{column.name}: loss {loss}"

    return one_round, record


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.timeout(1800)
def bench_step(case: Case, benchmark: Any) -> None:
    if benchmark.disabled:
        case = case.toy()
    with load_average(benchmark.extra_info):
        one_round, record = measure(case, compiled=benchmark.enabled)
        # The fixture times one function again and again, column after column: a machine that slows down meanwhile would
        # favour some. So it is given a whole round, which times its columns itself; their samples are in extra_info.
        benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info.update(record)
