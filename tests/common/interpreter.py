"""Exact bfloat16 for Triton's interpreter, which keeps bf16 as bits in uint16, truncates casts and multiplies bits.

Widening shifts the bits. Narrowing rounds to nearest, ties to even, as a GPU does. A dot widens its operands (products
of two bf16 are exact in fp32) and sums in fp32. Arithmetic on bf16 itself would work on the bits, so it raises an
error; no kernel needs it. The order in which tensor cores sum is not reproduced.

Triton 3.6 also calls ``int()`` on arrays of one element, which NumPy 2.4 rejects; this module corrects that too.
"""

from __future__ import annotations

import functools
import inspect
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
    _remember_lookups()


def _remember_lookups() -> None:
    """Let the interpreter remember what it looks up anew each time, a third of a small model's time.

    At each launch, and at each call of a jit function in a kernel, it searches ``triton.language`` for builtins. For
    each array it makes a table of NumPy's dtypes.
    """
    is_builtin, np_dtype = tl.core.is_builtin, interpreter._get_np_dtype
    np_dtypes: dict[tl.dtype, np.dtype] = {}

    @functools.cache
    def builtin_names(owner: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    @functools.wraps(interpreter._patch_builtin)
    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        names = builtin_names(owner)
        if names and not is_builtin(getattr(owner, names[-1])):
            return  # a jit function called in a kernel: all are patched already
        for name in names:
            if is_builtin(member := getattr(owner, name)):
                interpreter._patch_attr(owner, name, member, builder, scope)

    @functools.wraps(np_dtype)
    def remembered_np_dtype(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np_dtype(scalar)
        if scalar not in np_dtypes:
            np_dtypes[scalar] = np_dtype(scalar)
        return np_dtypes[scalar]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, remembered_np_dtype
