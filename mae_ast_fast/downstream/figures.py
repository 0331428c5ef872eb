"""Figures of a probe or of fine-tuning, drawn with matplotlib."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..training.figures import pyplot, save_figure


def plot_confusion(counts: np.ndarray, labels: Sequence[str], title: str, path: Path) -> None:
    """Draw a confusion matrix as shares of each true class. With up to 40 classes, show the counts too.

    Args:
        counts: (C, C) clips of the row's class that were predicted as the column's class.
        labels: Names of the C classes.
        title: Title of the figure.
        path: PNG file to write.
    """
    plt = pyplot()
    num_classes = len(labels)
    size = min(4.0 + 0.32 * num_classes, 24.0)
    figure, axis = plt.subplots(figsize=(size + 1.0, size), constrained_layout=True)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure.colorbar(axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0), label="share of the true class", shrink=0.8)
    if num_classes <= 40:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    step = -(-num_classes // 100)
    ticks = range(0, num_classes, step)
    names = [_drawable(labels[i]) for i in ticks]
    axis.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(title, parse_math=False)
    save_figure(figure, path)


def plot_labels(precisions: np.ndarray, shares: np.ndarray, labels: Sequence[str], *, title: str, path: Path) -> None:
    """Draw the average precision of each label as a bar, and that of random scores as a mark.

    Args:
        precisions: (C,) average precisions; NaN for labels without a clip, which are not drawn.
        shares: (C,) share of the clips that have the label: the average precision of random scores.
        labels: Names of the C labels. Of more than 60 labels, the 30 best and the 30 worst are drawn.
        title: Title of the figure.
        path: PNG file to write.
    """
    plt = pyplot()
    order = np.argsort(precisions)[: np.isfinite(precisions).sum()]
    if len(order) > 60:
        order, title = np.concatenate([order[:30], order[-30:]]), f"{title}\nbest and worst labels"
    figure, axis = plt.subplots(figsize=(8, 0.22 * len(order) + 1.6), constrained_layout=True)
    heights = range(len(order))
    axis.barh(heights, precisions[order], color="C0", alpha=0.7)
    axis.plot(shares[order], heights, "k|", label="chance: share of clips with the label")
    axis.set_yticks(heights, [_drawable(labels[i]) for i in order], fontsize=8, parse_math=False)
    axis.set(xlabel="average precision", xlim=(0, 1))
    axis.set_title(title, parse_math=False)
    axis.legend(fontsize=7, loc="lower right")  # the bars of the worst labels are short there
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def _drawable(label: str) -> str:
    """Replace characters that matplotlib's font lacks by the last word of their Unicode name.

    For example, U+3113 BOPOMOFO LETTER ZH becomes ZH.
    """
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    glyphs = font.get_charmap()
    words = [c if ord(c) in glyphs else f" {unicodedata.name(c, f'U+{ord(c):04X}').split()[-1]} " for c in label]
    return " ".join("".join(words).split())


def plot_learning(history: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Draw the learning curves of a fine-tuning run, one line per fold: training loss and validation score.

    Args:
        history: Rows of metrics.jsonl, with ``fold``, ``epoch``, ``loss`` and ``valid``.
        metric: Name of the validation score.
        path: PNG file to write.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    folds = list(dict.fromkeys(row["fold"] for row in history))
    for axis, key, title in ((axes[0], "loss", "training loss"), (axes[1], "valid", f"{metric} on validation clips")):
        for fold in folds:
            rows = [row for row in history if row["fold"] == fold]
            label = f"fold {fold}" if fold else None
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], ".-", label=label)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(folds) > 1:
            for text in axis.legend(fontsize=7).get_texts():
                text.set_parse_math(False)
    save_figure(figure, path)
