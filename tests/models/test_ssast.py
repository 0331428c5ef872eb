"""SSAST against the official tensors, a plain ViT and itself clip by clip; masks, files and configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from goldens import Golden, time_major
from kernel_checks import DEVICE
from policy import BF16_LOSS, STANDARD_ERRORS, assert_golden, assert_golden_zero, assert_rounding, max_rel
from torch import Tensor

from mae_ast_fast import MAEAST, MAEASTConfig, fbank
from mae_ast_fast.checkpoints.ssast import convert_official
from mae_ast_fast.models.config import SSAST_OBJECTIVES, SSASTConfig
from mae_ast_fast.models.ssast import SSAST, _PositionRows
from mae_ast_fast.ops import masking

PATHS = [("torch", "sdpa"), ("torch", "math"), ("triton", "auto")]
SHAPES = {
    "patch": {"num_mel_bins": 24, "patch_size": (5, 4), "input_frames": 52, "mask_patches": 40},  # 6 x 10 tokens
    "frame": {"num_mel_bins": 12, "patch_size": (2, 12), "input_frames": 40, "mask_patches": 13},  # 20 tokens
}
FRAMES = [52, 11, 23]
UNEQUAL = {"patch": FRAMES, "frame": [40, 5, 22]}
LOSSES = ("loss", "loss_reconstruction", "loss_classification", "accuracy", "loss_per_clip")


def build(shape: str = "patch", impl: str = "torch", attention: str = "auto", **fields: Any) -> SSAST:
    """A small model with weights so large that attention and feed-forward blocks matter."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "num_heads": 3, "layers": 2}
    model = SSAST(SSASTConfig(**{**sizes, **SHAPES[shape], **fields}), impl=impl, attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    return model.train()


def batch(model: SSAST, frames: list[int], padding: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(frames), max(frames), model.config.num_mel_bins), padding)
    for clip, count in enumerate(frames):
        x[clip, :count] = torch.randn(count, model.config.num_mel_bins, generator=generator)
    return x, torch.tensor(frames)


def forward_backward(model: SSAST, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*args, **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], zero: Any = assert_golden_zero) -> None:
    """Two gradients are 0 up to rounding: of the keys' bias, and of the bias that all predictions share."""
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        if name == "classification_head.2.bias":
            zero(gradient, name)
        elif name.endswith("qkv.bias"):
            q, k, v = gradient.chunk(3)
            expected_qkv = expected[name].chunk(3)
            zero(k, name)
            assert_rounding(torch.cat((q, v)), torch.cat((expected_qkv[0], expected_qkv[2])), name, grad=True)
        else:
            assert_rounding(gradient, expected[name], name, grad=True)


def assert_small(x: Tensor, name: str) -> None:
    """``x`` is rounding noise of gradients of magnitude 1 and more."""
    scale = torch.full_like(x[:1], 10.0)
    assert_rounding(torch.cat((x, scale)), torch.cat((torch.zeros_like(x), scale)), name, grad=True)


# ------------------------------------------------------------------------------------------------ official tensors


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("ssast_patch")


GOLDEN_GRID, GOLDEN_PATCH = (8, 16), (16, 16)  # frequency and time extents


def scattered(index: Tensor) -> Tensor:
    """The mask (B, L) of recorded token indices (B, M)."""
    mask = torch.zeros(len(index), math.prod(GOLDEN_GRID), dtype=torch.bool).scatter_(1, index, True)
    return time_major(mask, 1, GOLDEN_GRID)


def in_token_order(prediction: Tensor, index: Tensor) -> Tensor:
    """Recorded predictions (B, M, P) of recorded token indices (B, M), as the model returns them."""
    by_token = prediction.new_zeros(len(index), math.prod(GOLDEN_GRID), prediction.shape[2])
    by_token = by_token.scatter(1, index[:, :, None].expand_as(prediction), prediction)
    return time_major(time_major(by_token, 1, GOLDEN_GRID)[scattered(index)], 1, GOLDEN_PATCH)


