"""``mae-ast-fast bench``: what a training step costs on this machine, in about a minute.

Three ways to do a step take turns, so that a machine that slows down meanwhile slows all of them down:

    reference    MAEAST(impl="torch", attention="sdpa") in plain PyTorch: autocast, clip_grad_norm_, AdamW
    fast         this library's step: TrainStep, on a GPU with impl="triton"
    ssast        SSAST, whose encoder runs over masked tokens too, in the same TrainStep

on clips of 10 s of noise, 75 % masked (SSAST: 400 of 512 tokens), dropout 0.1 (SSAST has none), no layerdrop. Before
anything is timed, an update of TrainStep must tell the loss and the gradient's norm that plain PyTorch has on the same
mask, for both of our models, and a first update must move every matrix. ``pytest benchmarks`` measures more.
"""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import pick_precision
from ..models.base import PretrainingModel
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.fbank import SAMPLE_RATE, num_frames
from ..training.step import PRECISIONS, TrainStep

SECONDS = 10.0  # of a clip
LR = 1e-4
SIZES = ("base", "small", "tiny")
SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}  # relative; tests/common/policy.py holds the implementations to far less
SAME_NORM = {"fp32": 1e-3, "bf16": 5e-2}  # the same for the gradient's norm


@dataclasses.dataclass
class Column:
    """One way to do a step.

    Attributes:
        name: In the table.
        model: What it trains.
        step: Does one update and returns the loss.
        seconds: Of each round.
        peak_bytes: Largest memory of a step over what lies there anyway; None where nobody counts it.
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
    seconds: float = 60.0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Times the columns on the largest model whose rounds fit into ``seconds``.

    Args:
        preset: Model sizes, {patch,frame}_{base,small,tiny}; None: chosen by one step of the smallest.
        clips: Clips of 10 s in a batch. None: 4 on a CPU, 64 on a GPU.
        device: cpu, cuda, or auto.
        seconds: To spend, about.
        say: Takes lines of progress.

    Returns:
        ``preset``, ``clips``, ``device``, ``precision``, ``threads``, ``torch``, ``rounds``, ``loss_difference`` and
        ``columns``, name -> seconds of each round, clips_per_second (median), peak_bytes_a_clip, parameters.

    Raises:
        ValueError: An unknown preset, no clips, a device that is not there, or a column computes something else.
    """
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch sees no CUDA device here")
    if clips is not None and clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}")
    began = time.perf_counter()
    clips = clips or (64 if place.type == "cuda" else 4)
    precision = pick_precision("auto", place)
    if preset is None:
        preset = f"patch_{_largest(place, precision, clips, seconds)}"
        say(f"{preset}: the largest model whose rounds fit into {seconds:g} s here")
    columns, difference = make_columns(preset, clips, place, precision)
    for column in columns:
        _moves(column)
        column.peak_bytes = peak_bytes(column.step, place)
        say(f"{column.name}: warmed up")
    rounds = 0
    while rounds < 3 or (time.perf_counter() - began) * (rounds + 1) / rounds < seconds:
        for column in columns:
            _wait(place)
            start = time.perf_counter()
            loss = column.step()
            _wait(place)
            column.seconds.append(time.perf_counter() - start)
            if not loss.isfinite():
                raise ValueError(f"{column.name}: the loss became {float(loss)}")
        rounds += 1
        say(f"round {rounds}: " + ", ".join(f"{column.name} {column.seconds[-1]:.2f} s" for column in columns))
    return {
        "preset": preset,
        "clips": clips,
        "clip_seconds": SECONDS,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
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
    """The columns, and the relative distance between the losses of reference and fast."""
    config = MAEASTConfig.preset(preset, encoder_layerdrop=0.0)
    torch.manual_seed(0)
    frames = num_frames(round(SECONDS * SAMPLE_RATE))
    log_mel = (torch.randn(clips, frames, config.num_mel_bins) * 4.0 - 6.0).to(device)
    reference = MAEAST(config, impl="torch", attention="sdpa").to(device).train()
    model = MAEAST(config, impl="triton" if device.type == "cuda" else "torch").to(device).train()
    model.load_state_dict(reference.state_dict())
    plain = SSAST(SSASTConfig.preset(preset), impl="torch", attention="sdpa").to(device).train()
    ssast = SSAST(SSASTConfig.preset(preset), impl=model.impl).to(device).train()
    ssast.load_state_dict(plain.state_dict())
    fast, baseline = (TrainStep(each, LR, precision=precision) for each in (model, ssast))
    normal = ssast.normalize(log_mel)
    difference = check("fast", fast, reference, log_mel, precision)
    check("ssast", baseline, plain, normal, precision)
    return [
        Column("reference", reference, _plain(reference, log_mel, precision)),
        Column("fast", model, lambda: fast(log_mel).loss),
        Column("ssast", ssast, lambda: baseline(normal).loss),
    ], difference


def _plain(model: PretrainingModel, features: Tensor, precision: str) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), eps=1e-6, fused=True)
    dtype = PRECISIONS[precision]

    def step() -> Tensor:
        with torch.autocast(features.device.type, dtype, enabled=dtype is not None):
            loss = model(features).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check(name: str, step: TrainStep, plain: PretrainingModel, features: Tensor, precision: str) -> float:
    """Relative distance of an update's loss from that of the plain model with the same weights, mask, and no dropout.

    The update has a rate of 0; weights, rate and AdamW's moments are afterwards as before.

    Raises:
        ValueError: It is too large, or that of the gradient's norm.
    """
    clips, frames = features.shape[:2]
    mask = step.model.sample_mask(torch.full((clips,), frames, device=features.device), frames, seed=0)
    for model in (plain, step.model):
        model.eval()
    loss, norm = _plain_update(plain, features, mask, precision)
    told = step(features, mask=mask, lr=0.0)
    for model in (plain, step.model):
        model.train()
    for state in step.optimizer.state.values():
        for moment in state.values():
            moment.zero_()
    step.lr.fill_(LR)
    allowed = {"loss": SAME_LOSS, "gradient's norm": SAME_NORM}
    found = zip(allowed, (float(told.loss), float(told.grad_norm)), (loss, norm), strict=True)
    for what, ours, theirs in found:
        if not abs(ours / theirs - 1.0) <= allowed[what][precision]:
            raise ValueError(f"{name} computes the {what} {ours}, reference {theirs}: nothing is timed")
    return abs(float(told.loss) / loss - 1.0)


