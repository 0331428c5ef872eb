"""y = GELU(x W1^T + b1) W2^T, the exact GELU: h = x W1^T, z = h + b1, a = z * Phi(z), y = a W2^T.

    da = dy W2,  dh = da * (Phi(z) + z * phi(z)),  phi(z) = exp(-z^2 / 2) / sqrt(2 pi),  db1 = column sums of dh
    dW2 = dy^T a,  dW1 = dh^T x,  dx = dh W1

Letters: N packed rows, D width, F hidden width, K values summed per output. A program works on tiles of BM x BN
outputs and sums BK values per step. There are two epilogues, each of a product over K = D with F outputs. The forward
one applies GELU to the first Linear and stores h and a. The backward one applies GELU's derivative to the data gradient
of the second Linear; it stores dh and the column sums of each tile. h is rounded to the dtype of x before the GELU:
forward and backward start from the same number, and a equals bias_gelu(h) to the bit. All other products are PyTorch's.

An epilogue runs only where it was measured and fast enough (``configs.epilogue``), decided separately for forward and
backward. Elsewhere PyTorch's product is followed by the kernels of bias_gelu.

Saved for the backward: x, h, the weights and a; with ``recompute`` not a, which costs one more pass over h in the
backward. Memory traffic besides operands of products: forward 2 (N, F) tensors where a product and bias_gelu move 3,
backward 2 instead of 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import bias_gelu
from .common.case import Draw, Mutant, OpCase
from .common.configs import epilogue, launches
from .common.launch import architecture, cdiv, dense, has_data, launch, options, unit_stride
from .common.triton_op import triton_op

GROUP = 8  # row blocks whose tiles run one after the other
_NO_DROPOUT: dict[str, Any] = {"seed": None, "dropout": 0.0, "dropout_site": 0}


@triton.jit
def _tile_blocks(tile, N, OUTPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row block and column block of a tile: GROUP row blocks share the cache as they go through the columns."""
    col_blocks: tl.constexpr = (OUTPUTS + BN - 1) // BN
    first_row_block = tile // (GROUP * col_blocks) * GROUP
    group_size = tl.minimum(tl.cdiv(N, BM) - first_row_block, GROUP)
    index_in_group = tile % (GROUP * col_blocks)
    return first_row_block + index_in_group % group_size, index_in_group // group_size


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
    """A tile of x (N, K) times w (K, OUTPUTS) in fp32; with TRANSPOSED w is stored as (OUTPUTS, K)."""
    total = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    x_row = x_ptr + row[:, None].to(tl.int64) * stride_x
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_inside, w_inside = (row < N)[:, None], (col < OUTPUTS)[None, :]
        if K % BK:
            x_inside, w_inside = x_inside & (k < K)[None, :], w_inside & (k < K)[:, None]
        x = tl.load(x_row + k[None, :], mask=x_inside, other=0.0)
        offset = col[None, :] * K + k[:, None] if TRANSPOSED else k[:, None] * OUTPUTS + col[None, :]
        total = tl.dot(x, tl.load(w_ptr + offset, mask=w_inside, other=0.0), total, input_precision="ieee")
    return total


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _slices(x, BS: tl.constexpr):
    """Split x into 1, 2 or 4 column slices, of at most BS columns if 4 suffice.

    An epilogue at full width needs too many registers.
    """
    if x.shape[1] <= BS:
        return (x,)
    else:
        left, right = _halves(x)
        if left.shape[1] <= BS:
            return (left, right)
        else:
            left_0, left_1 = _halves(left)
            right_0, right_1 = _halves(right)
            return (left_0, left_1, right_0, right_1)


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
        row_block, col_block = _tile_blocks(tile, N, OUTPUTS=OUTPUTS, BM=BM, BN=BN, GROUP=GROUP)
        row = row_block * BM + tl.arange(0, BM)
        tile_col = col_block * BN + tl.arange(0, BN)
        total = _product(
            x_ptr, w_ptr, row, tile_col, N=N, stride_x=stride_x, K=K, OUTPUTS=OUTPUTS, BK=BK, TRANSPOSED=True
        )
        tile_start = row_block.to(tl.int64) * BM * OUTPUTS
        slices = _slices(total.to(h_ptr.dtype.element_ty), BS)
        for index in tl.static_range(len(slices)):
            h = slices[index]
            col = col_block * BN + index * h.shape[1] + tl.arange(0, h.shape[1])
            inside = (row < N)[:, None] & (col < OUTPUTS)[None, :]
            offset = tl.arange(0, BM)[:, None] * OUTPUTS + col[None, :]
            tl.store(h_ptr + tile_start + offset, h, mask=inside)
            z = h.to(tl.float32) + tl.load(bias_ptr + col, mask=col < OUTPUTS, other=0.0).to(tl.float32)[None, :]
            a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
            tl.store(a_ptr + tile_start + offset, a.to(a_ptr.dtype.element_ty), mask=inside)


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
        row_block, col_block = _tile_blocks(tile, N, OUTPUTS=OUTPUTS, BM=BM, BN=BN, GROUP=GROUP)
        row = row_block * BM + tl.arange(0, BM)
        tile_col = col_block * BN + tl.arange(0, BN)
        total = _product(
            dy_ptr, w_ptr, row, tile_col, N=N, stride_x=stride_dy, K=K, OUTPUTS=OUTPUTS, BK=BK, TRANSPOSED=False
        )
        tile_start = row_block.to(tl.int64) * BM * OUTPUTS
        slices = _slices(total, BS)
        for index in tl.static_range(len(slices)):
            dh = slices[index]
            col = col_block * BN + index * dh.shape[1] + tl.arange(0, dh.shape[1])
            inside = (row < N)[:, None] & (col < OUTPUTS)[None, :]
            offset = tl.arange(0, BM)[:, None] * OUTPUTS + col[None, :]
            z = tl.load(h_ptr + tile_start + offset, mask=inside, other=0.0).to(tl.float32)
            z += tl.load(bias_ptr + col, mask=col < OUTPUTS, other=0.0).to(tl.float32)[None, :]
            dh *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
            tl.store(dh_ptr + tile_start + offset, dh.to(dh_ptr.dtype.element_ty), mask=inside)
            # In rows past the last one, dh is 0 times a finite slope.
            tl.store(partial_ptr + row_block.to(tl.int64) * OUTPUTS + col, tl.sum(dh, 0), mask=col < OUTPUTS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 3 without a GPU, so that a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _launch(kernel: triton.JITFunction, **values: Any) -> None:
    """Launch a kernel with one program per tile, at most PER_SM programs per multiprocessor."""

    def grid(values: dict[str, Any]) -> tuple[int]:
        num_tiles = cdiv(values["N"], values["BM"]) * cdiv(values["OUTPUTS"], values["BN"])
        return (min(num_tiles, values["PER_SM"] * _multiprocessors(values["w"].device)),)

    launch(kernel, grid, GROUP=GROUP, **values)


# BM x BN: tile of outputs. BK: values summed per step of the product. BS: columns per slice of the epilogue.
# PER_SM: programs per multiprocessor.
_NARROW = {"BM": 128, "BN": 128, "BK": 64, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}
_FP32 = {"BM": 64, "BN": 64, "BK": 16, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}
launches(
    "feed_forward_forward",
    ("gfx942", 1 << 30, 2, _NARROW),
    ("any", 1 << 30, 2, {**_NARROW, "BN": 256}),
    ("any", 1 << 30, 4, _FP32),
)
launches("feed_forward_backward", ("any", 1 << 30, 2, _NARROW), ("any", 1 << 30, 4, _FP32))


def gelu_epilogue(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """h = x W1^T and a = GELU(h + b1), both (N, F) in the common dtype of ``x`` (N, D) and ``w1`` (F, D)."""
    (num_rows, inner), outputs = x.shape, w1.shape[0]
    h, a = (x.new_empty(num_rows, outputs) for _ in range(2))
    _launch(
        _forward,
        launches="feed_forward_forward",
        like=x,
        width=outputs,
        x=unit_stride(x),
        w=dense(w1),
        bias=dense(b1),
        h=h,
        a=a,
        N=num_rows,
        K=inner,
        OUTPUTS=outputs,
    )
    return h, a


def dgelu_epilogue(dy: Tensor, w2: Tensor, h: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h (N, F), in its dtype, and of b1 (F,), in fp32; ``h`` comes from ``gelu_epilogue``."""
    num_rows, outputs = h.shape
    dh = torch.empty_like(h)
    num_row_blocks = cdiv(num_rows, options("feed_forward_backward", dy, outputs)["BM"])
    partial_sums = h.new_empty(num_row_blocks, outputs, dtype=torch.float32)
    _launch(
        _backward,
        launches="feed_forward_backward",
        like=dy,
        width=outputs,
        dy=unit_stride(dy),
        w=dense(w2),
        h=h,
        bias=dense(b1),
        dh=dh,
        partial=partial_sums,
        N=num_rows,
        K=dy.shape[1],
        OUTPUTS=outputs,
    )
    return dh, partial_sums.sum(0)


def _uses_epilogue(kernel: str, x: Tensor, outputs: int) -> bool:
    if not has_data(x):
        return False
    arch, size = architecture(x.device), x.element_size()
    return epilogue(kernel, arch, inner=x.shape[1], outputs=outputs, element_size=size)[0]


@triton_op("feed_forward", outputs=("y", "h", "a"))
def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, D), h and a (N, F); with ``recompute`` an empty tensor instead of a.

    Args:
        x: (N, D) fp32, fp16 or bf16.
        w1: (F, D) in the dtype of ``x``.
        b1: (F,) of any floating dtype.
        w2: (D, F) in the dtype of ``x``.
        recompute: Do not keep a; ``backward`` recomputes it from h.
    """
    if _uses_epilogue("feed_forward_forward", x, w1.shape[0]):
        h, a = gelu_epilogue(x, w1, b1)
    else:
        h = F.linear(x, w1)
        a = bias_gelu.forward(h, b1, **_NO_DROPOUT)
    return F.linear(a, w2), h, x.new_empty(0) if recompute else a


@forward.gradients_of("x", "w1", "b1", "w2")
def backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W1, b1 (in fp32) and W2; ``dy`` (N, D) is the gradient of y, h and a come from ``forward``."""
    if recompute:
        a = bias_gelu.forward(h, b1, **_NO_DROPOUT)
    dw2 = dy.T @ a
    if recompute:
        del a
    if _uses_epilogue("feed_forward_backward", dy, h.shape[1]):
        dh, db1 = dgelu_epilogue(dy, w2, h, b1)
    else:
        dh = dy @ w2
        db1 = bias_gelu.backward_into(dh, dh, h, b1, **_NO_DROPOUT)
    return dh @ w1, dh.T @ x, db1, dw2


WIDTHS = (768, 1536, 3072)  # ffn_dim of the presets, which is four times their width


def _tensors(dtype: torch.dtype, width: int, device: str) -> tuple[Tensor, ...]:
    """x, W1, b1, dy, W2 and h in the model's sizes, scaled so that products are around 1."""
    num_rows, inner = 65536, width // 4
    x, dy, h = (torch.randn(num_rows, size, dtype=dtype, device=device) for size in (inner, inner, width))
    w1, w2 = (
        torch.randn(*shape, dtype=dtype, device=device) / inner**0.5 for shape in ((width, inner), (inner, width))
    )
    return x, w1, torch.randn(width, device=device), dy, w2, h


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    x, w1, b1, dy, w2, h = _tensors(dtype, width, device)
    yield "forward", x.shape[0], lambda: gelu_epilogue(x, w1, b1)
    yield "backward", x.shape[0], lambda: dgelu_epilogue(dy, w2, h, b1)


def baselines(
    dtype: torch.dtype, width: int, device: str
) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object], Callable[[], object]]]:
    """(name in the table, K, epilogue, bare product, product followed by bias_gelu) per direction, for ``tune``."""
    x, w1, b1, dy, w2, h = _tensors(dtype, width, device)
    yield (
        "feed_forward_forward",
        x.shape[1],
        lambda: gelu_epilogue(x, w1, b1),
        lambda: F.linear(x, w1),
        lambda: bias_gelu.forward(F.linear(x, w1), b1, **_NO_DROPOUT),
    )
    yield (
        "feed_forward_backward",
        x.shape[1],
        lambda: dgelu_epilogue(dy, w2, h, b1),
        lambda: dy @ w2,
        lambda: bias_gelu.backward(dy @ w2, h, b1, **_NO_DROPOUT),
    )


