"""Find audio files and decode them to 16 kHz mono.

A file is corrupt if a decoder refuses it, if it has NaN or infinite samples, or if it holds clearly less audio (1 % and
a quarter of a second) than its header states. The last check applies to formats that state a length: WAV, AIFF, AU,
W64, FLAC, MP4, Matroska, ASF. The sizes with which streaming WAV writers mean "unknown" are accepted. Ogg, MP3, AAC and
G.722 state no length or an estimate, and their pages and frames are independent: a truncated file is a shorter file.
Memory use never depends on a header.

This file is also run by its path, as a decoding process (``serve``). It therefore imports nothing from the package.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
import warnings
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
_BLOCK_VALUES = 1 << 18  # samples x channels per read: 1 MiB of float32
_FULL_SCALE = 0.9999
_STALL_SECONDS = 120.0  # a decoder that yields nothing for this long counts as hung
# FFmpeg also reads formats that open other files, such as playlists: only containers of audio are allowed.
_AV_FORMATS = "mov,matroska,asf,avi,aac,flac,ogg,mp3,wav,w64,aiff,au,caf,amr,wv,g722,mpegts"
_AV_STATES_LENGTH = {"mov", "matroska", "asf", "flac", "wav", "w64", "aiff", "au"}


# Names, in libsndfile's log, of the size of the audio: WAV, RF64 and W64, AIFF, SVX, AU.
_DATA_SIZES = {"data", "data size", "ssnd", "body"}


class HeaderWarning(UserWarning):
    """Header and content of a file differ, and all of its content was read."""


class AudioError(ValueError):
    """A file gives no usable audio.

    Attributes:
        path: The file.
        reason: One of a few short phrases, so that reasons can be counted.
    """

    def __init__(self, path: str | os.PathLike, reason: str, detail: object = "") -> None:
        detail = " ".join(str(detail).split())
        super().__init__(f"{os.fspath(path)}: {reason}" + (f" ({detail})" if detail else ""))
        self.path, self.reason = os.fspath(path), reason


@dataclass(frozen=True)
class AudioFile:
    """One audio file.

    Attributes:
        path: Absolute path.
        name: Path relative to the source, printable.
        kind: Label for reports, such as speech or music; empty if unknown.
        group: Label for splits, such as a folder; empty if there is none.
    """

    path: str
    name: str
    kind: str = ""
    group: str = ""


def find_audio(source: str | os.PathLike) -> list[AudioFile]:
    """The audio files of a folder (all levels, sorted, without hidden ones), of a fairseq ``.tsv``, or a single file.

    The first line of a manifest is the root; a relative root starts at the folder of the manifest. Each later line is
    ``path<TAB>samples``. Its sample counts are not used: every file is measured.

    Raises:
        FileNotFoundError: The source, or the root of a manifest, does not exist.
        ValueError: The folder holds no audio file, or a line of the manifest is malformed (the message has its number).
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
    # Names that are not UTF-8 must be printable in reports; the path keeps their bytes.
    name = os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")
    return AudioFile(os.path.abspath(root / relative), name, group=name.rpartition("/")[0])


