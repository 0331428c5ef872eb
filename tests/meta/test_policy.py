"""The helpers that judge all other tests: what they must let through and what they must fail."""

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


def test_bounds_are_no_laxer_than_decided() -> None:
    """The recorded cases and the interface fix the first three; the others are one computation in another order."""
    assert policy.GOLDEN <= 1e-5 and policy.GOLDEN_ZERO <= 1e-6 and policy.FBANK_ABS <= 1e-3
    assert policy.ROUNDING <= 2e-6 and policy.ROUNDING_GRAD <= 2e-5
    assert policy.HALF_FEATURES[torch.float16] <= 1e-2 and policy.HALF_FEATURES[torch.bfloat16] <= 2.5e-2


def test_equal_and_nearly_equal_tensors_pass(check) -> None:
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
    """Rows normalised with a mean that was taken in bf16: what an offset hides."""
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
def test_what_is_wrong_fails(check, wrong: str) -> None:
    assert_close, bound = check
    x = values()
    expected = x - x.mean(1, keepdim=True) if wrong == "low-precision statistics" else x
    with pytest.raises(AssertionError):
        assert_close(WRONG[wrong](x, bound), expected)


def test_nan_and_infinity_never_match(check) -> None:
    assert_close, _ = check
    for value in (NAN, INF):
        for actual, expected in ((value, 1.0), (1.0, value), (value, value)):
            with pytest.raises(AssertionError):
                assert_close(torch.tensor([1.0, actual]), torch.tensor([1.0, expected]))


def test_nothing_but_zero_matches_zero(check) -> None:
    assert_close, _ = check
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, 1e-30]), torch.zeros(2))


def test_the_message_names_tensor_error_and_bound(check) -> None:
    with pytest.raises(AssertionError, match=r"thing: .* = 0\.5, allowed 1e-05"):
        policy.assert_golden(torch.tensor([1.5]), torch.tensor([1.0]), "thing")


def test_golden_zero() -> None:
    policy.assert_golden_zero(torch.tensor([0.9e-6, -0.9e-6]))
    for wrong in (1.1e-6, -1.1e-6, NAN, INF):
        with pytest.raises(AssertionError):
            policy.assert_golden_zero(torch.tensor([0.0, wrong]))


def test_fbank_is_absolute() -> None:
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


def test_no_test_file_sets_a_tolerance_of_its_own() -> None:
    """Numbers that decide how near is near enough stand in policy.py; a default of approx or allclose is one too."""
    own = re.compile(r"\b(?:atol|rtol|rel_tol|abs_tol)\s*=\s*[\d.]|\ballclose\(|assert_close\(.*(?:atol|rtol)")
    found = [
        f"{path.name}:{number}"
        for path in sorted(Path(__file__).parent.parent.rglob("test_*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if own.search(line) and path.name != Path(__file__).name
    ]
    assert not found, found


# ---------------------------------------------------------------------------------------------------------- kernels

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normalise(x: torch.Tensor, statistics: torch.dtype) -> torch.Tensor:
    """Rows minus their mean, over their deviation, with statistics of a given precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.to(statistics).mean(1, keepdim=True)
    deviation = (wide.to(statistics) - mean).square().mean(1, keepdim=True).add(1e-5).sqrt()
    return ((wide - mean.to(wide.dtype)) / deviation.to(wide.dtype)).to(x.dtype)


def three(dtype: torch.dtype, offset: float = 0.0, rows: int = 64) -> tuple[torch.Tensor, ...]:
    """An honest kernel (columns in another order), the reference in its dtype, and in fp64; and the input."""
    x = (values()[:rows] + offset).to(dtype)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    kernel = normalise(x[:, order], torch.float32)[:, order.argsort()]
    return kernel, normalise(x, torch.float32), normalise(x.double(), torch.float64), x


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_an_honest_kernel_passes(dtype: torch.dtype, offset: float, rows: int) -> None:
    kernel, same, exact, _ = three(dtype, offset, rows)
    policy.assert_kernel(kernel, same, exact, dtype)
    policy.assert_kernel(same, same, exact, dtype)
    zeros = torch.zeros(3, dtype=dtype)
    policy.assert_kernel(zeros, zeros, zeros.double(), dtype)
    policy.assert_kernel(zeros[:0], zeros[:0], zeros[:0].double(), dtype)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_dishonest_kernel_fails(dtype: torch.dtype, offset: float) -> None:
    kernel, same, exact, x = three(dtype, offset)
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
    if offset:  # on zero-mean inputs statistics in low precision hide
        wrong["statistics in half precision"] = normalise(x, torch.float16 if dtype != torch.bfloat16 else dtype)
    for name, tensor in wrong.items():
        with pytest.raises(AssertionError):
            policy.assert_kernel(tensor.to(dtype), same, exact, dtype, name)
            print(f"{name} passed")
    with pytest.raises(AssertionError, match="shape"):
        policy.assert_kernel(kernel[:-1], same, exact, dtype)
    with pytest.raises(AssertionError, match="dtype"):
        policy.assert_kernel(kernel.double(), same, exact, dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_sums_over_rows_have_their_own_allowance_and_no_more(dtype: torch.dtype) -> None:
    rows = 64
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact, same = x.double().sum(0), x.float().sum(0).to(dtype)
    honest = x.float().view(8, 8, 48).sum(0).sum(0).to(dtype)
    policy.assert_kernel(honest, same, exact, dtype, summed_rows=rows)
    lost_row, off = honest - x[-1] * 0.9, honest.clone()
    off[0] += 0.05 * exact.abs().max()
    for wrong in (lost_row, off, honest * (1 + max(0.03, 8 * torch.finfo(dtype).eps))):
        with pytest.raises(AssertionError):
            policy.assert_kernel(wrong, same, exact, dtype, summed_rows=rows)


def test_one_row_does_not_excuse_a_wrong_one() -> None:
    """Few values scatter, and get room for that; 2 % is far outside it."""
    for dtype in KERNEL_DTYPES:
        kernel, same, exact, _ = three(dtype, 0.0, 1)
        with pytest.raises(AssertionError):
            policy.assert_kernel(kernel * 1.02, same, exact, dtype)


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
def test_kernel_cap_few_values_has_room_for_scatter_alone(dtype: torch.dtype, count: int, largest: float) -> None:
    """Whatever the reference does: here it is as wrong as the kernel."""
    exact = values().flatten()[:count]
    passes, fails = exact * (1 + 0.98 * largest), exact * (1 + 1.01 * largest)
    policy.assert_kernel(passes, passes, exact, dtype)
    with pytest.raises(AssertionError, match="never more than"):
        policy.assert_kernel(fails, fails, exact, dtype)
