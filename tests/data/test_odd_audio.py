"""Audio files whose header is wrong, or that have several pieces: what FFmpeg reads is read.

Every file is made here, and its length is in the table. Where the ffmpeg program is installed, it is asked too.
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from policy import CODEC_SECONDS

from mae_ast_fast.data import prepare
from mae_ast_fast.data.audio import AudioError, HeaderWarning, decode

av, soundfile, soxr = (pytest.importorskip(name) for name in ("av", "soundfile", "soxr"))
RATE = 16000
RNG = np.random.default_rng(0)
FIRST = (0.3 * np.sin(np.arange(RATE) * 0.17) + 0.01 * RNG.standard_normal(RATE)).astype(np.float32)
SECOND = (0.2 * np.sin(np.arange(RATE) * 0.29) + 0.01 * RNG.standard_normal(RATE)).astype(np.float32)
PCM = (FIRST * 32767).astype("<i2").tobytes()
FORMAT = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
ID3 = b"ID3\4\0\0\0\0\0\x23TSSE\0\0\0\x0f\0\0\3Lavf59.27.100\0" + bytes(10)
LIST = b"INFOISFT\4\0\0\0abcd"


def riff(
    *chunks: tuple[bytes, bytes] | tuple[bytes, bytes, int], size: int | None = None, form: bytes = b"RIFF"
) -> bytes:
    """A WAV file of chunks (name, content), with another size than that of the content if there is a third."""
    body = b"WAVE"
    for name, content, *stated in chunks:
        body += name + struct.pack("<I", stated[0] if stated else len(content)) + content
    return form + struct.pack("<I", len(body) if size is None else size) + body


def byte_rate(value: int) -> bytes:
    return riff((b"fmt ", FORMAT[:8] + struct.pack("<I", value) + FORMAT[12:]), (b"data", PCM))


def written(wave: np.ndarray, kind: str, rate: int = RATE, **options: str) -> bytes:
    """The bytes of a file that libsndfile or, for ADTS, FFmpeg writes."""
    file = io.BytesIO()
    if kind == "ADTS":
        with av.open(file, "w", format="adts") as container:
            stream = container.add_stream("aac", rate=rate, layout="mono")
            resampler = av.AudioResampler(stream.format.name, "mono", rate, 1024)
            frame = av.AudioFrame.from_ndarray(np.rint(wave * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate = rate
            for out in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(stream.encode(out))
            container.mux(stream.encode(None))
    else:
        soundfile.write(file, wave, rate, format=kind, **options)
    return file.getvalue()


def replaced(content: bytes, offset: int, number: bytes, after: bytes = b"") -> bytes:
    """A file with some bytes replaced, ``offset`` bytes behind the start of ``after``."""
    start = content.index(after) + offset
    return content[:start] + number + content[start + len(number) :]


def two_streams(default: int, channels: tuple[int, int] = (1, 1)) -> bytes:
    """A Matroska file with two tracks, FIRST and SECOND, of which one is marked as default, or none (-1)."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = []
        for i, count in enumerate(channels):
            stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono" if count == 1 else "stereo")
            stream.disposition = av.stream.Disposition.default if i == default else av.stream.Disposition(0)
            streams.append(stream)
        for stream, wave, count in zip(streams, (FIRST, SECOND), channels, strict=True):
            pcm = np.rint(wave * 32767).astype(np.int16).repeat(count)[None]
            frame = av.AudioFrame.from_ndarray(pcm, "s16", "mono" if count == 1 else "stereo")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return file.getvalue()


def xing(frames: int) -> bytes:
    """An MP3 file whose header states a number of frames."""
    content = written(FIRST, "MP3")
    tag = b"Info" if b"Info" in content else b"Xing"
    return replaced(content, 8, struct.pack(">I", frames), tag)


