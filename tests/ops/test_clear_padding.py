"""kernels/clear_padding.py: zeros in the rows past the last clip, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, cu_seqlens, randn

from mae_ast_fast.kernels.clear_padding import clear_tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (33,), (3, 2, 20), (1500,)], ids=str)
@pytest.mark.parametrize(("clip_rows", "rows"), [([3, 0, 4], 7), ([3, 0, 4], 8), ([0], 70), ([5, 2], 200), ([], 3)])
def test_clear_tail_any_shape_zeroes_padding_rows_only(
    clip_rows: list[int], rows: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = randn(rows, *shape, dtype=dtype, offset=9.0)
    expected = x.clone()
    expected[sum(clip_rows) :] = 0
    assert torch.equal(clear_tail(x, cu_seqlens(clip_rows)), expected)
    x.fill_(float("nan"))
    assert not clear_tail(x, cu_seqlens(clip_rows))[sum(clip_rows) :].any()


def test_clear_tail_no_rows_returns_input() -> None:
    assert clear_tail(randn(0, 4), cu_seqlens([0])).shape == (0, 4)
