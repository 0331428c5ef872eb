"""shards.py: crops and batches, their order for any number of readers, damaged data, failing workers."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import PADDING_SHARE

from mae_ast_fast.data import loader as loading
from mae_ast_fast.data import prepare, shards
from mae_ast_fast.data.audio import find_audio
from mae_ast_fast.data.loader import BatchLoader
from mae_ast_fast.data.shards import Segment, Shards
from mae_ast_fast.training.data import open_data

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("lhotse")
RATE = 16000
OPTIONS = {"batch_seconds": 6.0, "max_seconds": 2.0, "min_seconds": 0.3, "seed": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, np.ndarray]:
    """int16 samples of 50 recordings of noise, of 0.3 - 7 s; the key "" has their folder."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    clips = {}
    for i in range(50):
        clips[f"{i:02}.wav"] = rng.integers(-32768, 32768, round(RATE * rng.uniform(0.3, 7.0 if i % 5 == 0 else 2.0)))
        soundfile.write(folder / f"{i:02}.wav", clips[f"{i:02}.wav"].astype(np.int16), RATE, "PCM_16")
    return {"": folder, **clips}


def prepared(source, out: Path, codec: str = "wav") -> Path:
    """Prepare several shards, with recordings of more than 3 s cut into segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SHARD_BYTES", (300_000, 300_000))
        patch.setattr(prepare, "_MAX_SEGMENT_SECONDS", 3)
        prepare.prepare_shards(source[""], out, codec=codec, progress=False)
    return out


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """Shards of ``source``. Tests do not change them."""
    return prepared(source, tmp_path_factory.mktemp("shards") / "out")


@pytest.fixture
def damaged_folder(source, folder, tmp_path) -> Path:
    """A copy that tests damage."""
    prepare.shutil.copytree(folder, tmp_path / "out")
    prepare.shutil.copy(f"{folder}.report.json", tmp_path / "out.report.json")
    return tmp_path / "out"


def keys(batches) -> list[list[tuple]]:
    return [[(crop.segment.id, crop.start, crop.num_samples) for crop in batch] for batch in batches]


def epoch_of(data: Shards, **options) -> list[list[tuple]]:
    return keys(data.batches(**{**OPTIONS, **options}))


def write_manifests(folder: Path, segment_samples: list[list[int]], split: str = "train") -> Shards:
    """Shards without audio, from the number of samples of each segment of each shard."""
    folder.mkdir()
    cut_number = itertools.count()
    for shard, num_samples in enumerate(segment_samples):
        with gzip.open(folder / f"cuts.{shard:06d}.jsonl.gz", "wt", compresslevel=1) as file:
            for count in num_samples:
                custom = {"offset": 512, "size": 2 * count, "crc32": 0, "form": "wav", "piece": 0, "split": split}
                cut = {"id": f"{next(cut_number)}-0", "recording": {"num_samples": count}}
                print(json.dumps({**cut, "custom": {"name": "a", "kind": "", "group": "", **custom}}), file=file)
        (folder / f"recording.{shard:06d}.tar").touch()
    return Shards(folder)


def segment_of(cut_id: str, num_samples: int) -> Segment:
    """A WAV segment without audio."""
    return Segment(
        shard="recording.000000.tar",
        id=cut_id,
        name="x",
        kind="",
        group="",
        index=0,
        split="train",
        num_samples=num_samples,
        offset=0,
        num_bytes=2 * num_samples,
        crc32=0,
        codec="wav",
    )


# ------------------------------------------------------------------------------------------------- crops and batches


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60 * RATE), st.sampled_from([RATE // 2, 5 * RATE]), st.integers(0, 2**31), st.integers(0, 99))
def test_crops_cover_every_sample_once(num_samples, max_samples, seed, epoch):
    min_samples = round(0.3 * RATE)
    segment = segment_of("x-0-0", num_samples)
    crops = [(crop.start, crop.num_samples) for crop in segment.crops(max_samples, min_samples, seed=seed, epoch=epoch)]
    assert crops == [
        (crop.start, crop.num_samples) for crop in segment.crops(max_samples, min_samples, seed=seed, epoch=epoch)
    ]
    if num_samples <= max_samples:
        assert crops == ([(0, num_samples)] if num_samples >= min_samples else [])
        return
    ends = [start + size for start, size in crops]
    assert all(min_samples <= size <= max_samples for _, size in crops)
    assert [start for start, _ in crops[1:]] == ends[:-1]  # consecutive
    assert all(size == max_samples for start, size in crops if start and start + size < num_samples)
    if crops:
        assert crops[0][0] < min_samples and num_samples - ends[-1] < min_samples  # only short ends are left out


def test_crops_phase_varies_with_segment_seed_and_epoch():
    def phase(name, seed, epoch):
        segment = segment_of(name, 50 * RATE)
        return [crop.start for crop in segment.crops(10 * RATE, 1, seed=seed, epoch=epoch)][-1] % (10 * RATE)

    for phases in (
        {phase("a", 0, epoch) for epoch in range(40)},
        {phase("a", seed, 0) for seed in range(40)},
        {phase(str(name), 0, 0) for name in range(40)},
    ):
        assert len(phases) > 35 and max(phases) - min(phases) > 8 * RATE


def test_batches_hold_every_crop_once_within_budget(folder):
    data = Shards(folder)
    assert len(data.shards) > 5
    expected = collections.Counter(
        (crop.segment.id, crop.start, crop.num_samples)
        for segment in data.segments("train")
        for crop in segment.crops(2 * RATE, round(0.3 * RATE), seed=1, epoch=3)
    )
    batches = epoch_of(data, epoch=3)
    assert collections.Counter(itertools.chain.from_iterable(batches)) == expected
    assert set(expected.values()) == {1} and len(expected) > 50
    assert all(0 < sum(samples for *_, samples in batch) <= 6 * RATE for batch in batches)


def test_batches_order_depends_on_seed_and_epoch_only(folder):
    base = epoch_of(Shards(folder))
    assert base == epoch_of(Shards(folder))
    for change in ({"seed": 2}, {"epoch": 1}):
        assert base != epoch_of(Shards(folder), **change)
        assert [sorted(batch) for batch in base] != [sorted(batch) for batch in epoch_of(Shards(folder), **change)]
    code = (
        "import sys, hashlib; from mae_ast_fast.data.shards import Shards; "
        f"batches = Shards(sys.argv[1]).batches(**{OPTIONS}); "
        "print([[(w.segment.id, w.start, w.num_samples) for w in batch] for batch in batches])"
    )
    # Lhotse reads RANK and WORLD_SIZE by itself.
    env = {**os.environ, "PYTHONHASHSEED": "12", "RANK": "3", "WORLD_SIZE": "4"}
    assert subprocess.check_output([sys.executable, "-c", code, str(folder)], text=True, env=env).strip() == str(base)


def test_batches_skip_gives_the_rest(folder):
    data = Shards(folder)
    base = epoch_of(data)
    for skip in (1, len(base) - 1, len(base), len(base) + 5):
        assert epoch_of(data, skip=skip) == base[skip:]


def test_batches_are_full_mixed_and_pad_little(tmp_path):
    segment_samples = np.random.default_rng(0).integers(round(0.3 * RATE), 10 * RATE, (20, 600)).tolist()
    data = write_manifests(tmp_path / "out", segment_samples)
    batches = epoch_of(data, batch_seconds=160.0, max_seconds=10.0)
    real = sum(samples for batch in batches for *_, samples in batch)
    assert real == sum(map(sum, segment_samples))
    assert 1 - real / sum(len(batch) * max(samples for *_, samples in batch) for batch in batches) <= PADDING_SHARE
    fill = np.array([sum(samples for *_, samples in batch) for batch in batches]) / (160 * RATE)
    assert fill.max() <= 1 and fill.mean() > 0.95 and (fill < 0.9).sum() <= 1  # the rest at the end
    means = np.array([np.mean([samples for *_, samples in batch]) for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2  # no trend from short to long
    assert abs(means[: len(means) // 2].mean() / means[len(means) // 2 :].mean() - 1) < 0.2
    order = [int(segment.split("-")[0]) for batch in batches for segment, *_ in batch]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1


@pytest.mark.parametrize("batch_seconds,max_seconds", [(10.0, 10.0), (10.5, 10.0), (900.0, 10.0), (3.0, 0.3)])
def test_batches_extreme_budget_is_kept(tmp_path, batch_seconds, max_seconds):
    data = write_manifests(tmp_path / "out", [[round(0.3 * RATE), 20 * RATE, RATE, 10 * RATE, 159_999] * 40])
    batches = epoch_of(data, batch_seconds=batch_seconds, max_seconds=max_seconds)
    totals = np.array([sum(samples for *_, samples in batch) for batch in batches])
    assert totals.max() <= batch_seconds * RATE
    assert (totals < batch_seconds * RATE - 2 * max_seconds * RATE).sum() <= 1


def test_batches_reject_options_out_of_range(folder, tmp_path):
    data = Shards(folder)
    for change in ({"max_seconds": 7.0}, {"min_seconds": 3.0}):
        with pytest.raises(ValueError, match="min_seconds <= max_seconds <= batch_seconds"):
            next(data.batches(**{**OPTIONS, **change}))
    for change in ({"micro_batches": 3, "world_size": 2}, {"micro_batches": 0}, {"rank": 1}):
        with pytest.raises(ValueError, match="micro_batches"):
            next(iter(BatchLoader(data, **OPTIONS, **change)))
    with pytest.raises(ValueError, match="no clip of min_seconds"):
        next(iter(BatchLoader(write_manifests(tmp_path / "short", [[100, 200]]), **OPTIONS)))
    with pytest.raises(ValueError, match="no clip of min_seconds"):
        next(iter(BatchLoader(write_manifests(tmp_path / "held", [[RATE]], "held_out"), **OPTIONS)))


def test_batches_memory_is_independent_of_data_size(tmp_path, monkeypatch):
    for name, size in {"_MIXED_CROPS": 200, "_MIXED_BATCHES": 16, "_BUFFER_CROPS": 200}.items():
        monkeypatch.setattr(shards, name, size)
    peaks = []
    for count in (1, 5, 20):  # the first run imports and fills caches
        data = write_manifests(tmp_path / str(count), [[RATE] * 200 for _ in range(count)])
        tracemalloc.start()
        crops = sum(len(batch) for batch in data.batches(**{**OPTIONS, "batch_seconds": 10.0}))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert crops == 200 * count
    peaks = peaks[1:]
    assert peaks[1] < 1.3 * peaks[0], peaks


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_read_gives_samples_bit_for_bit(source, folder, codec, tmp_path):
    data = Shards(folder if codec == "wav" else prepared(source, tmp_path / "out", "flac"))
    starts = {}  # of each segment in its recording
    for segment in sorted([*data.segments("train"), *data.segments("held_out")], key=lambda segment: segment.index):
        starts[segment.id] = starts.get(segment.name, 0)
        starts[segment.name] = starts[segment.id] + segment.num_samples
    assert {name: len(source[name]) for name in source if name} == {n: s for n, s in starts.items() if n in source}
    clip_ids = {}
    for epoch in (0, 0, 1):
        for crops in data.batches(**{**OPTIONS, "epoch": epoch}):
            batch = data.read(crops)
            assert batch.waveforms.dtype == torch.int16 and batch.num_samples.dtype == batch.ids.dtype == torch.int64
            assert batch.waveforms.shape == (len(crops), max(crop.num_samples for crop in crops))
            assert batch.num_samples.tolist() == [crop.num_samples for crop in crops] and not batch.faults
            for row, crop, name, clip_id in zip(batch.waveforms, crops, batch.names, batch.ids.tolist(), strict=True):
                first = starts[crop.segment.id] + crop.start
                assert name == crop.segment.name
                assert np.array_equal(row[: crop.num_samples], source[name][first : first + crop.num_samples])
                assert not row[crop.num_samples :].any() and 0 <= clip_id < 2**32
                assert clip_ids.setdefault((crop.segment.id, crop.start), clip_id) == clip_id
    assert len(set(clip_ids.values())) == len(clip_ids) > 60


def test_segments_match_report_of_prepare(folder):
    data = Shards(folder)
    held = list(data.segments("held_out"))
    assert len({segment.name for segment in held}) == data.report["held_out"] > 0
    assert len({segment.name for segment in data.segments("train")}) == data.report["train"]
    crop = held[0].crop(5, 100)
    batch = data.read([crop])
    assert torch.equal(batch.waveforms[0], data.read([held[0].crop(0, held[0].num_samples)]).waveforms[0, 5:105])
    assert crop.duration == 100 / RATE


def test_shards_pickle_is_small_and_reads(folder):
    data = Shards(folder)
    packed = pickle.dumps(data)
    crops = next(data.batches(**OPTIONS))
    assert len(packed) < 20_000
    assert torch.equal(pickle.loads(packed).read(crops).waveforms, data.read(crops).waveforms)


def copy_to_memory(folder: Path, name: str, report: bool = True) -> str:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    if report:
        memory.pipe_file(f"/{name}.report.json", Path(f"{folder}.report.json").read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("report", [True, False])
def test_shards_url_reads_like_folder(folder, tmp_path, report):
    url = copy_to_memory(folder, f"bucket{report}/shards", report)
    local, remote = Shards(folder), Shards(url)
    assert remote.report == (local.report if report else {}) and remote.identity == local.identity
    assert open_data(url + "/", tmp_path, min_seconds=0.3, workers=1).source == url
    assert epoch_of(local) == epoch_of(remote)
    local_items, remote_items = (
        BatchLoader(data, **OPTIONS, workers=workers) for data, workers in ((local, 0), (remote, 1))
    )
    for (a, cursor_a), (b, cursor_b) in itertools.islice(zip(local_items, remote_items, strict=True), 5):
        assert torch.equal(a.waveforms, b.waveforms) and a.names == b.names and cursor_a == cursor_b and not b.faults


def test_loader_reopens_file_system_after_fork(folder, monkeypatch):
    url = copy_to_memory(folder, "forkless")
    memory = type(Shards(url)._fs)
    init, cat_ranges = memory.__init__, memory.cat_ranges

    def made_here(self, *args, **options):
        init(self, *args, **options)
        self.process = os.getpid()

    def read_here(self, *args, **options):
        if self.process != os.getpid():
            raise RuntimeError("not fork-safe")
        return cat_ranges(self, *args, **options)

    monkeypatch.setattr(memory, "__init__", made_here)
    monkeypatch.setattr(memory, "cat_ranges", read_here)
    memory.clear_instance_cache()
    data = Shards(url)
    base = first_batches(BatchLoader(data, **OPTIONS), 5)
    assert base == first_batches(BatchLoader(data, **OPTIONS, workers=1), 5)
    assert base == first_batches(BatchLoader(Shards(folder), **OPTIONS), 5)


def test_read_server_without_ranges_gives_samples(folder):
    remote = Shards(copy_to_memory(folder, "whole"))
    crops = next(Shards(folder).batches(**OPTIONS))
    tar_files = [(folder / crop.segment.shard).read_bytes() for crop in crops]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(remote._fs), "cat_ranges", lambda *_, **options: tar_files)
        batch = remote.read(crops)
    assert torch.equal(batch.waveforms, Shards(folder).read(crops).waveforms) and not batch.faults


def test_read_retries_failed_ranges(folder, monkeypatch):
    remote = Shards(copy_to_memory(folder, "moment"))
    crops = next(Shards(folder).batches(**OPTIONS))
    memory, num_ranges = type(remote._fs), []
    cat_ranges = memory.cat_ranges

    def failing(self, paths, starts, ends, **options):
        num_ranges.append(len(paths))
        replies = cat_ranges(self, paths, starts, ends, **options)
        return [*replies[:-1], OSError("reset")] if len(num_ranges) <= failures else replies

    monkeypatch.setattr(memory, "cat_ranges", failing)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    failures = 1
    assert torch.equal(remote.read(crops).waveforms, Shards(folder).read(crops).waveforms)
    assert num_ranges == [len(crops), 1]
    failures = 99
    batch = remote.read(crops)
    assert len(batch.names) == len(crops) - 1 and "reset" in batch.faults[0][1]


def test_shards_identity_depends_on_data(source, folder, damaged_folder, tmp_path):
    identity = Shards(folder).identity
    assert identity == Shards(damaged_folder).identity
    assert identity != Shards(prepared(source, tmp_path / "flac", "flac")).identity
    next(iter(damaged_folder.glob("*7.tar"))).write_bytes(b"other")
    assert identity != Shards(damaged_folder).identity


# --------------------------------------------------------------------------------------------------------------- damage


def test_read_damaged_audio_is_left_out_and_named(damaged_folder):
    data = Shards(damaged_folder)
    clean = {
        segment.id: data.read([segment.crop(0, segment.num_samples)]).waveforms for segment in data.segments("train")
    }
    segments = list(data.segments("train"))
    flipped, other = (next(segment for segment in segments if segment.shard == shard) for shard in data.shards[:2])
    for segment in (flipped, other):
        with open(damaged_folder / segment.shard, "r+b") as file:
            file.seek(segment.offset + 1000)
            file.write(b"\x55\xaa\x55")
    cut = data.shards[2]
    last = [segment for segment in segments if segment.shard == cut][-1]
    with open(damaged_folder / cut, "r+b") as file:
        file.truncate(last.offset + last.num_bytes - 2)
    (damaged_folder / data.shards[3]).unlink()
    bad = {flipped.id: "wrong checksum", other.id: "wrong checksum", last.id: "cut short"}
    bad |= {segment.id: "cannot be read" for segment in segments if segment.shard == data.shards[3]}
    batch = data.read([segment.crop(0, segment.num_samples) for segment in segments])
    kept = [segment for segment in segments if segment.id not in bad]
    assert batch.names == [segment.name for segment in kept]
    for row, segment in zip(batch.waveforms, kept, strict=True):
        assert torch.equal(row[: segment.num_samples], clean[segment.id][0])
    assert [name for name, _ in batch.faults] == [segment.name for segment in segments if segment.id in bad]
    for (_, reason), segment in zip(batch.faults, [segment for segment in segments if segment.id in bad], strict=True):
        assert bad[segment.id] in reason and segment.shard in reason
    empty = data.read([last.crop(last.num_samples - 100, 100)])
    assert len(empty.names) == len(empty.num_samples) == len(empty.ids) == len(empty.waveforms) == 0
    assert empty.waveforms.dtype == torch.int16 and empty.waveforms.dim() == 2 and len(empty.faults) == 1
    assert data.read([last.crop(0, 100)]).names == [last.name]  # before the damage
    loader_faults = [
        fault for batch, _ in itertools.islice(BatchLoader(data, **OPTIONS, workers=1), 40) for fault in batch.faults
    ]
    assert loader_faults  # and the loader continues


def test_read_damaged_flac_is_left_out_and_named(source, tmp_path):
    data = Shards(prepared(source, tmp_path / "out", "flac"))
    segment = next(data.segments("train"))
    content = bytearray((tmp_path / "out" / segment.shard).read_bytes())
    content[segment.offset + segment.num_bytes // 2] ^= 255
    (tmp_path / "out" / segment.shard).write_bytes(content)
    ((name, reason),) = data.read([segment.crop(10, 100)]).faults
    assert name == segment.name and "wrong checksum" in reason
    for wrong_field in ("crc32", "num_samples"):  # of the manifest
        crc = prepare.zlib.crc32(content[segment.offset : segment.offset + segment.num_bytes])
        changed = pickle.loads(pickle.dumps(segment))
        changed.crc32 = crc
        if wrong_field == "num_samples":
            changed = next(itertools.islice(data.segments("train"), 1, None))
            changed.num_samples += 1
        assert "damaged" in data.read([changed.crop(0, 50)]).faults[0][1]


@pytest.mark.parametrize("damage", ["gzip", "cut off", "json", "no checksum", "negative", "gone", "empty"])
def test_segments_damaged_manifest_loses_the_rest(folder, damaged_folder, damage, capfd):
    intact = Shards(folder)
    expected = {segment.id for segment in intact.segments("train")}
    for shard in (intact.shards[0], intact.shards[3]):
        first, *others = intact._shard_segments(shard)
        expected -= {segment.id for segment in others}
        if damage in ("gzip", "gone", "empty"):
            expected.discard(first.id)
        path = damaged_folder / shard.replace("recording", "cuts").replace("tar", "jsonl.gz")
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        cut = json.loads(lines[1])
        if damage == "no checksum":
            del cut["custom"]["crc32"]
        elif damage == "negative":
            cut["custom"]["offset"] = -5
        lines[1] = b"{broken\n" if damage == "json" else json.dumps(cut).encode() + b"\n"
        content = gzip.compress(b"".join(lines), compresslevel=0)
        content = {
            "gzip": content[:10] + b"\xff" * 50,
            "cut off": content[: len(lines[0]) + len(lines[1]) // 2],
            "empty": b"",
        }.get(damage, content)
        path.write_bytes(content)
        if damage == "gone":
            path.unlink()
    data = Shards(damaged_folder)
    assert {segment for batch in epoch_of(data) for segment, *_ in batch} == expected
    if damage != "empty":  # which is a shard without cuts
        assert sorted(data.faults) == ["cuts.000000.jsonl.gz", "cuts.000003.jsonl.gz"]
        assert "left out the rest of cuts.000003.jsonl.gz" in capfd.readouterr().err


def test_shards_rejects_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        Shards(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no Lhotse Shar"):
        Shards(tmp_path)
    with gzip.open(tmp_path / "cuts.000000.jsonl.gz", "wt") as file:
        file.write('{"id": "a", "recording": {"num_samples": 5}}\n')
    (tmp_path / "recording.000000.tar").touch()
    with pytest.raises(ValueError, match="`mae-ast-fast prepare` did not write"):
        Shards(tmp_path)


# --------------------------------------------------------------------------------------------------------------- loader


def first_batches(items, count: int) -> list[tuple]:
    """The first ``count`` batches: names, ids, sum of the samples, epoch and cursor."""
    return [
        (batch.names, batch.ids.tolist(), batch.waveforms.long().sum().item(), batch.epoch, cursor)
        for batch, cursor in itertools.islice(items, count)
    ]


def test_loader_batches_are_equal_for_any_number_of_workers(folder):
    data = Shards(folder)
    epoch_length = len(epoch_of(data))
    count = epoch_length + 5  # across the end of an epoch
    base = first_batches(BatchLoader(data, **OPTIONS), count)
    assert {epoch for *_, epoch, _ in base} == {0, 1}
    assert base[epoch_length - 1][-1] == (0, epoch_length) and base[epoch_length][-1] == (1, 1)
    for workers in (1, 3):
        assert first_batches(BatchLoader(data, **OPTIONS, workers=workers), count) == base


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_new_iterator_continues_after_last_batch(folder, workers):
    """Also with batches that workers had read ahead, of whom none outlives its iterator."""
    base = first_batches(BatchLoader(Shards(folder), **OPTIONS), 6)
    batches = BatchLoader(Shards(folder), **OPTIONS, workers=workers)
    assert first_batches(batches, 2) + first_batches(batches, 1) + first_batches(batches, 3) == base
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("shards_per_stream", [1, 4], ids=["whole shards", "parts of each shard"])
def test_loader_order_is_independent_of_processes_and_restarts(folder, monkeypatch, shards_per_stream):
    monkeypatch.setattr(shards, "_SHARDS_PER_STREAM", shards_per_stream)
    data = Shards(folder)
    assert len(data.shards) >= 4
    count = 4 * (
        max(len(epoch_of(data, stream=stream, num_streams=4)) for stream in range(4)) + 3
    )  # past the end of every epoch
    base = first_batches(BatchLoader(data, **OPTIONS, micro_batches=4), count)
    for start, world_size in ((0, 2), (4, 4), (count - 12, 2), (count - 8, 1)):
        cursors = [item[-1] for item in base[start - 4 : start]]
        share = 4 // world_size
        ranks = [
            BatchLoader(data, **OPTIONS, micro_batches=4, cursors=cursors, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches = []
        while start + len(batches) < count:
            batches += [item for rank in ranks for item in first_batches(rank, share)]
        assert batches == base[start:]
    with pytest.raises(ValueError, match="a cursor for each of 4 micro_batches, got 1"):
        next(iter(BatchLoader(data, **OPTIONS, micro_batches=4, cursors=[(0, 0)])))


@pytest.mark.parametrize("shards_per_stream", [1, 4], ids=["whole shards", "parts of each shard"])
def test_batches_streams_partition_an_epoch(folder, monkeypatch, shards_per_stream):
    """Every crop once in one of the streams, and another share in the next epoch."""
    monkeypatch.setattr(shards, "_SHARDS_PER_STREAM", shards_per_stream)
    data = Shards(folder)
    shares = {}
    for epoch in (0, 1):
        whole_epoch = sorted(crop for batch in epoch_of(data, epoch=epoch) for crop in batch)
        for stream in range(3):
            crops = epoch_of(data, epoch=epoch, stream=stream, num_streams=3)
            shares[epoch, stream] = sorted(crop for batch in crops for crop in batch)
        assert sorted(crop for stream in range(3) for crop in shares[epoch, stream]) == whole_epoch
    names = {key: {name for name, *_ in crops} for key, crops in shares.items()}
    assert names[0, 0] != names[1, 0]


def test_loader_stream_without_clips_in_an_epoch_continues(tmp_path):
    data = write_manifests(tmp_path / "few", [[RATE] * 3, [RATE]])
    for seed in range(8):
        options = {**OPTIONS, "seed": seed, "micro_batches": 4}
        items = itertools.islice(BatchLoader(data, **options), 80)
        epochs = [batch.epoch for batch, _ in items]
        assert len(epochs) == 80 and max(epochs) > 5


def test_shards_rejects_missing_tar_file(damaged_folder):
    gone = Shards(damaged_folder).shards[1]
    (damaged_folder / gone).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of its shards: {gone}"):
        Shards(damaged_folder)
    damaged_folder.with_name(f"{damaged_folder.name}.report.json").unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of its shards: {gone}"):  # its manifest is there
        Shards(damaged_folder)


class Sabotaged(Shards):
    """Fails in a worker that reads the recording ``name``, ``times`` times; the folder ``marks`` counts them."""

    def __init__(self, folder: Path, *, marks: Path, name: str, failure: str, times: int) -> None:
        super().__init__(folder)
        self.marks, self.name, self.failure, self.times = marks, name, failure, times

    def read(self, crops):
        worker = torch.utils.data.get_worker_info()
        if worker is not None and any(crop.segment.name == self.name for crop in crops):
            done = len(list(self.marks.iterdir()))
            if done < self.times:
                (self.marks / str(done)).touch()
                if self.failure == "die":
                    os._exit(1)
                if self.failure == "kill":
                    os.kill(os.getpid(), 9)
                time.sleep(60)
        return super().read(crops)


@pytest.mark.parametrize("failure,times", [("die", 2), ("kill", 1), ("hang", 1)])
def test_loader_replaces_dead_and_hung_workers(folder, tmp_path, monkeypatch, capfd, *, failure, times):
    monkeypatch.setattr(loading, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how long it waits for hung workers
    data = Shards(folder)
    count = len(epoch_of(data)) + 2
    base = first_batches(BatchLoader(data, **OPTIONS), count)
    sabotaged = Sabotaged(folder, marks=tmp_path, name=base[6][0][0], failure=failure, times=times)
    start = time.monotonic()
    assert first_batches(BatchLoader(sabotaged, **OPTIONS, workers=2, stall_seconds=1.0), count) == base
    assert len(list(tmp_path.iterdir())) == times and time.monotonic() - start < 40
    assert "starting new workers" in capfd.readouterr().err


def test_loader_batch_that_kills_every_worker_raises(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_POLL_SECONDS", 0.2)
    base = first_batches(BatchLoader(Shards(folder), **OPTIONS), 3)
    sabotaged = Sabotaged(folder, marks=tmp_path, name=base[2][0][0], failure="die", times=99)
    items = BatchLoader(sabotaged, **OPTIONS, workers=1, stall_seconds=5.0)
    names_before = []
    with pytest.raises(RuntimeError, match="reading failed 4 times in a row") as caught:
        for batch, _ in items:
            names_before.append(batch.names)
    assert names_before == [item[0] for item in base[: len(names_before)]] and base[2][0][0] in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- any source


def test_open_data_prepares_once(source, tmp_path, monkeypatch):
    options = {"min_seconds": 0.3, "workers": 2, "progress": False}
    first = open_data(source[""], tmp_path / "cache", **options)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_decode_all", lambda *_, **__: 1 / 0)
        again = open_data(source[""], tmp_path / "cache", **options)
        assert again.identity == first.identity and again.report == first.report and again.report["clips"] == 50
        assert open_data(first.source, tmp_path / "nowhere", **options).identity == first.identity
        with pytest.raises(ZeroDivisionError):
            open_data(source[""], tmp_path / "cache", **{**options, "min_seconds": 0.5})
    entries = find_audio(source[""])[:10]
    data = open_data(entries, tmp_path / "cache", **options, split=lambda e: (np.arange(9), np.array([9]), "the last"))
    assert {segment.name for segment in data.segments("held_out")} == {"09.wav"} and data.report["split"] == "the last"
    with pytest.raises(ValueError, match="at least two different files"):
        open_data(source[""] / "00.wav", tmp_path / "cache", **options)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        open_data(tmp_path / "none", tmp_path / "cache", **options)
    assert all(path.name.endswith(".report.json") or path.is_dir() for path in (tmp_path / "cache/shards").iterdir())
