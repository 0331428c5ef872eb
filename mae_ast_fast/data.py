"""Audio files -> 16 kHz mono int16 clips in one cache file -> batches under a budget of seconds.

``find_audio`` lists files, ``scan`` decodes them once into a cache that an unchanged source finds again, ``batch_plan``
cuts and groups the clips for an epoch, ``load_batch`` makes the tensors of one batch.

Corrupt is a file that a decoder refuses, that has NaN or infinite samples, or that holds clearly less audio (1 % and a
quarter of a second) than its header states, in formats that state a length: WAV, AIFF, AU, W64, FLAC, MP4, Matroska,
ASF. The sizes by which streaming WAV writers mean "unknown" are no fault. Ogg, MP3, AAC and G.722 state none or an
estimate, and their pages and frames stand alone: a cut file is a shorter file. Memory never follows a header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SAMPLE_RATE = 16000
_SUFFIXES = (
    ".wav .wave .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .sph .g722 .m4a .mp4 .mov .mkv .mka "
    ".webm .aac .wma .wv .amr"
)
AUDIO_SUFFIXES = frozenset(_SUFFIXES.split())
_DECODE_VERSION = 1  # part of the cache key: raise it when decoding changes the samples
_BLOCK_VALUES = 1 << 18  # samples x channels read at a time: 1 MiB of float32
_SILENT_PEAK = 1e-3  # the idle noise of G.722, which codes silence, peaks at 4e-4
_FULL_SCALE, _CLIPPED_SHARE = 0.9999, 1e-3
_STALL_SECONDS = 120.0  # a decoder that yields nothing for so long hangs
_MAX_NAMES = 1000  # names listed for one finding of a report; its count is always whole
_POOL_BATCHES = 50  # batches' worth of windows that are sorted together: more means less padding and less shuffling
# FFmpeg also reads playlists and the like, which open other files: only containers of sound are let through.
_AV_FORMATS = "mov,matroska,asf,avi,aac,flac,ogg,mp3,wav,w64,aiff,au,caf,amr,wv,g722"
_AV_STATES_LENGTH = {"mov", "matroska", "asf", "flac", "wav", "w64", "aiff", "au"}


class AudioError(ValueError):
    """A file that gives no usable audio: its ``path``, and as ``reason`` one of few short phrases, fit for counting."""

    def __init__(self, path: str | os.PathLike, reason: str, detail: object = "") -> None:
        detail = " ".join(str(detail).split())
        super().__init__(f"{os.fspath(path)}: {reason}" + (f" ({detail})" if detail else ""))
        self.path, self.reason = os.fspath(path), reason


@dataclass(frozen=True)
class Entry:
    """One audio file: where it is, its name relative to the source, and labels for splits and reports."""

    path: str
    name: str
    kind: str = ""
    group: str = ""


def find_audio(source: str | os.PathLike) -> list[Entry]:
    """The audio files of a folder (all levels, sorted, hidden ones left out), of a fairseq ``.tsv``, or one file.

    A manifest's first line is the root (a relative one starts at the manifest's folder), each later line
    ``path<TAB>samples``; its sample counts are not used, every file is measured.

    Raises:
        FileNotFoundError: The source, or a manifest's root, does not exist.
        ValueError: The folder holds no audio file, or a line of the manifest is malformed (its number is named).
    """
    source = Path(source).expanduser()
    if source.is_dir():
        files = sorted(_walk(source))
        if not files:
            raise ValueError(f"no audio file ({_SUFFIXES}) in {source}")
        return [_entry(source, relative) for relative in files]
    if not source.is_file():
        raise FileNotFoundError(f"no such folder or file: {source}")
    return _read_manifest(source) if source.suffix.lower() == ".tsv" else [_entry(source.parent, source.name)]


def _entry(root: Path, relative: str) -> Entry:
    # A name that is no UTF-8 must still be printable in reports; the path keeps its bytes.
    name = os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")
    return Entry(os.path.abspath(root / relative), name, group=name.rpartition("/")[0])


def _walk(root: Path) -> Iterator[str]:
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.stat(folder)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if (here.st_dev, here.st_ino) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        for file in files:
            path = os.path.join(folder, file)
            if not file.startswith(".") and Path(file).suffix.lower() in AUDIO_SUFFIXES and os.path.isfile(path):
                yield os.path.relpath(path, root)


def _read_manifest(path: Path) -> list[Entry]:
    root_line, *lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    root_line = root_line.strip()
    if not root_line or "\0" in root_line:
        raise ValueError(f"{path}, line 1: expected the root folder of the files, got {root_line[:80]!r}")
    if not (path.parent / root_line).is_dir():
        raise FileNotFoundError(f"{path}, line 1: no such folder: {root_line[:80]!r}")
    entries = []
    for number, line in enumerate(lines, 2):
        relative, _, samples = line.rstrip("\r").partition("\t")
        if relative and "\0" not in relative and samples.isdecimal():
            entries.append(_entry(path.parent / root_line, relative))
        elif line.strip():
            raise ValueError(f"{path}, line {number}: expected path<TAB>samples, got {line[:80]!r}")
    if not entries:
        raise ValueError(f"{path} lists no file")
    return entries


def decode(path: str | os.PathLike, max_seconds: float | None = None) -> np.ndarray:
    """The whole file, or its first ``max_seconds``, as float32 (S,): 16 kHz, channels averaged, full scale 1.

    Raises:
        AudioError: The file gives no usable audio; its ``reason`` says why.
    """
    limit = None if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    blocks, samples = [np.zeros(0, np.float32)], 0
    for block in decode_blocks(path):
        blocks.append(block)
        samples += block.size
        if limit is not None and samples >= limit:
            break
    return np.concatenate(blocks)[:limit]


def decode_blocks(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Blocks of float32 (s,), 16 kHz mono, in order and of bounded size whatever the file's length.

    libsndfile decodes, FFmpeg (PyAV) what libsndfile cannot read; soxr (HQ) resamples from 1 kHz to 768 kHz.

    Raises:
        AudioError: When the fault is met, after the sound blocks before it.
    """
    import soxr

    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise AudioError(path, "no regular file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise AudioError(path, "empty file")
    except OSError as error:
        raise AudioError(path, "unreadable", error.strerror) from error
    rate, resampler = 0, None
    for block_rate, block in _native_blocks(path):
        if not rate:
            rate = block_rate
            if not 1000 <= rate <= 768000:
                raise AudioError(path, "sample rate outside 1 kHz - 768 kHz", f"{rate} Hz")
            if rate != SAMPLE_RATE:
                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        if block_rate != rate:
            raise AudioError(path, "corrupt", f"the sample rate changes from {rate} to {block_rate} Hz")
        channels = block.shape[1]
        mono = block[:, 0] if channels == 1 else block @ np.full(channels, 1.0 / channels, np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(path, "NaN or infinite samples")
        if resampler is not None:
            mono = resampler.resample_chunk(mono)
        if mono.size:
            yield mono
    if resampler is not None and (tail := resampler.resample_chunk(np.zeros(0, np.float32), last=True)).size:
        yield tail


def _native_blocks(path: str) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 (n, channels)) from libsndfile, or from FFmpeg where libsndfile gives nothing."""
    import soundfile

    began, refusal = False, ""
    if not path.lower().endswith(".g722"):  # headerless: libsndfile has nothing to recognise it by
        try:
            for block in _soundfile_blocks(path):
                began = True
                yield block
            return
        except soundfile.LibsndfileError as error:
            refusal = error.error_string
            if began:
                raise AudioError(path, "corrupt", refusal) from error
    yield from _av_blocks(path, refusal)


def _soundfile_blocks(path: str) -> Iterator[tuple[int, np.ndarray]]:
    import soundfile

    with soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else path) as file:
        frames, found = max(1, _BLOCK_VALUES // file.channels), 0
        while len(block := file.read(frames, dtype="float32", always_2d=True)):
            yield file.samplerate, block
            found += len(block)
        # libsndfile cuts the length of uncompressed audio to what is there; what the header said is in its log alone.
        sizes = re.findall(r": (\d+) \(should be (\d+)\)", file.extra_info)
        excess = max((int(a) / max(int(b), 1) for a, b in sizes if int(a) < 0x7FFFF000), default=1.0)
        if file.format not in ("OGG", "MP3"):
            _check_length(path, found / file.samplerate, max(file.frames, excess * found) / file.samplerate)


def _av_blocks(path: str, refusal: str) -> Iterator[tuple[int, np.ndarray]]:
    import av

    container_format = "g722" if path.lower().endswith(".g722") else None
    options = {"protocol_whitelist": "file", "format_whitelist": _AV_FORMATS}
    try:
        with av.open(path, format=container_format, options=options) as container:
            if not container.streams.audio:
                raise AudioError(path, "no audio stream")
            stream = container.streams.audio[0]
            rate, found, pending, values = 0, 0.0, [], 0
            for frame in container.decode(stream):
                block = _float_frame(frame)
                if pending and (frame.rate, block.shape[1]) != (rate, pending[0].shape[1]):
                    raise AudioError(path, "corrupt", "sample rate or channels change in the stream")
                rate = frame.rate
                found += len(block) / rate
                pending.append(block)
                values += block.size
                if values >= _BLOCK_VALUES:
                    yield rate, np.concatenate(pending)
                    pending, values = [], 0
            if pending:
                yield rate, np.concatenate(pending)
            if container.format.name.split(",")[0] in _AV_STATES_LENGTH:
                if stream.duration is not None:
                    _check_length(path, found, float(stream.duration * stream.time_base))
                elif container.duration is not None and not container.streams.video:
                    _check_length(path, found, container.duration / av.time_base)
    except AudioError:
        raise
    except (av.FFmpegError, ValueError, ArithmeticError, LookupError, NotImplementedError) as error:
        raise AudioError(path, "corrupt", refusal or error) from error


def _float_frame(frame: Any) -> np.ndarray:
    """An ``av.AudioFrame`` as float32 (n, channels), full scale 1."""
    values = frame.to_ndarray()  # (channels, n) planar, (1, n * channels) packed
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128.0) / 128.0
    scale = float(1 << (8 * values.dtype.itemsize - 1)) if values.dtype.kind == "i" else 1.0
    return (values / scale).astype(np.float32)


def _check_length(path: str, found: float, stated: float) -> None:
    if found * 1.01 + 0.25 < stated:
        raise AudioError(path, "truncated", f"the header states {stated:.1f} s, the file holds {found:.1f} s")


def _serve() -> None:
    """A decoding process: [audio path, PCM path] comes in, a result goes out, each a line of JSON."""
    import faulthandler
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end closes our stdin
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        path, pcm_path = json.loads(line)
        try:
            with open(pcm_path, "wb") as pcm:
                result = _decode_to(path, pcm, lambda: faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True))
        except AudioError as error:
            result = {"reason": error.reason}
        except Exception as error:  # decoders raise all sorts, and one file must not stop the pass
            result = {"reason": f"{type(error).__name__} in the decoder"}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=replies, flush=True)


def _decode_to(path: str, pcm: Any, alive: Any) -> dict[str, Any]:
    """Writes int16 PCM; ``alive()`` winds up a watchdog that works even where a decoder never returns to Python."""
    alive()
    samples, full_scale, peak, digest = 0, 0, 0.0, hashlib.md5(usedforsecurity=False)
    for block in decode_blocks(path):
        size = np.abs(block)
        samples, peak = samples + block.size, max(peak, float(size.max()))
        full_scale += int(np.count_nonzero(size >= _FULL_SCALE))
        pcm.write(np.clip(np.rint(block * 32768.0), -32768, 32767).astype("<i2").tobytes())
        alive()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            alive()
    return {"samples": samples, "md5": digest.hexdigest(), "peak": peak, "full_scale": full_scale}


# Run by the file's path, a decoding process does without the package's imports (torch alone takes 2 s). Processes of
# our own and not a pool: the one that crashes tells which file did it, and the user's main module is not run again.
_DECODER_COMMAND = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['_serve']()", __file__]


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
