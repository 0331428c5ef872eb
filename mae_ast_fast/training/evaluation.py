"""Held-out evaluation: does the model predict masked patches better than averages and interpolation do?

The clips, the masks and the unit of the errors are fixed in yardstick.json, so that runs compare whatever their model,
input normalisation or target. The reconstruction error is compared with baselines that see exactly the same visible
patches, and the InfoNCE top-1 accuracy with chance. Letters as in mae_ast.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.shards import Segment, Shards
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.pooling import pool_tokens
from ..models.ssast import SSAST
from ..ops.fbank import SAMPLE_RATE
from ..ops.masking import sample_mask
from ..ops.packing import real_tokens
from ..ops.reference import masked_mse, patchify, unpatchify
from .options import PretrainOptions

HELD_OUT_CLIPS = 64
CANDIDATES = 4096  # held-out clips to choose from: the first ones of the shards, which are shuffled

BASELINES = ("mean_of_visible", "mean_of_visible_same_band", "interpolation")
TO_BEAT = ("mean_of_visible", "interpolation")
TIME_MARGIN = 0.95  # a model passes if its error is below this share of ``other_times_mse``
# Features have collapsed if their effective rank is below this share of the possible one. Of 49 clips, runs with a rank
# up to 2.8 found at most 3.1 % of the masked patches among the others, runs with 3.5 or more found 4 to 13 %.
COLLAPSED = 1 / 16

YARDSTICK: dict[str, Any] = json.loads((Path(__file__).parent / "yardstick.json").read_text(encoding="utf-8"))
ERROR_UNIT: float = YARDSTICK["error_unit"]  # squared log-mel: about 4 variances of the default corpus
MASK_SEED: int = YARDSTICK["mask_seed"]  # held-out masks depend neither on the run's seed nor on its length


@dataclass
class HeldOut:
    """A fixed set of held-out clips with their masks.

    Attributes:
        log_mel: (B, T, F), as from the model's ``features``.
        num_frames: (B,) real frames.
        mask: (B, L) bool, True = masked.
        names: Clip names.
        kinds: Kind of each clip ("speech", "sound", ...), empty if unknown.
    """

    log_mel: Tensor
    num_frames: Tensor
    mask: Tensor
    names: list[str]
    kinds: list[str]

    @classmethod
    def of(
        cls,
        model: MAEAST | SSAST,
        log_mel: Tensor,
        num_frames: Tensor,
        *,
        names: Sequence[str],
        kinds: Sequence[str],
    ) -> HeldOut:
        """Draw the fixed masks for a model's patch grid and masking strategy; clip i always gets the same mask."""
        config = model.config
        assert config.masking is not None  # the configuration resolves None
        mask = sample_mask(
            config.masking,
            config.num_tokens(num_frames),
            config.grid_f,
            config.mask_ratio,
            seed=MASK_SEED,
            max_tokens=config.num_tokens(log_mel.shape[1]),
        )
        return cls(log_mel, num_frames, mask, list(names), list(kinds))

    def select(self, indices: Sequence[int]) -> HeldOut:
        """The clips at these indices."""
        return HeldOut(
            self.log_mel[indices],
            self.num_frames[indices],
            self.mask[indices],
            [self.names[i] for i in indices],
            [self.kinds[i] for i in indices],
        )

    def longest_of_each_kind(self, max_clips: int = 6) -> HeldOut:
        """The longest clips of every kind, equally many of each and about ``max_clips`` in total, at least one each."""
        kinds = sorted(set(self.kinds))
        longest_first = sorted(range(len(self.names)), key=lambda i: -int(self.num_frames[i]))
        per_kind = max(1, max_clips // len(kinds))
        return self.select(
            [i for kind in kinds for i in [j for j in longest_first if self.kinds[j] == kind][:per_kind]]
        )


@dataclass
class Prediction:
    """Predictions for masked clips. Rows run clip by clip, tokens ascending; sum M is their number.

    Attributes:
        patches: (B, L, P) all patches, log-mel.
        mask: (B, L) bool, True = masked, False past a clip's tokens.
        reconstruction: (sum M, P) predictions of the masked patches, log-mel.
        target: (sum M, P) the masked patches.
        info_nce: 0-d, mean over the masked tokens, 0 if that objective is off.
        accuracy: 0-d, InfoNCE top-1 accuracy over the masked tokens, 0 if that objective is off.
    """

    patches: Tensor
    mask: Tensor
    reconstruction: Tensor
    target: Tensor
    info_nce: Tensor
    accuracy: Tensor


def predict(model: MAEAST | SSAST, log_mel: Tensor, num_frames: Tensor, mask: Tensor) -> Prediction:
    """Run a model on masked clips and map its reconstruction back to log-mel.

    With ``norm_pix_loss`` the prediction gets the mean and variance of its target patch. SSAST in two passes gets the
    same mask in both; InfoNCE and accuracy come from the first pass, the reconstruction from the second. With
    reconstruction off, zeros, the mean of the data, replace the reconstruction.

    Args:
        model: Model in evaluation mode.
        log_mel: (B, T, F), as from the model's ``features``.
        num_frames: (B,) real frames.
        mask: (B, L) bool, True = masked.
    """
    config = model.config
    two_pass = isinstance(config, SSASTConfig) and config.objective == "joint_two_pass"
    out = model(log_mel, num_frames, (mask, mask) if two_pass else mask)
    mask, target = (out.mask[1], out.target[1]) if two_pass else (out.mask, out.target)
    reconstruction = torch.zeros_like(target, dtype=log_mel.dtype)
    if config.reconstruction_weight > 0.0:
        reconstruction = out.pred_reconstruction.to(log_mel.dtype)
    if config.norm_pix_loss:
        reconstruction = reconstruction * (target.var(1, keepdim=True) + 1e-6).sqrt() + target.mean(1, keepdim=True)
    mean, scale = model.input_stats(log_mel, num_frames.to(log_mel.device))
    patches = patchify(model.denormalize(log_mel), config.patch_size)
    return Prediction(
        patches=patches,
        mask=mask,
        reconstruction=model.denormalize(reconstruction / scale + mean),
        target=patches[mask],
        info_nce=out.loss_classification,
        accuracy=out.accuracy,
    )


def evaluate(model: MAEAST | SSAST, held_out: HeldOut, batch_size: int = 16) -> dict[str, Any]:
    """Errors of the model and of the baselines on the held-out clips: squared error of the log-mel over ``ERROR_UNIT``.

    Each baseline uses the same clip's visible patches:

    - ``mean_of_visible``: their mean patch;
    - ``mean_of_visible_same_band``: the mean over those of the same frequency block (all of them if it has none);
    - ``interpolation``: every mel bin interpolated linearly along time between the visible frames on both sides, the
      nearest value at the edges.

    ``other_times_mse`` is the error of the model's predictions for the other masked times of the token's frequency
    block. It equals the model's error for a model that only knows a clip's averages, for example one that was trained
    on targets out of order.

    Args:
        model: Model on any device, in either mode; its mode is restored.
        held_out: Clips and masks.
        batch_size: Clips per batch.

    Returns:
        ``reconstruction_mse``, ``other_times_mse``,
        ``baselines`` {name: mse}, ``accuracy``, ``chance`` (mean of 1 / M over masked tokens),
        ``info_nce``, ``effective_rank`` of the encoder's features of the whole clips, each clip's averaged over its
        tokens, ``masked_tokens``, ``clips``, ``passed``, ``failures`` (a line per mark that was not beaten) and
        ``warnings`` (a line if the features have collapsed).

    Raises:
        ValueError: No clip has both visible and masked tokens.
    """
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    pooled: list[Tensor] = []
    device = next(model.parameters()).device
    try:
        for indices in _usable(model.config, held_out).split(batch_size):
            num_frames = held_out.num_frames[indices]
            log_mel = held_out.log_mel[indices, : int(num_frames.max())]
            log_mel = torch.where(real_tokens(num_frames, log_mel.shape[1])[:, :, None], log_mel, 0)
            log_mel, num_frames = log_mel.to(device), num_frames.to(device)
            with torch.no_grad():
                sums = _sums(model, log_mel, num_frames, held_out.mask[indices].to(device))
                pooled.append(pool_tokens(model.encode(log_mel, num_frames), len(log_mel)))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
    finally:
        model.train(was_training)
    num_masked = totals.pop("masked_tokens")
    means = {name: value / num_masked for name, value in totals.items()}
    features = torch.cat(pooled)
    report: dict[str, Any] = {
        "clips": len(held_out.names),
        "masked_tokens": int(num_masked),
        "reconstruction_mse": means.pop("mse"),
        "other_times_mse": means.pop("other_times"),
        "info_nce": means.pop("nce"),
        "accuracy": means.pop("accuracy"),
        "chance": means.pop("chance"),
        "effective_rank": effective_rank(features),
        "baselines": means,
    }
    report["warnings"] = collapse_warnings(report["effective_rank"], max_rank=min(features.shape))
    report["failures"] = failures(model, report)
    report["passed"] = not report["failures"]
    return report


def _usable(config: MAEASTConfig | SSASTConfig, held_out: HeldOut) -> Tensor:
    """Indices of the clips that have both visible and masked tokens."""
    real = real_tokens(config.num_tokens(held_out.num_frames), held_out.mask.shape[1])
    has_both = (held_out.mask & real).any(1) & (~held_out.mask & real).any(1)
    if not has_both.any():
        raise ValueError(f"none of {len(has_both)} held-out clips has both visible and masked tokens")
    return has_both.nonzero()[:, 0]


def effective_rank(features: Tensor) -> float:
    """How many directions features use evenly: 1 if all are multiples of one vector, at most min(n, D).

    The exponential of the entropy of the singular values' shares of their sum (Garrido et al. 2023, arXiv 2210.02885).

    Args:
        features: (n, D). NaN is returned if a value is not finite.
    """
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double().cpu())
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())


