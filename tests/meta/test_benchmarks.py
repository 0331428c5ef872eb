"""Benchmarks of ops, masks and data: they run, reject wrong outputs, and their tables use raw samples."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "reports")]
import bench_data  # noqa: E402
import bench_masking  # noqa: E402
import bench_ops  # noqa: E402
import report  # noqa: E402
from measure import Failed, Turns  # noqa: E402

from mae_ast_fast.cli.parser import TRAIN_EXTRA  # noqa: E402
from mae_ast_fast.data.shards import Batch, Shards  # noqa: E402


@pytest.mark.ci
def test_benchmarks_toy_sizes_run() -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "not step", "--benchmark-disable", "-q"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in [name for name in variables if name.startswith("PYTEST_") or name == "MAE_AST_FAST_BENCH_DATA"]:
        del variables[name]
    process = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout
    cases, data_cases = sum(len(points) for _, points in bench_ops.OPS.values()) + len(bench_masking.POINTS), 8
    if all(importlib.util.find_spec(library) for library in (*TRAIN_EXTRA, "torchaudio")):
        assert re.search(rf"\b{cases + data_cases} passed", process.stdout) and "skipped" not in process.stdout, (
            process.stdout
        )
    else:
        assert re.search(rf"\b{cases} passed, {data_cases} skipped", process.stdout), process.stdout


TINY = "def bench_tiny(benchmark):\n    benchmark.pedantic(lambda: None, rounds=2)\n"
NO_GIT = {"id": None, "time": None, "dirty": None}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A tree without ``.git`` and with one benchmark."""
    folder = tmp_path / "export" / "benchmarks"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder)
    (folder / "bench_tiny.py").write_text(TINY)
    return folder.parent


