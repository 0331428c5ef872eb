"""Probing and fine-tuning: their units, and whole runs on tones that a linear layer separates."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import time_major
from policy import HALF_PROBABILITY, LOGISTIC_GRADIENT, PROBABILITY, assert_rounding
from safetensors import safe_open
from safetensors.torch import save_file
from warm import Command

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, cli
from mae_ast_fast.cli.downstream import task_summary
from mae_ast_fast.downstream import attentive
from mae_ast_fast.downstream.augment import mixup, spec_augment
from mae_ast_fast.downstream.classifier import NORM_EPS, AttentiveHead, AudioClassifier, layer_states
from mae_ast_fast.downstream.finetune import finetune, parameter_groups
from mae_ast_fast.downstream.metrics import average_precisions, bootstrap_ci, score
from mae_ast_fast.downstream.options import FINETUNE_PRESETS, FinetuneOptions, ProbeOptions
from mae_ast_fast.downstream.probe import PENALTIES, fit_logistic, probe
from mae_ast_fast.downstream.report import BaselineSummary, TaskSummary
from mae_ast_fast.downstream.schedule import learning_rate
from mae_ast_fast.models.pooling import pool_tokens
from mae_ast_fast.training.lifecycle import Interrupted
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

soundfile, *_ = (pytest.importorskip(name) for name in ("soundfile", "soxr", "lhotse", "torchmetrics"))
RATE = 16000
PITCHES = {"low": 300, "middle": 900, "high": 2700}
SMALL = {"embed_dim": 32, "num_heads": 2}
pytestmark = pytest.mark.usefixtures("quick_reports")


def mae_ast(dropout: float = 0.0) -> MAEAST:
    torch.manual_seed(0)
    sizes = {"ffn_dim": 64, "encoder_layers": 2, "decoder_embed_dim": 32, "decoder_layers": 1, "norm_first": True}
    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout"), dropout)
    model = MAEAST(MAEASTConfig(**SMALL, **sizes, **rates, encoder_layerdrop=0.0)).eval()
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    return model


def ssast() -> SSAST:
    torch.manual_seed(0)
    return SSAST(SSASTConfig(**SMALL, layers=2, input_frames=256, mask_patches=20, mean=-8.0, std=4.0)).eval()


def tone(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.2 * np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * t) + 0.02 * rng.standard_normal(t.size)
    return wave.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """120 tones, manifests with splits, with folds, with several labels and with moments, and checkpoints."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows, phones = [], []
    for i in range(120):
        label = list(PITCHES)[i % 3]
        soundfile.write(folder / f"{i}.wav", tone(PITCHES[label], rng.uniform(0.3, 1.2), rng), RATE)
        rows.append((f"{i}.wav", label, ["train", "train", "valid", "test"][i // 3 % 4], str(i // 3 % 3)))
    for i in range(8):
        order = rng.permutation(list(PITCHES)).tolist() * 8
        ends = np.cumsum(rng.uniform(0.1, 0.3, len(order)))
        edges = [0.0, *ends]
        tones = [tone(PITCHES[name], b - a, rng) for name, a, b in zip(order, edges[:-1], edges[1:], strict=True)]
        soundfile.write(folder / f"mix{i}.wav", np.concatenate(tones), RATE)
        cells = " ".join(f"{end:.4f}:{name}" for name, end in zip(order, ends, strict=True))
        phones.append((f"mix{i}.wav", ["train", "train", "valid", "test"][i % 4], cells))
    (folder / "broken.wav").write_text("no audio")

    def table(name: str, header: str, lines: list[tuple[str, ...]]) -> None:
        (folder / name).write_text("\n".join([header, *("\t".join(line) for line in lines)]) + "\n")

    table("split.tsv", "path\tlabel\tsplit", [row[:3] for row in rows])
    table("fold.tsv", "path\tlabel\tfold", [(*row[:2], row[3]) for row in rows] + [("broken.wav", "low", "1")])
    several = [(path, label if label == "low" else f"{label};upper", split) for path, label, split, _ in rows]
    table("several.tsv", "path\tlabel\tsplit", several)
    table("moments.tsv", "path\tsplit\tphones", phones)
    mae_ast().save_pretrained(folder / "mae_ast")
    ssast().save_pretrained(folder / "ssast")
    return folder


def make_options(
    folder: Path, out: Path, data: str = "split.tsv", *, options_class: type = ProbeOptions, **fields
) -> ProbeOptions:
    defaults = {"checkpoint": str(folder / "mae_ast"), "precision": "fp32", "cache": str(folder / "cache")}
    return options_class(data=str(folder / data), out=str(out), **{**defaults, **fields})


def predictions(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("make", [mae_ast, ssast])
def test_encode_is_independent_of_the_batch(make):
    model = make()
    waves = [torch.from_numpy(tone(500, s, np.random.default_rng(1))) for s in (1.0, 0.03, 2.3)]
    num_samples = torch.tensor([len(wave) for wave in waves])
    with torch.no_grad():
        log_mel, num_frames = model.features(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), num_samples)
        together = model.encode(log_mel, num_frames)
        means = pool_tokens(together, 3)
        for i, wave in enumerate(waves):
            log_mel, num_frames = model.features(wave[None])
            alone = model.encode(log_mel, num_frames)
            assert_rounding(together.x[together.packing.clip == i], alone.x)
            assert_rounding(means[i], alone.x.mean(0))
            assert torch.equal(together.time_block[together.packing.clip == i].sort()[0], alone.time_block.sort()[0])
            assert alone.time_block.bincount().unique().tolist() == [model.config.grid_f]
            bands = pool_tokens(together, 3, num_bands=model.config.grid_f).reshape(3, model.config.grid_f, -1)
            for band in range(model.config.grid_f):
                assert_rounding(bands[i, band], alone.x[alone.frequency_block == band].mean(0))


def test_mae_ast_encode_equals_extract_features():
    model = mae_ast()
    log_mel = torch.randn(2, 70, 128)
    num_frames = torch.tensor([70, 33])
    with torch.no_grad():
        for layer in (None, 1):
            packed = model.encode(log_mel, num_frames, layer)
            padded = model.extract_features(log_mel, num_frames, layer)
            assert torch.equal(packed.x, padded.last_hidden_state[packed.packing.clip, packed.packing.token])
            assert padded.lengths.tolist() == [40, 24]
            assert torch.equal(packed.packing.token, packed.time_block * 8 + packed.frequency_block)


def test_ssast_encode_equals_plain_vit():
    model, config = ssast(), ssast().config
    log_mel = torch.randn(2, 64, 128)
    with torch.no_grad():
        encoded = model.encode(log_mel)
        image = log_mel.transpose(1, 2)  # (B, F, T), patches frequency block by frequency block
        patches = image.unfold(1, 16, 16).unfold(2, 16, 16).reshape(2, 32, 256)
        grid = model.positions[2:].reshape(8, -1, 32)[:, :4].reshape(32, 32)
        first = torch.stack((model.cls_token, model.dist_token)) + model.positions[:2]
        x = torch.cat((first.expand(2, 2, 32), model.patch_embed(patches) + grid), 1)
        heads, size = config.num_heads, 32 // config.num_heads
        for layer in model.encoder.layers:
            q, k, v = layer.qkv(layer.attn_norm(x)).reshape(2, 34, 3, heads, size).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / size**0.5).softmax(-1)
            x = x + layer.out_proj((weights @ v).transpose(1, 2).reshape(2, 34, 32))
            x = x + layer.fc2(torch.nn.functional.gelu(layer.fc1(layer.ffn_norm(x))))
        x = model.encoder.norm(x)[:, 2:]
    assert_rounding(encoded.x.reshape(2, 32, 32), time_major(x, 1, (8, 4)))
    assert encoded.time_block[:32].tolist() == sorted([*range(4)] * 8)
    assert encoded.frequency_block[:32].tolist() == [*range(8)] * 4


def test_encode_unknown_layer_raises():
    for model in (mae_ast(), ssast()):
        with pytest.raises(ValueError, match=r"layer must be an integer in 1..2, got 3"):
            model.encode(torch.randn(1, 32, 128), layer=3)


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_fit_logistic_ends_at_zero_gradient(multi_label, penalty):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    targets = torch.nn.functional.one_hot((x[:, :3] + torch.randn(120, 3, generator=generator)).argmax(1), 3).bool()
    weight, bias = fit_logistic(
        x, targets, penalty=penalty, multi_label=multi_label, start=(torch.zeros(3, 6), torch.zeros(3))
    )
    logits = x @ weight.T + bias
    p = logits.sigmoid() if multi_label else logits.softmax(1)
    gradient = (p - targets.float()).T @ x + weight / penalty  # of the summed loss
    assert gradient.abs().max() < LOGISTIC_GRADIENT * len(x)
    assert (p - targets.float()).sum(0).abs().max() < LOGISTIC_GRADIENT * len(x)


def test_spec_augment_masks_one_range_of_bins_and_one_of_frames():
    generator = torch.Generator().manual_seed(0)
    log_mel, num_frames = torch.randn(200, 60, 128), torch.randint(1, 61, (200,), generator=generator)
    augmented = spec_augment(log_mel, num_frames, freq_mask=16, time_mask=0.25, fill=-5.0, generator=generator)
    masked = augmented != log_mel
    assert (augmented[masked] == -5.0).all()
    bins, times = masked.all(1), masked.all(2)
    assert 14 <= bins.sum(1).max() <= 16
    assert bins.sum(1).min() == 0
    assert (times.sum(1) <= 0.25 * num_frames).all()
    assert (times.sum(1) / num_frames).max() > 0.2
    assert torch.equal(masked, bins[:, None, :] | times[:, :, None])
    for is_masked in (*bins, *times):  # contiguous, and inside the clip
        assert is_masked.int().diff().abs().sum() <= 2
    assert not (times & (torch.arange(60) >= num_frames[:, None])).any()
    unchanged = spec_augment(log_mel, num_frames, freq_mask=0, time_mask=0.0, fill=-5.0, generator=generator)
    assert torch.equal(unchanged, log_mel)


def test_mixup_mixes_waveforms_and_targets_alike():
    generator = torch.Generator().manual_seed(0)
    waveforms = (1000 * torch.arange(1, 101))[:, None].expand(-1, 7).short().clamp(max=30000)
    targets = torch.eye(100)
    clips, same = mixup(waveforms, targets, 0.0, generator)
    assert torch.equal(clips, waveforms / 32768.0)
    assert torch.equal(same, targets)
    clips, mixed = mixup(waveforms, targets, 0.5, generator)
    assert_rounding(clips, mixed @ (waveforms / 32768.0))
    assert_rounding(mixed.sum(1), torch.ones(100))
    changed = (mixed.max(1).values < 1).sum()
    assert 30 < changed < 70
    assert mixed.max(1).values.min() < 0.7


def test_parameter_groups_learning_rate_falls_from_layer_to_layer():
    classifier = AudioClassifier(mae_ast().encoder_only(), ["a", "b"])
    options = FinetuneOptions("d", "c", "o", layer_decay=0.5, head_lr_factor=3.0, weight_decay=0.1)
    groups = parameter_groups(classifier, options)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    settings = {names[id(p)]: (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(settings) == {name for name, _ in classifier.named_parameters()}
    assert settings["head.weight"] == (3.0, 0.1)
    assert settings["encoder.encoder.norm.weight"] == (1.0, 0.0)
    assert settings["encoder.encoder.layers.1.fc1.weight"] == (1.0, 0.1)
    assert settings["encoder.encoder.layers.0.fc1.bias"] == (0.5, 0.0)
    assert settings["encoder.patch_embed.weight"] == (0.25, 0.1)
    first_layer = parameter_groups(classifier, dataclasses.replace(options, layer=1))
    factors = {names[id(p)]: group["factor"] for group in first_layer for p in group["params"]}
    assert not any("layers.1" in name for name in factors)
    assert factors["encoder.encoder.layers.0.fc1.bias"] == 1.0


def test_classifier_training_keeps_input_norm_of_pretraining():
    classifier = AudioClassifier(mae_ast().encoder_only(), ["a", "b"]).train()
    assert classifier.training
    classifier(torch.randn(2, 64, 128)).sum().backward()
    assert float(classifier.encoder.input_norm.running_mean) == -8.0
    assert classifier.encoder.patch_embed.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.full_report
def test_probe_splits_writes_outputs(folder, tmp_path, capsys):
    summary = probe(make_options(folder, tmp_path / "run"))
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["task"], summary["metric"], summary["n_test"], summary["per_fold"]) == ("split", "accuracy", 30, [])
    rows = predictions(tmp_path / "run")
    assert [row["path"] for row in rows] == [f"{i}.wav" for i in range(120) if i // 3 % 4 == 3]
    assert list(rows[0]) == ["path", "label", "pred", "prob_high", "prob_low", "prob_middle"]
    accuracy = np.mean([row["label"] == row["pred"] for row in rows])
    assert summary["value"] == summary["accuracy"] == pytest.approx(accuracy)
    low, high = summary["ci95"]
    assert 0.6 < low < summary["value"] < high <= 1.0
    assert summary["log_mel_baseline"]["value"] == 1.0
    assert summary["majority_accuracy"] == pytest.approx(1 / 3)
    assert summary["chosen"][0]["C"] in PENALTIES
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000


def test_predict_saved_probe_gives_its_predictions(folder, tmp_path, capsys):
    probe(make_options(folder, tmp_path / "run"))
    row = predictions(tmp_path / "run")[0]
    out = tmp_path / "predicted/p.csv"
    command = ["predict", str(folder / row["path"]), str(folder / "broken.wav"), "--checkpoint", str(tmp_path / "run")]
    assert cli.main([*command, "--out", str(out)]) == 1
    output = capsys.readouterr()
    assert f"{row['path']}: {row['pred']} " in output.out
    assert "1 classified, 1 skipped" in output.out
    assert "broken.wav" in output.err
    with open(out, newline="") as file:
        (predicted,) = csv.DictReader(file)
    assert predicted["pred"] == row["pred"]
    for name in PITCHES:
        assert float(predicted[f"prob_{name}"]) == pytest.approx(float(row[f"prob_{name}"]), abs=PROBABILITY)


def test_probe_folds_gives_mean_over_folds(folder, tmp_path):
    fields = {"checkpoint": str(folder / "ssast"), "pool": "bands"}
    summary = probe(make_options(folder, tmp_path / "run", "fold.tsv", **fields))
    assert summary["folds"] == ["0", "1", "2"]
    assert summary["value"] == pytest.approx(np.mean(summary["per_fold"]))
    assert summary["n_test"] == 120
    assert summary["skipped"]["count"] == 1
    assert summary["skipped"]["files"][0]["path"] == "broken.wav"
    rows = predictions(tmp_path / "run")
    assert sorted(row["path"] for row in rows) == sorted(f"{i}.wav" for i in range(120))
    correct = [[row["label"] == row["pred"] for row in rows if int(row["path"][:-4]) // 3 % 3 == k] for k in range(3)]
    assert summary["per_fold"] == pytest.approx([np.mean(fold_correct) for fold_correct in correct])
    one_fold = probe(make_options(folder, tmp_path / "one", "fold.tsv", folds="1", **fields))
    assert one_fold["per_fold"] == summary["per_fold"][1:2]
    with pytest.raises(ValueError, match=r"folds must be in \['0', '1', '2'\], got \['7'\]"):
        probe(make_options(folder, tmp_path / "none", "fold.tsv", folds="7"))
    assert not (tmp_path / "none").exists()


@pytest.mark.full_report
def test_probe_frame_level_task_classifies_moments(folder, tmp_path):
    summary = probe(make_options(folder, tmp_path / "run", "moments.tsv", max_seconds=1.5))
    assert summary["frame_level"]
    rows = predictions(tmp_path / "run")
    assert len(rows) == summary["n_test"]
    assert {row["path"] for row in rows} == {"mix3.wav", "mix7.wav"}
    assert np.mean([row["label"] == row["pred"] for row in rows]) == pytest.approx(summary["value"])
    # Moments of three pitches are easy for log-mel. Patches of 160 ms cross the edges of tones of 100 to 300 ms.
    assert summary["log_mel_baseline"]["value"] > 0.8
    assert 0.5 < summary["value"] < summary["log_mel_baseline"]["value"]
    low, high = summary["ci95"]
    assert low <= summary["value"] <= high
    assert not (tmp_path / "run/model.safetensors").exists()
    with pytest.raises(ValueError, match="frame-level task: use mae-ast-fast probe"):
        finetune(make_options(folder, tmp_path / "other", "moments.tsv", options_class=FinetuneOptions))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_probe_split_without_audio_raises(folder, tmp_path, split):
    rows = [line.split("\t") for line in (folder / "split.tsv").read_text().splitlines()]
    rows = [row for row in rows if row[2] != split] + [["broken.wav", "low", split]]
    data = f"no_{split}_audio.tsv"
    (folder / data).write_text("\n".join("\t".join(row) for row in rows) + "\n")
    with pytest.raises(ValueError, match=rf"{data}: none of the {split} clips of the split has audio; broken\.wav: "):
        probe(make_options(folder, tmp_path / "run", data))
    assert not (tmp_path / "run").exists()


def test_finetune_norm_starts_with_statistics_of_training_clips(folder, tmp_path, monkeypatch):
    """Scores make sense from the first step on. The statistics exclude validation and test clips."""
    from mae_ast_fast.downstream import finetune as module

    trainers = []
    monkeypatch.setattr(module._Trainer, "train", lambda trainer: trainers.append(trainer) or (0.0, {"history": []}))
    finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", pool="bands"))
    (trainer,) = trainers
    classifier, run, fold = trainer.classifier.eval(), trainer.run, trainer.fold
    pooled = []
    with torch.no_grad():
        for waveforms, num_samples, *_ in run.read(fold.train):
            log_mel, num_frames = classifier.encoder.features(waveforms, num_samples)
            encoded = classifier.encoder.encode(log_mel, num_frames)
            pooled.append(pool_tokens(encoded, len(waveforms), num_bands=classifier.num_bands))
    x = torch.cat(pooled)
    assert len(x) == 60
    assert_rounding(classifier.norm.running_mean, x.mean(0))
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + NORM_EPS).sqrt()
    assert_rounding(classifier.norm(x), expected)
    assert not list(classifier.norm.parameters())


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, peak=2.0, warmup=0.1) for step in range(101)]
    assert rates[:10] == [2.0 * (step + 1) / 11 for step in range(10)]
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 1, peak=2.0, warmup=0.0) == 2.0


def test_attentive_head_pools_each_clip_by_its_own_softmax() -> None:
    """Against a loop over clips and attention heads."""
    torch.manual_seed(0)
    num_layers, width, counts = 3, 130, [4, 1, 7]  # 130 = 2 heads of 65
    head = AttentiveHead(num_layers, width, 5).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        head.norm.running_mean.normal_()
        head.norm.running_var.uniform_(0.5, 2.0)
        states = torch.randn(sum(counts), num_layers, width)
        scores = head(states, torch.repeat_interleave(torch.arange(3), torch.tensor(counts)), 3)
        share = head.layer_weights.exp() / head.layer_weights.exp().sum()
        pooled = []
        for clip in states.split(counts):
            x = sum(share[k] * clip[:, k] for k in range(num_layers))
            keys, values = head.key(x), head.value(x)
            parts = []
            for h in range(2):
                columns = slice(65 * h, 65 * h + 65)
                attention = (keys[:, columns] @ head.query[h] / 65**0.5).softmax(0)
                parts.append(attention @ values[:, columns])
            pooled.append(torch.cat(parts))
        assert_rounding(scores, head.linear(head.norm(torch.stack(pooled))))


def test_layer_states_are_normalised_outputs_of_the_layers() -> None:
    model = mae_ast()
    log_mel = torch.randn(2, 64, 128) * 4 - 8
    with torch.no_grad():
        features, encoded = model.extract_features(log_mel), model.encode(log_mel)
    states = layer_states(encoded, "all").unflatten(0, (2, -1))
    for layer, hidden in enumerate([*features.hidden_states[:-1], features.last_hidden_state]):
        assert_rounding(states[:, :, layer], torch.nn.functional.layer_norm(hidden, hidden.shape[2:]))
    assert torch.equal(layer_states(encoded, "last").unflatten(0, (2, -1))[:, :, 0], states[:, :, -1])


@pytest.mark.parametrize(
    ("checkpoint", "fields"),
    [("mae_ast", {"layers": "all"}), ("ssast", {"layers": "all"}), ("mae_ast", {"layer": 1})],
)
def test_attentive_probe_writes_outputs_and_a_classifier(folder, tmp_path, monkeypatch, *, checkpoint, fields):
    monkeypatch.setattr(attentive, "MIN_UPDATES", 120)
    options = make_options(folder, tmp_path / "run", checkpoint=str(folder / checkpoint), head="attentive", **fields)
    summary = probe(options)
    assert summary["value"] > 0.8 and summary["log_mel_baseline"]["value"] > 0.8
    assert summary["majority_accuracy"] == pytest.approx(1 / 3)
    assert [set(chosen) for chosen in summary["chosen"]] == [{"epoch"}] and 1 <= summary["chosen"][0]["epoch"] <= 60
    classifier = AudioClassifier.from_pretrained(tmp_path / "run")
    for row in predictions(tmp_path / "run")[:5]:
        expected = [float(row[f"prob_{label}"]) for label in classifier.labels]
        actual = classifier.classify_file(folder / row["path"])
        assert actual.tolist() == pytest.approx(expected, abs=HALF_PROBABILITY)


def test_attentive_probe_several_labels_and_folds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(attentive, "MIN_UPDATES", 120)
    several = probe(make_options(folder, tmp_path / "several", "several.tsv", head="attentive"))
    assert several["metric"] == "map" and several["value"] > 0.8
    folds = probe(make_options(folder, tmp_path / "folds", "fold.tsv", head="attentive"))
    assert len(folds["per_fold"]) == 3 and folds["value"] > 0.6


def test_attentive_probe_of_shuffled_labels_is_at_chance(folder, tmp_path, monkeypatch):
    """Test clips do not leak into training or selection."""
    monkeypatch.setattr(attentive, "MIN_UPDATES", 1)
    lines = (folder / "split.tsv").read_text().splitlines()
    labels = random.Random(0).sample([line.split("\t")[1] for line in lines[1:]], len(lines) - 1)
    rows = [[line.split("\t")[0], label, line.split("\t")[2]] for line, label in zip(lines[1:], labels, strict=True)]
    path = folder / "shuffled.tsv"
    path.write_text("\n".join(["path\tlabel\tsplit", *("\t".join(row) for row in rows)]) + "\n")
    assert probe(make_options(folder, tmp_path / "run", "shuffled.tsv", head="attentive"))["value"] < 0.7


def test_attentive_probe_wrong_uses_raise(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="frame-level task: use --head linear"):
        probe(make_options(folder, tmp_path / "run", "moments.tsv", head="attentive"))
    lines = (folder / "split.tsv").read_text().splitlines()
    trained = [line for line in lines if line.endswith("\ttrain")]
    (folder / "one.tsv").write_text("\n".join(line for line in lines if line not in trained[1:]) + "\n")
    with pytest.raises(ValueError, match="expected at least two training clips with audio, the split has one"):
        probe(make_options(folder, tmp_path / "one", "one.tsv", head="attentive"))
    monkeypatch.setattr(attentive, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"take 0 GiB, more than 0: use --layers last or --head linear"):
        probe(make_options(folder, tmp_path / "other", head="attentive"))
    for fields, message in (
        ({"head": "mlp"}, "head must be one of linear, attentive, got 'mlp'"),
        ({"layers": "all"}, "layers=all needs head=attentive and no layer, got head=linear and layer=None"),
        ({"head": "attentive", "layers": "all", "layer": 1}, "got head=attentive and layer=1"),
        ({"head": "attentive", "pool": "bands"}, "head=attentive pools by attention, got pool=bands"),
    ):
        with pytest.raises(ValueError, match=message):
            make_options(folder, tmp_path / "run", **fields)


def test_probe_run_of_earlier_version_without_head_and_layers_goes_on(folder, tmp_path):
    options = make_options(folder, tmp_path / "run")
    probe(options)
    path = tmp_path / "run/task_options.json"
    recorded = json.loads(path.read_text())
    assert (recorded.pop("head"), recorded.pop("layers")) == ("linear", "last")
    path.write_text(json.dumps(recorded))
    probe(options)
    with pytest.raises(ValueError, match="a run with another head"):
        probe(make_options(folder, tmp_path / "run", head="attentive"))


def test_finetune_attentive_head_trains_and_predicts(folder, tmp_path):
    summary = finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", head="attentive", layers="all"))
    assert summary["value"] > 0.6
    assert isinstance(AudioClassifier.from_pretrained(tmp_path / "run").head, AttentiveHead)


@pytest.mark.parametrize("size", [1e-3, 1e-7, 0.0])
def test_predict_probe_of_nearly_constant_features_gives_its_predictions(folder, tmp_path, size):
    """Some columns have almost no variance: the saved norm is the fitted one."""
    model = mae_ast()
    with torch.no_grad():
        model.encoder.norm.weight[:8] *= size
        model.encoder.norm.bias[:8] = 3.0
    model.save_pretrained(tmp_path / "model")
    probe(make_options(folder, tmp_path / "run", checkpoint=str(tmp_path / "model")))
    classifier = AudioClassifier.from_pretrained(tmp_path / "run")
    for row in predictions(tmp_path / "run")[:5]:
        expected = [float(row[f"prob_{label}"]) for label in classifier.labels]
        assert classifier.classify_file(folder / row["path"]).tolist() == pytest.approx(expected, abs=PROBABILITY)


def test_finetune_single_leftover_clip_is_skipped(folder, tmp_path, capsys):
    rows = (folder / "split.tsv").read_text().splitlines()
    kept = [row for row in rows if not row.endswith("train")] + [row for row in rows if row.endswith("train")][:7]
    (folder / "seven.tsv").write_text("\n".join(kept) + "\n")
    finetune(finetune_options(folder, tmp_path / "run", data="seven.tsv", batch_size=3, epochs=2))
    assert "2/2" in capsys.readouterr().out
    (folder / "one.tsv").write_text("\n".join(kept[:-6]) + "\n")
    with pytest.raises(ValueError, match="expected at least two training clips with audio, the split has 1"):
        finetune(finetune_options(folder, tmp_path / "one", data="one.tsv"))


def test_drawable_missing_glyphs_become_words():
    from mae_ast_fast.downstream.figures import _drawable

    labels = ("a b", "ü", "\u3105", "x\u3113", "\U0010fffe")
    assert [_drawable(label) for label in labels] == ["a b", "ü", "B", "x ZH", "U+10FFFE"]


def test_probe_incomplete_manifest_gives_notes(folder, tmp_path):
    rows = (folder / "split.tsv").read_text().splitlines()
    rows_open = [row for row in rows if "high\ttrain" not in row]
    text = "\n".join(rows_open).replace("high\tvalid", "high\ttest").replace("valid", "train")
    (folder / "open.tsv").write_text(text + "\n")
    notes = probe(make_options(folder, tmp_path / "run", "open.tsv"))["notes"]
    assert any(note.startswith("no clip has split valid: ") for note in notes)
    assert "classes without training clips in the split, tested: high" in notes
    rare = [r.replace("middle", "odd") if r.endswith("valid") else r for r in rows]
    few = [r for i, r in enumerate(rare) if i == 0 or not r.endswith("test") or i < 40]
    (folder / "odd.tsv").write_text("\n".join(few) + "\n")
    notes = probe(make_options(folder, tmp_path / "odd", "odd.tsv"))["notes"]
    assert "classes without training clips in the split, only in validation clips: odd" in notes
    assert "9 test clips: too few for a reliable interval" in notes
    both = "\n".join([rows[0] + "\tfold", *(f"{row}\t{i % 3}" for i, row in enumerate(rows[1:]))])
    (folder / "both.tsv").write_text(both + "\n")
    notes = probe(make_options(folder, tmp_path / "both", "both.tsv"))["notes"]
    assert "the column fold is used, the column split is ignored" in notes
    assert probe(make_options(folder, tmp_path / "plain"))["notes"] == []


@pytest.mark.full_report
def test_runs_several_labels_report_mean_average_precision(folder, tmp_path):
    for name, run in (("probe", probe), ("tuned", finetune)):
        fields = {"options_class": FinetuneOptions, "epochs": 12, "lr": 5e-3, "mixup": 0.3} if run is finetune else {}
        summary = run(make_options(folder, tmp_path / name, "several.tsv", **fields))
        assert summary["metric"] == "map"
        assert summary["multi_label"]
        assert summary["value"] > 0.8
        rows = predictions(tmp_path / name)
        assert {row["label"] for row in rows} == {"low", "high;upper", "middle;upper"}
        assert not (tmp_path / name / "confusion.png").exists()
        assert (tmp_path / name / "average_precision.png").stat().st_size > 0
        listed = task_summary(summary, str(tmp_path / name)).splitlines()[-2].partition(": ")[2].split(", ")
        assert all((tmp_path / name / file).exists() for file in listed) and len(listed) == 3 + (run is finetune)
    assert AudioClassifier.from_pretrained(tmp_path / "tuned").multi_label


def finetune_options(folder: Path, out: Path, **fields) -> FinetuneOptions:
    regularisation = {"layer_decay": 1.0, "label_smoothing": 0.0, "freq_mask": 8, "time_mask": 0.1}
    defaults = {"epochs": 8, "lr": 5e-3, "batch_size": 4, "data": "fold.tsv", **regularisation}
    return make_options(folder, out, options_class=FinetuneOptions, **{**defaults, **fields})


@pytest.mark.full_report
def test_finetune_second_start_keeps_finished_folds(folder, tmp_path, capsys):
    options = finetune_options(folder, tmp_path / "run")
    summary = finetune(options)
    assert summary["value"] > 0.8
    assert len(summary["per_fold"]) == 3
    for name in (
        "learning.png",
        "confusion.png",
        "model.safetensors",
        "config.json",
        "metrics.jsonl",
        "predictions.csv",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run/tensorboard").glob("*/events*"))
    capsys.readouterr()
    (tmp_path / "run/fold_1/result.json").unlink()
    done = json.loads((tmp_path / "run/fold_0/result.json").read_text())
    (tmp_path / "run/fold_0/result.json").write_text(json.dumps({**done, "seconds": done["seconds"] + 1000.0}))
    (tmp_path / "run/fold_0/state.safetensors").write_text("killed before it was removed")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"fold": "1", "ep')  # killed there
    again = finetune(dataclasses.replace(options, data=os.path.relpath(options.data)))
    output = capsys.readouterr().out
    assert "fold_0 is done" in output
    assert "fold_1 is done" not in output
    assert not list((tmp_path / "run").rglob("*state*"))
    assert again.pop("seconds") > 1000.0 > summary.pop("seconds") > done["seconds"] > 0.0
    assert again == summary
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted((row["fold"], row["epoch"]) for row in rows) == [(f, e) for f in "012" for e in range(1, 9)]
    with pytest.raises(ValueError, match="holds a run with another lr: choose another --out"):
        finetune(dataclasses.replace(options, lr=1e-3))


@pytest.mark.parametrize("stop", [2, 7, 10, 22])
def test_finetune_interrupted_fold_resumes_with_same_results(folder, tmp_path, monkeypatch, capsys, *, stop):
    """Stops in the first epoch, at an epoch's first step, in a later epoch, in the next fold."""
    from mae_ast_fast.downstream import finetune as module

    mae_ast(dropout=0.2).save_pretrained(tmp_path / "model")
    fields = {"checkpoint": str(tmp_path / "model"), "epochs": 2, "batch_size": 6, "mixup": 0.5, "balanced": True}
    expected = finetune(finetune_options(folder, tmp_path / "expected", folds="0,2", **fields))
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    original_update, batches = module._Trainer._update, []

    def update(trainer, clips):
        if len(batches) == stop:
            batches.append("stopped")
            raise KeyboardInterrupt
        batches.append(clips)
        return original_update(trainer, clips)

    monkeypatch.setattr(module._Trainer, "_update", update)
    options = finetune_options(folder, tmp_path / "run", folds="0,2", **fields)
    with pytest.raises(KeyboardInterrupt):
        finetune(options)
    with pytest.raises(ValueError, match="holds a run with another lr"):
        finetune(dataclasses.replace(options, lr=1e-3))
    (path,) = (tmp_path / "run").glob("*/state.safetensors")
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["told"])
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    save_file(tensors, path, {"told": json.dumps({**progress, "seconds": progress["seconds"] + 1000.0})})
    again = finetune(options)
    assert again["seconds"] > 1000.0
    fold_seconds = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "run").glob("*/result.json")]
    assert sorted(seconds > 1000.0 for seconds in fold_seconds) == [False, True]
    assert len(batches) == 1 + 2 * 2 * 7, "a step was repeated"
    assert f"resumes after step {stop % 14} of 14" in capsys.readouterr().out
    assert expected | {"seconds": 0} == again | {"seconds": 0}
    for name in ("metrics.jsonl", "predictions.csv", "model.safetensors", "fold_0/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    assert not list((tmp_path / "run").rglob("state*"))


def test_finetune_resumed_fold_replaces_its_rows_and_points(folder, tmp_path, monkeypatch):
    """Its old rows are found in any spelling of JSON. Rows of other folds stay, a half-written line goes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mae_ast_fast.downstream import finetune as module

    options = finetune_options(folder, tmp_path / "run", folds="0,2", epochs=2, batch_size=12)
    original_update, losses = module._Trainer._update, []

    def update(trainer, clips):
        if len(losses) == 10:  # in the first epoch of the second fold, of four updates
            signal.raise_signal(signal.SIGTERM)
        losses.append(float(original_update(trainer, clips)))
        return torch.tensor(losses[-1])

    monkeypatch.setattr(module._Trainer, "_update", update)
    with pytest.raises(Interrupted):
        finetune(options)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.MetricsLog, "say", killed)  # the epoch is in the log, but not in the saved state
        finetune(options)
    path = tmp_path / "run/metrics.jsonl"
    *done, last = path.read_text().splitlines()
    assert [json.loads(line)["fold"] for line in (*done, last)] == ["0", "0", "2"]
    respelled = json.dumps(dict(reversed(json.loads(last).items())), separators=(",", ":"))
    path.write_text("\n".join([*done, respelled, respelled, last[:20]]))
    losses[11:] = []  # the next start repeats these updates
    summary = finetune(options)
    lines = path.read_text().splitlines()
    assert lines[:3] == [*done, last]
    rows = [json.loads(line) for line in lines]
    assert [(row["fold"], row["epoch"]) for row in rows] == [("0", 1), ("0", 2), ("2", 1), ("2", 2)]
    assert [row["loss"] for row in rows] == pytest.approx(np.reshape(losses, (4, 4)).mean(1))
    assert summary["valid"] == [max(row["valid"] for row in rows if row["fold"] == fold) for fold in "02"]
    for fold in "02":
        events = EventAccumulator(str(tmp_path / f"run/tensorboard/fold_{fold}")).Reload()
        for curve, name in (("loss", "loss"), ("valid/accuracy", "valid")):
            points = [(point.step, pytest.approx(point.value, abs=1e-6)) for point in events.Scalars(curve)]
            assert points == [(row["epoch"], row[name]) for row in rows if row["fold"] == fold]


def test_finetune_full_disk_names_metrics_file(folder, tmp_path, monkeypatch):
    from mae_ast_fast.training import metrics_log

    def full(path, mode="r", *args, **kwargs):
        if mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(metrics_log, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1))


def test_finetune_epochs_and_steps_draw_different_numbers(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module

    seeds, original_reseed = [], module._Trainer._reseed

    def reseed(trainer, position):
        original_reseed(trainer, position)
        seeds.append((trainer.generator.initial_seed(), torch.initial_seed(), trainer.rng.random()))

    monkeypatch.setattr(module._Trainer, "_reseed", reseed)
    finetune(finetune_options(folder, tmp_path / "run", folds="0,2", epochs=2, batch_size=20))
    draws = 2 * 2 * (1 + 2)  # folds, epochs, an order and two steps
    assert [len(set(column)) for column in zip(*seeds, strict=True)] == [draws] * 3
    assert len(seeds) == draws


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop", [3, 8, 11, 16])
def test_finetune_signal_saves_and_resumes_with_same_results(folder, tmp_path, monkeypatch, capsys, *, number, stop):
    """Stops in the first epoch, in its last step, in the next epoch, in the last step of that."""
    from mae_ast_fast.downstream import finetune as module

    line = ["--data", f"{folder}/split.tsv", "--checkpoint", f"{folder}/mae_ast", "--cache", f"{folder}/cache"]
    line = ["finetune", *line, "--epochs", "2", "--batch-size", "8", "--lr", "5e-3"]
    assert cli.main([*line, "--out", f"{tmp_path}/expected"]) == 0
    original_update, batches = module._Trainer._update, []

    def update(trainer, clips):
        batches.append(clips)
        if len(batches) == stop:
            signal.raise_signal(number)
        return original_update(trainer, clips)

    monkeypatch.setattr(module._Trainer, "_update", update)
    handlers = [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)]
    assert cli.main([*line, "--out", f"{tmp_path}/run"]) == 128 + number
    assert handlers == [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)]
    assert len(batches) == stop
    message = f"mae-ast-fast finetune: stopped by {number.name}; saved {tmp_path}/run/split/state.safetensors"
    assert message in capsys.readouterr().err
    assert cli.main([*line, "--out", f"{tmp_path}/run"]) == 0
    assert len(batches) == 2 * 8
    for name in ("metrics.jsonl", "predictions.csv", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_finetune_signal_on_full_disk_stops_without_state(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream import finetune as module

    def full(*_):
        signal.raise_signal(signal.SIGINT)
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(Interrupted, match="stopped by SIGINT; nothing could be saved") as stopped:
        finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1))
    assert stopped.value.exit_code == 130
    assert "No space left on device" in capsys.readouterr().out


def test_finetune_outside_main_thread_runs(folder, tmp_path):
    """Python handles signals in the main thread only."""
    options = finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finetune, options).result()["value"] > 0.3


HOLDER = """
import sys, time
from pathlib import Path
from mae_ast_fast.training.lifecycle import run_lock

run, end = map(Path, sys.argv[1:])
with run_lock(run):
    print("has it", flush=True)
    while not end.exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("run", [probe, finetune])
def test_runs_same_folder_at_once_raise(folder, tmp_path, run, resumed):
    fields = {"options_class": FinetuneOptions, "epochs": 1} if run is finetune else {}
    options = make_options(folder, tmp_path / "run", **fields)
    if resumed:
        run(options)
    end = tmp_path / "end"
    process = Command(["-c", HOLDER, str(tmp_path / "run"), str(end)], tmp_path / "log")
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != "has it\n":
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match="a run is going on in"):
        run(options)
    end.touch()
    assert process.wait(timeout=60) == 0
    run(options)


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> FinetuneOptions:
    """Options of a run that was stopped before its third step of five."""
    from mae_ast_fast.downstream import finetune as module

    options = finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1, batch_size=12)
    original_update = module._Trainer._update

    def update(trainer, clips):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return original_update(trainer, clips)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_SAVE_SECONDS", -1.0)
        patch.setattr(module._Trainer, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            finetune(options)
    return options


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "is damaged"),
        ("bit", "is damaged (its checksum differs)"),
        ("none", "the split resumes after step 2 of 5"),
    ],
)
def test_finetune_damaged_state_starts_again(stopped, capsys, damage, message):
    path = Path(stopped.out) / "split/state.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    path.write_bytes(content[:-100] if damage == "cut" else content)
    (path.parent / ".state.partial.safetensors").write_text("killed while it was written")
    assert finetune(stopped)["value"] > 0.3
    output = capsys.readouterr().out
    assert message in output
    assert ("the split starts again" in output) == (damage != "none")
    assert not list(Path(stopped.out).rglob("*state*"))


