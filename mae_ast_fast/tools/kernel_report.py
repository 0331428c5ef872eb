"""Report the resources that the Triton kernels use on each architecture, compiled ahead of time without a GPU.

The variants of a kernel come from ``examples`` of its module in ``mae_ast_fast.kernels``, or from its ``CASE``.
``kernels/common/launch.py`` records their launches instead of making them. Triton's own JIT code computes signatures
and attributes, so this compiles what a launch would compile. Each kernel is compiled in a separate process, because a
compiler may abort. The figures are cached under a hash of everything that they depend on.

Figures: registers per thread; spilled bytes per thread, stored and loaded (``ptxas -v``; on AMD four bytes per spilled
VGPR); shared memory per block; matrix instruction in the machine code; occupancy (see ``occupancy``); bytes per row:
the sizes of all tensor arguments, divided by the number of rows that the example gives.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import pkgutil
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import __version__
from ..ops import cases
from .cores import usable_cores
from .kernel_compiler import (
    cache_key,
    compile_kernels,
    compiler_backend,
    first_lines,
    read_cache,
    specialised,
    write_cache,
)
from .kernel_hardware import ARCHS, TENSOR_MEMORY, occupancy


class Unavailable(RuntimeError):
    """Kernels cannot be compiled on this machine."""


# -------------------------------------------------------------------------------------------------------- variants


@dataclasses.dataclass
class Variant:
    """One launch of an example: a line of the report, and the input of Triton's compiler."""

    op: str
    kernel: str
    variant: str
    arch: str
    dtype: str
    width: int
    bytes_per_row: float
    key: str
    source: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-2]}


_POSITION = ("op", "kernel", "variant", "arch")


def _problem(kind: str, message: str, **position: str) -> dict[str, str]:
    return {"kind": kind, **{name: position.get(name, "") for name in _POSITION}, "message": message}


def _position(row: dict[str, Any]) -> dict[str, str]:
    return {name: row[name] for name in _POSITION}


def _title(row: dict[str, Any]) -> str:
    """Title of a row or problem: "op.kernel variant arch" without empty fields."""
    kernel = ".".join(filter(None, (row["op"], row["kernel"])))
    return " ".join(filter(None, (kernel, row["variant"], row["arch"])))


def _modules(ops: Sequence[str] | None, problems: list[dict[str, str]]) -> dict[str, ModuleType]:
    """Operation -> module, for those in ``ops`` (None: all) that have examples."""
    from .. import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    modules, import_problems = {}, []
    for name in names:
        try:
            module = importlib.import_module(f"{kernels.__name__}.{name}")
        except Exception as error:  # a file that is being edited must not hide the others
            import_problems.append(_problem("import", f"cannot be imported: {first_lines(error)}", op=name))
            continue
        if row_widths(module):
            modules[name] = module
    names_with_examples = sorted([*modules, *(problem["op"] for problem in import_problems)])
    if unknown := [op for op in ops or () if op not in names_with_examples]:
        raise ValueError(f"operations must be among {', '.join(names_with_examples)}, got {', '.join(unknown)}")
    problems += [problem for problem in import_problems if ops is None or problem["op"] in ops]
    return {op: module for op, module in modules.items() if ops is None or op in ops}


def row_widths(module: ModuleType) -> Sequence[int]:
    """Row widths of a kernel module's examples; empty: it has none."""
    case = getattr(module, "CASE", None)
    return getattr(module, "WIDTHS", case.widths if case else ())


def examples_of(module: ModuleType) -> Callable[..., Iterator[tuple[str, int, Callable[[], object]]]]:
    """A kernel module's ``examples``, or those of its ``CASE``."""
    return getattr(module, "examples", None) or functools.partial(cases.examples, module.CASE)


def _variants(op: str, module: ModuleType, arch: str, problems: list[dict[str, str]]) -> list[Variant]:
    """Launches of all examples: bf16 at all widths, fp16 and fp32 at the last; fp32 only for kernels without one."""

    def launches(dtype: torch.dtype, width: int) -> list[Variant]:
        return list(_launches(op, module, arch, dtype=dtype, width=width, problems=problems))

    main_dtype, widths = torch.bfloat16, row_widths(module)
    variants = [variant for width in widths for variant in launches(main_dtype, width)]
    if variants:
        variants += launches(torch.float16, widths[-1]) + launches(torch.float32, widths[-1])
    else:  # masks, for example, have no dtype
        main_dtype = torch.float32
        variants = [variant for width in widths for variant in launches(main_dtype, width)]
    return variants


