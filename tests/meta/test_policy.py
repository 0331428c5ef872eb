"""The comparison helpers of all other tests: tensors that they must accept and reject."""

from __future__ import annotations

import re
from pathlib import Path

import policy
import pytest
import torch

NAN, INF = float("nan"), float("inf")
CHECKS = {
    "golden": (policy.assert_golden, policy.GOLDEN),
    "rounding": (policy.assert_rounding, policy.ROUNDING),
    "gradients": (lambda a, b: policy.assert_rounding(a, b, grad=True), policy.ROUNDING_GRAD),
}


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=CHECKS)
def check(request: pytest.FixtureRequest):
    return CHECKS[request.param]


def test_bounds_are_within_agreed_limits() -> None:
    """The recorded cases and the interface fix the first three; the others bound a change of summation order."""
    assert policy.GOLDEN <= 1e-5 and policy.GOLDEN_ZERO <= 1e-6 and policy.FBANK_ABS <= 1e-3
    assert policy.ROUNDING <= 2e-6 and policy.ROUNDING_GRAD <= 2e-5 and policy.ROUNDING_FP64 <= 1e-13
    assert policy.HALF_FEATURES[torch.float16] <= 1e-2 and policy.HALF_FEATURES[torch.bfloat16] <= 2.5e-2


def test_assert_close_nearly_equal_tensors_pass(check) -> None:
    assert_close, bound = check
    x = values()
    assert_close(x, x)
    assert_close(x.float(), x)
    assert_close(x + 0.9 * bound * x.abs().max(), x)
    assert_close(torch.zeros(3), torch.zeros(3))
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3))
    assert_close(torch.tensor(2.0), torch.tensor(2.0))


def _one_element(x: torch.Tensor, bound: float) -> torch.Tensor:
    x = x.clone()
    x[17, 5] += 1.1 * bound * x.abs().max()
    return x


def _swapped(x: torch.Tensor, bound: float) -> torch.Tensor:
    return x[torch.tensor([1, 0, *range(2, len(x))])]


