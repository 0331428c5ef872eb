"""reference.py, the specification, compared with plain loops or formulas, and its gradients with finite differences.

eager.py passes the same tests; test_eager.py compares it with the specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from policy import assert_rounding
from torch import Tensor
from torch.autograd import gradcheck

from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops import eager, reference
from mae_ast_fast.ops.dropout import drop
from mae_ast_fast.ops.packing import Packing, cumulative, real_tokens

# Rows of each clip: equal, ragged, with empty clips at both ends and in between, single rows, one clip.
COUNTS = [[3, 3, 3], [1, 4, 2], [0, 3, 0, 2], [2, 0], [1, 1, 1], [5], [0, 1]]


@pytest.fixture(params=[reference, eager], ids=["reference", "eager"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Both modules that have the tested function."""
    return request.param


def info_nce(module: ModuleType, prediction: Tensor, target: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """``info_nce`` over clips of ``counts`` rows."""
    cu_seqlens = cumulative(torch.tensor(counts))
    if module is reference:
        return reference.info_nce(prediction, target, cu_seqlens)
    return eager.info_nce(prediction, target, cu_seqlens, max(counts))


def attention(module: ModuleType, qkv: Tensor, counts: list[int], dropout: float = 0.0) -> Tensor:
    """``attention`` over clips of ``counts`` rows."""
    cu_seqlens = cumulative(torch.tensor(counts))
    if module is reference:
        return reference.attention(qkv, cu_seqlens, dropout)
    return eager.attention(qkv, cu_seqlens, max(counts), dropout)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


# ------------------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(("frames", "bins", "patch"), [(8, 6, (4, 3)), (11, 6, (4, 2)), (5, 4, (2, 4)), (3, 2, (1, 1))])
def test_patchify_any_shape_is_time_major_without_tail(frames: int, bins: int, patch: tuple[int, int]) -> None:
    kt, kf = patch
    x = torch.arange(2 * frames * bins).view(2, frames, bins)
    grid_t, grid_f = frames // kt, bins // kf
    patches = reference.patchify(x, patch)
    assert patches.shape == (2, grid_t * grid_f, kt * kf)
    for clip in range(2):
        for t in range(grid_t * kt):
            for f in range(bins):
                token, index = t // kt * grid_f + f // kf, t % kt * kf + f % kf
                assert patches[clip, token, index] == x[clip, t, f]
    assert torch.equal(reference.unpatchify(patches, patch, bins), x[:, : grid_t * kt])


def test_patchify_non_contiguous_features_equals_contiguous() -> None:
    x = normal(2, 6, 9).transpose(1, 2)[:, 1:]
    assert torch.equal(reference.patchify(x, (4, 3)), reference.patchify(x.contiguous(), (4, 3)))


def test_packing_selection_lists_tokens_clip_by_clip() -> None:
    selected = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    packing = Packing.of(selected)
    assert packing.clip.tolist() == [0, 0, 2, 2]
    assert packing.token.tolist() == [1, 2, 0, 3]
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 4] and packing.cu_seqlens.dtype == torch.int32
    assert packing.counts.tolist() == [2, 0, 2] and packing.max_seqlen == 2
    empty = Packing.of(torch.zeros(2, 0, dtype=torch.bool))
    assert empty.cu_seqlens.tolist() == [0, 0, 0] and empty.max_seqlen == 0 and empty.clip.numel() == 0


