"""``make gpu``: the most useful measurements on a GPU, most useful first, in one call of at most nine minutes.

python benchmarks/gpu_first.py                              all sections, into benchmarks/results/gpu
python benchmarks/gpu_first.py --sections step,profile      some of them
python benchmarks/gpu_first.py --toy                        all at tiny sizes, to check that everything runs

Sections, in this order (``how`` in the results describes each measurement):

    peaks        peak rates of the GPU: a copy, and matrix products of the model's shapes
    step         TrainStep of patch_base on 256 clips of 10 s: correct? milliseconds, clips/s, MB/clip
    profile      the kernels of that step, by time
    ops          each operation: correct? milliseconds forward, and forward and backward
    attention    each attention backend at the encoder's and the decoder's shapes
    host         4 to 64 clips, eager and as CUDA graphs: the host's share
    plain        the same step in plain PyTorch, and in the style of the paper's code
    compiled     the same step with torch.compile
    tests        the kernels' tests in bf16

Every number is written at once, to at most five JSON files, so a killed call keeps its numbers. A measurement that
raises is recorded, and the next one runs. A section that crashes, hangs past its limit or leaves the GPU unusable is
recorded, and the next one runs in a new process. A section starts only if its estimate fits into the remaining time.
Values are first compared with the reference; a wrong result is still timed, and has a field ``wrong``.

`mae-ast-fast tune` is not included, because it takes longer than this call.

Needs torch, triton, numpy, pytest and this tree installed; hypothesis for most of the tests. Needs no network.
Exit codes: 0 success; 1 something failed, is wrong or was not measured; 2 this machine cannot run it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "common"))  # policy.py: tolerances of the checks
Task = tuple[str, Callable[[], Any]]  # label, and the function that measures it
TEST_FILES = (
    *("test_add_layer_norm.py", "test_feed_forward.py", "test_info_nce.py", "test_short_attention.py"),
    *("test_scatter_tokens.py", "test_flash.py", "test_bias_gelu.py", "test_train_step.py", "test_packed_sizes.py"),
)
SELECTED_TESTS = "bfloat16 or bf16 or cuda or waits"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the measurements.

    Attributes:
        clips: Clips per batch.
        seconds: Length of a clip.
        few_clips: Clips per batch in the section ``host``, where the host limits the speed.
        rounds: Number of timed calls; results are their medians.
        copy_values: Number of elements of the copied tensor.
        square: Rows and columns of the square matrices.
        rows: Rows of the matrix products: visible tokens of a batch, and all tokens.
        sizes: Configuration fields that differ from patch_base.
    """

    clips: int = 256
    seconds: float = 10.0
    few_clips: tuple[int, ...] = (4, 8, 16, 32, 64)
    rounds: int = 20
    copy_values: int = 1 << 29
    square: int = 8192
    rows: tuple[int, ...] = (31744, 126976)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)


_NARROW = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 64, "num_heads": 2}
TOY = Scale(
    clips=2,
    seconds=2.0,
    few_clips=(2,),
    rounds=2,
    copy_values=1 << 10,
    square=64,
    rows=(32,),
    sizes={**_NARROW, "encoder_layers": 1, "decoder_layers": 1},
)


# ------------------------------------------------------------------------------------------------------- measuring


