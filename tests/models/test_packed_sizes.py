"""Token counts with padding rows, single traced graphs, and training steps without waits for the GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, few_programs, randn
from policy import assert_rounding
from torch import Tensor

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.ops.masking import num_visible, sample_mask
from mae_ast_fast.ops.packing import Packing, TokenCounts

OFF = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "input_dropout": 0.0,
    "encoder_layerdrop": 0.0,
}
SHAPES = {
    "patch": {"num_mel_bins": 32, "patch_size": (8, 8), "masking": "chunk"},
    "frame": {"num_mel_bins": 24, "patch_size": (2, 24), "masking": "random"},
}
PATHS = {"torch": ("torch", "sdpa"), "torch, math": ("torch", "math"), "triton": ("triton", "short")}


@pytest.fixture(autouse=True)
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "add_layer_norm_backward", "bias_gelu_backward", "scatter_tokens_backward")


def build(path: str = "torch", shape: str = "patch", **fields) -> MAEAST:
    impl, attention = PATHS[path]
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 48, "num_heads": 2, "encoder_layers": 2, "decoder_embed_dim": 16}
    model = MAEAST(MAEASTConfig(**{**sizes, **SHAPES[shape], **OFF, **fields}), impl=impl, attention=attention)
    return model.to(DEVICE).train()


def batch(model: MAEAST, frames: list[int], seed: int = 0, max_frames: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    config = model.config
    features = randn(len(frames), max_frames, config.num_mel_bins, offset=-4.0, seed=seed)
    lengths = torch.tensor(frames)
    num_tokens = lengths // config.patch_size[0] * config.grid_f
    max_tokens = max_frames // config.patch_size[0] * config.grid_f
    mask = sample_mask(config.masking, num_tokens, config.grid_f, config.mask_ratio, seed=seed, max_tokens=max_tokens)
    return features, lengths.to(DEVICE), mask.to(DEVICE)


def forward_backward(
    model: MAEAST, inputs: tuple[Tensor, Tensor, Tensor], sizes: TokenCounts | None = None
) -> tuple[object, dict[str, Tensor]]:
    """One forward and backward on features, lengths and mask: the output and every parameter's gradient."""
    features, lengths, mask = inputs
    model.zero_grad()
    out = model(features, lengths, mask, sizes=sizes)
    out.loss.backward()
    return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ sizes


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), min_size=1, max_size=20))
def test_bucket_bounds_counts_within_an_eighth(counts: list[tuple[int, int]]) -> None:
    exact = TokenCounts.of([v for v, _ in counts], [m for _, m in counts])
    bucket = exact.bucket()
    assert not exact.has_padding_rows and bucket.has_padding_rows
    for count, rounded in zip(exact[:5], bucket[:5], strict=True):
        assert count <= rounded <= max(count + 15, count * 9 / 8)
    assert bucket.bucket() == bucket


def test_sizes_of_match_drawn_masks() -> None:
    for shape in SHAPES:
        model = build(shape=shape)
        frames = [48, 17, 33, 3, 0]
        _, lengths, mask = batch(model, frames)
        num_tokens = (lengths // model.config.patch_size[0] * model.config.grid_f).cpu()
        num_masked = mask.sum(1).cpu()
        expected = TokenCounts.of((num_tokens - num_masked).tolist(), num_masked.tolist())
        assert model.sizes_of(frames) == expected == model.sizes_of(lengths.cpu())
        assert expected.visible == int(num_visible(num_tokens, model.config.mask_ratio).sum())


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=6),
    num_padding=st.integers(0, 5),
    slack=st.integers(0, 5),
)
def test_packing_with_padding_rows_keeps_real_rows(rows: list[list[bool]], num_padding: int, slack: int) -> None:
    selected = torch.tensor(rows)
    exact = Packing.of(selected)
    assert not exact.has_padding_rows and exact.valid.all() and exact.max_seqlen == int(selected.sum(1).max())
    clip, token = selected.nonzero(as_tuple=True)
    assert torch.equal(exact.clip, clip) and torch.equal(exact.token, token)
    total = len(clip)
    wide = Packing.of(selected, total + num_padding, max_seqlen=exact.max_seqlen + slack, has_padding_rows=True)
    assert len(wide.clip) == len(wide.token) == len(wide.valid) == total + num_padding
    assert torch.equal(wide.clip[:total], clip) and torch.equal(wide.token[:total], token)
    assert torch.equal(wide.cu_seqlens, exact.cu_seqlens)
    assert torch.equal(wide.valid, torch.arange(total + num_padding) < total)


# ----------------------------------------------------------------------------------------------------------- values

