"""Official MAE-AST checkpoints: options and weights of the paper's own code (fairseq), converted to ours."""

from __future__ import annotations

import argparse
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.config import MAEASTConfig
from ..models.transformer import sinusoid
from .fairseq_file import describe

# Official option -> (our field, default of the official code's MAE_AST_Config and MAE_AST_Criterion_Config).
# A checkpoint holds every option; the defaults are for options written by hand.
_FIELDS: dict[str, tuple[str, Any]] = {
    "encoder_layers": ("encoder_layers", 12),
    "encoder_embed_dim": ("embed_dim", 768),
    "encoder_ffn_embed_dim": ("ffn_dim", 3072),
    "encoder_attention_heads": ("num_heads", 12),
    "layer_norm_first": ("norm_first", False),
    "decoder_embed_dim": ("decoder_embed_dim", 768),
    "decoder_layers": ("decoder_layers", 2),
    "decoder_layerdrop": ("decoder_layerdrop", 0.0),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "encoder_layerdrop": ("encoder_layerdrop", 0.0),
    "dropout_input": ("input_dropout", 0.0),
    # The task's own default is 100, which no patch size of the paper divides. Every recipe sets 128.
    "feature_dim": ("num_mel_bins", 128),
    "reconstruction_weight": ("reconstruction_weight", 10.0),
    "classification_weight": ("classification_weight", 1.0),
}
# Official option -> (the only value that this model supports, default of the official code).
_FIXED: dict[str, tuple[Any, Any]] = {
    "activation_fn": ("gelu", "gelu"),
    "enc_sine_pos": (True, False),
    "dec_sine_pos": (True, False),
    "enc_conv_pos": (False, False),
    "dec_conv_pos": (False, False),
}
_MASKING = {
    "random_mask": "random",
    "random_mask_batched": "random",  # the same strategy, drawn once for the whole batch
    "chunk_mask": "chunk",
    "retain_spans": "span",
}
# Entries of official checkpoints that influence no result. The encoder's mask embedding goes to tokens that are then
# dropped, and layer_norm is never called. fairseq's own sinusoid module stores the last two.
_UNUSED = (
    "encoder_mask_emb",
    "layer_norm.weight",
    "layer_norm.bias",
    "enc_sine_pos_embed._float_tensor",
    "dec_sine_pos_embed._float_tensor",
)


def fairseq_config(cfg: Mapping[str, Any] | argparse.Namespace) -> MAEASTConfig:
    """Convert the official options to our configuration.

    Args:
        cfg: Options by their official names, in one of these forms: sections ``{"model": {...}, "task": {...},
            "criterion": {...}}`` as in a checkpoint (other sections are ignored), one flat mapping or
            ``argparse.Namespace`` of all options, or flat keys such as ``cfg/model/encoder_layers``. An absent option
            takes the official code's default. Options that do not influence the model are ignored.

    Returns:
        The configuration. ``mask_type`` ``chunk_mask`` becomes ``chunk``, which draws one mask per clip, not
        ``chunk_official``, which draws one per batch as the official code does.

    Raises:
        ValueError: An option has the wrong type, or a value that this model does not support.
    """
    options = _options(cfg)

    def option(name: str, default: Any) -> Any:
        value = options.get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number if isinstance(default, float) else type(value) is type(default)):
            expected = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[type(default)]
            raise ValueError(f"option {name} must be {expected}, got {describe(value)}")
        return float(value) if isinstance(default, float) else value

    for name, (supported, default) in _FIXED.items():
        value = option(name, default)
        if value != supported:
            missing = "" if name in options else " (the official default of a missing option)"
            raise ValueError(f"option {name}={reprlib.repr(value)}{missing} is unsupported: it must be {supported!r}")

    fields = {ours: option(name, default) for name, (ours, default) in _FIELDS.items()}
    if fields["decoder_layers"] < 1:
        raise ValueError(f"option decoder_layers must be at least 1, got {fields['decoder_layers']}")
    patch_size = []
    for axis in ("time", "chan"):
        size, stride = option(f"ast_kernel_size_{axis}", 16), option(f"ast_kernel_stride_{axis}", 16)
        if size != stride:
            raise ValueError(f"option ast_kernel_stride_{axis} must equal ast_kernel_size_{axis}={size}, got {stride}")
        patch_size.append(size)

    mask_type = option("mask_type", "random_mask")
    if mask_type not in _MASKING:
        raise ValueError(f"option mask_type must be one of {', '.join(_MASKING)}, got {reprlib.repr(mask_type)}")
    masking, mask_ratio = _MASKING[mask_type], option("random_mask_prob", 0.75)
    if masking == "span":
        # The official option is the expected total length of retained spans over the clip's length. A token is covered
        # by none of them, and so masked, with probability exp(-p).
        mask_ratio = math.exp(-mask_ratio)
    if masking == "chunk" and patch_size[1] == fields["num_mel_bins"]:
        # For frame models the official code masks short runs of frames. Ours defines chunks on a grid only, and the
        # paper's frame models mask at random (section 3.2).
        masking = "random"
    return MAEASTConfig(
        patch_size=tuple(patch_size),
        encoder_projection=True if option("use_post_enc_proj", False) else None,
        mask_ratio=mask_ratio,
        masking=masking,
        **fields,
    )


