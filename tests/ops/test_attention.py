"""Every attention backend compared with reference.py in fp64, forward and gradients, for ragged batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy import ATTENTION_EPS, STANDARD_ERRORS, assert_kernel, assert_rounding, max_rel
from torch.utils._python_dispatch import TorchDispatchMode

from mae_ast_fast import MAEAST, MAEASTConfig, ops
from mae_ast_fast.ops import attention as module
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.attention import BACKENDS, attention, choose_backend, cross_attention, flash
from mae_ast_fast.ops.attention import cpu as clip_attention
from mae_ast_fast.ops.packing import cumulative

PLAIN = ("clips", "sdpa", "math")  # the kernel behind "short" and FlashAttention (test_flash.py) have their own tests

LENGTHS = {
    "equal": [5, 5, 5],
    "one to n": list(range(1, 20)),
    "n to one": list(range(19, 0, -1)),
    "empty clips": [0, 3, 0, 0, 7, 1, 0],
    "single rows": [1, 1, 1, 1],
    "one clip": [37],
    "one long": [1, 2, 300, 1],
    "thousands of short ones and a longer one": [1, 2, 3] * 800 + [40],
}


def rows(counts: list[int], heads: int = 2, dim: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(counts))
    return torch.randn(sum(counts), 3, heads, dim, generator=generator).to(dtype)


def call(qkv: torch.Tensor, counts: list[int], backend: str, dropout: float = 0.0) -> torch.Tensor:
    return attention(qkv, cumulative(torch.tensor(counts)), max(counts), dropout, backend)


def specified(qkv: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return reference.attention(qkv, cumulative(torch.tensor(counts)))


@pytest.mark.parametrize("counts", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", PLAIN)
def test_attention_ragged_clips_equal_reference(backend: str, counts: list[int]) -> None:
    qkv = rows(counts).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weight = torch.randn(sum(counts), 2, 4, generator=torch.Generator().manual_seed(1))
    out, expected = call(qkv, counts, backend), specified(exact, counts)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert out.dtype == torch.float32
    assert_rounding(out, expected, "output")
    assert_rounding(qkv.grad, exact.grad, "gradient", grad=True)


@pytest.mark.parametrize("backend", PLAIN)
def test_attention_each_clip_sees_only_itself(backend: str) -> None:
    counts = [3, 5, 2]
    qkv = rows(counts).requires_grad_()
    call(qkv, counts, backend)[3:8].sum().backward()
    assert not qkv.grad[:3].any() and not qkv.grad[8:].any() and qkv.grad[3:8].any()
    poisoned = qkv.detach().clone()
    poisoned[:3] = float("nan")
    assert torch.equal(call(poisoned, counts, backend)[3:], call(qkv.detach(), counts, backend)[3:])


@pytest.mark.parametrize("backend", PLAIN)
def test_attention_large_scores_and_equal_keys_are_accurate(backend: str) -> None:
    counts = [4, 2]
    large = rows(counts) * 100
    assert_rounding(call(large.double(), counts, backend), specified(large.double(), counts))
    assert call(large, counts, backend).isfinite().all()
    equal = torch.zeros(6, 3, 2, 4)
    equal[:, 2] = rows(counts)[:, 2]
    means = torch.cat([clip.mean(0, keepdim=True).expand_as(clip) for clip in equal[:, 2].split(counts)])
    assert_rounding(call(equal, counts, backend), means)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_any_dtype_is_kept(backend: str, dtype: torch.dtype) -> None:
    counts = [3, 6, 1]
    out = call(rows(counts, dtype=dtype), counts, backend)
    assert out.dtype == dtype
    expected = specified(rows(counts, dtype=dtype).double(), counts)
    assert max_rel(out, expected) <= ATTENTION_EPS * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", PLAIN)
def test_attention_non_contiguous_qkv_equals_contiguous(backend: str) -> None:
    counts = [3, 6, 1]
    wide = torch.cat((rows(counts), rows(counts)), dim=3)
    assert not wide[..., :4].is_contiguous()
    assert torch.equal(call(wide[..., :4], counts, backend), call(rows(counts), counts, backend))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("counts", [[300, 300], [100, 300]])
def test_attention_dropout_applies_to_probabilities(backend: str, counts: list[int]) -> None:
    """With uniform probabilities and values of 1, a row's output counts its kept keys."""
    qkv = torch.zeros(sum(counts), 3, 1, 4, dtype=torch.float64)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = call(qkv, counts, backend, dropout=0.25)
    first = 0
    for count in counts:
        kept = out[first : first + count, 0, 0] * count * 0.75
        assert_rounding(kept, kept.round(), "kept keys")
        share = kept.sum().item() / count**2
        assert abs(share - 0.75) < STANDARD_ERRORS * math.sqrt(0.25 * 0.75) / count
        assert kept.unique().numel() > 10
        first += count
    torch.manual_seed(0)
    assert torch.equal(out, call(qkv, counts, backend, dropout=0.25))
    assert torch.equal(call(qkv, counts, backend), call(qkv, counts, backend, dropout=0.0))


