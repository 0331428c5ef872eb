"""The command line: ``mae-ast-fast COMMAND``, also ``python -m mae_ast_fast COMMAND``.

A command is a function from its arguments to an exit code; what it needs is imported inside it, so that ``doctor``
runs without audio libraries and ``--help`` waits for nothing. Exit codes: 0, 1 an error of what was given (one line on
stderr), 2 a wrong command or option, 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .model import MAEAST
    from .options import PretrainOptions
    from .ssast import SSAST

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
    except UsageError as error:
        return _complain(name, error, 2, show_traceback)
    except (CommandError, ValueError, OSError) as error:
        return _complain(name, error, 1, show_traceback)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        return _complain(name, _missing([error.name]), 1, show_traceback)


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
        from . import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if word.startswith("-"):
        _unknown("option", word, ("--help", "--version", "--traceback"), "a command's options stand after it")
    _unknown("command", word, COMMANDS, f"commands are {', '.join(COMMANDS)}")


def _unknown(what: str, word: str, known: Iterable[str], otherwise: str) -> NoReturn:
    raise UsageError(f"unknown {what} {word}; " + (_did_you_mean(word, known) or otherwise))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question whether the nearest known name was meant; empty where none is near."""
    names = {name.lstrip("-"): name for name in known}
    bare = word.lstrip("-")
    near = difflib.get_close_matches(bare, names, 1, 0.6) or [name for name in names if bare and name.startswith(bare)]
    return f"did you mean {names[near[0]]}?" if near else ""


def _spelled(argv: Sequence[str], known: Iterable[str], command: str) -> list[str]:
    """Arguments with every option as it is declared: underscores and dashes are the same; an unknown one is an error.

    Done before parsing, because argparse first complains of required options that a misspelt one was meant to be.
    """
    declared = {option.replace("_", "-"): option for option in known}
    spelled = []
    for place, argument in enumerate(argv):
        if argument == "--":
            return spelled + list(argv[place:])
        option, equals, value = argument.partition("=")
        if re.match(r"--?[A-Za-z]", option):
            if option.replace("_", "-") not in declared:
                options = [*declared.values(), "--traceback"]
                _unknown("option", option, options, f"{PROGRAM} {command} --help lists them")
            option = declared[option.replace("_", "-")]
        spelled.append(option + equals + value)
    return spelled


class _Parser(argparse.ArgumentParser):
    """argparse that raises ``UsageError``, and names the option that a wrong one was meant to be."""

    def __init__(self, command: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            description=textwrap.fill(description, 100),
            epilog=_examples(command, examples),
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110),
            allow_abbrev=False,
        )
        self.command = command

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments."""
        return self.parse_args(_spelled(argv, self._option_string_actions, self.command))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def _examples(command: str, examples: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {PROGRAM} {command} {example}" for example in examples)])


def _tell(report: dict[str, Any], to_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Prints a report, for programs or for reading."""
    if as_json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(to_text(report))


def _missing(names: Sequence[str]) -> CommandError:
    return CommandError(f'{", ".join(names)} missing: pip install "mae-ast-fast[train]"')


# --------------------------------------------------------------------------------------------------------- pretrain


def _pretrain(argv: Sequence[str]) -> int:
    options = _pretrain_options(argv)
    if missing := [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]:
        raise _missing(missing)
    import torch

    from . import corpus, pretrain

    try:
        summary = pretrain.pretrain(options)
    except pretrain.Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # all of torchrun's processes stop, one says so
            print(f"{PROGRAM} pretrain: {stop}", file=sys.stderr)
        return stop.exit_code
    except (pretrain.NonFiniteLoss, corpus.CorpusError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        fits = f" ({PROGRAM} doctor --preset {options.preset} says what fits)" if options.model == "mae_ast" else ""
        raise CommandError(f"out of memory: choose a smaller --batch-seconds{fits}; {error}") from error
    if summary:  # of several processes the first one's
        print(pretrain_summary(summary, Path(options.out)))
    return 0


def _pretrain_options(argv: Sequence[str]) -> PretrainOptions:
    """Options of the dataclass, from YAML and the command line."""
    try:
        import jsonargparse
    except ImportError:
        raise _missing(["jsonargparse"]) from None
    from .config import MAEASTConfig, SSASTConfig
    from .options import PretrainOptions

    class Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        def __init__(self, prog: str, **options: Any) -> None:
            super().__init__(prog, **{**options, "max_help_position": 30, "width": 110})

    parser = jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} pretrain",
        description=textwrap.fill(
            "Pretrains MAE-AST, or SSAST, on audio. Without --data on the default corpus of real recordings. The run "
            "folder gets checkpoints, metrics.jsonl, TensorBoard events, pictures and summary.json; the same command "
            "goes on with a run that was stopped.",
            100,
        ),
        epilog=_examples(
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
    parser.add_argument("--config", action="config", metavar="YAML", help="Options from a file; the command line wins.")
    described, defaults = _described(PretrainOptions), PretrainOptions()
    hints = typing.get_type_hints(PretrainOptions)
    group = parser.add_argument_group("the run")
    for field in dataclasses.fields(PretrainOptions):
        if field.name != "model_args":
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                type=hints[field.name],
                default=getattr(defaults, field.name),
                metavar=_metavar(hints[field.name]),
                help=described[field.name],
            )
    seen: set[str] = set()
    for config_class, title, text in (
        (MAEASTConfig, "fields of the model", "Where not given, the preset's."),
        (SSASTConfig, "fields that only --model ssast has", "The names that both have mean the same."),
    ):
        group = parser.add_argument_group(title, text)
        described, hints = _described(config_class), typing.get_type_hints(config_class)
        new = [field.name for field in dataclasses.fields(config_class) if field.name not in seen]
        for name in new:
            group.add_argument(
                f"--model_args.{name}",
                type=hints[name],
                default=defaults.model_args.get(name, argparse.SUPPRESS),
                metavar=_metavar(hints[name]),
                help=described[name],
            )
        seen.update(new)
    known = parser._option_string_actions
    try:
        parsed = parser.parse_args(_spelled(argv, known, "pretrain")).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(_explained(str(error), known)) from error
    parsed.pop("config", None)
    # Lists, as YAML and JSON have them: a run compares its options with those that it wrote down.
    given = parsed.pop("model_args", None) or {}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return PretrainOptions(**parsed, model_args=given)


