"""What only gather_patches has; test_ops.py has the rest. Results equal those of the specification to the bit."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check_traced, inputs, randn, results_and_gradients

from mae_ast_fast import ops
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.cases import op_cases
from mae_ast_fast.ops.packing import Packing

CASE = op_cases()["gather_patches"]
SIZES = [(16, 16), (2, 32), (3, 5), (1, 1), (7, 1), (1, 9)]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def pick(batch: int, num_tokens: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(clip, token) of ``count`` different patches in random order."""
    flat = torch.randperm(batch * num_tokens, generator=torch.Generator().manual_seed(seed))[:count].to(DEVICE)
    return flat // max(num_tokens, 1), flat % max(num_tokens, 1)


def check_equal(features: torch.Tensor, differentiable: tuple[str, ...] = ("features",), **others) -> torch.Tensor:
    """Check that values and gradient equal the reference's; returns the values."""
    others = {"mean": scalar(0.0), "scale": scalar(1.0), "dtype": None} | others
    fixed = {name: others.pop(name) for name in ("patch_size", "dtype")}

    def kernel(**inputs) -> torch.Tensor:
        return ops.gather_patches(**inputs, **fixed, impl="triton")

    def expected(**inputs) -> torch.Tensor:
        return reference.gather_patches(**inputs, **fixed)

    tensors = {"features": features, **others}
    results, expected_results = (results_and_gradients(f, tensors, differentiable) for f in (kernel, expected))
    for name, x in expected_results.items():
        assert results[name].dtype == x.dtype and torch.equal(results[name], x), name
    return results["output 0"]


