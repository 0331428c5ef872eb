"""Hooks of pytest and pytest-benchmark for this folder. The test suite does not load this file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMPARED_ROUNDS = 15  # minimum for comparing two commits: the median of 5 rounds is off by 5 % too often
sys.path.append(str(ROOT / "tests" / "common"))  # policy.py: outputs are checked before they are timed


# Log records for external tools. pytest would capture them all, which makes compiling many times slower.
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--only", type=json.loads, help="JSON list of cases, for example bench_step[mixed]; set by compare.py"
    )
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds of a test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): limit of a test, where pytest-timeout is installed")
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (selected_names := config.getoption("only")) is not None:
        items[:] = [item for item in items if item.name in selected_names]


if importlib.util.find_spec("pytest_benchmark") is not None:

    @pytest.fixture
    def benchmark(benchmark: Any) -> Any:
        """The fixture of pytest-benchmark; under compare.py every round waits for its turn."""
        if turns := os.environ.get("MAE_AST_FAST_BENCH_TURNS"):
            read, write = map(int, turns.split(","))
            pedantic = benchmark.pedantic

            def in_turn(round_: Callable[[], object], rounds: int) -> object:
                def waiting() -> None:
                    os.write(write, b"?")
                    if os.read(read, 1) != b"!":
                        raise RuntimeError("compare.py ended: no more turns")
                    round_()

                return pedantic(waiting, rounds=max(rounds, COMPARED_ROUNDS))

            benchmark.pedantic = in_turn
        return benchmark


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Machine facts for readers of the results. pytest-benchmark's default would include the host name."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_driver": _driver(),
        **{name: _version(name) for name in ("triton", "transformers")},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of the GPU driver; None if it is unknown."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """Commit, its time, and whether the tree differs from it (ignoring earlier results).

    ``MAE_AST_FAST_COMMIT`` names the commit of a tree without ``.git``. Unknown values are None. This function never
    raises, because pytest-benchmark calls it before it writes any timing.
    """
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/studies/quality/results")
    return {
        "id": os.environ.get("MAE_AST_FAST_COMMIT") or _git("rev-parse", "HEAD"),
        "time": _git("log", "-1", "--format=%cI"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    """Output of git in this tree; None without git, without a repository, or in one that git does not trust."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # ignore a repository around this tree
    command = ["git", *arguments]
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    arguments = [
        argument.replace(f"{ROOT}{os.sep}", "") for argument in sys.argv[1:]
    ]  # do not publish the tree's location
    output_json["command"] = ["python", "-m", "pytest", *arguments]
