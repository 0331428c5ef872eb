"""Masks of the strategies random and chunk: bit for bit the masks of masking.py, one program per clip.

    words(index, stream) = Philox4x32-10 of counter (index, clip id, epoch, stream) under key = seed
    random: masked = the M smallest words; ties go to the lower token
    chunk:  cover(t, f) = min of the words of the c x c blocks (t - i, f - j), i, j < c, where squares start;
            among the tokens whose cover is at most the M-th smallest one, the M smallest second words

Letters: B clips, L = ``max_tokens``, M = ``num_masked`` tokens of a clip, c in {3, 4, 5}. Fused: everything; only the
mask is written (unfused: words of all starts, two running minima and two sorts in int64). Nothing is sorted: the kernel
finds the M-th smallest word bit by bit, with 32 counts over the clip. Words are drawn again for every square that can
contain a token. Every start of the reference is in its range, so nothing is clipped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.case import Draw, Mutant, OpCase
from .common.configs import launches
from .common.launch import launch
from .common.triton_op import triton_op

# As in masking.py: streams of random words, and the number of blocks before the grid in which a square can start.
_TOKEN, _CHUNK, _SIZE, _MARGIN = (tl.constexpr(value) for value in (0, 1, 4, 4))


@triton.jit
def _words(seed, index, clip, epoch, STREAM: tl.constexpr):
    """Four Philox words (L,) uint32 for each index (L,)."""
    zeros = tl.zeros_like(index).to(tl.uint32)
    return tl.philox(seed, index.to(tl.uint32), zeros + clip, zeros + epoch, zeros + STREAM)


@triton.jit
def _nth_smallest(words, is_candidate, count):
    """The ``count``-th smallest word of the candidates: the smallest bound that ``count`` of them do not exceed."""
    bound = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        is_enough = tl.sum((is_candidate & (words <= bound + (bit - 1))).to(tl.int32), 0) >= count
        bound = tl.where(is_enough, bound, bound + bit)
        bit = bit >> 1
    return bound


@triton.jit(do_not_specialize=["L", "grid_f", "epoch"])
def _forward(
    num_tokens_ptr,
    num_masked_ptr,
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
    is_candidate = token < tl.load(num_tokens_ptr + row)
    num_masked = tl.load(num_masked_ptr + row).to(tl.int32)
    clip = (tl.load(clip_ids_ptr + row) & 0xFFFFFFFF).to(tl.uint32)
    epoch = epoch.to(tl.uint32)
    seed = tl.load(seed_ptr)
    if CHUNK:
        size_word = tl.max(_words(seed, tl.arange(0, 1), clip, epoch, STREAM=_SIZE)[0], 0)
        square_size = 3 + ((size_word.to(tl.uint64) * 3) >> 32).to(tl.int32)
        padded_grid_f = grid_f + _MARGIN
        start = (token // grid_f + _MARGIN) * padded_grid_f + token % grid_f + _MARGIN
        cover, words, _, _ = _words(seed, start, clip, epoch, STREAM=_CHUNK)
        for offset in range(1, square_size * square_size):
            block_start = start - offset // square_size * padded_grid_f - offset % square_size
            word = _words(seed, block_start, clip, epoch, STREAM=_CHUNK)[0]
            cover = tl.minimum(cover, word)
        is_candidate = is_candidate & (cover <= _nth_smallest(cover, is_candidate, num_masked))
    else:
        words = _words(seed, token, clip, epoch, STREAM=_TOKEN)[0]
    bound = _nth_smallest(words, is_candidate, num_masked)
    is_below = is_candidate & (words < bound)
    is_tied = (is_candidate & (words == bound)).to(tl.int32)
    is_first = tl.cumsum(is_tied, 0) <= num_masked - tl.sum(is_below.to(tl.int32), 0)
    tl.store(mask_ptr + row * L + token, is_below | ((is_tied == 1) & is_first), mask=token < L)


launches(
    "sample_mask",  # BLOCK_L: tokens of a clip, all in one program. The row width is that of the longest clip.
    ("any", 512, 8, {"BLOCK_L": 512, "num_warps": 4}),
    ("any", 1024, 8, {"BLOCK_L": 1024, "num_warps": 8}),
    ("any", 4096, 8, {"BLOCK_L": 4096, "num_warps": 16}),
    ("any", 8192, 8, {"BLOCK_L": 8192, "num_warps": 16}),
)


@triton_op("sample_mask")
def forward(
    num_tokens: Tensor,
    num_masked: Tensor,
    clip_ids: Tensor,
    seed: Tensor,
    epoch: int,
    grid_f: int,
    max_tokens: int,
    chunk: bool,
) -> Tensor:
    """Draw the mask (B, max_tokens) bool, True = masked; False past a clip's tokens.

    Args:
        num_tokens: (B,) int64 tokens of each clip, at most ``max_tokens``.
        num_masked: (B,) int64 masked tokens of each clip.
        clip_ids: (B,) int64; the low 32 bits are used.
        seed: One int64 element.
        epoch: Pass over the data, in [-2^31, 2^31): 32 bits, signed.
        grid_f: Number of frequency blocks.
        max_tokens: L, width of the mask.
        chunk: Use the strategy chunk, otherwise random.
    """
    mask = torch.empty(num_tokens.shape[0], max_tokens, dtype=torch.bool, device=num_tokens.device)
    if max_tokens == 0:
        return mask
    launch(
        _forward,
        (num_tokens.shape[0],),
        launches="sample_mask",
        like=num_tokens,
        width=max_tokens,
        num_tokens=num_tokens.contiguous(),
        num_masked=num_masked.contiguous(),
        clip_ids=clip_ids.contiguous(),
        seed=seed,
        mask=mask,
        L=max_tokens,
        grid_f=grid_f,
        epoch=epoch,
        CHUNK=chunk,
    )
    return mask


WIDTHS = (512, 1024, 4096, 8192)  # L: one width per row of the table


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    if dtype != torch.float32:  # masks have no dtype: once is enough
        return
    clips = torch.arange(256, device=device)
    num_tokens, num_masked = torch.full_like(clips, width), torch.full_like(clips, width * 3 // 4)
    for chunk in (False, True):
        label = "chunk" if chunk else "random"
        call = partial(
            forward, num_tokens, num_masked, clips, clips[:1], epoch=0, grid_f=8, max_tokens=width, chunk=chunk
        )
        yield label, len(clips), call


def _inputs(draw: Draw, shape: tuple[Sequence[int], int]) -> dict[str, Any]:
    num_tokens, grid_f = shape
    longest = max(num_tokens, default=grid_f)
    return {"tokens": draw.integers(num_tokens), "grid_f": grid_f, "mask_ratio": 0.6, "seed": 11, "max_tokens": longest}


_STRATEGIES: list[dict[str, Any]] = [{"strategy": "random"}, {"strategy": "chunk"}]


CASE = OpCase(
    name="sample_mask",
    make=_inputs,
    shapes=[([520], 8), ([1032], 8), ([4104], 8)],
    empty=[([], 8), ([0, 0], 8)],
    traced=[([40, 16], 8), ([40, 16, 8], 8)],
    exact=True,
    vectors=("tokens",),
    variants=_STRATEGIES,
    traced_variants=_STRATEGIES,
    offsets=(0.0,),
    dtypes=(torch.float32,),  # masks have none
    specification="masking.sample_mask",
    mutants=(
        Mutant("edge", "mask=token < L)", "mask=token < L - 1)"),
        Mutant("last row", "token < tl.load(num_tokens_ptr + row)", "token < tl.load(num_tokens_ptr + row) - 1"),
        Mutant("row owner", "clip_ids.contiguous()", "torch.arange(len(clip_ids), device=clip_ids.device)"),
        Mutant("ties", "is_below | ((is_tied == 1) & is_first)", "is_below | (is_tied == 1)"),
    ),
)
