"""The rule by which a kernel is judged, in one formula, and its constants for each dtype.

    r   the specification (reference.py) in fp64, on inputs rounded to the kernel's dtype
    t   the specification in the kernel's dtype
    k   the kernel

    e(k)        <=  element * e(t) + eps + sum,    e(v) = max |v - r| / max(|r|, rms r)
    rms(k - r)  <=  rms * rms(t - r) + floor * rms r + scatter * (rms(t - r) + rounding) + sum * rms r
    rms(k - r)  <=  (cap + scatter * eps / 2) * rms r

    scatter  = 6 / sqrt(2 n), n values: the rms of n rounding errors scatters by a relative 1 / sqrt(2 n)
    rounding = eps / sqrt(12) * rms r: what rounding to the dtype costs at least; t may be below it by chance
    sum      = 0, but for sums over N rows (gradients of weights): sum_row * sqrt(N) + sum_eps * eps * max|r| / rms r

So a kernel is no worse than plain PyTorch in the same dtype, within factors. The third line, the cap, holds whatever t
does, but not for sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-300  # divisor where all values are 0


@dataclass(frozen=True)
class Tolerance:
    """The constants of the formula for one dtype.

    Attributes:
        element: Factor on the largest error of an element.
        rms: Factor on the rms error.
        floor: Rms error that is allowed besides, relative to rms r.
        cap: Largest rms error, relative to rms r.
        sum_row: Error that a sum over N rows may add, times sqrt(N), relative to rms r.
        sum_eps: Error that a sum over rows may add, in eps of the largest value.
    """

    element: float
    rms: float
    floor: float
    cap: float
    sum_row: float
    sum_eps: float


# The fp32 factor on elements is that on the rms: for one LayerNorm row of 33 values around 30, whose mean is at best
# 1e-6 off, PyTorch's error is 6.2e-7, ours 1.8e-6.
TOLERANCES = {
    torch.float32: Tolerance(element=3.0, rms=3.0, floor=1e-6, cap=1e-5, sum_row=5e-6, sum_eps=0.0),
    torch.float16: Tolerance(element=2.0, rms=1.25, floor=0.0, cap=1e-3, sum_row=0.0, sum_eps=2.0),
    torch.bfloat16: Tolerance(element=2.0, rms=1.25, floor=0.0, cap=4e-3, sum_row=0.0, sum_eps=2.0),
}
ELEMENT_DOT = 3.0  # like ``element``, for gradients through dot products
SCATTERS = 6.0  # numerator of ``scatter``: how many of these standard errors are allowed
# The cap gets ``scatter`` times this many eps. PyTorch's own bf16 gradient of feed_forward's x has an rms error of 0.44
# eps where it has many values. Of 4,000 seeds, 29 % of those of 16 values and 44 % of those of 3 exceed the bare cap;
# with this term 0.2 % and 1.6 % do.
CAP_SCATTER = 0.5
ROUNDING_FP64 = 1e-13  # max|a - b| / max|b|: one fp64 computation in another order, also for gradients (seen: 4e-16)


def max_rel(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b| in fp64; infinite if a value is NaN or infinite.

    Raises:
        AssertionError: The shapes differ.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), _TINY) if difference else 0.0


def assert_close(actual: Tensor, expected: Tensor, bound: float, name: str = "tensor") -> None:
    """Raise AssertionError unless max|a - b| / max|b| is at most ``bound``."""
    error = max_rel(actual, expected)
    if not error <= bound:
        raise AssertionError(f"{name}: max|a - b| / max|b| = {error:.3g}, allowed {bound:.3g}")


def rms(x: Tensor) -> float:
    """Root of the mean square; 0 for no values."""
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def element_error(v: Tensor, r: Tensor) -> float:
    """max(|v - r| / max(|r|, rms r)); 0 where both are 0 throughout."""
    if r.numel() == 0:
        return 0.0
    return ((v - r).abs() / r.abs().clamp(min=max(rms(r), _TINY))).max().item()


def assert_kernel(
    kernel: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    name: str = "tensor",
    dot: bool = False,
    summed_rows: int = 0,
    capped: bool = True,
) -> None:
    """Judge one result of a kernel by the formula above.

    Args:
        kernel: k, the result of the kernel.
        same_dtype: t, of the specification on the same inputs in the same dtype.
        exact: r, of the specification in fp64 on the same, rounded, inputs.
        dtype: Dtype of the kernel's inputs: fp32, fp16 or bf16.
        name: Name of the result in the message.
        dot: Whether the result is a gradient through dot products, which has a wider bound on single elements.
        summed_rows: N, the number of rows that the result sums over (gradients of weights and biases); 0 for none.
        capped: Whether the cap holds too. False for eager.py, which rounds where the reference does; a kernel is in
            fp32 inside.

    Raises:
        AssertionError: The result breaks a line of the formula, is not finite, or has another shape or dtype.
    """
    _require(kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}")
    _require(kernel.dtype == same_dtype.dtype, f"{name}: dtype {kernel.dtype}, expected {same_dtype.dtype}")
    k, t, r = (x.detach().cpu().double() for x in (kernel, same_dtype, exact))
    unfinished = int((~k.isfinite()).sum())
    _require(not unfinished, f"{name}: {unfinished} of {k.numel()} values are not finite")

    tolerance, eps = TOLERANCES[dtype], torch.finfo(dtype).eps
    rms_r, rms_k, rms_t = rms(r), rms(k - r), rms(t - r)
    scatter = SCATTERS / (2 * max(r.numel(), 1)) ** 0.5
    rounding = eps / 12**0.5 * rms_r
    summed = _sum_error(r, tolerance, eps, summed_rows) if summed_rows else 0.0

    error_k, error_t = element_error(k, r), element_error(t, r)
    bound = (ELEMENT_DOT if dot else tolerance.element) * error_t + eps + summed
    _require(error_k <= bound, f"{name}: e(k) = {error_k:.3g}, allowed {bound:.3g} (e(t) = {error_t:.3g})")
    bound = tolerance.rms * rms_t + tolerance.floor * rms_r + scatter * (rms_t + rounding) + summed * rms_r
    _require(rms_k <= bound, f"{name}: rms(k - r) = {rms_k:.3g}, allowed {bound:.3g} (t: {rms_t:.3g})")
    if capped and not summed_rows:
        bound = (tolerance.cap + scatter * CAP_SCATTER * eps) * rms_r
        _require(rms_k <= bound, f"{name}: rms(k - r) = {rms_k:.3g}, never more than {bound:.3g}")


def _sum_error(r: Tensor, tolerance: Tolerance, eps: float, rows: int) -> float:
    """``sum`` of the formula."""
    largest = r.abs().max().item() if r.numel() else 0.0
    return tolerance.sum_row * rows**0.5 + tolerance.sum_eps * eps * largest / max(rms(r), _TINY)


def _require(holds: bool, message: str) -> None:
    """``assert``, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


