"""An attentive probe: a head with learned attention, trained on the tokens of a frozen encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.fbank import fbank
from ..ops.packing import real_tokens
from .classifier import AttentiveHead, layer_states
from .manifest import Fold
from .options import ProbeOptions
from .report import write_report
from .run import FoldResult, Run
from .schedule import learning_rate

BATCH_SIZE, LR, WEIGHT_DECAY = 32, 1e-3, 0.05
MIN_EPOCHS, MIN_UPDATES = 30, 1000  # whichever takes longer
WARMUP = 0.1  # share of the updates with a rising rate; it then falls to 0 as a cosine
MAX_BYTES = 16 << 30  # of all tokens, which stay in memory

Tokens = list[Tensor]  # (n, K, D) fp16 of each clip on the CPU; clips that are not used have n = 0


def attentive_probe(run: Run[ProbeOptions], clips: Sequence[int]) -> dict[str, Any]:
    """Train and test an attentive head per fold, and the same on the frames of the log-mel.

    Args:
        run: Run of the probe.
        clips: Indices of the clips of all folds.

    Returns:
        The content of summary.json.

    Raises:
        ValueError: The task is frame-level, a fold has one training clip, or the tokens do not fit into memory.
    """
    for fold in run.folds:
        if len(fold.train) < 2:
            raise ValueError(f"expected at least two training clips with audio, {fold.display_name} has one")
    if run.task.frame_level:
        raise ValueError(f"{run.options.data} is a frame-level task: use --head linear")
    tokens = encoder_tokens(run, clips)
    results = [_fit_fold(run, tokens, fold) for fold in run.folds]
    tokens = log_mel_tokens(run, clips)
    baseline = [_fit_fold(run, tokens, fold) for fold in run.folds]
    best = max(results, key=lambda result: result.valid_score)
    classifier = run.build_classifier(run.encoder)
    classifier.head.load_state_dict(best.selected.pop("weights"))
    for result in (*results, *baseline):
        result.selected.pop("weights", None)
    classifier.save_pretrained(run.out)
    return write_report(run, results, log_mel=baseline)


def encoder_tokens(run: Run[ProbeOptions], clips: Sequence[int]) -> Tokens:
    """The normalised features of each clip's tokens, from the layers that the options name."""

    def encode(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            log_mel, num_frames = run.encoder.features(waveforms, num_samples)
            encoded = run.encoder.encode(log_mel, num_frames, run.options.layer)
        return layer_states(encoded, run.options.layers), encoded.packing.counts

    return _gather(run, clips, encode)


def log_mel_tokens(run: Run[ProbeOptions], clips: Sequence[int]) -> Tokens:
    """The frames of each clip's log-mel, every mel bin normalised over all training frames of the task."""

    def frames(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        log_mel, num_frames = fbank(waveforms, num_samples)
        num_frames = num_frames.to(log_mel.device)
        return log_mel[real_tokens(num_frames, log_mel.shape[1])][:, None], num_frames

    tokens = _gather(run, clips, frames)
    train = [tokens[i] for i in sorted({i for fold in run.folds for i in fold.train})]
    count = sum(len(clip_tokens) for clip_tokens in train)
    mean = torch.stack([clip_tokens.double().sum(0) for clip_tokens in train]).sum(0) / count
    variance = torch.stack([(clip_tokens.double() - mean).square().sum(0) for clip_tokens in train]).sum(0) / count
    mean, std = mean.float(), variance.sqrt().clamp(min=1e-3).float()
    return [((clip_tokens.float() - mean) / std).half() for clip_tokens in tokens]


@torch.no_grad()
def _gather(
    run: Run[ProbeOptions], clips: Sequence[int], compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tokens:
    """Tokens of the clips, window by window.

    Args:
        run: Run whose audio is read.
        clips: Indices of the clips.
        compute: Function from waveforms (B, S) and samples (B,) to packed tokens (N, K, D) and their number in each
            window (B,).

    Raises:
        ValueError: They need more than ``MAX_BYTES``.
    """
    windows: list[list[Tensor]] = [[] for _ in run.task.clips]
    num_bytes, num_done = 0, 0
    for waveforms, num_samples, window_clips, _ in run.read(clips):
        packed, counts = compute(waveforms, num_samples)
        for clip, window in zip(window_clips, packed.half().cpu().split(counts.tolist()), strict=True):
            windows[clip].append(window)
        num_bytes, num_done = num_bytes + 2 * packed.numel(), num_done + len(window_clips)
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"the tokens of {num_done} windows already take {num_bytes / 2**30:.0f} GiB, more than "
                f"{MAX_BYTES / 2**30:.0f}: use --layers last or --head linear"
            )
    empty = packed.new_zeros(0, *packed.shape[1:], dtype=torch.float16, device="cpu")
    return [torch.cat(clip_windows) if clip_windows else empty for clip_windows in windows]


def _fit_fold(run: Run[ProbeOptions], tokens: Tokens, fold: Fold) -> FoldResult:
    """Train a head on the training clips, select an epoch on the validation clips, predict the test clips."""
    num_layers, width = tokens[fold.train[0]].shape[1:]
    torch.manual_seed(run.options.seed)
    head = AttentiveHead(num_layers, width, len(run.task.labels)).to(run.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    targets = torch.from_numpy(run.examples.targets).float().to(run.device)
    generator = torch.Generator().manual_seed(run.options.seed)
    epochs = max(MIN_EPOCHS, math.ceil(MIN_UPDATES / len(_batches(fold.train))))
    num_steps, step = epochs * len(_batches(fold.train)), 0
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for epoch in range(1, epochs + 1):
        head.train()
        order = torch.randperm(len(fold.train), generator=generator).tolist()
        for batch in _batches([fold.train[i] for i in order]):
            optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, peak=LR, warmup=WARMUP)
            loss = _loss(_logits(head, tokens, batch), targets[batch], run.task.multi_label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        valid_score = run.score(_predict(run, head, tokens, fold.valid), run.examples.targets[fold.valid])
        if best is None or valid_score > best[0]:
            best = valid_score, epoch, copy.deepcopy(head.state_dict())
    assert best is not None  # there are epochs
    valid_score, epoch, weights = best
    head.load_state_dict(weights)
    probabilities = _predict(run, head, tokens, fold.test)
    return FoldResult(
        fold=fold, probabilities=probabilities, valid_score=valid_score, selected={"epoch": epoch, "weights": weights}
    )


def _batches(clips: Sequence[int]) -> list[Sequence[int]]:
    """Batches of clips; a single clip left over is dropped, because one clip has no variance."""
    batches = [clips[start : start + BATCH_SIZE] for start in range(0, len(clips), BATCH_SIZE)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def _logits(head: AttentiveHead, tokens: Tokens, clips: Sequence[int]) -> Tensor:
    """Class scores (n, C) of some clips, on the device of the head."""
    device = head.query.device
    counts = torch.tensor([len(tokens[i]) for i in clips])
    states = torch.cat([tokens[i] for i in clips]).to(device, torch.float32)
    clip = torch.repeat_interleave(torch.arange(len(clips)), counts).to(device)
    return head(states, clip, len(clips))


@torch.no_grad()
def _predict(run: Run[ProbeOptions], head: AttentiveHead, tokens: Tokens, clips: Sequence[int]) -> np.ndarray:
    """Class probabilities (n, C) of some clips."""
    head.eval()
    starts = range(0, len(clips), BATCH_SIZE)
    scores = torch.cat([_logits(head, tokens, clips[start : start + BATCH_SIZE]) for start in starts])
    return (scores.sigmoid() if run.task.multi_label else scores.softmax(1)).cpu().numpy()


def _loss(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)
