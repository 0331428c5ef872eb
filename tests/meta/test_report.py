"""Tables and figures of README.md and docs match the committed result files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from policy import CONVERGED_FIRST, CONVERGED_LAST

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "reports"))
import report  # noqa: E402
import report_figures  # noqa: E402


@pytest.mark.parametrize("page", report.PAGES)
def test_pages_match_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert report.render(text, page) == text, "run python benchmarks/reports/report.py"


def test_goals_missing_columns_are_not_measured() -> None:
    """For a result without the compiled column and ``fast, gelu``, and for one without cases."""
    result = json.loads((report.RESULTS / report.STEP_CPU).read_text())
    judged = {name: (measured, reached) for name, _, measured, reached in report.goals(result)}
    assert judged["times the speed of `compiled bf16`"] == ("not measured", None)
    assert judged["MB a clip, `fast, gelu bf16`"] == ("not measured", None)
    assert judged["clips/s"][1] is False and float(judged["times the speed of `original bf16`"][0]) > 1.0
    rows = report.goals({"benchmarks": []})
    assert len(rows) == len(judged) and {row[2:] for row in rows} == {("not measured", None)}


def test_render_replaces_edited_number() -> None:
    readme = (ROOT / "README.md").read_text()
    begin = readme.index("<!-- report:data_rate_cpu -->")
    digit = next(i for i in range(begin, len(readme)) if readme[i].isdigit())
    typed = readme[:digit] + str((int(readme[digit]) + 1) % 10) + readme[digit + 1 :]
    assert report.render(typed) == readme != typed


def test_goals_use_medians_over_rounds() -> None:
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
    result = {"benchmarks": [{"param": name, "extra_info": {"columns": columns}} for name, columns in cases.items()]}
    judged = [(goal, measured, reached) for _, goal, measured, reached in report.goals(result)]
    assert judged == [
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
    compiled = {"compiled bf16": case.pop("compiled bf16"), "fast bf16": column([0.05] * 3)}  # in a separate case
    result["benchmarks"].append({"param": "patch_base compiled", "extra_info": {"columns": compiled}})
    assert report.goals(result)[1][2:] == ("2", True)


def make_column(seconds: list[float], precision: str = "fp32", **overrides: Any) -> dict[str, Any]:
    """A column of 4 clips of 10 s, 2000 tokens, 40 GFLOP, 2 MB per clip; the forward takes a quarter of each step."""
    stages = [{"forward": second / 4, "update": 3 * second / 4} for second in seconds]
    column = {"precision": precision, "loss_error": 1e-7, "steps": 1, "clips": 4, "audio_seconds": 40.0}
    column |= {"tokens": 2000, "flops": 40 * 10**9, "peak_bytes_a_clip": 2 * 10**6, "stages": stages}
    return column | {"seconds": seconds, "cpu_seconds": seconds, **overrides}


def make_case(section: str, columns: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    peak = {"seconds": [0.1] * 3, "work": 10 * 10**9}
    case = {"part": section, "factor": "", "preset": "patch_small", "clips": 4, "seconds": 10.0, "mask_ratio": 0.75}
    case |= {"encoder_layers": 12, "mixed": False, "left_out": {}, "peak": {"fp32": peak, "bf16": peak}}
    loads = {"load_average_before": [0.5], "load_average_after": [1.5]}
    return {**case, **loads, "columns": columns, **overrides}


def step_result() -> dict[str, Any]:
    """A result of bench_step.py: seconds grow with clips and the square of their length, memory linearly with both."""
    original = [{"encoder": s / 2, "backward": s / 2} for s in (2.0, 4.0, 9.0)]
    main = {
        "original": make_column([2.0, 4.0, 9.0], stages=original),
        "reference": make_column([4.0, 4.0, 4.0]),
        "fast": make_column([1.0, 1.0, 3.0]),
        "original bf16": make_column([1.0, 1.0, 1.0], "bf16", stages=original),
        "fast bf16": make_column([0.5, 0.5, 0.25], "bf16", peak_bytes_a_clip=10**6),
    }
    lengths = {"clip_seconds": [[2.0, 18.0], [4.0, 16.0]]}
    mixed = {
        "original bf16": make_column([1.0] * 3, "bf16", stages=original, audio_seconds=30.0, **lengths),
        "reference bf16": make_column([1.0] * 3, "bf16", **lengths),
    }
    against = {
        "fast, no dropout bf16": make_column([1.0] * 3, "bf16"),
        "ssast bf16": make_column([2.5] * 3, "bf16", flops=100 * 10**9, peak_bytes_a_clip=5 * 10**6),
    }
    recipe = {
        "original bf16": make_column([2.0] * 3, "bf16"),
        "recipe, adamw bf16": make_column([0.9] * 3, "bf16"),
        "recipe bf16": make_column([1.0, 1.0, 1.2], "bf16"),
    }
    cases = {
        "a": make_case("main", main),
        "mixed": make_case("main", mixed, mixed=True, left_out={"compiled bf16": "no compiler"}),
        "ssast small": make_case("ssast", against),
    }

    speeds = {"original": 1.0, "fast": 2.0}

    def swept(clips: int, seconds: float, ratio: float = 1.0) -> dict[str, Any]:
        seconds_per_step, memory = clips * seconds**2 / 400, int(10**5 * seconds)
        sizes = {"clips": clips, "audio_seconds": clips * seconds, "peak_bytes_a_clip": memory}
        return {
            f"{name} bf16": make_column([seconds_per_step / speed] * 3, "bf16", **sizes)
            for name, speed in speeds.items()
        }

    cases["sweep base"] = make_case("sweep", swept(4, 10.0))
    for clips in (1, 2, 8):
        cases[f"sweep clips {clips}"] = make_case("sweep", swept(clips, 10.0), factor="clips", clips=clips)
    for seconds in (5.0, 20.0, 40.0):
        case = make_case("sweep", swept(4, seconds), factor="seconds", seconds=seconds)
        cases[f"sweep seconds {seconds:g}"] = case
    cases["sweep mask_ratio 0.5"] = make_case("sweep", swept(4, 10.0), factor="mask_ratio", mask_ratio=0.5)
    cases["recipe quick"] = make_case("recipe", recipe)
    return {
        "machine_info": {"processor": "P", "threads": 2, "torch": "2"},
        "commit_info": {"id": "c" * 40, "dirty": False},
        "benchmarks": [{"param": name, "extra_info": case} for name, case in cases.items()],
    }


def test_step_table_uses_raw_samples() -> None:
    result = step_result()
    lines = report.step_table(result).splitlines()
    assert (
        "of 3 rounds" in lines[0] and "clips of 2.0 to 18.0 s, `original` crops the 40 s of audio to 30 s" in lines[0]
    )
    assert lines[4:9] == [
        "| a, 4 clips | original | 4 (3 - 6.5) | 1.00 x | 1 (1 - 1) | 1.00 x | 50 % | 4 | 2,000 | 40.0 | 2 | 40 % |",
        "| a, 4 clips | reference | 4 (4 - 4) | 1.00 x (0.50 - 2.25), tie |  |  | 25 % | 1 | 500 | 10.0 | 2 | 10 % |",
        "| a, 4 clips | fast | 1 (1 - 2) | 3.00 x (2.00 - 4.00) | 0.5 (0.375 - 0.5) | 2.00 x (2.00 - 4.00) "
        "| 25 % | 8 | 4,000 | 80.0 | 1 | 80 % |",
        "| mixed, 4 clips | original |  |  | 1 (1 - 1) | 1.00 x | 50 % | 4 | 2,000 | 30.0 | 2 | 40 % |",
        "| mixed, 4 clips | reference |  |  | 1 (1 - 1) | 1.33 x | 25 % | 4 | 2,000 | 40.0 | 2 | 40 % |",
    ]
    assert lines[-1] == "Left out: `compiled bf16`: no compiler."
    assert "| backward | 50.0 % | 50.0 % |" in lines
    column = result["benchmarks"][0]["extra_info"]["columns"]["reference"]
    column["seconds"] = [2.0 * second for second in column["seconds"]]
    changed = [old for old, new in zip(lines, report.step_table(result).splitlines(), strict=True) if old != new]
    assert len(changed) == 1 and "| reference |" in changed[0]


STEP_TABLES = {
    "main": report.step_table,
    "ssast": report.ssast_table,
    "recipe": report.recipe_table,
    "sweep": report.sweep_table,
}
CASE_COLUMNS = [
    (i, name) for i, case in enumerate(step_result()["benchmarks"]) for name in case["extra_info"]["columns"]
]


@pytest.mark.parametrize(("index", "name"), CASE_COLUMNS)
def test_step_tables_show_failed_column(index: int, name: str) -> None:
    result = step_result()
    case = result["benchmarks"][index]
    del case["extra_info"]["columns"][name]
    case["extra_info"]["failed"] = {name: "AssertionError: loss 1 off"}
    lines = STEP_TABLES[case["extra_info"]["part"]](result).splitlines()
    assert lines[-1] == f"Failed, not timed: `{name}` on {case['param']}: AssertionError: loss 1 off."
    report.goals(result)


def test_step_tables_without_any_column_name_the_failures() -> None:
    result = step_result()
    for case in result["benchmarks"]:
        case["extra_info"]["failed"] = dict.fromkeys(case["extra_info"]["columns"], "RuntimeError: x")
        case["extra_info"]["columns"] = {}
    for table in STEP_TABLES.values():
        assert any(f"`{name} bf16` on" in table(result) for name in ("fast", "ssast", "recipe"))


def test_ops_table_shows_failed_column() -> None:
    result = json.loads((report.RESULTS / "ops_cpu.json").read_text())
    case = result["benchmarks"][0]
    for name in list(case["extra_info"]["columns"]):
        del case["extra_info"]["columns"][name]
        case["extra_info"].setdefault("failed", {})[name] = "RuntimeError: x"
        last = report.ops_table(result).splitlines()[-1]
        assert last.startswith("Failed, not timed: ") and f"`{name}` on {case['param']}: RuntimeError: x" in last


def test_figures_with_failed_columns_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report_figures, "FIGURES", tmp_path)
    result = step_result()
    for case, name in zip(result["benchmarks"], ("fast", "original bf16", "ssast bf16", "fast bf16"), strict=False):
        del case["extra_info"]["columns"][name]
    result["benchmarks"][1]["extra_info"]["columns"] = {}
    (tmp_path / report.STEP_CPU).write_text(json.dumps(result))
    report_figures.write()
    assert (tmp_path / "step_bars.png").is_file() and (tmp_path / "waterfall.png").is_file()


def test_ssast_table_compares_mae_ast_with_ssast_and_paper() -> None:
    lines = report.ssast_table(step_result()).splitlines()
    assert "The paper reports 3 x the speed and 2 x less memory" in lines[0]
    assert lines[-2:] == [
        "| small, 4 clips | fast, no dropout bf16 | 1 (1 - 1) | 25 % | 4 | 2,000 | 40.0 | 2 | 40 % | 10.0 |  |  |  |",
        "| small, 4 clips | ssast bf16 | 2.5 (2.5 - 2.5) | 25 % | 1.6 | 800 | 16.0 | 5 | 40 % | 25.0 | 2.50 x | "
        "2.50 x | 2.50 x |",
    ]


def test_recipe_table_has_speeds_and_the_share_of_muon() -> None:
    lines = report.recipe_table(step_result()).splitlines()
    assert lines[4:7] == [
        "| quick | `original` |  |  | 2 (2 - 2) | 1.00 x |",
        "| quick | `recipe, adamw` |  |  | 0.9 (0.9 - 0.9) | 2.22 x |",
        "| quick | `recipe` |  |  | 1 (1 - 1.1) | 2.00 x (1.67 - 2.00) |",
    ]
    assert lines[8] == "What Muon adds to AdamW, as a share of the update: quick 10 % (bf16)."
    assert lines[10] == "Faster than `recipe`, or a tie: `recipe, adamw bf16` on quick, 1.11 x (1.11 - 1.33)."


def test_growth_fits_power_laws() -> None:
    result = step_result()
    for name in ("original", "fast"):
        powers = {
            (factor, quantity): round(power, 6)
            for factor in ("clips", "seconds")
            for quantity, (*_, (_, _, power)) in report.growth(result, factor)[name].items()
        }
        assert powers == {
            ("clips", "seconds"): 1.0,
            ("clips", "bytes"): 1.0,
            ("seconds", "seconds"): 2.0,
            ("seconds", "bytes"): 1.0,
        }
    lines = report.sweep_table(result).splitlines()
    assert "| length of a clip: 20 s | 1,000 | 500 | 2 | 2 | 2.00 x |" in lines
    assert [line.split(" | ")[0] for line in lines[4:-2]] == [
        *(f"| clips a batch: {clips}" for clips in (1, 2, 4, 8)),
        *(f"| length of a clip: {seconds} s" for seconds in (5, 10, 20, 40)),
        *(f"| mask ratio: {ratio}" for ratio in (0.5, 0.75)),
        "| layers of the encoder: 12",
    ]
    assert "with length of a clip, `fast` time 2.00 (fixed 0 %), memory 1.00 (fixed 0 %)" in lines[-1]


def test_law_separates_fixed_cost_from_power() -> None:
    x = [1.0, 2.0, 5.0, 10.0, 60.0]
    for a, b, p in ((7.0, 0.5, 1.0), (0.0, 2.0, 1.7), (100.0, 0.01, 2.0)):
        assert report.law(x, [a + b * value**p for value in x]) == pytest.approx((a, b, p), abs=1e-6)
    assert report.law(x, [4.0] * 5)[:2] == pytest.approx((4.0, 0.0), abs=1e-6)


def test_ranged_and_ahead_of_mark_ties() -> None:
    assert report.ranged([1.2, 1.1, 1.3]) == "1.20 x (1.10 - 1.30)"
    assert report.ranged([1.2, 0.9, 1.3]) == "1.20 x (0.90 - 1.30), tie"
    slow = make_column([1.0, 1.0, 1.0])
    columns = {"fast": slow, "sometimes": make_column([2.0, 2.0, 0.9]), "never": make_column([1.1, 2.0, 2.0])}
    assert report.ahead_of("fast", {"a": {"columns": columns}}) == ["`sometimes` on a, 0.50 x (0.50 - 1.11), tie"]


def test_mfu_uses_best_round_of_product() -> None:
    case = {"peak": {"fp32": {"seconds": [0.4, 0.1, 0.2], "work": 10**10}}}
    assert report.mfu(case, make_column([1.0, 2.0, 4.0])) == pytest.approx(20 / 100)


def test_convergence_fast_matches_reference() -> None:
    """For the committed run; the effect of the precision is read from the table."""
    result = json.loads((report.RESULTS / "convergence_cpu.json").read_text())
    distances = [abs(distance) for distance in report.distances(result, "fast")]
    assert len(distances) >= 200 and sum(distances[:20]) / 20 <= CONVERGED_FIRST
    last = {name: sum(row["loss"] for row in column["rows"][-20:]) for name, column in result["columns"].items()}
    for name, loss in last.items():
        assert abs(loss / last["reference"] - 1.0) <= CONVERGED_LAST, name


def test_benchmark_result_of_uncommitted_code_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = step_result()
    for dirty in (False, True):
        result["commit_info"]["dirty"] = dirty
        (tmp_path / "x.json").write_text(json.dumps(result))
        assert report.benchmark_result("x.json", dirty=True) == result
        if dirty:
            with pytest.raises(ValueError, match="uncommitted code"):
                report.benchmark_result("x.json", dirty=False)


def test_benchmark_result_without_commit_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = step_result()
    result["commit_info"] = {"id": None, "time": None, "dirty": None}
    (tmp_path / "x.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="names no commit"):
        report.benchmark_result("x.json", dirty=False)
    assert "commit unknown" in report.step_table(report.benchmark_result("x.json", dirty=True))


def test_figures_match_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert report_figures.stale() == [], "run python benchmarks/reports/report.py"


def test_figures_equal_results_give_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report_figures, "FIGURES", tmp_path / "figures")
    (tmp_path / report.STEP_CPU).write_text(json.dumps(step_result()))
    op = {"op": "o", "point": "base point", "unit": "bytes", "work": {"forward": 10**9}}
    op |= {"peak": {"seconds": [0.1], "work": 10**9}, "columns": {"reference": {"forward": {"seconds": [0.2]}}}}
    ops = {"commit_info": {"id": "c" * 40, "dirty": False}, "benchmarks": [{"extra_info": op}]}
    (tmp_path / "ops_cpu.json").write_text(json.dumps(ops))
    rows = [{"step": step, "loss": 9.0 / step} for step in (1, 2, 3)]
    runs = {"commit_info": {"id": "c" * 40, "dirty": False}}
    runs |= {"columns": {name: {"rows": rows} for name in ("reference", "fast")}}
    (tmp_path / "convergence_cpu.json").write_text(json.dumps(runs))
    drawn = []
    assert report_figures.stale() == list(report_figures.FIGURE_SOURCES)
    for _ in range(2):
        report_figures.write()
        drawn.append([(report_figures.FIGURES / name).read_bytes() for name in report_figures.FIGURE_SOURCES])
    assert drawn[0] == drawn[1]
    assert max(map(len, drawn[0])) < 150_000
    assert report_figures.stale() == []
    ops["benchmarks"] *= 2
    (tmp_path / "ops_cpu.json").write_text(json.dumps(ops))
    assert report_figures.stale() == ["roofline.png"]


def test_machine_page_contains_tables_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", report.RESULTS)
    monkeypatch.setattr(report_figures, "FIGURES", report_figures.FIGURES)
    result = json.loads((report.RESULTS / "masking_cpu.json").read_text())
    result["commit_info"]["dirty"] = True  # accepted for the results of another machine
    (tmp_path / "masking_cpu.json").write_text(json.dumps(result))
    text = report.machine_page(tmp_path)
    assert report.masking_table(result) in text and text.count("## ") == 1
