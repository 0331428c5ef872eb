"""Run folders that one process uses at a time, and runs that stop between two updates when a signal comes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS, TASK_OPTIONS = "options.json", "task_options.json"  # in folders of pretraining; of probes and fine-tuning


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; if ``path`` is not None, the run was saved there and can be resumed.

    Args:
        signal_number: Number of the signal.
        path: Saved file or folder. None: nothing could be saved.
    """

    def __init__(self, signal_number: int, path: Path | None) -> None:
        saved = "nothing could be saved" if path is None else f"saved {path}, the same command resumes from there"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {saved}")
        self.exit_code = 128 + signal_number


class GracefulShutdown:
    """Records SIGTERM and SIGINT, so that the loop can finish its update, save and stop.

    A second Ctrl-C kills. A second SIGTERM does not, because Slurm and torchrun both signal every process. Outside the
    main thread, where Python allows no signal handlers, no signal is recorded.

    Attributes:
        received: Number of the signal that came; None: none came.
    """

    def __enter__(self) -> GracefulShutdown:
        self.received: int | None = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
        self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def _record(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Keep other processes' runs out of a folder, which is created if missing. The lock of a killed process is void.

    Args:
        run: Run folder.

    Raises:
        ValueError: Another process runs there.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the loader's processes would inherit it
            except (BlockingIOError, PermissionError):
                raise ValueError(f"a run is going on in {run}: wait for it, stop it, or use another --out") from None
            except OSError:
                pass  # the file system has no locks
        yield
