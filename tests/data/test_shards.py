"""shards.py: crops and batches, their order for any number of readers, damaged data, failing workers."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
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
from mae_ast_fast.data.loader import loader
from mae_ast_fast.data.shards import Segment, Shards
from mae_ast_fast.training.data import open_data

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("lhotse")
RATE = 16000
OPTIONS = {"batch_seconds": 6.0, "max_seconds": 2.0, "min_seconds": 0.3, "seed": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, np.ndarray]:
    """int16 samples of 50 recordings of noise, of 0.3 - 7 s, in the folder named by the key ""."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    clips = {}
    for i in range(50):
        clips[f"{i:02}.wav"] = rng.integers(-32768, 32768, round(RATE * rng.uniform(0.3, 7.0 if i % 5 == 0 else 2.0)))
        soundfile.write(folder / f"{i:02}.wav", clips[f"{i:02}.wav"].astype(np.int16), RATE, "PCM_16")
    return {"": folder, **clips}


def prepared(source, out: Path, codec: str = "wav") -> Path:
    """Several shards, and recordings of more than 3 s in segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SHARD_BYTES", (300_000, 300_000))
        patch.setattr(prepare, "_MAX_SEGMENT_SECONDS", 3)
        prepare.prepare_shards(source[""], out, codec=codec, progress=False)
    return out


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """Shards of ``source``; not to be changed."""
    return prepared(source, tmp_path_factory.mktemp("shards") / "out")


@pytest.fixture
def own_folder(source, folder, tmp_path) -> Path:
    """A copy to damage."""
    prepare.shutil.copytree(folder, tmp_path / "out")
    prepare.shutil.copy(f"{folder}.report.json", tmp_path / "out.report.json")
    return tmp_path / "out"


def keys(batches) -> list[list[tuple]]:
    return [[(crop.segment.id, crop.start, crop.num_samples) for crop in batch] for batch in batches]


def epoch_of(data: Shards, **options) -> list[list[tuple]]:
    return keys(data.batches(**{**OPTIONS, **options}))


def write_manifests(folder: Path, lengths: list[list[int]], split: str = "train") -> Shards:
    """Shards whose audio is not there: the lengths of the segments of each."""
    folder.mkdir()
    number = itertools.count()
    for shard, samples in enumerate(lengths):
        with gzip.open(folder / f"cuts.{shard:06d}.jsonl.gz", "wt", compresslevel=1) as file:
            for count in samples:
                place = {"offset": 512, "size": 2 * count, "crc32": 0, "form": "wav", "piece": 0, "split": split}
                cut = {"id": f"{next(number)}-0", "recording": {"num_samples": count}}
                print(json.dumps({**cut, "custom": {"name": "a", "kind": "", "group": "", **place}}), file=file)
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
def test_a_piece_is_cut_so_that_every_sample_is_in_one_window(samples, longest, seed, epoch):
    shortest = round(0.3 * RATE)
    segment = segment_of("x-0-0", samples)
    crops = [(crop.start, crop.num_samples) for crop in segment.crops(longest, shortest, seed=seed, epoch=epoch)]
    assert crops == [
        (crop.start, crop.num_samples) for crop in segment.crops(longest, shortest, seed=seed, epoch=epoch)
    ]
    if samples <= longest:
        assert crops == ([(0, samples)] if samples >= shortest else [])
        return
    ends = [start + size for start, size in crops]
    assert all(shortest <= size <= longest for _, size in crops)
    assert [start for start, _ in crops[1:]] == ends[:-1]  # consecutive
    assert all(size == longest for start, size in crops if start and start + size < samples)
    if crops:
        assert crops[0][0] < shortest and samples - ends[-1] < shortest  # only short ends are left out


def test_cuts_move_from_epoch_to_epoch_and_each_piece_has_its_own():
    def phase(name, seed, epoch):
        segment = segment_of(name, 50 * RATE)
        return [crop.start for crop in segment.crops(10 * RATE, 1, seed=seed, epoch=epoch)][-1] % (10 * RATE)

    for phases in (
        {phase("a", 0, epoch) for epoch in range(40)},
        {phase("a", seed, 0) for seed in range(40)},
        {phase(str(name), 0, 0) for name in range(40)},
    ):
        assert len(phases) > 35 and max(phases) - min(phases) > 8 * RATE


def test_an_epoch_holds_every_window_once_within_the_budget(folder):
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


def test_the_order_follows_seed_and_epoch_alone(folder):
    base = epoch_of(Shards(folder))
    assert base == epoch_of(Shards(folder))
    for other in ({"seed": 2}, {"epoch": 1}):
        assert base != epoch_of(Shards(folder), **other)
        assert [sorted(batch) for batch in base] != [sorted(batch) for batch in epoch_of(Shards(folder), **other)]
    code = (
        "import sys, hashlib; from mae_ast_fast.data.shards import Shards; "
        f"batches = Shards(sys.argv[1]).batches(**{OPTIONS}); "
        "print([[(w.segment.id, w.start, w.num_samples) for w in batch] for batch in batches])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12", "RANK": "3", "WORLD_SIZE": "4"}  # Lhotse looks at these two by itself
    assert subprocess.check_output([sys.executable, "-c", code, str(folder)], text=True, env=env).strip() == str(base)


def test_skipping_gives_the_rest(folder):
    data = Shards(folder)
    base = epoch_of(data)
    for skip in (1, len(base) - 1, len(base), len(base) + 5):
        assert epoch_of(data, skip=skip) == base[skip:]


def test_batches_are_full_and_pad_little_and_mixed(tmp_path):
    lengths = np.random.default_rng(0).integers(round(0.3 * RATE), 10 * RATE, (20, 600)).tolist()
    data = write_manifests(tmp_path / "out", lengths)
    batches = epoch_of(data, batch_seconds=160.0, max_seconds=10.0)
    real = sum(samples for batch in batches for *_, samples in batch)
    assert real == sum(map(sum, lengths))
    assert 1 - real / sum(len(batch) * max(samples for *_, samples in batch) for batch in batches) <= PADDING_SHARE
    fill = np.array([sum(samples for *_, samples in batch) for batch in batches]) / (160 * RATE)
    assert fill.max() <= 1 and fill.mean() > 0.95 and (fill < 0.9).sum() <= 1  # what is left at the end
    means = np.array([np.mean([samples for *_, samples in batch]) for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2  # no run from short to long
    assert abs(means[: len(means) // 2].mean() / means[len(means) // 2 :].mean() - 1) < 0.2
    order = [int(segment.split("-")[0]) for batch in batches for segment, *_ in batch]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1


@pytest.mark.parametrize("batch_seconds,max_seconds", [(10.0, 10.0), (10.5, 10.0), (900.0, 10.0), (3.0, 0.3)])
def test_odd_budgets_are_kept(tmp_path, batch_seconds, max_seconds):
    data = write_manifests(tmp_path / "out", [[round(0.3 * RATE), 20 * RATE, RATE, 10 * RATE, 159_999] * 40])
    batches = epoch_of(data, batch_seconds=batch_seconds, max_seconds=max_seconds)
    totals = np.array([sum(samples for *_, samples in batch) for batch in batches])
    assert totals.max() <= batch_seconds * RATE
    assert (totals < batch_seconds * RATE - 2 * max_seconds * RATE).sum() <= 1


def test_options_out_of_range(folder, tmp_path):
    data = Shards(folder)
    for change in ({"max_seconds": 7.0}, {"min_seconds": 3.0}):
        with pytest.raises(ValueError, match="min_seconds <= max_seconds <= batch_seconds"):
            next(data.batches(**{**OPTIONS, **change}))
    for change in ({"micro_batches": 3, "world_size": 2}, {"micro_batches": 0}, {"rank": 1}):
        with pytest.raises(ValueError, match="micro_batches"):
            next(loader(data, **OPTIONS, **change))
    with pytest.raises(ValueError, match="no clip of min_seconds"):
        next(loader(write_manifests(tmp_path / "short", [[100, 200]]), **OPTIONS))
    with pytest.raises(ValueError, match="no clip of min_seconds"):
        next(loader(write_manifests(tmp_path / "held", [[RATE]], "held_out"), **OPTIONS))


def test_memory_does_not_follow_the_size_of_the_data(tmp_path, monkeypatch):
    for name, size in {"_MIXED_CROPS": 200, "_MIXED_BATCHES": 16, "_BUFFER_CROPS": 200}.items():
        monkeypatch.setattr(shards, name, size)
    peaks = []
    for count in (1, 5, 20):  # the first: what is imported and cached once
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
def test_reading_gives_the_samples_bit_for_bit(source, folder, codec, tmp_path):
    data = Shards(folder if codec == "wav" else prepared(source, tmp_path / "out", "flac"))
    starts = {}  # of each segment in its recording
    for segment in sorted([*data.segments("train"), *data.segments("held_out")], key=lambda segment: segment.index):
        starts[segment.id] = starts.get(segment.name, 0)
        starts[segment.name] = starts[segment.id] + segment.num_samples
    assert {name: len(source[name]) for name in source if name} == {n: s for n, s in starts.items() if n in source}
    seen = {}
    for epoch in (0, 0, 1):
        for crops in data.batches(**{**OPTIONS, "epoch": epoch}):
            batch = data.read(crops)
            assert batch.waveforms.dtype == torch.int16 and batch.num_samples.dtype == batch.ids.dtype == torch.int64
            assert batch.waveforms.shape == (len(crops), max(crop.num_samples for crop in crops))
            assert batch.num_samples.tolist() == [crop.num_samples for crop in crops] and not batch.faults
            for row, crop, name, number in zip(batch.waveforms, crops, batch.names, batch.ids.tolist(), strict=True):
                first = starts[crop.segment.id] + crop.start
                assert name == crop.segment.name
                assert np.array_equal(row[: crop.num_samples], source[name][first : first + crop.num_samples])
                assert not row[crop.num_samples :].any() and 0 <= number < 2**32
                assert seen.setdefault((crop.segment.id, crop.start), number) == number
    assert len(set(seen.values())) == len(seen) > 60


def test_pieces_say_what_prepare_knew(folder):
    data = Shards(folder)
    held = list(data.segments("held_out"))
    assert len({segment.name for segment in held}) == data.report["held_out"] > 0
    assert len({segment.name for segment in data.segments("train")}) == data.report["train"]
    crop = held[0].crop(5, 100)
    batch = data.read([crop])
    assert torch.equal(batch.waveforms[0], data.read([held[0].crop(0, held[0].num_samples)]).waveforms[0, 5:105])
    assert crop.duration == 100 / RATE


def test_shards_travel_to_other_processes(folder):
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
def test_a_url_reads_as_the_folder_does(folder, tmp_path, report):
    url = copy_to_memory(folder, f"bucket{report}/shards", report)
    local, remote = Shards(folder), Shards(url)
    assert remote.report == (local.report if report else {}) and remote.identity == local.identity
    assert open_data(url + "/", tmp_path, min_seconds=0.3, workers=1).source == url
    assert epoch_of(local) == epoch_of(remote)
    mine, other = (loader(data, **OPTIONS, workers=workers) for data, workers in ((local, 0), (remote, 1)))
    for (a, after_a), (b, after_b) in itertools.islice(zip(mine, other, strict=True), 5):
        assert torch.equal(a.waveforms, b.waveforms) and a.names == b.names and after_a == after_b and not b.faults


def test_a_file_system_that_does_not_outlive_a_fork(folder, monkeypatch):
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
    base = taken(loader(data, **OPTIONS), 5)
    assert taken(loader(data, **OPTIONS, workers=1), 5) == base == taken(loader(Shards(folder), **OPTIONS), 5)


def test_a_server_that_sends_whole_files(folder):
    remote = Shards(copy_to_memory(folder, "whole"))
    crops = next(Shards(folder).batches(**OPTIONS))
    whole = [(folder / crop.segment.shard).read_bytes() for crop in crops]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(remote._fs), "cat_ranges", lambda *_, **options: whole)
        batch = remote.read(crops)
    assert torch.equal(batch.waveforms, Shards(folder).read(crops).waveforms) and not batch.faults


def test_what_fails_for_a_moment_is_read_again(folder, monkeypatch):
    remote = Shards(copy_to_memory(folder, "moment"))
    crops = next(Shards(folder).batches(**OPTIONS))
    memory, asked = type(remote._fs), []
    cat_ranges = memory.cat_ranges

    def failing(self, paths, starts, ends, **options):
        asked.append(len(paths))
        parts = cat_ranges(self, paths, starts, ends, **options)
        return [*parts[:-1], OSError("reset")] if len(asked) <= failures else parts

    monkeypatch.setattr(memory, "cat_ranges", failing)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    failures = 1
    assert torch.equal(remote.read(crops).waveforms, Shards(folder).read(crops).waveforms)
    assert asked == [len(crops), 1]
    failures = 99
    batch = remote.read(crops)
    assert len(batch.names) == len(crops) - 1 and "reset" in batch.faults[0][1]


def test_identity_follows_the_data(source, folder, own_folder, tmp_path):
    identity = Shards(folder).identity
    assert identity == Shards(own_folder).identity
    assert identity != Shards(prepared(source, tmp_path / "flac", "flac")).identity
    next(iter(own_folder.glob("*7.tar"))).write_bytes(b"other")
    assert identity != Shards(own_folder).identity


# --------------------------------------------------------------------------------------------------------------- damage


def test_damaged_audio_is_left_out_and_named(own_folder):
    data = Shards(own_folder)
    clean = {
        segment.id: data.read([segment.crop(0, segment.num_samples)]).waveforms for segment in data.segments("train")
    }
    segments = list(data.segments("train"))
    flipped, part = (next(segment for segment in segments if segment.shard == shard) for shard in data.shards[:2])
    for segment in (flipped, part):
        with open(own_folder / segment.shard, "r+b") as file:
            file.seek(segment.offset + 1000)
            file.write(b"\x55\xaa\x55")
    cut = data.shards[2]
    last = [segment for segment in segments if segment.shard == cut][-1]
    with open(own_folder / cut, "r+b") as file:
        file.truncate(last.offset + last.num_bytes - 2)
    (own_folder / data.shards[3]).unlink()
    bad = {flipped.id: "wrong checksum", part.id: "wrong checksum", last.id: "cut short"}
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
    found = [fault for batch, _ in itertools.islice(loader(data, **OPTIONS, workers=1), 40) for fault in batch.faults]
    assert found  # and the loader goes on


def test_damaged_flac(source, tmp_path):
    data = Shards(prepared(source, tmp_path / "out", "flac"))
    segment = next(data.segments("train"))
    content = bytearray((tmp_path / "out" / segment.shard).read_bytes())
    content[segment.offset + segment.num_bytes // 2] ^= 255
    (tmp_path / "out" / segment.shard).write_bytes(content)
    ((name, reason),) = data.read([segment.crop(10, 100)]).faults
    assert name == segment.name and "wrong checksum" in reason
    for lie in ("crc32", "samples"):  # the manifest lies
        crc = prepare.zlib.crc32(content[segment.offset : segment.offset + segment.num_bytes])
        other = pickle.loads(pickle.dumps(segment))
        other.crc32 = crc
        if lie == "samples":
            other = next(itertools.islice(data.segments("train"), 1, None))
            other.num_samples += 1
        assert "damaged" in data.read([other.crop(0, 50)]).faults[0][1]


@pytest.mark.parametrize("damage", ["gzip", "cut off", "json", "no place", "negative", "gone", "empty"])
def test_a_broken_manifest_loses_what_comes_after(folder, own_folder, damage, capfd):
    intact = Shards(folder)
    expected = {segment.id for segment in intact.segments("train")}
    for shard in (intact.shards[0], intact.shards[3]):
        first, *others = intact._shard_segments(shard)
        expected -= {segment.id for segment in others}
        if damage in ("gzip", "gone", "empty"):
            expected.discard(first.id)
        path = own_folder / shard.replace("recording", "cuts").replace("tar", "jsonl.gz")
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        cut = json.loads(lines[1])
        if damage == "no place":
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
    data = Shards(own_folder)
    assert {segment for batch in epoch_of(data) for segment, *_ in batch} == expected
    if damage != "empty":  # which is a shard without a cut
        assert sorted(data.faults) == ["cuts.000000.jsonl.gz", "cuts.000003.jsonl.gz"]
        assert "left out the rest of cuts.000003.jsonl.gz" in capfd.readouterr().err


def test_what_is_no_shards(tmp_path):
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


def taken(items, count: int) -> list[tuple]:
    """What tells batches apart."""
    return [
        (batch.names, batch.ids.tolist(), batch.waveforms.long().sum().item(), batch.epoch, after)
        for batch, after in itertools.islice(items, count)
    ]


def test_the_same_batches_for_any_number_of_workers(folder):
    data = Shards(folder)
    one = len(epoch_of(data))
    count = one + 5  # across the end of an epoch
    base = taken(loader(data, **OPTIONS), count)
    assert {epoch for *_, epoch, _ in base} == {0, 1} and base[one - 1][-1] == (0, one) and base[one][-1] == (1, 1)
    for workers in (1, 3):
        assert taken(loader(data, **OPTIONS, workers=workers), count) == base


@pytest.mark.parametrize("least", [1, 4], ids=["whole shards", "parts of each shard"])
def test_processes_and_restarts_share_one_order(folder, monkeypatch, least):
    monkeypatch.setattr(shards, "_SHARDS_PER_STREAM", least)
    data = Shards(folder)
    assert len(data.shards) >= 4
    count = 4 * (
        max(len(epoch_of(data, stream=stream, num_streams=4)) for stream in range(4)) + 3
    )  # past the end of every epoch
    base = taken(loader(data, **OPTIONS, micro_batches=4), count)
    for begun, world_size in ((0, 2), (4, 4), (count - 12, 2), (count - 8, 1)):
        cursors = [item[-1] for item in base[begun - 4 : begun]]
        share = 4 // world_size
        ranks = [
            loader(data, **OPTIONS, micro_batches=4, cursors=cursors, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        found = []
        while begun + len(found) < count:
            found += [item for rank in ranks for item in taken(rank, share)]
        assert found == base[begun:]
    with pytest.raises(ValueError, match="a cursor for each of 4 micro_batches, got 1"):
        next(loader(data, **OPTIONS, micro_batches=4, cursors=[(0, 0)]))


@pytest.mark.parametrize("least", [1, 4], ids=["whole shards", "parts of each shard"])
def test_lanes_share_an_epoch_out(folder, monkeypatch, least):
    """Every crop once in one of the lanes, and another share in the next epoch."""
    monkeypatch.setattr(shards, "_SHARDS_PER_STREAM", least)
    data = Shards(folder)
    shares = {}
    for epoch in (0, 1):
        whole = sorted(crop for batch in epoch_of(data, epoch=epoch) for crop in batch)
        for stream in range(3):
            crops = epoch_of(data, epoch=epoch, stream=stream, num_streams=3)
            shares[epoch, stream] = sorted(crop for batch in crops for crop in batch)
        assert sorted(crop for stream in range(3) for crop in shares[epoch, stream]) == whole
    names = {key: {name for name, *_ in crops} for key, crops in shares.items()}
    assert names[0, 0] != names[1, 0]


def test_a_lane_may_be_empty_for_an_epoch(tmp_path):
    data = write_manifests(tmp_path / "few", [[RATE] * 3, [RATE]])
    for seed in range(8):
        options = {**OPTIONS, "seed": seed, "micro_batches": 4}
        items = itertools.islice(loader(data, **options), 80)
        epochs = [batch.epoch for batch, _ in items]
        assert len(epochs) == 80 and max(epochs) > 5


def test_shards_that_are_not_there_are_missed(own_folder):
    gone = Shards(own_folder).shards[1]
    (own_folder / gone).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of its shards: {gone}"):
        Shards(own_folder)
    own_folder.with_name(f"{own_folder.name}.report.json").unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of its shards: {gone}"):  # its manifest is there
        Shards(own_folder)


class Sabotaged(Shards):
    """Misbehaves in a worker when it is to read the recording ``name``: as often as ``marks`` allows."""

    def __init__(self, folder: Path, marks: Path, name: str, how: str, times: int) -> None:
        super().__init__(folder)
        self.marks, self.name, self.how, self.times = marks, name, how, times

    def read(self, crops):
        worker = torch.utils.data.get_worker_info()
        if worker is not None and any(crop.segment.name == self.name for crop in crops):
            done = len(list(self.marks.iterdir()))
            if done < self.times:
                (self.marks / str(done)).touch()
                if self.how == "die":
                    os._exit(1)
                if self.how == "kill":
                    os.kill(os.getpid(), 9)
                time.sleep(60)
        return super().read(crops)


@pytest.mark.parametrize("how,times", [("die", 2), ("kill", 1), ("hang", 1)])
def test_workers_that_die_or_hang_are_replaced(folder, tmp_path, monkeypatch, capfd, how, times):
    monkeypatch.setattr(loading, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how long it waits for hung workers
    data = Shards(folder)
    count = len(epoch_of(data)) + 2
    base = taken(loader(data, **OPTIONS), count)
    sabotaged = Sabotaged(folder, tmp_path, base[6][0][0], how, times)
    began = time.monotonic()
    assert taken(loader(sabotaged, **OPTIONS, workers=2, stall_seconds=1.0), count) == base
    assert len(list(tmp_path.iterdir())) == times and time.monotonic() - began < 40
    assert "starting new workers" in capfd.readouterr().err


def test_a_batch_that_kills_every_worker_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_POLL_SECONDS", 0.2)
    base = taken(loader(Shards(folder), **OPTIONS), 3)
    sabotaged = Sabotaged(folder, tmp_path, base[2][0][0], "die", 99)
    items = loader(sabotaged, **OPTIONS, workers=1, stall_seconds=5.0)
    before = []
    with pytest.raises(RuntimeError, match="reading failed 4 times in a row") as caught:
        for batch, _ in items:
            before.append(batch.names)
    assert before == [item[0] for item in base[: len(before)]] and base[2][0][0] in str(caught.value)


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
