"""Attention over packed clips: which backend runs for which device, dtype and shape, and why.

``attention(qkv, ...)`` for a layer in which all rows ask, ``cross_attention(q, kv, ...)`` for one in which some do.

- ``aten``: FlashAttention-2 inside PyTorch (flash.py); CUDA, fp16 and bf16. What "auto" takes there.
- ``fa2``, ``fa3``, ``fa4``: the packages flash_attn, flash_attn_interface and flash_attn.cute (flash.py), by name only.
- ``clips``: clip by clip on a CPU, hardly padded (ops/attention/cpu.py), outside a traced graph, since the host reads
  lengths. What "auto" takes there (CONTRIBUTING.md has the measurement).
- ``sdpa``: PyTorch's fused scaled_dot_product_attention on rows padded to the longest clip; any device and dtype. What
  "auto" takes wherever neither FlashAttention nor ``clips`` is.
- ``math``: explicit probabilities (reference.py), the specification. What "auto" takes in a graph traced for a CPU, in
  half precision with dropout.
- ``short``: the Triton kernel where all rows ask and clips have at most 128 (the encoder, with 10-second clips), on a
  GPU, or on a CPU under Triton's interpreter; what "auto" would take where clips are longer or only some rows ask.

No other name falls back: what a backend cannot do is a ``ValueError`` that says what to use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .. import reference
from . import flash
from .cpu import clip_attention

BACKENDS = ("sdpa", "math", "clips", "short", *flash.FLASH)

# Shapes at which a committed measurement has "short" ahead of FlashAttention, which "auto" then takes there:
# (compute capability, most rows of a clip, values of a head). None has been measured.
MEASURED_SHORT: tuple[tuple[tuple[int, int], int, int], ...] = ()


def check_backend(backend: str) -> None:
    """Raises ValueError where ``backend`` is neither "auto" nor one of ``BACKENDS``."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")


