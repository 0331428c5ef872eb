"""One training step, column by column: seconds, clips/s, hours of audio an hour, tokens/s, memory.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k step --benchmark-json=benchmarks/results/step_cpu.json
python -m pytest benchmarks -k step --benchmark-disable            every column once, at toy sizes

A step draws its masks, runs forward and backward from gradients that are None, clips the gradient's norm at 10 and
updates with AdamW (fused): the same for all columns. The front end is not in it. Dropout 0.1, no layerdrop. In fp32
and, as ``NAME bf16``, in bf16 (on a GPU in bf16 alone):

    original        benchmarks/original.py, the paper's implementation style
    reference       MAEAST(impl="torch", attention="sdpa"), eager: the plain path over padded attention
    compiled        torch.compile(fullgraph=True) of it
    fast            what this library makes of the step: TrainStep; on a CPU MAEAST as it is, on a GPU impl="triton"
    fast, gelu      the same with recompute="gelu" (GPU)
    fast, graphs    the same as CUDA graphs (GPU, small batches)

Before anything is timed, the losses of all columns on the same weights and the same mask, without dropout, must agree
within tests/policy.py.

The case ``mixed`` has clips of unequal length. The paper's setting (``pad_audio`` false, ``random_crop`` true,
``max_sample_size`` 250000) crops every clip of a batch to the shortest and to 15.6 s; its batches are neighbours in a
list sorted by length, the shortest and the longest among them, so that little but the cap is lost. The packed columns
take the same clips in random batches, whole. Each column is credited with the audio that it trains on. Compiled columns
are left out there: every batch has another shape. ``equal`` is its counterpart: as much audio in clips of 10 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from measure import DEVICE, ROUNDS, Clock, load_average, peak_bytes, synchronize
from original import Original
from policy import BF16_LOSS, ONE_STEP
from torch import Tensor, nn

from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep
from mae_ast_fast.fairseq import convert_state_dict
from mae_ast_fast.masking import sample_mask

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


ON_CPU = (
    Case("patch_small", "patch_small", 8),
    Case("frame_small", "frame_small", 8),
    Case("patch_base", "patch_base", 4),
    Case("mixed", "patch_tiny", 4, mixed=True, batches=4),
    Case("equal", "patch_tiny", 5, batches=4),
)
ON_GPU = (
    Case("patch_base", "patch_base", 256),
    Case("few clips", "patch_base", 8),
    Case("mixed", "patch_base", 64, mixed=True, batches=4),
    Case("equal", "patch_base", 72, batches=4),
)
CASES = ON_GPU if DEVICE.type == "cuda" else ON_CPU
FEW = 32  # clips, below which launching kernels takes longer than running them


@dataclass
class Batch:
    """Log-mel (B, T, F) with frame counts (B,), also on the host, and the seconds that each clip lasts."""

    features: Tensor
    frames: Tensor
    on_host: list[int]
    seconds: list[float]


@dataclass
class Column:
    """One way to do the step; ``loss`` takes (batch, mask or None).

    ``update`` does it whole where it is given, else ``loss``, backward, clipping and ``optimizer`` one after another.
    """

    name: str
    model: nn.Module
    norm: nn.Module
    loss: Callable[[Batch, Tensor | None], Tensor]
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    bf16: bool
    update: TrainStep | None = None

    def run(self, clock: Callable[[str], None] = lambda stage: None) -> float:
        """One update a batch; returns the last loss. ``clock`` is told of every stage as it ends."""
        tells = isinstance(self.model, Original)
        if tells:
            self.model.clock = clock
        for batch in self.batches:
            if self.update is not None:
                loss = self.update(batch.features, batch.on_host).loss
                clock("update")
                continue
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
    return Batch(features.to(DEVICE), frames.to(DEVICE), frames.tolist(), seconds)


def make_batches(case: Case) -> tuple[list[Batch], list[Batch]]:
    """Batches of the column ``original`` and of the packed ones."""
    config, generator = case.config, torch.Generator().manual_seed(0)
    if not case.mixed:
        batches = [make_batch([SECONDS] * case.clips, config, generator) for _ in range(case.batches)]
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
    weights = convert_state_dict(original.state_dict(), config)

    def ours(**how: str) -> MAEAST:
        model = MAEAST(config, **how)
        model.load_state_dict(weights)
        return model.to(DEVICE)

    reference = ours(impl="torch", attention="sdpa")
    for_original, packed = make_batches(case)
    torch.compiler.reset()  # a case's graphs must not use up the recompilations of the next one's ...
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and end in eager code unnoticed

    def packed_loss(model: Callable[..., Any]) -> Callable[[Batch, Tensor | None], Tensor]:
        def loss(batch: Batch, mask: Tensor | None) -> Tensor:
            mask = draw_mask(config, batch) if mask is None else mask
            return model(batch.features, batch.frames, mask, sizes=reference.sizes_of(batch.on_host)).loss

        return loss

    def original_loss(batch: Batch, mask: Tensor | None) -> Tensor:
        return original(batch.features, mask).loss

    kinds = [
        ("original", original, original.batch_norm, original_loss, for_original, None),
        ("reference", reference, reference.input_norm, packed_loss(reference), packed, None),
    ]
    if compiled and not case.mixed:
        graph = torch.compile(reference, fullgraph=True)
        kinds.append(("compiled", reference, reference.input_norm, packed_loss(graph), packed, None))
    ways: dict[str, tuple[str, bool]] = {"fast": ("none", False)}  # recompute, graphs
    if DEVICE.type == "cuda":
        ways["fast, gelu"] = "gelu", False
        if case.clips <= FEW and not case.mixed:
            ways["fast, graphs"] = "none", True
    for name, (recompute, graphs) in ways.items():
        model = ours(impl="triton" if DEVICE.type == "cuda" else "torch", recompute=recompute)
        kinds.append((name, model, model.input_norm, packed_loss(model), packed, graphs))
    optimizers = {
        model: torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
        for model in (original, reference)
    }
    columns = []
    for name, model, norm, loss, batches, graphs in kinds:
        for bf16 in (True,) if DEVICE.type == "cuda" else (False, True):
            update, optimizer = None, optimizers.get(model)
            if graphs is not None:
                update = TrainStep(model.train(), 1e-4, precision="bf16" if bf16 else "fp32", graphs=graphs)
                optimizer = update.optimizer
            full = f"{name} bf16" if bf16 else name
            columns.append(Column(full, model.train(), norm, loss, optimizer, batches, bf16, update))
    return columns


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
    reference = replace(next(column for column in columns if column.name.startswith("reference")), bf16=False)
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
        column.optimizer.zero_grad(set_to_none=True)
        peak = peak_bytes(column.run)
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
        benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info.update(record)
