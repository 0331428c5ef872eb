"""What the Triton kernels cost on each architecture, compiled ahead of time: no GPU is needed.

Every module of ``mae_ast_fast.kernels`` with ``examples`` is asked for its variants, whose launches
``kernels/launch.py`` records instead of making them. Signatures and attributes are worked out by Triton's own JIT
code, so what is compiled here is what a launch would compile. Each compilation runs in a process of its own (a compiler
that aborts takes nothing with it), and its figures are kept in the cache folder under all that they depend on.

Figures: registers of a thread; spilled bytes, stored and loaded, of a thread (``ptxas -v``; on AMD four bytes a spilled
VGPR); shared memory of a block; the matrix instruction in the machine code; occupancy (see ``occupancy``); bytes a row:
the tensors passed to the kernel, each argument once, over the rows that the example names.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import pkgutil
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import __version__

KEPT_DAYS = 30  # figures in the cache that no run has asked for in this time are removed
EXCERPT = 6  # lines of a compiler's message


class Unavailable(RuntimeError):
    """Kernels cannot be compiled here."""


class Arch(NamedTuple):
    """An architecture: how Triton calls it, and the limits that decide occupancy (NVIDIA's tuning guides, CDNA 3 ISA).

    The registers of a multiprocessor (AMD: compute unit) lie in four equal parts, each with warps of its own.
    """

    backend: str
    name: str | int
    warp: int  # threads
    block_shared: int  # bytes of shared memory that a block may have
    shared: int  # bytes of a multiprocessor
    shared_unit: int  # a block's bytes are rounded up to this,
    shared_taken: int  # and the system takes so many more for itself
    registers: int  # 32-bit registers of a part
    register_unit: int  # a warp's registers are rounded up to this
    warps: int  # that a multiprocessor holds
    blocks: int
    required: bool  # a kernel that does not compile fails the command even where the architecture was not asked for


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 163 << 10, 164 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_90": Arch("cuda", 90, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_100": Arch("cuda", 100, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "gfx942": Arch("hip", "gfx942", 64, 64 << 10, 64 << 10, 512, 0, 512 * 64, 8 * 64, 32, 32, False),
}
TENSOR_MEMORY = 512  # columns of sm_100's tensor memory


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
    """Share of a multiprocessor's warps that are at work when it holds as many blocks as fit.

    blocks = min(blocks of the architecture, warps that fit // warps, shared memory // that of a block rounded up),
    warps that fit = min(warps of the architecture, 4 * (registers of a part // registers of a warp rounded up)), and on
    sm_100 512 columns of tensor memory // those of a block; occupancy = blocks * warps / warps of the architecture.

    Args:
        arch: A name in ``ARCHS``.
        registers: Of a thread.
        shared: Bytes of a block.
        warps: Of a block.
        tensor_memory: Columns of a block.
    """
    limits = ARCHS[arch]
    of_warp = _round_up(registers * limits.warp, limits.register_unit)
    fit = min(limits.warps, 4 * (limits.registers // max(of_warp, 1)))
    blocks = min(limits.blocks, fit // warps)
    if of_block := _round_up(shared, limits.shared_unit) + limits.shared_taken:
        blocks = min(blocks, limits.shared // of_block)
    if tensor_memory:
        blocks = min(blocks, TENSOR_MEMORY // tensor_memory)
    return blocks * warps / limits.warps


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
    from . import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    found, broken = {}, []
    for name in names:
        try:
            module = importlib.import_module(f"{kernels.__name__}.{name}")
        except Exception as error:  # a file in the middle of an edit must not hide the others
            broken.append(_problem("import", f"cannot be imported: {_first_lines(error)}", op=name))
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
    from .kernels.launch import record

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
                source = _specialised(function, arguments, constants, arch)
                yield Variant(op, kernel, variant, arch, short, width, _bytes(arguments) / rows, _key(source), source)
    except Exception as error:  # whatever a wrapper raises concerns its own operation alone
        message = f"examples({short}, {width}) fails: {_first_lines(error)}"
        problems.append(_problem("examples", message, op=op, arch=arch))


def _bytes(arguments: Sequence[Any]) -> int:
    """Bytes of the tensors among a launch's arguments; what an expanded tensor repeats counts once."""
    total = 0
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            total += math.prod(size for size, stride in sizes if stride) * tensor.element_size()
    return total


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(ARCHS[arch].backend, ARCHS[arch].name, ARCHS[arch].warp)


@functools.cache
def _backend(arch: str) -> Any:
    """Triton's compiler for an architecture; None where this Triton has none."""
    from triton.backends import backends

    target = _target(arch)
    return next((b.compiler(target) for b in backends.values() if b.compiler.supports_target(target)), None)


@functools.cache
def _binder(function: Any, arch: str) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(function.signature, function.params, _backend(arch))


def _specialised(function: Any, arguments: Sequence[Any], constants: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the JIT would compile for a launch: its own steps (JITFunction.run), with an architecture named."""
    given = {**constants, "debug": False}
    bound = _binder(function, arch)(*arguments, **given)
    options, signature, constexprs, attributes = function._pack_args(_backend(arch), given, *bound)
    return {
        "function": function,
        "signature": signature,
        "constants": constexprs,
        "attributes": attributes,
        "options": options.__dict__,
        "arch": arch,
    }


@functools.cache
def _tools(arch: str) -> str:
    """What figures depend on beside the kernel: the compilers, what steers them, and how this file reads them."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return f"{triton.__version__} {_backend(arch).hash()} {get_cache_invalidating_env_vars()} {reader}"


def _key(source: dict[str, Any]) -> str:
    parts = [_tools(source["arch"]), _code(source["function"])]
    parts += [source[name] for name in ("signature", "constants", "attributes", "options")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _code(function: Any) -> str:
    """Syntax trees of a jit function and of those that it calls, and values of the globals that they name.

    Trees, so that comments and line numbers do not count. Triton's own functions are as old as its version.
    """
    from triton.language import constexpr
    from triton.runtime.jit import JITCallable

    parts, todo = {}, [function]

    def value(node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        owner = value(node.value, names) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None

    while todo:
        function = todo.pop()
        if function in parts or function.fn.__module__.startswith("triton."):
            continue
        tree = ast.parse(function.src)
        names = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        parts[function] = [ast.dump(tree), str(getattr(function, "noinline", None))]
        for node in ast.walk(tree):
            found = value(node, names) if isinstance(node, ast.Name | ast.Attribute) else None
            if isinstance(found, JITCallable):
                todo.append(found)
            elif isinstance(found, bool | int | float | str | tuple | constexpr):
                parts[function].append(f"{ast.unparse(node)} = {found!r}")
    return repr(list(parts.values()))


# --------------------------------------------------------------------------------------------------- one compilation


def _work(source: dict[str, Any], folder: Path, files: Path | None) -> None:
    """In a process of its own: writes ``result.json`` into ``folder``, and all that is printed into ``log``."""
    log = open(folder / "log", "w", buffering=1)  # noqa: SIM115  (stays open until the process ends)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # Triton's own cache would keep the compiler's messages from us
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    try:
        result = _figures(source, folder, files)
    except Exception as error:
        log.flush()
        told = [line for line in (folder / "log").read_text().splitlines() if "error:" in line]
        result = {"error": "\n".join([*told[:2], _first_lines(error)])}
    (folder / "result.json").write_text(json.dumps(result))


def _figures(source: dict[str, Any], folder: Path, files: Path | None) -> dict[str, Any]:
    """Compiles, and reads the figures from what the compiler leaves; ``files``: where its output goes, less suffix."""
    import triton
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(source["function"], source["signature"], source["constants"], source["attributes"]),
        target=_target(source["arch"]),
        options=source["options"],
    )
    sys.stdout.flush()
    metadata, dots = compiled.metadata, re.search(r"\btt\.dot", compiled.asm["ttir"]) is not None
    listings = {}
    if "ptx" in compiled.asm:
        listings["ptx"] = compiled.asm["ptx"]
        figures = read_ptxas((folder / "log").read_text())
        if dots or files:
            listings["sass"] = _disassembled(compiled.asm["cubin"], folder)
        matrix = sass_matrix(listings["sass"]) if dots else "-"
    else:
        listings["amdgcn"] = compiled.asm["amdgcn"]
        figures = read_amdgcn(listings["amdgcn"])
        matrix = amdgcn_matrix(listings["amdgcn"]) if dots else "-"
    if files:
        files.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in listings.items():
            files.with_name(f"{files.name}.{suffix}").write_text(text)
    return {
        **figures,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "matrix": matrix,
    }


def _disassembled(cubin: bytes, folder: Path) -> str:
    from triton import knobs

    (folder / "cubin").write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-sass", folder / "cubin"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_ptxas(log: str) -> dict[str, int]:
    """``registers`` and ``spill`` (bytes stored and loaded) of a thread, from what ``ptxas -v`` prints."""
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    if not used:
        raise ValueError(f"expected the messages of ptxas -v, got {log[:200]!r}")
    return {
        "registers": max(used),
        "spill": sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
    }


def read_amdgcn(assembly: str) -> dict[str, int]:
    """The same from the metadata in AMD's assembly: VGPRs (with accumulators), and 4 bytes a spilled one."""

    def count(name: str) -> int:
        if not (found := re.findall(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)):
            raise ValueError(f"expected .{name} in the assembly")
        return max(map(int, found))

    return {"registers": count("vgpr_count"), "spill": 4 * count("vgpr_spill_count")}


def sass_matrix(sass: str) -> str:
    """The kind of a kernel's matrix instructions: HMMA, HGMMA, UTCHMMA, ...; FFMA where it multiplies without any.

    With the suffix .TF32 where fp32 is rounded to it.
    """
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    kinds = Counter(
        name + (".TF32" if "TF32" in rest else "")
        for name, _, rest in (opcode.partition(".") for opcode in opcodes)
        if name.endswith("MMA")
    )
    if kinds:
        return "+".join(kind for kind, _ in kinds.most_common())
    return "FFMA" if any(opcode.startswith("FFMA") for opcode in opcodes) else "-"


def amdgcn_matrix(assembly: str) -> str:
    """MFMA, or FMA where a kernel multiplies matrices without."""
    return "MFMA" if "v_mfma_" in assembly else "FMA"


def _first_lines(error: BaseException) -> str:
    """What is wrong, and then, where Triton's frontend says it, the lines of the kernel that lead there."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    what = getattr(chain[-1], "error_message", None) or str(chain[-1])
    lines = f"{type(chain[-1]).__name__}: {what}".splitlines()[:EXCERPT]
    for located in [error for error in chain if hasattr(error, "error_message")][-1:]:
        lines += str(located).splitlines()[-EXCERPT:]
    return "\n".join(line for line in lines if line.strip())


# ------------------------------------------------------------------------------------------------- all compilations


def _compile(
    sources: dict[str, tuple[dict[str, Any], Path | None]],
    workers: int,
    progress: Callable[[int, int], object],
    keep: Callable[[dict[str, dict[str, Any]]], object],
) -> dict[str, dict[str, Any]]:
    """Key -> figures, or ``error`` and what the compiler said. Each in a process of its own, ``workers`` at a time.

    ``keep`` gets each as it comes, so that a run that is stopped has not worked in vain.
    """
    from triton.runtime.cache import triton_key

    if not sources:
        return {}
    triton_key()  # takes half a second: once, and not in every process
    fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    pending, running, results = list(sources), {}, {}
    with tempfile.TemporaryDirectory(prefix="mae-ast-fast-kernels-") as folder:
        while pending or running:
            while pending and len(running) < workers:
                key = pending.pop(0)
                place = Path(folder) / key
                place.mkdir()
                process = fork.Process(target=_work, args=(sources[key][0], place, sources[key][1]), daemon=True)
                process.start()
                running[process.sentinel] = key, place, process
            for sentinel in wait(list(running)):
                key, place, process = running.pop(sentinel)
                process.join()
                results[key] = _result(place, process.exitcode)
                shutil.rmtree(place)  # some MB each, hundreds of them
                keep({key: results[key]})
                progress(len(results), len(sources))
    return results


def _result(place: Path, code: int) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads((place / "result.json").read_text())
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    log = (place / "log").read_text(errors="replace") if (place / "log").exists() else ""
    lines = [line for line in log.splitlines() if line.strip()][:EXCERPT]
    return {"error": "\n".join([f"the compiler died of {how}:", *lines])}


def _read_cache(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / f"{key}.json"
    try:
        figures = json.loads(path.read_text())
        os.utime(path)
    except (OSError, json.JSONDecodeError):
        return None
    return figures


def _write_cache(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Errors are not kept: a full disk makes some too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, figures in results.items():
            if "error" not in figures:
                partial = folder / f"{key}.{os.getpid()}.partial"
                partial.write_text(json.dumps(figures))
                partial.replace(folder / f"{key}.json")
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another run removes them too
                if path.stat().st_mtime < time.time() - 86400 * KEPT_DAYS:
                    path.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write the cache {folder} (MAE_AST_FAST_CACHE sets another one, --no-cache does without): {error}"
        ) from error


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
    from .kernels import allowed as allowlist

    problems: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []

    def tell(arch: str, problem: dict[str, str]) -> None:
        (problems if archs is not None or ARCHS[arch].required else notes).append(problem)

    archs_here = []
    for arch in ARCHS if archs is None else archs:
        if _backend(arch):
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
        other = f"triton {versions['triton']}, kernels/allowed.py is for {allowlist.TRITON}"
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
    from .corpus import default_cache

    folder = default_cache() / "kernels"
    results, sources = {}, {}
    for variant in variants:
        place = None if out is None else out / re.sub(r"[^\w.#-]+", "-", _title(variant.row))
        figures = _read_cache(folder, variant.key) if cache and out is None else None
        if figures is None:
            sources[variant.key] = variant.source, place
        else:
            results[variant.key] = figures
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    keep = functools.partial(_write_cache, folder) if cache else lambda results: None
    fresh = _compile(sources, usable, progress, keep)
    files = [file for _, place in sources.values() if place for file in sorted(place.parent.glob(f"{place.name}.*"))]
    return results | fresh, len(fresh), files


def judge(rows: Sequence[dict[str, Any]], allowed: Sequence[Any], broken: Collection[str] = ()) -> list[dict[str, str]]:
    """Problems: kernels that cannot be launched, spills that no entry allows, entries that allow nothing.

    Args:
        rows: Of the report. A row whose spill is allowed gets the reason as ``allowed``.
        allowed: Entries of kernels/allowed.py.
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
            more = f", kernels/allowed.py allows {cap}" if cap else ""
            problems.append(_problem("spill", f"spills {row['spill']} bytes{more}", **_at(row)))
        elif row["spill"]:
            row["allowed"] = entries[entry].reason
    for (name, variant, arch), spill in spilled.items():
        op, _, kernel = name.partition(".")
        if not spill and op not in broken:
            why = "there is no such variant" if spill is None else "spills nothing any more"
            message = f"{why}: remove the entry from kernels/allowed.py"
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
