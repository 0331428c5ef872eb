"""The records of all operations (``CASE`` in the files of kernels/), and the functions that they describe."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.common.case import OpCase

NUM_ROWS = 65536  # of the examples


@functools.cache
def op_cases() -> dict[str, OpCase]:
    """Name -> record of every operation with a kernel. Imports all kernels, and so Triton."""
    from .. import kernels

    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__) if not info.ispkg)
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return {module.CASE.name: module.CASE for module in modules if hasattr(module, "CASE")}


def implementation(case: OpCase, impl: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The operation as a function of its inputs by name."""
    return functools.partial(getattr(importlib.import_module(__package__), case.name), **options, impl=impl)


def specification(case: OpCase, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The specification as a function of the same inputs."""
    module, _, name = (case.specification or f"reference.{case.name}").partition(".")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def call(**inputs: Any) -> Any:
        arguments = inputs | dict(options)
        return function(**{name: x for name, x in arguments.items() if name not in case.unspecified})

    return call


def examples(
    case: OpCase, dtype: torch.dtype, width: int, device: str = "meta"
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(label, number of rows, call) of each direction of all traced variants, as a kernel file's ``examples``."""
    from ..kernels.common.case import Draw

    if dtype not in case.dtypes or case.large is None:
        return
    shape = case.large(NUM_ROWS, width)
    for variant in case.traced_variants:
        arguments = {**case.make(Draw(dtype, device), shape), **variant}
        if "dropout" in variant:
            arguments["seed"] = torch.ones(1, dtype=torch.int64, device=device)
        tensors, options = tensors_and_options(arguments)
        function = implementation(case, "triton", options)
        label = " ".join(name for name, value in variant.items() if value and name != "site")
        yield f"forward {label}", NUM_ROWS, functools.partial(function, **tensors)
        if case.differentiable:
            yield f"backward {label}", NUM_ROWS, _backward(function, tensors, case.differentiable)


def _backward(
    function: Callable[..., Any], tensors: dict[str, Tensor], differentiable: tuple[str, ...]
) -> Callable[[], object]:
    """A call of the operation's backward alone: the forward runs now."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in differentiable if name in tensors}
    outputs = function(**{**tensors, **leaves})
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    incoming = [torch.ones_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), incoming, retain_graph=True)


def tensors_and_options(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of an operation that are tensors, and the others."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in inputs.items() if name not in tensors}
