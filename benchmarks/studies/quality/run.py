"""The paper's experiments in miniature: whether pretraining helps, which kind, and the effect of its settings.

python benchmarks/studies/quality/run.py                run every missing cell, for hours; may be stopped at any time
python benchmarks/studies/quality/run.py --minutes 60   start no cell after an hour
python benchmarks/studies/quality/run.py --match ^frame-  run only cells with matching names. Two such runs may share a
                                                          machine if neither needs a model of the other: untrained
                                                          models use the statistics of their trained ones
python benchmarks/studies/quality/run.py --quick        a few updates and one seed in a quarter of an hour:
                                                        runs/quality_quick
python benchmarks/studies/quality/run.py --list         list finished and missing cells

A model is pretrained on the default corpus, which contains no test clip of a task. Then it is probed and fine-tuned on
small tasks of real recordings. A cell is one JSON file in results/: a pretraining (arm, budget, seed), or the score of
a checkpoint on a task (and mode). report.py writes docs/quality.md from them.

Budgets: ``steps`` is the same number of updates for every arm; ``time`` is the number of updates that the arm makes in
the time that ``patch`` needs for its own. The rates of both arms are measured in turns just before. ``random`` and
``random frame`` are untrained models, normalised by the statistics of the corpus.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae_ast_fast import MAEAST
from mae_ast_fast.data import corpus
from mae_ast_fast.downstream import datasets, small_tasks
from mae_ast_fast.downstream.finetune import finetune
from mae_ast_fast.downstream.options import FinetuneOptions, ProbeOptions
from mae_ast_fast.downstream.probe import probe
from mae_ast_fast.files import write_json
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"embed_dim": 192, "encoder_layers": 4, "decoder_layers": 2, "norm_first": True}
NO_DROPOUT = dict.fromkeys(
    ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0
)
STEPS, RATE_STEPS, RATE_ROUNDS = 3000, 60, 3
SEEDS = (0, 1, 2)
MORE_SEEDS = (
    3,
    4,
)  # for frame models, trained and untrained: three seeds were inconclusive on the main task (docs/quality.md)
MORE_SEEDS_OF = ("frame", "random frame", "frame, 6000 updates")
FRAME = {"preset": "frame_tiny"}  # random masks


def frame_arm(**model_args: Any) -> dict[str, Any]:
    """An arm of the frame model with other settings."""
    return {**FRAME, "model_args": model_args}


# The factors of the paper's tables and figures: models (table 1), mask ratio and strategy, decoder depth, objective.
# They are varied in the frame model, which is the only one that learns something in so few updates.
ARMS: dict[str, dict[str, Any]] = {
    "patch": {},
    "random": {},
    "frame": FRAME,
    "random frame": FRAME,
    "ssast": {"model": "ssast"},
    "frame, 500 updates": {**FRAME, "steps": 500},
    "frame, 6000 updates": {**FRAME, "steps": 6000},  # an earlier recipes/frame.yaml
    "mask 0.5": frame_arm(mask_ratio=0.5),
    "mask 0.9": frame_arm(mask_ratio=0.9),
    "masking span": frame_arm(masking="span"),
    "decoder 1": frame_arm(decoder_layers=1),
    "decoder 4": frame_arm(decoder_layers=4),
    "generative": frame_arm(classification_weight=0.0),
    "discriminative": frame_arm(reconstruction_weight=0.0),
    "patch, first command": {"lr": 1.5e-3, "warmup_steps": 100, "steps": 1600},  # an earlier recipes/quick.yaml
    "patch, masking random": {"model_args": {"masking": "random"}},
}
MODELS = ("patch", "frame", "ssast")  # models that also have the budget ``time``
UNTRAINED = {"random": "patch", "random frame": "frame"}  # untrained arm -> arm with the same model
ABLATION_OF = {arm: "patch" if arm.startswith("patch") else "frame" for arm in ARMS if arm not in (*MODELS, *UNTRAINED)}
MAIN = ("zh_initial22", "finetune")  # declared before the cells were run; see docs/quality.md
TASKS = {
    "zh_initial22": {"epochs": 15, "batch_size": 32},
    "zh_initial22_30_epochs": {"epochs": 30, "batch_size": 16},
    "zh_initial22_5": {"epochs": 30, "batch_size": 16},
    "vocal4": {"epochs": 15, "batch_size": 16},
    "esc14": {"epochs": 15, "batch_size": 32},
    "hogvoice14": {"epochs": 15, "batch_size": 32},
}
# Variant -> (task, number of training and validation clips per class; None: all).
VARIANTS = {"zh_initial22_30_epochs": ("zh_initial22", None), "zh_initial22_5": ("zh_initial22", 5)}
FINETUNED = (
    "zh_initial22",
    "zh_initial22_30_epochs",
    "zh_initial22_5",
    "vocal4",
)  # the other tasks have five folds, which take long
LONG_TASK = "zh_initial22_30_epochs"  # only for fine-tuning, for MORE_SEEDS_OF with the budget ``steps``
PROBED = tuple(task for task in TASKS if task != LONG_TASK)
ABLATED = (("finetune", "zh_initial22"), ("probe", "zh_initial22"), ("probe", "vocal4"), ("probe", "esc14"))
POOL = "bands"


@dataclass(frozen=True)
class Cell:
    """A pretraining or, with ``task`` and ``mode``, its score on a task."""

    arm: str
    budget: str
    seed: int
    task: str = ""
    mode: str = ""

    @property
    def name(self) -> str:
        name_parts = [
            self.arm.replace(",", "").replace(" ", "_"),
            self.budget,
            f"seed{self.seed}",
            self.mode,
            self.task,
        ]
        return "-".join(name_part for name_part in name_parts if name_part)


def cells() -> list[Cell]:
    """All cells, most important first."""
    ordered = []
    for seed in SEEDS:
        pairs = [(arm, "steps") for arm in ("patch", "random", "frame", "random frame", "ssast")]
        pairs += [(arm, "time") for arm in MODELS if arm != "patch"]  # patch sets the time
        ordered += [cell for arm, budget in pairs for cell in cells_of(arm, budget, seed)]
    for seed in MORE_SEEDS:
        ordered += [cell for arm in MORE_SEEDS_OF for cell in cells_of(arm, "steps", seed)]
    for seed in SEEDS:
        for arm in ABLATION_OF:
            ordered += cells_of(arm, "steps", seed)
    return ordered


def cells_of(arm: str, budget: str, seed: int) -> list[Cell]:
    longer = arm in MORE_SEEDS_OF and budget == "steps"
    modes = [("finetune", task) for task in FINETUNED if longer or task != LONG_TASK]
    modes += [("probe", task) for task in PROBED]
    if arm in ABLATION_OF and ARMS[arm].get("steps", STEPS) <= STEPS:
        modes = ABLATED
    return [Cell(arm, budget, seed), *(Cell(arm, budget, seed, task, mode) for mode, task in modes)]


class Grid:
    """Runs missing cells."""

    def __init__(self, work: Path, results: Path, bundle: Path | None, scale: float) -> None:
        self.work, self.results, self.bundle, self.scale = work, results, bundle, scale
        self.results.mkdir(parents=True, exist_ok=True)
        self.cache = corpus.default_cache()

    def path(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"

    def run(self, cell: Cell) -> None:
        start = time.perf_counter()
        outcome = self.downstream(cell) if cell.task else self.pretrain(cell)
        write_json(
            self.path(cell),
            {
                **{name: getattr(cell, name) for name in ("arm", "budget", "seed", "task", "mode")},
                **outcome,
                "seconds": round(time.perf_counter() - start, 1),
                **_provenance(),
            },
        )

    def run_missing(self, wanted: Sequence[Cell], *, list_only: bool = False, minutes: float = math.inf) -> None:
        """Run or list the cells without a result; start none after ``minutes``."""
        missing = [cell for cell in wanted if not self.path(cell).exists()]
        print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are finished", flush=True)
        if list_only:
            print("\n".join(f"missing: {cell.name}" for cell in missing))
            return
        start = time.monotonic()
        for index, cell in enumerate(missing, 1):
            if self.path(cell).exists():  # finished by another run, or needed by an earlier cell
                continue
            elapsed = (time.monotonic() - start) / 60
            if elapsed > minutes:
                break
            print(f"[{index}/{len(missing)}, {elapsed:.0f} minutes] {cell.name}", flush=True)
            self.run(cell)

    def options(self, cell: Cell, **overrides: Any) -> PretrainOptions:
        arm_options = dict(ARMS[cell.arm])
        sizes = {"layers": SIZES["encoder_layers"]} if arm_options.get("model") == "ssast" else {**SIZES, **NO_DROPOUT}
        return PretrainOptions(
            **{
                "out": str(self.checkpoint(cell)),
                "preset": "patch_tiny",
                "lr": 5e-4,
                "warmup_steps": 200,
                **arm_options,
                "model_args": {**sizes, **arm_options.get("model_args", {})},
                "seed": cell.seed,
                "batch_seconds": 40.0,
                "log_every": 20,
                "save_every": 10**6,
                "evaluate_every": 10**6,
                "loader_workers": 0,
                "keep": 1,
                **overrides,
            }
        )

    def checkpoint(self, cell: Cell) -> Path:
        return self.work / Cell(cell.arm, cell.budget, cell.seed).name

    def model(self, cell: Cell) -> Path:
        """Checkpoint of a cell's pretraining, trained again if it is missing (only results are kept)."""
        folder = self.checkpoint(cell)
        if not (folder / "model.safetensors").exists():
            self.pretrain(Cell(cell.arm, cell.budget, cell.seed))
        return folder

    def pretrain(self, cell: Cell) -> dict[str, Any]:
        out = self.checkpoint(cell)
        if cell.arm in UNTRAINED:
            return self.untrained(cell)
        steps = round(ARMS[cell.arm].get("steps", STEPS) * self.scale)
        if cell.budget == "time":
            steps = round(steps * self.rate(cell))
        if out.exists():
            shutil.rmtree(out)  # an interrupted run: resuming would give wrong seconds
        summary = pretrain(self.options(cell, steps=steps))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        keys = ("steps", "train_seconds", "audio_hours_seen", "clips_per_second", "config", "held_out")
        return {name: summary[name] for name in keys}

    def rate(self, cell: Cell) -> float:
        """Updates of an arm per update of ``patch``: the median over rounds in which both take turns."""
        ratios = []
        for _ in range(RATE_ROUNDS):
            seconds = []
            for arm in ("patch", cell.arm):
                trial = self.work / f"trial-{cell.name}"
                shutil.rmtree(trial, ignore_errors=True)
                trial_cell = Cell(arm, "steps", cell.seed)
                summary = pretrain(self.options(trial_cell, out=str(trial), steps=RATE_STEPS, warmup_steps=10))
                seconds.append(summary["train_seconds"])
                shutil.rmtree(trial)
            ratios.append(seconds[0] / seconds[1])
        return statistics.median(ratios)

    def untrained(self, cell: Cell) -> dict[str, Any]:
        trained = MAEAST.from_pretrained(self.model(Cell(UNTRAINED[cell.arm], "steps", cell.seed)))
        torch.manual_seed(cell.seed)
        model = MAEAST(trained.config)
        model.input_norm.load_state_dict(trained.input_norm.state_dict())
        model.save_pretrained(self.checkpoint(cell))
        return {"steps": 0, "config": model.config.to_dict()}

    def downstream(self, cell: Cell) -> dict[str, Any]:
        checkpoint = self.model(cell)
        out = self.work / cell.name
        shutil.rmtree(out, ignore_errors=True)
        folder = self.bundle or self.cache / "tasks"
        options = {"data": str(self.manifest(cell)), "checkpoint": str(checkpoint), "out": str(out)}
        options |= {"pool": POOL, "seed": cell.seed, "root": str(folder)}
        if cell.mode == "probe":
            summary = probe(ProbeOptions(**options))
        else:
            epochs = max(1, round(TASKS[cell.task]["epochs"] * min(1.0, self.scale * 2)))
            summary = finetune(FinetuneOptions(**{**options, **TASKS[cell.task], "epochs": epochs}))
        return self.outcome(summary, out)

    def outcome(self, summary: dict[str, Any], out: Path) -> dict[str, Any]:
        """What a cell keeps of a run's summary and predictions. The run folder is deleted."""
        with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
            correct = {row["path"]: int(row["label"] == row["pred"]) for row in csv.DictReader(file)}
        shutil.rmtree(out)
        keys = ("metric", "value", "ci95", "n_test", "per_fold", "macro_f1", "majority_accuracy", "chosen")
        outcome = {name: summary[name] for name in keys}
        if baseline := summary.get("log_mel_baseline"):
            outcome["log_mel"] = baseline["value"]
        outcome["audio"] = "bundle" if self.bundle else "rebuilt"
        return {**outcome, "right": "".join(str(correct[path]) for path in sorted(correct))}

    def manifest(self, cell: Cell) -> Path:
        """Manifest of the task; missing audio is rebuilt from Debian packages."""
        task, count = VARIANTS.get(cell.task, (cell.task, None))
        path = (self.bundle or self.cache) / "tasks" / f"{task}.tsv"
        if not self.bundle and not path.exists():
            small_tasks.build([task], path.parent)
        if count is None:
            return path
        with open(path, newline="", encoding="utf-8") as file:
            entries = list(csv.DictReader(file, delimiter="\t"))
        rng, selected = random.Random(cell.seed), []
        for group in sorted({(entry["split"], entry["label"]) for entry in entries}):
            members = [entry for entry in entries if (entry["split"], entry["label"]) == group]
            selected += members if group[0] == "test" else rng.sample(members, min(count, len(members)))
        path = self.work / f"{cell.name}.tsv"
        datasets.write_manifest(selected, path)
        return path


