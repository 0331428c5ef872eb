"""corpus.py: fetching with a stand-in for apt-get, the files that the manifest leaves out, and the held-out split."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fake_apt import FakeApt

from mae_ast_fast.data import corpus
from mae_ast_fast.data.corpus import CorpusClip, CorpusError, default_clips, fetch, held_out

SMALL = ("asterisk-moh-opsound-g722", "scratch", "ufoai-sound")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeApt(tmp_path / "fake")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name in (
            "sound/a.ogg",
            "sound/deep/b.ogg",
            "../slip.ogg",
            f"{tmp_path}/slip.ogg",
            "x/../../slip.ogg",
            "notes.txt",
        ):
            members.writestr(name, name)
    fake.add(
        "ufoai-sound", {"usr/share/games/ufoai/base/0snd.pk3": archive.getvalue(), "usr/share/doc/copyright": b"c"}
    )
    fake.add("scratch", {"usr/share/scratch/Media/Sounds/Animal/Cat.wav": b"cat", "usr/share/scratch/x.gif": b"gif"})
    fake.add("asterisk-moh-opsound-g722", {"usr/share/asterisk/moh/a.g722": b"music"})
    return fake


def progress_log():
    """A list, and a function that appends lines of progress to it."""
    lines = []
    return lines, lines.append


# --------------------------------------------------------------------------------------------------------- fetching


def test_fetch_unpacks_once(fake, tmp_path):
    lines, progress = progress_log()
    cache = tmp_path / "cache"
    result = fetch(cache, SMALL, progress)
    assert (result.cache, result.packages, result.missing) == (cache, SMALL, ())
    assert [call for call in fake.calls() if "download" in call] == [f"apt-get download {name}" for name in SMALL]
    assert len(lines) == 3 and all("MB in" in line and f"[{i}/3]" in line for i, line in enumerate(lines, 1))
    base = cache / "ufoai-sound/usr/share/games/ufoai/base"
    assert sorted(p.relative_to(base).as_posix() for p in base.rglob("*.*") if p.is_file()) == [
        "0snd.pk3!/sound/a.ogg",
        "0snd.pk3!/sound/deep/b.ogg",
    ]
    assert (base / "0snd.pk3!/sound/a.ogg").read_text() == "sound/a.ogg"
    assert not list(tmp_path.rglob("slip.ogg"))
    assert not list(tmp_path.rglob("cache/**/*.deb")) and not list(cache.glob(".partial*"))
    assert fetch(cache, SMALL, progress) == result and fake.calls() == []


@pytest.mark.parametrize("mode", ["no lists", "stale lists", "one source fails"])
def test_fetch_falls_back_to_private_lists(fake, tmp_path, mode):
    fake.mode(mode)
    lines, progress = progress_log()
    assert fetch(tmp_path / "cache", SMALL, progress).packages == SMALL
    calls = [call for call in fake.calls() if call.startswith("apt-get")]
    assert calls == [f"apt-get download {SMALL[0]}", "apt-get update"] + [f"apt-get download {name}" for name in SMALL]
    assert any("fetching private lists" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", *SMALL]


def test_fetch_missing_package_is_reported_and_remembered(fake, tmp_path):
    packages = ("klettres-data", *SMALL, "fillets-ng-data-cs")
    for attempt in range(2):
        lines, progress = progress_log()
        result = fetch(tmp_path / "cache", packages, progress)
        assert result.packages == SMALL and result.missing == ("klettres-data", "fillets-ng-data-cs")
        assert "klettres-data, fillets-ng-data-cs" in lines[-1]
        calls = fake.calls()
        assert calls.count("apt-get update") == (attempt == 0) and bool(calls) == (attempt == 0)


def test_fetch_missing_package_with_failed_source_is_not_remembered(fake, tmp_path):
    fake.mode("one source fails")
    _, progress = progress_log()
    assert fetch(tmp_path / "cache", ("klettres-data", *SMALL), progress).missing == ("klettres-data",)
    fake.mode("")
    fake.add("klettres-data", {"usr/share/klettres/de/alpha/a.ogg": b"a"})
    assert fetch(tmp_path / "cache", ("klettres-data", *SMALL), progress).missing == ()


def error_of(*arguments):
    with pytest.raises(CorpusError) as caught:
        fetch(*arguments, lambda line: None)
    assert "--data DIR" in str(caught.value)
    return str(caught.value)


def test_fetch_no_package_raises(fake, tmp_path):
    assert "none of the corpus's packages" in error_of(tmp_path / "cache", ("klettres-data",))


@pytest.mark.parametrize(
    "mode,words",
    [
        ("offline", "apt-get update failed.*Failed to fetch http://deb/InRelease  Temporary failure resolving 'deb'"),
        ("disk full", "apt-get download asterisk-moh-opsound-g722 failed: E: Write error.*No space left"),
        ("broken deb", "dpkg-deb -x .*premature member"),
    ],
)
def test_fetch_error_names_the_failed_command(fake, tmp_path, mode, words):
    fake.mode(mode)
    with pytest.raises(CorpusError, match=words):
        fetch(tmp_path / "cache", SMALL, lambda line: None)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock"]
    fake.mode("")
    assert fetch(tmp_path / "cache", SMALL, lambda line: None).packages == SMALL


def test_fetch_kills_hung_apt_get(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_STALL_SECONDS", 0.5)
    fake.mode("hang")
    start = time.monotonic()
    assert "did nothing" in error_of(tmp_path / "cache", SMALL)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-deb"])
def test_fetch_without_debian_tools_raises(fake, tmp_path, tool):
    (fake.folder / "bin" / tool).unlink()
    assert f"{tool} is not on this system" in error_of(tmp_path / "cache", SMALL)


def test_fetch_unwritable_cache_raises(fake, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write the cache" in error_of(tmp_path / "file" / "cache", SMALL)
    (tmp_path / "cache/scratch").mkdir(parents=True)
    (tmp_path / "cache/scratch/mine.txt").write_text("not ours")
    assert "scratch" in error_of(tmp_path / "cache", ("scratch",))
    assert (tmp_path / "cache/scratch/mine.txt").read_text() == "not ours"


def test_fetch_rejects_bad_package_names(fake, tmp_path):
    for name in ("-oDir::x=y", "../up", "a b", ""):
        with pytest.raises(ValueError, match="names of Debian packages"):
            fetch(tmp_path / "cache", (name,))
    assert fake.calls() == []


def test_fetch_killed_resumes(fake, tmp_path):
    cache = tmp_path / "cache"
    fetch(cache, SMALL[:1], lambda line: None)
    fake.calls()
    fake.mode("slow")
    code = f"from mae_ast_fast.data import corpus; corpus.fetch({str(cache)!r}, {SMALL!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(cache.glob(".partial-*/scratch/tree/usr")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # dpkg-deb too
    process.wait()
    assert not (cache / "scratch").exists()
    fake.mode("")
    fake.calls()
    assert fetch(cache, SMALL, lambda line: None).packages == SMALL
    assert [call for call in fake.calls() if "download" in call] == [f"apt-get download {name}" for name in SMALL[1:]]
    assert not list(cache.glob(".partial*"))


def test_default_cache_follows_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MAE_AST_FAST_CACHE", raising=False)
    assert corpus.default_cache() == Path("/home/someone/.cache/mae_ast_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert corpus.default_cache() == Path("/cache/mae_ast_fast")
    monkeypatch.setenv("MAE_AST_FAST_CACHE", "/elsewhere")
    assert corpus.default_cache() == Path("/elsewhere")


# ------------------------------------------------------------------------------------------------------------ clips


def write_package(cache, package, files):
    for name, content in files.items():
        path = cache / package / name.replace("!", "!/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (cache / package / ".complete").touch()


EN = "usr/share/asterisk/sounds/en_US_f_Allison"


def manifest_rows():
    text = gzip.decompress((Path(corpus.__file__).parent / "assets/manifest.tsv.gz").read_bytes()).decode()
    columns, *lines = [line.split("\t") for line in text.splitlines()]
    return [dict(zip(columns, line, strict=True)) for line in lines]


def first_of(package, pretrain):
    """The first source file of a package with this mark in the shipped manifest."""
    rows = (row for row in manifest_rows() if (row["package"], row["pretrain"]) == (package, pretrain))
    return min(row["source_file"] for row in rows)


def test_manifest_agrees_with_labels():
    rows = manifest_rows()
    assert len(rows) == 9012 and sum(row["pretrain"] == "1" for row in rows) == 5707
    task_files = {(row["package"], row["source_file"]) for row in rows if row["pretrain"] == "0"}
    assert len({p for p, _ in task_files} & set(corpus.DEFAULT_PACKAGES)) >= 8
    for row in rows:  # the rules for unlisted files agree with the manifest on listed ones
        if row["package"] in corpus.DEFAULT_PACKAGES:
            kind, voice = corpus._labels(row["package"], row["source_file"])
            assert kind == row["kind"] or row["kind"] == "tone" or row["package"] == "sonic-pi-samples", row
            assert voice == re.sub(r"^ast_[a-z]+_[A-Z]+_", "ast_", row["voice"]), row


def test_default_clips_leave_out_task_files_and_copies(tmp_path):
    task_file, kept_file = (first_of("asterisk-core-sounds-en-g722", pretrain) for pretrain in "01")
    member = first_of("ufoai-sound", "0")
    prompt_files = {
        task_file: b"heard in a test",
        kept_file: b"free",
        f"{EN}/new.g722": b"new",
        f"{EN}/again.g722": b"heard in a test",
        f"{EN}/zz-new.g722": b"new",
        "usr/share/doc/x/copyright": b"text",
    }
    write_package(tmp_path, "asterisk-core-sounds-en-g722", prompt_files)
    sounds = {"usr/share/scratch/a.wav": b"heard in a test", "usr/share/scratch/b.wav": b"free"}
    write_package(tmp_path, "scratch", sounds)
    write_package(
        tmp_path, "ufoai-sound", {member: b"a sound", "usr/share/games/ufoai/base/0snd.pk3!sound/zz.ogg": b"other"}
    )
    noise = "usr/share/sonic-pi/buffers/rand-stream.wav"
    write_package(tmp_path, "sonic-pi-samples", {noise: b"numbers", "usr/share/sonic-pi/samples/x.flac": b"x"})
    (tmp_path / "klettres-data").mkdir()  # not complete
    (tmp_path / "klettres-data/a.ogg").write_bytes(b"half")
    clips, counts = default_clips(tmp_path)
    english = sorted([f"{EN}/new.g722", kept_file])
    assert [clip.name for clip in clips] == [
        f"asterisk-core-sounds-en-g722/{english[0]}",
        f"asterisk-core-sounds-en-g722/{english[1]}",
        "sonic-pi-samples/usr/share/sonic-pi/samples/x.flac",
        "ufoai-sound/usr/share/games/ufoai/base/0snd.pk3!sound/zz.ogg",
    ]
    assert counts == {"found": 10, "tasks": 2, "copies_of_tasks": 2, "duplicates": 2}
    assert all(Path(clip.path).is_file() and clip.name == f"{clip.group}/{clip.source_file}" for clip in clips)


def test_default_clips_empty_cache_raises(tmp_path):
    with pytest.raises(ValueError, match="fetch it first"):
        default_clips(tmp_path)


@pytest.mark.parametrize(
    "package,source_file,kind,voice",
    [
        ("asterisk-core-sounds-en-g722", f"{EN}/nowhere.g722", "speech", "ast_f_Allison"),
        (
            "asterisk-core-sounds-es-g722",
            "usr/share/asterisk/sounds/es_MX_f_Allison/x/y.g722",
            "speech",
            "ast_f_Allison",
        ),
        (
            "asterisk-core-sounds-it-g722",
            "usr/share/asterisk/sounds/it_IT_m_Carlo/silence/1.g722",
            "tone",
            "ast_m_Carlo",
        ),
        ("asterisk-core-sounds-en-g722", f"{EN}/beeperr.g722", "tone", "ast_f_Allison"),
        ("asterisk-core-sounds-en-g722", f"{EN}/at-tone-time-exactly.g722", "speech", "ast_f_Allison"),
        ("fillets-ng-data-cs", "usr/share/games/fillets-ng/sound/a/cs/win-m-blok.ogg", "speech", "fish_cs_small"),
        ("fillets-ng-data-nl", "usr/share/games/fillets-ng/sound/a/nl/v-nad.ogg", "speech", "fish_nl_big"),
        ("fillets-ng-data-nl", "usr/share/games/fillets-ng/sound/a/nl/rand-5-3-0.ogg", "speech", "fish_nl_other"),
        ("klettres-data", "usr/share/klettres/pt_BR/alpha/a.ogg", "speech", "klet_pt_BR"),
        ("asterisk-moh-opsound-g722", "usr/share/asterisk/moh/x.g722", "music", ""),
        ("scratch", "usr/share/scratch/Media/Sounds/Music Loops/X.mp3", "music", ""),
        ("scratch", "usr/share/scratch/Media/Sounds/Vocals/X.mp3", "speech", ""),
        ("ufoai-sound", "usr/share/games/ufoai/base/0snd.pk3!sound/x.ogg", "sound", ""),
    ],
)
def test_labels_from_path_give_kind_and_voice(package, source_file, kind, voice):
    assert corpus._labels(package, source_file) == (kind, voice)


# ------------------------------------------------------------------------------------------------------------ split


def clips_of(*packages):
    """Ten clips per package with its kinds and voices."""
    clips = []
    for package in packages:
        for i in range(10):
            if package == "scratch":
                kind, voice = ("sound", "music", "speech")[i % 3], ""
            elif "moh" in package:
                kind, voice = "music", ""
            elif package in ("sonic-pi-samples", "ufoai-sound"):
                kind, voice = "sound", ""
            else:
                kind = "speech" if i else "tone"
                voice = "allison" if package in (prompts("en"), prompts("es")) else f"{package}-{i % 2}"
            clips.append(CorpusClip(f"/x/{package}/{i}", f"{package}/{i}", kind, package, str(i), voice))
    return clips


def prompts(language):
    return f"asterisk-core-sounds-{language}-g722"


@pytest.mark.parametrize(
    "packages,expected",
    [
        (corpus.DEFAULT_PACKAGES, {prompts("it"), "scratch"}),
        (
            (prompts("en"), prompts("fr"), prompts("ru"), "asterisk-moh-opsound-g722", *corpus._SOUNDS),
            {prompts("ru"), "scratch"},
        ),
        (
            (prompts("it"), prompts("en"), "asterisk-moh-opsound-g722", "ufoai-sound"),
            {prompts("it")},
        ),  # the only sounds stay
        (
            (prompts("it"), prompts("fr"), "scratch", "ufoai-sound"),
            {prompts("it"), "ufoai-sound"},
        ),  # the only music stays
        (
            (prompts("en"), prompts("es"), "sonic-pi-samples", "ufoai-sound"),
            {"sonic-pi-samples"},
        ),  # the only voice stays
        (
            (prompts("en"), prompts("es"), "some-other-voices"),
            {prompts("en"), prompts("es")},
        ),  # one woman: both or none
        ((prompts("es"), "fillets-ng-data-cs"), {"fillets-ng-data-cs"}),
    ],
)
def test_held_out_shares_no_voice_and_no_package(packages, expected):
    clips = clips_of(*packages)
    train, held, description = held_out(clips)
    assert {clips[i].group for i in held} == expected and all(name in description for name in expected)
    assert sorted([*train, *held]) == list(range(len(clips)))
    for label in ("group", "voice"):
        assert not {getattr(clips[i], label) for i in train} & {getattr(clips[i], label) for i in held} - {""}
    assert {clips[i].kind for i in train} >= {clip.kind for clip in clips} - {"tone"}


@pytest.mark.parametrize(
    "packages", [(prompts("it"),), (prompts("en"), prompts("es")), (prompts("it"), "ufoai-sound"), ()]
)
def test_held_out_impossible_raises(packages):
    with pytest.raises(ValueError, match="cannot hold out"):
        held_out(clips_of(*packages))


@pytest.mark.network
@pytest.mark.long
def test_fetch_real_packages_gives_usable_clips(tmp_path):
    """The two smallest packages from this system's sources, as the default corpus fetches them."""
    packages = ("asterisk-moh-opsound-g722", "ufoai-sound")
    result = fetch(tmp_path, packages)
    assert result.packages == packages
    clips, counts = default_clips(tmp_path, packages)
    print(json.dumps(counts))
    assert counts["tasks"] >= 50 and len(clips) >= 250
    from mae_ast_fast.data.prepare import prepare_shards

    report = prepare_shards(clips, tmp_path / "shards")
    assert report["hours"] > 0.5 and not report["skipped"].get("corrupt")
