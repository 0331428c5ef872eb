"""Audio files -> int16 clips in one cache file -> batches under a budget of seconds.

``scan`` decodes files once into a cache that an unchanged source finds again, ``split`` holds clips out, ``batch_plan``
cuts and groups the clips for an epoch, ``load_batch`` makes the tensors of one batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import audio
from .audio import SAMPLE_RATE, Entry

if TYPE_CHECKING:
    import torch

_DECODE_VERSION = 1  # part of the cache key: raise it when decoding changes the samples
_SILENT_PEAK = 1e-3  # the idle noise of G.722, which codes silence, peaks at 4e-4
_CLIPPED_SHARE = 1e-3  # of the samples at full scale
_MAX_NAMES = 1000  # names listed for one finding of a report; its count is always whole
_POOL_BATCHES = 50  # batches' worth of windows that are sorted together: more means less padding and less shuffling

# Run by the file's path, a decoding process does without the package's imports (torch alone takes 2 s). Processes of
# our own and not a pool: the one that crashes tells which file did it, and the user's main module is not run again.
_DECODER_COMMAND = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['serve']()", audio.__file__]


class _Decoder:
    """A decoding process, started again after a file that crashes or hangs it."""

    def __init__(self, pcm_path: Path) -> None:
        self.pcm_path, self.process = pcm_path, None

    def decode(self, path: str) -> dict[str, Any]:
        """Fills ``pcm_path`` and returns the result; ``{"reason": ...}`` for a file that gives none."""
        if self.process is None:
            threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
            self.process = subprocess.Popen(
                _DECODER_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders comment on every odd file
                env={**os.environ, **threads, "PYTHONSAFEPATH": "1"},
            )
            if not self.process.stdout.readline():
                raise RuntimeError(f"a decoding process does not start: {' '.join(_DECODER_COMMAND)}")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([path, str(self.pcm_path)]).encode() + b"\n")
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if reply.endswith(b"\n"):
            return json.loads(reply)
        self.close()
        return {"reason": "the decoder crashed or hung"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps this machine's other processes out while it lasts; a killed holder lets go. Without locks: no effect."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to finish with {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Clips:
    """Decoded clips in one cache file, as ``scan`` returns them.

    Attributes:
        entries: The ``Entry`` of each clip, in the source's order, skipped files left out; ``names`` are theirs.
        samples: int64 (N,), length of each clip at 16 kHz.
        md5: Digest of each clip's file.
        report: Counts and names; see ``scan``.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry]) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.entries = [entries[i] for i in index["entry"]]
        self.names = [entry.name for entry in self.entries]
        self.samples = np.asarray(index["samples"], np.int64)
        self.md5: list[str] = index["md5"]
        self.report: dict[str, Any] = index["report"]
        self._offsets, self._pcm = np.asarray(index["offset"], np.int64), folder / "audio.i16"
        if self._pcm.stat().st_size != 2 * self.samples.sum():
            raise ValueError(f"{self._pcm} does not fit its index")

    def __len__(self) -> int:
        return len(self.entries)

    def waveform(self, index: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """int16 (length,) of a clip from sample ``start`` on, by default to its end."""
        end = int(self.samples[index]) if length is None else start + length
        if not 0 <= start <= end <= self.samples[index]:
            raise ValueError(f"clip {index} has {self.samples[index]} samples, asked for {start} to {end}")
        # A read and no memory map: the process does not grow with the part of the corpus that it has seen.
        return np.fromfile(self._pcm, "<i2", end - start, offset=2 * (int(self._offsets[index]) + start))


def scan(
    entries: Sequence[Entry],
    cache_dir: str | os.PathLike,
    min_seconds: float = 0.3,
    workers: int = 2,
    progress: bool = True,
) -> Clips:
    """Decodes every file once into ``cache_dir``; an unchanged list of files (path, size, time) loads at once.

    A file that crashes or hangs one of the ``workers`` processes is skipped. The result appears whole or not at all,
    whenever the scan is killed; a second scan of the same files waits for the first.

    The report has ``files``, ``clips``, ``hours``; ``skipped``: reason -> finding; and the findings ``silent`` (peak
    under 1e-3 of full scale), ``clipped`` (at least 0.1 % of the samples at 16 kHz mono reach 0.9999 of full scale) and
    ``duplicate`` (byte-identical to an earlier file), which are kept. A finding has ``count`` and up to 1000 ``names``.

    Raises:
        ValueError: No file gives a usable clip; the reasons are counted.
        OSError: The cache cannot be written.
    """
    import soundfile  # noqa: F401 (a missing library is to fail here, not in every decoding process)
    import soxr  # noqa: F401

    sizes, key = [], hashlib.sha256(f"{_DECODE_VERSION} {min_seconds}".encode())
    for entry in entries:
        sizes.append(-1)
        with contextlib.suppress(OSError):
            found = os.stat(entry.path)
            sizes[-1] = found.st_size if stat.S_ISREG(found.st_mode) else -1
            key.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
        key.update(os.fsencode(entry.path) + b"\0")
    folder = Path(cache_dir) / f"pcm-{key.hexdigest()[:24]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return Clips(folder, entries)
        for stale in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):  # left by a killed scan
            shutil.rmtree(stale, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            partial.mkdir()
            results = _decode_all(entries, sizes, partial, min_seconds, workers, progress)
            _write_index(entries, results, partial / "index.json", min_seconds)
            with contextlib.suppress(FileExistsError):  # where there is no lock, another scan may have been first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Clips(folder, entries)


def _decode_all(
    entries: Sequence[Entry], sizes: list[int], folder: Path, min_seconds: float, workers: int, progress: bool
) -> list[dict[str, Any]]:
    """One result an entry; the PCM of the usable ones goes one behind the other into ``folder/audio.i16``."""
    results: list[dict[str, Any]] = [{"reason": "missing or no regular file"} for _ in entries]
    present = [i for i, size in enumerate(sizes) if size >= 0]
    todo, bar = iter(present), _Progress(len(present)) if progress else None
    lock, stop = threading.Lock(), threading.Event()

    def work(number: int) -> None:
        decoder = _Decoder(folder / f"decoder-{number}")
        try:
            while not stop.is_set():
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                result = decoder.decode(entries[i].path)
                if "reason" not in result and result["samples"] < max(1.0, min_seconds * SAMPLE_RATE):
                    result = {"reason": f"shorter than {min_seconds:g} s" if result["samples"] else "no samples"}
                with lock:
                    results[i] = result
                    if "reason" not in result:
                        result["offset"] = pcm.tell() // 2
                        with open(decoder.pcm_path, "rb") as decoded:
                            shutil.copyfileobj(decoded, pcm, 1 << 20)
                    if bar is not None:
                        bar.add(pcm.tell() / 2 / SAMPLE_RATE)
        finally:
            decoder.close()

    with open(folder / "audio.i16", "wb") as pcm, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, number) for number in range(workers)]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            stop.set()
    for spill in folder.glob("decoder-*"):
        spill.unlink()
    return results


