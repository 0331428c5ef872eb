"""The endless batches of a process, from any position on; read here or by workers that are replaced when they die."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

from .shards import Batch, Crop, Shards

_POLL_SECONDS = 5.0  # between two checks that the workers are alive
_MAX_RESTARTS = 3  # of the workers, in a row
_MAX_EMPTY_EPOCHS = 20  # in a row; after these a stream is taken to have no clips at all

Cursor = tuple[int, int]  # (epoch, batch): position in a stream


class _PlannedBatch(NamedTuple):
    """A batch to read.

    Attributes:
        crops: Its crops.
        epoch: Epoch of the crops.
        cursor: Position of its stream after it.
    """

    crops: list[Crop]
    epoch: int
    cursor: Cursor


class _WorkersFailed(Exception):
    """A worker died, or no worker delivered a batch in time."""


class _WorkerIterator(Protocol):
    """The parts of PyTorch's private ``_MultiProcessingDataLoaderIter`` that are used here."""

    _workers: list[Any]

    def __next__(self) -> Batch: ...

    def _shutdown_workers(self) -> None: ...


class BatchLoader:
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
            the iterator yielded. Default: the beginning.
        micro_batches: Number per update over all processes; a multiple of ``world_size``.
        rank: Index of this process, in [0, ``world_size``).
        world_size: Number of processes.
        workers: Number of additional processes that read; 0: this process reads. Workers that die, or take longer than
            ``stall_seconds`` for a batch, are replaced. No batch is lost or repeated.
        stall_seconds: Maximum seconds per batch of a worker.
        pin_memory: Put tensors into page-locked memory, which a GPU copies from asynchronously.

    Raises:
        ValueError: Bad options.
    """

    def __init__(
        self,
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
    ) -> None:
        if micro_batches < 1 or micro_batches % world_size or not 0 <= rank < world_size:
            raise ValueError(
                "expected micro_batches to be a multiple of world_size and rank to be below that, got "
                f"{micro_batches}, {world_size} and {rank}"
            )
        if cursors and len(cursors) != micro_batches:
            raise ValueError(f"expected a cursor for each of {micro_batches} micro_batches, got {len(cursors)}")
        self.shards, self.num_workers = shards, workers
        self.stall_seconds, self.poll_seconds = stall_seconds, min(_POLL_SECONDS, stall_seconds)
        self.pin_memory = pin_memory
        cursors = cursors or [(0, 0)] * micro_batches
        streams_per_rank = micro_batches // world_size
        streams = []
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
            streams.append(_stream_batches(epoch_batches, cursors[stream], shards))
        self._plan = (planned for update in zip(*streams, strict=True) for planned in update)
        self._plan_failed = False
        self._workers: _WorkerIterator | None = None
        self._requested: collections.deque[_PlannedBatch] = collections.deque()  # from workers, not yet received
        self._num_restarts = 0  # of the workers, since the last batch

    def __iter__(self) -> Generator[tuple[Batch, Cursor], None, None]:
        """Batches from the ``cursors`` on, or after the last batch of an earlier iterator.

        Yields:
            A batch and the cursor after it, of the first stream of the process, of the second, and so on, in turn.

        Raises:
            ValueError: A stream without a single crop in many epochs.
            RuntimeError: Replaced workers died or hung as well, several times in a row.
        """
        if not self.num_workers:
            for planned in self._plan:
                yield self._read(planned.crops)._replace(epoch=planned.epoch), planned.cursor
            return
        try:
            self._start_workers()
            while True:
                batch = self._receive()
                planned = self._requested.popleft()
                self._num_restarts = 0
                yield batch._replace(epoch=planned.epoch), planned.cursor
        finally:
            self._stop_workers()

    def _read(self, crops: list[Crop]) -> Batch:
        """Read a batch in this process."""
        batch = self.shards.read(crops)
        if not self.pin_memory:
            return batch
        return batch._replace(
            waveforms=batch.waveforms.pin_memory(),
            num_samples=batch.num_samples.pin_memory(),
            ids=batch.ids.pin_memory(),
        )

    def _receive(self) -> Batch:
        """The next batch of the workers, which are replaced if they fail."""
        while True:
            try:
                return self._wait_for_workers()
            except _WorkersFailed as error:
                self._restart(error)

    def _wait_for_workers(self) -> Batch:
        """The next batch of the workers.

        Raises:
            _WorkersFailed: ``_requested`` then holds the batches that new workers have to read first.
        """
        assert self._workers is not None
        start = time.monotonic()
        while True:
            try:
                with self._watchdog(self._workers):
                    return next(self._workers)
            except (RuntimeError, OSError, EOFError) as error:
                if self._plan_failed:
                    raise
                if "timed out" in str(error) and time.monotonic() - start < self.stall_seconds:
                    continue
                _kill(self._workers)
                # The last line of a traceback, if the worker raised an error.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise _WorkersFailed(lines[-1]) from error

    @contextlib.contextmanager
    def _watchdog(self, workers: _WorkerIterator) -> Iterator[None]:
        """Kill workers that do not deliver.

        PyTorch waits forever, past its timeout, for a worker that was stopped while it hands over a batch.
        """
        timer = threading.Timer(self.stall_seconds + self.poll_seconds, _kill, [workers])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _start_workers(self) -> None:
        import signal

        from torch.utils.data import DataLoader

        data: DataLoader[Batch] = DataLoader(
            cast(Any, _CropDataset(self.shards)),
            sampler=self._requests(),
            batch_size=None,
            num_workers=self.num_workers,
            timeout=self.poll_seconds,
            pin_memory=self.pin_memory,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        self._workers = cast(_WorkerIterator, iter(data))
        # PyTorch's SIGCHLD handler raises wherever the program is when a worker dies. We check while waiting for a
        # batch, and put the old handler back. That fails outside the main thread, and if Python did not install it.
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGCHLD, handler)

    def _requests(self) -> Iterator[list[Crop]]:
        """Crops of each batch that workers have to read: first of those that earlier workers did not deliver."""
        for planned in list(self._requested):
            yield planned.crops
        try:
            for planned in self._plan:
                self._requested.append(planned)
                yield planned.crops
        except Exception:
            self._plan_failed = True  # the error is no worker's
            raise

    def _restart(self, failure: _WorkersFailed) -> None:
        """Replace the workers.

        Raises:
            RuntimeError: They were replaced too often since the last batch.
        """
        self._stop_workers()
        self._num_restarts += 1
        if self._num_restarts > _MAX_RESTARTS:
            names = sorted({crop.segment.name for planned in self._requested for crop in planned.crops})
            raise RuntimeError(
                f"reading failed {self._num_restarts} times in a row ({failure}), at one of {', '.join(names[:1000])}"
            ) from failure
        print(f"reading {self.shards.source}: {failure}; starting new workers", file=sys.stderr, flush=True)
        self._start_workers()

    def _stop_workers(self) -> None:
        """End the workers now, before new ones are forked, instead of whenever the garbage is collected."""
        if self._workers is not None:
            self._workers._shutdown_workers()
            self._workers = None


def _kill(workers: _WorkerIterator) -> None:
    """SIGKILL: PyTorch sends SIGTERM, which a stopped worker ignores, and then waits for it."""
    for process in workers._workers:
        process.kill()


class _CropDataset:
    """The map-style data set of the workers. Its indices are the crops of a batch."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, crops: list[Crop]) -> Batch:
        return self.shards.read(crops)


def _stream_batches(
    epoch_batches: Callable[..., Iterator[list[Crop]]], start: Cursor, shards: Shards
) -> Iterator[_PlannedBatch]:
    """The batches of a stream from cursor ``start`` on."""
    (epoch, batch), empty_epochs = start, 0
    while True:
        for crops in epoch_batches(epoch=epoch, skip=batch):
            batch += 1
            yield _PlannedBatch(crops, epoch, (epoch, batch))
        # With few clips, a stream may get none in one epoch and some in the next.
        empty_epochs = 0 if batch else empty_epochs + 1
        if empty_epochs == _MAX_EMPTY_EPOCHS:
            raise ValueError(
                f"{shards.source} has no clip of min_seconds to train on for each of the micro_batches: add audio, or "
                "lower min_seconds or micro_batches"
            )
        epoch, batch = epoch + 1, 0
