"""The command prepare."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import cast

from .parser import CommandError, Parser


def run_prepare(argv: Sequence[str]) -> int:
    """Decode audio into shards or arrays. Returns the exit code."""
    parser = Parser(
        "prepare",
        "Decodes audio once, to 16 kHz mono. --out writes Lhotse Shar shards for pretrain --data, from sources of any "
        "size. If it is killed, the same command resumes; DIR appears when it is complete. DIR.report.json lists what "
        "was found and skipped. --npy writes two arrays, up to a given size, that need no audio library to read: "
        "FILE.npy holds all samples, clip after clip, and FILE.lengths.npy the number of samples per clip; "
        "numpy.split(samples, lengths.cumsum()[:-1]) gives the clips. Files without usable audio are named and "
        "skipped.",
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
    target.add_argument("--out", metavar="DIR", help="folder of shards to write")
    target.add_argument("--npy", metavar="FILE", help="file to write; must end in .npy")
    shards = parser.add_argument_group("with --out")
    shards.add_argument(
        "--format", choices=("wav", "flac"), help="codec in the shards (default: wav, the fastest to read)"
    )
    shards.add_argument(
        "--workers", type=int, metavar="N", help=f"processes that decode (default: one per CPU core, {os.cpu_count()})"
    )
    shards.add_argument(
        "--min-seconds",
        type=float,
        metavar="S",
        help="skip clips shorter than S seconds (default: 0.3; pretrain skips those under 0.4 by default)",
    )
    arrays = parser.add_argument_group("with --npy")
    arrays.add_argument(
        "--seconds", type=float, metavar="S", help="take the first S seconds of longer files (default: 10)"
    )
    arrays.add_argument(
        "--max-mb", type=float, metavar="X", help="maximum size of both files together, in 10^6 bytes (default: 30)"
    )
    arrays.add_argument("--seed", type=int, metavar="N", help="seed of the order of files (default: 0)")
    arguments = parser.read(argv)
    source, out, npy = arguments.source, arguments.out, arguments.npy
    options = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {name: value for name, value in options.items() if name not in ("source", "out", "npy")}
    allowed = ("format", "workers", "min_seconds") if out else ("seconds", "max_mb", "seed")
    for name in options:
        if name not in allowed:
            parser.error(f"--{name.replace('_', '-')} does not go with {'--out' if out else '--npy'}")

    from ..data import corpus, prepare
    from ..data import npy as npy_module

    progress = functools.partial(print, file=sys.stderr, flush=True)
    try:
        if npy:
            report = npy_module.prepare_npy(source, npy, **options, progress=progress)
            print(
                f"{npy}: {report.clips} clips, {report.seconds / 60:.1f} minutes, {report.num_bytes / 1e6:.2f} MB; "
                f"{len(report.skipped)} files skipped, {report.left_out} of {report.files} left out because the size "
                "was reached"
            )
            return 0
        split: prepare.Split | None = None
        if source is None:
            source = prepare.default_entries(progress)
            split = cast("prepare.Split", corpus.held_out)  # the default entries are CorpusClips
    except corpus.CorpusError as error:
        raise CommandError(str(error)) from error
    options = {"codec": options.pop("format", "wav"), "workers": os.cpu_count() or 1, **options}
    summary = prepare.prepare_shards(source, out, split=split, **options)
    megabytes = sum(size for _, size in summary["shards"]) / 1e6
    print(
        f"{out}: {summary['clips']} of {summary['files']} clips, {summary['hours']:.2f} hours, {megabytes:,.1f} MB in "
        f"{len(summary['shards'])} shards; {summary['split']}; report in {out.rstrip('/')}.report.json"
    )
    return 0
