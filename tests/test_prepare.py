"""prepare --npy: what stands in the two files, and which clips get in."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mae_ast_fast import cli, corpus, prepare
from mae_ast_fast.prepare import lengths_path, prepare_npy

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")
pytest.importorskip("av")


def write(folder: Path, name: str, samples: np.ndarray) -> np.ndarray:
    """16-bit WAV, which holds int16 exactly; returns it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.astype(np.int16), 16000, subtype="PCM_16")
    return samples.astype(np.int16)


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, round(seconds * 16000))


def read(path: Path) -> list[np.ndarray]:
    samples, lengths = np.load(path, allow_pickle=False), np.load(lengths_path(path), allow_pickle=False)
    assert (samples.dtype, samples.ndim, lengths.dtype) == (np.int16, 1, np.int64)
    assert lengths.sum() == samples.size
    return np.split(samples, lengths.cumsum()[:-1])


@pytest.fixture
def recordings(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Twelve clips of 0.5 - 1.6 s, a long one, one too short and one that is no audio."""
    folder = tmp_path / "in"
    clips = [write(folder, f"{number % 3}/{number}.wav", noise(0.5 + 0.1 * number, number)) for number in range(12)]
    clips.append(write(folder, "long.wav", noise(4, 99))[:32000])
    write(folder, "short.wav", noise(0.29, 100))
    (folder / "broken.wav").write_bytes(b"RIFF but no more")
    return folder, clips


def test_every_clip_bit_for_bit(recordings, tmp_path, monkeypatch):
    folder, clips = recordings
    monkeypatch.setattr(prepare, "_EVERY", 0.0)
    said: list[str] = []
    report = prepare_npy(folder, tmp_path / "new" / "out.npy", seconds=2.0, progress=said.append)
    found = read(tmp_path / "new" / "out.npy")
    assert sorted(map(bytes, found)) == sorted(map(bytes, clips))
    assert (report.files, report.clips, report.left) == (15, 13, 0)
    assert report.seconds == sum(clip.size for clip in clips) / 16000
    assert report.size == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert {(Path(path).name, reason) for path, reason in report.skipped} == {
        ("short.wav", "shorter than 0.3 s"),
        ("broken.wav", "corrupt"),
    }
    assert sum("skipped" in line for line in said) == 2
    told = [
        line for line in said if re.fullmatch(r"\d+ clips, 0\.\d of at most 30 MB, .* files/s, about \d+ s left", line)
    ]
    assert len(told) == 13 and told[-1].startswith("13 clips")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out.npy", "out.lengths.npy"}


def test_the_seed_decides_which_clips_and_the_size_how_many(recordings, tmp_path):
    folder, clips = recordings
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = prepare_npy(folder, tmp_path / f"{name}.npy", 2.0, 0.2, seed, progress=lambda line: None)
        found = read(tmp_path / f"{name}.npy")
        assert 100_000 < report.size <= 200_000  # one more would not have fitted: none is longer than 64 KB
        assert report.size == sum(path.stat().st_size for path in tmp_path.glob(f"{name}.*npy"))
        assert report.left > 0 and report.clips + report.left + len(report.skipped) == 15
        assert {bytes(clip) for clip in found} <= {bytes(clip) for clip in clips}
        orders.append([bytes(clip) for clip in found])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_other_rates_and_loud_samples(tmp_path):
    rate, samples = 44100, np.full((44100, 2), 1.5, np.float32)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "loud.wav", samples, rate, subtype="FLOAT")
    prepare_npy(tmp_path / "in", tmp_path / "out.npy", progress=lambda line: None)
    (clip,) = read(tmp_path / "out.npy")
    assert clip.size == 16000
    assert (clip[1000:-1000] == 32767).all()  # clipped, not wrapped around


def test_what_stood_there_stays_when_writing_fails(recordings, tmp_path, monkeypatch):
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


def test_the_size_is_that_of_both_files(tmp_path):
    for name in "abc":
        write(tmp_path / "in", f"{name}.wav", noise(1, ord(name)))
    exact = 2 * 32000 + 2 * 8 + 2 * prepare._HEADER
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
def test_bad_options(change, message, tmp_path):
    write(tmp_path, "one.wav", noise(1, 0))
    given = {"source": tmp_path, "out": tmp_path / "out.npy", "progress": lambda line: None, **change}
    with pytest.raises(ValueError, match=message):
        prepare_npy(**given)
    assert not list(tmp_path.glob("*.npy"))


def test_the_command(recordings, tmp_path, capsys, monkeypatch):
    folder, _ = recordings
    out = tmp_path / "shard.npy"
    assert cli.main(["prepare", str(folder), "--npy", str(out), "--seconds", "2", "--max-mb", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 13 clips, 0.2 minutes, 0.")
    assert captured.out.endswith("2 files skipped, 0 of 15 left out because the size was reached\n")
    assert captured.err.count("skipped ") == 2
    assert len(read(out)) == 13
    assert cli.main(["prepare", str(folder)]) == 2
    assert "--npy" in capsys.readouterr().err
    clips = [corpus.CorpusClip(str(folder / "0" / "0.wav"), "0/0.wav", "speech", "package")]
    monkeypatch.setattr(corpus, "fetch", lambda progress: corpus.Corpus(tmp_path, ("package",), ()))
    monkeypatch.setattr(corpus, "default_clips", lambda cache, packages: (clips, {}))
    assert cli.main(["prepare", "--npy", str(out)]) == 0
    assert "1 clips" in capsys.readouterr().out
    assert [clip.size for clip in read(out)] == [8000]
