"""``mae-ast-fast tune``: measures launches on the GPU at hand and writes the rows of its architecture into the table.

Offline and seldom: nothing is tuned while a model runs. What is timed are the ``examples`` of each kernel module, at
the widths of the presets. For every name of ``kernels/common/configs.py``, width and element size, coordinate descent
over the launch: each value is halved and doubled (num_stages: one less, one more) as long as that is clearly faster. A
launch that does not compile, asks for more than the GPU has, or changes the results is skipped, and named.

An operation with ``baselines`` has products whose epilogue does what a separate kernel could do after cuBLAS's product.
With the launch that was found it is timed against both, in turns, and the ratios are written too: from them
``kernels/common/configs.py: epilogue`` decides whether it is used.

The table is a text that people review, so only the rows of one architecture are changed in it, in place.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import os
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import atomic_write

FASTER = 1.03  # a launch wins that is faster by more than this factor
SAME = 2e-2  # of the largest value: what another order of summation, rounded to bf16, stays far below
ROUNDS = 3  # of baselines in turns, so that a clock that changes meets all of them
LINE = 120  # characters, as ruff formats the table
SAME_SHARE = 1e-4  # of integers and booleans: winners between two products that rounding makes equal may change
# (kernel, bytes an element) -> what stays: in fp32 the loss and its gradient must meet the same products, to the bit.
FIXED = {(f"info_nce_{way}", 4): ("BM", "BN") for way in ("forward", "backward")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Launch = dict[str, int]


class Bench(Protocol):
    """Where calls run and are timed; ``arch`` is its name in the table, ``device`` where its tensors lie."""

    arch: str
    device: str

    def results(self, call: Callable[[], object]) -> list[Tensor]:
        """The tensors that a call returns, computed in memory filled with NaN."""
        ...

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median time of a call."""
        ...


class Gpu:
    """The current CUDA device.

    Raises:
        ValueError: There is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("tune measures on a GPU, and PyTorch sees no CUDA device here")
        from ..kernels.common.launch import architecture

        self.device = "cuda"
        self.arch = architecture(torch.device("cuda"))

    def results(self, call: Callable[[], Any]) -> list[Tensor]:
        # What a launch leaves unwritten must not be the right values of the launch before it.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            found = call()
            torch.cuda.synchronize()
        finally:
            torch.use_deterministic_algorithms(False)
        return [found] if isinstance(found, Tensor) else list(found)

    def milliseconds(self, call: Callable[[], object]) -> float:
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="median")


@dataclasses.dataclass
class Group:
    """What one row of the table decides: the examples of an operation that ask for it."""

    op: str
    kernel: str
    width: int
    size: int
    dtype: str
    example_width: int
    present: Launch
    examples: list[int]  # their numbers, in the order of examples()
    before: float = 0.0  # milliseconds, all examples together
    after: float = 0.0
    best: Launch = dataclasses.field(default_factory=dict)
    baselines: tuple[int, float, float] | None = None  # K; times as fast as the bare product, as product and kernel


def tune(
    ops: Sequence[str] | None = None,
    dtype: str = "bf16",
    check: bool = False,
    bench: Bench | None = None,
    path: str | os.PathLike | None = None,
    progress: Callable[[str], object] = print,
) -> list[Group]:
    """Tunes operations and writes the table after each of them, so that an interrupted run leaves what it found.

    Args:
        ops: Files in kernels/ (None: all).
        dtype: Of the examples, "bf16" or "fp32"; rows hold for elements of at most that size.
        check: Measure, and write nothing.
        bench: Where calls run (None: the current CUDA device).
        path: The table (None: kernels/common/configs.py).
        progress: Gets lines of text.

    Returns:
        What was measured, by operation, in the order of the table's names.

    Raises:
        ValueError: No CUDA device; an unknown operation or dtype; a table that is not laid out as expected.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    bench = bench or Gpu()
    from ..kernels.common import configs as table

    path = Path(path or table.__file__)
    modules = _modules()
    if unknown := sorted(set(ops or ()) - set(modules)):
        raise ValueError(f"operations must be among {', '.join(modules)}, got {', '.join(unknown)}")
    chosen = {op: modules[op] for op in modules if ops is None or op in ops}
    planned = {op: _plan(op, module, dtype, bench.arch) for op, module in chosen.items()}
    count, done, tried = sum(map(len, planned.values())), 0, 0
    start = time.monotonic()
    for op, groups in planned.items():
        for group in groups:
            tried += _coordinate_descent(group, chosen[op], bench, progress)
            done += 1
            if hasattr(chosen[op], "baselines"):
                _compare_with_baselines(group, chosen[op], bench)
                progress(_verdict(group))
            spent = time.monotonic() - start
            change = "kept" if group.best == group.present else f"{group.before / group.after:.2f} times as fast"
            progress(
                f"[{done}/{count}] {_title(group)}: {change}; {tried / max(spent, 1e-9):.1f} launches/s, "
                f"about {spent / done * (count - done) / 60:.1f} minutes left"
            )
        rows, ratios = _rows(groups), [group for group in groups if group.baselines]
        if not check and (rows or ratios):
            text = path.read_text()
            for kernel, found in rows.items():
                text = with_rows(text, kernel, bench.arch, found)
            for group in ratios:
                inner, bare, both = group.baselines
                text = with_ratios(text, group.kernel, (bench.arch, inner, group.width, group.size), bare, both)
            atomic_write(path, functools.partial(Path.write_text, data=text))
            names = dict.fromkeys([*rows, *(group.kernel for group in ratios)])
            progress(f"{path}: rows of {bench.arch} for {', '.join(names)}")
    return [group for groups in planned.values() for group in groups]


