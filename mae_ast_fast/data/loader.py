"""The endless batches of a process, from any position on; read here or by workers that are replaced when they die."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol, cast

from .shards import Batch, Crop, Shards

_POLL_SECONDS = 5.0  # between two checks that the workers are alive
_MAX_RESTARTS = 3  # of the workers, in a row
_MAX_EMPTY_EPOCHS = 20  # in a row; after these a stream is taken to have no clips at all

Cursor = tuple[int, int]  # (epoch, batch): position in a stream
_CropBatch = tuple[list[Crop], int, Cursor]  # crops of a batch, their epoch, and the cursor after them


def loader(
    shards: Shards,
    *,
    batch_seconds: float,
    max_seconds: float,
    min_seconds: float,
    seed: int,
    cursors: Sequence[Cursor] = (),
    micro_batches: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    stall_seconds: float = 300.0,
    pin_memory: bool = False,
) -> Generator[tuple[Batch, Cursor], None, None]:
    """This process's batches, epoch after epoch, without end.

    Each of the ``micro_batches`` of an update reads a stream of its own: a share of every epoch in its own order, which
    moves on to the next epoch by itself. A process reads an equal number of consecutive streams. The data of an update
    therefore depends on neither the number of processes nor the number of workers. With at least four shards per
    stream, a process reads its own shards only.

    Args:
        shards: Data to read.
        batch_seconds: Maximum seconds of audio per micro-batch.
        max_seconds: Longer segments are cut into crops of this length; see ``Shards.batches``.
        min_seconds: Shorter crops are left out.
        seed: Of order and cuts; see ``Shards.batches``.
        cursors: (epoch, batch) at which each stream starts, for the streams of all processes: the second values that
            the loader yielded. Default: the beginning.
        micro_batches: Number per update over all processes; a multiple of ``world_size``.
        rank: Index of this process, in [0, ``world_size``).
        world_size: Number of processes.
        workers: Number of additional processes that read; 0: this process reads. Workers that die, or take longer than
            ``stall_seconds`` for a batch, are replaced. No batch is lost or repeated.
        stall_seconds: Maximum seconds per batch of a worker.
        pin_memory: Put tensors into page-locked memory, which a GPU copies from asynchronously.

    Yields:
        A batch and the cursor after it, of the first stream of the process, of the second, and so on, in turn.

    Raises:
        ValueError: Bad options, or a stream without a single crop in many epochs.
        RuntimeError: Replaced workers died or hung as well, several times in a row.
    """
    if micro_batches < 1 or micro_batches % world_size or not 0 <= rank < world_size:
        raise ValueError(
            "expected micro_batches to be a multiple of world_size and rank to be below that, got "
            f"{micro_batches}, {world_size} and {rank}"
        )
    if cursors and len(cursors) != micro_batches:
        raise ValueError(f"expected a cursor for each of {micro_batches} micro_batches, got {len(cursors)}")
    cursors = cursors or [(0, 0)] * micro_batches
    streams_per_rank = micro_batches // world_size
    local_streams = []
    for stream in range(rank * streams_per_rank, (rank + 1) * streams_per_rank):
        epoch_batches = functools.partial(
            shards.batches,
            batch_seconds=batch_seconds,
            max_seconds=max_seconds,
            min_seconds=min_seconds,
            seed=seed,
            stream=stream,
            num_streams=micro_batches,
        )
        local_streams.append(_stream_batches(epoch_batches, cursors[stream], shards))
    source = (item for items in zip(*local_streams, strict=True) for item in items)
    if not workers:
        for crops, epoch, cursor in source:
            batch = shards.read(crops)
            if pin_memory:
                batch = batch._replace(**{key: getattr(batch, key).pin_memory() for key in Batch._fields[:3]})
            yield batch._replace(epoch=epoch), cursor
        return
    pending: collections.deque[_CropBatch] = collections.deque()  # requested from workers, not yet received
    restarts = 0
    while True:
        batches = _worker_batches(
            shards, source, pending, workers=workers, stall_seconds=stall_seconds, pin_memory=pin_memory
        )
        try:
            for batch in batches:
                _, epoch, cursor = pending.popleft()
                restarts = 0
                yield batch._replace(epoch=epoch), cursor
        except _WorkersFailed as error:
            restarts += 1
            if restarts > _MAX_RESTARTS:
                names = sorted({crop.segment.name for crops, *_ in pending for crop in crops})
                raise RuntimeError(
                    f"reading failed {restarts} times in a row ({error}), at one of {', '.join(names[:1000])}"
                ) from error
            print(f"reading {shards.source}: {error}; starting new workers", file=sys.stderr, flush=True)
        finally:
            batches.close()


def _stream_batches(
    epoch_batches: Callable[..., Iterator[list[Crop]]], start: Cursor, shards: Shards
) -> Iterator[_CropBatch]:
    """The batches of a stream from cursor ``start`` on."""
    (epoch, batch), empty_epochs = start, 0
    while True:
        for crops in epoch_batches(epoch=epoch, skip=batch):
            batch += 1
            yield crops, epoch, (epoch, batch)
        # With few clips, a stream may get none in one epoch and some in the next.
        empty_epochs = 0 if batch else empty_epochs + 1
        if empty_epochs == _MAX_EMPTY_EPOCHS:
            raise ValueError(
                f"{shards.source} has no clip of min_seconds to train on for each of the micro_batches: add audio, or "
                "lower min_seconds or micro_batches"
            )
        epoch, batch = epoch + 1, 0


class _WorkersFailed(Exception):
    """A worker died, or no worker delivered a batch in time."""


class _CropDataset:
    """The map-style data set of the workers. Its indices are the crops of a batch."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, crops: list[Crop]) -> Batch:
        return self.shards.read(crops)


