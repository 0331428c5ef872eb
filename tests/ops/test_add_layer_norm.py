"""kernels/add_layer_norm.py against reference.add_layer_norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
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
from policy import STANDARD_ERRORS

from mae_ast_fast import ops
from mae_ast_fast.ops import reference

SEED = 0x1234_5678_9ABC_DEF1
WEIGHTS = ("weight", "bias", "branch_bias")
ALL = ("branch", "residual", *WEIGHTS)


@pytest.fixture(autouse=True)
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_add_layer_norm_values_and_gradients_match_reference(
    rows: int, width: int, dtype: torch.dtype, offset: float
) -> None:
    compare(kernel, reference.add_layer_norm, make_inputs(rows, width, dtype, offset), ALL, dtype=dtype, summed=WEIGHTS)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), width=st.integers(8, 130), pad=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_add_layer_norm_any_size_and_row_stride_matches_reference(
    rows: int, width: int, pad: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(rows, width, dtype)
    for name in ("branch", "residual"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, pad), value=float("nan"))[:, :width]
    compare(kernel, reference.add_layer_norm, inputs, ALL, dtype=dtype, summed=WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of the reference on a branch to which the drawn mask was applied."""
    rows, width, dropout, dropout_site = 21, 40, 0.3, 7
    inputs = make_inputs(rows, width, dtype)
    keep = keep_mask(SEED, rows, width, dropout_site=dropout_site, dropout=dropout) * kept_scale(dropout)

    def masked(*, branch, residual, weight, bias, branch_bias):
        return reference.layer_norm(residual + (branch + branch_bias.to(branch.dtype)) * keep.to(branch), weight, bias)

    def dropped(**inputs):
        return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=dropout_site)

    compare(dropped, masked, inputs, ALL, dtype=dtype, summed=WEIGHTS)


def test_add_layer_norm_fork_adds_both_gradients() -> None:
    """Both outputs are y; their gradients are summed as if y had been used twice."""
    inputs = make_inputs(6, 24, torch.float32)

    def twice(**inputs):
        y, again = ops.add_layer_norm(**inputs, fork=True, impl="triton")
        assert torch.equal(y, again)
        return y, again

    def used_twice(**inputs):
        y = reference.add_layer_norm(**inputs)
        return y, y * 1.0

    compare(twice, used_twice, inputs, ALL, dtype=torch.float32, summed=WEIGHTS)
    branch = inputs["branch"].requires_grad_()
    for used in (0, 1):  # the other output is not used and gets no gradient
        y = ops.add_layer_norm(**inputs, fork=True, impl="triton")[used]
        y_without_fork = ops.add_layer_norm(**inputs, impl="triton")
        gradients = [torch.autograd.grad(out.sin().sum(), branch)[0] for out in (y, y_without_fork)]
        assert torch.equal(gradients[0], gradients[1])


def test_add_layer_norm_strided_gradients_and_vectors_change_nothing() -> None:
    inputs = make_inputs(6, 24, torch.float32)
    check_strided_vectors(kernel, inputs, WEIGHTS, ALL)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    first, strided = randn(6, 24, seed=8), randn(6, 40, seed=9)[:, :24]
    results = []
    for second in (strided, strided.contiguous()):
        y, again = ops.add_layer_norm(**leaves, fork=True, impl="triton")
        results.append(torch.autograd.grad([y, again], list(leaves.values()), [first, second]))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


def test_add_layer_norm_no_rows_and_no_branch_bias_match_reference() -> None:
    inputs = make_inputs(0, 16, torch.float32)
    results = results_and_gradients(kernel, inputs, ALL)
    assert results["output 0"].shape == (0, 16) and not results["gradient of weight"].any()
    inputs = {name: x for name, x in make_inputs(5, 16, torch.float32).items() if name != "branch_bias"}
    compare(kernel, reference.add_layer_norm, inputs, ALL[:4], dtype=torch.float32, summed=WEIGHTS[:2])


def test_add_layer_norm_registers_compiles_and_repeats() -> None:
    from mae_ast_fast.kernels.add_layer_norm import forward_op

    inputs = make_inputs(5, 24, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    for dropout in (0.0, 0.2):
        check_registration(forward_op, *leaves, seed_tensor(1), dropout, 3, 1e-5)

        def dropped(dropout=dropout, **inputs):
            y, again = ops.add_layer_norm(
                **inputs, dropout=dropout, seed=seed_tensor(SEED), site=2, fork=True, impl="triton"
            )
            return y.sin() + again

        check_compiles(dropped, inputs, ALL, make_inputs(7, 24, torch.float32))
        check_repeats(dropped, inputs, ALL)


def test_add_layer_norm_dropout_keeps_rate_and_differs_by_site_and_seed() -> None:
    rows, width, dropout = 64, 256, 0.25
    zeros, ones = torch.zeros(rows, width, device=DEVICE), torch.ones(width, device=DEVICE)

    def kept(seed: torch.Tensor | None, dropout_site: int) -> torch.Tensor:
        branch = torch.ones_like(zeros).requires_grad_()
        weight = randn(width, seed=1)
        y = ops.add_layer_norm(
            branch, zeros, weight, ones, dropout=dropout, seed=seed, site=dropout_site, impl="triton"
        )
        return (y - 1) * weight.sign() > 0  # above the row's mean: kept

    first = kept(seed_tensor(1), 1)
    assert torch.equal(first, keep_mask(1, rows, width, dropout_site=1, dropout=dropout))
    rate = first.double().mean().item()
    assert abs(rate - 0.75) <= STANDARD_ERRORS * (0.75 * 0.25 / first.numel()) ** 0.5
    for other in (kept(seed_tensor(2), 1), kept(seed_tensor(1), 2), kept(seed_tensor(1 + 2**32), 1)):
        assert 0.3 < (other != first).double().mean() < 0.45  # 2 * .75 * .25 of independent masks
    torch.manual_seed(0)
    first_draw = kept(None, 1)
    assert not torch.equal(first_draw, kept(None, 1))
    torch.manual_seed(0)
    assert torch.equal(first_draw, kept(None, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.zeros(3, 5)}, r"branch must be \(3, 4\), got \(3, 5\)"),
        ({"branch": torch.zeros(3, 4, dtype=torch.float16)}, "one dtype, got torch.float16 and torch.float32"),
        ({"weight": torch.zeros(5)}, r"weight must be \(4\), got \(5,\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be an int64 tensor of one element"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
    ],
)
def test_add_layer_norm_bad_input_raises(change: dict, message: str) -> None:
    inputs = {
        "branch": torch.zeros(3, 4),
        "residual": torch.zeros(3, 4),
        "weight": torch.zeros(4),
        "bias": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(**{**inputs, **change})
