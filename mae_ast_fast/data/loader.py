"""The batches of a process without end: by this process or by workers that may die, from any position on."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from .shards import Batch, Crop, Shards

_POLL_SECONDS = 5.0  # between two looks at whether the workers still live
_RESTARTS = 3  # of the workers, in a row
_EMPTY_EPOCHS = 20  # in a row, after which a lane is taken to have no clips at all


def loader(
    shards: Shards,
    *,
    batch_seconds: float,
    max_seconds: float,
    min_seconds: float,
    seed: int,
    positions: Sequence[tuple[int, int]] = (),
    micro_batches: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    stall_seconds: float = 300.0,
    pin_memory: bool = False,
) -> Iterator[tuple[Batch, tuple[int, int]]]:
    """This process's batches, epoch after epoch, without end.

    Each of an update's ``micro_batches`` has an order of its own, of its share of the epoch (its lane), and goes from
    epoch to epoch by itself; a process takes an equal, consecutive part of these lanes. So what an update computes
    knows neither the number of processes nor of workers, and where there are four shards for each lane, a process lists
    no other shards than its own.

    Args:
        shards: To read.
        batch_seconds, max_seconds, min_seconds, seed: See ``Shards.batches``; ``batch_seconds`` of one micro-batch.
        positions: Of each lane, all processes': epoch and batch to begin with, the second value of its last item.
            Empty: from the beginning.
        micro_batches: Of an update, all processes together; a multiple of ``world_size``.
        rank, world_size: Of this process, and how many there are.
        workers: Processes that read, in addition to this one; 0: this one reads. Workers that die, or take longer than
            ``stall_seconds`` for a batch, are replaced, and nothing is lost or read twice.
        pin_memory: Puts tensors where a GPU copies them from without waiting.

    Yields:
        A batch of the first of its lanes, of the second, and so on, and that lane's position behind it.

    Raises:
        ValueError: Bad options, or an epoch without a single window for a lane.
        RuntimeError: New workers died or hung as well, several times in a row.
    """
    if micro_batches < 1 or micro_batches % world_size or not 0 <= rank < world_size:
        raise ValueError(
            "expected micro_batches to be a multiple of world_size and rank to be below that, got "
            f"{micro_batches}, {world_size} and {rank}"
        )
    if positions and len(positions) != micro_batches:
        raise ValueError(f"expected a position for each of {micro_batches} micro_batches, got {len(positions)}")
    options = {"batch_seconds": batch_seconds, "max_seconds": max_seconds, "min_seconds": min_seconds, "seed": seed}
    positions = positions or [(0, 0)] * micro_batches
    share = micro_batches // world_size
    lanes = [
        _lane(functools.partial(shards.batches, **options, lane=lane, lanes=micro_batches), positions[lane], shards)
        for lane in range(rank * share, (rank + 1) * share)
    ]
    source = (item for items in zip(*lanes, strict=True) for item in items)
    if not workers:
        for windows, epoch, after in source:
            batch = shards.read(windows)
            if pin_memory:
                batch = batch._replace(**{key: getattr(batch, key).pin_memory() for key in Batch._fields[:3]})
            yield batch._replace(epoch=epoch), after
        return
    pending: collections.deque[tuple[list[Crop], int, tuple[int, int]]] = collections.deque()  # asked for, not here
    restarts = 0
    while True:
        batches = _worker_batches(shards, source, pending, workers, stall_seconds, pin_memory)
        try:
            for batch in batches:
                _, epoch, after = pending.popleft()
                restarts = 0
                yield batch._replace(epoch=epoch), after
        except _WorkersFailed as error:
            restarts += 1
            if restarts > _RESTARTS:
                names = sorted({window.piece.name for windows, *_ in pending for window in windows})
                raise RuntimeError(
                    f"reading failed {restarts} times in a row ({error}), at one of {', '.join(names[:1000])}"
                ) from error
            print(f"reading {shards.source}: {error}; starting new workers", file=sys.stderr, flush=True)
        finally:
            batches.close()


def _lane(
    epoch_batches: Callable[..., Iterator[list[Crop]]], position: tuple[int, int], shards: Shards
) -> Iterator[tuple[list[Crop], int, tuple[int, int]]]:
    """The batches of a lane from a position on: windows, their epoch, and the position behind them."""
    (epoch, batch), empty = position, 0
    while True:
        for windows in epoch_batches(epoch=epoch, skip=batch):
            batch += 1
            yield windows, epoch, (epoch, batch)
        empty = 0 if batch else empty + 1  # of few clips a lane may get none in one epoch and some in the next
        if empty == _EMPTY_EPOCHS:
            raise ValueError(f"{shards.source} gives no clip of min_seconds to train on, for each of the micro_batches")
        epoch, batch = epoch + 1, 0


class _WorkersFailed(Exception):
    """A worker died, or none brought a batch in time."""


class _Reader:
    """What a worker does: a map-style data set whose indices are the windows of a batch."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, windows: list[Crop]) -> Batch:
        return self.shards.read(windows)


def _worker_batches(
    shards: Shards, source: Iterator, pending: collections.deque, workers: int, stall_seconds: float, pin_memory: bool
) -> Iterator[Batch]:
    """Batches by worker processes: first those that ``pending`` still waits for, then those of ``source``.

    Raises:
        _WorkersFailed: ``pending`` then holds what new workers are to begin with.
    """
    import signal

    from torch.utils.data import DataLoader

    failed = []

    def asked() -> Iterator[list[Crop]]:
        for windows, *_ in list(pending):
            yield windows
        try:
            for item in source:
                pending.append(item)
                yield item[0]
        except Exception as error:  # of the order and no worker's
            failed.append(error)
            raise

    poll = min(_POLL_SECONDS, stall_seconds)
    data = DataLoader(
        _Reader(shards),
        sampler=asked(),
        batch_size=None,
        num_workers=workers,
        timeout=poll,
        pin_memory=pin_memory,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(data)
    # PyTorch's handler of a worker's death raises wherever the program just is; we look when we wait for a batch.
    with contextlib.suppress(ValueError, TypeError):  # in another thread, or one not of Python
        signal.signal(signal.SIGCHLD, handler)

    def kill() -> None:
        """PyTorch sends SIGTERM, of which a worker that is stopped takes no note, and then waits for it."""
        for process in batches._workers:
            process.kill()

    waited = time.monotonic()
    try:
        while True:
            # A worker that is stopped while it hands over a batch is waited for without end: PyTorch's timeout is over.
            watchdog = threading.Timer(stall_seconds + poll, kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if failed:
                    raise
                if "timed out" in str(error) and time.monotonic() - waited < stall_seconds:
                    continue
                kill()
                said = str(error).strip().splitlines() or [type(error).__name__]  # of a worker's error: its traceback
                raise _WorkersFailed(said[-1]) from error
            finally:
                watchdog.cancel()
            yield batch
            waited = time.monotonic()
    finally:
        batches._shutdown_workers()  # now, and not whenever the garbage is collected: new ones are to be forked
