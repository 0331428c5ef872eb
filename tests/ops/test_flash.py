"""FlashAttention: on a CPU with stubs of the kernels (flash_stubs.py), on a GPU with the installed kernels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from flash_stubs import SCHEMAS, SIGNATURES, aten_on_cpu, install_package, signature_of
from kernel_checks import check_compiles, compare
from policy import STANDARD_ERRORS, assert_rounding
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.attention import attention, cross_attention, flash
from mae_ast_fast.ops.packing import cumulative

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Backend:
    """A backend to call: a stub on the CPU in fp32, or the real one on a GPU in half precision."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    calls: list[dict[str, Any]] = field(default_factory=list)  # to the stub of a package


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    name, device = request.param.split(" ")
    if device == "cuda":
        if reason := flash.problem(name, torch.device("cuda"), torch.float16):
            pytest.skip(f"{name} {reason}")
        yield Backend(name, device, HALF)
        return
    original = flash.problem

    def problem(name: str, device: torch.device, dtype: torch.dtype, **options: Any) -> str | None:
        """``flash.problem`` for fp16 rows on a CUDA device of any kind."""
        return original(name, torch.device("cuda"), torch.float16, **options)

    if torch.cuda.is_available():  # else left alone: torch.compile may trace a lambda as an operation
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flash, "problem", problem)
    monkeypatch.setattr(flash, "BUILT", True)
    if name == "aten":
        with aten_on_cpu():
            yield Backend(name, device, (torch.float32,))
    else:
        yield Backend(name, device, (torch.float32,), install_package(monkeypatch, name))


