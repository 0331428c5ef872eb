"""What ``make gpu-full`` runs on a machine with a GPU; no network, no installing, no audio library.

``make gpu`` (gpu_first.py) measures the most useful numbers in nine minutes; this takes up to 40.

python benchmarks/gpu.py                          all stages
python benchmarks/gpu.py --stage kernels,memcheck  some: where a command may not run for long

Stages, each with a time limit (--limit):

    environment   GPU, driver, versions, commit, libraries that are missing (always)
    kernels       every kernel's tests on the GPU, the model's with impl="triton", and the recorded tensors
    suite         the other tests, less those marked ci, network or long
    memcheck      compute-sanitizer on a subset of the kernels' tests, without PyTorch's memory cache
    step          benchmarks/bench_step.py, and the goals beside what it measured
    benchmarks    the other benchmarks/bench_*.py

Test files run side by side, each in a process of its own; benchmark cases run one after another, each in a process of
its own (the points of one operation share one). After each of them the report is written, gpu_ARCH_COMMIT.json beside
gpu_ARCH_COMMIT.txt with all output, and the results of each benchmark file so far, gpu_ARCH_COMMIT_bench_NAME.json. A
run that is killed keeps what was done.
Exit codes: 0; 1 a test failed or did not end in time; 2 this machine cannot run it.
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
NEEDED = ("torch", "triton", "numpy", "safetensors", "huggingface_hub", "pytest", "hypothesis")
OPTIONAL = (
    *("torchaudio", "soundfile", "soxr", "av", "tensorboard", "jsonargparse", "tqdm", "matplotlib"),
    *("ruff", "yaml", "build", "pytest_timeout", "pytest_benchmark", "flash_attn", "transformers", "timm"),
)
# Tile edges, strides and offsets in the dtype that no other machine tests; repeats and statistics add nothing here.
MEMCHECK = (
    "bfloat16 and (test_values_and_gradients or test_moves_the_rows or test_normalised or test_cleared_tail) "
    "or test_clips_of_ten_seconds"
)
OTHERS = {
    "test_model_triton.py",
    "test_golden.py",
    "test_undefined_memory.py",
    "test_flash.py",
    "test_packed_sizes.py",
}  # in the stage kernels, of no one op
MEMORY_ERRORS = 99  # compute-sanitizer's exit code for them
# What the tests start ends with them. A session of its own would outlive a machine's way of ending a command.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Unusable(RuntimeError):
    """This machine cannot run the GPU checks; the message says why and what to do."""


@dataclasses.dataclass
class Job:
    """A process that runs tests and writes what happened to a JUnit file."""

    name: str
    command: list[str]
    environment: dict[str, str]


@dataclasses.dataclass
class Outcome:
    """How a job ended; ``skipped``: reason -> tests, ``problems``: a line each."""

    name: str
    status: str  # passed, failed, timed out, nothing selected
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ environment


def environment(commit: str | None = None) -> dict[str, Any]:
    """GPU, driver, versions, commit.

    Raises:
        Unusable: A library that the tests need is missing, there is no GPU, or the package is not this tree's.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Unusable(f"{sys.executable} lacks {', '.join(missing)}")
    import torch
    import triton

    if not torch.cuda.is_available():
        raise Unusable("PyTorch sees no CUDA device here; without a GPU, `make test` runs the kernels interpreted")
    _check_installed()
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changes = _said("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
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
        "commit": commit or _said("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _check_installed() -> None:
    """The package that is imported from anywhere must be this tree's."""
    code = "import mae_ast_fast.kernels as k, os; print(os.path.realpath(k.__path__[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    found = done.stdout.strip()
    if done.returncode or Path(found) != ROOT / "kernels":
        what = f"mae_ast_fast.kernels is {found}" if found else f"{sys.executable} cannot import mae_ast_fast"
        raise Unusable(
            f"{what}, not {ROOT / 'kernels'}: install this tree with {sys.executable} -m pip install --no-deps "
            "--no-build-isolation -e ., or choose a Python that has it: make gpu PYTHON=.venv/bin/python"
        )


def check_writable(folder: Path) -> None:
    """Raises Unusable where the folder of the results cannot be made or written. Makes nothing."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "cannot be written" if existing.is_dir() else "is no folder"
        raise Unusable(f"--out must be a folder that can be written, got {folder}: {existing} {why}")


def _said(*command: str, seconds: float = 30.0) -> str | None:
    """What a command prints, in the tree; None where there is no such command or it fails."""
    ceiling = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # not a repository around this tree
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=ceiling, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------------------- jobs


def run_jobs(
    jobs: Sequence[Job], limit: float, workers: int, log: Callable[[str], object], done: Callable[[Outcome], object]
) -> None:
    """Runs jobs side by side; what has not ended ``limit`` seconds from now is stopped, the rest is not begun."""
    deadline = time.monotonic() + limit
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_run, job, deadline, log, stop) for job in jobs]
        try:
            for future in as_completed(futures):
                done(future.result())
        except BaseException:
            stop.set()
            raise


def _run(job: Job, deadline: float, log: Callable[[str], object], stop: threading.Event) -> Outcome:
    start = time.monotonic()
    if start >= deadline or stop.is_set():
        return Outcome(job.name, "timed out", 0.0, problems=["not begun: no time was left"])
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
        outcome = _outcome(job.name, xml, process.returncode, timed_out, time.monotonic() - start)
    if "ERROR SUMMARY:" in text:
        outcome.problems += [line.strip("= ") for line in text.splitlines() if "Invalid __" in line][:5]
    log(f"==== {job.name}: {outcome.status}, {outcome.seconds:.1f} s\n$ {' '.join(job.command)}\n{text}\n")
    return outcome


def _outcome(name: str, xml: Path, code: int, timed_out: bool, seconds: float) -> Outcome:
    """From pytest's JUnit file, where there is one, and the exit code."""
    outcome = Outcome(name, "passed" if code == 0 else "failed", round(seconds, 1))
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        cases = []
    for case in cases:
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            outcome.failed += 1
            message = " ".join((bad[0].get("message") or "").split())
            outcome.problems.append(f"{case.get('classname')}.{case.get('name')}: {message}"[:300])
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message") or "no reason given"
            outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
        else:
            outcome.passed += 1
    if timed_out:
        outcome.status = "timed out"
        outcome.problems.append(f"stopped after {seconds:.0f} s, the stage's limit")
    elif code == MEMORY_ERRORS:
        outcome.problems.append("compute-sanitizer found memory errors")
    elif code == 5 and not outcome.failed:  # a whole file was skipped, or all its tests are of another kind
        outcome.status = "passed" if outcome.skipped else "nothing selected"
    elif code and not outcome.failed:
        outcome.problems.append(f"pytest ended with code {code}")
    return outcome


def pytest_job(file: Path, workers: int, *options: str, before: Sequence[str] = (), **more: str) -> Job:
    """The tests of one file, with the kernels for real."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    variables.update({"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more})
    command = [*before, sys.executable, "-m", "pytest", str(file), "-v", "--tb=short", "-p", "no:cacheprovider"]
    return Job(file.name, [*command, "-m", "not network and not ci and not long", *options], variables)


def test_files() -> tuple[list[Path], list[Path]]:
    """Files for the stage ``kernels``, and the others."""
    ops = {path.stem for path in (ROOT / "kernels").glob("*.py") if "def examples(" in path.read_text()}
    wanted = {f"test_{op}.py" for op in ops} | OTHERS
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if file.name in wanted], [file for file in files if file.name not in wanted]


# ----------------------------------------------------------------------------------------------------------- stages


class Run:
    """A run and its two files."""

    def __init__(self, report: dict[str, Any], folder: Path, stages: Sequence[str], workers: int) -> None:
        commit = (report["commit"] or report["started"].partition("T")[0])[:12]
        parts = ["gpu", report["arch"], commit, *(["dirty"] if report["dirty"] else [])]
        stem = "_".join([*parts, *(() if set(LIMITS) <= set(stages) else stages)])
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
        workers: int | None = None,
        note: str = "",
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        """Runs a stage's jobs and adds it to the report; without jobs ``note`` says why."""
        start = time.monotonic()
        entry: dict[str, Any] = {"status": "not run" if note else "running", "seconds": 0.0}
        entry |= {"passed": 0, "failed": 0, "skipped": {}, "problems": [note] if note else [], "files": []}
        self.report["stages"][name] = entry

        def done(outcome: Outcome) -> None:
            entry["files"].append(dataclasses.asdict(outcome))
            entry["passed"] += outcome.passed
            entry["failed"] += outcome.failed
            entry["skipped"] = dict(Counter(entry["skipped"]) + Counter(outcome.skipped))
            entry["problems"] += [f"{outcome.name}: {problem}" for problem in outcome.problems]
            spent, count = time.monotonic() - start, len(entry["files"])
            entry["seconds"] = round(spent, 1)
            self.save()
            after_each()
            print(
                f"{name} [{count}/{len(jobs)}] {outcome.name}: {outcome.status}, {outcome.passed} passed, "
                f"{outcome.failed} failed, {sum(outcome.skipped.values())} skipped, {outcome.seconds:.1f} s; "
                f"about {spent / count * (len(jobs) - count):.0f} s left",
                flush=True,
            )

        if jobs:
            run_jobs(jobs, limit, workers or self.workers, self.log, done)
            statuses = {file["status"] for file in entry["files"]}
            known = ("failed", "timed out", "passed", "nothing selected")
            entry["status"] = next(status for status in known if status in statuses)
        self.save()


def memcheck_jobs(files: Sequence[Path], workers: int) -> tuple[list[Job], str]:
    """Jobs under compute-sanitizer; or none, and why it does not work here."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return [], "compute-sanitizer is not on PATH"
    before = [sanitizer, "--tool", "memcheck", "--error-exitcode", str(MEMORY_ERRORS)]
    probe = [*before, sys.executable, "-c", "import torch; print('sum', int(torch.ones(8, device='cuda').sum()))"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return [], "compute-sanitizer does not end here, even on a program of one line"
    if done.returncode or "sum 8" not in done.stdout:
        said = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if line.strip("= ")]
        return [], f"compute-sanitizer does not work here: {' / '.join(said[:4])[:300]}"
    # One allocation a tensor: inside PyTorch's large blocks no access is out of bounds.
    options = {"before": before, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_TIMEOUT": "0"}
    return [pytest_job(file, workers, "-k", MEMCHECK, **options) for file in files if file.name not in OTHERS], ""


def benchmark_cases(file: Path) -> dict[str, list[str]]:
    """Cases of a benchmark file that share a process, as pytest's node ids by name; in the file's order.

    ``bench_x[a]`` has one of its own, ``bench_x[op: point]`` shares it with the op's other points. Empty where pytest
    collects nothing: libraries are missing, or the file is broken.
    """
    words = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(file), *words]
    lines = (_said(*command, seconds=120.0) or "").splitlines()
    cases: dict[str, list[str]] = {}
    for line in lines:
        name = line.partition("::")[2]
        if name and line.startswith(f"benchmarks/{file.name}::"):
            cases.setdefault(f"{name.partition(':')[0]}]" if ":" in name else name, []).append(line)
    return cases


def benchmark_jobs(file: Path, folder: Path) -> tuple[list[Job], list[Path]]:
    """A job for each group of cases, and the result file that each writes."""
    jobs, results = [], []
    for name, cases in (benchmark_cases(file) or {file.name: [str(file)]}).items():
        result = folder / f"{file.stem}_{len(results):03}.json"
        job = pytest_job(file, 1, f"--benchmark-json={result}")
        place = job.command.index(str(file))
        job.command[place : place + 1] = cases
        jobs.append(dataclasses.replace(job, name=name))
        results.append(result)
    return jobs, results


def merge(results: Sequence[Path], target: Path, command: Sequence[str]) -> None:
    """Writes pytest-benchmark's results that are there as one. A process that was killed left none or an empty file."""
    from mae_ast_fast.files import write_json

    found = []
    for path in results:
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    if found:
        benchmarks = [case for result in found for case in result["benchmarks"]]
        write_json(target, {**found[0], "benchmarks": benchmarks, "command": list(command)})


def goals(path: Path) -> list[dict[str, Any]]:
    """The goals of the step beside a benchmark's result; none where there is no result."""
    if not path.is_file():
        return []
    sys.path.insert(0, str(Path(__file__).parent))
    import report

    names = ("what", "goal", "measured", "reached")
    return [dict(zip(names, row, strict=True)) for row in report.goals(json.loads(path.read_text()))]


def summary(run: Run) -> str:
    """The table at the end, and what failed."""
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
    """The stage ``step`` or ``benchmarks``: one case after another; what was measured so far is on disk after each."""
    every = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    files = [file for file in every if (file.stem == "bench_step") == (stage == "step")]
    stem = run.json.with_suffix("").resolve()
    with tempfile.TemporaryDirectory() as folder:
        parts = {file: benchmark_jobs(file, Path(folder)) for file in files}

        def merge_all() -> None:
            for file, (_, results) in parts.items():
                merge(results, Path(f"{stem}_{file.stem}.json"), run.report["command"])

        jobs = [job for each, _ in parts.values() for job in each]
        note = "" if jobs else "there is no benchmarks/bench_*.py"
        run.stage(stage, jobs, limit, workers=1, note=note, after_each=merge_all)
    if stage == "step":
        run.report["goals"] = goals(Path(f"{stem}_bench_step.json"))
        run.save()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", default=",".join(STAGES), metavar="NAMES", help="with commas (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--limit", type=float, metavar="S", help=f"seconds of each stage (default: {LIMITS})")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes side by side (default: half the processors)")
    parser.add_argument("--commit", metavar="ID", help="of the tree, where it has no .git")
    arguments = parser.parse_args(argv)
    stages = arguments.stage.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"stages are {', '.join(STAGES)}, got {', '.join(unknown)}")
    workers = arguments.jobs or max(1, min(8, (os.cpu_count() or 1) // 2))
    if arguments.commit:
        os.environ["MAE_AST_FAST_COMMIT"] = arguments.commit  # for the benchmarks' own result files
    try:
        report = environment(arguments.commit)
        check_writable(arguments.out)
    except Unusable as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    report["command"] = ["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]
    run = Run(report, arguments.out, stages, workers)
    told = "\n".join(f"{name}: {value}" for name, value in report.items())
    print(told, flush=True)
    run.log(f"{told}\n")
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
    bad = {"failed", "timed out"}
    return int(any(entry["status"] in bad for entry in run.report["stages"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the tests that run end with us
    sys.exit(main())
