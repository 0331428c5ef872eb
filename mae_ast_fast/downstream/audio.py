"""Waveforms of a task's clips, read from shards that are written once."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data import prepare
from ..data.audio import SAMPLE_RATE, AudioFile
from ..data.shards import Batch, Crop, Segment, Shards
from ..ops.fbank import WINDOW
from .manifest import Task


def _keep_all(files: Sequence[AudioFile]) -> tuple[np.ndarray, np.ndarray, str]:
    """Split of ``prepare.plan`` that holds no file out. Its name is part of the cache key: do not rename it."""
    return np.arange(len(files)), np.arange(0), "all clips are labelled ones"


class Waveforms:
    """The audio of a task, decoded once into shards in the cache, as the audio for pretraining is.

    Attributes:
        identity: Digest of the shards.
        missing: Index of a clip -> reason why it has no audio. These clips are left out.
        seconds: (clips,) float64, duration of each clip.

    Args:
        task: Task whose clips are decoded.
        cache: Folder for the shards; created if it does not exist.
        workers: Number of processes that decode.

    Raises:
        ValueError: No clip has any audio.
    """

    def __init__(self, task: Task, cache: str | os.PathLike[str], workers: int = 2) -> None:
        # Files are named by their paths, not as in the manifest: another manifest of the same files reuses the shards.
        files = {clip.path: AudioFile(clip.path, clip.path) for clip in task.clips}
        plan = prepare.plan(list(files.values()), min_seconds=WINDOW / SAMPLE_RATE, split=_keep_all)
        folder = Path(cache) / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        report = prepare.write_shards(plan, folder / plan.key[:24], workers=workers)
        self._shards = Shards(folder / plan.key[:24])
        self.identity = self._shards.identity
        segments_by_path: dict[str, list[Segment]] = {}
        for segment in self._shards.segments("train"):
            segments_by_path.setdefault(segment.name, []).append(segment)
        reasons = {path: reason for reason, skipped in report["skipped"].items() for path in skipped["names"]}
        self.missing: dict[int, str] = {}
        self._crops: list[list[Crop]] = []
        for i, clip in enumerate(task.clips):
            segments = sorted(segments_by_path.get(clip.path, ()), key=lambda segment: segment.index)
            end = round(clip.end * SAMPLE_RATE) if clip.end else sum(segment.num_samples for segment in segments)
            crops = _crop_segments(segments, round(clip.start * SAMPLE_RATE), end)
            self._crops.append(crops)
            if sum(crop.num_samples for crop in crops) < WINDOW:
                default = "less than 25 ms of audio from start to end" if segments else "cannot be read"
                self.missing[i] = reasons.get(clip.path, default)
        self.seconds = np.array([sum(crop.num_samples for crop in crops) for crops in self._crops]) / SAMPLE_RATE

    def windows(self, clip: int, max_seconds: float) -> list[tuple[float, Crop]]:
        """Cut a clip into windows of ``max_seconds``. The last window may be shorter.

        A recording of over two minutes is stored in several segments; no window crosses their edges.

        Args:
            clip: Index of the clip.
            max_seconds: Length of a window in seconds.

        Returns:
            (start, crop) of each window, the start in seconds from the beginning of the clip.
        """
        max_samples = round(max_seconds * SAMPLE_RATE)
        windows = []
        offset = 0
        for crop in self._crops[clip]:
            for start, end in itertools.pairwise([*range(0, crop.num_samples, max_samples), crop.num_samples]):
                if end - start >= WINDOW:
                    window = crop.segment.crop(crop.start + start, end - start)
                    windows.append(((offset + start) / SAMPLE_RATE, window))
            offset += crop.num_samples
        return windows

    def crop(self, clip: int, max_seconds: float, rng: random.Random) -> Crop:
        """Draw a random crop of ``max_seconds`` from a clip, or return all of a shorter one."""
        max_samples = round(max_seconds * SAMPLE_RATE)
        crops = self._crops[clip]
        crop = rng.choices(crops, [crop.num_samples for crop in crops])[0]
        start = rng.randint(0, max(0, crop.num_samples - max_samples))
        return crop.segment.crop(crop.start + start, min(max_samples, crop.num_samples))

    def read(self, crops: Sequence[Crop]) -> tuple[Tensor, Tensor]:
        """Read crops: waveforms (B, S) int16 and the number of samples (B,) of each.

        Raises:
            ValueError: A crop cannot be read any more, because the shards are damaged.
        """
        batch: Batch = self._shards.read(crops)
        if batch.faults:
            raise ValueError(f"{self._shards.source} is damaged, delete it: {batch.faults[0]}")
        return batch.waveforms, batch.num_samples


def _crop_segments(segments: Sequence[Segment], start: int, end: int) -> list[Crop]:
    """The crops that make up samples ``start`` to ``end`` of a recording that is stored in segments."""
    crops, offset = [], 0
    for segment in segments:
        first, last = max(start, offset), min(end, offset + segment.num_samples)
        if last - first >= WINDOW:
            crops.append(segment.crop(first - offset, last - first))
        offset += segment.num_samples
    return crops


def batches(crops: Sequence[Crop], batch_seconds: float) -> Iterator[list[int]]:
    """Group crops of similar length into batches.

    Args:
        crops: Crops to group.
        batch_seconds: Padded audio per batch in seconds. A longer crop makes a batch of its own.

    Yields:
        Indices of the crops of a batch, the longest crops first.
    """
    order = sorted(range(len(crops)), key=lambda i: -crops[i].num_samples)
    while order:
        size = max(1, int(batch_seconds * SAMPLE_RATE / crops[order[0]].num_samples))
        yield order[:size]
        order = order[size:]
