"""Devices and precisions by name, and copies of tensors between host and device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; itself where it is there already.

    From the host to a GPU the copy is asynchronous: the host does not wait. ``x`` must not change until the GPU has
    read it; a tensor in pageable memory is copied to pinned memory first and may change at once.
    """
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    # In a traced graph the copy is the compiler's, and there is no memory to pin.
    return (x if torch.compiler.is_compiling() else x.pin_memory()).to(device, non_blocking=True)


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 matrix products natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public name before torch 2.15
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision that an option names; auto is bf16 where the device computes it natively, else fp32."""
    return ("bf16" if native_bf16(device) else "fp32") if name == "auto" else name


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for; auto is CUDA where there is any.

    Raises:
        ValueError: Another name, or a CUDA device that PyTorch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    seen = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= seen:
        raise ValueError(f"device {name} was asked for, and PyTorch sees {seen} CUDA devices (mae-ast-fast doctor)")
    return torch.device(name)
