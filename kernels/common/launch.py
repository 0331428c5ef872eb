"""Launching of every kernel: options from the table, and a recorder for the ahead-of-time compiler.

A kernel's wrapper gets its configuration from ``options`` and passes everything to ``launch``. Inside ``record``
nothing is launched: wrappers called with tensors on the meta device record their arguments, exactly those of a real
launch. ``mae-ast-fast kernels`` compiles them for any architecture without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import triton

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


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the device of the tensors; does nothing for an empty grid.

    Tensors, sizes and strides are positional: Triton binds keywords more slowly on every launch.
    """
    if _recorders:
        _recorders[0].launches.append((kernel, arguments, constants))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def block(width: int, minimum: int = 16) -> int:
    """The smallest power of two that is at least ``width`` and ``minimum``."""
    return max(minimum, triton.next_power_of_2(width))


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
