"""The command pretrain."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import (
    PROGRAM,
    TRAIN_EXTRA,
    CommandError,
    UsageError,
    did_you_mean,
    docstring_help,
    example_text,
    metavar,
    missing_packages,
    normalize_options,
)

if TYPE_CHECKING:
    import jsonargparse

    from ..training.options import PretrainOptions


def run_pretrain(argv: Sequence[str]) -> int:
    """Pretrain a model. Returns the exit code."""
    options = pretrain_options(argv)
    if missing := [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]:
        raise missing_packages(missing)
    import torch

    from ..data import corpus
    from ..training import pretrain, trainer

    try:
        summary = pretrain.pretrain(options)
    except (trainer.NonFiniteLoss, corpus.CorpusError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        hint = ""
        if options.model == "mae_ast":
            hint = f" ({PROGRAM} doctor --preset {options.preset} reports the largest batch)"
        raise CommandError(f"out of memory: choose a smaller --batch-seconds{hint}; {error}") from error
    if summary:  # only the first of several processes has it
        print(pretrain_summary(summary, Path(options.out)))
    return 0


def pretrain_options(argv: Sequence[str]) -> PretrainOptions:
    """Parse the options of ``pretrain`` from a YAML file and the command line, which wins.

    Raises:
        UsageError: An option or a field of the file is unknown or has a wrong value.
        CommandError: jsonargparse is not installed.
        ValueError: ``PretrainOptions`` rejects a value.
    """
    try:
        import jsonargparse
    except ImportError:
        raise missing_packages(["jsonargparse"]) from None
    from ..models.config import POSITIONS, SSAST_OBJECTIVES, MAEASTConfig, SSASTConfig
    from ..ops.masking import MASKING_STRATEGIES
    from ..training.options import CHOICES, PretrainOptions

    class Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        def __init__(self, prog: str, **options: Any) -> None:
            super().__init__(prog, **{**options, "max_help_position": 30, "width": 110})

    parser = jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} pretrain",
        description=textwrap.fill(
            "Pretrains MAE-AST or SSAST on audio, by default on the default corpus of real recordings. Writes "
            "checkpoints, metrics.jsonl, TensorBoard events, pictures and summary.json to the run folder --out. If it "
            "is stopped, the same command resumes the run.",
            100,
        ),
        epilog=example_text(
            "pretrain",
            (
                "--data recordings/ --out runs/mine --preset patch_small --steps 20000 --batch-seconds 320",
                "--config mine.yaml --model_args.mask_ratio 0.8      (--print_config writes such a file)",
            ),
        ),
        usage="%(prog)s [--data DIR] [--out DIR] [--config YAML] [options]",
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", metavar="YAML", help="File of options; the command line overrides it."
    )
    texts, defaults = docstring_help(PretrainOptions), PretrainOptions()
    hints = typing.get_type_hints(PretrainOptions)
    group = parser.add_argument_group("run")
    for field in dataclasses.fields(PretrainOptions):
        if field.name != "model_args":
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                type=hints[field.name],
                default=getattr(defaults, field.name),
                metavar=metavar(hints[field.name], CHOICES.get(field.name, ())),
                help=texts[field.name],
            )
    model_choices = {"masking": MASKING_STRATEGIES, "positions": POSITIONS, "objective": SSAST_OBJECTIVES}
    added: set[str] = set()
    for config_class, title, description in (
        (MAEASTConfig, "model fields", "Default: the preset's value."),
        (SSASTConfig, "model fields of --model ssast only", "Fields of both models have the same meaning."),
    ):
        group = parser.add_argument_group(title, description)
        texts, hints = docstring_help(config_class), typing.get_type_hints(config_class)
        new = [field.name for field in dataclasses.fields(config_class) if field.name not in added]
        for name in new:
            group.add_argument(
                f"--model_args.{name}",
                type=hints[name],
                default=defaults.model_args.get(name, argparse.SUPPRESS),
                metavar=metavar(hints[name], model_choices.get(name, ())),
                help=texts[name],
            )
        added.update(new)
    declared = parser._option_string_actions
    arguments = normalize_options(argv, declared, "pretrain")
    options = _checked_options(parser, [word for word in arguments if not word.startswith("--print_config")])
    if any(word.startswith("--print_config") for word in arguments):
        parser.parse_args(arguments)  # prints and exits
    return options


def _checked_options(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> PretrainOptions:
    """The options of ``pretrain`` in ``arguments``, which are spelt as ``parser`` declares them.

    Raises:
        UsageError: The parser rejects them.
        ValueError: ``PretrainOptions`` rejects a value.
    """
    from ..training.options import PretrainOptions

    try:
        fields = parser.parse_args(arguments).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(_explain(str(error), parser._option_string_actions)) from error
    fields.pop("config", None)
    # Lists, as in YAML and JSON: a run compares its options with those that it saved.
    model_args = fields.pop("model_args", None) or {}
    model_args = {name: list(value) if isinstance(value, tuple) else value for name, value in model_args.items()}
    return PretrainOptions(**fields, model_args=model_args)


def _explain(message: str, declared: Iterable[str]) -> str:
    """A message of jsonargparse in the terms of the command line, with a suggestion for an unknown name.

    Args:
        message: Text of the error.
        declared: Declared options, with their leading dashes.
    """
    message = re.sub(r'(Parser key|Key) "([\w.]+)":', r"--\2:", " ".join(message.split()))
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", message)
    names = [option.removeprefix("--").replace("-", "_") for option in declared]
    for word in re.findall(r"['\"]([A-Za-z_][\w.]*)['\"]", message):
        if word not in names and (near := did_you_mean(word, names)):
            return f"{message}; {near}"
    return message


def pretrain_summary(summary: dict[str, Any], run: Path) -> str:
    """A few lines for the terminal on the content of summary.json.

    Args:
        summary: Content of summary.json.
        run: Run folder.
    """
    held_out = summary["held_out"]
    baselines = ", ".join(f"{name.replace('_', ' ')} {error:.4f}" for name, error in held_out["baselines"].items())
    lines = [
        f"{summary['steps']} steps in {summary['train_seconds'] / 60:.1f} minutes, "
        f"{summary['clips_per_second']:.1f} clips/s, {summary['audio_hours_seen']:.2f} hours of audio",
        f"On {held_out['clips']} held-out clips:",
        f"  reconstruction MSE {held_out['reconstruction_mse']:.4f}; baselines: {baselines}",
        f"  InfoNCE accuracy {held_out['accuracy']:.4f}; chance {held_out['chance']:.4f}",
    ]
    lines += [f"  {warning}" for warning in held_out["warnings"]]
    mse = held_out["reconstruction_mse"]
    if behind := [name.replace("_", " ") for name, error in held_out["baselines"].items() if error < mse]:
        lines.append(f"  behind {', '.join(behind)}")
    if held_out["passed"]:
        lines.append("  passed: better than the mean of the visible patches, than interpolation, and than twice chance")
    else:
        lines += ["  NOT passed:", *(f"    {failure}" for failure in held_out["failures"])]
    for audio_kind, report in summary["held_out_by_kind"].items():
        if failures := report["failures"]:
            others = f" (summary.json: {len(failures) - 1} more)" if len(failures) > 1 else ""
            lines.append(f"  {audio_kind} alone: {failures[0]}{others}")
    command = f"features FILE --checkpoint {run} --out features/"
    if summary["model"] == "ssast":
        command = f"reconstruct FILE --checkpoint {run} --out file.png"
    lines += [
        f"In {run}: model.safetensors and config.json, summary.json, metrics.jsonl, loss.png, reconstruction.png, "
        "tensorboard/",
        f"Evaluate its features: {PROGRAM} probe --data TABLE --checkpoint {run} --out DIR",
        "To classify, pretrain with recipes/frame.yaml: README, Classify",
        f"Next: {PROGRAM} {command}",
    ]
    return "\n".join(lines)
