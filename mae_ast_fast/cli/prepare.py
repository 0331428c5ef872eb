"""The command prepare."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

from .parser import CommandError, Parser


def run_prepare(argv: Sequence[str]) -> int:
    parser = Parser(
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

    from ..data import corpus, prepare
    from ..data import npy as npy_module

    tell = functools.partial(print, file=sys.stderr, flush=True)
    try:
        if npy:
            report = npy_module.prepare_npy(source, npy, **given, progress=tell)
            print(
                f"{npy}: {report.clips} clips, {report.seconds / 60:.1f} minutes, {report.num_bytes / 1e6:.2f} MB; "
                f"{len(report.skipped)} files skipped, {report.left_out} of {report.files} left out because the size "
                "was reached"
            )
            return 0
        split = None
        if source is None:
            source, split = prepare.default_entries(tell), corpus.held_out
    except corpus.CorpusError as error:
        raise CommandError(str(error)) from error
    given = {"codec": given.pop("format", "wav"), "workers": os.cpu_count() or 1, **given}
    found = prepare.prepare_shards(source, out, split=split, **given)
    size = sum(size for _, size in found["shards"]) / 1e6
    print(
        f"{out}: {found['clips']} of {found['files']} clips, {found['hours']:.2f} hours, {size:,.1f} MB in "
        f"{len(found['shards'])} shards; {found['split']}; report in {out.rstrip('/')}.report.json"
    )
    return 0
