"""The transformer over packed rows that encoder and decoder share.

Letters: B clips, N packed rows, M of them wanted, D width, H heads. Weights stay in their own dtype (fp32 master
weights); the stream and the matrix products are in the dtype of the input, statistics in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops import reference
from ..ops.attention import attention, cross_attention
from ..ops.packing import Packing
from .config import MAEASTConfig, SSASTConfig

SITES = 4  # places of a layer where the kernels draw dropout masks
RECOMPUTE = ("none", "gelu", "layer")  # what the backward may compute again


@dataclass
class ExecConfig:
    """How the operations of one forward run.

    Attributes:
        impl: "torch" or "triton".
        attention: Name of the attention backend, or "auto".
        seed: (1,) int64 of the kernels' dropout; None in evaluation, and for impl "torch".
        recompute: One of ``RECOMPUTE``.
    """

    impl: str
    attention: str
    seed: Tensor | None
    recompute: str = "none"


def is_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether fused operations may read the weights of these modules instead of calling them.

    A plain module computes exactly what its class does, with its own weight and bias. Its type is ``kind``, not a
    subclass or another class. It has no hooks, neither its own nor global ones, and its ``forward``, weight and bias
    were not replaced by another kind. An adapter, a parametrization, pruning or quantisation makes a module not plain.

    Args:
        kind: ``nn.Linear``, ``nn.LayerNorm`` or ``nn.Sequential``.
        modules: What stands in the places of such modules.
    """
    return not _has_any_global_hook() and all(_is_plain(kind, module) for module in modules)


_WEIGHT_TYPES = (nn.Parameter, Tensor)  # not a subclass, such as a quantised weight; not None


