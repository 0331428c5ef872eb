"""Statistics of a data set's log-mel values, which SSAST normalises its input by."""

from __future__ import annotations

import itertools
import math

from ..ops.fbank import fbank
from ..ops.packing import real_tokens
from .shards import Shards

STATISTICS_CROPS = 200  # crops that the statistics are computed from


def log_mel_statistics(
    shards: Shards, *, batch_seconds: float, max_seconds: float, min_seconds: float, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel values of the first crops, by SSAST's front end, to four decimals.

    SSAST's recipe normalises its input by these statistics of the whole data set (arXiv 2110.09784, official code).

    Args:
        shards: Prepared shards. Only their training side is read.
        batch_seconds: Audio per batch, in seconds.
        max_seconds: Longest crop, in seconds.
        min_seconds: Shortest crop, in seconds.
        seed: Seed of the order of crops.

    Raises:
        ValueError: None of the first crops can be read.
    """
    batches = shards.batches(batch_seconds=batch_seconds, max_seconds=max_seconds, min_seconds=min_seconds, seed=seed)
    crops = list(itertools.islice(itertools.chain.from_iterable(batches), STATISTICS_CROPS))
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(crops), 16):
        batch = shards.read(crops[start : start + 16])
        if not batch.names:
            continue
        log_mel, num_frames = fbank(batch.waveforms, batch.num_samples, frontend="ssast")
        values = log_mel[real_tokens(num_frames, log_mel.shape[1])].double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    if not count:
        raise ValueError(f"none of the first {len(crops)} clips of {shards.source} can be read")
    mean = total / count
    return round(mean, 4), round(math.sqrt(max(0.0, squares / count - mean**2)), 4)