def _modules() -> dict[str, Any]:
    """Operation -> module, of those with ``examples``."""
    from .. import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    modules = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "examples")}


def _plan(op: str, module: Any, dtype: str, arch: str) -> list[Group]:
    """The rows that an operation's examples ask for, found on the meta device; an operation without dtypes has fp32."""
    from ..kernels.common.launch import record

    groups: dict[tuple[str, int, int], Group] = {}
    for width in module.WIDTHS:
        name, found = dtype, list(module.examples(DTYPES[dtype], width))
        if not found:
            name, found = "fp32", list(module.examples(torch.float32, width))
        for number, (_, _, call) in enumerate(found):
            with record(arch) as recorder:
                call()
            for kernel, asked_width, size, present in recorder.asked:
                key = kernel, asked_width, size
                if key not in groups:
                    groups[key] = Group(op, kernel, asked_width, size, name, width, dict(present), [])
                if number not in groups[key].examples:
                    groups[key].examples.append(number)
    return list(groups.values())


def _coordinate_descent(group: Group, module: Any, bench: Bench, progress: Callable[[str], object]) -> int:
    """Coordinate descent of one row; returns how many launches were tried."""
    examples = list(module.examples(DTYPES[group.dtype], group.example_width, bench.device))
    calls = [examples[number][2] for number in group.examples]
    group.best = dict(group.present)
    with _launched_with(group.kernel, group.present):
        expected = [bench.results(call) for call in calls]
        group.before = sum(bench.milliseconds(call) for call in calls)
    times = {tuple(group.present.items()): group.before}
    group.after = group.before

    def time_of(launch: Launch) -> float:
        """Milliseconds; infinite where the launch fails, or is found slower before its examples are through."""
        key = tuple(launch.items())
        if key not in times:
            times[key] = float("inf")
            total = 0.0
            try:
                with _launched_with(group.kernel, launch):
                    for call, want in zip(calls, expected, strict=True):
                        _check_same(bench.results(call), want)
                        total += bench.milliseconds(call)
                        if total * FASTER >= group.after:
                            return times[key]
            except Exception as error:  # a compiler raises all sorts, and one launch must not stop the search
                reason = (str(error).strip().splitlines() or [""])[0]
                progress(f"{_title(group)}: skipped {launch}: {type(error).__name__} {reason}"[:300])
                return times[key]
            times[key] = total
        return times[key]

    free = [key for key in group.present if key not in FIXED.get((group.kernel, group.size), ())]
    improved = True
    while improved:
        improved = False
        for key in free:
            for step in (_less, _more):
                while (value := step(key, group.best[key])) is not None:
                    launch = {**group.best, key: value}
                    if time_of(launch) * FASTER >= group.after:
                        break
                    group.best, group.after, improved = launch, time_of(launch), True
    return len(times)


