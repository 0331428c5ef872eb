"""Dropout with PyTorch's generators. The kernels draw their own masks from counters (kernels/common/dropout.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def drop(x: Tensor, rate: float) -> Tensor:
    """Inverted dropout with a mask from PyTorch's generator of the device.

    On a CPU, 16 random bits decide each element (``draw_kept``): ``F.dropout`` took a quarter of a training step in
    bf16 there. ``F.dropout`` runs on other devices and while a graph is traced.
    """
    if rate == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    kept, scale = draw_kept(x.shape, rate)
    return (x * kept.to(x.dtype)).mul_(scale)


def draw_kept(shape: torch.Size, rate: float) -> tuple[Tensor, float]:
    """Dropout mask of a shape, int16 (1 = kept, 0 = dropped), and the scale of kept elements (``keep_scale``).

    The rate is rounded to a multiple of 2 ** -16. The bits come from ceil(elements / 4) numbers of 64 bits of PyTorch's
    default CPU generator, four elements per number.
    """
    count = shape.numel()
    # Without bounds, random_ would leave the sign bit zero, and every fourth element would have another rate.
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return torch.ge(words, _num_dropped(rate) - 32768, out=words).view(shape), keep_scale(rate)


def keep_scale(rate: float) -> float:
    """Scale of kept elements: 1 / (share of kept) of ``draw_kept``."""
    return 65536 / (65536 - _num_dropped(rate))


def _num_dropped(rate: float) -> int:
    """How many of the 65536 values of 16 bits mean that an element is dropped."""
    return min(round(rate * 65536), 65535)
