"""MAE-AST: a deep encoder over the visible tokens, a shallow decoder over all of them, two losses (arXiv 2203.16691).

Letters: B clips, T frames, F mel bins, L tokens per clip, N packed rows, M masked rows, D width, P values per patch, H
heads, kt and kf frames and mel bins per patch. Between the spectrogram and the losses everything is packed: the rows of
all clips one after another, without padding or cropping.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..devices import send
from ..ops.dropout import drop
from ..ops.packing import Packing, TokenCounts, real_tokens
from .base import Encoded, PretrainingModel, frame_counts
from .config import MAEASTConfig
from .transformer import (
    SITES_PER_LAYER,
    ExecConfig,
    Positions,
    QueryRows,
    TransformerStack,
    add_norm,
    call,
    is_fusible_norm,
    linear,
    linear_without_bias,
)

MAX_TOKENS = 48_000  # the paper's position table; 16 minutes of audio for both models


@dataclass
class MAEASTOutput:
    """Losses and predictions of one batch. Rows run clip by clip, tokens ascending; M is the number of masked tokens.

    If ``forward`` was given sizes with padding rows, M includes them. Padding rows come last, belong to no clip and
    have no meaning.

    Attributes:
        loss: Weighted total, 0-d; a mean over all masked tokens of the batch, as the next three.
        loss_reconstruction: Mean squared error, unweighted, 0-d; 0 if that objective is off.
        loss_classification: InfoNCE, unweighted, 0-d; 0 if that objective is off.
        accuracy: Share of masked rows whose largest product is with their own target, 0-d; 0 if InfoNCE is off.
        loss_per_clip: (B,) weighted total of each clip; 0 for a clip without visible or without masked tokens.
        pred_reconstruction: (M, P).
        pred_classification: (M, P).
        target: (M, P) normalised patches; in two passes of SSAST a pair.
        mask: (B, L) bool, True = masked, as used: False past a clip's tokens. In two passes of SSAST a pair.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    loss_per_clip: Tensor
    pred_reconstruction: Tensor
    pred_classification: Tensor
    target: Tensor | tuple[Tensor, Tensor]
    mask: Tensor | tuple[Tensor, Tensor]


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


