"""``OpCase``: the record of an operation, at the end of its file in kernels/.

The generic tests (tests/ops/test_ops.py), the mutants (tests/ops/test_sabotage.py), the report of the kernels'
resources, ``tune`` and the benchmark of operations find the records of all files: a new operation appears there by
existing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mutant:
    """A change that the tests must detect: ``old``, once in the file's code before its ``CASE``, becomes ``new``.

    ``kind``: "edge" (a wrong index at a tile's edge), "last row" (a dropped row), "row owner" (movement of rows), "fp32
    cast" (a missing one), or another name.
    """

    kind: str
    old: str
    new: str


@dataclass(frozen=True)
class Integers:
    """A random element of a shape: an integer in [lowest, highest], or a list of such, its length in ``length``."""

    lowest: int
    highest: int
    length: tuple[int, int] | None = None


class Draw:
    """Draws the tensors of a case. Each one has its own seed, the first 1, the next 2, and so on.

    Args:
        dtype: Dtype of rows.
        device: Device of all tensors.
        offset: Mean of rows. Rows around 0 do not show statistics in low precision.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str, offset: float = 0.0) -> None:
        self.dtype, self.device, self.offset, self._seed = dtype, torch.device(device), offset, 0

    def rows(self, *shape: int, offset: float | None = None) -> Tensor:
        """Normal values around the draw's offset, or ``offset``, in the draw's dtype."""
        return self._normal(shape, self.offset if offset is None else offset).to(self.dtype)

    def parameters(self, *shape: int, offset: float = 0.0) -> Tensor:
        """Normal values in fp32, as the model's parameters are, or in fp64 for rows in fp64."""
        return self._normal(shape, offset).to(torch.promote_types(self.dtype, torch.float32))

    def integers(self, values: Sequence[int] | Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """Given integers, on the device."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def cu_seqlens(self, clip_rows: Sequence[int]) -> Tensor:
        """(B + 1,) int32 first row of each clip, from the number of rows of each clip."""
        return self.integers(torch.tensor([0, *clip_rows]).cumsum(0), torch.int32)

    def _normal(self, shape: tuple[int, ...], offset: float) -> Tensor:
        self._seed += 1
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(self._seed))
        return (values + offset).to(self.device)


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """An operation of ``mae_ast_fast.ops`` and what its tests need to know. Shapes are what ``make`` takes.

    Attributes:
        name: Function of ``mae_ast_fast.ops``, and this file.
        make: (draw, shape) -> arguments of the function, without options.
        shapes: Awkward ones: one row, odd widths, more than one tile.
        empty: Shapes without rows.
        traced: A shape, and one with another number of rows, for ``torch.compile``.
        random: Elements of a random shape. Empty: the operation's own tests draw them.
        num_random: Number of random shapes.
        differentiable: Inputs with a gradient.
        summed: Inputs whose gradient sums over rows.
        dot: Whether gradients pass through dot products.
        exact: Whether results equal those of the specification to the bit.
        rows: Inputs whose rows may have any stride.
        vectors: Inputs of one dimension, which may have any stride.
        variants: Options of the function. Each is compared with the specification.
        traced_variants: Options that are registered, compiled and repeated.
        offsets: Means of the rows.
        dtypes: Dtypes of the rows.
        specification: Function below ``mae_ast_fast.ops``; empty: that of the same name in reference.py.
        unspecified: Arguments that the specification does not have.
        launches: Kernel -> launch options in tests, which give tiny inputs several tiles and programs.
        patches: Attribute of this module -> value in tests.
        mutants: Changes of this file that its tests must detect.
        widths: Row widths of the models, for the report of resources and ``tune``, where the file has no ``examples``.
        large: (number of rows, width) -> a shape, for the same and for the benchmark.
    """

    name: str
    make: Callable[[Draw, Any], dict[str, Any]] = lambda draw, shape: {}
    shapes: Sequence[Any] = ()
    empty: Sequence[Any] = ()
    traced: Sequence[Any] = ()
    random: Sequence[Integers] = ()
    num_random: int = 15
    differentiable: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    dot: bool = False
    exact: bool = False
    rows: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    variants: Sequence[Mapping[str, Any]] = ({},)
    traced_variants: Sequence[Mapping[str, Any]] = ({},)
    offsets: Sequence[float] = (0.0, 30.0)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    specification: str = ""
    unspecified: tuple[str, ...] = ()
    launches: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    patches: Mapping[str, Any] = field(default_factory=dict)
    mutants: Sequence[Mutant] = ()
    widths: Sequence[int] = ()
    large: Callable[[int, int], Any] | None = None
