"""``mae-ast-fast tune``: measure kernel launches on this GPU and write its architecture's rows of the launch table.

Tuning is offline; nothing is tuned while a model runs. It times the ``examples`` of each kernel module, at the widths
of the presets. For every kernel name of ``kernels/common/configs.py``, width and element size, it runs coordinate
descent over the launch parameters: each value is halved and doubled (num_stages: minus and plus one) while that is
faster by the factor ``MIN_SPEEDUP``. A launch that does not compile, exceeds the GPU's resources or changes the results
is skipped and reported.

An operation with ``baselines`` computes in the epilogue of a product what a separate kernel could compute after
cuBLAS's product. Its best launch is timed against the bare product, and against product and kernel, in turns. The
ratios are written too; ``kernels/common/configs.py: epilogue`` uses them to turn the epilogue on or off.

Tuning writes ``kernels/configs/ARCHITECTURE.json``, which ``kernels/common/configs.py`` reads. People review the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import write_json
from .kernel_report import examples_of, row_widths

MIN_SPEEDUP = 1.03  # smallest speed ratio at which a launch replaces the best one
MAX_ERROR = 2e-2  # relative to the largest value; another summation order, rounded to bf16, stays far below
ROUNDS = 3  # baselines take turns, so that a change of the GPU clock affects all of them
MAX_CHANGED_SHARE = 1e-4  # of integers and booleans: rounding may change which of two nearly equal products is larger
# (kernel, bytes per element) -> parameters to keep: in fp32, forward and backward must compute bit-identical products.
FIXED = {(f"info_nce_{way}", 4): ("BM", "BN") for way in ("forward", "backward")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Launch = dict[str, int]
Rows = dict[str, list[dict[str, Any]]]  # kernel -> rows of a section of the file


class Bench(Protocol):
    """Runs and times calls.

    Attributes:
        arch: Name of the architecture in the table.
        device: Device of the examples' tensors.
    """

    arch: str
    device: str

    def results(self, call: Callable[[], object]) -> list[Tensor]:
        """Tensors that a call returns, computed in memory filled with NaN."""
        ...

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call in milliseconds."""
        ...


