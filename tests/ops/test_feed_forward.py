"""kernels/feed_forward.py against reference.feed_forward: epilogues forward, backward, in both directions, in none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    OFFSETS,
    check_compiles,
    check_registration,
    check_repeats,
    check_strided_vectors,
    compare,
    randn,
    results_and_gradients,
)
from policy import assert_rounding

from mae_ast_fast import ops
from mae_ast_fast.kernels import bias_gelu
from mae_ast_fast.kernels import feed_forward as module
from mae_ast_fast.kernels.common import configs as table
from mae_ast_fast.kernels.common import launch
from mae_ast_fast.kernels.common.configs import EPILOGUES, TABLE
from mae_ast_fast.ops import reference

KERNELS = "feed_forward_forward", "feed_forward_backward"
WEIGHTS = "w1", "b1", "w2"
TILE = {"BM": 16, "BN": 32, "BK": 16, "BS": 16, "PER_SM": 1, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several tiles of several slices, and a program has more than one of them."""
    for name in KERNELS:
        monkeypatch.setitem(TABLE, name, [("any", 1 << 30, 4, TILE)])
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 3)


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch):
    """Switches them on at any size, by name; counts their launches."""
    launched: dict[object, int] = {}

    def counted(kernel, *arguments, **constants) -> None:
        launched[kernel] = launched.get(kernel, 0) + 1
        launch.launch(kernel, *arguments, **constants)

    monkeypatch.setattr(module, "launch", counted)

    def on(*kernels: str) -> dict[object, int]:
        monkeypatch.setattr(module, "epilogue", lambda kernel, *sizes: (kernel in kernels, "by a test"))
        return launched

    return on


def kernel(x, w1, b1, w2, recompute=False) -> torch.Tensor:
    return ops.feed_forward(x, w1, b1, w2, recompute=recompute, impl="triton")


def make_inputs(rows: int, width: int, hidden: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, torch.Tensor]:
    """fp32 weights that ``dtype`` can hold, as the fp64 run does not round them; x W1^T is around 1 at any offset."""
    shapes = {
        "w1": ((hidden, width), (1 + offset) * width**0.5),
        "b1": ((hidden,), 1),
        "w2": ((width, hidden), hidden**0.5),
    }
    weights = {
        name: (randn(*shape, seed=seed) / size).to(dtype).float()
        for seed, (name, (shape, size)) in enumerate(shapes.items(), 2)
    }
    return {"x": randn(rows, width, dtype=dtype, offset=offset, seed=1), **weights}


def check(inputs: dict[str, torch.Tensor]) -> None:
    compare(kernel, reference.feed_forward, inputs, tuple(inputs), inputs["x"].dtype, summed=WEIGHTS, dot=True)


@pytest.mark.parametrize("on", [KERNELS, KERNELS[:1], KERNELS[1:], ()], ids=["both", "forward", "backward", "neither"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_switch_on_separately(epilogues, dtype: torch.dtype, on: tuple[str, ...]) -> None:
    launched = epilogues(*on)
    check(make_inputs(37, 24, 50, dtype))
    assert launched == {
        function: 1 for name, function in zip(KERNELS, (module._forward, module._backward), strict=True) if name in on
    }


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [(1, 16, 32), (17, 33, 97), (150, 20, 33), (3, 1, 1), (20, 400, 40)]
)
def test_values_and_gradients(epilogues, rows: int, width: int, hidden: int, dtype: torch.dtype, offset: float) -> None:
    assert module.GROUP * TILE["BM"] < 150, "the most rows are to be more than one group of row blocks"
    epilogues(*KERNELS)
    check(make_inputs(rows, width, hidden, dtype, offset))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 60), width=st.integers(8, 40), hidden=st.integers(8, 80), pad=st.integers(0, 3))
def test_any_size_and_row_stride(epilogues, rows: int, width: int, hidden: int, pad: int) -> None:
    inputs = make_inputs(rows, width, hidden, torch.float32)
    epilogues()
    expected = results_and_gradients(kernel, inputs, tuple(inputs))
    inputs["x"] = torch.nn.functional.pad(inputs["x"], (0, pad), value=float("nan"))[:, :width]
    epilogues(*KERNELS)
    for name, x in results_and_gradients(kernel, inputs, tuple(inputs)).items():
        assert_rounding(x, expected[name], name, grad=name != "output 0")


@pytest.mark.parametrize("slices", [8, 16, 32, 64])
def test_epilogues_in_one_two_or_four_slices_are_equal(epilogues, monkeypatch, slices: int) -> None:
    epilogues(*KERNELS)
    inputs = make_inputs(37, 24, 150, torch.float32)
    found = []
    for chosen in (64, slices):
        for name in KERNELS:
            monkeypatch.setitem(TABLE, name, [("any", 1 << 30, 4, {**TILE, "BN": 64, "BS": chosen})])
        found.append(results_and_gradients(kernel, inputs, tuple(inputs)))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_epilogue_starts_from_h_as_it_is_stored(dtype: torch.dtype) -> None:
    """What the backward recomputes from h, and what bias_gelu makes of it, is what the forward stored."""
    inputs = make_inputs(37, 24, 50, dtype)
    h, a = module.gelu_epilogue(inputs["x"], inputs["w1"].to(dtype), inputs["b1"])
    assert torch.equal(a, bias_gelu.forward(h, inputs["b1"], None, 0.0, 0))


