"""Probing and fine-tuning: the parts, and whole runs on tones that a linear layer can tell apart."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from policy import LOGISTIC_GRADIENT, PROBABILITY, assert_rounding
from safetensors import safe_open
from safetensors.torch import save_file

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, cli
from mae_ast_fast.cli.downstream import task_summary
from mae_ast_fast.downstream.augment import mixup, spec_augment
from mae_ast_fast.downstream.classifier import NORM_EPS, AudioClassifier, pool_tokens
from mae_ast_fast.downstream.finetune import finetune, parameter_groups
from mae_ast_fast.downstream.metrics import average_precisions, interval, score
from mae_ast_fast.downstream.options import FINETUNE_PRESETS, FinetuneOptions, ProbeOptions
from mae_ast_fast.downstream.probe import PENALTIES, fit_logistic, probe
from mae_ast_fast.models.mae_ast import encoder_alone
from mae_ast_fast.training.lifecycle import Interrupted
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

soundfile, *_ = (pytest.importorskip(name) for name in ("soundfile", "soxr", "lhotse", "torchmetrics"))
RATE = 16000
PITCHES = {"low": 300, "middle": 900, "high": 2700}
SMALL = {"embed_dim": 32, "num_heads": 2}


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
    """120 tones, manifests of splits, of folds, of several labels and of moments, and checkpoints."""
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
        parts = [tone(PITCHES[name], b - a, rng) for name, a, b in zip(order, edges[:-1], edges[1:], strict=True)]
        soundfile.write(folder / f"mix{i}.wav", np.concatenate(parts), RATE)
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


def options(folder: Path, out: Path, data: str = "split.tsv", of: type = ProbeOptions, **more) -> ProbeOptions:
    given = {"checkpoint": str(folder / "mae_ast"), "precision": "fp32", "cache": str(folder / "cache"), **more}
    return of(data=str(folder / data), out=str(out), **given)


def predictions(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("make", [mae_ast, ssast])
def test_encode_does_not_depend_on_the_batch(make):
    model = make()
    waves = [torch.from_numpy(tone(500, s, np.random.default_rng(1))) for s in (1.0, 0.03, 2.3)]
    lengths = torch.tensor([len(wave) for wave in waves])
    with torch.no_grad():
        together = model.encode(*model.features(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths))
        means = pool_tokens(together, 3)
        for i, wave in enumerate(waves):
            alone = model.encode(*model.features(wave[None]))
            assert_rounding(together.x[together.packing.clip == i], alone.x)
            assert_rounding(means[i], alone.x.mean(0))
            assert torch.equal(together.time_block[together.packing.clip == i].sort()[0], alone.time_block.sort()[0])
            assert alone.time_block.bincount().unique().tolist() == [model.config.grid_f]
            bands = pool_tokens(together, 3, model.config.grid_f).reshape(3, model.config.grid_f, -1)
            for band in range(model.config.grid_f):
                assert_rounding(bands[i, band], alone.x[alone.frequency_block == band].mean(0))


def test_mae_asts_encode_is_extract_features():
    model = mae_ast()
    features = torch.randn(2, 70, 128)
    lengths = torch.tensor([70, 33])
    with torch.no_grad():
        for layer in (None, 1):
            packed, padded = model.encode(features, lengths, layer), model.extract_features(features, lengths, layer)
            assert torch.equal(packed.x, padded.last_hidden_state[packed.packing.clip, packed.packing.token])
            assert padded.lengths.tolist() == [40, 24]
            assert torch.equal(packed.packing.token, packed.time_block * 8 + packed.frequency_block)


def test_ssasts_encode_is_a_plain_vit():
    model, config = ssast(), ssast().config
    features = torch.randn(2, 64, 128)
    with torch.no_grad():
        found = model.encode(features)
        image = features.transpose(1, 2)  # (B, F, T), patches frequency block by frequency block
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
    assert_rounding(found.x.reshape(2, 32, 32), x)
    assert found.time_block[:32].tolist() == [0, 1, 2, 3] * 8
    assert found.frequency_block[:32].tolist() == sorted([*range(8)] * 4)


def test_a_layer_that_is_not_there():
    for model in (mae_ast(), ssast()):
        with pytest.raises(ValueError, match=r"layer must be an integer in 1..2, got 3"):
            model.encode(torch.randn(1, 32, 128), layer=3)


# ----------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_logistic_regression_ends_where_the_gradient_is_zero(multi_label, penalty):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    targets = torch.nn.functional.one_hot((x[:, :3] + torch.randn(120, 3, generator=generator)).argmax(1), 3).bool()
    weight, bias = fit_logistic(x, targets, penalty, multi_label, (torch.zeros(3, 6), torch.zeros(3)))
    logits = x @ weight.T + bias
    p = logits.sigmoid() if multi_label else logits.softmax(1)
    gradient = (p - targets.float()).T @ x + weight / penalty  # of the summed loss
    assert gradient.abs().max() < LOGISTIC_GRADIENT * len(x)
    assert (p - targets.float()).sum(0).abs().max() < LOGISTIC_GRADIENT * len(x)


def test_spec_augment_hides_one_stretch_of_each_kind():
    generator = torch.Generator().manual_seed(0)
    features, frames = torch.randn(200, 60, 128), torch.randint(1, 61, (200,), generator=generator)
    found = spec_augment(features, frames, 16, 0.25, -5.0, generator)
    hidden = found != features
    assert (found[hidden] == -5.0).all()
    bins, times = hidden.all(1), hidden.all(2)
    assert 14 <= bins.sum(1).max() <= 16
    assert bins.sum(1).min() == 0
    assert (times.sum(1) <= 0.25 * frames).all()
    assert (times.sum(1) / frames).max() > 0.2
    assert torch.equal(hidden, bins[:, None, :] | times[:, :, None])
    for stretch in (*bins, *times):  # one piece, and inside the clip
        assert stretch.int().diff().abs().sum() <= 2
    assert not (times & (torch.arange(60) >= frames[:, None])).any()
    assert torch.equal(spec_augment(features, frames, 0, 0.0, -5.0, generator), features)


def test_mix_mixes_waveforms_as_targets():
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


def test_rates_fall_from_layer_to_layer():
    classifier = AudioClassifier(encoder_alone(mae_ast()), ["a", "b"])
    given = FinetuneOptions("d", "c", "o", layer_decay=0.5, head_lr_factor=3.0, weight_decay=0.1)
    groups = parameter_groups(classifier, given)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    found = {names[id(p)]: (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == {name for name, _ in classifier.named_parameters()}
    assert found["head.weight"] == (3.0, 0.1)
    assert found["encoder.encoder.norm.weight"] == (1.0, 0.0)
    assert found["encoder.encoder.layers.1.fc1.weight"] == (1.0, 0.1)
    assert found["encoder.encoder.layers.0.fc1.bias"] == (0.5, 0.0)
    assert found["encoder.patch_embed.weight"] == (0.25, 0.1)
    shorter = parameter_groups(classifier, dataclasses.replace(given, layer=1))
    left = {names[id(p)]: group["factor"] for group in shorter for p in group["params"]}
    assert not any("layers.1" in name for name in left)
    assert left["encoder.encoder.layers.0.fc1.bias"] == 1.0


def test_input_normalisation_stays_that_of_pretraining():
    classifier = AudioClassifier(encoder_alone(mae_ast()), ["a", "b"]).train()
    assert classifier.training
    classifier(torch.randn(2, 64, 128)).sum().backward()
    assert float(classifier.encoder.input_norm.running_mean) == -8.0
    assert classifier.encoder.patch_embed.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_probe_on_splits(folder, tmp_path, capsys):
    summary = probe(options(folder, tmp_path / "run"))
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["task"], summary["metric"], summary["n_test"], summary["per_fold"]) == ("split", "accuracy", 30, [])
    rows = predictions(tmp_path / "run")
    assert [row["path"] for row in rows] == [f"{i}.wav" for i in range(120) if i // 3 % 4 == 3]
    assert list(rows[0]) == ["path", "label", "pred", "prob_high", "prob_low", "prob_middle"]
    right = np.mean([row["label"] == row["pred"] for row in rows])
    assert summary["value"] == summary["accuracy"] == pytest.approx(right)
    low, high = summary["ci95"]
    assert 0.6 < low < summary["value"] < high <= 1.0
    assert summary["log_mel_baseline"]["value"] == 1.0
    assert summary["majority_accuracy"] == pytest.approx(1 / 3)
    assert summary["chosen"][0]["C"] in PENALTIES
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000


def test_a_classifier_predicts_what_the_run_said(folder, tmp_path, capsys):
    probe(options(folder, tmp_path / "run"))
    row = predictions(tmp_path / "run")[0]
    out = tmp_path / "told/p.csv"
    command = ["predict", str(folder / row["path"]), str(folder / "broken.wav"), "--checkpoint", str(tmp_path / "run")]
    assert cli.main([*command, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert f"{row['path']}: {row['pred']} " in said.out
    assert "1 classified, 1 skipped" in said.out
    assert "broken.wav" in said.err
    with open(out, newline="") as file:
        (told,) = csv.DictReader(file)
    assert told["pred"] == row["pred"]
    for name in PITCHES:
        assert float(told[f"prob_{name}"]) == pytest.approx(float(row[f"prob_{name}"]), abs=PROBABILITY)


def test_folds(folder, tmp_path):
    of = {"checkpoint": str(folder / "ssast"), "pool": "bands"}
    summary = probe(options(folder, tmp_path / "run", "fold.tsv", **of))
    assert summary["folds"] == ["0", "1", "2"]
    assert summary["value"] == pytest.approx(np.mean(summary["per_fold"]))
    assert summary["n_test"] == 120
    assert summary["skipped"]["count"] == 1
    assert summary["skipped"]["files"][0]["path"] == "broken.wav"
    rows = predictions(tmp_path / "run")
    assert sorted(row["path"] for row in rows) == sorted(f"{i}.wav" for i in range(120))
    each = [[row["label"] == row["pred"] for row in rows if int(row["path"][:-4]) // 3 % 3 == k] for k in range(3)]
    assert summary["per_fold"] == pytest.approx([np.mean(one) for one in each])
    one = probe(options(folder, tmp_path / "one", "fold.tsv", folds="1", **of))
    assert one["per_fold"] == summary["per_fold"][1:2]
    with pytest.raises(ValueError, match=r"folds must be of \['0', '1', '2'\], got \['7'\]"):
        probe(options(folder, tmp_path / "none", "fold.tsv", folds="7"))
    assert not (tmp_path / "none").exists()


def test_moments(folder, tmp_path):
    summary = probe(options(folder, tmp_path / "run", "moments.tsv", max_seconds=1.5))
    assert summary["frame_level"]
    rows = predictions(tmp_path / "run")
    assert len(rows) == summary["n_test"]
    assert {row["path"] for row in rows} == {"mix3.wav", "mix7.wav"}
    assert np.mean([row["label"] == row["pred"] for row in rows]) == pytest.approx(summary["value"])
    # 20 ms stretches of three pitches are easy, patches of 160 ms see over the edges of stretches of 100 to 300 ms
    assert summary["log_mel_baseline"]["value"] > 0.8
    assert 0.5 < summary["value"] < summary["log_mel_baseline"]["value"]
    low, high = summary["ci95"]
    assert low <= summary["value"] <= high
    assert not (tmp_path / "run/model.safetensors").exists()
    with pytest.raises(ValueError, match="frame-level task, for mae-ast-fast probe alone"):
        finetune(options(folder, tmp_path / "other", "moments.tsv", FinetuneOptions))


def test_the_norm_begins_with_the_training_clips(folder, tmp_path, monkeypatch):
    """Scores make sense from the first update on; validation and test clips have no part in the statistics."""
    from mae_ast_fast.downstream import finetune as module

    begun = []
    monkeypatch.setattr(module._Trainer, "train", lambda trainer: begun.append(trainer) or (0.0, {"history": []}))
    finetune(tuned(folder, tmp_path / "run", data="split.tsv", pool="bands"))
    (trainer,) = begun
    classifier, run, part = trainer.classifier.eval(), trainer.run, trainer.part
    with torch.no_grad():
        parts = [classifier.encoder.encode(*classifier.encoder.features(w, n)) for w, n, *_ in run.read(part.train)]
        x = torch.cat([pool_tokens(e, int(e.packing.clip.max()) + 1, classifier.bands) for e in parts])
    assert len(x) == 60
    assert_rounding(classifier.norm.running_mean, x.mean(0))
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + NORM_EPS).sqrt()
    assert_rounding(classifier.norm(x), expected)
    assert not list(classifier.norm.parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-7, 0.0])
def test_a_probe_of_features_that_hardly_differ_predicts_what_it_said(folder, tmp_path, size):
    """Some columns of nearly no variance beside ordinary ones: the saved norm is the one that was fitted."""
    model = mae_ast()
    with torch.no_grad():
        model.encoder.norm.weight[:8] *= size
        model.encoder.norm.bias[:8] = 3.0
    model.save_pretrained(tmp_path / "model")
    probe(options(folder, tmp_path / "run", checkpoint=str(tmp_path / "model")))
    classifier = AudioClassifier.from_pretrained(tmp_path / "run")
    for row in predictions(tmp_path / "run")[:5]:
        told = [float(row[f"prob_{label}"]) for label in classifier.labels]
        assert classifier.classify_file(folder / row["path"]).tolist() == pytest.approx(told, abs=PROBABILITY)


def test_a_clip_alone_in_a_batch_waits(folder, tmp_path, capsys):
    rows = (folder / "split.tsv").read_text().splitlines()
    kept = [row for row in rows if not row.endswith("train")] + [row for row in rows if row.endswith("train")][:7]
    (folder / "seven.tsv").write_text("\n".join(kept) + "\n")
    seven = tuned(folder, tmp_path / "run", data="seven.tsv", batch_size=3, epochs=2)
    finetune(seven)
    assert "2/2" in capsys.readouterr().out
    (folder / "one.tsv").write_text("\n".join(kept[:-6]) + "\n")
    with pytest.raises(ValueError, match="expected at least two training clips with audio, the split has 1"):
        finetune(tuned(folder, tmp_path / "one", data="one.tsv"))


def test_labels_that_the_font_lacks():
    from mae_ast_fast.downstream.figures import _drawable

    labels = ("a b", "ü", "\u3105", "x\u3113", "\U0010fffe")
    assert [_drawable(label) for label in labels] == ["a b", "ü", "B", "x ZH", "U+10FFFE"]


def test_a_run_notes_what_a_table_leaves_open(folder, tmp_path):
    rows = (folder / "split.tsv").read_text().splitlines()
    rows_open = [row for row in rows if "high\ttrain" not in row]
    text = "\n".join(rows_open).replace("high\tvalid", "high\ttest").replace("valid", "train")
    (folder / "open.tsv").write_text(text + "\n")
    notes = probe(options(folder, tmp_path / "run", "open.tsv"))["notes"]
    assert any(note.startswith("no clip is of split valid: ") for note in notes)
    assert "tested without a training clip in the split: high" in notes
    rare = [r.replace("middle", "odd") if r.endswith("valid") else r for r in rows]
    few = [r for i, r in enumerate(rare) if i == 0 or not r.endswith("test") or i < 40]
    (folder / "odd.tsv").write_text("\n".join(few) + "\n")
    notes = probe(options(folder, tmp_path / "odd", "odd.tsv"))["notes"]
    assert "in validation clips alone, without a training clip in the split: odd" in notes
    assert "9 test clips: too few for the interval to be true to its name" in notes
    both = "\n".join([rows[0] + "\tfold", *(f"{row}\t{i % 3}" for i, row in enumerate(rows[1:]))])
    (folder / "both.tsv").write_text(both + "\n")
    notes = probe(options(folder, tmp_path / "both", "both.tsv"))["notes"]
    assert "the column fold is taken, the column split is not" in notes
    assert probe(options(folder, tmp_path / "plain"))["notes"] == []


def test_several_labels(folder, tmp_path):
    for name, run in (("probe", probe), ("tuned", finetune)):
        more = {"of": FinetuneOptions, "epochs": 12, "lr": 5e-3, "mixup": 0.3} if run is finetune else {}
        summary = run(options(folder, tmp_path / name, "several.tsv", **more))
        assert summary["metric"] == "map"
        assert summary["multi_label"]
        assert summary["value"] > 0.8
        rows = predictions(tmp_path / name)
        assert {row["label"] for row in rows} == {"low", "high;upper", "middle;upper"}
        assert not (tmp_path / name / "confusion.png").exists()
        assert (tmp_path / name / "average_precision.png").stat().st_size > 0
        shown = task_summary(summary, str(tmp_path / name)).splitlines()[-2].partition(": ")[2].split(", ")
        assert all((tmp_path / name / file).exists() for file in shown) and len(shown) == 3 + (run is finetune)
    assert AudioClassifier.from_pretrained(tmp_path / "tuned").multi_label


def tuned(folder: Path, out: Path, **more) -> FinetuneOptions:
    easy = {"layer_decay": 1.0, "label_smoothing": 0.0, "freq_mask": 8, "time_mask": 0.1}
    given = {"epochs": 8, "lr": 5e-3, "batch_size": 4, "data": "fold.tsv", **easy, **more}
    return options(folder, out, of=FinetuneOptions, **given)


def test_fine_tuning_goes_on_with_the_folds_that_are_not_done(folder, tmp_path, capsys):
    given = tuned(folder, tmp_path / "run")
    summary = finetune(given)
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
    again = finetune(dataclasses.replace(given, data=os.path.relpath(given.data)))
    said = capsys.readouterr().out
    assert "fold_0 is done" in said
    assert "fold_1 is done" not in said
    assert not list((tmp_path / "run").rglob("*state*"))
    assert again.pop("seconds") > 1000.0 > summary.pop("seconds") > done["seconds"] > 0.0
    assert again == summary
    told = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted((row["fold"], row["epoch"]) for row in told) == [(f, e) for f in "012" for e in range(1, 9)]
    with pytest.raises(ValueError, match="holds a run with another lr: choose another --out"):
        finetune(dataclasses.replace(given, lr=1e-3))


@pytest.mark.parametrize("stop", [2, 7, 10, 22])
def test_a_stopped_round_goes_on_where_it_stood(folder, tmp_path, monkeypatch, capsys, stop):
    """In the first epoch, at an epoch's first update, in a later one, in the next fold: as if nothing had happened."""
    from mae_ast_fast.downstream import finetune as module

    mae_ast(dropout=0.2).save_pretrained(tmp_path / "model")
    more = {"checkpoint": str(tmp_path / "model"), "epochs": 2, "batch_size": 6, "mixup": 0.5, "balanced": True}
    undisturbed = finetune(tuned(folder, tmp_path / "undisturbed", folds="0,2", **more))
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    real, made = module._Trainer._update, []

    def update(trainer, clips):
        if len(made) == stop:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(clips)
        return real(trainer, clips)

    monkeypatch.setattr(module._Trainer, "_update", update)
    given = tuned(folder, tmp_path / "run", folds="0,2", **more)
    with pytest.raises(KeyboardInterrupt):
        finetune(given)
    with pytest.raises(ValueError, match="holds a run with another lr"):
        finetune(dataclasses.replace(given, lr=1e-3))
    (path,) = (tmp_path / "run").glob("*/state.safetensors")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["told"])
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    save_file(tensors, path, {"told": json.dumps({**told, "seconds": told["seconds"] + 1000.0})})
    again = finetune(given)
    assert again["seconds"] > 1000.0
    kept = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "run").glob("*/result.json")]
    assert sorted(seconds > 1000.0 for seconds in kept) == [False, True]
    assert len(made) == 1 + 2 * 2 * 7, "no update was made twice"
    assert f"goes on after update {stop % 14} of 14" in capsys.readouterr().out
    assert undisturbed | {"seconds": 0} == again | {"seconds": 0}
    for name in ("metrics.jsonl", "predictions.csv", "model.safetensors", "fold_0/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert not list((tmp_path / "run").rglob("state*"))


def test_every_epoch_and_update_draws_anew(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module

    seeds, real = [], module._Trainer._draw_from

    def draw_from(trainer, place):
        real(trainer, place)
        seeds.append((trainer.generator.initial_seed(), torch.initial_seed(), trainer.rng.random()))

    monkeypatch.setattr(module._Trainer, "_draw_from", draw_from)
    finetune(tuned(folder, tmp_path / "run", folds="0,2", epochs=2, batch_size=20))
    draws = 2 * 2 * (1 + 2)  # folds, epochs, an order and two updates
    assert [len(set(column)) for column in zip(*seeds, strict=True)] == [draws] * 3
    assert len(seeds) == draws


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop", [3, 8, 11, 16])
def test_a_signal_ends_an_update_and_is_no_loss(folder, tmp_path, monkeypatch, capsys, number, stop):
    """In the first epoch, in its last update, in the next epoch, in its last: as if nothing had happened."""
    from mae_ast_fast.downstream import finetune as module

    line = ["--data", f"{folder}/split.tsv", "--checkpoint", f"{folder}/mae_ast", "--cache", f"{folder}/cache"]
    line = ["finetune", *line, "--epochs", "2", "--batch-size", "8", "--lr", "5e-3"]
    assert cli.main([*line, "--out", f"{tmp_path}/undisturbed"]) == 0
    real, made = module._Trainer._update, []

    def update(trainer, clips):
        made.append(clips)
        if len(made) == stop:
            signal.raise_signal(number)
        return real(trainer, clips)

    monkeypatch.setattr(module._Trainer, "_update", update)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert cli.main([*line, "--out", f"{tmp_path}/run"]) == 128 + number
    assert before == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert len(made) == stop
    told = f"mae-ast-fast finetune: stopped by {number.name}; saved {tmp_path}/run/split/state.safetensors"
    assert told in capsys.readouterr().err
    assert cli.main([*line, "--out", f"{tmp_path}/run"]) == 0
    assert len(made) == 2 * 8
    for name in ("metrics.jsonl", "predictions.csv", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_a_signal_where_nothing_can_be_saved(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream import finetune as module

    def full(*_):
        signal.raise_signal(signal.SIGINT)
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(Interrupted, match="stopped by SIGINT; nothing could be saved") as stopped:
        finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=1))
    assert stopped.value.exit_code == 130
    assert "No space left on device" in capsys.readouterr().out


def test_fine_tuning_outside_the_main_thread(folder, tmp_path):
    """Where Python lets nobody handle signals."""
    given = tuned(folder, tmp_path / "run", data="split.tsv", epochs=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finetune, given).result()["value"] > 0.3


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("run", [probe, finetune])
def test_two_runs_in_one_folder(folder, tmp_path, run, begun):
    more = {"of": FinetuneOptions, "epochs": 1} if run is finetune else {}
    given = options(folder, tmp_path / "run", **more)
    if begun:
        run(given)
    holder = "import sys; from mae_ast_fast.training.lifecycle import run_lock; from pathlib import Path\n"
    holder += "with run_lock(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"has it\n"
        with pytest.raises(ValueError, match="a run is going on in"):
            run(given)
        process.stdin.close()
        process.wait()
    run(given)


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> FinetuneOptions:
    """Of a run that was stopped before its third update, of five."""
    from mae_ast_fast.downstream import finetune as module

    given = tuned(folder, tmp_path / "run", data="split.tsv", epochs=1, batch_size=12)
    real = module._Trainer._update

    def update(trainer, clips):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return real(trainer, clips)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_SAVE_SECONDS", -1.0)
        patch.setattr(module._Trainer, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            finetune(given)
    return given


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("cut", "is damaged"),
        ("bit", "is damaged (its checksum differs)"),
        ("none", "the split goes on after update 2 of 5"),
    ],
)
def test_a_state_that_does_not_serve(stopped, capsys, harm, told):
    path = Path(stopped.out) / "split/state.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "bit":
        content[-1] ^= 1
    path.write_bytes(content[:-100] if harm == "cut" else content)
    (path.parent / ".state.partial.safetensors").write_text("killed while it was written")
    assert finetune(stopped)["value"] > 0.3
    said = capsys.readouterr().out
    assert told in said
    assert ("the split begins anew" in said) == (harm != "none")
    assert not list(Path(stopped.out).rglob("*state*"))


def test_a_state_that_cannot_be_written_does_not_end_a_run(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream import finetune as module

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "save_file", full)
    assert finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=1))["value"] > 0.3
    assert "state.safetensors cannot be written (No space left on device)" in capsys.readouterr().out