def _plain_update(model: PretrainingModel, features: Tensor, mask: Tensor, precision: str) -> tuple[float, float]:
    """Loss and gradient's norm; leaves no gradient."""
    dtype = PRECISIONS[precision]
    with torch.autocast(features.device.type, dtype, enabled=dtype is not None):
        loss = model(features, mask=mask).loss
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return float(loss), float(norm)


def _moves(column: Column) -> None:
    """The first update, after which every matrix must be another one.

    Raises:
        ValueError: One is not.
    """
    before = {n: p.detach().clone() for n, p in column.model.named_parameters() if p.dim() > 1}
    column.step()
    still = [name for name, x in before.items() if torch.equal(x, column.model.get_parameter(name))]
    if still:
        raise ValueError(f"{column.name}: an update does not move {', '.join(still)}: nothing is timed")


def _largest(device: torch.device, precision: str, clips: int, seconds: float) -> str:
    """The largest of ``SIZES`` of which some ten rounds fit into ``seconds``, judged by one of the smallest."""
    if device.type == "cuda":
        return SIZES[0]
    columns, _ = make_columns("patch_tiny", clips, device, precision)
    start = time.perf_counter()
    for column in columns:
        column.step()
    spent = time.perf_counter() - start
    tiny = MAEASTConfig.preset("patch_tiny").embed_dim
    for size in SIZES:
        # Products grow with the width's square; attention and what lies between them with the width.
        if spent * (MAEASTConfig.preset(f"patch_{size}").embed_dim / tiny) ** 2 * 10 <= seconds:
            return size
    return SIZES[-1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Largest memory of ``run`` over what lies there anyway; None where nobody counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
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
    run()
    return status("VmHWM:") - before


def to_text(report: dict[str, Any]) -> str:
    """The report as a table, and what it means."""
    columns = report["columns"]
    where = report["device"] if report["device"] != "cpu" else f"CPU, {report['threads']} threads"
    lines = [
        "",
        f"{report['preset']}, {report['clips']} clips of {report['clip_seconds']:g} s a step, {report['precision']}, "
        f"{where}, torch {report['torch']}; medians of {report['rounds']} rounds",
        "",
        f"{'':<10} {'s a step':>9} {'clips/s':>9} {'hours/hour':>11} {'MB a clip':>10} {'against ssast':>14}",
    ]
    pairs = {
        name: statistics.median(
            theirs / ours for theirs, ours in zip(columns["ssast"]["seconds"], column["seconds"], strict=True)
        )
        for name, column in columns.items()
    }
    for name, column in columns.items():
        rate, peak = column["clips_per_second"], column["peak_bytes_a_clip"]
        memory = "" if peak is None else f"{peak / 1e6:.0f}"
        lines.append(
            f"{name:<10} {statistics.median(column['seconds']):>9.3f} {rate:>9.2f} "
            f"{rate * report['clip_seconds']:>11.1f} {memory:>10} {pairs[name]:>12.2f} x"
        )
    best = columns["fast"]["clips_per_second"]
    million = 1_000_000 / best / 3600
    lines += ["", f"A million clips of {report['clip_seconds']:g} s take {million:,.1f} hours here."]
    return "\n".join(lines)
