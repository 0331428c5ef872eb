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
from .common.launch import block, launch, options, unit_stride


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


def forward(prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """Compute the loss (N,) in fp32.

    Args:
        prediction: (N, P) fp32, fp16 or bf16.
        target: (N, P) of any floating dtype.
        norm_pix_loss: Normalise every target row by its own mean and unbiased variance.
        eps: Added to the variance.
    """
    num_rows, width = prediction.shape
    prediction, target = unit_stride(prediction), unit_stride(target)
    loss = torch.empty(num_rows, dtype=torch.float32, device=prediction.device)
    config = options("masked_mse", prediction, width)
    launch(
        _forward,
        (triton.cdiv(num_rows, config["ROWS"]),),
        prediction,
        target,
        loss,
        num_rows,
        prediction.stride(0),
        target.stride(0),
        eps,
        P=width,
        BLOCK_P=block(width),
        NORM=norm_pix_loss,
        **config,
    )
    return loss


def backward(dloss: Tensor, prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """Gradient of prediction (N, P) in its dtype; ``dloss`` (N,) fp32 is the gradient of the loss."""
    num_rows, width = prediction.shape
    dloss, prediction, target = dloss.contiguous(), unit_stride(prediction), unit_stride(target)
    dprediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    config = options("masked_mse", prediction, width)
    launch(
        _backward,
        (triton.cdiv(num_rows, config["ROWS"]),),
        dloss,
        prediction,
        target,
        dprediction,
        num_rows,
        prediction.stride(0),
        target.stride(0),
        eps,
        P=width,
        BLOCK_P=block(width),
        NORM=norm_pix_loss,
        **config,
    )
    return dprediction


forward_op = torch.library.custom_op("mae_ast_fast::masked_mse", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::masked_mse_backward", backward, mutates_args=())


@forward_op.register_fake
def _(prediction, target, norm_pix_loss, eps):
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32)


@backward_op.register_fake
def _(dloss, prediction, target, norm_pix_loss, eps):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    prediction, target, ctx.norm_pix_loss, ctx.eps = inputs
    ctx.save_for_backward(prediction, target)


def _gradients(ctx, dloss):
    prediction, target = ctx.saved_tensors
    return backward_op(dloss, prediction, target, ctx.norm_pix_loss, ctx.eps), None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool) -> Tensor:
    """The loss (N,) in fp32 with variance eps 1e-6; only the prediction gets a gradient."""
    return forward_op(prediction, target, norm_pix_loss, 1e-6)


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
