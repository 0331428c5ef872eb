"""Write the tables of README.md and docs/benchmarks.md, and docs/figures, from the files in benchmarks/results.

python benchmarks/reports/report.py                     ``--check`` only compares, ``--dirty`` accepts results of
                                                        uncommitted code
python benchmarks/reports/report.py --results FOLDER    write tables and figures of the results in FOLDER to its
                                                        report.md
python benchmarks/reports/report.py --check-age         number of commits to mae_ast_fast and kernels since each result
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
    """A result file of pytest-benchmark.

    Raises:
        ValueError: It was measured on uncommitted code or names no commit, and ``dirty`` is false.
    """
    result = json.loads((RESULTS / name).read_text())
    if result["commit_info"]["dirty"] and not dirty:
        raise ValueError(f"{name} was measured on uncommitted code: commit and measure again (or report.py --dirty)")
    if result["commit_info"]["id"] is None and not dirty:
        raise ValueError(f"{name} names no commit: measure with MAE_AST_FAST_COMMIT=ID (or report.py --dirty)")
    return result


def commit_of(result: dict[str, Any]) -> str:
    """Abbreviated commit of a result; "unknown" if none was recorded."""
    return (result["commit_info"]["id"] or "unknown")[:12]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def pretrain_table() -> str:
    """Held-out results of the README's first command, from a run's summary.json."""
    summary = json.loads((RESULTS / "pretrain_summary.json").read_text())
    speed_text = f"{summary['clips_per_second']:.0f} clips/s"
    if "commit_info" in summary:
        speed_text += f", commit {commit_of(summary)}"
    reports = [("all", summary["held_out"]), *summary["held_out_by_kind"].items()]
    reports = [
        (clip_kind, report) for clip_kind, report in reports if report["clips"] >= 8
    ]  # fewer clips are not meaningful
    names = list(summary["held_out"]["baselines"])
    lines = [
        f"A run of the first command ({summary['parameters'] / 1e6:.1f} M parameters, {summary['steps']} updates, "
        f"{summary['train_seconds'] / 60:.1f} minutes on {summary['threads']} CPU threads in {summary['precision']}, "
        f"{speed_text}). Held-out squared error of masked patches, compared with what averages "
        "and straight lines make of the same visible patches; InfoNCE top-1 accuracy compared with chance:",
        "",
        "| held-out clips | "
        + " | ".join(["MAE-AST", *(name.replace("_", " ") for name in names)])
        + " | accuracy | chance |",
        "|---" * (len(names) + 4) + "|",
    ]
    for clip_kind, report in reports:
        errors = [report["reconstruction_mse"], *(report["baselines"][name] for name in names)]
        cells = [f"{clip_kind} ({report['clips']})", *(f"{error:.3f}" for error in errors)]
        lines.append(f"| {' | '.join(cells)} | {100 * report['accuracy']:.1f} % | {100 * report['chance']:.2f} % |")
    better = [
        f"{name.replace('_', ' ')} on {clip_kind}"
        for clip_kind, report in reports
        for name, error in report["baselines"].items()
        if error <= report["reconstruction_mse"]
    ]
    lines += ["", f"Where a baseline is better: {', '.join(better) or 'nowhere'}."]
    return "\n".join(lines)


def screen_table() -> str:
    """What pays in a short pretraining, from the rows of benchmarks/studies/screen.py."""
    lines = [
        "| arm | updates | audio per update | processor time | error over same band's | InfoNCE top-1 | rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in map(json.loads, (RESULTS / "screen.jsonl").read_text().splitlines()):
        options = row["options"]
        name = f"{row['arm']} \\*" if "change" in row else row["arm"]
        error = row["reconstruction_mse"] / row["same_band_mse"]
        has_info_nce = options["model_args"].get("classification_weight", 1.0) > 0.0
        accuracy = f"{100 * row['accuracy']:.1f} %" if has_info_nce else "-"
        lines.append(
            f"| {name} | {options['steps']:,} | {options['batch_seconds']:.0f} s | {row['cpu_seconds']} s "
            f"| {error:.3f} | {accuracy} | {row['effective_rank']:.1f} |"
        )
    return "\n".join(lines)


def frame_table() -> str:
    """Held-out error and scores of one run of recipes/frame.yaml."""
    run = json.loads((RESULTS / "frame_recipe.json").read_text())
    held_out = run["held_out"]
    errors = ", ".join(f"{name.replace('_', ' ')} {error:.4f}" for name, error in held_out["baselines"].items())
    lines = [
        f"One run, seed {run['seed']}, {run['steps']:,} updates. Held-out error {held_out['reconstruction_mse']:.4f} "
        f"({errors}); InfoNCE {100 * held_out['accuracy']:.1f} % (chance {100 * held_out['chance']:.2f} %); effective "
        f"rank {held_out['effective_rank']:.1f} of {held_out['clips']}.",
        "",
        "| task | mode | head | validation | test (95 % interval) | log-mel, same head | difference (95 % interval) |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in run["scores"]:
        low, high = score["ci95"]
        cells = [score["task"], score["mode"], score["head"], f"{score['valid']:.3f}"]
        cells.append(f"{score['value']:.3f} ({low:.3f} - {high:.3f})")
        if baseline := score.get("log_mel_baseline"):
            low, high = baseline["difference_ci95"]
            cells += [f"{baseline['value']:.3f}", f"{baseline['difference']:+.3f} ({low:+.3f} to {high:+.3f})"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    against = run["finetuned_against_untrained"]
    low, high = against["ci95"]
    lines += ["", f"Fine-tuned on {against['task']}, the model differs from the same network without pretraining by "]
    lines[-1] += f"{against['difference']:.3f} (95 % interval {low:+.3f} to {high:+.3f})."
    return "\n".join(lines)


def section_of(result: dict[str, Any], section: str) -> dict[str, Any]:
    """A result of bench_step.py with the cases of one section only."""
    return {**result, "benchmarks": [case for case in result["benchmarks"] if case["extra_info"]["part"] == section]}


def audio_ratios(baseline: dict[str, Any], column: dict[str, Any]) -> list[float]:
    """Speed relative to the baseline column, for equal audio, in each round."""
    audio_ratio = column["audio_seconds"] / baseline["audio_seconds"]
    return [
        baseline_seconds / column_seconds * audio_ratio
        for baseline_seconds, column_seconds in zip(baseline["seconds"], column["seconds"], strict=True)
    ]


def audio_speed(baseline: dict[str, Any], column: dict[str, Any]) -> float:
    """Median of ``audio_ratios``."""
    return statistics.median(audio_ratios(baseline, column))


def ranged(ratios: Sequence[float]) -> str:
    """Median (min - max) of the rounds' ratios; marked as a tie if 1 lies between min and max."""
    low, high = min(ratios), max(ratios)
    if low == high:
        return f"{low:.2f} x"
    tie = ", tie" if low < 1.0 < high else ""
    return f"{statistics.median(ratios):.2f} x ({low:.2f} - {high:.2f}){tie}"


