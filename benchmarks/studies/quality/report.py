"""Write docs/quality.md, its figure and README's table of settings from the cells in results/.

python benchmarks/studies/quality/report.py            write
python benchmarks/studies/quality/report.py --check    fail if a page differs from the generated one
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS
from run import ABLATED, ABLATION_OF, ARMS, FINETUNED, MAIN, PROBED, RESULTS, UNTRAINED, VARIANTS, Cell, cells

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PAGE, README, FIGURE = ROOT / "docs/quality.md", ROOT / "README.md", ROOT / "docs/figures/quality.png"
BEGIN, END = "<!-- report:quality -->", "<!-- /report -->"
RESAMPLES = 2000
COLUMNS = [("finetune", task) for task in FINETUNED] + [("probe", task) for task in PROBED]
_DIFFERENCES = (
    "Differences of accuracy in points with 95 % bootstrap intervals, clips paired. With one seed the interval is over "
    "test clips alone: it is about these two models, and another seed of the same settings may fall outside. A tie is "
    "what cannot be told apart; of so many intervals some miss by chance."
)

Key = tuple[str, str, str, str]  # arm, budget, mode, task
Pair = tuple[str, str, str, str]  # arm, budget, baseline, budget of the baseline
_BEST = ("frame, 6000 updates", "steps")  # is compared with the frozen networks of peers.py


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def grouped(results: list[dict[str, Any]]) -> dict[Key, dict[int, dict[str, Any]]]:
    """(arm, budget, mode, task) -> seed -> cell."""
    groups: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell in results:
        groups[cell["arm"], cell["budget"], cell["mode"], cell["task"]][cell["seed"]] = cell
    return groups


def difference(
    arm_cells: dict[int, dict[str, Any]], baseline_cells: dict[int, dict[str, Any]]
) -> tuple[float, float, float, int]:
    """Mean difference of accuracy with a 95 % bootstrap interval, and the number of seeds.

    Clips are paired, and resampled together for all seeds. Seeds are resampled too if there are several.
    """
    seeds = sorted(set(arm_cells) & set(baseline_cells))
    correct = np.array(
        [[[int(digit) for digit in cell[seed]["right"]] for seed in seeds] for cell in (arm_cells, baseline_cells)]
    )
    paired_differences = correct[0] - correct[1]  # (seeds, clips)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        clips = rng.integers(paired_differences.shape[1], size=paired_differences.shape[1])
        means.append(paired_differences[rng.integers(len(seeds), size=len(seeds))][:, clips].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(paired_differences.mean()), float(low), float(high), len(seeds)


def value(seed_cells: dict[int, dict[str, Any]]) -> str:
    values = [cell["value"] for cell in seed_cells.values()]
    if not values:
        return ""
    spread = f" ({min(values):.3f} - {max(values):.3f})" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def against(arm_cells: dict[int, dict[str, Any]], baseline_cells: dict[int, dict[str, Any]]) -> str:
    if not set(arm_cells) & set(baseline_cells):
        return ""
    mean, low, high, _ = difference(arm_cells, baseline_cells)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){', tie' if low <= 0 <= high else ''}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def text(results: list[dict[str, Any]], wanted: Sequence[Cell]) -> str:
    """Generated part of docs/quality.md: tables, and the wanted cells that are missing."""
    peers = grouped([cell for cell in results if cell["budget"] == "frozen"])
    results = [cell for cell in results if cell["budget"] != "frozen"]
    groups = grouped(results)
    finished = {(cell["arm"], cell["budget"], cell["seed"], cell["task"], cell["mode"]) for cell in results}
    missing = [cell for cell in wanted if (cell.arm, cell.budget, cell.seed, cell.task, cell.mode) not in finished]
    hours = sum(cell["seconds"] for cell in results) / 3600
    commits = sorted(
        {(cell["commit"]["id"] or "unknown")[:12] + "+" * bool(cell["commit"]["dirty"]) for cell in results}
    )
    threads = sorted({cell["machine"]["threads"] for cell in results})
    machines = sorted({cell["machine"]["processor"] for cell in results})
    processor = f"{'; '.join(machines)}, {' or '.join(map(str, threads))} thread{'s' * (threads[-1:] > [1])} a run"
    lines = [
        f"{len(results)} of {len(wanted)} cells, {hours:.1f} hours on {processor}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)} (+: with uncommitted files, such as the results). "
        "Accuracy, mean over the seeds (smallest - largest).",
        "",
        f"Main task, declared before the cells were run: {MAIN[1]} on {MAIN[0]}.",
        "",
    ]
    log_mel: dict[str, dict[int, dict[str, Any]]] = defaultdict(
        dict
    )  # per seed: with few labels each seed draws its own clips
    for (_, _, mode, task), seed_cells in groups.items():
        if mode == "probe":
            log_mel[task] |= {seed: {"value": cell["log_mel"]} for seed, cell in seed_cells.items()}
    rows = []
    for budget in ("steps", "time"):
        for arm in ARMS:
            pretrained = groups.get((arm, budget, "", ""), {})
            if not pretrained:
                continue
            steps = [cell["steps"] for cell in pretrained.values()]
            updates = " - ".join(str(count) for count in sorted({min(steps), max(steps)}))
            seconds = f"{np.mean([cell.get('train_seconds', 0.0) for cell in pretrained.values()]):.0f}"
            values = [value(groups.get((arm, budget, *column), {})) for column in COLUMNS]
            rows.append([arm, budget, updates, seconds, str(len(pretrained)), *values])
    spectra = [value(log_mel[task]) if mode == "probe" else "" for mode, task in COLUMNS]
    rows.append(["log-mel + logistic regression", "", "", "", "", *spectra])
    for arm in PEERS:
        if any(values := [value(peers.get((arm, "frozen", *column), {})) for column in COLUMNS]):
            rows.append([f"{arm} (frozen, of a public wheel)", "", "", "", "", *values])
    header = ["pretraining", "budget", "updates", "s", "seeds", *(f"{mode}, {task}" for mode, task in COLUMNS)]
    lines += [table(header, rows), "", f"Against what it is to be compared with. {_DIFFERENCES}", ""]
    lines += [differences(groups, COLUMNS, _pairs()), ""]
    if peers:
        # Every seed of ours against the same predictions of a frozen network.
        repeated = {key: {seed: cell for seed in range(5) for cell in seeds.values()} for key, seeds in peers.items()}
        lines += ["Against frozen networks out of public wheels (`make peers`):", ""]
        pairs = [(*_BEST, arm, "frozen") for arm in PEERS]
        columns = [column for column in COLUMNS if any(key[2:] == column for key in peers)]
        lines += [differences(groups | repeated, columns, pairs), ""]
    lines += [f"<details><summary>{len(missing)} cells are missing</summary>", "", _named(missing, wanted)]
    lines += ["", "</details>"]
    return "\n".join(lines)


def _pairs() -> list[Pair]:
    """Each arm and its baselines."""
    pairs = [(other_budget, "steps", arm, "steps") for arm, other_budget in UNTRAINED.items()] + [
        ("ssast", "steps", "random", "steps")
    ]
    pairs += [(arm, "steps", "ssast", "steps") for arm in ("patch", "frame")] + [("frame", "steps", "patch", "steps")]
    pairs += [
        ("patch", "steps", "ssast", "time"),
        ("frame", "time", "ssast", "time"),
        ("frame", "time", "patch", "steps"),
    ]
    pairs += [(arm, "steps", other_budget, "steps") for arm, other_budget in ABLATION_OF.items()]
    pairs += [(f"frame, {updates} updates", "steps", "random frame", "steps") for updates in (500, 6000)]
    return pairs


def differences(
    groups: dict[Key, dict[int, dict[str, Any]]], columns: Sequence[tuple[str, str]], pairs: Sequence[Pair]
) -> str:
    """Table of arms against their baselines."""
    rows = []
    for arm, budget, baseline, other_budget in pairs:
        values = [
            against(groups.get((arm, budget, *column), {}), groups.get((baseline, other_budget, *column), {}))
            for column in columns
        ]
        if any(values):
            label = f"{baseline}, equal time" if "time" in (budget, other_budget) else baseline
            common = [
                set(groups.get((arm, budget, *column), {})) & set(groups.get((baseline, other_budget, *column), {}))
                for column in columns
            ]
            counts = sorted({len(seeds) for seeds in common if seeds})
            rows.append([arm, label, " - ".join(map(str, counts)), *values])
    return table(["pretraining", "against", "seeds", *(f"{mode}, {task}" for mode, task in columns)], rows)


def settings(results: list[dict[str, Any]]) -> str:
    """README's table of the effect of each setting."""
    columns = [
        column for column in COLUMNS if column in ABLATED or (column[0] == "finetune" and column[1] not in VARIANTS)
    ]
    return f"{_DIFFERENCES}\n\n{differences(grouped(results), columns, _pairs())}"


