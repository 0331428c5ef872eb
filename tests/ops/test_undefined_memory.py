"""The kernels' tests run in memory filled with NaN (conftest.py): if no kernel runs, the results are NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import KERNEL_TESTS
from kernel_checks import DEVICE, cu_seqlens, randn, seed_tensor

from mae_ast_fast.kernels import add_layer_norm, bias_gelu, info_nce, sample_mask, scatter_tokens
from mae_ast_fast.kernels.common import launch


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    monkeypatch.setattr(launch, "_launch", lambda *arguments: None)


def test_kernels_not_launched_leave_nan():
    x, vector, ones = randn(3, 16), randn(16), torch.ones(3, device=DEVICE)
    index = torch.arange(3, device=DEVICE)
    dropout: dict[str, Any] = {"seed": None, "dropout": 0.0, "dropout_site": 1}
    norm = {"residual": x, "weight": vector, "branch_bias": None}
    layer_norm_dropout = {"seed": seed_tensor(1), "dropout": 0.5, "dropout_site": 1}
    scatter = {"visible": x, "mask_token": vector, "table": x, "token": index, "ids_restore": index, "weight": vector}
    undefined = [
        *add_layer_norm.forward(x, bias=vector, eps=1e-5, **norm, **dropout),
        *add_layer_norm.backward(x, None, x, mean=ones, rstd=ones, **norm, **layer_norm_dropout),
        bias_gelu.forward(x.half(), vector, **dropout),
        *bias_gelu.backward(x, x, vector, **dropout),
        *scatter_tokens.forward(bias=vector, eps=1e-5, **scatter, **dropout),
        scatter_tokens.backward(x, mean=ones, rstd=ones, **scatter, **dropout)[1],
        *info_nce.forward(x, x, cu_seqlens([3]), 3, over="targets")[2:],
    ]
    assert len(undefined) == 15
    assert all(tensor.isnan().all() for tensor in undefined)


def test_undefined_memory_integers_and_booleans_hold_maximum():
    assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
    assert (torch.ones(2).new_empty(4, dtype=torch.int64) == 2**63 - 1).all()
    ones = torch.ones(1, dtype=torch.int64, device=DEVICE)
    assert sample_mask.forward(ones, ones, ones, ones, epoch=0, grid_f=1, max_tokens=5, chunk=False).all()


def test_undefined_memory_covers_kernel_tests():
    assert {"test_add_layer_norm", "test_sample_mask", "test_model_triton", "test_golden"} <= KERNEL_TESTS
    assert {"test_launch", "test_table", "test_dropout", "test_model"}.isdisjoint(KERNEL_TESTS)
