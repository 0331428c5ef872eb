"""MAEAST against its contract: losses of ragged batches, normalisation, features, training, files.

test_golden.py compares with the paper's own numbers; these tests cover what the paper's code does not do.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import BF16_LOSS, HALF_FEATURES, STANDARD_ERRORS, assert_rounding, max_rel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mae_ast_fast
from mae_ast_fast import MAEAST, MAEASTConfig, fbank
from mae_ast_fast.models import mae_ast, transformer
from mae_ast_fast.models.losses import MIN_NORM
from mae_ast_fast.models.transformer import ExecConfig, Positions, sinusoid, sinusoid_2d
from mae_ast_fast.ops import eager
from mae_ast_fast.ops.masking import num_visible, sample_mask
from mae_ast_fast.ops.packing import real_tokens

PLAIN = ExecConfig("torch", "sdpa", None)
OFF = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "input_dropout": 0.0,
    "encoder_layerdrop": 0.0,
}
BINS, KT, GRID_F = 12, 4, 3
FRAMES = [29, 8, 16, 21]  # tails of 1, 0, 0 and 1 frames; 7, 2, 4 and 5 patches in time


def config(**fields: Any) -> MAEASTConfig:
    """A tiny model whose encoder and decoder differ in width."""
    sizes = {"num_mel_bins": BINS, "patch_size": (KT, 4), "embed_dim": 16, "ffn_dim": 24, "num_heads": 2}
    depth = {"encoder_layers": 2, "decoder_embed_dim": 8, "decoder_layers": 1}
    return MAEASTConfig(**{**sizes, **depth, **OFF, **fields})


def build(seed: int = 0, attention: str = "auto", **fields: Any) -> MAEAST:
    """A model in eval mode with weights so large that attention and feed-forward blocks matter."""
    torch.manual_seed(seed)
    model = MAEAST(config(**fields), attention=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    model.input_norm.running_mean.fill_(-7.5)
    model.input_norm.running_var.fill_(14.0)
    return model


def batch(frames: list[int] = FRAMES, seed: int = 0, padding: float = 0.0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Log-mel-like clips (B, T, BINS) and their frame counts; ``padding`` fills the frames past each clip."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(frames), max(frames) + extra, BINS), padding)
    for clip, count in enumerate(frames):
        x[clip, :count] = torch.randn(count, BINS, generator=generator) * 4 - 8
    return x, torch.tensor(frames)


def tokens_of(frames: list[int]) -> list[int]:
    return [count // KT * GRID_F for count in frames]


def masks(frames: list[int] = FRAMES, seed: int = 0, num_masked: list[int] | None = None) -> Tensor:
    """(B, L) with ``num_masked`` tokens of each clip masked; None: a different number in each clip."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = tokens_of(frames)
    num_masked = num_masked or [1 + (3 * clip) % (count - 1) for clip, count in enumerate(num_tokens)]
    mask = torch.zeros(len(num_tokens), max(num_tokens), dtype=torch.bool)
    for clip, (count, masked) in enumerate(zip(num_tokens, num_masked, strict=True)):
        mask[clip, torch.randperm(count, generator=generator)[:masked]] = True
    return mask


