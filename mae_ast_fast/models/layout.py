"""Where the tokens of a batch are: all of them, the visible and the masked ones, and the way from one to the other.

Letters as in mae_ast.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.packing import Packing, TokenCounts


class QueryRows(NamedTuple):
    """The rows whose output a layer computes; the others serve as keys and values only.

    Attributes:
        packing: Packing of the M query rows.
        indices: (M,) int64 number of each query row among the N rows; N for a padding row.
    """

    packing: Packing
    indices: Tensor


@dataclass
class TokenLayout:
    """The rows of a packed batch under one mask, on the device; built once per pass.

    Attributes:
        num_frames: (B,) int64 real frames of each clip.
        mask: (B, L) bool, True = masked; False past a clip's tokens.
        tokens: All N rows: a clip's class tokens, if the model has some, then its tokens.
        visible: The visible tokens.
        masked: The M masked tokens.
        num_class_tokens: Class tokens of each clip.
        has_row: (B, L) bool, whether a token is visible or masked. None: all tokens of the clips are.
    """

    num_frames: Tensor
    mask: Tensor
    tokens: Packing
    visible: Packing
    masked: Packing
    num_class_tokens: int = 0
    has_row: Tensor | None = None

    @classmethod
    def of(
        cls,
        num_frames: Tensor,
        is_visible: Tensor,
        is_masked: Tensor,
        counts: TokenCounts,
        *,
        num_class_tokens: int = 0,
        has_gaps: bool = False,
    ) -> TokenLayout:
        """The layout of a batch with a mask.

        Args:
            num_frames: (B,) int64 real frames of each clip.
            is_visible: (B, L) bool; False past a clip's tokens, as ``is_masked``.
            is_masked: (B, L) bool.
            counts: Token counts, without class tokens.
            num_class_tokens: Class tokens of each clip.
            has_gaps: Whether some tokens of the clips are neither visible nor masked.
        """
        padding, has_row = counts.has_padding_rows, is_visible | is_masked
        return cls(
            num_frames=num_frames,
            mask=is_masked,
            tokens=_pack_tokens(has_row, counts, num_class_tokens),
            visible=Packing.of(is_visible, counts.visible, max_seqlen=counts.max_visible, has_padding_rows=padding),
            masked=Packing.of(is_masked, counts.masked, max_seqlen=counts.max_masked, has_padding_rows=padding),
            num_class_tokens=num_class_tokens,
            has_row=has_row if has_gaps else None,
        )

    @classmethod
    def unmasked(
        cls, num_frames: Tensor, real: Tensor, num_tokens: Sequence[int], *, num_class_tokens: int = 0
    ) -> TokenLayout:
        """The layout of a batch without a mask.

        Args:
            num_frames: (B,) int64 real frames of each clip.
            real: (B, L) bool, True where a clip has a token.
            num_tokens: Tokens of each clip, on the host.
            num_class_tokens: Class tokens of each clip.
        """
        counts = TokenCounts.of(num_tokens, [0] * len(num_tokens))
        visible = _pack_tokens(real, counts, 0)
        no_rows = num_frames.new_zeros(0)
        return cls(
            num_frames=num_frames,
            mask=torch.zeros_like(real),
            tokens=_pack_tokens(real, counts, num_class_tokens) if num_class_tokens else visible,
            visible=visible,
            masked=Packing(no_rows, no_rows, torch.zeros_like(visible.cu_seqlens), max_seqlen=0),
            num_class_tokens=num_class_tokens,
        )

    @property
    def ids_restore(self) -> Tensor:
        """(N,) int64 row of each token among the visible ones, which the class tokens of all clips precede.

        It is -1 for a masked token and for a padding row.
        """
        tokens, num_class_tokens = self.tokens, self.num_class_tokens
        if num_class_tokens == 0:
            is_visible = ~self.mask[tokens.clip, tokens.token] & tokens.valid
            return torch.where(is_visible, is_visible.cumsum(0) - 1, -1)
        is_class = tokens.token < num_class_tokens
        token = (tokens.token - num_class_tokens).clamp(min=0)
        is_visible = ~self.mask[tokens.clip, token] & ~is_class  # a padding row repeats a class token
        first_token = num_class_tokens * len(self.mask)
        ids_restore = torch.where(is_visible, first_token + is_visible.cumsum(0) - 1, -1)
        return torch.where(is_class & tokens.valid, num_class_tokens * tokens.clip + tokens.token, ids_restore)

    @property
    def query_rows(self) -> QueryRows:
        """The masked tokens among all rows, as those whose output the last layer computes."""
        masked = self.masked
        row_in_clip = masked.token
        if self.has_row is not None:
            row_in_clip = self.has_row.cumsum(1)[masked.clip, masked.token] - 1
        masked_rows = self.tokens.cu_seqlens[masked.clip] + row_in_clip + self.num_class_tokens
        return QueryRows(masked, torch.where(masked.valid, masked_rows, len(self.tokens.clip)))

    @property
    def has_loss(self) -> Tensor:
        """(B,) bool, whether a clip adds to the losses: it has both visible and masked tokens."""
        return (self.visible.counts > 0) & (self.masked.counts > 0)


def _pack_tokens(real: Tensor, counts: TokenCounts, num_class_tokens: int) -> Packing:
    """Packing of all tokens (B, L) bool, with ``num_class_tokens`` rows before those of each clip."""
    return Packing.of(
        F.pad(real, (num_class_tokens, 0), value=True) if num_class_tokens else real,
        counts.visible + counts.masked + num_class_tokens * len(real),
        max_seqlen=counts.max_tokens + num_class_tokens,
        has_padding_rows=counts.has_padding_rows,
    )
