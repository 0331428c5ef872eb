"""kernels/bias_gelu.py against reference.bias_gelu."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    OFFSETS,
    check_compiles,
    check_registration,
    check_repeats,
    check_strided_vectors,
    compare,
    few_programs,
    keep_mask,
    kept_scale,
    randn,
    results_and_gradients,
    seed_tensor,
)

from mae_ast_fast import ops
from mae_ast_fast.ops import reference

SEED = -5


@pytest.fixture(autouse=True)
def several_tiles_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "bias_gelu_backward", programs=2)


def kernel(x: torch.Tensor, bias: torch.Tensor, **options) -> torch.Tensor:
    return ops.bias_gelu(x, bias, **options, impl="triton")


def make_inputs(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, torch.Tensor]:
    return {"x": randn(rows, width, dtype=dtype, offset=offset, seed=1), "bias": randn(width, seed=2)}


@pytest.mark.parametrize("offset", (*OFFSETS, -3.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (9, 257), (37, 192), (6, 1), (3, 1100)])
def test_bias_gelu_values_and_gradients_match_reference(
    rows: int, width: int, dtype: torch.dtype, offset: float
) -> None:
    inputs = make_inputs(rows, width, dtype, offset)
    compare(kernel, reference.bias_gelu, inputs, ("x", "bias"), dtype=dtype, summed=("bias",))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), width=st.integers(1, 600), pad=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_bias_gelu_any_size_and_row_stride_matches_reference(
    rows: int, width: int, pad: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(rows, width, dtype)
    inputs["x"] = torch.nn.functional.pad(inputs["x"], (0, pad), value=float("nan"))[:, :width]
    compare(kernel, reference.bias_gelu, inputs, ("x", "bias"), dtype=dtype, summed=("bias",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gelu_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    rows, width, dropout, dropout_site = 13, 700, 0.4, 9
    keep = keep_mask(SEED, rows, width, dropout_site=dropout_site, dropout=dropout) * kept_scale(dropout)

    def masked(x, bias):
        return reference.bias_gelu(x, bias) * keep.to(x.dtype)

    def dropped(x, bias):
        return kernel(x, bias, dropout=dropout, seed=seed_tensor(SEED), site=dropout_site)

    compare(dropped, masked, make_inputs(rows, width, dtype), ("x", "bias"), dtype=dtype, summed=("bias",))


def test_bias_gelu_no_rows_and_strided_columns_match_reference() -> None:
    results = results_and_gradients(kernel, make_inputs(0, 16, torch.float32), ("x", "bias"))
    assert results["output 0"].shape == (0, 16) and not results["gradient of bias"].any()
    inputs = make_inputs(7, 32, torch.float32)
    inputs["x"] = inputs["x"].T.contiguous().T
    compare(kernel, reference.bias_gelu, inputs, ("x", "bias"), dtype=torch.float32, summed=("bias",))
    check_strided_vectors(kernel, inputs, ("bias",), ("x", "bias"))


def test_bias_gelu_registers_compiles_and_repeats() -> None:
    from mae_ast_fast.kernels.bias_gelu import forward_op

    inputs = make_inputs(9, 24, torch.float32)
    for dropout in (0.0, 0.2):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        check_registration(forward_op, *leaves, seed_tensor(1), dropout, 3)

        def dropped(x, bias, dropout=dropout):
            return kernel(x, bias, dropout=dropout, seed=seed_tensor(SEED), site=2).sin()

        check_compiles(dropped, inputs, ("x", "bias"), make_inputs(11, 24, torch.float32))
        check_repeats(dropped, inputs, ("x", "bias"))


def test_bias_gelu_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"bias must be \(4\), got \(5,\)"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(5))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got -0.1"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(4), dropout=-0.1)
    with pytest.raises(ValueError, match=r"x must be \(N, F\), got \(1, 2, 3\)"):
        ops.bias_gelu(torch.zeros(1, 2, 3), torch.zeros(3))
