"""The kernels command: reading compiler output, problems, the allow list, and the cache.

Kernels are compiled in subprocesses, where Triton's interpreter is off. Toys are modules that replace those of
mae_ast_fast.kernels.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_ast_fast.cli import main
from mae_ast_fast.kernels.spill_allowlist import Allowed
from mae_ast_fast.tools import kernel_compiler, kernel_report
from mae_ast_fast.tools.kernel_compiler import amdgcn_matrix, read_amdgcn, read_ptxas, sass_matrix
from mae_ast_fast.tools.kernel_hardware import ARCHS, occupancy
from mae_ast_fast.tools.kernel_report import check

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True, scope="module")
def _import_interpreted_kernels() -> None:
    """Import the kernels while the interpreter is on: a test here turns it off, and other tests reuse the modules."""
    for path in (ROOT / "kernels").glob("*.py"):
        importlib.import_module(f"mae_ast_fast.kernels.{path.stem}")


TOY = """
import torch, triton, triton.language as tl
from mae_ast_fast.kernels.common.launch import launch

FACTOR = tl.constexpr(2)
WIDTHS = (32, 64)

@triton.jit
def double(x):
    return x * FACTOR

"""
GOOD = (
    TOY
    + """
@triton.jit(do_not_specialize=["N"])
def _product(x_ptr, y_ptr, none_ptr, N, stride, D: tl.constexpr, ROWS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, D)
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=(row < N)[:, None], other=0.0)
    y = tl.dot(x, tl.trans(x), input_precision="ieee")
    tl.store(y_ptr + row[:, None] * ROWS + row[None, :], double(y).to(y_ptr.dtype.element_ty))

@triton.jit
def _copy(x_ptr, y_ptr, D: tl.constexpr):
    col = tl.arange(0, D)
    tl.store(y_ptr + col, tl.load(x_ptr + col))

def examples(dtype, width):
    rows = 16 if dtype == torch.float32 else 64  # products without matrix instructions take long to compile
    x = torch.empty(rows, width, dtype=dtype, device="meta")
    y = torch.empty(rows, rows, dtype=dtype, device="meta")
    if dtype != torch.float16 and width == 64:
        yield "a b ", rows, lambda: launch(
            _product, (1,), x=x, y=y, none=None, N=rows, stride=width, D=width, ROWS=rows, num_warps=4
        )
    if dtype == torch.float32:
        yield "copy", rows, lambda: launch(_copy, (1,), x=x, y=x[0].expand(rows, width), D=width)
"""
)
SPILLS = (
    TOY
    + """
@triton.jit
def _large(x_ptr, D: tl.constexpr):
    at = x_ptr + tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(at)
    tl.store(at, double(x) - tl.sum(x, 1)[:, None] * tl.sum(x, 0)[None, :])

def examples(dtype, width):
    if dtype == torch.float32 and width == WIDTHS[-1]:
        x = torch.empty(128, 128, dtype=dtype, device="meta")
        yield "large", 128, lambda: launch(_large, (1,), x=x, D=width, num_warps=1)
"""
)
SHARED = (
    TOY
    + """
@triton.jit
def _wide(x_ptr, y_ptr, D: tl.constexpr):
    row, col = tl.arange(0, 64), tl.arange(0, D)
    x = tl.load(x_ptr + row[:, None] * D + col[None, :])
    y = tl.load(y_ptr + row[:, None] * D + col[None, :])
    tl.store(x_ptr + row[:, None] * D + row[None, :], tl.dot(x, tl.trans(y)).to(tl.bfloat16))

def examples(dtype, width):
    if dtype == torch.bfloat16 and width == 32:
        x = torch.empty(64, 1024, dtype=dtype, device="meta")
        yield "wide", 64, lambda: launch(_wide, (1,), x=x, y=x, D=1024, num_warps=8)
"""
)
BROKEN = (
    TOY
    + """
@triton.jit
def _odd(x_ptr, D: tl.constexpr):
    col = tl.arange(0, 48)
    tl.store(x_ptr + col, 0.0)

