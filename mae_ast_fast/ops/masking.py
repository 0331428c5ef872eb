"""Masked tokens of each clip: random, chunk, span, time and frequency masks (arXiv 2203.16691, sections 2 and 3.2).

A clip of L tokens is laid out time-major on a grid of ``grid_f`` frequency blocks (token = t_block * grid_f + f_block).
K = max(1, int((1 - mask_ratio) * L)) of its tokens stay visible, and exactly M = L - K are masked.

Random numbers. Every draw is a word of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), a function of nothing but a key and a counter:

    key     = low and high 32 bits of the seed
    counter = (index of the drawn item, clip id, epoch, stream)

A clip's mask therefore depends on (seed, epoch, clip id, its own length), and not on its batch, its padding, the number
of processes or the device. ``tl.philox(seed, index, clip, epoch, stream)`` gives the same words in a Triton kernel.

    stream    index                                        word 0                     word 1
    _TOKEN    token                                        order of the token
    _CHUNK    (t0 + 4) * (grid_f + 4) + f0 + 4             order of the square that   surplus order of the
              of the block (t0, f0), -4 <= t0, f0          starts at that block       token at that block
    _SPAN     first token of the span + 9; for             order of the span or
              chunk_official the square's first token      square
    _LINE     t_block or f_block                           order of the line
    _SIZE     0                                            chunk size 3 + (3 * word >> 32)

Masks without loops. A strategy gives every token a sort key and masks the first M; ties go to the lower token index.

Some strategies add shapes (squares, spans) one after another. The papers draw their starts uniformly with replacement
until enough tokens are covered. A repeated start covers nothing new, and such a sequence without its repeats is a
uniform permutation of all starts. Here every start has a random word instead, and a token is covered at

    cover(token) = min of the words of all shapes that contain it,

a running minimum over a window of the shape's size. The M-th smallest cover is the moment at which M tokens are
covered, and the tokens covered until then are the union of the shapes. (Two starts with the same 32-bit word are added
at once; the count stays exact.) The strategies differ in the starts they allow and in how they treat the surplus:

- ``random``: uniform without replacement; key = the token's word.
- ``chunk`` (masked patch sampling of SSAST, arXiv 2110.09784; here per clip): c x c squares of blocks, c uniform in
  {3, 4, 5} for each clip. Squares may start up to c - 1 blocks before the grid and are clipped to it, so that c^2
  starts cover every token, at the edges too. The surplus is given back at random among all covered tokens. A square
  clipped by an edge is less likely to be the one that completes M. This leaves a small slope (measured at ratio 0.75
  and grid_f 8): of 512 tokens a corner is masked with probability 0.743 and the middle with 0.751, of 80 tokens 0.72
  and 0.77.
- ``chunk_official`` (the paper's code): one mask for all clips of one length. The starts are the tokens themselves. A
  square is start + i + grid_f * j for i, j < c, which wraps over the top frequency into the next time block. Squares
  are added until MORE than M tokens are covered, and the M first in ascending order are masked. The first and the last
  time blocks are therefore masked less often, and the last token never.
- ``span`` (frame model; wav2vec 2.0, arXiv 2006.11477, section 3.1): 10 consecutive tokens, starting up to 9 tokens
  before the clip; key = (cover, token), which takes the surplus off the end of the last span. The ratio of the paper's
  code is the share of RETAINED tokens instead. With grid_f > 1 a span still runs over 10 flat tokens.
- ``time``, ``frequency`` (as in AudioMAE, arXiv 2207.06405, section 3): whole columns (rows) of the grid in random
  order, and random tokens of the last one; key = (the line's word, the token's word).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple, cast, overload

import torch

from ..devices import send

MASKING_STRATEGIES = ("random", "chunk", "chunk_official", "span", "time", "frequency")

CHUNK_SIZES = (3, 4, 5)
SPAN_LENGTH = 10

_TOKEN, _CHUNK, _SPAN, _LINE, _SIZE = range(5)  # streams: the counter's last word
_WORD = 0xFFFFFFFF
_LAST = 2**63 - 1  # a key that sorts after every drawn word
_NEEDS_GRID = ("chunk", "chunk_official", "frequency")
_ON_GRID = ("chunk", "time", "frequency")  # lay the tokens out in columns of grid_f, which must be whole
_MARGIN = CHUNK_SIZES[-1] - 1  # blocks before the grid at which a square may start

_Draw = Callable[[torch.Tensor | int, int], tuple[torch.Tensor, ...]]


def philox4x32(
    counter: tuple[torch.Tensor | int, ...], key: tuple[torch.Tensor | int, torch.Tensor | int]
) -> tuple[torch.Tensor | int, ...]:
    """Philox4x32-10 in int64 arithmetic (Salmon et al. 2011; the same words as Random123 and ``tl.philox``).

    Args:
        counter: Four words in [0, 2^32): int64 tensors that broadcast against each other, or Python integers.
        key: Two words in [0, 2^32).

    Returns:
        Four words in [0, 2^32), int64 tensors of the broadcast shape (integers if all inputs are integers).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words fills all 64 bits and may be a negative int64, so the sign bits that the shift brings
        # in must be cut off. c1 and c3 keep their high halves until the end: they only enter an exclusive or that is
        # cut off. The first exclusive or makes a new tensor, the others are in place: 1.5 times as fast.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product2 >> 32) ^ c1
        c0 ^= k0
        c0 &= _WORD
        c2 = (product0 >> 32) ^ c3
        c2 ^= k1
        c2 &= _WORD
        c1, c3 = product2, product0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


