"""out[n] = (patch of clip[n] at token[n] - mean) * scale: packed rows of normalised patches of a spectrogram.

    token = t_block * grid_f + f_block, grid_f = F // kf
    out[n, t * kf + f] = (x[clip, t_block * kt + t, f_block * kf + f] - mean) * scale
    dx[clip, t_block * kt + t, f_block * kf + f] = dout[n, t * kf + f] * scale, 0 where no row has the patch

Letters: B clips, T frames, F mel bins, kt x kf patch of P = kt * kf values, N packed rows. Fused: cutting into patches,
the gather, the normalisation and the cast; mean and scale are read on the device. Moved: the patches asked for, in and
out once (unfused: all of the spectrogram in and out for the patches, then N rows twice more). The features may have any
strides: a tile keeps its (t, f) axes apart, so that the compiler reads along whichever is dense in memory and writes
along f. Each (clip, token) stands in at most one row, which therefore owns its place in dx: a store, no addition.

Index values are not checked: every clip must be in [0, B) and every token in [0, (T // kt) * grid_f).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import launch, options


@triton.jit
def _place(
    clip_ptr,
    token_ptr,
    N,
    grid_f,
    stride_clip,
    stride_token,
    stride_xb,
    stride_xt,
    stride_xf,
    KT: tl.constexpr,
    KF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of this program's tile (ROWS, BLOCK_T, BLOCK_F): offsets in the spectrogram, in the packed rows, and the mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    clip = tl.load(clip_ptr + row * stride_clip, mask=row < N, other=0)
    token = tl.load(token_ptr + row * stride_token, mask=row < N, other=0).to(tl.int32)  # a 64-bit division is slow
    frame = (token // grid_f).to(tl.int64) * KT
    mel_bin = (token % grid_f).to(tl.int64) * KF
    t = tl.arange(0, BLOCK_T)[None, :, None]
    f = tl.arange(0, BLOCK_F)[None, None, :]
    first = clip * stride_xb + frame * stride_xt + mel_bin * stride_xf  # (ROWS,)
    source = first[:, None, None] + t.to(tl.int64) * stride_xt + f.to(tl.int64) * stride_xf
    packed = row[:, None, None] * (KT * KF) + t * KF + f
    return source, packed, (row < N)[:, None, None] & (t < KT) & (f < KF)


@triton.jit(do_not_specialize=["N", "grid_f"])
def _forward(
    x_ptr,
    mean_ptr,
    scale_ptr,
    clip_ptr,
    token_ptr,
    out_ptr,
    N,
    grid_f,
    stride_clip,
    stride_token,
    stride_xb,
    stride_xt,
    stride_xf,
    KT: tl.constexpr,
    KF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    source, packed, inside = _place(
        clip_ptr,
        token_ptr,
        N,
        grid_f,
        stride_clip,
        stride_token,
        stride_xb,
        stride_xt,
        stride_xf,
        KT,
        KF,
        BLOCK_T,
        BLOCK_F,
        ROWS,
    )
    mean = tl.load(mean_ptr).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + packed, ((x - mean) * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "grid_f"])
def _backward(
    dout_ptr,
    scale_ptr,
    clip_ptr,
    token_ptr,
    dx_ptr,
    N,
    grid_f,
    stride_clip,
    stride_token,
    stride_xb,
    stride_xt,
    stride_xf,
    KT: tl.constexpr,
    KF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    place, packed, inside = _place(
        clip_ptr,
        token_ptr,
        N,
        grid_f,
        stride_clip,
        stride_token,
        stride_xb,
        stride_xt,
        stride_xf,
        KT,
        KF,
        BLOCK_T,
        BLOCK_F,
        ROWS,
    )
    scale = tl.load(scale_ptr).to(tl.float32)
    dout = tl.load(dout_ptr + packed, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, (dout * scale).to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: triton.JITFunction, x: Tensor, clip: Tensor, token: Tensor, kt: int, kf: int, *tensors: Tensor):
    """Either kernel; ``tensors`` are its pointers, ``x`` (B, T, F) the spectrogram or its gradient."""
    chosen = options("gather_patches", x, kt * kf)
    launch(
        kernel,
        (triton.cdiv(clip.shape[0], chosen["ROWS"]),),
        *tensors,
        clip.shape[0],
        x.shape[2] // kf,
        clip.stride(0),
        token.stride(0),
        *x.stride(),
        KT=kt,
        KF=kf,
        BLOCK_T=triton.next_power_of_2(kt),
        BLOCK_F=triton.next_power_of_2(kf),
        **chosen,
    )


def forward(
    features: Tensor, mean: Tensor, scale: Tensor, clip: Tensor, token: Tensor, kt: int, kf: int, dtype: torch.dtype
) -> Tensor:
    """Patches (N, kt * kf) in ``dtype``."""
    out = torch.empty(clip.shape[0], kt * kf, dtype=dtype, device=features.device)
    _launch(_forward, features, clip, token, kt, kf, features, mean, scale, clip, token, out)
    return out


def backward(dout: Tensor, features: Tensor, scale: Tensor, clip: Tensor, token: Tensor, kt: int, kf: int) -> Tensor:
    """Gradient of ``features``, of which the shape, dtype and strides count."""
    dx = torch.zeros_like(features)
    _launch(_backward, dx, clip, token, kt, kf, dout.contiguous(), scale, clip, token, dx)
    return dx


forward_op = torch.library.custom_op("mae_ast_fast::gather_patches", forward, mutates_args=())
backward_op = torch.library.custom_op("mae_ast_fast::gather_patches_backward", backward, mutates_args=())


@forward_op.register_fake
def _(features, mean, scale, clip, token, kt, kf, dtype):
    return features.new_empty(clip.shape[0], kt * kf, dtype=dtype)


@backward_op.register_fake
def _(dout, features, scale, clip, token, kt, kf):
    return torch.zeros_like(features)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    features, _, scale, clip, token, ctx.kt, ctx.kf, _ = inputs
    ctx.save_for_backward(features, scale, clip, token)


def _gradients(ctx, dout):
    dfeatures = backward_op(dout, *ctx.saved_tensors, ctx.kt, ctx.kf)
    return dfeatures, None, None, None, None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save)


WIDTHS = (256,)  # P of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, rows, call) of every variant: what ``mae-ast-fast kernels`` compiles (meta) and ``tune`` times (CUDA)."""
    batch, frames, bins = 128, 1024, 128
    rows = batch * frames * bins // width
    scalar, index = torch.ones(1, device=device), torch.arange(rows, device=device)
    clip, token = index // (rows // batch), index % (rows // batch)
    dout = torch.randn(rows, width, dtype=dtype, device=device)
    for stored in dict.fromkeys((torch.float32, dtype)):
        x = torch.randn(batch, frames, bins, dtype=stored, device=device)
        for kt in (2, 16):
            kf = width // kt
            for label, layout, size in (("", x, (kt, kf)), (" transposed", x.transpose(1, 2), (kf, kt))):
                inputs, name = (layout, scalar, scalar, clip, token, *size, dtype), f"{kt}x{kf}{label} from {stored}"
                yield f"forward {name}", rows, lambda inputs=inputs: forward(*inputs)
                yield (
                    f"backward {name}",
                    rows,
                    lambda x=layout, size=size: backward(dout, x, scalar, clip, token, *size),
                )
