"""Zeros in the rows past the last clip.

Where rows are rounded up to a bucket (packing.Sizes), those from cu_seqlens[-1] on belong to no clip, and no program of
a kernel that works clip by clip writes them. Left as they are they could hold NaN, which a weight's gradient would sum.
Programs share the tail; with exact sizes there is none, and the launch does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import block, launch

_PROGRAMS = 64
_COLUMNS = 1024


@triton.jit(do_not_specialize=["N", "B"])
def _clear(x_ptr, cu_ptr, N, B, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    first = tl.load(cu_ptr + B)
    for index in range(first + tl.program_id(0), N, PROGRAMS):
        row = tl.cast(index, tl.int64)
        for start in range(0, WIDTH, BLOCK):
            col = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), tl.float32).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + row * WIDTH + col, zeros, mask=col < WIDTH)


def clear_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``x`` (N, ...), dense, with zeros from row ``cu_seqlens[-1]`` on."""
    rows = x.shape[0]
    width = x[0].numel() if rows else 0
    if width:
        constants = {"WIDTH": width, "BLOCK": min(block(width), _COLUMNS), "PROGRAMS": _PROGRAMS}
        launch(_clear, (_PROGRAMS,), x, cu_seqlens, rows, len(cu_seqlens) - 1, **constants)
    return x


WIDTHS = (256, 768, 2304)  # a patch, and the packed heads of attention


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta)."""
    rows = 65536
    x = torch.zeros(rows, width, dtype=dtype, device=device)
    cu_seqlens = torch.arange(9, dtype=torch.int32, device=device) * (rows // 16)
    yield "clear", rows, lambda: clear_tail(x, cu_seqlens)