def collapse_warnings(rank: float, *, max_rank: int) -> list[str]:
    """A line with the usual cure if the effective rank of features is below ``COLLAPSED`` of the possible one."""
    if math.isnan(rank) or rank >= COLLAPSED * max_rank:  # a NaN has its own line in the failures
        return []
    return [
        f"the features collapse: effective rank {rank:.1f} of {max_rank}; the usual cure is --optimizer muon or a "
        "lower --lr"
    ]


def failures(model: MAEAST | SSAST, report: dict[str, Any]) -> list[str]:
    """A line per mark that a trained model must beat and this report does not: ``TO_BEAT``, and twice chance accuracy.

    ``mean_of_visible_same_band`` is harder, and reported without being required. An objective of weight 0 is not
    checked.
    """
    lines = []
    if model.config.reconstruction_weight > 0.0:
        mse, baselines = report["reconstruction_mse"], report["baselines"]
        lines += [
            f"reconstruction MSE {mse:.4f} does not beat {name} {baselines[name]:.4f}"
            for name in TO_BEAT
            if not mse < baselines[name]
        ]
        if not mse < TIME_MARGIN * (other_times := report["other_times_mse"]):
            lines.append(
                f"reconstruction MSE {mse:.4f} is hardly below {other_times:.4f}, that of predictions for other times"
            )
    if model.config.classification_weight > 0.0 and not report["accuracy"] > 2 * report["chance"]:
        lines.append(f"accuracy {report['accuracy']:.4f} is not above twice chance {report['chance']:.4f}")
    return lines