def rate(column: dict[str, Any], unit: str) -> float:
    """Clips, tokens, seconds of audio or FLOP per second: the median over the rounds."""
    return statistics.median(column[unit] / seconds for seconds in column["seconds"])


def short(value: float) -> str:
    """Three significant digits; all digits of numbers from 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def forward_share(column: dict[str, Any]) -> float | None:
    """Share of a step's time until the loss is computed; None if it was not recorded."""
    after = ("backward", "optimizer", "update")
    shares = [
        1.0 - sum(sample.get(stage, 0.0) for stage in after) / sum(sample.values())
        for sample in column["stages"]
        if set(sample) - set(after)
    ]
    return statistics.median(shares) if shares else None


def mfu(case: dict[str, Any], column: dict[str, Any]) -> float:
    """The model's FLOP/s as a share of those of a large matrix product in the same precision, in its best round."""
    product = case["peak"][column["precision"]]
    return rate(column, "flops") / (product["work"] / min(product["seconds"]))


def _measures(case: dict[str, Any], column: dict[str, Any]) -> list[str]:
    """Cells: share of the forward, clips/s, tokens/s, hours of audio per hour, MB/clip, MFU."""
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
    """Seconds per training step by column, and the stages of ``original``; from bench_step.py."""
    result = section_of(result, "main")
    cases = {case["param"]: case["extra_info"] for case in result["benchmarks"]}
    precisions = [p for p in ("fp32", "bf16") if any(p in case["peak"] for case in cases.values())]
    lines = [where_and_when(result, "the first column of the same precision, for equal audio")]
    mixed = cases.get("mixed", {}).get("columns", {})
    original = next((column for name, column in mixed.items() if name.startswith("original")), None)
    uncropped = next((column for name, column in mixed.items() if not name.startswith("original")), None)
    if original and uncropped:
        clip_lengths = [second for batch in uncropped["clip_seconds"] for second in batch]
        lines[0] += (
            f" In `mixed`, clips of {min(clip_lengths):.1f} to {max(clip_lengths):.1f} s, `original` crops the "
            f"{uncropped['audio_seconds']:.0f} s of audio to {original['audio_seconds']:.0f} s, "
            "which alone count for it; the others take them whole."
        )

    def has_variant(name: str, variant: str) -> bool:
        return any(column.startswith(variant) for column in cases[name]["columns"])

    without_compiled = {
        variant: [name for name in cases if f"{name} compiled" not in cases and not has_variant(name, variant)]
        for variant in ("compiled", "vitmae compiled")
    }
    unmeasured = [f"`{variant}` on {', '.join(names)}" for variant, names in without_compiled.items() if names]
    if unmeasured:
        lines[0] += (
            f" Not measured: {'; '.join(unmeasured)}, nor anything compiled with 6 layers: compiling takes minutes, "
        )
        lines[0] += "and ViTMAE takes square patches of one length alone."
    lines[0] += f" What stands behind the seconds is of {precisions[-1]}. {MEANING}"
    headings = " | ".join(f"{precision}: s a step | speed" for precision in precisions)
    num_cells = 2 + 2 * len(precisions) + MEASURES.count("|") + 1
    lines += ["", f"| case | column | {headings} | {MEASURES} |", "|---" * num_cells + "|"]
    for name, case in cases.items():
        variants = list(dict.fromkeys(column.removesuffix(" bf16") for column in case["columns"]))
        for variant in variants:
            cells, last_column = [f"{name}, {case['clips']} clips", variant], None
            for precision in precisions:
                column = case["columns"].get(variant if precision == "fp32" else f"{variant} bf16")
                first_column = next(
                    (other for other in case["columns"].values() if other["precision"] == precision), None
                )
                cells += [_seconds(column), ranged(audio_ratios(first_column, column))] if column else ["", ""]
                last_column = column or last_column
            lines.append(f"| {' | '.join([*cells, *_measures(case, last_column)])} |")
    lines += ["", f"Faster than `fast`, or a tie: {', '.join(ahead_of('fast', cases)) or 'nothing'}."]
    originals = {
        name: column
        for name, case in cases.items()
        for key, column in list(case["columns"].items())[:1]
        if key.startswith("original")
    }
    lines += ["", *stage_lines(originals)] if originals else []
    return "\n".join([*lines, *left_out_lines(cases), *failed_lines(result)])


