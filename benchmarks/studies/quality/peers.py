"""Frozen networks of public wheels on the study's tasks: embeddings, and the probe of ``mae-ast-fast probe`` on them.

python benchmarks/studies/quality/peers.py                 fetch the wheels and run every missing cell
python benchmarks/studies/quality/peers.py --match aisfx   run only cells with matching names
python benchmarks/studies/quality/peers.py --list          list finished and missing cells

A cell is one JSON file in results/, as run.py writes them: arm (name of the network), budget ``frozen``, seed 0. The
wheels in peers.txt are fetched without their dependencies and unpacked into the cache. A network sees windows of its
own length, as far apart as its package has them. Short clips are padded; the embeddings of a clip's windows are
pooled. Each fold selects padding, pooling and penalty by its validation clips. Embeddings are kept in --work, so that
an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from run import RESULTS, Cell, Grid
from torch import Tensor

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.data.audio import SAMPLE_RATE
from mae_ast_fast.downstream.manifest import Fold
from mae_ast_fast.downstream.options import ProbeOptions
from mae_ast_fast.downstream.probe import fit_fold, log_mel_features
from mae_ast_fast.downstream.report import write_report
from mae_ast_fast.downstream.run import FoldResult, Run
from mae_ast_fast.files import atomic_write

REQUIREMENTS = Path(__file__).resolve().parent / "peers.txt"
TASKS = ("zh_initial22", "vocal4", "esc14", "hogvoice14")
AISFX_RATE = 44100
_BATCH_CLIPS = 32
_SAVE_SECONDS = 10.0


class SpeechEmbedding:
    """Google's speech embedding (arXiv 2002.01322), converted to ONNX in openwakeword: 96 values per 0.8 s."""

    pads, pools = ("start", "both"), ("mean", "mean_max")
    samples, frames, hop = 12640, 76, 8  # samples and frames of a window; frames between two windows

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        models = folder / "openwakeword/resources/models"
        self.mel, self.network = (
            onnxruntime.InferenceSession(models / name, options, providers=["CPUExecutionProvider"])
            for name in ("melspectrogram.onnx", "embedding_model.onnx")
        )

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """Log-mel spectrogram (frames, 32) of samples (S,) in [-1, 1]."""
        output = self.mel.run(None, {"input": (waveform[None] * 32768).numpy()})[0]
        return torch.from_numpy(output).squeeze((0, 1)) / 10 + 2

    def embed(self, windows: Tensor) -> Tensor:
        """Embeddings (n, 96) of windows (n, 76, 32)."""
        return torch.from_numpy(
            self.network.run(None, {"input_1": windows[..., None].contiguous().numpy()})[0]
        ).flatten(1)


