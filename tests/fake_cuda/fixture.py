"""The fixture ``fake_cuda``: runs a script on the fake GPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from . import build

Run = Callable[..., dict[str, Any]]
SECONDS = 240  # of a script: below pytest's limit of a test


@pytest.fixture(scope="session")
def fake_cuda_environment() -> dict[str, str]:
    """Environment of processes on the fake GPU. Skips where there can be none, and fails in CI."""
    return environment_or_skip()


def environment_or_skip() -> dict[str, str]:
    """See ``fake_cuda_environment``."""
    try:
        return build.environment(build.library())
    except build.CannotRun as reason:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"the fake GPU does not run here: {reason}")


@pytest.fixture(scope="session")
def fake_cuda(fake_cuda_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python source on the fake GPU and returns what it gave to ``measure.report``.

    ``fake_cuda(source, *arguments)``: arguments are the script's ``sys.argv[1:]``. The test fails with the script's
    output where the script does not end well.
    """

    def run(source: str, *arguments: str) -> dict[str, Any]:
        script = tmp_path_factory.mktemp("fake_cuda") / "script.py"
        script.write_text(source)
        done = subprocess.run(
            build.command(str(script), *arguments),
            env=fake_cuda_environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"exit status {done.returncode} on the fake GPU\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return run
