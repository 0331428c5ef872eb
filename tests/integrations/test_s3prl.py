"""The upstream for s3prl: its features and their number, alone and inside the real toolkit."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from policy import assert_rounding

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig
from mae_ast_fast.integrations.s3prl import Upstream, mae_ast_fast, mae_ast_fast_local, register

ROOT = Path(__file__).parent.parent.parent
NUM_SAMPLES = [16000, 9123, 27000, 700]
MODEL_FIELDS = {
    "patch": {"patch_size": (16, 16), "masking": "chunk"},
    "frame": {"patch_size": (2, 128), "masking": "random"},
}


def make_model(patch_size: tuple[int, int] = (16, 16), masking: str = "random", **fields) -> MAEAST:
    torch.manual_seed(0)
    small = {"embed_dim": 16, "ffn_dim": 32, "num_heads": 2, "encoder_layers": 3}
    config = MAEASTConfig(patch_size=patch_size, masking=masking, decoder_embed_dim=16, **{**small, **fields})
    model = MAEAST(config).eval()
    # Statistics as after training: with those of an untrained model every clip would look constant.
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    return model


@pytest.fixture(scope="module", params=MODEL_FIELDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(**MODEL_FIELDS[request.param]).save_pretrained(folder)
    return folder


def waves(num_samples: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(count, generator=generator) for count in num_samples]


def extracted(model: MAEAST, wave: torch.Tensor) -> list[torch.Tensor]:
    """(num_tokens, D) of every layer, from the clip alone."""
    with torch.no_grad():
        log_mel, num_frames = model.features(wave[None])
        return [state[0] for state in model.extract_features(log_mel, num_frames).hidden_states]


@pytest.mark.parametrize("family", MODEL_FIELDS)
def test_upstream_features_match_extract_features(family):
    model = make_model(**MODEL_FIELDS[family])
    upstream = Upstream(make_model(**MODEL_FIELDS[family])).eval()
    with torch.no_grad():
        output = upstream(waves(NUM_SAMPLES))
        batch = torch.nn.utils.rnn.pad_sequence(waves(NUM_SAMPLES), batch_first=True)
        log_mel, num_frames = model.features(batch, NUM_SAMPLES)
        expected = model.extract_features(log_mel, num_frames)
    assert len(output["hidden_states"]) == 3
    assert output["hidden_states"][-1].shape == output["last_hidden_state"].shape
    for i, num_samples in enumerate(NUM_SAMPLES):
        num_tokens, num_vectors = int(expected.lengths[i]), -(-num_samples // 320)
        num_common = min(num_tokens, num_vectors)
        assert num_common >= num_vectors - 2
        for state, expected_state in zip(output["hidden_states"], expected.hidden_states, strict=True):
            assert torch.equal(state[i, :num_common], expected_state[i, :num_common])
            assert (state[i, num_common:num_vectors] == expected_state[i, num_tokens - 1]).all(), (
                "the last token is repeated"
            )
        assert torch.equal(output["last_hidden_state"][i, :num_common], expected.last_hidden_state[i, :num_common])


@pytest.mark.parametrize("patch_size", [(16, 16), (2, 128), (16, 128), (16, 64), (8, 16), (4, 32)])
def test_upstream_vector_count_matches_rate_at_every_length(patch_size):
    """The count of s3prl.nn, and within 1 of that of s3prl.upstream, which accepts 4."""
    upstream = Upstream(make_model(patch_size, embed_dim=4, ffn_dim=4, num_heads=1, encoder_layers=1)).eval()
    rate = upstream.get_downsample_rates("hidden_states")
    assert type(rate) is int
    assert rate * 128 // patch_size[1] == patch_size[0] * 160
    step = patch_size[0] * 160
    for num_samples in [*range(100, 800 + 2 * step, 79), *range(160_000, 160_000 + step, 79)]:
        with torch.no_grad():
            num_vectors = upstream([torch.zeros(num_samples)])["hidden_states"][0].shape[1]
        assert num_vectors == len(range(0, num_samples, rate)), num_samples
        assert abs(num_vectors - round(num_samples / rate)) <= 1, num_samples


def test_upstream_paper_models_have_rate_320():
    assert Upstream(make_model((16, 16))).get_downsample_rates("hidden_states") == 2560 // 8 == 320
    assert Upstream(make_model((2, 128))).get_downsample_rates("last_hidden_state") == 320


@pytest.mark.parametrize("family", MODEL_FIELDS)
def test_upstream_batched_clip_matches_clip_alone(family):
    upstream = Upstream(make_model(**MODEL_FIELDS[family])).eval()
    num_samples = [2560 * k + extra for k in (1, 3) for extra in (0, 239, 240, 399, 400, 1000)] + [300, 399, 30_000]
    with torch.no_grad():
        batched = upstream(waves(num_samples))["last_hidden_state"]
        for wave, vectors in zip(waves(num_samples), batched, strict=True):
            (alone,) = upstream([wave])["last_hidden_state"]
            assert len(alone) == -(-len(wave) // 320)
            assert_rounding(vectors[: len(alone)], alone, f"{len(wave)} samples")


def test_upstream_training_updates_encoder_and_keeps_statistics():
    upstream = Upstream(make_model(encoder_layerdrop=0.9)).train()
    norm, before = upstream.model.input_norm, upstream.model.input_norm.running_mean.clone()
    first, second = (upstream(waves(NUM_SAMPLES))["hidden_states"] for _ in range(2))
    assert not torch.equal(first[-1], second[-1]), "no dropout in training"
    for k in range(1, 3):
        assert not torch.equal(first[k], first[k - 1]), "a layer was skipped"
    sum(state.square().sum() for state in first).backward()
    encoder = [upstream.model.patch_embed, upstream.model.encoder]
    for parameter in (p for module in encoder for p in module.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert upstream.model.patch_embed.weight.grad.any()
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 0
    upstream.eval()
    with torch.no_grad():
        first, second = (upstream(waves(NUM_SAMPLES))["last_hidden_state"] for _ in range(2))
    assert torch.equal(first, second)


def test_torch_hub_checkout_loads_upstream(checkpoint):
    for entry in ("mae_ast_fast", "mae_ast_fast_local"):
        upstream = torch.hub.load(str(ROOT), entry, source="local", ckpt=str(checkpoint))
        assert not upstream.training
        (wave,) = waves([8000])
        with torch.no_grad():
            states = [state[0] for state in upstream([wave])["hidden_states"]]
        for state, expected in zip(states, extracted(MAEAST.from_pretrained(checkpoint), wave), strict=True):
            num_common = min(len(state), len(expected))
            assert num_common >= 24 and torch.equal(state[:num_common], expected[:num_common])


def test_upstream_invalid_input_is_rejected(tmp_path):
    upstream = Upstream(make_model())
    for wrong in ([], [torch.zeros(1, 1000)], [[0.0] * 1000]):
        with pytest.raises(ValueError, match="wavs must be a list of 1-D tensors"):
            upstream(wrong)
    with pytest.raises(ValueError, match="whole number of samples per vector, got 160 / 128"):
        Upstream(make_model((1, 1)))
    with pytest.raises(ValueError, match="needs a checkpoint"):
        mae_ast_fast()
    with pytest.raises(ValueError, match="no checkpoint at"):
        mae_ast_fast_local("owner/name")
    SSAST(SSASTConfig(embed_dim=32, num_heads=2, layers=1, mask_patches=10)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="s3prl needs a MAE-AST checkpoint, got ssast"):
        mae_ast_fast(tmp_path)


# ----------------------------------------------------------------------------------------------- inside the real s3prl


@pytest.fixture(scope="module")
def hub():
    """s3prl's hub with our entries.

    At import, s3prl 0.4.18 needs two names that torchaudio 2.9 removed (s3prl issue 575), for upstreams other than
    ours. Stand-ins replace these two names and nothing else.
    """
    pytest.importorskip("s3prl", reason="s3prl is not installed: pip install s3prl")
    torchaudio = pytest.importorskip("torchaudio")
    effects = types.ModuleType("torchaudio.sox_effects")
    effects.apply_effects_tensor = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchaudio, "set_audio_backend", lambda name: None, raising=False)
        patch.setitem(sys.modules, "torchaudio.sox_effects", effects)
        from s3prl import hub
    register()
    return hub


def test_register_adds_entries_to_hub(hub):
    assert {"mae_ast_fast", "mae_ast_fast_local", "mae_ast_local", "hubert"} <= set(hub.options())


@pytest.mark.parametrize("entry", ["mae_ast_fast", "mae_ast_fast_local"])
def test_s3prl_nn_upstream_returns_features_and_lengths(hub, checkpoint, entry):
    from s3prl.nn import Featurizer, S3PRLUpstream

    upstream = S3PRLUpstream(entry, path_or_url=str(checkpoint)).eval()
    assert upstream.num_layers == 3
    assert upstream.hidden_sizes == [16] * 3 and upstream.downsample_rates == [320] * 3
    model = MAEAST.from_pretrained(checkpoint)
    for num_samples in (NUM_SAMPLES, [1037, 400], [900], [16001]):
        batch = torch.nn.utils.rnn.pad_sequence(waves(num_samples), batch_first=True)
        with torch.no_grad():
            states, num_vectors = upstream(batch, torch.tensor(num_samples))
            mixed, mixed_num_vectors = Featurizer(upstream)(states, num_vectors)
        expected_num_vectors = [-(-count // 320) for count in num_samples]
        assert mixed_num_vectors.tolist() == num_vectors[0].tolist() == expected_num_vectors
        assert mixed.shape == (len(num_samples), max(num_vectors[0]), 16)
        for i, wave in enumerate(waves(num_samples)):
            for state, expected in zip(states, extracted(model, wave), strict=True):
                num_common = min(int(num_vectors[0][i]), len(expected))
                assert num_common >= num_vectors[0][i] - 2
                assert_rounding(state[i, :num_common], expected[:num_common], f"{num_samples[i]} samples")


def test_s3prl_upstream_accepts_every_length(hub, checkpoint):
    from s3prl.upstream.interfaces import Featurizer

    upstream = hub.mae_ast_fast(ckpt=str(checkpoint), model_config=None, refresh=False)
    featurizer = Featurizer(upstream, "hidden_states", upstream_device="cpu")
    assert (featurizer.output_dim, featurizer.downsample_rate, featurizer.layer_num) == (16, 320, 3)
    for num_samples in range(16000, 16000 + 2560, 111):
        batch = waves([num_samples, 8000])
        with torch.no_grad():
            features = featurizer(batch, upstream(batch))  # asserts the number of vectors
        assert [len(vectors) for vectors in features] == [round(num_samples / 320), 25]


def test_s3prl_fine_tuning_updates_encoder_only(hub, checkpoint):
    from s3prl.nn import Featurizer, MeanPoolingLinear, S3PRLUpstream
    from s3prl.nn.upstream import UpstreamDownstreamModel

    upstream = S3PRLUpstream("mae_ast_fast", path_or_url=str(checkpoint))
    model = UpstreamDownstreamModel(upstream, Featurizer(upstream), MeanPoolingLinear(16, 4, 8), True).train()
    encoder = upstream.upstream.model
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = torch.nn.utils.rnn.pad_sequence(waves(NUM_SAMPLES), batch_first=True)
    scores = model(batch, torch.tensor(NUM_SAMPLES))
    torch.nn.functional.cross_entropy(scores, torch.arange(4)).backward()
    optimizer.step()
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"patch_embed.weight", "encoder.layers.0.qkv.weight", "encoder.layers.2.fc2.weight"} <= changed
    assert not any(name.startswith("input_norm") for name in changed)
