import pytest

from mae_ast_fast.cli import threads

BEFORE = "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 100 0 50 800 50 0 0 0 0 0\n"


@pytest.fixture
def stat(tmp_path, monkeypatch):
    """A /proc/stat of four cores that changes, while ``idle_cores`` sleeps, to what ``after`` holds."""
    path = tmp_path / "stat"
    path.write_text(BEFORE)
    after = {}
    monkeypatch.setattr(threads, "STAT", path)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: path.write_text(f"cpu  {after['ticks']} 0 0\n"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that the value is restored afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    return after


@pytest.mark.parametrize(
    "ticks, idle, policy",
    [
        ("100 0 50 840 50 0 0 0", 4.0, None),
        ("100 0 50 820 70 0 0 0", 4.0, None),  # waiting for a disk
        ("104 0 50 836 50 0 0 0", 3.6, None),
        ("100 0 60 830 50 0 0 0", 3.0, "PASSIVE"),
        ("100 20 50 800 50 5 5 10", 0.0, "PASSIVE"),  # low priority, interrupts, another virtual machine
        ("100 0 50 800 50 0 0 0", 0.0, "PASSIVE"),  # a clock that stood still
    ],
)
def test_set_wait_policy_sleeps_where_other_programs_need_the_cores(ticks, idle, policy, stat):
    stat["ticks"] = ticks
    assert threads.idle_cores() == pytest.approx(idle)
    threads.STAT.write_text(BEFORE)
    threads.set_wait_policy()
    assert threads.os.environ.get("OMP_WAIT_POLICY") == policy


def test_set_wait_policy_with_fewer_threads_than_idle_cores_lets_them_spin(stat, monkeypatch):
    stat["ticks"] = "110 0 50 830 50 0 0 0"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads.set_wait_policy()
    assert "OMP_WAIT_POLICY" not in threads.os.environ


def test_set_wait_policy_keeps_a_value_that_is_set(stat, monkeypatch):
    stat["ticks"] = "140 0 50 800 50 0 0 0"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    threads.set_wait_policy()
    assert threads.os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_idle_cores_without_proc_counts_all(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "none")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    assert threads.idle_cores() == 4


@pytest.mark.parametrize("value", ["", "0", "two"])
def test_num_threads_without_a_number_counts_usable_cores(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert threads.num_threads() == 3
