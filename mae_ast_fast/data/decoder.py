"""Decode audio files, and the cuts of Lhotse manifests, in separate processes."""

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

_CUT_SECONDS = 600.0  # longer cuts are loaded in chunks of this length

# audio.py is run by its path, which avoids the imports of the package (torch alone takes 2 s). We start the processes
# ourselves and use no pool: this shows which file crashed one, and does not run the user's main module again.
_DECODER_COMMAND = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['serve']()", audio.__file__]
_CUT_DECODER_COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.path.append(sys.argv[1]); from mae_ast_fast.data.decoder import serve_cuts; serve_cuts()",
    str(Path(__file__).absolute().parents[2]),
]


class Decoder:
    """A decoding process, restarted after a file that crashes or hangs it.

    Attributes:
        process: The running process, None before the first file and after ``close``.

    Args:
        pcm_path: File into which the process writes the samples of a clip, int16 at 16 kHz.
        cuts: Whether to decode Lhotse cuts (``serve_cuts``). Default: audio files (``audio.serve``).
    """

    def __init__(self, pcm_path: Path, cuts: bool = False) -> None:
        self.pcm_path, self.cuts = pcm_path, cuts
        self.process: subprocess.Popen[bytes] | None = None

    def decode(self, path: str) -> dict[str, Any]:
        """Fill ``pcm_path`` and return the result of ``audio.write_pcm16`` with ``md5``, or ``{"reason": ...}``."""
        process = self.process or self._start()
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps([path, str(self.pcm_path)]).encode() + b"\n")
            stdin.flush()
        reply = stdout.readline()
        if reply.endswith(b"\n"):
            return json.loads(reply)
        self.close()
        return {"reason": "the decoder crashed or hung"}

    def _start(self) -> subprocess.Popen[bytes]:
        """Start ``process`` and wait until it is ready.

        Raises:
            RuntimeError: It ended at once.
        """
        command = _CUT_DECODER_COMMAND if self.cuts else _DECODER_COMMAND
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print warnings about every unusual file
            env={**os.environ, **threads, "PYTHONSAFEPATH": "1"},
        )
        self.process = process
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"a decoding process does not start: {' '.join(command)}")
        return process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


class Progress:
    """Progress on stderr: one line, rewritten on a terminal; otherwise a new line every few seconds.

    Args:
        files: Number of files to decode in all.
        done: Number of these that an earlier run has decoded.
    """

    def __init__(self, files: int, done: int = 0) -> None:
        self.files, self.done, self.done_before, self.audio_seconds = files, done, done, 0.0
        self.start = self.last_shown = time.monotonic()

    def add(self, audio_seconds: float) -> None:
        """Count one more decoded file of ``audio_seconds``."""
        self.done += 1
        self.audio_seconds += audio_seconds
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.last_shown < (0.2 if terminal else 5.0) and self.done < self.files:
            return
        self.last_shown, elapsed = now, now - self.start + 1e-9
        rate = (self.done - self.done_before) / elapsed
        print(
            f"{chr(13) * terminal}decoding: {self.done:,}/{self.files:,} files, {rate:,.0f} files/s, "
            f"{self.audio_seconds / elapsed:,.0f}x real time, {(self.files - self.done) / rate:.0f} s left",
            end="    " if terminal and self.done < self.files else "\n",
            file=sys.stderr,
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------ Lhotse's cuts


def _refuse_programs(event: str, _: tuple[Any, ...]) -> None:
    """Audit hook. Lhotse passes text of a manifest to a shell (sources of type command, "pipe:", names of .sph)."""
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
        raise PermissionError("a manifest may name files and URLs but not programs to run")


def serve_cuts() -> None:
    """Run a decoding process for cuts: ``audio.serve`` with JSON in place of an audio path.

    The JSON is ``{"cut": {...}}``, a line of a CutSet manifest, or ``{"shar": {"cuts": FILE, "recording": FILE},
    "index": N}``, cut N of a shard. Reading the cuts of a shard in ascending order reads the shard once.
    """

    def make_decode() -> Callable[[str, Any, Any], dict[str, Any]]:
        import lhotse.audio.backend  # noqa: F401 (it starts programs to find its libraries, before the hook)
        from lhotse.serialization import deserialize_item

        sys.addaudithook(_refuse_programs)
        shard_cuts = _ShardCuts()

        def decode(line: str, pcm: Any, heartbeat: Any) -> dict[str, Any]:
            heartbeat()
            request, digest = json.loads(line), hashlib.md5(usedforsecurity=False)
            if "cut" in request:
                cut = deserialize_item(request["cut"])
            else:
                cut = shard_cuts.get(request["shar"], request["index"], pcm.name)
            result = audio.write_pcm16(_cut_blocks(cut), pcm, heartbeat, digest)
            return {**result, "md5": digest.hexdigest()}  # of the samples, where audio files have that of the file

        return decode

    audio.serve(make_decode, "Lhotse")


class _ShardCuts:
    """The cuts of one Lhotse Shar shard at a time, read in order. A remote shard is downloaded first."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.cuts: Iterator[Any] = iter(())
        self.num_read = 0

    def get(self, files: dict[str, str], index: int, pcm_path: str) -> Any:
        """Cut ``index`` of the shard ``files``; downloads go next to ``pcm_path``.

        Raises:
            AudioError: The shard has fewer cuts.
        """
        from lhotse.shar import LazySharIterator

        if files != self.files or index < self.num_read:
            local_paths = {}
            for field, path in files.items():
                local_paths[field] = [path]
                if "://" in path:
                    import fsspec

                    local_paths[field] = [f"{pcm_path}.{os.path.basename(path)}"]
                    fs, remote = fsspec.core.url_to_fs(path)
                    fs.get_file(remote, local_paths[field][0])
            self.files, self.cuts, self.num_read = files, iter(LazySharIterator(local_paths)), 0
        while True:
            cut = next(self.cuts, None)
            if cut is None:
                raise AudioError(files["recording"], "missing in its shard")
            self.num_read += 1
            if self.num_read > index:
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
    num_chunks = max(1, int(-(-cut.duration // _CUT_SECONDS)))
    for index in range(num_chunks):
        chunk = cut
        if num_chunks > 1:
            start = index * _CUT_SECONDS
            chunk = cut.truncate(offset=start, duration=min(_CUT_SECONDS, cut.duration - start))
        mono = np.atleast_2d(chunk.load_audio()).mean(axis=0, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(cut.id, "NaN or infinite samples")
        yield mono if resampler is None else resampler.resample_chunk(mono, last=index == num_chunks - 1)