@pytest.mark.parametrize(("impl", "attention"), PATHS)
def test_ssast_two_pass_step_matches_golden(golden: Golden, impl: str, attention: str) -> None:
    config, weights = convert_official(golden.state_dict, num_heads=3)
    assert config.mask_patches == golden.options["cfg/mask_patch"]
    assert config.num_patches == golden.options["cfg/num_patches"]
    model = SSAST(dataclasses.replace(config, objective="joint_two_pass"), impl=impl, attention=attention)
    model.load_state_dict(weights)
    model.train().to(device := DEVICE if impl == "triton" else "cpu")
    indices = golden["mask_index_mpc"], golden["mask_index_mpg"]
    mask = tuple(scattered(index).to(device) for index in indices)
    out = model(golden["source"].to(device), mask=mask)
    out.loss.backward()

    assert_golden(out.loss.cpu(), golden["loss_joint"], "loss")
    assert_golden(out.loss_per_clip.mean().cpu(), golden["loss_joint"], "loss_per_clip")
    assert_golden(out.loss_classification.cpu(), golden["nce"], "nce")
    assert_golden(out.loss_reconstruction.cpu(), golden["mse"], "mse")
    assert_golden(out.accuracy.cpu(), golden["acc"], "acc")
    predictions = (out.pred_classification, "pred_mpc"), (out.pred_reconstruction, "pred_mpg")
    image = golden["source"].transpose(1, 2)[:, None]
    patches = F.unfold(image, GOLDEN_PATCH, stride=GOLDEN_PATCH).transpose(1, 2)
    patches = time_major(time_major(patches, 1, GOLDEN_GRID), 2, GOLDEN_PATCH)
    for number, (prediction, name) in enumerate(predictions):
        assert_golden(prediction.cpu(), in_token_order(golden[name], indices[number]), name)
        assert torch.equal(out.target[number].cpu(), patches[mask[number].cpu()])
        assert torch.equal(out.mask[number], mask[number])

    recorded = golden.section("grads/")
    without_grad = golden.options["params_without_grad"]
    assert not set(without_grad) & set(recorded)
    untrained = {name: golden.state_dict[name] for name in without_grad}
    expected = convert_official({**recorded, **untrained}, num_heads=3)[1]
    actual = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        if name == "classification_head.2.bias":  # moves all logits of a softmax alike: rounding noise around 0
            assert_golden_zero(gradient, name)
            assert_golden_zero(expected[name], name)
        elif name.endswith("qkv.bias"):
            for chunk, (a, e) in enumerate(zip(gradient.chunk(3), expected[name].chunk(3), strict=True)):
                if chunk == 1:  # the key bias cancels in the softmax
                    assert_golden_zero(a, name)
                else:
                    assert_golden(a, e, name)
        else:
            assert_golden(gradient, expected[name], name)


# ------------------------------------------------------------------------------------------------- second opinion