def _described(of: type) -> dict[str, str]:
    """Field -> text from the Args section of a Google docstring."""
    section = (inspect.getdoc(of) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", "\n" + section)[1:]
    pairs = (entry.strip().split(": ", 1) for entry in entries)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in pairs}


def _metavar(hint: Any) -> str:
    return {int: "N", float: "X", bool: "{true,false}"}.get(hint, "VALUE")


def _explained(message: str, known: Iterable[str]) -> str:
    """A message of jsonargparse in the words of the command line, with the nearest name where one is unknown."""
    message = re.sub(r'(Parser key|Key) "([\w.]+)":', r"--\2:", " ".join(message.split()))
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", message)
    names = [option.removeprefix("--").replace("-", "_") for option in known]
    for word in re.findall(r"['\"]([A-Za-z_][\w.]*)['\"]", message):
        if word not in names and (near := _did_you_mean(word, names)):
            return f"{message}; {near}"
    return message


def pretrain_summary(summary: dict[str, Any], run: Path) -> str:
    """What summary.json holds, in a few lines."""
    held_out = summary["held_out"]
    baselines = ", ".join(f"{name.replace('_', ' ')} {error:.4f}" for name, error in held_out["baselines"].items())
    lines = [
        f"{summary['steps']} steps in {summary['train_seconds'] / 60:.1f} minutes, "
        f"{summary['clips_per_second']:.1f} clips/s, {summary['audio_hours_seen']:.2f} hours of audio",
        f"On {held_out['clips']} held-out clips:",
        f"  reconstruction MSE {held_out['reconstruction_mse']:.4f}; baselines: {baselines}",
        f"  InfoNCE accuracy {held_out['accuracy']:.4f}; chance {held_out['chance']:.4f}",
    ]
    if held_out["passed"]:
        lines.append("  passed: better than the mean of the visible patches, than interpolation, and than twice chance")
    else:
        lines += ["  NOT passed:", *(f"    {failure}" for failure in held_out["failures"])]
    for kind, report in summary["held_out_by_kind"].items():
        if failures := report["failures"]:
            more = f" (summary.json: {len(failures) - 1} more)" if len(failures) > 1 else ""
            lines.append(f"  {kind} alone: {failures[0]}{more}")
    use = f"features FILE --checkpoint {run} --out features/"
    if summary["model"] == "ssast":
        use = f"reconstruct FILE --checkpoint {run} --out file.png"
    lines += [
        f"In {run}: model.safetensors and config.json, summary.json, metrics.jsonl, loss.png, reconstruction.png, "
        "tensorboard/",
        f"Next: {PROGRAM} {use}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- prepare


def _prepare(argv: Sequence[str]) -> int:
    parser = _Parser(
        "prepare",
        "Decodes audio once, to 16 kHz mono. --out makes Lhotse Shar shards for pretrain --data, of sources of any "
        "size: killed, the same command goes on, and DIR appears whole. DIR.report.json says what was found and "
        "skipped. --npy makes two arrays that are read without any audio library, and stops at a size: FILE.npy has "
        "all samples, clip after clip, FILE.lengths.npy the samples of each: "
        "numpy.split(samples, lengths.cumsum()[:-1]) gives the clips. Files that give no audio are named and skipped.",
        (
            "recordings/ --out shards/ --workers 16",
            "--npy corpus.npy --seconds 5 --max-mb 10   (the default corpus)",
        ),
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SRC",
        help="folder of audio, fairseq .tsv or audio file; with --out also a Lhotse CutSet manifest (.jsonl, "
        ".jsonl.gz), a Shar folder, or their URL (default: the default corpus)",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="folder of shards to make")
    target.add_argument("--npy", metavar="FILE", help="file to write, ends in .npy")
    shards = parser.add_argument_group("with --out")
    shards.add_argument("--format", choices=("wav", "flac"), help="in the shards (default: wav, the fastest to read)")
    shards.add_argument(
        "--workers", type=int, metavar="N", help=f"processes that decode (default: one a CPU core, {os.cpu_count()})"
    )
    shards.add_argument("--min-seconds", type=float, metavar="S", help="shorter clips are skipped (default: 0.3)")
    arrays = parser.add_argument_group("with --npy")
    arrays.add_argument("--seconds", type=float, metavar="S", help="of longer files, the first S seconds (default: 10)")
    arrays.add_argument("--max-mb", type=float, metavar="X", help="both files together, in 10^6 bytes (default: 30)")
    arrays.add_argument("--seed", type=int, metavar="N", help="of the order of files (default: 0)")
    arguments = parser.read(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    source, out, npy = (given.pop(name, None) for name in ("source", "out", "npy"))
    allowed = ("format", "workers", "min_seconds") if out else ("seconds", "max_mb", "seed")
    for name in given:
        if name not in allowed:
            parser.error(f"--{name.replace('_', '-')} does not go with {'--out' if out else '--npy'}")

    from . import corpus, prepare

    tell = functools.partial(print, file=sys.stderr, flush=True)
    try:
        if npy:
            report = prepare.prepare_npy(source, npy, **given, progress=tell)
            print(
                f"{npy}: {report.clips} clips, {report.seconds / 60:.1f} minutes, {report.size / 1e6:.2f} MB; "
                f"{len(report.skipped)} files skipped, {report.left} of {report.files} left out because the size was "
                "reached"
            )
            return 0
        split = None
        if source is None:
            source, split = prepare.default_entries(tell), corpus.held_out
    except corpus.CorpusError as error:
        raise CommandError(str(error)) from error
    given = {"form": given.pop("format", "wav"), "workers": os.cpu_count() or 1, **given}
    found = prepare.prepare_shards(source, out, split=split, **given)
    size = sum(size for _, size in found["shards"]) / 1e6
    print(
        f"{out}: {found['clips']} of {found['files']} clips, {found['hours']:.2f} hours, {size:,.1f} MB in "
        f"{len(found['shards'])} shards; {found['split']}; report in {out.rstrip('/')}.report.json"
    )
    return 0


# ------------------------------------------------------------------------------------------------------------ tasks


def _tasks(argv: Sequence[str]) -> int:
    parser = _Parser(
        "tasks",
        "What there is to fine-tune on and to probe; without NAME the list. Of small tasks the audio is made from "
        "Debian packages (apt-get, no root), with a manifest each, in the folder --out; killed, the same command goes "
        "on. A public data set that you have in the folder --root becomes a manifest, the file --out; nothing is "
        "copied. The last line is the command to type next.",
        ("zh_initial22 hogvoice14 --out tasks/", "esc50 --root ESC-50-master --out esc50.tsv"),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="small tasks, or one public data set")
    parser.add_argument("--root", metavar="DIR", help="folder of the public data set")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="folder for small tasks (default: tasks), manifest of a public data set (default: NAME.tsv)",
    )
    arguments = parser.read(argv)

    from . import datasets, small_tasks

    names, known = list(dict.fromkeys(arguments.names)), [*small_tasks.TASKS, *datasets.READERS]
    for name in names:
        if name not in known:
            _unknown("task", name, known, f"known are {', '.join(known)}")
    public = [name for name in names if name in datasets.READERS]
    if public and len(names) > 1:
        parser.error(f"{public[0]} is a public data set and goes alone, got {', '.join(names)}")
    if public and not arguments.root:
        parser.error(f"{public[0]} takes --root, the folder with {datasets.ABOUT[public[0]][-1]}")
    if arguments.root and not public:
        parser.error(f"--root is the folder of a public data set, one of {', '.join(datasets.READERS)}")
    if public:
        return _list_dataset(public[0], arguments.root, Path(arguments.out or f"{public[0]}.tsv"))
    if names:
        return _build_tasks(names, Path(arguments.out or "tasks"))
    lines = [f"Small tasks on real recordings ({PROGRAM} tasks NAME ... --out DIR), with what there is to download:"]
    for name, (what, metric) in small_tasks.TASKS.items():
        clips, size = len(small_tasks.task_rows(name)), sum(small_tasks.packages(name).values())
        lines.append(f"  {name:<14}{what}; {clips:,} clips; {metric}; {size:,.0f} MB")
    lines += ["", f"Public data sets ({PROGRAM} tasks NAME --root DIR --out FILE.tsv), with what is in DIR:"]
    lines += [f"  {name:<14}{'; '.join(about)}" for name, about in datasets.ABOUT.items()]
    print("\n".join(lines))
    return 0


def _list_dataset(name: str, root: str, out: Path) -> int:
    from . import datasets

    rows = datasets.READERS[name](Path(root).expanduser())
    datasets.write_manifest(rows, out)
    labels = {label for row in rows for label in row["label"].split(";")}
    parts = Counter(row.get("split") or f"fold {row['fold']}" for row in rows)
    print(f"{out}: {len(rows):,} clips, {len(labels)} classes; {', '.join(f'{k} {n:,}' for k, n in parts.items())}")
    names = out.with_suffix(".missing.txt")
    names.unlink(missing_ok=True)
    if rows.missing:
        names.write_text("".join(f"{name}\n" for name in rows.missing), encoding="utf-8")
        print(f"not there: {len(rows.missing):,}, {rows.missing[0]} for one; all their names are in {names}")
    print(_next_command("finetune", out, root))
    return 0


def _build_tasks(names: Sequence[str], out: Path) -> int:
    from . import corpus, small_tasks

    try:
        report = small_tasks.build(names, out, progress=functools.partial(print, file=sys.stderr, flush=True))
    except corpus.CorpusError as error:
        raise CommandError(str(error).partition("\n")[0]) from error
    for name, found in report.items():
        print(f"{found['manifest'] or name}: {found['clips']:,} clips, {found['minutes']:.1f} minutes")
        for reason, paths in found["left_out"].items():
            print(f"  left out {len(paths)}: {reason} ({Path(paths[0]).stem}{' ...' if len(paths) > 1 else ''})")
    built = [out / f"{name}.tsv" for name, found in report.items() if found["manifest"]]
    if built:
        frames = "phones" in small_tasks.task_rows(built[0].stem)[0]
        print(_next_command("probe" if frames else "finetune", built[0]))
    return int(len(built) < len(report))


def _next_command(verb: str, manifest: Path, root: str = "") -> str:
    where = f" --root {shlex.quote(root)}" if root else ""
    run = f"--checkpoint runs/pretrain --out {shlex.quote(f'runs/{manifest.stem}')}"
    return f"Next: {PROGRAM} {verb} --data {shlex.quote(str(manifest))}{where} {run}"


# -------------------------------------------------------------------------------------------------- a trained model

_CHECKPOINT_HELP = "a folder of ours (a run folder too), an official file, or a Hub repository"


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto, CUDA where it is)"
    )


