"""Batches of audio from Lhotse Shar shards that ``prepare.py`` wrote, on a disk or behind a URL.

A shard is a pair of files: ``cuts.NUMBER.jsonl.gz`` has one line per cut, ``recording.NUMBER.tar`` has their audio.
Lhotse's bucketing sampler forms batches under a budget of seconds from the cuts alone. Reading a batch then reads the
bytes of its crops. Memory holds the cuts of a few shards at a time, whatever the size of the data.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import sys
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import storage
from .audio import SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor

_MIXED_CROPS = 20_000  # shuffled together, from whole shards: more than a ten-hour recording gives
_BUFFER_CROPS = 2000  # held by Lhotse's sampler, which needs more time per batch the more it holds
_MIXED_BATCHES = 256  # shuffled together
_BUCKETS = 20  # of similar lengths: padding in a batch is at most the width of a bucket
_SHARDS_PER_STREAM = 4  # at least, for streams of whole shards: with fewer, streams would differ much in length
_MAX_LINE_BYTES = 1 << 20  # of a manifest
_ATTEMPTS = 3  # at reading a manifest, or a byte range of a remote file
_MAX_SEGMENT_SECONDS = 3600  # `prepare` writes two minutes; a damaged line must not decide how much memory is used

_SCHEMA: dict[str, tuple[str, str, type]] = {  # field of Segment -> section and key of a manifest's line, type
    "id": ("", "id", str),
    "name": ("custom", "name", str),
    "kind": ("custom", "kind", str),
    "group": ("custom", "group", str),
    "index": ("custom", "piece", int),
    "split": ("custom", "split", str),
    "num_samples": ("recording", "num_samples", int),
    "offset": ("custom", "offset", int),
    "num_bytes": ("custom", "size", int),
    "crc32": ("custom", "crc32", int),
    "codec": ("custom", "form", str),
}


@dataclass(slots=True)
class Segment:
    """A cut of a shard: a whole recording, or one of several equal segments of a long one.

    Attributes:
        shard: Name of the tar file.
        id: Of the cut, unique in the data.
        name, kind, group: Of the recording; see ``audio.AudioFile``.
        index: Number of the segment in its recording, from 0.
        split: ``train`` or ``held_out``.
        num_samples: Length at 16 kHz.
        offset: First byte of the audio in the tar file.
        num_bytes: Size of the audio in the tar file: int16 samples, or a FLAC file.
        crc32: Checksum of these bytes.
        codec: ``wav`` or ``flac``.
    """

    shard: str
    id: str
    name: str
    kind: str
    group: str
    index: int
    split: str
    num_samples: int
    offset: int
    num_bytes: int
    crc32: int
    codec: str

    @classmethod
    def from_cut(cls, shard: str, cut: dict[str, Any]) -> Segment:
        """Parse a line of the manifest of ``shard``.

        Raises:
            KeyError, TypeError: ``prepare.py`` did not write this cut.
            ValueError: A field has another type than expected or a value out of range.
        """
        # All keys before any type: a missing key tells the shards of others from damaged ones of ours.
        fields = {name: (cut[section] if section else cut)[key] for name, (section, key, _) in _SCHEMA.items()}
        for name, (_, _, expected) in _SCHEMA.items():
            if type(fields[name]) is not expected:
                raise ValueError(f"expected {expected.__name__} for {name}, got {fields[name]!r}"[:1000])
        segment = cls(shard=shard, **fields)
        max_samples = _MAX_SEGMENT_SECONDS * SAMPLE_RATE
        if (
            not 0 < segment.num_samples <= max_samples
            or not 0 <= segment.offset < 1 << 62
            or not 0 <= segment.num_bytes <= 2 * max_samples
            or segment.crc32 < 0
        ):
            raise ValueError(
                f"expected 1 to {max_samples} samples in a byte range of the shard with a checksum, got "
                f"num_samples={segment.num_samples}, offset={segment.offset}, num_bytes={segment.num_bytes}, "
                f"crc32={segment.crc32}"
            )
        return segment

    def crop(self, start: int, num_samples: int) -> Crop:
        """``num_samples`` samples of the segment from sample ``start`` on."""
        return Crop(self, start, num_samples)

    def crops(self, max_samples: int, min_samples: int, *, seed: int, epoch: int) -> Iterator[Crop]:
        """The segment in consecutive crops of ``max_samples``; the first and the last may be shorter.

        The cuts start at a random phase drawn from (seed, epoch, segment), so that every phase occurs over the epochs.
        Crops shorter than ``min_samples`` are left out.
        """
        phase = 0
        if self.num_samples > max_samples:
            digest = hashlib.blake2b(f"{seed}/{epoch}/{self.id}".encode(), digest_size=8).digest()
            phase = int.from_bytes(digest, "little") % max_samples
        edges = [0, *range(phase or max_samples, self.num_samples, max_samples), self.num_samples]
        for start, end in itertools.pairwise(edges):
            if end - start >= min_samples:
                yield Crop(self, start, end - start)


@dataclass(slots=True)
class Crop:
    """``num_samples`` samples of a segment from sample ``start`` on. Lhotse's sampler takes it for a cut."""

    segment: Segment
    start: int
    num_samples: int
    dataloading_info: Any = None  # set by the sampler

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.num_samples / SAMPLE_RATE


