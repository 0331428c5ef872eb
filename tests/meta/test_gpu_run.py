"""benchmarks/gpu.py: its report of tests that pass, fail, hang or are skipped, and the machines that it refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from mae_ast_fast.ops.cases import op_cases

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu_run"] = gpu  # dataclasses look their module up
spec.loader.exec_module(gpu)

MACHINE = {"arch": "sm_90", "commit": "0123456789abcdef", "dirty": False, "started": "2026-01-02T03:04:05+00:00"}
FILES = {
    "kernels/good.py": "@triton.jit",
    "kernels/common/configs.py": "",
    "tests/test_good.py": """
        import os, pytest
        @pytest.mark.parametrize("n", range(3))
        def test_fine(n):
            assert "TRITON_INTERPRET" not in os.environ
        def test_without():
            pytest.importorskip("no_such_library")
    """,
    "tests/models/test_golden.py": "def test_bfloat16_test_values_and_gradients(): assert 1 == 2, 'two tensors differ'",
    "tests/test_other.py": "import pytest\npytest.importorskip('no_such_library')\ndef test_never(): assert False",
    "tests/test_slow.py": "import pytest\n@pytest.mark.ci\ndef test_of_ci(): assert False",
}


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A tree of toy files, on a machine that seems to have a GPU."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    markers = "".join(f"    {name}: .\n" for name in ("ci", "network", "long"))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "environment", lambda commit: {**MACHINE, "commit": commit or MACHINE["commit"]})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return tmp_path


def run_gpu(tree: Path, *argv: str, stem: str) -> tuple[int, dict, str]:
    code = gpu.main(["--out", str(tree / "out"), *argv])
    files = {path.name for path in (tree / "out").iterdir()}
    assert {f"{stem}.json", f"{stem}.txt"} <= files
    return code, json.loads((tree / "out" / f"{stem}.json").read_text()), (tree / "out" / f"{stem}.txt").read_text()


def test_gpu_run_reports_passed_failed_and_skipped(tree, capsys):
    code, report, text = run_gpu(
        tree,
        "--jobs",
        "2",
        "--stage",
        "kernels,suite,benchmarks",
        stem="gpu_sm_90_0123456789ab_kernels_suite_benchmarks",
    )
    assert code == 1
    assert report["command"][:2] == ["benchmarks/gpu.py", "--out"]
    kernels, suite = report["stages"]["kernels"], report["stages"]["suite"]
    assert (kernels["status"], kernels["passed"], kernels["failed"]) == ("failed", 3, 1)
    assert kernels["skipped"] == {"could not import 'no_such_library': No module named 'no_such_library'": 1}
    (problem,) = kernels["problems"]
    assert problem.startswith("test_golden.py: ") and "test_bfloat16" in problem and "two tensors differ" in problem
    assert {file["name"]: file["status"] for file in kernels["files"]} == {
        "test_good.py": "passed",
        "test_golden.py": "failed",
    }
    assert (suite["status"], suite["passed"], suite["failed"], suite["problems"]) == ("passed", 0, 0, [])
    assert sum(suite["skipped"].values()) == 1
    assert {file["name"]: file["status"] for file in suite["files"]} == {
        "test_other.py": "passed",
        "test_slow.py": "nothing selected",
    }
    benchmarks = report["stages"]["benchmarks"]
    assert (benchmarks["status"], benchmarks["problems"]) == ("not run", ["there is no benchmarks/bench_*.py"])
    printed = capsys.readouterr().out
    assert "two tensors differ" in text and "test_fine[2] PASSED" in text
    assert re.search(r"^kernels +failed +3 +1 +1 +\d+\.\d$", printed, re.MULTILINE)
    assert re.search(r"^kernels \[2/2\] .* about 0 s left$", printed, re.MULTILINE)
    assert "kernels: 1 skipped: could not import 'no_such_library'" in printed


def test_gpu_run_all_stages_pass_exits_zero(tree):
    (tree / "tests/models/test_golden.py").write_text("def test_fine(): pass")
    code, report, _ = run_gpu(tree, "--stage", "kernels,suite", "--commit", "abc", stem="gpu_sm_90_abc_kernels_suite")
    assert code == 0
    assert [stage["status"] for stage in report["stages"].values()] == ["passed", "passed"]


@pytest.mark.ci
def test_gpu_run_hanging_stage_is_stopped_and_keeps_results(tree):
    child = tree / "child"
    (tree / "tests/models/test_golden.py").write_text(
        "import subprocess, sys, time\ndef test_hangs():\n"
        "    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"    open({str(child)!r}, 'w').write(str(process.pid))\n    time.sleep(60)\n"
    )
    code, report, text = run_gpu(
        tree, "--stage", "kernels", "--jobs", "2", "--limit", "15", stem="gpu_sm_90_0123456789ab_kernels"
    )
    assert code == 1
    stage = report["stages"]["kernels"]
    assert (stage["status"], stage["passed"]) == ("timed out", 3)
    assert {file["name"]: file["status"] for file in stage["files"]} == {
        "test_good.py": "passed",
        "test_golden.py": "timed out",
    }
    assert any("stopped after 15 s, the stage's limit" in problem for problem in stage["problems"])
    assert "test_hangs" in text
    deadline = time.monotonic() + 5.0
    while is_running(int(child.read_text())):  # processes of the test end with it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_gpu_run_job_without_time_is_failure(tree):
    code, report, _ = run_gpu(tree, "--stage", "kernels", "--limit", "0.000001", stem="gpu_sm_90_0123456789ab_kernels")
    assert code == 1
    assert [file["problems"] for file in report["stages"]["kernels"]["files"]] == [
        ["not started: no time was left"]
    ] * 2


def test_gpu_run_crashed_test_is_failure(tree):
    (tree / "tests/test_good.py").write_text("import os\ndef test_dies(): os.abort()")
    code, report, _ = run_gpu(tree, "--stage", "kernels", stem="gpu_sm_90_0123456789ab_kernels")
    assert code == 1
    assert "test_good.py: pytest ended with code -6" in report["stages"]["kernels"]["problems"]


BENCH = """
import os, time, pytest
@pytest.mark.parametrize("case", ["a: 1", "a: 2", "b", "slow", "c"])
def bench_step(case, benchmark):
    if case == "slow":
        time.sleep(60)
    benchmark.extra_info["columns"] = {"fast bf16": {}}
    benchmark.extra_info["commit"] = os.environ.get("MAE_AST_FAST_COMMIT")
    benchmark.pedantic(lambda: None, rounds=1)
    assert case != "b", "a column failed"
