"""The decoder's input in one pass: visible rows at their places, else the mask token, + position, LayerNorm, dropout.

    z_i = (visible[inverse_i] if inverse_i >= 0 else mask_token) + table[token_i]
    y   = keep * scale * LayerNorm(z)           LayerNorm (eps 1e-5) and dropout are optional

Letters: N packed rows, Nv visible ones, D width, G programs. Every visible row stands at one place, so its gradient is
a store; the mask token's, weight's and bias's are partial sums. Saved: the inputs, mean and rstd. Moved: forward N
writes and Nv reads of D, backward N + Nv reads and Nv writes (unfused: the gathered rows, their sum and the mask too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.dropout import keep_mask, threshold_and_scale
from .common.launch import block, dense, launch, options, unit_stride


@triton.jit(do_not_specialize=["N", "site", "threshold"])
def _forward(
    visible_ptr,
    mask_token_ptr,
    table_ptr,
    token_ptr,
    inverse_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    stride_visible,
    site,
    threshold,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (col < D)[None, :]
    inverse = tl.load(inverse_ptr + row, mask=row < N, other=-1).to(tl.int64)  # (ROWS,)
    token = tl.load(token_ptr + row, mask=row < N, other=0).to(tl.int64)
    seen = inverse >= 0
    z = tl.load(
        visible_ptr + inverse[:, None] * stride_visible + col[None, :], mask=inside & seen[:, None], other=0.0
    ).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    z = tl.where(seen[:, None], z, mask_token[None, :])
    z += tl.load(table_ptr + token[:, None] * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.where(inside, z, 0.0), 1) / D
        centred = tl.where(inside, z - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        z = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(mean_ptr + row, mean, mask=row < N)
        tl.store(rstd_ptr + row, rstd, mask=row < N)
    if DROPOUT:
        z = tl.where(keep_mask(tl.load(seed_ptr), row, 0, site, threshold, BLOCK_D), z * scale, 0.0)
    tl.store(y_ptr + row[:, None] * D + col[None, :], z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "G", "site", "threshold"])
def _backward(
    dy_ptr,
    visible_ptr,
    mask_token_ptr,
    table_ptr,
    token_ptr,
    inverse_ptr,
    weight_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dvisible_ptr,
    partial_ptr,
    N,
    G,
    stride_dy,
    stride_visible,
    site,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    dmask_token = tl.zeros((BLOCK_D,), tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        mask_token = tl.load(mask_token_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for index in range(program, N, G):
        row = tl.cast(index, tl.int64)
        inverse = tl.load(inverse_ptr + row).to(tl.int64)
        seen = inverse >= 0
        dz = tl.load(dy_ptr + row * stride_dy + col, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = tl.reshape(keep_mask(seed, row + tl.zeros((1,), tl.int64), 0, site, threshold, BLOCK_D), (BLOCK_D,))
            dz = tl.where(kept, dz * scale, 0.0)
        if NORM:
            token = tl.load(token_ptr + row).to(tl.int64)
            z = tl.load(visible_ptr + inverse * stride_visible + col, mask=inside & seen, other=0.0).to(tl.float32)
            z = tl.where(seen, z, mask_token)
            z += tl.load(table_ptr + token * D + col, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            xhat = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
            dweight += dz * xhat
            dbias += dz
            scaled = dz * weight
            dz = (scaled - tl.sum(scaled, 0) / D - xhat * (tl.sum(scaled * xhat, 0) / D)) * rstd
        tl.store(dvisible_ptr + inverse * D + col, dz.to(dvisible_ptr.dtype.element_ty), mask=inside & seen)
        dmask_token += tl.where(seen, 0.0, dz)
    partial_ptr += program.to(tl.int64) * (3 * D) + col
    tl.store(partial_ptr, dmask_token, mask=inside)
    if NORM:
        tl.store(partial_ptr + D, dweight, mask=inside)
        tl.store(partial_ptr + 2 * D, dbias, mask=inside)


def forward(
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    token: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    site: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, D) in the dtype of ``visible``, mean and rstd (N,) in fp32 (no elements without LayerNorm)."""
    rows, width = token.shape[0], visible.shape[1]
    visible, table = unit_stride(visible), table.contiguous()
    mask_token, token, inverse, weight, bias = dense(mask_token, token, inverse, weight, bias)
    y = visible.new_empty(rows, width)
    mean = visible.new_empty(rows if weight is not None else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    threshold, scale = threshold_and_scale(dropout)
    chosen = options("scatter_tokens_forward", visible, width)
    launch(
        _forward,
        (triton.cdiv(rows, chosen["ROWS"]),),
        visible,
        mask_token,
        table,
        token,
        inverse,
        weight,
        bias,
        seed,
        y,
        mean,
        rstd,
        rows,
        visible.stride(0),
        site,
        threshold,
        scale,
        eps,
        D=width,
        BLOCK_D=block(width),
        NORM=weight is not None,
        DROPOUT=dropout > 0.0,
        **chosen,
    )
    return y, mean, rstd


def backward(
    dy: Tensor,
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    token: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Gradient of visible (Nv, D), and fp32 column sums (3, D): of mask_token, weight, bias (undefined without)."""
    rows, width = token.shape[0], visible.shape[1]
    dy, visible, table = unit_stride(dy), unit_stride(visible), table.contiguous()
    mask_token, token, inverse, weight = dense(mask_token, token, inverse, weight)
    # A visible row that stands nowhere (past the last clip, where rows are rounded up) has no gradient.
    dvisible = torch.zeros_like(visible, memory_format=torch.contiguous_format)
    chosen = dict(options("scatter_tokens_backward", visible, width))
    programs = min(rows, chosen.pop("PROGRAMS"))
    partial = torch.empty(programs, 3, width, dtype=torch.float32, device=dy.device)
    threshold, scale = threshold_and_scale(dropout)
    launch(
        _backward,
        (programs,),
        dy,
        visible,
        mask_token,
        table,
        token,
        inverse,
        weight,
        seed,
        mean,
        rstd,
        dvisible,
        partial,
        rows,
        programs,
        dy.stride(0),
        visible.stride(0),
        site,
        threshold,
        scale,
        D=width,
        BLOCK_D=block(width),
        NORM=weight is not None,
        DROPOUT=dropout > 0.0,
        **chosen,
    )
    return dvisible, partial.sum(0)


forward_op = torch.library.custom_op("mae_ast_fast::scatter_tokens", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::scatter_tokens_backward", backward, mutates_args=())


@forward_op.register_fake
def _(visible, mask_token, table, token, inverse, weight, bias, seed, dropout, site, eps):
    rows = token.shape[0]
    mean = visible.new_empty(rows if weight is not None else 0, dtype=torch.float32)
    return visible.new_empty(rows, visible.shape[1]), mean, torch.empty_like(mean)


@backward_op.register_fake
def _(dy, visible, mask_token, table, token, inverse, weight, seed, mean, rstd, dropout, site):
    sums = visible.new_empty(3, visible.shape[1], dtype=torch.float32)
    return torch.empty_like(visible, memory_format=torch.contiguous_format), sums


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    visible, mask_token, table, token, inverse, weight, bias, seed, dropout, site, _ = inputs
    ctx.save_for_backward(visible, mask_token, table, token, inverse, weight, seed, *output[1:])
    ctx.dropout, ctx.site, ctx.bias_dtype = dropout, site, None if bias is None else bias.dtype


def _gradients(ctx, dy, dmean, drstd):
    visible, mask_token, table, token, inverse, weight, seed, mean, rstd = ctx.saved_tensors
    dvisible, (dmask_token, dweight, dbias) = backward_op(
        dy, visible, mask_token, table, token, inverse, weight, seed, mean, rstd, ctx.dropout, ctx.site
    )
    affine = (None, None) if weight is None else (dweight.to(weight.dtype), dbias.to(ctx.bias_dtype))
    return dvisible, dmask_token.to(mask_token.dtype), None, None, None, *affine, None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)

WIDTHS = (192, 384, 768)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    rows = 65536
    x, dy = (torch.randn(count, width, dtype=dtype, device=device) for count in (rows // 4, rows))
    w, seed = torch.randn(width, device=device), torch.ones(1, dtype=torch.int64, device=device)
    table, mean, rstd = (torch.ones(*shape, device=device) for shape in ((512, width), (rows,), (rows,)))
    index = torch.arange(rows, device=device)
    token, inverse = index % 512, torch.where(index % 4 == 0, index // 4, -1)  # every fourth token is visible
    for norm in (w, None):
        for p in (0.0, 0.1):
            label = " ".join(word for word, used in (("norm", norm is not None), ("dropout", p > 0.0)) if used)
            put = (x, w, table, token, inverse, norm, norm, seed, p, 1, 1e-5)
            yield f"forward {label}", rows, lambda put=put: forward(*put)
            back = (dy, x, w, table, token, inverse, norm, seed, mean, rstd, p, 1)
            yield f"backward {label}", rows, lambda back=back: backward(*back)
