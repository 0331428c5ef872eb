"""What turning audio into shards needs: isolated decoding processes, a lock, a line of progress, and the split.

``prepare.py`` writes the shards, ``shards.py`` reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import audio
from .audio import SAMPLE_RATE, AudioError, Entry

_CUT_SECONDS = 600.0  # of a longer cut, so much is loaded at a time

# Run by the file's path, a decoding process does without the package's imports (torch alone takes 2 s). Processes of
# our own and not a pool: the one that crashes tells which file did it, and the user's main module is not run again.
_DECODER_COMMAND = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['serve']()", audio.__file__]
_CUT_DECODER_COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.path.append(sys.argv[1]); from mae_ast_fast.data import serve_cuts; serve_cuts()",
    str(Path(__file__).absolute().parents[1]),
]


class Decoder:
    """A decoding process, started again after a file that crashes or hangs it.

    Args:
        pcm_path: Where it leaves the samples of one file, int16 at 16 kHz.
        cuts: It is to decode Lhotse cuts (``serve_cuts``) and not audio files (``audio.serve``).
    """

    def __init__(self, pcm_path: Path, cuts: bool = False) -> None:
        self.pcm_path, self.cuts, self.process = pcm_path, cuts, None

    def decode(self, path: str) -> dict[str, Any]:
        """Fills ``pcm_path`` and returns the result; ``{"reason": ...}`` for a file that gives none."""
        if self.process is None:
            command = _CUT_DECODER_COMMAND if self.cuts else _DECODER_COMMAND
            threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders comment on every odd file
                env={**os.environ, **threads, "PYTHONSAFEPATH": "1"},
            )
            if not self.process.stdout.readline():
                raise RuntimeError(f"a decoding process does not start: {' '.join(command)}")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([path, str(self.pcm_path)]).encode() + b"\n")
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if reply.endswith(b"\n"):
            return json.loads(reply)
        self.close()
        return {"reason": "the decoder crashed or hung"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps this machine's other processes out while it lasts; a killed holder lets go. Without locks: no effect."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to finish with {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """One line to stderr: rewritten on a terminal, else a new one every few seconds.

    Args:
        files: To decode in all.
        done: Of these, found done by an earlier run.
    """

    def __init__(self, files: int, done: int = 0) -> None:
        self.files, self.done, self.before, self.seconds = files, done, done, 0.0
        self.start = self.shown = time.monotonic()

    def add(self, seconds: float) -> None:
        """One more file is done, which gave ``seconds`` of audio."""
        self.done += 1
        self.seconds += seconds
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.shown < (0.2 if terminal else 5.0) and self.done < self.files:
            return
        self.shown, spent = now, now - self.start + 1e-9
        rate = (self.done - self.before) / spent
        print(
            f"{chr(13) * terminal}decoding: {self.done:,}/{self.files:,} files, {rate:,.0f} files/s, "
            f"{self.seconds / spent:,.0f}x real time, {(self.files - self.done) / rate:.0f} s left",
            end="    " if terminal and self.done < self.files else "\n",
            file=sys.stderr,
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------ Lhotse's cuts


def _refuse_programs(event: str, _: tuple[Any, ...]) -> None:
    """An audit hook: Lhotse gives a shell what a manifest says (sources of type command, "pipe:", names of .sph)."""
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
        raise PermissionError("a manifest may name files and URLs, and no program to run")


def serve_cuts() -> None:
    """A decoding process for cuts: ``audio.serve``, where JSON stands for a path.

    ``{"cut": {...}}``, a line of a CutSet manifest, or ``{"shar": {"cuts": FILE, "recording": FILE}, "index": N}``, the
    N-th cut of a shard, of which the next is read without going back.
    """

    def begin() -> Callable[[str, Any, Any], dict[str, Any]]:
        import lhotse.audio.backend  # noqa: F401 (what starts programs to find its libraries does so now)
        from lhotse.serialization import deserialize_item

        sys.addaudithook(_refuse_programs)
        shard = _ShardCuts()

        def decode(line: str, pcm: Any, alive: Any) -> dict[str, Any]:
            alive()
            what, digest = json.loads(line), hashlib.md5(usedforsecurity=False)
            cut = deserialize_item(what["cut"]) if "cut" in what else shard.get(what["shar"], what["index"], pcm.name)
            result = audio.write_pcm16(_cut_blocks(cut), pcm, alive, digest)
            return {**result, "md5": digest.hexdigest()}  # of the samples, in place of the file's

        return decode

    audio.serve(begin, "Lhotse")


class _ShardCuts:
    """The cuts of a shard of Lhotse Shar, one after the other; a remote shard is fetched whole."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.cuts: Iterator[Any] = iter(())
        self.next = 0

    def get(self, files: dict[str, str], index: int, pcm_path: str) -> Any:
        from lhotse.shar import LazySharIterator

        if files != self.files or index < self.next:
            local = {}
            for field, path in files.items():
                local[field] = [path]
                if "://" in path:
                    import fsspec

                    local[field] = [f"{pcm_path}.{os.path.basename(path)}"]
                    fs, remote = fsspec.core.url_to_fs(path)
                    fs.get_file(remote, local[field][0])
            self.files, self.cuts, self.next = files, iter(LazySharIterator(local)), 0
        while True:
            cut = next(self.cuts, None)
            if cut is None:
                raise AudioError(files["recording"], "missing in its shard")
            self.next += 1
            if self.next > index:
                return cut


