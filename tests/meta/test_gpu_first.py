"""benchmarks/gpu_first.py on the fake GPU: each section writes its results, even if another one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_first  # noqa: E402

SCRIPT = str(ROOT / "benchmarks" / "gpu_first.py")
# sitecustomize.py, which every Python process runs at its start: also the measuring process and the tests.
SITE_CUSTOMIZE = """
from fake_cuda.run import work_around_limits
work_around_limits()
import os, signal, time, torch, torch.nn.attention
def raises(*arguments, **options): raise RuntimeError("sabotaged")
def dies(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)
def hangs(*arguments, **options): time.sleep(600)
"""
StartGpuFirst = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(fake_cuda_environment: dict[str, str], tmp_path: Path) -> StartGpuFirst:
    """Start gpu_first.py on the fake GPU at toy sizes; results are in ``tmp_path / "out"``."""

    def popen(*arguments: str, sabotage: str = "") -> subprocess.Popen[str]:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE_CUSTOMIZE + sabotage)
        paths = os.pathsep.join([str(site), fake_cuda_environment["PYTHONPATH"]])
        variables = {**fake_cuda_environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, SCRIPT, "--toy", "--commit", "abc123", "--out", str(tmp_path / "out"), *arguments]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return popen


def sections(folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of all result files."""
    files = list(folder.iterdir())
    assert {file.suffix for file in files} == {".json"} and len(files) <= 6
    return {name: entry for file in files for name, entry in json.loads(file.read_text())["sections"].items()}


def assert_exit_code(process: subprocess.Popen[str], code: int) -> None:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output


@pytest.mark.ci
def test_gpu_first_writes_every_section(start: StartGpuFirst, tmp_path: Path) -> None:
    assert_exit_code(start(), 1)  # the fake GPU computes wrong values and has no cuDNN
    entries = sections(tmp_path / "out")
    assert set(entries) == set(gpu_first.SECTIONS)
    for name, entry in entries.items():
        assert entry["status"] == ("failed" if name == "tests" else "done"), (name, entry)
        assert len(entry["how"]) > 40 and entry["seconds"] >= 0.0 and entry["found"], name
    for file in (tmp_path / "out").iterdir():
        about = json.loads(file.read_text())["about"]
        assert about["commit"]["id"] == "abc123" and about["toy"] is True and about["command"][1] == "--toy"
        assert about["gpu"] == "NVIDIA H200 (fake)" and about["arch"] == "sm_90" and "driver" in about
        assert {"torch", "triton", "cuda", "python", "numpy", "started"} <= set(about)
    for name in ("peaks", "host", "plain", "compiled"):
        assert '"failed"' not in json.dumps(entries[name]["found"]), name
    assert len(entries["step"]["found"]) == 4
    for column in entries["step"]["found"].values():
        assert {"ms", "host_ms", "clips/s", "MB/clip"} <= set(column)
    assert {"eager", "CUDA graphs"} == {name.partition(", ")[2] for name in entries["host"]["found"]}
    for name in ("aten", "short", "sdpa, FlashAttention"):
        assert set(entries["attention"]["found"][f"encoder, dropout 0.1, {name}"]) == {"forward", "forward + backward"}
    assert "forward + backward" in entries["ops"]["found"]["add_layer_norm"]["fast"]
    assert not [name for name, op in entries["ops"]["found"].items() if "failed" in op]
    (outcome,) = entries["tests"]["found"].values()
    assert outcome["passed"] and outcome["failed"] and not outcome["skipped"]  # they ran on the GPU, in bf16


@pytest.mark.ci
def test_gpu_first_section_that_raises_does_not_stop_the_others(start: StartGpuFirst, tmp_path: Path) -> None:
    sabotage = "del torch.nn.attention.sdpa_kernel\ntorch.Tensor.normal_ = raises\n"
    assert_exit_code(start("--sections", "attention,peaks", sabotage=sabotage), 1)
    entries = sections(tmp_path / "out")
    assert entries["attention"]["status"] == "failed" and "sdpa_kernel" in entries["attention"]["reason"]
    assert entries["peaks"]["status"] == "done"
    assert entries["peaks"]["found"]["copy, GB/s"]["failed"] == "RuntimeError: sabotaged"
    assert entries["peaks"]["found"]["64x64x64, TFLOP/s"]["x W^T"] > 0.0


