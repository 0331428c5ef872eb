"""reference.py, the specification: every operation against plain loops or formulas, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from policy import STANDARD_ERRORS, assert_rounding
from torch.autograd import gradcheck

from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.packing import Packing, cumulative, real_tokens
from mae_ast_fast.ops.reference import PaddedView

# Rows of each clip: equal, ragged, with empty clips at either end and between, single rows, one clip.
COUNTS = [[3, 3, 3], [1, 4, 2], [0, 3, 0, 2], [2, 0], [1, 1, 1], [5], [0, 1]]


def cu_of(counts: list[int]) -> tuple[torch.Tensor, int]:
    return cumulative(torch.tensor(counts)), max(counts)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


# ------------------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(("frames", "bins", "patch"), [(8, 6, (4, 3)), (11, 6, (4, 2)), (5, 4, (2, 4)), (3, 2, (1, 1))])
def test_patchify_is_time_major_and_drops_the_tail(frames: int, bins: int, patch: tuple[int, int]) -> None:
    kt, kf = patch
    x = torch.arange(2 * frames * bins).view(2, frames, bins)
    grid_t, grid_f = frames // kt, bins // kf
    patches = reference.patchify(x, patch)
    assert patches.shape == (2, grid_t * grid_f, kt * kf)
    for clip in range(2):
        for t in range(grid_t * kt):
            for f in range(bins):
                token, place = t // kt * grid_f + f // kf, t % kt * kf + f % kf
                assert patches[clip, token, place] == x[clip, t, f]
    assert torch.equal(reference.unpatchify(patches, patch, bins), x[:, : grid_t * kt])


def test_patchify_of_non_contiguous_features() -> None:
    x = normal(2, 6, 9).transpose(1, 2)[:, 1:]
    assert torch.equal(reference.patchify(x, (4, 3)), reference.patchify(x.contiguous(), (4, 3)))


def test_packing_lists_the_selected_places_clip_by_clip() -> None:
    selected = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    rows = Packing.of(selected)
    assert rows.clip.tolist() == [0, 0, 2, 2]
    assert rows.token.tolist() == [1, 2, 0, 3]
    assert rows.cu_seqlens.tolist() == [0, 2, 2, 4] and rows.cu_seqlens.dtype == torch.int32
    assert rows.counts.tolist() == [2, 0, 2] and rows.max_seqlen == 2
    empty = Packing.of(torch.zeros(2, 0, dtype=torch.bool))
    assert empty.cu_seqlens.tolist() == [0, 0, 0] and empty.max_seqlen == 0 and empty.clip.numel() == 0


def test_real_tokens() -> None:
    assert real_tokens(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_sinusoid_against_its_formula() -> None:
    table = sinusoid(50, 6)
    assert table.dtype == torch.float32 and table.shape == (50, 6)
    expected = torch.empty(50, 6, dtype=torch.float64)
    for position in range(50):
        for i in range(3):
            angle = position * math.exp(2 * i * -math.log(10000.0) / 6)
            expected[position, 2 * i], expected[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    # An angle is rounded to fp32 before its sine is taken, here and in the paper's code: half a unit at 32 to 64.
    assert (table.double() - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps
    assert torch.equal(sinusoid(3000, 6)[:50], table)


def test_gather_patches_takes_the_rows_normalised() -> None:
    x = normal(2, 9, 4)
    selected = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    packed = Packing.of(selected)
    rows = reference.gather_patches(x, torch.tensor(0.3), torch.tensor(1.7), packed.clip, packed.token, (2, 2))
    expected = []
    for clip, token in [(0, 0), (0, 3), (0, 6), (0, 7), (1, 5)]:
        t, f = token // 2 * 2, token % 2 * 2
        expected.append([(x[clip, t + i, f + j] - 0.3) * 1.7 for i in range(2) for j in range(2)])
    assert_rounding(rows, torch.tensor(expected, dtype=torch.float64))


def inverse_of(is_masked: torch.Tensor) -> torch.Tensor:
    return torch.where(is_masked, -1, (~is_masked).cumsum(0) - 1)


def test_scatter_tokens_against_a_loop() -> None:
    is_masked = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    visible, mask_token, table = normal(3, 2), normal(2, seed=1), normal(5, 2, seed=2)
    token, weight, bias = torch.tensor([0, 1, 2, 3, 0, 1, 4]), normal(2, seed=3), normal(2, seed=4)
    place = mask_token, table, token, inverse_of(is_masked)
    out = reference.scatter_tokens(visible, *place)
    normed = reference.scatter_tokens(visible, *place, weight, bias)
    rows = iter(visible)
    for n, masked in enumerate(is_masked):
        expected = (mask_token if masked else next(rows)) + table[token[n]]
        assert torch.equal(out[n], expected)
        assert_rounding(normed[n : n + 1], loop_layer_norm(expected[None], weight, bias))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pattern", ["1001101", "0000", "1111", "0", "1", "0111", "1110"])
def test_scatter_tokens_gradients(pattern: str, norm: bool) -> None:
    is_masked = torch.tensor([c == "1" for c in pattern])
    visible = normal(int((~is_masked).sum()), 5, grad=True)
    mask_token, table = normal(5, seed=1, grad=True), normal(len(pattern), 5, seed=2, grad=True)
    affine = (normal(5, seed=3, grad=True), normal(5, seed=4, grad=True)) if norm else ()
    index = torch.arange(len(pattern)), inverse_of(is_masked)
    inputs = (visible, mask_token, table, *affine)
    assert gradcheck(lambda v, m, t, *a: reference.scatter_tokens(v, m, t, *index, *a), inputs)


# --------------------------------------------------------------------------------------------------------- row maths


def loop_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x.double():
        mean = sum(row.tolist()) / len(row)
        variance = sum((value - mean) ** 2 for value in row.tolist()) / len(row)
        rows.append((row - mean) / math.sqrt(variance + 1e-5) * weight.double() + bias.double())
    return torch.stack(rows)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_and_add_layer_norm_against_a_loop(offset: float) -> None:
    x, branch = normal(4, 6) + offset, normal(4, 6, seed=1)
    weight, bias = normal(6, seed=2), normal(6, seed=3)
    assert_rounding(reference.layer_norm(x, weight, bias), loop_layer_norm(x, weight, bias))
    assert_rounding(reference.add_layer_norm(branch, x, weight, bias), loop_layer_norm(x + branch, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_low_precision_rows_has_fp32_statistics(dtype: torch.dtype) -> None:
    x, weight, bias = (normal(5, 64) * 0.5 + 30).to(dtype), normal(64, seed=1).to(dtype), normal(64, seed=2).to(dtype)
    out = reference.layer_norm(x, weight, bias)
    assert out.dtype == dtype
    assert torch.equal(out, reference.layer_norm(x.float(), weight.float(), bias.float()).to(dtype))


def test_add_layer_norm_gradients() -> None:
    inputs = [
        normal(3, 4, grad=True),
        normal(3, 4, seed=1, grad=True),
        normal(4, seed=2, grad=True),
        normal(4, seed=3, grad=True),
    ]
    assert gradcheck(reference.add_layer_norm, inputs)


def test_bias_gelu_is_the_exact_one() -> None:
    x, bias = normal(4, 5) * 3, normal(5, seed=1)
    expected = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in (x + bias).tolist()]
    assert_rounding(reference.bias_gelu(x, bias), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(reference.bias_gelu, [normal(3, 4, grad=True), normal(4, seed=1, grad=True)])


def test_dropout_of_a_branch_leaves_the_residual_and_scales_what_stays() -> None:
    branch, residual = torch.ones(400, 50), normal(400, 50, dtype=torch.float32)
    weight, bias = torch.ones(50), torch.zeros(50)
    torch.manual_seed(0)
    out = reference.add_layer_norm(branch, residual, weight, bias, dropout=0.25)
    torch.manual_seed(0)
    dropped = reference.drop(branch, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert torch.equal(out, reference.layer_norm(residual + dropped, weight, bias))
    torch.manual_seed(0)
    gelu = reference.bias_gelu(branch, bias, dropout=0.25)
    assert torch.equal(gelu, dropped * torch.nn.functional.gelu(torch.ones(())))


# ------------------------------------------------------------------------------------------------------------ losses


def test_masked_mse_against_a_loop() -> None:
    prediction, target = normal(4, 6), normal(4, 6, seed=1)
    expected = [
        sum((p - t) ** 2 for p, t in zip(a, b, strict=True)) / 6
        for a, b in zip(prediction.tolist(), target.tolist(), strict=True)
    ]
    assert_rounding(reference.masked_mse(prediction, target), torch.tensor(expected, dtype=torch.float64))


def test_masked_mse_of_normalised_patches_against_a_loop() -> None:
    prediction, target = normal(4, 6), normal(4, 6, seed=1) * 5 + 2
    expected = []
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        mean = sum(t) / 6
        variance = sum((v - mean) ** 2 for v in t) / 5  # unbiased, as the public MAE code
        expected.append(sum((a - (v - mean) / math.sqrt(variance + 1e-6)) ** 2 for a, v in zip(p, t, strict=True)) / 6)
    assert_rounding(
        reference.masked_mse(prediction, target, norm_pix_loss=True), torch.tensor(expected, dtype=torch.float64)
    )


def test_masked_mse_of_a_constant_patch_is_finite_with_norm_pix() -> None:
    prediction = normal(2, 6, grad=True)
    loss = reference.masked_mse(prediction, torch.full((2, 6), -15.9424, dtype=torch.float64), norm_pix_loss=True)
    assert_rounding(loss, prediction.square().mean(1))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_masked_mse_gradients(norm_pix_loss: bool) -> None:
    inputs = [normal(3, 4, grad=True), normal(3, 4, seed=1, grad=True)]
    assert gradcheck(lambda p, t: reference.masked_mse(p, t, norm_pix_loss), inputs)


def loop_info_nce(prediction: torch.Tensor, target: torch.Tensor, counts: list[int]) -> tuple[list[float], list[bool]]:
    """Rows of -log softmax over the targets of the row's own clip, and whether its own product is the largest."""
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
def test_info_nce_against_a_loop(counts: list[int], scale: float) -> None:
    prediction, target = normal(sum(counts), 3) * scale, normal(sum(counts), 3, seed=1)
    loss, hit = reference.info_nce(prediction, target, *cu_of(counts))
    losses, hits = loop_info_nce(prediction, target, counts)
    # A loss near 0 is a difference of products: its rounding error is theirs.
    size = max(1.0, (prediction @ target.T).abs().max().item())
    assert_rounding(loss + size, torch.tensor(losses, dtype=torch.float64) + size)
    assert hit.dtype == torch.bool
    if scale:  # equal products leave the winner open
        assert hit.tolist() == hits


