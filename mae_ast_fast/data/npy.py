"""Decode audio into two arrays, for machines without audio libraries.

``FILE.npy`` holds the concatenated samples of all clips, int16 (S,) at 16 kHz. ``FILE.lengths.npy`` holds the number of
samples of each clip, int64 (clips,). Clips are neither padded nor cut to a common length:

    samples, lengths = numpy.load("FILE.npy", mmap_mode="r"), numpy.load("FILE.lengths.npy")
    clips = numpy.split(samples, lengths.cumsum()[:-1])      # / 32768 gives full scale 1
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..files import atomic_write
from .audio import SAMPLE_RATE, AudioError, decode, find_audio, to_pcm16
from .prepare import MIN_SECONDS, default_entries

_HEADER_BYTES = 128  # of an .npy file
_PROGRESS_SECONDS = 2.0  # between two lines of progress


@dataclasses.dataclass
class NpyReport:
    """The result of ``prepare_npy``.

    Attributes:
        files: Number of files in the source.
        clips: Number of clips written.
        seconds: Length of the clips in all.
        num_bytes: Size of both files together.
        left_out: Number of files left out because the size was reached.
        skipped: (path, reason) of the files that give no clip.
    """

    files: int
    clips: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    left_out: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def prepare_npy(
    source: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    seconds: float = 10.0,
    max_mb: float = 30.0,
    seed: int = 0,
    progress: Callable[[str], object] = print,
) -> NpyReport:
    """Decode files in random order until the next clip would exceed the size, and write two arrays.

    Args:
        source: Folder, fairseq ``.tsv`` or one file (``find_audio``); None: the default corpus, fetched where needed.
        out: The ``.npy`` file. The lengths are written next to it (``lengths_path``).
        seconds: Longer files are cut to their first ``seconds``; at least 0.3. Default: 10.
        max_mb: Maximum size of both files together in 10^6 bytes. Default: 30.
        seed: Of the order of files. Default: 0.
        progress: Called with lines of text: skipped files, and the progress.

    Raises:
        ValueError: ``out`` does not end in .npy, an option is out of range, the source has no audio, or no clip fits.
        FileNotFoundError: ``source`` does not exist.
        CorpusError: The default corpus is not available here.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"the file must end in .npy, got {out}")
    if not MIN_SECONDS <= seconds < float("inf"):
        raise ValueError(f"seconds must be at least {MIN_SECONDS}, got {seconds}")
    max_bytes = round(max_mb * 1e6) - 2 * _HEADER_BYTES
    if not 2 * MIN_SECONDS * SAMPLE_RATE + 8 <= max_bytes < float("inf"):
        raise ValueError(f"max_mb must hold a clip of {MIN_SECONDS} s (0.01), got {max_mb}")
    entries = default_entries(progress) if source is None else find_audio(source)
    random.Random(seed).shuffle(entries)
    report = NpyReport(len(entries))
    clips: list[np.ndarray] = []
    start = last_shown = time.monotonic()
    for index, entry in enumerate(entries):
        try:
            clip = to_pcm16(decode(entry.path, seconds))
            if clip.size < MIN_SECONDS * SAMPLE_RATE:
                raise AudioError(entry.path, f"shorter than {MIN_SECONDS} s")
        except AudioError as error:
            report.skipped.append((error.path, error.reason))
            progress(f"skipped {error}")
            continue
        if report.num_bytes + clip.nbytes + 8 > max_bytes:
            report.left_out = len(entries) - index
            break
        clips.append(clip)
        report.num_bytes += clip.nbytes + 8
        if (now := time.monotonic()) - last_shown >= _PROGRESS_SECONDS:
            share_done = max((index + 1) / len(entries), report.num_bytes / max_bytes)
            elapsed = now - start
            progress(
                f"{len(clips)} clips, {report.num_bytes / 1e6:.1f} of at most {max_mb:g} MB, "
                f"{(index + 1) / elapsed:.1f} files/s, about {elapsed / share_done - elapsed:.0f} s left"
            )
            last_shown = now
    if not clips:
        raise ValueError(
            f"no clip for {out}: {len(report.skipped)} files skipped, {report.left_out} too long for {max_mb} MB"
        )
    num_samples = np.array([clip.size for clip in clips], np.int64)
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        np.save(partial, np.concatenate(clips), allow_pickle=False)
        atomic_write(lengths_path(out), lambda other: np.save(other, num_samples, allow_pickle=False))

    atomic_write(out, write)  # both files are complete before the first is renamed
    report.clips, report.seconds = len(clips), int(num_samples.sum()) / SAMPLE_RATE
    report.num_bytes = out.stat().st_size + lengths_path(out).stat().st_size
    return report


def lengths_path(out: str | os.PathLike) -> Path:
    """The file with the number of samples of each clip in ``out``: FILE.lengths.npy next to FILE.npy."""
    return Path(out).with_suffix(".lengths.npy")
