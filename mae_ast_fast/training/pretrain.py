"""The pretraining loop: data in, checkpoints, curves and pictures out; killed and started again, it goes on.

One process, or the processes that torchrun starts: the same program. Every random draw is a function of the seed and of
what is drawn for (epoch and clip for order, windows and masks; update and place in it for dropout), so a run continued
from a checkpoint computes what an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import step_folder
from ..files import write_json
from .data import training_shards
from .distributed import world
from .evaluation import held_out_set
from .lifecycle import OPTIONS, TASK_OPTIONS, run_lock
from .options import FREE_OPTIONS, PretrainOptions
from .trainer import Trainer


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Runs pretraining, or goes on with the run in ``options.out``; returns what summary.json holds.

    Under torchrun all its processes call this, and all but the first return an empty dict.

    Raises:
        ValueError: Unusable data or options, or the folder holds a run with other options.
        NonFiniteLoss: The loss became infinite or NaN.
        Stopped: SIGTERM or Ctrl-C arrived; the run was saved.
    """
    run = Path(options.out)
    with world(options.device) as peers, contextlib.ExitStack() as stack:
        if known := peers.first and run.is_dir():
            stack.enter_context(run_lock(run))
        _check_same_run(run, options)
        shards = training_shards(options)
        if len(set(peers.gather(shards.identity))) > 1:
            raise ValueError(f"expected the same data in all processes, got others in some of them: {shards.source}")
        trainer = Trainer(options, run, shards, peers)
        held_out = held_out_set(trainer.model, shards, options)
        if peers.first:
            if not known:  # made only now: a start that fails leaves nothing
                stack.enter_context(run_lock(run))
            write_json(run / OPTIONS, dataclasses.asdict(options))
            write_json(run / "data_report.json", shards.report)
            print(_headline(options, trainer, len(held_out.names)), flush=True)
        trainer.train(held_out)
        return trainer.finish(held_out) if peers.first else {}


def _check_same_run(run: Path, options: PretrainOptions) -> None:
    """Refuses to go on with a run under options that would make it another one."""
    if (run / TASK_OPTIONS).exists():
        raise ValueError(f"{run} is the folder of a probe or fine-tuning: choose another --out")
    path = run / OPTIONS
    if not path.is_file() or not step_folder.training_checkpoints(run):
        return
    try:
        written = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, expected the options of the run: {error}") from error
    # An option that is younger than the run had its default then.
    before = {**dataclasses.asdict(PretrainOptions()), **written}
    differing = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in dataclasses.asdict(options).items()
        if name not in FREE_OPTIONS and before[name] != value
    ]
    if differing:
        raise ValueError(
            f"{run} holds a run with other options ({'; '.join(differing)}): use the same options to go on, or another "
            "--out"
        )


def _headline(options: PretrainOptions, trainer: Trainer, held_out: int) -> str:
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    name = options.preset or options.init_from or "patch_tiny"
    report, peers = trainer.shards.report, trainer.peers
    together = f"{peers.size} processes ({options.parallel}), " if peers.size > 1 else ""
    size = f"{report['hours']:.2f} h in {report['clips']} clips" if report else "clips that no report counts"
    threads = torch.get_num_threads()
    return (
        f"{options.model} {name}: {millions:.1f} M parameters, {trainer.precision} on {together}{trainer.device} "
        f"({threads} thread{'s' * (threads > 1)}); {size}, {held_out} to evaluate on"
        f"{' (' + report['split'] + ')' if report else ''}; run folder {options.out}"
    )
