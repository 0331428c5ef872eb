"""FlashAttention over packed clips: PyTorch's own kernel, or a package's, all called by keyword.

- ``aten``: FlashAttention-2 inside PyTorch, in a custom op because PyTorch's own variable-length function has no
  dropout. One node for torch.compile.
- ``fa2``, ``fa3``, ``fa4``: ``flash_attn_varlen_func`` of flash_attn 2.x, flash_attn_interface and flash_attn.cute. The
  last two have no dropout.

Dropout of ``aten`` and ``fa2`` comes from PyTorch's CUDA generator, 8 bits for each probability: what is kept is scaled
by exactly 1 / (1 - rate), and is a share of (floor(255 (1 - rate)) + 1) / 256. Gradients of queries are summed with
float atomics, so that two runs can differ in the last bits (torch.use_deterministic_algorithms changes that for
``aten``). None of this has run on a GPU yet.

Letters: B clips, N rows of keys and values, Nq rows that ask, H heads of Dh.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
HEAD_MULTIPLE, HEAD_MAX = 8, 256
BUILT = torch.backends.cuda.is_flash_attention_available()  # of this PyTorch; asks no driver


@dataclass(frozen=True)
class Flash:
    """A backend's limits.

    Attributes:
        module: Which has ``flash_attn_varlen_func``; None: PyTorch's own kernel.
        install: Where that comes from, in words.
        dropout: Whether it has any.
        capability: Of the device, least and most.
    """

    module: str | None
    install: str
    dropout: bool
    capability: tuple[tuple[int, int], tuple[int, int]]


NEWER = (99, 0)
FLASH = {
    "aten": Flash(None, "PyTorch", True, ((8, 0), NEWER)),
    "fa2": Flash("flash_attn", "pip install flash-attn", True, ((8, 0), NEWER)),
    "fa3": Flash(
        "flash_attn_interface", "the folder hopper of the flash-attention repository", False, ((9, 0), (9, 9))
    ),
    "fa4": Flash("flash_attn.cute", "pip install --pre flash-attn-4", False, ((9, 0), NEWER)),
}


def problem(
    name: str, device: torch.device, dtype: torch.dtype, dropout: float = 0.0, head_dim: int | None = None
) -> str | None:
    """Why a backend cannot do this: what it expects and what came; None: it can.

    Args:
        name: One of ``FLASH``.
        device: Of the tensors.
        dtype: Of the rows.
        dropout: Rate on the probabilities.
        head_dim: Dh; None: not known yet.
    """
    flash = FLASH[name]
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    if torch.version.hip:
        return "needs CUDA, got ROCm"
    if dtype not in DTYPES:
        return f"takes float16 and bfloat16, got {dtype}"
    if head_dim is not None and (head_dim % HEAD_MULTIPLE or not 0 < head_dim <= HEAD_MAX):
        return f"takes heads of a multiple of {HEAD_MULTIPLE} values up to {HEAD_MAX}, got {head_dim}"
    if dropout > 0.0 and not flash.dropout:
        return f"has no dropout, got a rate of {dropout}"
    if torch.cuda.is_available():  # not where only shapes are traced
        least, most = flash.capability
        properties = torch.cuda.get_device_properties(device)  # torch.compile takes it as a constant
        if not least <= (found := (properties.major, properties.minor)) <= most:
            upto = "or newer" if most == NEWER else f"to {most[0]}.{most[1]}"
            return f"needs compute capability {least[0]}.{least[1]} {upto}, got {found[0]}.{found[1]}"
    if flash.module is None:
        if not BUILT:
            return "needs a PyTorch with FlashAttention, got one built without"
    else:
        try:
            _function(name)
        except (ImportError, AttributeError) as error:
            return f"needs {flash.module}.flash_attn_varlen_func ({flash.install}), got: {error}"
    return None


def _function(name: str) -> Callable[..., Any]:
    return importlib.import_module(FLASH[name].module).flash_attn_varlen_func


def attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of some rows of each clip over all of its rows, scale Dh ** -0.5; see ``problem``.

    Args:
        name: One of ``FLASH``.
        q: (Nq, H, Dh).
        k: (N, H, Dh), as ``v``.
        v: See ``k``.
        cu_q: (B + 1,) int32 first asking row of each clip, ``max_q`` at least those of the longest.
        max_q: See ``cu_q``.
        cu_kv: (B + 1,) int32 first row of each clip, ``max_kv`` at least those of the longest.
        max_kv: See ``cu_kv``.
        dropout: Rate on the probabilities, in [0, 1).

    Returns:
        (Nq, H, Dh) in the dtype of ``q``. Rows past the last clip (see packing.TokenCounts), which the kernels do not
        write, are zeros, as are their gradients.
    """
    scale = q.shape[-1] ** -0.5
    if name == "aten":
        return forward_op(q, k, v, cu_q, cu_kv, max_q, max_kv, dropout, scale)[0]
    if _nothing(q, k, cu_q, max_q, max_kv):
        return torch.zeros_like(q) + 0.0 * (q.sum() + k.sum() + v.sum())  # gradients of zero, not none
    q, k, v = (_ClearGradient.apply(_loadable(x), cu) for x, cu in ((q, cu_q), (k, cu_kv), (v, cu_kv)))
    options = {"dropout_p": dropout} if FLASH[name].dropout else {}
    out = _function(name)(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_q.contiguous(),
        cu_seqlens_k=cu_kv.contiguous(),
        max_seqlen_q=max_q,
        max_seqlen_k=max_kv,
        softmax_scale=scale,
        **options,
    )
    out = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too
    _clear_tail(out.data, cu_q)  # not a change that the backward must know of: it does not read these rows
    return out


