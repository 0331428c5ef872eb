"""kernels/masked_mse.py against reference.masked_mse."""

from __future__ import annotations

from collections.abc import Iterator

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
    compare,
    randn,
    results_and_gradients,
)
from policy import PERFECT_MSE, assert_rounding
from torch import Tensor

from mae_ast_fast import ops
from mae_ast_fast.ops import reference


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` is filled with NaN in this mode, which shows elements that a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check_policy(inputs: dict[str, Tensor], dtype: torch.dtype, norm: bool = False, factor: float = 1.0) -> None:
    """Check loss and gradient by the policy; ``factor`` scales the loss and so the incoming gradient."""

    def kernel(prediction: Tensor, target: Tensor) -> Tensor:
        return ops.masked_mse(prediction, target, norm, impl="triton") * factor

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        return reference.masked_mse(prediction, target, norm) * factor

    compare(kernel, plain, inputs, ["prediction"], dtype=dtype, dot=True)


def make_inputs(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, Tensor]:
    return {
        "prediction": randn(rows, width, dtype=dtype, offset=offset, seed=1),
        "target": randn(rows, width, dtype=dtype, offset=offset, seed=2),
    }


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (9, 33), (130, 256), (4, 2), (3, 1500), (2, 5000)])
def test_masked_mse_values_and_gradients_match_reference(
    *, rows: int, width: int, dtype: torch.dtype, offset: float, norm: bool
) -> None:
    check_policy(make_inputs(rows, width, dtype, offset), dtype, norm)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    width=st.integers(8, 130),
    pad=st.integers(0, 3),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_masked_mse_any_size_and_row_stride_matches_reference(
    *, rows: int, width: int, pad: int, norm: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(rows, width, dtype)
    for name, margin in (("prediction", pad), ("target", 2 * pad)):
        padded = torch.nn.functional.pad(inputs[name], (margin, margin), value=float("nan"))
        inputs[name] = padded[:, margin : margin + width]
    check_policy(inputs, dtype, norm)


def test_masked_mse_half_of_joint_head_matches_reference() -> None:
    head = randn(7, 40, seed=1).requires_grad_()
    target = randn(7, 20, seed=2)
    loss = ops.masked_mse(head[:, :20], target, impl="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), head)  # the incoming gradient is expanded: stride 0
    expected = torch.autograd.grad(reference.masked_mse(head[:, :20], target).sum(), head)[0]
    assert gradient[:, :20].any() and not gradient[:, 20:].any()
    inputs = {"prediction": head.detach()[:, :20], "target": target}
    check_policy(inputs, torch.float32)
    assert_rounding(gradient, expected, grad=True)


def test_masked_mse_strided_columns_match_reference() -> None:
    inputs = {"prediction": randn(24, 9, seed=1).T, "target": randn(24, 9, seed=2).T}
    check_policy(inputs, torch.float32, norm=True)


def test_masked_mse_target_of_another_dtype_matches_reference() -> None:
    inputs = {**make_inputs(6, 20, torch.float16), "target": randn(6, 20, seed=3)}
    check_policy(inputs, torch.float16, norm=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-4, 1000.0])
def test_masked_mse_small_and_large_gradients_match_reference(dtype: torch.dtype, factor: float) -> None:
    """2 / P * g alone is far below the range of fp16, but the gradient is not; the squares exceed its largest value."""
    inputs = {name: 300 * x for name, x in make_inputs(6, 64, dtype).items()}
    check_policy(inputs, dtype, factor=factor)


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
    inputs = {"prediction": randn(6, 256, seed=1), "target": torch.full((6, 256), -16.0).to(randn(1).device)}
    check_policy(inputs, torch.float32, norm=True)


def test_masked_mse_no_rows_returns_no_rows() -> None:
    results = results_and_gradients(
        lambda **inputs: ops.masked_mse(**inputs, impl="triton"), make_inputs(0, 16, torch.float16), ["prediction"]
    )
    assert results["output 0"].shape == (0,) and results["output 0"].dtype == torch.float32
    assert results["gradient of prediction"].shape == (0, 16)


def test_masked_mse_registers_compiles_and_repeats() -> None:
    from mae_ast_fast.kernels.masked_mse import backward_op, forward_op

    inputs = make_inputs(5, 24, torch.float32)
    for norm in (False, True):
        check_registration(forward_op, inputs["prediction"].clone().requires_grad_(), inputs["target"], norm, 1e-6)
        check_registration(backward_op, randn(5), inputs["prediction"], inputs["target"], norm, 1e-6)

        def run(norm: bool = norm, **inputs: Tensor) -> Tensor:
            return ops.masked_mse(**inputs, norm_pix_loss=norm, impl="triton").sin()

        check_compiles(run, inputs, ["prediction"], make_inputs(8, 24, torch.float32))
        check_repeats(run, inputs, ["prediction"])


def test_masked_mse_target_requiring_gradient_raises() -> None:
    prediction, target = make_inputs(3, 4, torch.float32).values()
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
    inputs = {"prediction": torch.zeros(3, 4), "target": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        ops.masked_mse(**{**inputs, **change})


def test_masked_mse_too_wide_rows_name_alternative() -> None:
    wide = torch.zeros(1, 20000).to(randn(1).device)
    with pytest.raises(ValueError, match="at most 16384 values, got 20000: use impl='torch'"):
        ops.masked_mse(wide, wide, impl="triton")
