"""Audio decoded in processes of their own: files, and the cuts of Lhotse's manifests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import audio
from .audio import SAMPLE_RATE, AudioError

_CUT_SECONDS = 600.0  # of a longer cut, so much is loaded at a time

# Run by the file's path, a decoding process does without the package's imports (torch alone takes 2 s). Processes of
# our own and not a pool: the one that crashes tells which file did it, and the user's main module is not run again.
_DECODER_COMMAND = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['serve']()", audio.__file__]
_CUT_DECODER_COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.path.append(sys.argv[1]); from mae_ast_fast.data.decoder import serve_cuts; serve_cuts()",
    str(Path(__file__).absolute().parents[2]),
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
