"""What only bias_gelu has; test_ops.py has the rest."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check_output_dropout

from mae_ast_fast import ops
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["bias_gelu"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gelu_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    check_output_dropout(CASE, (13, 700), dtype, dropout=0.4, dropout_site=9, seed=-5)


def test_bias_gelu_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"bias must be \(4\), got \(5,\)"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(5))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got -0.1"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(4), dropout=-0.1)
    with pytest.raises(ValueError, match=r"x must be \(N, F\), got \(1, 2, 3\)"):
        ops.bias_gelu(torch.zeros(1, 2, 3), torch.zeros(3))