class Batch(NamedTuple):
    """The waveforms of a batch.

    Attributes:
        waveforms: int16 (B, S) at 16 kHz, zero past the end of a clip.
        num_samples: int64 (B,), the length of each clip.
        ids: int64 (B,) in [0, 2^32), one for each (segment, first sample) and the same in every run, for the
            ``clip_ids`` of ``masking.sample_mask``.
        names: (B,) of the recordings.
        faults: (name, reason) of the crops that could not be read and are left out.
        epoch: Number of the epoch that the batch belongs to, from 0.
    """

    waveforms: Tensor
    num_samples: Tensor
    ids: Tensor
    names: list[str]
    faults: list[tuple[str, str]]
    epoch: int = 0


class Shards:
    """Prepared shards in a folder or under a URL of fsspec.

    Attributes:
        source: The folder or URL.
        report: Contents of ``SOURCE.report.json``, which ``prepare`` wrote; empty if the file is missing.
        shards: Names of the tar files, sorted.
        identity: Digest of names and sizes of the tar files and of the first manifest. Other data has another one.
        faults: Name of a manifest -> why the rest of it was left out.

    Raises:
        FileNotFoundError: There are no Lhotse Shar shards.
        ValueError: ``prepare`` did not write these shards, or some of them are missing.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = os.fspath(source).rstrip("/")
        self.faults: dict[str, str] = {}
        self.report: dict[str, Any] = {}
        self._fs, self._root = storage.file_system(self.source)
        self._fs_pid = os.getpid()
        with contextlib.suppress(FileNotFoundError, ValueError):
            report = json.loads(self._read_bytes(f"{self._root}.report.json"))
            self.report = report if isinstance(report, dict) else {}
        # A web server may be unable to list a folder.
        sizes = dict(self.report.get("shards", ())) if self._fs is not None else {}
        sizes = sizes or storage.list_files(self._fs, self._root)
        self.shards = sorted(name for name in sizes if name.startswith("recording.") and name.endswith(".tar"))
        expected = [name for name, _ in self.report.get("shards", ())]
        expected += [f"recording.{name.split('.')[1]}.tar" for name in sizes if name.startswith("cuts.")]
        if self.shards and (missing := sorted(set(expected) - set(sizes))):
            raise ValueError(f"{self.source} lacks {len(missing)} of its shards: {', '.join(missing[:20])}")
        if not self.shards:
            raise FileNotFoundError(f"no Lhotse Shar in {self.source}: expected cuts.*.jsonl.gz, recording.*.tar")
        digest = hashlib.sha256(json.dumps([[name, sizes[name]] for name in self.shards]).encode())
        first_manifest = b""
        with contextlib.suppress(OSError):
            first_manifest = self._read_bytes(self._path(_manifest_name(self.shards[0])))
        digest.update(first_manifest)
        self.identity = digest.hexdigest()
        try:
            with gzip.open(io.BytesIO(first_manifest)) as lines:
                Segment.from_cut(self.shards[0], json.loads(next(lines, b"")))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.source} holds Lhotse Shar shards that `mae-ast-fast prepare` did not write: run "
                f"`mae-ast-fast prepare {self.source} --out DIR` first"
            ) from error
        except (ValueError, OSError, EOFError, zlib.error):
            pass  # a damaged shard of ours: the others may be whole

    def _file_system(self) -> Any:
        """fsspec's file system, opened in this process (those of the web break in a fork); None for a local folder."""
        if self._fs is not None and self._fs_pid != os.getpid():
            self._fs, _ = storage.file_system(self.source)
            self._fs_pid = os.getpid()
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read_bytes(self, path: str) -> bytes:
        if (fs := self._file_system()) is not None:
            return fs.cat_file(path)
        with open(path, "rb") as file:
            return file.read()

    def _shard_segments(self, shard: str) -> Iterator[Segment]:
        """The segments of one shard; of a damaged manifest, those before the damage."""
        manifest = _manifest_name(shard)
        content = b""
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    content = self._read_bytes(self._path(manifest))
                    break
                except OSError as error:
                    if isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(2**attempt)
            with gzip.open(io.BytesIO(content)) as lines:
                while line := lines.readline(_MAX_LINE_BYTES):
                    yield Segment.from_cut(shard, json.loads(line))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            if manifest not in self.faults:
                self.faults[manifest] = f"{type(error).__name__}: {error}"
                print(f"{self.source}: left out the rest of {manifest}: {error}", file=sys.stderr, flush=True)

    def segments(self, split: str) -> Iterator[Segment]:
        """The segments of ``train`` or ``held_out``, shard after shard."""
        for shard in self.shards:
            for segment in self._shard_segments(shard):
                if segment.split == split:
                    yield segment

    def batches(
        self,
        *,
        batch_seconds: float,
        max_seconds: float,
        min_seconds: float,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        stream: int = 0,
        num_streams: int = 1,
    ) -> Iterator[list[Crop]]:
        """The batches of one epoch of ``train``: every sample once, except crops shorter than ``min_seconds``.

        Lhotse's DynamicBucketingSampler groups crops of similar lengths. No batch exceeds ``batch_seconds``. The result
        depends on the data and the arguments only.

        Args:
            batch_seconds: Maximum seconds of audio per batch.
            max_seconds: Longer segments are cut into crops of this length; see ``Segment.crops``.
            min_seconds: Shorter crops are left out.
            seed: Of the order and of the cuts, together with ``epoch``.
            epoch: From 0.
            skip: Number of batches to pass over.
            stream: Index of the share of the epoch to read, in [0, ``num_streams``).
            num_streams: Number of equal shares of the epoch. A share is other data in each epoch. It consists of whole
                shards where there are enough of them; then no other shard is read.

        Raises:
            ValueError: ``max_seconds`` exceeds ``batch_seconds``, or ``min_seconds`` exceeds ``max_seconds``.
        """
        from lhotse.dataset import DynamicBucketingSampler

        max_samples, min_samples, budget = (round(s * SAMPLE_RATE) for s in (max_seconds, min_seconds, batch_seconds))
        min_samples = max(min_samples, 1)
        if not min_samples <= max_samples <= budget:
            raise ValueError(
                f"expected min_seconds <= max_seconds <= batch_seconds, got {min_seconds}, {max_seconds} and "
                f"{batch_seconds}"
            )
        edges = bucket_edges(max_samples)
        # Twice what all buckets hold when each lacks one crop to a full batch: some bucket is always full.
        num_buffered = sum(budget // max(low, min_samples) + 1 for low in [0, *edges[:-1]])
        sampler = DynamicBucketingSampler(
            self._crops(max_samples, min_samples, seed=seed, epoch=epoch, stream=stream, num_streams=num_streams),
            constraint=_Budget(budget, edges),
            duration_bins=edges[:-1],
            buffer_size=max(_BUFFER_CROPS, 2 * num_buffered),
            shuffle=True,
            drop_last=False,
            seed=_seed_from(f"order {seed}/{epoch}/{stream}"),
            world_size=1,
            rank=0,
        )
        batches = _full_batches(sampler, _Budget(budget, edges))
        rng = random.Random(_seed_from(f"batches {seed}/{epoch}/{stream}"))
        yield from itertools.islice(_shuffled(batches, rng), skip, None)

    def _crops(
        self, max_samples: int, min_samples: int, *, seed: int, epoch: int, stream: int, num_streams: int
    ) -> Iterator[Crop]:
        """The crops of one stream of an epoch, shuffled within some whole shards."""
        rng = random.Random(_seed_from(f"shards {seed}/{epoch}"))
        shards, stride = rng.sample(self.shards, len(self.shards)), 1
        if len(shards) >= _SHARDS_PER_STREAM * num_streams:
            shards = shards[stream::num_streams]
        else:
            stride = num_streams  # every shard gives each stream some of its segments
        rng = random.Random(_seed_from(f"windows {seed}/{epoch}/{stream}"))
        pool: list[Crop] = []
        for shard_index, shard in enumerate(shards):
            for index, segment in enumerate(self._shard_segments(shard), shard_index):
                if segment.split == "train" and (index - stream) % stride == 0:
                    pool += segment.crops(max_samples, min_samples, seed=seed, epoch=epoch)
            if len(pool) >= _MIXED_CROPS:
                rng.shuffle(pool)
                yield from pool
                pool = []
        rng.shuffle(pool)
        yield from pool

    def read(self, crops: Sequence[Crop]) -> Batch:
        """The waveforms of ``crops``. Crops that cannot be read are left out and listed in ``Batch.faults``."""
        import torch

        decoded: list[tuple[Crop, np.ndarray]] = []
        faults = []
        for crop, payload in zip(crops, self._payloads(crops), strict=True):
            try:
                decoded.append((crop, _decode(crop, payload)))
            except _UnreadableCrop as error:
                faults.append((crop.segment.name, str(error)))
        waveforms = np.zeros((len(decoded), max((crop.num_samples for crop, _ in decoded), default=0)), np.int16)
        for row, (crop, samples) in zip(waveforms, decoded, strict=True):
            row[: crop.num_samples] = samples
        ids = [zlib.crc32(f"{crop.segment.id}@{crop.start}".encode()) for crop, _ in decoded]
        return Batch(
            waveforms=torch.from_numpy(waveforms),
            num_samples=torch.tensor([crop.num_samples for crop, _ in decoded], dtype=torch.int64),
            ids=torch.tensor(ids, dtype=torch.int64),
            names=[crop.segment.name for crop, _ in decoded],
            faults=faults,
        )

    def _payloads(self, crops: Sequence[Crop]) -> list[bytes | Exception]:
        """The bytes to read for each crop, or the error of reading them."""
        ranges = [_byte_range(crop) for crop in crops]
        if (fs := self._file_system()) is not None:
            return self._fetch(fs, [self._path(crop.segment.shard) for crop in crops], ranges)
        payloads: list[bytes | Exception] = []
        with contextlib.ExitStack() as stack:
            descriptors: dict[str, int] = {}
            for crop, (start, num_bytes) in zip(crops, ranges, strict=True):
                shard = crop.segment.shard
                try:
                    if shard not in descriptors:
                        descriptors[shard] = os.open(self._path(shard), os.O_RDONLY)
                        stack.callback(os.close, descriptors[shard])
                    payloads.append(os.pread(descriptors[shard], num_bytes, start))
                except OSError as error:
                    payloads.append(error)
        return payloads

    @staticmethod
    def _fetch(fs: Any, paths: list[str], ranges: list[tuple[int, int]]) -> list[bytes | Exception]:
        """Byte ranges of remote files, all in one request; those that fail are requested again."""
        payloads: list[Any] = [None] * len(paths)
        todo = list(range(len(paths)))
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            starts, ends = [ranges[i][0] for i in todo], [sum(ranges[i]) for i in todo]
            replies = fs.cat_ranges([paths[i] for i in todo], starts, ends, on_error="return")
            for i, reply in zip(todo, replies, strict=True):
                start, num_bytes = ranges[i]
                # A web server without support for ranges (Python's own) sends the whole file each time.
                whole_file = isinstance(reply, bytes) and len(reply) > num_bytes
                payloads[i] = reply[start : start + num_bytes] if whole_file else reply
            todo = [
                i for i in todo if isinstance(payloads[i], Exception) and not isinstance(payloads[i], FileNotFoundError)
            ]
            if not todo:
                break
        return payloads


def bucket_edges(max_samples: int) -> list[int]:
    """The longest crop of each bucket of similar lengths, ascending, in samples; the last is ``max_samples``."""
    return sorted({-(-max_samples * k // _BUCKETS) for k in range(1, _BUCKETS + 1)})


class _UnreadableCrop(Exception):
    """A crop that cannot be read; the message says why."""


class _Budget:
    """Tells Lhotse's sampler when a batch is full: when another crop of its bucket might exceed the budget.

    Lhotse's TimeConstraint counts the longest crop times the number of crops, but our steps pad nothing.

    Args:
        max_samples: Maximum per batch.
        edges: The longest crop of each bucket in samples, ascending.
    """

    def __init__(self, max_samples: int, edges: list[int]) -> None:
        self.max_samples, self.edges = max_samples, edges
        self.reset()

    def reset(self) -> None:
        self.current = self.next = 0

    def copy(self) -> _Budget:
        return _Budget(self.max_samples, self.edges)

    def measure_length(self, crop: Crop) -> int:
        return crop.num_samples

    def select_bucket(self, buckets: list[int], example: Crop) -> int:
        return bisect_left(buckets, example.num_samples)

    def add(self, crop: Crop) -> None:
        if not self.current:
            self.next = self.edges[bisect_left(self.edges, crop.num_samples)]
        self.current += crop.num_samples

    def exceeded(self) -> bool:
        return self.current > self.max_samples

    def close_to_exceeding(self) -> bool:
        return self.current + self.next > self.max_samples


def _full_batches(batches: Iterable[Iterable[Crop]], budget: _Budget) -> Iterator[list[Crop]]:
    """Full batches as they come. The crops left in the buckets at the end form batches of mixed lengths."""
    rest: list[Crop] = []
    for batch in batches:
        crops, filled_budget = list(batch), budget.copy()
        for crop in crops:
            filled_budget.add(crop)
        if filled_budget.close_to_exceeding():
            yield crops
        else:
            rest += crops
    rest.sort(key=lambda crop: crop.num_samples)
    first = num_samples = 0
    for index, crop in enumerate(rest):
        if num_samples + crop.num_samples > budget.max_samples:
            yield rest[first:index]
            first, num_samples = index, 0
        num_samples += crop.num_samples
    if rest:
        yield rest[first:]


def _shuffled(batches: Iterable[list[Crop]], rng: random.Random) -> Iterator[list[Crop]]:
    """Batches in random order within a few hundred: near the end of an epoch, the sampler has only long crops left."""
    pool: list[list[Crop]] = []
    for batch in batches:
        pool.append(batch)
        if len(pool) > _MIXED_BATCHES:
            index = rng.randrange(len(pool))
            pool[index], pool[-1] = pool[-1], pool[index]
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def _manifest_name(shard: str) -> str:
    return f"cuts.{shard.split('.')[1]}.jsonl.gz"


def _seed_from(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _byte_range(crop: Crop) -> tuple[int, int]:
    """First byte in the tar file and number of bytes to read for a crop."""
    segment = crop.segment
    if segment.codec == "wav":
        return segment.offset + 2 * crop.start, 2 * crop.num_samples
    return segment.offset, segment.num_bytes


def _decode(crop: Crop, payload: bytes | Exception) -> np.ndarray:
    """int16 (crop.num_samples,)."""
    segment = crop.segment
    if isinstance(payload, Exception):
        raise _UnreadableCrop(f"{segment.shard} cannot be read: {type(payload).__name__}: {payload}")
    num_bytes = _byte_range(crop)[1]
    if len(payload) != num_bytes:
        raise _UnreadableCrop(f"{segment.shard} is cut short: {len(payload)} of {num_bytes} bytes")
    if num_bytes == segment.num_bytes and zlib.crc32(payload) != segment.crc32:
        raise _UnreadableCrop(f"{segment.shard} is damaged: wrong checksum")
    if segment.codec == "wav":
        return np.frombuffer(payload, "<i2")
    import soundfile

    try:
        samples, _ = soundfile.read(io.BytesIO(payload), dtype="int16")
    except soundfile.LibsndfileError as error:
        raise _UnreadableCrop(f"{segment.shard} is damaged: {error}") from error
    if samples.shape != (segment.num_samples,):
        raise _UnreadableCrop(
            f"{segment.shard} is damaged: expected {segment.num_samples} samples, got shape {samples.shape}"
        )
    return samples[crop.start : crop.start + crop.num_samples]