class _Progress:
    """One line to stderr: rewritten on a terminal, else a new one every few seconds."""

    def __init__(self, files: int) -> None:
        self.files, self.done = files, 0
        self.start = self.shown = time.monotonic()

    def add(self, seconds: float) -> None:
        """One more file is done, ``seconds`` of audio are decoded in all."""
        self.done += 1
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.shown < (0.2 if terminal else 5.0) and self.done < self.files:
            return
        self.shown, spent = now, now - self.start + 1e-9
        print(
            f"{chr(13) * terminal}decoding: {self.done:,}/{self.files:,} files, {self.done / spent:,.0f} files/s, "
            f"{seconds / spent:,.0f}x real time, {spent * (self.files / self.done - 1):.0f} s left",
            end="    " if terminal and self.done < self.files else "\n",
            file=sys.stderr,
            flush=True,
        )


def _write_index(entries: Sequence[Entry], results: list[dict[str, Any]], path: Path, min_seconds: float) -> None:
    def finding(names: list[str]) -> dict[str, Any]:
        return {"count": len(names), "names": names[:_MAX_NAMES]}

    kept = [i for i, result in enumerate(results) if "reason" not in result]
    skipped: dict[str, list[str]] = {}
    for entry, result in zip(entries, results, strict=True):
        if "reason" in result:
            skipped.setdefault(result["reason"], []).append(entry.name)
    if not kept:
        reasons = ", ".join(f"{len(names)} x {reason}" for reason, names in skipped.items())
        raise ValueError(f"none of {len(entries)} files gives a clip of {min_seconds:g} s or more: {reasons}")
    columns = {column: [results[i][column] for i in kept] for column in ("samples", "offset", "md5")}
    first = dict(zip(reversed(columns["md5"]), reversed(kept), strict=True))
    loud = {i: results[i]["full_scale"] >= _CLIPPED_SHARE * results[i]["samples"] for i in kept}
    report = {
        "files": len(entries),
        "clips": len(kept),
        "hours": sum(columns["samples"]) / SAMPLE_RATE / 3600,
        "skipped": {reason: finding(names) for reason, names in sorted(skipped.items())},
        "silent": finding([entries[i].name for i in kept if results[i]["peak"] < _SILENT_PEAK]),
        "clipped": finding([entries[i].name for i in kept if loud[i]]),
        "duplicate": finding([entries[i].name for i in kept if first[results[i]["md5"]] != i]),
    }
    path.write_text(json.dumps({"entry": kept, **columns, "report": report}))