def _sums(model: MAEAST | SSAST, log_mel: Tensor, num_frames: Tensor, mask: Tensor) -> dict[str, float]:
    """Sums over the masked tokens of one batch."""
    config = model.config
    out = predict(model, log_mel, num_frames, mask)
    patches, mask = out.patches, out.mask
    real = real_tokens(config.num_tokens(num_frames), patches.shape[1])
    visible = real & ~mask
    num_masked = mask.sum(1)
    baselines = {
        "mean_of_visible": mean_of_visible(patches, visible),
        "mean_of_visible_same_band": mean_of_visible(patches, visible, config.grid_f),
        "interpolation": interpolation(patches, visible, config.patch_size, config.num_mel_bins),
    }
    sums = {name: masked_mse(baseline[mask], out.target).sum() for name, baseline in baselines.items()}
    sums["mse"] = masked_mse(out.reconstruction, out.target).sum()
    sums["other_times"] = other_times_error(out.reconstruction, out.target, mask, config.grid_f)
    sums = {name: value / ERROR_UNIT for name, value in sums.items()}
    sums["nce"] = out.info_nce * num_masked.sum()
    sums["accuracy"] = out.accuracy * num_masked.sum()
    sums["chance"] = (num_masked > 0).sum()  # M tokens of a clip, each 1 / M
    sums["masked_tokens"] = num_masked.sum()
    return {name: float(value) for name, value in sums.items()}


