"""The export to Hugging Face transformers: features, buffers, padding, classifiers and pipelines, offline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from policy import assert_rounding
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    pipeline,
)

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig
from mae_ast_fast.cli import main
from mae_ast_fast.downstream.classifier import AudioClassifier
from mae_ast_fast.integrations.transformers import MAEASTFeatureExtractor, MAEASTHFConfig, MAEASTHFModel, export
from mae_ast_fast.models.transformer import sinusoid

RATE = 16000
NUM_SAMPLES = [16000, 9123, 27000, 400]
LABELS = ["dog", "rain", "siren"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_model(family: str = "patch", **fields) -> MAEAST:
    torch.manual_seed(0)
    patch_size, masking = {"patch": ((16, 16), "chunk"), "frame": ((2, 128), "random")}[family]
    small = {"embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 3}
    decoder = {"decoder_embed_dim": 32, "decoder_layers": 1}
    model = MAEAST(MAEASTConfig(patch_size=patch_size, masking=masking, **{**small, **decoder, **fields})).eval()
    # Statistics as after training: with those of an untrained model every clip would look constant.
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    model.input_norm.num_batches_tracked.fill_(7)
    return model


def make_classifier(family="patch", *, multi_label=False, layer=None, pool="mean", **fields) -> AudioClassifier:
    classifier = AudioClassifier(
        make_model(family, **fields), LABELS, multi_label=multi_label, layer=layer, pool=pool
    ).eval()
    torch.nn.init.normal_(classifier.head.weight)
    torch.nn.init.normal_(classifier.head.bias)
    return classifier


def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(count)).astype(np.float32) for count in NUM_SAMPLES]


def padded(waves: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms (B, S) with zeros after the shorter ones, and samples of each (B,)."""
    batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    return batch, torch.tensor([len(wave) for wave in waves])


