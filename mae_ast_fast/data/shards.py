"""Batches of audio out of Lhotse Shar shards that ``prepare.py`` wrote, on a disk or behind a URL.

A shard is ``cuts.NUMBER.jsonl.gz``, a cut a line, and ``recording.NUMBER.tar`` with their audio. Lhotse's bucketing
sampler makes batches under a budget of seconds out of the cuts alone; a batch then reads the bytes of its windows. No
more than some shards' cuts are in memory at a time, whatever the size of the data.
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

_MIXED = 20_000  # windows that are shuffled together, out of whole shards: more than a ten-hour recording gives
_BUFFER = 2000  # windows that Lhotse's sampler holds; it takes the longer for a batch the more they are
_MIXED_BATCHES = 256  # that are shuffled together
_BUCKETS = 20  # of like lengths: a batch is padded by no more than a bucket's width
_SHARDS_A_LANE = 4  # at least, where lanes take whole shards: fewer would differ much in length
_LINE = 1 << 20  # bytes of a manifest's line at most
_RETRIES = 3  # of reading a manifest, or a part of a remote file
_LONGEST_SECONDS = 3600  # of a piece; ours have two minutes, and memory must not follow what a damaged line says


@dataclass(slots=True)
class Segment:
    """A cut: a recording, or one of several pieces of a long one.

    Attributes:
        shard: Name of the tar file.
        id: The cut's, unique in the data.
        name, kind, group: Of the recording; see ``audio.AudioFile``.
        number: Of the piece in the recording, from 0.
        split: train or held_out.
        samples: At 16 kHz.
        offset, size, crc32: Where its bytes lie in the tar file: int16 samples, or FLAC.
        form: wav or flac.
    """

    shard: str
    id: str
    name: str
    kind: str
    group: str
    number: int
    split: str
    samples: int
    offset: int
    size: int
    crc32: int
    form: str

    @classmethod
    def of(cls, shard: str, cut: dict[str, Any]) -> Segment:
        """From a line of a manifest.

        Raises:
            KeyError, TypeError, ValueError: The cut is none of ``prepare.py``'s.
        """
        custom = cut["custom"]
        words = shard, cut["id"], *(custom[key] for key in ("name", "kind", "group"))
        numbers = (cut["recording"]["num_samples"], *(custom[key] for key in ("offset", "size", "crc32")))
        rest = custom["piece"], custom["split"], custom["form"]
        if [type(value) for value in (*words, *numbers, *rest)] != [str] * 5 + [int] * 5 + [str] * 2:
            raise ValueError(f"expected names and numbers, got {words}, {numbers} and {rest}"[:1000])
        most = _LONGEST_SECONDS * SAMPLE_RATE
        if min(numbers) < 0 or not 0 < numbers[0] <= most or numbers[1] >> 62 or numbers[2] > 2 * most:
            raise ValueError(f"expected samples and a place in the shard, got {numbers}")
        return cls(*words, *rest[:2], *numbers, rest[2])

    def window(self, start: int, samples: int) -> Crop:
        """A part of the piece, in samples."""
        return Crop(self, start, samples)

    def windows(self, longest: int, shortest: int, seed: int, epoch: int) -> Iterator[Crop]:
        """The piece, cut where it is longer than ``longest`` samples.

        The cuts lie at a random phase, drawn for each (seed, epoch, piece), so that every one occurs over the epochs;
        what is under ``shortest`` is left out.
        """
        phase = 0
        if self.samples > longest:
            digest = hashlib.blake2b(f"{seed}/{epoch}/{self.id}".encode(), digest_size=8).digest()
            phase = int.from_bytes(digest, "little") % longest
        edges = [0, *range(phase or longest, self.samples, longest), self.samples]
        for start, end in itertools.pairwise(edges):
            if end - start >= shortest:
                yield Crop(self, start, end - start)


@dataclass(slots=True)
class Crop:
    """``samples`` samples of a piece, from ``start`` on: what Lhotse's sampler sees as a cut."""

    piece: Segment
    start: int
    samples: int
    dataloading_info: Any = None  # the sampler's

    @property
    def duration(self) -> float:
        return self.samples / SAMPLE_RATE


class Batch(NamedTuple):
    """The waveforms of a batch.

    Attributes:
        waveforms: int16 (B, S), zero past a length.
        lengths: int64 (B,), in samples.
        ids: int64 (B,) in [0, 2^32), one for each (piece, first sample) and the same in every run, for the
            ``clip_ids`` of ``masking.sample_mask``.
        names: (B,) of the recordings.
        faults: (name, reason) of the windows that could not be read and are left out.
        epoch: Which the batch is of.
    """

    waveforms: Tensor
    lengths: Tensor
    ids: Tensor
    names: list[str]
    faults: list[tuple[str, str]]
    epoch: int = 0


