"""Probes of a frozen encoder: logistic regression on pooled features, or an attentive head on its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.pooling import pool_tokens
from ..ops.fbank import HOP, SAMPLE_RATE, WINDOW, fbank
from .attentive import attentive_probe
from .classifier import NORM_EPS, AudioClassifier
from .manifest import Fold
from .options import ProbeOptions
from .report import write_report
from .run import FoldResult, Run

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)  # C of the probe: larger means less regularised


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Fit a classifier on the frozen encoder's features; return the content of summary.json.

    It is logistic regression on pooled features or, with ``head="attentive"``, an ``AttentiveHead`` on tokens. The
    baseline ``log_mel`` is the same without a network: on the mean log-mel spectrum of each clip, or on its frames.
    For a clip longer than ``max_seconds`` the features of its windows are averaged, and an attentive head sees the
    tokens of all windows; ``predict`` averages probabilities.

    Raises:
        ValueError: The data, options or checkpoint are unusable, or ``out`` holds a run with other options or data.
    """
    with Run(options, "probe") as run:
        clips = sorted({i for fold in run.folds for split in (fold.train, fold.valid, fold.test) for i in split})
        if options.head == "attentive":
            return attentive_probe(run, clips)
        features = encoder_features(run, clips)
        results = [fit_fold(run, features, fold, keep=not run.task.frame_level) for fold in run.folds]
        features = log_mel_features(run, clips)
        baseline = [fit_fold(run, features, fold) for fold in run.folds]
        best = max(results, key=lambda result: result.valid_score)
        if best.classifier is not None:
            best.classifier.save_pretrained(run.out)
        return write_report(run, results, log_mel=baseline)


def encoder_features(run: Run[ProbeOptions], clips: Sequence[int]) -> np.ndarray:
    """Features (n, D) fp32 of the task's examples: the mean of a clip's tokens, or of the tokens that cover a moment.

    Args:
        run: Run whose encoder and audio are used.
        clips: Indices of the clips to encode. The features of other clips are 0.
    """
    encoder = run.encoder
    kt, layer = encoder.config.patch_size[0], run.options.layer
    num_bands = encoder.config.grid_f if run.options.pool == "bands" else 1

    @torch.no_grad()
    def encode(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, int]:
        with run.autocast():
            log_mel, num_frames = encoder.features(waveforms, num_samples)
            encoded = encoder.encode(log_mel, num_frames, layer)
        if not run.task.frame_level:
            return pool_tokens(encoded, len(waveforms), num_bands=num_bands), 0
        num_blocks = int(encoded.time_block.max()) + 1
        group = encoded.packing.clip * num_blocks + encoded.time_block
        pooled = pool_tokens(encoded, len(waveforms) * num_blocks, num_bands=num_bands, group=group)
        return pooled.unflatten(0, (-1, num_blocks)), kt

    return _gather(run, clips, encode, num_bands * encoder.config.embed_dim)


def log_mel_features(run: Run[ProbeOptions], clips: Sequence[int]) -> np.ndarray:
    """Features (n, 128) fp32: the mean log-mel spectrum of each clip, or the spectrum at a moment."""

    def spectrum(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, int]:
        log_mel, num_frames = fbank(waveforms, num_samples)
        if run.task.frame_level:
            return log_mel, 1
        num_frames = num_frames.to(log_mel.device)[:, None]
        is_real = torch.arange(log_mel.shape[1], device=log_mel.device) < num_frames
        return torch.where(is_real[:, :, None], log_mel, 0).sum(1) / num_frames, 0

    return _gather(run, clips, spectrum, run.encoder.config.num_mel_bins)


