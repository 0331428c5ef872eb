"""Small tasks: the shipped lists, and audio built from packages of a stand-in for apt-get."""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_apt import FakeApt

from mae_ast_fast.cli import main
from mae_ast_fast.data import corpus
from mae_ast_fast.data.audio import AUDIO_SUFFIXES, SAMPLE_RATE, decode
from mae_ast_fast.data.corpus import CorpusError
from mae_ast_fast.downstream import small_tasks
from mae_ast_fast.downstream.manifest import read_task
from mae_ast_fast.downstream.small_tasks import TASKS, build, packages, task_rows
from mae_ast_fast.ops.fbank import WINDOW

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

# ------------------------------------------------------------------------------------------------------ shipped lists


def manifest():
    return {row["path"]: row for row in small_tasks._table("manifest.tsv.gz")}


@pytest.mark.parametrize("name", TASKS)
def test_task_rows_shipped_list_matches_manifest_and_description(name):
    rows, sources = task_rows(name), manifest()
    assert len({row["path"] for row in rows}) == len(rows)
    for row in rows:
        source = sources[row["path"]]
        assert row["split"] in ("train", "valid", "test")
        assert row["split"] == "train" or source["pretrain"] == "0"  # not in the pretraining data
        assert source["package"] == row["path"].split("/")[1]
        archive, separator, _ = source["source_file"].rpartition("!")
        if separator:
            assert Path(archive).name in corpus._ARCHIVES[source["package"]]
        assert Path(source["source_file"]).suffix in {*AUDIO_SUFFIXES, ".gsm"}
    labels = Counter(row["label"] for row in rows if "label" in row)
    if name == "ru_phone":
        ends = [row["phones"].split()[-1].partition(":")[0] for row in rows]
        seconds = [float(sources[row["path"]]["seconds"]) for row in rows]
        assert all(0 <= SAMPLE_RATE * (s - float(end)) < WINDOW for end, s in zip(ends, seconds, strict=True))
        counts = Counter(pair.partition(":")[2] for row in rows for pair in row["phones"].split())
        labels = {phone: count for phone, count in counts.items() if count >= 20}
    assert len(labels) == int(re.search(r"\d+", TASKS[name].description)[0])
    assert ("fold" in rows[0]) == ("folds" in TASKS[name].metric)
    if "fold" in rows[0]:
        assert {row["fold"] for row in rows} == set("01234")
    assert list(packages(name).values()) == sorted(packages(name).values())


