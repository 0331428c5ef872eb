"""The model with impl="triton" against the model with impl="torch": loss, every gradient, features, dropout."""

from __future__ import annotations

import inspect

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, few_programs, randn
from policy import BF16_LOSS, DIRECTIONAL, FIFTY_STEPS, HALF_FEATURES, ONE_STEP, assert_rounding, max_rel
from torch import Tensor

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.ops.masking import sample_mask

NO_DROPOUT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "input_dropout": 0.0,
    "encoder_layerdrop": 0.0,
}
SIZES = {"embed_dim": 48, "ffn_dim": 72, "encoder_layers": 2, "decoder_embed_dim": 32, "num_heads": 2}
SHAPES = {
    "patch": {"num_mel_bins": 32, "patch_size": (8, 8), "masking": "chunk"},
    "frame": {"num_mel_bins": 24, "patch_size": (2, 24), "masking": "random"},
}
VARIANTS = {
    "as the paper": {},
    "pre-norm": {"norm_first": True},
    "one width, norm_pix_loss": {"decoder_embed_dim": 48, "norm_pix_loss": True},
    "reconstruction alone": {"classification_weight": 0.0},
    "classification alone": {"reconstruction_weight": 0.0, "decoder_layers": 1},
}
FRAMES = {"equal": [24, 24], "unequal": [24, 9, 17]}


@pytest.fixture(autouse=True)
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "add_layer_norm_backward", "bias_gelu_backward", "scatter_tokens_backward")


def build(impl: str, shape: str, attention: str = "auto", **fields) -> MAEAST:
    torch.manual_seed(0)
    config = MAEASTConfig(**{**SIZES, **SHAPES[shape], **NO_DROPOUT, **fields})
    model = MAEAST(config, impl=impl, attention=attention)
    with torch.no_grad():  # so large that attention and feed-forward blocks matter
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    return model.to(DEVICE).train()


