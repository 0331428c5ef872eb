"""docs/quality.md, its figure and README's table of settings from the cells in results/.

python benchmarks/studies/quality/report.py            writes
python benchmarks/studies/quality/report.py --check    fails where a page is not what the cells give
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All cells that are there."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def grouped(found: list[dict[str, Any]]) -> dict[Key, dict[int, dict[str, Any]]]:
    """(arm, budget, mode, task) -> seed -> cell."""
    groups: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell in found:
        groups[cell["arm"], cell["budget"], cell["mode"], cell["task"]][cell["seed"]] = cell
    return groups


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> tuple[float, float, float, int]:
    """Mean difference of accuracy with a 95 % bootstrap interval, and the number of seeds.

    Clips are paired and drawn together for all seeds, which are drawn too where there are several.
    """
    seeds = sorted(set(ours) & set(theirs))
    right = np.array([[[int(x) for x in cell[s]["right"]] for s in seeds] for cell in (ours, theirs)])
    paired = right[0] - right[1]  # (seeds, clips)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        clips = rng.integers(paired.shape[1], size=paired.shape[1])
        means.append(paired[rng.integers(len(seeds), size=len(seeds))][:, clips].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(paired.mean()), float(low), float(high), len(seeds)


def value(cells_of: dict[int, dict[str, Any]]) -> str:
    values = [cell["value"] for cell in cells_of.values()]
    if not values:
        return ""
    spread = f" ({min(values):.3f} - {max(values):.3f})" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def against(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    if not set(ours) & set(theirs):
        return ""
    mean, low, high, _ = difference(ours, theirs)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){', tie' if low <= 0 <= high else ''}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def text(found: list[dict[str, Any]], wanted: Sequence[Cell]) -> str:
    """The generated part of docs/quality.md: tables, and which of the cells that are wanted are missing."""
    groups = grouped(found)
    there = {(c["arm"], c["budget"], c["seed"], c["task"], c["mode"]) for c in found}
    missing = [c for c in wanted if (c.arm, c.budget, c.seed, c.task, c.mode) not in there]
    hours = sum(cell["seconds"] for cell in found) / 3600
    commits = sorted({(cell["commit"]["id"] or "unknown")[:12] + "+" * bool(cell["commit"]["dirty"]) for cell in found})
    threads = sorted({cell["machine"]["threads"] for cell in found})
    machines = sorted({c["machine"]["processor"] for c in found})
    processor = f"{'; '.join(machines)}, {' or '.join(map(str, threads))} thread{'s' * (threads[-1:] > [1])} a run"
    lines = [
        f"{len(found)} of {len(wanted)} cells, {hours:.1f} hours on {processor}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)} (+: with uncommitted files, such as the results). "
        "Accuracy, mean over the seeds (smallest - largest).",
        "",
        f"Main task, declared before the cells were run: {MAIN[1]} on {MAIN[0]}.",
        "",
    ]
    log_mel: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)  # of few labels each seed draws its own
    for (_, _, mode, task), of in groups.items():
        if mode == "probe":
            log_mel[task] |= {seed: {"value": cell["log_mel"]} for seed, cell in of.items()}
    rows = []
    for budget in ("steps", "time"):
        for arm in ARMS:
            pretrained = groups.get((arm, budget, "", ""), {})
            if not pretrained:
                continue
            steps = [cell["steps"] for cell in pretrained.values()]
            updates = " - ".join(str(n) for n in sorted({min(steps), max(steps)}))
            seconds = f"{np.mean([c.get('train_seconds', 0.0) for c in pretrained.values()]):.0f}"
            cells_of = [value(groups.get((arm, budget, *column), {})) for column in COLUMNS]
            rows.append([arm, budget, updates, seconds, str(len(pretrained)), *cells_of])
    spectra = [value(log_mel[task]) if mode == "probe" else "" for mode, task in COLUMNS]
    rows.append(["log-mel + logistic regression", "", "", "", "", *spectra])
    header = ["pretraining", "budget", "updates", "s", "seeds", *(f"{mode}, {task}" for mode, task in COLUMNS)]
    lines += [table(header, rows), "", f"Against what it is to be compared with. {_DIFFERENCES}", ""]
    lines += [differences(groups, COLUMNS), ""]
    lines += [f"<details><summary>{len(missing)} cells are missing</summary>", "", _named(missing, wanted)]
    lines += ["", "</details>"]
    return "\n".join(lines)


def differences(groups: dict[Key, dict[int, dict[str, Any]]], columns: Sequence[tuple[str, str]]) -> str:
    """Each arm against what it is to be compared with."""
    pairs = [(of, "steps", arm, "steps") for arm, of in UNTRAINED.items()] + [("ssast", "steps", "random", "steps")]
    pairs += [(arm, "steps", "ssast", "steps") for arm in ("patch", "frame")] + [("frame", "steps", "patch", "steps")]
    pairs += [
        ("patch", "steps", "ssast", "time"),
        ("frame", "time", "ssast", "time"),
        ("frame", "time", "patch", "steps"),
    ]
    pairs += [(arm, "steps", of, "steps") for arm, of in ABLATION_OF.items()]
    pairs += [(f"frame, {updates} updates", "steps", "random frame", "steps") for updates in (500, 6000)]
    rows = []
    for arm, budget, other, of in pairs:
        cells_of = [against(groups.get((arm, budget, *c), {}), groups.get((other, of, *c), {})) for c in columns]
        if any(cells_of):
            label = f"{other}, equal time" if (budget, of) != ("steps", "steps") else other
            common = [set(groups.get((arm, budget, *c), {})) & set(groups.get((other, of, *c), {})) for c in columns]
            counts = sorted({len(seeds) for seeds in common if seeds})
            rows.append([arm, label, " - ".join(map(str, counts)), *cells_of])
    return table(["pretraining", "against", "seeds", *(f"{mode}, {task}" for mode, task in columns)], rows)


def settings(found: list[dict[str, Any]]) -> str:
    """README's table: what a setting changes."""
    columns = [c for c in COLUMNS if c in ABLATED or (c[0] == "finetune" and c[1] not in VARIANTS)]
    return f"{_DIFFERENCES}\n\n{differences(grouped(found), columns)}"


