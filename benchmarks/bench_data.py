"""Input pipeline: decoding, resampling, log-mel, batches, and their share of the time of a training run.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k bench_data --benchmark-json=benchmarks/results/data_cpu.json
python -m pytest benchmarks -k bench_data --benchmark-disable       every column once, on few clips

The recordings are tests/audio (40 clips, 189 s) or, with MAE_AST_FAST_BENCH_DATA=FOLDER, the first 200 files of a
folder (or .tsv). Files are in the page cache, so the disk is not measured. Seconds are for all recordings together.

    decode      mae_ast_fast.data.audio.decode of the recordings at 16 kHz in each format (m4a by FFmpeg, the rest by
                libsndfile). Lossless formats must decode to identical samples, others to the same length and
                loudness within tests/common/policy.py.
    resample    the same from WAV of 16, 44.1 and 48 kHz: the time above that of 16 kHz is soxr's. ``torchaudio`` reads
                the file with soundfile and uses torchaudio.functional.resample. Both are compared with one pass over
                the whole clip (soxr HQ; torchaudio in fp64).
    fbank       torchaudio.compliance.kaldi.fbank clip by clip, as in the paper's code, against mae_ast_fast.fbank of
                the padded int16 batch, on the CPU and, copy included, on a GPU. Every clip is compared with Kaldi's.
                On the recordings as they are, and on clips of 10 s made of them.
    loader      batches of 160 s on one thread, in one case, so that all columns take turns. ``official`` is the paper's
                data set: each clip's FLAC file is decoded (soundfile) and goes through torchaudio's fbank. Clips are
                padded to a batch; the paper crops to the shortest and so gets less audio for the same work.
                ``read`` is the work of our loader's worker, Shards.read to int16 batches; ``loader`` adds the sampler
                and the manifests; fbank then runs on the training device. Columns with ``+ fbank`` end in the same
                log-mel as ``official``; ``FLAC files + fbank`` uses no shards, which separates fbank's share. Samples
                are compared with the FLAC files, log-mel with the official column. On the recordings (up to 15.6 s, as
                the paper crops), and on clips of 10 s made of them, several copies of each.
    sampler     Lhotse's bucketing sampler over the manifests only, which each training process runs over all clips.
                Batches must respect the budget, and every clip must come once.
    run         pretrain() as users run it, patch_tiny with batches of 40 s, with one reading worker and without: the
                share of waiting for data in summary.json. Losses must be finite, the share must match metrics.jsonl.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import DEVICE, ON_GPU, ROUNDS, Turns, load_average
from policy import CODEC_RMS, CODEC_SECONDS, RESAMPLE_ABS, assert_fbank
from torch import Tensor

from mae_ast_fast.cli.parser import TRAIN_EXTRA
from mae_ast_fast.data.audio import SAMPLE_RATE, AudioFile, decode, find_audio, to_pcm16
from mae_ast_fast.data.loader import BatchLoader
from mae_ast_fast.data.prepare import prepare_shards
from mae_ast_fast.data.shards import Batch, Crop, Shards
from mae_ast_fast.ops.fbank import fbank, num_frames
from mae_ast_fast.training.metrics_log import read_metrics
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

SOURCE = os.environ.get("MAE_AST_FAST_BENCH_DATA") or Path(__file__).resolve().parent.parent / "tests" / "audio"
FILES = 200
TOY_FILES = 3
COPIES = 4  # of each clip in the shards; otherwise a pass would stay in the CPU's caches
CROP = 250_000  # samples; the paper's max_sample_size
BATCHES = {"batch_seconds": 160.0, "max_seconds": CROP / SAMPLE_RATE, "min_seconds": 0.025, "seed": 0}
GOAL = 10.0  # speed relative to the official column: int16 batches from PCM16 shards, on one thread
WINDOWS = 20_000  # number of crops that the sampler is timed on
UPDATES = 10
ROUNDED = 1e-3  # largest error of a share by rounding in metrics.jsonl
LOSSLESS = {"wav": {}, "flac": {}}
LOSSY = {"ogg": {"subtype": "VORBIS"}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {}}
RATES = (44100, 48000)


@cache
def recordings(count: int) -> list[np.ndarray]:
    """int16 samples at 16 kHz of the first ``count`` files."""
    for package in (*TRAIN_EXTRA, "torchaudio"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'mae-ast-fast[train]'")
    return [to_pcm16(decode(file.path)) for file in find_audio(SOURCE)[:count]]


def to_float(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / 32768


def count_of(benchmark: Any) -> int:
    return TOY_FILES if benchmark.disabled else FILES


def clips_of(clip_set: str, benchmark: Any) -> list[np.ndarray]:
    """int16 samples of the recordings with at least one frame ("recordings"), or of 10 s clips made of them."""
    pcm = [samples for samples in recordings(count_of(benchmark)) if num_frames(len(samples)) > 0]
    if clip_set == "recordings":
        return pcm
    concatenated = np.concatenate(pcm)
    num_clips = len(concatenated) // (10 * SAMPLE_RATE) if benchmark.enabled else 1
    return list(np.resize(concatenated, (max(num_clips, 1), 10 * SAMPLE_RATE)))


def time_columns(benchmark: Any, columns: dict[str, Callable[[], object]], pcm: list[np.ndarray]) -> None:
    """Time the columns in turn, and store the samples."""
    turns = Turns(columns, host_clock=True, single=benchmark.disabled)
    benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"columns": turns.samples, "clips": len(pcm)}
    benchmark.extra_info["audio_seconds"] = sum(map(len, pcm)) / SAMPLE_RATE


# ------------------------------------------------------------------------------------------------- decode and resample


def write_m4a(path: Path, samples: np.ndarray) -> None:
    """Write AAC with FFmpeg."""
    import av

    with av.open(str(path), "w", format="ipod") as file:
        stream = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode()):
            file.mux(packet)


def write_formats(pcm: list[np.ndarray], folder: Path) -> dict[str, list[Path]]:
    """Write the recordings in each format that this machine supports; returns format -> files."""
    import soundfile

    files = {name: [folder / f"{i}.{name}" for i in range(len(pcm))] for name in (*LOSSLESS, *LOSSY, "m4a")}
    for name, options in {**LOSSLESS, **LOSSY}.items():
        for path, samples in zip(files[name], pcm, strict=True):
            soundfile.write(path, samples, SAMPLE_RATE, **options)
    try:
        for path, samples in zip(files["m4a"], pcm, strict=True):
            write_m4a(path, to_float(samples))
    except ImportError:
        print("column m4a left out: needs av")
        del files["m4a"]
    return files


def check_decoded(name: str, decoded: np.ndarray, pcm: np.ndarray) -> None:
    """Raise AssertionError if the decoded samples differ from those written."""
    if name in LOSSLESS:
        assert np.array_equal(to_pcm16(decoded), pcm), f"{name}: decoded samples differ from those written"
        return
    length_error, rms_error = abs(len(decoded) - len(pcm)) / SAMPLE_RATE, abs(rms(decoded) - rms(to_float(pcm)))
    assert length_error <= CODEC_SECONDS and rms_error <= CODEC_RMS, (
        f"{name}: {length_error:.3f} s and {rms_error:.3g} rms off"
    )


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
                recording = to_float(samples)
                if rate != SAMPLE_RATE:
                    recording = soxr.resample(recording, SAMPLE_RATE, rate, quality="HQ")
                soundfile.write(path, recording, rate, subtype="FLOAT")
                expected = soxr.resample(recording, rate, SAMPLE_RATE, quality="HQ")
                check_resampled(f"decode from {rate} Hz", decode(path), expected)
                check_resampled(f"torchaudio from {rate} Hz", by_torchaudio(path), by_torchaudio(path, torch.float64))
        time_columns(benchmark, columns, pcm)


def check_resampled(name: str, resampled: np.ndarray, expected: np.ndarray) -> None:
    """Raise AssertionError if samples differ, or the lengths differ by more than one sample."""
    assert abs(len(resampled) - len(expected)) <= 1, f"{name}: {len(resampled)} samples, expected {len(expected)}"
    common = min(len(resampled), len(expected))
    error = np.abs(resampled[:common] - expected[:common]).max(initial=0.0)
    assert error <= RESAMPLE_ABS, f"{name}: {error:.3g} off, allowed {RESAMPLE_ABS:.3g}"


# --------------------------------------------------------------------------------------------------------------- fbank


def kaldi_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel of one clip (S,), with the arguments of the paper's code."""
    from torchaudio.compliance import kaldi

    return kaldi.fbank(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False, num_mel_bins=128)