def test_sdpa_unequal_clips_pad_at_most_one_row_per_real_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of any length mix with at most one padded row for each real one."""
    padded: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        padded.append(q.shape[0] * q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for counts in ([1] * 100 + [200], [200, 3, 0, 7], list(range(1, 60)), [5, 5, 5]):
        padded.clear()
        assert_rounding(call(rows(counts), counts, "sdpa"), specified(rows(counts).double(), counts))
        assert sum(counts) <= sum(padded) <= 2 * sum(counts)


QUERIES = {
    "some": ([5, 9, 1], [2, 9, 1]),
    "clips without queries": ([4, 6, 3], [0, 2, 0]),
    "empty clips": ([0, 6, 0, 3], [0, 1, 0, 3]),
    "unlike lengths": ([1] * 40 + [70], [1, 0] * 20 + [33]),
}


@pytest.mark.parametrize(("counts", "num_queries"), QUERIES.values(), ids=QUERIES.keys())
@pytest.mark.parametrize("backend", (*PLAIN, "short"))
def test_cross_attention_subset_of_queries_equals_attention_there(
    backend: str, counts: list[int], num_queries: list[int]
) -> None:
    """Equal to attention of all rows at the query rows, forward and gradients."""
    qkv = rows(counts).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    first = [0, *torch.tensor(counts).cumsum(0).tolist()]
    query_rows = torch.cat(
        [
            start + torch.randperm(count, generator=generator)[:queries].sort().values
            for start, count, queries in zip(first, counts, num_queries, strict=False)
        ]
    )
    out = cross_attention(
        qkv[:, 0][query_rows],
        qkv[:, 1:],
        cu_q=cumulative(torch.tensor(num_queries)),
        max_q=max(num_queries),
        cu_kv=cumulative(torch.tensor(counts)),
        max_kv=max(counts),
        backend=backend,
    )
    expected = specified(exact, counts)[query_rows]
    weight = torch.randn(out.shape, generator=generator)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_rounding(out, expected, "output")
    assert_rounding(qkv.grad, exact.grad, "gradient", grad=True)


@pytest.mark.parametrize("counts", LENGTHS.values(), ids=LENGTHS.keys())
def test_short_backend_long_clips_skip_kernel(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(ops, "short_attention", lambda qkv, *args, **impl: calls.append(args) or qkv[:, 0])
    call(rows(counts), counts, "short")
    assert len(calls) == (max(counts) <= 128)


# ----------------------------------------------------------------------------------------------------------- choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the compute capability of a CUDA device with PyTorch's FlashAttention and without packages."""

    def set_capability(major: int, minor: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(flash, "BUILT", True)
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    set_capability(9, 0)
    return set_capability


def test_choose_backend_auto_half_precision_gpu_is_flash_attention(gpu: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for shape in ({}, {"max_seqlen": 128, "head_dim": 64}, {"max_seqlen": 2048, "head_dim": 256, "dropout": 0.1}):
            for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
                major, minor = capability
                gpu(major, minor)
                name, reason = choose_backend("auto", "cuda", dtype=dtype, **shape)
                assert name == "aten" and "FlashAttention-2" in reason and "not yet run on a GPU" in reason


def test_choose_backend_auto_without_flash_attention_is_sdpa(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"dtype": torch.bfloat16}
    cases = [("mps", half, "got mps")]
    cases += [("cuda", {"dtype": dtype}, f"got {dtype}") for dtype in (torch.float32, torch.float64)]
    cases += [("cuda", {**half, "head_dim": dim}, f"got {dim}") for dim in (4, 60, 264)]
    for device, options, expected in cases:
        name, reason = choose_backend("auto", device, **options)
        assert name == "sdpa" and reason.endswith(expected), reason
    gpu(7, 5)
    assert choose_backend("auto", "cuda:0", **half)[1].endswith("needs compute capability 8.0 or newer, got 7.5")
    gpu(9, 0)
    monkeypatch.setattr(flash, "BUILT", False)
    assert choose_backend("auto", "cuda", **half)[0] == "sdpa"
    monkeypatch.setattr(flash, "BUILT", True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_backend("auto", "cuda", **half)[0] == "sdpa"


def test_choose_backend_auto_measured_shape_is_short(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MEASURED_SHORT == ()  # none is committed; remove this line with the first one
    monkeypatch.setattr(module, "MEASURED_SHORT", (((9, 0), 96, 64),))
    half, shape = {"dtype": torch.bfloat16}, {"max_seqlen": 96, "head_dim": 64}
    assert choose_backend("auto", "cuda", **half, **shape)[0] == "short"
    for other in ({"max_seqlen": 97}, {"head_dim": 32}, {"max_seqlen": None}, {"dtype": torch.float32}):
        assert choose_backend("auto", "cuda", **{**half, **shape, **other})[0] != "short"
    gpu(8, 0)
    assert choose_backend("auto", "cuda", **half, **shape)[0] == "aten"


def test_choose_backend_explicit_name_is_kept(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda", "mps"):
        for name in ("sdpa", "math", "short"):
            assert choose_backend(name, device) == (name, "requested by name")
    assert choose_backend("clips", "cpu") == ("clips", "requested by name")
    for name in flash.FLASH:
        if full := flash.FLASH[name].module:
            package = SimpleNamespace(flash_attn_varlen_func=print)
            monkeypatch.setitem(sys.modules, full.partition(".")[0], package)
            monkeypatch.setitem(sys.modules, full, package)
        assert choose_backend(name, "cuda", dtype=torch.float16)[0] == name


def test_choose_backend_short_with_large_shape_is_auto(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"dtype": torch.bfloat16}
    assert choose_backend("short", "cuda", max_seqlen=128, head_dim=128, **half)[0] == "short"
    for shape in ({"max_seqlen": 129, "head_dim": 64}, {"max_seqlen": 5, "head_dim": 136}):
        name, reason = choose_backend("short", "cuda", **shape, **half)
        assert name == "aten" and "128" in reason and "FlashAttention-2" in reason
        assert choose_backend("short", "cpu", **shape, **half)[0] == "clips"


def test_cross_attention_short_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr(module, "choose_backend", lambda name, *args, **shape: names.append(name) or ("sdpa", ""))
    cu = torch.tensor([0, 2], dtype=torch.int32)
    for name in ("auto", "short", "math"):
        cross_attention(torch.zeros(2, 1, 8), torch.zeros(2, 2, 1, 8), cu, 2, cu, 2, backend=name)
    assert names == ["auto", "auto", "math"]


@pytest.mark.parametrize(
    ("name", "capability", "options", "words"),
    [
        *[(name, (9, 0), {"device": "cpu"}, ["CUDA device", "got cpu"]) for name in flash.FLASH],
        *[(name, (9, 0), {"dtype": torch.float32}, ["float16 and bfloat16", "float32"]) for name in flash.FLASH],
        *[(name, (9, 0), {"head_dim": 12}, ["multiple of 8", "256", "got 12"]) for name in flash.FLASH],
        *[(name, (9, 0), {"head_dim": 264}, ["multiple of 8", "256", "got 264"]) for name in flash.FLASH],
        ("fa3", (9, 0), {"dropout": 0.1}, ["no dropout", "0.1"]),
        ("fa4", (9, 0), {"dropout": 0.1}, ["no dropout", "0.1"]),
        ("aten", (7, 5), {}, ["8.0", "got 7.5"]),
        ("fa2", (7, 5), {}, ["8.0", "got 7.5"]),
        ("fa3", (8, 0), {}, ["9.0", "got 8.0"]),
        ("fa3", (10, 0), {}, ["9.0", "got 10.0"]),
        ("fa4", (8, 6), {}, ["9.0", "got 8.6"]),
        ("fa2", (8, 0), {}, ["flash_attn.flash_attn_varlen_func", "pip install flash-attn"]),
        ("fa3", (9, 0), {}, ["flash_attn_interface.flash_attn_varlen_func", "hopper"]),
        ("fa4", (9, 0), {}, ["flash_attn.cute.flash_attn_varlen_func", "pip install --pre flash-attn-4"]),
    ],
)
def test_choose_backend_unsupported_flash_attention_raises(
    gpu: Any, name: str, capability: tuple[int, int], *, options: dict[str, Any], words: list[str]
) -> None:
    major, minor = capability
    gpu(major, minor)
    arguments = {"device": "cuda", "dtype": torch.float16, "head_dim": 64, **options}
    with pytest.raises(ValueError) as caught:
        choose_backend(name, arguments.pop("device"), **arguments)
    assert all(word in str(caught.value) for word in (*words, repr(name), "use attention='auto'"))


@pytest.mark.parametrize("name", flash.FLASH)
def test_model_flash_attention_on_cpu_raises_when_called(name: str) -> None:
    """Building it does not raise: a model may be built on a CPU and moved."""
    sizes = {"num_mel_bins": 8, "patch_size": (4, 4), "embed_dim": 16, "decoder_embed_dim": 16, "num_heads": 2}
    model = MAEAST(MAEASTConfig(**sizes, encoder_layers=1, decoder_layers=1, ffn_dim=16), attention=name)
    with pytest.raises(ValueError, match=f"attention='{name}' needs a CUDA device, got cpu; use attention='auto'"):
        model(torch.zeros(1, 16, 8))


# ----------------------------------------------------------------------------------------------------------- errors


def test_attention_unknown_backend_raises_and_lists_choices() -> None:
    for run in (lambda: choose_backend("flashy", "cpu"), lambda: call(rows([2]), [2], "flashy")):
        with pytest.raises(ValueError) as caught:
            run()
        assert all(word in str(caught.value) for word in ("auto", *BACKENDS, "'flashy'"))


QKV, CU = torch.zeros(4, 3, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
Q, KV = QKV[:, 0], QKV[:, 1:]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: attention(KV, CU, 4), ["(N, 3, H, Dh)", "(4, 2, 1, 8)"]),
        (lambda: attention(QKV, CU.long(), 4), ["cu_seqlens", "int32", "torch.int64 (2,)"]),
        (lambda: attention(QKV, CU[None], 4), ["cu_seqlens", "(B + 1,)", "(1, 2)"]),
        (lambda: attention(QKV, CU.to("meta"), 4), ["cu_seqlens", "on cpu", "meta"]),
        (lambda: attention(QKV, CU, 4, 1.0), ["dropout", "[0, 1)", "1.0"]),
        (lambda: attention(QKV, CU, 4, -0.1), ["dropout", "[0, 1)", "-0.1"]),
        (lambda: cross_attention(Q, QKV, CU, 4, CU, 4), ["(N, 2, H, Dh)", "(4, 3, 1, 8)"]),
        (lambda: cross_attention(Q[..., :4], KV, CU, 4, CU, 4), ["(Nq, H, Dh)", "(4, 1, 4)"]),
        (lambda: cross_attention(Q.half(), KV, CU, 4, CU, 4), ["one dtype and device", "float16", "float32"]),
        (lambda: cross_attention(Q, KV, CU, 4, CU.long(), 4), ["cu_kv", "int32", "int64"]),
        (lambda: cross_attention(Q, KV, CU, 4, CU[:1], 4), ["same clips", "1 and 0"]),
        (lambda: cross_attention(Q, KV, CU, 4, CU, 4, 1.5), ["dropout", "1.5"]),
    ],
)
def test_attention_invalid_argument_raises_and_names_it(run: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_choose_backend_auto_on_cpu_is_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced graph, which reads no lengths, gets "math" or "sdpa" instead."""
    halves, wide = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    cases = [(dtype, rate) for dtype in (*halves, *wide) for rate in (0.0, 0.1)]
    names = {case: choose_backend("auto", "cpu", dtype=case[0], dropout=case[1])[0] for case in cases}
    assert set(names.values()) == {"clips"}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    names = {case: choose_backend("auto", "cpu", dtype=case[0], dropout=case[1])[0] for case in cases}
    assert names == {(dtype, rate): "math" if rate and dtype in halves else "sdpa" for dtype, rate in cases}


def test_choose_backend_clips_without_cpu_raises_and_names_alternative() -> None:
    for device in ("cuda", "mps", "meta"):
        with pytest.raises(ValueError, match=f"'clips' needs a CPU and eager mode, got {device}; use attention='auto'"):
            choose_backend("clips", device)
    cu = cumulative(torch.tensor([2, 3]))
    with pytest.raises(Exception, match="needs a CPU and eager mode, got a graph that torch"):
        torch.compile(lambda qkv: attention(qkv, cu, 3, 0.0, "clips"), fullgraph=True, backend="eager")(rows([2, 3]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_auto_in_traced_graph_equals_reference(dropout: float) -> None:
    qkv = rows([2, 3], dtype=torch.bfloat16)
    cu = cumulative(torch.tensor([2, 3]))
    traced = torch.compile(lambda x: attention(x, cu, 3, dropout), fullgraph=True, backend="aot_eager")
    out = traced(qkv)
    assert out.isfinite().all() and out.dtype == torch.bfloat16
    if not dropout:
        assert max_rel(out, specified(qkv.double(), [2, 3])) <= ATTENTION_EPS * torch.finfo(qkv.dtype).eps


# ---------------------------------------------------------------------------------------------------- clip by clip

MIXED = [5, 5, 5, 0, 16, 1, 9, 16, 2, 3, 15]


@pytest.fixture(
    params=[clip_attention.BLOCK, 200, 40], ids=["in one block", "some heads per block", "some rows per block"]
)
def block(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(clip_attention, "BLOCK", request.param)
    return request.param


def masked_loop(qkv: torch.Tensor, counts: list[int], masks: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Attention clip by clip with (H, S, S) bool ``masks`` on the probabilities, in the dtype of ``qkv``."""
    out = []
    for clip, mask in zip(qkv.split(counts), masks, strict=True):
        q, k, v = clip.permute(1, 2, 0, 3)
        p = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1, torch.promote_types(q.dtype, torch.float32))
        out.append((((p.to(q.dtype) * mask) @ v) * scale).transpose(0, 1))
    return torch.cat(out)


def seeded(qkv: torch.Tensor, counts: list[int], dropout: float) -> torch.Tensor:
    torch.manual_seed(3)
    return call(qkv, counts, "clips", dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clip_attention_dropout_gradients_use_forward_mask(block: int, dtype: torch.dtype) -> None:
    """Values that are unit vectors reveal the mask, which depends only on the seed and the lengths."""
    rate, scale = 0.3, 65536 / (65536 - round(0.3 * 65536))
    qkv = rows(MIXED, dim=16, dtype=dtype)
    unit_values = qkv.clone()
    unit_values[:, 2] = torch.cat([torch.eye(count, 16) for count in MIXED])[:, None]
    masks = [clip.transpose(0, 1)[..., : len(clip)] != 0 for clip in seeded(unit_values, MIXED, rate).split(MIXED)]
    assert 0 < sum(int(mask.sum()) for mask in masks) < sum(mask.numel() for mask in masks)

    weight = torch.randn(sum(MIXED), 2, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    results = []
    for x, run in [
        (qkv.clone(), lambda x: seeded(x, MIXED, rate)),
        (qkv.clone(), lambda x: masked_loop(x, MIXED, masks, scale)),
        (qkv.double(), lambda x: masked_loop(x, MIXED, masks, scale)),
    ]:
        out = run(x.requires_grad_())
        out.backward(weight.to(out.dtype))
        results.append((out, x.grad))
    ours, same, exact = results
    if dtype == torch.float32:
        assert_rounding(ours[0], exact[0], "output")
        assert_rounding(ours[1], exact[1], "gradient", grad=True)
    for name, k, t, r in zip(("output", "gradient"), ours, same, exact, strict=True):
        assert_kernel(k, t, r, dtype, name=name, dot=True)


def test_clip_attention_any_block_size_equals_reference(block: int) -> None:
    """Also in half precision, where the gradients of the blocks of a long clip are summed in fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        qkv = rows(MIXED, dim=16, dtype=dtype).requires_grad_()
        exact = qkv.detach().double().requires_grad_()
        out, expected = call(qkv, MIXED, "clips"), specified(exact, MIXED)
        out.sum().backward()
        expected.sum().backward()
        same = qkv.detach().clone().requires_grad_()
        same_out = specified(same, MIXED)
        same_out.sum().backward()
        assert_kernel(out, same_out, expected, dtype, name="output", dot=True)
        assert_kernel(qkv.grad, same.grad, exact.grad, dtype, name="gradient", dot=True)


def test_clip_attention_dropout_with_subset_of_queries_is_consistent() -> None:
    """Outputs count the kept keys, and gradients of values the queries that kept a key."""
    counts, num_queries = [300, 40, 200], [100, 0, 150]
    q, kv = torch.zeros(250, 1, 4, dtype=torch.float64), torch.zeros(540, 2, 1, 4, dtype=torch.float64)
    kv[:, 1] = 1.0
    kv.requires_grad_()
    out = cross_attention(
        q,
        kv,
        cu_q=cumulative(torch.tensor(num_queries)),
        max_q=150,
        cu_kv=cumulative(torch.tensor(counts)),
        max_kv=300,
        dropout=0.25,
        backend="clips",
    )
    out.sum().backward()
    for o, g, count in zip(out.split(num_queries), kv.grad.split(counts), counts, strict=True):
        kept = o[:, 0, 0] * count * 0.75
        assert_rounding(kept, kept.round(), "kept keys of a query")
        kept_for = g[:, 1, 0, 0] * count * 0.75
        assert_rounding(kept_for, kept_for.round(), "queries that kept a key")
        assert kept.sum().round() == kept_for.sum().round() <= 0.8 * kept.numel() * count
    assert not kv.grad[300:340].any()


def test_clip_attention_seed_and_rate_determine_output() -> None:
    counts = [40, 7, 40]
    qkv = rows(counts)
    first = seeded(qkv, counts, 0.1)
    assert torch.equal(first, seeded(qkv, counts, 0.1))
    assert not torch.equal(first, call(qkv, counts, "clips", 0.1))
    assert torch.equal(seeded(qkv, counts, 1e-6), call(qkv, counts, "clips"))  # a rate that rounds to 0 drops nothing
    assert call(qkv, counts, "clips", 1 - 1e-9).isfinite().all()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    call(qkv, counts, "clips")
    assert torch.equal(state, torch.get_rng_state())


def test_clip_attention_padding_rows_are_zero() -> None:
    counts = [4, 0, 6]
    qkv = torch.cat((rows(counts), torch.full((3, 3, 2, 4), float("nan")))).requires_grad_()
    out = call(qkv, counts, "clips", 0.1)
    out.nansum().backward()
    assert not out[10:].any() and not qkv.grad[10:].any()
    assert out[:10].isfinite().all() and qkv.grad.isfinite().all() and qkv.grad[:10, 2].any()
    for empty in ([0, 0], [0]):
        x = torch.zeros(0, 3, 2, 4, requires_grad=True)
        call(x, empty, "clips").sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("counts", "max_groups"),
    [
        ([124] * 32, 4),
        ([200] * 20, 20),
        ([1, 2, 3] * 800 + [40], 3),
        (list(range(10, 60)) * 4, 10),
        ([900, 3, 2000], 3),
    ],
)
def test_length_groups_any_lengths_have_little_padding(counts: list[int], max_groups: int) -> None:
    """Each clip is in one group, few groups cover all, and a group fits a block unless it is one clip."""
    cu = cumulative(torch.tensor(counts))
    groups = clip_attention.length_groups(cu, cu, 6)
    assert len(groups) <= max_groups and sum(group.num_clips for group in groups) == len(counts)
    rows_of = torch.zeros(sum(counts), dtype=torch.int64)
    for group in groups:
        index, valid = group.kv.index, group.kv.valid
        index = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
        size = 6 * group.num_clips * (len(index) // group.num_clips) ** 2
        assert group.num_clips == 1 or size <= clip_attention.BLOCK
        each = len(index) // group.num_clips if valid is None else valid.sum(1)
        kept = 6 * (each**2 * group.num_clips if valid is None else int(each.square().sum()))
        assert size - kept <= clip_attention.MAX_PADDING
        rows_of[index if valid is None else index[valid.flatten()]] += 1
    assert (rows_of == 1).all()


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "num_heads", "groups"),
    [
        ([], [], 1, []),
        ([5, 5, 5], [5, 5, 5], 1, [[0, 1, 2]]),
        ([2, 40, 3], [2, 40, 3], 2, [[1, 2, 0]]),  # little padding, most keys first
        ([1, 3, 2, 3], [6, 6, 6, 6], 2, [[1, 3, 2, 0]]),  # of equal keys, most queries first
        ([0, 4, 7, 0], [4, 0, 7, 0], 1, [[2]]),  # clips without queries or keys
        ([300, 10, 9], [300, 10, 9], 1, [[0], [1, 2]]),  # 10 of 300 rows would be padding
        ([10, 300], [300, 300], 1, [[1], [0]]),  # here in the queries only
        ([120, 100], [120, 100], 4, [[0, 1]]),  # 4 (2 * 120^2 - 120^2 - 100^2) = 17,600 padded elements
        ([120, 100], [120, 100], 8, [[0], [1]]),  # 35,200
        ([512] * 5, [512] * 5, 1, [[0, 1, 2, 3], [4]]),  # four matrices fill a block
        ([512] * 5, [512] * 5, 2, [[0, 1], [2, 3], [4]]),
        ([3000, 3000], [3000, 3000], 1, [[0], [1]]),  # a clip above the limit is alone
    ],
)
def test_group_by_length_counts_give_groups(
    *, num_queries: list[int], num_keys: list[int], num_heads: int, groups: list[list[int]]
) -> None:
    assert clip_attention.group_by_length(num_queries, num_keys, num_heads) == groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_store_keep_mask_in_sign_bit_keeps_probabilities_and_mask(dtype: torch.dtype) -> None:
    p = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    p[0, 0] = 0.0
    keep = torch.arange(105).view(3, 7, 5) % 3 > 0
    stored = p.clone()
    clip_attention.store_keep_mask_in_sign_bit(stored, keep.to(torch.int16))
    assert torch.equal(stored.abs(), p) and torch.equal(stored.clamp(min=0), p * keep)
    assert torch.equal(stored.signbit(), ~keep) and torch.equal(stored[p > 0] >= 0, keep[p > 0])


class TensorSizes(TorchDispatchMode):
    """Records the number of elements of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.sizes.append(out.untyped_storage().nbytes() // out.element_size())
        return out


def test_clip_attention_long_clip_allocates_only_probabilities() -> None:
    qkv = rows([2048], heads=1, dim=8, dtype=torch.bfloat16)
    for keep in (False, True):
        with TensorSizes() as recorder:
            out = call(qkv.requires_grad_(keep), [2048], "clips", 0.1)
            if keep:
                out.sum().backward()
        large = {size for size in recorder.sizes if size > clip_attention.BLOCK}
        assert large == ({2048**2} if keep else set())
        assert recorder.sizes.count(clip_attention.BLOCK) > 0


def test_clip_attention_under_autocast_is_unchanged() -> None:
    qkv = rows([5, 3]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(qkv, [5, 3], "clips", 0.0)
        out.sum().backward()
    assert torch.equal(out, call(qkv, [5, 3], "clips", 0.0)) and qkv.grad.dtype == torch.float32