def _walk(root: Path) -> Iterator[str]:
    """Paths, relative to ``root``, of its audio files."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder already walked
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        for file in files:
            path = os.path.join(folder, file)
            if not file.startswith(".") and Path(file).suffix.lower() in AUDIO_SUFFIXES and os.path.isfile(path):
                yield os.path.relpath(path, root)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Text of a table: UTF-8, or UTF-16 with a byte order mark, which spreadsheets and Windows' tools write.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16", "strict") if is_utf16 else content.decode("utf-8-sig", errors)


def _read_manifest(path: Path) -> list[AudioFile]:
    try:
        root_line, *lines = decode_text(path.read_bytes(), "surrogateescape").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line 1: not in UTF-8 or UTF-16 ({error})") from None
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
        if relative and "\0" not in relative and samples.strip().isdecimal():
            entries.append(_entry(path.parent / root_line, relative))
        elif line.strip():
            raise ValueError(f"{path}, line {number}: expected path<TAB>samples, got {line[:80]!r}")
    if not entries:
        raise ValueError(f"{path} lists no file")
    return entries


def decode(path: str | os.PathLike, max_seconds: float | None = None) -> np.ndarray:
    """The whole file, or its first ``max_seconds``, as float32 (S,): 16 kHz, channels averaged, in [-1, 1].

    Raises:
        AudioError: The file gives no usable audio; its ``reason`` says why.
    """
    max_samples = None if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    blocks, num_samples = [np.zeros(0, np.float32)], 0
    for block in decode_blocks(path):
        blocks.append(block)
        num_samples += block.size
        if max_samples is not None and num_samples >= max_samples:
            break
    return np.concatenate(blocks)[:max_samples]


def decode_blocks(path: str | os.PathLike, notes: list[str] | None = None) -> Iterator[np.ndarray]:
    """Consecutive blocks of float32 (s,), 16 kHz mono, of bounded size for files of any length.

    libsndfile decodes, and FFmpeg (PyAV) where libsndfile cannot read a file, or only a part of it. soxr (HQ) resamples
    rates of 1 kHz to 768 kHz.

    Args:
        path: The file.
        notes: Gets a sentence where header and content differ and the content was read. None: a ``HeaderWarning``.

    Raises:
        AudioError: The file gives no usable audio. The valid blocks before the fault are yielded first.
    """
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise AudioError(path, "no regular file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise AudioError(path, "empty file")
    except OSError as error:
        raise AudioError(path, "unreadable", error.strerror) from error
    found: list[str] = []
    rate, resampler = 0, None
    for block_rate, block in _native_blocks(path, found):
        if block_rate != rate:  # at the start, and where a piece of another rate follows
            yield from _last_samples(resampler)
            rate, resampler = block_rate, _resampler(path, block_rate)
        channels = block.shape[1]
        mono = block[:, 0] if channels == 1 else block @ np.full(channels, 1.0 / channels, np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(path, "NaN or infinite samples")
        if resampler is not None:
            mono = resampler.resample_chunk(mono)
        if mono.size:
            yield mono
    yield from _last_samples(resampler)
    if notes is not None:
        notes += found
    elif found:
        warnings.warn(f"{path}: {'; '.join(found)}", HeaderWarning, stacklevel=2)


def _resampler(path: str, rate: int) -> Any:
    """A ``soxr.ResampleStream`` from ``rate`` to 16 kHz; None if the rate is that.

    Raises:
        AudioError: The rate is outside what soxr takes.
    """
    import soxr

    if not 1000 <= rate <= 768000:
        raise AudioError(path, "sample rate outside 1 kHz - 768 kHz", f"{rate} Hz")
    return None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def _last_samples(resampler: Any) -> Iterator[np.ndarray]:
    """What a resampler still holds, if there is one and it holds something."""
    if resampler is not None and (tail := resampler.resample_chunk(np.zeros(0, np.float32), last=True)).size:
        yield tail


def _native_blocks(path: str, notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 (n, channels)) from libsndfile, or from FFmpeg where libsndfile gives nothing or only a part."""
    import soundfile

    soundfile_error, stated, seconds, has_more = "", 0.0, 0.0, False
    is_g722 = path.lower().endswith(".g722")  # it has no header by which libsndfile could recognise it
    try:
        parts = [] if is_g722 else _parts(path)
        for part in parts:
            with soundfile.SoundFile(part) as file:
                stated = stated or file.frames / file.samplerate
                has_more = _has_more(path, file, num_parts=len(parts))
                for rate, block in () if has_more else _soundfile_blocks(path, file, notes):
                    seconds += len(block) / rate
                    yield rate, block
    except soundfile.LibsndfileError as error:
        soundfile_error = error.error_string
        if seconds:
            raise AudioError(path, "corrupt", soundfile_error) from error
    if not seconds:
        is_header_alone = not (has_more or soundfile_error or is_g722)
        try:
            for rate, block in _av_blocks(path, soundfile_error):
                seconds += len(block) / rate
                yield rate, block
        except AudioError:
            if seconds or not is_header_alone:
                raise
    if not soundfile_error and seconds > stated * 1.01 + 0.25 and not is_g722:
        notes.append(f"the header states {stated:.1f} s, the file holds {seconds:.1f} s")


