"""Every operation with a kernel, by its record (``CASE`` in its file of kernels/), against its specification.

What only one operation has is in test_NAME.py. ``pytest -k NAME tests/ops`` runs both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fake_cuda.fixture import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    call,
    check,
    check_strided_vectors,
    check_traced,
    inputs,
    results_and_gradients,
    seed_tensor,
    tiny_launches,
)

from mae_ast_fast import ops
from mae_ast_fast.kernels.common.case import Integers, OpCase
from mae_ast_fast.ops import eager
from mae_ast_fast.ops.cases import op_cases, tensors_and_options

CASES = [case for case in op_cases().values() if case.shapes]
EAGER = [case for case in CASES if hasattr(eager, case.name) and "max_seqlen" not in case.unspecified]
RANDOM = [case for case in CASES if case.random]


def word(value: Any) -> str:
    """A part of a test's name."""
    text = str(value.name if isinstance(value, OpCase) else value)
    return "".join(text.replace("torch.", "").replace("'", "").split())[:60]


def each(names: str, values: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    parameters = list(values)
    return pytest.mark.parametrize(names.split(), [pytest.param(*x, id="-".join(map(word, x))) for x in parameters])


@pytest.fixture(autouse=True)
def _tiny_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "case" in request.fixturenames:
        tiny_launches(monkeypatch, request.getfixturevalue("case"))


@each(
    "case shape dtype offset variant",
    (
        (case, shape, dtype, offset, variant)
        for case in CASES
        for shape in case.shapes
        for dtype in case.dtypes
        for offset in case.offsets
        for variant in case.variants
    ),
)
def test_kernel_values_and_gradients_match_specification(
    *, case: OpCase, shape: Any, dtype: torch.dtype, offset: float, variant: dict[str, Any]
) -> None:
    check(case, {**inputs(case, shape, dtype, offset=offset), **variant}, dtype)


@each(
    "case shape dtype offset variant",
    (
        (case, shape, dtype, offset, variant)
        for case in EAGER
        for shape in (*case.shapes, *case.empty)
        for dtype in (*case.dtypes, torch.float64)
        for offset in case.offsets
        for variant in case.variants
    ),
)
def test_eager_values_and_gradients_match_specification(
    *, case: OpCase, shape: Any, dtype: torch.dtype, offset: float, variant: dict[str, Any]
) -> None:
    check(case, {**inputs(case, shape, dtype, offset=offset), **variant}, dtype, impl="torch")


def elements(sizes: Iterable[Integers]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Random shapes."""

    def element(size: Integers) -> st.SearchStrategy[Any]:
        integer = st.integers(size.lowest, size.highest)
        return integer if size.length is None else st.lists(integer, min_size=size.length[0], max_size=size.length[1])

    return st.tuples(*map(element, sizes))


def with_row_stride(x: torch.Tensor, margin: int) -> torch.Tensor:
    """``x`` inside wider rows, whose other values are NaN."""
    flat = torch.nn.functional.pad(x.flatten(1), (margin, margin), value=float("nan"))
    return flat[:, margin : flat.shape[1] - margin].unflatten(1, x.shape[1:])


@each("case", ((case,) for case in RANDOM))
def test_kernel_any_size_and_row_stride_matches_specification(case: OpCase) -> None:
    """The same shapes in each run: of a single value, the reference in the dtype may be exact by chance."""

    @settings(
        max_examples=case.num_random,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(elements(case.random), st.integers(0, 3), st.sampled_from(case.dtypes), st.sampled_from(case.variants))
    def check_random(shape: Any, pad: int, dtype: torch.dtype, variant: dict[str, Any]) -> None:
        arguments = {**inputs(case, shape, dtype), **variant}
        for times, name in enumerate(case.rows, 1):
            arguments[name] = with_row_stride(arguments[name], times * pad)
        check(case, arguments, dtype)

    check_random()


@each("case shape dtype", ((case, shape, dtype) for case in CASES for shape in case.empty for dtype in case.dtypes))
@pytest.mark.filterwarnings("ignore:var")  # the specification's, of no values
def test_kernel_no_rows_matches_specification(case: OpCase, shape: Any, dtype: torch.dtype) -> None:
    for variant in case.variants:
        made = call(case, {**inputs(case, shape, dtype), **variant})
        expected = results_and_gradients(made.specified, made.tensors, made.differentiable)
        for name, x in made.results().items():
            assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name
    for variant in case.traced_variants:
        for x in call(case, {**inputs(case, shape, dtype), **variant}).results().values():
            assert not x.any()


@each("case", ((case,) for case in CASES if case.rows or case.vectors))
def test_kernel_any_stride_changes_nothing(case: OpCase) -> None:
    """Matrices stored by columns, and vectors of stride 2, each alone and all together."""
    arguments = inputs(case, case.traced[0])
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.dim() == 2:
            arguments[name] = x.T.contiguous().T
    for variant in case.variants:
        check(case, {**arguments, **variant}, torch.float32)
    made = call(case, {**arguments, **case.variants[0]})
    for names in {case.vectors, *((name,) for name in case.vectors)} - {()}:
        check_strided_vectors(made.function, made.tensors, names, made.differentiable)


@each("case variant", ((case, variant) for case in CASES for variant in case.traced_variants))
def test_kernel_registers_compiles_and_repeats(case: OpCase, variant: dict[str, Any]) -> None:
    seed = {"seed": seed_tensor(-5)} if "dropout" in variant else {}
    arguments, others = ({**inputs(case, shape), **variant, **seed} for shape in case.traced)
    check_traced(case, arguments, others)


@each("case", ((case,) for case in CASES))
def test_bad_shape_or_device_raises(case: OpCase) -> None:
    """Any tensor with one dimension more, or on another device than the others."""
    arguments = {**inputs(case, case.traced[0]), **case.variants[0]}
    tensors, _ = tensors_and_options(arguments)
    for name, x in tensors.items():
        with pytest.raises(ValueError, match=rf"{name}\b.* must be"):
            getattr(ops, case.name)(**{**arguments, name: x[None]})
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=r"must be .*(cpu|cuda|meta).*"):
                getattr(ops, case.name)(**{**arguments, name: x.to("meta")})
    with pytest.raises(ValueError, match="impl must be one of auto, torch, triton"):
        getattr(ops, case.name)(**arguments, impl=DEVICE.type * 2)


HOST_PATH = """
import os
import torch
from fake_cuda.measure import Measure, report
from mae_ast_fast.kernels.common.case import Draw
from mae_ast_fast.kernels.common.launch import record
from mae_ast_fast.ops.cases import implementation, op_cases, tensors_and_options

measured = {}
for case in op_cases().values():
    for number, variant in enumerate(case.traced_variants if case.shapes else ()):
        arguments = {**case.make(Draw(case.dtypes[-1], "cuda"), case.traced[0]), **variant}
        if "dropout" in variant:
            arguments["seed"] = torch.ones(1, dtype=torch.int64, device="cuda")
        tensors, options = tensors_and_options(arguments)
        leaves = [tensors[name].requires_grad_() for name in case.differentiable if name in tensors]
        with record("sm_90") as recorder, Measure() as counted:
            outputs = implementation(case, "triton", options)(**tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if leaves:
                differentiable = [x for x in outputs if x.requires_grad]
                torch.autograd.grad(differentiable, leaves, [torch.ones_like(x) for x in differentiable])
        kernels = [function.fn.__name__ for function, _, _ in recorder.launches]
        measured[f"{case.name} {number}"] = {**counted.numbers(), "triton": kernels, "backward": bool(leaves)}
report(**measured)
os._exit(0)  # autograd's thread for the device may wait for Python's lock while Python ends, which aborts the process
"""


def test_kernel_host_path_waits_for_nothing(fake_cuda: Run) -> None:
    """Forward and backward of every operation on the fake GPU; Triton's launches are recorded, not compiled."""
    measured = fake_cuda(HOST_PATH)
    assert len(measured) == sum(len(case.traced_variants) for case in CASES)
    for name, counted in measured.items():
        assert (counted["waits"], counted["warned"], counted["illegal"]) == ({}, [], {}), name
        assert len(counted["triton"]) >= 1 + counted["backward"], name
