"""Train and held-out clips of a user's data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .audio import AudioFile


def split(
    entries: Sequence[AudioFile], md5: Sequence[str], fraction: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips of a user's data: whole folders where there are enough, else files.

    The shallowest folder level (of ``AudioFile.group``; of a cut it is the recording) with at least 5 folders gives the
    groups, since a folder is often a speaker or a session; with fewer, every file is its own. Groups are taken in the
    order of a hash of their names until ``fraction`` of the clips is held out; one that would make it more than twice
    that is passed over. Byte-identical files are never on both sides.

    Args:
        entries: (N,) the clips.
        md5: (N,) digest of each clip's file.
        fraction: Of the clips, to hold out.
        seed: Of the hash.

    Returns:
        Indices int64 (train,) and (held-out,), ascending and never empty, and a sentence that says how.

    Raises:
        ValueError: Fewer than two different files, or ``fraction`` outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    first: dict[str, str] = {}
    by_file = [first.setdefault(digest, entry.name) for digest, entry in zip(md5, entries, strict=True)]
    if len(first) < 2:
        raise ValueError(
            "holding clips out takes at least two different files, got one: add some, or cut it into several"
        )
    folders = [entry.group.split("/") if entry.group else [] for entry in entries]
    held, how = _choose(by_file, fraction, seed), "single files, by a hash of their names"
    for level in range(1, max(map(len, folders)) + 1):
        groups = ["/".join(folder[:level]) for folder in folders]
        if len(set(groups)) >= 5:
            chosen = _choose(groups, fraction, seed)
            trained = {digest for digest, out in zip(md5, chosen, strict=True) if not out}
            chosen &= np.array([digest not in trained for digest in md5])
            if chosen.any():
                held, how = chosen, f"whole folders of {len(set(groups))} at level {level}"
            break
    return np.flatnonzero(~held), np.flatnonzero(held), f"held out: {held.sum()} of {held.size} clips, {how}"


def _choose(groups: list[str], fraction: float, seed: int) -> np.ndarray:
    """bool (N,): members of the chosen groups; at least one group, never all of several."""
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    chosen, held, target = [], 0, fraction * len(groups)
    for group in order:
        if held < target and held + sizes[group] <= min(2 * target, len(groups) - 1):
            chosen.append(group)
            held += sizes[group]
    return np.isin(groups, chosen or [min(order, key=sizes.__getitem__)])
