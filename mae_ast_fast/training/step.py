"""One update of the weights as a GPU likes it: forward, backward, clipping and AdamW, and nothing waits for the device.

    step = TrainStep(MAEAST(config).cuda(), lr=1e-4, precision="bf16")
    numbers = step(features, frames)  # Numbers on the device: read them now and then, not after every update

- The weights are fp32 and so is what AdamW keeps; ``precision`` is that of the stream and of the matrix products.
- The learning rate, the seeds of dropout and the scale of fp16 lie on the device. The factor that clips the gradient's
  norm goes into the fused AdamW as its ``grad_scale``: no pass of its own over the gradients. An update whose norm is
  not finite is skipped there, on the device, and leaves the weights and AdamW's state as they were.
- ``update``: an update of several micro-batches, on one process or several. It is that of one batch of all their clips:
  losses are means over all masked tokens, whoever has how many of them, and the input is normalised by the statistics
  of all. Without dropout 1 process and N agree up to rounding.
- ``graphs``: an update of shapes that were seen before is one CUDA graph. Below some 20 to 35 clips launching a base
  model's kernels takes longer than running them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..devices import send
from ..models.base import PretrainingModel, check_lengths
from ..ops.packing import TokenCounts, round_up
from .cuda_graphs import Graphs
from .distributed import broadcast, check_parallel, data_parallel, shard

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Mask = Tensor | tuple[Tensor, ...] | None


class StepMetrics(NamedTuple):
    """What an update tells: 0-d fp32 tensors on the device, the losses as in ``MAEASTOutput``."""

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    grad_norm: Tensor  # before clipping; not finite: the update was skipped


class MicroBatch(NamedTuple):
    """A micro-batch: what ``TrainStep.__call__`` takes. Of 0 clips: one that adds nothing to its update."""

    features: Tensor
    lengths: Sequence[int] | Tensor | None = None
    seed: int | Tensor | None = None
    clip_ids: Tensor | None = None
    epoch: int = 0


@dataclass
class _DeviceBatch:
    """A micro-batch on the device.

    Attributes:
        features: (B, T, F).
        lengths: (B,) int64.
        draw: Of the masks.
        sizes: Of the rows.
        counts: Whether it counts in the update; False: it replaces a micro-batch without clips.
    """

    features: Tensor
    lengths: Tensor
    draw: dict[str, Any]
    sizes: TokenCounts
    counts: bool


class _LossAndMetrics(nn.Module):
    """A model's loss and, detached, the numbers that it tells (4,): tensors, since DDP looks into no dataclass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out = self.model(*inputs, **options)
        told = out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy
        return out.loss, torch.stack([number.detach().float() for number in told])


