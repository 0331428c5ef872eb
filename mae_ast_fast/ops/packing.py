"""The packed layout: the rows of all clips of a batch, one clip after another, without padding between them.

Letters: B clips, L tokens of the longest clip, N packed rows (tokens of all clips). ``cu_seqlens`` (B + 1,) int32 holds
the first row of each clip and the total, as in FlashAttention's variable-length interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def similar_clips(cu_seqlens: Tensor, max_seqlen: int, num_rows: int) -> list[Tensor] | None:
    """Groups of clips whose lengths differ by less than a factor of 2, where padding to the longest would waste much.

    Args:
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: Rows of the longest clip.
        num_rows: N.

    Returns:
        Ascending int64 indices of each group's clips; clips without rows are in no group. None where at least half of
        the padded rows are real, on other devices than a CPU and while a graph is traced: the host reads lengths here.
    """
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if (cu_seqlens.shape[0] - 1) * max_seqlen <= 2 * num_rows or int(cu_seqlens[-1]) != num_rows:
        return None
    counts = cu_seqlens.diff().long()
    exponents = torch.where(counts > 0, counts.clamp(min=1).double().log2().floor().long(), -1)
    groups = [(exponents == exponent).nonzero()[:, 0] for exponent in range(max_seqlen.bit_length())]
    return [clips for clips in groups if len(clips)]


def rows_of_clips(cu_seqlens: Tensor, clips: Tensor) -> tuple[Tensor, Tensor, int]:
    """The packed rows of a subset of clips: their indices (n,), and ``cu_seqlens`` and ``max_seqlen`` of the subset."""
    counts = cu_seqlens.diff().long()[clips]
    first, subset_first = cu_seqlens[:-1].long()[clips], F.pad(counts.cumsum(0), (1, 0))
    total = int(subset_first[-1])
    shift = torch.repeat_interleave(first - subset_first[:-1], counts, output_size=total)
    return torch.arange(total, device=cu_seqlens.device) + shift, subset_first.to(cu_seqlens.dtype), int(counts.max())


class PaddedView:
    """Packed rows (N, ...) laid out as (B, max_seqlen, ...) and back; free of copies where all clips are equally long.

    Nothing is read back from the device. Padding rows past the last clip (see packing.TokenCounts) are left out of the
    padded layout, and come back as copies of some row.

    Args:
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: Upper bound on the rows of a clip.
        num_rows: N.
        has_padding_rows: Whether rows may lie past ``cu_seqlens[-1]``.

    Attributes:
        full: Whether every clip has ``max_seqlen`` rows, so that both layouts are the same memory.
        valid: (B, max_seqlen) bool, True where a clip has a row.
        key_valid: ``valid`` with one valid key for each empty clip, so that no softmax is empty.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, num_rows: int, *, has_padding_rows: bool = False) -> None:
        self.batch, self.length = cu_seqlens.shape[0] - 1, max_seqlen
        # In this order: with upper bounds, a traced graph must not be specialised on the sizes.
        self.full = not has_padding_rows and self.batch * max_seqlen == num_rows
        counts = cu_seqlens.diff()[:, None]
        index = torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = index < counts
        self.key_valid = index < counts.clamp(min=1)
        if not self.full:
            row = torch.arange(num_rows, device=cu_seqlens.device)
            clip = torch.searchsorted(cu_seqlens[1:].contiguous(), row.to(cu_seqlens.dtype), right=True)
            self._in_clip = clip < self.batch  # (N,), False for padding rows
            clip = clip.clamp(max=self.batch - 1)
            self._padded_row = (
                clip * max_seqlen + row - cu_seqlens[clip]
            )  # (N,), index of each row in the padded layout

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, max_seqlen, ...), zeros where a clip has no row."""
        if self.full:
            return x.unflatten(0, (self.batch, self.length))
        num_padded = self.batch * self.length
        padded = x.new_zeros(num_padded + 1, *x.shape[1:])  # the last row collects the padding rows of x
        padded = padded.index_copy(0, torch.where(self._in_clip, self._padded_row, num_padded), x)
        return padded[:num_padded].unflatten(0, (self.batch, self.length))

    def unpad(self, x: Tensor) -> Tensor:
        """(B, max_seqlen, ...) -> (N, ...); a (max_seqlen,) tensor is used for every clip."""
        if x.dim() == 1:
            x = x.expand(self.batch, -1)
        flat = x.flatten(0, 1)
        return flat if self.full else flat.index_select(0, torch.where(self._in_clip, self._padded_row, 0))


def padded_views(
    *,
    cu_q: Tensor,
    max_q: int,
    num_q: int,
    cu_kv: Tensor,
    max_kv: int,
    num_kv: int,
    has_padding_rows: bool = False,
) -> tuple[PaddedView, PaddedView]:
    """Views of the query rows and of keys and values; the same object where all rows are query rows."""
    kv_view = PaddedView(cu_kv, max_kv, num_kv, has_padding_rows=has_padding_rows)
    if cu_q is cu_kv:
        return kv_view, kv_view
    return PaddedView(cu_q, max_q, num_q, has_padding_rows=has_padding_rows), kv_view