def left_out_lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Lines that list columns which cannot run on this machine, with the reason; empty if there are none."""
    left_out = {f"`{name}`: {reason}" for case in cases.values() for name, reason in case["left_out"].items()}
    return ["", f"Left out: {'; '.join(sorted(left_out))}."] if left_out else []


def failed_lines(result: dict[str, Any]) -> list[str]:
    """Lines that list columns that raised or computed wrong values, with the reason; empty if there are none."""
    failures = [
        f"`{name}` on {case.get('param') or case['name']}: {reason}"
        for case in result["benchmarks"]
        for name, reason in case["extra_info"].get("failed", {}).items()
    ]
    return ["", f"Failed, not timed: {'; '.join(failures)}."] if failures else []


def ahead_of(ours: str, cases: dict[str, dict[str, Any]]) -> list[str]:
    """Columns faster than ``ours`` in their precision, for equal audio, in the median or (a tie) in some round."""
    faster = []
    for name, case in cases.items():
        for column, samples in case["columns"].items():
            own = case["columns"].get(f"{ours} bf16" if column.endswith(" bf16") else ours)
            if own is not None and samples is not own and max(ratios := audio_ratios(own, samples)) > 1.0:
                faster.append(f"`{column}` on {name}, {ranged(ratios)}")
    return faster


def stage_lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Table of the stages of each case's ``original`` column, in percent of the sum of their medians."""
    stages = list(next(iter(cases.values()))["stages"][0])
    precisions = [case["precision"] for case in cases.values()]
    headings = [f"{name}, {precision}" for name, precision in zip(cases, precisions, strict=True)]
    lines = [f"| stage of `original` | {' | '.join(headings)} |", "|---" * (len(cases) + 1) + "|"]
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
    """Ratios of each SSAST column to MAE-AST: speed, memory and FLOPs per clip."""
    columns = case["columns"]
    mae_ast = next((column for name, column in columns.items() if name.startswith("fast, no dropout")), None)
    ratios: dict[str, dict[str, float | None]] = {}
    if mae_ast is None:
        return ratios
    for name, ssast in columns.items():
        if name.startswith("ssast"):
            memory = (ssast["peak_bytes_a_clip"], mae_ast["peak_bytes_a_clip"])
            ratios[name] = {
                "speed": audio_speed(ssast, mae_ast),
                "memory": None if None in memory else memory[0] / memory[1],
                "FLOPs": ssast["flops"] / mae_ast["flops"],
            }
    return ratios