def test_finetune_unwritable_state_keeps_training(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream import finetune as module

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "save_file", full)
    assert finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1))["value"] > 0.3
    assert "state.safetensors cannot be written (No space left on device)" in capsys.readouterr().out


def test_finetune_stopped_in_test_resumes_there(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream.run import Run

    options = finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(AudioClassifier, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(options)
    calls, original = [], Run.probabilities
    monkeypatch.setattr(Run, "probabilities", lambda run, *args: calls.append(0) or original(run, *args))
    assert len(finetune(options)["chosen"]) == 1
    assert len(calls) == 1
    assert "resumes after step 30 of 30" in capsys.readouterr().out


def test_finetune_norm_of_many_clips_starts_with_a_sample(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module
    from mae_ast_fast.downstream import probe as probe_module

    calls, original = [], probe_module.encoder_features
    monkeypatch.setattr(module, "encoder_features", lambda run, clips: calls.append(clips) or original(run, clips))
    monkeypatch.setattr(module, "_NORM_CLIPS", 20)
    finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1))
    assert len(set(calls[0])) == len(calls[0]) == 20


@pytest.mark.parametrize("run", [probe, finetune])
@pytest.mark.parametrize("changed", ["label", "labels", "splits", "recording", "weights"])
def test_runs_changed_data_behind_same_options_raise(folder, tmp_path, run, changed):
    """The content of the files that the options name has changed since the first run."""
    mae_ast().save_pretrained(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "set")
    fields = {"options_class": FinetuneOptions, "epochs": 1} if run is finetune else {}
    options = make_options(
        tmp_path / "set", tmp_path / "run", "split.tsv", checkpoint=str(tmp_path / "model"), **fields
    )
    summary = run(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    if changed == "label":
        table = tmp_path / "set/split.tsv"
        table.write_text(table.read_text().replace("low", "deep"))
    elif changed in ("labels", "splits"):
        table = tmp_path / "set/split.tsv"
        rows = table.read_text().splitlines()
        first, second = (rows[i].split("\t") for i in ((1, 2) if changed == "labels" else (1, 7)))
        column = 1 if changed == "labels" else 2
        assert first[column] != second[column]
        first[column], second[column] = second[column], first[column]
        rows[1], rows[2 if changed == "labels" else 7] = "\t".join(first), "\t".join(second)
        table.write_text("\n".join(rows) + "\n")
    elif changed == "recording":
        first, second = sorted((tmp_path / "set").rglob("*.wav"))[:2]
        shutil.copy(first, second)
    else:
        other = mae_ast()
        next(other.encoder.parameters()).data.mul_(1.5)
        other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="a run of other clips, labels, audio or weights: choose another --out"):
        run(options)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (tmp_path / "run/summary.json").unlink()
    for result in (tmp_path / "run").glob("*/result.json"):
        result.unlink()
    assert run(options).keys() == summary.keys()


@pytest.mark.parametrize("save_seconds", [300.0, -1.0])
def test_finetune_diverged_run_leaves_folder_free(folder, tmp_path, monkeypatch, save_seconds):
    from mae_ast_fast.downstream import finetune as module

    monkeypatch.setattr(module, "_SAVE_SECONDS", save_seconds)
    steps, original_update = [], module._Trainer._update
    monkeypatch.setattr(module._Trainer, "_update", lambda *args: steps.append(1) or original_update(*args))
    options = finetune_options(folder, tmp_path / "run", data="split.tsv", lr=1e30, layer_decay=1.0, clip_norm=1e30)
    with pytest.raises(ValueError, match="the loss became"):
        finetune(options)
    assert (len(steps) < 15) == (save_seconds < 0), "a save must notice the divergence before the epoch ends"
    finetune(dataclasses.replace(options, lr=1e-3, clip_norm=1.0, epochs=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out must be a folder"):
        probe(make_options(folder, tmp_path / "file"))


@pytest.mark.full_report
@pytest.mark.parametrize("run", [probe, finetune])
def test_runs_single_label_task_is_scored(folder, tmp_path, run):
    """A detector: some clips have the label, the others have none."""
    rows = (folder / "split.tsv").read_text().replace("middle", "").replace("high", "")
    (folder / "low.tsv").write_text(rows)
    fields = {"options_class": FinetuneOptions, "epochs": 1} if run is finetune else {}
    summary = run(make_options(folder, tmp_path / "run", "low.tsv", multi_label=True, **fields))
    assert summary["classes"] == 1
    low, high = summary["ci95"]
    assert 0.0 <= low <= summary["value"] <= high <= 1.0
    (folder / "none.tsv").write_text("\n".join(row.replace("low\tvalid", "\tvalid") for row in rows.splitlines()))
    with pytest.raises(ValueError, match="no valid clip of the split has a label"):
        run(make_options(folder, tmp_path / "none", "none.tsv", multi_label=True, **fields))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"folds": "1"}, r"folds needs a manifest with a column fold, got '1' for .*split\.tsv"),
        ({"cache": "FILE"}, r"cache must be a folder, got the file .*split\.tsv"),
        ({"checkpoint": "WEIGHTS"}, r"the folder of model\.safetensors and its config\.json, got the file"),
    ],
)
def test_probe_wrong_options_raise_before_output(folder, tmp_path, wrong, message):
    paths = {"FILE": str(folder / "split.tsv"), "WEIGHTS": str(folder / "mae_ast/model.safetensors")}
    wrong = {name: paths.get(value, value) for name, value in wrong.items()}
    with pytest.raises(ValueError, match=message):
        probe(make_options(folder, tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.full_report
def test_bootstrap_ci_contains_the_value():
    rng = np.random.default_rng(0)
    targets = rng.random((400, 20)) < 0.02
    p = (0.3 * targets + rng.random((400, 20))).astype(np.float32)
    value = score("map", p, targets, True)
    low, high = bootstrap_ci(
        lambda rows: score("map", p[rows], targets[rows], True), [np.arange(400)], num_sorted=p.size * 40
    )
    assert low < value < high
    interval = bootstrap_ci(lambda rows: 1.0 if rows.max() < 4 else float("nan"), [np.arange(4), np.arange(4, 8)])
    assert interval == (1.0, 1.0)  # a fold without the class is ignored
    # Clips that are drawn twice bias a statistic, such as the share of distinct clips, which is 1 for all of them.
    low, high = bootstrap_ci(lambda rows: len(np.unique(rows)) / 4, [np.arange(4)])
    assert low < 1.0 < high
    low, high = bootstrap_ci(lambda rows: float("nan"), [np.arange(4)])
    assert np.isnan(low) and np.isnan(high)


def test_finetune_probabilities_not_finite_raise(folder, tmp_path, monkeypatch):
    """The last step's weights have no loss that could reveal it. The folder stays free."""
    from mae_ast_fast.downstream import finetune as module
    from mae_ast_fast.downstream.run import Run

    options = finetune_options(
        folder, tmp_path / "run", data="split.tsv", epochs=1, batch_size=60, lr=1e30, clip_norm=1e30
    )
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    with pytest.raises(ValueError, match=r"validation probabilities that are not finite in epoch 1 .*smaller --lr"):
        finetune(options)
    options = dataclasses.replace(options, lr=1e-3, clip_norm=1.0)
    original = Run.probabilities
    test = [i for i in range(120) if i // 3 % 4 == 3]

    def probabilities(run, classifier, clips):
        return original(run, classifier, clips) * (1 if clips != test else np.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "probabilities", probabilities)
        with pytest.raises(ValueError, match="the probabilities of the split are not finite"):
            finetune(options)
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("baseline", [False, True])
def test_task_summary_to_dict_has_applicable_keys_and_rounded_floats(multi_label, baseline):
    nan = float("nan")
    summary = TaskSummary(
        task="tones",
        mode="probe",
        checkpoint="model",
        metric="accuracy",
        value=2 / 3,
        ci95=[1 / 3, nan],
        n_test=3,
        per_fold=[],
        folds=[],
        valid=[nan],
        accuracy=2 / 3,
        balanced_accuracy=None if multi_label else nan,
        macro_f1=0.5,
        map=0.25 if multi_label else None,
        majority_accuracy=None if multi_label else 0.5,
        log_mel_baseline=BaselineSummary(1 / 3, [0.0, 1.0], 1 / 3, [-1 / 3, nan]) if baseline else None,
        classes=2,
        multi_label=multi_label,
        frame_level=False,
        chosen=[{"C": 1 / 3}],
        skipped={"count": 1, "files": [{"path": "x.wav", "reason": "corrupt"}]},
        notes=[],
        seconds=1.5,
    )
    scores = {"macro_f1": 0.5, "map": 0.25}
    if not multi_label:
        scores = {"balanced_accuracy": None, "macro_f1": 0.5, "majority_accuracy": 0.5}
    if baseline:
        differences = {"difference": 0.333333, "difference_ci95": [-0.333333, None]}
        scores["log_mel_baseline"] = {"value": 0.333333, "ci95": [0.0, 1.0], **differences}
    expected = {
        **{"task": "tones", "mode": "probe", "checkpoint": "model", "metric": "accuracy", "value": 0.666667},
        **{"ci95": [0.333333, None], "n_test": 3, "per_fold": [], "folds": [], "valid": [None], "accuracy": 0.666667},
        **scores,
        **{"classes": 2, "multi_label": multi_label, "frame_level": False, "chosen": [{"C": 0.333333}]},
        **{"skipped": {"count": 1, "files": [{"path": "x.wav", "reason": "corrupt"}]}, "notes": [], "seconds": 1.5},
    }
    assert list(summary.to_dict().items()) == list(expected.items())


def test_average_precision_plot_uses_fold_mean(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import figures as figures_module

    drawn = []
    monkeypatch.setattr(figures_module, "plot_labels", lambda precisions, *args, **options: drawn.append(precisions))
    rows = (folder / "fold.tsv").read_text().splitlines()
    rows = [rows[0], *(row.replace("middle", "middle;odd") if row.endswith("\t1") else row for row in rows[1:])]
    (folder / "odd_fold.tsv").write_text("\n".join(rows) + "\n")
    summary = probe(make_options(folder, tmp_path / "run", "odd_fold.tsv", multi_label=True))
    drawn_precisions = dict(zip(["high", "low", "middle", "odd"], drawn[0], strict=True))
    assert np.isfinite(list(drawn_precisions.values())).all()
    predicted = predictions(tmp_path / "run")
    fold_of = {row.split("\t")[0]: row.split("\t")[2] for row in rows[1:]}
    precisions_by_fold = {fold: [] for fold in "012"}
    for name, drawn_precision in drawn_precisions.items():
        precisions = []
        for fold, fold_precisions in precisions_by_fold.items():
            fold_rows = [row for row in predicted if fold_of[row["path"]] == fold]
            y = np.array([[name in row["label"].split(";")] for row in fold_rows])
            if y.any():
                p = np.array([[float(row[f"prob_{name}"])] for row in fold_rows], np.float32)
                precisions.append(average_precisions(p, y))
                fold_precisions.append(precisions[-1])
        assert drawn_precision == pytest.approx(np.mean(precisions), abs=1e-4)
    fold_means = [np.mean(fold_precisions) for fold_precisions in precisions_by_fold.values()]
    assert fold_means == pytest.approx(summary["per_fold"], abs=1e-4)


def test_runs_pretraining_folder_raises(folder, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for run in (probe, finetune):
        options_class = FinetuneOptions if run is finetune else ProbeOptions
        options = make_options(folder, tmp_path / "run", options_class=options_class)
        with pytest.raises(ValueError, match="already holds a model or a pretraining run: choose another --out"):
            run(options)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    probe(make_options(folder, tmp_path / "probe"))
    with pytest.raises(ValueError, match="is the folder of a probe or fine-tuning: choose another --out"):
        pretrain(PretrainOptions(data=folder, out=tmp_path / "probe", cache=folder / "cache"))


def test_finetune_other_run_finished_meanwhile_raises(folder, tmp_path, monkeypatch):
    """The other run starts and ends while this one reads its audio. Its results are not mistaken for ours."""
    from mae_ast_fast.downstream import run as downstream

    original, calls = downstream.Waveforms, []

    def waveforms(*args):
        if not calls:
            calls.append(1)
            finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=1))
        return original(*args)

    monkeypatch.setattr(downstream, "Waveforms", waveforms)
    with pytest.raises(ValueError, match="holds a run with another epochs: choose another --out"):
        finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=2))


def test_finetune_killed_start_leaves_no_rows(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "_save", killed)  # after the first epoch
        with pytest.raises(KeyboardInterrupt):
            finetune(finetune_options(folder, tmp_path / "run", folds="0", epochs=1, lr=1e-2))
    assert (tmp_path / "run/metrics.jsonl").read_text()
    finetune(finetune_options(folder, tmp_path / "run", folds="1", epochs=1))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["fold"] for row in rows] == ["1"]


