"""Compile kernels without a GPU, one process per kernel; read and cache their resource figures."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from .kernel_hardware import ARCHS

KEPT_DAYS = 30  # cached figures that no run has read for this long are removed
EXCERPT = 6  # lines of a compiler message to show


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(ARCHS[arch].backend, ARCHS[arch].name, ARCHS[arch].warp)


@functools.cache
def compiler_backend(arch: str) -> Any:
    """Triton's compiler for an architecture; None if this Triton version has none."""
    from triton.backends import backends

    target = _target(arch)
    return next((b.compiler(target) for b in backends.values() if b.compiler.supports_target(target)), None)


@functools.cache
def _binder(function: Any, arch: str) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(function.signature, function.params, compiler_backend(arch))


def specialised(function: Any, arguments: Sequence[Any], constants: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the JIT would compile for a launch on ``arch``, by the steps of ``JITFunction.run``."""
    keywords = {**constants, "debug": False}
    bound = _binder(function, arch)(*arguments, **keywords)
    options, signature, constexprs, attributes = function._pack_args(compiler_backend(arch), keywords, *bound)
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
    """What figures depend on besides the kernel: compiler versions, their environment variables, and this file."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return f"{triton.__version__} {compiler_backend(arch).hash()} {get_cache_invalidating_env_vars()} {reader}"


def cache_key(source: dict[str, Any]) -> str:
    """Hash of everything that the figures of a launch depend on."""
    inputs = [_tools(source["arch"]), _code(source["function"])]
    inputs += [source[name] for name in ("signature", "constants", "attributes", "options")]
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


@functools.cache
def _code(function: Any) -> str:
    """Syntax trees of a jit function and of those that it calls, and values of the globals that they use.

    Trees leave out comments and line numbers. Triton's own functions are left out: its version covers them.
    """
    from triton.language import constexpr
    from triton.runtime.jit import JITCallable

    sources: dict[Any, list[str]] = {}
    unread = [function]

    def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = resolve(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None

    while unread:
        function = unread.pop()
        if function in sources or function.fn.__module__.startswith("triton."):
            continue
        tree = ast.parse(function.src)
        names = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        sources[function] = [ast.dump(tree), str(getattr(function, "noinline", None))]
        for node in ast.walk(tree):
            referenced = resolve(node, names) if isinstance(node, ast.Name | ast.Attribute) else None
            if isinstance(referenced, JITCallable):
                unread.append(referenced)
            elif isinstance(referenced, bool | int | float | str | tuple | constexpr):
                sources[function].append(f"{ast.unparse(node)} = {referenced!r}")
    return repr(list(sources.values()))


def _work(source: dict[str, Any], folder: Path, output: Path | None) -> None:
    """Body of a compiler process: write ``result.json`` and all output (``log``) into ``folder``."""
    log = open(folder / "log", "w", buffering=1)  # noqa: SIM115  (open until the process ends)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # a hit in Triton's own cache would print no compiler messages
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    try:
        result = _figures(source, folder, output)
    except Exception as error:
        log.flush()
        compiler_errors = [line for line in (folder / "log").read_text().splitlines() if "error:" in line]
        result = {"error": "\n".join([*compiler_errors[:2], first_lines(error)])}
    (folder / "result.json").write_text(json.dumps(result))


def _figures(source: dict[str, Any], folder: Path, output: Path | None) -> dict[str, Any]:
    """Compile, and read the figures from the compiler's output, which is copied to ``output`` (path without suffix)."""
    import triton
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(source["function"], source["signature"], source["constants"], source["attributes"]),
        target=_target(source["arch"]),
        options=source["options"],
    )
    sys.stdout.flush()
    metadata, has_dot = compiled.metadata, re.search(r"\btt\.dot", compiled.asm["ttir"]) is not None
    listings = {}
    if "ptx" in compiled.asm:
        listings["ptx"] = compiled.asm["ptx"]
        figures = read_ptxas((folder / "log").read_text())
        if has_dot or output:
            listings["sass"] = _disassembled(compiled.asm["cubin"], folder)
        matrix = sass_matrix(listings["sass"]) if has_dot else "-"
    else:
        listings["amdgcn"] = compiled.asm["amdgcn"]
        figures = read_amdgcn(listings["amdgcn"])
        matrix = amdgcn_matrix(listings["amdgcn"]) if has_dot else "-"
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in listings.items():
            output.with_name(f"{output.name}.{suffix}").write_text(text)
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
    """``registers`` and ``spill`` (bytes stored and loaded) per thread, from the output of ``ptxas -v``."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise ValueError(f"expected the messages of ptxas -v, got {log[:200]!r}")
    return {
        "registers": max(registers),
        "spill": sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
    }


def read_amdgcn(assembly: str) -> dict[str, int]:
    """``registers`` (VGPRs with accumulators) and ``spill`` (4 bytes per spilled VGPR) from AMD assembly metadata."""

    def count(name: str) -> int:
        if not (counts := re.findall(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)):
            raise ValueError(f"expected .{name} in the assembly")
        return max(map(int, counts))

    return {"registers": count("vgpr_count"), "spill": 4 * count("vgpr_spill_count")}


def sass_matrix(sass: str) -> str:
    """Matrix instructions of a kernel: HMMA, HGMMA, UTCHMMA, ...; FFMA if it multiplies without them.

    The suffix .TF32 marks instructions that round fp32 to TF32.
    """
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    instructions = Counter(
        name + (".TF32" if "TF32" in modifiers else "")
        for name, _, modifiers in (opcode.partition(".") for opcode in opcodes)
        if name.endswith("MMA")
    )
    if instructions:
        return "+".join(instruction for instruction, _ in instructions.most_common())
    return "FFMA" if any(opcode.startswith("FFMA") for opcode in opcodes) else "-"


def amdgcn_matrix(assembly: str) -> str:
    """MFMA, or FMA if a kernel multiplies matrices without matrix instructions."""
    return "MFMA" if "v_mfma_" in assembly else "FMA"


def first_lines(error: BaseException) -> str:
    """Type and message of the root cause and, for errors of Triton's frontend, the kernel lines that it names."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    message = getattr(chain[-1], "error_message", None) or str(chain[-1])
    lines = f"{type(chain[-1]).__name__}: {message}".splitlines()[:EXCERPT]
    for frontend_error in [error for error in chain if hasattr(error, "error_message")][-1:]:
        lines += str(frontend_error).splitlines()[-EXCERPT:]
    return "\n".join(line for line in lines if line.strip())


def compile_kernels(
    sources: dict[str, tuple[dict[str, Any], Path | None]],
    workers: int,
    progress: Callable[[int, int], object],
    store: Callable[[dict[str, dict[str, Any]]], object],
) -> dict[str, dict[str, Any]]:
    """Compile each kernel in a separate process.

    Args:
        sources: Key -> result of ``specialised``, and path without suffix for listings (None: not written).
        workers: Number of processes at a time.
        progress: Called with the numbers of finished and of all kernels.
        store: Called with each result at once, so that an interrupted run loses none.

    Returns:
        Key -> figures, or ``error`` with the compiler's message.
    """
    from triton.runtime.cache import triton_key

    if not sources:
        return {}
    triton_key()  # takes 0.5 s: compute it once, before the processes fork
    fork = multiprocessing.get_context("fork")  # inherits the imported modules
    pending, results = list(sources), {}
    running: dict[Any, tuple[str, Path, multiprocessing.process.BaseProcess]] = {}
    with tempfile.TemporaryDirectory(prefix="mae-ast-fast-kernels-") as temp_folder:
        while pending or running:
            while pending and len(running) < workers:
                key = pending.pop(0)
                job_folder = Path(temp_folder) / key
                job_folder.mkdir()
                process = fork.Process(target=_work, args=(sources[key][0], job_folder, sources[key][1]), daemon=True)
                process.start()
                running[process.sentinel] = key, job_folder, process
            for sentinel in wait(list(running)):
                key, job_folder, finished = running.pop(sentinel)
                finished.join()
                results[key] = _result(job_folder, finished.exitcode)
                shutil.rmtree(job_folder)  # some MB per kernel, hundreds of kernels
                store({key: results[key]})
                progress(len(results), len(sources))
    return results


def _result(folder: Path, exit_code: int | None) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads((folder / "result.json").read_text())
    cause = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    lines = [line for line in log.splitlines() if line.strip()][:EXCERPT]
    return {"error": "\n".join([f"the compiler died with {cause}:", *lines])}


def read_cache(folder: Path, key: str) -> dict[str, Any] | None:
    """Cached figures, or None; marks the file as used."""
    path = folder / f"{key}.json"
    try:
        figures = json.loads(path.read_text())
        os.utime(path)
    except (OSError, json.JSONDecodeError):
        return None
    return figures


def write_cache(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write figures, and remove old ones. Errors are not cached, since a full disk causes some too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, figures in results.items():
            if "error" not in figures:
                partial = folder / f"{key}.{os.getpid()}.partial"
                partial.write_text(json.dumps(figures))
                partial.replace(folder / f"{key}.json")
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another run may remove it first
                if path.stat().st_mtime < time.time() - 86400 * KEPT_DAYS:
                    path.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write the cache {folder}: {error} (MAE_AST_FAST_CACHE sets another folder, --no-cache uses none)"
        ) from error