def ssast_table(result: dict[str, Any]) -> str:
    """MAE-AST against SSAST; from bench_step.py."""
    result = section_of(result, "ssast")
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
            column_ratios = ratios.get(key, {}).values()
            cells += ["" if ratio is None else f"{ratio:.2f} x" for ratio in column_ratios] or [""] * 3
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *failed_lines(result)])


FACTORS = {  # factor of a sweep -> (label, unit)
    "clips": ("clips a batch", ""),
    "seconds": ("length of a clip", " s"),
    "mask_ratio": ("mask ratio", ""),
    "encoder_layers": ("layers of the encoder", ""),
}


GROWTH = {"seconds": "time", "bytes": "memory"}


def recipe_table(result: dict[str, Any]) -> str:
    """Seconds per update of the shipped recipes, and Muon's share of them; from bench_step.py."""
    result = section_of(result, "recipe")
    cases = {case["param"].removeprefix("recipe "): case["extra_info"] for case in result["benchmarks"]}
    lines = [
        where_and_when(result, "`original` of the same precision") + " All columns have the sizes of the recipe and "
        "take the same clips. `original` and `vitmae` have the paper's objective and AdamW; the recipe predicts half "
        "of the masked tokens in training.",
        "",
        "| recipe | column | fp32: s an update | speed | bf16: s an update | speed |",
        "|---|---|---|---|---|---|",
    ]
    shares = []
    for name, case in cases.items():
        columns = case["columns"]
        for variant in dict.fromkeys(column.removesuffix(" bf16") for column in columns):
            cells = [name, f"`{variant}`"]
            for suffix in ("", " bf16"):
                column, original = columns.get(variant + suffix), columns.get("original" + suffix)
                cells += [_seconds(column), ranged(audio_ratios(original, column))] if column and original else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        for suffix, precision in (("", "fp32"), (" bf16", "bf16")):
            muon, adamw = columns.get("recipe" + suffix), columns.get("recipe, adamw" + suffix)
            if muon and adamw:
                share = 1 - 1 / statistics.median(audio_ratios(muon, adamw))
                shares.append(f"{name} {100 * share:.0f} % ({precision})")
    lines += ["", f"What Muon adds to AdamW, as a share of the update: {', '.join(shares)}."]
    lines += ["", f"Faster than `recipe`, or a tie: {', '.join(ahead_of('recipe', cases)) or 'nothing'}."]
    return "\n".join([*lines, *left_out_lines(cases), *failed_lines(result)])


def sweep(result: dict[str, Any], factor: str) -> list[tuple[float, dict[str, dict[str, Any]]]]:
    """(value, columns by name without precision) of the points that differ only in a factor, in ascending order. The
    base point is one of them."""
    cases = (case["extra_info"] for case in section_of(result, "sweep")["benchmarks"])
    points = [
        (case[factor], {name.removesuffix(" bf16"): column for name, column in case["columns"].items()})
        for case in cases
        if case["factor"] in ("", factor)
    ]
    return sorted(points, key=lambda point: point[0])


