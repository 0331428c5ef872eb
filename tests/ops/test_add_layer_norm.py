"""What only add_layer_norm has; test_ops.py has the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    OFFSETS,
    check,
    compare,
    inputs,
    keep_mask,
    kept_scale,
    randn,
    seed_tensor,
)
from policy import STANDARD_ERRORS

from mae_ast_fast import ops
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["add_layer_norm"]
SEED = 0x1234_5678_9ABC_DEF1
ALL = CASE.differentiable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of the reference on a branch to which the drawn mask was applied."""
    rows, width, dropout, dropout_site = 21, 40, 0.3, 7
    arguments = inputs(CASE, (rows, width), dtype)
    keep = keep_mask(SEED, rows, width, dropout_site=dropout_site, dropout=dropout) * kept_scale(dropout)

    def masked(*, branch, residual, weight, bias, branch_bias):
        return reference.layer_norm(residual + (branch + branch_bias.to(branch.dtype)) * keep.to(branch), weight, bias)

    dropped = partial(ops.add_layer_norm, dropout=dropout, seed=seed_tensor(SEED), site=dropout_site, impl="triton")
    compare(dropped, masked, arguments, ALL, dtype=dtype, summed=CASE.summed)


def test_add_layer_norm_fork_adds_both_gradients() -> None:
    """Both outputs are y; their gradients are summed as if y had been used twice."""
    arguments = inputs(CASE, (6, 24))

    def twice(**tensors):
        y, again = ops.add_layer_norm(**tensors, fork=True, impl="triton")
        assert torch.equal(y, again)
        return y, again

    def used_twice(**tensors):
        y = reference.add_layer_norm(**tensors)
        return y, y * 1.0

    compare(twice, used_twice, arguments, ALL, dtype=torch.float32, summed=CASE.summed)
    branch = arguments["branch"].requires_grad_()
    for used in (0, 1):  # the other output is not used and gets no gradient
        y = ops.add_layer_norm(**arguments, fork=True, impl="triton")[used]
        y_without_fork = ops.add_layer_norm(**arguments, impl="triton")
        gradients = [torch.autograd.grad(out.sin().sum(), branch)[0] for out in (y, y_without_fork)]
        assert torch.equal(gradients[0], gradients[1])


def test_add_layer_norm_strided_gradients_change_nothing() -> None:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs(CASE, (6, 24)).items()}
    first, strided = randn(6, 24, seed=8), randn(6, 40, seed=9)[:, :24]
    results = []
    for second in (strided, strided.contiguous()):
        y, again = ops.add_layer_norm(**leaves, fork=True, impl="triton")
        results.append(torch.autograd.grad([y, again], list(leaves.values()), [first, second]))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_add_layer_norm_no_branch_bias_matches_reference(rows: int, dtype: torch.dtype, offset: float) -> None:
    arguments = inputs(CASE, (rows, 33), dtype, offset=offset) | {"branch_bias": None}
    check(CASE, arguments, dtype, impl="torch")
    if rows == 1 and dtype != torch.float64:
        check(CASE, arguments, dtype)


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
    arguments = {
        "branch": torch.zeros(3, 4),
        "residual": torch.zeros(3, 4),
        "weight": torch.zeros(4),
        "bias": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(**{**arguments, **change})