def _load(source: str, device: str, mae_ast_for: str | None = None) -> MAEAST | SSAST:
    """A model on its device; ``mae_ast_for``: for what an SSAST would not do."""
    from .checkpoint import load_mae_ast, load_model
    from .inference import pick_device

    chosen = pick_device(device)
    model = load_model(source) if mae_ast_for is None else load_mae_ast(source, mae_ast_for)
    return model.to(chosen)


class _Skipped:
    """Audio that cannot be read: counted and named on stderr."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: object) -> None:
        self.count += 1
        print(f"skipped {reason}", file=sys.stderr, flush=True)

    def listing(self, sources: Iterable[str]) -> Iterator[str]:
        """The audio files that the sources name, one source after the other."""
        from .audio import find_audio

        for source in sources:
            try:
                entries = find_audio(source)
            except (FileNotFoundError, ValueError) as error:
                self.add(error)
                continue
            yield from (entry.path for entry in entries)


def _features(argv: Sequence[str]) -> int:
    parser = _Parser(
        "features",
        "Encoder features of audio files, with the time of each. Arrays: features (tokens, D), times (tokens,) in "
        "seconds, the centre of each token, and frequency_block (tokens,), 0 the lowest. Tokens run through time; a "
        "patch model has several frequency blocks a time step, next to each other: "
        "features.reshape(-1, frequency_block.max() + 1, D).mean(1) is one vector a time step. Files that give no "
        "audio are named and skipped, and the exit code is then 1.",
        (
            "talk.wav --checkpoint runs/pretrain --out talk.npz",
            "recordings/ --checkpoint runs/pretrain --out features/ --layer 9 --format safetensors",
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, folders, or fairseq .tsv manifests")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=_CHECKPOINT_HELP)
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="folder for one output a file, which lie in it as the files lie to each other; or, for one file, a name "
        "that ends in .npz or .safetensors",
    )
    parser.add_argument("--layer", type=int, metavar="K", help="layer from 1 on (default: the encoder's output)")
    parser.add_argument(
        "--chunk-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="longer files are encoded in pieces of this length in seconds, each by itself (default: 30)",
    )
    parser.add_argument("--format", choices=("npz", "safetensors"), help="(default: by the name of --out, else npz)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    _add_device(parser)
    arguments = parser.read(argv)

    from .audio import AudioError
    from .inference import extract_file, output_paths, save_features

    skipped = _Skipped()
    paths = list(dict.fromkeys(skipped.listing(arguments.files)))
    out = Path(arguments.out)
    named = out.suffix[1:] if out.suffix in (".npz", ".safetensors") and not out.is_dir() else None
    if named and len(paths) + skipped.count > 1:
        raise ValueError(f"--out {out} names one file, got {len(paths) + skipped.count}: name a folder")
    if named and arguments.format not in (None, named):
        raise ValueError(f"--out {out} and --format {arguments.format} contradict each other")
    form = arguments.format or named or "npz"
    targets = [out] * len(paths) if named else output_paths(paths, out, f".{form}") if paths else []
    model = _load(arguments.checkpoint, arguments.device, "features")
    written = 0
    for path, target in zip(paths, targets, strict=True):
        try:
            found = extract_file(model, path, arguments.layer, arguments.chunk_seconds, arguments.precision)
        except AudioError as error:
            skipped.add(error)
            continue
        save_features(found, target, form)
        written += 1
        tokens, width = found.features.shape
        print(f"{target}: {tokens} tokens x {width}, to {found.times[-1]:.2f} s", flush=True)
    if written != 1 or skipped.count:
        print(f"{written} written, {skipped.count} skipped")
    return 1 if skipped.count else 0


def _reconstruct(argv: Sequence[str]) -> int:
    parser = _Parser(
        "reconstruct",
        "Hides part of audio clips, lets a model fill it in, and draws original, masked and reconstructed log-mel, one "
        "row a file. Prints the error on the hidden patches beside those of simple guesses from the visible ones.",
        (
            "talk.wav --checkpoint runs/pretrain --out talk.png",
            "talk.wav rain.flac --checkpoint runs/pretrain --out both.png --mask-ratio 0.5 --masking time --start 30",
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=_CHECKPOINT_HELP)
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    parser.add_argument("--seed", type=int, metavar="N", help="of the mask (default: the held-out evaluation's)")
    parser.add_argument("--mask-ratio", type=float, metavar="X", help="share hidden, in (0, 1) (default: the model's)")
    parser.add_argument("--masking", metavar="NAME", help="strategy of hiding (default: the model's)")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds into each file (default: 0)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length of a clip (default: 10, or as much as an SSAST takes)"
    )
    _add_device(parser)
    arguments = parser.read(argv)

    from .evaluate import evaluate
    from .figures import plot_reconstruction
    from .inference import masked_clips, select

    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    model = _load(arguments.checkpoint, arguments.device)
    hide = {"mask_ratio": arguments.mask_ratio, "masking": arguments.masking}
    clips = masked_clips(model, arguments.files, arguments.seed, arguments.start, arguments.seconds, **hide)
    reports = [evaluate(model, select(clips, index)) for index in range(len(clips.names))]
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_reconstruction(model, clips, out)
    for name, report in zip(clips.names, reports, strict=True):
        baselines = ", ".join(f"{other.replace('_', ' ')} {error:.4f}" for other, error in report["baselines"].items())
        print(
            f"{name}: MSE {report['reconstruction_mse']:.4f} on {report['masked_tokens']} hidden patches; "
            f"baselines: {baselines}; InfoNCE accuracy {report['accuracy']:.4f}, chance {report['chance']:.4f}"
        )
    print(f"wrote {out}")
    return 0


def _export(argv: Sequence[str]) -> int:
    parser = _Parser(
        "export",
        "Writes the encoder alone, model.safetensors and config.json: what feature extraction and fine-tuning need, "
        "without decoder and heads. MAEAST.from_pretrained(DIR).extract_features gives the same features to the bit. "
        "With --format transformers for AutoModel of Hugging Face transformers, a fine-tuned classifier for its "
        "AutoModelForAudioClassification; import mae_ast_fast.hf first.",
        ("runs/pretrain encoder/", "mae_ast_patch.pt encoder/"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT_HELP)
    parser.add_argument("dir", metavar="DIR", help="new folder")
    parser.add_argument(
        "--format",
        default="mae_ast_fast",
        choices=("mae_ast_fast", "transformers"),
        metavar="NAME",
        help="mae_ast_fast or transformers (default: mae_ast_fast)",
    )
    arguments = parser.read(argv)

    from .checkpoint import load_mae_ast
    from .inference import encoder_alone, save_model

    if arguments.format == "transformers":
        return _export_to_transformers(arguments.checkpoint, Path(arguments.dir))

    model = load_mae_ast(arguments.checkpoint, "export")
    encoder = encoder_alone(model)
    size = save_model(encoder, Path(arguments.dir))
    print(
        f"{arguments.dir}: encoder of {_parameters(encoder)} parameters, {size / 1e6:,.1f} MB "
        f"(the whole model has {_parameters(model)} parameters)"
    )
    return 0


def _export_to_transformers(checkpoint: str, folder: Path) -> int:
    try:
        from .hf import export, load
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CommandError("transformers missing: pip install transformers") from None
    written = export(load(checkpoint), folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {type(written).__name__} of {_parameters(written)} parameters, {size / 1e6:,.1f} MB")
    return 0


def _convert(argv: Sequence[str]) -> int:
    parser = _Parser(
        "convert",
        "Turns a checkpoint of the paper's own code (fairseq, .pt) into model.safetensors and config.json. Neither "
        "fairseq is needed nor anything from the file executed.",
        ("mae_ast_patch.pt mae_ast_patch/", "mae_ast_frame.pt mae_ast_frame/"),
    )
    parser.add_argument("official", metavar="OFFICIAL.pt", help="the paper's checkpoint")
    parser.add_argument("dir", metavar="DIR", help="new folder")
    arguments = parser.read(argv)

    from .checkpoint import load_fairseq
    from .inference import save_model

    model = load_fairseq(arguments.official)
    size = save_model(model, Path(arguments.dir))
    config = model.config
    print(
        f"{arguments.dir}: {_parameters(model)} parameters, {size / 1e6:,.1f} MB; patches of {config.patch_size[0]} x "
        f"{config.patch_size[1]}, width {config.embed_dim}, {config.encoder_layers} + {config.decoder_layers} layers"
    )
    return 0


def _parameters(model: MAEAST) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


# ------------------------------------------------------------------------------------------------- downstream tasks


def _task_options(command: str, argv: Sequence[str], of: type, description: str, examples: Sequence[str]) -> Any:
    """Options of the dataclass ``of``; what is not given is the preset's, else the default."""
    from .options import FINETUNE_PRESETS, FinetuneOptions, ProbeOptions

    parser = _Parser(command, description, examples)
    described = {**_described(ProbeOptions), **_described(of)}
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        hint = hints[field.name]
        kind = next(part for part in (*typing.get_args(hint), hint) if part is not type(None))
        required = field.default is dataclasses.MISSING
        default = "" if required or field.default is None else f" (default: {field.default})"
        flag = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": _metavar(kind)}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            required=required,
            default=argparse.SUPPRESS,
            help=described[field.name] + ("" if kind is bool else default),
            **flag,
        )
    if of is FinetuneOptions:
        names = ", ".join(FINETUNE_PRESETS)
        parser.add_argument("--preset", metavar="NAME", help=f"settings of the paper's tasks: {names}; options win")
    given = vars(parser.read(argv))
    preset = given.pop("preset", None)
    if preset is not None and preset not in FINETUNE_PRESETS:
        _unknown("preset", preset, FINETUNE_PRESETS, f"presets are {', '.join(FINETUNE_PRESETS)}")
    return of(**{**FINETUNE_PRESETS.get(preset, {}), **given})


