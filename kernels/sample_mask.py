"""Which tokens a clip hides, strategies random and chunk: bit for bit the masks of masking.py, one program a clip.

    words(index, stream) = Philox4x32-10 of counter (index, clip id, epoch, stream) under key = seed
    random: hidden = the M smallest words; ties go to the lower token
    chunk:  cover(t, f) = min of the words of the c x c blocks (t - i, f - j), i, j < c, where squares start;
            among the tokens whose cover is at most the M-th smallest one, the M smallest second words

Letters: B clips, L = ``max_tokens``, M = ``masked`` hidden tokens of a clip, c in {3, 4, 5}. Fused: everything; only
the mask is written (unfused: words of all starts, two running minima and two sorts in int64). Nothing is sorted: the
M-th smallest word is found bit by bit, 32 counts over the clip. Words are drawn again for every square that may hold a
token. Every start of the reference is in its range, so nothing is clipped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import launch, options

# As in masking.py: streams, and the blocks before the grid in which a square may start.
_TOKEN, _CHUNK, _SIZE, _MARGIN = (tl.constexpr(value) for value in (0, 1, 4, 4))


@triton.jit
def _words(seed, index, clip, epoch, STREAM: tl.constexpr):
    """Four words (L,) uint32 for the indices (L,)."""
    zeros = tl.zeros_like(index).to(tl.uint32)
    return tl.philox(seed, index.to(tl.uint32), zeros + clip, zeros + epoch, zeros + STREAM)


@triton.jit
def _nth_smallest(words, among, count):
    """The ``count``-th smallest of the words that are ``among``: the least bound that so many do not exceed."""
    bound = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((among & (words <= bound + (bit - 1))).to(tl.int32), 0) >= count
        bound = tl.where(enough, bound, bound + bit)
        bit = bit >> 1
    return bound


@triton.jit(do_not_specialize=["L", "grid_f", "epoch"])
def _forward(
    tokens_ptr,
    masked_ptr,
    clip_ids_ptr,
    seed_ptr,
    mask_ptr,
    L,
    grid_f,
    epoch,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_L)
    among = token < tl.load(tokens_ptr + row)
    masked = tl.load(masked_ptr + row).to(tl.int32)
    clip = (tl.load(clip_ids_ptr + row) & 0xFFFFFFFF).to(tl.uint32)
    epoch = epoch.to(tl.uint32)
    seed = tl.load(seed_ptr)
    if CHUNK:
        drawn = tl.max(_words(seed, tl.arange(0, 1), clip, epoch, _SIZE)[0], 0)
        size = 3 + ((drawn.to(tl.uint64) * 3) >> 32).to(tl.int32)
        columns = grid_f + _MARGIN
        start = (token // grid_f + _MARGIN) * columns + token % grid_f + _MARGIN
        cover, words, _, _ = _words(seed, start, clip, epoch, _CHUNK)
        for square in range(1, size * size):
            word = _words(seed, start - square // size * columns - square % size, clip, epoch, _CHUNK)[0]
            cover = tl.minimum(cover, word)
        among = among & (cover <= _nth_smallest(cover, among, masked))
    else:
        words = _words(seed, token, clip, epoch, _TOKEN)[0]
    bound = _nth_smallest(words, among, masked)
    below = among & (words < bound)
    tied = (among & (words == bound)).to(tl.int32)
    first = tl.cumsum(tied, 0) <= masked - tl.sum(below.to(tl.int32), 0)
    tl.store(mask_ptr + row * L + token, below | ((tied == 1) & first), mask=token < L)


def forward(
    tokens: Tensor,
    masked: Tensor,
    clip_ids: Tensor,
    seed: Tensor,
    epoch: int,
    grid_f: int,
    max_tokens: int,
    chunk: bool,
) -> Tensor:
    """The mask (B, max_tokens) bool, True = hidden; False past a clip's tokens.

    Args:
        tokens: (B,) int64, at most ``max_tokens``.
        masked: (B,) int64, how many of them are hidden.
        clip_ids: (B,) int64.
        seed: One int64.
        epoch: In [-2^31, 2^31): the 32 bits that count, signed.
        grid_f: Frequency blocks.
        max_tokens: L.
        chunk: Strategy chunk, else random.
    """
    mask = torch.empty(tokens.shape[0], max_tokens, dtype=torch.bool, device=tokens.device)
    if max_tokens == 0:
        return mask
    launch(
        _forward,
        (tokens.shape[0],),
        tokens.contiguous(),
        masked.contiguous(),
        clip_ids.contiguous(),
        seed,
        mask,
        max_tokens,
        grid_f,
        epoch,
        CHUNK=chunk,
        **options("sample_mask", tokens, max_tokens),
    )
    return mask


forward_op = torch.library.custom_op("mae_ast_fast::sample_mask", forward, mutates_args=())


@forward_op.register_fake
def _(tokens, masked, clip_ids, seed, epoch, grid_f, max_tokens, chunk):
    return tokens.new_empty(tokens.shape[0], max_tokens, dtype=torch.bool)


WIDTHS = (512, 1024, 4096, 8192)  # L: one of each row of the table


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    if dtype != torch.float32:  # masks have no dtype: once is enough
        return
    clips = torch.arange(256, device=device)
    tokens, masked = torch.full_like(clips, width), torch.full_like(clips, width * 3 // 4)
    for chunk in (False, True):
        label = "chunk" if chunk else "random"
        yield label, len(clips), lambda c=chunk: forward(tokens, masked, clips, clips[:1], 0, 8, width, c)
