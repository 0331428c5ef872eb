"""InfoNCE inside each clip, as attention with an online softmax: no (M, M) logits in memory.

    over "targets":      S_ij = <prediction_i, target_j>   hit_i = (argmax_j S_ij == i)
    over "predictions":  S_ij = <target_i, prediction_j>   hit_j = (argmax_i S_ij - lse_i == j)    SSAST's transpose
    lse_i = log sum_j exp S_ij,  loss_i = lse_i - S_ii,  q_ij = exp(S_ij - lse_i),  i and j over the rows of one clip
    over "targets":      d prediction_i = g_i (sum_{j != i} q_ij target_j - (1 - q_ii) target_i)
    over "predictions":  d prediction_j = sum_{i != j} g_i q_ij target_i - g_j (1 - q_jj) target_j

Letters: B clips, M rows of the longest clip, N packed rows, P values per row, BM x BN tile of S, g_i the gradient of
loss_i. A program works on BM rows of one clip and sweeps the other operand in tiles of BN. Fused: products, softmax,
own logit, hit; in the backward products again, softmax, its product with the targets and the scaling by g. Ties go to
the first index.

The forward does not store the gradient: stored in half precision and then scaled by g it would be rounded twice. The
sweep that computes it is the same in forward and backward. In half precision the weights q enter the product with the
targets as a rounded number and its remainder. Rounded alone they would cost as much accuracy as rounding the result,
and far more where the targets share an offset. The diagonal, whose weight is by far the largest, is added in fp32. lse
is stored as two numbers, row_max = max S and log_sum = log sum exp(S - row_max): their sum loses the digits that large
products share. Saved for the backward: the inputs, loss, row_max and log_sum. Memory traffic: forward 2 (N, P) tensors,
backward 3, and in each the swept operand cdiv(M, BM) times from the L2 cache (unfused: also N * M logits in fp32,
several times).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clear_padding import clear_tail
from .common.case import Draw, Mutant, OpCase
from .common.configs import launches
from .common.launch import cdiv, launch, unit_stride
from .common.triton_op import triton_op


@triton.jit
def _load_rows(x_ptr, first_row, num_valid, stride, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """ROWS rows from ``first_row`` on, the first ``num_valid`` of them real: (ROWS, BLOCK_P), zeros outside."""
    index, col = tl.arange(0, ROWS), tl.arange(0, BLOCK_P)
    row = first_row.to(tl.int64) + index
    inside = (index < num_valid)[:, None] & (col < P)[None, :]
    return tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _loss(
    query_ptr,
    key_ptr,
    cu_seqlens_ptr,
    loss_ptr,
    row_max_ptr,
    log_sum_ptr,
    hit_ptr,
    stride_query,
    stride_key,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HIT: tl.constexpr,
):
    """Loss and lse of the rows of S = query @ key^T; with HIT also whether S_ii is the first maximum of row i."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    clip_rows = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    first_row = tl.program_id(1) * BM
    if first_row >= clip_rows:
        return
    i = first_row + tl.arange(0, BM)
    query = _load_rows(query_ptr, start + first_row, clip_rows - first_row, stride_query, ROWS=BM, P=P, BLOCK_P=BLOCK_P)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)  # sum of exp(S - row_max)
    own_logit = tl.zeros((BM,), tl.float32)
    max_before = tl.full((BM,), float("-inf"), tl.float32)
    max_after = tl.full((BM,), float("-inf"), tl.float32)
    for tile_start in range(0, clip_rows, BN):
        j = tile_start + tl.arange(0, BN)
        key = _load_rows(key_ptr, start + tile_start, clip_rows - tile_start, stride_key, ROWS=BN, P=P, BLOCK_P=BLOCK_P)
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
        own_logit += tl.sum(tl.where(i[:, None] == j[None, :], s, 0.0), 1)
        s = tl.where((j < clip_rows)[None, :], s, float("-inf"))
        if HIT:
            max_before = tl.maximum(max_before, tl.max(tl.where(j[None, :] < i[:, None], s, float("-inf")), 1))
            max_after = tl.maximum(max_after, tl.max(tl.where(j[None, :] > i[:, None], s, float("-inf")), 1))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf: all products so far overflowed to it
        row_sum = row_sum * tl.exp(row_max - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        row_max = new_max
    row = start.to(tl.int64) + i
    log_sum = tl.log(row_sum)
    tl.store(row_max_ptr + row, row_max, mask=i < clip_rows)
    tl.store(log_sum_ptr + row, log_sum, mask=i < clip_rows)
    tl.store(loss_ptr + row, (row_max - own_logit) + log_sum, mask=i < clip_rows)
    if HIT:
        tl.store(hit_ptr + row, (own_logit > max_before) & (own_logit >= max_after), mask=i < clip_rows)


@triton.jit
def _column_hit(
    prediction_ptr,
    target_ptr,
    cu_seqlens_ptr,
    row_max_ptr,
    log_sum_ptr,
    hit_ptr,
    stride_prediction,
    stride_target,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Whether the own target of each prediction is the first maximum of the prediction's column of S - lse."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    clip_rows = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    first_row = tl.program_id(1) * BM
    if first_row >= clip_rows:
        return
    j = first_row + tl.arange(0, BM)
    prediction = _load_rows(
        prediction_ptr, start + first_row, clip_rows - first_row, stride_prediction, ROWS=BM, P=P, BLOCK_P=BLOCK_P
    )
    own_logit = tl.zeros((BM,), tl.float32)
    max_before = tl.full((BM,), float("-inf"), tl.float32)
    max_after = tl.full((BM,), float("-inf"), tl.float32)
    for tile_start in range(0, clip_rows, BN):
        i = tile_start + tl.arange(0, BN)
        target = _load_rows(
            target_ptr, start + tile_start, clip_rows - tile_start, stride_target, ROWS=BN, P=P, BLOCK_P=BLOCK_P
        )
        row_max = tl.load(row_max_ptr + start.to(tl.int64) + i, mask=i < clip_rows, other=0.0)
        log_sum = tl.load(log_sum_ptr + start.to(tl.int64) + i, mask=i < clip_rows, other=0.0)
        s = (tl.dot(prediction, tl.trans(target), input_precision="ieee") - row_max[None, :]) - log_sum[None, :]
        own_logit += tl.sum(tl.where(i[None, :] == j[:, None], s, 0.0), 1)
        s = tl.where((i < clip_rows)[None, :], s, float("-inf"))
        max_before = tl.maximum(max_before, tl.max(tl.where(i[None, :] < j[:, None], s, float("-inf")), 1))
        max_after = tl.maximum(max_after, tl.max(tl.where(i[None, :] > j[:, None], s, float("-inf")), 1))
    tl.store(hit_ptr + start.to(tl.int64) + j, (own_logit > max_before) & (own_logit >= max_after), mask=j < clip_rows)


@triton.jit
def _gradient(
    dloss_ptr,
    prediction_ptr,
    target_ptr,
    cu_seqlens_ptr,
    loss_ptr,
    row_max_ptr,
    log_sum_ptr,
    dprediction_ptr,
    stride_prediction,
    stride_target,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVER_PREDICTIONS: tl.constexpr,
):
    """Rows of the gradient; with OVER_PREDICTIONS lse and g belong to the swept targets."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    clip_rows = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    first_row = tl.program_id(1) * BM
    if first_row >= clip_rows:
        return
    i = first_row + tl.arange(0, BM)
    row = start.to(tl.int64) + i
    prediction = _load_rows(
        prediction_ptr, start + first_row, clip_rows - first_row, stride_prediction, ROWS=BM, P=P, BLOCK_P=BLOCK_P
    )
    dloss = tl.load(dloss_ptr + row, mask=i < clip_rows, other=0.0)
    # Weights enter products in half precision. g is often far below the range of fp16. It enters relative to the clip's
    # largest g, or, as a factor of the whole row, after the product.
    factor = dloss
    if OVER_PREDICTIONS:
        max_dloss = 0.0
        for tile_start in range(0, clip_rows, BN):
            j = tile_start + tl.arange(0, BN)
            g = tl.load(dloss_ptr + start.to(tl.int64) + j, mask=j < clip_rows, other=0.0)
            max_dloss = tl.maximum(max_dloss, tl.max(tl.abs(g), 0))
        max_dloss = tl.where(max_dloss > 0.0, max_dloss, 1.0)
        factor = tl.zeros((BM,), tl.float32) + max_dloss
    else:
        row_max = tl.load(row_max_ptr + row, mask=i < clip_rows, other=0.0)
        log_sum = tl.load(log_sum_ptr + row, mask=i < clip_rows, other=0.0)
    total = tl.zeros((BM, BLOCK_P), tl.float32)
    for tile_start in range(0, clip_rows, BN):
        j = tile_start + tl.arange(0, BN)
        target = _load_rows(
            target_ptr, start + tile_start, clip_rows - tile_start, stride_target, ROWS=BN, P=P, BLOCK_P=BLOCK_P
        )
        s = tl.dot(prediction, tl.trans(target), input_precision="ieee")
        is_negative = (i < clip_rows)[:, None] & (j < clip_rows)[None, :] & (i[:, None] != j[None, :])
        s = tl.where(is_negative, s, float("-inf"))
        if OVER_PREDICTIONS:
            swept_max = tl.load(row_max_ptr + start.to(tl.int64) + j, mask=j < clip_rows, other=0.0)
            swept_log_sum = tl.load(log_sum_ptr + start.to(tl.int64) + j, mask=j < clip_rows, other=0.0)
            g = tl.load(dloss_ptr + start.to(tl.int64) + j, mask=j < clip_rows, other=0.0) / max_dloss
            weight = tl.exp((s - swept_max[None, :]) - swept_log_sum[None, :]) * g[None, :]
        else:
            weight = tl.exp((s - row_max[:, None]) - log_sum[:, None])
        rounded = weight.to(target.dtype)
        total = tl.dot(rounded, target, total, input_precision="ieee")
        if target.dtype != tl.float32:
            total = tl.dot((weight - rounded.to(tl.float32)).to(target.dtype), target, total)
    diagonal = dloss * (1.0 - tl.exp(-tl.load(loss_ptr + row, mask=i < clip_rows, other=0.0)))
    own_target = _load_rows(
        target_ptr, start + first_row, clip_rows - first_row, stride_target, ROWS=BM, P=P, BLOCK_P=BLOCK_P
    ).to(tl.float32)
    col = tl.arange(0, BLOCK_P)
    tl.store(
        dprediction_ptr + row[:, None] * P + col[None, :],
        (total * factor[:, None] - own_target * diagonal[:, None]).to(dprediction_ptr.dtype.element_ty),
        mask=(i < clip_rows)[:, None] & (col < P)[None, :],
    )


# BM: rows per program. BN: rows per tile of the other operand. In fp32 forward and backward use the same tile, so that
# their products agree.
launches(
    "info_nce_forward",
    ("any", 256, 2, {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2}),
    ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 2}),
)
launches(
    "info_nce_backward",
    ("any", 256, 2, {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}),
    ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 1}),
)


def _launch(kernel: triton.JITFunction, cu_seqlens: Tensor, max_seqlen: int, **values: Any) -> None:
    """Launch a kernel with one program per clip and BM of its rows."""

    def grid(values: dict[str, Any]) -> tuple[int, int]:
        return cu_seqlens.shape[0] - 1, cdiv(max_seqlen, values["BM"])

    launch(kernel, grid, cu_seqlens=cu_seqlens, **values)


@triton_op("info_nce", outputs=("loss", "hit", "row_max", "log_sum"))
def forward(
    prediction: Tensor, target: Tensor, cu_seqlens: Tensor, max_seqlen: int, over: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute loss (N,) in fp32, hit (N,) bool, and lse as row_max and log_sum (N,) in fp32.

    Only the prediction gets a gradient.

    Args:
        prediction: (N, P) fp32, fp16 or bf16.
        target: (N, P) in the dtype of ``prediction``.
        cu_seqlens: (B + 1,) int32 first row of each clip.
        max_seqlen: Rows of the longest clip.
        over: "targets" or "predictions", the operand that the softmax runs over.
    """
    num_rows, width = prediction.shape
    prediction, target, cu_seqlens = unit_stride(prediction), unit_stride(target), cu_seqlens.contiguous()
    loss = torch.zeros(num_rows, dtype=torch.float32, device=prediction.device)  # rows past the last clip stay 0
    row_max, log_sum = torch.empty_like(loss), torch.empty_like(loss)
    hit = torch.zeros(num_rows, dtype=torch.bool, device=prediction.device)
    over_predictions = over == "predictions"
    query, key = (target, prediction) if over_predictions else (prediction, target)
    shared = {"row_max": row_max, "log_sum": log_sum, "hit": hit, "P": width}
    shared |= {"launches": "info_nce_forward", "like": prediction, "width": width}
    _launch(_loss, cu_seqlens, max_seqlen, query=query, key=key, loss=loss, HIT=not over_predictions, **shared)
    if over_predictions:
        _launch(_column_hit, cu_seqlens, max_seqlen, prediction=prediction, target=target, **shared)
    return loss, hit, row_max, log_sum


@forward.gradients_of("prediction")
def backward(
    dloss: Tensor,
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    max_seqlen: int,
    over: str,
) -> Tensor:
    """Gradient of prediction (N, P) in its dtype.

    ``dloss`` (N,) fp32 is the gradient of the loss; loss, row_max and log_sum come from ``forward``, and the other
    arguments are those of ``forward``.
    """
    width = prediction.shape[1]
    cu_seqlens = cu_seqlens.contiguous()
    dprediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    _launch(
        _gradient,
        cu_seqlens,
        max_seqlen,
        launches="info_nce_backward",
        like=prediction,
        width=width,
        dloss=dloss.contiguous(),
        prediction=unit_stride(prediction),
        target=unit_stride(target),
        loss=loss,
        row_max=row_max,
        log_sum=log_sum,
        dprediction=dprediction,
        P=width,
        OVER_PREDICTIONS=over == "predictions",
    )
    return clear_tail(dprediction, cu_seqlens)


WIDTHS = (256,)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    num_clips, clip_rows = 171, 384
    num_rows = num_clips * clip_rows
    joint = torch.randn(num_rows, 2 * width, dtype=dtype, device=device) / width**0.5  # products around 1
    inputs: dict[str, Any] = {
        "prediction": joint[:, width:],
        "target": torch.randn(num_rows, width, dtype=dtype, device=device),
        "cu_seqlens": torch.arange(num_clips + 1, dtype=torch.int32, device=device) * clip_rows,
        "max_seqlen": clip_rows,
    }
    loss, row_max, log_sum = (torch.full((num_rows,), value, device=device) for value in (6.0, 4.0, 2.5))
    for over in ("targets", "predictions"):
        yield f"forward over {over}", num_rows, partial(forward, over=over, **inputs)
        yield (
            f"backward over {over}",
            num_rows,
            partial(backward, dloss=loss, loss=loss, row_max=row_max, log_sum=log_sum, over=over, **inputs),
        )


def _inputs(draw: Draw, shape: tuple[Sequence[int], int, float | None]) -> dict[str, Any]:
    """Products around ``scale``. The prediction is half of the output of two heads, of which the other half is NaN.

    With a scale the values are rounded so that all products are exact in fp32. Otherwise the rounding of the large
    products of a peaked softmax differs between matrix multiplications by more than the policy allows the result.
    Without a scale, None, products are around 1.
    """
    clip_rows, width, scale = shape
    prediction = draw.parameters(sum(clip_rows), width)
    target = draw.parameters(sum(clip_rows), width, offset=draw.offset)
    factor = (scale or 1.0) / width**0.5
    if scale:
        prediction, target = (prediction * 16).round() / 16, (target * 16).round() / 16
        factor = 2.0 ** round(math.log2(factor))
    joint = torch.cat([torch.full_like(prediction, float("nan")), prediction * factor], dim=1).to(draw.dtype)
    return {
        "prediction": joint[:, width:],
        "target": target.to(draw.dtype),
        "cu_seqlens": draw.cu_seqlens(clip_rows),
        "max_seqlen": max(clip_rows, default=0),
    }


_CLIPS = ([1], [7], [5, 0, 1, 9, 5], [16, 32, 17], [0, 33], [70, 3])
_OVER: list[dict[str, Any]] = [{"over": "targets"}, {"over": "predictions"}]
_TILE = {"BM": 32, "BN": 16}  # small and unequal: short clips cross edges, and swapped sizes change the result


CASE = OpCase(
    name="info_nce",
    make=_inputs,
    shapes=[(clip_rows, *size) for clip_rows in _CLIPS for size in ((20, None), (256, 16.0))],
    empty=[([0], 16, None), ([0, 0], 16, None), ([], 16, None)],
    traced=[([5, 0, 20], 24, 1.0), ([5, 0, 20, 3], 24, 1.0)],
    differentiable=("prediction",),
    dot=True,
    rows=("prediction", "target"),
    vectors=("cu_seqlens",),
    variants=_OVER,
    traced_variants=_OVER,
    offsets=(0.0,),  # with an offset rounding decides some hits: the operation's own tests
    unspecified=("max_seqlen",),
    launches={"info_nce_forward": _TILE, "info_nce_backward": _TILE},
    mutants=(
        Mutant(
            "edge",
            's = tl.where((j < clip_rows)[None, :], s, float("-inf"))',
            's = tl.where((j <= clip_rows)[None, :], s, float("-inf"))',
        ),
        Mutant(
            "last row",
            "mask=(i < clip_rows)[:, None] & (col < P)[None, :],\n    )",
            "mask=(i < clip_rows - 1)[:, None] & (col < P)[None, :],\n    )",
        ),
        Mutant(
            "fp32 cast",
            "            total = tl.dot((weight - rounded.to(tl.float32)).to(target.dtype), target, total)",
            "            total += 0.0",
        ),
        Mutant(
            "hits",
            "(own_logit > max_before) & (own_logit >= max_after), mask=i < clip_rows",
            "(own_logit >= max_before) & (own_logit >= max_after), mask=i < clip_rows",
        ),
    ),
)