class Gpu:
    """The current CUDA device.

    Raises:
        ValueError: PyTorch finds no CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("tune measures on a GPU, but PyTorch finds no CUDA device")
        from ..kernels.common.launch import architecture

        self.device = "cuda"
        self.arch = architecture(torch.device("cuda"))

    def results(self, call: Callable[[], Any]) -> list[Tensor]:
        # Unwritten memory is filled with NaN; otherwise it could hold the correct values of an earlier launch.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            results = call()
            torch.cuda.synchronize()
        finally:
            torch.use_deterministic_algorithms(False)
        return [results] if isinstance(results, Tensor) else list(results)

    def milliseconds(self, call: Callable[[], object]) -> float:
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="median")


@dataclasses.dataclass
class Group:
    """One row of the table, and the examples of an operation that use it."""

    op: str
    kernel: str
    width: int
    size: int  # bytes per element
    dtype: str
    example_width: int
    present: Launch
    examples: list[int]  # indices into examples()
    before: float = 0.0  # milliseconds of all examples with the present launch
    after: float = 0.0  # milliseconds of all examples with the best launch
    best: Launch = dataclasses.field(default_factory=dict)
    baselines: tuple[int, float, float] | None = None  # K; speed relative to the bare product, to product and kernel


def tune(
    ops: Sequence[str] | None = None,
    dtype: str = "bf16",
    *,
    check: bool = False,
    bench: Bench | None = None,
    path: str | os.PathLike | None = None,
    progress: Callable[[str], object] = print,
) -> list[Group]:
    """Tune operations, and write the launches after each one, so that an interrupted run keeps its results.

    Args:
        ops: Names of files in kernels/. None: all.
        dtype: Dtype of the examples, "bf16" or "fp32". A row applies to elements of at most its size.
        check: Measure, but write nothing.
        bench: Runs and times calls. None: the current CUDA device.
        path: JSON file to write. None: kernels/configs/ARCHITECTURE.json.
        progress: Called with each line of progress.

    Returns:
        Measured groups, in the order of operations and of the table.

    Raises:
        ValueError: There is no CUDA device, an operation or the dtype is unknown, or the file is damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    bench = bench or Gpu()
    from ..kernels.common.configs import TUNED, read_tuned

    modules = _modules()
    path = Path(path or TUNED / f"{bench.arch}.json")
    tuned = read_tuned(path)  # a damaged file fails before the measurements
    if unknown := sorted(set(ops or ()) - set(modules)):
        raise ValueError(f"operations must be among {', '.join(modules)}, got {', '.join(unknown)}")
    selected = {op: modules[op] for op in modules if ops is None or op in ops}
    groups_by_op = {op: _plan(op, module, dtype, bench.arch) for op, module in selected.items()}
    num_groups, num_done, num_tried = sum(map(len, groups_by_op.values())), 0, 0
    started = time.monotonic()
    for op, groups in groups_by_op.items():
        for group in groups:
            num_tried += _coordinate_descent(group, selected[op], bench, progress)
            num_done += 1
            if hasattr(selected[op], "baselines"):
                _compare_with_baselines(group, selected[op], bench)
                progress(_verdict(group))
            elapsed = time.monotonic() - started
            change = "kept" if group.best == group.present else f"{group.before / group.after:.2f} times as fast"
            progress(
                f"[{num_done}/{num_groups}] {_title(group)}: {change}; "
                f"{num_tried / max(elapsed, 1e-9):.1f} launches/s, "
                f"about {elapsed / num_done * (num_groups - num_done) / 60:.1f} minutes left"
            )
        if not check and (names := add_results(tuned, groups)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, tuned)
            progress(f"{path}: rows of {bench.arch} for {', '.join(names)}")
    return [group for groups in groups_by_op.values() for group in groups]


def _modules() -> dict[str, Any]:
    """Operation -> module, for those with ``examples``."""
    from .. import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    modules = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if row_widths(module)}


def _plan(op: str, module: Any, dtype: str, arch: str) -> list[Group]:
    """Table rows that an operation's examples use, recorded on meta tensors; fp32 without dtypes."""
    from ..kernels.common.launch import record

    groups: dict[tuple[str, int, int], Group] = {}
    for width in row_widths(module):
        dtype_name, examples = dtype, list(examples_of(module)(DTYPES[dtype], width))
        if not examples:
            dtype_name, examples = "fp32", list(examples_of(module)(torch.float32, width))
        for index, (_, _, call) in enumerate(examples):
            with record(arch) as recorder:
                call()
            for kernel, table_width, size, launch in recorder.lookups:
                group_key = kernel, table_width, size
                if group_key not in groups:
                    groups[group_key] = Group(
                        op=op,
                        kernel=kernel,
                        width=table_width,
                        size=size,
                        dtype=dtype_name,
                        example_width=width,
                        present=dict(launch),
                        examples=[],
                    )
                if index not in groups[group_key].examples:
                    groups[group_key].examples.append(index)
    return list(groups.values())


