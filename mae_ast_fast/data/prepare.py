"""Decoding audio once, into Lhotse Shar shards to pretrain on, which ``shards.py`` and Lhotse read."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..files import locked, write_json
from .audio import SAMPLE_RATE, AudioFile, find_audio
from .decoder import Decoder, Progress
from .splits import split
from .storage import file_system, json_lines, list_files

MIN_SECONDS = 0.3  # shorter clips are skipped; a run that reads the shards may skip more
_VERSION = 1  # of the shards: raise it when decoding changes the samples
_MAX_SEGMENT_SECONDS = 120  # longer recordings are cut, so that no member of a shard is huge
_NUM_SHARDS = 256  # where that makes them neither smaller nor larger than ...
_SHARD_BYTES = (1 << 24, 1 << 30)  # ... these sizes of source files
_SILENT_PEAK = 1e-3  # the idle noise of G.722, which codes silence, peaks at 4e-4
_CLIPPED_SHARE = 1e-3  # of the samples at full scale
_MAX_NAMES = 1000  # per finding of a report; its count is always complete

# Takes entries of any subclass of AudioFile; returns indices to train on, indices to hold out, and a sentence.
Split = Callable[[Sequence[Any]], tuple[np.ndarray, np.ndarray, str]]


def default_entries(progress: Callable[[str], object]) -> list[AudioFile]:
    """The clips of the default corpus, fetched where needed.

    Raises:
        CorpusError: The corpus is not available here.
    """
    from . import corpus

    fetched = corpus.fetch(progress=progress)
    clips, _ = corpus.default_clips(fetched.cache, fetched.packages)
    return list(clips)


# ------------------------------------------------------------------------------------------------------------- shards


@dataclasses.dataclass
class Plan:
    """The input of ``write_shards``.

    Attributes:
        entries: All files or cuts. For a Lhotse cut, ``path`` is a line of input for ``decoder.serve_cuts``.
        entry_bytes: Size of each entry, -1 where there is no regular file.
        shards: Indices of the entries of each shard.
        from_cuts: Whether the entries are Lhotse cuts, otherwise audio files.
        codec: ``wav`` or ``flac``.
        min_seconds: Shorter clips are skipped.
        split: Chooses the held-out clips; None: ``splits.split``.
        key: Digest of everything that the shards depend on.
    """

    entries: Sequence[AudioFile]
    entry_bytes: list[int]
    shards: list[list[int]]
    from_cuts: bool
    codec: str
    min_seconds: float
    split: Split | None
    key: str


def prepare_shards(
    source: str | os.PathLike | Sequence[AudioFile],
    out: str | os.PathLike,
    *,
    codec: str = "wav",
    min_seconds: float = MIN_SECONDS,
    workers: int = 2,
    split: Split | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decode a source once into Lhotse Shar shards, 16 kHz mono, which ``CutSet.from_shar(in_dir=out)`` reads.

    Recordings are shuffled over the shards, so that shards are similar (cuts of a Shar source stay in their shard). A
    recording of more than 2 minutes is cut into equal segments. A file that crashes or hangs a worker is skipped. If
    the process is killed, the same call resumes with the shards missing in ``OUT.partial``. ``out`` appears when it is
    complete.

    Args:
        source: Folder of audio, fairseq ``.tsv``, audio file, CutSet manifest (``.jsonl``, ``.jsonl.gz``), Lhotse Shar
            folder, a URL of one of the last two, or a sequence of ``AudioFile``.
        out: New folder. The report is written next to it, to ``OUT.report.json``, because Lhotse reads every file in
            the folder.
        codec: ``wav`` (int16) or ``flac``.
        min_seconds: Shorter clips are skipped. Default: 0.3.
        workers: Number of processes that decode.
        split: Takes the usable entries and returns the indices to train on, the indices to hold out, and a sentence.
            Default: ``splits.split``.
        progress: Whether to report progress on stderr.

    Returns:
        The report: ``files``, ``clips``, ``pieces`` (segments), ``hours``; ``skipped``: reason -> finding; the findings
        ``silent`` (peak under 1e-3 of full scale), ``clipped`` (at least 0.1 % of the samples at 16 kHz mono reach
        0.9999 of full scale), ``duplicate`` (byte-identical to an earlier file) and ``header`` (its numbers differ from
        the content, all of which was read), whose clips are kept; ``split``, a sentence; ``train`` and ``held_out``,
        numbers of clips; ``shards``: names and sizes. A finding has ``count`` and up to 1000 ``names``.

    Raises:
        ValueError: No usable clip (the reasons are counted), ``out`` holds other data, or an option is out of range.
        FileNotFoundError: ``source`` does not exist.
        OSError: ``out`` cannot be written.
    """
    return write_shards(plan(source, codec=codec, min_seconds=min_seconds, split=split), out, workers, progress)


