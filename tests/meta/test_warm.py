"""Commands in forked processes (tests/common/warm.py) behave as in new interpreters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import Command

FACTS = """
import json, multiprocessing, os, random, signal, sys, threading
import numpy as np
import torch

facts = {
    "argv": sys.argv,
    "name": __name__,
    "path": sys.path,
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "start method": multiprocessing.get_context().get_start_method(),
    "threads": [threading.active_count(), len(os.listdir("/proc/self/task")), torch.get_num_threads()],
    "dtype": str(torch.get_default_dtype()),
    "package": "mae_ast_fast" in sys.modules,
    "children": [child.pid for child in multiprocessing.active_children()],
}
print(json.dumps(facts))
print(json.dumps([random.random(), np.random.rand(), torch.initial_seed()]), file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("form", ["script", "module", "program"])
def test_command_process_equals_new_interpreter(tmp_path: Path, form: str) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    start = {"script": [str(tmp_path / "facts.py")], "module": ["-m", "facts"], "program": ["-c", FACTS]}[form]
    line = [*start, "--one", "two words"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "/nowhere", "MARK": "1"}
    new = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    numbers = [json.loads(new.stderr)]
    for _ in range(2):
        forked = Command(line, tmp_path / "stdout", tmp_path / "stderr", env=environment, cwd=tmp_path)
        assert forked.wait(timeout=60) == new.returncode == 7
        facts = json.loads((tmp_path / "stdout").read_text())
        assert facts == json.loads(new.stdout)
        numbers.append(json.loads((tmp_path / "stderr").read_text()))
    assert len({number for drawn in numbers for number in drawn}) == 9, (
        "unseeded numbers differ from process to process"
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_command_ended_by_signal_returns_it(tmp_path: Path, number: int) -> None:
    program = "import atexit, time; atexit.register(print, 'atexit'); print('on', flush=True); time.sleep(60)"
    process = Command(["-c", program], tmp_path / "log")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != "on\n":
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == process.returncode == -number
    assert (tmp_path / "log").read_text() == "on\n"
    process.send_signal(number)  # does nothing


@pytest.mark.parametrize(
    ("statement", "code", "words"),
    [
        ("print('done')", 0, ["done", "atexit"]),
        ("raise SystemExit('a reason')", 1, ["a reason", "atexit"]),
        ("raise ValueError('a reason')", 1, ["ValueError: a reason", "atexit"]),
        ("import os; os._exit(3)", 3, []),
    ],
)
def test_command_end_gives_exit_code_and_output(tmp_path: Path, statement: str, code: int, words: list[str]) -> None:
    process = Command(["-c", f"import atexit; atexit.register(print, 'atexit')\n{statement}"], tmp_path / "log")
    assert process.wait(timeout=60) == code
    lines = (tmp_path / "log").read_text().splitlines()
    assert [word for word in ("done", "a reason", "ValueError: a reason", "atexit") if word in lines] == words