_SECTIONED = re.compile(r"(cfg[/.])?(model|task|criterion)[/.]")  # flat keys such as cfg/model/encoder_layers


def _options(cfg: Any) -> dict[str, Any]:
    """Official name -> value of the options that matter, from any of the accepted forms."""

    def as_mapping(value: Any) -> Mapping[str, Any] | None:
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        return value if isinstance(value, Mapping) else None

    top = as_mapping(cfg)
    if top is None:
        raise ValueError(f"expected the official options by name, got {describe(cfg)}")
    top = as_mapping(top.get("cfg")) or top
    sections = [top]  # in old flat options, "model", "task" and "criterion" are absent or strings
    if any(as_mapping(top.get(section)) is not None for section in ("model", "task", "criterion")):
        sections = []
        for section in ("model", "task", "criterion"):
            value = top.get(section)
            if (mapping := as_mapping(value)) is not None:
                sections.append(mapping)
            elif value is not None:
                raise ValueError(f"expected section {section} to hold options by name, got {describe(value)}")
    elif any(isinstance(key, str) and _SECTIONED.match(key) for key in top):
        sections = [{_SECTIONED.sub("", key): value for key, value in top.items() if _SECTIONED.match(key)}]
    patch_options = [f"ast_kernel_{quantity}_{axis}" for quantity in ("size", "stride") for axis in ("time", "chan")]
    names = [*_FIELDS, *_FIXED, *patch_options, "use_post_enc_proj", "mask_type", "random_mask_prob"]
    # Read one by one: a section may hold mandatory values that OmegaConf refuses to show.
    return {name: section[name] for section in sections for name in names if name in section}