def examples(dtype, width):
    if dtype == torch.float32:
        raise RuntimeError("no fp32 here")
    if dtype == torch.bfloat16:
        yield "odd", 1, lambda: launch(_odd, (1,), x=torch.empty(48, device="meta"), D=width)
    else:
        yield "idle", 1, lambda: None
"""
)
STEPS = """
import contextlib, io, json, pathlib, sys, triton
sys.dont_write_bytecode = True
from mae_ast_fast import kernels
from mae_ast_fast.cli import main
from mae_ast_fast.kernels import spill_allowlist as allowed; from mae_ast_fast.kernels.common import launch
toys = pathlib.Path(sys.argv[1])
kernels.__path__[:] = [str(toys)]
for step in json.loads(sys.argv[2]):
    for name, text in step.get("write", {}).items():
        (toys / f"{name}.py").write_text(text)
        sys.modules.pop(f"mae_ast_fast.kernels.{name}", None)
    allowed.ALLOWED = tuple(allowed.Allowed(*entry) for entry in step.get("allowed", ()))
    allowed.TRITON = step.get("triton", ".".join(triton.__version__.split(".")[:2]))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["kernels", *step["argv"]])
    print(json.dumps([code, out.getvalue()]))
"""


def run_python(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | variables
    return subprocess.run(
        [sys.executable, *argv], check=False, capture_output=True, text=True, env=environment, timeout=3000
    )


def run_kernels(folder: Path, *steps: dict[str, Any]) -> list[list[Any]]:
    """[exit code, report] of ``mae-ast-fast kernels`` on toys, for each step; one process runs all steps."""
    (folder / "toys").mkdir(exist_ok=True)
    process = run_python("-c", STEPS, str(folder / "toys"), json.dumps(steps), MAE_AST_FAST_CACHE=str(folder / "cache"))
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    return [[code, json.loads(out) if out.startswith("{") else out] for code, out in results]


def problem_lines(problems: list[dict[str, str]]) -> list[str]:
    return [
        f"{problem['op']}.{problem['kernel']} {problem['variant']} {problem['arch']}: {problem['message']}"
        for problem in problems
    ]


# ------------------------------------------------------------------------------------------------- the whole command


def test_kernels_cli_reports_all_archs_and_recompiles_only_changes(tmp_path):
    all_json = ["--json"]
    edited = GOOD.replace("y = tl.dot", "# as it was\n    y  =  tl.dot")
    first, unchanged, comment_edited, copy_edited, constant_edited, helper_edited, dump, no_match = run_kernels(
        tmp_path,
        {"argv": all_json, "write": {"good": GOOD}},
        {"argv": all_json},
        {"argv": all_json, "write": {"good": edited}},
        {"argv": ["--json", "--arch", "sm_90"], "write": {"good": GOOD.replace("x_ptr + col))", "x_ptr + col) + 1)")}},
        {"argv": ["--json", "--arch", "sm_90"], "write": {"good": GOOD.replace("constexpr(2)", "constexpr(3)")}},
        {"argv": ["--json", "--arch", "sm_90"], "write": {"good": GOOD.replace("x * FACTOR", "FACTOR + x")}},
        {"argv": ["--dump", "_product a b fp32 64 sm_9", "--out", str(tmp_path / "dump")]},
        {"argv": ["--dump", "_product a b fp32 48"]},
    )
    code, report = first
    assert problem_lines(report["problems"] + report["notes"]) == []
    assert code == 0
    variants = [("_product", f"a b {name}") for name in ("bf16 64", "fp32 64")] + [("_copy", "copy fp32 64")]
    rows = {(row["kernel"], row["variant"], row["arch"]): row for row in report["rows"]}
    assert set(rows) == {(*kind, arch) for kind in variants for arch in ARCHS}
    assert len(rows) == len(report["rows"]) == 12
    assert all(0 < row["occupancy"] <= 1 and row["registers"] > 0 and row["spill"] == 0 for row in rows.values())
    matrix = {
        arch: (rows["_product", "a b bf16 64", arch]["matrix"], rows["_copy", "copy fp32 64", arch]["matrix"])
        for arch in ARCHS
    }
    assert matrix == {
        "sm_80": ("HMMA", "-"),
        "sm_90": ("HGMMA", "-"),
        "sm_100": ("UTCHMMA", "-"),
        "gfx942": ("MFMA", "-"),
    }
    assert rows["_product", "a b fp32 64", "sm_90"]["matrix"] == "FFMA"
    assert rows["_product", "a b bf16 64", "sm_100"]["tensor_memory"] == 64
    assert rows["_product", "a b bf16 64", "sm_100"]["warps"] == 4
    assert rows["_product", "a b bf16 64", "sm_80"]["shared"] >= 64 * 64 * 2
    assert rows["_product", "a b bf16 64", "sm_90"]["bytes_per_row"] == 2 * (64 + 64)  # x and y
    assert rows["_copy", "copy fp32 64", "sm_90"]["bytes_per_row"] == 4 * (64 + 64 / 16)  # the second is one row
    assert (report["compiled"], report["cached"]) == (12, 0)
    assert (unchanged[1]["compiled"], unchanged[1]["cached"]) == (0, 12)
    assert unchanged[1]["rows"] == report["rows"]
    assert comment_edited[1]["compiled"] == 0
    # Only the kernel that changed, or whose constant or helper changed.
    assert [step[1]["compiled"] for step in (copy_edited, constant_edited, helper_edited)] == [1, 2, 2]
    code, text = dump
    assert code == 0
    stem = tmp_path / "dump" / "good._product-a-b-fp32-64-sm_90"
    assert f"  {stem}.ptx\n  {stem}.sass\n" in text
    assert ".entry _product" in Path(f"{stem}.ptx").read_text()
    assert "FFMA" in Path(f"{stem}.sass").read_text()
    assert len(list((tmp_path / "dump").iterdir())) == 2
    message = 'nothing to dump: expected a part of "op.kernel variant arch"'
    assert no_match == [1, f"mae-ast-fast kernels: error: {message}, got '_product a b fp32 48'\n"]


def test_kernels_cli_other_triton_notes_spills_without_failing(tmp_path):
    spills = {"argv": ["--json", "--op", "spills", "--arch", "sm_90"], "write": {"spills": SPILLS}}
    ((code, report),) = run_kernels(tmp_path, {**spills, "triton": "0.1"})
    assert (code, report["problems"]) == (0, [])
    (note,) = report["notes"]
    version = report["versions"]["triton"]
    expected = f"spills {report['rows'][0]['spill']} bytes (triton {version}, kernels/spill_allowlist.py is for 0.1)"
    assert (note["kind"], note["message"]) == ("spill", expected)


def test_kernels_cli_reports_problems_and_applies_allow_list(tmp_path):
    spills = {"argv": ["--json", "--op", "spills", "--arch", "sm_90"]}
    entry = ["spills._large", "large fp32 64", "sm_90", 10**6, "a toy"]
    unused = ["good._copy", "copy fp32 64", "sm_90", 16, "spilled once"]
    good = {"argv": ["--json", "--op", "good", "--arch", "sm_90"]}
    write = {"good": GOOD, "spills": SPILLS, "shared": SHARED, "broken": BROKEN, "unfinished": "def examples(:"}
    plain, allowed, small_entry, text, stale, other_arch, shared, broken, all_archs = run_kernels(
        tmp_path,
        {**spills, "write": write},
        {**spills, "allowed": [entry]},
        {**spills, "allowed": [[*entry[:3], 4, "too small"]]},
        {"argv": ["--op", "spills", "--arch", "sm_90"]},
        {**good, "allowed": [unused, ["good._copied", *unused[1:]]]},
        {**good, "allowed": [entry, [*unused[:2], "sm_80", *unused[3:]]]},
        {"argv": ["--json", "--op", "shared", "--arch", "sm_90"]},
        {"argv": ["--json", "--op", "broken", "--arch", "sm_90,gfx942"], "allowed": [["broken._odd", *entry[1:]]]},
        {"argv": ["--json", "--op", "broken,unfinished"]},
    )
    code, report = plain
    (row,) = report["rows"]
    assert row["spill"] > 100
    assert code == 1
    assert problem_lines(report["problems"]) == [f"spills._large large fp32 64 sm_90: spills {row['spill']} bytes"]
    code, report = allowed
    assert (code, report["problems"], report["rows"][0]["allowed"]) == (0, [], "a toy")
    assert small_entry[0] == 1
    assert (
        small_entry[1]["problems"][0]["message"] == f"spills {row['spill']} bytes, kernels/spill_allowlist.py allows 4"
    )
    assert text[0] == 1
    assert re.search(r"^  large fp32 64 +sm_90 .* <- spill$", text[1], re.MULTILINE)
    assert f"\nProblems:\n  spills._large large fp32 64 sm_90: spills {row['spill']} bytes\n" in text[1]
    assert text[1].endswith("1 kernel in 1 variant for sm_90: 0 compiled, 1 from the cache; 1 problem, exit code 1\n")
    assert max(map(len, text[1].splitlines())) <= 160
    assert stale[0] == 1
    assert problem_lines(stale[1]["problems"]) == [
        "good._copy copy fp32 64 sm_90: no longer spills: remove the entry from kernels/spill_allowlist.py",
        "good._copied copy fp32 64 sm_90: no such variant: remove the entry from kernels/spill_allowlist.py",
    ]
    assert other_arch[0] == 0  # entries for other operations and architectures do not count
    code, report = shared
    (row,) = report["rows"]
    assert (code, row["occupancy"]) == (1, 0.0)
    message = f"needs {row['shared']} bytes of shared memory, a block on sm_90 has 232448"
    assert problem_lines(report["problems"]) == [f"shared._wide wide bf16 32 sm_90: {message}"]
    code, report = broken
    assert code == 1
    lines = problem_lines(report["problems"])
    for arch in ("sm_90", "gfx942"):  # requested by name
        for width in (32, 64):
            (line,) = [line for line in lines if line.startswith(f"broken._odd odd bf16 {width} {arch}: does not comp")]
            assert "tl.arange(0, 48)" in line
            assert "power of 2" in line
        assert f"broken.  {arch}: examples(fp32, 64) fails: RuntimeError: no fp32 here" in lines
        assert any("the example 'idle' launches nothing" in line for line in lines)
    assert not any("spill_allowlist.py" in line for line in lines)
    code, report = all_archs
    assert code == 1
    assert any("unfinished" in line and "SyntaxError" in line for line in problem_lines(report["problems"]))
    assert {problem["arch"] for problem in report["problems"] if problem["kind"] == "compile"} == set(ARCHS) - {
        "gfx942"
    }
    assert {(note["kind"], note["arch"]) for note in report["notes"]} == {("compile", "gfx942")}


SPECIALISED = """
import json, sys, torch, triton, triton.language as tl
from mae_ast_fast.tools.kernel_compiler import specialised as _specialised

