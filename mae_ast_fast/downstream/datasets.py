"""Public data sets in the folders in which people have them, as manifests for ``finetune`` and ``probe``.

A reader takes the folder of a data set, or the one above, and gives a row a clip: ``path`` below that folder,
``label`` (``;`` between several), ``split`` (train, valid, test) or ``fold``, and where the clip is part of a file its
``start`` and ``end`` in seconds. Nothing is downloaded and no audio decoded. A tree that torchaudio's dataset classes
read gives the same clips here, without torchaudio (tests/downstream/test_datasets.py compares); other layouts in use
are read too, and audio that was converted to another format under the same name.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..data.audio import find_audio
from ..files import atomic_write

_COLUMNS = ("path", "label", "phones", "split", "fold", "start", "end")
_COMMANDS = frozenset(("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"))
_WORDS = {1: 30, 2: 35}  # of the versions of Speech Commands
_EMOTIONS = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}


class Rows(list[dict[str, str]]):
    """Rows of a manifest; ``missing`` names what the data set lists and the folder lacks."""

    def __init__(self, rows: Iterable[dict[str, str]], missing: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.missing = list(missing)


def write_manifest(rows: Iterable[dict[str, str]], path: str | os.PathLike[str]) -> None:
    """Writes rows as the table that ``tasks.read_task`` reads, with the columns that any row has.

    Args:
        rows: With ``path``, ``label`` or ``phones``, ``split`` or ``fold``, maybe ``start`` and ``end``.
        path: File to write; its folder is made.

    Raises:
        ValueError: No row, or a column of another name.
    """
    rows, path = list(rows), Path(path)
    present = {name for row in rows for name in row}
    if not rows or not present <= set(_COLUMNS):
        raise ValueError(f"expected rows with some of {', '.join(_COLUMNS)}, got {sorted(present) or 'no row'}")

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            columns = [name for name in _COLUMNS if name in present]
            table = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def _locate(root: Path, names: Iterable[str], expected: str) -> Path:
    """The first of some files or folders that is in ``root``, else in a folder of it."""
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    for place in (root, *(path for path in inside if path.is_dir())):
        for name in names:
            if (place / name).exists():
                return place / name
    found = ", ".join(path.name for path in inside[:8]) + (" ..." if len(inside) > 8 else "")
    raise FileNotFoundError(f"{root}: expected {expected}, here or in a folder here; found {found or 'nothing'}")


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _audio(root: Path) -> dict[str, str]:
    """The audio files below ``root``: path without suffix -> path, both relative."""
    return {_stem(entry.name): entry.name for entry in find_audio(root)}


def _below(root: Path, path: Path) -> str:
    """The start of the names of what lies in ``path``."""
    relative = path.relative_to(root).as_posix()
    return "" if relative == "." else relative + "/"


def _present(root: Path, listed: Iterable[tuple[str, str | None, dict[str, str]]]) -> Rows:
    """Rows of the clips that are there, from (name in the data set, path or None, the rest of the row)."""
    rows, missing = [], []
    for name, path, rest in listed:
        if path is None:
            missing.append(name)
        else:
            rows.append({"path": path, **rest})
    if not rows:
        example = f", {missing[0]} for one" if missing else ""
        raise FileNotFoundError(f"{root}: none of the {len(missing)} clips of the data set is there{example}")
    return Rows(rows, missing)


# ------------------------------------------------------------------------------------------------------------ readers


def esc50(root: Path) -> Rows:
    """ESC-50: ``meta/esc50.csv`` and ``audio/``; 50 classes, 5 folds.

    Raises:
        FileNotFoundError: The table or all audio is not there.
        ValueError: The table lacks a column.
    """
    table = _locate(root, ["meta/esc50.csv"], "ESC-50: meta/esc50.csv beside audio/")
    folder, audio = _below(root, table.parent.parent) + "audio/", _audio(root)
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"filename", "fold", "category"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table}: expected columns filename, fold and category, got {reader.fieldnames}")
        listed = [
            (
                row["filename"],
                audio.get(_stem(folder + row["filename"])),
                {"label": row["category"], "fold": row["fold"]},
            )
            for row in reader
        ]
    return _present(root, listed)


def _speech_commands(root: Path, version: int) -> tuple[Path, list[tuple[str, str | None, dict[str, str]]]]:
    """The folder of the words, and (name, path, word and split) of every recording in it or in its lists."""
    name = f"speech_commands_v0.0{version}"
    expected = f"Speech Commands v0.0{version}: validation_list.txt, testing_list.txt and a folder of each word"
    folder = _locate(root, [f"{name}/validation_list.txt", "validation_list.txt"], expected).parent
    if not (folder / "testing_list.txt").exists():
        raise FileNotFoundError(f"{folder}: expected {expected}; there is no testing_list.txt")
    splits = {}
    for split in ("valid", "test"):
        text = (folder / f"{split}{'ation' if split == 'valid' else 'ing'}_list.txt").read_text(encoding="utf-8")
        splits.update((_stem(line.strip()), split) for line in text.splitlines() if line.strip())
    below, found = _below(root, folder), {}
    for stem, path in _audio(root).items():
        word, _, recording = stem.removeprefix(below).partition("/")
        if stem.startswith(below) and "_nohash_" in recording and "/" not in recording:
            found[f"{word}/{recording}"] = path
    words = {recording.partition("/")[0] for recording in found}
    named = re.fullmatch(r"speech_commands_v0\.0(\d)", folder.name)
    if (named and int(named[1]) != version) or len(words) == _WORDS[3 - version]:
        raise ValueError(f"expected {expected} ({_WORDS[version]} of them), got {folder} with {len(words)} words")
    return folder, [
        (name, found.get(name), {"label": name.partition("/")[0], "split": splits.get(name, "train")})
        for name in sorted({*found, *splits})
    ]


def ks2(root: Path) -> Rows:
    """Speech Commands v0.02, all 35 words, split by its ``validation_list.txt`` and ``testing_list.txt``.

    Raises:
        FileNotFoundError: A list or all audio is not there.
        ValueError: It is the other version.
    """
    return _present(root, _speech_commands(root, 2)[1])


def ks1(root: Path) -> Rows:
    """Keyword spotting of SUPERB: Speech Commands v0.01, ten words, ``_unknown_`` (20 others) and ``_silence_``.

    Tested as there on the folder ``speech_commands_test_set_v0.01``, in ``root`` or beside the words' folder; without
    it (then it is in ``missing``) on the data set's own test list. Silence is 1 s parts of ``_background_noise_``: the
    last tenth of each file is for validation; without a test folder that is the tenth before, and the last is to test.

    Raises:
        FileNotFoundError: A list, the noise, or all audio is not there.
        ValueError: It is the other version.
    """
    folder, listed = _speech_commands(root, 1)
    audio, official = _audio(root), "speech_commands_test_set_v0.01/"
    beside = official if folder == root else _below(root, folder.parent) + official
    tested = []
    for stem, path in audio.items():
        start = next((start for start in (beside, official) if stem.startswith(start)), None)
        label, _, recording = stem.removeprefix(start or "").partition("/")
        if start and recording and label in (*_COMMANDS, "_unknown_", "_silence_"):
            tested.append((stem, path, {"label": label, "split": "test"}))
    rows = tested or [(official, None, {})]
    for name, path, row in listed:
        if not (tested and row["split"] == "test"):
            rows.append((name, path, {**row, "label": row["label"] if row["label"] in _COMMANDS else "_unknown_"}))
    noise = [path for stem, path in audio.items() if stem.startswith(_below(root, folder) + "_background_noise_/")]
    if not noise:
        raise FileNotFoundError(f"{folder}: expected _background_noise_/ with recordings, of which silence is made")
    return _present(root, [*rows, *_silence(root, noise, "valid" if tested else "test")])


def _silence(root: Path, paths: Iterable[str], last: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Parts of 1 s; the last tenth of each file is of split ``last``, the one before valid if ``last`` is not."""
    import soundfile

    for path in paths:
        try:
            parts = int(soundfile.info(root / path).duration)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{root / path}: expected a recording of noise: {error.error_string}") from error
        for second in range(parts):
            place = (second + 0.5) / parts
            split = last if place > 0.9 else "valid" if place > 0.8 and last != "valid" else "train"
            yield path, path, {"label": "_silence_", "split": split, "start": str(second), "end": str(second + 1)}