def choose_backend(
    backend: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    max_seqlen: int | None = None,
    head_dim: int | None = None,
) -> tuple[str, str]:
    """The backend that ``backend`` ("auto" or a name) stands for, and the reason in words.

    Args:
        backend: As asked for.
        device: Of the tensors.
        dtype: Of the rows.
        dropout: Rate on the attention probabilities.
        max_seqlen: Rows of the longest clip; None: unknown, or only some rows ask.
        head_dim: Values of a head; None: unknown.

    Raises:
        ValueError: An unknown name, or a FlashAttention or "clips" that cannot do this.
    """
    check_backend(backend)
    device = torch.device(device)
    if backend in flash.FLASH:
        if problem := flash.problem(backend, device, dtype, dropout, head_dim):
            raise ValueError(f"attention={backend!r} {problem}; use attention='auto' or 'sdpa'")
        return backend, "asked for by name"
    if backend == "short" and max(max_seqlen or 0, head_dim or 0) > ops.SHORT:
        name, why = choose_backend("auto", device, dtype=dtype, dropout=dropout, head_dim=head_dim)
        return name, f"'short' takes clips of at most {ops.SHORT} rows and heads as wide; as 'auto': {why}"
    traced = torch.compiler.is_compiling()
    if backend == "clips" and (device.type != "cpu" or traced):
        got = "a graph that torch.compile traces" if traced else device
        raise ValueError(f"attention='clips' needs a CPU and eager mode, got {got}; use attention='auto' or 'sdpa'")
    if backend != "auto":
        return backend, "asked for by name"
    if device.type == "cpu" and not traced:
        return "clips", "clip by clip, hardly padded: faster on a CPU than PyTorch's fused attention over padded rows"
    if device.type == "cpu" and dropout > 0.0 and dtype in (torch.bfloat16, torch.float16):
        return "math", "explicit products: PyTorch's fused attention with dropout is slower on a CPU in half precision"
    if problem := flash.problem("aten", device, dtype, dropout, head_dim):
        return "sdpa", f"PyTorch's fused attention over padded rows: FlashAttention {problem}"
    if MEASURED_SHORT and max_seqlen is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        found = properties.major, properties.minor
        if any(found == of and max_seqlen <= most and head_dim == width for of, most, width in MEASURED_SHORT):
            return "short", "the Triton kernel for short clips was measured ahead of FlashAttention at this shape"
    return "aten", "FlashAttention-2 inside PyTorch (not yet run on a GPU by this project)"


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
    backend: str = "auto",
    seed: Tensor | None = None,
    site: int = 0,
    exact: bool = True,
) -> Tensor:
    """Softmax attention of each clip over its own rows, scale Dh ** -0.5.

    Args:
        qkv: (N, 3, H, Dh) packed rows.
        cu_seqlens: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_seqlen: At least the rows of the longest clip.
        dropout: Rate on the attention probabilities, in [0, 1).
        backend: "auto" or one of ``BACKENDS``.
        seed: As in ops/functional.py, for ``short``; likewise ``site``.
        site: Which dropout this is.
        exact: Whether all N rows belong to a clip (packing.Packing).

    Returns:
        (N, H, Dh) in the dtype of ``qkv``. Rows past the last clip (see packing.TokenCounts): zeros from ``clips``,
        ``short`` and FlashAttention, copies of some row from ``sdpa`` and ``math``; no gradient flows to them.

    Raises:
        ValueError: The backend is unknown or does not take these clips, or a shape or rate is not as described.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, Dh), got {tuple(qkv.shape)}")
    _check(dropout, qkv, qkv, cu_seqlens=cu_seqlens)
    shape = {"max_seqlen": max_seqlen, "head_dim": qkv.shape[3]}
    name, _ = choose_backend(backend, qkv.device, dtype=qkv.dtype, dropout=dropout, **shape)
    if name == "short":
        return ops.short_attention(qkv, cu_seqlens, max_seqlen, dropout, seed, site, impl="triton")
    if name == "clips":
        return clip_attention(None, qkv, cu_seqlens, cu_seqlens, dropout)
    cu = cu_seqlens, max_seqlen, cu_seqlens, max_seqlen
    if name in flash.FLASH:
        # One unbind: its gradient is one pass, where those of slices are a pass over zeros each.
        return flash.attend(name, *qkv.unbind(1), *cu, dropout)
    return _padded(name, qkv[:, 0], qkv[:, 1:], *cu, dropout, exact)


def cross_attention(
    q: Tensor,
    kv: Tensor,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float = 0.0,
    backend: str = "auto",
    exact: bool = True,
) -> Tensor:
    """Softmax attention of some rows of each clip over all of its rows, scale Dh ** -0.5.

    Args:
        q: (Nq, H, Dh) packed rows that ask.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) int32 first asking row of each clip, ``max_q`` those of the longest.
        max_q: See ``cu_q``.
        cu_kv: (B + 1,) int32 first row of each clip, ``max_kv`` those of the longest.
        max_kv: See ``cu_kv``.
        dropout: Rate on the attention probabilities, in [0, 1).
        backend: "auto" or one of ``BACKENDS``; "short" is "auto" here.
        exact: Whether all rows belong to a clip (packing.Packing).

    Returns:
        (Nq, H, Dh) in the dtype of ``q``; rows past the last clip as in ``attention``.

    Raises:
        ValueError: The backend is unknown or cannot do this, or a shape or rate is not as described.
    """
    if q.dim() != 3 or kv.dim() != 4 or kv.shape[1] != 2 or kv.shape[2:] != q.shape[1:]:
        raise ValueError(f"q and kv must be (Nq, H, Dh) and (N, 2, H, Dh), got {tuple(q.shape)} and {tuple(kv.shape)}")
    _check(dropout, q, kv, cu_q=cu_q, cu_kv=cu_kv)
    backend = "auto" if backend == "short" else backend
    name, _ = choose_backend(backend, q.device, dtype=q.dtype, dropout=dropout, head_dim=q.shape[2])
    if name == "clips":
        return clip_attention(q, kv, cu_q, cu_kv, dropout)
    if name in flash.FLASH:
        return flash.attend(name, q, *kv.unbind(1), cu_q, max_q, cu_kv, max_kv, dropout)
    return _padded(name, q, kv, cu_q, max_q, cu_kv, max_kv, dropout, exact)


def _check(dropout: float, q: Tensor, kv: Tensor, **cu_seqlens: Tensor) -> None:
    ops.check_dropout(dropout, None, q.device)
    if kv.dtype != q.dtype or kv.device != q.device:
        raise ValueError(f"q and kv must be alike, got {q.dtype} on {q.device} and {kv.dtype} on {kv.device}")
    for name, cu in cu_seqlens.items():
        ops.check_cu_seqlens(name, cu, q)
    first, *others = cu_seqlens.values()
    # Compared, not gathered in a set: a hash would make a traced graph one for this number of clips alone.
    if any(cu.shape[0] != first.shape[0] for cu in others):
        clips = " and ".join(str(cu.shape[0] - 1) for cu in cu_seqlens.values())
        raise ValueError(f"cu_q and cu_kv must be of the same clips, got {clips}")


def _padded(
    name: str,
    q: Tensor,
    kv: Tensor,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float,
    exact: bool = True,
) -> Tensor:
    """``cross_attention`` by ``sdpa`` or ``math``: rows padded to the longest clip of a group of like ones."""
    if groups := reference.similar_clips(cu_kv, max_kv, kv.shape[0]):
        out, asking = [], []
        for clips in groups:
            rows_kv, *own_kv = reference.rows_of_clips(cu_kv, clips)
            rows_q, *own_q = (rows_kv, *own_kv) if cu_q is cu_kv else reference.rows_of_clips(cu_q, clips)
            out.append(_padded(name, q[rows_q], kv[rows_kv], *own_q, *own_kv, dropout))
            asking.append(rows_q)
        return torch.cat(out)[torch.cat(asking).argsort()]
    if name == "math":
        return reference.cross_attention(q, kv, cu_q, max_q, cu_kv, max_kv, dropout, exact)
    pad_q, pad_kv = reference.padded_views(cu_q, max_q, q.shape[0], cu_kv, max_kv, kv.shape[0], exact)
    k, v = pad_kv.pad(kv).permute(2, 0, 3, 1, 4)  # each (B, H, S, Dh)
    mask = None if pad_kv.full else pad_kv.key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(pad_q.pad(q).transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout)
    return pad_q.unpad(out.transpose(1, 2))