Law = tuple[float, float, float]  # a, b, p of a + b x^p


def law(x: Sequence[float], y: Sequence[float]) -> Law:
    """Fit y = a + b x^p with a, b >= 0 and 0.5 <= p <= 3 by least squares of the relative errors.

    The fixed cost a does not affect the power: a line that does not start at 0 has p = 1.
    """
    fits = []
    for p in (hundredth / 100 for hundredth in range(50, 301)):
        # Linear least squares of a / y + b x^p / y = 1.
        u, v = [1.0 / value for value in y], [value**p / other for value, other in zip(x, y, strict=True)]
        sum_uu, sum_uv, sum_vv = (sum(map(math.prod, zip(*pair, strict=True))) for pair in ((u, u), (u, v), (v, v)))
        determinant = sum_uu * sum_vv - sum_uv * sum_uv
        a = (sum(u) * sum_vv - sum(v) * sum_uv) / determinant if determinant > 0.0 else 0.0
        b = (sum(v) - a * sum_uv) / sum_vv
        if a < 0.0:
            a, b = 0.0, sum(v) / sum_vv
        elif b < 0.0:
            a, b = sum(u) / sum_uu, 0.0
        fits.append((sum((a * c + b * d - 1.0) ** 2 for c, d in zip(u, v, strict=True)), (a, b, p)))
    return min(fits)[1]


def growth(result: dict[str, Any], factor: str) -> dict[str, dict[str, tuple[list[float], list[float], Law]]]:
    """Growth of time and memory with a factor: column -> quantity -> (values, measurements, law). Needs 4 points.

    The quantities are per batch if the factor is the number of clips, otherwise per clip.
    """
    points = sweep(result, factor)
    growth_by_column: dict[str, dict[str, tuple[list[float], list[float], Law]]] = {}
    for name in dict.fromkeys(name for _, columns in points for name in columns):
        measured = [(value, columns[name]) for value, columns in points if name in columns]
        clips = [column["clips"] / column["steps"] for _, column in measured]
        scale = [1.0 if factor == "clips" else 1.0 / count for count in clips]
        quantities = {
            "seconds": [
                statistics.median(column["seconds"]) / column["steps"] * clip_scale
                for (_, column), clip_scale in zip(measured, scale, strict=True)
            ]
        }
        if all(column["peak_bytes_a_clip"] for _, column in measured):
            memory = zip(measured, clips, scale, strict=True)
            quantities["bytes"] = [
                column["peak_bytes_a_clip"] * count * clip_scale for (_, column), count, clip_scale in memory
            ]
        values = [value for value, _ in measured]
        if len(values) > 3:
            growth_by_column[name] = {
                quantity: (values, quantity_values, law(values, quantity_values))
                for quantity, quantity_values in quantities.items()
            }
    return growth_by_column


def sweep_table(result: dict[str, Any]) -> str:
    """One factor at a time: milliseconds and memory per clip by column, and their growth; from bench_step.py."""
    cases = [case["extra_info"] for case in section_of(result, "sweep")["benchmarks"]]
    first = next((case for case in cases if case["factor"] == ""), cases[0])
    names = list(dict.fromkeys(name.removesuffix(" bf16") for case in cases for name in case["columns"]))
    headings = " | ".join([*(f"`{name}`, ms a clip" for name in names), *(f"`{name}`, MB a clip" for name in names)])
    precision = next(iter(first["peak"]))
    base = (
        f"{first['preset']}, {first['clips']} clips of {first['seconds']:g} s, mask ratio {first['mask_ratio']:g}, "
        f"{first['encoder_layers']} layers, {precision}"
    )
    lines = [
        where_and_when(section_of(result, "sweep"), "`original`") + f" Base point: {base}.",
        "",
        f"| one thing changed | {headings} | speed of `fast` |",
        "|---" * (2 + 2 * len(names)) + "|",
    ]
    for factor, (label, unit) in FACTORS.items():
        for value, columns in sweep(result, factor):
            cells = [f"{label}: {value:g}{unit}"]
            row_columns = [columns.get(name) for name in names]
            cells += [short(1e3 / rate(column, "clips")) if column else "" for column in row_columns]
            peaks = [column and column["peak_bytes_a_clip"] for column in row_columns]
            cells += [short(peak / 1e6) if peak else "" for peak in peaks]
            original, fast = columns.get("original"), columns.get("fast")
            cells.append(ranged(audio_ratios(original, fast)) if original and fast else "")
            lines.append(f"| {' | '.join(cells)} |")
    growth_texts = [
        f"with {FACTORS[factor][0]}, `{name}` "
        + ", ".join(
            f"{GROWTH[quantity]} {p:.2f} (fixed {100 * a / y[-1]:.0f} %)"
            for quantity, (_, y, (a, _, p)) in fits.items()
        )
        for factor in ("clips", "seconds")
        for name, fits in growth(result, factor).items()
    ]
    quantity = "Powers p of growth, of a + b x^p fitted; the fixed part a as a share at the largest x"
    lines += ["", f"{quantity}: {'; '.join(growth_texts)}."] if growth_texts else []
    return "\n".join([*lines, *failed_lines(section_of(result, "sweep"))])


