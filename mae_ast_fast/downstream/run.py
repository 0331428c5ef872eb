"""The part that probing and fine-tuning share: a task's audio, its examples, and the report of a run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.load import load_model
from ..data import corpus
from ..devices import pick_device, pick_precision
from ..files import atomic_write, write_json
from ..models.base import PretrainingModel
from ..models.mae_ast import MAEAST
from ..training.lifecycle import OPTIONS, TASK_OPTIONS, run_lock
from .audio import Waveforms, batches
from .classifier import AudioClassifier, max_clip_seconds
from .manifest import Fold, Task, read_task
from .metrics import average_precisions, bootstrap_ci, confusion, score
from .options import ProbeOptions

Options_co = TypeVar("Options_co", bound=ProbeOptions, covariant=True)

_BATCH_SECONDS = 160.0  # padded audio per batch, in seconds, when nothing is trained
STATE = "state.safetensors"  # in a fold's folder: the state from which interrupted fine-tuning resumes
_MIN_TEST_CLIPS = 30  # with fewer clips the bootstrap interval is unreliable
_MOMENT_SECONDS = 0.02  # between two moments of a frame-level task


@dataclass
class Examples:
    """The classified examples: the clips of a task, or moments of them.

    Attributes:
        clip: (n,) int64, index of the clip of each example, ascending.
        time: (n,) float64, seconds from the start of the clip; 0 if the example is the clip itself.
        targets: (n, C) bool.
    """

    clip: np.ndarray
    time: np.ndarray
    targets: np.ndarray

    @classmethod
    def from_task(cls, task: Task, audio: Waveforms) -> Examples:
        """The clips of a task, or moments 20 ms apart of the clips that have audio."""
        if not task.frame_level:
            return cls(np.arange(len(task.clips)), np.zeros(len(task.clips)), task.targets())
        clip_of, time_of, label_of = [], [], []
        column = {label: k for k, label in enumerate(task.labels)}
        for i, clip in enumerate(task.clips):
            ends = np.array([end for end, _ in clip.phones])
            last = min(float(ends[-1]), float(audio.seconds[i]))
            times = np.arange(_MOMENT_SECONDS / 2, last, _MOMENT_SECONDS)
            for moment, k in zip(times, np.searchsorted(ends, times, side="right"), strict=True):
                if (phone := clip.phones[k][1]) in column:
                    clip_of.append(i)
                    time_of.append(moment)
                    label_of.append(column[phone])
        return cls(np.array(clip_of), np.array(time_of), np.eye(len(column), dtype=bool)[label_of])

    def indices(self, clips: Sequence[int]) -> np.ndarray:
        """Indices (n,) of the examples of some clips, in the order of ``clips``."""
        first = np.searchsorted(self.clip, clips, side="left")
        last = np.searchsorted(self.clip, clips, side="right")
        return np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])


@dataclass
class FoldResult:
    """Result of a fold.

    Attributes:
        fold: Training, validation and test clips.
        probabilities: (n, C) fp32 of the test examples.
        valid_score: Score on the validation clips.
        classifier: The trained classifier. None: it is on disk, or there is none.
        selected: The setting that the validation clips selected, and the history of the selection.
    """

    fold: Fold
    probabilities: np.ndarray
    valid_score: float
    classifier: AudioClassifier | None = None
    selected: dict[str, Any] = field(default_factory=dict)


class Run(Generic[Options_co]):
    """A probing or fine-tuning run: the task, its audio, the encoder, and the report.

    As a context manager it locks the run folder and writes the options into it.

    Args:
        options: Options of the command.
        mode: "probe" or "finetune".

    Raises:
        ValueError: The data, options or checkpoint are unusable, or the run folder holds another run.
    """

    def __init__(self, options: Options_co, mode: str) -> None:
        self.options, self.mode, self.out = options, mode, Path(options.out)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out must be a folder, got the file {self.out}")
        cache = Path(options.cache) if options.cache else corpus.default_cache()
        if cache.exists() and not cache.is_dir():
            raise ValueError(f"cache must be a folder, got the file {cache}")
        self.start_time = time.perf_counter()
        self.earlier_seconds = 0.0  # spent on folds in earlier, interrupted starts of this run
        self.task = task = read_task(options.data, options.root, options.multi_label)
        if mode == "finetune" and task.frame_level:
            raise ValueError(f"{options.data} is a frame-level task: use mae-ast-fast probe")
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)
        model = load_model(options.checkpoint, impl=options.impl, attention=options.attention)
        self.encoder = (model.encoder_only() if isinstance(model, MAEAST) else model).to(self.device).eval()
        self.max_seconds = options.max_seconds or min(10.0, max_clip_seconds(self.encoder))
        self.metric = options.metric or ("map" if task.multi_label else "accuracy")
        # Built and thrown away: options that do not fit the encoder raise before any audio is decoded.
        self.build_classifier(self.encoder)
        folds = task.folds(options.seed)
        if options.folds is not None:
            requested = [name.strip() for name in options.folds.split(",")]
            if not folds[0].name:
                raise ValueError(f"folds needs a manifest with a column fold, got {options.folds!r} for {options.data}")
            if unknown := [name for name in requested if name not in [fold.name for fold in folds]]:
                raise ValueError(f"folds must be in {[fold.name for fold in folds]}, got {unknown}")
            folds = [fold for fold in folds if fold.name in requested]
        self._check_output_dir()  # early, for a fast error; __enter__ checks again under the lock
        self.audio = Waveforms(task, cache, options.workers)
        missing = self.audio.missing
        folds = [fold.without(set(missing)) for fold in folds]
        for fold in folds:
            for split in ("train", "valid", "test"):
                if not getattr(fold, split):
                    i, reason = next(iter(missing.items()))
                    example = f"{task.clips[i].name}: {reason}"
                    raise ValueError(
                        f"{options.data}: none of the {split} clips of {fold.display_name} has audio; {example}"
                    )
        self.folds = folds
        self.examples = Examples.from_task(task, self.audio)
        for fold in folds:
            for split in ("valid", "test"):
                if not self.examples.targets[self.examples.indices(getattr(fold, split))].any():
                    raise ValueError(
                        f"{options.data}: no {split} clip of {fold.display_name} has a label, so they give no score"
                    )

    def __enter__(self) -> Run[Options_co]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(self.out))  # creates the folder: a start that fails earlier leaves nothing
            options, previous = self._check_output_dir()
            options["content"] = self._content_digest()
            if previous and previous.get("content") != options["content"]:
                reason = "other clips, labels, audio or weights" if "content" in previous else "an earlier version"
                raise ValueError(f"{self.out} holds a run of {reason}: choose another --out")
            if not previous:  # rows of a start that was killed before it had a result
                (self.out / "metrics.jsonl").unlink(missing_ok=True)
            write_json(self.out / TASK_OPTIONS, options)
            self.notes = [*self.task.notes, *self._notes()]
            for note in self.notes:
                self.log(f"note: {note}")
            num_clips, num_folds = len(self.task.clips) - len(self.audio.missing), len(self.folds)
            self.log(
                f"{self.mode} of {self.options.checkpoint} on {self.task.name}: {num_clips} clips, "
                f"{len(self.task.labels)} classes, {num_folds} {'folds' if self.folds[0].name else 'split'}, on "
                f"{self.device} in {self.precision}"
            )
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def _notes(self) -> list[str]:
        """Notes on drawn validation clips, an unused column, classes without training clips, and a small test set."""
        notes = []
        if not self.folds[0].name and not any(clip.split == "valid" for clip in self.task.clips):
            notes.append(f"no clip has split valid: {len(self.folds[0].valid)} of the training clips select instead")
        if any(clip.fold and clip.split for clip in self.task.clips):
            notes.append("the column fold is used, the column split is ignored")
        targets, labels = self.examples.targets, np.array(self.task.labels)
        for fold in self.folds:
            train, valid, test = (
                targets[self.examples.indices(clips)].any(0) for clips in (fold.train, fold.valid, fold.test)
            )
            for usage, untrained in (("tested", test & ~train), ("only in validation clips", valid & ~train & ~test)):
                if names := labels[untrained].tolist():
                    ellipsis = " ..." if len(names) > 5 else ""
                    listing = ", ".join(names[:5]) + ellipsis
                    notes.append(f"classes without training clips in {fold.display_name}, {usage}: {listing}")
        if (count := len({i for fold in self.folds for i in fold.test})) < _MIN_TEST_CLIPS:
            notes.append(f"{count} test clips: too few for a reliable interval")
        return notes

    def _check_output_dir(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check that the run folder holds no other run: a folder belongs to one run.

        Returns:
            The options of this run, and the options of the results in the folder (empty if there are none).

        Raises:
            ValueError: The folder holds a model, or a run with other options.
        """
        options = {"mode": self.mode, **dataclasses.asdict(self.options)}
        for name in ("out", "workers", "cache"):  # these may change between starts
            options.pop(name)
        for name in ("data", "root", "checkpoint"):
            if options[name] is not None and os.path.exists(options[name]):
                options[name] = os.path.abspath(options[name])
        path = self.out / TASK_OPTIONS
        previous: dict[str, Any] = {}
        if path.is_file():
            with contextlib.suppress(ValueError, TypeError):
                previous = dict(json.loads(path.read_text()))
        elif any((self.out / name).exists() for name in ("config.json", OPTIONS, "checkpoints")):
            raise ValueError(f"{self.out} already holds a model or a pretraining run: choose another --out")
        if not any(any(self.out.glob(pattern)) for pattern in ("summary.json", "*/result.json", f"*/{STATE}")):
            return options, {}
        changed = [name for name in options if name not in previous or previous[name] != options[name]]
        if changed:
            changed = ["mode"] if "mode" in changed else changed
            raise ValueError(f"{self.out} holds a run with another {', '.join(changed)}: choose another --out")
        return options, previous

    def _content_digest(self) -> str:
        """Digest of the content behind the options: clips, labels, audio, model and weights.

        Run folders keep it. Whatever changes it, such as a field of ``Clip``, makes them unusable.
        """
        task = self.task
        model = [self.encoder.config.to_dict(), *self.build_classifier(self.encoder).state_dict()]
        digest = hashlib.sha256(repr([model, task.labels, task.clips, sorted(self.audio.missing)]).encode())
        digest.update(self.audio.identity.encode())
        for name, tensor in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def folder(self, fold: Fold) -> Path:
        """Folder for the results of a fold of fine-tuning."""
        name = "".join(c if c.isalnum() or c in "-_" else f"%{ord(c):02x}" for c in fold.name)
        return self.out / f"fold_{name}" if fold.name else self.out / "split"

    @staticmethod
    def log(line: str) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def autocast(self) -> torch.autocast:
        """Autocast to bf16, if that is the precision of the run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def build_classifier(self, encoder: PretrainingModel) -> AudioClassifier:
        """A new classifier of the task's labels, with random weights of the linear layer."""
        return AudioClassifier(
            encoder,
            self.task.labels,
            multi_label=self.task.multi_label,
            max_seconds=self.max_seconds,
            layer=self.options.layer,
            pool=self.options.pool,
        )

    def read(self, clips: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, list[int], list[float]]]:
        """Read all windows of some clips, batch by batch.

        Yields:
            Waveforms (B, S) int16 on the run's device, number of samples (B,) on the CPU, the clip of each window, and
            the start of each window in its clip, in seconds.
        """
        windows = [(clip, start, crop) for clip in clips for start, crop in self.audio.windows(clip, self.max_seconds)]
        for batch in batches([crop for _, _, crop in windows], _BATCH_SECONDS):
            waveforms, num_samples = self.audio.read([windows[k][2] for k in batch])
            window_clips, window_starts = [windows[k][0] for k in batch], [windows[k][1] for k in batch]
            yield waveforms.to(self.device), num_samples, window_clips, window_starts

    def probabilities(self, classifier: AudioClassifier, clips: Sequence[int]) -> np.ndarray:
        """Class probabilities (n, C) fp32 of some clips: the mean over a clip's windows, weighted by duration."""
        row = {clip: i for i, clip in enumerate(clips)}
        total = np.zeros((len(clips), len(self.task.labels)), np.float32)
        weight = np.zeros((len(clips), 1), np.float32)
        classifier.eval()
        for waveforms, num_samples, window_clips, _ in self.read(clips):
            with self.autocast():
                probabilities = classifier.probabilities(waveforms, num_samples).cpu().numpy()
            clip_rows = [row[clip] for clip in window_clips]
            window_weight = num_samples.numpy().astype(np.float32)[:, None]
            np.add.at(total, clip_rows, probabilities * window_weight)
            np.add.at(weight, clip_rows, window_weight)
        return total / weight

    def score(self, probabilities: np.ndarray, targets: np.ndarray, metric: str | None = None) -> float:
        """``metrics.score`` of (n, C) probabilities and bool targets. Default ``metric``: that of the run."""
        return score(metric or self.metric, probabilities, targets, self.task.multi_label)

    def report(
        self, results: list[FoldResult], history: list[dict[str, Any]], baselines: dict[str, list[FoldResult]]
    ) -> dict[str, Any]:
        """Write summary.json, predictions.csv and the figures.

        Args:
            results: Result of each fold.
            history: Rows of metrics.jsonl; empty for a probe.
            baselines: Name -> result of each fold.

        Returns:
            The content of summary.json.

        Raises:
            ValueError: Probabilities are not finite.
        """
        from .figures import plot_confusion, plot_labels, plot_learning

        task, options = self.task, self.options
        examples = self.examples
        test_examples = [examples.indices(result.fold.test) for result in results]
        targets = [examples.targets[indices] for indices in test_examples]
        clips = [examples.clip[indices] for indices in test_examples]
        probabilities = [result.probabilities for result in results]
        for result in results:
            if not np.isfinite(result.probabilities).all():
                raise ValueError(f"the probabilities of {result.fold.display_name} are not finite and have no score")
        self._write_predictions(test_examples, probabilities)
        scores = [self.score(p, y) for p, y in zip(probabilities, targets, strict=True)]
        summary: dict[str, Any] = {
            "task": task.name,
            "mode": self.mode,
            "checkpoint": options.checkpoint,
            "metric": self.metric,
            "value": float(np.mean(scores)),
            "ci95": self._confidence_interval([probabilities], targets, clips),
            "n_test": sum(map(len, targets)),
            "per_fold": scores if results[0].fold.name else [],
            "folds": [result.fold.name for result in results if result.fold.name],
            "valid": [result.valid_score for result in results],
        }
        metrics = ("accuracy", "macro_f1", "map") if task.multi_label else ("accuracy", "balanced_accuracy", "macro_f1")
        for metric in metrics:
            values = [self.score(p, y, metric) for p, y in zip(probabilities, targets, strict=True)]
            summary[metric] = float(np.mean(values))
        if not task.multi_label:
            train_targets = [examples.targets[examples.indices(result.fold.train)] for result in results]
            majority = [np.bincount(y.argmax(1)).argmax() for y in train_targets]
            shares = [(y.argmax(1) == label).mean() for y, label in zip(targets, majority, strict=True)]
            summary["majority_accuracy"] = float(np.mean(shares))
        for name, baseline_results in baselines.items():
            baseline = [result.probabilities for result in baseline_results]
            value = float(np.mean([self.score(p, y) for p, y in zip(baseline, targets, strict=True)]))
            summary[f"{name}_baseline"] = {
                "value": value,
                "ci95": self._confidence_interval([baseline], targets, clips),
                "difference": summary["value"] - value,
                "difference_ci95": self._confidence_interval([probabilities, baseline], targets, clips),
            }
        skipped = [{"path": task.clips[i].name, "reason": reason} for i, reason in self.audio.missing.items()]
        summary |= {
            "classes": len(task.labels),
            "multi_label": task.multi_label,
            "frame_level": task.frame_level,
            "chosen": [{k: v for k, v in result.selected.items() if k != "history"} for result in results],
            "skipped": {"count": len(skipped), "files": skipped[:1000]},
            "notes": self.notes,
            "seconds": round(self.earlier_seconds + time.perf_counter() - self.start_time, 1),
        }
        low, high = summary["ci95"]
        title = f"{task.name}: {self.metric.replace('_', ' ')} {summary['value']:.3f} ({low:.3f} - {high:.3f})"
        if task.multi_label:
            per_fold = [average_precisions(p, y) for p, y in zip(probabilities, targets, strict=True)]
            precisions = np.ma.masked_invalid(per_fold).mean(0).filled(np.nan)  # some folds lack labels
            plot_labels(
                precisions,
                np.concatenate(targets).mean(0),
                task.labels,
                title=title,
                path=self.out / "average_precision.png",
            )
        else:
            counts = np.zeros((len(task.labels), len(task.labels)), np.int64)
            for p, y in zip(probabilities, targets, strict=True):
                counts += confusion(p.argmax(1), y.argmax(1), len(task.labels))
            plot_confusion(counts, task.labels, title, self.out / "confusion.png")
        if history:
            plot_learning(history, self.metric.replace("_", " "), self.out / "learning.png")
        summary = _rounded(summary)
        write_json(self.out / "summary.json", summary)
        return summary

    def _confidence_interval(
        self, models: list[list[np.ndarray]], targets: list[np.ndarray], clips: list[np.ndarray]
    ) -> list[float]:
        """95 % interval of the score, or of the difference between two models' scores; resamples whole clips.

        Args:
            models: Probabilities (n, C) of each fold's test examples, from one model or from two.
            targets: (n, C) bool of each fold.
            clips: (n,) clip of each test example, per fold.
        """
        all_targets, all_clips = np.concatenate(targets), np.concatenate(clips)
        predictions = [np.concatenate(probabilities) for probabilities in models]
        order = np.argsort(all_clips, kind="stable")
        distinct_clips, first = np.unique(all_clips[order], return_index=True)
        rows_by_clip = dict(zip(distinct_clips.tolist(), np.split(order, first[1:]), strict=True))
        one_row_per_clip = len(rows_by_clip) == len(all_clips)

        def statistic(drawn: np.ndarray) -> float:
            if one_row_per_clip:
                index = np.array([rows_by_clip[clip][0] for clip in drawn])
            else:
                index = np.concatenate([rows_by_clip[clip] for clip in drawn])
            scores = [self.score(p[index], all_targets[index]) for p in predictions]
            return scores[0] - (scores[1] if len(scores) > 1 else 0.0)

        groups = [np.unique(group) for group in clips]
        num_sorted = len(models) * predictions[0].size if self.metric == "map" else 0
        low, high = bootstrap_ci(statistic, groups, seed=self.options.seed, num_sorted=num_sorted)
        return [low, high] if len(models) > 1 else [max(low, 0.0), min(high, 1.0)]

    def _write_predictions(self, test_examples: list[np.ndarray], probabilities: list[np.ndarray]) -> None:
        """Write predictions.csv: label, prediction and probabilities of each test example, fold by fold."""
        task, examples = self.task, self.examples

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                time_column = ["time"] if task.frame_level else []
                table.writerow(["path", *time_column, "label", "pred", *(f"prob_{label}" for label in task.labels)])
                for indices, fold_probabilities in zip(test_examples, probabilities, strict=True):
                    for i, p in zip(indices, fold_probabilities, strict=True):
                        label = ";".join(task.labels[k] for k in np.flatnonzero(examples.targets[i]))
                        pred = task.labels[p.argmax()]
                        if task.multi_label:
                            pred = ";".join(task.labels[k] for k in np.flatnonzero(p >= 0.5))
                        moment = [f"{examples.time[i]:.3f}"] if task.frame_level else []
                        name = task.clips[examples.clip[i]].name
                        table.writerow([name, *moment, label, pred, *(f"{x:.6g}" for x in p)])

        atomic_write(self.out / "predictions.csv", write)


def _rounded(value: Any) -> Any:
    """Round floats to six decimals, in nested values too. NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