def _finetune(argv: Sequence[str]) -> int:
    from .options import FinetuneOptions

    options = _task_options(
        "finetune",
        argv,
        FinetuneOptions,
        "Trains a pretrained encoder and a linear layer on labelled audio, and tests it: once for each fold where the "
        "manifest has folds. --out gets summary.json, predictions.csv, confusion.png, learning.png, and the classifier "
        "that predict uses. The same command goes on with the folds that are not done.",
        (
            "--data esc14.tsv --checkpoint runs/pretrain --out runs/esc14",
            "--data ks2.tsv --root speech_commands/ --checkpoint runs/base --out runs/ks2 --preset ks2",
        ),
    )
    from . import finetune

    print(task_summary(finetune.finetune(options), options.out))
    return 0


def _probe(argv: Sequence[str]) -> int:
    from .options import ProbeOptions

    options = _task_options(
        "probe",
        argv,
        ProbeOptions,
        "Logistic regression on the mean of a frozen encoder's tokens: what the features hold, in a minute. Beside it "
        "the same on the mean log-mel spectrum. Manifests and --out as for finetune; frame-level ones too.",
        (
            "--data esc14.tsv --checkpoint runs/pretrain --out runs/esc14_probe",
            "--data a.csv --checkpoint runs/base --out runs/a --layer 3 --pool bands",
        ),
    )
    from . import finetune

    print(task_summary(finetune.probe(options), options.out))
    return 0


