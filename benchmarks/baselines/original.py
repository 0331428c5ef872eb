"""MAE-AST in the implementation style of the paper (arXiv 2203.16691): the benchmarks' column ``original``.

Written by us in that style, not copied from the authors. As in the public code, Python loops over the clips of a batch
draw masks, select visible tokens and restore the sequence; heads and losses run over the whole batch; every patch is
projected, masked or not; attention weights are materialised; q, k and v have separate projections; the whole sequence
runs through all decoder layers; losses are in fp32. It computes the same values as the paper's code, including its
peculiarities (padded frames count in the statistics, one chunk mask for the whole batch). It has the official parameter
names and is tested against the recorded tensors (tests/models/test_original.py).

Its slow parts, and the functions of ``mae_ast_fast`` that replace them:

    1. ``chunk_mask``, ``random_mask``    a loop that draws masks                  ``masking.sample_mask``
    2. ``Original.select_visible``        a loop that selects visible tokens       ``ops.gather_patches``
    3. ``Original.decoder_input``         a loop that restores the sequence        ``ops.scatter_tokens``
    4. ``Original.predict``               heads; all layers ran over all tokens    the last layer's ``query_rows``
    5. ``Original.losses``                batched products (B, M, M)               ``ops.info_nce``, ``ops.masked_mse``

Letters: B clips, T frames, L tokens per clip, K of them visible, M masked, D width, P values per patch, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_ast_fast.models.config import MAEASTConfig
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops.masking import CHUNK_SIZES, num_visible


@dataclass
class OriginalOutput:
    """Losses and predictions; clips have equal counts, so predictions stack.

    Attributes:
        loss: Weighted total.
        loss_reconstruction: Mean squared error.
        loss_classification: InfoNCE, the mean over clips.
        pred_reconstruction: (B, M, P), tokens ascending.
        pred_classification: (B, M, P).
        target: (B, M, P) normalised patches.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    pred_reconstruction: Tensor
    pred_classification: Tensor
    target: Tensor


def random_mask(clips: int, tokens: int, mask_ratio: float) -> Tensor:
    """(B, L) bool, True = masked: uniform without replacement, clip by clip."""
    mask = torch.zeros(clips, tokens, dtype=torch.bool)
    for clip in range(clips):  # loop 1
        mask[clip, torch.randperm(tokens)[num_visible(tokens, mask_ratio) :]] = True
    return mask


def chunk_mask(clips: int, tokens: int, grid_f: int, mask_ratio: float) -> Tensor:
    """(B, L) bool, True = masked: one mask of random squares for the whole batch, as ``chunk_official`` describes."""
    num_masked = tokens - num_visible(tokens, mask_ratio)
    size = int(torch.randint(CHUNK_SIZES[0], CHUNK_SIZES[-1] + 1, ()))
    masked: set[int] = set()
    while len(masked) <= num_masked:  # loop 1
        start = int(torch.randint(tokens, ()))
        for i in range(size):
            for j in range(size):
                if start + i + grid_f * j < tokens:
                    masked.add(start + i + grid_f * j)
    mask = torch.zeros(clips, tokens, dtype=torch.bool)
    mask[:, sorted(masked)[:num_masked]] = True
    return mask


class SelfAttention(nn.Module):
    """Multi-head self-attention over (L, B, D) with the attention weights written out."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(L, B, D) -> (L, B, D)."""
        tokens, clips, width = x.shape
        head_dim = width // self.heads
        q = self.q_proj(x) * head_dim**-0.5
        q, k, v = (
            y.contiguous().view(tokens, clips * self.heads, head_dim).transpose(0, 1)
            for y in (q, self.k_proj(x), self.v_proj(x))
        )
        weights = torch.bmm(q, k.transpose(1, 2))  # (B * H, L, L)
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        weights = F.dropout(weights, self.dropout, self.training)
        out = torch.bmm(weights, v).transpose(0, 1).contiguous().view(tokens, clips, width)
        return self.out_proj(out)


