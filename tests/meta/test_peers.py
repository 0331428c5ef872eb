"""Frozen networks of public wheels, benchmarks/studies/quality/peers.py: fetching, windows, choices."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from policy import ESSENTIA_LOG_MEL, LIBROSA_MEL
from torch import Tensor

from mae_ast_fast.downstream.manifest import Fold
from mae_ast_fast.downstream.run import FoldResult

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def peers():
    """peers of benchmarks/studies/quality, imported temporarily because the names of its folder are ambiguous."""
    folder, names = str(ROOT / "benchmarks/studies/quality"), ("run", "peers")
    replaced = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        import peers

        yield peers
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(replaced)


class ToyPeer:
    """Windows of four samples, two apart; an embedding is their sum."""

    samples, frames, hop = 4, 4, 2

    def __init__(self) -> None:
        self.embedded = 0

    def spectrogram(self, waveform: Tensor) -> Tensor:
        return waveform[:, None]

    def embed(self, windows: Tensor) -> Tensor:
        self.embedded += len(windows)
        return windows.sum((1, 2))[:, None]


class ToyRun:
    """Clips of 3, 6, 0 and 4 samples."""

    clips = ([1, 2, 3], [1, 2, 3, 4, 5, 6], [], [7, 7, 7, 7])
    max_seconds = 10.0

    def __init__(self, identity: str = "one") -> None:
        self.task, self.lines = SimpleNamespace(clips=self.clips), []
        self.audio = SimpleNamespace(
            identity=identity,
            windows=lambda clip, seconds: [(0.0, clip)] if self.clips[clip] else [],
            read=lambda crops: (torch.tensor([self.clips[crops[0]]]) * 32768, None),
        )

    def log(self, line: str) -> None:
        self.lines.append(line)


def chirp(num_samples: int, rate: int) -> Tensor:
    seconds = torch.arange(num_samples, dtype=torch.float64) / rate
    return (0.3 * torch.sin(2 * torch.pi * (200 * seconds + 20000 * seconds**2))).float()


@pytest.mark.parametrize(
    ("pad", "expected"),
    [
        ("start", [0, 0, 1, 2, 3]),
        ("end", [1, 2, 3, 0, 0]),
        ("repeat", [1, 2, 3, 1, 2]),
        ("both", [0, 0, 1, 2, 3, 0, 0]),
    ],
)
def test_padded_short_clip_fills_window(peers, pad: str, expected: list[int]) -> None:
    assert peers.padded(torch.tensor([1, 2, 3]), 5, pad).tolist() == expected
    long = torch.arange(7)
    assert peers.padded(long, 5, pad).tolist() == (long.tolist() if pad != "both" else [0, 0, *long.tolist(), 0, 0])


def test_embed_task_gives_windows_of_each_clip(peers, tmp_path: Path) -> None:
    embeddings = peers.embed_task(ToyRun(), ToyPeer(), "end", tmp_path / "toy.npz")
    assert [clip.ravel().tolist() for clip in embeddings] == [[6], [10, 18], [0], [28]]


def test_embed_task_interrupted_goes_on(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is not embedded again, unless it is of other audio."""
    monkeypatch.setattr(peers, "_BATCH_CLIPS", 2)
    monkeypatch.setattr(peers, "_SAVE_SECONDS", 0.0)
    path, run, peer = tmp_path / "toy.npz", ToyRun(), ToyPeer()
    read = run.audio.read

    def fail_at_last_clip(crops: list[int]) -> tuple[Tensor, None]:
        if crops == [3]:
            raise KeyboardInterrupt
        return read(crops)

    run.audio.read = fail_at_last_clip
    with pytest.raises(KeyboardInterrupt):
        peers.embed_task(run, peer, "end", path)
    assert peer.embedded == 3 and "2 of 4 clips" in run.lines[-1]
    run.audio.read = read
    embeddings = peers.embed_task(run, peer, "end", path)
    assert peer.embedded == 5
    assert [clip.ravel().tolist() for clip in embeddings] == [[6], [10, 18], [0], [28]]
    peers.embed_task(ToyRun("another"), peer, "end", path)
    assert peer.embedded == 10


