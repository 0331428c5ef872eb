"""Augmentation of labelled audio during fine-tuning: mixup and SpecAugment."""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(waveforms: Tensor, targets: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup as in AST: mixes another clip of the batch into some of the clips, waveforms and targets alike.

    Args:
        waveforms: (B, S) int16.
        targets: (B, C) fp32.
        probability: Probability in [0, 1] that a clip is mixed with another one.
        generator: CPU generator of all draws.

    Returns:
        Waveforms (B, S) fp32 in [-1, 1), and targets (B, C).
    """
    clips = waveforms.float() / 32768.0
    if probability == 0.0:
        return clips, targets
    mixed = torch.rand(len(clips), generator=generator) < probability
    # Beta(10, 10): the share that one of two sums of ten exponential variables has in both.
    sums = -torch.rand(2, 10, len(clips), generator=generator).clamp(min=1e-7).log().sum(1)
    weight = torch.where(mixed, sums[0] / sums.sum(0), 1.0)[:, None]
    other = torch.randperm(len(clips), generator=generator)
    return weight * clips + (1 - weight) * clips[other], weight * targets + (1 - weight) * targets[other]


def spec_augment(
    log_mel: Tensor,
    num_frames: Tensor,
    *,
    freq_mask: int,
    time_mask: float,
    fill: float,
    generator: torch.Generator,
) -> Tensor:
    """Mask one range of mel bins and one range of frames in each clip (SpecAugment, arXiv 1904.08779).

    Args:
        log_mel: (B, T, F).
        num_frames: (B,) real frames of each clip, on any device.
        freq_mask: Maximum number of masked mel bins.
        time_mask: Maximum share of a clip's frames that is masked, in [0, 1].
        fill: Value of masked entries.
        generator: CPU generator of all draws.

    Returns:
        (B, T, F), a copy.
    """
    clips, max_frames, num_bins = log_mel.shape
    draws = torch.rand(4, clips, 1, generator=generator).to(log_mel.device)
    num_frames = num_frames.to(log_mel.device)[:, None]
    masked_bins = (draws[0] * (min(freq_mask, num_bins) + 1)).floor()
    first_bin = (draws[1] * (num_bins - masked_bins + 1)).floor()
    masked_frames = (draws[2] * ((time_mask * num_frames).floor() + 1)).floor().clamp(max=num_frames - 1)
    first_frame = (draws[3] * (num_frames - masked_frames + 1)).floor()
    bins, frames = torch.arange(num_bins, device=log_mel.device), torch.arange(max_frames, device=log_mel.device)
    in_freq_mask = (bins >= first_bin) & (bins < first_bin + masked_bins)
    in_time_mask = (frames >= first_frame) & (frames < first_frame + masked_frames)
    return log_mel.masked_fill(in_freq_mask[:, None, :] | in_time_mask[:, :, None], fill)
