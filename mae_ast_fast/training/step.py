"""One optimizer update during which the host never waits for the device: forward, backward, clipping and AdamW.

    step = TrainStep(MAEAST(config).cuda(), lr=1e-4, precision="bf16")
    metrics = step(features, frames)  # StepMetrics on the device: read them now and then, not after every update

- Weights and AdamW's state are fp32. ``precision`` is the dtype of the activations and matrix products.
- The learning rate, the dropout seeds and the fp16 loss scale are tensors on the device. The factor that clips the
  gradients goes into the fused AdamW as its ``grad_scale``, so that clipping needs no pass over the gradients. AdamW
  skips an update whose gradient norm is not finite, on the device: weights and AdamW's state keep their values.
- ``update`` makes one update of several micro-batches, in one process or in several. It equals the update of one batch
  of all their clips: losses are means over the masked tokens of all micro-batches, and the input is normalised by the
  statistics of all of them. Without dropout, 1 process and N processes agree up to rounding.
- ``graphs``: an update of shapes that occurred before is one CUDA graph. Below about 20 to 35 clips (an estimate),
  launching a base model's kernels takes longer than running them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..devices import send
from ..models.base import PretrainingModel, check_lengths
from ..ops.packing import TokenCounts, round_up
from .cuda_graphs import Graphs
from .distributed import broadcast, check_parallel, data_parallel, shard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    class FusedAdamW(torch.optim.AdamW):
        """AdamW with the two attributes that its fused kernel reads."""

        grad_scale: Tensor
        found_inf: Tensor


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Mask = Tensor | tuple[Tensor, ...] | None


class StepMetrics(NamedTuple):
    """Metrics of an update: 0-d fp32 tensors on the device, the losses as in ``MAEASTOutput``."""

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    grad_norm: Tensor  # before clipping; not finite: the update was skipped


class MicroBatch(NamedTuple):
    """The inputs of ``TrainStep.__call__``. A micro-batch of 0 clips adds nothing to its update.

    Attributes:
        log_mel: (B, T, F) ``features`` of ``TrainStep.__call__``.
        num_frames: (B,) its ``lengths``.
        seed: Its ``seed``.
        clip_ids: (B,) its ``clip_ids``.
        epoch: Its ``epoch``.
    """

    log_mel: Tensor
    num_frames: Sequence[int] | Tensor | None = None
    seed: int | Tensor | None = None
    clip_ids: Tensor | None = None
    epoch: int = 0


@dataclass
class _DeviceBatch:
    """A micro-batch on the device.

    Attributes:
        log_mel: (B, T, F).
        num_frames: (B,) int64.
        mask_options: Keyword arguments of ``sample_mask``: seed, clip_ids and epoch.
        token_counts: Rows of the packed batch.
        is_real: False for a placeholder of a micro-batch without clips, which counts for nothing in the update.
    """

    log_mel: Tensor
    num_frames: Tensor
    mask_options: dict[str, Any]
    token_counts: TokenCounts
    is_real: bool


class _LossAndMetrics(nn.Module):
    """Returns a model's loss and its detached metrics (4,) as tensors, because DDP looks into no dataclass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out = self.model(*inputs, **options)
        metrics = out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy
        return out.loss, torch.stack([metric.detach().float() for metric in metrics])