def _cut_blocks(cut: Any) -> Iterator[np.ndarray]:
    """Blocks of float32 (s,), 16 kHz mono, of a Lhotse cut."""
    import soxr

    if not cut.has_recording and type(cut).__name__ != "MixedCut":
        raise AudioError(cut.id, "a cut without audio")
    rate = cut.sampling_rate
    if not 1000 <= rate <= 768000:
        raise AudioError(cut.id, "sample rate outside 1 kHz - 768 kHz")
    resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", quality="HQ")
    parts = max(1, int(-(-cut.duration // _CUT_SECONDS)))
    for part in range(parts):
        start = part * _CUT_SECONDS
        piece = cut if parts == 1 else cut.truncate(offset=start, duration=min(_CUT_SECONDS, cut.duration - start))
        mono = np.atleast_2d(piece.load_audio()).mean(axis=0, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(cut.id, "NaN or infinite samples")
        yield mono if resampler is None else resampler.resample_chunk(mono, last=part == parts - 1)


# -------------------------------------------------------------------------------------------------------------- split


def split(
    entries: Sequence[Entry], md5: Sequence[str], fraction: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, str]:
    """Train and held-out clips of a user's data: whole folders where there are enough, else files.

    The shallowest folder level (of ``Entry.group``; of a cut it is the recording) with at least 5 folders gives the
    groups, since a folder is often a speaker or a session; with fewer, every file is its own. Groups are taken in the
    order of a hash of their names until ``fraction`` of the clips is held out; one that would make it more than twice
    that is passed over. Byte-identical files are never on both sides.

    Args:
        entries: (N,) the clips.
        md5: (N,) digest of each clip's file.
        fraction: Of the clips, to hold out.
        seed: Of the hash.

    Returns:
        Indices int64 (train,) and (held-out,), ascending and never empty, and a sentence that says how.

    Raises:
        ValueError: Fewer than two different files, or ``fraction`` outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    first: dict[str, str] = {}
    by_file = [first.setdefault(digest, entry.name) for digest, entry in zip(md5, entries, strict=True)]
    if len(first) < 2:
        raise ValueError(
            "holding clips out takes at least two different files, got one: add some, or cut it into several"
        )
    folders = [entry.group.split("/") if entry.group else [] for entry in entries]
    held, how = _choose(by_file, fraction, seed), "single files, by a hash of their names"
    for level in range(1, max(map(len, folders)) + 1):
        groups = ["/".join(folder[:level]) for folder in folders]
        if len(set(groups)) >= 5:
            chosen = _choose(groups, fraction, seed)
            trained = {digest for digest, out in zip(md5, chosen, strict=True) if not out}
            chosen &= np.array([digest not in trained for digest in md5])
            if chosen.any():
                held, how = chosen, f"whole folders of {len(set(groups))} at level {level}"
            break
    return np.flatnonzero(~held), np.flatnonzero(held), f"held out: {held.sum()} of {held.size} clips, {how}"


def _choose(groups: list[str], fraction: float, seed: int) -> np.ndarray:
    """bool (N,): members of the chosen groups; at least one group, never all of several."""
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    chosen, held, target = [], 0, fraction * len(groups)
    for group in order:
        if held < target and held + sizes[group] <= min(2 * target, len(groups) - 1):
            chosen.append(group)
            held += sizes[group]
    return np.isin(groups, chosen or [min(order, key=sizes.__getitem__)])
