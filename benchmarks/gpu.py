"""``make gpu-full``: tests and benchmarks on a machine with a GPU. Needs no network, installation or audio library.

``make gpu`` (gpu_first.py) measures the most useful numbers in nine minutes; this takes up to 40.

python benchmarks/gpu.py                          all stages
python benchmarks/gpu.py --stage kernels,memcheck  some stages, if the time of a command is limited

Stages, each with a time limit (--limit):

    environment   GPU, driver, versions, commit, libraries that are missing (always)
    kernels       every kernel's tests on the GPU, the model's with impl="triton", and the recorded tensors
    suite         the other tests, except those marked ci, network or long
    memcheck      compute-sanitizer on a subset of the kernels' tests, without PyTorch's memory cache
    step          benchmarks/bench_step.py, and its results compared with the goals
    benchmarks    the other benchmarks/bench_*.py

Test files run in parallel, one process per file. Benchmark cases run in sequence, one process per case (the points of
one operation share a process). After each of them the report is written: gpu_ARCH_COMMIT.json, gpu_ARCH_COMMIT.txt with
all output, and gpu_ARCH_COMMIT_bench_NAME.json with the results of each benchmark file so far. A killed run keeps its
finished parts.
Exit codes: 0 success; 1 a test failed or timed out; 2 this machine cannot run it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"kernels": 560, "suite": 400, "memcheck": 400, "step": 560, "benchmarks": 560}  # seconds
STAGES = ("environment", *LIMITS)
REQUIRED = ("torch", "triton", "numpy", "safetensors", "huggingface_hub", "pytest", "hypothesis")
OPTIONAL = (
    *("torchaudio", "soundfile", "soxr", "av", "tensorboard", "jsonargparse", "tqdm", "matplotlib"),
    *("ruff", "yaml", "build", "pytest_timeout", "pytest_benchmark", "flash_attn", "transformers", "timm"),
)
# Tile edges, strides and offsets in bf16, which other machines do not test. Repeats and statistics add nothing here.
MEMCHECK = (
    "bfloat16 and (kernel_values_and_gradients or moves_rows_and_gradients or zeroes_padding_rows) or ten_second_clips"
)
OTHER_KERNEL_TESTS = {
    "test_model_triton.py",
    "test_golden.py",
    "test_undefined_memory.py",
    "test_flash.py",
    "test_packed_sizes.py",
}  # test files of the stage kernels that belong to no single op
MEMORY_ERRORS = 99  # exit code of compute-sanitizer for memory errors
# Processes that tests start end with them. A new session would survive if the machine ends the command's group.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Unusable(RuntimeError):
    """This machine cannot run the GPU checks; the message gives the reason and the remedy."""


@dataclasses.dataclass
class Job:
    """A process that runs tests and writes a JUnit file."""

    name: str
    command: list[str]
    environment: dict[str, str]


@dataclasses.dataclass
class Outcome:
    """Result of a job.

    Attributes:
        skipped: Reason -> number of tests.
        problems: One line per problem.
    """

    name: str
    status: str  # passed, failed, timed out, nothing selected
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ environment


def environment(commit: str | None = None) -> dict[str, Any]:
    """GPU, driver, versions and commit.

    Args:
        commit: Commit of a tree without ``.git``; None: ask git.

    Raises:
        Unusable: A required library is missing, there is no GPU, or another tree's package is installed.
    """
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise Unusable(f"{sys.executable} lacks {', '.join(missing)}")
    import torch
    import triton

    if not torch.cuda.is_available():
        raise Unusable("PyTorch finds no CUDA device; without a GPU, `make test` runs the kernels interpreted")
    check_installed()
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changes = command_output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "gpu": properties.name,
        "arch": properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{major}{minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver and driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "commit": commit or command_output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def check_installed() -> None:
    """Raise Unusable if the installed package is not this tree's."""
    code = "import mae_ast_fast.kernels as k, os; print(os.path.realpath(k.__path__[0]))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    installed_path = process.stdout.strip()
    if process.returncode or Path(installed_path) != ROOT / "kernels":
        problem = (
            f"mae_ast_fast.kernels is {installed_path}"
            if installed_path
            else f"{sys.executable} cannot import mae_ast_fast"
        )
        raise Unusable(
            f"{problem}, not {ROOT / 'kernels'}: install this tree with {sys.executable} -m pip install --no-deps "
            "--no-build-isolation -e ., or choose a Python that has it: make gpu PYTHON=.venv/bin/python"
        )