@pytest.mark.parametrize("impl", ["torch", "triton", "epilogues"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_changes_no_bit_and_saves_the_hidden_values(epilogues, dtype: torch.dtype, impl: str) -> None:
    epilogues(*(KERNELS if impl == "epilogues" else ()))
    inputs = make_inputs(37, 24, 50, dtype)
    impl = "torch" if impl == "torch" else "triton"
    saved, found = [], []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor, sizes=sizes) -> torch.Tensor:
            if x.shape == (37, 50):
                sizes[x.data_ptr()] = x.numel()
            return x

        def function(recompute=recompute, **tensors) -> torch.Tensor:
            return ops.feed_forward(**tensors, recompute=recompute, impl=impl)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found.append(results_and_gradients(function, inputs, tuple(inputs)))
        saved.append(sum(sizes.values()))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name
    assert saved == [2 * 37 * 50, 37 * 50]


def test_no_rows_and_tensors_that_are_not_dense(epilogues) -> None:
    epilogues(*KERNELS)
    found = results_and_gradients(kernel, make_inputs(0, 16, 32, torch.float32), ("x", *WEIGHTS))
    assert found["output 0"].shape == (0, 16)
    assert not any(found[f"gradient of {name}"].any() for name in WEIGHTS)
    inputs = make_inputs(19, 24, 40, torch.float32)
    for name in ("x", "w1", "w2"):
        inputs[name] = inputs[name].T.contiguous().T
    check(inputs)
    check_strided_vectors(kernel, inputs, ("b1",), ("x", *WEIGHTS))


def test_gradients_of_an_output_that_is_not_dense(epilogues) -> None:
    """They come as the transposed or the expanded tensor that the next operation has."""
    inputs = make_inputs(19, 24, 40, torch.float32)
    results = []
    for on in (KERNELS, ()):
        epilogues(*on)
        results.append(results_and_gradients(lambda **x: kernel(**x).T.sum(0), inputs, tuple(inputs)))
    for name, x in results[0].items():
        assert_rounding(x, results[1][name], name, grad=True)


@pytest.mark.parametrize("on", [KERNELS, ()], ids=["epilogues", "none"])
def test_registration_compile_and_repeats(epilogues, on: tuple[str, ...]) -> None:
    epilogues(*on)
    inputs = make_inputs(19, 24, 40, torch.float32)
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        check_registration(module.forward_op, *leaves, recompute)

        def block(x, w1, b1, w2, recompute=recompute):
            return kernel(x, w1, b1, w2, recompute).sin()

        check_compiles(block, inputs, tuple(inputs), make_inputs(35, 24, 40, torch.float32))
        check_repeats(block, inputs, tuple(inputs))


def test_recomputing_in_plain_pytorch_compiles() -> None:
    def block(x, w1, b1, w2):
        return ops.feed_forward(x, w1, b1, w2, recompute=True, impl="torch").sin()

    inputs = make_inputs(9, 24, 40, torch.float32)
    check_compiles(block, inputs, tuple(inputs), make_inputs(11, 24, 40, torch.float32))


def test_nothing_is_on_that_the_table_does_not_speak_for(epilogues, monkeypatch) -> None:
    assert set(EPILOGUES) == set(KERNELS)
    launched = epilogues()
    inputs = make_inputs(19, 24, 40, torch.float32)
    arch = launch.architecture(inputs["x"].device)
    monkeypatch.setattr(module, "epilogue", table.epilogue)

    def launches(*rows: tuple) -> list[object]:
        launched.clear()
        for name in KERNELS:
            monkeypatch.setitem(EPILOGUES, name, list(rows))
        results_and_gradients(kernel, inputs, tuple(inputs))
        return list(launched)

    assert launches() == []
    for row in (
        ("sm_75", 24, 40, 4, 1.0, 2.0),
        (arch, 25, 40, 4, 1.0, 2.0),
        (arch, 24, 41, 4, 1.0, 2.0),
        (arch, 24, 40, 2, 1.0, 2.0),
        (arch, 24, 40, 4, 0.899, 2.0),
        (arch, 24, 40, 4, 1.0, 1.0),
    ):
        assert launches(row) == [], row
    assert launches((arch, 24, 40, 4, 0.9, 1.001)) == [module._forward, module._backward]
    monkeypatch.setitem(EPILOGUES, KERNELS[0], [])
    launched.clear()
    results_and_gradients(kernel, inputs, tuple(inputs))
    assert list(launched) == [module._backward]


def test_auto_is_plain_pytorch(epilogues) -> None:
    launched = epilogues(*KERNELS)
    inputs = make_inputs(19, 24, 40, torch.float32)
    assert torch.equal(ops.feed_forward(**inputs), reference.feed_forward(**inputs))
    assert not launched


def test_bad_input() -> None:
    x, w1, b1, w2 = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"x must be \(N, D\), got \(4,\)"):
        ops.feed_forward(x[0], w1, b1, w2)
    with pytest.raises(ValueError, match=r"w1 must be \(F, 4\), got \(4, 8\)"):
        ops.feed_forward(x, w1.T, b1, w2)
    with pytest.raises(ValueError, match=r"b1 must be \(8\), got \(4,\)"):
        ops.feed_forward(x, w1, b1[:4], w2)
    with pytest.raises(ValueError, match=r"w2 must be \(D', 8\), got \(8, 4\)"):
        ops.feed_forward(x, w1, b1, w2.T)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        ops.feed_forward(x, w1, b1, w2, dropout=1.0)
    with pytest.raises(ValueError, match=r"recompute needs dropout 0, .* got 0.1"):
        ops.feed_forward(x, w1, b1, w2, dropout=0.1, recompute=True)
    with pytest.raises(ValueError, match=r"impl='triton' has no dropout in feed_forward, got 0\.1: use"):
        kernel_device = randn(1).device
        ops.feed_forward(*(y.to(kernel_device) for y in (x, w1, b1, w2)), dropout=0.1, impl="triton")
