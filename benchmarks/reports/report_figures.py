"""Draw docs/figures from the result files in benchmarks/results, for report.py. Needs matplotlib.

Equal results give equal files. The metadata of each figure contains a hash of its result file, so that ``stale`` finds
figures of other results than the committed ones.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from typing import Any

import report

FIGURES = report.ROOT / "docs" / "figures"
COLORS = {
    "original": "C7",
    "reference": "C0",
    "compiled": "C9",
    "fast": "C3",
    "vitmae": "C4",
    "vitmae compiled": "C6",
    "ssast": "C1",
    "ssast, two passes": "C8",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _color(name: str) -> str:
    return COLORS.get(name.removesuffix(" bf16"), COLORS["fast"])


def _megabytes(column: dict[str, Any]) -> float:
    return (column["peak_bytes_a_clip"] or 0) / 1e6


def _bars(axis: Any, names: list[str], values: list[float], number_format: str = "{:.3g}") -> None:
    """Horizontal bars, the first one on top."""
    bars = axis.barh(names, values, color=[_color(name) for name in names])
    axis.bar_label(bars, [number_format.format(value) for value in values], padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", alpha=0.3)


def step_bars(result: dict[str, Any]) -> Any:
    """Throughput and memory by column of each main case."""
    cases = report.section_of(result, "main")["benchmarks"]
    rows = [len(case["extra_info"]["columns"]) for case in cases]
    figure, axes = _pyplot().subplots(
        len(cases),
        2,
        figsize=(10, 0.6 * len(cases) + 0.2 * sum(rows)),
        squeeze=False,
        height_ratios=[row + 2 for row in rows],
        constrained_layout=True,
    )
    for (left, right), case in zip(axes, cases, strict=True):
        columns = case["extra_info"]["columns"]
        _bars(left, list(columns), [report.rate(column, "audio_seconds") for column in columns.values()])
        left.set_title(f"{case['param']}: seconds of audio a second", fontsize=8)
        _bars(right, list(columns), [_megabytes(column) for column in columns.values()])
        right.set_title("MB a clip at the peak of a step", fontsize=8)
    return figure


def waterfall(result: dict[str, Any]) -> Any:
    """Gain of each step from ``original`` to the fastest column in the first main case, with the error of the loss."""
    case = report.section_of(result, "main")["benchmarks"][0]
    columns = case["extra_info"]["columns"]
    ladder = [
        ("original", "the paper's style"),
        ("reference", "packed, no loops over clips,\nlast layer on hidden tokens"),
        ("fast", "attention clip by clip,\nTrainStep"),
        ("fast bf16", "bf16"),
    ]
    if "original" not in columns:  # on a GPU all columns are bf16
        ladder = [(f"{name} bf16", description) for name, description in ladder[:2]]
        ladder.append(("fast bf16", "Triton kernels, FlashAttention,\nTrainStep"))
    ladder = [(name, description) for name, description in ladder if name in columns]  # a column may have failed
    figure, axis = _pyplot().subplots(figsize=(8, 3.6), constrained_layout=True)
    previous, labels = 0.0, []
    for i, (name, description) in enumerate(ladder):
        rate = report.rate(columns[name], "clips")
        color = "C7" if i == 0 else "C2" if rate >= previous else "C3"
        axis.bar(i, rate - previous, bottom=previous, color=color, width=0.6)
        change = f"\n{report.audio_speed(columns[ladder[i - 1][0]], columns[name]):.2f} x" if i else ""
        axis.text(i, max(rate, previous), f"{rate:.3g}{change}", ha="center", va="bottom", fontsize=8)
        if i:
            axis.plot([i - 0.7, i + 0.3], [previous, previous], color="black", linewidth=0.5)
        labels.append(f"{name}\n{description}\nloss off by {columns[name]['loss_error']:.0e}")
        previous = rate
    axis.set_xticks(range(len(ladder)), labels, fontsize=7)
    axis.set(ylabel="clips/s", title=f"{case['param']}: what each step brings (dropout 0.1 in all)")
    axis.title.set_fontsize(9)
    axis.margins(y=0.2)
    axis.grid(axis="y", alpha=0.3)
    return figure


def ssast(result: dict[str, Any]) -> Any:
    """Speed and memory of MAE-AST relative to SSAST, compared with the paper."""
    cases = report.section_of(result, "ssast")["benchmarks"]
    ratios_by_column = {
        f"{case['param'].removeprefix('ssast ')}, {name}": ratios
        for case in cases
        for name, ratios in report.against_ssast(case["extra_info"]).items()
    }
    figure, axes = _pyplot().subplots(
        1, 2, figsize=(10, 1.2 + 0.35 * len(ratios_by_column)), sharey=True, constrained_layout=True
    )
    for axis, quantity in zip(axes, ("speed", "memory"), strict=True):
        values = [ratios[quantity] or 0.0 for ratios in ratios_by_column.values()]
        bars = axis.barh(
            list(ratios_by_column), values, color=["C8" if "two passes" in name else "C1" for name in ratios_by_column]
        )
        axis.bar_label(bars, [f"{value:.2f} x" for value in values], padding=2, fontsize=7)
        if quantity == "speed":
            flops = [ratios["FLOPs"] for ratios in ratios_by_column.values()]
            axis.plot(flops, range(len(ratios_by_column)), "k|", markersize=14, label="ratio of FLOPs")
        axis.axvline(report.PAPER[quantity], color="C0", linestyle="--", label=f"paper: {report.PAPER[quantity]:g} x")
        axis.set_title(
            {"speed": "speed of MAE-AST against SSAST", "memory": "memory of SSAST / MAE-AST"}[quantity], fontsize=9
        )
        axis.margins(x=0.12)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    handles = [handle for axis in axes for handle in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    return figure


def scaling(result: dict[str, Any]) -> Any:
    """Time and memory over the clips per batch and over the clip length, with fitted laws."""
    from matplotlib.ticker import LogLocator

    figure, axes = _pyplot().subplots(2, 2, figsize=(9, 6.4), constrained_layout=True)
    for row, factor in zip(axes, ("clips", "seconds"), strict=True):
        label, unit = report.FACTORS[factor]
        values = [value for value, _ in report.sweep(result, factor)]
        per = "a batch" if factor == "clips" else "a clip"
        for name, growth in report.growth(result, factor).items():
            for axis, quantity in zip(row, ("seconds", "bytes"), strict=True):
                if quantity in growth:
                    x, y, (*_, power) = growth[quantity]
                    y = [value / 1e6 for value in y] if quantity == "bytes" else y
                    axis.loglog(x, y, "o-", color=_color(name), markersize=4, label=f"{name}: a + b x^{power:.2f}")
        for axis, quantity in zip(row, (f"seconds of a step, {per}", f"MB at the peak, {per}"), strict=True):
            if not axis.lines:  # fewer than two points were measured
                continue
            axis.set_xlabel(f"{label}{',' + unit if unit else ''}", fontsize=8)
            axis.set_ylabel(quantity, fontsize=8)
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
    return figure


def roofline(result: dict[str, Any]) -> Any:
    """Rates of the operations at the base point, compared with the machine's peak in the same rounds."""
    cases = [case["extra_info"] for case in result["benchmarks"] if case["extra_info"]["point"] == "base point"]
    figure, axes = _pyplot().subplots(1, 2, figsize=(11, 5.5), constrained_layout=True)
    for axis, unit, roof in zip(axes, ("bytes", "FLOP"), ("a large copy", "a large matrix product"), strict=True):
        unit_cases = [case for case in cases if case["unit"] == unit]
        names, values = [], []
        for case in unit_cases:
            for name, column in case["columns"].items():
                timing = list(column)[-1]
                names.append(f"{case['op']}, {name}")
                values.append(case["work"][timing] / statistics.median(column[timing]["seconds"]) / 1e9)
        if not unit_cases:
            continue
        colors = [COLORS.get(name.rpartition(", ")[2], "C2") for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=6)
        peaks = [case["peak"]["work"] / statistics.median(case["peak"]["seconds"]) / 1e9 for case in unit_cases]
        axis.axvline(
            statistics.median(peaks), color="black", linestyle="--", label=f"{roof}: {statistics.median(peaks):.3g}"
        )
        axis.set_title({"bytes": "GB/s of ops that move", "FLOP": "GFLOP/s of ops that multiply"}[unit], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
        axis.grid(axis="x", alpha=0.3)
    return figure


def convergence(result: dict[str, Any]) -> Any:
    """Losses of the plain and the fast step on equal audio, seeds and masks, and their difference."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    for index, (name, column) in enumerate(result["columns"].items()):
        steps = [row["step"] for row in column["rows"]]
        style = {"color": f"C{index}", "linestyle": "-" if index == 0 else "--", "linewidth": 1, "label": name}
        axes[0].plot(steps, [row["loss"] for row in column["rows"]], **style)
        if name != "reference":
            axes[1].plot(steps, [100 * distance for distance in report.distances(result, name)], **style)
    axes[0].set(xlabel="update", ylabel="loss", title="same audio, weights, masks; no dropout")
    axes[1].set(xlabel="update", ylabel="%", title="loss against reference")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    return figure


FIGURE_SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {  # file -> (result, function)
    "step_bars.png": (report.STEP_CPU, step_bars),
    "waterfall.png": (report.STEP_CPU, waterfall),
    "ssast.png": (report.STEP_CPU, ssast),
    "scaling.png": (report.STEP_CPU, scaling),
    "roofline.png": ("ops_cpu.json", roofline),
    "convergence.png": ("convergence_cpu.json", convergence),
}


def _source_tag(name: str) -> str:
    return f"{name} {hashlib.sha256((report.RESULTS / name).read_bytes()).hexdigest()[:16]}"


def write(dirty: bool = False) -> None:
    """Draw every figure whose result file exists."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for file, (name, draw) in FIGURE_SOURCES.items():
        if (report.RESULTS / name).is_file():
            figure = draw(report.benchmark_result(name, dirty))
            text = {"Software": None, "Source": _source_tag(name)}
            figure.savefig(FIGURES / file, dpi=100, metadata=text)
            _pyplot().close(figure)


def stale() -> list[str]:
    """Figures that are missing or were drawn from other results."""
    from PIL import Image

    stale_files = []
    for file, (name, _) in FIGURE_SOURCES.items():
        if (report.RESULTS / name).is_file():
            path = FIGURES / file
            if not path.is_file() or Image.open(path).info.get("Source") != _source_tag(name):
                stale_files.append(file)
    return stale_files
