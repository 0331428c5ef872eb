"""The data of a pretraining run: shards that exist, or shards made from a source or from the default corpus."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from ..data import corpus, prepare
from ..data.audio import AudioFile
from ..data.shards import Shards
from .options import PretrainOptions


def open_data(
    source: str | os.PathLike | Sequence[AudioFile],
    cache: str | os.PathLike,
    *,
    min_seconds: float,
    workers: int,
    split: prepare.Split | None = None,
    progress: bool = True,
) -> Shards:
    """Open the shards in ``source``, or convert it to shards once, in ``cache``/shards.

    Args:
        source: Folder or URL of shards that ``prepare`` made, or any source of ``prepare.prepare_shards``.
        cache: Cache folder.
        min_seconds: Shorter files are skipped, in seconds.
        workers: Processes that decode audio.
        split: Function of the files that returns the indices to train on, the indices to hold out, and a sentence that
            describes the split. None: the default of ``prepare.prepare_shards``.
        progress: Whether to show progress on stderr.

    Raises:
        ValueError: ``source`` has no usable audio, cannot be read, or has only one file, so that none can be held out.
    """
    try:
        if isinstance(source, (str, os.PathLike)) and prepare.source_format(source) == "prepared":
            return Shards(source)
        plan = prepare.plan(source, min_seconds=min_seconds, split=split)
    except (OSError, ImportError) as error:
        if "://" not in str(source):
            raise
        # fsspec's own messages are short.
        raise ValueError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
    folder = Path(cache) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    report = prepare.write_shards(plan, folder / plan.key[:24], workers=workers, progress=progress)
    if not report["held_out"]:
        raise ValueError(
            "expected at least two different files, one of them held out, got one: add files, or cut it into several"
        )
    return Shards(folder / plan.key[:24])


def training_shards(options: PretrainOptions) -> Shards:
    """Open the shards of a run: those in ``options.data``, or those made from it or from the default corpus.

    Raises:
        ValueError: The source has no usable audio.
        corpus.CorpusError: The default corpus cannot be fetched.
    """
    cache = Path(options.cache) if options.cache else corpus.default_cache()
    open_source = functools.partial(open_data, cache=cache, min_seconds=options.min_seconds, workers=options.workers)
    if options.data is not None:
        return open_source(options.data)
    fetched = corpus.fetch(cache)
    files, left_out = corpus.default_clips(fetched.cache, fetched.packages)
    shards = open_source(files, split=corpus.held_out)
    shards.report |= {"corpus": left_out, "packages": fetched.packages, "missing_packages": fetched.missing}
    return shards
