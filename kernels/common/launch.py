"""Launching of every kernel: options from the table, and a recorder for the ahead-of-time compiler.

A kernel's wrapper gets its configuration from ``options`` and passes everything to ``launch``. Inside ``record``
nothing is launched: wrappers called with tensors on the meta device record their arguments, exactly those of a real
launch. ``mae-ast-fast kernels`` compiles them for any architecture without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch._subclasses import FakeTensor

from .configs import TABLE


@dataclass
class Recorder:
    """Launches that were recorded instead of made.

    Attributes:
        arch: Architecture to choose configurations for, such as "sm_90".
        launches: (kernel, positional arguments, constants and launch options) of each launch.
        lookups: (name in the table, row width, bytes per element, configuration) of each call of ``options``.
    """

    arch: str
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    lookups: list[tuple[str, int, int, dict[str, int]]] = field(default_factory=list)


_recorders: list[Recorder] = []  # at most one


@contextlib.contextmanager
def record(arch: str) -> Iterator[Recorder]:
    """Record launches as for ``arch`` ("sm_90", "gfx942", ...) instead of making them.

    Raises:
        RuntimeError: Another ``record`` is active.
    """
    if _recorders:
        raise RuntimeError("record does not nest")
    _recorders.append(Recorder(arch))
    try:
        yield _recorders[0]
    finally:
        _recorders.clear()


@functools.cache
def _device_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """The device's name in the table; "any" for the interpreter on a CPU."""
    if _recorders:
        return _recorders[0].arch
    if device.type != "cuda":
        return "any"
    return _device_arch(torch.cuda.current_device() if device.index is None else device.index)


def options(kernel: str, tensor: torch.Tensor, width: int) -> dict[str, int]:
    """The launch configuration of a kernel: the table's first row that fits the device, row width and element size.

    Args:
        kernel: Name in the table.
        tensor: Tensor whose device and dtype select the row.
        width: Elements per row.

    Raises:
        ValueError: The table does not contain the kernel, or has no row for this width.
    """
    arch, element_size = architecture(tensor.device), tensor.element_size()
    if kernel not in TABLE:
        raise ValueError(f"kernels/common/configs.py has no rows for {kernel!r}; it has {', '.join(TABLE)}")
    for row_arch, max_width, max_element_size, config in TABLE[kernel]:
        if row_arch in (arch, "any") and width <= max_width and element_size <= max_element_size:
            if _recorders:
                _recorders[0].lookups.append((kernel, width, element_size, config))
            return config
    max_width = max(row[1] for row in TABLE[kernel])
    raise ValueError(f"{kernel} takes rows of at most {max_width} values, got {width}: use impl='torch'")


def has_data(x: torch.Tensor) -> bool:
    """Whether a kernel could read ``x``: not on the meta device, and not while PyTorch traces with fake tensors."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]],
    *,
    launches: str | None = None,
    like: torch.Tensor | None = None,
    width: int = 0,
    **values: Any,
) -> None:
    """Launch a kernel on the device of its tensors; does nothing for an empty grid and for tensors without data.

    Values are given by the names of the kernel's parameters, with three rules: the parameter ``x_ptr`` takes the tensor
    ``x``; ``stride_x`` is the distance of its rows (0 for None); and where ``BLOCK_D`` is not given, it is the block
    that holds ``D``.

    Args:
        kernel: Triton function.
        grid: Number of programs per axis, or a function that computes it from all values.
        launches: Name in the launch table, whose constants are added to the values. None: no constants.
        like: Tensor that selects the row of the table, as in ``options``.
        width: Elements per row, as in ``options``.
        **values: Values for the kernel's parameters, and Triton's own options.
    """
    tensor = next(x for x in values.values() if isinstance(x, torch.Tensor))
    if not (_recorders or has_data(tensor)):
        return
    if launches is not None:
        assert like is not None
        values |= options(launches, like, width)
    if callable(grid):
        grid = grid(values)
    names, constants = _parameters(kernel.fn)
    positional = tuple([values[name] if name in values else _row_stride(values[name[7:]]) for name in names])
    named = {name: values[name] if name in values else block(values[name[6:]]) for name in constants}
    named |= {name: values[name] for name in ("num_warps", "num_stages") if name in values}
    _launch(kernel, grid, positional, named)


def _row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of a kernel's runtime parameters, without "_ptr", and of its constants."""
    runtime, constants = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if "constexpr" in str(parameter.annotation):
            constants.append(name)
        else:
            runtime.append(name.removesuffix("_ptr"))
    return runtime, constants


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """``kernel[grid](*arguments, **constants)``, or its record. Positional: Triton binds keywords more slowly."""
    if _recorders:
        _recorders[0].launches.append((kernel, arguments, constants))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)


def launch_sums(
    kernel: Any, shape: tuple[int, ...], *, launches: str, like: torch.Tensor, width: int, **values: Any
) -> torch.Tensor:
    """Launch programs that share N rows, and add up the partial sums that each of them stores.

    The kernel gets the number of programs as ``G`` and their sums (G, *shape) in fp32 as ``partial``. The table limits
    them to PROGRAMS; a program takes ROWS rows (default 1) and, where the table has COLUMNS, so many columns at a time.

    Args:
        kernel: Triton function.
        shape: Shape of one program's sums.
        launches: As in ``launch``.
        like: Tensor that selects the row of the table.
        width: Elements per row.
        **values: Values for the kernel's parameters, with ``N``.

    Returns:
        The sum (*shape) in fp32. The order of additions is always the same.
    """
    if not (_recorders or has_data(like)):
        return like.new_empty(shape, dtype=torch.float32)
    config = options(launches, like, width)
    num_programs = min(cdiv(values["N"], config.get("ROWS", 1)), config["PROGRAMS"])
    grid = (num_programs, cdiv(width, config["COLUMNS"])) if "COLUMNS" in config else (num_programs,)
    partial = torch.empty(num_programs, *shape, dtype=torch.float32, device=like.device)
    launch(kernel, grid, partial=partial, G=num_programs, **(values | config))
    return partial.sum(0)


def tiles(values: dict[str, Any]) -> tuple[int, ...]:
    """Grid of a kernel whose programs take ROWS of N rows each and, where they have COLUMNS, so many of F columns."""
    rows = cdiv(values["N"], values["ROWS"])
    return (rows, cdiv(values["F"], values["COLUMNS"])) if "COLUMNS" in values else (rows,)


def cdiv(size: int, step: int) -> int:
    """Number of steps that cover ``size``. On the host ``triton.cdiv`` takes several microseconds."""
    return -(-size // step)


def block(width: int, minimum: int = 16) -> int:
    """The smallest power of two that is at least ``width`` and ``minimum``."""
    return max(minimum, 1 << (width - 1).bit_length())


@overload
def dense(vector: torch.Tensor) -> torch.Tensor: ...


@overload
def dense(vector: None) -> None: ...


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """``vector`` with its elements adjacent in memory, as kernels read it: itself, or a copy if it is strided."""
    return None if vector is None else vector.contiguous()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is dense in memory, otherwise a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
