"""The model's operations: check the input, choose the implementation, call the kernel or the reference.

``impl`` is "torch" (reference.py, plain PyTorch, any device and dtype), "triton" (kernels/, fp32, fp16 and bf16 on a
GPU, or on a CPU under Triton's interpreter) or "auto". Nothing falls back silently: what an implementation cannot do is
a ``ValueError`` that says what to use. Letters as in reference.py.

Dropout: with impl="torch" masks come from PyTorch's generator; with impl="triton" they are a function of ``seed``, an
int64 tensor of one element on the device (None: drawn from PyTorch's generator), ``site``, a number for each place in
the model, and the element's row and column, so that nothing is stored and the backward draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import masking, reference
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

LAYER_NORM_EPS = 1e-5  # of every LayerNorm that an operation holds
SHORT = 128  # rows of a clip, and values of a head, that short_attention takes


def add_layer_norm(
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
        residual: (N, D), of the same dtype.
        weight: (D,) of any floating dtype, as the biases.
        bias: (D,).
        branch_bias: (D,) bias of the Linear before, which then leaves it out.
        dropout: Rate on the branch, in [0, 1).
        seed: See the module; likewise ``site``.
        site: Which dropout this is.
        fork: Return y twice, for the next branch and for the next residual: the kernel then adds the two gradients
            that come back, which saves a pass over memory.
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
        y = reference.add_layer_norm(branch, residual, weight, bias, branch_bias, dropout)
        return (y, y) if fork else y
    from ..kernels import add_layer_norm as kernel

    seed = kernel_seed(dropout, seed, residual.device)
    return kernel.add_layer_norm(branch, residual, weight, bias, branch_bias, seed, dropout, site, LAYER_NORM_EPS, fork)


def bias_gelu(
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
        seed: See the module; likewise ``site``.
        site: Which dropout this is.
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
        return reference.bias_gelu(x, bias, dropout)
    from ..kernels import bias_gelu as kernel

    return kernel.forward_op(x, bias, kernel_seed(dropout, seed, x.device), dropout, site)


def feed_forward(
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
        w1: (F, D) of any floating dtype, as the others; products are in the dtype of ``x``.
        b1: (F,).
        w2: (D', F), mostly D' = D.
        dropout: Rate on what the GELU gives, in [0, 1); 0 with impl="triton" and with ``recompute``.
        recompute: Keep x W1^T alone for the backward and compute the GELU again there: (N, F) values less, the same
            results to the bit.
        impl: "auto", "torch" or "triton", which puts GELU and its derivative into the products where
            kernels/common/configs.py has a measurement that speaks for it, and else takes the kernels of ``bias_gelu``.

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
        raise ValueError(f"recompute needs dropout 0, whose mask would be drawn twice, got {dropout}")
    if not is_triton(impl, x):
        return reference.feed_forward(x, w1, b1, w2, dropout, recompute)
    if dropout > 0.0:
        raise ValueError(
            f"impl='triton' has no dropout in feed_forward, got {dropout}: use bias_gelu between two products"
        )
    from ..kernels import feed_forward as kernel

    return kernel.feed_forward(x, w1, b1, w2, recompute)


def scatter_tokens(
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
    """The decoder's input: visible rows at their places, the mask token elsewhere, + position, LayerNorm, dropout.

    Args:
        visible: (Nv, D) encoded visible tokens, each of which stands at one of the N places at most.
        mask_token: (D,) of any floating dtype, as weight and bias.
        table: (tokens, D) positions; no gradient.
        token: (N,) int64, place of each row in the table.
        inverse: (N,) int64, row of ``visible`` that stands here, -1 for the mask token.
        weight: (D,) of a LayerNorm (eps 1e-5, fp32 statistics) over the sum; None: no LayerNorm.
        bias: (D,), with ``weight``.
        dropout: Rate on the result, in [0, 1).
        seed: See the module; likewise ``site``.
        site: Which dropout this is.
        impl: "auto", "torch" or "triton". Index values are not checked by the kernel.

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
        return reference.scatter_tokens(visible, mask_token, table, token, inverse, weight, bias, dropout)
    from ..kernels import scatter_tokens as kernel

    tensors = visible, mask_token, table, token, inverse, weight, bias
    seed = kernel_seed(dropout, seed, visible.device)
    return kernel.forward_op(*tensors, seed, dropout, site, LAYER_NORM_EPS)[0]


def short_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of each clip over its own rows, scale Dh ** -0.5; in Triton for short clips only.

    Args:
        qkv: (N, 3, H, Dh) packed rows; in Triton Dh is at most ``SHORT``.
        cu_seqlens: (B + 1,) int32 first row of each clip; the last one is N. Clips may be empty.
        max_seqlen: Rows of the longest clip, in Triton at most ``SHORT``. Too small a number is not noticed there and
            gives wrong results.
        dropout: Rate on the attention probabilities, in [0, 1).
        seed: See the module; likewise ``site``. The mask's row is the query's packed row, its column the key's index
            within the clip, drawn for each head.
        site: Which dropout this is.
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
        return reference.attention(qkv, cu_seqlens, max_seqlen, dropout)
    if max_seqlen > SHORT or qkv.shape[3] > SHORT:
        raise ValueError(
            f"impl='triton' takes clips of at most {SHORT} rows and heads of at most {SHORT} values, got max_seqlen "
            f"{max_seqlen} and head width {qkv.shape[3]}; use attention='sdpa' in the model or impl='torch'"
        )
    from ..kernels import short_attention as kernel

    return kernel.forward_op(qkv, cu_seqlens, kernel_seed(dropout, seed, qkv.device), max_seqlen, dropout, site)