def _named(missing: Sequence[Cell], wanted: Sequence[Cell]) -> str:
    """Names of cells; if all cells of a pretraining are missing, only its name."""
    names = []
    for cell in wanted:
        siblings = [
            sibling
            for sibling in wanted
            if (sibling.arm, sibling.budget, sibling.seed) == (cell.arm, cell.budget, cell.seed)
        ]
        missing_siblings = [sibling for sibling in siblings if sibling in missing]
        if cell.task == "" and missing_siblings == siblings:
            names.append(f"all {len(siblings)} of `{cell.name}`")
        elif cell in missing_siblings and missing_siblings != siblings:
            names.append(f"`{cell.name}`")
    return ", ".join(names) or "none"


def pages(results: list[dict[str, Any]]) -> dict[Path, str]:
    """docs/quality.md and README.md with their generated parts regenerated."""
    new = {}
    for path, generated in ((PAGE, text(results, cells())), (README, settings(results))):
        before, after = path.read_text().split(BEGIN)
        new[path] = f"{before}{BEGIN}\n{generated}\n{END}{after.split(END, 1)[1]}"
    return new


def draw(results: list[dict[str, Any]]) -> None:
    """Draw the accuracy of each arm on the main task, with one point per seed and the best arm on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {}
    for (arm, budget, *mode_and_task), seeds in grouped(results).items():
        if mode_and_task == [MAIN[1], MAIN[0]]:
            kind = "untrained" if arm in UNTRAINED else "pretrained"
            name = arm if budget == "steps" else f"{arm}, {budget} of patch"
            arms[name] = (kind, [cell["value"] for cell in seeds.values()])
    arms = dict(sorted(arms.items(), key=lambda pair: np.mean(pair[1][1])))
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(arms) + 1.2), constrained_layout=True)
    for kind, color in (("pretrained", "C0"), ("untrained", "C1")):
        rows = [row for row, (mode_and_task, _) in enumerate(arms.values()) if mode_and_task == kind]
        means = [np.mean(values) for mode_and_task, values in arms.values() if mode_and_task == kind]
        axis.barh(rows, means, color=color, alpha=0.6, label=kind)
    for row, (_, values) in enumerate(arms.values()):
        axis.plot(values, [row] * len(values), "k.", markersize=5)
    axis.set_yticks(range(len(arms)), arms)
    axis.set(xlabel=f"accuracy, {MAIN[1]} on {MAIN[0]}: mean, and a point a seed", xlim=(0, 1))
    axis.legend(loc="lower right")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results = read()
    new = pages(results)
    if arguments.check:
        if stale := [str(path) for path, content in new.items() if content != path.read_text()]:
            raise SystemExit(
                f"{', '.join(stale)}: not what benchmarks/studies/quality/report.py makes of the cells: run it"
            )
        return
    draw(results)
    for path, content in new.items():
        path.write_text(content)


if __name__ == "__main__":
    main()
