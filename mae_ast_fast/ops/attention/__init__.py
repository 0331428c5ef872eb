"""Attention over packed clips: the choice of a backend by device, dtype and shape, and the reason for it.

``attention(qkv, ...)`` is for layers in which all rows are query rows, ``cross_attention(q, kv, ...)`` for layers in
which some rows are.

- ``aten``: FlashAttention-2 inside PyTorch (flash.py); CUDA, fp16 and bf16. "auto" chooses it there.
- ``fa2``, ``fa3``, ``fa4``: the packages flash_attn, flash_attn_interface and flash_attn.cute (flash.py), only by name.
- ``clips``: clip by clip on a CPU with little padding (cpu.py), outside a traced graph, because the host reads lengths.
  "auto" chooses it there (CONTRIBUTING.md has the measurement).
- ``sdpa``: PyTorch's fused scaled_dot_product_attention on rows padded to the longest clip; any device and dtype.
  "auto" chooses it where neither FlashAttention nor ``clips`` is available.
- ``math``: explicit probabilities on rows padded to the longest clip (eager.py); any device and dtype. "auto" chooses
  it in a graph traced for a CPU, in half precision with dropout.
- ``short``: the Triton kernel, where all rows are query rows and clips have at most 128 of them (the encoder, with
  10-second clips), on a GPU, or on a CPU under Triton's interpreter. For longer clips, and where only some rows are
  query rows, the choice of "auto".

No other name falls back: a request that a backend cannot fulfil raises a ``ValueError`` that names the alternative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .. import eager, packing
from . import flash
from .cpu import clip_attention

BACKENDS = ("sdpa", "math", "clips", "short", *flash.FLASH)

# Shapes at which a committed measurement shows "short" faster than FlashAttention, where "auto" then chooses it:
# (compute capability, largest max_seqlen, head_dim). None has been measured.
MEASURED_SHORT: tuple[tuple[tuple[int, int], int, int], ...] = ()


def check_backend(backend: str) -> None:
    """Raise ValueError where ``backend`` is neither "auto" nor one of ``BACKENDS``."""
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
        backend: "auto" or one of ``BACKENDS``.
        device: Device of the rows.
        dtype: Dtype of the rows.
        dropout: Rate on the attention probabilities, in [0, 1).
        max_seqlen: Rows of the longest clip. None: unknown, or only some rows are query rows.
        head_dim: Values per head. None: unknown.

    Raises:
        ValueError: The name is unknown, or names a FlashAttention or "clips" that cannot run here.
    """
    check_backend(backend)
    device = torch.device(device)
    if backend in flash.FLASH:
        if problem := flash.problem(backend, device, dtype, dropout=dropout, head_dim=head_dim):
            raise ValueError(f"attention={backend!r} {problem}; use attention='auto' or 'sdpa'")
        return backend, "requested by name"
    if backend == "short" and max(max_seqlen or 0, head_dim or 0) > ops.SHORT:
        name, reason = choose_backend("auto", device, dtype=dtype, dropout=dropout, head_dim=head_dim)
        return name, f"'short' takes at most {ops.SHORT} rows per clip and values per head; as 'auto': {reason}"
    traced = torch.compiler.is_compiling()
    if backend == "clips" and (device.type != "cpu" or traced):
        got = "a graph that torch.compile traces" if traced else device
        raise ValueError(f"attention='clips' needs a CPU and eager mode, got {got}; use attention='auto' or 'sdpa'")
    if backend != "auto":
        return backend, "requested by name"
    if device.type == "cpu" and not traced:
        return (
            "clips",
            "clip by clip with little padding: faster on a CPU than PyTorch's fused attention over padded rows",
        )
    if device.type == "cpu" and dropout > 0.0 and dtype in (torch.bfloat16, torch.float16):
        return "math", "explicit products: PyTorch's fused attention with dropout is slower on a CPU in half precision"
    if problem := flash.problem("aten", device, dtype, dropout=dropout, head_dim=head_dim):
        return "sdpa", f"PyTorch's fused attention over padded rows: FlashAttention {problem}"
    if MEASURED_SHORT and max_seqlen is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        if any(
            capability == measured_capability and max_seqlen <= measured_seqlen and head_dim == measured_head_dim
            for measured_capability, measured_seqlen, measured_head_dim in MEASURED_SHORT
        ):
            return "short", "the Triton kernel for short clips was measured ahead of FlashAttention at this shape"
    return "aten", "FlashAttention-2 inside PyTorch (not yet run on a GPU by this project)"


def attention(  # noqa: PLR0917 - public signature
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
        max_seqlen: Upper bound on the rows of a clip.
        dropout: Rate on the attention probabilities, in [0, 1).
        backend: "auto" or one of ``BACKENDS``.
        seed: (1,) int64 dropout seed for ``short``. None: drawn from PyTorch's generator.
        site: Number of this dropout in the model, for ``short``.
        exact: Whether all N rows belong to a clip; False: rows may lie past ``cu_seqlens[-1]`` (packing.Packing).

    Returns:
        (N, H, Dh) in the dtype of ``qkv``. Padding rows past the last clip (see packing.TokenCounts) are zeros from
        ``clips``, ``short`` and FlashAttention, and copies of some row from ``sdpa`` and ``math``. They get no
        gradient.

    Raises:
        ValueError: The backend is unknown or does not take these clips, or a shape or rate is not as described.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, Dh), got {tuple(qkv.shape)}")
    _check(dropout, qkv, qkv, cu_seqlens=cu_seqlens)
    name, _ = choose_backend(
        backend, qkv.device, dtype=qkv.dtype, dropout=dropout, max_seqlen=max_seqlen, head_dim=qkv.shape[3]
    )
    if name == "short":
        return ops.short_attention(qkv, cu_seqlens, max_seqlen, dropout, seed, site, impl="triton")
    if name == "clips":
        return clip_attention(None, qkv, cu_seqlens, cu_seqlens, dropout=dropout)
    if name in flash.FLASH:
        # One unbind: its gradient is one pass, whereas the gradients of slices are a pass over zeros each.
        q, k, v = qkv.unbind(1)
        return flash.attend(
            name, q, k, v, cu_q=cu_seqlens, max_q=max_seqlen, cu_kv=cu_seqlens, max_kv=max_seqlen, dropout=dropout
        )
    return _padded(
        name,
        qkv[:, 0],
        qkv[:, 1:],
        cu_q=cu_seqlens,
        max_q=max_seqlen,
        cu_kv=cu_seqlens,
        max_kv=max_seqlen,
        dropout=dropout,
        has_padding_rows=not exact,
    )


