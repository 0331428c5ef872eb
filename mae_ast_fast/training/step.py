"""One optimizer update during which the host never waits for the device: forward, backward, clipping, AdamW or Muon.

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
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.base import PretrainingModel
from .cuda_graphs import Graphs
from .distributed import broadcast, check_parallel, data_parallel, shard
from .micro_batch import DeviceBatch, Mask, MicroBatch, check_has_clips, has_no_clips, to_device
from .optimizer import OPTIMIZERS, make_optimizer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepMetrics(NamedTuple):
    """Metrics of an update: 0-d fp32 tensors on the device, the losses as in ``MAEASTOutput``."""

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    grad_norm: Tensor  # before clipping; not finite: the update was skipped


class _LossAndMetrics(nn.Module):
    """Returns a model's loss and its detached metrics (4,) as a tuple.

    The model's own output is a dataclass, in which DDP's static graph finds no tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out = self.model(*inputs, **options)
        metrics = out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy
        return out.loss, torch.stack([metric.detach().float() for metric in metrics])


class TrainStep:
    """Updates a model's weights, batch by batch, by default with AdamW (defaults of the paper, section 3.2).

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
        optimizer: "adamw", or "muon" for the matrices of the layers with AdamW for the rest (optimizer.py). FSDP
            excludes "muon", which needs whole matrices.

    Attributes:
        num_rows: Rows computed so far, padding included.

    Raises:
        ValueError: Unknown precision, ``parallel`` or ``optimizer``; ``clip_norm`` not positive; options that exclude
            each other; ``graphs`` without a CUDA device; ``parallel`` without a process group.
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
        optimizer: str = "adamw",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        if parallel is not None and graphs:
            raise ValueError(f"graphs exclude communication: expected parallel=None with them, got {parallel!r}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        if parallel == "fsdp" and optimizer == "muon":
            raise ValueError("parallel='fsdp' splits the matrices that Muon needs whole: use parallel='ddp' or AdamW")
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
        self.optimizer = make_optimizer(optimizer, model, lr=self.lr, betas=betas, eps=eps, weight_decay=weight_decay)
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
        self.graphs = Graphs(self._update_on_device, model, self.device) if graphs else None

    def __call__(
        self,
        features: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        mask: Mask | None = None,
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
        if self.parallel is None:  # in several processes, another one may have clips
            check_has_clips(features)
        micro_batch = MicroBatch(features, lengths, seed=seed, clip_ids=clip_ids, epoch=epoch, mask=mask)
        return self.update([micro_batch], lr=lr)

    def update(self, micro_batches: Sequence[MicroBatch], *, lr: float | None = None) -> StepMetrics:
        """Make one update with several micro-batches.

        All processes call this together, each with its own micro-batches and with equally many.

        One micro-batch in one process draws its dropout, and masks without a seed, from torch's generator as it is.
        Otherwise both depend on the state of torch's generator and on the index of the micro-batch among those of all
        processes, in order of rank: processes with the same state draw differently, and N processes draw what one
        process draws.

        Args:
            micro_batches: This process's micro-batches, at least one. One with 0 clips adds nothing.
            lr: Learning rate from this update on. None: unchanged.

        Returns:
            Metrics of the whole update, the same in all processes. They are NaN, and nothing changes, if no
            micro-batch has clips.

        Raises:
            ValueError: As for ``__call__``, in the process where it happens (the others wait until their timeout); no
                micro-batches; several of them with ``graphs`` or with a mask; with DDP, parameters without a gradient.
        """
        self._check_micro_batches(micro_batches)
        batches = [
            to_device(micro_batch, self.model, self.device, pads_shapes=self.pads_shapes)
            for micro_batch in micro_batches
        ]
        self._count_rows(batches)
        if lr is not None:
            self.lr.fill_(lr)
        if self.parallel is not None or len(batches) > 1 or not batches[0].is_real:
            self._assign_shares(batches)
        if self.parallel == "ddp" and not self.ddp_graph_built:
            self._warm_up_ddp(batches[0])
        if self.graphs is not None:
            batches[0].mask = self._draw_mask(batches[0])
            metrics = self.graphs(batches[0])
        else:
            metrics = self._update_on_device(batches)
        return StepMetrics._make(metrics.unbind())

    def _update_on_device(self, batches: Sequence[DeviceBatch]) -> Tensor:
        """The part of an update that the device does alone, which a CUDA graph can hold.

        Returns:
            ``StepMetrics`` as one tensor (5,).
        """
        scale = self._loss_scale()
        weighted_metrics = []
        for batch in batches:
            with self._grad_sync(last=batch is batches[-1]):
                with _seeded(batch.generator_seed, self.device):
                    loss, metrics = self._forward(batch)
                if batch.weight is None:
                    loss = loss * scale
                else:  # gradients are averaged over processes
                    loss = loss * (batch.weight * self.world_size * scale).to(loss.dtype)
                loss.backward()
            weighted_metrics.append(metrics if batch.weight is None else batch.weight * metrics)
        metrics = functools.reduce(torch.add, weighted_metrics)
        if self.parallel is not None:
            dist.all_reduce(metrics)
        return torch.cat((metrics, self._clip_and_step(scale)[None]))

    @property
    def num_tokens(self) -> int:
        """Real tokens so far, at most ``num_rows``. Reading it waits for the GPU if lengths were on one."""
        return self._num_tokens + int(self._num_tokens_on_device)

    def _check_micro_batches(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Check that this object takes such micro-batches."""
        if not micro_batches:
            raise ValueError("an update needs at least one micro-batch, got none")
        is_one = len(micro_batches) == 1
        has_mask = any(micro_batch.mask is not None for micro_batch in micro_batches)
        if has_mask and (self.pads_shapes or self.parallel is not None or not is_one):
            raise ValueError(
                "compile, graphs, parallel and updates of several micro-batches draw their masks: expected mask=None, "
                "got one"
            )
        if self.graphs is not None and (not is_one or has_no_clips(micro_batches[0].log_mel)):
            clips = [len(micro_batch.log_mel) for micro_batch in micro_batches]
            raise ValueError(f"with graphs an update is one batch of clips, got micro-batches of {clips} clips")

    def _count_rows(self, batches: list[DeviceBatch]) -> None:
        for batch in batches:
            self.num_rows += batch.num_rows
            if isinstance(batch.num_tokens, Tensor):
                self._num_tokens_on_device = self._num_tokens_on_device + batch.num_tokens
            else:
                self._num_tokens += batch.num_tokens

    def _draw_mask(self, batch: DeviceBatch) -> Mask:
        max_frames = batch.log_mel.shape[1]
        return self.model.sample_mask(
            batch.num_frames, max_frames, seed=batch.seed, clip_ids=batch.clip_ids, epoch=batch.epoch
        )

    def _forward(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        """Loss and detached metrics (4,), the losses and the accuracy of ``StepMetrics``."""
        mask = self._draw_mask(batch) if batch.mask is None else batch.mask
        # Only models that measure their input take statistics.
        options = {} if batch.input_stats is None else {"statistics": batch.input_stats}
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.loss_module(batch.log_mel, batch.num_frames, mask, sizes=batch.token_counts, **options)

    def _loss_scale(self) -> Tensor | float:
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def _clip_and_step(self, scale: Tensor | float) -> Tensor:
        """Clip the gradients, which are multiplied by ``scale``, and run the optimizer; return the unscaled norm."""
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

    def _assign_shares(self, batches: list[DeviceBatch]) -> None:
        """Give each micro-batch its weight in the update, the input statistics of all, and its own random numbers.

        The host waits for nothing.
        """
        weights, input_stats = self._global_weights_and_stats(batches)
        rank = dist.get_rank() if self.parallel is not None else 0
        first_seed = int(torch.randint(2**62, ())) + rank * len(batches)
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            batch.weight, batch.input_stats, batch.generator_seed = weight, input_stats, first_seed + index

    def _global_weights_and_stats(self, batches: list[DeviceBatch]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Weight of each micro-batch (P,), its share of all masked tokens, and the input statistics of all of them.

        One all-gather brings the numbers of all micro-batches to every process.
        """
        masked = [self.model.num_masked(batch.num_frames).sum() * batch.is_real for batch in batches]
        num_masked = torch.stack(masked).double()
        norm = getattr(self.model, "input_norm", None)
        if norm is None or not norm.training:
            all_masked = self._all_gather(num_masked[None])[0]
            return num_masked / all_masked.sum(), None
        stats = [norm.batch_stats(batch.log_mel, batch.num_frames * batch.is_real) for batch in batches]
        counts, means, variances = (torch.stack(values).double() for values in zip(*stats, strict=True))
        local = torch.stack((num_masked, counts, means, variances))
        all_masked, all_counts, all_means, all_variances = self._all_gather(local)
        count, mean, variance = norm.merge_stats(all_counts, all_means, all_variances)
        mean, scale = norm.update_running(count, mean, variance)
        dtype = torch.promote_types(batches[0].log_mel.dtype, torch.float32)
        return num_masked / all_masked.sum(), (mean.to(dtype), scale.to(dtype))

    def _all_gather(self, values: Tensor) -> Tensor:
        """(K, P) of every process, next to each other: (K, P * processes)."""
        if self.parallel is None:
            return values
        gathered = values.new_empty(self.world_size, *values.shape)
        dist.all_gather(list(gathered.unbind()), values)
        return gathered.transpose(0, 1).flatten(1)

    def _grad_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward: processes exchange gradients in the last backward only."""
        if self.parallel == "fsdp":
            fsdp_model = cast("FSDPModule", self.model)
            fsdp_model.set_requires_gradient_sync(last)
            fsdp_model.set_is_last_backward(last)
        if self.parallel == "ddp" and not last:
            return cast(nn.parallel.DistributedDataParallel, self.loss_module).no_sync()
        return contextlib.nullcontext()

    def _warm_up_ddp(self, batch: DeviceBatch) -> None:
        """Run a first backward, in which DDP builds its static graph and ignores ``no_sync``, and drop its gradients.

        Raises:
            ValueError: Some parameter got no gradient.
        """
        with _seeded(0, self.device):
            loss, _ = self._forward(batch)
            loss.backward()
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
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, and restore their states afterwards. None: leave them alone."""
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        for generator in (torch.default_generator, *([torch.cuda.default_generators[device.index]] if cuda else [])):
            generator.manual_seed(seed)
        yield
