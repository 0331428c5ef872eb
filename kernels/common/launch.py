"""How every kernel is launched: options from the table, and a recorder for the ahead-of-time compiler.

A kernel's wrapper asks ``options`` for its constants and passes everything to ``launch``. Inside ``record`` nothing is
launched: wrappers called with tensors on the meta device leave their arguments behind, exactly those of a real launch,
from which ``mae-ast-fast kernels`` compiles for any architecture without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from .configs import TABLE


@dataclass
class Recorder:
    """Launches that did not happen: (kernel, positional arguments, constants and launch options).

    ``asked``: what ``options`` was asked for and answered: (name in the table, width, bytes an element, launch).
    """

    arch: str
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    asked: list[tuple[str, int, int, dict[str, int]]] = field(default_factory=list)


_recorders: list[Recorder] = []  # at most one


@contextlib.contextmanager
def record(arch: str) -> Iterator[Recorder]:
    """Collects launches as for ``arch`` ("sm_90", "gfx942", ...) instead of making them."""
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
    """The name under which the table knows a device; "any" for the interpreter on a CPU."""
    if _recorders:
        return _recorders[0].arch
    if device.type != "cuda":
        return "any"
    return _device_arch(torch.cuda.current_device() if device.index is None else device.index)


def options(kernel: str, tensor: torch.Tensor, width: int) -> dict[str, int]:
    """The table's first row for a kernel that fits the device, the row's width and the bytes an element.

    Args:
        kernel: Name in the table.
        tensor: Of the device and dtype that count.
        width: Elements of a row.

    Raises:
        ValueError: The table does not know the kernel, or no row takes this width.
    """
    arch, size = architecture(tensor.device), tensor.element_size()
    if kernel not in TABLE:
        raise ValueError(f"kernels/common/configs.py has no rows for {kernel!r}; it has {', '.join(TABLE)}")
    for row_arch, widest, largest, chosen in TABLE[kernel]:
        if row_arch in (arch, "any") and width <= widest and size <= largest:
            if _recorders:
                _recorders[0].asked.append((kernel, width, size, chosen))
            return chosen
    widest = max(row[1] for row in TABLE[kernel])
    raise ValueError(f"{kernel} takes rows of at most {widest} values, got {width}: use impl='torch'")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, on the device of its tensors; nothing where the grid is empty."""
    if _recorders:
        _recorders[0].launches.append((kernel, arguments, constants))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def block(width: int, least: int = 16) -> int:
    """The power of two, at least ``least``, that holds ``width``."""
    return max(least, triton.next_power_of_2(width))


def dense(*vectors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Vectors as kernels read them, one element after the other: copies of those that are not."""
    return tuple(None if x is None else x.contiguous() for x in vectors)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where the last dimension lies densely in memory, else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
