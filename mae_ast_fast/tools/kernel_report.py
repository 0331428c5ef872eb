"""What the Triton kernels cost on each architecture, compiled ahead of time: no GPU is needed.

Every module of ``mae_ast_fast.kernels`` with ``examples`` is asked for its variants, whose launches
``kernels/common/launch.py`` records instead of making them. Signatures and attributes are worked out by Triton's own
JIT code, so what is compiled here is what a launch would compile. Each compilation runs in a process of its own (a
compiler that aborts takes nothing with it), and its figures are kept in the cache folder under all that they depend on.

Figures: registers of a thread; spilled bytes, stored and loaded, of a thread (``ptxas -v``; on AMD four bytes a spilled
VGPR); shared memory of a block; the matrix instruction in the machine code; occupancy (see ``occupancy``); bytes a row:
the tensors passed to the kernel, each argument once, over the rows that the example names.
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
    """Kernels cannot be compiled here."""


# ------------------------------------------------------------------------------------------------ what is compiled


@dataclasses.dataclass
class Variant:
    """One launch of an example: a line of the report, and what Triton needs to compile it."""

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


_PLACE = ("op", "kernel", "variant", "arch")


def _problem(kind: str, message: str, **place: str) -> dict[str, str]:
    return {"kind": kind, **{name: place.get(name, "") for name in _PLACE}, "message": message}


def _at(row: dict[str, Any]) -> dict[str, str]:
    return {name: row[name] for name in _PLACE}


def _title(row: dict[str, Any]) -> str:
    """Of a row or a problem: "op.kernel variant arch", less what is empty."""
    kernel = ".".join(filter(None, (row["op"], row["kernel"])))
    return " ".join(filter(None, (kernel, row["variant"], row["arch"])))


def _modules(ops: Sequence[str] | None, problems: list[dict[str, str]]) -> dict[str, ModuleType]:
    """Operation -> module, of those in ``ops`` (None: all) that have ``examples``."""
    from .. import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    found, broken = {}, []
    for name in names:
        try:
            module = importlib.import_module(f"{kernels.__name__}.{name}")
        except Exception as error:  # a file in the middle of an edit must not hide the others
            broken.append(_problem("import", f"cannot be imported: {first_lines(error)}", op=name))
            continue
        if hasattr(module, "examples"):
            found[name] = module
    known = sorted([*found, *(problem["op"] for problem in broken)])
    if unknown := [op for op in ops or () if op not in known]:
        raise ValueError(f"operations must be among {', '.join(known)}, got {', '.join(unknown)}")
    problems += [problem for problem in broken if ops is None or problem["op"] in ops]
    return {op: module for op, module in found.items() if ops is None or op in ops}


def _variants(op: str, module: ModuleType, arch: str, problems: list[dict[str, str]]) -> list[Variant]:
    """The launches of every example: bf16 for all widths, fp16 and fp32 for the last; fp32 alone without dtypes."""

    def launches(dtype: torch.dtype, width: int) -> list[Variant]:
        return list(_launches(op, module, arch, dtype=dtype, width=width, problems=problems))

    main, widths = torch.bfloat16, module.WIDTHS
    found = [variant for width in widths for variant in launches(main, width)]
    if found:
        found += launches(torch.float16, widths[-1]) + launches(torch.float32, widths[-1])
    else:  # as for masks, which have no dtype
        main = torch.float32
        found = [variant for width in widths for variant in launches(main, width)]
    return found


def _launches(
    op: str,
    module: ModuleType,
    arch: str,
    dtype: torch.dtype,
    width: int,
    problems: list[dict[str, str]],
) -> Iterator[Variant]:
    """The launches of the examples of one dtype and width."""
    from ..kernels.common.launch import record

    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    seen: Counter[tuple[str, str]] = Counter()
    try:
        for label, rows, call in module.examples(dtype, width):
            with record(arch) as recorder:
                call()
            if not recorder.launches:
                raise RuntimeError(f"the example {label!r} launches nothing")
            for function, arguments, constants in recorder.launches:
                kernel, variant = function.fn.__name__, " ".join(f"{label} {short} {width}".split())
                seen[kernel, variant] += 1
                if (count := seen[kernel, variant]) > 1:
                    variant += f" #{count}"
                source = specialised(function, arguments, constants, arch)
                yield Variant(
                    op, kernel, variant, arch, short, width, _bytes(arguments) / rows, cache_key(source), source
                )
    except Exception as error:  # whatever a wrapper raises concerns its own operation alone
        message = f"examples({short}, {width}) fails: {first_lines(error)}"
        problems.append(_problem("examples", message, op=op, arch=arch))


def _bytes(arguments: Sequence[Any]) -> int:
    """Bytes of the tensors among a launch's arguments; what an expanded tensor repeats counts once."""
    total = 0
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            total += math.prod(size for size, stride in sizes if stride) * tensor.element_size()
    return total


