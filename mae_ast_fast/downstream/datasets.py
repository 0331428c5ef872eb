"""Public data sets, in the folder layouts in use, as manifests for ``finetune`` and ``probe``.

A reader takes the folder of a data set, or the folder above it, and returns one manifest row per clip: ``path`` below
that folder, ``label`` (``;`` separates several), ``split`` (train, valid, test) or ``fold``, and ``start`` and ``end``
in seconds if the clip is part of a file. Readers download nothing and decode no audio. From a folder that torchaudio's
dataset classes read, a reader returns the same clips without torchaudio (tests/downstream/test_datasets.py compares
them). Readers also take other layouts in use, and audio converted to another format under the same name.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..data.audio import find_audio
from ..files import atomic_write

_COLUMNS = ("path", "label", "phones", "split", "fold", "start", "end")
_COMMANDS = frozenset(("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"))
_NUM_WORDS = {1: 30, 2: 35}  # of the versions of Speech Commands
_EMOTIONS = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}


class ManifestRows(list[dict[str, str]]):
    """Rows of a manifest. ``missing`` names the clips that the data set lists but the folder does not contain."""

    def __init__(self, rows: Iterable[dict[str, str]], missing: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.missing = list(missing)


class _ListedClip(NamedTuple):
    """A clip that a data set lists: its name there, its path below the root (None: missing), and further columns."""

    name: str
    path: str | None
    columns: dict[str, str]


def write_manifest(rows: Iterable[dict[str, str]], path: str | os.PathLike[str]) -> None:
    """Write rows as a tab-separated manifest for ``manifest.read_task``, with each column that some row has.

    Args:
        rows: Rows with ``path``, ``label`` or ``phones``, ``split`` or ``fold``, and optionally ``start`` and ``end``.
        path: File to write; its folder is created.

    Raises:
        ValueError: No row, or a row with an unknown column.
    """
    rows, path = list(rows), Path(path)
    used = {name for row in rows for name in row}
    if not rows or not used <= set(_COLUMNS):
        raise ValueError(f"expected rows with some of {', '.join(_COLUMNS)}, got {sorted(used) or 'no row'}")

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            columns = [name for name in _COLUMNS if name in used]
            table = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def _locate(root: Path, names: Iterable[str], expected: str) -> Path:
    """The first of the named files or folders that exists in ``root`` or in one of its folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    content = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    for folder in (root, *(path for path in content if path.is_dir())):
        for name in names:
            if (folder / name).exists():
                return folder / name
    listing = ", ".join(path.name for path in content[:8]) + (" ..." if len(content) > 8 else "")
    raise FileNotFoundError(f"{root}: expected {expected}, here or in a folder here; found {listing or 'nothing'}")


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _audio_by_stem(root: Path) -> dict[str, str]:
    """The audio files below ``root``: path without suffix -> path, both relative to ``root``."""
    return {_stem(file.name): file.name for file in find_audio(root)}


def _prefix(root: Path, folder: Path) -> str:
    """Common prefix of the paths in ``folder``, relative to ``root``: empty, or ending in a slash."""
    relative = folder.relative_to(root).as_posix()
    return "" if relative == "." else relative + "/"


def _manifest_rows(root: Path, listed: Iterable[_ListedClip]) -> ManifestRows:
    """Rows of the clips that exist.

    Raises:
        FileNotFoundError: No clip exists.
    """
    rows, missing = [], []
    for clip in listed:
        if clip.path is None:
            missing.append(clip.name)
        else:
            rows.append({"path": clip.path, **clip.columns})
    if not rows:
        example = f", for example {missing[0]}" if missing else ""
        raise FileNotFoundError(f"{root}: none of the {len(missing)} clips of the data set exists{example}")
    return ManifestRows(rows, missing)


# ------------------------------------------------------------------------------------------------------------ readers


