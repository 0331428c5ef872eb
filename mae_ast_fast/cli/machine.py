"""``doctor``, ``bench``, and for kernels ``kernels`` and ``tune``."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Sequence

from .parser import CHECKPOINT_HELP, CommandError, Parser, tell_report


def run_doctor(argv: Sequence[str]) -> int:
    parser = Parser(
        "doctor",
        "Says what this machine has: versions, devices, which implementation of each operation and which attention the "
        "model will use and why, and the largest batch of 10-second clips that fits in training. Runs a few small "
        "training steps for that.",
        ("", "--preset patch_tiny --json"),
    )
    parser.add_argument("--preset", default="patch_base", metavar="NAME", help="model sizes (default: patch_base)")
    parser.add_argument("--checkpoint", metavar="DIR", help="sizes of this one instead: " + CHECKPOINT_HELP)
    parser.add_argument("--json", action="store_true", help="for programs: sizes in bytes")
    arguments = parser.read(argv)

    from ..tools import doctor

    report = doctor.examine(arguments.preset, arguments.checkpoint)
    tell_report(report, doctor.to_text, arguments.json)
    return 0


def run_bench(argv: Sequence[str]) -> int:
    parser = Parser(
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

    from ..tools import bench

    report = bench.bench(
        arguments.preset,
        arguments.clips,
        arguments.device,
        seconds=arguments.seconds,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )
    tell_report(report, bench.to_text, arguments.json)
    return 0


def run_kernels(argv: Sequence[str]) -> int:
    parser = Parser(
        "kernels",
        "Compiles every Triton kernel ahead of time, without a GPU, and says what it costs: registers, spills, shared "
        "memory, matrix instructions, occupancy. Only what changed since the last time is compiled. The exit code is 1 "
        "where a kernel does not compile, asks for more shared memory than the architecture has, or spills more than "
        "kernels/spill_allowlist.py allows; that a kernel does not compile for gfx942 counts only with --arch gfx942.",
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

    from ..tools import kernel_report

    def stop(*_: object) -> None:  # as Ctrl-C: compilers are stopped, temporary files removed
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} compiled", end="" if done < of else "\n", file=sys.stderr, flush=True)

    try:
        report = kernel_report.collect(
            archs=None if arguments.arch is None else arguments.arch.split(","),
            ops=None if arguments.op is None else arguments.op.split(","),
            dump=arguments.dump,
            out=arguments.out,
            cache=not arguments.no_cache,
            progress=progress,
        )
    except kernel_report.Unavailable as error:
        raise CommandError(str(error)) from error
    tell_report(report, kernel_report.to_text, arguments.json)
    return 1 if report["problems"] else 0


def run_tune(argv: Sequence[str]) -> int:
    parser = Parser(
        "tune",
        "Times every kernel on this machine's GPU with other launches (tiles, programs, warps, stages) and writes rows "
        "of its architecture into kernels/common/configs.py, to be reviewed and committed like code. After each "
        "operation the table is written, so that a run may be stopped.",
        ("--op add_layer_norm,bias_gelu", "--dtype fp32 --check"),
    )
    parser.add_argument("--op", metavar="NAMES", help="operations, as the files in kernels/ (default: all)")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="bf16 (also for fp16) or fp32 (default: bf16)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where another is faster")
    arguments = parser.read(argv)

    from ..tools import tune

    groups = tune.tune(
        None if arguments.op is None else arguments.op.split(","),
        arguments.dtype,
        check=arguments.check,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )
    print(tune.to_text(groups))
    return int(arguments.check and any(group.best != group.present for group in groups))