def gather_patches(
    features: Tensor,
    mean: Tensor,
    scale: Tensor,
    clip: Tensor,
    token: Tensor,
    patch_size: tuple[int, int],
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The patches of packed rows, normalised: (x - mean) * scale, computed in fp32 or wider.

    Args:
        features: (B, T, F) of any strides, F a multiple of kf. A transposed view (B, F, T) with patch_size (kf, kt)
            gives SSAST's layout.
        mean: One element, () or (1,), of any floating dtype; likewise ``scale``. Differentiable with impl="torch" only.
        scale: See ``mean``.
        clip: (N,) int64, clip of each row.
        token: (N,) int64, token of each row within its clip: time block * (F // kf) + frequency block. The kernel
            checks no values, and its backward needs every (clip, token) in at most one row.
        patch_size: (kt, kf).
        dtype: Of the result; None: that of ``features``.
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
        return reference.gather_patches(features, mean, scale, clip, token, patch_size, dtype)
    if mean.requires_grad or scale.requires_grad:
        raise ValueError("impl='triton' has no gradient for mean and scale: detach them or use impl='torch'")
    from ..kernels import gather_patches as kernel

    return kernel.forward_op(features, mean, scale, clip, token, kt, kf, dtype)


MASK_KERNEL_STRATEGIES = ("random", "chunk")


def sample_mask(
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
    """Draws the tokens that each clip hides: ``masking.sample_mask``, the same bits from every implementation.

    Args:
        strategy: As ``masking.sample_mask``, likewise all others but ``impl``. The kernel has random and chunk.
        tokens: (B,) integers, tokens of each clip.
        grid_f: Frequency blocks.
        mask_ratio: Share of a clip's tokens that is hidden.
        generator: Source of the seed.
        seed: Instead of a generator.
        clip_ids: (B,) int64.
        epoch: Number of the pass over the data.
        max_tokens: Width L of the result; with it given nothing is read back from a GPU.
        impl: "auto", "torch" or "triton". "auto" takes torch for the strategies that the kernel does not have.

    Returns:
        (B, L) bool, True = hidden.

    Raises:
        ValueError: An argument is not as described, or the implementation is not available.
    """
    arguments = strategy, tokens, grid_f, mask_ratio, generator, seed, clip_ids, epoch, max_tokens
    device = tokens.device if isinstance(tokens, Tensor) else torch.device("cpu")
    chosen, _ = resolve_impl(impl, device)
    if strategy not in MASK_KERNEL_STRATEGIES and impl == "auto":
        chosen = "torch"
    if chosen == "torch":
        return masking.sample_mask(*arguments)
    tokens, masked, clip_ids, seed, epoch, max_tokens = masking.prepare(*arguments)
    if strategy not in MASK_KERNEL_STRATEGIES:
        kernels = " and ".join(MASK_KERNEL_STRATEGIES)
        raise ValueError(f"impl='triton' has the strategies {kernels}, got {strategy!r}: use impl='torch'")
    from ..kernels import sample_mask as kernel

    if not isinstance(seed, Tensor):  # filled on the device: a copy from the host would wait
        seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
    epoch = epoch - 2**32 if epoch >= 2**31 else epoch
    return kernel.forward_op(tokens, masked, clip_ids, seed, epoch, grid_f, max_tokens, strategy == "chunk")


def masked_mse(prediction: Tensor, target: Tensor, norm_pix_loss: bool = False, impl: str = "auto") -> Tensor:
    """Mean squared error of each row: the reconstruction loss of the masked patches (paper, section 2.3).

    Args:
        prediction: (N, P), of any row stride.
        target: (N, P), of any floating dtype. It gets no gradient from the kernel.
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
    return kernel.masked_mse(prediction, target, norm_pix_loss)


def info_nce(
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    over: str = "targets",
    impl: str = "auto",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each row against the rows of its own clip, no temperature (paper, equation 1).

    Args:
        prediction: (N, P), of any row stride; the kernel takes P up to 512.
        target: (N, P) of the same dtype. It gets no gradient from the kernel.
        cu_seqlens: (B + 1,) int32 first row of each clip; the last one is N. Clips may be empty.
        max_seqlen: Rows of the longest clip. Results are undefined where it is less.
        over: "targets": loss_i = -log softmax_j(<prediction_i, target_j>)[i] (MAE-AST). "predictions":
            loss_i = -log softmax_j(<target_i, prediction_j>)[i] (SSAST, arXiv 2110.09784). j over the clip's rows.
        impl: "auto", "torch" or "triton".
        exact: Whether all N rows belong to a clip (packing.Packing).

    Returns:
        loss (N,) in fp32 (fp64 for fp64 rows) and hit (N,) bool: over targets, whether a row's own target is its first
        largest product; over predictions, whether a prediction's own target is the first of the clip's targets with
        the largest log softmax for it.

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
        return reference.info_nce(prediction, target, cu_seqlens, max_seqlen, over, exact)
    from ..kernels import info_nce as kernel

    check_no_gradient(target)
    return kernel.info_nce(prediction, target, cu_seqlens, max_seqlen, over)
