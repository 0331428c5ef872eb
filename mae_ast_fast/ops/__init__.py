"""Operations on tensors. Each one checks its input and calls a Triton kernel or plain PyTorch.

The functions here are public; each is documented where it is defined.
"""

from .dispatch import KERNEL_DTYPES, check_cu_seqlens, check_dropout, draw_seed, resolve_impl
from .functional import (
    LAYER_NORM_EPS,
    MASK_KERNEL_STRATEGIES,
    SHORT,
    add_layer_norm,
    bias_gelu,
    feed_forward,
    gather_patches,
    info_nce,
    masked_mse,
    sample_mask,
    scatter_tokens,
    short_attention,
)

__all__ = [
    "KERNEL_DTYPES",
    "LAYER_NORM_EPS",
    "MASK_KERNEL_STRATEGIES",
    "SHORT",
    "add_layer_norm",
    "bias_gelu",
    "check_cu_seqlens",
    "check_dropout",
    "draw_seed",
    "feed_forward",
    "gather_patches",
    "info_nce",
    "masked_mse",
    "resolve_impl",
    "sample_mask",
    "scatter_tokens",
    "short_attention",
]