@triton.jit(do_not_specialize=["rows"])
def kernel(a_ptr, odd_ptr, bool_ptr, none_ptr, rows, one, sixteen, seventeen, large, scale, flag, D: tl.constexpr):
    pass

x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
for arch in ("sm_90", "gfx942"):
    given = x, x[:, 1:], x.bool(), None, 16, 1, 16, 17, 2**40, 1.0, True
    s = _specialised(kernel, given, {"D": 64, "num_warps": 8}, arch)
    marks = {str(place[0]): [name for name, _ in mark] for place, mark in s["attributes"].items() if mark}
    constants = {str(place[0]): value for place, value in s["constants"].items()}
    print(json.dumps([list(s["signature"].values()), marks, constants, s["options"]["num_warps"]]))
"""


def test_specialised_matches_jit(tmp_path):
    (tmp_path / "specialised.py").write_text(SPECIALISED)
    process = run_python(str(tmp_path / "specialised.py"))
    assert process.returncode == 0, process.stderr
    nvidia, amd = map(json.loads, process.stdout.splitlines())
    signature = [
        "*bf16",
        "*bf16",
        "*u1",
        "constexpr",
        "i32",
        "constexpr",
        "i32",
        "i32",
        "i64",
        "fp32",
        "u1",
        "constexpr",
    ]
    constants = {"3": None, "5": 1, "11": 64}
    divisible, pointer_range = "tt.divisibility", "tt.pointer_range"
    assert nvidia == [signature, {index: [divisible] for index in ("0", "2", "6", "8")}, constants, 8]
    marks = {
        "0": [divisible, pointer_range],
        "1": [pointer_range],
        "2": [divisible, pointer_range],
        "6": [divisible],
        "8": [divisible],
    }
    assert amd == [signature, marks, constants, 8]


def test_kernels_cli_cannot_compile_fails(capsys, monkeypatch):
    def fails(*argv: str) -> str:
        assert main(["kernels", *argv]) == 1
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        return captured.err

    assert "must be among sm_80, sm_90, sm_100, gfx942, got sm_70" in fails("--arch", "sm_90,sm_70")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in fails()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "got add_layer" in fails("--op", "add_layer")
    monkeypatch.setattr(kernel_report.importlib.util, "find_spec", lambda name: None)
    assert "needs the package triton" in fails()


def test_compile_kernels_killed_compiler_is_one_error(monkeypatch):
    def work(source, folder, files):
        if source["dies"]:
            (folder / "log").write_text("LLVM ERROR: out of luck\n")
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "result.json").write_text('{"registers": 1}')

    monkeypatch.setattr(kernel_compiler, "_work", work)
    progress, stored = [], []
    sources = {str(index): ({"dies": index == 1}, None) for index in range(4)}
    results = kernel_compiler.compile_kernels(
        sources, 2, lambda done, total: progress.append((done, total)), stored.append
    )
    assert [len(results_stored) for results_stored in stored] == [1] * 4, "each result is stored at once"
    assert results.pop("1") == {"error": "the compiler died with SIGKILL:\nLLVM ERROR: out of luck"}
    assert results == {name: {"registers": 1} for name in "023"}
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "archs",
    [
        pytest.param(("sm_80", "sm_90", "sm_100"), marks=pytest.mark.ci),
        pytest.param(("gfx942",), marks=pytest.mark.long),  # a quarter of the time, but only notes
    ],
    ids="-".join,
)
def test_kernels_cli_all_kernels_compile_within_limits(archs):
    process = run_python("-m", "mae_ast_fast", "kernels", "--json", "--no-cache", "--arch", ",".join(archs))
    assert process.stdout.startswith("{"), (process.returncode, process.stderr)
    report = json.loads(process.stdout)
    assert problem_lines(report["problems"]) == []
    assert process.returncode == 0
    assert report["cached"] == 0
    ops = {path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
    assert "add_layer_norm" in ops
    noted = {(note["op"], note["arch"]) for note in report["notes"]}
    assert {(row["op"], row["arch"]) for row in report["rows"]} | noted == {(op, arch) for op in ops for arch in archs}


ROWS = """
import json
from mae_ast_fast.tools import kernel_report
from mae_ast_fast.kernels import sample_mask