def _compare_with_baselines(group: Group, module: Any, bench: Bench) -> None:
    """Times a row's best launch against its baselines, all three at the same work."""
    for kernel, inner, *calls in module.baselines(DTYPES[group.dtype], group.example_width, bench.device):
        if kernel == group.kernel:
            with _launched_with(kernel, group.best):
                rounds = [[bench.milliseconds(call) for call in calls] for _ in range(ROUNDS)]
            own, bare, both = (statistics.median(times) for times in zip(*rounds, strict=True))
            group.baselines = inner, bare / own, both / own


def _verdict(group: Group) -> str:
    _, bare, both = group.baselines
    return f"{_title(group)}: {bare:.3f} x the bare product's speed, {both:.3f} x that of product and kernel"


def _less(key: str, value: int) -> int | None:
    if key == "num_stages":
        return value - 1 if value > 1 else None
    return value // 2 if value > 1 else None


def _more(key: str, value: int) -> int | None:
    if key == "num_stages":
        return value + 1 if value < 5 else None
    return value * 2 if key != "num_warps" or value < 32 else None


@contextlib.contextmanager
def _launched_with(kernel: str, launch: Launch) -> Iterator[None]:
    """Lets a kernel be launched with one choice, whatever the width and dtype."""
    from ..kernels.common.configs import TABLE

    rows = TABLE[kernel]
    TABLE[kernel] = [("any", 1 << 62, 1 << 10, launch)]
    try:
        yield
    finally:
        TABLE[kernel] = rows


