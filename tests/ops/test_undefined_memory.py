"""The kernels' tests work in memory full of NaN (conftest.py): kernels that never run must leave it behind."""

from __future__ import annotations

import pytest
import torch
from conftest import KERNEL_TESTS
from kernel_checks import DEVICE, cu_seqlens, randn, seed_tensor

from mae_ast_fast.kernels import add_layer_norm, bias_gelu, info_nce, sample_mask, scatter_tokens


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    for module in (add_layer_norm, bias_gelu, info_nce, sample_mask, scatter_tokens):
        monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)


def test_what_kernels_do_not_write_is_nan():
    x, w, ones = randn(3, 16), randn(16), torch.ones(3, device=DEVICE)
    index = torch.arange(3, device=DEVICE)
    left = [
        *add_layer_norm.forward(x, x, w, w, None, None, 0.0, 1, 1e-5),
        *add_layer_norm.backward(x, None, x, x, w, None, seed_tensor(1), ones, ones, 0.5, 1),
        bias_gelu.forward(x.half(), w, None, 0.0, 1),
        *bias_gelu.backward(x, x, w, None, 0.0, 1),
        *scatter_tokens.forward(x, w, x, index, index, w, w, None, 0.0, 1, 1e-5),
        scatter_tokens.backward(x, x, w, x, index, index, w, None, ones, ones, 0.0, 1)[1],
        *info_nce.forward(x, x, cu_seqlens([3]), 3, "targets")[2:],
    ]
    assert len(left) == 15
    assert all(tensor.isnan().all() for tensor in left)


def test_integers_and_booleans_hold_what_is_no_result():
    assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
    assert (torch.ones(2).new_empty(4, dtype=torch.int64) == 2**63 - 1).all()
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    assert sample_mask.forward(one, one, one, one, 0, 1, 5, False).all()


def test_it_works_where_kernels_are_tested():
    assert {"test_add_layer_norm", "test_sample_mask", "test_model_triton", "test_golden"} <= KERNEL_TESTS
    assert {"test_launch", "test_table", "test_dropout", "test_model"}.isdisjoint(KERNEL_TESTS)