class _Part(io.RawIOBase):
    """A part of a file as a file, read only, with some bytes at its start replaced.

    Args:
        path: The file.
        start: First byte of the part.
        stop: End of the part.
        head: What its first bytes are read as.
    """

    def __init__(self, path: str, start: int, stop: int, head: bytes = b"") -> None:
        self.file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self.start, self.stop, self.head = start, stop, head
        self.file.seek(start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: self.start, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.stop}[whence]
        return self.file.seek(max(self.start, origin + offset)) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def readinto(self, buffer: Any) -> int:
        position = self.tell()
        content = self.file.read(max(0, min(len(buffer), self.stop - self.start - position)))
        replaced = self.head[position : position + len(content)]
        content = replaced + content[len(replaced) :]
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def _parts(path: str) -> list[Any]:
    """What libsndfile is to open, one after another: the path, the links of a chained Ogg file, or joined FLAC files.

    An AU file of size 0, as of a writer that did not finish its header, gets the size that means "unknown".
    """
    with open(path, "rb") as file:
        head = file.read(28)
        num_bytes = file.seek(0, os.SEEK_END)
        if head[:4] == b".snd" and head[8:12] == bytes(4):
            return [_Part(path, 0, num_bytes, head[:8] + b"\xff" * 4)]
        starts = _ogg_links(file) if head[:4] == b"OggS" else []
        if head[:4] == b"fLaC":
            starts = _find_all(file, b"fLaC\0\0\0\x22")  # with the start of STREAMINFO, of 34 bytes
    if len(starts) > 1:
        return [_Part(path, start, stop) for start, stop in itertools.pairwise([*starts, num_bytes])]
    return [os.fsencode(path) if os.name == "posix" else path]


def _ogg_links(file: Any) -> list[int]:
    """First byte of each link of an Ogg file: where streams begin after pages of others (RFC 3533)."""
    starts, position, was_first_page = [], 0, False
    while len(page := _read_at(file, position, 282)) >= 27:
        if page[:4] != b"OggS":  # damaged: go on at the next page
            found = page.find(b"OggS", 1)
            position += found if found > 0 else max(1, len(page) - 3)
            continue
        is_first_page = bool(page[5] & 2)
        if is_first_page and not was_first_page:
            starts.append(position)
        was_first_page = is_first_page
        position += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return starts


def _read_at(file: Any, position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)


def _has_more(path: str, file: Any, *, num_parts: int) -> bool:
    """Whether FFmpeg is to read a file, because libsndfile stops after the first of several pieces.

    The links of an Ogg file that differ in rate or channels are left to libsndfile: FFmpeg 8 refuses them.
    """
    if file.format == "OGG":
        return num_parts > 1 and _demuxed_seconds(path) > 0
    return file.format == "MP3" and _demuxed_seconds(path) > file.frames / file.samplerate * 1.01 + 0.25


def _find_all(file: Any, marker: bytes) -> list[int]:
    """Positions of some bytes in an open file."""
    positions, rest, start = [], b"", 0
    file.seek(0)
    while chunk := file.read(1 << 20):
        content = rest + chunk
        positions += [start - len(rest) + match.start() for match in re.finditer(re.escape(marker), content)]
        start += len(chunk)
        rest = content[len(content) - len(marker) + 1 :]
    return positions


