"""The packed layout: the rows of all clips of a batch, one clip after another, without padding between them.

Letters: B clips, L tokens of the longest clip, N packed rows (tokens of all clips). ``cu_seqlens`` (B + 1,) int32 holds
the first row of each clip and the total, as in FlashAttention's variable-length interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def cumulative(counts: Tensor) -> Tensor:
    """Cumulative row counts ``cu_seqlens`` (B + 1,) int32 of the row counts (B,), starting at 0."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class TokenCounts(NamedTuple):
    """Row counts of a packed batch: everything that the host must know about its clips.

    The counts are either those of the batch, or upper bounds that batches share (``bucket``). With upper bounds, the
    rows past the last clip are padding: they belong to no clip, add to no loss and get no gradient.

    Attributes:
        visible: Visible tokens of all clips.
        masked: Masked tokens of all clips.
        max_visible: Visible tokens of the clip that has most of them.
        max_masked: Masked tokens of the clip that has most of them.
        max_tokens: Tokens of the longest clip.
        has_padding_rows: Whether rows may lie past the last clip, that is whether the counts are upper bounds.
    """

    visible: int
    masked: int
    max_visible: int
    max_masked: int
    max_tokens: int
    has_padding_rows: bool = False

    @classmethod
    def of(cls, visible: Sequence[int], masked: Sequence[int]) -> TokenCounts:
        """Counts of a batch, from the visible and the masked tokens of each clip."""
        tokens = [v + m for v, m in zip(visible, masked, strict=True)]
        return cls(
            visible=sum(visible),
            masked=sum(masked),
            max_visible=max(visible, default=0),
            max_masked=max(masked, default=0),
            max_tokens=max(tokens, default=0),
        )

    def bucket(self) -> TokenCounts:
        """Counts rounded up, each by at most an eighth or 15 rows, so that batches of similar lengths share them."""
        return TokenCounts(
            visible=round_up(self.visible),
            masked=round_up(self.masked),
            max_visible=round_up(self.max_visible),
            max_masked=round_up(self.max_masked),
            max_tokens=round_up(self.max_tokens),
            has_padding_rows=True,
        )


def round_up(count: int, min_step: int = 16) -> int:
    """The next multiple of a step: the largest power of two up to an eighth of ``count``, at least ``min_step``."""
    step = max(min_step, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


@dataclass
class Packing:
    """Packed rows of one set of tokens: the origin of each row, and the first row of each clip.

    Attributes:
        clip: (N,) int64, clip of each row.
        token: (N,) int64, token index of each row within its clip, ascending within a clip.
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: Upper bound on the rows of a clip.
        has_padding_rows: Whether rows may lie past ``cu_seqlens[-1]``. Such rows repeat token 0 of clip 0.
    """

    clip: Tensor
    token: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    has_padding_rows: bool = False

    @property
    def counts(self) -> Tensor:
        """Rows of each clip (B,), int64."""
        return self.cu_seqlens.diff().long()

    @property
    def valid(self) -> Tensor:
        """(N,) bool, True where a row belongs to a clip."""
        return torch.arange(len(self.clip), device=self.clip.device) < self.cu_seqlens[-1]

    @classmethod
    def of(
        cls,
        selected: Tensor,
        num_rows: int | None = None,
        *,
        max_seqlen: int = 0,
        has_padding_rows: bool = False,
    ) -> Packing:
        """Pack the selected tokens clip by clip, tokens ascending.

        Args:
            selected: (B, L) bool, True for each token that becomes a row.
            num_rows: Rows N of the packing, at least the number of selected tokens. None: exactly that number, which
                the host reads from the device; the next two arguments are then ignored.
            max_seqlen: Upper bound on the selected tokens of a clip.
            has_padding_rows: Whether ``num_rows`` may exceed the number of selected tokens.
        """
        counts = selected.sum(1)
        if num_rows is None:
            host_counts = counts.tolist()
            num_rows, max_seqlen, has_padding_rows = sum(host_counts), max(host_counts, default=0), False
        flat = selected.flatten()
        row = torch.where(flat, flat.cumsum(0) - 1, num_rows)  # row N collects the tokens that are not selected
        index = torch.arange(len(flat), device=flat.device)
        index = index.new_zeros(num_rows + 1).scatter_(0, row, index)[:num_rows]
        width = max(selected.shape[1], 1)
        return cls(
            clip=index // width,
            token=index % width,
            cu_seqlens=cumulative(counts),
            max_seqlen=max_seqlen,
            has_padding_rows=has_padding_rows,
        )


def real_tokens(num_tokens: Tensor, width: int) -> Tensor:
    """(B, width) bool, True where a clip has a token, of the clips' token counts ``num_tokens`` (B,)."""
    return torch.arange(width, device=num_tokens.device) < num_tokens[:, None]
