"""One update of the weights as a GPU likes it: forward, backward, clipping and AdamW, and nothing waits for the device.

    step = TrainStep(MAEAST(config).cuda(), lr=1e-4, precision="bf16")
    numbers = step(features, frames)  # Numbers on the device: read them now and then, not after every update

- The weights are fp32 and so is what AdamW keeps; ``precision`` is that of the stream and of the matrix products.
- The learning rate, the seeds of dropout and the scale of fp16 lie on the device. The factor that clips the gradient's
  norm goes into the fused AdamW as its ``grad_scale``: no pass of its own over the gradients. An update whose norm is
  not finite is skipped there, on the device, and leaves the weights and AdamW's state as they were.
- ``graphs``: an update of shapes that were seen before is one CUDA graph. Below some 20 to 35 clips launching a base
  model's kernels takes longer than running them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import PretrainingModel, check_lengths
from .packing import Sizes, round_up

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS_KEPT = 16  # of the shapes used last

Mask = Tensor | tuple[Tensor, ...] | None


class Numbers(NamedTuple):
    """What an update tells: 0-d fp32 tensors on the device, the losses as in ``MAEASTOutput``."""

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    grad_norm: Tensor  # before clipping; not finite: the update was skipped


class TrainStep:
    """Updates a model's weights, batch by batch, with the paper's AdamW (section 3.2: betas .9 and .98, eps 1e-6).

    Args:
        model: ``MAEAST`` or ``SSAST``, on its device and in training mode.
        lr: Learning rate, until ``__call__`` brings another.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled, on all parameters.
        clip_norm: Limit of the gradient's norm.
        precision: "fp32", "bf16", or "fp16", whose loss is scaled (``torch.amp.GradScaler``).
        compile: Run the model through ``torch.compile(fullgraph=True)``.
        graphs: Run updates as CUDA graphs; batches are padded to buckets of like shapes.

    Raises:
        ValueError: An unknown precision, or graphs where there can be none.
    """

    def __init__(
        self,
        model: PretrainingModel,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        clip_norm: float = 10.0,
        precision: str = "fp32",
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.model, self.clip_norm, self.precision = model, clip_norm, precision
        self.device = next(model.parameters()).device
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs need a model on a CUDA device, got one on {self.device}")
        if graphs and getattr(model, "recompute", None) == "layer":
            raise ValueError("graphs and recompute='layer' exclude each other: a graph cannot set the generator back")
        self.lr = torch.tensor(float(lr), dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self.forward: Callable[..., Any] = torch.compile(model, fullgraph=True) if compile else model
        self.bucketed = compile or graphs
        self.optimizer.zero_grad(set_to_none=True)  # what a backward before left is of no update
        self.tokens = self.rows = 0  # real tokens so far, and rows that were computed for them
        self.graphs = _Graphs(self._update, model, self.device) if graphs else None

    def __call__(
        self,
        features: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        mask: Mask = None,
        *,
        lr: float | None = None,
        seed: int | Tensor | None = None,
        clip_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Numbers:
        """One update.

        Args:
            features: (B, T, F), as the model takes them.
            lengths: (B,) real frames of each clip, on the host (numbers or a CPU tensor); None: all T.
            mask: As the model takes it, hiding as many tokens of each clip as one that the model draws (on a CPU, where
                counting costs nothing, any number); None: the model draws it.
            lr: Learning rate from this update on.
            seed: Of the masks that are drawn here, with ``clip_ids`` and ``epoch`` as in ``masking.sample_mask``.
            clip_ids: (B,) integers.
            epoch: Number of the pass over the data.

        Raises:
            ValueError: What the model raises; lengths on a GPU, or not between 0 and T; clips too short to hide
                something; a mask, where shapes are padded to buckets.
        """
        if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
            raise ValueError(f"lengths must be known on the host, got a tensor on {lengths.device}")
        if mask is not None and self.bucketed:
            raise ValueError("compile and graphs pad batches and draw their masks: expected mask=None, got one")
        frames = self._frames(features, lengths)
        sizes = self.model.exact_sizes(features, frames)
        clip_ids = None if clip_ids is None else torch.as_tensor(clip_ids)
        self.tokens += sizes.visible + sizes.masked
        if lr is not None:
            self.lr.fill_(lr)
        if self.bucketed:
            features, frames, clip_ids = _pad(features, frames, clip_ids, self.model)
            sizes = sizes.bucket()
        self.rows += sizes.visible + sizes.masked
        lengths = torch.tensor(frames)
        if self.device.type == "cuda":
            lengths = lengths.pin_memory().to(self.device, non_blocking=True)  # any other copy would wait
        if mask is None:
            draw = {"seed": seed, "clip_ids": clip_ids, "epoch": epoch}
            mask = self.model.sample_mask(lengths, features.shape[1], **draw)
        elif self.device.type == "cpu":
            sizes = None  # the model counts, and complains of a mask that hides another number
        update = self._update if self.graphs is None else self.graphs
        return Numbers(*update(features.to(self.device, non_blocking=True), lengths, mask, sizes).unbind())

    @staticmethod
    def _frames(features: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        """Frames of each clip, checked: behind this nobody on the host looks at them."""
        if not isinstance(features, Tensor) or features.dim() != 3 or not len(features):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, T, F) of at least one clip, got {got}")
        clips, longest = features.shape[:2]
        if lengths is None:
            return [longest] * clips
        return check_lengths(lengths, clips, longest).tolist()

    def _update(self, features: Tensor, lengths: Tensor, mask: Mask, sizes: Sizes | None) -> Tensor:
        """The update itself, on the device alone; ``Numbers`` as one tensor (5,)."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            out = self.forward(features, lengths, mask, sizes=sizes)
        scale = 1.0 if self.scaler is None else self.scaler.scale(out.loss.detach().new_ones(()))
        (out.loss * scale).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None], foreach=True)
        norm = norm / scale
        # As clip_grad_norm_ does it; in fp32, as the fused kernel reads both.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0).float()
        self.optimizer.found_inf = (~norm.isfinite()).float()
        if self.scaler is None:
            self.optimizer.step()
        else:  # multiplies grad_scale by its own, and finds its own found_inf
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # inside a graph: so that graphs share the gradients' memory
        told = out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy, norm
        return torch.stack([number.detach().float() for number in told])

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and scaler: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave, on any device: also its rate, betas, eps and weight decay."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            self.lr.fill_(float(group["lr"]))
            group |= {"lr": self.lr, "fused": True, "foreach": None, "capturable": self.device.type == "cuda"}
        if self.scaler is not None and state.get("scaler") is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.graphs is not None:
            self.graphs.known.clear()  # they would go on with the state of before


