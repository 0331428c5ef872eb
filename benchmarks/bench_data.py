"""Sound on its way into the model: decoding, resampling, log-mel, batches, and their share of a training run.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k bench_data --benchmark-json=benchmarks/results/data_cpu.json
python -m pytest benchmarks -k bench_data --benchmark-disable       every column once, on few clips

The recordings are tests/audio (40 clips, 189 s), or, with MAE_AST_FAST_BENCH_DATA=FOLDER, the first 200 files of a
folder (or .tsv). Files lie in the page cache: the disk is not measured. Seconds are those of all recordings.

    decode      mae_ast_fast.data.audio.decode of the recordings at 16 kHz in each format (m4a by FFmpeg, the rest by
                libsndfile). Lossless ones come back to the bit, others as long and as loud within
                tests/common/policy.py.
    resample    the same from WAV of 16, 44.1 and 48 kHz: what is on top of 16 kHz is soxr's; ``torchaudio`` reads the
                file by soundfile and takes torchaudio.functional.resample. Both are held to one pass over the whole
                clip (soxr HQ; torchaudio in fp64).
    fbank       torchaudio.compliance.kaldi.fbank clip by clip, as the paper's code, against mae_ast_fast.fbank of the
                padded int16 batch, on the CPU and, copy included, on a GPU. Held to Kaldi's clip by clip. Of the
                recordings as they are, and of clips of 10 s made of them.
    loader      batches of 160 s on one thread, in one case so that all columns take turns. ``official`` is the paper's
                data set: each clip's FLAC file is decoded (soundfile) and goes through torchaudio's fbank; padded to a
                batch, where the paper crops to the shortest and so gets less audio for the same work.
                ``read`` is what a worker of ours does, Shards.read to int16 batches; ``loader`` is the sampler, the
                manifests and that; fbank then runs on the training device. With ``+ fbank`` both ways end in the same
                features; ``FLAC files + fbank`` has no shards, so that it tells fbank's part from theirs. Held to the
                FLAC files, sample by sample and clip by clip, and features to the official ones. Of the recordings
                (to 15.6 s, as the paper crops), and of clips of 10 s made of them, several copies of each.
    sampler     Lhotse's bucketing sampler over the manifests alone, which each training process runs over all clips.
                Held to the budget, and to every clip coming once.
    run         pretrain() as users run it, patch_tiny with batches of 40 s, with a worker that reads and without: what
                summary.json tells of waiting for data. Held to finite losses and to metrics.jsonl.
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
from mae_ast_fast.data.loader import loader
from mae_ast_fast.data.prepare import prepare_shards
from mae_ast_fast.data.shards import Batch, Crop, Shards
from mae_ast_fast.ops.fbank import fbank, num_frames
from mae_ast_fast.training.metrics_log import read_metrics
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

SOURCE = os.environ.get("MAE_AST_FAST_BENCH_DATA") or Path(__file__).resolve().parent.parent / "tests" / "audio"
FILES = 200
TOY_FILES = 3
COPIES = 4  # of each clip in the shards, or a pass would stay in the CPU's caches
CROP = 250_000  # samples; the paper's max_sample_size
BATCHES = {"batch_seconds": 160.0, "max_seconds": CROP / SAMPLE_RATE, "min_seconds": 0.025, "seed": 0}
GOAL = 10.0  # times as fast as the official way: int16 batches out of PCM16 shards, on one thread
WINDOWS = 20_000  # that the sampler is timed on
UPDATES = 10
ROUNDED = 1e-3  # of a share: what rounding in metrics.jsonl makes of it
LOSSLESS = {"wav": {}, "flac": {}}
LOSSY = {"ogg": {"subtype": "VORBIS"}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {}}
RATES = (44100, 48000)


@cache
def recordings(count: int) -> list[np.ndarray]:
    """int16 samples at 16 kHz of the first so many files."""
    for library in (*TRAIN_EXTRA, "torchaudio"):
        pytest.importorskip(library, reason=f"needs {library}: pip install 'mae-ast-fast[train]'")
    return [to_pcm16(decode(entry.path)) for entry in find_audio(SOURCE)[:count]]


def to_float(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / 32768


def count_of(benchmark: Any) -> int:
    return TOY_FILES if benchmark.disabled else FILES


def clips_of(kind: str, benchmark: Any) -> list[np.ndarray]:
    """int16 samples: the recordings that give a frame, or clips of 10 s made of them."""
    pcm = [samples for samples in recordings(count_of(benchmark)) if num_frames(len(samples)) > 0]
    if kind == "recordings":
        return pcm
    whole = np.concatenate(pcm)
    pieces = len(whole) // (10 * SAMPLE_RATE) if benchmark.enabled else 1
    return list(np.resize(whole, (max(pieces, 1), 10 * SAMPLE_RATE)))


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
        pcm = clips_of(clips, benchmark)
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


# -------------------------------------------------------------------------------------------------- loader and sampler


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def many_clips(kind: str, benchmark: Any) -> list[np.ndarray]:
    """The first 15.6 s of each clip, several times."""
    return [samples[:CROP] for samples in clips_of(kind, benchmark)] * (COPIES if benchmark.enabled else 1)


def exhaust(values: Iterable[object]) -> None:
    """To the end, keeping nothing."""
    deque(values, maxlen=0)


def write_flac(pcm: list[np.ndarray], folder: Path) -> Path:
    """A file of each clip."""
    import soundfile

    folder.mkdir()
    for i, samples in enumerate(pcm):
        soundfile.write(folder / f"{i}.flac", samples, SAMPLE_RATE)
    return folder


def make_shards(flac: Path, folder: Path, codec: str, clips: int) -> Shards:
    """Shards of the files of a folder, none of them held out."""

    def everything(usable: Sequence[AudioFile]) -> tuple[np.ndarray, np.ndarray, str]:
        return np.arange(len(usable)), np.arange(0), "nothing is held out"

    report = prepare_shards(flac, folder, codec=codec, min_seconds=0.0, split=everything, progress=False)
    assert report["clips"] == report["pieces"] == clips, f"{report['pieces']} pieces of {clips} clips"
    return Shards(folder)


def read_flac(path: Path, dtype: str) -> Tensor:
    """(S,) samples of a file."""
    import soundfile

    return torch.from_numpy(soundfile.read(path, dtype=dtype)[0])


def pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def check_batches(batches: Iterable[Batch], order: list[list[str]], flac: Path) -> None:
    """Raises AssertionError where batches are not the samples of the files, each once, in this order."""
    names = []
    for batch in batches:
        assert not batch.faults, f"faults: {batch.faults}"
        names.append(batch.names)
        for row, length, name in zip(batch.waveforms, batch.num_samples.tolist(), batch.names, strict=True):
            assert torch.equal(row[:length], read_flac(flac / name, "int16")), f"{name}: other samples than in the file"
            assert not row[length:].any(), f"{name}: not zero past its end"
    assert names == order, "other clips, or in another order"
    came, there = sorted(itertools.chain(*names)), sorted(path.name for path in flac.iterdir())
    assert came == there, f"{len(came)} clips of {len(there)} files"


def check_features(name: str, found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Raises AssertionError where a batch's features are not the official ones."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_fbank(ours.cpu(), theirs, f"{name}, batch {number}")


def feature_columns(
    flac: Path, order: list[list[str]], shards: dict[str, Shards], batches: dict[str, list[list[Crop]]]
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """What ends in features (B, T, 128), batch after batch."""

    def official() -> Iterator[Tensor]:
        for names in order:
            yield pad([kaldi_fbank(read_flac(flac / name, "float32")) for name in names])

    def from_files() -> Iterator[Tensor]:
        for names in order:
            rows = [read_flac(flac / name, "int16") for name in names]
            yield fbank(pad(rows), torch.tensor(list(map(len, rows))))[0]

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
@pytest.mark.parametrize("clips", ["recordings", "10 s"])
def bench_loader(clips: str, benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info), one_thread():
        pcm = many_clips(clips, benchmark)
        flac = write_flac(pcm, tmp_path / "files")
        shards = {codec: make_shards(flac, tmp_path / codec, codec, len(pcm)) for codec in ("wav", "flac")}
        batches = {codec: list(found.batches(**BATCHES)) for codec, found in shards.items()}
        order = [[crop.segment.name for crop in crops] for crops in batches["wav"]]

        def read(codec: str) -> Iterator[Batch]:
            return map(shards[codec].read, batches[codec])

        def load(codec: str) -> Iterator[Batch]:
            return (batch for batch, _ in itertools.islice(loader(shards[codec], **BATCHES), len(order)))

        features = feature_columns(flac, order, shards, batches)
        for codec in shards:
            check_batches(read(codec), order, flac)
            check_batches(load(codec), order, flac)
        for name, column in features.items():
            if name != "official":
                check_features(name, column(), features["official"]())
        columns = {name: lambda column=column: exhaust(column()) for name, column in features.items()}
        for codec, called in (("flac", "FLAC"), ("wav", "PCM16")):
            columns[f"{called} shards, read"] = lambda codec=codec: exhaust(read(codec))
            columns[f"{called} shards, loader"] = lambda codec=codec: exhaust(load(codec))
        time_columns(benchmark, columns, pcm)
        benchmark.extra_info["goal"] = ["PCM16 shards, loader", GOAL]


def check_plan(batches: Iterable[list[Crop]], clips: int, times: int) -> None:
    """Raises AssertionError where a batch exceeds the budget, or a clip does not come whole and so many times."""
    seen: Counter[str] = Counter()
    for crops in batches:
        seconds = sum(crop.duration for crop in crops)
        assert seconds <= BATCHES["batch_seconds"], f"a batch of {seconds:.2f} s"
        assert all(crop.num_samples == crop.segment.num_samples for crop in crops), "a clip in parts"
        seen.update(crop.segment.id for crop in crops)
    assert len(seen) == clips and set(seen.values()) == {times}, f"{len(seen)} of {clips} clips, {set(seen.values())}"


@pytest.mark.timeout(300)
def bench_sampler(benchmark: Any, tmp_path: Path) -> None:
    with load_average(benchmark.extra_info), one_thread():
        pcm = many_clips("recordings", benchmark)
        shards = make_shards(write_flac(pcm, tmp_path / "files"), tmp_path / "shards", "wav", len(pcm))
        times = -(-WINDOWS // len(pcm)) if benchmark.enabled else 100  # of either, several batches
        shards.shards *= times  # the same manifests again and again
        check_plan(shards.batches(**BATCHES), len(pcm), times)
        time_columns(benchmark, {"windows": lambda: exhaust(shards.batches(**BATCHES))}, pcm * times)


# ----------------------------------------------------------------------------------------------------------------- run


def spent(row: dict[str, Any]) -> float:
    """Seconds of an update, the mean of those that were written together."""
    return row["clips"] / row["clips_per_second"]


def share_waited(rows: list[dict[str, Any]]) -> float:
    """Of the time of these updates, what went into waiting for data."""
    return sum(row["waited"] for row in rows) / sum(map(spent, rows))


def check_run(summary: dict[str, Any], rows: list[dict[str, Any]], updates: int) -> None:
    """Raises AssertionError where a run did not do its updates, or its summary tells of another share."""
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, updates + 1)), f"updates {steps}, expected {updates}"
    assert all(math.isfinite(row["loss"]) for row in rows), f"losses {[row['loss'] for row in rows]}"
    assert not sum(row["faults"] for row in rows), "clips that cannot be read"
    told, found = summary["data_wait_share"], share_waited(rows)
    assert abs(told - found) <= ROUNDED, f"a share of {told} in summary.json, of {found:.4f} in metrics.jsonl"


@pytest.mark.timeout(600)
def bench_run(benchmark: Any, tmp_path: Path) -> None:
    updates = UPDATES if benchmark.enabled else 2
    small = {} if benchmark.enabled else {"encoder_layers": 1}
    runs = itertools.count()
    columns: dict[str, dict[str, list[float]]] = {}
    with load_average(benchmark.extra_info):
        flac = write_flac(many_clips("recordings", benchmark), tmp_path / "files")
        prepare_shards(flac, tmp_path / "shards", progress=False)

        def run(workers: int) -> None:
            options = PretrainOptions(
                data=str(tmp_path / "shards"),
                out=str(tmp_path / f"run-{next(runs)}"),
                preset="patch_tiny",
                model_args=small,
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
            column["seconds"].append(sum(map(spent, rows)))
            column["waiting"].append(summary["data_wait_share"])
            column["waiting_later"].append(share_waited(rows[updates // 2 :]))
            totals = {"clips": sum(row["clips"] for row in rows), "updates": updates}
            benchmark.extra_info |= totals | {"audio_seconds": sum(row["audio_seconds"] for row in rows)}

        either = (0, 1) if benchmark.enabled else (1,)
        benchmark.pedantic(lambda: [run(workers) for workers in either], rounds=ROUNDS)
    benchmark.extra_info["columns"] = columns
