"""Normalisation of the log-mel spectrogram by the statistics of the batch, as MAE-AST does it.

Letters as in mae_ast.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.packing import real_tokens


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