class Layer(nn.Module):
    """Transformer layer over (L, B, D), post-norm or pre-norm."""

    def __init__(self, dim: int, config: MAEASTConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.self_attn = SelfAttention(dim, config.num_heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(L, B, D) -> (L, B, D)."""
        residual = x
        if self.norm_first:
            x = self.self_attn_layer_norm(x)
        x = residual + F.dropout(self.self_attn(x), self.dropout, self.training)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        residual = x
        if self.norm_first:
            x = self.final_layer_norm(x)
        x = F.dropout(F.gelu(self.fc1(x)), self.activation_dropout, self.training)
        x = residual + F.dropout(self.fc2(x), self.dropout, self.training)
        return x if self.norm_first else self.final_layer_norm(x)


class TransformerStack(nn.Module):
    """Transformer stack over (B, L, D): LayerNorm before the first layer (post-norm) or after the last (pre-norm)."""

    def __init__(self, dim: int, num_layers: int, layerdrop: float, config: MAEASTConfig) -> None:
        super().__init__()
        self.norm_first, self.dropout, self.layerdrop = config.norm_first, config.dropout, layerdrop
        self.layers = nn.ModuleList(Layer(dim, config) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if not self.norm_first:
            x = self.layer_norm(x)
        x = F.dropout(x, self.dropout, self.training).transpose(0, 1)
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and float(torch.rand(())) < self.layerdrop:
                continue
            x = layer(x)
        x = x.transpose(0, 1)
        return self.layer_norm(x) if self.norm_first else x


class Original(nn.Module):
    """MAE-AST pretraining in the paper's style; parameters have the official names.

    Args:
        config: Sizes, dropout, masking (``chunk`` means the paper's rule, as ``chunk_official``) and loss weights.

    Attributes:
        clock: None, or a function that is called with the name of each forward stage as it ends.
    """

    def __init__(self, config: MAEASTConfig) -> None:
        super().__init__()
        self.config = config
        self.clock: Callable[[str], None] | None = None
        width, decoder_width, patch_dim = config.embed_dim, config.decoder_embed_dim, config.patch_dim
        self.batch_norm = nn.BatchNorm2d(1, affine=False)
        self.layer_norm = nn.LayerNorm(config.num_mel_bins)  # in the official checkpoints; never called
        self.post_extract_proj = nn.Linear(patch_dim, width)
        self.encoder_mask_emb = nn.Parameter(torch.rand(width))
        self.encoder = TransformerStack(width, config.encoder_layers, config.encoder_layerdrop, config)
        if config.has_projection:
            self.post_enc_proj = nn.Linear(width, decoder_width)
        self.decoder_mask_emb = nn.Parameter(torch.rand(decoder_width))
        self.decoder = TransformerStack(decoder_width, config.decoder_layers, config.decoder_layerdrop, config)
        self.final_proj_reconstruction = nn.Linear(decoder_width, patch_dim)
        self.final_proj_classification = nn.Linear(decoder_width, patch_dim)
        self.register_buffer("encoder_positions", sinusoid(2048, width), persistent=False)
        self.register_buffer("decoder_positions", sinusoid(2048, decoder_width), persistent=False)

    def forward(self, source: Tensor, mask: Tensor | None = None) -> OriginalOutput:
        """Losses of one batch of clips of equal length.

        Args:
            source: (B, T, F) log-mel, not normalised.
            mask: (B, L) bool, True = masked, the same count in every clip; None draws one.
        """
        patches = self.patches(source)
        self._ended("normalise, patchify")
        x = self.post_extract_proj(patches)
        x = F.dropout(x, self.config.input_dropout, self.training)
        self._ended("project all patches")
        if mask is None:
            mask = self.draw_mask(patches.shape[0], patches.shape[1]).to(source.device)
        x = self.select_visible(x, mask)
        self._ended("mask, gather")
        x = self.encoder(x)
        if self.config.has_projection:
            x = self.post_enc_proj(x)
        self._ended("encoder")
        x = self.decoder_input(x, mask)
        self._ended("scatter")
        x = self.decoder(x)
        self._ended("decoder")
        reconstruction, classification, target = self.predict(x, patches, mask)
        self._ended("heads")
        with torch.autocast(source.device.type, enabled=False):
            mse, info_nce = self.losses(reconstruction.float(), classification.float(), target.float())
        loss = self.config.reconstruction_weight * mse + self.config.classification_weight * info_nce
        self._ended("losses")
        return OriginalOutput(loss, mse, info_nce, reconstruction, classification, target)

    def _ended(self, stage: str) -> None:
        if self.clock is not None:
            self.clock(stage)

    def patches(self, source: Tensor) -> Tensor:
        """(B, T, F) -> normalised patches (B, L, P), T cut to whole patches after the statistics are taken."""
        x = self.batch_norm(source[:, None]) * 0.5
        return F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)

    def draw_mask(self, clips: int, tokens: int) -> Tensor:
        """(B, L) bool, True = masked, by the configuration's strategy."""
        config = self.config
        if config.masking == "random":
            return random_mask(clips, tokens, config.mask_ratio)
        if config.masking in ("chunk", "chunk_official"):
            return chunk_mask(clips, tokens, config.grid_f, config.mask_ratio)
        raise ValueError(f"masking must be random, chunk or chunk_official, got {config.masking!r}")

    def select_visible(self, x: Tensor, mask: Tensor) -> Tensor:
        """Projected patches (B, L, D) -> visible ones with their positions (B, K, D)."""
        x = torch.where(mask[..., None], self.encoder_mask_emb.to(x.dtype), x)
        x = x + self.encoder_positions[: x.shape[1]]
        visible = []
        for clip in range(x.shape[0]):  # loop 2
            visible.append(x[clip][~mask[clip]])
        return torch.stack(visible)

    def decoder_input(self, x: Tensor, mask: Tensor) -> Tensor:
        """Encoded visible tokens (B, K, D) -> the whole sequence with positions (B, L, D)."""
        sequences = []
        for clip in range(x.shape[0]):  # loop 3
            sequence = self.decoder_mask_emb.to(x.dtype).repeat(mask.shape[1], 1)
            sequence[~mask[clip]] = x[clip]
            sequences.append(sequence)
        return torch.stack(sequences) + self.decoder_positions[: mask.shape[1]]

    def predict(self, x: Tensor, patches: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder output (B, L, D) -> both predictions and the targets of the masked tokens, each (B, M, P)."""
        clips = x.shape[0]
        masked = x[mask].view(clips, -1, x.shape[2])  # (B, M, D): equal counts in all clips
        target = patches[mask].view(clips, -1, patches.shape[2])
        return self.final_proj_reconstruction(masked), self.final_proj_classification(masked), target

    def losses(self, reconstruction: Tensor, classification: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error and InfoNCE over the targets of the same clip (paper, equation 1), in fp32."""
        products = torch.matmul(classification, target.transpose(1, 2))  # (B, M, M)
        info_nce = -F.log_softmax(products, dim=-1).diagonal(dim1=1, dim2=2).mean()
        return F.mse_loss(reconstruction, target), info_nce
