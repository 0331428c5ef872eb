"""The bench command: its columns, the choice of the model, and the rejection of wrong updates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mae_ast_fast.cli import main
from mae_ast_fast.models.config import _SIZES, MAEASTConfig
from mae_ast_fast.tools import bench


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that take milliseconds."""
    for name in _SIZES:
        monkeypatch.setitem(_SIZES, name, (16, 32, 2))
    monkeypatch.setattr(bench, "SECONDS", 1.0)


def test_bench_cli_reports_three_columns(small_presets: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"preset": "frame_tiny", "clips": "2", "device": "cpu", "seconds": "0.1"}
    assert main(["bench", "--json", *(f"--{name}={value}" for name, value in options.items())]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["preset"], report["clips"], report["device"]) == ("frame_tiny", 2, "cpu")
    assert list(report["columns"]) == ["reference", "fast", "ssast"] and report["rounds"] >= 3
    for column in report["columns"].values():
        assert len(column["seconds"]) == report["rounds"]
        assert column["clips_per_second"] == pytest.approx(2 / statistics.median(column["seconds"]))
    table = bench.to_text(report)
    assert "frame_tiny, 2 clips of 1 s per step" in table and "A million clips" in table
    assert next(line for line in table.splitlines() if line.startswith("ssast")).endswith(" 1.00 x")


def test_to_text_speedup_is_median_of_round_ratios() -> None:
    def column(*seconds: float) -> dict:
        return {"seconds": list(seconds), "clips_per_second": 1.0, "peak_bytes_a_clip": None}

    columns = {"reference": column(1, 1, 9), "fast": column(1, 2, 3), "ssast": column(2, 6, 6)}
    report = {"preset": "p", "clips": 1, "clip_seconds": 10.0, "device": "cpu", "threads": 1, "precision": "fp32"}
    table = bench.to_text({**report, "torch": "2", "rounds": 3, "columns": columns})
    assert [line.split()[-2] for line in table.splitlines() if line.endswith(" x")] == ["2.00", "2.00", "1.00"]


def half_batch(step: bench.TrainStep, update: Any, log_mel: Any, mask: Any = None, **options: Any) -> Any:
    return update(log_mel[::2], mask=None if mask is None else mask[::2], **options)


def skipped_optimizer(step: bench.TrainStep, update: Any, *inputs: Any, **options: Any) -> Any:
    step.optimizer.step = lambda: None
    return update(*inputs, **options)


def scaled_grad_norm(step: bench.TrainStep, update: Any, *inputs: Any, **options: Any) -> Any:
    metrics = update(*inputs, **options)
    return metrics._replace(grad_norm=metrics.grad_norm * 1.1)


@pytest.mark.parametrize(
    ("wrong_update", "message"),
    [
        (half_batch, r"fast computes the (loss|gradient norm)"),
        (scaled_grad_norm, r"fast computes the gradient norm"),
        (skipped_optimizer, "fast: the first update does not change"),
    ],
)
def test_bench_rejects_wrong_update(
    small_presets: None, monkeypatch: pytest.MonkeyPatch, wrong_update: Callable[..., Any], message: str
) -> None:
    class Wrong(bench.TrainStep):
        def __call__(self, *inputs: Any, **options: Any) -> Any:
            return wrong_update(self, super().__call__, *inputs, **options)

    monkeypatch.setattr(bench, "TrainStep", Wrong)
    with pytest.raises(ValueError, match=message):
        bench.bench("patch_tiny", 2, "cpu", seconds=0.1, progress=lambda line: None)


@pytest.mark.parametrize(("round_seconds", "size"), [(0.01, "base"), (0.6, "small"), (5.0, "tiny")])
def test_largest_picks_largest_model_within_budget(
    monkeypatch: pytest.MonkeyPatch, round_seconds: float, size: str
) -> None:
    """Ten rounds in 60 s, sixteen times the work in base and four times in small."""
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def step() -> torch.Tensor:
        clock[0] += round_seconds / 3
        return torch.zeros(())

    column = bench.Column("x", torch.nn.Identity(), step)
    monkeypatch.setattr(bench, "make_columns", lambda *arguments: ([column] * 3, 0.0))
    assert bench._largest(torch.device("cpu"), "fp32", 4, 60.0) == size
    assert MAEASTConfig.preset(f"patch_{size}").embed_dim in (192, 384, 768)


def test_bench_cli_invalid_option_fails(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--clips", "0"], "at least 1, got 0"), (["--preset", "patch_huge"], "preset must be")):
        assert main(["bench", "--device", "cpu", *arguments]) == 1
        assert message in capsys.readouterr().err
