"""The upstream for s3prl: its features and their number, by itself and inside the real toolkit."""

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
LENGTHS = [16000, 9123, 27000, 700]
KINDS = {"patch": ((16, 16), "chunk"), "frame": ((2, 128), "random")}


def make_model(patch_size: tuple[int, int] = (16, 16), masking: str = "random", **fields) -> MAEAST:
    torch.manual_seed(0)
    small = {"embed_dim": 16, "ffn_dim": 32, "num_heads": 2, "encoder_layers": 3}
    config = MAEASTConfig(patch_size=patch_size, masking=masking, decoder_embed_dim=16, **{**small, **fields})
    model = MAEAST(config).eval()
    # Statistics as training leaves them: with those of an untrained model every clip would look like a constant.
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    return model


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(*KINDS[request.param]).save_pretrained(folder)
    return folder


def waves(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def extracted(model: MAEAST, wave: torch.Tensor) -> list[torch.Tensor]:
    """(tokens, D) of every layer, of the clip alone."""
    with torch.no_grad():
        return [state[0] for state in model.extract_features(*model.features(wave[None])).hidden_states]


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_features_match_extract_features(kind):
    model = make_model(*KINDS[kind])
    upstream = Upstream(make_model(*KINDS[kind])).eval()
    with torch.no_grad():
        found = upstream(waves(LENGTHS))
        batch = torch.nn.utils.rnn.pad_sequence(waves(LENGTHS), batch_first=True)
        expected = model.extract_features(*model.features(batch, LENGTHS))
    assert len(found["hidden_states"]) == 3
    assert found["hidden_states"][-1].shape == found["last_hidden_state"].shape
    for i, samples in enumerate(LENGTHS):
        tokens, vectors = int(expected.lengths[i]), -(-samples // 320)
        rows = min(tokens, vectors)
        assert rows >= vectors - 2
        for state, wanted in zip(found["hidden_states"], expected.hidden_states, strict=True):
            assert torch.equal(state[i, :rows], wanted[i, :rows])
            assert (state[i, rows:vectors] == wanted[i, tokens - 1]).all(), "the last token is repeated"
        assert torch.equal(found["last_hidden_state"][i, :rows], expected.last_hidden_state[i, :rows])


@pytest.mark.parametrize("patch_size", [(16, 16), (2, 128), (16, 128), (16, 64), (8, 16), (4, 32)])
def test_upstream_vector_count_matches_rate_at_every_length(patch_size):
    """What s3prl.nn counts, and within 1 of what s3prl.upstream does, which accepts 4."""
    upstream = Upstream(make_model(patch_size, embed_dim=4, ffn_dim=4, num_heads=1, encoder_layers=1)).eval()
    rate = upstream.get_downsample_rates("hidden_states")
    assert type(rate) is int
    assert rate * 128 // patch_size[1] == patch_size[0] * 160
    grid = patch_size[0] * 160
    for samples in [*range(100, 800 + 2 * grid, 79), *range(160_000, 160_000 + grid, 79)]:
        with torch.no_grad():
            vectors = upstream([torch.zeros(samples)])["hidden_states"][0].shape[1]
        assert vectors == len(range(0, samples, rate)), samples
        assert abs(vectors - round(samples / rate)) <= 1, samples


def test_upstream_paper_models_have_rate_320():
    assert Upstream(make_model((16, 16))).get_downsample_rates("hidden_states") == 2560 // 8 == 320
    assert Upstream(make_model((2, 128))).get_downsample_rates("last_hidden_state") == 320


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_batched_clip_matches_clip_alone(kind):
    upstream = Upstream(make_model(*KINDS[kind])).eval()
    lengths = [2560 * k + extra for k in (1, 3) for extra in (0, 239, 240, 399, 400, 1000)] + [300, 399, 30_000]
    with torch.no_grad():
        together = upstream(waves(lengths))["last_hidden_state"]
        for wave, row in zip(waves(lengths), together, strict=True):
            (alone,) = upstream([wave])["last_hidden_state"]
            assert len(alone) == -(-len(wave) // 320)
            assert_rounding(row[: len(alone)], alone, f"{len(wave)} samples")


def test_upstream_training_updates_encoder_and_keeps_statistics():
    upstream = Upstream(make_model(encoder_layerdrop=0.9)).train()
    norm, before = upstream.model.input_norm, upstream.model.input_norm.running_mean.clone()
    first, second = (upstream(waves(LENGTHS))["hidden_states"] for _ in range(2))
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
        assert torch.equal(*(upstream(waves(LENGTHS))["last_hidden_state"] for _ in range(2)))


def test_torch_hub_checkout_loads_upstream(checkpoint):
    for entry in ("mae_ast_fast", "mae_ast_fast_local"):
        upstream = torch.hub.load(str(ROOT), entry, source="local", ckpt=str(checkpoint))
        assert not upstream.training
        (wave,) = waves([8000])
        with torch.no_grad():
            found = [state[0] for state in upstream([wave])["hidden_states"]]
        for state, expected in zip(found, extracted(MAEAST.from_pretrained(checkpoint), wave), strict=True):
            rows = min(len(state), len(expected))
            assert rows >= 24 and torch.equal(state[:rows], expected[:rows])


def test_upstream_invalid_input_is_rejected(tmp_path):
    upstream = Upstream(make_model())
    for wrong in ([], [torch.zeros(1, 1000)], [[0.0] * 1000]):
        with pytest.raises(ValueError, match="wavs must be a list of 1-D tensors"):
            upstream(wrong)
    with pytest.raises(ValueError, match="whole number of samples a vector, got 160 / 128"):
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

    s3prl 0.4.18 asks torchaudio at import for two names that torchaudio 2.9 took away (s3prl issue 575), for upstreams
    that are not ours. Stand-ins for them are all that is changed.
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
    for lengths in (LENGTHS, [1037, 400], [900], [16001]):
        batch = torch.nn.utils.rnn.pad_sequence(waves(lengths), batch_first=True)
        with torch.no_grad():
            states, counts = upstream(batch, torch.tensor(lengths))
            mixed, mixed_counts = Featurizer(upstream)(states, counts)
        assert mixed_counts.tolist() == counts[0].tolist() == [-(-samples // 320) for samples in lengths]
        assert mixed.shape == (len(lengths), max(counts[0]), 16)
        for i, wave in enumerate(waves(lengths)):
            for state, expected in zip(states, extracted(model, wave), strict=True):
                rows = min(int(counts[0][i]), len(expected))
                assert rows >= counts[0][i] - 2
                assert_rounding(state[i, :rows], expected[:rows], f"{lengths[i]} samples")


def test_s3prl_upstream_accepts_every_length(hub, checkpoint):
    from s3prl.upstream.interfaces import Featurizer

    upstream = hub.mae_ast_fast(ckpt=str(checkpoint), model_config=None, refresh=False)
    featurizer = Featurizer(upstream, "hidden_states", upstream_device="cpu")
    assert (featurizer.output_dim, featurizer.downsample_rate, featurizer.layer_num) == (16, 320, 3)
    for samples in range(16000, 16000 + 2560, 111):
        batch = waves([samples, 8000])
        with torch.no_grad():
            found = featurizer(batch, upstream(batch))  # asserts their number
        assert [len(rows) for rows in found] == [round(samples / 320), 25]


def test_s3prl_fine_tuning_updates_encoder_only(hub, checkpoint):
    from s3prl.nn import Featurizer, MeanPoolingLinear, S3PRLUpstream
    from s3prl.nn.upstream import UpstreamDownstreamModel

    upstream = S3PRLUpstream("mae_ast_fast", path_or_url=str(checkpoint))
    model = UpstreamDownstreamModel(upstream, Featurizer(upstream), MeanPoolingLinear(16, 4, 8), True).train()
    encoder = upstream.upstream.model
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    batch = torch.nn.utils.rnn.pad_sequence(waves(LENGTHS), batch_first=True)
    scores = model(batch, torch.tensor(LENGTHS))
    torch.nn.functional.cross_entropy(scores, torch.arange(4)).backward()
    optimiser.step()
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"patch_embed.weight", "encoder.layers.0.qkv.weight", "encoder.layers.2.fc2.weight"} <= changed
    assert not any(name.startswith("input_norm") for name in changed)