def _inputs(draw: Draw, shape: tuple[int, int, int]) -> dict[str, Any]:
    """fp32 weights with values of the rows' dtype, because the fp64 run does not round; x W1^T is around 1."""
    num_rows, width, ffn_dim = shape
    weights = {
        "x": draw.rows(num_rows, width),
        "w1": draw.parameters(ffn_dim, width) / ((1 + draw.offset) * width**0.5),
        "b1": draw.parameters(ffn_dim),
        "w2": draw.parameters(width, ffn_dim) / ffn_dim**0.5,
    }
    return {name: x.to(draw.dtype).to(x.dtype) for name, x in weights.items()}


_TILE = {"BM": 16, "BN": 32, "BK": 16, "BS": 16, "PER_SM": 1, "num_warps": 4, "num_stages": 2}


CASE = OpCase(
    name="feed_forward",
    make=_inputs,
    shapes=[(1, 16, 32), (17, 33, 97), (150, 20, 33), (3, 1, 1), (20, 400, 40)],
    empty=[(0, 16, 32)],
    traced=[(19, 24, 40), (35, 24, 40)],
    differentiable=("x", "w1", "b1", "w2"),
    summed=("w1", "b1", "w2"),
    dot=True,
    rows=("x",),
    vectors=("b1",),
    traced_variants=[{}, {"recompute": True}],
    launches={"feed_forward_forward": _TILE, "feed_forward_backward": _TILE},
    # Both epilogues are on at any size, and a program has more than one tile.
    patches={"epilogue": lambda kernel, arch, **sizes: (True, "by a test"), "_multiprocessors": lambda device: 3},
    mutants=(
        Mutant("edge", "index * h.shape[1] + tl.arange", "index * (h.shape[1] - 1) + tl.arange"),
        Mutant("last row", "x_inside, w_inside = (row < N)[", "x_inside, w_inside = (row < N - 1)["),
        Mutant(
            "fp32 cast", 'total, input_precision="ieee")', 'total, input_precision="ieee").to(x.dtype).to(tl.float32)'
        ),
        Mutant("stored h", "_slices(total.to(h_ptr.dtype.element_ty), BS)", "_slices(total, BS)"),
        Mutant("row owner", "partial_ptr + row_block.to(tl.int64)", "partial_ptr + (row_block // 2).to(tl.int64)"),
    ),
)