def _soundfile_blocks(path: str, file: Any, notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of an open ``soundfile.SoundFile``."""
    block_samples, num_samples = max(1, _BLOCK_VALUES // file.channels), 0
    while len(block := file.read(block_samples, dtype="float32", always_2d=True)):
        yield file.samplerate, block
        num_samples += len(block)
    if file.format in ("OGG", "MP3"):
        return
    # libsndfile limits the length of uncompressed audio to the data present; only its log has the header's length.
    excess, differing = _read_log(file.extra_info)
    _check_length(path, num_samples / file.samplerate, max(file.frames, excess * num_samples) / file.samplerate)
    if num_samples and differing:
        notes.append(f"the header differs from the content: {', '.join(differing)}")


def _read_log(log: str) -> tuple[float, list[str]]:
    """How many times the data that a header states are those of the file, and its other numbers that are wrong.

    Args:
        log: libsndfile's log, with lines such as ``RIFF : 96036 (should be 48014)``. A wrong rate in bytes, or a wrong
            size of the file or of a chunk without audio, does not say that audio is missing.
    """
    excess, differing = 1.0, []
    file_bytes = int(match[1]) if (match := re.search(r"^Length : (\d+)$", log, re.MULTILINE)) else 0
    for line in log.splitlines():
        if not (match := re.fullmatch(r"\s*(.+?)\s*: (\d+)(?: \(should be (\d+)\))?", line)):
            continue
        name, stated = match[1], int(match[2])
        if stated >= 0x7FFFF000:  # "unknown", of a writer that could not go back
            continue
        if name.lower() in _DATA_SIZES:
            # W64 and RF64 have no remark after a size that is larger than the file.
            actual = int(match[3]) if match[3] else min(stated, file_bytes or stated)
            excess = max(excess, stated / max(actual, 1))
        elif match[3] and not 0.99 <= stated / max(int(match[3]), 1) <= 1.01:
            differing.append(f"{name} is {stated}, not {match[3]}")
    return excess, differing


def _open_av(path: str) -> Any:
    import av

    container_format = "g722" if path.lower().endswith(".g722") else None
    return av.open(
        path, format=container_format, options={"protocol_whitelist": "file", "format_whitelist": _AV_FORMATS}
    )


def _av_stream(container: Any) -> Any:
    """The audio stream that the ffmpeg program would choose: one marked as default, then the one with most channels."""
    return max(container.streams.audio, key=lambda stream: (bool(int(stream.disposition) & 1), stream.channels))


def _demuxed_seconds(path: str) -> float:
    """Seconds of audio in all packets, undecoded; 0 if FFmpeg cannot read the file."""
    import av

    try:
        with _open_av(path) as container:
            stream = _av_stream(container)
            return float(sum(packet.duration or 0 for packet in container.demux(stream)) * stream.time_base)
    except (av.FFmpegError, ValueError, ArithmeticError, LookupError, TypeError):
        return 0.0


def _av_blocks(path: str, soundfile_error: str) -> Iterator[tuple[int, np.ndarray]]:
    import av

    try:
        with _open_av(path) as container:
            if not container.streams.audio:
                raise AudioError(path, "no audio stream")
            stream = _av_stream(container)
            rate, seconds, num_values = 0, 0.0, 0
            pending: list[np.ndarray] = []
            for frame in _av_frames(container, stream):
                block = _float_frame(frame)
                if pending and (frame.rate, block.shape[1]) != (rate, pending[0].shape[1]):  # a piece of another kind
                    yield rate, np.concatenate(pending)
                    pending, num_values = [], 0
                rate = frame.rate
                seconds += len(block) / rate
                pending.append(block)
                num_values += block.size
                if num_values >= _BLOCK_VALUES:
                    yield rate, np.concatenate(pending)
                    pending, num_values = [], 0
            if pending:
                yield rate, np.concatenate(pending)
            if container.format.name.split(",")[0] in _AV_STATES_LENGTH:
                if stream.duration is not None:
                    assert stream.time_base is not None
                    _check_length(path, seconds, float(stream.duration * stream.time_base))
                elif container.duration is not None and not container.streams.video:
                    # Matroska states the end, and the sound may begin late.
                    _check_length(path, seconds, (container.duration - max(0, container.start_time)) / av.time_base)
    except AudioError:
        raise
    except (av.FFmpegError, ValueError, ArithmeticError, LookupError, NotImplementedError) as error:
        raise AudioError(path, "corrupt", soundfile_error or error) from error


def _av_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream. In a stream of independent frames, such as MP3, a few that are none are left out.

    Raises:
        av.FFmpegError: A packet of another format, or too many packets, cannot be decoded.
    """
    import av

    is_tolerant = container.format.name in ("mp3", "aac")
    num_packets = num_wrong = 0
    for packet in container.demux(stream):
        num_packets += 1
        try:
            frames = packet.decode()
        except av.InvalidDataError:  # where files were joined: tags between the frames
            num_wrong += 1
            if not is_tolerant or num_wrong > 4 + num_packets // 50:
                raise
            continue
        yield from frames


def _float_frame(frame: Any) -> np.ndarray:
    """An ``av.AudioFrame`` as float32 (n, channels) in [-1, 1]."""
    values = frame.to_ndarray()  # (channels, n) planar, (1, n * channels) packed
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128.0) / 128.0
    scale = float(1 << (8 * values.dtype.itemsize - 1)) if values.dtype.kind == "i" else 1.0
    return (values / scale).astype(np.float32)


