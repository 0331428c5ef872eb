"""Attention over packed clips: which backend runs for which device, dtype and shape, and why.

``attention(qkv, ...)`` for a layer in which all rows ask, ``cross_attention(q, kv, ...)`` for one in which some do.
Backends so far:

- ``sdpa``: PyTorch's fused scaled_dot_product_attention on rows padded to the longest clip; any device and dtype.
- ``math``: explicit probabilities (reference.py), the specification.
- ``short``: the Triton kernel where all rows ask and clips have at most 128 (the encoder, with 10-second clips), on a
  GPU, or on a CPU under Triton's interpreter; ``sdpa`` where clips are longer or only some rows ask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference

BACKENDS = ("sdpa", "math", "short")


def choose_backend(backend: str, device: torch.device | str) -> tuple[str, str]:
    """The backend that ``backend`` ("auto" or a name) stands for on a device, and the reason in words.

    Raises:
        ValueError: An unknown name.
    """
    if backend == "auto":
        return (
            "sdpa",
            f"PyTorch's fused attention over padded rows is the only measured fused backend so far ({device})",
        )
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend, "asked for by name"


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
    backend: str = "auto",
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Softmax attention of each clip over its own rows.

    Args:
        qkv: (N, 3, H, Dh) packed rows.
        cu_seqlens: (B + 1,) int32 first row of each clip.
        max_seqlen: Rows of the longest clip.
        dropout: Rate on the attention probabilities.
        backend: "auto" or one of ``BACKENDS``.
        seed: As in ops.py, for ``short``; likewise ``site``.
        site: Which dropout this is.

    Returns:
        (N, H, Dh) in the dtype of ``qkv``.

    Raises:
        ValueError: The backend is unknown or does not take these clips.
    """
    if choose_backend(backend, qkv.device)[0] == "short" and max(max_seqlen, qkv.shape[3]) <= ops.SHORT:
        return ops.short_attention(qkv, cu_seqlens, max_seqlen, dropout, seed, site, impl="triton")
    return cross_attention(qkv[:, 0], qkv[:, 1:], cu_seqlens, max_seqlen, cu_seqlens, max_seqlen, dropout, backend)


def cross_attention(
    q: Tensor,
    kv: Tensor,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of some rows of each clip over all of its rows.

    Args:
        q: (Nq, H, Dh) packed rows that ask.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) int32 first asking row of each clip, ``max_q`` those of the longest.
        max_q: See ``cu_q``.
        cu_kv: (B + 1,) int32 first row of each clip, ``max_kv`` those of the longest.
        max_kv: See ``cu_kv``.
        dropout: Rate on the attention probabilities.
        backend: "auto" or one of ``BACKENDS``.

    Returns:
        (Nq, H, Dh) in the dtype of ``q``.

    Raises:
        ValueError: The backend is unknown or cannot do this.
    """
    name, _ = choose_backend(backend, q.device)
    if name == "math":
        return reference.cross_attention(q, kv, cu_q, max_q, cu_kv, max_kv, dropout)
    if groups := reference.similar_clips(cu_kv, max_kv, kv.shape[0]):
        out, asking = [], []
        for clips in groups:
            rows_q, own_q, longest_q = reference.rows_of_clips(cu_q, clips)
            rows_kv, own_kv, longest_kv = reference.rows_of_clips(cu_kv, clips)
            part = q[rows_q], kv[rows_kv], own_q, longest_q, own_kv, longest_kv
            out.append(cross_attention(*part, dropout, name))
            asking.append(rows_q)
        return torch.cat(out)[torch.cat(asking).argsort()]
    pad_q, pad_kv = reference.PaddedView(cu_q, max_q, q.shape[0]), reference.PaddedView(cu_kv, max_kv, kv.shape[0])
    k, v = pad_kv.pad(kv).permute(2, 0, 3, 1, 4)  # each (B, H, S, Dh)
    mask = None if pad_kv.full else pad_kv.key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(pad_q.pad(q).transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout)
    return pad_q.unpad(out.transpose(1, 2))