def _low_precision_statistics(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Rows normalised with a mean computed in bf16; an offset hides the error."""
    rows = x + 30
    return (rows - rows.bfloat16().mean(1, keepdim=True).double()) + x - x


WRONG = {
    "a bias": lambda x, bound: x + 1.1 * bound * x.abs().max(),
    "one wrong element": _one_element,
    "a factor": lambda x, bound: x * (1 + 1.1 * bound),
    "two rows exchanged": _swapped,
    "a negative sign": lambda x, bound: -x,
    "low precision": lambda x, bound: x.bfloat16().double(),
    "low-precision statistics": _low_precision_statistics,
    "zeros": lambda x, bound: torch.zeros_like(x),
    "one NaN": lambda x, bound: x.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(NAN, dtype=x.dtype)),
    "one infinity": lambda x, bound: x.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(INF, dtype=x.dtype)),
    "another shape that broadcasts": lambda x, bound: x[:1],
    "one more dimension": lambda x, bound: x[None],
    "fewer rows": lambda x, bound: x[:-1],
    "nothing": lambda x, bound: x[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_assert_close_wrong_tensor_fails(check, wrong: str) -> None:
    assert_close, bound = check
    x = values()
    expected = x - x.mean(1, keepdim=True) if wrong == "low-precision statistics" else x
    with pytest.raises(AssertionError):
        assert_close(WRONG[wrong](x, bound), expected)


def test_assert_rounding_fp64_fp32_step_fails() -> None:
    x = values()
    policy.assert_rounding_fp64(x + 0.9 * policy.ROUNDING_FP64 * x.abs().max(), x)
    for wrong in (x.float(), x.float().double(), x + 1.1 * policy.ROUNDING_FP64 * x.abs().max()):
        with pytest.raises(AssertionError):
            policy.assert_rounding_fp64(wrong, x)


def test_assert_close_nan_and_infinity_fail(check) -> None:
    assert_close, _ = check
    for value in (NAN, INF):
        for actual, expected in ((value, 1.0), (1.0, value), (value, value)):
            with pytest.raises(AssertionError):
                assert_close(torch.tensor([1.0, actual]), torch.tensor([1.0, expected]))


def test_assert_close_zero_matches_only_zero(check) -> None:
    assert_close, _ = check
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, 1e-30]), torch.zeros(2))


def test_assert_golden_message_has_tensor_error_and_bound(check) -> None:
    with pytest.raises(AssertionError, match=r"thing: .* = 0\.5, allowed 1e-05"):
        policy.assert_golden(torch.tensor([1.5]), torch.tensor([1.0]), "thing")


def test_assert_golden_zero_bounds_absolute_error() -> None:
    policy.assert_golden_zero(torch.tensor([0.9e-6, -0.9e-6]))
    for wrong in (1.1e-6, -1.1e-6, NAN, INF):
        with pytest.raises(AssertionError):
            policy.assert_golden_zero(torch.tensor([0.0, wrong]))


def test_assert_fbank_bounds_absolute_error() -> None:
    x = torch.full((5, 4), -15.9424)
    policy.assert_fbank(x + 0.9e-3, x)
    policy.assert_fbank(x[:0], x[:0])
    for wrong in (x + 1.1e-3, x - 1.1e-3, x[:4], x[:1]):
        with pytest.raises(AssertionError):
            policy.assert_fbank(wrong, x)
    spoiled = x.clone()
    spoiled[2, 2] = NAN
    with pytest.raises(AssertionError):
        policy.assert_fbank(spoiled, x)


def test_test_files_set_no_tolerance() -> None:
    """All tolerances are in policy.py; the defaults of approx and allclose count as tolerances."""
    tolerance = re.compile(r"\b(?:atol|rtol|rel_tol|abs_tol)\s*=\s*[\d.]|\ballclose\(|assert_close\(.*(?:atol|rtol)")
    offenders = [
        f"{path.name}:{line_number}"
        for path in sorted(Path(__file__).parent.parent.rglob("test_*.py"))
        for line_number, line in enumerate(path.read_text().splitlines(), 1)
        if tolerance.search(line) and path.name != Path(__file__).name
    ]
    assert not offenders, offenders


# ---------------------------------------------------------------------------------------------------------- kernels

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normalise(x: torch.Tensor, statistics: torch.dtype) -> torch.Tensor:
    """Rows minus their mean, divided by their deviation, with statistics in a given precision."""
    fp32_or_wider = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = fp32_or_wider.to(statistics).mean(1, keepdim=True)
    deviation = (fp32_or_wider.to(statistics) - mean).square().mean(1, keepdim=True).add(1e-5).sqrt()
    return ((fp32_or_wider - mean.to(fp32_or_wider.dtype)) / deviation.to(fp32_or_wider.dtype)).to(x.dtype)


def kernel_reference_exact(dtype: torch.dtype, offset: float = 0.0, rows: int = 64) -> tuple[torch.Tensor, ...]:
    """A correct kernel (columns in another order), the reference in its dtype and in fp64, and the input."""
    x = (values()[:rows] + offset).to(dtype)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    kernel = normalise(x[:, order], torch.float32)[:, order.argsort()]
    return kernel, normalise(x, torch.float32), normalise(x.double(), torch.float64), x


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_assert_kernel_correct_kernel_passes(dtype: torch.dtype, offset: float, rows: int) -> None:
    kernel, reference, exact, _ = kernel_reference_exact(dtype, offset, rows)
    policy.assert_kernel(kernel, reference, exact, dtype)
    policy.assert_kernel(reference, reference, exact, dtype)
    zeros = torch.zeros(3, dtype=dtype)
    policy.assert_kernel(zeros, zeros, zeros.double(), dtype)
    policy.assert_kernel(zeros[:0], zeros[:0], zeros[:0].double(), dtype)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_assert_kernel_wrong_kernel_fails(dtype: torch.dtype, offset: float) -> None:
    kernel, reference, exact, x = kernel_reference_exact(dtype, offset)
    one_element, one_row, unwritten = kernel.clone(), kernel.clone(), kernel.clone()
    one_element[5, 7] += max(8 * torch.finfo(dtype).eps, 2e-5)  # the rows have a deviation of 1
    one_row[-1] = 0
    unwritten[-1, -1] = NAN
    wrong = {
        "2 % off": kernel * 1.02,
        "a bias of 2 %": kernel + 0.02,
        "one element": one_element,
        "one row": one_row,
        "unwritten": unwritten,
    }
    if offset:  # zero-mean inputs hide statistics in low precision
        wrong["statistics in half precision"] = normalise(x, torch.float16 if dtype != torch.bfloat16 else dtype)
    for name, tensor in wrong.items():
        with pytest.raises(AssertionError):
            policy.assert_kernel(tensor.to(dtype), reference, exact, dtype, name=name)
            print(f"{name} passed")
    with pytest.raises(AssertionError, match="shape"):
        policy.assert_kernel(kernel[:-1], reference, exact, dtype)
    with pytest.raises(AssertionError, match="dtype"):
        policy.assert_kernel(kernel.double(), reference, exact, dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_assert_kernel_summed_rows_widen_bound(dtype: torch.dtype) -> None:
    rows = 64
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact, reference = x.double().sum(0), x.float().sum(0).to(dtype)
    correct = x.float().view(8, 8, 48).sum(0).sum(0).to(dtype)
    policy.assert_kernel(correct, reference, exact, dtype, summed_rows=rows)
    lost_row, wrong_element = correct - x[-1] * 0.9, correct.clone()
    wrong_element[0] += 0.05 * exact.abs().max()
    for wrong in (lost_row, wrong_element, correct * (1 + max(0.03, 8 * torch.finfo(dtype).eps))):
        with pytest.raises(AssertionError):
            policy.assert_kernel(wrong, reference, exact, dtype, summed_rows=rows)


def test_assert_kernel_one_wrong_row_fails() -> None:
    """Few values have a wider bound, but 2 % is far outside it."""
    for dtype in KERNEL_DTYPES:
        kernel, reference, exact, _ = kernel_reference_exact(dtype, 0.0, 1)
        with pytest.raises(AssertionError):
            policy.assert_kernel(kernel * 1.02, reference, exact, dtype)


@pytest.mark.parametrize(
    ("dtype", "count", "largest"),
    [
        (torch.float32, 3, 1.02e-5),
        (torch.float16, 3, 0.0022),
        (torch.float16, 16, 0.00152),
        (torch.float16, 3072, 0.00104),
        (torch.bfloat16, 3, 0.0136),
        (torch.bfloat16, 16, 0.00815),
        (torch.bfloat16, 3072, 0.0043),
    ],
    ids=str,
)
def test_assert_kernel_few_values_widen_cap(dtype: torch.dtype, count: int, largest: float) -> None:
    """The cap does not depend on the reference, which is as wrong as the kernel here."""
    exact = values().flatten()[:count]
    passes, fails = exact * (1 + 0.98 * largest), exact * (1 + 1.01 * largest)
    policy.assert_kernel(passes, passes, exact, dtype)
    with pytest.raises(AssertionError, match="never more than"):
        policy.assert_kernel(fails, fails, exact, dtype)
    policy.assert_kernel(fails, fails, exact, dtype, capped=False)
    with pytest.raises(AssertionError, match="allowed"):
        policy.assert_kernel(fails, exact, exact, dtype, capped=False)
