"""The commands ``tasks``, ``finetune``, ``probe`` and ``predict``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .parser import PROGRAM, CommandError, Parser, SkipLog, add_device, docstring_help, metavar, raise_unknown

if TYPE_CHECKING:
    from ..downstream.options import ProbeOptions

Options = TypeVar("Options", bound="ProbeOptions")


def run_tasks(argv: Sequence[str]) -> int:
    """List tasks and data sets, or make their manifests. Returns the exit code."""
    parser = Parser(
        "tasks",
        "Lists the tasks and data sets for fine-tuning and probing, or makes their manifests. Small tasks: extracts "
        "the audio from Debian packages (apt-get, no root) into the folder --out, with one manifest per task. If it "
        "is killed, the same command resumes. Public data sets: writes the manifest --out for the data set in the "
        "folder --root, without copying audio. The last line of output is the command to type next.",
        ("zh_initial22 hogvoice14 --out tasks/", "esc50 --root ESC-50-master --out esc50.tsv"),
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="small tasks, or one public data set (default: list all)"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the public data set")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="folder for small tasks (default: tasks), manifest of a public data set (default: NAME.tsv)",
    )
    arguments = parser.read(argv)

    from ..downstream import datasets, small_tasks

    names, choices = list(dict.fromkeys(arguments.names)), [*small_tasks.TASKS, *datasets.READERS]
    for name in names:
        if name not in choices:
            raise_unknown("task", name, choices, f"known are {', '.join(choices)}")
    public = [name for name in names if name in datasets.READERS]
    if public and len(names) > 1:
        parser.error(f"{public[0]} is a public data set and must be the only NAME, got {', '.join(names)}")
    if public and not arguments.root:
        parser.error(f"{public[0]} needs --root, the folder with {datasets.ABOUT[public[0]][-1]}")
    if arguments.root and not public:
        parser.error(f"--root needs a public data set as NAME, one of {', '.join(datasets.READERS)}")
    if public:
        return _list_dataset(public[0], arguments.root, Path(arguments.out or f"{public[0]}.tsv"))
    if names:
        return _build_tasks(names, Path(arguments.out or "tasks"))
    lines = [f"Small tasks on real recordings ({PROGRAM} tasks NAME ... --out DIR), with the download size:"]
    for name, (description, metric) in small_tasks.TASKS.items():
        num_clips, megabytes = len(small_tasks.task_rows(name)), sum(small_tasks.packages(name).values())
        lines.append(f"  {name:<14}{description}; {num_clips:,} clips; {metric}; {megabytes:,.0f} MB")
    lines += ["", f"Public data sets ({PROGRAM} tasks NAME --root DIR --out FILE.tsv), with the content of DIR:"]
    lines += [f"  {name:<14}{'; '.join(about)}" for name, about in datasets.ABOUT.items()]
    print("\n".join(lines))
    return 0


def _list_dataset(name: str, root: str, out: Path) -> int:
    """Write the manifest ``out`` of the public data set ``name`` in the folder ``root``. Returns the exit code."""
    from ..downstream import datasets

    clips = datasets.READERS[name](Path(root).expanduser())
    datasets.write_manifest(clips, out)
    labels = {label for clip in clips for label in clip["label"].split(";")}
    sizes = Counter(clip.get("split") or f"fold {clip['fold']}" for clip in clips)
    splits = ", ".join(f"{split} {num_clips:,}" for split, num_clips in sizes.items())
    print(f"{out}: {len(clips):,} clips, {len(labels)} classes; {splits}")
    missing_list = out.with_suffix(".missing.txt")
    missing_list.unlink(missing_ok=True)
    if clips.missing:
        missing_list.write_text("".join(f"{name}\n" for name in clips.missing), encoding="utf-8")
        print(f"missing clips: {len(clips.missing):,}, such as {clips.missing[0]}; {missing_list} lists them")
    print(_next_command("finetune", out, root))
    return 0


def _build_tasks(names: Sequence[str], out: Path) -> int:
    """Make audio and manifests of small tasks in the folder ``out``. Returns 1 if a task has no clips, otherwise 0."""
    from ..data import corpus
    from ..downstream import small_tasks

    try:
        report = small_tasks.build(names, out, progress=functools.partial(print, file=sys.stderr, flush=True))
    except corpus.CorpusError as error:
        raise CommandError(str(error).partition("\n")[0]) from error
    for name, task in report.items():
        print(f"{task['manifest'] or name}: {task['clips']:,} clips, {task['minutes']:.1f} minutes")
        for reason, paths in task["left_out"].items():
            print(f"  left out {len(paths)}: {reason} ({Path(paths[0]).stem}{' ...' if len(paths) > 1 else ''})")
    manifests = [out / f"{name}.tsv" for name, task in report.items() if task["manifest"]]
    if manifests:
        frame_level = "phones" in small_tasks.task_rows(manifests[0].stem)[0]
        print(_next_command("probe" if frame_level else "finetune", manifests[0]))
    return int(len(manifests) < len(report))


def _next_command(command: str, manifest: Path, root: str = "") -> str:
    """The line that names the command to type next."""
    root_option = f" --root {shlex.quote(root)}" if root else ""
    options = f"--checkpoint runs/frame --out {shlex.quote(f'runs/{manifest.stem}')}"
    return f"Next: {PROGRAM} {command} --data {shlex.quote(str(manifest))}{root_option} {options}"


def _task_options(
    command: str, argv: Sequence[str], options_class: type[Options], *, description: str, examples: Sequence[str]
) -> Options:
    """Parse the options of finetune or probe. An absent option takes the preset's value or the default.

    Args:
        command: finetune or probe.
        argv: Arguments of the command.
        options_class: Dataclass of the options; its docstring is their help.
        description: Text of the help.
        examples: Arguments of example calls.

    Raises:
        UsageError: An option or preset is unknown, missing or has a wrong value.
    """
    from ..downstream.options import CHOICES, FINETUNE_PRESETS, FinetuneOptions, ProbeOptions

    parser = Parser(command, description, examples)
    texts = {**docstring_help(ProbeOptions), **docstring_help(options_class)}
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        hint = hints[field.name]
        value_type = next(member for member in (*typing.get_args(hint), hint) if member is not type(None))
        required = field.default is dataclasses.MISSING
        default = "" if required or field.default is None else f" (default: {field.default})"
        name = {"data": "TABLE", **dict.fromkeys(("checkpoint", "out", "root", "cache"), "DIR")}.get(field.name)
        is_flag = value_type is bool
        value_options: dict[str, Any] = (
            {"action": "store_true"}
            if is_flag
            else {"type": value_type, "metavar": name or metavar(value_type, CHOICES.get(field.name, ()))}
        )
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            required=required,
            default=argparse.SUPPRESS,
            help=texts[field.name] + ("" if is_flag else default),
            **value_options,
        )
    if options_class is FinetuneOptions:
        names = ", ".join(FINETUNE_PRESETS)
        parser.add_argument(
            "--preset", metavar="NAME", help=f"settings of a paper's task: {names}; other options override it"
        )
    fields = vars(parser.read(argv))
    preset = fields.pop("preset", None)
    if preset is not None and preset not in FINETUNE_PRESETS:
        raise_unknown("preset", preset, FINETUNE_PRESETS, f"presets are {', '.join(FINETUNE_PRESETS)}")
    return options_class(**{**FINETUNE_PRESETS.get(preset, {}), **fields})


def run_finetune(argv: Sequence[str]) -> int:
    """Train and test a classifier. Returns the exit code."""
    from ..downstream.options import FinetuneOptions

    options = _task_options(
        "finetune",
        argv,
        FinetuneOptions,
        description="Trains a pretrained encoder and a linear layer on labelled audio, and tests them. If the manifest "
        "has folds, each fold is the test set once, and the reported score is the mean. Writes to --out: summary.json, "
        "predictions.csv, confusion.png (average_precision.png with several labels), learning.png, and the "
        "classifier for predict. If it is stopped, the same command resumes the run.",
        examples=(
            "--data esc14.tsv --checkpoint runs/frame --out runs/esc14",
            "--data ks2.tsv --root speech_commands/ --checkpoint runs/base --out runs/ks2 --preset ks2",
        ),
    )
    from ..downstream import finetune

    print(task_summary(finetune.finetune(options), options.out))
    return 0


def run_probe(argv: Sequence[str]) -> int:
    """Fit and test a logistic regression on a frozen encoder. Returns the exit code."""
    from ..downstream.options import ProbeOptions

    options = _task_options(
        "probe",
        argv,
        ProbeOptions,
        description="Measures in a minute what a frozen encoder's features contain: logistic regression on the mean of "
        "its tokens, compared with one on the mean log-mel spectrum; or, with --head attentive, a small head that "
        "weights layers and tokens. Takes the manifests of finetune and frame-level ones, and writes the same files to "
        "--out, without learning.png.",
        examples=(
            "--data esc14.tsv --checkpoint runs/frame --out runs/esc14_probe",
            "--data a.csv --checkpoint runs/base --out runs/a --head attentive --layers all",
        ),
    )
    from ..downstream import probe

    print(task_summary(probe.probe(options), options.out))
    return 0


def task_summary(summary: dict[str, Any], out: str) -> str:
    """A few lines for the terminal on the content of summary.json.

    Args:
        summary: Content of summary.json.
        out: Run folder.
    """
    low, high = summary["ci95"]
    metric = summary["metric"].replace("_", " ")
    lines = [
        f"{summary['task']}: {metric} {summary['value']:.4f} (95 % interval {low:.4f} - {high:.4f}) on "
        f"{summary['n_test']} test {'clips' if not summary['frame_level'] else 'moments'}"
    ]
    if summary["per_fold"]:
        folds = zip(summary["folds"], summary["per_fold"], strict=True)
        lines.append("  by fold: " + ", ".join(f"{name} {value:.3f}" for name, value in folds))
    if "majority_accuracy" in summary:
        lines.append(f"  always the commonest class of the training clips: accuracy {summary['majority_accuracy']:.4f}")
    if baseline := summary.get("log_mel_baseline"):
        low, high = baseline["difference_ci95"]
        lines.append(
            f"  the same on the mean log-mel spectrum: {baseline['value']:.4f}; "
            f"the encoder adds {baseline['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        )
    if count := summary["skipped"]["count"]:
        first = summary["skipped"]["files"][0]
        lines.append(f"  {count} clips skipped, such as {first['path']}: {first['reason']}; summary.json names them")
    picture = "average_precision.png" if summary["multi_label"] else "confusion.png"
    curves = ", learning.png" if summary["mode"] == "finetune" else ""
    lines.append(f"In {out}: summary.json, predictions.csv, {picture}{curves}")
    if not summary["frame_level"]:
        lines.append(f"Next: {PROGRAM} predict FILE --checkpoint {out}")
    return "\n".join(lines)


def run_predict(argv: Sequence[str]) -> int:
    """Classify audio files. Returns the exit code of ``SkipLog``."""
    parser = Parser(
        "predict",
        "Classifies audio files with a classifier of finetune or probe. Files without usable audio are named and "
        "skipped. The exit code is 1 if a FILE was skipped or none was classified; broken files in a folder do not "
        "change it.",
        ("talk.wav --checkpoint runs/esc14", "recordings/ --checkpoint runs/esc14 --out predictions.csv"),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, folders, or fairseq .tsv manifests")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder of finetune or probe")
    parser.add_argument("--out", metavar="CSV", help="file for a table of all probabilities (default: none)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print per file (default: 3)")
    add_device(parser)
    arguments = parser.read(argv)
    if arguments.top < 1:
        parser.error(f"--top must be at least 1, got {arguments.top}")
    if arguments.out and Path(arguments.out).is_dir():
        parser.error(f"--out must be the file to write, got the folder {arguments.out}")

    from ..data.audio import AudioError
    from ..devices import pick_device
    from ..downstream.classifier import AudioClassifier, write_predictions

    classifier = AudioClassifier.from_pretrained(arguments.checkpoint).to(pick_device(arguments.device))
    skipped = SkipLog()
    predictions: list[tuple[str, list[float]]] = []  # path, probabilities
    for path in skipped.find_files(arguments.files):
        try:
            probabilities = classifier.classify_file(path)
        except AudioError as error:
            skipped.add(error)
            continue
        predictions.append((path, probabilities.tolist()))
        best = probabilities.topk(min(arguments.top, len(probabilities)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        print(f"{path}: " + ", ".join(f"{classifier.labels[i]} {p:.3f}" for i, p in pairs), flush=True)
    if arguments.out and predictions:
        write_predictions(classifier, predictions, Path(arguments.out))
    if skipped.count:
        print(f"{len(predictions)} classified, {skipped.count} skipped")
    return skipped.exit_code(len(predictions))