print(json.dumps([variant.width for variant in kernel_report._variants("sample_mask", sample_mask, "sm_90", [])]))
"""


def test_variants_operation_without_dtypes_covers_every_width():
    process = run_python("-c", ROWS)
    assert process.returncode == 0, process.stderr
    assert sorted(json.loads(process.stdout)) == [512, 512, 1024, 1024, 4096, 4096, 8192, 8192]


# -------------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "tensor_memory", "share"),
    [
        # A warp takes 72 * 32 = 2304 registers, 9 units of 256; of 16384 7 fit in a quarter: 28 warps, 7 blocks.
        ("sm_90", 72, 4096, 4, 0, 28 / 64),
        ("sm_80", 255, 0, 8, 0, 8 / 64),  # 8192 per warp: 2 in a quarter, one block of 8
        ("sm_80", 33, 0, 4, 0, 48 / 64),  # 1056 become 1280: 12 in a quarter
        ("sm_90", 32, 0, 1, 0, 32 / 64),  # 32 blocks at most
        ("sm_80", 32, 81920, 8, 0, 16 / 64),  # 81920 + 1024 of 167936: two blocks
        ("sm_80", 32, 82945, 8, 0, 8 / 64),  # rounded up to 83072: one block
        ("sm_90", 32, 232448, 8, 0, 8 / 64),  # the largest block, plus the reserved bytes
        ("sm_90", 32, 232449, 8, 0, 0.0),
        ("sm_100", 32, 0, 4, 256, 8 / 64),  # two blocks share 512 columns
        ("sm_80", 255, 0, 16, 0, 0.0),  # more registers than available
        ("gfx942", 128, 0, 4, 0, 16 / 32),  # 4 of 512 / 128 in a quarter
        ("gfx942", 129, 0, 4, 0, 12 / 32),  # 136: 3
        ("gfx942", 24, 32769, 4, 0, 4 / 32),  # one block of 64 KB
        ("gfx942", 24, 0, 4, 0, 32 / 32),
    ],
)
def test_occupancy_matches_hand_computation(*, arch, registers, shared, warps, tensor_memory, share):
    figures = {"registers": registers, "shared": shared, "warps": warps, "tensor_memory": tensor_memory}
    assert occupancy(arch, **figures) == share


def test_archs_block_shared_matches_vendor_limits():
    assert {name: arch.block_shared for name, arch in ARCHS.items()} == {
        "sm_80": 166912,
        "sm_90": 232448,
        "sm_100": 232448,
        "gfx942": 65536,
    }


def test_read_ptxas_returns_registers_and_spill():
    log = """
