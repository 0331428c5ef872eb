"""Several processes that train one model: who they are, what they tell each other, how the model is spread over them.

torchrun starts the processes and tells each its place by environment variables; each has a device of its own.

- ``data_parallel``: every process holds the whole model, and gradients are averaged as the backward makes them (DDP).
- ``shard``: every process holds a share of the weights, gradients and AdamW's state; a layer's weights are gathered
  when it runs (FSDP2).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.transformer import Layer

PARALLEL = ("ddp", "fsdp")
TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class DistributedContext:
    """This process among all that train.

    Attributes:
        rank: From 0 on.
        size: Number of processes.
        device: Of this one.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Of all processes' tensors of one shape and dtype, on the CPU."""
        values = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Of all processes' numbers."""
        values = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, anything that pickles, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def world(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[DistributedContext]:
    """Joins the processes that torchrun started; a process that was started alone is a world of its own.

    Args:
        device: "cpu", "cuda" (each process of a machine gets one), or "auto".
        timeout: Seconds after which a process that waits for another gives up.

    Raises:
        ValueError: Fewer GPUs than processes, or the environment names a place but not all of it.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistributedContext(0, 1, torch.device(kind))
        return
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"expected the environment of torchrun, with {', '.join(names)}, got no {', '.join(missing)}")
    rank, size, local = (int(os.environ[name]) for name in names)
    own = torch.device(kind)
    if own.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU for each process of this machine, got {torch.cuda.device_count()} for process "
                f"{local}: start fewer, or use device cpu"
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    # What lies on the CPU (counts, checkpoints) goes by gloo in either case.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    bound = own if own.type == "cuda" else None
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    how = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=timeout), "device_id": bound}
    dist.init_process_group(backend, store=_unused(store, rank, size, timeout), **how)
    try:
        yield DistributedContext(rank, size, own)
    finally:
        dist.destroy_process_group()


def _unused(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """A part of the store that nobody has written to, the same for all processes of this start.

    torchrun gives processes that it starts again the store of those before, where gloo finds addresses of dead ones.

    Raises:
        RuntimeError: Some process does not come.
    """
    own, deadline = uuid.uuid4().hex, timedelta(seconds=timeout)
    if rank:
        store.set(f"waits/{rank}", own)
        store.wait([f"joins/{own}"], deadline)
        name = store.get(f"joins/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    absent, end = set(range(1, size)), time.monotonic() + timeout
    while absent:
        for other in sorted(absent):  # who waits may still be one of before: ask again
            if store.check([f"waits/{other}"]):
                store.set(f"joins/{store.get(f'waits/{other}').decode()}", own)
            if store.check([f"{own}/{other}"]):
                absent.remove(other)
        if time.monotonic() > end:
            raise RuntimeError(f"processes {sorted(absent)} of {size} did not start within {timeout:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def check_parallel(parallel: str | None) -> int:
    """The number of processes that ``parallel`` (one of ``PARALLEL``, or None: just this one) spreads a model over.

    Raises:
        ValueError: An unknown name, or there is no process group.
    """
    if parallel is None:
        return 1
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be None or one of {', '.join(PARALLEL)}, got {parallel!r}")
    if not dist.is_initialized():
        raise ValueError(f"parallel={parallel!r} needs torch.distributed initialised, as distributed.world does")
    return dist.get_world_size()


def broadcast(model: nn.Module) -> None:
    """Parameters and buffers become those of the first process."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)


def data_parallel(module: nn.Module) -> nn.parallel.DistributedDataParallel:
    """DDP of a module that returns tensors, all of whose parameters are used every time."""
    how = {"gradient_as_bucket_view": True, "static_graph": True, "find_unused_parameters": False}
    with warnings.catch_warnings():  # torch 2.14 has another name for broadcast_buffers, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, **how)


def shard(model: nn.Module, dtype: torch.dtype | None) -> None:
    """FSDP2 in place: each layer of the stacks, then the rest. Gradients are reduced in fp32.

    Args:
        model: On its device, with the same weights in all processes.
        dtype: In which weights are gathered; None: their own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # What it warns of, writing in place to an output that is a view, nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
