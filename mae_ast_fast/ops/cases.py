"""The records of all operations (``CASE`` in the files of kernels/), and the functions that they describe."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.common.case import OpCase


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


def tensors_and_options(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of an operation that are tensors, and the others."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in inputs.items() if name not in tensors}