def task_summary(summary: dict[str, Any], out: str) -> str:
    """What summary.json holds, in a few lines."""
    low, high = summary["ci95"]
    metric = summary["metric"].replace("_", " ")
    lines = [
        f"{summary['task']}: {metric} {summary['value']:.4f} (95 % interval {low:.4f} - {high:.4f}) on "
        f"{summary['n_test']} test {'clips' if not summary['frame_level'] else 'moments'}"
    ]
    if summary["per_fold"]:
        pairs = zip(summary["folds"], summary["per_fold"], strict=True)
        lines.append("  by fold: " + ", ".join(f"{name} {value:.3f}" for name, value in pairs))
    if "majority_accuracy" in summary:
        lines.append(f"  always the commonest class: accuracy {summary['majority_accuracy']:.4f}")
    if other := summary.get("log_mel_baseline"):
        a, b = other["difference_ci95"]
        lines.append(
            f"  the same on the mean log-mel spectrum: {other['value']:.4f}; "
            f"{other['difference']:+.4f} ({a:+.4f} to {b:+.4f}) by the encoder"
        )
    if count := summary["skipped"]["count"]:
        first = summary["skipped"]["files"][0]
        lines.append(f"  {count} clips skipped, such as {first['path']}: {first['reason']}; summary.json names them")
    lines.append(f"In {out}: summary.json, predictions.csv and pictures")
    if not summary["frame_level"]:
        lines.append(f"Next: {PROGRAM} predict FILE --checkpoint {out}")
    return "\n".join(lines)


