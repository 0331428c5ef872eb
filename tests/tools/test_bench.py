"""The bench command: columns that take turns, on a model that fits, and no time of a wrong result."""

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
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that take milliseconds."""
    for name in _SIZES:
        monkeypatch.setitem(_SIZES, name, (16, 32, 2))
    monkeypatch.setattr(bench, "SECONDS", 1.0)


def test_the_command_times_three_columns(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"preset": "frame_tiny", "clips": "2", "device": "cpu", "seconds": "0.1"}
    assert main(["bench", "--json", *(f"--{name}={value}" for name, value in options.items())]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["preset"], report["clips"], report["device"]) == ("frame_tiny", 2, "cpu")
    assert list(report["columns"]) == ["reference", "fast", "ssast"] and report["rounds"] >= 3
    for column in report["columns"].values():
        assert len(column["seconds"]) == report["rounds"]
        assert column["clips_per_second"] == pytest.approx(2 / statistics.median(column["seconds"]))
    table = bench.to_text(report)
    assert "frame_tiny, 2 clips of 1 s a step" in table and "A million clips" in table
    assert next(line for line in table.splitlines() if line.startswith("ssast")).endswith(" 1.00 x")


def test_ratios_are_medians_over_the_rounds() -> None:
    def column(*seconds: float) -> dict:
        return {"seconds": list(seconds), "clips_per_second": 1.0, "peak_bytes_a_clip": None}

    columns = {"reference": column(1, 1, 9), "fast": column(1, 2, 3), "ssast": column(2, 6, 6)}
    report = {"preset": "p", "clips": 1, "clip_seconds": 10.0, "device": "cpu", "threads": 1, "precision": "fp32"}
    table = bench.to_text({**report, "torch": "2", "rounds": 3, "columns": columns})
    assert [line.split()[-2] for line in table.splitlines() if line.endswith(" x")] == ["2.00", "2.00", "1.00"]


def half(step: bench.TrainStep, update: Any, features: Any, mask: Any = None, **more: Any) -> Any:
    return update(features[::2], mask=None if mask is None else mask[::2], **more)


def still(step: bench.TrainStep, update: Any, *inputs: Any, **more: Any) -> Any:
    step.optimizer.step = lambda: None
    return update(*inputs, **more)


def scaled(step: bench.TrainStep, update: Any, *inputs: Any, **more: Any) -> Any:
    numbers = update(*inputs, **more)
    return numbers._replace(grad_norm=numbers.grad_norm * 1.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (half, r"fast computes the (loss|gradient's norm)"),
        (scaled, r"fast computes the gradient's norm"),
        (still, "fast: an update does not move"),
    ],
)
def test_another_update_is_not_timed(
    small: None, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], message: str
) -> None:
    class Wrong(bench.TrainStep):
        def __call__(self, *inputs: Any, **more: Any) -> Any:
            return wrong(self, super().__call__, *inputs, **more)

    monkeypatch.setattr(bench, "TrainStep", Wrong)
    with pytest.raises(ValueError, match=message):
        bench.bench("patch_tiny", 2, "cpu", 0.1, say=lambda line: None)


@pytest.mark.parametrize(("spent", "size"), [(0.01, "base"), (0.6, "small"), (5.0, "tiny")])
def test_the_model_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch, spent: float, size: str) -> None:
    """Ten rounds in 60 s, sixteen times the work in base and four times in small."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def step() -> torch.Tensor:
        now[0] += spent / 3
        return torch.zeros(())

    column = bench.Column("x", torch.nn.Identity(), step)
    monkeypatch.setattr(bench, "make_columns", lambda *arguments: ([column] * 3, 0.0))
    assert bench._largest(torch.device("cpu"), "fp32", 4, 60.0) == size
    assert MAEASTConfig.preset(f"patch_{size}").embed_dim in (192, 384, 768)


def test_what_cannot_be_timed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--clips", "0"], "at least 1, got 0"), (["--preset", "patch_huge"], "preset must be")):
        assert main(["bench", "--device", "cpu", *arguments]) == 1
        assert words in capsys.readouterr().err
