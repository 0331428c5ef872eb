"""Compare the speed of this tree with another commit, on the benchmarks that its changes affect.

make bench-compare BASE=main                       python benchmarks/compare.py main
make bench-compare BASE=main ARGS="-k patch_small"      further arguments go to pytest

The base commit is checked out into a temporary worktree. Two processes run this tree's benchmarks, one with the base's
library and one with this tree's. Before every round each process waits for its turn, and the order alternates, so a
machine that slows down slows both. There are at least 15 rounds. A column is slower if the median over rounds of the
slowdown is at least 5 %. Cases with such a column are measured again by new processes, and only a column that is slower
twice counts. Columns that do not use this library (``original``, ``vitmae``) measure the noise: if one of them differs
by 5 % twice, in either direction, the result is inconclusive.

Exit codes: 0 no column is slower; 1 a column is slower; 2 nothing could be compared, or the machine is too noisy.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_SLOWDOWN = 0.05
BASELINES = ("original", "vitmae", "kaldi")
PACKAGES = {"mae_ast_fast.kernels": "kernels", "mae_ast_fast": "mae_ast_fast"}  # as setup.py installs them
LAUNCH_TABLE = "kernels/common/configs.py"
# Runs pytest with the library of another tree: otherwise the current folder would come before PYTHONPATH.
RUN = """
import sys
sys.path.remove("")
import mae_ast_fast, pytest
root = sys.argv.pop(1)
if not mae_ast_fast.__file__.startswith(root):
    sys.exit(f"mae_ast_fast is {mae_ast_fast.__file__}, expected it in {root}")