def esc50(root: Path) -> ManifestRows:
    """ESC-50: ``meta/esc50.csv`` and ``audio/``; 50 classes, 5 folds.

    Raises:
        FileNotFoundError: The table or all audio is missing.
        ValueError: The table lacks a column.
    """
    table = _locate(root, ["meta/esc50.csv"], "ESC-50: meta/esc50.csv and audio/")
    folder, audio = _prefix(root, table.parent.parent) + "audio/", _audio_by_stem(root)
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"filename", "fold", "category"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table}: expected columns filename, fold and category, got {reader.fieldnames}")
        listed = [
            _ListedClip(
                row["filename"],
                audio.get(_stem(folder + row["filename"])),
                {"label": row["category"], "fold": row["fold"]},
            )
            for row in reader
        ]
    return _manifest_rows(root, listed)


def _speech_commands(root: Path, version: int) -> tuple[Path, list[_ListedClip]]:
    """The folder that holds the words' folders, and the clips in it or in its lists, with word and split."""
    name = f"speech_commands_v0.0{version}"
    expected = f"Speech Commands v0.0{version}: validation_list.txt, testing_list.txt and a folder of each word"
    folder = _locate(root, [f"{name}/validation_list.txt", "validation_list.txt"], expected).parent
    if not (folder / "testing_list.txt").exists():
        raise FileNotFoundError(f"{folder}: expected {expected}; there is no testing_list.txt")
    splits: dict[str, str] = {}
    for split in ("valid", "test"):
        text = (folder / f"{split}{'ation' if split == 'valid' else 'ing'}_list.txt").read_text(encoding="utf-8")
        splits.update((_stem(line.strip()), split) for line in text.splitlines() if line.strip())
    prefix = _prefix(root, folder)
    paths: dict[str, str] = {}
    for stem, path in _audio_by_stem(root).items():
        word, _, recording = stem.removeprefix(prefix).partition("/")
        if stem.startswith(prefix) and "_nohash_" in recording and "/" not in recording:
            paths[f"{word}/{recording}"] = path
    words = {recording.partition("/")[0] for recording in paths}
    version_in_name = re.fullmatch(r"speech_commands_v0\.0(\d)", folder.name)
    if (version_in_name and int(version_in_name[1]) != version) or len(words) == _NUM_WORDS[3 - version]:
        raise ValueError(f"expected {expected} ({_NUM_WORDS[version]} of them), got {folder} with {len(words)} words")
    return folder, [
        _ListedClip(name, paths.get(name), {"label": name.partition("/")[0], "split": splits.get(name, "train")})
        for name in sorted({*paths, *splits})
    ]


def ks2(root: Path) -> ManifestRows:
    """Speech Commands v0.02, all 35 words, split by its ``validation_list.txt`` and ``testing_list.txt``.

    Raises:
        FileNotFoundError: A list or all audio is missing.
        ValueError: The folder holds the other version.
    """
    return _manifest_rows(root, _speech_commands(root, 2)[1])


def ks1(root: Path) -> ManifestRows:
    """Keyword spotting of SUPERB: Speech Commands v0.01, ten words, ``_unknown_`` (20 others) and ``_silence_``.

    As in SUPERB, the test set is the folder ``speech_commands_test_set_v0.01``, in ``root`` or next to the words'
    folder. Without it (``missing`` then names it) the test set is the data set's own test list. Silence is cut from
    ``_background_noise_`` in clips of 1 s: the last tenth of each file is for validation. Without a test folder the
    tenth before the last is for validation and the last one for testing.

    Raises:
        FileNotFoundError: A list, the noise, or all audio is missing.
        ValueError: The folder holds the other version.
    """
    folder, listed = _speech_commands(root, 1)
    audio, test_folder = _audio_by_stem(root), "speech_commands_test_set_v0.01/"
    sibling = test_folder if folder == root else _prefix(root, folder.parent) + test_folder
    test_clips = []
    for stem, path in audio.items():
        prefix = next((prefix for prefix in (sibling, test_folder) if stem.startswith(prefix)), None)
        label, _, recording = stem.removeprefix(prefix or "").partition("/")
        if prefix and recording and label in (*_COMMANDS, "_unknown_", "_silence_"):
            test_clips.append(_ListedClip(stem, path, {"label": label, "split": "test"}))
    clips = test_clips or [_ListedClip(test_folder, None, {})]
    for clip in listed:
        if not (test_clips and clip.columns["split"] == "test"):
            label = clip.columns["label"] if clip.columns["label"] in _COMMANDS else "_unknown_"
            clips.append(clip._replace(columns={**clip.columns, "label": label}))
    noise = [path for stem, path in audio.items() if stem.startswith(_prefix(root, folder) + "_background_noise_/")]
    if not noise:
        raise FileNotFoundError(f"{folder}: expected _background_noise_/ with recordings, to cut silence from")
    return _manifest_rows(root, [*clips, *_silence(root, noise, "valid" if test_clips else "test")])


