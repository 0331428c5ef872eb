"""Processes that begin with PyTorch imported: forks of one that has imported it and run nothing.

A new interpreter needs 2 to 4 s of one core for these imports. The package under test is not among them: each process
imports it itself. Not for tests of imports or of environment variables that a library reads when it is imported.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

IMPORTED = [
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.hf_storage"),
    *("torch.distributed.checkpoint.state_dict", "torch.utils.tensorboard", "torchaudio", "lhotse", "jsonargparse"),
    *("pytest", "huggingface_hub.hub_mixin", "safetensors.torch"),
]
LOCK = threading.Lock()  # multiprocessing looks at all processes when it starts one
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def spawn(function: Callable[..., object], arguments: tuple[Any, ...], processes: int) -> None:
    """Call ``function(rank, *arguments)`` in each process, and wait for all, like ``torch.multiprocessing.spawn``."""
    import torch

    _context()
    torch.multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


class Command:
    """A command line of Python that has started; the part of ``subprocess.Popen`` that tests use.

    Args:
        line: Arguments of the interpreter: a path, ``-m`` and a module, or ``-c`` and a program; then its arguments.
        stdout: File for the standard output.
        stderr: File for the error output; None: that of the standard output.
        env: All environment variables; None: those of this process.
        cwd: Working directory; None: that of this process.
    """

    def __init__(
        self,
        line: Sequence[str],
        stdout: Path,
        stderr: Path | None = None,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        options = {"folder": str(cwd or Path.cwd()), "environment": environment, "import_path": _import_path()}
        with LOCK:
            self._process = _context().Process(target=_run, args=(list(line), stdout, stderr), kwargs=options)
            self._process.start()
        atexit.register(self.kill)  # multiprocessing would wait for it

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with LOCK:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        connection.wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _import_path() -> list[str]:
    """``sys.path`` of a new interpreter, without its first entry and PYTHONPATH."""
    program = "import sys; print(*sys.path[1:], sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.check_output([sys.executable, "-c", program], text=True, env=environment).splitlines()


def _run(
    line: list[str],
    stdout: Path,
    stderr: Path | None,
    *,
    folder: str,
    environment: dict[str, str],
    import_path: list[str],
) -> None:
    """Body of a forked process: what the interpreter does with its command line."""
    import numpy as np
    import torch

    os.dup2(os.open(stdout, NEW_FILE), 1)
    os.dup2(1 if stderr is None else os.open(stderr, NEW_FILE), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    gc.freeze()  # what is imported is no garbage
    multiprocessing.set_start_method(None, force=True)  # back to the default
    np.random.seed()  # other numbers in each process, as in new ones
    torch.default_generator.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    mark = line[0] if line[0] in ("-c", "-m") else "script"
    first = {"-c": "", "-m": folder, "script": str(Path(line[0]).parent)}[mark]
    python_path = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *python_path, *import_path]
    sys.argv = {"-c": ["-c", *line[2:]], "-m": line[1:], "script": line}[mark]
    try:
        if mark == "-c":
            exec(compile(line[1], "<string>", "exec", dont_inherit=True), {"__name__": "__main__"})
        elif mark == "-m":
            runpy.run_module(line[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(line[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
