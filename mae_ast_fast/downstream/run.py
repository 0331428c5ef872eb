"""What probing and fine-tuning share: the task's audio, its examples, and what a run reports."""

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.load import load_model
from ..data import corpus
from ..devices import pick_device, pick_precision
from ..files import atomic_write, write_json
from ..models.base import PretrainingModel
from ..models.mae_ast import MAEAST, encoder_alone
from ..training.lifecycle import OPTIONS, TASK_OPTIONS, run_lock
from .audio import Waveforms, batches
from .classifier import AudioClassifier, longest_seconds
from .manifest import Fold, Task, read_task
from .metrics import average_precisions, bootstrap_ci, confusion, score
from .options import ProbeOptions

_BATCH_SECONDS = 160.0  # of audio that is encoded at once where nothing is learned
STATE = "state.safetensors"  # in a round's folder: what a stopped fine-tuning goes on from
_FEW_CLIPS = 30  # of which resamples tell little
_STEP_SECONDS = 0.02  # between two moments of a frame-level task


@dataclass
class Examples:
    """What is classified: the clips of a task, or moments of them.

    Attributes:
        clip: (n,) int64, index of the clip of each example, ascending.
        time: (n,) float64 seconds into the clip; 0 where the clip itself is the example.
        targets: (n, C) bool.
    """

    clip: np.ndarray
    time: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, task: Task, audio: Waveforms) -> Examples:
        """The clips of a task, or moments 20 ms apart of those that give audio."""
        if not task.frame_level:
            return cls(np.arange(len(task.clips)), np.zeros(len(task.clips)), task.targets())
        owner, time_of, label = [], [], []
        known = {name: k for k, name in enumerate(task.labels)}
        for i, clip in enumerate(task.clips):
            ends = np.array([end for end, _ in clip.phones])
            last = min(float(ends[-1]), float(audio.seconds[i]))
            times = np.arange(_STEP_SECONDS / 2, last, _STEP_SECONDS)
            for moment, k in zip(times, np.searchsorted(ends, times, side="right"), strict=True):
                if (name := clip.phones[k][1]) in known:
                    owner.append(i)
                    time_of.append(moment)
                    label.append(known[name])
        return cls(np.array(owner), np.array(time_of), np.eye(len(known), dtype=bool)[label])

    def of_clips(self, clips: Sequence[int]) -> np.ndarray:
        """Indices (n,) of the examples of these clips, clip by clip as they are given."""
        first = np.searchsorted(self.clip, clips, side="left")
        last = np.searchsorted(self.clip, clips, side="right")
        return np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])


@dataclass
class FoldResult:
    """What a round found: probabilities (n, C) of its test examples, and how the choice was made."""

    round: Fold
    probabilities: np.ndarray
    valid: float
    classifier: AudioClassifier | None = None
    chosen: dict[str, Any] = field(default_factory=dict)


