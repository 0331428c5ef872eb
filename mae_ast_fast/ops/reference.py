"""The specification: every operation of the model in plain PyTorch, differentiable, on any device and dtype.

The functions take the same arguments as those of functional.py, without the ones that choose an implementation.

Letters: B clips, T frames, F mel bins, kt x kf patch of P = kt * kf values, L tokens per clip, N packed rows of all
clips, D width, H heads of Dh values. Rows are packed clip by clip (see packing.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop
from .packing import PaddedView, padded_views, rows_of_clips, similar_clips


def patchify(log_mel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut (B, T, F) into (B, L, P) patches; frames after the last whole patch are dropped.

    Token index = time block * (F // kf) + frequency block; inside a patch, index = t * kf + f.
    """
    kt, kf = patch_size
    batch, num_frames, num_mel_bins = log_mel.shape
    grid_t, grid_f = num_frames // kt, num_mel_bins // kf
    blocks = log_mel[:, : grid_t * kt].reshape(batch, grid_t, kt, grid_f, kf)
    return blocks.transpose(2, 3).reshape(batch, grid_t * grid_f, kt * kf)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], num_mel_bins: int) -> Tensor:
    """Inverse of ``patchify``: (B, L, P) back to (B, T, F), T a multiple of kt."""
    kt, kf = patch_size
    batch, num_tokens, _ = patches.shape
    grid_f = num_mel_bins // kf
    grid_t = num_tokens // grid_f
    blocks = patches.reshape(batch, grid_t, grid_f, kt, kf)
    return blocks.transpose(2, 3).reshape(batch, grid_t * kt, num_mel_bins)


