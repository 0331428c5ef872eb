"""The simulation of data-parallel steps, and the tables that docs/scaling.md makes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from policy import ROUNDING

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
import scaling  # noqa: E402
import scaling_tables  # noqa: E402
from scaling import Link, Step, simulate  # noqa: E402

MB = 10**6
NOWHERE = Link(hop=0.0, rate=float("inf"))


def near(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= ROUNDING * abs(expected)


def test_the_tables_are_generated() -> None:
    text = scaling_tables.PAGE.read_text()
    assert scaling_tables.render(text) == text, "run python benchmarks/studies/scaling_tables.py"


def test_the_page_says_what_was_not_measured() -> None:
    beginning = scaling_tables.PAGE.read_text()[:400]
    measured = list(scaling.RESULTS.glob("gpu_*_bench_step.json"))
    assert measured or "No GPU has run this library yet" in beginning


def test_a_typed_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_tables, "TABLES", {"model": scaling_tables.model_table})
    text = scaling_tables.PAGE.read_text()
    begin = text.index("<!-- scaling:model -->")
    digit = next(i for i in range(begin, len(text)) if text[i].isdigit())
    typed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert scaling_tables.render(typed) == text != typed
    with pytest.raises(ValueError, match="no place for the table 'model'"):
        scaling_tables.render("")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of benchmarks/results."""
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling_tables, "RESULTS", tmp_path)
    scaling_tables.base.cache_clear()
    yield tmp_path
    scaling_tables.base.cache_clear()


def test_a_gpu_result_takes_the_place_of_the_assumption(results: Path) -> None:
    stages = [{"forward": 0.02, "update": 0.08}]
    column = {"clips": 256, "flops": 256 * 10**11, "seconds": [0.2, 0.1, 0.1], "stages": stages}
    case = {"param": "patch_base", "extra_info": {"columns": {"fast bf16": column}}}
    told = {"machine_info": {"processor": "NVIDIA X"}, "benchmarks": [case]}
    (results / "step_cpu.json").write_text(json.dumps(told))
    assumed = scaling_tables.base()
    assert "assumed" in assumed.source
    assert near(assumed.clips, 0.25 * 989.4e12 / 1e11)
    scaling_tables.base.cache_clear()
    (results / "gpu_sm_90_abc_bench_step.json").write_text(json.dumps(told))
    measured = scaling_tables.base()
    assert "measured on NVIDIA X" in measured.source
    assert near(measured.clips, 2560.0)
    assert near(measured.forward, 0.2)


@pytest.mark.parametrize("benchmarks", [[], [{"param": "patch_base", "extra_info": {"columns": {}}}]])
def test_base_skips_gpu_result_without_fast_column(results: Path, benchmarks: list[dict]) -> None:
    column = {"clips": 256, "flops": 256 * 10**11, "seconds": [0.1], "stages": [{"forward": 0.02, "update": 0.08}]}
    case = {"param": "patch_base", "extra_info": {"columns": {"fast bf16": column}}}
    (results / "step_cpu.json").write_text(json.dumps({"benchmarks": [case]}))
    (results / "gpu_sm_90_abc_bench_step.json").write_text(json.dumps({"benchmarks": benchmarks}))
    assert "assumed" in scaling_tables.base().source


def test_buckets_are_those_of_ddp() -> None:
    mib = scaling.MIB
    assert scaling.buckets(60 * mib) == (mib, 25 * mib, 25 * mib, 9 * mib)
    assert scaling.buckets(26 * mib) == (mib, 25 * mib)
    assert scaling.buckets(1000) == (1000,)


def test_an_all_reduce_is_latency_and_bytes() -> None:
    assert scaling.all_reduce_seconds(MB, 1, Link(1.0, 1.0)) == 0.0
    assert near(scaling.all_reduce_seconds(MB, 4, Link(0.25, MB)), 6 * 0.25 + 1.5)
    assert near(scaling.all_reduce_seconds(MB, 8, Link(0.25, MB, tree=True)), 6 * 0.25 + 1.75)


def test_one_rank_only_computes() -> None:
    assert near(simulate(Step(1.0, 2.0, 0.5, (MB,)), 1, Link(9.0, 1.0)), 3.5)