def check_writable(folder: Path) -> None:
    """Raise Unusable if the results folder cannot be created or written. Creates nothing."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "cannot be written" if existing.is_dir() else "is not a folder"
        raise Unusable(f"--out must be a writable folder, got {folder}: {existing} {reason}")


def command_output(*command: str, seconds: float = 30.0) -> str | None:
    """Standard output of a command in the tree; None if the command does not exist or fails."""
    variables = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # ignore a repository around this tree
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


# ------------------------------------------------------------------------------------------------------------- jobs


def run_jobs(
    jobs: Sequence[Job],
    limit: float,
    workers: int,
    *,
    log: Callable[[str], object],
    on_outcome: Callable[[Outcome], object],
) -> None:
    """Run jobs in parallel. After ``limit`` seconds running jobs are stopped, and the others are not started."""
    deadline = time.monotonic() + limit
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_run, job, deadline, log, stop) for job in jobs]
        try:
            for future in as_completed(futures):
                on_outcome(future.result())
        except BaseException:
            stop.set()
            raise


def _run(job: Job, deadline: float, log: Callable[[str], object], stop: threading.Event) -> Outcome:
    start = time.monotonic()
    if start >= deadline or stop.is_set():
        return Outcome(job.name, "timed out", 0.0, problems=["not started: no time was left"])
    with tempfile.TemporaryDirectory() as folder:
        xml, output = Path(folder) / "junit.xml", Path(folder) / "output"
        with open(output, "w") as file:
            process = subprocess.Popen(
                [*job.command, f"--junitxml={xml}"],
                cwd=ROOT,
                env=job.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                **_GROUP,
            )
            while process.poll() is None and time.monotonic() < deadline and not stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            timed_out = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = output.read_text(errors="replace")
        outcome = _outcome(
            job.name, xml, code=process.returncode, timed_out=timed_out, seconds=time.monotonic() - start
        )
    if "ERROR SUMMARY:" in text:
        outcome.problems += [line.strip("= ") for line in text.splitlines() if "Invalid __" in line][:5]
    log(f"==== {job.name}: {outcome.status}, {outcome.seconds:.1f} s\n$ {' '.join(job.command)}\n{text}\n")
    return outcome


def _outcome(name: str, xml: Path, *, code: int, timed_out: bool, seconds: float) -> Outcome:
    """Outcome from pytest's JUnit file, if it exists, and the exit code."""
    outcome = Outcome(name, "passed" if code == 0 else "failed", round(seconds, 1))
    try:
        testcases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        testcases = []
    for testcase in testcases:
        failures = [child for child in testcase if child.tag in ("failure", "error")]
        if failures:
            outcome.failed += 1
            message = " ".join((failures[0].get("message") or "").split())
            outcome.problems.append(f"{testcase.get('classname')}.{testcase.get('name')}: {message}"[:300])
        elif (skip := testcase.find("skipped")) is not None:
            reason = skip.get("message") or "no reason given"
            outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
        else:
            outcome.passed += 1
    if timed_out:
        outcome.status = "timed out"
        outcome.problems.append(f"stopped after {seconds:.0f} s, the stage's limit")
    elif code == MEMORY_ERRORS:
        outcome.problems.append("compute-sanitizer found memory errors")
    elif code == 5 and not outcome.failed:  # the whole file was skipped, or no test matches the selection
        outcome.status = "passed" if outcome.skipped else "nothing selected"
    elif code and not outcome.failed:
        outcome.problems.append(f"pytest ended with code {code}")
    return outcome


