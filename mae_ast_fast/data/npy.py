"""Audio decoded into two arrays, for machines without audio libraries.

``FILE.npy`` holds the samples of all clips one after another, int16 (S,) at 16 kHz; ``FILE.lengths.npy`` the samples
of each clip, int64 (clips,). Real lengths, so nothing is padded or cut to fit:

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

_HEADER = 128  # bytes at the beginning of an .npy file
_EVERY = 2.0  # seconds between two lines of progress


@dataclasses.dataclass
class Prepared:
    """What was written: ``size`` in bytes, ``skipped`` (path, reason), ``left`` files that the size had no room for."""

    files: int
    clips: int = 0
    seconds: float = 0.0
    size: int = 0
    left: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def prepare_npy(
    source: str | os.PathLike | None,
    out: str | os.PathLike,
    seconds: float = 10.0,
    max_mb: float = 30.0,
    seed: int = 0,
    progress: Callable[[str], object] = print,
) -> Prepared:
    """Decodes files in an order drawn from ``seed`` until the next clip would not fit, and writes two arrays.

    Args:
        source: Folder, fairseq ``.tsv`` or one file (``find_audio``); None: the default corpus, fetched where needed.
        out: The ``.npy`` file; lengths go beside it (``lengths_path``).
        seconds: Of longer files only so much, from their beginning.
        max_mb: Of both files together, in 10^6 bytes.
        seed: Of the order.
        progress: Gets lines of text: files that are skipped, and how far it is.

    Raises:
        ValueError: ``out`` does not end in .npy, an option out of range, no audio in the source, or no clip fits.
        FileNotFoundError: No such source.
        CorpusError: The default corpus cannot be had here.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"the file must end in .npy, got {out}")
    if not MIN_SECONDS <= seconds < float("inf"):
        raise ValueError(f"seconds must be at least {MIN_SECONDS}, got {seconds}")
    room = round(max_mb * 1e6) - 2 * _HEADER
    if not 2 * MIN_SECONDS * SAMPLE_RATE + 8 <= room < float("inf"):
        raise ValueError(f"max_mb must hold a clip of {MIN_SECONDS} s (0.01), got {max_mb}")
    entries = default_entries(progress) if source is None else find_audio(source)
    random.Random(seed).shuffle(entries)
    report = Prepared(len(entries))
    clips: list[np.ndarray] = []
    start = shown = time.monotonic()
    for number, entry in enumerate(entries):
        try:
            clip = to_pcm16(decode(entry.path, seconds))
            if clip.size < MIN_SECONDS * SAMPLE_RATE:
                raise AudioError(entry.path, f"shorter than {MIN_SECONDS} s")
        except AudioError as error:
            report.skipped.append((error.path, error.reason))
            progress(f"skipped {error}")
            continue
        if report.size + clip.nbytes + 8 > room:
            report.left = len(entries) - number
            break
        clips.append(clip)
        report.size += clip.nbytes + 8
        if (now := time.monotonic()) - shown >= _EVERY:
            done = max((number + 1) / len(entries), report.size / room)
            spent = now - start
            progress(
                f"{len(clips)} clips, {report.size / 1e6:.1f} of at most {max_mb:g} MB, "
                f"{(number + 1) / spent:.1f} files/s, about {spent / done - spent:.0f} s left"
            )
            shown = now
    if not clips:
        raise ValueError(
            f"no clip for {out}: {len(report.skipped)} files skipped, {report.left} too long for {max_mb} MB"
        )
    lengths = np.array([clip.size for clip in clips], np.int64)
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        np.save(partial, np.concatenate(clips), allow_pickle=False)
        atomic_write(lengths_path(out), lambda other: np.save(other, lengths, allow_pickle=False))

    atomic_write(out, write)  # both are complete before the first takes its place
    report.clips, report.seconds = len(clips), int(lengths.sum()) / SAMPLE_RATE
    report.size = out.stat().st_size + lengths_path(out).stat().st_size
    return report


def lengths_path(out: str | os.PathLike) -> Path:
    """Where the lengths of the clips in ``out`` are: FILE.lengths.npy beside FILE.npy."""
    return Path(out).with_suffix(".lengths.npy")
