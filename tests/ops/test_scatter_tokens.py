"""What only scatter_tokens has; test_ops.py has the rest."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, call, check_output_dropout, inputs, randn, results_and_gradients

from mae_ast_fast import ops
from mae_ast_fast.ops.cases import op_cases

CASE = op_cases()["scatter_tokens"]
NO_NORM = {"weight": None, "bias": None}
RAGGED = CASE.shapes[-1][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASE.shapes, ids=lambda shape: "".join(map(str, shape[0])))
def test_scatter_tokens_plain_movement_is_exact(shape: tuple[list[int], int], dtype: torch.dtype) -> None:
    """Without positions, LayerNorm and dropout rows are only moved: results and gradients are equal to the bit."""
    arguments = inputs(CASE, (shape[0], 40), dtype) | NO_NORM
    arguments |= {"mask_token": arguments["mask_token"].to(dtype), "table": 0 * arguments["table"]}
    made = call(CASE, arguments)
    results, expected = made.results(), results_and_gradients(made.specified, made.tensors, made.differentiable)
    assert torch.equal(results["output 0"], expected["output 0"])
    assert torch.equal(results["gradient of visible"], expected["gradient of visible"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_tokens_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    check_output_dropout(CASE, (RAGGED, 48), dtype, dropout=0.3, dropout_site=4, seed=2**40 + 3)


def test_scatter_tokens_unused_visible_rows_change_nothing() -> None:
    made = call(CASE, inputs(CASE, (RAGGED, 24)))
    expected = made.results()["gradient of visible"]
    made.tensors["visible"] = torch.cat((made.tensors["visible"], randn(2, 24, seed=9)))
    gradient = made.results()["gradient of visible"]
    assert torch.equal(gradient[:-2], expected) and not gradient[-2:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token": torch.zeros(5)}, r"mask_token must be \(4\), got \(5,\)"),
        ({"table": torch.zeros(9, 3)}, r"table must be \(tokens, 4\), got \(9, 3\)"),
        ({"inverse": torch.zeros(3, dtype=torch.int64)}, r"inverse must be \(2\), got \(3,\)"),
        ({"token": torch.zeros(2, dtype=torch.int32)}, "token must be int64, got torch.int32"),
        ({"weight": torch.zeros(4)}, "weight and bias of the LayerNorm come together"),
    ],
)
def test_scatter_tokens_bad_input_raises(change: dict, message: str) -> None:
    index = torch.zeros(2, dtype=torch.int64)
    inputs = {
        "visible": torch.zeros(1, 4),
        "mask_token": torch.zeros(4),
        "table": torch.zeros(9, 4),
        "token": index,
        "inverse": index,
    }
    with pytest.raises(ValueError, match=message):
        ops.scatter_tokens(**{**inputs, **change})
