"""The tune command: the search with a simulated clock on meta tensors, and the files of tuned launches."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_ast_fast import cli
from mae_ast_fast.kernels.common import configs, launch
from mae_ast_fast.kernels.common.configs import EPILOGUES, TABLE
from mae_ast_fast.ops import cases
from mae_ast_fast.tools import tune
from mae_ast_fast.tools.kernel_report import examples_of, row_widths
from mae_ast_fast.tools.tune import Group, to_text

tune._modules()  # the kernels' files declare their launches


class Clock:
    """A simulated GPU of an architecture that nobody tuned. ``time`` returns the milliseconds of a launch, or raises.

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


def run_tune(tmp_path: Path, clock: Clock, *ops: str, **options) -> tuple[list[Group], Path, list[str]]:
    """Groups, the file of tuned launches, and the lines of progress."""
    path = tmp_path / "sm_123.json"
    progress: list[str] = []
    groups = tune.tune(list(ops) or None, bench=clock, path=path, progress=progress.append, **options)
    return groups, path, progress


@pytest.fixture
def tables_with(monkeypatch: pytest.MonkeyPatch):
    """A function that uses the files of a folder; returns the launch table and the epilogues with them."""
    defaults = copy.deepcopy((TABLE, EPILOGUES))

    def use(folder: Path) -> tuple[dict, dict]:
        table, epilogues = copy.deepcopy(defaults)
        for module in (configs, launch):
            monkeypatch.setattr(module, "TABLE", table)
        monkeypatch.setattr(configs, "EPILOGUES", epilogues)
        configs.insert_epilogues(folder)
        for kernel in table:
            configs.insert_launches(folder, kernel)
        return table, epilogues

    return use