def test_a_run_that_is_stopped_in_its_test_goes_on_there(folder, tmp_path, monkeypatch, capsys):
    from mae_ast_fast.downstream.run import Run

    given = tuned(folder, tmp_path / "run", data="split.tsv", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(AudioClassifier, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(given)
    evaluated, real = [], Run.probabilities
    monkeypatch.setattr(Run, "probabilities", lambda run, *rest: evaluated.append(0) or real(run, *rest))
    assert len(finetune(given)["chosen"]) == 1
    assert len(evaluated) == 1
    assert "goes on after update 30 of 30" in capsys.readouterr().out


def test_the_norm_of_many_clips_begins_with_a_sample(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module
    from mae_ast_fast.downstream import probe as probe_module

    seen, real = [], probe_module.encoder_features
    monkeypatch.setattr(module, "encoder_features", lambda run, clips: seen.append(clips) or real(run, clips))
    monkeypatch.setattr(module, "_NORM_CLIPS", 20)
    finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=1))
    assert len(set(seen[0])) == len(seen[0]) == 20


@pytest.mark.parametrize("run", [probe, finetune])
@pytest.mark.parametrize("changed", ["label", "labels", "splits", "recording", "weights"])
def test_results_of_other_data_are_not_overwritten(folder, tmp_path, run, changed):
    """Under the same options: what they name has changed since."""
    mae_ast().save_pretrained(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "set")
    more = {"of": FinetuneOptions, "epochs": 1} if run is finetune else {}
    given = options(tmp_path / "set", tmp_path / "run", "split.tsv", checkpoint=str(tmp_path / "model"), **more)
    made = run(given)
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
        run(given)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (tmp_path / "run/summary.json").unlink()
    for result in (tmp_path / "run").glob("*/result.json"):
        result.unlink()
    again = run(given)
    assert again.keys() == made.keys()


@pytest.mark.parametrize("save_seconds", [300.0, -1.0])
def test_a_start_that_fails_leaves_the_folder_free(folder, tmp_path, monkeypatch, save_seconds):
    from mae_ast_fast.downstream import finetune as module

    monkeypatch.setattr(module, "_SAVE_SECONDS", save_seconds)
    made, real = [], module._Trainer._update
    monkeypatch.setattr(module._Trainer, "_update", lambda *of: made.append(1) or real(*of))
    given = tuned(folder, tmp_path / "run", data="split.tsv", lr=1e30, layer_decay=1.0, clip_norm=1e30)
    with pytest.raises(ValueError, match="the loss became"):
        finetune(given)
    assert (len(made) < 15) == (save_seconds < 0), (
        "a state is not written of what is lost, and an epoch not gone through"
    )
    finetune(dataclasses.replace(given, lr=1e-3, clip_norm=1.0, epochs=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out must be a folder"):
        probe(options(folder, tmp_path / "file"))


@pytest.mark.parametrize("run", [probe, finetune])
def test_one_label_or_none(folder, tmp_path, run):
    """A detector: some clips have the label, the others none."""
    rows = (folder / "split.tsv").read_text().replace("middle", "").replace("high", "")
    (folder / "low.tsv").write_text(rows)
    more = {"of": FinetuneOptions, "epochs": 1} if run is finetune else {}
    summary = run(options(folder, tmp_path / "run", "low.tsv", multi_label=True, **more))
    assert summary["classes"] == 1
    low, high = summary["ci95"]
    assert 0.0 <= low <= summary["value"] <= high <= 1.0
    (folder / "none.tsv").write_text("\n".join(row.replace("low\tvalid", "\tvalid") for row in rows.splitlines()))
    with pytest.raises(ValueError, match="no valid clip of the split has any label"):
        run(options(folder, tmp_path / "none", "none.tsv", multi_label=True, **more))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"folds": "1"}, r"folds are of tables with a column fold, got '1' for .*split\.tsv"),
        ({"cache": "FILE"}, r"cache must be a folder, got the file .*split\.tsv"),
        ({"checkpoint": "WEIGHTS"}, r"the folder of model\.safetensors and its config\.json, got the file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(folder, tmp_path, wrong, message):
    places = {"FILE": str(folder / "split.tsv"), "WEIGHTS": str(folder / "mae_ast/model.safetensors")}
    wrong = {name: places.get(value, value) for name, value in wrong.items()}
    with pytest.raises(ValueError, match=message):
        probe(options(folder, tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


def test_intervals_hold_the_value():
    rng = np.random.default_rng(0)
    targets = rng.random((400, 20)) < 0.02
    p = (0.3 * targets + rng.random((400, 20))).astype(np.float32)
    value = score("map", p, targets, True)
    low, high = interval(lambda rows: score("map", p[rows], targets[rows], True), [np.arange(400)], costly=p.size * 40)
    assert low < value < high
    either = interval(lambda rows: 1.0 if rows.max() < 4 else float("nan"), [np.arange(4), np.arange(4, 8)])
    assert either == (1.0, 1.0)  # a fold without the class says nothing of it
    # What is drawn twice biases a statistic, such as the share of different clips: of all of them it is 1.
    low, high = interval(lambda rows: len(np.unique(rows)) / 4, [np.arange(4)])
    assert low < 1.0 < high
    low, high = interval(lambda rows: float("nan"), [np.arange(4)])
    assert np.isnan(low) and np.isnan(high)


def test_probabilities_that_are_not_finite_have_no_score(folder, tmp_path, monkeypatch):
    """Of the last update's weights, whose loss nobody has seen; the folder stays free."""
    from mae_ast_fast.downstream import finetune as module
    from mae_ast_fast.downstream.run import Run

    given = tuned(folder, tmp_path / "run", data="split.tsv", epochs=1, batch_size=60, lr=1e30, clip_norm=1e30)
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    with pytest.raises(ValueError, match=r"validation probabilities that are not finite in epoch 1 .*smaller --lr"):
        finetune(given)
    given = dataclasses.replace(given, lr=1e-3, clip_norm=1.0)
    real = Run.probabilities
    with monkeypatch.context() as patch:
        test = [i for i in range(120) if i // 3 % 4 == 3]
        patch.setattr(
            Run, "probabilities", lambda run, of, clips: real(run, of, clips) * (1 if clips != test else np.nan)
        )
        with pytest.raises(ValueError, match="the probabilities of the split are not finite"):
            finetune(given)
    assert not (tmp_path / "run/summary.json").exists()


def test_labels_of_folds_are_drawn_as_the_mean_over_folds(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import figures as figures_module

    drawn = []
    monkeypatch.setattr(figures_module, "plot_labels", lambda precisions, *rest: drawn.append(precisions))
    rows = (folder / "fold.tsv").read_text().splitlines()
    rows = [rows[0], *(row.replace("middle", "middle;odd") if row.endswith("\t1") else row for row in rows[1:])]
    (folder / "odd_fold.tsv").write_text("\n".join(rows) + "\n")
    summary = probe(options(folder, tmp_path / "run", "odd_fold.tsv", multi_label=True))
    known = {name: value for name, value in zip(["high", "low", "middle", "odd"], drawn[0], strict=True)}
    assert np.isfinite(list(known.values())).all()
    found = predictions(tmp_path / "run")
    fold_of = {row.split("\t")[0]: row.split("\t")[2] for row in rows[1:]}
    of_folds = {fold: [] for fold in "012"}
    for name, value in known.items():
        each = []
        for fold, values in of_folds.items():
            of = [row for row in found if fold_of[row["path"]] == fold]
            y = np.array([[name in row["label"].split(";")] for row in of])
            if y.any():
                each.append(average_precisions(np.array([[float(row[f"prob_{name}"])] for row in of], np.float32), y))
                values.append(each[-1])
        assert value == pytest.approx(np.mean(each), abs=1e-4)
    assert [np.mean(values) for values in of_folds.values()] == pytest.approx(summary["per_fold"], abs=1e-4)


def test_a_folder_of_pretraining_is_left_alone(folder, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for run in (probe, finetune):
        given = options(folder, tmp_path / "run", of=FinetuneOptions if run is finetune else ProbeOptions)
        with pytest.raises(ValueError, match="already holds a model or a pretraining run: choose another --out"):
            run(given)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    probe(options(folder, tmp_path / "probe"))
    with pytest.raises(ValueError, match="is the folder of a probe or fine-tuning: choose another --out"):
        pretrain(PretrainOptions(data=folder, out=tmp_path / "probe", cache=folder / "cache"))


def test_another_run_that_was_there_first(folder, tmp_path, monkeypatch):
    """It began and ended while this one read its audio: what it made is not taken for ours."""
    from mae_ast_fast.downstream import run as downstream

    real, first = downstream.Waveforms, []

    def waveforms(*inputs):
        if not first:
            first.append(1)
            finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=1))
        return real(*inputs)

    monkeypatch.setattr(downstream, "Waveforms", waveforms)
    with pytest.raises(ValueError, match="holds a run with another epochs: choose another --out"):
        finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=2))


def test_a_killed_start_leaves_no_rows(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream import finetune as module

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "_save", killed)  # after the first epoch
        with pytest.raises(KeyboardInterrupt):
            finetune(tuned(folder, tmp_path / "run", folds="0", epochs=1, lr=1e-2))
    assert (tmp_path / "run/metrics.jsonl").read_text()
    finetune(tuned(folder, tmp_path / "run", folds="1", epochs=1))
    told = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["fold"] for row in told] == ["1"]


def test_results_of_an_earlier_version(folder, tmp_path):
    probe(options(folder, tmp_path / "run"))
    path = tmp_path / "run/task_options.json"
    known = json.loads(path.read_text())
    known.pop("content")
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="holds a run of an earlier version: choose another --out"):
        probe(options(folder, tmp_path / "run"))
    path.write_text("null")
    with pytest.raises(ValueError, match="holds a run with another mode"):
        probe(options(folder, tmp_path / "run"))


def test_names_that_look_like_formulas(folder, tmp_path):
    for name in ("split", "several"):
        shutil.copy(folder / f"{name}.tsv", folder / f"{name}$_$.tsv")
        assert probe(options(folder, tmp_path / name, f"{name}$_$.tsv"))["value"] > 0.3
    rows = (folder / "fold.tsv").read_text().replace("\t1\n", "\t$_$\n")
    (folder / "odd$_$.tsv").write_text(rows)
    assert finetune(tuned(folder, tmp_path / "folds", data="odd$_$.tsv", epochs=1))["value"] > 0.3


def test_average_precision_of_each_label():
    rng = np.random.default_rng(0)
    targets = rng.random((50, 3)) < 0.4
    targets[:, 1] = False
    p = np.stack([targets[:, 0], rng.random(50), rng.random(50)], 1).astype(np.float32)
    found = average_precisions(p, targets)
    assert found[0] == 1.0 and np.isnan(found[1]) and found[2] < 1.0
    assert np.nanmean(found) == pytest.approx(score("map", p, targets, True), abs=1e-6)
    assert average_precisions(p[:, :1], targets[:, :1]) == 1.0


@pytest.mark.parametrize("count", [3, 70])
def test_labels_are_drawn(tmp_path, monkeypatch, count):
    from mae_ast_fast.downstream import figures as figures_module

    drawn = []
    monkeypatch.setattr(figures_module, "save_figure", lambda figure, path: drawn.append(figure))
    precisions = np.linspace(0.0, 1.0, count)
    precisions[1] = np.nan
    shares = np.linspace(0.5, 0.1, count)
    labels = [f"label {i}" for i in range(count)]
    figures_module.plot_labels(precisions, shares, labels, "title", tmp_path / "x.png")
    axis = drawn[0].axes[0]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert len(names) == min(count - 1, 60) and names[0] == "label 0" and names[-1] == labels[-1]
    assert [bar.get_width() for bar in axis.patches] == [precisions[labels.index(name)] for name in names]
    assert axis.lines[0].get_xdata().tolist() == [shares[labels.index(name)] for name in names]


@pytest.mark.parametrize("last", [0.5, 0.9])
def test_the_best_epoch_is_kept(folder, tmp_path, monkeypatch, last):
    """Of equal ones the first."""
    from mae_ast_fast.downstream.run import Run

    real, scores, epochs = Run.score, iter([0.2, 0.9, last]), []

    def fake(self, probabilities, targets, metric=None):
        value = next(scores, None)
        if value is None:
            return real(self, probabilities, targets, metric)
        epochs.append(probabilities)
        return value

    monkeypatch.setattr(Run, "score", fake)
    summary = finetune(tuned(folder, tmp_path / "run", data="split.tsv", epochs=3))
    assert (summary["valid"], summary["chosen"]) == ([0.9], [{"epoch": 2}])
    classifier = AudioClassifier.from_pretrained(tmp_path / "run")
    valid = [i for i in range(120) if i // 3 % 4 == 2]
    found = np.stack([classifier.classify_file(folder / f"{i}.wav").numpy() for i in valid])
    assert np.abs(found - epochs[1]).max() < 0.01 * np.abs(found - epochs[2]).max()


def test_balanced_sampling_draws_rare_classes_as_often(folder, tmp_path, monkeypatch):
    from mae_ast_fast.downstream.finetune import _Trainer

    rows = (folder / "split.tsv").read_text().splitlines()
    kept = [r for i, r in enumerate(rows) if "low\ttrain" not in r or i < 5]
    (folder / "rare.tsv").write_text("\n".join(kept) + "\n")
    drawn = []
    real = _Trainer._batches

    def batches(self, epoch):
        for batch in real(self, epoch):
            drawn.extend(self.run.task.clips[i].labels[0] for i in batch)
            yield batch

    monkeypatch.setattr(_Trainer, "_batches", batches)
    finetune(tuned(folder, tmp_path / "run", data="rare.tsv", epochs=8, balanced=True))
    shares = [drawn.count(name) / len(drawn) for name in PITCHES]
    assert min(shares) > 0.2


def test_a_loss_that_is_not_finite_ends_a_run(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the loss became .* try a smaller --lr"):
        finetune(tuned(folder, tmp_path / "run", data="split.tsv", lr=1e30, layer_decay=1.0, clip_norm=1e30))


def test_folders_of_others_are_kept(folder, tmp_path):
    mae_ast().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="already holds a model"):
        probe(options(folder, tmp_path / "model"))
    probe(options(folder, tmp_path / "run"))
    with pytest.raises(ValueError, match="holds a run with another mode"):
        finetune(options(folder, tmp_path / "run", of=FinetuneOptions))


# ---------------------------------------------------------------------------------------------------- options, commands


def test_the_commands(folder, tmp_path, capsys):
    given = ["--checkpoint", str(folder / "mae_ast"), "--cache", str(folder / "cache"), "--precision", "fp32"]
    assert cli.main(["probe", "--data", str(folder / "split.tsv"), "--out", str(tmp_path / "p"), *given]) == 0
    said = capsys.readouterr().out
    value = json.loads((tmp_path / "p/summary.json").read_text())
    low, high = value["ci95"]
    assert f"split: accuracy {value['value']:.4f} (95 % interval {low:.4f} - {high:.4f}) on 30 test clips" in said
    assert f"mae-ast-fast predict FILE --checkpoint {tmp_path / 'p'}" in said
    more = ["--epochs", "1", "--preset", "esc50", "--batch_size", "8"]
    assert cli.main(["finetune", "--data", str(folder / "split.tsv"), "--out", str(tmp_path / "f"), *given, *more]) == 0
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
    assert "holds no classifier (mae-ast-fast finetune or probe makes one)" in capsys.readouterr().err


def test_a_folder_is_no_place_for_a_table_of_predictions(folder, tmp_path, capsys):
    assert cli.main(["predict", "x.wav", "--checkpoint", str(folder / "mae_ast"), "--out", str(tmp_path)]) == 2
    assert f"--out is the table to write, got the folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", FINETUNE_PRESETS)
def test_presets_are_options(name):
    FinetuneOptions("d", "c", "o", **FINETUNE_PRESETS[name])


@pytest.mark.parametrize(
    ("given", "message"),
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
def test_options_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions("d", "c", "o", **given)


def test_classifiers_that_are_none(tmp_path):
    encoder = encoder_alone(mae_ast())
    with pytest.raises(ValueError, match="at least two different names"):
        AudioClassifier(encoder, ["a", "a"])
    with pytest.raises(ValueError, match=r"max_seconds must be between 0.025 and 2.57"):
        AudioClassifier(ssast(), ["a", "b"], max_seconds=3.0)
    with pytest.raises(ValueError, match="pool must be mean or bands, got 'max'"):
        AudioClassifier(encoder, ["a", "b"], pool="max")
    classifier = AudioClassifier(encoder, ["a", "b"], layer=1, pool="bands")
    classifier.save_pretrained(tmp_path / "c")
    again = AudioClassifier.from_pretrained(tmp_path / "c")
    assert (again.labels, again.layer, again.max_seconds, again.multi_label) == (["a", "b"], 1, 10.0, False)
    features = torch.randn(1, 40, 128)
    assert torch.equal(again(features), classifier.eval()(features))
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["encoder"]["embed_dim"] = 64
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds no classifier.*weights do not fit"):
        AudioClassifier.from_pretrained(tmp_path / "c")
