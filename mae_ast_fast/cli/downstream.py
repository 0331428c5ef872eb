"""``tasks``, ``finetune``, ``probe`` and ``predict``."""

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
from typing import Any

from .parser import PROGRAM, CommandError, Parser, SkipLog, add_device, docstring_help, metavar, unknown


def run_tasks(argv: Sequence[str]) -> int:
    parser = Parser(
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

    from ..downstream import datasets, small_tasks

    names, known = list(dict.fromkeys(arguments.names)), [*small_tasks.TASKS, *datasets.READERS]
    for name in names:
        if name not in known:
            unknown("task", name, known, f"known are {', '.join(known)}")
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
    from ..downstream import datasets

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
    from ..data import corpus
    from ..downstream import small_tasks

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
    run = f"--checkpoint runs/frame --out {shlex.quote(f'runs/{manifest.stem}')}"
    return f"Next: {PROGRAM} {verb} --data {shlex.quote(str(manifest))}{where} {run}"


def _task_options(command: str, argv: Sequence[str], of: type, description: str, examples: Sequence[str]) -> Any:
    """Options of the dataclass ``of``; what is not given is the preset's, else the default."""
    from ..downstream.options import FINETUNE_PRESETS, FinetuneOptions, ProbeOptions

    parser = Parser(command, description, examples)
    texts = {**docstring_help(ProbeOptions), **docstring_help(of)}
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        hint = hints[field.name]
        kind = next(part for part in (*typing.get_args(hint), hint) if part is not type(None))
        required = field.default is dataclasses.MISSING
        default = "" if required or field.default is None else f" (default: {field.default})"
        shown = {"data": "TABLE", **dict.fromkeys(("checkpoint", "out", "root", "cache"), "DIR")}.get(field.name)
        flag = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": shown or metavar(kind)}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            required=required,
            default=argparse.SUPPRESS,
            help=texts[field.name] + ("" if kind is bool else default),
            **flag,
        )
    if of is FinetuneOptions:
        names = ", ".join(FINETUNE_PRESETS)
        parser.add_argument("--preset", metavar="NAME", help=f"settings of the paper's tasks: {names}; options win")
    given = vars(parser.read(argv))
    preset = given.pop("preset", None)
    if preset is not None and preset not in FINETUNE_PRESETS:
        unknown("preset", preset, FINETUNE_PRESETS, f"presets are {', '.join(FINETUNE_PRESETS)}")
    return of(**{**FINETUNE_PRESETS.get(preset, {}), **given})


def run_finetune(argv: Sequence[str]) -> int:
    from ..downstream.options import FinetuneOptions

    options = _task_options(
        "finetune",
        argv,
        FinetuneOptions,
        "Trains a pretrained encoder and a linear layer on labelled audio, and tests it: once for each fold where the "
        "manifest has folds, and the mean is told. --out gets summary.json, predictions.csv, confusion.png (of several "
        "labels average_precision.png), learning.png, and the classifier that predict uses. A run that was stopped "
        "goes on with the same command.",
        (
            "--data esc14.tsv --checkpoint runs/frame --out runs/esc14",
            "--data ks2.tsv --root speech_commands/ --checkpoint runs/base --out runs/ks2 --preset ks2",
        ),
    )
    from ..downstream import finetune

    print(task_summary(finetune.finetune(options), options.out))
    return 0


def run_probe(argv: Sequence[str]) -> int:
    from ..downstream.options import ProbeOptions

    options = _task_options(
        "probe",
        argv,
        ProbeOptions,
        "Logistic regression on the mean of a frozen encoder's tokens: what the features hold, in a minute. Beside it "
        "the same on the mean log-mel spectrum. Manifests and --out as for finetune; frame-level ones too.",
        (
            "--data esc14.tsv --checkpoint runs/frame --out runs/esc14_probe",
            "--data a.csv --checkpoint runs/base --out runs/a --layer 3 --pool bands",
        ),
    )
    from ..downstream import probe

    print(task_summary(probe.probe(options), options.out))
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
        lines.append(f"  always the commonest class of the training clips: accuracy {summary['majority_accuracy']:.4f}")
    if other := summary.get("log_mel_baseline"):
        a, b = other["difference_ci95"]
        lines.append(
            f"  the same on the mean log-mel spectrum: {other['value']:.4f}; "
            f"{other['difference']:+.4f} ({a:+.4f} to {b:+.4f}) by the encoder"
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
    parser = Parser(
        "predict",
        "Classes of audio files by a classifier that finetune or probe made. Files that give no audio are named and "
        "skipped, and the exit code is then 1.",
        ("talk.wav --checkpoint runs/esc14", "recordings/ --checkpoint runs/esc14 --out predictions.csv"),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, folders, or fairseq .tsv manifests")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder of finetune or probe")
    parser.add_argument("--out", metavar="CSV", help="a table of all probabilities (default: none)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print (default: 3)")
    add_device(parser)
    arguments = parser.read(argv)
    if arguments.top < 1:
        parser.error(f"--top must be at least 1, got {arguments.top}")
    if arguments.out and Path(arguments.out).is_dir():
        parser.error(f"--out is the table to write, got the folder {arguments.out}")

    from ..data.audio import AudioError
    from ..devices import pick_device
    from ..downstream.classifier import AudioClassifier, write_predictions

    classifier = AudioClassifier.from_pretrained(arguments.checkpoint).to(pick_device(arguments.device))
    skipped, rows = SkipLog(), []
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
