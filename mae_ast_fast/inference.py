"""Inference on audio files: features of whole recordings, masked clips to reconstruct, and saved models.

Reading audio needs soundfile and soxr (the ``train`` extra).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .data import audio
from .files import atomic_write
from .models.config import MAEASTConfig
from .models.mae_ast import MAEAST, MAX_TOKENS
from .models.ssast import SSAST
from .ops.fbank import HOP, SAMPLE_RATE, frames_to_samples, num_frames
from .ops.masking import sample_mask
from .training.evaluation import MASK_SEED, HeldOut

_MODEL_FILES = ("model.safetensors", "config.json", "checkpoints")  # files of a model or of a run


@dataclass
class FileFeatures:
    """Features of one recording, one row per token: by time block, then by frequency block.

    A patch model has several frequency blocks per time block, a frame model one. Every time block is complete:
    ``features.reshape(-1, grid_f, D)`` is (time blocks, frequency blocks, D), and its mean over axis 1 is one vector
    per time block. ``times[::grid_f]`` are the times of the time blocks.

    Attributes:
        features: (tokens, D) float32.
        times: (tokens,) float64, centre of each token in seconds from the start of the recording.
        frequency_block: (tokens,) int32, frequency block of each token; 0 is the lowest.
    """

    features: np.ndarray
    times: np.ndarray
    frequency_block: np.ndarray


def extract_file(
    model: MAEAST,
    path: str | os.PathLike[str],
    layer: int | None = None,
    *,
    chunk_seconds: float = 30.0,
    precision: str = "fp32",
) -> FileFeatures:
    """Extract encoder features of a whole recording of any length, without masking.

    A recording of up to ``chunk_seconds`` is one clip, and its features equal those of ``model.extract_features`` bit
    for bit. A longer recording is cut into chunks of that length; the last two are equally long, so that no chunk is
    very short. The log-mel frames are those of the whole recording. Tokens attend within their chunk, and positions
    start at 0 in each chunk. Memory holds two chunks and the result.

    Args:
        model: Model on the device to run on. It runs in evaluation mode.
        path: Audio file of any sampling rate and channel count.
        layer: Layer, from 1, whose output is returned. None: the encoder's output.
        chunk_seconds: Maximum length of a chunk in seconds, rounded up to whole patches.
        precision: "fp32" or "bf16" (autocast). The result is float32.

    Raises:
        audio.AudioError: The file cannot be decoded or is shorter than 25 ms.
        ValueError: ``layer``, ``chunk_seconds`` or ``precision`` is out of range.
    """
    config = model.config
    chunk_frames = _chunk_frames(config, chunk_seconds)
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    device = next(model.parameters()).device
    features = np.empty((0, config.embed_dim), np.float32)
    times = []
    first_frame = 0
    was_training = model.training
    model.eval()
    try:
        for waveform in _chunks(audio.decode_blocks(path), chunk_frames, config.patch_size[0]):
            frames = num_frames(waveform.size)
            if frames == 0:
                raise audio.AudioError(path, "shorter than 25 ms")
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                log_mel, _ = model.features(torch.from_numpy(waveform)[None].to(device))
                chunk = model.extract_features(log_mel, layer=layer).last_hidden_state[0].float().cpu().numpy()
            # Grow in place where the allocator can: concatenating would double the peak memory of a long recording.
            features.resize((len(features) + len(chunk), config.embed_dim), refcheck=False)
            features[-len(chunk) :] = chunk
            times.append(_token_times(config, first_frame, len(chunk)))
            first_frame += frames
    finally:
        model.train(was_training)
    frequency_block = np.tile(np.arange(config.grid_f, dtype=np.int32), len(features) // config.grid_f)
    return FileFeatures(features, np.concatenate(times), frequency_block)


def _chunk_frames(config: MAEASTConfig, chunk_seconds: float) -> int:
    """Frames per chunk: ``chunk_seconds`` rounded up to whole patches.

    Raises:
        ValueError: ``chunk_seconds`` is not positive, or a chunk would have more than ``MAX_TOKENS`` tokens.
    """
    kt = config.patch_size[0]
    max_frames = MAX_TOKENS // config.grid_f * kt
    if not 0.0 < chunk_seconds <= max_frames * HOP / SAMPLE_RATE:
        raise ValueError(
            f"chunk_seconds must be positive and at most {max_frames * HOP / SAMPLE_RATE:g} "
            f"({MAX_TOKENS} tokens), got {chunk_seconds:g}"
        )
    return -(-round(chunk_seconds * SAMPLE_RATE) // (HOP * kt)) * kt


def _chunks(blocks: Iterable[np.ndarray], chunk_frames: int, kt: int) -> Iterator[np.ndarray]:
    """Cut a stream of samples into waveforms whose frames, in sequence, are the frames of the whole stream.

    Consecutive chunks share the 15 ms by which a window extends beyond its hop. The end of the stream, longer than one
    chunk and shorter than two, is halved at a whole patch, so that every token has context.

    Args:
        blocks: Samples (S,) in blocks of any length.
        chunk_frames: Maximum number of frames per chunk, whole patches.
        kt: Frames per patch.
    """

    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while num_frames(rest.size) >= 2 * chunk_frames:
            yield rest[: frames_to_samples(chunk_frames)]
            rest = rest[chunk_frames * HOP :]
    rest_frames = num_frames(rest.size)
    if rest_frames > chunk_frames:
        half = -(-rest_frames // (2 * kt)) * kt
        yield rest[: frames_to_samples(half)]
        rest = rest[half * HOP :]
    yield rest


def _token_times(config: MAEASTConfig, first_frame: int, num_tokens: int) -> np.ndarray:
    """Centres (tokens,) in seconds of the tokens of a chunk: a token of kt frames covers (kt - 1) * 10 + 25 ms."""
    kt = config.patch_size[0]
    block = np.arange(num_tokens) // config.grid_f
    centre = frames_to_samples(kt) / 2
    return ((first_frame + block * kt) * HOP + centre) / SAMPLE_RATE


def save_features(features: FileFeatures, path: Path, file_format: str) -> None:
    """Write ``features``, ``times`` and ``frequency_block`` to a file, atomically.

    Args:
        features: Features of a recording.
        path: File to write; its folder is created.
        file_format: "npz" or "safetensors".

    Raises:
        ValueError: Unknown ``file_format``.
    """
    if file_format not in ("npz", "safetensors"):
        raise ValueError(f"file_format must be npz or safetensors, got {file_format!r}")
    arrays = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "safetensors":
        from safetensors.numpy import save_file

        atomic_write(path, lambda partial: save_file(arrays, partial))
    else:
        atomic_write(path, lambda partial: _savez(partial, arrays))


def _savez(path: Path, arrays: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # numpy would append its own suffix to a path
        np.savez(file, **arrays)


def output_paths(inputs: Sequence[str | os.PathLike[str]], folder: Path, suffix: str) -> list[Path]:
    """Output path of each input: in ``folder``, at the input's path relative to the inputs' common folder.

    Args:
        inputs: Input files.
        folder: Output folder.
        suffix: Suffix that replaces the inputs' own. If two outputs would then have the same path, it is appended to
            the whole names of all inputs instead.

    Raises:
        ValueError: An input is named twice.
    """
    absolute = [Path(os.path.abspath(path)) for path in inputs]
    if repeated := [path for i, path in enumerate(absolute) if path in absolute[:i]]:
        raise ValueError(f"{repeated[0]} is given twice")
    common = os.path.commonpath([path.parent for path in absolute])
    relative = [path.relative_to(common) for path in absolute]
    replaced = [folder / f"{path.with_suffix('')}{suffix}" for path in relative]
    return replaced if len(set(replaced)) == len(replaced) else [folder / f"{path}{suffix}" for path in relative]


def masked_clips(
    model: MAEAST | SSAST,
    paths: Sequence[str | os.PathLike[str]],
    *,
    seed: int | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    mask_ratio: float | None = None,
    masking: str | None = None,
) -> HeldOut:
    """Read a clip of each file and draw its mask.

    Args:
        model: Model whose patch grid and masking are used.
        paths: Audio files.
        seed: Seed of the masks. None: the fixed seed of the held-out evaluation.
        start: Start of the clip in seconds from the start of the file.
        seconds: Length of the clip in seconds; less if the file ends before. None: 10, or the model's longest clip if
            that is shorter.
        mask_ratio: Share of the tokens that is masked, in (0, 1). None: the model's.
        masking: Masking strategy. None: the model's.

    Raises:
        audio.AudioError: A file cannot be decoded.
        ValueError: ``start`` is beyond a file's end, a clip is too short to mask, or ``seconds``, ``mask_ratio`` or
            ``masking`` is out of range.
    """
    if seconds is None:
        seconds = min(10.0, frames_to_samples(model.max_frames) / SAMPLE_RATE)
    if not (start >= 0.0 and seconds > 0.0):
        raise ValueError(f"start must be >= 0 and seconds > 0, got {start:g} and {seconds:g}")
    # MAEASTConfig checks the masking and its ratio, for an SSAST model too.
    config = MAEASTConfig(
        num_mel_bins=model.config.num_mel_bins,
        patch_size=model.config.patch_size,
        mask_ratio=model.config.mask_ratio if mask_ratio is None else mask_ratio,
        masking=model.config.masking if masking is None else masking,
    )
    assert config.masking is not None  # MAEASTConfig sets it
    log_mels = []
    for path in paths:
        waveform = _read(path, round(start * SAMPLE_RATE), round(seconds * SAMPLE_RATE))
        log_mels.append(model.features(torch.from_numpy(waveform)[None])[0][0])
    frame_counts = torch.tensor([len(log_mel) for log_mel in log_mels])
    num_tokens = config.num_tokens(frame_counts)
    mask = sample_mask(
        config.masking, num_tokens, config.grid_f, config.mask_ratio, seed=MASK_SEED if seed is None else seed
    )
    counts = zip(paths, frame_counts.tolist(), num_tokens.tolist(), mask.sum(1).tolist(), strict=True)
    for path, clip_frames, clip_tokens, clip_masked in counts:
        if not 0 < clip_masked < clip_tokens:
            raise ValueError(
                f"{path}: {clip_frames} frames of 10 ms from {start:g} s on are too few to mask "
                f"{config.mask_ratio:g} of the patches of {config.patch_size[0]} frames"
            )
    return HeldOut(
        log_mel=pad_sequence(log_mels, batch_first=True),
        num_frames=frame_counts,
        mask=mask,
        names=[os.path.basename(path) for path in paths],
        kinds=[""] * len(frame_counts),
    )


def _read(path: str | os.PathLike[str], start: int, num_samples: int) -> np.ndarray:
    """Read up to ``num_samples`` samples of a file from sample ``start`` on. Earlier samples are decoded and dropped.

    Raises:
        ValueError: The file ends before ``start``.
    """
    kept, decoded = [np.zeros(0, np.float32)], 0
    for block in audio.decode_blocks(path):
        kept.append(block[max(0, start - decoded) : max(0, start + num_samples - decoded)])
        decoded += block.size
        if decoded >= start + num_samples:
            break
    if decoded <= start and start:
        raise ValueError(f"{path} is {decoded / SAMPLE_RATE:.2f} s long: nothing at {start / SAMPLE_RATE:g} s")
    return np.concatenate(kept)


def select(clips: HeldOut, index: int) -> HeldOut:
    """One clip of a set, without its padding."""
    clip = clips.select([index])
    return dataclasses.replace(clip, log_mel=clip.log_mel[:, : int(clip.num_frames)])


def save_model(model: MAEAST, folder: Path) -> int:
    """Write model.safetensors and config.json into a new or empty folder.

    Returns:
        Size of the weights in bytes.

    Raises:
        ValueError: ``folder`` already holds a model or a run.
    """
    if existing := [name for name in _MODEL_FILES if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(existing)}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size