def check_fbank(
    log_mel: torch.Tensor, frame_counts: torch.Tensor, waveforms: torch.Tensor, num_samples: torch.Tensor
) -> None:
    """Raise AssertionError if a clip's log-mel differs from Kaldi's, or is not zero past its end."""
    for i, clip_samples in enumerate(num_samples.tolist()):
        clip_frames = int(frame_counts[i])
        assert_fbank(
            log_mel[i, :clip_frames].cpu(), kaldi_fbank(waveforms[i, :clip_samples].float() / 32768), f"clip {i}"
        )
        assert not log_mel[i, clip_frames:].any(), f"clip {i}: not zero past its end"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("clip_set", ["recordings", "10 s"])
def bench_fbank(clip_set: str, benchmark: Any) -> None:
    with load_average(benchmark.extra_info):
        pcm = clips_of(clip_set, benchmark)
        num_samples = torch.tensor(list(map(len, pcm)))
        waveforms = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(samples) for samples in pcm], batch_first=True)
        clip_waveforms = [torch.from_numpy(to_float(samples)) for samples in pcm]
        columns = {
            "kaldi, clip by clip": lambda: [kaldi_fbank(waveform) for waveform in clip_waveforms],
            "fbank": lambda: fbank(waveforms, num_samples),
        }
        if ON_GPU:
            columns["fbank, GPU"] = lambda: fbank(waveforms.to(DEVICE), num_samples)
        for name, column in columns.items():
            if name != "kaldi, clip by clip":
                log_mel, frame_counts = column()
                check_fbank(log_mel, frame_counts, waveforms, num_samples)
        time_columns(benchmark, columns, pcm)