@overload
def num_visible(tokens: int, mask_ratio: float) -> int: ...
@overload
def num_visible(tokens: torch.Tensor, mask_ratio: float) -> torch.Tensor: ...
def num_visible(tokens: int | torch.Tensor, mask_ratio: float) -> int | torch.Tensor:
    """Number K of visible tokens: max(1, int((1 - mask_ratio) * tokens)), and 0 of 0 (fp64, truncated).

    Args:
        tokens: Tokens of a clip, >= 0: an integer, or an integer tensor of any shape.
        mask_ratio: Share of the tokens of a clip to mask, in (0, 1).

    Returns:
        K: an integer, or an int64 tensor of the shape and on the device of ``tokens``.

    Raises:
        ValueError: ``mask_ratio`` is outside (0, 1), or an integer ``tokens`` is negative.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in (0, 1), got {mask_ratio}")
    if isinstance(tokens, torch.Tensor):
        kept = ((1.0 - mask_ratio) * tokens.to(torch.float64)).to(torch.int64)
        return torch.minimum(kept.clamp(min=1), tokens)
    if tokens < 0:
        raise ValueError(f"tokens must be >= 0, got {tokens}")
    return min(max(1, int((1.0 - mask_ratio) * tokens)), tokens)


def sample_mask(
    strategy: str,
    tokens: torch.Tensor | list[int],
    grid_f: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    clip_ids: torch.Tensor | list[int] | None = None,
    epoch: int = 0,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Draw the masked tokens of each clip (arXiv 2203.16691, section 2; the module describes each strategy).

    A row depends only on (seed, epoch, clip id, the clip's own token count), so one process and many processes draw the
    same masks. ``chunk_official`` ignores the clip ids: all clips of one length share a mask, in every batch that is
    drawn with the same seed and epoch.

    Args:
        strategy: ``random``, ``chunk``, ``chunk_official``, ``span``, ``time`` or ``frequency``.
        tokens: (B,) integers >= 0, tokens of each clip; for chunk, time and frequency multiples of ``grid_f``. The
            masks are computed on their device.
        grid_f: Frequency blocks, that is tokens per time step.
        mask_ratio: Share of the tokens of a clip to mask, in (0, 1). Exactly ``tokens - num_visible(tokens)`` are.
        generator: Source of a 64-bit seed where ``seed`` is None. None: PyTorch's default CPU generator.
        seed: 64-bit seed, an integer or a 0-d int64 tensor. Excludes ``generator``.
        clip_ids: (B,) int64, of which the low 32 bits are used. None: the row numbers 0, 1, ... B - 1.
        epoch: Number of the pass over the data, of which the low 32 bits are used.
        max_tokens: Width L of the result, at least the largest of ``tokens``. None: the largest, which on a GPU waits
            for the device once. With a given width nothing is read back.

    Returns:
        (B, L) bool on the device of ``tokens``, True = masked. False past a clip's tokens.

    Raises:
        ValueError: An argument is not as described. The values of ``tokens`` are checked on a CPU only.
    """
    inputs = prepare(
        strategy,
        tokens,
        grid_f,
        mask_ratio,
        generator=generator,
        seed=seed,
        clip_ids=clip_ids,
        epoch=epoch,
        max_tokens=max_tokens,
    )
    num_tokens, clip_ids, width = inputs.num_tokens, inputs.clip_ids, inputs.max_tokens
    if len(num_tokens) == 0 or width == 0:
        return torch.zeros(len(num_tokens), width, dtype=torch.bool, device=num_tokens.device)
    if strategy == "chunk_official":
        clip_ids = torch.zeros_like(clip_ids[:1])
    key, clip = (inputs.seed & _WORD, (inputs.seed >> 32) & _WORD), (clip_ids & _WORD)[:, None]

    def draw(index: torch.Tensor | int, stream: int) -> tuple[torch.Tensor, ...]:
        return cast(tuple[torch.Tensor, ...], philox4x32((index, clip, inputs.epoch, stream), key))

    valid = torch.arange(width, device=num_tokens.device) < num_tokens[:, None]
    return _STRATEGIES[strategy](draw, valid, inputs.num_masked[:, None], grid_f)