def other_times_error(prediction: Tensor, target: Tensor, mask: Tensor, grid_f: int) -> Tensor:
    """Sum over masked tokens of the mean error of the predictions for their block's other masked times in the clip.

    A token that is its block's only masked one counts with its own error.

    Args:
        prediction: (sum M, P), rows as in ``Prediction``.
        target: (sum M, P).
        mask: (B, L) bool, True = masked.
        grid_f: Frequency blocks.
    """
    target, prediction = target.double(), prediction.double()
    clip, token = mask.nonzero(as_tuple=True)
    group = clip * grid_f + token % grid_f
    ones = torch.ones_like(target[:, 0])
    num_groups = mask.shape[0] * grid_f

    def group_sum(values: Tensor) -> Tensor:  # for each row, the sum over its group
        return values.new_zeros(num_groups, *values.shape[1:]).index_add(0, group, values)[group]

    # The sum over j of |p_j - t|^2 needs only sums over the group: of |p_j|^2, of p_j and of 1.
    squares = prediction.square().sum(1)
    group_error = group_sum(squares) - 2 * (group_sum(prediction) * target).sum(1)
    group_error = group_error + group_sum(ones) * target.square().sum(1)
    token_error = (prediction - target).square().sum(1)
    num_others = group_sum(ones) - 1
    mean_error = torch.where(num_others > 0, (group_error - token_error) / num_others.clamp(min=1), token_error)
    return mean_error.sum() / target.shape[1]


def mean_of_visible(patches: Tensor, visible: Tensor, grid_f: int = 1) -> Tensor:
    """Predict each patch as the mean visible patch of its clip, or of its clip's frequency block.

    Args:
        patches: (B, L, P).
        visible: (B, L) bool.
        grid_f: Frequency blocks that are averaged separately. 1: all together.
    """
    batch, _, dim = patches.shape
    grid = patches.reshape(batch, -1, grid_f, dim)
    weight = visible.reshape(batch, -1, grid_f, 1).to(patches.dtype)
    count = weight.sum(1, keepdim=True)
    overall = (grid * weight).sum((1, 2), keepdim=True) / count.sum(2, keepdim=True).clamp(min=1)
    mean = torch.where(count > 0, (grid * weight).sum(1, keepdim=True) / count.clamp(min=1), overall)
    return mean.expand_as(grid).reshape(patches.shape)


