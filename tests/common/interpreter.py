"""Exact bfloat16 for Triton's interpreter, which keeps bf16 as bits in uint16, truncates casts and multiplies bits.

Widening shifts the bits. Narrowing rounds to nearest, ties to even, as a GPU does. A dot widens its operands (products
of two bf16 are exact in fp32) and sums in fp32. Arithmetic on bf16 itself would work on the bits, so it raises an
error; no kernel needs it. The order in which tensor cores sum is not reproduced.

Triton 3.6 also calls ``int()`` on arrays of one element, which NumPy 2.4 rejects; this module corrects that too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from mae_ast_fast.ops import dispatch

# All operations that the interpreter gets in bf16: Triton itself rejects erf, rsqrt and similar, and clamps in fp32.
ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fp_to_fp", "create_atomic_rmw")


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 values given as uint16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The uint16 bits of fp32 values rounded to bf16: to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(values.shape)


def _is_bf16(operand: Any) -> bool:
    """Whether a handle, a tensor or a type is bf16, or a sequence of them has one."""
    if isinstance(operand, list | tuple):
        return any(_is_bf16(x) for x in operand)
    return getattr(getattr(operand, "dtype", operand), "scalar", None) == tl.bfloat16


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def operation(self: Any, *operands: Any) -> Any:
        if _is_bf16(operands):
            raise TypeError("the interpreter has no arithmetic on bfloat16: convert to float32 first")
        return function(self, *operands)

    return operation


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def install() -> None:
    """Patch the interpreter and let ``impl="triton"`` take bf16 under it. Call once per process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if _is_bf16(source) and _is_bf16(target):
            return source
        if _is_bf16(target):
            return TensorHandle(narrow(cast(self, source, tl.float32).data), tl.bfloat16)
        return cast(self, _wide(source), target)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, total: TensorHandle, *options: Any) -> TensorHandle:
        return dot(self, _wide(a), _wide(b), total, *options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    for name in ARITHMETIC:
        setattr(InterpreterBuilder, name, _refusing(getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.check_tensor = _refusing(ReduceScanOpInterface.check_tensor)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
    dispatch.INTERPRETS_BF16 = True
