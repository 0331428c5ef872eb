"""``mae-ast-fast bench``: time a training step on this machine, in about a minute.

Three implementations of a step take turns, so a machine that slows down slows all of them down:

    reference    MAEAST(impl="torch", attention="sdpa") in plain PyTorch: autocast, clip_grad_norm_, AdamW
    fast         this library's step: TrainStep, on a GPU with impl="triton"
    ssast        SSAST, whose encoder runs over masked tokens too, in the same TrainStep

The input is 10 s clips of noise, 75 % masked (SSAST: 400 of 512 tokens), dropout 0.1 (SSAST has none), no layerdrop.
Before anything is timed, two checks must pass. For both of our models, an update of TrainStep must report the loss and
gradient norm of plain PyTorch on the same mask. The first update must change every matrix. ``pytest benchmarks``
measures more.
"""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..devices import pick_precision
from ..models.base import PretrainingModel
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.fbank import SAMPLE_RATE, num_frames
from ..training.step import PRECISIONS, TrainStep

SECONDS = 10.0  # length of a clip
LR = 1e-4
SIZES = ("base", "small", "tiny")
SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}  # relative; the tolerances of tests/common/policy.py are far tighter
SAME_NORM = {"fp32": 1e-3, "bf16": 5e-2}  # relative, of the gradient norm


@dataclasses.dataclass
class Column:
    """One implementation of a training step.

    Attributes:
        name: Name of the column in the report.
        model: The model that ``step`` trains.
        step: Makes one update and returns the loss.
        seconds: Time of the step in each round.
        peak_bytes: Peak memory of a step above the memory used before it; None if it cannot be measured.
    """

    name: str
    model: nn.Module
    step: Callable[[], Tensor]
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None