@pytest.mark.parametrize("family", ["patch", "frame"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_automodel_features_equal_extract_features(tmp_path, family, norm_first):
    model = make_model(family, norm_first=norm_first)
    export(model, tmp_path)
    loaded, extractor = AutoModel.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)
    assert not loaded.training
    inputs = extractor(clips(), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        waveforms, num_samples = padded(clips())
        log_mel, num_frames = model.features(waveforms, num_samples)
        expected = model.extract_features(log_mel, num_frames)
        output = loaded(**inputs, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    assert torch.equal(output.token_mask.sum(1), expected.lengths)
    assert not output.last_hidden_state[~output.token_mask].any()
    assert loaded(**inputs).hidden_states is None
    as_tuple = loaded(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], expected.last_hidden_state) and torch.equal(as_tuple[-1], output.token_mask)
    alone = extractor(clips()[1], sampling_rate=RATE, return_tensors="pt")["input_features"]
    num_tokens = expected.lengths[1]
    assert_rounding(loaded(alone).last_hidden_state[0], expected.last_hidden_state[1, :num_tokens], "a clip alone")


@pytest.mark.ci
def test_automodel_fresh_process_loads_offline(tmp_path):
    model = make_model()
    export(model, tmp_path / "e")
    code = """
import sys, torch
import mae_ast_fast.hf
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
log_mel = torch.linspace(-12, 0, 2 * 100 * 128).view(2, 100, 128)
torch.save(model(log_mel).last_hidden_state.detach(), sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "e"), str(tmp_path / "x.pt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=120)
    log_mel = torch.linspace(-12, 0, 2 * 100 * 128).view(2, 100, 128)
    expected = model.extract_features(log_mel).last_hidden_state
    assert torch.equal(torch.load(tmp_path / "x.pt"), expected)


def test_from_pretrained_meta_device_restores_tables_and_statistics(tmp_path):
    model = make_model()
    export(model, tmp_path / "computed")
    loaded = AutoModel.from_pretrained(tmp_path / "computed").model
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.encoder_positions.table, sinusoid(2048, 32))
    for name, tensor in model.input_norm.state_dict().items():
        assert torch.equal(loaded.input_norm.state_dict()[name], tensor), name
        assert tensor != 0
    # A checkpoint without statistics, which this library does not write, gives those of a new model.
    path = tmp_path / "computed" / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if "input_norm" not in name}, path, {"format": "pt"}
    )
    norm = AutoModel.from_pretrained(tmp_path / "computed").model.input_norm
    assert (norm.running_mean, norm.running_var, norm.num_batches_tracked) == (0, 1, 0)
    # A table from the checkpoint, as in the paper's fp16 runs: rounded, and of another length.
    table = sinusoid(300, 32).half().float()
    model.load_state_dict({**model.state_dict(), "encoder_positions.table": table})
    export(model, tmp_path / "stored")
    loaded = AutoModel.from_pretrained(tmp_path / "stored")
    assert torch.equal(loaded.model.encoder_positions.table, table)
    log_mel = torch.randn(2, 100, 128)
    assert torch.equal(loaded(log_mel).last_hidden_state, model.extract_features(log_mel).last_hidden_state)


def test_save_pretrained_after_loading_writes_same_files(tmp_path):
    for name, model in (("encoder", make_model()), ("classifier", make_classifier(multi_label=True, layer=2))):
        first, second = tmp_path / name / "1", tmp_path / name / "2"
        written = export(model, first)
        auto = AutoModel if name == "encoder" else AutoModelForAudioClassification
        auto.from_pretrained(first).save_pretrained(second)
        AutoFeatureExtractor.from_pretrained(first).save_pretrained(second)
        files = ["config.json", "model.safetensors", "preprocessor_config.json"]
        assert sorted(path.name for path in first.iterdir()) == files
        for file in files:
            assert (first / file).read_bytes() == (second / file).read_bytes(), file
        again = auto.from_pretrained(second)
        assert written.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in written.state_dict().items())


def test_config_holds_fields_of_both_libraries(tmp_path):
    model = make_model(dropout=0.25)
    export(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MAEASTHFConfig)
    assert config.encoder.to_dict() == {**model.config.to_dict(), "decoder_layers": 0}
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (32, 64, 3, 2)
    assert config.dropout == 0.25
    with pytest.raises(ValueError, match="num_heads"):
        MAEASTHFConfig(embed_dim=32, num_heads=5)
    # Our own folders have other weight names. Read as one of these, their weights would silently be initialised.
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="mae_ast"):
        AutoModel.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="expected model_type 'mae_ast', got 'mae_ast_fast'"):
        MAEAST.from_pretrained(tmp_path)


def test_config_without_masking_uses_default_of_patches():
    config = MAEASTHFConfig(patch_size=(2, 128))
    assert config.masking == config.encoder.masking == "random"
    assert MAEASTHFConfig.from_dict(config.to_dict()).encoder == config.encoder


def test_automodel_from_config_initialises_model():
    config = MAEASTHFConfig(**make_model().config.to_dict())
    model = AutoModel.from_config(config)
    assert isinstance(model, MAEASTHFModel)
    assert model.config.encoder.decoder_layers == 0 and not hasattr(model.model, "decoder")
    assert torch.equal(model.model.encoder_positions.table, sinusoid(2048, 32))
    assert model(torch.randn(1, 40, 128)).last_hidden_state.isfinite().all()


def test_automodel_bfloat16_weights_match_bfloat16_model(tmp_path):
    model = make_model()
    export(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    waveforms, num_samples = padded(clips())
    log_mel, num_frames = model.features(waveforms, num_samples)
    mask = (torch.arange(log_mel.shape[1]) < num_frames[:, None]).int()
    expected = model.bfloat16().extract_features(log_mel, num_frames).last_hidden_state
    actual = loaded(log_mel, mask).last_hidden_state
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------ feature extractor


def test_extractor_pads_and_masks_batch():
    extractor, model = MAEASTFeatureExtractor(), make_model()
    waveforms, num_samples = padded(clips())
    expected, num_frames = model.features(waveforms, num_samples)
    inputs = extractor(clips(), sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(inputs["input_features"], expected)
    assert torch.equal(inputs["attention_mask"].sum(1), num_frames)
    assert inputs["attention_mask"].dtype == torch.int32
    longer = extractor(clips(), RATE, padding="max_length", max_length=200, return_tensors="np")
    assert longer["input_features"].shape == (4, 200, 128)
    assert not longer["input_features"][:, expected.shape[1] :].any()
    np.testing.assert_array_equal(longer["input_features"][:, : expected.shape[1]], expected.numpy())
    cut = extractor(clips(), RATE, padding="max_length", max_length=50, truncation=True, return_tensors="pt")
    assert torch.equal(cut["input_features"], expected[:, :50])
    assert "attention_mask" not in extractor(clips(), RATE, return_attention_mask=False)
    ragged = extractor(clips(), RATE, padding=False)["input_features"]
    assert [len(log_mel) for log_mel in ragged] == num_frames.tolist()


def test_extractor_accepts_lists_arrays_tensors_and_pcm():
    extractor, wave = MAEASTFeatureExtractor(), clips()[1]
    expected = extractor(wave, RATE, return_tensors="pt")["input_features"]
    assert expected.shape == (1, 55, 128)
    for raw_speech in (wave.tolist(), torch.from_numpy(wave), wave.astype(np.float64), [wave], wave[None]):
        assert torch.equal(extractor(raw_speech, RATE, return_tensors="pt")["input_features"], expected)
    pcm = (wave * 32768).round().astype(np.int16)
    same = extractor(pcm.astype(np.float32) / 32768, RATE, return_tensors="pt")["input_features"]
    assert torch.equal(extractor(pcm, RATE, return_tensors="pt")["input_features"], same)


def test_transformers_invalid_input_is_rejected(tmp_path):
    extractor, wave = MAEASTFeatureExtractor(), clips()[0]
    with pytest.raises(ValueError, match="sampling_rate must be 16000, got 8000"):
        extractor(wave, sampling_rate=8000)
    for wrong in (wave[:399], [wave, wave[:0]], np.zeros((2, 2, 1000), np.float32)):
        with pytest.raises(ValueError, match="raw_speech must be clips"):
            extractor(wrong, sampling_rate=RATE)
    export(make_model(), tmp_path)
    model, log_mel = AutoModel.from_pretrained(tmp_path), torch.randn(2, 40, 128)
    mask = torch.ones(2, 40)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="padding on the right"):
        model(log_mel, mask)
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 40\), got \(2, 39\)"):
        model(log_mel, mask[:, 1:])
    with pytest.raises(ValueError, match=r"already holds config.json, model.safetensors"):
        export(make_model(), tmp_path)
    ssast = SSAST(SSASTConfig(embed_dim=32, num_heads=2, layers=1, input_frames=128, mask_patches=10))
    with pytest.raises(ValueError, match="MAE-AST, got SSAST"):
        export(ssast, tmp_path / "s")
    with pytest.raises(ValueError, match="MAE-AST, got SSAST"):
        export(AudioClassifier(ssast, LABELS, max_seconds=1.0), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("family", ["patch", "frame"])
@pytest.mark.parametrize(("multi_label", "layer", "pool"), [(False, None, "bands"), (True, 2, "mean")])
def test_automodel_for_classification_logits_match_classifier(tmp_path, *, family, multi_label, layer, pool):
    classifier = make_classifier(family, multi_label=multi_label, layer=layer, pool=pool, norm_first=True)
    export(classifier, tmp_path)
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path)
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path)(clips(), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        waveforms, num_samples = padded(clips())
        log_mel, num_frames = classifier.encoder.features(waveforms, num_samples)
        expected = classifier(log_mel, num_frames)
        assert_rounding(loaded(**inputs).logits, expected, "logits")
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {"dog": 0, "rain": 1, "siren": 2}
    problem_type = "multi_label_classification" if multi_label else "single_label_classification"
    assert loaded.config.problem_type == problem_type


@pytest.mark.parametrize("multi_label", [False, True])
def test_pipeline_scores_match_classifier(tmp_path, multi_label):
    classifier = make_classifier(multi_label=multi_label)
    export(classifier, tmp_path)
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    waveforms, num_samples = padded(clips())
    expected = classifier.probabilities(waveforms, num_samples)
    # The first releases of transformers 5 ignore problem_type.
    options = {"function_to_apply": "sigmoid"} if multi_label else {}
    single = [classify(wave, **options) for wave in clips()]
    batched = classify(clips(), batch_size=3, **options)
    for probabilities, *answers_of_clip in zip(expected, single, batched, strict=True):
        for answers in answers_of_clip:
            scores = {answer["label"]: answer["score"] for answer in answers}
            assert_rounding(torch.tensor([scores[label] for label in LABELS]), probabilities, "probabilities")
            assert answers[0]["score"] == max(scores.values())


def test_classification_loss_matches_task_and_trains_encoder(tmp_path):
    export(make_model(dropout=0.0, attention_dropout=0.0, input_dropout=0.0, encoder_layerdrop=0.0), tmp_path)
    waveforms, num_samples = padded(clips())
    log_mel, num_frames = make_model().features(waveforms, num_samples)
    mask = (torch.arange(log_mel.shape[1]) < num_frames[:, None]).int()
    classes, multi_hot = torch.tensor([0, 2, 1, 0]), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    for labels, loss_function in ((classes, F.cross_entropy), (multi_hot, F.binary_cross_entropy_with_logits)):
        model = AutoModelForAudioClassification.from_pretrained(tmp_path, num_labels=3).train()
        before = {name: tensor.clone() for name, tensor in model.mae_ast.model.input_norm.state_dict().items()}
        output = model(log_mel, mask, labels)
        assert torch.equal(output.loss, loss_function(output.logits, labels))
        assert torch.equal(model(log_mel, mask, labels, return_dict=False)[0], output.loss)
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.mae_ast.model.patch_embed.weight.grad.any()
        after = model.mae_ast.model.input_norm.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_encoder_and_classifier_load_each_others_weights(tmp_path):
    model, classifier = make_model(), make_classifier()
    export(model, tmp_path / "encoder")
    export(classifier, tmp_path / "classifier")
    new = AutoModelForAudioClassification.from_pretrained(tmp_path / "encoder", num_labels=5)
    assert new.classifier.weight.shape == (5, 32)
    assert new.classifier.weight.any() and not new.classifier.bias.any()
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    log_mel = torch.randn(2, 100, 128)
    expected = model.extract_features(log_mel).last_hidden_state
    assert torch.equal(new.mae_ast(log_mel).last_hidden_state, expected)
    assert torch.equal(encoder(log_mel).last_hidden_state, expected)


def test_export_command_writes_encoders_and_classifiers(tmp_path, capsys):
    model, classifier = make_model(), make_classifier()
    model.save_pretrained(tmp_path / "m")
    classifier.save_pretrained(tmp_path / "c")
    for name, auto in (("m", AutoModel), ("c", AutoModelForAudioClassification)):
        arguments = ["export", str(tmp_path / name), str(tmp_path / f"{name}_hf")]
        assert main([*arguments, "--format", "transformers"]) == 0
        written = auto.from_pretrained(tmp_path / f"{name}_hf")
        assert f"{sum(p.numel() for p in written.parameters()):,} parameters" in capsys.readouterr().out
        assert main([*arguments, "--format", "transformers"]) == 1
        assert "already holds" in capsys.readouterr().err
    log_mel = torch.randn(2, 100, 128)
    assert torch.equal(written(log_mel).logits, export(classifier, tmp_path / "e")(log_mel).logits)
    assert main([*arguments[:2], str(tmp_path / "x"), "--format", "onnx"]) == 2
    assert json.loads((tmp_path / "m_hf" / "config.json").read_text())["model_type"] == "mae_ast_fast"
    assert not Path(tmp_path / "x").exists()