def batch(model: MAEAST, frames: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features around -4, like log-mel, frame counts, and a mask that hides another count in the first clip."""
    config = model.config
    features = randn(len(frames), max(frames), config.num_mel_bins, offset=-4.0, seed=3)
    tokens = torch.tensor(frames) // config.patch_size[0] * config.grid_f
    mask = sample_mask(config.masking, tokens, config.grid_f, 0.75, seed=5)
    mask[0, : config.grid_f] = True
    return features, torch.tensor(frames), mask.to(DEVICE)


def forward_backward(model: MAEAST, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[object, dict[str, Tensor]]:
    """One forward and backward on features, frame counts and mask: the output and every parameter's gradient."""
    features, frames, mask = inputs
    model.zero_grad()
    out = model(features, frames, mask)
    out.loss.backward()
    return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_loss_and_gradients_match_torch(shape: str, variant: str, frames: list[int]) -> None:
    runs = []
    for impl, attention in (("torch", "sdpa"), ("triton", "short")):
        model = build(impl, shape, attention, **VARIANTS[variant])
        runs.append(forward_backward(model, batch(model, frames)))
    (expected, expected_grads), (out, grads) = runs
    for name in ("loss", "loss_reconstruction", "loss_classification", "loss_per_clip"):
        assert max_rel(getattr(out, name), getattr(expected, name)) <= ONE_STEP, name
    assert torch.equal(out.accuracy, expected.accuracy) and torch.equal(out.target, expected.target)
    for name, gradient in grads.items():
        if name.endswith("qkv.bias"):  # the key part is rounding noise around 0
            width = len(gradient) // 3
            gradient, expected_grads[name] = (
                torch.cat((g[:width], g[2 * width :])) for g in (gradient, expected_grads[name])
            )
        assert_rounding(gradient, expected_grads[name], name, grad=True)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_half_precision_is_near_fp32(shape: str, dtype: torch.dtype) -> None:
    exact = build("torch", shape)
    model = build("triton", shape, "short")
    features, frames, mask = batch(model, FRAMES["unequal"])
    expected, _ = forward_backward(exact, (features, frames, mask))
    with torch.autocast(DEVICE.type, dtype):
        out = model(features, frames, mask)
    out.loss.backward()
    assert out.pred_reconstruction.dtype == dtype and out.loss.dtype == torch.float32
    assert max_rel(out.loss, expected.loss) <= BF16_LOSS
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    states = [m.eval().extract_features(features, frames).last_hidden_state for m in (model, exact)]
    with torch.autocast(DEVICE.type, dtype):
        states[0] = model.extract_features(features, frames).last_hidden_state
    assert max_rel(states[0], states[1]) <= HALF_FEATURES[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_features_match_torch(shape: str) -> None:
    outs = []
    for impl, attention in (("torch", "sdpa"), ("triton", "short")):
        model = build(impl, shape, attention).eval()
        features, frames, _ = batch(model, FRAMES["unequal"])
        outs.append(model.extract_features(features, frames))
    assert_rounding(outs[1].last_hidden_state, outs[0].last_hidden_state)


DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "input_dropout": 0.2}


def test_triton_dropout_uses_one_mask_in_forward_and_backward() -> None:
    """At a fixed seed the loss is a function of the weights alone, and the gradient is its slope."""
    model = build("triton", "patch", "short", **DROPOUT)
    features, frames, mask = batch(model, FRAMES["unequal"])

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model(features, frames, mask).loss

    first = loss()
    assert torch.equal(first, loss())
    torch.manual_seed(8)
    assert not torch.equal(first, model(features, frames, mask).loss), "another seed must draw other masks"
    first.backward()
    generator = torch.Generator().manual_seed(1)
    parameters = list(model.parameters())
    direction = [
        torch.randn(p.shape, generator=generator).to(DEVICE) * p.grad.square().mean().sqrt() for p in parameters
    ]
    direction = [d + p.grad for d, p in zip(direction, parameters, strict=True)]
    norm = torch.stack([d.double().square().sum() for d in direction]).sum().sqrt()
    slope = sum((d.double() * p.grad).sum() for d, p in zip(direction, parameters, strict=True)) / norm
    size, values = 2e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * size / norm.float() * d
            values.append(loss().double())
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * size / norm.float() * d
    assert max_rel((values[0] - values[1]) / (2 * size), slope) <= DIRECTIONAL


def test_dropout_sites_of_a_model_are_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two dropouts of a step share a mask: each call of an operation has its own site, and all share one seed."""
    from mae_ast_fast import ops

    sites, seeds = [], []
    for name in ("add_layer_norm", "bias_gelu", "scatter_tokens", "short_attention"):
        original = getattr(ops, name)

        def spy(*args, original=original, **kwargs):
            arguments = inspect.signature(original).bind(*args, **kwargs).arguments
            seeds.append(arguments["seed"]), sites.append(arguments["site"])
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    model = build("triton", "patch", "short", **DROPOUT)
    features, frames, mask = batch(model, FRAMES["unequal"])
    model(features, frames, mask)
    assert len(sites) == 1 + 2 * 4 + 1 + 4 + 3 and len(set(sites)) == len(sites)
    assert len({int(seed) for seed in seeds}) == 1


def test_triton_drawn_masks_equal_torch() -> None:
    """A generator's seed gives the same mask in both implementations."""
    for shape in SHAPES:
        masks = []
        for impl in ("torch", "triton"):
            model = build(impl, shape)
            features, frames, _ = batch(model, FRAMES["unequal"])
            masks.append(model(features, frames, generator=torch.Generator().manual_seed(3)).mask)
        assert torch.equal(*masks)


def test_triton_fp64_input_raises() -> None:
    model = build("triton", "patch").double()
    features, frames, mask = batch(model, FRAMES["equal"])
    with pytest.raises(ValueError, match=r"float32, float16 and bfloat16, got torch.float64; use impl='torch'"):
        model(features.double(), frames, mask)


@pytest.mark.long
def test_triton_fifty_training_steps_track_torch() -> None:
    """Losses of both implementations, step by step, of training on one batch with new masks in each step."""
    losses = []
    for impl, attention in (("torch", "sdpa"), ("triton", "short")):
        model = build(impl, "frame", attention, encoder_layers=1, decoder_layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        features, frames, _ = batch(model, [24, 12])
        generator = torch.Generator().manual_seed(0)
        run_losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(features, frames, generator=generator).loss
            loss.backward()
            optimizer.step()
            run_losses.append(loss.detach())
        losses.append(torch.stack(run_losses))
    assert losses[0][-1] < 0.7 * losses[0][0], "it learns"
    assert ((losses[1] - losses[0]).abs() / losses[0]).max() <= FIFTY_STEPS
