"""Finding audio files and decoding them to 16 kHz mono.

Corrupt is a file that a decoder refuses, that has NaN or infinite samples, or that holds clearly less audio (1 % and a
quarter of a second) than its header states, in formats that state a length: WAV, AIFF, AU, W64, FLAC, MP4, Matroska,
ASF. The sizes by which streaming WAV writers mean "unknown" are no fault. Ogg, MP3, AAC and G.722 state none or an
estimate, and their pages and frames stand alone: a cut file is a shorter file. Memory never follows a header.

This file also runs by its path, as a decoding process (``serve``): it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 16000
_SUFFIXES = (
    ".wav .wave .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .sph .g722 .m4a .mp4 .mov .mkv .mka "
    ".webm .aac .wma .wv .amr"
)
AUDIO_SUFFIXES = frozenset(_SUFFIXES.split())
_BLOCK_VALUES = 1 << 18  # samples x channels read at a time: 1 MiB of float32
_FULL_SCALE = 0.9999
_STALL_SECONDS = 120.0  # a decoder that yields nothing for so long hangs
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
class AudioFile:
    """One audio file: where it is, its name relative to the source, and labels for splits and reports."""

    path: str
    name: str
    kind: str = ""
    group: str = ""


def find_audio(source: str | os.PathLike) -> list[AudioFile]:
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


def _entry(root: Path, relative: str) -> AudioFile:
    # A name that is no UTF-8 must still be printable in reports; the path keeps its bytes.
    name = os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")
    return AudioFile(os.path.abspath(root / relative), name, group=name.rpartition("/")[0])


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


def _read_manifest(path: Path) -> list[AudioFile]:
    root_line, *lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    root_line = root_line.strip()
    if not root_line or "\0" in root_line:
        raise ValueError(f"{path}, line 1: expected the root folder of the files, got {root_line[:80]!r}")
    if not (path.parent / root_line).is_dir():
        raise FileNotFoundError(
            f"{path}, line 1: expected the root folder of the files, as in fairseq manifests, got {root_line[:80]!r}"
        )
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


def serve(
    begin: Callable[[], Callable[[Any, Any, Any], dict[str, Any]]] = lambda: _decode_to, who: str = "the decoder"
) -> None:
    """A decoding process: [audio path, PCM path] comes in, a result goes out, each a line of JSON.

    Args:
        begin: Called once in the process; gives what decodes a path to an open file, as ``_decode_to`` does.
        who: It is, in the reason of what no ``AudioError`` explains.
    """
    import faulthandler
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end closes our stdin
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    decode = begin()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        path, pcm_path = json.loads(line)
        try:
            with open(pcm_path, "wb") as pcm:
                result = decode(path, pcm, lambda: faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True))
        except AudioError as error:
            result = {"reason": error.reason}
        except Exception as error:  # decoders raise all sorts, and one file must not stop the pass
            result = {"reason": f"{type(error).__name__} in {who}"}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=replies, flush=True)


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as little-endian int16, clipped."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")


def write_pcm16(blocks: Iterable[np.ndarray], pcm: Any, alive: Any, digest: Any = None) -> dict[str, Any]:
    """Writes blocks of float samples as int16 and tells of them: ``samples``, ``peak``, ``full_scale``.

    Args:
        blocks: (s,) each, full scale 1.
        pcm: Open file.
        alive: Called after each block.
        digest: A hashlib object, updated with what is written.
    """
    samples, full_scale, peak = 0, 0, 0.0
    for block in blocks:
        size = np.abs(block)
        samples, peak = samples + block.size, max(peak, float(size.max(initial=0.0)))
        full_scale += int(np.count_nonzero(size >= _FULL_SCALE))
        written = to_pcm16(block).tobytes()
        if digest is not None:
            digest.update(written)
        pcm.write(written)
        alive()
    return {"samples": samples, "peak": peak, "full_scale": full_scale}


def _decode_to(path: str, pcm: Any, alive: Any) -> dict[str, Any]:
    """Writes int16 PCM; ``alive()`` winds up a watchdog that works even where a decoder never returns to Python."""
    alive()
    result, digest = write_pcm16(decode_blocks(path), pcm, alive), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            alive()
    return {**result, "md5": digest.hexdigest()}
