"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def partial_of(path: Path) -> Path:
    """What ``write_whole`` writes first; one that a killed process left is of no use."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a path beside ``path`` and the same suffix, then moves that file to ``path`` in one step.

    A reader never sees half a file, and what stood there before stays if ``write`` raises. The file gets the mode of
    any new file (safetensors makes its own readable by their owner alone).
    """
    partial = partial_of(path)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """``write_whole`` of indented JSON."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))
