"""The paper's experiments in miniature: does pretraining help, which kind of it, and what do its settings change?

python benchmarks/studies/quality/run.py                every cell that is not there yet, for hours; stop it at any time
python benchmarks/studies/quality/run.py --minutes 60   begins no cell after an hour
python benchmarks/studies/quality/run.py --match ^frame-  cells of that name alone; two such runs may share a machine
                                                          where
                                               neither needs what the other makes: untrained models are made of their
                                               trained ones' statistics
python benchmarks/studies/quality/run.py --quick        a few updates and one seed in a quarter of an hour:
                                                        runs/quality_quick
python benchmarks/studies/quality/run.py --list         what is done and what is missing

A model is pretrained on the default corpus, which holds no clip that a task tests on; then it is probed and fine-tuned
on small tasks of real recordings. A cell is one JSON in results/: a pretraining (arm, budget, seed), or what a
checkpoint is worth on a task (and mode). report.py makes docs/quality.md of them.

Budgets: ``steps``, as many updates for every arm; ``time``, as many as the arm makes in the time that ``patch`` takes
for its own: both arms' rates are measured in turns just before. ``random`` and ``random frame`` are the models as they
begin, normalised by the statistics of the corpus.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import random
import re
import shutil
import statistics
import time
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
MORE_SEEDS = (3, 4)  # of the frame models against themselves untrained: three left the main task open (docs/quality.md)
MORE_SEEDS_OF = ("frame", "random frame", "frame, 6000 updates")
FRAME = {"preset": "frame_tiny"}  # masks at random


def of_frame(**model_args: Any) -> dict[str, Any]:
    """The frame model with other settings."""
    return {**FRAME, "model_args": model_args}


# What stands in the paper's tables and figures: models (table 1), mask ratio and strategy, decoder depth, objective.
# They are changed in the frame model, which is the one that learns something in so few updates.
ARMS: dict[str, dict[str, Any]] = {
    "patch": {},
    "random": {},
    "frame": FRAME,
    "random frame": FRAME,
    "ssast": {"model": "ssast"},
    "frame, 500 updates": {**FRAME, "steps": 500},
    "frame, 6000 updates": {**FRAME, "steps": 6000},  # recipes/frame.yaml
    "mask 0.5": of_frame(mask_ratio=0.5),
    "mask 0.9": of_frame(mask_ratio=0.9),
    "masking span": of_frame(masking="span"),
    "decoder 1": of_frame(decoder_layers=1),
    "decoder 4": of_frame(decoder_layers=4),
    "generative": of_frame(classification_weight=0.0),
    "discriminative": of_frame(reconstruction_weight=0.0),
    "patch, first command": {"lr": 1.5e-3, "warmup_steps": 100, "steps": 1600},  # recipes/quick.yaml
    "patch, masking random": {"model_args": {"masking": "random"}},
}
MODELS = ("patch", "frame", "ssast")  # those that get the budget of time, too
UNTRAINED = {"random": "patch", "random frame": "frame"}  # which arm's model it is, as it begins
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
# The same clips with the command's own epochs and batches, and so many of each class to train on and to choose by.
VARIANTS = {"zh_initial22_30_epochs": ("zh_initial22", None), "zh_initial22_5": ("zh_initial22", 5)}
FINETUNED = ("zh_initial22", "zh_initial22_30_epochs", "zh_initial22_5", "vocal4")  # of others five folds take long
LONGER = "zh_initial22_30_epochs"  # fine-tuned alone, of MORE_SEEDS_OF at equal steps
PROBED = tuple(task for task in TASKS if task != LONGER)
ABLATED = (("finetune", "zh_initial22"), ("probe", "zh_initial22"), ("probe", "vocal4"), ("probe", "esc14"))
POOL = "bands"


@dataclass(frozen=True)
class Cell:
    """A pretraining, or with ``task`` and ``mode`` what it is worth."""

    arm: str
    budget: str
    seed: int
    task: str = ""
    mode: str = ""

    @property
    def name(self) -> str:
        parts = [self.arm.replace(",", "").replace(" ", "_"), self.budget, f"seed{self.seed}", self.mode, self.task]
        return "-".join(part for part in parts if part)


def cells() -> list[Cell]:
    """All of them, the most wanted first."""
    found = []
    for seed in SEEDS:
        pairs = [(arm, "steps") for arm in ("patch", "random", "frame", "random frame", "ssast")]
        pairs += [(arm, "time") for arm in MODELS if arm != "patch"]  # patch sets the time
        found += [cell for pair in pairs for cell in _of(*pair, seed)]
    for seed in MORE_SEEDS:
        found += [cell for arm in MORE_SEEDS_OF for cell in _of(arm, "steps", seed)]
    for seed in SEEDS:
        for arm in ABLATION_OF:
            found += _of(arm, "steps", seed)
    return found


def _of(arm: str, budget: str, seed: int) -> list[Cell]:
    longer = arm in MORE_SEEDS_OF and budget == "steps"
    modes = [("finetune", task) for task in FINETUNED if longer or task != LONGER]
    modes += [("probe", task) for task in PROBED]
    if arm in ABLATION_OF and ARMS[arm].get("steps", STEPS) <= STEPS:
        modes = ABLATED
    return [Cell(arm, budget, seed), *(Cell(arm, budget, seed, task, mode) for mode, task in modes)]


class Grid:
    """Runs cells that are not there yet."""

    def __init__(self, work: Path, results: Path, bundle: Path | None, scale: float) -> None:
        self.work, self.results, self.bundle, self.scale = work, results, bundle, scale
        self.results.mkdir(parents=True, exist_ok=True)
        self.cache = corpus.default_cache()

    def path(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"

    def run(self, cell: Cell) -> None:
        begun = time.perf_counter()
        told = self.downstream(cell) if cell.task else self.pretrain(cell)
        write_json(
            self.path(cell),
            {
                **{name: getattr(cell, name) for name in ("arm", "budget", "seed", "task", "mode")},
                **told,
                "seconds": round(time.perf_counter() - begun, 1),
                **_where(),
            },
        )

    def options(self, cell: Cell, **more: Any) -> PretrainOptions:
        given = dict(ARMS[cell.arm])
        sizes = {"layers": SIZES["encoder_layers"]} if given.get("model") == "ssast" else {**SIZES, **NO_DROPOUT}
        return PretrainOptions(
            **{
                "out": str(self.checkpoint(cell)),
                "preset": "patch_tiny",
                "lr": 5e-4,
                "warmup_steps": 200,
                **given,
                "model_args": {**sizes, **given.get("model_args", {})},
                "seed": cell.seed,
                "batch_seconds": 40.0,
                "log_every": 20,
                "save_every": 10**6,
                "evaluate_every": 10**6,
                "loader_workers": 0,
                "keep": 1,
                **more,
            }
        )

    def checkpoint(self, cell: Cell) -> Path:
        return self.work / Cell(cell.arm, cell.budget, cell.seed).name

    def model(self, cell: Cell) -> Path:
        """The checkpoint of a cell's pretraining, made again where it is gone: results alone are kept."""
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
            shutil.rmtree(out)  # a broken off one: its seconds would not be those of a run
        summary = pretrain(self.options(cell, steps=steps))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        kept = ("steps", "train_seconds", "audio_hours_seen", "clips_per_second", "config", "held_out")
        return {name: summary[name] for name in kept}

    def rate(self, cell: Cell) -> float:
        """Updates that an arm makes while ``patch`` makes one: the median over rounds in turns."""
        ratios = []
        for _ in range(RATE_ROUNDS):
            seconds = []
            for arm in ("patch", cell.arm):
                trial = self.work / f"trial-{cell.name}"
                shutil.rmtree(trial, ignore_errors=True)
                of = Cell(arm, "steps", cell.seed)
                summary = pretrain(self.options(of, out=str(trial), steps=RATE_STEPS, warmup_steps=10))
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
        given = {"data": str(self.manifest(cell)), "checkpoint": str(checkpoint), "out": str(out)}
        given |= {"pool": POOL, "seed": cell.seed, "root": str(folder)}
        if cell.mode == "probe":
            summary = probe(ProbeOptions(**given))
        else:
            epochs = max(1, round(TASKS[cell.task]["epochs"] * min(1.0, self.scale * 2)))
            summary = finetune(FinetuneOptions(**{**given, **TASKS[cell.task], "epochs": epochs}))
        with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
            right = {row["path"]: int(row["label"] == row["pred"]) for row in csv.DictReader(file)}
        shutil.rmtree(out)
        kept = ("metric", "value", "ci95", "n_test", "per_fold", "macro_f1", "majority_accuracy", "chosen")
        told = {name: summary[name] for name in kept}
        if baseline := summary.get("log_mel_baseline"):
            told["log_mel"] = baseline["value"]
        told["audio"] = "bundle" if self.bundle else "rebuilt"
        return {**told, "right": "".join(str(right[path]) for path in sorted(right))}

    def manifest(self, cell: Cell) -> Path:
        """The task's manifest; its audio is rebuilt from Debian packages where it is not there."""
        task, count = VARIANTS.get(cell.task, (cell.task, None))
        path = (self.bundle or self.cache) / "tasks" / f"{task}.tsv"
        if not self.bundle and not path.exists():
            small_tasks.build([task], path.parent)
        if count is None:
            return path
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        rng, kept = random.Random(cell.seed), []
        for part in sorted({(row["split"], row["label"]) for row in rows}):
            members = [row for row in rows if (row["split"], row["label"]) == part]
            kept += members if part[0] == "test" else rng.sample(members, min(count, len(members)))
        path = self.work / f"{cell.name}.tsv"
        datasets.write_manifest(kept, path)
        return path