class MaskInputs(NamedTuple):
    """Checked arguments of ``sample_mask``.

    Attributes:
        num_tokens: (B,) int64, tokens of each clip.
        num_masked: (B,) int64, tokens of each clip to mask, on the device of ``num_tokens``.
        clip_ids: (B,) int64, on the device of ``num_tokens``.
        seed: Integer in [-2^63, 2^64), or a 0-d int64 tensor on the device of ``num_tokens``.
        epoch: In [0, 2^32).
        max_tokens: Width of the mask.
    """

    num_tokens: torch.Tensor
    num_masked: torch.Tensor
    clip_ids: torch.Tensor
    seed: torch.Tensor | int
    epoch: int
    max_tokens: int


def prepare(
    strategy: str,
    tokens: torch.Tensor | list[int],
    grid_f: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None,
    seed: int | torch.Tensor | None,
    clip_ids: torch.Tensor | list[int] | None,
    epoch: int,
    max_tokens: int | None,
) -> MaskInputs:
    """Check the arguments of ``sample_mask`` and derive the inputs that every implementation of it needs.

    Raises:
        ValueError: As ``sample_mask``.
    """
    if strategy not in MASKING_STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(MASKING_STRATEGIES)}, got {strategy!r}")
    if grid_f < 1 or (grid_f == 1 and strategy in _NEEDS_GRID):
        raise ValueError(f"grid_f must be >= {2 if strategy in _NEEDS_GRID else 1} for {strategy}, got {grid_f}")
    if generator is not None and seed is not None:
        raise ValueError("expected generator or seed, got both")
    num_tokens, max_tokens = _check_tokens(tokens, grid_f if strategy in _ON_GRID else 1, max_tokens)
    device = num_tokens.device
    if clip_ids is None:
        clip_ids = torch.arange(len(num_tokens), device=device)
    clip_ids = send(_integers("clip_ids", clip_ids), device)
    if clip_ids.shape != num_tokens.shape:
        raise ValueError(
            f"clip_ids must have the shape of tokens {tuple(num_tokens.shape)}, got {tuple(clip_ids.shape)}"
        )
    return MaskInputs(
        num_tokens=num_tokens,
        num_masked=num_tokens - num_visible(num_tokens, mask_ratio),
        clip_ids=clip_ids,
        seed=_seed(seed, generator, device),
        epoch=operator.index(epoch) & _WORD,
        max_tokens=max_tokens,
    )


def _integers(name: str, values: torch.Tensor | list[int]) -> torch.Tensor:
    values = torch.as_tensor(values, dtype=torch.int64 if isinstance(values, (list, tuple)) and not values else None)
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be 1-D integers, got {values.dtype} of shape {tuple(values.shape)}")
    return values.to(torch.int64)


def _check_tokens(tokens: torch.Tensor | list[int], grid_f: int, max_tokens: int | None) -> tuple[torch.Tensor, int]:
    num_tokens = _integers("tokens", tokens)
    on_cpu = num_tokens.device.type == "cpu" and not torch.compiler.is_compiling()  # a traced graph has no values
    multiple = f"multiples of grid_f={grid_f} and" if grid_f > 1 else "whole numbers"
    if on_cpu and ((num_tokens < 0) | (num_tokens % grid_f != 0)).any():
        raise ValueError(f"tokens must be {multiple} >= 0, got {num_tokens.tolist()}")
    largest = max(num_tokens.tolist(), default=0) if on_cpu or max_tokens is None else 0
    max_tokens = largest if max_tokens is None else max_tokens
    if max_tokens < largest or max_tokens % grid_f:
        raise ValueError(f"max_tokens must be a multiple of grid_f={grid_f} and >= {largest}, got {max_tokens}")
    return num_tokens, max_tokens


