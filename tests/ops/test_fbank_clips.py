"""Lists of clips: each is scaled by its own dtype, wherever a list is taken; and floats on the scale of integers."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, fbank
from mae_ast_fast.ops.fbank import pad_clips
from mae_ast_fast.s3prl import Upstream

FBANK = importlib.import_module("mae_ast_fast.ops.fbank")  # the package's fbank is the function
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16)


@pytest.fixture(autouse=True)
def not_yet_warned() -> Iterator[None]:
    FBANK._warn_of_scale.cache_clear()
    yield
    FBANK._warn_of_scale.cache_clear()


def clip(dtype: torch.dtype, num_samples: int = 4000) -> Tensor:
    """Noise whose samples have six bits, so that every dtype holds them exactly."""
    steps = torch.randint(-32, 32, (num_samples,), generator=torch.Generator().manual_seed(num_samples))
    return (steps * 512).short() if dtype == torch.int16 else (steps / 64).to(dtype)


@pytest.mark.parametrize("frontend", ["mae_ast", "ssast"])
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)))
def test_fbank_list_of_two_dtypes_scales_each_as_alone(dtypes, frontend):
    clips = [clip(dtypes[0], 4000), clip(dtypes[1], 2500)]
    log_mel, frames = fbank(clips, frontend=frontend)
    assert log_mel.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for features, count, samples in zip(log_mel, frames.tolist(), clips, strict=True):
        exact = samples.to(log_mel.dtype) / (32768 if samples.dtype == torch.int16 else 1)
        assert torch.equal(features[:count], fbank(exact[None], frontend=frontend)[0][0])


def test_fbank_list_of_one_dtype_equals_padded_batch():
    for dtype in DTYPES:
        clips = [clip(dtype, n) for n in (4000, 0, 399, 2500)]
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        assert pad_clips(clips)[0].dtype == dtype  # int16 stays half as large until it is used
        for ours, expected in zip(fbank(clips), fbank(padded, [4000, 0, 399, 2500]), strict=True):
            assert torch.equal(ours, expected)


def test_fbank_list_at_other_sample_rate_equals_clips_alone():
    pytest.importorskip("torchaudio", reason="resampling needs torchaudio")
    clips = [clip(torch.float32), clip(torch.int16)]
    (first, second), _ = fbank(clips, sample_rate=8000)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    "clips, message",
    [
        ([torch.zeros(1000), torch.zeros(1000, dtype=torch.int32)], "floating dtype or int16, got torch.int32"),
        ([torch.zeros(1000), torch.zeros(1000, dtype=torch.uint8)], "floating dtype or int16, got torch.uint8"),
        ([torch.zeros(1000), torch.zeros(1, 1000)], r"\(S,\), got \[\(1000,\), \(1, 1000\)\]"),
        ([torch.zeros(1000), torch.zeros(1000, device="meta")], "on one device, got cpu and meta"),
        ([torch.zeros(1000), np.zeros(1000)], "a tensor, or a list of tensors, of a floating dtype or int16, got list"),
        ([], "or a list of tensors, of .* got list"),
    ],
)
def test_fbank_wrong_list_raises(clips, message):
    with pytest.raises(ValueError, match=message):
        fbank(clips)


def test_fbank_list_with_lengths_raises():
    with pytest.raises(ValueError, match="lengths must be None for a list"):
        fbank([torch.zeros(1000)], [900])


@pytest.mark.parametrize("model", ["mae_ast", "ssast"])
def test_features_of_mixed_list_equal_clips_alone(model):
    sizes = {"embed_dim": 8, "num_heads": 1}
    if model == "ssast":
        encoder = SSAST(SSASTConfig(**sizes, layers=1)).eval()
    else:
        encoder = MAEAST(MAEASTConfig(**sizes, ffn_dim=8, encoder_layers=1, decoder_layers=0)).eval()
    (first, second), _ = encoder.features([clip(torch.float32), clip(torch.int16)])
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtypes", list(itertools.permutations((torch.float32, torch.int16, torch.float16), 2)))
def test_upstream_mixed_list_gives_equal_vectors(dtypes):
    torch.manual_seed(0)
    config = MAEASTConfig(embed_dim=8, num_heads=1, ffn_dim=8, encoder_layers=1, decoder_layers=0)
    upstream = Upstream(MAEAST(config)).eval()
    first, second = upstream([clip(dtype) for dtype in dtypes])["last_hidden_state"]
    assert torch.equal(first, second) and first.std() > 0
    with pytest.raises(ValueError, match="on one device"):
        upstream([torch.zeros(1000), torch.zeros(1000, device="meta")])


@pytest.mark.parametrize("kind", ["numpy", "tensor", "list"])
@pytest.mark.parametrize("dtypes", list(itertools.permutations(("float32", "int16", "float64", "float16"), 2)))
def test_extractor_mixed_list_gives_equal_features(dtypes, kind):
    hf = pytest.importorskip("mae_ast_fast.hf", reason="transformers is not installed")
    clips = [clip(getattr(torch, dtype)) for dtype in dtypes]
    if kind == "numpy":
        clips = [samples.numpy() for samples in clips]
    elif kind == "list":  # Python's floats beside an array of int16
        clips = [samples.tolist() if samples.is_floating_point() else samples.numpy() for samples in clips]
    first, second = hf.MAEASTFeatureExtractor()(clips, sampling_rate=16000, return_tensors="pt").input_features
    assert torch.equal(first, second) and first.std() > 0


def scale_warnings(*calls: Tensor | list[Tensor], lengths: list[int] | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for waveforms in calls:
            fbank(waveforms, lengths)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_fbank_floats_on_scale_of_int16_warn_once_and_name_it():
    large = clip(torch.int16).float()
    (message,) = scale_warnings(large[None], large[None], [large, clip(torch.int16)])
    peak = float(large.abs().max())
    assert message.startswith(f"waveforms reach {peak:.6g}, but floats are taken as samples in [-1, 1]")
    assert "32768" in message and "int16" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fbank_other_floats_on_scale_of_int16_warn(dtype):
    assert len(scale_warnings([clip(torch.float32), clip(torch.int16).to(dtype)])) == 1


def test_fbank_usual_waveforms_do_not_warn():
    overshoot, unit_variance = clip(torch.float32) * 4, torch.randn(16000, generator=torch.Generator().manual_seed(0))
    clips = [overshoot, unit_variance, clip(torch.int16), torch.full((1000,), torch.nan), torch.zeros(0)]
    assert scale_warnings(clips, torch.zeros(0, 1000), torch.zeros(2, 0)) == []


def test_fbank_values_past_the_length_do_not_warn():
    waveforms = torch.cat([clip(torch.float32), torch.full((500,), 1e6)])[None]
    assert scale_warnings(waveforms, lengths=[4000]) == []
    assert len(scale_warnings(waveforms, lengths=[4001])) == 1
