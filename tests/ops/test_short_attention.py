"""What only short_attention has, such as dropout against loops over clips and heads; test_ops.py has the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DTYPES,
    compare,
    cu_seqlens,
    inputs,
    keep_mask,
    kept_scale,
    randn,
    results_and_gradients,
    seed_tensor,
)
from policy import STANDARD_ERRORS
from torch import Tensor

from mae_ast_fast import ops
from mae_ast_fast.ops import eager, reference
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["short_attention"]
SEED = 0x1234_5678_9ABC_DEF1
DROPOUT_SITE = 7
META = torch.empty(4, 3, 2, 8, device="meta")  # a shape without values


def make_qkv(clip_rows: Sequence[int], heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, Dh)."""
    return inputs(CASE, (clip_rows, heads, width), dtype)["qkv"]


def kernel(clip_rows: Sequence[int], dropout: float = 0.0, max_seqlen: int | None = None) -> Callable[..., Tensor]:
    longest = max_seqlen or max(clip_rows, default=0)
    options = {"dropout": dropout, "seed": seed_tensor(SEED), "site": DROPOUT_SITE}

    def call(qkv: Tensor) -> Tensor:
        return ops.short_attention(qkv, cu_seqlens(clip_rows), longest, **options, impl="triton")

    return call


def looped(clip_rows: Sequence[int], dropout: float) -> Callable[..., Tensor]:
    """The definition, one clip and head at a time, with the masks that the kernel must draw."""

    def call(qkv: Tensor) -> Tensor:
        rows, _, heads, width = qkv.shape
        outputs, start = [], 0
        for num_rows in clip_rows:
            clip = slice(start, start + num_rows)
            head_outputs = []
            for head in range(heads):
                q, k, v = qkv[clip, :, head].unbind(1)
                logits = (q @ k.T) * width**-0.5
                weights = logits.to(torch.promote_types(qkv.dtype, torch.float32)).softmax(1)
                mask = keep_mask(SEED, rows, max(clip_rows), dropout_site=DROPOUT_SITE, dropout=dropout, head=head)
                keep = mask[clip, :num_rows]
                head_outputs.append((weights * keep * kept_scale(dropout)).to(qkv.dtype) @ v)
            outputs.append(torch.stack(head_outputs, 1))
            start += num_rows
        return torch.cat(outputs)

    return call