def _coordinate_descent(group: Group, module: Any, bench: Bench, progress: Callable[[str], object]) -> int:
    """Find the best launch of one row by coordinate descent; returns the number of launches tried."""
    examples = list(examples_of(module)(DTYPES[group.dtype], group.example_width, bench.device))
    calls = [examples[index][2] for index in group.examples]
    group.best = dict(group.present)
    with _launched_with(group.kernel, group.present):
        expected_results = [bench.results(call) for call in calls]
        group.before = sum(bench.milliseconds(call) for call in calls)
    times = {tuple(group.present.items()): group.before}
    group.after = group.before

    def time_of(candidate: Launch) -> float:
        """Milliseconds; infinite if the launch fails or its first examples already take too long."""
        candidate_key = tuple(candidate.items())
        if candidate_key not in times:
            times[candidate_key] = float("inf")
            total = 0.0
            try:
                with _launched_with(group.kernel, candidate):
                    for call, expected_result in zip(calls, expected_results, strict=True):
                        _check_same(bench.results(call), expected_result)
                        total += bench.milliseconds(call)
                        if total * MIN_SPEEDUP >= group.after:
                            return times[candidate_key]
            except Exception as error:  # compilers raise any type; one launch must not stop the search
                reason = (str(error).strip().splitlines() or [""])[0]
                progress(f"{_title(group)}: skipped {candidate}: {type(error).__name__} {reason}"[:300])
                return times[candidate_key]
            times[candidate_key] = total
        return times[candidate_key]

    tunable = [key for key in group.present if key not in FIXED.get((group.kernel, group.size), ())]
    improved = True
    while improved:
        improved = False
        for parameter in tunable:
            for step in (_smaller, _larger):
                while (parameter_value := step(parameter, group.best[parameter])) is not None:
                    candidate = {**group.best, parameter: parameter_value}
                    if time_of(candidate) * MIN_SPEEDUP >= group.after:
                        break
                    group.best, group.after, improved = candidate, time_of(candidate), True
    return len(times)


def _compare_with_baselines(group: Group, module: Any, bench: Bench) -> None:
    """Time a row's best launch against its baselines on the same input."""
    for kernel, inner, *calls in module.baselines(DTYPES[group.dtype], group.example_width, bench.device):
        if kernel == group.kernel:
            with _launched_with(kernel, group.best):
                round_times = [[bench.milliseconds(call) for call in calls] for _ in range(ROUNDS)]
            fused_ms, product_ms, product_and_kernel_ms = (
                statistics.median(times) for times in zip(*round_times, strict=True)
            )
            group.baselines = inner, product_ms / fused_ms, product_and_kernel_ms / fused_ms


def _verdict(group: Group) -> str:
    assert group.baselines is not None
    _, product_ratio, product_and_kernel_ratio = group.baselines
    speeds = f"{product_ratio:.3f} x the speed of the bare product, {product_and_kernel_ratio:.3f} x product and kernel"
    return f"{_title(group)}: {speeds}"


def _smaller(key: str, value: int) -> int | None:
    if key == "num_stages":
        return value - 1 if value > 1 else None
    return value // 2 if value > 1 else None


def _larger(key: str, value: int) -> int | None:
    if key == "num_stages":
        return value + 1 if value < 5 else None
    return value * 2 if key != "num_warps" or value < 32 else None


@contextlib.contextmanager
def _launched_with(kernel: str, launch: Launch) -> Iterator[None]:
    """Launch a kernel with ``launch`` at every width and dtype."""
    from ..kernels.common.configs import TABLE

    rows = TABLE[kernel]
    TABLE[kernel] = [("any", 1 << 62, 1 << 10, launch)]
    try:
        yield
    finally:
        TABLE[kernel] = rows


def _check_same(results: Sequence[Tensor], expected_results: Sequence[Tensor]) -> None:
    """Compare results with tolerance for another order of summation.

    Raises:
        ValueError: Shapes, dtypes or values differ.
    """
    for result, expected_result in zip(results, expected_results, strict=True):
        if result.shape != expected_result.shape or result.dtype != expected_result.dtype:
            shape, expected_shape = tuple(result.shape), tuple(expected_result.shape)
            raise ValueError(f"returned {shape} {result.dtype}, expected {expected_shape} {expected_result.dtype}")
        if result.numel() == 0:
            continue
        if not result.is_floating_point():
            changed_share = (result != expected_result).double().mean().item()
            if changed_share > MAX_CHANGED_SHARE:
                raise ValueError(f"wrong results: {100 * changed_share:.2g} % of the values differ")
            continue
        finite = expected_result.isfinite()
        if not torch.equal(result.isfinite(), finite):
            raise ValueError("wrong results: other elements are not finite")
        largest = expected_result.abs().where(finite, 0).max().item()
        error = (result.float() - expected_result.float()).abs().where(finite, 0).max().item()
        if error > MAX_ERROR * largest:
            raise ValueError(f"wrong results: off by {error:.3g}, the largest value is {largest:.3g}")


