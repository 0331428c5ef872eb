"""The tune command: the search with a simulated clock on meta tensors, and the edits of the table."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_ast_fast import cli
from mae_ast_fast.kernels.common import configs as table_module
from mae_ast_fast.kernels.common import launch
from mae_ast_fast.kernels.common.configs import EPILOGUES, TABLE
from mae_ast_fast.tools import tune
from mae_ast_fast.tools.tune import Group, to_text, with_ratios, with_rows


class Clock:
    """A simulated GPU of an architecture that no table has. ``time`` returns the milliseconds of a launch, or raises.

    Calls without a kernel launch (products of PyTorch) take 1 ms.
    """

    arch, device = "sm_123", "meta"

    def __init__(self, time: Callable[[dict[str, int]], float], result: Callable[[dict], object] | None = None) -> None:
        self.time, self.result = time, result or (lambda constants: torch.ones(4))
        self.timed: list[dict[str, int]] = []

    def constants(self, call: Callable[[], object]) -> dict[str, int]:
        with launch.record(self.arch) as recorder:
            call()
        chosen = [
            constants for *_, constants in recorder.launches if "num_warps" in constants
        ]  # not those of clear_padding
        return chosen[-1] | {"programs": recorder.lookups[-1][3].get("PROGRAMS", 0)}

    def results(self, call: Callable[[], object]) -> list[torch.Tensor]:
        return [self.result(self.constants(call))]

    def milliseconds(self, call: Callable[[], object]) -> float:
        with launch.record(self.arch) as recorder:
            call()
        if not recorder.launches:
            return 1.0
        self.timed.append(self.constants(call))
        return self.time(self.timed[-1])


def valley(**best: int) -> Callable[[dict[str, int]], float]:
    """Time that is least at ``best``, and 10 % of it longer for each doubling or halving away from it."""

    def time(constants: dict[str, int]) -> float:
        steps = [abs(math.log2(constants[key] / value)) for key, value in best.items()]
        return 1.0 + 0.1 * sum(steps)

    return time


def run_tune(tmp_path: Path, clock: Clock, *ops: str, **options) -> tuple[list[Group], str, list[str]]:
    """Groups, the table's text afterwards, and the lines of progress."""
    path = tmp_path / "table.py"
    if not path.exists():
        path.write_text(Path(table_module.__file__).read_text())
    progress: list[str] = []
    groups = tune.tune(list(ops) or None, bench=clock, path=path, progress=progress.append, **options)
    return groups, path.read_text(), progress


def execute(text: str) -> dict:
    names: dict = {}
    exec(text, names)
    return names


def table_of(text: str) -> dict:
    return execute(text)["TABLE"]


