"""Options of the test suite."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels then run on CPU tensors


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="write a summary of the run to this file")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes what ran, how it ended and what took longest, for the record of ``make test-all``."""
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