def check(qkv: Tensor, clip_rows: Sequence[int], dropout: float = 0.0, max_seqlen: int | None = None) -> None:
    expected = looped(clip_rows, dropout) if dropout else partial(reference.attention, cu_seqlens=cu_seqlens(clip_rows))
    compare(kernel(clip_rows, dropout, max_seqlen), expected, {"qkv": qkv}, ("qkv",), dtype=qkv.dtype, dot=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("clip_rows", "heads", "width"), [([1], 2, 16), ([3, 0, 33, 1], 2, 20), ([128, 5], 1, 64), ([40, 64], 2, 64)]
)
def test_short_attention_dropout_matches_loop_with_drawn_mask(
    clip_rows: list[int], heads: int, width: int, dtype: torch.dtype
) -> None:
    """Outputs and gradients equal those of explicit probabilities under the mask drawn from the counters."""
    check(make_qkv(clip_rows, heads, width, dtype), clip_rows, dropout=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_attention_large_logits_match_reference(dtype: torch.dtype) -> None:
    """Logits of up to 40, where half precision is off by 0.01 and exponentials need the maximum subtracted."""
    qkv = make_qkv([40], 1, 64, dtype)
    qkv[:, :2] *= 3
    check(qkv, [40])


@settings(max_examples=10, deadline=None)
@given(
    clip_rows=st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
    pad=st.integers(0, 3),
    slack=st.integers(0, 20),
    dropout=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(DTYPES),
)
def test_short_attention_any_clips_sizes_and_row_stride_match_reference(
    *, clip_rows: list[int], heads: int, width: int, pad: int, slack: int, dropout: float, dtype: torch.dtype
) -> None:
    flat = torch.nn.functional.pad(make_qkv(clip_rows, heads, width, dtype).flatten(1), (0, pad), value=float("nan"))
    qkv = flat[:, : 3 * heads * width].unflatten(1, (3, heads, width))
    check(qkv, clip_rows, dropout, max(clip_rows) + slack)


def test_short_attention_strided_rows_and_gradients_match_reference() -> None:
    """Heads before q, k, v; incoming gradients that are one expanded value, or rows with gaps between them."""
    clip_rows = [9, 20]
    qkv = make_qkv(clip_rows, 2, 8, torch.float32)
    check(qkv.transpose(1, 2).contiguous().transpose(1, 2), clip_rows)
    leaf = qkv.requires_grad_()
    out = kernel(clip_rows)(leaf)
    gaps = torch.nn.functional.pad(randn(29, 16), (0, 3))[:, :16].unflatten(1, (2, 8))
    for incoming in (torch.ones((), device=DEVICE).expand(out.shape), gaps):
        (gradient,) = torch.autograd.grad(out, leaf, incoming, retain_graph=True)
        (dense_gradient,) = torch.autograd.grad(out, leaf, incoming.contiguous(), retain_graph=True)
        assert torch.equal(gradient, dense_gradient)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_short_attention_clips_are_independent() -> None:
    clip_rows = [20, 18, 30]
    qkv = make_qkv(clip_rows, 2, 16, torch.float32)
    expected = results_and_gradients(kernel(clip_rows, 0.3), {"qkv": qkv}, ("qkv",))
    qkv = qkv.clone()
    qkv[20:38] = float("nan")
    for name, x in results_and_gradients(kernel(clip_rows, 0.3), {"qkv": qkv}, ("qkv",)).items():
        assert torch.equal(x[:20], expected[name][:20]) and torch.equal(x[38:], expected[name][38:]), name


def drawn_mask(
    clip_rows: Sequence[int], heads: int, dropout: float, seed: Tensor | None, *, dropout_site: int = DROPOUT_SITE
) -> list[Tensor]:
    """The keep mask (H, rows, rows) of each clip, read from the output: the values are unit vectors, one per key."""
    width = max(clip_rows)
    qkv = torch.zeros(sum(clip_rows), 3, heads, width, device=DEVICE)
    qkv[:, 2] = torch.cat([torch.eye(num_rows, width) for num_rows in clip_rows])[:, None].to(DEVICE)
    o = ops.short_attention(
        qkv, cu_seqlens(clip_rows), width, dropout=dropout, seed=seed, site=dropout_site, impl="triton"
    )
    clip_outputs = o.split(list(clip_rows))
    return [x[:, :, :num_rows].transpose(0, 1) != 0 for x, num_rows in zip(clip_outputs, clip_rows, strict=True)]


def test_short_attention_mask_is_as_documented() -> None:
    """Row = packed row of the query, head = head, column = index of the key in its clip, for every clip and head."""
    clip_rows, heads = [37, 1, 70], 2
    masks, start = drawn_mask(clip_rows, heads, 0.3, seed_tensor(SEED)), 0
    for num_rows, mask in zip(clip_rows, masks, strict=True):
        for head in range(heads):
            all_rows = keep_mask(SEED, sum(clip_rows), num_rows, dropout_site=DROPOUT_SITE, dropout=0.3, head=head)
            assert torch.equal(mask[head], all_rows[start : start + num_rows])
        start += num_rows


def test_short_attention_dropout_keeps_rate_and_differs_by_site_seed_and_head() -> None:
    clip_rows, dropout = [64, 64], 0.25

    def kept(seed: Tensor | None, dropout_site: int) -> Tensor:
        masks = drawn_mask(clip_rows, 2, dropout, seed, dropout_site=dropout_site)
        return torch.stack(masks, 1)  # (H, clip, 64, 64)

    first = kept(seed_tensor(1), 1)
    rate, differ = 1 - dropout, 2 * dropout * (1 - dropout)  # rate of difference of two independent masks
    assert abs(first.double().mean().item() - rate) <= STANDARD_ERRORS * (rate * dropout / first.numel()) ** 0.5
    pairs = [(first[0], first[1]), (first[:, 0], first[:, 1])]
    pairs += [(first, kept(seed_tensor(seed), dropout_site)) for seed, dropout_site in ((2, 1), (1 + 2**32, 1), (1, 2))]
    for mask, other in pairs:
        share = (mask != other).double().mean().item()
        assert abs(share - differ) <= STANDARD_ERRORS * (differ * (1 - differ) / mask.numel()) ** 0.5
    torch.manual_seed(0)
    drawn = kept(None, 1)
    assert not torch.equal(drawn, kept(None, 1))
    torch.manual_seed(0)
    assert torch.equal(drawn, kept(None, 1))


def test_short_attention_strided_cu_seqlens_and_padding_rows_change_nothing() -> None:
    clip_rows = [4, 0, 7]
    cu = cu_seqlens(clip_rows).repeat_interleave(2)[::2]
    assert cu.stride(0) == 2
    qkv = make_qkv([*clip_rows, 3], 1, 8, torch.float32)

    def call(qkv, cu_seqlens):
        return ops.short_attention(qkv, cu_seqlens, 7, impl="triton")

    results = results_and_gradients(call, {"qkv": qkv, "cu_seqlens": cu}, ("qkv",))
    expected = results_and_gradients(call, {"qkv": qkv[:11], "cu_seqlens": cu.contiguous()}, ("qkv",))
    assert torch.equal(results["output 0"][:11], expected["output 0"])
    assert not results["output 0"][11:].any() and not results["gradient of qkv"][11:].any()


def test_short_attention_writes_rows_of_clips_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory filled with NaN, exactly the clips' rows are written; the last clip ends in a block, 40 rows before N.

    clear_tail is off: it would hide that a clip's program wrote into the padding rows.
    """
    from mae_ast_fast.kernels import short_attention

    monkeypatch.setattr(short_attention, "clear_tail", lambda x, cu_seqlens: x)
    clip_rows = [33, 0, 1, 19]
    tensors = {"qkv": make_qkv([*clip_rows, 40], 2, 20, torch.float32)}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        results = results_and_gradients(kernel(clip_rows, 0.3), tensors, ("qkv",))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in results.items():
        assert x[:-40].isfinite().all() and x[-40:].isnan().all(), name


def test_short_attention_torch_takes_long_clips() -> None:
    qkv = randn(130, 3, 1, 4)
    cu = cu_seqlens([130])
    assert torch.equal(ops.short_attention(qkv, cu, 130, impl="torch"), eager.attention(qkv, cu, 130))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 2, 2, 8)}, r"qkv must be \(N, 3, H, Dh\), got \(4, 2, 2, 8\)"),
        ({"qkv": torch.zeros(4, 48)}, r"qkv must be \(N, 3, H, Dh\), got \(4, 48\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must be \(B \+ 1,\) int32, got torch.int64 \(2,\)"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens must be \(B \+ 1,\) int32, got .* \(0,\)"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens must be on meta, got cpu"),
        ({"max_seqlen": 129}, "at most 128 rows .* got max_seqlen 129 and .* 8; use attention='sdpa' .* impl='torch'"),
        ({"qkv": META.new_empty(4, 3, 1, 129)}, "heads of at most 128 values, got max_seqlen 4 and head width 129"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be an int64 tensor of one element"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
    ],
)
def test_short_attention_bad_input_raises(change: dict, message: str) -> None:
    arguments = {"qkv": META, "cu_seqlens": META.new_empty(2, dtype=torch.int32), "max_seqlen": 4, "impl": "triton"}
    with pytest.raises(ValueError, match=message):
        ops.short_attention(**{**arguments, **change})
