"""loss_i = mean_p (prediction_ip - target'_ip)^2: the reconstruction loss of each masked patch.

    target' = target, or with norm_pix_loss (target - mean) / sqrt(var + 1e-6), var unbiased over the row's P values
    d prediction_ip = g_i * 2 / P * (prediction_ip - target'_ip)

Letters: N packed rows, P values per patch, g_i the gradient of loss_i. Fused: the cast to fp32, both statistics of the
target, difference, square and mean; in the backward the same again and the scaling by g. The forward does not store the
gradient: in half precision it would be rounded twice (rms error 1.46 times that of one rounding), and storing it costs
as many bytes as reading the two inputs again. Saved for the backward: the inputs. Memory traffic: forward 2 (N, P)
tensors, backward 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.case import Draw, Integers, Mutant, OpCase
from .common.configs import launches
from .common.launch import launch, tiles, unit_stride
from .common.triton_op import triton_op


@triton.jit
def _difference(
    prediction_ptr,
    target_ptr,
    row,
    N,
    stride_prediction,
    stride_target,
    eps,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NORM: tl.constexpr,
):
    """prediction - target' (ROWS, BLOCK_P) in fp32, 0 outside the tensors, and the mask of the elements inside."""
    col = tl.arange(0, BLOCK_P)
    inside = (row < N)[:, None] & (col < P)[None, :]
    target = tl.load(target_ptr + row[:, None] * stride_target + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(target, 1) / P  # (ROWS,)
        centred = tl.where(inside, target - mean[:, None], 0.0)
        target = centred * tl.rsqrt(tl.sum(centred * centred, 1) / (P - 1) + eps)[:, None]
    prediction = tl.load(prediction_ptr + row[:, None] * stride_prediction + col[None, :], mask=inside, other=0.0)
    return prediction.to(tl.float32) - target, inside


@triton.jit(do_not_specialize=["N"])
def _forward(
    prediction_ptr,
    target_ptr,
    loss_ptr,
    N,
    stride_prediction,
    stride_target,
    eps,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    difference, _ = _difference(
        prediction_ptr,
        target_ptr,
        row,
        N,
        stride_prediction=stride_prediction,
        stride_target=stride_target,
        eps=eps,
        P=P,
        BLOCK_P=BLOCK_P,
        NORM=NORM,
    )
    tl.store(loss_ptr + row, tl.sum(difference * difference, 1) / P, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _backward(
    dloss_ptr,
    prediction_ptr,
    target_ptr,
    dprediction_ptr,
    N,
    stride_prediction,
    stride_target,
    eps,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    difference, inside = _difference(
        prediction_ptr,
        target_ptr,
        row,
        N,
        stride_prediction=stride_prediction,
        stride_target=stride_target,
        eps=eps,
        P=P,
        BLOCK_P=BLOCK_P,
        NORM=NORM,
    )
    scale = tl.load(dloss_ptr + row, mask=row < N, other=0.0) * (2.0 / P)
    dprediction = (difference * scale[:, None]).to(dprediction_ptr.dtype.element_ty)
    tl.store(dprediction_ptr + row[:, None] * P + tl.arange(0, BLOCK_P)[None, :], dprediction, mask=inside)


launches(
    "masked_mse",  # ROWS: rows per tile of a program, forward and backward. One warp per row.
    ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
    ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
    ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
)


@triton_op("masked_mse", outputs=("loss",))
def forward(prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """Compute the loss (N,) in fp32; only the prediction gets a gradient.

    Args:
        prediction: (N, P) fp32, fp16 or bf16.
        target: (N, P) of any floating dtype.
        norm_pix_loss: Normalise every target row by its own mean and unbiased variance.
        eps: Added to the variance.
    """
    num_rows, width = prediction.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=prediction.device)
    launch(
        _forward,
        tiles,
        launches="masked_mse",
        like=prediction,
        width=width,
        prediction=unit_stride(prediction),
        target=unit_stride(target),
        loss=loss,
        N=num_rows,
        eps=eps,
        P=width,
        NORM=norm_pix_loss,
    )
    return loss


@forward.gradients_of("prediction")
def backward(dloss: Tensor, prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """Gradient of prediction (N, P) in its dtype; ``dloss`` (N,) fp32 is the gradient of the loss."""
    num_rows, width = prediction.shape
    dprediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    launch(
        _backward,
        tiles,
        launches="masked_mse",
        like=prediction,
        width=width,
        dloss=dloss.contiguous(),
        prediction=unit_stride(prediction),
        target=unit_stride(target),
        dprediction=dprediction,
        N=num_rows,
        eps=eps,
        P=width,
        NORM=norm_pix_loss,
    )
    return dprediction


WIDTHS = (256,)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    num_rows = 65536
    prediction = torch.randn(num_rows, 2 * width, dtype=dtype, device=device)[:, :width]  # half of the joint head
    target, dloss = torch.randn(num_rows, width, dtype=dtype, device=device), torch.ones(num_rows, device=device)
    for norm in (False, True):
        label = "norm_pix" if norm else ""
        yield f"forward {label}", num_rows, partial(forward, prediction, target, norm_pix_loss=norm, eps=1e-6)
        yield f"backward {label}", num_rows, partial(backward, dloss, prediction, target, norm_pix_loss=norm, eps=1e-6)


def _inputs(draw: Draw, shape: tuple[int, int]) -> dict[str, Any]:
    num_rows, width = shape
    return {"prediction": draw.rows(num_rows, width), "target": draw.rows(num_rows, width)}


CASE = OpCase(
    name="masked_mse",
    make=_inputs,
    shapes=[(1, 16), (5, 48), (9, 33), (130, 256), (4, 2), (3, 1500), (2, 5000)],
    empty=[(0, 16)],
    traced=[(5, 24), (8, 24)],
    random=[Integers(1, 40), Integers(8, 130)],
    num_random=20,
    differentiable=("prediction",),
    dot=True,
    rows=("prediction", "target"),
    variants=[{"norm_pix_loss": False}, {"norm_pix_loss": True}],
    traced_variants=[{"norm_pix_loss": False}, {"norm_pix_loss": True}],
    mutants=(
        Mutant(
            "edge",
            "* ROWS + tl.arange(0, ROWS)\n    difference, _",
            "* (ROWS - 1) + tl.arange(0, ROWS)\n    difference, _",
        ),
        Mutant("last row", "mask=row < N)\n\n\n@triton", "mask=row < N - 1)\n\n\n@triton"),
        Mutant(
            "fp32 cast",
            "prediction.to(tl.float32) - target",
            "(prediction.to(tl.float32) - target).to(prediction.dtype)",
        ),
    ),
)
