"""Files on a disk or behind a URL, through fsspec."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

_LINE = 1 << 24  # bytes of a manifest's line at most


def file_system(source: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL; (None, path) of a local path.

    Raises:
        ValueError: fsspec does not know the protocol, or lacks what it needs for it.
    """
    if "://" not in source:
        return None, os.path.abspath(os.path.expanduser(source))
    import fsspec

    try:
        return fsspec.core.url_to_fs(source)
    except ImportError as error:  # it says what to install
        raise ValueError(f"{source}: {error}") from error


def list_files(fs: Any, root: str) -> dict[str, int]:
    """Names in a folder -> sizes in bytes (None where a server does not tell)."""
    if fs is None:
        with os.scandir(root) as found:
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
    found = fs.ls(root, detail=True)
    return {item["name"].rstrip("/").rpartition("/")[2]: item.get("size") for item in found}


def json_lines(path: str) -> Iterator[dict[str, Any]]:
    fs, name = file_system(path)
    with open(name, "rb") if fs is None else fs.open(name, "rb") as file:
        lines = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        while line := lines.readline(_LINE):
            yield json.loads(line)