def interpolation(patches: Tensor, visible: Tensor, patch_size: tuple[int, int], num_mel_bins: int) -> Tensor:
    """Predict each patch by linear interpolation along time between visible frames, per mel bin.

    Before the first and after the last visible frame of a frequency block, the nearest one is used. A block without
    visible frames gets the clip's mean visible patch.

    Args:
        patches: (B, L, P).
        visible: (B, L) bool.
        patch_size: (kt, kf) frames and mel bins of a patch.
        num_mel_bins: F.
    """
    kt, kf = patch_size
    grid_f = num_mel_bins // kf
    frames = unpatchify(patches, patch_size, num_mel_bins)  # (B, T, F)
    is_visible = visible.reshape(len(patches), -1, grid_f).repeat_interleave(kt, 1)  # (B, T, blocks)
    steps = torch.arange(frames.shape[1], device=patches.device)[:, None].expand_as(is_visible)
    before = torch.where(is_visible, steps, -1).cummax(1).values  # nearest visible frame at or before, -1: none
    after = torch.where(is_visible, steps, frames.shape[1]).flip(1).cummin(1).values.flip(1)
    left = torch.where(before >= 0, before, after)
    right = torch.where(after < frames.shape[1], after, before)
    gap = (right - left).clamp(min=1)
    share = ((steps - left).to(frames.dtype) / gap).clamp(0, 1)
    left, right, share = (x.repeat_interleave(kf, 2) for x in (left, right, share))
    limit = frames.shape[1] - 1
    low, high = frames.gather(1, left.clamp(0, limit)), frames.gather(1, right.clamp(0, limit))
    filled = patchify(torch.lerp(low, high, share), patch_size)
    block_has_visible = is_visible.any(1)[:, None].expand(-1, filled.shape[1] // grid_f, -1).reshape(visible.shape)
    return torch.where(block_has_visible[:, :, None], filled, mean_of_visible(patches, visible))


def held_out_set(model: MAEAST | SSAST, shards: Shards, options: PretrainOptions) -> HeldOut:
    """Log-mel and masks of the clips to evaluate on: the first ``max_seconds`` of each.

    The clips of the yardstick if the shards hold them all, as those of the default corpus do. Otherwise up to
    ``HELD_OUT_CLIPS`` clips: equally many of each kind if there are enough, spread evenly over the names. These leave
    out silent clips, and clips shorter than 2 s or than the median length, whichever is less.

    Raises:
        ValueError: The shards have no held-out clip, or none that can be read.
    """
    candidates = itertools.islice(shards.segments("held_out"), CANDIDATES)
    segments = [segment for segment in candidates if segment.index == 0]
    if not segments:
        raise ValueError(f"{shards.source} has no held-out clip to evaluate on: expected cuts with split=held_out")
    by_name = {segment.name: segment for segment in segments}
    if all(name in by_name for name in YARDSTICK["clips"]):
        chosen = [by_name[name] for name in YARDSTICK["clips"]]
    else:
        chosen = _spread_over_kinds(segments, silent=set(shards.report.get("silent", {}).get("names", ())))
    max_samples = round(options.max_seconds * SAMPLE_RATE)
    batch = shards.read([segment.crop(0, min(max_samples, segment.num_samples)) for segment in chosen])
    if not batch.names:
        raise ValueError(f"none of the held-out clips of {shards.source} can be read: {batch.faults}")
    kinds = {segment.name: segment.kind for segment in chosen}
    log_mel, num_frames = model.features(batch.waveforms, batch.num_samples)
    return HeldOut.of(model, log_mel, num_frames, names=batch.names, kinds=[kinds[name] for name in batch.names])


def _spread_over_kinds(segments: list[Segment], *, silent: set[str]) -> list[Segment]:
    """Up to ``HELD_OUT_CLIPS`` of the segments, as ``held_out_set`` describes.

    Args:
        segments: At least one.
        silent: Names of silent clips, chosen only if there are no others.
    """
    segments = [segment for segment in segments if segment.name not in silent] or segments
    num_samples = np.array([segment.num_samples for segment in segments])
    min_samples = min(2 * SAMPLE_RATE, np.quantile(num_samples, 0.5))
    by_kind: dict[str, list[Segment]] = {}
    for segment in sorted(segments, key=lambda segment: segment.name):
        if segment.num_samples >= min_samples:
            by_kind.setdefault(segment.kind, []).append(segment)
    per_kind = HELD_OUT_CLIPS // len(by_kind)
    return [
        of_kind[round(i)]
        for of_kind in by_kind.values()
        for i in np.linspace(0, len(of_kind) - 1, min(per_kind, len(of_kind)))
    ]