@pytest.mark.ci
def test_gpu_first_section_that_dies_or_hangs_does_not_stop_the_others(start: StartGpuFirst, tmp_path: Path) -> None:
    sabotage = (
        "torch.nn.attention.sdpa_kernel = dies\n"
        "normal_ = torch.Tensor.normal_\n"  # of a model's weights, too
        "torch.Tensor.normal_ = lambda x, *a, **k: hangs() if x.dtype == torch.bfloat16 else normal_(x, *a, **k)\n"
    )
    assert_exit_code(start("--sections", "attention,peaks,plain", "--limit", "40", sabotage=sabotage), 1)
    entries = sections(tmp_path / "out")
    assert (entries["attention"]["status"], entries["attention"]["reason"]) == ("died", "exit status -9")
    assert (entries["peaks"]["status"], entries["peaks"]["reason"]) == ("stopped", "it ran longer than its limit")
    assert entries["plain"]["status"] == "done" and set(entries["plain"]["found"]) == {"reference", "original"}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.ci
def test_gpu_first_killed_keeps_what_was_measured(start: StartGpuFirst, tmp_path: Path) -> None:
    sabotage = (
        "randn = torch.randn\n"  # of the features, in fp32
        "torch.randn = lambda *s, **k: hangs() if k.get('dtype') == torch.bfloat16 else randn(*s, **k)\n"
    )
    process = start("--sections", "plain,peaks,attention", sabotage=sabotage)
    deadline, file = time.monotonic() + 120.0, tmp_path / "out" / "step.json"
    while not (file.is_file() and "copy" in file.read_text()):  # the first measurement of peaks
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    measuring = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    entries = sections(tmp_path / "out")
    assert entries["plain"]["status"] == "done" and set(entries["plain"]["found"]) == {"reference", "original"}
    assert entries["peaks"]["status"] == "running" and set(entries["peaks"]["found"]) == {"copy, GB/s"}
    assert "attention" not in entries
    while any(map(is_alive, measuring)):  # no process keeps the GPU
        assert measuring and time.monotonic() < deadline
        time.sleep(0.05)


def test_gpu_first_without_gpu_exits_with_message(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, SCRIPT, "--out", str(tmp_path / "out"), "--sections", "peaks"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 2 and "gpu_first: PyTorch finds no CUDA device" in process.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_first_rejects_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_first.main(["--sections", "peak"])
    assert "sections are peaks, step, profile" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file/results", "file"])
def test_gpu_first_invalid_out_is_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    (tmp_path / "file").write_text("")
    assert gpu_first.main(["--toy", "--out", str(tmp_path / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpu_first: --out must be a writable folder, got {tmp_path / out}: ")


class IdleWorker:
    """A measuring process that does nothing."""

    def __init__(self, toy: bool) -> None:
        self.about = {"gpu": "G"}

    def close(self) -> None: ...


def test_gpu_first_section_without_time_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "Worker", IdleWorker)
    results = gpu_first.Results(tmp_path, {})
    seconds = gpu_first.SECTIONS["compiled"].estimate - 1.0
    gpu_first.run(["compiled"], results, time.monotonic() + seconds, limit=None, toy=False)
    entry = sections(tmp_path)["compiled"]
    assert entry["status"] == "not begun" and entry["reason"].endswith("s left, it takes about 100")
    assert not results.good()


def test_gpu_first_tests_that_cannot_run_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_a.py").write_text("from hypothesis import given\n")
    monkeypatch.setattr(gpu_first.importlib.util, "find_spec", lambda name: None)
    results = gpu_first.Results(tmp_path / "out", {})
    results.begin("tests")
    gpu_first.run_tests(results, [tmp_path / "test_a.py", tmp_path / "test_b.py"], time.monotonic() + 60.0)
    assert sections(tmp_path / "out")["tests"]["found"] == {
        "test_a.py": "left out: hypothesis is not installed",
        "test_b.py": "left out: there is no such file",
    }


def test_gpu_first_test_files_exist_once() -> None:
    assert [name for name in gpu_first.TEST_FILES if len(list((ROOT / "tests").rglob(name))) != 1] == []


def test_gpu_first_tests_run_in_parallel_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    ci\n    long\n    network\n")
    (tmp_path / "test_a.py").write_text("def test_bf16(): pass\ndef test_fp32(): assert False\n")
    (tmp_path / "test_b.py").write_text("def test_bf16(): assert False, 'off'\n")
    (tmp_path / "test_c.py").write_text("import os\ndef test_bf16():\n    print('bye', flush=True)\n    os.abort()\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    results = gpu_first.Results(tmp_path / "out", {})
    results.begin("tests")
    files = [tmp_path / f"test_{name}.py" for name in "abc"]
    gpu_first.run_tests(results, files, time.monotonic() + 60.0)
    entry = sections(tmp_path / "out")["tests"]
    assert entry["status"] == "failed" and set(entry["reason"].split(", ")) == {"test_b.py failed", "test_c.py failed"}
    assert "test_bf16" in entry["found"]["test_c.py"]["output"] and "output" not in entry["found"]["test_b.py"]
    assert (entry["found"]["test_a.py"]["passed"], entry["found"]["test_a.py"]["failed"]) == (1, 0)
    assert "off" in entry["found"]["test_b.py"]["problems"][0] and not results.good()
