"""Choose which clips of a user's data are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .audio import AudioFile


def split(
    entries: Sequence[AudioFile], md5: Sequence[str], fraction: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips of a user's data: whole folders where there are enough, otherwise single files.

    A folder is often a speaker or a session. The groups are the folders (of ``AudioFile.group``; for a cut, the
    recording) of the shallowest level with at least 5 folders. With fewer folders, each file is a group. Groups are
    held out in the order of a hash of their names until ``fraction`` of the clips is reached. A group that would make
    it more than twice ``fraction`` is passed over. Byte-identical files are always on the same side.

    Args:
        entries: (N,) the clips.
        md5: (N,) digest of each clip's file.
        fraction: Share of the clips to hold out, in (0, 1). Default: 0.05.
        seed: Of the hash. Default: 0.

    Returns:
        Indices int64 (train,) and (held-out,), ascending and never empty, and a sentence that describes the split.

    Raises:
        ValueError: Fewer than two different files, or ``fraction`` outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    first_name: dict[str, str] = {}  # digest -> name
    file_groups = [first_name.setdefault(digest, entry.name) for digest, entry in zip(md5, entries, strict=True)]
    if len(first_name) < 2:
        raise ValueError(
            "expected at least two different files, one of them held out, got one: add files, or cut it into several"
        )
    folders = [entry.group.split("/") if entry.group else [] for entry in entries]
    held_out, description = _choose_groups(file_groups, fraction, seed), "single files, by a hash of their names"
    for level in range(1, max(map(len, folders)) + 1):
        groups = ["/".join(folder[:level]) for folder in folders]
        if len(set(groups)) >= 5:
            chosen = _choose_groups(groups, fraction, seed)
            train_md5 = {digest for digest, is_chosen in zip(md5, chosen, strict=True) if not is_chosen}
            chosen &= np.array([digest not in train_md5 for digest in md5])
            if chosen.any():
                held_out, description = chosen, f"whole folders of {len(set(groups))} at level {level}"
            break
    summary = f"held out: {held_out.sum()} of {held_out.size} clips, {description}"
    return np.flatnonzero(~held_out), np.flatnonzero(held_out), summary


def _choose_groups(groups: list[str], fraction: float, seed: int) -> np.ndarray:
    """bool (N,): members of the chosen groups. At least one group is chosen, and never all of several."""
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    chosen, num_chosen, target = [], 0, fraction * len(groups)
    for group in order:
        if num_chosen < target and num_chosen + sizes[group] <= min(2 * target, len(groups) - 1):
            chosen.append(group)
            num_chosen += sizes[group]
    return np.isin(groups, chosen or [min(order, key=sizes.__getitem__)])