def _check_length(path: str, seconds: float, stated_seconds: float) -> None:
    if seconds * 1.01 + 0.25 < stated_seconds:
        raise AudioError(path, "truncated", f"the header states {stated_seconds:.1f} s, the file holds {seconds:.1f} s")


def serve(
    make_decode: Callable[[], Callable[[Any, Any, Any], dict[str, Any]]] = lambda: _decode_to,
    name: str = "the decoder",
) -> None:
    """Run a decoding process: read [audio path, PCM path], reply with a result, each one line of JSON.

    Args:
        make_decode: Called once in the process; returns a function with the arguments and result of ``_decode_to``.
        name: Of the decoder, for the reason of errors that are not an ``AudioError``.
    """
    import faulthandler
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; its end closes our stdin
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of a library must not mix with the replies
    decode = make_decode()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        path, pcm_path = json.loads(line)
        try:
            with open(pcm_path, "wb") as pcm:
                result = decode(path, pcm, lambda: faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True))
        except AudioError as error:
            result = {"reason": error.reason}
        except Exception as error:  # decoders raise errors of many types, and one file must not stop the process
            result = {"reason": f"{type(error).__name__} in {name}"}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=replies, flush=True)


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as little-endian int16; values outside are clipped."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")


def write_pcm16(blocks: Iterable[np.ndarray], pcm: Any, heartbeat: Any, digest: Any = None) -> dict[str, Any]:
    """Write blocks of float samples as int16.

    Args:
        blocks: float32 (s,) each, in [-1, 1].
        pcm: Open binary file.
        heartbeat: Called without arguments after each block.
        digest: A hashlib object, updated with the bytes written.

    Returns:
        ``samples``: their number; ``peak``: largest magnitude; ``full_scale``: number of samples of magnitude 0.9999 or
        more.
    """
    num_samples, num_full_scale, peak = 0, 0, 0.0
    for block in blocks:
        magnitude = np.abs(block)
        num_samples, peak = num_samples + block.size, max(peak, float(magnitude.max(initial=0.0)))
        num_full_scale += int(np.count_nonzero(magnitude >= _FULL_SCALE))
        content = to_pcm16(block).tobytes()
        if digest is not None:
            digest.update(content)
        pcm.write(content)
        heartbeat()
    return {"samples": num_samples, "peak": peak, "full_scale": num_full_scale}


def _decode_to(path: str, pcm: Any, heartbeat: Any) -> dict[str, Any]:
    """Decode ``path`` into the open file ``pcm`` as int16; ``md5`` of the result is that of the file.

    ``heartbeat`` restarts a watchdog, which works even if a decoder never returns to Python.
    """
    heartbeat()
    notes: list[str] = []
    result, digest = write_pcm16(decode_blocks(path, notes), pcm, heartbeat), hashlib.md5(usedforsecurity=False)
    if notes:
        result["note"] = "; ".join(notes)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            heartbeat()
    return {**result, "md5": digest.hexdigest()}
