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


def test_goals_are_judged_by_medians_of_the_rounds(report) -> None:
    def column(seconds: list[float], megabytes: float = 60.0, audio: float = 2560.0) -> dict:
        return {"seconds": seconds, "clips": 256, "audio_seconds": audio, "peak_bytes_a_clip": megabytes * 1e6}

    fast = column([0.07, 0.07, 0.2])
    case = {
        "original bf16": column([0.3, 0.2, 0.9]),
        "compiled bf16": column([0.084, 0.1, 0.1]),
        "fast bf16": fast,
        "fast, gelu bf16": column([0.08] * 3, 49.0),
    }
    cases = {"patch_base": case, "mixed": {"fast bf16": column([0.1] * 3)}, "equal": {"fast bf16": column([0.095] * 3)}}
    result = {"benchmarks": [{"param": name, "extra_info": {"columns": found}} for name, found in cases.items()]}
    told = [(goal, measured, reached) for _, goal, measured, reached in report.goals(result)]
    assert told == [
        ("3500", "3657", True),
        ("1.25", "1.2", False),
        ("3.7", "4.286", True),
        ("65", "60", True),
        ("50", "49", True),
        ("0.9", "0.95", True),
    ]
    case["fast, gelu bf16"] = column([0.08] * 3, 51.0)
    cases["mixed"]["fast bf16"] = column([0.11] * 3)
    assert [reached for *_, reached in report.goals(result)] == [True, False, True, True, False, False]