def launch_options(kernel: str, *, arch: str, width: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Result of launch.options on an architecture."""
    with launch.record(arch):
        return launch.options(kernel, torch.empty(0, dtype=dtype, device="meta"), width)


@pytest.fixture(autouse=True)
def _unchanged_table_in_use() -> None:
    before = [{kernel: list(rows) for kernel, rows in table.items()} for table in (TABLE, EPILOGUES)]
    yield
    assert before == [TABLE, EPILOGUES]


# ----------------------------------------------------------------------------------------------------------- search


def test_tune_finds_best_value_of_every_parameter(tmp_path, tables_with):
    best = {"ROWS": 16, "COLUMNS": 64, "num_warps": 2}
    groups, path, progress = run_tune(tmp_path, Clock(valley(**best)), "bias_gelu")
    tables_with(path.parent)
    assert [(group.kernel, group.width, group.size) for group in groups] == [
        (f"bias_gelu_{way}", width, 2) for width in (768, 1536, 3072) for way in ("forward", "backward")
    ]
    for group in groups:
        assert {key: group.best[key] for key in best} == best
        assert group.after == len(group.examples) * 1.0 == 2.0
        assert group.before > group.after
        assert launch_options(group.kernel, arch="sm_123", width=group.width) == group.best
        assert launch_options(group.kernel, arch="sm_124", width=group.width) == group.present
        assert launch_options(group.kernel, arch="sm_123", width=group.width, dtype=torch.float32) == group.present
        assert launch_options(group.kernel, arch="sm_123", width=group.width + 3072) == group.present
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
        groups, path, _ = run_tune(tmp_path, clock, "bias_gelu")
        assert all((group.best == group.present) is launch_kept for group in groups)
        assert path.exists() is not launch_kept


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
            examples, width = examples_of(module), row_widths(module)[0]
            at_once = [recorded_launches(call) for _, _, call in examples(dtype, width)]
            later = [recorded_launches(call) for call in [call for _, _, call in examples(dtype, width)]]
            assert at_once == later


def test_examples_of_record_launch_what_written_ones_do():
    """A kernel file without ``examples`` gets those of its record: labels, shapes, dtypes, strides and constants."""
    module = tune._modules()["bias_gelu"]
    case = dataclasses.replace(module.CASE, large=lambda num_rows, width: (num_rows, width))
    for dtype in (torch.float32, torch.bfloat16):
        of_record = [(*named, without_values(call)) for *named, call in cases.examples(case, dtype, 768)]
        written = [(*named, without_values(call)) for *named, call in module.examples(dtype, 768)]
        assert of_record == written and len(written) == 4


def without_values(call: Callable[[], object]) -> list:
    """Launches of a call, without the dropout rate, its site and whether a seed is given."""
    return [
        (kernel, [x for x in arguments if isinstance(x, tuple) and x != ((1,), (1,), torch.int64)], constants)
        for kernel, arguments, constants in recorded_launches(call)
    ]


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


# --------------------------------------------------------------------------------------------------- tuned launches


def test_tune_rows_go_before_defaults(tmp_path, tables_with):
    clock = Clock(lambda constants: 2.0 + abs(math.log2(constants["num_warps"] / 16)) + (constants.get("D") == 768))
    groups, path, _ = run_tune(tmp_path, clock)
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=2) + "\n"
    defaults = copy.deepcopy(TABLE)
    after, _ = tables_with(path.parent)
    assert list(after) == list(defaults)
    for kernel, rows in after.items():
        arch_rows = [row for row in rows if row[0] == "sm_123"]
        assert rows == arch_rows + defaults[kernel]
        assert arch_rows == sorted(arch_rows, key=lambda row: (row[2], row[1]))
    assert {group.kernel for group in groups if group.best != group.present} == {
        kernel for kernel, rows in after.items() if any(row[0] == "sm_123" for row in rows)
    }


def test_tune_again_replaces_rows_and_check_writes_nothing(tmp_path):
    _, path, _ = run_tune(tmp_path, Clock(valley(ROWS=16)), "bias_gelu")
    first_text = path.read_text()
    run_tune(tmp_path, Clock(valley(ROWS=16)), "bias_gelu")
    assert path.read_text() == first_text
    run_tune(tmp_path, Clock(valley(ROWS=1)), "bias_gelu")
    changed_text = path.read_text()
    assert changed_text == first_text.replace('"ROWS": 16', '"ROWS": 1') != first_text
    groups, _, _ = run_tune(tmp_path, Clock(valley(ROWS=8)), "bias_gelu", check=True)
    assert path.read_text() == changed_text
    assert all(group.best["ROWS"] == 8 for group in groups)


def test_tune_other_dtype_keeps_rows(tmp_path, tables_with):
    run_tune(tmp_path, Clock(valley(ROWS=16)), "bias_gelu")
    groups, path, _ = run_tune(tmp_path, Clock(valley(ROWS=1)), "bias_gelu", dtype="fp32")
    tables_with(path.parent)
    for group in groups:
        for dtype, rows in ((torch.bfloat16, 16), (torch.float32, 1)):
            assert launch_options(group.kernel, arch="sm_123", width=group.width, dtype=dtype)["ROWS"] == rows


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
    assert set(configs.read_tuned(tmp_path / "sm_123.json")["launches"]) == {"bias_gelu_forward", "bias_gelu_backward"}


def test_tune_unchanged_width_gets_row_if_wider_one_changed(tmp_path, tables_with):
    """Otherwise the row of the wider one would apply to it."""
    clock = Clock(lambda constants: valley(num_warps=16 if constants["D"] == 768 else 4)(constants))
    groups, path, _ = run_tune(tmp_path, clock, "add_layer_norm")
    table, _ = tables_with(path.parent)
    for group in groups:
        changes = group.width == 768 or group.present["num_warps"] != 4
        assert (group.best != group.present) is changes
        assert launch_options(group.kernel, arch="sm_123", width=group.width) == group.best
    assert [row[1] for row in table["add_layer_norm_forward"] if row[0] == "sm_123"] == [384, 768]


def launch_row(max_width: int, max_element_size: int, **launch: int) -> dict:
    return {"max_width": max_width, "max_element_size": max_element_size, "launch": launch}


def measured(kernel: str, width: int, size: int, launch: dict[str, int]) -> Group:
    """A group whose best launch is new."""
    fields = {"op": "x", "dtype": "bf16", "example_width": width, "present": {}, "examples": [0]}
    return Group(kernel=kernel, width=width, size=size, best=launch, **fields)


def test_add_results_sorts_replaces_and_merges_rows():
    old = [launch_row(64, 2, ROWS=2), launch_row(64, 4, ROWS=3)]
    tuned = {"launches": {"x": list(old), "y": list(old)}, "epilogues": {}}
    new = [(128, 2, {"ROWS": 9}), (32, 2, {"ROWS": 5}), (64, 2, {"ROWS": 2}), (16, 2, {"ROWS": 5})]
    groups = [measured("x", width, size, launch) for width, size, launch in new]
    assert tune.add_results(tuned, groups) == ["x"]
    assert tuned["launches"] == {
        "x": [
            launch_row(32, 2, ROWS=5),
            launch_row(64, 2, ROWS=2),
            launch_row(128, 2, ROWS=9),
            launch_row(64, 4, ROWS=3),
        ],
        "y": old,
    }
    tune.add_results(tuned, [measured("y", 64, 2, {"ROWS": 7}), measured("y", 64, 4, {"ROWS": 7})])
    assert tuned["launches"]["y"] == [launch_row(64, 2, ROWS=7), launch_row(64, 4, ROWS=7)]
    before = copy.deepcopy(tuned)
    assert tune.add_results(tuned, []) == [] and tuned == before


ROW = launch_row(64, 2, ROWS=8, num_warps=4)
RATIOS = {"inner": 1, "outputs": 2, "element_size": 2, "product_ratio": 1.0, "product_and_kernel_ratio": 1.5}


def test_read_tuned_missing_file_has_no_rows(tmp_path, tables_with):
    assert configs.read_tuned(tmp_path / "sm_123.json") == {"launches": {}, "epilogues": {}}
    (tmp_path / ".sm_123.partial.json").write_text('{"launches')
    defaults = copy.deepcopy((TABLE, EPILOGUES))
    assert tables_with(tmp_path) == defaults
    assert tables_with(tmp_path / "none") == defaults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"launches": {"masked_mse": [', "Expecting value"),
        ("[]", r"expected an object with launches \(dict\), epilogues \(dict\), got \[\]"),
        ({"launches": {}}, r"expected an object with launches \(dict\), epilogues \(dict\), got {'launches': {}}"),
        ({"launches": {"gone": [ROW]}, "epilogues": {}}, "expected lists of rows by kernel, .* for 'gone'"),
        ({"launches": {"masked_mse": ROW}, "epilogues": {}}, "expected lists of rows by kernel, .* for 'masked_mse'"),
        ({"launches": {"masked_mse": [64]}, "epilogues": {}}, r"object with max_width \(int\), .*, got 64"),
        ({"launches": {"masked_mse": [{**ROW, "max_width": "64"}]}, "epilogues": {}}, r"max_width \(int\), .*'64'"),
        (
            {"launches": {"masked_mse": [launch_row(64, 2, ROWS=8)]}, "epilogues": {}},
            r"expected an object with ROWS \(int\), num_warps \(int\), got {'ROWS': 8}",
        ),
        (
            {"launches": {"masked_mse": [launch_row(64, 2, ROWS=8, num_warps=True)]}, "epilogues": {}},
            r"expected an object with ROWS \(int\), num_warps \(int\), got",
        ),
        ({"launches": {}, "epilogues": {"masked_mse": [RATIOS]}}, "expected lists of rows by kernel, .* 'masked_mse'"),
        (
            {"launches": {}, "epilogues": {"feed_forward_forward": [{**RATIOS, "product_ratio": None}]}},
            r"inner \(int\), .* product_and_kernel_ratio \(float\), got",
        ),
    ],
)
def test_read_tuned_damaged_file_raises(tmp_path, tables_with, text, message):
    path = tmp_path / "sm_123.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    expected = (
        rf"sm_123\.json: expected JSON as mae-ast-fast tune writes it: .*{message}.*Restore the file, or delete it"
    )
    with pytest.raises(ValueError, match=expected):
        tables_with(tmp_path)
    with pytest.raises(ValueError, match=expected):
        run_tune(tmp_path, Clock(lambda constants: pytest.fail("measured first")), "masked_mse")


def test_read_tuned_not_utf8_raises(tmp_path):
    (tmp_path / "sm_123.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"sm_123\.json: expected JSON as mae-ast-fast tune writes it"):
        configs.read_tuned(tmp_path / "sm_123.json")


def test_read_tuned_whole_file_is_returned(tmp_path):
    tuned = {"launches": {"masked_mse": [ROW]}, "epilogues": {"feed_forward_forward": [RATIOS]}}
    (tmp_path / "sm_123.json").write_text(json.dumps(tuned))
    assert configs.read_tuned(tmp_path / "sm_123.json") == tuned


def test_tuned_folder_is_in_this_tree_and_valid():
    assert configs.TUNED.samefile(Path(__file__).parents[2] / "kernels/configs")
    for path in configs.TUNED.glob("*.json"):
        configs.read_tuned(path)


# -------------------------------------------------------------------------------------------------------- epilogues


def product_times(fused: dict[str, float], after: float = 3.0) -> Callable[[dict[str, int]], float]:
    """Milliseconds of a product with its epilogue, by ``fused``, and of the product and kernel (``after``)."""

    def time(constants: dict[str, int]) -> float:
        if "BK" not in constants:
            return after  # product and kernel: only the launch of the kernel is recorded
        return fused["forward" if constants["K"] == 192 else "wider"] * (1.0 if constants["num_stages"] == 4 else 2.0)

    return time


def test_tune_epilogue_is_compared_with_baselines(tmp_path, tables_with):
    clock = Clock(product_times({"forward": 1.0, "wider": 1.25}))
    groups, path, progress = run_tune(tmp_path, clock, "feed_forward")
    assert [(group.kernel, group.width) for group in groups] == [
        (f"feed_forward_{way}", width) for width in (768, 1536, 3072) for way in ("forward", "backward")
    ]
    assert {group.best["num_stages"] for group in groups} == {4}
    for group in groups:
        inner, product_ratio, product_and_kernel_ratio = group.baselines
        assert inner == group.width // 4
        assert (product_ratio, product_and_kernel_ratio) == ((1.0, 3.0) if group.width == 768 else (0.8, 2.4))
    _, epilogues = tables_with(path.parent)
    rows = [
        ("sm_123", 192, 768, 2, 1.0, 3.0),
        ("sm_123", 384, 1536, 2, 0.8, 2.4),
        ("sm_123", 768, 3072, 2, 0.8, 2.4),
    ]
    assert epilogues == {"feed_forward_forward": rows, "feed_forward_backward": rows}
    for kernel in epilogues:

        def epilogue(
            arch: str, inner: int, outputs: int, element_size: int, *, kernel: str = kernel
        ) -> tuple[bool, str]:
            return configs.epilogue(kernel, arch, inner=inner, outputs=outputs, element_size=element_size)

        assert epilogue("sm_123", 192, 768, 2) == (True, "1.00 x the bare product, 3.00 x product and bias_gelu")
        assert epilogue("sm_123", 384, 1536, 2)[0] is False  # 0.8 of the bare product
        assert epilogue("sm_90", 192, 768, 2) == (False, "not measured on sm_90")
        assert epilogue("sm_123", 192, 768, 4) == (False, "not measured on sm_123")
        assert epilogue("sm_123", 192, 384, 2) == (False, "not measured on sm_123")
    choice, reason = configs.epilogues("sm_123")
    assert choice == "on" and reason.count(", off: 0.80 x the bare product") == 4
    assert configs.epilogues("sm_90") == ("off", "GELU inside products is not measured on sm_90")
    verdict = "feed_forward_backward 1536 (2 bytes): 0.800 x the speed of the bare product, 2.400 x product and kernel"
    assert verdict in progress and verdict in to_text(groups).splitlines()


def test_epilogues_slower_than_product_and_kernel_is_off(tmp_path, tables_with):
    _, path, _ = run_tune(tmp_path, Clock(product_times({"forward": 1.0, "wider": 1.0}, after=1.0)), "feed_forward")
    _, epilogues = tables_with(path.parent)
    assert epilogues["feed_forward_forward"][0] == ("sm_123", 192, 768, 2, 1.0, 1.0)
    assert configs.epilogues("sm_123")[0] == "off"


def test_tune_again_replaces_ratios_and_check_writes_nothing(tmp_path):
    _, path, _ = run_tune(tmp_path, Clock(product_times({"forward": 1.0, "wider": 1.0})), "feed_forward")
    first = json.loads(path.read_text())
    slower = Clock(product_times({"forward": 0.5, "wider": 0.5}))
    run_tune(tmp_path, slower, "feed_forward", check=True)
    assert json.loads(path.read_text()) == first
    run_tune(tmp_path, Clock(product_times({"forward": 0.5, "wider": 1.0})), "feed_forward")
    changed = json.loads(path.read_text())
    for rows in first["epilogues"].values():
        assert (rows[0]["inner"], rows[0]["product_ratio"], rows[0]["product_and_kernel_ratio"]) == (192, 1.0, 3.0)
        rows[0] |= {"product_ratio": 2.0, "product_and_kernel_ratio": 6.0}
    assert changed == first


def test_add_results_ratios_are_sorted_and_rounded():
    tuned = {"launches": {}, "epilogues": {"x": [{**RATIOS, "inner": 192}]}}
    groups = [measured("x", 768, 2, {}), measured("x", 384, 2, {})]
    groups[0].baselines, groups[1].baselines = (192, 0.9114, 1.25), (96, 1.0, 2.00049)
    assert tune.add_results(tuned, groups) == ["x"] and not tuned["launches"]
    assert [tuple(row.values()) for row in tuned["epilogues"]["x"]] == [
        (96, 384, 2, 1.0, 2.0),
        (192, 2, 2, 1.0, 1.5),
        (192, 768, 2, 0.911, 1.25),
    ]


# ------------------------------------------------------------------------------------------------------ the command


def test_tune_cli_prints_table_and_exit_code(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "Gpu", lambda: Clock(valley(ROWS=8)))
    monkeypatch.setattr(configs, "TUNED", tmp_path)
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
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tune, "Gpu", lambda: Clock(valley(ROWS=8)))
    assert cli.main(["tune", "--op", "bias_gelu"]) == 0
    assert (
        f"{tmp_path}/sm_123.json: rows of sm_123 for bias_gelu_forward, bias_gelu_backward" in capsys.readouterr().err
    )
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
