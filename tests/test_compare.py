"""make bench-compare: what it runs, whose turn it is, and what it calls slower."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        (["README.md", "tests/test_ops.py"], []),
        (["mae_ast_fast/audio.py"], ["bench_data.py"]),
        (["mae_ast_fast/masking.py"], ["bench_step.py", "bench_masking.py"]),
        (["kernels/info_nce.py"], ["bench_step.py", "bench_ops.py"]),
        (["mae_ast_fast/model.py"], ["bench_step.py"]),
        (["benchmarks/bench_ops.py"], ["bench_ops.py"]),
        (["benchmarks/original.py"], ["bench_step.py", "bench_masking.py"]),
        (["benchmarks/vitmae.py", "mae_ast_fast/bench.py"], ["bench_step.py"]),
        (["benchmarks/op_cases.py"], ["bench_ops.py"]),
    ],
)
def test_what_changed_says_what_runs(compare, changed: list[str], files: list[str]) -> None:
    assert compare.affected(changed) == files


def result(**seconds: list[float]) -> dict:
    columns = {name.replace("_", " "): {"seconds": values} for name, values in seconds.items()}
    return {"benchmarks": [{"fullname": "benchmarks/b.py::case", "extra_info": {"columns": columns}}]}


def test_five_percent_of_the_median_is_slower(compare) -> None:
    base = result(fast=[1.0, 1.0, 1.0], reference=[1.0] * 3, original=[1.0] * 3, gone=[1.0] * 3)
    head = result(fast=[1.04, 1.04, 9.0], reference=[1.051] * 3, original=[2.0] * 3, new=[1.0] * 3)
    found = {column: (round(ratio, 3), slower) for _, column, ratio, slower in compare.verdict(base, head)}
    assert found == {"fast": (0.962, ""), "reference": (0.951, "slower"), "original": (0.5, "noise")}
    with pytest.raises(compare.Unusable, match="no column in common"):
        compare.verdict(result(fast=[1.0]), result(slow=[1.0]))


def test_what_counts_was_seen_twice(compare, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And a column that cannot have changed says whether anything can be told at all."""
    monkeypatch.setattr(compare, "git", lambda *words: "mae_ast_fast/step.py\n" if words[0] == "diff" else "")
    found = []
    monkeypatch.setattr(compare, "compare", lambda *arguments: found.pop(0))

    def run(*rounds: tuple[float, float]) -> int:
        for original, fast in rounds:
            columns = {"original": original, "fast": fast}
            base = result(**{name: [value] for name, value in columns.items()})
            found.append(compare.verdict(base, result(original=[1.0], fast=[1.0])))
        code = compare.main(["x"])
        assert not found
        return code

    assert run((1.0, 1.0)) == 0  # and not measured again
    assert run((1.0, 0.9), (1.0, 1.0)) == 0
    assert run((1.0, 0.9), (1.0, 0.9)) == 1
    assert run((0.9, 1.0), (1.0, 0.9)) == 0
    capsys.readouterr()
    for original in (0.9, 1.1):
        assert run((original, 0.9), (original, 0.9)) == 2
        assert "too noisy here" in capsys.readouterr().err


def test_several_timings_of_a_column_are_each_judged(compare) -> None:
    def timed(forward: float, both: float) -> dict:
        columns = {"fast": {"forward": {"seconds": [forward]}, "both": {"seconds": [both]}}}
        return {"benchmarks": [{"fullname": "b.py::c", "extra_info": {"columns": columns}}]}

    rows = compare.verdict(timed(1.0, 1.0), timed(1.0, 2.0))
    assert [(column, slower) for _, column, _, slower in rows] == [("fast forward", ""), ("fast both", "slower")]


def test_rounds_take_turns_to_the_last(compare, tmp_path: Path) -> None:
    """Also where one has more rounds, and where one dies before its first."""
    said = tmp_path / "said"
    code = f"""
import os, sys
read, write = map(int, os.environ["{compare.TURNS}"].split(","))
for _ in range(int(sys.argv[2])):
    os.write(write, b"?")
    assert os.read(read, 1) == b"!"
    for what in ("begins", "ends"):
        with open({str(said)!r}, "a") as file:
            file.write(sys.argv[1] + " " + what + chr(10))
"""
    for rounds, expected in (((3, 3), "ABBAAB"), ((1, 3), "ABBB"), ((0, 2), "BB")):
        said.write_text("")
        sides = [
            compare.Side([sys.executable, "-c", code, name, str(count)], dict(os.environ), tmp_path / f"{name}.log")
            for name, count in zip("AB", rounds, strict=True)
        ]
        assert compare.take_turns(sides) == [0, 0]
        lines = [f"{name} {what}" for name in expected for what in ("begins", "ends")]
        assert said.read_text().splitlines() == lines


def test_a_wrong_call_says_how(compare, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([]) == 2 and "usage" in capsys.readouterr().err
    assert compare.main(["no-such-commit"]) == 2 and "no-such-commit" in capsys.readouterr().err