def test_best_fold_selects_by_validation_first_of_equals(peers, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = Fold("", [0], [1], [2])
    scores = {"start": (0.5, 0.9), "both": (0.7, 0.1), "end": (0.7, 0.8)}  # validation, test

    def fit_fold(run: object, features: str, fold: Fold) -> FoldResult:
        valid, test = scores[features]
        return FoldResult(fold, np.array([[test]]), valid, selected={"C": 1.0})

    monkeypatch.setattr(peers, "fit_fold", fit_fold)
    best = peers.best_fold(None, {(pad, "mean"): pad for pad in scores}, fold)
    assert (best.selected, best.probabilities.item()) == ({"pad": "both", "pool": "mean", "C": 1.0}, 0.1)


def test_pooled_mean_max_has_both(peers) -> None:
    clips = [np.array([[1.0, 5.0], [3.0, 1.0]]), np.array([[7.0, 8.0]])]
    assert peers.pooled(clips, "mean").tolist() == [[2.0, 3.0], [7.0, 8.0]]
    assert peers.pooled(clips, "mean_max").tolist() == [[2.0, 3.0, 3.0, 5.0], [7.0, 8.0, 7.0, 8.0]]


def test_fetch_once_and_again_for_other_wheels(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements, calls = tmp_path / "peers.txt", []
    requirements.write_text("# Licence\ntoy==1")

    def download(command: list, check: bool) -> None:
        calls.append(command)
        Path(command[-1]).mkdir(parents=True)
        with zipfile.ZipFile(Path(command[-1]) / "toy-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy/weights.txt", f"version {len(calls)}")

    monkeypatch.setattr(peers, "REQUIREMENTS", requirements)
    monkeypatch.setattr(peers.subprocess, "run", download)
    for _ in range(2):
        folder = peers.fetch(tmp_path / "cache")
    assert len(calls) == 1 and {"--no-deps", "--require-hashes"} <= set(calls[0])
    assert (folder / "toy/weights.txt").read_text() == "version 1"
    requirements.write_text("toy==2")
    assert (peers.fetch(tmp_path / "cache") / "toy/weights.txt").read_text() == "version 2"


def test_requirements_pin_hash_and_name_licence(peers) -> None:
    lines = peers.REQUIREMENTS.read_text().splitlines()
    wheels = [line for line in lines if not line.startswith("#")]
    assert [wheel.split("==")[0] for wheel in wheels] == ["openwakeword", "aisfx", "Resemblyzer"]
    assert all(" --hash=sha256:" in wheel for wheel in wheels)
    assert all(any(name in lines[lines.index(w) - 1] for name in ("Apache", "CC BY")) for w in wheels)


def test_essentia_log_mel_matches_essentia(peers) -> None:
    """Values of Essentia 2.1b6.dev1389, every tenth band of two frames."""
    spectrogram = peers.essentia_log_mel(chirp(8192, 44100))
    first = [6.016030788421631, 7.049638748168945, 5.991504669189453, 2.65120005607605, 1.787769079208374]
    fourth = [1.967e-05, 7.775e-05, 0.004498742520809174, 5.79032039642334, 5.600179672241211, 1.4548e-05, 5.2e-08]
    assert spectrogram.shape == (9, 96)
    torch.testing.assert_close(spectrogram[0, :50:10], torch.tensor(first), **ESSENTIA_LOG_MEL)
    torch.testing.assert_close(spectrogram[3, 10:80:10], torch.tensor(fourth), **ESSENTIA_LOG_MEL)


def test_librosa_mel_matches_librosa(peers) -> None:
    """Values of librosa 0.11.0, every fifth band of two frames."""
    spectrogram = peers.librosa_mel(chirp(1600, 16000))
    first = [0.41909539699554443, 1.070326805114746, 0.0018265633843839169, 0.00032014341559261084]
    sixth = [1.1832e-10, 4.3485e-10, 3.7825e-09, 1.6549e-07, 0.04000825434923172, 0.26387664675712585, 1.7e-09, 2e-12]
    assert spectrogram.shape == (11, 40)
    torch.testing.assert_close(spectrogram[0, :20:5], torch.tensor(first), **LIBROSA_MEL)
    torch.testing.assert_close(spectrogram[5, ::5], torch.tensor(sixth), **LIBROSA_MEL)
