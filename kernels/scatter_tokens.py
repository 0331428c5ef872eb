"""The decoder's input in one pass: visible rows and mask tokens in token order, + position, LayerNorm, dropout.

    z_i = (visible[ids_restore_i] if ids_restore_i >= 0 else mask_token) + table[token_i]
    y   = keep * scale * LayerNorm(z)           LayerNorm (eps 1e-5) and dropout are optional

Letters: N packed rows, Nv visible rows, D width, G programs. Each visible row is used at most once, so its gradient is
a store. The gradients of mask token, weight and bias are partial sums. Saved for the backward: the inputs, mean and
rstd. Memory traffic: forward N writes and Nv reads of D values, backward N + Nv reads and Nv writes (unfused: also the
gathered rows, their sum and the mask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    visible_ptr,
    mask_token_ptr,
    table_ptr,
    token_ptr,
    ids_restore_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    stride_visible,
    dropout_site,
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
    ids_restore = tl.load(ids_restore_ptr + row, mask=row < N, other=-1).to(tl.int64)  # (ROWS,)
    token = tl.load(token_ptr + row, mask=row < N, other=0).to(tl.int64)
    is_visible = ids_restore >= 0
    z = tl.load(
        visible_ptr + ids_restore[:, None] * stride_visible + col[None, :], mask=inside & is_visible[:, None], other=0.0
    ).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    z = tl.where(is_visible[:, None], z, mask_token[None, :])
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
        keep = keep_mask(
            tl.load(seed_ptr), row, head=0, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_D
        )
        z = tl.where(keep, z * scale, 0.0)
    tl.store(y_ptr + row[:, None] * D + col[None, :], z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "G", "dropout_site", "threshold"])
def _backward(
    dy_ptr,
    visible_ptr,
    mask_token_ptr,
    table_ptr,
    token_ptr,
    ids_restore_ptr,
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
    dropout_site,
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
        ids_restore = tl.load(ids_restore_ptr + row).to(tl.int64)
        is_visible = ids_restore >= 0
        dz = tl.load(dy_ptr + row * stride_dy + col, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            row_vector = row + tl.zeros((1,), tl.int64)
            keep = keep_mask(seed, row_vector, head=0, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_D)
            dz = tl.where(tl.reshape(keep, (BLOCK_D,)), dz * scale, 0.0)
        if NORM:
            token = tl.load(token_ptr + row).to(tl.int64)
            z = tl.load(visible_ptr + ids_restore * stride_visible + col, mask=inside & is_visible, other=0.0)
            z = tl.where(is_visible, z.to(tl.float32), mask_token)
            z += tl.load(table_ptr + token * D + col, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            xhat = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
            dweight += dz * xhat
            dbias += dz
            scaled = dz * weight
            dz = (scaled - tl.sum(scaled, 0) / D - xhat * (tl.sum(scaled * xhat, 0) / D)) * rstd
        tl.store(dvisible_ptr + ids_restore * D + col, dz.to(dvisible_ptr.dtype.element_ty), mask=inside & is_visible)
        dmask_token += tl.where(is_visible, 0.0, dz)
    partial_ptr += program.to(tl.int64) * (3 * D) + col
    tl.store(partial_ptr, dmask_token, mask=inside)
    if NORM:
        tl.store(partial_ptr + D, dweight, mask=inside)
        tl.store(partial_ptr + 2 * D, dbias, mask=inside)


# ROWS: rows per tile of a program. One warp per row.
launches(
    "scatter_tokens_forward",
    ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
    ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
    ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
)
# PROGRAMS: maximum number of programs. They share the rows, and each writes its own partial sums.
launches(
    "scatter_tokens_backward",
    ("any", 1024, 4, {"PROGRAMS": 1056, "num_warps": 4}),
    ("any", 4096, 4, {"PROGRAMS": 528, "num_warps": 8}),
    ("any", 16384, 4, {"PROGRAMS": 264, "num_warps": 16}),
)


@triton_op("scatter_tokens", outputs=("y", "mean", "rstd"))
def forward(
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    token: Tensor,
    ids_restore: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    dropout_site: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (N, D) in the dtype of ``visible``, and mean and rstd (N,) in fp32, which are empty without LayerNorm.

    Args:
        visible: (Nv, D) fp32, fp16 or bf16.
        mask_token: (D,) of any floating dtype, like ``weight`` and ``bias``.
        table: (tokens, D) positions.
        token: (N,) integer row of ``table`` for each packed row.
        ids_restore: (N,) integer row of ``visible`` for each packed row, -1 for the mask token.
        weight: (D,) of the LayerNorm, or None for no LayerNorm.
        bias: (D,), or None with ``weight``.
        seed: (1,) int64; None is allowed with dropout 0.
        dropout: Rate in [0, 1).
        dropout_site: Number of this dropout in the model.
        eps: Added to the variance.
    """
    num_rows, width = token.shape[0], visible.shape[1]
    mask_token, token, ids_restore = dense(mask_token), dense(token), dense(ids_restore)
    weight, bias = dense(weight), dense(bias)
    y = visible.new_empty(num_rows, width)
    mean = visible.new_empty(num_rows if weight is not None else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    threshold, scale = threshold_and_scale(dropout)
    launch(
        _forward,
        tiles,
        launches="scatter_tokens_forward",
        like=visible,
        width=width,
        visible=unit_stride(visible),
        mask_token=mask_token,
        table=table.contiguous(),
        token=token,
        ids_restore=ids_restore,
        weight=weight,
        bias=bias,
        seed=seed,
        y=y,
        mean=mean,
        rstd=rstd,
        N=num_rows,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=scale,
        eps=eps,
        D=width,
        NORM=weight is not None,
        DROPOUT=dropout > 0.0,
    )
    return y, mean, rstd


def _unpack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dvisible, sums = results
    return dvisible, *sums


@forward.gradients_of("visible", "mask_token", "weight", "bias", unpack=_unpack)
def backward(
    dy: Tensor,
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    token: Tensor,
    ids_restore: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    dropout_site: int,
) -> tuple[Tensor, Tensor]:
    """Gradient of visible (Nv, D), and the column sums (3, D) in fp32: the gradients of mask_token, weight and bias.

    Without LayerNorm the last two column sums are undefined. ``dy`` (N, D) is the gradient of y; ``mean`` and ``rstd``
    (N,) come from the forward. The other arguments are those of ``forward``.
    """
    num_rows, width = token.shape[0], visible.shape[1]
    # Visible rows that are not used (padding rows past the last clip) have the gradient 0.
    dvisible = torch.zeros_like(visible, memory_format=torch.contiguous_format)
    threshold, scale = threshold_and_scale(dropout)
    sums = launch_sums(
        _backward,
        (3, width),
        launches="scatter_tokens_backward",
        like=visible,
        width=width,
        dy=unit_stride(dy),
        visible=unit_stride(visible),
        mask_token=dense(mask_token),
        table=table.contiguous(),
        token=dense(token),
        ids_restore=dense(ids_restore),
        weight=dense(weight),
        seed=seed,
        mean=mean,
        rstd=rstd,
        dvisible=dvisible,
        N=num_rows,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=scale,
        D=width,
        NORM=weight is not None,
        DROPOUT=dropout > 0.0,
    )
    return dvisible, sums


WIDTHS = (192, 384, 768)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    num_rows = 65536
    visible, dy = (torch.randn(count, width, dtype=dtype, device=device) for count in (num_rows // 4, num_rows))
    vector, seed = torch.randn(width, device=device), torch.ones(1, dtype=torch.int64, device=device)
    table, mean, rstd = (torch.ones(*shape, device=device) for shape in ((512, width), (num_rows,), (num_rows,)))
    index = torch.arange(num_rows, device=device)
    ids_restore = torch.where(index % 4 == 0, index // 4, -1)  # every fourth token is visible
    inputs = {"visible": visible, "mask_token": vector, "table": table, "token": index % 512}
    inputs |= {"ids_restore": ids_restore, "seed": seed}
    for norm in (vector, None):
        for dropout in (0.0, 0.1):
            label = " ".join(word for word, used in (("norm", norm is not None), ("dropout", dropout > 0.0)) if used)
            arguments: dict[str, Any] = {**inputs, "weight": norm, "dropout": dropout, "dropout_site": 1}
            yield f"forward {label}", num_rows, partial(forward, bias=norm, eps=1e-5, **arguments)
            yield f"backward {label}", num_rows, partial(backward, dy=dy, mean=mean, rstd=rstd, **arguments)


def _inputs(draw: Draw, shape: tuple[Sequence[int], int]) -> dict[str, Any]:
    """Packed rows are visible (1) or masked (0); tokens repeat over a table of 50 positions."""
    is_visible, width = torch.tensor(shape[0], dtype=torch.bool), shape[1]
    return {
        "visible": draw.rows(int(is_visible.sum()), width),
        "mask_token": draw.parameters(width),
        "table": draw.parameters(50, width),
        "token": draw.integers(torch.arange(len(is_visible)) * 7 % 50),
        "inverse": draw.integers(torch.where(is_visible, is_visible.cumsum(0) - 1, -1)),
        "weight": draw.parameters(width, offset=1.0),
        "bias": draw.parameters(width),
    }


_RAGGED = [int(index % 5 == 2 or index % 7 == 0) for index in range(41)]
_PATTERNS = ([1], [0], [1, 0] * 9, [1] + [0] * 10, [0] * 10 + [1], [1] * 7, [0] * 7, _RAGGED)
_NO_NORM = {"weight": None, "bias": None}


CASE = OpCase(
    name="scatter_tokens",
    make=_inputs,
    shapes=[(pattern, 33) for pattern in _PATTERNS],
    empty=[([], 16)],
    traced=[([1, 0] * 9, 24), (_RAGGED, 24)],
    random=[Integers(0, 1, length=(1, 40)), Integers(8, 130)],
    differentiable=("visible", "mask_token", "weight", "bias"),
    summed=("mask_token", "weight", "bias"),
    rows=("visible",),
    vectors=("mask_token", "token", "inverse", "weight", "bias"),
    variants=[{}, _NO_NORM],
    traced_variants=[_NO_NORM, {"dropout": 0.2, "site": 2}],
    launches={"scatter_tokens_backward": {"PROGRAMS": 3}},
    mutants=(
        Mutant(
            "edge",
            "z.to(y_ptr.dtype.element_ty), mask=inside",
            "z.to(y_ptr.dtype.element_ty), mask=inside & (col > 0)[None, :]",
        ),
        Mutant("last row", "for index in range(program, N, G):", "for index in range(program, N - 1, G):"),
        Mutant(
            "row owner",
            "dvisible_ptr + ids_restore * D + col",
            "dvisible_ptr + tl.maximum(ids_restore - 1, 0) * D + col",
        ),
        Mutant(
            "fp32 cast",
            "        mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
            "        z = z.to(tl.float16).to(tl.float32)\n        mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
        ),
        Mutant(
            "stride",
            "mask_token, token, ids_restore = dense(mask_token), dense(token), dense(ids_restore)\n"
            "    weight, bias = dense(weight), dense(bias)\n",
            "pass\n",
        ),
    ),
)