def cross_attention(  # noqa: PLR0917 - public signature
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
        q: (Nq, H, Dh) packed query rows.
        kv: (N, 2, H, Dh) packed keys and values.
        cu_q: (B + 1,) int32 first query row of each clip, and the end of the last one.
        max_q: Upper bound on the query rows of a clip.
        cu_kv: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_kv: Upper bound on the rows of a clip.
        dropout: Rate on the attention probabilities, in [0, 1).
        backend: "auto" or one of ``BACKENDS``; "short" is treated as "auto".
        exact: Whether all rows belong to a clip; False: rows may lie past the last clip (packing.Packing).

    Returns:
        (Nq, H, Dh) in the dtype of ``q``; padding rows past the last clip as in ``attention``.

    Raises:
        ValueError: The backend is unknown or cannot run here, or a shape or rate is not as described.
    """
    if q.dim() != 3 or kv.dim() != 4 or kv.shape[1] != 2 or kv.shape[2:] != q.shape[1:]:
        raise ValueError(f"q and kv must be (Nq, H, Dh) and (N, 2, H, Dh), got {tuple(q.shape)} and {tuple(kv.shape)}")
    _check(dropout, q, kv, cu_q=cu_q, cu_kv=cu_kv)
    backend = "auto" if backend == "short" else backend
    name, _ = choose_backend(backend, q.device, dtype=q.dtype, dropout=dropout, head_dim=q.shape[2])
    if name == "clips":
        return clip_attention(q, kv, cu_q, cu_kv, dropout=dropout)
    if name in flash.FLASH:
        k, v = kv.unbind(1)
        return flash.attend(name, q, k, v, cu_q=cu_q, max_q=max_q, cu_kv=cu_kv, max_kv=max_kv, dropout=dropout)
    return _padded(
        name,
        q,
        kv,
        cu_q=cu_q,
        max_q=max_q,
        cu_kv=cu_kv,
        max_kv=max_kv,
        dropout=dropout,
        has_padding_rows=not exact,
    )


def _check(dropout: float, q: Tensor, kv: Tensor, **cu_seqlens: Tensor) -> None:
    ops.check_dropout(dropout, None, q.device)
    if kv.dtype != q.dtype or kv.device != q.device:
        raise ValueError(
            f"q and kv must have one dtype and device, got {q.dtype} on {q.device} and {kv.dtype} on {kv.device}"
        )
    for name, cu in cu_seqlens.items():
        ops.check_cu_seqlens(name, cu, q)
    first, *others = cu_seqlens.values()
    # Compared one by one: hashing the sizes for a set would specialise a traced graph on this number of clips.
    if any(cu.shape[0] != first.shape[0] for cu in others):
        counts = " and ".join(str(cu.shape[0] - 1) for cu in cu_seqlens.values())
        raise ValueError(f"cu_q and cu_kv must be of the same clips, got {counts}")


def _padded(
    name: str,
    q: Tensor,
    kv: Tensor,
    *,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float,
    has_padding_rows: bool = False,
) -> Tensor:
    """``cross_attention`` by ``sdpa`` or ``math``, rows padded to the longest clip of each group of similar lengths."""
    if groups := packing.similar_clips(cu_kv, max_kv, kv.shape[0]):
        outputs, query_rows = [], []
        for clips in groups:
            rows_kv, group_cu_kv, group_max_kv = packing.rows_of_clips(cu_kv, clips)
            if cu_q is cu_kv:
                rows_q, group_cu_q, group_max_q = rows_kv, group_cu_kv, group_max_kv
            else:
                rows_q, group_cu_q, group_max_q = packing.rows_of_clips(cu_q, clips)
            outputs.append(
                _padded(
                    name,
                    q[rows_q],
                    kv[rows_kv],
                    cu_q=group_cu_q,
                    max_q=group_max_q,
                    cu_kv=group_cu_kv,
                    max_kv=group_max_kv,
                    dropout=dropout,
                )
            )
            query_rows.append(rows_q)
        return torch.cat(outputs)[torch.cat(query_rows).argsort()]
    if name == "math":
        return eager.cross_attention(
            q,
            kv,
            cu_q=cu_q,
            max_q=max_q,
            cu_kv=cu_kv,
            max_kv=max_kv,
            dropout=dropout,
            has_padding_rows=has_padding_rows,
        )
    pad_q, pad_kv = packing.padded_views(
        cu_q=cu_q,
        max_q=max_q,
        num_q=q.shape[0],
        cu_kv=cu_kv,
        max_kv=max_kv,
        num_kv=kv.shape[0],
        has_padding_rows=has_padding_rows,
    )
    k, v = pad_kv.pad(kv).permute(2, 0, 3, 1, 4)  # each (B, H, S, Dh)
    mask = None if pad_kv.full else pad_kv.key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(pad_q.pad(q).transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout)
    return pad_q.unpad(out.transpose(1, 2))
