"""MAE-AST: a deep encoder over the visible tokens, a shallow decoder over all of them, two losses (arXiv 2203.16691).

Letters: B clips, T frames, F mel bins, L tokens a clip, N packed rows, D width, P values a patch, H heads. Between the
spectrogram and the losses everything is packed: rows of all clips one after another, nothing padded, nothing cropped.
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
from ..ops import reference
from ..ops.packing import Packing, TokenCounts, real_tokens
from .base import Encoded, PretrainingModel, listed_frames
from .config import MAEASTConfig
from .transformer import (
    SITES,
    ExecConfig,
    Positions,
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
    """Losses and predictions of one batch. Rows run clip by clip, tokens ascending; sum M is their number.

    Where forward was given sizes rounded up, so many rows: those past sum M belong to no clip and mean nothing.

    Attributes:
        loss: Weighted total, a scalar; means over all masked tokens of the batch.
        loss_reconstruction: Mean squared error, unweighted; 0 where that objective is off.
        loss_classification: InfoNCE, unweighted; 0 where that objective is off.
        accuracy: Share of masked rows whose largest product is with their own target; 0 where InfoNCE is off.
        loss_per_clip: (B,) weighted total of each clip; 0 for a clip without visible or without masked tokens.
        pred_reconstruction: (sum M, P).
        pred_classification: (sum M, P).
        target: (sum M, P) normalised patches.
        mask: (B, L) bool, True = masked, as used: False past a clip's tokens.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    loss_per_clip: Tensor
    pred_reconstruction: Tensor
    pred_classification: Tensor
    target: Tensor
    mask: Tensor


