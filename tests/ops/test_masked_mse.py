"""What only masked_mse has; test_ops.py has the rest."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, call, check, compare, inputs, randn
from policy import PERFECT_MSE, assert_rounding

from mae_ast_fast import ops
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["masked_mse"]


def test_masked_mse_half_of_joint_head_matches_reference() -> None:
    head = randn(7, 40, seed=1).requires_grad_()
    target = randn(7, 20, seed=2)
    loss = ops.masked_mse(head[:, :20], target, impl="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), head)  # the incoming gradient is expanded: stride 0
    expected = torch.autograd.grad(reference.masked_mse(head[:, :20], target).sum(), head)[0]
    assert gradient[:, :20].any() and not gradient[:, 20:].any()
    check(CASE, {"prediction": head.detach()[:, :20], "target": target}, torch.float32)
    assert_rounding(gradient, expected, grad=True)


def test_masked_mse_target_of_another_dtype_matches_reference() -> None:
    arguments = inputs(CASE, (6, 20), torch.float16) | {"target": randn(6, 20, seed=3), "norm_pix_loss": True}
    check(CASE, arguments, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-4, 1000.0])
def test_masked_mse_small_and_large_gradients_match_reference(dtype: torch.dtype, factor: float) -> None:
    """2 / P * g alone is far below the range of fp16, but the gradient is not; the squares exceed its largest value."""
    made = call(CASE, {name: 300 * x for name, x in inputs(CASE, (6, 64), dtype).items()})
    functions = [lambda function=function, **x: function(**x) * factor for function in (made.function, made.specified)]
    compare(functions[0], functions[1], made.tensors, made.differentiable, dtype=dtype, dot=True)


@pytest.mark.parametrize("norm", [False, True])
def test_masked_mse_perfect_prediction_has_no_loss(norm: bool) -> None:
    target = randn(5, 32, seed=1)
    prediction = target.clone()
    if norm:
        prediction = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    loss = ops.masked_mse(prediction, target, norm, impl="triton")
    assert loss.max() <= PERFECT_MSE


def test_masked_mse_constant_target_norm_pix_matches_reference() -> None:
    """Silence: the variance is 0, eps keeps the division finite."""
    target = torch.full((6, 256), -16.0, device=DEVICE)
    check(CASE, {"prediction": randn(6, 256, seed=1), "target": target, "norm_pix_loss": True}, torch.float32)


def test_masked_mse_target_requiring_gradient_raises() -> None:
    prediction, target = inputs(CASE, (3, 4)).values()
    target.requires_grad_()
    with pytest.raises(ValueError, match=r"target requires a gradient.*impl='torch' or target\.detach"):
        ops.masked_mse(prediction, target, impl="triton")
    with torch.no_grad():
        assert torch.equal(
            ops.masked_mse(prediction, target, impl="triton"),
            ops.masked_mse(prediction, target.detach(), impl="triton"),
        )
    assert ops.masked_mse(prediction, target, impl="torch").requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(4)}, r"prediction must be \(N, P\), got \(4,\)"),
        ({"target": torch.zeros(3, 5)}, r"target must be \(3, 4\), got \(3, 5\)"),
        ({"target": torch.zeros(3, 4, device="meta")}, "target must be on cpu, got meta"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
        (
            {"prediction": torch.zeros(3, 1), "target": torch.zeros(3, 1), "norm_pix_loss": True},
            "norm_pix_loss needs rows of at least 2 values",
        ),
    ],
)
def test_masked_mse_bad_input_raises(change: dict, message: str) -> None:
    arguments = {"prediction": torch.zeros(3, 4), "target": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        ops.masked_mse(**{**arguments, **change})


def test_masked_mse_too_wide_rows_name_alternative() -> None:
    wide = torch.zeros(1, 20000).to(randn(1).device)
    with pytest.raises(ValueError, match="at most 16384 values, got 20000: use impl='torch'"):
        ops.masked_mse(wide, wide, impl="triton")
