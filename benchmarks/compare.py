"""Is this tree slower than another commit? The benchmarks that its changes touch, of both, in turns.

make bench-compare BASE=main                       python benchmarks/compare.py main
make bench-compare BASE=main ARGS="-k patch_small"      more words go to pytest

The base commit is checked out into a temporary worktree. Two processes run this tree's benchmarks, one on the base's
library and one on this tree's; before every round each waits for its turn, and who goes first alternates, so that a
machine that slows down meanwhile slows both down. There are at least 15 rounds. A column is slower at 5 % or more (the
median over rounds of base against this tree). Cases with such a column are measured again, by new processes: what is
slower twice counts. Columns that are not this library's (``original``, ``vitmae``) show the noise: where one of them is
off by 5 % twice, either way, nothing can be told.

Exit codes: 0; 1 a column is slower; 2 nothing could be compared, or the machine is too noisy.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SLOWER = 0.05
NOT_OURS = ("original", "vitmae", "kaldi")
PACKAGES = {"mae_ast_fast.kernels": "kernels", "mae_ast_fast": "mae_ast_fast"}  # as setup.py installs them
# pytest with the library of another tree: the folder that it runs in would come before PYTHONPATH.
RUN = """
import sys
sys.path.remove("")
import mae_ast_fast, pytest
root = sys.argv.pop(1)
if not mae_ast_fast.__file__.startswith(root):
    sys.exit(f"mae_ast_fast is {mae_ast_fast.__file__}, expected it in {root}")
