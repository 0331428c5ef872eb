"""kernels/scatter_tokens.py against reference.scatter_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DTYPES,
    OFFSETS,
    check_compiles,
    check_registration,
    check_repeats,
    check_strided_vectors,
    compare,
    few_programs,
    keep_mask,
    kept_scale,
    randn,
    results_and_gradients,
    seed_tensor,
)

from mae_ast_fast import ops
from mae_ast_fast.ops import reference

SEED = 2**40 + 3
NORMED = ("visible", "mask_token", "weight", "bias")
SUMMED = ("mask_token", "weight", "bias")


@pytest.fixture(autouse=True)
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "scatter_tokens_backward")


def kernel(**inputs) -> torch.Tensor:
    return ops.scatter_tokens(**inputs, impl="triton")


def make_inputs(
    visible: list[bool],
    width: int,
    dtype: torch.dtype,
    *,
    offset: float = 0.0,
    norm: bool = True,
    position_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Inputs whose packed rows are visible or masked as in ``visible``; tokens repeat over a table of 50 positions."""
    is_visible = torch.tensor(visible, dtype=torch.bool)
    ids_restore = torch.where(is_visible, is_visible.cumsum(0) - 1, -1).to(DEVICE)
    inputs = {
        "visible": randn(int(is_visible.sum()), width, dtype=dtype, offset=offset, seed=1),
        "mask_token": randn(width, seed=2),
        "table": randn(50, width, seed=3) * position_scale,
        "token": torch.arange(len(visible), device=DEVICE) * 7 % 50,
        "inverse": ids_restore,
    }
    if norm:
        inputs |= {"weight": randn(width, offset=1.0, seed=4), "bias": randn(width, seed=5)}
    return inputs


PATTERNS = {
    "one visible": [True],
    "one masked": [False],
    "alternating": [True, False] * 9,
    "first visible": [True] + [False] * 10,
    "last visible": [False] * 10 + [True],
    "all visible": [True] * 7,
    "all masked": [False] * 7,
    "ragged": [index % 5 == 2 or index % 7 == 0 for index in range(41)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", PATTERNS.values(), ids=PATTERNS.keys())
def test_scatter_tokens_plain_movement_is_exact(visible: list[bool], dtype: torch.dtype) -> None:
    """Without positions, LayerNorm and dropout rows are only moved: results and gradients are equal to the bit."""
    inputs = make_inputs(visible, 40, dtype, norm=False, position_scale=0.0)
    inputs["mask_token"] = inputs["mask_token"].to(dtype)
    results, expected = (
        results_and_gradients(call, inputs, ("visible", "mask_token")) for call in (kernel, reference.scatter_tokens)
    )
    assert torch.equal(results["output 0"], expected["output 0"])
    assert torch.equal(results["gradient of visible"], expected["gradient of visible"])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_scatter_tokens_values_and_gradients_match_reference(
    visible: list[bool], dtype: torch.dtype, offset: float, norm: bool
) -> None:
    inputs = make_inputs(visible, 33, dtype, offset=offset, norm=norm)
    names = NORMED if norm else NORMED[:2]
    compare(kernel, reference.scatter_tokens, inputs, names, dtype=dtype, summed=SUMMED)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    visible=st.lists(st.booleans(), min_size=1, max_size=40),
    width=st.integers(8, 130),
    pad=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_scatter_tokens_any_size_and_row_stride_matches_reference(
    visible: list[bool], width: int, pad: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(visible, width, dtype)
    inputs["visible"] = torch.nn.functional.pad(inputs["visible"], (0, pad), value=float("nan"))[:, :width]
    compare(kernel, reference.scatter_tokens, inputs, NORMED, dtype=dtype, summed=SUMMED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_tokens_dropout_matches_reference_with_drawn_mask(dtype: torch.dtype) -> None:
    dropout, dropout_site, width = 0.3, 4, 48
    inputs = make_inputs(PATTERNS["ragged"], width, dtype)
    mask = keep_mask(SEED, len(PATTERNS["ragged"]), width, dropout_site=dropout_site, dropout=dropout)
    keep = mask * kept_scale(dropout)

    def masked(**inputs):
        y = reference.scatter_tokens(**inputs)
        return y * keep.to(y.dtype)

    def dropped(**inputs):
        return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=dropout_site)

    compare(dropped, masked, inputs, NORMED, dtype=dtype, summed=SUMMED)


def test_scatter_tokens_strided_inputs_and_unused_visible_rows_change_nothing() -> None:
    inputs = make_inputs(PATTERNS["ragged"], 24, torch.float32)
    check_strided_vectors(kernel, inputs, ("mask_token", "token", "inverse", "weight", "bias"), NORMED)
    dense = results_and_gradients(kernel, inputs, NORMED)
    inputs["table"] = inputs["table"].T.contiguous().T
    for name, x in results_and_gradients(kernel, inputs, NORMED).items():
        assert torch.equal(x, dense[name]), name
    inputs["visible"] = torch.cat((inputs["visible"], randn(2, 24, seed=9)))
    gradient = results_and_gradients(kernel, inputs, NORMED)["gradient of visible"]
    assert torch.equal(gradient[:-2], dense["gradient of visible"]) and not gradient[-2:].any()


def test_scatter_tokens_no_rows_returns_no_rows() -> None:
    results = results_and_gradients(kernel, make_inputs([], 16, torch.float32), NORMED)
    assert results["output 0"].shape == (0, 16) and not results["gradient of mask_token"].any()


def test_scatter_tokens_registers_compiles_and_repeats() -> None:
    from mae_ast_fast.kernels.scatter_tokens import forward_op

    for dropout, norm in ((0.0, False), (0.2, True)):
        inputs = make_inputs(PATTERNS["alternating"], 24, torch.float32, norm=norm)
        names = NORMED if norm else NORMED[:2]
        leaves = {name: x.clone().requires_grad_() if name in names else x for name, x in inputs.items()}
        affine = (leaves["weight"], leaves["bias"]) if norm else (None, None)
        check_registration(forward_op, *list(leaves.values())[:5], *affine, seed_tensor(1), dropout, 3, 1e-5)

        def dropped(dropout=dropout, **inputs):
            return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=2).sin()

        others = make_inputs(PATTERNS["ragged"], 24, torch.float32, norm=norm)
        check_compiles(dropped, inputs, names, others)
        check_repeats(dropped, inputs, names)


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
