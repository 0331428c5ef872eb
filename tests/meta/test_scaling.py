"""The simulation of data-parallel steps, and the tables of docs/scaling.md."""

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
INSTANT_LINK = Link(hop=0.0, rate=float("inf"))


def is_close(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= ROUNDING * abs(expected)


def test_page_matches_committed_results() -> None:
    text = scaling_tables.PAGE.read_text()
    assert scaling_tables.render(text) == text, "run python benchmarks/studies/scaling_tables.py"


def test_page_without_gpu_result_states_it() -> None:
    beginning = scaling_tables.PAGE.read_text()[:400]
    measured = list(scaling.RESULTS.glob("gpu_*_bench_step.json"))
    assert measured or "No GPU has run this library yet" in beginning


def test_render_replaces_edited_number(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """An empty folder that replaces benchmarks/results."""
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling_tables, "RESULTS", tmp_path)
    scaling_tables.base.cache_clear()
    yield tmp_path
    scaling_tables.base.cache_clear()


def test_base_uses_gpu_result_instead_of_assumption(results: Path) -> None:
    stages = [{"forward": 0.02, "update": 0.08}]
    column = {"clips": 256, "flops": 256 * 10**11, "seconds": [0.2, 0.1, 0.1], "stages": stages}
    case = {"param": "patch_base", "extra_info": {"columns": {"fast bf16": column}}}
    step_result = {"machine_info": {"processor": "NVIDIA X"}, "benchmarks": [case]}
    (results / "step_cpu.json").write_text(json.dumps(step_result))
    assumed = scaling_tables.base()
    assert "assumed" in assumed.source
    assert is_close(assumed.clips, 0.25 * 989.4e12 / 1e11)
    scaling_tables.base.cache_clear()
    (results / "gpu_sm_90_abc_bench_step.json").write_text(json.dumps(step_result))
    measured = scaling_tables.base()
    assert "measured on NVIDIA X" in measured.source
    assert is_close(measured.clips, 2560.0)
    assert is_close(measured.forward, 0.2)


@pytest.mark.parametrize("benchmarks", [[], [{"param": "patch_base", "extra_info": {"columns": {}}}]])
def test_base_skips_gpu_result_without_fast_column(results: Path, benchmarks: list[dict]) -> None:
    column = {"clips": 256, "flops": 256 * 10**11, "seconds": [0.1], "stages": [{"forward": 0.02, "update": 0.08}]}
    case = {"param": "patch_base", "extra_info": {"columns": {"fast bf16": column}}}
    (results / "step_cpu.json").write_text(json.dumps({"benchmarks": [case]}))
    (results / "gpu_sm_90_abc_bench_step.json").write_text(json.dumps({"benchmarks": benchmarks}))
    assert "assumed" in scaling_tables.base().source


def test_buckets_match_ddp() -> None:
    mib = scaling.MIB
    assert scaling.buckets(60 * mib) == (mib, 25 * mib, 25 * mib, 9 * mib)
    assert scaling.buckets(26 * mib) == (mib, 25 * mib)
    assert scaling.buckets(1000) == (1000,)


def test_all_reduce_seconds_sums_latency_and_bytes() -> None:
    assert scaling.all_reduce_seconds(MB, 1, Link(1.0, 1.0)) == 0.0
    assert is_close(scaling.all_reduce_seconds(MB, 4, Link(0.25, MB)), 6 * 0.25 + 1.5)
    assert is_close(scaling.all_reduce_seconds(MB, 8, Link(0.25, MB, tree=True)), 6 * 0.25 + 1.75)


def test_simulate_one_rank_only_computes() -> None:
    assert is_close(simulate(Step(1.0, 2.0, 0.5, (MB,)), 1, Link(9.0, 1.0)), 3.5)


def test_simulate_overlaps_transfers_with_backward() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.0, buckets=(MB, MB))
    # The first bucket is full in the middle of the backward, the second at its end: only the second adds time.
    assert is_close(simulate(step, 2, Link(0.0, 10 * MB)), 3.0 + 0.1)
    # A transfer of 1.5 s is longer than the half backward between them: the second waits for the first.
    assert is_close(simulate(step, 2, Link(0.0, MB / 1.5)), 2.0 + 1.5 + 1.5)
    assert is_close(simulate(step, 2, INSTANT_LINK), 3.0)