def _silence(root: Path, paths: Iterable[str], last_split: str) -> Iterator[_ListedClip]:
    """Cut noise into clips of 1 s.

    Args:
        root: Folder of the data set.
        paths: Recordings of noise, relative to ``root``.
        last_split: Split of the last tenth of each file. If it is not "valid", the tenth before is "valid".
    """
    import soundfile

    for path in paths:
        try:
            seconds = int(soundfile.info(root / path).duration)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{root / path}: expected a recording of noise: {error.error_string}") from error
        for start in range(seconds):
            position = (start + 0.5) / seconds
            split = "train"
            if position > 0.9:
                split = last_split
            elif position > 0.8 and last_split != "valid":
                split = "valid"
            columns = {"label": "_silence_", "split": split, "start": str(start), "end": str(start + 1)}
            yield _ListedClip(path, path, columns)


def voxceleb1(root: Path) -> ManifestRows:
    """Speaker identification on VoxCeleb1, 1251 speakers.

    Reads ``iden_split.txt`` and files ``.../idXXXXX/VIDEO/NUMBER.wav`` in ``wav/``, in ``dev/wav/`` and ``test/wav/``,
    or in any other folder.

    Raises:
        FileNotFoundError: The list or all audio is missing.
        ValueError: A line of the list is malformed.
    """
    table = _locate(root, ["iden_split.txt"], "VoxCeleb1: iden_split.txt and wav/idXXXXX/VIDEO/NUMBER.wav")
    audio = {"/".join(stem.split("/")[-3:]): path for stem, path in _audio_by_stem(root).items()}
    listed = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            match = re.fullmatch(r"([123])\s+((id\d+)/\S+/\S+)", line.strip())
            if not match:
                raise ValueError(
                    f"{table}, line {number}: expected 1, 2 or 3 and idXXXXX/VIDEO/NUMBER.wav, got {line!r}"
                )
            split = ("train", "valid", "test")[int(match[1]) - 1]
            listed.append(_ListedClip(match[2], audio.get(_stem(match[2])), {"label": match[3], "split": split}))
    return _manifest_rows(root, listed)


def iemocap(root: Path) -> ManifestRows:
    """Emotion recognition on IEMOCAP as in SUPERB: neu, hap (with exc), ang, sad; the 5 sessions are the folds.

    Reads ``SessionN/sentences/wav/DIALOG/*.wav`` and ``SessionN/dialog/EmoEvaluation/*.txt`` in ``root`` or in one of
    its folders (IEMOCAP, IEMOCAP_full_release).

    Raises:
        FileNotFoundError: All sessions, labels, or audio files are missing.
    """
    sessions = [f"Session{number}" for number in range(1, 6)]
    expected = "IEMOCAP: Session1 ... Session5 with sentences/wav/ and dialog/EmoEvaluation/"
    folder, audio = _locate(root, sessions, expected).parent, _audio_by_stem(root)
    listed: list[_ListedClip] = []
    for fold, session in enumerate(sessions, 1):
        tables = sorted((folder / session / "dialog/EmoEvaluation").glob("[!.]*.txt"))
        if not tables:
            listed.append(_ListedClip(f"{session}/dialog/EmoEvaluation/*.txt", None, {}))
        prefix = f"{_prefix(root, folder)}{session}/sentences/wav/"
        for table in tables:
            text = table.read_text(encoding="utf-8", errors="replace")
            for utterance, emotion in re.findall(r"^\[[^\]]*\]\t(\S+)\t(\w+)", text, re.MULTILINE):
                if emotion in _EMOTIONS:
                    path = audio.get(f"{prefix}{utterance.rpartition('_')[0]}/{utterance}")
                    listed.append(_ListedClip(utterance, path, {"label": _EMOTIONS[emotion], "fold": str(fold)}))
    return _manifest_rows(root, listed)


