"""The lint of packed positional arguments: the calls that it reports and the forms that it allows."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "meta"))
import lint_calls  # noqa: E402

DEFINITIONS = """
from typing import NamedTuple

def scale(x, factor, offset): ...
def total(*values): ...
class Point(NamedTuple):
    x: int
    y: int
class Model:
    def step(self, loss, rate): ...
"""
REPORTED = {
    "function": "scale(*values)",
    "function_after_positional": "scale(x, *values)",
    "slice": "scale(x, *values[1:])",
    "call_result": "scale(*total(1, 2), 3)",
    "class": "Point(*values)",
    "method": "model.step(*values)",
    "own_class": "class Other:\n    def make(cls, values):\n        return cls(*values)",
    "nested_in_allowed_call": "total(*[scale(*pair) for pair in pairs])",
    "args_of_outer_function": "def outer(*args):\n    def inner():\n        return scale(*args)\n    return inner",
    "other_than_own_args": "def wrapper(*args):\n    return scale(*args, *values)",
}
ALLOWED = {
    "keywords": "scale(x, factor=2.0, **options)",
    "own_args": "def wrapper(*args, **options):\n    return scale(*args, **options)",
    "own_args_of_lambda": "wrapper = lambda *args: scale(*args)",
    "callee_with_args": "total(*values)",
    "own_function_with_args": "def scale(path, *lines): ...\nscale(path, *lines)",
    "namedtuple_make": "Point._make(values)",
    "library_function": "import torch\ntorch.scale(*values)",
    "library_alias": "import numpy as np\nnp.linalg.scale(*values)",
    "unknown_function": "print(*values)",
}


def lint(folder: Path, snippet: str) -> int:
    """Exit code of the lint on a folder with the definitions and the snippet."""
    (folder / "definitions.py").write_text(DEFINITIONS)
    (folder / "snippet.py").write_text(snippet)
    return lint_calls.main([str(folder)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lint_calls, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", REPORTED)
def test_main_packed_call_is_reported(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert lint(folder, REPORTED[name]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"snippet\.py:\d+: packed arguments, pass them by name: .*\*.*", line)


@pytest.mark.parametrize("name", ALLOWED)
def test_main_allowed_call_is_not_reported(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert lint(folder, ALLOWED[name]) == 0
    assert capsys.readouterr().out == ""


def test_main_reports_every_call_with_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(folder, "scale(*a)\nx = 1\nPoint(*b)\n") == 1
    places = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert places == ["snippet.py:1", "snippet.py:3"]


def test_defined_names_excludes_functions_with_args() -> None:
    names = lint_calls.defined_names([ast.parse("def f(*values): ...\ndef g(x): ...\nclass C: ...")])
    assert names == {"g", "C", "cls", "self"}


def test_makefile_lint_runs_check() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert "python tests/meta/lint_calls.py\n" in recipe
