"""Several processes that train one model: their ranks, their communication, and how the model is spread over them.

torchrun starts the processes and sets their ranks in environment variables. Each process has its own device.

- ``data_parallel``: every process holds the whole model, and gradients are averaged during the backward (DDP).
- ``shard``: every process holds a share of the weights, gradients and AdamW's state. The weights of a layer are
  gathered when it runs (FSDP2).
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

from ..devices import pick_device
from ..models.transformer import Layer

PARALLEL = ("ddp", "fsdp")
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class DistributedContext:
    """This process among all processes that train.

    Attributes:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        device: Device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the CPU; ``values`` has the same shape and dtype in all of them."""
        values = values.detach().cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, value: int) -> int:
        """Maximum over the processes."""
        maximum = torch.tensor(value)
        if self.world_size > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank; each must pickle."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def init_distributed(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, until the context ends; without torchrun, this process is the only one.

    Args:
        device: "cpu", "cuda" (one GPU per process of a machine), or "auto" (CUDA if available).
        timeout_seconds: Seconds after which a process that waits for another gives up.

    Raises:
        ValueError: No GPU for "cuda", fewer GPUs than processes, or incomplete environment variables of torchrun.
        RuntimeError: Some process did not start within ``timeout_seconds``.
    """
    local_device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistributedContext(0, 1, local_device)
        return
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"expected the environment of torchrun, with {', '.join(names)}, got no {', '.join(missing)}")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    if local_device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"expected one GPU per process of this machine, got {torch.cuda.device_count()} for process "
                f"{local_rank}: start fewer, or use device cpu"
            )
        local_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(local_device)
    # Tensors on the CPU (counts, checkpoints) use gloo in either case.
    backend = "cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend,
        store=_fresh_store(store, rank, world_size, timeout_seconds),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=local_device if local_device.type == "cuda" else None,
    )
    try:
        yield DistributedContext(rank, world_size, local_device)
    finally:
        dist.destroy_process_group()


def _fresh_store(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """A view of the store under a new prefix, the same for all processes of this start.

    torchrun reuses its store when it restarts processes, and gloo would find the addresses of dead processes there.

    Raises:
        RuntimeError: Some process did not start within ``timeout_seconds``.
    """
    token, timeout = uuid.uuid4().hex, timedelta(seconds=timeout_seconds)
    if rank:
        store.set(f"waits/{rank}", token)
        store.wait([f"joins/{token}"], timeout)
        prefix = store.get(f"joins/{token}").decode()
        store.set(f"{prefix}/{rank}", "here")
        return dist.PrefixStore(prefix, store)
    absent, deadline = set(range(1, world_size)), time.monotonic() + timeout_seconds
    while absent:
        for other in sorted(absent):  # the key may be stale, left by a previous start: poll again
            if store.check([f"waits/{other}"]):
                store.set(f"joins/{store.get(f'waits/{other}').decode()}", token)
            if store.check([f"{token}/{other}"]):
                absent.remove(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(absent)} of {world_size} did not start within {timeout_seconds:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(token, store)


def check_parallel(parallel: str | None) -> int:
    """Number of processes that share a model.

    Args:
        parallel: One of ``PARALLEL``, or None for this process alone.

    Raises:
        ValueError: Unknown name, or there is no process group.
    """
    if parallel is None:
        return 1
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be None or one of {', '.join(PARALLEL)}, got {parallel!r}")
    if not dist.is_initialized():
        raise ValueError(
            f"parallel={parallel!r} needs an initialised torch.distributed, as by distributed.init_distributed"
        )
    return dist.get_world_size()


def broadcast(model: nn.Module) -> None:
    """Copy the parameters and buffers of the first process to all others."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)


def data_parallel(module: nn.Module) -> nn.parallel.DistributedDataParallel:
    """DDP of a module that returns tensors and uses all of its parameters every time."""
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers; 2.11 does not know the new name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=True,
            find_unused_parameters=False,
        )


def shard(model: nn.Module, dtype: torch.dtype | None) -> None:
    """FSDP2 in place: shard each layer of the stacks, then the rest. Gradients are reduced in fp32.

    Args:
        model: Model on its device, with the same weights in all processes.
        dtype: Dtype of the gathered weights. None: their own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # FSDP2 warns of in-place writes to an output that is a view. Nothing here writes to one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode")  # which the evaluation calls