# -------------------------------------------------------------------------------------------------- loader and sampler


@contextmanager
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def many_clips(clip_set: str, benchmark: Any) -> list[np.ndarray]:
    """The first 15.6 s of each clip, ``COPIES`` times."""
    return [samples[:CROP] for samples in clips_of(clip_set, benchmark)] * (COPIES if benchmark.enabled else 1)


def exhaust(iterable: Iterable[object]) -> None:
    """Iterate to the end, keeping nothing."""
    deque(iterable, maxlen=0)


def write_flac(pcm: list[np.ndarray], folder: Path) -> Path:
    """Write each clip to a FLAC file; returns the folder."""
    import soundfile

    folder.mkdir()
    for i, samples in enumerate(pcm):
        soundfile.write(folder / f"{i}.flac", samples, SAMPLE_RATE)
    return folder


def make_shards(flac: Path, folder: Path, codec: str, clips: int) -> Shards:
    """Shards of a folder's files, none of them held out."""

    def train_on_all(usable: Sequence[AudioFile]) -> tuple[np.ndarray, np.ndarray, str]:
        return np.arange(len(usable)), np.arange(0), "nothing is held out"

    report = prepare_shards(flac, folder, codec=codec, min_seconds=0.0, split=train_on_all, progress=False)
    assert report["clips"] == report["pieces"] == clips, f"{report['pieces']} pieces of {clips} clips"
    return Shards(folder)


def read_flac(path: Path, dtype: str) -> Tensor:
    """Samples (S,) of a file."""
    import soundfile

    return torch.from_numpy(soundfile.read(path, dtype=dtype)[0])


def pad(waveforms: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)


