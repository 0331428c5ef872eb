"""One training step, by column: seconds in total and in the forward, clips/s, tokens/s, memory, MFU.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k step --benchmark-json=benchmarks/results/step_cpu.json
python -m pytest benchmarks -k step --benchmark-disable            every column once, at toy sizes

A step draws its masks, runs forward and backward from gradients that are None, clips the gradient norm at 10 and
updates with AdamW (fused); all columns do the same. The front end is not included. Dropout 0.1, no layerdrop. In fp32
and, as ``NAME bf16``, in bf16 (only in bf16, where native: compiled columns, and all columns on a GPU):

    original            benchmarks/baselines/original.py, the paper's implementation style
    reference           MAEAST(impl="torch", attention="sdpa"), eager: the plain path with padded attention
    compiled            torch.compile(fullgraph=True) of it
    fast                this library's step: TrainStep; on a CPU with the default MAEAST, on a GPU with impl="triton"
    fast, gelu          the same with recompute="gelu" (GPU)
    fast, graphs        the same as CUDA graphs (GPU, small batches)
    fast, no dropout    the same without dropout, because SSAST and ViTMAE have none
    vitmae              Hugging Face's ViTMAEForPreTraining at these sizes; benchmarks/baselines/vitmae.py lists
                        the differences
    vitmae compiled     torch.compile of it
    ssast               SSAST at these sizes, objective "joint" (one pass), by TrainStep with the same impl as ``fast``
    ssast, two passes   the same with objective "joint_two_pass", as in the official code
    recipe              the model and optimizer of a file in recipes/, by TrainStep
    recipe, adamw       the same with AdamW, so that the difference is Muon's share

Before anything is timed, every column makes one update as in the timing, but with a given mask, without dropout, at
learning rate 0 and with the layers' weights scaled up, so that each layer affects the loss. Its loss and gradient norm
must agree within tests/common/policy.py: for MAE-AST with the fp32 reference, for SSAST with
SSAST(impl="torch", attention="sdpa") in fp32, for ViTMAE with the loss computed from its predictions. (Compiled columns
are checked without their backward, which would be compiled twice.) A run before the timing must change every matrix.
A column that raises or fails a check is left out and recorded under ``failed``: the other columns are timed, and the
benchmark fails at its end.

There are four sections of cases. ``main``: models and clips in all columns. ``ssast``: MAE-AST against SSAST, without
dropout. ``recipe``: a shipped recipe against models of its sizes with the paper's objective. ``sweep``: one factor at a
time (clips per batch, their length, mask ratio, layers) from one base point.

The case ``mixed`` has clips of unequal length. The paper's setting (``pad_audio`` false, ``random_crop`` true,
``max_sample_size`` 250000) crops every clip of a batch to the shortest and to 15.6 s. Its batches are neighbours in a
list sorted by length, including the shortest and the longest, so that cropping loses little except for the cap. The
packed columns take the same clips, uncropped, in random batches. Each column is credited with the audio that it trains
on. Compiled columns are left out there, because every batch has another shape. ``equal`` is its counterpart: as much
audio in clips of 10 s.

Memory is the median of three steps; on a CPU it is the resident memory of the process.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
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
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
OBJECTIVE = ("positions", "prediction_stride", "temperature", "classification_weight")  # what the original lacks
LR = 1e-4
SEED = 1  # of the masks in a check
GAIN = (
    60.0  # scales a matrix with N inputs by GAIN / sqrt(N): from a std of 0.02 to one that keeps the std of the stream
)
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
        mixed: Whether the clips have unequal lengths.
        batches: Number of batches per round.
        section: "main", "ssast", "recipe" or "sweep".
        factor: In a sweep, the property that differs from the base point; "" for that point itself.
        sizes: Configuration fields that differ from the preset.
        objective: In a recipe's case, the fields of ``OBJECTIVE`` that its model has and the other columns' have not.
        optimizer: In a recipe's case, its optimizer.
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
    section: str = "main"
    factor: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"

    @property
    def config(self) -> MAEASTConfig:
        return MAEASTConfig.preset(self.preset, **{"encoder_layerdrop": 0.0, **self.sizes})

    def toy(self) -> Case:
        """The same case at a size that takes about a second."""
        sizes = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 128, "num_heads": 2, "encoder_layers": 1}
        sizes = {**self.sizes, **sizes}
        return replace(self, clips=2, batches=min(self.batches, 2), seconds=min(self.seconds, 2.0), sizes=sizes)


def sweeps(preset: str, clips: int, changes: dict[str, Sequence[Any]]) -> list[Case]:
    """The base point, and for each factor the points that differ from it in that factor only.

    Args:
        preset: Model sizes of the base point.
        clips: Clips per batch at the base point.
        changes: Factor -> values: clips per batch, seconds per clip, mask ratios, encoder layers.
    """
    base = Case("sweep base", preset, clips, SWEPT, BEST, section="sweep")
    cases = [base]
    for factor, values in changes.items():
        for value in values:
            case = replace(base, factor=factor, name=f"sweep {factor} {value:g}")
            if factor in ("clips", "seconds"):
                case = replace(case, **{factor: value})
            else:  # SSAST has neither a mask ratio nor separate encoder and decoder layers
                case = replace(case, sizes={factor: value}, columns=SWEPT[:2])
            cases.append(case)
    return cases


def recipe_case(name: str) -> Case:
    """One update of ``recipes/NAME.yaml``: as much audio as there, in clips of 10 s."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    model_args = recipe["model_args"]
    others = ("vitmae",) if recipe["preset"].startswith("patch") else ()
    return Case(
        f"recipe {name}",
        recipe["preset"],
        round(recipe["batch_seconds"] / SECONDS),
        ("original", *others, "recipe, adamw", "recipe"),
        section="recipe",
        sizes={key: value for key, value in model_args.items() if key not in OBJECTIVE},
        objective={key: model_args[key] for key in OBJECTIVE if key in model_args},
        optimizer=recipe["optimizer"],
    )


