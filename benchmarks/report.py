"""Writes the README's tables from the result files in benchmarks/results; ``--check`` only compares.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def pretrain_table() -> str:
    """Held-out results of the README's first command, from a run's summary.json."""
    summary = json.loads((RESULTS / "pretrain_summary.json").read_text())
    rows = [("all", summary["held_out"]), *summary["held_out_by_kind"].items()]
    rows = [(kind, report) for kind, report in rows if report["clips"] >= 8]  # fewer say nothing
    names = list(summary["held_out"]["baselines"])
    lines = [
        f"A run of the first command ({summary['parameters'] / 1e6:.1f} M parameters, {summary['steps']} updates, "
        f"{summary['train_seconds'] / 60:.1f} minutes on {summary['threads']} CPU threads in {summary['precision']}, "
        f"{summary['clips_per_second']:.0f} clips/s). Held-out squared error of hidden patches, beside what averages "
        "and straight lines make of the same visible patches; InfoNCE top-1 accuracy beside chance:",
        "",
        "| held-out clips | "
        + " | ".join(["MAE-AST", *(name.replace("_", " ") for name in names)])
        + " | accuracy | chance |",
        "|---" * (len(names) + 4) + "|",
    ]
    for kind, report in rows:
        errors = [report["reconstruction_mse"], *(report["baselines"][name] for name in names)]
        cells = [f"{kind} ({report['clips']})", *(f"{error:.3f}" for error in errors)]
        lines.append(f"| {' | '.join(cells)} | {100 * report['accuracy']:.1f} % | {100 * report['chance']:.2f} % |")
    better = [
        f"{name.replace('_', ' ')} on {kind}"
        for kind, report in rows
        for name, error in report["baselines"].items()
        if error <= report["reconstruction_mse"]
    ]
    lines += ["", f"Where a baseline is better: {', '.join(better) or 'nowhere'}."]
    return "\n".join(lines)


TABLES = {"pretrain": pretrain_table}


def render(readme: str) -> str:
    """The README's text with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- report:{name} -->\n)(.*?)<!-- /report -->"
        place = re.search(pattern, readme, re.S)
        if place is None:
            raise ValueError(f"README.md has no place for the table {name!r}")
        begin, end = place.span(2)
        readme = f"{readme[:begin]}{table()}\n{readme[end:]}"
    return readme


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