sys.exit(pytest.main(sys.argv[1:]))
"""
TURNS = "MAE_AST_FAST_BENCH_TURNS"  # file descriptors to read the permission for a round from, and to request it on


class Unusable(RuntimeError):
    """Nothing can be compared; the message gives the reason."""


Row = tuple[str, str, float, str]  # case, column, median over rounds of base seconds / head seconds, outcome


def affected(changed: Sequence[str]) -> list[str]:
    """Benchmark files that changed or that import a changed file, directly or indirectly."""
    # Tuned launches are read by one module, not imported.
    changed = [LAUNCH_TABLE if re.fullmatch(r"kernels/configs/\w+\.json", name) else name for name in changed]
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    return [file.name for file in files if not sources(file).isdisjoint(changed)]


@functools.cache
def sources(path: Path) -> frozenset[str]:
    """Paths, relative to the tree, of a Python file and of all files that it imports, also inside functions."""
    files, pending = set(), [path]
    while pending:
        path = pending.pop()
        if path not in files:
            files.add(path)
            pending += imports(path)
    return frozenset(path.relative_to(ROOT).as_posix() for path in files)


def imports(path: Path) -> list[Path]:
    """Files of the tree that a file imports. A package's ``__init__`` counts only if it defines the imported name."""
    files: list[Path | None] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            files += [file_of(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            files += [file_of(f"{module}.{alias.name}") or origin(module, alias.name) for alias in node.names]
    return [file for file in files if file is not None]


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """Absolute name of the module in ``from MODULE import ...``."""
    if not node.level:
        return node.module or ""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = next(name for name, folder in PACKAGES.items() if folder == parts[0]).split(".")
    parents = [*package, *parts[1:]][: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def file_of(module: str) -> Path | None:
    """File of a module in the packages or in the benchmarks folder; None for modules of other libraries."""
    for name, folder in PACKAGES.items():
        if module == name or module.startswith(f"{name}."):
            stem = ROOT.joinpath(folder, *module[len(name) + 1 :].split("."))
            break
    else:
        stem = ROOT.joinpath("benchmarks", *module.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def origin(module: str, name: str) -> Path | None:
    """File that defines a name of a module; for a name that a package re-exports, the file it comes from."""
    file = file_of(module)
    if file is None or file.name != "__init__.py":
        return file
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return origin(absolute(node, file), name)
    return file


def git(*arguments: str) -> str:
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unusable(f"git {' '.join(arguments)}: git is not installed") from None
    if process.returncode:
        raise Unusable(f"git {' '.join(arguments)}: {process.stderr.strip()}")
    return process.stdout


class Side:
    """A process that requests a turn before every round."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        read, self.grant = os.pipe()
        self.requests, write = os.pipe()
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, TURNS: f"{read},{write}"},
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(read, write),
            )
        os.close(read)
        os.close(write)

    def waits(self) -> bool:
        """Block until the process requests a turn (True) or ends (False)."""
        return os.read(self.requests, 1) == b"?"

    def go(self) -> None:
        """Grant a turn."""
        os.write(self.grant, b"!")


def take_turns(sides: Sequence[Side]) -> list[int]:
    """Grant rounds in turn, in reversed order each time, until all processes have ended. Returns their exit codes."""
    waiting = [side for side in sides if side.waits()]
    while waiting:
        for side in list(waiting):
            side.go()
            if not side.waits():
                waiting.remove(side)
        waiting.reverse()
    return [side.process.wait() for side in sides]


def verdict(base: dict[str, Any], head: dict[str, Any]) -> list[Row]:
    """Cases and columns that two results of pytest-benchmark share, with the outcome "slower", "noise" or ""."""
    base_seconds = {(case["fullname"].partition("::")[2], column): seconds for case, column, seconds in samples(base)}
    rows = []
    for case, column, seconds in samples(head):
        name = case["fullname"].partition("::")[2]
        if (name, column) not in base_seconds:
            continue
        ratio = statistics.median(
            base_second / head_second
            for base_second, head_second in zip(base_seconds[name, column], seconds, strict=False)
        )
        outcome = "slower" if ratio <= 1.0 / (1.0 + MAX_SLOWDOWN) else ""
        if column.startswith(BASELINES):
            outcome = "noise" if outcome or ratio >= 1.0 + MAX_SLOWDOWN else ""
        rows.append((name, column, ratio, outcome))
    if not rows:
        raise Unusable("the two results have no column in common")
    return rows


def samples(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[float]]]:
    """Seconds of every round by case and column. Several timings of a column count as several columns."""
    for case in result["benchmarks"]:
        for column, timings in case["extra_info"]["columns"].items():
            if "seconds" in timings:
                yield case, column, timings["seconds"]
            else:
                for timing_name, timing in timings.items():
                    yield case, f"{column} {timing_name}", timing["seconds"]


def main(argv: Sequence[str]) -> int:
    """Compare, print the result, and return the exit code."""
    if not argv or argv[0].startswith("-"):
        print("usage: compare.py COMMIT [arguments of pytest]", file=sys.stderr)
        return 2
    commit, *pytest_args = argv
    try:
        changed = [*git("diff", "--name-only", commit).split(), *git("ls-files", "-o", "--exclude-standard").split()]
        files = affected(changed)
        if not files:
            print(f"no benchmark uses a file that differs from {commit}")
            return 0
        print(f"against {git('rev-parse', '--short', commit).strip()}: {', '.join(files)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(commit, files, pytest_args, Path(folder) / "first")
            suspects = sorted({case for case, *_, outcome in rows if outcome})
            if suspects:
                print(f"measuring again: {', '.join(suspects)}", flush=True)
                repeated = compare(commit, files, pytest_args, Path(folder) / "again", only_cases=suspects)
                rows = confirmed(rows, repeated)
    except Unusable as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    width = max(len(f"{case} {column}") for case, column, *_ in rows)
    for case, column, ratio, outcome in rows:
        print(f"{f'{case} {column}':<{width}}  {ratio:5.3f} x the speed of {commit}  {outcome.upper()}".rstrip())
    if noisy := [f"{case} {column}" for case, column, _, outcome in rows if outcome == "noise"]:
        print(f"bench-compare: the machine is too noisy: {', '.join(noisy)} cannot have changed", file=sys.stderr)
        return 2
    return int(any(outcome for *_, outcome in rows))


def confirmed(first: Sequence[Row], repeated: Sequence[Row]) -> list[Row]:
    """The first rows; those measured again get the second ratio, and keep their outcome only if both agree."""
    repeated_rows = {(case, column): (ratio, outcome) for case, column, ratio, outcome in repeated}
    rows = []
    for case, column, ratio, outcome in first:
        ratio, repeated_outcome = repeated_rows.get((case, column), (ratio, outcome))
        rows.append((case, column, ratio, outcome if outcome == repeated_outcome else ""))
    return rows


def compare(
    commit: str, files: Sequence[str], pytest_args: Sequence[str], folder: Path, *, only_cases: Sequence[str] = ()
) -> list[Row]:
    """Run both sides, on all cases or on ``only_cases`` (names like ``bench_x[id]``), and return ``verdict``'s rows."""
    folder.mkdir()
    tree = folder / "base"
    git("worktree", "add", "--detach", str(tree), commit)
    try:
        # The layout that pip would install: the package, with the kernels inside it.
        roots = {}
        for name, source in (("base", tree), ("head", ROOT)):
            roots[name] = folder / name / "import" if name == "base" else folder / "import"
            (roots[name] / "mae_ast_fast").mkdir(parents=True)
            for path in (source / "mae_ast_fast").iterdir():
                if path.name != "kernels":
                    (roots[name] / "mae_ast_fast" / path.name).symlink_to(path)
            (roots[name] / "mae_ast_fast" / "kernels").symlink_to(source / "kernels")
        sides = []
        for name, root in roots.items():
            command = [sys.executable, "-c", RUN, str(root), *pytest_args]
            command += [f"benchmarks/{file}" for file in files]
            if only_cases:
                command.append(f"--only={json.dumps(list(only_cases))}")
            command += ["-p", "no:cacheprovider", "-q", f"--benchmark-json={folder / name}.json"]
            paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
            sides.append(Side(command, {**os.environ, "PYTHONPATH": paths}, folder / f"{name}.log"))
        codes = take_turns(sides)
        for name, code in zip(roots, codes, strict=True):
            if code:
                raise Unusable(f"the benchmarks fail on {name}:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        base, head = (json.loads((folder / f"{name}.json").read_text()) for name in roots)
        return verdict(base, head)
    finally:
        git("worktree", "remove", "--force", str(tree))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
