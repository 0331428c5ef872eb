"""The commands ``doctor``, ``bench``, ``kernels`` and ``tune``."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Sequence

from .parser import CHECKPOINT_HELP, CommandError, Parser, print_report


def run_doctor(argv: Sequence[str]) -> int:
    """Report versions, devices and the largest batch. Returns the exit code."""
    parser = Parser(
        "doctor",
        "Reports versions, devices, the implementation of each operation and the attention backend that a model will "
        "use on this machine, with the reason, and the largest training batch of 10-second clips. Runs a few small "
        "training steps to measure the batch.",
        ("", "--preset patch_tiny --json"),
    )
    parser.add_argument(
        "--preset",
        default="patch_base",
        metavar="NAME",
        help="model size to report on: {patch,frame}_{base,base_6layer,small,tiny} (default: patch_base)",
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="report on this model instead: " + CHECKPOINT_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    arguments = parser.read(argv)

    from ..tools import doctor

    report = doctor.examine(arguments.preset, arguments.checkpoint)
    print_report(report, doctor.to_text, arguments.json)
    return 0


def run_bench(argv: Sequence[str]) -> int:
    """Time training steps. Returns the exit code."""
    parser = Parser(
        "bench",
        "Times training steps on this machine, in about a minute. Plain PyTorch, this library and SSAST, whose encoder "
        "also runs over masked tokens, take turns. The model is the largest whose rounds fit into the time.",
        ("", "--preset patch_small --clips 8 --json"),
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="{patch,frame}_{base,small,tiny} (default: the largest that fits)"
    )
    parser.add_argument("--clips", type=int, metavar="N", help="10-second clips per batch (default: CPU 4, GPU 64)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default: auto)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="approximate total time in seconds (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every round")
    arguments = parser.read(argv)

    from ..tools import bench

    report = bench.bench(
        arguments.preset,
        arguments.clips,
        arguments.device,
        seconds=arguments.seconds,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )
    print_report(report, bench.to_text, arguments.json)
    return 0


def run_kernels(argv: Sequence[str]) -> int:
    """Compile all kernels and report their costs. Returns the exit code: 1 if there are problems."""
    parser = Parser(
        "kernels",
        "Compiles every Triton kernel ahead of time, without a GPU, and reports registers, spills, shared memory, "
        "matrix instructions and occupancy. Compiles only kernels that changed since the last call. The exit code is 1 "
        "if a kernel does not compile, needs more shared memory than the architecture has, or spills more than "
        "kernels/spill_allowlist.py allows. A failure to compile for gfx942 counts only with --arch gfx942.",
        ("--op add_layer_norm --arch sm_90", "--dump add_layer_norm._forward --arch sm_90,sm_100 --out dump/"),
    )
    parser.add_argument(
        "--arch", metavar="NAMES", help="sm_80, sm_90, sm_100 or gfx942, comma-separated (default: all)"
    )
    parser.add_argument(
        "--op", metavar="NAMES", help="operations, comma-separated, named as the files in kernels/ (default: all)"
    )
    parser.add_argument(
        "--dump",
        metavar="NAME",
        help='compile only variants with NAME in "op.kernel variant arch", and write their PTX and SASS (gfx942: '
        "assembly)",
    )
    parser.add_argument("--out", default="kernel_dump", metavar="DIR", help="folder for --dump (default: kernel_dump)")
    parser.add_argument("--no-cache", action="store_true", help="compile everything, and do not store the results")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.read(argv)

    from ..tools import kernel_report

    def stop(*_: object) -> None:  # as Ctrl-C: stops the compilers and removes temporary files
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} compiled", end="" if done < total else "\n", file=sys.stderr, flush=True)

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
    print_report(report, kernel_report.to_text, arguments.json)
    return 1 if report["problems"] else 0


def run_tune(argv: Sequence[str]) -> int:
    """Time kernel launches and write the launch table. Returns the exit code: 1 if --check finds a faster launch."""
    parser = Parser(
        "tune",
        "Times every kernel on this machine's GPU with other launches (tiles, programs, warps, stages) and writes the "
        "fastest to kernels/configs/ARCHITECTURE.json, for review and commit like code. Writes the file after each "
        "operation, so that a run can be stopped at any time.",
        ("--op add_layer_norm,bias_gelu", "--dtype fp32 --check"),
    )
    parser.add_argument(
        "--op", metavar="NAMES", help="operations, comma-separated, named as the files in kernels/ (default: all)"
    )
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="bf16 (also for fp16) or fp32 (default: bf16)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit code is 1 if another launch is faster"
    )
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
