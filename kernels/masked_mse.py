"""loss_i = mean_p (prediction_ip - target'_ip)^2: the reconstruction loss of each masked patch.

    target' = target, or with norm_pix_loss (target - mean) / sqrt(var + 1e-6), var unbiased over the row's P values
    d prediction_ip = g_i * 2 / P * (prediction_ip - target'_ip)

Letters: N packed rows, P values in a patch. Fused: the widening to fp32, both statistics of the target, difference,
square and mean; in the backward the same again and the scaling by g. The gradient is not kept from the forward: in half
precision it would be rounded twice (rms error 1.46 times that of one rounding), and a kept tensor costs as many bytes
as reading the two inputs again. Saved: the inputs. Moved: forward 2 (N, P) tensors, backward 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """prediction - target' in fp32, 0 outside: (ROWS, BLOCK_P), and the mask of what is inside."""
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
        prediction_ptr, target_ptr, row, N, stride_prediction, stride_target, eps, P, BLOCK_P, NORM
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
        prediction_ptr, target_ptr, row, N, stride_prediction, stride_target, eps, P, BLOCK_P, NORM
    )
    scale = tl.load(dloss_ptr + row, mask=row < N, other=0.0) * (2.0 / P)
    dprediction = (difference * scale[:, None]).to(dprediction_ptr.dtype.element_ty)
    tl.store(dprediction_ptr + row[:, None] * P + tl.arange(0, BLOCK_P)[None, :], dprediction, mask=inside)


def forward(prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """loss (N,) in fp32."""
    rows, width = prediction.shape
    prediction, target = unit_stride(prediction), unit_stride(target)
    loss = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    chosen = options("masked_mse", prediction, width)
    launch(
        _forward,
        (triton.cdiv(rows, chosen["ROWS"]),),
        prediction,
        target,
        loss,
        rows,
        prediction.stride(0),
        target.stride(0),
        eps,
        P=width,
        BLOCK_P=block(width),
        NORM=norm_pix_loss,
        **chosen,
    )
    return loss


def backward(dloss: Tensor, prediction: Tensor, target: Tensor, norm_pix_loss: bool, eps: float) -> Tensor:
    """Gradient of prediction (N, P) in its dtype, from dloss (N,) in fp32."""
    rows, width = prediction.shape
    dloss, prediction, target = dloss.contiguous(), unit_stride(prediction), unit_stride(target)
    dprediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    chosen = options("masked_mse", prediction, width)
    launch(
        _backward,
        (triton.cdiv(rows, chosen["ROWS"]),),
        dloss,
        prediction,
        target,
        dprediction,
        rows,
        prediction.stride(0),
        target.stride(0),
        eps,
        P=width,
        BLOCK_P=block(width),
        NORM=norm_pix_loss,
        **chosen,
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
    return backward_op(dloss, *ctx.saved_tensors, ctx.norm_pix_loss, ctx.eps), None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool) -> Tensor:
    """loss (N,) in fp32; the target gets no gradient."""
    return forward_op(prediction, target, norm_pix_loss, 1e-6)


WIDTHS = (256,)  # of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    rows = 65536
    prediction = torch.randn(rows, 2 * width, dtype=dtype, device=device)[:, :width]  # half of the joint head
    target, dloss = torch.randn(rows, width, dtype=dtype, device=device), torch.ones(rows, device=device)
    for norm in (False, True):
        label = "norm_pix" if norm else ""
        yield f"forward {label}", rows, lambda n=norm: forward(prediction, target, n, 1e-6)
        yield f"backward {label}", rows, lambda n=norm: backward(dloss, prediction, target, n, 1e-6)
