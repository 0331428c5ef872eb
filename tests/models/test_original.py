"""The ``original`` column of the step benchmark against recorded tensors, and the checks of that benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import MAE_AST, Golden
from policy import assert_golden, assert_golden_zero

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.checkpoints.fairseq import fairseq_config
from mae_ast_fast.ops.masking import num_visible

ROOT = Path(__file__).parents[2]
BENCHMARKS = str(ROOT / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import bench_step  # noqa: E402
from baselines import vitmae  # noqa: E402
from baselines.original import Original, chunk_mask, random_mask  # noqa: E402
from measure import Failed  # noqa: E402


@pytest.fixture(scope="module", params=MAE_AST)
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def build(case: Golden) -> Original:
    model = Original(fairseq_config(case.options))
    model.load_state_dict(case.state_dict)
    return model.train()


def test_original_forward_and_losses_match_golden(case: Golden) -> None:
    model = build(case)
    out = model(case["source"], case.mask)
    assert_golden(out.loss, case["loss/total"], "loss")
    assert_golden(out.loss_reconstruction, case["loss/recon_mse"], "loss_reconstruction")
    assert_golden(out.loss_classification, case["loss/info_nce"], "loss_classification")
    assert_golden(out.pred_reconstruction, case["logit_m_list_recon"], "pred_reconstruction")
    assert_golden(out.pred_classification, case["logit_m_list_class"], "pred_classification")
    assert_golden(out.target, case["target_m_list"], "target")
    for name, value in case.section("bn_after/").items():
        assert_golden(getattr(model.batch_norm, name), value, name)


def test_original_every_gradient_matches_golden(case: Golden) -> None:
    model = build(case)
    model(case["source"], case.mask).loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if not name.startswith("layer_norm.")}
    recorded = case.section("grads/")
    assert set(actual) == set(recorded)
    for name, gradient in actual.items():
        if name == "encoder_mask_emb" or name.endswith("k_proj.bias"):  # 0, and rounding noise around 0
            assert_golden_zero(gradient, name)
        else:
            assert_golden(gradient, recorded[name], name)


def test_original_clock_names_stages_and_changes_nothing() -> None:
    case = Golden(MAE_AST[0])
    model = build(case)
    plain = model(case["source"], case.mask).loss
    stages: list[str] = []
    model.clock = stages.append
    assert torch.equal(model(case["source"], case.mask).loss, plain)
    assert stages == [
        "normalise, patchify",
        "project all patches",
        "mask, gather",
        "encoder",
        "scatter",
        "decoder",
        "heads",
        "losses",
    ]


def test_original_masks_match_paper() -> None:
    torch.manual_seed(0)
    mask = chunk_mask(3, 512, 8, 0.75)
    assert mask.sum(1).tolist() == [512 - num_visible(512, 0.75)] * 3
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])
    assert not mask[:, -1].any()  # surplus masked tokens are dropped from the end
    mask = random_mask(3, 512, 0.6)
    assert mask.sum(1).tolist() == [512 - num_visible(512, 0.6)] * 3
    assert not torch.equal(mask[0], mask[1])
    model = Original(dataclasses.replace(MAEASTConfig.preset("frame_tiny", encoder_layers=1), masking="span"))
    with pytest.raises(ValueError, match="masking must be"):
        model.draw_mask(1, 8)


@pytest.mark.ci
@pytest.mark.parametrize("case", bench_step.ON_CPU, ids=lambda case: case.name)
def test_bench_step_toy_case_records_every_column(case: bench_step.Case) -> None:
    toy = case.toy()
    one_round, record = bench_step.measure(toy, compiled=False, toy=True)
    one_round()
    record = json.loads(json.dumps(record))
    assert record["failed"] == {}
    columns = record["columns"]
    names = [name for name in case.columns if name not in bench_step.unavailable_columns(toy, compiled=False)]
    precisions = ["" if precision == "fp32" else " bf16" for precision in case.precisions]
    assert list(columns) == [f"{name}{precision}" for precision in precisions for name in names]
    assert set(record["peak"]) == set(case.precisions)
    for name, column in columns.items():
        assert len(column["seconds"]) == len(column["cpu_seconds"]) == 1
        stages = column["stages"][0]
        assert sum(stages.values()) == pytest.approx(column["seconds"][0], abs=0.1)
        if not name.startswith("original"):
            assert set(stages) == {"forward", "update"} or set(stages) == {"forward", "backward", "optimizer"}
        assert column["flops"] > 0 and column["clips"] == toy.clips * toy.batches
    if "original" in case.columns:
        ours = "recipe" if case.section == "recipe" else "fast"
        first, second = (next(c for name, c in columns.items() if word in name) for word in ("original", ours))
        assert {"encoder", "decoder", "losses", "backward", "optimizer"} < set(first["stages"][0])
        audio = first["audio_seconds"], second["audio_seconds"]
        assert audio[0] < audio[1] if case.mixed else audio[0] == audio[1]


@pytest.mark.parametrize("cases", [bench_step.ON_CPU, bench_step.ON_GPU_CASES], ids=["cpu", "gpu"])
def test_bench_step_sweep_changes_one_factor_at_a_time(cases: tuple[bench_step.Case, ...]) -> None:
    assert len({case.name for case in cases}) == len(cases)
    points = [case for case in cases if case.section == "sweep"]
    base = next(case for case in points if case.factor == "")
    for case in points:
        assert (case.preset, case.precisions, case.rounds) == (base.preset, base.precisions, base.rounds)
        ours, theirs = case.config.to_dict(), base.config.to_dict()
        different = {name for name in ours if ours[name] != theirs[name]}
        different |= {name for name in ("seconds", "clips") if getattr(case, name) != getattr(base, name)}
        assert different == ({case.factor} if case.factor else set())


def test_bench_step_gpu_cases_have_columns_of_the_goals() -> None:
    cases = {case.name: case.columns for case in bench_step.ON_GPU_CASES}
    assert {"original", "fast", "fast, gelu"} <= set(cases["patch_base"])
    assert {"compiled", "fast"} <= set(cases["patch_base compiled"])
    assert "fast" in cases["mixed"] and "fast" in cases["equal"]


def test_bench_step_gpu_cases_are_ordered_by_value() -> None:
    """Compiled cases and sweeps come last, so that a run that is stopped has the others."""
    late = [
        any("compiled" in name for name in case.columns) + 2 * (case.section == "sweep")
        for case in bench_step.ON_GPU_CASES
    ]
    assert late == sorted(late) and {0, 1, 2} == set(late)
    assert [case.name for case in bench_step.ON_GPU_CASES[:4]] == ["patch_base", "mixed", "equal", "few clips"]


def toy_columns(name: str) -> dict[str, bench_step.Column]:
    case = next(case for case in bench_step.ON_CPU if case.name == name)
    failed = Failed()
    columns = {column.name: column for column in bench_step.make_columns(case.toy(), False, failed)}
    assert not failed, failed
    return columns


def check_fails(column: bench_step.Column) -> str:
    """The reason for which a column's check fails."""
    failed = Failed()
    assert bench_step.check([column], failed) == {}
    return failed[column.name]