def test_probe_results_of_earlier_version_raise(folder, tmp_path):
    probe(make_options(folder, tmp_path / "run"))
    path = tmp_path / "run/task_options.json"
    written = json.loads(path.read_text())
    written.pop("content")
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="holds a run of an earlier version: choose another --out"):
        probe(make_options(folder, tmp_path / "run"))
    path.write_text("null")
    with pytest.raises(ValueError, match="holds a run with another mode"):
        probe(make_options(folder, tmp_path / "run"))


@pytest.mark.full_report
def test_figures_names_like_formulas_are_drawn(folder, tmp_path):
    for name in ("split", "several"):
        shutil.copy(folder / f"{name}.tsv", folder / f"{name}$_$.tsv")
        assert probe(make_options(folder, tmp_path / name, f"{name}$_$.tsv"))["value"] > 0.3
    rows = (folder / "fold.tsv").read_text().replace("\t1\n", "\t$_$\n")
    (folder / "odd$_$.tsv").write_text(rows)
    assert finetune(finetune_options(folder, tmp_path / "folds", data="odd$_$.tsv", epochs=1))["value"] > 0.3


def test_average_precisions_absent_label_is_nan():
    rng = np.random.default_rng(0)
    targets = rng.random((50, 3)) < 0.4
    targets[:, 1] = False
    p = np.stack([targets[:, 0], rng.random(50), rng.random(50)], 1).astype(np.float32)
    precisions = average_precisions(p, targets)
    assert precisions[0] == 1.0 and np.isnan(precisions[1]) and precisions[2] < 1.0
    assert np.nanmean(precisions) == pytest.approx(score("map", p, targets, True), abs=1e-6)
    assert average_precisions(p[:, :1], targets[:, :1]) == 1.0


