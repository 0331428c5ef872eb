"""Files that are written whole or not at all, and a lock between processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def temp_path(path: Path) -> Path:
    """What ``atomic_write`` writes first; one that a killed process left is of no use."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a path beside ``path`` and the same suffix, then moves that file to ``path`` in one step.

    A reader never sees half a file, and what stood there before stays if ``write`` raises. The file gets the mode of
    any new file (safetensors makes its own readable by their owner alone).
    """
    partial = temp_path(path)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """``atomic_write`` of indented JSON."""
    atomic_write(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps this machine's other processes out while it lasts; a killed holder lets go. Without locks: no effect."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to finish with {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def as_text(options: Any, *names: str) -> None:
    """Paths become the strings that a run's JSON keeps."""
    for name in names:
        if getattr(options, name) is not None:
            setattr(options, name, os.fspath(getattr(options, name)))