def options_with_table(text: str, kernel: str, *, arch: str, width: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Result of launch.options with this table."""
    with pytest.MonkeyPatch.context() as monkeypatch, launch.record(arch):
        monkeypatch.setattr(launch, "TABLE", table_of(text))
        return launch.options(kernel, torch.empty(0, dtype=dtype, device="meta"), width)


@pytest.fixture(autouse=True)
def _unchanged_table_in_use() -> None:
    before = [{kernel: list(rows) for kernel, rows in table.items()} for table in (TABLE, EPILOGUES)]
    yield
    assert before == [TABLE, EPILOGUES]


# ----------------------------------------------------------------------------------------------------------- search


def test_tune_finds_best_value_of_every_parameter(tmp_path):
    best = {"ROWS": 16, "COLUMNS": 64, "num_warps": 2}
    groups, text, progress = run_tune(tmp_path, Clock(valley(**best)), "bias_gelu")
    assert [(group.kernel, group.width, group.size) for group in groups] == [
        (f"bias_gelu_{way}", width, 2) for width in (768, 1536, 3072) for way in ("forward", "backward")
    ]
    for group in groups:
        assert {key: group.best[key] for key in best} == best
        assert group.after == len(group.examples) * 1.0 == 2.0
        assert group.before > group.after
        assert options_with_table(text, group.kernel, arch="sm_123", width=group.width) == group.best
        assert options_with_table(text, group.kernel, arch="sm_124", width=group.width) == group.present
        assert (
            options_with_table(text, group.kernel, arch="sm_123", width=group.width, dtype=torch.float32)
            == group.present
        )
        assert options_with_table(text, group.kernel, arch="sm_123", width=group.width + 3072) == group.present
    assert groups[1].best["PROGRAMS"] == groups[1].present["PROGRAMS"]  # no value is faster
    assert (
        sum(
            re.match(r"\[\d/6\] bias_gelu_\w+ \d+ .*launches/s, about .* minutes left", line) is not None
            for line in progress
        )
        == 6
    )


def test_tune_sums_times_of_examples(tmp_path):
    """The variant with dropout takes three times as long and decides the number of programs."""

    def time(constants: dict[str, int]) -> float:
        if not constants["programs"]:  # the forward
            return 1.0
        return 3.0 * valley(programs=88)(constants) if constants["DROPOUT"] else valley(programs=2112)(constants)

    groups, _, _ = run_tune(tmp_path, Clock(time), "add_layer_norm")
    (backward,) = (group for group in groups if group.kernel == "add_layer_norm_backward" and group.width == 768)
    assert backward.best["PROGRAMS"] == 132  # 1056 / 8


def test_tune_small_speedup_keeps_launch(tmp_path):
    for factor, launch_kept in ((0.98, True), (0.96, False)):
        clock = Clock(lambda constants, factor=factor: factor if constants["num_warps"] == 8 else 1.0)
        groups, text, _ = run_tune(tmp_path, clock, "bias_gelu")
        assert all((group.best == group.present) is launch_kept for group in groups)
        assert (text == Path(table_module.__file__).read_text()) is launch_kept


def test_tune_failing_or_wrong_launch_is_skipped_and_reported(tmp_path):
    def time(constants: dict[str, int]) -> float:
        if constants["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 0.1 if constants["ROWS"] in (1, 8) else 1.0

    def result(constants: dict[str, int]) -> torch.Tensor:
        return torch.ones(4) if constants["ROWS"] != 8 else torch.tensor([1.0, 1.0, float("nan"), 1.0])

    groups, _, progress = run_tune(tmp_path, Clock(time, result), "bias_gelu", check=True)
    assert {group.best["ROWS"] for group in groups} == {4}  # 8 is wrong; 1 is not reached, because 2 is not faster
    assert {group.best["num_warps"] for group in groups} == {4}
    skipped = [line for line in progress if "skipped" in line]
    assert any(
        "'num_warps': 8" in line and line.endswith("RuntimeError out of resource: shared memory") for line in skipped
    )
    assert any("'ROWS': 8" in line and "other elements are not finite" in line for line in skipped)
    assert all(line.startswith("bias_gelu_") for line in skipped)


def test_tune_failing_present_launch_raises(tmp_path):
    def broken(constants):
        raise RuntimeError("no kernel here")

    with pytest.raises(RuntimeError, match="no kernel here"):
        run_tune(tmp_path, Clock(broken), "bias_gelu")


def test_tune_fp32_keeps_shared_tile(tmp_path):
    groups, _, _ = run_tune(tmp_path, Clock(valley(BM=128, BN=128, num_warps=4)), "info_nce", dtype="fp32")
    assert {group.kernel for group in groups} == {"info_nce_forward", "info_nce_backward"}
    for group in groups:
        assert {key: group.best[key] for key in ("BM", "BN")} == {key: group.present[key] for key in ("BM", "BN")}
        assert group.best["num_warps"] == 4 != group.present["num_warps"]


def test_tune_covers_every_name_of_table(tmp_path):
    for dtype in tune.DTYPES:
        groups, _, _ = run_tune(tmp_path, Clock(lambda constants: 1.0), dtype=dtype)
        assert {group.kernel for group in groups} == set(TABLE)
        assert all(group.examples for group in groups)


def test_examples_called_later_launch_the_same():
    """The search lists the examples first, so their calls must not depend on loop variables."""
    for module in tune._modules().values():
        for dtype in (torch.float32, torch.bfloat16):
            at_once = [recorded_launches(call) for _, _, call in module.examples(dtype, module.WIDTHS[0])]
            later = [
                recorded_launches(call) for call in [call for _, _, call in module.examples(dtype, module.WIDTHS[0])]
            ]
            assert at_once == later


def recorded_launches(call: Callable[[], object]) -> list:
    with launch.record("sm_123") as recorder:
        call()
    return [
        (kernel, [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments], constants)
        for kernel, arguments, constants in recorder.launches
    ]


@pytest.mark.parametrize(
    ("wrong_result", "message"),
    [
        (torch.ones(100) * 1.03, "off by 0.03, the largest value is 1"),
        (torch.ones(100).index_fill(0, torch.tensor(7), float("nan")), "other elements are not finite"),
        (torch.ones(101), r"returned \(101,\) torch.float32, expected \(100,\)"),
        (torch.ones(100).half(), "returned .* torch.float16, expected"),
    ],
)
def test_check_same_wrong_result_raises(wrong_result, message):
    tune._check_same([torch.ones(100) * 1.001, torch.ones(0)], [torch.ones(100), torch.ones(0)])
    with pytest.raises(ValueError, match=message):
        tune._check_same([wrong_result], [torch.ones(100)])


def test_check_same_few_changed_integers_and_nan_pass():
    mask = torch.zeros(100_000, dtype=torch.bool)
    few, many = mask.clone(), mask.clone()
    few[:9] = True
    many[:11] = True
    tune._check_same([few], [mask])
    with pytest.raises(ValueError, match=r"0\.011 % of the values differ"):
        tune._check_same([many], [mask])
    undefined = torch.tensor([1.0, float("nan")])
    tune._check_same([undefined], [undefined])


# -------------------------------------------------------------------------------------------------------- the table


def test_tune_keeps_other_lines_and_format(tmp_path):
    before = Path(table_module.__file__).read_text()
    clock = Clock(lambda constants: 2.0 + abs(math.log2(constants["num_warps"] / 16)) + (constants.get("D") == 768))
    groups, text, _ = run_tune(tmp_path, clock)
    assert [line for line in text.splitlines() if '"sm_123"' not in line] == before.splitlines()
    after = table_of(text)
    assert list(after) == list(TABLE)
    for kernel, rows in after.items():
        arch_rows = [row for row in rows if row[0] == "sm_123"]
        assert [row for row in rows if row[0] != "sm_123"] == TABLE[kernel]
        assert arch_rows == sorted(arch_rows, key=lambda row: (row[2], row[1]))
        assert rows.index(arch_rows[-1]) < [row[0] for row in rows].index("any") if arch_rows else True
    assert {group.kernel for group in groups if group.best != group.present} == {
        kernel for kernel, rows in after.items() if any(row[0] == "sm_123" for row in rows)
    }
    pytest.importorskip("ruff")
    root = Path(__file__).parents[2]
    for command in (["format", "--check"], ["check"]):
        options = ["--config", str(root / "pyproject.toml"), str(tmp_path / "table.py")]
        process = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options], check=False, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout + process.stderr


def test_tune_again_replaces_rows_and_check_writes_nothing(tmp_path, monkeypatch):
    _, first_text, _ = run_tune(tmp_path, Clock(valley(ROWS=16)), "bias_gelu")
    _, second_text, _ = run_tune(tmp_path, Clock(valley(ROWS=16)), "bias_gelu")
    assert second_text == first_text
    _, changed_text, _ = run_tune(tmp_path, Clock(valley(ROWS=1)), "bias_gelu")
    assert changed_text == first_text.replace('"ROWS": 16', '"ROWS": 1')
    groups, checked_text, _ = run_tune(tmp_path, Clock(valley(ROWS=8)), "bias_gelu", check=True)
    assert checked_text == changed_text
    assert all(group.best["ROWS"] == 8 for group in groups)


def test_tune_interrupted_keeps_finished_operations(tmp_path):
    clock = Clock(valley(ROWS=16))
    names = tune._modules()
    first, second = (next(op for op in names if op == name) for name in ("bias_gelu", "scatter_tokens"))
    inner = clock.time

    def time(constants: dict[str, int]) -> float:
        if "NORM" in constants:
            raise KeyboardInterrupt
        return inner(constants)

    clock.time = time
    with pytest.raises(KeyboardInterrupt):
        run_tune(tmp_path, clock, first, second)
    after = table_of((tmp_path / "table.py").read_text())
    assert {kernel for kernel, rows in after.items() if rows != TABLE[kernel]} == {
        "bias_gelu_forward",
        "bias_gelu_backward",
    }


def test_tune_unchanged_width_gets_row_if_wider_one_changed(tmp_path):
    """Otherwise the row of the wider one would apply to it."""
    clock = Clock(lambda constants: valley(num_warps=16 if constants["D"] == 768 else 4)(constants))
    groups, text, _ = run_tune(tmp_path, clock, "add_layer_norm")
    for group in groups:
        changes = group.width == 768 or group.present["num_warps"] != 4
        assert (group.best != group.present) is changes
        assert options_with_table(text, group.kernel, arch="sm_123", width=group.width) == group.best
    assert [row[1] for row in table_of(text)["add_layer_norm_forward"] if row[0] == "sm_123"] == [384, 768]


TEXT = '''"""A table."""

TABLE: dict[str, list] = {
    # Of x.
    "x": [
        ("sm_80", 64, 2, {"ROWS": 1}),
        # Measured by hand.
        ("sm_90", 64, 2, {"ROWS": 2}),  # as it was
        (
            "sm_90",
            64,
            4,
            {"ROWS": 3},
        ),
        # Elsewhere.
        ("any", 64, 4, {"ROWS": 4}),
    ],
    "y": [("any", 64, 4, {"ROWS": 4})],
    "z": [
        ("sm_80", 64, 4, {"ROWS": 4}),
    ],
}
'''


def test_with_rows_inserts_sorted_before_any():
    rows = [(128, 2, {"ROWS": 9, "num_warps": 8}), (32, 2, {"ROWS": 5}), (64, 2, {"ROWS": 2}), (16, 2, {"ROWS": 5})]
    assert with_rows(TEXT, "x", "sm_90", rows) == TEXT.replace(
        """        ("sm_90", 64, 2, {"ROWS": 2}),  # as it was
        (
            "sm_90",
            64,
            4,
            {"ROWS": 3},
        ),
""",
        """        ("sm_90", 32, 2, {"ROWS": 5}),
        ("sm_90", 64, 2, {"ROWS": 2}),  # as it was
        ("sm_90", 128, 2, {"ROWS": 9, "num_warps": 8}),
        (
            "sm_90",
            64,
            4,
            {"ROWS": 3},
        ),
""",
    )
    assert with_rows(TEXT, "x", "sm_90", []) == TEXT
    replaced = with_rows(TEXT, "x", "sm_90", [(64, 2, {"ROWS": 7}), (64, 4, {"ROWS": 7})])
    assert table_of(replaced)["x"] == [
        ("sm_80", 64, 2, {"ROWS": 1}),
        ("sm_90", 64, 2, {"ROWS": 7}),
        ("sm_90", 64, 4, {"ROWS": 7}),
        ("any", 64, 4, {"ROWS": 4}),
    ]
    assert replaced.count('        # Elsewhere.\n        ("any"') == 1
    with pytest.raises(ValueError, match="y: expected each row of the table on separate lines"):
        with_rows(TEXT, "y", "sm_90", [])
    with pytest.raises(ValueError, match='z: expected a row for "any"'):
        with_rows(TEXT, "z", "sm_90", [])
    with pytest.raises(ValueError, match="no list of rows for w"):
        with_rows(TEXT, "w", "sm_90", [])


# -------------------------------------------------------------------------------------------------------- epilogues


def product_times(fused: dict[str, float], after: float = 3.0) -> Callable[[dict[str, int]], float]:
    """Milliseconds of a product with its epilogue, by ``fused``, and of the product and kernel (``after``)."""

    def time(constants: dict[str, int]) -> float:
        if "BK" not in constants:
            return after  # product and kernel: only the launch of the kernel is recorded
        return fused["forward" if constants["K"] == 192 else "wider"] * (1.0 if constants["num_stages"] == 4 else 2.0)

    return time


def test_tune_epilogue_is_compared_with_baselines(tmp_path):
    clock = Clock(product_times({"forward": 1.0, "wider": 1.25}))
    groups, text, progress = run_tune(tmp_path, clock, "feed_forward")
    assert [(group.kernel, group.width) for group in groups] == [
        (f"feed_forward_{way}", width) for width in (768, 1536, 3072) for way in ("forward", "backward")
    ]
    assert {group.best["num_stages"] for group in groups} == {4}
    for group in groups:
        inner, product_ratio, product_and_kernel_ratio = group.baselines
        assert inner == group.width // 4
        assert (product_ratio, product_and_kernel_ratio) == ((1.0, 3.0) if group.width == 768 else (0.8, 2.4))
    names = execute(text)
    rows = [
        ("sm_123", 192, 768, 2, 1.0, 3.0),
        ("sm_123", 384, 1536, 2, 0.8, 2.4),
        ("sm_123", 768, 3072, 2, 0.8, 2.4),
    ]
    assert names["EPILOGUES"] == {"feed_forward_forward": rows, "feed_forward_backward": rows}
    for kernel in names["EPILOGUES"]:

        def epilogue(
            arch: str, inner: int, outputs: int, element_size: int, *, kernel: str = kernel
        ) -> tuple[bool, str]:
            return names["epilogue"](kernel, arch, inner=inner, outputs=outputs, element_size=element_size)

        assert epilogue("sm_123", 192, 768, 2) == (True, "1.00 x the bare product, 3.00 x product and bias_gelu")
        assert epilogue("sm_123", 384, 1536, 2)[0] is False  # 0.8 of the bare product
        assert epilogue("sm_90", 192, 768, 2) == (False, "not measured on sm_90")
        assert epilogue("sm_123", 192, 768, 4) == (False, "not measured on sm_123")
        assert epilogue("sm_123", 192, 384, 2) == (False, "not measured on sm_123")
    choice, reason = names["epilogues"]("sm_123")
    assert choice == "on" and reason.count(", off: 0.80 x the bare product") == 4
    assert names["epilogues"]("sm_90") == ("off", "GELU inside products is not measured on sm_90")
    verdict = "feed_forward_backward 1536 (2 bytes): 0.800 x the speed of the bare product, 2.400 x product and kernel"
    assert verdict in progress and verdict in to_text(groups).splitlines()


def test_epilogues_slower_than_product_and_kernel_is_off(tmp_path):
    _, text, _ = run_tune(tmp_path, Clock(product_times({"forward": 1.0, "wider": 1.0}, after=1.0)), "feed_forward")
    names = execute(text)
    assert names["EPILOGUES"]["feed_forward_forward"][0] == ("sm_123", 192, 768, 2, 1.0, 1.0)
    assert names["epilogues"]("sm_123")[0] == "off"


def test_with_ratios_edits_in_place_and_check_writes_nothing(tmp_path):
    before = Path(table_module.__file__).read_text()
    _, first_text, _ = run_tune(tmp_path, Clock(product_times({"forward": 1.0, "wider": 1.0})), "feed_forward")
    _, checked_text, _ = run_tune(
        tmp_path, Clock(product_times({"forward": 0.5, "wider": 0.5})), "feed_forward", check=True
    )
    assert checked_text == first_text != before
    _, changed_text, _ = run_tune(tmp_path, Clock(product_times({"forward": 0.5, "wider": 1.0})), "feed_forward")
    assert changed_text == first_text.replace("192, 768, 2, 1.000, 3.000", "192, 768, 2, 2.000, 6.000")
    assert [line for line in first_text.splitlines() if '"sm_123"' not in line and "sm_123" in line] == []
    key = "sm_122", 192, 768, 2
    extended_text = with_ratios(
        changed_text, "feed_forward_backward", key, product_ratio=0.9114, product_and_kernel_ratio=1.25
    )
    (line,) = set(extended_text.splitlines()) - set(changed_text.splitlines())
    assert line == '        ("sm_122", 192, 768, 2, 0.911, 1.250),'
    assert len(extended_text.splitlines()) == len(changed_text.splitlines()) + 1
    with pytest.raises(ValueError, match="no list of rows for w"):
        with_ratios(changed_text, "w", key, product_ratio=1.0, product_and_kernel_ratio=1.0)


# ------------------------------------------------------------------------------------------------------ the command


def test_tune_cli_prints_table_and_exit_code(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "Gpu", lambda: Clock(valley(ROWS=8)))
    before = Path(table_module.__file__).read_text()
    assert cli.main(["tune", "--op", "bias_gelu,masked_mse", "--check"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["kernel", "width", "bytes", "before", "after", "times", "launch"]
    assert len(lines) == 1 + 7
    assert re.match(
        r"bias_gelu_forward +768 +2 +2200\.0 us +2000\.0 us +1\.10 +ROWS 8, COLUMNS \d+, num_warps \d", lines[1]
    )
    assert "minutes left" in captured.err
    monkeypatch.setattr(tune, "Gpu", lambda: Clock(lambda constants: 1.0))
    assert cli.main(["tune", "--op", "bias_gelu", "--check"]) == 0
    assert capsys.readouterr().out.count("kept") == 6
    assert Path(table_module.__file__).read_text() == before
    assert cli.main(["tune", "--op", "bias_gelu,gelu"]) == 1
    assert "must be among add_layer_norm, bias_gelu, " in capsys.readouterr().err
    assert cli.main(["tune", "--dtype", "fp8"]) == 1
    assert "dtype must be one of bf16, fp32, got fp8" in capsys.readouterr().err


def test_tune_cli_without_gpu_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 1
    assert "tune measures on a GPU, but PyTorch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_results_fill_memory_with_nan():
    gpu = tune.Gpu()
    assert gpu.arch.startswith(("sm_", "gfx"))
    torch.ones(1000, device="cuda")  # memory that the allocator would reuse
    (unwritten,) = gpu.results(lambda: torch.empty(1000, device="cuda"))
    assert unwritten.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.randn(4096, 4096, device="cuda")
    assert 0 < gpu.milliseconds(lambda: x + x) < 100
    (_, _, call), *_ = tune._modules()["masked_mse"].examples(torch.bfloat16, 256, "cuda")
    first, second = gpu.results(call), gpu.results(call)
    tune._check_same(first, second)
    assert first[0].isfinite().all()


def test_to_text_no_groups_is_header():
    assert to_text([]).split() == ["kernel", "width", "bytes", "before", "after", "times", "launch"]
