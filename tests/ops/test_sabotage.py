"""Mutation tests: the tests of an operation must fail on every deliberately broken kernel.

A mutant is a kernel file with one change, which the file's ``CASE`` lists. The operation's tests run in a separate
process on a copy of the package with that file. At least one test must fail, and the tests must start. Each kernel has
three kinds of mutants: a wrong index at the edge of a tile, a dropped last row, and a wrong row owner (movement) or a
missing fp32 cast (row maths).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm import Command

from mae_ast_fast.kernels.common.case import Mutant
from mae_ast_fast.ops.cases import op_cases

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sabotage:
    """A mutant of kernels/``op``.py."""

    op: str
    mutant: Mutant

    def apply(self, path: Path) -> None:
        """Make the change in a copy of the file, whose code before ``CASE`` has the old text exactly once."""
        code, start_of_case, case = path.read_text().partition("\nCASE = ")
        old, new = self.mutant.old, self.mutant.new
        assert code.count(old) == 1, f"{old!r} occurs {code.count(old)} times in {path.name}"
        path.write_text(code.replace(old, new) + start_of_case + case)


SABOTAGE = [Sabotage(name, mutant) for name, case in op_cases().items() for mutant in case.mutants]


def run_tests(folder: Path, sabotage: Sabotage) -> subprocess.CompletedProcess[str]:
    """Run the operation's tests on a copy of the package with the mutant, in ``folder``."""
    package = folder / "mae_ast_fast"
    shutil.copytree(ROOT / "mae_ast_fast", package, ignore=shutil.ignore_patterns("kernels"))  # __pycache__ saves time
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    sabotage.apply(package / "kernels" / f"{sabotage.op}.py")
    tests = ROOT / "tests"
    (folder / "mutated.py").write_text(
        "import mae_ast_fast.kernels\n"
        f"assert mae_ast_fast.kernels.__path__[0] == {str(package / 'kernels')!r}, mae_ast_fast.kernels.__path__\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    options = ["-c", str(ROOT / "pyproject.toml"), "-x", "-q", "-p", "no:cacheprovider", "-p", "mutated"]
    files = [tests / "ops" / "test_ops.py", tests / "ops" / f"test_{sabotage.op}.py"]
    chosen = ["-k", sabotage.op, *(str(path) for path in files if path.exists())]
    line = ["-m", "pytest", *options, "--timeout", "240", *chosen]
    process = Command(line, folder / "stdout", folder / "stderr", env=environment, cwd=folder)
    try:
        code = process.wait(timeout=280)
    finally:
        process.kill()
    outputs = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(line, code, *outputs)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Sabotage, subprocess.CompletedProcess[str]]:
    """Test runs of the mutants that this run of pytest selected, started side by side."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [params["sabotage"] for params in calls if isinstance(params.get("sabotage"), Sabotage)]
    folders = [tmp_path_factory.mktemp("mutant") for _ in selected]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(selected, pool.map(run_tests, folders, selected), strict=True))


def cases() -> list[Any]:
    """CI runs the first mutant of each kernel, ``make test-all`` runs all, which takes minutes."""
    ops = [sabotage.op for sabotage in SABOTAGE]
    return [
        pytest.param(
            sabotage,
            marks=pytest.mark.ci if ops.index(sabotage.op) == index else pytest.mark.long,
            id=f"{sabotage.op}, {sabotage.mutant.kind}",
        )
        for index, sabotage in enumerate(SABOTAGE)
    ]


@pytest.mark.timeout(1200)  # the first one waits for all
@pytest.mark.parametrize("sabotage", cases())
def test_mutant_fails_its_tests(sabotage: Sabotage, outcomes: dict[Sabotage, subprocess.CompletedProcess[str]]) -> None:
    completed = outcomes[sabotage]
    report = f"{completed.stdout[-2000:]}\n{completed.stderr[-2000:]}"
    exit_code = completed.returncode
    assert exit_code == 1, f"expected a failing test, pytest's exit code was {exit_code}:\n{report}"
    assert " failed" in completed.stdout and " error" not in completed.stdout.splitlines()[-1], report


def test_mutants_every_kernel_has_three_kinds() -> None:
    """Also a kernel without a record."""
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
    for op in sorted(kernels):
        kinds = {sabotage.mutant.kind for sabotage in SABOTAGE if sabotage.op == op}
        assert {"edge", "last row"} <= kinds and kinds & {"row owner", "fp32 cast"}, f"{op}: {sorted(kinds)}"