def _title(group: Group) -> str:
    return f"{group.kernel} {group.width} ({group.size} bytes)"


# --------------------------------------------------------------------------------------------------------- the table


def add_results(tuned: dict[str, Rows], groups: Sequence[Group]) -> list[str]:
    """Add the new launches and the ratios of measured groups to the content of an architecture's file.

    A row replaces the row of the same width and element size.

    Args:
        tuned: Content as ``configs.read_tuned`` returns it; changed in place.
        groups: Measured groups.

    Returns:
        Names of the kernels with new rows.
    """
    launches, ratios = _launch_rows(groups), _ratio_rows(groups)
    for kernel, rows in launches.items():
        merged = _merged(tuned["launches"].get(kernel, []), rows, "max_element_size", "max_width")
        tuned["launches"][kernel] = _without_repeated(merged)
    for kernel, rows in ratios.items():
        old = tuned["epilogues"].get(kernel, [])
        tuned["epilogues"][kernel] = _merged(old, rows, "inner", "outputs", "element_size")
    return list({**launches, **ratios})


def _launch_rows(groups: Sequence[Group]) -> Rows:
    """Kernel -> rows, for kernels with at least one new launch.

    These get rows for all widths, also for those that keep their launch. Otherwise the row of a wider one would apply.
    """
    changed = {group.kernel for group in groups if group.best != group.present}
    rows: Rows = {}
    for group in groups:
        if group.kernel in changed:
            row = {"max_width": group.width, "max_element_size": group.size, "launch": group.best}
            rows.setdefault(group.kernel, []).append(row)
    return rows


def _ratio_rows(groups: Sequence[Group]) -> Rows:
    """Kernel -> rows, for kernels that were compared with baselines."""
    rows: Rows = {}
    for group in groups:
        if group.baselines:
            inner, product_ratio, product_and_kernel_ratio = group.baselines
            row = {
                "inner": inner,
                "outputs": group.width,
                "element_size": group.size,
                "product_ratio": round(product_ratio, 3),
                "product_and_kernel_ratio": round(product_and_kernel_ratio, 3),
            }
            rows.setdefault(group.kernel, []).append(row)
    return rows


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]], *key: str) -> list[dict[str, Any]]:
    """Old and new rows, sorted by the fields ``key``. A new row replaces an old one with equal fields."""
    by_key = {tuple(row[name] for name in key): row for row in (*old, *new)}
    return [by_key[values] for values in sorted(by_key)]


def _without_repeated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted rows without those whose next row has the same element size and launch, and so covers them."""
    followed = zip(rows, [*rows[1:], {}], strict=True)
    return [row for row, following in followed if {**row, "max_width": 0} != {**following, "max_width": 0}]


def to_text(groups: Sequence[Group]) -> str:
    """Table of the measurements: microseconds of all examples of a row together, before and after."""
    head = ("kernel", "width", "bytes", "before", "after", "times", "launch")
    body = [
        (
            group.kernel,
            str(group.width),
            str(group.size),
            f"{1000 * group.before:.1f} us",
            f"{1000 * group.after:.1f} us",
            f"{group.before / group.after:.2f}",
            "kept" if group.best == group.present else ", ".join(f"{k} {v}" for k, v in group.best.items()),
        )
        for group in groups
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *body)]
    return "\n".join([*lines, *(_verdict(group) for group in groups if group.baselines)])