def _launches(
    op: str,
    module: ModuleType,
    arch: str,
    *,
    dtype: torch.dtype,
    width: int,
    problems: list[dict[str, str]],
) -> Iterator[Variant]:
    """Launches of the examples of one dtype and width."""
    from ..kernels.common.launch import record

    dtype_name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    repeats: Counter[tuple[str, str]] = Counter()
    try:
        for label, rows, call in examples_of(module)(dtype, width):
            with record(arch) as recorder:
                call()
            if not recorder.launches:
                raise RuntimeError(f"the example {label!r} launches nothing")
            for function, arguments, constants in recorder.launches:
                kernel, variant = function.fn.__name__, " ".join(f"{label} {dtype_name} {width}".split())
                repeats[kernel, variant] += 1
                if (count := repeats[kernel, variant]) > 1:
                    variant += f" #{count}"
                source = specialised(function, arguments, constants, arch)
                yield Variant(
                    op=op,
                    kernel=kernel,
                    variant=variant,
                    arch=arch,
                    dtype=dtype_name,
                    width=width,
                    bytes_per_row=_tensor_bytes(arguments) / rows,
                    key=cache_key(source),
                    source=source,
                )
    except Exception as error:  # an error of a wrapper concerns its operation only
        message = f"examples({dtype_name}, {width}) fails: {first_lines(error)}"
        problems.append(_problem("examples", message, op=op, arch=arch))


def _tensor_bytes(arguments: Sequence[Any]) -> int:
    """Bytes of the tensor arguments of a launch; repeated elements of an expanded tensor count once."""
    total = 0
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            total += math.prod(size for size, stride in sizes if stride) * tensor.element_size()
    return total


# ------------------------------------------------------------------------------------------------------- the report


