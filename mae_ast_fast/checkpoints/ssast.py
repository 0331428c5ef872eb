"""Official checkpoints of SSAST: configuration and weights from the paper's own code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..models.config import SSASTConfig
from ..models.ssast import CLASS_TOKENS

_UNUSED = re.compile(r"v\.head(_dist)?\.(weight|bias)")  # timm's classifiers, which SSAST does not use


def convert_official(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None
) -> tuple[SSASTConfig, dict[str, Tensor]]:
    """Convert official options and weights to ours.

    Args:
        state_dict: Official name -> tensor, with or without the prefix ``module.``.
        num_heads: Attention heads, which the file does not hold; None: one per 64 dimensions of the width.

    Returns:
        The configuration, and our name -> tensor in fp32.

    Raises:
        ValueError: The weights are not those of SSAST's pretraining. The message lists all problems.
    """
    prefix = "module."
    if state_dict and all(name.startswith(prefix) for name in state_dict):
        state_dict = {name[len(prefix) :]: tensor for name, tensor in state_dict.items()}

    def shape_of(name: str, num_dims: int) -> tuple[int, ...]:
        if name not in state_dict:
            raise ValueError(f"no SSAST pretraining checkpoint: it has no {name}")
        if state_dict[name].dim() != num_dims:
            raise ValueError(f"{name} must have {num_dims} dimensions, got shape {tuple(state_dict[name].shape)}")
        return tuple(state_dict[name].shape)

    def integer(name: str) -> int:
        shape_of(name, 0)
        if state_dict[name].is_floating_point():
            raise ValueError(f"{name} must be an integer, got {state_dict[name].dtype}")
        return int(state_dict[name])

    width, channels, kf, kt = shape_of("v.patch_embed.proj.weight", 4)
    bins, frames = integer("p_input_fdim"), integer("p_input_tdim")
    tokens = shape_of("v.pos_embed", 3)[1] - CLASS_TOKENS
    if channels != 1 or min(kf, kt) < 1 or tokens != (bins // kf) * (frames // kt):
        raise ValueError(
            f"expected v.pos_embed of {CLASS_TOKENS} class tokens and one position for every patch of {kt} frames x "
            f"{kf} bins in {frames} frames x {bins} bins without overlap, got {tokens + CLASS_TOKENS} positions and "
            f"{channels} channels"
        )
    blocks = {match[1] for name in state_dict if (match := re.match(r"v\.blocks\.(\d+)\.", name))}
    heads = width // 64 if num_heads is None else num_heads
    if heads < 1:
        origin = f" (width {width} // 64)" if num_heads is None else ""
        raise ValueError(f"num_heads must be at least 1, got {heads}{origin}")
    config = SSASTConfig(
        patch_size=(kt, kf),
        embed_dim=width,
        num_heads=heads,
        layers=len(blocks),
        input_frames=frames,
        num_mel_bins=bins,
        mask_patches=max(1, tokens * 400 // 512),
    )
    layout = _layout(config)
    expected = {name: shape for name, shape, _ in layout.values()}
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    accepted = {*expected, "p_input_fdim", "p_input_tdim"}
    problems += [f"unexpected {name}" for name in state_dict if name not in accepted and not _UNUSED.fullmatch(name)]
    for name, shape in expected.items():
        if name in state_dict and tuple(state_dict[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}")
        elif name in state_dict and not state_dict[name].is_floating_point():
            problems.append(f"{name} has dtype {state_dict[name].dtype}, expected floating point")
    if problems:
        raise ValueError(f"the weights are not those of an SSAST in pretraining: {'; '.join(problems)}")
    return config, {ours: state_dict[name].float().reshape(shape) for ours, (name, _, shape) in layout.items()}


def _layout(config: SSASTConfig) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Our name -> (official name, official shape, our shape)."""
    width, (kt, kf), tokens = config.embed_dim, config.patch_size, CLASS_TOKENS + config.num_patches
    layout = {
        # A kernel of the convolution, flattened row by row, orders a patch's values by f * kt + t.
        "patch_embed.weight": ("v.patch_embed.proj.weight", (width, 1, kf, kt), (width, kf * kt)),
        "patch_embed.bias": ("v.patch_embed.proj.bias", (width,), (width,)),
        "cls_token": ("v.cls_token", (1, 1, width), (width,)),
        "dist_token": ("v.dist_token", (1, 1, width), (width,)),
        "mask_token": ("mask_embed", (1, 1, width), (width,)),
        "positions": ("v.pos_embed", (1, tokens, width), (tokens, width)),
    }

    def affine(ours: str, official: str, *shape: int) -> None:
        layout[f"{ours}.weight"] = f"{official}.weight", shape, shape
        layout[f"{ours}.bias"] = f"{official}.bias", shape[:1], shape[:1]

    for index in range(config.layers):
        ours, official = f"encoder.layers.{index}", f"v.blocks.{index}"
        affine(f"{ours}.attn_norm", f"{official}.norm1", width)
        affine(f"{ours}.qkv", f"{official}.attn.qkv", 3 * width, width)
        affine(f"{ours}.out_proj", f"{official}.attn.proj", width, width)
        affine(f"{ours}.ffn_norm", f"{official}.norm2", width)
        affine(f"{ours}.fc1", f"{official}.mlp.fc1", config.ffn_dim, width)
        affine(f"{ours}.fc2", f"{official}.mlp.fc2", width, config.ffn_dim)
    affine("encoder.norm", "v.norm", width)
    for ours, official in (("classification_head", "cpredlayer"), ("reconstruction_head", "gpredlayer")):
        affine(f"{ours}.0", f"{official}.0", width, width)
        affine(f"{ours}.2", f"{official}.2", config.patch_dim, width)
    return layout
