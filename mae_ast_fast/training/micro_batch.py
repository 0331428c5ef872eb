"""The inputs of an update, checked and copied to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import send
from ..models.base import PretrainingModel, check_lengths
from ..ops.packing import TokenCounts, round_up

Mask = Tensor | tuple[Tensor, ...]


class MicroBatch(NamedTuple):
    """The inputs of ``TrainStep.__call__``. A micro-batch of 0 clips adds nothing to its update.

    Attributes:
        log_mel: (B, T, F) ``features`` of ``TrainStep.__call__``.
        num_frames: (B,) its ``lengths``.
        seed: Its ``seed``.
        clip_ids: (B,) its ``clip_ids``.
        epoch: Its ``epoch``.
        mask: (B, L) its ``mask``, in an update of one micro-batch only.
    """

    log_mel: Tensor
    num_frames: Sequence[int] | Tensor | None = None
    seed: int | Tensor | None = None
    clip_ids: Tensor | None = None
    epoch: int = 0
    mask: Mask | None = None


@dataclass
class DeviceBatch:
    """A micro-batch on the device, and its part in an update of several micro-batches.

    Attributes:
        log_mel: (B, T, F).
        num_frames: (B,) int64.
        mask: (B, L) one or several masks. None: drawn from ``seed``, ``clip_ids`` and ``epoch``.
        seed: 64-bit seed of the masks. None: it is drawn from torch's default generator.
        clip_ids: (B,) integers. None: 0, 1, ... B - 1.
        epoch: Number of the pass over the data.
        token_counts: Rows of the packed batch. None: the model counts them.
        num_rows: Rows of the packed batch, padding included.
        num_tokens: Visible and predicted tokens, on the device if only the device knows them.
        is_real: False for a placeholder of a micro-batch without clips, which counts for nothing in the update.
        weight: 0-d fp64 share of all masked tokens of the update. None: this micro-batch is the whole update.
        input_stats: Mean and scale of the input normalisation, of all micro-batches. None: the model measures them.
        generator_seed: Seed of torch's generators during the forward. None: they continue as they are.
    """

    log_mel: Tensor
    num_frames: Tensor
    mask: Mask | None
    seed: int | Tensor | None
    clip_ids: Tensor | None
    epoch: int
    token_counts: TokenCounts | None
    num_rows: int
    num_tokens: int | Tensor
    is_real: bool
    weight: Tensor | None = None
    input_stats: tuple[Tensor, Tensor] | None = None
    generator_seed: int | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Log-mel, frame counts and masks."""
        masks = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        return [self.log_mel, self.num_frames, *(mask for mask in masks if mask is not None)]

    def clone(self) -> DeviceBatch:
        """The same micro-batch with copies of ``tensors``."""
        log_mel, num_frames, *masks = (tensor.clone() for tensor in self.tensors)
        mask = tuple(masks) if isinstance(self.mask, tuple) else next(iter(masks), None)
        return dataclasses.replace(self, log_mel=log_mel, num_frames=num_frames, mask=mask)


def to_device(
    micro_batch: MicroBatch, model: PretrainingModel, device: torch.device, *, pads_shapes: bool
) -> DeviceBatch:
    """Check a micro-batch and start its copy to the device.

    A micro-batch without clips becomes one of silence, so that all processes run the same passes.

    Args:
        micro_batch: Inputs as the caller gave them.
        model: Model that takes them.
        device: Device of the model.
        pads_shapes: Whether to pad to a shape that similar batches share.

    Raises:
        ValueError: As ``TrainStep.__call__``.
    """
    is_real = not has_no_clips(micro_batch.log_mel)
    if not is_real:
        micro_batch = MicroBatch(_silence(micro_batch.log_mel, model), seed=0)
    check_has_clips(micro_batch.log_mel)
    log_mel, mask = micro_batch.log_mel, micro_batch.mask
    clip_ids = None if micro_batch.clip_ids is None else torch.as_tensor(micro_batch.clip_ids)
    num_frames, token_counts = _frames_and_token_counts(micro_batch, model)
    num_tokens: int | Tensor = 0
    if is_real and not token_counts.has_padding_rows:
        num_tokens = token_counts.visible + token_counts.masked
    elif is_real:
        num_tokens = model.num_rows(num_frames).sum()
    if pads_shapes:
        shape = PaddedShape.of(model, len(log_mel), log_mel.shape[1], token_counts)
        log_mel, num_frames, clip_ids = _pad(log_mel, num_frames, clip_ids, shape)
        token_counts = shape.token_counts
    # On a CPU the model counts the tokens of a given mask, and refuses one with which no clip has both kinds of token.
    model_counts = mask is not None and device.type == "cpu"
    return DeviceBatch(
        log_mel=send(log_mel, device),
        num_frames=send(num_frames, device),
        mask=mask,
        seed=micro_batch.seed,
        clip_ids=clip_ids,
        epoch=micro_batch.epoch,
        token_counts=None if model_counts else token_counts,
        num_rows=token_counts.visible + token_counts.masked,
        num_tokens=num_tokens,
        is_real=is_real,
    )


