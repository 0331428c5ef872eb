"""CPU stubs of the FlashAttention kernels: their signatures as data, the maths in plain PyTorch.

They accept and reject the same arguments as the real kernels. Where those leave memory undefined (padding rows, in
results and gradients) the stubs write NaN. They draw dropout from PyTorch's CPU generator.
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

# flash_attn_varlen_func of each package: parameters in order; those after "=" have a default.
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
# Schemas of PyTorch's operations: 2.11.0 and 2.14.1.
FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"
    "{extra}) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)
SCHEMAS = {
    "2.11": (FORWARD.format(extra=""), BACKWARD),
    "2.14": (FORWARD.format(extra=", Tensor? block_table=None, int? num_splits=None"), BACKWARD),
}


def signature_of(text: str) -> inspect.Signature:
    """The signature of a value of ``SIGNATURES``."""
    required, optional = (names.split() for names in text.split("="))
    any_way = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, any_way) for name in required]
        + [inspect.Parameter(name, any_way, default=None) for name in optional]
    )


def clips(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the query rows and of the key rows of each clip."""
    for clip in range(len(cu_q) - 1):
        (q_start, q_stop), (k_start, k_stop) = cu_q[clip : clip + 2].tolist(), cu_k[clip : clip + 2].tolist()
        yield slice(q_start, q_stop), slice(k_start, k_stop)


def draw_masks(seed: int, cu_q: Tensor, cu_k: Tensor, *, heads: int, dropout: float) -> list[Tensor]:
    """One mask (H, query rows, key rows) per clip: 0 where dropped, otherwise the factor on kept values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(heads, q_rows.stop - q_rows.start, k_rows.stop - k_rows.start, generator=generator) >= dropout)
        / (1 - dropout)
        for q_rows, k_rows in clips(cu_q, cu_k)
    ]


def check_arguments(q: Tensor, k: Tensor, v: Tensor, *, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """Assert what the kernels check, and what they require without a check."""
    assert q.shape[0] and k.shape[0] and max_q and max_k and len(cu_q) == len(cu_k) > 1
    for x in (q, k, v):
        assert x.stride(-1) == 1 and not any(n % 8 for n in (*x.stride()[:-1], x.storage_offset()))
    for cu, max_rows in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.diff().max() <= max_rows


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention logits (H, query rows, key rows) of one clip."""
    return (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale


# --------------------------------------------------------------------------------------------------------- packages


class Unwritten(torch.autograd.Function):
    """The identity, whose gradient is NaN from row ``num_rows`` on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int) -> Tensor:
        ctx.num_rows = num_rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.num_rows :] = float("nan")
        return grad, None


def package(name: str, calls: list[dict[str, Any]]) -> Callable[..., Any]:
    """A stub of a package's flash_attn_varlen_func, which appends its arguments to ``calls``."""
    signature = signature_of(SIGNATURES[name])

    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append(dict(arguments))
        q, k, v, cu_q, cu_k = (arguments.pop(x) for x in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
        scale, dropout = arguments.pop("softmax_scale"), arguments.pop("dropout_p", 0.0)
        max_q, max_k = arguments.pop("max_seqlen_q"), arguments.pop("max_seqlen_k")
        check_arguments(q, k, v, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)
        assert not arguments, f"the stub does not support {set(arguments)}"
        q, k, v = (Unwritten.apply(x, int(cu[-1])) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
        masks = draw_masks(int(torch.randint(2**31, ())), cu_q, cu_k, heads=q.shape[1], dropout=dropout)
        out = [
            ((logits(q[q_rows], k[k_rows], scale).softmax(-1) * mask) @ v[k_rows].transpose(0, 1)).transpose(0, 1)
            for (q_rows, k_rows), mask in zip(clips(cu_q, cu_k), masks, strict=True)
        ]
        out = torch.cat((*out, torch.full_like(q[int(cu_q[-1]) :], float("nan"))))
        return (out, None) if name == "fa4" else out  # FA4 always returns the log-sum-exp too

    return function


def install_package(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """Install a stub as the package; returns the list that gets the arguments of each call."""
    calls: list[dict[str, Any]] = []
    module_name = flash.FLASH[name].module
    for depth in range(1, module_name.count(".") + 2):
        parent_name = ".".join(module_name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, parent_name, ModuleType(parent_name))
    sys.modules[module_name].flash_attn_varlen_func = package(name, calls)
    return calls


# ------------------------------------------------------------------------------------------------------------- aten


def aten_forward(  # noqa: PLR0917 - the schema of the operation
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
    is_causal: bool, debug: bool, *, scale: float | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_arguments(query, key, value, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)
    assert not is_causal and not debug and not any(x is not None for x in others.values())
    seed = int(torch.randint(2**31, ()))
    out, lse = torch.full_like(query, float("nan")), query.new_full(query.shape[1::-1], float("nan"))
    masks = draw_masks(seed, cu_q, cu_k, heads=query.shape[1], dropout=dropout)
    for (q_rows, k_rows), mask in zip(clips(cu_q, cu_k), masks, strict=True):
        scores = logits(query[q_rows], key[k_rows], scale)
        lse[:, q_rows] = scores.logsumexp(-1)
        out[q_rows] = ((scores.softmax(-1) * mask) @ value[k_rows].transpose(0, 1)).transpose(0, 1)
    rng_state = torch.tensor([seed, 0]).to(torch.uint64)
    return out, lse, rng_state, torch.tensor(7).to(torch.uint64), query.new_empty(0)


def aten_backward(  # noqa: PLR0917 - the schema of the operation
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, dropout: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients from the saved log-sum-exp, as in the kernel: without another softmax."""
    check_arguments(query, key, value, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)
    check_arguments(grad, out, out, cu_q=cu_q, cu_k=cu_q, max_q=max_q, max_k=max_q)
    assert not is_causal and int(unused) == 7 and not any(x is not None for x in others.values())
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (query, key, value))
    masks = draw_masks(int(rng_state[0]), cu_q, cu_k, heads=query.shape[1], dropout=dropout)
    for (q_rows, k_rows), mask in zip(clips(cu_q, cu_k), masks, strict=True):
        p = (logits(query[q_rows], key[k_rows], scale) - lse[:, q_rows, None]).exp()
        incoming = grad[q_rows].transpose(0, 1)
        dv[k_rows] = ((p * mask).transpose(1, 2) @ incoming).transpose(0, 1)
        mean = (incoming * out[q_rows].transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (mask * (incoming @ value[k_rows].permute(1, 2, 0)) - mean) * scale
        dq[q_rows] = (ds @ key[k_rows].transpose(0, 1)).transpose(0, 1)
        dk[k_rows] = (ds.transpose(1, 2) @ query[q_rows].transpose(0, 1)).transpose(0, 1)
    return dq, dk, dv


@contextlib.contextmanager
def aten_on_cpu() -> Iterator[None]:
    """Run the stubs as PyTorch's own operations on CPU; the dispatcher still checks names and types of arguments."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", aten_forward, "CPU")
    library.impl("_flash_attention_backward", aten_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
