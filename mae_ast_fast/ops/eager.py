"""impl="torch": operations of reference.py in plain PyTorch, where they can be faster than the specification.

- Clips are computed together: padded to the longest one, and in groups of similar lengths where padding would waste
  much (packing.py). Nothing is read back from a GPU.
- Dropout on a CPU decides an element by 16 random bits (dropout.py).
- Rows are restored by ``index_select``, whose gradient is faster than that of indexing.
- ``feed_forward`` can keep less for the backward.

Operations that are missing here are as fast in reference.py. The letters are those of reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dropout import drop
from .packing import PaddedView, padded_views, rows_of_clips, similar_clips


def scatter_tokens(
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    *,
    token: Tensor,
    inverse: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``reference.scatter_tokens``."""
    positions = table[token].to(visible.dtype)
    mask_token = mask_token.to(visible.dtype)
    if visible.shape[0] == 0:  # no clip of the batch has a visible token: nothing to look up
        x = mask_token + positions
    else:
        restored = visible.index_select(0, inverse.clamp(min=0))  # the gradient of indexing would sort the rows
        x = torch.where((inverse < 0)[:, None], mask_token, restored) + positions
    if weight is not None:
        assert bias is not None
        x = reference.layer_norm(x, weight, bias)
    return drop(x, dropout)


def add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``reference.add_layer_norm``."""
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    return reference.add_layer_norm(drop(branch, dropout), residual, weight, bias)


def bias_gelu(x: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """``reference.bias_gelu``."""
    return drop(reference.bias_gelu(x, bias), dropout)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *, dropout: float = 0.0, recompute: bool = False
) -> Tensor:
    """``reference.feed_forward``.

    With ``recompute`` (dropout is not applied then), only x W1^T is kept for the backward. Values and gradients are the
    same.
    """
    h = F.linear(x, w1.to(x.dtype))
    if recompute:
        return _GeluLinear.apply(h, b1, w2.to(x.dtype))
    return F.linear(bias_gelu(h, b1, dropout), w2.to(x.dtype))


class _GeluLinear(torch.autograd.Function):
    """linear(bias_gelu(h, b1), w2) that saves only its inputs; the backward computes what autograd would."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        ctx.save_for_backward(h, b1, w2)
        return F.linear(reference.bias_gelu(h, b1), w2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, b1, w2 = ctx.saved_tensors
        z = h + b1.to(h.dtype)
        dw2 = dy.T @ F.gelu(z)
        dh = torch.ops.aten.gelu_backward(dy @ w2, z)
        return dh, dh.sum(0).to(b1.dtype), dw2


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float = 0.0) -> Tensor:
    """``reference.attention``, with clips padded to ``max_seqlen`` rows; every row belongs to a clip."""
    return cross_attention(
        qkv[:, 0],
        qkv[:, 1:],
        cu_q=cu_seqlens,
        max_q=max_seqlen,
        cu_kv=cu_seqlens,
        max_kv=max_seqlen,
        dropout=dropout,
    )


def cross_attention(
    q: Tensor,
    kv: Tensor,
    *,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float = 0.0,
    has_padding_rows: bool = False,
) -> Tensor:
    """``reference.cross_attention``, with clips padded to ``max_q`` query rows and ``max_kv`` rows.

    With ``has_padding_rows`` rows may lie past the last clip. Their results are copies of some row.
    """
    pad_q, pad_kv = padded_views(
        cu_q=cu_q,
        max_q=max_q,
        num_q=q.shape[0],
        cu_kv=cu_kv,
        max_kv=max_kv,
        num_kv=kv.shape[0],
        has_padding_rows=has_padding_rows,
    )
    q = pad_q.pad(q).transpose(1, 2)  # (B, H, S, Dh)
    k, v = pad_kv.pad(kv).permute(2, 0, 3, 1, 4)
    scores = reference.widen((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    scores = scores.masked_fill(~pad_kv.key_valid[:, None, None, :], float("-inf"))
    probabilities = drop(scores.softmax(-1).to(v.dtype), dropout)
    return pad_q.unpad((probabilities @ v).transpose(1, 2))


def info_nce(
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    over: str = "targets",
    has_padding_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """``reference.info_nce``.

    Args:
        prediction: (N, P) packed rows.
        target: (N, P).
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: Rows of the longest clip.
        over: What the softmax runs over, "targets" or "predictions".
        has_padding_rows: Whether rows may lie past ``cu_seqlens[-1]``. Their results are undefined, even NaN.
    """
    groups = similar_clips(cu_seqlens, max_seqlen, prediction.shape[0])
    if not groups:
        padding = PaddedView(cu_seqlens, max_seqlen, prediction.shape[0], has_padding_rows=has_padding_rows)
        return _padded_info_nce(prediction, target, padding, over)
    row_indices, losses, hits = [], [], []
    for clips in groups:
        rows, group_cu_seqlens, longest = rows_of_clips(cu_seqlens, clips)
        padding = PaddedView(group_cu_seqlens, longest, len(rows))
        loss, hit = _padded_info_nce(prediction[rows], target[rows], padding, over)
        row_indices.append(rows)
        losses.append(loss)
        hits.append(hit)
    order = torch.cat(row_indices).argsort()
    return torch.cat(losses)[order], torch.cat(hits)[order]


def _padded_info_nce(prediction: Tensor, target: Tensor, padding: PaddedView, over: str) -> tuple[Tensor, Tensor]:
    """``info_nce`` of clips that are padded to one length."""
    padded_prediction = padding.pad(reference.widen(prediction))
    padded_target = padding.pad(reference.widen(target))
    if over == "predictions":
        logits = padded_target @ padded_prediction.transpose(1, 2)
    else:
        logits = padded_prediction @ padded_target.transpose(1, 2)
    logits = logits.masked_fill(~padding.valid[:, None, :], float("-inf"))
    # -inf in the padded rows of an empty clip: rows of clips are picked before the subtraction, which would give NaN.
    log_sum = logits.logsumexp(2)
    loss = padding.unpad(log_sum) - padding.unpad(logits.diagonal(dim1=1, dim2=2))
    scores = logits.detach()
    if over == "predictions":
        scores = scores - log_sum.detach()[:, :, None]
        scores = scores.masked_fill(~padding.valid[:, :, None], float("-inf")).transpose(1, 2)
    own = torch.arange(padding.length, device=logits.device)
    return loss, padding.unpad(scores.argmax(2)) == padding.unpad(own)