@pytest.mark.parametrize(
    ("case", "name", "parameter"),
    [
        ("frame_small", "original", "final_proj_reconstruction.bias"),
        ("frame_small", "fast", "decoder.layers.0.fc2.bias"),
        ("ssast patch_small", "ssast, two passes bf16", "reconstruction_head.2.bias"),
        ("ssast patch_small", "ssast bf16", "classification_head.2.weight"),
    ],
)
def test_bench_step_check_rejects_other_loss(case: str, name: str, parameter: str) -> None:
    columns = toy_columns(case)
    name = name if name in columns else name.removesuffix(" bf16")  # on a CPU without native bf16
    failed = Failed()
    assert set(bench_step.check(list(columns.values()), failed)) == set(columns) and not failed
    with torch.no_grad():
        columns[name].model.get_parameter(parameter)[::2].add_(0.3)
    assert re.search(f"{name}: (loss|gradient)", check_fails(columns[name]))


def skip_work(skipped: str, column: bench_step.Column, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a column that updates by TrainStep skip some of its work."""
    update, model = column.update, column.model
    if skipped in ("half the clips", "half the frames"):

        def update_less(
            features: torch.Tensor, frames: list[int], mask: torch.Tensor | None = None, **options: Any
        ) -> Any:
            if skipped == "half the clips":
                clips = len(frames) // 2
                return update(features[:clips], frames[:clips], None if mask is None else mask[:clips], **options)
            width = features.shape[1] // 2
            mask = None if mask is None else mask[:, : mask.shape[1] // 2]
            return update(features[:, :width].contiguous(), [width] * len(frames), mask, **options)

        update_less.restore, update_less.lr, update_less.graphs = update.restore, update.lr, None
        column.update = update_less
    elif skipped == "optimizer":
        monkeypatch.setattr(update.optimizer, "step", lambda: None)
    elif skipped == "encoder's gradient":
        model.encoder.register_forward_hook(lambda module, inputs, out: detached(out))
    elif skipped == "a layer":
        layer = model.encoder.layers[0]
        with torch.no_grad():
            for x in (layer.out_proj.weight, layer.fc2.weight):
                x.zero_()


def detached(out: Any) -> Any:
    return out.detach() if isinstance(out, torch.Tensor) else type(out)(map(detached, out))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("skipped", ["half the clips", "half the frames", "optimizer", "encoder's gradient", "a layer"])
def test_bench_step_column_that_skips_work_is_not_timed(
    skipped: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(bench_step.ON_CPU[1].toy(), columns=("fast",), precisions=(precision,))
    make = bench_step.make_columns

    def broken(*arguments: Any) -> list[bench_step.Column]:
        columns = make(*arguments)
        skip_work(skipped, columns[0], monkeypatch)
        return columns

    _, record = bench_step.measure(case, compiled=False, toy=True)
    (name,) = record["columns"]
    monkeypatch.setattr(bench_step, "make_columns", broken)
    messages = {"optimizer": "does not change", "encoder's gradient": "gradient norm|does not change"}
    _, record = bench_step.measure(case, compiled=False, toy=True)
    assert record["columns"] == {}
    assert re.search(messages.get(skipped, "loss|gradient norm"), record["failed"][name])


def raises(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("no kernel image")


def sabotage_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "TrainStep", raises)


def sabotage_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step.TrainStep, "__call__", raises)


def sabotage_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bench_step.TrainStep.__call__

    def off(*arguments: Any, **options: Any) -> Any:
        numbers = call(*arguments, **options)
        return numbers._replace(loss=numbers.loss * 1.5)

    monkeypatch.setattr(bench_step.TrainStep, "__call__", off)


def sabotage_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    time_column = bench_step.time_column

    def later(column: bench_step.Column, entry: dict[str, Any]) -> None:
        if column.name.startswith("fast") and entry["seconds"]:
            raises()
        time_column(column, entry)

    monkeypatch.setattr(bench_step, "time_column", later)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (sabotage_construction, "RuntimeError: no kernel image"),
        (sabotage_first_step, "RuntimeError: no kernel image"),
        (sabotage_loss, "AssertionError: fast( bf16)?: loss"),
        (sabotage_second_round, "RuntimeError: no kernel image"),
    ],
)
def test_bench_step_measure_with_broken_column_times_the_others(
    sabotage: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(bench_step.ON_CPU[1].toy(), precisions=("bf16",))  # original, reference, fast
    sabotage(monkeypatch)
    one_round, record = bench_step.measure(case, compiled=False, toy=True)
    for _ in range(2):
        one_round()
    record = json.loads(json.dumps(record))
    assert list(record["columns"]) == ["original bf16", "reference bf16"]
    assert [len(column["seconds"]) for column in record["columns"].values()] == [2, 2]
    (name,) = record["failed"]
    assert name == "fast bf16" and re.search(message, record["failed"][name])


def test_bench_step_check_that_raises_restores_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """``compiled`` trains the reference's weights with the reference's optimizer."""
    column = next(column for name, column in toy_columns("frame_small").items() if name.startswith("reference"))
    monkeypatch.setattr(column, "one_update", raises)
    assert "no kernel image" in check_fails(column)
    assert [group["lr"] for group in column.optimizer.param_groups] == [bench_step.LR]


@pytest.mark.ci
def test_bench_step_with_broken_column_fails_and_keeps_the_case(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    plugin = tmp_path / "sabotage.py"
    plugin.write_text(
        "import bench_step\n"
        "def broken(*arguments, **options): raise RuntimeError('sabotaged')\n"
        "bench_step.TrainStep = broken\n"
        "measure = bench_step.measure\n"
        "bench_step.measure = lambda case, **options: measure(case.toy(), compiled=False, toy=True)\n"
    )
    target = tmp_path / "out.json"
    only_case = '--only=["bench_step[frame_small]"]'
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_step.py", only_case, f"--benchmark-json={target}"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path, ROOT / "benchmarks", ROOT / "tests")))
    done = subprocess.run(
        [*command, "-q", "-p", "sabotage", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1 and "sabotaged" in done.stdout, done.stdout + done.stderr
    (case,) = json.loads(target.read_text())["benchmarks"]
    assert set(case["extra_info"]["failed"]) >= {"fast bf16"}
    assert {"original bf16", "reference bf16"} <= set(case["extra_info"]["columns"])


def test_bench_step_check_restores_model_and_optimizer() -> None:
    columns = [*toy_columns("frame_small").values(), *toy_columns("ssast patch_small").values()]
    before = [{n: x.clone() for n, x in column.model.state_dict().items()} for column in columns]
    failed = Failed()
    bench_step.check(columns, failed)
    assert not failed
    for column, kept in zip(columns, before, strict=True):
        for name, x in column.model.state_dict().items():
            assert torch.equal(x, kept[name]), name
        assert all(module.training for module in column.model.modules())
        assert [float(group["lr"]) for group in column.optimizer.param_groups] == [pytest.approx(bench_step.LR)]
        moments = [x for state in column.optimizer.state.values() for x in state.values()]
        assert moments and not any(x.any() for x in moments)
        assert all(p.grad is None for p in column.model.parameters())


def test_bench_step_column_without_dropout_is_deterministic() -> None:
    def twice(column: bench_step.Column) -> list[float]:
        batch = column.variant.batches[0]
        mask = column.variant.expected_update.draw(batch)
        return [column.variant.loss(batch, mask).item() for _ in range(2)]

    without = next(c for name, c in toy_columns("ssast patch_small").items() if name.startswith("fast, no dropout"))
    assert len(set(twice(without))) == 1
    assert len(set(twice(toy_columns("frame_small")["fast"]))) == 2


def test_bench_step_flops_match_paper_models() -> None:
    config = MAEASTConfig.preset("patch_base")
    assert f"{bench_step.mae_ast_flops(config, 512) / 1e9:.1f}" == "116.6"
    ssast, twice = (bench_step.ssast_config(config, 1024, objective) for objective in ("joint", "joint_two_pass"))
    assert f"{bench_step.ssast_flops(ssast, 512) / 1e9:.1f}" == "295.3"  # 295.8 if masked patches are embedded too
    assert f"{bench_step.ssast_flops(twice, 512) / 1e9:.1f}" == "586.6"  # the heads are not run twice


def test_vitmae_column_has_our_sizes() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    toy = bench_step.ON_CPU[0].toy()
    column = toy_columns("patch_small")["vitmae"]
    (batch,) = column.variant.batches
    mask = bench_step.draw_mask(toy.config, batch, seed=1)
    image = vitmae.pixels(batch.log_mel, toy.config)
    ours = MAEAST(toy.config)
    with torch.no_grad():
        vitmae.check(column.model, image, mask, ours)
        with pytest.raises(AssertionError, match="masks other tokens"):
            vitmae.check(column.model, image, mask | ~mask, ours)
        deeper = MAEAST(dataclasses.replace(toy.config, encoder_layers=2))
        with pytest.raises(AssertionError, match="parameters, expected"):
            vitmae.check(column.model, image, mask, deeper)
    column.model.patchify = lambda image, **options: torch.zeros(*mask.shape, toy.config.patch_dim)
    assert re.search(r"vitmae: (loss|gradient)", check_fails(column))
