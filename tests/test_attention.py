"""Every attention backend against a loop over clips in fp64, forward and gradients, for ragged batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from policy import STANDARD_ERRORS, assert_rounding, max_rel

from mae_ast_fast import ops
from mae_ast_fast.attention import BACKENDS, attention, choose_backend, cross_attention
from mae_ast_fast.packing import cumulative

PADDED = ("sdpa", "math")  # those of PyTorch; the kernel behind "short" has tests of its own

# To policy.py: probabilities and output are rounded once each, in units of the output's dtype.
ATTENTION_EPS = 4

LENGTHS = {
    "equal": [5, 5, 5],
    "one to n": list(range(1, 20)),
    "n to one": list(range(19, 0, -1)),
    "empty clips": [0, 3, 0, 0, 7, 1, 0],
    "single rows": [1, 1, 1, 1],
    "one clip": [37],
    "one long": [1, 2, 300, 1],
    "thousands of short ones and a longer one": [1, 2, 3] * 800 + [40],
}


def rows(counts: list[int], heads: int = 2, dim: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(counts))
    return torch.randn(sum(counts), 3, heads, dim, generator=generator).to(dtype)


def call(qkv: torch.Tensor, counts: list[int], backend: str, dropout: float = 0.0) -> torch.Tensor:
    return attention(qkv, cumulative(torch.tensor(counts)), max(counts), dropout, backend)


def loop(qkv: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Clip by clip, nothing padded; differentiable."""
    out = []
    for clip in qkv.split(counts):
        q, k, v = clip.permute(1, 2, 0, 3)
        out.append(((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("counts", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", PADDED)
def test_forward_and_gradients(backend: str, counts: list[int]) -> None:
    qkv = rows(counts).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weight = torch.randn(sum(counts), 2, 4, generator=torch.Generator().manual_seed(1))
    out, expected = call(qkv, counts, backend), loop(exact, counts)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert out.dtype == torch.float32
    assert_rounding(out, expected, "output")
    assert_rounding(qkv.grad, exact.grad, "gradient", grad=True)


@pytest.mark.parametrize("backend", PADDED)
def test_a_clip_sees_only_itself(backend: str) -> None:
    counts = [3, 5, 2]
    qkv = rows(counts).requires_grad_()
    call(qkv, counts, backend)[3:8].sum().backward()
    assert not qkv.grad[:3].any() and not qkv.grad[8:].any() and qkv.grad[3:8].any()
    poisoned = qkv.detach().clone()
    poisoned[:3] = float("nan")
    assert torch.equal(call(poisoned, counts, backend)[3:], call(qkv.detach(), counts, backend)[3:])


@pytest.mark.parametrize("backend", PADDED)
def test_large_scores_and_equal_keys(backend: str) -> None:
    counts = [4, 2]
    large = rows(counts) * 100
    assert_rounding(call(large.double(), counts, backend), loop(large.double(), counts))
    assert call(large, counts, backend).isfinite().all()
    equal = torch.zeros(6, 3, 2, 4)
    equal[:, 2] = rows(counts)[:, 2]
    means = torch.cat([clip.mean(0, keepdim=True).expand_as(clip) for clip in equal[:, 2].split(counts)])
    assert_rounding(call(equal, counts, backend), means)


@pytest.mark.parametrize("backend", PADDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(backend: str, dtype: torch.dtype) -> None:
    counts = [3, 6, 1]
    out = call(rows(counts, dtype=dtype), counts, backend)
    assert out.dtype == dtype
    expected = loop(rows(counts, dtype=dtype).double(), counts)
    assert max_rel(out, expected) <= ATTENTION_EPS * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", PADDED)
def test_a_qkv_that_is_not_contiguous(backend: str) -> None:
    counts = [3, 6, 1]
    wide = torch.cat((rows(counts), rows(counts)), dim=3)
    assert not wide[..., :4].is_contiguous()
    assert torch.equal(call(wide[..., :4], counts, backend), call(rows(counts), counts, backend))


@pytest.mark.parametrize("backend", PADDED)
@pytest.mark.parametrize("counts", [[300, 300], [100, 300]])
def test_dropout_is_on_the_probabilities(backend: str, counts: list[int]) -> None:
    """Uniform probabilities and values 1: a row's output counts its kept keys."""
    qkv = torch.zeros(sum(counts), 3, 1, 4, dtype=torch.float64)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = call(qkv, counts, backend, dropout=0.25)
    first = 0
    for count in counts:
        kept = out[first : first + count, 0, 0] * count * 0.75
        assert_rounding(kept, kept.round(), "kept keys")
        share = kept.sum().item() / count**2
        assert abs(share - 0.75) < STANDARD_ERRORS * math.sqrt(0.25 * 0.75) / count
        assert kept.unique().numel() > 10
        first += count
    torch.manual_seed(0)
    assert torch.equal(out, call(qkv, counts, backend, dropout=0.25))
    assert torch.equal(call(qkv, counts, backend), call(qkv, counts, backend, dropout=0.0))


def test_unequal_clips_are_not_all_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of any length mix without padding waste: at most one padded row for each real one."""
    padded: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        padded.append(q.shape[0] * q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for counts in ([1] * 100 + [200], [200, 3, 0, 7], list(range(1, 60)), [5, 5, 5]):
        padded.clear()
        assert_rounding(call(rows(counts), counts, "sdpa"), loop(rows(counts).double(), counts))
        assert sum(counts) <= sum(padded) <= 2 * sum(counts)


ASKING = {
    "some": ([5, 9, 1], [2, 9, 1]),
    "clips where none asks": ([4, 6, 3], [0, 2, 0]),
    "empty clips": ([0, 6, 0, 3], [0, 1, 0, 3]),
    "unlike lengths": ([1] * 40 + [70], [1, 0] * 20 + [33]),
}


@pytest.mark.parametrize(("counts", "asking"), ASKING.values(), ids=ASKING.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_only_some_rows_ask(backend: str, counts: list[int], asking: list[int]) -> None:
    """The same as attention of all rows, at those rows, forward and gradients."""
    qkv = rows(counts).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    first = [0, *torch.tensor(counts).cumsum(0).tolist()]
    places = [
        start + torch.randperm(count, generator=generator)[:chosen].sort().values
        for start, count, chosen in zip(first, counts, asking, strict=False)
    ]
    index = torch.cat(places)
    cu = cumulative(torch.tensor(asking)), max(asking), cumulative(torch.tensor(counts)), max(counts)
    out = cross_attention(qkv[:, 0][index], qkv[:, 1:], *cu, backend=backend)
    expected = loop(exact, counts)[index]
    weight = torch.randn(out.shape, generator=generator)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_rounding(out, expected, "output")
    assert_rounding(qkv.grad, exact.grad, "gradient", grad=True)


@pytest.mark.parametrize("counts", LENGTHS.values(), ids=LENGTHS.keys())
def test_short_runs_the_kernel_for_short_clips_alone(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(ops, "short_attention", lambda qkv, *args, **impl: ran.append(args) or qkv[:, 0])
    call(rows(counts), counts, "short")
    assert len(ran) == (max(counts) <= 128)


def test_backend_choice() -> None:
    for device in ("cpu", "cuda", "mps"):
        name, reason = choose_backend("auto", device)
        assert name in BACKENDS and len(reason.split()) > 3
        for asked in BACKENDS:
            assert choose_backend(asked, device)[0] == asked


def test_an_unknown_backend_is_an_error_that_names_the_choices() -> None:
    for run in (lambda: choose_backend("flashy", "cpu"), lambda: call(rows([2]), [2], "flashy")):
        with pytest.raises(ValueError) as caught:
            run()
        assert all(word in str(caught.value) for word in ("auto", *BACKENDS, "'flashy'"))
