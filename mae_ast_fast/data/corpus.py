"""The default corpus: real recordings out of 12 Debian packages (240 MB; 7 hours of speech, sounds and music).

``fetch`` downloads with apt-get and unpacks into a cache, once and without root. ``default_clips`` lists the audio with
its labels, less the files that the downstream tasks of the shipped manifest test on (``pretrain=0``) and less copies.
``held_out`` splits by voice and package. Labels come from file and folder names; nobody listened to the clips.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np

from ..files import locked
from .audio import AUDIO_SUFFIXES, AudioFile

_PROMPTS = {lang: f"asterisk-core-sounds-{lang}-g722" for lang in ("en", "es", "fr", "it", "ru")}
_GAMES = ("fillets-ng-data-cs", "fillets-ng-data-nl", "klettres-data")
_SOUNDS = ("scratch", "sonic-pi-samples", "ufoai-sound")
DEFAULT_PACKAGES = (*_PROMPTS.values(), "asterisk-moh-opsound-g722", *_GAMES, *_SOUNDS)
# Held out is the first of a kind that can be, with every package that shares a voice: en and es are one woman's.
_HELD_OUT = {"speech": (_PROMPTS["it"], _PROMPTS["ru"], _PROMPTS["fr"], *reversed(_GAMES)), "sound": _SOUNDS}
_ARCHIVES = {  # zip files that hold the audio; all but the first are of packages that only small_tasks.py fetches
    "ufoai-sound": ("0snd.pk3",),
    "0ad-data": ("public.zip",),
    "openarena-081-players": ("pak2-players.pk3",),
    "openarena-data": ("pak0.pk3", "mp-pak0.pk3"),
    "warzone2100-data": ("base.wz",),
}
_NOT_RECORDED = {("sonic-pi-samples", "usr/share/sonic-pi/buffers/rand-stream.wav")}  # a table of random numbers
_MARKER = ".complete"
_STALL_SECONDS = 120.0  # apt-get without a byte or a word for so long hangs
_APT_OPTIONS = ("-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30")
_NOT_IN_RELEASE = re.compile(r"Unable to locate package|no (installation )?candidate|Can't find a source to download")


class CorpusError(RuntimeError):
    """The default corpus cannot be had here; the message says why and what else to do."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}\nTo pretrain on audio of your own: --data DIR (a folder of audio files).")


class NotInRelease(CorpusError):
    """None of the packages that were asked for is in this system's release."""


@dataclass(frozen=True)
class Corpus:
    """An unpacked corpus: its folder, the packages that are there, and those that this system's release lacks."""

    cache: Path
    packages: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class CorpusClip(AudioFile):
    """A file of the corpus; ``group`` is its package.

    ``source_file`` is the path inside the package (``archive!member`` for archives), ``kind`` speech, sound, music or
    tone, ``voice`` the recorded person or role (one name for a person in two languages), empty where there is none.
    """

    source_file: str = ""
    voice: str = ""