def check_batches(batches: Iterable[Batch], order: list[list[str]], flac: Path) -> None:
    """Raise AssertionError if batches do not hold the samples of all files, each once, in this order."""
    names = []
    for batch in batches:
        assert not batch.faults, f"faults: {batch.faults}"
        names.append(batch.names)
        for waveform, num_samples, name in zip(batch.waveforms, batch.num_samples.tolist(), batch.names, strict=True):
            assert torch.equal(waveform[:num_samples], read_flac(flac / name, "int16")), (
                f"{name}: samples differ from the file"
            )
            assert not waveform[num_samples:].any(), f"{name}: not zero past its end"
    assert names == order, "wrong clips, or wrong order"
    loaded, expected = sorted(itertools.chain(*names)), sorted(path.name for path in flac.iterdir())
    assert loaded == expected, f"{len(loaded)} clips of {len(expected)} files"


def check_features(name: str, log_mels: Iterable[Tensor], expected_log_mels: Iterable[Tensor]) -> None:
    """Raise AssertionError if a batch's log-mel differs from the official column's."""
    for index, (log_mel, expected) in enumerate(zip(log_mels, expected_log_mels, strict=True)):
        assert_fbank(log_mel.cpu(), expected, f"{name}, batch {index}")


def feature_columns(
    flac: Path, order: list[list[str]], shards: dict[str, Shards], batches: dict[str, list[list[Crop]]]
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Column name -> function that yields log-mel (B, T, 128) batch by batch."""

    def official() -> Iterator[Tensor]:
        for names in order:
            yield pad([kaldi_fbank(read_flac(flac / name, "float32")) for name in names])

    def from_files() -> Iterator[Tensor]:
        for names in order:
            waveforms = [read_flac(flac / name, "int16") for name in names]
            yield fbank(pad(waveforms), torch.tensor(list(map(len, waveforms))))[0]

    def from_shards(codec: str, device: str | torch.device) -> Iterator[Tensor]:
        for crops in batches[codec]:
            batch = shards[codec].read(crops)
            yield fbank(batch.waveforms.to(device), batch.num_samples)[0]

    columns = {
        "official": official,
        "FLAC files + fbank": from_files,
        "FLAC shards + fbank": lambda: from_shards("flac", "cpu"),
        "PCM16 shards + fbank": lambda: from_shards("wav", "cpu"),
    }
    return columns | ({"PCM16 shards + fbank, GPU": lambda: from_shards("wav", DEVICE)} if ON_GPU else {})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("clip_set", ["recordings", "10 s"])
def bench_loader(clip_set: str, benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info), one_thread():
        pcm = many_clips(clip_set, benchmark)
        flac = write_flac(pcm, tmp_path / "files")
        shards = {codec: make_shards(flac, tmp_path / codec, codec, len(pcm)) for codec in ("wav", "flac")}
        batches = {codec: list(shards_of_codec.batches(**BATCHES)) for codec, shards_of_codec in shards.items()}
        order = [[crop.segment.name for crop in crops] for crops in batches["wav"]]

        def read(codec: str) -> Iterator[Batch]:
            return map(shards[codec].read, batches[codec])

        def load(codec: str) -> Iterator[Batch]:
            return (batch for batch, _ in itertools.islice(BatchLoader(shards[codec], **BATCHES), len(order)))

        log_mel_columns = feature_columns(flac, order, shards, batches)
        for codec in shards:
            check_batches(read(codec), order, flac)
            check_batches(load(codec), order, flac)
        for name, column in log_mel_columns.items():
            if name != "official":
                check_features(name, column(), log_mel_columns["official"]())
        columns = {name: lambda column=column: exhaust(column()) for name, column in log_mel_columns.items()}
        for codec, label in (("flac", "FLAC"), ("wav", "PCM16")):
            columns[f"{label} shards, read"] = lambda codec=codec: exhaust(read(codec))
            columns[f"{label} shards, loader"] = lambda codec=codec: exhaust(load(codec))
        time_columns(benchmark, columns, pcm)
        benchmark.extra_info["goal"] = ["PCM16 shards, loader", GOAL]


def check_plan(batches: Iterable[list[Crop]], clips: int, times: int) -> None:
    """Raise AssertionError if a batch exceeds the budget, or a clip does not come uncropped and ``times`` times."""
    counts: Counter[str] = Counter()
    for crops in batches:
        seconds = sum(crop.duration for crop in crops)
        assert seconds <= BATCHES["batch_seconds"], f"a batch of {seconds:.2f} s"
        assert all(crop.num_samples == crop.segment.num_samples for crop in crops), "a clip is cropped"
        counts.update(crop.segment.id for crop in crops)
    assert len(counts) == clips and set(counts.values()) == {times}, (
        f"{len(counts)} of {clips} clips, {set(counts.values())}"
    )


@pytest.mark.timeout(300)
def bench_sampler(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info), one_thread():
        pcm = many_clips("recordings", benchmark)
        shards = make_shards(write_flac(pcm, tmp_path / "files"), tmp_path / "shards", "wav", len(pcm))
        times = -(-WINDOWS // len(pcm)) if benchmark.enabled else 100  # several batches in both cases
        shards.shards *= times  # the same manifests repeatedly
        check_plan(shards.batches(**BATCHES), len(pcm), times)
        time_columns(benchmark, {"windows": lambda: exhaust(shards.batches(**BATCHES))}, pcm * times)


# ----------------------------------------------------------------------------------------------------------------- run


def update_seconds(row: dict[str, Any]) -> float:
    """Seconds of an update: the mean over those written together."""
    return row["clips"] / row["clips_per_second"]


def share_waited(rows: list[dict[str, Any]]) -> float:
    """Share of the time of these updates spent waiting for data."""
    return sum(row["waited"] for row in rows) / sum(map(update_seconds, rows))


def check_run(summary: dict[str, Any], rows: list[dict[str, Any]], updates: int) -> None:
    """Raise AssertionError if a run did not make its updates, or its summary has a wrong share."""
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, updates + 1)), f"updates {steps}, expected {updates}"
    assert all(math.isfinite(row["loss"]) for row in rows), f"losses {[row['loss'] for row in rows]}"
    assert not sum(row["faults"] for row in rows), "clips that cannot be read"
    reported, measured = summary["data_wait_share"], share_waited(rows)
    assert abs(reported - measured) <= ROUNDED, (
        f"waiting share {reported} in summary.json, {measured:.4f} in metrics.jsonl"
    )


@pytest.mark.timeout(600)
def bench_run(benchmark: Any, tmp_path: Path) -> None:
    updates = UPDATES if benchmark.enabled else 2
    model_args = {} if benchmark.enabled else {"encoder_layers": 1}
    run_ids = itertools.count()
    columns: dict[str, dict[str, list[float]]] = {}
    with load_average(benchmark.extra_info):
        flac = write_flac(many_clips("recordings", benchmark), tmp_path / "files")
        prepare_shards(flac, tmp_path / "shards", progress=False)

        def run(workers: int) -> None:
            options = PretrainOptions(
                data=str(tmp_path / "shards"),
                out=str(tmp_path / f"run-{next(run_ids)}"),
                preset="patch_tiny",
                model_args=model_args,
                steps=updates,
                batch_seconds=40.0 if benchmark.enabled else 10.0,
                max_seconds=10.0,
                log_every=updates // 2,
                device=DEVICE.type,
                loader_workers=workers,
            )
            summary = pretrain(options)
            rows = [row for row in read_metrics(Path(options.out) / "metrics.jsonl") if "loss" in row]
            check_run(summary, rows, updates)
            name = "1 worker" if workers else "no worker"
            column = columns.setdefault(name, {"seconds": [], "waiting": [], "waiting_later": []})
            column["seconds"].append(sum(map(update_seconds, rows)))
            column["waiting"].append(summary["data_wait_share"])
            column["waiting_later"].append(share_waited(rows[updates // 2 :]))
            totals = {"clips": sum(row["clips"] for row in rows), "updates": updates}
            benchmark.extra_info |= totals | {"audio_seconds": sum(row["audio_seconds"] for row in rows)}

        worker_counts = (0, 1) if benchmark.enabled else (1,)
        benchmark.pedantic(lambda: [run(workers) for workers in worker_counts], rounds=ROUNDS)
    benchmark.extra_info["columns"] = columns
