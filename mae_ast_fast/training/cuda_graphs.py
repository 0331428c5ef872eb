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


class Graphs:
    """``update`` as CUDA graphs, one per batch shape; the last ``GRAPHS_KEPT`` shapes are kept.

    The first update of a shape runs eagerly. It does what must not happen during a capture: Triton compiles, AdamW
    creates its state, libraries allocate their workspaces. The second one is captured. All graphs run on one stream,
    one after another, and share their memory.

    Args:
        update: Function of log-mel (B, T, F), frame counts (B,), one or several masks and the token counts.
        model: Model that ``update`` trains. A graph holds only as long as the model's buffers stay in place.
        device: CUDA device.
    """

    def __init__(self, update: Callable[..., Tensor], model: nn.Module, device: torch.device) -> None:
        self.update, self.model, self.device = update, model, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.cache = GraphCache()

    def __call__(self, log_mel: Tensor, num_frames: Tensor, mask: Mask, token_counts: TokenCounts | None) -> Tensor:
        masks = mask if isinstance(mask, tuple) else (mask,)
        inputs = [log_mel, num_frames, *masks]
        # A graph reads the buffers at their addresses during capture; a longer table of positions has another address.
        buffers = tuple(buffer.data_ptr() for buffer in self.model.buffers())
        key = tuple((x.shape, x.dtype) for x in inputs), token_counts, buffers

        def capture() -> tuple[list[Tensor], Callable[[], Any], Tensor]:
            static_inputs = [x.clone() for x in inputs]
            static_log_mel, static_num_frames, *static_masks = static_inputs
            static_mask = tuple(static_masks) if isinstance(mask, tuple) else static_masks[0]
            replay, result = record(
                lambda: self.update(static_log_mel, static_num_frames, static_mask, token_counts),
                self.pool,
                self.stream,
            )
            return static_inputs, replay, result

        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):  # this also selects the stream's device
            graph = self.cache.take(key, capture)
            if graph is None:
                metrics = self.update(log_mel, num_frames, mask, token_counts)
            else:
                static_inputs, replay, result = graph
                for static_input, x in zip(static_inputs, inputs, strict=True):
                    static_input.copy_(x, non_blocking=True)
                replay()
                metrics = result.clone()
        caller.wait_stream(self.stream)
        return metrics


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