FRAMES = {"unequal": [48, 17, 33], "an empty and a tiny clip": [0, 48, 9, 16], "equal": [40, 40]}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_forward_bucket_sizes_change_no_result(path: str, shape: str, frames: list[int]) -> None:
    model = build(path, shape)
    inputs = batch(model, frames)
    exact, expected = forward_backward(model, inputs)
    wide, gradients = forward_backward(model, inputs, sizes=model.sizes_of(frames).bucket())
    for name in ("loss", "loss_reconstruction", "loss_classification", "loss_per_clip", "accuracy"):
        assert_rounding(getattr(wide, name), getattr(exact, name), name)
    num_rows = len(exact.target)
    assert len(wide.target) > num_rows
    for name in ("pred_reconstruction", "pred_classification", "target"):
        assert_rounding(getattr(wide, name)[:num_rows], getattr(exact, name), name)
    for name, gradient in gradients.items():
        if name.endswith("qkv.bias"):  # the key part is rounding noise around 0
            width = len(gradient) // 3
            gradient, expected[name] = (torch.cat((g[:width], g[2 * width :])) for g in (gradient, expected[name]))
        assert_rounding(gradient, expected[name], name, grad=True)


def test_forward_with_sizes_and_no_masked_token_returns_zero_loss() -> None:
    """With sizes the model does not check for visible and masked tokens: losses and gradients are 0, not NaN."""
    model = build()
    features, lengths, mask = batch(model, [7, 0])
    out, gradients = forward_backward(model, (features, lengths, mask), sizes=model.sizes_of([48, 48]).bucket())
    assert out.loss == 0 and all(gradient.isfinite().all() and not gradient.any() for gradient in gradients.values())


# ------------------------------------------------------------------------------------------------------------ graph


def compiled(model: MAEAST) -> tuple[object, torch._dynamo.testing.CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.long)])
def test_compile_batches_of_one_bucket_share_one_graph(path: str) -> None:
    model = build(path, encoder_layers=1)
    graph, counter = compiled(model)
    sizes = model.sizes_of([48, 17, 33]).bucket()
    for seed, frames in enumerate(([48, 17, 33], [48, 24, 24], [48, 32, 9])):
        assert model.sizes_of(frames).bucket() == sizes
        inputs = batch(model, frames, seed)
        expected, expected_gradients = forward_backward(model, inputs, sizes=sizes)
        out = graph(*inputs, sizes=sizes)
        model.zero_grad()
        out.loss.backward()
        assert_rounding(out.loss, expected.loss)
        for name, parameter in model.named_parameters():
            if not name.endswith("qkv.bias"):
                assert_rounding(parameter.grad, expected_gradients[name], name, grad=True)
        assert counter.frame_count == 1, "another graph for another length"


@pytest.mark.ci
@pytest.mark.parametrize(
    ("path", "shape"), [("torch", "patch"), pytest.param("triton", "frame", marks=pytest.mark.long)]
)
def test_compile_drawn_masks_dropout_and_layerdrop_make_one_graph(path: str, shape: str) -> None:
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "input_dropout": 0.1}
    model = build(path, shape, **rates, encoder_layerdrop=0.2, encoder_layers=1, decoder_layers=1)
    graph, counter = compiled(model)
    features, lengths, _ = batch(model, [48, 17])
    sizes = model.sizes_of([48, 17])
    for _ in range(2):
        outs = [graph(features), graph(features, lengths, sizes=sizes.bucket())]
        assert all(out.loss.isfinite() for out in outs)
    assert counter.frame_count == 2, "one for equal clips, one for the bucket"
    assert outs[1].mask.sum() == sizes.masked and outs[0].mask.sum() == 2 * sizes.max_masked
    outs[1].loss.backward()


@pytest.mark.long
@pytest.mark.skipif(DEVICE.type == "cpu" and not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_matches_eager() -> None:
    model = build(encoder_layers=1, decoder_layers=1)
    inputs, sizes = batch(model, [48, 17, 33]), model.sizes_of([48, 17, 33]).bucket()
    expected, gradients = forward_backward(model, inputs, sizes=sizes)
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True)
    model.zero_grad()
    out = graph(*inputs, sizes=sizes)
    out.loss.backward()
    assert_rounding(out.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv.bias"):
            assert_rounding(parameter.grad, gradients[name], name, grad=True)
    drawn = graph(inputs[0])
    assert drawn.loss.isfinite() and drawn.mask.sum() == 3 * model.sizes_of([48]).masked


def test_compile_graph_reads_no_value_on_the_host() -> None:
    """No node passes a value of a tensor to the host, or uses one as a shape."""
    model = build(encoder_layers=1)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(keep(graph, inputs)))
    inputs = batch(model, [48, 17, 33])
    torch._dynamo.reset()
    compiled_model = torch.compile(model, fullgraph=True, backend=backend)
    compiled_model(*inputs, sizes=model.sizes_of([48, 17, 33]).bucket()).loss.backward()
    assert len(graphs) == 2, "forward and backward"
    reading = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select", "unique", "aten.equal")
    for graph in graphs:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert names and not [name for name in names if any(word in name for word in reading)], names


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts waits for a GPU: needs one")
@pytest.mark.parametrize("path", PATHS)
def test_step_on_gpu_never_synchronizes(path: str) -> None:
    model = build(path, dropout=0.1)
    features, lengths, _ = batch(model, [48, 17, 33])
    host_lengths, sizes = lengths.cpu(), model.sizes_of([48, 17, 33])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first step compiles and allocates
        try:
            model(features, lengths, sizes=sizes).loss.backward()
            model(features, host_lengths).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
