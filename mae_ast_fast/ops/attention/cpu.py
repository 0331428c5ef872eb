"""Attention on a CPU, clip by clip, by explicit products: the backend ``clips``.

Letters: N packed rows, Nq query rows, H heads of Dh values; G clips of S queries and T keys each in a length group.

A long clip is a group of its own. Clips of one length form a group, and so do short clips of similar lengths, padded.
There is one matrix (S, T) for each clip and head. The work on the matrices is cut into blocks that stay in the cache.
With p the probabilities, m one where an element is kept and zero where it is dropped, and r the share that is dropped:

    out = (m p) v / (1 - r)              d = grad / (1 - r)              dv = (m p)^T d
    ds = p (m d v^T - rowsum(p m d v^T))        dq = scale ds k        dk = scale ds^T q

The forward keeps only p, in the dtype of the rows. p is not negative, so its sign bit stores m: set where dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import draw_kept, keep_scale

BLOCK = 1 << 20  # elements of a block (unless one row of it is longer), and of the matrices of a length group
MAX_PADDING = 1 << 15  # padded elements of a length group: about the cost of the calls for another group


def clip_attention(q: Tensor | None, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each clip, scale Dh ** -0.5, on a CPU and outside a traced graph.

    Args:
        q: (Nq, H, Dh) packed query rows. None: all rows are query rows, and ``kv`` is (N, 3, H, Dh), queries first.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) int32 first query row of each clip, and the end of the last one.
        cu_kv: (B + 1,) int32 first row of each clip, and the end of the last one.
        dropout: Rate on the attention probabilities, in [0, 1); see ``dropout.draw_kept``.

    Returns:
        (Nq, H, Dh) in the dtype of ``kv``; zeros past the last clip.
    """
    return _ClipAttention.apply(q, kv, cu_q, cu_kv, dropout)