class _ClearGradient(torch.autograd.Function):
    """x, whose gradient has zeros in the rows past the last clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _clear_tail(grad.contiguous(), *ctx.saved_tensors), None


def _clear_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x (N, ...), dense and no one else's, with zeros from row ``cu_seqlens[-1]`` on; nothing waits for a GPU."""
    if x.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ...kernels.clear_padding import clear_tail  # reads and writes those rows alone

        return clear_tail(x, cu_seqlens.contiguous())
    beyond = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
    return x.masked_fill_(beyond.view(-1, *[1] * (x.dim() - 1)), 0.0)


def _loadable(x: Tensor) -> Tensor:
    """x, copied where the kernels' loads of 16 bytes would not be aligned or its last values not be neighbours."""
    aligned = x.stride(-1) == 1 and all(n % HEAD_MULTIPLE == 0 for n in (*x.stride()[:-1], x.storage_offset()))
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _nothing(q: Tensor, k: Tensor, cu_q: Tensor, max_q: int, max_kv: int) -> bool:
    """No row asks or none answers, which the kernels refuse."""
    return 0 in (q.shape[0], k.shape[0], max_q, max_kv, cu_q.shape[0] - 1)


# ------------------------------------------------------------------------------------------------------------- aten


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    max_q: int,
    max_kv: int,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward: out (Nq, H, Dh), log-sum-exp (H, Nq) fp32, and two states of the generator."""
    if _nothing(q, k, cu_q, max_q, max_kv):
        out, lse, rng_state, unused = _shapes(q)
        return out.zero_(), lse.zero_(), rng_state, unused
    out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward.default(
        query=_loadable(q),
        key=_loadable(k),
        value=_loadable(v),
        cum_seq_q=cu_q.contiguous(),
        cum_seq_k=cu_kv.contiguous(),
        max_q=max_q,
        max_k=max_kv,
        dropout_p=dropout,
        is_causal=False,
        return_debug_mask=False,
        scale=scale,
    )
    return _clear_tail(out.contiguous(), cu_q), lse, rng_state, unused


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    max_q: int,
    max_kv: int,
    dropout: float,
    rng_state: Tensor,
    unused: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward: gradients of q, k and v, with the mask of the forward."""
    if _nothing(q, k, cu_q, max_q, max_kv):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        grad_out=_loadable(grad),
        query=_loadable(q),
        key=_loadable(k),
        value=_loadable(v),
        out=out,
        logsumexp=lse,
        cum_seq_q=cu_q.contiguous(),
        cum_seq_k=cu_kv.contiguous(),
        max_q=max_q,
        max_k=max_kv,
        dropout_p=dropout,
        is_causal=False,
        rng_state=rng_state,
        unused=unused,
        scale=scale,
    )
    pairs = (dq, cu_q), (dk, cu_kv), (dv, cu_kv)
    dq, dk, dv = (_clear_tail(x.contiguous(), cu) for x, cu in pairs)
    return dq, dk, dv


def _shapes(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        q.new_empty(2, dtype=torch.uint64),
        q.new_empty((), dtype=torch.uint64),
    )


# Two equal calls draw two masks: torch.compile must not make one of them. (That of torch 2.11 does all the same where
# even the inputs are the same ones, which no two layers have.)
forward_op = torch.library.custom_op(
    "mae_ast_fast::flash_attention", forward, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
backward_op = torch.library.custom_op("mae_ast_fast::flash_attention_backward", backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, cu_q, cu_kv, max_q, max_kv, dropout, scale):
    return _shapes(q)


@backward_op.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_kv, max_q, max_kv, dropout, rng_state, unused, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, cu_q, cu_kv, *ctx.rest = inputs
    out, lse, rng_state, unused = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_kv, rng_state, unused)


def _gradients(ctx, grad, *_):
    q, k, v, out, lse, cu_q, cu_kv, rng_state, unused = ctx.saved_tensors
    max_q, max_kv, dropout, scale = ctx.rest
    grads = backward_op(grad, q, k, v, out, lse, cu_q, cu_kv, max_q, max_kv, dropout, rng_state, unused, scale)
    return *grads, *[None] * 6


forward_op.register_autograd(_gradients, setup_context=_save)
