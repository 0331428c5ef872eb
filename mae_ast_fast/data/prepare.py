"""Audio decoded once, into Lhotse Shar shards to pretrain on. ``shards.py`` reads them, and so does Lhotse."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import stat
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..files import locked, write_json
from .audio import SAMPLE_RATE, AudioFile, find_audio
from .decoder import Decoder, Progress
from .splits import split
from .storage import file_system, json_lines, list_files

MIN_SECONDS = 0.3  # shorter ones are no clips, as in pretraining
_VERSION = 1  # of the shards: raise it when decoding changes the samples
_PIECE_SECONDS = 120  # a longer recording is cut, so that no member of a shard is huge
_SHARDS = 256  # as many as there are, where that makes them neither smaller nor larger than ...
_SHARD_BYTES = (1 << 24, 1 << 30)  # ... this, of source files
_SILENT_PEAK = 1e-3  # the idle noise of G.722, which codes silence, peaks at 4e-4
_CLIPPED_SHARE = 1e-3  # of the samples at full scale
_MAX_NAMES = 1000  # names listed for one finding of a report; its count is always whole


def default_entries(progress: Callable[[str], object]) -> list[AudioFile]:
    """The clips of the default corpus, fetched where needed.

    Raises:
        CorpusError: It cannot be had here.
    """
    from . import corpus

    found = corpus.fetch(progress=progress)
    clips, _ = corpus.default_clips(found.cache, found.packages)
    return list(clips)


# ------------------------------------------------------------------------------------------------------------- shards

Split = Callable[[Sequence[AudioFile]], tuple[np.ndarray, np.ndarray, str]]


@dataclasses.dataclass
class Plan:
    """What ``write_shards`` is to do.

    Attributes:
        entries: All clips; of a cut, ``path`` is what ``data.serve_cuts`` takes.
        sizes: Bytes of each, -1 where there is no file.
        shards: Which entries go into each shard.
        cuts: The entries are Lhotse's cuts.
        form: wav or flac.
        min_seconds: Shorter clips are skipped.
        split: Holds clips out; None: ``data.split``.
        key: Digest of all that the shards depend on.
    """

    entries: Sequence[AudioFile]
    sizes: list[int]
    shards: list[list[int]]
    cuts: bool
    form: str
    min_seconds: float
    split: Split | None
    key: str


def prepare_shards(
    source: str | os.PathLike | Sequence[AudioFile],
    out: str | os.PathLike,
    *,
    form: str = "wav",
    min_seconds: float = MIN_SECONDS,
    workers: int = 2,
    split: Split | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decodes a source once into Lhotse Shar shards, 16 kHz mono, which ``CutSet.from_shar(in_dir=out)`` reads.

    Recordings are shuffled over the shards, so that these are like each other (cuts of Shar stay in theirs), and one
    that is longer than 2 minutes is cut into equal pieces. A file that crashes or hangs one of the ``workers``
    processes is skipped. Killed at any time, the same call goes on with the shards that ``OUT.partial`` lacks; ``out``
    appears whole or not at all.

    Args:
        source: Folder of audio, fairseq ``.tsv``, audio file, CutSet manifest (``.jsonl``, ``.jsonl.gz``), Lhotse Shar
            folder, a URL of one of the last two, or entries.
        out: New folder. The report goes beside it, to ``OUT.report.json``: Lhotse takes every file in the folder.
        form: wav (int16) or flac.
        min_seconds: Shorter clips are skipped.
        workers: Processes that decode.
        split: Of the usable entries; indices to train on, indices to hold out, and a sentence. None: ``data.split``.
        progress: Says on stderr how far it is.

    Returns:
        The report: ``files``, ``clips``, ``pieces``, ``hours``; ``skipped``: reason -> finding; the findings ``silent``
        (peak under 1e-3 of full scale), ``clipped`` (at least 0.1 % of the samples at 16 kHz mono reach 0.9999 of full
        scale) and ``duplicate`` (byte-identical to an earlier file), which are kept; ``split``, a sentence, ``train``
        and ``held_out``, clips; ``shards``: names and sizes. A finding has ``count`` and up to 1000 ``names``.

    Raises:
        ValueError: Nothing usable (the reasons are counted), ``out`` holds something else, or a bad option.
        FileNotFoundError: No such source.
        OSError: ``out`` cannot be written.
    """
    return write_shards(plan(source, form=form, min_seconds=min_seconds, split=split), out, workers, progress)