def goals(result: dict[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """Goals of the step on one H100, compared with a run of bench_step.py on a GPU.

    Base patch model, bf16, dropout 0.1, at least 256 clips of 10 s, all columns of one run, medians over its rounds.

    Returns:
        (name, goal, measured, reached) of each goal; measured and reached are ("not measured", None) if a case or
        column is missing.
    """
    cases = {case["param"]: case["extra_info"]["columns"] for case in result["benchmarks"]}

    def ahead_of(other: str) -> float:
        """Speed relative to another column, in the case that has both (compiled columns have a separate case)."""
        pairs = [cases[name] for name in ("patch_base", "patch_base compiled") if other in cases.get(name, {})]
        ratios = zip(pairs[0][other]["seconds"], pairs[0]["fast bf16"]["seconds"], strict=True)
        return statistics.median(other_seconds / fast_seconds for other_seconds, fast_seconds in ratios)

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
    judged: list[tuple[str, str, str, bool | None]] = []
    for name, goal, measure, reaches in rows:
        try:
            measured = measure()
        except (KeyError, IndexError, TypeError):  # no such case or column, or memory was not measured
            judged.append((name, f"{goal:g}", "not measured", None))
        else:
            judged.append((name, f"{goal:g}", f"{measured:.4g}", reaches(measured, goal)))
    return judged


def where_and_when(result: dict[str, Any], against: str = "the first column of a case") -> str:
    """Sentences above a table of columns that took turns: machine, commit and method."""
    machine, commit = result["machine_info"], commit_of(result)
    cases = [case["extra_info"] for case in result["benchmarks"]]
    loads = [case[f"load_average_{moment}"][0] for case in cases for moment in ("before", "after")]
    rounds = min((len(sample["seconds"]) for case in cases for sample in _samples(case["columns"])), default=0)
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}, load "
        f"average {min(loads):.1f} to {max(loads):.1f}; medians (quartiles) of {rounds} rounds in which the columns "
        f"take turns. Speeds are against {against}: the median (smallest - largest) of the rounds' own ratios, a tie "
        "where 1 lies between. Where that is another number than the ratio of the medians beside it, the difference is "
        "the machine's noise."
    )


