"""Dropout masks from counters: nothing is stored, forward and backward draw the same bits.

    bits(row, column) = 16 bits of Philox4x32-10 with key = seed and counter = (column // 8, row, site, lane)
    word of the four   = (column % 8) // 2, its low half for an even column, else its high half
    kept               = bits >= threshold, threshold = round(65536 * dropout), scaled by 65536 / (65536 - threshold)

A call of Philox serves eight elements, about 10 integer operations for each. ``site`` names the place in the model
where dropout is applied, ``lane`` what else a row has several of (attention heads).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_words(seed, row, lane, site, COLUMNS: tl.constexpr, first=0):
    """Philox's four words (ROWS, COLUMNS // 8) uint32 for row numbers ``row`` (ROWS,) and columns from ``first`` on.

    COLUMNS and ``first`` are multiples of 8.
    """
    group = first // 8 + tl.arange(0, COLUMNS // 8)
    counter = group[None, :].to(tl.uint32) + tl.zeros_like(row[:, None]).to(tl.uint32)
    rows = row[:, None].to(tl.uint32) + tl.zeros_like(group[None, :]).to(tl.uint32)
    zeros = tl.zeros_like(counter)
    return tl.philox(seed, counter, rows, zeros + site, zeros + lane)


@triton.jit
def keep_mask(seed, row, lane, site, threshold, COLUMNS: tl.constexpr, first=0):
    """Bool (ROWS, COLUMNS), True = kept; see ``mask_words``."""
    w0, w1, w2, w3 = mask_words(seed, row, lane, site, COLUMNS, first)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2 * i + j at [..., i, j]
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (row.shape[0], COLUMNS)) >= threshold


def threshold_and_scale(dropout: float) -> tuple[int, float]:
    """What the kernels take for a dropout rate: the 16-bit threshold and the scale of what is kept."""
    threshold = min(round(dropout * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)
