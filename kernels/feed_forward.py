"""y = GELU(x W1^T + b1) W2^T, the exact GELU: h = x W1^T, z = h + b1, a = z * Phi(z), y = a W2^T.

    da = dy W2,  dh = da * (Phi(z) + z * phi(z)),  phi(z) = exp(-z^2 / 2) / sqrt(2 pi),  db1 = column sums of dh
    dW2 = dy^T a,  dW1 = dh^T x,  dx = dh W1

Letters: N packed rows, D width, F hidden width, K what a product sums over; a program works on tiles of BM x BN
outputs, BK of K at a time. Two epilogues, each of a product over K = D with F outputs: GELU on the first Linear,
which stores h and a; GELU's derivative on the data gradient of the second one, which stores dh and, for each tile,
its column sums. h is rounded to the stream's dtype before the GELU: forward and backward start from the same number,
and a equals what bias_gelu makes of h to the bit. All other products are PyTorch's.

An epilogue runs only where the table says that it was measured and fast enough (``table.epilogue``), forward and
backward each for itself; elsewhere PyTorch's product and the kernels of bias_gelu do the same work one after the other.

Saved: x, h, the weights, and a, or with ``recompute`` not a, which then is one more pass over h in the backward. Moved
beside operands of products: forward 2 (N, F) tensors where a product and bias_gelu move 3, backward 2 in place of 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import bias_gelu
from .common.configs import epilogue
from .common.launch import architecture, dense, launch, options, unit_stride

GROUP = 8  # row blocks whose tiles are neighbours in time


@triton.jit
def _place(tile, N, OUTPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row block and column block of a tile: GROUP row blocks go through the columns together, and share the cache."""
    across: tl.constexpr = (OUTPUTS + BN - 1) // BN
    first = tile // (GROUP * across) * GROUP
    high = tl.minimum(tl.cdiv(N, BM) - first, GROUP)
    within = tile % (GROUP * across)
    return first + within % high, within // high


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    row,
    col,
    N,
    stride_x,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile of x (N, K) times w (K, OUTPUTS), with TRANSPOSED w^T (OUTPUTS, K), in fp32."""
    total = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    x_row = x_ptr + row[:, None].to(tl.int64) * stride_x
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_inside, w_inside = (row < N)[:, None], (col < OUTPUTS)[None, :]
        if K % BK:
            x_inside, w_inside = x_inside & (k < K)[None, :], w_inside & (k < K)[:, None]
        x = tl.load(x_row + k[None, :], mask=x_inside, other=0.0)
        place = col[None, :] * K + k[:, None] if TRANSPOSED else k[:, None] * OUTPUTS + col[None, :]
        total = tl.dot(x, tl.load(w_ptr + place, mask=w_inside, other=0.0), total, input_precision="ieee")
    return total


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _slices(x, BS: tl.constexpr):
    """Side by side, of BS columns where four suffice: an epilogue at full width takes too many registers."""
    if x.shape[1] <= BS:
        parts = (x,)
    else:
        left, right = _halves(x)
        if left.shape[1] <= BS:
            parts = (left, right)
        else:
            one, two = _halves(left)
            three, four = _halves(right)
            parts = (one, two, three, four)
    return parts


@triton.jit(do_not_specialize=["N"])
def _forward(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    a_ptr,
    N,
    stride_x,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    GROUP: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(N, BM) * tl.cdiv(OUTPUTS, BN), tl.num_programs(0)):
        down, across = _place(tile, N, OUTPUTS, BM, BN, GROUP)
        row = down * BM + tl.arange(0, BM)
        total = _product(x_ptr, w_ptr, row, across * BN + tl.arange(0, BN), N, stride_x, K, OUTPUTS, BK, True)
        first = down.to(tl.int64) * BM * OUTPUTS
        parts = _slices(total.to(h_ptr.dtype.element_ty), BS)
        for index in tl.static_range(len(parts)):
            h = parts[index]
            col = across * BN + index * h.shape[1] + tl.arange(0, h.shape[1])
            inside = (row < N)[:, None] & (col < OUTPUTS)[None, :]
            place = tl.arange(0, BM)[:, None] * OUTPUTS + col[None, :]
            tl.store(h_ptr + first + place, h, mask=inside)
            z = h.to(tl.float32) + tl.load(bias_ptr + col, mask=col < OUTPUTS, other=0.0).to(tl.float32)[None, :]
            a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
            tl.store(a_ptr + first + place, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward(
    dy_ptr,
    w_ptr,
    h_ptr,
    bias_ptr,
    dh_ptr,
    partial_ptr,
    N,
    stride_dy,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    GROUP: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(N, BM) * tl.cdiv(OUTPUTS, BN), tl.num_programs(0)):
        down, across = _place(tile, N, OUTPUTS, BM, BN, GROUP)
        row = down * BM + tl.arange(0, BM)
        total = _product(dy_ptr, w_ptr, row, across * BN + tl.arange(0, BN), N, stride_dy, K, OUTPUTS, BK, False)
        first = down.to(tl.int64) * BM * OUTPUTS
        parts = _slices(total, BS)
        for index in tl.static_range(len(parts)):
            dh = parts[index]
            col = across * BN + index * dh.shape[1] + tl.arange(0, dh.shape[1])
            inside = (row < N)[:, None] & (col < OUTPUTS)[None, :]
            place = tl.arange(0, BM)[:, None] * OUTPUTS + col[None, :]
            z = tl.load(h_ptr + first + place, mask=inside, other=0.0).to(tl.float32)
            z += tl.load(bias_ptr + col, mask=col < OUTPUTS, other=0.0).to(tl.float32)[None, :]
            dh *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
            tl.store(dh_ptr + first + place, dh.to(dh_ptr.dtype.element_ty), mask=inside)
            # Rows past the last are 0 times a finite slope.
            tl.store(partial_ptr + down.to(tl.int64) * OUTPUTS + col, tl.sum(dh, 0), mask=col < OUTPUTS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; three where there is none, so that a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _grid(rows: int, outputs: int, programs: int, chosen: dict[str, int], device: torch.device) -> tuple[int]:
    tiles = triton.cdiv(rows, chosen["BM"]) * triton.cdiv(outputs, chosen["BN"])
    return (min(tiles, programs * _multiprocessors(device)),)


def gelu_epilogue(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """h = x W1^T and a = GELU(h + b1), (N, F) in the dtype of x and W1."""
    rows, outputs = x.shape[0], w1.shape[0]
    x, (w1, b1) = unit_stride(x), dense(w1, b1)
    h, a = (x.new_empty(rows, outputs) for _ in range(2))
    chosen = dict(options("feed_forward_forward", x, outputs))
    grid = _grid(rows, outputs, chosen.pop("PER_SM"), chosen, x.device)
    shape = {"K": x.shape[1], "OUTPUTS": outputs, "GROUP": GROUP, **chosen}
    launch(_forward, grid, x, w1, b1, h, a, rows, x.stride(0), **shape)
    return h, a


def dgelu_epilogue(dy: Tensor, w2: Tensor, h: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h (N, F), in its dtype, and of b1 (F,), in fp32; h as ``gelu_epilogue`` leaves it."""
    rows, outputs = h.shape
    dy, (w2, b1) = unit_stride(dy), dense(w2, b1)
    dh = torch.empty_like(h)
    chosen = dict(options("feed_forward_backward", dy, outputs))
    partial = h.new_empty(triton.cdiv(rows, chosen["BM"]), outputs, dtype=torch.float32)
    grid = _grid(rows, outputs, chosen.pop("PER_SM"), chosen, dy.device)
    shape = {"K": dy.shape[1], "OUTPUTS": outputs, "GROUP": GROUP, **chosen}
    launch(_backward, grid, dy, w2, h, b1, dh, partial, rows, dy.stride(0), **shape)
    return dh, partial.sum(0)


