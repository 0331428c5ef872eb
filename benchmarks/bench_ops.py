"""Each op by itself: forward, and forward + backward, by column; bytes/s or FLOP/s compared with the machine's peak.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k bench_ops --benchmark-json=benchmarks/results/ops_cpu.json
python -m pytest benchmarks -k bench_ops --benchmark-disable        every column once, at toy sizes

    original     as in benchmarks/baselines/original.py, for the ops that replace a part of it; info_nce of mixed
                 lengths, which the paper does not have, as a loop over the clips
    reference    plain PyTorch, as impl="torch" runs it (ops/eager.py)
    compiled     torch.compile(fullgraph=True) of it
    fast         the Triton kernel; only on a GPU, because Triton does not compile for CPUs
    NAME         for attention, the available backends: sdpa, clips (CPU), short, aten, fa2, fa3, fa4 (GPU)

Base point: 8 clips of 10 s, patch_small, fp32 on a CPU; 256 clips, patch_base, bf16 on a GPU. The other points change
one property: sizes, clips, dropout, or lengths (``mixed``: 2 to 20 s, the same total). Drawing masks is in
bench_masking.py.

Before an op is timed, outputs and gradients of every column are compared with the fp64 reference within the tolerances
of mae_ast_fast/ops/policy.py, on at most 8 clips. With more clips, all clips are then compared within the policy's caps
(``compiled`` only there). With dropout only the call without dropout is compared; the timed call must be finite and
must differ from it. A column that raises or fails a check is left out and recorded under ``failed``: the other columns
are timed, and the benchmark fails at its end.

The peak of the machine, a copy of a large tensor or a product of square matrices, takes its turn in every round. Rates
are computed from the minimum work in op_cases.py, so extra memory traffic of an implementation lowers its rate. In a
CPU's caches an op may exceed the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measure import ON_GPU, ROUNDS, Failed, Turns, load_average, no_compiler, peaks
from op_cases import DTYPE, OPS, Clips, Function, Op, Point
from torch import Tensor

from mae_ast_fast.ops.policy import TOLERANCES, compare

CHECKED_CLIPS = 8  # fp64 on more clips would take longer than everything else
TIMED = ("forward", "forward + backward")


def make_op(name: str, point: Point, compiled: bool) -> Op:
    """The op with its columns for this device."""
    op = OPS[name][0](point, Clips(point))
    if not ON_GPU:
        op.columns.pop("fast", None)
    if compiled:
        torch.compiler.reset()  # graphs of one case must not use up the recompilation limit of the next ...
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... and silently fall back to eager code
        op.columns["compiled"] = torch.compile(op.columns["reference"], fullgraph=True, dynamic=False)
    order = ("original", "reference", "compiled")
    op.columns = {key: op.columns[key] for key in (*order, *op.columns) if key in op.columns}
    return op


def check(op: Op, name: str) -> None:
    """Raise AssertionError if a column's outputs or gradients differ too much from the fp64 reference."""
    compare(
        op.columns[name],
        op.columns["reference"],
        op.inputs,
        op.differentiable,
        dtype=DTYPE,
        summed=op.summed_inputs,
        dot=op.uses_products,
    )


def exact_values(op: Op) -> dict[str, Tensor]:
    """Output and gradients of the reference in fp32, on the device."""
    fp32_inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in op.inputs.items()}
    return values(op.columns["reference"], fp32_inputs, op.differentiable)


def check_all_clips(op: Op, name: str, expected: dict[str, Tensor]) -> None:
    """Raise AssertionError if the rms error against ``exact_values`` exceeds the policy's cap."""
    outputs, cap = values(op.columns[name], op.inputs, op.differentiable), TOLERANCES[DTYPE].cap
    for output_name, expected_values in expected.items():
        error = (
            ((outputs[output_name].float() - expected_values).square().mean() / expected_values.square().mean())
            .sqrt()
            .item()
        )
        assert error <= cap, f"{name}: {output_name} is {error:.3g} off, allowed {cap:.3g}"