@dataclass
class Features:
    """Encoder features of a batch; rows past ``lengths`` are exactly 0.

    Attributes:
        last_hidden_state: (B, L, D), output of the stack, or of the layer that was asked for.
        hidden_states: one (B, L, D) a layer, the first layer's first.
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
        impl: "auto", "torch" or "triton": which implementation of the operations runs. What has no kernel runs as
            plain PyTorch in either: matrix products, the residual connections of pre-norm layers, and mask sampling
            other than random and chunk.
        attention: "auto" or the name of an attention backend (attention.py).
        recompute: What the backward computes again instead of keeping it: "none", "gelu" (the output of the GELU, a
            fourth of a layer's memory) or "layer" (all inside a layer). Same results.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available.
    """

    config_class, model_type = MAEASTConfig, "mae_ast"

    def __init__(
        self, config: MAEASTConfig, impl: str = "auto", attention: str = "auto", recompute: str = "none"
    ) -> None:
        super().__init__(config, impl, attention, recompute)
        width, decoder_width = config.embed_dim, config.decoder_embed_dim
        self.input_norm = InputNorm()
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.encoder_positions = Positions(width)
        self.encoder = TransformerStack(width, config.encoder_layers, config.encoder_layerdrop, config, SITES)
        if config.decoder_layers:
            self.encoder_projection = nn.Linear(width, decoder_width) if config.has_projection else None
            self.mask_token = nn.Parameter(torch.rand(decoder_width))
            self.decoder_positions = Positions(decoder_width)
            site = SITES * (1 + config.encoder_layers)
            self.decoder = TransformerStack(
                decoder_width, config.decoder_layers, config.decoder_layerdrop, config, site
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

        On a GPU the host waits for nothing where it knows the sizes of the batch: ``lengths`` is None or lies on the
        CPU and the mask is drawn here, or ``sizes`` is given.

        Args:
            features: (B, T, F) log-mel, not normalised.
            lengths: (B,) real frames of each clip; None: all T. A clip's whole patches count, its tail frames do not.
            mask: (B, L) bool, True = masked, L at least the longest clip's tokens; entries past a clip's tokens are
                ignored, and clips may hide different counts. None draws one by ``config.masking``.
            generator: Source of that draw; None is torch's default.
            sizes: Of ``sizes_of``, or ``sizes_of(...).bucket()``: then neither ``lengths`` nor ``mask`` is read on
                the host, all shapes follow from ``features`` and ``sizes``, and ``torch.compile`` and CUDA graphs take
                any batch that fits.
            statistics: Mean and scale of the input normalisation, 0-d or (1,); None: those of ``input_norm``.

        Raises:
            ValueError: Inputs of the wrong shape or dtype; no clip has both visible and masked tokens (not looked for
                with ``sizes``: the losses are 0 then); an encoder alone (``decoder_layers=0``).
        """
        config = self.config
        if config.decoder_layers == 0:
            raise ValueError("this model is an encoder alone (decoder_layers=0): it extracts features, no losses")
        frames = self._check(features, lengths, values=sizes is None)
        tokens = frames // config.patch_size[0] * config.grid_f
        width = features.shape[1] // config.patch_size[0] * config.grid_f
        drawn = mask is None
        if drawn:
            mask = self.sample_mask(frames, features.shape[1], generator=generator)
        else:
            mask = self._check_mask(mask, tokens, width, values=sizes is None)
        real = real_tokens(tokens, width)
        seen, hidden = real & ~mask, real & mask
        if sizes is None:
            sizes = self.exact_sizes(features, lengths, None if drawn else (seen, hidden))
        rows = sizes.visible + sizes.masked
        every = Packing.of(real, rows, max_seqlen=sizes.max_tokens, has_padding_rows=sizes.has_padding_rows)
        visible = Packing.of(seen, sizes.visible, max_seqlen=sizes.max_visible, has_padding_rows=sizes.has_padding_rows)
        masked = Packing.of(hidden, sizes.masked, max_seqlen=sizes.max_masked, has_padding_rows=sizes.has_padding_rows)

        mean, scale = self.input_norm(features, frames) if statistics is None else statistics
        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            clip, token = torch.cat((visible.clip, masked.clip)), torch.cat((visible.token, masked.token))
            gathered = ops.gather_patches(
                features, mean, scale, clip, token, config.patch_size, dtype=dtype, impl=run.impl
            )
            patches, target = gathered.split([len(visible.clip), len(masked.clip)])
            target = target.detach()  # what is to be predicted is data, also where features are learned
            x = self._encode(patches, visible, width, run)[0]
            if self.encoder_projection is not None:
                x = linear(x, self.encoder_projection)
            x = self._decode(x, mask, every, masked, run)
            predictions = linear(x, self.head).split(config.patch_dim, dim=1)
            return self._losses(*predictions, target, mask, visible, masked, run)

    def _losses(
        self,
        reconstruction: Tensor,
        classification: Tensor,
        target: Tensor,
        mask: Tensor,
        visible: Packing,
        rows: Packing,
        run: ExecConfig,
    ) -> MAEASTOutput:
        config = self.config
        used = (visible.counts > 0) & (rows.counts > 0)  # (B,), whether a clip adds to the losses
        dtype = torch.promote_types(torch.promote_types(target.dtype, reconstruction.dtype), torch.float32)
        weight = (used[rows.clip] & rows.valid).to(dtype)  # (N,): 0 where a clip adds none
        off = weight.new_zeros(weight.shape)
        mse = nce = hit = off
        if config.reconstruction_weight > 0.0:
            mse = ops.masked_mse(reconstruction, target, config.norm_pix_loss, impl=run.impl) * weight
        if config.classification_weight > 0.0:
            lengths = rows.cu_seqlens, rows.max_seqlen
            nce, hit = ops.info_nce(classification, target, *lengths, impl=run.impl, exact=not rows.has_padding_rows)
            nce, hit = torch.where(weight > 0, nce, 0), hit * weight  # of a clip without masked tokens it is undefined
        count = weight.sum().clamp(min=1)
        total = config.reconstruction_weight * mse + config.classification_weight * nce
        per_clip = off.new_zeros(used.shape[0]).index_add(0, rows.clip, total) / rows.counts.clamp(min=1)
        return MAEASTOutput(
            loss=total.sum() / count,
            loss_reconstruction=mse.sum() / count,
            loss_classification=nce.sum() / count,
            accuracy=hit.sum() / count,
            loss_per_clip=per_clip,
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=target,
            mask=mask,
        )

    def extract_features(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Features:
        """Encoder features of all tokens, nothing masked (paper, section 4).

        A clip has ceil(frames / kt) * (F // kf) tokens whatever it is batched with; frames past its length count as
        0.0 before normalisation.

        Args:
            features: (B, T, F) log-mel, not normalised.
            lengths: (B,) real frames of each clip; None: all T.
            layer: Stop after this layer, counted from 1; its output is returned as it is. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, a layer that does not exist, more than 48,000 tokens.
        """
        found = self.encode(features, lengths, layer)
        rows, clips = found.rows, len(features)
        width = -(-features.shape[1] // self.config.patch_size[0]) * self.config.grid_f

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(clips, width, x.shape[1]).index_put((rows.clip, rows.token), x)

        return Features(unpack(found.x), [unpack(state) for state in found.states], rows.counts)

    @property
    def mean_feature(self) -> float:
        """The running mean of ``input_norm``."""
        return float(self.input_norm.running_mean)

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """As ``extract_features``, the tokens of all clips packed."""
        config = self.config
        self._check_layer(layer)
        frames = self._check(features, lengths)
        (clips, longest, _), kt = features.shape, config.patch_size[0]
        valid = real_tokens(frames, features.shape[1])[:, :, None]
        features = F.pad(torch.where(valid, features, 0), (0, 0, 0, -features.shape[1] % kt))
        tokens = (frames + kt - 1) // kt * config.grid_f
        width = features.shape[1] // kt * config.grid_f
        listed = [-(-count // kt) * config.grid_f for count in listed_frames(clips, longest, lengths)]
        every = Packing.of(real_tokens(tokens, width), sum(listed), max_seqlen=max(listed))
        mean, scale = self.input_norm(features, frames)
        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            rows = every.clip, every.token, config.patch_size
            patches = ops.gather_patches(features, mean, scale, *rows, dtype=dtype, impl=run.impl)
            x, states = self._encode(patches, every, width, run, layer)
        return Encoded(x, states, every, every.token // config.grid_f, every.token % config.grid_f)

    def _encode(
        self, patches: Tensor, rows: Packing, width: int, run: ExecConfig, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Normalised patches (N, P) of clips of at most ``width`` tokens -> output (N, D), and that of every layer."""
        config = self.config
        positions = self.encoder_positions(width)[rows.token].to(patches.dtype)
        drop = config.input_dropout if self.training else 0.0
        if config.norm_first:
            x = reference.drop(linear(patches, self.patch_embed), drop) + positions
        else:
            x, bias = linear_without_bias(patches, self.patch_embed)
            x = add_norm(x, bias, positions, self.encoder.norm, drop, run, site=0, fork=False)
        return self.encoder(reference.drop(x, config.dropout if self.training else 0.0), rows, run, layer)

    def _decode(self, visible: Tensor, mask: Tensor, every: Packing, masked: Packing, run: ExecConfig) -> Tensor:
        """Encoded visible tokens (Nv, D) -> decoder output of the masked tokens (M, D)."""
        hidden = mask[every.clip, every.token]
        hidden = hidden | ~every.valid  # a row of no clip gets the mask token, and takes no gradient
        inverse = torch.where(hidden, -1, (~hidden).cumsum(0) - 1)
        drop = self.config.dropout if self.training else 0.0
        norm = None if self.config.norm_first else self.decoder.norm
        fused = norm is not None and is_fusible_norm(norm)
        called = norm is not None and not fused
        x = ops.scatter_tokens(
            visible,
            self.mask_token,
            self.decoder_positions(mask.shape[1]),
            every.token,
            inverse,
            weight=norm.weight if fused else None,
            bias=norm.bias if fused else None,
            dropout=0.0 if called else drop,
            seed=run.seed,
            site=1,
            impl=run.impl,
        )
        if called:
            x = reference.drop(call(x, norm), drop)
        place = every.cu_seqlens[masked.clip] + masked.token  # a clip's row numbers are its token indices
        only = masked, torch.where(masked.valid, place, len(every.clip))
        return self.decoder(x, every, run, only=only)[0]

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
        """Draws the masks of a batch by ``config.masking``: (B, L) bool, True = masked; see ``masking.sample_mask``.

        Args:
            frames: (B,) int64 real frames of each clip.
            width: Frames T of the batch.
            generator: This and the following as in ``masking.sample_mask``.
            seed: Excludes ``generator``.
            clip_ids: (B,) int64.
            epoch: Number of the pass over the data.
        """
        config = self.config
        kt, grid_f = config.patch_size[0], config.grid_f
        # The kernel knows the strategies random and chunk alone.
        impl = self.impl if config.masking in ops.MASK_KERNEL_STRATEGIES else "torch"
        draw = config.masking, frames // kt * grid_f, grid_f, config.mask_ratio, generator, seed, clip_ids, epoch
        return ops.sample_mask(*draw, max_tokens=width // kt * grid_f, impl=impl)

    @property
    def max_frames(self) -> int:
        """Most frames T of a batch: those of ``MAX_TOKENS``."""
        return MAX_TOKENS // self.config.grid_f * self.config.patch_size[0]

    def _check(self, features: Tensor, lengths: Tensor | None, values: bool = True) -> Tensor:
        frames = super()._check(features, lengths, values)
        tokens = -(-features.shape[1] // self.config.patch_size[0]) * self.config.grid_f
        if tokens > MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS} tokens a clip, got {tokens}: cut long recordings into chunks")
        return frames

    def _check_mask(self, mask: Tensor, tokens: Tensor, width: int, values: bool) -> Tensor:
        """Validates a mask; returns it as (B, width), False past each clip's tokens."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor (B, L), True = masked, got {got}")
        longest = int(tokens.max()) if values else 0
        if mask.shape[0] != len(tokens) or mask.shape[1] < longest:
            raise ValueError(
                f"mask must be ({len(tokens)}, L) with L >= {longest}, the longest clip's tokens, got "
                f"{tuple(mask.shape)}"
            )
        mask = F.pad(send(mask, tokens.device)[:, :width], (0, max(0, width - mask.shape[1])))
        return mask & real_tokens(tokens, width)

    @classmethod
    def from_fairseq_state_dict(cls, state_dict: dict[str, Tensor], cfg: dict[str, Any], **init: Any) -> MAEAST:
        """A model from the weights and options of the paper's own code (an fairseq checkpoint's ``model``, ``cfg``).

        Args:
            state_dict: Official parameter names to tensors.
            cfg: Official options: nested (``cfg["model"]`` and so on), flat, or with ``cfg/model/`` prefixes.
            **init: ``impl``, ``attention`` and ``recompute``.

        Raises:
            ValueError: Missing or unexpected weights, all listed; an option that MAE-AST does not have.
        """
        from ..checkpoints.fairseq import convert_state_dict, fairseq_config

        config = fairseq_config(cfg)
        model = cls(config, **init)
        model.load_state_dict(convert_state_dict(state_dict, config))
        return model.eval()


def encoder_alone(model: MAEAST) -> MAEAST:
    """The model without decoder, mask token and heads (``decoder_layers=0``); its features are the same to the bit."""
    config = dataclasses.replace(model.config, decoder_layers=0)
    encoder = MAEAST(config, impl=model.impl, attention=model.attention)
    wanted = {*encoder.state_dict(), "encoder_positions.table"}  # a checkpoint's own positions, where it has some
    encoder.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in wanted})
    return encoder.eval()
