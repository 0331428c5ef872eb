"""The benchmarks' ``original`` column against the tensors recorded from the paper's own code."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from goldens import MAE_AST, Golden
from policy import assert_golden, assert_golden_zero

from mae_ast_fast import MAEASTConfig
from mae_ast_fast.fairseq import fairseq_config
from mae_ast_fast.masking import num_visible

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import bench_step  # noqa: E402
import report  # noqa: E402
from original import Original, chunk_mask, random_mask  # noqa: E402


@pytest.fixture(scope="module", params=MAE_AST)
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def build(case: Golden) -> Original:
    model = Original(fairseq_config(case.options))
    model.load_state_dict(case.state_dict)
    return model.train()


def test_forward_and_losses(case: Golden) -> None:
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


def test_gradients_of_every_parameter(case: Golden) -> None:
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


def test_clock_names_the_stages_and_changes_nothing() -> None:
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


def test_masks_are_the_papers() -> None:
    torch.manual_seed(0)
    mask = chunk_mask(3, 512, 8, 0.75)
    assert mask.sum(1).tolist() == [512 - num_visible(512, 0.75)] * 3
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])
    assert not mask[:, -1].any()  # the surplus goes from the end
    mask = random_mask(3, 512, 0.6)
    assert mask.sum(1).tolist() == [512 - num_visible(512, 0.6)] * 3
    assert not torch.equal(mask[0], mask[1])
    model = Original(dataclasses.replace(MAEASTConfig.preset("frame_tiny", encoder_layers=1), masking="span"))
    with pytest.raises(ValueError, match="masking must be"):
        model.draw_mask(1, 8)


@pytest.mark.parametrize("case", bench_step.ON_CPU, ids=lambda case: case.name)
def test_the_step_benchmark_at_toy_sizes(case: bench_step.Case) -> None:
    one_round, record = bench_step.measure(case.toy(), compiled=False)
    one_round()
    columns = json.loads(json.dumps(record))["columns"]
    kinds = ("original", "reference", "fast")
    assert list(columns) == [f"{kind}{precision}" for kind in kinds for precision in ("", " bf16")]
    for column in columns.values():
        assert len(column["seconds"]) == len(column["cpu_seconds"]) == 1
        assert sum(column["stages"][0].values()) == pytest.approx(column["seconds"][0], abs=0.1)
    assert {"encoder", "decoder", "losses", "backward", "optimizer"} < set(columns["original"]["stages"][0])
    audio = columns["original"]["audio_seconds"], columns["reference"]["audio_seconds"]
    assert audio[0] < audio[1] if case.mixed else audio[0] == audio[1]


def test_the_step_benchmark_refuses_another_loss() -> None:
    case = bench_step.ON_CPU[1].toy()
    columns = bench_step.make_columns(case, compiled=False)
    with torch.no_grad():
        columns[0].model.final_proj_reconstruction.bias.add_(0.1)
    with pytest.raises(AssertionError, match="original: loss"):
        bench_step.check(columns, case.config)


def test_the_report_counts_from_raw_samples_and_refuses_uncommitted_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((report.RESULTS / "step_cpu.json").read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def table(**options: bool) -> str:
        (tmp_path / "step_cpu.json").write_text(json.dumps(result))
        return report.step_cpu_table(**options)

    before = table(dirty=False)
    result["commit_info"]["dirty"] = True
    with pytest.raises(ValueError, match="uncommitted code"):
        table(dirty=False)
    assert table(dirty=True) == before
    column = result["benchmarks"][0]["extra_info"]["columns"]["reference"]
    column["seconds"] = [2.0 * second for second in column["seconds"]]
    changed = [old for old, new in zip(before.splitlines(), table(dirty=True).splitlines(), strict=True) if old != new]
    assert len(changed) == 1 and "| reference |" in changed[0]
