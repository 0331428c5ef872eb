"""Pictures of a pretraining run; matplotlib draws them."""

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
from .evaluation import BASELINES, HeldOut, predict


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> None:
    atomic_write(path, lambda partial: figure.savefig(partial, dpi=110))
    pyplot().close(figure)


def plot_loss(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss curves of a run.

    Args:
        steps: Rows of metrics.jsonl of the training steps.
        evaluations: Rows with a ``held_out`` report.
        path: PNG to write.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    x = np.array([row["step"] for row in steps])
    panels = (
        ("loss_reconstruction", "reconstruction MSE", lambda report: report["reconstruction_mse"]),
        ("loss_classification", "InfoNCE (nats)", lambda report: report["info_nce"]),
        ("accuracy", "InfoNCE top-1 accuracy", lambda report: report["accuracy"]),
    )
    width = max(1, len(x) // 50)
    for axis, (name, title, of_report) in zip(axes, panels, strict=True):
        y = np.array([row[name] for row in steps], dtype=float)
        axis.plot(x, y, color="C0", alpha=0.25, linewidth=0.8)
        smooth = np.convolve(y, np.ones(width) / width, mode="valid") if len(y) else y
        axis.plot(x[width - 1 :], smooth, color="C0", label=f"train, mean of {width} steps")
        if evaluations:
            points = [(row["step"], of_report(row["held_out"])) for row in evaluations]
            axis.plot(*zip(*points, strict=True), "o-", color="C1", markersize=3, label="held out")
            # The unit of the errors follows the running statistics, so baselines move a little from point to point.
            marks = {"chance": lambda report: report["chance"]} if name == "accuracy" else {}
            if name == "loss_reconstruction":
                marks = {mark: lambda report, mark=mark: report["baselines"][mark] for mark in BASELINES}
            for i, (label, value) in enumerate(marks.items()):
                y_mark = [value(row["held_out"]) for row in evaluations]
                style = {"color": f"C{i + 2}", "linestyle": ":", "label": label.replace("_", " ")}
                axis.plot([step for step, _ in points], y_mark, **style)
        axis.set(title=title, xlabel="step")
        if name == "loss_reconstruction" and len(y):
            highest = [max(row["held_out"]["baselines"].values()) for row in evaluations]
            axis.set_ylim(0, 1.15 * max(np.quantile(y, 0.95), *highest, 0.0))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def reconstruct(model: MAEAST | SSAST, features: Tensor, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Original, masked and reconstructed normalised log-mel, each (B, T', F) with NaN where nothing is or is known.

    Visible patches stand as they are in the reconstruction. With ``norm_pix_loss`` the prediction is brought back to
    the target patch's own mean and variance.
    """
    config = model.config
    with torch.no_grad():
        out = predict(model, features, frames, mask)
    patches, prediction = out.patches, out.reconstruction.to(out.patches.dtype)
    if config.norm_pix_loss:
        prediction = prediction * (out.target.var(1, keepdim=True) + 1e-6).sqrt() + out.target.mean(1, keepdim=True)
    real = real_tokens(frames // config.patch_size[0] * config.grid_f, patches.shape[1])[:, :, None]
    hidden = out.mask[:, :, None]
    filled = patches.clone()
    filled[out.mask] = prediction
    pictures = (patches, patches.masked_fill(hidden, float("nan")), filled)
    return tuple(
        unpatchify(x.masked_fill(~real, float("nan")), config.patch_size, config.num_mel_bins) for x in pictures
    )


def plot_reconstruction(model: MAEAST | SSAST, clips: HeldOut, path: Path) -> None:
    """Draws original, masked and reconstructed log-mel, one row a clip."""
    plt = pyplot()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    columns = reconstruct(model, clips.features.to(device), clips.frames.to(device), clips.mask.to(device))
    model.train(was_training)
    count = len(clips.names)
    figure, axes = plt.subplots(
        count, 3, figsize=(13, 1.9 * count + 0.5), constrained_layout=True, squeeze=False, sharey=True
    )
    palette = plt.get_cmap("magma").with_extremes(bad="0.85")
    for row in range(count):
        length = int(clips.frames[row]) // model.config.patch_size[0] * model.config.patch_size[0]
        original = columns[0][row, :length].cpu().numpy()
        low, high = np.nanquantile(original, [0.01, 0.995])
        for axis, column, title in zip(axes[row], columns, ("original", "masked", "reconstructed"), strict=True):
            axis.imshow(
                column[row, :length].cpu().numpy().T,
                origin="lower",
                aspect="auto",
                interpolation="nearest",
                cmap=palette,
                vmin=low,
                vmax=high,
                extent=(0, length / 100, 0, model.config.num_mel_bins),
            )
            if row == 0:
                axis.set_title(title)
        kind = f"{clips.kinds[row]}: " if clips.kinds[row] else ""
        axes[row][0].set_ylabel("mel bin")
        axes[row][1].set_xlabel(f"{kind}{clips.names[row]}  (s)", fontsize=8, parse_math=False)
    save_figure(figure, path)
