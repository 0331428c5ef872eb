"""The fixture ``fake_cuda``, which runs a script on the fake GPU in a new process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from . import build

Run = Callable[..., dict[str, Any]]
SECONDS = 240  # time limit of a script, below pytest's limit for a test


@pytest.fixture(scope="session")
def fake_cuda_environment() -> dict[str, str]:
    """Environment of processes on the fake GPU. If it is not available, the test is skipped; in CI it fails."""
    return environment_or_skip()


def environment_or_skip() -> dict[str, str]:
    """See ``fake_cuda_environment``."""
    try:
        return build.environment(build.library())
    except build.CannotRun as reason:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"the fake GPU is not available: {reason}")


@pytest.fixture(scope="session")
def fake_cuda(fake_cuda_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python source on the fake GPU; returns the values that it passed to ``measure.report``.

    Call ``fake_cuda(source, *arguments)``; the arguments become the script's ``sys.argv[1:]``. If the script fails, the
    test fails with the script's output.
    """

    def run(source: str, *arguments: str) -> dict[str, Any]:
        script = tmp_path_factory.mktemp("fake_cuda") / "script.py"
        script.write_text(source)
        process = subprocess.run(
            build.script_command(str(script), *arguments),
            env=fake_cuda_environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if process.returncode:
            pytest.fail(
                f"exit status {process.returncode} on the fake GPU\n{process.stdout[-4000:]}\n{process.stderr[-8000:]}"
            )
        return json.loads(process.stdout.splitlines()[-1])

    return run
