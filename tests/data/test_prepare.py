"""prepare.py and npy.py: the shards of --out, also after crashes and kills, and the two files of --npy."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from policy import RESAMPLE_ABS

from mae_ast_fast import cli
from mae_ast_fast.data import audio, corpus, decoder, npy, prepare
from mae_ast_fast.data.audio import AudioFile, decode, find_audio, to_pcm16
from mae_ast_fast.data.npy import lengths_path, prepare_npy
from mae_ast_fast.data.prepare import prepare_shards
from mae_ast_fast.files import temp_path

soundfile = pytest.importorskip("soundfile")
lhotse = pytest.importorskip("lhotse")
soxr = pytest.importorskip("soxr")
pytest.importorskip("av")


def write(folder: Path, name: str, samples: np.ndarray) -> np.ndarray:
    """Write int16 samples to a 16-bit WAV file, which holds them exactly, and return them."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.astype(np.int16), 16000, subtype="PCM_16")
    return samples.astype(np.int16)


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, round(seconds * 16000))


def read_npy(path: Path) -> list[np.ndarray]:
    """The clips of a file of ``prepare_npy``."""
    samples, num_samples = np.load(path, allow_pickle=False), np.load(lengths_path(path), allow_pickle=False)
    assert (samples.dtype, samples.ndim, num_samples.dtype) == (np.int16, 1, np.int64)
    assert num_samples.sum() == samples.size
    return np.split(samples, num_samples.cumsum()[:-1])


