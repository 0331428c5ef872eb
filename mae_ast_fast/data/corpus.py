"""The default corpus: real recordings from 12 Debian packages (240 MB; 7 hours of speech, sounds and music).

``fetch`` downloads with apt-get and unpacks into a cache, once and without root. ``default_clips`` lists the audio with
its labels. It leaves out copies, and files that the downstream tasks of the shipped manifest test on (``pretrain=0``).
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
# The first possible package of each kind is held out, with every package that shares a voice (en and es share one).
_HELD_OUT = {"speech": (_PROMPTS["it"], _PROMPTS["ru"], _PROMPTS["fr"], *reversed(_GAMES)), "sound": _SOUNDS}
_ARCHIVES = {  # zip files that hold the audio; only small_tasks.py fetches the packages after the first
    "ufoai-sound": ("0snd.pk3",),
    "0ad-data": ("public.zip",),
    "openarena-081-players": ("pak2-players.pk3",),
    "openarena-data": ("pak0.pk3", "mp-pak0.pk3"),
    "warzone2100-data": ("base.wz",),
}
_NOT_RECORDED = {("sonic-pi-samples", "usr/share/sonic-pi/buffers/rand-stream.wav")}  # a table of random numbers
_MARKER = ".complete"
_STALL_SECONDS = 120.0  # apt-get without data or output for this long counts as hung
_APT_OPTIONS = ("-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30")
_NOT_IN_RELEASE = re.compile(r"Unable to locate package|no (installation )?candidate|Can't find a source to download")


class CorpusError(RuntimeError):
    """The default corpus is not available here; the message says why and what to do instead."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}\nTo pretrain on your own audio: --data DIR (a folder of audio files).")


class NotInRelease(CorpusError):
    """None of the requested packages is in this system's release."""


@dataclass(frozen=True)
class Corpus:
    """An unpacked corpus.

    Attributes:
        cache: Its folder.
        packages: Packages in the folder.
        missing: Packages that this system's release lacks.
    """

    cache: Path
    packages: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class CorpusClip(AudioFile):
    """A file of the corpus. ``kind`` is speech, sound, music or tone, ``group`` the package.

    Attributes:
        source_file: Path inside the package, ``archive!member`` for archives.
        voice: Recorded person or role; the same for a person in two languages. Empty where there is none.
    """

    source_file: str = ""
    voice: str = ""


def default_cache() -> Path:
    """``$MAE_AST_FAST_CACHE`` if set, otherwise ``mae_ast_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache := os.environ.get("MAE_AST_FAST_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mae_ast_fast"


def fetch(
    cache: str | os.PathLike | None = None,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    progress: Callable[[str], object] = print,
) -> Corpus:
    """Download and unpack the packages that are not in the cache yet, each into its own folder.

    If the process is killed, the next call resumes with the missing packages. Where the system's package lists are
    absent or out of date, private ones are fetched into the cache; root is never needed. A package that this release
    lacks is reported and left out (``NAME.lacking`` in the cache records it).

    Args:
        cache: Folder. Default: ``default_cache()``.
        packages: Names of Debian packages.
        progress: Called with lines of text.

    Raises:
        ValueError: A name is not that of a Debian package.
        CorpusError: No apt-get or dpkg-deb, no network, or no space.
        NotInRelease: None of the packages is in this release.
    """
    if invalid := [name for name in packages if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name)]:
        raise ValueError(f"expected names of Debian packages, got {', '.join(map(repr, invalid))}")
    cache = Path(cache or default_cache()).expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            todo = [p for p in packages if not (cache / p / _MARKER).exists() and not (cache / f"{p}.lacking").exists()]
            if todo:
                _install(cache, todo, progress)
    except OSError as error:
        raise CorpusError(
            f"cannot write the cache {cache}: {error}; set MAE_AST_FAST_CACHE to use another folder"
        ) from error
    unpacked = tuple(p for p in packages if (cache / p / _MARKER).exists())
    missing = tuple(p for p in packages if p not in unpacked)
    if missing:
        progress(f"not in this system's release, left out: {', '.join(missing)}")
    if not unpacked:
        raise NotInRelease(f"none of the corpus's packages is in this system's release ({', '.join(packages)})")
    return Corpus(cache, unpacked, missing)


def _install(cache: Path, packages: Sequence[str], progress: Callable[[str], object]) -> None:
    """Download and unpack ``packages``; see ``fetch``."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CorpusError(f"the default corpus comes from Debian packages, and {tool} is not on this system")
    for stale in cache.glob(".partial-*"):  # no other process writes here while we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    # A private package index: where the system keeps none, apt-get would build one for each package.
    options = ["-o", f"Dir::Cache={work / 'cache'}", "-o", "Dir::Cache::pkgcache=pkgcache.bin"]
    private_lists = complete = False
    try:
        (work / "cache/archives/partial").mkdir(parents=True)
        for index, name in enumerate(packages, 1):
            start, folder = time.monotonic(), work / name
            folder.mkdir()
            label = f"[{index}/{len(packages)}] {name}"
            command = ["apt-get", "download", name]
            code, output = _apt([*command, *options], folder, label, progress)
            if code and not private_lists:
                progress(
                    f"{label}: failed with the system's package lists ({_error_line(output)}); fetching private lists"
                )
                options, complete = _fetch_lists(work / "apt", options, progress)
                private_lists = True
                code, output = _apt([*command, *options], folder, label, progress)
            if code and _NOT_IN_RELEASE.search(output):
                progress(f"{label}: this system's release lacks it")
                if complete:
                    (cache / f"{name}.lacking").touch()
                continue
            debs = list(folder.glob("*.deb"))
            if code or len(debs) != 1:
                raise CorpusError(f"apt-get download {name} failed: {_error_line(output)}")
            megabytes = debs[0].stat().st_size / 1e6
            elapsed = time.monotonic() - start
            progress(f"{label}: {megabytes:.1f} MB in {elapsed:.1f} s ({megabytes / elapsed:.1f} MB/s)")
            _unpack(debs[0], folder / "tree", name)
            os.rename(folder / "tree", cache / name)  # a package appears in one step
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_lists(folder: Path, options: list[str], progress: Callable[[str], object]) -> tuple[list[str], bool]:
    """Fetch package lists from the system's sources into ``folder``, without root.

    Returns:
        ``options`` with those that make apt-get use the lists, and whether every source answered.
    """
    (folder / "lists/partial").mkdir(parents=True)
    directories = {"State": folder, "State::lists": folder / "lists", "State::status": "/var/lib/dpkg/status"}
    options = list(options)
    for key, path in directories.items():
        options += ["-o", f"Dir::{key}={path}"]
    options += ["-o", "Acquire::Languages=none"]
    code, output = _apt(["apt-get", "update", *options], folder, "package lists", progress)
    # One of many sources may fail, and apt-get reports success even when offline. So check that there are lists.
    if not any("_Packages" in path.name for path in (folder / "lists").iterdir()):
        raise CorpusError(f"apt-get update failed, is there a network? {_error_line(output)}")
    return options, code == 0 and "Failed to fetch" not in output