def _samples(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples of each column or, if a column has several timings, of each timing."""
    return [sample for column in columns.values() for sample in ([column] if "seconds" in column else column.values())]


def milliseconds(samples: list[float]) -> str:
    low, median, high = (f"{1e3 * value:.3g}" for value in quartiles(samples))
    return f"{median} ({low} - {high})"


def times_as_fast(first: dict[str, Any], column: dict[str, Any]) -> float:
    """Speed relative to the first column: the median of the rounds' ratios."""
    return statistics.median(
        first_seconds / column_seconds
        for first_seconds, column_seconds in zip(first["seconds"], column["seconds"], strict=True)
    )


def speed(first: dict[str, Any], column: dict[str, Any]) -> str:
    """Text of the rounds' ratios, see ``ranged``."""
    return ranged(
        [
            first_seconds / column_seconds
            for first_seconds, column_seconds in zip(first["seconds"], column["seconds"], strict=True)
        ]
    )


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
        first_column, peak = next(iter(case["columns"].values()), None), case["peak"]
        for name, column in case["columns"].items():
            cells = [case["op"], case["point"], name]
            for timing in ("forward", "forward + backward"):
                timing_samples = column.get(timing)
                cells += (
                    [milliseconds(timing_samples["seconds"]), speed(first_column[timing], timing_samples)]
                    if timing_samples
                    else ["", ""]
                )
            timing = list(column)[-1]
            rate = case["work"][timing] / statistics.median(column[timing]["seconds"]) / 1e9
            share = rate * 1e9 / (peak["work"] / min(peak["seconds"]))
            cells += [f"{rate:.3g} {'GB/s' if case['unit'] == 'bytes' else 'GFLOP/s'}", f"{100 * share:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    cases = [case["extra_info"]["left_out"] for case in result["benchmarks"]]
    left_out = {f"`{name}`: {reason}" for case in cases for name, reason in case.items()}
    lines += ["", f"Left out: {'; '.join(sorted(left_out))}."] if left_out else []
    slower = [
        f"`{name}` on {case['op']}, {case['point']}, {times_as_fast(first_column[timing], column[timing]):.2f} x"
        for case in (case["extra_info"] for case in result["benchmarks"])
        for first_column in [case["columns"].get("original")]
        for name, column in case["columns"].items()
        for timing in [list(column)[-1]]
        if first_column is not None and times_as_fast(first_column[timing], column[timing]) < 1.0
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
        first_column = next(iter(case["columns"].values()))
        for name, column in case["columns"].items():
            cells = [case["point"], case["strategy"], str(case["clips"]), str(case["tokens"]), name]
            rate = case["clips"] / statistics.median(column["seconds"])
            cells += [milliseconds(column["seconds"]), speed(first_column, column), f"{rate:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            if times_as_fast(first_column, column) < 1.0:
                slower.append(f"`{name}` on {case['point']}, {times_as_fast(first_column, column):.2f} x")
    lines += ["", f"Slower than the paper's loop: {'; '.join(slower) or 'nothing'}."]
    return "\n".join(lines)


def data_table(result: dict[str, Any]) -> str:
    """Milliseconds and audio per second of each stage and column, goals, and waiting for data; from bench_data.py."""
    lines = [
        where_and_when(result),
        "",
        "| what | column | ms | speed | clips/s | audio seconds a second | a second of one core | MB/s of PCM16 |",
        "|---" * 8 + "|",
    ]
    goals: dict[str, list[str]] = {}
    waits = []
    for benchmark in result["benchmarks"]:
        stage, case = benchmark["name"].removeprefix("bench_"), benchmark["extra_info"]
        first_column = next(iter(case["columns"].values()))
        for name, column in case["columns"].items():
            seconds, audio = statistics.median(column["seconds"]), case["audio_seconds"]
            cpu_seconds = column.get("cpu_seconds")  # not recorded for a run, which has several processes
            cells = [stage, name, milliseconds(column["seconds"]), speed(first_column, column)]
            cells += [f"{case['clips'] / seconds:.0f}", f"{audio / seconds:,.0f}"]
            cells += [
                f"{audio / statistics.median(cpu_seconds):,.0f}" if cpu_seconds else "",
                f"{audio * 0.032 / seconds:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            if "waiting" in column:
                share, later_share = (_percent(column[key]) for key in ("waiting", "waiting_later"))
                waits.append(f"{name} {share}, in the second half of its updates {later_share}")
        if "goal" in case:
            name, min_speed = case["goal"]
            ratio = times_as_fast(first_column, case["columns"][name])
            goal = f"`{name}` at least {min_speed:g} x as fast as `{next(iter(case['columns']))}`"
            goals.setdefault(goal, []).append(f"{stage} {ratio:.1f} x, {'reached' if ratio >= min_speed else 'missed'}")
    lines += [line for goal, results in goals.items() for line in ("", f"Goal: {goal}. {'; '.join(results)}.")]
    if waits:
        lines += ["", f"Of the time of a run of `pretrain`, waiting for data: {'; '.join(waits)}."]
    return "\n".join(lines)


def data_rate_table(result: dict[str, Any]) -> str:
    """Audio that one thread supplies to training, ours compared with the official column; from bench_data.py."""
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
    for benchmark in result["benchmarks"]:
        if not benchmark["name"].startswith("bench_loader["):
            continue
        case = benchmark["extra_info"]
        first, *_ = case["columns"]
        for name in (first, *(name for name in shown if name in case["columns"])):
            column = case["columns"][name]
            seconds = statistics.median(column["seconds"])
            cells = [benchmark["name"][len("bench_loader[") : -1], name, f"{case['clips'] / seconds:,.0f}"]
            cells += [f"{case['audio_seconds'] / seconds:,.0f}", speed(case["columns"][first], column)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(shares: list[float]) -> str:
    low, median, high = (f"{100 * value:.1f}" for value in quartiles(shares))
    return f"{median} % ({low} - {high})"


STEP_CPU = "step_cpu.json"


def distances(result: dict[str, Any], column: str) -> list[float]:
    """Relative difference of a column's loss from the reference's, per update."""
    column_rows, reference_rows = (result["columns"][name]["rows"] for name in (column, "reference"))
    return [
        column_row["loss"] / reference_row["loss"] - 1.0
        for column_row, reference_row in zip(column_rows, reference_rows, strict=True)
    ]


def convergence_table(dirty: bool) -> str:
    """Losses of the fast step compared with those of the plain one."""
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
        absolute_distances = [abs(distance) for distance in distances(result, name)]
        first_mean, all_mean = (
            f"{100 * statistics.fmean(values):.2g} %" for values in (absolute_distances[:20], absolute_distances)
        )
        means = [f"{statistics.fmean(values):.3f}" for values in (losses[:20], losses[-20:])]
        cells = [
            name,
            *means,
            *(("", "") if name == "reference" else (first_mean, all_mean)),
            f"{column['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[bool], str]] = {
    "pretrain": lambda dirty: pretrain_table(),
    "screen": lambda dirty: screen_table(),
    "frame": lambda dirty: frame_table(),
    "step_cpu": lambda dirty: step_table(benchmark_result(STEP_CPU, dirty)),
    "ssast_cpu": lambda dirty: ssast_table(benchmark_result(STEP_CPU, dirty)),
    "recipes_cpu": lambda dirty: recipe_table(benchmark_result("recipes_cpu.json", dirty)),
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
    "docs/recipes.md": ("screen", "frame", "recipes_cpu"),
    "docs/benchmarks.md": ("sweep_cpu", "ops_cpu", "masking_cpu", "data_cpu"),
}


def render(text: str, page: str = "README.md", dirty: bool = False) -> str:
    """A page's text with every marked table regenerated; ``dirty`` accepts results of uncommitted code."""
    for name in PAGES[page]:
        pattern = rf"(<!-- report:{name} -->\n)(.*?)<!-- /report -->"
        marked = re.search(pattern, text, re.S)
        if marked is None:
            raise ValueError(f"{page} has no place for the table {name!r}")
        begin, end = marked.span(2)
        text = f"{text[:begin]}{TABLES[name](dirty)}\n{text[end:]}"
    return text


def machine_page(folder: Path) -> str:
    """Page with every table and figure of the result files in a folder, including results of uncommitted code."""
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
    """One line per result file: its commit, and the number of commits to mae_ast_fast and kernels since."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        commit = result.get("commit_info", {}).get("id") if isinstance(result, dict) else None
        if commit is None:
            lines.append(f"{path.name}: names no commit")
            continue
        command = ["git", "rev-list", "--count", f"{commit}..HEAD", "--", "mae_ast_fast", "kernels"]
        try:
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            count = process.stdout.strip() or f"unknown, {process.stderr.strip()}"
        except OSError as error:
            count = f"unknown, {error}"
        lines.append(f"{path.name}: {commit[:12]}, commits to mae_ast_fast and kernels since: {count}")
    return lines


def main() -> int:
    import report_figures

    arguments = sys.argv[1:]
    if "--check-age" in arguments:
        print("\n".join(ages()))
        return 0
    if "--results" in arguments:
        folder = Path(arguments[arguments.index("--results") + 1])
        (folder / "report.md").write_text(machine_page(folder) + "\n")
        print(folder / "report.md")
        return 0
    dirty, check, changed = "--dirty" in arguments, "--check" in arguments, False
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
    import report  # under the module name that report_figures uses

    sys.exit(report.main())
