"""Shared parts of the commands: errors, the parser, suggestions for misspelt names, loading of models and audio."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ..models.mae_ast import MAEAST
    from ..models.ssast import SSAST


PROGRAM = "mae-ast-fast"
TRAIN_EXTRA = (
    "jsonargparse",
    "lhotse",
    "urllib3",
    "soundfile",
    "soxr",
    "av",
    "tensorboard",
    "torchmetrics",
    "tqdm",
    "matplotlib",
)


class UsageError(Exception):
    """A wrong command or option: exit code 2."""


class CommandError(Exception):
    """An error whose message is all that the user needs: exit code 1."""


def raise_unknown(category: str, name: str, choices: Iterable[str], hint: str) -> NoReturn:
    """Raise a UsageError for an unknown name.

    Args:
        category: Category of the name, such as "command" or "option".
        name: The unknown name.
        choices: Valid names; the nearest one is suggested.
        hint: End of the message if no choice is near.
    """
    raise UsageError(f"unknown {category} {name}; " + (did_you_mean(name, choices) or hint))


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``did you mean X?`` with the choice X nearest to ``name``; empty if none is near."""
    by_bare_name = {choice.lstrip("-"): choice for choice in choices}
    bare = name.lstrip("-")
    near = difflib.get_close_matches(bare, by_bare_name, 1, 0.6)
    near = near or [choice for choice in by_bare_name if bare and choice.startswith(bare)]
    return f"did you mean {by_bare_name[near[0]]}?" if near else ""


def normalize_options(argv: Sequence[str], options: Iterable[str], command: str) -> list[str]:
    """Arguments with every option spelt as declared: underscores and dashes are equal.

    This runs before parsing, because argparse would complain first about the required option that was misspelt.

    Args:
        argv: Arguments of the command.
        options: Declared options, with their leading dashes.
        command: Name of the command, for the message.

    Raises:
        UsageError: An option is unknown.
    """
    declared = {option.replace("_", "-"): option for option in options}
    normalized: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return normalized + list(argv[index:])
        option, equals, value = argument.partition("=")
        if re.match(r"--?[A-Za-z]", option):
            if option.replace("_", "-") not in declared:
                choices = [*declared.values(), "--traceback"]
                raise_unknown("option", option, choices, f"{PROGRAM} {command} --help lists them")
            option = declared[option.replace("_", "-")]
        normalized.append(option + equals + value)
    return normalized


class Parser(argparse.ArgumentParser):
    """argparse that raises ``UsageError`` and suggests the right spelling of an unknown option.

    Args:
        command: Name of the command.
        description: Text of its help.
        examples: Arguments of example calls, without program and command.
    """

    def __init__(self, command: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            description=textwrap.fill(description, 100),
            epilog=example_text(command, examples),
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110),
            allow_abbrev=False,
        )
        self.command = command

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of the command.

        Raises:
            UsageError: An option is unknown, missing or has a wrong value.
        """
        return self.parse_args(normalize_options(argv, self._option_string_actions, self.command))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def example_text(command: str, examples: Sequence[str]) -> str:
    """The examples section of a command's help."""
    return "\n".join(["examples:", *(f"  {PROGRAM} {command} {example}" for example in examples)])


def print_report(report: dict[str, Any], to_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Print a report as JSON or as the text that ``to_text`` makes of it."""
    if as_json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(to_text(report))


def missing_packages(names: Sequence[str]) -> CommandError:
    """The error that names missing packages and the command that installs them."""
    return CommandError(f'{", ".join(names)} missing: pip install "mae-ast-fast[train]"')


def docstring_help(cls: type) -> dict[str, str]:
    """Field -> its text in the Args section of the class's Google docstring, with % escaped for argparse.

    Without docstrings, as with python -OO, the texts are empty.
    """
    if cls.__doc__ is None or "Args:" not in cls.__doc__:
        return dict.fromkeys((field.name for field in dataclasses.fields(cls)), "")
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", "\n" + section)[1:]
    pairs = (entry.strip().split(": ", 1) for entry in entries)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in pairs}


def metavar(hint: Any, choices: Iterable[str] = ()) -> str:
    """Placeholder for a value in a help text: the choices, or a letter or word for the type ``hint``."""
    if choices:
        return "{" + ",".join(choices) + "}"
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    return {int: "N", float: "X", bool: "{true,false}"}.get(hint, "VALUE")


CHECKPOINT_HELP = "model or run folder, official checkpoint file, or Hub repository"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto, CUDA if available)",
    )


def load_on_device(source: str, device: str) -> MAEAST | SSAST:
    """Read a model as ``load_model`` does and move it to the device named ``device``."""
    from ..checkpoints.load import load_model
    from ..devices import pick_device

    picked = pick_device(device)  # before the model is read: a wrong name fails at once
    return load_model(source).to(picked)


def load_mae_ast_on_device(source: str, device: str, purpose: str) -> MAEAST:
    """Read a MAE-AST as ``load_mae_ast`` does and move it to the device named ``device``."""
    from ..checkpoints.load import load_mae_ast
    from ..devices import pick_device

    picked = pick_device(device)
    return load_mae_ast(source, purpose).to(picked)


class SkipLog:
    """Counts audio that cannot be read, and names it on stderr.

    Attributes:
        count: Files and sources skipped so far.
        num_named: How many of these the command line names, and not a folder or manifest.
    """

    def __init__(self) -> None:
        self.count = self.num_named = 0
        self._named: set[str] = set()

    def add(self, reason: object) -> None:
        """Count one file or source, and print ``reason``, which names it. An ``AudioError`` is of a file."""
        self.count += 1
        path = getattr(reason, "path", None)
        self.num_named += path is None or path in self._named
        print(f"skipped {reason}", file=sys.stderr, flush=True)

    def exit_code(self, num_written: int) -> int:
        """0 if something was written, and of what the command line names nothing was skipped; otherwise 1."""
        return int(self.num_named > 0 or num_written == 0)

    def find_files(self, sources: Sequence[str]) -> list[str]:
        """Paths of the audio files in the sources (files, folders, fairseq .tsv), source by source.

        Raises:
            FileNotFoundError, ValueError: There is one source, and it gives no file.
            CommandError: There are several, and none gives a file.
        """
        from ..data.audio import find_audio

        paths: list[str] = []
        for source in sources:
            try:
                found = [entry.path for entry in find_audio(source)]
                paths += found
                if found == [os.path.abspath(os.path.expanduser(source))]:
                    self._named.update(found)
            except (FileNotFoundError, ValueError) as error:
                if len(sources) == 1:
                    raise
                self.add(error)
        if not paths:
            raise CommandError(f"none of the {len(sources)} sources gives an audio file")
        return paths