def default_cache() -> Path:
    """``$MAE_AST_FAST_CACHE``, else ``mae_ast_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache := os.environ.get("MAE_AST_FAST_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mae_ast_fast"


def fetch(
    cache: str | os.PathLike | None = None,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    progress: Callable[[str], object] = print,
) -> Corpus:
    """Downloads and unpacks what is not yet in ``cache`` (default: ``default_cache()``), a folder for each package.

    Killed at any time, the next call goes on with the packages that are not there. Where the system's package lists
    are absent or out of date, private ones are fetched into the cache; root is never needed. A package that this
    release lacks is named and left out (``NAME.lacking`` in the cache remembers it).

    Raises:
        CorpusError: No apt-get or dpkg-deb, no network, or no space.
        NotInRelease: None of the packages is in this release.
    """
    if bad := [name for name in packages if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name)]:
        raise ValueError(f"expected names of Debian packages, got {', '.join(map(repr, bad))}")
    cache = Path(cache or default_cache()).expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            todo = [p for p in packages if not (cache / p / _MARKER).exists() and not (cache / f"{p}.lacking").exists()]
            if todo:
                _install(cache, todo, progress)
    except OSError as error:
        raise CorpusError(f"cannot write the cache {cache} (MAE_AST_FAST_CACHE sets another one): {error}") from error
    there = tuple(p for p in packages if (cache / p / _MARKER).exists())
    missing = tuple(p for p in packages if p not in there)
    if missing:
        progress(f"not in this system's release, going on without: {', '.join(missing)}")
    if not there:
        raise NotInRelease(f"none of the corpus's packages is in this system's release ({', '.join(packages)})")
    return Corpus(cache, there, missing)


def _install(cache: Path, packages: Sequence[str], progress: Callable[[str], object]) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CorpusError(f"the default corpus comes from Debian packages, and {tool} is not on this system")
    for stale in cache.glob(".partial-*"):  # nobody else writes here while we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    # A package index of our own: apt-get would build one for each package where the system keeps none.
    options = ["-o", f"Dir::Cache={work / 'cache'}", "-o", "Dir::Cache::pkgcache=pkgcache.bin"]
    private = complete = False
    try:
        (work / "cache/archives/partial").mkdir(parents=True)
        for number, name in enumerate(packages, 1):
            start, folder = time.monotonic(), work / name
            folder.mkdir()
            label = f"[{number}/{len(packages)}] {name}"
            command = ["apt-get", "download", name]
            code, said = _apt([*command, *options], folder, label, progress)
            if code and not private:
                progress(f"{label}: not with the system's package lists ({_last(said)}); fetching lists of our own")
                options, complete = _private_lists(work / "apt", options, progress)
                private = True
                code, said = _apt([*command, *options], folder, label, progress)
            if code and _NOT_IN_RELEASE.search(said):
                progress(f"{label}: this system's release lacks it")
                if complete:
                    (cache / f"{name}.lacking").touch()
                continue
            debs = list(folder.glob("*.deb"))
            if code or len(debs) != 1:
                raise CorpusError(f"apt-get download {name} failed: {_last(said)}")
            size = debs[0].stat().st_size / 1e6
            spent = time.monotonic() - start
            progress(f"{label}: {size:.1f} MB in {spent:.1f} s ({size / spent:.1f} MB/s)")
            _unpack(debs[0], folder / "tree", name)
            os.rename(folder / "tree", cache / name)  # the whole package at once
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _private_lists(folder: Path, options: list[str], progress: Callable[[str], object]) -> tuple[list[str], bool]:
    """Fetches lists of packages from the system's sources, without root.

    Returns:
        ``options`` and those that make apt-get use the lists; whether every source answered.
    """
    (folder / "lists/partial").mkdir(parents=True)
    places = {"State": folder, "State::lists": folder / "lists", "State::status": "/var/lib/dpkg/status"}
    options = [*options, *(x for key, path in places.items() for x in ("-o", f"Dir::{key}={path}"))]
    options += ["-o", "Acquire::Languages=none"]
    code, said = _apt(["apt-get", "update", *options], folder, "package lists", progress)
    # One source of many may fail, and offline apt-get calls it success: what counts is whether there are lists.
    if not any("_Packages" in path.name for path in (folder / "lists").iterdir()):
        raise CorpusError(f"apt-get update failed, is there a network? {_last(said)}")
    return options, code == 0 and "Failed to fetch" not in said


def _apt(command: list[str], folder: Path, label: str, progress: Callable[[str], object]) -> tuple[int, str]:
    """Runs apt-get in ``folder``; (exit status, all it said). Says how far it is, and ends it where nothing happens."""
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile() as log:
        # A session of its own: apt-get's download helpers end with it.
        process = subprocess.Popen(
            [*command, *_APT_OPTIONS],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        size, start = 0, time.monotonic()
        moved = shown = start
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                now, before = time.monotonic(), size
                size = os.fstat(log.fileno()).st_size
                for path in _files(folder):
                    with contextlib.suppress(FileNotFoundError):  # apt-get renames and deletes
                        size += path.stat().st_size
                moved = now if size != before else moved
                if now - moved > _STALL_SECONDS:
                    raise CorpusError(f"{' '.join(command[:3])} did nothing for {_STALL_SECONDS:.0f} s")
                if now - shown > 5.0:
                    progress(f"{label}: {size / 1e6:.1f} MB, {size / 1e6 / (now - start):.1f} MB/s")
                    shown = now
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return process.returncode, log.read().decode("utf-8", "replace")


def _last(said: str) -> str:
    """The line of apt-get's that tells most: the last one about a failed transfer, else its last error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern in (r"^[EW]\w*: Failed to fetch|^E\w*: Unable to locate", r"^E\w*:", r"^(W\w*|Err):", ""):
        if found := [line for line in lines if re.search(pattern, line)]:
            return found[-1]
    return "it said nothing"


def _files(folder: Path) -> list[Path]:
    """All regular files below a folder, sorted; links are left out."""
    places = (Path(here) / name for here, _, names in os.walk(folder) for name in names)
    return sorted(path for path in places if path.is_file() and not path.is_symlink())


def _unpack(deb: Path, tree: Path, package: str) -> None:
    done = subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CorpusError(f"dpkg-deb -x {deb.name} failed: {_last(done.stderr)}")
    deb.unlink()
    for archive in [path for path in _files(tree) if path.name in _ARCHIVES.get(package, ())]:
        try:
            _unzip(archive, archive.with_name(archive.name + "!"))
        except zipfile.BadZipFile as error:
            raise CorpusError(f"{package}: {archive.name}: {error}") from error
        archive.unlink()
    (tree / _MARKER).write_text(f"{deb.name}\n")


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            path = PurePosixPath(member.filename)
            outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
            if member.is_dir() or outside or path.suffix.lower() not in AUDIO_SUFFIXES:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with members.open(member) as source, open(folder / path, "wb") as target:
                shutil.copyfileobj(source, target)