# ------------------------------------------------------------------------------------------------------- the report


def examine(
    archs: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    dump: str | None = None,
    out: str | os.PathLike = "kernel_dump",
    cache: bool = True,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> dict[str, Any]:
    """Compiles the kernels that are not in the cache, and judges all.

    Args:
        archs: Names in ``ARCHS``. None: all; that a kernel does not compile for gfx942 is then a note, not a problem.
        ops: Modules of ``mae_ast_fast.kernels``. None: all that have ``examples``.
        dump: Only variants with this in "op.kernel variant arch", compiled anew with their PTX and SASS (gfx942: its
            assembly) written to ``out``.
        out: Folder for ``dump``.
        cache: Whether to read and write figures in the cache folder.
        progress: Called with what is compiled and what is to be.

    Returns:
        ``rows`` (a dict for each variant and architecture), ``problems`` and ``notes`` (kind, op, kernel, variant,
        arch, message), ``files`` that ``dump`` wrote, ``compiled`` and ``cached`` (numbers), ``versions``.

    Raises:
        ValueError: An unknown architecture or operation, or nothing to dump.
        Unavailable: No Triton, or Triton under its interpreter.
        OSError: The cache or the folder for ``dump`` cannot be written.
    """
    if unknown := [arch for arch in archs or () if arch not in ARCHS]:
        raise ValueError(f"architectures must be among {', '.join(ARCHS)}, got {', '.join(unknown)}")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("compiling kernels needs the package triton, which is not installed (it exists for Linux)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise Unavailable("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    from ..kernels import spill_allowlist as allowlist

    problems: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []

    def tell(arch: str, problem: dict[str, str]) -> None:
        (problems if archs is not None or ARCHS[arch].required else notes).append(problem)

    archs_here = []
    for arch in ARCHS if archs is None else archs:
        if compiler_backend(arch):
            archs_here.append(arch)
        else:
            tell(arch, _problem("backend", "this Triton does not compile for it", arch=arch))
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
            tell(variant.arch, _problem("compile", message, **_at(variant.row)))
            continue
        shares = {name: figures[name] for name in ("registers", "shared", "warps", "tensor_memory")}
        rows.append({**variant.row, **figures, "occupancy": occupancy(variant.arch, **shares)})
    broken = {told["op"] for told in (*problems, *notes)}  # of these it is not known what spills
    allowed = [
        entry
        for entry in allowlist.ALLOWED
        if entry.arch in archs_here
        and (ops is None or entry.kernel.partition(".")[0] in ops)
        and (dump is None or dump in f"{entry.kernel} {entry.variant} {entry.arch}")
    ]
    versions = _versions()
    found = judge(rows, allowed, broken)
    if versions["triton"].split(".")[:2] != allowlist.TRITON.split("."):
        listed = {"spill", "allowed"}
        other = f"triton {versions['triton']}, kernels/spill_allowlist.py is for {allowlist.TRITON}"
        notes += [{**told, "message": f"{told['message']} ({other})"} for told in found if told["kind"] in listed]
        found = [told for told in found if told["kind"] not in listed]
    problems += found
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
    """Key -> figures, from the cache or compiled; how many were compiled; the files written to ``out``."""
    from ..data.corpus import default_cache

    folder = default_cache() / "kernels"
    results, sources = {}, {}
    for variant in variants:
        place = None if out is None else out / re.sub(r"[^\w.#-]+", "-", _title(variant.row))
        figures = read_cache(folder, variant.key) if cache and out is None else None
        if figures is None:
            sources[variant.key] = variant.source, place
        else:
            results[variant.key] = figures
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    keep = functools.partial(write_cache, folder) if cache else lambda results: None
    fresh = compile_kernels(sources, usable, progress, keep)
    files = [file for _, place in sources.values() if place for file in sorted(place.parent.glob(f"{place.name}.*"))]
    return results | fresh, len(fresh), files


def judge(rows: Sequence[dict[str, Any]], allowed: Sequence[Any], broken: Collection[str] = ()) -> list[dict[str, str]]:
    """Problems: kernels that cannot be launched, spills that no entry allows, entries that allow nothing.

    Args:
        rows: Of the report. A row whose spill is allowed gets the reason as ``allowed``.
        allowed: Entries of kernels/spill_allowlist.py.
        broken: Operations of which rows are missing.
    """
    problems = []
    entries = {(entry.kernel, entry.variant, entry.arch): entry for entry in allowed}
    spilled = dict.fromkeys(entries, None)
    for row in rows:
        limit = ARCHS[row["arch"]].block_shared
        if row["shared"] > limit:
            message = f"needs {row['shared']} bytes of shared memory, a block on {row['arch']} has {limit}"
            problems.append(_problem("shared", message, **_at(row)))
        if row["tensor_memory"] > TENSOR_MEMORY:
            message = f"needs {row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY}"
            problems.append(_problem("tensor_memory", message, **_at(row)))
        entry = (f"{row['op']}.{row['kernel']}", row["variant"], row["arch"])
        cap = entries[entry].bytes if entry in entries else 0
        if entry in entries:
            spilled[entry] = row["spill"]
        if row["spill"] > cap:
            more = f", kernels/spill_allowlist.py allows {cap}" if cap else ""
            problems.append(_problem("spill", f"spills {row['spill']} bytes{more}", **_at(row)))
        elif row["spill"]:
            row["allowed"] = entries[entry].reason
    for (name, variant, arch), spill in spilled.items():
        op, _, kernel = name.partition(".")
        if not spill and op not in broken:
            why = "there is no such variant" if spill is None else "spills nothing any more"
            message = f"{why}: remove the entry from kernels/spill_allowlist.py"
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
    """The report as a table, a block for each kernel, with the problems once more at the end."""
    kinds = {_title(problem): problem["kind"] for problem in report["problems"]}
    blocks: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        blocks.setdefault((row["op"], row["kernel"]), {}).setdefault(row["variant"], []).append(row)
    wide = max((len(row["variant"]) for row in report["rows"]), default=0) + 2
    lines = []
    for (op, kernel), variants in sorted(blocks.items()):
        heading = _CELLS.format("arch", "regs", "spill", "shared", "warps", "stages", "matrix", "occ", "bytes/row")
        lines += [f"{op}.{kernel}".ljust(wide) + heading]
        for row in (row for rows in variants.values() for row in rows):
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
            lines.append(f"  {row['variant']}".ljust(wide) + cells + mark)
        lines.append("")
    lines += [
        "regs: of a thread; spill: bytes that a thread stores and loads; shared: bytes of a block; occ: share of a",
        "multiprocessor's warps that registers, shared memory and warps leave; bytes/row: of the tensors passed.",
    ]
    for title, found in (("Notes, which do not fail the command:", report["notes"]), ("Problems:", report["problems"])):
        if found:
            lines += ["", title]
            for problem in found:
                lines.append(textwrap.indent(f"{_title(problem)}: {problem['message']}", "    ")[2:])
    if report["files"]:
        lines += ["", "Wrote:", *(f"  {path}" for path in report["files"])]
    variants = len({(row["op"], row["kernel"], row["variant"]) for row in report["rows"]})
    archs = ", ".join(dict.fromkeys(row["arch"] for row in report["rows"])) or "no architecture"
    problems = report["problems"]
    verdict = f"{_count(len(problems), 'problem')}, exit code 1" if problems else "no problem"
    lines += [
        "",
        f"{_count(len(blocks), 'kernel')} in {_count(variants, 'variant')} for {archs}: {report['compiled']} compiled, "
        f"{report['cached']} from the cache; {verdict}",
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
