"""The README's numbers are those of the committed result files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_are_generated(report) -> None:
    readme = (ROOT / "README.md").read_text()
    assert report.render(readme) == readme, "run python benchmarks/report.py"


def test_a_typed_number_is_noticed(report) -> None:
    readme = (ROOT / "README.md").read_text()
    begin = readme.index("<!-- report:pretrain -->")
    digit = next(i for i in range(begin, len(readme)) if readme[i].isdigit())
    typed = readme[:digit] + str((int(readme[digit]) + 1) % 10) + readme[digit + 1 :]
    assert report.render(typed) == readme != typed
