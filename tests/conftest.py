"""Command options, hooks and fixtures of the test suite."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # parallel workers share the processors
    threads = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
import torch
from fake_cuda.fixture import fake_cuda, fake_cuda_environment  # noqa: F401 - fixtures

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported: the kernels then run on CPU tensors
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.install()

KERNELS = Path(*importlib.util.find_spec("mae_ast_fast.kernels").submodule_search_locations)
KERNEL_TESTS = {f"test_{path.stem}" for path in KERNELS.glob("*.py") if "@triton.jit" in path.read_text()}
KERNEL_TESTS |= {"test_ops", "test_model_triton", "test_golden", "test_ssast", "test_undefined_memory"}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--results", help="write a summary of the run to this file")
    if not pluginmanager.hasplugin("timeout"):  # a GPU machine may lack pytest-timeout: tests then run without limits
        parser.addini("timeout", "seconds of a test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): limit of a test, where pytest-timeout is installed")


def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.empty`` or a similar function: undefined memory is NaN (integers: the largest value)."""

    def function(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*arguments, **options)
        if tensor.is_floating_point():
            undefined = float("nan")
        else:
            undefined = 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(undefined)

    return function


@pytest.fixture
def quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write empty pictures, and intervals of 50 resamples, in tests without the mark ``full_report``.

    In a tiny run drawing takes about half the time of pretraining, and 1000 resamples about half that of probing.
    """
    if request.node.get_closest_marker("full_report"):
        return
    from mae_ast_fast.downstream import figures as downstream_figures
    from mae_ast_fast.downstream import metrics
    from mae_ast_fast.training import figures

    def save_empty(figure: Any, path: Path) -> None:
        path.write_bytes(b"")
        figures.pyplot().close(figure)

    monkeypatch.setattr(figures, "save_figure", save_empty)
    monkeypatch.setattr(downstream_figures, "save_figure", save_empty)
    monkeypatch.setattr(metrics, "RESAMPLES", 50)


@pytest.fixture(autouse=True)
def undefined_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In kernel tests, memory that a kernel does not write is NaN instead of an arbitrary value.

    The functions are patched by name: use_deterministic_algorithms would also fill memory, but change the operations
    under test.
    """
    if request.module.__name__ in KERNEL_TESTS:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def small_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of one operation, whose module has ``CASE``, kernels have the case's launches."""
    if case := getattr(request.module, "CASE", None):
        from kernel_checks import tiny_launches

        tiny_launches(monkeypatch, case)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write outcomes and slowest tests to the file of ``--results``: the record of ``make test-all``."""
    if not (target := config.getoption("--results")):
        return
    stats = terminalreporter.stats
    outcomes = {name: len(stats.get(name, [])) for name in ("passed", "failed", "error", "skipped", "xfailed")}
    calls = [report for name in ("passed", "failed") for report in stats.get(name, []) if report.when == "call"]
    slowest = sorted(calls, key=lambda report: -report.duration)[:15]
    lines = [
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        ", ".join(f"{count} {name}" for name, count in outcomes.items() if count),
        *(f"FAILED {report.nodeid}" for report in stats.get("failed", [])),
        *(f"skipped {report.nodeid}: {report.longrepr[2]}" for report in stats.get("skipped", [])),
        "slowest:",
        *(f"  {report.duration:7.1f} s  {report.nodeid}" for report in slowest),
    ]
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