def test_real_tokens_unequal_counts_are_true_up_to_count() -> None:
    assert real_tokens(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_sinusoid_table_equals_formula() -> None:
    table = sinusoid(50, 6)
    assert table.dtype == torch.float32 and table.shape == (50, 6)
    expected = torch.empty(50, 6, dtype=torch.float64)
    for position in range(50):
        for i in range(3):
            angle = position * math.exp(2 * i * -math.log(10000.0) / 6)
            expected[position, 2 * i], expected[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    # Here and in the paper's code, an angle is rounded to fp32 before its sine is taken: half a unit at 32 to 64.
    assert (table.double() - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps
    assert torch.equal(sinusoid(3000, 6)[:50], table)


def test_gather_patches_packed_rows_are_normalised_patches() -> None:
    x = normal(2, 9, 4)
    selected = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    packing = Packing.of(selected)
    rows = reference.gather_patches(
        x, torch.tensor(0.3), torch.tensor(1.7), clip=packing.clip, token=packing.token, patch_size=(2, 2)
    )
    expected = []
    for clip, token in [(0, 0), (0, 3), (0, 6), (0, 7), (1, 5)]:
        t, f = token // 2 * 2, token % 2 * 2
        expected.append([(x[clip, t + i, f + j] - 0.3) * 1.7 for i in range(2) for j in range(2)])
    assert_rounding(rows, torch.tensor(expected, dtype=torch.float64))


def ids_restore_of(is_masked: Tensor) -> Tensor:
    return torch.where(is_masked, -1, (~is_masked).cumsum(0) - 1)


def test_scatter_tokens_masked_rows_equal_loop(module: ModuleType) -> None:
    is_masked = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    visible, mask_token, table = normal(3, 2), normal(2, seed=1), normal(5, 2, seed=2)
    token, weight, bias = torch.tensor([0, 1, 2, 3, 0, 1, 4]), normal(2, seed=3), normal(2, seed=4)
    ids_restore = ids_restore_of(is_masked)
    out = module.scatter_tokens(visible, mask_token, table, token=token, inverse=ids_restore)
    normed = module.scatter_tokens(
        visible, mask_token, table, token=token, inverse=ids_restore, weight=weight, bias=bias
    )
    visible_rows = iter(visible)
    for n, masked in enumerate(is_masked):
        expected = (mask_token if masked else next(visible_rows)) + table[token[n]]
        assert torch.equal(out[n], expected)
        assert_rounding(normed[n : n + 1], loop_layer_norm(expected[None], weight, bias))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pattern", ["1001101", "0000", "1111", "0", "1", "0111", "1110"])
def test_scatter_tokens_mask_patterns_pass_gradcheck(module: ModuleType, pattern: str, norm: bool) -> None:
    is_masked = torch.tensor([c == "1" for c in pattern])
    visible = normal(int((~is_masked).sum()), 5, grad=True)
    mask_token, table = normal(5, seed=1, grad=True), normal(len(pattern), 5, seed=2, grad=True)
    affine = (normal(5, seed=3, grad=True), normal(5, seed=4, grad=True)) if norm else (None, None)
    token, ids_restore = torch.arange(len(pattern)), ids_restore_of(is_masked)

    def scatter(visible: Tensor, mask_token: Tensor, table: Tensor, *affine: Tensor | None) -> Tensor:
        weight, bias = affine
        return module.scatter_tokens(
            visible, mask_token, table, token=token, inverse=ids_restore, weight=weight, bias=bias
        )

    assert gradcheck(scatter, (visible, mask_token, table, *affine))


# --------------------------------------------------------------------------------------------------------- row maths


def loop_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed_rows = []
    for row in x.double():
        mean = sum(row.tolist()) / len(row)
        variance = sum((value - mean) ** 2 for value in row.tolist()) / len(row)
        normed_rows.append((row - mean) / math.sqrt(variance + 1e-5) * weight.double() + bias.double())
    return torch.stack(normed_rows)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_any_offset_equals_loop(module: ModuleType, offset: float) -> None:
    x, branch = normal(4, 6) + offset, normal(4, 6, seed=1)
    weight, bias = normal(6, seed=2), normal(6, seed=3)
    assert_rounding(reference.layer_norm(x, weight, bias), loop_layer_norm(x, weight, bias))
    assert_rounding(module.add_layer_norm(branch, x, weight, bias), loop_layer_norm(x + branch, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_half_precision_rows_use_fp32_statistics(dtype: torch.dtype) -> None:
    x, weight, bias = (normal(5, 64) * 0.5 + 30).to(dtype), normal(64, seed=1).to(dtype), normal(64, seed=2).to(dtype)
    out = reference.layer_norm(x, weight, bias)
    assert out.dtype == dtype
    assert torch.equal(out, reference.layer_norm(x.float(), weight.float(), bias.float()).to(dtype))


def test_add_layer_norm_all_inputs_pass_gradcheck(module: ModuleType) -> None:
    inputs = [
        normal(3, 4, grad=True),
        normal(3, 4, seed=1, grad=True),
        normal(4, seed=2, grad=True),
        normal(4, seed=3, grad=True),
    ]
    assert gradcheck(module.add_layer_norm, inputs)


def test_bias_gelu_values_equal_erf_formula(module: ModuleType) -> None:
    x, bias = normal(4, 5) * 3, normal(5, seed=1)
    expected = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in (x + bias).tolist()]
    assert_rounding(module.bias_gelu(x, bias), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(module.bias_gelu, [normal(3, 4, grad=True), normal(4, seed=1, grad=True)])


def test_add_layer_norm_dropout_keeps_residual_and_scales_kept(module: ModuleType) -> None:
    dropped_by = F.dropout if module is reference else drop
    branch, residual = torch.ones(400, 50), normal(400, 50, dtype=torch.float32)
    weight, bias = torch.ones(50), torch.zeros(50)
    torch.manual_seed(0)
    out = module.add_layer_norm(branch, residual, weight, bias, dropout=0.25)
    torch.manual_seed(0)
    dropped = dropped_by(branch, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert torch.equal(out, reference.layer_norm(residual + dropped, weight, bias))
    torch.manual_seed(0)
    gelu = module.bias_gelu(branch, bias, dropout=0.25)
    assert torch.equal(gelu, dropped * F.gelu(torch.ones(())))


# ------------------------------------------------------------------------------------------------------------ losses


def test_masked_mse_plain_targets_equal_loop() -> None:
    prediction, target = normal(4, 6), normal(4, 6, seed=1)
    expected = [
        sum((p - t) ** 2 for p, t in zip(a, b, strict=True)) / 6
        for a, b in zip(prediction.tolist(), target.tolist(), strict=True)
    ]
    assert_rounding(reference.masked_mse(prediction, target), torch.tensor(expected, dtype=torch.float64))


def test_masked_mse_norm_pix_loss_equals_loop() -> None:
    prediction, target = normal(4, 6), normal(4, 6, seed=1) * 5 + 2
    expected = []
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        mean = sum(t) / 6
        variance = sum((v - mean) ** 2 for v in t) / 5  # unbiased, as the public MAE code
        expected.append(sum((a - (v - mean) / math.sqrt(variance + 1e-6)) ** 2 for a, v in zip(p, t, strict=True)) / 6)
    assert_rounding(
        reference.masked_mse(prediction, target, norm_pix_loss=True), torch.tensor(expected, dtype=torch.float64)
    )


def test_masked_mse_norm_pix_loss_constant_patch_is_finite() -> None:
    prediction = normal(2, 6, grad=True)
    loss = reference.masked_mse(prediction, torch.full((2, 6), -15.9424, dtype=torch.float64), norm_pix_loss=True)
    assert_rounding(loss, prediction.square().mean(1))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_masked_mse_both_inputs_pass_gradcheck(norm_pix_loss: bool) -> None:
    inputs = [normal(3, 4, grad=True), normal(3, 4, seed=1, grad=True)]
    assert gradcheck(lambda p, t: reference.masked_mse(p, t, norm_pix_loss), inputs)


def loop_info_nce(prediction: Tensor, target: Tensor, counts: list[int]) -> tuple[list[float], list[bool]]:
    """For each row: -log softmax over the targets of its clip, and whether the product with its own is the largest."""
    losses, hits, first = [], [], 0
    for count in counts:
        for i in range(first, first + count):
            products = [
                sum(p * t for p, t in zip(prediction[i].tolist(), target[j].tolist(), strict=True))
                for j in range(first, first + count)
            ]
            top = max(products)
            losses.append(top + math.log(sum(math.exp(x - top) for x in products)) - products[i - first])
            hits.append(products.index(top) == i - first)
        first += count
    return losses, hits


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_info_nce_any_lengths_equal_loop(module: ModuleType, counts: list[int], scale: float) -> None:
    prediction, target = normal(sum(counts), 3) * scale, normal(sum(counts), 3, seed=1)
    loss, hit = info_nce(module, prediction, target, counts)
    losses, hits = loop_info_nce(prediction, target, counts)
    # A loss near 0 is a difference of products and has their rounding error.
    size = max(1.0, (prediction @ target.T).abs().max().item())
    assert_rounding(loss + size, torch.tensor(losses, dtype=torch.float64) + size)
    assert hit.dtype == torch.bool
    if scale:  # with equal products the winner is undefined
        assert hit.tolist() == hits


@pytest.mark.parametrize("counts", COUNTS)
def test_info_nce_any_lengths_pass_gradcheck(module: ModuleType, counts: list[int]) -> None:
    inputs = [normal(sum(counts), 3, grad=True), normal(sum(counts), 3, seed=1, grad=True)]
    assert gradcheck(lambda p, t: info_nce(module, p, t, counts)[0], inputs)


def test_info_nce_by_default_normalises_over_targets(module: ModuleType) -> None:
    prediction = torch.tensor([[1.0], [2.0]])
    target = torch.tensor([[1.0], [3.0]])
    loss, _ = info_nce(module, prediction, target, [2])
    assert_rounding(loss, torch.tensor([math.log(1 + math.exp(2.0)), math.log(1 + math.exp(-4.0))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_half_precision_rows_are_computed_in_fp32(module: ModuleType, dtype: torch.dtype) -> None:
    counts = [4, 1, 7]
    prediction, target = (normal(12, 16) * 40).to(dtype), (normal(12, 16, seed=1) * 40).to(dtype)  # products > 65504
    loss, hit = info_nce(module, prediction, target, counts)
    expected, expected_hit = info_nce(module, prediction.float(), target.float(), counts)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and torch.equal(hit, expected_hit)
    mse = reference.masked_mse(prediction, target)
    assert mse.dtype == torch.float32 and torch.equal(mse, reference.masked_mse(prediction.float(), target.float()))


def test_info_nce_broken_clip_does_not_change_other_clips(module: ModuleType) -> None:
    prediction, target = normal(7, 3, dtype=torch.float32), normal(7, 3, seed=1, dtype=torch.float32)
    prediction[:4], target[:4] = float("nan"), float("inf")
    loss, hit = info_nce(module, prediction, target, [4, 3])
    alone, alone_hit = info_nce(module, prediction[4:], target[4:], [3])
    assert_rounding(loss[4:], alone)
    assert torch.equal(hit[4:], alone_hit)


# --------------------------------------------------------------------------------------------------------- attention


def loop_attention(qkv: Tensor, counts: list[int]) -> Tensor:
    """Softmax attention row by row, head by head."""
    out, first = torch.zeros_like(qkv[:, 0]), 0
    for count in counts:
        clip = slice(first, first + count)
        for i in range(first, first + count):
            for h in range(qkv.shape[2]):
                scores = qkv[clip, 1, h] @ qkv[i, 0, h] / math.sqrt(qkv.shape[3])
                weights = (scores - scores.max()).exp()
                out[i, h] = (weights / weights.sum()) @ qkv[clip, 2, h]
        first += count
    return out


@pytest.mark.parametrize("counts", COUNTS)
def test_attention_any_lengths_equal_loop(module: ModuleType, counts: list[int]) -> None:
    qkv = normal(sum(counts), 3, 2, 4) * 2
    assert_rounding(attention(module, qkv, counts), loop_attention(qkv, counts))


@pytest.mark.parametrize("counts", COUNTS)
def test_attention_any_lengths_pass_gradcheck(module: ModuleType, counts: list[int]) -> None:
    assert gradcheck(lambda qkv: attention(module, qkv, counts), [normal(sum(counts), 3, 1, 2, grad=True)])


def test_attention_dropout_applies_to_probabilities(module: ModuleType) -> None:
    """With values of 1, a row's output is the scaled sum of its kept probabilities: 1 on average, not in each row."""
    qkv = torch.zeros(600, 3, 2, 1)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = attention(module, qkv, [200, 400], dropout=0.5)
    kept = out[:200, :, 0] * 200 * 0.5  # uniform probabilities 1 / 200, doubled where kept
    assert_rounding(kept, kept.round())
    assert kept.std(0).min() > 1  # of every head: each row keeps its own keys
    torch.manual_seed(0)
    assert torch.equal(out, attention(module, qkv, [200, 400], dropout=0.5))
    without = attention(module, qkv, [200, 400], dropout=0.0)
    assert torch.equal(attention(module, qkv, [200, 400]), without)


def test_reference_rows_past_last_clip_are_zero_and_get_no_gradient() -> None:
    cu_seqlens = cumulative(torch.tensor([3, 0, 2]))
    qkv, prediction, target = normal(8, 3, 1, 2), normal(8, 3, seed=1), normal(8, 3, seed=2)
    for x in (qkv, prediction, target):
        x[5:] = float("nan")
        x.requires_grad_()
    loss, hit = reference.info_nce(prediction, target, cu_seqlens)
    out = reference.attention(qkv, cu_seqlens)
    assert loss[:5].all() and out[:5].all() and not loss[5:].any() and not hit[5:].any() and not out[5:].any()
    (loss.sum() + out.sum()).backward()
    for x in (qkv, prediction, target):
        assert x.grad[:5].isfinite().all() and x.grad[:5].any() and not x.grad[5:].any()


# ------------------------------------------------------------------------------------------------------ feed-forward


FEED_FORWARD = {
    "reference": reference.feed_forward,
    "eager": eager.feed_forward,
    "eager recompute": partial(eager.feed_forward, recompute=True),
}


@pytest.mark.parametrize("feed_forward", FEED_FORWARD.values(), ids=FEED_FORWARD.keys())
def test_feed_forward_values_equal_loop(feed_forward: Callable[..., Tensor]) -> None:
    x, w1, b1, w2 = normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2), normal(2, 5, seed=3)
    for row, out in zip(x, feed_forward(x, w1, b1, w2), strict=True):
        z = [sum(float(v) * float(w) for v, w in zip(row, weight, strict=True)) for weight in w1]
        z = [value + float(bias) for value, bias in zip(z, b1, strict=True)]
        a = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z]
        expected = [sum(v * float(w) for v, w in zip(a, weight, strict=True)) for weight in w2]
        assert_rounding(out, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("feed_forward", FEED_FORWARD.values(), ids=FEED_FORWARD.keys())
def test_feed_forward_all_inputs_pass_gradcheck(feed_forward: Callable[..., Tensor]) -> None:
    inputs = [normal(*shape, seed=seed, grad=True) for seed, shape in enumerate(((3, 4), (5, 4), (5,), (2, 5)))]
    assert gradcheck(feed_forward, inputs)
