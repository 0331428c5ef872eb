"""Hugging Face's ``ViTMAEForPreTraining`` at MAE-AST's sizes: the benchmarks' column ``vitmae``.

Tokens, widths, heads, depths and mask ratio equal MAE-AST's, on clips of one length. Needs transformers (the ``bench``
extra). Differences from MAE-AST that are part of the Hugging Face model:

- a class token before the tokens of encoder and decoder;
- a Linear between encoder and decoder even if their widths are equal;
- one head over all tokens and only the reconstruction loss, no InfoNCE;
- pre-norm layers, separate projections of q, k and v, no dropout (off by default);
- random masks of single tokens, drawn as the argsort of noise; input that is already normalised.

The Hugging Face model accepts only square images, so its position tables are replaced by ours for a spectrogram's grid.
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
    """Why this column is not available; None if it is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install .[bench])"
    if config.patch_size[0] != config.patch_size[1]:
        return f"ViTMAEForPreTraining takes square patches, not {config.patch_size}"
    return None


def build(config: MAEASTConfig, frames: int) -> nn.Module:
    """A ``ViTMAEForPreTraining`` for images of size (1, ``frames`` cut to whole patches, F)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    class Spectrograms(ViTMAEForPreTraining):
        def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
            # The flag only skips the method's check for square images.
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
    """Fixed positions (1, 1 + L, D), zero for the class token."""
    return nn.Parameter(F.pad(sinusoid(tokens, width), (0, 0, 1, 0))[None], requires_grad=False)


def pixels(log_mel: Tensor, config: MAEASTConfig) -> Tensor:
    """The benchmark's log-mel (B, T, F) -> normalised images (B, 1, T', F) of whole patches."""
    whole_frames = log_mel.shape[1] // config.patch_size[0] * config.patch_size[0]
    return ((log_mel[:, None, :whole_frames] + 6.0) / 8.0).contiguous()


def check(model: nn.Module, image: Tensor, mask: Tensor, reference: nn.Module) -> Tensor:
    """Loss for a mask (B, L), computed here from the model's predictions.

    Raises:
        AssertionError: The model masks other tokens, its encoder does not run over exactly the visible tokens and the
            class token, or its number of parameters differs from ``reference`` by other than the listed differences.
    """
    config: MAEASTConfig = reference.config
    patch_size, tokens = config.patch_size[0], mask.shape[1]
    noise = mask.float()  # low noise is visible
    output: Any = model(image, noise=noise)
    assert torch.equal(output.mask.bool(), mask), "ViTMAE masks other tokens than the mask"
    encoder_tokens = model.vit(image, noise=noise).last_hidden_state.shape[1]
    assert encoder_tokens == 1 + num_visible(tokens, config.mask_ratio), (
        f"ViTMAE's encoder sees {encoder_tokens} tokens"
    )
    width, inner = config.embed_dim, config.decoder_embed_dim
    extra_parameters = width + (
        0 if config.has_projection else width * inner + inner
    )  # class token, Linear before the decoder
    missing_parameters = inner * config.patch_dim + config.patch_dim  # InfoNCE's head
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    expected_parameters = (
        sum(parameter.numel() for parameter in reference.parameters()) + extra_parameters - missing_parameters
    )
    assert num_parameters == expected_parameters, (
        f"ViTMAE has {num_parameters} parameters, expected {expected_parameters}"
    )
    patches = F.unfold(image, patch_size, stride=patch_size).transpose(1, 2)
    return (output.logits.float() - patches)[mask].square().mean()
