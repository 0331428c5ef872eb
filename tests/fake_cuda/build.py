"""Build the fake GPU's library, and the environment and command of processes that use it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")
CUDA = "13."  # the CUDA release whose structures the source describes


class CannotRun(RuntimeError):
    """The fake GPU does not work on this machine; the message gives the reason."""


def cache() -> Path:
    """This user's folder for the library and for Triton's kernels, shared by processes and kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"mae_ast_fast_fake_cuda_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise CannotRun(f"expected {folder} to be a folder of this user")
    return folder


def library() -> Path:
    """Path of ``libcuda.so.1``, built if the source or the compiler flags changed. Safe in parallel.

    Raises:
        CannotRun: The machine is not x86-64 Linux, g++ is missing or fails, or PyTorch is not built for CUDA 13.
    """
    import torch

    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotRun(f"expected Linux on x86_64, got {platform.system()} on {platform.machine()}")
    if not (torch.version.cuda or "").startswith(CUDA):
        raise CannotRun(f"expected a PyTorch built for CUDA {CUDA}x, got one for {torch.version.cuda}")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    built = cache() / key / "libcuda.so.1"
    if built.exists():
        return built
    if (compiler := shutil.which("g++")) is None:
        raise CannotRun("expected g++ on the path, found none")
    built.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=built.parent)
    os.close(handle)
    try:
        process = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", name], capture_output=True, text=True, check=False
        )
        if process.returncode:
            raise CannotRun(f"g++ failed on {SOURCE.name}:\n{process.stderr[-4000:]}")
        os.replace(name, built)  # atomic, also if other processes build it
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return built


def environment(built: Path) -> dict[str, str]:
    """Environment in which a Python process runs on the fake GPU, based on this process's environment."""
    changed = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder, root = str(built.parent), SOURCE.parent.parent
    tests = f"{root}:{root / 'common'}"

    def prepended(name: str, value: str, separator: str) -> str:
        return separator.join([value, *filter(None, [changed.get(name)])])

    return changed | {
        "LD_PRELOAD": prepended("LD_PRELOAD", str(built), " "),
        "LD_LIBRARY_PATH": prepended("LD_LIBRARY_PATH", folder, ":"),
        "PYTHONPATH": prepended("PYTHONPATH", tests, ":"),
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": str(cache() / "triton"),
        "CUDA_VISIBLE_DEVICES": "0",
        "FAKE_CUDA": str(built),
    }


def script_command(*arguments: str) -> list[str]:
    """Command that runs a script (or ``-m`` and a module) with its arguments on the fake GPU."""
    return [sys.executable, str(SOURCE.with_name("run.py")), *arguments]
