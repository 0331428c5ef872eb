"""Shared code of the kernel tests: the kernels' device, difficult inputs, and the comparison with the reference.

Without a GPU the kernels run on CPU tensors under Triton's interpreter. conftest.py switches it on, and interpreter.py
corrects its bf16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from mae_ast_fast.kernels.common.case import Draw, OpCase
from mae_ast_fast.kernels.common.configs import TABLE
from mae_ast_fast.ops.cases import implementation, op_cases, specification, tensors_and_options
from mae_ast_fast.ops.masking import philox4x32
from mae_ast_fast.ops.policy import compare, results_and_gradients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFFSETS = (0.0, 30.0)  # zero-mean inputs do not show statistics in low precision


def few_programs(monkeypatch: pytest.MonkeyPatch, *names: str, programs: int = 3) -> None:
    """Limit the programs of the named kernels, so that each works on several rows even where a test has few."""
    op_cases()  # imports all kernels, and so their launches
    for name in names:
        change_launches(monkeypatch, name, {"PROGRAMS": programs})


def change_launches(monkeypatch: pytest.MonkeyPatch, kernel: str, changes: Mapping[str, int]) -> None:
    """Change these options in all rows of a kernel's launches."""
    monkeypatch.setitem(TABLE, kernel, [(*row[:3], {**row[3], **changes}) for row in TABLE[kernel]])


def tiny_launches(monkeypatch: pytest.MonkeyPatch, case: OpCase) -> None:
    """Set the case's launch options and patches, so that tiny inputs have several tiles and programs."""
    for kernel, changes in case.launches.items():
        change_launches(monkeypatch, kernel, changes)
    module = importlib.import_module(f"mae_ast_fast.kernels.{case.name}")
    for name, value in case.patches.items():
        monkeypatch.setattr(module, name, value)


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


@dataclass(frozen=True)
class Call:
    """An operation with given inputs: ``function`` and ``specified`` take the tensors by name."""

    tensors: dict[str, Tensor]
    function: Callable[..., Any]
    specified: Callable[..., Any]
    differentiable: tuple[str, ...]

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients."""
        return results_and_gradients(self.function, self.tensors, self.differentiable)


def call(case: OpCase, arguments: Mapping[str, Any], *, impl: str = "triton") -> Call:
    """The call of an operation with these arguments, options among them."""
    tensors, options = tensors_and_options(arguments)
    differentiable = tuple(name for name in case.differentiable if name in tensors)
    return Call(tensors, implementation(case, impl, options), specification(case, options), differentiable)


def inputs(case: OpCase, shape: Any, dtype: torch.dtype = torch.float32, *, offset: float = 0.0) -> dict[str, Any]:
    """The case's arguments for a shape, on the kernels' device."""
    return case.make(Draw(dtype, DEVICE, offset), shape)


def check(case: OpCase, arguments: Mapping[str, Any], dtype: torch.dtype, *, impl: str = "triton") -> None:
    """Check results and gradients against the specification, by the policy, and if the case is exact to the bit."""
    made = call(case, arguments, impl=impl)
    judged = {"summed": case.summed, "dot": case.dot, "capped": impl == "triton"}
    compare(made.function, made.specified, made.tensors, made.differentiable, dtype=dtype, **judged)
    if case.exact:
        for name, x in results_and_gradients(made.specified, made.tensors, made.differentiable).items():
            assert torch.equal(made.results()[name], x), f"{name}: not equal to the specification"


def check_output_dropout(
    case: OpCase, shape: Any, dtype: torch.dtype, *, dropout: float, dropout_site: int, seed: int
) -> None:
    """Check an operation whose output is dropped against the specification times the mask that the kernel must draw."""
    tensors = inputs(case, shape, dtype)
    made = call(case, tensors | {"dropout": dropout, "site": dropout_site})
    dropped = partial(made.function, seed=seed_tensor(seed))

    def masked(**tensors: Tensor) -> Tensor:
        y = specification(case, {})(**tensors)
        keep = keep_mask(seed, y.shape[0], y.shape[1], dropout_site=dropout_site, dropout=dropout) * kept_scale(dropout)
        return y * keep.to(y.dtype)

    compare(dropped, masked, tensors, case.differentiable, dtype=dtype, summed=case.summed)


def check_traced(case: OpCase, arguments: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> None:
    """Check the operation as torch.compile sees it, and that it repeats to the bit.

    One graph, equal to eager to the bit, also for the tensors ``others`` with another number of rows. PyTorch's own
    checks of each custom operation in it, forward and backward: schema, autograd, fake tensors, AOT dispatch.
    """
    made = call(case, arguments)

    def function(**tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = made.function(**tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(x.sin() if x.is_floating_point() else x.clone() for x in outputs)  # so gradients are computed

    found: dict[Any, tuple[Any, ...]] = {}
    backend = recording_backend(found)
    check_compiles(function, made.tensors, made.differentiable, others and call(case, others).tensors, backend=backend)
    assert found, f"{case.name}: the graph has no custom operation"
    pointers = {made.tensors[name].data_ptr() for name in made.differentiable}
    for op, (positional, keywords) in found.items():
        results = op(*positional, **keywords)
        if not all(torch.equal(x, x) for x in (results if isinstance(results, tuple) else (results,))):
            continue  # a result that is documented as undefined is NaN in tests, which equals nothing
        leaves = set() if "backward" in str(op) else pointers
        named = {name: as_leaf(x, leaves) for name, x in keywords.items()}
        torch.library.opcheck(op, tuple(as_leaf(x, leaves) for x in positional), named)
    check_repeats(function, made.tensors, made.differentiable)


def as_leaf(x: Any, pointers: Collection[int]) -> Any:
    """``x``; a tensor without its graph, and as a leaf with a gradient if its address is in ``pointers``."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_() if x.data_ptr() in pointers else x.detach()


def recording_backend(found: dict[Any, tuple[Any, ...]]) -> Callable[..., Any]:
    """A backend like "aot_eager" that keeps the first arguments of each of this package's custom operations."""

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if getattr(target, "namespace", "") == "mae_ast_fast":
                found.setdefault(target, (args, kwargs))
            return super().call_function(target, args, kwargs)

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(Recorder(graph).run)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def check_compiles(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    differentiable: Sequence[str] = (),
    others: dict[str, Tensor] | None = None,
    *,
    backend: Any = "aot_eager",
) -> None:
    """Check that torch.compile gives one graph, equal to eager to the bit.

    Args:
        function: Takes the inputs by name.
        inputs: Tensors of the first call.
        differentiable: Names of the inputs whose gradients are compared.
        others: Tensors of a second call, with another number of rows; None: no second call.
        backend: Backend of torch.compile.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
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