class Run:
    """What probing and fine-tuning share: the task, its audio, the encoder, and what is reported."""

    def __init__(self, options: ProbeOptions, mode: str) -> None:
        self.options, self.mode, self.out = options, mode, Path(options.out)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out must be a folder, got the file {self.out}")
        cache = Path(options.cache) if options.cache else corpus.default_cache()
        if cache.exists() and not cache.is_dir():
            raise ValueError(f"cache must be a folder, got the file {cache}")
        self.began, self.earlier_seconds = time.perf_counter(), 0.0  # the latter of rounds that stopped starts made
        self.task = task = read_task(options.data, options.root, options.multi_label)
        if mode == "finetune" and task.frame_level:
            raise ValueError(f"{options.data} is a frame-level task, for mae-ast-fast probe alone")
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)
        model = load_model(options.checkpoint, impl=options.impl, attention=options.attention)
        self.encoder = (encoder_alone(model) if isinstance(model, MAEAST) else model).to(self.device).eval()
        self.max_seconds = options.max_seconds or min(10.0, longest_seconds(self.encoder))
        self.metric = options.metric or ("map" if task.multi_label else "accuracy")
        # A linear layer that is thrown away: what does not fit the encoder shows before anything is decoded.
        self.new_classifier(self.encoder)
        rounds = task.rounds(options.seed)
        if options.folds is not None:
            wanted = [name.strip() for name in options.folds.split(",")]
            if not rounds[0].name:
                raise ValueError(f"folds are of tables with a column fold, got {options.folds!r} for {options.data}")
            if unknown := [name for name in wanted if name not in [part.name for part in rounds]]:
                raise ValueError(f"folds must be of {[part.name for part in rounds]}, got {unknown}")
            rounds = [part for part in rounds if part.name in wanted]
        self._check_output_dir()  # at once, and again when nobody else can be at it
        self.audio = Waveforms(task, cache, options.workers)
        gone = self.audio.missing
        rounds = [Fold(p.name, *([i for i in x if i not in gone] for x in (p.train, p.valid, p.test))) for p in rounds]
        for part in rounds:
            for name in ("train", "valid", "test"):
                if not getattr(part, name):
                    i, reason = next(iter(gone.items()))
                    one = f"{task.clips[i].name}: {reason}"
                    raise ValueError(f"{options.data}: none of the {name} clips of {part.where} gives any audio; {one}")
        self.rounds = rounds
        self.examples = Examples.of(task, self.audio)
        for part in rounds:
            for name in ("valid", "test"):
                if not self.examples.targets[self.examples.of_clips(getattr(part, name))].any():
                    raise ValueError(
                        f"{options.data}: no {name} clip of {part.where} has any label, so nothing can be told by them"
                    )

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(self.out))  # makes it: a start that fails before leaves nothing
            given, known = self._check_output_dir()
            given["content"] = self._content()
            if known and known.get("content") != given["content"]:
                what = "of other clips, labels, audio or weights" if "content" in known else "of an earlier version"
                raise ValueError(f"{self.out} holds a run {what}: choose another --out")
            if not known:  # of a start that was killed before it made anything
                (self.out / "metrics.jsonl").unlink(missing_ok=True)
            write_json(self.out / TASK_OPTIONS, given)
            self.notes = [*self.task.notes, *self._notes()]
            for note in self.notes:
                self.say(f"note: {note}")
            clips, parts = len(self.task.clips) - len(self.audio.missing), len(self.rounds)
            self.say(
                f"{self.mode} of {self.options.checkpoint} on {self.task.name}: {clips} clips, "
                f"{len(self.task.labels)} classes, {parts} {'folds' if self.rounds[0].name else 'split'}, on "
                f"{self.device} in {self.precision}"
            )
            self._folder = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.close()

    def _notes(self) -> list[str]:
        """What a table leaves open: who chooses, and classes that nothing is learned of."""
        notes = []
        if not self.rounds[0].name and not any(clip.split == "valid" for clip in self.task.clips):
            notes.append(f"no clip is of split valid: {len(self.rounds[0].valid)} of the training clips choose")
        if any(clip.fold and clip.split for clip in self.task.clips):
            notes.append("the column fold is taken, the column split is not")
        targets, labels = self.examples.targets, np.array(self.task.labels)
        for part in self.rounds:
            train, test = (targets[self.examples.of_clips(clips)].any(0) for clips in (part.train, part.test))
            valid = targets[self.examples.of_clips(part.valid)].any(0)
            for kind, unknown in (("tested", test & ~train), ("in validation clips alone,", valid & ~train & ~test)):
                if names := labels[unknown].tolist():
                    more = " ..." if len(names) > 5 else ""
                    notes.append(f"{kind} without a training clip in {part.where}: {', '.join(names[:5])}{more}")
        if (count := len({i for part in self.rounds for i in part.test})) < _FEW_CLIPS:
            notes.append(f"{count} test clips: too few for the interval to be true to its name")
        return notes

    def _check_output_dir(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A folder is of one run, whose results are not overwritten: options now, and those that results there are of.

        Raises:
            ValueError: They differ, or a model is there.
        """
        given = {"mode": self.mode, **dataclasses.asdict(self.options)}
        for free in ("out", "workers", "cache"):
            given.pop(free)
        for name in ("data", "root", "checkpoint"):
            if given[name] is not None and os.path.exists(given[name]):
                given[name] = os.path.abspath(given[name])
        path, known = self.out / TASK_OPTIONS, {}
        if path.is_file():
            with contextlib.suppress(ValueError, TypeError):
                known = dict(json.loads(path.read_text()))
        elif any((self.out / name).exists() for name in ("config.json", OPTIONS, "checkpoints")):
            raise ValueError(f"{self.out} already holds a model or a pretraining run: choose another --out")
        if not any(any(self.out.glob(name)) for name in ("summary.json", "*/result.json", f"*/{STATE}")):
            return given, {}
        changed = [name for name in given if name not in known or known[name] != given[name]]
        if changed:
            changed = ["mode"] if "mode" in changed else changed
            raise ValueError(f"{self.out} holds a run with another {', '.join(changed)}: choose another --out")
        return given, known

    def _content(self) -> str:
        """Digest of what the options name: parts and clips, labels, audio, weights."""
        task = self.task
        parts = [self.encoder.config.to_dict(), *self.new_classifier(self.encoder).state_dict()]
        digest = hashlib.sha256(repr([parts, task.labels, task.clips, sorted(self.audio.missing)]).encode())
        digest.update(self.audio.identity.encode())
        for name, tensor in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def folder(self, part: Fold) -> Path:
        """Where a round of fine-tuning leaves what it made."""
        name = "".join(c if c.isalnum() or c in "-_" else f"%{ord(c):02x}" for c in part.name)
        return self.out / f"fold_{name}" if part.name else self.out / "split"

    @staticmethod
    def say(line: str) -> None:
        print(line, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def new_classifier(self, encoder: PretrainingModel) -> AudioClassifier:
        task = self.task
        options = self.options
        return AudioClassifier(encoder, task.labels, task.multi_label, self.max_seconds, options.layer, options.pool)

    def read(self, clips: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, list[int], list[float]]]:
        """All windows of clips: waveforms (B, S), lengths (B,) on the CPU, the clip of each, its start there (s)."""
        windows = [(i, *window) for i in clips for window in self.audio.windows(i, self.max_seconds)]
        for batch in batches([window for _, _, window in windows], _BATCH_SECONDS):
            waveforms, lengths = self.audio.read([windows[k][2] for k in batch])
            owners, starts = [windows[k][0] for k in batch], [windows[k][1] for k in batch]
            yield waveforms.to(self.device), lengths, owners, starts

    def probabilities(self, classifier: AudioClassifier, clips: Sequence[int]) -> np.ndarray:
        """(n, C) fp32: of each clip the mean over its windows, weighted by their lengths."""
        place = {clip: row for row, clip in enumerate(clips)}
        total = np.zeros((len(clips), len(self.task.labels)), np.float32)
        weight = np.zeros((len(clips), 1), np.float32)
        classifier.eval()
        for waveforms, lengths, owners, _ in self.read(clips):
            with self.autocast():
                found = classifier.probabilities(waveforms, lengths).cpu().numpy()
            rows, size = [place[i] for i in owners], lengths.numpy().astype(np.float32)[:, None]
            np.add.at(total, rows, found * size)
            np.add.at(weight, rows, size)
        return total / weight

    def score(self, probabilities: np.ndarray, targets: np.ndarray, metric: str | None = None) -> float:
        return score(metric or self.metric, probabilities, targets, self.task.multi_label)

    def report(
        self, tested: list[FoldResult], history: list[dict[str, Any]], baselines: dict[str, list[FoldResult]]
    ) -> dict[str, Any]:
        """Writes what a run leaves; returns the summary."""
        from .figures import plot_confusion, plot_labels, plot_learning

        task, options = self.task, self.options
        examples = self.examples
        parts = [examples.of_clips(one.round.test) for one in tested]
        truth = [examples.targets[part] for part in parts]
        clips = [examples.clip[part] for part in parts]
        found = [one.probabilities for one in tested]
        for one in tested:
            if not np.isfinite(one.probabilities).all():
                raise ValueError(f"the probabilities of {one.round.where} are not finite, and so have no score")
        self._write_predictions(examples, parts, found)
        each = [self.score(p, y) for p, y in zip(found, truth, strict=True)]
        summary: dict[str, Any] = {
            "task": task.name,
            "mode": self.mode,
            "checkpoint": options.checkpoint,
            "metric": self.metric,
            "value": float(np.mean(each)),
            "ci95": self._interval([found], truth, clips),
            "n_test": sum(map(len, truth)),
            "per_fold": each if tested[0].round.name else [],
            "folds": [one.round.name for one in tested if one.round.name],
            "valid": [one.valid for one in tested],
        }
        others = ("accuracy", "macro_f1", "map") if task.multi_label else ("accuracy", "balanced_accuracy", "macro_f1")
        for name in others:
            summary[name] = float(np.mean([self.score(p, y, name) for p, y in zip(found, truth, strict=True)]))
        if not task.multi_label:
            most = [
                np.bincount(examples.targets[examples.of_clips(one.round.train)].argmax(1)).argmax() for one in tested
            ]
            shares = [(y.argmax(1) == label).mean() for y, label in zip(truth, most, strict=True)]
            summary["majority_accuracy"] = float(np.mean(shares))
        for name, other in baselines.items():
            theirs = [one.probabilities for one in other]
            value = float(np.mean([self.score(p, y) for p, y in zip(theirs, truth, strict=True)]))
            summary[f"{name}_baseline"] = {
                "value": value,
                "ci95": self._interval([theirs], truth, clips),
                "difference": summary["value"] - value,
                "difference_ci95": self._interval([found, theirs], truth, clips),
            }
        gone = [{"path": task.clips[i].name, "reason": reason} for i, reason in self.audio.missing.items()]
        summary |= {
            "classes": len(task.labels),
            "multi_label": task.multi_label,
            "frame_level": task.frame_level,
            "chosen": [{k: v for k, v in one.chosen.items() if k != "history"} for one in tested],
            "skipped": {"count": len(gone), "files": gone[:1000]},
            "notes": self.notes,
            "seconds": round(self.earlier_seconds + time.perf_counter() - self.began, 1),
        }
        low, high = summary["ci95"]
        title = f"{task.name}: {self.metric.replace('_', ' ')} {summary['value']:.3f} ({low:.3f} - {high:.3f})"
        if task.multi_label:
            of_labels = [average_precisions(p, y) for p, y in zip(found, truth, strict=True)]
            precisions = np.ma.masked_invalid(of_labels).mean(0).filled(np.nan)  # folds lack labels
            plot_labels(
                precisions, np.concatenate(truth).mean(0), task.labels, title, self.out / "average_precision.png"
            )
        else:
            counts = sum(
                confusion(p.argmax(1), y.argmax(1), len(task.labels)) for p, y in zip(found, truth, strict=True)
            )
            plot_confusion(counts, task.labels, title, self.out / "confusion.png")
        if history:
            plot_learning(history, self.metric.replace("_", " "), self.out / "learning.png")
        summary = _rounded(summary)
        write_json(self.out / "summary.json", summary)
        return summary

    def _interval(
        self, columns: list[list[np.ndarray]], truth: list[np.ndarray], clips: list[np.ndarray]
    ) -> list[float]:
        """Of the score, or of what the first column has more of it than the second; whole clips are drawn."""
        truth_all, owner = np.concatenate(truth), np.concatenate(clips)
        joined = [np.concatenate(column) for column in columns]
        order = np.argsort(owner, kind="stable")
        kinds, first = np.unique(owner[order], return_index=True)
        rows = dict(zip(kinds.tolist(), np.split(order, first[1:]), strict=True))
        alone = len(rows) == len(owner)

        def value(drawn: np.ndarray) -> float:
            index = np.array([rows[i][0] for i in drawn]) if alone else np.concatenate([rows[i] for i in drawn])
            scores = [self.score(p[index], truth_all[index]) for p in joined]
            return scores[0] - (scores[1] if len(scores) > 1 else 0.0)

        groups = [np.unique(group) for group in clips]
        costly = len(columns) * joined[0].size if self.metric == "map" else 0
        low, high = bootstrap_ci(value, groups, self.options.seed, costly)
        return [low, high] if len(columns) > 1 else [max(low, 0.0), min(high, 1.0)]

    def _write_predictions(self, examples: Examples, parts: list[np.ndarray], found: list[np.ndarray]) -> None:
        task = self.task

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                moment = ["time"] if task.frame_level else []
                table.writerow(["path", *moment, "label", "pred", *(f"prob_{label}" for label in task.labels)])
                for part, probabilities in zip(parts, found, strict=True):
                    for i, p in zip(part, probabilities, strict=True):
                        true = ";".join(task.labels[k] for k in np.flatnonzero(examples.targets[i]))
                        pred = task.labels[p.argmax()]
                        if task.multi_label:
                            pred = ";".join(task.labels[k] for k in np.flatnonzero(p >= 0.5))
                        at = [f"{examples.time[i]:.3f}"] if task.frame_level else []
                        name = task.clips[examples.clip[i]].name
                        table.writerow([name, *at, true, pred, *(f"{x:.6g}" for x in p)])

        atomic_write(self.out / "predictions.csv", write)


def _rounded(found: Any) -> Any:
    """Floats to six decimals, wherever they stand: more than any of them is worth; None for NaN, which JSON lacks."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    if isinstance(found, float):
        return round(found, 6) if math.isfinite(found) else None
    return found
