"""kernels/feed_forward.py against reference.feed_forward, with epilogues in the forward, the backward, both or none."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Shrink the tiles: a few rows are several tiles of several slices, and a program has more than one tile."""
    for name in KERNELS:
        monkeypatch.setitem(TABLE, name, [("any", 1 << 30, 4, TILE)])
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 3)


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch):
    """A function that enables epilogues by name, at any size, and returns the number of launches of each kernel."""
    launched: dict[object, int] = {}

    def counted(kernel, *arguments, **constants) -> None:
        launched[kernel] = launched.get(kernel, 0) + 1
        launch.launch(kernel, *arguments, **constants)

    monkeypatch.setattr(module, "launch", counted)

    def enable(kernels: Sequence[str]) -> dict[object, int]:
        monkeypatch.setattr(module, "epilogue", lambda kernel, arch, **sizes: (kernel in kernels, "by a test"))
        return launched

    return enable


def kernel(x, w1, b1, w2, *, recompute=False) -> torch.Tensor:
    return ops.feed_forward(x, w1, b1, w2, recompute=recompute, impl="triton")


def make_inputs(
    rows: int, width: int, ffn_dim: int, dtype: torch.dtype, *, offset: float = 0.0
) -> dict[str, torch.Tensor]:
    """fp32 weights with values of ``dtype``, because the fp64 run does not round; x W1^T is around 1 at any offset."""
    shapes = {
        "w1": ((ffn_dim, width), (1 + offset) * width**0.5),
        "b1": ((ffn_dim,), 1),
        "w2": ((width, ffn_dim), ffn_dim**0.5),
    }
    weights = {
        name: (randn(*shape, seed=seed) / size).to(dtype).float()
        for seed, (name, (shape, size)) in enumerate(shapes.items(), 2)
    }
    return {"x": randn(rows, width, dtype=dtype, offset=offset, seed=1), **weights}


def check(inputs: dict[str, torch.Tensor]) -> None:
    compare(kernel, reference.feed_forward, inputs, tuple(inputs), dtype=inputs["x"].dtype, summed=WEIGHTS, dot=True)


@pytest.mark.parametrize(
    "enabled", [KERNELS, KERNELS[:1], KERNELS[1:], ()], ids=["both", "forward", "backward", "neither"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_each_epilogue_switches_on_separately(
    epilogues, dtype: torch.dtype, enabled: tuple[str, ...]
) -> None:
    launched = epilogues(enabled)
    check(make_inputs(37, 24, 50, dtype))
    assert launched == {
        function: 1
        for name, function in zip(KERNELS, (module._forward, module._backward), strict=True)
        if name in enabled
    }


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "ffn_dim"), [(1, 16, 32), (17, 33, 97), (150, 20, 33), (3, 1, 1), (20, 400, 40)]
)
def test_feed_forward_values_and_gradients_match_reference(
    epilogues, *, rows: int, width: int, ffn_dim: int, dtype: torch.dtype, offset: float
) -> None:
    assert module.GROUP * TILE["BM"] < 150, "the largest number of rows must exceed one group of row blocks"
    epilogues(KERNELS)
    check(make_inputs(rows, width, ffn_dim, dtype, offset=offset))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 60), width=st.integers(8, 40), ffn_dim=st.integers(8, 80), pad=st.integers(0, 3))
def test_feed_forward_any_size_and_row_stride_matches_products(
    epilogues, *, rows: int, width: int, ffn_dim: int, pad: int
) -> None:
    inputs = make_inputs(rows, width, ffn_dim, torch.float32)
    epilogues(())
    expected = results_and_gradients(kernel, inputs, tuple(inputs))
    inputs["x"] = torch.nn.functional.pad(inputs["x"], (0, pad), value=float("nan"))[:, :width]
    epilogues(KERNELS)
    for name, x in results_and_gradients(kernel, inputs, tuple(inputs)).items():
        assert_rounding(x, expected[name], name, grad=name != "output 0")