@pytest.mark.parametrize("count", [3, 70])
def test_plot_labels_draws_precisions_and_shares(tmp_path, monkeypatch, count):
    from mae_ast_fast.downstream import figures as figures_module

    drawn = []
    monkeypatch.setattr(figures_module, "save_figure", lambda figure, path: drawn.append(figure))
    precisions = np.linspace(0.0, 1.0, count)
    precisions[1] = np.nan
    shares = np.linspace(0.5, 0.1, count)
    labels = [f"label {i}" for i in range(count)]
    figures_module.plot_labels(precisions, shares, labels, title="title", path=tmp_path / "x.png")
    axis = drawn[0].axes[0]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert len(names) == min(count - 1, 60) and names[0] == "label 0" and names[-1] == labels[-1]
    assert [bar.get_width() for bar in axis.patches] == [precisions[labels.index(name)] for name in names]
    assert axis.lines[0].get_xdata().tolist() == [shares[labels.index(name)] for name in names]


@pytest.mark.parametrize("last", [0.5, 0.9])
def test_finetune_keeps_best_epoch(folder, tmp_path, monkeypatch, last):
    """Of equally good epochs it keeps the first."""
    from mae_ast_fast.downstream.run import Run

    original_score, scores, epochs = Run.score, iter([0.2, 0.9, last]), []

    def fake_score(self, probabilities, targets, metric=None):
        value = next(scores, None)
        if value is None:
            return original_score(self, probabilities, targets, metric)
        epochs.append(probabilities)
        return value

    monkeypatch.setattr(Run, "score", fake_score)
    summary = finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", epochs=3))
    assert (summary["valid"], summary["chosen"]) == ([0.9], [{"epoch": 2}])
    classifier = AudioClassifier.from_pretrained(tmp_path / "run")
    valid = [i for i in range(120) if i // 3 % 4 == 2]
    probabilities = np.stack([classifier.classify_file(folder / f"{i}.wav").numpy() for i in valid])
    assert np.abs(probabilities - epochs[1]).max() < 0.01 * np.abs(probabilities - epochs[2]).max()


def test_finetune_balanced_draws_classes_equally_often(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream.finetune import _Trainer

    rows = (folder / "split.tsv").read_text().splitlines()
    kept = [r for i, r in enumerate(rows) if "low\ttrain" not in r or i < 5]
    (folder / "rare.tsv").write_text("\n".join(kept) + "\n")
    drawn = []
    original_batches = _Trainer._batches

    def batches(self, epoch):
        for batch in original_batches(self, epoch):
            drawn.extend(self.run.task.clips[i].labels[0] for i in batch)
            yield batch

    monkeypatch.setattr(_Trainer, "_batches", batches)
    finetune(finetune_options(folder, tmp_path / "run", data="rare.tsv", epochs=8, balanced=True))
    shares = [drawn.count(name) / len(drawn) for name in PITCHES]
    assert min(shares) > 0.2


def test_finetune_loss_not_finite_raises(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the loss became .* try a smaller --lr"):
        finetune(finetune_options(folder, tmp_path / "run", data="split.tsv", lr=1e30, layer_decay=1.0, clip_norm=1e30))


def test_runs_folder_of_model_or_other_mode_raises(folder, tmp_path):
    mae_ast().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="already holds a model"):
        probe(make_options(folder, tmp_path / "model"))
    probe(make_options(folder, tmp_path / "run"))
    with pytest.raises(ValueError, match="holds a run with another mode"):
        finetune(make_options(folder, tmp_path / "run", options_class=FinetuneOptions))


# ---------------------------------------------------------------------------------------------------- options, commands


def test_commands_write_outputs_and_report_errors(folder, tmp_path, capsys):
    common = ["--checkpoint", str(folder / "mae_ast"), "--cache", str(folder / "cache"), "--precision", "fp32"]
    assert cli.main(["probe", "--data", str(folder / "split.tsv"), "--out", str(tmp_path / "p"), *common]) == 0
    output = capsys.readouterr().out
    summary = json.loads((tmp_path / "p/summary.json").read_text())
    low, high = summary["ci95"]
    assert f"split: accuracy {summary['value']:.4f} (95 % interval {low:.4f} - {high:.4f}) on 30 test clips" in output
    assert f"mae-ast-fast predict FILE --checkpoint {tmp_path / 'p'}" in output
    command = ["finetune", "--data", str(folder / "split.tsv"), "--out", str(tmp_path / "f"), *common]
    assert cli.main([*command, "--epochs", "1", "--preset", "esc50", "--batch_size", "8"]) == 0
    written = json.loads((tmp_path / "f/task_options.json").read_text())
    assert (written["epochs"], written["batch_size"], written["head_lr_factor"]) == (1, 8, 10.0)
    capsys.readouterr()
    assert cli.main(["finetune", "--data", "x.tsv", "--checkpoint", "c", "--out", "o", "--preset", "esc-50"]) == 2
    assert "unknown preset esc-50; did you mean esc50?" in capsys.readouterr().err
    assert (
        cli.main(["probe", "--data", str(tmp_path / "x.tsv"), "--checkpoint", "c", "--out", str(tmp_path / "o")]) == 1
    )
    assert "x.tsv" in capsys.readouterr().err
    assert cli.main(["predict", "x.wav", "--checkpoint", str(folder / "mae_ast")]) == 1
    assert "holds no classifier (mae-ast-fast finetune and probe write one)" in capsys.readouterr().err
    assert cli.main(["predict", "x.wav", "--checkpoint", str(tmp_path / "p")]) == 1
    assert capsys.readouterr().err == "mae-ast-fast predict: error: no such folder or file: x.wav\n"


def test_predict_command_folder_as_out_exits_with_message(folder, tmp_path, capsys):
    assert cli.main(["predict", "x.wav", "--checkpoint", str(folder / "mae_ast"), "--out", str(tmp_path)]) == 2
    assert f"--out must be the file to write, got the folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", FINETUNE_PRESETS)
def test_finetune_presets_are_valid_options(name):
    FinetuneOptions("d", "c", "o", **FINETUNE_PRESETS[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "auc"}, "metric must be one of accuracy.*got 'auc'"),
        ({"precision": "fp16"}, "precision must be"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"mixup": 1.5}, r"mixup must be in \[0, 1\]"),
        ({"layer_decay": 0.0}, "0 < layer_decay <= 1"),
        ({"max_seconds": -1.0}, "max_seconds must be positive"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_finetune_options_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions("d", "c", "o", **fields)


def test_classifier_wrong_arguments_and_damaged_folder_raise(tmp_path):
    encoder = mae_ast().encoder_only()
    with pytest.raises(ValueError, match="at least two different names"):
        AudioClassifier(encoder, ["a", "a"])
    with pytest.raises(ValueError, match=r"max_seconds must be between 0.025 and 2.57"):
        AudioClassifier(ssast(), ["a", "b"], max_seconds=3.0)
    with pytest.raises(ValueError, match="pool must be mean or bands, got 'max'"):
        AudioClassifier(encoder, ["a", "b"], pool="max")
    classifier = AudioClassifier(encoder, ["a", "b"], layer=1, pool="bands")
    classifier.save_pretrained(tmp_path / "c")
    loaded = AudioClassifier.from_pretrained(tmp_path / "c")
    assert (loaded.labels, loaded.layer, loaded.max_seconds, loaded.multi_label) == (["a", "b"], 1, 10.0, False)
    log_mel = torch.randn(1, 40, 128)
    assert torch.equal(loaded(log_mel), classifier.eval()(log_mel))
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["encoder"]["embed_dim"] = 64
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds no classifier.*weights do not fit"):
        AudioClassifier.from_pretrained(tmp_path / "c")


def test_classifier_from_pretrained_more_layers_than_tensors_raises(tmp_path):
    AudioClassifier(mae_ast().encoder_only(), ["a", "b"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"]["encoder_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds no classifier.*has more layers than the file has tensors"):
        AudioClassifier.from_pretrained(tmp_path)
