"""y = dropout(GELU(x + bias)), the exact GELU: h = x + bias, GELU(h) = h * Phi(h), Phi(h) = (1 + erf(h / sqrt 2)) / 2.

    dx = keep * scale * dy * (Phi(h) + h * phi(h)),  phi(h) = exp(-h^2 / 2) / sqrt(2 pi),  dbias = column sums of dx

Letters: N packed rows, F columns, G programs per column block. Fused: bias, GELU, dropout; in the backward also the
column sums. Saved for the backward: x and bias. Memory traffic: forward 2 (N, F) tensors, backward 3 (unfused: the sum
is stored, and read again for the bias gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.case import Draw, Integers, Mutant, OpCase
from .common.configs import launches
from .common.dropout import keep_mask, threshold_and_scale
from .common.launch import dense, launch, launch_sums, tiles, unit_stride
from .common.triton_op import triton_op


@triton.jit(do_not_specialize=["N", "dropout_site", "threshold"])
def _forward(
    x_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    N,
    stride_x,
    dropout_site,
    threshold,
    scale,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLUMNS
    col = first_col + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (col < F)[None, :]
    h = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    h += tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    if DROPOUT:
        keep = keep_mask(
            tl.load(seed_ptr),
            row,
            head=0,
            dropout_site=dropout_site,
            threshold=threshold,
            COLUMNS=COLUMNS,
            first_column=first_col,
        )
        y = tl.where(keep, y * scale, 0.0)
    tl.store(y_ptr + row[:, None] * F + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "G", "dropout_site", "threshold"])
def _backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    seed_ptr,
    dx_ptr,
    partial_ptr,
    N,
    G,
    stride_dy,
    stride_x,
    dropout_site,
    threshold,
    scale,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    program = tl.program_id(0)
    first_col = tl.program_id(1) * COLUMNS
    col = first_col + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(program * ROWS, N, G * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (col < F)[None, :]
        h = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
        h += bias[None, :]
        dx = tl.load(dy_ptr + row[:, None] * stride_dy + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_mask(
                seed,
                row,
                head=0,
                dropout_site=dropout_site,
                threshold=threshold,
                COLUMNS=COLUMNS,
                first_column=first_col,
            )
            dx = tl.where(keep, dx * scale, 0.0)
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        dx *= cdf + h * (tl.exp(-0.5 * h * h) * 0.3989422804014327)
        tl.store(dx_ptr + row[:, None] * F + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(partial_ptr + program.to(tl.int64) * F + col, tl.sum(dbias, 0), mask=col < F)


launches(  # ROWS x COLUMNS: tile of a program
    "bias_gelu_forward",
    ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}),
)
launches(  # at most PROGRAMS programs share the rows of a column block
    "bias_gelu_backward",
    ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 256, "PROGRAMS": 352, "num_warps": 4}),
)


@triton_op("bias_gelu", outputs=("y",))
def forward(x: Tensor, bias: Tensor, seed: Tensor | None, dropout: float, dropout_site: int) -> Tensor:
    """Compute y (N, F) in the dtype of ``x``.

    Args:
        x: (N, F) fp32, fp16 or bf16.
        bias: (F,) of any floating dtype.
        seed: (1,) int64; None is allowed with dropout 0.
        dropout: Rate in [0, 1).
        dropout_site: Number of this dropout in the model.
    """
    num_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    threshold, scale = threshold_and_scale(dropout)
    launch(
        _forward,
        tiles,
        launches="bias_gelu_forward",
        like=x,
        width=width,
        x=unit_stride(x),
        bias=dense(bias),
        seed=seed,
        y=y,
        N=num_rows,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=scale,
        F=width,
        DROPOUT=dropout > 0.0,
    )
    return y


@forward.gradients_of("x", "bias")
def backward(
    dy: Tensor, x: Tensor, bias: Tensor, seed: Tensor | None, dropout: float, dropout_site: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, F), in its dtype, and of bias (F,), in fp32; arguments as in ``forward``."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbias = backward_into(dx, dy, x, bias, seed=seed, dropout=dropout, dropout_site=dropout_site)
    return dx, dbias


def backward_into(
    dx: Tensor, dy: Tensor, x: Tensor, bias: Tensor, *, seed: Tensor | None, dropout: float, dropout_site: int
) -> Tensor:
    """Write the gradient of x to ``dx``, which may be ``dy`` itself, and return that of bias (F,) in fp32."""
    num_rows, width = x.shape
    threshold, scale = threshold_and_scale(dropout)
    return launch_sums(
        _backward,
        (width,),
        launches="bias_gelu_backward",
        like=x,
        width=width,
        dy=unit_stride(dy),
        x=unit_stride(x),
        bias=dense(bias),
        seed=seed,
        dx=dx,
        N=num_rows,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=scale,
        F=width,
        DROPOUT=dropout > 0.0,
    )


WIDTHS = (768, 1536, 3072)  # ffn_dim of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    num_rows = 65536
    x, dy = (torch.randn(num_rows, width, dtype=dtype, device=device) for _ in range(2))
    bias, seed = torch.randn(width, device=device), torch.ones(1, dtype=torch.int64, device=device)
    for dropout in (0.0, 0.1):
        label = "dropout" if dropout else ""
        arguments: dict[str, Any] = {"bias": bias, "seed": seed, "dropout": dropout, "dropout_site": 1}
        yield f"forward {label}", num_rows, partial(forward, x=x, **arguments)
        yield f"backward {label}", num_rows, partial(backward, dy=dy, x=x, **arguments)


def _inputs(draw: Draw, shape: tuple[int, int]) -> dict[str, Any]:
    num_rows, width = shape
    return {"x": draw.rows(num_rows, width), "bias": draw.parameters(width)}


CASE = OpCase(
    name="bias_gelu",
    make=_inputs,
    shapes=[(1, 16), (5, 48), (9, 257), (37, 192), (6, 1), (3, 1100), (2, 512)],
    empty=[(0, 16)],
    traced=[(9, 24), (11, 24)],
    random=[Integers(1, 40), Integers(1, 600)],
    differentiable=("x", "bias"),
    summed=("bias",),
    rows=("x",),
    vectors=("bias",),
    traced_variants=[{}, {"dropout": 0.2, "site": 2}],
    offsets=(0.0, 30.0, -3.0),
    launches={"bias_gelu_backward": {"PROGRAMS": 2}},
    mutants=(
        Mutant(
            "edge",
            "    first_col = tl.program_id(1) * COLUMNS\n    col = first_col + tl.arange(0, COLUMNS)\n    bias",
            "    first_col = tl.program_id(1) * (COLUMNS - 1)\n    col = first_col + tl.arange(0, COLUMNS)\n    bias",
        ),
        Mutant(
            "last row",
            "for start in range(program * ROWS, N, G * ROWS):",
            "for start in range(program * ROWS, N - ROWS, G * ROWS):",
        ),
        Mutant(
            "fp32 cast",
            "    y = 0.5 * h",
            "    h = h.to(x_ptr.dtype.element_ty).to(tl.float32)\n    y = 0.5 * h",
        ),
    ),
)