@pytest.mark.parametrize("slices", [8, 16, 32, 64])
def test_feed_forward_any_number_of_slices_is_bit_equal(epilogues, monkeypatch, slices: int) -> None:
    epilogues(KERNELS)
    inputs = make_inputs(37, 24, 150, torch.float32)
    results = []
    for slice_columns in (64, slices):
        for name in KERNELS:
            monkeypatch.setitem(TABLE, name, [("any", 1 << 30, 4, {**TILE, "BN": 64, "BS": slice_columns})])
        results.append(results_and_gradients(kernel, inputs, tuple(inputs)))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_epilogue_uses_h_as_stored(dtype: torch.dtype) -> None:
    """The forward stores the values that bias_gelu, and so the backward, computes from the stored h."""
    inputs = make_inputs(37, 24, 50, dtype)
    h, a = module.gelu_epilogue(inputs["x"], inputs["w1"].to(dtype), inputs["b1"])
    assert torch.equal(a, bias_gelu.forward(h, inputs["b1"], None, 0.0, 0))


@pytest.mark.parametrize("impl", ["torch", "triton", "epilogues"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_recompute_is_bit_equal_and_saves_one_tensor_less(
    epilogues, dtype: torch.dtype, impl: str
) -> None:
    epilogues(KERNELS if impl == "epilogues" else ())
    inputs = make_inputs(37, 24, 50, dtype)
    impl = "torch" if impl == "torch" else "triton"
    saved, results = [], []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor, sizes=sizes) -> torch.Tensor:
            if x.shape == (37, 50):
                sizes[x.data_ptr()] = x.numel()
            return x

        def function(recompute=recompute, **tensors) -> torch.Tensor:
            return ops.feed_forward(**tensors, recompute=recompute, impl=impl)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results.append(results_and_gradients(function, inputs, tuple(inputs)))
        saved.append(sum(sizes.values()))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name
    assert saved == [2 * 37 * 50, 37 * 50]


def test_feed_forward_no_rows_and_strided_tensors_match_reference(epilogues) -> None:
    epilogues(KERNELS)
    results = results_and_gradients(kernel, make_inputs(0, 16, 32, torch.float32), ("x", *WEIGHTS))
    assert results["output 0"].shape == (0, 16)
    assert not any(results[f"gradient of {name}"].any() for name in WEIGHTS)
    inputs = make_inputs(19, 24, 40, torch.float32)
    for name in ("x", "w1", "w2"):
        inputs[name] = inputs[name].T.contiguous().T
    check(inputs)
    check_strided_vectors(kernel, inputs, ("b1",), ("x", *WEIGHTS))


def test_feed_forward_strided_output_gradient_matches_products(epilogues) -> None:
    """The incoming gradient is transposed and expanded, as the next operation leaves it."""
    inputs = make_inputs(19, 24, 40, torch.float32)
    results = []
    for enabled in (KERNELS, ()):
        epilogues(enabled)
        results.append(results_and_gradients(lambda **x: kernel(**x).T.sum(0), inputs, tuple(inputs)))
    for name, x in results[0].items():
        assert_rounding(x, results[1][name], name, grad=True)


@pytest.mark.parametrize("enabled", [KERNELS, ()], ids=["epilogues", "none"])
def test_feed_forward_registers_compiles_and_repeats(epilogues, enabled: tuple[str, ...]) -> None:
    epilogues(enabled)
    inputs = make_inputs(19, 24, 40, torch.float32)
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        check_registration(module.forward_op, *leaves, recompute)

        def block(*, recompute=recompute, **inputs):
            return kernel(**inputs, recompute=recompute).sin()

        check_compiles(block, inputs, tuple(inputs), make_inputs(35, 24, 40, torch.float32))
        check_repeats(block, inputs, tuple(inputs))


def test_feed_forward_torch_recompute_compiles() -> None:
    def block(x, w1, b1, w2):
        return ops.feed_forward(x, w1, b1, w2, recompute=True, impl="torch").sin()

    inputs = make_inputs(9, 24, 40, torch.float32)
    check_compiles(block, inputs, tuple(inputs), make_inputs(11, 24, 40, torch.float32))


def test_epilogue_without_fast_measurement_is_off(epilogues, monkeypatch) -> None:
    assert set(EPILOGUES) == set(KERNELS)
    launched = epilogues(())
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


def test_feed_forward_auto_uses_torch(epilogues) -> None:
    launched = epilogues(KERNELS)
    inputs = make_inputs(19, 24, 40, torch.float32)
    assert torch.equal(ops.feed_forward(**inputs), reference.feed_forward(**inputs))
    assert not launched


def test_feed_forward_bad_input_raises() -> None:
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
        inputs = {"x": x, "w1": w1, "b1": b1, "w2": w2}
        ops.feed_forward(**{name: y.to(DEVICE) for name, y in inputs.items()}, dropout=0.1, impl="triton")
