"""Shared by the benchmarks: clocks, columns that take turns, peak rates of the machine.

The unit of measurement is a round: every column once, in turn. pytest-benchmark by itself would time the columns one
after another, so a machine that slows down would favour some of them. It is therefore given a whole round, which times
its columns itself. All samples are stored in ``extra_info``.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 30 if ON_GPU else 5
MIN_SAMPLE_SECONDS = 0.01  # on a CPU; a shorter call is repeated within a sample
FLUSH_BYTES, NUM_FLUSHES = (
    1 << 28,
    8,
)  # written before each sample on a GPU: five times its L2 cache, about 0.7 ms of work


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


class Failed(dict[str, str]):
    """Names of columns that cannot be measured, with the reason. The other columns of the case are still measured."""

    @contextmanager
    def catch(self, *names: str) -> Iterator[None]:
        """Record an exception under the columns' names instead of raising it, and print the traceback."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.update(dict.fromkeys(names, message[:500]))

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.items())


class Clock:
    """Accumulates host seconds by stage: each call ends the stage that it names. It does not wait for a GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


class Turns:
    """Calls that take turns; one call of this object is a round.

    On a CPU a sample is the mean over enough repeats to last 10 ms. On a GPU it is one call between two events, after a
    flush of the L2 cache. During the flush the host queues the call's kernels, so launch time does not count unless it
    exceeds the flush.

    Args:
        calls: Name -> call. Each is called once here to warm up.
        host_clock: Use the host's clock around a synchronised call, also on a GPU. For calls that work on the host.
        single: Do not repeat short calls.

    Attributes:
        samples: Name -> ``seconds`` and, with the host's clock, ``cpu_seconds`` of the process; one value per round.
    """

    def __init__(
        self, calls: dict[str, Callable[[], object]], host_clock: bool = not ON_GPU, single: bool = False
    ) -> None:
        self.calls, self.host_clock = calls, host_clock
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.repeats = dict.fromkeys(calls, 1)
        self.flush_buffer = None if host_clock else torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        for name, call in calls.items():
            self.samples[name] = {"seconds": [], "cpu_seconds": []} if host_clock else {"seconds": []}
            call()
            if host_clock and not single:
                self.repeats[name] = max(1, math.ceil(MIN_SAMPLE_SECONDS / self._host_seconds(call, 1)[0]))

    def __call__(self) -> None:
        for name, call in self.calls.items():
            sample = self._host_seconds(call, self.repeats[name]) if self.host_clock else self._device_seconds(call)
            for column_samples, value in zip(self.samples[name].values(), sample, strict=True):
                column_samples.append(value)

    @staticmethod
    def _host_seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
        synchronize()
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - wall_start) / repeats, (time.process_time() - cpu_start) / repeats

    def _device_seconds(self, call: Callable[[], object]) -> tuple[float]:
        synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(NUM_FLUSHES):
            self.flush_buffer.zero_()
        start.record()
        call()
        end.record()
        synchronize()
        return (start.elapsed_time(end) / 1e3,)


def peaks(dtype: torch.dtype, toy: bool) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Calls that measure peak rates of the device, and the bytes or FLOP of each.

    ``copy`` reads and writes a large tensor, ``product`` multiplies two square matrices.
    """
    num_values = (1 << 29 if ON_GPU else 1 << 26) if not toy else 1 << 10
    side = (8192 if ON_GPU else 2048) if not toy else 32  # 1024 reaches half the peak on a CPU
    source = torch.ones(num_values, device=DEVICE, dtype=dtype)
    target = torch.empty_like(source)
    left, right = torch.randn(2, side, side, device=DEVICE).to(dtype).unbind(0)
    product = torch.empty_like(left)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)}
    return calls, {"copy": 2 * num_values * source.element_size(), "product": 2 * side**3}


def no_compiler() -> str | None:
    """Why torch.compile cannot generate code on this machine; None if it can."""
    names = ("gcc", "cc", "clang") if ON_GPU else ("g++", "clang++")  # Triton's launchers; Inductor's loops
    configured = os.environ.get("CC" if ON_GPU else "CXX")
    if configured or any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a compiler, found none of {', '.join(names)}"


@contextmanager
def load_average(into: dict[str, Any]) -> Iterator[None]:
    """Store the load averages before and after the block in ``into``."""
    into["load_average_before"] = os.getloadavg()
    yield
    into["load_average_after"] = os.getloadavg()
