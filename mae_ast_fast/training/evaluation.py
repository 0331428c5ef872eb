"""Held-out evaluation: does the model know more about hidden patches than averages and straight lines do?

On a fixed set of clips and masks, the reconstruction error stands beside baselines that see exactly the same visible
patches, and the InfoNCE top-1 accuracy beside chance. Letters as in model.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.shards import Shards
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.fbank import SAMPLE_RATE
from ..ops.masking import sample_mask
from ..ops.packing import real_tokens
from ..ops.reference import masked_mse, patchify, unpatchify
from .options import PretrainOptions

HELD_OUT_CLIPS = 64
CANDIDATES = 4096  # held-out clips among which these are chosen: the first ones of the shards, which are shuffled

BASELINES = ("mean_of_visible", "mean_of_visible_same_band", "interpolation")
TO_BEAT = ("mean_of_visible", "interpolation")
TIME_MARGIN = 0.95  # the share of ``other_times_mse`` under which the model's error must be
MASK_SEED = 20220331  # held-out masks never change: not with the run's seed, not with its length


@dataclass
class HeldOut:
    """A fixed set of held-out clips with their masks.

    Attributes:
        features: (B, T, F), as the model's ``features`` makes them.
        frames: (B,) real frames.
        mask: (B, L) bool, True = masked, tokens time step by time step for either model.
        names: Clip names.
        kinds: Kind of each clip ("speech", "sound", ...), empty where unknown.
    """

    features: Tensor
    frames: Tensor
    mask: Tensor
    names: list[str]
    kinds: list[str]

    @classmethod
    def of(
        cls, model: MAEAST | SSAST, features: Tensor, frames: Tensor, names: Sequence[str], kinds: Sequence[str]
    ) -> HeldOut:
        """Draws the fixed masks for a model's patch grid and masking strategy; clip i always gets the same mask."""
        config = model.config
        tokens = frames // config.patch_size[0] * config.grid_f
        width = features.shape[1] // config.patch_size[0] * config.grid_f
        mask = sample_mask(config.masking, tokens, config.grid_f, config.mask_ratio, seed=MASK_SEED, max_tokens=width)
        return cls(features, frames, mask, list(names), list(kinds))

    def select(self, indices: Sequence[int]) -> HeldOut:
        """The clips at these indices."""
        return HeldOut(
            self.features[indices],
            self.frames[indices],
            self.mask[indices],
            [self.names[i] for i in indices],
            [self.kinds[i] for i in indices],
        )

    def longest_of_each_kind(self, at_most: int = 6) -> HeldOut:
        """A few clips to look at: the longest of every kind, as many of each."""
        kinds = sorted(set(self.kinds))
        order = sorted(range(len(self.names)), key=lambda i: -int(self.frames[i]))
        share = max(1, at_most // len(kinds))
        return self.select([i for kind in kinds for i in [j for j in order if self.kinds[j] == kind][:share]])


@dataclass
class Prediction:
    """What a model makes of masked clips: tokens time step by time step, values in a patch t * kf + f.

    Rows run clip by clip, tokens ascending; sum M is their number.

    Attributes:
        patches: (B, L, P) all patches, normalised.
        mask: (B, L) bool, True = masked, False past a clip's tokens.
        reconstruction: (sum M, P) of the masked patches.
        target: (sum M, P) these patches.
        info_nce: Mean over the masked tokens, 0 where that objective is off.
        accuracy: The same.
    """

    patches: Tensor
    mask: Tensor
    reconstruction: Tensor
    target: Tensor
    info_nce: Tensor
    accuracy: Tensor


def predict(model: MAEAST | SSAST, features: Tensor, frames: Tensor, mask: Tensor) -> Prediction:
    """Runs a model on masked clips; what comes out is in one order for either.

    SSAST in two passes hides the same in both: InfoNCE and accuracy are those of the first, the reconstruction that of
    the second. With reconstruction off it reconstructs nothing, and zeros, the mean of the data, stand for it.

    Args:
        features: (B, T, F), as the model's ``features`` makes them.
        frames: (B,) real frames.
        mask: (B, L) bool, True = masked, tokens time step by time step.
    """
    patches = patchify(features, model.config.patch_size)
    if isinstance(model, MAEAST):
        out = model(features, frames, mask)
        mean, scale = model.input_norm(features, frames.to(features.device))
        known = (patches - mean) * scale, out.mask, out.pred_reconstruction, out.target
        return Prediction(*known, out.loss_classification, out.accuracy)
    grid_f, (kt, kf) = model.config.grid_f, model.config.patch_size
    mask = mask[:, : patches.shape[1]].unflatten(1, (-1, grid_f)).transpose(1, 2).flatten(1)  # as SSAST orders tokens
    two = model.config.objective == "joint_two_pass"
    out = model(features, frames, (mask, mask) if two else mask)
    mask, target = (out.mask[1], out.target[1]) if two else (out.mask, out.target)
    row = mask.flatten().cumsum(0).view_as(mask) - 1  # of each masked token among the outputs
    mask, row = (x.unflatten(1, (grid_f, -1)).transpose(1, 2).flatten(1) for x in (mask, row))
    guess = out.pred_reconstruction if model.config.reconstruction_weight > 0.0 else torch.zeros_like(target)
    guess, target = (x[row[mask]].unflatten(1, (kf, kt)).transpose(1, 2).flatten(1) for x in (guess, target))
    return Prediction(patches, mask, guess, target, out.loss_classification, out.accuracy)


def evaluate(model: MAEAST | SSAST, held_out: HeldOut, batch_size: int = 16) -> dict[str, Any]:
    """Errors of the model and of the baselines on the held-out clips, in the model's normalised space.

    Baselines, each from the same clip's visible patches: ``mean_of_visible``, their mean patch;
    ``mean_of_visible_same_band``, the mean over those of the same frequency block (all of them where it has none);
    ``interpolation``, every mel bin interpolated linearly along time between the visible frames on both sides, the
    nearest value at the edges.

    ``other_times_mse`` takes the model's predictions for the other hidden times of the token's frequency block: a
    model that only knows a clip's averages, as one trained on targets out of order does, is as good there.

    Returns:
        ``reconstruction_mse``, ``other_times_mse``,
        ``baselines`` {name: mse}, ``accuracy``, ``chance`` (mean of 1 / M over masked tokens),
        ``info_nce``, ``masked_tokens``, ``clips``, ``passed`` and ``failures`` (what was not beaten, in words).
    """
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    device = next(model.parameters()).device
    try:
        for part in _usable(model.config, held_out).split(batch_size):
            frames = held_out.frames[part]
            features = held_out.features[part, : int(frames.max())]
            features = torch.where(real_tokens(frames, features.shape[1])[:, :, None], features, 0)
            with torch.no_grad():
                sums = _sums(model, features.to(device), frames.to(device), held_out.mask[part].to(device))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
    finally:
        model.train(was_training)
    rows = totals.pop("rows")
    means = {name: value / rows for name, value in totals.items()}
    report: dict[str, Any] = {
        "clips": len(held_out.names),
        "masked_tokens": int(rows),
        "reconstruction_mse": means.pop("mse"),
        "other_times_mse": means.pop("other_times"),
        "info_nce": means.pop("nce"),
        "accuracy": means.pop("accuracy"),
        "chance": means.pop("chance"),
        "baselines": means,
    }
    report["failures"] = failures(model, report)
    report["passed"] = not report["failures"]
    return report


def _usable(config: MAEASTConfig | SSASTConfig, held_out: HeldOut) -> Tensor:
    """Indices of the clips that have both visible and masked tokens."""
    real = real_tokens(held_out.frames // config.patch_size[0] * config.grid_f, held_out.mask.shape[1])
    has_both = (held_out.mask & real).any(1) & (~held_out.mask & real).any(1)
    if not has_both.any():
        raise ValueError(f"none of {len(has_both)} held-out clips has both visible and masked tokens")
    return has_both.nonzero()[:, 0]


def failures(model: MAEAST | SSAST, report: dict[str, Any]) -> list[str]:
    """What a trained model must beat and this report does not: ``TO_BEAT``, and twice the chance accuracy.

    ``mean_of_visible_same_band`` is the harder mark that stands beside them. An objective of weight 0 is not asked for.
    """
    found = []
    if model.config.reconstruction_weight > 0.0:
        mse, baselines = report["reconstruction_mse"], report["baselines"]
        found += [
            f"reconstruction MSE {mse:.4f} does not beat {name} {baselines[name]:.4f}"
            for name in TO_BEAT
            if not mse < baselines[name]
        ]
        if not mse < TIME_MARGIN * (other := report["other_times_mse"]):
            found.append(
                f"reconstruction MSE {mse:.4f} is hardly below {other:.4f}, that of predictions for other times"
            )
    if model.config.classification_weight > 0.0 and not report["accuracy"] > 2 * report["chance"]:
        found.append(f"accuracy {report['accuracy']:.4f} is not above twice chance {report['chance']:.4f}")
    return found


def _sums(model: MAEAST | SSAST, features: Tensor, frames: Tensor, mask: Tensor) -> dict[str, float]:
    """Sums over the masked tokens of one batch."""
    config = model.config
    out = predict(model, features, frames, mask)
    patches, mask = out.patches, out.mask
    tokens = real_tokens(frames // config.patch_size[0] * config.grid_f, patches.shape[1])
    visible = tokens & ~mask
    counts = mask.sum(1)
    # With norm_pix_loss every error is taken relative to its target patch's variance, the model's and the baselines'.
    unit = out.target.var(1) + 1e-6 if config.norm_pix_loss else torch.ones_like(out.target[:, 0])
    guesses = {
        "mean_of_visible": mean_of_visible(patches, visible),
        "mean_of_visible_same_band": mean_of_visible(patches, visible, config.grid_f),
        "interpolation": interpolation(patches, visible, config.patch_size, config.num_mel_bins),
    }
    sums = {name: (masked_mse(guess[mask], out.target) / unit).sum() for name, guess in guesses.items()}
    sums["mse"] = masked_mse(out.reconstruction, out.target, config.norm_pix_loss).sum()
    sums["other_times"] = other_times_error(out.reconstruction, out.target, mask, config)
    sums["nce"] = out.info_nce * counts.sum()
    sums["accuracy"] = out.accuracy * counts.sum()
    sums["chance"] = (counts > 0).sum()  # M tokens of a clip, each 1 / M
    sums["rows"] = counts.sum()
    return {name: float(value) for name, value in sums.items()}


def other_times_error(prediction: Tensor, target: Tensor, mask: Tensor, config: MAEASTConfig | SSASTConfig) -> Tensor:
    """Sum over masked tokens of the mean error of the predictions for their block's other masked times in the clip.

    A token that is its block's only masked one counts with its own error. Rows (sum M, P) as in ``Prediction``.
    """
    target, prediction = target.double(), prediction.double()
    if config.norm_pix_loss:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    clip, token = mask.nonzero(as_tuple=True)
    group = clip * config.grid_f + token % config.grid_f
    ones = torch.ones_like(target[:, 0])
    size = mask.shape[0] * config.grid_f

    def total(rows: Tensor) -> Tensor:  # of each row's group
        return rows.new_zeros(size, *rows.shape[1:]).index_add(0, group, rows)[group]

    # The sum over j of |p_j - t|^2 needs the group's sums only: |p_j|^2, p_j and their number.
    squares = prediction.square().sum(1)
    everyone = total(squares) - 2 * (total(prediction) * target).sum(1) + total(ones) * target.square().sum(1)
    own = (prediction - target).square().sum(1)
    others = total(ones) - 1
    return torch.where(others > 0, (everyone - own) / others.clamp(min=1), own).sum() / target.shape[1]


def mean_of_visible(patches: Tensor, visible: Tensor, grid_f: int = 1) -> Tensor:
    """Predicts each patch (B, L, P) as the mean visible patch of its clip, per frequency block where grid_f > 1."""
    batch, _, dim = patches.shape
    grid = patches.reshape(batch, -1, grid_f, dim)
    weight = visible.reshape(batch, -1, grid_f, 1).to(patches.dtype)
    count = weight.sum(1, keepdim=True)
    overall = (grid * weight).sum((1, 2), keepdim=True) / count.sum(2, keepdim=True).clamp(min=1)
    mean = torch.where(count > 0, (grid * weight).sum(1, keepdim=True) / count.clamp(min=1), overall)
    return mean.expand_as(grid).reshape(patches.shape)


def interpolation(patches: Tensor, visible: Tensor, patch_size: tuple[int, int], num_mel_bins: int) -> Tensor:
    """Predicts each patch (B, L, P) by linear interpolation along time between visible frames, per mel bin.

    Before the first and after the last visible frame of a frequency block the nearest one counts; a block without any
    takes the clip's mean visible patch.
    """
    kt, kf = patch_size
    grid_f = num_mel_bins // kf
    frames = unpatchify(patches, patch_size, num_mel_bins)  # (B, T, F)
    known = visible.reshape(len(patches), -1, grid_f).repeat_interleave(kt, 1)  # (B, T, blocks)
    steps = torch.arange(frames.shape[1], device=patches.device)[:, None].expand_as(known)
    last = torch.where(known, steps, -1).cummax(1).values  # nearest visible frame at or before, -1: none
    after = torch.where(known, steps, frames.shape[1]).flip(1).cummin(1).values.flip(1)
    left = torch.where(last >= 0, last, after)
    right = torch.where(after < frames.shape[1], after, last)
    gap = (right - left).clamp(min=1)
    share = ((steps - left).to(frames.dtype) / gap).clamp(0, 1)
    left, right, share = (x.repeat_interleave(kf, 2) for x in (left, right, share))
    limit = frames.shape[1] - 1
    low, high = frames.gather(1, left.clamp(0, limit)), frames.gather(1, right.clamp(0, limit))
    filled = patchify(torch.lerp(low, high, share), patch_size)
    has_any = known.any(1)[:, None].expand(-1, filled.shape[1] // grid_f, -1).reshape(visible.shape)
    return torch.where(has_any[:, :, None], filled, mean_of_visible(patches, visible))


def held_out_set(model: MAEAST | SSAST, shards: Shards, options: PretrainOptions) -> HeldOut:
    """Features and masks of the clips to evaluate on: the first ``max_seconds`` of each.

    As many of each kind, spread evenly over the names; none that is silent, and clips of at least 2 s where there are
    enough of them.

    Raises:
        ValueError: The shards hold none out, or none that can be read.
    """
    segments = [s for s in itertools.islice(shards.segments("held_out"), CANDIDATES) if s.index == 0]
    if not segments:
        raise ValueError(f"{shards.source} holds no clip out to evaluate on: expected cuts with split=held_out")
    silent = set(shards.report.get("silent", {}).get("names", ()))
    segments = [segment for segment in segments if segment.name not in silent] or segments
    num_samples = np.array([segment.num_samples for segment in segments])
    least = min(2 * SAMPLE_RATE, np.quantile(num_samples, 0.5))
    by_kind: dict[str, list] = {}
    for segment in sorted(segments, key=lambda segment: segment.name):
        if segment.num_samples >= least:
            by_kind.setdefault(segment.kind, []).append(segment)
    share = HELD_OUT_CLIPS // len(by_kind)
    chosen = [kind[round(i)] for kind in by_kind.values() for i in np.linspace(0, len(kind) - 1, min(share, len(kind)))]
    longest = round(options.max_seconds * SAMPLE_RATE)
    batch = shards.read([segment.crop(0, min(longest, segment.num_samples)) for segment in chosen])
    if not batch.names:
        raise ValueError(f"none of the held-out clips of {shards.source} can be read: {batch.faults}")
    kinds = {segment.name: segment.kind for segment in chosen}
    features, frames = model.features(batch.waveforms, batch.num_samples)
    return HeldOut.of(model, features, frames, batch.names, [kinds[name] for name in batch.names])