class TrainStep:
    """Updates a model's weights, batch by batch, with AdamW (defaults of the paper, section 3.2).

    Args:
        model: ``MAEAST`` or ``SSAST``, on its device and in training mode.
        lr: Learning rate, until a call sets another.
        betas: Decay rates of AdamW's running mean and running mean square of the gradient, each in [0, 1).
        eps: Added to the denominator of AdamW's update, for numerical stability.
        weight_decay: Decoupled weight decay, on all parameters.
        clip_norm: Maximum L2 norm of the gradient of all parameters, positive.
        precision: "fp32", "bf16", or "fp16", whose loss is scaled (``torch.amp.GradScaler``). With fp16 the first
            updates may be skipped while the scale settles.
        compile: Run the model through ``torch.compile(fullgraph=True)``.
        graphs: Run updates as CUDA graphs. Batches are padded to a few shapes that similar batches share.
        parallel: "ddp" or "fsdp" (distributed.py): train with all processes of the default process group, which start
            with the weights of the first one. None: train in this process alone. FSDP changes ``model`` in place,
            gathers weights in bf16 if that is the precision, and excludes fp16 and ``compile``.

    Attributes:
        num_rows: Rows computed so far, padding included.

    Raises:
        ValueError: Unknown precision or ``parallel``; ``clip_norm`` not positive; options that exclude each other;
            ``graphs`` without a CUDA device; ``parallel`` without a process group.
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
            raise ValueError(f"graphs exclude communication: expected parallel=None with them, got {parallel!r}")
        if parallel == "fsdp" and (compile or precision == "fp16"):
            got = "compile" if compile else "precision='fp16'"
            raise ValueError(f"parallel='fsdp' takes fp32 and bf16, not compiled, got {got}: use parallel='ddp'")
        self.parallel, self.world_size = parallel, check_parallel(parallel)
        self.model, self.clip_norm, self.precision = model, clip_norm, precision
        self.device = next(model.parameters()).device
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs need a model on a CUDA device, got one on {self.device}")
        if graphs and getattr(model, "recompute", None) == "layer":
            raise ValueError("graphs and recompute='layer' exclude each other: a graph cannot rewind the generator")
        if parallel is not None:
            broadcast(model)
        if parallel == "fsdp":
            shard(model, PRECISIONS[precision])
        self.lr = torch.tensor(float(lr), dtype=torch.float32, device=self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.optimizer = cast("FusedAdamW", optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        compiled = cast(nn.Module, torch.compile(model, fullgraph=True)) if compile else model
        self.loss_module: nn.Module = _LossAndMetrics(compiled)
        if parallel == "ddp":
            self.loss_module = data_parallel(self.loss_module)
        self.ddp_graph_built = False
        self.pads_shapes = compile or graphs
        self.optimizer.zero_grad(set_to_none=True)  # drops gradients of a backward before this object was made
        self.num_rows = self._num_tokens = 0
        self._num_tokens_on_device: Tensor | int = 0  # of batches whose frame counts only the device knows
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
        """Make one update with one batch.

        Args:
            features: (B, T, F) floating-point log-mel, as the model takes it; B at least 1.
            lengths: (B,) frames of each clip, between 0 and T: integers, a tensor on the CPU, or one on the GPU. None:
                all T. The host neither waits for lengths on a GPU nor checks them: those below 0 count as 0, those
                above T as T. It does not know the number of rows either, and computes as many as clips of T frames
                have. Lengths on the host are faster wherever clips are shorter than T.
            mask: (B, L) bool, as the model takes it, with as many masked tokens per clip as a mask that the model
                draws; on a CPU, where counting costs nothing, and with lengths on a GPU any number. None: the model
                draws it.
            lr: Learning rate from this update on. None: unchanged.
            seed: 64-bit seed of the masks drawn here; a clip's mask also depends on its id and on ``epoch``. None: it
                is drawn from torch's default generator.
            clip_ids: (B,) integers of which the low 32 bits count. None: 0, 1, ... B - 1.
            epoch: Number of the pass over the data, of which the low 32 bits count.

        Returns:
            Metrics of the update, on the device.

        Raises:
            ValueError: Inputs that the model refuses; lengths on the host that are not between 0 and T; clips too
                short to have masked tokens (with lengths on a GPU only if T is too short; otherwise losses and
                gradients are 0); a mask together with ``compile``, ``graphs`` or ``parallel``.
        """
        if mask is not None and (self.pads_shapes or self.parallel is not None):
            raise ValueError("compile, graphs and parallel draw their masks: expected mask=None, got one")
        micro_batch = MicroBatch(features, lengths, seed=seed, clip_ids=clip_ids, epoch=epoch)
        if self.parallel is not None:
            return self.update([micro_batch], lr=lr)
        batch = self._prepare(micro_batch, draws_mask=mask is None)
        if lr is not None:
            self.lr.fill_(lr)
        token_counts: TokenCounts | None = batch.token_counts
        if mask is None:
            mask = self.model.sample_mask(batch.num_frames, batch.log_mel.shape[1], **batch.mask_options)
        elif self.device.type == "cpu":
            token_counts = None  # the model counts, and refuses a mask with which no clip has both kinds of token
        update = self._update if self.graphs is None else self.graphs
        return StepMetrics._make(update(batch.log_mel, batch.num_frames, mask, token_counts).unbind())

    def update(self, micro_batches: Sequence[MicroBatch], *, lr: float | None = None) -> StepMetrics:
        """Make one update with several micro-batches.

        All processes call this together, each with its own micro-batches and with equally many.

        Masks without a seed, and dropout, depend on the state of torch's generator and on the index of the micro-batch
        among those of all processes, in order of rank: processes with the same state draw differently, and N processes
        draw what one process draws.

        Args:
            micro_batches: This process's micro-batches, at least one. One with 0 clips adds nothing.
            lr: Learning rate from this update on. None: unchanged.

        Returns:
            Metrics of the whole update, the same in all processes. They are NaN, and nothing changes, if no
            micro-batch has clips.

        Raises:
            ValueError: As for ``__call__``, in the process where it happens (the others wait until their timeout); no
                micro-batches; several of them with ``graphs``; with DDP, parameters without a gradient.
        """
        if not micro_batches:
            raise ValueError("an update needs at least one micro-batch, got none")
        if self.parallel is None and len(micro_batches) == 1 and not _has_no_clips(micro_batches[0].log_mel):
            log_mel, num_frames, seed, clip_ids, epoch = micro_batches[0]
            return self(log_mel, num_frames, lr=lr, seed=seed, clip_ids=clip_ids, epoch=epoch)
        if self.graphs is not None:
            clips = [len(micro_batch.log_mel) for micro_batch in micro_batches]
            raise ValueError(f"with graphs an update is one batch of clips, got micro-batches of {clips} clips")
        batches = [
            self._placeholder(micro_batch) if _has_no_clips(micro_batch.log_mel) else self._prepare(micro_batch)
            for micro_batch in micro_batches
        ]
        if lr is not None:
            self.lr.fill_(lr)
        rank = dist.get_rank() if self.parallel is not None else 0
        weights, input_stats = self._global_weights_and_stats(batches)
        if self.parallel == "ddp" and not self.ddp_graph_built:
            self._warm_up_ddp(batches[0], input_stats)
        first_seed = int(torch.randint(2**62, ())) + rank * len(micro_batches)
        scale, summed = self._loss_scale(), torch.zeros(4, device=self.device)
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            with self._grad_sync(last=index + 1 == len(micro_batches)):
                with _seeded(first_seed + index, self.device):
                    loss, metrics = self._draw_and_forward(batch, input_stats)
                # Gradients are averaged over processes.
                (loss * (weight * self.world_size * scale).to(loss.dtype)).backward()
            summed += weight * metrics
        if self.parallel is not None:
            dist.all_reduce(summed)
        return StepMetrics._make((*summed.unbind(), self._clip_and_update(scale)))

    @property
    def num_tokens(self) -> int:
        """Real tokens so far, at most ``num_rows``. Reading it waits for the GPU if lengths were on one."""
        return self._num_tokens + int(self._num_tokens_on_device)

    def _prepare(self, micro_batch: MicroBatch, *, draws_mask: bool = True, is_real: bool = True) -> _DeviceBatch:
        """Check a micro-batch and start its copy to the device.

        Args:
            micro_batch: Inputs as the caller gave them.
            draws_mask: Whether this object draws the mask.
            is_real: False for a placeholder; see ``_DeviceBatch``.
        """
        log_mel, num_frames, seed, clip_ids, epoch = micro_batch
        if not isinstance(log_mel, Tensor) or log_mel.dim() != 3 or not len(log_mel):
            got = tuple(log_mel.shape) if isinstance(log_mel, Tensor) else type(log_mel).__name__
            raise ValueError(f"features must be a tensor (B, T, F) of at least one clip, got {got}")
        clip_ids = None if clip_ids is None else torch.as_tensor(clip_ids)
        checked_frames, token_counts = self._frames_and_token_counts(log_mel, num_frames, draws_mask)
        if is_real and not token_counts.has_padding_rows:
            self._num_tokens += token_counts.visible + token_counts.masked
        elif is_real:
            kt, grid_f = self.model.config.patch_size[0], self.model.config.grid_f
            self._num_tokens_on_device = self._num_tokens_on_device + (checked_frames // kt * grid_f).sum()
        if self.pads_shapes:
            shape = PaddedShape.of(self.model, len(log_mel), log_mel.shape[1], token_counts)
            log_mel, checked_frames, clip_ids = _pad(log_mel, checked_frames, clip_ids, shape)
            token_counts = shape.token_counts
        self.num_rows += token_counts.visible + token_counts.masked
        return _DeviceBatch(
            log_mel=send(log_mel, self.device),
            num_frames=send(checked_frames, self.device),
            mask_options={"seed": seed, "clip_ids": clip_ids, "epoch": epoch},
            token_counts=token_counts,
            is_real=is_real,
        )

    def _frames_and_token_counts(
        self, log_mel: Tensor, num_frames: Sequence[int] | Tensor | None, draws_mask: bool
    ) -> tuple[Tensor, TokenCounts]:
        """Validated frame counts (B,), int64, on the caller's device, and the rows of the packed batch.

        Later code does not read the frame counts on the host.
        """
        num_clips, max_frames = log_mel.shape[:2]
        on_host = _is_on_host(num_frames)
        if num_frames is None:
            checked = torch.full((num_clips,), max_frames, device="cpu")
        else:
            checked = check_lengths(num_frames, num_clips, max_frames, check_values=on_host)
        token_counts = self.model.exact_sizes(log_mel, checked if on_host else None)  # raises if nothing can be masked
        if on_host:
            return checked, token_counts
        return checked.clamp(0, max_frames), self.model.largest_sizes(num_clips, max_frames, draws_mask)

    def _placeholder(self, micro_batch: MicroBatch) -> _DeviceBatch:
        """Silence in place of a micro-batch without clips, so that all processes run the same passes."""
        kt, limit = self.model.config.patch_size[0], self.model.max_frames
        num_frames = next(count for count in range(kt, limit + 1, kt) if self.model.sizes_of([count]).masked)
        log_mel = micro_batch.log_mel.new_zeros(1, num_frames, micro_batch.log_mel.shape[2])
        return self._prepare(MicroBatch(log_mel, seed=0), is_real=False)

    def _update(self, log_mel: Tensor, num_frames: Tensor, mask: Mask, token_counts: TokenCounts | None) -> Tensor:
        """Update with one batch, on the device alone; returns ``StepMetrics`` as one tensor (5,)."""
        loss, metrics = self._forward(log_mel, num_frames, mask, token_counts)
        scale = self._loss_scale()
        (loss * scale).backward()
        return torch.cat((metrics, self._clip_and_update(scale)[None]))

    def _forward(
        self,
        log_mel: Tensor,
        num_frames: Tensor,
        mask: Mask,
        token_counts: TokenCounts | None,
        *,
        input_stats: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and detached metrics (4,); ``input_stats`` are mean and scale of the input normalisation."""
        dtype = PRECISIONS[self.precision]
        options = {} if input_stats is None else {"statistics": input_stats}
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.loss_module(log_mel, num_frames, mask, sizes=token_counts, **options)

    def _loss_scale(self) -> Tensor | float:
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def _clip_and_update(self, scale: Tensor | float) -> Tensor:
        """Clip the gradients, which are multiplied by ``scale``, and run AdamW; returns the norm without ``scale``."""
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None], foreach=True)
        if self.parallel == "fsdp":
            norm = cast("DTensor", norm).full_tensor()
        norm = norm / scale
        # As in clip_grad_norm_; in fp32, as the fused kernel reads both.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0).float()
        self.optimizer.found_inf = (~norm.isfinite()).float()
        if self.scaler is None:
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # they hold for this step only
        else:  # the scaler multiplies grad_scale by its scale and replaces found_inf
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # within a graph too, so that graphs share the gradients' memory
        return norm.detach().float()

    # Several micro-batches or processes.

    def _global_weights_and_stats(self, batches: list[_DeviceBatch]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Weight of each micro-batch (P,), its share of all masked tokens, and the input statistics of all of them.

        The host waits for nothing. One all-gather brings the numbers of all micro-batches to every process.
        """
        norm = getattr(self.model, "input_norm", None)
        masked = [self.model.num_masked(batch.num_frames).sum() * batch.is_real for batch in batches]
        num_masked = torch.stack(masked).double()
        local_rows = [num_masked]
        if norm is not None and norm.training:
            stats = [norm.batch_stats(batch.log_mel, batch.num_frames * batch.is_real) for batch in batches]
            local_rows += [torch.stack(values).double() for values in zip(*stats, strict=True)]
        table = torch.stack(local_rows)[None]
        if self.parallel is not None:
            gathered = table.new_empty(self.world_size, *table.shape[1:])
            dist.all_gather(list(gathered.unbind()), table[0])
            table = gathered
        table = table.transpose(0, 1).flatten(1)  # (1 or 4, micro-batches of all processes)
        input_stats = None
        if len(local_rows) > 1:
            assert norm is not None
            dtype = torch.promote_types(batches[0].log_mel.dtype, torch.float32)
            count, mean, variance = norm.merge_stats(table[1], table[2], table[3])
            mean, scale = norm.update_running(count, mean, variance)
            input_stats = mean.to(dtype), scale.to(dtype)
        return num_masked / table[0].sum(), input_stats

    def _draw_and_forward(
        self, batch: _DeviceBatch, input_stats: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """``_forward`` of a micro-batch with masks drawn here."""
        mask = self.model.sample_mask(batch.num_frames, batch.log_mel.shape[1], **batch.mask_options)
        return self._forward(batch.log_mel, batch.num_frames, mask, batch.token_counts, input_stats=input_stats)

    def _grad_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward: processes exchange gradients in the last backward only."""
        if self.parallel == "fsdp":
            fsdp_model = cast("FSDPModule", self.model)
            fsdp_model.set_requires_gradient_sync(last)
            fsdp_model.set_is_last_backward(last)
        if self.parallel == "ddp" and not last:
            return cast(nn.parallel.DistributedDataParallel, self.loss_module).no_sync()
        return contextlib.nullcontext()

    def _warm_up_ddp(self, batch: _DeviceBatch, input_stats: tuple[Tensor, Tensor] | None) -> None:
        """Run a first backward, in which DDP builds its static graph and ignores ``no_sync``, and drop its gradients.

        Raises:
            ValueError: Some parameter got no gradient.
        """
        with _seeded(0, self.device):
            self._draw_and_forward(batch, input_stats)[0].backward()
        named = self.model.named_parameters()
        if unused := [name for name, p in named if p.requires_grad and p.grad is None]:
            raise ValueError(f"parallel='ddp' needs a gradient of every parameter, got none of {', '.join(unused)}")
        self.optimizer.zero_grad(set_to_none=True)
        self.ddp_graph_built = True

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the fp16 scaler: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``, on any device. This sets the rate, betas, eps and weight decay too."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore()
        if self.scaler is not None and state.get("scaler") is not None:
            self.scaler.load_state_dict(state["scaler"])

    def restore(self) -> None:
        """Give the optimizer its rate on the device and its fused kernel back, after a state was loaded into it."""
        for group in self.optimizer.param_groups:
            self.lr.fill_(float(group["lr"]))
            group |= {"lr": self.lr, "fused": True, "foreach": None, "capturable": self.device.type == "cuda"}
        if self.graphs is not None:
            self.graphs.cache.clear()  # they would continue with the old state


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, and restore their states afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        for generator in (torch.default_generator, *([torch.cuda.default_generators[device.index]] if cuda else [])):
            generator.manual_seed(seed)
        yield


def _is_on_host(num_frames: Sequence[int] | Tensor | None) -> bool:
    """Whether the host can read frame counts without waiting for a GPU."""
    return not isinstance(num_frames, Tensor) or num_frames.device.type == "cpu"


def _has_no_clips(log_mel: Any) -> bool:
    return isinstance(log_mel, Tensor) and log_mel.dim() == 3 and not len(log_mel)


class PaddedShape(NamedTuple):
    """The shape that a batch is padded to. Similar batches share it, and with it one graph.

    Attributes:
        num_clips: B.
        num_frames: T.
        token_counts: Rows of the packed batch. The most rows of one clip are those of a clip of T frames.
    """

    num_clips: int
    num_frames: int
    token_counts: TokenCounts

    @classmethod
    def of(cls, model: PretrainingModel, num_clips: int, max_frames: int, token_counts: TokenCounts) -> PaddedShape:
        """The padded shape of a batch of ``num_clips`` clips of at most ``max_frames`` frames."""
        kt = model.config.patch_size[0]
        num_frames = max(max_frames, min(round_up(-(-max_frames // kt)) * kt, model.max_frames))
        rounded = token_counts.bucket()
        padded = model.largest_sizes(1, num_frames)._replace(visible=rounded.visible, masked=rounded.masked)
        return cls(round_up(num_clips, min_step=1), num_frames, padded)


def _pad(
    log_mel: Tensor, num_frames: Tensor, clip_ids: Tensor | None, shape: PaddedShape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad a batch with empty clips, and its clips with frames that do not count."""
    num_clips, max_frames = log_mel.shape[:2]
    empty_clips = shape.num_clips - num_clips
    log_mel = F.pad(log_mel, (0, 0, 0, shape.num_frames - max_frames, 0, empty_clips))
    clip_ids = None if clip_ids is None else F.pad(clip_ids, (0, empty_clips))
    return log_mel, F.pad(num_frames, (0, empty_clips)), clip_ids