def essentia_log_mel(waveform: Tensor) -> Tensor:
    """Spectrogram (frames, 96) of samples (S,) at 44.1 kHz in [-1, 1], with Essentia's mel bands and log10(1 + 1e4 x).

    A frame is centred on every 1,024th sample. Essentia adds a last frame that is mostly past the end.
    """

    def mel(hertz: Tensor) -> Tensor:
        return 1127.01048 * torch.log1p(hertz / 700)

    num_bands, fft = 96, 2048
    hertz = torch.linspace(0, AISFX_RATE / 2, fft // 2 + 1, dtype=torch.float64)
    edges = torch.linspace(0, float(mel(hertz[-1])), num_bands + 2, dtype=torch.float64)
    rising = (mel(hertz)[:, None] - edges[:-2]) / edges.diff()[:-1]
    falling = (edges[2:] - mel(hertz)[:, None]) / edges.diff()[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    window = torch.hann_window(fft, periodic=False)
    stft = torch.stft(waveform, fft, fft // 2, window=window, pad_mode="constant", return_complex=True)
    power = stft.abs().square().T
    return torch.log10(1 + 1e4 * power @ (triangles / triangles.sum(0)).float())


class AiSFX:
    """aiSFX (Ma and Lerch, ISMIR 2022), a CNN trained on sound effects: 512 values per 2.3 s at 44.1 kHz.

    Its spectrogram is that of Essentia, with which it was trained.
    """

    pads, pools = ("end",), ("mean",)
    samples, frames, hop = 36800, 100, 50
    _LARGEST = 9.457798957824707  # of the spectrograms it was trained on

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.spec_from_file_location("aisfx_cnn2d", folder / "aisfx/models/cnn2d.py")
        cnn = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cnn)
        self.network = cnn.EmbeddingNet("max", 3, 1, 64).eval()
        scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")  # the checkpoint's names of its time
        with torch.serialization.safe_globals([scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("i8", "f8"))]):
            weights, _ = torch.load(folder / "aisfx/models/checkpoint.pth", map_location="cpu", weights_only=True)
        prefix = "embedding_net."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """Log-mel spectrogram (frames, 96) of samples (S,) at 16 kHz in [-1, 1]."""
        import soxr

        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), SAMPLE_RATE, AISFX_RATE))
        return essentia_log_mel(waveform) / self._LARGEST

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Embeddings (n, 512) of windows (n, 100, 96)."""
        return self.network(windows)


def librosa_mel(waveform: Tensor) -> Tensor:
    """Mel power spectrogram (frames, 40) of samples (S,) at 16 kHz, as librosa computes it; 10 ms between frames."""
    from torchaudio.functional import melscale_fbanks

    bands = melscale_fbanks(201, 0.0, SAMPLE_RATE / 2, 40, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    window = torch.hann_window(400)
    stft = torch.stft(waveform, 400, 160, window=window, pad_mode="constant", return_complex=True)
    return stft.abs().square().T @ bands


class Resemblyzer:
    """Resemblyzer's speaker encoder (after arXiv 1710.10467), a recurrent network: 256 values per 1.6 s.

    Volume is raised to -30 dB as its package does it; pauses are kept, which the package cuts by a voice detector.
    """

    pads, pools = ("end", "repeat"), ("mean",)
    samples, frames, hop = 25600, 160, 77

    def __init__(self, folder: Path) -> None:
        checkpoint = torch.load(folder / "resemblyzer/pretrained.pt", map_location="cpu", weights_only=True)
        weights = checkpoint["model_state"]
        self.lstm, self.linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
        for name, module in (("lstm.", self.lstm), ("linear.", self.linear)):
            module.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """Mel power spectrogram (frames, 40) of samples (S,) in [-1, 1]."""
        gain = 10 ** (-30 / 20) / waveform.square().mean().sqrt().clamp(min=1e-9)
        return librosa_mel(waveform * gain.clamp(min=1))

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Embeddings (n, 256) of windows (n, 160, 40)."""
        _, (hidden, _) = self.lstm(windows)
        return F.normalize(self.linear(hidden[-1]).relu())


PEERS = {"speech embedding": SpeechEmbedding, "aiSFX": AiSFX, "Resemblyzer": Resemblyzer}
Peer = SpeechEmbedding | AiSFX | Resemblyzer


def cells() -> list[Cell]:
    return [Cell(arm, "frozen", 0, task, "probe") for task in TASKS for arm in PEERS]


def fetch(cache: Path) -> Path:
    """Folder of the unpacked wheels. pip fetches them if they are not those of peers.txt, and checks their hashes."""
    folder, requirements = cache / "peers", REQUIREMENTS.read_text()
    stamp = folder / REQUIREMENTS.name  # written last: an interrupted fetch starts again
    if stamp.exists() and stamp.read_text() == requirements:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "-r", REQUIREMENTS, "-d", wheels], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    stamp.write_text(requirements)
    print(f"{folder}: unpacked\n{requirements}", flush=True)
    return folder


