"""Pictures of a pretraining run, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import atomic_write
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.packing import real_tokens
from ..ops.reference import unpatchify
from .evaluation import BASELINES, ERROR_UNIT, HeldOut, predict


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to ``path`` and close it."""
    atomic_write(path, lambda temp: figure.savefig(temp, dpi=110))
    pyplot().close(figure)


def training_unit(model: MAEAST | SSAST) -> float | None:
    """The factor from a squared error in the model's normalised input to one in the unit of held-out errors.

    MAE-AST normalises each update by its own statistics in training; the factor is of the running ones. None with
    ``norm_pix_loss``, whose targets have a unit for each patch.

    Args:
        model: Model in evaluation mode.
    """
    if model.config.norm_pix_loss:
        return None
    device = next(model.parameters()).device
    log_mel = torch.zeros(1, 1, model.config.num_mel_bins, device=device)
    _, scale = model.input_stats(log_mel, torch.ones(1, dtype=torch.int64, device=device))
    size = model.denormalize(1 / scale) - model.denormalize(torch.zeros_like(scale))
    return float(size) ** 2 / ERROR_UNIT


def plot_loss(
    steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], path: Path, *, unit: float | None
) -> None:
    """Plot the loss curves of a run.

    Args:
        steps: Rows of metrics.jsonl of the updates.
        evaluations: Rows of metrics.jsonl with a ``held_out`` report.
        path: PNG file to write.
        unit: ``training_unit`` of the model. None: reconstruction in training gets an axis of its own.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    x = np.array([row["step"] for row in steps])
    panels = (
        ("loss_reconstruction", "reconstruction MSE", "reconstruction_mse"),
        ("loss_classification", "InfoNCE (nats)", "info_nce"),
        ("accuracy", "InfoNCE top-1 accuracy", "accuracy"),
    )
    width = max(1, len(x) // 50)
    reports = [row["held_out"] for row in evaluations]
    for axis, (name, title, report_name) in zip(axes, panels, strict=True):
        y = np.array([row[name] for row in steps], dtype=float)
        train_axis = axis
        if name == "loss_reconstruction":
            axis.set_ylabel("squared error, unit of yardstick.json", fontsize=8)
            y *= unit or 1.0
            if unit is None:
                train_axis = axis.twinx()
                train_axis.set_ylabel("train: squared error, each patch normalised", fontsize=8)
        train_axis.plot(x, y, color="C0", alpha=0.25, linewidth=0.8)
        smooth = np.convolve(y, np.ones(width) / width, mode="valid") if len(y) else y
        train_axis.plot(x[width - 1 :], smooth, color="C0", label=f"train, mean of {width} steps")
        if evaluations:
            evaluated_at = [row["step"] for row in evaluations]
            held_out = [report[report_name] for report in reports]
            axis.plot(evaluated_at, held_out, "o-", color="C1", markersize=3, label="held out")
            baselines = {"chance": [report["chance"] for report in reports]} if name == "accuracy" else {}
            if name == "loss_reconstruction":
                baselines = {label: [report["baselines"][label] for report in reports] for label in BASELINES}
            for i, (label, values) in enumerate(baselines.items()):
                style = {"color": f"C{i + 2}", "linestyle": ":", "label": label.replace("_", " ")}
                axis.plot(evaluated_at, values, **style)
        axis.set(title=title, xlabel="step")
        if name == "loss_reconstruction" and len(y):
            highest = [max(report["baselines"].values()) for report in reports]
            train_axis.set_ylim(0, 1.15 * max(np.quantile(y, 0.95), *(highest if unit else ()), 0.0))
        axis.grid(alpha=0.3)
        lines = dict.fromkeys([*train_axis.lines, *axis.lines])
        axis.legend(handles=[line for line in lines if not line.get_label().startswith("_")], fontsize=7)
    save_figure(figure, path)


def reconstruct(
    model: MAEAST | SSAST, log_mel: Tensor, num_frames: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Original, masked and reconstructed log-mel, each (B, T', F), NaN past a clip's end and where masked.

    Visible patches keep their values in the reconstruction. For ``norm_pix_loss`` see ``predict``.

    Args:
        model: Model in evaluation mode.
        log_mel: (B, T, F), as from the model's ``features``.
        num_frames: (B,) real frames.
        mask: (B, L) bool, True = masked, tokens in time-major order.
    """
    config = model.config
    with torch.no_grad():
        out = predict(model, log_mel, num_frames, mask)
    patches = out.patches
    real = real_tokens(config.num_tokens(num_frames), patches.shape[1])[:, :, None]
    filled = patches.clone()
    filled[out.mask] = out.reconstruction

    def picture(x: Tensor) -> Tensor:
        return unpatchify(x.masked_fill(~real, float("nan")), config.patch_size, config.num_mel_bins)

    return picture(patches), picture(patches.masked_fill(out.mask[:, :, None], float("nan"))), picture(filled)


def plot_reconstruction(model: MAEAST | SSAST, clips: HeldOut, path: Path) -> None:
    """Draw original, masked and reconstructed log-mel, one row per clip.

    Args:
        model: Model on any device, in either mode; its mode is restored.
        clips: Clips and masks.
        path: PNG file to write.
    """
    plt = pyplot()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    columns = reconstruct(model, clips.log_mel.to(device), clips.num_frames.to(device), clips.mask.to(device))
    model.train(was_training)
    num_clips = len(clips.names)
    figure, axes = plt.subplots(
        num_clips, 3, figsize=(13, 1.9 * num_clips + 0.5), constrained_layout=True, squeeze=False, sharey=True
    )
    palette = plt.get_cmap("magma").with_extremes(bad="0.85")
    kt = model.config.patch_size[0]
    for row in range(num_clips):
        num_frames = int(clips.num_frames[row]) // kt * kt
        original = columns[0][row, :num_frames].cpu().numpy()
        low, high = np.nanquantile(original, [0.01, 0.995])
        for axis, column, title in zip(axes[row], columns, ("original", "masked", "reconstructed"), strict=True):
            axis.imshow(
                column[row, :num_frames].cpu().numpy().T,
                origin="lower",
                aspect="auto",
                interpolation="nearest",
                cmap=palette,
                vmin=low,
                vmax=high,
                extent=(0, num_frames / 100, 0, model.config.num_mel_bins),
            )
            if row == 0:
                axis.set_title(title)
        kind = f"{clips.kinds[row]}: " if clips.kinds[row] else ""
        axes[row][0].set_ylabel("mel bin")
        axes[row][1].set_xlabel(f"{kind}{clips.names[row]}  (s)", fontsize=8, parse_math=False)
    save_figure(figure, path)
