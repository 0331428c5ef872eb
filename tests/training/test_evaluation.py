"""Held-out evaluation: baselines against np.interp and plain loops; models that pass the check, and that fail it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy import PERFECT_MSE, assert_rounding
from torch import Tensor

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, fbank
from mae_ast_fast.data.audio import decode
from mae_ast_fast.data.shards import Batch, Crop, Segment
from mae_ast_fast.models.config import SSAST_OBJECTIVES
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.fbank import SAMPLE_RATE, num_frames
from mae_ast_fast.ops.masking import sample_mask
from mae_ast_fast.training import figures as figures_module
from mae_ast_fast.training.evaluation import (
    BASELINES,
    ERROR_UNIT,
    HELD_OUT_CLIPS,
    YARDSTICK,
    HeldOut,
    collapse_warnings,
    effective_rank,
    evaluate,
    failures,
    held_out_set,
    interpolation,
    mean_of_visible,
)
from mae_ast_fast.training.figures import plot_loss, plot_reconstruction, reconstruct, training_unit
from mae_ast_fast.training.options import PretrainOptions

AUDIO = Path(__file__).parent.parent / "audio"
KT, KF, BINS, GRID_F = 4, 3, 9, 3  # a small grid: three bands of three mel bins
OFF = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "encoder_layerdrop": 0.0}


def build(seed: int = 0, **fields: Any) -> MAEAST:
    torch.manual_seed(seed)
    sizes = {"num_mel_bins": BINS, "patch_size": (KT, KF), "embed_dim": 16, "ffn_dim": 24, "num_heads": 2}
    depth = {"encoder_layers": 1, "decoder_embed_dim": 16, "decoder_layers": 1, "mask_ratio": 0.5}
    model = MAEAST(MAEASTConfig(**{**sizes, **depth, **OFF, **fields})).eval()
    model.input_norm.running_mean.fill_(-7.5)
    model.input_norm.running_var.fill_(14.0)
    return model


def build_ssast(**fields: Any) -> SSAST:
    torch.manual_seed(0)
    sizes = {"num_mel_bins": BINS, "patch_size": (KT, KF), "embed_dim": 16, "num_heads": 2, "layers": 1}
    inputs = {"input_frames": 48, "mask_patches": 18, "mean": -7.5, "std": 3.0}
    model = SSAST(SSASTConfig(**{**sizes, **inputs, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large values, so that predictions differ from token to token
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter == 1))
    return model


def clips(num_frames: list[int], seed: int = 0, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(num_frames), max(num_frames), BINS), padding)
    for clip, count in enumerate(num_frames):
        x[clip, :count] = torch.randn(count, BINS, generator=generator) * 4 - 8
    return x, torch.tensor(num_frames)


def held_out(model: MAEAST | SSAST, num_frames: list[int], seed: int = 0, padding: float = 0.0) -> HeldOut:
    x, lengths = clips(num_frames, seed, padding)
    x = model.normalize(x)
    names = [f"clip {i}" for i in range(len(num_frames))]
    return HeldOut.of(
        model, x, lengths, names=names, kinds=["speech" if i % 2 else "sound" for i in range(len(num_frames))]
    )


# ------------------------------------------------------------------------------------------------ baselines by loops


def loop_mean(patches: np.ndarray, visible: np.ndarray, same_band: bool) -> np.ndarray:
    """(B, L, P): the mean visible patch of the clip, or of the token's band where it has one."""
    out = np.zeros_like(patches)
    for clip in range(len(patches)):
        visible_tokens = [token for token in range(patches.shape[1]) if visible[clip, token]]
        for token in range(patches.shape[1]):
            band = [other for other in visible_tokens if other % GRID_F == token % GRID_F]
            sources = band if same_band and band else visible_tokens
            if sources:
                out[clip, token] = sum(patches[clip, other] for other in sources) / len(sources)
    return out