def _on(kernel: str, x: Tensor, outputs: int) -> bool:
    return epilogue(kernel, architecture(x.device), x.shape[1], outputs, x.element_size())[0]


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, D), h and a (N, F); with ``recompute`` an empty tensor in place of a."""
    if _on("feed_forward_forward", x, w1.shape[0]):
        h, a = gelu_epilogue(x, w1, b1)
    else:
        h = F.linear(x, w1)
        a = bias_gelu.forward(h, b1, None, 0.0, 0)
    return F.linear(a, w2), h, x.new_empty(0) if recompute else a


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W1, b1 (in fp32) and W2."""
    if recompute:
        a = bias_gelu.forward(h, b1, None, 0.0, 0)
    dw2 = dy.T @ a
    if recompute:
        del a
    if _on("feed_forward_backward", dy, h.shape[1]):
        dh, db1 = dgelu_epilogue(dy, w2, h, b1)
    else:
        da = dy @ w2
        dh, db1 = bias_gelu.backward_into(da, da, h, b1, None, 0.0, 0)
    return dh @ w1, dh.T @ x, db1, dw2


forward_op = torch.library.custom_op("mae_ast_fast::feed_forward", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::feed_forward_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x, w1, b1, w2, recompute):
    h = x.new_empty(x.shape[0], w1.shape[0])
    return x.new_empty(x.shape[0], w2.shape[0]), h, x.new_empty(0) if recompute else torch.empty_like(h)


