"""What the benchmarks share: clocks, columns that take turns, peaks of the machine.

The unit of measurement is a round: every column once, in turn. pytest-benchmark would time one function again and
again, column after column, and a machine that slows down meanwhile would favour some. So it is given a whole round,
which times its columns itself; their samples are kept, raw, in ``extra_info``.
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
LEAST = 0.01  # seconds of a sample on a CPU: a shorter call is repeated within it
FLUSH_BYTES, FLUSHES = 1 << 28, 8  # written before each sample on a GPU: five times its L2, and some 0.7 ms of work


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


class Failed(dict[str, str]):
    """Columns that cannot be measured, by name, and why. The other columns of the case are measured all the same."""

    @contextmanager
    def catch(self, *names: str) -> Iterator[None]:
        """Records an exception under the columns' names instead of raising it; the traceback is printed."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.update(dict.fromkeys(names, message[:500]))

    def __str__(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self.items())


class Clock:
    """Adds up the seconds between its calls under the names that they bring; it does not wait for a GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


class Turns:
    """Calls that take turns: one call of this is a round.

    On a CPU a sample is the mean over as many repeats as last 10 ms. On a GPU it is one call between two events, with
    the L2 flushed before it; while the device is at that, the host queues the call's kernels, so that launching them
    does not count as long as it takes less than the flush.

    Args:
        calls: By name. They are warmed up here.
        wall: Take the host's clock around a synchronised call, on a GPU too: for calls that work on the host.
        once: Do not repeat short calls.

    Attributes:
        samples: name -> ``seconds`` and, by the host's clock, ``cpu_seconds`` of the process; one number a round.
    """

    def __init__(self, calls: dict[str, Callable[[], object]], wall: bool = not ON_GPU, once: bool = False) -> None:
        self.calls, self.wall = calls, wall
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.repeats = dict.fromkeys(calls, 1)
        self.flushed = None if wall else torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        for name, call in calls.items():
            self.samples[name] = {"seconds": [], "cpu_seconds": []} if wall else {"seconds": []}
            call()
            if wall and not once:
                self.repeats[name] = max(1, math.ceil(LEAST / self._by_the_wall(call, 1)[0]))

    def __call__(self) -> None:
        for name, call in self.calls.items():
            sample = self._by_the_wall(call, self.repeats[name]) if self.wall else self._by_events(call)
            for kept, value in zip(self.samples[name].values(), sample, strict=True):
                kept.append(value)

    @staticmethod
    def _by_the_wall(call: Callable[[], object], repeats: int) -> tuple[float, float]:
        synchronize()
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - began) / repeats, (time.process_time() - worked) / repeats

    def _by_events(self, call: Callable[[], object]) -> tuple[float]:
        synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self.flushed.zero_()
        start.record()
        call()
        end.record()
        synchronize()
        return (start.elapsed_time(end) / 1e3,)


def peaks(dtype: torch.dtype, toy: bool) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What the device can do at most, to be measured beside the columns: calls, and their bytes or FLOP.

    ``copy`` of a large tensor, which is read and written, and ``product`` of two square matrices.
    """
    values = (1 << 29 if ON_GPU else 1 << 26) if not toy else 1 << 10
    side = (8192 if ON_GPU else 2048) if not toy else 32  # 1024 reaches half of it on a CPU
    source = torch.ones(values, device=DEVICE, dtype=dtype)
    target = torch.empty_like(source)
    left, right = torch.randn(2, side, side, device=DEVICE).to(dtype).unbind(0)
    product = torch.empty_like(left)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)}
    return calls, {"copy": 2 * values * source.element_size(), "product": 2 * side**3}


def no_compiler() -> str | None:
    """Why torch.compile makes no code here; None: it does."""
    names = ("gcc", "cc", "clang") if ON_GPU else ("g++", "clang++")  # Triton's launchers; Inductor's loops
    named = os.environ.get("CC" if ON_GPU else "CXX")
    if named or any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a compiler, found none of {', '.join(names)}"


@contextmanager
def load_average(into: dict[str, Any]) -> Iterator[None]:
    into["load_average_before"] = os.getloadavg()
    yield
    into["load_average_after"] = os.getloadavg()
