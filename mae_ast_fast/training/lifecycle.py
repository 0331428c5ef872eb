"""What every long run needs: a folder of its own, and an end between two updates when a signal comes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS, TASK_OPTIONS = "options.json", "task_options.json"  # in folders of pretraining; of probes and fine-tuning


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run was saved, if ``path`` is not None, and can go on."""

    def __init__(self, number: int, path: Path | None) -> None:
        saved = "nothing could be saved" if path is None else f"saved {path}, the same command goes on from there"
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")
        self.exit_code = 128 + number


class GracefulShutdown:
    """Takes note of SIGTERM and SIGINT; the loop ends the update that runs, saves and stops.

    A second Ctrl-C kills. A second SIGTERM does not: Slurm and torchrun both tell every process. Outside the main
    thread, where Python lets nobody handle signals, none is noted.
    """

    def __enter__(self) -> GracefulShutdown:
        self.received: int | None = None
        own = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._note) for number in own}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Keeps other processes' runs out of the folder while it lasts; a killed holder lets go.

    Raises:
        ValueError: A run is going on there.
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
                pass  # a file system without locks
        yield
