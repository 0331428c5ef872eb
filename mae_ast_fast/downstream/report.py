"""The report of a probing or fine-tuning run: summary.json, predictions.csv and the figures."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, write_json
from .metrics import average_precisions, bootstrap_ci, confusion
from .options import ProbeOptions
from .run import FoldResult, Run

_MAX_SKIPPED = 1000  # clips without audio that summary.json names; their count includes all


@dataclass
class BaselineSummary:
    """Comparison with a baseline in summary.json.

    Attributes:
        value: Score of the baseline, as ``TaskSummary.value``.
        ci95: 95 % interval of ``value``: [low, high].
        difference: Score of the run minus ``value``.
        difference_ci95: 95 % interval of ``difference``.
    """

    value: float
    ci95: list[float]
    difference: float
    difference_ci95: list[float]

    @classmethod
    def from_results(
        cls, run: Run[ProbeOptions], results: Sequence[FoldResult], baseline: Sequence[FoldResult]
    ) -> BaselineSummary:
        """Compare the results of a run with those of a baseline on the same folds."""
        value = float(np.mean(_fold_scores(run, baseline)))
        return cls(
            value=value,
            ci95=_interval(run, baseline),
            difference=float(np.mean(_fold_scores(run, results))) - value,
            difference_ci95=_interval(run, results, baseline),
        )


@dataclass
class TaskSummary:
    """Content of summary.json, in the order of its keys. Scores are in [0, 1]; with folds they are means over folds.

    Attributes:
        task: Name of the task.
        mode: "probe" or "finetune".
        checkpoint: Pretrained model, as in the options.
        metric: Name of the reported metric.
        value: Score of the test examples.
        ci95: 95 % interval of ``value``: [low, high], by a bootstrap over clips.
        n_test: Number of test examples.
        per_fold: Score of each fold. Empty without folds.
        folds: Name of each fold. Empty without folds.
        valid: Score of each fold, or of the split, on the validation clips.
        accuracy: Share of correct examples; with several labels, of correct decisions.
        balanced_accuracy: Mean recall over classes. None with several labels.
        macro_f1: Mean F1 over classes.
        map: Mean average precision over classes. None without several labels.
        majority_accuracy: Accuracy of always predicting the most frequent class of the training clips. None with
            several labels.
        log_mel_baseline: Comparison with the probe of mean log-mel spectra. None for fine-tuning.
        classes: Number of classes.
        multi_label: Clips may have several labels.
        frame_level: The examples are moments of clips.
        chosen: Setting of each fold that the validation clips selected: ``C`` of a probe or the ``epoch``.
        skipped: Clips without audio: ``count``, and the ``path`` and ``reason`` of the first 1000 in ``files``.
        notes: Notes on the task, such as classes without training clips.
        seconds: Duration of the run, with interrupted starts.
    """

    task: str
    mode: str
    checkpoint: str
    metric: str
    value: float
    ci95: list[float]
    n_test: int
    per_fold: list[float]
    folds: list[str]
    valid: list[float]
    accuracy: float
    balanced_accuracy: float | None
    macro_f1: float
    map: float | None
    majority_accuracy: float | None
    log_mel_baseline: BaselineSummary | None
    classes: int
    multi_label: bool
    frame_level: bool
    chosen: list[dict[str, Any]]
    skipped: dict[str, Any]
    notes: list[str]
    seconds: float

    @classmethod
    def from_results(
        cls, run: Run[ProbeOptions], results: Sequence[FoldResult], log_mel: Sequence[FoldResult] = ()
    ) -> TaskSummary:
        """Score the results of a run.

        Args:
            run: The run.
            results: Result of each fold.
            log_mel: Result of the log-mel baseline of each fold. Empty: there is none.
        """
        task, scores = run.task, _fold_scores(run, results)
        skipped = [{"path": task.clips[i].name, "reason": reason} for i, reason in run.audio.missing.items()]

        def mean(metric: str) -> float:
            return float(np.mean(_fold_scores(run, results, metric)))

        return cls(
            task=task.name,
            mode=run.mode,
            checkpoint=run.options.checkpoint,
            metric=run.metric,
            value=float(np.mean(scores)),
            ci95=_interval(run, results),
            n_test=sum(len(result.probabilities) for result in results),
            per_fold=scores if results[0].fold.name else [],
            folds=[result.fold.name for result in results if result.fold.name],
            valid=[result.valid_score for result in results],
            accuracy=mean("accuracy"),
            balanced_accuracy=None if task.multi_label else mean("balanced_accuracy"),
            macro_f1=mean("macro_f1"),
            map=mean("map") if task.multi_label else None,
            majority_accuracy=None if task.multi_label else _majority_accuracy(run, results),
            log_mel_baseline=BaselineSummary.from_results(run, results, log_mel) if log_mel else None,
            classes=len(task.labels),
            multi_label=task.multi_label,
            frame_level=task.frame_level,
            chosen=[{k: v for k, v in result.selected.items() if k != "history"} for result in results],
            skipped={"count": len(skipped), "files": skipped[:_MAX_SKIPPED]},
            notes=run.notes,
            seconds=round(run.earlier_seconds + time.perf_counter() - run.start_time, 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content without fields that are None. Floats have six decimals; NaN, which JSON lacks, is None."""
        fields = dataclasses.asdict(self)
        return {name: _rounded(value) for name, value in fields.items() if value is not None}


