"""Encoder features of packed tokens, and their means.

Letters as in mae_ast.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packing import Packing


@dataclass
class Encoded:
    """Encoder features of the packed tokens of a batch without a mask.

    Attributes:
        x: (N, D) output of the encoder, or of the layer that was asked for.
        states: (N, D) output of each layer up to that one.
        packing: Clip and token of each row.
        time_block: (N,) int64 time block of each row. Patches of a time block have the same frames, other mel bins.
        frequency_block: (N,) int64 frequency block of each row, 0 the lowest mel bins.
    """

    x: Tensor
    states: list[Tensor]
    packing: Packing
    time_block: Tensor
    frequency_block: Tensor


def pool_tokens(encoded: Encoded, num_groups: int, *, num_bands: int = 1, group: Tensor | None = None) -> Tensor:
    """Average tokens per group: (num_groups, num_bands * D) fp32, the means of the bands side by side.

    Args:
        encoded: Packed tokens of clips.
        num_groups: Number of clips, or of the groups that ``group`` numbers.
        num_bands: 1 averages over all frequency blocks; the model's ``grid_f`` keeps them apart.
        group: (N,) int64 group of each token. None: its clip.
    """
    index = encoded.packing.clip if group is None else group
    if num_bands > 1:
        index = index * num_bands + encoded.frequency_block
    x = encoded.x.float()
    total = x.new_zeros(num_groups * num_bands, x.shape[1]).index_add(0, index, x)
    count = x.new_zeros(len(total)).index_add(0, index, torch.ones_like(x[:, 0]))
    return (total / count.clamp(min=1)[:, None]).reshape(num_groups, -1)