"""


@pytest.fixture
def benchmark_tree(tree: Path, monkeypatch) -> Path:
    """The tree with a benchmark of five cases, of which the fourth takes a minute."""
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # pytest-benchmark writes nothing in a worker of pytest-xdist
    (tree / "benchmarks").mkdir()
    (tree / "benchmarks" / "bench_step.py").write_text(BENCH)
    ini = tree / "pytest.ini"
    ini.write_text(ini.read_text() + "python_files = test_*.py bench_*.py\npython_functions = test_* bench_*\n")
    return tree


def measured_cases(path: Path) -> list[str]:
    return [case["param"] for case in json.loads(path.read_text())["benchmarks"]]


@pytest.mark.ci
def test_step_stage_past_limit_keeps_finished_cases(benchmark_tree: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("MAE_AST_FAST_COMMIT", raising=False)
    code, report, _ = run_gpu(
        benchmark_tree, "--stage", "step", "--commit", "abc", "--limit", "20", stem="gpu_sm_90_abc_step"
    )
    stage = report["stages"]["step"]
    assert (code, stage["status"]) == (1, "failed")
    assert {file["name"]: file["status"] for file in stage["files"]} == {
        "bench_step[a]": "passed",
        "bench_step[b]": "failed",
        "bench_step[slow]": "timed out",
        "bench_step[c]": "timed out",
    }
    merged = benchmark_tree / "out" / "gpu_sm_90_abc_step_bench_step.json"
    assert measured_cases(merged) == ["a: 1", "a: 2", "b"]
    result = json.loads(merged.read_text())
    assert {case["extra_info"]["commit"] for case in result["benchmarks"]} == {"abc"}
    assert {"machine_info", "commit_info"} <= set(result) and result["command"][0] == "benchmarks/gpu.py"
    printed = capsys.readouterr().out
    assert "goal: clips/s: 3500, not measured" in printed  # the summary; no case has the goals' column


DRIVER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("gpu", sys.argv[1])
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
gpu.ROOT = pathlib.Path.cwd()
gpu.environment = lambda commit: {machine}
gpu.main(["--stage", "step", "--out", "out"])
"""