@pytest.mark.parametrize("counts", COUNTS)
def test_info_nce_gradients(counts: list[int]) -> None:
    inputs = [normal(sum(counts), 3, grad=True), normal(sum(counts), 3, seed=1, grad=True)]
    assert gradcheck(lambda p, t: reference.info_nce(p, t, *cu_of(counts))[0], inputs)


def test_info_nce_normalises_over_targets_not_predictions() -> None:
    prediction = torch.tensor([[1.0], [2.0]])
    target = torch.tensor([[1.0], [3.0]])
    loss, _ = reference.info_nce(prediction, target, *cu_of([2]))
    assert_rounding(loss, torch.tensor([math.log(1 + math.exp(2.0)), math.log(1 + math.exp(-4.0))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_low_precision_rows_are_computed_in_fp32(dtype: torch.dtype) -> None:
    counts = [4, 1, 7]
    prediction, target = (normal(12, 16) * 40).to(dtype), (normal(12, 16, seed=1) * 40).to(dtype)  # products > 65504
    loss, hit = reference.info_nce(prediction, target, *cu_of(counts))
    expected, expected_hit = reference.info_nce(prediction.float(), target.float(), *cu_of(counts))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and torch.equal(hit, expected_hit)
    mse = reference.masked_mse(prediction, target)
    assert mse.dtype == torch.float32 and torch.equal(mse, reference.masked_mse(prediction.float(), target.float()))


def test_a_clip_of_the_batch_does_not_change_anothers_loss() -> None:
    prediction, target = normal(7, 3, dtype=torch.float32), normal(7, 3, seed=1, dtype=torch.float32)
    prediction[:4], target[:4] = float("nan"), float("inf")
    loss, hit = reference.info_nce(prediction, target, *cu_of([4, 3]))
    alone, alone_hit = reference.info_nce(prediction[4:], target[4:], *cu_of([3]))
    assert_rounding(loss[4:], alone)
    assert torch.equal(hit[4:], alone_hit)


# --------------------------------------------------------------------------------------------------------- attention


def loop_attention(qkv: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Softmax attention row by row, head by head."""
    out, first = torch.zeros_like(qkv[:, 0]), 0
    for count in counts:
        own = slice(first, first + count)
        for i in range(first, first + count):
            for h in range(qkv.shape[2]):
                scores = qkv[own, 1, h] @ qkv[i, 0, h] / math.sqrt(qkv.shape[3])
                weights = (scores - scores.max()).exp()
                out[i, h] = (weights / weights.sum()) @ qkv[own, 2, h]
        first += count
    return out


@pytest.mark.parametrize("counts", COUNTS)
def test_attention_against_a_loop(counts: list[int]) -> None:
    qkv = normal(sum(counts), 3, 2, 4) * 2
    assert_rounding(reference.attention(qkv, *cu_of(counts)), loop_attention(qkv, counts))


@pytest.mark.parametrize("counts", COUNTS)
def test_attention_gradients(counts: list[int]) -> None:
    assert gradcheck(lambda x: reference.attention(x, *cu_of(counts)), [normal(sum(counts), 3, 1, 2, grad=True)])


def test_attention_dropout_is_on_the_probabilities() -> None:
    """With values 1 a row's output is the sum of its kept probabilities, scaled: 1 on average, not 1 in each row."""
    qkv = torch.zeros(600, 3, 2, 1)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = reference.attention(qkv, *cu_of([200, 400]), dropout=0.5)
    kept = out[:200, :, 0] * 200 * 0.5  # uniform probabilities 1 / 200, doubled where kept
    assert_rounding(kept, kept.round())
    assert kept.std(0).min() > 1  # of every head: each row keeps its own keys
    torch.manual_seed(0)
    assert torch.equal(out, reference.attention(qkv, *cu_of([200, 400]), dropout=0.5))
    assert torch.equal(reference.attention(qkv, *cu_of([200, 400])), reference.attention(qkv, *cu_of([200, 400]), 0.0))


# ------------------------------------------------------------------------------------------------------- padded rows


@pytest.mark.parametrize("counts", COUNTS)
def test_padded_view_there_and_back(counts: list[int]) -> None:
    cu, longest = cu_of(counts)
    x = normal(sum(counts), 2, 3)
    pad = PaddedView(cu, longest, len(x))
    padded = pad.pad(x)
    assert padded.shape == (len(counts), longest, 2, 3)
    first = 0
    for clip, count in enumerate(counts):
        assert torch.equal(padded[clip, :count], x[first : first + count])
        assert not padded[clip, count:].any()
        assert pad.valid[clip].tolist() == [place < count for place in range(longest)]
        assert pad.key_valid[clip].tolist() == [place < max(count, 1) for place in range(longest)]
        first += count
    assert torch.equal(pad.unpad(padded), x)
    places = pad.unpad(torch.arange(longest))
    assert places.tolist() == [place for count in counts for place in range(count)]


# ------------------------------------------------------------------------------------------------------ feed-forward


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_against_a_loop(recompute: bool) -> None:
    x, w1, b1, w2 = normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2), normal(2, 5, seed=3)
    for row, found in zip(x, reference.feed_forward(x, w1, b1, w2, recompute=recompute), strict=True):
        z = [sum(float(v) * float(w) for v, w in zip(row, weight, strict=True)) for weight in w1]
        z = [value + float(bias) for value, bias in zip(z, b1, strict=True)]
        a = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z]
        expected = [sum(v * float(w) for v, w in zip(a, weight, strict=True)) for weight in w2]
        assert_rounding(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_gradients(recompute: bool) -> None:
    inputs = [normal(*shape, seed=seed, grad=True) for seed, shape in enumerate(((3, 4), (5, 4), (5,), (2, 5)))]
    assert gradcheck(lambda *tensors: reference.feed_forward(*tensors, recompute=recompute), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_feed_forward_recomputed_is_equal_to_the_bit_with_fp32_weights(dtype: torch.dtype) -> None:
    shapes = (33, 24), (50, 24), (50,), (24, 50)
    results = []
    for recompute in (False, True):
        x, *weights = (normal(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes))
        inputs = [tensor.requires_grad_() for tensor in (x.to(dtype), *weights)]
        y = reference.feed_forward(*inputs, recompute=recompute)
        gradients = torch.autograd.grad(y, inputs, normal(33, 24, dtype=dtype, seed=9))
        assert [g.dtype for g in gradients] == [dtype, *[torch.float32] * 3] and y.dtype == dtype
        results.append((y, *gradients))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_keeps_its_share_evenly_and_scales_by_it(dtype: torch.dtype, rate: float) -> None:
    """Every fourth element of its own too: 16 bits of a 64-bit word decide each."""
    torch.manual_seed(0)
    x = torch.ones(4001, 31, dtype=dtype, requires_grad=True)
    out = reference.drop(x, rate)
    kept = out != 0
    scale = torch.tensor(65536 / (65536 - round(rate * 65536)), dtype=dtype)
    assert out.unique().tolist() == [0.0, scale.item()]
    for part in range(4):
        found = kept.flatten()[part::4].double().mean()
        assert abs(found - (1 - rate)) < STANDARD_ERRORS * (rate * (1 - rate) / (kept.numel() / 4)) ** 0.5
    out.sum().backward()
    assert torch.equal(x.grad != 0, kept) and torch.equal(x.grad[kept], out[kept])
    torch.manual_seed(0)
    assert torch.equal(reference.drop(x, rate), out)
    assert reference.drop(x, 0.0) is x


def test_draw_kept_keeps_from_the_threshold_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 65536 words as many as the rate rounds to are dropped, not one more or less."""
    words = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_: self.copy_(words))
    for rate in (0.1, 0.5, 1 / 65536, 0.99999):
        kept, scale = reference.draw_kept(torch.Size((256, 256)), rate)
        dropped = 65536 - int(kept.sum())
        assert dropped == min(round(rate * 65536), 65535) and scale == 65536 / (65536 - dropped)