def collect(
    archs: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    *,
    dump: str | None = None,
    out: str | os.PathLike = "kernel_dump",
    cache: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Compile the kernels that are not in the cache, and check all figures.

    Args:
        archs: Names in ``ARCHS``. None: all, and a kernel that does not compile for gfx942 is a note, not a problem.
        ops: Modules of ``mae_ast_fast.kernels``. None: all that have ``examples``.
        dump: Compile only variants with this text in "op.kernel variant arch", without the cache, and write their PTX
            and SASS (gfx942: assembly) to ``out``. None: write nothing.
        out: Folder for ``dump``.
        cache: Whether to read and write figures in the cache folder.
        progress: Called with the number of compiled kernels and the number of kernels to compile.

    Returns:
        ``rows`` (one dict per variant and architecture), ``problems`` and ``notes`` (kind, op, kernel, variant, arch,
        message), ``files`` that ``dump`` wrote, ``compiled`` and ``cached`` (numbers of kernels), ``versions``.

    Raises:
        ValueError: An architecture or operation is unknown, or no variant matches ``dump``.
        Unavailable: Triton is not installed, or its interpreter is on.
        OSError: The cache or ``out`` cannot be written.
    """
    if unknown := [arch for arch in archs or () if arch not in ARCHS]:
        raise ValueError(f"architectures must be among {', '.join(ARCHS)}, got {', '.join(unknown)}")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("compiling kernels needs the package triton, which is not installed (available for Linux)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise Unavailable("TRITON_INTERPRET is set, but kernels cannot be compiled under the interpreter: unset it")
    from ..kernels import spill_allowlist as allowlist

    problems: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []

    def add_problem(arch: str, problem: dict[str, str]) -> None:
        (problems if archs is not None or ARCHS[arch].required else notes).append(problem)

    archs_here = []
    for arch in ARCHS if archs is None else archs:
        if compiler_backend(arch):
            archs_here.append(arch)
        else:
            add_problem(arch, _problem("backend", "this Triton version does not compile for it", arch=arch))
    modules = _modules(ops, problems)
    variants = [
        variant
        for arch in archs_here
        for op, module in modules.items()
        for variant in _variants(op, module, arch, problems)
    ]
    if dump is not None:
        variants = [variant for variant in variants if dump in _title(variant.row)]
        if not variants:
            raise ValueError(f'nothing to dump: expected a part of "op.kernel variant arch", got {dump!r}')
    results, compiled, files = _results(variants, cache, None if dump is None else Path(out), progress)

    rows = []
    for variant in variants:
        figures = results[variant.key]
        if "error" in figures:
            message = f"does not compile: {figures['error']}"
            add_problem(variant.arch, _problem("compile", message, **_position(variant.row)))
            continue
        shares = {name: figures[name] for name in ("registers", "shared", "warps", "tensor_memory")}
        rows.append({**variant.row, **figures, "occupancy": occupancy(variant.arch, **shares)})
    broken = {problem["op"] for problem in (*problems, *notes)}  # their spills are unknown
    allowed = [
        entry
        for entry in allowlist.ALLOWED
        if entry.arch in archs_here
        and (ops is None or entry.kernel.partition(".")[0] in ops)
        and (dump is None or dump in f"{entry.kernel} {entry.variant} {entry.arch}")
    ]
    versions = _versions()
    row_problems = check(rows, allowed, broken)
    if versions["triton"].split(".")[:2] != allowlist.TRITON.split("."):
        allowlist_kinds = {"spill", "allowed"}
        mismatch = f"triton {versions['triton']}, kernels/spill_allowlist.py is for {allowlist.TRITON}"
        for problem in row_problems:
            if problem["kind"] in allowlist_kinds:
                notes.append({**problem, "message": f"{problem['message']} ({mismatch})"})
        row_problems = [problem for problem in row_problems if problem["kind"] not in allowlist_kinds]
    problems += row_problems
    return {
        "rows": rows,
        "problems": problems,
        "notes": notes,
        "files": [str(path) for path in files],
        "compiled": compiled,
        "cached": len(results) - compiled,
        "versions": versions,
    }


def _results(
    variants: Sequence[Variant], cache: bool, out: Path | None, progress: Callable[[int, int], object]
) -> tuple[dict[str, dict[str, Any]], int, list[Path]]:
    """Key -> figures, cached or compiled; number of compiled kernels; files written to ``out``."""
    from ..data.corpus import default_cache

    folder = default_cache() / "kernels"
    results, sources = {}, {}
    for variant in variants:
        listing_path = None if out is None else out / re.sub(r"[^\w.#-]+", "-", _title(variant.row))
        figures = read_cache(folder, variant.key) if cache and out is None else None
        if figures is None:
            sources[variant.key] = variant.source, listing_path
        else:
            results[variant.key] = figures
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    store = functools.partial(write_cache, folder) if cache else lambda results: None
    compiled = compile_kernels(sources, usable_cores(), progress, store)
    listing_paths = [path for _, path in sources.values() if path]
    files = [file for path in listing_paths for file in sorted(path.parent.glob(f"{path.name}.*"))]
    return results | compiled, len(compiled), files


def check(rows: Sequence[dict[str, Any]], allowed: Sequence[Any], broken: Collection[str] = ()) -> list[dict[str, str]]:
    """Problems: kernels that cannot be launched, spills above the allow list, entries of the list without a spill.

    Args:
        rows: Rows of the report. A row with an allowed spill gets the reason as its field ``allowed``.
        allowed: Entries of kernels/spill_allowlist.py.
        broken: Operations whose rows are incomplete. Their entries are not reported as unused.
    """
    problems = []
    entries = {(entry.kernel, entry.variant, entry.arch): entry for entry in allowed}
    spilled_bytes = dict.fromkeys(entries, None)
    for row in rows:
        limit = ARCHS[row["arch"]].block_shared
        if row["shared"] > limit:
            message = f"needs {row['shared']} bytes of shared memory, a block on {row['arch']} has {limit}"
            problems.append(_problem("shared", message, **_position(row)))
        if row["tensor_memory"] > TENSOR_MEMORY:
            message = f"needs {row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY}"
            problems.append(_problem("tensor_memory", message, **_position(row)))
        entry = (f"{row['op']}.{row['kernel']}", row["variant"], row["arch"])
        allowed_bytes = entries[entry].bytes if entry in entries else 0
        if entry in entries:
            spilled_bytes[entry] = row["spill"]
        if row["spill"] > allowed_bytes:
            allowance = f", kernels/spill_allowlist.py allows {allowed_bytes}" if allowed_bytes else ""
            problems.append(_problem("spill", f"spills {row['spill']} bytes{allowance}", **_position(row)))
        elif row["spill"]:
            row["allowed"] = entries[entry].reason
    for (name, variant, arch), num_bytes in spilled_bytes.items():
        op, _, kernel = name.partition(".")
        if not num_bytes and op not in broken:
            reason = "no such variant" if num_bytes is None else "no longer spills"
            message = f"{reason}: remove the entry from kernels/spill_allowlist.py"
            problems.append(_problem("allowed", message, op=op, kernel=kernel, variant=variant, arch=arch))
    return problems


def _versions() -> dict[str, str]:
    import triton
    from triton import knobs

    def ptxas(tool: Any) -> str:
        return re.sub(r".*release ([\d.]+).*", r"\1", getattr(tool, "version", ""))

    return {
        "mae_ast_fast": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas(knobs.nvidia.ptxas),
        "ptxas_blackwell": ptxas(knobs.nvidia.ptxas_blackwell),
        "python": platform.python_version(),
    }


_CELLS = "  {:<7}{:>5}{:>7}{:>9}{:>6}{:>7}  {:<13}{:>4}{:>11}"


def to_text(report: dict[str, Any]) -> str:
    """The report as text: one block per kernel, then notes and problems."""
    kinds = {_title(problem): problem["kind"] for problem in report["problems"]}
    blocks: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        blocks.setdefault((row["op"], row["kernel"]), {}).setdefault(row["variant"], []).append(row)
    label_width = max((len(row["variant"]) for row in report["rows"]), default=0) + 2
    lines = []
    for (op, kernel), row_groups in sorted(blocks.items()):
        heading = _CELLS.format("arch", "regs", "spill", "shared", "warps", "stages", "matrix", "occ", "bytes/row")
        lines += [f"{op}.{kernel}".ljust(label_width) + heading]
        for row in (row for rows in row_groups.values() for row in rows):
            cells = _CELLS.format(
                row["arch"],
                row["registers"],
                row["spill"],
                row["shared"],
                row["warps"],
                row["stages"],
                row["matrix"],
                f"{row['occupancy']:.0%}",
                f"{row['bytes_per_row']:,.0f}",
            )
            mark = f"  <- {kinds[_title(row)]}" if _title(row) in kinds else "  allowed" if "allowed" in row else ""
            lines.append(f"  {row['variant']}".ljust(label_width) + cells + mark)
        lines.append("")
    lines += [
        "regs: registers per thread; spill: bytes stored and loaded per thread; shared: bytes per block; occ: share of",
        "a multiprocessor's warp slots in use (occupancy); bytes/row: size of the tensor arguments per row.",
    ]
    for title, listed in (
        ("Notes (they do not fail the command):", report["notes"]),
        ("Problems:", report["problems"]),
    ):
        if listed:
            lines += ["", title]
            for problem in listed:
                lines.append(textwrap.indent(f"{_title(problem)}: {problem['message']}", "    ")[2:])
    if report["files"]:
        lines += ["", "Wrote:", *(f"  {path}" for path in report["files"])]
    num_variants = len({(row["op"], row["kernel"], row["variant"]) for row in report["rows"]})
    archs = ", ".join(dict.fromkeys(row["arch"] for row in report["rows"])) or "no architecture"
    problems = report["problems"]
    verdict = f"{_count(len(problems), 'problem')}, exit code 1" if problems else "no problem"
    lines += [
        "",
        f"{_count(len(blocks), 'kernel')} in {_count(num_variants, 'variant')} for {archs}: "
        f"{report['compiled']} compiled, {report['cached']} from the cache; {verdict}",
    ]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
