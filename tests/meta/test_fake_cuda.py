"""The fake GPU counts launches, waits, copies, memory, and calls that stream capture forbids."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import build
from fake_cuda.fixture import Run, environment_or_skip

SCRIPT = """
import ctypes, os, sys
import torch
from fake_cuda.measure import Measure, report

assert "TRITON_INTERPRET" not in os.environ
found, properties = {}, torch.cuda.get_device_properties(0)
for name in ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "warp_size",
             "max_threads_per_multi_processor", "shared_memory_per_block_optin", "regs_per_multiprocessor"):
    found[name] = getattr(properties, name)

x = torch.ones(512, 512, device="cuda")  # 1 MiB
x @ x  # cuBLAS takes its workspace
with Measure() as launches:
    y = (x + 1) @ x
    z = torch.empty(512, 512).pin_memory().to("cuda", non_blocking=True)
with Measure() as nothing:
    y.view(-1)
with Measure() as item:
    y[0, 0].item()  # the line that waits
with Measure() as synchronize:
    torch.cuda.synchronize()
with Measure() as pageable:
    torch.empty(8).to("cuda", non_blocking=True)
sent = torch.arange(5).cuda()
found["returned"] = sent.cpu().tolist()
found["before"] = torch.cuda.memory_allocated()
with Measure() as memory:
    block = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
    del block
    block = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

stream, other, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
with Measure() as capture, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
    y = x + 1
    y = y * 2
with Measure() as replay:
    graph.replay()
illegal = {}
def breaks(name, call):
    new = torch.cuda.CUDAGraph()
    with Measure() as measured, torch.cuda.graph(new, stream=stream, capture_error_mode="thread_local"):
        x.add_(1)
        call()
    illegal[name] = measured.illegal
def elsewhere():
    with torch.cuda.stream(other):
        x.add_(1)
library, host, pinned = ctypes.CDLL(os.environ["FAKE_CUDA"]), torch.empty(8), torch.empty(8).pin_memory()
to, of, on = (ctypes.c_void_p(value) for value in (x.data_ptr(), host.data_ptr(), stream.cuda_stream))
breaks("nothing", lambda: x[0, :8].copy_(pinned, non_blocking=True))
breaks("device", torch.cuda.synchronize)
breaks("stream", stream.synchronize)
breaks("item", lambda: x[0, 0].item())
breaks("pageable", lambda: library.cudaMemcpyAsync(to, of, 32, 1, on))
breaks("elsewhere", elsewhere)
breaks("malloc", lambda: library.cudaMalloc(ctypes.byref(ctypes.c_void_p()), 8))

