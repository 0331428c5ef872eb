"""Updates as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .micro_batch import DeviceBatch

# The loader's batches have about 20 to 70 shapes (tests/training/test_train_step.py counts them). All graphs share the
# memory of one update. Each adds its nodes and a copy of its inputs, about 50 kB per second of audio.
GRAPHS_KEPT = 128


class GraphCache(OrderedDict[Any, Any]):
    """The graphs of the ``GRAPHS_KEPT`` most recently used keys; None for a key that was used once."""

    def take(self, key: Any, record: Callable[[], Any]) -> Any:
        """The graph of ``key``: None at its first use, the result of ``record`` from the second on."""
        graph = self.get(key)
        if graph is None and key in self:
            graph = record()
        self[key] = graph
        self.move_to_end(key)
        if len(self) > GRAPHS_KEPT:
            self.popitem(last=False)
        return graph


@dataclass
class CapturedUpdate:
    """A graph, and the tensors at the addresses that it reads and writes.

    Attributes:
        batch: Its input. A batch is copied there before a replay.
        replay: Launches the graph.
        metrics: Its result.
    """

    batch: DeviceBatch
    replay: Callable[[], Any]
    metrics: Tensor


class Graphs:
    """``update`` as CUDA graphs, one per batch shape; the last ``GRAPHS_KEPT`` shapes are kept.

    The first update of a shape runs eagerly. It does what must not happen during a capture: Triton compiles, AdamW
    creates its state, libraries allocate their workspaces. The second one is captured. All graphs run on one stream,
    one after another, and share their memory.

    Args:
        update: Function of the batches of an update that returns its metrics.
        model: Model that ``update`` trains. A graph holds only as long as the model's buffers stay in place.
        device: CUDA device.
    """

    def __init__(
        self, update: Callable[[Sequence[DeviceBatch]], Tensor], model: nn.Module, device: torch.device
    ) -> None:
        self.update, self.model, self.device = update, model, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.cache = GraphCache()

    def __call__(self, batch: DeviceBatch) -> Tensor:
        """Make an update with one batch, whose masks are drawn."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):  # this also selects the stream's device
            graph = self.cache.take(self._key(batch), lambda: self._capture(batch))
            if graph is None:
                metrics = self.update([batch])
            else:
                for static, current in zip(graph.batch.tensors, batch.tensors, strict=True):
                    static.copy_(current, non_blocking=True)
                graph.replay()
                metrics = graph.metrics.clone()
        caller.wait_stream(self.stream)
        return metrics

    def _key(self, batch: DeviceBatch) -> Any:
        """What a graph depends on: shapes, row counts and the addresses of the model's buffers.

        A graph reads the buffers at their addresses during capture; a longer table of positions has another address.
        """
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in batch.tensors)
        return shapes, batch.token_counts, tuple(buffer.data_ptr() for buffer in self.model.buffers())

    def _capture(self, batch: DeviceBatch) -> CapturedUpdate:
        static = batch.clone()
        replay, metrics = record(lambda: self.update([static]), self.pool, self.stream)
        return CapturedUpdate(static, replay, metrics)


def record(function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], Any], Tensor]:
    """Capture ``function`` as a CUDA graph without running it.

    Args:
        function: Function to capture.
        pool: Memory pool of the graph.
        stream: Stream to capture on.

    Returns:
        A function that replays the graph, and the tensor that holds its result after a replay.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
