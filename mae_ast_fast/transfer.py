"""Copies of tensors between the host and a device."""

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
