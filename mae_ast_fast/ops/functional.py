"""The model's operations: each checks its input, chooses the implementation and calls it.

``impl`` is "torch" (plain PyTorch, any device and dtype: eager.py, or reference.py where that is as fast), "triton"
(kernels/, fp32, fp16 and bf16 on a GPU, or on a CPU under Triton's interpreter) or "auto". No name falls back silently:
a request that an implementation cannot fulfil raises a ``ValueError`` that names the alternative. The letters are those
of reference.py.

Dropout: with impl="torch", masks come from PyTorch's generator. With impl="triton", a mask is a function of ``seed``
(an int64 tensor of one element on the device; None: drawn from PyTorch's generator), of ``site`` (an integer that
identifies the dropout within the model), and of the element's row and column. The mask is therefore not stored, and the
backward draws the same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import eager, masking, reference
from .dispatch import (
    check_cu_seqlens,
    check_dropout,
    check_index,
    check_no_gradient,
    check_rows,
    is_triton,
    kernel_seed,
    resolve_impl,
)

__all__ = [
    "LAYER_NORM_EPS",
    "MASK_KERNEL_STRATEGIES",
    "SHORT",
    "add_layer_norm",
    "bias_gelu",
    "feed_forward",
    "gather_patches",
    "info_nce",
    "masked_mse",
    "sample_mask",
    "scatter_tokens",
    "short_attention",
]

LAYER_NORM_EPS = 1e-5  # of every LayerNorm inside an operation
PIXEL_VARIANCE_EPS = 1e-6  # of norm_pix_loss
SHORT = 128  # limit of short_attention: rows per clip, and values per head


def add_layer_norm(  # noqa: PLR0917 - public signature
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    fork: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(branch + branch_bias)), eps 1e-5, statistics in fp32: the post-norm residual.

    Args:
        branch: (N, D).
        residual: (N, D), in the dtype of ``branch``.
        weight: (D,) LayerNorm weight of any floating dtype.
        bias: (D,) LayerNorm bias of any floating dtype.
        branch_bias: (D,) bias of the Linear that computed ``branch`` without it, of any floating dtype. None: no bias.
        dropout: Rate on the branch, in [0, 1).
        seed: (1,) int64 dropout seed for impl="triton". None: drawn from PyTorch's generator.
        site: Number of this dropout in the model, for impl="triton".
        fork: Return y twice, once for the next branch and once for the next residual. The kernel then adds the two
            incoming gradients itself, which saves a pass over memory.
        impl: "auto", "torch" or "triton".

    Returns:
        y (N, D) in the dtype of ``residual``; with ``fork`` (y, y).

    Raises:
        ValueError: A shape, dtype, device or rate is not as described, or the implementation is not available.
    """
    check_rows("residual", residual, ("N", "D"), branch)
    check_rows("branch", branch, tuple(residual.shape), residual)
    if branch.dtype != residual.dtype:
        raise ValueError(f"branch and residual must have one dtype, got {branch.dtype} and {residual.dtype}")
    for name, x in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if x is not None:
            check_rows(name, x, (residual.shape[1],), residual)
    check_dropout(dropout, seed, residual.device)
    if not is_triton(impl, residual):
        y = eager.add_layer_norm(branch, residual, weight, bias, branch_bias=branch_bias, dropout=dropout)
        return (y, y) if fork else y
    from ..kernels import add_layer_norm as kernel

    seed = kernel_seed(dropout, seed, residual.device)
    inputs: dict[str, Any] = {"branch": branch, "residual": residual, "branch_bias": branch_bias, "seed": seed}
    inputs |= {"weight": weight, "bias": bias, "dropout": dropout, "dropout_site": site, "eps": LAYER_NORM_EPS}
    return kernel.forked(**inputs) if fork else kernel.forward(**inputs)[0]