@pytest.mark.ci
def test_gpu_run_killed_keeps_finished_cases(benchmark_tree: Path) -> None:
    command = [sys.executable, "-c", DRIVER.format(machine=MACHINE), str(SCRIPT)]
    process = subprocess.Popen(command, cwd=benchmark_tree, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "bench_step[b]" in line:
            break
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    assert measured_cases(benchmark_tree / "out" / "gpu_sm_90_0123456789ab_step_bench_step.json") == [
        "a: 1",
        "a: 2",
        "b",
    ]


@pytest.mark.ci
def test_benchmark_cases_keep_order_and_group_points() -> None:
    """Of the real files: one group per case of the step, and one per operation with all points."""
    ops = gpu.benchmark_cases(ROOT / "benchmarks" / "bench_ops.py")
    assert "bench_ops[info_nce]" in ops and len(ops["bench_ops[info_nce]"]) == 4
    step = gpu.benchmark_cases(ROOT / "benchmarks" / "bench_step.py")
    assert next(iter(step)).startswith("bench_step[patch_") and {
        len(benchmark_tree) for benchmark_tree in step.values()
    } == {1}
    late = [name.startswith("bench_step[sweep") for name in step]
    assert late == sorted(late) and any(late)


SANITIZER = """#!{python}
import subprocess, sys
words = sys.argv[1:]
assert words[:4] == ["--tool", "memcheck", "--error-exitcode", "99"], words
{body}
"""


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("print('sum 8'); sys.exit(99 if 'pytest' in words else 0)", "failed", "found memory errors"),
        ("print('sum 8'); sys.exit(subprocess.run(words[4:]).returncode if 'pytest' in words else 0)", "passed", ""),
        ("print('========= Device not supported'); sys.exit(1)", "not run", "does not work: Device not supported"),
    ],
)
def test_memcheck_stage_reports_sanitizer_result(*, tree, monkeypatch, body, status, message):
    (tree / "tests/test_good.py").write_text(
        "import os\ndef test_kernel_values_and_gradients_bfloat16():\n"
        "    assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\ndef test_other(): assert False"
    )
    tool = tree / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable, body=body))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    code, report, _ = run_gpu(tree, "--stage", "memcheck", stem="gpu_sm_90_0123456789ab_memcheck")
    stage = report["stages"]["memcheck"]
    assert (stage["status"], code) == (status, int(status == "failed"))
    assert message in " ".join(stage["problems"])
    if status == "passed":
        assert [file["name"] for file in stage["files"]] == ["test_good.py"]  # neither models nor recorded tensors
        assert stage["passed"] == 1


def test_memcheck_stage_without_sanitizer_is_not_run(tree, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    code, report, _ = run_gpu(tree, "--stage", "memcheck", stem="gpu_sm_90_0123456789ab_memcheck")
    assert code == 0
    assert report["stages"]["memcheck"]["problems"] == ["compute-sanitizer is not on PATH"]


def test_memcheck_selection_covers_every_kernel():
    """The selection uses names of existing tests."""
    kernels, _ = gpu.test_files()
    words = set(re.findall(r"\w+", gpu.MEMCHECK)) - {"bfloat16", "and", "or"}
    ops = [file for file in kernels if file.name not in gpu.OTHER_KERNEL_TESTS]
    assert len(ops) >= 8
    generic = {f"test_{case.name}.py" for case in op_cases().values() if case.shapes and torch.bfloat16 in case.dtypes}
    assert "def test_kernel_values_and_gradients" in (ROOT / "tests" / "ops" / "test_ops.py").read_text()
    for file in ops:
        own = file.name not in generic
        assert not own or any(re.search(rf"def test_\w*{word}", file.read_text()) for word in words), file.name
    assert {file.name for file in kernels} >= gpu.OTHER_KERNEL_TESTS


def test_test_files_every_file_is_in_one_stage():
    kernels, others = gpu.test_files()
    paths = {path for file in kernels + others for path in gpu.test_paths(file)}
    assert paths == {*(ROOT / "tests").rglob("test_*.py")}
    assert len({*kernels, *others}) == len(kernels) + len(others)


def run_python(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
        timeout=120,
    )


def test_gpu_run_without_gpu_or_unknown_stage_exits_with_message(tmp_path):
    process = run_python(str(SCRIPT), "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 2
    assert process.stderr.startswith("gpu: PyTorch finds no CUDA device")
    assert not list(tmp_path.iterdir())
    process = run_python(str(SCRIPT), "--stage", "kernel")
    assert process.returncode == 2
    assert "stages are environment, kernels, suite, memcheck, step, benchmarks, got kernel" in process.stderr


def test_check_installed_other_tree_raises(monkeypatch, tmp_path):
    gpu.check_installed()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(gpu.Unusable, match=r"not .*: install this tree with .* -m pip install --no-deps"):
        gpu.check_installed()


def test_environment_missing_library_raises(monkeypatch):
    monkeypatch.setattr(gpu, "REQUIRED", ("torch", "no_such_library"))
    with pytest.raises(gpu.Unusable, match="lacks no_such_library"):
        gpu.environment()
