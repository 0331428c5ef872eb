"""kernels/add_layer_norm.py against reference.add_layer_norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, OFFSETS, compare, few_programs, keep_mask, kept_scale, randn, seed_tensor

from mae_ast_fast import ops, reference

SEED = 0x1234_5678_9ABC_DEF1
WEIGHTS = ("weight", "bias", "branch_bias")
ALL = ("branch", "residual", *WEIGHTS)


@pytest.fixture(autouse=True)
def several_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "add_layer_norm_backward")


def kernel(**inputs) -> torch.Tensor:
    return ops.add_layer_norm(**inputs, impl="triton")


def make_inputs(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "branch": randn(rows, width, dtype=dtype, seed=1),
        "residual": randn(rows, width, dtype=dtype, offset=offset, seed=2),
        "weight": randn(width, offset=1.0, seed=3),
        "bias": randn(width, seed=4),
        "branch_bias": randn(width, seed=5),
    }


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (9, 33), (37, 192), (4, 1), (3, 1500)])
def test_values_and_gradients(rows: int, width: int, dtype: torch.dtype, offset: float) -> None:
    compare(kernel, reference.add_layer_norm, make_inputs(rows, width, dtype, offset), ALL, dtype, summed=WEIGHTS)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), width=st.integers(8, 130), pad=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_any_size_and_row_stride(rows: int, width: int, pad: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(rows, width, dtype)
    for name in ("branch", "residual"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, pad), value=float("nan"))[:, :width]
    compare(kernel, reference.add_layer_norm, inputs, ALL, dtype, summed=WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_with_its_own_mask(dtype: torch.dtype) -> None:
    """Outputs and gradients are those of the reference on a branch that the drawn mask has been applied to."""
    rows, width, dropout, site = 21, 40, 0.3, 7
    inputs = make_inputs(rows, width, dtype)
    keep = keep_mask(SEED, rows, width, site, dropout) * kept_scale(dropout)

    def masked(branch, residual, weight, bias, branch_bias):
        return reference.layer_norm(residual + (branch + branch_bias.to(branch.dtype)) * keep.to(branch), weight, bias)

    def dropped(**inputs):
        return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=site)

    compare(dropped, masked, inputs, ALL, dtype, summed=WEIGHTS)
