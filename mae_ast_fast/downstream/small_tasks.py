"""Six small tasks on real recordings out of Debian packages: their lists are shipped, ``build`` makes the audio.

Labels come from file and folder names; nobody listened to the clips. Splits keep apart what would give the answer away:
a test syllable of zh_initial22 was never trained on in any tone, nor a test phrase of hogvoice14 and sid32; folds of
vocal4 have other characters, those of esc14 other recordings, ru_phone other sentences. Every clip was cut to where it
sounds and set to one loudness when the lists were made; the shipped manifest says where and by how much. No clip of
``default_clips`` is in a validation or test split; in cross-validation, where the split's training clips (folds 0 - 2)
are tested on in turn, some of them were heard in pretraining, without their labels.
"""

from __future__ import annotations

import csv
import gzip
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.audio import SAMPLE_RATE, AudioError, to_pcm16
from ..data.corpus import NotInRelease, default_cache, fetch
from ..data.decoder import Decoder
from ..files import atomic_write, locked
from .datasets import write_manifest

_SHORTER_SECONDS = 0.05  # by more, and the source is not the recording that was listed
# To download, in 10^6 bytes (Debian 12).
_MEGABYTES = {
    "0ad-data": 1377.6,
    "asterisk-core-sounds-en-g722": 10.6,
    "asterisk-core-sounds-es-g722": 13.0,
    "asterisk-core-sounds-fr-g722": 10.8,
    "asterisk-core-sounds-it-g722": 10.1,
    "asterisk-core-sounds-ru-g722": 10.6,
    "asterisk-prompt-es-co": 1.0,
    "asterisk-prompt-fr-armelle": 1.5,
    "asterisk-prompt-it-menardi-wav": 18.8,
    "boswars-data": 74.1,
    "bucklespring-data": 2.6,
    "festvox-ru": 178.7,
    "fillets-ng-data-cs": 39.0,
    "fillets-ng-data-nl": 32.6,
    "flare-game": 122.5,
    "gcin-voice": 7.7,
    "hedgewars-data": 145.3,
    "lincity-ng-data": 44.8,
    "megaglest-data": 242.0,
    "minetest-data": 3.6,
    "openarena-081-players": 74.7,
    "openarena-data": 44.0,
    "qabcs-data": 33.6,
    "scratch": 25.7,
    "searchandrescue-data": 46.5,
    "simutrans-pak64": 3.0,
    "sonic-pi-samples": 21.9,
    "torcs-data": 333.3,
    "tuxpaint-stamps-default": 160.9,
    "ufoai-sound": 18.7,
    "unknown-horizons": 248.5,
    "warmux-data": 98.5,
    "warzone2100-data": 142.6,
    "wesnoth-1.16-data": 146.2,
    "widelands-data": 381.4,
}


class TaskInfo(NamedTuple):
    """What a task asks, and how it is measured."""

    what: str
    metric: str


TASKS = {
    "zh_initial22": TaskInfo("22 onsets of Mandarin syllables, 2 speakers", "accuracy"),
    "hogvoice14": TaskInfo("14 voices of game characters", "accuracy, 5 folds"),
    "ru_phone": TaskInfo("48 Russian phones, one speaker, frame by frame", "frame accuracy"),
    "sid32": TaskInfo("32 voices, 15 languages", "accuracy"),
    "vocal4": TaskInfo("4 vocalisations: death, pain, effort, command", "accuracy, 5 folds"),
    "esc14": TaskInfo("14 classes of sounds", "accuracy, 5 folds"),
}


def task_rows(name: str) -> list[dict[str, str]]:
    """The shipped list of a task: ``path`` as in the shipped manifest, ``label`` or ``phones``, ``split``, ``fold``.

    Raises:
        ValueError: No such task.
    """
    if name not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)}, got {name!r}")
    return _table(f"tasks/{name}.tsv.gz")


def _table(asset: str) -> list[dict[str, str]]:
    content = resources.files("mae_ast_fast.data").joinpath("assets", *asset.split("/")).read_bytes()
    text = gzip.decompress(content).decode()
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def packages(name: str) -> dict[str, float]:
    """The packages of a task, the smallest first: name -> size to download in 10^6 bytes."""
    needed = {row["path"].split("/")[1] for row in task_rows(name)}
    return {package: _MEGABYTES[package] for package in sorted(needed, key=_MEGABYTES.__getitem__)}


