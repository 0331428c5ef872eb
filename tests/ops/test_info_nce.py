"""What only info_nce has, and both plain implementations over predictions against a loop; test_ops.py has the rest."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, OFFSETS, compare, cu_seqlens, inputs, randn, results_and_gradients
from policy import ROUNDING, assert_rounding
from torch import Tensor
from torch.autograd import gradcheck

from mae_ast_fast import ops
from mae_ast_fast.ops import eager, reference
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["info_nce"]
OVER = ("targets", "predictions")
CLIP_ROWS = ([1], [7], [5, 0, 1, 9, 5], [16, 32, 17])


def make_inputs(
    clip_rows: list[int], width: int, dtype: torch.dtype, *, offset: float = 0.0, scale: float | None = 1.0
) -> dict[str, Tensor]:
    """Prediction and target with products of about ``scale``."""
    arguments = inputs(CASE, (clip_rows, width, scale), dtype, offset=offset)
    return {name: arguments[name] for name in ("prediction", "target")}


def check_policy(
    tensors: dict[str, Tensor],
    clip_rows: list[int],
    over: str,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    hits: bool = True,
) -> None:
    """Check loss, hits and gradient by the policy; ``factor`` scales the loss and so the incoming gradient."""
    cu = cu_seqlens(clip_rows)

    def run(function, prediction: Tensor, target: Tensor, **options: str | int) -> tuple[Tensor, ...]:
        loss, hit = function(prediction, target, cu, over=over, **options)
        return (loss * factor, hit) if hits else (loss * factor,)

    def kernel(**tensors: Tensor) -> tuple[Tensor, ...]:
        return run(ops.info_nce, **tensors, max_seqlen=max(clip_rows), impl="triton")

    def plain(**tensors: Tensor) -> tuple[Tensor, ...]:
        return run(reference.info_nce, **tensors)

    compare(kernel, plain, tensors, ["prediction"], dtype=dtype, dot=True)


# ------------------------------------------------------------------------------------------------ reference and eager


def over_predictions(
    module: ModuleType, prediction: Tensor, target: Tensor, clip_rows: list[int]
) -> tuple[Tensor, Tensor]:
    cu = cu_seqlens(clip_rows).to(prediction.device)
    if module is reference:
        return reference.info_nce(prediction, target, cu, over="predictions")
    return eager.info_nce(prediction, target, cu, max(clip_rows), over="predictions")


@pytest.mark.parametrize("module", [reference, eager], ids=["reference", "eager"])
@pytest.mark.parametrize("clip_rows", [*CLIP_ROWS, [2] * 9 + [40]])  # the last one needs groups of similar clips
def test_info_nce_over_predictions_matches_loop(module: ModuleType, clip_rows: list[int]) -> None:
    rows, cu = sum(clip_rows), cu_seqlens(clip_rows).cpu()
    prediction, target = randn(rows, 3, seed=1).cpu().double(), randn(rows, 3, seed=2).cpu().double()
    loss, hit = over_predictions(module, prediction, target, clip_rows)
    losses, hits = [], []
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        clip = range(start, end)
        product = {(i, j): float(target[i] @ prediction[j]) for i in clip for j in clip}
        log_sum = {i: math.log(sum(math.exp(product[i, j]) for j in clip)) for i in clip}
        losses += [log_sum[i] - product[i, i] for i in clip]
        hits += [max(clip, key=lambda i, j=j: product[i, j] - log_sum[i]) == j for j in clip]  # max takes the first
    assert_rounding(loss + 1, torch.tensor(losses, dtype=torch.float64) + 1)
    assert hit.tolist() == hits


@pytest.mark.parametrize("module", [reference, eager], ids=["reference", "eager"])
def test_info_nce_over_predictions_passes_gradcheck(module: ModuleType) -> None:
    leaves = [randn(6, 3, seed=seed).cpu().double().requires_grad_() for seed in (1, 2)]
    assert gradcheck(lambda p, t: over_predictions(module, p, t, [4, 0, 1, 1])[0], leaves)


@pytest.mark.parametrize("module", [reference, eager], ids=["reference", "eager"])
def test_info_nce_over_predictions_swaps_operands_of_loss(module: ModuleType) -> None:
    """The softmax over predictions swaps the two operands in the loss, but not in the hits."""
    prediction, target = randn(12, 5, seed=1), randn(12, 5, seed=2)
    loss, hit = over_predictions(module, prediction, target, [5, 7])
    other_loss, other_hit = reference.info_nce(target, prediction, cu_seqlens([5, 7]), over="targets")
    assert_rounding(loss, other_loss)
    assert not torch.equal(hit, other_hit)


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("width", [1, 33, 512])
def test_info_nce_widths_and_offsets_match_reference(width: int, offset: float, dtype: torch.dtype, over: str) -> None:
    clip_rows = [18, 1, 35]
    # With an offset and the softmax over predictions, all targets choose one prediction: rounding decides the hit.
    hits = over == "targets" or offset == 0.0
    check_policy(make_inputs(clip_rows, width, dtype, offset=offset), clip_rows, over, dtype, hits=hits)


@pytest.mark.parametrize("over", OVER)
def test_info_nce_tiles_of_table_match_reference(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # no small tiles
    clip_rows = [65, 130]
    for dtype in DTYPES:
        check_policy(make_inputs(clip_rows, 256, dtype, scale=4.0), clip_rows, over, dtype)


def has_near_tie(tensors: dict[str, Tensor], clip_rows: list[int]) -> bool:
    """Whether rounding decides a hit over predictions: a prediction's two best log softmaxes are nearly equal."""
    prediction, target = (tensors[name].cpu().double().split(clip_rows) for name in ("prediction", "target"))
    for clip_prediction, clip_target in zip(prediction, target, strict=True):
        if len(clip_prediction) > 1:
            products = clip_target @ clip_prediction.T
            best = (products - products.logsumexp(1, keepdim=True)).topk(2, dim=0).values
            margin = best[0] - best[1]
            if ((margin > 0) & (margin <= ROUNDING * products.abs().max())).any():
                return True
    return False


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clip_rows=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    width=st.integers(2, 70),
    pad=st.integers(0, 3),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    over=st.sampled_from(OVER),
    dtype=st.sampled_from(DTYPES),
)
def test_info_nce_any_clips_widths_and_row_strides_match_reference(
    *, clip_rows: list[int], width: int, pad: int, scale: float, over: str, dtype: torch.dtype
) -> None:
    tensors = make_inputs(clip_rows, width, dtype, scale=scale)
    for name, margin in (("prediction", pad), ("target", 2 * pad)):
        padded = torch.nn.functional.pad(tensors[name], (margin, margin), value=float("nan"))
        tensors[name] = padded[:, margin : margin + width]
    hits = over == "targets" or not has_near_tie(tensors, clip_rows)
    check_policy(tensors, clip_rows, over, dtype, hits=hits)