@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_patches_moves_rows_and_gradients_exactly(
    size: tuple[int, int], dtype: torch.dtype, stored_dtype: torch.dtype
) -> None:
    """Clips with some rows, one, none and all of them; a tail frame; mean 0 and scale 1 change no value."""
    kt, kf = size
    features = randn(4, 3 * kt + kt // 2, 2 * kf, dtype=stored_dtype, offset=30.0)
    selected = torch.zeros(4, 6, dtype=torch.bool, device=DEVICE)
    selected[0, [1, 2, 5]], selected[1, 3], selected[3] = True, True, True
    rows = Packing.of(selected)
    out = check_equal(features, clip=rows.clip, token=rows.token, patch_size=size, dtype=dtype)
    assert out.shape == (10, kt * kf) and out.dtype == dtype
    assert torch.equal(out[3], features[1, kt : 2 * kt, kf:].flatten().to(dtype))


@st.composite
def strided(draw, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor (batch, frames, bins) with its dimensions in any order in memory and gaps of NaN between values."""
    order = draw(st.permutations(range(3)))
    steps = [draw(st.integers(1, 2)) for _ in range(3)]
    batch, frames, bins = shape
    storage = torch.full([shape[d] * steps[d] + draw(st.integers(0, 2)) for d in order], float("nan"))
    view = storage.to(DEVICE, dtype).permute([order.index(d) for d in range(3)])
    view = view[: batch * steps[0] : steps[0], : frames * steps[1] : steps[1], : bins * steps[2] : steps[2]]
    view.copy_(randn(*shape, dtype=dtype))
    return view


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gather_patches_any_strides_sizes_and_rows_match_reference(data: st.DataObject) -> None:
    batch, grid_t, grid_f = (data.draw(st.integers(1, 3)) for _ in range(3))
    size = kt, kf = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype, out_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([None, *DTYPES]))
    frames = grid_t * kt + data.draw(st.integers(0, kt - 1))
    features = data.draw(strided((batch, frames, grid_f * kf), dtype))
    count = data.draw(st.integers(0, batch * grid_t * grid_f))
    clip, token = pick(batch, grid_t * grid_f, count, data.draw(st.integers(0, 9)))
    check_equal(
        features,
        mean=scalar(0.3),
        scale=torch.tensor(1.7, device=DEVICE),
        clip=clip,
        token=token,
        patch_size=size,
        dtype=out_dtype,
    )


def test_gather_patches_transposed_view_gives_ssast_layout() -> None:
    """Token = f_block * n_t + t_block, inside a patch f * kt + t."""
    kt, kf, n_t, n_f = 4, 8, 3, 2
    features = randn(2, n_t * kt, n_f * kf)
    clip, token = pick(2, n_t * n_f, 12)
    out = check_equal(features.transpose(1, 2), clip=clip, token=token, patch_size=(kf, kt))
    for row, (b, n) in enumerate(zip(clip.tolist(), token.tolist(), strict=True)):
        f, t = n // n_t * kf, n % n_t * kt
        assert torch.equal(out[row], features[b, t : t + kt, f : f + kf].T.flatten())


def test_gather_patches_expanded_features_and_strided_indices_match_reference() -> None:
    clip, token = torch.stack(pick(3, 6, 18), dim=1).unbind(1)
    assert clip.stride(0) == 2  # columns of one matrix
    clip_features = randn(1, 6, 8)
    check_equal(clip_features.expand(3, 6, 8), (), clip=clip, token=token, patch_size=(2, 4))


def test_gather_patches_writes_nothing_past_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from mae_ast_fast.kernels import gather_patches as module

    features, (clip, token) = randn(1, 6, 10), pick(1, 4, 3)
    buffer = torch.full((3 * 15 + 256,), 77.0, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **_: buffer[: 3 * 15].view(*shape))
        out = module.forward(features, scalar(0.0), scalar(1.0), clip, token, 3, 5, torch.float32)
    expected = reference.gather_patches(features, scalar(0.0), scalar(1.0), clip=clip, token=token, patch_size=(3, 5))
    assert torch.equal(out, expected)
    assert (buffer[3 * 15 :] == 77.0).all()


def test_gather_patches_transposed_view_registers_compiles_and_repeats() -> None:
    arguments, others = (inputs(CASE, shape) for shape in CASE.traced)
    transposed = {"features": randn(2, 8, 7).transpose(1, 2), "dtype": torch.float16}
    check_traced(CASE, arguments | transposed, others | transposed)


def test_gather_patches_reference_gradients_and_arithmetic_are_exact() -> None:
    """impl="torch" differentiates all three; half-precision features are normalised in fp32, fp64 ones in fp64."""
    clip, token = pick(2, 4, 5)
    wide = randn(2, 4, 6).double()
    leaves = [x.double().requires_grad_() for x in (wide, scalar(0.3), scalar(1.7))]

    def gathered(features, mean, scale, *, token=token, **options) -> torch.Tensor:
        return ops.gather_patches(features, mean, scale, clip=clip, token=token, patch_size=(2, 3), **options)

    assert torch.autograd.gradcheck(functools.partial(gathered, impl="torch"), leaves)
    half = wide.half()
    out = gathered(half, scalar(0.3), scalar(1.7))
    assert torch.equal(out, gathered(half, scalar(0.3), scalar(1.7), dtype=torch.float32).half())
    exact = gathered(half, scalar(0.3), scalar(1.7), dtype=torch.float64)
    assert torch.equal(exact.float().double(), exact)  # the values are exact in fp32
    with pytest.raises(IndexError):
        gathered(half, scalar(0.3), scalar(1.7), token=token + 4)


def test_gather_patches_meta_tensors_read_nothing_back() -> None:
    """Tensors without values are enough: nothing waits for a device."""
    index, scalar_on_meta = torch.empty(5, dtype=torch.int64, device="meta"), torch.empty(1, device="meta")
    features = torch.empty(2, 8, 8, device="meta")
    out = ops.gather_patches(
        features,
        scalar_on_meta,
        scalar_on_meta,
        clip=index,
        token=index,
        patch_size=(4, 2),
        dtype=torch.bfloat16,
        impl="triton",
    )
    assert out.shape == (5, 8) and out.dtype == torch.bfloat16 and out.device.type == "meta"


INDEX = torch.zeros(2, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 4)}, r"features must be floating \(B, T, F\), got torch.float32 \(4, 4\)"),
        ({"features": torch.zeros(1, 4, 4, dtype=torch.int64)}, "features must be floating"),
        ({"patch_size": (2, 3)}, r"divide the 4 bins of features, got \(2, 3\)"),
        ({"patch_size": (0, 2)}, "patch_size must be positive"),
        ({"mean": torch.zeros(2)}, r"mean must be one floating element on .*, got torch.float32 \(2,\)"),
        ({"scale": torch.zeros(1, dtype=torch.int64)}, "scale must be one floating element"),
        ({"scale": torch.zeros(1, device="meta")}, "scale must be one floating element on .* on meta"),
        ({"clip": INDEX[None]}, r"clip must be \(N\), got \(1, 2\)"),
        ({"token": INDEX[:1]}, r"token must be \(2\), got \(1,\)"),
        ({"token": INDEX.int()}, "token must be int64, got torch.int32"),
        ({"clip": INDEX.to("meta")}, "clip must be on .*, got meta"),
        ({"dtype": torch.int32}, "dtype must be floating, got torch.int32"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
        ({"impl": "triton", "dtype": torch.float64}, "impl='triton' takes float32, float16 and bfloat16"),
        ({"impl": "triton", "features": torch.zeros(1, 4, 4, device=DEVICE).double()}, "impl='triton' takes float32"),
    ],
)
def test_gather_patches_bad_input_raises(change: dict, message: str) -> None:
    arguments = {
        "features": torch.zeros(1, 4, 4, device=DEVICE),
        "mean": scalar(0.0),
        "scale": scalar(1.0),
        "clip": INDEX,
        "token": INDEX,
        "patch_size": (2, 2),
    }
    with pytest.raises(ValueError, match=message):
        ops.gather_patches(**{**arguments, **change})


@pytest.mark.parametrize("name", ["mean", "scale"])
def test_gather_patches_gradient_of_mean_or_scale_raises(name: str) -> None:
    arguments = {"mean": scalar(0.0), "scale": scalar(1.0)}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for mean and scale: detach them or use impl='torch'"):
        ops.gather_patches(randn(1, 4, 4), **arguments, clip=INDEX, token=INDEX, patch_size=(2, 2), impl="triton")