class InputNorm(nn.Module):
    """Batch normalisation of the whole spectrogram as one channel, without affine parameters, times 0.5; eps 1e-5.

    In training it uses the statistics of the batch's real frames (the paper's code also counts padded frames). In
    evaluation it uses the running statistics, which training updates with momentum 0.1 and the unbiased variance.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of a batch, such that (x - mean) * scale is normalised.

        Args:
            log_mel: (B, T, F).
            num_frames: (B,) int64 real frames per clip.
        """
        if not self.training:
            return self.running_mean, 0.5 * (self.running_var + 1e-5).rsqrt()
        count, mean, variance = self.batch_stats(log_mel, num_frames)
        return self.update_running(count, mean, variance)

    @staticmethod
    @torch.no_grad()
    def batch_stats(log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and variance (0-d) of the real values of a batch; all 0 if it has none.

        Args:
            log_mel: (B, T, F).
            num_frames: (B,) int64 real frames per clip.
        """
        dtype = torch.promote_types(log_mel.dtype, torch.float32)
        valid = real_tokens(num_frames, log_mel.shape[1])[:, :, None]
        count = num_frames.sum() * log_mel.shape[2]
        divisor = count.clamp(min=1).to(dtype)
        mean = torch.where(valid, log_mel, 0).sum(dtype=dtype) / divisor
        variance = torch.where(valid, log_mel - mean, 0).square().sum(dtype=dtype) / divisor
        return count, mean, variance

    @staticmethod
    def merge_stats(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The statistics of several batches taken as one: number, mean and variance (0-d).

        Computed in fp64, so that the order of the batches does not matter.

        Args:
            counts: (N,) as ``batch_stats`` returns them for each of N batches, as the two others.
            means: (N,).
            variances: (N,).
        """
        counts, means, variances = counts.double(), means.double(), variances.double()
        count = counts.sum()
        divisor = count.clamp(min=1)
        mean = (counts * means).sum() / divisor
        return count, mean, (counts * (variances + (means - mean).square())).sum() / divisor

    @torch.no_grad()
    def update_running(self, count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the running statistics towards those of a batch; returns mean and scale for that batch.

        Args:
            count: 0-d number of values, as ``batch_stats`` or ``merge_stats`` returns it, as the two others.
            mean: 0-d.
            variance: 0-d, biased.
        """
        dtype = mean.dtype
        divisor = count.clamp(min=1).to(dtype)
        unbiased = variance * divisor / (divisor - 1).clamp(min=1)
        # Skip a batch without frames, and one with a value that is not finite.
        usable = (count > 0) & mean.isfinite() & unbiased.isfinite()
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            batch = torch.where(usable, batch.to(running.dtype), running)
            running.lerp_(batch, (0.1 * usable.to(dtype)).to(running.dtype))
        self.num_batches_tracked += usable
        return mean, 0.5 * (variance + 1e-5).rsqrt()


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
        self.encoder_positions = Positions(width)
        # Dropout sites 0 and 1 are those of the input of encoder and decoder; the layers' follow.
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
            self.decoder_positions = Positions(decoder_width)
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
        config = self.config
        if config.decoder_layers == 0:
            raise ValueError("this model is an encoder alone (decoder_layers=0): it has features but no losses")
        num_frames = self._check(features, lengths, check_values=sizes is None)
        num_tokens = num_frames // config.patch_size[0] * config.grid_f
        max_tokens = features.shape[1] // config.patch_size[0] * config.grid_f
        drawn = mask is None
        if mask is None:
            mask = self.sample_mask(num_frames, features.shape[1], generator=generator)
        else:
            mask = self._check_mask(mask, num_tokens, max_tokens, check_values=sizes is None)
        real = real_tokens(num_tokens, max_tokens)
        is_visible, is_masked = real & ~mask, real & mask
        if sizes is None:
            sizes = self.exact_sizes(features, lengths, None if drawn else (is_visible, is_masked))
        tokens = Packing.of(
            real,
            sizes.visible + sizes.masked,
            max_seqlen=sizes.max_tokens,
            has_padding_rows=sizes.has_padding_rows,
        )
        visible = Packing.of(
            is_visible, sizes.visible, max_seqlen=sizes.max_visible, has_padding_rows=sizes.has_padding_rows
        )
        masked = Packing.of(
            is_masked, sizes.masked, max_seqlen=sizes.max_masked, has_padding_rows=sizes.has_padding_rows
        )

        mean, scale = self.input_norm(features, num_frames) if statistics is None else statistics
        dtype = self._compute_dtype(features.device)
        cfg = self._exec_config(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            patches, target = ops.gather_patches(
                features,
                mean,
                scale,
                clip=torch.cat((visible.clip, masked.clip)),
                token=torch.cat((visible.token, masked.token)),
                patch_size=config.patch_size,
                dtype=dtype,
                impl=cfg.impl,
            ).split([len(visible.clip), len(masked.clip)])
            target = target.detach()  # targets are data, even if the features are learned
            x = self._encode(patches, visible, max_tokens, cfg)[0]
            if self.encoder_projection is not None:
                x = linear(x, self.encoder_projection)
            x = self._decode(x, mask=mask, tokens=tokens, masked=masked, cfg=cfg)
            reconstruction, classification = linear(x, self.head).split(config.patch_dim, dim=1)
            return self._losses(
                reconstruction=reconstruction,
                classification=classification,
                target=target,
                mask=mask,
                visible=visible,
                masked=masked,
                cfg=cfg,
            )

    def _losses(
        self,
        *,
        reconstruction: Tensor,
        classification: Tensor,
        target: Tensor,
        mask: Tensor,
        visible: Packing,
        masked: Packing,
        cfg: ExecConfig,
    ) -> MAEASTOutput:
        """Losses of the predictions (M, P) of the masked rows."""
        config = self.config
        has_loss = (visible.counts > 0) & (masked.counts > 0)  # (B,), whether a clip adds to the losses
        dtype = torch.promote_types(torch.promote_types(target.dtype, reconstruction.dtype), torch.float32)
        weight = (has_loss[masked.clip] & masked.valid).to(dtype)  # (M,), 0 for rows of other clips and for padding
        zeros = weight.new_zeros(weight.shape)
        mse = nce = hit = zeros
        if config.reconstruction_weight > 0.0:
            mse = ops.masked_mse(reconstruction, target, config.norm_pix_loss, impl=cfg.impl) * weight
        if config.classification_weight > 0.0:
            nce, hit = ops.info_nce(
                classification,
                target,
                masked.cu_seqlens,
                masked.max_seqlen,
                impl=cfg.impl,
                exact=not masked.has_padding_rows,
            )
            nce, hit = torch.where(weight > 0, nce, 0), hit * weight  # InfoNCE of padding rows is undefined
        count = weight.sum().clamp(min=1)
        total = config.reconstruction_weight * mse + config.classification_weight * nce
        clip_sums = zeros.new_zeros(has_loss.shape[0]).index_add(0, masked.clip, total)
        return MAEASTOutput(
            loss=total.sum() / count,
            loss_reconstruction=mse.sum() / count,
            loss_classification=nce.sum() / count,
            accuracy=hit.sum() / count,
            loss_per_clip=clip_sums / masked.counts.clamp(min=1),
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=target,
            mask=mask,
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
        max_tokens = -(-features.shape[1] // self.config.patch_size[0]) * self.config.grid_f

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(num_clips, max_tokens, x.shape[1]).index_put((packing.clip, packing.token), x)

        return Features(unpack(encoded.x), [unpack(state) for state in encoded.states], packing.counts)

    @property
    def mean_feature(self) -> float:
        """The running mean of ``input_norm``."""
        return float(self.input_norm.running_mean)

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Encoder features like those of ``extract_features``, with the tokens of all clips packed."""
        config = self.config
        self._check_layer(layer)
        num_frames = self._check(features, lengths)
        num_clips, max_frames = features.shape[:2]
        kt, grid_f = config.patch_size[0], config.grid_f
        valid = real_tokens(num_frames, max_frames)[:, :, None]
        log_mel = F.pad(torch.where(valid, features, 0), (0, 0, 0, -max_frames % kt))
        num_tokens = (num_frames + kt - 1) // kt * grid_f
        max_tokens = log_mel.shape[1] // kt * grid_f
        counts = [-(-frames // kt) * grid_f for frames in frame_counts(num_clips, max_frames, lengths)]
        tokens = Packing.of(real_tokens(num_tokens, max_tokens), sum(counts), max_seqlen=max(counts))
        mean, scale = self.input_norm(log_mel, num_frames)
        dtype = self._compute_dtype(log_mel.device)
        cfg = self._exec_config(log_mel.device, dtype)
        with torch.autocast(log_mel.device.type, enabled=False):
            patches = ops.gather_patches(
                log_mel,
                mean,
                scale,
                clip=tokens.clip,
                token=tokens.token,
                patch_size=config.patch_size,
                dtype=dtype,
                impl=cfg.impl,
            )
            x, states = self._encode(patches, tokens, max_tokens, cfg, layer=layer)
        return Encoded(
            x,
            states,
            packing=tokens,
            time_block=tokens.token // grid_f,
            frequency_block=tokens.token % grid_f,
        )

    def _encode(
        self, patches: Tensor, packing: Packing, max_tokens: int, cfg: ExecConfig, *, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode normalised patches (N, P) of clips of at most ``max_tokens`` tokens.

        Returns:
            The output (N, D) and the output (N, D) of each layer.
        """
        config = self.config
        positions = self.encoder_positions(max_tokens)[packing.token].to(patches.dtype)
        input_dropout = config.input_dropout if self.training else 0.0
        if config.norm_first:
            x = drop(linear(patches, self.patch_embed), input_dropout) + positions
        else:
            x, bias = linear_without_bias(patches, self.patch_embed)
            x = add_norm(x, bias, positions, self.encoder.norm, dropout=input_dropout, dropout_site=0, cfg=cfg)
        x = drop(x, config.dropout if self.training else 0.0)
        return self.encoder(x, packing, cfg, layer=layer)

    def _decode(self, visible: Tensor, *, mask: Tensor, tokens: Packing, masked: Packing, cfg: ExecConfig) -> Tensor:
        """Decode encoded visible tokens (Nv, D); returns the decoder's output (M, D) of the masked tokens.

        Args:
            visible: (Nv, D).
            mask: (B, L) bool.
            tokens: Packing of all N tokens.
            masked: Packing of the M masked tokens.
            cfg: Implementation, attention backend and dropout seed of this forward pass.
        """
        is_masked = mask[tokens.clip, tokens.token]
        is_masked = is_masked | ~tokens.valid  # a padding row holds the mask token and gets no gradient
        ids_restore = torch.where(is_masked, -1, (~is_masked).cumsum(0) - 1)
        dropout = self.config.dropout if self.training else 0.0
        norm = None if self.config.norm_first else self.decoder.norm
        fused_norm = norm if norm is not None and is_fusible_norm(norm) else None
        called_norm = norm if fused_norm is None else None
        x = ops.scatter_tokens(
            visible,
            self.mask_token,
            self.decoder_positions(mask.shape[1]),
            tokens.token,
            ids_restore,
            weight=None if fused_norm is None else fused_norm.weight,
            bias=None if fused_norm is None else fused_norm.bias,
            dropout=dropout if called_norm is None else 0.0,
            seed=cfg.seed,
            site=1,
            impl=cfg.impl,
        )
        if called_norm is not None:
            x = drop(call(x, called_norm), dropout)
        # A clip's first row plus the token index, because the decoder's packing has every token.
        masked_rows = tokens.cu_seqlens[masked.clip] + masked.token
        query_rows = QueryRows(masked, torch.where(masked.valid, masked_rows, len(tokens.clip)))
        return self.decoder(x, tokens, cfg, query_rows=query_rows)[0]

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
        config = self.config
        kt, grid_f = config.patch_size[0], config.grid_f
        assert config.masking is not None  # set by the configuration's __post_init__
        # The kernel has only the strategies random and chunk.
        impl = self.impl if config.masking in ops.MASK_KERNEL_STRATEGIES else "torch"
        return ops.sample_mask(
            config.masking,
            frames // kt * grid_f,
            grid_f,
            config.mask_ratio,
            generator=generator,
            seed=seed,
            clip_ids=clip_ids,
            epoch=epoch,
            max_tokens=width // kt * grid_f,
            impl=impl,
        )

    @property
    def max_frames(self) -> int:
        """Largest number of frames T of a batch, from ``MAX_TOKENS``."""
        return MAX_TOKENS // self.config.grid_f * self.config.patch_size[0]

    def _check(self, features: Tensor, lengths: Tensor | None, check_values: bool = True) -> Tensor:
        num_frames = super()._check(features, lengths, check_values)
        max_tokens = -(-features.shape[1] // self.config.patch_size[0]) * self.config.grid_f
        if max_tokens > MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS} tokens per clip, got {max_tokens}: cut long recordings into chunks")
        return num_frames

    def _check_mask(self, mask: Tensor, num_tokens: Tensor, max_tokens: int, check_values: bool) -> Tensor:
        """Validate a mask; returns it as (B, max_tokens), False past each clip's tokens."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor (B, L), True = masked, got {got}")
        min_tokens = int(num_tokens.max()) if check_values else 0
        if mask.shape[0] != len(num_tokens) or mask.shape[1] < min_tokens:
            raise ValueError(
                f"mask must be ({len(num_tokens)}, L) with L >= {min_tokens}, the longest clip's tokens, got "
                f"{tuple(mask.shape)}"
            )
        mask = F.pad(send(mask, num_tokens.device)[:, :max_tokens], (0, max(0, max_tokens - mask.shape[1])))
        return mask & real_tokens(num_tokens, max_tokens)

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
