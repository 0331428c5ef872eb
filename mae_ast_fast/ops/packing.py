"""The one packed layout: rows of all clips of a batch, one clip after another, with no padding between them.

Letters: B clips, N rows (tokens of all clips), K visible and M masked tokens of a clip. ``cu_seqlens`` (B + 1,) int32
holds the first row of each clip and the total, as FlashAttention's variable-length interface takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def cumulative(counts: Tensor) -> Tensor:
    """``cu_seqlens`` (B + 1,) int32 of the row counts (B,)."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class TokenCounts(NamedTuple):
    """How many rows of each kind a batch is packed into, and the most of one clip: all that the host must know of it.

    Either exact, or a bucket that holds the batch (``bucket``): rows past the last clip then belong to none, count in
    no loss and give no gradient.
    """

    visible: int
    masked: int
    most_visible: int
    most_masked: int
    max_tokens: int
    exact: bool = True

    @classmethod
    def of(cls, visible: Sequence[int], masked: Sequence[int]) -> TokenCounts:
        """Of the clips' visible and masked tokens."""
        tokens = [v + m for v, m in zip(visible, masked, strict=True)]
        most = (max(counts, default=0) for counts in (visible, masked, tokens))
        return cls(sum(visible), sum(masked), *most)

    def bucket(self) -> TokenCounts:
        """Sizes rounded up, by at most an eighth or 15 rows, so that batches of like lengths share them."""
        return TokenCounts(*map(round_up, self[:5]), exact=False)


def round_up(count: int, least: int = 16) -> int:
    """The next multiple of an eighth of ``count`` (a power of two, at least ``least``)."""
    step = max(least, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


@dataclass
class Packing:
    """Packed rows of one kind of token: where each row comes from, and where each clip begins.

    Attributes:
        clip: (N,) int64, clip of a row.
        token: (N,) int64, token index of a row within its clip, ascending inside a clip.
        cu_seqlens: (B + 1,) int32.
        max_seqlen: At least the rows of the longest clip.
        exact: Whether the N rows all belong to a clip; else those from ``cu_seqlens[-1]`` on repeat token 0 of clip 0.
    """

    clip: Tensor
    token: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    exact: bool = True

    @property
    def counts(self) -> Tensor:
        """Rows of each clip (B,), int64."""
        return self.cu_seqlens.diff().long()

    @property
    def valid(self) -> Tensor:
        """(N,) bool, True where a row belongs to a clip."""
        return torch.arange(len(self.clip), device=self.clip.device) < self.cu_seqlens[-1]

    @classmethod
    def of(cls, selected: Tensor, rows: int | None = None, max_seqlen: int = 0, exact: bool = True) -> Packing:
        """Packs the True places of ``selected`` (B, L) bool, clip by clip, tokens ascending.

        Args:
            selected: Where rows come from.
            rows: How many rows to make, at least the True places; None: as many, for which the host waits.
            max_seqlen: With ``rows``: at least the rows of the longest clip.
            exact: With ``rows``: whether there are as many True places.
        """
        counts = selected.sum(1)
        if rows is None:
            listed = counts.tolist()
            rows, max_seqlen, exact = sum(listed), max(listed, default=0), True
        flat = selected.flatten()
        place = torch.where(flat, flat.cumsum(0) - 1, rows)  # the last place takes what is not selected
        index = torch.arange(len(flat), device=flat.device)
        index = index.new_zeros(rows + 1).scatter_(0, place, index)[:rows]
        width = max(selected.shape[1], 1)
        return cls(index // width, index % width, cumulative(counts), max_seqlen, exact)


def real_tokens(tokens: Tensor, width: int) -> Tensor:
    """(B, width) bool, True where a clip has a token; ``tokens`` (B,) are the clips' counts."""
    return torch.arange(width, device=tokens.device) < tokens[:, None]
