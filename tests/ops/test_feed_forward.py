"""What only feed_forward has, such as an epilogue in one direction or none; test_ops.py has the rest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, check_compiles, check_traced, inputs, results_and_gradients
from policy import assert_rounding

from mae_ast_fast import ops
from mae_ast_fast.kernels import bias_gelu
from mae_ast_fast.kernels import feed_forward as module
from mae_ast_fast.kernels.common import configs as table
from mae_ast_fast.kernels.common import launch
from mae_ast_fast.kernels.common.configs import EPILOGUES, TABLE
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.cases import op_cases

KERNELS = "feed_forward_forward", "feed_forward_backward"
CASE = op_cases()["feed_forward"]
TILE = CASE.launches[KERNELS[0]]


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


@pytest.mark.parametrize(
    "enabled", [KERNELS, KERNELS[:1], KERNELS[1:], ()], ids=["both", "forward", "backward", "neither"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_each_epilogue_switches_on_separately(
    epilogues, dtype: torch.dtype, enabled: tuple[str, ...]
) -> None:
    launched = epilogues(enabled)
    check(CASE, inputs(CASE, (37, 24, 50), dtype), dtype)
    assert launched == {
        function: 1
        for name, function in zip(KERNELS, (module._forward, module._backward), strict=True)
        if name in enabled
    }


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 60), width=st.integers(8, 40), ffn_dim=st.integers(8, 80), pad=st.integers(0, 3))
def test_feed_forward_any_size_and_row_stride_matches_products(
    epilogues, *, rows: int, width: int, ffn_dim: int, pad: int
) -> None:
    tensors = inputs(CASE, (rows, width, ffn_dim))
    epilogues(())
    expected = results_and_gradients(kernel, tensors, tuple(tensors))
    tensors["x"] = torch.nn.functional.pad(tensors["x"], (0, pad), value=float("nan"))[:, :width]
    epilogues(KERNELS)
    for name, x in results_and_gradients(kernel, tensors, tuple(tensors)).items():
        assert_rounding(x, expected[name], name, grad=name != "output 0")


@pytest.mark.parametrize("slices", [8, 16, 32, 64])
def test_feed_forward_any_number_of_slices_is_bit_equal(epilogues, monkeypatch, slices: int) -> None:
    epilogues(KERNELS)
    tensors = inputs(CASE, (37, 24, 150))
    results = []
    for slice_columns in (64, slices):
        for name in KERNELS:
            monkeypatch.setitem(TABLE, name, [("any", 1 << 30, 4, {**TILE, "BN": 64, "BS": slice_columns})])
        results.append(results_and_gradients(kernel, tensors, tuple(tensors)))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_epilogue_uses_h_as_stored(dtype: torch.dtype) -> None:
    """The forward stores the values that bias_gelu, and so the backward, computes from the stored h."""
    tensors = inputs(CASE, (37, 24, 50), dtype)
    h, a = module.gelu_epilogue(tensors["x"], tensors["w1"].to(dtype), tensors["b1"])
    assert torch.equal(a, bias_gelu.forward(h, tensors["b1"], None, 0.0, 0))


@pytest.mark.parametrize("impl", ["torch", "triton", "epilogues"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_recompute_is_bit_equal_and_saves_one_tensor_less(
    epilogues, dtype: torch.dtype, impl: str
) -> None:
    epilogues(KERNELS if impl == "epilogues" else ())
    tensors = inputs(CASE, (37, 24, 50), dtype)
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
            results.append(results_and_gradients(function, tensors, tuple(tensors)))
        saved.append(sum(sizes.values()))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name
    assert saved == [2 * 37 * 50, 37 * 50]


def test_feed_forward_strided_output_gradient_matches_products(epilogues) -> None:
    """The incoming gradient is transposed and expanded, as the next operation leaves it."""
    tensors = inputs(CASE, (19, 24, 40))
    results = []
    for enabled in (KERNELS, ()):
        epilogues(enabled)
        results.append(results_and_gradients(lambda **x: kernel(**x).T.sum(0), tensors, tuple(tensors)))
    for name, x in results[0].items():
        assert_rounding(x, results[1][name], name, grad=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_without_epilogues_registers_compiles_and_repeats(epilogues, recompute: bool) -> None:
    epilogues(())
    arguments, others = (inputs(CASE, shape) | {"recompute": recompute} for shape in CASE.traced)
    check_traced(CASE, arguments, others)


def test_feed_forward_torch_recompute_compiles() -> None:
    def block(x, w1, b1, w2):
        return ops.feed_forward(x, w1, b1, w2, recompute=True, impl="torch").sin()

    tensors = inputs(CASE, (9, 24, 40))
    check_compiles(block, tensors, tuple(tensors), inputs(CASE, (11, 24, 40)))


def test_epilogue_without_fast_measurement_is_off(epilogues, monkeypatch) -> None:
    assert set(EPILOGUES) == set(KERNELS)
    launched = epilogues(())
    tensors = inputs(CASE, (19, 24, 40))
    arch = launch.architecture(tensors["x"].device)
    monkeypatch.setattr(module, "epilogue", table.epilogue)

    def launches(*rows: tuple) -> list[object]:
        launched.clear()
        for name in KERNELS:
            monkeypatch.setitem(EPILOGUES, name, list(rows))
        results_and_gradients(kernel, tensors, tuple(tensors))
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
    results_and_gradients(kernel, tensors, tuple(tensors))
    assert list(launched) == [module._backward]


def test_feed_forward_auto_uses_torch(epilogues) -> None:
    launched = epilogues(KERNELS)
    tensors = inputs(CASE, (19, 24, 40))
    assert torch.equal(ops.feed_forward(**tensors), reference.feed_forward(**tensors))
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
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2}
        ops.feed_forward(**{name: y.to(DEVICE) for name, y in tensors.items()}, dropout=0.1, impl="triton")
