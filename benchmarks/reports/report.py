"""Writes the tables of README.md and docs/benchmarks.md, and docs/figures, from the files in benchmarks/results.

python benchmarks/reports/report.py                     ``--check`` only compares, ``--dirty`` takes results of
                                                        uncommitted code
python benchmarks/reports/report.py --results FOLDER    the tables and figures of another folder's results, in its
                                                        report.md
python benchmarks/reports/report.py --check-age         how many commits of mae_ast_fast and kernels each result is
                                                        older than
"""

from __future__ import annotations

import json
import math
import operator
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def benchmark_result(name: str, dirty: bool) -> dict[str, Any]:
    """A file of pytest-benchmark.

    Raises:
        ValueError: It was measured on code that is in no commit or names none, and ``dirty`` does not allow that.
    """
    result = json.loads((RESULTS / name).read_text())
    if result["commit_info"]["dirty"] and not dirty:
        raise ValueError(f"{name} was measured on uncommitted code: commit and measure again (or report.py --dirty)")
    if result["commit_info"]["id"] is None and not dirty:
        raise ValueError(f"{name} names no commit: measure with MAE_AST_FAST_COMMIT=ID (or report.py --dirty)")
    return result


def commit_of(result: dict[str, Any]) -> str:
    """The commit of a result, shortened; "unknown" where none was recorded."""
    return (result["commit_info"]["id"] or "unknown")[:12]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def pretrain_table() -> str:
    """Held-out results of the README's first command, from a run's summary.json."""
    summary = json.loads((RESULTS / "pretrain_summary.json").read_text())
    rate = f"{summary['clips_per_second']:.0f} clips/s"
    if "commit_info" in summary:
        rate += f", commit {commit_of(summary)}"
    rows = [("all", summary["held_out"]), *summary["held_out_by_kind"].items()]
    rows = [(kind, report) for kind, report in rows if report["clips"] >= 8]  # fewer say nothing
    names = list(summary["held_out"]["baselines"])
    lines = [
        f"A run of the first command ({summary['parameters'] / 1e6:.1f} M parameters, {summary['steps']} updates, "
        f"{summary['train_seconds'] / 60:.1f} minutes on {summary['threads']} CPU threads in {summary['precision']}, "
        f"{rate}). Held-out squared error of hidden patches, beside what averages "
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


def of_part(result: dict[str, Any], part: str) -> dict[str, Any]:
    """The result of bench_step.py with the cases of one part alone."""
    return {**result, "benchmarks": [case for case in result["benchmarks"] if case["extra_info"]["part"] == part]}


def audio_ratios(other: dict[str, Any], column: dict[str, Any]) -> list[float]:
    """How many times as fast as the other column, for equal audio, in each round."""
    share = column["audio_seconds"] / other["audio_seconds"]
    return [a / b * share for a, b in zip(other["seconds"], column["seconds"], strict=True)]


def audio_speed(other: dict[str, Any], column: dict[str, Any]) -> float:
    """The median over the rounds."""
    return statistics.median(audio_ratios(other, column))


def ranged(ratios: Sequence[float]) -> str:
    """Median (min - max) of the rounds' ratios; a tie where some are on the other side of 1."""
    low, high = min(ratios), max(ratios)
    if low == high:
        return f"{low:.2f} x"
    tie = ", tie" if low < 1.0 < high else ""
    return f"{statistics.median(ratios):.2f} x ({low:.2f} - {high:.2f}){tie}"


def rate(column: dict[str, Any], unit: str) -> float:
    """Clips, tokens, seconds of audio or FLOP a second: the median over the rounds."""
    return statistics.median(column[unit] / seconds for seconds in column["seconds"])


def short(value: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def forward_share(column: dict[str, Any]) -> float | None:
    """Of a step's time, what passes until the loss is there; None where nobody saw that."""
    after = ("backward", "optimizer", "update")
    shares = [
        1.0 - sum(sample.get(stage, 0.0) for stage in after) / sum(sample.values())
        for sample in column["stages"]
        if set(sample) - set(after)
    ]
    return statistics.median(shares) if shares else None


def mfu(case: dict[str, Any], column: dict[str, Any]) -> float:
    """The model's FLOPs a second as a share of a large matrix product's in the same precision, in its best round."""
    peak = case["peak"][column["precision"]]
    return rate(column, "flops") / (peak["work"] / min(peak["seconds"]))


def _measures(case: dict[str, Any], column: dict[str, Any]) -> list[str]:
    """Cells: share of the forward, clips/s, tokens/s, hours of audio an hour, MB a clip, MFU."""
    share, peak = forward_share(column), column["peak_bytes_a_clip"]
    return [
        "" if share is None else f"{100 * share:.0f} %",
        short(rate(column, "clips")),
        short(rate(column, "tokens")),
        f"{rate(column, 'audio_seconds'):.1f}",
        "" if peak is None else f"{peak / 1e6:.0f}",
        f"{100 * mfu(case, column):.0f} %",
    ]


def _seconds(column: dict[str, Any]) -> str:
    low, median, high = (f"{value / column['steps']:.3g}" for value in quartiles(column["seconds"]))
    return f"{median} ({low} - {high})"


MEANING = (
    "MB a clip: the peak of a step above weights and AdamW's state, gradients included, divided by the clips (on a CPU "
    "resident memory); so it compares within a case, not between batches of other sizes. MFU: the FLOPs of the model's "
    "matrix products, however many are run, against a large product in the best of the same rounds."
)
MEASURES = "of it forward | clips/s | tokens/s | hours of audio an hour | MB a clip | MFU"


def step_table(result: dict[str, Any]) -> str:
    """Seconds of a training step by column, and where ``original`` spends them; from bench_step.py."""
    result = of_part(result, "main")
    cases = {case["param"]: case["extra_info"] for case in result["benchmarks"]}
    precisions = [p for p in ("fp32", "bf16") if any(p in case["peak"] for case in cases.values())]
    lines = [where_and_when(result, "the first column of the same precision, for equal audio")]
    mixed = cases.get("mixed", {}).get("columns", {})
    original = next((column for name, column in mixed.items() if name.startswith("original")), None)
    whole = next((column for name, column in mixed.items() if not name.startswith("original")), None)
    if original and whole:
        lengths = [second for batch in whole["clip_seconds"] for second in batch]
        lines[0] += (
            f" In `mixed`, clips of {min(lengths):.1f} to {max(lengths):.1f} s, `original` crops the "
            f"{whole['audio_seconds']:.0f} s of audio to {original['audio_seconds']:.0f} s, which alone count for it; "
            "the others take them whole."
        )

    def has(name: str, kind: str) -> bool:
        return any(column.startswith(kind) for column in cases[name]["columns"])

    bare = {
        kind: [name for name in cases if f"{name} compiled" not in cases and not has(name, kind)]
        for kind in ("compiled", "vitmae compiled")
    }
    told = [f"`{kind}` on {', '.join(names)}" for kind, names in bare.items() if names]
    if told:
        lines[0] += f" Not measured: {'; '.join(told)}, nor anything compiled with 6 layers: compiling takes minutes, "
        lines[0] += "and ViTMAE takes square patches of one length alone."
    lines[0] += f" What stands behind the seconds is of {precisions[-1]}. {MEANING}"
    heads = " | ".join(f"{precision}: s a step | speed" for precision in precisions)
    count = 2 + 2 * len(precisions) + MEASURES.count("|") + 1
    lines += ["", f"| case | column | {heads} | {MEASURES} |", "|---" * count + "|"]
    for name, case in cases.items():
        kinds = list(dict.fromkeys(column.removesuffix(" bf16") for column in case["columns"]))
        for kind in kinds:
            cells, last = [f"{name}, {case['clips']} clips", kind], None
            for precision in precisions:
                column = case["columns"].get(kind if precision == "fp32" else f"{kind} bf16")
                first = next((other for other in case["columns"].values() if other["precision"] == precision), None)
                cells += [_seconds(column), ranged(audio_ratios(first, column))] if column else ["", ""]
                last = column or last
            lines.append(f"| {' | '.join([*cells, *_measures(case, last)])} |")
    lines += ["", f"Faster than `fast`, or a tie: {', '.join(ahead_of_fast(cases)) or 'nothing'}."]
    originals = {
        name: column
        for name, case in cases.items()
        for key, column in list(case["columns"].items())[:1]
        if key.startswith("original")
    }
    lines += ["", *stage_lines(originals)] if originals else []
    without = {f"`{name}`: {why}" for case in cases.values() for name, why in case["left_out"].items()}
    lines += ["", f"Left out: {'; '.join(sorted(without))}."] if without else []
    return "\n".join([*lines, *failed_lines(result)])


def failed_lines(result: dict[str, Any]) -> list[str]:
    """Columns that raised or computed something else, and why; no line where there is none."""
    told = [
        f"`{name}` on {case.get('param') or case['name']}: {why}"
        for case in result["benchmarks"]
        for name, why in case["extra_info"].get("failed", {}).items()
    ]
    return ["", f"Failed, not timed: {'; '.join(told)}."] if told else []


def ahead_of_fast(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Columns that beat ``fast`` of their precision, for equal audio, in the median or, as ties, in some round."""
    found = []
    for name, case in cases.items():
        for column, samples in case["columns"].items():
            fast = case["columns"].get("fast bf16" if column.endswith(" bf16") else "fast")
            if fast is not None and samples is not fast and max(ratios := audio_ratios(fast, samples)) > 1.0:
                found.append(f"`{column}` on {name}, {ranged(ratios)}")
    return found


def stage_lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Where each case's ``original`` column spends its time, in percent of the median round's sum."""
    stages = list(next(iter(cases.values()))["stages"][0])
    precisions = [case["precision"] for case in cases.values()]
    heads = [f"{name}, {precision}" for name, precision in zip(cases, precisions, strict=True)]
    lines = [f"| stage of `original` | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    medians = {
        name: {stage: statistics.median(sample[stage] for sample in case["stages"]) for stage in stages}
        for name, case in cases.items()
    }
    for stage in stages:
        shares = [f"{100 * median[stage] / sum(median.values()):.1f} %" for median in medians.values()]
        lines.append(f"| {stage} | {' | '.join(shares)} |")
    return lines


PAPER = {"speed": 3.0, "memory": 2.0}  # of MAE-AST against SSAST, arXiv 2203.16691, abstract


def against_ssast(case: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """How many times as fast as each SSAST column MAE-AST is, and how much less memory and FLOPs a clip it takes."""
    columns = case["columns"]
    ours = next((column for name, column in columns.items() if name.startswith("fast, no dropout")), None)
    told: dict[str, dict[str, float | None]] = {}
    if ours is None:
        return told
    for name, theirs in columns.items():
        if name.startswith("ssast"):
            memory = (theirs["peak_bytes_a_clip"], ours["peak_bytes_a_clip"])
            told[name] = {
                "speed": audio_speed(theirs, ours),
                "memory": None if None in memory else memory[0] / memory[1],
                "FLOPs": theirs["flops"] / ours["flops"],
            }
    return told


def ssast_table(result: dict[str, Any]) -> str:
    """MAE-AST against SSAST; from bench_step.py."""
    result = of_part(result, "ssast")
    lines = [
        where_and_when(result, "SSAST") + " Both models run in this library, without dropout, on the same kernels and "
        f"attention. The paper reports {PAPER['speed']:g} x the speed and {PAPER['memory']:g} x less memory. {MEANING}",
        "",
        f"| case | column | s a step | {MEASURES} | GFLOP a clip | MAE-AST: speed | less memory | fewer FLOPs |",
        "|---" * 13 + "|",
    ]
    for name, case in ((case["param"], case["extra_info"]) for case in result["benchmarks"]):
        ratios = against_ssast(case)
        for key, column in case["columns"].items():
            cells = [f"{name.removeprefix('ssast ')}, {case['clips']} clips", key, _seconds(column)]
            cells += [*_measures(case, column), f"{column['flops'] / column['clips'] / 1e9:.1f}"]
            found = ratios.get(key, {}).values()
            cells += ["" if ratio is None else f"{ratio:.2f} x" for ratio in found] or [""] * 3
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *failed_lines(result)])


FACTORS = {  # of a sweep -> (what it is called, its unit)
    "clips": ("clips a batch", ""),
    "seconds": ("length of a clip", " s"),
    "mask_ratio": ("mask ratio", ""),
    "encoder_layers": ("layers of the encoder", ""),
}


GROWTH = {"seconds": "time", "bytes": "memory"}


def sweep(result: dict[str, Any], factor: str) -> list[tuple[float, dict[str, dict[str, Any]]]]:
    """(value, columns by name without precision) of the points that differ in a factor alone, the base point among
    them, ascending."""
    cases = (case["extra_info"] for case in of_part(result, "sweep")["benchmarks"])
    points = [
        (case[factor], {name.removesuffix(" bf16"): column for name, column in case["columns"].items()})
        for case in cases
        if case["factor"] in ("", factor)
    ]
    return sorted(points, key=lambda point: point[0])


Law = tuple[float, float, float]  # a, b, p of a + b x^p


def law(x: Sequence[float], y: Sequence[float]) -> Law:
    """y = a + b x^p with a, b >= 0 and p of 0.5 to 3: the least squares of relative errors.

    A fixed cost is no part of the power: a line that does not start at 0 has p = 1.
    """
    fits = []
    for p in (hundredth / 100 for hundredth in range(50, 301)):
        # Of a / y + b x^p / y = 1.
        u, v = [1.0 / value for value in y], [value**p / other for value, other in zip(x, y, strict=True)]
        uu, uv, vv = (sum(map(math.prod, zip(*pair, strict=True))) for pair in ((u, u), (u, v), (v, v)))
        determinant = uu * vv - uv * uv
        a = (sum(u) * vv - sum(v) * uv) / determinant if determinant > 0.0 else 0.0
        b = (sum(v) - a * uv) / vv
        if a < 0.0:
            a, b = 0.0, sum(v) / vv
        elif b < 0.0:
            a, b = sum(u) / uu, 0.0
        fits.append((sum((a * c + b * d - 1.0) ** 2 for c, d in zip(u, v, strict=True)), (a, b, p)))
    return min(fits)[1]


def growth(result: dict[str, Any], factor: str) -> dict[str, dict[str, tuple[list[float], list[float], Law]]]:
    """How time and memory grow with a factor: column -> what -> (values, what was measured, law); of 4 points or more.

    Of a batch where the factor is its clips, else of one clip.
    """
    points = sweep(result, factor)
    told: dict[str, dict[str, tuple[list[float], list[float], Law]]] = {}
    for name in dict.fromkeys(name for _, columns in points for name in columns):
        having = [(value, columns[name]) for value, columns in points if name in columns]
        clips = [column["clips"] / column["steps"] for _, column in having]
        one = [1.0 if factor == "clips" else 1.0 / count for count in clips]
        found = {
            "seconds": [statistics.median(c["seconds"]) / c["steps"] * f for (_, c), f in zip(having, one, strict=True)]
        }
        if all(column["peak_bytes_a_clip"] for _, column in having):
            memory = zip(having, clips, one, strict=True)
            found["bytes"] = [column["peak_bytes_a_clip"] * count * f for (_, column), count, f in memory]
        values = [value for value, _ in having]
        if len(values) > 3:
            told[name] = {what: (values, y, law(values, y)) for what, y in found.items()}
    return told


def sweep_table(result: dict[str, Any]) -> str:
    """One factor at a time: milliseconds and memory of a clip by column, and how both grow; from bench_step.py."""
    cases = [case["extra_info"] for case in of_part(result, "sweep")["benchmarks"]]
    first = next((case for case in cases if case["factor"] == ""), cases[0])
    names = list(dict.fromkeys(name.removesuffix(" bf16") for case in cases for name in case["columns"]))
    heads = " | ".join([*(f"`{name}`, ms a clip" for name in names), *(f"`{name}`, MB a clip" for name in names)])
    precision = next(iter(first["peak"]))
    base = (
        f"{first['preset']}, {first['clips']} clips of {first['seconds']:g} s, mask ratio {first['mask_ratio']:g}, "
        f"{first['encoder_layers']} layers, {precision}"
    )
    lines = [
        where_and_when(of_part(result, "sweep"), "`original`") + f" Base point: {base}.",
        "",
        f"| one thing changed | {heads} | speed of `fast` |",
        "|---" * (2 + 2 * len(names)) + "|",
    ]
    for factor, (called, unit) in FACTORS.items():
        for value, columns in sweep(result, factor):
            cells = [f"{called}: {value:g}{unit}"]
            having = [columns.get(name) for name in names]
            cells += [short(1e3 / rate(column, "clips")) if column else "" for column in having]
            peaks = [column and column["peak_bytes_a_clip"] for column in having]
            cells += [short(peak / 1e6) if peak else "" for peak in peaks]
            both = columns.get("original"), columns.get("fast")
            cells.append(ranged(audio_ratios(*both)) if all(both) else "")
            lines.append(f"| {' | '.join(cells)} |")
    told = [
        f"with {FACTORS[factor][0]}, `{name}` "
        + ", ".join(
            f"{GROWTH[what]} {p:.2f} (fixed {100 * a / y[-1]:.0f} %)" for what, (_, y, (a, _, p)) in found.items()
        )
        for factor in ("clips", "seconds")
        for name, found in growth(result, factor).items()
    ]
    what = "Powers p of growth, of a + b x^p fitted; the fixed part a as a share at the largest x"
    lines += ["", f"{what}: {'; '.join(told)}."] if told else []
    return "\n".join([*lines, *failed_lines(of_part(result, "sweep"))])


def goals(result: dict[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """What the step is to reach on one H100, and what a run of bench_step.py on a GPU measured.

    Base patch model, bf16, dropout 0.1, at least 256 clips of 10 s, all columns of one run, medians over its rounds.

    Returns:
        (what, goal, measured, reached) of each goal; ("not measured", None) where a case or column is missing.
    """
    cases = {case["param"]: case["extra_info"]["columns"] for case in result["benchmarks"]}

    def ahead_of(other: str) -> float:
        """In the case where both took turns: compiled columns have one of their own."""
        pairs = [cases[name] for name in ("patch_base", "patch_base compiled") if other in cases.get(name, {})]
        ratios = zip(pairs[0][other]["seconds"], pairs[0]["fast bf16"]["seconds"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in ratios)

    def megabytes(name: str) -> float:
        return cases["patch_base"][name]["peak_bytes_a_clip"] / 1e6

    def mixed_against_equal() -> float:
        mixed, equal = (rate(cases[name]["fast bf16"], "audio_seconds") for name in ("mixed", "equal"))
        return mixed / equal

    rows: list[tuple[str, float, Callable[[], float], Callable[[float, float], bool]]] = [
        ("clips/s", 3500.0, lambda: rate(cases["patch_base"]["fast bf16"], "clips"), operator.ge),
        ("times the speed of `compiled bf16`", 1.25, lambda: ahead_of("compiled bf16"), operator.ge),
        ("times the speed of `original bf16`", 3.7, lambda: ahead_of("original bf16"), operator.ge),
        ("MB a clip, `fast bf16`", 65.0, lambda: megabytes("fast bf16"), operator.le),
        ("MB a clip, `fast, gelu bf16`", 50.0, lambda: megabytes("fast, gelu bf16"), operator.le),
        ("audio a second, clips of unequal length against equal ones", 0.9, mixed_against_equal, operator.ge),
    ]
    told: list[tuple[str, str, str, bool | None]] = []
    for what, goal, measure, reaches in rows:
        try:
            measured = measure()
        except (KeyError, IndexError, TypeError):  # no such case, no column, nothing that counts memory
            told.append((what, f"{goal:g}", "not measured", None))
        else:
            told.append((what, f"{goal:g}", f"{measured:.4g}", reaches(measured, goal)))
    return told


def where_and_when(result: dict[str, Any], against: str = "the first column of a case") -> str:
    """The sentences above a table of columns that took turns."""
    machine, commit = result["machine_info"], commit_of(result)
    cases = [case["extra_info"] for case in result["benchmarks"]]
    loads = [case[f"load_average_{when}"][0] for case in cases for when in ("before", "after")]
    rounds = min((len(sample["seconds"]) for case in cases for sample in _samples(case["columns"])), default=0)
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}, load "
        f"average {min(loads):.1f} to {max(loads):.1f}; medians (quartiles) of {rounds} rounds in which the columns "
        f"take turns. Speeds are against {against}: the median (smallest - largest) of the rounds' own ratios, a tie "
        "where 1 lies between. Where that is another number than the ratio of the medians beside it, the difference is "
        "the machine's noise."
    )


def _samples(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each column, or, where it has several, of each thing that is timed."""
    return [s for column in columns.values() for s in ([column] if "seconds" in column else column.values())]


def milliseconds(samples: list[float]) -> str:
    low, median, high = (f"{1e3 * value:.3g}" for value in quartiles(samples))
    return f"{median} ({low} - {high})"


def times_as_fast(first: dict[str, Any], column: dict[str, Any]) -> float:
    """How many times as fast as the first column: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(first["seconds"], column["seconds"], strict=True))


def speed(first: dict[str, Any], column: dict[str, Any]) -> str:
    """``ranged``, of the rounds' own ratios."""
    return ranged([a / b for a, b in zip(first["seconds"], column["seconds"], strict=True)])


def ops_table(result: dict[str, Any]) -> str:
    """Milliseconds, speed, and share of the machine's peak of each op, point and column; from bench_ops.py."""
    lines = [
        where_and_when(result),
        "Rates count the bytes or FLOP that an op cannot do without; their share is of a large copy or matrix product "
        "in the best of the same rounds (in a CPU's caches it may exceed 100 %).",
        "",
        "| op | point | column | forward, ms | speed | forward + backward, ms | speed | rate | of the peak |",
        "|---" * 9 + "|",
    ]
    for case in (case["extra_info"] for case in result["benchmarks"]):
        first, peak = next(iter(case["columns"].values()), None), case["peak"]
        for name, column in case["columns"].items():
            cells = [case["op"], case["point"], name]
            for what in ("forward", "forward + backward"):
                timed = column.get(what)
                cells += [milliseconds(timed["seconds"]), speed(first[what], timed)] if timed else ["", ""]
            what = list(column)[-1]
            rate = case["work"][what] / statistics.median(column[what]["seconds"]) / 1e9
            share = rate * 1e9 / (peak["work"] / min(peak["seconds"]))
            cells += [f"{rate:.3g} {'GB/s' if case['unit'] == 'bytes' else 'GFLOP/s'}", f"{100 * share:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    cases = [case["extra_info"]["left_out"] for case in result["benchmarks"]]
    left_out = {f"`{name}`: {why}" for case in cases for name, why in case.items()}
    lines += ["", f"Left out: {'; '.join(sorted(left_out))}."] if left_out else []
    slower = [
        f"`{name}` on {case['op']}, {case['point']}, {times_as_fast(first[what], column[what]):.2f} x"
        for case in (case["extra_info"] for case in result["benchmarks"])
        for first in [case["columns"].get("original")]
        for name, column in case["columns"].items()
        for what in [list(column)[-1]]
        if first is not None and times_as_fast(first[what], column[what]) < 1.0
    ]
    lines += ["", f"Slower than `original`: {'; '.join(slower) or 'nothing'}."]
    return "\n".join([*lines, *failed_lines(result)])


def masking_table(result: dict[str, Any]) -> str:
    """Milliseconds and clips/s of each point and column; from bench_masking.py."""
    slower: list[str] = []
    lines = [
        where_and_when(result) + " The paper draws one mask for the whole batch: the rows of `chunk_official`; once a "
        "clip is what its loop costs where every clip has a mask of its own, which the paper does not do.",
        "",
        "| point | strategy | clips | tokens a clip | column | ms a batch | speed | clips/s |",
        "|---" * 8 + "|",
    ]
    for case in (case["extra_info"] for case in result["benchmarks"]):
        first = next(iter(case["columns"].values()))
        for name, column in case["columns"].items():
            cells = [case["point"], case["strategy"], str(case["clips"]), str(case["tokens"]), name]
            rate = case["clips"] / statistics.median(column["seconds"])
            cells += [milliseconds(column["seconds"]), speed(first, column), f"{rate:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            if times_as_fast(first, column) < 1.0:
                slower.append(f"`{name}` on {case['point']}, {times_as_fast(first, column):.2f} x")
    lines += ["", f"Slower than the paper's loop: {'; '.join(slower) or 'nothing'}."]
    return "\n".join(lines)


def data_table(result: dict[str, Any]) -> str:
    """Milliseconds and audio a second of each stage and column, the goal, and the wait for data; from bench_data.py."""
    lines = [
        where_and_when(result),
        "",
        "| what | column | ms | speed | clips/s | audio seconds a second | a second of one core | MB/s of PCM16 |",
        "|---" * 8 + "|",
    ]
    goals: dict[str, list[str]] = {}
    waits = []
    for found in result["benchmarks"]:
        what, case = found["name"].removeprefix("bench_"), found["extra_info"]
        first = next(iter(case["columns"].values()))
        for name, column in case["columns"].items():
            seconds, audio = statistics.median(column["seconds"]), case["audio_seconds"]
            worked = column.get("cpu_seconds")  # not of a run, which has several processes
            cells = [what, name, milliseconds(column["seconds"]), speed(first, column)]
            cells += [f"{case['clips'] / seconds:.0f}", f"{audio / seconds:,.0f}"]
            cells += [f"{audio / statistics.median(worked):,.0f}" if worked else "", f"{audio * 0.032 / seconds:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            if "waiting" in column:
                whole, later = (_percent(column[key]) for key in ("waiting", "waiting_later"))
                waits.append(f"{name} {whole}, in the second half of its updates {later}")
        if "goal" in case:
            name, least = case["goal"]
            ratio = times_as_fast(first, case["columns"][name])
            goal = f"`{name}` at least {least:g} x as fast as `{next(iter(case['columns']))}`"
            goals.setdefault(goal, []).append(f"{what} {ratio:.1f} x, {'reached' if ratio >= least else 'missed'}")
    lines += [line for goal, told in goals.items() for line in ("", f"Goal: {goal}. {'; '.join(told)}.")]
    if waits:
        lines += ["", f"Of the time of a run of `pretrain`, waiting for data: {'; '.join(waits)}."]
    return "\n".join(lines)


def data_rate_table(result: dict[str, Any]) -> str:
    """How much audio one thread brings to the training, our ways beside the official one; from bench_data.py."""
    shown = ("FLAC shards, loader", "PCM16 shards, loader", "FLAC shards + fbank", "PCM16 shards + fbank")
    lines = [
        f"{where_and_when(result, '`official`')} One thread. `official`: a FLAC file decoded and "
        "`torchaudio.compliance.kaldi.fbank`, clip by clip, as the paper's data set does. `loader`: int16 batches, "
        "sampler included, as they go to the training device, which makes the features; `+ fbank`: "
        "features on the CPU too.",
        "",
        "| clips | column | clips/s | hours of audio an hour | speed |",
        "|---" * 5 + "|",
    ]
    for found in result["benchmarks"]:
        if not found["name"].startswith("bench_loader["):
            continue
        case = found["extra_info"]
        first, *_ = case["columns"]
        for name in (first, *(name for name in shown if name in case["columns"])):
            column = case["columns"][name]
            seconds = statistics.median(column["seconds"])
            cells = [found["name"][len("bench_loader[") : -1], name, f"{case['clips'] / seconds:,.0f}"]
            cells += [f"{case['audio_seconds'] / seconds:,.0f}", speed(case["columns"][first], column)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(shares: list[float]) -> str:
    low, median, high = (f"{100 * value:.1f}" for value in quartiles(shares))
    return f"{median} % ({low} - {high})"


STEP_CPU = "step_cpu.json"


def distances(result: dict[str, Any], column: str) -> list[float]:
    """Relative distance of a column's loss from the reference's, update by update."""
    ours, theirs = (result["columns"][name]["rows"] for name in (column, "reference"))
    return [a["loss"] / b["loss"] - 1.0 for a, b in zip(ours, theirs, strict=True)]


def convergence_table(dirty: bool) -> str:
    """Losses of the fast step beside those of the plain one."""
    result = benchmark_result("convergence_cpu.json", dirty)
    lines = [
        f"{result['machine_info']['processor']}, commit {commit_of(result)}. "
        f"{result['steps']} updates of patch_tiny with 4 encoder layers, from the same weights, on the same audio in "
        "the same order with the same masks, without dropout, one run after the other. Single updates scatter: "
        "rounding grows from update to update, and each sees another batch.",
        "",
        "| run | mean loss of the first 20 | of the last 20 | distance from `reference`, first 20 | all | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, column in result["columns"].items():
        losses = [row["loss"] for row in column["rows"]]
        far = [abs(each) for each in distances(result, name)]
        first, every = (f"{100 * statistics.fmean(part):.2g} %" for part in (far[:20], far))
        means = [f"{statistics.fmean(part):.3f}" for part in (losses[:20], losses[-20:])]
        cells = [name, *means, *(("", "") if name == "reference" else (first, every)), f"{column['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[bool], str]] = {
    "pretrain": lambda dirty: pretrain_table(),
    "step_cpu": lambda dirty: step_table(benchmark_result(STEP_CPU, dirty)),
    "ssast_cpu": lambda dirty: ssast_table(benchmark_result(STEP_CPU, dirty)),
    "sweep_cpu": lambda dirty: sweep_table(benchmark_result(STEP_CPU, dirty)),
    "ops_cpu": lambda dirty: ops_table(benchmark_result("ops_cpu.json", dirty)),
    "masking_cpu": lambda dirty: masking_table(benchmark_result("masking_cpu.json", dirty)),
    "data_cpu": lambda dirty: data_table(benchmark_result("data_cpu.json", dirty)),
    "data_rate_cpu": lambda dirty: data_rate_table(benchmark_result("data_cpu.json", dirty)),
    "convergence_cpu": convergence_table,
}
PAGES = {
    "README.md": ("data_rate_cpu", "step_cpu", "ssast_cpu", "convergence_cpu"),
    "docs/first_run.md": ("pretrain",),
    "docs/benchmarks.md": ("sweep_cpu", "ops_cpu", "masking_cpu", "data_cpu"),
}


def render(text: str, page: str = "README.md", dirty: bool = False) -> str:
    """A page's text with every marked table made anew; ``dirty`` takes results of uncommitted code too."""
    for name in PAGES[page]:
        pattern = rf"(<!-- report:{name} -->\n)(.*?)<!-- /report -->"
        place = re.search(pattern, text, re.S)
        if place is None:
            raise ValueError(f"{page} has no place for the table {name!r}")
        begin, end = place.span(2)
        text = f"{text[:begin]}{TABLES[name](dirty)}\n{text[end:]}"
    return text


def own_page(folder: Path) -> str:
    """Every table and figure of the result files in a folder, of this machine as it is."""
    import report_figures

    global RESULTS
    RESULTS, report_figures.FIGURES = folder, folder / "figures"
    report_figures.write(dirty=True)
    lines = ["# Benchmarks of this machine", ""]
    for name, table in TABLES.items():
        try:
            text = table(True)
        except FileNotFoundError:
            continue  # not measured
        lines += [f"## {name.removesuffix('_cpu')}", "", text, ""]
    lines += [f"![{path.stem}](figures/{path.name})" for path in sorted(folder.glob("figures/*.png"))]
    return "\n".join(lines)


def ages() -> list[str]:
    """Of each result file: its commit, and the commits to mae_ast_fast and kernels since."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        commit = result.get("commit_info", {}).get("id") if isinstance(result, dict) else None
        if commit is None:
            lines.append(f"{path.name}: names no commit")
            continue
        command = ["git", "rev-list", "--count", f"{commit}..HEAD", "--", "mae_ast_fast", "kernels"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            count = done.stdout.strip() or f"unknown, {done.stderr.strip()}"
        except OSError as error:
            count = f"unknown, {error}"
        lines.append(f"{path.name}: {commit[:12]}, commits to mae_ast_fast and kernels since: {count}")
    return lines


def main() -> int:
    import report_figures

    words = sys.argv[1:]
    if "--check-age" in words:
        print("\n".join(ages()))
        return 0
    if "--results" in words:
        folder = Path(words[words.index("--results") + 1])
        (folder / "report.md").write_text(own_page(folder) + "\n")
        print(folder / "report.md")
        return 0
    dirty, check, changed = "--dirty" in words, "--check" in words, False
    for page in PAGES:
        before = (ROOT / page).read_text()
        after = render(before, page, dirty)
        changed |= before != after
        if not check:
            (ROOT / page).write_text(after)
    if check:
        return int(changed or bool(report_figures.stale()))
    report_figures.write(dirty)
    return 0


if __name__ == "__main__":
    import report  # under the name by which report_figures knows it

    sys.exit(report.main())
