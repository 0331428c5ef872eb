"""SSAST, the baseline: a ViT over all tokens of a spectrogram, the masked ones replaced (arXiv 2110.09784).

Data, losses, kernels and attention are those of MAE-AST: packed rows of clips of any length, without padding.
Letters: B clips, T frames, F mel bins, L tokens per clip, N packed rows, M masked rows, D width, P values per patch, kt
and kf frames and mel bins per patch, n_t time blocks of the batch.

Differences from MAE-AST: the image is (F, T), so that token = frequency block * n_t + time block, and within a patch
index = f * kt + t. Two class tokens precede each clip. Positions are learned, for ``input_frames`` frames; a shorter
clip takes those of the leading time blocks. InfoNCE runs over the predictions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..devices import send
from ..ops.packing import Packing, TokenCounts, real_tokens
from .base import Encoded, PretrainingModel, frame_counts
from .config import SSASTConfig
from .mae_ast import MAEASTOutput
from .transformer import SITES_PER_LAYER, ExecConfig, QueryRows, TransformerStack, call, is_plain, linear

CLASS_TOKENS = 2  # of DeiT: class and distillation; nothing is trained on their output
_SECOND_SEED = 0x5BF03635F0B7A54D  # xor of the seeds of the two passes' masks


class _PositionRows(torch.autograd.Function):
    """Rows of a table (W, D) by the index clip * W + token, or B * W for no row: (N,) -> (N, D) in ``dtype``.

    The gradient is summed over clips in a fixed order and in the table's dtype. That of plain indexing has no fixed
    order.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - an autograd function takes no keywords
        ctx: Any, table: Tensor, index: Tensor, num_clips: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.table = num_clips, *table.shape, table.dtype
        return table.to(dtype).index_select(0, index % table.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        num_clips, table_len, width, dtype = ctx.table
        padded = grad.new_zeros(num_clips * table_len + 1, width).index_copy(0, index, grad)[:-1]
        return padded.view(num_clips, table_len, width).sum(0, dtype=dtype), None, None, None


@dataclass
class _Embedded:
    """Input of the encoder for one pass.

    Attributes:
        x: (N, D) class tokens, embedded visible patches and mask tokens, with positions.
        tokens: Packing of the N rows; its token indices count the class tokens.
        visible: Packing of the visible patches.
        masked: Packing of the M masked patches.
        target: (M, P) masked patches.
    """

    x: Tensor
    tokens: Packing
    visible: Packing
    masked: Packing
    target: Tensor


@dataclass
class _Pass:
    """Output of the encoder for one pass, as the losses need it.

    Attributes:
        x: (M, D) output of the masked tokens.
        target: (M, P) their patches.
        masked: Packing of the M rows.
        has_loss: (B,) bool, whether a clip adds to the losses.
    """

    x: Tensor
    target: Tensor
    masked: Packing
    has_loss: Tensor


class SSAST(PretrainingModel):
    """Self-supervised audio spectrogram transformer, patch or frame model.

    Args:
        config: Sizes, masking and objective.
        impl: "auto", "torch" or "triton": the implementation of the operations. Operations without a kernel run in
            PyTorch in both: matrix products, residual connections and norms of pre-norm layers.
        attention: "auto" or the name of an attention backend (ops/attention).
        recompute: "none", "gelu" or "layer", as in MAEAST.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available.
    """

    config_class, model_type = SSASTConfig, "ssast"
    config: SSASTConfig

    def __init__(
        self, config: SSASTConfig, impl: str = "auto", attention: str = "auto", recompute: str = "none"
    ) -> None:
        super().__init__(config, impl, attention, recompute)
        width = config.embed_dim
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.dist_token = nn.Parameter(torch.empty(width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(CLASS_TOKENS + config.num_patches, width))
        self.encoder = TransformerStack(width, config.layers, config, layerdrop=0.0, dropout_site=SITES_PER_LAYER)
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.classification_head = _head(width, config.patch_dim)
        self.reconstruction_head = _head(width, config.patch_dim)
        for parameter in (self.cls_token, self.dist_token, self.positions):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.mask_token, std=width**-0.5)
        # The head of an objective that is off stays, untrained, so that weights fit any objective.
        self.classification_head.requires_grad_(config.classification_weight > 0.0)
        self.reconstruction_head.requires_grad_(config.reconstruction_weight > 0.0)

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        *,
        sizes: TokenCounts | None = None,
    ) -> MAEASTOutput:
        """Masked pretraining losses (paper, section 2.3).

        Args:
            features: (B, T, F) floating-point log-mel, normalised, as the method ``features`` computes it from
                waveforms. T is at most ``config.input_frames``.
            lengths: (B,) integers, real frames of each clip; None: all T. Frames after a clip's last whole patch are
                ignored.
            mask: (B, L) bool, True = masked, L = (F // kf) * (T // kt) in the order of the tokens (see the module).
                Entries past a clip's time blocks are ignored, and the number of masked tokens may differ between clips.
                For "joint_two_pass" a pair of masks, for the passes of InfoNCE and of the MSE. None draws by
                ``sample_mask``.
            generator: Random generator of that draw; None: torch's default.
            sizes: Token counts, as for MAEAST; the same for both passes.

        Returns:
            As for MAEAST; rows run clip by clip, tokens ascending. Means are over all masked tokens of the batch. The
            loss is InfoNCE + 10 * MSE, or the one of the two that is the objective; the prediction of the other one is
            then empty, (0, P). Accuracy is the share of predictions whose own target is, among the clip's targets, the
            one with the largest softmax over predictions for them. In two passes ``target`` and ``mask`` are pairs, and
            the rows of each prediction are those of its pass.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, or longer than ``input_frames``; no clip has both visible
                and masked tokens (with ``sizes`` this is not checked, and the losses are 0).
        """
        config = self.config
        num_frames = self._check(features, lengths, check_values=sizes is None)
        kt, n_t = config.patch_size[0], features.shape[1] // config.patch_size[0]
        drawn = mask is None
        if drawn:
            mask = self.sample_mask(num_frames, features.shape[1], generator=generator)
        real = real_tokens(num_frames // kt, n_t)[:, None, :].expand(-1, config.grid_f, -1).flatten(1)
        masks = [real & one_mask for one_mask in self._check_masks(mask, real)]
        if sizes is not None:
            pass_sizes = [sizes] * len(masks)
        elif drawn:
            pass_sizes = [self.exact_sizes(features, lengths, None)] * len(masks)
        else:
            pass_sizes = [self.exact_sizes(features, lengths, (real & ~is_masked, is_masked)) for is_masked in masks]

        dtype = self._compute_dtype(features.device)
        cfg = self._exec_config(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            passes = [
                self._encode(features, real, is_masked, counts, dtype=dtype, cfg=cfg)
                for is_masked, counts in zip(masks, pass_sizes, strict=True)
            ]
            used = (masks[0], masks[1]) if config.objective == "joint_two_pass" else masks[0]
            return self._losses(passes, used, cfg)

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Encoder features of all patches without a mask (paper, section 2.4), without those of the class tokens.

        Args:
            features: (B, T, F), as for ``forward``; frames past ``config.input_frames`` are ignored.
            lengths: (B,) integers, real frames of each clip; None: all T. A clip's last patch is filled up with zeros.
            layer: Last layer to run, counted from 1. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, or a layer that does not exist.
        """
        self._check_layer(layer)
        num_frames = self._check(features, lengths)
        kt, grid_f = self.config.patch_size[0], self.config.grid_f
        num_clips, max_frames = features.shape[:2]
        host_frames = frame_counts(num_clips, max_frames, lengths)
        valid = real_tokens(num_frames, max_frames)[:, :, None]
        log_mel = F.pad(torch.where(valid, features, 0), (0, 0, 0, -max_frames % kt))
        log_mel, n_t = log_mel[:, : self.config.grid_t * kt], min(log_mel.shape[1] // kt, self.config.grid_t)
        num_blocks = ((num_frames + kt - 1) // kt).clamp(max=n_t)
        real = real_tokens(num_blocks, n_t)[:, None, :].expand(-1, grid_f, -1).flatten(1)
        counts = [min(-(-frames // kt), n_t) * grid_f for frames in host_frames]
        sizes = TokenCounts.of(counts, [0] * len(counts))
        dtype = self._compute_dtype(log_mel.device)
        cfg = self._exec_config(log_mel.device, dtype)
        with torch.autocast(log_mel.device.type, enabled=False):
            embedded = self._embed(log_mel, real, torch.zeros_like(real), sizes, dtype=dtype, cfg=cfg)
            x, states = self.encoder(embedded.x, embedded.tokens, cfg, layer=layer)
        packing = Packing.of(real, sizes.visible, max_seqlen=sizes.max_visible)
        # A clip's class tokens are its first rows: shift each patch by those of its clip and of all before it.
        patch_rows = torch.arange(len(packing.clip), device=packing.clip.device) + CLASS_TOKENS * (packing.clip + 1)
        return Encoded(
            x[patch_rows],
            [state[patch_rows] for state in states],
            packing=packing,
            time_block=packing.token % n_t,
            frequency_block=packing.token // n_t,
        )

    def _encode(
        self, log_mel: Tensor, real: Tensor, mask: Tensor, sizes: TokenCounts, *, dtype: torch.dtype, cfg: ExecConfig
    ) -> _Pass:
        """One pass: encode all rows of ``_embed``; the last layer computes only the masked ones."""
        embedded = self._embed(log_mel, real, mask, sizes, dtype=dtype, cfg=cfg)
        tokens, visible, masked = embedded.tokens, embedded.visible, embedded.masked
        selected = torch.cat((real.new_ones(len(real), CLASS_TOKENS), real), 1)
        row_in_clip = selected.cumsum(1) - 1
        masked_rows = tokens.cu_seqlens[masked.clip] + row_in_clip[masked.clip, masked.token + CLASS_TOKENS]
        query_rows = QueryRows(masked, torch.where(masked.valid, masked_rows, len(tokens.clip)))
        x = self.encoder(embedded.x, tokens, cfg, query_rows=query_rows)[0]
        return _Pass(x, embedded.target.detach(), masked=masked, has_loss=(visible.counts > 0) & (masked.counts > 0))

    def _embed(
        self, log_mel: Tensor, real: Tensor, mask: Tensor, sizes: TokenCounts, *, dtype: torch.dtype, cfg: ExecConfig
    ) -> _Embedded:
        """Embed the visible patches; add mask tokens for the others, class tokens in front, and positions.

        Args:
            log_mel: (B, T, F), normalised.
            real: (B, L) bool, True where a clip has a token.
            mask: (B, L) bool, True = masked, False where ``real`` is False.
            sizes: Token counts, without class tokens.
            dtype: Dtype of the stream.
            cfg: Implementation of this forward pass.
        """
        config = self.config
        kt, kf = config.patch_size
        num_clips, n_t = len(real), log_mel.shape[1] // kt
        selected = torch.cat((real.new_ones(num_clips, CLASS_TOKENS), real), 1)
        tokens = Packing.of(
            selected,
            sizes.visible + sizes.masked + CLASS_TOKENS * num_clips,
            max_seqlen=sizes.max_tokens + CLASS_TOKENS,
            has_padding_rows=sizes.has_padding_rows,
        )
        visible = Packing.of(
            real & ~mask, sizes.visible, max_seqlen=sizes.max_visible, has_padding_rows=sizes.has_padding_rows
        )
        masked = Packing.of(mask, sizes.masked, max_seqlen=sizes.max_masked, has_padding_rows=sizes.has_padding_rows)

        patches, target = ops.gather_patches(
            log_mel[:, : n_t * kt].transpose(1, 2),
            log_mel.new_zeros(()),  # mean 0 and scale 1: the input is normalised
            log_mel.new_ones(()),
            clip=torch.cat((visible.clip, masked.clip)),
            token=torch.cat((visible.token, masked.token)),
            patch_size=(kf, kt),
            dtype=dtype,
            impl=cfg.impl,
        ).split([len(visible.clip), len(masked.clip)])

        # The class tokens of clip i are the visible rows 2 * i and 2 * i + 1, before all patches.
        classes = torch.stack((self.cls_token, self.dist_token)).to(dtype).repeat(num_clips, 1)
        visible_rows = torch.cat((classes, linear(patches, self.patch_embed)))
        is_class = tokens.token < CLASS_TOKENS
        patch = (tokens.token - CLASS_TOKENS).clamp(min=0)
        is_visible = ~is_class & ~mask[tokens.clip, patch]  # a padding row repeats a class token
        ids_restore = torch.where(is_visible, len(classes) - 1 + is_visible.cumsum(0), -1)
        ids_restore = torch.where(tokens.valid & is_class, CLASS_TOKENS * tokens.clip + tokens.token, ids_restore)
        x = ops.scatter_tokens(
            visible_rows,
            self.mask_token,
            # The positions of this operation are fixed; ours are learned, and added below. A table of zeros adds none.
            visible_rows.new_zeros(1, visible_rows.shape[1]),
            torch.zeros_like(tokens.token),
            ids_restore,
            impl=cfg.impl,
        )
        table_len = selected.shape[1]
        index = torch.where(tokens.valid, tokens.clip * table_len + tokens.token, num_clips * table_len)
        x = x + _PositionRows.apply(self._positions(n_t), index, num_clips, dtype)
        return _Embedded(x, tokens, visible=visible, masked=masked, target=target)

    def _positions(self, n_t: int) -> Tensor:
        """Positions (2 + L, D) of the class tokens and of the leading ``n_t`` time blocks."""
        classes, grid = self.positions.split([CLASS_TOKENS, self.config.num_patches])
        grid = grid.unflatten(0, (self.config.grid_f, self.config.grid_t))[:, :n_t]
        return torch.cat((classes, grid.flatten(0, 1)))

    def _losses(self, passes: list[_Pass], mask: Tensor | tuple[Tensor, Tensor], cfg: ExecConfig) -> MAEASTOutput:
        config = self.config
        nce_pass, mse_pass = passes[0], passes[-1]  # the same one if both losses share a pass
        dtype = torch.promote_types(nce_pass.x.dtype, torch.float32)

        def means(values: Tensor, encoded: _Pass) -> tuple[Tensor, Tensor]:
            """Mean over all rows (M,) that add to the losses, 0-d, and mean over the rows of each clip (B,)."""
            masked = encoded.masked
            counted = encoded.has_loss[masked.clip] & masked.valid
            values = torch.where(counted, values, 0).to(dtype)
            clip_sums = values.new_zeros(len(encoded.has_loss)).index_add(0, masked.clip, values)
            return values.sum() / counted.sum().clamp(min=1), clip_sums / masked.counts.clamp(min=1)

        zero = nce_pass.x.new_zeros((), dtype=dtype)
        empty = nce_pass.x.new_zeros(0, config.patch_dim)
        classification = reconstruction = empty
        nce = mse = accuracy = zero
        nce_per_clip = mse_per_clip = zero.expand(len(nce_pass.has_loss))
        if config.classification_weight > 0.0:
            classification = _predict(nce_pass.x, self.classification_head)
            loss, hit = ops.info_nce(
                classification,
                nce_pass.target,
                nce_pass.masked.cu_seqlens,
                nce_pass.masked.max_seqlen,
                over="predictions",
                impl=cfg.impl,
                exact=not nce_pass.masked.has_padding_rows,
            )
            (nce, nce_per_clip), accuracy = means(loss, nce_pass), means(hit, nce_pass)[0]
        if config.reconstruction_weight > 0.0:
            reconstruction = _predict(mse_pass.x, self.reconstruction_head)
            loss = ops.masked_mse(reconstruction, mse_pass.target, impl=cfg.impl)
            mse, mse_per_clip = means(loss, mse_pass)
        return MAEASTOutput(
            loss=config.classification_weight * nce + config.reconstruction_weight * mse,
            loss_reconstruction=mse,
            loss_classification=nce,
            accuracy=accuracy,
            loss_per_clip=config.classification_weight * nce_per_clip + config.reconstruction_weight * mse_per_clip,
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=(nce_pass.target, mse_pass.target) if isinstance(mask, tuple) else nce_pass.target,
            mask=mask,
        )

    def normalize(self, features: Tensor) -> Tensor:
        """Log-mel (B, T, F) to the input of ``forward``: (x - mean) / (2 * std) with the configuration's statistics."""
        return (features - self.config.mean) / (2.0 * self.config.std)

    def sample_mask(
        self,
        frames: Tensor,
        width: int,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        clip_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw the masks of a batch: chunks of patches, or random frames (paper, section 2.2).

        Of a clip's L tokens min(ceil(mask_patches * L / L of a full clip), L - 1) are masked. Which ones depends on the
        seed, the epoch, the clip id and L alone.

        Args:
            frames: (B,) int64 real frames of each clip.
            width: Frames T of the batch.
            generator: Random generator of the seed; None: torch's default.
            seed: Seed instead of a generator, an integer or a 0-d int64 tensor.
            clip_ids: (B,) int64 numbers of the clips; None: their row numbers.
            epoch: Number of the pass over the data, from 0.

        Returns:
            (B, L) bool, True = masked, as ``forward`` takes it; for "joint_two_pass" two of them, drawn independently.
        """
        config = self.config
        kt, grid_f = config.patch_size[0], config.grid_f

        def draw(seed: int | Tensor | None) -> Tensor:
            mask = ops.sample_mask(
                config.masking,
                frames // kt * grid_f,
                grid_f,
                config.mask_ratio,
                generator=generator,
                seed=seed,
                clip_ids=clip_ids,
                epoch=epoch,
                max_tokens=width // kt * grid_f,
                impl=self.impl,
            )
            return mask.unflatten(1, (-1, grid_f)).transpose(1, 2).flatten(1)  # drawn time-major

        if config.objective != "joint_two_pass":
            return draw(seed)
        if seed is None:
            return draw(None), draw(None)
        second = seed ^ _SECOND_SEED
        return draw(seed), draw(second & (2**64 - 1) if isinstance(second, int) else second)

    @property
    def max_frames(self) -> int:
        """Largest number of frames T of a batch: ``config.input_frames``."""
        return self.config.input_frames

    def _check(self, features: Tensor, lengths: Tensor | None, check_values: bool = True) -> Tensor:
        num_frames = super()._check(features, lengths, check_values)
        if features.shape[1] > self.config.input_frames:
            raise ValueError(
                f"at most input_frames={self.config.input_frames} frames per clip, got T={features.shape[1]}: cut "
                "longer clips"
            )
        return num_frames

    def _check_masks(self, mask: Any, real: Tensor) -> tuple[Tensor, ...]:
        """Validate a mask, or a pair of them for two passes; returns all of them, each (B, L)."""
        two_pass = self.config.objective == "joint_two_pass"
        if two_pass and not (isinstance(mask, tuple | list) and len(mask) == 2):
            got = f"{len(mask)} of them" if isinstance(mask, tuple | list) else type(mask).__name__
            raise ValueError(f"mask must be a pair (mask_mpc, mask_mpg) for two passes, got {got}")
        masks = tuple(mask) if two_pass else (mask,)
        for one_mask in masks:
            if not isinstance(one_mask, Tensor) or one_mask.dtype != torch.bool or one_mask.shape != real.shape:
                is_tensor = isinstance(one_mask, Tensor)
                got = f"{one_mask.dtype} {tuple(one_mask.shape)}" if is_tensor else type(one_mask).__name__
                raise ValueError(f"mask must be a bool tensor {tuple(real.shape)}, True = masked, got {got}")
        return tuple(send(one_mask, real.device) for one_mask in masks)

    @classmethod
    def from_official(cls, path: str | os.PathLike[str], num_heads: int | None = None, **init: Any) -> SSAST:
        """Read a pretraining checkpoint of the paper's own code; nothing in the file is executed.

        Sizes come from the weights; the objective is "joint". The file does not contain the number of masked tokens
        (assumed: 400 of 512, and that share of other grids), nor the statistics of the data (assumed: the paper's).

        Args:
            path: The ``.pth`` file: a state dict, with or without DataParallel's prefix ``module.``.
            num_heads: Attention heads; None: width // 64, as in the paper's models.
            **init: ``impl``, ``attention`` and ``recompute`` of the model.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: Not such a file; missing or unexpected weights or weights of the wrong shape, all listed; a
                number of heads that does not fit.
            OSError: The file cannot be opened.
        """
        from ..checkpoints.fairseq_file import read_state_dict
        from ..checkpoints.ssast import convert_official

        state_dict = read_state_dict(path)
        try:
            config, weights = convert_official(state_dict, num_heads)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        model = cls(config, **init)
        model.load_state_dict(weights)
        return model.eval()


def _head(width: int, patch_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, patch_dim))


def _predict(x: Tensor, head: nn.Module) -> Tensor:
    if not isinstance(head, nn.Sequential) or not is_plain(nn.Sequential, head):
        return call(x, head)
    for module in head:
        x = linear(x, module)  # a module that is not a plain Linear is called
    return x
