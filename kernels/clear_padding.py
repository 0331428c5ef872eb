"""Zero the padding rows: those past the last clip.

Where the number of rows is rounded up to a bucket (packing.TokenCounts), the rows from cu_seqlens[-1] on belong to no
clip, and kernels that work clip by clip do not write them. Undefined memory could hold NaN there, which the gradient of
a weight would sum. The programs share the padding rows. Without padding rows the launch does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.case import Mutant, OpCase
from .common.launch import block, launch

_PROGRAMS = 64
_COLUMNS = 1024


@triton.jit(do_not_specialize=["N", "B"])
def _clear(x_ptr, cu_seqlens_ptr, N, B, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    first_row = tl.load(cu_seqlens_ptr + B)
    for index in range(first_row + tl.program_id(0), N, PROGRAMS):
        row = tl.cast(index, tl.int64)
        for start in range(0, WIDTH, BLOCK):
            col = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), tl.float32).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + row * WIDTH + col, zeros, mask=col < WIDTH)


def clear_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Zero ``x`` in place from row ``cu_seqlens[-1]`` on, and return it.

    Args:
        x: (N, ...) of any floating dtype, contiguous.
        cu_seqlens: (B + 1,) int32 first row of each clip, contiguous.
    """
    num_rows = x.shape[0]
    width = x[0].numel() if num_rows else 0
    if width:
        launch(
            _clear,
            (_PROGRAMS,),
            x=x,
            cu_seqlens=cu_seqlens,
            N=num_rows,
            B=cu_seqlens.shape[0] - 1,
            WIDTH=width,
            BLOCK=min(block(width), _COLUMNS),
            PROGRAMS=_PROGRAMS,
        )
    return x


WIDTHS = (256, 768, 2304)  # values of a patch, and of the packed heads of attention


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant: ``mae-ast-fast kernels`` compiles them on the meta device."""
    num_rows = 65536
    x = torch.zeros(num_rows, width, dtype=dtype, device=device)
    cu_seqlens = torch.arange(9, dtype=torch.int32, device=device) * (num_rows // 16)
    yield "clear", num_rows, lambda: clear_tail(x, cu_seqlens)


CASE = OpCase(
    name="clear_padding",
    mutants=(
        Mutant("edge", "mask=col < WIDTH)", "mask=col < WIDTH - 1)"),
        Mutant("last row", "tl.program_id(0), N, PROGRAMS)", "tl.program_id(0), N - 1, PROGRAMS)"),
        Mutant("row owner", "first_row + tl.program_id(0)", "first_row - 1 + tl.program_id(0)"),
    ),
)