def voxceleb1(root: Path) -> Rows:
    """Speaker identification on VoxCeleb1: ``iden_split.txt`` and files ``.../idXXXXX/VIDEO/NUMBER.wav`` (``wav/``,
    ``dev/wav/`` and ``test/wav/``, or any other folder); 1251 speakers.

    Raises:
        FileNotFoundError: The list or all audio is not there.
        ValueError: A line of the list is malformed.
    """
    table = _locate(root, ["iden_split.txt"], "VoxCeleb1: iden_split.txt and wav/idXXXXX/VIDEO/NUMBER.wav")
    audio = {"/".join(stem.split("/")[-3:]): path for stem, path in _audio(root).items()}
    listed = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            match = re.fullmatch(r"([123])\s+((id\d+)/\S+/\S+)", line.strip())
            if not match:
                raise ValueError(
                    f"{table}, line {number}: expected 1, 2 or 3 and idXXXXX/VIDEO/NUMBER.wav, got {line!r}"
                )
            split = ("train", "valid", "test")[int(match[1]) - 1]
            listed.append((match[2], audio.get(_stem(match[2])), {"label": match[3], "split": split}))
    return _present(root, listed)


def iemocap(root: Path) -> Rows:
    """Emotion recognition on IEMOCAP as in SUPERB: neu, hap (with exc), ang, sad; the 5 sessions are the folds.

    ``SessionN/sentences/wav/DIALOG/*.wav`` and ``SessionN/dialog/EmoEvaluation/*.txt`` in ``root`` or in a folder of it
    (IEMOCAP, IEMOCAP_full_release).

    Raises:
        FileNotFoundError: No session, no labels, or no audio is there.
    """
    names = [f"Session{number}" for number in range(1, 6)]
    expected = "IEMOCAP: Session1 ... Session5 with sentences/wav/ and dialog/EmoEvaluation/"
    folder, audio, listed = _locate(root, names, expected).parent, _audio(root), []
    for fold, session in enumerate(names, 1):
        tables = sorted((folder / session / "dialog/EmoEvaluation").glob("[!.]*.txt"))
        if not tables:
            listed.append((f"{session}/dialog/EmoEvaluation/*.txt", None, {}))
        below = f"{_below(root, folder)}{session}/sentences/wav/"
        for table in tables:
            text = table.read_text(encoding="utf-8", errors="replace")
            for utterance, emotion in re.findall(r"^\[[^\]]*\]\t(\S+)\t(\w+)", text, re.MULTILINE):
                if emotion in _EMOTIONS:
                    path = audio.get(f"{below}{utterance.rpartition('_')[0]}/{utterance}")
                    listed.append((utterance, path, {"label": _EMOTIONS[emotion], "fold": str(fold)}))
    return _present(root, listed)


