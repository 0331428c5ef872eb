"""Pretraining: data in, checkpoints, curves and pictures out. The same command resumes a run that was stopped.

A run has one process, or the processes that torchrun starts with the same program. Every random draw is a function of
the seed and of its purpose: order, crops and masks depend on the epoch and the clip, dropout on the update and the
micro-batch. A run resumed from a checkpoint therefore computes the same as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import step_folder
from ..files import check_out_folder, write_json
from .data import training_shards
from .distributed import init_distributed
from .evaluation import held_out_set
from .lifecycle import OPTIONS, TASK_OPTIONS, run_lock
from .options import FREE_OPTIONS, PretrainOptions
from .trainer import Trainer


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Start the run in ``options.out``, or resume it.

    Under torchrun all its processes call this.

    Returns:
        The content of summary.json; in all processes but the first, an empty dict.

    Raises:
        ValueError: Unusable data or options, or the folder contains a run with other options.
        NonFiniteLoss: The loss became infinite or NaN.
        Interrupted: SIGTERM or Ctrl-C came; the run was saved.
    """
    run = Path(options.out)
    check_out_folder(run)
    with init_distributed(options.device) as dist_ctx, contextlib.ExitStack() as stack:
        if locked_early := dist_ctx.is_first and run.is_dir():
            stack.enter_context(run_lock(run))
        _check_same_run(run, options)
        shards = training_shards(options)
        if len(set(dist_ctx.gather(shards.identity))) > 1:
            raise ValueError(f"expected the same data in all processes, got different data of {shards.source}")
        trainer = Trainer(options, run, shards, dist_ctx)
        held_out = held_out_set(trainer.model, shards, options)
        if dist_ctx.is_first:
            if not locked_early:  # the folder is created only now, so that a failed start leaves none
                stack.enter_context(run_lock(run))
            write_json(run / OPTIONS, dataclasses.asdict(options))
            write_json(run / "data_report.json", shards.report)
            print(_headline(options, trainer, len(held_out.names)), flush=True)
        trainer.train(held_out)
        return trainer.finish(held_out) if dist_ctx.is_first else {}


def _check_same_run(run: Path, options: PretrainOptions) -> None:
    """Refuse to resume a run with options that would change its results.

    Raises:
        ValueError: The folder belongs to another kind of run, its options are damaged, or they differ.
    """
    if (run / TASK_OPTIONS).exists():
        raise ValueError(f"{run} is the folder of a probe or fine-tuning: choose another --out")
    path = run / OPTIONS
    if not path.is_file() or not step_folder.training_checkpoints(run):
        return
    try:
        written = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, expected the options of the run: {error}") from error
    # An option that was added after the run had started had its default then.
    previous = {**dataclasses.asdict(PretrainOptions()), **written}
    differing = [
        f"{name} {previous[name]!r} -> {value!r}"
        for name, value in dataclasses.asdict(options).items()
        if name not in FREE_OPTIONS and previous[name] != value
    ]
    if differing:
        raise ValueError(
            f"{run} contains a run with other options ({'; '.join(differing)}): use the same options to resume it, or "
            "another --out"
        )


def _headline(options: PretrainOptions, trainer: Trainer, num_held_out: int) -> str:
    """The first line that a run prints: model, device, data and folder."""
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    name = options.preset or options.init_from or "patch_tiny"
    report, world_size = trainer.shards.report, trainer.dist_ctx.world_size
    processes = f"{world_size} processes ({options.parallel}), " if world_size > 1 else ""
    data = f"no report counts the clips; {num_held_out} held-out clips evaluated"
    if report:
        split = report["split"].removeprefix("held out: ")
        data = f"{report['hours']:.2f} h in {report['clips']} clips"
        data += f"; not trained on: {split}; {num_held_out} of them evaluated"
    threads = torch.get_num_threads()
    return (
        f"{options.model} {name}: {millions:.1f} M parameters, {trainer.precision} on {processes}{trainer.device} "
        f"({threads} thread{'s' * (threads > 1)}); {data}; run folder {options.out}"
    )
