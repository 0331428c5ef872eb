"""o = softmax(q k^T * Dh ** -0.5) v inside each clip of at most 128 rows: the encoder's attention over visible tokens.

    S = scale * q k^T,  P = softmax(S) over the keys of the clip,  o = M v,  M = keep * kept_scale * P
    dv = M^T do,  dM = do v^T,  dP = keep * kept_scale * dM,  dS = P * (dP - rowsum(dP * P))
    dq = scale * dS k,  dk = scale * dS^T q                  keep from Philox, see common/dropout.py

Row, head and column of the keep mask: the packed row of the query, the head, and the key's index within its clip.

Letters: N packed rows, B clips, H heads of D values, qkv (N, 3, H, D). One program per clip and head: all its keys fit
into one tile, so a row's softmax needs one pass. Only qkv is saved for the backward, which recomputes P. A backward
program holds K, V and their fp32 gradients, loops over blocks of BLOCK_M queries and writes into dqkv (N, 3, H, D)
itself, which avoids concatenating dq, dk and dv. Memory traffic in (N, H D) tensors: forward 4, backward 7
(FlashAttention-2 and a concatenation: 19). Softmax and all sums are fp32; P, M and dS are rounded to the input dtype as
operands of dots.
"""

from __future__ import annotations

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
from .common.dropout import mask_words, threshold_and_scale
from .common.launch import launch
from .common.triton_op import triton_op