def _where() -> dict[str, Any]:
    """Commit and machine, as the benchmarks tell them."""
    place = RESULTS.parents[2] / "conftest.py"  # by its path: pytest has others of its name
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", place)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return {
        "commit": conftest.pytest_benchmark_generate_commit_info(),
        "machine": conftest.pytest_benchmark_generate_machine_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--match", default="", help="a regular expression that is found in the names of cells to run")
    parser.add_argument("--quick", action="store_true", help="a sixth of the updates, one seed, results in runs/")
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
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
    missing = [cell for cell in wanted if not grid.path(cell).exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there", flush=True)
    if arguments.list:
        print("\n".join(f"missing: {cell.name}" for cell in missing))
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    begun = time.monotonic()
    for number, cell in enumerate(missing, 1):
        if grid.path(cell).exists():  # another run was faster, or it was needed for the one before
            continue
        if arguments.minutes is not None and time.monotonic() - begun > 60 * arguments.minutes:
            break
        spent = (time.monotonic() - begun) / 60
        print(f"[{number}/{len(missing)}, {spent:.0f} minutes] {cell.name}", flush=True)
        grid.run(cell)
    if arguments.quick:
        import report  # which imports this file

        page = grid.work / "report.md"
        page.write_text(report.text(report.read(grid.results), wanted) + "\n")
        print(f"{page}: tables")


if __name__ == "__main__":
    main()
