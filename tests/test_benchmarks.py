"""Benchmarks of ops, masks and data: they run, refuse wrong outputs, and their tables count from raw samples."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_data  # noqa: E402
import bench_masking  # noqa: E402
import bench_ops  # noqa: E402
import report  # noqa: E402
from measure import Turns  # noqa: E402


def test_all_run_at_toy_sizes() -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "not step", "--benchmark-disable", "-q"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in [name for name in variables if name.startswith("PYTEST_") or name == "MAE_AST_FAST_BENCH_DATA"]:
        del variables[name]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    cases = sum(len(points) for _, points in bench_ops.OPS.values()) + len(bench_masking.POINTS) + 6
    assert re.search(rf"\b{cases} passed", done.stdout) and "skipped" not in done.stdout, done.stdout


class WrongGradient(torch.autograd.Function):
    """The right values, and gradients 2 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.02


@pytest.mark.parametrize("name", bench_ops.OPS)
def test_a_wrong_op_is_not_timed(name: str) -> None:
    op = bench_ops.make_op(name, bench_ops.Point().toy(), compiled=False)
    bench_ops.check(op)
    bench_ops.check_all_clips(op)
    last, right = list(op.columns.items())[-1]
    wrong = {"values": lambda **x: right(**x) * 1.02}
    if op.differentiable:
        wrong["gradients"] = lambda **x: WrongGradient.apply(right(**x))
    for function in wrong.values():
        broken = copy.copy(op)
        broken.columns = {"reference": op.columns["reference"], last + " wrong": function}
        for check in (bench_ops.check, bench_ops.check_all_clips):
            with pytest.raises(AssertionError, match=r"output 0|gradient of"):
                check(broken)


def test_dropout_that_does_nothing_is_not_timed() -> None:
    op = bench_ops.make_op("add_layer_norm", bench_ops.Point().toy(), compiled=False)
    right = op.columns["reference"]
    bench_ops.calls(right, op, 0.1)
    with pytest.raises(AssertionError):
        bench_ops.calls(lambda dropout=0.0, **x: right(**x), op, 0.1)


def test_a_wrong_mask_is_not_timed() -> None:
    point = bench_masking.Point(clips=3, seconds=2.0)
    drawn = bench_masking.columns(point)
    bench_masking.check(point, drawn)

    def one_more() -> Tensor:
        mask = drawn["torch"]()
        mask[0, int((~mask[0]).nonzero()[0])] = True
        return mask

    with pytest.raises(AssertionError, match="hidden tokens differ"):
        bench_masking.check(point, drawn | {"torch": one_more})
    counts = torch.tensor([8, 16, point.tokens])
    moved = bench_masking.draw(point, counts, torch.tensor(0), "torch").roll(8, 1)
    with pytest.raises(AssertionError, match="past a clip's end"):
        bench_masking.check_mask(moved, counts, point)


def test_wrong_sound_is_not_timed() -> None:
    pcm = np.random.default_rng(0).normal(0, 3000, 16000).astype(np.int16)
    whole = bench_data.to_float(pcm)
    for name in ("wav", "mp3"):
        bench_data.check_decoded(name, whole, pcm)
    off = whole.copy()
    off[9] += 2 / 32768
    with pytest.raises(AssertionError, match="other samples"):
        bench_data.check_decoded("flac", off, pcm)
    for wrong in (whole[:8000], whole * 2):
        with pytest.raises(AssertionError, match="rms off"):
            bench_data.check_decoded("mp3", wrong, pcm)
    bench_data.check_resampled("x", whole, whole[:-1])
    with pytest.raises(AssertionError, match="off, allowed"):
        bench_data.check_resampled("x", off, whole)
    with pytest.raises(AssertionError, match="samples, expected"):
        bench_data.check_resampled("x", whole, whole[:-2])


def test_wrong_log_mel_is_not_timed() -> None:
    pytest.importorskip("torchaudio", reason="needs torchaudio")
    waveforms = torch.from_numpy(np.random.default_rng(0).normal(0, 3000, (2, 8000)).astype(np.int16))
    lengths = torch.tensor([8000, 4000])
    features, frames = bench_data.fbank(waveforms, lengths)
    bench_data.check_fbank(features, frames, waveforms, lengths)
    for clip, frame, message in ((0, 3, "clip 0: max"), (1, -1, "clip 1: not zero")):
        wrong = features.clone()
        wrong[clip, frame, 5] += 0.01
        with pytest.raises(AssertionError, match=message):
            bench_data.check_fbank(wrong, frames, waveforms, lengths)


def test_columns_take_turns() -> None:
    ran: list[str] = []
    turns = Turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, wall=True, once=True)
    assert ran == ["a", "b"]
    for _ in range(3):
        turns()
    assert ran == ["a", "b"] * 4
    assert {len(kept) for sample in turns.samples.values() for kept in sample.values()} == {3}


def result(**cases: dict[str, Any]) -> dict[str, Any]:
    loads = {"load_average_before": [0.5], "load_average_after": [1.5]}
    return {
        "machine_info": {"processor": "P", "threads": 2, "torch": "2"},
        "commit_info": {"id": "c" * 40},
        "benchmarks": [{"name": f"bench_{name}", "extra_info": loads | case} for name, case in cases.items()],
    }


def sample(*seconds: float) -> dict[str, list[float]]:
    return {"seconds": list(seconds), "cpu_seconds": [2 * s for s in seconds]}


def test_tables_count_from_raw_samples() -> None:
    columns = {"original": sample(0.2, 0.4, 0.9), "torch": sample(0.1, 0.1, 0.3)}
    masks = report.masking_table(
        result(x={"point": "p", "strategy": "s", "clips": 8, "tokens": 512, "columns": columns})
    ).splitlines()
    assert "commit cccccccccccc, load average 0.5 to 1.5" in masks[0] and "of 3 rounds" in masks[0]
    assert masks[-2:] == [
        "| p | s | 8 | 512 | original | 400 (300 - 650) | 1.00 x | 20 |",
        "| p | s | 8 | 512 | torch | 100 (100 - 200) | 3.00 x | 80 |",
    ]
    stages = [
        {"load_batch": 1.0, "update": 9.0},
        {"load_batch": 2.0, "update": 8.0},
        {"load_batch": 3.0, "update": 7.0},
    ]
    of_data = {"columns": columns, "clips": 40, "audio_seconds": 100.0}
    data = report.data_table(result(decode=of_data, run=of_data | {"stages": stages})).splitlines()
    assert data[4] == "| decode | original | 400 (300 - 650) | 1.00 x | 100 | 250 | 125 |"
    assert data[-1] == "Of a run's time: load_batch 20.0 % (15.0 - 25.0), update 80.0 % (75.0 - 85.0)."
    op = {
        "op": "o",
        "point": "p",
        "unit": "bytes",
        "work": {"forward": 10**9, "forward + backward": 3 * 10**9},
        "peak": sample(0.08, 0.08, 0.08) | {"work": 4 * 10**9},
        "columns": {name: {"forward": column, "forward + backward": column} for name, column in columns.items()},
        "left_out": {"compiled": "no compiler"},
    }
    ops = report.ops_table(result(x=op)).splitlines()
    assert ops[-3] == "| o | p | torch | 100 (100 - 200) | 3.00 x | 100 (100 - 200) | 3.00 x | 30 GB/s | 60 % |"
    assert ops[-1] == "Left out: `compiled`: no compiler."