def kind_of(source: str | os.PathLike) -> str:
    """prepared (by us), shar (by others), cuts (a CutSet manifest) or audio.

    Raises:
        FileNotFoundError: A URL under which there is nothing that can be read.
    """
    source = os.fspath(source).rstrip("/")
    if source.lower().endswith((".jsonl", ".jsonl.gz")):
        return "cuts"
    fs, root = file_system(source)
    if fs is None and not os.path.isdir(root):
        return "audio"
    if fs is not None:
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            if "shards" in json.loads(fs.cat_file(f"{root}.report.json")):
                return "prepared"
    names = _shar_fields(list_files(fs, root)).get("cuts", ())
    if not names:
        if fs is not None:
            raise FileNotFoundError(f"no Lhotse Shar shards under {source}: expected cuts.*.jsonl.gz, recording.*.tar")
        return "audio"
    for name in names:
        with contextlib.suppress(ValueError, OSError, EOFError, StopIteration):
            custom = next(json_lines(f"{source}/{name}")).get("custom") or {}
            return "prepared" if {"name", "split", "offset", "size", "crc32"} <= custom.keys() else "shar"
    return "shar"


def _shar_fields(names: Iterable[str]) -> dict[str, list[str]]:
    """Files of each field of a Lhotse Shar folder."""
    fields: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith((".tar", ".tar.gz", ".jsonl", ".jsonl.gz")):
            fields.setdefault(name.partition(".")[0], []).append(name)
    return fields