def bias_gelu(  # noqa: PLR0917 - public signature
    x: Tensor,
    bias: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(GELU(x + bias)), the exact (erf) GELU.

    Args:
        x: (N, F) output of a Linear without its bias.
        bias: (F,) of any floating dtype.
        dropout: Rate on the result, in [0, 1).
        seed: (1,) int64 dropout seed for impl="triton". None: drawn from PyTorch's generator.
        site: Number of this dropout in the model, for impl="triton".
        impl: "auto", "torch" or "triton".

    Returns:
        (N, F) in the dtype of ``x``.

    Raises:
        ValueError: A shape, device or rate is not as described, or the implementation is not available.
    """
    check_rows("x", x, ("N", "F"), x)
    check_rows("bias", bias, (x.shape[1],), x)
    check_dropout(dropout, seed, x.device)
    if not is_triton(impl, x):
        return eager.bias_gelu(x, bias, dropout)
    from ..kernels import bias_gelu as kernel

    seed = kernel_seed(dropout, seed, x.device)
    return kernel.forward(x=x, bias=bias, seed=seed, dropout=dropout, dropout_site=site)


def feed_forward(  # noqa: PLR0917 - public signature
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    dropout: float = 0.0,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """GELU(x W1^T + b1) W2^T, the exact (erf) GELU: the feed-forward block without its last bias.

    Args:
        x: (N, D).
        w1: (F, D) of any floating dtype; products are computed in the dtype of ``x``.
        b1: (F,) of any floating dtype.
        w2: (D', F) of any floating dtype, usually D' = D.
        dropout: Rate on the output of the GELU, in [0, 1). Must be 0 with impl="triton" and with ``recompute``.
        recompute: Keep only x W1^T for the backward and compute the GELU there again. This saves (N, F) values, and the
            results are the same to the bit.
        impl: "auto", "torch" or "triton". "triton" fuses GELU and its derivative into the matrix products where
            kernels/configs/ holds a measurement in favour of it; otherwise it uses the kernels of ``bias_gelu``.

    Returns:
        (N, D') in the dtype of ``x``.

    Raises:
        ValueError: A shape, device or rate is not as described, or the implementation is not available.
    """
    check_rows("x", x, ("N", "D"), x)
    check_rows("w1", w1, ("F", x.shape[1]), x)
    check_rows("b1", b1, (w1.shape[0],), x)
    check_rows("w2", w2, ("D'", w1.shape[0]), x)
    check_dropout(dropout, None, x.device)
    if recompute and dropout > 0.0:
        raise ValueError(f"recompute needs dropout 0, because its mask would be drawn twice, got {dropout}")
    if not is_triton(impl, x):
        return eager.feed_forward(x, w1, b1, w2, dropout=dropout, recompute=recompute)
    if dropout > 0.0:
        raise ValueError(
            f"impl='triton' has no dropout in feed_forward, got {dropout}: use bias_gelu between two products"
        )
    from ..kernels import feed_forward as kernel

    return kernel.forward(x=x, w1=w1.to(x.dtype), b1=b1, w2=w2.to(x.dtype), recompute=recompute)[0]


def scatter_tokens(  # noqa: PLR0917 - public signature
    visible: Tensor,
    mask_token: Tensor,
    table: Tensor,
    token: Tensor,
    inverse: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Input of the decoder: visible tokens restored to their positions, the mask token at all others.

    Positions are added, then LayerNorm and dropout are applied.

    Args:
        visible: (Nv, D) encoded visible tokens, each used in at most one of the N rows.
        mask_token: (D,) of any floating dtype.
        table: (tokens, D) positions; it gets no gradient.
        token: (N,) int64 index of each row in ``table``.
        inverse: (N,) int64 row of ``visible`` to put here (``ids_restore`` of MAE code), -1 for the mask token.
        weight: (D,) weight, of any floating dtype, of a LayerNorm (eps 1e-5, fp32 statistics) over the sum. None: no
            LayerNorm.
        bias: (D,) bias of that LayerNorm, of any floating dtype; given exactly when ``weight`` is.
        dropout: Rate on the result, in [0, 1).
        seed: (1,) int64 dropout seed for impl="triton". None: drawn from PyTorch's generator.
        site: Number of this dropout in the model, for impl="triton".
        impl: "auto", "torch" or "triton". The kernel does not check index values.

    Returns:
        (N, D) in the dtype of ``visible``.

    Raises:
        ValueError: A shape, dtype, device or rate is not as described, or the implementation is not available.
    """
    check_rows("visible", visible, ("Nv", "D"), visible)
    width = visible.shape[1]
    check_rows("table", table, ("tokens", width), visible)
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the LayerNorm come together, got one of them")
    for name, x in (("mask_token", mask_token), ("weight", weight), ("bias", bias)):
        if x is not None:
            check_rows(name, x, (width,), visible)
    check_index("token", token, ("N",), visible)
    check_index("inverse", inverse, tuple(token.shape), visible)
    check_dropout(dropout, seed, visible.device)
    if not is_triton(impl, visible):
        return eager.scatter_tokens(
            visible, mask_token, table, token=token, inverse=inverse, weight=weight, bias=bias, dropout=dropout
        )
    from ..kernels import scatter_tokens as kernel

    seed = kernel_seed(dropout, seed, visible.device)
    return kernel.forward(
        visible=visible,
        mask_token=mask_token,
        table=table,
        token=token,
        ids_restore=inverse,
        weight=weight,
        bias=bias,
        seed=seed,
        dropout=dropout,
        dropout_site=site,
        eps=LAYER_NORM_EPS,
    )[0]


def short_attention(  # noqa: PLR0917 - public signature
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of each clip over its own rows, scale Dh ** -0.5; with impl="triton" for short clips only.

    Args:
        qkv: (N, 3, H, Dh) packed rows; with impl="triton", Dh is at most ``SHORT``.
        cu_seqlens: (B + 1,) int32 first row of each clip; the last element is N. Clips may be empty.
        max_seqlen: Rows of the longest clip; with impl="triton" at most ``SHORT``. The kernel does not detect a number
            that is too small, and returns wrong results for it.
        dropout: Rate on the attention probabilities, in [0, 1).
        seed: (1,) int64 dropout seed for impl="triton". None: drawn from PyTorch's generator. The mask is drawn for
            each head; its row is the packed row of the query, its column the index of the key within the clip.
        site: Number of this dropout in the model, for impl="triton".
        impl: "auto", "torch" or "triton".

    Returns:
        (N, H, Dh) in the dtype of ``qkv``.

    Raises:
        ValueError: A shape, dtype, device or rate is not as described, or the implementation is not available.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, Dh), got {tuple(qkv.shape)}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, qkv)
    check_dropout(dropout, seed, qkv.device)
    if not is_triton(impl, qkv):
        return eager.attention(qkv, cu_seqlens, max_seqlen, dropout)
    if max_seqlen > SHORT or qkv.shape[3] > SHORT:
        raise ValueError(
            f"impl='triton' takes clips of at most {SHORT} rows and heads of at most {SHORT} values, got max_seqlen "
            f"{max_seqlen} and head width {qkv.shape[3]}; use attention='sdpa' in the model or impl='torch'"
        )
    from ..kernels import short_attention as kernel

    return kernel.forward(
        qkv=qkv,
        cu_seqlens=cu_seqlens,
        seed=kernel_seed(dropout, seed, qkv.device),
        max_seqlen=max_seqlen,
        dropout=dropout,
        dropout_site=site,
    )


def gather_patches(  # noqa: PLR0917 - public signature
    features: Tensor,
    mean: Tensor,
    scale: Tensor,
    clip: Tensor,
    token: Tensor,
    patch_size: tuple[int, int],
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalised patches of packed rows: (x - mean) * scale, computed in fp32 or wider.

    Args:
        features: (B, T, F) of any strides, F a multiple of kf. A transposed view (B, F, T) with patch_size (kf, kt)
            gives the layout of SSAST.
        mean: One element, () or (1,), of any floating dtype. Differentiable with impl="torch" only.
        scale: One element, () or (1,), of any floating dtype. Differentiable with impl="torch" only.
        clip: (N,) int64, clip of each row.
        token: (N,) int64, token of each row within its clip: time block * (F // kf) + frequency block. The kernel does
            not check values, and its backward needs each (clip, token) in at most one row.
        patch_size: (kt, kf), frames and mel bins of a patch.
        dtype: Floating dtype of the result. None: the dtype of ``features``.
        impl: "auto", "torch" or "triton".

    Returns:
        (N, kt * kf) in ``dtype``; inside a patch, index = t * kf + f.

    Raises:
        ValueError: A shape, dtype or device is not as described, or the implementation is not available.
    """
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(f"features must be floating (B, T, F), got {features.dtype} {tuple(features.shape)}")
    kt, kf = patch_size
    if kt < 1 or kf < 1 or features.shape[2] % kf:
        raise ValueError(
            f"patch_size must be positive and divide the {features.shape[2]} bins of features, got {(kt, kf)}"
        )
    for name, x in (("mean", mean), ("scale", scale)):
        if x.numel() != 1 or x.dim() > 1 or not x.is_floating_point() or x.device != features.device:
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be one floating element on {features.device}, got {got}")
    check_index("clip", clip, ("N",), features)
    check_index("token", token, tuple(clip.shape), features)
    dtype = features.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    if {resolve_impl(impl, features.device, x)[0] for x in (features.dtype, dtype)} != {"triton"}:
        return reference.gather_patches(
            features, mean, scale, clip=clip, token=token, patch_size=patch_size, dtype=dtype
        )
    if mean.requires_grad or scale.requires_grad:
        raise ValueError("impl='triton' has no gradient for mean and scale: detach them or use impl='torch'")
    from ..kernels import gather_patches as kernel

    return kernel.forward(log_mel=features, mean=mean, scale=scale, clip=clip, token=token, kt=kt, kf=kf, dtype=dtype)


MASK_KERNEL_STRATEGIES = ("random", "chunk")


def sample_mask(  # noqa: PLR0917 - public signature
    strategy: str,
    tokens: Tensor | list[int],
    grid_f: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    clip_ids: Tensor | list[int] | None = None,
    epoch: int = 0,
    max_tokens: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Draw the masked tokens of each clip. Every implementation draws the same bits (see masking.py).

    Args:
        strategy: "random", "chunk", "chunk_official", "span", "time" or "frequency". The kernel has random and chunk.
        tokens: (B,) integers >= 0, tokens of each clip; for chunk, time and frequency multiples of ``grid_f``.
        grid_f: Frequency blocks, that is tokens per time step.
        mask_ratio: Share of the tokens of a clip to mask, in (0, 1).
        generator: Source of the seed where ``seed`` is None. None: PyTorch's default CPU generator.
        seed: 64-bit seed, an integer or a 0-d int64 tensor. Excludes ``generator``.
        clip_ids: (B,) int64, of which the low 32 bits are used. None: 0, 1, ... B - 1.
        epoch: Number of the pass over the data, of which the low 32 bits are used.
        max_tokens: Width L of the result, at least the largest of ``tokens``. None: the largest, which the host reads
            from the device. With a given width nothing is read back from a GPU.
        impl: "auto", "torch" or "triton". "auto" chooses torch for the strategies that the kernel does not have.

    Returns:
        (B, L) bool on the device of ``tokens``, True = masked.

    Raises:
        ValueError: An argument is not as described, or the implementation is not available.
    """
    device = tokens.device if isinstance(tokens, Tensor) else torch.device("cpu")
    chosen, _ = resolve_impl(impl, device)
    if strategy not in MASK_KERNEL_STRATEGIES and impl == "auto":
        chosen = "torch"
    if chosen == "torch":
        return masking.sample_mask(
            strategy,
            tokens,
            grid_f,
            mask_ratio,
            generator=generator,
            seed=seed,
            clip_ids=clip_ids,
            epoch=epoch,
            max_tokens=max_tokens,
        )
    inputs = masking.prepare(
        strategy,
        tokens,
        grid_f,
        mask_ratio,
        generator=generator,
        seed=seed,
        clip_ids=clip_ids,
        epoch=epoch,
        max_tokens=max_tokens,
    )
    if strategy not in MASK_KERNEL_STRATEGIES:
        kernels = " and ".join(MASK_KERNEL_STRATEGIES)
        raise ValueError(f"impl='triton' has the strategies {kernels}, got {strategy!r}: use impl='torch'")
    from ..kernels import sample_mask as kernel

    seed = inputs.seed
    if not isinstance(seed, Tensor):  # filled on the device: a copy from the host would wait
        seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
    epoch = inputs.epoch - 2**32 if inputs.epoch >= 2**31 else inputs.epoch
    return kernel.forward(
        num_tokens=inputs.num_tokens,
        num_masked=inputs.num_masked,
        clip_ids=inputs.clip_ids,
        seed=seed,
        epoch=epoch,
        grid_f=grid_f,
        max_tokens=inputs.max_tokens,
        chunk=strategy == "chunk",
    )


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool = False, impl: str = "auto") -> Tensor:
    """Mean squared error of each row: the reconstruction loss of the masked patches (paper, section 2.3).

    Args:
        prediction: (N, P), of any row stride.
        target: (N, P), of any floating dtype. The kernel gives it no gradient.
        norm_pix_loss: Normalise every target row by its own mean and unbiased variance (eps 1e-6; He et al. 2022,
            section 4).
        impl: "auto", "torch" or "triton".

    Returns:
        loss (N,) in fp32 (fp64 for fp64 predictions).

    Raises:
        ValueError: A shape or device is not as described, or the implementation is not available.
    """
    check_rows("prediction", prediction, ("N", "P"), prediction)
    check_rows("target", target, tuple(prediction.shape), prediction)
    if norm_pix_loss and prediction.shape[1] < 2:
        raise ValueError(f"norm_pix_loss needs rows of at least 2 values, got {tuple(prediction.shape)}")
    if not is_triton(impl, prediction):
        return reference.masked_mse(prediction, target, norm_pix_loss)
    from ..kernels import masked_mse as kernel

    check_no_gradient(target)
    return kernel.forward(prediction=prediction, target=target, norm_pix_loss=norm_pix_loss, eps=PIXEL_VARIANCE_EPS)


def info_nce(  # noqa: PLR0917 - public signature
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    over: str = "targets",
    impl: str = "auto",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each row against the rows of its own clip, without temperature (paper, equation 1).

    Args:
        prediction: (N, P), of any row stride; the kernel takes P up to 512.
        target: (N, P) of the same dtype. The kernel gives it no gradient.
        cu_seqlens: (B + 1,) int32 first row of each clip; the last element is N. Clips may be empty.
        max_seqlen: Rows of the longest clip. Results are undefined for a smaller number.
        over: What the softmax runs over. "targets": loss_i = -log softmax_j(<prediction_i, target_j>)[i] (MAE-AST).
            "predictions": loss_i = -log softmax_j(<target_i, prediction_j>)[i] (SSAST, arXiv 2110.09784). j runs over
            the rows of the clip.
        impl: "auto", "torch" or "triton".
        exact: Whether all N rows belong to a clip; False: rows may lie past ``cu_seqlens[-1]`` (packing.Packing).

    Returns:
        loss (N,) in fp32 (fp64 for fp64 rows) and hit (N,) bool. Over targets, hit is whether a row's own target is the
        first of its largest products. Over predictions, hit is whether a prediction's own target is the first of the
        clip's targets with the largest log softmax for it.

    Raises:
        ValueError: A shape, dtype, device or name is not as described, or the implementation is not available.
    """
    check_rows("prediction", prediction, ("N", "P"), prediction)
    check_rows("target", target, tuple(prediction.shape), prediction)
    if prediction.dtype != target.dtype:
        raise ValueError(f"prediction and target must have one dtype, got {prediction.dtype} and {target.dtype}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, prediction)
    if over not in ("targets", "predictions"):
        raise ValueError(f"over must be 'targets' or 'predictions', got {over!r}")
    if not is_triton(impl, prediction):
        return eager.info_nce(prediction, target, cu_seqlens, max_seqlen, over=over, has_padding_rows=not exact)
    from ..kernels import info_nce as kernel

    check_no_gradient(target)
    return kernel.forward(
        prediction=prediction, target=target, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, over=over
    )[:2]
