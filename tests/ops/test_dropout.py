"""Dropout from 16 random bits per element (ops/dropout.py)."""

from __future__ import annotations

import pytest
import torch
from policy import STANDARD_ERRORS, max_rel

from mae_ast_fast.ops.dropout import draw_kept, drop


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_any_rate_keeps_even_share_and_scales(dtype: torch.dtype, rate: float) -> None:
    """The share also holds for every fourth element: each is decided by 16 bits of a 64-bit word."""
    torch.manual_seed(0)
    x = torch.ones(4001, 31, dtype=dtype, requires_grad=True)
    out = drop(x, rate)
    kept = out != 0
    scale = torch.tensor(65536 / (65536 - round(rate * 65536)), dtype=dtype)
    assert out.unique().tolist() == [0.0, scale.item()]
    for offset in range(4):
        share = kept.flatten()[offset::4].double().mean()
        assert abs(share - (1 - rate)) < STANDARD_ERRORS * (rate * (1 - rate) / (kept.numel() / 4)) ** 0.5
    out.sum().backward()
    assert torch.equal(x.grad != 0, kept) and torch.equal(x.grad[kept], out[kept])
    torch.manual_seed(0)
    assert torch.equal(drop(x, rate), out)
    assert drop(x, 0.0) is x


def test_draw_kept_all_words_drop_exact_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the rounded rate times 65536 of the 65536 words are dropped."""
    words = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_: self.copy_(words))
    for rate in (0.1, 0.5, 1 / 65536, 0.99999):
        kept, scale = draw_kept(torch.Size((256, 256)), rate)
        dropped = 65536 - int(kept.sum())
        assert dropped == min(round(rate * 65536), 65535) and scale == 65536 / (65536 - dropped)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_draw_kept_each_16_bits_of_word_keep_equal_share(rate: float) -> None:
    """Four elements share 64 random bits: each of the four is kept equally often, and neighbours independently."""
    torch.manual_seed(0)
    kept, scale = draw_kept(torch.Size([4, 100_001]), rate)
    share = 1 / scale
    assert abs(share - (1 - rate)) <= 2**-17 and kept.dtype == torch.int16 and kept.shape == (4, 100_001)
    words = kept.flatten()[: kept.numel() // 4 * 4].view(-1, 4).double()
    error = (share * (1 - share) / len(words)) ** 0.5
    assert ((words.mean(0) - share).abs() < STANDARD_ERRORS * error).all()
    products = (words[:, :3] * words[:, 1:]).mean(0)
    assert ((products - share**2).abs() < STANDARD_ERRORS * (share**2 * (1 - share**2) / len(words)) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_rate_of_quarter_keeps_three_quarters(dtype: torch.dtype) -> None:
    x = torch.linspace(1.0, 2.0, 10_000).to(dtype).requires_grad_()
    torch.manual_seed(0)
    out = drop(x, 0.25)
    out.sum().backward()
    kept = out != 0
    expected = torch.where(kept, x.detach().double() / 0.75, 0.0).to(dtype)
    assert max_rel(out, expected) <= torch.finfo(dtype).eps
    assert abs(kept.double().mean().item() - 0.75) < STANDARD_ERRORS * (0.25 * 0.75 / 10_000) ** 0.5
    assert torch.equal(x.grad != 0, kept) and x.grad.unique().numel() == 2
    assert drop(x, 0.0) is x
