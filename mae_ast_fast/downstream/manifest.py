"""Manifests of labelled audio, and their splits and folds.

A manifest is a ``.tsv`` or ``.csv`` table in UTF-8 with a header and one clip per row. Its columns are ``path``
(relative to the manifest's folder, otherwise to ``root``), ``label`` (``;`` separates several), and ``split`` (train,
valid, test), ``fold``, or both. ``start`` and ``end`` in seconds select a part of a file. A frame-level manifest has
``phones`` in place of ``label``: ``END:PHONE`` of each stretch of the recording, in seconds. Each stretch begins where
the one before it ends.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.audio import decode_text

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_VALID_SHARE = 0.15  # of the training clips, if a manifest has no validation clips
_MIN_PHONES = 20  # phones with fewer occurrences are left out


@dataclass(frozen=True)
class Clip:
    """A row of a manifest. A run folder keeps a digest of its ``repr``: do not rename the class or its fields.

    Attributes:
        path: Absolute path of the file.
        name: Path as the manifest spells it.
        labels: Labels of the clip.
        split: train, valid, test, or empty.
        fold: Name of the fold, or empty.
        start: Start of the clip in the file, in seconds.
        end: End of the clip in the file, in seconds; 0: the end of the file.
        phones: (end in seconds, phone) of each stretch, ascending.
    """

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
    """One training: indices of the training, validation and test clips.

    Attributes:
        name: Name of the test fold; empty for the manifest's splits.
        train: Training clips.
        valid: Validation clips, which select a setting or an epoch.
        test: Test clips.
    """

    name: str
    train: list[int]
    valid: list[int]
    test: list[int]

    @property
    def display_name(self) -> str:
        """Name for messages."""
        return f"fold {self.name}" if self.name else "the split"

    def without(self, clips: set[int]) -> Fold:
        """The fold without some clips."""
        train, valid, test = ([i for i in split if i not in clips] for split in (self.train, self.valid, self.test))
        return Fold(self.name, train, valid, test)


@dataclass
class Task:
    """A parsed manifest.

    Attributes:
        name: File name of the manifest without its suffix.
        clips: Rows of the manifest.
        labels: Names of the classes, sorted; numbers are sorted by value.
        multi_label: A clip may have any number of labels, otherwise it has exactly one.
        frame_level: Labels belong to moments of a clip.
        notes: Remarks on the manifest, in sentences.
    """

    name: str
    clips: list[Clip]
    labels: list[str]
    multi_label: bool
    frame_level: bool
    notes: list[str] = field(default_factory=list)

    def folds(self, seed: int = 0) -> list[Fold]:
        """The folds, or a single ``Fold`` of the splits.

        Each fold is the test set once and the next fold selects. With two folds, or without validation clips, a share
        of the training clips of every class selects.

        Args:
            seed: Seed that draws this share.

        Raises:
            ValueError: There are no training clips or no test clips.
        """
        if not any(clip.fold for clip in self.clips):
            splits = {name: [i for i, c in enumerate(self.clips) if c.split == name] for name in ("train", "test")}
            if missing := [name for name, members in splits.items() if not members]:
                raise ValueError(f"{self.name}: expected clips of split train and test, got none of {missing[0]}")
            valid = [i for i, clip in enumerate(self.clips) if clip.split == "valid"]
            train, valid = (splits["train"], valid) if valid else self._draw_valid(splits["train"], seed)
            return [Fold("", train, valid, splits["test"])]
        names = sorted({clip.fold for clip in self.clips}, key=_natural_key)
        if len(names) < 2:
            raise ValueError(f"{self.name}: cross-validation takes at least two folds, got {names}")
        members = {name: [i for i, clip in enumerate(self.clips) if clip.fold == name] for name in names}
        folds = []
        for name, next_name in zip(names, [*names[1:], names[0]], strict=True):
            excluded = {name, next_name} if len(names) > 2 else {name}
            train = [i for i, clip in enumerate(self.clips) if clip.fold not in excluded]
            train, valid = (train, members[next_name]) if len(names) > 2 else self._draw_valid(train, seed)
            folds.append(Fold(name, train, valid, members[name]))
        return folds

    def _draw_valid(self, indices: list[int], seed: int) -> tuple[list[int], list[int]]:
        """Split training clips into training and validation, per class; all clips of a file go the same way.

        Raises:
            ValueError: Every class has clips of one file only.
        """
        rng = random.Random(seed)
        valid_files: set[str] = set()
        files_by_label: dict[str, list[str]] = {}
        for i in indices:
            files_by_label.setdefault(min(self.clips[i].labels, default=""), []).append(self.clips[i].name)
        for _, label_files in sorted(files_by_label.items()):
            if files := sorted(set(label_files) - valid_files):
                count = min(max(1, round(_VALID_SHARE * len(files))), len(files) - 1)
                valid_files.update(rng.sample(files, count))
        valid = [i for i in indices if self.clips[i].name in valid_files]
        if not valid:
            raise ValueError(f"{self.name}: too few training clips to draw validation clips: mark some as split=valid")
        return [i for i in indices if self.clips[i].name not in valid_files], valid

    def targets(self) -> np.ndarray:
        """Labels of each clip: (clips, classes) bool."""
        column = {label: i for i, label in enumerate(self.labels)}
        targets = np.zeros((len(self.clips), len(self.labels)), bool)
        for row, clip in zip(targets, self.clips, strict=True):
            row[[column[label] for label in clip.labels]] = True
        return targets


def read_task(
    manifest: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, multi_label: bool = False
) -> Task:
    """Read a manifest; the module's docstring describes the format.

    Args:
        manifest: ``.tsv`` or ``.csv`` file.
        root: Second folder in which paths are looked up, after the manifest's own folder.
        multi_label: Clips may have any number of labels, even none, and rows of one clip are merged. A ``;`` in a label
            turns it on too, but merges nothing.

    Raises:
        FileNotFoundError: The manifest does not exist, or none of its files does.
        ValueError: The file is not a manifest, a row is malformed (the message gives the line), or rows of one clip
            contradict each other.
    """
    manifest = Path(manifest)
    label_column, rows = _read_table(manifest)
    frame_level = label_column == "phones"
    folders = [Path(os.path.abspath(folder)) for folder in (manifest.parent, root) if folder]
    clips = [_parse_row(row, label_column, folders) for row in rows]
    if not any(os.path.exists(clip.path) for clip in clips):
        searched = " nor in ".join(map(str, folders))
        raise FileNotFoundError(
            f"none of the {len(clips)} files of {manifest} exists; {clips[0].name} is not in {searched} (--root DIR)"
        )
    clips, notes = _resolve_folds(clips, str(manifest))
    clips = _merge_rows(clips, str(manifest), merge=multi_label and not frame_level)
    if frame_level:
        labels, label_notes = _frequent_phones(clips)
    else:
        multi_label = multi_label or any(len(clip.labels) > 1 for clip in clips)
        if not multi_label and (unlabelled := next((clip for clip in clips if not clip.labels), None)):
            raise ValueError(f"{manifest}: {unlabelled.name} has no label, which only --multi-label allows")
        labels, label_notes = {label for clip in clips for label in clip.labels}, _overlap_notes(clips)
    if len(labels) < 2 and not multi_label:
        raise ValueError(f"{manifest}: expected at least two classes, got {sorted(labels)}")
    names = sorted(labels, key=_natural_key)
    return Task(manifest.stem, clips, names, multi_label, frame_level, [*notes, *label_notes])


@dataclass(frozen=True)
class _Row:
    """A row of a table.

    Attributes:
        position: File and line, for messages.
        cells: Column -> cell, stripped; empty where the row is too short.
    """

    position: str
    cells: dict[str, str]


def _read_table(manifest: Path) -> tuple[str, list[_Row]]:
    """Read the column of the labels, "label" or "phones", and the rows that are not empty, at least one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a table with the columns of a manifest.
    """
    if manifest.is_dir():
        raise ValueError(f"expected a manifest, .tsv or .csv, got the folder {manifest}")
    try:
        with io.StringIO(decode_text(manifest.read_bytes()), newline="") as file:
            first_line = file.readline()
            file.seek(0)
            suffix = manifest.suffix.lower()
            has_tabs = suffix == ".tsv" if suffix in (".csv", ".tsv") else "\t" in first_line
            reader = csv.DictReader(file, delimiter="\t" if has_tabs else ",", strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            label_column = "phones" if "phones" in columns and "label" not in columns else "label"
            if not {"path", label_column} <= set(columns) or not {"split", "fold"} & set(columns):
                raise ValueError(
                    f"{manifest}: expected a header with path, label (or phones), and split or fold, separated by "
                    f"{'tabs' if has_tabs else 'commas'}, got {columns}"
                )
            reader.fieldnames = columns
            rows = [
                _Row(f"{manifest}, line {reader.line_num}", {name: (row[name] or "").strip() for name in columns})
                for row in reader
                if any(row.values())
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{manifest} is not a table in UTF-8 or UTF-16 (unclosed quote?): {error}") from error
    if not rows:
        raise ValueError(f"{manifest}: expected clips below the header, got none")
    return label_column, rows


def _parse_row(row: _Row, label_column: str, folders: Sequence[Path]) -> Clip:
    """Parse and check a row.

    Args:
        row: Row of the table.
        label_column: "label" or "phones".
        folders: Folders in which the path is looked up, in this order.

    Raises:
        ValueError: A cell is missing or malformed.
    """
    cells = row.cells
    name, split, fold = cells["path"], cells.get("split", ""), cells.get("fold", "")
    try:
        if not name:
            raise ValueError("no path")
        if multi_line := next((value for value in cells.values() if "\n" in value), None):
            raise ValueError(f"a cell spans several lines (unclosed quote?): {multi_line[:60]!r}")
        if not fold and split.lower() not in _SPLITS:
            expected = "a fold or a split" if "fold" in cells else "a split"
            raise ValueError(f"expected {expected}, train, valid or test, got {split!r}")
        start, end = _parse_range(cells)
        phones = _parse_phones(cells["phones"]) if label_column == "phones" else ()
    except ValueError as error:
        raise ValueError(f"{row.position}: {error}") from None
    labels = [label.strip() for label in cells["label"].split(";")] if label_column == "label" else []
    return Clip(
        path=str(_find_file(name, folders)),
        name=name,
        labels=tuple(dict.fromkeys(filter(None, labels))),
        split=_SPLITS.get(split.lower(), ""),
        fold=fold,
        start=start,
        end=end,
        phones=phones,
    )


def _parse_range(cells: dict[str, str]) -> tuple[float, float]:
    """Parse start and end of a clip in its file, in seconds; an end of 0 is that of the file.

    Raises:
        ValueError: Not numbers, or not in this order.
    """
    start, end = (_parse_seconds(cells.get(column) or "0") for column in ("start", "end"))
    if not (0.0 <= start < math.inf and (end == 0.0 or start < end < math.inf)):
        raise ValueError(f"expected 0 <= start < end in seconds, got {start:g} and {end:g}")
    return start, end


def _parse_phones(cell: str) -> tuple[tuple[float, str], ...]:
    """Parse END:PHONE of each stretch of a recording.

    Raises:
        ValueError: There is none, an end is not a number, a phone is missing, or the ends do not ascend.
    """
    pairs = [pair.rpartition(":") for pair in cell.split()]
    phones = tuple((_parse_seconds(end or phone), phone if end else "") for end, _, phone in pairs)
    ends = [end for end, _ in phones]
    if not phones or not all(phone for _, phone in phones) or ends != sorted(ends):
        raise ValueError(f"expected phones as END:PHONE, ends in seconds ascending, got {cell[:60]!r}")
    return phones


def _parse_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"expected seconds, {error}") from None


def _find_file(name: str, folders: Sequence[Path]) -> Path:
    """The first file of that name in the folders, also with "~" or Windows' separators; if none, one that is not there.

    An absolute path stays as it is.
    """
    spellings = dict.fromkeys((name, os.path.expanduser(name), name.replace("\\", "/")))
    candidates = [folder / spelling for spelling in spellings for folder in folders]
    return next((candidate for candidate in candidates if candidate.exists()), folders[-1] / name)


def _resolve_folds(clips: list[Clip], manifest: str) -> tuple[list[Clip], list[str]]:
    """The clips, with their folds or without if the splits are used, and notes.

    Raises:
        ValueError: Only some clips have a fold, or the folds are named like splits.
    """
    folds = {clip.fold for clip in clips}
    if folds == {""}:
        return clips, []
    if "" in folds:
        without = [clip.name for clip in clips if not clip.fold]
        raise ValueError(
            f"{manifest}: {len(without)} of {len(clips)} clips have no fold, for example {without[0]}: give every clip "
            "a fold, or remove the column to use the splits"
        )
    if {fold.lower() for fold in folds} <= set(_SPLITS):
        raise ValueError(f"{manifest}: the folds are {sorted(folds)}: name the column split")
    if len(folds) == 1 and all(clip.split for clip in clips):
        note = f"all clips are in fold {folds.pop()}: the column split is used"
        return [dataclasses.replace(clip, fold="") for clip in clips], [note]
    return clips, []


def _merge_rows(clips: list[Clip], manifest: str, *, merge: bool) -> list[Clip]:
    """The clips, each with the labels of all its rows, in the order of its first rows.

    Rows are of one clip if file, start and end are the same. Rows that agree remain as they are.

    Args:
        clips: A clip per row, with folds resolved.
        manifest: Name of the manifest, for messages.
        merge: Whether rows of one clip that differ may be merged.

    Raises:
        ValueError: Rows of one clip differ and are not to be merged, or differ between two splits or folds.
    """
    rows_by_clip: dict[tuple[str, float, float], list[Clip]] = {}
    for clip in clips:
        rows_by_clip.setdefault((os.path.realpath(clip.path), clip.start, clip.end), []).append(clip)
    differing, in_two_sets = [], []
    merged: list[Clip] = []
    for rows in rows_by_clip.values():
        if len({(frozenset(row.labels), row.phones) for row in rows}) == 1:
            merged += rows
            continue
        differing.append(rows)
        labels_by_set: dict[str, dict[str, None]] = {}
        for row in rows:
            labels_by_set.setdefault(row.fold or row.split, {}).update(dict.fromkeys(row.labels))
        if len({frozenset(labels) for labels in labels_by_set.values()}) > 1:
            in_two_sets.append(rows)
        first_rows = {row.fold or row.split: row for row in reversed(rows)}
        merged += [
            dataclasses.replace(first_rows[name], labels=tuple(labels)) for name, labels in labels_by_set.items()
        ]
    if in_two_sets:
        cure = "give each clip to one split or fold, or the same labels in each"
        raise ValueError(f"{manifest}: {_describe_rows(in_two_sets)}: {cure}")
    if differing and not merge:
        is_phones = bool(differing[0][0].phones)
        cure = "put all phones of a recording into one row" if is_phones else "--multi-label merges the rows of a clip"
        raise ValueError(f"{manifest}: {_describe_rows(differing)}: {cure}")
    return merged if differing else clips


def _describe_rows(differing: Sequence[Sequence[Clip]]) -> str:
    """How many clips have rows that differ, with the labels of the first three."""
    examples = []
    for rows in differing[:3]:
        clip = rows[0]
        part = f" from {clip.start:g} s" if clip.start or clip.end else ""
        answers = ["; ".join(row.labels) or "none" for row in rows if not row.phones]
        examples.append(f"{clip.name}{part}" + (f" ({', '.join(dict.fromkeys(answers))})" if answers else ""))
    count = "1 clip has rows" if len(differing) == 1 else f"{len(differing)} clips have rows"
    what = "phones" if differing[0][0].phones else "labels"
    return f"{count} whose {what} differ, for example {', '.join(examples)}"


def _frequent_phones(clips: Sequence[Clip]) -> tuple[set[str], list[str]]:
    """The phones that occur often enough to be classes, and a note on the others."""
    counts = Counter(phone for clip in clips for _, phone in clip.phones)
    frequent = {phone for phone, count in counts.items() if count >= _MIN_PHONES}
    return frequent, [f"{len(counts) - len(frequent)} phones with under {_MIN_PHONES} occurrences left out"]


def _natural_key(text: str) -> tuple[bool, float, str]:
    """Sort key: numbers by value, then words."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, text)


def _overlap_notes(clips: Sequence[Clip]) -> list[str]:
    """A note on files that are in more than one split or fold."""
    sets_by_path: dict[str, set[str]] = {}
    for clip in clips:
        sets_by_path.setdefault(clip.path, set()).add(clip.fold or clip.split)
    shared = sorted(path for path, sets in sets_by_path.items() if len(sets) > 1)
    if not shared:
        return []
    files = f"{len(shared)} files are" if len(shared) > 1 else "1 file is"
    return [f"{files} in more than one split or fold, which makes the test easier: {shared[0]} ..."]