def plan(
    source: str | os.PathLike | Sequence[AudioFile],
    *,
    form: str = "wav",
    min_seconds: float = MIN_SECONDS,
    split: Split | None = None,
) -> Plan:
    """Lists the clips of a source and shares them out; see ``prepare_shards``."""
    if form not in ("wav", "flac"):
        raise ValueError(f"the format must be wav or flac, got {form!r}")
    digest = hashlib.sha256(f"{_VERSION} {form} {min_seconds} {getattr(split, '__qualname__', split)}".encode())
    kind = kind_of(source) if isinstance(source, (str, os.PathLike)) else "audio"
    sizes, shards = [], []
    if kind == "audio":
        entries = find_audio(source) if isinstance(source, (str, os.PathLike)) else source
        for entry in entries:
            sizes.append(-1)
            with contextlib.suppress(OSError):
                found = os.stat(entry.path)
                sizes[-1] = found.st_size if stat.S_ISREG(found.st_mode) else -1
                digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
            digest.update(os.fsencode(entry.path) + b"\0")
    else:
        path = os.fspath(source).rstrip("/")
        path = path if "://" in path else os.path.abspath(os.path.expanduser(path))
        entries = []
        for files in [{"cuts": path}] if kind == "cuts" else _shar_shards(path):
            shards.append([])
            try:
                for index, cut in enumerate(json_lines(files["cuts"])):
                    what = {"cut": cut} if kind == "cuts" else {"shar": files, "index": index}
                    recording = cut.get("recording") or {}
                    shards[-1].append(len(entries))
                    name = str(cut["id"]).encode("utf-8", "backslashreplace").decode()
                    entries.append(AudioFile(json.dumps(what), name, group=str(recording.get("id", ""))))
                    sizes.append(round(2 * SAMPLE_RATE * float(cut.get("duration", 0.0))))
                    digest.update(entries[-1].path.encode() + b"\0")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, EOFError, zlib.error) as error:
                raise ValueError(
                    f"{files['cuts']}: no Lhotse cut after {len(shards[-1])} of them: {error!r}"
                ) from error
        if not entries:
            raise ValueError(f"no cut in {path}")
    if kind != "shar":  # whose audio can only be read one after the other
        order = list(range(len(entries)))
        random.Random(0).shuffle(order)
        shards = [[]]
        least, most = _SHARD_BYTES
        target, filled = min(max(sum(sizes) // _SHARDS, least), most), 0
        for index in order:
            if filled >= target:
                shards.append([])
                filled = 0
            shards[-1].append(index)
            filled += max(sizes[index], 0) + 4096
    return Plan(entries, sizes, shards, kind != "audio", form, min_seconds, split, digest.hexdigest())


def _shar_shards(path: str) -> list[dict[str, str]]:
    """Manifest and tar file of each shard of a Lhotse Shar folder."""
    fields = _shar_fields(list_files(*file_system(path)))
    cuts, recordings = fields["cuts"], fields.get("recording", [])
    if len(cuts) != len(recordings):
        raise ValueError(
            f"{path}: expected a recording.*.tar for each cuts.*.jsonl, got {len(recordings)}, {len(cuts)}"
        )
    return [{"cuts": f"{path}/{a}", "recording": f"{path}/{b}"} for a, b in zip(cuts, recordings, strict=True)]


def write_shards(plan: Plan, out: str | os.PathLike, workers: int = 2, progress: bool = True) -> dict[str, Any]:
    """Writes what is planned; see ``prepare_shards``."""
    import lhotse  # noqa: F401 (a missing library is to fail here, not in every decoding process)
    import soundfile  # noqa: F401
    import soxr  # noqa: F401

    out = Path(os.path.abspath(os.path.expanduser(out)))
    partial, report_path = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.report.json")
    if (report := _finished(out, report_path, plan.key)) is not None:
        return report
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / "lock"):
        if (report := _finished(out, report_path, plan.key)) is not None:  # another process was first
            return report
        if not (partial / "plan.json").is_file() or json.loads((partial / "plan.json").read_text()) != plan.key:
            if (partial / "plan.json").exists():
                print(f"{partial} is of other files or options: starting anew", file=sys.stderr, flush=True)
            for name in ("shards", "results"):
                shutil.rmtree(partial / name, ignore_errors=True)
            write_json(partial / "plan.json", plan.key)
        shutil.rmtree(partial / "work", ignore_errors=True)
        for name in ("shards", "results", "work"):
            (partial / name).mkdir(exist_ok=True)
        missing = [n for n in range(len(plan.shards)) if not _result_path(partial, n).is_file()]
        if progress:
            done = len(plan.shards) - len(missing)
            more = f", going on after {done} of {len(plan.shards)} shards" if done else ""
            print(f"decoding {len(plan.entries):,} clips to 16 kHz mono in {out}{more}", file=sys.stderr, flush=True)
        _decode_all(plan, partial, missing, workers, progress)
        report = _write_manifests(plan, partial)
        for reason, finding in report["skipped"].items() if progress else ():
            some = ", ".join(finding["names"][:3]) + " ..." * (finding["count"] > 3)
            print(f"skipped {finding['count']}: {reason}: {some}", file=sys.stderr, flush=True)
        if out.exists():  # empty, or damaged, and its report says that it was made of the same
            shutil.rmtree(out)
        write_json(report_path, report)
        os.rename(partial / "shards", out)
        shutil.rmtree(partial)
    return report


def _finished(out: Path, report_path: Path, key: str) -> dict[str, Any] | None:
    """The report of ``out`` if that is there and whole.

    Raises:
        ValueError: There is something else.
    """
    report: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(report_path.read_text())
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if report.get("key") != key or not out.is_dir():
        raise ValueError(f"{out} exists and holds something else than these files and options give: name a new folder")
    sizes = list_files(None, str(out))
    manifests = sum(name.startswith("cuts.") for name in sizes)
    whole = manifests == len(report["shards"]) and all(sizes.get(name) == size for name, size in report["shards"])
    return report if whole else None


def _decode_all(plan: Plan, partial: Path, missing: Sequence[int], workers: int, progress: bool) -> None:
    """A tar file in ``partial/shards`` and then a file in ``partial/results`` for each shard that is missing."""
    from lhotse.audio import audio_backend

    todo = iter(missing)
    bar = None
    if progress and missing:
        bar = Progress(len(plan.entries), len(plan.entries) - sum(len(plan.shards[n]) for n in missing))
    lock, stop = threading.Lock(), threading.Event()

    def tick(result: dict[str, Any]) -> None:
        if stop.is_set():
            raise InterruptedError("another worker failed")
        if bar is not None:
            with lock:
                bar.add(result.get("samples", 0) / SAMPLE_RATE)

    def work(number: int) -> None:
        decoder = Decoder(partial / "work" / f"decoder-{number}", plan.cuts)
        try:
            while not stop.is_set():
                with lock:
                    shard = next(todo, None)
                if shard is None:
                    return
                _write_shard(plan, shard, partial, decoder, tick)
        finally:
            decoder.close()

    # Of Lhotse's ways to write audio, the one that every installation has and that keeps int16 as it is.
    with audio_backend("LibsndfileBackend"), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, number) for number in range(workers)]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            stop.set()


