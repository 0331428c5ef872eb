"""MAE-AST: a deep encoder over the visible tokens, a shallow decoder over all of them, two losses (arXiv 2203.16691).

Letters: B clips, T frames, F mel bins, L tokens of the longest clip, N packed rows of all tokens, Nv visible and M
masked ones, D width of the encoder or of the decoder, P values per patch, kt and kf frames and mel bins per patch.
Between the spectrogram and the losses everything is packed: the rows of all clips one after another, without padding
or cropping. Only rounded token counts (``TokenCounts.bucket``) add rows, at the end, and the losses leave them out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dropout import drop
from ..ops.packing import TokenCounts
from .base import PretrainingModel
from .config import MAEASTConfig
from .input_norm import InputNorm
from .layout import TokenLayout
from .losses import MAEASTOutput, cosine_operands, loss_terms
from .transformer import (
    SITES_PER_LAYER,
    ExecConfig,
    Positions,
    StemSite,
    TransformerStack,
    add_norm,
    call,
    is_fusible_norm,
    linear,
    linear_without_bias,
)

MAX_TOKENS = 48_000  # the paper's position table; 16 minutes of audio for both models


@dataclass
class Features:
    """Encoder features of a batch; rows past ``lengths`` are exactly 0.

    Attributes:
        last_hidden_state: (B, L, D) output of the encoder, or of the layer that was asked for.
        hidden_states: (B, L, D) per layer, the first layer's first.
        lengths: (B,) int64 tokens of each clip.
    """

    last_hidden_state: Tensor
    hidden_states: list[Tensor]
    lengths: Tensor


class MAEAST(PretrainingModel):
    """Masked autoencoding audio spectrogram transformer.

    Args:
        config: Sizes, masking and loss weights.
        impl: "auto", "torch" or "triton": the implementation of the operations. Operations without a kernel run in
            PyTorch in both: matrix products, the residual connections of pre-norm layers, and mask sampling other than
            random and chunk.
        attention: "auto" or the name of an attention backend (ops/attention).
        recompute: What the backward computes again instead of keeping it: "none", "gelu" (the output of the GELU, a
            fourth of a layer's memory) or "layer" (everything inside a layer). The results are the same.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available.
    """

    config_class, model_type = MAEASTConfig, "mae_ast"
    config: MAEASTConfig

    def __init__(
        self, config: MAEASTConfig, impl: str = "auto", attention: str = "auto", recompute: str = "none"
    ) -> None:
        super().__init__(config, impl, attention, recompute)
        width, decoder_width = config.embed_dim, config.decoder_embed_dim
        self.input_norm = InputNorm()
        self.patch_embed = nn.Linear(config.patch_dim, width)
        position_blocks = config.grid_f if config.positions == "sinusoid_2d" else 1
        self.encoder_positions = Positions(width, position_blocks)
        self.encoder = TransformerStack(
            width,
            config.encoder_layers,
            config,
            layerdrop=config.encoder_layerdrop,
            dropout_site=SITES_PER_LAYER,
        )
        if config.decoder_layers:
            self.encoder_projection = nn.Linear(width, decoder_width) if config.has_projection else None
            self.mask_token = nn.Parameter(torch.rand(decoder_width))
            self.decoder_positions = Positions(decoder_width, position_blocks)
            self.decoder = TransformerStack(
                decoder_width,
                config.decoder_layers,
                config,
                layerdrop=config.decoder_layerdrop,
                dropout_site=SITES_PER_LAYER * (1 + config.encoder_layers),
            )
            self.head = nn.Linear(decoder_width, 2 * config.patch_dim)  # reconstruction, then classification

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        sizes: TokenCounts | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> MAEASTOutput:
        """Masked pretraining losses (paper, section 2).

        Log-mel -> mask -> patches -> encoder (visible tokens) -> decoder (all tokens; its last layer computes the
        masked ones) -> head -> losses.

        The host does not wait for a GPU if it knows the token counts of the batch: ``sizes`` is given, or the mask is
        drawn here and ``lengths`` is None or on the CPU.

        Args:
            features: (B, T, F) floating-point log-mel, not normalised.
            lengths: (B,) integers, real frames of each clip; None: all T. Frames after a clip's last whole patch are
                ignored.
            mask: (B, L) bool, True = masked, L at least the longest clip's tokens. Entries past a clip's tokens are
                ignored, and the number of masked tokens may differ between clips. None draws a mask by
                ``config.masking``.
            generator: Random generator of that draw; None: torch's default.
            sizes: Token counts of ``sizes_of``, or ``sizes_of(...).bucket()``. With them the host reads neither
                ``lengths`` nor ``mask``. All shapes follow from ``features`` and ``sizes``, so ``torch.compile`` and
                CUDA graphs take any batch that fits.
            statistics: Mean and scale of the input normalisation, 0-d or (1,); None: those of ``input_norm``.

        Raises:
            ValueError: Inputs of the wrong shape or dtype; a model without a decoder (``decoder_layers=0``); no clip
                has both visible and masked tokens (with ``sizes`` this is not checked, and the losses are 0).
        """
        if self.config.decoder_layers == 0:
            raise ValueError("this model is an encoder alone (decoder_layers=0): it has features but no losses")
        # Draws the mask if there is none. layout.tokens, .visible and .masked hold clip and token of the packed rows.
        (layout,) = self._token_layouts(features, lengths, mask, generator=generator, sizes=sizes)
        cfg = self._exec_config(features.device)
        with torch.autocast(features.device.type, enabled=False):  # the casts to cfg.dtype are written out
            visible_patches, target = self.normalized_patches(features, layout, cfg, input_stats=statistics)
            latent, _ = self.forward_encoder(visible_patches, layout, cfg)
            decoded = self.forward_decoder(latent, layout, cfg)
            reconstruction, classification = linear(decoded, self.head).split(self.config.patch_dim, dim=1)
            return self.forward_loss(reconstruction, classification, target=target, layout=layout, cfg=cfg)

    def forward_encoder(
        self, patches: Tensor, layout: TokenLayout, cfg: ExecConfig, *, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode the visible tokens.

        Args:
            patches: (Nv, P) normalised patches of the visible tokens.
            layout: Layout of the batch.
            cfg: Implementation, attention backend and dropout seed of this forward pass.
            layer: Last layer to run, counted from 1. None: all.

        Returns:
            The output (Nv, D) and the output (Nv, D) of each layer.
        """
        config, num_tokens = self.config, layout.mask.shape[1]
        positions = self.encoder_positions(num_tokens, patches.device)[layout.visible.token].to(patches.dtype)
        input_dropout = config.input_dropout if self.training else 0.0
        if config.norm_first:
            x = drop(linear(patches, self.patch_embed), input_dropout) + positions
        else:
            x, bias = linear_without_bias(patches, self.patch_embed)
            x = add_norm(
                x,
                bias,
                positions,
                self.encoder.norm,
                dropout=input_dropout,
                dropout_site=StemSite.ENCODER,
                cfg=cfg,
            )
        x = drop(x, config.dropout if self.training else 0.0)
        return self.encoder(x, layout.visible, cfg, layer=layer)

    def forward_decoder(self, latent: Tensor, layout: TokenLayout, cfg: ExecConfig) -> Tensor:
        """Decode all tokens; the last layer computes the masked ones only.

        Args:
            latent: (Nv, D) encoded visible tokens.
            layout: Layout of the batch.
            cfg: Implementation, attention backend and dropout seed of this forward pass.

        Returns:
            (M, decoder width) output of the masked tokens.
        """
        if self.encoder_projection is not None:
            latent = linear(latent, self.encoder_projection)
        dropout = self.config.dropout if self.training else 0.0
        # Each token's latent or the mask token, plus its position. Post-norm layers follow decoder.norm, which the
        # operation fuses unless the module must be called.
        norm = None if self.config.norm_first else self.decoder.norm
        fused_norm = norm if norm is not None and is_fusible_norm(norm) else None
        called_norm = norm if fused_norm is None else None
        x = ops.scatter_tokens(
            latent,
            self.mask_token,
            self.decoder_positions(layout.mask.shape[1], latent.device),
            layout.tokens.token,
            layout.ids_restore,
            weight=None if fused_norm is None else fused_norm.weight,
            bias=None if fused_norm is None else fused_norm.bias,
            dropout=dropout if called_norm is None else 0.0,
            seed=cfg.seed,
            site=StemSite.DECODER,
            impl=cfg.impl,
        )
        if called_norm is not None:
            x = drop(call(x, called_norm), dropout)
        return self.decoder(x, layout.tokens, cfg, query_rows=layout.query_rows)[0]

    def forward_loss(
        self,
        reconstruction: Tensor,
        classification: Tensor,
        *,
        target: Tensor,
        layout: TokenLayout,
        cfg: ExecConfig,
    ) -> MAEASTOutput:
        """Reconstruction and InfoNCE losses of the masked tokens (paper, section 2.3).

        Args:
            reconstruction: (M, P) predicted patches.
            classification: (M, P) predictions that are to pick out their own target among those of their clip, by
                ``config.temperature``.
            target: (M, P) normalised patches.
            layout: Layout of the batch.
            cfg: Implementation of this forward pass.
        """
        config, masked = self.config, layout.masked
        mse = nce = hit = None
        if config.reconstruction_weight > 0.0:
            mse = ops.masked_mse(reconstruction, target, config.norm_pix_loss, impl=cfg.impl)
        if config.classification_weight > 0.0:
            queries, keys = classification, target
            if config.temperature is not None:
                queries, keys = cosine_operands(classification, target, config.temperature)
            nce, hit = ops.info_nce(
                queries,
                keys,
                masked.cu_seqlens,
                masked.max_seqlen,
                impl=cfg.impl,
                exact=not masked.has_padding_rows,
            )
        return MAEASTOutput(
            **loss_terms(config, layout, mse=mse, nce=nce, hit=hit)._asdict(),
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=target,
            mask=layout.mask,
        )

    def extract_features(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Features:
        """Encoder features of all tokens without a mask (paper, section 4).

        A clip has ceil(frames / kt) * (F // kf) tokens, independent of its batch. Frames past its length count as 0.0
        before normalisation.

        Args:
            features: (B, T, F) floating-point log-mel, not normalised.
            lengths: (B,) integers, real frames of each clip; None: all T.
            layer: Last layer to run, counted from 1; its output is returned as it is. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, a layer that does not exist, more than 48,000 tokens.
        """
        encoded = self.encode(features, lengths, layer)
        packing, num_clips = encoded.packing, len(features)
        max_tokens = self.config.num_tokens(features.shape[1], count_partial=True)

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(num_clips, max_tokens, x.shape[1]).index_put((packing.clip, packing.token), x)

        return Features(unpack(encoded.x), [unpack(state) for state in encoded.states], packing.counts)

    @property
    def mean_feature(self) -> float:
        """The running mean of ``input_norm``."""
        return float(self.input_norm.running_mean)

    def input_stats(self, log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of ``input_norm`` for a batch."""
        return self.input_norm(log_mel, num_frames)

    def encoder_only(self) -> MAEAST:
        """A copy without decoder, mask token and heads (``decoder_layers=0``), in evaluation mode.

        Its features are bit for bit those of this model. Weights are copied, to the CPU in fp32.
        """
        config = dataclasses.replace(self.config, decoder_layers=0)
        encoder = MAEAST(config, impl=self.impl, attention=self.attention)
        names = {*encoder.state_dict(), "encoder_positions.table"}  # a checkpoint's own positions, if it has some
        encoder.load_state_dict({name: tensor for name, tensor in self.state_dict().items() if name in names})
        return encoder.eval()

    def sample_mask(
        self,
        frames: Tensor,
        width: int,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        clip_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Draw the masks of a batch by ``config.masking``, as ``ops.sample_mask``.

        Args:
            frames: (B,) int64 real frames of each clip.
            width: Frames T of the batch.
            generator: Random generator of the seed; None: torch's default.
            seed: Seed instead of a generator, an integer or a 0-d int64 tensor.
            clip_ids: (B,) int64 numbers of the clips; None: their row numbers.
            epoch: Number of the pass over the data, from 0.

        Returns:
            (B, L) bool, True = masked.
        """
        return self._draw_mask(frames, width, generator=generator, seed=seed, clip_ids=clip_ids, epoch=epoch)

    @property
    def _prediction_stride(self) -> int:
        return self.config.prediction_stride if self.training else 1

    @property
    def max_frames(self) -> int:
        """Largest number of frames T of a batch, from ``MAX_TOKENS``."""
        return MAX_TOKENS // self.config.grid_f * self.config.patch_size[0]

    def _check(self, features: Tensor, lengths: Tensor | None, check_values: bool = True) -> Tensor:
        num_frames = super()._check(features, lengths, check_values)
        max_tokens = self.config.num_tokens(features.shape[1], count_partial=True)
        if max_tokens > MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS} tokens per clip, got {max_tokens}: cut long recordings into chunks")
        return num_frames

    @classmethod
    def from_fairseq_state_dict(cls, state_dict: dict[str, Tensor], cfg: dict[str, Any], **init: Any) -> MAEAST:
        """Build a model from the ``model`` and ``cfg`` of a checkpoint of the paper's own code (fairseq).

        Args:
            state_dict: Official parameter names to tensors.
            cfg: Official options: nested (``cfg["model"]`` and so on), flat, or with ``cfg/model/`` prefixes.
            **init: ``impl``, ``attention`` and ``recompute``.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: Missing or unexpected weights, all listed; an option that MAE-AST does not have.
        """
        from ..checkpoints.fairseq import convert_state_dict, fairseq_config

        config = fairseq_config(cfg)
        model = cls(config, **init)
        model.load_state_dict(convert_state_dict(state_dict, config))
        return model.eval()
