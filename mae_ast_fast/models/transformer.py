"""The transformer over packed rows that encoders and decoders share.

Letters: B clips, N packed rows, M packed query rows, D width, H heads, Dh values per head. Weights keep their own dtype
(fp32 master weights). The stream and the matrix products are in the dtype of the input, LayerNorm statistics in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, TypeGuard, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops import reference
from ..ops.attention import attention, cross_attention
from ..ops.dropout import drop
from ..ops.packing import Packing
from .config import MAEASTConfig, SSASTConfig
from .layout import QueryRows

RECOMPUTE = ("none", "gelu", "layer")  # what the backward may compute again


class StemSite(IntEnum):
    """Numbers of the dropouts before the layers. The kernels draw a mask of its own for each number."""

    ENCODER = 0
    DECODER = 1


class DropoutSite(IntEnum):
    """Dropouts of a layer, counted from the layer's first number."""

    ATTENTION = 0  # the attention probabilities
    ATTENTION_BRANCH = 1  # the output of the attention block
    FEED_FORWARD_BRANCH = 2  # the output of the feed-forward block
    ACTIVATION = 3  # the output of the GELU


SITES_PER_LAYER = len(DropoutSite)  # the layers' numbers follow SITES_PER_LAYER for the stems


@dataclass
class ExecConfig:
    """Implementation, attention backend, dropout seed and dtype of one forward pass.

    Attributes:
        impl: "torch" or "triton".
        attention: Name of the attention backend, or "auto".
        seed: (1,) int64 of the kernels' dropout. None if no kernel draws dropout.
        recompute: One of ``RECOMPUTE``.
        dtype: Dtype of the stream and of the matrix products.
    """

    impl: str
    attention: str
    seed: Tensor | None
    recompute: str = "none"
    dtype: torch.dtype = torch.float32


def is_plain(module_class: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether fused operations may read the weights of these modules instead of calling them.

    A plain module computes exactly what its class does, with its own weight and bias. Its type is ``module_class``, not
    a subclass or another class. It has no hooks, neither its own nor global ones. Its ``forward`` was not replaced, and
    its weight and bias are parameters or plain tensors. An adapter, a parametrization, pruning or quantisation makes a
    module not plain.

    Args:
        module_class: ``nn.Linear``, ``nn.LayerNorm`` or ``nn.Sequential``.
        modules: The modules to check.
    """
    return not _has_any_global_hook() and all(_is_plain(module_class, module) for module in modules)


_WEIGHT_TYPES = (nn.Parameter, Tensor)  # not a subclass, such as a quantised weight; not None


def _is_plain(module_class: type[nn.Module], module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not module_class or hooks or "forward" in module.__dict__:
        return False
    if module_class is nn.Sequential:
        return True
    return type(module.weight) in _WEIGHT_TYPES and type(module.bias) in _WEIGHT_TYPES


def is_fusible_norm(layer: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether the operations with a fused LayerNorm compute this one: it is plain and has their eps."""
    return isinstance(layer, nn.LayerNorm) and is_plain(nn.LayerNorm, layer) and layer.eps == ops.LAYER_NORM_EPS


def call(x: Tensor, module: nn.Module) -> Tensor:
    """Call a module that is not plain.

    If ``x`` is in half precision, the module computes under autocast, so that fp32 weights take it.

    Args:
        x: (N, D).
        module: Takes (N, D).

    Returns:
        The module's output in the dtype of ``x``.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(x.device.type, x.dtype if half else None, enabled=half):
        return module(x).to(x.dtype)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """Linear in the dtype of ``x``; its weights keep their own dtype (fp32 master weights, bf16 stream)."""
    if isinstance(layer, nn.Linear) and is_plain(nn.Linear, layer):
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    return call(x, layer)


def linear_without_bias(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Linear in the dtype of ``x``, whose bias is left to the next operation.

    Returns:
        The product, and the bias (D,) that is still to be added. If ``layer`` is not plain it is called: the product
        then contains the bias, and the second value is None.
    """
    if isinstance(layer, nn.Linear) and is_plain(nn.Linear, layer):
        return F.linear(x, layer.weight.to(x.dtype)), layer.bias
    return call(x, layer), None


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    """LayerNorm with fp32 statistics; returns the dtype of ``x``."""
    if isinstance(layer, nn.LayerNorm) and is_plain(nn.LayerNorm, layer):
        return reference.layer_norm(x, layer.weight, layer.bias, layer.eps)
    return call(x, layer)


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """The sum in the dtype of ``x``; a bias of None adds nothing."""
    return x if bias is None else x + bias.to(x.dtype)


@overload
def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer: nn.Module,
    *,
    dropout: float,
    dropout_site: int,
    cfg: ExecConfig,
    return_residual: Literal[False] = False,
) -> Tensor: ...


