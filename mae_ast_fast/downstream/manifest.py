"""Labelled audio to classify: the manifest that names it, what is trained and tested on, and its waveforms.

A manifest is a table with a header, ``.tsv`` or ``.csv``, UTF-8, a clip a row: ``path`` (relative to the manifest's
folder, else to ``root``), ``label`` (``;`` between several), and ``split`` (train, valid, test), ``fold``, or both;
``start`` and ``end`` in seconds where a clip is part of a file. A frame-level one has ``phones`` in place of ``label``:
``END:PHONE`` of each stretch of the recording, in seconds, the next beginning where the last ends.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_VALID_SHARE = 0.15  # of the training clips, where a manifest names none to choose by
_LEAST_PHONES = 20  # phones that occur less often are left out


@dataclass(frozen=True)
class Clip:
    """A row of a manifest: ``name`` is its path as written, ``path`` where that is, ``end`` 0 the end of the file."""

    path: str
    name: str
    labels: tuple[str, ...]
    split: str = ""
    fold: str = ""
    start: float = 0.0
    end: float = 0.0
    phones: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Fold:
    """One training: indices of the clips to learn from, to choose by, and to test on; ``name`` is the tested fold's."""

    name: str
    train: list[int]
    valid: list[int]
    test: list[int]

    @property
    def where(self) -> str:
        """For messages."""
        return f"fold {self.name}" if self.name else "the split"


@dataclass
class Task:
    """A manifest that was read.

    Attributes:
        name: Of the file, without its suffix.
        clips: Its rows.
        labels: The classes, sorted; numbers by value.
        multi_label: A clip may have any number of labels; else exactly one.
        frame_level: Labels belong to moments of a clip.
        notes: What was noticed, in sentences.
    """

    name: str
    clips: list[Clip]
    labels: list[str]
    multi_label: bool
    frame_level: bool
    notes: list[str] = field(default_factory=list)

    def rounds(self, seed: int = 0) -> list[Fold]:
        """One for each fold, or the one of the splits.

        Each fold is the test set of a round, and the next fold the one to choose by; with two folds, and where no
        split is called valid, that is a share of the training clips, of every class and drawn from ``seed``.

        Raises:
            ValueError: Nothing to train or to test on.
        """
        if not any(clip.fold for clip in self.clips):
            parts = {name: [i for i, clip in enumerate(self.clips) if clip.split == name] for name in ("train", "test")}
            if missing := [name for name, part in parts.items() if not part]:
                raise ValueError(f"{self.name}: expected clips of split train and test, got none of {missing[0]}")
            valid = [i for i, clip in enumerate(self.clips) if clip.split == "valid"]
            train, valid = (parts["train"], valid) if valid else self._draw(parts["train"], seed)
            return [Fold("", train, valid, parts["test"])]
        folds = sorted({clip.fold for clip in self.clips}, key=_natural)
        if len(folds) < 2:
            raise ValueError(f"{self.name}: cross-validation takes at least two folds, got {folds}")
        members = {fold: [i for i, clip in enumerate(self.clips) if clip.fold == fold] for fold in folds}
        found = []
        for fold, following in zip(folds, [*folds[1:], folds[0]], strict=True):
            aside = {fold, following} if len(folds) > 2 else {fold}
            train = [i for i, clip in enumerate(self.clips) if clip.fold not in aside]
            train, valid = (train, members[following]) if len(folds) > 2 else self._draw(train, seed)
            found.append(Fold(fold, train, valid, members[fold]))
        return found

    def _draw(self, indices: list[int], seed: int) -> tuple[list[int], list[int]]:
        """Keeps some clips of every class that has two aside; all parts of a file go one way."""
        rng, aside = random.Random(seed), set()
        by_label: dict[str, list[str]] = {}
        for i in indices:
            by_label.setdefault(min(self.clips[i].labels, default=""), []).append(self.clips[i].name)
        for _, names in sorted(by_label.items()):
            if names := sorted(set(names) - aside):
                count = min(max(1, round(_VALID_SHARE * len(names))), len(names) - 1)
                aside.update(rng.sample(names, count))
        valid = [i for i in indices if self.clips[i].name in aside]
        if not valid:
            raise ValueError(f"{self.name}: too few training clips to keep some aside: name them with split=valid")
        return [i for i in indices if self.clips[i].name not in aside], valid

    def targets(self) -> np.ndarray:
        """(clips, classes) bool: which labels each clip has."""
        place = {label: i for i, label in enumerate(self.labels)}
        found = np.zeros((len(self.clips), len(self.labels)), bool)
        for row, clip in zip(found, self.clips, strict=True):
            row[[place[label] for label in clip.labels]] = True
        return found


