"""The one packed layout: rows of all clips of a batch, one clip after another, with no padding between them.

Letters: B clips, N rows (tokens of all clips), K visible and M masked tokens of a clip. ``cu_seqlens`` (B + 1,) int32
holds the first row of each clip and the total, as FlashAttention's variable-length interface takes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def sinusoid(num_tokens: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed sinusoidal positions (num_tokens, dim) in fp32: sine in the even columns, cosine in the odd ones.

    Computed in fp32 throughout, as the paper's code does, so that a table from its checkpoints compares equal.
    """
    position = torch.arange(num_tokens, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def cumulative(counts: Tensor) -> Tensor:
    """``cu_seqlens`` (B + 1,) int32 of the row counts (B,)."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


@dataclass
class Packing:
    """Packed rows of one kind of token: where each row comes from, and where each clip begins.

    Attributes:
        clip: (N,) int64, clip of a row.
        token: (N,) int64, token index of a row within its clip, ascending inside a clip.
        cu_seqlens: (B + 1,) int32.
        max_seqlen: Rows of the longest clip.
    """

    clip: Tensor
    token: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def counts(self) -> Tensor:
        """Rows of each clip (B,), int64."""
        return self.cu_seqlens.diff().long()

    @classmethod
    def of(cls, selected: Tensor) -> Packing:
        """Packs the True places of ``selected`` (B, L) bool, clip by clip, tokens ascending."""
        counts = selected.sum(1)
        clip, token = selected.nonzero(as_tuple=True)
        longest = int(counts.max()) if counts.numel() else 0
        return cls(clip, token, cumulative(counts), longest)


def real_tokens(tokens: Tensor, width: int) -> Tensor:
    """(B, width) bool, True where a clip has a token; ``tokens`` (B,) are the clips' counts."""
    return torch.arange(width, device=tokens.device) < tokens[:, None]