def bench(
    preset: str | None = None,
    clips: int | None = None,
    device: str = "auto",
    *,
    seconds: float = 60.0,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Time the columns on the largest model whose rounds fit into ``seconds``.

    Args:
        preset: Model sizes, {patch,frame}_{base,small,tiny}. None: the largest that fits, judged by one step of tiny.
        clips: Number of 10 s clips per batch, at least 1. None: 4 on a CPU, 64 on a GPU.
        device: "cpu", "cuda", or "auto" (CUDA if available).
        seconds: Approximate time budget. At least three rounds are run.
        progress: Called with each line of progress.

    Returns:
        ``preset``, ``clips``, ``clip_seconds``, ``device``, ``precision``, ``threads``, ``torch``, ``rounds``,
        ``loss_difference`` and ``columns``: name -> ``seconds`` of each round, ``clips_per_second`` (median),
        ``peak_bytes_a_clip``.

    Raises:
        ValueError: The preset is unknown, ``clips`` is below 1, the device is missing, or the losses or gradient norms
            of the columns differ.
    """
    torch_device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch finds no CUDA device")
    if clips is not None and clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}")
    started = time.perf_counter()
    clips = clips or (64 if torch_device.type == "cuda" else 4)
    precision = pick_precision("auto", torch_device)
    if preset is None:
        preset = f"patch_{_largest(torch_device, precision, clips, seconds)}"
        progress(f"{preset}: the largest model whose rounds fit into {seconds:g} s")
    columns, difference = make_columns(preset, clips, torch_device, precision)
    for column in columns:
        _check_first_update(column)
        column.peak_bytes = peak_bytes(column.step, torch_device)
        progress(f"{column.name}: warmed up")
    rounds = 0
    while rounds < 3 or (time.perf_counter() - started) * (rounds + 1) / rounds < seconds:
        for column in columns:
            _wait(torch_device)
            start = time.perf_counter()
            loss = column.step()
            _wait(torch_device)
            column.seconds.append(time.perf_counter() - start)
            if not loss.isfinite():
                raise ValueError(f"{column.name}: the loss is {float(loss)}")
        rounds += 1
        progress(f"round {rounds}: " + ", ".join(f"{column.name} {column.seconds[-1]:.2f} s" for column in columns))
    return {
        "preset": preset,
        "clips": clips,
        "clip_seconds": SECONDS,
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "cpu",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
        "loss_difference": difference,
        "columns": {
            column.name: {
                "seconds": column.seconds,
                "clips_per_second": clips / statistics.median(column.seconds),
                "peak_bytes_a_clip": None if column.peak_bytes is None else column.peak_bytes // clips,
            }
            for column in columns
        },
    }


def make_columns(preset: str, clips: int, device: torch.device, precision: str) -> tuple[list[Column], float]:
    """The columns, and the relative difference between the losses of reference and fast."""
    config = MAEASTConfig.preset(preset, encoder_layerdrop=0.0)
    torch.manual_seed(0)
    frames = int(num_frames(round(SECONDS * SAMPLE_RATE)))
    log_mel = (torch.randn(clips, frames, config.num_mel_bins) * 4.0 - 6.0).to(device)
    reference = MAEAST(config, impl="torch", attention="sdpa").to(device).train()
    model = MAEAST(config, impl="triton" if device.type == "cuda" else "torch").to(device).train()
    model.load_state_dict(reference.state_dict())
    plain = SSAST(SSASTConfig.preset(preset), impl="torch", attention="sdpa").to(device).train()
    ssast = SSAST(SSASTConfig.preset(preset), impl=model.impl).to(device).train()
    ssast.load_state_dict(plain.state_dict())
    fast, baseline = (TrainStep(trained, LR, precision=precision) for trained in (model, ssast))
    normalized = ssast.normalize(log_mel)
    difference = check("fast", fast, reference, log_mel, precision=precision)
    check("ssast", baseline, plain, normalized, precision=precision)
    return [
        Column("reference", reference, _plain(reference, log_mel, precision)),
        Column("fast", model, lambda: fast(log_mel).loss),
        Column("ssast", ssast, lambda: baseline(normalized).loss),
    ], difference


def _plain(model: PretrainingModel, log_mel: Tensor, precision: str) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), eps=1e-6, fused=True)
    dtype = PRECISIONS[precision]

    def step() -> Tensor:
        with torch.autocast(log_mel.device.type, dtype, enabled=dtype is not None):
            loss = model(log_mel).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check(name: str, step: TrainStep, reference: PretrainingModel, log_mel: Tensor, *, precision: str) -> float:
    """Compare one update with plain PyTorch on the same weights and mask, without dropout.

    The learning rate of the update is 0. Weights, learning rate and AdamW's moments are restored afterwards.

    Args:
        name: Name of the column in error messages.
        step: Training step to check.
        reference: Model with the same weights, run in plain PyTorch.
        log_mel: Input, (clips, frames, mel bins).
        precision: "fp32" or "bf16"; selects autocast and the tolerances ``SAME_LOSS`` and ``SAME_NORM``.

    Returns:
        Relative difference of the losses.

    Raises:
        ValueError: The loss or the gradient norm differs by more than the tolerance.
    """
    clips, frames = log_mel.shape[:2]
    trained = cast(MAEAST | SSAST, step.model)
    mask = trained.sample_mask(torch.full((clips,), frames, device=log_mel.device), frames, seed=0)
    for model in (reference, trained):
        model.eval()
    expected_loss, expected_norm = _plain_update(reference, log_mel, mask, precision)
    metrics = step(log_mel, mask=mask, lr=0.0)
    for model in (reference, trained):
        model.train()
    for state in step.optimizer.state.values():
        for moment in state.values():
            moment.zero_()
    step.lr.fill_(LR)
    tolerances = {"loss": SAME_LOSS, "gradient norm": SAME_NORM}
    comparisons = zip(
        tolerances, (float(metrics.loss), float(metrics.grad_norm)), (expected_loss, expected_norm), strict=True
    )
    for quantity, actual, expected in comparisons:
        if not abs(actual / expected - 1.0) <= tolerances[quantity][precision]:
            raise ValueError(f"{name} computes the {quantity} {actual}, expected {expected}: nothing is timed")
    return abs(float(metrics.loss) / expected_loss - 1.0)


def _plain_update(
    model: PretrainingModel, log_mel: Tensor, mask: Tensor | tuple[Tensor, Tensor], precision: str
) -> tuple[float, float]:
    """Loss and gradient norm of one backward pass; clears the gradients."""
    dtype = PRECISIONS[precision]
    with torch.autocast(log_mel.device.type, dtype, enabled=dtype is not None):
        loss = model(log_mel, mask=mask).loss
    loss.backward()
    grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return float(loss), float(grad_norm)


def _check_first_update(column: Column) -> None:
    """Make the first update and check that it changes every matrix.

    Raises:
        ValueError: A matrix is unchanged.
    """
    old_values = {
        name: parameter.detach().clone() for name, parameter in column.model.named_parameters() if parameter.dim() > 1
    }
    column.step()
    unchanged = [
        name for name, old_value in old_values.items() if torch.equal(old_value, column.model.get_parameter(name))
    ]
    if unchanged:
        raise ValueError(f"{column.name}: the first update does not change {', '.join(unchanged)}: nothing is timed")


def _largest(device: torch.device, precision: str, clips: int, seconds: float) -> str:
    """The largest of ``SIZES`` of which about ten rounds fit into ``seconds``, estimated from one round of tiny."""
    if device.type == "cuda":
        return SIZES[0]
    columns, _ = make_columns("patch_tiny", clips, device, precision)
    start = time.perf_counter()
    for column in columns:
        column.step()
    tiny_seconds = time.perf_counter() - start
    tiny_width = MAEASTConfig.preset("patch_tiny").embed_dim
    for size in SIZES:
        # Matrix products scale with the square of the width; attention and elementwise operations with the width.
        if tiny_seconds * (MAEASTConfig.preset(f"patch_{size}").embed_dim / tiny_width) ** 2 * 10 <= seconds:
            return size
    return SIZES[-1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of ``function`` above the memory used before it, in bytes; None if it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, which the call could reuse uncounted
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
    except OSError:
        return None

    def status(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    before = status("VmRSS:")
    function()
    return status("VmHWM:") - before


def to_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    columns = report["columns"]
    hardware = report["device"] if report["device"] != "cpu" else f"CPU, {report['threads']} threads"
    lines = [
        "",
        f"{report['preset']}, {report['clips']} clips of {report['clip_seconds']:g} s per step, {report['precision']}, "
        f"{hardware}, torch {report['torch']}; medians of {report['rounds']} rounds",
        "",
        f"{'':<10} {'s/step':>9} {'clips/s':>9} {'x real time':>11} {'MB/clip':>10} {'vs. ssast':>14}",
    ]
    speedups = {
        name: statistics.median(
            ssast_seconds / column_seconds
            for ssast_seconds, column_seconds in zip(columns["ssast"]["seconds"], column["seconds"], strict=True)
        )
        for name, column in columns.items()
    }
    for name, column in columns.items():
        rate, peak = column["clips_per_second"], column["peak_bytes_a_clip"]
        memory = "" if peak is None else f"{peak / 1e6:.0f}"
        lines.append(
            f"{name:<10} {statistics.median(column['seconds']):>9.3f} {rate:>9.2f} "
            f"{rate * report['clip_seconds']:>11.1f} {memory:>10} {speedups[name]:>12.2f} x"
        )
    clips_per_second = columns["fast"]["clips_per_second"]
    hours = 1_000_000 / clips_per_second / 3600
    lines += ["", f"A million clips of {report['clip_seconds']:g} s take {hours:,.1f} hours on this machine."]
    return "\n".join(lines)
