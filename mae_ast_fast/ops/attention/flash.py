"""FlashAttention over packed clips: PyTorch's own kernel or that of a package, all called by keyword.

- ``aten``: FlashAttention-2 inside PyTorch, in a custom op because PyTorch's own variable-length function has no
  dropout. It is one node for torch.compile.
- ``fa2``, ``fa3``, ``fa4``: ``flash_attn_varlen_func`` of flash_attn 2.x, flash_attn_interface and flash_attn.cute. The
  last two have no dropout.

Dropout of ``aten`` and ``fa2`` comes from PyTorch's CUDA generator, 8 bits per probability. Kept probabilities are
scaled by exactly 1 / (1 - rate), and their share is (floor(255 (1 - rate)) + 1) / 256. Gradients of queries are summed
with float atomics, so that two runs can differ in the last bits (torch.use_deterministic_algorithms changes that for
``aten``). None of this has run on a GPU yet.

Letters: B clips, N rows of keys and values, Nq query rows, H heads of Dh values.
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
BUILT = torch.backends.cuda.is_flash_attention_available()  # a property of the PyTorch build; does not query the driver


@dataclass(frozen=True)
class Flash:
    """Limits of a backend.

    Attributes:
        module: Name of the module with ``flash_attn_varlen_func``. None: PyTorch's own kernel.
        install: How to install that module, in words.
        dropout: Whether the backend has dropout.
        capability: Lowest and highest compute capability of the device.
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
    name: str, device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0, head_dim: int | None = None
) -> str | None:
    """Why a backend cannot run here, as what it expects and what it got. None: it can run.

    Args:
        name: One of ``FLASH``.
        device: Device of the rows.
        dtype: Dtype of the rows.
        dropout: Rate on the attention probabilities, in [0, 1).
        head_dim: Values per head, Dh. None: unknown.
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
        lowest, highest = flash.capability
        properties = torch.cuda.get_device_properties(device)  # a constant for torch.compile
        if not lowest <= (capability := (properties.major, properties.minor)) <= highest:
            upto = "or newer" if highest == NEWER else f"to {highest[0]}.{highest[1]}"
            return f"needs compute capability {lowest[0]}.{lowest[1]} {upto}, got {capability[0]}.{capability[1]}"
    if flash.module is None:
        if not BUILT:
            return "needs a PyTorch with FlashAttention, got one built without"
    else:
        try:
            _package_function(name)
        except (ImportError, AttributeError) as error:
            return f"needs {flash.module}.flash_attn_varlen_func ({flash.install}), got: {error}"
    return None


def _package_function(name: str) -> Callable[..., Any]:
    module = FLASH[name].module
    assert module is not None
    return importlib.import_module(module).flash_attn_varlen_func


def attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_q: Tensor,
    max_q: int,
    cu_kv: Tensor,
    max_kv: int,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of some rows of each clip over all of its rows, scale Dh ** -0.5.

    The caller must have checked with ``problem`` that the backend can run here.

    Args:
        name: One of ``FLASH``.
        q: (Nq, H, Dh) packed query rows.
        k: (N, H, Dh) packed keys.
        v: (N, H, Dh) packed values.
        cu_q: (B + 1,) int32 first query row of each clip, and the end of the last one.
        max_q: Upper bound on the query rows of a clip.
        cu_kv: (B + 1,) int32 first row of each clip, and the end of the last one.
        max_kv: Upper bound on the rows of a clip.
        dropout: Rate on the attention probabilities, in [0, 1).

    Returns:
        (Nq, H, Dh) in the dtype of ``q``. The kernels do not write padding rows past the last clip (see
        packing.TokenCounts); these rows and their gradients are zeros.
    """
    scale = q.shape[-1] ** -0.5
    if name == "aten":
        return forward_op(q, k, v, cu_q, cu_kv, max_q, max_kv, dropout, scale)[0]
    if _is_empty(q, k, cu_q, max_q=max_q, max_kv=max_kv):
        return torch.zeros_like(q) + 0.0 * (q.sum() + k.sum() + v.sum())  # gradients that are zero, not None
    q, k, v = (_ClearGradient.apply(_loadable(x), cu) for x, cu in ((q, cu_q), (k, cu_kv), (v, cu_kv)))
    options = {"dropout_p": dropout} if FLASH[name].dropout else {}
    out = _package_function(name)(
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
    _clear_tail(out.data, cu_q)  # .data: autograd need not know, the backward does not read these rows
    return out


class _ClearGradient(torch.autograd.Function):
    """Identity whose gradient has zeros in the rows past the last clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return _clear_tail(grad.contiguous(), cu_seqlens), None


def _clear_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Zero the rows of x (N, ...) from ``cu_seqlens[-1]`` on, in place; x is dense and not shared. Returns x.

    The host does not wait for a GPU.
    """
    if x.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ...kernels.clear_padding import clear_tail  # touches only those rows

        return clear_tail(x, cu_seqlens.contiguous())
    beyond = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
    return x.masked_fill_(beyond.view(-1, *[1] * (x.dim() - 1)), 0.0)


def _loadable(x: Tensor) -> Tensor:
    """x, or a copy where the kernels' loads of 16 bytes are not aligned or the last dimension is not contiguous."""
    aligned = x.stride(-1) == 1 and all(n % HEAD_MULTIPLE == 0 for n in (*x.stride()[:-1], x.storage_offset()))
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _is_empty(q: Tensor, k: Tensor, cu_q: Tensor, *, max_q: int, max_kv: int) -> bool:
    """Whether there are no queries or no keys, which the kernels refuse."""
    return 0 in (q.shape[0], k.shape[0], max_q, max_kv, cu_q.shape[0] - 1)


# ------------------------------------------------------------------------------------------------------------- aten


def forward(  # noqa: PLR0917 - schema of a custom operator
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
    if _is_empty(q, k, cu_q, max_q=max_q, max_kv=max_kv):
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


def backward(  # noqa: PLR0917 - schema of a custom operator
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
    """aten::_flash_attention_backward: gradients of q, k and v, with the dropout mask of the forward."""
    if _is_empty(q, k, cu_q, max_q=max_q, max_kv=max_kv):
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
    return (
        _clear_tail(dq.contiguous(), cu_q),
        _clear_tail(dk.contiguous(), cu_kv),
        _clear_tail(dv.contiguous(), cu_kv),
    )


def _shapes(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        q.new_empty(2, dtype=torch.uint64),
        q.new_empty((), dtype=torch.uint64),
    )


# Two equal calls draw two masks, so torch.compile must not merge them. (torch 2.11 merges them nevertheless where the
# inputs are the same tensors, which does not happen for two layers.)
forward_op = torch.library.custom_op(
    "mae_ast_fast::flash_attention", forward, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
backward_op = torch.library.custom_op("mae_ast_fast::flash_attention_backward", backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, cu_q, cu_kv, max_q, max_kv, dropout, scale):  # noqa: PLR0917 - schema of a custom operator
    return _shapes(q)


@backward_op.register_fake
def _(  # noqa: PLR0917 - schema of a custom operator
    grad, q, k, v, out, lse, cu_q, cu_kv, max_q, max_kv, dropout, rng_state, unused, scale
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, cu_q, cu_kv, *ctx.scalars = inputs
    out, lse, rng_state, unused = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_kv, rng_state, unused)


def _gradients(ctx, grad, *_):
    q, k, v, out, lse, cu_q, cu_kv, rng_state, unused = ctx.saved_tensors
    max_q, max_kv, dropout, scale = ctx.scalars
    grads = backward_op(grad, q, k, v, out, lse, cu_q, cu_kv, max_q, max_kv, dropout, rng_state, unused, scale)
    return *grads, *[None] * 6


forward_op.register_autograd(_gradients, setup_context=_save)
