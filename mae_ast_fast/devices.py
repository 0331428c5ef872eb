"""Devices and precisions by name, and copies of tensors between host and device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy ``x`` to ``device``, unless it is already there.

    From the host to a GPU the copy is asynchronous: the host does not wait. A pinned ``x`` must not change until the
    GPU has read it. A tensor in pageable memory is copied to pinned memory first and may change immediately.
    """
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    # In a traced graph the compiler makes the copy, and there is no memory to pin.
    return (x if torch.compiler.is_compiling() else x.pin_memory()).to(device, non_blocking=True)


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 matrix products natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public name before torch 2.15
    return any(getattr(torch.cpu, query, lambda: False)() for query in queries)


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve the option ``precision``: auto becomes bf16 if the device computes it natively, otherwise fp32."""
    return ("bf16" if native_bf16(device) else "fp32") if name == "auto" else name


def pick_device(name: str) -> torch.device:
    """Resolve the option ``device``.

    Args:
        name: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: Another name, or a CUDA device that PyTorch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_type, _, index = name.partition(":")
    if device_type not in ("cpu", "cuda") or (":" in name and not (device_type == "cuda" and index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device_count = torch.cuda.device_count() if device_type == "cuda" and torch.cuda.is_available() else 0
    if device_type == "cuda" and int(index or 0) >= device_count:
        raise ValueError(
            f"device {name} is not available: PyTorch sees {device_count} CUDA devices; run mae-ast-fast doctor"
        )
    return torch.device(name)