def _result_path(partial: Path, shard: int) -> Path:
    return partial / "results" / f"{shard:06d}.json"


def _write_shard(plan: Plan, shard: int, partial: Path, decoder: Decoder, tick: Callable[[dict], None]) -> None:
    from lhotse import Recording
    from lhotse.audio import AudioSource
    from lhotse.shar import AudioTarWriter

    results, checksums = [], []
    pattern = str(partial / "work").replace("%", "%%") + "/recording.%06d.tar"
    with AudioTarWriter(pattern, shard_size=sys.maxsize, format=plan.form, shard_offset=shard) as writer:
        for index in plan.shards[shard]:
            entry = plan.entries[index]
            result = decoder.decode(entry.path) if plan.sizes[index] >= 0 else {"reason": "missing or no regular file"}
            if "reason" not in result and result["samples"] < max(1.0, plan.min_seconds * SAMPLE_RATE):
                result = {"reason": f"shorter than {plan.min_seconds:g} s" if result["samples"] else "no samples"}
            result["entry"] = index
            results.append(result)
            if "reason" not in result:
                samples = result["samples"]
                number = -(-samples // (_PIECE_SECONDS * SAMPLE_RATE))
                edges = [samples * k // number for k in range(number + 1)]  # equal: no rest that is too short
                result["pieces"] = []
                for k, (start, end) in enumerate(itertools.pairwise(edges)):
                    pcm = np.fromfile(decoder.pcm_path, "<i2", end - start, offset=2 * start)
                    # Of the name, what is a name of a file everywhere; short, for the tar format has room for 100.
                    key = f"{re.sub('[^A-Za-z0-9_.-]+', '_', entry.name)[-60:].lstrip('.')}-{index}-{k}"
                    source = [AudioSource("memory", [0], "")]
                    recording = Recording(key, source, SAMPLE_RATE, pcm.size, pcm.size / SAMPLE_RATE)
                    writer.write(key, pcm[None], SAMPLE_RATE, recording)
                    result["pieces"].append([key, pcm.size])
                    checksums.append(zlib.crc32(pcm))
            tick(result)
    if checksums:
        name = f"recording.{shard:06d}.tar"
        _find_members(partial / "work" / name, plan.form, results, checksums)
        os.rename(partial / "work" / name, partial / "shards" / name)
    write_json(_result_path(partial, shard), results)


def _find_members(path: Path, form: str, results: list[dict[str, Any]], checksums: list[int]) -> None:
    """Adds to each piece where its bytes are (of WAV the samples alone) and their CRC, and checks these samples."""
    pieces = [piece for result in results for piece in result.get("pieces", ())]
    with tarfile.open(path) as tar:
        members = (member for member in tar if not member.name.endswith(".json"))
        for piece, checksum, member in zip(pieces, checksums, members, strict=True):
            content = tar.extractfile(member).read()
            header = member.size - 2 * piece[1] if form == "wav" else 0
            crc = zlib.crc32(content[header:])
            if header < 0 or (form == "wav" and crc != checksum) or Path(member.name).stem != piece[0]:
                raise OSError(f"{path}: {member.name} does not read as it was written")
            piece += [member.offset_data + header, member.size - header, crc]
            tar.members = []  # it keeps all that it has seen


def _write_manifests(plan: Plan, partial: Path) -> dict[str, Any]:
    """The manifests of all shards, and the report."""
    from lhotse import MonoCut, Recording
    from lhotse.audio import AudioSource
    from lhotse.shar import JsonlShardWriter

    results: dict[int, dict[str, Any]] = {}
    for shard in range(len(plan.shards)):
        for result in json.loads(_result_path(partial, shard).read_text()):
            results[result.pop("entry")] = {key: value for key, value in result.items() if key != "pieces"}
    report = _report(plan, [results[index] for index in range(len(plan.entries))])
    held_out = report.pop("_held_out")
    report["pieces"] = 0
    placeholder = Recording("", [AudioSource("shar", [0], "")], SAMPLE_RATE, 0, 0.0)
    common = MonoCut("", 0.0, 0.0, 0, recording=placeholder).to_dict()  # once: it takes Lhotse longer than all the rest
    pattern = str(partial / "shards").replace("%", "%%") + "/cuts.%06d.jsonl.gz"
    for shard in range(len(plan.shards)):
        found = json.loads(_result_path(partial, shard).read_text())
        with JsonlShardWriter(pattern, shard_size=sys.maxsize, shard_offset=shard) as writer:
            for result in found:
                entry = plan.entries[result["entry"]]
                for number, (key, samples, offset, size, crc32) in enumerate(result.get("pieces", ())):
                    custom = {
                        "name": entry.name,
                        "kind": entry.kind,
                        "group": entry.group,
                        "piece": number,
                        "split": "held_out" if result["entry"] in held_out else "train",
                        "form": plan.form,
                        "offset": offset,
                        "size": size,
                        "crc32": crc32,
                    }
                    length = {"id": key, "duration": samples / SAMPLE_RATE}
                    recording = {**common["recording"], **length, "num_samples": samples}
                    writer.write({**common, **length, "recording": recording, "custom": custom})
                    report["pieces"] += 1
        if writer.num_items_total:
            with open(pattern % shard, "r+b") as file:
                file.seek(4)
                file.write(bytes(4))  # the time of writing: the same data is to give the same bytes
    sizes = list_files(None, str(partial / "shards"))
    report["shards"] = sorted([name, size] for name, size in sizes.items() if name.startswith("recording."))
    return report


def _report(plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    def finding(names: list[str]) -> dict[str, Any]:
        return {"count": len(names), "names": names[:_MAX_NAMES]}

    entries = plan.entries
    kept = [i for i, result in enumerate(results) if "reason" not in result]
    skipped: dict[str, list[str]] = {}
    for entry, result in zip(entries, results, strict=True):
        if "reason" in result:
            skipped.setdefault(result["reason"], []).append(entry.name)
    if not kept:
        reasons = ", ".join(f"{len(names)} x {reason}" for reason, names in sorted(skipped.items()))
        raise ValueError(f"none of {len(entries)} files gives a clip of {plan.min_seconds:g} s or more: {reasons}")
    md5 = [results[i]["md5"] for i in kept]
    first = dict(zip(reversed(md5), reversed(kept), strict=True))
    usable = [entries[i] for i in kept]
    if plan.split is None and len(first) < 2:
        held, how = [], "held out: nothing, for that takes at least two different files"
    else:
        _, held, how = split(usable, md5) if plan.split is None else plan.split(usable)
    loud = {i: results[i]["full_scale"] >= _CLIPPED_SHARE * results[i]["samples"] for i in kept}
    return {
        "files": len(entries),
        "clips": len(kept),
        "hours": sum(results[i]["samples"] for i in kept) / SAMPLE_RATE / 3600,
        "skipped": {reason: finding(names) for reason, names in sorted(skipped.items())},
        "silent": finding([entries[i].name for i in kept if results[i]["peak"] < _SILENT_PEAK]),
        "clipped": finding([entries[i].name for i in kept if loud[i]]),
        "duplicate": finding([entries[i].name for i in kept if first[results[i]["md5"]] != i]),
        "split": how,
        "train": len(kept) - len(held),
        "held_out": len(held),
        "key": plan.key,
        "_held_out": {kept[i] for i in held},
    }