@overload
def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer: nn.Module,
    *,
    dropout: float,
    dropout_site: int,
    cfg: ExecConfig,
    return_residual: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer: nn.Module,
    *,
    dropout: float,
    dropout_site: int,
    cfg: ExecConfig,
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(branch + bias)) (N, D), as ``ops.add_layer_norm``.

    Args:
        branch: (N, D).
        bias: (D,) that ``branch`` still lacks; None: nothing.
        residual: (N, D), in the dtype of ``branch``.
        layer: The LayerNorm. If ``is_fusible_norm`` is False it is called, without a kernel.
        dropout: Rate in [0, 1).
        dropout_site: Number of this dropout in the model.
        cfg: Implementation and dropout seed.
        return_residual: Return the result twice, as the next input and as the next residual.
    """
    if not is_fusible_norm(layer):
        y = call(residual + drop(add_bias(branch, bias), dropout), layer)
        return (y, y) if return_residual else y
    return ops.add_layer_norm(
        branch,
        residual,
        layer.weight,
        layer.bias,
        bias,
        dropout=dropout,
        seed=cfg.seed,
        site=dropout_site,
        fork=return_residual,
        impl=cfg.impl,
    )


class Positions(nn.Module):
    """Fixed sinusoidal positions, looked up by token index.

    The table is computed and kept out of checkpoints, unless one was loaded. The paper's fp16 runs saved a rounded
    table, and features only match with that one. No state dict fills a computed table, so it is computed again where
    its memory is new (``to_empty``) or where it is still on the meta device (``load_state_dict(assign=True)``).

    Args:
        dim: Width D, even; a multiple of 4 if ``grid_f`` is above 1.
        grid_f: Frequency blocks of "sinusoid_2d". 1: "sinusoid".
    """

    table: Tensor

    def __init__(self, dim: int, grid_f: int = 1) -> None:
        super().__init__()
        self.dim, self.grid_f = dim, grid_f
        self.register_buffer("table", self.compute(2048), persistent=False)

    def forward(self, num_tokens: int, device: torch.device | None = None) -> Tensor:
        """The table (at least ``num_tokens``, D); ``device`` is that of the tokens, None that of the table."""
        if self.table.is_meta and device is not None and device.type != "meta":
            self.materialize(device)
        table_len = self.table.shape[0]
        if num_tokens > table_len:
            longer = self.compute(num_tokens, self.table.device).to(self.table.dtype)
            self.table = torch.cat((self.table, longer[table_len:]))
        return self.table

    def compute(self, num_tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The first ``num_tokens`` rows (num_tokens, D) in fp32, whatever a checkpoint held."""
        return sinusoid_2d(num_tokens, self.dim, self.grid_f, device)

    @property
    def is_computed(self) -> bool:
        """Whether the table is computed, and in no state dict."""
        return "table" in self._non_persistent_buffers_set

    def materialize(self, device: torch.device) -> None:
        """Replace a table on the meta device, which has no values, by a computed one.

        Raises:
            RuntimeError: The table is one of a checkpoint, and its values were never loaded.
        """
        if not self.is_computed:
            raise RuntimeError("the position table of the checkpoint is still on the meta device: load it first")
        self.table = self.compute(len(self.table), "cpu").to(device, self.table.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Positions:
        before = self.table
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:  # a copy from the meta device, of a model whose weights were set one by one
            if not (self.is_computed and self.table.is_meta):
                raise
            self.materialize(torch.device("cpu"))
            super()._apply(fn, recurse)
        after = self.table
        has_values = type(after) is Tensor and not after.is_meta  # a fake tensor has none either
        # After a cast or a copy they are those of before. After to_empty the new memory holds anything.
        if self.is_computed and has_values and (before.is_meta or not torch.equal(before.to(after), after)):
            after.copy_(self.compute(len(after), "cpu"))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (table := state_dict.get(prefix + "table")) is not None:
            if table.dim() != 2 or table.shape[1] != self.dim:
                raise ValueError(f"{prefix}table must be (tokens, {self.dim}), got {tuple(table.shape)}")
            self.register_buffer("table", torch.empty_like(table, device=self.table.device), persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _SelectRows(torch.autograd.Function):
    """Rows (M, D) of (N, D) by an index without repeats: the gradient is a store, not an addition.

    An index of N means no row: it returns some row, which gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index.clamp(max=ctx.num_rows - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows + 1, grad.shape[1]).index_copy(0, index, grad)[: ctx.num_rows], None


class Layer(nn.Module):
    """Weights and blocks of a transformer layer over packed rows: attention within each clip, exact GELU.

    The stream is passed twice, as the input of the next branch and as its residual. The values are the same; with two
    tensors the fused backward adds their gradients in the same pass.

    Args:
        dim: Width D.
        config: Heads, feed-forward width, dropout rates, pre-norm or post-norm.
        dropout_site: Number of the layer's first dropout in the model; it has ``SITES_PER_LAYER``.
    """

    def __init__(self, dim: int, config: MAEASTConfig | SSASTConfig, dropout_site: int) -> None:
        super().__init__()
        self.config, self.dropout_site = config, dropout_site
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attn_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, residual: Tensor, packing: Packing, cfg: ExecConfig, *, query_rows: QueryRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (x, residual): the same values as two tensors, so that the fused backward can add their gradients.

        Args:
            x: (N, D) stream, input of the branches.
            residual: (N, D) stream, for the residual connections.
            packing: Packing of the N rows.
            cfg: Implementation, attention backend and dropout seed of this forward pass.
            query_rows: The M rows whose output is computed: the result is (M, D) twice, and exact. None: all N.
        """
        raise NotImplementedError

    def attend(
        self,
        x: Tensor,
        packing: Packing,
        cfg: ExecConfig,
        *,
        queries: Tensor | None = None,
        query_rows: QueryRows | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention and its output projection; returns the same as ``linear_without_bias``.

        Args:
            x: (N, D).
            packing: Packing of the N rows.
            cfg: Attention backend and dropout seed.
            queries: (M, D) rows ``x[query_rows.indices]``; None: all of ``x``.
            query_rows: Given together with ``queries``.
        """
        dropout = self.config.attention_dropout if self.training else 0.0
        if queries is None or query_rows is None:
            out = attention(
                linear(x, self.qkv).unflatten(1, (3, self.config.num_heads, -1)),
                packing.cu_seqlens,
                packing.max_seqlen,
                dropout=dropout,
                backend=cfg.attention,
                seed=cfg.seed,
                site=self.dropout_site + DropoutSite.ATTENTION,
                exact=not packing.has_padding_rows,
            )
        else:
            q, kv = self.project_queries(x, queries, query_rows.indices)
            out = cross_attention(
                q,
                kv,
                cu_q=query_rows.packing.cu_seqlens,
                max_q=query_rows.packing.max_seqlen,
                cu_kv=packing.cu_seqlens,
                max_kv=packing.max_seqlen,
                dropout=dropout,
                backend=cfg.attention,
                exact=not packing.has_padding_rows,
            )
        return linear_without_bias(out.flatten(1), self.out_proj)

    def project_queries(self, x: Tensor, queries: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (M, H, Dh) of ``queries`` (M, D), the rows ``x[indices]``; keys and values (N, 2, H, Dh)."""
        width, heads = x.shape[1], self.config.num_heads
        if is_plain(nn.Linear, self.qkv):
            weight, bias = self.qkv.weight.to(x.dtype), self.qkv.bias.to(x.dtype)
            q, kv = F.linear(queries, weight[:width], bias[:width]), F.linear(x, weight[width:], bias[width:])
        else:
            q, kv = linear(x, self.qkv).split([width, 2 * width], dim=1)
            q = _SelectRows.apply(q, indices)
        return q.unflatten(1, (heads, -1)), kv.unflatten(1, (2, heads, -1))

    def feed_forward(self, x: Tensor, cfg: ExecConfig) -> tuple[Tensor, Tensor | None]:
        """Linear, GELU, dropout, Linear (N, D); returns the same as ``linear_without_bias`` for the last Linear."""
        rate = self.config.activation_dropout if self.training else 0.0
        if rate == 0.0 and is_plain(nn.Linear, self.fc1, self.fc2):
            out = ops.feed_forward(
                x,
                self.fc1.weight,
                self.fc1.bias,
                self.fc2.weight,
                recompute=cfg.recompute == "gelu",
                impl=cfg.impl,
            )
            return out, self.fc2.bias
        h, fc1_bias = linear_without_bias(x, self.fc1)
        bias = h.new_zeros(h.shape[1]) if fc1_bias is None else fc1_bias

        def activate(h: Tensor) -> tuple[Tensor, Tensor | None]:
            activation = ops.bias_gelu(
                h,
                bias,
                dropout=rate,
                seed=cfg.seed,
                site=self.dropout_site + DropoutSite.ACTIVATION,
                impl=cfg.impl,
            )
            return linear_without_bias(activation, self.fc2)

        if cfg.recompute == "gelu" and torch.is_grad_enabled():
            return checkpoint(activate, h, use_reentrant=False)
        return activate(h)


class PreNormLayer(Layer):
    """x = x + attention(norm(x)), then x = x + feed_forward(norm(x))."""

    def forward(
        self, x: Tensor, residual: Tensor, packing: Packing, cfg: ExecConfig, *, query_rows: QueryRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``Layer.forward``."""
        rate = self.config.dropout if self.training else 0.0
        if query_rows is not None:
            residual = _SelectRows.apply(residual, query_rows.indices)
        y = norm(x, self.attn_norm)
        queries = None if query_rows is None else _SelectRows.apply(y, query_rows.indices)
        branch, bias = self.attend(y, packing, cfg, queries=queries, query_rows=query_rows)
        x = residual + drop(add_bias(branch, bias), rate)
        branch, bias = self.feed_forward(norm(x, self.ffn_norm), cfg)
        x = x + drop(add_bias(branch, bias), rate)
        return x, x


class PostNormLayer(Layer):
    """x = norm(x + attention(x)), then x = norm(x + feed_forward(x)); the paper's layer."""

    def forward(
        self, x: Tensor, residual: Tensor, packing: Packing, cfg: ExecConfig, *, query_rows: QueryRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``Layer.forward``."""
        queries = None
        if query_rows is not None:
            queries = residual = _SelectRows.apply(residual, query_rows.indices)
        branch, bias = self.attend(x, packing, cfg, queries=queries, query_rows=query_rows)
        x, residual = self._add_norm(
            branch, bias, residual, layer_norm=self.attn_norm, dropout_site=DropoutSite.ATTENTION_BRANCH, cfg=cfg
        )
        branch, bias = self.feed_forward(x, cfg)
        return self._add_norm(
            branch, bias, residual, layer_norm=self.ffn_norm, dropout_site=DropoutSite.FEED_FORWARD_BRANCH, cfg=cfg
        )

    def _add_norm(
        self,
        branch: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        *,
        layer_norm: nn.Module,
        dropout_site: DropoutSite,
        cfg: ExecConfig,
    ) -> tuple[Tensor, Tensor]:
        """``add_norm`` with this layer's dropout; returns the result twice."""
        return add_norm(
            branch,
            bias,
            residual,
            layer_norm,
            dropout=self.config.dropout if self.training else 0.0,
            dropout_site=self.dropout_site + dropout_site,
            cfg=cfg,
            return_residual=True,
        )


class TransformerStack(nn.Module):
    """Stack of transformer layers. Post-norm: LayerNorm before the first layer; pre-norm: after the last one.

    In post-norm the caller applies ``norm`` (the stem norm) before the stack, and in both the dropout on its input, so
    that it can fuse them with the operation before.

    Args:
        dim: Width D.
        num_layers: Number of layers.
        config: As in ``Layer``.
        layerdrop: Probability in [0, 1) that a layer is skipped in training.
        dropout_site: Number of the stack's first dropout in the model; it has ``SITES_PER_LAYER`` per layer.
    """

    def __init__(
        self, dim: int, num_layers: int, config: MAEASTConfig | SSASTConfig, *, layerdrop: float, dropout_site: int
    ) -> None:
        super().__init__()
        self.layerdrop, self.norm_first = layerdrop, config.norm_first
        self.norm = nn.LayerNorm(dim)
        layer_class = PreNormLayer if config.norm_first else PostNormLayer
        self.layers = nn.ModuleList(
            layer_class(dim, config, dropout_site + SITES_PER_LAYER * index) for index in range(num_layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        cfg: ExecConfig,
        *,
        layer: int | None = None,
        query_rows: QueryRows | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the output (N, D) and the output (N, D) of each layer.

        Args:
            x: (N, D).
            packing: Packing of the N rows.
            cfg: Implementation, attention backend and dropout seed of this forward pass.
            layer: Last layer to run, counted from 1. None: all.
            query_rows: The M rows whose output is wanted: the last layer computes no others and returns (M, D).
        """
        states = []
        residual = x
        for index, block in enumerate(self.layers[:layer]):
            block_queries = query_rows if index + 1 == len(self.layers) else None
            if cfg.recompute == "layer" and torch.is_grad_enabled():
                y, y_residual = checkpoint(
                    block, x, residual, packing, cfg, query_rows=block_queries, use_reentrant=False
                )
            else:
                y, y_residual = block(x, residual, packing, cfg, query_rows=block_queries)
            if self.training and self.layerdrop > 0.0:
                # A select, not a branch: every parameter is always used, and nothing waits for the device.
                skipped = x if block_queries is None else _SelectRows.apply(x, block_queries.indices)
                y = y_residual = torch.where(torch.rand((), device=x.device) < self.layerdrop, skipped, y)
            x, residual = y, y_residual
            states.append(x)
        if self.norm_first and layer is None:
            x = norm(x, self.norm)
        return x, states


def sinusoid(num_tokens: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed sinusoidal positions (num_tokens, dim) in fp32: sine in the even columns, cosine in the odd ones.

    Computed in fp32 throughout, as in the paper's code, so that a table from its checkpoints compares equal.

    Args:
        num_tokens: Rows of the table.
        dim: Width D, even.
        device: Device of the table; None: torch's default.
    """
    position = torch.arange(num_tokens, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def sinusoid_2d(num_tokens: int, dim: int, grid_f: int, device: torch.device | str | None = None) -> Tensor:
    """Positions (num_tokens, dim) in fp32 of tokens on a grid, time before frequency.

    The first half of the columns is ``sinusoid`` of the time block, the second half that of the frequency block. With
    one frequency block the table is ``sinusoid`` by token.

    Args:
        num_tokens: Rows of the table.
        dim: Width D, a multiple of 4; even with one frequency block.
        grid_f: Frequency blocks, at least 1.
        device: Device of the table; None: torch's default.
    """
    if grid_f == 1:
        return sinusoid(num_tokens, dim, device)
    grid_t = -(-num_tokens // grid_f)
    time = sinusoid(grid_t, dim // 2, device)[:, None].expand(-1, grid_f, -1)
    frequency = sinusoid(grid_f, dim // 2, device).expand(grid_t, -1, -1)
    return torch.cat((time, frequency), 2).flatten(0, 1)[:num_tokens]