def commit_info(export: Path, **variables: str) -> dict[str, Any]:
    """``commit_info`` that pytest-benchmark writes."""
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "MAE_AST_FAST_COMMIT"}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_tiny.py", "--benchmark-json=out.json", "-q"]
    process = subprocess.run(
        command, cwd=export, env={**environment, **variables}, capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((export / "out.json").read_text())
    assert len(result["benchmarks"]) == 1
    return result["commit_info"]


@pytest.mark.ci
def test_benchmark_json_without_git_is_written(export: Path) -> None:
    assert commit_info(export) == NO_GIT
    assert commit_info(export, MAE_AST_FAST_COMMIT="abc123") == {**NO_GIT, "id": "abc123"}
    assert commit_info(export, PATH="/nowhere") == NO_GIT  # no git at all


def test_benchmark_json_in_untrusted_repository_is_written(export: Path, tmp_path: Path) -> None:
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2\nexit 128\n")
    git.chmod(0o755)
    assert commit_info(export, PATH=f"{git.parent}{os.pathsep}{os.environ['PATH']}") == NO_GIT


def test_benchmark_json_inside_other_repository_names_no_commit(export: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run(["git", *arguments], cwd=export.parent, check=True, capture_output=True)
    assert commit_info(export) == NO_GIT


class WrongGradient(torch.autograd.Function):
    """Correct values, and gradients 2 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.02


@pytest.mark.parametrize("name", bench_ops.OPS)
def test_bench_ops_check_rejects_wrong_op(name: str) -> None:
    op = bench_ops.make_op(name, bench_ops.Point().toy(), compiled=False)
    for column in op.columns:
        bench_ops.check(op, column)
        bench_ops.check_all_clips(op, column, bench_ops.exact_values(op))
    last, right = list(op.columns.items())[-1]
    wrong = {"values": lambda **x: right(**x) * 1.02}
    if op.differentiable:
        wrong["gradients"] = lambda **x: WrongGradient.apply(right(**x))
    for function in wrong.values():
        broken = copy.copy(op)
        broken.columns = {"reference": op.columns["reference"], last + " wrong": function}
        with pytest.raises(AssertionError, match=r"output 0|gradient of"):
            bench_ops.check(broken, last + " wrong")
        with pytest.raises(AssertionError, match=r"output 0|gradient of"):
            bench_ops.check_all_clips(broken, last + " wrong", bench_ops.exact_values(broken))


@pytest.mark.parametrize("clips", [2, bench_ops.CHECKED_CLIPS + 1])
def test_bench_ops_with_broken_columns_keeps_the_others(clips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench_ops.make_op

    def broken(*arguments: Any, **options: Any) -> bench_ops.Op:
        op = make(*arguments, **options)

        def raises(**inputs: Tensor) -> Tensor:
            raise RuntimeError("no kernel image")

        right = op.columns["reference"]
        op.columns |= {"raises": raises, "wrong": lambda **x: right(**x) * 1.02}
        return op

    monkeypatch.setattr(bench_ops, "make_op", broken)
    failed = Failed()
    point = dataclasses.replace(bench_ops.Point().toy(), clips=clips)
    _, timed = bench_ops.checked("bias_gelu", point, False, failed)
    assert list(timed) == ["reference"] and set(timed["reference"]) == set(bench_ops.TIMED)
    assert failed["raises"] == "RuntimeError: no kernel image" and "output 0" in failed["wrong"]


def test_bench_ops_calls_rejects_ineffective_dropout() -> None:
    op = bench_ops.make_op("add_layer_norm", bench_ops.Point().toy(), compiled=False)
    right = op.columns["reference"]
    bench_ops.calls(right, op, 0.1)
    with pytest.raises(AssertionError):
        bench_ops.calls(lambda dropout=0.0, **x: right(**x), op, 0.1)


def test_bench_masking_check_rejects_wrong_mask() -> None:
    point = bench_masking.Point(clips=3, seconds=2.0)
    drawn = bench_masking.columns(point)
    bench_masking.check(point, drawn)

    def with_extra_token() -> Tensor:
        mask = drawn["torch"]()
        mask[0, int((~mask[0]).nonzero()[0])] = True
        return mask

    with pytest.raises(AssertionError, match="a wrong number of tokens is hidden"):
        bench_masking.check(point, drawn | {"torch": with_extra_token})
    num_tokens = torch.tensor([8, 16, point.tokens])
    moved = bench_masking.draw(point, num_tokens, torch.tensor(0), impl="torch").roll(8, 1)
    with pytest.raises(AssertionError, match="past a clip's end"):
        bench_masking.check_mask(moved, num_tokens, point)


def test_bench_data_rejects_wrong_samples() -> None:
    pcm = np.random.default_rng(0).normal(0, 3000, 16000).astype(np.int16)
    samples = bench_data.to_float(pcm)
    for name in ("wav", "mp3"):
        bench_data.check_decoded(name, samples, pcm)
    wrong_samples = samples.copy()
    wrong_samples[9] += 2 / 32768
    with pytest.raises(AssertionError, match="samples differ"):
        bench_data.check_decoded("flac", wrong_samples, pcm)
    for distorted in (samples[:8000], samples * 2):
        with pytest.raises(AssertionError, match="rms off"):
            bench_data.check_decoded("mp3", distorted, pcm)
    bench_data.check_resampled("x", samples, samples[:-1])
    with pytest.raises(AssertionError, match="off, allowed"):
        bench_data.check_resampled("x", wrong_samples, samples)
    with pytest.raises(AssertionError, match="samples, expected"):
        bench_data.check_resampled("x", samples, samples[:-2])


def test_check_fbank_rejects_wrong_log_mel() -> None:
    pytest.importorskip("torchaudio", reason="needs torchaudio")
    waveforms = torch.from_numpy(np.random.default_rng(0).normal(0, 3000, (2, 8000)).astype(np.int16))
    num_samples = torch.tensor([8000, 4000])
    log_mel, num_frames = bench_data.fbank(waveforms, num_samples)
    bench_data.check_fbank(log_mel, num_frames, waveforms, num_samples)
    for clip, frame, message in ((0, 3, "clip 0: max"), (1, -1, "clip 1: not zero")):
        wrong = log_mel.clone()
        wrong[clip, frame, 5] += 0.01
        with pytest.raises(AssertionError, match=message):
            bench_data.check_fbank(wrong, num_frames, waveforms, num_samples)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shards]:
    """FLAC files of noise, and shards of them."""
    for library in ("lhotse", "soundfile", "soxr", "torchaudio"):
        pytest.importorskip(library, reason=f"needs {library}")
    folder, rng = tmp_path_factory.mktemp("sound"), np.random.default_rng(0)
    pcm = [rng.normal(0, 3000, 8000 + 160 * i).astype(np.int16) for i in range(4)]
    flac = bench_data.write_flac(pcm, folder / "files")
    return flac, bench_data.make_shards(flac, folder / "shards", "wav", len(pcm))


def test_check_batches_rejects_wrong_batches(sound: tuple[Path, Shards]) -> None:
    flac, shards = sound
    crops = next(shards.batches(**bench_data.BATCHES))
    names = [crop.segment.name for crop in crops]
    batch = shards.read(crops)
    bench_data.check_batches([batch], [names], flac)
    assert batch.num_samples[0] < batch.waveforms.shape[1]

    def changed(index: int) -> Batch:
        waveforms = batch.waveforms.clone()
        waveforms[0, index] += 1
        return batch._replace(waveforms=waveforms)

    shifted = shards.read([crops[0].segment.crop(1, crops[0].num_samples - 1), *crops[1:]])
    fewer, single_clips = shards.read(crops[1:]), [shards.read([crop]) for crop in crops]
    faults = [("x", "damaged")]
    for batches, order, message in (
        ([changed(9)], [names], "samples differ"),
        ([changed(-1)], [names], "not zero"),
        ([shifted], [names], "samples differ"),
        ([batch._replace(faults=faults)], [names], "damaged"),
        ([fewer], [names], "wrong clips"),
        ([fewer], [names[1:]], "3 clips of 4 files"),
        ([batch, batch], [names, names], "8 clips of 4 files"),
        (single_clips[::-1], [[name] for name in names], "wrong order"),
    ):
        with pytest.raises(AssertionError, match=message):
            bench_data.check_batches(batches, order, flac)


def test_check_features_rejects_wrong_log_mel(sound: tuple[Path, Shards], monkeypatch: pytest.MonkeyPatch) -> None:
    flac, shards = sound
    batches = list(shards.batches(**bench_data.BATCHES))
    order = [[crop.segment.name for crop in crops] for crops in batches]
    columns = bench_data.feature_columns(
        flac, order, {"wav": shards, "flac": shards}, {"wav": batches, "flac": batches}
    )
    official = columns.pop("official")
    clip = bench_data.kaldi_fbank(bench_data.read_flac(flac / order[0][0], "float32"))
    assert torch.equal(next(official())[0, : len(clip)], clip)
    fbank = bench_data.fbank
    wrong = {
        "of another window": lambda *args: fbank(*args, frontend="ssast"),
        "a frame later": lambda *args: (fbank(*args)[0].roll(1, 1), None),
        "twice as loud": lambda waveforms, lengths: fbank(2 * waveforms, lengths),
    }
    for name, column in columns.items():
        monkeypatch.setattr(bench_data, "fbank", fbank)
        bench_data.check_features(name, column(), official())
        for function in wrong.values():
            monkeypatch.setattr(bench_data, "fbank", function)
            with pytest.raises(AssertionError, match=f"{re.escape(name)}, batch 0"):
                bench_data.check_features(name, column(), official())
        with pytest.raises(ValueError, match="zip"):
            bench_data.check_features(name, iter(()), official())


def test_check_plan_rejects_lost_clips(sound: tuple[Path, Shards]) -> None:
    _, shards = sound
    plan = list(shards.batches(**bench_data.BATCHES))
    segment = plan[0][0].segment
    bench_data.check_plan(plan, 4, 1)
    bench_data.check_plan([*plan, *plan], 4, 2)
    for wrong, message in (
        ([plan[0][1:]], "3 of 4 clips"),
        ([*plan, plan[0][:1]], r"4 of 4 clips, \{1, 2\}"),
        ([[*plan[0][1:], segment.crop(0, 5)]], "is cropped"),
        ([plan[0] * 100], r"a batch of 2\d\d\.\d\d s"),
    ):
        with pytest.raises(AssertionError, match=message):
            bench_data.check_plan(wrong, 4, 1)


def test_check_run_rejects_wrong_run() -> None:
    row = {"loss": 3.0, "clips": 10, "clips_per_second": 5.0, "waited": 0.25, "faults": 0}
    rows = [row | {"step": 1}, row | {"step": 2, "waited": 0.75}]
    bench_data.check_run({"data_wait_share": 0.25}, rows, 2)
    for changes, message in (
        ({"loss": float("nan")}, "losses"),
        ({"step": 3}, r"updates \[1, 3\], expected 2"),
        ({"faults": 1}, "cannot be read"),
        ({"waited": 0.0}, "waiting share 0.25 in summary.json, 0.0625"),
    ):
        with pytest.raises(AssertionError, match=message):
            bench_data.check_run({"data_wait_share": 0.25}, [rows[0], rows[1] | changes], 2)
    with pytest.raises(AssertionError, match=r"updates \[1\], expected 2"):
        bench_data.check_run({"data_wait_share": 0.125}, rows[:1], 2)


def test_turns_calls_columns_in_turn() -> None:
    calls: list[str] = []
    turns = Turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, host_clock=True, single=True)
    assert calls == ["a", "b"]
    for _ in range(3):
        turns()
    assert calls == ["a", "b"] * 4
    assert {len(values) for sample in turns.samples.values() for values in sample.values()} == {3}


def result(**cases: dict[str, Any]) -> dict[str, Any]:
    loads = {"load_average_before": [0.5], "load_average_after": [1.5]}
    return {
        "machine_info": {"processor": "P", "threads": 2, "torch": "2"},
        "commit_info": {"id": "c" * 40},
        "benchmarks": [{"name": f"bench_{name}", "extra_info": loads | case} for name, case in cases.items()],
    }


def sample(*seconds: float) -> dict[str, list[float]]:
    return {"seconds": list(seconds), "cpu_seconds": [2 * s for s in seconds]}


def test_report_tables_use_raw_samples() -> None:
    columns = {"original": sample(0.2, 0.4, 0.9), "torch": sample(0.1, 0.1, 0.3)}
    masks = report.masking_table(
        result(x={"point": "p", "strategy": "s", "clips": 8, "tokens": 512, "columns": columns})
    ).splitlines()
    assert "commit cccccccccccc, load average 0.5 to 1.5" in masks[0] and "of 3 rounds" in masks[0]
    assert masks[-1] == "Slower than the paper's loop: nothing." and "one mask for the whole batch" in masks[0]
    assert masks[-4:-2] == [
        "| p | s | 8 | 512 | original | 400 (300 - 650) | 1.00 x | 20 |",
        "| p | s | 8 | 512 | torch | 100 (100 - 200) | 3.00 x (2.00 - 4.00) | 80 |",
    ]
    data_case = {"columns": columns, "clips": 40, "audio_seconds": 100.0}
    run = data_case | {"columns": {"no worker": {"seconds": [1.0, 2.0, 4.0], "waiting": [0.1, 0.2, 0.4]}}}
    run["columns"]["no worker"]["waiting_later"] = [0.0, 0.01, 0.01]
    cases = {"decode": data_case, "loader[a]": data_case | {"goal": ["torch", 3.0]}}
    cases |= {"loader[b]": data_case | {"goal": ["torch", 3.1]}, "run": run}
    data = report.data_table(result(**cases)).splitlines()
    assert data[4] == "| decode | original | 400 (300 - 650) | 1.00 x | 100 | 250 | 125 | 8 |"
    assert data[10] == "| run | no worker | 2e+03 (1.5e+03 - 3e+03) | 1.00 x | 20 | 50 |  | 2 |"
    assert data[12:] == [
        "Goal: `torch` at least 3 x as fast as `original`. loader[a] 3.0 x, reached.",
        "",
        "Goal: `torch` at least 3.1 x as fast as `original`. loader[b] 3.0 x, missed.",
        "",
        "Of the time of a run of `pretrain`, waiting for data: no worker 20.0 % (15.0 - 30.0), in the second half of "
        "its updates 1.0 % (0.5 - 1.0).",
    ]
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
    speed = "100 (100 - 200) | 3.00 x (2.00 - 4.00)"
    assert ops[-5] == f"| o | p | torch | {speed} | {speed} | 30 GB/s | 60 % |"
    assert ops[-3:] == ["Left out: `compiled`: no compiler.", "", "Slower than `original`: nothing."]


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("benchmarks", "import gpu, pathlib; assert gpu.goals(pathlib.Path('benchmarks/results/step_cpu.json'))"),
        ("benchmarks/studies", "import scaling; assert scaling.circumstances()['machine_info']"),
    ],
)
def test_benchmark_program_in_fresh_process_finds_its_modules(folder: str, statement: str) -> None:
    code = f"import sys; sys.path.insert(0, {folder!r}); {statement}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
