"""The model's operations: check the input, choose the implementation, call the kernel or the reference.

``impl`` is "torch" (reference.py, plain PyTorch, any device and dtype), "triton" (kernels/, fp32, fp16 and bf16 on a
GPU, or on a CPU under Triton's interpreter) or "auto". Nothing falls back silently: what an implementation cannot do is
a ``ValueError`` that says what to use. Letters as in reference.py.

Dropout: with impl="torch" masks come from PyTorch's generator; with impl="triton" they are a function of ``seed``, an
int64 tensor of one element on the device (None: drawn from PyTorch's generator), ``site``, a number for each place in
the model, and the element's row and column, so that nothing is stored and the backward draws the same.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import reference

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The implementation that ``impl`` ("auto", "torch" or "triton") stands for, and the reason in words.

    Args:
        impl: As asked for.
        device: Of the tensors.
        dtype: Of the stream.

    Raises:
        ValueError: An unknown name, or an implementation that cannot run on this device or dtype.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be one of auto, torch, triton, got {impl!r}")
    device = torch.device(device)
    if impl == "triton":
        _check_triton(device, dtype)
        return "triton", "asked for by name"
    if impl == "torch":
        return "torch", "asked for by name"
    if device.type != "cuda":
        return "torch", f"the Triton kernels need a GPU ({device})"
    return "torch", "the Triton kernels have not run on a GPU yet; impl='triton' takes them"


def _check_triton(device: torch.device, dtype: torch.dtype) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "meta":  # shapes only
        return
    if importlib.util.find_spec("triton") is None:
        raise ValueError("impl='triton' needs the package triton, which is not installed; use impl='torch'")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"impl='triton' needs a CUDA device, got {device}; use impl='torch' (or, to try kernels without a GPU, set "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 and bfloat16, got {dtype}; use impl='torch'")
    if interpreted and dtype == torch.bfloat16:
        raise ValueError(
            "impl='triton' under TRITON_INTERPRET=1 takes float32 and float16, got torch.bfloat16, which Triton's "
            "interpreter computes wrongly; use impl='torch'"
        )


def _is_triton(impl: str, x: Tensor) -> bool:
    return resolve_impl(impl, x.device, x.dtype)[0] == "triton"


def draw_seed(device: torch.device) -> Tensor:
    """A seed (1,) int64 for the kernels' dropout, from PyTorch's generator of the device; nothing waits for it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _check_rows(name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Shape (None: any), device and dtype of a floating tensor against the op's first one."""
    expected = ", ".join("N" if size is None else str(size) for size in shape)
    if x.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must be ({expected}), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def _check_dropout(dropout: float, seed: Tensor | None, device: torch.device) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(
            f"seed must be an int64 tensor of one element on {device}, got {seed.dtype} {tuple(seed.shape)} on "
            f"{seed.device}"
        )


def add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    fork: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(branch + branch_bias)), eps 1e-5, statistics in fp32: the post-norm residual.

    Args:
        branch: (N, D).
        residual: (N, D), of the same dtype.
        weight: (D,) of any floating dtype, as the biases.
        bias: (D,).
        branch_bias: (D,) bias of the Linear before, which then leaves it out.
        dropout: Rate on the branch, in [0, 1).
        seed: See the module; likewise ``site``.
        site: Which dropout this is.
        fork: Return y twice, for the next branch and for the next residual: the kernel then adds the two gradients
            that come back, which saves a pass over memory.
        impl: "auto", "torch" or "triton".

    Returns:
        y (N, D) in the dtype of ``residual``; with ``fork`` (y, y).

    Raises:
        ValueError: A shape, dtype, device or rate is not as described, or the implementation is not available.
    """
    _check_rows("residual", residual, (None, residual.shape[-1]), branch)
    _check_rows("branch", branch, tuple(residual.shape), residual)
    if branch.dtype != residual.dtype:
        raise ValueError(f"branch and residual must have one dtype, got {branch.dtype} and {residual.dtype}")
    for name, x in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if x is not None:
            _check_rows(name, x, (residual.shape[1],), residual)
    _check_dropout(dropout, seed, residual.device)
    if not _is_triton(impl, residual):
        y = reference.add_layer_norm(branch, residual, weight, bias, branch_bias, dropout)
        return (y, y) if fork else y
    from .kernels import add_layer_norm as kernel

    if dropout > 0.0 and seed is None:
        seed = draw_seed(residual.device)
    return kernel.add_layer_norm(branch, residual, weight, bias, branch_bias, seed, dropout, site, 1e-5, fork)
