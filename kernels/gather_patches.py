"""out[n] = (patch of clip[n] at token[n] - mean) * scale: packed rows of normalised patches of a spectrogram.

    token = t_block * grid_f + f_block, grid_f = F // kf
    out[n, t * kf + f] = (x[clip, t_block * kt + t, f_block * kf + f] - mean) * scale
    dx[clip, t_block * kt + t, f_block * kf + f] = dout[n, t * kf + f] * scale, 0 where no row has the patch

Letters: B clips, T frames, F mel bins, kt x kf patch of P = kt * kf values, N packed rows. Fused: cutting into patches,
the gather, the normalisation and the cast. Mean and scale are read on the device. Memory traffic: the gathered patches,
in and out once (unfused: the whole spectrogram in and out for the patches, then N rows twice more). The log-mel
spectrogram can have any strides: a tile keeps its (t, f) axes separate, so that the compiler reads along the axis that
is dense in memory and writes along f. Each (clip, token) occurs in at most one row, so the backward stores each
gradient without adding.

Index values are not checked: every clip must be in [0, B) and every token in [0, (T // kt) * grid_f).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.case import Draw, Mutant, OpCase
from .common.configs import launches
from .common.launch import launch, tiles
from .common.triton_op import triton_op


@triton.jit
def _tile_offsets(
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
    ROWS: tl.constexpr,
):
    """Offsets of a program's tile (ROWS, KT, KF) in the spectrogram and in the packed rows, and its mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    clip = tl.load(clip_ptr + row * stride_clip, mask=row < N, other=0)
    token = tl.load(token_ptr + row * stride_token, mask=row < N, other=0).to(tl.int32)  # a 64-bit division is slow
    frame = (token // grid_f).to(tl.int64) * KT
    mel_bin = (token % grid_f).to(tl.int64) * KF
    t = tl.arange(0, triton.next_power_of_2(KT))[None, :, None]
    f = tl.arange(0, triton.next_power_of_2(KF))[None, None, :]
    patch_start = clip * stride_xb + frame * stride_xt + mel_bin * stride_xf  # (ROWS,)
    source_offset = patch_start[:, None, None] + t.to(tl.int64) * stride_xt + f.to(tl.int64) * stride_xf
    packed_offset = row[:, None, None] * (KT * KF) + t * KF + f
    return source_offset, packed_offset, (row < N)[:, None, None] & (t < KT) & (f < KF)


@triton.jit(do_not_specialize=["N", "grid_f"])
def _forward(
    log_mel_ptr,
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
    ROWS: tl.constexpr,
):
    source_offset, packed_offset, inside = _tile_offsets(
        clip_ptr,
        token_ptr,
        N,
        grid_f,
        stride_clip=stride_clip,
        stride_token=stride_token,
        stride_xb=stride_xb,
        stride_xt=stride_xt,
        stride_xf=stride_xf,
        KT=KT,
        KF=KF,
        ROWS=ROWS,
    )
    mean = tl.load(mean_ptr).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.load(log_mel_ptr + source_offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + packed_offset, ((x - mean) * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "grid_f"])
def _backward(
    dout_ptr,
    scale_ptr,
    clip_ptr,
    token_ptr,
    dlog_mel_ptr,
    N,
    grid_f,
    stride_clip,
    stride_token,
    stride_xb,
    stride_xt,
    stride_xf,
    KT: tl.constexpr,
    KF: tl.constexpr,
    ROWS: tl.constexpr,
):
    source_offset, packed_offset, inside = _tile_offsets(
        clip_ptr,
        token_ptr,
        N,
        grid_f,
        stride_clip=stride_clip,
        stride_token=stride_token,
        stride_xb=stride_xb,
        stride_xt=stride_xt,
        stride_xf=stride_xf,
        KT=KT,
        KF=KF,
        ROWS=ROWS,
    )
    scale = tl.load(scale_ptr).to(tl.float32)
    dout = tl.load(dout_ptr + packed_offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dlog_mel_ptr + source_offset, (dout * scale).to(dlog_mel_ptr.dtype.element_ty), mask=inside)


launches(
    "gather_patches",  # ROWS: patches per tile of a program, forward and backward. The row width is P.
    ("any", 512, 4, {"ROWS": 4, "num_warps": 4}),
    ("any", 4096, 4, {"ROWS": 1, "num_warps": 8}),
    ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
)


def _launch(kernel: triton.JITFunction, x: Tensor, clip: Tensor, *, kt: int, kf: int, **tensors: Tensor) -> None:
    """Launch either kernel; ``x`` (B, T, F) is the spectrogram or its gradient, ``tensors`` are the other ones."""
    launch(
        kernel,
        tiles,
        launches="gather_patches",
        like=x,
        width=kt * kf,
        clip=clip,
        N=clip.shape[0],
        grid_f=x.shape[2] // kf,
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        stride_xf=x.stride(2),
        KT=kt,
        KF=kf,
        **tensors,
    )


@triton_op("gather_patches", outputs=("out",))
def forward(
    log_mel: Tensor, mean: Tensor, scale: Tensor, clip: Tensor, token: Tensor, kt: int, kf: int, dtype: torch.dtype
) -> Tensor:
    """Normalised patches (N, kt * kf) in ``dtype``.

    Args:
        log_mel: (B, T, F) fp32, fp16 or bf16, any strides.
        mean: One element, subtracted from every value.
        scale: One element, multiplied with the difference.
        clip: (N,) int64 clip of each row.
        token: (N,) int64 token of each row within its clip.
        kt: Frames per patch.
        kf: Mel bins per patch.
        dtype: fp32, fp16 or bf16.
    """
    out = torch.empty(clip.shape[0], kt * kf, dtype=dtype, device=log_mel.device)
    tensors = {"log_mel": log_mel, "mean": mean, "scale": scale, "token": token, "out": out}
    _launch(_forward, log_mel, clip, kt=kt, kf=kf, **tensors)
    return out


@forward.gradients_of("log_mel")
def backward(dout: Tensor, log_mel: Tensor, scale: Tensor, clip: Tensor, token: Tensor, kt: int, kf: int) -> Tensor:
    """Gradient of ``log_mel``, whose values are not used; ``dout`` (N, P) is the gradient of the patches."""
    dlog_mel = torch.zeros_like(log_mel)
    tensors = {"dout": dout.contiguous(), "scale": scale, "token": token, "dlog_mel": dlog_mel}
    _launch(_backward, dlog_mel, clip, kt=kt, kf=kf, **tensors)
    return dlog_mel


WIDTHS = (256,)  # P of the presets


def examples(dtype: torch.dtype, width: int, device: str = "meta") -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of every variant.

    ``mae-ast-fast kernels`` compiles them on the meta device, ``mae-ast-fast tune`` times them on CUDA.
    """
    batch, frames, bins = 128, 1024, 128
    num_rows = batch * frames * bins // width
    scalar, index = torch.ones(1, device=device), torch.arange(num_rows, device=device)
    rows: dict[str, Any] = {"clip": index // (num_rows // batch), "token": index % (num_rows // batch)}
    dout = torch.randn(num_rows, width, dtype=dtype, device=device)
    for stored_dtype in dict.fromkeys((torch.float32, dtype)):
        log_mel = torch.randn(batch, frames, bins, dtype=stored_dtype, device=device)
        for kt in (2, 16):
            kf = width // kt
            for layout, x, size_t, size_f in (("", log_mel, kt, kf), (" transposed", log_mel.transpose(1, 2), kf, kt)):
                name = f"{kt}x{kf}{layout} from {stored_dtype}"
                inputs: dict[str, Any] = {"log_mel": x, "kt": size_t, "kf": size_f, **rows}
                yield f"forward {name}", num_rows, partial(forward, mean=scalar, scale=scalar, dtype=dtype, **inputs)
                yield f"backward {name}", num_rows, partial(backward, dout, scale=scalar, **inputs)


def _inputs(draw: Draw, shape: tuple[int, int, int, tuple[int, int], int]) -> dict[str, Any]:
    """``count`` different patches in random order. The mean has more digits than fp16."""
    batch, frames, bins, patch_size, count = shape
    num_tokens = frames // patch_size[0] * (bins // patch_size[1])
    patch = torch.randperm(batch * num_tokens, generator=torch.Generator().manual_seed(0))[:count]
    return {
        "features": draw.rows(batch, frames, bins),
        "mean": torch.full((1,), draw.offset - 0.2871, device=draw.device),
        "scale": torch.full((1,), 0.1234, device=draw.device),
        "clip": draw.integers(patch // max(num_tokens, 1)),
        "token": draw.integers(patch % max(num_tokens, 1)),
        "patch_size": patch_size,
    }


CASE = OpCase(
    name="gather_patches",
    make=_inputs,
    shapes=[(3, 48, 32, (16, 16), 1), (3, 6, 64, (2, 32), 11), (3, 9, 10, (3, 5), 14)],
    empty=[(2, 6, 8, (2, 4), 0), (2, 1, 8, (2, 4), 0), (0, 6, 8, (2, 4), 0)],
    traced=[(2, 7, 8, (2, 4), 7), (2, 7, 8, (2, 4), 4)],
    differentiable=("features",),
    exact=True,
    vectors=("clip", "token"),
    mutants=(
        Mutant("edge", "& (f < KF)", "& (f < KF - 1)"),
        Mutant(
            "last row",
            "(row < N)[:, None, None] & (t < KT) & (f < KF)",
            "(row < N - 1)[:, None, None] & (t < KT) & (f < KF)",
        ),
        Mutant("row owner", "clip_ptr + row * stride_clip,", "clip_ptr + row // 2 * 2 * stride_clip,"),
    ),
)
