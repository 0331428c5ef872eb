"""Metrics of predictions (torchmetrics), with bootstrap intervals. Letters: n clips or moments, C classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

RESAMPLES = 1000
_MAX_SORTED = 30_000_000  # values that all resamples of an average precision sort: some minutes


def score(metric: str, probabilities: np.ndarray, targets: np.ndarray, multi_label: bool) -> float:
    """Value of a metric in [0, 1], rounded to six decimals; higher is better. Means skip classes without a target.

    Args:
        metric: ``accuracy``: the share of correct clips; with several labels the share of correct decisions at a
            threshold of 0.5. ``balanced_accuracy``: the mean recall over classes. ``macro_f1``: the mean F1 over
            classes. ``map``: the mean average precision over classes.
        probabilities: (n, C).
        targets: (n, C) bool.
        multi_label: A clip may have any number of labels.

    Raises:
        ValueError: Unknown ``metric``.
    """
    from torchmetrics.functional import classification

    if multi_label and metric != "accuracy":
        probabilities, targets = _pad_columns(probabilities), _pad_columns(targets)
    p, num_classes = torch.from_numpy(probabilities), probabilities.shape[1]
    y = torch.from_numpy(targets)
    per_class: dict[str, Callable[..., torch.Tensor]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without clips, which the means skip
        if metric == "map":
            return round(float(average_precisions(probabilities, targets)[targets.any(0)].mean()), 6)
        if multi_label:
            p, y = (p >= 0.5).long(), y.long()
            if metric == "accuracy":
                return round(float((p == y).float().mean()), 6)
            per_class = {
                "balanced_accuracy": classification.multilabel_recall,
                "macro_f1": classification.multilabel_f1_score,
            }
            values = _lookup(per_class, metric)(p, y, num_classes, average="none")
            return round(float(values[y.any(0)].mean()), 6)
        p, y = p.argmax(1), y.float().argmax(1)
        if metric == "accuracy":
            return round(float(classification.multiclass_accuracy(p, y, num_classes, average="micro")), 6)
        per_class = {
            "balanced_accuracy": classification.multiclass_recall,
            "macro_f1": classification.multiclass_f1_score,
        }
        values = _lookup(per_class, metric)(p, y, num_classes, average="none")
        return round(float(values[y.unique()].mean()), 6)


def average_precisions(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision (C,) of each class; NaN if no clip has the class.

    Args:
        probabilities: (n, C).
        targets: (n, C) bool.
    """
    from torchmetrics.functional.classification import multilabel_average_precision

    p, y = torch.from_numpy(_pad_columns(probabilities)), torch.from_numpy(_pad_columns(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without clips
        precisions = multilabel_average_precision(p, y.long(), p.shape[1], average="none").numpy()
    return np.where(targets.any(0), precisions[: targets.shape[1]], np.nan)


def _pad_columns(array: np.ndarray) -> np.ndarray:
    """Add an empty class to a single one: torchmetrics' multilabel functions need at least two."""
    return np.pad(array, ((0, 0), (0, 1))) if array.shape[1] == 1 else array


def _lookup(functions: dict[str, Callable[..., torch.Tensor]], metric: str) -> Callable[..., torch.Tensor]:
    if metric not in functions:
        raise ValueError(f"metric must be accuracy, map, {' or '.join(functions)}, got {metric!r}")
    return functions[metric]


def bootstrap_ci(
    statistic: Callable[[np.ndarray], float], groups: Sequence[np.ndarray], *, seed: int = 0, num_sorted: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic's mean over folds: (low, high), NaN if no resample has a value.

    The percentiles are shifted by the difference between the statistic and the resamples' mean, because clips that are
    drawn twice raise an average precision.

    Args:
        statistic: Function from indices of clips to the statistic of these clips.
        groups: Indices of the clips of each fold. Clips are resampled within their fold.
        seed: Seed of the draws.
        num_sorted: Number of values that one evaluation of an average precision sorts. Above 30,000 it reduces the
            number of resamples from 1000, to no fewer than 50. Default 0: 1000 resamples.
    """
    rng = np.random.default_rng(seed)
    count = RESAMPLES if not num_sorted else int(min(max(_MAX_SORTED / num_sorted, 50), RESAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold, or a resample of it, may have no clip of any class
        means = [np.nanmean([statistic(rng.choice(group, len(group))) for group in groups]) for _ in range(count)]
        shift = np.nanmean([statistic(group) for group in groups]) - np.nanmean(means)
        low, high = np.nanquantile(means, [0.025, 0.975]) + shift
    return float(low), float(high)


def confusion(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """Confusion matrix (C, C) int64: clips of the row's class that were predicted as the column's class."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(true), num_classes).numpy()
