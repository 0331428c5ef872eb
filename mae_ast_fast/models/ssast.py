"""SSAST, the baseline: a ViT over all tokens of a spectrogram, the masked ones replaced (arXiv 2110.09784).

Data, losses, kernels and attention are MAE-AST's: packed rows of clips of any length, and no padding among them.
Letters: B clips, T frames, F mel bins, L tokens a clip, N packed rows, M of them masked, D width, P values a patch.

What differs from MAE-AST: the image is (F, T), so that token = f_block * n_t + t_block and in a patch index = f * kt +
t, n_t being the time blocks of the batch; two class tokens stand in front of each clip; positions are learned, for
``input_frames`` frames, and a shorter clip takes those of the leading time blocks; InfoNCE runs over the predictions.
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
from .base import Encoded, PretrainingModel, listed_frames
from .config import SSASTConfig
from .mae_ast import MAEASTOutput
from .transformer import SITES, ExecConfig, TransformerStack, call, is_plain, linear

CLASS_TOKENS = 2  # of DeiT: class and distillation; nothing is trained on their output
_SECOND_SEED = 0x5BF03635F0B7A54D  # what the seed of the second pass's mask differs by


class _Positions(torch.autograd.Function):
    """Rows of a table (W, D) by their place clip * W + token, B * W for no row: (N,) -> (N, D) in ``dtype``.

    The gradient adds over clips in a fixed order and in the table's dtype; that of indexing adds as it comes.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, place: Tensor, clips: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(place)
        ctx.table = clips, *table.shape, table.dtype
        return table.to(dtype).index_select(0, place % table.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        clips, tokens, width, dtype = ctx.table
        padded = grad.new_zeros(clips * tokens + 1, width).index_copy(0, place, grad)[:-1]
        return padded.view(clips, tokens, width).sum(0, dtype=dtype), None, None, None


@dataclass
class _Pass:
    """What one pass of the encoder leaves for the losses.

    Attributes:
        x: (M, D) output of the masked tokens.
        target: (M, P) their patches.
        rows: Packing of the M rows.
        used: (B,) bool, whether a clip adds to the losses.
    """

    x: Tensor
    target: Tensor
    rows: Packing
    used: Tensor


class SSAST(PretrainingModel):
    """Self-supervised audio spectrogram transformer, patch or frame model.

    Args:
        config: Sizes, masking and objective.
        impl: "auto", "torch" or "triton": which implementation of the operations runs. What has no kernel runs as
            plain PyTorch in either: matrix products, the residual connections and norms of pre-norm layers.
        attention: "auto" or the name of an attention backend (attention.py).
        recompute: As in MAEAST.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available.
    """

    config_class, model_type = SSASTConfig, "ssast"

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
        self.encoder = TransformerStack(width, config.layers, 0.0, config, SITES)
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.classification_head = _head(width, config.patch_dim)
        self.reconstruction_head = _head(width, config.patch_dim)
        for parameter in (self.cls_token, self.dist_token, self.positions):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.mask_token, std=width**-0.5)
        # The head of an objective that is off stays, so that weights fit any objective; nothing trains it.
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
            features: (B, T, F) log-mel, normalised, as the method ``features`` makes it of waveforms. T is at most
                ``config.input_frames``.
            lengths: (B,) real frames of each clip; None: all T. A clip's whole patches count, its tail frames do not.
            mask: (B, L) bool, True = masked, L = (F // kf) * (T // kt) in the order of the tokens (see the module);
                entries past a clip's time blocks are ignored, and clips may hide different counts. For
                "joint_two_pass" a pair of such masks, of InfoNCE's pass and of the MSE's. None draws by
                ``sample_mask``.
            generator: Source of that draw; None is torch's default.
            sizes: As for MAEAST; both passes have the same.

        Returns:
            As MAEAST's; rows run clip by clip, tokens ascending. Means are over all masked tokens of the batch. The
            loss is InfoNCE + 10 * MSE, or the one of the two that is the objective; the prediction of the other is
            then empty, (0, P). Accuracy is the share of predictions whose own target is, among the clip's, the one
            that gives them the largest softmax over predictions. In two passes ``target`` and ``mask`` are pairs, as
            the mask that is given, and each prediction's rows are those of its pass.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, or longer than ``input_frames``; no clip has both visible
                and masked tokens (not looked for with ``sizes``: the losses are 0 then).
        """
        config = self.config
        frames = self._check(features, lengths, values=sizes is None)
        kt, n_t = config.patch_size[0], features.shape[1] // config.patch_size[0]
        two = config.objective == "joint_two_pass"
        drawn = mask is None
        if drawn:
            mask = self.sample_mask(frames, features.shape[1], generator=generator)
        real = real_tokens(frames // kt, n_t)[:, None, :].expand(-1, config.grid_f, -1).flatten(1)
        masks = [real & m for m in self._check_masks(mask, real)]
        if sizes is not None:
            each = [sizes] * len(masks)
        elif drawn:
            each = [self.exact_sizes(features, lengths, None)] * len(masks)
        else:
            each = [self.exact_sizes(features, lengths, (real & ~m, m)) for m in masks]

        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            passes = [self._encode(features, real, m, s, dtype, run) for m, s in zip(masks, each, strict=True)]
            return self._losses(passes, tuple(masks) if two else masks[0], run)

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Features of all patches, nothing masked (paper, section 2.4); those of the class tokens are left out."""
        self._check_layer(layer)
        frames = self._check(features, lengths)
        kt, grid_f = self.config.patch_size[0], self.config.grid_f
        listed = listed_frames(*features.shape[:2], lengths)
        valid = real_tokens(frames, features.shape[1])[:, :, None]
        features = F.pad(torch.where(valid, features, 0), (0, 0, 0, -features.shape[1] % kt))
        features, n_t = features[:, : self.config.grid_t * kt], min(features.shape[1] // kt, self.config.grid_t)
        blocks = ((frames + kt - 1) // kt).clamp(max=n_t)
        real = real_tokens(blocks, n_t)[:, None, :].expand(-1, grid_f, -1).flatten(1)
        tokens = [min(-(-count // kt), n_t) * grid_f for count in listed]
        sizes = TokenCounts.of(tokens, [0] * len(tokens))
        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            x, every, *_ = self._embed(features, real, torch.zeros_like(real), sizes, dtype, run)
            x, states = self.encoder(x, every, run, layer)
        rows = Packing.of(real, sizes.visible, max_seqlen=sizes.max_visible)
        # The class tokens of a clip are the first of its rows.
        patches = torch.arange(len(rows.clip), device=rows.clip.device) + CLASS_TOKENS * (rows.clip + 1)
        states = [state[patches] for state in states]
        return Encoded(x[patches], states, rows, rows.token % n_t, rows.token // n_t)

    def _encode(
        self, features: Tensor, real: Tensor, mask: Tensor, sizes: TokenCounts, dtype: torch.dtype, run: ExecConfig
    ) -> _Pass:
        """One pass: all rows of ``_embed`` encoded, the output of the masked ones alone."""
        x, every, visible, masked, target = self._embed(features, real, mask, sizes, dtype, run)
        selected = torch.cat((real.new_ones(len(real), CLASS_TOKENS), real), 1)
        rank = selected.cumsum(1) - 1  # of a token among the rows of its clip
        place = every.cu_seqlens[masked.clip] + rank[masked.clip, masked.token + CLASS_TOKENS]
        only = masked, torch.where(masked.valid, place, len(every.clip))
        x = self.encoder(x, every, run, only=only)[0]
        return _Pass(x, target.detach(), masked, (visible.counts > 0) & (masked.counts > 0))

    def _embed(
        self, features: Tensor, real: Tensor, mask: Tensor, sizes: TokenCounts, dtype: torch.dtype, run: ExecConfig
    ) -> tuple[Tensor, Packing, Packing, Packing, Tensor]:
        """Visible patches embedded, the mask token for the others, class tokens in front, positions added.

        Returns:
            What goes into the encoder (N, D) with its packing; the packings of visible and of masked tokens; the masked
            patches.
        """
        config = self.config
        kt, kf = config.patch_size
        clips, n_t = len(real), features.shape[1] // kt
        selected = torch.cat((real.new_ones(clips, CLASS_TOKENS), real), 1)
        rows = sizes.visible + sizes.masked + CLASS_TOKENS * clips
        every = Packing.of(
            selected, rows, max_seqlen=sizes.max_tokens + CLASS_TOKENS, has_padding_rows=sizes.has_padding_rows
        )
        visible = Packing.of(
            real & ~mask, sizes.visible, max_seqlen=sizes.max_visible, has_padding_rows=sizes.has_padding_rows
        )
        masked = Packing.of(mask, sizes.masked, max_seqlen=sizes.max_masked, has_padding_rows=sizes.has_padding_rows)

        image = features[:, : n_t * kt].transpose(1, 2)
        clip, token = torch.cat((visible.clip, masked.clip)), torch.cat((visible.token, masked.token))
        as_is = features.new_zeros(()), features.new_ones(())  # features are normalised
        gathered = ops.gather_patches(image, *as_is, clip, token, (kf, kt), dtype=dtype, impl=run.impl)
        patches, target = gathered.split([len(visible.clip), len(masked.clip)])

        # Class tokens are visible ones: those of a clip are rows 2 * clip and 2 * clip + 1, before all patches.
        classes = torch.stack((self.cls_token, self.dist_token)).to(dtype).repeat(clips, 1)
        known = torch.cat((classes, linear(patches, self.patch_embed)))
        is_class = every.token < CLASS_TOKENS
        patch = (every.token - CLASS_TOKENS).clamp(min=0)
        is_visible = ~is_class & ~mask[every.clip, patch]  # a row of no clip repeats a class token
        inverse = torch.where(is_visible, len(classes) - 1 + is_visible.cumsum(0), -1)
        inverse = torch.where(every.valid & is_class, CLASS_TOKENS * every.clip + every.token, inverse)
        # The positions of this op's own table are fixed; ours are learned, and are added after it.
        none = known.new_zeros(1, known.shape[1]), torch.zeros_like(every.token)
        x = ops.scatter_tokens(known, self.mask_token, *none, inverse, impl=run.impl)
        table, width = self._positions(n_t), selected.shape[1]
        place = torch.where(every.valid, every.clip * width + every.token, clips * width)
        x = x + _Positions.apply(table, place, clips, dtype)
        return x, every, visible, masked, target

    def _positions(self, n_t: int) -> Tensor:
        """(2 + L, D) positions of the class tokens and of the leading ``n_t`` time blocks."""
        classes, grid = self.positions.split([CLASS_TOKENS, self.config.num_patches])
        grid = grid.unflatten(0, (self.config.grid_f, self.config.grid_t))[:, :n_t]
        return torch.cat((classes, grid.flatten(0, 1)))

    def _losses(self, passes: list[_Pass], mask: Tensor | tuple[Tensor, Tensor], run: ExecConfig) -> MAEASTOutput:
        config = self.config
        ours, theirs = passes[0], passes[-1]  # of InfoNCE and of the MSE: one and the same in a shared pass
        dtype = torch.promote_types(ours.x.dtype, torch.float32)

        def means(values: Tensor, of: _Pass) -> tuple[Tensor, Tensor]:
            """Over all rows (M,) that count, and (B,) of each clip."""
            counts = of.used[of.rows.clip] & of.rows.valid
            values = torch.where(counts, values, 0).to(dtype)
            clips = values.new_zeros(len(of.used)).index_add(0, of.rows.clip, values)
            return values.sum() / counts.sum().clamp(min=1), clips / of.rows.counts.clamp(min=1)

        off = ours.x.new_zeros((), dtype=dtype)
        empty = ours.x.new_zeros(0, config.patch_dim)
        classification = reconstruction = empty
        nce = mse = accuracy = off
        nce_per_clip = mse_per_clip = off.expand(len(ours.used))
        if config.classification_weight > 0.0:
            classification, of = _predict(ours.x, self.classification_head), ours
            lengths = of.rows.cu_seqlens, of.rows.max_seqlen
            how = {"over": "predictions", "impl": run.impl, "exact": not of.rows.has_padding_rows}
            loss, hit = ops.info_nce(classification, of.target, *lengths, **how)
            (nce, nce_per_clip), accuracy = means(loss, of), means(hit, of)[0]
        if config.reconstruction_weight > 0.0:
            reconstruction, of = _predict(theirs.x, self.reconstruction_head), theirs
            mse, mse_per_clip = means(ops.masked_mse(reconstruction, of.target, impl=run.impl), of)
        return MAEASTOutput(
            loss=config.classification_weight * nce + config.reconstruction_weight * mse,
            loss_reconstruction=mse,
            loss_classification=nce,
            accuracy=accuracy,
            loss_per_clip=config.classification_weight * nce_per_clip + config.reconstruction_weight * mse_per_clip,
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=(ours.target, theirs.target) if isinstance(mask, tuple) else ours.target,
            mask=mask,
        )

    def normalize(self, features: Tensor) -> Tensor:
        """(x - mean) / (2 * std) with the statistics of the configuration: log-mel to what ``forward`` takes."""
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
        """Draws what each clip hides: chunks of patches, or random frames (paper, section 2.2).

        Of a clip's L tokens min(ceil(mask_patches * L / L of a full clip), L - 1) are hidden; which, depends on the
        seed, the epoch, the clip id and L alone.

        Args:
            frames: (B,) real frames of each clip.
            width: Frames T of the batch.
            generator: Source of the seed; None is torch's default.
            seed: Instead of a generator.
            clip_ids: (B,) int64; None: the row numbers.
            epoch: Number of the pass over the data.

        Returns:
            (B, L) bool as ``forward`` takes it; for "joint_two_pass" two of them, drawn independently.
        """
        config = self.config
        kt, grid_f = config.patch_size[0], config.grid_f
        tokens, most = frames // kt * grid_f, width // kt * grid_f

        def draw(seed: int | Tensor | None) -> Tensor:
            options = {"clip_ids": clip_ids, "epoch": epoch, "max_tokens": most, "impl": self.impl}
            what = config.masking, tokens, grid_f, config.mask_ratio
            mask = ops.sample_mask(*what, generator, seed, **options)
            return mask.unflatten(1, (-1, grid_f)).transpose(1, 2).flatten(1)  # drawn time-major

        if config.objective != "joint_two_pass":
            return draw(seed)
        if seed is None:
            return draw(None), draw(None)
        second = seed ^ _SECOND_SEED
        return draw(seed), draw(second & (2**64 - 1) if isinstance(second, int) else second)

    @property
    def max_frames(self) -> int:
        """Most frames T of a batch: those that have positions."""
        return self.config.input_frames

    def _check(self, features: Tensor, lengths: Tensor | None, values: bool = True) -> Tensor:
        frames = super()._check(features, lengths, values)
        if features.shape[1] > self.config.input_frames:
            raise ValueError(
                f"at most input_frames={self.config.input_frames} frames a clip, got T={features.shape[1]}: cut longer "
                "clips"
            )
        return frames

    def _check_masks(self, mask: Any, real: Tensor) -> tuple[Tensor, ...]:
        """Validates a mask or a pair of them; returns them all."""
        two = self.config.objective == "joint_two_pass"
        if two and not (isinstance(mask, tuple | list) and len(mask) == 2):
            got = f"{len(mask)} of them" if isinstance(mask, tuple | list) else type(mask).__name__
            raise ValueError(f"mask must be a pair (mask_mpc, mask_mpg) for two passes, got {got}")
        for m in mask if two else (mask,):
            if not isinstance(m, Tensor) or m.dtype != torch.bool or m.shape != real.shape:
                got = f"{m.dtype} {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
                raise ValueError(f"mask must be a bool tensor {tuple(real.shape)}, True = masked, got {got}")
        return tuple(send(m, real.device) for m in (mask if two else (mask,)))

    @classmethod
    def from_official(cls, path: str | os.PathLike[str], num_heads: int | None = None, **init: Any) -> SSAST:
        """Reads a pretraining checkpoint of the paper's own code; nothing in the file is executed.

        Sizes come from the weights, the objective is "joint". The file tells neither how many tokens were masked (400
        of 512 are assumed, and that share of other grids) nor the statistics of the data (those of the paper).

        Args:
            path: The ``.pth`` file: a state dict, with or without DataParallel's prefix ``module.``.
            num_heads: None: width // 64, as in the paper's models.
            **init: ``impl``, ``attention`` and ``recompute`` of the model.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: Not such a file, weights missing, unexpected or of the wrong shape, all listed, or a number of
                heads that does not fit.
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
    if not is_plain(nn.Sequential, head):
        return call(x, head)
    for module in head:
        x = linear(x, module)  # calls what is no plain Linear
    return x