def kernel_ops() -> set[str]:
    """Names of the files of kernels/ that have a kernel."""
    return {path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}


def test_paths(file: Path) -> list[Path]:
    """The test file; with that of one operation also test_ops.py, which tests every operation."""
    is_of_op = file.stem.removeprefix("test_") in kernel_ops()
    return [path for path in (file.with_name("test_ops.py"), file) if path.is_file()] if is_of_op else [file]


def pytest_job(
    file: Path, workers: int, *options: str, select: str = "", prefix: Sequence[str] = (), **extra_variables: str
) -> Job:
    """Job that runs the tests of one file, or of one operation, with compiled kernels; ``select`` is pytest's -k."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    variables.update({"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **extra_variables})
    paths, op = test_paths(file), file.stem.removeprefix("test_")
    if paths != [file]:
        select = f"{op} and ({select})" if select else op
    command = [*prefix, sys.executable, "-m", "pytest", *map(str, paths), "-v", "--tb=short", "-p", "no:cacheprovider"]
    chosen = ["-m", "not network and not ci and not long", *(["-k", select] if select else [])]
    return Job(file.name, [*command, *chosen, *options], variables)


def test_files() -> tuple[list[Path], list[Path]]:
    """Test files of the stage ``kernels``, and all others. An operation may have no file of its own."""
    found = set((ROOT / "tests").rglob("test_*.py"))
    suites = {file for file in found if file.name == "test_ops.py"}
    of_ops = {suite.with_name(f"test_{op}.py") for suite in suites for op in kernel_ops()}
    kernels = of_ops | {
        file for file in found if file.name in {f"test_{op}.py" for op in kernel_ops()} | OTHER_KERNEL_TESTS
    }
    return sorted(kernels), sorted(found - kernels - suites)


# ----------------------------------------------------------------------------------------------------------- stages


class Run:
    """A run and its two report files."""

    def __init__(self, report: dict[str, Any], folder: Path, stages: Sequence[str], workers: int) -> None:
        commit = (report["commit"] or report["started"].partition("T")[0])[:12]
        name_parts = ["gpu", report["arch"], commit, *(["dirty"] if report["dirty"] else [])]
        stem = "_".join([*name_parts, *(() if set(LIMITS) <= set(stages) else stages)])
        self.report, self.workers, self.stem = {**report, "stages": {}}, workers, stem
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.text = folder / f"{stem}.json", folder / f"{stem}.txt"
        self.text.write_text("")
        self.lock = threading.Lock()

    def log(self, text: str) -> None:
        with self.lock, open(self.text, "a", errors="replace") as file:
            file.write(text)

    def save(self) -> None:
        from mae_ast_fast.files import write_json

        write_json(self.json, self.report)

    def stage(
        self,
        name: str,
        jobs: Sequence[Job],
        limit: float,
        *,
        workers: int | None = None,
        note: str = "",
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        """Run a stage's jobs and add it to the report; without jobs ``note`` gives the reason."""
        start = time.monotonic()
        entry: dict[str, Any] = {"status": "not run" if note else "running", "seconds": 0.0}
        entry |= {"passed": 0, "failed": 0, "skipped": {}, "problems": [note] if note else [], "files": []}
        self.report["stages"][name] = entry

        def on_outcome(outcome: Outcome) -> None:
            entry["files"].append(dataclasses.asdict(outcome))
            entry["passed"] += outcome.passed
            entry["failed"] += outcome.failed
            entry["skipped"] = dict(Counter(entry["skipped"]) + Counter(outcome.skipped))
            entry["problems"] += [f"{outcome.name}: {problem}" for problem in outcome.problems]
            elapsed, num_done = time.monotonic() - start, len(entry["files"])
            entry["seconds"] = round(elapsed, 1)
            self.save()
            after_each()
            print(
                f"{name} [{num_done}/{len(jobs)}] {outcome.name}: {outcome.status}, {outcome.passed} passed, "
                f"{outcome.failed} failed, {sum(outcome.skipped.values())} skipped, {outcome.seconds:.1f} s; "
                f"about {elapsed / num_done * (len(jobs) - num_done):.0f} s left",
                flush=True,
            )

        if jobs:
            run_jobs(jobs, limit, workers or self.workers, log=self.log, on_outcome=on_outcome)
            statuses = {file["status"] for file in entry["files"]}
            status_order = ("failed", "timed out", "passed", "nothing selected")
            entry["status"] = next(status for status in status_order if status in statuses)
        self.save()


