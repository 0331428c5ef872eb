"""A linear probe on the frozen encoder's features."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.fbank import HOP, SAMPLE_RATE, WINDOW, fbank
from .classifier import NORM_EPS, AudioClassifier, pool_tokens
from .manifest import Fold
from .options import ProbeOptions
from .run import FoldResult, Run

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)  # C of the probe: larger means less regularised


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Logistic regression on the frozen encoder's features; returns what summary.json holds.

    Beside it stands the same on the mean log-mel spectrum of each clip, which no network has seen. Of a clip
    that is longer than ``max_seconds`` the features of its windows are averaged; ``predict`` averages probabilities.

    Raises:
        ValueError: Unusable data, options or checkpoint, or ``out`` holds a run of another kind.
    """
    with Run(options, "probe") as run:
        clips = sorted({i for part in run.rounds for x in (part.train, part.valid, part.test) for i in x})
        x = encoder_features(run, clips)
        tested = [_fit_round(run, x, part, keep=not run.task.frame_level) for part in run.rounds]
        x = _log_mel(run, clips)
        log_mel = [_fit_round(run, x, part) for part in run.rounds]
        best = max(tested, key=lambda one: one.valid)
        if best.classifier is not None:
            best.classifier.save_pretrained(run.out)
        return run.report(tested, [], {"log_mel": log_mel})


def encoder_features(run: Run, clips: Sequence[int]) -> np.ndarray:
    """(n, D) fp32 of all examples: the mean of a clip's tokens, or of those that cover a moment; 0 of other clips."""
    encoder = run.encoder
    kt, layer = encoder.config.patch_size[0], run.options.layer
    bands = encoder.config.grid_f if run.options.pool == "bands" else 1

    @torch.no_grad()
    def encode(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        with run.autocast():
            encoded = encoder.encode(*encoder.features(waveforms, lengths), layer)
        if not run.task.frame_level:
            return pool_tokens(encoded, len(waveforms), bands), 0
        blocks = int(encoded.time_block.max()) + 1
        moment = encoded.packing.clip * blocks + encoded.time_block
        return pool_tokens(encoded, len(waveforms) * blocks, bands, moment).unflatten(0, (-1, blocks)), kt

    return _gather(run, clips, encode, bands * encoder.config.embed_dim)


def _log_mel(run: Run, clips: Sequence[int]) -> np.ndarray:
    """(n, 128) fp32: the mean log-mel spectrum of each clip, or the spectrum at a moment."""
    num_mel_bins = run.encoder.config.num_mel_bins

    def spectrum(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        features, frames = fbank(waveforms, lengths)
        if run.task.frame_level:
            return features, 1
        frames = frames.to(features.device)[:, None]
        real = torch.arange(features.shape[1], device=features.device) < frames
        return torch.where(real[:, :, None], features, 0).sum(1) / frames, 0

    return _gather(run, clips, spectrum, num_mel_bins)


def _gather(
    run: Run, clips: Sequence[int], compute: Callable[[Tensor, Tensor], tuple[Tensor, int]], width: int
) -> np.ndarray:
    """Rows (n, width) of the examples of ``clips``, window after window; a clip of several is their mean, by length."""
    examples, task = run.examples, run.task
    found = np.zeros((len(examples.clip), width), np.float32)
    weight = np.zeros((len(found), 1), np.float32)
    done, began, shown = 0, time.perf_counter(), time.perf_counter()
    for waveforms, lengths, owners, starts in run.read(clips):
        x, frames_a_row = compute(waveforms, lengths)
        x, seconds = x.cpu().numpy(), lengths.numpy() / SAMPLE_RATE
        for row, clip, start, length in zip(x, owners, starts, seconds, strict=True):
            if not task.frame_level:
                found[clip] += row * length
                weight[clip] += length
                continue
            rows = examples.of_clips([clip])
            rows = rows[(examples.time[rows] >= start) & (examples.time[rows] < start + length)]
            frame = np.rint(((examples.time[rows] - start) * SAMPLE_RATE - WINDOW / 2) / HOP).astype(int)
            last = (int(length * SAMPLE_RATE) - WINDOW) // HOP
            found[rows] = row[np.clip(frame, 0, last) // frames_a_row]
            weight[rows] = 1.0
        done += len(owners)
        if (now := time.perf_counter()) - shown > 10.0:
            run.say(f"{done} windows, {done / (now - began):.0f} a second")
            shown = now
    return found / np.maximum(weight, 1e-9)


def _fit_round(run: Run, x: np.ndarray, part: Fold, keep: bool = False) -> FoldResult:
    """Fits each penalty on the training examples, takes the best on the validation ones, tells of the test ones.

    Args:
        run: Whose examples.
        x: (n, D) their features.
        part: Which are for what.
        keep: Make a classifier of it, that is where ``x`` are the encoder's features of clips.
    """
    examples, multi_label = run.examples, run.task.multi_label
    train, valid, test = (examples.of_clips(clips) for clips in (part.train, part.valid, part.test))
    data = torch.from_numpy(x).to(run.device)
    targets = torch.from_numpy(examples.targets).to(run.device)
    mean, var = data[train].mean(0), data[train].var(0, correction=0)
    scaled = (data - mean) / (var + NORM_EPS).sqrt()  # as the classifier's norm does
    weight, bias = scaled.new_zeros(targets.shape[1], x.shape[1]), scaled.new_zeros(targets.shape[1])
    best: tuple[float, float, Tensor, Tensor] | None = None

    def told(rows: np.ndarray, w: Tensor, b: Tensor) -> np.ndarray:
        logits = F.linear(scaled[rows], w, b)
        return (logits.sigmoid() if multi_label else logits.softmax(1)).cpu().numpy()

    for penalty in PENALTIES:  # each starts where the last one ended
        weight, bias = fit_logistic(scaled[train], targets[train], penalty, multi_label, (weight, bias))
        value = run.score(told(valid, weight, bias), examples.targets[valid])
        if best is None or value > best[0]:
            best = (value, penalty, weight, bias)
    value, penalty, weight, bias = best
    classifier = None
    if keep:
        classifier = run.new_classifier(run.encoder)
        set_norm(classifier, data[train])
        classifier.head.weight.data, classifier.head.bias.data = weight, bias
    return FoldResult(part, told(test, weight, bias), value, classifier, {"C": penalty})


def set_norm(classifier: AudioClassifier, x: Tensor) -> None:
    """Statistics of rows (n, D), until training moves them."""
    classifier.norm.running_mean.copy_(x.mean(0))
    classifier.norm.running_var.copy_(x.var(0, correction=0))


def fit_logistic(
    x: Tensor, targets: Tensor, penalty: float, multi_label: bool, start: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logistic regression by L-BFGS: weights (C, D), biases (C,) that minimise the summed loss + |W|^2 / (2 penalty).

    Args:
        x: (n, D); the products are in fp64, in which the optimum can be told.
        targets: (n, C) bool.
        penalty: C, the inverse of the regularisation's strength.
        multi_label: A loss for each class by itself, else a softmax over them.
        start: Where to begin.
    """
    x, y = x.double(), targets.double()
    weight, bias = (tensor.double().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    classes = y.argmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight, bias)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        else:
            loss = F.cross_entropy(logits, classes, reduction="sum")
        loss = (loss + weight.square().sum() / (2 * penalty)) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().to(start[0].dtype), bias.detach().to(start[1].dtype)
