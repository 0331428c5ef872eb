"""y = LayerNorm(residual + dropout(branch + branch_bias)): the post-norm residual connection.

    z = residual + keep * scale * (branch + branch_bias)     keep from Philox, see common/dropout.py
    xhat = (z - mean z) * rstd,  y = xhat * weight + bias    statistics in fp32 over D, eps 1e-5

Letters: N packed rows, D width, G programs. Fused: bias, dropout, addition, statistics, affine; in the backward also
the column sums for weight, bias and branch_bias, and the sum of two incoming gradients. Saved for the backward: the
inputs, mean and rstd; z is recomputed and masks are drawn again. Memory traffic: forward 3 (N, D) tensors (unfused: 7
and a mask), backward 6.
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
    branch_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    branch_bias_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    stride_branch,
    stride_residual,
    dropout_site,
    threshold,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (col < D)[None, :]
    z = tl.load(branch_ptr + row[:, None] * stride_branch + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if BRANCH_BIAS:
        z += tl.load(branch_bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = keep_mask(
            tl.load(seed_ptr), row, head=0, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_D
        )
        z = tl.where(keep, z * scale, 0.0)
    z += tl.load(residual_ptr + row[:, None] * stride_residual + col[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(inside, z, 0.0), 1) / D  # (ROWS,)
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + row[:, None] * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit(do_not_specialize=["N", "G", "dropout_site", "threshold"])
def _backward(
    dy_ptr,
    dy_again_ptr,
    branch_ptr,
    residual_ptr,
    weight_ptr,
    branch_bias_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dbranch_ptr,
    dresidual_ptr,
    partial_ptr,
    N,
    G,
    stride_dy,
    stride_dy_again,
    stride_branch,
    stride_residual,
    dropout_site,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    FORKED: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dbranch_bias = tl.zeros((BLOCK_D,), tl.float32)
    if BRANCH_BIAS:
        branch_bias = tl.load(branch_bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for index in range(program, N, G):
        row = tl.cast(index, tl.int64)
        z = tl.load(branch_ptr + row * stride_branch + col, mask=inside, other=0.0).to(tl.float32)
        if BRANCH_BIAS:
            z += branch_bias
        if DROPOUT:
            row_vector = row + tl.zeros((1,), tl.int64)
            keep = keep_mask(seed, row_vector, head=0, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_D)
            keep = tl.reshape(keep, (BLOCK_D,))
            z = tl.where(keep, z * scale, 0.0)
        z += tl.load(residual_ptr + row * stride_residual + col, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
        dy = tl.load(dy_ptr + row * stride_dy + col, mask=inside, other=0.0).to(tl.float32)
        if FORKED:
            dy += tl.load(dy_again_ptr + row * stride_dy_again + col, mask=inside, other=0.0).to(tl.float32)
        scaled = dy * weight
        dz = (scaled - tl.sum(scaled, 0) / D - xhat * (tl.sum(scaled * xhat, 0) / D)) * rstd
        tl.store(dresidual_ptr + row * D + col, dz.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if DROPOUT:  # without dropout both gradients are the same
            dz = tl.where(keep, dz * scale, 0.0)
            tl.store(dbranch_ptr + row * D + col, dz.to(dbranch_ptr.dtype.element_ty), mask=inside)
        dweight += dy * xhat
        dbias += dy
        if BRANCH_BIAS:
            dbranch_bias += dz
    partial_ptr += program.to(tl.int64) * (3 * D) + col
    tl.store(partial_ptr, dweight, mask=inside)
    tl.store(partial_ptr + D, dbias, mask=inside)
    if BRANCH_BIAS:
        tl.store(partial_ptr + 2 * D, dbranch_bias, mask=inside)


# ROWS: rows per tile of a program. One warp per row.
launches(
    "add_layer_norm_forward",
    ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
    ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
    ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
)
# PROGRAMS: maximum number of programs. They share the rows, and each writes its own partial sums.
launches(
    "add_layer_norm_backward",
    ("any", 1024, 4, {"PROGRAMS": 1056, "num_warps": 4}),
    ("any", 4096, 4, {"PROGRAMS": 528, "num_warps": 8}),
    ("any", 16384, 4, {"PROGRAMS": 264, "num_warps": 16}),
)


def _unpack(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dbranch, dresidual, sums = results
    return (dbranch if dbranch.dim() == 2 else dresidual), dresidual, *sums


@triton_op("add_layer_norm", outputs=("y", "mean", "rstd"))
def forward(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    dropout_site: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (N, D) in the dtype of ``residual``, and mean and rstd (N,) in fp32.

    Args:
        branch: (N, D) fp32, fp16 or bf16.
        residual: (N, D) in the dtype of ``branch``.
        weight: (D,) of any floating dtype, like the biases.
        bias: (D,).
        branch_bias: (D,), or None for no bias.
        seed: (1,) int64; None is allowed with dropout 0.
        dropout: Rate in [0, 1), applied to branch + branch_bias.
        dropout_site: Number of this dropout in the model.
        eps: Added to the variance.
    """
    num_rows, width = residual.shape
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    mean = torch.empty(num_rows, dtype=torch.float32, device=y.device)
    rstd = torch.empty_like(mean)
    threshold, scale = threshold_and_scale(dropout)
    launch(
        _forward,
        tiles,
        launches="add_layer_norm_forward",
        like=residual,
        width=width,
        branch=unit_stride(branch),
        residual=unit_stride(residual),
        weight=dense(weight),
        bias=dense(bias),
        branch_bias=dense(branch_bias),
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
        BRANCH_BIAS=branch_bias is not None,
        DROPOUT=dropout > 0.0,
    )
    return y, mean, rstd