def _seed(
    seed: int | torch.Tensor | None, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor | int:
    if seed is None and torch.compiler.is_compiling():  # a generator cannot be traced
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if seed is None:
        source = "cpu" if generator is None else generator.device
        seed = torch.empty((), dtype=torch.int64, device=source).random_(-(2**63), None, generator=generator)
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an integer or a 0-d int64 tensor, got {seed.dtype} of {tuple(seed.shape)}")
        on_host = seed.device.type == "cpu" and not torch.compiler.is_compiling()
        seed = int(seed) if on_host else seed.to(device)
    elif not -(2**63) <= operator.index(seed) < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return seed


def _smallest(keys: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the ``count`` (B, 1) smallest keys of each row, the lower index first among equals."""
    order = keys.argsort(dim=1, stable=True)
    chosen = torch.arange(keys.shape[1], device=keys.device) < count
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _window_min(
    x: torch.Tensor, size: torch.Tensor | int, largest: int, *, dim: int = 1, step: int = 1
) -> torch.Tensor:
    """Minimum over x[n], x[n - step], ... x[n - (size - 1) * step] along ``dim``, for n >= (largest - 1) * step."""
    first = (largest - 1) * step
    length = x.shape[dim] - first
    minimum = x.narrow(dim, first, length)
    for i in range(1, largest):
        smaller = torch.minimum(minimum, x.narrow(dim, first - i * step, length))
        minimum = smaller if isinstance(size, int) else torch.where(size > i, smaller, minimum)
    return minimum


def _chunk_size(draw: _Draw) -> torch.Tensor:
    return CHUNK_SIZES[0] + (draw(0, _SIZE)[0] * len(CHUNK_SIZES) >> 32)


def _random(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    words = draw(torch.arange(valid.shape[1], device=valid.device), _TOKEN)[0]
    return _smallest(words.masked_fill(~valid, _LAST), num_masked)


def _chunk(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    rows, columns = valid.shape[1] // grid_f + _MARGIN, grid_f + _MARGIN
    size = _chunk_size(draw)[:, :, None]
    starts, surplus, *_ = draw(torch.arange(rows * columns, device=valid.device), _CHUNK)
    cover = starts.view(-1, rows, columns)
    for dim in (1, 2):
        cover = _window_min(cover, size, CHUNK_SIZES[-1], dim=dim)
    cover = cover.reshape(valid.shape).masked_fill_(~valid, _LAST)
    last_cover = cover.sort(dim=1).values.gather(1, (num_masked - 1).clamp_(min=0))
    surplus = surplus.view(-1, rows, columns)[:, _MARGIN:, _MARGIN:].reshape(valid.shape)
    return _smallest(surplus.masked_fill(cover > last_cover, _LAST), num_masked)


def _chunk_official(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    size = _chunk_size(draw)
    starts = draw(torch.arange(valid.shape[1], device=valid.device), _SPAN)[0]
    cover = torch.nn.functional.pad(starts, (_MARGIN * (1 + grid_f), 0), value=_WORD + 1)  # no square starts before 0
    for step in (1, grid_f):
        cover = _window_min(cover, size, CHUNK_SIZES[-1], step=step)
    cover = cover.masked_fill(~valid, _LAST)
    last_cover = cover.sort(dim=1).values.gather(1, num_masked)  # the moment at which num_masked + 1 are covered
    covered = cover <= last_cover
    return covered & (covered.cumsum(1) <= num_masked)


def _span(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    starts = draw(torch.arange(valid.shape[1] + SPAN_LENGTH - 1, device=valid.device), _SPAN)[0]
    return _smallest(_window_min(starts, SPAN_LENGTH, SPAN_LENGTH).masked_fill(~valid, _LAST), num_masked)


def _lines(
    draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, *, line: torch.Tensor, num_lines: int
) -> torch.Tensor:
    """Masks of whole lines (columns or rows of the grid); ``line`` (L,) is the line of each token."""
    lines = torch.arange(num_lines, device=valid.device)
    order = draw(lines, _LINE)[0] - 2**31  # signed, so that it fits 64 bits together with the token's word
    words = draw(torch.arange(valid.shape[1], device=valid.device), _TOKEN)[0]
    return _smallest((order[:, line] * 2**32 + words).masked_fill(~valid, _LAST), num_masked)


def _time(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    token = torch.arange(valid.shape[1], device=valid.device)
    return _lines(draw, valid, num_masked, line=token // grid_f, num_lines=valid.shape[1] // grid_f)


def _frequency(draw: _Draw, valid: torch.Tensor, num_masked: torch.Tensor, grid_f: int) -> torch.Tensor:
    token = torch.arange(valid.shape[1], device=valid.device)
    return _lines(draw, valid, num_masked, line=token % grid_f, num_lines=grid_f)


_STRATEGIES = {
    "random": _random,
    "chunk": _chunk,
    "chunk_official": _chunk_official,
    "span": _span,
    "time": _time,
    "frequency": _frequency,
}