def read_task(
    manifest: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, multi_label: bool = False
) -> Task:
    """Reads a manifest; see the module.

    Args:
        manifest: ``.tsv`` or ``.csv``.
        root: Folder of the audio that does not lie beside the manifest.
        multi_label: Clips may have several labels, also if none has. A ``;`` in a label makes it so.

    Raises:
        FileNotFoundError: No such manifest, or none of its files is there.
        ValueError: It is none, or a row lacks something; with the line.
    """
    manifest = Path(manifest)
    if manifest.is_dir():
        raise ValueError(f"expected a manifest, .tsv or .csv, got the folder {manifest}")
    try:
        with open(manifest, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            tabs = (
                "\t" in first if manifest.suffix.lower() not in (".csv", ".tsv") else manifest.suffix.lower() == ".tsv"
            )
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            what = "phones" if "phones" in columns and "label" not in columns else "label"
            if not {"path", what} <= set(columns) or not {"split", "fold"} & set(columns):
                raise ValueError(
                    f"{manifest}: expected a header with path, label (or phones), and split or fold, separated by "
                    f"{'tabs' if tabs else 'commas'}, got {columns}"
                )
            reader.fieldnames = columns
            folders = [Path(os.path.abspath(manifest.parent)), *([Path(os.path.abspath(root))] if root else [])]
            clips = [
                _clip(row, f"{manifest}, line {reader.line_num}", what, folders)
                for row in reader
                if any(cell for cell in row.values())
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{manifest} is no table in UTF-8 (an open quote?): {error}") from error
    if not clips:
        raise ValueError(f"{manifest}: expected clips below the header, got none")
    if not any(os.path.exists(clip.path) for clip in clips):
        looked = " nor in ".join(map(str, folders))
        raise FileNotFoundError(
            f"none of the {len(clips)} files of {manifest} is there; {clips[0].name} is not in {looked} (--root DIR)"
        )
    clips, notes = _settle_folds(clips, str(manifest))
    frame_level = what == "phones"
    if frame_level:
        times = Counter(phone for clip in clips for _, phone in clip.phones)
        labels = {phone for phone, count in times.items() if count >= _LEAST_PHONES}
        notes += [f"{len(times) - len(labels)} phones with under {_LEAST_PHONES} occurrences left out"]
    else:
        multi_label = multi_label or any(len(clip.labels) > 1 for clip in clips)
        if not multi_label and (empty := next((clip for clip in clips if not clip.labels), None)):
            raise ValueError(f"{manifest}: {empty.name} has no label; that goes with --multi-label alone")
        labels = {label for clip in clips for label in clip.labels}
        notes += _notes(clips)
    if len(labels) < 2 and not multi_label:
        raise ValueError(f"{manifest}: expected at least two classes, got {sorted(labels)}")
    return Task(manifest.stem, clips, sorted(labels, key=_natural), multi_label, frame_level, notes)


def _clip(row: dict[str, str | None], where: str, what: str, folders: Sequence[Path]) -> Clip:
    cells = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}
    name, split, fold = cells["path"], cells.get("split", ""), cells.get("fold", "")
    if not name:
        raise ValueError(f"{where}: no path")
    if broken := next((value for value in cells.values() if "\n" in value), None):
        raise ValueError(f"{where}: a cell goes over several lines, from an open quote on: {broken[:60]!r}")
    if not fold and split.lower() not in _SPLITS:
        expected = "a fold or a split, train, valid or test" if "fold" in cells else "a split, train, valid or test"
        raise ValueError(f"{where}: expected {expected}, got {split!r}")
    try:
        start, end = (float(cells.get(key) or 0.0) for key in ("start", "end"))
        stretches = [pair.rpartition(":") for pair in cells[what].split()] if what == "phones" else ()
        phones = tuple((float(before or after), after if before else "") for before, _, after in stretches)
    except ValueError as error:
        raise ValueError(f"{where}: expected seconds, {error}") from None
    if not (0.0 <= start < math.inf and (end == 0.0 or start < end < math.inf)):
        raise ValueError(f"{where}: expected 0 <= start < end in seconds, got {start:g} and {end:g}")
    edges = [end for end, _ in phones]
    if what == "phones" and (not phones or not all(phone for _, phone in phones) or edges != sorted(edges)):
        raise ValueError(f"{where}: expected phones as END:PHONE, ends in seconds ascending, got {cells[what][:60]!r}")
    labels = () if phones else tuple(dict.fromkeys(label.strip() for label in cells[what].split(";") if label.strip()))
    spellings = dict.fromkeys((name, os.path.expanduser(name), name.replace("\\", "/")))  # of a home, of Windows
    places = [folder / spelling for spelling in spellings for folder in folders]  # an absolute name stays as it is
    path = next((place for place in places if place.exists()), folders[-1] / name)
    return Clip(str(path), name, labels, _SPLITS.get(split.lower(), ""), fold, start, end, phones)


def _settle_folds(clips: list[Clip], manifest: str) -> tuple[list[Clip], list[str]]:
    """The clips with folds or without, and notes.

    Raises:
        ValueError: Some have a fold and some do not, or what is called folds are splits.
    """
    folds = {clip.fold for clip in clips}
    if folds == {""}:
        return clips, []
    if "" in folds:
        without = [clip.name for clip in clips if not clip.fold]
        raise ValueError(
            f"{manifest}: {len(without)} of {len(clips)} clips have no fold, {without[0]} for one: give every clip "
            "one, or leave the column out where splits are meant"
        )
    if {fold.lower() for fold in folds} <= set(_SPLITS):
        raise ValueError(f"{manifest}: the folds are {sorted(folds)}: name the column split")
    if len(folds) == 1 and all(clip.split for clip in clips):
        note = f"all clips are of fold {folds.pop()}: the splits are taken"
        return [dataclasses.replace(clip, fold="") for clip in clips], [note]
    return clips, []


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts numbers by value, before words."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, text)


def _notes(clips: Sequence[Clip]) -> list[str]:
    by_file: dict[str, set[str]] = {}
    for clip in clips:
        by_file.setdefault(clip.path, set()).add(clip.fold or clip.split)
    both = sorted(path for path, places in by_file.items() if len(places) > 1)
    if not both:
        return []
    files = f"{len(both)} files are" if len(both) > 1 else "1 file is"
    return [f"{files} in more than one split or fold, so tests are easier than they look: {both[0]} ..."]