def default_clips(
    cache: str | os.PathLike | None = None, packages: Sequence[str] = DEFAULT_PACKAGES
) -> tuple[list[CorpusClip], dict[str, int]]:
    """The clips to pretrain on, sorted by package and file, and how many files were found and left out for what.

    Left out are the files that the manifest marks ``pretrain=0`` (``tasks``: the downstream tasks are to stay unheard),
    byte-identical copies of these under other names (``copies_of_tasks``), and further byte-identical copies
    (``duplicates``; the first in order stays).

    Raises:
        ValueError: None of the packages is in the cache.
    """
    cache = Path(cache or default_cache()).expanduser().absolute()
    manifest = resources.files(__package__).joinpath("assets/manifest.tsv.gz").read_bytes()
    rows = csv.DictReader(gzip.decompress(manifest).decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    tested, kinds = set(), {}
    for row in rows:
        kinds[row["package"], row["source_file"]] = row["kind"]
        if row["pretrain"] != "1":
            tested.add((row["package"], row["source_file"]))
    clips, digests = [], []
    for package in sorted(packages):
        if not (cache / package / _MARKER).exists():
            continue
        for path in _files(cache / package):
            source = path.relative_to(cache / package).as_posix().replace("!/", "!")
            if path.suffix.lower() in AUDIO_SUFFIXES and (package, source) not in _NOT_RECORDED:
                kind, voice = _labels(package, source)
                kind = kinds.get((package, source), kind)
                clips.append(CorpusClip(str(path), f"{package}/{source}", kind, package, source, voice))
                digests.append(hashlib.md5(path.read_bytes(), usedforsecurity=False).digest())
    if not clips:
        raise ValueError(f"no package of the default corpus in {cache}: fetch it first")
    counts = {"found": len(clips), "tasks": 0, "copies_of_tasks": 0, "duplicates": 0}
    untold = [(clip.group, clip.source_file) not in tested for clip in clips]
    heard = {digest for digest, free in zip(digests, untold, strict=True) if not free}
    seen, kept = set(), []
    for clip, digest, free in zip(clips, digests, untold, strict=True):
        if not free:
            counts["tasks"] += 1
        elif digest in heard:
            counts["copies_of_tasks"] += 1
        elif digest in seen:
            counts["duplicates"] += 1
        else:
            seen.add(digest)
            kept.append(clip)
    return kept, counts


def _labels(package: str, source: str) -> tuple[str, str]:
    """(kind, voice) by the names of file and folders."""
    stem = PurePosixPath(source).stem
    if package.startswith("asterisk-core-sounds-"):
        tone = "/silence/" in source or re.fullmatch(r"beep\w*|\w+-2tone", stem)
        voice = re.search(r"/sounds/(?:[a-z]+_[A-Z]+_)?([^/]+)/", source)  # less the language: Allison speaks two
        return "tone" if tone else "speech", f"ast_{voice[1]}" if voice else package
    if package.startswith("fillets-ng-data-"):
        fish = re.search(r"(?:^|[-_])([vm])(?:[-_]|$)", stem)
        role = {"v": "big", "m": "small"}[fish[1]] if fish else "other"
        return "speech", f"fish_{package.rpartition('-')[2]}_{role}"
    if package == "klettres-data":
        return "speech", f"klet_{source.split('/')[3]}"
    if package == "asterisk-moh-opsound-g722" or "/Music Loops/" in source or stem.startswith("loop_"):
        return "music", ""
    return "speech" if "/Vocals/" in source else "sound", ""


def held_out(clips: Sequence[CorpusClip]) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips so that no voice and no package is on both sides.

    One package of speech and one of sounds, the first of a list of preference that leaves something of every kind to
    train on, and with each the packages that share a voice with it.

    Args:
        clips: From ``default_clips``; those of them that can be used.

    Returns:
        Indices int64 (train,) and (held-out,), both ascending, and a sentence that says how.

    Raises:
        ValueError: Nothing can be held out.
    """
    kinds = {clip.kind for clip in clips} - {"tone"}
    voices: dict[str, set[str]] = {}  # voice -> packages
    for clip in clips:
        if clip.voice:
            voices.setdefault(clip.voice, set()).add(clip.group)
    held: set[str] = set()
    for kind, preferred in _HELD_OUT.items():
        present = sorted({clip.group for clip in clips if clip.kind == kind} - held)
        for package in sorted(present, key=lambda p: preferred.index(p) if p in preferred else len(preferred)):
            out = held | {package}
            while more := set().union(*(p for p in voices.values() if p & out)) - out:
                out |= more
            if kinds <= {clip.kind for clip in clips if clip.group not in out}:
                held = out
                break
    if not held:
        raise ValueError(
            f"cannot hold out a package and leave every kind: got {sorted({clip.group for clip in clips})}"
        )
    mask = np.array([clip.group in held for clip in clips])
    how = f"held out: {mask.sum()} of {mask.size} clips, whole packages and voices: {', '.join(sorted(held))}"
    return np.flatnonzero(~mask), np.flatnonzero(mask), how
