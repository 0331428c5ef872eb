"""Each op by itself: forward, and forward + backward, column by column; bytes/s or FLOP/s beside the machine's peak.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k bench_ops --benchmark-json=benchmarks/results/ops_cpu.json
python -m pytest benchmarks -k bench_ops --benchmark-disable        every column once, at toy sizes

    original     as in benchmarks/baselines/original.py, for the ops that stand for a part of it; info_nce of mixed
                 lengths, which
                 the paper does not have, as a loop over the clips
    reference    reference.py, eager
    compiled     torch.compile(fullgraph=True) of it
    fast         the Triton kernel; on a GPU only, since Triton makes no code for a CPU
    NAME         for attention, the backends that are there: sdpa, clips (CPU), short, aten, fa2, fa3, fa4 (GPU)

Base point: 8 clips of 10 s, patch_small, fp32 on a CPU; 256 clips, patch_base, bf16 on a GPU. Of it one thing is
changed at a time: sizes, clips, dropout, or lengths (``mixed``: 2 to 20 s, as much audio). Drawing masks is in
bench_masking.py.

Before an op is timed, outputs and gradients of every column are held to the fp64 reference by tests/common/policy.py,
of 8 clips at most; of more clips all are then held to the policy's caps (``compiled`` to these alone). With dropout
only the call without it can be held to anything; the one that is timed must be finite and must differ from that.
A column that raises or fails a check is left out and recorded under ``failed``: the other columns are timed, and the
benchmark fails at its end.

The peak of the machine, a copy of a large tensor or a product of square matrices, takes its turn in every round. The
work that rates are counted from is in op_cases.py: what an implementation moves on top of it counts against it. In a
CPU's caches an op may exceed the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import compare
from measure import ON_GPU, ROUNDS, Failed, Turns, load_average, no_compiler, peaks
from op_cases import DTYPE, OPS, Clips, Function, Op, Point
from policy import KERNEL_CAP
from torch import Tensor

CHECKED_CLIPS = 8  # more of them in fp64 would take longer than everything else
TIMED = ("forward", "forward + backward")


def make_op(name: str, point: Point, compiled: bool) -> Op:
    """The op's columns on this device at a point."""
    op = OPS[name][0](point, Clips(point))
    if not ON_GPU:
        op.columns.pop("fast", None)
    if compiled:
        torch.compiler.reset()  # a case's graphs must not use up the recompilations of the next one's ...
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and end in eager code unnoticed
        op.columns["compiled"] = torch.compile(op.columns["reference"], fullgraph=True, dynamic=False)
    order = ("original", "reference", "compiled")
    op.columns = {key: op.columns[key] for key in (*order, *op.columns) if key in op.columns}
    return op


def check(op: Op, name: str) -> None:
    """Raises AssertionError where a column's outputs or gradients are further from the fp64 reference than allowed."""
    compare(op.columns[name], op.columns["reference"], op.inputs, op.differentiable, DTYPE, op.summed, op.dot)


def exact_values(op: Op) -> dict[str, Tensor]:
    """The reference's output and gradients in fp32, on the device."""
    wide = {name: x.float() if x.is_floating_point() else x for name, x in op.inputs.items()}
    return values(op.columns["reference"], wide, op.differentiable)


def check_all_clips(op: Op, name: str, expected: dict[str, Tensor]) -> None:
    """The same by the caps on rms alone, against ``exact_values``."""
    found = values(op.columns[name], op.inputs, op.differentiable)
    for what, exact in expected.items():
        error = ((found[what].float() - exact).square().mean() / exact.square().mean()).sqrt().item()
        assert error <= KERNEL_CAP[DTYPE], f"{name}: {what} is {error:.3g} off, allowed {KERNEL_CAP[DTYPE]:.3g}"


def values(column: Function, inputs: dict[str, Tensor], differentiable: tuple[str, ...]) -> dict[str, Tensor]:
    """The output and the gradients, for incoming gradients that follow from the output's shape."""
    leaves = {name: x.detach().requires_grad_(name in differentiable) for name, x in inputs.items()}
    output = column(**leaves)
    found = {"output 0": output.detach()}
    if differentiable:
        incoming = torch.randn(output.shape, device=output.device, generator=torch.Generator(output.device))
        gradients = torch.autograd.grad(output, [leaves[name] for name in differentiable], incoming.to(output.dtype))
        found |= {f"gradient of {name}": x for name, x in zip(differentiable, gradients, strict=True)}
    return found


def calls(column: Function, op: Op, dropout: float) -> dict[str, Callable[[], object]]:
    """What is timed of a column; gradients come into new tensors, as from ``.grad`` that is None."""
    options = {"dropout": dropout} if dropout else {}
    inputs = {name: x.detach().requires_grad_(name in op.differentiable) for name, x in op.inputs.items()}
    wanted = [inputs[name] for name in op.differentiable]
    output = column(**inputs, **options)
    if dropout:
        assert output.isfinite().all() and not torch.equal(output, column(**inputs))
    incoming = torch.randn(output.shape, device=output.device).to(output.dtype)

    def forward() -> object:
        return column(**inputs, **options)

    def both() -> object:
        return torch.autograd.grad(column(**inputs, **options), wanted, incoming)

    return dict(zip(TIMED, (forward, both) if wanted else (forward,), strict=False))


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [pytest.param(name, point, id=f"{name}: {point.name}") for name, (_, at) in OPS.items() for point in at]
    metafunc.parametrize(("name", "point"), cases)


@pytest.mark.timeout(900)
def bench_ops(name: str, point: Point, benchmark: Any) -> None:
    why = "not at toy sizes" if benchmark.disabled else no_compiler()
    if why:
        print(f"without the column compiled: {why}")
    at = point.toy() if benchmark.disabled else point
    failed = Failed()
    with load_average(benchmark.extra_info):
        op, timed = checked(name, at, why is None, failed)
        peak, ceilings = peaks(DTYPE, toy=benchmark.disabled)
        chosen = "copy" if op.unit == "bytes" else "product"
        each = {(key, what): call for key, found in timed.items() for what, call in found.items()}
        turns = Turns({("peak", chosen): peak[chosen], **each}, once=benchmark.disabled)
        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"op": name, "point": point.name, "preset": at.preset, "clips": at.clips, "unit": op.unit}
    benchmark.extra_info["peak"] = turns.samples.pop(("peak", chosen)) | {"work": ceilings[chosen]}
    work = dict(zip(TIMED, op.work, strict=False))
    columns = {key: {what: turns.samples[key, what] for what in found} for key, found in timed.items()}
    benchmark.extra_info |= {"work": work, "columns": columns, "left_out": {"compiled": why} if why else {}}
    benchmark.extra_info["failed"] = failed
    assert not failed, str(failed)


def checked(name: str, at: Point, compiled: bool, failed: Failed) -> tuple[Op, dict[str, dict[str, Callable]]]:
    """An op at a point, and what to time of each column that is right; the other columns go to ``failed``."""
    expected = None
    if at.clips > CHECKED_CLIPS:
        few = make_op(name, replace(at, clips=CHECKED_CLIPS), compiled=False)
        for column in few.columns:
            with failed.catch(column):
                check(few, column)
        del few
    op = make_op(name, at, compiled)
    if at.clips > CHECKED_CLIPS:
        expected = exact_values(op)
    timed = {}
    for column, function in op.columns.items():
        if column in failed:
            continue
        with failed.catch(column):
            if expected is None:
                check(op, column)
            else:
                check_all_clips(op, column, expected)
            found = calls(function, op, at.dropout)
            for call in found.values():
                call()
            timed[column] = found
    return op, timed
