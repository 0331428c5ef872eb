"""Stand-ins for the FlashAttention kernels, which no CPU has: their signatures as data, the maths in plain PyTorch.

They take what the real ones take and refuse what those refuse, leave NaN where those leave memory as it was (rows of no
clip, in results and gradients), and draw dropout from PyTorch's generator of the CPU.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_ast_fast.ops.attention import flash

# flash_attn_varlen_func of each package: parameters in their order; those from "=" on have a default.
SIGNATURES = {
    "fa2": (  # flash-attn 2.8.3, flash_attn/flash_attn_interface.py
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k = dropout_p softmax_scale causal window_size "
        "softcap alibi_slopes deterministic return_attn_probs block_table"
    ),
    "fa3": (  # flash-attn 2.8.3, hopper/flash_attn_interface.py; later versions add return_attn_probs
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k = seqused_q seqused_k softmax_scale causal qv "
        "q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin"
    ),
    "fa4": (  # flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
        "q k v = qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k "
        "gather_kv_indices page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
        "deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse "
        "scheduler_metadata seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p gather_bwd_token_chunk"
    ),
}
# The same of PyTorch's operations: 2.11.0 and 2.14.1.
FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"
    "{more}) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)
SCHEMAS = {
    "2.11": (FORWARD.format(more=""), BACKWARD),
    "2.14": (FORWARD.format(more=", Tensor? block_table=None, int? num_splits=None"), BACKWARD),
}


def signature_of(text: str) -> inspect.Signature:
    required, optional = (part.split() for part in text.split("="))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind) for name in required]
        + [inspect.Parameter(name, kind, default=None) for name in optional]
    )


def clips(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for first in range(len(cu_q) - 1):
        yield slice(*cu_q[first : first + 2].tolist()), slice(*cu_k[first : first + 2].tolist())


def draw_masks(seed: int, cu_q: Tensor, cu_k: Tensor, heads: int, dropout: float) -> list[Tensor]:
    """Of each clip (H, asking rows, rows): 0, or the factor on what is kept."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(heads, a.stop - a.start, b.stop - b.start, generator=generator) >= dropout) / (1 - dropout)
        for a, b in clips(cu_q, cu_k)
    ]


def check_arguments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """What the kernels demand, and what they take on trust."""
    assert q.shape[0] and k.shape[0] and max_q and max_k and len(cu_q) == len(cu_k) > 1
    for x in (q, k, v):
        assert x.stride(-1) == 1 and not any(n % 8 for n in (*x.stride()[:-1], x.storage_offset()))
    for cu, most in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.diff().max() <= most


def probabilities(q: Tensor, k: Tensor, scale: float, a: slice, b: slice) -> Tensor:
    return (q[a].transpose(0, 1) @ k[b].permute(1, 2, 0)) * scale  # before the softmax


# --------------------------------------------------------------------------------------------------------- packages


class Unwritten(torch.autograd.Function):
    """x; its gradient is NaN from a row on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int) -> Tensor:
        ctx.first = first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.first :] = float("nan")
        return grad, None


def package(name: str, calls: list[dict[str, Any]]) -> Callable[..., Any]:
    """flash_attn_varlen_func of a package."""
    signature = signature_of(SIGNATURES[name])

    def function(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        calls.append(dict(given))
        q, k, v, cu_q, cu_k = (given.pop(x) for x in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
        scale, dropout = given.pop("softmax_scale"), given.pop("dropout_p", 0.0)
        check_arguments(q, k, v, cu_q, cu_k, given.pop("max_seqlen_q"), given.pop("max_seqlen_k"))
        assert not given, f"the stub knows nothing of {set(given)}"
        q, k, v = (Unwritten.apply(x, int(cu[-1])) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
        masks = draw_masks(int(torch.randint(2**31, ())), cu_q, cu_k, q.shape[1], dropout)
        out = [
            ((probabilities(q, k, scale, a, b).softmax(-1) * mask) @ v[b].transpose(0, 1)).transpose(0, 1)
            for (a, b), mask in zip(clips(cu_q, cu_k), masks, strict=True)
        ]
        out = torch.cat((*out, torch.full_like(q[int(cu_q[-1]) :], float("nan"))))
        return (out, None) if name == "fa4" else out  # FA4 returns its log-sum-exp, asked for or not

    return function


def install_package(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """Puts a stub in the package's place; the list of its calls' arguments."""
    calls: list[dict[str, Any]] = []
    full = flash.FLASH[name].module
    for depth in range(1, full.count(".") + 2):
        part = ".".join(full.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[full].flash_attn_varlen_func = package(name, calls)
    return calls


# ------------------------------------------------------------------------------------------------------------- aten


def aten_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
    is_causal: bool, debug: bool, *, scale: float | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_arguments(query, key, value, cu_q, cu_k, max_q, max_k)
    assert not is_causal and not debug and not any(x is not None for x in others.values())
    seed = int(torch.randint(2**31, ()))
    out, lse = torch.full_like(query, float("nan")), query.new_full(query.shape[1::-1], float("nan"))
    masks = draw_masks(seed, cu_q, cu_k, query.shape[1], dropout)
    for (a, b), mask in zip(clips(cu_q, cu_k), masks, strict=True):
        scores = probabilities(query, key, scale, a, b)
        lse[:, a] = scores.logsumexp(-1)
        out[a] = ((scores.softmax(-1) * mask) @ value[b].transpose(0, 1)).transpose(0, 1)
    rng_state = torch.tensor([seed, 0]).to(torch.uint64)
    return out, lse, rng_state, torch.tensor(7).to(torch.uint64), query.new_empty(0)


def aten_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, dropout: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """From what the forward saved, as the kernel does it: no softmax is taken again."""
    check_arguments(query, key, value, cu_q, cu_k, max_q, max_k)
    check_arguments(grad, out, out, cu_q, cu_q, max_q, max_q)
    assert not is_causal and int(unused) == 7 and not any(x is not None for x in others.values())
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (query, key, value))
    masks = draw_masks(int(rng_state[0]), cu_q, cu_k, query.shape[1], dropout)
    for (a, b), mask in zip(clips(cu_q, cu_k), masks, strict=True):
        p = (probabilities(query, key, scale, a, b) - lse[:, a, None]).exp()
        incoming = grad[a].transpose(0, 1)
        dv[b] = ((p * mask).transpose(1, 2) @ incoming).transpose(0, 1)
        mean = (incoming * out[a].transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (mask * (incoming @ value[b].permute(1, 2, 0)) - mean) * scale
        dq[a] = (ds @ key[b].transpose(0, 1)).transpose(0, 1)
        dk[b] = (ds.transpose(1, 2) @ query[a].transpose(0, 1)).transpose(0, 1)
    return dq, dk, dv


@contextlib.contextmanager
def aten_on_cpu() -> Iterator[None]:
    """PyTorch's own operations run on CPU tensors: the dispatcher still checks names and types of what they get."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", aten_forward, "CPU")
    library.impl("_flash_attention_backward", aten_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
