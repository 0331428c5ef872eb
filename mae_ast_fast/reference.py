"""The specification: every operation of the model in plain PyTorch, differentiable, on any device and dtype.

Letters: B clips, T frames, F mel bins, kt x kf patch of P = kt * kf values, L tokens a clip, N packed rows of all
clips, D width, H heads of Dh. Rows are packed clip by clip (see packing.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing


def patchify(features: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cuts (B, T, F) into (B, L, P) patches; frames after the last whole patch are dropped.

    Token index = time block * (F // kf) + frequency block; inside a patch, index = t * kf + f.
    """
    kt, kf = patch_size
    batch, frames, bins = features.shape
    grid_t, grid_f = frames // kt, bins // kf
    blocks = features[:, : grid_t * kt].reshape(batch, grid_t, kt, grid_f, kf)
    return blocks.transpose(2, 3).reshape(batch, grid_t * grid_f, kt * kf)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], num_mel_bins: int) -> Tensor:
    """Inverse of ``patchify``: (B, L, P) back to (B, T, F), T a multiple of kt."""
    kt, kf = patch_size
    batch, tokens, _ = patches.shape
    grid_f = num_mel_bins // kf
    blocks = patches.reshape(batch, tokens // grid_f, grid_f, kt, kf)
    return blocks.transpose(2, 3).reshape(batch, tokens // grid_f * kt, num_mel_bins)


def gather_patches(features: Tensor, mean: Tensor, scale: Tensor, rows: Packing, patch_size: tuple[int, int]) -> Tensor:
    """The patches of the packed rows (N, P), normalised: (x - mean) * scale, in the dtype of ``features``."""
    patches = patchify(features, patch_size)[rows.clip, rows.token]
    return (patches - mean) * scale


def scatter_tokens(visible: Tensor, mask_token: Tensor, positions: Tensor, is_masked: Tensor) -> Tensor:
    """The decoder's input (N, D): visible rows at their places, the mask token elsewhere, plus positions.

    Args:
        visible: (Nv, D) encoded visible tokens, in the order in which they stand among the N rows.
        mask_token: (D,).
        positions: (N, D) position of each row.
        is_masked: (N,) bool.
    """
    index = (~is_masked).cumsum(0) - 1  # the visible row of each place that has one
    if visible.shape[0] == 0:  # no clip of the batch has a visible token: nothing to look up
        return mask_token + positions
    return torch.where(is_masked[:, None], mask_token, visible[index.clamp(min=0)]) + positions


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension with fp32 statistics and affine; returns the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """LayerNorm(residual + dropout(branch + branch_bias)), rows (N, D): the post-norm residual connection."""
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    return layer_norm(residual + F.dropout(branch, dropout, training=dropout > 0.0), weight, bias)


def bias_gelu(x: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(GELU(x + bias)) with the exact (erf) GELU."""
    return F.dropout(F.gelu(x + bias), dropout, training=dropout > 0.0)


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


def info_nce(prediction: Tensor, target: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """InfoNCE of each row against the targets of its own clip (paper, equation 1).

    loss_i = -log softmax_j(<prediction_i, target_j>)[i], j over the rows of the same clip; no temperature, no
    normalisation, in fp32 or wider.

    Args:
        prediction: (N, P) packed rows.
        target: (N, P).
        cu_seqlens: (B + 1,) int32 first row of each clip.
        max_seqlen: Rows of the longest clip.

    Returns:
        loss (N,) and hit (N,) bool: whether the row's largest product is with its own target.
    """
    if groups := similar_lengths(cu_seqlens, max_seqlen, prediction.shape[0]):
        order = torch.cat([index for index, _, _ in groups]).argsort()
        parts = [info_nce(prediction[index], target[index], cu, longest) for index, cu, longest in groups]
        return tuple(torch.cat(column)[order] for column in zip(*parts, strict=True))
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    pad = PaddedView(cu_seqlens, max_seqlen, prediction.shape[0])
    padded_prediction, padded_target = pad.pad(prediction.to(dtype)), pad.pad(target.to(dtype))
    logits = padded_prediction @ padded_target.transpose(1, 2)
    logits = logits.masked_fill(~pad.valid[:, None, :], float("-inf"))
    own = logits.diagonal(dim1=1, dim2=2)
    # log-sum-exp of an empty clip's padded rows is -inf; they are dropped by unpad before any arithmetic.
    loss = pad.unpad(logits.logsumexp(2)) - pad.unpad(own)
    hit = pad.unpad(logits.detach().argmax(2)) == pad.unpad(torch.arange(max_seqlen, device=logits.device))
    return loss, hit


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each clip with explicit probabilities: (N, 3, H, Dh) -> (N, H, Dh), scale Dh ** -0.5."""
    pad = PaddedView(cu_seqlens, max_seqlen, qkv.shape[0])
    q, k, v = pad.pad(qkv).permute(2, 0, 3, 1, 4)  # each (B, H, S, Dh)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype).masked_fill(~pad.key_valid[:, None, None, :], float("-inf"))
    probabilities = F.dropout(logits.softmax(-1).to(v.dtype), dropout, training=dropout > 0.0)
    return pad.unpad((probabilities @ v).transpose(1, 2))


def similar_lengths(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> list[tuple[Tensor, Tensor, int]] | None:
    """Groups of clips whose lengths differ by less than a factor of 2, where padding to the longest would waste much.

    Returns:
        None where at least half of the padded rows are real, else (rows (n,), cu_seqlens, max_seqlen) of each group.
    """
    if (cu_seqlens.shape[0] - 1) * max_seqlen <= 2 * rows:
        return None
    counts = cu_seqlens.diff().long()
    size = torch.where(counts > 0, counts.clamp(min=1).double().log2().floor().long(), -1)
    clip_of_row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=rows)
    groups = []
    for exponent in range(max_seqlen.bit_length()):
        own = counts[size == exponent]
        if len(own):
            index = (size[clip_of_row] == exponent).nonzero()[:, 0]
            cu = F.pad(own.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
            groups.append((index, cu, int(own.max())))
    return groups


class PaddedView:
    """Packed rows (N, ...) laid out as (B, max_seqlen, ...) and back; free of copies where all clips are equal.

    Attributes:
        valid: (B, max_seqlen) bool, True where a clip has a row.
        key_valid: the same, but an empty clip has one valid key, so that no softmax runs over nothing.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, rows: int) -> None:
        self.batch, self.length = cu_seqlens.shape[0] - 1, max_seqlen
        self.full = self.batch * max_seqlen == rows
        counts = cu_seqlens.diff()[:, None]
        place = torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = place < counts
        self.key_valid = place < counts.clamp(min=1)
        self._flat = None if self.full else self.valid.flatten().nonzero()[:, 0]

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, max_seqlen, ...), zeros where a clip has no row."""
        if self.full:
            return x.unflatten(0, (self.batch, self.length))
        padded = x.new_zeros(self.batch * self.length, *x.shape[1:])
        return padded.index_copy(0, self._flat, x).unflatten(0, (self.batch, self.length))

    def unpad(self, x: Tensor) -> Tensor:
        """(B, max_seqlen, ...) -> (N, ...); a (max_seqlen,) tensor counts for every clip."""
        if x.dim() == 1:
            x = x.expand(self.batch, -1)
        flat = x.flatten(0, 1)
        return flat if self.full else flat[self._flat]