def batch_plan(
    samples: np.ndarray,
    batch_seconds: float,
    max_seconds: float = 10.0,
    seed: int = 0,
    epoch: int = 0,
    min_seconds: float = 0.3,
) -> list[np.ndarray]:
    """The batches of one epoch: every window once, at most ``batch_seconds`` of audio in each batch.

    A clip longer than ``max_seconds`` is cut into consecutive windows of that length from a random phase on, drawn for
    each (seed, epoch, clip), so that every cut occurs over the epochs; pieces under ``min_seconds`` are left out. The
    windows are shuffled, sorted by length inside pools of 50 batches (little padding), and the batches are shuffled.
    All of it follows from the arguments alone.

    Args:
        samples: (N,) lengths of the clips at 16 kHz.

    Returns:
        Batches of int64 (windows, 3): clip index, first sample, length.

    Raises:
        ValueError: ``max_seconds`` exceeds ``batch_seconds``, or no window is left.
    """
    window, shortest, budget = (round(s * SAMPLE_RATE) for s in (max_seconds, min_seconds, batch_seconds))
    if not 0 < window <= budget:
        raise ValueError(f"expected 0 < max_seconds <= batch_seconds, got {max_seconds} and {batch_seconds}")
    samples = np.asarray(samples, np.int64)
    rng = np.random.default_rng([seed, epoch])
    phase = np.where(samples > window, rng.integers(0, window, samples.size), 0)
    head = (phase > 0).astype(np.int64)
    counts = head + -(-(samples - phase) // window)
    clip = np.repeat(np.arange(samples.size), counts)
    number = np.arange(clip.size) - np.repeat(np.cumsum(counts) - counts, counts)
    start = phase[clip] + (number - head[clip]) * window
    end = np.minimum(start + window, samples[clip])
    start = np.maximum(start, 0)
    windows = np.stack([clip, start, end - start], axis=1)
    windows = windows[windows[:, 2] >= max(shortest, 1)]
    if not len(windows):
        raise ValueError(f"none of {samples.size} clips has {min_seconds} s")
    windows = windows[rng.permutation(len(windows))]
    pool = np.cumsum(windows[:, 2]) // (_POOL_BATCHES * budget)
    # Up in one pool and down in the next: a batch across the border holds like lengths too.
    windows = windows[np.lexsort((windows[:, 2] * (1 - 2 * (pool % 2)), pool))]
    total = np.concatenate([[0], np.cumsum(windows[:, 2])])
    edges = [0]
    while edges[-1] < len(windows):
        edges.append(int(np.searchsorted(total, total[edges[-1]] + budget, "right")) - 1)
    return [windows[edges[i] : edges[i + 1]] for i in rng.permutation(len(edges) - 1)]


def load_batch(clips: Clips, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """The waveforms of one batch of ``batch_plan``.

    Returns:
        Waveforms int16 (B, S), zero past a length; lengths int64 (B,); ids int64 (B,) in [0, 2^32), one for each
        (clip, first sample) and the same in every run, for ``masking.sample_mask``'s ``clip_ids``; the clips' names.
    """
    import torch

    batch = np.asarray(batch, np.int64)
    waveforms = np.zeros((len(batch), int(batch[:, 2].max())), np.int16)
    for row, (clip, start, length) in zip(waveforms, batch.tolist(), strict=True):
        row[:length] = clips.waveform(clip, start, length)
    ids = (batch[:, 0] + batch[:, 1] * 0x9E3779B1) & 0xFFFFFFFF  # the clip where a window starts it; else spread
    names = [clips.names[clip] for clip in batch[:, 0]]
    return torch.from_numpy(waveforms), torch.from_numpy(batch[:, 2].copy()), torch.from_numpy(ids), names


def split(clips: Clips, fraction: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips of a user's data: whole folders where there are enough, else files.

    The shallowest folder level with at least 5 folders gives the groups, since a folder is often a speaker or a
    session; with fewer, every file is its own. Groups are taken in the order of a hash of their names until
    ``fraction`` of the clips is held out; one that would make it more than twice that is passed over. Byte-identical
    files are never on both sides.

    Returns:
        Indices int64 (train,) and (held-out,), ascending and never empty, and a sentence that says how.

    Raises:
        ValueError: Fewer than two different files, or ``fraction`` outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    first: dict[str, str] = {}
    by_file = [first.setdefault(md5, name) for md5, name in zip(clips.md5, clips.names, strict=True)]
    if len(first) < 2:
        raise ValueError(
            "holding clips out takes at least two different files, got one: add some, or cut it into several"
        )
    folders = [name.split("/")[:-1] for name in clips.names]
    held, how = _choose(by_file, fraction, seed), "single files, by a hash of their names"
    for level in range(1, max(map(len, folders)) + 1):
        groups = ["/".join(folder[:level]) for folder in folders]
        if len(set(groups)) >= 5:
            chosen = _choose(groups, fraction, seed)
            trained = {md5 for md5, out in zip(clips.md5, chosen, strict=True) if not out}
            chosen &= np.array([md5 not in trained for md5 in clips.md5])
            if chosen.any():
                held, how = chosen, f"whole folders of {len(set(groups))} at level {level}"
            break
    return np.flatnonzero(~held), np.flatnonzero(held), f"held out: {held.sum()} of {held.size} clips, {how}"


def _choose(groups: list[str], fraction: float, seed: int) -> np.ndarray:
    """bool (N,): members of the chosen groups; at least one group, never all of several."""
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    chosen, held, target = [], 0, fraction * len(groups)
    for group in order:
        if held < target and held + sizes[group] <= min(2 * target, len(groups) - 1):
            chosen.append(group)
            held += sizes[group]
    return np.isin(groups, chosen or [min(order, key=sizes.__getitem__)])
