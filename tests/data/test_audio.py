"""audio.py and splits.py: decoding of all formats and of bad files, search for files, splits."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import CODEC_RMS, CODEC_SECONDS, RESAMPLE_ABS, TONE_HZ

from mae_ast_fast.data import audio
from mae_ast_fast.data.audio import AudioError, AudioFile, decode, find_audio
from mae_ast_fast.data.splits import split

av, soundfile, soxr = (pytest.importorskip(name) for name in ("av", "soundfile", "soxr"))
RATE = 16000
AUDIO = Path(__file__).parent.parent / "audio"


def tone(seconds=1.5, hz=440.0, rate=RATE, amplitude=0.3):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def frequency(wave):
    """Strongest frequency in the middle of a 16 kHz wave, in Hz."""
    middle = wave[len(wave) // 10 : -len(wave) // 10]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 2 * RATE))
    return np.argmax(spectrum) * RATE / (2 * RATE)


def encode(path, wave, codec, *, rate=RATE, container_format=None, video=False):
    """Write ``wave`` with PyAV, for formats that libsndfile does not write."""
    options = {"movflags": "faststart"} if path.name.startswith("fast") else {}
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if codec == "wmav2":
            stream.bit_rate = 64000
        if video:
            picture = container.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
            for _ in range(30):
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        pcm = np.rint(wave * 32767).astype(np.int16)[None]
        resampler = av.AudioResampler(stream.format.name, "mono", rate)
        size = stream.frame_size or 1024
        for start in range(0, pcm.shape[1], size):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[:, start : start + size]), "s16", "mono")
            frame.sample_rate, frame.pts = rate, start
            for out in resampler.resample(frame):
                container.mux(stream.encode(out))
        container.mux(stream.encode(None))


def error_reason(path):
    """The reason for which ``decode`` refuses a file."""
    with pytest.raises(AudioError) as caught:
        decode(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return caught.value.reason


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "name,options",
    [
        ("a.wav", {}),
        ("a.WAV", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.wav", {"subtype": "PCM_U8"}),
        ("a.wav", {"subtype": "ULAW"}),
        ("a.wav", {"format": "W64"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
        ("a.aiff", {}),
        ("a.au", {}),
        ("a.caf", {}),
    ],
)
def test_decode_libsndfile_format_keeps_tone(tmp_path, name, options):
    path = tmp_path / name
    soundfile.write(path, tone(), RATE, **options)
    wave = decode(path)
    assert wave.dtype == np.float32 and wave.shape == (24000,)
    assert abs(frequency(wave) - 440) <= TONE_HZ
    assert np.sqrt(np.mean((wave - tone()) ** 2)) <= CODEC_RMS


@pytest.mark.parametrize(
    "name,codec,container_format,video",
    [
        ("a.g722", "g722", "g722", False),
        ("a.m4a", "aac", "mp4", False),
        ("a.mp4", "aac", None, False),
        ("film.mp4", "aac", None, True),
        ("film.mkv", "flac", None, True),
        ("a.mkv", "flac", None, False),
        ("a.webm", "libopus", None, False),
        ("a.wma", "wmav2", "asf", False),
        ("a.aac", "aac", "adts", False),
        ("a.mov", "pcm_s16le", None, False),
        ("a.mka", "pcm_s24le", "matroska", False),
    ],
)
def test_decode_ffmpeg_format_keeps_tone(tmp_path, *, name, codec, container_format, video):
    path = tmp_path / name
    rate = 48000 if codec == "libopus" else RATE
    encode(path, tone(rate=rate), codec, rate=rate, container_format=container_format, video=video)
    wave = decode(path)
    assert abs(len(wave) / RATE - 1.5) <= CODEC_SECONDS
    assert abs(frequency(wave) - 440) <= TONE_HZ
    assert abs(np.sqrt(np.mean(wave**2)) - 0.3 / np.sqrt(2)) <= CODEC_RMS


def test_decode_int16_at_16_khz_is_exact(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, 70000).astype(np.int16)
    pcm[:4] = -32768, 32767, -1, 1
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, pcm, RATE)
    encode(tmp_path / "a.mkv", pcm / 32767, "flac")
    assert np.array_equal(decode(tmp_path / "a.wav") * 32768, pcm)
    assert np.array_equal(decode(tmp_path / "a.mkv") * 32768, pcm)
    assert np.array_equal(audio.to_pcm16(decode(tmp_path / "a.flac")), pcm)


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 44100, 48000, 96000, 768000])
def test_decode_blocks_resampled_keep_frequency_and_length(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 10001)  # many blocks of an odd size
    wave = tone(hz=200.0, rate=rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave / 2], 1), rate, "FLOAT")
    blocks = list(audio.decode_blocks(tmp_path / "a.wav"))
    resampled = np.concatenate(blocks)
    assert abs(len(resampled) - len(wave) * RATE / rate) <= 1 and len(blocks) > 1
    assert abs(frequency(resampled) - 200) <= TONE_HZ
    expected = soxr.resample(wave * 0.75, rate, RATE, quality="HQ")
    assert np.abs(resampled[: len(expected)] - expected[: len(resampled)]).max() <= RESAMPLE_ABS
    assert np.array_equal(decode(tmp_path / "a.wav", max_seconds=0.5), resampled[:8000])


@pytest.mark.parametrize("channels", [2, 6])
def test_decode_averages_channels(tmp_path, channels):
    wave = np.random.default_rng(1).uniform(-0.5, 0.5, (9000, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE, "FLOAT")
    assert np.abs(decode(tmp_path / "a.wav") - wave.mean(1)).max() <= RESAMPLE_ABS


def wav_bytes(*, num_samples=8000, rate=RATE, channels=1, stated_bytes=None):
    body = np.zeros(num_samples * channels, "<i2").tobytes()
    stated_bytes = len(body) if stated_bytes is None else stated_bytes
    riff = struct.pack("<4sI4s", b"RIFF", min(stated_bytes + 36, 2**32 - 1), b"WAVE")
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return riff + fmt + struct.pack("<4sI", b"data", stated_bytes) + body


@pytest.mark.parametrize(
    "name,content,expected",
    [
        ("a.wav", b"", "empty file"),
        ("a.wav", b"this is no audio at all\n" * 99, "corrupt"),
        ("a.mp3", bytes(5000), "corrupt"),
        ("a.mp4", b"\0\0\0\x18ftypisom" + bytes(4000), "corrupt"),
        ("a.ogg", b"OggS" + bytes(4000), "corrupt"),
        ("a.wav", wav_bytes(channels=0), "corrupt"),
        ("a.wav", wav_bytes(rate=0), "corrupt"),
        ("a.wav", wav_bytes(rate=500), "sample rate outside 1 kHz - 768 kHz"),
        ("a.wav", wav_bytes(rate=1_000_000), "sample rate outside 1 kHz - 768 kHz"),
        ("a.wav", wav_bytes(stated_bytes=1_879_048_192), "truncated"),
        ("a.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.aac\n#EXT-X-ENDLIST\n", "corrupt"),
        ("a.mp4", b"ffconcat version 1.0\nfile good.aac\n", "corrupt"),
    ],
)
def test_decode_bad_file_raises_its_reason(tmp_path, name, content, expected):
    encode(tmp_path / "good.aac", tone(), "aac", container_format="adts")  # which a playlist must not open
    (tmp_path / name).write_bytes(content)
    assert error_reason(tmp_path / name) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_rejects_non_finite_samples(tmp_path, value):
    wave = np.stack([tone(), tone()], 1)
    wave[20000, 1] = value
    soundfile.write(tmp_path / "a.wav", wave, RATE, "FLOAT")
    assert error_reason(tmp_path / "a.wav") == "NaN or infinite samples"


@pytest.mark.parametrize(
    "name", ["a.wav", "a.aiff", "a.au", "a.w64", "a.flac", "a.mkv", "a.mp4", "fast.mp4", "fast.mov"]
)
def test_decode_rejects_truncated_file(tmp_path, name):
    path = tmp_path / name
    if name.endswith(("mkv", "mov", "mp4")):
        codec = {"a.mkv": "flac", "fast.mov": "pcm_s16le"}.get(name, "aac")
        encode(path, tone(3.0) + np.random.default_rng(0).normal(0, 0.1, 48000), codec)
    else:
        soundfile.write(path, tone(3.0), RATE)
    assert len(decode(path)) >= 3.0 * RATE - CODEC_SECONDS * RATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert error_reason(path) in ("truncated", "corrupt")


def test_decode_cut_stream_without_stated_length_gives_shorter_clip(tmp_path):
    wave = tone(8.0) + np.random.default_rng(0).normal(0, 0.05, 8 * RATE)
    soundfile.write(tmp_path / "a.mp3", wave, RATE)
    soundfile.write(tmp_path / "a.ogg", wave, RATE)
    encode(tmp_path / "a.g722", wave, "g722", container_format="g722")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        wave = decode(path)
        assert 2 * RATE < len(wave) < 5 * RATE and abs(frequency(wave) - 440) <= TONE_HZ


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_decode_accepts_streaming_wav_header(tmp_path, size):
    (tmp_path / "a.wav").write_bytes(wav_bytes(stated_bytes=size))
    assert decode(tmp_path / "a.wav").shape == (8000,)


def test_decode_memory_is_independent_of_header(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(), RATE)
    header = bytearray((tmp_path / "a.flac").read_bytes())
    header[21:26] = bytes([header[21] | 0x0F, 255, 255, 255, 255])  # STREAMINFO: 2^36 - 1 samples, 49 days
    (tmp_path / "a.flac").write_bytes(header)
    (tmp_path / "a.wav").write_bytes(wav_bytes(channels=64, num_samples=100, stated_bytes=0x7FFFE000))
    soundfile.write(tmp_path / "long.wav", np.zeros((4_000_000, 2), np.int16), 44100)
    tracemalloc.start()
    for name in ("a.flac", "a.wav"):
        assert error_reason(tmp_path / name) == "truncated"
    assert sum(block.size for block in audio.decode_blocks(tmp_path / "long.wav")) > 1_400_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # 4,000,000 frames are 32 MB of float32


def test_decode_rejects_no_audio_stream_no_file_and_pipe(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert error_reason(tmp_path / "a.mp4") == "no audio stream"
    assert error_reason(tmp_path / "none.wav") == "unreadable"
    os.mkfifo(tmp_path / "pipe.wav")
    assert error_reason(tmp_path / "pipe.wav") == "no regular file"


# ---------------------------------------------------------------------------------------------------------- finding


def test_find_audio_folder_lists_visible_audio_files_sorted(tmp_path):
    for name in ("b/x.WAV", "a/z.mp3", "a/c/y.g722", ".hidden/n.wav", "a/._m.wav", "a/notes.txt", "top.Flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nowhere.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    entries = find_audio(tmp_path)
    assert [entry.name for entry in entries] == ["a/c/y.g722", "a/z.mp3", "b/x.WAV", "top.Flac"]
    assert [entry.group for entry in entries] == ["a/c", "a", "b", ""]
    assert entries[2].path == str(tmp_path / "b/x.WAV")
    assert find_audio(tmp_path / "b/x.WAV")[0].name == "x.WAV"


def test_find_audio_non_utf8_name_is_printable_and_decodes(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xe9.wav"
    try:
        with open(path, "wb") as file:
            file.write(wav_bytes())
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    (entry,) = find_audio(tmp_path)
    entry.name.encode("utf-8")
    assert entry.name == "\\xff\\xe9.wav" and decode(entry.path).size == 8000


def test_find_audio_rejects_missing_and_empty_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        find_audio(tmp_path / "none")
    with pytest.raises(ValueError, match="no audio file"):
        find_audio(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_find_audio_reads_manifest_of_windows(tmp_path, encoding):
    (tmp_path / "set").mkdir()
    (tmp_path / "m.tsv").write_bytes("set\r\n\u00fc.wav\t5\xa0\r\n".encode(encoding))
    (entry,) = find_audio(tmp_path / "m.tsv")
    assert entry.path == str(tmp_path / "set" / "\u00fc.wav")


def test_find_audio_reads_manifest(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    for ending, root in (("\n", tmp_path / "set"), ("\r\n", "set")):
        lines = [str(root), "a/x.flac\t16000", "é y.wav\t5", ""]
        (tmp_path / "train.tsv").write_bytes(ending.join(lines).encode())
        entries = find_audio(tmp_path / "train.tsv")
        assert [(e.name, e.group) for e in entries] == [("a/x.flac", "a"), ("é y.wav", "")]
        assert entries[0].path == str(tmp_path / "set/a/x.flac")


@pytest.mark.parametrize(
    "text,error,message",
    [
        ("", ValueError, "line 1"),
        ("nowhere\na.wav\t5\n", FileNotFoundError, "line 1.*nowhere"),
        (".\na.wav\t5\nb.wav 7\n", ValueError, "line 3.*b.wav 7"),
        (".\na.wav\tfive\n", ValueError, "line 2"),
        (".\na.wav\t-5\n", ValueError, "line 2"),
        (".\na\0.wav\t5\n", ValueError, "line 2"),
        (".\n\t5\n", ValueError, "line 2"),
        (".\n", ValueError, "lists no file"),
    ],
)
def test_find_audio_rejects_malformed_manifest(tmp_path, text, error, message):
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(error, match=message):
        find_audio(tmp_path / "m.tsv")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_find_audio_random_manifest_gives_entries_or_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("m", numbered=True) / "m.tsv"
    path.write_bytes(b".\n" + content)
    try:
        entries = find_audio(path)
    except ValueError as error:
        assert "line" in str(error) or "lists no file" in str(error)
    else:
        assert all(entry.name.isprintable() or entry.name for entry in entries)


def test_decode_recordings_of_test_suite():
    """Later tests train on the clips next to this file: none may be lost."""
    entries = find_audio(AUDIO)
    assert len(entries) == 40
    assert all(RATE < len(decode(entry.path)) <= 12 * RATE for entry in entries[::8])


# ------------------------------------------------------------------------------------------------------------ split


def check_split(names, md5=None, **options):
    md5 = list(map(str, md5 or range(len(names))))
    train, held, description = split(
        [AudioFile(name, name, group=name.rpartition("/")[0]) for name in names], md5, **options
    )
    assert len(train) and len(held) and isinstance(description, str)
    assert sorted([*train, *held]) == list(range(len(names)))
    assert not {md5[i] for i in train} & {md5[i] for i in held}
    return train, held, description


def folders(names, indices, level):
    return {"/".join(names[i].split("/")[:-1][:level]) for i in indices}


def test_split_holds_out_whole_folders():
    names = [f"speaker{s}/{c}/{i}.flac" for s in range(40) for c in range(2) for i in range(5)]
    train, held, description = check_split(names, seed=3)
    assert not folders(names, train, 1) & folders(names, held, 1) and "folders" in description
    assert 0.05 <= len(held) / len(names) <= 0.1
    assert held.tolist() != check_split(names, seed=4)[1].tolist()
    assert held.tolist() == check_split(names, seed=3)[1].tolist()


def test_split_uses_first_level_with_enough_folders():
    names = [f"train-clean/{s}/{c}/{i}.flac" for s in range(20) for c in range(3) for i in range(4)]
    train, held, description = check_split(names)
    assert not folders(names, train, 2) & folders(names, held, 2) and "level 2" in description


def test_split_passes_over_folder_with_most_of_the_data():
    names = [f"big/{i}.wav" for i in range(1000)] + [f"small{s}/{i}.wav" for s in range(20) for i in range(10)]
    for seed in range(10):
        assert len(check_split(names, seed=seed)[1]) <= 120


@given(st.integers(2, 200), st.integers(0, 5), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_split_few_folders_holds_out_single_files(count, seed, fraction):
    names = [f"{i % 3}/{i}.wav" for i in range(count)]
    copies = [i // 2 for i in range(count)] if count > 3 else None
    _, held, description = check_split(names, copies, fraction=fraction, seed=seed)
    assert "single files" in description and len(held) <= max(2, 2 * fraction * count)


def test_split_keeps_copies_on_one_side():
    names = [f"{g}/{i}.wav" for g in range(8) for i in range(10)]
    check_split(names, [n.split("/")[1] for n in names], seed=1)  # every folder holds the same ten files
    shared = [f"{n if i % 10 else 'jingle'}" for i, n in enumerate(names)]  # one file is in every folder
    _, held, description = check_split(names, shared, seed=1)
    assert "folders" in description and len(held) in (9, 18)


def test_split_rejects_single_file_and_bad_fraction():
    for names, md5 in ((["a.wav"], ["x"]), (["a.wav", "b.wav"], ["x", "x"])):
        with pytest.raises(ValueError, match="at least two different files"):
            check_split(names, md5)
    with pytest.raises(ValueError, match="fraction"):
        check_split(["a.wav", "b.wav"], fraction=1.0)


def test_import_data_loads_no_audio_library():
    libraries = ["soundfile", "soxr", "av", "torchaudio", "triton", "lhotse"]
    code = "import mae_ast_fast.data.shards, mae_ast_fast.data.corpus, sys; "
    code += f"print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
