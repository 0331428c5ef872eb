"""A trained model at work on audio files: features of whole recordings, masked clips to reconstruct, the encoder alone.

Reading audio needs soundfile and soxr (the ``train`` extra).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .data import audio
from .files import atomic_write
from .models.config import MAEASTConfig
from .models.mae_ast import MAEAST, MAX_TOKENS
from .models.ssast import SSAST
from .ops.fbank import HOP, SAMPLE_RATE, WINDOW, num_frames
from .ops.masking import sample_mask
from .training.evaluation import MASK_SEED, HeldOut

_FILES = ("model.safetensors", "config.json", "checkpoints")  # of a model or of a run


@dataclass
class FileFeatures:
    """Features of one recording, a row a token: time blocks ascending, and inside one frequency blocks ascending.

    A patch model has several frequency blocks a time block, a frame model one. Every time block is complete, so
    ``features.reshape(-1, grid_f, D)`` is (time blocks, frequency blocks, D) and its mean over axis 1 is one vector a
    time step; ``times[::grid_f]`` are their times.

    Attributes:
        features: (tokens, D) float32.
        times: (tokens,) float64, centre of each token in seconds from the start of the recording.
        frequency_block: (tokens,) int32, 0 the lowest frequencies.
    """

    features: np.ndarray
    times: np.ndarray
    frequency_block: np.ndarray


def extract_file(
    model: MAEAST,
    path: str | os.PathLike[str],
    layer: int | None = None,
    chunk_seconds: float = 30.0,
    precision: str = "fp32",
) -> FileFeatures:
    """Encoder features of a whole recording of any length, nothing masked.

    A recording up to ``chunk_seconds`` is one clip, and its features are those of ``model.extract_features`` to the
    bit. A longer one is cut into chunks of that length, the last two of equal length rather than one of them a stub:
    the log-mel frames are those of the whole recording, but tokens attend within their chunk, and positions start anew
    in each. Memory is that of two chunks and of the result.

    Args:
        model: On the device where it shall run; it runs in evaluation mode.
        path: Audio of any rate and channel count.
        layer: Output of this layer, from 1; None: the encoder's output.
        chunk_seconds: Rounded up to whole patches.
        precision: "fp32" or "bf16" (autocast); the result is float32.

    Raises:
        audio.AudioError: The file gives no usable audio, or less than 25 ms.
        ValueError: A layer, length or precision is not as above.
    """
    config = model.config
    size = _chunk_frames(config, chunk_seconds)
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    device = next(model.parameters()).device
    features = np.empty((0, config.embed_dim), np.float32)
    times = []
    first_frame = 0
    was_training = model.training
    model.eval()
    try:
        for waveform in _chunks(audio.decode_blocks(path), size, config.patch_size[0]):
            frames = num_frames(waveform.size)
            if frames == 0:
                raise audio.AudioError(path, "shorter than 25 ms")
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                spectrogram, _ = model.features(torch.from_numpy(waveform)[None].to(device))
                rows = model.extract_features(spectrogram, layer=layer).last_hidden_state[0].float().cpu().numpy()
            # In place where the allocator can: two copies of an hour's features would be the most that is ever held.
            features.resize((len(features) + len(rows), config.embed_dim), refcheck=False)
            features[-len(rows) :] = rows
            times.append(_token_times(config, first_frame, len(rows)))
            first_frame += frames
    finally:
        model.train(was_training)
    blocks = np.tile(np.arange(config.grid_f, dtype=np.int32), len(features) // config.grid_f)
    return FileFeatures(features, np.concatenate(times), blocks)


def _chunk_frames(config: MAEASTConfig, chunk_seconds: float) -> int:
    kt = config.patch_size[0]
    longest = MAX_TOKENS // config.grid_f * kt
    if not 0.0 < chunk_seconds <= longest * HOP / SAMPLE_RATE:
        raise ValueError(
            f"chunk_seconds must be positive and at most {longest * HOP / SAMPLE_RATE:g} "
            f"({MAX_TOKENS} tokens), got {chunk_seconds:g}"
        )
    return -(-round(chunk_seconds * SAMPLE_RATE) // (HOP * kt)) * kt


def _chunks(blocks: Iterable[np.ndarray], size: int, kt: int) -> Iterator[np.ndarray]:
    """Cuts a stream of samples into waveforms of ``size`` frames whose frames are those of the whole stream.

    Consecutive chunks share the 15 ms by which a window reaches beyond its hop. What is left at the end, more than one
    chunk and less than two, makes two halves of whole patches, so that no token is encoded with next to no context.
    """

    def samples(frames: int) -> int:
        return (frames - 1) * HOP + WINDOW

    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while num_frames(rest.size) >= 2 * size:
            yield rest[: samples(size)]
            rest = rest[size * HOP :]
    frames = num_frames(rest.size)
    if frames > size:
        half = -(-frames // (2 * kt)) * kt
        yield rest[: samples(half)]
        rest = rest[half * HOP :]
    yield rest


def _token_times(config: MAEASTConfig, first_frame: int, tokens: int) -> np.ndarray:
    """Centres (tokens,) in seconds of the tokens of a chunk: a token of kt frames covers (kt - 1) * 10 + 25 ms."""
    kt = config.patch_size[0]
    block = np.arange(tokens) // config.grid_f
    centre = ((kt - 1) * HOP + WINDOW) / 2
    return ((first_frame + block * kt) * HOP + centre) / SAMPLE_RATE


def save_features(features: FileFeatures, path: Path, form: str) -> None:
    """Writes ``features``, ``times`` and ``frequency_block`` as ``npz`` or ``safetensors``; whole or not at all.

    Raises:
        ValueError: ``form`` is neither.
    """
    if form not in ("npz", "safetensors"):
        raise ValueError(f"form must be npz or safetensors, got {form!r}")
    arrays = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        from safetensors.numpy import save_file

        atomic_write(path, lambda partial: save_file(arrays, partial))
    else:
        atomic_write(path, lambda partial: _savez(partial, arrays))


def _savez(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add its own suffix
        np.savez(file, **arrays)


def output_paths(inputs: Sequence[str | os.PathLike[str]], folder: Path, suffix: str) -> list[Path]:
    """One path for each input below ``folder``, as the inputs lie below the folder that they share.

    ``suffix`` takes the place of the inputs' own; where that gives one name to two files, it follows the whole names of
    all.

    Raises:
        ValueError: A file is named twice.
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
    seed: int | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    mask_ratio: float | None = None,
    masking: str | None = None,
) -> HeldOut:
    """Reads a stretch of each file and draws its mask.

    Args:
        model: Whose patch grid and masking count.
        paths: Audio files.
        seed: Of the masks; None: the fixed one of held-out evaluation.
        start: Seconds into each file.
        seconds: Length, less where a file ends before. None: 10, or what the model takes where that is less.
        mask_ratio: Share that is hidden, in (0, 1); None: the model's.
        masking: Strategy of hiding; None: the model's.

    Raises:
        audio.AudioError: A file gives no usable audio.
        ValueError: ``start`` lies behind a file's end, or what is left is too short to hide something; no such
            strategy or share.
    """
    if seconds is None:
        seconds = min(10.0, ((model.max_frames - 1) * HOP + WINDOW) / SAMPLE_RATE)
    if not (start >= 0.0 and seconds > 0.0):
        raise ValueError(f"start must be >= 0 and seconds > 0, got {start:g} and {seconds:g}")
    # A configuration of MAE-AST checks the two, of whichever model they are.
    config = MAEASTConfig(
        num_mel_bins=model.config.num_mel_bins,
        patch_size=model.config.patch_size,
        mask_ratio=model.config.mask_ratio if mask_ratio is None else mask_ratio,
        masking=model.config.masking if masking is None else masking,
    )
    spectrograms = []
    for path in paths:
        waveform = _read(path, round(start * SAMPLE_RATE), round(seconds * SAMPLE_RATE))
        spectrograms.append(model.features(torch.from_numpy(waveform)[None])[0][0])
    frames = torch.tensor([len(spectrogram) for spectrogram in spectrograms])
    features = pad_sequence(spectrograms, batch_first=True)
    tokens = frames // config.patch_size[0] * config.grid_f
    mask = sample_mask(
        config.masking, tokens, config.grid_f, config.mask_ratio, seed=MASK_SEED if seed is None else seed
    )
    hidden = mask.sum(1)
    for path, length, total, masked in zip(paths, frames.tolist(), tokens.tolist(), hidden.tolist(), strict=True):
        if not 0 < masked < total:
            raise ValueError(
                f"{path}: {length} frames of 10 ms from {start:g} s on are too few to hide {config.mask_ratio:g} of "
                f"the patches of {config.patch_size[0]} frames"
            )
    return HeldOut(features, frames, mask, [os.path.basename(path) for path in paths], [""] * len(frames))


def _read(path: str | os.PathLike[str], start: int, samples: int) -> np.ndarray:
    """Up to ``samples`` samples of a file from ``start`` on; what lies before is decoded and dropped."""
    kept, seen = [np.zeros(0, np.float32)], 0
    for block in audio.decode_blocks(path):
        kept.append(block[max(0, start - seen) : max(0, start + samples - seen)])
        seen += block.size
        if seen >= start + samples:
            break
    if seen <= start and start:
        raise ValueError(f"{path} is {seen / SAMPLE_RATE:.2f} s long: nothing at {start / SAMPLE_RATE:g} s")
    return np.concatenate(kept)


def select(clips: HeldOut, index: int) -> HeldOut:
    """One clip of a set, without its padding."""
    one = clips.select([index])
    return dataclasses.replace(one, log_mel=one.log_mel[:, : int(one.num_frames)])


def save_model(model: MAEAST, folder: Path) -> int:
    """Writes model.safetensors and config.json into a new or empty place; returns the bytes of the weights.

    Raises:
        ValueError: ``folder`` already holds a model or a run.
    """
    if found := [name for name in _FILES if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(found)}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size
