"""The cells of benchmarks/studies/quality, and the pages generated from them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def modules():
    """run and report of benchmarks/studies/quality, imported temporarily because their names are ambiguous."""
    folder = str(ROOT / "benchmarks/studies/quality")
    names = ("run", "peers", "report")
    replaced = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        import report
        import run

        yield run, report
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(replaced)


def make_cell(arm: str, seed: int, right: str, budget: str = "steps") -> dict:
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


def test_cells_are_unique_and_main_ones_first(modules):
    run, _ = modules
    ordered = run.cells()
    assert len({wanted.name for wanted in ordered}) == len(ordered) == len(set(ordered))
    assert {wanted.arm for wanted in ordered} == set(run.ARMS)
    assert {wanted.arm for wanted in ordered if wanted.seed > 2} == {"frame", "random frame", "frame, 6000 updates"}
    assert {wanted.seed for wanted in ordered} == {0, 1, 2, 3, 4}
    for wanted in ordered:  # a model comes before its tasks, and before the untrained model that uses its statistics
        if wanted.task:
            assert ordered.index(run.Cell(wanted.arm, wanted.budget, wanted.seed)) < ordered.index(wanted)
    for arm, trained in run.UNTRAINED.items():
        assert ordered.index(run.Cell(trained, "steps", 0)) < ordered.index(run.Cell(arm, "steps", 0))
    assert [wanted.arm for wanted in ordered].index("decoder 1") > [wanted.seed for wanted in ordered].index(2)
    assert run.MAIN == ("zh_initial22", "finetune")
    assert run.MAIN[0] in run.FINETUNED


def test_manifest_few_labels_samples_per_class(modules, tmp_path):
    """Training and validation have 5 clips per class, the test split is complete; all arms get the same clips."""
    run, _ = modules
    rows = [(f"{i}.wav", "ab"[i % 2], ["train", "valid", "test"][i // 2 % 3]) for i in range(120)]
    (tmp_path / "tasks").mkdir()
    table = "\n".join("\t".join(row) for row in [("path", "label", "split"), *rows])
    (tmp_path / "tasks/zh_initial22.tsv").write_text(table)
    grid = run.Grid(tmp_path / "work", tmp_path / "results", tmp_path, 1.0)
    path = grid.manifest(run.Cell("frame", "steps", 1, "zh_initial22_5", "finetune"))
    selected = [tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]]
    assert set(selected) <= set(rows)
    assert Counter(row[1:] for row in selected) == {
        **{(label, split): 5 for label in "ab" for split in ("train", "valid")},
        **{(label, "test"): 20 for label in "ab"},
    }
    texts = {
        (arm, seed): grid.manifest(run.Cell(arm, "steps", seed, "zh_initial22_5", "probe")).read_text()
        for arm in ("frame", "random frame")
        for seed in (1, 2)
    }
    assert texts["frame", 1] == texts["random frame", 1] == path.read_text() != texts["frame", 2]


def test_options_every_arm_is_valid(modules, tmp_path):
    run, _ = modules
    grid = run.Grid(tmp_path, tmp_path / "results", None, 1.0)
    for arm in run.ARMS:
        options = grid.options(run.Cell(arm, "steps", 1), steps=5)
        assert options.seed == 1
        options.model_config()


def test_run_writes_cell_with_provenance(modules, tmp_path, monkeypatch):
    run, report = modules
    monkeypatch.setattr(run.Grid, "downstream", lambda grid, cell: {"value": 0.5, "right": "10"})
    run.Grid(tmp_path, tmp_path / "results", None, 1.0).run(run.Cell("mask 0.5", "steps", 2, "esc14", "probe"))
    (result,) = report.read(tmp_path / "results")
    assert (result["arm"], result["seed"], result["task"], result["right"]) == ("mask 0.5", 2, "esc14", "10")
    assert {"id", "dirty"} <= set(result["commit"])
    assert {"processor", "threads"} <= set(result["machine"])


def test_difference_pairs_clips_and_seeds(modules):
    _, report = modules
    arm_cells = {0: make_cell("patch", 0, "1110" * 50), 1: make_cell("patch", 1, "1100" * 50)}
    baseline_cells = {
        0: make_cell("random", 0, "1010" * 50),
        1: make_cell("random", 1, "1100" * 50),
        2: make_cell("random", 2, "0000" * 50),
    }
    mean, low, high, seeds = report.difference(arm_cells, baseline_cells)
    assert (mean, seeds) == (0.125, 2)
    assert low <= 0.0 and high >= 0.2  # the difference is 0.25 for the first seed and 0 for the second
    assert report.difference(arm_cells, arm_cells)[:3] == (0.0, 0.0, 0.0)
    assert report.against(arm_cells, baseline_cells).startswith("+12.5 (")
    assert report.against(arm_cells, {}) == ""


def test_text_frozen_networks_have_rows_of_their_own(modules):
    """They are no cells of the grid: its counts leave them out. Every seed of ours is compared with them."""
    run, report = modules
    ours = [make_cell("frame, 6000 updates", seed, "1100") for seed in (0, 1)]
    peer = make_cell("aiSFX", 0, "0100", "frozen")
    for cell in (*ours, peer):
        cell |= {"mode": "probe", "log_mel": 0.25}
    wanted = [run.Cell(cell["arm"], "steps", cell["seed"], "zh_initial22", "probe") for cell in ours]
    without, text = report.text(ours, wanted), report.text([*ours, peer], wanted)
    assert "2 of 2 cells" in text and "aiSFX" not in without
    assert "| aiSFX (frozen, of a public wheel) |  |  |  |  |  |  |  |  | 0.250 |" in text
    assert "| frame, 6000 updates | aiSFX | 2 | +25.0 (" in text


@pytest.mark.ci
def test_pages_match_cells(modules):
    _, report = modules
    new = report.pages(report.read())
    assert [path.name for path in new] == ["quality.md", "README.md"]
    for path, content in new.items():
        assert path.read_text() == content
