"""Waveforms of a task's clips, read from shards made once."""

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


def _keep_all(entries: Sequence[AudioFile]) -> tuple[np.ndarray, np.ndarray, str]:
    return np.arange(len(entries)), np.arange(0), "all clips are labelled ones"


class Waveforms:
    """The audio of a task, decoded once into shards in the cache as that of pretraining is.

    Attributes:
        identity: Digest of the shards.
        missing: Clip -> why it gives no audio; such clips are left out.
        seconds: (clips,) float64, of each.

    Args:
        task: Whose clips.
        cache: Folder.
        workers: Processes that decode.

    Raises:
        ValueError: No clip gives any audio.
    """

    def __init__(self, task: Task, cache: str | os.PathLike[str], workers: int = 2) -> None:
        # By their paths, not by what a manifest calls them: another one over the same files finds the same shards.
        files = {clip.path: AudioFile(clip.path, clip.path) for clip in task.clips}
        plan = prepare.plan(list(files.values()), min_seconds=WINDOW / SAMPLE_RATE, split=_keep_all)
        folder = Path(cache) / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        report = prepare.write_shards(plan, folder / plan.key[:24], workers=workers)
        self._shards = Shards(folder / plan.key[:24])
        self.identity = self._shards.identity
        segments: dict[str, list[Segment]] = {}
        for segment in self._shards.segments("train"):
            segments.setdefault(segment.name, []).append(segment)
        reasons = {name: reason for reason, found in report["skipped"].items() for name in found["names"]}
        self.missing: dict[int, str] = {}
        self._crops: list[list[Crop]] = []
        for i, clip in enumerate(task.clips):
            found = sorted(segments.get(clip.path, ()), key=lambda segment: segment.index)
            end = round(clip.end * SAMPLE_RATE) if clip.end else sum(segment.num_samples for segment in found)
            crops = _cut(found, round(clip.start * SAMPLE_RATE), end)
            self._crops.append(crops)
            if sum(crop.num_samples for crop in crops) < WINDOW:
                self.missing[i] = reasons.get(clip.path, "no audio of 25 ms there" if found else "cannot be read")
        self.seconds = np.array([sum(crop.num_samples for crop in crops) for crops in self._crops]) / SAMPLE_RATE

    def windows(self, clip: int, max_seconds: float) -> list[tuple[float, Crop]]:
        """A clip in windows of ``max_seconds``, the last one shorter, and where in it each starts, in seconds.

        Those of a recording of over two minutes do not cross its segments.
        """
        longest, before, found = round(max_seconds * SAMPLE_RATE), 0, []
        for crop in self._crops[clip]:
            for a, b in itertools.pairwise([*range(0, crop.num_samples, longest), crop.num_samples]):
                if b - a >= WINDOW:
                    found.append(((before + a) / SAMPLE_RATE, crop.segment.crop(crop.start + a, b - a)))
            before += crop.num_samples
        return found

    def crop(self, clip: int, max_seconds: float, rng: random.Random) -> Crop:
        """A random stretch of ``max_seconds`` of a clip, or all of a shorter one."""
        longest = round(max_seconds * SAMPLE_RATE)
        crops = self._crops[clip]
        crop = rng.choices(crops, [crop.num_samples for crop in crops])[0]
        start = rng.randint(0, max(0, crop.num_samples - longest))
        return crop.segment.crop(crop.start + start, min(longest, crop.num_samples))

    def read(self, windows: Sequence[Crop]) -> tuple[Tensor, Tensor]:
        """int16 (B, S) and lengths (B,) of windows.

        Raises:
            ValueError: One of them cannot be read (again): the shards were damaged.
        """
        batch: Batch = self._shards.read(windows)
        if batch.faults:
            raise ValueError(f"{self._shards.source} is damaged, delete it: {batch.faults[0]}")
        return batch.waveforms, batch.num_samples


def _cut(segments: Sequence[Segment], start: int, end: int) -> list[Crop]:
    """The windows that make up samples ``start`` to ``end`` of a recording in segments."""
    found, offset = [], 0
    for segment in segments:
        first, last = max(start, offset), min(end, offset + segment.num_samples)
        if last - first >= WINDOW:
            found.append(segment.crop(first - offset, last - first))
        offset += segment.num_samples
    return found


def batches(windows: Sequence[Crop], batch_seconds: float) -> Iterator[list[int]]:
    """Indices of windows of like lengths, ``batch_seconds`` of padded audio at a time, the longest first."""
    order = sorted(range(len(windows)), key=lambda i: -windows[i].num_samples)
    while order:
        size = max(1, int(batch_seconds * SAMPLE_RATE / windows[order[0]].num_samples))
        yield order[:size]
        order = order[size:]
