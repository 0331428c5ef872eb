"""Pretraining: outputs of a run of either model; it survives kills, signals, bad files and non-finite losses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from goldens import Golden
from safetensors.torch import load_file
from toy_audio import write_gliding_tones
from warm import Command

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, fbank
from mae_ast_fast.checkpoints import load as checkpoint
from mae_ast_fast.checkpoints import step_folder
from mae_ast_fast.checkpoints import training as resume
from mae_ast_fast.checkpoints.training import TrainingCheckpoints
from mae_ast_fast.cli.parser import TRAIN_EXTRA
from mae_ast_fast.data.shards import Shards
from mae_ast_fast.models.config import SSAST_OBJECTIVES
from mae_ast_fast.training import pretrain as pretrain_module
from mae_ast_fast.training import trainer as trainer_module
from mae_ast_fast.training.distributed import DistributedContext
from mae_ast_fast.training.metrics_log import StepRecord, read_metrics
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain
from mae_ast_fast.training.schedule import learning_rate
from mae_ast_fast.training.trainer import NonFiniteLoss

for library in TRAIN_EXTRA:
    pytest.importorskip(library)
soundfile = pytest.importorskip("soundfile")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.usefixtures("quick_reports"),
]
RATE = 16000
SMALL = {
    "embed_dim": 32,
    "ffn_dim": 64,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_embed_dim": 32,
    "decoder_layers": 1,
}


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gliding_tones(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def options(audio: Path, tmp_path: Path) -> PretrainOptions:
    return PretrainOptions(
        data=str(audio),
        out=str(tmp_path / "run"),
        cache=str(audio.parent / "cache"),
        model_args=dict(SMALL),
        steps=12,
        warmup_steps=3,
        batch_seconds=12.0,
        max_seconds=3.0,
        save_every=3,
        evaluate_every=6,
        log_every=2,
    )


def losses(run: str | Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(Path(run) / "metrics.jsonl") if "loss" in row]


def command(options: PretrainOptions, folder: Path) -> list[str]:
    config = folder / "options.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(options)))
    return ["-m", "mae_ast_fast", "pretrain", "--config", str(config)]


def wait_for_step(process: Command, run: Path, step: int) -> None:
    deadline, path = time.monotonic() + 120, run / "metrics.jsonl"
    while not path.is_file() or not any(row["step"] >= step for row in read_metrics(path)):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.full_report
def test_pretrain_writes_run_folder(options: PretrainOptions) -> None:
    summary = pretrain(options)
    run = Path(options.out)
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(row["clips"] > 0 and row["clips_per_second"] > 0 and row["audio_seconds"] <= 12.0 for row in steps)
    assert [row["step"] for row in rows if "held_out" in row] == [6]
    weighted = [10 * row["loss_reconstruction"] + row["loss_classification"] for row in steps]
    assert weighted == pytest.approx([row["loss"] for row in steps])

    for name in ("loss.png", "reconstruction.png"):
        picture = __import__("matplotlib.image").image.imread(run / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 900
        assert picture[..., :3].std() > 0.05, f"{name} is blank"
    assert list((run / "tensorboard").glob("events.*"))

    assert json.loads((run / "summary.json").read_text()) == summary
    report = summary["held_out"]
    assert report["clips"] == len(summary["held_out_clips"]) > 0
    assert set(report["baselines"]) == {"mean_of_visible", "mean_of_visible_same_band", "interpolation"}
    assert 0 < report["chance"] < 0.2 and 0 <= report["accuracy"] <= 1
    assert report["passed"] == (not report["failures"])
    assert summary["audio_hours_seen"] == pytest.approx(sum(row["audio_seconds"] for row in steps) / 3600, abs=1e-3)

    assert [path.name for path in step_folder.training_checkpoints(run)] == ["step-00000009", "step-00000012"]
    final, last = (checkpoint.load_model(path).state_dict() for path in (run, run / "checkpoints/step-00000012"))
    assert final.keys() == last.keys() and all(torch.equal(final[name], last[name]) for name in final)
    assert MAEAST.from_pretrained(run).config == options.model_config()
    voices = {name.split("/")[0] for name in summary["held_out_clips"]}
    assert len(voices) == 1, "whole folders are held out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "cuda"}, "device cuda is not available: PyTorch sees 0 CUDA devices"),
        ({"out": "file"}, "--out must be a folder, got the file file"),
        ({"out": "file/run"}, "--out must be a folder, got the file file"),
    ],
)
def test_pretrain_unusable_device_or_out_is_rejected_before_data(
    *,
    fields: dict[str, str],
    message: str,
    options: PretrainOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrain_module, "training_shards", lambda options: pytest.fail("opened the data"))
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(dataclasses.replace(options, **fields))


def test_pretrain_start_line_tells_evaluated_clips_from_those_not_trained_on(
    options: PretrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = pretrain(dataclasses.replace(options, steps=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if "run folder" in line]
    split = summary["held_out_split"].removeprefix("held out: ")
    assert re.match(r"\d+ of \d+ clips", split)
    assert len(lines) == 1
    assert f"; not trained on: {split}; {summary['held_out']['clips']} of them evaluated; run folder" in lines[0]
    assert "held out" not in lines[0]


def test_pretrain_finished_run_stays_unchanged(options: PretrainOptions, capsys: pytest.CaptureFixture[str]) -> None:
    first = pretrain(options)
    before = losses(options.out)
    assert pretrain(options) == first
    assert losses(options.out) == before


def test_pretrain_after_kill_equals_uninterrupted_run(options: PretrainOptions, tmp_path: Path) -> None:
    whole = dataclasses.replace(options, out=str(tmp_path / "whole"))
    pretrain(whole)
    run = Path(options.out)
    line, output, errors = command(options, tmp_path), tmp_path / "output", tmp_path / "errors"
    killed_at = []
    for step in (5, 8):
        process = Command(line, output, errors)
        wait_for_step(process, run, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(losses(run)[-1][0])
        assert not (run / "summary.json").exists()
    assert Command(line, output, errors).wait() == 0, errors.read_text()
    assert "resuming from" in output.read_text()
    assert losses(run) == losses(whole.out), f"killed at {killed_at}"
    weights, expected = load_file(run / "model.safetensors"), load_file(Path(whole.out) / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_pretrain_signal_saves_and_exits(options: PretrainOptions, tmp_path: Path, signal_number: int) -> None:
    options = dataclasses.replace(options, steps=500, warmup_steps=0, save_every=500, evaluate_every=500)
    run = Path(options.out)
    process = Command(command(options, tmp_path), tmp_path / "output", tmp_path / "errors")
    wait_for_step(process, run, 4)
    for _ in range(1 if signal_number == signal.SIGINT else 2):  # a scheduler may send SIGTERM to a process twice
        process.send_signal(signal_number)
        time.sleep(0.01)
    process.wait(timeout=60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 128 + signal_number, errors
    saved = step_folder.training_checkpoints(run)
    assert len(saved) == 1 and str(saved[0]) in errors and "Traceback" not in errors
    assert losses(run)[-1][0] == int(saved[0].name.split("-")[1]) < 500
    latest = TrainingCheckpoints(run, 1).latest_valid()
    assert latest.state["step"] == losses(run)[-1][0] and isinstance(latest.config, MAEASTConfig)


def test_pretrain_incomplete_checkpoint_is_skipped(
    options: PretrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dataclasses.replace(options, out=options.out + "-whole")
    pretrain(whole)
    pretrain(options)
    run = Path(options.out)
    newest = run / "checkpoints/step-00000012"
    (weights,) = (newest / "shards").iterdir()
    os.truncate(weights, weights.stat().st_size // 2)
    partial = run / "checkpoints/.partial-step-00000015"
    partial.mkdir()
    (partial / "trainer.json").write_bytes(b"half")
    capsys.readouterr()
    pretrain(options)
    printed = capsys.readouterr().out
    assert "damaged checkpoint: step-00000012" in printed and "resuming from" in printed
    assert losses(run) == losses(whole.out)
    assert not partial.exists()


def test_pretrain_crash_in_save_keeps_previous_checkpoint(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = step_folder.crc32, []

    def crash(path: Path) -> int:
        calls.append(path)
        if len(calls) == 4:  # three files per checkpoint
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(resume, "crc32", crash)
    with pytest.raises(OSError, match="No space"):
        pretrain(options)
    assert [path.name for path in step_folder.training_checkpoints(Path(options.out))] == ["step-00000003"]
    monkeypatch.undo()
    pretrain(options)
    assert losses(options.out)[-1][0] == 12


def test_pretrain_non_finite_loss_names_step_clips_and_checkpoint(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(options, loader_workers=0)
    real, loaded = Shards.read, []

    def record_names(shards: Shards, crops: Any) -> Any:
        batch = real(shards, crops)
        loaded.append(batch.names)
        return batch

    def poisoned(model: MAEAST, waveforms: torch.Tensor, lengths: torch.Tensor) -> Any:
        features, frames = real_features(model, waveforms, lengths)
        if len(loaded) == 6:  # the first batch is the held-out set, so this is update 5
            features = features * float("nan")
        return features, frames

    real_features = MAEAST.features
    monkeypatch.setattr(Shards, "read", record_names)
    monkeypatch.setattr(MAEAST, "features", poisoned)
    with pytest.raises(NonFiniteLoss) as error:
        pretrain(options)
    message = str(error.value)
    assert "step 5:" in message and "step-00000003" in message
    assert all(name in message for name in loaded[5])
    assert [path.name for path in step_folder.training_checkpoints(Path(options.out))] == ["step-00000003"]
    monkeypatch.undo()
    pretrain(options)
    assert [step for step, _ in losses(options.out)] == list(range(1, 13))


def test_pretrain_corrupt_files_are_skipped_counted_and_named(options: PretrainOptions, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(8):
        soundfile.write(folder / f"good{i}.flac", 0.1 * rng.standard_normal((22050, 2)), 22050)
    (folder / "text.wav").write_text("no audio")
    (folder / "empty.ogg").write_bytes(b"")
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(100), RATE)
    summary = pretrain(dataclasses.replace(options, data=str(folder), steps=2, cache=str(tmp_path / "cache")))
    assert summary["data"]["clips"] == 8
    assert sum(summary["data"]["skipped"].values()) == 4
    report = json.loads((Path(options.out) / "data_report.json").read_text())
    named = {name for finding in report["skipped"].values() for name in finding["names"]}
    assert named == {"text.wav", "empty.ogg", "nan.wav", "short.wav"}


@pytest.mark.full_report
def test_pretrain_clip_names_with_markup_are_plotted(options: PretrainOptions, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for name in ("a$^$1.wav", "b_{.wav", "ü 音\n.wav", "d\\frac.wav"):
        soundfile.write(folder / name, 0.1 * rng.standard_normal(RATE), RATE)
    pretrain(dataclasses.replace(options, data=str(folder), steps=2, cache=str(tmp_path / "cache")))
    assert (Path(options.out) / "reconstruction.png").stat().st_size > 0


def test_pretrain_rejects_other_options_in_the_same_folder(options: PretrainOptions) -> None:
    pretrain(options)
    with pytest.raises(ValueError, match=r"lr 0.0005 -> 0.002.*--out"):
        pretrain(dataclasses.replace(options, lr=2e-3))
    pretrain(dataclasses.replace(options, keep=1, log_every=5))


def test_pretrain_rejects_second_run_in_one_folder(options: PretrainOptions, tmp_path: Path) -> None:
    long = dataclasses.replace(options, steps=500, evaluate_every=500, save_every=500)
    process = Command(command(long, tmp_path), tmp_path / "log")
    try:
        wait_for_step(process, Path(options.out), 2)
        with pytest.raises(ValueError, match="a run is going on in"):
            pretrain(long)
    finally:
        process.kill()
        process.wait()
    pretrain(options)


def test_pretrain_failed_start_leaves_no_folder(options: PretrainOptions, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pretrain(dataclasses.replace(options, data=str(tmp_path / "mistyped")))
    with pytest.raises(ValueError, match=r"min_seconds must be at least 0.175 .* got 0.1"):
        pretrain(dataclasses.replace(options, min_seconds=0.1))
    pretrain(dataclasses.replace(options, steps=2))


def test_pretrain_rejects_changed_data(options: PretrainOptions, audio: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.tsv"
    names = sorted(str(path.relative_to(audio)) for path in audio.rglob("*.wav"))
    listing.write_text("\n".join([str(audio), *(f"{name}\t1" for name in names)]))
    options = dataclasses.replace(options, data=str(listing))
    assert pretrain(options)["data"]["files"] == 30
    listing.write_text("\n".join([str(audio), *(f"{name}\t1" for name in names[:-4])]))
    with pytest.raises(ValueError, match="has changed since it started"):
        pretrain(options)


def test_pretrain_init_from_starts_with_weights_of_any_checkpoint(options: PretrainOptions, tmp_path: Path) -> None:
    case = Golden("mae_ast_patch_small")
    official = tmp_path / "official.pt"
    sections = ("model", "task", "criterion")
    cfg = {
        section: {k.split("/")[2]: v for k, v in case.options.items() if k.startswith(f"cfg/{section}/")}
        for section in sections
    }
    torch.save({"args": None, "cfg": cfg, "model": case.state_dict}, official)
    sizes = {**SMALL, "embed_dim": 64, "decoder_embed_dim": 64, "ffn_dim": 128, "num_heads": 4, "encoder_layers": 3}
    options = dataclasses.replace(
        options, preset="patch_tiny", model_args={**sizes, "decoder_layers": 2}, lr=1e-9, steps=2
    )
    options = dataclasses.replace(options, init_from=str(official), out=str(tmp_path / "from-official"))
    pretrain(options)
    trained, source = MAEAST.from_pretrained(options.out), checkpoint.load_fairseq(official)
    assert torch.equal(trained.mask_token.round(decimals=5), source.mask_token.round(decimals=5))

    again = dataclasses.replace(
        options, preset=None, init_from=options.out, model_args={"mask_ratio": 0.6}, out=str(tmp_path / "from-ours")
    )
    pretrain(again)
    assert MAEAST.from_pretrained(again.out).config == dataclasses.replace(trained.config, mask_ratio=0.6)
    assert torch.equal(
        MAEAST.from_pretrained(again.out).mask_token.round(decimals=5), source.mask_token.round(decimals=5)
    )
    noisy = dataclasses.replace(trained.config, activation_dropout=0.1)
    MAEAST(noisy).save_pretrained(tmp_path / "noisy")
    gelu = dataclasses.replace(
        again, init_from=str(tmp_path / "noisy"), recompute="gelu", model_args={}, out=str(tmp_path / "gelu")
    )
    with pytest.raises(ValueError, match=r"recompute='gelu' needs activation_dropout=0, got 0.1"):
        pretrain(gelu)
    pretrain(dataclasses.replace(gelu, model_args={"activation_dropout": 0.0}, steps=1))
    misfit = dataclasses.replace(options, preset="patch_tiny", model_args=dict(SMALL), out=str(tmp_path / "misfit"))
    with pytest.raises(ValueError, match=r"does not fit.*embed_dim 64 in the checkpoint, 32 requested"):
        pretrain(misfit)


def test_pretrain_masks_and_order_depend_on_seed(options: PretrainOptions) -> None:
    pretrain(options)
    other = dataclasses.replace(options, seed=1, out=options.out + "-seed1")
    pretrain(other)
    same = dataclasses.replace(options, out=options.out + "-again")
    pretrain(same)
    assert losses(options.out) == losses(same.out) != losses(other.out)


def test_learning_rate_rises_and_falls_linearly() -> None:
    options = PretrainOptions(steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == 0.0 and rates[5] == 0.5 and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "at least 1"),
        ("lr", 0.0, "positive"),
        ("weight_decay", math.nan, "weight_decay must be at least 0, got nan"),
        ("precision", "fp8", "auto, fp32, bf16"),
        ("max_seconds", 1000.0, "batch_seconds"),
        ("preset", "patch_huge", "patch_base"),
        ("model_args", {"depth": 3}, "encoder_layers"),
    ],
)
def test_pretrain_options_reject_bad_values(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainOptions(**{field: value})


def test_pretrain_leaves_no_temporary_files(options: PretrainOptions) -> None:
    pretrain(options)
    temporary = [path for path in Path(options.out).rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert not temporary
    assert os.path.getsize(Path(options.out) / "checkpoints/step-00000012/trainer.json") > 0


# ------------------------------------------------------------------------------------------------------------- SSAST


def ssast_options(options: PretrainOptions, out: str = "-ssast", **changes: Any) -> PretrainOptions:
    fields = {"embed_dim": 32, "num_heads": 2, "layers": 2, **changes.pop("model_args", {})}
    return dataclasses.replace(options, model="ssast", model_args=fields, out=options.out + out, **changes)


def files(run: str) -> set[str]:
    paths = {path.relative_to(run) for path in Path(run).rglob("*") if path.is_file()}
    return {str(path if path.parent.name != "tensorboard" else path.parent) for path in paths}


def log_mel(path: Path, max_seconds: float) -> torch.Tensor:
    """(frames, F) of the first ``max_seconds`` seconds, by SSAST's front end."""
    samples = soundfile.read(path, dtype="int16")[0][: round(max_seconds * RATE)]
    return fbank(torch.from_numpy(samples)[None], frontend="ssast")[0][0]


