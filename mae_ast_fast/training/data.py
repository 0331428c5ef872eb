"""The data of a pretraining run: its shards, and the statistics that SSAST is normalised by."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..data import corpus, prepare
from ..data.audio import AudioFile
from ..data.shards import Shards
from ..ops.fbank import fbank
from ..ops.packing import real_tokens
from .options import PretrainOptions

STATISTICS_CROPS = 200  # SSAST is normalised by their mean and deviation


def open_data(
    source: str | os.PathLike | Sequence[AudioFile],
    cache: str | os.PathLike,
    *,
    min_seconds: float,
    workers: int,
    split: Callable[[Sequence[AudioFile]], tuple[np.ndarray, np.ndarray, str]] | None = None,
    progress: bool = True,
) -> Shards:
    """Shards to pretrain on: those that ``source`` names, or those that are made of it, once, in ``cache``/shards.

    Args:
        source: A folder or URL of shards that ``prepare`` made, or whatever ``prepare.prepare_shards`` takes.
        cache: Folder.
        min_seconds, workers, split, progress: See ``prepare.prepare_shards``.

    Raises:
        ValueError: Nothing usable, or nothing can be held out.
    """
    try:
        if isinstance(source, (str, os.PathLike)) and prepare.source_format(source) == "prepared":
            return Shards(source)
        plan = prepare.plan(source, min_seconds=min_seconds, split=split)
    except (OSError, ImportError) as error:
        if "://" not in str(source):
            raise
        raise ValueError(f"{source} cannot be read: {type(error).__name__}: {error}") from error  # fsspec says little
    folder = Path(cache) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    report = prepare.write_shards(plan, folder / plan.key[:24], workers=workers, progress=progress)
    if not report["held_out"]:
        raise ValueError(
            "holding clips out takes at least two different files, got one: add some, or cut it into several"
        )
    return Shards(folder / plan.key[:24])


def training_shards(options: PretrainOptions) -> Shards:
    """The shards of a run: those that ``options.data`` names, or those that are made of it, once, in the cache.

    Raises:
        ValueError: Nothing there can be used.
        corpus.CorpusError: The default corpus cannot be had.
    """
    cache = Path(options.cache) if options.cache else corpus.default_cache()
    opened = functools.partial(open_data, cache=cache, min_seconds=options.min_seconds, workers=options.workers)
    if options.data is not None:
        return opened(options.data)
    fetched = corpus.fetch(cache)
    entries, left_out = corpus.default_clips(fetched.cache, fetched.packages)
    shards = opened(entries, split=corpus.held_out)
    shards.report |= {"corpus": left_out, "packages": fetched.packages, "missing_packages": fetched.missing}
    return shards


def log_mel_statistics(shards: Shards, options: PretrainOptions) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel values of the first crops, by SSAST's front end, to four decimals.

    Its recipe normalises by such statistics of the whole data set (arXiv 2110.09784, official code).
    """
    lengths = {"max_seconds": options.max_seconds, "min_seconds": options.min_seconds}
    batches = shards.batches(batch_seconds=options.batch_seconds, **lengths, seed=options.seed)
    crops = list(itertools.islice(itertools.chain.from_iterable(batches), STATISTICS_CROPS))
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(crops), 16):
        batch = shards.read(crops[start : start + 16])
        if not batch.names:
            continue
        features, frames = fbank(batch.waveforms, batch.num_samples, frontend="ssast")
        values = features[real_tokens(frames, features.shape[1])].double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    if not count:
        raise ValueError(f"none of the first {len(crops)} clips of {shards.source} can be read")
    mean = total / count
    return round(mean, 4), round(math.sqrt(max(0.0, squares / count - mean**2)), 4)
