"""bf16 under Triton's interpreter, made exact by interpreter.py, against PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import narrow, widen
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from mae_ast_fast import ops
from mae_ast_fast.ops import dispatch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not interpreted")
PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # every bf16 value, NaN, inf and subnormals too


def float_bits() -> torch.Tensor:
    """2^22 random fp32 bit patterns, and all ties of the bf16 patterns and their neighbours."""
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 22,), generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(1 << 16)[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return torch.cat((random, ties.flatten())).to(torch.int32).view(torch.float32)


def test_widen_all_patterns_equal_torch() -> None:
    result = widen(PATTERNS.numpy().view(np.uint16))
    expected = PATTERNS.view(torch.bfloat16).float()
    assert np.array_equal(result.view(np.int32), expected.view(torch.int32).numpy())


def test_narrow_random_and_tied_patterns_equal_torch() -> None:
    values = float_bits()
    assert values.isnan().any() and values.isinf().any() and (values.abs() < torch.finfo(torch.float32).tiny).any()
    result = torch.from_numpy(narrow(values.numpy()).view(np.int16)).view(torch.bfloat16)
    expected = values.bfloat16()
    assert torch.equal(result.isnan(), expected.isnan())
    wrong = (result.view(torch.int16) != expected.view(torch.int16)) & ~expected.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {len(values)} differ, the first is {values[wrong][0]!r}"


@triton.jit
def _convert(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset).to(y_ptr.dtype.element_ty))


@interpreted
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64, torch.int32, torch.bool], ids=str)
def test_kernel_casts_equal_torch(other: torch.dtype) -> None:
    """Cast 4,096 values to bf16 and back in a kernel: half are fractions, the largest exceed fp16 and bf16."""
    scale = torch.tensor([1, 1e-40, 1e4, 1e38] if other in (torch.float32, torch.float64) else [1, 1e-3, 1e2, 1e4])
    wide = (torch.randn(1024, 4, generator=torch.Generator().manual_seed(1)) * scale).flatten().to(other)
    narrowed, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096, dtype=other)
    _convert[(4,)](wide, narrowed, BLOCK=1024)
    assert torch.equal(narrowed, wide.bfloat16())
    _convert[(4,)](narrowed, back, BLOCK=1024)
    assert torch.equal(back, narrowed.to(other))


@triton.jit
def _product(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    row, col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    offset = row * BLOCK + col
    tl.store(y_ptr + offset, tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset)))


@interpreted
def test_dot_small_integers_is_exact() -> None:
    """Products and sums of small integers are exact in fp32 in any order, so one wrong bit fails the test."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-128, 129, (32, 32), generator=generator).bfloat16() for _ in range(2))
    result = torch.empty(32, 32)
    _product[(1,)](a, b, result, BLOCK=32)
    assert torch.equal(result, a.float() @ b.float())


@triton.jit
def _arithmetic(x_ptr, y_ptr, OPERATION: tl.constexpr):
    offset = tl.arange(0, 16)
    x, y = tl.load(x_ptr + offset), tl.load(y_ptr + offset)
    if OPERATION == "addition":
        x = x + y
    elif OPERATION == "negation":
        x = -x
    elif OPERATION == "comparison":
        x = tl.where(x > y, x, y)
    elif OPERATION == "fma":
        x = tl.fma(x, x, x)
    elif OPERATION == "atomic":
        tl.atomic_add(y_ptr + offset, x)
    elif OPERATION == "reduction":
        x = tl.reduce(x, 0, tl.standard._sum_combine) + tl.zeros((16,), tl.float32)
    elif OPERATION == "rounding":
        x = x.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz")
    tl.store(y_ptr + offset, x)


@interpreted
@pytest.mark.parametrize("operation", ["addition", "negation", "comparison", "fma", "atomic", "reduction", "rounding"])
def test_bf16_arithmetic_raises(operation: str) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="no arithmetic on bfloat16"):
        _arithmetic[(1,)](x, x.clone(), OPERATION=operation)
    _arithmetic[(1,)](x, x.clone(), OPERATION="nothing")


@triton.jit
def _count(count_ptr, y_ptr):
    total = tl.zeros((), tl.int32)
    for step in range(tl.load(count_ptr)):
        total += step
    tl.store(y_ptr, total)


@interpreted
def test_loop_to_loaded_bound_runs_with_any_numpy() -> None:
    """Triton 3.6 converts the bound to an int in a way that NumPy 2.4 rejects."""
    total = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](torch.tensor([5], dtype=torch.int32), total)
    assert total.item() == 10


@interpreted
def test_patch_lang_leaves_no_builtin_and_restores_all() -> None:
    """As Triton's own function does, for a launch and for a jit function that the kernel calls."""
    owners = tl, tl.tensor, tl.math, tl.core.tensor_descriptor_base

    def builtins(*owners: Any) -> list[str]:
        return [name for owner in owners for name, x in inspect.getmembers(owner) if tl.core.is_builtin(x)]

    assert len(before := builtins(*owners)) > 100
    launch = interpreter._patch_lang(_count.fn)
    interpreter._patch_lang(tl.standard.sum.fn)  # sees tl.core alone
    left = builtins(*owners, tl.core)
    launch.restore()
    assert left == []
    assert builtins(*owners) == before


@interpreted
@pytest.mark.parametrize("name", ["int1", "uint8", "int32", "uint64", "float16", "bfloat16", "float32", "float8e5"])
def test_np_dtype_remembered_equals_looked_up(name: str) -> None:
    dtype = getattr(tl, name)
    for x in (dtype, tl.block_type(dtype, [4]), tl.pointer_type(dtype), tl.block_type(tl.pointer_type(dtype), [4])):
        assert interpreter._get_np_dtype(x) == interpreter._get_np_dtype.__wrapped__(x)


@interpreted
def test_impl_triton_bf16_without_patch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.resolve_impl("triton", "cpu", torch.bfloat16)[0] == "triton"
    monkeypatch.setattr(dispatch, "INTERPRETS_BF16", False)
    monkeypatch.setattr(dispatch, "_interpreter_fault", lambda: None)
    with pytest.raises(ValueError, match=r"takes float32 and float16, got torch\.bfloat16, which Triton's interpreter"):
        ops.resolve_impl("triton", "cpu", torch.bfloat16)


@interpreted
@pytest.mark.parametrize(
    ("versions", "refused"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.0"}, True),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, False),
        ({"triton": "3.8.0", "numpy": "2.5.1"}, False),
    ],
    ids=["3.6 and 2.4", "3.6 and 2.3", "3.8 and 2.5"],
)
def test_impl_triton_numpy_too_new_for_interpreter_raises(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], refused: bool
) -> None:
    monkeypatch.setattr(dispatch.importlib.metadata, "version", versions.__getitem__)
    assert ops.resolve_impl("triton", "cpu")[0] == "triton"  # interpreter.py corrects it
    monkeypatch.setattr(dispatch, "INTERPRETS_BF16", False)
    if not refused:
        assert ops.resolve_impl("triton", "cpu")[0] == "triton"
        return
    with pytest.raises(ValueError, match=r"interpreter of triton 3\.6\.0 does not work with numpy 2\.4\.0"):
        ops.resolve_impl("triton", "cpu")