def has_no_clips(log_mel: Any) -> bool:
    """Whether this is (0, T, F)."""
    return isinstance(log_mel, Tensor) and log_mel.dim() == 3 and not len(log_mel)


def check_has_clips(log_mel: Any) -> None:
    """Check that this is (B, T, F) with B at least 1.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(log_mel, Tensor) or log_mel.dim() != 3 or not len(log_mel):
        got = tuple(log_mel.shape) if isinstance(log_mel, Tensor) else type(log_mel).__name__
        raise ValueError(f"features must be a tensor (B, T, F) of at least one clip, got {got}")


def _silence(log_mel: Tensor, model: PretrainingModel) -> Tensor:
    """Zeros (1, T, F) in place of ``log_mel`` (0, T, F): the shortest clip with a masked token."""
    kt = model.config.patch_size[0]
    num_frames = next(count for count in range(kt, model.max_frames + 1, kt) if model.sizes_of([count]).masked)
    return log_mel.new_zeros(1, num_frames, log_mel.shape[2])


def _frames_and_token_counts(micro_batch: MicroBatch, model: PretrainingModel) -> tuple[Tensor, TokenCounts]:
    """Validated frame counts (B,), int64, on the caller's device, and the rows of the packed batch.

    Later code does not read the frame counts on the host.
    """
    num_frames = micro_batch.num_frames
    num_clips, max_frames = micro_batch.log_mel.shape[:2]
    on_host = _is_on_host(num_frames)
    if num_frames is None:
        checked = torch.full((num_clips,), max_frames, device="cpu")
    else:
        checked = check_lengths(num_frames, num_clips, max_frames, check_values=on_host)
    # This raises if nothing can be masked.
    token_counts = model.exact_sizes(micro_batch.log_mel, checked if on_host else None)
    if on_host:
        return checked, token_counts
    return checked.clamp(0, max_frames), model.largest_sizes(num_clips, max_frames, drawn=micro_batch.mask is None)


def _is_on_host(num_frames: Sequence[int] | Tensor | None) -> bool:
    """Whether the host can read frame counts without waiting for a GPU."""
    return not isinstance(num_frames, Tensor) or num_frames.device.type == "cpu"


class PaddedShape(NamedTuple):
    """The shape that a batch is padded to. Similar batches share it, and with it one graph.

    Attributes:
        num_clips: B.
        num_frames: T.
        token_counts: Rows of the packed batch. The most rows of one clip are those of a clip of T frames.
    """

    num_clips: int
    num_frames: int
    token_counts: TokenCounts

    @classmethod
    def of(cls, model: PretrainingModel, num_clips: int, max_frames: int, token_counts: TokenCounts) -> PaddedShape:
        """The padded shape of a batch of ``num_clips`` clips of at most ``max_frames`` frames."""
        kt = model.config.patch_size[0]
        num_frames = max(max_frames, min(round_up(-(-max_frames // kt)) * kt, model.max_frames))
        rounded = token_counts.bucket()
        padded = model.largest_sizes(1, num_frames)._replace(visible=rounded.visible, masked=rounded.masked)
        return cls(round_up(num_clips, min_step=1), num_frames, padded)


def _pad(
    log_mel: Tensor, num_frames: Tensor, clip_ids: Tensor | None, shape: PaddedShape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad a batch with empty clips, and its clips with frames that do not count."""
    num_clips, max_frames = log_mel.shape[:2]
    empty_clips = shape.num_clips - num_clips
    log_mel = F.pad(log_mel, (0, 0, 0, shape.num_frames - max_frames, 0, empty_clips))
    clip_ids = None if clip_ids is None else F.pad(clip_ids, (0, empty_clips))
    return log_mel, F.pad(num_frames, (0, empty_clips)), clip_ids