@backward_op.register_fake
def _(dy, x, w1, b1, w2, h, a, recompute):
    db1 = x.new_empty(w1.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), w1.new_empty(w1.shape), db1, w2.new_empty(w2.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, w1, b1, w2, ctx.recompute = inputs
    _, h, a = output
    ctx.mark_non_differentiable(h, a)
    ctx.save_for_backward(x, w1, b1, w2, h, a)


def _gradients(ctx, dy, *_):
    x, w1, b1, *others = ctx.saved_tensors
    dx, dw1, db1, dw2 = backward_op(dy, x, w1, b1, *others, ctx.recompute)
    return dx, dw1, db1.to(b1.dtype), dw2, None


forward_op.register_autograd(_gradients, setup_context=_save)


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, recompute: bool) -> Tensor:
    """y (N, D) in the dtype of x, to which the weights are cast; their gradients come back through the cast."""
    return forward_op(x, w1.to(x.dtype), b1, w2.to(x.dtype), recompute)[0]


WIDTHS = (768, 1536, 3072)  # ffn_dim of the presets, whose width is a quarter of it


def _tensors(dtype: torch.dtype, width: int, device: str) -> tuple[Tensor, ...]:
    """x, W1, b1, dy, W2, h: of the model's sizes, weights such that products are around 1."""
    rows, inner = 65536, width // 4
    x, dy, h = (torch.randn(rows, size, dtype=dtype, device=device) for size in (inner, inner, width))
    w1, w2 = (
        torch.randn(*shape, dtype=dtype, device=device) / inner**0.5 for shape in ((width, inner), (inner, width))
    )
    return x, w1, torch.randn(width, device=device), dy, w2, h


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    x, w1, b1, dy, w2, h = _tensors(dtype, width, device)
    yield "forward", x.shape[0], lambda: gelu_epilogue(x, w1, b1)
    yield "backward", x.shape[0], lambda: dgelu_epilogue(dy, w2, h, b1)


def baselines(
    dtype: torch.dtype, width: int, device: str
) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object], Callable[[], object]]]:
    """(name in the table, K, epilogue, bare product, product and bias_gelu one after the other): for ``tune``."""
    x, w1, b1, dy, w2, h = _tensors(dtype, width, device)
    yield (
        "feed_forward_forward",
        x.shape[1],
        lambda: gelu_epilogue(x, w1, b1),
        lambda: F.linear(x, w1),
        lambda: bias_gelu.forward(F.linear(x, w1), b1, None, 0.0, 0),
    )
    yield (
        "feed_forward_backward",
        x.shape[1],
        lambda: dgelu_epilogue(dy, w2, h, b1),
        lambda: dy @ w2,
        lambda: bias_gelu.backward(dy @ w2, h, b1, None, 0.0, 0),
    )
