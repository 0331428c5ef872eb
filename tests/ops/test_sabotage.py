"""Mutation tests: the tests of an operation must fail on every deliberately broken kernel.

A mutant is a kernel file with one change. The operation's tests run in a separate process on a copy of the package with
that file. At least one test must fail, and the tests must start. Each kernel has three kinds of mutants: a wrong index
at the edge of a tile, a dropped last row, and a wrong row owner (movement) or a missing fp32 cast (row maths).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm import Command

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One change: ``old``, which occurs exactly once in kernels/``op``.py, becomes ``new``."""

    op: str
    kind: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "add_layer_norm",
        "edge",
        "y_ptr + row[:, None] * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside",
        "y_ptr + row[:, None] * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside & (col < D - 1)[None, :]",
    ),
    Mutant(
        "add_layer_norm", "last row", "for index in range(program, N, G):", "for index in range(program, N - 1, G):"
    ),
    Mutant(
        "add_layer_norm",
        "fp32 cast",
        "    mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
        "    z = z.to(tl.float16).to(tl.float32)\n    mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
    ),
    Mutant(
        "bias_gelu",
        "edge",
        "    first_col = tl.program_id(1) * COLUMNS\n    col = first_col + tl.arange(0, COLUMNS)\n    bias",
        "    first_col = tl.program_id(1) * (COLUMNS - 1)\n    col = first_col + tl.arange(0, COLUMNS)\n    bias",
    ),
    Mutant(
        "bias_gelu",
        "last row",
        "for start in range(program * ROWS, N, G * ROWS):",
        "for start in range(program * ROWS, N - ROWS, G * ROWS):",
    ),
    Mutant(
        "bias_gelu",
        "fp32 cast",
        "    y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))",
        "    h = h.to(x_ptr.dtype.element_ty).to(tl.float32)\n    y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))",
    ),
    Mutant("feed_forward", "edge", "index * h.shape[1] + tl.arange", "index * (h.shape[1] - 1) + tl.arange"),
    Mutant("feed_forward", "last row", "x_inside, w_inside = (row < N)[", "x_inside, w_inside = (row < N - 1)["),
    Mutant(
        "feed_forward",
        "fp32 cast",
        'total, input_precision="ieee")',
        'total, input_precision="ieee").to(x.dtype).to(tl.float32)',
    ),
    Mutant("feed_forward", "stored h", "_slices(total.to(h_ptr.dtype.element_ty), BS)", "_slices(total, BS)"),
    Mutant(
        "feed_forward",
        "row owner",
        "partial_ptr + row_block.to(tl.int64)",
        "partial_ptr + (row_block // 2).to(tl.int64)",
    ),
    Mutant(
        "scatter_tokens",
        "edge",
        "y_ptr + row[:, None] * D + col[None, :], z.to(y_ptr.dtype.element_ty), mask=inside",
        "y_ptr + row[:, None] * D + col[None, :], z.to(y_ptr.dtype.element_ty), mask=inside & (col > 0)[None, :]",
    ),
    Mutant(
        "scatter_tokens", "last row", "for index in range(program, N, G):", "for index in range(program, N - 1, G):"
    ),
    Mutant(
        "scatter_tokens",
        "row owner",
        "dvisible_ptr + ids_restore * D + col",
        "dvisible_ptr + tl.maximum(ids_restore - 1, 0) * D + col",
    ),
    Mutant(
        "scatter_tokens",
        "fp32 cast",
        "        mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
        "        z = z.to(tl.float16).to(tl.float32)\n        mean = tl.sum(tl.where(inside, z, 0.0), 1) / D",
    ),
    Mutant("gather_patches", "edge", "& (f < KF)", "& (f < KF - 1)"),
    Mutant(
        "gather_patches",
        "last row",
        "(row < N)[:, None, None] & (t < KT) & (f < KF)",
        "(row < N - 1)[:, None, None] & (t < KT) & (f < KF)",
    ),
    Mutant("gather_patches", "row owner", "clip_ptr + row * stride_clip,", "clip_ptr + row // 2 * 2 * stride_clip,"),
    Mutant("sample_mask", "edge", "mask=token < L)", "mask=token < L - 1)"),
    Mutant(
        "sample_mask", "last row", "token < tl.load(num_tokens_ptr + row)", "token < tl.load(num_tokens_ptr + row) - 1"
    ),
    Mutant("sample_mask", "row owner", "clip_ids.contiguous()", "torch.arange(len(clip_ids), device=clip_ids.device)"),
    Mutant("sample_mask", "ties", "is_below | ((is_tied == 1) & is_first)", "is_below | (is_tied == 1)"),
    Mutant(
        "short_attention",
        "edge",
        "(tl.arange(0, BLOCK_S) < clip_rows)[None, :]",
        "(tl.arange(0, BLOCK_S) <= clip_rows)[None, :]",
    ),
    Mutant(
        "short_attention",
        "last row",
        "tl.store(o_row, o.to(o_ptr.dtype.element_ty), mask=inside)",
        "tl.store(o_row, o.to(o_ptr.dtype.element_ty), mask=inside & (query < clip_rows - 1)[:, None])",
    ),
    Mutant(
        "short_attention",
        "fp32 cast",
        "    p = e / total[:, None]",
        "    p = (e / total[:, None]).to(q.dtype).to(tl.float32)",
    ),
    Mutant(
        "masked_mse",
        "edge",
        "* ROWS + tl.arange(0, ROWS)\n    difference, _",
        "* (ROWS - 1) + tl.arange(0, ROWS)\n    difference, _",
    ),
    Mutant("masked_mse", "last row", "mask=row < N)\n\n\n@triton", "mask=row < N - 1)\n\n\n@triton"),
    Mutant(
        "masked_mse",
        "fp32 cast",
        "prediction.to(tl.float32) - target",
        "(prediction.to(tl.float32) - target).to(prediction.dtype)",
    ),
    Mutant(
        "info_nce",
        "edge",
        's = tl.where((j < clip_rows)[None, :], s, float("-inf"))',
        's = tl.where((j <= clip_rows)[None, :], s, float("-inf"))',
    ),
    Mutant(
        "info_nce",
        "last row",
        "mask=(i < clip_rows)[:, None] & (col < P)[None, :],\n    )",
        "mask=(i < clip_rows - 1)[:, None] & (col < P)[None, :],\n    )",
    ),
    Mutant(
        "info_nce",
        "fp32 cast",
        "            total = tl.dot((weight - rounded.to(tl.float32)).to(target.dtype), target, total)",
        "            total += 0.0",
    ),
    Mutant(
        "info_nce",
        "hits",
        "(own_logit > max_before) & (own_logit >= max_after), mask=i < clip_rows",
        "(own_logit >= max_before) & (own_logit >= max_after), mask=i < clip_rows",
    ),
    Mutant("clear_padding", "edge", "mask=col < WIDTH)", "mask=col < WIDTH - 1)"),
    Mutant("clear_padding", "last row", "tl.program_id(0), N, PROGRAMS)", "tl.program_id(0), N - 1, PROGRAMS)"),
    Mutant("clear_padding", "row owner", "first_row + tl.program_id(0)", "first_row - 1 + tl.program_id(0)"),
    Mutant("add_layer_norm", "stride", "row * stride_dy_again + col", "row * stride_dy + col"),
    Mutant(
        "scatter_tokens",
        "stride",
        "mask_token, token, ids_restore = dense(mask_token), dense(token), dense(ids_restore)\n"
        "    weight, bias = dense(weight), dense(bias)\n",
        "pass\n",
    ),
]