@pytest.mark.parametrize("over", OVER)
def test_info_nce_equal_products_hit_first(over: str) -> None:
    """Of equal products the first is the hit, inside a tile and across tiles; small integers make products exact."""
    rows = 50
    zeros, target = torch.zeros(rows, 4, device=DEVICE), randn(rows, 4, seed=2).mul(2).round()
    _, hit = ops.info_nce(zeros, target, cu_seqlens([rows]), rows, over=over, impl="triton")
    assert hit.nonzero().flatten().tolist() == [0]

    basis = 8 * torch.eye(16, device=DEVICE)
    copies = basis[torch.arange(rows) % 16]  # rows 16, 32 and 48 are row 0 again, each in another tile
    _, hit = ops.info_nce(copies, copies, cu_seqlens([rows]), rows, over=over, impl="triton")
    assert hit.nonzero().flatten().tolist() == list(range(16))

    target[7], target[40] = target[3], target[39]  # neighbours in one tile
    prediction = target.clone()
    for clip_rows in ([rows], [4, 0, 46], [40, 10]):
        cu = cu_seqlens(clip_rows)
        _, hit = ops.info_nce(prediction, target, cu, max(clip_rows), over="targets", impl="triton")
        _, expected_hit = reference.info_nce(prediction, target, cu, over="targets")
        assert torch.equal(hit, expected_hit) and not hit.all()


