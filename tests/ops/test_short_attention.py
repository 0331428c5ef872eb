"""kernels/short_attention.py against reference.attention, and against loops over clips and heads where masks count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DTYPES,
    OFFSETS,
    check_compiles,
    check_registration,
    check_repeats,
    compare,
    cu_seqlens,
    keep_mask,
    kept_scale,
    randn,
    results_and_gradients,
    seed_tensor,
)
from policy import STANDARD_ERRORS
from torch import Tensor

from mae_ast_fast import ops
from mae_ast_fast.ops import reference

SEED = 0x1234_5678_9ABC_DEF1
SITE = 7
META = torch.empty(4, 3, 2, 8, device="meta")  # shapes alone


def make_qkv(lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """(N, 3, H, Dh) around zero, the values around ``offset``: around which the row sums of the backward cancel."""
    shift = torch.tensor([0.0, 0.0, offset])[:, None, None]
    return (randn(sum(lengths), 3, heads, width, seed=1) + shift.to(DEVICE)).to(dtype)


def kernel(lengths: Sequence[int], dropout: float = 0.0, max_seqlen: int | None = None) -> Callable[..., Tensor]:
    longest = max_seqlen or max(lengths, default=0)

    def call(qkv: Tensor) -> Tensor:
        return ops.short_attention(qkv, cu_seqlens(lengths), longest, dropout, seed_tensor(SEED), SITE, impl="triton")

    return call


def looped(lengths: Sequence[int], dropout: float) -> Callable[..., Tensor]:
    """The definition, a clip and a head at a time, with the masks that the kernel has to draw."""
    longest = max(lengths)

    def call(qkv: Tensor) -> Tensor:
        rows, _, heads, width = qkv.shape
        clips, first = [], 0
        for length in lengths:
            own = qkv[first : first + length]
            columns = []
            for head in range(heads):
                q, k, v = own[:, :, head].unbind(1)
                logits = (q @ k.T) * width**-0.5
                weights = logits.to(torch.promote_types(qkv.dtype, torch.float32)).softmax(1)
                keep = keep_mask(SEED, rows, longest, SITE, dropout, lane=head)[first : first + length, :length]
                columns.append((weights * keep * kept_scale(dropout)).to(qkv.dtype) @ v)
            clips.append(torch.stack(columns, 1))
            first += length
        return torch.cat(clips)

    return call


def check(qkv: Tensor, lengths: Sequence[int], dropout: float = 0.0, max_seqlen: int | None = None) -> None:
    longest = max(lengths)
    expected = (
        looped(lengths, dropout) if dropout else lambda qkv: reference.attention(qkv, cu_seqlens(lengths), longest)
    )
    compare(kernel(lengths, dropout, max_seqlen), expected, {"qkv": qkv}, ("qkv",), qkv.dtype, dot=True)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [
        ([1], 1, 16),
        ([3, 0, 1, 40], 2, 20),
        ([31, 32, 33, 17], 1, 64),
        ([0, 65], 3, 5),
        ([128, 2], 1, 64),
        ([127], 1, 128),
    ],
)
def test_values_and_gradients(lengths: list[int], heads: int, width: int, dtype: torch.dtype, offset: float) -> None:
    check(make_qkv(lengths, heads, width, dtype, offset), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "width"), [([1], 2, 16), ([3, 0, 33, 1], 2, 20), ([128, 5], 1, 64), ([40, 64], 2, 64)]
)
def test_dropout_with_its_own_mask(lengths: list[int], heads: int, width: int, dtype: torch.dtype) -> None:
    """Outputs and gradients are those of explicit probabilities under the mask that the counters give."""
    check(make_qkv(lengths, heads, width, dtype), lengths, dropout=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    """Of up to 40, where half precision is off by 0.01 and exponentials need the maximum taken away."""
    qkv = make_qkv([40], 1, 64, dtype)
    qkv[:, :2] *= 3
    check(qkv, [40])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
    pad=st.integers(0, 3),
    more=st.integers(0, 20),
    dropout=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_clips_sizes_and_row_stride(
    lengths: list[int], heads: int, width: int, pad: int, more: int, dropout: float, dtype: torch.dtype
) -> None:
    flat = torch.nn.functional.pad(make_qkv(lengths, heads, width, dtype).flatten(1), (0, pad), value=float("nan"))
    qkv = flat[:, : 3 * heads * width].unflatten(1, (3, heads, width))
    check(qkv, lengths, dropout, max(lengths) + more)


def test_rows_that_are_not_dense() -> None:
    """Heads before q, k, v; incoming gradients that are one value, expanded, or rows with a gap between."""
    lengths = [9, 20]
    qkv = make_qkv(lengths, 2, 8, torch.float32)
    check(qkv.transpose(1, 2).contiguous().transpose(1, 2), lengths)
    leaf = qkv.requires_grad_()
    out = kernel(lengths)(leaf)
    gaps = torch.nn.functional.pad(randn(29, 16), (0, 3))[:, :16].unflatten(1, (2, 8))
    for incoming in (torch.ones((), device=DEVICE).expand(out.shape), gaps):
        found = [torch.autograd.grad(out, leaf, x, retain_graph=True)[0] for x in (incoming, incoming.contiguous())]
        assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_clips_do_not_see_each_other() -> None:
    lengths = [20, 18, 30]
    qkv = make_qkv(lengths, 2, 16, torch.float32)
    alone = results_and_gradients(kernel(lengths, 0.3), {"qkv": qkv}, ("qkv",))
    qkv = qkv.clone()
    qkv[20:38] = float("nan")
    for name, x in results_and_gradients(kernel(lengths, 0.3), {"qkv": qkv}, ("qkv",)).items():
        assert torch.equal(x[:20], alone[name][:20]) and torch.equal(x[38:], alone[name][38:]), name


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_without_rows(lengths: list[int]) -> None:
    qkv = torch.zeros(0, 3, 2, 16, device=DEVICE)
    found = results_and_gradients(kernel(lengths, 0.1), {"qkv": qkv}, ("qkv",))
    assert found["output 0"].shape == (0, 2, 16) and found["gradient of qkv"].shape == qkv.shape


def drawn_mask(
    lengths: Sequence[int], heads: int, dropout: float, seed: Tensor | None, site: int = SITE
) -> list[Tensor]:
    """The kept places (H, length, length) of each clip, seen from outside: the values are unit vectors, one a key."""
    width = max(lengths)
    qkv = torch.zeros(sum(lengths), 3, heads, width, device=DEVICE)
    qkv[:, 2] = torch.cat([torch.eye(length, width) for length in lengths])[:, None].to(DEVICE)
    o = ops.short_attention(qkv, cu_seqlens(lengths), width, dropout, seed, site, impl="triton")
    parts = o.split(list(lengths))
    return [part[:, :, :length].transpose(0, 1) != 0 for part, length in zip(parts, lengths, strict=True)]


def test_mask_is_the_documented_one() -> None:
    """Row = the query's packed row, lane = head, column = the key's index in the clip, for every clip and head."""
    lengths, heads = [37, 1, 70], 2
    masks, first = drawn_mask(lengths, heads, 0.3, seed_tensor(SEED)), 0
    for length, mask in zip(lengths, masks, strict=True):
        for head in range(heads):
            expected = keep_mask(SEED, sum(lengths), length, SITE, 0.3, lane=head)[first : first + length]
            assert torch.equal(mask[head], expected)
        first += length


def test_dropout_keeps_at_its_rate_and_differs_by_site_seed_and_head() -> None:
    lengths, dropout = [64, 64], 0.25

    def kept(seed: Tensor | None, site: int) -> Tensor:
        return torch.stack(drawn_mask(lengths, 2, dropout, seed, site), 1)  # (H, clip, 64, 64)

    first = kept(seed_tensor(1), 1)
    rate, differ = 1 - dropout, 2 * dropout * (1 - dropout)  # of two independent masks at one place
    assert abs(first.double().mean().item() - rate) <= STANDARD_ERRORS * (rate * dropout / first.numel()) ** 0.5
    pairs = [(first[0], first[1]), (first[:, 0], first[:, 1])]
    pairs += [(first, kept(seed_tensor(seed), site)) for seed, site in ((2, 1), (1 + 2**32, 1), (1, 2))]
    for one, other in pairs:
        share = (one != other).double().mean().item()
        assert abs(share - differ) <= STANDARD_ERRORS * (differ * (1 - differ) / one.numel()) ** 0.5
    torch.manual_seed(0)
    drawn = kept(None, 1)
    assert not torch.equal(drawn, kept(None, 1))
    torch.manual_seed(0)
    assert torch.equal(drawn, kept(None, 1))


def test_strided_cu_seqlens_and_rows_past_the_last_clip() -> None:
    lengths = [4, 0, 7]
    cu = cu_seqlens(lengths).repeat_interleave(2)[::2]
    assert cu.stride(0) == 2
    qkv = make_qkv([*lengths, 3], 1, 8, torch.float32)

    def call(qkv, cu_seqlens):
        return ops.short_attention(qkv, cu_seqlens, 7, impl="triton")

    found = results_and_gradients(call, {"qkv": qkv, "cu_seqlens": cu}, ("qkv",))
    own = results_and_gradients(call, {"qkv": qkv[:11], "cu_seqlens": cu.contiguous()}, ("qkv",))
    assert torch.equal(found["output 0"][:11], own["output 0"])
    assert not found["output 0"][11:].any() and not found["gradient of qkv"][11:].any()


def test_registration_compile_and_repeats() -> None:
    from mae_ast_fast.kernels.short_attention import forward_op

    lengths = [4, 0, 7]
    qkv = make_qkv(lengths, 1, 8, torch.float32)
    for dropout in (0.0, 0.2):
        leaf = qkv.clone().requires_grad_()
        check_registration(forward_op, leaf, cu_seqlens(lengths), seed_tensor(1), 7, dropout, 3)
        cu, seed = cu_seqlens(lengths), seed_tensor(SEED)

        def call(qkv, dropout=dropout, cu=cu, seed=seed):
            return ops.short_attention(qkv, cu, 7, dropout, seed, SITE, impl="triton").sin()

        check_compiles(call, {"qkv": qkv}, ("qkv",), {"qkv": make_qkv([4, 0, 9], 1, 8, torch.float32)})
        check_repeats(call, {"qkv": qkv}, ("qkv",))


def test_every_row_of_a_clip_is_written_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty filled with NaN, as PyTorch does on request; the last clip ends inside a block, 40 rows before N.

    Those would be cleared at the end, which would hide that a clip's program had written there.
    """
    from mae_ast_fast.kernels import short_attention

    monkeypatch.setattr(short_attention, "clear_tail", lambda x, cu_seqlens: x)
    lengths = [33, 0, 1, 19]
    inputs = {"qkv": make_qkv([*lengths, 40], 2, 20, torch.float32)}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        found = results_and_gradients(kernel(lengths, 0.3), inputs, ("qkv",))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in found.items():
        assert x[:-40].isfinite().all() and x[-40:].isnan().all(), name


def test_impl_torch_takes_any_length() -> None:
    qkv = randn(130, 3, 1, 4)
    cu = cu_seqlens([130])
    assert torch.equal(ops.short_attention(qkv, cu, 130, impl="torch"), reference.attention(qkv, cu, 130))


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
def test_bad_input(change: dict, message: str) -> None:
    inputs = {"qkv": META, "cu_seqlens": META.new_empty(2, dtype=torch.int32), "max_seqlen": 4, "impl": "triton"}
    with pytest.raises(ValueError, match=message):
        ops.short_attention(**{**inputs, **change})