def write_report(
    run: Run[ProbeOptions],
    results: Sequence[FoldResult],
    *,
    log_mel: Sequence[FoldResult] = (),
    history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write summary.json, predictions.csv and the figures.

    Args:
        run: The run.
        results: Result of each fold.
        log_mel: Result of the log-mel baseline of each fold. Empty: there is none.
        history: Rows of metrics.jsonl. Empty: no learning curves.

    Returns:
        The content of summary.json.

    Raises:
        ValueError: Probabilities are not finite.
    """
    for result in results:
        if not np.isfinite(result.probabilities).all():
            raise ValueError(f"the probabilities of {result.fold.display_name} are not finite and have no score")
    write_predictions(run, results)
    summary = TaskSummary.from_results(run, results, log_mel)
    plot_results(run, results, summary, history)
    content = summary.to_dict()
    write_json(run.out / "summary.json", content)
    return content


def write_predictions(run: Run[ProbeOptions], results: Sequence[FoldResult]) -> None:
    """Write predictions.csv: label, prediction and probabilities of each test example, fold by fold."""
    task = run.task

    def names(classes: np.ndarray) -> str:
        return ";".join(task.labels[k] for k in np.flatnonzero(classes))

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            time_column = ["time"] if task.frame_level else []
            table.writerow(["path", *time_column, "label", "pred", *(f"prob_{label}" for label in task.labels)])
            for result in results:
                examples = run.examples.select(result.fold.test)
                rows = zip(examples.clip, examples.time, examples.targets, result.probabilities, strict=True)
                for clip, seconds, target, p in rows:
                    pred = names(p >= 0.5) if task.multi_label else task.labels[p.argmax()]
                    moment = [f"{seconds:.3f}"] if task.frame_level else []
                    table.writerow([task.clips[clip].name, *moment, names(target), pred, *(f"{x:.6g}" for x in p)])

    atomic_write(run.out / "predictions.csv", write)


def plot_results(
    run: Run[ProbeOptions], results: Sequence[FoldResult], summary: TaskSummary, history: Sequence[dict[str, Any]]
) -> None:
    """Draw the average precision of each label or the confusion matrix, and the learning curves.

    Args:
        run: The run.
        results: Result of each fold.
        summary: Summary of the results, for the title.
        history: Rows of metrics.jsonl. Empty: no learning curves.
    """
    from .figures import plot_confusion, plot_labels, plot_learning

    labels, metric = run.task.labels, run.metric.replace("_", " ")
    low, high = summary.ci95
    title = f"{summary.task}: {metric} {summary.value:.3f} ({low:.3f} - {high:.3f})"
    targets = _targets(run, results)
    predicted = [(result.probabilities, y) for result, y in zip(results, targets, strict=True)]
    if summary.multi_label:
        precisions = np.ma.masked_invalid([average_precisions(p, y) for p, y in predicted])  # some folds lack labels
        shares, path = np.concatenate(targets).mean(0), run.out / "average_precision.png"
        plot_labels(precisions.mean(0).filled(np.nan), shares, labels, title=title, path=path)
    else:
        counts = [confusion(p.argmax(1), y.argmax(1), len(labels)) for p, y in predicted]
        plot_confusion(np.sum(counts, axis=0), labels, title, run.out / "confusion.png")
    if history:
        plot_learning(history, metric, run.out / "learning.png")


def _targets(run: Run[ProbeOptions], results: Sequence[FoldResult]) -> list[np.ndarray]:
    """Targets (n, C) bool of each fold's test examples."""
    return [run.examples.select(result.fold.test).targets for result in results]


def _fold_scores(run: Run[ProbeOptions], results: Sequence[FoldResult], metric: str | None = None) -> list[float]:
    """Score of each fold's test examples. Default ``metric``: that of the run."""
    return [
        run.score(result.probabilities, y, metric) for result, y in zip(results, _targets(run, results), strict=True)
    ]


def _majority_accuracy(run: Run[ProbeOptions], results: Sequence[FoldResult]) -> float:
    """Accuracy of always predicting the most frequent class of the training clips, as the mean over folds."""
    shares = []
    for result, y in zip(results, _targets(run, results), strict=True):
        train_targets = run.examples.select(result.fold.train).targets
        majority = np.bincount(train_targets.argmax(1)).argmax()
        shares.append((y.argmax(1) == majority).mean())
    return float(np.mean(shares))


def _interval(run: Run[ProbeOptions], *models: Sequence[FoldResult]) -> list[float]:
    """95 % interval of a model's score, or of the difference between two models' scores; resamples whole clips."""
    examples = [run.examples.select(result.fold.test) for result in models[0]]
    targets = np.concatenate([fold.targets for fold in examples])
    clip = np.concatenate([fold.clip for fold in examples])
    predictions = [np.concatenate([result.probabilities for result in results]) for results in models]
    order = np.argsort(clip, kind="stable")
    clips, first = np.unique(clip[order], return_index=True)
    rows_of_clip = dict(zip(clips.tolist(), np.split(order, first[1:]), strict=True))

    def statistic(drawn: np.ndarray) -> float:
        rows = np.concatenate([rows_of_clip[clip] for clip in drawn])
        scores = [run.score(p[rows], targets[rows]) for p in predictions]
        return scores[0] - (scores[1] if len(scores) > 1 else 0.0)

    groups = [np.unique(fold.clip) for fold in examples]
    num_sorted = len(models) * predictions[0].size if run.metric == "map" else 0
    low, high = bootstrap_ci(statistic, groups, seed=run.options.seed, num_sorted=num_sorted)
    return [low, high] if len(models) > 1 else [max(low, 0.0), min(high, 1.0)]


def _rounded(value: Any) -> Any:
    """Round floats to six decimals, in nested values too. NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
