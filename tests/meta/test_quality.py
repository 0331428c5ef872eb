"""The cells of benchmarks/studies/quality and what is told of them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def modules():
    """benchmarks/studies/quality's run and report, whose names are too plain to stay importable."""
    place = str(ROOT / "benchmarks/studies/quality")
    hidden = {name: sys.modules.pop(name) for name in ("run", "report") if name in sys.modules}
    sys.path.insert(0, place)
    try:
        import report
        import run

        yield run, report
    finally:
        sys.path.remove(place)
        for name in ("run", "report"):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def cell(arm: str, seed: int, right: str, budget: str = "steps") -> dict:
    task = {"task": "zh_initial22", "mode": "finetune"}
    machine = {"machine": {"processor": "CPU", "threads": 2}, "commit": {"id": "0123456789abcdef", "dirty": False}}
    value = right.count("1") / len(right)
    return {
        "arm": arm,
        "budget": budget,
        "seed": seed,
        **task,
        "value": value,
        "right": right,
        "seconds": 60.0,
        **machine,
    }


def test_cells_are_different_and_the_main_ones_come_first(modules):
    run, _ = modules
    found = run.cells()
    assert len({c.name for c in found}) == len(found) == len(set(found))
    assert {c.arm for c in found} == set(run.ARMS)
    assert {c.arm for c in found if c.seed > 2} == {"frame", "random frame", "frame, 6000 updates"}
    assert {c.seed for c in found} == {0, 1, 2, 3, 4}
    for c in found:  # a model is pretrained before it is used, the one whose statistics another takes before that
        if c.task:
            assert found.index(run.Cell(c.arm, c.budget, c.seed)) < found.index(c)
    for arm, of in run.UNTRAINED.items():
        assert found.index(run.Cell(of, "steps", 0)) < found.index(run.Cell(arm, "steps", 0))
    assert [c.arm for c in found].index("decoder 1") > [c.seed for c in found].index(2)
    assert run.MAIN == ("zh_initial22", "finetune")
    assert run.MAIN[0] in run.FINETUNED


def test_a_task_of_few_labels(modules, tmp_path):
    """So many clips of each class to train on and to choose by; the test is the whole task's, for every arm alike."""
    run, _ = modules
    rows = [(f"{i}.wav", "ab"[i % 2], ["train", "valid", "test"][i // 2 % 3]) for i in range(120)]
    (tmp_path / "tasks").mkdir()
    table = "\n".join("\t".join(row) for row in [("path", "label", "split"), *rows])
    (tmp_path / "tasks/zh_initial22.tsv").write_text(table)
    grid = run.Grid(tmp_path / "work", tmp_path / "results", tmp_path, 1.0)
    path = grid.manifest(run.Cell("frame", "steps", 1, "zh_initial22_5", "finetune"))
    found = [tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]]
    assert set(found) <= set(rows)
    assert Counter(row[1:] for row in found) == {
        **{(label, split): 5 for label in "ab" for split in ("train", "valid")},
        **{(label, "test"): 20 for label in "ab"},
    }
    texts = {
        (arm, seed): grid.manifest(run.Cell(arm, "steps", seed, "zh_initial22_5", "probe")).read_text()
        for arm in ("frame", "random frame")
        for seed in (1, 2)
    }
    assert texts["frame", 1] == texts["random frame", 1] == path.read_text() != texts["frame", 2]


def test_every_arm_is_a_run(modules, tmp_path):
    run, _ = modules
    grid = run.Grid(tmp_path, tmp_path / "results", None, 1.0)
    for arm in run.ARMS:
        options = grid.options(run.Cell(arm, "steps", 1), steps=5)
        assert options.seed == 1
        options.model_config()


def test_a_cell_says_what_it_is_of(modules, tmp_path, monkeypatch):
    run, report = modules
    monkeypatch.setattr(run.Grid, "downstream", lambda grid, of: {"value": 0.5, "right": "10"})
    run.Grid(tmp_path, tmp_path / "results", None, 1.0).run(run.Cell("mask 0.5", "steps", 2, "esc14", "probe"))
    (found,) = report.read(tmp_path / "results")
    assert (found["arm"], found["seed"], found["task"], found["right"]) == ("mask 0.5", 2, "esc14", "10")
    assert {"id", "dirty"} <= set(found["commit"])
    assert {"processor", "threads"} <= set(found["machine"])


def test_differences_are_paired(modules):
    _, report = modules
    ours = {0: cell("patch", 0, "1110" * 50), 1: cell("patch", 1, "1100" * 50)}
    theirs = {0: cell("random", 0, "1010" * 50), 1: cell("random", 1, "1100" * 50), 2: cell("random", 2, "0000" * 50)}
    mean, low, high, seeds = report.difference(ours, theirs)
    assert (mean, seeds) == (0.125, 2)
    assert low <= 0.0 and high >= 0.2  # the second seed has no difference, the first one of 0.25
    assert report.difference(ours, ours)[:3] == (0.0, 0.0, 0.0)
    assert report.against(ours, theirs).startswith("+12.5 (")
    assert report.against(ours, {}) == ""


@pytest.mark.ci
def test_the_page_is_what_the_cells_give(modules):
    _, report = modules
    new = report.pages(report.read())
    assert [path.name for path in new] == ["quality.md", "README.md"]
    for path, content in new.items():
        assert path.read_text() == content
