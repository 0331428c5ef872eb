"""How good predictions are, by torchmetrics, with bootstrap intervals. Letters: n clips or moments, C classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

RESAMPLES = 1000
_SORTED = 30_000_000  # values in all resamples of an average precision, some minutes


def score(metric: str, probabilities: np.ndarray, targets: np.ndarray, multi_label: bool) -> float:
    """One number for (n, C) probabilities and (n, C) bool targets, to six decimals; higher is better.

    accuracy (of several labels: the share of labels that are told right at a threshold of a half), balanced_accuracy
    (the mean recall of the classes), macro_f1, or map: the mean over the classes of the average precision. Classes
    that do not occur in ``targets`` are left out of means.

    Raises:
        ValueError: ``metric`` is none of them.
    """
    from torchmetrics.functional import classification as of

    if multi_label and metric != "accuracy":
        probabilities, targets = _at_least_two(probabilities, targets)
    p, n = torch.from_numpy(probabilities), probabilities.shape[1]
    y = torch.from_numpy(targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without clips, which the means leave out
        if metric == "map":
            return round(float(average_precisions(probabilities, targets)[targets.any(0)].mean()), 6)
        if multi_label:
            p, y = (p >= 0.5).long(), y.long()
            if metric == "accuracy":
                return round(float((p == y).float().mean()), 6)
            make = {"balanced_accuracy": of.multilabel_recall, "macro_f1": of.multilabel_f1_score}
            return round(float(_known(make, metric)(p, y, n, average="none")[y.any(0)].mean()), 6)
        p, y = p.argmax(1), y.float().argmax(1)
        if metric == "accuracy":
            return round(float(of.multiclass_accuracy(p, y, n, average="micro")), 6)
        make = {"balanced_accuracy": of.multiclass_recall, "macro_f1": of.multiclass_f1_score}
        return round(float(_known(make, metric)(p, y, n, average="none")[y.unique()].mean()), 6)


def average_precisions(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C,) of (n, C) probabilities and bool targets; NaN of classes that do not occur in ``targets``."""
    from torchmetrics.functional.classification import multilabel_average_precision

    p, y = (torch.from_numpy(x) for x in _at_least_two(probabilities, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without clips
        found = multilabel_average_precision(p, y.long(), p.shape[1], average="none").numpy()
    return np.where(targets.any(0), found[: targets.shape[1]], np.nan)


def _at_least_two(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Columns, which torchmetrics wants of several labels: beside a single one another that is never there."""
    return tuple(np.pad(x, ((0, 0), (0, 1))) if x.shape[1] == 1 else x for x in arrays)


def _known(functions: dict[str, Callable[..., torch.Tensor]], metric: str) -> Callable[..., torch.Tensor]:
    if metric not in functions:
        raise ValueError(f"metric must be accuracy, map, {' or '.join(functions)}, got {metric!r}")
    return functions[metric]


def bootstrap_ci(
    value: Callable[[np.ndarray], float], groups: Sequence[np.ndarray], seed: int = 0, costly: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over folds of a statistic; NaN where no resample has any.

    Percentiles, shifted by what the resamples' mean is off the statistic itself: clips that are drawn twice raise an
    average precision.

    Args:
        value: The statistic of some clips, by their indices.
        groups: Indices of the clips of each fold; clips are drawn within their fold.
        seed: Of the draws.
        costly: Number of values that an average precision sorts; many get fewer resamples, at least 50.
    """
    rng = np.random.default_rng(seed)
    count = RESAMPLES if not costly else int(min(max(_SORTED / costly, 50), RESAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold, or a resample of it, may hold no clip of any class
        means = [np.nanmean([value(rng.choice(group, len(group))) for group in groups]) for _ in range(count)]
        shift = np.nanmean([value(group) for group in groups]) - np.nanmean(means)
        low, high = np.nanquantile(means, [0.025, 0.975]) + shift
    return float(low), float(high)


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) int64: how many of the row's class were taken for the column's."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(true), classes).numpy()