def backends(*names: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> pytest.MarkDecorator:
    names = names or tuple(flash.FLASH)
    stubs = [f"{name} cpu" for name in names]
    return pytest.mark.parametrize("backend", stubs + on_gpu(names if "cuda" in devices else ()), indirect=True)


def on_gpu(names: Iterable[str], *cases: str) -> list[Any]:
    """Parameters "name cuda", with each case; without a GPU, one skipped parameter for all of them."""
    parameters = [(f"{name} cuda", case) if cases else f"{name} cuda" for name in names for case in cases or [""]]
    if torch.cuda.is_available() or not parameters:
        return parameters
    values = parameters[0] if cases else parameters[:1]
    return [pytest.param(*values, marks=pytest.mark.skip(reason="needs a CUDA device"), id="cuda")]


def randn(*shape: int, seed: int = 0, like: Backend, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like.device, dtype)


def cu_seqlens_of(counts: list[int], device: str) -> Tensor:
    return cumulative(torch.tensor(counts)).to(device)


# Rows of each clip, query rows of each clip (None: all), heads, values of a head.
SMALL = {
    "equal": ([5, 5, 5], None, 2, 8),
    "one to n": (list(range(1, 20)), None, 1, 16),
    "empty clips": ([0, 3, 0, 0, 7, 1, 0], None, 2, 8),
    "short ones and a longer one": ([1, 2, 3] * 30 + [40], None, 1, 8),
    "some queries": ([5, 9, 1], [2, 9, 1], 2, 8),
    "clips without queries": ([4, 6, 3], [0, 2, 0], 2, 8),
    "one query in clips of 30": ([30, 30], [1, 1], 2, 24),
}
LARGE = {
    "base encoder": ([128] * 8, None, 12, 64),
    "base decoder": ([512] * 4, [384] * 4, 12, 64),
    "1 to 2048": ([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 1000, 2047, 2048], None, 2, 64),
    "1 to 2048, some queries": ([1, 2, 63, 64, 65, 129, 1000, 2048], [1, 0, 63, 1, 33, 128, 3, 1500], 2, 64),
    "thousands of short clips": ([1, 2, 3, 7] * 1000, None, 2, 64),
    "one long clip": ([2048], None, 2, 64),
    "heads of 8": ([40, 100], None, 3, 8),
    "heads of 96": ([40, 100], None, 3, 96),
    "heads of 128": ([40, 100], [7, 100], 2, 128),
}
LARGE |= {f"small: {name}": case for name, case in SMALL.items()}
VALUES = [(f"{name} cpu", case) for case in SMALL for name in flash.FLASH]
VALUES += on_gpu(flash.FLASH, *LARGE)


@pytest.mark.parametrize(("backend", "case"), VALUES, indirect=["backend"])
def test_flash_ragged_clips_equal_reference(backend: Backend, case: str) -> None:
    counts, num_queries, heads, dim = LARGE.get(case) or SMALL[case]
    cu, longest = cu_seqlens_of(counts, backend.device), max(counts)
    for dtype in backend.dtypes:
        if num_queries is None:
            inputs = {"qkv": randn(sum(counts), 3, heads, dim, like=backend, dtype=dtype)}

            def run(qkv: Tensor) -> Tensor:
                return attention(qkv, cu, longest, backend=backend.name)

            def expected(qkv: Tensor) -> Tensor:
                return reference.attention(qkv, cu)

        else:
            inputs = {
                "q": randn(sum(num_queries), heads, dim, like=backend, dtype=dtype),
                "kv": randn(sum(counts), 2, heads, dim, seed=1, like=backend, dtype=dtype),
            }
            boundaries = {
                "cu_q": cu_seqlens_of(num_queries, backend.device),
                "max_q": max(num_queries),
                "cu_kv": cu,
                "max_kv": longest,
            }

            def run(q: Tensor, kv: Tensor) -> Tensor:
                return cross_attention(q, kv, **boundaries, backend=backend.name)  # noqa: B023

            def expected(q: Tensor, kv: Tensor) -> Tensor:
                return reference.cross_attention(q, kv, boundaries["cu_q"], boundaries["cu_kv"])  # noqa: B023

        compare(run, expected, inputs, list(inputs), dtype=dtype, dot=True)


# ---------------------------------------------------------------------------------------------------------- dropout


def with_masks(q: Tensor, kv: Tensor, *, num_queries: list[int], counts: list[int], masks: list[Tensor]) -> Tensor:
    """Attention clip by clip with ``masks`` on the probabilities; differentiable."""
    out = []
    for queries, rows, mask in zip(q.split(num_queries), kv.split(counts), masks, strict=True):
        k, v = rows.permute(1, 2, 0, 3)
        p = (queries.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out.append(((p * mask.to(p.dtype)) @ v).transpose(0, 1))
    return torch.cat(out)


@backends("aten", "fa2")
def test_flash_dropout_forward_and_backward_share_mask(backend: Backend) -> None:
    """Values that are unit vectors reveal the mask; other values and all gradients must use the same one."""
    counts, num_queries, heads, dim, rate = [64, 0, 17, 1, 40], [50, 0, 17, 1, 3], 2, 64, 0.25
    boundaries = {
        "cu_q": cu_seqlens_of(num_queries, backend.device),
        "max_q": max(num_queries),
        "cu_kv": cu_seqlens_of(counts, backend.device),
        "max_kv": max(counts),
    }
    for dtype in backend.dtypes:
        q = randn(sum(num_queries), heads, dim, like=backend, dtype=dtype)
        kv = randn(sum(counts), 2, heads, dim, seed=1, like=backend, dtype=dtype)

        def run(q: Tensor, kv: Tensor, seed: int = 5) -> Tensor:
            torch.manual_seed(seed)
            return cross_attention(q, kv, **boundaries, dropout=rate, backend=backend.name)

        units = torch.cat([torch.eye(dim)[:count] for count in counts]).to(q)[:, None].expand(-1, heads, -1)
        probabilities = run(q, torch.stack((kv[:, 0], units), 1)).split(num_queries)
        kept = [p[..., :count].transpose(0, 1) != 0 for p, count in zip(probabilities, counts, strict=True)]
        share = torch.cat([mask.flatten() for mask in kept]).double()
        assert abs(share.mean() - 0.75) < STANDARD_ERRORS * math.sqrt(0.75 * 0.25 / share.numel())
        assert not torch.equal(kept[0][0], kept[0][1])  # heads differ
        assert not torch.equal(kept[0][:, :17, :17], kept[2])  # and clips differ
        masks = [mask / (1 - rate) for mask in kept]
        inputs = {"q": q, "kv": kv}
        expected = partial(with_masks, num_queries=num_queries, counts=counts, masks=masks)
        compare(run, expected, inputs, ["q", "kv"], dtype=dtype, dot=True)
        assert torch.equal(run(q, kv), run(q, kv)) and not torch.equal(run(q, kv), run(q, kv, 6))


@backends("aten", "fa2")
def test_flash_dropout_mean_of_many_masks_is_unbiased(backend: Backend) -> None:
    """The means of the result and of the gradient over many masks are those without dropout.

    An 8-bit rate of 0.25 is exact. The gradient with respect to values is linear in the mask, as the result is.
    """
    counts, draws = [6, 4], 120
    cu, dtype = cu_seqlens_of(counts * draws, backend.device), backend.dtypes[0]
    qkv_once = randn(sum(counts), 3, 1, 8, like=backend, dtype=dtype)
    qkv = qkv_once.repeat(draws, 1, 1, 1).requires_grad_()
    torch.manual_seed(0)
    out = attention(qkv, cu, 6, 0.25, backend.name)
    results = [out, torch.autograd.grad(out.sum(), qkv)[0][:, 2]]
    exact = qkv_once.double().requires_grad_()
    expected = reference.attention(exact, cu_seqlens_of(counts, backend.device))
    for values, mean in zip(results, [expected, torch.autograd.grad(expected.sum(), exact)[0][:, 2]], strict=True):
        values = values.detach().double().unflatten(0, (draws, -1))
        error = values.std(0) / math.sqrt(draws)
        assert (values.std(0) > 0).all()
        assert ((values.mean(0) - mean).abs() <= STANDARD_ERRORS * error).all()


@backends("fa3", "fa4", devices=("cpu",))
def test_flash_dropout_without_support_raises(backend: Backend) -> None:
    qkv = randn(4, 3, 1, 8, like=backend, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"{backend.name}.*no dropout.*0\.1.*auto"):
        attention(qkv, cu_seqlens_of([4], "cpu"), 4, 0.1, backend.name)


# ------------------------------------------------------------------------------------------------ rows and memory


@backends()
def test_flash_padding_rows_are_zeros_in_results_and_gradients(backend: Backend) -> None:
    """The stubs leave NaN there; on a GPU, memory that held NaN before is likely to be reused."""
    counts, num_queries, extra, dtype = [3, 9, 5], [2, 0, 5], 7, backend.dtypes[0]
    cu, cu_q = cu_seqlens_of([*counts, 0, 0], backend.device), cu_seqlens_of([*num_queries, 0, 0], backend.device)
    dropout = 0.2 if flash.FLASH[backend.name].dropout else 0.0
    qkv = randn(sum(counts) + extra, 3, 2, 8, like=backend, dtype=dtype)
    q = randn(sum(num_queries) + extra, 2, 8, seed=1, like=backend, dtype=dtype)
    incoming = randn(24, 2, 8, seed=2, like=backend, dtype=dtype)

    def run(qkv: Tensor, q: Tensor) -> list[Tensor]:
        if backend.device == "cuda":
            torch.full((1 << 20,), float("nan"), device="cuda")
        qkv, q = (x.detach().clone().requires_grad_() for x in (qkv, q))
        torch.manual_seed(0)
        out = attention(qkv, cu, 12, dropout, backend.name)
        cross_out = cross_attention(
            q,
            qkv[:, 1:],
            cu_q=cu_q,
            max_q=12,
            cu_kv=cu,
            max_kv=12,
            dropout=dropout,
            backend=backend.name,
        )
        weighted = (out * incoming[: len(out)]).sum() + (cross_out * incoming[: len(cross_out)]).sum()
        return [out, cross_out, *torch.autograd.grad(weighted, (qkv, q))]

    without_padding = run(qkv[:17], q[:7])
    for values, expected, num_rows in zip(run(qkv, q), without_padding, (17, 7, 17, 7), strict=True):
        if backend.device == "cpu":
            assert torch.equal(values[:num_rows], expected)
        assert values.shape[0] == num_rows + extra and values[:num_rows].any() and not values[num_rows:].any()


@backends()
@pytest.mark.parametrize("counts", [[], [0, 0], [3, 2]], ids=["no clips", "empty clips", "no queries"])
def test_flash_without_rows_returns_empty_and_zero_gradients(backend: Backend, counts: list[int]) -> None:
    dtype = backend.dtypes[0]
    cu, cu_q = cu_seqlens_of(counts, backend.device), cu_seqlens_of([0] * len(counts), backend.device)
    q = randn(0, 2, 8, like=backend, dtype=dtype).requires_grad_()
    kv = randn(sum(counts), 2, 2, 8, like=backend, dtype=dtype).requires_grad_()
    out = cross_attention(q, kv, cu_q=cu_q, max_q=0, cu_kv=cu, max_kv=max(counts, default=0), backend=backend.name)
    assert out.shape == (0, 2, 8) and out.dtype == dtype
    dq, dkv = torch.autograd.grad(out.sum(), (q, kv))
    assert dq.shape == q.shape and dkv.shape == kv.shape and not dkv.any()
    if not sum(counts):
        qkv = randn(5, 3, 2, 8, like=backend, dtype=dtype).requires_grad_()  # five rows, all of them padding
        out = attention(qkv, cu, 0, backend=backend.name)
        assert not out.any() and not torch.autograd.grad(out.sum(), qkv)[0].any()


@backends()
def test_flash_rows_of_any_strides_equal_contiguous(backend: Backend) -> None:
    counts, dtype = [3, 6, 1], backend.dtypes[0]
    cu = cu_seqlens_of(counts, backend.device)
    whole = randn(10, 3, 2, 8, like=backend, dtype=dtype)
    expected = attention(whole, cu, 6, backend=backend.name)
    shifted, sparse = whole.new_zeros(10, 3, 2, 12), whole.new_zeros(10, 3, 2, 16)
    shifted[..., 3:11], sparse[..., ::2] = whole, whole
    turned = whole.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for name, other in (("shifted", shifted[..., 3:11]), ("sparse", sparse[..., ::2]), ("turned", turned)):
        assert not other.is_contiguous()
        assert torch.equal(attention(other, cu, 6, backend=backend.name), expected), name


def test_loadable_slices_of_qkv_are_not_copied() -> None:
    for x in torch.zeros(5, 3, 2, 8).unbind(1):
        assert flash._loadable(x).data_ptr() == x.data_ptr()


# ------------------------------------------------------------------------------------------------------ interfaces


@pytest.mark.parametrize("torch_version", SCHEMAS)
def test_aten_calls_match_schemas_of_each_torch(torch_version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Called(Exception):
        pass

    def spy(**kwargs: Any) -> None:
        calls.append(kwargs)
        raise Called

    packets = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    for packet in packets:
        assert packet.default  # creates the attribute
        monkeypatch.setattr(packet, "default", spy)
    q, cu, state = torch.zeros(4, 1, 8), cu_seqlens_of([4], "cpu"), torch.zeros(2)
    with pytest.raises(Called):
        flash.forward(q, q, q, cu, cu, 4, 4, 0.1, 1.0)
    with pytest.raises(Called):
        flash.backward(q, q, q, q, q, state, cu, cu, 4, 4, 0.1, state, state, 1.0)
    for text, keywords, returns in zip(SCHEMAS[torch_version], calls, (5, 3), strict=True):
        schema = torch._C.parse_schema(text)
        assert set(keywords) <= {argument.name for argument in schema.arguments}
        assert set(keywords) >= {a.name for a in schema.arguments if not a.has_default_value()}
        assert len(schema.returns) == returns


def test_aten_schemas_recorded_equal_installed_torch() -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in SCHEMAS:
        pytest.skip(f"no schema recorded of torch {version}")
    packets = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    for text, packet in zip(SCHEMAS[version], packets, strict=True):
        assert torch._C.parse_schema(text) == packet.default._schema


@backends("fa2", "fa3", "fa4", devices=("cpu",))
def test_flash_packages_receive_only_documented_keywords(backend: Backend) -> None:
    cu_q, cu_kv = cu_seqlens_of([2, 1], "cpu"), cu_seqlens_of([4, 3], "cpu")
    cross_attention(torch.zeros(3, 1, 8), torch.zeros(7, 2, 1, 8), cu_q, 2, cu_kv, 4, backend=backend.name)
    (call,) = backend.calls
    assert call.pop("cu_seqlens_q") is cu_q and call.pop("cu_seqlens_k") is cu_kv
    assert (call.pop("max_seqlen_q"), call.pop("max_seqlen_k")) == (2, 4)
    assert call.pop("softmax_scale") == 8**-0.5 and call.pop("dropout_p", 0.0) == 0.0
    assert set(call) == {"q", "k", "v"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_flash_installed_package_has_recorded_parameters(name: str) -> None:
    try:
        real = flash._package_function(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name} is not installed: {error}")
    parameters = inspect.signature(real).parameters
    recorded = signature_of(SIGNATURES[name]).parameters
    used = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
    assert used <= set(parameters)
    assert {x for x, p in parameters.items() if p.default is p.empty} <= used
    assert "dropout_p" not in recorded or "dropout_p" in parameters


def arguments(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of ``flash.forward_op`` without padding rows, whose log-sum-exp is undefined."""
    q, k, v = (torch.randn(rows, 2, 8, device=device, dtype=dtype) for rows in (5, 8, 8))
    cu_q, cu_kv = cu_seqlens_of([2, 3], device), cu_seqlens_of([4, 4], device)
    return *(x.requires_grad_() for x in (q, k, v)), cu_q, cu_kv, 3, 4, 0.0, 8**-0.5


@backends("aten", devices=("cpu",))
def test_flash_operators_pass_registration_checks(backend: Backend) -> None:
    forward_arguments = arguments("cpu", torch.float32)
    torch.library.opcheck(flash.forward_op, forward_arguments)
    q, k, v, *boundaries, dropout, scale = (x.detach() if isinstance(x, Tensor) else x for x in forward_arguments)
    out, lse, rng_state, unused = flash.forward_op(q, k, v, *boundaries, dropout, scale)
    backward_arguments = torch.ones_like(q), q, k, v, out, lse, *boundaries, dropout, rng_state, unused, scale
    torch.library.opcheck(flash.backward_op, backward_arguments)


@backends("aten")
def test_flash_compiles_to_one_graph(backend: Backend) -> None:
    cu, cu_q = cu_seqlens_of([3, 6, 1], backend.device), cu_seqlens_of([1, 3, 1], backend.device)
    inputs = {
        "qkv": randn(13, 3, 2, 8, like=backend, dtype=backend.dtypes[0]),
        "q": randn(8, 2, 8, like=backend, dtype=backend.dtypes[0]),
    }

    def function(qkv: Tensor, q: Tensor) -> Tensor:
        cross_out = cross_attention(q, qkv[:, 1:], cu_q=cu_q, max_q=3, cu_kv=cu, max_kv=6, backend=backend.name)
        return torch.cat((attention(qkv, cu, 6, backend=backend.name), cross_out))

    fewer = {name: x[:-1] for name, x in inputs.items()}  # another row count: sizes are symbols
    check_compiles(function, inputs, list(inputs), fewer)


@backends("aten")
def test_flash_two_equal_calls_in_one_graph_draw_two_masks(backend: Backend) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("torch 2.11 uses a fixed list of PyTorch's own random operations and ignores the tags of others")
    cu, qkv = cu_seqlens_of([8] * 4, backend.device), randn(32, 3, 2, 8, like=backend, dtype=backend.dtypes[0])

    def twice(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return attention(qkv, cu, 8, 0.5, backend.name), attention(qkv, cu, 8, 0.5, backend.name)

    # The partitioner of this backend merges equal nodes, as inductor does.
    first, second = torch.compile(twice, fullgraph=True, backend="aot_eager_decomp_partition")(qkv.requires_grad_())
    assert not torch.equal(first, second)


def test_flash_cuda_tensors_without_gpu_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "BUILT", True)
    with FakeTensorMode():
        qkv = torch.empty(20, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
        cu = torch.empty(4, dtype=torch.int32, device="cuda")
        out = attention(qkv, cu, 8, 0.1)
    assert (out.shape, out.dtype, out.device.type) == ((20, 2, 64), torch.bfloat16, "cuda")
    assert out.is_contiguous()
    inputs = arguments("meta", torch.float16)

    def gradients_of(*args: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flash.forward_op(*args)[0].sum(), args[:3])

    traced = make_fx(gradients_of)
    grads = gradients_of(*inputs)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in inputs[:3]]
    targets = [str(node.target) for node in traced(*inputs).graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "flash" in name] == [
        "mae_ast_fast.flash_attention.default",
        "mae_ast_fast.flash_attention_backward.default",
    ]


# ------------------------------------------------------------------------------------------------------- in a model


@backends("aten", "fa2", devices=("cpu",))
def test_model_with_flash_attention_trains_as_with_math(backend: Backend) -> None:
    """Covers the encoder, the decoder and its last layer, which computes masked tokens only."""
    config = MAEASTConfig(
        num_mel_bins=16, patch_size=(4, 8), embed_dim=16, decoder_embed_dim=16, num_heads=2, ffn_dim=32,
        encoder_layers=2, decoder_layers=2,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, encoder_layerdrop=0.0,
    )  # fmt: skip
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("math", backend.name):
        torch.manual_seed(0)
        model = MAEAST(config, attention=name).train()
        torch.manual_seed(1)
        loss = model(x, lengths=torch.tensor([40, 17, 8])).loss
        loss.backward()
        results.append({"loss": loss, **{key: p.grad for key, p in model.named_parameters()}})
    for key, expected in results[0].items():
        assert_rounding(results[1][key], expected, key, grad=True)