sys.exit(pytest.main(sys.argv[1:]))
"""
TURNS = "MAE_AST_FAST_BENCH_TURNS"  # descriptors to read a turn from and to tell its end to


class Unusable(RuntimeError):
    """Nothing can be compared; the message says why."""


Row = tuple[str, str, float, str]  # case, column, median over rounds of base's seconds against head's, what it means


def affected(changed: Sequence[str]) -> list[str]:
    """Benchmark files that import what changed, directly or not; a benchmark that changed itself is one."""
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    return [file.name for file in files if not sources(file).isdisjoint(changed)]


@functools.cache
def sources(path: Path) -> frozenset[str]:
    """Paths in the tree of a Python file and of all files that it imports, also inside functions."""
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imports(path)
    return frozenset(path.relative_to(ROOT).as_posix() for path in found)


def imports(path: Path) -> list[Path]:
    """Files of the tree whose names a file imports. A package's ``__init__`` counts where it defines the name."""
    found: list[Path | None] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [file_of(name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            found += [file_of(f"{module}.{name.name}") or origin(module, name.name) for name in node.names]
    return [file for file in found if file is not None]


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that ``from MODULE import ...`` in a file means."""
    if not node.level:
        return node.module or ""
    inside = path.relative_to(ROOT).with_suffix("").parts
    package = next(name for name, folder in PACKAGES.items() if folder == inside[0]).split(".")
    parents = [*package, *inside[1:]][: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def file_of(module: str) -> Path | None:
    """A module's file, where it is in the tree: in a package, or next to the benchmarks."""
    for name, folder in PACKAGES.items():
        if module == name or module.startswith(f"{name}."):
            place = ROOT.joinpath(folder, *module[len(name) + 1 :].split("."))
            break
    else:
        place = ROOT.joinpath("benchmarks", *module.split("."))
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def origin(module: str, name: str) -> Path | None:
    """The file that defines a module's name: for one that a package only passes on, the file it comes from."""
    file = file_of(module)
    if file is None or file.name != "__init__.py":
        return file
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return origin(absolute(node, file), name)
    return file


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unusable(f"git {' '.join(arguments)}: there is no git here") from None
    if done.returncode:
        raise Unusable(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Side:
    """A process that asks for a turn before every round."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        read, self.grant = os.pipe()
        self.told, write = os.pipe()
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
        """Once it asks for a turn, or has ended (False)."""
        return os.read(self.told, 1) == b"?"

    def go(self) -> None:
        os.write(self.grant, b"!")


def take_turns(sides: Sequence[Side]) -> list[int]:
    """Grants rounds one after another, the first of one last in the next, until all have ended; returns exit codes."""
    waiting = [side for side in sides if side.waits()]
    while waiting:
        for side in list(waiting):
            side.go()
            if not side.waits():
                waiting.remove(side)
        waiting.reverse()
    return [side.process.wait() for side in sides]


def verdict(base: dict[str, Any], head: dict[str, Any]) -> list[Row]:
    """Every case and column that two results of pytest-benchmark have in common: "slower", "noise" or ""."""
    theirs = {(case["fullname"].partition("::")[2], column): seconds for case, column, seconds in samples(base)}
    rows = []
    for case, column, seconds in samples(head):
        name = case["fullname"].partition("::")[2]
        if (name, column) not in theirs:
            continue
        ratio = statistics.median(a / b for a, b in zip(theirs[name, column], seconds, strict=False))
        told = "slower" if ratio <= 1.0 / (1.0 + SLOWER) else ""
        if column.startswith(NOT_OURS):
            told = "noise" if told or ratio >= 1.0 + SLOWER else ""
        rows.append((name, column, ratio, told))
    if not rows:
        raise Unusable("the two results have no column in common")
    return rows


def samples(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[float]]]:
    """Seconds of every round by case and column; where a column has several timings, each is one."""
    for case in result["benchmarks"]:
        for column, found in case["extra_info"]["columns"].items():
            if "seconds" in found:
                yield case, column, found["seconds"]
            else:
                for what, timing in found.items():
                    yield case, f"{column} {what}", timing["seconds"]


def main(argv: Sequence[str]) -> int:
    """Compares; returns the exit code."""
    if not argv or argv[0].startswith("-"):
        print("usage: compare.py COMMIT [pytest's words]", file=sys.stderr)
        return 2
    commit, *words = argv
    try:
        changed = [*git("diff", "--name-only", commit).split(), *git("ls-files", "-o", "--exclude-standard").split()]
        files = affected(changed)
        if not files:
            print(f"nothing that a benchmark times differs from {commit}")
            return 0
        print(f"against {git('rev-parse', '--short', commit).strip()}: {', '.join(files)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(commit, files, words, Path(folder) / "first")
            doubted = sorted({case for case, *_, told in rows if told})
            if doubted:
                print(f"again: {', '.join(doubted)}", flush=True)
                again = compare(commit, files, words, Path(folder) / "again", doubted)
                rows = twice(rows, again)
    except Unusable as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    width = max(len(f"{case} {column}") for case, column, *_ in rows)
    for case, column, ratio, told in rows:
        print(f"{f'{case} {column}':<{width}}  {ratio:5.3f} x the speed of {commit}  {told.upper()}".rstrip())
    if noisy := [f"{case} {column}" for case, column, _, told in rows if told == "noise"]:
        print(f"bench-compare: too noisy here, {', '.join(noisy)} did not change", file=sys.stderr)
        return 2
    return int(any(told for *_, told in rows))


def twice(first: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """The first rows, where a case was measured again with the second's ratio, and a meaning if both agree on it."""
    second = {(case, column): (ratio, told) for case, column, ratio, told in again}
    rows = []
    for case, column, ratio, told in first:
        ratio, other = second.get((case, column), (ratio, told))
        rows.append((case, column, ratio, told if told == other else ""))
    return rows


def compare(
    commit: str, files: Sequence[str], words: Sequence[str], folder: Path, cases: Sequence[str] = ()
) -> list[Row]:
    """Runs both sides, of all cases or of these alone (``bench_x[id]``); see ``verdict``."""
    folder.mkdir()
    tree = folder / "base"
    git("worktree", "add", "--detach", str(tree), commit)
    try:
        # What pip would install of a tree, without pip: its package, and its kernels at their place in it.
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
            command = [sys.executable, "-c", RUN, str(root), *words]
            command += [f"benchmarks/{file}" for file in files]
            if cases:
                command.append(f"--only={json.dumps(list(cases))}")
            command += ["-p", "no:cacheprovider", "-q", f"--benchmark-json={folder / name}.json"]
            paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
            sides.append(Side(command, {**os.environ, "PYTHONPATH": paths}, folder / f"{name}.log"))
        codes = take_turns(sides)
        for name, code in zip(roots, codes, strict=True):
            if code:
                raise Unusable(f"the benchmarks fail on {name}:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        return verdict(*(json.loads((folder / f"{name}.json").read_text()) for name in roots))
    finally:
        git("worktree", "remove", "--force", str(tree))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
