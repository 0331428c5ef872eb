"""Kernels compiled without a GPU, each in a process of its own, their figures read and cached."""

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

KEPT_DAYS = 30  # figures in the cache that no run has asked for in this time are removed
EXCERPT = 6  # lines of a compiler's message


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(ARCHS[arch].backend, ARCHS[arch].name, ARCHS[arch].warp)


@functools.cache
def compiler_backend(arch: str) -> Any:
    """Triton's compiler for an architecture; None where this Triton has none."""
    from triton.backends import backends

    target = _target(arch)
    return next((b.compiler(target) for b in backends.values() if b.compiler.supports_target(target)), None)


@functools.cache
def _binder(function: Any, arch: str) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(function.signature, function.params, compiler_backend(arch))


def specialised(function: Any, arguments: Sequence[Any], constants: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the JIT would compile for a launch: its own steps (JITFunction.run), with an architecture named."""
    given = {**constants, "debug": False}
    bound = _binder(function, arch)(*arguments, **given)
    options, signature, constexprs, attributes = function._pack_args(compiler_backend(arch), given, *bound)
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
    return f"{triton.__version__} {compiler_backend(arch).hash()} {get_cache_invalidating_env_vars()} {reader}"


def cache_key(source: dict[str, Any]) -> str:
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
        result = {"error": "\n".join([*told[:2], first_lines(error)])}
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


def first_lines(error: BaseException) -> str:
    """What is wrong, and then, where Triton's frontend says it, the lines of the kernel that lead there."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    what = getattr(chain[-1], "error_message", None) or str(chain[-1])
    lines = f"{type(chain[-1]).__name__}: {what}".splitlines()[:EXCERPT]
    for located in [error for error in chain if hasattr(error, "error_message")][-1:]:
        lines += str(located).splitlines()[-EXCERPT:]
    return "\n".join(line for line in lines if line.strip())


def compile_kernels(
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


def read_cache(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / f"{key}.json"
    try:
        figures = json.loads(path.read_text())
        os.utime(path)
    except (OSError, json.JSONDecodeError):
        return None
    return figures


def write_cache(folder: Path, results: dict[str, dict[str, Any]]) -> None:
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
