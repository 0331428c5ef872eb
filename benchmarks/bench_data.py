"""Sound on its way into the model: decoding, resampling, log-mel, batches, and their share of a training run.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k bench_data --benchmark-json=benchmarks/results/data_cpu.json
python -m pytest benchmarks -k bench_data --benchmark-disable       every column once, on few clips

The recordings are tests/audio (40 clips, 189 s), or, with MAE_AST_FAST_BENCH_DATA=FOLDER, the first 200 files of a
folder (or .tsv). Files lie in the page cache: the disk is not measured. Seconds are those of all recordings.

    decode      mae_ast_fast.audio.decode of the recordings at 16 kHz in each format (m4a by FFmpeg, the rest by
                libsndfile). Lossless ones come back to the bit, others as long and as loud within tests/policy.py.
    resample    the same from WAV of 16, 44.1 and 48 kHz: what is on top of 16 kHz is soxr's; ``torchaudio`` reads the
                file by soundfile and takes torchaudio.functional.resample. Both are held to one pass over the whole
                clip (soxr HQ; torchaudio in fp64).
    fbank       torchaudio.compliance.kaldi.fbank clip by clip, as the paper's code, against mae_ast_fast.fbank of the
                padded int16 batch, on the CPU and, copy included, on a GPU. Held to Kaldi's clip by clip. Of the
                recordings as they are, and of clips of 10 s made of them.
    loader      a pass over the batches of 40 s: WAV files read by soundfile and padded, as the paper's code, against
                load_batch on the decoded cache. Held to the samples as decoded.
    run         updates of patch_tiny by TrainStep, with batches of 40 s as pretraining makes them; load_batch, fbank
                and update one after another and synchronised, so that on a GPU nothing overlaps: their share is the
                most that waiting for data can be. Held to Kaldi's log-mel; losses must be finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import DEVICE, ON_GPU, ROUNDS, Clock, Turns, load_average, synchronize
from policy import CODEC_RMS, CODEC_SECONDS, RESAMPLE_ABS, assert_fbank

from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep
from mae_ast_fast.audio import SAMPLE_RATE, decode, find_audio, to_pcm16
from mae_ast_fast.data import Clips, batch_plan, load_batch, scan
from mae_ast_fast.fbank import fbank, num_frames

SOURCE = os.environ.get("MAE_AST_FAST_BENCH_DATA") or Path(__file__).resolve().parent.parent / "tests" / "audio"
FILES = 200
TOY_FILES = 3
BATCH_SECONDS = 40.0
LOSSLESS = {"wav": {}, "flac": {}}
LOSSY = {"ogg": {"subtype": "VORBIS"}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {}}
RATES = (44100, 48000)


@cache
def recordings(count: int) -> list[np.ndarray]:
    """int16 samples at 16 kHz of the first so many files."""
    for library in ("soundfile", "soxr", "torchaudio"):
        pytest.importorskip(library, reason=f"needs {library}: pip install 'mae-ast-fast[train]'")
    return [to_pcm16(decode(entry.path)) for entry in find_audio(SOURCE)[:count]]


def to_float(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / 32768


def count_of(benchmark: Any) -> int:
    return TOY_FILES if benchmark.disabled else FILES


def time_columns(benchmark: Any, columns: dict[str, Callable[[], object]], pcm: list[np.ndarray]) -> None:
    """Times the columns in turn and keeps their samples."""
    turns = Turns(columns, wall=True, once=benchmark.disabled)
    benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"columns": turns.samples, "clips": len(pcm)}
    benchmark.extra_info["audio_seconds"] = sum(map(len, pcm)) / SAMPLE_RATE


# ------------------------------------------------------------------------------------------------- decode and resample


def write_m4a(path: Path, samples: np.ndarray) -> None:
    """AAC by FFmpeg."""
    import av

    with av.open(str(path), "w", format="ipod") as file:
        stream = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode()):
            file.mux(packet)


def write_formats(pcm: list[np.ndarray], folder: Path) -> dict[str, list[Path]]:
    """The recordings in each format that this machine can write."""
    import soundfile

    files = {name: [folder / f"{i}.{name}" for i in range(len(pcm))] for name in (*LOSSLESS, *LOSSY, "m4a")}
    for name, options in {**LOSSLESS, **LOSSY}.items():
        for path, samples in zip(files[name], pcm, strict=True):
            soundfile.write(path, samples, SAMPLE_RATE, **options)
    try:
        for path, samples in zip(files["m4a"], pcm, strict=True):
            write_m4a(path, to_float(samples))
    except ImportError:
        print("without the column m4a: needs av")
        del files["m4a"]
    return files


def check_decoded(name: str, found: np.ndarray, pcm: np.ndarray) -> None:
    """Raises AssertionError where what is decoded is not what was written."""
    if name in LOSSLESS:
        assert np.array_equal(to_pcm16(found), pcm), f"{name}: other samples than were written"
        return
    longer, louder = abs(len(found) - len(pcm)) / SAMPLE_RATE, abs(rms(found) - rms(to_float(pcm)))
    assert longer <= CODEC_SECONDS and louder <= CODEC_RMS, f"{name}: {longer:.3f} s and {louder:.3g} rms off"


def rms(samples: np.ndarray) -> float:
    return math.sqrt(np.square(samples, dtype=np.float64).mean())


@pytest.mark.timeout(300)
def bench_decode(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info):
        pcm = recordings(count_of(benchmark))
        files = write_formats(pcm, tmp_path)
        for name, paths in files.items():
            for path, samples in zip(paths, pcm, strict=True):
                check_decoded(name, decode(path), samples)
        columns = {name: lambda paths=paths: [decode(path) for path in paths] for name, paths in files.items()}
        time_columns(benchmark, columns, pcm)


@pytest.mark.timeout(300)
def bench_resample(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info):
        pcm = recordings(count_of(benchmark))
        import soundfile
        import soxr
        from torchaudio.functional import resample

        def by_torchaudio(path: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
            samples, rate = soundfile.read(path, dtype="float32")
            return resample(torch.from_numpy(samples).to(dtype), rate, SAMPLE_RATE).numpy()

        columns = {}
        for rate in (SAMPLE_RATE, *RATES):
            paths = [tmp_path / f"{i}-{rate}.wav" for i in range(len(pcm))]
            columns[f"{rate / 1000:g} kHz"] = lambda paths=paths: [decode(path) for path in paths]
            if rate in RATES:
                columns[f"{rate / 1000:g} kHz, torchaudio"] = lambda paths=paths: [
                    by_torchaudio(path) for path in paths
                ]
            for path, samples in zip(paths, pcm, strict=True):
                whole = to_float(samples)
                if rate != SAMPLE_RATE:
                    whole = soxr.resample(whole, SAMPLE_RATE, rate, quality="HQ")
                soundfile.write(path, whole, rate, subtype="FLOAT")
                once = soxr.resample(whole, rate, SAMPLE_RATE, quality="HQ")
                check_resampled(f"decode from {rate} Hz", decode(path), once)
                check_resampled(f"torchaudio from {rate} Hz", by_torchaudio(path), by_torchaudio(path, torch.float64))
        time_columns(benchmark, columns, pcm)


def check_resampled(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises AssertionError where samples differ, or more than one at the end is missing."""
    assert abs(len(found) - len(expected)) <= 1, f"{name}: {len(found)} samples, expected {len(expected)}"
    both = min(len(found), len(expected))
    error = np.abs(found[:both] - expected[:both]).max(initial=0.0)
    assert error <= RESAMPLE_ABS, f"{name}: {error:.3g} off, allowed {RESAMPLE_ABS:.3g}"