def loop_interpolation(patches: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """(B, L, P): np.interp along time for each mel bin; the clip's mean visible patch if a band has none."""
    out = loop_mean(patches, visible, same_band=False)
    steps = patches.shape[1] // GRID_F
    for clip in range(len(patches)):
        for mel in range(BINS):
            band, f = divmod(mel, KF)
            times = [t for t in range(steps * KT) if visible[clip, t // KT * GRID_F + band]]
            if not times:
                continue
            values = [patches[clip, t // KT * GRID_F + band, t % KT * KF + f] for t in times]
            for t in range(steps * KT):
                out[clip, t // KT * GRID_F + band, t % KT * KF + f] = np.interp(t, times, values)
    return out


def grid(rows: list[str]) -> Tensor:
    """A mask (L,) in time-major order from one string per band, "." visible and "#" masked."""
    return torch.tensor([[c == "#" for c in row] for row in rows]).T.flatten()


AWKWARD = {
    "a band with nothing visible": ["######", ".#.##.", "#....#"],
    "only the first visible": [".#####", ".#####", ".#####"],
    "only the last visible": ["#####.", "#####.", "#####."],
    "only the first of one band": [".#####", "######", "######"],
    "only the last of one band": ["######", "######", "#####."],
    "the middle of each": ["##.###", "###.##", "##..##"],
    "gaps of every length": [".#.##.", "..###.", ".####."],
    "alternating": [".#.#.#", "#.#.#.", ".##..#"],
    "one masked": ["......", "...#..", "......"],
    "everything visible": ["......", "......", "......"],
    "the ends masked": ["##..##", "#....#", "###.##"],
}


def baselines_of(patches: Tensor, visible: Tensor) -> dict[str, tuple[Tensor, np.ndarray]]:
    patch_values, is_visible = patches.numpy(), visible.numpy()
    return {
        "mean": (mean_of_visible(patches, visible), loop_mean(patch_values, is_visible, same_band=False)),
        "band": (mean_of_visible(patches, visible, GRID_F), loop_mean(patch_values, is_visible, same_band=True)),
        "interpolation": (
            interpolation(patches, visible, (KT, KF), BINS),
            loop_interpolation(patch_values, is_visible),
        ),
    }


@pytest.mark.parametrize("mask", AWKWARD.values(), ids=AWKWARD.keys())
def test_baselines_of_awkward_masks_equal_loops(mask: list[str]) -> None:
    patches = torch.randn(1, 18, KT * KF, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, (actual, expected) in baselines_of(patches, ~grid(mask)[None]).items():
        assert_rounding(actual, torch.from_numpy(expected), name)


def test_baselines_of_unequal_clips_equal_loops() -> None:
    """Clips of 6, 1, 4, 0 and 3 patches in time, with random masks. Past a clip's tokens nothing is visible."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([6, 1, 4, 0, 3]) * GRID_F
    patches = torch.randn(5, 18, KT * KF, generator=generator, dtype=torch.float64)
    for _ in range(20):
        visible = (torch.rand(5, 18, generator=generator) < 0.4) & (torch.arange(18) < counts[:, None])
        for name, (actual, expected) in baselines_of(patches, visible).items():
            real = torch.arange(18) < counts[:, None]
            compared = real & visible.any(1, keepdim=True)
            assert_rounding(actual[compared], torch.from_numpy(expected)[compared], name)


def test_interpolation_of_a_line_is_exact_inside_and_constant_outside() -> None:
    frames = torch.arange(6 * KT, dtype=torch.float64)[None, :, None].expand(1, -1, BINS)
    visible = ~grid(["#.#.##", "#.#.##", "#.#.##"])[None]
    filled = reference.unpatchify(
        interpolation(reference.patchify(frames, (KT, KF)), visible, (KT, KF), BINS), (KT, KF), BINS
    )
    expected = frames.clamp(KT, 4 * KT - 1)  # visible patches are frames 4..7 and 12..15
    assert_rounding(filled, expected)


# -------------------------------------------------------------------------------------------------------- the report


Outputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def outputs_of_mae_ast(model: MAEAST, x: Tensor, mask: Tensor) -> Outputs:
    """For one clip (1, T, F): log-mel patches (1, L, P), predictions (M, P), InfoNCE (M,) and hits (M,)."""
    scale = 0.5 / math.sqrt(model.input_norm.running_var.item() + 1e-5)
    with torch.no_grad():
        out = model(x, None, mask)
    mean = model.input_norm.running_mean.item()
    patches = reference.patchify(x, (KT, KF)).double().numpy()
    target = (patches[mask.numpy()] - mean) * scale
    logits = out.pred_classification.double().numpy() @ target.T
    nce = np.log(np.exp(logits).sum(1)) - logits.diagonal()
    reconstruction = out.pred_reconstruction.double().numpy()
    if model.config.norm_pix_loss:
        spread = np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
        reconstruction = reconstruction * spread + target.mean(1, keepdims=True)
    return patches, reconstruction / scale + mean, nce, logits.argmax(1) == np.arange(len(logits))


def outputs_of_ssast(model: SSAST, x: Tensor, mask: Tensor) -> Outputs:
    """The same for SSAST; zeros for an objective that is off."""
    two_pass = model.config.objective == "joint_two_pass"
    with torch.no_grad():
        out = model(x, None, (mask, mask) if two_pass else mask)
    masked = int(mask.sum())
    patches = reference.patchify(x, (KT, KF)).double().numpy()
    nce = hit = np.zeros(masked)
    if model.config.classification_weight:
        logits = patches[mask.numpy()] @ out.pred_classification.double().numpy().T  # targets x predictions
        nce = np.log(np.exp(logits).sum(1)) - logits.diagonal()
        hit = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).argmax(0) == np.arange(len(logits))
    reconstruction = np.zeros((masked, KT * KF))
    if model.config.reconstruction_weight:
        reconstruction = out.pred_reconstruction.double().numpy()
    mean, scale = model.config.mean, 2 * model.config.std
    return patches * scale + mean, reconstruction * scale + mean, nce, hit


def expected_report(model: MAEAST | SSAST, held: HeldOut) -> dict[str, Any]:
    """A report computed clip by clip, from the model's predictions for that clip alone, with the loops above."""
    outputs_of = outputs_of_ssast if isinstance(model, SSAST) else outputs_of_mae_ast
    sums: dict[str, float] = {}
    num_masked = 0
    for clip, count in enumerate(held.num_frames.tolist()):
        tokens = count // KT * GRID_F
        mask = held.mask[clip : clip + 1, :tokens]
        masked = int(mask.sum())
        if not masked or masked == tokens:
            continue
        patches, prediction, nce, hit = outputs_of(model, held.log_mel[clip : clip + 1, :count], mask)
        is_masked = mask.numpy()
        target = patches[is_masked]
        baselines = {
            "mean_of_visible": loop_mean(patches, ~is_masked, same_band=False),
            "mean_of_visible_same_band": loop_mean(patches, ~is_masked, same_band=True),
            "interpolation": loop_interpolation(patches, ~is_masked),
        }
        predictions = {name: baseline[is_masked] for name, baseline in baselines.items()} | {"mse": prediction}
        errors = {name: ((values - target) ** 2).mean(1) / ERROR_UNIT for name, values in predictions.items()}
        errors["nce"], errors["accuracy"] = nce, hit
        errors["chance"] = np.full(masked, 1 / masked)
        for name, values in errors.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
        num_masked += masked
    means = {name: value / num_masked for name, value in sums.items()}
    report = {"masked_tokens": num_masked, "reconstruction_mse": means.pop("mse"), "info_nce": means.pop("nce")}
    return {**report, "accuracy": means.pop("accuracy"), "chance": means.pop("chance"), "baselines": means}


def assert_report(report: dict[str, Any], expected: dict[str, Any]) -> None:
    assert report["masked_tokens"] == expected["masked_tokens"]
    for name in ("reconstruction_mse", "info_nce", "accuracy", "chance"):
        assert_rounding(torch.tensor(report[name]), torch.tensor(expected[name]), name)
    for name, value in expected["baselines"].items():
        assert_rounding(torch.tensor(report["baselines"][name]), torch.tensor(value), name)


NUM_FRAMES = [29, 8, 41, 16, 5, 22]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_pix_loss": True},
        {"masking": "time"},
        {"masking": "frequency", "mask_ratio": 0.8},
        {"masking": "random"},
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluate_mae_ast_equals_loops(fields: dict, batch_size: int) -> None:
    model = build(**fields)
    held = held_out(model, NUM_FRAMES)
    report = evaluate(model, held, batch_size)
    assert_report(report, expected_report(model, held))
    assert report["clips"] == len(NUM_FRAMES)
    assert {"mean_of_visible", "mean_of_visible_same_band", "interpolation"} <= set(report["baselines"])


@pytest.mark.parametrize("objective", SSAST_OBJECTIVES)
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluate_ssast_equals_loops(objective: str, batch_size: int) -> None:
    model = build_ssast(objective=objective)
    held = held_out(model, NUM_FRAMES, padding=float("nan"))
    report = evaluate(model, held, batch_size)
    assert_report(report, expected_report(model, held))
    text = " ".join(report["failures"])
    assert ("MSE" in text) == (objective != "mpc"), "an untrained model fails in every objective that is on"
    assert ("accuracy" in text) <= (objective != "mpg")
    assert (report["accuracy"] > 0) == (report["info_nce"] > 0) == (objective != "mpg")


def test_evaluate_both_models_gives_same_masks_and_baselines() -> None:
    """With the same clips, patch grid and mask ratio, whatever their input normalisation and target."""
    mae_ast, ssast = build(norm_pix_loss=True), build_ssast()
    mae_ast_set, ssast_set = held_out(mae_ast, NUM_FRAMES), held_out(ssast, NUM_FRAMES)
    assert torch.equal(mae_ast_set.mask, ssast_set.mask)
    reports = evaluate(mae_ast, mae_ast_set), evaluate(ssast, ssast_set)
    for name, value in reports[0]["baselines"].items():
        assert_rounding(torch.tensor(reports[1]["baselines"][name]), torch.tensor(value), name)


def test_evaluate_ignores_clips_without_visible_or_masked_tokens() -> None:
    """Also if such clips make up a whole batch, and if a clip has all of its tokens masked, or none."""
    model = build()
    held = held_out(model, [29, 8, 3, 0, 16, 22, 2])
    held.mask[1] = torch.arange(held.mask.shape[1]) < 6  # all of its tokens
    held.mask[4] = False
    expected = expected_report(model, held)
    for batch_size in (1, 2, 3, 7):
        assert_report(evaluate(model, held, batch_size), expected)


def test_effective_rank_of_known_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 8, generator=generator)
    left, _ = torch.linalg.qr(torch.randn(20, 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    for spectrum, rank in (
        ([1.0] * 8, 8.0),
        ([5.0] * 3 + [0.0] * 5, 3.0),
        ([3.0, 1.0] + [0.0] * 6, 4 / 3**0.75),  # shares 3/4 and 1/4
    ):
        features = left * torch.tensor(spectrum, dtype=torch.float64) @ right
        assert_rounding(torch.tensor(effective_rank(7.0 * features)), torch.tensor(rank))
    assert_rounding(torch.tensor(effective_rank(torch.randn(20, 1, generator=generator) * one)), torch.tensor(1.0))
    assert effective_rank(torch.zeros(4, 8)) == 1.0


def test_evaluate_collapsed_features_warn_of_a_rank_below_a_sixteenth() -> None:
    assert collapse_warnings(2.0, max_rank=32) == []
    (line,) = collapse_warnings(1.99, max_rank=32)
    assert "effective rank 2.0 of 32" in line and "--optimizer muon" in line
    model = build(embed_dim=32, decoder_embed_dim=32)
    held = held_out(model, [32] * 40)
    assert evaluate(model, held)["warnings"] == []
    model.encoder.layers[-1].ffn_norm.weight.data.zero_()  # every token of every clip is the bias
    model.encoder.layers[-1].ffn_norm.bias.data.fill_(1.0)
    assert "effective rank 1.0 of 32" in evaluate(model, held)["warnings"][0]


def test_evaluate_model_with_nan_fails_with_a_report() -> None:
    model = build()
    model.patch_embed.weight.data.fill_(math.nan)
    report = evaluate(model, held_out(model, NUM_FRAMES))
    assert math.isnan(report["effective_rank"]) and report["warnings"] == []
    assert not report["passed"] and report["failures"]


def test_evaluate_effective_rank_is_that_of_mean_features_of_whole_clips() -> None:
    model = build()
    held = held_out(model, [29, 8, 3, 16, 22], padding=float("nan"))  # the third has no whole patch
    means = []
    for log_mel, count in zip(held.log_mel, held.num_frames.tolist(), strict=True):
        if count >= KT:
            with torch.no_grad():
                means.append(model.extract_features(log_mel[None, :count]).last_hidden_state[0].mean(0))
    expected = torch.tensor(effective_rank(torch.stack(means)))
    for batch_size in (1, 3):
        assert_rounding(torch.tensor(evaluate(model, held, batch_size)["effective_rank"]), expected)


def test_evaluate_rejects_set_without_usable_clip() -> None:
    model = build()
    held = held_out(model, [3, 2])
    with pytest.raises(ValueError, match="visible and masked"):
        evaluate(model, held)


def test_evaluate_ignores_values_in_padding() -> None:
    model = build()
    clean = evaluate(model, held_out(model, NUM_FRAMES))
    for padding in (float("nan"), float("inf"), 1e30):
        assert evaluate(model, held_out(model, NUM_FRAMES, padding=padding)) == clean


def test_evaluate_restores_the_model() -> None:
    for training in (True, False):
        model = build(dropout=0.3).train(training)
        before = copy.deepcopy(model.state_dict())
        first, second = (evaluate(model, held_out(model, NUM_FRAMES)) for _ in range(2))
        assert first == second, "eval mode: no dropout, no new statistics"
        assert model.training is training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        with pytest.raises(ValueError):
            evaluate(model, dataclasses.replace(held_out(model, NUM_FRAMES), mask=(torch.arange(5) < 2).expand(6, 5)))
        assert model.training is training


def test_held_out_masks_do_not_depend_on_seed_or_other_clips() -> None:
    model = build()
    x, frames = clips(NUM_FRAMES)
    names, kinds = list("abcdef"), ["sound"] * 6
    torch.manual_seed(1)
    first = HeldOut.of(model, x, frames, names=names, kinds=kinds)
    torch.manual_seed(2)
    second = HeldOut.of(build(seed=5, embed_dim=32), x, frames, names=names, kinds=kinds)
    assert torch.equal(first.mask, second.mask)
    fewer = HeldOut.of(model, x[:3], frames[:3], names=names[:3], kinds=kinds[:3])
    assert torch.equal(fewer.mask, first.mask[:3]), "the mask of clip i does not depend on later clips"
    tokens = frames // KT * GRID_F
    assert torch.equal(first.mask.sum(1), tokens - (tokens // 2).clamp(min=1))
    assert not (first.mask & (torch.arange(first.mask.shape[1]) >= tokens[:, None])).any()
    by_time = HeldOut.of(build(masking="time", mask_ratio=0.7), x, frames, names=names, kinds=kinds).mask
    assert not torch.equal(by_time, first.mask)
    assert (by_time.view(6, -1, GRID_F).float().mean(2) % 1 == 0).sum(1).min() >= by_time.shape[1] // GRID_F - 1


def test_held_out_select_returns_the_indexed_clips() -> None:
    held = held_out(build(), NUM_FRAMES)
    selected = held.select([4, 1])
    assert selected.names == ["clip 4", "clip 1"] and selected.kinds == ["sound", "speech"]
    assert torch.equal(selected.num_frames, held.num_frames[[4, 1]]) and torch.equal(selected.mask, held.mask[[4, 1]])
    assert torch.equal(selected.log_mel, held.log_mel[[4, 1]])
    longest = held.longest_of_each_kind(max_clips=4)
    assert longest.names == ["clip 2", "clip 0", "clip 5", "clip 3"]  # the longest sounds, the longest speech
    assert held.longest_of_each_kind(max_clips=1).names == ["clip 2", "clip 5"]


class FakeShards:
    """Held-out clips of one second or more by name; sounds, and speech where the name says so."""

    source, report = "fake", {"silent": {"names": ["a silent one"]}}

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def segments(self, split: str) -> list[Segment]:
        assert split == "held_out"
        placement = {"shard": "", "id": "", "group": "", "split": split, "offset": 0, "num_bytes": 0, "crc32": 0}
        return [
            Segment(
                **placement,
                name=name,
                kind="speech" if "speech" in name else "sound",
                index=0,
                num_samples=round(seconds * SAMPLE_RATE),
                codec="flac",
            )
            for name, seconds in self.seconds.items()
        ]

    def read(self, crops: list[Crop]) -> Batch:
        num_samples = torch.tensor([crop.num_samples for crop in crops])
        waveforms = torch.zeros(len(crops), int(num_samples.max()), dtype=torch.int16)
        return Batch(waveforms, num_samples, torch.arange(len(crops)), [crop.segment.name for crop in crops], [])


def test_held_out_set_of_the_default_corpus_is_that_of_the_yardstick() -> None:
    names = YARDSTICK["clips"]
    assert len(set(names)) == len(names) <= HELD_OUT_CLIPS
    model, options = MAEAST(MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1)), PretrainOptions()
    shards = FakeShards(dict.fromkeys(["one more", *reversed(names)], 3.0))
    held = held_out_set(model, shards, options)
    assert held.names == names, "in the order of the yardstick, which gives each clip its mask"
    shards = FakeShards(dict.fromkeys(["one more", *names[1:]], 3.0))
    assert "one more" in held_out_set(model, shards, options).names, "a clip is missing: another corpus"


def test_held_out_set_of_other_data_spreads_over_kinds() -> None:
    seconds = {f"sound {i:03}": 3.0 for i in range(50)} | {f"speech {i:03}": 3.0 for i in range(100)}
    seconds |= {"a silent one": 3.0, "a short speech": 0.5, "a long speech": 30.0}
    model = MAEAST(MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1))
    held = held_out_set(model, FakeShards(seconds), PretrainOptions(max_seconds=5.0))
    assert held.kinds.count("sound") == held.kinds.count("speech") == HELD_OUT_CLIPS // 2
    assert not {"a silent one", "a short speech"} & set(held.names)
    assert int(held.num_frames[held.names.index("a long speech")]) == num_frames(5 * SAMPLE_RATE)


# ---------------------------------------------------------------------------------------------------------- the check


def pretend(model: MAEAST, predict: Any) -> MAEAST:
    """Replace the model's predictions and accuracy by ``predict(output)``."""
    real = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = real(model, *args, **kwargs)
        return dataclasses.replace(out, **predict(out))

    model.forward = forward
    return model


def perfect(out: Any) -> dict[str, Tensor]:
    return {"pred_reconstruction": out.target, "accuracy": torch.ones(())}


def normalised(out: Any) -> dict[str, Tensor]:
    mean, spread = out.target.mean(1, keepdim=True), (out.target.var(1, keepdim=True) + 1e-6).sqrt()
    return {"pred_reconstruction": (out.target - mean) / spread, "accuracy": torch.ones(())}


def constant(out: Any) -> dict[str, Tensor]:
    return {"pred_reconstruction": out.target.mean(0, keepdim=True).expand_as(out.target), "accuracy": torch.zeros(())}


def test_evaluate_perfect_predictor_passes() -> None:
    for predict, fields in ((perfect, {}), (normalised, {"norm_pix_loss": True})):
        model = pretend(build(**fields), predict)
        report = evaluate(model, held_out(model, NUM_FRAMES))
        assert report["passed"] and report["failures"] == [] and report["reconstruction_mse"] < PERFECT_MSE


def test_evaluate_constant_predictor_fails_by_name() -> None:
    model = pretend(build(), constant)
    # The clips differ in loudness, so a clip's own mean predicts better than any constant.
    held = held_out(model, [32] * 6)
    held.log_mel += torch.linspace(-6, 6, 6)[:, None, None]
    report = evaluate(model, held)
    assert not report["passed"]
    assert all(any(name in line for line in report["failures"]) for name in ("mean_of_visible", "accuracy", "chance"))


def test_evaluate_untrained_model_fails() -> None:
    for seed in range(3):
        model = build(seed)
        report = evaluate(model, held_out(model, [32] * 10))
        assert not report["passed"] and report["failures"]


def test_evaluate_predictions_without_time_fail() -> None:
    """The mean of the masked patches of a clip's own band beats all baselines, but ignores the time.

    It uses more than a model could know. A model trained on time-shuffled targets comes close to it.
    """

    def cheat(out: Any) -> dict[str, Tensor]:
        prediction = torch.empty_like(out.target)
        clip, token = out.mask.nonzero(as_tuple=True)
        for key in set(zip(clip.tolist(), (token % GRID_F).tolist(), strict=True)):
            rows = (clip == key[0]) & (token % GRID_F == key[1])
            prediction[rows] = out.target[rows].mean(0)
        return {"pred_reconstruction": prediction, "accuracy": torch.ones(())}

    model = pretend(build(), cheat)
    report = evaluate(model, held_out(model, [48] * 8))
    assert report["reconstruction_mse"] < min(
        report["baselines"][name] for name in ("mean_of_visible", "mean_of_visible_same_band", "interpolation")
    )
    assert not report["passed"]


def loop_other_times(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Mean over masked tokens of the error of the predictions for the band's other masked times in the same clip."""
    clip, token = mask.nonzero()
    total = 0.0
    for i in range(len(clip)):
        others = [
            j for j in range(len(clip)) if j != i and clip[j] == clip[i] and token[j] % GRID_F == token[i] % GRID_F
        ]
        total += np.mean([((prediction[j] - target[i]) ** 2).mean() for j in (others or [i])])
    return total / len(clip)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_other_times_mse_equals_loops(norm_pix_loss: bool, batch_size: int) -> None:
    model = build(norm_pix_loss=norm_pix_loss)
    held = held_out(model, NUM_FRAMES)
    with torch.no_grad():
        out = model(held.log_mel, held.num_frames, held.mask)
    target, prediction = out.target.double().numpy(), out.pred_reconstruction.double().numpy()
    if norm_pix_loss:
        spread = np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
        prediction = prediction * spread + target.mean(1, keepdims=True)
    squared_scale = 4 * (14.0 + 1e-5)
    expected = loop_other_times(prediction, target, out.mask.numpy()) * squared_scale / ERROR_UNIT
    report = evaluate(model, held, batch_size)
    assert_rounding(torch.tensor(report["other_times_mse"]), torch.tensor(expected))


def test_failures_names_every_mark_that_is_not_beaten() -> None:
    baselines = {"mean_of_visible": 0.2, "interpolation": 0.3}
    good = {"reconstruction_mse": 0.1, "baselines": baselines, "accuracy": 0.3, "chance": 0.1, "other_times_mse": 0.9}
    model = build()

    def lines(**changes: Any) -> list[str]:
        return failures(model, {**good, **changes})

    assert lines() == []
    assert [("mean_of_visible 0.2" in line) for line in lines(reconstruction_mse=0.25)] == [True]
    assert len(lines(reconstruction_mse=0.31)) == 2
    assert lines(reconstruction_mse=0.2), "equal is not better"
    assert len(lines(reconstruction_mse=math.nan)) == 3, "NaN beats no mark"
    assert [("accuracy" in line) for line in lines(accuracy=0.2)] == [True], "twice chance is not above it"
    assert lines(accuracy=math.nan)
    assert [("time" in line) for line in lines(other_times_mse=0.1)] == [True]
    assert lines(other_times_mse=0.1 * 1.02), "other times are nearly as good"
    off = {"reconstruction_mse": 9.0, "accuracy": 0.0}
    model = build(reconstruction_weight=0.0)
    assert [("accuracy" in line) for line in lines(**off)] == [True]
    model = build(classification_weight=0.0)
    assert not [line for line in lines(**off) if "accuracy" in line] and len(lines(**off)) == 3


# -------------------------------------------------------------------------------------------------------- real audio

TRAINING_VOICES = ("festvox-ru", "sonic-pi-samples")
HELD_OUT_VOICE = "asterisk-prompt-fr-armelle"
CROP, BATCH, STEPS, RATE = 200, 8, 550, 6e-3  # frames, clips, updates, peak learning rate


def package_log_mel(packages: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    for library in ("soundfile", "soxr"):
        pytest.importorskip(library)
    waves = [torch.from_numpy(decode(path)) for name in packages for path in sorted((AUDIO / name).glob("*.opus"))]
    return fbank(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves]))


def consecutive_crops(log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """All clips cut into crops of CROP frames and a shorter last one of at least 32 frames."""
    per_clip = [clip[:count].split(CROP) for clip, count in zip(log_mel, num_frames.tolist(), strict=True)]
    crops = [crop for clip_crops in per_clip for crop in clip_crops if len(crop) >= 32]
    return torch.nn.utils.rnn.pad_sequence(crops, batch_first=True), torch.tensor([len(crop) for crop in crops])


def random_crops(log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """A random crop of each of BATCH random clips."""
    chosen = torch.randperm(len(num_frames))[:BATCH]
    lengths = num_frames[chosen].clamp(max=CROP)
    x = torch.zeros(BATCH, CROP, log_mel.shape[2])
    for row, (clip, length) in enumerate(zip(chosen.tolist(), lengths.tolist(), strict=True)):
        start = int(torch.randint(0, int(num_frames[clip]) - length + 1, ()))
        x[row, :length] = log_mel[clip, start : start + length]
    return x, lengths


def time_shuffled(log_mel: Tensor, num_frames: Tensor, kt: int) -> Tensor:
    """Each clip's patches in a random order in time."""
    shuffled = log_mel.clone()
    for clip, count in enumerate((num_frames // kt).tolist()):
        blocks = log_mel[clip, : count * kt].unflatten(0, (count, kt))
        shuffled[clip, : count * kt] = blocks[torch.randperm(count)].flatten(0, 1)
    return shuffled


def train(
    model: MAEAST, log_mel: Tensor, num_frames: Tensor, *, seed: int, shuffle: bool, patch: pytest.MonkeyPatch
) -> None:
    """Pretrain a model. With ``shuffle`` the targets are out of order in time; the visible patches are not."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, max(0.02, 1 - step / STEPS)))
    gather, calls = reference.gather_patches, []
    signature = inspect.signature(gather)

    def gather_shuffled(*args: Any, **kwargs: Any) -> Tensor:
        arguments = signature.bind(*args, **kwargs).arguments
        x, clip, token = arguments["features"], arguments["clip"], arguments["token"]
        visible = int((clip.diff() < 0).nonzero()[0]) + 1  # the visible patches come first, then those of the targets
        calls.append(len(clip) - visible > visible > 0)
        mixed = time_shuffled(x, lengths, arguments["patch_size"][0])
        gathered = []
        for source, rows in ((x, slice(None, visible)), (mixed, slice(visible, None))):
            selected = arguments | {"features": source, "clip": clip[rows], "token": token[rows]}
            gathered.append(gather(**selected))
        return torch.cat(gathered)

    if shuffle:
        patch.setattr(reference, "gather_patches", gather_shuffled)
    model.train()
    for _ in range(STEPS):
        x, lengths = random_crops(log_mel, num_frames)
        out = model(x, lengths)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    patch.undo()
    if shuffle:
        assert len(calls) == STEPS and all(calls), "visible, then masked"


def check_after_training(seed: int, patch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Reports of an untrained model, a trained one and one trained on time-shuffled targets."""
    fields = {"embed_dim": 64, "ffn_dim": 256, "num_heads": 2, "encoder_layers": 3, "decoder_embed_dim": 64}
    config = MAEASTConfig(**fields, **OFF, decoder_layers=1, norm_first=True, masking="random")
    log_mel, num_frames = package_log_mel(TRAINING_VOICES)
    held_out_log_mel, held_out_frames = package_log_mel((HELD_OUT_VOICE,))
    x, lengths = consecutive_crops(held_out_log_mel, held_out_frames)
    reports = {}
    for name in ("untrained", "trained", "trained on time-shuffled targets"):
        torch.manual_seed(seed)
        model = MAEAST(config)
        if name == "untrained":
            with torch.no_grad():  # takes the statistics of the data, so that only the weights are untrained
                model.train()(log_mel, num_frames)
        else:
            train(model, log_mel, num_frames, seed=seed, shuffle=name != "trained", patch=patch)
        held = HeldOut.of(model, x, lengths, names=["fr"] * len(x), kinds=["speech"] * len(x))
        reports[name] = evaluate(model, held)
    return reports


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        return check_after_training(0, patch)


@pytest.mark.ci
def test_evaluate_model_trained_on_real_audio_passes_on_another_voice(reports: dict) -> None:
    report = reports["trained"]
    assert report["passed"], report


@pytest.mark.ci
@pytest.mark.parametrize("name", ["untrained", "trained on time-shuffled targets"])
def test_evaluate_untrained_or_time_shuffled_model_on_real_audio_fails(reports: dict, name: str) -> None:
    report = reports[name]
    assert not report["passed"], report


@pytest.mark.ci
def test_failures_of_time_shuffled_model_name_the_time(reports: dict) -> None:
    """The check includes other times because a model that ignores time can beat the averages of a clip."""
    report = reports["trained on time-shuffled targets"]
    assert any("time" in line for line in report["failures"]), report


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct_keeps_visible_patches_and_fills_masked_ones(norm_pix_loss: bool) -> None:
    model = build(norm_pix_loss=norm_pix_loss)
    held = held_out(model, [29, 16], padding=float("nan"))
    with torch.no_grad():
        out = model(held.log_mel, held.num_frames, held.mask)
    original, masked, filled = reconstruct(model, held.log_mel, held.num_frames, held.mask)
    scale = 0.5 / math.sqrt(14.0 + 1e-5)
    row = 0
    for clip, count in enumerate((28, 16)):
        assert torch.equal(original[clip, :count], held.log_mel[clip, :count])
        assert original[clip, count:].isnan().all() and filled[clip, count:].isnan().all()
        for token in range(count // KT * GRID_F):
            t, f = token // GRID_F * KT, token % GRID_F * KF
            position = (clip, slice(t, t + KT), slice(f, f + KF))
            if held.mask[clip, token]:
                patch = out.pred_reconstruction[row].double()
                if norm_pix_loss:
                    target = out.target[row].double()
                    patch = patch * (target.var() + 1e-6).sqrt() + target.mean()
                assert masked[position].isnan().all()
                assert_rounding(filled[position].flatten(), patch / scale - 7.5)
                row += 1
            else:
                assert torch.equal(masked[position], original[position]) and torch.equal(
                    filled[position], original[position]
                )
    assert row == len(out.target)


@pytest.mark.parametrize("objective", SSAST_OBJECTIVES)
def test_reconstruct_ssast_equals_its_outputs(objective: str) -> None:
    model = build_ssast(objective=objective)
    held = held_out(model, [29, 16], padding=float("nan"))
    original, masked, filled = reconstruct(model, held.log_mel, held.num_frames, held.mask)
    for clip, count in enumerate((28, 16)):
        x, mask = held.log_mel[clip : clip + 1, :count], held.mask[clip : clip + 1, : count // KT * GRID_F]
        patches, prediction, _, _ = outputs_of_ssast(model, x, mask)
        assert torch.equal(original[clip, :count], model.denormalize(x[0])) and original[clip, count:].isnan().all()
        is_visible = ~mask[0].view(-1, GRID_F).repeat_interleave(KT, 0).repeat_interleave(KF, 1)
        assert torch.equal(~masked[clip, :count].isnan(), is_visible)
        assert torch.equal(masked[clip, :count][is_visible], original[clip, :count][is_visible])
        patches[mask.numpy()] = prediction
        assert_rounding(filled[clip, :count], reference.unpatchify(torch.from_numpy(patches), (KT, KF), BINS)[0])


def test_plots_write_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = build().train()
    held = held_out(model, NUM_FRAMES[:3])
    plot_reconstruction(model, held, tmp_path / "reconstruction.png")
    assert model.training
    report = evaluate(model, held)
    steps = [
        {"step": i, "loss_reconstruction": 1 / (i + 1), "loss_classification": 2.0, "accuracy": 0.1} for i in range(70)
    ]
    plot_loss(steps, [{"step": 69, "held_out": report}], tmp_path / "loss.png", unit=0.5)
    plot_loss(steps[:1], [], tmp_path / "first.png", unit=None)
    for name in ("reconstruction", "loss", "first"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * 3


@pytest.mark.parametrize("model", [build(), build_ssast()], ids=["mae_ast", "ssast"])
def test_training_unit_takes_loss_to_held_out_error(model: MAEAST | SSAST) -> None:
    model.eval()
    held = held_out(model, NUM_FRAMES[:2])
    with torch.no_grad():
        loss = float(model(held.log_mel, held.num_frames, held.mask).loss_reconstruction)
    unit = training_unit(model)
    assert unit is not None and abs(unit - 1) > 0.01
    assert loss * unit == pytest.approx(evaluate(model, held)["reconstruction_mse"], rel=1e-4)


def test_training_unit_is_none_for_patches_normalised_one_by_one() -> None:
    assert training_unit(build(norm_pix_loss=True).eval()) is None


@pytest.mark.parametrize("unit", [0.25, None])
def test_plot_loss_training_curve_has_unit_of_held_out_or_own_axis(
    unit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(figures_module, "save_figure", lambda figure, path: figures.append(figure))
    steps = [{"step": i, "loss_reconstruction": 8.0, "loss_classification": 2.0, "accuracy": 0.1} for i in (1, 2)]
    report = {"reconstruction_mse": 1.0, "info_nce": 1.0, "accuracy": 0.2, "chance": 0.1}
    report["baselines"] = dict.fromkeys(BASELINES, 1.5)
    plot_loss(steps, [{"step": 2, "held_out": report}], tmp_path / "loss.png", unit=unit)
    axis, *others = figures[0].axes
    assert "yardstick.json" in axis.get_ylabel()
    held = [line for line in axis.lines if line.get_label() == "held out"]
    assert [list(line.get_ydata()) for line in held] == [[1.0]]
    train_axis = axis if unit else next(other for other in others if other.get_ylabel().startswith("train: "))
    train = [line for line in train_axis.lines if str(line.get_label()).startswith("train")]
    assert [list(line.get_ydata()) for line in train] == [[8.0 * (unit or 1.0)] * 2]
    assert train_axis.get_ylim()[1] > 8.0 * (unit or 1.0) and axis.get_ylim()[1] > 1.5
    assert len(figures[0].axes) == (3 if unit else 4)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0].startswith("train") and len(labels) == 2 + len(BASELINES)


def test_sample_mask_leaves_visible_and_masked_tokens() -> None:
    for masking in ("random", "chunk", "time", "frequency", "span"):
        for ratio in (0.05, 0.5, 0.95):
            tokens = torch.arange(1, 12) * GRID_F
            mask = sample_mask(masking, tokens, GRID_F, ratio, seed=0)
            assert (mask.sum(1) < tokens).all() and (mask.sum(1) >= 1).all()
