"""Attention over packed clips: which backend runs for which device and dtype, and why.

One function for all: ``attention(qkv, cu_seqlens, max_seqlen, dropout, backend)``. Backends so far:

- ``sdpa``: PyTorch's fused scaled_dot_product_attention on rows padded to the longest clip; any device and dtype.
- ``math``: explicit probabilities (reference.py), the specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

BACKENDS = ("sdpa", "math")


def choose_backend(backend: str, device: torch.device | str) -> tuple[str, str]:
    """The backend that ``backend`` ("auto" or a name) stands for on a device, and the reason in words.

    Raises:
        ValueError: An unknown name.
    """
    if backend == "auto":
        return "sdpa", f"PyTorch's fused attention over padded rows is the only fused backend so far ({device})"
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend, "asked for by name"


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """Softmax attention of each clip over its own rows.

    Args:
        qkv: (N, 3, H, Dh) packed rows.
        cu_seqlens: (B + 1,) int32 first row of each clip.
        max_seqlen: Rows of the longest clip.
        dropout: Rate on the attention probabilities.
        backend: "auto" or one of ``BACKENDS``.

    Returns:
        (N, H, Dh) in the dtype of ``qkv``.
    """
    name, _ = choose_backend(backend, qkv.device)
    if name == "math":
        return reference.attention(qkv, cu_seqlens, max_seqlen, dropout)
    if groups := reference.similar_lengths(cu_seqlens, max_seqlen, qkv.shape[0]):
        order = torch.cat([index for index, _, _ in groups]).argsort()
        return torch.cat([attention(qkv[index], cu, longest, dropout, name) for index, cu, longest in groups])[order]
    pad = reference.PaddedView(cu_seqlens, max_seqlen, qkv.shape[0])
    q, k, v = pad.pad(qkv).permute(2, 0, 3, 1, 4)  # each (B, H, S, Dh)
    mask = None if pad.full else pad.key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return pad.unpad(out.transpose(1, 2))
