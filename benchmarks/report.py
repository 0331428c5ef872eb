"""Writes the README's tables from the result files in benchmarks/results.

python benchmarks/report.py             ``--check`` only compares, ``--dirty`` takes results of uncommitted code too
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def benchmark_result(name: str, dirty: bool) -> dict[str, Any]:
    """A file of pytest-benchmark.

    Raises:
        ValueError: It was measured on code that is in no commit, and ``dirty`` does not allow that.
    """
    result = json.loads((RESULTS / name).read_text())
    if result["commit_info"]["dirty"] and not dirty:
        raise ValueError(f"{name} was measured on uncommitted code: commit and measure again (or report.py --dirty)")
    return result


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


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


def step_cpu_table(dirty: bool) -> str:
    """Seconds of a training step by column, and where ``original`` spends them."""
    result = benchmark_result("step_cpu.json", dirty)
    machine = result["machine_info"]
    cases = {case["param"]: case["extra_info"] for case in result["benchmarks"]}
    rounds = {len(column["seconds"]) for case in cases.values() for column in case["columns"].values()}
    loads = [case[f"load_average_{when}"][0] for case in cases.values() for when in ("before", "after")]
    mixed = cases["mixed"]["columns"]
    lengths = [second for batch in mixed["reference"]["clip_seconds"] for second in batch]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{result['commit_info']['id'][:12]}; medians (quartiles) of {min(rounds)} rounds in which the columns take "
        f"turns. The machine did other work too (load average {min(loads):.1f} to {max(loads):.1f}): seconds are not "
        "those of an idle one. Ratios are medians over the rounds, of seconds and of processor time, for equal audio. "
        f"In `mixed`, clips of {min(lengths):.1f} to {max(lengths):.1f} s, `original` crops the "
        f"{mixed['reference']['audio_seconds']:.0f} s of audio to "
        f"{mixed['original']['audio_seconds']:.0f} s, which alone count for it; the others take them whole.",
        "",
        "| case | column | s a step | clips/s | hours of audio an hour | tokens/s | MB a clip | speed against "
        "`original` | by processor time |",
        "|---" * 9 + "|",
    ]
    for name, case in cases.items():
        original = case["columns"]["original"]
        for column, got in case["columns"].items():
            low, median, high = quartiles(got["seconds"])
            steps = got["steps"]
            share = got["audio_seconds"] / original["audio_seconds"]
            faster, leaner = (
                statistics.median(a / b * share for a, b in zip(original[key], got[key], strict=True))
                for key in ("seconds", "cpu_seconds")
            )
            peak = got["peak_bytes_a_clip"]
            cells = [
                name,
                column,
                f"{median / steps:.2f} ({low / steps:.2f} - {high / steps:.2f})",
                f"{got['clips'] / median:.2f}",
                f"{got['audio_seconds'] / median:.1f}",
                f"{got['tokens'] / median:.0f}",
                "" if peak is None else f"{peak / 1e6:.0f}",
                f"{faster:.2f} x",
                f"{leaner:.2f} x",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *stage_lines({name: case["columns"]["original"] for name, case in cases.items()})]
    return "\n".join(lines)


def stage_lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Where each case's ``original`` column spends its time, in percent of the median round's sum."""
    stages = list(next(iter(cases.values()))["stages"][0])
    lines = [f"| stage of `original` | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    medians = {
        name: {stage: statistics.median(sample[stage] for sample in case["stages"]) for stage in stages}
        for name, case in cases.items()
    }
    for stage in stages:
        shares = [f"{100 * median[stage] / sum(median.values()):.1f} %" for median in medians.values()]
        lines.append(f"| {stage} | {' | '.join(shares)} |")
    return lines


TABLES = {"pretrain": lambda dirty: pretrain_table(), "step_cpu": step_cpu_table}


def render(readme: str, dirty: bool = False) -> str:
    """The README's text with every marked table made anew; ``dirty`` takes results of uncommitted code too."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- report:{name} -->\n)(.*?)<!-- /report -->"
        place = re.search(pattern, readme, re.S)
        if place is None:
            raise ValueError(f"README.md has no place for the table {name!r}")
        begin, end = place.span(2)
        readme = f"{readme[:begin]}{table(dirty)}\n{readme[end:]}"
    return readme


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before, "--dirty" in sys.argv[1:])
    if "--check" in sys.argv[1:]:
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