def test_pretrain_ssast_writes_the_same_files(options: PretrainOptions) -> None:
    options = dataclasses.replace(options, steps=4)
    pretrain(options)
    ssast = ssast_options(options)
    summary = pretrain(ssast)
    assert files(ssast.out) == files(options.out)
    assert summary["model"] == "ssast" and summary["config"] == SSAST.from_pretrained(ssast.out).config.to_dict()
    assert json.loads((Path(ssast.out) / "summary.json").read_text()) == summary
    rows = [row for row in read_metrics(Path(ssast.out) / "metrics.jsonl") if "loss" in row]
    weighted = [10 * row["loss_reconstruction"] + row["loss_classification"] for row in rows]
    assert weighted == pytest.approx([row["loss"] for row in rows])
    latest = TrainingCheckpoints(ssast.out, 1).latest_valid()
    assert latest.state["step"] == 4 and isinstance(latest.config, SSASTConfig)
    assert isinstance(checkpoint.load_model(ssast.out), SSAST)


def test_pretrain_ssast_input_is_normalised_by_training_data(
    options: PretrainOptions, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every training clip is one crop here, and the statistics are computed from all of them."""
    inputs, held_out, batches = [], [], []
    options = dataclasses.replace(options, loader_workers=0)
    update, load, evaluate = trainer_module.TrainStep.update, Shards.read, trainer_module.evaluate

    def record_input(step: Any, micro_batches: Any, **keywords: Any) -> Any:
        inputs.append(micro_batches[0].log_mel)
        return update(step, micro_batches, **keywords)

    monkeypatch.setattr(trainer_module.TrainStep, "update", record_input)
    monkeypatch.setattr(Shards, "read", lambda *a: batches.append(load(*a)) or batches[-1])
    monkeypatch.setattr(trainer_module, "evaluate", lambda model, x: held_out.append(x) or evaluate(model, x))
    options = ssast_options(options, steps=2, max_seconds=4.0)
    summary = pretrain(options)
    config = SSAST.from_pretrained(options.out).config
    statistics = {name: getattr(config, name) for name in ("mean", "std")}
    assert config == dataclasses.replace(options.model_config(), **statistics)

    voices = {name.split("/")[0] for name in summary["held_out_clips"]}
    names = [str(path.relative_to(audio)) for path in audio.rglob("*.wav") if path.parent.name not in voices]
    assert len(names) == summary["train_clips"]
    values = torch.cat([log_mel(audio / name, 4.0) for name in names]).double()
    assert statistics == {"mean": round(values.mean().item(), 4), "std": round(values.std(correction=0).item(), 4)}

    names = batches[-2].names  # of the first update
    for x, name in [*zip(inputs[0], names, strict=True), *zip(held_out[0].log_mel, held_out[0].names, strict=True)]:
        expected = (log_mel(audio / name, 4.0) - statistics["mean"]) / (2 * statistics["std"])
        assert torch.equal(x[: len(expected)], expected)


def test_pretrain_ssast_uses_statistics_of_first_process(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(self: DistributedContext, value: Any) -> list[Any]:
        return [(-5.0, 3.0), value] if isinstance(value, tuple) else [value]

    monkeypatch.setattr(DistributedContext, "gather", gather)
    config = pretrain(ssast_options(options, steps=1))["config"]
    assert (config["mean"], config["std"]) == (-5.0, 3.0)


@pytest.mark.parametrize("objective", ["joint", "joint_two_pass"])
def test_pretrain_ssast_interrupted_run_equals_uninterrupted_run(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    whole = ssast_options(options, "-whole", model_args={"objective": objective}, steps=8)
    pretrain(whole)
    broken = dataclasses.replace(whole, out=options.out + "-broken")
    update = trainer_module.Trainer._update

    def break_off(trainer: Any, batches: Any) -> None:
        if trainer.step == 5:
            raise KeyboardInterrupt
        update(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_update", break_off)
        with pytest.raises(KeyboardInterrupt):
            pretrain(broken)
    assert [path.name for path in step_folder.training_checkpoints(Path(broken.out))] == ["step-00000003"]
    monkeypatch.setattr(
        trainer_module, "log_mel_statistics", lambda *_, **__: pytest.fail("the run has its statistics")
    )
    pretrain(broken)
    assert losses(broken.out) == losses(whole.out)
    runs = [Path(run) for run in (broken.out, whole.out)]
    assert len({(run / "config.json").read_text() for run in runs}) == 1
    weights, expected = (load_file(run / "model.safetensors") for run in runs)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.ci
@pytest.mark.parametrize("objective", SSAST_OBJECTIVES)
def test_pretrain_ssast_improves_held_out_metrics(options: PretrainOptions, objective: str) -> None:
    options = ssast_options(
        options, model_args={"objective": objective}, steps=30, lr=1e-2, evaluate_every=5, save_every=30
    )
    summary = pretrain(options)
    rows = [row["held_out"] for row in read_metrics(Path(options.out) / "metrics.jsonl") if "held_out" in row]
    first, last = rows[0], summary["held_out"]
    if objective != "mpc":
        assert last["reconstruction_mse"] < first["reconstruction_mse"]
    if objective != "mpg":
        assert last["info_nce"] < first["info_nce"]
    else:
        assert last["info_nce"] == last["accuracy"] == 0.0


def test_pretrain_ssast_init_from_starts_with_its_checkpoint(options: PretrainOptions) -> None:
    first = ssast_options(options, steps=2, model_args={"input_frames": 320})
    pretrain(first)
    source = SSAST.from_pretrained(first.out)
    again = dataclasses.replace(first, init_from=first.out, model_args={"objective": "mpg"}, out=options.out + "-again")
    again = dataclasses.replace(again, max_seconds=2.0, lr=1e-9)
    pretrain(again)
    trained = SSAST.from_pretrained(again.out)
    assert trained.config == dataclasses.replace(source.config, objective="mpg"), (
        "including its statistics and positions"
    )
    assert torch.equal(trained.positions.round(decimals=5), source.positions.round(decimals=5))
    longer = dataclasses.replace(again, max_seconds=4.0, out=options.out + "-longer")
    with pytest.raises(ValueError, match=r"input_frames must be at least 398, .* got 320: use a smaller --max-seconds"):
        pretrain(longer)
    misfit = dataclasses.replace(again, preset="patch_tiny", out=options.out + "-misfit")
    with pytest.raises(ValueError, match=r"does not fit: embed_dim 32 in the checkpoint, 192 requested; .*layers 2 in"):
        pretrain(misfit)


def test_pretrain_rejects_init_from_of_other_model(options: PretrainOptions, tmp_path: Path) -> None:
    MAEAST(options.model_config()).save_pretrained(tmp_path / "mae_ast")
    SSAST(ssast_options(options).model_config()).save_pretrained(tmp_path / "ssast")
    for model, other in (("ssast", "mae_ast"), ("mae_ast", "ssast")):
        wrong = dataclasses.replace(options, model=model, model_args={}, init_from=str(tmp_path / other))
        with pytest.raises(ValueError, match=f"--model {model} cannot start from .*: it is a {other}"):
            pretrain(wrong)
    pretrain(dataclasses.replace(options, steps=1))
    with pytest.raises(ValueError, match=r"model 'mae_ast' -> 'ssast'"):
        pretrain(dataclasses.replace(options, steps=1, model="ssast", model_args={}))


def test_pretrain_run_older_than_an_option_resumes(options: PretrainOptions) -> None:
    options = dataclasses.replace(options, steps=1)
    pretrain(options)
    path = Path(options.out) / "options.json"
    written = json.loads(path.read_text())
    del written["model"]
    path.write_text(json.dumps(written))
    pretrain(options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "patch_base_6layer"}, "preset must be one of patch_base, .* for --model ssast, got 'patch_base_6l"),
        ({"model_args": {"encoder_layers": 3}}, "--model ssast has no model_args encoder_layers; it has .*layers, "),
        ({"model": "mae_ast", "model_args": {"layers": 3}}, "--model mae_ast has no model_args layers; it has "),
        ({"model": "vit"}, "model must be one of mae_ast, ssast, got 'vit'"),
        ({"model_args": {"input_frames": 997}}, "input_frames must be at least 998, .*max_seconds=10, got 997"),
        ({"model_args": {"mask_patches": 496}}, "mask_patches must be less than the 496 patches of 998 frames"),
    ],
)
def test_pretrain_options_reject_fields_that_contradict_the_model(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainOptions(**{"model": "ssast", **fields})


@pytest.mark.parametrize(
    ("fields", "input_frames", "mask_patches"),
    [
        ({}, 998, 388),  # 400 of 512 is 387.5 of 62 x 8
        ({"max_seconds": 3.0}, 298, 112),
        ({"preset": "frame_small"}, 998, 390),
        ({"max_seconds": 10.255}, 1024, 400),
        ({"model_args": {"input_frames": 1024}}, 1024, 400),
        ({"model_args": {"mask_patches": 250}}, 998, 250),
        ({"max_seconds": 0.4}, 38, 12),
    ],
)
def test_pretrain_options_ssast_sizes_follow_from_max_seconds(
    fields: dict, input_frames: int, mask_patches: int
) -> None:
    config = PretrainOptions(model="ssast", **fields).model_config()
    assert (config.input_frames, config.mask_patches) == (input_frames, mask_patches)
    bare = {"input_frames", "mask_patches"}
    preset = SSASTConfig.preset(fields.get("preset", "patch_tiny")).to_dict()
    assert {k: v for k, v in config.to_dict().items() if k not in bare} == {
        k: v for k, v in preset.items() if k not in bare
    }


def test_pretrain_options_preset_takes_statistics_and_positions_of_init_from() -> None:
    source = SSASTConfig(input_frames=512, mask_patches=100, mean=-1.0, std=2.0)
    options = PretrainOptions(model="ssast", preset="patch_base", init_from="x", max_seconds=2.0)
    assert options.model_config(source) == dataclasses.replace(source, mask_patches=200)
    overridden = dataclasses.replace(options, model_args={"mean": 3.0})
    assert overridden.model_config(source) == dataclasses.replace(source, mask_patches=200, mean=3.0)


def test_pretrain_options_masking_follows_patch_size() -> None:
    for preset, patch_size, masking in (("patch_tiny", [2, 128], "random"), ("frame_tiny", [16, 16], "chunk")):
        options = PretrainOptions(preset=preset, model_args={"patch_size": patch_size})
        assert options.model_config().masking == masking
        overridden = dataclasses.replace(options, model_args={"patch_size": patch_size, "masking": "span"})
        assert overridden.model_config().masking == "span"
    with pytest.raises(ValueError, match=r"masking='chunk' needs several frequency blocks.*\(2, 128\)"):
        PretrainOptions(model_args={"patch_size": [2, 128], "masking": "chunk"})


def test_pretrain_passes_options_to_train_step(options: PretrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the recompute mode, to the model."""
    passed: dict[str, Any] = {}

    class Constructed(Exception):
        pass

    def spy(model: MAEAST, lr: float, **fields: Any) -> None:
        passed.update(fields, lr=lr, recompute=model.recompute)
        raise Constructed

    monkeypatch.setattr(trainer_module, "TrainStep", spy)
    expected = {"weight_decay": 0.3, "clip_norm": 3.0, "precision": "fp16", "compile": True, "graphs": True}
    expected["optimizer"] = "muon"
    with pytest.raises(Constructed):
        pretrain(dataclasses.replace(options, lr=2e-3, recompute="layer", **expected))
    assert passed == {**expected, "lr": 2e-3, "recompute": "layer", "parallel": None}
    with pytest.raises(ValueError, match="recompute=gelu needs activation_dropout 0"):
        dataclasses.replace(options, recompute="gelu", model_args={"activation_dropout": 0.1})


def test_pretrain_chunk_official_draws_new_masks_every_update(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    original = trainer_module.TrainStep.update

    def spy(self: Any, micro_batches: Any, **keywords: Any) -> Any:
        epochs.extend(micro_batch.epoch for micro_batch in micro_batches)
        return original(self, micro_batches, **keywords)

    monkeypatch.setattr(trainer_module.TrainStep, "update", spy)
    masking = {"model_args": {**options.model_args, "masking": "chunk_official"}}
    pretrain(dataclasses.replace(options, steps=3, evaluate_every=100, **masking))
    assert epochs == [0, 1, 2]


def test_step_record_of_skipped_update_has_no_norm() -> None:
    record = StepRecord(
        step=3,
        epoch=1,
        lr=1e-3,
        clips=8,
        waited=0.25,
        faults=1,
        tokens=90,
        rows=96,
        audio_seconds=12.5,
        loss=9.0,
        loss_reconstruction=0.5,
        loss_classification=4.0,
        accuracy=0.125,
        grad_norm=2.0,
    )
    fields = ["step", "epoch", "lr", "clips", "waited", "faults", "tokens", "rows", "audio_seconds"]
    metrics = ["loss", "loss_reconstruction", "loss_classification", "accuracy", "grad_norm"]
    assert list(record.to_json()) == fields + metrics and record.to_json()["grad_norm"] == 2.0
    for norm in (math.inf, math.nan):
        skipped = dataclasses.replace(record, grad_norm=norm).to_json()
        assert skipped == {**record.to_json(), "grad_norm": None}


def test_pretrain_fp16_survives_skipped_updates_and_stops_if_all_are_skipped(
    options: PretrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.amp.GradScaler

    def scaler(scale: float) -> Any:
        return lambda device: original(device, init_scale=scale)

    fp16 = dataclasses.replace(options, precision="fp16", steps=24, evaluate_every=100)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler(2.0**27))
    pretrain(fp16)
    norms = [row["grad_norm"] for row in read_metrics(Path(options.out) / "metrics.jsonl") if "loss" in row]
    assert norms[0] is None and norms[-1] is not None and len(norms) == 24
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 4)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler(2.0**120))
    with pytest.raises(NonFiniteLoss, match="step 4"):
        pretrain(dataclasses.replace(fp16, out=options.out + "-other"))