def _is_plain(kind: type[nn.Module], module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not kind or hooks or "forward" in module.__dict__:
        return False
    if kind is nn.Sequential:
        return True
    return type(module.weight) in _WEIGHT_TYPES and type(module.bias) in _WEIGHT_TYPES


def is_fusible_norm(layer: nn.Module) -> bool:
    """Whether the operations that hold a LayerNorm compute this one: it is plain and has their eps."""
    return is_plain(nn.LayerNorm, layer) and layer.eps == ops.LAYER_NORM_EPS


def call(x: Tensor, module: nn.Module) -> Tensor:
    """Calls a module that is not plain on rows (N, D): fp32 weights compute in half precision where ``x`` is in it."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(x.device.type, x.dtype if half else None, enabled=half):
        return module(x).to(x.dtype)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """A Linear in the dtype of ``x``: its weights stay in their own (fp32 master weights, bf16 stream)."""
    if is_plain(nn.Linear, layer):
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    return call(x, layer)


def linear_without_bias(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A Linear in the dtype of ``x``, and its bias (D,) for the next operation to add; None where it is added."""
    if is_plain(nn.Linear, layer):
        return F.linear(x, layer.weight.to(x.dtype)), layer.bias
    return call(x, layer), None


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    """LayerNorm with fp32 statistics in the dtype of ``x``."""
    if is_plain(nn.LayerNorm, layer):
        return reference.layer_norm(x, layer.weight, layer.bias, layer.eps)
    return call(x, layer)


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """The sum in the dtype of ``x``; None adds nothing."""
    return x if bias is None else x + bias.to(x.dtype)


def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer: nn.Module,
    dropout: float,
    run: ExecConfig,
    *,
    site: int,
    fork: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(branch + bias)) (N, D); with ``fork`` twice, as in ``ops.add_layer_norm``.

    Args:
        branch: (N, D).
        bias: (D,) that the branch still lacks; None: nothing.
        residual: (N, D), in the dtype of ``branch``.
        layer: The LayerNorm. Where ``is_fusible_norm`` is False it is called, without a kernel.
        dropout: Rate in [0, 1).
        run: Implementation and seed.
        site: Which dropout this is.
        fork: Return the result as the next input and as the next residual.
    """
    if not is_fusible_norm(layer):
        y = call(residual + reference.drop(add_bias(branch, bias), dropout), layer)
        return (y, y) if fork else y
    return ops.add_layer_norm(
        branch,
        residual,
        layer.weight,
        layer.bias,
        bias,
        dropout=dropout,
        seed=run.seed,
        site=site,
        fork=fork,
        impl=run.impl,
    )


class Positions(nn.Module):
    """Fixed sinusoidal positions by token index.

    The table is computed, and kept out of checkpoints, unless one was loaded: the paper's fp16 runs carry a rounded
    table, and features only match with that one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("table", sinusoid(2048, dim), persistent=False)

    def forward(self, num_tokens: int) -> Tensor:
        """The table (tokens, D), for at least ``num_tokens`` tokens."""
        known = self.table.shape[0]
        if num_tokens > known:
            longer = sinusoid(num_tokens, self.dim, self.table.device).to(self.table.dtype)
            self.table = torch.cat((self.table, longer[known:]))
        return self.table

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (table := state_dict.get(prefix + "table")) is not None:
            if table.dim() != 2 or table.shape[1] != self.dim:
                raise ValueError(f"{prefix}table must be (tokens, {self.dim}), got {tuple(table.shape)}")
            self.register_buffer("table", torch.empty_like(table, device=self.table.device), persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Select(torch.autograd.Function):
    """Rows (N, D) by an index without repeats: the gradient is a store, not an addition.

    An index of N means no row: it gives some row, and takes no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index.clamp(max=ctx.rows - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows + 1, grad.shape[1]).index_copy(0, index, grad)[: ctx.rows], None


class Layer(nn.Module):
    """Transformer layer over packed rows: attention inside each clip, feed-forward with exact GELU.

    The stream comes and goes twice, as input of the next branch and as its residual: the same values, but two places
    for gradients to come back to, which the kernel adds in passing.
    """

    def __init__(self, dim: int, config: MAEASTConfig | SSASTConfig, site: int) -> None:
        super().__init__()
        self.config, self.site = config, site
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attn_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, residual: Tensor, rows: Packing, run: ExecConfig, only: tuple[Packing, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, D) twice -> (N, D) twice.

        Args:
            x: The stream, for the branches.
            residual: The stream, for the residual connections.
            rows: Packing of the N rows.
            run: How.
            only: Packing and row numbers (M,) of those rows whose output is wanted: (M, D) twice. Exact: the others
                serve as keys and values alone.
        """
        if only is not None:
            residual = _Select.apply(residual, only[1])
        rate = self.config.dropout if self.training else 0.0
        if self.config.norm_first:
            y = norm(x, self.attn_norm)
            asking = None if only is None else _Select.apply(y, only[1])
            branch, bias = self.attend(y, asking, rows, run, only)
            x = residual + reference.drop(add_bias(branch, bias), rate)
            branch, bias = self.feed_forward(norm(x, self.ffn_norm), run)
            x = x + reference.drop(add_bias(branch, bias), rate)
            return x, x
        asking = None if only is None else residual
        branch, bias = self.attend(x, asking, rows, run, only)
        x, residual = add_norm(branch, bias, residual, self.attn_norm, rate, run, site=self.site + 1, fork=True)
        branch, bias = self.feed_forward(x, run)
        return add_norm(branch, bias, residual, self.ffn_norm, rate, run, site=self.site + 2, fork=True)

    def attend(
        self, x: Tensor, asking: Tensor | None, rows: Packing, run: ExecConfig, only: tuple[Packing, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention and its output projection, as ``linear_without_bias`` gives it."""
        drop = self.config.attention_dropout if self.training else 0.0
        if only is None:
            qkv = linear(x, self.qkv).unflatten(1, (3, self.config.num_heads, -1))
            lengths = rows.cu_seqlens, rows.max_seqlen
            out = attention(qkv, *lengths, drop, run.attention, run.seed, self.site, not rows.has_padding_rows)
        else:
            q, kv = self.project_queries(x, asking, only[1])
            ask = only[0]
            lengths = ask.cu_seqlens, ask.max_seqlen, rows.cu_seqlens, rows.max_seqlen
            out = cross_attention(q, kv, *lengths, drop, run.attention, exact=not rows.has_padding_rows)
        return linear_without_bias(out.flatten(1), self.out_proj)

    def project_queries(self, x: Tensor, asking: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (M, H, Dh) of the rows ``asking`` (M, D), which are ``x[index]``; keys and values (N, 2, H, Dh)."""
        width, heads = x.shape[1], self.config.num_heads
        if is_plain(nn.Linear, self.qkv):
            weight, bias = self.qkv.weight.to(x.dtype), self.qkv.bias.to(x.dtype)
            q, kv = F.linear(asking, weight[:width], bias[:width]), F.linear(x, weight[width:], bias[width:])
        else:
            q, kv = linear(x, self.qkv).split([width, 2 * width], dim=1)
            q = _Select.apply(q, index)
        return q.unflatten(1, (heads, -1)), kv.unflatten(1, (2, heads, -1))

    def feed_forward(self, x: Tensor, run: ExecConfig) -> tuple[Tensor, Tensor | None]:
        """Linear, GELU, dropout, Linear; as ``linear_without_bias`` gives the last one."""
        rate = self.config.activation_dropout if self.training else 0.0
        if rate == 0.0 and is_plain(nn.Linear, self.fc1, self.fc2):
            w1, b1, w2 = self.fc1.weight, self.fc1.bias, self.fc2.weight
            recompute = run.recompute == "gelu"
            return ops.feed_forward(x, w1, b1, w2, recompute=recompute, impl=run.impl), self.fc2.bias
        h, bias = linear_without_bias(x, self.fc1)
        bias = h.new_zeros(h.shape[1]) if bias is None else bias

        def activate(h: Tensor) -> tuple[Tensor, Tensor | None]:
            a = ops.bias_gelu(h, bias, dropout=rate, seed=run.seed, site=self.site + 3, impl=run.impl)
            return linear_without_bias(a, self.fc2)

        if run.recompute == "gelu" and torch.is_grad_enabled():
            return checkpoint(activate, h, use_reentrant=False)
        return activate(h)


class TransformerStack(nn.Module):
    """Transformer stack. Post-norm: LayerNorm before the first layer; pre-norm: after the last.

    The entrance (that LayerNorm, and dropout) is left to the caller, who can fuse it with what comes before.
    """

    def __init__(
        self, dim: int, num_layers: int, layerdrop: float, config: MAEASTConfig | SSASTConfig, site: int
    ) -> None:
        super().__init__()
        self.layerdrop, self.norm_first = layerdrop, config.norm_first
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Layer(dim, config, site + SITES * index) for index in range(num_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        rows: Packing,
        run: ExecConfig,
        layer: int | None = None,
        only: tuple[Packing, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output (N, D) and the output of each layer.

        Args:
            x: (N, D).
            rows: Packing of the N rows.
            run: How.
            layer: Ends at this layer, from 1 on; None: at the last.
            only: Packing and row numbers of those rows whose output is wanted: the last layer computes no other.
        """
        states = []
        residual = x
        for index, block in enumerate(self.layers[:layer]):
            last = only if index + 1 == len(self.layers) else None
            if run.recompute == "layer" and torch.is_grad_enabled():
                y, again = checkpoint(block, x, residual, rows, run, last, use_reentrant=False)
            else:
                y, again = block(x, residual, rows, run, last)
            if self.training and self.layerdrop > 0.0:
                # A select, not a branch: every parameter is always used, and nothing waits for the device.
                kept = x if last is None else _Select.apply(x, last[1])
                y = again = torch.where(torch.rand((), device=x.device) < self.layerdrop, kept, y)
            x, residual = y, again
            states.append(x)
        if self.norm_first and layer is None:
            x = norm(x, self.norm)
        return x, states


def sinusoid(num_tokens: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed sinusoidal positions (num_tokens, dim) in fp32: sine in the even columns, cosine in the odd ones.

    Computed in fp32 throughout, as the paper's code does, so that a table from its checkpoints compares equal.
    """
    position = torch.arange(num_tokens, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
