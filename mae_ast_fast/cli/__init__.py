"""The command line: ``mae-ast-fast COMMAND``, also ``python -m mae_ast_fast COMMAND``.

A command is a function from its arguments to an exit code; what it needs is imported inside it, so that ``doctor``
runs without audio libraries and ``--help`` waits for nothing. Exit codes: 0, 1 an error of what was given (one line on
stderr), 2 a wrong command or option, 128 + N stopped by signal N.
"""

from __future__ import annotations

import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence

from ..training.lifecycle import Interrupted
from . import downstream, machine, model, prepare, pretrain
from .parser import PROGRAM, TRAIN_EXTRA, CommandError, UsageError, missing_packages, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name; None: the process's own) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv or os.environ.get("MAE_AST_FAST_TRACEBACK", "0") not in ("", "0")
    argv = [argument for argument in argv if argument != "--traceback"]
    name = PROGRAM
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what no terminal shows
    try:
        try:
            if not argv:
                print(_overview(), file=sys.stderr)
                return 2
            if argv[0] in COMMANDS:
                name = f"{PROGRAM} {argv[0]}"
                code = COMMANDS[argv[0]].run(argv[1:])
            else:
                code = _without_command(argv[0])
            sys.stdout.flush()  # a reader that went away shows here, not at exit
            return code
        except SystemExit as stop:  # --help and --print_config
            sys.stdout.flush()
            return int(stop.code or 0)
    except BrokenPipeError:
        # What is still buffered would fail again when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # all of torchrun's processes stop, one says so
            print(f"{name}: {stop}", file=sys.stderr)
        return stop.exit_code
    except UsageError as error:
        return _complain(name, error, 2, show_traceback)
    except (CommandError, ValueError, OSError) as error:
        return _complain(name, error, 1, show_traceback)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        return _complain(name, missing_packages([error.name]), 1, show_traceback)


def _complain(name: str, error: Exception, code: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"{name}: error: {line}", file=sys.stderr)
    return code


def _without_command(word: str) -> int:
    if word in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if word == "--version":
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if word.startswith("-"):
        unknown("option", word, ("--help", "--version", "--traceback"), "a command's options stand after it")
    unknown("command", word, COMMANDS, f"commands are {', '.join(COMMANDS)}")


class Command(typing.NamedTuple):
    """A line of the overview, and what runs."""

    group: str
    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS = {
    "pretrain": Command(
        "Train", "pretrain a model on a folder of audio, or on the default corpus", pretrain.run_pretrain
    ),
    "prepare": Command("Train", "decode audio once, into Lhotse Shar shards", prepare.run_prepare),
    "tasks": Command(
        "Fine-tune", "tasks and data sets to fine-tune on: list them, make their manifests", downstream.run_tasks
    ),
    "finetune": Command(
        "Fine-tune", "train a classifier from a pretrained model, test it, fold by fold", downstream.run_finetune
    ),
    "probe": Command(
        "Fine-tune", "logistic regression on a frozen model's features, beside that on log-mel", downstream.run_probe
    ),
    "predict": Command(
        "Fine-tune", "classes of audio files, by a classifier of finetune or probe", downstream.run_predict
    ),
    "features": Command("Use a model", "features of audio files of any length, with their times", model.run_features),
    "reconstruct": Command(
        "Use a model", "hide part of a clip and draw what the model fills in", model.run_reconstruct
    ),
    "export": Command("Use a model", "write the encoder alone", model.run_export),
    "convert": Command("Use a model", "read a checkpoint of the paper's own code", model.run_convert),
    "doctor": Command(
        "This machine", "versions, devices, what will be used and why, the largest batch", machine.run_doctor
    ),
    "bench": Command(
        "This machine", "time a training step beside plain PyTorch and SSAST, in a minute", machine.run_bench
    ),
    "kernels": Command(
        "Kernels", "compile every kernel for several GPUs, without one, and say what it costs", machine.run_kernels
    ),
    "tune": Command("Kernels", "time launches on this machine's GPU and write the launch table", machine.run_tune),
}


def _overview() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND [options]",
        "",
        "MAE-AST, masked autoencoding of audio spectrograms: fast pretraining.",
    ]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<14}{command.summary}")
    return "\n".join(
        [
            *lines,
            "",
            "Options:",
            "  --help        this; after a command, its options with units and defaults",
            "  --version     the version",
            "  --traceback   with any command: where an error came from (or MAE_AST_FAST_TRACEBACK=1)",
            "",
            "Examples:",
            f"  {PROGRAM} pretrain --data recordings/ --preset patch_small --steps 20000",
            f"  {PROGRAM} features talk.wav --checkpoint runs/pretrain --out talk.npz",
        ]
    )
