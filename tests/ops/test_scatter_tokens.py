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
def several_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "scatter_tokens_backward")


def kernel(**inputs) -> torch.Tensor:
    return ops.scatter_tokens(**inputs, impl="triton")


def make_inputs(
    seen: list[bool], width: int, dtype: torch.dtype, offset: float = 0.0, norm: bool = True, position: float = 1.0
) -> dict[str, torch.Tensor]:
    """``seen`` says of each packed row whether a visible one stands there; tokens run over a table of 50, repeating."""
    is_seen = torch.tensor(seen, dtype=torch.bool)
    inverse = torch.where(is_seen, is_seen.cumsum(0) - 1, -1).to(DEVICE)
    inputs = {
        "visible": randn(int(is_seen.sum()), width, dtype=dtype, offset=offset, seed=1),
        "mask_token": randn(width, seed=2),
        "table": randn(50, width, seed=3) * position,
        "token": torch.arange(len(seen), device=DEVICE) * 7 % 50,
        "inverse": inverse,
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
@pytest.mark.parametrize("seen", PATTERNS.values(), ids=PATTERNS.keys())
def test_plain_movement_is_exact(seen: list[bool], dtype: torch.dtype) -> None:
    """Without positions, LayerNorm and dropout rows are moved, not computed: equal to the bit, gradients too."""
    inputs = make_inputs(seen, 40, dtype, norm=False, position=0.0)
    inputs["mask_token"] = inputs["mask_token"].to(dtype)
    k, r = (
        results_and_gradients(call, inputs, ("visible", "mask_token")) for call in (kernel, reference.scatter_tokens)
    )
    assert torch.equal(k["output 0"], r["output 0"])
    assert torch.equal(k["gradient of visible"], r["gradient of visible"])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seen", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_values_and_gradients(seen: list[bool], dtype: torch.dtype, offset: float, norm: bool) -> None:
    inputs = make_inputs(seen, 33, dtype, offset, norm)
    names = NORMED if norm else NORMED[:2]
    compare(kernel, reference.scatter_tokens, inputs, names, dtype, summed=SUMMED)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seen=st.lists(st.booleans(), min_size=1, max_size=40),
    width=st.integers(8, 130),
    pad=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size_and_row_stride(seen: list[bool], width: int, pad: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(seen, width, dtype)
    inputs["visible"] = torch.nn.functional.pad(inputs["visible"], (0, pad), value=float("nan"))[:, :width]
    compare(kernel, reference.scatter_tokens, inputs, NORMED, dtype, summed=SUMMED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_with_its_own_mask(dtype: torch.dtype) -> None:
    dropout, site, width = 0.3, 4, 48
    inputs = make_inputs(PATTERNS["ragged"], width, dtype)
    keep = keep_mask(SEED, len(PATTERNS["ragged"]), width, site, dropout) * kept_scale(dropout)

    def masked(**inputs):
        y = reference.scatter_tokens(**inputs)
        return y * keep.to(y.dtype)

    def dropped(**inputs):
        return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=site)

    compare(dropped, masked, inputs, NORMED, dtype, summed=SUMMED)


def test_strided_vectors_and_table_and_a_visible_row_that_stands_nowhere() -> None:
    inputs = make_inputs(PATTERNS["ragged"], 24, torch.float32)
    check_strided_vectors(kernel, inputs, ("mask_token", "token", "inverse", "weight", "bias"), NORMED)
    dense = results_and_gradients(kernel, inputs, NORMED)
    inputs["table"] = inputs["table"].T.contiguous().T
    for name, x in results_and_gradients(kernel, inputs, NORMED).items():
        assert torch.equal(x, dense[name]), name
    inputs["visible"] = torch.cat((inputs["visible"], randn(2, 24, seed=9)))
    gradient = results_and_gradients(kernel, inputs, NORMED)["gradient of visible"]
    assert torch.equal(gradient[:-2], dense["gradient of visible"]) and not gradient[-2:].any()


def test_no_rows() -> None:
    found = results_and_gradients(kernel, make_inputs([], 16, torch.float32), NORMED)
    assert found["output 0"].shape == (0, 16) and not found["gradient of mask_token"].any()


def test_registration_compile_and_repeats() -> None:
    from mae_ast_fast.kernels.scatter_tokens import forward_op

    for dropout, norm in ((0.0, False), (0.2, True)):
        inputs = make_inputs(PATTERNS["alternating"], 24, torch.float32, norm=norm)
        names = NORMED if norm else NORMED[:2]
        leaves = {name: x.clone().requires_grad_() if name in names else x for name, x in inputs.items()}
        affine = (leaves["weight"], leaves["bias"]) if norm else (None, None)
        check_registration(forward_op, *list(leaves.values())[:5], *affine, seed_tensor(1), dropout, 3, 1e-5)

        def dropped(dropout=dropout, **inputs):
            return kernel(**inputs, dropout=dropout, seed=seed_tensor(SEED), site=2).sin()

        more = make_inputs(PATTERNS["ragged"], 24, torch.float32, norm=norm)
        check_compiles(dropped, inputs, names, more)
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
def test_bad_input(change: dict, message: str) -> None:
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
