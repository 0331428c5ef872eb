"""Manifests of labelled audio, their splits and folds, and the waveforms of their clips."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mae_ast_fast.downstream.audio import Waveforms, batches
from mae_ast_fast.downstream.manifest import read_task

soundfile, *_ = (pytest.importorskip(name) for name in ("soundfile", "soxr", "lhotse"))
RATE = 16000


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def manifest(tmp_path: Path, rows: list[str], header: str = "path\tlabel\tsplit", name: str = "t.tsv") -> Path:
    column = header.replace(",", "\t").lower().split("\t").index("path")
    for row in rows:
        file = tmp_path / row.replace(",", "\t").split("\t")[column].strip('"')
        if not file.exists():
            write(file, "")
    return write(tmp_path / name, "\n".join([header, *rows]) + "\n")


SPLIT = ["a.wav\tdog\ttrain", "b.wav\tcat\ttrain", "c.wav\tdog\tvalid", "d.wav\tcat\ttest"]


def test_read_task_splits_give_one_fold(tmp_path):
    task = read_task(manifest(tmp_path, SPLIT))
    (fold,) = task.folds()
    assert (task.name, task.labels, task.multi_label, task.frame_level) == ("t", ["cat", "dog"], False, False)
    assert (fold.name, fold.train, fold.valid, fold.test) == ("", [0, 1], [2], [3])
    assert [clip.path for clip in task.clips] == [str(tmp_path / f"{x}.wav") for x in "abcd"]
    assert task.targets().tolist() == [[False, True], [True, False], [False, True], [True, False]]


@pytest.mark.parametrize(
    "words", [("training", "validation", "testing"), ("Train", "DEV", "eval"), ("train", "val", "test")]
)
def test_read_task_other_split_names_are_recognised(tmp_path, words):
    rows = [row.replace("train", "T0").replace("valid", "T1").replace("test", "T2") for row in SPLIT]
    for i, word in enumerate(words):
        rows = [row.replace(f"T{i}", word) for row in rows]
    assert [clip.split for clip in read_task(manifest(tmp_path, rows)).clips] == ["train", "train", "valid", "test"]


def test_read_task_csv_with_quotes_byte_order_mark_and_column_order_is_read(tmp_path):
    rows = ['train,"one, two",x,a.wav', "test,ü,y,b.wav", 'valid,"one, two",z,c.wav']
    path = manifest(tmp_path, [], "split,label,more,path", "m.csv")
    for name in "abc":
        write(tmp_path / f"{name}.wav", "")
    path.write_bytes(b"\xef\xbb\xbf" + ("split,Label,more,path\r\n" + "\r\n".join(rows) + "\r\n").encode())
    task = read_task(path)
    assert task.labels == ["one, two", "ü"]
    assert [clip.split for clip in task.clips] == ["train", "test", "valid"]


def test_read_task_numeric_labels_sort_by_value(tmp_path):
    rows = [f"{i}.wav\t{label}\ttrain" for i, label in enumerate(["10", "9", "2", "b", "a"])]
    assert read_task(manifest(tmp_path, rows)).labels == ["2", "9", "10", "a", "b"]


def test_read_task_several_labels_is_multi_label(tmp_path):
    rows = ["a.wav\tdog; cat\ttrain", "b.wav\tcat\ttrain", "c.wav\t\tvalid", "d.wav\tbird;bird\ttest"]
    task = read_task(manifest(tmp_path, rows))
    assert task.multi_label
    assert [clip.labels for clip in task.clips] == [("dog", "cat"), ("cat",), (), ("bird",)]
    assert task.targets().sum(1).tolist() == [2, 1, 0, 1]
    assert read_task(manifest(tmp_path, SPLIT), multi_label=True).multi_label


def test_read_task_paths_are_looked_up_in_manifest_folder_then_root(tmp_path):
    rows = ["here.wav\ta\ttrain", "there.wav\tb\ttest", f"{tmp_path}/far/away.wav\ta\tvalid"]
    for name in ("data/here.wav", "audio/there.wav", "audio/here.wav", "far/away.wav"):
        write(tmp_path / name, "")
    path = write(tmp_path / "data/t.tsv", "\n".join(["path\tlabel\tsplit", *rows]))
    task = read_task(path, tmp_path / "audio")
    paths = [Path(clip.path).relative_to(tmp_path).as_posix() for clip in task.clips]
    assert paths == ["data/here.wav", "audio/there.wav", "far/away.wav"]
    with pytest.raises(FileNotFoundError, match=r"none of the 4 files .* a\.wav is not in .*empty nor in .*nowhere"):
        read_task(write(tmp_path / "empty/t.tsv", "\n".join(["path\tlabel\tsplit", *SPLIT])), tmp_path / "nowhere")


def test_read_task_home_and_windows_paths_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("home/a.wav", "sub/b.wav", "sub/~c.wav"):
        write(tmp_path / name, "")
    rows = ["~/a.wav\tdog\ttrain", "sub\\b.wav\tcat\tvalid", "sub/~c.wav\tdog\ttest", "none\\d.wav\tcat\ttest"]
    task = read_task(write(tmp_path / "t.tsv", "\n".join(["path\tlabel\tsplit", *rows]) + "\n"))
    names = ["home/a.wav", "sub/b.wav", "sub/~c.wav", "none\\d.wav"]
    assert [clip.path for clip in task.clips] == [str(tmp_path / name) for name in names]


def test_folds_each_tests_once_and_next_one_validates(tmp_path):
    rows = [f"{fold}{label}.wav\t{label}\t{fold}\ttrain" for fold in ("1", "2", "10") for label in "ab"]
    task = read_task(manifest(tmp_path, rows, "path\tlabel\tfold\tsplit"))
    folds = task.folds()
    assert [fold.name for fold in folds] == ["1", "2", "10"]
    assert [(fold.train, fold.valid, fold.test) for fold in folds] == [
        ([4, 5], [2, 3], [0, 1]),
        ([0, 1], [4, 5], [2, 3]),
        ([2, 3], [0, 1], [4, 5]),
    ]


@pytest.mark.parametrize("column", ["split", "fold"])
def test_folds_without_validation_clips_draws_some_of_every_class(tmp_path, column):
    rows = [f"{label}{i}.wav\t{label}\t{0 if column == 'fold' else 'train'}" for label in "abc" for i in range(20)]
    rows += [f"{label}{x}.wav\t{label}\t{1 if column == 'fold' else 'test'}" for x in "xy" for label in "abc"]
    task = read_task(manifest(tmp_path, rows, f"path\tlabel\t{column}"))
    fold = task.folds(seed=1)[-1 if column == "fold" else 0]
    assert Counter(task.clips[i].labels[0] for i in fold.valid) == {"a": 3, "b": 3, "c": 3}
    assert sorted(fold.train + fold.valid) == list(range(60))
    assert fold.test == [*range(60, 66)]
    assert task.folds(seed=1)[-1 if column == "fold" else 0] == fold
    assert task.folds(seed=2)[-1 if column == "fold" else 0] != fold


def test_folds_drawn_validation_clips_take_whole_files(tmp_path):
    rows = [f"{i % 5}.wav\t{'ab'[i % 2]}\ttrain\t{i}\t{i + 1}" for i in range(20)] + ["x.wav\ta\ttest\t\t"]
    task = read_task(manifest(tmp_path, rows, "path\tlabel\tsplit\tstart\tend"))
    (fold,) = task.folds()
    assert fold.valid
    assert not {task.clips[i].name for i in fold.train} & {task.clips[i].name for i in fold.valid}


def test_read_task_file_in_two_splits_gives_note(tmp_path):
    assert "1 file is in more than one split" in read_task(manifest(tmp_path, [*SPLIT, "a.wav\tdog\ttest"])).notes[0]
    assert read_task(manifest(tmp_path, SPLIT)).notes == []


def test_read_task_missing_fold_raises(tmp_path):
    rows = ["a.wav\tx\t1.0\ttrain", "b.wav\ty\t2.0\ttrain", "c.wav\ty\t\ttest"]
    with pytest.raises(ValueError, match=r"1 of 3 clips have no fold, for example c\.wav"):
        read_task(manifest(tmp_path, rows, "path\tlabel\tfold\tsplit"))


def test_read_task_folds_named_like_splits_raise(tmp_path):
    with pytest.raises(ValueError, match=r"the folds are \['test', 'train'\]: name the column split"):
        read_task(manifest(tmp_path, ["a.wav\tx\ttrain", "b.wav\ty\ttest"], "path\tlabel\tfold"))


def test_read_task_single_fold_with_splits_uses_splits(tmp_path):
    rows = ["a.wav\tx\t1\ttrain", "b.wav\ty\t1\tvalid", "c.wav\ty\t1\ttest"]
    task = read_task(manifest(tmp_path, rows, "path\tlabel\tfold\tsplit"))
    assert task.notes == ["all clips are in fold 1: the column split is used"]
    assert [fold.name for fold in task.folds()] == [""]


def test_read_task_unclosed_quote_raises(tmp_path):
    rows = [
        f"{i}.wav\tx\ttrain\t{words}" for i, words in enumerate(["one", '"Hello he said', "two", '"Hello again', "x"])
    ]
    with pytest.raises(ValueError, match="unclosed quote"):
        read_task(manifest(tmp_path, [*rows, "z.wav\ty\ttest\t"], "path\tlabel\tsplit\tsentence"))
    with pytest.raises(ValueError, match="a cell spans several lines"):
        read_task(manifest(tmp_path, [rows[0], '1.wav\tx\ttest\t"a', 'b"'], "path\tlabel\tsplit\tsentence", "n.tsv"))


def test_read_task_blank_rows_are_skipped(tmp_path):
    assert len(read_task(manifest(tmp_path, [*SPLIT, "\t\t", ""][:5])).clips) == 4


def test_read_task_folder_raises(tmp_path):
    with pytest.raises(ValueError, match=r"expected a manifest, \.tsv or \.csv, got the folder"):
        read_task(tmp_path)


def test_read_task_phones_is_frame_level(tmp_path):
    rows = [f"{i}.wav\t{'train' if i else 'test'}\t0.5:a 0.75:b 1.0:a" + " 1.1:rare" * (i == 0) for i in range(20)]
    task = read_task(manifest(tmp_path, rows, "path\tsplit\tphones"))
    assert task.frame_level
    assert task.labels == ["a", "b"]
    assert task.clips[1].phones == ((0.5, "a"), (0.75, "b"), (1.0, "a"))
    assert "1 phones" in task.notes[0]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "path\tlabel",
            ["a.wav\tx"],
            r"expected a header with path, label \(or phones\), and split or fold.* got \['path', 'label'\]",
        ),
        ("path\tsplit", ["a.wav\ttrain"], "expected a header"),
        ("path\tlabel\tsplit", [], "expected clips below the header, got none"),
        ("path\tlabel\tsplit", ["a.wav\tx\ttrain", "b.wav\tx\ttest"], r"expected at least two classes, got \['x'\]"),
        ("path\tlabel\tsplit", ["a.wav\tx\ttrain", "b.wav\ty\tlater"], r"line 3: expected a split.* got 'later'"),
        ("path\tlabel\tfold\tsplit", ["a.wav\tx\t\t"], "line 2: expected a fold or a split"),
        (
            "path\tlabel\tsplit",
            ["a.wav\tx\ttrain", "b.wav\t\ttest"],
            "b.wav has no label, which only --multi-label",
        ),
        (
            "path\tlabel\tsplit\tstart\tend",
            ["a.wav\tx\ttrain\t3\t2"],
            "expected 0 <= start < end in seconds, got 3 and 2",
        ),
        ("path\tlabel\tsplit\tstart\tend", ["a.wav\tx\ttrain\tsoon\t2"], "line 2: expected seconds.*soon"),
        ("path\tlabel\tsplit\tstart\tend", ["a.wav\tx\ttrain\tnan\t"], "expected 0 <= start < end"),
        (
            "path\tphones\tsplit",
            ["a.wav\t0.5:a 0.4:b\ttrain"],
            "expected phones as END:PHONE, ends in seconds ascending",
        ),
        ("path\tphones\tsplit", ["a.wav\tabc\ttrain"], "line 2: expected seconds"),
        ("path\tphones\tsplit", ["a.wav\t\ttrain"], "expected phones as END:PHONE"),
    ],
)
def test_read_task_malformed_manifest_raises(tmp_path, header, rows, message):
    with pytest.raises(ValueError, match=message):
        read_task(manifest(tmp_path, rows, header))


def test_read_task_row_without_path_raises(tmp_path):
    with pytest.raises(ValueError, match="line 3: no path"):
        read_task(write(tmp_path / "t.tsv", "path\tlabel\tsplit\na.wav\tx\ttrain\n\tx\ttest\n"))


def test_read_task_missing_or_binary_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "none.tsv")
    (tmp_path / "t.tsv").write_bytes(b"path\tlabel\tsplit\n\xff\xfe\tx\ttrain\n")
    with pytest.raises(ValueError, match="not a table in UTF-8"):
        read_task(tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.wav\tx\ttest", "b.wav\ty\ttest"], "expected clips of split train and test, got none of train"),
        (["a.wav\tx\ttrain", "b.wav\ty\ttrain"], "got none of test"),
        (["a.wav\tx\ttrain", "b.wav\ty\ttrain", "c.wav\tx\ttest"], "too few training clips to draw validation clips"),
    ],
)
def test_folds_missing_or_too_few_clips_raise(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_task(manifest(tmp_path, rows)).folds()


def test_folds_single_fold_raises(tmp_path):
    with pytest.raises(ValueError, match=r"at least two folds, got \['1'\]"):
        read_task(manifest(tmp_path, ["a.wav\tx\t1", "b.wav\ty\t1"], "path\tlabel\tfold")).folds()


# ---------------------------------------------------------------------------------------------------------- waveforms


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, seconds in (("a.wav", 2.5), ("b.flac", 1.0), ("short.wav", 0.01)):
        soundfile.write(
            folder / name, (0.3 * rng.standard_normal(round(seconds * RATE))).astype(np.float32), RATE, "PCM_16"
        )
    (folder / "broken.wav").write_text("no audio")
    rows = ["a.wav\tx\ttrain\t\t", "b.flac\ty\ttrain\t\t", "a.wav\ty\ttest\t0.5\t1.25", "short.wav\tx\ttrain\t\t"]
    rows += ["broken.wav\tx\ttrain\t\t", "none.wav\ty\ttrain\t\t", "b.flac\ty\ttest\t5\t6"]
    (folder / "t.tsv").write_text("\n".join(["path\tlabel\tsplit\tstart\tend", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def audio(recordings) -> Waveforms:
    return Waveforms(read_task(recordings / "t.tsv"), recordings / "cache")


def samples(recordings: Path, name: str) -> np.ndarray:
    return soundfile.read(recordings / name, dtype="int16")[0]


def test_waveforms_unusable_clips_are_missing_with_reason(audio):
    assert sorted(audio.missing) == [3, 4, 5, 6]
    assert "shorter" in audio.missing[3]
    assert audio.missing[6] == "less than 25 ms of audio from start to end"
    assert audio.seconds[:3].tolist() == [2.5, 1.0, 0.75]


def test_windows_cover_whole_clip(recordings, audio):
    windows = audio.windows(0, 1.0)
    assert [start for start, _ in windows] == [0.0, 1.0, 2.0]
    waveforms, num_samples = audio.read([window for _, window in windows])
    assert num_samples.tolist() == [RATE, RATE, RATE // 2]
    joined = np.concatenate([row[:n] for row, n in zip(waveforms.numpy(), num_samples.tolist(), strict=True)])
    np.testing.assert_array_equal(joined, samples(recordings, "a.wav"))
    ((start, window),) = audio.windows(2, 1.0)
    assert start == 0.0
    np.testing.assert_array_equal(audio.read([window])[0][0], samples(recordings, "a.wav")[RATE // 2 : RATE * 5 // 4])


def test_crop_draws_anywhere_in_the_clip(recordings, audio):
    rng = random.Random(0)
    starts = [audio.crop(0, 1.0, rng).start for _ in range(200)]
    assert min(starts) < 0.1 * RATE < 1.4 * RATE < max(starts) <= 1.5 * RATE
    assert {audio.crop(0, 1.0, rng).num_samples for _ in range(20)} == {RATE}
    inner = [audio.crop(2, 0.5, rng) for _ in range(100)]
    assert min(w.start for w in inner) >= RATE // 2
    assert max(w.start + w.num_samples for w in inner) <= RATE * 5 // 4
    assert audio.crop(1, 5.0, rng).num_samples == RATE


def test_windows_of_several_segments_cover_whole_clip(tmp_path, monkeypatch):
    from mae_ast_fast.data import prepare

    monkeypatch.setattr(prepare, "_MAX_SEGMENT_SECONDS", 1)
    wave = (0.3 * np.random.default_rng(1).standard_normal(RATE * 5 // 2)).astype(np.float32)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE, "PCM_16")
    path = manifest(tmp_path, ["a.wav\tx\ttrain\t0.5\t2.25", "b.wav\ty\ttest\t\t"], "path\tlabel\tsplit\tstart\tend")
    audio = Waveforms(read_task(path), tmp_path / "cache")
    assert audio.seconds.tolist() == [1.75, 2.5]
    windows = audio.windows(0, 0.5)
    waveforms, num_samples = audio.read([window for _, window in windows])
    joined = np.concatenate([row[:n] for row, n in zip(waveforms.numpy(), num_samples.tolist(), strict=True)])
    np.testing.assert_array_equal(joined, samples(tmp_path, "a.wav")[RATE // 2 : RATE * 9 // 4])
    edges = np.cumsum([0, *num_samples.tolist()])[:-1] / RATE
    assert [start for start, _ in windows] == edges.tolist()


def test_waveforms_other_manifest_of_same_files_reuses_shards(recordings, audio):
    rows = ["a.wav\tx\ttrain\t\t", f"{recordings}/b.flac\ty\ttrain\t\t", "./short.wav\tx\ttest\t\t"]
    rows += ["./broken.wav\ty\ttest\t\t", f"{recordings}/none.wav\ty\ttest\t\t"]
    path = write(recordings / "other.tsv", "\n".join(["path\tlabel\tsplit\tstart\tend", *rows]) + "\n")
    again = Waveforms(read_task(path), recordings / "cache")
    assert again.identity == audio.identity  # the same shards
    assert again.seconds[:2].tolist() == [2.5, 1.0]
    assert sorted(again.missing) == [2, 3, 4]


def test_batches_take_every_window_once_within_the_budget(audio):
    windows = [window for i in (0, 1, 2) for _, window in audio.windows(i, 0.3)]
    indices = list(batches(windows, 0.9))
    assert sorted(i for batch in indices for i in batch) == list(range(len(windows)))
    assert all(len(batch) * max(windows[i].num_samples for i in batch) <= 0.9 * RATE for batch in indices)


def test_waveforms_no_usable_clip_raises(tmp_path):
    path = manifest(tmp_path, SPLIT)
    with pytest.raises(ValueError, match=r"no usable|nothing usable|none"):
        Waveforms(read_task(path), tmp_path / "cache")


LONG = ["a.wav\tdog\ttrain", "a.wav\toutdoors\ttrain", "b.wav\tcat\ttrain", "c.wav\tcat\ttest", "c.wav\tdog\ttest"]


def test_read_task_row_per_label_without_flag_names_clips_and_flag(tmp_path):
    rows = [*LONG, "d.wav\tcat\ttrain", "d.wav\tdog\ttrain", "e.wav\tcat\ttrain", "e.wav\tdog\ttrain"]
    message = r"4 clips have rows whose labels differ, .* a\.wav \(dog, outdoors\), c.*, d\.wav .*--multi-label"
    with pytest.raises(ValueError, match=message) as raised:
        read_task(manifest(tmp_path, rows))
    assert "e.wav" not in str(raised.value) and "b.wav" not in str(raised.value)
    with pytest.raises(ValueError, match="--multi-label"):  # a ; elsewhere does not mean that rows are to be merged
        read_task(manifest(tmp_path, [*LONG, "f.wav\tcat;dog\ttrain"]))


def test_read_task_row_per_label_with_flag_is_merged(tmp_path):
    task = read_task(manifest(tmp_path, [*LONG, "b.wav\tcat\ttrain"]), multi_label=True)
    assert [(Path(clip.path).name, clip.labels, clip.split) for clip in task.clips] == [
        ("a.wav", ("dog", "outdoors"), "train"),
        *[("b.wav", ("cat",), "train")] * 2,  # rows that agree stay, as in an older run of this manifest
        ("c.wav", ("cat", "dog"), "test"),
    ]
    assert task.labels == ["cat", "dog", "outdoors"] and task.targets().sum(1).tolist() == [2, 1, 1, 2]


def test_read_task_row_per_label_is_found_in_any_spelling_of_a_path(tmp_path):
    (tmp_path / "x").mkdir()
    write(tmp_path / "a.wav", "")
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    for other in ("./a.wav", "x/../a.wav", str(tmp_path / "a.wav"), "link.wav"):
        rows = ["b.wav\tdog\ttrain", "a.wav\tcat\ttest", f"{other}\tdog\ttest"]
        with pytest.raises(ValueError, match=r"1 clip has rows whose labels differ, for example a\.wav \(cat, dog\)"):
            read_task(manifest(tmp_path, rows))
        assert [clip.labels for clip in read_task(manifest(tmp_path, rows), multi_label=True).clips][1:] == [
            ("cat", "dog")
        ]


def test_read_task_parts_of_one_file_are_clips_of_their_own(tmp_path):
    header = "path\tlabel\tsplit\tstart\tend"
    rows = ["a.wav\tdog\ttrain\t0\t1", "a.wav\tcat\ttrain\t1\t2", "a.wav\tcat\ttest\t2\t"]
    assert len(read_task(manifest(tmp_path, rows, header)).clips) == 3
    with pytest.raises(ValueError, match=r"a\.wav from 1 s \(cat, dog\)"):
        read_task(manifest(tmp_path, [*rows, "a.wav\tdog\ttrain\t1.0\t2.00"], header))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("column, sets", [("split", ("train", "test")), ("fold", ("1", "2"))])
def test_read_task_clip_with_other_labels_in_another_set_raises(tmp_path, column, sets, multi_label):
    rows = [f"a.wav\tdog\t{sets[0]}", f"a.wav\tcat\t{sets[1]}", f"b.wav\tcat\t{sets[0]}"]
    with pytest.raises(ValueError, match=r"a\.wav \(dog, cat\): give each clip to one split or fold"):
        read_task(manifest(tmp_path, rows, f"path\tlabel\t{column}"), multi_label=multi_label)


def test_read_task_rows_without_label_add_none(tmp_path):
    rows = ["a.wav\t\ttrain", "a.wav\tdog\ttrain", "b.wav\tcat\ttest"]
    assert [clip.labels for clip in read_task(manifest(tmp_path, rows), multi_label=True).clips] == [("dog",), ("cat",)]


@pytest.mark.parametrize("multi_label", [False, True])
def test_read_task_row_per_phone_raises(tmp_path, multi_label):
    rows = [f"{name}.wav\t{i + 1}:{phone}\ttrain" for name in "ab" for i, phone in enumerate(["x", "y"])]
    with pytest.raises(ValueError, match=r"2 clips have rows whose phones differ.*a\.wav, b\.wav: put all phones"):
        read_task(manifest(tmp_path, rows, "path\tphones\tsplit"), multi_label=multi_label)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", ["\t", ","])
def test_read_task_text_of_a_spreadsheet_is_read(tmp_path, encoding, separator):
    suffix = "tsv" if separator == "\t" else "csv"
    write(tmp_path / "\u00fc.wav", "")
    rows = ["path\xa0,label,split", "\u00fc.wav,dog\xa0,train", "b.wav,\xa0cat,test"]
    mark = "\ufeff" if encoding.endswith("e") else ""
    (tmp_path / f"t.{suffix}").write_bytes((mark + "\r\n".join(rows).replace(",", separator)).encode(encoding))
    task = read_task(tmp_path / f"t.{suffix}")
    assert task.labels == ["cat", "dog"] and task.clips[0].path == str(tmp_path / "\u00fc.wav")