# --------------------------------------------------------------------------------------------------------------- fbank


def kaldi_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """As the paper's code calls it, of one clip (S,)."""
    from torchaudio.compliance import kaldi

    return kaldi.fbank(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False, num_mel_bins=128)


def check_fbank(features: torch.Tensor, frames: torch.Tensor, waveforms: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raises AssertionError where a clip's log-mel is not Kaldi's, or is not zero past its end."""
    for i, length in enumerate(lengths.tolist()):
        count = int(frames[i])
        assert_fbank(features[i, :count].cpu(), kaldi_fbank(waveforms[i, :length].float() / 32768), f"clip {i}")
        assert not features[i, count:].any(), f"clip {i}: not zero past its end"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("clips", ["recordings", "10 s"])
def bench_fbank(clips: str, benchmark: Any) -> None:
    with load_average(benchmark.extra_info):
        pcm = [samples for samples in recordings(count_of(benchmark)) if num_frames(len(samples)) > 0]
        if clips == "10 s":
            whole = np.concatenate(pcm)
            pieces = len(whole) // (10 * SAMPLE_RATE) if benchmark.enabled else 1
            pcm = np.resize(whole, (max(pieces, 1), 10 * SAMPLE_RATE)).tolist()
            pcm = [np.asarray(samples, np.int16) for samples in pcm]
        lengths = torch.tensor(list(map(len, pcm)))
        waveforms = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in pcm], batch_first=True)
        each = [torch.from_numpy(to_float(samples)) for samples in pcm]
        columns = {
            "kaldi, clip by clip": lambda: [kaldi_fbank(waveform) for waveform in each],
            "fbank": lambda: fbank(waveforms, lengths),
        }
        if ON_GPU:
            columns["fbank, GPU"] = lambda: fbank(waveforms.to(DEVICE), lengths)
        for name, column in columns.items():
            if name != "kaldi, clip by clip":
                check_fbank(*column(), waveforms, lengths)
        time_columns(benchmark, columns, pcm)


# ------------------------------------------------------------------------------------------------------ loader and run


def make_cache(count: int, folder: Path) -> tuple[Clips, list[np.ndarray]]:
    """The decoded cache and the batches of one epoch."""
    recordings(1)  # skips where a library is missing
    clips = scan(find_audio(SOURCE)[:count], folder, progress=False)
    return clips, batch_plan(clips.samples, BATCH_SECONDS)


@pytest.mark.timeout(300)
def bench_loader(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info):
        clips, plan = make_cache(count_of(benchmark), tmp_path / "cache")
        import soundfile

        paths = [tmp_path / f"{i}.wav" for i in range(len(clips))]
        for path, entry in zip(paths, clips.entries, strict=True):
            soundfile.write(path, to_pcm16(decode(entry.path)), SAMPLE_RATE)

        def read_files(batch: np.ndarray) -> torch.Tensor:
            rows = []
            for clip, start, length in batch.tolist():
                samples, _ = soundfile.read(paths[clip], frames=length, start=start, dtype="float32")
                rows.append(torch.from_numpy(samples))
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        for batch in plan:
            waveforms, lengths, _, names = load_batch(clips, batch)
            assert lengths.tolist() == batch[:, 2].tolist() and names == [clips.names[i] for i in batch[:, 0]]
            assert torch.equal(waveforms.float() / 32768, read_files(batch)), "load_batch: other samples than decoded"
        columns = {
            "WAV files": lambda: [read_files(batch) for batch in plan],
            "load_batch": lambda: [load_batch(clips, batch) for batch in plan],
        }
        pcm = [np.zeros(length, np.int16) for batch in plan for length in batch[:, 2].tolist()]
        time_columns(benchmark, columns, pcm)


@pytest.mark.timeout(600)
def bench_run(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info):
        clips, plan = make_cache(count_of(benchmark), tmp_path / "cache")
        plan = plan[: 5 if benchmark.enabled else 1]
        torch.manual_seed(0)
        config = MAEASTConfig.preset("patch_tiny", **({"encoder_layers": 1} if benchmark.disabled else {}))
        update = TrainStep(MAEAST(config).to(DEVICE).train(), 1e-4)
        waveforms, lengths, *_ = load_batch(clips, plan[0])
        check_fbank(*fbank(waveforms.to(DEVICE), lengths), waveforms, lengths)
        stages: list[dict[str, float]] = []

        def epoch() -> None:
            clock = Clock()

            def ended(stage: str) -> None:
                synchronize()
                clock(stage)

            for batch in plan:
                waveforms, lengths, ids, _ = load_batch(clips, batch)
                ended("load_batch")
                features, _ = fbank(waveforms.to(DEVICE), lengths)
                ended("fbank")
                numbers = update(features, num_frames(lengths), seed=0, clip_ids=ids.to(DEVICE), epoch=len(stages))
                loss = numbers.loss.item()
                ended("update")
                assert math.isfinite(loss), f"loss {loss}"
            stages.append(dict(clock.seconds))

        pcm = [np.zeros(length, np.int16) for batch in plan for length in batch[:, 2].tolist()]
        turns = Turns({"updates": epoch}, wall=True, once=True)
        stages.clear()  # of the warm-up
        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"columns": turns.samples, "clips": len(pcm), "stages": stages, "updates": len(plan)}
    benchmark.extra_info["audio_seconds"] = sum(map(len, pcm)) / SAMPLE_RATE
