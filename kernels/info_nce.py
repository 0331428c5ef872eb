"""InfoNCE inside each clip, as attention with an online softmax: no (M, M) logits in memory.

    over "targets":      S_ij = <prediction_i, target_j>   hit_i = (argmax_j S_ij == i)
    over "predictions":  S_ij = <target_i, prediction_j>   hit_j = (argmax_i S_ij - lse_i == j)    SSAST's transpose
    lse_i = log sum_j exp S_ij,  loss_i = lse_i - S_ii,  q_ij = exp(S_ij - lse_i),  i and j over the rows of one clip
    over "targets":      d prediction_i = g_i (sum_{j != i} q_ij target_j - (1 - q_ii) target_i)
    over "predictions":  d prediction_j = sum_{i != j} g_i q_ij target_i - g_j (1 - q_jj) target_j

Letters: B clips, M rows of the longest, N packed rows, P values a row, BM x BN tile of S. One program works on BM rows
of one clip and sweeps the other operand in tiles of BN. Fused: products, softmax, own logit, hit; in the backward
products again, softmax, its product with the targets and the scaling by g. Ties go to the first index.

The gradient is not kept from the forward: stored in half precision and then scaled by g it would be rounded twice. The
sweep that computes it is the same in either place. In half precision the weights q enter the product with the targets
in two parts, rounded and remainder: rounded alone they would cost as much as rounding the result, and far more where
the targets share an offset. The diagonal, whose weight is by far the largest, is added in fp32. lse is kept as its two
parts, max and log sum exp(S - max): their sum loses the digits that large products share. Saved: the inputs, loss and
these parts. Moved: forward 2 (N, P) tensors, backward 3, and in each the swept operand cdiv(M, BM) times, from the L2
cache (unfused: N * M logits in fp32 as well, several times).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clear_padding import clear_tail
from .common.launch import block, launch, options, unit_stride


@triton.jit
def _load_rows(x_ptr, first, count, stride, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """ROWS rows from number ``first``, of which ``count`` are real: (ROWS, BLOCK_P), zeros outside."""
    index, col = tl.arange(0, ROWS), tl.arange(0, BLOCK_P)
    row = first.to(tl.int64) + index
    inside = (index < count)[:, None] & (col < P)[None, :]
    return tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _loss(
    query_ptr,
    key_ptr,
    cu_ptr,
    loss_ptr,
    top_ptr,
    log_total_ptr,
    hit_ptr,
    stride_query,
    stride_key,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HIT: tl.constexpr,
):
    """Loss and parts of lse of the rows of S = query @ key^T; with HIT also whether S_ii is row i's first maximum."""
    start = tl.load(cu_ptr + tl.program_id(0))
    length = tl.load(cu_ptr + tl.program_id(0) + 1) - start
    first = tl.program_id(1) * BM
    if first >= length:
        return
    i = first + tl.arange(0, BM)
    query = _load_rows(query_ptr, start + first, length - first, stride_query, BM, P, BLOCK_P)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)  # sum of exp(S - top)
    own = tl.zeros((BM,), tl.float32)
    before = tl.full((BM,), float("-inf"), tl.float32)
    after = tl.full((BM,), float("-inf"), tl.float32)
    for begin in range(0, length, BN):
        j = begin + tl.arange(0, BN)
        key = _load_rows(key_ptr, start + begin, length - begin, stride_key, BN, P, BLOCK_P)
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
        own += tl.sum(tl.where(i[:, None] == j[None, :], s, 0.0), 1)
        s = tl.where((j < length)[None, :], s, float("-inf"))
        if HIT:
            before = tl.maximum(before, tl.max(tl.where(j[None, :] < i[:, None], s, float("-inf")), 1))
            after = tl.maximum(after, tl.max(tl.where(j[None, :] > i[:, None], s, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # products so far that all overflowed to -inf
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new_top
    row = start.to(tl.int64) + i
    log_total = tl.log(total)
    tl.store(top_ptr + row, top, mask=i < length)
    tl.store(log_total_ptr + row, log_total, mask=i < length)
    tl.store(loss_ptr + row, (top - own) + log_total, mask=i < length)
    if HIT:
        tl.store(hit_ptr + row, (own > before) & (own >= after), mask=i < length)


@triton.jit
def _column_hit(
    prediction_ptr,
    target_ptr,
    cu_ptr,
    top_ptr,
    log_total_ptr,
    hit_ptr,
    stride_prediction,
    stride_target,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """For each prediction, whether its own target is the first maximum of its column of S - lse."""
    start = tl.load(cu_ptr + tl.program_id(0))
    length = tl.load(cu_ptr + tl.program_id(0) + 1) - start
    first = tl.program_id(1) * BM
    if first >= length:
        return
    j = first + tl.arange(0, BM)
    prediction = _load_rows(prediction_ptr, start + first, length - first, stride_prediction, BM, P, BLOCK_P)
    own = tl.zeros((BM,), tl.float32)
    before = tl.full((BM,), float("-inf"), tl.float32)
    after = tl.full((BM,), float("-inf"), tl.float32)
    for begin in range(0, length, BN):
        i = begin + tl.arange(0, BN)
        target = _load_rows(target_ptr, start + begin, length - begin, stride_target, BN, P, BLOCK_P)
        top = tl.load(top_ptr + start.to(tl.int64) + i, mask=i < length, other=0.0)
        log_total = tl.load(log_total_ptr + start.to(tl.int64) + i, mask=i < length, other=0.0)
        s = (tl.dot(prediction, tl.trans(target), input_precision="ieee") - top[None, :]) - log_total[None, :]
        own += tl.sum(tl.where(i[None, :] == j[:, None], s, 0.0), 1)
        s = tl.where((i < length)[None, :], s, float("-inf"))
        before = tl.maximum(before, tl.max(tl.where(i[None, :] < j[:, None], s, float("-inf")), 1))
        after = tl.maximum(after, tl.max(tl.where(i[None, :] > j[:, None], s, float("-inf")), 1))
    tl.store(hit_ptr + start.to(tl.int64) + j, (own > before) & (own >= after), mask=j < length)


@triton.jit
def _gradient(
    dloss_ptr,
    prediction_ptr,
    target_ptr,
    cu_ptr,
    loss_ptr,
    top_ptr,
    log_total_ptr,
    dprediction_ptr,
    stride_prediction,
    stride_target,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of the gradient; with COLUMNS (over "predictions") lse and g belong to the swept targets."""
    start = tl.load(cu_ptr + tl.program_id(0))
    length = tl.load(cu_ptr + tl.program_id(0) + 1) - start
    first = tl.program_id(1) * BM
    if first >= length:
        return
    i = first + tl.arange(0, BM)
    row = start.to(tl.int64) + i
    prediction = _load_rows(prediction_ptr, start + first, length - first, stride_prediction, BM, P, BLOCK_P)
    dloss = tl.load(dloss_ptr + row, mask=i < length, other=0.0)
    # Weights go into products in half precision: g, often far below what fp16 holds, enters relative to the clip's
    # largest, or (a factor of the whole row) afterwards.
    factor = dloss
    if COLUMNS:
        largest = 0.0
        for begin in range(0, length, BN):
            j = begin + tl.arange(0, BN)
            g = tl.load(dloss_ptr + start.to(tl.int64) + j, mask=j < length, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(g), 0))
        largest = tl.where(largest > 0.0, largest, 1.0)
        factor = tl.zeros((BM,), tl.float32) + largest
    else:
        top = tl.load(top_ptr + row, mask=i < length, other=0.0)
        log_total = tl.load(log_total_ptr + row, mask=i < length, other=0.0)
    total = tl.zeros((BM, BLOCK_P), tl.float32)
    for begin in range(0, length, BN):
        j = begin + tl.arange(0, BN)
        target = _load_rows(target_ptr, start + begin, length - begin, stride_target, BN, P, BLOCK_P)
        s = tl.dot(prediction, tl.trans(target), input_precision="ieee")
        counts = (i < length)[:, None] & (j < length)[None, :] & (i[:, None] != j[None, :])
        s = tl.where(counts, s, float("-inf"))
        if COLUMNS:
            other_top = tl.load(top_ptr + start.to(tl.int64) + j, mask=j < length, other=0.0)
            other_log_total = tl.load(log_total_ptr + start.to(tl.int64) + j, mask=j < length, other=0.0)
            g = tl.load(dloss_ptr + start.to(tl.int64) + j, mask=j < length, other=0.0) / largest
            weight = tl.exp((s - other_top[None, :]) - other_log_total[None, :]) * g[None, :]
        else:
            weight = tl.exp((s - top[:, None]) - log_total[:, None])
        rounded = weight.to(target.dtype)
        total = tl.dot(rounded, target, total, input_precision="ieee")
        if target.dtype != tl.float32:
            total = tl.dot((weight - rounded.to(tl.float32)).to(target.dtype), target, total)
    diagonal = dloss * (1.0 - tl.exp(-tl.load(loss_ptr + row, mask=i < length, other=0.0)))
    own = _load_rows(target_ptr, start + first, length - first, stride_target, BM, P, BLOCK_P).to(tl.float32)
    col = tl.arange(0, BLOCK_P)
    tl.store(
        dprediction_ptr + row[:, None] * P + col[None, :],
        (total * factor[:, None] - own * diagonal[:, None]).to(dprediction_ptr.dtype.element_ty),
        mask=(i < length)[:, None] & (col < P)[None, :],
    )


def forward(
    prediction: Tensor, target: Tensor, cu_seqlens: Tensor, max_seqlen: int, over: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (N,) in fp32, hit (N,) bool, and the parts of lse in fp32: top = max_j S_ij, log sum_j exp(S_ij - top)."""
    rows, width = prediction.shape
    prediction, target, cu_seqlens = unit_stride(prediction), unit_stride(target), cu_seqlens.contiguous()
    loss = torch.zeros(rows, dtype=torch.float32, device=prediction.device)  # rows past the last clip stay 0
    top, log_total = torch.empty_like(loss), torch.empty_like(loss)
    hit = torch.zeros(rows, dtype=torch.bool, device=prediction.device)
    chosen = options("info_nce_forward", prediction, width)
    grid = cu_seqlens.shape[0] - 1, triton.cdiv(max_seqlen, chosen["BM"])
    shape = {"P": width, "BLOCK_P": block(width), **chosen}
    columns = over == "predictions"
    query, key = (target, prediction) if columns else (prediction, target)
    outputs = loss, top, log_total, hit
    launch(_loss, grid, query, key, cu_seqlens, *outputs, query.stride(0), key.stride(0), HIT=not columns, **shape)
    if columns:
        strides = prediction.stride(0), target.stride(0)
        launch(_column_hit, grid, prediction, target, cu_seqlens, top, log_total, hit, *strides, **shape)
    return loss, hit, top, log_total


def backward(
    dloss: Tensor,
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss: Tensor,
    top: Tensor,
    log_total: Tensor,
    max_seqlen: int,
    over: str,
) -> Tensor:
    """Gradient of prediction (N, P) in its dtype, from dloss (N,) in fp32."""
    width = prediction.shape[1]
    prediction, target, cu_seqlens = unit_stride(prediction), unit_stride(target), cu_seqlens.contiguous()
    dprediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    chosen = options("info_nce_backward", prediction, width)
    launch(
        _gradient,
        (cu_seqlens.shape[0] - 1, triton.cdiv(max_seqlen, chosen["BM"])),
        dloss.contiguous(),
        prediction,
        target,
        cu_seqlens,
        loss,
        top,
        log_total,
        dprediction,
        prediction.stride(0),
        target.stride(0),
        P=width,
        BLOCK_P=block(width),
        COLUMNS=over == "predictions",
        **chosen,
    )
    return clear_tail(dprediction, cu_seqlens)


forward_op = torch.library.custom_op("mae_ast_fast::info_nce", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::info_nce_backward", backward, mutates_args=())


@forward_op.register_fake
def _(prediction, target, cu_seqlens, max_seqlen, over):
    loss = prediction.new_empty(prediction.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss), torch.empty_like(loss)


@backward_op.register_fake
def _(dloss, prediction, target, cu_seqlens, loss, top, log_total, max_seqlen, over):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    prediction, target, cu_seqlens, ctx.max_seqlen, ctx.over = inputs
    loss, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(prediction, target, cu_seqlens, loss, *others[1:])


def _gradients(ctx, dloss, *_):
    return backward_op(dloss, *ctx.saved_tensors, ctx.max_seqlen, ctx.over), None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)


def info_nce(
    prediction: Tensor, target: Tensor, cu_seqlens: Tensor, max_seqlen: int, over: str
) -> tuple[Tensor, Tensor]:
    """loss (N,) in fp32 and hit (N,) bool; the target gets no gradient."""
    return forward_op(prediction, target, cu_seqlens, max_seqlen, over)[:2]


WIDTHS = (256,)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    clips, longest = 171, 384
    rows = clips * longest
    joint = torch.randn(rows, 2 * width, dtype=dtype, device=device) / width**0.5  # products around 1
    prediction, target = joint[:, width:], torch.randn(rows, width, dtype=dtype, device=device)
    loss, top, log_total = (torch.full((rows,), value, device=device) for value in (6.0, 4.0, 2.5))
    cu = torch.arange(clips + 1, dtype=torch.int32, device=device) * longest
    for over in ("targets", "predictions"):
        yield f"forward over {over}", rows, lambda o=over: forward(prediction, target, cu, longest, o)
        yield (
            f"backward over {over}",
            rows,
            lambda o=over: backward(loss, prediction, target, cu, loss, top, log_total, longest, o),
        )
