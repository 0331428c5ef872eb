"""Hugging Face's ``ViTMAEForPreTraining`` at MAE-AST's sizes: the benchmarks' column ``vitmae``.

The same tokens, widths, heads, depths and mask ratio, on clips of one length. Needs transformers (the ``bench`` extra).
What differs from MAE-AST, and stays as the library has it:

- a class token in front of the tokens of encoder and decoder;
- a Linear between encoder and decoder though their widths are equal;
- one head, over all tokens, and the reconstruction loss alone: no InfoNCE;
- pre-norm layers, q, k and v projected one by one, no dropout anywhere (it is off by default);
- masks of single tokens at random, drawn as the argsort of noise; input that is normalised already.

The library takes square images alone: the tables of positions are replaced by ours for the grid of a spectrogram.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_ast_fast.models.config import MAEASTConfig
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops.masking import num_visible


def missing(config: MAEASTConfig) -> str | None:
    """Why there is no such column; None: there is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install .[bench])"
    if config.patch_size[0] != config.patch_size[1]:
        return f"ViTMAEForPreTraining takes square patches, not {config.patch_size}"
    return None


def build(config: MAEASTConfig, frames: int) -> nn.Module:
    """A ``ViTMAEForPreTraining`` for images (1, ``frames`` cut to whole patches, F); it is called by ``loss``."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    class Spectrograms(ViTMAEForPreTraining):
        def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
            # With the flag the method skips its test for a square image; it makes no other difference there.
            return super().patchify(pixel_values, interpolate_pos_encoding=True)

    size = config.patch_size[0]
    options = ViTMAEConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_dim,
        decoder_hidden_size=config.decoder_embed_dim,
        decoder_num_hidden_layers=config.decoder_layers,
        decoder_num_attention_heads=config.num_heads,
        decoder_intermediate_size=config.ffn_dim,
        image_size=size,
        patch_size=size,
        num_channels=1,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=False,
    )
    options._attn_implementation = "sdpa"  # the library's default
    model = Spectrograms(options)
    tokens = frames // size * config.grid_f
    embeddings, decoder = model.vit.embeddings, model.decoder
    embeddings.image_size = frames // size * size, config.num_mel_bins
    embeddings.position_embeddings = _positions(tokens, config.embed_dim)
    decoder.decoder_pos_embed = _positions(tokens, config.decoder_embed_dim)
    return model


def _positions(tokens: int, width: int) -> nn.Parameter:
    """(1, 1 + L, D) fixed, 0 for the class token."""
    return nn.Parameter(F.pad(sinusoid(tokens, width), (0, 0, 1, 0))[None], requires_grad=False)


def pixels(features: Tensor, config: MAEASTConfig) -> Tensor:
    """Log-mel (B, T, F) as the benchmark makes it -> normalised images (B, 1, T', F) of whole patches."""
    whole = features.shape[1] // config.patch_size[0] * config.patch_size[0]
    return ((features[:, None, :whole] + 6.0) / 8.0).contiguous()


def check(model: nn.Module, image: Tensor, mask: Tensor, ours: nn.Module) -> Tensor:
    """The loss for a mask (B, L), from the predictions, counted here.

    Raises:
        AssertionError: The model hides other tokens, its encoder runs over others than the visible ones and the class
            token, or its number of parameters is not that of ``ours`` and what the module's list says.
    """
    config: MAEASTConfig = ours.config
    size, tokens = config.patch_size[0], mask.shape[1]
    noise = mask.float()  # the visible ones come first
    told: Any = model(image, noise=noise)
    assert torch.equal(told.mask.bool(), mask), "ViTMAE hides other tokens than the mask"
    seen = model.vit(image, noise=noise).last_hidden_state.shape[1]
    assert seen == 1 + num_visible(tokens, config.mask_ratio), f"ViTMAE's encoder sees {seen} tokens"
    width, inner = config.embed_dim, config.decoder_embed_dim
    more = width + (0 if config.has_projection else width * inner + inner)  # class token, Linear in between
    less = inner * config.patch_dim + config.patch_dim  # InfoNCE's head
    got = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = sum(p.numel() for p in ours.parameters()) + more - less
    assert got == expected, f"ViTMAE has {got} parameters, expected {expected}"
    patches = F.unfold(image, size, stride=size).transpose(1, 2)
    return (told.logits.float() - patches)[mask].square().mean()