def memcheck_jobs(files: Sequence[Path], workers: int) -> tuple[list[Job], str]:
    """Jobs under compute-sanitizer; or none, and the reason why it does not work."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return [], "compute-sanitizer is not on PATH"
    sanitizer_command = [sanitizer, "--tool", "memcheck", "--error-exitcode", str(MEMORY_ERRORS)]
    probe = [
        *sanitizer_command,
        sys.executable,
        "-c",
        "import torch; print('sum', int(torch.ones(8, device='cuda').sum()))",
    ]
    try:
        process = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return [], "compute-sanitizer hangs, even on a one-line program"
    if process.returncode or "sum 8" not in process.stdout:
        messages = [line.strip("= ") for line in (process.stdout + process.stderr).splitlines() if line.strip("= ")]
        return [], f"compute-sanitizer does not work: {' / '.join(messages[:4])[:300]}"
    # One allocation per tensor: inside PyTorch's large blocks no access would be out of bounds.
    options = {"prefix": sanitizer_command, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_TIMEOUT": "0"}
    return [
        pytest_job(file, workers, select=MEMCHECK, **options) for file in files if file.name not in OTHER_KERNEL_TESTS
    ], ""


def benchmark_cases(file: Path) -> dict[str, list[str]]:
    """Name -> pytest's node ids of the cases of a benchmark file that share a process, in the file's order.

    ``bench_x[a]`` has its own process, ``bench_x[op: point]`` shares one with the op's other points. Empty if pytest
    collects nothing, because libraries are missing or the file is broken.
    """
    arguments = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(file), *arguments]
    lines = (command_output(*command, seconds=120.0) or "").splitlines()
    cases: dict[str, list[str]] = {}
    for line in lines:
        name = line.partition("::")[2]
        if name and line.startswith(f"benchmarks/{file.name}::"):
            cases.setdefault(f"{name.partition(':')[0]}]" if ":" in name else name, []).append(line)
    return cases


def benchmark_jobs(file: Path, folder: Path) -> tuple[list[Job], list[Path]]:
    """One job per group of cases, and the result file of each."""
    jobs, results = [], []
    for name, cases in (benchmark_cases(file) or {file.name: [str(file)]}).items():
        result = folder / f"{file.stem}_{len(results):03}.json"
        job = pytest_job(file, 1, f"--benchmark-json={result}")
        index = job.command.index(str(file))
        job.command[index : index + 1] = cases
        jobs.append(dataclasses.replace(job, name=name))
        results.append(result)
    return jobs, results


def merge(results: Sequence[Path], target: Path, command: Sequence[str]) -> None:
    """Merge the existing results of pytest-benchmark into one file. A killed process left no file or an empty one."""
    from mae_ast_fast.files import write_json

    loaded = []
    for path in results:
        with contextlib.suppress(OSError, ValueError):
            loaded.append(json.loads(path.read_text()))
    if loaded:
        benchmarks = [case for result in loaded for case in result["benchmarks"]]
        write_json(target, {**loaded[0], "benchmarks": benchmarks, "command": list(command)})


def goals(path: Path) -> list[dict[str, Any]]:
    """Goals of the step compared with a benchmark's result; empty without a result."""
    if not path.is_file():
        return []
    sys.path.insert(0, str(Path(__file__).parent / "reports"))
    import report

    names = ("what", "goal", "measured", "reached")
    return [dict(zip(names, row, strict=True)) for row in report.goals(json.loads(path.read_text()))]