@triton.jit
def _keep_mask(seed, row, head, dropout_site, threshold, COLUMNS: tl.constexpr):
    """The mask of dropout.keep_mask, for the layouts of dots.

    In these layouts the eight elements of one call of Philox belong to four threads. The eight decisions of the call
    are first packed into one number, so that one number crosses threads instead of eight values.
    """
    words = mask_words(seed, row, head=head, dropout_site=dropout_site, COLUMNS=COLUMNS)
    packed = tl.zeros_like(words[0]).to(tl.int32)
    for index in tl.static_range(4):
        packed += ((words[index] & 0xFFFF) >= threshold).to(tl.int32) << (2 * index)
        packed += ((words[index] >> 16) >= threshold).to(tl.int32) << (2 * index + 1)
    packed = tl.broadcast_to(packed[:, :, None], (row.shape[0], COLUMNS // 8, 8))
    bit = tl.arange(0, COLUMNS) % 8
    return ((tl.reshape(packed, (row.shape[0], COLUMNS)) >> bit[None, :]) & 1) == 1


@triton.jit
def _exponentials(q, k, scale, clip_rows, BLOCK_S: tl.constexpr):
    """exp(S - rowmax S) (BLOCK_M, BLOCK_S), 0 past the clip's last key, and its row sums (BLOCK_M,)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
    s = tl.where((tl.arange(0, BLOCK_S) < clip_rows)[None, :], s, float("-inf"))
    e = tl.exp2(s - tl.max(s, 1)[:, None])
    return e, tl.sum(e, 1)


@triton.jit(do_not_specialize=["dropout_site", "threshold"])
def _forward(
    qkv_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    o_ptr,
    stride_qkv,
    dropout_site,
    threshold,
    scale,
    kept_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + clip).to(tl.int64)
    clip_rows = (tl.load(cu_seqlens_ptr + clip + 1) - start).to(tl.int32)
    col = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_S)
    q_ptr = qkv_ptr + head * D + col[None, :]
    has_key = (key < clip_rows)[:, None] & (col < D)[None, :]
    k_ptr = q_ptr + H * D + (start + key)[:, None] * stride_qkv
    k = tl.load(k_ptr, mask=has_key, other=0.0)  # (BLOCK_S, BLOCK_D)
    v = tl.load(k_ptr + H * D, mask=has_key, other=0.0)
    STEP: tl.constexpr = min(BLOCK_M, BLOCK_S)  # queries
    for first_query in range(0, clip_rows, STEP):
        query = first_query + tl.arange(0, STEP)
        row = start + query
        inside = (query < clip_rows)[:, None] & (col < D)[None, :]
        q = tl.load(q_ptr + row[:, None] * stride_qkv, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
        e, total = _exponentials(q, k, scale, clip_rows, BLOCK_S=BLOCK_S)
        if DROPOUT:
            keep = _keep_mask(
                tl.load(seed_ptr), row, head=head, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_S
            )
            e = tl.where(keep, e, 0.0)
        o = tl.dot(e.to(v.dtype), v, input_precision="ieee") * (kept_scale / total)[:, None]
        o_row = o_ptr + row[:, None] * (H * D) + head * D + col[None, :]
        tl.store(o_row, o.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["dropout_site", "threshold"])
def _backward(
    do_ptr,
    qkv_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    dqkv_ptr,
    stride_do,
    stride_qkv,
    dropout_site,
    threshold,
    scale,
    kept_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64) // H
    head = tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + clip).to(tl.int64)
    clip_rows = (tl.load(cu_seqlens_ptr + clip + 1) - start).to(tl.int32)
    col = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_S)
    q_ptr = qkv_ptr + head * D + col[None, :]
    dq_ptr = dqkv_ptr + head * D + col[None, :]
    has_key = (key < clip_rows)[:, None] & (col < D)[None, :]
    k_ptr = q_ptr + H * D + (start + key)[:, None] * stride_qkv
    k = tl.load(k_ptr, mask=has_key, other=0.0)  # (BLOCK_S, BLOCK_D)
    v = tl.load(k_ptr + H * D, mask=has_key, other=0.0)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    STEP: tl.constexpr = min(BLOCK_M, BLOCK_S)  # queries
    for first_query in range(0, clip_rows, STEP):
        query = first_query + tl.arange(0, STEP)
        row = start + query
        inside = (query < clip_rows)[:, None] & (col < D)[None, :]
        q = tl.load(q_ptr + row[:, None] * stride_qkv, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
        do = tl.load(do_ptr + row[:, None] * stride_do + head * D + col[None, :], mask=inside, other=0.0)
        e, total = _exponentials(q, k, scale, clip_rows, BLOCK_S=BLOCK_S)
        p = e / total[:, None]
        m = p
        if DROPOUT:
            keep = _keep_mask(
                tl.load(seed_ptr), row, head=head, dropout_site=dropout_site, threshold=threshold, COLUMNS=BLOCK_S
            )
            m = tl.where(keep, p * kept_scale, 0.0)
        dv = tl.dot(tl.trans(m.to(do.dtype)), do, dv, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        tl.store(dq_ptr + row[:, None] * (3 * H * D), dq.to(dqkv_ptr.dtype.element_ty), mask=inside)
    dk_ptr = dq_ptr + H * D + (start + key)[:, None] * (3 * H * D)
    tl.store(dk_ptr, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=has_key)
    tl.store(dk_ptr + H * D, dv.to(dqkv_ptr.dtype.element_ty), mask=has_key)


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` itself if each of its rows is dense in memory, otherwise a contiguous copy."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


# BLOCK_M: queries per step. A program holds all keys of one clip and head.
launches(
    "short_attention_forward",
    ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
    ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
)
launches(
    "short_attention_backward",
    ("sm_100", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 2}),
    ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
    ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
)


@triton_op("short_attention", outputs=("o",))
def forward(
    qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, dropout: float, dropout_site: int
) -> Tensor:
    """Compute o (N, H, D) in the dtype of ``qkv``.

    Args:
        qkv: (N, 3, H, D) fp32, fp16 or bf16, D at most 128.
        cu_seqlens: (B + 1,) int32 first row of each clip.
        seed: (1,) int64; None is allowed with dropout 0.
        max_seqlen: Rows of the longest clip, at most 128.
        dropout: Rate in [0, 1) on the attention probabilities.
        dropout_site: Number of this dropout in the model.
    """
    num_rows, _, heads, width = qkv.shape
    cu_seqlens = cu_seqlens.contiguous()
    o = torch.empty(num_rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    threshold, kept_scale = threshold_and_scale(dropout)
    launch(
        _forward,
        ((cu_seqlens.shape[0] - 1) * heads,),
        launches="short_attention_forward",
        like=qkv,
        width=width,
        qkv=_dense_rows(qkv),
        cu_seqlens=cu_seqlens,
        seed=seed,
        o=o,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=width**-0.5,
        kept_scale=kept_scale,
        H=heads,
        S=max_seqlen,
        D=width,
        DROPOUT=dropout > 0.0,
    )
    return clear_tail(o, cu_seqlens)


@forward.gradients_of("qkv")
def backward(
    do: Tensor, qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, dropout: float, dropout_site: int
) -> Tensor:
    """Gradient of qkv (N, 3, H, D), contiguous; ``do`` (N, H, D) is that of o, the rest as in ``forward``."""
    heads, width = qkv.shape[2:]
    cu_seqlens = cu_seqlens.contiguous()
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    threshold, kept_scale = threshold_and_scale(dropout)
    launch(
        _backward,
        ((cu_seqlens.shape[0] - 1) * heads,),
        launches="short_attention_backward",
        like=qkv,
        width=width,
        do=_dense_rows(do),
        qkv=_dense_rows(qkv),
        cu_seqlens=cu_seqlens,
        seed=seed,
        dqkv=dqkv,
        dropout_site=dropout_site,
        threshold=threshold,
        scale=width**-0.5,
        kept_scale=kept_scale,
        H=heads,
        S=max_seqlen,
        D=width,
        DROPOUT=dropout > 0.0,
    )
    return clear_tail(dqkv, cu_seqlens)


WIDTHS = (64,)  # head width of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    heads = 12
    for clip_rows in (64, 128):
        num_clips = 32768 // clip_rows
        qkv = torch.randn(num_clips * clip_rows, 3, heads, width, dtype=dtype, device=device)
        do = torch.randn(num_clips * clip_rows, heads, width, dtype=dtype, device=device)
        inputs: dict[str, Any] = {
            "qkv": qkv,
            "cu_seqlens": torch.arange(num_clips + 1, dtype=torch.int32, device=device) * clip_rows,
            "seed": torch.ones(1, dtype=torch.int64, device=device),
            "max_seqlen": clip_rows,
        }
        for dropout in (0.0, 0.1):
            label = f"{clip_rows}{' dropout' if dropout else ''}"
            inputs |= {"dropout": dropout, "dropout_site": 1}
            yield f"forward {label}", qkv.shape[0], partial(forward, **inputs)
            yield f"backward {label}", qkv.shape[0], partial(backward, do, **inputs)


def _inputs(draw: Draw, shape: tuple[Sequence[int], int, int]) -> dict[str, Any]:
    """q and k around 0, v around the draw's offset, where the row sums of the backward cancel."""
    clip_rows, heads, width = shape
    qkv = draw.parameters(sum(clip_rows), 3, heads, width)
    qkv[:, 2] += draw.offset
    return {
        "qkv": qkv.to(draw.dtype),
        "cu_seqlens": draw.cu_seqlens(clip_rows),
        "max_seqlen": max(clip_rows, default=0),
    }


CASE = OpCase(
    name="short_attention",
    make=_inputs,
    shapes=[
        ([1], 1, 16),
        ([3, 0, 1, 40], 2, 20),
        ([31, 32, 33, 17], 1, 64),
        ([0, 65], 3, 5),
        ([128, 2], 1, 64),
        ([127], 1, 128),
    ],
    empty=[([], 2, 16), ([0], 2, 16), ([0, 0, 0], 2, 16)],
    traced=[([4, 0, 7], 1, 8), ([3, 0, 7, 2], 1, 8)],
    differentiable=("qkv",),
    dot=True,
    vectors=("cu_seqlens",),
    traced_variants=[{}, {"dropout": 0.2, "site": 3}],
    specification="reference.attention",
    unspecified=("max_seqlen",),
    mutants=(
        Mutant("edge", "(tl.arange(0, BLOCK_S) < clip_rows)[None, :]", "(tl.arange(0, BLOCK_S) <= clip_rows)[None, :]"),
        Mutant(
            "last row",
            "tl.store(o_row, o.to(o_ptr.dtype.element_ty), mask=inside)",
            "tl.store(o_row, o.to(o_ptr.dtype.element_ty), mask=inside & (query < clip_rows - 1)[:, None])",
        ),
        Mutant("fp32 cast", "    p = e / total[:, None]", "    p = (e / total[:, None]).to(q.dtype).to(tl.float32)"),
    ),
)