def test_simulate_shared_processor_ranks_take_turns() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.5, buckets=(MB,))
    assert is_close(simulate(step, 4, INSTANT_LINK, processors=2), 7.0)
    assert is_close(simulate(step, 4, INSTANT_LINK, processors=4), 3.5)
    # 3 / 2 MB per rank at half the rate, because two ranks share a processor that moves the bytes.
    assert is_close(simulate(step, 4, Link(0.0, MB, stolen=1.0), processors=2), 7.0 + 2 * 1.5)


def test_simulate_spread_waits_for_slowest_rank() -> None:
    step = Step(forward=1.0, backward=2.0, update=0.0, buckets=(MB,), spread=0.1)
    one_rank, few, many = (simulate(step, ranks, INSTANT_LINK) for ranks in (1, 8, 512))
    assert 1.05 * one_rank < few < many < 1.5 * one_rank


def make_round(**samples: list[list[float]]) -> dict:
    return {"parameters": MB, "samples": {name.replace("_", " "): seconds for name, seconds in samples.items()}}


def test_fit_recovers_parameters_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(hop=1e-3, rate=1e9)
    transfers = {
        f"all-reduce {size}": [[scaling.all_reduce_seconds(size, 2, link)] * 3] * 2 for size in scaling.TRANSFERS
    }
    truth = {"alone": 0.2, "contention": 1.25, "spread": 0.0, "hop": 1e-3, "rate": 1e9, "stolen": 1.5, "parameters": MB}
    alone_round = make_round(alone=[[0.2, 0.2, 0.2]])
    pair_round = make_round(alone=[[0.25] * 3] * 2, together=[[scaling.predict(truth, 2, 2)] * 3] * 2)
    pair_round["samples"] |= transfers
    fitted = scaling.fit({"p": {"1": [alone_round], "2": [pair_round]}})["p"]
    assert [name for name, value in truth.items() if not is_close(fitted[name], value)] == []
    assert is_close(fitted["simulated"], fitted["together"])
    # 4 on 2 cores: twice the computing, three times the byte time and six times the latency of 2 (4 MB of gradients).
    transfer = sum(scaling.all_reduce_seconds(size, 4, link) for size in scaling.buckets(4 * MB))
    assert is_close(scaling.predict(fitted, 4, 2), 2 * (0.25 + 1.5 * transfer))


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 0), (0.41, 0), (0.39, 1), (0.8, 1)])
def test_run_measure_wrong_prediction_fails(
    results: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, code: int
) -> None:
    with pytest.raises(ValueError, match="run --fit first"):
        scaling.run_measure()
    predicted = {"seconds": dict.fromkeys(scaling.POINTS, 0.5)}
    (results / "scaling_prediction.json").write_text(json.dumps(predicted))
    monkeypatch.setattr(scaling, "circumstances", dict)
    monkeypatch.setattr(scaling, "measure_round", lambda *_: make_round(together=[[seconds / 2, seconds]] * 4))
    monkeypatch.setattr(scaling, "median_of_slowest", lambda rounds, name: seconds)
    assert scaling.run_measure() == code
    errors = json.loads((results / "scaling_measured.json").read_text())["errors"]
    assert all(is_close(values["error"], 0.5 / seconds - 1.0) or seconds == 0.5 for values in errors.values())


def test_median_of_slowest_uses_slowest_rank() -> None:
    rounds = [make_round(together=[[1.0, 2.0, 3.0], [2.0, 1.0, 1.0]]), make_round(together=[[4.0, 4.0, 9.0]] * 2)]
    assert scaling.median_of_slowest(rounds, "together") == 3.0  # of 2 (2, 2, 3) and 4


@pytest.mark.long
def test_run_rank_two_processes_write_samples(tmp_path: Path) -> None:
    target = tmp_path / "samples.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [scaling.__file__, "--rank-of", "patch_tiny", "1", str(target)]
    subprocess.run([sys.executable, *launcher, *arguments], check=True, timeout=200)
    samples = json.loads(target.read_text())
    assert samples["parameters"] > MB
    names = {"alone", "together", *(f"all-reduce {size}" for size in scaling.TRANSFERS)}
    assert set(samples["samples"]) == names
    assert all(
        len(ranks) == 2 and all(len(steps) == scaling.STEPS for steps in ranks) for ranks in samples["samples"].values()
    )
