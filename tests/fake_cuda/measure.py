"""For scripts on the fake GPU: count the device operations of a block of code.

Usage: ``with Measure() as update: step(features)``, then ``report(update=update)``, which prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
import warnings
from collections import Counter
from typing import Any

import torch


def counts() -> Counter[tuple[str, str]]:
    """Number of events since the process started, by kind and name."""
    library = ctypes.CDLL(os.environ["FAKE_CUDA"])
    library.fake_cuda_counts.restype = ctypes.c_char_p
    events: Counter[tuple[str, str]] = Counter()
    for line in library.fake_cuda_counts().decode().splitlines():
        kind, number, name = line.split("\t")
        events[kind, name] += int(number)
    return events


class Measure:
    """Counts device operations inside ``with``, in all threads of the process.

    Attributes:
        kernels: Launches by name: kernels, calls of cuBLAS and cuFFT, memsets ("memset") and replays ("graph").
        captured: The same, recorded in a CUDA graph instead of launched.
        waits: Calls that make the host wait for the device, by name.
        warned: Lines that PyTorch's ``set_sync_debug_mode`` warned of, as "file:line".
        copies: Copies by kinds of memory, such as "pinned to device". A copy of pageable memory can make the host wait.
        illegal: Calls and launches that CUDA forbids, most of them only during capture, by name.
        peak_bytes: Peak device memory in bytes, as counted by PyTorch's allocator.
        seconds: Host time.
    """

    def __enter__(self) -> Measure:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning that the mode is a prototype
            torch.cuda.set_sync_debug_mode("warn")
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        self._before = counts()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        events = counts() - self._before
        self._catch.__exit__(*error)
        torch.cuda.set_sync_debug_mode("default")
        self.peak_bytes = torch.cuda.max_memory_allocated()
        names = {"launch": "kernels", "captured": "captured", "wait": "waits", "copy": "copies", "illegal": "illegal"}
        for kind, name in names.items():
            setattr(self, name, {key[1]: number for key, number in events.items() if key[0] == kind})
        self.warned = []
        for warning in self._caught:
            if "synchronizing CUDA operation" in str(warning.message):
                self.warned.append(f"{warning.filename}:{warning.lineno}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    @property
    def launches(self) -> int:
        """Number of launches."""
        return sum(self.kernels.values())

    def numbers(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        attributes = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"launches": self.launches, **attributes}


def report(**values: Any) -> None:
    """Print values as one line of JSON; a ``Measure`` becomes its ``numbers()``."""
    results = {name: value.numbers() if isinstance(value, Measure) else value for name, value in values.items()}
    print(json.dumps(results), flush=True)
