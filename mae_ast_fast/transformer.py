"""The transformer over packed rows that encoder and decoder share.

Letters: B clips, N packed rows, M of them wanted, D width, H heads. Weights stay in their own dtype (fp32 master
weights); the stream and the matrix products are in the dtype of the input, statistics in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops, reference
from .attention import attention, cross_attention
from .config import MAEASTConfig, SSASTConfig
from .packing import Packing, sinusoid

SITES = 4  # places of a layer where the kernels draw dropout masks
RECOMPUTE = ("none", "gelu", "layer")  # what the backward may compute again


@dataclass
class Execution:
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


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A Linear in the dtype of ``x``: the weights stay in their own (fp32 master weights, bf16 stream)."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """LayerNorm with fp32 statistics in the dtype of ``x``."""
    return reference.layer_norm(x, layer.weight, layer.bias, layer.eps)


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
        self, x: Tensor, residual: Tensor, rows: Packing, run: Execution, only: tuple[Packing, Tensor] | None = None
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
        if self.config.norm_first:
            y = norm(x, self.attn_norm)
            asking = None if only is None else norm(residual, self.attn_norm)
            x = residual + self.drop(self.attend(y, asking, rows, run, only) + self.out_proj.bias.to(x.dtype))
            x = x + self.drop(self.feed_forward(norm(x, self.ffn_norm), run) + self.fc2.bias.to(x.dtype))
            return x, x
        asking = None if only is None else residual
        x, residual = self.add_norm(
            self.attend(x, asking, rows, run, only), residual, self.out_proj, self.attn_norm, 1, run
        )
        return self.add_norm(self.feed_forward(x, run), residual, self.fc2, self.ffn_norm, 2, run)

    def attend(
        self, x: Tensor, asking: Tensor | None, rows: Packing, run: Execution, only: tuple[Packing, Tensor] | None
    ) -> Tensor:
        """Self-attention and its output projection, without the latter's bias."""
        heads = self.config.num_heads
        drop = self.config.attention_dropout if self.training else 0.0
        if only is None:
            qkv = linear(x, self.qkv).unflatten(1, (3, heads, -1))
            lengths = rows.cu_seqlens, rows.max_seqlen
            out = attention(qkv, *lengths, drop, run.attention, run.seed, self.site, rows.exact)
        else:
            width = x.shape[1]
            weight, bias = self.qkv.weight.to(x.dtype), self.qkv.bias.to(x.dtype)
            q = F.linear(asking, weight[:width], bias[:width]).unflatten(1, (heads, -1))
            kv = F.linear(x, weight[width:], bias[width:]).unflatten(1, (2, heads, -1))
            ask = only[0]
            lengths = ask.cu_seqlens, ask.max_seqlen, rows.cu_seqlens, rows.max_seqlen
            out = cross_attention(q, kv, *lengths, drop, run.attention, rows.exact)
        return F.linear(out.flatten(1), self.out_proj.weight.to(x.dtype))

    def feed_forward(self, x: Tensor, run: Execution) -> Tensor:
        """Linear, GELU, Linear, without the last one's bias."""
        drop = self.config.activation_dropout if self.training else 0.0
        if drop == 0.0:
            recompute = run.recompute == "gelu"
            return ops.feed_forward(
                x, self.fc1.weight, self.fc1.bias, self.fc2.weight, recompute=recompute, impl=run.impl
            )
        hidden = F.linear(x, self.fc1.weight.to(x.dtype))
        hidden = ops.bias_gelu(hidden, self.fc1.bias, drop, run.seed, self.site + 3, run.impl)
        return F.linear(hidden, self.fc2.weight.to(x.dtype))

    def add_norm(
        self, branch: Tensor, residual: Tensor, last: nn.Linear, layer: nn.LayerNorm, place: int, run: Execution
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm(residual + dropout(branch + bias of its last Linear)), twice."""
        drop = self.config.dropout if self.training else 0.0
        parameters = layer.weight, layer.bias, last.bias
        return ops.add_layer_norm(branch, residual, *parameters, drop, run.seed, self.site + place, True, run.impl)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the residual branches."""
        return reference.drop(x, self.config.dropout if self.training else 0.0)


class Stack(nn.Module):
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
        run: Execution,
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