def test_build_unknown_task_raises(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of zh_initial22, .*, got 'zh'"):
        build(["zh"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- build

RATE = SAMPLE_RATE
TWICE = repr(20 * math.log10(2))
# package, source, seconds, start, gain
SOURCES = {
    "a": ("gcin-voice", "usr/share/a.wav", "1.0", "0.5", TWICE),
    "b": ("gcin-voice", "usr/share/a.wav", "0.25", "0.0", "0.0"),
    "c": ("ufoai-sound", "usr/share/games/0snd.pk3!sound/c!.flac", "1.0", "0.0", "0.0"),
    "d": ("asterisk-prompt-es-co", "usr/share/d.gsm", "0.5", "0.0", "0.0"),
    "absent": ("gcin-voice", "usr/share/absent.wav", "1.0", "0.0", "0.0"),
    "short": ("gcin-voice", "usr/share/a.wav", "1.0", "1.2", "0.0"),
    "bad": ("ufoai-sound", "usr/share/bad.ogg", "1.0", "0.0", "0.0"),
    "lacking": ("scratch", "usr/share/x.wav", "1.0", "0.0", "0.0"),
}
LISTS = {"zh_initial22": "ab", "vocal4": ["a", "c", "d", "absent", "short", "bad", "lacking"], "ru_phone": ["lacking"]}


def wave(seconds: float, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return np.rint(8000 * np.sin(2 * np.pi * (300 + 200 * t) * t)).astype(np.int16)


def encoded(samples: np.ndarray, rate: int, **codec: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **codec)
    return file.getvalue()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeApt(tmp_path / "fake")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"))
    monkeypatch.setenv("MAE_AST_FAST_CACHE", str(tmp_path / "cache"))
    fake.add("gcin-voice", {"usr/share/a.wav": encoded(wave(2.0), RATE, format="WAV")})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("sound/c!.flac", encoded(wave(1.0, 44100), 44100, format="FLAC"))
    fake.add("ufoai-sound", {"usr/share/games/0snd.pk3": archive.getvalue(), "usr/share/bad.ogg": b"OggS no"})
    gsm = encoded(wave(1.0, 8000), 8000, format="RAW", subtype="GSM610")
    fake.add("asterisk-prompt-es-co", {"usr/share/d.gsm": gsm})

    def table(asset):
        if asset == "manifest.tsv.gz":
            keys = ("package", "source_file", "seconds", "start", "gain_db")
            return [
                {"path": f"audio/{source[0]}/{name}.opus", **dict(zip(keys, source, strict=True))}
                for name, source in SOURCES.items()
            ]
        name = re.fullmatch(r"tasks/(\w+)\.tsv\.gz", asset)[1]
        labels = {"phones": "0.5:a 1.0:b"} if name == "ru_phone" else {"label": f"x{name}"}
        rows = [{"path": f"audio/{SOURCES[clip][0]}/{clip}.opus", **labels, "split": "train"} for clip in LISTS[name]]
        return [{**row, "split": "test", **({"label": "y"} if "label" in row else {})} for row in rows[:1]] + rows[1:]

    monkeypatch.setattr(small_tasks, "_table", table)
    return fake


def read(out: Path, name: str) -> np.ndarray:
    samples, rate = soundfile.read(out / f"audio/{SOURCES[name][0]}/{name}.wav", dtype="int16")
    assert rate == RATE and soundfile.info(out / f"audio/{SOURCES[name][0]}/{name}.wav").subtype == "PCM_16"
    return samples


def test_build_cuts_and_scales_clips(fake, tmp_path):
    progress: list[str] = []
    out = tmp_path / "out"
    report = build(["zh_initial22"], out, progress=progress.append)
    assert report == {
        "zh_initial22": {"manifest": str(out / "zh_initial22.tsv"), "clips": 2, "minutes": 1.25 / 60, "left_out": {}}
    }
    source = wave(2.0)
    assert np.array_equal(read(out, "a"), 2 * source[RATE // 2 : RATE // 2 + RATE])
    assert np.array_equal(read(out, "b"), source[: RATE // 4])
    assert progress[0] == "zh_initial22: 2 clips of 1 package, 8 MB to download"
    assert re.fullmatch(r"zh_initial22: gcin-voice: 2 of 2 clips in [\d.]+ s", progress[-1])
    assert (out / "zh_initial22.tsv").read_text().splitlines() == [
        "path\tlabel\tsplit",
        "audio/gcin-voice/a.wav\ty\ttest",
        "audio/gcin-voice/b.wav\txzh_initial22\ttrain",
    ]
    clips = read_task(out / "zh_initial22.tsv").clips
    assert [(clip.labels, clip.split) for clip in clips] == [(("y",), "test"), (("xzh_initial22",), "train")]
    assert all(Path(clip.path).is_file() for clip in clips)


def test_build_archives_and_headerless_files_are_decoded(fake, tmp_path):
    build(["vocal4"], tmp_path / "out", progress=lambda line: None)
    (tmp_path / "c.flac").write_bytes(encoded(wave(1.0, 44100), 44100, format="FLAC"))
    expected = np.rint(decode(tmp_path / "c.flac") * 32768).astype(np.int16)
    assert np.array_equal(read(tmp_path / "out", "c"), expected)
    samples = read(tmp_path / "out", "d")
    assert samples.size == RATE // 2
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(samples.size)))
    assert 300 < spectrum.argmax() * RATE / samples.size < 500  # the glide of its first half second


def test_build_unavailable_clips_are_left_out_with_reason(fake, tmp_path):
    progress: list[str] = []
    report = build(["vocal4", "ru_phone", "zh_initial22"], tmp_path / "out", progress=progress.append)
    assert list(report) == ["zh_initial22", "ru_phone", "vocal4"]  # by download size
    assert report["vocal4"]["clips"] == 3 and report["zh_initial22"]["clips"] == 2
    left_out = {reason: [Path(path).stem for path in paths] for reason, paths in report["vocal4"]["left_out"].items()}
    assert left_out == {
        "gcin-voice: not in the package": ["absent"],
        "gcin-voice: shorter than the listed recording": ["short"],
        "ufoai-sound: corrupt": ["bad"],
        "scratch is not in this system's release": ["lacking"],
    }
    lines = (tmp_path / "out/vocal4.tsv").read_text().splitlines()
    assert [Path(line.split("\t")[0]).stem for line in lines[1:]] == ["a", "c", "d"]
    assert report["ru_phone"]["manifest"] is None and not (tmp_path / "out/ru_phone.tsv").exists()
    assert any("none of its packages is in this system's release: scratch" in line for line in progress)


def test_build_after_interruption_resumes(fake, tmp_path, monkeypatch):
    out, write, calls = tmp_path / "out", soundfile.write, []

    def interrupted(path, *arguments, **options):
        if len(calls) == 1:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        calls.append(path)
        write(path, *arguments, **options)

    monkeypatch.setattr(soundfile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(["zh_initial22"], out, progress=lambda line: None)
    assert [path.name for path in out.rglob("*.wav")] == ["a.wav"] and not (out / "zh_initial22.tsv").exists()
    first = (out / "audio/gcin-voice/a.wav").stat().st_mtime_ns
    monkeypatch.setattr(soundfile, "write", write)
    fake.calls()
    progress: list[str] = []
    assert build(["zh_initial22"], out, progress=progress.append)["zh_initial22"]["clips"] == 2
    assert progress[0] == "zh_initial22: 1 clip of 1 package, 0 MB to download" and fake.calls() == []
    assert (out / "audio/gcin-voice/a.wav").stat().st_mtime_ns == first
    progress.clear()
    assert build(["zh_initial22"], out, progress=progress.append)["zh_initial22"]["clips"] == 2 and progress == []


def test_build_decoder_crash_leaves_out_one_file(fake, tmp_path, monkeypatch):
    decode_file = small_tasks.Decoder.decode

    def crash(self, path):
        return {"reason": "the decoder crashed or hung"} if path.endswith("a.wav") else decode_file(self, path)

    monkeypatch.setattr(small_tasks.Decoder, "decode", crash)
    left_out = build(["vocal4"], tmp_path / "out", progress=lambda line: None)["vocal4"]["left_out"]
    assert [Path(path).stem for path in left_out["gcin-voice: the decoder crashed or hung"]] == ["a", "short"]
    assert read(tmp_path / "out", "c").size == RATE


# ------------------------------------------------------------------------------------------------------------ command


def test_tasks_command_builds_tasks_and_prints_next_command(fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["tasks", "zh_initial22", "--out", str(out)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{out}/zh_initial22.tsv: 2 clips, 0.0 minutes"
    where = f"--data {out}/zh_initial22.tsv --checkpoint runs/frame --out runs/zh_initial22"
    assert last == f"Next: mae-ast-fast finetune {where}"
    assert main(["tasks", "ru_phone", "vocal4", "--out", str(out)]) == 1  # one of them has no clip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ru_phone: 0 clips, 0.0 minutes"
    assert "  left out 1: scratch is not in this system's release (lacking)" in lines
    assert lines[-1].startswith(f"Next: mae-ast-fast finetune --data {out}/vocal4.tsv ")
    fake.add("scratch", {"usr/share/x.wav": encoded(wave(1.0), RATE, format="WAV")})
    (tmp_path / "cache/scratch.lacking").unlink(missing_ok=True)
    assert main(["tasks", "ru_phone", "--out", str(out)]) == 0
    where = f"--data {out}/ru_phone.tsv --checkpoint runs/frame --out runs/ru_phone"
    assert capsys.readouterr().out.splitlines()[-1] == f"Next: mae-ast-fast probe {where}"


def test_tasks_command_without_network_exits_with_error(fake, tmp_path, capsys):
    fake.mode("offline")
    with pytest.raises(CorpusError):
        build(["zh_initial22"], tmp_path / "out", progress=lambda line: None)
    assert main(["tasks", "zh_initial22", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "mae-ast-fast tasks: error: apt-get update failed, is there a network?" in error
    assert "--data" not in error


@pytest.mark.network
@pytest.mark.long
def test_build_real_packages_gives_all_clips(tmp_path):
    report = build(["zh_initial22"], tmp_path / "out", tmp_path / "cache")["zh_initial22"]
    assert report["left_out"] == {} and report["clips"] == 2357
    task = read_task(tmp_path / "out/zh_initial22.tsv")
    assert len(task.labels) == 22
    for clip in task.clips[::100]:
        assert soundfile.info(clip.path).samplerate == SAMPLE_RATE
