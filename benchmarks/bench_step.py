"""One training step, column by column: seconds, and of them the forward's; clips/s, tokens/s, memory, MFU.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k step --benchmark-json=benchmarks/results/step_cpu.json
python -m pytest benchmarks -k step --benchmark-disable            every column once, at toy sizes

A step draws its masks, runs forward and backward from gradients that are None, clips the gradient's norm at 10 and
updates with AdamW (fused): the same for all columns. The front end is not in it. Dropout 0.1, no layerdrop. In fp32
and, as ``NAME bf16``, in bf16 (compiled columns, and all on a GPU, in bf16 alone, where that is native):

    original            benchmarks/baselines/original.py, the paper's implementation style
    reference           MAEAST(impl="torch", attention="sdpa"), eager: the plain path over padded attention
    compiled            torch.compile(fullgraph=True) of it
    fast                what this library makes of the step: TrainStep; on a CPU MAEAST as it is, on a GPU impl="triton"
    fast, gelu          the same with recompute="gelu" (GPU)
    fast, graphs        the same as CUDA graphs (GPU, small batches)
    fast, no dropout    the same without dropout, as SSAST and ViTMAE have none
    vitmae              Hugging Face's ViTMAEForPreTraining at these sizes; benchmarks/baselines/vitmae.py says what
                        differs
    vitmae compiled     torch.compile of it
    ssast               SSAST at these sizes, objective "joint" (one pass), by TrainStep on what ``fast`` runs on
    ssast, two passes   the same with objective "joint_two_pass", as the official code has it

Before anything is timed, every column makes an update as in the timing, but with a given mask, without dropout, at a
rate of 0 and with the layers' weights scaled up, so that each layer shows in the loss. Its loss and its gradient's norm
must agree within tests/common/policy.py: of MAE-AST's columns with the fp32 reference's, of SSAST's with those of
SSAST(impl="torch", attention="sdpa") in fp32, of ViTMAE's with the loss counted from its predictions. (Compiled columns
without their backward, which would be compiled twice.) A run before the timing must then have moved every matrix.
A column that raises or fails a check is left out and recorded under ``failed``: the other columns are timed, and the
benchmark fails at its end.

Three kinds of cases. ``main``: models and clips in all columns. ``ssast``: MAE-AST against SSAST, without dropout.
``sweep``: one factor at a time (clips a batch, their length, mask ratio, layers) from one base point.

The case ``mixed`` has clips of unequal length. The paper's setting (``pad_audio`` false, ``random_crop`` true,
``max_sample_size`` 250000) crops every clip of a batch to the shortest and to 15.6 s; its batches are neighbours in a
list sorted by length, the shortest and the longest among them, so that little but the cap is lost. The packed columns
take the same clips in random batches, whole. Each column is credited with the audio that it trains on. Compiled columns
are left out there: every batch has another shape. ``equal`` is its counterpart: as much audio in clips of 10 s.

Memory is the median of three steps; on a CPU it is what the process has resident.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from baselines import vitmae
from baselines.original import Original
from measure import DEVICE, ON_GPU, ROUNDS, Failed, Turns, load_average, no_compiler, peaks, synchronize
from policy import BF16_LOSS, GRAD_NORM, ONE_STEP
from torch import Tensor, nn

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.checkpoints.fairseq import convert_state_dict
from mae_ast_fast.devices import native_bf16
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops.masking import num_visible, sample_mask
from mae_ast_fast.tools.bench import peak_bytes

SECONDS = 10.0
CROP = 250_000 / 16_000  # seconds; the paper's max_sample_size
EAGER = ("original", "reference", "fast")
ALL = ("original", "reference", "compiled", "fast", "vitmae", "vitmae compiled")
AGAINST_SSAST = ("fast, no dropout", "ssast", "ssast, two passes")
SWEPT = ("original", "fast", "ssast")
LR = 1e-4
SEED = 1  # of the masks of a check
GAIN = 60.0  # of N inputs, times GAIN / sqrt(N): from a spread of 0.02 to one that keeps the stream's
MEMORY_RUNS = 3
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout"), 0.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEST = ("bf16",) if native_bf16(DEVICE) else ("fp32",)
PRECISIONS = ("bf16",) if ON_GPU else ("fp32", "bf16")
Mask = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Case:
    """A model, clips, and columns.

    Attributes:
        mixed: Clips of unequal length.
        batches: Of a round.
        part: "main", "ssast" or "sweep".
        factor: Of a sweep, what differs from the base point; "" is that point itself.
        sizes: Fields of the configuration that differ from the preset's.
    """

    name: str
    preset: str
    clips: int
    columns: tuple[str, ...]
    precisions: tuple[str, ...] = PRECISIONS
    seconds: float = SECONDS
    rounds: int = ROUNDS
    mixed: bool = False
    batches: int = 1
    part: str = "main"
    factor: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> MAEASTConfig:
        return MAEASTConfig.preset(self.preset, **{"encoder_layerdrop": 0.0, **self.sizes})

    def toy(self) -> Case:
        """The same at a size that takes a second."""
        sizes = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 128, "num_heads": 2, "encoder_layers": 1}
        sizes = {**self.sizes, **sizes}
        return replace(self, clips=2, batches=min(self.batches, 2), seconds=min(self.seconds, 2.0), sizes=sizes)


def sweeps(preset: str, clips: int, changes: dict[str, Sequence[Any]]) -> list[Case]:
    """The base point, and for each factor the points that differ from it in that alone.

    Args:
        preset: Of the base point.
        clips: Of the base point.
        changes: By factor: clips of a batch, seconds of a clip, mask ratios, layers of the encoder.
    """
    base = Case("sweep base", preset, clips, SWEPT, BEST, part="sweep")
    cases = [base]
    for factor, values in changes.items():
        for value in values:
            case = replace(base, factor=factor, name=f"sweep {factor} {value:g}")
            if factor in ("clips", "seconds"):
                case = replace(case, **{factor: value})
            else:  # SSAST knows neither a mask ratio nor MAE-AST's two kinds of layers
                case = replace(case, sizes={factor: value}, columns=SWEPT[:2])
            cases.append(case)
    return cases


RATIOS = (0.5, 0.6, 0.9)  # and the base point's 0.75
ON_CPU = (
    Case("patch_small", "patch_small", 4, (*ALL[:4], "fast, no dropout", *ALL[4:])),
    Case("frame_small", "frame_small", 4, EAGER),
    Case("patch_base", "patch_base", 2, (*EAGER, "fast, no dropout", *ALL[4:]), BEST),
    Case("mixed", "patch_tiny", 4, EAGER, BEST, mixed=True, batches=3),
    Case("equal", "patch_tiny", 5, ("original", "fast"), BEST, batches=3),
    Case("ssast patch_small", "patch_small", 4, AGAINST_SSAST, BEST, part="ssast"),
    Case("ssast frame_small", "frame_small", 4, AGAINST_SSAST, BEST, part="ssast"),
    Case("ssast patch_base", "patch_base", 2, AGAINST_SSAST, BEST, part="ssast"),
    *sweeps(
        "patch_small",
        1,
        {
            "clips": (2, 4, 8),
            "seconds": (1.0, 2.0, 5.0, 20.0, 60.0),
            "mask_ratio": RATIOS,
            "encoder_layers": (6,),
        },
    ),
)
# In order of value: gpu.py runs them one process after another until its time is up. Compiling takes minutes.
ON_GPU_CASES = (
    Case("patch_base", "patch_base", 256, (*EAGER, "vitmae", "fast, gelu", "fast, no dropout")),
    Case("mixed", "patch_base", 64, (*EAGER, "fast, gelu"), mixed=True, batches=4),
    Case("equal", "patch_base", 72, (*EAGER, "fast, gelu"), batches=4),
    Case("few clips", "patch_base", 8, (*EAGER, "fast, graphs")),
    Case("frame_base", "frame_base", 256, EAGER),
    Case("ssast patch_base", "patch_base", 128, AGAINST_SSAST, part="ssast"),
    Case("ssast frame_base", "frame_base", 128, AGAINST_SSAST, part="ssast"),
    Case("patch_base compiled", "patch_base", 256, ("reference", "compiled", "fast", "vitmae compiled")),
    Case("few clips compiled", "patch_base", 8, ("reference", "compiled", "fast")),
    *sweeps(
        "patch_base",
        16,  # of 60 s as many as the original's attention weights leave room for
        {
            "clips": (32, 64, 128, 256),
            "seconds": (1.0, 2.0, 5.0, 20.0, 60.0),
            "mask_ratio": RATIOS,
            "encoder_layers": (6,),
        },
    ),
)
CASES = ON_GPU_CASES if ON_GPU else ON_CPU
AFTER_FORWARD = ("backward", "optimizer", "update")  # stages of a step; all others are of its forward


@dataclass
class Batch:
    """Log-mel (B, T, F) with frame counts (B,), also on the host, and the seconds that each clip lasts."""

    features: Tensor
    frames: Tensor
    on_host: list[int]
    seconds: list[float]


class Stages:
    """Seconds between its calls, added up under the names that they bring; on a GPU by the device's clock."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        self("")

    def __call__(self, stage: str) -> None:
        mark: Any = time.perf_counter()
        if ON_GPU:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((stage, mark))

    def seconds(self) -> dict[str, float]:
        """To be asked once the device is done."""
        found: dict[str, float] = {}
        for (_, before), (stage, mark) in zip(self.marks, self.marks[1:], strict=False):
            found[stage] = found.get(stage, 0.0) + (before.elapsed_time(mark) / 1e3 if ON_GPU else mark - before)
        return found


