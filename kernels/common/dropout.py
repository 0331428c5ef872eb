"""Dropout masks from counters: nothing is stored, and forward and backward draw the same bits.

    bits(row, column) = 16 bits of Philox4x32-10, key = seed, counter = (column // 8, row, dropout_site, head)
    word of the four  = (column % 8) // 2, its low half for an even column, otherwise its high half
    kept              = bits >= threshold, threshold = round(65536 * dropout), scaled by 65536 / (65536 - threshold)

One call of Philox serves eight elements, about 10 integer operations per element. ``dropout_site`` numbers the dropouts
of the model. ``head`` is the attention head, 0 for rows without heads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_words(seed, row, head, dropout_site, COLUMNS: tl.constexpr, first_column=0):
    """The four Philox words (ROWS, COLUMNS // 8) uint32 of the row numbers ``row`` (ROWS,), from ``first_column`` on.

    COLUMNS and ``first_column`` are multiples of 8.
    """
    group = first_column // 8 + tl.arange(0, COLUMNS // 8)
    group_counter = group[None, :].to(tl.uint32) + tl.zeros_like(row[:, None]).to(tl.uint32)
    row_counter = row[:, None].to(tl.uint32) + tl.zeros_like(group[None, :]).to(tl.uint32)
    zeros = tl.zeros_like(group_counter)
    return tl.philox(seed, group_counter, row_counter, zeros + dropout_site, zeros + head)


@triton.jit
def keep_mask(seed, row, head, dropout_site, threshold, COLUMNS: tl.constexpr, first_column=0):
    """Bool (ROWS, COLUMNS), True = kept; arguments as in ``mask_words``."""
    w0, w1, w2, w3 = mask_words(
        seed, row, head=head, dropout_site=dropout_site, COLUMNS=COLUMNS, first_column=first_column
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2 * i + j at [..., i, j]
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (row.shape[0], COLUMNS)) >= threshold


def threshold_and_scale(dropout: float) -> tuple[int, float]:
    """Convert a dropout rate to the kernels' arguments: the 16-bit threshold and the scale of the kept values."""
    threshold = min(round(dropout * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)