ptxas-blackwell info    : 11 bytes gmem
ptxas-blackwell info    : Compiling entry function '_forward' for 'sm_100a'
ptxas-blackwell info    : Function properties for _forward
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas-blackwell info    : Used 71 registers, used 1 barriers, 24 bytes cumulative stack size
"""
    assert read_ptxas(log) == {"registers": 71, "spill": 36}
    with pytest.raises(ValueError, match="expected the messages of ptxas -v, got 'nothing'"):
        read_ptxas("nothing")


def test_read_amdgcn_returns_registers_and_spill():
    assembly = """
	.set .L_forward.num_vgpr, 90
amdhsa.kernels:
    .sgpr_spill_count: 7
    .vgpr_count:     52
    .vgpr_spill_count: 3
"""
    assert read_amdgcn(assembly) == {"registers": 52, "spill": 12}
    with pytest.raises(ValueError, match=r"expected .vgpr_spill_count"):
        read_amdgcn(assembly.replace("vgpr_spill", "spill"))
    assert amdgcn_matrix("\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3]") == "MFMA"
    assert amdgcn_matrix("\tv_fmac_f32 v1, v2, v3") == "FMA"


SASS = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/                   FFMA R1, R2, R3, R4 ;         /* 0x00008c00ff087b82 */
"""