def padded(waveform: Tensor, samples: int, pad: str) -> Tensor:
    """Samples (S,) that fill at least one window of ``samples``.

    Args:
        waveform: (S,).
        samples: Length of a window.
        pad: Where a shorter clip gets zeros, "start" or "end"; "repeat": it is repeated; "both": any clip gets half a
            window of zeros on either side.
    """
    missing = max(samples - len(waveform), 0)
    if pad == "repeat":
        return waveform.repeat(-(-samples // len(waveform)))[:samples] if missing else waveform
    return F.pad(waveform, {"start": (missing, 0), "end": (0, missing), "both": (samples // 2, samples // 2)}[pad])


def embed(peer: Peer, waveforms: Sequence[Tensor], pad: str) -> list[np.ndarray]:
    """Embeddings (n, D) of the windows of each clip, samples (S,) in [-1, 1]. An end that fills none is left out."""
    windows = []
    for waveform in waveforms:
        spectrogram = peer.spectrogram(padded(waveform, peer.samples, pad))
        windows.append(spectrogram.unfold(0, peer.frames, peer.hop).transpose(1, 2))
    embeddings = peer.embed(torch.cat(windows)).numpy()
    return np.split(embeddings, np.cumsum([len(clip) for clip in windows])[:-1])


def embed_task(run: Run[ProbeOptions], peer: Peer, pad: str, path: Path) -> list[np.ndarray]:
    """Embeddings (n, D) of each clip of a task. What ``path`` holds of an interrupted run is not computed again."""
    identity = f"{run.audio.identity} {REQUIREMENTS.read_text()}"
    clips: list[np.ndarray] = []
    if path.exists():
        with np.load(path) as saved:
            if str(saved["identity"]) == identity:
                clips = np.split(saved["embeddings"], saved["counts"].cumsum())[:-1]

    def save(file: Path) -> None:
        with open(file, "wb") as stream:
            counts = np.array([len(clip) for clip in clips])
            np.savez(stream, identity=identity, embeddings=np.concatenate(clips), counts=counts)

    total, earlier, start = len(run.task.clips), len(clips), time.monotonic()
    next_save = start + _SAVE_SECONDS
    while len(clips) < total:
        batch = range(len(clips), min(len(clips) + _BATCH_CLIPS, total))
        clips += embed(peer, [waveform(run, clip) for clip in batch], pad)
        if (now := time.monotonic()) > next_save or len(clips) == total:
            rate = (len(clips) - earlier) / (now - start)
            left = (total - len(clips)) / rate
            run.log(f"padding {pad}: {len(clips)} of {total} clips, {rate:.0f} clips/s, {left:.0f} s left")
            atomic_write(path, save)
            next_save = now + _SAVE_SECONDS
    return clips


def waveform(run: Run[ProbeOptions], clip: int) -> Tensor:
    """Samples (S,) of a clip in [-1, 1]; one zero for a clip without audio, which no fold has."""
    parts = [run.audio.read([crop])[0][0].float() / 32768 for _, crop in run.audio.windows(clip, run.max_seconds)]
    return torch.cat(parts) if parts else torch.zeros(1)


def pooled(clips: Sequence[np.ndarray], pool: str) -> np.ndarray:
    """Features of the embeddings (n, D) of each clip: "mean", (clips, D); or "mean_max", both in turn, (clips, 2 D)."""
    mean = np.stack([clip.mean(0) for clip in clips])
    return mean if pool == "mean" else np.hstack([mean, np.stack([clip.max(0) for clip in clips])])


def best_fold(run: Run[ProbeOptions], settings: dict[tuple[str, str], np.ndarray], fold: Fold) -> FoldResult:
    """The result of the setting that is best on the validation clips, the first of equals.

    Args:
        run: Run whose clips are classified.
        settings: (padding, pooling) -> features of the clips.
        fold: Training, validation and test clips.
    """
    results = []
    for (pad, pool), features in settings.items():
        result = fit_fold(run, features, fold)
        result.selected = {"pad": pad, "pool": pool, **result.selected}
        results.append(result)
    return max(results, key=lambda result: result.valid_score)


class PeerGrid(Grid):
    """Runs missing cells of the frozen networks."""

    def downstream(self, cell: Cell) -> dict[str, Any]:
        peer = PEERS[cell.arm](fetch(self.cache))
        out = self.work / cell.name
        shutil.rmtree(out, ignore_errors=True)
        with Run(self.probe_options(cell, out), "probe") as run:
            settings = {}
            for pad in peer.pads:
                clips = embed_task(run, peer, pad, self.work / f"{cell.name}-{pad}.npz")
                settings |= {(pad, pool): pooled(clips, pool) for pool in peer.pools}
            results = [best_fold(run, settings, fold) for fold in run.folds]
            features = log_mel_features(run, sorted(set(range(len(run.task.clips))) - set(run.audio.missing)))
            log_mel = [fit_fold(run, features, fold) for fold in run.folds]
            summary = write_report(run, results, log_mel=log_mel)
        return self.outcome(summary, out)

    def probe_options(self, cell: Cell, out: Path) -> ProbeOptions:
        """Options of a probe. Its checkpoint is a model that nothing runs: a run has one, and ours is no MAE-AST."""
        unused = self.work / "unused"
        MAEAST(MAEASTConfig(embed_dim=12, encoder_layers=1, decoder_layers=1)).save_pretrained(unused)
        folder = self.bundle or self.cache / "tasks"
        return ProbeOptions(
            data=str(self.manifest(cell)), checkpoint=str(unused), out=str(out), root=str(folder), seed=cell.seed
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="run only cells whose names match this regular expression")
    parser.add_argument("--list", action="store_true", help="list finished and missing cells")
    parser.add_argument("--bundle", type=Path, help="folder with tasks/ and audio/: ready-made audio of the tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="embeddings (default: runs/peers)")
    arguments = parser.parse_args()
    grid = PeerGrid(arguments.work, RESULTS, arguments.bundle, 1.0)
    wanted = [cell for cell in cells() if re.search(arguments.match, cell.name)]
    grid.run_missing(wanted, list_only=arguments.list)


if __name__ == "__main__":
    main()
