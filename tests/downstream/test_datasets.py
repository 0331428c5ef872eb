"""Readers of public data sets on tiny trees of the real layouts, compared with torchaudio's classes if it has one."""

from __future__ import annotations

import csv
import wave
from collections import Counter
from pathlib import Path

import pytest

from mae_ast_fast.cli import main
from mae_ast_fast.downstream import datasets
from mae_ast_fast.downstream.datasets import READERS, write_manifest
from mae_ast_fast.downstream.manifest import read_task


def touch_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def by_path(rows) -> dict[str, str]:
    """path -> label and split or fold."""
    return {row["path"]: f"{row['label']} {row.get('split') or row['fold']}" for row in rows}


def check_manifest(rows, tmp_path: Path, root: Path):
    """Checks that ``read_task`` returns the same clips as the rows."""
    write_manifest(rows, tmp_path / "m.tsv")
    task = read_task(tmp_path / "m.tsv", root)
    assert len(task.clips) == len(rows)
    for clip, row in zip(task.clips, rows, strict=True):
        assert Path(clip.path) == root / row["path"] and Path(clip.path).is_file()
        assert clip.labels == tuple(row["label"].split(";"))
        assert (clip.fold or clip.split) == (row.get("fold") or row["split"])
        assert (clip.start, clip.end) == (float(row.get("start", 0)), float(row.get("end", 0)))
    return task


# ------------------------------------------------------------------------------------------------------------ ESC-50