RATIOS = (0.5, 0.6, 0.9)  # the base point has 0.75
ON_CPU = (
    Case("patch_small", "patch_small", 4, (*ALL[:4], "fast, no dropout", *ALL[4:])),
    Case("frame_small", "frame_small", 4, EAGER),
    Case("patch_base", "patch_base", 2, (*EAGER, "fast, no dropout", *ALL[4:]), BEST),
    Case("mixed", "patch_tiny", 4, EAGER, BEST, mixed=True, batches=3),
    Case("equal", "patch_tiny", 5, ("original", "fast"), BEST, batches=3),
    Case("ssast patch_small", "patch_small", 4, AGAINST_SSAST, BEST, section="ssast"),
    Case("ssast frame_small", "frame_small", 4, AGAINST_SSAST, BEST, section="ssast"),
    Case("ssast patch_base", "patch_base", 2, AGAINST_SSAST, BEST, section="ssast"),
    *map(recipe_case, ("quick", "frame")),
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
# Most important first: gpu.py runs them, one process each, until its time is up. Compiling takes minutes.
ON_GPU_CASES = (
    Case("patch_base", "patch_base", 256, (*EAGER, "vitmae", "fast, gelu", "fast, no dropout")),
    Case("mixed", "patch_base", 64, (*EAGER, "fast, gelu"), mixed=True, batches=4),
    Case("equal", "patch_base", 72, (*EAGER, "fast, gelu"), batches=4),
    Case("few clips", "patch_base", 8, (*EAGER, "fast, graphs")),
    Case("frame_base", "frame_base", 256, EAGER),
    Case("ssast patch_base", "patch_base", 128, AGAINST_SSAST, section="ssast"),
    Case("ssast frame_base", "frame_base", 128, AGAINST_SSAST, section="ssast"),
    Case("patch_base compiled", "patch_base", 256, ("reference", "compiled", "fast", "vitmae compiled")),
    Case("few clips compiled", "patch_base", 8, ("reference", "compiled", "fast")),
    *sweeps(
        "patch_base",
        16,  # at 60 s the original's attention weights leave no room for more
        {
            "clips": (32, 64, 128, 256),
            "seconds": (1.0, 2.0, 5.0, 20.0, 60.0),
            "mask_ratio": RATIOS,
            "encoder_layers": (6,),
        },
    ),
)
CASES = ON_GPU_CASES if ON_GPU else ON_CPU
AFTER_FORWARD = ("backward", "optimizer", "update")  # stages after the forward; all others belong to the forward


@dataclass
class Batch:
    """Log-mel (B, T, F), frame counts (B,) on the device and on the host, and the length of each clip in seconds."""

    log_mel: Tensor
    num_frames: Tensor
    host_frames: list[int]
    seconds: list[float]


class Stages:
    """Accumulates seconds by stage, on a GPU with the device's clock: each call ends the stage that it names."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self("")

    def __call__(self, stage: str) -> None:
        event: Any = time.perf_counter()
        if ON_GPU:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.events.append((stage, event))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage. Call it after the device has finished."""
        seconds_by_stage: dict[str, float] = {}
        for (_, start), (stage, end) in zip(self.events, self.events[1:], strict=False):
            seconds_by_stage[stage] = seconds_by_stage.get(stage, 0.0) + (
                start.elapsed_time(end) / 1e3 if ON_GPU else end - start
            )
        return seconds_by_stage


class ExpectedUpdate:
    """The mask with which a batch is checked, and the loss and gradient norm that an update must then return.

    Args:
        draw: Returns the mask of a batch.
        model: Model for whose weights the gradient norm is computed.
        loss: Loss of a batch and a mask in plain PyTorch, in fp32 and without dropout.
    """

    def __init__(
        self, draw: Callable[[Batch], Tensor], model: nn.Module, loss: Callable[[Batch, Tensor], Tensor]
    ) -> None:
        self.draw, self.model, self.loss = draw, model, loss
        self.cache: dict[int, tuple[Tensor, float, float]] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, float, float]:
        """Mask, loss and gradient norm of a batch."""
        if id(batch) not in self.cache:
            mask = self.draw(batch)
            loss = self.loss(batch, mask)
            weights = [p for p in self.model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            grad_norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            self.cache[id(batch)] = mask, loss.item(), grad_norm.item()
        return self.cache[id(batch)]


@dataclass
class Variant:
    """One implementation of the step, in any precision; ``loss`` takes (batch, mask or None).

    Attributes:
        statistics: Module that computes statistics of the batch in training; a check needs them as well.
        flops: Minimum training FLOPs of a step on a clip with L tokens.
        train_step: Options of TrainStep, which then makes the step. None: ``loss``, backward, clipping and AdamW.
    """

    model: nn.Module
    loss: Callable[[Batch, Mask], Tensor]
    batches: list[Batch]
    expected_update: ExpectedUpdate
    flops: Callable[[int], int]
    statistics: nn.Module | None = None
    train_step: dict[str, Any] | None = None


def autocast(precision: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def without_dropout(variants: Sequence[Variant]) -> Iterator[None]:
    """Models as in training, with statistics of the batch, but without dropout and with scaled-up layer matrices.

    With the initial weights a layer changes the loss by less than the rounding of bf16 does. Weights, running
    statistics and training mode are restored afterwards.
    """
    models = {variant.model for variant in variants}
    named_parameters = [pair for model in models for pair in model.named_parameters()]
    matrices = [p.detach() for name, p in named_parameters if p.dim() == 2 and re.search(r"layers?\.\d+\.", name)]
    running_stats = [
        tensor for variant in variants if variant.statistics is not None for tensor in variant.statistics.buffers()
    ]
    saved_values = [(tensor, tensor.clone()) for tensor in (*matrices, *running_stats)]
    for matrix in matrices:
        matrix.mul_(GAIN * matrix.shape[1] ** -0.5)
    for model in models:
        model.eval()
    for variant in variants:
        if variant.statistics is not None:
            variant.statistics.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in saved_values:
                tensor.copy_(saved)
        for model in models:
            model.train()


def labelled(name: str, precision: str) -> str:
    """A column's name in results: ``NAME`` in fp32, otherwise ``NAME bf16``."""
    return name if precision == "fp32" else f"{name} {precision}"


class Column:
    """A variant in a precision.

    Args:
        name: Name of the variant.
        variant: May be shared by columns, which then train the same weights.
        precision: "fp32" or "bf16".
        optimizer: Optimizer of these weights; None with TrainStep.
    """

    def __init__(self, name: str, variant: Variant, precision: str, optimizer: torch.optim.Optimizer | None) -> None:
        self.name = labelled(name, precision)
        self.variant, self.precision, self.model = variant, precision, variant.model.train()
        self.compiled = "compiled" in name
        self.clock: Callable[[str], None] = lambda stage: None
        self.update, self.optimizer = None, optimizer
        if variant.train_step is not None:
            self.update = TrainStep(self.model, LR, precision=precision, **variant.train_step)
            self.optimizer = self.update.optimizer
            if not variant.train_step.get("graphs"):
                forward = self.update.loss_module

                def timed(*inputs: Any, **options: Any) -> Any:
                    out = forward(*inputs, **options)
                    self.clock("forward")
                    return out

                self.update.loss_module = timed

    def run(self, clock: Callable[[str], None] = lambda stage: None) -> float:
        """Make one update per batch; return the last loss. ``clock`` is called with each stage as it ends."""
        self.clock = clock
        if isinstance(self.model, Original):
            self.model.clock = clock
        for batch in self.variant.batches:
            loss, _ = self.one_update(batch)
        return loss.item()

    def one_update(self, batch: Batch, mask: Mask = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Loss, and gradient norm before clipping; ``options`` go to TrainStep."""
        if self.update is not None:
            metrics = self.update(batch.log_mel, batch.host_frames, mask, **options)
            self.clock("update")
            return metrics.loss, metrics.grad_norm
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision):
            loss = self.variant.loss(batch, mask)
        if not isinstance(self.model, Original):  # which calls the clock itself
            self.clock("forward")
        loss.backward()
        self.clock("backward")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.clock("optimizer")
        return loss, grad_norm

    def check(self, batch: Batch, mask: Tensor) -> tuple[float, float]:
        """Loss and gradient norm of an update as in ``run``; weights, learning rate and moments are restored."""
        if self.compiled:
            with torch.no_grad(), autocast(self.precision):
                return self.variant.loss(batch, mask).item(), float("nan")
        try:
            loss, grad_norm = self._update_at_zero_rate(batch, mask)
            return loss.item(), grad_norm.item()
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
                self.update.restore()  # drops CUDA graphs, which were recorded without dropout

    def _update_at_zero_rate(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.update is None:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            return self.one_update(batch, mask)
        if self.update.graphs is not None:  # a CUDA graph draws its masks itself; the seed selects the same mask
            return self.one_update(batch, None, lr=0.0, seed=SEED)
        two_passes = getattr(self.model.config, "objective", "") == "joint_two_pass"
        return self.one_update(batch, (mask, mask) if two_passes else mask, lr=0.0)


def check_moved(column: Column, old_values: dict[str, Tensor]) -> None:
    """Raise AssertionError if a run left a matrix unchanged."""
    unchanged = [
        name for name, old_value in old_values.items() if torch.equal(old_value, column.model.get_parameter(name))
    ]
    assert not unchanged, f"{column.name}: an update does not change {', '.join(unchanged)}"


def matrices_of(column: Column) -> dict[str, Tensor]:
    """Copies of a column's trained matrices. Vectors are left out, because a bias may stay unchanged."""
    return {
        name: parameter.detach().clone()
        for name, parameter in column.model.named_parameters()
        if parameter.dim() > 1 and parameter.requires_grad
    }


def stack_flops(tokens: int, layers: int, width: int, inner: int) -> int:
    """FLOPs of the matrix products in a transformer stack's forward over one clip."""
    return layers * tokens * (8 * width * width + 4 * width * inner + 4 * tokens * width)


def mae_ast_flops(config: MAEASTConfig, tokens: int) -> int:
    """Training FLOPs of MAE-AST on a clip of L tokens: three times the forward's matrix products, as in the paper.

    An implementation that skips some of them (the visible tokens in the last layer) is credited with all of them. Extra
    products (projecting every patch, recomputing) do not count.
    """
    visible_tokens = num_visible(tokens, config.mask_ratio)
    masked_tokens, width, patch_dim = tokens - visible_tokens, config.decoder_embed_dim, config.patch_dim
    forward = 2 * visible_tokens * patch_dim * config.embed_dim
    forward += stack_flops(visible_tokens, config.encoder_layers, config.embed_dim, config.ffn_dim)
    forward += stack_flops(tokens, config.decoder_layers, width, config.ffn_dim)
    forward += 2 * visible_tokens * config.embed_dim * width if config.has_projection else 0
    forward += (
        2 * masked_tokens * width * 2 * patch_dim + 2 * masked_tokens * masked_tokens * patch_dim
    )  # heads, InfoNCE
    return 3 * forward


def ssast_flops(config: SSASTConfig, tokens: int) -> int:
    """As ``mae_ast_flops``; for "joint_two_pass" both passes count."""
    visible_tokens = num_visible(tokens, config.mask_ratio)
    masked_tokens, width, patch_dim = tokens - visible_tokens, config.embed_dim, config.patch_dim
    one_pass = 2 * visible_tokens * patch_dim * width + stack_flops(tokens + 2, config.layers, width, config.ffn_dim)
    heads = 2 * (2 * masked_tokens * width * (width + patch_dim)) + 2 * masked_tokens * masked_tokens * patch_dim
    return 3 * ((2 if config.objective == "joint_two_pass" else 1) * one_pass + heads)


def vitmae_flops(config: MAEASTConfig, tokens: int) -> int:
    """As ``mae_ast_flops``, with a class token, a Linear before the decoder and one head over all tokens."""
    visible_tokens, width, patch_dim = (
        num_visible(tokens, config.mask_ratio),
        config.decoder_embed_dim,
        config.patch_dim,
    )
    forward = 2 * tokens * patch_dim * config.embed_dim + 2 * (visible_tokens + 1) * config.embed_dim * width
    forward += stack_flops(visible_tokens + 1, config.encoder_layers, config.embed_dim, config.ffn_dim)
    forward += stack_flops(tokens + 1, config.decoder_layers, width, config.ffn_dim) + 2 * tokens * width * patch_dim
    return 3 * forward


def make_batch(seconds: list[float], config: MAEASTConfig, generator: torch.Generator) -> Batch:
    """Noise with the mean and std of log-mel, in clips of these lengths (25 ms windows every 10 ms)."""
    num_frames = torch.tensor([1 + int(100 * clip_seconds - 2.5) for clip_seconds in seconds])
    log_mel = torch.randn(len(seconds), int(num_frames.max()), config.num_mel_bins, generator=generator) * 4.0 - 6.0
    return Batch(log_mel.to(DEVICE), num_frames.to(DEVICE), num_frames.tolist(), seconds)


def make_batches(case: Case) -> tuple[list[Batch], list[Batch]]:
    """Batches of the column ``original``, and of the packed columns."""
    config, generator = case.config, torch.Generator().manual_seed(0)
    if not case.mixed:
        batches = [make_batch([case.seconds] * case.clips, config, generator) for _ in range(case.batches)]
        return batches, batches
    # Half of the clips last 10 s, as in AudioSet; half 2 to 35 s with a mean of 12 s, about as in LibriSpeech.
    random = np.random.default_rng(0)
    corpus = np.sort(np.concatenate((np.full(128, SECONDS), 2.0 + 33.0 * random.beta(2.2, 5.0, 128))))
    groups = corpus.reshape(-1, case.clips)
    neighbours = groups[np.linspace(0, len(groups) - 1, case.batches).round().astype(int)]  # both ends included
    cropped = np.minimum(neighbours.min(1, keepdims=True), CROP).repeat(case.clips, 1)
    shuffled = random.permutation(neighbours.ravel()).reshape(neighbours.shape)
    return tuple(
        [make_batch(lengths.tolist(), config, generator) for lengths in clip_lengths]
        for clip_lengths in (cropped, shuffled)
    )


def draw_mask(config: MAEASTConfig, batch: Batch, seed: int | None = None) -> Tensor:
    """(B, L) bool, True = masked: one mask per clip."""
    num_tokens = batch.num_frames // config.patch_size[0] * config.grid_f
    max_tokens = batch.log_mel.shape[1] // config.patch_size[0] * config.grid_f
    return sample_mask(config.masking, num_tokens, config.grid_f, config.mask_ratio, seed=seed, max_tokens=max_tokens)


def packed_loss_of(reference: MAEAST, model: Callable[..., Any]) -> Callable[[Batch, Mask], Tensor]:
    """Loss of a batch and a mask by a model, or a compiled one, with the configuration of ``reference``."""

    def loss(batch: Batch, mask: Mask) -> Tensor:
        mask = draw_mask(reference.config, batch) if mask is None else mask
        return model(batch.log_mel, batch.num_frames, mask, sizes=reference.sizes_of(batch.host_frames)).loss

    return loss


def mae_ast_variants(case: Case, names: Sequence[str], failed: Failed) -> tuple[dict[str, Variant], MAEAST]:
    """Variants of MAE-AST with equal weights, and the reference model."""
    config = case.config
    original = Original(config).to(DEVICE)
    weights = convert_state_dict(original.state_dict(), config)

    def build(config: MAEASTConfig = config, **options: str) -> MAEAST:
        model = MAEAST(config, **options)
        model.load_state_dict(weights)
        return model.to(DEVICE)

    reference = build(impl="torch", attention="sdpa")
    original_batches, batches = make_batches(case)
    max_tokens = max(batch.log_mel.shape[1] for batch in original_batches) // config.patch_size[0] * config.grid_f
    if max_tokens > len(original.encoder_positions):  # its table has 2048 positions, 41 s of patches
        original.encoder_positions = sinusoid(max_tokens, config.embed_dim).to(DEVICE)
        original.decoder_positions = sinusoid(max_tokens, config.decoder_embed_dim).to(DEVICE)

    packed_loss = functools.partial(packed_loss_of, reference)

    def original_loss(batch: Batch, mask: Mask) -> Tensor:
        return original(batch.log_mel, mask).loss

    # The original needs clips of one length; the reference accepts them too.
    expected_update = ExpectedUpdate(lambda batch: draw_mask(config, batch, SEED), reference, packed_loss(reference))
    shared: dict[str, Any] = {"expected_update": expected_update, "flops": lambda tokens: mae_ast_flops(config, tokens)}
    reference_variant = Variant(reference, packed_loss(reference), batches, statistics=reference.input_norm, **shared)
    variants = {
        "original": Variant(original, original_loss, original_batches, statistics=original.batch_norm, **shared)
    }
    variants["reference"] = reference_variant
    if "compiled" in names:
        variants["compiled"] = replace(reference_variant, loss=packed_loss(torch.compile(reference, fullgraph=True)))
    fast_options = {"fast": {}, "fast, gelu": {"recompute": "gelu"}, "fast, graphs": {}, "fast, no dropout": {}}
    for name, options in fast_options.items():
        if name not in names:
            continue
        with failed.catch(*labels(case, name)):
            variant_config = replace(config, **NO_DROPOUT) if name == "fast, no dropout" else config
            model = build(variant_config, impl="triton" if ON_GPU else "torch", **options)
            extra = {"statistics": model.input_norm, "train_step": {"graphs": name == "fast, graphs"}}
            variants[name] = Variant(model, packed_loss(model), batches, **shared, **extra)
    return variants, reference


def recipe_variants(case: Case, names: Sequence[str], failed: Failed) -> dict[str, Variant]:
    """Variants of a recipe's model with equal weights; in a check all masked tokens are predicted."""
    config = replace(case.config, **case.objective)
    _, batches = make_batches(case)
    reference = MAEAST(config, impl="torch", attention="sdpa").to(DEVICE)

    def draw(batch: Batch) -> Tensor:
        return draw_mask(config, batch, SEED)

    expected_update = ExpectedUpdate(draw, reference, packed_loss_of(reference, reference))
    variants = {}
    for name, optimizer in (("recipe, adamw", "adamw"), ("recipe", case.optimizer)):
        if name not in names:
            continue
        with failed.catch(*labels(case, name)):
            model = MAEAST(config, impl="triton" if ON_GPU else "torch").to(DEVICE)
            model.load_state_dict(reference.state_dict())
            variants[name] = Variant(
                model,
                packed_loss_of(reference, model),
                batches,
                expected_update,
                lambda tokens: mae_ast_flops(config, tokens),
                statistics=model.input_norm,
                train_step={"optimizer": optimizer},
            )
    return variants


def ssast_config(config: MAEASTConfig, num_frames: int, objective: str) -> SSASTConfig:
    """SSAST with the depth and width of MAE-AST's encoder, and its own mask ratio: 400 of 512 tokens."""
    sizes = {"patch_size": config.patch_size, "embed_dim": config.embed_dim, "num_heads": config.num_heads}
    sizes |= {"layers": config.encoder_layers, "input_frames": max(1024, num_frames), "objective": objective}
    all_tokens = sizes["input_frames"] // config.patch_size[0] * config.grid_f
    return SSASTConfig(**sizes, mask_patches=400 * all_tokens // 512)


def ssast_variants(case: Case, names: Sequence[str], failed: Failed) -> dict[str, Variant]:
    """Variants of SSAST with equal weights; in a check both of two passes mask the same tokens."""
    _, batches = make_batches(case)
    num_frames = max(batch.log_mel.shape[1] for batch in batches)
    weights: dict[str, Tensor] = {}

    def model(objective: str, **options: str) -> SSAST:
        ssast = SSAST(ssast_config(case.config, num_frames, objective), **options)
        if not weights:
            weights.update(ssast.state_dict())
        ssast.load_state_dict(weights)
        return ssast.to(DEVICE)

    joint_reference = model("joint", impl="torch", attention="sdpa")
    batches = [replace(batch, log_mel=joint_reference.normalize(batch.log_mel)) for batch in batches]

    def loss_of(model: SSAST) -> Callable[[Batch, Mask], Tensor]:
        two_passes = model.config.objective == "joint_two_pass"
        return lambda batch, mask: model(batch.log_mel, batch.num_frames, (mask, mask) if two_passes else mask).loss

    def draw(batch: Batch) -> Tensor:
        return joint_reference.sample_mask(batch.num_frames, batch.log_mel.shape[1], seed=SEED)

    variants = {}
    for name, objective in (("ssast", "joint"), ("ssast, two passes", "joint_two_pass")):
        if name not in names:
            continue
        with failed.catch(*labels(case, name)):
            ssast = model(objective, impl="triton" if ON_GPU else "torch")

            def flops(tokens: int, config: SSASTConfig = ssast.config) -> int:
                return ssast_flops(config, tokens)

            # The expected update uses the variant's objective: two passes sum other gradients than one.
            reference = joint_reference if objective == "joint" else model(objective, impl="torch", attention="sdpa")
            expected_update = ExpectedUpdate(draw, reference, loss_of(reference))
            variants[name] = Variant(ssast, loss_of(ssast), batches, expected_update, flops, train_step={})
    return variants


def vitmae_variants(case: Case, names: Sequence[str], reference: nn.Module) -> dict[str, Variant]:
    """Variants of ViTMAE."""
    config = case.config
    batches, _ = make_batches(case)
    model = vitmae.build(config, batches[0].log_mel.shape[1]).to(DEVICE)

    def loss_of(model: Callable[..., Any]) -> Callable[[Batch, Mask], Tensor]:
        def loss(batch: Batch, mask: Mask) -> Tensor:
            noise = None if mask is None else mask.float()
            return model(vitmae.pixels(batch.log_mel, config), noise=noise).loss

        return loss

    def expected(batch: Batch, mask: Tensor) -> Tensor:
        return vitmae.check(model, vitmae.pixels(batch.log_mel, config), mask, reference)

    expected_update = ExpectedUpdate(lambda batch: draw_mask(config, batch, SEED), model, expected)
    variants = {
        "vitmae": Variant(model, loss_of(model), batches, expected_update, lambda tokens: vitmae_flops(config, tokens))
    }
    if "vitmae compiled" in names:
        variants["vitmae compiled"] = replace(variants["vitmae"], loss=loss_of(torch.compile(model, fullgraph=True)))
    return variants


def unavailable_columns(case: Case, compiled: bool = True) -> dict[str, str]:
    """Columns of a case that cannot run on this machine, with the reason."""
    compiler_reason = no_compiler() if compiled else "not at toy sizes"
    reasons = {name: compiler_reason for name in case.columns if "compiled" in name and compiler_reason}
    library_reason = vitmae.missing(case.config)
    return reasons | {name: library_reason for name in case.columns if "vitmae" in name and library_reason}


def labels(case: Case, *names: str) -> list[str]:
    """Names of these columns of a case in the results."""
    return [labelled(name, precision) for name in names for precision in case.precisions if runs_in(name, precision)]


def runs_in(name: str, precision: str) -> bool:
    """Whether a column runs in a precision. Compiled columns run only in the best one: compiling takes minutes."""
    return "compiled" not in name or precision in BEST


def make_columns(case: Case, compiled: bool, failed: Failed) -> list[Column]:
    """Columns of a case, by precision and in the case's order. Those that raise go to ``failed``."""
    torch.manual_seed(0)
    torch.compiler.reset()  # graphs of one case must not use up the recompilation limit of the next ...
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and silently fall back to eager code
    unavailable = unavailable_columns(case, compiled)
    names = [name for name in case.columns if name not in unavailable]
    variants, reference = mae_ast_variants(case, names, failed)
    if ssast_names := [name for name in names if "ssast" in name]:
        with failed.catch(*labels(case, *ssast_names)):
            variants |= ssast_variants(case, names, failed)
    if recipe_names := [name for name in names if "recipe" in name]:
        with failed.catch(*labels(case, *recipe_names)):
            variants |= recipe_variants(case, names, failed)
    if vitmae_names := [name for name in names if "vitmae" in name]:
        with failed.catch(*labels(case, *vitmae_names)):
            variants |= vitmae_variants(case, names, reference)
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
    columns = []
    for precision in case.precisions:
        for name in names:
            if name not in variants or not runs_in(name, precision):
                continue
            variant = variants[name]
            with failed.catch(labelled(name, precision)):
                if variant.train_step is None and variant.model not in optimizers:
                    options = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
                    optimizers[variant.model] = torch.optim.AdamW(variant.model.parameters(), **options)
                columns.append(Column(name, variant, precision, optimizers.get(variant.model)))
    return columns


def check(columns: list[Column], failed: Failed) -> dict[str, float]:
    """Relative error of each column's loss with equal weights and mask, without dropout.

    A column that raises, or whose error of the loss or gradient norm exceeds the policy's limit, goes to ``failed``.
    """
    errors: dict[str, float] = {}
    for expected_update in {column.variant.expected_update for column in columns}:
        expected_update.cache.clear()  # values of other weights
    with without_dropout(all_variants(columns)):
        for column in columns:
            with failed.catch(column.name):
                errors[column.name] = max(check_batch(column, batch) for batch in column.variant.batches)
    return errors


def check_batch(column: Column, batch: Batch) -> float:
    """Relative error of a column's loss on a batch.

    Raises:
        AssertionError: The error of the loss or of the gradient norm exceeds the policy's limit.
    """
    mask, *expected = column.variant.expected_update(batch)
    limits = (BF16_LOSS if column.precision == "bf16" else ONE_STEP, GRAD_NORM[column.precision])
    actual = column.check(batch, mask)
    errors = [
        abs(actual_value - expected_value) / abs(expected_value)
        for actual_value, expected_value in zip(actual, expected, strict=True)
    ]
    for quantity, error, limit in zip(("loss", "gradient norm"), errors, limits, strict=True):
        if quantity == "loss" or not column.compiled:
            assert error <= limit, (
                f"{column.name}: {quantity} is off by {error:.3g} relative to plain PyTorch, allowed {limit:.3g}"
            )
    return errors[0]


def all_variants(columns: list[Column]) -> list[Variant]:
    """The columns' variants and, as variants, the models of their expected updates; each model once."""
    variants = {column.variant.model: column.variant for column in columns}
    for column in columns:
        model = column.variant.expected_update.model
        if model not in variants:
            variants[model] = replace(column.variant, model=model, statistics=getattr(model, "input_norm", None))
    return list(variants.values())


def measure(case: Case, compiled: bool = True, toy: bool = False) -> tuple[Callable[[], None], dict[str, Any]]:
    """Check and warm up the columns of a case.

    Returns:
        A function that runs one round (every column once, in turn) and records the times, and the record. Its
        ``failed`` holds the columns that raised or are wrong, with the reason; they have no times.
    """
    failed = Failed()
    columns = make_columns(case, compiled, failed)
    errors = check(columns, failed)
    config = case.config
    record: dict[str, Any] = {
        "part": case.section,
        "factor": case.factor,
        "preset": case.preset,
        "clips": case.clips,
        "seconds": case.seconds,
        "mask_ratio": config.mask_ratio,
        "encoder_layers": config.encoder_layers,
        "mixed": case.mixed,
        "left_out": unavailable_columns(case, compiled),
        "failed": failed,
        "peak": {},
        "columns": {},
    }
    product_turns = []
    for precision in case.precisions:
        calls, work = peaks(DTYPES[precision], toy)
        product_turns.append(Turns({"product": calls["product"]}, single=toy))
        record["peak"][precision] = {**product_turns[-1].samples["product"], "work": work["product"]}
    for column in columns:
        if column.name not in failed:
            with failed.catch(column.name):
                record["columns"][column.name] = {"loss_error": errors[column.name], **warm_up(column, case)}
    columns = [column for column in columns if column.name not in failed]

    def one_round() -> None:
        for turns in product_turns:
            turns()
        for column in list(columns):
            with failed.catch(column.name):
                time_column(column, record["columns"][column.name])
            if column.name in failed:
                columns.remove(column)
                del record["columns"][column.name]

    return one_round, record


def warm_up(column: Column, case: Case) -> dict[str, Any]:
    """Run a column's first steps, and return its entry in the record.

    Raises:
        AssertionError: The steps leave a matrix unchanged.
    """
    old_values = matrices_of(column)
    column.run()
    check_moved(column, old_values)
    del old_values
    memory = []
    for _ in range(MEMORY_RUNS):
        column.optimizer.zero_grad(set_to_none=True)
        memory.append(peak_bytes(column.run, DEVICE))
    peak = None if None in memory else round(statistics.median(memory))
    batches = column.variant.batches
    patch, grid_f = case.config.patch_size[0], case.config.grid_f
    tokens = [[frames // patch * grid_f for frames in batch.host_frames] for batch in batches]
    entry: dict[str, Any] = {
        "precision": column.precision,
        "steps": len(batches),
        "clips": sum(len(batch.num_frames) for batch in batches),
        "audio_seconds": sum(sum(batch.seconds) for batch in batches),
        "tokens": sum(map(sum, tokens)),
        "flops": sum(column.variant.flops(count) for counts in tokens for count in counts),
        "peak_bytes_a_clip": None if peak is None else peak // case.clips,
        "seconds": [],
        "cpu_seconds": [],
        "stages": [],
    }
    if case.mixed:
        entry["clip_seconds"] = [[round(second, 2) for second in batch.seconds] for batch in batches]
    return entry


def time_column(column: Column, entry: dict[str, Any]) -> None:
    """Run a column once, and add its times to its entry.

    Raises:
        AssertionError: The loss is not finite.
    """
    synchronize()
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    clock = Stages()
    loss = column.run(clock)
    synchronize()
    seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
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
    for name, reason in unavailable_columns(case, benchmark.enabled).items():
        print(f"column {name} left out: {reason}")
    with load_average(benchmark.extra_info):
        one_round, record = measure(case, compiled=benchmark.enabled, toy=benchmark.disabled)
        benchmark.pedantic(one_round, rounds=case.rounds)
    benchmark.extra_info.update(record)
    assert not record["failed"], str(record["failed"])
