"""Mutated input files: manifests, manifests of shards, checkpoints and audio are read or refused, and nothing else.

Some hundreds of inputs per test by default, 10,000 in all with the mark ``long``; docs/faults.md has their last result.
(test_checkpoint.py mutates each file of a run's checkpoint.)
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy import DECODER_BYTES

from mae_ast_fast import MAEAST
from mae_ast_fast.checkpoints import load as checkpoint
from mae_ast_fast.data import audio, prepare
from mae_ast_fast.data.decoder import Decoder
from mae_ast_fast.data.shards import Shards
from mae_ast_fast.models.config import MAEASTConfig
from mae_ast_fast.training.metrics_log import read_metrics

soundfile = pytest.importorskip("soundfile")
av = pytest.importorskip("av")
pytest.importorskip("lhotse")
RATE = 16000
LONG = [pytest.mark.long, pytest.mark.timeout(1800)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def examples(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=LONG)])


def fuzz(count: int, check: Callable[[st.DataObject], str]) -> Counter[str]:
    """Run ``check`` on ``count`` inputs, the same each time if there are fewer than 500; counts its outcomes."""
    outcomes: Counter[str] = Counter()
    always = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=count, derandomize=count < 500, **always)
    @given(st.data())
    def run(source: st.DataObject) -> None:
        outcomes[check(source)] += 1

    run()
    print(dict(outcomes))
    return outcomes


@st.composite
def mutated(draw: st.DrawFn, original: bytes, header_bytes: int | None = None) -> bytes:
    """Bytes with up to 8 changed, inserted or removed, more often in the header; or cut; or partly doubled."""
    content = bytearray(original)
    mutation = draw(st.sampled_from(["header", "anywhere", "cut", "double", "number"]))
    if mutation == "cut":
        return bytes(content[: draw(st.integers(0, len(content)))])
    limit = min(header_bytes or len(content), len(content)) - 1
    if mutation == "double":
        start, size = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 200))
        return bytes(content[: start + size] + content[start:])
    if mutation == "number":  # a wrong size or count
        position, width = draw(st.integers(0, limit)), draw(st.sampled_from([2, 4, 8]))
        number = draw(st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1])) % 256**width
        content[position : position + width] = number.to_bytes(width, draw(st.sampled_from(["little", "big"])))
        return bytes(content)
    for _ in range(draw(st.integers(1, 8))):
        position = draw(st.integers(0, limit if mutation == "header" else len(content) - 1))
        position, value = min(position, len(content) - 1), draw(st.integers(0, 255))
        if draw(st.booleans()):
            content[position] = value
        elif draw(st.booleans()):
            content.insert(position, value)
        elif len(content) > 1:
            del content[position]
    return bytes(content)


@st.composite
def other_value(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """JSON with one value replaced or removed, at any depth."""
    content = json.loads(json.dumps(content))
    node: Any = content
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            continue
        if isinstance(node, dict) and not draw(st.integers(0, 3)):
            del node[key]
        else:
            unusual = st.sampled_from(
                [-1, 0, 2**31, 2**63, 2**70, 1e308, float("nan"), "", "\0", "../../x", None, [], {}]
            )
            node[key] = draw(unusual | JSON)
        return content


# --------------------------------------------------------------------------------------------------------- manifests


@examples(200, 1500)
def test_find_audio_mutated_manifest_is_read_or_refused(tmp_path: Path, count: int) -> None:
    (tmp_path / "set").mkdir()
    path, original = tmp_path / "m.tsv", b"set\n" + b"".join(b"a/%d.wav\t%d\n" % (i, 16000 + i) for i in range(8))

    def check(source: st.DataObject) -> str:
        path.write_bytes(source.draw(mutated(original)))
        try:
            for entry in audio.find_audio(path):
                entry.name.encode()
                assert "\0" not in entry.path
        except FileNotFoundError:
            return "another folder"
        except ValueError as error:
            assert "m.tsv" in str(error) and len(str(error)) < 1000
            return "refused"
        return "read"

    outcomes = fuzz(count, check)
    assert min(outcomes["read"], outcomes["refused"]) > count // 50, outcomes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    (folder / "set").mkdir()
    for i in range(6):
        soundfile.write(folder / f"set/{i}.wav", 0.1 * rng.standard_normal(8000 + 1000 * i), RATE)
    prepare.prepare_shards(folder / "set", folder / "out", progress=False, workers=1)
    return folder / "out"


@examples(150, 1500)
def test_shards_mutated_manifest_is_read_or_refused(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    """The listed crops are read or reported as faults, or the shards are refused with a clear message."""
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    (path,) = out.glob("cuts.*")
    packed = path.read_bytes()
    lines = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    options = {"batch_seconds": 2.0, "max_seconds": 1.0, "min_seconds": 0.3, "seed": 0}

    def check(source: st.DataObject) -> str:
        mutation = source.draw(st.sampled_from(["value", "text", "gzip"]))
        if mutation == "gzip":
            path.write_bytes(source.draw(mutated(packed)))
        elif mutation == "text":
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            path.write_bytes(gzip.compress(source.draw(mutated(text)), 1))
        else:
            index, changed = source.draw(st.integers(0, len(lines) - 1)), list(lines)
            changed[index] = source.draw(other_value(lines[index]))
            path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in changed).encode(), 1))
        try:
            mutated_shards = Shards(out)
            read = faults = 0
            for crops in mutated_shards.batches(**options):
                batch = mutated_shards.read(crops)
                read, faults = read + len(batch.names), faults + len(batch.faults)
                assert len(batch.names) + len(batch.faults) == len(crops)
        except ValueError as error:
            assert "prepare" in str(error), error
            return "refused"
        assert read + faults <= 3 * len(lines) + 2
        return "left out" if faults or mutated_shards.faults else "read"

    outcomes = fuzz(count, check)
    capfd.readouterr()
    assert min(outcomes["read"], outcomes["left out"]) > count // 50, outcomes


@examples(100, 1000)
def test_plan_mutated_cutset_manifest_is_read_or_refused(tmp_path: Path, count: int) -> None:
    """A plan is made, and a decoding process loads each cut, as in ``prepare``."""
    from lhotse import MonoCut, Recording

    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    recording = Recording.from_file(tmp_path / "a.wav")
    lines = [MonoCut(f"c{i}", 0.2 * i, 0.4, 0, recording=recording).to_dict() for i in range(3)]
    path, decoder = tmp_path / "cuts.jsonl", Decoder(tmp_path / "pcm", cuts=True)
    reasons_allowed = ("in Lhotse", "a cut without audio", "sample rate outside", "NaN or infinite", "hung")

    def check(source: st.DataObject) -> str:
        index = source.draw(st.integers(0, 2))
        if source.draw(st.booleans()):
            changed = [*lines]
            changed[index] = source.draw(other_value(lines[index]))
            path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        else:
            path.write_bytes(source.draw(mutated("".join(json.dumps(line) + "\n" for line in lines).encode())))
        try:
            plan = prepare.plan(path)
        except ValueError as error:
            assert "cuts.jsonl" in str(error)
            return "refused"
        results = [decoder.decode(entry.path) for entry in plan.entries]
        assert "crashed" not in str(results)
        reasons = [result["reason"] for result in results if "reason" in result]
        assert all(any(words in reason for words in reasons_allowed) for reason in reasons), reasons
        return "left out" if reasons else "read"

    try:
        outcomes = fuzz(count, check)
    finally:
        decoder.close()
    assert min(outcomes["left out"], outcomes["refused"]) > count // 50, outcomes


# -------------------------------------------------------------------------------------------------------------- audio


def ffmpeg_noise(name: str, codec: str, container_format: str | None = None) -> bytes:
    """A file with 0.3 s of noise, written by FFmpeg."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container_format or name.rpartition(".")[2]) as container:
        track = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.random.default_rng(0).integers(-9000, 9000, (1, 4800)).astype(np.int16), format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(format=track.codec_context.format, layout="mono", rate=RATE)
        for resampled in resampler.resample(frame):
            container.mux(track.encode(resampled))
        container.mux(track.encode(None))
    return stream.getvalue()