def esc50_tree(root: Path) -> Path:
    clips = ["1-100032-A-0,1,0,dog", "2-100210-A-36,2,36,vacuum_cleaner", "5-9032-A-0,5,0,dog"]
    lines = [clip.replace(",", ".wav,", 1) + ",True,100032,A" for clip in clips]
    text(root / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take", *lines)
    touch_files(root, *(f"audio/{clip.partition(',')[0]}.wav" for clip in clips))
    return root


def test_esc50_real_layout_gives_folds(tmp_path):
    root = esc50_tree(tmp_path / "data/ESC-50-master")
    rows = READERS["esc50"](root)
    assert by_path(rows) == {
        "audio/1-100032-A-0.wav": "dog 1",
        "audio/2-100210-A-36.wav": "vacuum_cleaner 2",
        "audio/5-9032-A-0.wav": "dog 5",
    }
    assert rows.missing == []
    assert len(check_manifest(rows, tmp_path, root).folds()) == 3
    above = READERS["esc50"](root.parent)
    assert [row["path"] for row in above] == [f"ESC-50-master/{row['path']}" for row in rows]
    check_manifest(above, tmp_path, root.parent)


def test_esc50_converted_audio_is_used_and_missing_audio_is_listed(tmp_path):
    root = esc50_tree(tmp_path)
    (root / "audio/1-100032-A-0.wav").rename(root / "audio/1-100032-A-0.flac")
    (root / "audio/5-9032-A-0.wav").unlink()
    rows = READERS["esc50"](root)
    assert [row["path"] for row in rows] == ["audio/1-100032-A-0.flac", "audio/2-100210-A-36.wav"]
    assert rows.missing == ["5-9032-A-0.wav"]


def test_readers_wrong_folder_error_names_expected_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        READERS["esc50"](tmp_path / "nowhere")
    text(tmp_path / "other/readme.md", "x")
    for name in READERS:
        with pytest.raises(FileNotFoundError, match=r"expected .*, here or in a folder here; found other"):
            READERS[name](tmp_path)
    root = esc50_tree(tmp_path / "esc")
    (root / "audio").rename(root / "sounds")
    missing = "none of the 3 clips of the data set exists, for example 1-100032-A-0"
    with pytest.raises(FileNotFoundError, match=missing):
        READERS["esc50"](root)
    text(root / "meta/esc50.csv", "file,class", "a,b")
    with pytest.raises(ValueError, match=r"expected columns filename, fold and category, got \['file', 'class'\]"):
        READERS["esc50"](root)


# ---------------------------------------------------------------------------------------------------- Speech Commands

SPEAKERS = ("0a7c2a8d", "1b4c9b89", "f2e59fea", "00b01445")  # of each word: two train, one validates, one tests


def speech_commands_tree(root: Path, words: tuple[str, ...], noise_seconds: int = 20) -> Path:
    for word in words:
        touch_files(root, *(f"{word}/{speaker}_nohash_0.wav" for speaker in SPEAKERS))
    text(root / "validation_list.txt", *(f"{word}/{SPEAKERS[2]}_nohash_0.wav" for word in words))
    text(root / "testing_list.txt", *(f"{word}/{SPEAKERS[3]}_nohash_0.wav" for word in words))
    (root / "_background_noise_").mkdir()
    with wave.open(str(root / "_background_noise_/pink_noise.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2 * (16000 * noise_seconds + 300)))
    text(root / "_background_noise_/README.md", "noise")
    return root


def test_ks2_equals_torchaudio(tmp_path):
    speechcommands = pytest.importorskip("torchaudio").datasets.SPEECHCOMMANDS
    speech_commands_tree(tmp_path / "SpeechCommands/speech_commands_v0.02", ("bed", "backward", "yes"))
    rows = READERS["ks2"](tmp_path)
    for split, subset in (("train", "training"), ("valid", "validation"), ("test", "testing")):
        official = speechcommands(tmp_path, "speech_commands_v0.02", subset=subset)
        metadata = map(official.get_metadata, range(len(official)))
        expected = {f"SpeechCommands/{path}": label for path, _, label, *_ in metadata}
        assert {row["path"]: row["label"] for row in rows if row["split"] == split} == expected
        assert len(expected) == (6 if split == "train" else 3)
    check_manifest(rows, tmp_path, tmp_path)


@pytest.mark.parametrize("folder", ["", "speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02"])
def test_ks2_nested_folders_are_found(tmp_path, folder):
    root = tmp_path / "data"
    speech_commands_tree(root / folder, ("bed", "yes"))
    (root / folder / "yes" / f"{SPEAKERS[3]}_nohash_0.wav").unlink()
    rows = READERS["ks2"](root)
    assert Counter(row["split"] for row in rows) == {"train": 4, "valid": 2, "test": 1}
    assert rows.missing == [f"yes/{SPEAKERS[3]}_nohash_0"]
    check_manifest(rows, tmp_path, root)


@pytest.mark.parametrize("official", ["speech_commands_test_set_v0.01", "inner/speech_commands_test_set_v0.01", None])
def test_ks1_with_and_without_test_folder_gives_superb_splits(tmp_path, official):
    pytest.importorskip("soundfile", reason="needs soundfile")  # reads the duration of the noise
    root = tmp_path / "data"
    folder = speech_commands_tree(root / "inner/speech_commands_v0.01", ("bed", "yes", "no"))
    if official:
        touch_files(
            root / official, "_silence_/a.wav", "_unknown_/b.wav", "yes/c.wav.wav", "LICENSE", "no/d_nohash_0.wav"
        )
    rows = READERS["ks1"](root)
    prefix = folder.relative_to(root).as_posix()
    split = {SPEAKERS[0]: "train", SPEAKERS[1]: "train", SPEAKERS[2]: "valid", SPEAKERS[3]: "test"}
    expected = {
        f"{prefix}/{word}/{speaker}_nohash_0.wav": f"{'_unknown_' if word == 'bed' else word} {split[speaker]}"
        for word in ("bed", "yes", "no")
        for speaker in SPEAKERS
        if not (official and split[speaker] == "test")
    }
    if official:
        test_labels = {"_silence_/a.wav": "_silence_", "_unknown_/b.wav": "_unknown_", "yes/c.wav.wav": "yes"}
        test_labels["no/d_nohash_0.wav"] = "no"
        expected.update({f"{official}/{name}": f"{label} test" for name, label in test_labels.items()})
    assert by_path([row for row in rows if "start" not in row]) == expected
    silence = [row for row in rows if "start" in row]
    assert {(row["path"], row["label"]) for row in silence} == {
        (f"{prefix}/_background_noise_/pink_noise.wav", "_silence_")
    }
    assert [(row["start"], row["end"]) for row in silence] == [(str(i), str(i + 1)) for i in range(20)]
    last_splits = ["valid"] * 2 if official else ["valid"] * 2 + ["test"] * 2
    assert [row["split"] for row in silence] == ["train"] * (20 - len(last_splits)) + last_splits
    assert rows.missing == ([] if official else ["speech_commands_test_set_v0.01/"])
    check_manifest(rows, tmp_path, root)


def test_speech_commands_wrong_version_raises(tmp_path):
    speech_commands_tree(tmp_path / "speech_commands_v0.02", ("yes",))
    with pytest.raises(ValueError, match=r"expected Speech Commands v0\.01.*30 of them.*v0\.02 with 1 words"):
        READERS["ks1"](tmp_path)
    for name, words in (("ks1", 35), ("ks2", 30)):
        root = speech_commands_tree(tmp_path / name, tuple(f"word{i}" for i in range(words)))
        with pytest.raises(ValueError, match=f"with {words} words"):
            READERS[name](root)
    (tmp_path / "ks1/testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no testing_list\.txt"):
        READERS["ks1"](tmp_path / "ks1")


def test_speech_commands_both_versions_are_kept_apart(tmp_path):
    pytest.importorskip("soundfile", reason="needs soundfile")  # reads the duration of the noise
    for version in (1, 2):
        speech_commands_tree(tmp_path / f"speech_commands_v0.0{version}", ("yes", "no"))
    for version in (1, 2):
        paths = {row["path"].partition("/")[0] for row in READERS[f"ks{version}"](tmp_path)}
        assert paths == {f"speech_commands_v0.0{version}"}


def test_ks1_missing_or_broken_noise_raises(tmp_path):
    pytest.importorskip("soundfile", reason="needs soundfile")  # reads the duration of the noise
    root = speech_commands_tree(tmp_path, ("yes",))
    noise = root / "_background_noise_/pink_noise.wav"
    noise.write_bytes(b"RIFF no")
    with pytest.raises(ValueError, match="expected a recording of noise"):
        READERS["ks1"](root)
    noise.unlink()
    with pytest.raises(FileNotFoundError, match="expected _background_noise_"):
        READERS["ks1"](root)


# ---------------------------------------------------------------------------------------------------------- VoxCeleb1

VOX = ("1 id10001/1zcIwhmdeo4/00001.wav", "2 id10001/7gWzIy6yIIk/00001.wav", "3 id10270/x6uYqmx31kE/00001.wav")


@pytest.mark.parametrize("folders", [("wav", "wav", "wav"), ("dev/wav", "dev/wav", "test/wav"), ("", "", "")])
def test_voxceleb1_layouts_give_official_splits(tmp_path, folders):
    root = tmp_path / "VoxCeleb1"
    text(root / "iden_split.txt", *VOX)
    names = [line.partition(" ")[2] for line in VOX]
    paths = [f"{folder}/{name}".lstrip("/") for folder, name in zip(folders, names, strict=True)]
    touch_files(root, *paths)
    rows = READERS["voxceleb1"](root)
    labels = ["id10001 train", "id10001 valid", "id10270 test"]
    assert by_path(rows) == dict(zip(paths, labels, strict=True)) and rows.missing == []
    check_manifest(rows, tmp_path, root)
    (root / paths[1]).unlink()
    assert READERS["voxceleb1"](root).missing == [names[1]]
    text(root / "iden_split.txt", VOX[0], "4 id10001/a/b.wav")
    with pytest.raises(ValueError, match="line 2: expected 1, 2 or 3"):
        READERS["voxceleb1"](root)


def test_voxceleb1_equals_torchaudio(tmp_path):
    identification = pytest.importorskip("torchaudio").datasets.VoxCeleb1Identification
    text(tmp_path / "iden_split.txt", *VOX)
    touch_files(tmp_path, *(f"wav/{line.partition(' ')[2]}" for line in VOX))
    rows = READERS["voxceleb1"](tmp_path)
    for split, subset in (("train", "train"), ("valid", "dev"), ("test", "test")):
        official = identification(tmp_path, subset)
        metadata = map(official.get_metadata, range(len(official)))
        expected = {(f"wav/{path}", speaker) for path, _, speaker, _ in metadata}
        assert {(row["path"], int(row["label"][3:])) for row in rows if row["split"] == split} == expected != set()


# ------------------------------------------------------------------------------------------------------------ IEMOCAP


def iemocap_tree(root: Path) -> dict[str, str]:
    """5 sessions of an improvised and a scripted dialog. Returns path -> label and fold of the used clips."""
    emotions = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad", "fru": "", "xxx": "", "sur": ""}
    used = {}
    for session in range(1, 6):
        for dialog in (f"Ses0{session}F_impro01", f"Ses0{session}M_script01_1b"):
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for number, emotion in enumerate(emotions):
                utterance = f"{dialog}_{'FM'[number % 2]}{number:03d}"
                path = f"Session{session}/sentences/wav/{dialog}/{utterance}.wav"
                touch_files(root, path)
                lines += [f"[{number}.2901 - {number + 1}.2357]\t{utterance}\t{emotion}\t[2.5000, 2.5000, 2.5000]"]
                lines += ["C-E2:\tNeutral;\t()", "A-E3:\tval 3; act 2; dom  2;\t()", ""]
                if emotions[emotion]:
                    used[path] = f"{emotions[emotion]} {session}"
            text(root / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt", *lines)
            touch_files(root, f"Session{session}/dialog/EmoEvaluation/._{dialog}.txt")
        touch_files(root, f"Session{session}/dialog/wav/Ses0{session}F_impro01.wav")
    return used


def test_iemocap_equals_torchaudio(tmp_path):
    used = iemocap_tree(tmp_path / "IEMOCAP")
    rows = READERS["iemocap"](tmp_path)
    assert by_path(rows) == {f"IEMOCAP/{path}": label for path, label in used.items()} and len(rows) == 50
    check_manifest(rows, tmp_path, tmp_path)
    iemocap = pytest.importorskip("torchaudio").datasets.IEMOCAP
    for session in range(1, 6):
        official = iemocap(tmp_path, (session,))
        metadata = map(official.get_metadata, range(len(official)))
        expected = {
            (f"IEMOCAP/{path}", {"exc": "hap"}.get(label, label)) for path, _, _, label, _ in metadata if label != "fru"
        }
        assert {(row["path"], row["label"]) for row in rows if row["fold"] == str(session)} == expected


@pytest.mark.parametrize("folder", ["", "IEMOCAP_full_release"])
def test_iemocap_nested_folder_is_found_and_gaps_are_listed(tmp_path, folder):
    root = tmp_path / "data"
    used = iemocap_tree(root / folder)
    missing = min(used)
    (root / folder / missing).unlink()
    for path in (root / folder / "Session4/dialog/EmoEvaluation").iterdir():
        path.unlink()
    rows = READERS["iemocap"](root)
    prefix = f"{folder}/" if folder else ""
    assert by_path(rows) == {
        prefix + path: label for path, label in used.items() if path != missing and not label.endswith(" 4")
    }
    assert rows.missing == [Path(missing).stem, "Session4/dialog/EmoEvaluation/*.txt"]


# ----------------------------------------------------------------------------------------------------------- AudioSet

# Real identifiers have 11 characters: a leading dash, underscores, a leading Y, or trailing digits occur.
BALANCED = ("--PJHxphWEs", "Y_BQ6A1_30A", "_d4j7_30_40")
EVAL = ("YYfgAcw0Q0k", "12345678901")
UNBALANCED = ("aaaaaaaaaaY",)
CLASSES = (
    '0,/m/09x0r,"Speech"',
    '1,/m/05zppz,"Male speech, man speaking"',
    '2,/t/dd00088,"Gush"',
    '3,/m/a,"Hum; low"',
    '4,/m/b,"Tap"',
    '5,/m/c,"Tap"',
)


def audioset_tree(root: Path) -> None:
    head = (
        "# Segments csv created Sun Mar  5 10:54:31 2017",
        "# num_ytids=5",
        "# YTID, start_seconds, ...",
    )
    text(root / "class_labels_indices.csv", "index,mid,display_name", *CLASSES)
    labels = ('"/m/09x0r,/t/dd00088"', '"/m/05zppz"', '"/m/a,/m/b,/m/c"')
    for subset, ids in (("balanced_train", BALANCED), ("eval", EVAL), ("unbalanced_train", UNBALANCED)):
        lines = [f"{name}, 30.000, 40.000, {label}" for name, label in zip(ids, labels, strict=False)]
        text(root / f"{subset}_segments.csv", *head, *lines)


@pytest.mark.parametrize(
    "naming",
    [
        "{}.wav",
        "audio/Y{}.flac",
        "{subset}_segments/Y{}.wav",
        "{subset}/{}_30.000_40.000.wav",
        "{}_30.m4a",
        "a/b/{}_30000_40000.mp3",
        "id_{}.wav",
        "Y{}_30.000.opus",
    ],
)
def test_audioset_file_namings_in_use_are_found(tmp_path, naming):
    audioset_tree(tmp_path)
    paths = {}
    for subset, ids in (("balanced_train", BALANCED), ("eval", EVAL), ("unbalanced_train", UNBALANCED)):
        paths.update({name: naming.format(name, subset=subset) for name in ids})
    touch_files(tmp_path, *paths.values())
    expected = {
        BALANCED[0]: "Speech;Gush train",
        BALANCED[1]: "Male speech, man speaking train",
        BALANCED[2]: "Hum, low;Tap (/m/b);Tap (/m/c) train",
        EVAL[0]: "Speech;Gush test",
        EVAL[1]: "Male speech, man speaking test",
    }
    rows = READERS["audioset20k"](tmp_path)
    assert by_path(rows) == {paths[name]: label for name, label in expected.items()} and rows.missing == []
    assert check_manifest(rows, tmp_path, tmp_path).multi_label
    expected[UNBALANCED[0]] = "Speech;Gush train"
    assert by_path(READERS["audioset2m"](tmp_path)) == {paths[name]: label for name, label in expected.items()}
    (tmp_path / paths[EVAL[1]]).unlink()
    (tmp_path / paths[BALANCED[0]]).unlink()
    rows = READERS["audioset20k"](tmp_path)
    assert len(rows) == 3 and rows.missing == [f"balanced_train {BALANCED[0]}", f"eval {EVAL[1]}"]


def test_audioset_nested_tables_are_found_and_malformed_ones_raise(tmp_path):
    audioset_tree(tmp_path / "metadata")
    touch_files(tmp_path, *(f"clips/{name}.wav" for name in BALANCED))
    assert len(READERS["audioset20k"](tmp_path)) == 3
    table = tmp_path / "metadata/eval_segments.csv"
    text(table, '12345678901, 0.000, 10.000, "/m/09x0r,/m/zzz"')
    with pytest.raises(ValueError, match=r"expected YTID, start, end, labels of the class list, got \['12345678901'"):
        READERS["audioset20k"](tmp_path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected AudioSet: .*eval_segments\.csv"):
        READERS["audioset20k"](tmp_path)
    text(tmp_path / "metadata/class_labels_indices.csv", "a,b", "1,2")
    audioset_tree(tmp_path / "other")
    text(tmp_path / "metadata/class_labels_indices.csv", "a,b", "1,2")
    with pytest.raises(ValueError, match="expected columns index, mid and display_name"):
        READERS["audioset20k"](tmp_path)


# ----------------------------------------------------------------------------------------------------------- manifest


def test_write_manifest_round_trip_equals_rows(tmp_path):
    rows = [
        {"path": 'a "b"/c,d.wav', "label": "Fly, housefly;ㄅ", "split": "train", "start": "1.5", "end": "2"},
        {"path": "e.wav", "label": '"', "fold": "2"},
    ]
    write_manifest(rows, tmp_path / "new/folder/m.tsv")
    with open(tmp_path / "new/folder/m.tsv", encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        assert table.fieldnames == ["path", "label", "split", "fold", "start", "end"]
        assert [{name: cell for name, cell in row.items() if cell} for row in table] == rows
    for wrong in ([], [{"path": "a", "labels": "b"}]):
        with pytest.raises(ValueError, match="expected rows with some of path, label"):
            write_manifest(wrong, tmp_path / "wrong.tsv")
    assert not (tmp_path / "wrong.tsv").exists()


# ------------------------------------------------------------------------------------------------------------ command


def test_tasks_command_without_names_lists_tasks(capsys):
    assert main(["tasks"]) == 0
    listing = capsys.readouterr().out
    for name in (*READERS, "zh_initial22", "hogvoice14", "sid32", "esc14", "vocal4", "ru_phone"):
        assert f"\n  {name} " in listing
    assert set(datasets.ABOUT) == set(READERS)


def test_tasks_command_public_data_set_writes_manifest(tmp_path, capsys):
    root = esc50_tree(tmp_path / "ESC-50 master")
    (root / "audio/5-9032-A-0.wav").unlink()
    out = tmp_path / "esc50.tsv"
    assert main(["tasks", "esc50", "--root", str(root), "--out", str(out)]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 2 clips, 2 classes; fold 1 1, fold 2 1"
    names = out.with_suffix(".missing.txt")
    assert second == f"missing clips: 1, such as 5-9032-A-0.wav; {names} lists them"
    assert names.read_text() == "5-9032-A-0.wav\n"
    command = f"mae-ast-fast finetune --data {out} --root '{root}' --checkpoint runs/frame --out runs/esc50"
    assert last == f"Next: {command}"
    assert [Path(clip.path) for clip in read_task(out, root).clips] == [
        root / "audio/1-100032-A-0.wav",
        root / "audio/2-100210-A-36.wav",
    ]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["esc5O"], 2, "unknown task esc5O; did you mean esc50?"),
        (["qqq"], 2, "unknown task qqq; known are zh_initial22, "),
        (["esc50"], 2, "esc50 needs --root, the folder with meta/esc50.csv, audio/"),
        (["esc50", "ks1", "--root", "x"], 2, "esc50 is a public data set and must be the only NAME, got esc50, ks1"),
        (["zh_initial22", "--root", "x"], 2, "--root needs a public data set as NAME, one of esc50, "),
        (["--root", "x"], 2, "--root needs a public data set as NAME"),
        (["esc50", "--root", "nowhere"], 1, "no such folder: nowhere"),
    ],
)
def test_tasks_command_wrong_arguments_exit_with_message(argv, code, message, capsys):
    assert main(["tasks", *argv]) == code
    assert message in capsys.readouterr().err
