"""The part that probing and fine-tuning share: a task's audio, its examples, and the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
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
from ..files import check_out_folder, write_json
from ..models.base import PretrainingModel
from ..models.mae_ast import MAEAST
from ..training.lifecycle import OPTIONS, TASK_OPTIONS, run_lock
from .audio import Waveforms, batches
from .classifier import AudioClassifier, max_clip_seconds
from .manifest import Fold, Task, read_task
from .metrics import score
from .options import ProbeOptions

Options_co = TypeVar("Options_co", bound=ProbeOptions, covariant=True)

_BATCH_SECONDS = 160.0  # padded audio per batch, in seconds, when nothing is trained
STATE = "state.safetensors"  # in a fold's folder: the state from which interrupted fine-tuning resumes
_MIN_TEST_CLIPS = 30  # with fewer clips the bootstrap interval is unreliable
_DEFAULTS = {"head": "linear", "layers": "last"}  # of options that runs of earlier versions did not record
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

    def select(self, clips: Sequence[int]) -> Examples:
        """The examples of some clips, in the order of ``clips``."""
        indices = self.indices(clips)
        return Examples(self.clip[indices], self.time[indices], self.targets[indices])


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
    """A probing or fine-tuning run: the task, its audio, the encoder, and the run folder.

    As a context manager it locks the run folder and writes the options into it.

    Args:
        options: Options of the command.
        mode: "probe" or "finetune".

    Raises:
        ValueError: The data, options or checkpoint are unusable, or the run folder holds another run.
    """

    def __init__(self, options: Options_co, mode: str) -> None:
        self.options, self.mode, self.out = options, mode, Path(options.out)
        check_out_folder(self.out)
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
        folds = self._requested_folds()
        self._check_output_dir()  # early, for a fast error; __enter__ checks again under the lock
        self.audio = Waveforms(task, cache, options.workers)
        self.folds = self._folds_with_audio(folds)
        self.examples = Examples.from_task(task, self.audio)
        self._check_labels()

    def _requested_folds(self) -> list[Fold]:
        """The folds of the task that the options ask for, or its split.

        Raises:
            ValueError: The task has no folds, or not these.
        """
        options, folds = self.options, self.task.folds(self.options.seed)
        if options.folds is None:
            return folds
        if not folds[0].name:
            raise ValueError(f"folds needs a manifest with a column fold, got {options.folds!r} for {options.data}")
        requested = [name.strip() for name in options.folds.split(",")]
        if unknown := [name for name in requested if name not in [fold.name for fold in folds]]:
            raise ValueError(f"folds must be in {[fold.name for fold in folds]}, got {unknown}")
        return [fold for fold in folds if fold.name in requested]

    def _folds_with_audio(self, folds: Sequence[Fold]) -> list[Fold]:
        """Folds without the clips that have no audio.

        Raises:
            ValueError: A fold has no clip left for training, validation or testing.
        """
        missing = self.audio.missing
        folds = [fold.without(set(missing)) for fold in folds]
        for fold in folds:
            for split in ("train", "valid", "test"):
                if not getattr(fold, split):
                    i, reason = next(iter(missing.items()))
                    example = f"{self.task.clips[i].name}: {reason}"
                    raise ValueError(
                        f"{self.options.data}: none of the {split} clips of {fold.display_name} has audio; {example}"
                    )
        return folds

    def _check_labels(self) -> None:
        """Raise a ``ValueError`` if the validation or test clips of a fold have no label, and so no score."""
        for fold in self.folds:
            for split in ("valid", "test"):
                if not self.examples.select(getattr(fold, split)).targets.any():
                    raise ValueError(
                        f"{self.options.data}: no {split} clip of {fold.display_name} has a label, so they give no "
                        "score"
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
        changed = [name for name, value in options.items() if previous.get(name, _DEFAULTS.get(name)) != value]
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
            head=self.options.head,
            layers=self.options.layers,
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
