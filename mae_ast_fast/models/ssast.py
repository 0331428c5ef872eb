"""SSAST, the baseline: a ViT over all tokens of a spectrogram, the masked ones replaced (arXiv 2110.09784).

Data, losses, kernels and attention are those of MAE-AST: packed rows of clips of any length, without padding.
Letters: B clips, T frames, F mel bins, L tokens per clip, N packed rows, M masked rows, D width, P values per patch, kt
and kf frames and mel bins per patch, n_t time blocks of the batch.

Differences from MAE-AST: two class tokens precede each clip. Positions are learned, for ``input_frames`` frames; a
shorter clip takes those of the leading time blocks. InfoNCE runs over the predictions.

Tokens and the values of a patch are in the order of MAE-AST, time before frequency: token = time block * (F // kf) +
frequency block, value = t * kf + f. Only the weights are in the order of the official checkpoints, frequency before
time: those of ``patch_embed`` and of the last layer of the heads, and ``positions``.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.packing import TokenCounts
from .base import PretrainingModel
from .config import SSASTConfig
from .layout import TokenLayout
from .losses import LossTerms, MAEASTOutput, loss_terms
from .transformer import SITES_PER_LAYER, ExecConfig, TransformerStack, call, is_plain, linear

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


class EncodedPass(NamedTuple):
    """Output of the encoder for one mask.

    Attributes:
        x: (M, D) output of the masked tokens.
        target: (M, P) their patches.
        layout: Layout of the batch under the mask.
    """

    x: Tensor
    target: Tensor
    layout: TokenLayout


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

    config_class, model_type, num_class_tokens = SSASTConfig, "ssast", CLASS_TOKENS
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
            mask: (B, L) bool, True = masked, time before frequency (see the module), L at least the longest clip's
                tokens. Entries past a clip's tokens are ignored, and the number of masked tokens may differ between
                clips. For "joint_two_pass" a pair of masks, for the passes of InfoNCE and of the MSE. None draws by
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
        layouts = self._token_layouts(features, lengths, mask, generator=generator, sizes=sizes)
        cfg = self._exec_config(features.device)
        with torch.autocast(features.device.type, enabled=False):  # the casts to cfg.dtype are written out
            passes = []
            for layout in layouts:
                patches, target = self.normalized_patches(features, layout, cfg)
                x = self._embed(patches, layout, cfg)
                x, _ = self.encoder(x, layout.tokens, cfg, query_rows=layout.query_rows)
                passes.append(EncodedPass(x, target, layout))
            return self.forward_loss(passes, cfg)

    def forward_encoder(
        self, patches: Tensor, layout: TokenLayout, cfg: ExecConfig, *, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode all tokens of a layout without masked ones, with their class tokens.

        Args:
            patches: (Nv, P) normalised patches.
            layout: Layout of the batch.
            cfg: Implementation, attention backend and dropout seed of this forward pass.
            layer: Last layer to run, counted from 1. None: all.

        Returns:
            The output (Nv, D) and the output (Nv, D) of each layer, without the class tokens.
        """
        x, states = self.encoder(self._embed(patches, layout, cfg), layout.tokens, cfg, layer=layer)
        visible = layout.visible
        patch_rows = layout.tokens.cu_seqlens[visible.clip] + CLASS_TOKENS + visible.token
        return x[patch_rows], [state[patch_rows] for state in states]

    def _embed(self, patches: Tensor, layout: TokenLayout, cfg: ExecConfig) -> Tensor:
        """Input of the encoder (N, D): class tokens, embedded patches (Nv, P) and mask tokens, all with positions."""
        tokens, (num_clips, max_tokens) = layout.tokens, layout.mask.shape
        classes = torch.stack((self.cls_token, self.dist_token)).to(cfg.dtype).repeat(num_clips, 1)
        embedded = linear(_transpose_patches(patches, self.config.patch_size), self.patch_embed)
        x = ops.scatter_tokens(
            torch.cat((classes, embedded)),
            self.mask_token,
            # The positions of this operation are fixed; ours are learned, and added below. A table of zeros adds none.
            embedded.new_zeros(1, embedded.shape[1]),
            torch.zeros_like(tokens.token),
            layout.ids_restore,
            impl=cfg.impl,
        )
        table = self._positions(max_tokens // self.config.grid_f)
        index = torch.where(tokens.valid, tokens.clip * len(table) + tokens.token, num_clips * len(table))
        return x + _PositionRows.apply(table, index, num_clips, cfg.dtype)

    def _positions(self, n_t: int) -> Tensor:
        """Positions (2 + L, D) of the class tokens and of the leading ``n_t`` time blocks."""
        classes, grid = self.positions.split([CLASS_TOKENS, self.config.num_patches])
        grid = grid.unflatten(0, (self.config.grid_f, self.config.grid_t))[:, :n_t]
        return torch.cat((classes, grid.transpose(0, 1).flatten(0, 1)))

    def _predict(self, x: Tensor, head: nn.Module) -> Tensor:
        """Predicted patches (M, P) of the encoder's output (M, D)."""
        if isinstance(head, nn.Sequential) and is_plain(nn.Sequential, head):
            for module in head:
                x = linear(x, module)  # a module that is not a plain Linear is called
        else:
            x = call(x, head)
        kt, kf = self.config.patch_size
        return _transpose_patches(x, (kf, kt))

    def forward_loss(self, passes: list[EncodedPass], cfg: ExecConfig) -> MAEASTOutput:
        """InfoNCE loss of the first pass and reconstruction loss of the last one, which may be the same."""
        config, nce_pass, mse_pass = self.config, passes[0], passes[-1]
        mse = nce = hit = None
        classification = reconstruction = nce_pass.x.new_zeros(0, config.patch_dim)
        if config.classification_weight > 0.0:
            classification = self._predict(nce_pass.x, self.classification_head)
            masked = nce_pass.layout.masked
            nce, hit = ops.info_nce(
                classification,
                nce_pass.target,
                masked.cu_seqlens,
                masked.max_seqlen,
                over="predictions",
                impl=cfg.impl,
                exact=not masked.has_padding_rows,
            )
        if config.reconstruction_weight > 0.0:
            reconstruction = self._predict(mse_pass.x, self.reconstruction_head)
            mse = ops.masked_mse(reconstruction, mse_pass.target, impl=cfg.impl)
        if len(passes) == 1:
            terms = loss_terms(config, nce_pass.layout, mse=mse, nce=nce, hit=hit)
        else:
            nce_terms = loss_terms(config, nce_pass.layout, nce=nce, hit=hit)
            mse_terms = loss_terms(config, mse_pass.layout, mse=mse)
            terms = LossTerms._make([a + b for a, b in zip(nce_terms, mse_terms, strict=True)])
        return MAEASTOutput(
            **terms._asdict(),
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=nce_pass.target if len(passes) == 1 else (nce_pass.target, mse_pass.target),
            mask=nce_pass.layout.mask if len(passes) == 1 else (nce_pass.layout.mask, mse_pass.layout.mask),
        )

    def normalize(self, features: Tensor) -> Tensor:
        """Log-mel (B, T, F) to the input of ``forward``: (x - mean) / (2 * std) with the configuration's statistics."""
        return (features - self.config.mean) / (2.0 * self.config.std)

    def denormalize(self, features: Tensor) -> Tensor:
        """The inverse of ``normalize``: log-mel of any shape."""
        return features * (2.0 * self.config.std) + self.config.mean

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

        def draw(seed: int | Tensor | None) -> Tensor:
            return self._draw_mask(frames, width, generator=generator, seed=seed, clip_ids=clip_ids, epoch=epoch)

        if self.config.objective != "joint_two_pass":
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

    def _check_masks(
        self, mask: Any, num_tokens: Tensor, max_tokens: int, check_values: bool
    ) -> Tensor | tuple[Tensor, ...]:
        if self.config.objective != "joint_two_pass":
            return super()._check_masks(mask, num_tokens, max_tokens, check_values)
        if not (isinstance(mask, tuple | list) and len(mask) == 2):
            got = f"{len(mask)} of them" if isinstance(mask, tuple | list) else type(mask).__name__
            raise ValueError(f"mask must be a pair (mask_mpc, mask_mpg) for two passes, got {got}")
        return tuple(self._check_mask(one_mask, num_tokens, max_tokens, check_values) for one_mask in mask)

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


def _transpose_patches(patches: Tensor, extents: tuple[int, int]) -> Tensor:
    """Patches (N, a * b), ``extents`` (a, b), with the value of i * b + j at j * a + i."""
    return patches.unflatten(1, extents).transpose(1, 2).flatten(1)