def _apt(command: list[str], folder: Path, label: str, progress: Callable[[str], object]) -> tuple[int, str]:
    """Run apt-get in ``folder`` and report its progress.

    Returns:
        Exit status and all output.

    Raises:
        CorpusError: Nothing happened for two minutes; apt-get is then killed.
    """
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile() as log:
        # A new session, so that apt-get's download helpers can be killed with it.
        process = subprocess.Popen(
            [*command, *_APT_OPTIONS],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        num_bytes, start = 0, time.monotonic()
        last_change = last_shown = start
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                now, bytes_before = time.monotonic(), num_bytes
                num_bytes = os.fstat(log.fileno()).st_size
                for path in _files(folder):
                    with contextlib.suppress(FileNotFoundError):  # apt-get renames and deletes
                        num_bytes += path.stat().st_size
                last_change = now if num_bytes != bytes_before else last_change
                if now - last_change > _STALL_SECONDS:
                    raise CorpusError(f"{' '.join(command[:3])} did nothing for {_STALL_SECONDS:.0f} s")
                if now - last_shown > 5.0:
                    progress(f"{label}: {num_bytes / 1e6:.1f} MB, {num_bytes / 1e6 / (now - start):.1f} MB/s")
                    last_shown = now
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return process.returncode, log.read().decode("utf-8", "replace")


def _error_line(output: str) -> str:
    """The most informative line of apt-get's output: the last one about a failed transfer, or its last error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"^[EW]\w*: Failed to fetch|^E\w*: Unable to locate", r"^E\w*:", r"^(W\w*|Err):", ""):
        if matching := [line for line in lines if re.search(pattern, line)]:
            return matching[-1]
    return "no output"


def _files(folder: Path) -> list[Path]:
    """All regular files below a folder, sorted; links are left out."""
    paths = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def _unpack(deb: Path, tree: Path, package: str) -> None:
    """Unpack a package and the archives in it into ``tree``, and mark it as complete."""
    result = subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise CorpusError(f"dpkg-deb -x {deb.name} failed: {_error_line(result.stderr)}")
    deb.unlink()
    for archive in [path for path in _files(tree) if path.name in _ARCHIVES.get(package, ())]:
        try:
            _unzip(archive, archive.with_name(archive.name + "!"))
        except zipfile.BadZipFile as error:
            raise CorpusError(f"{package}: {archive.name}: {error}") from error
        archive.unlink()
    (tree / _MARKER).write_text(f"{deb.name}\n")


def _unzip(archive: Path, folder: Path) -> None:
    """Extract the audio files of a zip file, without those whose path leads outside of ``folder``."""
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
    """The clips to pretrain on, sorted by package and file.

    Left out are files that the manifest marks ``pretrain=0`` (``tasks``: downstream tasks test on them), byte-identical
    copies of these under other names (``copies_of_tasks``), and further byte-identical copies (``duplicates``; the
    first in order stays).

    Args:
        cache: Folder that ``fetch`` filled. Default: ``default_cache()``.
        packages: Names of Debian packages; those that are not in the cache are skipped.

    Returns:
        The clips, and numbers of files: ``found``, and left out for each of the reasons above.

    Raises:
        ValueError: None of the packages is in the cache.
    """
    cache = Path(cache or default_cache()).expanduser().absolute()
    manifest = resources.files(__package__).joinpath("assets/manifest.tsv.gz").read_bytes()
    rows = csv.DictReader(gzip.decompress(manifest).decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    task_files: set[tuple[str, str]] = set()
    kinds: dict[tuple[str, str], str] = {}
    for row in rows:
        kinds[row["package"], row["source_file"]] = row["kind"]
        if row["pretrain"] != "1":
            task_files.add((row["package"], row["source_file"]))
    clips: list[CorpusClip] = []
    digests: list[bytes] = []
    for package in sorted(packages):
        if not (cache / package / _MARKER).exists():
            continue
        for path in _files(cache / package):
            source_file = path.relative_to(cache / package).as_posix().replace("!/", "!")
            if path.suffix.lower() in AUDIO_SUFFIXES and (package, source_file) not in _NOT_RECORDED:
                kind, voice = _labels(package, source_file)
                clips.append(
                    CorpusClip(
                        path=str(path),
                        name=f"{package}/{source_file}",
                        kind=kinds.get((package, source_file), kind),
                        group=package,
                        source_file=source_file,
                        voice=voice,
                    )
                )
                digests.append(hashlib.md5(path.read_bytes(), usedforsecurity=False).digest())
    if not clips:
        raise ValueError(f"no package of the default corpus in {cache}: fetch it first")
    counts = {"found": len(clips), "tasks": 0, "copies_of_tasks": 0, "duplicates": 0}
    in_task = [(clip.group, clip.source_file) in task_files for clip in clips]
    task_digests = {digest for digest, is_task in zip(digests, in_task, strict=True) if is_task}
    kept_digests: set[bytes] = set()
    kept = []
    for clip, digest, is_task in zip(clips, digests, in_task, strict=True):
        if is_task:
            counts["tasks"] += 1
        elif digest in task_digests:
            counts["copies_of_tasks"] += 1
        elif digest in kept_digests:
            counts["duplicates"] += 1
        else:
            kept_digests.add(digest)
            kept.append(clip)
    return kept, counts


def _labels(package: str, source_file: str) -> tuple[str, str]:
    """(kind, voice) from the names of file and folders."""
    stem = PurePosixPath(source_file).stem
    if package.startswith("asterisk-core-sounds-"):
        tone = "/silence/" in source_file or re.fullmatch(r"beep\w*|\w+-2tone", stem)
        voice = re.search(
            r"/sounds/(?:[a-z]+_[A-Z]+_)?([^/]+)/", source_file
        )  # without the language: Allison speaks two
        return "tone" if tone else "speech", f"ast_{voice[1]}" if voice else package
    if package.startswith("fillets-ng-data-"):
        fish = re.search(r"(?:^|[-_])([vm])(?:[-_]|$)", stem)
        role = {"v": "big", "m": "small"}[fish[1]] if fish else "other"
        return "speech", f"fish_{package.rpartition('-')[2]}_{role}"
    if package == "klettres-data":
        return "speech", f"klet_{source_file.split('/')[3]}"
    if package == "asterisk-moh-opsound-g722" or "/Music Loops/" in source_file or stem.startswith("loop_"):
        return "music", ""
    return "speech" if "/Vocals/" in source_file else "sound", ""


def held_out(clips: Sequence[CorpusClip]) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips so that no voice and no package is on both sides.

    One package of speech and one of sounds are held out, each with the packages that share a voice with it. Of a list
    of preference, the first package is taken that leaves clips of every kind to train on.

    Args:
        clips: Usable clips, from ``default_clips``.

    Returns:
        Indices int64 (train,) and (held-out,), both ascending, and a sentence that describes the split.

    Raises:
        ValueError: Nothing can be held out.
    """
    kinds = {clip.kind for clip in clips} - {"tone"}
    voice_packages: dict[str, set[str]] = {}
    for clip in clips:
        if clip.voice:
            voice_packages.setdefault(clip.voice, set()).add(clip.group)
    chosen: set[str] = set()
    for kind, preferred in _HELD_OUT.items():
        present = sorted({clip.group for clip in clips if clip.kind == kind} - chosen)
        for package in sorted(present, key=lambda p: preferred.index(p) if p in preferred else len(preferred)):
            candidate = chosen | {package}
            while new := set().union(*(p for p in voice_packages.values() if p & candidate)) - candidate:
                candidate |= new
            if kinds <= {clip.kind for clip in clips if clip.group not in candidate}:
                chosen = candidate
                break
    if not chosen:
        raise ValueError(
            f"cannot hold out a package and leave every kind: got {sorted({clip.group for clip in clips})}"
        )
    mask = np.array([clip.group in chosen for clip in clips])
    summary = f"held out: {mask.sum()} of {mask.size} clips, whole packages and voices: {', '.join(sorted(chosen))}"
    return np.flatnonzero(~mask), np.flatnonzero(mask), summary