def summary(run: Run) -> str:
    """Final table, and the failures."""
    rows = [("stage", "status", "passed", "failed", "skipped", "seconds")]
    for name, entry in run.report["stages"].items():
        counts = (entry["passed"], entry["failed"], sum(entry["skipped"].values()), f"{entry['seconds']:.1f}")
        rows.append((name, entry["status"], *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    for name, entry in run.report["stages"].items():
        lines += [f"{name}: {problem}" for problem in entry["problems"]]
        lines += [f"{name}: {count} skipped: {reason}" for reason, count in sorted(entry["skipped"].items())]
    for row in run.report.get("goals", []):
        verdict = {True: ": reached", False: ": not reached", None: ""}[row["reached"]]
        measured = row["measured"] if row["reached"] is None else f"measured {row['measured']}"
        lines.append(f"goal: {row['what']}: {row['goal']}, {measured}{verdict}")
    return "\n".join([*lines, f"{run.json}", f"{run.text}"])


def run_benchmarks(run: Run, stage: str, limit: float) -> None:
    """Run the stage ``step`` or ``benchmarks``, case by case; results are on disk after each case."""
    all_files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    files = [file for file in all_files if (file.stem == "bench_step") == (stage == "step")]
    stem = run.json.with_suffix("").resolve()
    with tempfile.TemporaryDirectory() as folder:
        jobs_by_file = {file: benchmark_jobs(file, Path(folder)) for file in files}

        def merge_all() -> None:
            for file, (_, results) in jobs_by_file.items():
                merge(results, Path(f"{stem}_{file.stem}.json"), run.report["command"])

        jobs = [job for file_jobs, _ in jobs_by_file.values() for job in file_jobs]
        note = "" if jobs else "there is no benchmarks/bench_*.py"
        run.stage(stage, jobs, limit, workers=1, note=note, after_each=merge_all)
    if stage == "step":
        run.report["goals"] = goals(Path(f"{stem}_bench_step.json"))
        run.save()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", default=",".join(STAGES), metavar="NAMES", help="with commas (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--limit", type=float, metavar="S", help=f"seconds of each stage (default: {LIMITS})")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes side by side (default: half the processors)")
    parser.add_argument("--commit", metavar="ID", help="commit of a tree without .git")
    arguments = parser.parse_args(argv)
    stages = arguments.stage.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"stages are {', '.join(STAGES)}, got {', '.join(unknown)}")
    workers = arguments.jobs or max(1, min(8, (os.cpu_count() or 1) // 2))
    if arguments.commit:
        os.environ["MAE_AST_FAST_COMMIT"] = arguments.commit  # for the benchmarks' result files
    try:
        report = environment(arguments.commit)
        check_writable(arguments.out)
    except Unusable as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    report["command"] = ["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]
    run = Run(report, arguments.out, stages, workers)
    description = "\n".join(f"{name}: {value}" for name, value in report.items())
    print(description, flush=True)
    run.log(f"{description}\n")
    run.save()
    kernels, others = test_files()
    limits = {name: arguments.limit or limit for name, limit in LIMITS.items()}
    if "kernels" in stages:
        run.stage("kernels", [pytest_job(file, workers) for file in kernels], limits["kernels"])
    if "suite" in stages:
        run.stage("suite", [pytest_job(file, workers) for file in others], limits["suite"])
    if "memcheck" in stages:
        jobs, note = memcheck_jobs(kernels, workers)
        run.stage("memcheck", jobs, limits["memcheck"], note=note)
    for stage in ("step", "benchmarks"):
        if stage in stages:
            run_benchmarks(run, stage, limits[stage])
    table = summary(run)
    print(table)
    run.log(table + "\n")
    failed_statuses = {"failed", "timed out"}
    return int(any(entry["status"] in failed_statuses for entry in run.report["stages"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # running tests end with this process
    sys.exit(main())