class TrainStep:
    """Updates a model's weights, batch by batch, with the paper's AdamW (section 3.2: betas .9 and .98, eps 1e-6).

    Args:
        model: ``MAEAST`` or ``SSAST``, on its device and in training mode.
        lr: Learning rate, until ``__call__`` brings another.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled, on all parameters.
        clip_norm: Limit of the gradient's norm.
        precision: "fp32", "bf16", or "fp16", whose loss is scaled (``torch.amp.GradScaler``): the first updates
            may be skipped while the scale settles.
        compile: Run the model through ``torch.compile(fullgraph=True)``.
        graphs: Run updates as CUDA graphs; batches are padded to buckets of like shapes.
        parallel: "ddp" or "fsdp" (distributed.py): over all processes of the default process group, which start from
            the first one's weights. None: this process alone. FSDP changes ``model`` in place, gathers weights in bf16
            where that is the precision, and excludes fp16 and ``compile``.

    Attributes:
        rows: Rows that were computed so far.

    Raises:
        ValueError: An unknown precision, or graphs, compile or processes where there can be none.
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
        parallel: str | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        if parallel is not None and graphs:
            raise ValueError(f"graphs hold no communication: expected parallel=None with them, got {parallel!r}")
        if parallel == "fsdp" and (compile or precision == "fp16"):
            got = "compile" if compile else "precision='fp16'"
            raise ValueError(f"parallel='fsdp' takes fp32 and bf16, not compiled, got {got}: use parallel='ddp'")
        self.parallel, self.processes = parallel, check_parallel(parallel)
        self.model, self.clip_norm, self.precision = model, clip_norm, precision
        self.device = next(model.parameters()).device
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs need a model on a CUDA device, got one on {self.device}")
        if graphs and getattr(model, "recompute", None) == "layer":
            raise ValueError("graphs and recompute='layer' exclude each other: a graph cannot set the generator back")
        if parallel is not None:
            broadcast(model)
        if parallel == "fsdp":
            shard(model, PRECISIONS[precision])
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
        self.forward: Callable[..., Any] = _LossAndMetrics(torch.compile(model, fullgraph=True) if compile else model)
        if parallel == "ddp":
            self.forward = data_parallel(self.forward)
        self.learned = False  # whether DDP knows its graph
        self.bucketed = compile or graphs
        self.optimizer.zero_grad(set_to_none=True)  # what a backward before left is of no update
        self.rows = self._tokens = 0
        self._tokens_on_device: Tensor | int = 0  # of batches whose lengths the host does not know
        self.graphs = Graphs(self._update, model, self.device) if graphs else None

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
    ) -> StepMetrics:
        """One update.

        Args:
            features: (B, T, F), as the model takes them.
            lengths: (B,) real frames of each clip: integers, a tensor on the CPU, or one on the GPU; None: all T. The
                host does not wait for lengths on a GPU and does not check their values: those below 0 count as 0, those
                above T as T. It does not know the number of rows either, and computes as many as clips of T frames
                have. Lengths on the host are faster wherever clips are shorter than T.
            mask: As the model takes it, hiding as many tokens of each clip as one that the model draws (on a CPU, where
                counting costs nothing, and with lengths on a GPU any number); None: the model draws it.
            lr: Learning rate from this update on.
            seed: Of the masks that are drawn here, with ``clip_ids`` and ``epoch`` as in ``masking.sample_mask``.
            clip_ids: (B,) integers.
            epoch: Number of the pass over the data.

        Raises:
            ValueError: What the model raises; lengths on the host that are not between 0 and T; clips too short to hide
                something (with lengths on a GPU only where T is; else losses and gradients are 0); a mask, where shapes
                are padded to buckets.
        """
        if mask is not None and (self.bucketed or self.parallel is not None):
            raise ValueError("compile, graphs and processes draw their masks: expected mask=None, got one")
        part = MicroBatch(features, lengths, seed, clip_ids, epoch)
        if self.parallel is not None:
            return self.update([part], lr=lr)
        batch = self._prepare(part, drawn=mask is None)
        if lr is not None:
            self.lr.fill_(lr)
        sizes = batch.sizes
        if mask is None:
            mask = self.model.sample_mask(batch.lengths, batch.features.shape[1], **batch.draw)
        elif self.device.type == "cpu":
            sizes = None  # the model counts, and complains of a mask that hides another number
        update = self._update if self.graphs is None else self.graphs
        return StepMetrics(*update(batch.features, batch.lengths, mask, sizes).unbind())

    def update(self, parts: Sequence[MicroBatch], *, lr: float | None = None) -> StepMetrics:
        """One update of several micro-batches; all processes make it together, each with its own and as many.

        Masks without a seed, and dropout, are drawn by the state of torch's generator and by the micro-batch's place
        among those of all processes, rank by rank: processes with the same state draw differently, and N processes
        draw what one does.

        Args:
            parts: This process's micro-batches, at least one; of no clips where there are none to be had.
            lr: Learning rate from this update on.

        Returns:
            Of the whole update, the same in all processes; NaN, and nothing changes, where no micro-batch has clips.

        Raises:
            ValueError: As of ``__call__``, in the process that it happens in (others wait for it until their timeout);
                no parts; several of them with ``graphs``; with DDP, parameters without a gradient.
        """
        if not parts:
            raise ValueError("an update needs at least one part, got none")
        if self.parallel is None and len(parts) == 1 and not _is_empty(parts[0].features):
            features, lengths, seed, clip_ids, epoch = parts[0]
            return self(features, lengths, lr=lr, seed=seed, clip_ids=clip_ids, epoch=epoch)
        if self.graphs is not None:
            clips = [len(part.features) for part in parts]
            raise ValueError(f"with graphs an update is one batch of clips, got parts of {clips} clips")
        batches = [self._stand_in(part) if _is_empty(part.features) else self._prepare(part) for part in parts]
        if lr is not None:
            self.lr.fill_(lr)
        rank = dist.get_rank() if self.parallel is not None else 0
        weights, statistics = self._global_weights_and_stats(batches)
        if self.parallel == "ddp" and not self.learned:
            self._warm_up_ddp(batches[0], statistics)
        draw = int(torch.randint(2**62, ())) + rank * len(parts)
        scale, told = self._scale(), torch.zeros(4, device=self.device)
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            with self._grad_sync(last=index + 1 == len(parts)):
                with _generator(draw + index, self.device):
                    loss, numbers = self._loss(batch, statistics)
                # Gradients are averaged over processes.
                (loss * (weight * self.processes * scale).to(loss.dtype)).backward()
            told += weight * numbers
        if self.parallel is not None:
            dist.all_reduce(told)
        return StepMetrics(*told.unbind(), self._clip_and_update(scale))

    @property
    def tokens(self) -> int:
        """Real tokens so far; at most ``rows``. Reading it waits for the GPU where lengths were on one."""
        return self._tokens + int(self._tokens_on_device)

    def _prepare(self, part: MicroBatch, drawn: bool = True, counts: bool = True) -> _DeviceBatch:
        """A micro-batch, checked, on its way to the device.

        Args:
            part: As the caller gave it.
            drawn: Whether its masks are drawn here.
            counts: As of ``_DeviceBatch``.
        """
        features, lengths, seed, clip_ids, epoch = part
        if not isinstance(features, Tensor) or features.dim() != 3 or not len(features):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, T, F) of at least one clip, got {got}")
        clip_ids = None if clip_ids is None else torch.as_tensor(clip_ids)
        frames, sizes = self._sizes(features, lengths, drawn)
        if counts and not sizes.has_padding_rows:
            self._tokens += sizes.visible + sizes.masked
        elif counts:
            block, grid_f = self.model.config.patch_size[0], self.model.config.grid_f
            self._tokens_on_device = self._tokens_on_device + (frames // block * grid_f).sum()
        if self.bucketed:
            shape = Shape.of(self.model, *features.shape[:2], sizes)
            features, frames, clip_ids = _pad(features, frames, clip_ids, shape)
            sizes = shape.sizes
        self.rows += sizes.visible + sizes.masked
        draw = {"seed": seed, "clip_ids": clip_ids, "epoch": epoch}
        return _DeviceBatch(send(features, self.device), send(frames, self.device), draw, sizes, counts)

    def _sizes(
        self, features: Tensor, lengths: Sequence[int] | Tensor | None, drawn: bool
    ) -> tuple[Tensor, TokenCounts]:
        """Frames of each clip (B,), int64, where the caller has them, and the sizes of the rows.

        Nobody on the host looks at the frames after this.
        """
        clips, longest = features.shape[:2]
        known = _is_known(lengths)
        if lengths is None:
            frames = torch.full((clips,), longest, device="cpu")
        else:
            frames = check_lengths(lengths, clips, longest, check_values=known)
        exact = self.model.exact_sizes(features, frames if known else None)  # an error where nothing can be hidden
        if known:
            return frames, exact
        return frames.clamp(0, longest), self.model.largest_sizes(clips, longest, drawn)

    def _stand_in(self, part: MicroBatch) -> _DeviceBatch:
        """Silence for a micro-batch without clips: it runs as the others do, so that processes stay together."""
        block, limit = self.model.config.patch_size[0], self.model.max_frames
        frames = next(count for count in range(block, limit + 1, block) if self.model.sizes_of([count]).masked)
        features = part.features.new_zeros(1, frames, part.features.shape[2])
        return self._prepare(MicroBatch(features, seed=0), counts=False)

    def _update(self, features: Tensor, lengths: Tensor, mask: Mask, sizes: TokenCounts | None) -> Tensor:
        """An update of one batch, on the device alone; ``StepMetrics`` as one tensor (5,)."""
        loss, told = self._forward(features, lengths, mask, sizes)
        scale = self._scale()
        (loss * scale).backward()
        return torch.cat((told, self._clip_and_update(scale)[None]))

    def _forward(
        self,
        features: Tensor,
        lengths: Tensor,
        mask: Mask,
        sizes: TokenCounts | None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and what else is told (4,)."""
        dtype = PRECISIONS[self.precision]
        options = {} if statistics is None else {"statistics": statistics}
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.forward(features, lengths, mask, sizes=sizes, **options)

    def _scale(self) -> Tensor | float:
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def _clip_and_update(self, scale: Tensor | float) -> Tensor:
        """Clipping and AdamW; returns the norm of the gradients, which are ``scale`` times what they should be."""
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None], foreach=True)
        if self.parallel == "fsdp":
            norm = norm.full_tensor()
        norm = norm / scale
        # As clip_grad_norm_ does it; in fp32, as the fused kernel reads both.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0).float()
        self.optimizer.found_inf = (~norm.isfinite()).float()
        if self.scaler is None:
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # no step but this one's
        else:  # multiplies grad_scale by its own, and finds its own found_inf
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # inside a graph: so that graphs share the gradients' memory
        return norm.detach().float()

    # What several micro-batches, or processes, need.

    def _global_weights_and_stats(self, batches: list[_DeviceBatch]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What each micro-batch counts in the update (P,), by masked tokens of all, and the statistics of their input.

        The host waits for nothing; one exchange tells every process of all micro-batches.
        """
        norm = getattr(self.model, "input_norm", None)
        masked = [self.model.num_masked(batch.lengths).sum() * batch.counts for batch in batches]
        counts = torch.stack(masked).double()
        own = [counts]
        if norm is not None and norm.training:
            measured = [norm.batch_stats(batch.features, batch.lengths * batch.counts) for batch in batches]
            own += [torch.stack(values).double() for values in zip(*measured, strict=True)]
        every = torch.stack(own)[None]
        if self.parallel is not None:
            gathered = every.new_empty(self.processes, *every.shape[1:])
            dist.all_gather(list(gathered.unbind()), every[0])
            every = gathered
        every = every.transpose(0, 1).flatten(1)  # (1 or 4, M)
        statistics = None
        if len(own) > 1:
            dtype = torch.promote_types(batches[0].features.dtype, torch.float32)
            count, mean, variance = norm.merge_stats(every[1], every[2], every[3])
            mean, factor = norm.update_running(count, mean, variance)
            statistics = mean.to(dtype), factor.to(dtype)
        return counts / every[0].sum(), statistics

    def _loss(self, batch: _DeviceBatch, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """``_forward`` of a micro-batch, its masks drawn."""
        mask = self.model.sample_mask(batch.lengths, batch.features.shape[1], **batch.draw)
        return self._forward(batch.features, batch.lengths, mask, batch.sizes, statistics)

    def _grad_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch: gradients are exchanged in the backward of the last one."""
        if self.parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        return self.forward.no_sync() if self.parallel == "ddp" and not last else contextlib.nullcontext()

    def _warm_up_ddp(self, batch: _DeviceBatch, statistics: tuple[Tensor, Tensor] | None) -> None:
        """DDP learns its static graph in a first backward, in which it ignores ``no_sync``: here one that counts not.

        Raises:
            ValueError: That graph has not all parameters.
        """
        with _generator(0, self.device):
            self._loss(batch, statistics)[0].backward()
        named = self.model.named_parameters()
        if unused := [name for name, p in named if p.requires_grad and p.grad is None]:
            raise ValueError(f"parallel='ddp' needs a gradient of every parameter, got none of {', '.join(unused)}")
        self.optimizer.zero_grad(set_to_none=True)
        self.learned = True

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and scaler: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave, on any device: also its rate, betas, eps and weight decay."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore()
        if self.scaler is not None and state.get("scaler") is not None:
            self.scaler.load_state_dict(state["scaler"])

    def restore(self) -> None:
        """Gives the optimizer its rate on the device and its fused kernel back, after a state was loaded into it."""
        for group in self.optimizer.param_groups:
            self.lr.fill_(float(group["lr"]))
            group |= {"lr": self.lr, "fused": True, "foreach": None, "capturable": self.device.type == "cuda"}
        if self.graphs is not None:
            self.graphs.known.clear()  # they would go on with the state of before


@contextlib.contextmanager
def _generator(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators, seeded, and afterwards as they were before."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        for generator in (torch.default_generator, *([torch.cuda.default_generators[device.index]] if cuda else [])):
            generator.manual_seed(seed)
        yield


def _is_known(lengths: Sequence[int] | Tensor | None) -> bool:
    """Whether the host knows lengths without waiting for a GPU."""
    return not isinstance(lengths, Tensor) or lengths.device.type == "cpu"


def _is_empty(features: Any) -> bool:
    return isinstance(features, Tensor) and features.dim() == 3 and not len(features)


class Shape(NamedTuple):
    """What a batch is padded to: like batches share it, and with it one graph.

    Attributes:
        clips: B.
        frames: T.
        sizes: Of the rows. The most rows of a clip are those of a clip of T frames.
    """

    clips: int
    frames: int
    sizes: TokenCounts

    @classmethod
    def of(cls, model: PretrainingModel, clips: int, longest: int, sizes: TokenCounts) -> Shape:
        """Of a batch of so many clips, the longest of so many frames; ``sizes`` hold it."""
        block = model.config.patch_size[0]
        frames = max(longest, min(round_up(-(-longest // block)) * block, model.max_frames))
        rounded = sizes.bucket()
        largest = model.largest_sizes(1, frames)
        sizes = largest._replace(visible=rounded.visible, masked=rounded.masked)
        return cls(round_up(clips, min_step=1), frames, sizes)


def _pad(
    features: Tensor, frames: Tensor, clip_ids: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A batch followed by empty clips, its clips by empty frames."""
    batch, longest = features.shape[:2]
    more = shape.clips - batch
    features = F.pad(features, (0, 0, 0, shape.frames - longest, 0, more))
    return features, F.pad(frames, (0, more)), None if clip_ids is None else F.pad(clip_ids, (0, more))