def audioset20k(root: Path) -> Rows:
    """AudioSet's balanced training set, tested on its evaluation set; 527 classes, several a clip.

    ``balanced_train_segments.csv``, ``eval_segments.csv`` and ``class_labels_indices.csv``, and the clips of 10 s in
    any folders and formats, named by the video: ``ID``, ``YID`` or ``id_ID``, maybe with ``_START`` or ``_START_END``.
    Many videos are gone: their clips are in ``missing``. Labels are the display names, with ``,`` for a ``;``.

    Raises:
        FileNotFoundError: A table or all audio is not there.
        ValueError: A table is malformed.
    """
    return _audioset(root, {"balanced_train": "train", "eval": "test"})


def audioset2m(root: Path) -> Rows:
    """The whole of AudioSet: as ``audioset20k``, with ``unbalanced_train_segments.csv``."""
    return _audioset(root, {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"})


def _audioset(root: Path, parts: dict[str, str]) -> Rows:
    expected = f"AudioSet: class_labels_indices.csv, {', '.join(f'{part}_segments.csv' for part in parts)} and audio"
    tables = {part: _locate(root, [f"{part}_segments.csv"], expected) for part in parts}
    names = _class_names(_locate(root, ["class_labels_indices.csv"], expected))
    audio: dict[str, str] = {}
    for stem, path in _audio(root).items():
        name = PurePosixPath(stem).name
        for prefix in ("", "Y", "id_"):
            # An identifier has 11 characters and may itself begin with Y, or hold an underscore.
            if name.startswith(prefix) and re.fullmatch(r"[\w-]{11}(_[\d.]+){0,2}", name[len(prefix) :], re.ASCII):
                audio.setdefault(name[len(prefix) :][:11], path)
    listed = []
    for part, split in parts.items():
        with open(tables[part], encoding="utf-8", newline="") as file:
            for row in csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True):
                unknown = [mid for mid in row[-1].split(",") if mid not in names] if row else []
                if row and (len(row) != 4 or unknown):
                    raise ValueError(f"{tables[part]}: expected YTID, start, end, labels of the class list, got {row}")
                if row:
                    label = ";".join(names[mid] for mid in row[3].split(","))
                    listed.append((f"{part} {row[0]}", audio.get(row[0]), {"label": label, "split": split}))
    return _present(root, listed)


def _class_names(table: Path) -> dict[str, str]:
    """mid -> a name of its own without ``;``."""
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        if not {"mid", "display_name"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table}: expected columns index, mid and display_name, got {reader.fieldnames}")
        names = {row["mid"]: row["display_name"].replace(";", ",") for row in reader}
    times = Counter(names.values())
    return {mid: name if times[name] == 1 else f"{name} ({mid})" for mid, name in names.items()}


READERS: dict[str, Callable[[Path], Rows]] = {
    "esc50": esc50,
    "ks1": ks1,
    "ks2": ks2,
    "voxceleb1": voxceleb1,
    "iemocap": iemocap,
    "audioset20k": audioset20k,
    "audioset2m": audioset2m,
}
# What it is, how much there is, what is measured, and what --root holds.
ABOUT = {
    "esc50": ("50 classes of sounds", "2,000 clips", "accuracy, 5 folds", "meta/esc50.csv, audio/"),
    "ks1": ("12 keywords", "61,000 clips", "accuracy", "speech_commands_v0.01/, speech_commands_test_set_v0.01/"),
    "ks2": ("35 keywords", "106,000 clips", "accuracy", "speech_commands_v0.02/ (SpeechCommands/ around it or not)"),
    "voxceleb1": ("1251 speakers", "154,000 clips", "accuracy", "iden_split.txt, wav/ or dev/wav/ and test/wav/"),
    "iemocap": ("4 emotions", "5,531 clips", "accuracy, 5 folds", "Session1/ ... Session5/"),
    "audioset20k": (
        "527 labels",
        "42,000 clips",
        "mAP",
        "balanced_train_, eval_segments.csv, class_labels_indices.csv",
    ),
    "audioset2m": ("527 labels", "2.1 million clips", "mAP", "the same and unbalanced_train_segments.csv"),
}
