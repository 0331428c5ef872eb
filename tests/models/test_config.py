"""MAEASTConfig: defaults of the public interface, presets, and errors that name the expected and the actual value."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest
import torch

from mae_ast_fast import MAEASTConfig, SSASTConfig

CONTRACT = {  # the public interface, in its order
    "num_mel_bins": 128,
    "patch_size": (16, 16),
    "embed_dim": 768,
    "ffn_dim": 3072,
    "num_heads": 12,
    "encoder_layers": 12,
    "decoder_embed_dim": 768,
    "decoder_layers": 2,
    "norm_first": False,
    "encoder_projection": None,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "input_dropout": 0.1,
    "encoder_layerdrop": 0.05,
    "decoder_layerdrop": 0.0,
    "mask_ratio": 0.75,
    "masking": "chunk",
    "reconstruction_weight": 10.0,
    "classification_weight": 1.0,
    "norm_pix_loss": False,
    "positions": "sinusoid",
    "prediction_stride": 1,
    "temperature": None,
}


def test_config_fields_and_defaults_match_contract() -> None:
    parameters = inspect.signature(MAEASTConfig).parameters
    defaults = {**CONTRACT, "masking": None}  # it follows patch_size
    assert [(name, p.default) for name, p in parameters.items()] == list(defaults.items())
    assert dataclasses.asdict(MAEASTConfig()) == CONTRACT
    assert all(type(getattr(MAEASTConfig(), name)) is type(value) for name, value in CONTRACT.items())


PRESETS = {  # name -> width, ffn, heads, encoder layers
    "base": (768, 3072, 12, 12),
    "base_6layer": (768, 3072, 12, 6),
    "small": (384, 1536, 6, 12),
    "tiny": (192, 768, 3, 12),
}


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("patch", ["patch", "frame"])
def test_preset_has_expected_fields(patch: str, size: str) -> None:
    width, ffn_dim, num_heads, layers = PRESETS[size]
    expected = {
        **CONTRACT,
        "patch_size": (16, 16) if patch == "patch" else (2, 128),
        "masking": "chunk" if patch == "patch" else "random",
        "embed_dim": width,
        "decoder_embed_dim": width,
        "ffn_dim": ffn_dim,
        "num_heads": num_heads,
        "encoder_layers": layers,
        "decoder_layers": 2,
    }
    assert dataclasses.asdict(MAEASTConfig.preset(f"{patch}_{size}")) == expected


def test_preset_patch_base_equals_default_config() -> None:
    assert MAEASTConfig.preset("patch_base") == MAEASTConfig()


def test_preset_accepts_overrides_and_rejects_unknown_names() -> None:
    assert sorted(MAEASTConfig.preset_names()) == sorted(
        f"{patch}_{size}" for patch in ("patch", "frame") for size in PRESETS
    )
    changed = MAEASTConfig.preset("frame_tiny", dropout=0.0, masking="span")
    assert (changed.dropout, changed.masking, changed.embed_dim) == (0.0, "span", 192)
    with pytest.raises(ValueError, match=r"patch_base.*frame_tiny.*got 'patch_huge'"):
        MAEASTConfig.preset("patch_huge")
    with pytest.raises(ValueError, match=r"unknown.*droput.*known.*dropout"):
        MAEASTConfig.preset("patch_tiny", droput=0.0)
    with pytest.raises(ValueError, match=r"chunk.*\(2, 128\)"):
        MAEASTConfig.preset("frame_tiny", masking="chunk")


def test_config_dict_round_trips_through_json() -> None:
    config = MAEASTConfig.preset("frame_small", encoder_projection=True, norm_pix_loss=True, mask_ratio=0.8)
    fields = json.loads(json.dumps(config.to_dict()))
    assert list(fields) == list(CONTRACT)
    restored = MAEASTConfig.from_dict(fields)
    assert restored == config
    assert isinstance(restored.patch_size, tuple)
    with pytest.raises(ValueError, match=r"unknown.*depth, width.*known are num_mel_bins"):
        MAEASTConfig.from_dict({**fields, "width": 3, "depth": 1})


def test_config_is_frozen_and_hashable() -> None:
    config = MAEASTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.0
    assert len({config, MAEASTConfig(), MAEASTConfig(dropout=0.0)}) == 2


def test_config_derives_grid_and_patch_sizes() -> None:
    config = MAEASTConfig(num_mel_bins=96, patch_size=[4, 32])  # JSON and YAML bring lists
    assert (config.grid_f, config.patch_dim, config.patch_size) == (3, 128, (4, 32))


@pytest.mark.parametrize(
    ("projection", "decoder_width", "expected"),
    [(None, 768, False), (None, 384, True), (True, 768, True), (True, 384, True), (False, 768, False)],
)
def test_has_projection_only_if_requested_or_widths_differ(
    projection: bool | None, decoder_width: int, expected: bool
) -> None:
    assert MAEASTConfig(encoder_projection=projection, decoder_embed_dim=decoder_width).has_projection is expected


RATES = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "input_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
)
SIZES = ("num_mel_bins", "embed_dim", "ffn_dim", "num_heads", "encoder_layers", "decoder_embed_dim")
FLAGS = ("norm_first", "norm_pix_loss")
WEIGHTS = ("reconstruction_weight", "classification_weight")
WRONG = [
    *[({name: value}, [name, value]) for name in SIZES for value in (0, -3, 8.0, "8", True, None)],
    *[({"decoder_layers": value}, ["decoder_layers", value]) for value in (-1, 1.5, "2", True, None)],
    *[({name: value}, [name, "[0, 1)", value]) for name in RATES for value in (-0.1, 1.0, math.nan, "x", None)],
    *[({"mask_ratio": value}, ["mask_ratio", "(0, 1)", value]) for value in (0.0, 1.0, -0.5, math.nan, "x", None)],
    *[({name: value}, [name, ">= 0", value]) for name in WEIGHTS for value in (-1.0, math.nan, math.inf, "x", None)],
    *[({"patch_size": value}, ["patch_size", value]) for value in ((16,), (16, 16, 1), (0, 16), (16.0, 16), 16, "16")],
    *[({name: value}, [name, value]) for name in FLAGS for value in ("no", 1, None)],
    ({"encoder_projection": "no"}, ["encoder_projection", "no"]),
    ({"patch_size": (16, 24)}, ["num_mel_bins", 24, 128]),
    ({"masking": "blocks"}, ["masking", "random", "chunk", "chunk_official", "span", "time", "frequency", "blocks"]),
    ({"masking": 3}, ["masking", "chunk", 3]),
    *[
        ({"patch_size": (2, 128), "masking": masking}, [masking, "(2, 128)", 128, "random"])
        for masking in ("chunk", "chunk_official", "frequency")
    ],
    ({"embed_dim": 770}, ["embed_dim", "num_heads=12", 770]),
    ({"decoder_embed_dim": 500}, ["decoder_embed_dim", "num_heads=12", 500]),
    ({"embed_dim": 9, "num_heads": 3, "decoder_embed_dim": 6}, ["embed_dim", "even", 9]),
    ({"decoder_embed_dim": 9, "num_heads": 3, "embed_dim": 6}, ["decoder_embed_dim", "even", 9]),
    ({"encoder_projection": False, "decoder_embed_dim": 384}, ["encoder_projection", 768, 384]),
    ({"norm_pix_loss": True, "patch_size": (1, 1)}, ["norm_pix_loss", "2 values", "(1, 1)"]),
    ({"reconstruction_weight": 0.0, "classification_weight": 0.0}, ["reconstruction_weight", "classification_weight"]),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_config_invalid_field_error_names_expected_and_actual(fields: dict, words: list) -> None:
    with pytest.raises(ValueError) as caught:
        MAEASTConfig(**fields)
    for word in words:
        assert str(word) in str(caught.value)


@pytest.mark.parametrize(
    ("patch_size", "masking"), [((2, 128), "random"), ([4, 128], "random"), ((16, 64), "chunk"), ((2, 16), "chunk")]
)
def test_config_default_masking_follows_patch_size(patch_size: tuple[int, int], masking: str) -> None:
    expected = MAEASTConfig(patch_size=patch_size, masking=masking)
    for config in (
        MAEASTConfig(patch_size=patch_size),
        MAEASTConfig(patch_size=patch_size, masking=None),
        MAEASTConfig.preset("patch_base", patch_size=patch_size),
        MAEASTConfig.preset("frame_base", patch_size=patch_size),
        MAEASTConfig.from_dict({"patch_size": list(patch_size)}),
    ):
        assert config == expected and config.to_dict()["masking"] == masking
        assert MAEASTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("masking", ["random", "span", "time"])
def test_config_frame_model_accepts_masking_without_grid(masking: str) -> None:
    assert MAEASTConfig.preset("frame_base", masking=masking).masking == masking


def test_config_zero_weight_or_no_decoder_is_valid() -> None:
    assert MAEASTConfig(reconstruction_weight=0.0).classification_weight == 1.0
    assert MAEASTConfig(classification_weight=0).reconstruction_weight == 10.0
    assert MAEASTConfig(decoder_layers=0).decoder_layers == 0


@pytest.mark.parametrize(
    "config",
    [MAEASTConfig.preset("patch_tiny"), SSASTConfig.preset("patch_tiny")],
    ids=lambda config: type(config).__name__,
)
def test_config_num_tokens_counts_whole_or_started_time_blocks(config):
    assert [config.num_tokens(frames) for frames in (0, 15, 16, 33)] == [0, 0, 8, 16]
    assert [config.num_tokens(frames, count_partial=True) for frames in (0, 15, 16, 33)] == [0, 8, 8, 24]
    assert config.num_tokens(torch.tensor([15, 33])).tolist() == [0, 16]


def test_config_without_positions_means_sinusoid() -> None:
    fields = MAEASTConfig().to_dict()
    del fields["positions"]
    assert MAEASTConfig.from_dict(fields).positions == "sinusoid"


@pytest.mark.parametrize("stride", [0, -1, 1.5, True, "2"])
def test_config_invalid_prediction_stride_raises(stride) -> None:
    with pytest.raises(ValueError, match=f"prediction_stride .* got {stride!r}"):
        MAEASTConfig(prediction_stride=stride)


@pytest.mark.parametrize("temperature", [0, -0.1, float("inf"), float("nan"), True, "0.1"])
def test_config_invalid_temperature_raises(temperature) -> None:
    with pytest.raises(ValueError, match=f"temperature .* got {temperature!r}"):
        MAEASTConfig(temperature=temperature)


def test_config_invalid_positions_raise() -> None:
    with pytest.raises(ValueError, match="positions must be one of sinusoid, sinusoid_2d, got 'learned'"):
        MAEASTConfig(positions="learned")
    widths = {"embed_dim": 16, "decoder_embed_dim": 6, "num_heads": 1}
    with pytest.raises(ValueError, match=r"decoder_embed_dim must be a multiple of 4 for .*, got 6"):
        MAEASTConfig(positions="sinusoid_2d", **widths)
    frame = MAEASTConfig(positions="sinusoid_2d", patch_size=(2, 128), **widths)  # one frequency block
    assert frame.decoder_embed_dim == 6
