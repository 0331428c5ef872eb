"""make bench-compare: the benchmarks that it selects, their turns, and its verdict."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DATA, MASKING, OPS, STEP = (f"bench_{name}.py" for name in ("data", "masking", "ops", "step"))


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        (["README.md", "docs/benchmarks.md", "tests/test_ops.py"], []),
        (["mae_ast_fast/downstream/finetune.py"], []),
        (["mae_ast_fast/data/audio.py"], [DATA]),
        (["mae_ast_fast/data/loader.py"], [DATA]),
        (["mae_ast_fast/data/shards.py"], [DATA]),
        (["mae_ast_fast/training/distributed.py"], [DATA, STEP]),
        (["mae_ast_fast/ops/masking.py"], [DATA, MASKING, OPS, STEP]),
        (["kernels/info_nce.py", "README.md"], [DATA, MASKING, OPS, STEP]),
        (["kernels/configs/sm_90.json"], [DATA, MASKING, OPS, STEP]),
        (["kernels/configs/README.md"], []),
        (["mae_ast_fast/models/mae_ast.py"], [DATA, STEP]),
        (["benchmarks/bench_ops.py"], [OPS]),
        (["benchmarks/baselines/original.py"], [MASKING, STEP]),
        (["benchmarks/baselines/vitmae.py", "mae_ast_fast/tools/bench.py"], [STEP]),
        (["benchmarks/op_cases.py"], [OPS]),
    ],
)
def test_affected_changed_file_selects_its_benchmarks(compare, changed: list[str], files: list[str]) -> None:
    assert compare.affected(changed) == files


TREE = {
    "benchmarks/bench_a.py": "import helper\nfrom pack import Thing\n",
    "benchmarks/bench_b.py": "def lazily():\n    import pack.sub.deep as deep\n",
    "benchmarks/bench_c.py": "import os\nfrom pack import version\nfrom pack.core import fast\n",
    "benchmarks/helper.py": "",
    "pack/__init__.py": "from .thing import Thing\nversion = 1\n",
    "pack/thing.py": "",
    "pack/sub/__init__.py": "",
    "pack/sub/deep.py": "def lazily():\n    from ..other import name\n",
    "pack/other.py": "from .thing import Thing\n",
    "core/fast.py": "from . import slow\n",
    "core/slow.py": "",
    "pack/unused.py": "",
}


@pytest.mark.parametrize(
    ("changed", "letters"),
    [
        ("benchmarks/helper.py", "a"),
        ("pack/thing.py", "abc"),  # the package re-exports it; b and c import files that import it
        ("pack/sub/deep.py", "b"),
        ("pack/other.py", "b"),
        ("pack/__init__.py", "c"),
        ("core/fast.py", "c"),
        ("core/slow.py", "c"),
        ("pack/unused.py", ""),
    ],
)
def test_affected_any_tree_follows_imports(
    *, compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, letters: str
) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "PACKAGES", {"pack.core": "core", "pack": "pack"})
    assert compare.affected([changed]) == [f"bench_{letter}.py" for letter in letters]


def test_sources_every_benchmark_lists_files_of_tree(compare) -> None:
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    assert [file.name for file in files] == [DATA, MASKING, OPS, STEP]
    for file in files:
        sources = compare.sources(file)
        assert all((ROOT / name).is_file() for name in sources)
        assert {name.partition("/")[0] for name in sources} == {"benchmarks", "mae_ast_fast", "kernels"}


def result(**seconds: list[float]) -> dict:
    columns = {name.replace("_", " "): {"seconds": values} for name, values in seconds.items()}
    return {"benchmarks": [{"fullname": "benchmarks/b.py::case", "extra_info": {"columns": columns}}]}


def test_verdict_median_five_percent_slower_is_slower(compare) -> None:
    base = result(fast=[1.0, 1.0, 1.0], reference=[1.0] * 3, original=[1.0] * 3, gone=[1.0] * 3)
    head = result(fast=[1.04, 1.04, 9.0], reference=[1.051] * 3, original=[2.0] * 3, new=[1.0] * 3)
    outcomes = {column: (round(ratio, 3), outcome) for _, column, ratio, outcome in compare.verdict(base, head)}
    assert outcomes == {"fast": (0.962, ""), "reference": (0.951, "slower"), "original": (0.5, "noise")}
    with pytest.raises(compare.Unusable, match="no column in common"):
        compare.verdict(result(fast=[1.0]), result(slow=[1.0]))


def test_main_counts_only_repeated_outcomes(compare, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A baseline column that changes repeatedly makes the result inconclusive."""
    monkeypatch.setattr(
        compare, "git", lambda *arguments: "mae_ast_fast/training/step.py\n" if arguments[0] == "diff" else ""
    )
    results = []
    monkeypatch.setattr(compare, "compare", lambda *arguments, **options: results.pop(0))

    def run(*rounds: tuple[float, float]) -> int:
        for original, fast in rounds:
            columns = {"original": original, "fast": fast}
            base = result(**{name: [value] for name, value in columns.items()})
            results.append(compare.verdict(base, result(original=[1.0], fast=[1.0])))
        code = compare.main(["x"])
        assert not results
        return code

    assert run((1.0, 1.0)) == 0  # and not measured again
    assert run((1.0, 0.9), (1.0, 1.0)) == 0
    assert run((1.0, 0.9), (1.0, 0.9)) == 1
    assert run((0.9, 1.0), (1.0, 0.9)) == 0
    capsys.readouterr()
    for original in (0.9, 1.1):
        assert run((original, 0.9), (original, 0.9)) == 2
        assert "the machine is too noisy" in capsys.readouterr().err


def test_verdict_several_timings_are_judged_separately(compare) -> None:
    def timed(forward: float, both: float) -> dict:
        columns = {"fast": {"forward": {"seconds": [forward]}, "both": {"seconds": [both]}}}
        return {"benchmarks": [{"fullname": "b.py::c", "extra_info": {"columns": columns}}]}

    rows = compare.verdict(timed(1.0, 1.0), timed(1.0, 2.0))
    assert [(column, outcome) for _, column, _, outcome in rows] == [("fast forward", ""), ("fast both", "slower")]


def test_take_turns_unequal_rounds_alternate_to_the_end(compare, tmp_path: Path) -> None:
    """Also if one process has more rounds, or ends before its first."""
    log = tmp_path / "said"
    program = f"""
import os, sys
read, write = map(int, os.environ["{compare.TURNS}"].split(","))
for _ in range(int(sys.argv[2])):
    os.write(write, b"?")
    assert os.read(read, 1) == b"!"
    for what in ("begins", "ends"):
        with open({str(log)!r}, "a") as file:
            file.write(sys.argv[1] + " " + what + chr(10))
"""
    for rounds, expected in (((3, 3), "ABBAAB"), ((1, 3), "ABBB"), ((0, 2), "BB")):
        log.write_text("")
        sides = [
            compare.Side([sys.executable, "-c", program, name, str(count)], dict(os.environ), tmp_path / f"{name}.log")
            for name, count in zip("AB", rounds, strict=True)
        ]
        assert compare.take_turns(sides) == [0, 0]
        lines = [f"{name} {event}" for name in expected for event in ("begins", "ends")]
        assert log.read_text().splitlines() == lines


def test_main_wrong_arguments_print_usage(compare, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([]) == 2 and "usage" in capsys.readouterr().err
    assert compare.main(["no-such-commit"]) == 2 and "no-such-commit" in capsys.readouterr().err