def timed(call: Callable[[], object], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Milliseconds of a call: by CUDA events (median, minimum), and until the host has queued it (median)."""
    import torch

    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    device_ms, host_ms = [], []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        queue_start = time.perf_counter()
        start.record()
        call()
        end.record()
        host_ms.append(1e3 * (time.perf_counter() - queue_start))
        torch.cuda.synchronize()
        device_ms.append(start.elapsed_time(end))
    return {"ms": statistics.median(device_ms), "least_ms": min(device_ms), "host_ms": statistics.median(host_ms)}


def config_of(scale: Scale) -> Any:
    from mae_ast_fast import MAEASTConfig

    return MAEASTConfig.preset("patch_base", encoder_layerdrop=0.0, **scale.sizes)


def model_of(
    scale: Scale, clips: int, *, impl: str = "triton", attention: str = "auto", recompute: str = "none"
) -> tuple:
    """A model in training mode, and log-mel noise (clips, frames, 128), both on the GPU. Weights are always equal."""
    import torch

    from mae_ast_fast import MAEAST

    config = config_of(scale)
    torch.manual_seed(0)
    with torch.device("cuda"):  # initialising the weights on one CPU core takes a second
        model = MAEAST(config, impl=impl, attention=attention, recompute=recompute)
        log_mel = torch.randn(clips, int(100 * scale.seconds) - 2, config.num_mel_bins) * 4.0 - 6.0
    return model.train(), log_mel


def plain_step(model: Any, log_mel: Any, forward: Callable[[Any], Any]) -> Callable[[], None]:
    """An update in plain PyTorch: bf16 autocast, clipping at 10, fused AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def update() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(log_mel).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


# -------------------------------------------------------------------------------------------------------- sections


def peaks(scale: Scale) -> Iterator[Task]:
    """CUDA events, median of 10 calls, bf16. GB/s count bytes read and written. x W^T, dy W and dy^T x are the forward,
    input gradient and weight gradient of a Linear; MxNxK are rows, outputs and inputs."""
    import torch

    def copy() -> float:
        source = torch.empty(scale.copy_values, dtype=torch.bfloat16, device="cuda").normal_()
        target = torch.empty_like(source)
        return 4 * source.numel() / timed(lambda: target.copy_(source), 10)["ms"] / 1e6

    def products(m: int, n: int, k: int) -> dict[str, float]:
        shapes = ((m, k), (n, k), (m, n))
        x, w, y = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        calls = {"x W^T": lambda: x @ w.T, "dy W": lambda: y @ w, "dy^T x": lambda: y.T @ x}
        return {name: 2e-9 * m * n * k / timed(call, 10)["ms"] for name, call in calls.items()}

    yield "copy, GB/s", copy
    config = config_of(scale)
    width, inner = config.embed_dim, config.ffn_dim
    linears = ((3 * width, width), (width, width), (inner, width), (width, inner))
    for m, n, k in ((scale.square,) * 3, *((rows, n, k) for rows in scale.rows for n, k in linears)):
        yield f"{m}x{n}x{k}, TFLOP/s", partial(products, m, n, k)


def step(scale: Scale) -> Iterator[Task]:
    """TrainStep, bf16, dropout 0.1, CUDA events, median of 20 updates. ``loss off by``: relative difference from
    plain PyTorch with equal weights and mask, without dropout; ``wrong``: it, or that of the gradient norm, exceeds the
    tolerances of mae_ast_fast.tools.bench. MB/clip: the allocator's peak in an update above weights and AdamW state."""
    from mae_ast_fast import TrainStep
    from mae_ast_fast.tools.bench import check, peak_bytes

    reference, log_mel = model_of(scale, scale.clips, impl="torch", attention="sdpa")

    def column(name: str, options: dict[str, str]) -> dict[str, Any]:
        model, _ = model_of(scale, 1, **options)
        model.load_state_dict(reference.state_dict())
        update = TrainStep(model, precision="bf16")
        entry: dict[str, Any] = {}
        try:
            entry["loss off by"] = check(name, update, reference, log_mel, precision="bf16")
        except (ValueError, ZeroDivisionError) as error:
            entry["wrong"] = str(error)
        model.train()
        entry |= timed(lambda: update(log_mel), scale.rounds)
        entry["clips/s"] = 1e3 * scale.clips / entry["ms"]
        update.optimizer.zero_grad(set_to_none=True)
        entry["MB/clip"] = peak_bytes(lambda: update(log_mel), log_mel.device) / scale.clips / 1e6
        return entry

    model_options = {
        "fast": {},
        "fast, attention=short": {"attention": "short"},
        "fast, attention=sdpa": {"attention": "sdpa"},
        "fast, recompute=gelu": {"recompute": "gelu"},
    }
    for name, options in model_options.items():
        yield name, partial(column, name, options)


def profile(scale: Scale) -> Iterator[Task]:
    """torch.profiler, CUDA activities of three updates of ``fast``: (kernel, launches/step, ms/step), 80 slowest."""
    import torch

    from mae_ast_fast import TrainStep

    def kernels() -> list[tuple[str, float, float]]:
        model, log_mel = model_of(scale, scale.clips)
        update = TrainStep(model, precision="bf16")
        for _ in range(3):
            update(log_mel)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                update(log_mel)
            torch.cuda.synchronize()
        kernel_rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
        return [(row.key[:110], row.count / 3, row.self_device_time_total / 3e3) for row in kernel_rows[:80]]

    yield "kernels", kernels


def ops(scale: Scale) -> Iterator[Task]:
    """Operations of bench_ops.py at its base point (256 clips, bf16, no dropout), CUDA events, median of 10 calls, ms.
    ``work``: bytes or FLOP of forward, and forward and backward. ``wrong``: the rms error of the output or a
    gradient against the reference in fp32 exceeds the cap of mae_ast_fast/ops/policy.py."""
    import bench_ops
    from op_cases import OPS, Clips, Op, Point

    point = Point() if scale is not TOY else Point().toy()

    def column(op: Op, name: str, expected: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        try:
            bench_ops.check_all_clips(op, name, expected)
        except AssertionError as error:
            entry["wrong"] = str(error)
        calls = bench_ops.calls(op.columns[name], op, 0.0)
        return entry | {timing: timed(call, min(scale.rounds, 10))["ms"] for timing, call in calls.items()}

    def operation(make: Callable[[Point, Clips], Op]) -> dict[str, Any]:
        op = make(point, Clips(point))
        expected = bench_ops.exact_values(op)
        names = [name for name in op.columns if name not in ("original", "clips")]
        return {"unit": op.unit, "work": op.work} | {
            name: attempt(partial(column, op, name, expected)) for name in names
        }

    for name, (make, _) in OPS.items():
        yield name, partial(operation, make)


def attention(scale: Scale) -> Iterator[Task]:
    """All clips of equal length, bf16, CUDA events, median of 20 calls, ms. Encoder: visible tokens of a clip; decoder:
    all tokens. Dropout 0.1 and 0. ``sdpa``: cuDNN or FlashAttention, as in the name."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mae_ast_fast.ops.attention import attention as attend
    from mae_ast_fast.ops.masking import num_visible

    config = config_of(scale)
    tokens = (int(100 * scale.seconds) - 2) // config.patch_size[0] * config.grid_f
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    backends = {
        "aten": ("aten", SDPBackend.FLASH_ATTENTION),
        "short": ("short", SDPBackend.FLASH_ATTENTION),
        "sdpa, cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
        "sdpa, FlashAttention": ("sdpa", SDPBackend.FLASH_ATTENTION),
    }

    def measure_backend(rows: int, dropout: float, backend: str, kernel: SDPBackend) -> dict[str, float]:
        cu_seqlens = torch.arange(scale.clips + 1, dtype=torch.int32, device="cuda") * rows
        shape = (scale.clips * rows, 3, heads, width)
        qkv = torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(shape[0], heads, width, device="cuda", dtype=torch.bfloat16)

        def forward() -> torch.Tensor:
            return attend(qkv, cu_seqlens, rows, dropout, backend)

        def forward_and_backward() -> object:
            return torch.autograd.grad(forward(), qkv, grad)

        with sdpa_kernel([kernel]):
            with torch.no_grad():
                result = {"forward": timed(forward, scale.rounds)["ms"]}
            return result | {"forward + backward": timed(forward_and_backward, scale.rounds)["ms"]}

    for stack, rows in (("encoder", num_visible(tokens, config.mask_ratio)), ("decoder", tokens)):
        for dropout in (0.1, 0.0):
            for name, (backend, kernel) in backends.items():
                if backend != "short" or rows <= 128:
                    yield (
                        f"{stack}, dropout {dropout:g}, {name}",
                        partial(measure_backend, rows, dropout, backend, kernel),
                    )


def host(scale: Scale) -> Iterator[Task]:
    """TrainStep, bf16, few clips. ms: CUDA events, with a wait after each update. host_ms: until the host has queued
    an update. wall_ms: 20 updates without waits, divided by 20."""
    import torch

    from mae_ast_fast import TrainStep

    def column(clips: int, graphs: bool) -> dict[str, float]:
        model, log_mel = model_of(scale, clips)
        update = TrainStep(model, precision="bf16", graphs=graphs)
        entry = timed(lambda: update(log_mel), scale.rounds)
        torch.cuda.synchronize()
        wall_start = time.perf_counter()
        for _ in range(scale.rounds):
            update(log_mel)
        torch.cuda.synchronize()
        return entry | {"wall_ms": 1e3 * (time.perf_counter() - wall_start) / scale.rounds}

    for clips in scale.few_clips:
        for graphs in (False, True):
            yield f"{clips} clips, {'CUDA graphs' if graphs else 'eager'}", partial(column, clips, graphs)


def plain(scale: Scale) -> Iterator[Task]:
    """Updates in plain PyTorch (bf16 autocast, clip_grad_norm_, fused AdamW), CUDA events. ``reference``:
    MAEAST(impl="torch", attention="sdpa"); ``original``: benchmarks/baselines/original.py, the style of the paper's
    code."""
    import torch
    from baselines.original import Original

    def reference() -> dict[str, float]:
        model, log_mel = model_of(scale, scale.clips, impl="torch", attention="sdpa")
        return timed(plain_step(model, log_mel, model), min(scale.rounds, 10))

    def original() -> dict[str, float]:
        _, log_mel = model_of(scale, scale.clips, impl="torch", attention="sdpa")
        torch.manual_seed(0)
        model = Original(config_of(scale)).to("cuda").train()
        return timed(plain_step(model, log_mel, model), min(scale.rounds, 5), warm_up=1)

    yield "reference", reference
    yield "original", original


def compiled(scale: Scale) -> Iterator[Task]:
    """As ``reference`` of ``plain``, with torch.compile(fullgraph=True). compile_s: until the first update ends."""
    import torch

    def reference() -> dict[str, float]:
        model, log_mel = model_of(scale, scale.clips, impl="torch", attention="sdpa")
        forward = torch.compile(model, fullgraph=True, backend="aot_eager" if scale is TOY else "inductor")
        compile_start = time.monotonic()
        update = plain_step(model, log_mel, forward)
        update()
        torch.cuda.synchronize()
        seconds = time.monotonic() - compile_start
        return timed(update, min(scale.rounds, 10)) | {"compile_s": seconds}

    yield "reference", reference


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the run.

    Attributes:
        tasks: Yields its measurements in order; its docstring describes the method. None: the tests.
        file: Stem of the JSON file for its results.
        estimate: Estimated seconds on an H200; the section starts only if that much time is left.
    """

    tasks: Callable[[Scale], Iterator[Task]] | None
    file: str
    estimate: float


TESTS_METHOD = (
    f"pytest -k '{SELECTED_TESTS}', one process per file, up to 8 at a time; kernels compiled, not interpreted."
)
SECTIONS = {
    "peaks": Section(peaks, "step", 10),
    "step": Section(step, "step", 40),
    "profile": Section(profile, "profile", 15),
    "ops": Section(ops, "ops", 60),
    "attention": Section(attention, "ops", 20),
    "host": Section(host, "plain", 40),
    "plain": Section(plain, "plain", 30),
    "compiled": Section(compiled, "plain", 100),
    "tests": Section(None, "tests", 60),
}
LIMIT_FACTOR = 3.0  # a section is stopped after this many times its estimate
PR_SET_PDEATHSIG = 1  # option of Linux' prctl: signal to send to a process when its parent ends
START_SECONDS = 120.0  # time limit for the measuring process to find the GPU


# --------------------------------------------------------------------------------------------- the measuring process


def attempt(measure: Callable[[], Any]) -> Any:
    """Result of a measurement, or ``{"failed": reason, "at": location}`` if it raises."""
    try:
        return measure()
    except Exception as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        return {"failed": message_of(error), "at": f"{Path(frame.filename).name}:{frame.lineno}"}


def message_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def machine_info() -> dict[str, Any]:
    """GPU, driver, versions and commit, for every result file."""
    import numpy
    import torch
    import triton
    from conftest import pytest_benchmark_generate_commit_info

    properties = torch.cuda.get_device_properties(0)
    driver = gpu.command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver and driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "commit": pytest_benchmark_generate_commit_info(),
    }


def measure_sections(connection: Connection, toy: bool) -> None:
    """Run requested sections; send (label, value) of each measurement, and (None, error) at the end of a section.

    The first message is ("about", machine information) or ("unusable", reason). The process ends after an error,
    because after an illegal memory access of a kernel every further call fails.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hanging kernel must not keep the GPU
    os.setpgid(0, 0)  # child processes (compilers) end with it
    import torch

    if not torch.cuda.is_available():
        connection.send(("unusable", "PyTorch finds no CUDA device"))
        return
    scale = TOY if toy else Scale()
    connection.send(("about", machine_info()))
    while (request := connection.recv()) is not None:
        name, seconds = request
        deadline, error = time.monotonic() + seconds, None
        try:
            for label, measure in SECTIONS[name].tasks(scale):
                connection.send((label, attempt(measure) if time.monotonic() < deadline else "not begun: no time left"))
                gc.collect()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as raised:
            error = message_of(raised)
        connection.send((None, error))
        if error is not None:
            return


class Worker:
    """The measuring process. Only it uses the GPU, so a crash costs one section.

    Attributes:
        about: Result of ``machine_info``.

    Raises:
        gpu.Unusable: The process finds no GPU.
    """

    def __init__(self, toy: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=measure_sections, args=(worker_end, toy))
        self.process.start()
        worker_end.close()
        try:
            kind, self.about = self.receive(time.monotonic() + START_SECONDS)
        except TimeoutError:
            kind, self.about = "unusable", f"the measuring process found no GPU in {START_SECONDS:.0f} s"
        except EOFError:
            kind, self.about = "unusable", "the measuring process ended before it found a GPU; its output says why"
        if kind == "unusable":
            self.stop()
            raise gpu.Unusable(self.about)

    def receive(self, deadline: float) -> tuple[str | None, Any]:
        """The next message of the process.

        Raises:
            TimeoutError: No message came before ``deadline``, on the clock of time.monotonic().
            EOFError: The process died.
        """
        if not self.connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        return self.connection.recv()

    def close(self) -> None:
        """Let the idle process end."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
            self.process.join(10.0)
        self.stop()

    def stop(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


# ------------------------------------------------------------------------------------------------------ the results


class Results:
    """The result files, each ``{"about": ..., "sections": {name: {"how", "status", "seconds", "found"}}}``.

    ``status`` is running, done, failed, died, stopped or not begun; all except done and running have a ``reason``.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.sections: dict[str, dict[str, Any]] = {}
        self.began = 0.0

    def begin(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        section = SECTIONS[name]
        method = TESTS_METHOD if section.tasks is None else " ".join((section.tasks.__doc__ or "").split())
        self.began = time.monotonic()
        self.sections[name] = {"how": method, "status": "running", "seconds": 0.0, "found": {}}
        self.save(name)

    def add(self, name: str, label: str, value: Any) -> None:
        self.sections[name]["found"][label] = value
        self.save(name)

    def end(self, name: str, status: str, reason: str = "") -> None:
        entry = self.sections[name]
        entry["status"] = status
        if reason:
            entry["reason"] = reason
        self.save(name)
        print(f"{name}: {status}{reason and f', {reason}'}, {entry['seconds']} s", flush=True)
        print(json.dumps(entry["found"], default=str)[:2500], flush=True)

    def save(self, name: str) -> None:
        """Write the section's file atomically."""
        self.sections[name]["seconds"] = round(time.monotonic() - self.began, 1)
        file = SECTIONS[name].file
        sections = {name: entry for name, entry in self.sections.items() if SECTIONS[name].file == file}
        partial_path = self.folder / f".{file}.partial"
        partial_path.write_text(json.dumps({"about": self.about, "sections": sections}, indent=1, default=str) + "\n")
        os.replace(partial_path, self.folder / f"{file}.json")

    def good(self) -> bool:
        """Whether everything was measured and is correct."""
        text = json.dumps([entry["found"] for entry in self.sections.values()], default=str)
        incomplete = any(word in text for word in ('"failed": "', '"wrong": ', '"not begun'))
        return not incomplete and all(entry["status"] == "done" for entry in self.sections.values())


# -------------------------------------------------------------------------------------------------------------- run


def run_section(name: str, worker: Worker, results: Results, deadline: float) -> bool:
    """Measure a section; returns whether the worker can run another one."""
    try:
        worker.connection.send((name, deadline - time.monotonic()))
        while True:
            label, value = worker.receive(deadline + 1.0)
            if label is not None:
                results.add(name, label, value)
            else:
                results.end(name, "done" if value is None else "failed", value or "")
                return value is None
    except TimeoutError:
        results.end(name, "stopped", "it ran longer than its limit")
    except (EOFError, OSError):  # OSError: the process died before the request was sent
        worker.process.join(5.0)
        results.end(name, "died", f"exit status {worker.process.exitcode}")
    return False


def run_tests(results: Results, files: Sequence[Path], deadline: float) -> None:
    """Run the kernels' tests in bf16; a file that cannot run gets a line with the reason."""
    jobs = []
    workers = max(1, min(8, os.cpu_count() or 1))
    hypothesis = importlib.util.find_spec("hypothesis") is not None
    for file in files:
        if not file.is_file():
            results.add("tests", file.name, "left out: there is no such file")
        elif not hypothesis and any("from hypothesis import" in path.read_text() for path in gpu.test_paths(file)):
            results.add("tests", file.name, "left out: hypothesis is not installed")
        else:
            jobs.append(gpu.pytest_job(file, workers, select=SELECTED_TESTS))
    failed: list[str] = []
    output: list[str] = []

    def on_outcome(outcome: gpu.Outcome) -> None:
        entry = dataclasses.asdict(outcome)
        if outcome.status == "failed" and not outcome.failed:  # pytest itself failed, or the process crashed
            entry["output"] = next(text for text in output if text.startswith(f"==== {outcome.name}:"))[-4000:]
        results.add("tests", outcome.name, entry)
        if outcome.status in ("failed", "timed out"):
            failed.append(f"{outcome.name} {outcome.status}")

    gpu.run_jobs(jobs, deadline - time.monotonic(), workers, log=output.append, on_outcome=on_outcome)
    results.end("tests", "failed" if failed else "done", ", ".join(failed))


def run(sections: Sequence[str], results: Results, deadline: float, *, limit: float | None, toy: bool) -> None:
    """Run the sections in order.

    Args:
        sections: Names in ``SECTIONS``.
        results: Receives the measurements.
        deadline: End of the run on the clock of time.monotonic().
        limit: Seconds after which a section is stopped; None: ``LIMIT_FACTOR`` times its estimate.
        toy: Whether to use tiny sizes.

    Raises:
        gpu.Unusable: There is no GPU.
    """
    worker = Worker(toy)
    results.about |= worker.about
    try:
        for name in sections:
            results.begin(name)
            section = SECTIONS[name]
            remaining = deadline - time.monotonic()
            if remaining < section.estimate:
                results.end(name, "not begun", f"{remaining:.0f} s left, it takes about {section.estimate:.0f}")
                continue
            section_deadline = min(deadline, time.monotonic() + (limit or LIMIT_FACTOR * section.estimate))
            if section.tasks is None:
                if worker is not None:
                    worker.close()  # frees its memory for the tests
                    worker = None
                names = TEST_FILES[:1] if toy else TEST_FILES
                files = [path for name in names for path in (ROOT / "tests").rglob(name)]
                run_tests(results, files, section_deadline)
                continue
            try:
                worker = worker or Worker(toy)
            except gpu.Unusable as error:  # the GPU was lost since the last section
                results.end(name, "not begun", str(error))
                continue
            if not run_section(name, worker, results, section_deadline):
                worker.stop()
                worker = None
        if worker is not None:
            worker.close()
            worker = None
    finally:
        if worker is not None:
            worker.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; returns the exit code."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="DIR")
    parser.add_argument(
        "--seconds", type=float, default=540.0, metavar="S", help="time limit of the whole call (default: 540)"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), metavar="NAMES", help="with commas (default: all)")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="seconds after which a section is stopped (default: 3 x its estimate)"
    )
    parser.add_argument("--commit", metavar="ID", help="commit of a tree without .git")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to check that everything runs")
    arguments = parser.parse_args(argv)
    sections = arguments.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        parser.error(f"sections are {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if arguments.commit:
        os.environ["MAE_AST_FAST_COMMIT"] = arguments.commit
    try:
        gpu.check_installed()
        gpu.check_writable(arguments.out)
    except gpu.Unusable as error:
        print(f"gpu_first: {error}", file=sys.stderr)
        return 2
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = ["benchmarks/gpu_first.py", *(sys.argv[1:] if argv is None else argv)]
    results = Results(arguments.out, {"started": started, "command": command, "toy": arguments.toy})
    try:
        run(sections, results, start + arguments.seconds, limit=arguments.limit, toy=arguments.toy)
    except gpu.Unusable as error:
        print(f"gpu_first: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}, {time.monotonic() - start:.0f} s")
    return 0 if results.good() else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the measuring process ends with this one
    sys.exit(main())
