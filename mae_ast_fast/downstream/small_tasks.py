"""Six small tasks on real recordings from Debian packages. Their lists are shipped; ``build`` writes the audio.

Labels come from file and folder names; nobody listened to the clips. The splits separate what would leak the answer. A
test syllable of zh_initial22 does not occur in training in any tone, nor does a test phrase of hogvoice14 or sid32.
Folds of vocal4 have different characters, those of esc14 different recordings, those of ru_phone other sentences.

When the lists were made, every clip was cut to its audible part and scaled to the same loudness; the shipped manifest
records both. No clip of ``default_clips`` is in a validation or test split. In cross-validation the training clips of
the split (folds 0 - 2) are tested too: some of them were in the pretraining data, without their labels.
"""

from __future__ import annotations

import csv
import functools
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

_TOLERANCE_SECONDS = 0.05  # a source that is shorter by more is not the listed recording
# Download size in 10^6 bytes (Debian 12).
_DOWNLOAD_MB = {
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
    """A small task: its classes, and its metric."""

    description: str
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
        ValueError: Unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)}, got {name!r}")
    return _table(f"tasks/{name}.tsv.gz")


def _table(asset: str) -> list[dict[str, str]]:
    """Rows of a shipped, compressed table."""
    content = resources.files("mae_ast_fast.data").joinpath("assets", *asset.split("/")).read_bytes()
    text = gzip.decompress(content).decode()
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def packages(name: str) -> dict[str, float]:
    """The packages of a task, the smallest first: name -> download size in 10^6 bytes."""
    needed = {row["path"].split("/")[1] for row in task_rows(name)}
    return {package: _DOWNLOAD_MB[package] for package in sorted(needed, key=_DOWNLOAD_MB.__getitem__)}


def build(
    names: Sequence[str],
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:
    """Write the audio and the manifests of small tasks, the smallest download first.

    Writes ``OUT/audio/PACKAGE/ID.wav``, 16 kHz mono PCM16, and ``OUT/TASK.tsv`` with paths relative to ``out``. After a
    kill the same call resumes and keeps the existing clips. If this system's release lacks a package, or a file cannot
    be decoded, the manifest leaves out its clips.

    Args:
        names: Names of tasks, from ``TASKS``.
        out: Output folder; created if it does not exist.
        cache: Folder for packages, as in ``corpus.fetch``. None: ``corpus.default_cache()``.
        progress: Function that is called with progress messages.

    Returns:
        Task -> ``manifest`` (path; None without any clip), ``clips``, ``minutes`` and ``left_out`` (reason -> paths).

    Raises:
        ValueError: Unknown task.
        CorpusError: apt-get or dpkg-deb is missing, or there is no network or no space.
    """
    sizes = {name: sum(packages(name).values()) for name in names}
    out, cache = Path(out).expanduser().absolute(), Path(cache or default_cache()).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    sources = {row["path"]: row for row in _table("manifest.tsv.gz")}
    with locked(out / ".lock"):
        return {
            name: _build_task(name, out, cache, sources=sources, progress=progress)
            for name in sorted(sizes, key=sizes.__getitem__)
        }


def _build_task(
    name: str, out: Path, cache: Path, *, sources: dict[str, dict[str, str]], progress: Callable[[str], object]
) -> dict[str, Any]:
    """``build`` for one task; ``sources`` are the rows of the shipped manifest by path."""
    rows = task_rows(name)
    wav_paths = {row["path"]: str(Path(row["path"]).with_suffix(".wav")) for row in rows}
    missing: dict[str, list[str]] = {package: [] for package in packages(name)}
    for path, wav_path in wav_paths.items():
        if not (out / wav_path).exists():
            missing[sources[path]["package"]].append(path)
    missing = {package: paths for package, paths in missing.items() if paths}
    faults: dict[str, str] = {}
    if missing:
        available: Sequence[str] = ()
        download_mb = sum(_DOWNLOAD_MB[package] for package in missing if not (cache / package).is_dir())
        num_clips, num_packages = sum(map(len, missing.values())), len(missing)
        counts = f"{num_clips} clip{'s' * (num_clips > 1)} of {num_packages} package{'s' * (num_packages > 1)}"
        progress(f"{name}: {counts}, {download_mb:,.0f} MB to download")
        try:
            available = fetch(cache, list(missing), progress).packages
        except NotInRelease:
            progress(f"{name}: none of its packages is in this system's release: {', '.join(missing)}")
        for package, paths in missing.items():
            if package in available:
                start = time.monotonic()
                package_faults = _cut_clips(cache / package, [(sources[path], out / wav_paths[path]) for path in paths])
                faults.update(package_faults)
                elapsed, num_cut = time.monotonic() - start, len(paths) - len(package_faults)
                progress(f"{name}: {package}: {num_cut} of {len(paths)} clips in {elapsed:.1f} s")
            else:
                faults.update(dict.fromkeys(paths, f"{package} is not in this system's release"))
    left_out: dict[str, list[str]] = {}
    for path, reason in sorted(faults.items()):
        left_out.setdefault(reason, []).append(path)
    kept = [{**row, "path": wav_paths[row["path"]]} for row in rows if row["path"] not in faults]
    manifest = out / f"{name}.tsv"
    if kept:
        write_manifest(kept, manifest)
    else:
        manifest.unlink(missing_ok=True)
    seconds = sum(float(sources[path]["seconds"]) for path in wav_paths if path not in faults)
    return {
        "manifest": str(manifest) if kept else None,
        "clips": len(kept),
        "minutes": seconds / 60,
        "left_out": left_out,
    }


def _cut_clips(package: Path, clips: Sequence[tuple[dict[str, str], Path]]) -> dict[str, str]:
    """Cut the clips of a package out of its recordings.

    Args:
        package: Folder of the unpacked package.
        clips: (row of the shipped manifest, WAV file to write) of each clip.

    Returns:
        Path in the shipped manifest -> reason, for clips that could not be written.
    """
    import soundfile

    by_source: dict[str, list[tuple[dict[str, str], Path]]] = {}
    for row, target in clips:
        by_source.setdefault(row["source_file"], []).append((row, target))
    faults = {}
    with tempfile.TemporaryDirectory(prefix="mae_ast_fast_") as work:
        decoder = Decoder(Path(work) / "pcm")
        try:
            for source, source_clips in by_source.items():
                try:
                    recording = _decode(decoder, package / source.replace("!", "!/", 1))
                except AudioError as error:
                    faults.update({row["path"]: f"{row['package']}: {error.reason}" for row, _ in source_clips})
                    continue
                for row, target in source_clips:
                    start, num_samples = (round(float(row[key]) * SAMPLE_RATE) for key in ("start", "seconds"))
                    clip = recording[start : start + num_samples]
                    if clip.size < num_samples - _TOLERANCE_SECONDS * SAMPLE_RATE:
                        faults[row["path"]] = f"{row['package']}: shorter than the listed recording"
                        continue
                    scaled = to_pcm16(clip * np.float32(10 ** (float(row["gain_db"]) / 20) / 32768))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write = functools.partial(soundfile.write, data=scaled, samplerate=SAMPLE_RATE)
                    atomic_write(target, write)
        finally:
            decoder.close()
    return faults


def _decode(decoder: Decoder, path: Path) -> np.ndarray:
    """Decode a file to int16 (S,) at 16 kHz.

    Raises:
        AudioError: The file does not exist or cannot be decoded.
    """
    if not path.is_file():
        raise AudioError(path, "not in the package")
    result = decoder.decode(str(path))
    if "reason" in result:
        raise AudioError(path, result["reason"])
    return np.fromfile(decoder.pcm_path, "<i2")