@pytest.fixture
def recordings(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Twelve clips of 0.5 - 1.6 s, a long one, one that is too short, and a file that is not audio."""
    folder = tmp_path / "in"
    clips = [write(folder, f"{number % 3}/{number}.wav", noise(0.5 + 0.1 * number, number)) for number in range(12)]
    clips.append(write(folder, "long.wav", noise(4, 99))[:32000])
    write(folder, "short.wav", noise(0.29, 100))
    (folder / "broken.wav").write_bytes(b"RIFF but no more")
    return folder, clips


def test_prepare_npy_writes_every_clip_bit_for_bit(recordings, tmp_path, monkeypatch):
    folder, clips = recordings
    monkeypatch.setattr(npy, "_PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    report = prepare_npy(folder, tmp_path / "new" / "out.npy", seconds=2.0, progress=lines.append)
    clips_read = read_npy(tmp_path / "new" / "out.npy")
    assert sorted(map(bytes, clips_read)) == sorted(map(bytes, clips))
    assert (report.files, report.clips, report.left_out) == (15, 13, 0)
    assert report.seconds == sum(clip.size for clip in clips) / 16000
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert {(Path(path).name, reason) for path, reason in report.skipped} == {
        ("short.wav", "shorter than 0.3 s"),
        ("broken.wav", "corrupt"),
    }
    assert sum("skipped" in line for line in lines) == 2
    progress_lines = [
        line for line in lines if re.fullmatch(r"\d+ clips, 0\.\d of at most 30 MB, .* files/s, about \d+ s left", line)
    ]
    assert len(progress_lines) == 13 and progress_lines[-1].startswith("13 clips")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out.npy", "out.lengths.npy"}


def test_prepare_npy_seed_and_size_choose_the_clips(recordings, tmp_path):
    folder, clips = recordings
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = prepare_npy(
            folder, tmp_path / f"{name}.npy", seconds=2.0, max_mb=0.2, seed=seed, progress=lambda line: None
        )
        clips_read = read_npy(tmp_path / f"{name}.npy")
        assert 100_000 < report.num_bytes <= 200_000  # another clip would not fit: none is longer than 64 KB
        assert report.num_bytes == sum(path.stat().st_size for path in tmp_path.glob(f"{name}.*npy"))
        assert report.left_out > 0 and report.clips + report.left_out + len(report.skipped) == 15
        assert {bytes(clip) for clip in clips_read} <= {bytes(clip) for clip in clips}
        orders.append([bytes(clip) for clip in clips_read])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_prepare_npy_resamples_and_clips_loud_samples(tmp_path):
    rate, samples = 44100, np.full((44100, 2), 1.5, np.float32)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "loud.wav", samples, rate, subtype="FLOAT")
    prepare_npy(tmp_path / "in", tmp_path / "out.npy", progress=lambda line: None)
    (clip,) = read_npy(tmp_path / "out.npy")
    assert clip.size == 16000
    assert (clip[1000:-1000] == 32767).all()  # clipped, not wrapped around


def test_prepare_npy_failed_write_keeps_old_files(recordings, tmp_path, monkeypatch):
    folder, _ = recordings
    out = tmp_path / "out.npy"
    for path in (out, lengths_path(out)):
        path.write_bytes(b"before")
    save = np.save
    for dtype in (np.int16, np.int64):  # the disk is full in the middle of the samples, or of the lengths

        def full(path, array, dtype=dtype, **options):
            save(path, array[:2], **options)
            if array.dtype == dtype:
                raise OSError("no space left")

        monkeypatch.setattr(np, "save", full)
        with pytest.raises(OSError, match="no space left"):
            prepare_npy(folder, out, progress=lambda line: None)
        assert out.read_bytes() == lengths_path(out).read_bytes() == b"before"
        assert {path.name for path in tmp_path.iterdir()} == {"in", "out.npy", "out.lengths.npy"}


def test_prepare_npy_size_is_that_of_both_files(tmp_path):
    for name in "abc":
        write(tmp_path / "in", f"{name}.wav", noise(1, ord(name)))
    exact = 2 * 32000 + 2 * 8 + 2 * npy._HEADER_BYTES
    for size, clips in ((exact, 2), (exact - 1, 1)):
        report = prepare_npy(tmp_path / "in", tmp_path / "out.npy", max_mb=size / 1e6, progress=lambda line: None)
        assert report.clips == clips
    prepare_npy(tmp_path / "in", tmp_path / "out.npy", max_mb=exact / 1e6, progress=lambda line: None)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npy")) == exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "out.npz"}, r"must end in \.npy, got out.npz"),
        ({"seconds": 0.2}, "seconds must be at least 0.3, got 0.2"),
        ({"seconds": float("nan")}, "seconds must be at least 0.3, got nan"),
        ({"max_mb": 0.001}, "max_mb must hold a clip of 0.3 s .*, got 0.001"),
        ({"max_mb": 0.0115}, "no clip .* 0 files skipped, 1 too long for 0.0115 MB"),
    ],
)
def test_prepare_npy_rejects_bad_options(change, message, tmp_path):
    write(tmp_path, "one.wav", noise(1, 0))
    arguments = {"source": tmp_path, "out": tmp_path / "out.npy", "progress": lambda line: None, **change}
    with pytest.raises(ValueError, match=message):
        prepare_npy(**arguments)
    assert not list(tmp_path.glob("*.npy"))


def test_prepare_cli_writes_npy(recordings, tmp_path, capsys, monkeypatch):
    folder, _ = recordings
    out = tmp_path / "shard.npy"
    assert cli.main(["prepare", str(folder), "--npy", str(out), "--seconds", "2", "--max-mb", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 13 clips, 0.2 minutes, 0.")
    assert captured.out.endswith("2 files skipped, 0 of 15 left out because the size was reached\n")
    assert captured.err.count("skipped ") == 2
    assert len(read_npy(out)) == 13
    assert cli.main(["prepare", str(folder)]) == 2
    assert "--out --npy" in capsys.readouterr().err
    clips = [corpus.CorpusClip(str(folder / "0" / "0.wav"), "0/0.wav", "speech", "package")]
    monkeypatch.setattr(corpus, "fetch", lambda progress: corpus.Corpus(tmp_path, ("package",), ()))
    monkeypatch.setattr(corpus, "default_clips", lambda cache, packages: (clips, {}))
    assert cli.main(["prepare", "--npy", str(out)]) == 0
    assert "1 clips" in capsys.readouterr().out
    assert [clip.size for clip in read_npy(out)] == [8000]


# ------------------------------------------------------------------------------------------------------------- shards


def tone(seconds: float, hz: float = 440.0, amplitude: float = 0.3, rate: int = 16000) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def cuts(out: Path) -> list:
    """The cuts that Lhotse reads."""
    return list(lhotse.CutSet.from_shar(in_dir=out))


def samples_of(read_cuts: list) -> dict[str, np.ndarray]:
    """int16 samples of each recording, its segments in order."""
    by_name: dict[str, list] = {}
    for cut in sorted(read_cuts, key=lambda cut: cut.custom["piece"]):
        assert cut.sampling_rate == 16000 and cut.recording.num_samples == cut.num_samples
        loaded = cut.load_audio() * 32768
        assert loaded.shape == (1, cut.num_samples)
        by_name.setdefault(cut.custom["name"], []).append(loaded[0].astype(np.int16))
    return {name: np.concatenate(segments) for name, segments in by_name.items()}


def contents(out: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    return files | {"report": out.with_name(f"{out.name}.report.json").read_bytes()}


def mixed_folder(folder: Path) -> list[AudioFile]:
    """Good, silent, clipped and duplicate files, and bad ones of all types."""
    folder.mkdir()
    soundfile.write(folder / "a.wav", tone(0.5), 16000)
    soundfile.write(folder / "b.flac", tone(1.0, 300.0, rate=22050), 22050)
    soundfile.write(folder / "c.ogg", np.stack([tone(1.0, 300.0, rate=48000)] * 2, 1), 48000)
    (folder / "e_copy.wav").write_bytes((folder / "a.wav").read_bytes())
    soundfile.write(folder / "f_silent.wav", tone(0.5, amplitude=5e-4), 16000)
    soundfile.write(folder / "g_clipped.wav", np.clip(tone(0.5, amplitude=3.0), -1, 1), 16000)
    soundfile.write(folder / "h_loud.wav", tone(1.5, amplitude=0.99), 16000)
    (folder / "i_empty.wav").touch()
    (folder / "j_text.wav").write_text("no audio\n" * 20)
    soundfile.write(folder / "k_nan.wav", np.full(8000, np.nan), 16000, "FLOAT")
    soundfile.write(folder / "l_none.wav", np.zeros(0), 16000)
    soundfile.write(folder / "m_short.wav", tone(0.1), 16000)
    (folder / "n_truncated.wav").write_bytes((folder / "h_loud.wav").read_bytes()[:20000])
    return [*find_audio(folder), AudioFile(str(folder / "gone.wav"), "gone.wav")]


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_prepare_shards_lhotse_reads_samples_bit_for_bit(tmp_path, codec, capfd):
    entries = mixed_folder(tmp_path / "set")
    report = prepare_shards(entries, tmp_path / "100% out", codec=codec)
    assert "decoding: 14/14 files" in capfd.readouterr().err
    assert json.loads((tmp_path / "100% out.report.json").read_text()) == report
    read_cuts = cuts(tmp_path / "100% out")
    kept = ["a.wav", "b.flac", "c.ogg", "e_copy.wav", "f_silent.wav", "g_clipped.wav", "h_loud.wav"]
    assert sorted(cut.custom["name"] for cut in read_cuts) == kept
    for name, samples in samples_of(read_cuts).items():
        assert np.array_equal(samples, to_pcm16(decode(tmp_path / "set" / name))), name
    assert {key: value["names"] for key, value in report["skipped"].items()} == {
        "empty file": ["i_empty.wav"],
        "corrupt": ["j_text.wav"],
        "NaN or infinite samples": ["k_nan.wav"],
        "no samples": ["l_none.wav"],
        "shorter than 0.3 s": ["m_short.wav"],
        "truncated": ["n_truncated.wav"],
        "missing or no regular file": ["gone.wav"],
    }
    assert report["silent"] == {"count": 1, "names": ["f_silent.wav"]}
    assert report["clipped"] == {"count": 1, "names": ["g_clipped.wav"]}
    assert report["duplicate"] == {"count": 1, "names": ["e_copy.wav"]}
    assert (report["files"], report["clips"], report["pieces"]) == (14, 7, 7)
    assert report["hours"] == pytest.approx(sum(cut.num_samples for cut in read_cuts) / 16000 / 3600)
    held = {cut.custom["name"] for cut in read_cuts if cut.custom["split"] == "held_out"}
    assert len(held) == report["held_out"] == 7 - report["train"] >= 1
    assert len(held & {"a.wav", "e_copy.wav"}) != 1 and "single files" in report["split"]
    assert {path.name for path in tmp_path.iterdir()} == {"set", "100% out", "100% out.report.json"}


def test_prepare_shards_cuts_long_recording_into_equal_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MAX_SEGMENT_SECONDS", 2)
    wave = write(tmp_path / "in", "deep/er/long one (é).wav", noise(5, 0))
    for name, seconds in (("two.wav", 2.0), ("more.wav", 2.001)):
        write(tmp_path / "in", name, noise(seconds, 1))
    (tmp_path / "all.tsv").write_text("in\n" + "two.wav\t1\n" * 2 + "deep/er/long one (é).wav\t1\nmore.wav\t1\n")
    report = prepare_shards(tmp_path / "all.tsv", tmp_path / "out", progress=False)
    read_cuts = cuts(tmp_path / "out")
    assert (report["files"], report["clips"], report["pieces"]) == (4, 4, 3 + 2 + 1 + 1)
    assert len({cut.id for cut in read_cuts}) == 7
    sizes = {(cut.custom["name"], cut.custom["piece"]): cut.num_samples for cut in read_cuts}
    assert sizes == {
        **{("deep/er/long one (é).wav", index): size for index, size in enumerate((26666, 26667, 26667))},
        **{("more.wav", 0): 16008, ("more.wav", 1): 16008, ("two.wav", 0): 32000},
    }
    assert np.array_equal(samples_of(read_cuts)["deep/er/long one (é).wav"], wave)
    (cut, *_) = (cut for cut in read_cuts if cut.custom["kind"] == "" and cut.custom["piece"] == 2)
    assert cut.custom["group"] == "deep/er"


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_prepare_shards_cut_has_byte_range_of_its_audio(tmp_path, codec):
    clips = {f"{i}.wav": write(tmp_path / "in", f"{i}.wav", noise(0.3 + i / 10, i)) for i in range(5)}
    prepare_shards(tmp_path / "in", tmp_path / "out", codec=codec, progress=False)
    tar = (tmp_path / "out/recording.000000.tar").read_bytes()
    for cut in cuts(tmp_path / "out"):
        custom = cut.custom
        content = tar[custom["offset"] : custom["offset"] + custom["size"]]
        assert prepare.zlib.crc32(content) == custom["crc32"]
        if codec == "wav":
            assert content == clips[custom["name"]].tobytes()
        else:
            assert content.startswith(b"fLaC")


def test_prepare_shards_shuffles_recordings_over_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", (100_000, 100_000))
    for i in range(60):
        write(tmp_path / "in", f"{i:02}.wav", noise(0.3, i))
    report = prepare_shards(tmp_path / "in", tmp_path / "out", progress=False)
    assert len(report["shards"]) > 5
    read_cuts = cuts(tmp_path / "out")
    order = [int(cut.custom["name"][:2]) for cut in read_cuts]
    assert sorted(order) == list(range(60)) and abs(np.corrcoef(order, np.arange(60))[0, 1]) < 0.4


def test_prepare_shards_report_caps_names_not_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MAX_NAMES", 2)
    for i in range(5):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.5), 16000)
    soundfile.write(tmp_path / "x.wav", tone(0.6), 16000)
    report = prepare_shards(find_audio(tmp_path), tmp_path / "out", progress=False)
    assert report["duplicate"] == {"count": 4, "names": ["1.wav", "2.wav"]}


def test_prepare_shards_keeps_names_invalid_for_files(tmp_path):
    names = ["..", "a//b", "\\xff.wav", "x" * 300, "C:\\con\n\t'\"", "../../etc/passwd", ""]
    entries = []
    for i, name in enumerate(names):
        write(tmp_path / "in", f"{i}.wav", noise(0.4, i))
        entries.append(AudioFile(str(tmp_path / f"in/{i}.wav"), name))
    prepare_shards(entries, tmp_path / "out", progress=False)
    assert {cut.custom["name"] for cut in cuts(tmp_path / "out")} == set(names)


SABOTAGED_DECODER = """
import os, runpy, sys, time
module = runpy.run_path(sys.argv[1])["serve"].__globals__
decode_to = module["_decode_to"]
def sabotaged(path, pcm, heartbeat):
    name = os.path.basename(path)
    if sys.argv[3]:
        with open(sys.argv[3], "a") as log:
            print(name, file=log)
    if "crash" in name:
        pcm.write(bytes(1000))
        os._exit(139)
    if "hang" in name:
        module["_STALL_SECONDS"] = 0.2
        heartbeat()
        time.sleep(60)
    if "odd" in name:
        raise SystemError("a decoder's own idea of an error")
    time.sleep(float(sys.argv[2]))
    return decode_to(path, pcm, heartbeat)
module["_decode_to"] = sabotaged
module["serve"]()
"""


def sabotaged_command(delay: float = 0.0, log: str | Path = "") -> list[str]:
    return [sys.executable, "-c", SABOTAGED_DECODER, audio.__file__, str(delay), str(log)]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_shards_crashed_or_hung_decoder_loses_its_file_only(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", (30_000, 30_000))
    names = ["1.wav", "2_crash.wav", "3.wav", "4_hang.wav", "5_crash.wav", "6.wav", "7_odd.wav"]
    for i, name in enumerate(names):
        soundfile.write(tmp_path / name, tone(0.4 + i / 100), 16000)
    monkeypatch.setattr(decoder, "_DECODER_COMMAND", sabotaged_command())
    report = prepare_shards(find_audio(tmp_path), tmp_path / "out", workers=workers, progress=False)
    assert report["skipped"] == {
        "SystemError in the decoder": {"count": 1, "names": ["7_odd.wav"]},
        "the decoder crashed or hung": {"count": 3, "names": ["2_crash.wav", "4_hang.wav", "5_crash.wav"]},
    }
    samples = samples_of(cuts(tmp_path / "out"))
    assert samples.keys() == {"1.wav", "3.wav", "6.wav"}
    assert all(np.array_equal(samples[name], to_pcm16(decode(tmp_path / name))) for name in samples)


PREPARE = """
import sys
from mae_ast_fast.data import decoder, prepare
decoder._DECODER_COMMAND = eval(sys.argv[3])
prepare._SHARD_BYTES = (60_000, 60_000)
prepare.prepare_shards(sys.argv[1], sys.argv[2], workers=2, progress=False)
"""


def test_prepare_shards_killed_and_resumed_gives_same_bytes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", (60_000, 60_000))
    for i in range(30):
        write(tmp_path / "set", f"{i:02}.wav", noise(0.4, i))
    (tmp_path / "set/bad.wav").write_text("nothing")
    prepare_shards(tmp_path / "set", tmp_path / "whole", workers=1, progress=False)
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "set"), str(out), repr(sabotaged_command(0.05))]
    process = subprocess.Popen(command)
    results = out.with_name("out.partial") / "results"
    complete = "[!.]*.json"  # a hidden file is half written, and a kill may leave one
    while len(list(results.glob(complete))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and not (tmp_path / "out.report.json").exists()
    shards = sorted(results.glob(complete))
    done = {result["entry"] for path in shards for result in json.loads(path.read_text())}
    temp_path(results / "000006.json").touch()
    monkeypatch.setattr(decoder, "_DECODER_COMMAND", sabotaged_command(log=log))
    capfd.readouterr()
    prepare_shards(tmp_path / "set", out, workers=2)
    assert f"resuming after {len(shards)} of " in capfd.readouterr().err
    names = [entry.name for entry in find_audio(tmp_path / "set")]
    assert sorted(log.read_text().split()) == sorted(set(names) - {names[i] for i in done}) and done
    assert contents(out) == contents(tmp_path / "whole")
    assert not out.with_name("out.partial").exists()


def test_prepare_shards_killed_at_manifests_resumes_without_decoding(tmp_path, monkeypatch):
    for i in range(4):
        write(tmp_path / "set", f"{i}.wav", noise(0.4, i))
    prepare_shards(tmp_path / "set", tmp_path / "whole", progress=False)

    out, write_json, rename = tmp_path / "out", prepare.write_json, os.rename

    def no_report(path, content):
        if path.name == "out.report.json":
            raise KeyboardInterrupt
        write_json(path, content)

    def no_move(path, target):
        if target == out:
            raise KeyboardInterrupt
        rename(path, target)

    for module, replacement in ((prepare, no_report), (os, no_move)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_json" if module is prepare else "rename", replacement)
            with pytest.raises(KeyboardInterrupt):
                prepare_shards(tmp_path / "set", out, progress=False)
        assert not out.exists()
    monkeypatch.setattr(decoder, "_DECODER_COMMAND", [sys.executable, "-c", ""])  # nothing is decoded again
    prepare_shards(tmp_path / "set", tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_prepare_shards_two_processes_give_one_result(tmp_path, monkeypatch, capfd):
    for i in range(6):
        write(tmp_path / "set", f"{i}.wav", noise(0.4, i))
    monkeypatch.setattr(decoder, "_DECODER_COMMAND", sabotaged_command(0.1, tmp_path / "log"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(prepare_shards, tmp_path / "set", tmp_path / "out", progress=False) for _ in range(2)]
    assert jobs[0].result() == jobs[1].result()
    assert len((tmp_path / "log").read_text().split()) == 6  # each file once
    assert "waiting for another process" in capfd.readouterr().err
    assert len(cuts(tmp_path / "out")) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out", "out.report.json", "log"}


def test_prepare_shards_keeps_same_and_rejects_other_output(tmp_path, monkeypatch):
    source, out = tmp_path / "set", tmp_path / "out"
    for i in range(3):
        write(source, f"{i}.wav", noise(0.4 + i / 10, i))
    report = prepare_shards(source, out, progress=False)
    contents_before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_DECODER_COMMAND", [sys.executable, "-c", ""])  # a decoder that does not start
        assert prepare_shards(source, out, progress=False) == report and contents(out) == contents_before
        with pytest.raises(RuntimeError, match="does not start"):
            prepare_shards(source, tmp_path / "other", progress=False)
    for change in ({"min_seconds": 0.45}, {"codec": "flac"}):
        with pytest.raises(ValueError, match="was not made from these"):
            prepare_shards(source, out, **change, progress=False)
    (tar,) = out.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-5000])  # damaged since: made anew
    assert prepare_shards(source, out, progress=False) == report and contents(out) == contents_before
    os.utime(source / "1.wav", ns=(0, 10**18))
    with pytest.raises(ValueError, match="was not made from these"):
        prepare_shards(source, out, progress=False)
    assert contents(out) == contents_before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="was not made from these"):
        prepare_shards(source, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_prepare_shards_does_not_resume_other_data(tmp_path, monkeypatch, capfd):
    write(tmp_path / "a", "1.wav", noise(0.5, 0))
    write(tmp_path / "b", "2.wav", noise(0.5, 1))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_manifests", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_shards(tmp_path / "a", tmp_path / "out", progress=False)
    prepare_shards(tmp_path / "b", tmp_path / "out", progress=False)
    assert "starting anew" in capfd.readouterr().err
    assert [cut.custom["name"] for cut in cuts(tmp_path / "out")] == ["2.wav"]


def test_prepare_shards_no_usable_clip_counts_reasons(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.wav").touch()
    soundfile.write(tmp_path / "c.wav", tone(0.1), 16000)
    with pytest.raises(ValueError, match=r"none of 3 files .* 2 x empty file, 1 x shorter than 0.3 s"):
        prepare_shards(find_audio(tmp_path), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="wav or flac, got 'mp3'"):
        prepare_shards(find_audio(tmp_path), tmp_path / "out", codec="mp3")


def test_prepare_shards_uses_callers_split(tmp_path):
    for i in range(4):
        write(tmp_path / "set", f"{i}.wav", noise(0.4, i))
    (tmp_path / "set/0.wav").touch()
    (tmp_path / "set/3.wav").write_bytes(b"")  # not usable
    usable_names = []

    def second(entries):
        usable_names.extend(entry.name for entry in entries)
        return np.array([0, 2]), np.array([1]), "the second"

    report = prepare_shards(tmp_path / "set", tmp_path / "out", split=second, progress=False)
    assert usable_names == ["0.wav", "1.wav", "2.wav"] and report["split"] == "the second"
    assert (report["train"], report["held_out"]) == (2, 1)
    splits = {cut.custom["name"]: cut.custom["split"] for cut in cuts(tmp_path / "out")}
    assert splits == {"0.wav": "train", "1.wav": "held_out", "2.wav": "train"}


def test_prepare_shards_single_file_holds_nothing_out(tmp_path):
    write(tmp_path, "one.wav", noise(1, 0))
    report = prepare_shards(tmp_path / "one.wav", tmp_path / "out", progress=False)
    assert (report["train"], report["held_out"]) == (1, 0) and "at least two different files" in report["split"]


# ------------------------------------------------------------------------------------------------------ Lhotse's cuts


@pytest.fixture
def recordings_44k(tmp_path: Path) -> list[np.ndarray]:
    """Six stereo recordings at 44.1 kHz in tmp_path/in, float32 (samples, 2)."""
    (tmp_path / "in").mkdir()
    waves = []
    for i in range(6):
        wave = np.stack([tone(1 + i / 10, 200 + 50 * i, rate=44100), tone(1 + i / 10, 900.0, rate=44100)], 1)
        soundfile.write(tmp_path / f"in/{i}.wav", wave, 44100, "PCM_16")
        waves.append(soundfile.read(tmp_path / f"in/{i}.wav", dtype="float32")[0])
    return waves


def resampled(wave: np.ndarray) -> np.ndarray:
    return soxr.resample(wave.mean(1) if wave.ndim == 2 else wave, 44100, 16000, quality="HQ")


def assert_close(samples: np.ndarray, wave: np.ndarray) -> None:
    assert abs(len(samples) - len(wave)) <= 1
    num_samples = min(len(samples), len(wave))
    assert np.abs(samples[:num_samples] / 32768 - wave[:num_samples]).max() <= 0.5 / 32768 + RESAMPLE_ABS


def test_prepare_shards_reads_cutset_manifest(tmp_path, recordings_44k):
    source_cuts = [lhotse.Recording.from_file(path).to_cut() for path in sorted((tmp_path / "in").iterdir())]
    source_cuts[4:] = (
        source_cuts[4].truncate(offset=0.2, duration=0.5),
        source_cuts[5].resample(8000),
        source_cuts[0].truncate(duration=0.1),
    )
    (tmp_path / "in/1.wav").unlink()
    (tmp_path / "in/2.wav").write_text("no audio")
    source_cuts = [lhotse.utils.fastcopy(cut, id=f"cut{i}") for i, cut in enumerate(source_cuts)]
    lines = [json.dumps(cut.to_dict()).replace("cut3", "cut3\\ud800") for cut in source_cuts]  # not valid in UTF-8
    (tmp_path / "cuts.jsonl").write_text("\n".join(lines))
    report = prepare_shards(tmp_path / "cuts.jsonl", tmp_path / "out", workers=1, progress=False)
    assert (report["files"], report["clips"]) == (7, 4)
    skipped = {name for finding in report["skipped"].values() for name in finding["names"]}
    assert skipped == {"cut1", "cut2", "cut6"} and "shorter than 0.3 s" in report["skipped"]
    samples = samples_of(cuts(tmp_path / "out"))
    assert samples.keys() == {"cut0", "cut3\\ud800", "cut4", "cut5"}
    assert_close(samples["cut3\\ud800"], resampled(recordings_44k[3]))  # both channels
    assert_close(samples["cut4"], resampled(recordings_44k[4][8820:30870]))
    assert abs(len(samples["cut5"]) - 24000) <= 1


def test_decoder_loads_long_cut_in_chunks(tmp_path, recordings_44k, monkeypatch):
    monkeypatch.setattr(decoder, "_CUT_SECONDS", 0.25)
    cut = lhotse.Recording.from_file(tmp_path / "in/3.wav").to_cut()
    blocks = list(decoder._cut_blocks(cut))
    assert len(blocks) > 1
    assert_close(to_pcm16(np.concatenate(blocks)), resampled(recordings_44k[3]))


def foreign_shar(tmp_path: Path) -> Path:
    """Mono 44.1 kHz FLAC in three shards, written by Lhotse alone."""
    source_cuts = []
    for i, path in enumerate(sorted((tmp_path / "in").iterdir())):
        mono = soundfile.read(path, dtype="float32")[0][:, 0]
        soundfile.write(tmp_path / f"in/{i}.wav", mono, 44100, "PCM_16")
        source_cuts.append(lhotse.Recording.from_file(path, recording_id=f"speaker{i % 5}/{i}").to_cut())
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(source_cuts).to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    return tmp_path / "shar"


@pytest.mark.ci
def test_prepare_shards_reads_foreign_shar(tmp_path, recordings_44k):
    shar = foreign_shar(tmp_path)
    assert prepare.source_format(shar) == "shar"
    report = prepare_shards(shar, tmp_path / "out", workers=1, progress=False)
    assert (report["files"], report["clips"], report["skipped"]) == (6, 6, {})
    assert len(report["shards"]) == 3
    for name, samples in samples_of(cuts(tmp_path / "out")).items():
        wave = recordings_44k[int(name.split("/")[1].split("-")[0])][:, 0]
        assert_close(samples, resampled(wave))
    assert prepare.source_format(tmp_path / "out") == "prepared"
    assert {cut.custom["group"].split("/")[0] for cut in cuts(tmp_path / "out")} == {f"speaker{i}" for i in range(5)}


@pytest.mark.ci
def test_prepare_shards_damaged_foreign_shar_loses_damaged_cuts(tmp_path, recordings_44k):
    shar = foreign_shar(tmp_path)
    tars = sorted(shar.glob("*.tar"))
    tars[0].write_bytes(tars[0].read_bytes()[:5000])  # in the first of two recordings
    tars[1].write_bytes(tars[1].read_bytes().replace(b"fLaC", b"????", 1))
    report = prepare_shards(shar, tmp_path / "out", workers=1, progress=False)
    assert sorted(cut.custom["name"].split("/")[1][0] for cut in cuts(tmp_path / "out")) == ["3", "4", "5"]
    assert sum(finding["count"] for finding in report["skipped"].values()) == 3


@pytest.mark.ci
def test_prepare_shards_reads_shar_and_manifest_at_url(tmp_path, recordings_44k):
    url = f"file://{foreign_shar(tmp_path)}"
    assert prepare.source_format(url) == "shar"
    assert prepare_shards(url, tmp_path / "out", workers=1, progress=False)["clips"] == 6
    source_cuts = lhotse.CutSet.from_cuts([lhotse.Recording.from_file(tmp_path / "in/0.wav").to_cut()])
    source_cuts.to_file(tmp_path / "cuts.jsonl.gz")
    url = f"file://{tmp_path}/cuts.jsonl.gz"
    assert prepare_shards(url, tmp_path / "other", workers=1, progress=False)["clips"] == 1
    assert prepare.source_format(f"file://{tmp_path}/other") == "prepared"
    with pytest.raises(FileNotFoundError, match="no Lhotse Shar"):
        prepare.source_format(f"file://{tmp_path}/in")
    with pytest.raises(ValueError, match="nosuch"):
        prepare.source_format("nosuch://bucket/shards")


@pytest.mark.parametrize("text", ["{}\n", "no json\n", "[1]\n", ""])
def test_prepare_shards_rejects_manifest_without_cuts(tmp_path, text):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(text)
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz"):
        prepare_shards(tmp_path / "x.jsonl.gz", tmp_path / "out", progress=False)
    (tmp_path / "y.jsonl.gz").write_bytes(b"\x1f\x8b cut off")
    with pytest.raises((ValueError, OSError)):
        prepare_shards(tmp_path / "y.jsonl.gz", tmp_path / "out", progress=False)


def test_prepare_cli_writes_shards(recordings, tmp_path, capsys, monkeypatch):
    folder, clips = recordings
    out = tmp_path / "shards"
    command = ["prepare", str(folder), "--out", str(out), "--format", "flac", "--workers", "2", "--min-seconds", "0.2"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 14 of 15 clips, 0.00 hours, ") and f"{out}.report.json" in captured.out
    assert "skipped 1: corrupt: broken.wav" in captured.err
    assert len(cuts(out)) == 14 == len(clips) + 1
    assert cli.main(command) == 0  # nothing to do
    assert cli.main([*command[:-1], "0.3"]) == 1
    assert "was not made from these" in capsys.readouterr().err
    for wrong in (["--seed", "1"], ["--npy", str(tmp_path / "a.npy")]):
        assert cli.main([*command, *wrong]) == 2
    assert cli.main(["prepare", str(folder), "--npy", str(tmp_path / "a.npy"), "--workers", "3"]) == 2
    assert "--workers does not go with --npy" in capsys.readouterr().err
    entries = [
        corpus.CorpusClip(str(folder / f"{i % 3}/{i}.wav"), f"p{i % 3}/{i}.wav", "speech", f"p{i % 3}")
        for i in range(9)
    ]
    monkeypatch.setattr(corpus, "fetch", lambda progress: corpus.Corpus(tmp_path, ("p0", "p1", "p2"), ()))
    monkeypatch.setattr(corpus, "default_clips", lambda cache, packages: (entries, {}))
    assert cli.main(["prepare", "--out", str(tmp_path / "corpus")]) == 0
    assert "whole packages and voices" in capsys.readouterr().out


def test_prepare_shards_manifest_runs_no_program(tmp_path):
    """Lhotse would: for sources of type command, after "pipe:", for names of .sph, inside an augmentation."""
    for i in range(2):
        write(tmp_path, f"{i}.wav", noise(1.0, i))
    wav, command = tmp_path / "0.wav", f"touch {tmp_path}/ran"

    def cut(number: int, source_type: str, source: str, transforms: list | None = None) -> dict:
        sources = [{"type": source_type, "channels": [0], "source": source}]
        recording = {"id": f"r{number}", "sources": sources, "sampling_rate": 16000, "num_samples": 16000}
        recording |= {"duration": 1.0, **({"transforms": transforms} if transforms else {})}
        times = {"start": 0.0, "duration": 1.0, "channel": 0, "supervisions": []}
        return {"id": f"c{number}", **times, "recording": recording, "type": "MonoCut"}

    room = cut(0, "command", f"{command}4; cat {wav}")["recording"]
    lines = [
        cut(0, "file", str(wav)),
        cut(1, "file", str(tmp_path / "1.wav")),
        cut(2, "command", f"{command}0; cat {wav}"),
        cut(3, "file", f"pipe:{command}1"),
        cut(4, "url", f"pipe:{command}2"),
        cut(5, "file", f"/x.sph; {command}3 #.sph"),
        cut(6, "file", str(wav), [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": room}}]),
    ]
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = prepare_shards(tmp_path / "cuts.jsonl", tmp_path / "out", workers=1, progress=False)
    assert not list(tmp_path.glob("ran*"))
    assert report["clips"] == 2 and sum(finding["count"] for finding in report["skipped"].values()) == 5