def plain_clip(model: SSAST, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the two heads, and targets, of one clip (T, F) of whole patches with mask (L,), by a plain ViT."""
    c, p = model.config, dict(model.named_parameters())
    kt, kf = c.patch_size
    image = x.T[None, None]  # (1, 1, F, T)
    columns, grid_f = x.shape[0] // kt, c.num_mel_bins // kf
    official_mask = time_major(mask, 0, (columns, grid_f))  # frequency before time, as a convolution over (F, T) has it
    kernel = p["patch_embed.weight"].reshape(-1, 1, kf, kt)
    y = F.conv2d(image, kernel, p["patch_embed.bias"], stride=(kf, kt))[0].flatten(1).T  # (L, D), f-major
    y = torch.stack([p["mask_token"] if official_mask[i] else y[i] for i in range(len(mask))])
    rows = [2 + f * (c.input_frames // kt) + t for f in range(grid_f) for t in range(columns)]
    y = torch.cat((p["cls_token"][None], p["dist_token"][None], y)) + p["positions"][[0, 1, *rows]]

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    def linear(v: Tensor, name: str) -> Tensor:
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for i in range(c.layers):
        block = f"encoder.layers.{i}"
        q, k, v = linear(norm(y, f"{block}.attn_norm"), f"{block}.qkv").chunk(3, 1)
        width = c.embed_dim // c.num_heads
        heads = []
        for h in range(c.num_heads):
            head = slice(h * width, (h + 1) * width)
            heads.append(torch.softmax(q[:, head] @ k[:, head].T / math.sqrt(width), 1) @ v[:, head])
        y = y + linear(torch.cat(heads, 1), f"{block}.out_proj")
        z = linear(norm(y, f"{block}.ffn_norm"), f"{block}.fc1")
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        y = y + linear(z, f"{block}.fc2")
    y = norm(y, "encoder.norm")[2:]
    outputs = [
        linear(linear(y, f"{head}.0").clamp(min=0), f"{head}.2")
        for head in ("classification_head", "reconstruction_head")
    ]
    outputs.append(F.unfold(image, (kf, kt), stride=(kf, kt))[0].T)
    return tuple(time_major(time_major(rows, 0, (grid_f, columns))[mask], 1, (kf, kt)) for rows in outputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_ssast_matches_plain_vit(shape: str) -> None:
    model = build(shape).double()
    frames = UNEQUAL[shape]
    x, lengths = batch(model, frames, padding=1e4)  # frames past a clip's end are never read
    x = x.double()
    mask = model.sample_mask(lengths, max(frames), seed=3)
    mask[0, :3] = True  # a count that differs from the drawn one
    out, gradients = forward_backward(model, x, lengths, mask)

    kt, grid_f = model.config.patch_size[0], model.config.grid_f
    plain, rows = [], []
    for clip, count in enumerate(frames):
        columns = count // kt
        clip_mask = mask[clip, : columns * grid_f]
        plain.append(plain_clip(model, x[clip, : columns * kt], clip_mask))
        rows.append(int(clip_mask.sum()))
    model.zero_grad()
    nce = mse = hits = 0.0
    for number, (classification, reconstruction, target) in enumerate(plain):
        scores = torch.log_softmax(target @ classification.T, 1)
        nce_sum, mse_sum = -scores.diagonal().sum(), (reconstruction - target).square().mean(1).sum()
        assert_rounding(out.loss_per_clip[number], (nce_sum + 10 * mse_sum) / rows[number], "loss_per_clip")
        hits += (scores.argmax(0) == torch.arange(len(target))).sum()
        nce, mse = nce + nce_sum, mse + mse_sum
    nce, mse = nce / sum(rows), mse / sum(rows)
    (nce + 10 * mse).backward()
    assert_rounding(out.loss, nce + 10 * mse, "loss")
    assert_rounding(out.loss_classification, nce, "nce")
    assert_rounding(out.loss_reconstruction, mse, "mse")
    assert_rounding(out.accuracy, hits.double() / sum(rows), "accuracy")
    columns = zip(*plain, strict=True)
    fields = ("pred_classification", "pred_reconstruction", "target")
    for name, clip_values in zip(fields, columns, strict=True):
        assert_rounding(getattr(out, name), torch.cat(clip_values), name)
    assert_gradients(gradients, {name: p.grad for name, p in model.named_parameters()})
    assert 0.0 < out.accuracy < 1.0


# -------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("objective", SSAST_OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ssast_batch_equals_its_clips(shape: str, objective: str) -> None:
    model = build(shape, objective=objective)
    frames = UNEQUAL[shape]
    x, lengths = batch(model, frames, padding=float("nan"))
    mask = model.sample_mask(lengths, max(frames), seed=1)
    out, gradients = forward_backward(model, x, lengths, mask)
    kt, grid_f = model.config.patch_size[0], model.config.grid_f

    def clip_mask(mask: Tensor, clip: int) -> Tensor:
        return mask[clip : clip + 1, : frames[clip] // kt * grid_f]

    singles, total = [], {}
    for clip, count in enumerate(frames):
        single_mask = tuple(clip_mask(m, clip) for m in mask) if isinstance(mask, tuple) else clip_mask(mask, clip)
        single, grads = forward_backward(model, x[clip : clip + 1, :count], None, single_mask)
        rows = int((single_mask[0] if isinstance(single_mask, tuple) else single_mask).sum())
        singles.append((single, rows))
        total = {name: total.get(name, 0) + gradient * rows for name, gradient in grads.items()}
    rows = sum(count for _, count in singles)
    for name in ("loss", "loss_reconstruction", "loss_classification", "accuracy"):
        assert_rounding(
            getattr(out, name), sum(getattr(single, name) * count for single, count in singles) / rows, name
        )
    assert_rounding(out.loss_per_clip, torch.cat([single.loss_per_clip for single, _ in singles]))
    for name in ("pred_reconstruction", "pred_classification"):
        assert_rounding(getattr(out, name), torch.cat([getattr(single, name) for single, _ in singles]), name)
    assert_gradients(gradients, {name: gradient / rows for name, gradient in total.items()}, assert_small)


def test_ssast_triton_matches_torch_on_unequal_clips() -> None:
    runs = []
    for impl, attention in (("torch", "sdpa"), ("triton", "short")):
        model = build(impl=impl, attention=attention, layers=1).to(DEVICE)
        x, lengths = batch(model, [26, 11])
        mask = model.sample_mask(lengths, 26, seed=1).to(DEVICE)
        sizes = model.sizes_of([26, 11]).bucket() if impl == "triton" else None  # with padding rows
        runs.append(forward_backward(model, x.to(DEVICE), lengths, mask, sizes=sizes))
    (expected, expected_gradients), (out, gradients) = runs
    for name in LOSSES:
        assert_rounding(getattr(out, name), getattr(expected, name), name)
    rows = len(expected.target)
    assert len(out.target) > rows
    for name in ("pred_reconstruction", "pred_classification", "target"):
        assert_rounding(getattr(out, name)[:rows], getattr(expected, name), name)
    assert_gradients(gradients, expected_gradients, assert_small)


def test_ssast_two_passes_equal_two_models() -> None:
    model = build(objective="joint_two_pass")
    frames = UNEQUAL["patch"]
    x, lengths = batch(model, frames)
    masks = model.sample_mask(lengths, max(frames), seed=1)
    masks[1][0, :7] = True  # the two may mask different counts
    out, gradients = forward_backward(model, x, lengths, masks)
    single = {}
    for number, objective in enumerate(("mpc", "mpg")):
        other = build(objective=objective)
        other.load_state_dict(model.state_dict())
        single[objective] = forward_backward(other, x, lengths, masks[number])
        assert torch.equal(out.target[number], single[objective][0].target)
        assert torch.equal(out.mask[number], single[objective][0].mask)
    (mpc, mpc_gradients), (mpg, mpg_gradients) = single["mpc"], single["mpg"]
    assert_rounding(out.loss, mpc.loss + 10 * mpg.loss)
    assert_rounding(out.loss_per_clip, mpc.loss_per_clip + 10 * mpg.loss_per_clip)
    assert torch.equal(out.pred_classification, mpc.pred_classification)
    assert torch.equal(out.pred_reconstruction, mpg.pred_reconstruction)
    assert torch.equal(out.accuracy, mpc.accuracy)
    assert len(mpc.pred_reconstruction) == len(mpg.pred_classification) == 0
    assert mpc.loss == mpc.loss_classification and mpg.loss == mpg.loss_reconstruction
    assert mpc.loss_reconstruction == mpg.loss_classification == mpg.accuracy == 0
    names = dict(model.named_parameters())
    assert_gradients(
        gradients, {name: mpc_gradients.get(name, 0) + 10 * mpg_gradients.get(name, torch.zeros(())) for name in names},
        assert_small,
    )  # fmt: skip


def test_ssast_two_passes_with_one_mask_equal_shared_pass() -> None:
    x, lengths = batch(model := build(), UNEQUAL["patch"])
    mask = model.sample_mask(lengths, 52, seed=1)
    shared, gradients = forward_backward(model, x, lengths, mask)
    two, again = forward_backward(build(objective="joint_two_pass"), x, lengths, (mask, mask))
    for name in (*LOSSES, "pred_reconstruction", "pred_classification"):
        assert_rounding(getattr(two, name), getattr(shared, name), name)
    assert_gradients(gradients, again, assert_small)


@pytest.mark.parametrize("objective", SSAST_OBJECTIVES)
def test_ssast_gradients_reach_every_used_parameter(objective: str) -> None:
    model = build(objective=objective)
    features = batch(model, [52, 52])[0].requires_grad_()  # targets stay data
    out, gradients = forward_backward(model, features)
    off = {"mpc": "reconstruction_head", "mpg": "classification_head"}.get(objective, "none")
    for name, parameter in model.named_parameters():
        if name.startswith(off):
            assert not parameter.requires_grad and name not in gradients
        else:
            assert gradients[name].any(), name
    for target in out.target if isinstance(out.target, tuple) else (out.target,):
        assert not target.requires_grad


def test_position_rows_gradient_matches_indexing() -> None:
    """The gradient is that of indexing; padding rows add none."""
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 1, 4, 5, 6, 8, 15, 15, 10])  # three clips, 15: no row
    weight = torch.randn(9, 3, dtype=torch.float64)
    (_PositionRows.apply(table, index, 3, torch.float64) * weight).sum().backward()
    expected = torch.zeros(5, 3, dtype=torch.float64).index_add(0, index[index < 15] % 5, weight[index < 15])
    assert torch.equal(table.grad, expected)


def test_ssast_shorter_clip_uses_leading_positions() -> None:
    model = build()
    x, _ = batch(model, [20])  # 4 of 10 columns
    _, gradients = forward_backward(model, x, mask=model.sample_mask(torch.tensor([20]), 20, seed=0))
    touched = gradients["positions"].any(1)
    assert touched[:2].all()
    assert torch.equal(touched[2:].view(6, 10), (torch.arange(10) < 4).expand(6, -1))


def test_ssast_mask_past_clip_end_is_ignored() -> None:
    model = build()
    x, lengths = batch(model, UNEQUAL["patch"])
    mask = model.sample_mask(lengths, 52, seed=1)
    past = torch.arange(60) >= (lengths // 5 * 6)[:, None]
    expected = model(x, lengths, mask)
    out = model(x, lengths, mask | past)
    assert torch.equal(out.mask, mask) and torch.equal(out.loss, expected.loss)
    assert torch.equal(out.target, expected.target)


@pytest.mark.parametrize("objective", ["joint", "joint_two_pass"])
def test_ssast_clip_without_loss_changes_nothing_even_if_not_finite(objective: str) -> None:
    model = build(objective=objective)
    x, lengths = batch(model, [52, 52])
    mask = model.sample_mask(lengths, 52, seed=1)
    masks = mask if isinstance(mask, tuple) else (mask,)
    for one_mask in masks:
        one_mask[1] = True  # no visible token
    losses = []
    for value in (0.0, float("inf")):
        x[1] = value
        losses.append(model(x, lengths, mask).loss)
    assert losses[0].isfinite() and losses[0] == losses[1]


def test_ssast_bf16_autocast_is_near_fp32() -> None:
    torch.manual_seed(0)
    model = SSAST(build().config)
    x, lengths = batch(model, UNEQUAL["patch"])
    mask = model.sample_mask(lengths, 52, seed=1)
    exact = model(x, lengths, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = forward_backward(model, x, lengths, mask)
    assert out.pred_reconstruction.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert max_rel(out.loss, exact.loss) <= BF16_LOSS
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())


# ---------------------------------------------------------------------------------------- sizes and traced graphs


@pytest.mark.parametrize("frames", [[52, 11, 28], [0, 52, 9, 16], [45, 45]], ids=str)
@pytest.mark.parametrize("objective", ["joint", "joint_two_pass"])
def test_ssast_bucket_sizes_change_no_result(objective: str, frames: list[int]) -> None:
    model = build(objective=objective)
    x, lengths = batch(model, frames)
    mask = model.sample_mask(lengths, max(frames), seed=1)
    sizes = model.sizes_of(frames)
    first = mask[0] if isinstance(mask, tuple) else mask
    assert sizes.masked == first.sum() and sizes.visible + sizes.masked == sum(f // 5 * 6 for f in frames)
    exact, expected = forward_backward(model, x, lengths, mask)
    for used_sizes in (sizes, sizes.bucket()):
        wide, gradients = forward_backward(model, x, lengths, mask, sizes=used_sizes)
        for name in LOSSES:
            assert_rounding(getattr(wide, name), getattr(exact, name), name)
        rows = len(exact.pred_classification)
        for name in ("pred_reconstruction", "pred_classification"):
            assert_rounding(getattr(wide, name)[:rows], getattr(exact, name), name)
        assert_gradients(gradients, expected, assert_small)
    assert len(wide.pred_classification) > rows


@pytest.mark.parametrize("objective", ["joint", pytest.param("joint_two_pass", marks=pytest.mark.long)])
def test_ssast_compile_batches_of_one_bucket_share_one_graph(objective: str) -> None:
    model = build(layers=1, objective=objective)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    graph = torch.compile(model, fullgraph=True, backend=counter)
    sizes = model.sizes_of([52, 20, 35]).bucket()
    for frames in ([52, 20, 35], [52, 24, 38]):
        assert model.sizes_of(frames).bucket() == sizes
        x, lengths = batch(model, frames)
        mask = model.sample_mask(lengths, 52, seed=1)
        expected, expected_gradients = forward_backward(model, x, lengths, mask, sizes=sizes)
        model.zero_grad()
        out = graph(x, lengths, mask, sizes=sizes)
        out.loss.backward()
        assert_rounding(out.loss, expected.loss)
        assert_gradients({n: p.grad for n, p in model.named_parameters()}, expected_gradients, assert_small)
        assert counter.frame_count == 1
    assert graph(x, lengths, sizes=sizes).loss.isfinite()  # masks drawn inside


# ---------------------------------------------------------------------------------------------------------- masks


def test_ssast_full_clip_masks_exactly_mask_patches() -> None:
    for tokens, mask_patches in [(n, m) for n in (2, 7, 60, 128, 512, 62 * 8) for m in range(1, n)]:
        config = SSASTConfig(patch_size=(1, 2), num_mel_bins=2, input_frames=tokens, mask_patches=mask_patches)
        assert config.num_patches == tokens
        assert tokens - masking.num_visible(tokens, config.mask_ratio) == mask_patches


@pytest.mark.parametrize("mask_patches", [1, 13, 40, 59])
def test_ssast_shorter_clip_masks_same_share_rounded_up(mask_patches: int) -> None:
    model = build(mask_patches=mask_patches)
    frames = torch.arange(53)
    mask = model.sample_mask(frames, 52, seed=0)
    assert mask.shape == (53, 60)
    for count, row in zip(frames.tolist(), mask, strict=True):
        tokens = count // 5 * 6
        assert row.sum() == min(-(-mask_patches * tokens // 60), max(tokens - 1, 0))
        assert not row[tokens:].any()
    sizes = model.sizes_of(frames.tolist())
    assert sizes.masked == mask.sum() and sizes.max_masked == mask.sum(1).max()


def test_ssast_masks_equal_those_of_mae_ast() -> None:
    model = build()
    frames = torch.tensor([52, 23])
    mask = model.sample_mask(frames, 52, seed=7, clip_ids=torch.tensor([5, 9]), epoch=3)
    drawn = masking.sample_mask(
        "chunk", frames // 5 * 6, 6, model.config.mask_ratio, seed=7, clip_ids=[5, 9], epoch=3, max_tokens=60
    )
    assert torch.equal(mask, drawn)
    alone = model.sample_mask(frames[1:], 25, seed=7, clip_ids=torch.tensor([9]), epoch=3)
    assert torch.equal(alone[0, :24], mask[1, :24]), "the mask must not depend on the batch"


def test_ssast_patch_masks_are_chunks_and_frame_masks_random() -> None:
    """Patches next to each other in time or frequency are more often alike than random ones; frames are not."""

    def alike(a: Tensor, b: Tensor) -> float:
        return (a == b).double().mean().item()

    draws = 400
    mask = build(mask_patches=30).sample_mask(torch.full((draws,), 52), 52, seed=0).view(draws, 10, 6)
    slack = STANDARD_ERRORS * math.sqrt(0.25 / draws)  # for one pair; the error of a mean over many is smaller
    assert alike(mask[:, 1:], mask[:, :-1]) > 0.5 + slack  # time is the first axis
    assert alike(mask[:, :, 1:], mask[:, :, :-1]) > 0.5 + slack
    frame = build("frame", mask_patches=10).sample_mask(torch.full((draws,), 40), 40, seed=0)
    share = 1 - 2 * (10 / 20) * (10 / 19)  # two of 20 tokens, 10 of them masked
    assert abs(alike(frame[:, 1:], frame[:, :-1]) - share) < STANDARD_ERRORS * math.sqrt(0.25 / draws)
    assert (frame.double().mean(0) - 0.5).abs().max() < STANDARD_ERRORS * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, torch.tensor(-(2**63)), None], ids=str)
def test_ssast_two_passes_draw_independent_masks(seed: Any) -> None:
    model = build(objective="joint_two_pass")
    frames = torch.full((50,), 52)

    def draw(frames: Tensor = frames) -> tuple[Tensor, Tensor]:
        return model.sample_mask(frames, 52, seed=seed, generator=None if seed is not None else torch.manual_seed(5))

    (mpc, mpg), again = draw(), draw()
    assert torch.equal(mpc, again[0]) and torch.equal(mpg, again[1])
    assert (mpc.sum(1) == 40).all() and (mpg.sum(1) == 40).all()
    both = (mpc & mpg).double().sum(1)  # each pass masks two thirds of 60 tokens
    assert abs(both.mean() - 60 * (2 / 3) ** 2) < STANDARD_ERRORS * both.std() / math.sqrt(len(both)), (
        "the masks must be independent"
    )
    if seed is not None:
        assert torch.equal(build().sample_mask(frames, 52, seed=seed), mpc)


def test_ssast_forward_draws_mask_from_generator() -> None:
    for shape in SHAPES:
        model = build(shape)
        x, lengths = batch(model, UNEQUAL[shape])
        outs = [model(x, lengths, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(outs[0].mask, outs[1].mask) and not torch.equal(outs[0].mask, outs[2].mask)
        expected = model.sample_mask(lengths, x.shape[1], generator=torch.Generator().manual_seed(1))
        assert torch.equal(outs[0].mask, expected)
        assert len(outs[0].target) == expected.sum() == model.sizes_of(UNEQUAL[shape]).masked


# ------------------------------------------------------------------------------------------------------ front end


def test_ssast_normalize_matches_official_loader() -> None:
    """(fbank - mean) / (std * 2), as in the official data loader, with its front end."""
    config = SSASTConfig.preset("patch_tiny", layers=1)
    model = SSAST(config)
    waveform = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    features, frames = fbank(waveform, frontend="ssast")
    expected = (features + 4.2677393) / (4.5689974 * 2)
    assert_rounding(model.normalize(features), expected)
    assert model(model.normalize(features), frames).loss.isfinite()


# ---------------------------------------------------------------------------------------------------------- files


def official_file(path: Path, golden: Golden, prefix: str = "module.", **changes: Any) -> Path:
    """A file with the golden's state dict as the official code saves it: DataParallel's OrderedDict with metadata."""
    weights = {name: value for name, value in {**golden.state_dict, **changes}.items() if value is not None}
    module = torch.nn.Module()
    state = module.state_dict()  # an OrderedDict with the attribute _metadata
    for name, value in weights.items():
        state[prefix + name] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_from_official_reads_weights_and_config(tmp_path: Path, golden: Golden, prefix: str) -> None:
    model = SSAST.from_official(official_file(tmp_path / "a.pth", golden, prefix), num_heads=3, impl="torch")
    assert model.impl == "torch" and not model.training
    assert model.config == SSASTConfig(embed_dim=48, num_heads=3, layers=2, input_frames=256, mask_patches=100)
    expected = convert_official(golden.state_dict, 3)[1]
    assert set(expected) == set(model.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    mask = scattered(golden["mask_index_mpc"])
    with torch.no_grad():
        out = model(golden["source"], mask=mask)
    assert_golden(out.loss_classification, golden["nce"])


def test_from_official_default_heads_have_64_values(tmp_path: Path, golden: Golden) -> None:
    path = official_file(tmp_path / "a.pth", golden)
    with pytest.raises(ValueError, match=r"num_heads must be at least 1, got 0 \(width 48 // 64\)"):
        SSAST.from_official(path)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"num_heads must be at least 1, got {wrong}"):
            SSAST.from_official(path, num_heads=wrong)
    with pytest.raises(ValueError, match="divisible by num_heads=5"):
        SSAST.from_official(path, num_heads=5)
    wide = SSAST(SSASTConfig.preset("frame_tiny", layers=1))
    source = official_names(wide)
    path = official_file(tmp_path / "b.pth", golden, **{**dict.fromkeys(golden.state_dict), **source})
    model = SSAST.from_official(path)
    assert model.config == wide.config and model.config.num_heads == 3 and model.config.mask_patches == 400
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in wide.state_dict().items())


def official_names(model: SSAST) -> dict[str, Tensor]:
    """A model's weights under the official names and in the official shapes."""
    (kt, kf), width = model.config.patch_size, model.config.embed_dim
    names = {
        "patch_embed": "v.patch_embed.proj", "attn_norm": "norm1", "ffn_norm": "norm2", "qkv": "attn.qkv",
        "out_proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "encoder.layers": "v.blocks",
        "encoder.norm": "v.norm", "classification_head": "cpredlayer", "reconstruction_head": "gpredlayer",
        "cls_token": "v.cls_token", "dist_token": "v.dist_token", "mask_token": "mask_embed",
        "positions": "v.pos_embed",
    }  # fmt: skip
    weights = {
        "p_input_fdim": torch.tensor(model.config.num_mel_bins),
        "p_input_tdim": torch.tensor(model.config.input_frames),
    }
    for name, value in model.state_dict().items():
        for ours, official in names.items():
            name = name.replace(ours, official)
        if "proj.weight" in name and "patch" in name:
            value = value.view(width, 1, kf, kt)
        elif name in ("v.cls_token", "v.dist_token", "mask_embed", "v.pos_embed"):
            value = value.view(1, -1, width)
        weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_embed": None}, "missing mask_embed"),
        ({"gpredlayer.0.weight": None, "v.norm.bias": None}, r"missing v.norm.bias; missing gpredlayer.0.weight"),
        ({"mlp_head.1.weight": torch.zeros(2, 2)}, "unexpected mlp_head.1.weight"),
        ({"v.blocks.7.norm1.weight": torch.zeros(48)}, "missing v.blocks.2.norm1.weight.*unexpected v.blocks.7.norm1"),
        ({"v.blocks.0.mlp.fc1.weight": torch.zeros(96, 48)}, r"fc1.weight has shape \(96, 48\), expected \(192, 48\)"),
        ({"v.norm.weight": torch.zeros(48, dtype=torch.int64)}, "v.norm.weight has dtype torch.int64"),
        ({"p_input_tdim": None}, "no SSAST pretraining checkpoint: it has no p_input_tdim"),
        ({"p_input_tdim": torch.tensor(512)}, "for every patch of 16 frames x 16 bins in 512 frames x 128 bins"),
        ({"p_input_tdim": torch.tensor(256.0)}, "p_input_tdim must be an integer"),
        ({"p_input_tdim": torch.tensor([256])}, r"p_input_tdim must have 0 dimensions, got shape \(1,\)"),
        ({"v.pos_embed": torch.zeros(1, 1214, 48)}, "got 1214 positions"),  # stride 10: overlapping patches
        ({"v.patch_embed.proj.weight": torch.zeros(48, 3, 16, 16)}, "3 channels"),
        ({"v.patch_embed.proj.weight": torch.zeros(48, 256)}, "must have 4 dimensions"),
        ({"v.cls_token": torch.zeros(1, 1, 64)}, r"v.cls_token has shape \(1, 1, 64\), expected \(1, 1, 48\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_from_official_invalid_weights_are_listed(tmp_path: Path, golden: Golden, changes: dict, message: str) -> None:
    path = official_file(tmp_path / "a.pth", golden, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        SSAST.from_official(path, num_heads=3)
    assert str(path) in str(caught.value)


class Shell:
    """Content of a hostile file: loading it as a pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_from_official_hostile_file_executes_nothing(tmp_path: Path, golden: Golden) -> None:
    proof = tmp_path / "executed"
    hostile = Shell(f"touch {proof}")
    for content in (hostile, {"module.v.cls_token": hostile}, {**golden.state_dict, "mask_embed": hostile}):
        torch.save(content, path := tmp_path / "a.pth")
        with pytest.raises(ValueError, match="system"):
            SSAST.from_official(path, num_heads=3)
        assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file must be hostile, or the test shows nothing"


@pytest.mark.parametrize("content", [{}, [1], {3: torch.zeros(2)}, {"module.x": torch.zeros(2)}, {"model": {}}])
def test_from_official_other_files_raise(tmp_path: Path, content: Any) -> None:
    torch.save(content, path := tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: "):
        SSAST.from_official(path)


def test_ssast_save_pretrained_round_trip_is_exact(tmp_path: Path) -> None:
    model = build(objective="joint_two_pass", mean=-5.0)
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "ssast"
    again = SSAST.from_pretrained(tmp_path / "a", attention="math")
    assert type(again) is SSAST and again.config == model.config and not again.training and again.attention == "math"
    x, lengths = batch(model, UNEQUAL["patch"])
    mask = model.sample_mask(lengths, 52, seed=1)
    assert_rounding(again(x, lengths, mask).loss, model(x, lengths, mask).loss)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    with pytest.raises(ValueError, match="not a configuration of MAEAST: expected model_type 'mae_ast', got 'ssast'"):
        MAEAST.from_pretrained(tmp_path / "a")


# --------------------------------------------------------------------------------------------- configuration, errors


def test_ssast_preset_matches_paper() -> None:
    sizes = {"base": (768, 12), "small": (384, 6), "tiny": (192, 3)}  # width, heads
    assert SSASTConfig.preset_names() == [f"{patch}_{size}" for patch in ("patch", "frame") for size in sizes]
    for name in SSASTConfig.preset_names():
        patch, size = name.split("_")
        config = SSASTConfig.preset(name)
        width, heads = sizes[size]
        assert (config.embed_dim, config.num_heads, config.layers, config.ffn_dim) == (width, heads, 12, 4 * width)
        assert (config.num_patches, config.mask_patches, config.objective) == (512, 400, "joint")
        assert config.patch_size == ((16, 16) if patch == "patch" else (2, 128)) and config.patch_dim == 256
        assert config.masking == ("chunk" if patch == "patch" else "random")
        with torch.device("meta"):
            blocks = SSAST(config).encoder.layers
        # qkv, projection and feed-forward with their biases, two norms
        assert sum(p.numel() for p in blocks.parameters()) == 12 * (12 * width**2 + 13 * width)
    assert SSASTConfig.preset("patch_base") == SSASTConfig()
    assert SSASTConfig.preset("frame_tiny", mask_patches=250).mask_patches == 250
    config = build("frame", objective="mpg").config
    assert SSASTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": (16,)}, "patch_size must be two positive integers"),
        ({"num_mel_bins": 100}, "num_mel_bins must be a multiple of the patch's frequency extent 16, got 100"),
        ({"num_mel_bins": 0}, "num_mel_bins must be a positive integer"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"num_heads": -1}, "num_heads must be a positive integer, got -1"),
        ({"num_heads": 7}, "embed_dim must be divisible by num_heads=7, got 768"),
        ({"layers": 2.0}, "layers must be a positive integer, got 2.0"),
        ({"input_frames": 15}, "input_frames must hold a patch of 16 frames, got 15"),
        ({"mask_patches": 512}, "mask_patches must be less than the 512 patches of 1024 frames, got 512"),
        ({"mask_patches": 0}, "mask_patches must be a positive integer"),
        ({"objective": "both"}, "objective must be one of joint, joint_two_pass, mpc, mpg, got 'both'"),
        ({"mean": math.nan}, "mean must be a finite number"),
        ({"std": 0.0}, "std must be a finite number > 0, got 0.0"),
        ({"depth": 3}, "unknown configuration fields depth; known are patch_size"),
    ],
)
def test_ssast_config_invalid_field_raises(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSASTConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("objective", "mask", "message"),
    [
        ("joint", torch.zeros(2, 60), r"mask must be a bool tensor \(B, L\), True = masked, got torch.float32"),
        ("joint", torch.zeros(2, 59).bool(), r"mask must be \(2, L\) with L >= 60, .*, got \(2, 59\)"),
        ("joint", (torch.zeros(2, 60).bool(),) * 2, "got tuple"),
        ("joint", torch.zeros(2, 60).bool(), "no clip has both visible and masked tokens"),
        ("joint_two_pass", torch.zeros(2, 60).bool(), r"mask must be a pair \(mask_mpc, mask_mpg\).*got Tensor"),
        ("joint_two_pass", (torch.zeros(2, 60).bool(),) * 3, "got 3 of them"),
        ("joint_two_pass", (torch.eye(2, 60).bool(), torch.eye(2, 59).bool()), r"L >= 60, .*, got \(2, 59\)"),
        ("joint_two_pass", (torch.eye(2, 60).bool(), torch.ones(2, 60).bool()), "no clip has both"),
    ],
)
def test_ssast_invalid_mask_raises(objective: str, mask: Any, message: str) -> None:
    model = build(objective=objective)
    with pytest.raises(ValueError, match=message):
        model(batch(model, [52, 52])[0], mask=mask)


def test_ssast_invalid_input_raises() -> None:
    model = build()
    bins = model.config.num_mel_bins
    for x, lengths, message in [
        (torch.zeros(1, 53, bins), None, "at most input_frames=52 frames per clip, got T=53"),
        (torch.zeros(1, 52, bins + 1), None, r"features must be a tensor \(B, T, 24\)"),
        (torch.zeros(1, 52, bins).long(), None, "floating point"),
        (torch.zeros(0, 52, bins), None, "no clips"),
        (torch.zeros(1, 52, bins), torch.tensor([53]), "lengths must be between 0 and T=52"),
        (torch.zeros(1, 52, bins), torch.tensor([1.0]), "lengths must be integers"),
        (torch.zeros(2, 4, bins), None, "no clip has both visible and masked tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(x, lengths)
    config = model.config
    with pytest.raises(ValueError, match="config must be a SSASTConfig, got MAEASTConfig"):
        SSAST(MAEASTConfig())
    for wrong in ({"impl": "cuda"}, {"attention": "flash9"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SSAST(config, **wrong)


def test_ssast_init_parameters_have_expected_deviations() -> None:
    torch.manual_seed(0)
    model = SSAST(SSASTConfig.preset("patch_tiny", layers=2))
    for parameter, std in [
        (model.positions, 0.02),
        (model.encoder.layers[1].fc1.weight, 0.02),
        (model.mask_token, 192**-0.5),
        (model.patch_embed.weight, 256**-0.5 / 3**0.5),
    ]:
        count = parameter.numel()
        assert abs(parameter.std().item() / std - 1) < STANDARD_ERRORS / math.sqrt(2 * count)
    assert not model.encoder.layers[0].qkv.bias.any()
