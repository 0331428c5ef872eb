"""The specification: what every operation of the model computes, one function per operation, slow and obvious.

The functions are differentiable and run on any device, in any floating dtype. "fp32 or wider": in fp32, or in fp64 for
fp64 inputs. They take the tensors of functional.py, but not the arguments that only a faster implementation needs.
eager.py and the kernels are tested against them.

"The paper" is MAE-AST, arXiv 2203.16691. Letters: B clips, T frames, F mel bins, kt x kf patch of P = kt * kf values,
L tokens per clip, N packed rows of all clips, D width, H heads of Dh values.

Rows are packed clip by clip (see packing.py), and functions of clips loop over them. Rows past ``cu_seqlens[-1]``
belong to no clip: their results are zeros (False), and they get no gradient.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(log_mel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut (B, T, F) into (B, L, P) patches (paper, section 2); frames after the last whole patch are dropped.

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
    patches = widen(patchify(features, patch_size)[clip, token])
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

    Positions are added, then LayerNorm and dropout are applied (paper, section 2).

    Args:
        visible: (Nv, D) encoded visible tokens.
        mask_token: (D,).
        table: (tokens, D) positions.
        token: (N,) int64 index of each row in ``table``.
        inverse: (N,) int64 row of ``visible`` to put here, -1 for the mask token.
        weight: (D,) weight of a LayerNorm over the sum. None: no LayerNorm.
        bias: (D,) bias of that LayerNorm; given exactly when ``weight`` is.
        dropout: Rate on the result, in [0, 1).
    """
    no_token = visible.new_zeros(1, visible.shape[1])
    restored = torch.cat((visible, no_token))[inverse]  # -1 is the last row
    x = torch.where((inverse < 0)[:, None], mask_token.to(visible.dtype), restored) + table[token].to(visible.dtype)
    if weight is not None:
        assert bias is not None
        x = layer_norm(x, weight, bias)
    return F.dropout(x, dropout)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension, statistics and affine in fp32 or wider; returns the dtype of ``x``."""
    wide = widen(x)
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


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
    return layer_norm(residual + F.dropout(branch, dropout), weight, bias)


def bias_gelu(x: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(GELU(x + bias)) with the exact (erf) GELU."""
    return F.dropout(F.gelu(x + bias.to(x.dtype)), dropout)


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *, dropout: float = 0.0) -> Tensor:
    """dropout(GELU(x W1^T + b1)) W2^T of rows (N, D), weights cast to the dtype of ``x``."""
    return F.linear(bias_gelu(F.linear(x, w1.to(x.dtype)), b1, dropout), w2.to(x.dtype))


def attention(qkv: Tensor, cu_seqlens: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention of each clip over its own rows: (N, 3, H, Dh) -> (N, H, Dh). See ``cross_attention``."""
    return cross_attention(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, dropout=dropout)


def cross_attention(q: Tensor, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Softmax attention of some rows of each clip over all of its rows: dropout(softmax(Dh ** -0.5 q k^T)) v.

    The softmax is in fp32 or wider, the products in the dtype of the rows. Queries of a clip without keys give zeros.

    Args:
        q: (Nq, H, Dh) packed query rows.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) first query row of each clip, and the end of the last one.
        cu_kv: (B + 1,) first row of each clip, and the end of the last one.
        dropout: Rate on the attention probabilities, in [0, 1).

    Returns:
        (Nq, H, Dh).
    """
    out = torch.zeros_like(q)
    for query_rows, key_rows in zip(clip_slices(cu_q), clip_slices(cu_kv), strict=True):
        queries = q[query_rows].transpose(0, 1)  # (H, S, Dh)
        keys, values = kv[key_rows].permute(1, 2, 0, 3)  # (H, T, Dh) each
        scores = (queries * q.shape[-1] ** -0.5) @ keys.transpose(1, 2)
        probabilities = widen(scores).softmax(-1).to(values.dtype)
        out[query_rows] = (F.dropout(probabilities, dropout) @ values).transpose(0, 1)
    return out


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool = False) -> Tensor:
    """Mean squared error of each row (N,), fp32 or wider: the reconstruction loss (paper, section 2.3).

    With ``norm_pix_loss`` each target patch is first normalised by its own mean and unbiased variance (eps 1e-6), as
    in the public MAE code (He et al. 2022).

    Args:
        prediction: (N, P).
        target: (N, P).
        norm_pix_loss: Whether to normalise the target patches.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.to(dtype)
    if norm_pix_loss:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(1)


def info_nce(prediction: Tensor, target: Tensor, cu_seqlens: Tensor, *, over: str = "targets") -> tuple[Tensor, Tensor]:
    """InfoNCE of each row against the rows of its own clip (paper, equation 1), without temperature or normalisation.

    over="targets" (MAE-AST): loss_i = -log softmax_j(<prediction_i, target_j>)[i], j over the rows of the same clip.
    over="predictions" (SSAST, arXiv 2110.09784, the transpose): loss_i = -log softmax_j(<target_i, prediction_j>)[i].
    Computed in fp32 or wider.

    Args:
        prediction: (N, P) packed rows.
        target: (N, P).
        cu_seqlens: (B + 1,) first row of each clip, and the end of the last one.
        over: What the softmax runs over, "targets" or "predictions".

    Returns:
        loss (N,) and hit (N,) bool. Over targets, hit is whether the largest product of a row is with its own target.
        Over predictions, hit is whether no other target i gives prediction j a larger
        log softmax_j(<target_i, prediction_j>). Of equal values the first counts as the largest.
    """
    prediction, target = widen(prediction), widen(target)
    loss = prediction.new_zeros(len(prediction))
    hit = torch.zeros(len(prediction), dtype=torch.bool, device=prediction.device)
    for rows in clip_slices(cu_seqlens):
        if rows.start == rows.stop:
            continue
        own = torch.arange(rows.stop - rows.start, device=prediction.device)
        if over == "targets":
            logits = prediction[rows] @ target[rows].T
            hit[rows] = logits.argmax(1) == own
        else:
            logits = target[rows] @ prediction[rows].T
            hit[rows] = logits.log_softmax(1).argmax(0) == own
        loss[rows] = F.cross_entropy(logits, own, reduction="none")
    return loss, hit


def clip_slices(cu_seqlens: Tensor) -> list[slice]:
    """The packed rows of each clip."""
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


def widen(x: Tensor) -> Tensor:
    """``x`` in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
