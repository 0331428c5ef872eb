"""Atomic writes of files, reads of JSON, and a lock between processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def temp_path(path: Path) -> Path:
    """The file that ``atomic_write`` writes first. If a killed process left one, it can be deleted."""
    name = f".{path.stem}.partial{path.suffix}"
    if len(os.fsencode(name)) > 255:  # more than file systems take
        digest = hashlib.md5(os.fsencode(path.name), usedforsecurity=False).hexdigest()
        name = f".{digest}.partial{path.suffix}"
    return path.with_name(name)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a path in the folder of ``path`` and with its suffix, then move that file to ``path``.

    A reader never sees an incomplete file, and an existing file stays if ``write`` raises. The file gets the mode of
    any new file (safetensors makes its own readable by their owner alone).
    """
    temp = temp_path(path)
    temp.touch()
    mode = temp.stat().st_mode
    try:
        write(temp)
        temp.chmod(mode)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON by ``atomic_write``."""
    atomic_write(path, lambda temp: temp.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is not JSON, is nested too deeply, or holds another value than an object.
        OSError: The file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    return content


def check_out_folder(path: Path) -> None:
    """Refuse an output folder that cannot be made.

    Raises:
        ValueError: ``path``, or a folder above it, is a file.
    """
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(f"--out must be a folder, got the file {nearest}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep this machine's other processes out until the context ends, and wait for one that is inside.

    The lock of a killed process is void. On Windows and on file systems without locks, this has no effect.

    Args:
        path: Lock file.
    """
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to finish with {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def paths_as_text(options: Any, *names: str) -> None:
    """Convert attributes of ``options`` from paths to strings, as in a run's JSON; None stays."""
    for name in names:
        if getattr(options, name) is not None:
            setattr(options, name, os.fspath(getattr(options, name)))