class _ClipAttention(torch.autograd.Function):
    """``clip_attention``."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any, q: Tensor | None, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, dropout: float
    ) -> Tensor:
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        num_heads, scale = query.shape[1], query.shape[2] ** -0.5
        groups = length_groups(cu_q, cu_kv, num_heads)
        out = _new_rows(query.shape, query, [group.q for group in groups])
        keep_probabilities = any(ctx.needs_input_grad)
        group_probabilities, scratch = [], _Scratch(kv)
        for group in groups:
            queries = group.q.matrices(query, group.num_clips) * scale
            keys, values = (group.kv.matrices(x, group.num_clips) for x in (key, value))
            key_bias = group.key_bias(num_heads, kv.dtype)
            num_matrices, num_queries, num_keys = len(queries), queries.shape[1], keys.shape[1]
            if keep_probabilities:
                group_probabilities.append(kv.new_empty(num_matrices, num_queries, num_keys))
            group_out = torch.empty_like(queries)
            for matrices, rows in _blocks(num_matrices, num_queries, num_keys):
                if keep_probabilities:
                    probabilities = group_probabilities[-1][matrices, rows]
                else:
                    probabilities = kv.new_empty(matrices.stop - matrices.start, rows.stop - rows.start, num_keys)
                attention_block_forward(
                    queries[matrices, rows],
                    keys[matrices],
                    values[matrices],
                    key_bias=None if key_bias is None else key_bias[matrices],
                    dropout=dropout,
                    probabilities=probabilities,
                    out=group_out[matrices, rows],
                    scratch=scratch,
                )
            group.q.put(out, group_out, group.num_clips)
        ctx.save_for_backward(q, kv, *group_probabilities)
        ctx.groups, ctx.dropout = groups, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        q, kv, *group_probabilities = ctx.saved_tensors
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        d_kv = _new_rows(kv.shape, kv, [group.kv for group in ctx.groups])
        d_q = None if q is None else _new_rows(q.shape, q, [group.q for group in ctx.groups])
        d_query, d_key, d_value = d_kv.unbind(1) if d_q is None else (d_q, *d_kv.unbind(1))
        num_heads, scale = query.shape[1], query.shape[2] ** -0.5
        scratch = _Scratch(kv), _Scratch(kv)
        for group, probabilities in zip(ctx.groups, group_probabilities, strict=True):
            queries = group.q.matrices(query, group.num_clips) * scale
            keys, values = (group.kv.matrices(x, group.num_clips) for x in (key, value))
            d_out = group.q.matrices(grad, group.num_clips)
            if ctx.dropout > 0.0:
                d_out = d_out * keep_scale(ctx.dropout)
            if group.q.valid is not None:
                d_out = d_out * group.q.valid.repeat_interleave(num_heads, 0)[:, :, None]
            # With the rows of a matrix in several blocks, the gradients of keys and values are summed in fp32.
            accumulate = probabilities[0].numel() > BLOCK
            sum_dtype = torch.promote_types(kv.dtype, torch.float32) if accumulate else kv.dtype
            d_keys, d_values = kv.new_zeros(2, *keys.shape, dtype=sum_dtype)
            d_queries = torch.empty_like(queries)
            num_matrices, num_queries, num_keys = probabilities.shape
            for matrices, rows in _blocks(num_matrices, num_queries, num_keys):
                attention_block_backward(
                    d_out[matrices, rows],
                    queries[matrices, rows],
                    keys[matrices],
                    values[matrices],
                    probabilities=probabilities[matrices, rows],
                    has_dropout=ctx.dropout > 0.0,
                    d_queries=d_queries[matrices, rows],
                    d_keys=d_keys[matrices],
                    d_values=d_values[matrices],
                    accumulate=accumulate,
                    scratch=scratch,
                )
            group.q.put(d_query, d_queries.mul_(scale), group.num_clips)
            group.kv.put(d_key, d_keys, group.num_clips)
            group.kv.put(d_value, d_values, group.num_clips)
        return d_q, d_kv, None, None, None


def attention_block_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    key_bias: Tensor | None,
    dropout: float,
    probabilities: Tensor,
    out: Tensor,
    scratch: _Scratch,
) -> None:
    """Attention of S query rows in each of M matrices; writes ``probabilities`` and ``out``.

    Args:
        queries: (M, S, Dh), multiplied by the scale.
        keys: (M, T, Dh).
        values: (M, T, Dh).
        key_bias: (M, 1, T) to add to the scores, or None.
        dropout: Rate on the probabilities, in [0, 1).
        probabilities: (M, S, T), written; with dropout see ``store_keep_mask_in_sign_bit``.
        out: (M, S, Dh), written.
        scratch: Memory for the kept probabilities.
    """
    torch.bmm(queries, keys.transpose(1, 2), out=probabilities)
    if key_bias is not None:
        probabilities += key_bias
    torch.softmax(probabilities, -1, out=probabilities)
    if dropout == 0.0:
        torch.bmm(probabilities, values, out=out)
        return
    keep, scale = draw_kept(probabilities.shape, dropout)
    store_keep_mask_in_sign_bit(probabilities, keep)
    kept = torch.clamp(probabilities, min=0, out=scratch(probabilities))
    torch.bmm(kept, values, out=out)
    out.mul_(scale)


def attention_block_backward(
    d_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    probabilities: Tensor,
    has_dropout: bool,
    d_queries: Tensor,
    d_keys: Tensor,
    d_values: Tensor,
    accumulate: bool,
    scratch: tuple[_Scratch, _Scratch],
) -> None:
    """Gradients of ``attention_block_forward``; writes ``d_queries``, ``d_keys`` and ``d_values``.

    Args:
        d_out: (M, S, Dh) gradient of the output, multiplied by the scale of kept elements.
        queries: (M, S, Dh), multiplied by the scale.
        keys: (M, T, Dh).
        values: (M, T, Dh).
        probabilities: (M, S, T) of the forward.
        has_dropout: Whether signs of the probabilities are the keep mask.
        d_queries: (M, S, Dh), written; without the scale.
        d_keys: (M, T, Dh), written.
        d_values: (M, T, Dh), written.
        accumulate: Add to ``d_keys`` and ``d_values`` instead.
        scratch: Memory for two tensors like ``probabilities``.
    """
    scratch_p, scratch_ds = (memory(probabilities) for memory in scratch)
    kept = torch.clamp(probabilities, min=0, out=scratch_p) if has_dropout else probabilities
    _write_product(d_values, kept, d_out, accumulate=accumulate)
    d_scores = torch.bmm(d_out, values.transpose(1, 2), out=scratch_ds)
    if has_dropout:
        d_scores *= torch.ge(probabilities, 0, out=scratch_p)
        probabilities = torch.abs(probabilities, out=scratch_p)
    torch._softmax_backward_data(d_scores, probabilities, -1, d_scores.dtype, grad_input=d_scores)
    torch.bmm(d_scores, keys, out=d_queries)
    _write_product(d_keys, d_scores, queries, accumulate=accumulate)


def store_keep_mask_in_sign_bit(p: Tensor, keep: Tensor) -> None:
    """Give the dropped elements of ``p``, which are not negative, a sign bit.

    ``p.abs()`` is then p, ``p.clamp(min=0)`` is p where kept and 0 where dropped, and ``p >= 0`` is the mask, except
    where p is 0.

    Args:
        p: Probabilities, changed in place.
        keep: int16 of the same shape, 1 where kept and 0 where dropped (``dropout.draw_kept``); overwritten.
    """
    sign = keep.sub_(1)  # -1 where dropped, else 0
    torch.copysign(p, sign.view(p.dtype) if p.element_size() == 2 else sign.to(p.dtype), out=p)


def _write_product(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """Write left^T right to ``out``, or add it to ``out`` with ``accumulate``."""
    if accumulate:
        out += torch.bmm(left.transpose(1, 2), right)
    else:
        torch.bmm(left.transpose(1, 2), right, out=out)


def _blocks(num_matrices: int, num_queries: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Slices of matrices and of their rows, of at most ``BLOCK`` elements: whole matrices, or rows of one matrix."""
    if num_queries * num_keys <= BLOCK:
        step = BLOCK // (num_queries * num_keys)
        for first in range(0, num_matrices, step):
            yield slice(first, min(first + step, num_matrices)), slice(0, num_queries)
        return
    step = max(1, BLOCK // num_keys)
    for matrix in range(num_matrices):
        for first in range(0, num_queries, step):
            yield slice(matrix, matrix + 1), slice(first, min(first + step, num_queries))


class _Scratch:
    """Scratch buffer that all blocks reuse."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def __call__(self, like: Tensor) -> Tensor:
        if self.memory.numel() < like.numel():
            self.memory = self.memory.new_empty(like.numel())
        return self.memory[: like.numel()].view(like.shape)


# ------------------------------------------------------------------------------------------------------ length groups


def group_by_length(num_queries: list[int], num_keys: list[int], num_heads: int) -> list[list[int]]:
    """Clips to compute together, padded to the most queries and the most keys of their group.

    Clips are taken by their keys, most first. A clip joins the last group unless the group's matrices would then exceed
    ``BLOCK`` elements, or their padding ``MAX_PADDING``.

    Args:
        num_queries: (B,) query rows of each clip.
        num_keys: (B,) rows of keys and values of each clip.
        num_heads: H, matrices per clip.

    Returns:
        Indices of the clips of each group. Clips without queries or keys are in no group.
    """
    clips = [clip for clip, counts in enumerate(zip(num_queries, num_keys, strict=True)) if all(counts)]
    clips.sort(key=lambda clip: (-num_keys[clip], -num_queries[clip], clip))
    groups: list[list[int]] = []
    max_queries = num_elements = 0  # of the last group: most queries of a clip, elements of all matrices of a head
    for clip in clips:
        clip_elements = num_queries[clip] * num_keys[clip]
        if groups:
            padded_queries = max(max_queries, num_queries[clip])
            padded_elements = (len(groups[-1]) + 1) * padded_queries * num_keys[groups[-1][0]]
            padding = padded_elements - num_elements - clip_elements
            if num_heads * padded_elements <= BLOCK and num_heads * padding <= MAX_PADDING:
                groups[-1].append(clip)
                max_queries, num_elements = padded_queries, num_elements + clip_elements
                continue
        groups.append([clip])
        max_queries, num_elements = num_queries[clip], clip_elements
    return groups


def length_groups(cu_q: Tensor, cu_kv: Tensor, num_heads: int) -> list[LengthGroup]:
    """The groups of ``group_by_length`` with the packed rows of their clips."""
    query_bounds, key_bounds = cu_q.tolist(), cu_kv.tolist()
    num_queries, num_keys = ([stop - start for start, stop in pairwise(x)] for x in (query_bounds, key_bounds))
    return [
        LengthGroup(num_clips=len(clips), q=RowIndex.of(clips, query_bounds), kv=RowIndex.of(clips, key_bounds))
        for clips in group_by_length(num_queries, num_keys, num_heads)
    ]


@dataclass
class RowIndex:
    """Packed rows of the clips of a length group, either query rows or rows of keys and values.

    Attributes:
        index: Packed rows of each clip in turn, (G * S,) int64; a shorter clip repeats its last row. A slice where the
            rows are contiguous.
        valid: (G, S) bool, False where a row is a repetition. None: no row is.
    """

    index: slice | Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, clips: list[int], bounds: list[int]) -> RowIndex:
        """Index of some clips; ``bounds`` holds the first packed row of each clip, and the end of the last one."""
        first, counts = [bounds[clip] for clip in clips], [bounds[clip + 1] - bounds[clip] for clip in clips]
        longest = max(counts)
        equal = min(counts) == longest
        if equal and all(row == first[0] + clip * longest for clip, row in enumerate(first)):
            return cls(slice(first[0], first[0] + len(first) * longest), None)
        last_column, column = torch.tensor(counts)[:, None] - 1, torch.arange(longest)
        index = torch.tensor(first)[:, None] + torch.minimum(column, last_column)
        return cls(index.flatten(), None if equal else column <= last_column)

    @property
    def count(self) -> int:
        """Packed rows, without repetitions."""
        if isinstance(self.index, slice):
            return self.index.stop - self.index.start
        return len(self.index) if self.valid is None else int(self.valid.sum())

    def matrices(self, x: Tensor, num_clips: int) -> Tensor:
        """(N, H, Dh) -> (G * H, S, Dh); a view of ``x`` where the memory order is the same."""
        rows = x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)
        return rows.unflatten(0, (num_clips, -1)).transpose(1, 2).contiguous().flatten(0, 1)

    def put(self, out: Tensor, x: Tensor, num_clips: int) -> None:
        """Inverse of ``matrices``: copy (G * H, S, Dh) to their rows of ``out`` (N, H, Dh)."""
        x = x.unflatten(0, (num_clips, -1)).transpose(1, 2)
        if isinstance(self.index, slice):
            out[self.index].unflatten(0, (num_clips, -1)).copy_(x)
        elif self.valid is None:
            out[self.index] = x.flatten(0, 1).to(out.dtype)
        else:
            out[self.index[self.valid.flatten()]] = x[self.valid].to(out.dtype)


@dataclass
class LengthGroup:
    """Clips that are computed together.

    Attributes:
        num_clips: G.
        q: Query rows of the clips.
        kv: Rows of keys and values of the clips.
    """

    num_clips: int
    q: RowIndex
    kv: RowIndex

    def key_bias(self, num_heads: int, dtype: torch.dtype) -> Tensor | None:
        """(G * H, 1, T) to add to the scores: -inf at repeated keys. None where no key is repeated."""
        if self.kv.valid is None:
            return None
        bias = torch.zeros(self.kv.valid.shape, dtype=dtype).masked_fill_(~self.kv.valid, float("-inf"))
        return bias.repeat_interleave(num_heads, 0)[:, None, :]


def _new_rows(shape: torch.Size, like: Tensor, indices: list[RowIndex]) -> Tensor:
    """Tensor for the rows of ``indices``: zeros if they leave out rows, uninitialised memory otherwise."""
    complete = sum(index.count for index in indices) == shape[0]
    return like.new_empty(shape) if complete else like.new_zeros(shape)