class Shards:
    """Prepared shards in a folder or under a URL (fsspec's).

    Attributes:
        source: The folder or URL.
        report: What ``prepare`` found, out of ``SOURCE.report.json``; empty if that is not there.
        identity: Digest of names and sizes of the shards and of the first manifest: other data has another.
        faults: Manifest -> why its (remaining) cuts are left out, for those read so far.

    Raises:
        FileNotFoundError: No such folder, or no shard there.
        ValueError: The shards are not of ``prepare``'s making.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = os.fspath(source).rstrip("/")
        self.faults: dict[str, str] = {}
        self.report: dict[str, Any] = {}
        self._fs, self._root = storage.file_system(self.source)
        self._process = os.getpid()
        with contextlib.suppress(FileNotFoundError, ValueError):
            report = json.loads(self._whole(f"{self._root}.report.json"))
            self.report = report if isinstance(report, dict) else {}
        sizes = dict(self.report.get("shards", ())) if self._fs is not None else {}  # a web server may list nothing
        sizes = sizes or storage.list_files(self._fs, self._root)
        self.shards = sorted(name for name in sizes if name.startswith("recording.") and name.endswith(".tar"))
        wanted = [name for name, _ in self.report.get("shards", ())]
        wanted += [f"recording.{name.split('.')[1]}.tar" for name in sizes if name.startswith("cuts.")]
        if self.shards and (absent := sorted(set(wanted) - set(sizes))):
            raise ValueError(f"{self.source} lacks {len(absent)} of its shards: {', '.join(absent[:20])}")
        if not self.shards:
            raise FileNotFoundError(f"no Lhotse Shar in {self.source}: expected cuts.*.jsonl.gz, recording.*.tar")
        digest = hashlib.sha256(json.dumps([[name, sizes[name]] for name in self.shards]).encode())
        first = b""
        with contextlib.suppress(OSError):
            first = self._whole(self._path(_manifest(self.shards[0])))
        digest.update(first)
        self.identity = digest.hexdigest()
        try:
            with gzip.open(io.BytesIO(first)) as lines:
                Segment.of(self.shards[0], json.loads(next(lines, b"")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"the shards in {self.source} are none of `prepare`'s: prepare them first") from error
        except (ValueError, OSError, EOFError, zlib.error):
            pass  # one of ours that is damaged: the others may be whole

    def _remote(self) -> Any:
        """fsspec's file system, None for a folder; one of this process, as those of the web do not outlive a fork."""
        if self._fs is not None and self._process != os.getpid():
            self._fs, _ = storage.file_system(self.source)
            self._process = os.getpid()
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _whole(self, path: str) -> bytes:
        if (fs := self._remote()) is not None:
            return fs.cat_file(path)
        with open(path, "rb") as file:
            return file.read()

    def _pieces(self, shard: str) -> Iterator[Segment]:
        """Of one shard; where its manifest is damaged, those before that."""
        manifest = _manifest(shard)
        try:
            for attempt in range(_RETRIES):
                try:
                    content = self._whole(self._path(manifest))
                    break
                except OSError as error:
                    if isinstance(error, FileNotFoundError) or attempt == _RETRIES - 1:
                        raise
                    time.sleep(2**attempt)
            with gzip.open(io.BytesIO(content)) as lines:
                while line := lines.readline(_LINE):
                    yield Segment.of(shard, json.loads(line))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            if manifest not in self.faults:
                self.faults[manifest] = f"{type(error).__name__}: {error}"
                print(f"{self.source}: left out the rest of {manifest}: {error}", file=sys.stderr, flush=True)

    def pieces(self, split: str) -> Iterator[Segment]:
        """The pieces of train or held_out, shard after shard."""
        for shard in self.shards:
            for piece in self._pieces(shard):
                if piece.split == split:
                    yield piece

    def batches(
        self,
        *,
        batch_seconds: float,
        max_seconds: float,
        min_seconds: float,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        lane: int = 0,
        lanes: int = 1,
    ) -> Iterator[list[Crop]]:
        """The batches of one epoch of train: every sample once, less bits under ``min_seconds``.

        Lhotse's DynamicBucketingSampler groups windows of like lengths; no batch has more than ``batch_seconds``. All
        of it follows from the data and the arguments.

        Args:
            batch_seconds: Of audio in a batch at most.
            max_seconds: Longer pieces are cut into windows of this length; see ``Segment.windows``.
            min_seconds: Shorter windows are left out.
            seed, epoch: Of the order and of the cuts.
            skip: Batches to pass over.
            lane, lanes: One of so many equal shares of the epoch; which, changes with the epoch. Whole shards where
                there are enough of them: then nothing is read of the others.

        Raises:
            ValueError: ``max_seconds`` exceeds ``batch_seconds``, or ``min_seconds`` exceeds ``max_seconds``.
        """
        from lhotse.dataset import DynamicBucketingSampler

        longest, shortest, budget = (round(s * SAMPLE_RATE) for s in (max_seconds, min_seconds, batch_seconds))
        shortest = max(shortest, 1)
        if not shortest <= longest <= budget:
            raise ValueError(
                f"expected min_seconds <= max_seconds <= batch_seconds, got {min_seconds}, {max_seconds} and "
                f"{batch_seconds}"
            )
        edges = bucket_edges(longest)
        # Twice as much as all buckets hold when each lacks one window to a batch: some bucket is always full.
        full = sum(budget // max(low, shortest) + 1 for low in [0, *edges[:-1]])
        sampler = DynamicBucketingSampler(
            self._windows(longest, shortest, seed, epoch, lane, lanes),
            constraint=_Budget(budget, edges),
            duration_bins=edges[:-1],
            buffer_size=max(_BUFFER, 2 * full),
            shuffle=True,
            drop_last=False,
            seed=_number(f"order {seed}/{epoch}/{lane}"),
            world_size=1,
            rank=0,
        )
        batches = _full_batches(sampler, _Budget(budget, edges))
        rng = random.Random(_number(f"batches {seed}/{epoch}/{lane}"))
        yield from itertools.islice(_shuffled(batches, rng), skip, None)

    def _windows(self, longest: int, shortest: int, seed: int, epoch: int, lane: int, lanes: int) -> Iterator[Crop]:
        rng = random.Random(_number(f"shards {seed}/{epoch}"))
        shards, every = rng.sample(self.shards, len(self.shards)), 1
        if len(shards) >= _SHARDS_A_LANE * lanes:
            shards = shards[lane::lanes]
        else:
            every = lanes  # each gives every lane some of its pieces
        rng = random.Random(_number(f"windows {seed}/{epoch}/{lane}"))
        pool: list[Crop] = []
        for number, shard in enumerate(shards):
            for index, piece in enumerate(self._pieces(shard), number):
                if piece.split == "train" and (index - lane) % every == 0:
                    pool += piece.windows(longest, shortest, seed, epoch)
            if len(pool) >= _MIXED:
                rng.shuffle(pool)
                yield from pool
                pool = []
        rng.shuffle(pool)
        yield from pool

    def read(self, windows: Sequence[Crop]) -> Batch:
        """The waveforms of these windows, less those that cannot be read: of these, name and reason."""
        import torch

        read, faults = [], []
        for window, payload in zip(windows, self._payloads(windows), strict=True):
            try:
                read.append((window, _decode(window, payload)))
            except _Unreadable as error:
                faults.append((window.piece.name, str(error)))
        waveforms = np.zeros((len(read), max((window.samples for window, _ in read), default=0)), np.int16)
        for row, (window, samples) in zip(waveforms, read, strict=True):
            row[: window.samples] = samples
        lengths = torch.tensor([window.samples for window, _ in read], dtype=torch.int64)
        ids = [zlib.crc32(f"{window.piece.id}@{window.start}".encode()) for window, _ in read]
        names = [window.piece.name for window, _ in read]
        return Batch(torch.from_numpy(waveforms), lengths, torch.tensor(ids, dtype=torch.int64), names, faults)

    def _payloads(self, windows: Sequence[Crop]) -> list[bytes | Exception]:
        """The bytes of each window, or why there are none."""
        ranges = [_byte_range(window) for window in windows]
        if (fs := self._remote()) is not None:
            return self._fetch(fs, [self._path(window.piece.shard) for window in windows], ranges)
        found: list[bytes | Exception] = []
        with contextlib.ExitStack() as stack:
            files: dict[str, int] = {}
            for window, (start, size) in zip(windows, ranges, strict=True):
                shard = window.piece.shard
                try:
                    if shard not in files:
                        files[shard] = os.open(self._path(shard), os.O_RDONLY)
                        stack.callback(os.close, files[shard])
                    found.append(os.pread(files[shard], size, start))
                except OSError as error:
                    found.append(error)
        return found

    @staticmethod
    def _fetch(fs: Any, paths: list[str], ranges: list[tuple[int, int]]) -> list[bytes | Exception]:
        """Byte ranges of remote files, all in one call; what fails for a moment is asked for again."""
        found: list[Any] = [None] * len(paths)
        todo = list(range(len(paths)))
        for attempt in range(_RETRIES):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            first, end = [ranges[i][0] for i in todo], [sum(ranges[i]) for i in todo]
            parts = fs.cat_ranges([paths[i] for i in todo], first, end, on_error="return")
            for i, part in zip(todo, parts, strict=True):
                start, size = ranges[i]
                # A web server that knows no ranges (Python's own) sends the whole file each time.
                found[i] = part[start : start + size] if isinstance(part, bytes) and len(part) > size else part
            todo = [i for i in todo if isinstance(found[i], Exception) and not isinstance(found[i], FileNotFoundError)]
            if not todo:
                break
        return found


def bucket_edges(longest: int) -> list[int]:
    """The longest window of each bucket of like lengths, ascending, in samples; ``longest`` is that of all."""
    return sorted({-(-longest * k // _BUCKETS) for k in range(1, _BUCKETS + 1)})


class _Unreadable(Exception):
    """A window that cannot be read; the message says why."""


class _Budget:
    """Tells Lhotse's sampler when a batch is full: when another window of its bucket might exceed the budget.

    Lhotse's TimeConstraint counts the longest window times their number; nothing is padded in our steps.

    Args:
        samples: In a batch at most.
        edges: The longest window of each bucket, ascending.
    """

    def __init__(self, samples: int, edges: list[int]) -> None:
        self.samples, self.edges = samples, edges
        self.reset()

    def reset(self) -> None:
        self.current = self.next = 0

    def copy(self) -> _Budget:
        return _Budget(self.samples, self.edges)

    def measure_length(self, window: Crop) -> int:
        return window.samples

    def select_bucket(self, buckets: list[int], example: Crop) -> int:
        return bisect_left(buckets, example.samples)

    def add(self, window: Crop) -> None:
        if not self.current:
            self.next = self.edges[bisect_left(self.edges, window.samples)]
        self.current += window.samples

    def exceeded(self) -> bool:
        return self.current > self.samples

    def close_to_exceeding(self) -> bool:
        return self.current + self.next > self.samples


def _full_batches(batches: Iterable[Iterable[Crop]], budget: _Budget) -> Iterator[list[Crop]]:
    """Full batches as they come; what the buckets have left at the end goes into batches of all lengths."""
    rest: list[Crop] = []
    for batch in batches:
        windows, count = list(batch), budget.copy()
        for window in windows:
            count.add(window)
        if count.close_to_exceeding():
            yield windows
        else:
            rest += windows
    rest.sort(key=lambda window: window.samples)
    first = filled = 0
    for index, window in enumerate(rest):
        if filled + window.samples > budget.samples:
            yield rest[first:index]
            first, filled = index, 0
        filled += window.samples
    if rest:
        yield rest[first:]


def _shuffled(batches: Iterable[list[Crop]], rng: random.Random) -> Iterator[list[Crop]]:
    """In random order within some hundreds: towards the end of an epoch the sampler has long windows left alone."""
    pool: list[list[Crop]] = []
    for batch in batches:
        pool.append(batch)
        if len(pool) > _MIXED_BATCHES:
            place = rng.randrange(len(pool))
            pool[place], pool[-1] = pool[-1], pool[place]
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def _manifest(shard: str) -> str:
    return f"cuts.{shard.split('.')[1]}.jsonl.gz"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _byte_range(window: Crop) -> tuple[int, int]:
    """First byte and number of bytes to read of the tar file."""
    piece = window.piece
    if piece.form == "wav":
        return piece.offset + 2 * window.start, 2 * window.samples
    return piece.offset, piece.size


def _decode(window: Crop, payload: bytes | Exception) -> np.ndarray:
    """int16 (window.samples,)."""
    piece = window.piece
    if isinstance(payload, Exception):
        raise _Unreadable(f"{piece.shard} cannot be read: {type(payload).__name__}: {payload}")
    size = _byte_range(window)[1]
    if len(payload) != size:
        raise _Unreadable(f"{piece.shard} is cut short: {len(payload)} of {size} bytes")
    if size == piece.size and zlib.crc32(payload) != piece.crc32:
        raise _Unreadable(f"{piece.shard} is damaged: wrong checksum")
    if piece.form == "wav":
        return np.frombuffer(payload, "<i2")
    import soundfile

    try:
        samples, _ = soundfile.read(io.BytesIO(payload), dtype="int16")
    except soundfile.LibsndfileError as error:
        raise _Unreadable(f"{piece.shard} is damaged: {error}") from error
    if samples.shape != (piece.samples,):
        raise _Unreadable(f"{piece.shard} is damaged: {samples.shape} samples and not {piece.samples}")
    return samples[window.start : window.start + window.samples]