def _gather(
    run: Run[ProbeOptions], clips: Sequence[int], compute: Callable[[Tensor, Tensor], tuple[Tensor, int]], width: int
) -> np.ndarray:
    """Compute features (n, width) window by window. A clip of several windows has their mean, weighted by duration.

    Args:
        run: Run whose audio is read.
        clips: Indices of the clips to compute.
        compute: Function from waveforms (B, S) and samples (B,) to features (B, width) and 0 or, in a frame-level task,
            to (B, blocks, width) and the frames per block.
        width: Number of features.
    """
    examples, task = run.examples, run.task
    features = np.zeros((len(examples.clip), width), np.float32)
    weight = np.zeros((len(features), 1), np.float32)
    num_windows, start_time, last_report = 0, time.perf_counter(), time.perf_counter()
    for waveforms, num_samples, window_clips, window_starts in run.read(clips):
        computed, frames_per_block = compute(waveforms, num_samples)
        window_features, seconds = computed.cpu().numpy(), num_samples.numpy() / SAMPLE_RATE
        for values, clip, start, duration in zip(window_features, window_clips, window_starts, seconds, strict=True):
            if not task.frame_level:
                features[clip] += values * duration
                weight[clip] += duration
                continue
            moments = examples.indices([clip])
            moments = moments[(examples.time[moments] >= start) & (examples.time[moments] < start + duration)]
            frame = np.rint(((examples.time[moments] - start) * SAMPLE_RATE - WINDOW / 2) / HOP).astype(int)
            last_frame = (int(duration * SAMPLE_RATE) - WINDOW) // HOP
            features[moments] = values[np.clip(frame, 0, last_frame) // frames_per_block]
            weight[moments] = 1.0
        num_windows += len(window_clips)
        if (now := time.perf_counter()) - last_report > 10.0:
            run.log(f"{num_windows} windows, {num_windows / (now - start_time):.0f} windows/s")
            last_report = now
    return features / np.maximum(weight, 1e-9)


def fit_fold(run: Run[ProbeOptions], features: np.ndarray, fold: Fold, keep: bool = False) -> FoldResult:
    """Fit each penalty on the training examples, select one on the validation examples, predict the test examples.

    Args:
        run: Run whose examples are classified.
        features: (n, D) features of all examples.
        fold: Training, validation and test clips.
        keep: Make a classifier of the result. ``features`` must then be the encoder's features of clips.
    """
    examples, multi_label = run.examples, run.task.multi_label
    train, valid, test = (examples.indices(clips) for clips in (fold.train, fold.valid, fold.test))
    data = torch.from_numpy(features).to(run.device)
    targets = torch.from_numpy(examples.targets).to(run.device)
    mean, var = data[train].mean(0), data[train].var(0, correction=0)
    scaled = (data - mean) / (var + NORM_EPS).sqrt()  # as the classifier's norm computes it
    weight, bias = scaled.new_zeros(targets.shape[1], features.shape[1]), scaled.new_zeros(targets.shape[1])
    best: tuple[float, float, Tensor, Tensor] | None = None

    def predict(rows: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
        logits = F.linear(scaled[rows], weight, bias)
        return (logits.sigmoid() if multi_label else logits.softmax(1)).cpu().numpy()

    for penalty in PENALTIES:  # each fit starts from the one before
        weight, bias = fit_logistic(
            scaled[train], targets[train], penalty=penalty, multi_label=multi_label, start=(weight, bias)
        )
        valid_score = run.score(predict(valid, weight, bias), examples.targets[valid])
        if best is None or valid_score > best[0]:
            best = (valid_score, penalty, weight, bias)
    assert best is not None  # there are penalties
    valid_score, penalty, weight, bias = best
    classifier = None
    if keep:
        classifier = run.build_classifier(run.encoder)
        set_norm(classifier, data[train])
        classifier.head.weight.data, classifier.head.bias.data = weight, bias
    return FoldResult(
        fold=fold,
        probabilities=predict(test, weight, bias),
        valid_score=valid_score,
        classifier=classifier,
        selected={"C": penalty},
    )


def set_norm(classifier: AudioClassifier, pooled: Tensor) -> None:
    """Set the norm's statistics to those of pooled features (n, D). Training then updates them."""
    mean, var = classifier.norm.running_mean, classifier.norm.running_var
    assert mean is not None and var is not None  # the norm tracks statistics
    mean.copy_(pooled.mean(0))
    var.copy_(pooled.var(0, correction=0))


def fit_logistic(
    x: Tensor, targets: Tensor, *, penalty: float, multi_label: bool, start: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fit logistic regression by L-BFGS, minimising the summed loss + |W|^2 / (2 penalty).

    Args:
        x: (n, D) features. Products are computed in fp64, which resolves the optimum.
        targets: (n, C) bool.
        penalty: C, the inverse of the regularisation strength.
        multi_label: True: a binary loss per class. False: a softmax over the classes.
        start: Initial weights (C, D) and biases (C,).

    Returns:
        Weights (C, D) and biases (C,) in the dtype of ``start``.
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