class _WorkerIterator(Protocol):
    """The parts of PyTorch's private ``_MultiProcessingDataLoaderIter`` that are used here."""

    _workers: list[Any]

    def __next__(self) -> Batch: ...

    def _shutdown_workers(self) -> None: ...


def _worker_batches(
    shards: Shards,
    source: Iterator[_CropBatch],
    pending: collections.deque[_CropBatch],
    *,
    workers: int,
    stall_seconds: float,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Batches read by worker processes: first those that ``pending`` still waits for, then those of ``source``.

    Raises:
        _WorkersFailed: ``pending`` then holds the batches that new workers have to read first.
    """
    import signal

    from torch.utils.data import DataLoader

    source_errors = []

    def requests() -> Iterator[list[Crop]]:
        for crops, *_ in list(pending):
            yield crops
        try:
            for item in source:
                pending.append(item)
                yield item[0]
        except Exception as error:  # raised by the order of batches, not by a worker
            source_errors.append(error)
            raise

    poll_seconds = min(_POLL_SECONDS, stall_seconds)
    data: DataLoader[Batch] = DataLoader(
        cast(Any, _CropDataset(shards)),
        sampler=requests(),
        batch_size=None,
        num_workers=workers,
        timeout=poll_seconds,
        pin_memory=pin_memory,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    batches = cast(_WorkerIterator, iter(data))
    # PyTorch's SIGCHLD handler raises wherever the program is when a worker dies. We check while waiting for a batch.
    with contextlib.suppress(ValueError, TypeError):  # not the main thread, or a handler that Python did not install
        signal.signal(signal.SIGCHLD, handler)

    def kill_workers() -> None:
        """SIGKILL: PyTorch sends SIGTERM, which a stopped worker ignores, and then waits for it."""
        for process in batches._workers:
            process.kill()

    requested = time.monotonic()
    try:
        while True:
            # PyTorch waits forever, past its timeout, for a worker that was stopped while it hands over a batch.
            watchdog = threading.Timer(stall_seconds + poll_seconds, kill_workers)
            watchdog.daemon = True
            watchdog.start()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if source_errors:
                    raise
                if "timed out" in str(error) and time.monotonic() - requested < stall_seconds:
                    continue
                kill_workers()
                # The last line of a traceback, if the worker raised an error.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise _WorkersFailed(lines[-1]) from error
            finally:
                watchdog.cancel()
            yield batch
            requested = time.monotonic()
    finally:
        batches._shutdown_workers()  # before new workers are forked, not whenever the garbage is collected