def _provenance() -> dict[str, Any]:
    """Commit and machine, as in the benchmarks' results."""
    path = RESULTS.parents[2] / "conftest.py"  # by path, because pytest loads other modules of this name
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", path)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return {
        "commit": conftest.pytest_benchmark_generate_commit_info(),
        "machine": conftest.pytest_benchmark_generate_machine_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after this time")
    parser.add_argument("--match", default="", help="run only cells whose names match this regular expression")
    parser.add_argument("--quick", action="store_true", help="a sixth of the updates, one seed, results in runs/")
    parser.add_argument("--list", action="store_true", help="list finished and missing cells")
    parser.add_argument("--bundle", type=Path, help="folder with tasks/ and audio/: ready-made audio of the tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="checkpoints (default: runs/quality)")
    arguments = parser.parse_args()
    grid = Grid(arguments.work, RESULTS, arguments.bundle, 1.0)
    wanted = cells()
    if arguments.quick:
        grid = Grid(Path("runs/quality_quick"), Path("runs/quality_quick/results"), arguments.bundle, 1 / 6)
        wanted = [c for c in wanted if c.seed == 0 and c.arm in (*MODELS, *UNTRAINED) and c.budget == "steps"]
        quick = (("", ""), ("finetune", "zh_initial22"), ("probe", "zh_initial22"), ("probe", "vocal4"))
        wanted = [c for c in wanted if (c.mode, c.task) in quick]
    wanted = [cell for cell in wanted if re.search(arguments.match, cell.name)]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    grid.run_missing(wanted, list_only=arguments.list, minutes=arguments.minutes)
    if arguments.quick and not arguments.list:
        import report  # which imports this file

        page = grid.work / "report.md"
        page.write_text(report.text(report.read(grid.results), wanted) + "\n")
        print(f"{page}: tables")


if __name__ == "__main__":
    main()