def source_format(source: str | os.PathLike) -> str:
    """``prepared`` (shards of ``prepare``), ``shar`` (other Lhotse shards), ``cuts`` (a CutSet manifest) or ``audio``.

    Raises:
        FileNotFoundError: Nothing at a URL can be read.
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
    manifests = _shar_fields(list_files(fs, root)).get("cuts", ())
    if not manifests:
        if fs is not None:
            raise FileNotFoundError(f"no Lhotse Shar shards under {source}: expected cuts.*.jsonl.gz, recording.*.tar")
        return "audio"
    for name in manifests:
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
    codec: str = "wav",
    min_seconds: float = MIN_SECONDS,
    split: Split | None = None,
) -> Plan:
    """List the clips of a source and distribute them over shards; see ``prepare_shards``."""
    if codec not in ("wav", "flac"):
        raise ValueError(f"the format must be wav or flac, got {codec!r}")
    # The name of `split` is part of the key: renaming such a function makes existing shards of a cache useless.
    digest = hashlib.sha256(f"{_VERSION} {codec} {min_seconds} {getattr(split, '__qualname__', split)}".encode())
    entries: list[AudioFile] = []
    entry_bytes: list[int] = []
    shards: list[list[int]] = []
    input_format, listings = _list_source(source)
    for listing in listings:
        first = len(entries)
        for listed in listing:
            entries.append(listed.entry)
            entry_bytes.append(listed.num_bytes)
            digest.update(listed.identity)
        shards.append(list(range(first, len(entries))))
    if input_format != "audio" and not entries:
        raise ValueError(f"no cut in {source}")
    if input_format != "shar":  # audio of a Shar source can only be read in its order
        shards = _shuffled_shards(entry_bytes)
    return Plan(
        entries=entries,
        entry_bytes=entry_bytes,
        shards=shards,
        from_cuts=input_format != "audio",
        codec=codec,
        min_seconds=min_seconds,
        split=split,
        key=digest.hexdigest(),
    )


class _Listed(NamedTuple):
    """An entry of a source.

    Attributes:
        entry: As in ``Plan``.
        num_bytes: Size of the audio, -1 where there is no regular file.
        identity: Of the entry and its version, for the key of the plan.
    """

    entry: AudioFile
    num_bytes: int
    identity: bytes


def _list_source(source: str | os.PathLike | Sequence[AudioFile]) -> tuple[str, Iterable[Iterable[_Listed]]]:
    """Format of a source, and its entries: those of each shard if it is Lhotse Shar, otherwise all of them."""
    if not isinstance(source, (str, os.PathLike)):
        return "audio", [_list_audio(source)]
    location = os.fspath(source).rstrip("/")
    input_format = source_format(location)
    if input_format == "audio":
        return input_format, [_list_audio(find_audio(source))]
    if "://" not in location:
        location = os.path.abspath(os.path.expanduser(location))
    if input_format == "cuts":
        return input_format, [_list_cuts(location)]
    return input_format, (_list_cuts(files["cuts"], files) for files in _shar_shards(location))


def _list_audio(files: Iterable[AudioFile]) -> Iterator[_Listed]:
    """Sizes and identities of audio files: their times of change, sizes and paths."""
    for entry in files:
        num_bytes, version = -1, ""
        with contextlib.suppress(OSError):
            status = os.stat(entry.path)
            num_bytes = status.st_size if stat.S_ISREG(status.st_mode) else -1
            version = f"{status.st_size} {status.st_mtime_ns} "
        yield _Listed(entry, num_bytes, version.encode() + os.fsencode(entry.path) + b"\0")


def _list_cuts(manifest: str, shar_files: dict[str, str] | None = None) -> Iterator[_Listed]:
    """The cuts of a Lhotse manifest.

    Args:
        manifest: File or URL, a JSON object per line.
        shar_files: Files of the shard of Shar that it belongs to, for the decoder. None: the cuts name their files.

    Raises:
        ValueError: A line is no cut.
    """
    num_cuts = 0
    try:
        for cut in json_lines(manifest):
            request = {"cut": cut} if shar_files is None else {"shar": shar_files, "index": num_cuts}
            recording = cut.get("recording") or {}
            name = str(cut["id"]).encode("utf-8", "backslashreplace").decode()
            entry = AudioFile(json.dumps(request), name, group=str(recording.get("id", "")))
            num_bytes = round(2 * SAMPLE_RATE * float(cut.get("duration", 0.0)))
            yield _Listed(entry, num_bytes, entry.path.encode() + b"\0")
            num_cuts += 1
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{manifest}: expected a Lhotse cut per line, failed after {num_cuts} cuts: {error!r}"
        ) from error


def _shuffled_shards(entry_bytes: Sequence[int]) -> list[list[int]]:
    """Indices of the entries of each shard: all entries in random order, in shards of similar size."""
    order = list(range(len(entry_bytes)))
    random.Random(0).shuffle(order)
    shards: list[list[int]] = [[]]
    min_bytes, max_bytes = _SHARD_BYTES
    target, shard_bytes = min(max(sum(entry_bytes) // _NUM_SHARDS, min_bytes), max_bytes), 0
    for index in order:
        if shard_bytes >= target:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(index)
        shard_bytes += max(entry_bytes[index], 0) + 4096
    return shards


def _shar_shards(path: str) -> list[dict[str, str]]:
    """Manifest and tar file of each shard of a Lhotse Shar folder."""
    fs, root = file_system(path)
    fields = _shar_fields(list_files(fs, root))
    cuts, recordings = fields["cuts"], fields.get("recording", [])
    if len(cuts) != len(recordings):
        raise ValueError(
            f"{path}: expected a recording.*.tar for each cuts.*.jsonl, got {len(recordings)} and {len(cuts)}"
        )
    return [{"cuts": f"{path}/{cut}", "recording": f"{path}/{tar}"} for cut, tar in zip(cuts, recordings, strict=True)]


def write_shards(plan: Plan, out: str | os.PathLike, workers: int = 2, progress: bool = True) -> dict[str, Any]:
    """Write the planned shards; see ``prepare_shards``."""
    import lhotse  # noqa: F401 (a missing library fails here, not in every decoding process)
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
                print(f"{partial} belongs to other files or options: starting anew", file=sys.stderr, flush=True)
            for name in ("shards", "results"):
                shutil.rmtree(partial / name, ignore_errors=True)
            write_json(partial / "plan.json", plan.key)
        shutil.rmtree(partial / "work", ignore_errors=True)
        for name in ("shards", "results", "work"):
            (partial / name).mkdir(exist_ok=True)
        missing = [shard for shard in range(len(plan.shards)) if not _result_path(partial, shard).is_file()]
        if progress:
            done = len(plan.shards) - len(missing)
            resumed = f", resuming after {done} of {len(plan.shards)} shards" if done else ""
            print(f"decoding {len(plan.entries):,} clips to 16 kHz mono in {out}{resumed}", file=sys.stderr, flush=True)
        _decode_all(plan, partial, missing, workers=workers, progress=progress)
        report = _write_manifests(plan, partial)
        findings = {f"skipped {{}}: {reason}": finding for reason, finding in report["skipped"].items()}
        findings["{} whose header and content differ, with all of the content read"] = report["header"]
        for text, finding in findings.items() if progress else ():
            if finding["count"]:
                names = ", ".join(finding["names"][:3]) + " ..." * (finding["count"] > 3)
                print(f"{text.format(finding['count'])}: {names}", file=sys.stderr, flush=True)
        if out.exists():  # empty, or damaged and, by its report, made from the same files and options
            shutil.rmtree(out)
        write_json(report_path, report)
        os.rename(partial / "shards", out)
        shutil.rmtree(partial)
    return report


def _finished(out: Path, report_path: Path, key: str) -> dict[str, Any] | None:
    """The report of ``out`` if the folder is there and complete, otherwise None.

    Raises:
        ValueError: ``out`` holds other data.
    """
    report: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(report_path.read_text())
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if report.get("key") != key or not out.is_dir():
        raise ValueError(f"{out} exists and was not made from these files and options: choose a new folder")
    sizes = list_files(None, str(out))
    num_manifests = sum(name.startswith("cuts.") for name in sizes)
    complete = num_manifests == len(report["shards"]) and all(
        sizes.get(name) == size for name, size in report["shards"]
    )
    return report if complete else None


def _decode_all(plan: Plan, partial: Path, missing: Sequence[int], *, workers: int, progress: bool) -> None:
    """Write a tar file in ``partial/shards`` and then a file in ``partial/results`` for each missing shard."""
    from lhotse.audio import audio_backend

    todo = iter(missing)
    bar = None
    if progress and missing:
        bar = Progress(len(plan.entries), len(plan.entries) - sum(len(plan.shards[shard]) for shard in missing))
    lock, stop = threading.Lock(), threading.Event()

    def on_result(result: dict[str, Any]) -> None:
        if stop.is_set():
            raise InterruptedError("another worker failed")
        if bar is not None:
            with lock:
                bar.add(result.get("samples", 0) / SAMPLE_RATE)

    def work(number: int) -> None:
        decoder = Decoder(partial / "work" / f"decoder-{number}", plan.from_cuts)
        try:
            while not stop.is_set():
                with lock:
                    shard = next(todo, None)
                if shard is None:
                    return
                _write_shard(plan, shard, partial=partial, decoder=decoder, on_result=on_result)
        finally:
            decoder.close()

    # Every installation has this backend of Lhotse, and it keeps int16 as it is.
    with audio_backend("LibsndfileBackend"), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, number) for number in range(workers)]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            stop.set()


def _result_path(partial: Path, shard: int) -> Path:
    return partial / "results" / f"{shard:06d}.json"


def _write_shard(
    plan: Plan, shard: int, *, partial: Path, decoder: Decoder, on_result: Callable[[dict[str, Any]], None]
) -> None:
    """Decode the entries of a shard into its tar file, and write their results as JSON.

    Args:
        plan: From ``plan``.
        shard: Index of the shard.
        partial: Folder of the unfinished shards.
        decoder: Process that decodes.
        on_result: Called with the result of each entry.
    """
    from lhotse import Recording
    from lhotse.audio import AudioSource
    from lhotse.shar import AudioTarWriter

    results: list[dict[str, Any]] = []
    checksums: list[int] = []
    pattern = str(partial / "work").replace("%", "%%") + "/recording.%06d.tar"
    with AudioTarWriter(pattern, shard_size=sys.maxsize, format=plan.codec, shard_offset=shard) as writer:
        for entry_index in plan.shards[shard]:
            entry = plan.entries[entry_index]
            result: dict[str, Any] = {"reason": "missing or no regular file"}
            if plan.entry_bytes[entry_index] >= 0:
                result = decoder.decode(entry.path)
            if "reason" not in result and result["samples"] < max(1.0, plan.min_seconds * SAMPLE_RATE):
                result = {"reason": f"shorter than {plan.min_seconds:g} s" if result["samples"] else "no samples"}
            result["entry"] = entry_index
            results.append(result)
            if "reason" not in result:
                num_samples = result["samples"]
                num_segments = -(-num_samples // (_MAX_SEGMENT_SECONDS * SAMPLE_RATE))
                # Equal lengths: no segment is too short.
                edges = [num_samples * k // num_segments for k in range(num_segments + 1)]
                result["pieces"] = []
                for segment_index, (start, end) in enumerate(itertools.pairwise(edges)):
                    pcm = np.fromfile(decoder.pcm_path, "<i2", end - start, offset=2 * start)
                    # Characters valid in file names everywhere; short, because the tar format has room for 100.
                    stem = re.sub("[^A-Za-z0-9_.-]+", "_", entry.name)[-60:].lstrip(".")
                    key = f"{stem}-{entry_index}-{segment_index}"
                    source = [AudioSource("memory", [0], "")]
                    recording = Recording(key, source, SAMPLE_RATE, pcm.size, pcm.size / SAMPLE_RATE)
                    writer.write(key, pcm[None], SAMPLE_RATE, recording)
                    result["pieces"].append([key, pcm.size])
                    checksums.append(zlib.crc32(pcm.data))
            on_result(result)
    if checksums:
        name = f"recording.{shard:06d}.tar"
        _locate_members(partial / "work" / name, plan.codec, results, checksums)
        os.rename(partial / "work" / name, partial / "shards" / name)
    write_json(_result_path(partial, shard), results)


def _locate_members(path: Path, codec: str, results: list[dict[str, Any]], checksums: list[int]) -> None:
    """Append offset, size and CRC of its bytes in the tar file to each segment of ``results``, and verify the samples.

    The bytes of a WAV member are its samples without the header.
    """
    segments = [segment for result in results for segment in result.get("pieces", ())]
    with tarfile.open(path) as tar:
        members = (member for member in tar if not member.name.endswith(".json"))
        for segment, checksum, member in zip(segments, checksums, members, strict=True):
            key, num_samples = segment
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            header_bytes = member.size - 2 * num_samples if codec == "wav" else 0
            crc = zlib.crc32(content[header_bytes:])
            if header_bytes < 0 or (codec == "wav" and crc != checksum) or Path(member.name).stem != key:
                raise OSError(f"{path}: {member.name} does not read back as it was written")
            segment += [member.offset_data + header_bytes, member.size - header_bytes, crc]
            cast(Any, tar).members = []  # otherwise it keeps every member


def _write_manifests(plan: Plan, partial: Path) -> dict[str, Any]:
    """Write the manifests of all shards, and return the report."""
    from lhotse import MonoCut, Recording
    from lhotse.audio import AudioSource
    from lhotse.shar import JsonlShardWriter

    results: dict[int, dict[str, Any]] = {}
    for shard in range(len(plan.shards)):
        for result in json.loads(_result_path(partial, shard).read_text()):
            results[result.pop("entry")] = {key: value for key, value in result.items() if key != "pieces"}
    report, held_out = _report(plan, [results[index] for index in range(len(plan.entries))])
    report["pieces"] = 0
    placeholder = Recording("", [AudioSource("shar", [0], "")], SAMPLE_RATE, 0, 0.0)
    common = MonoCut("", 0.0, 0.0, 0, recording=placeholder).to_dict()  # once: it takes longer than everything else
    pattern = str(partial / "shards").replace("%", "%%") + "/cuts.%06d.jsonl.gz"
    for shard in range(len(plan.shards)):
        shard_results = json.loads(_result_path(partial, shard).read_text())
        with JsonlShardWriter(pattern, shard_size=sys.maxsize, shard_offset=shard) as writer:
            for result in shard_results:
                entry = plan.entries[result["entry"]]
                for index, (key, num_samples, offset, size, crc32) in enumerate(result.get("pieces", ())):
                    custom = {
                        "name": entry.name,
                        "kind": entry.kind,
                        "group": entry.group,
                        "piece": index,
                        "split": "held_out" if result["entry"] in held_out else "train",
                        "form": plan.codec,
                        "offset": offset,
                        "size": size,
                        "crc32": crc32,
                    }
                    fields = {"id": key, "duration": num_samples / SAMPLE_RATE}
                    recording = {**common["recording"], **fields, "num_samples": num_samples}
                    writer.write({**common, **fields, "recording": recording, "custom": custom})
                    report["pieces"] += 1
        if writer.num_items_total:
            with open(pattern % shard, "r+b") as file:
                file.seek(4)
                file.write(bytes(4))  # clear gzip's time stamp: the same data gives the same bytes
    sizes = list_files(None, str(partial / "shards"))
    report["shards"] = sorted([name, size] for name, size in sizes.items() if name.startswith("recording."))
    return report


def _report(plan: Plan, results: list[dict[str, Any]]) -> tuple[dict[str, Any], set[int]]:
    """The report without ``pieces`` and ``shards``, and the indices of the held-out entries.

    Raises:
        ValueError: No entry gives a clip.
    """

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
    first_with_md5 = dict(zip(reversed(md5), reversed(kept), strict=True))
    usable = [entries[i] for i in kept]
    held_out: Sequence[int] | np.ndarray = ()
    split_summary = "held out: nothing, this needs at least two different files"
    if plan.split is not None:
        _, held_out, split_summary = plan.split(usable)
    elif len(first_with_md5) >= 2:
        _, held_out, split_summary = split(usable, md5)
    clipped = [i for i in kept if results[i]["full_scale"] >= _CLIPPED_SHARE * results[i]["samples"]]
    report = {
        "files": len(entries),
        "clips": len(kept),
        "hours": sum(results[i]["samples"] for i in kept) / SAMPLE_RATE / 3600,
        "skipped": {reason: finding(names) for reason, names in sorted(skipped.items())},
        "silent": finding([entries[i].name for i in kept if results[i]["peak"] < _SILENT_PEAK]),
        "clipped": finding([entries[i].name for i in clipped]),
        "duplicate": finding([entries[i].name for i in kept if first_with_md5[results[i]["md5"]] != i]),
        "header": finding([entries[i].name for i in kept if "note" in results[i]]),
        "split": split_summary,
        "train": len(kept) - len(held_out),
        "held_out": len(held_out),
        "key": plan.key,
    }
    return report, {kept[i] for i in held_out}