def gather_patches(
    features: Tensor,
    mean: Tensor,
    scale: Tensor,
    *,
    clip: Tensor,
    token: Tensor,
    patch_size: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalised patches of packed rows (N, P): (x - mean) * scale in fp32 or wider, then cast to ``dtype``.

    Args:
        features: (B, T, F).
        mean: One element.
        scale: One element.
        clip: (N,) int64, clip of each row.
        token: (N,) int64, token of each row within its clip; see ``patchify``.
        patch_size: (kt, kf), frames and mel bins of a patch.
        dtype: Floating dtype of the result. None: the dtype of ``features``.
    """
    patches = patchify(features, patch_size)[clip, token]
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    return ((patches - mean.to(patches.dtype)) * scale.to(patches.dtype)).to(dtype or features.dtype)


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
    """Input of the decoder (N, D): visible tokens restored to their positions, the mask token at all others.

    Args:
        visible: (Nv, D) encoded visible tokens.
        mask_token: (D,).
        table: (tokens, D) positions, which are added.
        token: (N,) int64 index of each row in ``table``.
        inverse: (N,) int64 row of ``visible`` to put here, -1 for the mask token.
        weight: (D,) weight of a LayerNorm over the sum. None: no LayerNorm.
        bias: (D,) bias of that LayerNorm; given exactly when ``weight`` is.
        dropout: Rate on the result, in [0, 1).
    """
    positions = table[token].to(visible.dtype)
    mask_token = mask_token.to(visible.dtype)
    if visible.shape[0] == 0:  # no clip of the batch has a visible token: nothing to look up
        x = mask_token + positions
    else:
        restored = visible.index_select(0, inverse.clamp(min=0))  # the gradient of indexing would sort the rows
        x = torch.where((inverse < 0)[:, None], mask_token, restored) + positions
    if weight is not None:
        assert bias is not None
        x = layer_norm(x, weight, bias)
    return drop(x, dropout)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension with fp32 statistics and affine; returns the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """LayerNorm(residual + dropout(branch + branch_bias)) of rows (N, D): the post-norm residual connection."""
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    return layer_norm(residual + drop(branch, dropout), weight, bias)


def bias_gelu(x: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(GELU(x + bias)) with the exact (erf) GELU."""
    return drop(F.gelu(x + bias.to(x.dtype)), dropout)


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool = False) -> Tensor:
    """Mean squared error of each row (N,), fp32 or wider, of ``prediction`` and ``target`` (N, P).

    With ``norm_pix_loss`` each target patch is first normalised by its own mean and unbiased variance (eps 1e-6), as
    in the public MAE code (He et al. 2022).
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.to(dtype)
    if norm_pix_loss:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(1)


def info_nce(
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    over: str = "targets",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each row against the rows of its own clip (paper, equation 1), without temperature or normalisation.

    over="targets" (MAE-AST): loss_i = -log softmax_j(<prediction_i, target_j>)[i], j over the rows of the same clip.
    over="predictions" (SSAST, the transpose): loss_i = -log softmax_j(<target_i, prediction_j>)[i]. Computed in fp32 or
    wider.

    Args:
        prediction: (N, P) packed rows.
        target: (N, P).
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: Rows of the longest clip.
        over: What the softmax runs over, "targets" or "predictions".
        exact: Whether all N rows belong to a clip; False: rows may lie past ``cu_seqlens[-1]`` (packing.Packing).

    Returns:
        loss (N,) and hit (N,) bool. Over targets, hit is whether the largest product of a row is with its own target.
        Over predictions, hit is whether no other target i gives prediction j a larger
        log softmax_j(<target_i, prediction_j>).
    """
    if clip_groups := similar_clips(cu_seqlens, max_seqlen, prediction.shape[0]):
        groups = [rows_of_clips(cu_seqlens, clips) for clips in clip_groups]
        order = torch.cat([rows for rows, _, _ in groups]).argsort()
        losses, hits = [], []
        for rows, group_cu_seqlens, longest in groups:
            group_loss, group_hit = info_nce(prediction[rows], target[rows], group_cu_seqlens, longest, over=over)
            losses.append(group_loss)
            hits.append(group_hit)
        return torch.cat(losses)[order], torch.cat(hits)[order]
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    pad = PaddedView(cu_seqlens, max_seqlen, prediction.shape[0], has_padding_rows=not exact)
    padded_prediction, padded_target = pad.pad(prediction.to(dtype)), pad.pad(target.to(dtype))
    if over == "predictions":
        logits = padded_target @ padded_prediction.transpose(1, 2)
    else:
        logits = padded_prediction @ padded_target.transpose(1, 2)
    logits = logits.masked_fill(~pad.valid[:, None, :], float("-inf"))
    positives = logits.diagonal(dim1=1, dim2=2)
    # The log-sum-exp of the padded rows of an empty clip is -inf; unpad drops them before any arithmetic.
    lse = logits.logsumexp(2)
    loss = pad.unpad(lse) - pad.unpad(positives)
    scores = logits.detach()
    if over == "predictions":
        scores = (scores - lse.detach()[:, :, None]).masked_fill(~pad.valid[:, :, None], float("-inf")).transpose(1, 2)
    hit = pad.unpad(scores.argmax(2)) == pad.unpad(torch.arange(max_seqlen, device=logits.device))
    return loss, hit


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each clip with explicit probabilities: (N, 3, H, Dh) -> (N, H, Dh), scale Dh ** -0.5."""
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
    exact: bool = True,
) -> Tensor:
    """``attention`` for a subset of query rows of each clip: (Nq, H, Dh) and (N, 2, H, Dh) -> (Nq, H, Dh).

    ``cu_q`` and ``max_q`` describe the query rows, ``cu_kv`` and ``max_kv`` those of keys and values; ``exact`` as in
    ``info_nce``.
    """
    pad_q, pad_kv = padded_views(
        cu_q=cu_q,
        max_q=max_q,
        num_q=q.shape[0],
        cu_kv=cu_kv,
        max_kv=max_kv,
        num_kv=kv.shape[0],
        has_padding_rows=not exact,
    )
    q = pad_q.pad(q).transpose(1, 2)  # (B, H, S, Dh)
    k, v = pad_kv.pad(kv).permute(2, 0, 3, 1, 4)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype).masked_fill(~pad_kv.key_valid[:, None, None, :], float("-inf"))
    probabilities = drop(logits.softmax(-1).to(v.dtype), dropout)
    return pad_q.unpad((probabilities @ v).transpose(1, 2))


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *, dropout: float = 0.0, recompute: bool = False
) -> Tensor:
    """GELU(x W1^T + b1) W2^T of rows (N, D), weights cast to the dtype of ``x``; dropout on the output of the GELU.

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
        return F.linear(bias_gelu(h, b1), w2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, b1, w2 = ctx.saved_tensors
        z = h + b1.to(h.dtype)
        dw2 = dy.T @ F.gelu(z)
        dh = torch.ops.aten.gelu_backward(dy @ w2, z)
        return dh, dh.sum(0).to(b1.dtype), dw2
