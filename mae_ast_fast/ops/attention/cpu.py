"""Attention on a CPU, clip by clip, by explicit products: the backend ``clips``.

Letters: N packed rows, Nq of them ask, H heads of Dh; G clips of S queries and T keys each in a bundle.

A long clip goes alone; clips of one length go together, and so do short ones of like length, padded: one matrix (S, T)
for each clip and head. The work on the matrices is cut into blocks that stay in the cache. With p the probabilities, m
one where an element is kept and zero where it is dropped, and r the share that is dropped:

    out = (m p) v / (1 - r)              d = grad / (1 - r)              dv = (m p)^T d
    ds = p (m d v^T - rowsum(p m d v^T))        dq = scale ds k        dk = scale ds^T q

The forward keeps p alone, in the dtype of the rows. p is not negative, so its sign holds m: minus where dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import draw_kept

BLOCK = 1 << 20  # elements of a block, unless one row of it is longer; and of the matrices of clips that go together
MAX_PADDING = 1 << 15  # padded elements of a bundle: about what the calls for another bundle cost


@dataclass
class RowIndex:
    """Rows of one kind of a bundle's clips.

    Attributes:
        index: Packed rows of each clip in turn, (G * S,) int64; a shorter clip repeats its last one. A slice where they
            lie side by side.
        real: (G, S) bool, False where a row is repeated; None where none is.
    """

    index: slice | Tensor
    real: Tensor | None

    @classmethod
    def of(cls, first: list[int], counts: list[int]) -> RowIndex:
        """Of clips that begin at these packed rows and have so many."""
        longest = max(counts)
        equal = min(counts) == longest
        if equal and all(row == first[0] + clip * longest for clip, row in enumerate(first)):
            return cls(slice(first[0], first[0] + len(first) * longest), None)
        last, place = torch.tensor(counts)[:, None] - 1, torch.arange(longest)
        index = torch.tensor(first)[:, None] + torch.minimum(place, last)
        return cls(index.flatten(), None if equal else place <= last)

    @property
    def count(self) -> int:
        """Packed rows, without repetitions."""
        if isinstance(self.index, slice):
            return self.index.stop - self.index.start
        return len(self.index) if self.real is None else int(self.real.sum())

    def matrices(self, x: Tensor, clips: int) -> Tensor:
        """(N, H, Dh) -> (G * H, S, Dh); of ``x``'s memory where the order is the same."""
        rows = x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)
        return rows.unflatten(0, (clips, -1)).transpose(1, 2).contiguous().flatten(0, 1)

    def put(self, into: Tensor, x: Tensor, clips: int) -> None:
        """``matrices`` backwards: (G * H, S, Dh) to their rows of ``into`` (N, H, Dh)."""
        x = x.unflatten(0, (clips, -1)).transpose(1, 2)
        if isinstance(self.index, slice):
            into[self.index].unflatten(0, (clips, -1)).copy_(x)
        elif self.real is None:
            into[self.index] = x.flatten(0, 1).to(into.dtype)
        else:
            into[self.index[self.real.flatten()]] = x[self.real].to(into.dtype)


@dataclass
class LengthGroup:
    """Clips that go together: their number, and the rows that ask and are asked."""

    clips: int
    q: RowIndex
    kv: RowIndex


def bundles(cu_q: Tensor, cu_kv: Tensor, heads: int) -> list[LengthGroup]:
    """Every clip that has queries and keys is in one, the clips with most keys in the first."""
    first_q, first_kv = cu_q.tolist(), cu_kv.tolist()
    counts = enumerate(zip(cu_kv.diff().tolist(), cu_q.diff().tolist(), strict=True))
    clips = sorted(((keys, queries, clip) for clip, (keys, queries) in counts if keys and queries), key=_longest_first)
    groups: list[list[tuple[int, int, int]]] = []
    most = real = 0
    for clip in clips:
        keys, queries, _ = clip
        if groups:
            size = heads * (len(groups[-1]) + 1) * max(most, queries) * groups[-1][0][0]
            if size <= BLOCK and size - heads * (real + keys * queries) <= MAX_PADDING:
                groups[-1].append(clip)
                most, real = max(most, queries), real + keys * queries
                continue
        groups.append([clip])
        most, real = queries, keys * queries
    found = []
    for group in groups:
        keys, queries, index = zip(*group, strict=True)
        of_q = RowIndex.of([first_q[clip] for clip in index], list(queries))
        found.append(LengthGroup(len(group), of_q, RowIndex.of([first_kv[clip] for clip in index], list(keys))))
    return found


def _longest_first(clip: tuple[int, int, int]) -> tuple[int, int, int]:
    keys, queries, number = clip
    return -keys, -queries, number