OPUS = {"kind": "OGG", "subtype": "OPUS"}
W64_SIZE = struct.pack("<Q", 10_000_000)
# Name -> content, seconds, and whether header and content differ by more than 1 %.
FILES: dict[str, tuple[Callable[[], bytes], float, bool]] = {
    "right.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM)), 1.0, False),
    "byte_rate_double.wav": (lambda: byte_rate(4 * RATE), 1.0, True),
    "byte_rate_in_bits.wav": (lambda: byte_rate(16 * RATE), 1.0, True),
    "byte_rate_zero.wav": (lambda: byte_rate(0), 1.0, True),
    "byte_rate_huge.wav": (lambda: byte_rate(0x7FFF0000), 1.0, True),
    "riff_size_double.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM), size=2 * len(PCM)), 1.0, True),
    "riff_size_zero.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM), size=0), 1.0, False),
    "cut_list.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM), (b"LIST", LIST, 4000)), 1.0, True),
    "sizes_zero.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM, 0), size=0), 1.0, True),
    "data_size_zero.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM, 0)), 1.0, True),
    "sizes_unknown.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM, 2**32 - 1), size=2**32 - 1), 1.0, False),
    "fact_wrong.wav": (lambda: riff((b"fmt ", FORMAT), (b"fact", b"\7\0\0\0"), (b"data", PCM)), 1.0, False),
    "tag_behind.wav": (lambda: riff((b"fmt ", FORMAT), (b"data", PCM)) + b"TAG" + bytes(125), 1.0, False),
    "size_unknown.au": (lambda: replaced(written(FIRST, "AU"), 8, b"\xff" * 4), 1.0, False),
    "size_zero.au": (lambda: replaced(written(FIRST, "AU"), 8, bytes(4)), 1.0, False),
    "form_size_large.aiff": (lambda: replaced(written(FIRST, "AIFF"), 4, b"\0\7\0\0"), 1.0, True),
    "frames_zero.aiff": (lambda: replaced(written(FIRST, "AIFF"), 10, bytes(4), b"COMM"), 1.0, False),
    "riff_size_large.w64": (lambda: replaced(written(FIRST, "W64"), 16, W64_SIZE), 1.0, True),
    "riff_size_large.rf64.wav": (lambda: replaced(written(FIRST, "RF64"), 8, W64_SIZE, b"ds64"), 1.0, True),
    "data_size_small.caf": (lambda: replaced(written(FIRST, "CAF"), 4, struct.pack(">q", 4), b"data"), 1.0, True),
    "data_size_unknown.caf": (lambda: replaced(written(FIRST, "CAF"), 4, b"\xff" * 8, b"data"), 1.0, False),
    "total_zero.flac": (lambda: replaced(written(FIRST, "FLAC"), 22, bytes(4)), 1.0, False),
    "two_files.flac": (lambda: written(FIRST, "FLAC") + written(SECOND, "FLAC"), 2.0, True),
    "two_links.ogg": (lambda: written(FIRST, "OGG") + written(SECOND, "OGG"), 2.0, True),
    "three_links.ogg": (lambda: written(FIRST, "OGG") + 2 * written(SECOND, "OGG"), 3.0, True),
    "two_links.opus": (lambda: written(FIRST, **OPUS) + written(SECOND, **OPUS), 2.0, True),
    "links_of_two_rates.ogg": (lambda: written(FIRST, "OGG") + written(SECOND, "OGG", 8000), 3.0, True),
    "links_mono_stereo.ogg": (lambda: written(FIRST, "OGG") + written(SECOND.reshape(-1, 2), "OGG"), 1.5, True),
    "two_files.mp3": (lambda: written(FIRST, "MP3") + written(SECOND, "MP3"), 2.0, True),
    "tag_between_two.mp3": (lambda: written(FIRST, "MP3") + ID3 + written(SECOND, "MP3"), 2.0, True),
    "files_of_two_rates.mp3": (lambda: written(FIRST, "MP3") + written(SECOND, "MP3", 24000), 1.667, True),
    "frames_too_few.mp3": (lambda: xing(5), 1.0, True),
    "frames_too_many.mp3": (lambda: xing(100_000), 1.0, False),
    "two_files.aac": (lambda: written(FIRST, "ADTS") + written(SECOND, "ADTS"), 2.0, False),
    "files_of_two_rates.aac": (lambda: written(FIRST, "ADTS") + written(SECOND, "ADTS", 8000), 3.0, False),
    "two_tracks.mka": (lambda: two_streams(0), 1.0, False),
    "second_track_is_default.mka": (lambda: two_streams(1), 1.0, False),
    "second_track_is_stereo.mka": (lambda: two_streams(-1, (1, 2)), 1.0, False),
}
PIECES = {name for name, (_, seconds, _) in FILES.items() if seconds > 1}
CODEC_PIECES = 0.3  # nothing says where the second piece of MP3 or AAC begins: each has its codec's delay and padding
JOINED = 0.1  # seconds around a joint, in which decoders differ


def oracle(path: Path, folder: Path) -> np.ndarray:
    """What the ffmpeg program reads, at 16 kHz, channels averaged."""
    target = folder / "oracle.wav"
    command = ["ffmpeg", "-v", "error", "-y", "-i", path, "-map_metadata", "-1", "-c:a", "pcm_f32le", target]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    wave, rate = soundfile.read(target, dtype="float32", always_2d=True)
    return soxr.resample(wave.mean(1), rate, RATE, quality="HQ")


def quiet(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HeaderWarning)
        return decode(path)