def convert_state_dict(state_dict: Mapping[str, Tensor], config: MAEASTConfig) -> dict[str, Tensor]:
    """Convert the official parameters to ours.

    Args:
        state_dict: Official name -> tensor, complete, with or without the sinusoid tables.
        config: Result of ``fairseq_config`` for the same checkpoint's options.

    Returns:
        Our name -> tensor, floating-point ones in fp32 (they may share memory with ``state_dict``). The file's own
        sinusoid tables are kept as ``encoder_positions.table`` and ``decoder_positions.table``, (n, D) each, only where
        they differ from ``sinusoid(n, D)``. An fp16 run's do: its weights were trained with the rounded table.

    Raises:
        ValueError: Keys are missing or unexpected, or tensors have the wrong shape or dtype. The message lists all.
    """
    layout = _layout(config)
    tables = {
        "encoder_positions.table": ("enc_sine_pos_embed.pe", config.embed_dim),
        "decoder_positions.table": ("dec_sine_pos_embed.pe", config.decoder_embed_dim),
    }
    expected = {name: shape for official in layout.values() for name, shape in official.items()}
    accepted = {*expected, *_UNUSED, *(name for name, _ in tables.values())}
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in accepted]
    for name, shape in expected.items():
        if name in state_dict and not isinstance(state_dict[name], Tensor):
            problems.append(f"{name} is {describe(state_dict[name])}, expected a tensor")
        elif name in state_dict and tuple(state_dict[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}")
        elif name in state_dict and shape and not state_dict[name].is_floating_point():
            problems.append(f"{name} has dtype {state_dict[name].dtype}, expected floating point")
    for name, width in tables.values():
        shape = tuple(state_dict[name].shape) if name in state_dict else (1, 1, width)
        if len(shape) != 3 or shape != (1, max(shape[1], 1), width):
            problems.append(f"{name} has shape {shape}, expected (1, tokens, {width})")
    if problems:
        raise ValueError(f"the official state dict does not fit the configuration: {'; '.join(problems)}")

    converted = {
        ours: torch.cat([state_dict[name] for name in official])
        if len(official) > 1
        else state_dict[next(iter(official))]
        for ours, official in layout.items()
    }
    for ours, (name, width) in tables.items():
        if name in state_dict:
            table = state_dict[name][0].float()
            if not torch.equal(table, sinusoid(table.shape[0], width, device=table.device)):
                converted[ours] = table
    return {
        name: value.long() if name.endswith("num_batches_tracked") else value.float()
        for name, value in converted.items()
    }


def _layout(config: MAEASTConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our name -> official name -> shape of the tensors that it concatenates along the first axis."""
    layout: dict[str, dict[str, tuple[int, ...]]] = {}

    def affine(ours: str, official: list[str], *shape: int) -> None:
        layout[f"{ours}.weight"] = {f"{name}.weight": shape for name in official}
        layout[f"{ours}.bias"] = {f"{name}.bias": shape[:1] for name in official}

    # Both order a patch's values by t * kf + f: the official code's Unfold takes (time, frequency) kernels.
    patch_dim, dim, decoder_dim = config.patch_dim, config.embed_dim, config.decoder_embed_dim
    affine("patch_embed", ["post_extract_proj"], dim, patch_dim)
    for stack, num_layers, d in (
        ("encoder", config.encoder_layers, dim),
        ("decoder", config.decoder_layers, decoder_dim),
    ):
        affine(f"{stack}.norm", [f"{stack}.layer_norm"], d)
        for index in range(num_layers):
            layer = f"{stack}.layers.{index}"
            affine(f"{layer}.qkv", [f"{layer}.self_attn.{name}_proj" for name in "qkv"], d, d)
            affine(f"{layer}.out_proj", [f"{layer}.self_attn.out_proj"], d, d)
            affine(f"{layer}.attn_norm", [f"{layer}.self_attn_layer_norm"], d)
            affine(f"{layer}.fc1", [f"{layer}.fc1"], config.ffn_dim, d)
            affine(f"{layer}.fc2", [f"{layer}.fc2"], d, config.ffn_dim)
            affine(f"{layer}.ffn_norm", [f"{layer}.final_layer_norm"], d)
    if config.has_projection:
        affine("encoder_projection", ["post_enc_proj"], decoder_dim, dim)
    layout["mask_token"] = {"decoder_mask_emb": (decoder_dim,)}
    affine("head", ["final_proj_reconstruction", "final_proj_classification"], patch_dim, decoder_dim)
    for name, shape in (("running_mean", (1,)), ("running_var", (1,)), ("num_batches_tracked", ())):
        layout[f"input_norm.{name}"] = {f"batch_norm.{name}": shape}
    return layout