def clip_attention(q: Tensor | None, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each clip, scale Dh ** -0.5, on a CPU and outside a traced graph.

    Args:
        q: (Nq, H, Dh) packed rows that ask; None: all, and ``kv`` is (N, 3, H, Dh), their queries first.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) int32 first asking row of each clip.
        cu_kv: (B + 1,) int32 first row of each clip.
        dropout: Rate on the probabilities; see ``reference.draw_kept``.

    Returns:
        (Nq, H, Dh) in the dtype of ``kv``; zeros past the last clip.
    """
    return _ClipAttention.apply(q, kv, cu_q, cu_kv, dropout)


def _blocks(matrices: int, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Matrices and their rows, of at most ``BLOCK`` elements: several matrices whole, or rows of one."""
    if queries * keys <= BLOCK:
        step = BLOCK // (queries * keys)
        for first in range(0, matrices, step):
            yield slice(first, min(first + step, matrices)), slice(0, queries)
        return
    step = max(1, BLOCK // keys)
    for matrix in range(matrices):
        for first in range(0, queries, step):
            yield slice(matrix, matrix + 1), slice(first, min(first + step, queries))


class _Scratch:
    """Memory that every block uses again."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def __call__(self, like: Tensor) -> Tensor:
        if self.memory.numel() < like.numel():
            self.memory = self.memory.new_empty(like.numel())
        return self.memory[: like.numel()].view(like.shape)


def _result(shape: torch.Size, like: Tensor, rows: list[RowIndex]) -> Tensor:
    """For the rows of the bundles; zeros where they leave some out."""
    every = sum(of.count for of in rows) == shape[0]
    return like.new_empty(shape) if every else like.new_zeros(shape)


class _ClipAttention(torch.autograd.Function):
    """``clip_attention``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, dropout: float) -> Tensor:
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        heads, scale = query.shape[1], query.shape[2] ** -0.5
        found = bundles(cu_q, cu_kv, heads)
        out = _result(query.shape, query, [bundle.q for bundle in found])
        keep, kept_of = any(ctx.needs_input_grad), 1.0
        probabilities, memory = [], _Scratch(kv)
        for bundle in found:
            queries = bundle.q.matrices(query, bundle.clips) * scale
            keys, values = (bundle.kv.matrices(x, bundle.clips) for x in (key, value))
            result = torch.empty_like(queries)
            hidden = _hidden_keys(bundle, heads, kv.dtype)
            shape = len(queries), queries.shape[1], keys.shape[1]
            if keep:
                probabilities.append(kv.new_empty(shape))
            for m, s in _blocks(*shape):
                p = probabilities[-1][m, s] if keep else queries.new_empty(m.stop - m.start, s.stop - s.start, shape[2])
                torch.bmm(queries[m, s], keys[m].transpose(1, 2), out=p)
                if hidden is not None:
                    p += hidden[m]
                torch.softmax(p, -1, out=p)
                if dropout > 0.0:
                    kept, kept_of = draw_kept(p.shape, dropout)
                    minus = kept.sub_(1)  # -1 where dropped, else 0
                    torch.copysign(p, minus.view(p.dtype) if p.element_size() == 2 else minus.to(p.dtype), out=p)
                    p = torch.clamp(p, min=0, out=memory(p))
                torch.bmm(p, values[m], out=result[m, s])
            bundle.q.put(out, result.mul_(kept_of) if dropout > 0.0 else result, bundle.clips)
        ctx.save_for_backward(q, kv, *probabilities)
        ctx.bundles, ctx.dropout, ctx.scaled = found, dropout > 0.0, kept_of
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        q, kv, *probabilities = ctx.saved_tensors
        query, key, value = kv.unbind(1) if q is None else (q, *kv.unbind(1))
        d_kv = _result(kv.shape, kv, [bundle.kv for bundle in ctx.bundles])
        d_q = None if q is None else _result(q.shape, q, [bundle.q for bundle in ctx.bundles])
        d_query, d_key, d_value = d_kv.unbind(1) if q is None else (d_q, *d_kv.unbind(1))
        heads, scale = query.shape[1], query.shape[2] ** -0.5
        one, two = _Scratch(kv), _Scratch(kv)
        for bundle, of_bundle in zip(ctx.bundles, probabilities, strict=True):
            queries = bundle.q.matrices(query, bundle.clips) * scale
            keys, values = (bundle.kv.matrices(x, bundle.clips) for x in (key, value))
            d = bundle.q.matrices(grad, bundle.clips)
            if ctx.dropout:
                d = d * ctx.scaled
            if bundle.q.real is not None:
                d = d * bundle.q.real.repeat_interleave(heads, 0)[:, :, None]
            # Rows of a matrix in several blocks: their gradients of keys and values are summed up in fp32.
            parts = of_bundle[0].numel() > BLOCK
            wide = torch.promote_types(kv.dtype, torch.float32) if parts else kv.dtype
            of_keys, of_values = kv.new_zeros(2, *keys.shape, dtype=wide)
            of_queries = torch.empty_like(queries)
            for m, s in _blocks(*of_bundle.shape):
                p = of_bundle[m, s]
                kept = torch.clamp(p, min=0, out=one(p)) if ctx.dropout else p
                _add_product(of_values[m], kept, d[m, s], parts)
                ds = torch.bmm(d[m, s], values[m].transpose(1, 2), out=two(p))
                if ctx.dropout:
                    ds *= torch.ge(p, 0, out=one(p))
                    p = torch.abs(p, out=one(p))
                torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
                torch.bmm(ds, keys[m], out=of_queries[m, s])
                _add_product(of_keys[m], ds, queries[m, s], parts)
            bundle.q.put(d_query, of_queries.mul_(scale), bundle.clips)
            bundle.kv.put(d_key, of_keys, bundle.clips)
            bundle.kv.put(d_value, of_values, bundle.clips)
        return d_q, d_kv, None, None, None


def _hidden_keys(bundle: LengthGroup, heads: int, dtype: torch.dtype) -> Tensor | None:
    """(G * H, 1, T) to add to the scores: -inf at repeated rows."""
    if bundle.kv.real is None:
        return None
    hidden = torch.zeros(bundle.kv.real.shape, dtype=dtype).masked_fill_(~bundle.kv.real, float("-inf"))
    return hidden.repeat_interleave(heads, 0)[:, None, :]


def _add_product(into: Tensor, left: Tensor, right: Tensor, parts: bool) -> None:
    """left^T right, into ``into`` or, of one part of the rows, added to it."""
    if parts:
        into += torch.bmm(left.transpose(1, 2), right)
    else:
        torch.bmm(left.transpose(1, 2), right, out=into)