@pytest.mark.parametrize(
    ("opcodes", "instructions"),
    [
        ([], "FFMA"),
        (["HMMA.16816.F32.BF16"], "HMMA"),
        (["@!P0 HMMA.16816.F32", "HGMMA.64x64x16.F32.BF16", "@UP1 HGMMA.64x64x16.F32"], "HGMMA+HMMA"),
        (["HMMA.1688.F32.TF32"], "HMMA.TF32"),
        (["UTCHMMA gdesc[UR4]"], "UTCHMMA"),
        (["WARPGROUP.ARRIVE", "MUFU.EX2"], "FFMA"),
    ],
)
def test_sass_matrix_names_matrix_instructions(opcodes, instructions):
    lines = [
        f"        /*{address:04x}*/          {opcode} R4, R8 ;   /* HMMA */" for address, opcode in enumerate(opcodes)
    ]
    assert sass_matrix(SASS + "\n".join(lines)) == instructions
    assert sass_matrix("        /*0000*/  MOV R1, R2 ;  /* FFMA */") == "-"


def test_check_reports_tensor_memory_and_skips_broken_operation():
    row = {"op": "a", "kernel": "_k", "variant": "v", "arch": "sm_100", "shared": 0, "spill": 0, "tensor_memory": 1024}
    (problem,) = check([row], [])
    assert (problem["kind"], problem["message"]) == (
        "tensor_memory",
        "needs 1024 columns of tensor memory, there are 512",
    )
    entry = Allowed("a._k", "v", "sm_100", 8, "reason")
    row["tensor_memory"] = 512
    assert [problem["kind"] for problem in check([row], [entry])] == ["allowed"]
    assert check([row], [entry], {"a"}) == []