def test_info_nce_hits_over_predictions_compare_probabilities() -> None:
    """Target 0 has the larger products with both predictions, but each softmax is over its own row."""
    prediction = torch.tensor([[3.0, 0.0], [2.0, 1.0]], device=DEVICE)
    target = torch.tensor([[3.0, 0.0], [0.0, 1.0]], device=DEVICE)
    _, hit = ops.info_nce(prediction, target, cu_seqlens([2]), 2, over="predictions", impl="triton")
    assert hit.tolist() == [True, True]
    _, hit = ops.info_nce(prediction, target, cu_seqlens([2]), 2, over="targets", impl="triton")
    assert hit.tolist() == [True, False]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_clip_of_one_row_has_no_loss(dtype: torch.dtype, over: str) -> None:
    tensors, cu = make_inputs([1, 1, 1], 24, dtype, offset=30.0), cu_seqlens([1, 0, 1, 1])
    results = results_and_gradients(
        lambda **tensors: ops.info_nce(**tensors, cu_seqlens=cu, max_seqlen=1, over=over, impl="triton"),
        tensors,
        ["prediction"],
    )
    assert not results["output 0"].any() and results["output 1"].all() and not results["gradient of prediction"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the other clips' NaN
@pytest.mark.parametrize("over", OVER)
def test_info_nce_clips_are_independent(over: str) -> None:
    clip_rows = [5, 20, 34]
    tensors = make_inputs(clip_rows, 24, torch.float32)
    middle_clip = {name: x[5:25] for name, x in tensors.items()}
    for x in tensors.values():
        x[:5], x[25:] = float("nan"), float("inf")

    def kernel_for(cu: Tensor, max_seqlen: int):
        return lambda **tensors: ops.info_nce(**tensors, cu_seqlens=cu, max_seqlen=max_seqlen, over=over, impl="triton")

    results = results_and_gradients(kernel_for(cu_seqlens(clip_rows), 34), tensors, [])
    expected = results_and_gradients(kernel_for(cu_seqlens([20]), 20), middle_clip, [])
    for name, x in expected.items():
        assert torch.equal(results[name][5:25], x), name
    leaf = tensors["prediction"].requires_grad_()
    loss, _ = ops.info_nce(leaf, tensors["target"], cu_seqlens(clip_rows), 34, over=over, impl="triton")
    (gradient,) = torch.autograd.grad(loss[5:25].sum(), leaf)
    leaf = middle_clip["prediction"].clone().requires_grad_()
    loss, _ = ops.info_nce(leaf, middle_clip["target"], cu_seqlens([20]), 20, over=over, impl="triton")
    assert torch.equal(gradient[5:25], torch.autograd.grad(loss.sum(), leaf)[0])


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_info_nce_small_and_large_gradients_match_reference(factor: float, dtype: torch.dtype, over: str) -> None:
    """Weights of the order of 1e-8 (0 in fp16) and 1e4: the products with targets of the inverse size fit the dtype."""
    clip_rows, size = [40, 9], 1000.0 if factor < 1 else 0.1
    tensors = make_inputs(clip_rows, 16, torch.float32)
    tensors = {"prediction": (tensors["prediction"] / size).to(dtype), "target": (tensors["target"] * size).to(dtype)}
    check_policy(tensors, clip_rows, over, dtype, factor=factor)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_zero_gradients_of_some_rows_match_reference(dtype: torch.dtype, over: str) -> None:
    """Rows of weight 0, and a clip with only such rows: this is how the model leaves clips out of the loss."""
    clip_rows = [20, 17, 3]
    tensors, cu = make_inputs(clip_rows, 24, dtype), cu_seqlens(clip_rows)
    weight = torch.ones(40, device=DEVICE)
    weight[::3] = 0.0
    weight[20:37] = 0.0

    def kernel(**tensors: Tensor) -> Tensor:
        return ops.info_nce(**tensors, cu_seqlens=cu, max_seqlen=20, over=over, impl="triton")[0] * weight

    def plain(**tensors: Tensor) -> Tensor:
        return reference.info_nce(**tensors, cu_seqlens=cu, over=over)[0] * weight

    compare(kernel, plain, tensors, ["prediction"], dtype=dtype, dot=True)
    gradient = results_and_gradients(kernel, tensors, ["prediction"])["gradient of prediction"]
    assert not gradient[20:37].any() and gradient[:20].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_confident_rows_match_reference(dtype: torch.dtype) -> None:
    """Losses from 1 down to 1e-9, from products of up to 100 with the own target."""
    clip_rows = [24]
    target = torch.eye(24, device=DEVICE).to(dtype) * 10
    prediction = target * torch.linspace(0.03, 1.0, 24, device=DEVICE)[:, None].to(dtype)
    for over in OVER:
        tensors = {"prediction": prediction, "target": target}
        check_policy(tensors, clip_rows, over, dtype, hits=False)
        assert ops.info_nce(**tensors, cu_seqlens=cu_seqlens(clip_rows), max_seqlen=24, over=over, impl="triton")[
            1
        ].all()


@pytest.mark.parametrize("over", OVER)
def test_info_nce_padding_rows_are_zero(over: str) -> None:
    tensors = make_inputs([5, 9, 3], 24, torch.float32)
    cu = cu_seqlens([5, 9])

    def run(**tensors: Tensor) -> Tensor:
        return ops.info_nce(**tensors, cu_seqlens=cu, max_seqlen=9, over=over, impl="triton")[0]

    results = results_and_gradients(run, tensors, ["prediction"])
    assert not results["output 0"][14:].any() and not results["gradient of prediction"][14:].any()
    expected = results_and_gradients(run, {name: x[:14] for name, x in tensors.items()}, ["prediction"])
    assert torch.equal(results["output 0"][:14], expected["output 0"])


def test_info_nce_overflowing_products_leave_others_exact() -> None:
    """If all products of a row's first tile are -inf, its other products still give the loss."""
    prediction, target = torch.full((70, 16), 1e20, device=DEVICE), torch.full((70, 16), -1e20, device=DEVICE)
    target[64:] = 0
    cu = cu_seqlens([70])
    losses = {impl: ops.info_nce(prediction, target, cu, 70, impl=impl)[0][64:] for impl in ("triton", "torch")}
    assert_rounding(losses["triton"], losses["torch"])


def test_info_nce_target_requiring_gradient_raises() -> None:
    prediction, target = make_inputs([3], 4, torch.float32).values()
    target.requires_grad_()
    with pytest.raises(ValueError, match=r"target requires a gradient.*impl='torch' or target\.detach"):
        ops.info_nce(prediction, target, cu_seqlens([3]), 3, impl="triton")
    with torch.no_grad():
        loss, _ = ops.info_nce(prediction, target, cu_seqlens([3]), 3, impl="triton")
    assert torch.equal(loss, ops.info_nce(prediction, target.detach(), cu_seqlens([3]), 3, impl="triton")[0])
    assert ops.info_nce(prediction, target, cu_seqlens([3]), 3, impl="torch")[0].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(4)}, r"prediction must be \(N, P\), got \(4,\)"),
        ({"target": torch.zeros(3, 5)}, r"target must be \(3, 4\), got \(3, 5\)"),
        ({"target": torch.zeros(3, 4, dtype=torch.float16)}, "one dtype, got torch.float32 and torch.float16"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must be \(B \+ 1,\) int32, got torch.int64 \(2,\)"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens must be on cpu, got meta"),
        ({"over": "rows"}, "over must be 'targets' or 'predictions', got 'rows'"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
    ],
)
def test_info_nce_bad_input_raises(change: dict, message: str) -> None:
    tensors = {"prediction": torch.zeros(3, 4), "target": torch.zeros(3, 4), "max_seqlen": 3}
    tensors["cu_seqlens"] = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.info_nce(**{**tensors, **change})


def test_info_nce_too_wide_rows_name_alternative() -> None:
    wide = torch.zeros(1, 513, device=DEVICE)
    with pytest.raises(ValueError, match="at most 512 values, got 513: use impl='torch'"):
        ops.info_nce(wide, wide, cu_seqlens([1]), 1, impl="triton")