def gradients(model: MAEAST) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def forward_backward(model: MAEAST, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """One forward and backward: the output and every parameter's gradient."""
    model.zero_grad()
    out = model(*args, **kwargs)
    out.loss.backward()
    return out, {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_same_output(a: Any, b: Any, grads_a: dict | None = None, grads_b: dict | None = None) -> None:
    """Two outputs, and gradients, are equal bit for bit; only the masks' widths may differ."""
    for name in vars(a):
        if name != "mask":
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in grads_a or {}:
        assert torch.equal(grads_a[name], grads_b[name]), name


def pretraining_statistics(x: Tensor, frames: Tensor) -> tuple[float, float, int]:
    """Mean, biased variance and number of the batch's real values, in fp64."""
    values = np.concatenate([x[clip, :count].double().numpy().ravel() for clip, count in enumerate(frames.tolist())])
    return values.mean().item(), values.var().item(), values.size


# -------------------------------------------------------------------------------------------------------- interface


def test_public_signatures_match_contract() -> None:
    def signature(function: Any) -> list[tuple[str, Any]]:
        empty = inspect.Parameter.empty
        return [
            (name, "required" if p.default is empty else p.default)
            for name, p in inspect.signature(function).parameters.items()
            if name != "self"
        ]

    inputs = [("features", "required"), ("lengths", None)]
    execution = [("impl", "auto"), ("attention", "auto"), ("recompute", "none")]
    assert signature(MAEAST.__init__) == [("config", "required"), *execution]
    options = [("mask", None), ("generator", None), ("sizes", None), ("statistics", None)]
    assert signature(MAEAST.forward) == [*inputs, *options]
    assert signature(MAEAST.extract_features) == [*inputs, ("layer", None)]
    assert signature(MAEAST.from_fairseq_state_dict)[:2] == [("state_dict", "required"), ("cfg", "required")]
    assert signature(fbank) == [
        ("waveforms", "required"),
        ("lengths", None),
        ("sample_rate", 16000),
        ("frontend", "mae_ast"),
    ]
    assert signature(sample_mask)[:7] == [
        ("strategy", "required"),
        ("tokens", "required"),
        ("grid_f", "required"),
        ("mask_ratio", "required"),
        ("generator", None),
        ("seed", None),
        ("clip_ids", None),
    ]
    from mae_ast_fast.checkpoints.load import load_fairseq

    assert signature(load_fairseq)[0] == ("path", "required")
    assert {"MAEAST", "MAEASTConfig", "fbank"} <= set(mae_ast_fast.__all__)


def test_forward_output_has_expected_shapes() -> None:
    model = build()
    x, frames = batch()
    mask = masks()
    out = model(x, frames, mask)
    rows = int(mask.sum())
    for scalar in (out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy):
        assert scalar.shape == ()
    assert out.loss_per_clip.shape == (4,)
    for predicted in (out.pred_reconstruction, out.pred_classification, out.target):
        assert predicted.shape == (rows, KT * 4)
    assert not out.target.requires_grad and not out.accuracy.requires_grad
    assert torch.equal(out.mask, mask)


# ----------------------------------------------------------------------------------------------------------- losses


def expected_targets(x: Tensor, mask: Tensor, frames: Tensor, *, mean: float, scale: float) -> Tensor:
    """Normalised patches of the masked tokens, by loops: clip by clip, tokens ascending, f fastest in a patch."""
    rows = []
    for clip, count in enumerate(tokens_of(frames.tolist())):
        for token in range(count):
            if mask[clip, token]:
                t, f = token // GRID_F * KT, token % GRID_F * 4
                rows.append([(x[clip, t + i, f + j].item() - mean) * scale for i in range(KT) for j in range(4)])
    return torch.tensor(rows, dtype=torch.float64)


def expected_losses(
    out: Any, counts: list[int], norm_pix_loss: bool, temperature: float | None = None
) -> tuple[list[float], list[float], list[bool]]:
    """MSE, InfoNCE and hit of each masked row in fp64, from predictions and targets, by loops."""
    mse, nce, hit, first = [], [], [], 0
    recon, cls, target = (x.detach().double() for x in (out.pred_reconstruction, out.pred_classification, out.target))
    for count in counts:
        for i in range(first, first + count):
            goal = target[i]
            if norm_pix_loss:
                goal = (goal - goal.mean()) / (goal.var() + 1e-6).sqrt()
            mse.append(((recon[i] - goal) ** 2).mean().item())
            others = target[first : first + count]
            products = (others @ cls[i]).tolist()
            if temperature is not None:
                others = others - others.mean(1, keepdim=True)
                cosines = torch.nn.functional.cosine_similarity(others, cls[i][None], dim=1)
                products = (cosines / temperature).tolist()
            nce.append(
                math.log(sum(math.exp(p - max(products)) for p in products)) + max(products) - products[i - first]
            )
            hit.append(products.index(max(products)) == i - first)
        first += count
    return mse, nce, hit


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weights", [(10.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_forward_losses_are_means_over_all_masked_tokens(
    training: bool, norm_pix_loss: bool, weights: tuple[float, float], temperature: float | None
) -> None:
    fields = {"norm_pix_loss": norm_pix_loss, "temperature": temperature}
    model = build(reconstruction_weight=weights[0], classification_weight=weights[1], **fields)
    model.train(training)
    x, frames = batch()
    mask = masks()
    counts = mask.sum(1).tolist()
    assert len(set(counts)) == 4, "each clip must mask a different count"
    out = model(x, frames, mask)

    mean, variance, _ = pretraining_statistics(x, frames) if training else (-7.5, 14.0, 0)
    assert_rounding(
        out.target, expected_targets(x, mask, frames, mean=mean, scale=0.5 / math.sqrt(variance + 1e-5)), "target"
    )
    mse, nce, hit = expected_losses(out, counts, norm_pix_loss, temperature)
    total = [weights[0] * a + weights[1] * b for a, b in zip(mse, nce, strict=True)]
    assert 0 < sum(hit) < len(hit)
    for name, rows in (("loss_reconstruction", mse), ("loss_classification", nce), ("loss", total), ("accuracy", hit)):
        assert_rounding(getattr(out, name), torch.tensor(sum(rows) / len(rows), dtype=torch.float64), name)
    ends = np.cumsum([0, *counts])
    per_clip = [sum(total[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    assert_rounding(out.loss_per_clip, torch.tensor(per_clip, dtype=torch.float64), "loss_per_clip")


def test_temperature_constant_patches_stay_finite() -> None:
    """Silence has no direction: no NaN in losses and gradients, whatever the prediction."""
    model = build(temperature=0.1).train()
    x, frames = batch()
    x[0] = -8.0
    out, grads = forward_backward(model, x, frames, masks())
    assert out.loss.isfinite() and all(gradient.isfinite().all() for gradient in grads.values())


def test_temperature_predictions_of_zero_have_small_gradients() -> None:
    model = build(temperature=0.1).train()
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    _, grads = forward_backward(model, *batch(), masks())
    assert grads["head.weight"].abs().max() < 1 / MIN_NORM**2


def test_forward_ignores_mask_entries_past_a_clip_and_mask_width() -> None:
    model = build().train()
    x, frames = batch(extra=9)
    mask = masks()
    first = forward_backward(copy.deepcopy(model), x, frames, mask)
    max_tokens = max(tokens_of(FRAMES))
    past = ~real_tokens(torch.tensor(tokens_of(FRAMES)), max_tokens + 30)
    generator = torch.Generator().manual_seed(5)
    for width in (max_tokens, max_tokens + 1, max_tokens + 2 * GRID_F, max_tokens + 30):
        noise = torch.rand(4, width, generator=generator) < 0.5
        wide = torch.nn.functional.pad(mask, (0, width - max_tokens)) | (noise & past[:, :width])
        again = forward_backward(copy.deepcopy(model), x, frames, wide)
        assert_same_output(first[0], again[0], first[1], again[1])
        assert not again[0].mask[past[:, : again[0].mask.shape[1]]].any()


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_forward_clip_without_visible_or_masked_token_adds_no_loss(attention: str) -> None:
    """The batch has the losses and gradients of the batch without such clips, in eval mode."""
    model = build(attention=attention)
    frames = [29, 16, 8, 3, 0, 21]
    x, lengths = batch(frames)
    tokens = tokens_of(frames)
    mask = masks(frames, num_masked=[4, tokens[1], 0, 0, 0, 7])  # none visible, none masked, no patches (twice)
    out, grads = forward_backward(model, x, lengths, mask)
    keep = [0, 5]
    kept, kept_grads = forward_backward(model, x[keep], lengths[keep], mask[keep])
    for name in ("loss", "loss_reconstruction", "loss_classification", "accuracy"):
        assert_rounding(getattr(out, name), getattr(kept, name), name)
    assert out.loss_per_clip[1:5].tolist() == [0.0] * 4
    assert_rounding(out.loss_per_clip[keep], kept.loss_per_clip)
    for name in grads:
        if not name.endswith("qkv.bias"):  # the key part is rounding noise around 0
            assert_rounding(grads[name], kept_grads[name], name, grad=True)
    # The clip without visible tokens keeps its rows in the target (M, P).
    assert len(out.target) == 4 + tokens[1] + 7
    assert_rounding(torch.cat((out.target[:4], out.target[-7:])), kept.target)


def test_input_norm_training_counts_every_real_frame() -> None:
    """Frames of clips without a loss count too, and so do tail frames that no patch covers."""
    model = build().train()
    frames = [29, 16, 3, 21]
    x, lengths = batch(frames)
    mask = masks(frames, num_masked=[4, tokens_of(frames)[1], 0, 7])
    mean, variance, count = pretraining_statistics(x, lengths)
    model(x, lengths, mask)
    assert_rounding(model.input_norm.running_mean, torch.tensor([0.9 * -7.5 + 0.1 * mean], dtype=torch.float64))
    unbiased = variance * count / (count - 1)
    assert_rounding(model.input_norm.running_var, torch.tensor([0.9 * 14.0 + 0.1 * unbiased], dtype=torch.float64))


def test_forward_no_clip_with_visible_and_masked_tokens_raises() -> None:
    model = build()
    x, frames = batch([16, 8])
    none_masked, all_masked = torch.zeros(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    one_of_each = torch.stack((none_masked[0], all_masked[0]))
    for mask in (none_masked, all_masked, one_of_each):
        with pytest.raises(ValueError, match=r"visible and masked.*\[16, 8\]"):
            model(x, frames, mask)
    for short in ([3, 2], [0, 0]):
        for mask in (None, all_masked):
            with pytest.raises(ValueError, match=r"no clip.*4 frames x 4 bins.*\[" + str(short)[1:-1]):
                model(x, torch.tensor(short), mask)
    for empty in (None, torch.zeros(2, 0, dtype=torch.bool)):
        with pytest.raises(ValueError, match="no clip"):
            model(x[:, :3], None, empty)
    model(x, torch.tensor([16, 2]), one_of_each.flip(0) & (torch.arange(12) < 5))  # one clip with both is enough


def test_input_norm_rejected_batch_leaves_statistics() -> None:
    model = build().train()
    x, _ = batch([16, 8])
    before = copy.deepcopy(model.input_norm.state_dict())
    with pytest.raises(ValueError):
        model(x, torch.tensor([3, 3]))
    after = model.input_norm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("switched_off", ["reconstruction_weight", "classification_weight"])
def test_forward_zero_weight_disables_objective(switched_off: str) -> None:
    both = build()
    single = build(**{switched_off: 0.0})
    single.load_state_dict(both.state_dict())
    x, frames = batch()
    mask = masks()
    full = both(x, frames, mask)
    out, grads = forward_backward(single, x, frames, mask)
    patch_dim = single.config.patch_dim
    head = {"reconstruction_weight": slice(0, patch_dim), "classification_weight": slice(patch_dim, None)}
    assert not grads["head.weight"][head.pop(switched_off)].any()
    assert grads["head.weight"][next(iter(head.values()))].any()
    if switched_off == "reconstruction_weight":
        assert out.loss_reconstruction == 0.0
        assert torch.equal(out.loss_classification, full.loss_classification)
        assert torch.equal(out.accuracy, full.accuracy)
        assert_rounding(out.loss, full.loss_classification)
    else:
        assert out.loss_classification == 0.0 and out.accuracy == 0.0
        assert torch.equal(out.loss_reconstruction, full.loss_reconstruction)
        assert_rounding(out.loss, 10 * full.loss_reconstruction)
    assert torch.equal(out.pred_reconstruction, full.pred_reconstruction)
    assert torch.equal(out.pred_classification, full.pred_classification)


def test_norm_pix_loss_changes_only_reconstruction_loss() -> None:
    plain, normalised = build(), build(norm_pix_loss=True)
    x, frames = batch()
    a, b = plain(x, frames, masks()), normalised(x, frames, masks())
    for name in ("loss_classification", "accuracy", "target", "pred_reconstruction", "pred_classification"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.loss_reconstruction != b.loss_reconstruction


def test_forward_lengths_none_uses_all_frames() -> None:
    model = build()
    x, _ = batch([21, 21])
    mask = masks([21, 21])
    assert_same_output(model(x, mask=mask), model(x, torch.tensor([21, 21]), mask))
    assert_same_output(model(x, [21, 21], mask), model(x, torch.tensor([21, 21], dtype=torch.int32), mask))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_forward_any_integer_dtype_of_lengths_gives_same_output(dtype: str) -> None:
    model, counts = build(), [120, 90, 100, 4]  # T = 300 does not fit into 8 bits, nor does the number of tokens
    x, frames = batch(counts, extra=180)
    mask = masks(counts)
    expected, features = model(x, frames, mask), model.extract_features(x, frames).last_hidden_state
    for lengths in (np.array(counts, dtype), torch.tensor(counts).to(getattr(torch, dtype))):
        assert_same_output(model(x, lengths, mask), expected)
        assert torch.equal(model.extract_features(x, lengths).last_hidden_state, features)


# ---------------------------------------------------------------------------------------------------- normalisation


def test_input_norm_training_uses_and_tracks_real_frames() -> None:
    model = build().train()
    running_mean, running_var, steps = -7.5, 14.0, int(model.input_norm.num_batches_tracked)
    for seed in range(3):
        x, frames = batch(seed=seed, padding=float("nan"), extra=7)
        mean, variance, count = pretraining_statistics(x, frames)
        out = model(x, frames, masks())
        target = expected_targets(x, masks(), frames, mean=mean, scale=0.5 / math.sqrt(variance + 1e-5))
        assert_rounding(out.target, target, "target")
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * variance * count / (count - 1)
        steps += 1
    assert_rounding(model.input_norm.running_mean, torch.tensor([running_mean], dtype=torch.float64))
    assert_rounding(model.input_norm.running_var, torch.tensor([running_var], dtype=torch.float64))
    assert model.input_norm.num_batches_tracked == steps


def test_input_norm_large_offset_keeps_variance_accurate() -> None:
    """A sum of squares would lose the variance of features far from 0."""
    model = build().train()
    x, frames = batch()
    shifted = x + 4096
    mean, variance, _ = pretraining_statistics(shifted, frames)
    out = model(shifted, frames, masks())
    target = expected_targets(shifted, masks(), frames, mean=mean, scale=0.5 / math.sqrt(variance + 1e-5))
    # The mean is only accurate to half a unit in the last place of its fp32 value.
    assert (out.target - target).abs().max() <= 4096 * torch.finfo(torch.float32).eps * 0.5 / math.sqrt(variance) * 2


@pytest.mark.parametrize("training", [False, True])
def test_forward_silent_batch_stays_finite(training: bool) -> None:
    """The 1e-5 added to the variance dominates a smaller variance, and constant input becomes 0."""
    model = build().train(training)
    model.input_norm.running_mean.zero_()
    model.input_norm.running_var.fill_(1e-6)
    frames = torch.tensor(FRAMES)
    quiet = (batch()[0] + 8) * 2.5e-4  # variance 1e-6
    mean, variance, _ = pretraining_statistics(quiet, frames) if training else (0.0, 1e-6, 0)
    out = model(quiet, frames, masks())
    assert_rounding(
        out.target, expected_targets(quiet, masks(), frames, mean=mean, scale=0.5 / math.sqrt(variance + 1e-5))
    )
    out = model.train()(torch.full_like(quiet, -16.0), frames, masks())
    assert not out.target.any() and out.loss.isfinite()
    out.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_input_norm_eval_uses_and_keeps_running_statistics() -> None:
    model = build()
    before = copy.deepcopy(model.input_norm.state_dict())
    x, frames = batch()
    out = model(x, frames, masks())
    model.extract_features(x, frames)
    assert_rounding(out.target, expected_targets(x, masks(), frames, mean=-7.5, scale=0.5 / math.sqrt(14.0 + 1e-5)))
    assert all(torch.equal(value, before[name]) for name, value in model.input_norm.state_dict().items())


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("training", [False, True])
def test_forward_padding_values_change_no_output(training: bool, padding: float) -> None:
    clean, dirty = build().train(training), build().train(training)
    x, frames = batch(extra=6)
    y, _ = batch(extra=6, padding=padding)
    clean_out, clean_grads = forward_backward(clean, x, frames, masks())
    dirty_out, dirty_grads = forward_backward(dirty, y, frames, masks())
    assert_same_output(clean_out, dirty_out, clean_grads, dirty_grads)
    for model in (clean, dirty):
        model.train(training)
    a, b = clean.extract_features(x, frames), dirty.extract_features(y, frames)
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert all(torch.equal(p, q) for p, q in zip(a.hidden_states, b.hidden_states, strict=True))
    for name, value in clean.input_norm.state_dict().items():
        assert torch.equal(value, dirty.input_norm.state_dict()[name]), name


def test_extract_features_padding_values_change_no_gradient() -> None:
    clean, dirty = build(), build()
    for model, padding in ((clean, 0.0), (dirty, float("nan"))):
        x, frames = batch(padding=padding)
        model.extract_features(x, frames).last_hidden_state.square().sum().backward()
    a, b = gradients(clean), gradients(dirty)
    assert a["patch_embed.weight"].any()
    assert all(torch.equal(a[name], b[name]) for name in a if a[name] is not None)


# ---------------------------------------------------------------------------------------- independence of the batch

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(lambda lengths: max(lengths) >= KT)


@pytest.fixture(scope="module", params=["sdpa", "math"])
def shared(request: pytest.FixtureRequest) -> MAEAST:
    return build(attention=request.param)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, extra=st.integers(0, 50), seed=st.integers(0, 1000))
def test_forward_eval_loss_of_a_clip_is_independent_of_its_batch(
    shared: MAEAST, lengths: list[int], extra: int, seed: int
) -> None:
    x, frames = batch(lengths, seed=seed, padding=1e4, extra=extra)
    mask = sample_mask("random", torch.tensor(tokens_of(lengths)), GRID_F, 0.6, seed=seed)
    with torch.no_grad():
        out = shared(x, frames, mask)
        first = 0
        for clip, count in enumerate(lengths):
            masked = int(mask[clip].sum())
            rows, first = slice(first, first + masked), first + masked
            if not masked:
                assert out.loss_per_clip[clip] == 0.0
                continue
            alone = shared(x[clip : clip + 1, :count], None, mask[clip : clip + 1])
            assert_rounding(out.loss_per_clip[clip], alone.loss_per_clip[0], "loss_per_clip")
            assert_rounding(alone.loss, alone.loss_per_clip[0], "loss")
            for name in ("target", "pred_reconstruction", "pred_classification"):
                assert_rounding(getattr(out, name)[rows], getattr(alone, name), name)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, extra=st.integers(0, 50), seed=st.integers(0, 1000))
def test_extract_features_eval_clip_is_independent_of_its_batch(
    shared: MAEAST, lengths: list[int], extra: int, seed: int
) -> None:
    x, frames = batch(lengths, seed=seed, padding=1e4, extra=extra)
    with torch.no_grad():
        out = shared.extract_features(x, frames)
        assert out.lengths.tolist() == [-(-count // KT) * GRID_F for count in lengths]
        for clip, count in enumerate(lengths):
            tokens = int(out.lengths[clip])
            states = [out.last_hidden_state, *out.hidden_states]
            assert not any(state[clip, tokens:].any() for state in states)
            if not count:
                continue
            alone = shared.extract_features(x[clip : clip + 1, :count])
            assert alone.last_hidden_state.shape == (1, tokens, 16)
            for state, single in zip(states, [alone.last_hidden_state, *alone.hidden_states], strict=True):
                assert_rounding(state[clip, :tokens], single[0])


def test_forward_unequal_clips_are_not_cropped_to_the_shortest() -> None:
    """The paper's code crops a batch to its shortest clip; here the long clip keeps all its patches."""
    model = build().train()
    x, frames = batch([40, 4])
    out = model(x, frames, generator=torch.Generator().manual_seed(0))
    assert out.mask.sum(1).tolist() == [30 - num_visible(30, 0.75), 3 - num_visible(3, 0.75)]


# --------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("norm_first", [False, True])
def test_extract_features_layer_returns_its_hidden_state(norm_first: bool) -> None:
    model = build(norm_first=norm_first, encoder_layers=3)
    x, frames = batch()
    with torch.no_grad():
        full = model.extract_features(x, frames)
        assert len(full.hidden_states) == 3
        for layer in (1, 2, 3):
            partial = model.extract_features(x, frames, layer=layer)
            assert len(partial.hidden_states) == layer
            assert torch.equal(partial.last_hidden_state, full.hidden_states[layer - 1])
            assert torch.equal(partial.hidden_states[-1], full.hidden_states[layer - 1])
        assert max_rel(full.hidden_states[0], full.hidden_states[1]) > 0.01
        last, real = full.hidden_states[-1], real_tokens(full.lengths, full.last_hidden_state.shape[1])
        if norm_first:
            norm = model.encoder.norm
            expected = torch.nn.functional.layer_norm(last[real], (16,), norm.weight, norm.bias, 1e-5)
            assert_rounding(full.last_hidden_state[real], expected)
            assert max_rel(full.last_hidden_state[real], last[real]) > 0.01
        else:
            assert torch.equal(full.last_hidden_state, last)
    for layer in (0, -1, 4, 1.0, 1.5, "1", True):
        with pytest.raises(ValueError, match=r"layer.*1\.\.3.*" + str(layer)):
            model.extract_features(x, frames, layer=layer)


@pytest.mark.parametrize("count", range(1, 14))
def test_extract_features_frames_past_length_count_as_zero(count: int) -> None:
    """Both if they are padding, and if the clip's last patch extends past the end of the batch."""
    model = build()
    x, frames = batch([count])
    whole = -(-count // KT) * KT
    filled = torch.nn.functional.pad(x, (0, 0, 0, whole - count))
    padded = torch.nn.functional.pad(x, (0, 0, 0, whole - count), value=99.0)
    with torch.no_grad():
        expected = model.extract_features(filled).last_hidden_state
        for features in (x, padded):
            out = model.extract_features(features, frames)
            assert out.lengths.tolist() == [whole // KT * GRID_F]
            assert torch.equal(out.last_hidden_state, expected)
        if whole > count:  # the tail is not dropped
            other = x.clone()
            other[0, count - 1] += 1.0
            assert not torch.equal(expected, model.extract_features(other).last_hidden_state)


def test_extract_features_frame_model_has_expected_lengths() -> None:
    model = build(patch_size=(2, BINS), masking="random")
    x, frames = batch([7, 1, 4])
    with torch.no_grad():
        out = model.extract_features(x, frames)
        assert out.lengths.tolist() == [4, 1, 2]
        assert out.last_hidden_state.shape == (3, 4, 16)
        alone = model.extract_features(x[1:2, :1])
    assert_rounding(out.last_hidden_state[1, :1], alone.last_hidden_state[0])
    assert model(x, frames).mask.sum(1).tolist() == [2, 0, 1]  # floor in pretraining: 3, 0 and 2 tokens


def test_extract_features_no_frames_is_empty() -> None:
    model = build()
    out = model.extract_features(torch.zeros(2, 0, BINS))
    assert out.last_hidden_state.shape == (2, 0, 16) and out.lengths.tolist() == [0, 0]
    x, _ = batch([8, 8])
    out = model.extract_features(x, torch.tensor([0, 8]))
    assert out.lengths.tolist() == [0, 6] and not out.last_hidden_state[0].any()


def test_input_norm_batch_without_frames_leaves_statistics() -> None:
    model = build().train()
    before = copy.deepcopy(model.input_norm.state_dict())
    model.extract_features(torch.zeros(2, 8, BINS), torch.tensor([0, 0]))
    assert all(torch.equal(value, before[name]) for name, value in model.input_norm.state_dict().items())


def test_extract_features_more_than_48000_tokens_raises() -> None:
    sizes = {"num_mel_bins": 2, "patch_size": (1, 2), "embed_dim": 2, "num_heads": 1, "ffn_dim": 2, "encoder_layers": 1}
    model = build(**sizes, decoder_layers=0, masking="random")
    x = torch.randn(1, 48_001, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.extract_features(x[:, :48_000])
        assert out.lengths.tolist() == [48_000]
        assert out.last_hidden_state.shape == (1, 48_000, 2) and out.last_hidden_state.isfinite().all()
        assert torch.equal(model.encoder_positions.table[:48_000], sinusoid(48_000, 2))
        with pytest.raises(ValueError, match=r"48000 tokens.*48001"):
            model.extract_features(x)


def test_sinusoid_2d_is_sinusoid_of_time_and_of_frequency() -> None:
    table = sinusoid_2d(10, 8, grid_f=3)
    for token in range(10):
        time, frequency = divmod(token, 3)
        expected = [
            f(p / 10000 ** (2 * i / 4)) for p in (time, frequency) for i in (0, 1) for f in (math.sin, math.cos)
        ]
        assert_rounding(table[token], torch.tensor(expected), f"token {token}")
    assert torch.equal(sinusoid_2d(10, 6, grid_f=1), sinusoid(10, 6))


def test_positions_sinusoid_2d_reach_encoder_and_decoder() -> None:
    """Putting the tables into a model with the paper's positions, one by one, changes its output each time."""
    model, paper = build(positions="sinusoid_2d"), build()
    paper.load_state_dict(model.state_dict())
    assert set(model.state_dict()) == set(paper.state_dict())
    x, lengths = batch()
    outputs = [paper(x, lengths, masks()).pred_reconstruction]
    for stack, width in (("encoder_positions", 16), ("decoder_positions", 8)):
        table = getattr(model, stack).table
        assert torch.equal(table, sinusoid_2d(2048, width, GRID_F))
        getattr(paper, stack).table = table
        outputs.append(paper(x, lengths, masks()).pred_reconstruction)
        assert not torch.equal(outputs[-1], outputs[-2]), stack
    assert torch.equal(model(x, lengths, masks()).pred_reconstruction, outputs[-1])


def test_positions_sinusoid_2d_past_initial_table_grow_on_demand() -> None:
    table = Positions(8, grid_f=3)(5000)
    assert torch.equal(table, sinusoid_2d(5000, 8, grid_f=3))


def test_positions_past_initial_table_grow_on_demand() -> None:
    """The table grows on demand and keeps its rows."""
    options = {"num_mel_bins": 2, "patch_size": (1, 2), "embed_dim": 8, "num_heads": 2}
    options |= {"encoder_layers": 1, "decoder_layers": 1, "masking": "random"}
    model = build(**options)
    size = model.encoder_positions.table.shape[0]
    x = torch.randn(1, 2 * size + 5, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = model.extract_features(x[:, :50])
        long = model.extract_features(x)
        assert model.encoder_positions.table.shape[0] >= 2 * size + 5
        assert torch.equal(model.extract_features(x[:, :50]).last_hidden_state, short.last_hidden_state)
        shifted = model.extract_features(x[:, 1:])
        out = model(x, mask=(torch.arange(2 * size + 5) % 2 == 0)[None])
    assert torch.equal(model.encoder_positions.table, sinusoid(len(model.encoder_positions.table), 8))
    assert torch.equal(model.decoder_positions.table, sinusoid(len(model.decoder_positions.table), 8))
    assert not torch.equal(long.last_hidden_state[:, 1:], shifted.last_hidden_state)
    assert out.loss.isfinite()
    assert set(model.state_dict()) == set(build(seed=1, **options).state_dict())


def test_encoder_only_model_features_equal_full_model() -> None:
    whole, encoder = build(), build(decoder_layers=0)
    missing = encoder.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    assert {name.split(".")[0] for name in missing.unexpected_keys} == {
        "encoder_projection",
        "mask_token",
        "decoder",
        "head",
    }
    x, frames = batch()
    with torch.no_grad():
        a, b = whole.extract_features(x, frames), encoder.extract_features(x, frames)
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    with pytest.raises(ValueError, match=r"decoder_layers=0"):
        encoder(x, frames)


# ---------------------------------------------------------------------------------------------------- training mode


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layerdrop_near_one_skips_layers_and_uses_every_parameter(stack: str) -> None:
    model = build(**{f"{stack}_layerdrop": 1 - 1e-12}, encoder_layers=3, decoder_layers=2)
    x, frames = batch()
    torch.manual_seed(0)
    _, grads = forward_backward(model.train(), x, frames, masks())
    for name, gradient in grads.items():
        assert gradient is not None and gradient.isfinite().all(), name
        if name.startswith(f"{stack}.layers."):
            assert not gradient.any(), name
        elif stack == "encoder":  # without decoder layers a masked token sees no visible one
            assert gradient.any(), name
    states = model.extract_features(x, frames).hidden_states
    assert torch.equal(states[0], states[2]) is (stack == "encoder")
    model.eval()
    plain = build(encoder_layers=3, decoder_layers=2)
    plain.load_state_dict(model.state_dict())
    assert_same_output(model(x, frames, masks()), plain(x, frames, masks()))
    assert not torch.equal(*model.extract_features(x, frames).hidden_states[:2])


def test_layerdrop_drops_layers_independently_at_its_rate_without_rescaling() -> None:
    rate, layers, runs = 0.3, 40, 25
    model = build(encoder_layerdrop=rate, encoder_layers=layers, decoder_layers=0, embed_dim=4, ffn_dim=4).train()
    x, _ = batch([8])
    dropped = torch.zeros(runs, layers)
    torch.manual_seed(0)
    with torch.no_grad():
        for i in range(runs):
            model.input_norm.eval()
            states = [s[0] for s in model.extract_features(x).hidden_states]
            for layer in range(1, layers):
                dropped[i, layer] = torch.equal(states[layer], states[layer - 1])
                if not dropped[i, layer]:
                    packing = _packing(len(states[layer]))
                    before = states[layer - 1]
                    assert_rounding(states[layer], model.encoder.layers[layer](before, before, packing, PLAIN)[0])
    share = dropped[:, 1:].mean().item()
    assert abs(share - rate) < STANDARD_ERRORS * math.sqrt(rate * (1 - rate) / (runs * (layers - 1)))
    assert dropped[:, 1:].std(0).min() > 0, "each call must draw anew"
    assert dropped[:, 1:].std(1).min() > 0, "each layer must draw anew"


def _packing(num_rows: int) -> Any:
    from mae_ast_fast.ops.packing import Packing

    return Packing.of(torch.ones(1, num_rows, dtype=torch.bool))


def test_dropout_is_applied_where_the_paper_applies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"dropout": 0.11, "attention_dropout": 0.12, "activation_dropout": 0.13, "input_dropout": 0.14}
    calls: list[tuple[float, tuple[int, ...]]] = []
    original = eager.drop

    def spy(x: Tensor, rate: float) -> Tensor:
        calls.append((rate, tuple(x.shape)))
        return original(x, rate)

    for module in (eager, mae_ast, transformer):
        monkeypatch.setattr(module, "drop", spy)
    x, frames = batch([16, 16])
    mask = masks([16, 16], num_masked=[7, 7])
    for norm_first in (False, True):
        model = build(attention="math", norm_first=norm_first, encoder_layers=1, **rates)
        for training in (True, False):
            calls.clear()
            model.train(training)
            model(x, frames, mask)

            def layer(num_queries: int, num_rows: int, width: int) -> list:
                return [
                    (0.12, (2, 2, num_queries // 2, num_rows // 2)),
                    (0.11, (num_queries, width)),
                    (0.13, (num_queries, 24)),
                    (0.11, (num_queries, width)),
                ]

            # The last layer of the decoder computes only the 14 masked rows of 24.
            decoder = [(0.11, (24, 8)), *layer(14, 24, 8)]
            expected = [(0.14, (10, 16)), (0.11, (10, 16)), *layer(10, 10, 16), *decoder]
            if training:
                assert calls == expected
            else:
                assert {rate for rate, _ in calls} == {0.0}


def test_fused_attention_gets_dropout_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        rates.append(kwargs["dropout_p"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = build(attention="sdpa", attention_dropout=0.12)
    for training, expected in ((True, 0.12), (False, 0.0)):
        rates.clear()
        model.train(training)(*batch(), masks())
        assert len(rates) >= 3 and set(rates) == {expected}


@pytest.mark.parametrize(
    "rate",
    ["dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop", "decoder_layerdrop"],
)
def test_dropout_rate_acts_in_training_and_not_in_eval(rate: str) -> None:
    with_rate, without = build(**{rate: 0.5}), build()
    x, frames = batch()
    outs = {}
    for training in (True, False):
        torch.manual_seed(3)
        with_rate.train(training)
        without.train(training)
        outs[training] = with_rate(x, frames, masks()), without(x, frames, masks())
    assert not torch.equal(outs[True][0].pred_reconstruction, outs[True][1].pred_reconstruction)
    with_rate.load_state_dict(without.state_dict())
    assert_same_output(with_rate(x, frames, masks()), without(x, frames, masks()))


def test_forward_training_same_seed_gives_same_result() -> None:
    rates = {
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "input_dropout": 0.1,
        "encoder_layerdrop": 0.3,
    }
    x, frames = batch()
    results = []
    for seed in (1, 1, 2):
        model = build(**rates).train()
        torch.manual_seed(seed)
        results.append(forward_backward(model, x, frames))
    assert_same_output(results[0][0], results[1][0], results[0][1], results[1][1])
    assert torch.equal(results[0][0].mask, results[1][0].mask)
    assert not torch.equal(results[0][0].mask, results[2][0].mask)


def test_forward_generator_determines_only_the_mask() -> None:
    model = build(dropout=0.2, encoder_layerdrop=0.3).train()
    x, frames = batch([40, 29])
    tokens = torch.tensor(tokens_of([40, 29]))

    def call(generator: torch.Generator | None, mask: Tensor | None = None) -> Any:
        torch.manual_seed(0)
        return copy.deepcopy(model)(x, frames, mask, generator)

    out = call(torch.Generator().manual_seed(1))
    assert torch.equal(out.mask, sample_mask("chunk", tokens, GRID_F, 0.75, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(out.mask, call(torch.Generator().manual_seed(2)).mask)
    # With the same mask passed instead of drawn, dropout and layerdrop draw the same from the default generator.
    assert_same_output(out, call(None, out.mask))
    assert_same_output(out, call(torch.Generator().manual_seed(2), out.mask))
    # Only the mask is drawn from the generator: its state afterwards is that after one draw.
    generator, reference = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    call(generator)
    sample_mask("chunk", tokens, GRID_F, 0.75, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize(
    ("masking", "ratio"),
    [("random", 0.75), ("chunk", 0.5), ("time", 0.4), ("frequency", 0.6), ("span", 0.3), ("chunk_official", 0.7)],
)
def test_forward_drawn_mask_follows_config(masking: str, ratio: float) -> None:
    model = build(masking=masking, mask_ratio=ratio)
    x, frames = batch([60, 45, 29])
    out = model(x, frames, generator=torch.Generator().manual_seed(3))
    tokens = torch.tensor(tokens_of([60, 45, 29]))
    assert torch.equal(
        out.mask, sample_mask(masking, tokens, GRID_F, ratio, generator=torch.Generator().manual_seed(3))
    )
    assert out.mask.sum(1).tolist() == (tokens - num_visible(tokens, ratio)).tolist()


@pytest.mark.parametrize("stride", [2, 3])
def test_prediction_stride_in_training_predicts_every_nth_masked_token(stride: int) -> None:
    model = build(prediction_stride=stride).train()
    x, frames = batch()
    mask = masks()
    out = model(x, frames, mask)
    clips, tokens = [], []
    for clip, count in enumerate(tokens_of(FRAMES)):
        masked = [token for token in range(count) if mask[clip, token]][::stride]
        clips += [clip] * len(masked)
        tokens += masked
    assert out.mask.nonzero().tolist() == [list(pair) for pair in zip(clips, tokens, strict=True)]
    assert len(out.pred_reconstruction) == len(out.pred_classification) == len(out.target) == len(clips)
    everything = build().train()(x, frames, mask)
    assert_rounding(out.target, everything.target[out.mask[everything.mask]])
    drawn = model(x, frames).mask.sum(1)
    assert drawn.tolist() == model.num_masked(frames).tolist()
    sizes, bounds = model.sizes_of(frames.tolist()), model.largest_sizes(len(x), x.shape[1])
    assert drawn.sum() == sizes.masked and drawn.max() == sizes.max_masked <= bounds.max_masked
    losses = []
    for counts in (None, sizes, sizes.bucket()):
        torch.manual_seed(0)
        losses.append(model(x, frames, sizes=counts).loss)
    assert_rounding(torch.stack(losses[1:]), losses[0].expand(2))


def test_prediction_stride_predictions_equal_all_if_the_decoder_sees_no_masked_token() -> None:
    """With values of the decoder's attention switched off, a masked token's prediction is its own alone."""
    models = [build(prediction_stride=stride).train() for stride in (1, 2)]
    for model in models:
        for layer in model.decoder.layers:
            layer.out_proj.weight.data.zero_()
    x, frames = batch()
    everything, some = (model(x, frames, masks()) for model in models)
    rows = some.mask[everything.mask]
    assert 0 < rows.sum() < len(rows)
    assert_rounding(some.pred_reconstruction, everything.pred_reconstruction[rows])
    assert_rounding(some.pred_classification, everything.pred_classification[rows])


def test_prediction_stride_decoder_equals_dense_layers_over_visible_and_predicted_tokens() -> None:
    model = build(prediction_stride=2, norm_first=True).train()
    x, frames = batch()
    latents: list[Tensor] = []
    model.encoder_projection.register_forward_hook(lambda module, inputs, output: latents.append(output))
    out = model(x, frames, masks())
    assert len(latents) == 1
    layer, width, first_visible, predictions = model.decoder.layers[0], model.config.decoder_embed_dim, 0, []
    for clip, count in enumerate(tokens_of(FRAMES)):
        tokens = [token for token in range(count) if not masks()[clip, token] or out.mask[clip, token]]
        is_masked = torch.tensor([bool(out.mask[clip, token]) for token in tokens])
        stream = model.mask_token.expand(len(tokens), -1).clone()
        num_visible_tokens = int((~is_masked).sum())
        stream[~is_masked] = latents[0][first_visible : first_visible + num_visible_tokens]
        first_visible += num_visible_tokens
        stream = stream + sinusoid(count, width)[tokens]
        heads = layer.qkv(layer.attn_norm(stream)).view(len(tokens), 3, model.config.num_heads, -1)
        attended = torch.nn.functional.scaled_dot_product_attention(*heads.permute(1, 2, 0, 3))
        stream = stream + layer.out_proj(attended.transpose(0, 1).flatten(1))
        stream = stream + layer.fc2(torch.nn.functional.gelu(layer.fc1(layer.ffn_norm(stream))))
        predictions.append(model.head(model.decoder.norm(stream))[is_masked])
    prediction = torch.cat(predictions)
    assert_rounding(prediction[:, : model.config.patch_dim], out.pred_reconstruction)
    assert_rounding(prediction[:, model.config.patch_dim :], out.pred_classification)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_prediction_stride_in_evaluation_predicts_all(impl: str) -> None:
    with_stride, plain = build(prediction_stride=2), build()
    with_stride.impl = plain.impl = impl
    x, frames = batch()
    assert_same_output(with_stride(x, frames, masks()), plain(x, frames, masks()))
    assert with_stride.sizes_of(frames.tolist()) == plain.sizes_of(frames.tolist())


def test_training_lowers_loss_and_changes_every_parameter() -> None:
    torch.manual_seed(0)
    model = MAEAST(config()).train()
    x, frames = batch()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = model(x, frames, masks())
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name


# ------------------------------------------------------------------------------------------------------ architecture


def test_init_parameters_have_expected_distributions() -> None:
    """Linears in the stacks: N(0, 0.02), zero bias. Other Linears: PyTorch's default. Mask token: U(0, 1)."""
    torch.manual_seed(0)
    model = MAEAST(MAEASTConfig.preset("patch_tiny", encoder_layers=2, encoder_projection=True))
    stack_linears = [
        m for stack in (model.encoder, model.decoder) for m in stack.modules() if isinstance(m, torch.nn.Linear)
    ]
    assert len(stack_linears) == 4 * 4
    for linear in stack_linears:
        values = linear.weight.double()
        bound = STANDARD_ERRORS / math.sqrt(values.numel())
        assert abs(values.mean()) < 0.02 * bound and abs(values.std() / 0.02 - 1) < bound
        assert values.abs().max() > 3.5 * 0.02  # normal, not uniform
        assert not linear.bias.any()
    for linear in (model.patch_embed, model.encoder_projection, model.head):
        limit = 1 / math.sqrt(linear.in_features)
        assert linear.weight.abs().max() <= limit and linear.bias.abs().max() <= limit
        assert linear.weight.abs().max() > 0.99 * limit and linear.bias.any()
    assert 0 <= model.mask_token.min() < 0.05 and 0.95 < model.mask_token.max() <= 1
    assert all((m.weight == 1).all() and m.eps == 1e-5 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_decoder_shares_heads_and_ffn_width_with_encoder() -> None:
    model = build(decoder_embed_dim=20, num_heads=4, ffn_dim=40)
    for stack, width in ((model.encoder, 16), (model.decoder, 20)):
        for layer in stack.layers:
            assert layer.fc1.weight.shape == (40, width) and layer.qkv.weight.shape == (3 * width, width)
            assert layer.config.num_heads == 4
    assert model.head.weight.shape == (2 * 16, 20) and model.mask_token.shape == (20,)
    x, frames = batch()
    _, grads = forward_backward(model, x, frames, masks())
    assert all(gradient.any() for name, gradient in grads.items())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"decoder_embed_dim": 16}, False), ({"decoder_embed_dim": 16, "encoder_projection": True}, True), ({}, True)],
)
def test_encoder_projection_exists_only_if_requested_or_needed(fields: dict, expected: bool) -> None:
    model = build(**fields)
    assert (model.encoder_projection is not None) is expected
    assert any(name.startswith("encoder_projection.") for name in model.state_dict()) is expected
    x, frames = batch()
    assert model(x, frames, masks()).loss.isfinite()


def test_patch_base_has_expected_parameter_count() -> None:
    with torch.device("meta"):
        model = MAEAST(MAEASTConfig.preset("patch_base"))
    d, ffn, p = 768, 3072, 256
    layer = 4 * d * d + 4 * d + 2 * d * ffn + ffn + d + 4 * d
    assert sum(x.numel() for x in model.parameters()) == 14 * layer + 2 * 2 * d + (p * d + d) + d + 2 * (d * p + p)


def test_attention_sdpa_matches_math() -> None:
    x, frames = batch()
    a, b = (forward_backward(build(attention=name), x, frames, masks()) for name in ("sdpa", "math"))
    for name in ("loss", "loss_per_clip", "pred_reconstruction", "pred_classification"):
        assert_rounding(getattr(a[0], name), getattr(b[0], name), name)
    for name in a[1]:
        if not name.endswith("qkv.bias"):  # the key part is rounding noise around 0
            assert_rounding(a[1][name], b[1][name], name, grad=True)


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["mae_ast_patch_chunk", "mae_ast_prenorm_proj"])
def test_forward_bf16_autocast_is_near_fp32(name: str) -> None:
    case = Golden(name)
    model = MAEAST.from_fairseq_state_dict(case.state_dict, case.options)
    source, mask = case["source"], case.mask
    exact, exact_grads = forward_backward(model, source, mask=mask)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(source, mask=mask)
    out.loss.backward()
    assert out.pred_reconstruction.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert torch.equal(out.target, exact.target.bfloat16()), "normalised in fp32, rounded once"
    for field in ("loss", "loss_reconstruction", "loss_classification", "loss_per_clip"):
        error = max_rel(getattr(out, field), getattr(exact, field))
        assert 0 < error <= BF16_LOSS, f"{field}: {error:.2g}"
    for parameter, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
        if not parameter.endswith("qkv.bias"):
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact_grads[parameter].flatten(), dim=0)
            assert cosine > 0.99, f"{parameter}: {cosine:.4f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_autocast_computes_losses_in_fp32(dtype: torch.dtype) -> None:
    """InfoNCE and MSE of the same predictions are not rounded to the autocast dtype."""
    model = build()
    x, frames = batch()
    with torch.autocast("cpu", dtype):
        out = model(x, frames, masks())
    mse, nce, _ = expected_losses(out, masks().sum(1).tolist(), norm_pix_loss=False)
    assert_rounding(out.loss_reconstruction, torch.tensor(np.mean(mse)), "loss_reconstruction")
    assert_rounding(out.loss_classification, torch.tensor(np.mean(nce)), "loss_classification")


def test_extract_features_autocast_is_near_fp32() -> None:
    model = build()
    x, frames = batch()
    with torch.no_grad():
        exact = model.extract_features(x, frames)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.extract_features(x, frames)
    assert out.last_hidden_state.dtype == torch.bfloat16
    assert 0 < max_rel(out.last_hidden_state, exact.last_hidden_state) < 10 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("features", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_forward_fp64_model_matches_fp32(features: torch.dtype, training: bool) -> None:
    """An fp64 model takes features of either precision; outputs and gradients agree with fp32 to its rounding."""
    x, frames = batch()
    out, grads = forward_backward(build().train(training), x, frames, masks())
    exact, exact_grads = forward_backward(build().double().train(training), x.to(features), frames, masks())
    assert exact.loss.dtype == exact.loss_per_clip.dtype == torch.float64
    for name in ("loss", "loss_per_clip", "pred_reconstruction", "target"):
        assert_rounding(getattr(out, name), getattr(exact, name), name)
    for name in grads:
        if not name.endswith("qkv.bias"):
            assert_rounding(grads[name], exact_grads[name], name, grad=True)
    state = build().double().extract_features(x.to(features), frames).last_hidden_state
    assert state.dtype == torch.float64
    assert_rounding(build().extract_features(x, frames).last_hidden_state, state)


@pytest.mark.parametrize("training", [False, True])
def test_forward_fp32_model_accepts_fp64_features(training: bool) -> None:
    x, frames = batch()
    a, b = (build().train(training)(features, frames, masks()) for features in (x, x.double()))
    assert_rounding(a.loss, b.loss)
    assert_rounding(a.loss_per_clip, b.loss_per_clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_forward_half_precision_weights_stay_near_fp32(dtype: torch.dtype, training: bool) -> None:
    x, frames = batch()
    exact, model = build(), build().to(dtype)
    model.train(training)
    exact.train(training)
    for features in (x, x.to(dtype)):
        out, grads = forward_backward(model, features, frames, masks())
        assert out.loss.dtype == torch.float32
        assert max_rel(out.loss, exact(x, frames, masks()).loss) < HALF_FEATURES[dtype]
        assert all(gradient.isfinite().all() for gradient in grads.values())
    assert model.extract_features(x, frames).last_hidden_state.dtype == dtype


# -------------------------------------------------------------------------------------------------- copies and files


def test_deepcopy_and_pickle_make_independent_models() -> None:
    model = build()
    x, frames = batch()
    model(x, frames, masks())
    before = model(x, frames, masks())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_output(twin(x, frames, masks()), before)
        assert twin.config == model.config
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
    assert_same_output(model(x, frames, masks()), before)


def with_rounded_tables(case: Golden) -> dict[str, Tensor]:
    """The official state of an fp16 run, whose sinusoid tables are rounded to fp16."""
    options = case.options
    tables = {}
    for name, option in (
        ("enc_sine_pos_embed.pe", "encoder_embed_dim"),
        ("dec_sine_pos_embed.pe", "decoder_embed_dim"),
    ):
        tables[name] = sinusoid(48_000, options[f"cfg/model/{option}"]).half()[None]
    return {**case.state_dict, **tables}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_first": True, "decoder_embed_dim": 16},
        {"decoder_layers": 0},
        {"patch_size": (2, BINS), "masking": "span"},
    ],
)
def test_save_pretrained_round_trip_is_bit_exact(tmp_path: Path, fields: dict) -> None:
    model = build(**fields).train()
    x, frames = batch()
    if model.config.decoder_layers:
        model(x, frames)  # moves the running statistics
    model.save_pretrained(tmp_path / "m")
    loaded = MAEAST.from_pretrained(tmp_path / "m")
    assert not loaded.training
    assert loaded.config == model.config
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    model.eval()
    features = model.extract_features(x, frames), loaded.extract_features(x, frames)
    assert torch.equal(features[0].last_hidden_state, features[1].last_hidden_state)
    if model.config.decoder_layers:
        outs = [m(x, frames, generator=torch.Generator().manual_seed(0)) for m in (model, loaded)]
        assert_same_output(outs[0], outs[1])


def test_save_pretrained_writes_config_and_safetensors(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"README.md"} == {"config.json", "model.safetensors"}
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("model_type") == "mae_ast"
    assert MAEASTConfig.from_dict(fields) == model.config
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == set(model.state_dict())
    assert not any("table" in name for name in weights), "a computed position table must not be saved"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_position_table_loaded_is_used_and_saved_bit_exact(tmp_path: Path) -> None:
    case = Golden("mae_ast_patch_small")
    official = with_rounded_tables(case)
    rounded = MAEAST.from_fairseq_state_dict(official, case.options)
    computed = MAEAST.from_fairseq_state_dict(case.state_dict, case.options)
    source, lengths = case.whole_patch_source

    def features(model: MAEAST) -> Tensor:
        with torch.no_grad():
            return model.extract_features(source, lengths).last_hidden_state

    def loss(model: MAEAST) -> Tensor:
        with torch.no_grad():
            return model(case["source"], mask=case.mask).loss

    assert torch.equal(rounded.encoder_positions.table, official["enc_sine_pos_embed.pe"][0].float())
    assert not torch.equal(features(rounded), features(computed)), "the rounded table must matter"
    rounded.save_pretrained(tmp_path)
    loaded = MAEAST.from_pretrained(tmp_path)
    for table in ("encoder_positions", "decoder_positions"):
        assert torch.equal(getattr(loaded, table).table, getattr(rounded, table).table)
    assert torch.equal(features(loaded), features(rounded)) and torch.equal(loss(loaded), loss(rounded))
    again = copy.deepcopy(loaded)
    assert set(again.state_dict()) == set(rounded.state_dict()) != set(computed.state_dict())
    # The same weights with that table in place of the computed one.
    computed.encoder_positions.table = official["enc_sine_pos_embed.pe"][0].float()
    assert torch.equal(features(loaded), features(computed))


@pytest.mark.parametrize("shape", [(10, 7), (2048,), (48_000, 17), (1, 48, 16)])
def test_from_pretrained_wrong_position_table_width_raises(tmp_path: Path, shape: tuple[int, ...]) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "encoder_positions.table": torch.zeros(shape)}, path)
    with pytest.raises(ValueError, match=r"encoder_positions\.table"):
        MAEAST.from_pretrained(tmp_path)


def test_position_table_loaded_keeps_rows_when_it_grows(tmp_path: Path) -> None:
    table = sinusoid(60, 16).half().float()
    model = build()
    model.load_state_dict({**model.state_dict(), "encoder_positions.table": table})
    model.extract_features(torch.zeros(1, 4 * 40, BINS))  # 120 tokens
    grown = model.encoder_positions.table
    assert torch.equal(grown[:60], table)
    assert torch.equal(grown[60:], sinusoid(len(grown), 16)[60:])


def test_from_pretrained_folder_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("network access")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(mae_ast_fast.models.saved, "hf_hub_download", refuse)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        assert torch.equal(MAEAST.from_pretrained(folder).head.weight, model.head.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError):
        MAEAST.from_pretrained(tmp_path)


def test_from_pretrained_applies_and_checks_options(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    loaded = MAEAST.from_pretrained(tmp_path, impl="torch", attention="math")
    assert (loaded.impl, loaded.attention) == ("torch", "math")
    with pytest.raises(ValueError, match=r"sdpa.*'flashy'"):
        MAEAST.from_pretrained(tmp_path, attention="flashy")
    for misspelt in ({"atention": "math"}, {"config": config()}):
        with pytest.raises(TypeError, match=next(iter(misspelt))):
            MAEAST.from_pretrained(tmp_path, **misspelt)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(**fields: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content.update(fields)
        path.write_text(json.dumps({name: value for name, value in content.items() if value != "REMOVE"}))

    return edit


def _weights(change: Any) -> Any:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors"]),
    "config cut": (lambda d: _cut(d / "config.json"), ["config.json"]),
    "config empty": (lambda d: (d / "config.json").write_text(""), ["config.json"]),
    "config not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00{"), ["config.json"]),
    "config a list": (lambda d: (d / "config.json").write_text("[1, 2]"), ["config.json"]),
    "config null": (lambda d: (d / "config.json").write_text("null"), ["config.json"]),
    "config nested too deeply": (lambda d: (d / "config.json").write_text("[" * 100_000), ["config.json", "recursion"]),
    "weights cut": (lambda d: _cut(d / "model.safetensors"), ["model.safetensors", "damaged"]),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors", "damaged"]),
    "weights of another kind": (lambda d: (d / "model.safetensors").write_bytes(b"PK" * 500), ["model.safetensors"]),
    "unknown field": (_edit(depth=3), ["depth", "num_mel_bins"]),
    "wrong field": (_edit(dropout="none"), ["dropout", "none"]),
    "field of the wrong kind": (_edit(patch_size=16), ["patch_size", "16"]),
    "wrong value": (_edit(num_heads=5), ["num_heads=5", "16"]),
    "another model": (_edit(model_type="wav2vec2"), ["mae_ast", "wav2vec2"]),
    "no model type": (_edit(model_type="REMOVE"), ["mae_ast", "None"]),
    "more layers than tensors": (_edit(encoder_layers=10**9), ["config.json", "more layers", "1000000000"]),
    "other sizes": (_edit(embed_dim=24), ["config.json", "patch_embed.weight", "16", "24"]),
    "missing tensor": (_weights(lambda w: w.pop("head.bias")), ["head.bias", "Missing"]),
    "unexpected tensor": (_weights(lambda w: w.update(extra=torch.zeros(2))), ["extra", "Unexpected"]),
    "wrong shape": (_weights(lambda w: w.update(mask_token=torch.zeros(9))), ["mask_token", "9"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_from_pretrained_damaged_files_error_names_problem(tmp_path: Path, damage: str) -> None:
    build().save_pretrained(tmp_path)
    spoil, words = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        MAEAST.from_pretrained(tmp_path)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_save_pretrained_failed_write_keeps_previous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that fails while it writes the weights leaves the previous files."""
    model = build()
    model.save_pretrained(tmp_path)

    def die(tensors: dict[str, Tensor], path: Path, *args: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(mae_ast_fast.models.saved, "save_file", die)
    with pytest.raises(OSError):
        build(seed=1).save_pretrained(tmp_path)
    assert torch.equal(MAEAST.from_pretrained(tmp_path).head.weight, model.head.weight)


def test_from_pretrained_missing_folder_does_not_query_hub(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nothing"), "./nothing", "runs/of/mine"):
        with pytest.raises(ValueError, match=r"nothing|runs/of/mine.* is neither a folder"):
            MAEAST.from_pretrained(missing)


# ------------------------------------------------------------------------------------------------------------ errors


def test_init_checks_impl_attention_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for impl in ("auto", "torch"):
        assert MAEAST(config(), impl=impl).impl == impl
    assert MAEAST(config(), impl="triton").impl == "triton"  # on a GPU, or under the interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"triton.*CUDA device.*torch"):
        MAEAST(config(), impl="triton")
    with pytest.raises(ValueError, match=r"auto, torch, triton.*'cuda'"):
        MAEAST(config(), impl="cuda")
    with pytest.raises(ValueError, match=r"auto, sdpa, math.*'flashy'"):
        MAEAST(config(), attention="flashy")
    for wrong in ({}, None, "patch_base"):
        with pytest.raises(ValueError, match=f"MAEASTConfig.*{type(wrong).__name__}"):
            MAEAST(wrong)


WRONG_INPUTS = [
    ({"features": None}, ["(B, T, 12)", "NoneType"]),
    ({"features": np.zeros((4, 29, 12), np.float32)}, ["(B, T, 12)", "ndarray"]),
    ({"features": torch.zeros(29, 12)}, ["(B, T, 12)", "(29, 12)"]),
    ({"features": torch.zeros(4, 29, 13)}, ["(B, T, 12)", "(4, 29, 13)"]),
    ({"features": torch.zeros(4, 12, 29)}, ["(B, T, 12)", "(4, 12, 29)"]),
    ({"features": torch.zeros(0, 29, 12)}, ["clips", "0"]),
    ({"features": torch.zeros(4, 29, 12, dtype=torch.long)}, ["floating point", "int64"]),
    ({"lengths": torch.tensor([29, 8, 16])}, ["(4,)", "(3,)"]),
    ({"lengths": torch.tensor([[29, 8, 16, 21]])}, ["(4,)", "(1, 4)"]),
    ({"lengths": torch.tensor(29)}, ["(4,)", "()"]),
    ({"lengths": torch.tensor([29.0, 8, 16, 21])}, ["integers", "float32"]),
    ({"lengths": torch.tensor([29, 8, 16, 21], dtype=torch.complex64)}, ["integers", "complex64"]),
    ({"lengths": torch.ones(4, dtype=torch.bool)}, ["integers", "bool"]),
    ({"lengths": ["29", "8", "16", "21"]}, ["lengths"]),
    ({"lengths": torch.tensor([30, 8, 16, 21])}, ["29", "[30, 8, 16, 21]"]),
    ({"lengths": torch.tensor([29, -1, 16, 21])}, ["0", "[29, -1, 16, 21]"]),
]
WRONG_MASKS = [
    ([[True, False]], ["bool", "list"]),
    (torch.zeros(4, 21), ["bool", "float32", "(4, 21)"]),
    (torch.zeros(4, 21, dtype=torch.long), ["bool", "int64"]),
    (torch.zeros(21, dtype=torch.bool), ["(B, L)", "(21,)"]),
    (torch.zeros(4, 7, 3, dtype=torch.bool), ["(B, L)", "(4, 7, 3)"]),
    (torch.zeros(3, 21, dtype=torch.bool), ["(4, L)", "(3, 21)"]),
    (torch.zeros(4, 20, dtype=torch.bool), ["21", "(4, 20)"]),
]


@pytest.mark.parametrize("method", ["forward", "extract_features"])
@pytest.mark.parametrize(("wrong", "words"), WRONG_INPUTS, ids=[str(words) for _, words in WRONG_INPUTS])
def test_invalid_input_error_names_expected_and_actual(method: str, wrong: dict, words: list[str]) -> None:
    x, frames = batch()
    with pytest.raises(ValueError) as caught:
        getattr(build(), method)(**{"features": x, "lengths": frames, **wrong})
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert next(iter(wrong)) in str(caught.value)


@pytest.mark.parametrize(("mask", "words"), WRONG_MASKS, ids=[str(words) for _, words in WRONG_MASKS])
def test_invalid_mask_error_names_expected_and_actual(mask: Any, words: list[str]) -> None:
    x, frames = batch()
    with pytest.raises(ValueError) as caught:
        build()(x, frames, mask)
    assert not [word for word in ["mask", *words] if word not in str(caught.value)], str(caught.value)


def test_layerdrop_graph_is_single_and_static(tmp_path: Path) -> None:
    """No branch on the draw: the stack traces as one graph, and DDP's static graph holds with skipped layers."""
    model = build(encoder_layerdrop=0.5, encoder_layers=3).train()
    packing = mae_ast_fast.ops.packing.Packing.of(torch.ones(2, 6, dtype=torch.bool))
    x = torch.randn(12, model.config.embed_dim)
    compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    expected = model.encoder(x, packing, PLAIN)[0]
    torch.manual_seed(3)
    assert_rounding(compiled(x, packing, PLAIN)[0], expected)

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model, static_graph=True, find_unused_parameters=False)
        features, frames = batch([40, 24])
        for _ in range(4):
            parallel(features, frames).loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            model.zero_grad()
    finally:
        torch.distributed.destroy_process_group()