def _pad(
    features: Tensor, frames: list[int], clip_ids: Tensor | None, model: PretrainingModel
) -> tuple[Tensor, list[int], Tensor | None]:
    """A batch with empty clips and frames behind it, so that like batches have one shape."""
    batch, longest = features.shape[:2]
    block = model.config.patch_size[0]
    clips, width = round_up(batch, least=1), round_up(-(-longest // block)) * block
    width = max(longest, min(width, model.max_frames))
    features = F.pad(features, (0, 0, 0, width - longest, 0, clips - batch))
    clip_ids = None if clip_ids is None else F.pad(clip_ids, (0, clips - batch))
    return features, [*frames, *[0] * (clips - batch)], clip_ids


class _Graphs:
    """``update`` as CUDA graphs, one for each shape of batch; the last ``GRAPHS_KEPT`` shapes are kept.

    A shape's first update runs as it is, and prepares what must not happen while a graph is recorded (Triton compiles,
    AdamW makes its state, libraries take their workspace); the second is recorded. All run on one stream, one after
    another, and share their memory.
    """

    def __init__(self, update: Callable[..., Tensor], model: nn.Module, device: torch.device) -> None:
        self.update, self.model, self.device = update, model, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.known: OrderedDict[Any, tuple[list[Tensor], Callable[[], Any], Tensor] | None] = OrderedDict()

    def __call__(self, features: Tensor, lengths: Tensor, mask: Mask, sizes: Sizes) -> Tensor:
        masks = mask if isinstance(mask, tuple) else (mask,)
        inputs = [features, lengths, *masks]
        # A graph reads from where the buffers were; longer positions are another table.
        buffers = tuple(buffer.data_ptr() for buffer in self.model.buffers())
        key = tuple((x.shape, x.dtype) for x in inputs), sizes, buffers
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):  # and on its device
            if key not in self.known:
                self.known[key] = None
                told = self.update(features, lengths, mask, sizes)
            else:
                if self.known[key] is None:
                    own = [x.clone() for x in inputs]
                    given = tuple(own[2:]) if isinstance(mask, tuple) else own[2]
                    replay, result = record(lambda: self.update(own[0], own[1], given, sizes), self.pool, self.stream)
                    self.known[key] = own, replay, result
                own, replay, result = self.known[key]
                for place, x in zip(own, inputs, strict=True):
                    place.copy_(x, non_blocking=True)
                replay()
                told = result.clone()
        self.known.move_to_end(key)
        if len(self.known) > GRAPHS_KEPT:
            self.known.popitem(last=False)
        caller.wait_stream(self.stream)
        return told


def record(function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], Any], Tensor]:
    """A CUDA graph of what ``function`` does, which is not done yet: what replays it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
