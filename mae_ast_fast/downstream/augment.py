"""What fine-tuning does to labelled audio so that it is not learned by heart."""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(waveforms: Tensor, targets: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup as in AST: into a share of the clips another one of the batch is mixed, waveforms and targets alike.

    Args:
        waveforms: (B, S) int16.
        targets: (B, C) fp32.
        share: In [0, 1].
        generator: Of the draws.

    Returns:
        fp32 waveforms, full scale 1, and targets.
    """
    clips = waveforms.float() / 32768.0
    if share == 0.0:
        return clips, targets
    mixed = torch.rand(len(clips), generator=generator) < share
    # Beta(10, 10) as the share of one of two sums of ten exponential variables
    sums = -torch.rand(2, 10, len(clips), generator=generator).clamp(min=1e-7).log().sum(1)
    own = torch.where(mixed, sums[0] / sums.sum(0), 1.0)[:, None]
    other = torch.randperm(len(clips), generator=generator)
    return own * clips + (1 - own) * clips[other], own * targets + (1 - own) * targets[other]


def spec_augment(
    features: Tensor, frames: Tensor, freq_mask: int, time_mask: float, fill: float, generator: torch.Generator
) -> Tensor:
    """Hides a stretch of mel bins and one of frames in each clip (SpecAugment, arXiv 1904.08779).

    Args:
        features: (B, T, F).
        frames: (B,) real frames of each clip, on any device.
        freq_mask: Bins at most.
        time_mask: Share of a clip's frames at most.
        fill: What stands in their place.
        generator: Of the draws, on the CPU.
    """
    clips, width, bins = features.shape
    draws = torch.rand(4, clips, 1, generator=generator).to(features.device)
    frames = frames.to(features.device)[:, None]
    high = (draws[0] * (min(freq_mask, bins) + 1)).floor()
    low = (draws[1] * (bins - high + 1)).floor()
    long = (draws[2] * ((time_mask * frames).floor() + 1)).floor().clamp(max=frames - 1)
    start = (draws[3] * (frames - long + 1)).floor()
    f, t = torch.arange(bins, device=features.device), torch.arange(width, device=features.device)
    hidden = ((f >= low) & (f < low + high))[:, None, :] | ((t >= start) & (t < start + long))[:, :, None]
    return features.masked_fill(hidden, fill)
