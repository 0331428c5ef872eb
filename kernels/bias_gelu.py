"""y = dropout(GELU(x + bias)), the exact GELU: h = x + bias, GELU(h) = h * Phi(h), Phi(h) = (1 + erf(h / sqrt 2)) / 2.

    dx = keep * scale * dy * (Phi(h) + h * phi(h)),  phi(h) = exp(-h^2 / 2) / sqrt(2 pi),  dbias = column sums of dx

Letters: N packed rows, F columns, G programs a column block. Fused: bias, GELU, dropout; in the backward the column
sums. Saved: x and bias alone. Moved: forward 2 (N, F) tensors, backward 3 (unfused: the sum stored, and read again for
the bias gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.dropout import keep_mask, threshold_and_scale
from .common.launch import dense, launch, options, unit_stride


@triton.jit(do_not_specialize=["N", "site", "threshold"])
def _forward(
    x_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    N,
    stride_x,
    site,
    threshold,
    scale,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    col = first + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (col < F)[None, :]
    h = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    h += tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    if DROPOUT:
        y = tl.where(keep_mask(tl.load(seed_ptr), row, 0, site, threshold, COLUMNS, first), y * scale, 0.0)
    tl.store(y_ptr + row[:, None] * F + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "G", "site", "threshold"])
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
    site,
    threshold,
    scale,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    program = tl.program_id(0)
    first = tl.program_id(1) * COLUMNS
    col = first + tl.arange(0, COLUMNS)
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
            dx = tl.where(keep_mask(seed, row, 0, site, threshold, COLUMNS, first), dx * scale, 0.0)
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        dx *= below + h * (tl.exp(-0.5 * h * h) * 0.3989422804014327)
        tl.store(dx_ptr + row[:, None] * F + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(partial_ptr + program.to(tl.int64) * F + col, tl.sum(dbias, 0), mask=col < F)


def forward(x: Tensor, bias: Tensor, seed: Tensor | None, dropout: float, site: int) -> Tensor:
    """y (N, F) in the dtype of ``x``."""
    rows, width = x.shape
    x, (bias,) = unit_stride(x), dense(bias)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    threshold, scale = threshold_and_scale(dropout)
    chosen = options("bias_gelu_forward", x, width)
    grid = (triton.cdiv(rows, chosen["ROWS"]), triton.cdiv(width, chosen["COLUMNS"]))
    constants = {"F": width, "DROPOUT": dropout > 0.0, **chosen}
    launch(_forward, grid, x, bias, seed, y, rows, x.stride(0), site, threshold, scale, **constants)
    return y


def backward(
    dy: Tensor, x: Tensor, bias: Tensor, seed: Tensor | None, dropout: float, site: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, F) and, in fp32, of bias (F,)."""
    x = unit_stride(x)
    return backward_into(torch.empty_like(x, memory_format=torch.contiguous_format), dy, x, bias, seed, dropout, site)


def backward_into(dx, dy, x, bias, seed, dropout, site):
    """Same, into ``dx``, which may be ``dy``."""
    rows, width = x.shape
    dy, x, (bias,) = unit_stride(dy), unit_stride(x), dense(bias)
    threshold, scale = threshold_and_scale(dropout)
    chosen = dict(options("bias_gelu_backward", x, width))
    programs = min(triton.cdiv(rows, chosen["ROWS"]), chosen.pop("PROGRAMS"))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        _backward,
        (programs, triton.cdiv(width, chosen["COLUMNS"])),
        dy,
        x,
        bias,
        seed,
        dx,
        partial,
        rows,
        programs,
        dy.stride(0),
        x.stride(0),
        site,
        threshold,
        scale,
        F=width,
        DROPOUT=dropout > 0.0,
        **chosen,
    )
    return dx, partial.sum(0)


forward_op = torch.library.custom_op("mae_ast_fast::bias_gelu", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::bias_gelu_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x, bias, seed, dropout, site):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backward_op.register_fake
def _(dy, x, bias, seed, dropout, site):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, bias, seed, dropout, site = inputs
    ctx.save_for_backward(x, bias, seed)
    ctx.dropout, ctx.site = dropout, site


def _gradients(ctx, dy):
    x, bias, seed = ctx.saved_tensors
    dx, dbias = backward_op(dy, x, bias, seed, ctx.dropout, ctx.site)
    return dx, dbias.to(bias.dtype), None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)

WIDTHS = (768, 1536, 3072)  # ffn_dim of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    rows = 65536
    x, dy = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    bias, seed = torch.randn(width, device=device), torch.ones(1, dtype=torch.int64, device=device)
    for dropout in (0.0, 0.1):
        label = "dropout" if dropout else ""
        yield f"forward {label}", rows, lambda p=dropout: forward(x, bias, seed, p, 1)
        yield f"backward {label}", rows, lambda p=dropout: backward(dy, x, bias, seed, p, 1)