try:
    torch.empty(2**38, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    found["out of memory"] = True
with Measure() as configuration:
    found["statuses"] = [library.cuLaunchKernel(None, 1, y, 1, 32, 1, 1, 0, None, None, None) for y in (65535, 65536)]
torch.optim.AdamW([torch.nn.Parameter(x)], lr=torch.tensor(1e-3, device="cuda"), fused=True, capturable=True)
report(**found, launches=launches, nothing=nothing, item=item, synchronize=synchronize, pageable=pageable,
       memory=memory, capture=capture, replay=replay, illegal=illegal, configuration=configuration,
       arguments=sys.argv[1:])
"""


@pytest.fixture(scope="module")
def counted(fake_cuda: Run) -> dict[str, Any]:
    return fake_cuda(SCRIPT, "a", "b c")


def test_device_properties_match_h200(counted: dict[str, Any]) -> None:
    assert (counted["major"], counted["minor"], counted["multi_processor_count"]) == (9, 0, 132)
    assert counted["total_memory"] == 143771 << 20
    assert (counted["L2_cache_size"], counted["warp_size"]) == (60 << 20, 32)
    assert counted["max_threads_per_multi_processor"] == 2048
    assert counted["shared_memory_per_block_optin"] == 227 << 10
    assert counted["regs_per_multiprocessor"] == 65536


def test_launches_are_counted_by_name(counted: dict[str, Any]) -> None:
    launches = counted["launches"]
    assert launches["launches"] == sum(launches["kernels"].values()) == 2, launches["kernels"]
    assert sorted("add" in name.lower() for name in launches["kernels"]) == [False, True]
    assert sorted("cublas" in name for name in launches["kernels"]) == [False, True]
    assert launches["copies"] == {"pinned to device": 1}
    assert (launches["waits"], launches["warned"], launches["illegal"], launches["captured"]) == ({}, [], {}, {})


def test_peak_bytes_match_allocator(counted: dict[str, Any]) -> None:
    assert counted["memory"]["peak_bytes"] - counted["before"] == 3 << 20


def test_views_launch_nothing(counted: dict[str, Any]) -> None:
    assert counted["nothing"]["launches"] == 0
    assert (counted["nothing"]["waits"], counted["nothing"]["copies"]) == ({}, {})


def test_item_counts_wait_and_line(counted: dict[str, Any]) -> None:
    line = next(number for number, text in enumerate(SCRIPT.splitlines(), 1) if "the line that waits" in text)
    assert counted["item"]["waits"] == {"cudaStreamSynchronize": 1}
    assert [line_reference.rpartition(":")[2] for line_reference in counted["item"]["warned"]] == [str(line)]


def test_synchronize_counts_wait_without_warning(counted: dict[str, Any]) -> None:
    assert counted["synchronize"]["waits"] == {"cudaDeviceSynchronize": 1}
    assert counted["synchronize"]["warned"] == []


def test_pageable_copies_are_counted_by_kind(counted: dict[str, Any]) -> None:
    assert counted["pageable"]["copies"] == {"pageable to device": 1}


def test_copies_keep_values(counted: dict[str, Any]) -> None:
    assert counted["returned"] == [0, 1, 2, 3, 4]


def test_capture_records_and_replay_counts_one_launch(counted: dict[str, Any]) -> None:
    assert sum(counted["capture"]["captured"].values()) == 2
    assert counted["capture"]["illegal"] == {}
    assert counted["replay"]["kernels"] == {"graph": 1}


@pytest.mark.parametrize(
    "call, reason",
    [
        ("device", "cudaDeviceSynchronize"),
        ("stream", "cudaStreamSynchronize"),
        ("item", "cudaStreamSynchronize"),
        ("pageable", "copy of pageable memory"),
        ("elsewhere", "launch on a stream that is not captured"),
        ("malloc", "cudaMalloc"),
    ],
)
def test_capture_counts_illegal_calls(counted: dict[str, Any], call: str, reason: str) -> None:
    assert counted["illegal"]["nothing"] == {}
    assert [name.partition(":")[0] for name in counted["illegal"][call]] == [reason]


def test_allocation_above_memory_raises(counted: dict[str, Any]) -> None:
    assert counted["out of memory"]


def test_invalid_launch_configuration_is_illegal(counted: dict[str, Any]) -> None:
    assert counted["statuses"] == [0, 9]
    assert counted["configuration"]["illegal"] == {"launch configuration of unknown": 1}


def test_script_receives_arguments(counted: dict[str, Any]) -> None:
    assert counted["arguments"] == ["a", "b c"]


def test_failing_script_fails_with_its_error(fake_cuda: Run) -> None:
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        fake_cuda("1 / 0")


def test_run_script_needs_no_environment(fake_cuda_environment: dict[str, str], tmp_path: Path) -> None:
    assert fake_cuda_environment
    (tmp_path / "hand.py").write_text(
        "import sys, torch; print(torch.cuda.get_device_name(), sys.argv[1:]); sys.exit(3)"
    )
    done = subprocess.run(
        build.script_command(str(tmp_path / "hand.py"), "--x", "1"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "NVIDIA H200 (fake) ['--x', '1']\n"), done.stderr


def test_uncompilable_source_skips_and_fails_in_ci(
    fake_cuda_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "fake_cuda.cpp"
    source.write_text("#include <no_such_header.h>\n")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_header"):
        environment_or_skip()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_header"):
        environment_or_skip()


def test_fake_gpu_is_invisible_to_tests(fake_cuda_environment: dict[str, str]) -> None:
    library = fake_cuda_environment["FAKE_CUDA"]
    assert library not in os.environ.get("LD_PRELOAD", "")
    assert library not in Path("/proc/self/maps").read_text()