def build(
    names: Sequence[str],
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:
    """Makes the audio and the manifests of small tasks, those with the least to download first.

    ``OUT/audio/PACKAGE/ID.wav``, 16 kHz mono PCM16, and ``OUT/TASK.tsv``, with paths relative to ``out``. Killed at any
    time, the same call goes on; clips that are there stay. A package that this system's release lacks and a file that
    gives no audio cost their clips alone, which are left out of the manifest.

    Args:
        names: Of ``TASKS``.
        out: Folder.
        cache: Of packages, as in ``corpus.fetch``.
        progress: Told in sentences.

    Returns:
        Task -> ``manifest`` (path, or None without any clip), ``clips``, ``minutes`` and ``left_out``, reason -> paths.

    Raises:
        ValueError: No such task.
        CorpusError: No apt-get or dpkg-deb, no network or no space.
    """
    sizes = {name: sum(packages(name).values()) for name in names}
    out, cache = Path(out).expanduser().absolute(), Path(cache or default_cache()).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    sources = {row["path"]: row for row in _table("manifest.tsv.gz")}
    with locked(out / ".lock"):
        return {name: _build(name, out, cache, sources, progress) for name in sorted(sizes, key=sizes.__getitem__)}


def _build(
    name: str, out: Path, cache: Path, sources: dict[str, dict[str, str]], progress: Callable[[str], object]
) -> dict[str, Any]:
    rows = task_rows(name)
    made = {row["path"]: str(Path(row["path"]).with_suffix(".wav")) for row in rows}
    todo: dict[str, list[str]] = {package: [] for package in packages(name)}
    for path, target in made.items():
        if not (out / target).exists():
            todo[sources[path]["package"]].append(path)
    todo = {package: paths for package, paths in todo.items() if paths}
    faults: dict[str, str] = {}
    if todo:
        there: Sequence[str] = ()
        new = sum(_MEGABYTES[package] for package in todo if not (cache / package).is_dir())
        clips, of = sum(map(len, todo.values())), len(todo)
        which = f"{clips} clip{'s' * (clips > 1)} of {of} package{'s' * (of > 1)}"
        progress(f"{name}: {which}, {new:,.0f} MB to download")
        try:
            there = fetch(cache, list(todo), progress).packages
        except NotInRelease:
            progress(f"{name}: none of its packages is in this system's release: {', '.join(todo)}")
        for package, paths in todo.items():
            if package in there:
                start = time.monotonic()
                found = _cut_clips(cache / package, [(sources[path], out / made[path]) for path in paths])
                faults.update(found)
                spent = time.monotonic() - start
                progress(f"{name}: {package}: {len(paths) - len(found)} of {len(paths)} clips in {spent:.1f} s")
            else:
                faults.update(dict.fromkeys(paths, f"{package} is not in this system's release"))
    left_out: dict[str, list[str]] = {}
    for path, reason in sorted(faults.items()):
        left_out.setdefault(reason, []).append(path)
    kept = [{**row, "path": made[row["path"]]} for row in rows if row["path"] not in faults]
    manifest = out / f"{name}.tsv"
    if kept:
        write_manifest(kept, manifest)
    else:
        manifest.unlink(missing_ok=True)
    seconds = sum(float(sources[path]["seconds"]) for path in made if path not in faults)
    return {
        "manifest": str(manifest) if kept else None,
        "clips": len(kept),
        "minutes": seconds / 60,
        "left_out": left_out,
    }


def _cut_clips(package: Path, clips: Sequence[tuple[dict[str, str], Path]]) -> dict[str, str]:
    """Writes the clips of a package, each (row of the shipped manifest, WAV file); path in the manifest -> fault."""
    import soundfile

    by_source: dict[str, list[tuple[dict[str, str], Path]]] = {}
    for clip in clips:
        by_source.setdefault(clip[0]["source_file"], []).append(clip)
    faults = {}
    with tempfile.TemporaryDirectory(prefix="mae_ast_fast_") as work:
        decoder = Decoder(Path(work) / "pcm")
        try:
            for source, parts in by_source.items():
                try:
                    pcm = _decode(decoder, package / source.replace("!", "!/", 1))
                except AudioError as error:
                    faults.update({row["path"]: f"{row['package']}: {error.reason}" for row, _ in parts})
                    continue
                for row, target in parts:
                    start, length = (round(float(row[key]) * SAMPLE_RATE) for key in ("start", "seconds"))
                    clip = pcm[start : start + length]
                    if clip.size < length - _SHORTER_SECONDS * SAMPLE_RATE:
                        faults[row["path"]] = f"{row['package']}: shorter than the recording that was listed"
                        continue
                    louder = to_pcm16(clip * np.float32(10 ** (float(row["gain_db"]) / 20) / 32768))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(target, lambda partial, pcm=louder: soundfile.write(partial, pcm, SAMPLE_RATE))
        finally:
            decoder.close()
    return faults


def _decode(decoder: Decoder, path: Path) -> np.ndarray:
    """int16 (S,) at 16 kHz."""
    if not path.is_file():
        raise AudioError(path, "not in the package")
    result = decoder.decode(str(path))
    if "reason" in result:
        raise AudioError(path, result["reason"])
    return np.fromfile(decoder.pcm_path, "<i2")