def _named(missing: Sequence[Cell], wanted: Sequence[Cell]) -> str:
    """Cells by their names; those of a pretraining of which all are missing by its name alone."""
    names = []
    for cell in wanted:
        of = [c for c in wanted if (c.arm, c.budget, c.seed) == (cell.arm, cell.budget, cell.seed)]
        lacks = [c for c in of if c in missing]
        if cell.task == "" and lacks == of:
            names.append(f"all {len(of)} of `{cell.name}`")
        elif cell in lacks and lacks != of:
            names.append(f"`{cell.name}`")
    return ", ".join(names) or "none"


def pages(found: list[dict[str, Any]]) -> dict[Path, str]:
    """docs/quality.md and README.md with their generated parts made anew."""
    new = {}
    for path, made in ((PAGE, text(found, cells())), (README, settings(found))):
        before, rest = path.read_text().split(BEGIN)
        new[path] = f"{before}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"
    return new


def draw(found: list[dict[str, Any]]) -> None:
    """Accuracy of each arm on the main task, a point a seed, the best at the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {}
    for (arm, budget, *of), seeds in grouped(found).items():
        if of == [MAIN[1], MAIN[0]]:
            kind = "untrained" if arm in UNTRAINED else "pretrained"
            name = arm if budget == "steps" else f"{arm}, {budget} of patch"
            arms[name] = (kind, [cell["value"] for cell in seeds.values()])
    arms = dict(sorted(arms.items(), key=lambda pair: np.mean(pair[1][1])))
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(arms) + 1.2), constrained_layout=True)
    for kind, color in (("pretrained", "C0"), ("untrained", "C1")):
        rows = [row for row, (of, _) in enumerate(arms.values()) if of == kind]
        means = [np.mean(values) for of, values in arms.values() if of == kind]
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
    found = read()
    new = pages(found)
    if arguments.check:
        if stale := [str(path) for path, content in new.items() if content != path.read_text()]:
            raise SystemExit(
                f"{', '.join(stale)}: not what benchmarks/studies/quality/report.py makes of the cells: run it"
            )
        return
    draw(found)
    for path, content in new.items():
        path.write_text(content)


if __name__ == "__main__":
    main()
