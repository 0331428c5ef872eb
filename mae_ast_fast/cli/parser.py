"""What commands share: errors, the parser, names that were nearly right, models and audio to read."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """An error whose message says all that the user needs: exit code 1."""


def unknown(what: str, word: str, known: Iterable[str], otherwise: str) -> NoReturn:
    raise UsageError(f"unknown {what} {word}; " + (did_you_mean(word, known) or otherwise))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question whether the nearest known name was meant; empty where none is near."""
    names = {name.lstrip("-"): name for name in known}
    bare = word.lstrip("-")
    near = difflib.get_close_matches(bare, names, 1, 0.6) or [name for name in names if bare and name.startswith(bare)]
    return f"did you mean {names[near[0]]}?" if near else ""


def normalize_options(argv: Sequence[str], known: Iterable[str], command: str) -> list[str]:
    """Arguments with every option as it is declared: underscores and dashes are the same; an unknown one is an error.

    Done before parsing, because argparse first complains of required options that a misspelt one was meant to be.
    """
    declared = {option.replace("_", "-"): option for option in known}
    found = []
    for place, argument in enumerate(argv):
        if argument == "--":
            return found + list(argv[place:])
        option, equals, value = argument.partition("=")
        if re.match(r"--?[A-Za-z]", option):
            if option.replace("_", "-") not in declared:
                options = [*declared.values(), "--traceback"]
                unknown("option", option, options, f"{PROGRAM} {command} --help lists them")
            option = declared[option.replace("_", "-")]
        found.append(option + equals + value)
    return found


class Parser(argparse.ArgumentParser):
    """argparse that raises ``UsageError``, and names the option that a wrong one was meant to be."""

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
        """The parsed arguments."""
        return self.parse_args(normalize_options(argv, self._option_string_actions, self.command))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def example_text(command: str, examples: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {PROGRAM} {command} {example}" for example in examples)])


def tell_report(report: dict[str, Any], to_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Prints a report, for programs or for reading."""
    if as_json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(to_text(report))


def missing_packages(names: Sequence[str]) -> CommandError:
    return CommandError(f'{", ".join(names)} missing: pip install "mae-ast-fast[train]"')


def docstring_help(of: type) -> dict[str, str]:
    """Field -> text from the Args section of a Google docstring."""
    section = (inspect.getdoc(of) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", "\n" + section)[1:]
    pairs = (entry.strip().split(": ", 1) for entry in entries)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in pairs}


def metavar(hint: Any) -> str:
    return {int: "N", float: "X", bool: "{true,false}"}.get(hint, "VALUE")


CHECKPOINT_HELP = "a folder of ours (a run folder too), an official file, or a Hub repository"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto, CUDA where it is)"
    )


def load(source: str, device: str, mae_ast_for: str | None = None) -> MAEAST | SSAST:
    """A model on its device; ``mae_ast_for``: for what an SSAST would not do."""
    from ..checkpoints.load import load_mae_ast, load_model
    from ..devices import pick_device

    chosen = pick_device(device)
    model = load_model(source) if mae_ast_for is None else load_mae_ast(source, mae_ast_for)
    return model.to(chosen)


class SkipLog:
    """Audio that cannot be read: counted and named on stderr."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: object) -> None:
        self.count += 1
        print(f"skipped {reason}", file=sys.stderr, flush=True)

    def listing(self, sources: Iterable[str]) -> Iterator[str]:
        """The audio files that the sources name, one source after the other."""
        from ..data.audio import find_audio

        for source in sources:
            try:
                entries = find_audio(source)
            except (FileNotFoundError, ValueError) as error:
                self.add(error)
                continue
            yield from (entry.path for entry in entries)