class Yardstick:
    """The mask that a batch is checked with, and what an update must then tell.

    Args:
        draw: The mask of a batch.
        model: Whose weights' gradient counts.
        loss: In fp32 and without dropout, of a batch and a mask, as plainly as can be.
    """

    def __init__(
        self, draw: Callable[[Batch], Tensor], model: nn.Module, loss: Callable[[Batch, Tensor], Tensor]
    ) -> None:
        self.draw, self.model, self.loss = draw, model, loss
        self.known: dict[int, tuple[Tensor, float, float]] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, float, float]:
        """The mask, the loss, and the gradient's norm."""
        if id(batch) not in self.known:
            mask = self.draw(batch)
            loss = self.loss(batch, mask)
            weights = [p for p in self.model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            self.known[id(batch)] = mask, loss.item(), norm.item()
        return self.known[id(batch)]


@dataclass
class Kind:
    """One way to do the step in any precision; ``loss`` takes (batch, mask or None).

    Attributes:
        statistics: What has statistics of the batch in training, and needs them in a check as well.
        flops: Of a step's training on a clip with L tokens, which the model cannot do without.
        train_step: Options of TrainStep, which then does the step whole; None: ``loss``, backward, clipping and AdamW.
    """

    model: nn.Module
    loss: Callable[[Batch, Mask], Tensor]
    batches: list[Batch]
    yardstick: Yardstick
    flops: Callable[[int], int]
    statistics: nn.Module | None = None
    train_step: dict[str, Any] | None = None


def autocast(precision: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def without_dropout(kinds: Sequence[Kind]) -> Iterator[None]:
    """As in training, with statistics of the batch, but without dropout, and with the layers' matrices scaled up.

    As they are initialised, a layer changes the loss by less than bf16 does. Afterwards all is as it was: weights,
    running statistics, training mode.
    """
    models = {kind.model for kind in kinds}
    named = [pair for model in models for pair in model.named_parameters()]
    matrices = [p.detach() for name, p in named if p.dim() == 2 and re.search(r"layers?\.\d+\.", name)]
    running = [x for kind in kinds if kind.statistics is not None for x in kind.statistics.buffers()]
    kept = [(x, x.clone()) for x in (*matrices, *running)]
    for matrix in matrices:
        matrix.mul_(GAIN * matrix.shape[1] ** -0.5)
    for model in models:
        model.eval()
    for kind in kinds:
        if kind.statistics is not None:
            kind.statistics.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for x, before in kept:
                x.copy_(before)
        for model in models:
            model.train()


def labelled(name: str, precision: str) -> str:
    """A column's name in results: ``NAME`` in fp32, otherwise ``NAME bf16``."""
    return name if precision == "fp32" else f"{name} {precision}"


class Column:
    """A kind in a precision.

    Args:
        kind: May be shared by columns, which then train the same weights.
        optimizer: Of these weights, where there is no TrainStep.
    """

    def __init__(self, name: str, kind: Kind, precision: str, optimizer: torch.optim.Optimizer | None) -> None:
        self.name = labelled(name, precision)
        self.kind, self.precision, self.model = kind, precision, kind.model.train()
        self.compiled = "compiled" in name
        self.clock: Callable[[str], None] = lambda stage: None
        self.update, self.optimizer = None, optimizer
        if kind.train_step is not None:
            self.update = TrainStep(self.model, LR, precision=precision, **kind.train_step)
            self.optimizer = self.update.optimizer
            if not kind.train_step.get("graphs"):
                forward = self.update.forward

                def timed(*inputs: Any, **options: Any) -> Any:
                    out = forward(*inputs, **options)
                    self.clock("forward")
                    return out

                self.update.forward = timed

    def run(self, clock: Callable[[str], None] = lambda stage: None) -> float:
        """One update a batch; returns the last loss. ``clock`` is told of every stage as it ends."""
        self.clock = clock
        if isinstance(self.model, Original):
            self.model.clock = clock
        for batch in self.kind.batches:
            loss, _ = self.one_update(batch)
        return loss.item()

    def one_update(self, batch: Batch, mask: Mask = None, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient's norm before clipping; ``options`` go to TrainStep."""
        if self.update is not None:
            numbers = self.update(batch.features, batch.on_host, mask, **options)
            self.clock("update")
            return numbers.loss, numbers.grad_norm
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision):
            loss = self.kind.loss(batch, mask)
        if not isinstance(self.model, Original):  # which tells of its parts itself
            self.clock("forward")
        loss.backward()
        self.clock("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.clock("optimizer")
        return loss, norm

    def check(self, batch: Batch, mask: Tensor) -> tuple[float, float]:
        """Loss and gradient's norm of an update as in ``run`` that leaves weights, rate and moments as they were."""
        if self.compiled:
            with torch.no_grad(), autocast(self.precision):
                return self.kind.loss(batch, mask).item(), float("nan")
        try:
            loss, norm = self._update_at_rate_0(batch, mask)
            return loss.item(), norm.item()
        finally:  # other columns may train the same weights with the same optimizer
            self.optimizer.zero_grad(set_to_none=True)
            for state in self.optimizer.state.values():
                for moment in state.values():
                    moment.zero_()
            if self.update is None:
                for group in self.optimizer.param_groups:
                    group["lr"] = LR
            else:
                self.update.lr.fill_(LR)
                self.update.restore()  # no graph is kept that was recorded without dropout

    def _update_at_rate_0(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.update is None:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            return self.one_update(batch, mask)
        if self.update.graphs is not None:  # a graph draws its masks: the same one, by its seed
            return self.one_update(batch, None, lr=0.0, seed=SEED)
        two = getattr(self.model.config, "objective", "") == "joint_two_pass"
        return self.one_update(batch, (mask, mask) if two else mask, lr=0.0)


def check_moved(column: Column, before: dict[str, Tensor]) -> None:
    """Raises AssertionError where a matrix is what it was before a run."""
    still = [name for name, x in before.items() if torch.equal(x, column.model.get_parameter(name))]
    assert not still, f"{column.name}: an update does not move {', '.join(still)}"


def matrices_of(column: Column) -> dict[str, Tensor]:
    """Copies of a column's weights, vectors left out: a bias may stand still."""
    return {n: p.detach().clone() for n, p in column.model.named_parameters() if p.dim() > 1 and p.requires_grad}


def stack_flops(tokens: int, layers: int, width: int, inner: int) -> int:
    """Of the matrix products of a transformer stack's forward over one clip."""
    return layers * tokens * (8 * width * width + 4 * width * inner + 4 * tokens * width)


def mae_ast_flops(config: MAEASTConfig, tokens: int) -> int:
    """Train FLOPs of MAE-AST on a clip of L tokens: three times the forward's matrix products, all as in the paper.

    An implementation that leaves some of them out (all but the hidden tokens of the last layer) is credited with them,
    one that does more of them (projecting every patch, recomputing) is not.
    """
    visible = num_visible(tokens, config.mask_ratio)
    hidden, width, patch = tokens - visible, config.decoder_embed_dim, config.patch_dim
    forward = 2 * visible * patch * config.embed_dim
    forward += stack_flops(visible, config.encoder_layers, config.embed_dim, config.ffn_dim)
    forward += stack_flops(tokens, config.decoder_layers, width, config.ffn_dim)
    forward += 2 * visible * config.embed_dim * width if config.has_projection else 0
    forward += 2 * hidden * width * 2 * patch + 2 * hidden * hidden * patch  # heads, InfoNCE
    return 3 * forward


def ssast_flops(config: SSASTConfig, tokens: int) -> int:
    """As ``mae_ast_flops``; the two passes of "joint_two_pass" are counted both."""
    visible = num_visible(tokens, config.mask_ratio)
    hidden, width, patch = tokens - visible, config.embed_dim, config.patch_dim
    one = 2 * visible * patch * width + stack_flops(tokens + 2, config.layers, width, config.ffn_dim)
    heads = 2 * (2 * hidden * width * (width + patch)) + 2 * hidden * hidden * patch
    return 3 * ((2 if config.objective == "joint_two_pass" else 1) * one + heads)


def vitmae_flops(config: MAEASTConfig, tokens: int) -> int:
    """As ``mae_ast_flops``, for what vitmae.py lists: a class token, a Linear in between, one head over all tokens."""
    visible, width, patch = num_visible(tokens, config.mask_ratio), config.decoder_embed_dim, config.patch_dim
    forward = 2 * tokens * patch * config.embed_dim + 2 * (visible + 1) * config.embed_dim * width
    forward += stack_flops(visible + 1, config.encoder_layers, config.embed_dim, config.ffn_dim)
    forward += stack_flops(tokens + 1, config.decoder_layers, width, config.ffn_dim) + 2 * tokens * width * patch
    return 3 * forward


def make_batch(seconds: list[float], config: MAEASTConfig, generator: torch.Generator) -> Batch:
    """Noise with the mean and the spread of log-mel, in clips of these lengths (25 ms windows every 10 ms)."""
    frames = torch.tensor([1 + int(100 * second - 2.5) for second in seconds])
    features = torch.randn(len(seconds), int(frames.max()), config.num_mel_bins, generator=generator) * 4.0 - 6.0
    return Batch(features.to(DEVICE), frames.to(DEVICE), frames.tolist(), seconds)


def make_batches(case: Case) -> tuple[list[Batch], list[Batch]]:
    """Batches of the column ``original`` and of the packed ones."""
    config, generator = case.config, torch.Generator().manual_seed(0)
    if not case.mixed:
        batches = [make_batch([case.seconds] * case.clips, config, generator) for _ in range(case.batches)]
        return batches, batches
    # Half of the corpus lasts 10 s, as AudioSet's clips; half 2 to 35 s, 12 in the mean, about as LibriSpeech's.
    random = np.random.default_rng(0)
    corpus = np.sort(np.concatenate((np.full(128, SECONDS), 2.0 + 33.0 * random.beta(2.2, 5.0, 128))))
    every = corpus.reshape(-1, case.clips)
    neighbours = every[np.linspace(0, len(every) - 1, case.batches).round().astype(int)]  # both ends included
    cropped = np.minimum(neighbours.min(1, keepdims=True), CROP).repeat(case.clips, 1)
    packed = random.permutation(neighbours.ravel()).reshape(neighbours.shape)
    return tuple([make_batch(row.tolist(), config, generator) for row in rows] for rows in (cropped, packed))


def draw_mask(config: MAEASTConfig, batch: Batch, seed: int | None = None) -> Tensor:
    """(B, L) bool, True = masked: a mask for each clip."""
    tokens = batch.frames // config.patch_size[0] * config.grid_f
    width = batch.features.shape[1] // config.patch_size[0] * config.grid_f
    return sample_mask(config.masking, tokens, config.grid_f, config.mask_ratio, seed=seed, max_tokens=width)


def mae_ast_kinds(case: Case, wanted: Sequence[str], failed: Failed) -> tuple[dict[str, Kind], MAEAST]:
    """MAE-AST's kinds with equal weights, and the reference."""
    config = case.config
    original = Original(config).to(DEVICE)
    weights = convert_state_dict(original.state_dict(), config)

    def ours(config: MAEASTConfig = config, **how: str) -> MAEAST:
        model = MAEAST(config, **how)
        model.load_state_dict(weights)
        return model.to(DEVICE)

    reference = ours(impl="torch", attention="sdpa")
    for_original, packed = make_batches(case)
    most = max(batch.features.shape[1] for batch in for_original) // config.patch_size[0] * config.grid_f
    if most > len(original.encoder_positions):  # its table ends at 2048 tokens, 41 s of patches
        original.encoder_positions = sinusoid(most, config.embed_dim).to(DEVICE)
        original.decoder_positions = sinusoid(most, config.decoder_embed_dim).to(DEVICE)

    def packed_loss(model: Callable[..., Any]) -> Callable[[Batch, Mask], Tensor]:
        def loss(batch: Batch, mask: Mask) -> Tensor:
            mask = draw_mask(config, batch) if mask is None else mask
            return model(batch.features, batch.frames, mask, sizes=reference.sizes_of(batch.on_host)).loss

        return loss

    def original_loss(batch: Batch, mask: Mask) -> Tensor:
        return original(batch.features, mask).loss

    # The original takes clips of one length only; the reference takes those too.
    yardstick = Yardstick(lambda batch: draw_mask(config, batch, SEED), reference, packed_loss(reference))
    shared: dict[str, Any] = {"yardstick": yardstick, "flops": lambda tokens: mae_ast_flops(config, tokens)}
    plain = Kind(reference, packed_loss(reference), packed, statistics=reference.input_norm, **shared)
    kinds = {"original": Kind(original, original_loss, for_original, statistics=original.batch_norm, **shared)}
    kinds["reference"] = plain
    if "compiled" in wanted:
        kinds["compiled"] = replace(plain, loss=packed_loss(torch.compile(reference, fullgraph=True)))
    ways = {"fast": {}, "fast, gelu": {"recompute": "gelu"}, "fast, graphs": {}, "fast, no dropout": {}}
    for name, how in ways.items():
        if name not in wanted:
            continue
        with failed.catch(*labels(case, name)):
            options = replace(config, **NO_DROPOUT) if name == "fast, no dropout" else config
            model = ours(options, impl="triton" if ON_GPU else "torch", **how)
            more = {"statistics": model.input_norm, "train_step": {"graphs": name == "fast, graphs"}}
            kinds[name] = Kind(model, packed_loss(model), packed, **shared, **more)
    return kinds, reference


def ssast_config(config: MAEASTConfig, frames: int, objective: str) -> SSASTConfig:
    """SSAST as deep and wide as MAE-AST's encoder, hiding its own share: 400 of 512 tokens."""
    sizes = {"patch_size": config.patch_size, "embed_dim": config.embed_dim, "num_heads": config.num_heads}
    sizes |= {"layers": config.encoder_layers, "input_frames": max(1024, frames), "objective": objective}
    every = sizes["input_frames"] // config.patch_size[0] * config.grid_f
    return SSASTConfig(**sizes, mask_patches=400 * every // 512)


def ssast_kinds(case: Case, wanted: Sequence[str], failed: Failed) -> dict[str, Kind]:
    """SSAST's kinds with equal weights; a check hides the same tokens in both of two passes."""
    _, batches = make_batches(case)
    frames = max(batch.features.shape[1] for batch in batches)
    weights: dict[str, Tensor] = {}

    def model(objective: str, **how: str) -> SSAST:
        made = SSAST(ssast_config(case.config, frames, objective), **how)
        if not weights:
            weights.update(made.state_dict())
        made.load_state_dict(weights)
        return made.to(DEVICE)

    plain = model("joint", impl="torch", attention="sdpa")
    batches = [replace(batch, features=plain.normalize(batch.features)) for batch in batches]

    def loss_of(model: SSAST) -> Callable[[Batch, Mask], Tensor]:
        two = model.config.objective == "joint_two_pass"
        return lambda batch, mask: model(batch.features, batch.frames, (mask, mask) if two else mask).loss

    def draw(batch: Batch) -> Tensor:
        return plain.sample_mask(batch.frames, batch.features.shape[1], seed=SEED)

    kinds = {}
    for name, objective in (("ssast", "joint"), ("ssast, two passes", "joint_two_pass")):
        if name not in wanted:
            continue
        with failed.catch(*labels(case, name)):
            made = model(objective, impl="triton" if ON_GPU else "torch")

            def flops(tokens: int, config: SSASTConfig = made.config) -> int:
                return ssast_flops(config, tokens)

            # The yardstick has the kind's own objective: two passes add up other gradients than one.
            own = plain if objective == "joint" else model(objective, impl="torch", attention="sdpa")
            yardstick = Yardstick(draw, own, loss_of(own))
            kinds[name] = Kind(made, loss_of(made), batches, yardstick, flops, train_step={})
    return kinds


def vitmae_kinds(case: Case, wanted: Sequence[str], ours: nn.Module) -> dict[str, Kind]:
    """ViTMAE's kinds."""
    config = case.config
    batches, _ = make_batches(case)
    model = vitmae.build(config, batches[0].features.shape[1]).to(DEVICE)

    def loss_of(model: Callable[..., Any]) -> Callable[[Batch, Mask], Tensor]:
        def loss(batch: Batch, mask: Mask) -> Tensor:
            noise = None if mask is None else mask.float()
            return model(vitmae.pixels(batch.features, config), noise=noise).loss

        return loss

    def expected(batch: Batch, mask: Tensor) -> Tensor:
        return vitmae.check(model, vitmae.pixels(batch.features, config), mask, ours)

    yardstick = Yardstick(lambda batch: draw_mask(config, batch, SEED), model, expected)
    kinds = {"vitmae": Kind(model, loss_of(model), batches, yardstick, lambda tokens: vitmae_flops(config, tokens))}
    if "vitmae compiled" in wanted:
        kinds["vitmae compiled"] = replace(kinds["vitmae"], loss=loss_of(torch.compile(model, fullgraph=True)))
    return kinds


def left_out(case: Case, compiled: bool = True) -> dict[str, str]:
    """Columns of a case that cannot run here, and why."""
    compiler = no_compiler() if compiled else "not at toy sizes"
    why = {name: compiler for name in case.columns if "compiled" in name and compiler}
    library = vitmae.missing(case.config)
    return why | {name: library for name in case.columns if "vitmae" in name and library}


def labels(case: Case, *names: str) -> list[str]:
    """Names in results of these columns of a case."""
    return [labelled(name, precision) for name in names for precision in case.precisions if runs_in(name, precision)]


def runs_in(name: str, precision: str) -> bool:
    """Compiled columns run in the best precision alone: compiling takes minutes."""
    return "compiled" not in name or precision in BEST


def make_columns(case: Case, compiled: bool, failed: Failed) -> list[Column]:
    """The columns of a case; kinds are in their order, precision by precision. Those that raise go to ``failed``."""
    torch.manual_seed(0)
    torch.compiler.reset()  # a case's graphs must not use up the recompilations of the next one's ...
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and end in eager code unnoticed
    without = left_out(case, compiled)
    wanted = [name for name in case.columns if name not in without]
    kinds, reference = mae_ast_kinds(case, wanted, failed)
    if ssast := [name for name in wanted if "ssast" in name]:
        with failed.catch(*labels(case, *ssast)):
            kinds |= ssast_kinds(case, wanted, failed)
    if others := [name for name in wanted if "vitmae" in name]:
        with failed.catch(*labels(case, *others)):
            kinds |= vitmae_kinds(case, wanted, reference)
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
    columns = []
    for precision in case.precisions:
        for name in wanted:
            if name not in kinds or not runs_in(name, precision):
                continue
            kind = kinds[name]
            with failed.catch(labelled(name, precision)):
                if kind.train_step is None and kind.model not in optimizers:
                    options = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
                    optimizers[kind.model] = torch.optim.AdamW(kind.model.parameters(), **options)
                columns.append(Column(name, kind, precision, optimizers.get(kind.model)))
    return columns


def check(columns: list[Column], failed: Failed) -> dict[str, float]:
    """Relative distance of each column's loss from what it must be: same weights, same mask, no dropout.

    A column where it, or that of the gradient's norm, is larger than the policy allows goes to ``failed``, as does one
    that raises.
    """
    errors: dict[str, float] = {}
    for yardstick in {column.kind.yardstick for column in columns}:
        yardstick.known.clear()  # of other weights
    with without_dropout(every_kind(columns)):
        for column in columns:
            with failed.catch(column.name):
                errors[column.name] = max(check_batch(column, batch) for batch in column.kind.batches)
    return errors


def check_batch(column: Column, batch: Batch) -> float:
    """Relative distance of a column's loss on a batch.

    Raises:
        AssertionError: It, or that of the gradient's norm, is larger than the policy allows.
    """
    mask, *expected = column.kind.yardstick(batch)
    allowed = (BF16_LOSS if column.precision == "bf16" else ONE_STEP, GRAD_NORM[column.precision])
    found = column.check(batch, mask)
    errors = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    for what, error, limit in zip(("loss", "gradient's norm"), errors, allowed, strict=True):
        if what == "loss" or not column.compiled:
            assert error <= limit, f"{column.name}: {what} {error:.3g} off the plain one, allowed {limit:.3g}"
    return errors[0]


def every_kind(columns: list[Column]) -> list[Kind]:
    """The columns' kinds, and their yardsticks' models as kinds, each model once."""
    kinds = {column.kind.model: column.kind for column in columns}
    for column in columns:
        model = column.kind.yardstick.model
        if model not in kinds:
            kinds[model] = replace(column.kind, model=model, statistics=getattr(model, "input_norm", None))
    return list(kinds.values())


def measure(case: Case, compiled: bool = True, toy: bool = False) -> tuple[Callable[[], None], dict[str, Any]]:
    """Checks and warms up the columns of a case.

    Returns:
        A round, which runs every column once in turn and keeps their times, and where they are kept. Its ``failed``
        holds the columns that raised or are wrong, with the reason; they have no times.
    """
    failed = Failed()
    columns = make_columns(case, compiled, failed)
    errors = check(columns, failed)
    config = case.config
    record: dict[str, Any] = {
        "part": case.part,
        "factor": case.factor,
        "preset": case.preset,
        "clips": case.clips,
        "seconds": case.seconds,
        "mask_ratio": config.mask_ratio,
        "encoder_layers": config.encoder_layers,
        "mixed": case.mixed,
        "left_out": left_out(case, compiled),
        "failed": failed,
        "peak": {},
        "columns": {},
    }
    products = []
    for precision in case.precisions:
        calls, work = peaks(DTYPES[precision], toy)
        products.append(Turns({"product": calls["product"]}, once=toy))
        record["peak"][precision] = {**products[-1].samples["product"], "work": work["product"]}
    for column in columns:
        if column.name not in failed:
            with failed.catch(column.name):
                record["columns"][column.name] = {"loss_error": errors[column.name], **warm_up(column, case)}
    columns = [column for column in columns if column.name not in failed]

    def one_round() -> None:
        for turns in products:
            turns()
        for column in list(columns):
            with failed.catch(column.name):
                time_column(column, record["columns"][column.name])
            if column.name in failed:
                columns.remove(column)
                del record["columns"][column.name]

    return one_round, record


def warm_up(column: Column, case: Case) -> dict[str, Any]:
    """A column's first steps, and its entry in the record.

    Raises:
        AssertionError: They leave a matrix as it was.
    """
    before = matrices_of(column)
    column.run()
    check_moved(column, before)
    del before
    memory = []
    for _ in range(MEMORY_RUNS):
        column.optimizer.zero_grad(set_to_none=True)
        memory.append(peak_bytes(column.run, DEVICE))
    peak = None if None in memory else round(statistics.median(memory))
    batches = column.kind.batches
    patch, grid_f = case.config.patch_size[0], case.config.grid_f
    tokens = [[frames // patch * grid_f for frames in batch.on_host] for batch in batches]
    entry: dict[str, Any] = {
        "precision": column.precision,
        "steps": len(batches),
        "clips": sum(len(batch.frames) for batch in batches),
        "audio_seconds": sum(sum(batch.seconds) for batch in batches),
        "tokens": sum(map(sum, tokens)),
        "flops": sum(column.kind.flops(count) for counts in tokens for count in counts),
        "peak_bytes_a_clip": None if peak is None else peak // case.clips,
        "seconds": [],
        "cpu_seconds": [],
        "stages": [],
    }
    if case.mixed:
        entry["clip_seconds"] = [[round(second, 2) for second in batch.seconds] for batch in batches]
    return entry


def time_column(column: Column, entry: dict[str, Any]) -> None:
    """Runs a column once and adds its times to its entry.

    Raises:
        AssertionError: Its loss is not finite.
    """
    synchronize()
    began, worked = time.perf_counter(), time.process_time()
    clock = Stages()
    loss = column.run(clock)
    synchronize()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    assert np.isfinite(loss), f"{column.name}: loss {loss}"
    entry["seconds"].append(seconds)
    entry["cpu_seconds"].append(cpu_seconds)
    entry["stages"].append(clock.seconds())


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.timeout(1800)
def bench_step(case: Case, benchmark: Any) -> None:
    if benchmark.disabled:
        case = case.toy()
    for name, why in left_out(case, benchmark.enabled).items():
        print(f"without the column {name}: {why}")
    with load_average(benchmark.extra_info):
        one_round, record = measure(case, compiled=benchmark.enabled, toy=benchmark.disabled)
        benchmark.pedantic(one_round, rounds=case.rounds)
    benchmark.extra_info.update(record)
    assert not record["failed"], str(record["failed"])