@forward.gradients_of("branch", "residual", "weight", "bias", "branch_bias", unpack=_unpack)
def backward(
    dy: Tensor,
    dy_again: Tensor | None,
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    dropout_site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch and of residual, and the column sums (3, D) in fp32.

    Without dropout the gradient of branch equals that of residual, and the first tensor is empty. The column sums are
    the gradients of weight, bias and branch_bias; the third is undefined if ``branch_bias`` is None.

    Args:
        dy: (N, D) gradient of y.
        dy_again: (N, D) second gradient of y, added to ``dy``, or None.
        branch: As in ``forward``, like the following inputs.
        residual: (N, D).
        weight: (D,).
        branch_bias: (D,) or None.
        seed: (1,) int64 or None.
        mean: (N,) fp32, from the forward.
        rstd: (N,) fp32, from the forward.
        dropout: Rate in [0, 1).
        dropout_site: Number of this dropout in the model.
    """
    num_rows, width = residual.shape
    dresidual = torch.empty_like(residual, memory_format=torch.contiguous_format)
    dbranch = torch.empty_like(dresidual) if dropout > 0.0 else dresidual.new_empty(0)
    threshold, scale = threshold_and_scale(dropout)
    sums = launch_sums(
        _backward,
        (3, width),
        launches="add_layer_norm_backward",
        like=residual,
        width=width,
        dy=unit_stride(dy),
        dy_again=None if dy_again is None else unit_stride(dy_again),
        branch=unit_stride(branch),
        residual=unit_stride(residual),
        weight=dense(weight),
        branch_bias=dense(branch_bias),
        seed=seed,
        mean=mean,
        rstd=rstd,
        dbranch=dbranch,
        dresidual=dresidual,
        N=num_rows,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=scale,
        D=width,
        BRANCH_BIAS=branch_bias is not None,
        DROPOUT=dropout > 0.0,
        FORKED=dy_again is not None,
    )
    return dbranch, dresidual, sums


class _Fork(torch.autograd.Function):
    """The operation with y returned twice: the backward kernel adds the two incoming gradients itself."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = forward(*inputs)
        forward.save(ctx, inputs, outputs)
        return outputs[0], outputs[0].detach()

    @staticmethod
    def backward(ctx, dy, dy_again):
        if dy is None:
            dy, dy_again = dy_again, None
        return forward.gradients(ctx, {"dy": dy, "dy_again": dy_again})


def forked(
    *,
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    dropout_site: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y of ``forward`` twice, in the same memory."""
    return _Fork.apply(branch, residual, weight, bias, branch_bias, seed, dropout, dropout_site, eps)


WIDTHS = (192, 384, 768)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    num_rows = 65536
    branch, residual, dy, dy_again = (torch.randn(num_rows, width, dtype=dtype, device=device) for _ in range(4))
    vector, seed = torch.randn(width, device=device), torch.ones(1, dtype=torch.int64, device=device)
    mean, rstd = torch.zeros(num_rows, device=device), torch.ones(num_rows, device=device)
    inputs: dict[str, Any] = {
        "branch": branch,
        "residual": residual,
        "weight": vector,
        "branch_bias": vector,
        "seed": seed,
    }
    for dropout in (0.0, 0.1):
        label = "dropout" if dropout else ""
        inputs |= {"dropout": dropout, "dropout_site": 1}
        yield f"forward {label}", num_rows, partial(forward, bias=vector, eps=1e-5, **inputs)
        yield (
            f"backward {label}",
            num_rows,
            partial(backward, dy=dy, dy_again=dy_again, mean=mean, rstd=rstd, **inputs),
        )


def _inputs(draw: Draw, shape: tuple[int, int]) -> dict[str, Any]:
    num_rows, width = shape
    return {
        "branch": draw.rows(num_rows, width, offset=0.0),
        "residual": draw.rows(num_rows, width),
        "weight": draw.parameters(width, offset=1.0),
        "bias": draw.parameters(width),
        "branch_bias": draw.parameters(width),
    }


CASE = OpCase(
    name="add_layer_norm",
    make=_inputs,
    shapes=[(1, 16), (5, 48), (9, 33), (37, 192), (4, 1), (3, 1500)],
    empty=[(0, 16)],
    traced=[(5, 24), (7, 24)],
    random=[Integers(1, 40), Integers(8, 130)],
    differentiable=("branch", "residual", "weight", "bias", "branch_bias"),
    summed=("weight", "bias", "branch_bias"),
    rows=("branch", "residual"),
    vectors=("weight", "bias", "branch_bias"),
    traced_variants=[{"fork": True}, {"fork": True, "dropout": 0.2, "site": 2}],
    launches={"add_layer_norm_backward": {"PROGRAMS": 3}},
    mutants=(
        Mutant(
            "edge",
            "y.to(y_ptr.dtype.element_ty), mask=inside",
            "y.to(y_ptr.dtype.element_ty), mask=inside & (col < D - 1)[None, :]",
        ),
        Mutant("last row", "for index in range(program, N, G):", "for index in range(program, N - 1, G):"),
        Mutant(
            "fp32 cast",
            "    mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
            "    z = z.to(tl.float16).to(tl.float32)\n    mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
        ),
        Mutant("stride", "row * stride_dy_again + col", "row * stride_dy + col"),
    ),
)