def audioset20k(root: Path) -> ManifestRows:
    """AudioSet's balanced training set, tested on its evaluation set; 527 classes, several per clip.

    Reads ``balanced_train_segments.csv``, ``eval_segments.csv`` and ``class_labels_indices.csv``. The clips of 10 s can
    be in any folders and formats. They are named by the video: ``ID``, ``YID`` or ``id_ID``, optionally followed by
    ``_START`` or ``_START_END``. Many videos are no longer available: ``missing`` lists their clips. Labels are the
    display names, with ``,`` in place of ``;``.

    Raises:
        FileNotFoundError: A table or all audio is missing.
        ValueError: A table is malformed.
    """
    return _audioset(root, {"balanced_train": "train", "eval": "test"})


def audioset2m(root: Path) -> ManifestRows:
    """The whole of AudioSet: as ``audioset20k``, with ``unbalanced_train_segments.csv``."""
    return _audioset(root, {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"})


def _audioset(root: Path, subsets: dict[str, str]) -> ManifestRows:
    """Read AudioSet; ``subsets`` gives the split of each official subset."""
    tables = ", ".join(f"{subset}_segments.csv" for subset in subsets)
    expected = f"AudioSet: class_labels_indices.csv, {tables} and audio"
    segments = {subset: _locate(root, [f"{subset}_segments.csv"], expected) for subset in subsets}
    class_names = _class_names(_locate(root, ["class_labels_indices.csv"], expected))
    audio: dict[str, str] = {}
    for stem, path in _audio_by_stem(root).items():
        name = PurePosixPath(stem).name
        for prefix in ("", "Y", "id_"):
            # A video's identifier has 11 characters and may itself begin with Y or contain an underscore.
            if name.startswith(prefix) and re.fullmatch(r"[\w-]{11}(_[\d.]+){0,2}", name[len(prefix) :], re.ASCII):
                audio.setdefault(name[len(prefix) :][:11], path)
    listed = []
    for subset, split in subsets.items():
        table = segments[subset]
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True):
                unknown = [mid for mid in row[-1].split(",") if mid not in class_names] if row else []
                if row and (len(row) != 4 or unknown):
                    raise ValueError(f"{table}: expected YTID, start, end, labels of the class list, got {row}")
                if row:
                    label = ";".join(class_names[mid] for mid in row[3].split(","))
                    columns = {"label": label, "split": split}
                    listed.append(_ListedClip(f"{subset} {row[0]}", audio.get(row[0]), columns))
    return _manifest_rows(root, listed)


def _class_names(table: Path) -> dict[str, str]:
    """Class identifier (mid) -> unique display name without ``;``."""
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        if not {"mid", "display_name"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table}: expected columns index, mid and display_name, got {reader.fieldnames}")
        names = {row["mid"]: row["display_name"].replace(";", ",") for row in reader}
    counts = Counter(names.values())
    return {mid: name if counts[name] == 1 else f"{name} ({mid})" for mid, name in names.items()}


READERS: dict[str, Callable[[Path], ManifestRows]] = {
    "esc50": esc50,
    "ks1": ks1,
    "ks2": ks2,
    "voxceleb1": voxceleb1,
    "iemocap": iemocap,
    "audioset20k": audioset20k,
    "audioset2m": audioset2m,
}
# Classes, number of clips, metric, and content of the folder --root.
ABOUT = {
    "esc50": ("50 classes of sounds", "2,000 clips", "accuracy, 5 folds", "meta/esc50.csv, audio/"),
    "ks1": ("12 keywords", "61,000 clips", "accuracy", "speech_commands_v0.01/, speech_commands_test_set_v0.01/"),
    "ks2": ("35 keywords", "106,000 clips", "accuracy", "speech_commands_v0.02/, in SpeechCommands/ or not"),
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
