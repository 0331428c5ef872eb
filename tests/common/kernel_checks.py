"""Shared code of the kernel tests: the kernels' device, difficult inputs, and the comparison with the reference.

Without a GPU the kernels run on CPU tensors under Triton's interpreter. conftest.py switches it on, and interpreter.py
corrects its bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_ast_fast.kernels.common.configs import TABLE
from mae_ast_fast.ops.masking import philox4x32
from mae_ast_fast.ops.policy import compare, results_and_gradients  # noqa: F401 - for tests

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFFSETS = (0.0, 30.0)  # zero-mean inputs do not show statistics in low precision


def few_programs(monkeypatch: pytest.MonkeyPatch, *names: str, programs: int = 3) -> None:
    """Limit the programs of the named kernels, so that each works on several rows even where a test has few."""
    for name in names:
        rows = [(*row[:3], {**row[3], "PROGRAMS": programs}) for row in TABLE[name]]
        monkeypatch.setitem(TABLE, name, rows)


def randn(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0, seed: int = 0) -> Tensor:
    """Normal values around ``offset``, rounded to ``dtype``, on the kernels' device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + offset).to(DEVICE, dtype)


def seed_tensor(seed: int) -> Tensor:
    """A dropout seed as the ops expect it: (1,) int64 on the kernels' device."""
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def cu_seqlens(clip_rows: Sequence[int]) -> Tensor:
    """(B + 1,) int32 first row of each clip, from the number of rows of each clip."""
    return torch.tensor([0, *clip_rows]).cumsum(0).to(DEVICE, torch.int32)


def keep_mask(seed: int, rows: int, columns: int, *, dropout_site: int, dropout: float, head: int = 0) -> Tensor:
    """The mask of kernels/common/dropout.py in PyTorch's integers: (rows, columns) bool, True = kept."""
    group, row = torch.arange(-(-columns // 8))[None, :], torch.arange(rows)[:, None]
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox4x32((group + 0 * row, row + 0 * group, dropout_site, head), key)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(1)[:, :columns]
    return (bits >= round(dropout * 65536)).to(DEVICE)


def kept_scale(dropout: float) -> float:
    """The factor on kept values: the inverse of the keep rate, which is a multiple of 1 / 65536."""
    return 1 / (1 - round(dropout * 65536) / 65536)


def check_registration(op: Callable[..., Any], *arguments: Any) -> None:
    """Run PyTorch's own checks of a custom op: schema, autograd registration, fake tensors, AOT dispatch.

    Args:
        op: The custom op.
        *arguments: Positional arguments of one call. Tensors that require gradients have their gradients checked.
    """
    torch.library.opcheck(op, arguments)


def check_compiles(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    differentiable: Sequence[str] = (),
    others: dict[str, Tensor] | None = None,
) -> None:
    """Check that torch.compile gives one graph, equal to eager to the bit.

    Args:
        function: Takes the inputs by name.
        inputs: Tensors of the first call.
        differentiable: Names of the inputs whose gradients are compared.
        others: Tensors of a second call, with another number of rows; None: no second call.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tensors in (inputs,) if others is None else (inputs, others):
        eager, traced = (results_and_gradients(call, tensors, differentiable) for call in (function, compiled))
        for name, x in eager.items():
            assert torch.equal(x, traced[name]), f"{name}: compiled and eager differ"


def check_strided_vectors(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], names: Sequence[str], differentiable: Sequence[str]
) -> None:
    """Check that the named vectors may have stride 2: the same results and gradients to the bit."""
    dense = results_and_gradients(function, inputs, differentiable)
    strided = dict(inputs)
    for name in names:
        x = inputs[name]
        holder = x.new_full((len(x), 2), 7 if not x.is_floating_point() else float("nan"))
        holder[:, 0] = x
        strided[name] = holder[:, 0]
    for name, x in results_and_gradients(function, strided, differentiable).items():
        assert torch.equal(x, dense[name]), f"{name}: strided vectors give another result"


def check_repeats(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], differentiable: Sequence[str] = ()
) -> None:
    """Check that repeats are bit-equal: 100 on a GPU, where the order could change; 2 in the interpreter."""
    first = results_and_gradients(function, inputs, differentiable)
    for _ in range(99 if DEVICE.type == "cuda" else 1):
        for name, x in results_and_gradients(function, inputs, differentiable).items():
            assert torch.equal(x, first[name]), f"{name}: two runs differ"
