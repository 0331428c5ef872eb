"""The command line: its output, the files that it writes, and its errors."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from goldens import Golden
from safetensors.numpy import load_file

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, __version__, fbank, inference
from mae_ast_fast.checkpoints import load as checkpoint_module
from mae_ast_fast.checkpoints.load import load_fairseq
from mae_ast_fast.cli import COMMANDS, main
from mae_ast_fast.cli import pretrain as pretrain_command
from mae_ast_fast.cli.parser import TRAIN_EXTRA, docstring_help
from mae_ast_fast.data import audio, corpus, npy, prepare
from mae_ast_fast.downstream import datasets, finetune, probe, small_tasks
from mae_ast_fast.downstream.classifier import AudioClassifier
from mae_ast_fast.downstream.options import CHOICES as TASK_CHOICES
from mae_ast_fast.downstream.options import ProbeOptions
from mae_ast_fast.inference import extract_file, masked_clips
from mae_ast_fast.models.config import POSITIONS, SSAST_OBJECTIVES
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops.masking import MASKING_STRATEGIES
from mae_ast_fast.tools import bench, doctor, kernel_report, tune
from mae_ast_fast.training import pretrain, trainer
from mae_ast_fast.training.evaluation import HeldOut, evaluate
from mae_ast_fast.training.lifecycle import Interrupted
from mae_ast_fast.training.options import CHOICES, PretrainOptions

for library in TRAIN_EXTRA:
    pytest.importorskip(library)
soundfile = pytest.importorskip("soundfile")
AUDIO = Path(__file__).parent.parent / "audio"
SPEECH = AUDIO / "festvox-ru" / "353705932f.opus"  # 5.9 s
SOUND = AUDIO / "sonic-pi-samples" / "018e740416.opus"  # 3.7 s
SUMMARY = {
    "steps": 800,
    "model": "mae_ast",
    "train_seconds": 90.0,
    "clips_per_second": 31.25,
    "audio_hours_seen": 12.5,
    "held_out_by_kind": {"speech": {"failures": []}, "sound": {"failures": ["worse than a straight line"]}},
    "held_out": {
        "clips": 64,
        "reconstruction_mse": 0.25,
        "baselines": {"mean_of_visible": 0.5, "interpolation": 0.375},
        "accuracy": 0.125,
        "chance": 0.03125,
        "passed": True,
        "failures": [],
        "warnings": [],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    small = {"embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 2}
    model = MAEAST(MAEASTConfig(**small, decoder_embed_dim=32, decoder_layers=1))
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ssast(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ssast")
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "input_frames": 298, "mask_patches": 112}
    SSAST(SSASTConfig(**sizes, objective="joint_two_pass", mean=-8.0, std=4.0)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("MAE_AST_FAST_TRACEBACK", raising=False)


def fails(capsys, code: int, *argv) -> str:
    """Run a command that must fail, and return the one line that it prints."""
    assert main([str(argument) for argument in argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("mae-ast-fast")
    return captured.err.strip()


# ------------------------------------------------------------------------------------------------------------- help


def test_overview_lists_every_command_and_two_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert len(re.findall(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE)) == 1
    assert text.partition("Examples:")[2].count("mae-ast-fast ") == 2
    assert {"pretrain", "features", "export", "reconstruct", "convert", "doctor"} <= set(COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == text


def test_version_option_prints_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mae-ast-fast {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: mae-ast-fast {command}" in text
    examples = text.partition("examples:\n")[2].strip().splitlines()
    assert len(examples) == 2
    assert all(example.strip().startswith(f"mae-ast-fast {command}") for example in examples)
    # An option's line is followed by its help, there or on the next line.
    options = re.findall(r"^  (?:-h, )?(--[\w.-]+)[^\n]*?(?:  +(\S[^\n]*)|\n {20,}(\S[^\n]*))$", text, re.MULTILINE)
    declared = set(re.findall(r"^  (?:-h, )?(--[\w.-]+)", text, re.MULTILINE))
    assert {name for name, *_ in options} == declared
    assert "--help" in declared


def test_help_examples_parse(capsys, monkeypatch, tmp_path):
    """Every example gets past parsing."""

    def reached(*arguments, **options):
        raise ValueError("reached")

    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("steps: 5")
    Path("recordings").mkdir()
    for name in ("talk.wav", "rain.flac", "recordings/x.wav"):
        Path(name).touch()
    monkeypatch.setattr(checkpoint_module, "load_model", reached)
    monkeypatch.setattr(checkpoint_module, "load_fairseq", reached)
    monkeypatch.setattr(pretrain, "pretrain", reached)
    monkeypatch.setattr(finetune, "finetune", reached)
    monkeypatch.setattr(probe, "probe", reached)
    monkeypatch.setattr(AudioClassifier, "from_pretrained", reached)
    monkeypatch.setattr(doctor, "examine", reached)
    monkeypatch.setattr(kernel_report, "collect", reached)
    monkeypatch.setattr(npy, "prepare_npy", reached)
    monkeypatch.setattr(prepare, "prepare_shards", reached)
    monkeypatch.setattr(small_tasks, "build", reached)
    monkeypatch.setitem(datasets.READERS, "esc50", reached)
    monkeypatch.setattr(tune, "tune", reached)
    monkeypatch.setattr(bench, "bench", reached)
    for command in COMMANDS:
        main([command, "--help"])
        examples = capsys.readouterr().out.partition("examples:\n")[2].strip().splitlines()
        for example in examples:
            assert main(example.partition("   (")[0].split()[1:]) == 1
            assert capsys.readouterr().err.endswith(f"mae-ast-fast {command}: error: reached\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "unknown command pretrian; did you mean pretrain?"),
        (["feature", "x.wav"], "unknown command feature; did you mean features?"),
        (["zzz"], "unknown command zzz; commands are pretrain, prepare, "),
        (["--versoin"], "unknown option --versoin; did you mean --version?"),
        (["--steps", "3"], "unknown option --steps; a command's options come after the command"),
        (["pretrain", "--stesp", "3"], "pretrain: error: unknown option --stesp; did you mean --steps?"),
        (["pretrain", "--batchseconds=3"], "unknown option --batchseconds; did you mean --batch-seconds?"),
        (["pretrain", "--mask_ratio", "0.5"], "unknown option --mask_ratio; did you mean --model_args.mask_ratio?"),
        (
            ["pretrain", "--model_args.mask_ration", "1"],
            "--model_args.mask_ration; did you mean --model_args.mask_ratio?",
        ),
        (["features", "x.wav", "--checkpont", "c", "--out", "o"], "unknown option --checkpont; did you mean --checkpo"),
        (["features", "x.wav", "--chunk", "3"], "unknown option --chunk; did you mean --chunk-seconds?"),
        (["doctor", "--presets=x"], "unknown option --presets; did you mean --preset?"),
        (["export", "a", "b", "--tracebak"], "unknown option --tracebak; did you mean --traceback?"),
        (["doctor", "--quux"], "unknown option --quux; mae-ast-fast doctor --help lists them"),
        (["doctor", "-x"], "unknown option -x"),
        (["features", "x.wav", "--out", "o"], "the following arguments are required: --checkpoint"),
        (["features", "x", "--checkpoint", "c", "--out", "o", "--layer", "top"], "argument --layer: invalid int"),
        (["pretrain", "--steps", "many"], "pretrain: error: --steps: expected int, got many"),
        (["pretrain", "--model_args.mask_ratio", "most"], "--model_args.mask_ratio: expected float, got most"),
        (["pretrain", "stray"], "stray"),
    ],
)
def test_main_misspelt_command_or_option_suggests_right_one(argv, message, capsys):
    assert message in fails(capsys, 2, *argv)


# ----------------------------------------------------------------------------------------------- options of pretrain


def options_of(*argv: str) -> PretrainOptions:
    return pretrain_command.pretrain_options(argv)


def test_pretrain_options_default_to_dataclass():
    assert options_of() == PretrainOptions()


def test_pretrain_help_lists_every_field(capsys):
    assert main(["pretrain", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PretrainOptions):
        if field.name != "model_args":
            assert f" --{field.name.replace('_', '-')} " in text
    for config_class in (MAEASTConfig, SSASTConfig):
        for field in dataclasses.fields(config_class):
            assert text.count(f" --model_args.{field.name} ") >= 1
    assert f"{docstring_help(PretrainOptions)['max_seconds']} (type: float, default: 10.0)" in text
    assert f"{docstring_help(MAEASTConfig)['mask_ratio']} (type: float)" in text


def test_help_lists_choices_that_errors_list(capsys):
    """Options of pretrain, finetune and probe with a fixed set of values, and fields of the models."""
    texts = {}
    for command in ("pretrain", "finetune", "probe", "reconstruct"):
        assert main([command, "--help"]) == 0
        texts[command] = capsys.readouterr().out
    for command, choices in (("pretrain", CHOICES), ("finetune", TASK_CHOICES), ("probe", TASK_CHOICES)):
        for name, values in choices.items():
            assert re.search(rf"^  --{name} \{{{','.join(values)}\}}", texts[command], re.MULTILINE), (command, name)
    for name, wrong in (("attention", "nope"), ("impl", "nope"), ("optimizer", "nope")):
        error = fails(capsys, 1, "pretrain", f"--{name}", wrong)
        assert f"{name} must be one of {', '.join(CHOICES[name])}, got 'nope'" in error
    for name, values in (("masking", MASKING_STRATEGIES), ("objective", SSAST_OBJECTIVES), ("positions", POSITIONS)):
        assert f"--model_args.{name} {{{','.join(values)}}}" in texts["pretrain"]
    assert f"--masking {{{','.join(MASKING_STRATEGIES)}}}" in texts["reconstruct"]
    assert "--micro-batches N " in texts["pretrain"]


def test_pretrain_options_dashes_and_underscores_are_equal():
    for spelling in (["--batch-seconds", "32", "--init-from=x"], ["--batch_seconds=32", "--init_from", "x"]):
        options = options_of(*spelling)
        assert (options.batch_seconds, options.init_from) == (32.0, "x")
    assert options_of("--model_args.mask-ratio", "0.5").model_args["mask_ratio"] == 0.5


def test_pretrain_options_model_fields_are_parsed_by_type():
    argv = [
        "--model_args.mask_ratio",
        "0.8",
        "--model_args.patch_size",
        "[8,16]",
        "--model_args.encoder_layers=3",
        "--model_args.norm_first",
        "true",
    ]
    options = options_of(
        *argv, "--model_args.masking", "time", "--model_args.encoder_projection", "null", "--model_args.dropout", "0.2"
    )
    assert options.model_args == {
        **PretrainOptions().model_args,
        "mask_ratio": 0.8,
        "patch_size": [8, 16],  # as YAML and JSON have it
        "encoder_layers": 3,
        "norm_first": True,
        "masking": "time",
        "encoder_projection": None,
        "dropout": 0.2,
    }
    config = options.model_config()
    assert (config.mask_ratio, config.patch_size, config.embed_dim) == (0.8, (8, 16), 192)


def test_pretrain_options_ssast_fields_round_trip(tmp_path, capsys):
    argv = ["--model", "ssast", "--preset", "frame_small", "--model_args.objective", "mpc", "--model_args.layers=2"]
    argv += ["--model-args.patch-size", "[4,128]", "--model_args.mean", "-5", "--model_args.embed_dim", "96"]
    options = options_of(*argv)
    assert (options.model, options.preset) == ("ssast", "frame_small")
    model_args = {"objective": "mpc", "layers": 2, "patch_size": [4, 128], "mean": -5.0, "embed_dim": 96}
    assert options.model_args == model_args
    assert options.model_config() == SSASTConfig.preset(
        "frame_small", **model_args, input_frames=998, mask_patches=195
    )  # 249 tokens of 4 frames
    assert main(["pretrain", *argv, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"] == "ssast" and yaml.safe_load(text)["model_args"] == model_args
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert options_of("--config", str(path)) == options
    assert options_of("--model=ssast").model_config().input_frames == 998


def test_pretrain_field_of_other_model_is_rejected(capsys):
    error = fails(capsys, 1, "pretrain", "--model", "ssast", "--model_args.decoder_layers", "1")
    assert "--model ssast has no model_args decoder_layers" in error
    error = fails(capsys, 1, "pretrain", "--model", "ssast", "--preset", "frame_base_6layer")
    assert "frame_tiny for --model ssast, got 'frame_base_6layer'" in error
    assert "model must be one of mae_ast, ssast, got" in fails(capsys, 1, "pretrain", "--model", "mae-ast")


RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_as_options(recipe):
    options = options_of("--config", str(recipe))
    assert options.model_config().embed_dim in (192, 768)


def test_recipes_ssast_differs_from_quick_in_model_only():
    quick, ssast = (
        dataclasses.asdict(options_of("--config", str(RECIPES[0].with_stem(x)))) for x in ("quick", "ssast")
    )
    assert {name for name in quick if quick[name] != ssast[name]} == {"model", "model_args", "out"}
    assert quick["model_args"]["encoder_layers"] == ssast["model_args"]["layers"]


def test_pretrain_options_command_line_overrides_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\nlr: 1e-4\nbatch_seconds: 20\nmodel_args:\n  mask_ratio: 0.9\n  patch_size: [8, 16]\n")
    options = options_of(
        "--config", str(path), "--steps", "9", "--model_args.mask_ratio", "0.5", "--model_args.masking=random"
    )
    assert (options.steps, options.lr, options.batch_seconds) == (9, 1e-4, 20.0)
    assert options.model_args == {
        **PretrainOptions().model_args,
        "mask_ratio": 0.5,
        "patch_size": [8, 16],
        "masking": "random",
    }
    assert options_of("--config", str(path)).model_args == {
        **PretrainOptions().model_args,
        "mask_ratio": 0.9,
        "patch_size": [8, 16],
    }


@pytest.mark.parametrize("flag", ["--print_config", "--print-config"])
def test_print_config_output_reads_back(tmp_path, capsys, flag):
    argv = ["--seed", "3", "--data", "/x", "--model_args.mask_ratio", "0.8", "--model_args.patch_size", "[8,16]"]
    assert main(["pretrain", *argv, flag]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model_args"] == {
        **PretrainOptions().model_args,
        "mask_ratio": 0.8,
        "patch_size": [8, 16],
    }
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert options_of("--config", str(path)) == options_of(*argv)


def test_print_config_invalid_value_is_rejected(capsys):
    assert "preset must be one of" in fails(capsys, 1, "pretrain", "--preset", "patch_huge", "--print_config")
    assert "lr must be positive" in fails(capsys, 1, "pretrain", "--print_config=skip_default", "--lr", "-1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp: 3", "stesp' is not .*; did you mean steps\\?"),
        ("model_args:\n  mask_ration: 0.5", "model_args.mask_ration' is not .*; did you mean model_args.mask_ratio\\?"),
        ("steps: many", "--steps: expected int, got many"),
        ("steps: [1", "Problems parsing config"),
    ],
)
def test_pretrain_wrong_config_file_names_error(tmp_path, capsys, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert re.search(message, fails(capsys, 2, "pretrain", "--config", path))


def test_pretrain_invalid_value_is_rejected(capsys):
    assert fails(capsys, 1, "pretrain", "--lr", "-1").endswith("error: lr must be positive, got -1.0")
    assert "mask_ratio must be in (0, 1), got 3.0" in fails(capsys, 1, "pretrain", "--model_args.mask_ratio", "3")
    assert "preset must be one of patch_base" in fails(capsys, 1, "pretrain", "--preset", "patch_tyni")
    assert "c.yaml" in fails(capsys, 2, "pretrain", "--config", "/none/c.yaml")


# --------------------------------------------------------------------------------------------------- ends of pretrain


def test_pretrain_finished_run_prints_summary(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(pretrain, "pretrain", lambda options: calls.append(options) or SUMMARY)
    assert main(["pretrain", "--out", "runs/x", "--steps", "800"]) == 0
    assert calls == [PretrainOptions(out="runs/x", steps=800)]
    text = capsys.readouterr().out
    assert "800 steps in 1.5 minutes, 31.2 clips/s, 12.50 hours of audio" in text
    assert "reconstruction MSE 0.2500; baselines: mean of visible 0.5000, interpolation 0.3750" in text
    assert "InfoNCE accuracy 0.1250; chance 0.0312" in text
    assert "  passed: " in text and "NOT" not in text
    assert "  sound alone: worse than a straight line\n" in text and "speech alone" not in text
    assert "In runs/x: model.safetensors" in text
    assert "probe --data TABLE --checkpoint runs/x --out DIR\nTo classify, pretrain with recipes/frame.yaml" in text


def test_pretrain_summary_next_command_depends_on_model():
    text = pretrain_command.pretrain_summary({**SUMMARY, "model": "ssast"}, Path("runs/x"))
    assert text.endswith("Next: mae-ast-fast reconstruct FILE --checkpoint runs/x --out file.png")
    text = pretrain_command.pretrain_summary(SUMMARY, Path("runs/x"))
    assert text.endswith("Next: mae-ast-fast features FILE --checkpoint runs/x --out features/")


def test_pretrain_summary_failed_evaluation_lists_failures():
    held_out = {**SUMMARY["held_out"], "passed": False, "failures": ["accuracy 0.1 is not above", "second"]}
    text = pretrain_command.pretrain_summary({**SUMMARY, "held_out": held_out}, Path("runs/x"))
    assert "NOT passed:\n    accuracy 0.1 is not above\n    second\n" in text
    assert "  passed: " not in text


def test_pretrain_summary_names_baselines_that_are_better():
    line = "  behind mean of visible same band, interpolation\n"
    baselines = {"mean_of_visible": 0.5, "mean_of_visible_same_band": 0.125, "interpolation": 0.2}
    for passed in (True, False):
        held_out = {**SUMMARY["held_out"], "baselines": baselines, "passed": passed}
        assert line in pretrain_command.pretrain_summary({**SUMMARY, "held_out": held_out}, Path("runs/x"))
    assert "behind" not in pretrain_command.pretrain_summary(SUMMARY, Path("runs/x"))


def test_pretrain_summary_shows_warnings_after_the_marks():
    held_out = {**SUMMARY["held_out"], "warnings": ["the features collapse"]}
    text = pretrain_command.pretrain_summary({**SUMMARY, "held_out": held_out}, Path("runs/x"))
    assert "; chance 0.0312\n  the features collapse\n  passed: " in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Interrupted(15, Path("runs/x/checkpoints/step-1")), 143, "stopped by SIGTERM; saved runs/x/checkpoints/"),
        (trainer.NonFiniteLoss("step 3: loss nan; clips: a.wav"), 1, "error: step 3: loss nan; clips: a.wav"),
        (corpus.CorpusError("no network"), 1, "error: no network To pretrain on your own audio: --data DIR"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: out of memory: choose a smaller --batch-seconds"),
        (ValueError("two\nlines"), 1, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x.tsv"), 1, "error: no such folder or file: x.tsv"),
        (FileExistsError(17, "File exists", Path("x")), 1, "error: File exists: x"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (OSError("two words"), 1, "error: two words"),
        (KeyboardInterrupt(), 130, "mae-ast-fast pretrain: interrupted"),
    ],
)
def test_pretrain_error_sets_exit_code_and_message(*, error, code, message, capsys, monkeypatch):
    def end(options):
        raise error

    monkeypatch.setattr(pretrain, "pretrain", end)
    assert main(["pretrain"]) == code
    captured = capsys.readouterr()
    assert captured.err.strip().count("\n") == 0
    assert captured.err.strip().startswith("mae-ast-fast pretrain: ")
    assert message in captured.err
    assert captured.out == ""


def test_main_internal_error_keeps_traceback(monkeypatch):
    def end(options):
        raise KeyError("bug")

    monkeypatch.setattr(pretrain, "pretrain", end)
    with pytest.raises(KeyError):
        main(["pretrain"])


def test_main_traceback_option_prints_traceback(capsys, monkeypatch):
    assert main(["pretrain", "--lr", "-1", "--traceback"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("mae-ast-fast pretrain: error: lr must be positive, got -1.0\n")
    monkeypatch.setenv("MAE_AST_FAST_TRACEBACK", "1")
    assert main(["pretrain", "--lr", "-1"]) == 1
    assert capsys.readouterr().err == text
    monkeypatch.setenv("MAE_AST_FAST_TRACEBACK", "0")
    assert main(["pretrain", "--lr", "-1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_main_missing_train_extra_names_install_command(capsys, monkeypatch, checkpoint, tmp_path):
    message = 'missing: pip install "mae-ast-fast[train]"'
    features = ("features", SOUND, "--checkpoint", checkpoint, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "soundfile", None)
        assert fails(capsys, 1, *features).endswith(f"soundfile {message}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jsonargparse", None)
        assert fails(capsys, 1, "pretrain").endswith(f"jsonargparse {message}")
    with monkeypatch.context() as patch:
        find_spec = pretrain_command.importlib.util.find_spec
        patch.setattr(
            pretrain_command.importlib.util,
            "find_spec",
            lambda name: None if name in ("soxr", "tensorboard") else find_spec(name),
        )
        patch.setattr(pretrain, "pretrain", lambda options: pytest.fail("started without its libraries"))
        assert fails(capsys, 1, "pretrain").endswith(f"soxr, tensorboard {message}")


# --------------------------------------------------------------------------------------------------------- features


def test_features_one_file_writes_arrays(checkpoint, tmp_path, capsys):
    expected = extract_file(MAEAST.from_pretrained(checkpoint), SPEECH, layer=1, chunk_seconds=2.0)
    for name in ("x.npz", "x.safetensors"):
        out = tmp_path / "deep" / name
        argv = ["features", SPEECH, "--checkpoint", checkpoint, "--out", out, "--layer", "1", "--chunk_seconds", "2"]
        assert main([str(argument) for argument in argv]) == 0
        arrays = dict(np.load(out)) if name.endswith("npz") else load_file(out)
        np.testing.assert_array_equal(arrays["features"], expected.features)
        np.testing.assert_array_equal(arrays["times"], expected.times)
        np.testing.assert_array_equal(arrays["frequency_block"], expected.frequency_block)
    assert f"{out}: {len(expected.features)} tokens x 32, to {expected.times[-1]:.2f} s" in capsys.readouterr().out


@pytest.fixture
def recordings(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a/x.wav", "b/x.wav", "b/y.wav"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(8000), 16000)
    (tmp_path / "in" / "b" / "broken.wav").write_bytes(b"RIFF nothing")
    return tmp_path / "in"


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_features_many_files_skips_corrupt_ones(checkpoint, recordings, tmp_path, capsys):
    files = [recordings / name for name in ("a/x.wav", "b/broken.wav", "none.wav", "b/x.wav", "a/x.wav")]
    out = tmp_path / "out"
    argv = ["features", *files, "--checkpoint", checkpoint, "--out", out]
    assert main([str(argument) for argument in argv]) == 1
    captured = capsys.readouterr()
    assert written(out) == ["a/x.npz", "b/x.npz"]
    skipped = captured.err.strip().splitlines()
    assert len(skipped) == 2
    assert all(line.startswith("skipped ") for line in skipped)
    assert "none.wav" in captured.err
    assert "broken.wav" in captured.err
    assert captured.out.strip().endswith("2 written, 2 skipped")
    assert not np.array_equal(np.load(out / "a/x.npz")["features"], np.load(out / "b/x.npz")["features"])


def test_features_broken_file_in_a_folder_is_named_and_exit_code_is_0(checkpoint, recordings, tmp_path, capsys):
    options = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(["features", str(recordings), *options]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("skipped ") == 1 and "broken.wav" in captured.err
    assert captured.out.strip().endswith("3 written, 1 skipped")
    # A FILE that fails, beside a folder that does not, or a folder that gives nothing.
    assert main(["features", str(recordings / "a"), str(recordings / "b" / "broken.wav"), *options]) == 1
    assert main(["features", str(recordings / "a"), str(tmp_path / "none"), *options]) == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_bytes(b"RIFF nothing")
    assert main(["features", str(tmp_path / "bad"), *options]) == 1


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
def test_features_long_names_are_written_or_named(checkpoint, tmp_path, capsys, file_format):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = ["a" * 248, "b" * 251, "\u3042" * 82, "c"]
    for name in names:
        soundfile.write(folder / f"{name}.wav", np.zeros(8000), 16000)
    options = ["--checkpoint", str(checkpoint), "--out", str(out), "--format", file_format]
    assert main(["features", str(folder), *options]) == 0
    fit = [name for name in names if len(os.fsencode(f"{name}.{file_format}")) <= 255]
    assert written(out) == sorted(f"{name}.{file_format}" for name in fit)
    error = capsys.readouterr().err
    assert error.count("skipped ") == len(names) - len(fit) == error.count("its name is too long")


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_command_with_closed_stream_exits_as_usual(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)  # what Python makes of a file descriptor that is closed
    assert main(["--version"]) == 0 and main(["no_such_command"]) == 2


def test_help_without_docstrings_lists_the_options():
    line = [sys.executable, "-OO", "-m", "mae_ast_fast", "pretrain", "--help"]
    assert "--batch-seconds" in subprocess.run(line, check=True, capture_output=True, text=True, timeout=120).stdout
    for options in (ProbeOptions, MAEASTConfig):
        without = type(options.__name__, (options,), {"__doc__": None})
        assert docstring_help(without) == dict.fromkeys(docstring_help(options), "")


def test_features_folder_mirrors_its_layout(checkpoint, recordings, tmp_path):
    (recordings / "b" / "broken.wav").unlink()
    out = tmp_path / "out"
    argv = ["features", recordings, "--checkpoint", checkpoint, "--out", out, "--format", "safetensors"]
    assert main([str(argument) for argument in argv]) == 0
    assert written(out) == ["a/x.safetensors", "b/x.safetensors", "b/y.safetensors"]


def test_features_invalid_arguments_are_rejected(checkpoint, recordings, tmp_path, capsys):
    first, second = recordings / "a/x.wav", recordings / "b/x.wav"
    options = ("--checkpoint", checkpoint, "--out")
    error = fails(capsys, 1, "features", first, second, *options, tmp_path / "x.npz")
    assert "x.npz names one file, got 2: name a folder" in error
    error = fails(capsys, 1, "features", first, *options, tmp_path / "x.npz", "--format", "safetensors")
    assert "contradict each other" in error
    assert "layer must be an integer in 1..2, got 9" in fails(
        capsys, 1, "features", first, *options, tmp_path / "o", "--layer", "9"
    )
    error = fails(capsys, 1, "features", first, "--checkpoint", tmp_path / "none", "--out", tmp_path / "o")
    assert "no checkpoint at" in error
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, 1, "features", first, *options, tmp_path / "file" / "x.npz")
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.partial"))


def test_features_sources_without_audio_are_one_error(checkpoint, tmp_path, capsys):
    options = ("--checkpoint", checkpoint, "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    gone, empty = tmp_path / "nope.wav", tmp_path / "empty"
    assert fails(capsys, 1, "features", gone, *options).endswith(f"error: no such folder or file: {gone}")
    assert fails(capsys, 1, "features", empty, *options).endswith(f") in {empty}")
    assert main([str(argument) for argument in ("features", gone, empty, *options)]) == 1
    *skipped, error = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in skipped] == ["skipped", "skipped"]
    assert error == "mae-ast-fast features: error: none of the 2 sources gives an audio file"


def test_features_file_name_of_another_format_is_rejected(checkpoint, recordings, tmp_path, capsys):
    file, out = recordings / "a/x.wav", tmp_path / "one.txt"
    options = ("--checkpoint", checkpoint, "--out")
    error = fails(capsys, 1, "features", file, *options, out)
    assert error.endswith(f"--out must end in .npz or .safetensors, or be a folder ({out}/), got {out}")
    assert not out.exists()
    assert main([str(argument) for argument in ("features", file, *options, f"{out}/")]) == 0
    assert main([str(argument) for argument in ("features", recordings / "a", *options, tmp_path / "v1.2")]) == 0
    assert written(out) == written(tmp_path / "v1.2") == ["x.npz"]
    (tmp_path / "file").touch()
    capsys.readouterr()
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        assert "--out must be a folder, got the file" in fails(capsys, 1, "features", recordings, *options, folder)


def test_commands_missing_input_names_it_without_error_number(checkpoint, tmp_path, capsys):
    gone = tmp_path / "nope"
    commands = [
        ("convert", gone, tmp_path / "new"),
        ("probe", "--data", gone, "--checkpoint", checkpoint, "--out", tmp_path / "run"),
        ("finetune", "--data", gone, "--checkpoint", checkpoint, "--out", tmp_path / "run"),
        ("predict", SOUND, "--checkpoint", gone),
        ("reconstruct", gone, "--checkpoint", checkpoint, "--out", tmp_path / "r.png"),
        ("pretrain", "--data", gone, "--out", tmp_path / "run"),
        ("prepare", gone, "--out", tmp_path / "shards"),
    ]
    for command in commands:
        error = fails(capsys, 1, *command)
        assert re.search(rf": error: no such (folder or file|folder|file): {gone}\b", error), error
        assert "Errno" not in error


# ------------------------------------------------------------------------------------ reconstruct, export, convert


def test_reconstruct_writes_picture_and_baselines(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "r.png"
    argv = [
        "reconstruct",
        SPEECH,
        SOUND,
        "--checkpoint",
        checkpoint,
        "--out",
        out,
        "--seed",
        "5",
        "--mask-ratio",
        "0.5",
    ]
    argv += ["--masking", "time", "--start", "0.5", "--seconds", "2"]
    assert main([str(argument) for argument in argv]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    model = MAEAST.from_pretrained(checkpoint)
    model.config = dataclasses.replace(model.config, mask_ratio=0.5, masking="time")
    clips = masked_clips(model, [SPEECH, SOUND], seed=5, start=0.5, seconds=2.0)
    assert clips.mask.sum(1).tolist() == [48, 48]  # half of 12 x 8 tokens
    for index, path in enumerate((SPEECH, SOUND)):
        clip = slice(index, index + 1)
        alone = HeldOut(clips.log_mel[clip], clips.num_frames[clip], clips.mask[clip], [path.name], [""])
        report = evaluate(model, alone)
        assert f"{path.name}: MSE {report['reconstruction_mse']:.4f} on 48 masked patches" in text
        for name, error in report["baselines"].items():
            assert f"{name.replace('_', ' ')} {error:.4f}" in text


def test_reconstruct_ssast_uses_its_own_front_end(ssast, tmp_path, capsys):
    """Default clips have its input length and use its own front end. Masking options override its masking."""
    out = tmp_path / "r.png"
    argv = ["reconstruct", SPEECH, SOUND, "--checkpoint", ssast, "--out", out]
    assert main([str(argument) for argument in argv]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    model = SSAST.from_pretrained(ssast)
    samples = torch.from_numpy(audio.decode(SPEECH)[: 297 * 160 + 400])
    features, frames = model.features(samples[None])
    assert frames.tolist() == [298]
    assert torch.equal(features, model.normalize(fbank(samples[None], frontend="ssast")[0]))
    report = evaluate(model, HeldOut.of(model, features, frames, names=["x"], kinds=[""]))
    assert f"{SPEECH.name}: MSE {report['reconstruction_mse']:.4f} on 112 masked patches" in text
    assert f"accuracy {report['accuracy']:.4f}" in text
    argv += ["--seconds", "2", "--mask-ratio", "0.5", "--masking", "time", "--seed", "3"]
    assert main([str(argument) for argument in argv]) == 0
    assert capsys.readouterr().out.count("on 48 masked patches") == 2  # half of 12 x 8
    assert "at most input_frames=298 frames" in fails(capsys, 1, *argv[:7], "--seconds", "4")


@pytest.mark.parametrize("command", ["features", "export", "doctor"])
def test_main_command_for_mae_ast_rejects_ssast(command, ssast, tmp_path, capsys):
    argv = {
        "features": [SOUND, "--checkpoint", ssast, "--out", tmp_path / "x.npz"],
        "export": [ssast, tmp_path / "e"],
        "doctor": ["--checkpoint", ssast],
    }[command]
    assert fails(capsys, 1, command, *argv).endswith(f"{command} needs a MAE-AST checkpoint, got ssast: {ssast}")
    assert not list(tmp_path.iterdir())


def test_reconstruct_invalid_arguments_are_rejected(checkpoint, tmp_path, capsys):
    options = ("--checkpoint", checkpoint, "--out", tmp_path / "r.png")
    assert "masking must be one of" in fails(capsys, 1, "reconstruct", SOUND, *options, "--masking", "all")
    assert "mask_ratio must be in (0, 1)" in fails(capsys, 1, "reconstruct", SOUND, *options, "--mask-ratio", "1")
    assert "nothing at 60 s" in fails(capsys, 1, "reconstruct", SOUND, *options, "--start", "60")
    error = fails(capsys, 1, "reconstruct", SOUND, "--checkpoint", checkpoint, "--out", tmp_path / "r.jpg")
    assert "--out must end in .png" in error
    assert "device must be auto" in fails(capsys, 1, "reconstruct", SOUND, *options, "--device", "gpu")
    error = fails(capsys, 1, "reconstruct", SOUND.parent, *options)
    assert error.endswith(f"error: {SOUND.parent} is a folder; name a file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "r.png").mkdir()
    assert "--out must be the file to write, got the folder" in fails(capsys, 1, "reconstruct", SOUND, *options)


def test_export_writes_encoder(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), str(tmp_path / "e")]) == 0
    encoder, model = MAEAST.from_pretrained(tmp_path / "e"), MAEAST.from_pretrained(checkpoint)
    log_mel = torch.randn(1, 100, 128)
    expected = model.extract_features(log_mel).last_hidden_state
    assert torch.equal(encoder.extract_features(log_mel).last_hidden_state, expected)
    in_encoder, in_model = (sum(p.numel() for p in x.parameters()) for x in (encoder, model))
    text = capsys.readouterr().out
    assert f"encoder of {in_encoder:,} parameters" in text
    assert f"{in_model:,} parameters" in text
    assert "already holds" in fails(capsys, 1, "export", checkpoint, checkpoint)
    assert "an encoder alone" in fails(
        capsys, 1, "reconstruct", SOUND, "--checkpoint", tmp_path / "e", "--out", tmp_path / "r.png"
    )


def test_convert_and_export_official_checkpoint_keep_features(tmp_path, capsys):
    golden = Golden("mae_ast_patch_small")
    width = golden.state_dict["post_extract_proj.weight"].shape[0]
    table = sinusoid(300, width).half().float()[None]  # as in a checkpoint of an fp16 run
    options = {name: value for name, value in golden.options.items() if name.startswith("cfg/")}
    content = {"cfg": options, "args": None, "model": {**golden.state_dict, "enc_sine_pos_embed.pe": table}}
    official = tmp_path / "official.pt"
    torch.save(content, official)
    assert main(["convert", str(official), str(tmp_path / "c")]) == 0
    assert main(["export", str(official), str(tmp_path / "e")]) == 0
    assert "patches of 16 x 16" in capsys.readouterr().out
    expected, converted, encoder = (
        load_fairseq(official),
        *map(MAEAST.from_pretrained, (tmp_path / "c", tmp_path / "e")),
    )
    assert converted.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    features = expected.extract_features(golden["source"]).last_hidden_state
    assert torch.equal(encoder.extract_features(golden["source"]).last_hidden_state, features)
    assert torch.equal(encoder.encoder_positions.table, table[0])
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    assert "no.pt" in fails(capsys, 1, "convert", tmp_path / "no.pt", tmp_path / "n")
    assert not (tmp_path / "n").exists()


# ----------------------------------------------------------------------------------------------- doctor, processes


def test_doctor_prints_text_or_json(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "measure_activations", lambda config, device, precision: (10**7, 10**6))
    assert main(["doctor", "--checkpoint", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "Largest batch in training" in text
    assert f"Python {sys.version_info.major}." in text
    assert main(["doctor", "--preset", "frame_tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["model"] == "frame_tiny"
    assert "preset must be one of" in fails(capsys, 1, "doctor", "--preset", "huge")


def test_features_ctrl_c_exits_with_130(checkpoint, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "extract_file", stop)
    assert main(["features", str(SOUND), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "x.npz")]) == 130
    assert capsys.readouterr().err == "\nmae-ast-fast features: interrupted\n"


def test_main_as_process_sets_exit_codes(tmp_path):
    """python -m, the exit code, and a closed pipe."""
    command = [sys.executable, "-m", "mae_ast_fast"]
    done = subprocess.run([*command, "pretrian"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mae-ast-fast: error: unknown command pretrian; did you mean pretrain?\n"
    process = subprocess.Popen([*command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_main_with_process_arguments_freezes_imported_objects(monkeypatch, capsys):
    """The garbage collector passes over them, at exit too; a program that calls main with arguments decides itself."""
    frozen = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append("now"))
    monkeypatch.setattr("atexit.register", lambda function: frozen.append(f"at exit: {function is gc.freeze}"))
    monkeypatch.setattr("sys.argv", ["mae-ast-fast", "--help"])
    assert main(["--help"]) == 0 and not frozen
    assert main() == 0 and frozen == ["now", "at exit: True"]
    assert capsys.readouterr().out


@pytest.mark.parametrize("start", ["-m mae_ast_fast", "-c mae-ast-fast"])
def test_main_as_process_sets_wait_policy_before_torch_is_imported(start, tmp_path):
    """Of libgomp, which PyTorch loads, only a variable that was set before changes the threads.

    More threads than the machine has cores stand for a busy machine.
    """
    hook = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, f"torch: {os.environ.get('OMP_WAIT_POLICY')}\\n".encode())
            sys.meta_path.remove(self)

sys.meta_path.insert(0, finder := Finder())
"""
    (tmp_path / "sitecustomize.py").write_text(hook)
    entry = "import sys; sys.argv[0] = 'mae-ast-fast'; from mae_ast_fast.cli import main; sys.exit(main())"
    line = ["-m", "mae_ast_fast"] if start.startswith("-m") else ["-c", entry]
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables["OMP_NUM_THREADS"] = str(2 * (os.cpu_count() or 1))
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    argv = ["features", "x.wav", "--checkpoint", "none", "--out", "y.npz"]
    for value, seen in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = variables if value is None else {**variables, "OMP_WAIT_POLICY": value}
        done = subprocess.run(
            [sys.executable, *line, *argv], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.stdout == f"torch: {seen}\n", done.stderr


def test_overview_loads_no_heavy_module(tmp_path):
    program = """
import sys
from mae_ast_fast.cli import main
assert main(["--help"]) == 0
heavy = "torch jsonargparse soundfile soxr av matplotlib tensorboard torchaudio triton mae_ast_fast.training.pretrain"
print([name for name in heavy.split() if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n")
