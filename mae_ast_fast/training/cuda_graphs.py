"""Updates as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.packing import TokenCounts

if TYPE_CHECKING:
    from .step import Mask

# The loader's batches have some 20 to 70 shapes (tests/training/test_train_step.py counts them). All graphs share the
# memory of one update. Each adds its nodes and a copy of its inputs, some 50 kB for a second of audio.
GRAPHS_KEPT = 128


class GraphCache(OrderedDict[Any, Any]):
    """The graphs of the ``GRAPHS_KEPT`` keys used last; None of a key that was used once."""

    def take(self, key: Any, record: Callable[[], Any]) -> Any:
        """The graph of ``key``: None at its first use, what ``record`` returns from the second on."""
        found = self.get(key)
        if found is None and key in self:
            found = record()
        self[key] = found
        self.move_to_end(key)
        if len(self) > GRAPHS_KEPT:
            self.popitem(last=False)
        return found


class Graphs:
    """``update`` as CUDA graphs, one for each shape of batch; the last ``GRAPHS_KEPT`` shapes are kept.

    A shape's first update runs as it is, and prepares what must not happen while a graph is recorded (Triton compiles,
    AdamW makes its state, libraries take their workspace); the second is recorded. All run on one stream, one after
    another, and share their memory.
    """

    def __init__(self, update: Callable[..., Tensor], model: nn.Module, device: torch.device) -> None:
        self.update, self.model, self.device = update, model, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.known = GraphCache()

    def __call__(self, features: Tensor, lengths: Tensor, mask: Mask, sizes: TokenCounts) -> Tensor:
        masks = mask if isinstance(mask, tuple) else (mask,)
        inputs = [features, lengths, *masks]
        # A graph reads from where the buffers were; longer positions are another table.
        buffers = tuple(buffer.data_ptr() for buffer in self.model.buffers())
        key = tuple((x.shape, x.dtype) for x in inputs), sizes, buffers

        def make() -> tuple[list[Tensor], Callable[[], Any], Tensor]:
            own = [x.clone() for x in inputs]
            given = tuple(own[2:]) if isinstance(mask, tuple) else own[2]
            return own, *record(lambda: self.update(own[0], own[1], given, sizes), self.pool, self.stream)

        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):  # and on its device
            graph = self.known.take(key, make)
            if graph is None:
                told = self.update(features, lengths, mask, sizes)
            else:
                own, replay, result = graph
                for place, x in zip(own, inputs, strict=True):
                    place.copy_(x, non_blocking=True)
                replay()
                told = result.clone()
        caller.wait_stream(self.stream)
        return told


def record(function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], Any], Tensor]:
    """A CUDA graph of what ``function`` does, which is not done yet: what replays it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