def _check_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises ValueError where results differ by more than another order of summation makes."""
    for x, want in zip(found, expected, strict=True):
        if x.shape != want.shape or x.dtype != want.dtype:
            raise ValueError(f"gives {tuple(x.shape)} {x.dtype}, expected {tuple(want.shape)} {want.dtype}")
        if x.numel() == 0:
            continue
        if not x.is_floating_point():
            share = (x != want).double().mean().item()
            if share > SAME_SHARE:
                raise ValueError(f"gives other results: {100 * share:.2g} % of the values differ")
            continue
        finite = want.isfinite()
        if not torch.equal(x.isfinite(), finite):
            raise ValueError("gives other results: not finite at other places")
        largest = want.abs().where(finite, 0).max().item()
        error = (x.float() - want.float()).abs().where(finite, 0).max().item()
        if error > SAME * largest:
            raise ValueError(f"gives other results: off by {error:.3g} where the largest value is {largest:.3g}")


def _title(group: Group) -> str:
    return f"{group.kernel} {group.width} ({group.size} bytes)"


# --------------------------------------------------------------------------------------------------------- the table


def _rows(groups: Iterable[Group]) -> dict[str, list[tuple[int, int, Launch]]]:
    """Kernel -> (widest, largest, launch), of kernels for which anything was found.

    All widths then, also those that keep their launch: a row for wider ones would else hold for them too.
    """
    rows: dict[str, list[tuple[int, int, Launch]]] = {}
    groups = list(groups)
    changed = {group.kernel for group in groups if group.best != group.present}
    for group in groups:
        if group.kernel in changed:
            rows.setdefault(group.kernel, []).append((group.width, group.size, group.best))
    return rows


def with_rows(text: str, kernel: str, arch: str, rows: Iterable[tuple[int, int, Launch]]) -> str:
    """The table's text with rows of an architecture put in, or in the place of those for the same width and size.

    They stand before the kernel's rows for "any", small elements and widths first; neighbours that differ by their
    width alone become one. Nothing else changes.

    Args:
        text: Of kernels/common/configs.py.
        kernel: Name in the table.
        arch: Architecture, "sm_90".
        rows: (widest, largest element in bytes, launch).

    Raises:
        ValueError: The text has no such kernel, none of its rows is for "any", or rows share lines.
    """
    lines = text.splitlines(keepends=True)
    entry = _entry(text, kernel)
    spans = [(row.lineno - 1, row.end_lineno or row.lineno) for row in entry.elts]
    edges = [entry.lineno - 1, *(place for span in spans for place in span), (entry.end_lineno or 0) - 1]
    if not (edges[0] < edges[1] and edges == sorted(edges)):
        raise ValueError(f"{kernel}: expected each row of the table on lines of its own")
    present = [eval(compile(ast.Expression(row), kernel, "eval")) for row in entry.elts]  # 1 << 30 is no literal
    first = next((place for place, row in enumerate(present) if row[0] == "any"), None)
    if first is None:
        raise ValueError(f'{kernel}: expected a row for "any"')
    mine = [(row, span) for row, span in zip(present, spans, strict=True) if row[0] == arch]
    own = {(row[2], row[1]): "".join(lines[slice(*span)]) for row, span in mine}
    launches = {(row[2], row[1]): row[3] for row, _ in mine}
    for widest, largest, launch in rows:
        if launches.get((largest, widest)) != launch:
            own[largest, widest] = _line(arch, widest, largest, launch)
            launches[largest, widest] = launch
    order = sorted(own)
    order = [
        key
        for key, after in zip(order, [*order[1:], None], strict=True)
        if after is None or after[0] != key[0] or launches[after] != launches[key]
    ]
    where = spans[first][0]
    while where - 1 > entry.lineno - 1 and lines[where - 1].lstrip().startswith("#"):
        where -= 1
    gone = {line for _, span in mine for line in range(*span)}
    before = [line for place, line in enumerate(lines[:where]) if place not in gone]
    after = [line for place, line in enumerate(lines[where:], where) if place not in gone]
    return "".join([*before, *(own[key] for key in order), *after])


def with_ratios(text: str, kernel: str, key: tuple[str, int, int, int], bare: float, both: float) -> str:
    """The table's text with a row of ``EPILOGUES`` put in, or in the place of that for the same key. Rows are sorted.

    Args:
        text: Of kernels/common/configs.py.
        kernel: Name in ``EPILOGUES``.
        key: (architecture, K, outputs, bytes an element).
        bare: Times as fast as the bare product.
        both: Times as fast as product and kernel one after the other.

    Raises:
        ValueError: The text has no such kernel, or rows share lines.
    """
    lines = text.splitlines(keepends=True)
    entry = _entry(text, kernel, "EPILOGUES")
    spans = [(row.lineno - 1, row.end_lineno or row.lineno) for row in entry.elts]
    edges = [entry.lineno - 1, *(place for span in spans for place in span), (entry.end_lineno or 0) - 1]
    if not (edges[0] < edges[1] and edges == sorted(edges)):
        raise ValueError(f"{kernel}: expected each row of EPILOGUES on lines of its own")
    present = zip(entry.elts, spans, strict=True)
    rows = {tuple(ast.literal_eval(row)[:4]): "".join(lines[slice(*span)]) for row, span in present}
    arch, *sizes = key
    rows[key] = f'        ("{arch}", {", ".join(map(str, sizes))}, {bare:.3f}, {both:.3f}),\n'
    gone = {line for span in spans for line in range(*span)}
    before = [line for place, line in enumerate(lines[: edges[-1]]) if place not in gone]
    return "".join([*before, *(rows[key] for key in sorted(rows)), *lines[edges[-1] :]])


def _entry(text: str, kernel: str, name: str = "TABLE") -> ast.List:
    """The list of a kernel's rows in the table's text."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == kernel and isinstance(value, ast.List):
                    return value
    raise ValueError(f"the table has no list of rows for {kernel}")


def _line(arch: str, widest: int, largest: int, launch: Launch) -> str:
    options = ", ".join(f'"{key}": {value}' for key, value in launch.items())
    line = f'        ("{arch}", {widest}, {largest}, {{{options}}}),\n'
    if len(line) <= LINE + 1:
        return line
    parts = f'"{arch}"', str(widest), str(largest), f"{{{options}}}"
    return "".join(["        (\n", *(f"            {part},\n" for part in parts), "        ),\n"])


def to_text(groups: Sequence[Group]) -> str:
    """A table of what was measured: microseconds of all examples of a row together, before and after."""
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