# ----------------------------------------------------------------------------------------- three runs on the same input


def results_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], differentiable: Sequence[str]
) -> dict[str, Tensor]:
    """The outputs of ``function(**inputs)`` by number, and the gradients of the named inputs.

    The incoming gradients are normal values in the outputs' dtype. Their seed is fixed, so that every implementation
    gets the same ones.
    """
    leaves = {name: x.detach().clone() if name in differentiable else x for name, x in inputs.items()}
    for name in differentiable:
        original = inputs[name]
        if not original.is_contiguous():  # a clone is dense; keep the strides under test
            leaves[name] = original.detach()
        leaves[name].requires_grad_()
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    sources = [out for out in outputs if out.requires_grad]
    incoming = [
        torch.randn(out.shape, generator=torch.Generator().manual_seed(99 + index)).half().to(out.device, out.dtype)
        for index, out in enumerate(sources)
    ]
    if not differentiable:
        return results
    inputs_of_gradients = [leaves[name] for name in differentiable]  # an unused one (a mask token, say) has gradient 0
    gradients = torch.autograd.grad(sources, inputs_of_gradients, incoming, allow_unused=True, materialize_grads=True)
    return results | {f"gradient of {name}": x for name, x in zip(differentiable, gradients, strict=True)}


def compare(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    differentiable: Sequence[str],
    *,
    dtype: torch.dtype,
    summed: Sequence[str] = (),
    dot: bool = False,
    capped: bool = True,
) -> None:
    """Compare a kernel or eager.py with the reference in the same dtype and in fp64 on the same inputs.

    Args:
        kernel: Function under test; takes the inputs by name.
        reference: The same function in reference.py.
        inputs: Tensors; floating ones are widened for the fp64 run.
        differentiable: Names of the inputs whose gradients are compared.
        dtype: Dtype in which the kernel works. In fp64 both computations are the same up to the order of sums.
        summed: Names of the differentiable inputs whose gradient sums over rows.
        dot: Whether gradients pass through dot products.
        capped: As in ``assert_kernel``.

    Raises:
        AssertionError: A result differs by more than the policy allows; integers and booleans: at all.
    """
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    kernel_results = results_and_gradients(kernel, inputs, differentiable)
    same_dtype_results = results_and_gradients(reference, inputs, differentiable)
    rows = max(x.shape[0] for x in inputs.values() if x.dim() > 0)
    for name, exact in results_and_gradients(reference, wide, differentiable).items():
        k, t = kernel_results[name], same_dtype_results[name]
        if not exact.is_floating_point():
            _require(torch.equal(k, t), f"{name}: kernel and reference differ")
            continue
        if dtype == torch.float64:
            assert_close(k, exact, ROUNDING_FP64, name)
            continue
        is_sum = name.removeprefix("gradient of ") in summed
        is_dot = dot and name.startswith("gradient")
        assert_kernel(k, t, exact, dtype, name=name, dot=is_dot, summed_rows=rows if is_sum else 0, capped=capped)
