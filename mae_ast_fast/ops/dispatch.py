"""Choice of the implementation of an operation, dropout seeds, and input checks that several operations share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


try:  # once and without an import: torch.compile of torch 2.11 cannot trace find_spec
    HAS_TRITON = importlib.util.find_spec("triton") is not None
except ImportError:  # an import hook that blocks triton
    HAS_TRITON = False


INTERPRETS_BF16 = False  # Triton's interpreter computes bf16 wrongly; the tests correct it and set this to True


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The implementation, "torch" or "triton", that ``impl`` stands for, and the reason in words.

    Args:
        impl: "auto", "torch" or "triton".
        device: Device of the tensors.
        dtype: Dtype of the rows.

    Raises:
        ValueError: The name is unknown, or the implementation cannot run on this device or dtype.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be one of auto, torch, triton, got {impl!r}")
    device = torch.device(device)
    if impl == "triton":
        _check_triton(device, dtype)
        return "triton", "requested by name"
    if impl == "torch":
        return "torch", "requested by name"
    if device.type != "cuda":
        return "torch", f"the Triton kernels need a GPU ({device})"
    return "torch", "the Triton kernels have not run on a GPU yet; impl='triton' selects them"


def _check_triton(device: torch.device, dtype: torch.dtype) -> None:
    # Triton parses the variable in the same way.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "meta":  # shapes only
        return
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton, which is not installed; use impl='torch'")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"impl='triton' needs a CUDA device, got {device}; use impl='torch' (or, to try kernels without a GPU, set "
            "TRITON_INTERPRET=1 before Python starts: float32 and float16)"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 and bfloat16, got {dtype}; use impl='torch'")
    if interpreted and not INTERPRETS_BF16 and (fault := _interpreter_fault()):
        raise ValueError(f"impl='triton' under TRITON_INTERPRET=1: {fault}; use impl='torch'")
    if interpreted and dtype == torch.bfloat16 and not INTERPRETS_BF16:
        raise ValueError(
            "impl='triton' under TRITON_INTERPRET=1 takes float32 and float16, got torch.bfloat16, which Triton's "
            "interpreter computes wrongly; use impl='torch'"
        )


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run with the installed versions. None: it can."""
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):  # the interpreter calls int() on arrays of one element
        return f"the interpreter of triton {triton} does not work with numpy {numpy}: triton >= 3.7 or numpy < 2.4 does"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def kernel_seed(dropout: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The dropout seed of a kernel: ``seed``, or a drawn one where dropout needs a seed and ``seed`` is None."""
    return draw_seed(device) if dropout > 0.0 and seed is None else seed


def is_triton(impl: str, x: Tensor) -> bool:
    """Whether ``impl`` stands for the Triton kernels for tensors like ``x``."""
    return resolve_impl(impl, x.device, x.dtype)[0] == "triton"


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed (1,) int64 for the kernels, from PyTorch's generator of the device, without synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_rows(name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raise ValueError unless ``x`` has this shape (a letter: any size) and is on the device of ``like``.

    Traced sizes are formatted only in errors.
    """
    if x.dim() != len(shape) or any(
        not isinstance(expected_size, str) and expected_size != size
        for expected_size, size in zip(shape, x.shape, strict=True)
    ):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be ({expected}), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def check_index(name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raise ValueError unless ``x`` passes ``check_rows`` and is int64."""
    check_rows(name, x, shape, like)
    if x.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {x.dtype}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Raise ValueError unless ``cu_seqlens`` is (B + 1,) int32 on the device of ``like``; values are not read."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be (B + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {cu_seqlens.device}")


def check_dropout(dropout: float, seed: Tensor | None, device: torch.device) -> None:
    """Raise ValueError unless the rate is in [0, 1) and the seed is None or one int64 element on ``device``."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(
            f"seed must be an int64 tensor of one element on {device}, got {seed.dtype} {tuple(seed.shape)} on "
            f"{seed.device}"
        )


def check_no_gradient(target: Tensor) -> None:
    """Raise ValueError where ``target`` requires a gradient, which the kernels do not compute."""
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "target requires a gradient, which impl='triton' does not compute: use impl='torch' or target.detach()"
        )
