"""The command line: ``mae-ast-fast COMMAND``, also ``python -m mae_ast_fast COMMAND``.

A command is a function from its arguments to an exit code. It imports its modules when it is called, so that ``doctor``
runs without audio libraries and ``--help`` is fast. Exit codes: 0 success, 1 an error in the input (one line on
stderr), 2 a wrong command or option, 128 + N stopped by signal N.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..training.lifecycle import Interrupted
from . import downstream, machine, model, prepare, pretrain
from .parser import PROGRAM, TRAIN_EXTRA, CommandError, UsageError, missing_packages, raise_unknown
from .threads import set_wait_policy

_python_format = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None: those of this process, whose ``OMP_WAIT_POLICY`` is then set
            as ``set_wait_policy`` says.

    Returns:
        The exit code.
    """
    if argv is None:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            set_wait_policy()
        warnings.formatwarning = _format_warning
        gc.freeze()  # the garbage collector then passes over the imported modules, now and ...
        atexit.register(gc.freeze)  # ... when the process ends
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv or os.environ.get("MAE_AST_FAST_TRACEBACK", "0") not in ("", "0")
    argv = [argument for argument in argv if argument != "--traceback"]
    program = PROGRAM
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by what started the process; a file opened now takes its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the process ends)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal shows
    try:
        try:
            if not argv:
                print(_overview(), file=sys.stderr)
                return 2
            if argv[0] in COMMANDS:
                program = f"{PROGRAM} {argv[0]}"
                code = COMMANDS[argv[0]].run(argv[1:])
            else:
                code = _without_command(argv[0])
            sys.stdout.flush()  # a closed pipe then raises here, not at exit
            return code
        except SystemExit as stop:  # --help and --print_config
            sys.stdout.flush()
            return int(stop.code or 0)
    except BrokenPipeError:
        # Otherwise flushing the remaining output at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # all of torchrun's processes stop, but one message is enough
            print(f"{program}: {stop}", file=sys.stderr)
        return stop.exit_code
    except UsageError as error:
        _print_error(program, error, show_traceback)
        return 2
    except (CommandError, ValueError, OSError) as error:
        _print_error(program, error, show_traceback)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        _print_error(program, missing_packages([error.name]), show_traceback)
        return 1


def _format_warning(  # noqa: PLR0917 the warnings module fixes the arguments
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, without the code that gave the warning."""
    if category.__module__.startswith("mae_ast_fast."):
        return f"{message}\n"
    return _python_format(message, category, filename, lineno, line)


def _print_error(program: str, error: Exception, show_traceback: bool) -> None:
    """Print an error on one line of stderr, after the traceback if requested."""
    if show_traceback:
        traceback.print_exc()
    text = _os_error_text(error) if isinstance(error, OSError) else str(error)
    line = " ".join(text.split()) or type(error).__name__
    print(f"{program}: error: {line}", file=sys.stderr)


def _os_error_text(error: OSError) -> str:
    """An error of the operating system in the words of the commands' own messages, without its number."""
    if not error.strerror:
        return str(error)
    reason = "no such folder or file" if error.errno == errno.ENOENT else error.strerror
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes, Path))]
    return f"{reason}: {' -> '.join(paths)}" if paths else reason


def _without_command(word: str) -> int:
    """Run a command line whose first argument, ``word``, is no command. Returns the exit code."""
    if word in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if word == "--version":
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if word.startswith("-"):
        raise_unknown(
            "option", word, ("--help", "--version", "--traceback"), "a command's options come after the command"
        )
    raise_unknown("command", word, COMMANDS, f"commands are {', '.join(COMMANDS)}")


class Command(typing.NamedTuple):
    """A command: its heading and line in the overview, and its function from arguments to an exit code."""

    group: str
    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS = {
    "pretrain": Command(
        "Train", "pretrain a model on a folder of audio, or on the default corpus", pretrain.run_pretrain
    ),
    "prepare": Command("Train", "decode audio once, into Lhotse Shar shards", prepare.run_prepare),
    "tasks": Command(
        "Fine-tune", "list tasks and data sets for fine-tuning, and make their manifests", downstream.run_tasks
    ),
    "finetune": Command(
        "Fine-tune", "train and test a classifier from a pretrained model, fold by fold", downstream.run_finetune
    ),
    "probe": Command(
        "Fine-tune", "compare logistic regression on a frozen model's features with log-mel", downstream.run_probe
    ),
    "predict": Command(
        "Fine-tune", "classify audio files with a classifier of finetune or probe", downstream.run_predict
    ),
    "features": Command(
        "Use a model", "write features of audio files of any length, with their times", model.run_features
    ),
    "reconstruct": Command("Use a model", "mask part of a clip and draw the reconstruction", model.run_reconstruct),
    "export": Command("Use a model", "write the encoder alone", model.run_export),
    "convert": Command("Use a model", "convert a checkpoint of the paper's own code", model.run_convert),
    "doctor": Command(
        "This machine", "report versions, devices, the code that will run, and the largest batch", machine.run_doctor
    ),
    "bench": Command(
        "This machine", "time training steps of this library, plain PyTorch and SSAST, in a minute", machine.run_bench
    ),
    "kernels": Command(
        "Kernels", "compile every kernel for several GPUs, without a GPU, and report costs", machine.run_kernels
    ),
    "tune": Command("Kernels", "time launches on this machine's GPU and write the launch table", machine.run_tune),
}


def _overview() -> str:
    """The text of ``--help`` without a command."""
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
            "  --help        print this overview; after a command: its options with units and defaults",
            "  --version     print the version",
            "  --traceback   with any command: print the traceback of an error (or MAE_AST_FAST_TRACEBACK=1)",
            "",
            "Examples:",
            f"  {PROGRAM} pretrain --data recordings/ --preset patch_small --steps 20000",
            f"  {PROGRAM} features talk.wav --checkpoint runs/pretrain --out talk.npz",
        ]
    )
