"""Attention on a CPU, clip by clip, by explicit products: the backend ``clips``.

Letters: N packed rows, Nq query rows, H heads of Dh values; G clips of S queries and T keys each in a length group.

A long clip is a group of its own. Clips of one length form a group, and so do short clips of similar lengths, padded.
There is one matrix (S, T) for each clip and head. The work on the matrices is cut into blocks that stay in the cache.
With p the probabilities, m one where an element is kept and zero where it is dropped, and r the share that is dropped:

    out = (m p) v / (1 - r)              d = grad / (1 - r)              dv = (m p)^T d
    ds = p (m d v^T - rowsum(p m d v^T))        dq = scale ds k        dk = scale ds^T q

The forward keeps only p, in the dtype of the rows. p is not negative, so its sign stores m: minus where dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import draw_kept

BLOCK = 1 << 20  # elements of a block (unless one row of it is longer), and of the matrices of a length group
MAX_PADDING = 1 << 15  # padded elements of a length group: about the cost of the calls for another group


@dataclass
class RowIndex:
    """Packed rows of the clips of a length group, either query rows or rows of keys and values.

    Attributes:
        index: Packed rows of each clip in turn, (G * S,) int64; a shorter clip repeats its last row. A slice where the
            rows are contiguous.
        real: (G, S) bool, False where a row is a repetition. None: no row is.
    """

    index: slice | Tensor
    real: Tensor | None

    @classmethod
    def of(cls, first: list[int], counts: list[int]) -> RowIndex:
        """Index of clips that begin at the packed rows ``first`` and have ``counts`` rows."""
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
        return len(self.index) if self.real is None else int(self.real.sum())

    def matrices(self, x: Tensor, num_clips: int) -> Tensor:
        """(N, H, Dh) -> (G * H, S, Dh); a view of ``x`` where the memory order is the same."""
        rows = x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)
        return rows.unflatten(0, (num_clips, -1)).transpose(1, 2).contiguous().flatten(0, 1)

    def put(self, out: Tensor, x: Tensor, num_clips: int) -> None:
        """Inverse of ``matrices``: copy (G * H, S, Dh) to their rows of ``out`` (N, H, Dh)."""
        x = x.unflatten(0, (num_clips, -1)).transpose(1, 2)
        if isinstance(self.index, slice):
            out[self.index].unflatten(0, (num_clips, -1)).copy_(x)
        elif self.real is None:
            out[self.index] = x.flatten(0, 1).to(out.dtype)
        else:
            out[self.index[self.real.flatten()]] = x[self.real].to(out.dtype)


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


def length_groups(cu_q: Tensor, cu_kv: Tensor, num_heads: int) -> list[LengthGroup]:
    """Groups that cover every clip with queries and keys; the clips with most keys are in the first group."""
    first_q, first_kv = cu_q.tolist(), cu_kv.tolist()
    counts = enumerate(zip(cu_kv.diff().tolist(), cu_q.diff().tolist(), strict=True))
    clips = sorted(((keys, queries, clip) for clip, (keys, queries) in counts if keys and queries), key=_longest_first)
    groups: list[list[tuple[int, int, int]]] = []
    max_queries = real = 0
    for clip in clips:
        keys, queries, _ = clip
        if groups:
            size = num_heads * (len(groups[-1]) + 1) * max(max_queries, queries) * groups[-1][0][0]
            if size <= BLOCK and size - num_heads * (real + keys * queries) <= MAX_PADDING:
                groups[-1].append(clip)
                max_queries, real = max(max_queries, queries), real + keys * queries
                continue
        groups.append([clip])
        max_queries, real = queries, keys * queries
    return [
        LengthGroup(
            num_clips=len(group),
            q=RowIndex.of([first_q[clip] for _, _, clip in group], [queries for _, queries, _ in group]),
            kv=RowIndex.of([first_kv[clip] for _, _, clip in group], [keys for keys, _, _ in group]),
        )
        for group in groups
    ]


def _longest_first(clip: tuple[int, int, int]) -> tuple[int, int, int]:
    keys, queries, index = clip
    return -keys, -queries, index


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


def _result(shape: torch.Size, like: Tensor, indices: list[RowIndex]) -> Tensor:
    """Output for the rows of ``indices``: zeros if they leave out rows, uninitialised memory otherwise."""
    complete = sum(index.count for index in indices) == shape[0]
    return like.new_empty(shape) if complete else like.new_zeros(shape)


class _ClipAttention(torch.autograd.Function):
    """``clip_attention``."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any, q: Tensor | None, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, dropout: float
    ) -> Tensor:
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        num_heads, scale = query.shape[1], query.shape[2] ** -0.5
        groups = length_groups(cu_q, cu_kv, num_heads)
        out = _result(query.shape, query, [group.q for group in groups])
        keep_probabilities, keep_scale = any(ctx.needs_input_grad), 1.0
        probabilities, scratch = [], _Scratch(kv)
        for group in groups:
            queries = group.q.matrices(query, group.num_clips) * scale
            keys, values = (group.kv.matrices(x, group.num_clips) for x in (key, value))
            result = torch.empty_like(queries)
            bias = _padding_bias(group, num_heads, kv.dtype)
            num_matrices, num_queries, num_keys = len(queries), queries.shape[1], keys.shape[1]
            if keep_probabilities:
                probabilities.append(kv.new_empty(num_matrices, num_queries, num_keys))
            for m, s in _blocks(num_matrices, num_queries, num_keys):
                if keep_probabilities:
                    p = probabilities[-1][m, s]
                else:
                    p = queries.new_empty(m.stop - m.start, s.stop - s.start, num_keys)
                torch.bmm(queries[m, s], keys[m].transpose(1, 2), out=p)
                if bias is not None:
                    p += bias[m]
                torch.softmax(p, -1, out=p)
                if dropout > 0.0:
                    kept, keep_scale = draw_kept(p.shape, dropout)
                    sign = kept.sub_(1)  # -1 where dropped, else 0
                    torch.copysign(p, sign.view(p.dtype) if p.element_size() == 2 else sign.to(p.dtype), out=p)
                    p = torch.clamp(p, min=0, out=scratch(p))
                torch.bmm(p, values[m], out=result[m, s])
            group.q.put(out, result.mul_(keep_scale) if dropout > 0.0 else result, group.num_clips)
        ctx.save_for_backward(q, kv, *probabilities)
        ctx.groups, ctx.has_dropout, ctx.keep_scale = groups, dropout > 0.0, keep_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        q, kv, *probabilities = ctx.saved_tensors
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        d_kv = _result(kv.shape, kv, [group.kv for group in ctx.groups])
        d_q = None if q is None else _result(q.shape, q, [group.q for group in ctx.groups])
        d_query, d_key, d_value = d_kv.unbind(1) if d_q is None else (d_q, *d_kv.unbind(1))
        num_heads, scale = query.shape[1], query.shape[2] ** -0.5
        scratch_p, scratch_ds = _Scratch(kv), _Scratch(kv)
        for group, group_p in zip(ctx.groups, probabilities, strict=True):
            queries = group.q.matrices(query, group.num_clips) * scale
            keys, values = (group.kv.matrices(x, group.num_clips) for x in (key, value))
            d = group.q.matrices(grad, group.num_clips)
            if ctx.has_dropout:
                d = d * ctx.keep_scale
            if group.q.real is not None:
                d = d * group.q.real.repeat_interleave(num_heads, 0)[:, :, None]
            # With the rows of a matrix in several blocks, the gradients of keys and values are summed in fp32.
            several_blocks = group_p[0].numel() > BLOCK
            wide = torch.promote_types(kv.dtype, torch.float32) if several_blocks else kv.dtype
            d_keys, d_values = kv.new_zeros(2, *keys.shape, dtype=wide)
            d_queries = torch.empty_like(queries)
            num_matrices, num_queries, num_keys = group_p.shape
            for m, s in _blocks(num_matrices, num_queries, num_keys):
                p = group_p[m, s]
                kept = torch.clamp(p, min=0, out=scratch_p(p)) if ctx.has_dropout else p
                _add_product(d_values[m], kept, d[m, s], accumulate=several_blocks)
                ds = torch.bmm(d[m, s], values[m].transpose(1, 2), out=scratch_ds(p))
                if ctx.has_dropout:
                    ds *= torch.ge(p, 0, out=scratch_p(p))
                    p = torch.abs(p, out=scratch_p(p))
                torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
                torch.bmm(ds, keys[m], out=d_queries[m, s])
                _add_product(d_keys[m], ds, queries[m, s], accumulate=several_blocks)
            group.q.put(d_query, d_queries.mul_(scale), group.num_clips)
            group.kv.put(d_key, d_keys, group.num_clips)
            group.kv.put(d_value, d_values, group.num_clips)
        return d_q, d_kv, None, None, None


def _padding_bias(group: LengthGroup, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """(G * H, 1, T) to add to the scores: -inf at repeated rows. None where no row is repeated."""
    if group.kv.real is None:
        return None
    bias = torch.zeros(group.kv.real.shape, dtype=dtype).masked_fill_(~group.kv.real, float("-inf"))
    return bias.repeat_interleave(num_heads, 0)[:, None, :]


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """Write left^T right to ``out``, or add it to ``out`` with ``accumulate``."""
    if accumulate:
        out += torch.bmm(left.transpose(1, 2), right)
    else:
        torch.bmm(left.transpose(1, 2), right, out=out)