def values(column: Function, inputs: dict[str, Tensor], differentiable: tuple[str, ...]) -> dict[str, Tensor]:
    """Output and gradients of a column, for a random output gradient that depends only on the output's shape."""
    leaves = {name: tensor.detach().requires_grad_(name in differentiable) for name, tensor in inputs.items()}
    output = column(**leaves)
    outputs = {"output 0": output.detach()}
    if differentiable:
        grad_output = torch.randn(output.shape, device=output.device, generator=torch.Generator(output.device))
        gradients = torch.autograd.grad(output, [leaves[name] for name in differentiable], grad_output.to(output.dtype))
        outputs |= {f"gradient of {name}": tensor for name, tensor in zip(differentiable, gradients, strict=True)}
    return outputs


def calls(column: Function, op: Op, dropout: float) -> dict[str, Callable[[], object]]:
    """The timed calls of a column; gradients go to new tensors, as if ``.grad`` were None."""
    options = {"dropout": dropout} if dropout else {}
    inputs = {name: tensor.detach().requires_grad_(name in op.differentiable) for name, tensor in op.inputs.items()}
    differentiable_inputs = [inputs[name] for name in op.differentiable]
    output = column(**inputs, **options)
    if dropout:
        assert output.isfinite().all() and not torch.equal(output, column(**inputs))
    grad_output = torch.randn(output.shape, device=output.device).to(output.dtype)

    def forward() -> object:
        return column(**inputs, **options)

    def forward_and_backward() -> object:
        return torch.autograd.grad(column(**inputs, **options), differentiable_inputs, grad_output)

    return dict(zip(TIMED, (forward, forward_and_backward) if differentiable_inputs else (forward,), strict=False))


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [
        pytest.param(name, point, id=f"{name}: {point.name}") for name, (_, points) in OPS.items() for point in points
    ]
    metafunc.parametrize(("name", "point"), cases)


@pytest.mark.timeout(900)
def bench_ops(name: str, point: Point, benchmark: Any) -> None:
    reason = "not at toy sizes" if benchmark.disabled else no_compiler()
    if reason:
        print(f"column compiled left out: {reason}")
    run_point = point.toy() if benchmark.disabled else point
    failed = Failed()
    with load_average(benchmark.extra_info):
        op, calls_by_column = checked(name, run_point, reason is None, failed)
        peak_calls, peak_work = peaks(DTYPE, toy=benchmark.disabled)
        peak_name = "copy" if op.unit == "bytes" else "product"
        timed_calls = {
            (column, timing): call
            for column, column_calls in calls_by_column.items()
            for timing, call in column_calls.items()
        }
        turns = Turns({("peak", peak_name): peak_calls[peak_name], **timed_calls}, single=benchmark.disabled)
        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {
        "op": name,
        "point": point.name,
        "preset": run_point.preset,
        "clips": run_point.clips,
        "unit": op.unit,
    }
    benchmark.extra_info["peak"] = turns.samples.pop(("peak", peak_name)) | {"work": peak_work[peak_name]}
    work = dict(zip(TIMED, op.work, strict=False))
    columns = {
        column: {timing: turns.samples[column, timing] for timing in column_calls}
        for column, column_calls in calls_by_column.items()
    }
    benchmark.extra_info |= {"work": work, "columns": columns, "left_out": {"compiled": reason} if reason else {}}
    benchmark.extra_info["failed"] = failed
    assert not failed, str(failed)


def checked(name: str, point: Point, compiled: bool, failed: Failed) -> tuple[Op, dict[str, dict[str, Callable]]]:
    """An op at a point, and the timed calls of each correct column; the other columns go to ``failed``."""
    expected = None
    if point.clips > CHECKED_CLIPS:
        small_op = make_op(name, replace(point, clips=CHECKED_CLIPS), compiled=False)
        for column in small_op.columns:
            with failed.catch(column):
                check(small_op, column)
        del small_op
    op = make_op(name, point, compiled)
    if point.clips > CHECKED_CLIPS:
        expected = exact_values(op)
    calls_by_column = {}
    for column, function in op.columns.items():
        if column in failed:
            continue
        with failed.catch(column):
            if expected is None:
                check(op, column)
            else:
                check_all_clips(op, column, expected)
            column_calls = calls(function, op, point.dropout)
            for call in column_calls.values():
                call()
            calls_by_column[column] = column_calls
    return op, calls_by_column