@pytest.mark.parametrize("name", FILES)
def test_decode_odd_file_reads_all_and_says_once_what_differs(name, tmp_path):
    make, seconds, differs = FILES[name]
    (tmp_path / name).write_bytes(make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wave = decode(tmp_path / name)
    assert abs(len(wave) / RATE - seconds) <= (CODEC_PIECES if name.endswith((".mp3", ".aac")) else CODEC_SECONDS)
    notes = [str(warning.message) for warning in caught if warning.category is HeaderWarning]
    assert len(notes) == differs and all(note.startswith(f"{tmp_path / name}: ") for note in notes)
    # The sound is there: that of the first piece, and behind it that of the second.
    for piece in (wave[:RATE], wave[-RATE:] if name in PIECES else wave):
        assert 0.1 <= np.sqrt(np.mean(piece**2)) <= 0.25


@pytest.mark.parametrize("name", FILES)
def test_decode_odd_file_equals_ffmpeg(name, tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("the ffmpeg program is not installed; the table of expected lengths is tested without it")
    path = tmp_path / name
    path.write_bytes(FILES[name][0]())
    wave, expected = quiet(path), oracle(path, tmp_path)
    if name == "two_files.flac":  # FFmpeg loses a frame at the joint
        assert len(wave) == 2 * RATE > len(expected)
        return
    assert abs(len(wave) - len(expected)) <= CODEC_SECONDS * RATE
    error = np.abs(wave[: len(expected)] - expected[: len(wave)])
    margin = round(JOINED * RATE) if name in PIECES else 0
    assert error[: RATE - margin].max() <= 1e-3
    if margin and "rates" not in name and "stereo" not in name:
        assert error[RATE + margin : 2 * RATE - margin].max() <= 1e-3


@pytest.mark.parametrize("name, tail", [("a.wav", b""), ("a.au", b""), ("a.w64", b""), ("a.flac", b"")])
def test_decode_file_cut_in_its_data_is_still_refused(name, tail, tmp_path):
    soundfile.write(tmp_path / name, np.tile(FIRST, 3), RATE)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2] + tail)
    with pytest.raises(AudioError) as raised:
        decode(tmp_path / name)
    assert raised.value.reason in ("truncated", "corrupt")


def test_decode_whole_header_without_audio_gives_no_samples(tmp_path):
    for kind in ("WAV", "AU", "AIFF", "CAF"):
        (tmp_path / f"a.{kind}").write_bytes(written(FIRST[:0], kind))
        assert quiet(tmp_path / f"a.{kind}").size == 0, kind


@pytest.mark.parametrize("rate", [RATE, 8000])
def test_decode_cut_second_link_keeps_the_first(rate, tmp_path):
    first, second = written(FIRST, "OGG"), written(np.tile(SECOND, 4), "OGG", rate)
    (tmp_path / "a.ogg").write_bytes(first + second[: len(second) // 2])
    seconds, last = len(quiet(tmp_path / "a.ogg")) / RATE, 4 * RATE / rate
    assert 1.0 + last / 4 < seconds < 1.0 + last * 3 / 4


def test_decode_garbage_between_links_is_passed_over(tmp_path):
    (tmp_path / "a.ogg").write_bytes(written(FIRST, "OGG") + bytes(700) + b"Ogg" + written(SECOND, "OGG", 8000))
    assert abs(len(quiet(tmp_path / "a.ogg")) / RATE - 3.0) <= CODEC_SECONDS


def test_decode_ordinary_files_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, options in {
            "a.wav": {},
            "b.wav": {"subtype": "FLOAT"},
            "c.wav": {"subtype": "IMA_ADPCM"},
            "d.wav": {"subtype": "MS_ADPCM"},
            "a.mp3": {},
            "a.ogg": {},
            "b.ogg": {"subtype": "OPUS"},
            "a.flac": {},
            "a.aiff": {},
            "a.caf": {},
        }.items():
            soundfile.write(tmp_path / name, FIRST, RATE, **options)
            assert abs(len(decode(tmp_path / name)) / RATE - 1.0) <= 0.07, name


def test_prepare_reports_files_whose_header_differs(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("right.wav", "byte_rate_double.wav", "two_links.ogg", "sizes_zero.wav"):
        (source / name).write_bytes(FILES[name][0]())
    report = prepare.prepare_shards(source, tmp_path / "shards", workers=1)
    names = ["byte_rate_double.wav", "sizes_zero.wav", "two_links.ogg"]
    assert report["header"] == {"count": 3, "names": names} and not report["skipped"]
    assert abs(report["hours"] * 3600 - 5.0) <= 0.1
    text = "3 whose header and content differ, with all of the content read: " + ", ".join(names)
    assert capsys.readouterr().err.count(text) == 1


def test_command_prints_a_header_warning_on_one_line(tmp_path):
    code = (
        "import sys, warnings; from mae_ast_fast.cli import _format_warning; from mae_ast_fast.data import audio;"
        "warnings.formatwarning = _format_warning; audio.decode(sys.argv[1])"
    )
    (tmp_path / "a.wav").write_bytes(byte_rate(4 * RATE))
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.wav"], capture_output=True, text=True, check=True)
    expected = "the header differs from the content: Bytes/sec is 64000, not 32000"
    assert run.stderr == f"{tmp_path / 'a.wav'}: {expected}\n"