def _predict(argv: Sequence[str]) -> int:
    parser = _Parser(
        "predict",
        "Classes of audio files by a classifier that finetune or probe made. Files that give no audio are named and "
        "skipped, and the exit code is then 1.",
        ("talk.wav --checkpoint runs/esc14", "recordings/ --checkpoint runs/esc14 --out predictions.csv"),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, folders, or fairseq .tsv manifests")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder of finetune or probe")
    parser.add_argument("--out", metavar="CSV", help="a table of all probabilities (default: none)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print (default: 3)")
    _add_device(parser)
    arguments = parser.read(argv)
    if arguments.top < 1:
        parser.error(f"--top must be at least 1, got {arguments.top}")

    from .audio import AudioError
    from .classifier import AudioClassifier, write_predictions
    from .inference import pick_device

    classifier = AudioClassifier.from_pretrained(arguments.checkpoint).to(pick_device(arguments.device))
    skipped, rows = _Skipped(), []
    for path in skipped.listing(arguments.files):
        try:
            found = classifier.classify_file(path)
        except AudioError as error:
            skipped.add(error)
            continue
        rows.append((path, found.tolist()))
        best = found.topk(min(arguments.top, len(found)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        print(f"{path}: " + ", ".join(f"{classifier.labels[i]} {p:.3f}" for i, p in pairs), flush=True)
    if arguments.out and rows:
        write_predictions(classifier, rows, Path(arguments.out))
    if skipped.count:
        print(f"{len(rows)} classified, {skipped.count} skipped")
    return 1 if skipped.count else 0


# ----------------------------------------------------------------------------------------------------- this machine


def _doctor(argv: Sequence[str]) -> int:
    parser = _Parser(
        "doctor",
        "Says what this machine has: versions, devices, which implementation of each operation and which attention the "
        "model will use and why, and the largest batch of 10-second clips that fits in training. Runs a few small "
        "training steps for that.",
        ("", "--preset patch_tiny --json"),
    )
    parser.add_argument("--preset", default="patch_base", metavar="NAME", help="model sizes (default: patch_base)")
    parser.add_argument("--checkpoint", metavar="DIR", help="sizes of this one instead: " + _CHECKPOINT_HELP)
    parser.add_argument("--json", action="store_true", help="for programs: sizes in bytes")
    arguments = parser.read(argv)

    from . import doctor

    report = doctor.examine(arguments.preset, arguments.checkpoint)
    _tell(report, doctor.to_text, arguments.json)
    return 0


def _bench(argv: Sequence[str]) -> int:
    parser = _Parser(
        "bench",
        "Times a training step on this machine, in about a minute: plain PyTorch, this library's step, and SSAST, "
        "whose encoder runs over masked tokens too, in turns. The model is the largest whose rounds fit into the time.",
        ("", "--preset patch_small --clips 8 --json"),
    )
    parser.add_argument("--preset", metavar="NAME", help="{patch,frame}_{base,small,tiny} (default: what fits)")
    parser.add_argument("--clips", type=int, metavar="N", help="clips of 10 s in a batch (default: CPU 4, GPU 64)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="to spend, about (default: 60)")
    parser.add_argument("--json", action="store_true", help="for programs: every round")
    arguments = parser.read(argv)

    from . import bench

    report = bench.bench(
        arguments.preset,
        arguments.clips,
        arguments.device,
        arguments.seconds,
        say=functools.partial(print, file=sys.stderr, flush=True),
    )
    _tell(report, bench.to_text, arguments.json)
    return 0


# ---------------------------------------------------------------------------------------------------------- kernels


def _kernels(argv: Sequence[str]) -> int:
    parser = _Parser(
        "kernels",
        "Compiles every Triton kernel ahead of time, without a GPU, and says what it costs: registers, spills, shared "
        "memory, matrix instructions, occupancy. Only what changed since the last time is compiled. The exit code is 1 "
        "where a kernel does not compile, asks for more shared memory than the architecture has, or spills more than "
        "kernels/allowed.py allows; that a kernel does not compile for gfx942 counts only with --arch gfx942.",
        ("--op add_layer_norm --arch sm_90", "--dump add_layer_norm._forward --arch sm_90,sm_100 --out dump/"),
    )
    parser.add_argument("--arch", metavar="NAMES", help="of sm_80, sm_90, sm_100, gfx942, with commas (default: all)")
    parser.add_argument("--op", metavar="NAMES", help="operations, as the files in kernels/ (default: all)")
    parser.add_argument(
        "--dump",
        metavar="NAME",
        help='only variants with NAME in "op.kernel variant arch"; writes their PTX and SASS (gfx942: its assembly)',
    )
    parser.add_argument("--out", default="kernel_dump", metavar="DIR", help="folder for --dump (default: kernel_dump)")
    parser.add_argument("--no-cache", action="store_true", help="compile everything, keep nothing")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.read(argv)

    from . import kernel_report

    def stop(*_: object) -> None:  # as Ctrl-C: compilers are stopped, temporary files removed
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} compiled", end="" if done < of else "\n", file=sys.stderr, flush=True)

    try:
        report = kernel_report.examine(
            archs=None if arguments.arch is None else arguments.arch.split(","),
            ops=None if arguments.op is None else arguments.op.split(","),
            dump=arguments.dump,
            out=arguments.out,
            cache=not arguments.no_cache,
            progress=progress,
        )
    except kernel_report.Unavailable as error:
        raise CommandError(str(error)) from error
    _tell(report, kernel_report.to_text, arguments.json)
    return 1 if report["problems"] else 0


def _tune(argv: Sequence[str]) -> int:
    parser = _Parser(
        "tune",
        "Times every kernel on this machine's GPU with other launches (tiles, programs, warps, stages) and writes rows "
        "of its architecture into kernels/table.py, to be reviewed and committed like code. After each operation the "
        "table is written, so that a run may be stopped.",
        ("--op add_layer_norm,bias_gelu", "--dtype fp32 --check"),
    )
    parser.add_argument("--op", metavar="NAMES", help="operations, as the files in kernels/ (default: all)")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="bf16 (also for fp16) or fp32 (default: bf16)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where another is faster")
    arguments = parser.read(argv)

    from . import tune

    groups = tune.tune(
        None if arguments.op is None else arguments.op.split(","),
        arguments.dtype,
        check=arguments.check,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )
    print(tune.to_text(groups))
    return int(arguments.check and any(group.best != group.present for group in groups))


# --------------------------------------------------------------------------------------------------------- overview


class Command(typing.NamedTuple):
    """A line of the overview, and what runs."""

    group: str
    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS = {
    "pretrain": Command("Train", "pretrain a model on a folder of audio, or on the default corpus", _pretrain),
    "prepare": Command("Train", "decode audio once, into Lhotse Shar shards", _prepare),
    "tasks": Command("Fine-tune", "tasks and data sets to fine-tune on: list them, make their manifests", _tasks),
    "finetune": Command("Fine-tune", "train a classifier from a pretrained model, test it, fold by fold", _finetune),
    "probe": Command("Fine-tune", "logistic regression on a frozen model's features, beside that on log-mel", _probe),
    "predict": Command("Fine-tune", "classes of audio files, by a classifier of finetune or probe", _predict),
    "features": Command("Use a model", "features of audio files of any length, with their times", _features),
    "reconstruct": Command("Use a model", "hide part of a clip and draw what the model fills in", _reconstruct),
    "export": Command("Use a model", "write the encoder alone", _export),
    "convert": Command("Use a model", "read a checkpoint of the paper's own code", _convert),
    "doctor": Command("This machine", "versions, devices, what will be used and why, the largest batch", _doctor),
    "bench": Command("This machine", "time a training step beside plain PyTorch and SSAST, in a minute", _bench),
    "kernels": Command(
        "Kernels", "compile every kernel for several GPUs, without one, and say what it costs", _kernels
    ),
    "tune": Command("Kernels", "time launches on this machine's GPU and write the launch table", _tune),
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