def run_tests(folder: Path, mutant: Mutant) -> subprocess.CompletedProcess[str]:
    """Run the operation's tests on a copy of the package with the mutant, in ``folder``."""
    package = folder / "mae_ast_fast"
    shutil.copytree(ROOT / "mae_ast_fast", package, ignore=shutil.ignore_patterns("kernels"))  # __pycache__ saves time
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "kernels" / f"{mutant.op}.py"
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} occurs {source.count(mutant.old)} times in {path.name}"
    path.write_text(source.replace(mutant.old, mutant.new))
    tests = ROOT / "tests"
    (folder / "mutated.py").write_text(
        "import mae_ast_fast.kernels\n"
        f"assert mae_ast_fast.kernels.__path__[0] == {str(package / 'kernels')!r}, mae_ast_fast.kernels.__path__\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    options = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "mutated",
        "--timeout",
        "240",
    ]
    line = ["-m", "pytest", *options, str(tests / "ops" / f"test_{mutant.op}.py")]
    process = Command(line, folder / "stdout", folder / "stderr", env=environment, cwd=folder)
    try:
        code = process.wait(timeout=280)
    finally:
        process.kill()
    outputs = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(line, code, *outputs)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Mutant, subprocess.CompletedProcess[str]]:
    """Test runs of the mutants that this run of pytest selected, started side by side."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [params["mutant"] for params in calls if "mutant" in params]
    folders = [tmp_path_factory.mktemp("mutant") for _ in selected]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(selected, pool.map(run_tests, folders, selected), strict=True))


def cases() -> list[Any]:
    """CI runs the first mutant of each kernel, ``make test-all`` runs all, which takes minutes."""
    ops = [mutant.op for mutant in MUTANTS]
    return [
        pytest.param(
            mutant,
            marks=pytest.mark.ci if ops.index(mutant.op) == index else pytest.mark.long,
            id=f"{mutant.op}, {mutant.kind}",
        )
        for index, mutant in enumerate(MUTANTS)
    ]


@pytest.mark.timeout(1200)  # the first one waits for all
@pytest.mark.parametrize("mutant", cases())
def test_mutant_fails_its_tests(mutant: Mutant, outcomes: dict[Mutant, subprocess.CompletedProcess[str]]) -> None:
    completed = outcomes[mutant]
    report = f"{completed.stdout[-2000:]}\n{completed.stderr[-2000:]}"
    exit_code = completed.returncode
    assert exit_code == 1, f"expected a failing test, pytest's exit code was {exit_code}:\n{report}"
    assert " failed" in completed.stdout and " error" not in completed.stdout.splitlines()[-1], report


def test_mutants_every_kernel_has_three_kinds() -> None:
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "def examples(" in path.read_text()}
    for op in sorted(kernels):
        kinds = {mutant.kind for mutant in MUTANTS if mutant.op == op}
        assert {"edge", "last row"} <= kinds and kinds & {"row owner", "fp32 cast"}, f"{op}: {sorted(kinds)}"