def test_transfers_hide_behind_the_backward_until_they_do_not() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.0, buckets=(MB, MB))
    # The first bucket is full in the middle of the backward, the second at its end: only that one shows.
    assert near(simulate(step, 2, Link(0.0, 10 * MB)), 3.0 + 0.1)
    # A transfer of 1.5 s is longer than the half backward between them: the second waits for the first.
    assert near(simulate(step, 2, Link(0.0, MB / 1.5)), 2.0 + 1.5 + 1.5)
    assert near(simulate(step, 2, NOWHERE), 3.0)


def test_ranks_on_one_processor_take_turns() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.5, buckets=(MB,))
    assert near(simulate(step, 4, NOWHERE, processors=2), 7.0)
    assert near(simulate(step, 4, NOWHERE, processors=4), 3.5)
    # 3 / 2 MB a rank, and half as fast, since two share what moves them.
    assert near(simulate(step, 4, Link(0.0, MB, stolen=1.0), processors=2), 7.0 + 2 * 1.5)


def test_a_step_waits_for_the_slowest_rank() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.0, buckets=(MB,), spread=0.1)
    one, few, many = (simulate(step, ranks, NOWHERE) for ranks in (1, 8, 512))
    assert 1.05 * one < few < many < 1.5 * one


def a_round(**samples: list[list[float]]) -> dict:
    return {"parameters": MB, "samples": {name.replace("_", " "): told for name, told in samples.items()}}


def test_the_fit_finds_what_the_samples_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(hop=1e-3, rate=1e9)
    transfers = {
        f"all-reduce {size}": [[scaling.all_reduce_seconds(size, 2, link)] * 3] * 2 for size in scaling.TRANSFERS
    }
    truth = {"alone": 0.2, "contention": 1.25, "spread": 0.0, "hop": 1e-3, "rate": 1e9, "stolen": 1.5, "parameters": MB}
    one = a_round(alone=[[0.2, 0.2, 0.2]])
    two = a_round(alone=[[0.25] * 3] * 2, together=[[scaling.predict(truth, 2, 2)] * 3] * 2)
    two["samples"] |= transfers
    found = scaling.fit({"p": {"1": [one], "2": [two]}})["p"]
    assert [name for name, value in truth.items() if not near(found[name], value)] == []
    assert near(found["simulated"], found["together"])
    # 4 on 2 cores: twice the computing, three times the bytes' time of 2, six times the latencies' (4 MB of gradients).
    transfer = sum(scaling.all_reduce_seconds(size, 4, link) for size in scaling.buckets(4 * MB))
    assert near(scaling.predict(found, 4, 2), 2 * (0.25 + 1.5 * transfer))


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 0), (0.41, 0), (0.39, 1), (0.8, 1)])
def test_a_prediction_that_is_off_fails(
    results: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, code: int
) -> None:
    with pytest.raises(ValueError, match="run --fit first"):
        scaling.run_measure()
    predicted = {"seconds": dict.fromkeys(scaling.POINTS, 0.5)}
    (results / "scaling_prediction.json").write_text(json.dumps(predicted))
    monkeypatch.setattr(scaling, "circumstances", dict)
    monkeypatch.setattr(scaling, "measure_round", lambda *_: a_round(together=[[seconds / 2, seconds]] * 4))
    monkeypatch.setattr(scaling, "middle", lambda rounds, name: seconds)
    assert scaling.run_measure() == code
    told = json.loads((results / "scaling_measured.json").read_text())["errors"]
    assert all(near(values["error"], 0.5 / seconds - 1.0) or seconds == 0.5 for values in told.values())


def test_a_step_is_that_of_its_slowest_rank() -> None:
    rounds = [a_round(together=[[1.0, 2.0, 3.0], [2.0, 1.0, 1.0]]), a_round(together=[[4.0, 4.0, 9.0]] * 2)]
    assert scaling.middle(rounds, "together") == 3.0  # of 2 (2, 2, 3) and 4


@pytest.mark.long
def test_processes_are_measured_for_real(tmp_path: Path) -> None:
    target = tmp_path / "told.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [scaling.__file__, "--rank-of", "patch_tiny", "1", str(target)]
    subprocess.run([sys.executable, *launcher, *words], check=True, timeout=200)
    told = json.loads(target.read_text())
    assert told["parameters"] > MB
    names = {"alone", "together", *(f"all-reduce {size}" for size in scaling.TRANSFERS)}
    assert set(told["samples"]) == names
    assert all(
        len(ranks) == 2 and all(len(each) == scaling.STEPS for each in ranks) for ranks in told["samples"].values()
    )