def libsndfile_noise(file_format: str, **options: Any) -> bytes:
    """A file with 0.3 s of noise, written by libsndfile."""
    stream = io.BytesIO()
    noise = 0.3 * np.random.default_rng(0).standard_normal((4800, 2))
    soundfile.write(stream, noise, RATE, format=file_format, **options)
    return stream.getvalue()


def audio_files() -> dict[str, bytes]:
    files = {
        "a.wav": libsndfile_noise("WAV"),
        "float.wav": libsndfile_noise("WAV", subtype="FLOAT"),
        "a.flac": libsndfile_noise("FLAC"),
    }
    files |= {
        "a.ogg": libsndfile_noise("OGG"),
        "a.mp3": libsndfile_noise("MP3"),
        "a.aiff": libsndfile_noise("AIFF"),
        "a.au": libsndfile_noise("AU"),
    }
    files |= {
        "a.g722": ffmpeg_noise("a.g722", "g722"),
        "a.mp4": ffmpeg_noise("a.mp4", "aac"),
        "a.mkv": ffmpeg_noise("a", "flac", "matroska"),
    }
    return files


REASONS = ("corrupt", "truncated", "empty file", "NaN or infinite samples", "sample rate outside", "no audio stream")


def peak_memory(pid: int) -> int:
    """Peak memory of a process in bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@examples(250, 4000)
def test_decoder_mutated_audio_is_read_or_refused(tmp_path: Path, count: int) -> None:
    """The decoding process of ``prepare`` neither crashes nor hangs, and needs no more memory than for whole files."""
    files = audio_files()
    decoder = Decoder(tmp_path / "pcm")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert decoder.decode(str(tmp_path / name))["samples"] > 4000, name
    peak_before, pid = peak_memory(decoder.process.pid), decoder.process.pid

    def check(source: st.DataObject) -> str:
        name = source.draw(st.sampled_from(sorted(files)))
        path = tmp_path / name
        path.write_bytes(source.draw(mutated(files[name], 128)))
        result = decoder.decode(str(path))
        if "reason" in result:
            assert result["reason"].startswith(REASONS), result
            return "refused"
        assert (tmp_path / "pcm").stat().st_size == 2 * result["samples"]
        return "read"

    try:
        outcomes = fuzz(count, check)
        assert decoder.process.pid == pid and peak_memory(pid) - peak_before < DECODER_BYTES
    finally:
        decoder.close()
    assert min(outcomes["read"], outcomes["refused"]) > count // 50, outcomes


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this library saved, and an official file."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"embed_dim": 16, "ffn_dim": 16, "num_heads": 2, "encoder_layers": 1, "decoder_embed_dim": 16}
    MAEAST(MAEASTConfig(**sizes, decoder_layers=1)).save_pretrained(folder / "ours")
    torch.save({"args": None, "cfg": {"model": {}, "task": {}}, "model": {"w": torch.ones(3)}}, folder / "a.pt")
    return folder


@examples(150, 1500)
def test_load_model_mutated_checkpoint_is_read_or_refused(models: Path, tmp_path: Path, count: int) -> None:
    """The files that ``--init-from`` and every command read."""
    folder = Path(shutil.copytree(models, tmp_path / "models"))
    paths = [folder / "ours/config.json", folder / "ours/model.safetensors", folder / "a.pt"]
    originals = {path: path.read_bytes() for path in paths}

    def check(source: st.DataObject) -> str:
        path = source.draw(st.sampled_from(paths))
        content = originals[path]
        if path.suffix == ".json" and source.draw(st.booleans()):
            changed = json.dumps(source.draw(other_value(json.loads(content)))).encode()
        else:
            header_bytes = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else None
            changed = source.draw(mutated(content, header_bytes))
        path.write_bytes(changed)
        try:
            checkpoint.load_model(path if path.suffix == ".pt" else folder / "ours")
        except ValueError as error:
            assert len(str(error)) < 100_000
            return "refused"
        finally:
            path.write_bytes(content)
        return "read"

    outcomes = fuzz(count, check)
    assert outcomes["read"] and outcomes["refused"], outcomes


@examples(100, 500)
def test_read_metrics_mutated_file_gives_whole_rows(tmp_path: Path, count: int) -> None:
    path = tmp_path / "metrics.jsonl"
    original = "".join(json.dumps({"step": i, "loss": 1.5}) + "\n" for i in range(5)).encode()

    def check(source: st.DataObject) -> str:
        path.write_bytes(source.draw(mutated(original)))
        metrics = read_metrics(path)
        assert all(isinstance(row["step"], int) for row in metrics)
        return "read" if len(metrics) == 5 else "fewer"

    outcomes = fuzz(count, check)
    assert min(outcomes["read"], outcomes["fewer"]) > count // 50, outcomes
