"""Checkpoints of a training run: written in the background by all processes, read by any number of them.

    run/checkpoints/step-00001000/shards/*.safetensors   weights and AdamW's state, a file of each process
                                  config.json            the model's
                                  trainer.json           what the trainer gave, and a checksum of every file

``torch.distributed.checkpoint`` shards and reshards. Its safetensors storage is used, because reading its usual one
unpickles: nothing here can execute what a file brings. A checkpoint is written under another name, flushed to the disk
and renamed when all processes are done, so that a process killed at any instant leaves either the whole of it or
nothing that is taken for it. All processes must see the same run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata

from .step_folder import (
    CONFIG,
    SHARDS,
    TRAINER,
    SavedState,
    cause_of,
    check_folder,
    checksum,
    crc32,
    named_tensors,
    read_tensors,
    read_trainer,
    tensor_sizes,
    training_checkpoints,
)

if TYPE_CHECKING:
    from ..training.step import TrainStep


# One process without a group is what most runs are.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class TrainingCheckpoints:
    """The checkpoints of a run. Every method is called by all processes.

    Args:
        run: Run folder; nothing is made in it before the first ``save``.
        keep: Checkpoints to keep, at least 1.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, run: str | os.PathLike[str], keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.run, self.keep = Path(run), keep
        self.rank, self.world, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.rank == 0:
            _tidy(self.run / "checkpoints")
        if dist.is_available() and dist.is_initialized():
            # Of its own: the background talks in it while the training talks in the others. After _tidy: it waits.
            self.group = dist.new_group(backend="gloo")
        self._writing: tuple[Path, Any] | None = None
        self._found: SavedState | None = None

    def save(self, step: int, update: TrainStep, state: dict[str, Any]) -> None:
        """Copies everything to the host, and lets it be written in the background; waits for the save before.

        Args:
            step: Updates done.
            update: Its model, AdamW's state and numbers, and the scale of fp16 are saved, however they are sharded.
            state: What else the run needs: plain values that JSON can hold. That of the first process is kept.

        Raises:
            ValueError: ``state`` holds something else.
            OSError: The save before failed.
        """
        self.finish()
        model = update.model
        try:
            content = json.loads(json.dumps({**_plain(update), "state": state}))  # a copy, too: the trainer goes on
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a state of plain values, got {error}") from None
        config = {"model_type": model.model_type, **model.config.to_dict()}
        final = self.run / "checkpoints" / f"step-{step:08d}"
        writing = dcp.async_save(
            named_tensors(model, update.optimizer),
            storage_writer=_Writer(final, content, config, self.keep),
            process_group=self.group,
            no_dist=self.group is None,
        )
        self._writing, self._found = (final, writing), None

    def finish(self) -> Path | None:
        """Waits until what is being written is on the disk under its name, and returns its path; None: nothing was.

        Raises:
            OSError: It could not be written, for example because the disk is full; those before it are untouched.
            RuntimeError: Another process is gone.
        """
        if self._writing is None:
            return None
        final, writing = self._writing
        wait([writing])  # if Ctrl-C ends this, somebody can wait again
        self._writing = None
        try:
            writing.result()
        except CheckpointException as error:
            if self.rank == 0:
                shutil.rmtree(_partial(final), ignore_errors=True)
            if self.group is not None:
                dist.barrier(self.group)  # nobody begins that folder again before it is gone
            failure, by = cause_of(error)
            if not isinstance(failure, OSError):
                raise RuntimeError(f"{final} could not be written{by}: {failure!r}") from error
            message = f"{failure.strerror or failure}: {final} could not be written{by}"
            raise OSError(failure.errno, message) from error
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint, after what is being written is; None: there is none.

        Raises:
            OSError: As ``finish``.
        """
        self.finish()
        return max(training_checkpoints(self.run), default=None)

    def latest_valid(self) -> SavedState | None:
        """The newest checkpoint that is whole, None where the run has none; damaged ones are named on stdout.

        Raises:
            ValueError: There are checkpoints, and none is whole.
        """
        self.finish()
        if self._found is not None:
            return self._found
        damaged = []
        for path in self._all_know(list(reversed(training_checkpoints(self.run))))[0]:
            found = problem = None
            try:
                found = check_folder(path, self.rank, self.world)
            except (ValueError, OSError) as error:
                problem = f"{path.name}: {error}".splitlines()[0]
            problems = [text for text in self._all_know(problem) if text is not None]
            if not problems:
                self._found = found
                break
            damaged.append(problems[0])
        if damaged and self._found is None:
            raise ValueError(f"no checkpoint of {self.run} can be read: {'; '.join(damaged)}")
        if self.rank == 0:
            for problem in damaged:
                print(f"skipped a damaged checkpoint: {problem}")
        return self._found

    def load(self, update: TrainStep) -> tuple[Path, dict[str, Any]] | None:
        """Reads the checkpoint of ``latest_valid`` into the tensors of ``update``, however they are sharded.

        Args:
            update: Step to fill. Its model has the configuration that ``latest_valid`` reports. Tensor numbers,
                such as the rate, are filled too; flags such as ``fused`` stay.

        Returns:
            Path and state, as of ``latest_valid``; None where there is no checkpoint.

        Raises:
            ValueError: As ``latest_valid``, or it is of another model or optimizer; the weights are then undefined.
        """
        found = self.latest_valid()
        if found is None:
            return None
        sizes = tensor_sizes(found.path)
        _make_state(update.model, update.optimizer, set(sizes))
        read_tensors(found.path, sizes, named_tensors(update.model, update.optimizer), self.group)
        _set_plain(update, read_trainer(found.path), found.path)
        return found.path, found.state

    def _all_know(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.group is None:
            return [mine]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


class _Writer(HuggingFaceStorageWriter):
    """Writes the shards; ``finish``, in the first process alone and after all have written, makes them a checkpoint."""

    def __init__(self, final: Path, content: dict[str, Any], config: dict[str, Any], keep: int) -> None:
        super().__init__(str(_partial(final) / SHARDS), save_distributed=True)
        self.final, self.content, self.config, self.keep = final, content, config, keep

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As of the base, but results in the name and checksum of each file."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([(name, crc32(Path(self.path) / name)) for name in names])
        return future

    def finish(self, metadata: Metadata, results: list[list[tuple[str, int]]]) -> None:
        partial = _partial(self.final)
        files = {f"{SHARDS}/{name}": crc for of_process in results for name, crc in of_process}
        (partial / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        content = {"files": {**files, CONFIG: crc32(partial / CONFIG)}, **self.content}
        (partial / TRAINER).write_text(json.dumps({"checksum": checksum(content), **content}, indent=2) + "\n")
        for path in (partial / CONFIG, partial / TRAINER, partial / SHARDS, partial):
            _flush(path)
        if self.final.exists():  # damaged, or a run that stopped before its first update
            os.replace(self.final, _replaced(self.final))
        os.replace(partial, self.final)
        _flush(self.final.parent)
        shutil.rmtree(_replaced(self.final), ignore_errors=True)
        # Newer ones, that the run could not read, are left for a person to look at.
        done = [path for path in training_checkpoints(self.final.parent.parent) if path.name <= self.final.name]
        for old in done[: -self.keep]:
            os.replace(old, _partial(old))  # under its own name it is either whole or gone
            shutil.rmtree(_partial(old), ignore_errors=True)


def _partial(final: Path) -> Path:
    return final.with_name(f".partial-{final.name}")


def _replaced(final: Path) -> Path:
    return final.with_name(f".replaced-{final.name}")


def _tidy(folder: Path) -> None:
    """Removes what a killed process left, and brings back what it was about to replace."""
    for path in folder.glob(".replaced-*"):
        with contextlib.suppress(OSError):  # its successor is there
            os.replace(path, folder / path.name.removeprefix(".replaced-"))
    for path in [*folder.glob(".partial-*"), *folder.glob(".replaced-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(update: TrainStep) -> dict[str, Any]:
    """The numbers of AdamW and of fp16's scaler."""
    scaler = {} if update.scaler is None else update.scaler.state_dict()
    return {"param_groups": [_numbers(group) for group in update.optimizer.param_groups], "scaler": scaler}


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, without its parameters and flags."""
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
    return {name: value for name, value in plain.items() if _is_number(value) or _is_numbers(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_number(item) for item in value)


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Gives AdamW the state that was saved, as it makes it itself in its first step."""
    model.state_dict()  # see named_tensors
    for name, parameter in model.named_parameters():
        slots = {slot for slot in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{slot}" in names}
        state = optimizer.state[parameter]
        for slot in set(state) - slots:
            del state[slot]
        for slot in sorted(slots - set(state)):
            if slot == "step":
                fast = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
                state[slot] = torch.zeros((), device=parameter.device if fast else "cpu")
            else:
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _set_plain(update: TrainStep, saved: dict[str, Any], folder: Path) -> None:
    """Puts saved numbers back; into tensors, where the optimizer has tensors."""
    own = _plain(update)
    if update.scaler is None or not saved["scaler"]:  # this run, or the one before, is not in fp16
        own["scaler"] = saved["scaler"] = {}
    groups = own["param_groups"]
    if _form([*saved["param_groups"], saved["scaler"]]) != _form([*groups, own["scaler"]]):
        raise ValueError(f"{folder} is of another optimizer: expected {own}, got {saved['param_groups']}")
    for group, numbers in zip(update.optimizer.param_groups, saved["param_groups"], strict=True):
        for name, value in numbers.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) else value
    if saved["scaler"]:
        update.scaler.load_state_dict(saved["scaler"])
    update.restore()


def _form(groups: list[Any]) -> list[Any]:
    """Names of the numbers, and how many each has."""
    return [
        {name: len(value) if _is_numbers(value) else -_is_number(value) for name, value in group.items()}
        if isinstance(group, dict)
        else None
        for group in groups
    ]
