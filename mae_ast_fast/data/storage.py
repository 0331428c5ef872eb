"""Files on a disk or behind a URL, through fsspec."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

_MAX_LINE_BYTES = 1 << 24  # of a manifest


def file_system(source: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL; (None, absolute path) of a local path.

    Raises:
        ValueError: fsspec does not know the protocol, or a library for it is missing.
    """
    if "://" not in source:
        return None, os.path.abspath(os.path.expanduser(source))
    import fsspec

    try:
        return fsspec.core.url_to_fs(source)
    except ImportError as error:  # its message says what to install
        raise ValueError(f"{source}: {error}") from error


def list_files(fs: Any, root: str) -> dict[str, int]:
    """File name -> size in bytes of the files in a folder. A server may report None as the size."""
    if fs is None:
        with os.scandir(root) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    return {item["name"].rstrip("/").rpartition("/")[2]: item.get("size") for item in fs.ls(root, detail=True)}


def json_lines(path: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file or URL, decompressed if its name ends in ``.gz``."""
    fs, name = file_system(path)
    with open(name, "rb") if fs is None else fs.open(name, "rb") as file:
        lines = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        while line := lines.readline(_MAX_LINE_BYTES):
            yield json.loads(line)
