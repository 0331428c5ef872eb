"""Checkpoints of a training run: written in the background by all processes, read by any number of them.

    run/checkpoints/step-00001000/shards/*.safetensors   weights and AdamW's state, one file per process
                                  config.json            configuration of the model
                                  trainer.json           the trainer's state, and a checksum of every file

``torch.distributed.checkpoint`` shards and reshards. Its default storage is unpickled when it is read, so its
safetensors storage is used instead: nothing here can execute what a file contains. A checkpoint is written under a
temporary name, flushed to disk, and renamed when all processes are done. A process killed at any instant therefore
leaves either a complete checkpoint or nothing that is taken for one. All processes must see the same run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from concurrent.futures import Future, wait
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


OPTIMIZER_SLOTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # tensors per parameter of AdamW and of Muon

# Most runs are one process without a process group, where this warning does not apply.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class TrainingCheckpoints:
    """The checkpoints of a run. All processes call every method.

    Args:
        run: Run folder. Nothing is created in it before the first ``save``.
        keep: Number of checkpoints to keep, at least 1. ``save`` removes older ones.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, run: str | os.PathLike[str], keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.run, self.keep = Path(run), keep
        self.rank, self.world_size = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.rank == 0:
            _clean_up(self.run / "checkpoints")
        if dist.is_available() and dist.is_initialized():
            # A group of its own: the background thread communicates in it while training uses the other groups.
            # Created after _clean_up, because creating it waits for the first process.
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.group = group
        self._pending: tuple[Path, Future[Any]] | None = None
        self._latest: SavedState | None = None

    def save(self, step: int, train_step: TrainStep, state: dict[str, Any]) -> None:
        """Copy everything to the host and start writing it in the background. Waits for the previous save first.

        Args:
            step: Number of updates done, which names the checkpoint.
            train_step: Its model, AdamW's state and hyperparameters, and the scale of fp16 are saved, however they are
                sharded.
            state: Other values that the run needs to resume; JSON must be able to hold them. The first process's
                ``state`` is saved.

        Raises:
            ValueError: ``state`` holds a value that JSON cannot hold.
            OSError: The previous save failed.
        """
        self.finish()
        model = train_step.model
        try:
            # The round trip through JSON also copies: the trainer keeps changing its state.
            content = json.loads(json.dumps({**_optimizer_numbers(train_step), "state": state}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a state of plain values, got {error}") from None
        config = {"model_type": model.model_type, **model.config.to_dict()}
        folder = self.run / "checkpoints" / f"step-{step:08d}"
        future = dcp.async_save(
            named_tensors(model, train_step.optimizer),
            storage_writer=_Writer(folder, content, config, self.keep),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        self._pending, self._latest = (folder, future), None

    def finish(self) -> Path | None:
        """Wait until the checkpoint being written has its final name.

        Returns:
            Its folder; None: no checkpoint was being written.

        Raises:
            OSError: The checkpoint could not be written, for example because the disk is full. Earlier checkpoints are
                untouched.
            RuntimeError: Writing failed for another reason, for example because another process is gone.
        """
        if self._pending is None:
            return None
        folder, future = self._pending
        wait([future])  # before _pending is cleared: after a Ctrl-C here the next call waits again
        self._pending = None
        try:
            future.result()
        except CheckpointException as error:
            if self.rank == 0:
                shutil.rmtree(_partial_path(folder), ignore_errors=True)
            if self.group is not None:
                dist.barrier(self.group)  # no process may start that folder again before it is removed
            failure, process = cause_of(error)
            if not isinstance(failure, OSError):
                raise RuntimeError(f"{folder} could not be written{process}: {failure!r}") from error
            message = f"{failure.strerror or failure}: {folder} could not be written{process}"
            raise OSError(failure.errno, message) from error
        return folder

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint, once the one being written is complete; None: the run has none.

        Raises:
            OSError: As ``finish``.
        """
        self.finish()
        return max(training_checkpoints(self.run), default=None)

    def latest_valid(self) -> SavedState | None:
        """The newest undamaged checkpoint; None: the run has no checkpoints. Prints the damaged ones that it skips.

        Raises:
            ValueError: The run has checkpoints, and all are damaged.
        """
        self.finish()
        if self._latest is not None:
            return self._latest
        damaged = []
        newest_first = list(reversed(training_checkpoints(self.run)))
        for path in self._gather(newest_first)[0]:
            saved = problem = None
            try:
                saved = check_folder(path, self.rank, self.world_size)
            except (ValueError, OSError) as error:
                problem = f"{path.name}: {error}".splitlines()[0]
            problems = [text for text in self._gather(problem) if text is not None]
            if not problems:
                self._latest = saved
                break
            damaged.append(problems[0])
        if damaged and self._latest is None:
            raise ValueError(f"no checkpoint of {self.run} can be read: {'; '.join(damaged)}")
        if self.rank == 0:
            for problem in damaged:
                print(f"skipped a damaged checkpoint: {problem}")
        return self._latest

    def load(self, train_step: TrainStep) -> tuple[Path, dict[str, Any]] | None:
        """Read the checkpoint of ``latest_valid`` into the tensors of ``train_step``, however they are sharded.

        Args:
            train_step: Step to fill. Its model has the configuration that ``latest_valid`` reports. Hyperparameters
                that are tensors, such as the learning rate, are filled in place; flags such as ``fused`` stay.

        Returns:
            Folder and state of the checkpoint; None: the run has no checkpoints.

        Raises:
            ValueError: As ``latest_valid``, or the checkpoint holds another model or optimizer. The weights are then
                undefined.
        """
        saved = self.latest_valid()
        if saved is None:
            return None
        model, optimizer = train_step.model, train_step.optimizer
        sizes = tensor_sizes(saved.path)
        _make_optimizer_state(model, optimizer, set(sizes))
        read_tensors(saved.path, sizes, named_tensors(model, optimizer), group=self.group)
        _restore_optimizer_numbers(train_step, read_trainer(saved.path), saved.path)
        return saved.path, saved.state

    def _gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, in the order of ranks."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Writer(HuggingFaceStorageWriter):
    """Writes the shards; ``finish`` then makes them a checkpoint.

    ``finish`` runs in the first process alone, after all processes have written.

    Args:
        folder: Final ``step-N``.
        content: Content of trainer.json without checksums.
        config: Content of config.json.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: Path, content: dict[str, Any], config: dict[str, Any], keep: int) -> None:
        super().__init__(str(_partial_path(folder) / SHARDS), save_distributed=True)
        self.folder, self.content, self.config, self.keep = folder, content, config, keep

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write the tensors as the base class does, but return name and checksum of each file."""
        results = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([(name, crc32(Path(self.path) / name)) for name in names])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write the JSON files and rename the folder; ``results`` holds (name, checksum) per process and file."""
        partial = _partial_path(self.folder)
        checksums = {f"{SHARDS}/{name}": crc for process_results in results for name, crc in process_results}
        (partial / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        content = {"files": {**checksums, CONFIG: crc32(partial / CONFIG)}, **self.content}
        (partial / TRAINER).write_text(json.dumps({"checksum": checksum(content), **content}, indent=2) + "\n")
        for path in (partial / CONFIG, partial / TRAINER, partial / SHARDS, partial):
            _fsync(path)
        if self.folder.exists():  # damaged, or left by a run that stopped before its first update
            os.replace(self.folder, _replaced_path(self.folder))
        os.replace(partial, self.folder)
        _fsync(self.folder.parent)
        shutil.rmtree(_replaced_path(self.folder), ignore_errors=True)
        # Newer checkpoints, which this run could not read, are left for a person to look at.
        complete = [path for path in training_checkpoints(self.folder.parent.parent) if path.name <= self.folder.name]
        for path in complete[: -self.keep]:
            os.replace(path, _partial_path(path))  # under its own name a checkpoint is either complete or absent
            shutil.rmtree(_partial_path(path), ignore_errors=True)


def _partial_path(folder: Path) -> Path:
    """Temporary name of a checkpoint that is being written or removed."""
    return folder.with_name(f".partial-{folder.name}")


def _replaced_path(folder: Path) -> Path:
    """Temporary name of a checkpoint that is being replaced by one of the same step."""
    return folder.with_name(f".replaced-{folder.name}")


def _clean_up(checkpoints: Path) -> None:
    """Remove the partial checkpoints of a killed process and bring back one that it was about to replace."""
    for path in checkpoints.glob(".replaced-*"):
        with contextlib.suppress(OSError):  # The new checkpoint was already moved into place.
            os.replace(path, checkpoints / path.name.removeprefix(".replaced-"))
    for path in [*checkpoints.glob(".partial-*"), *checkpoints.glob(".replaced-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_numbers(train_step: TrainStep) -> dict[str, Any]:
    """Hyperparameters of the optimizer's parameter groups and the state of fp16's scaler, as plain numbers."""
    scaler = {} if train_step.scaler is None else train_step.scaler.state_dict()
    return {"param_groups": [_group_numbers(group) for group in train_step.optimizer.param_groups], "scaler": scaler}


def _group_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, without its parameters and flags."""
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
    return {name: value for name, value in plain.items() if _is_number(value) or _is_numbers(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_number(item) for item in value)


def _make_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Give the optimizer the state tensors that a checkpoint holds, made as it makes them in its first update.

    Args:
        model: Its parameters are those of ``optimizer``.
        optimizer: AdamW, or Muon with AdamW. Missing tensors are added as zeros. Those that the checkpoint lacks are
            removed.
        names: Names of the checkpoint's tensors.
    """
    model.state_dict()  # shards the parameters that the last forward left whole, as in named_tensors
    for name, parameter in model.named_parameters():
        slots = {slot for slot in OPTIMIZER_SLOTS if f"optimizer.{name}.{slot}" in names}
        state = optimizer.state[parameter]
        for slot in set(state) - slots:
            del state[slot]
        for slot in sorted(slots - set(state)):
            if slot == "step":
                on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
                state[slot] = torch.zeros((), device=parameter.device if on_device else "cpu")
            else:
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _restore_optimizer_numbers(train_step: TrainStep, saved: dict[str, Any], folder: Path) -> None:
    """Put the saved hyperparameters back, in place where the optimizer holds tensors.

    Raises:
        ValueError: The checkpoint in ``folder`` is of an optimizer with other hyperparameters.
    """
    current = _optimizer_numbers(train_step)
    if train_step.scaler is None or not saved["scaler"]:  # this run, or the one that saved, is not in fp16
        current["scaler"] = saved["scaler"] = {}
    if _structure([*saved["param_groups"], saved["scaler"]]) != _structure(
        [*current["param_groups"], current["scaler"]]
    ):
        raise ValueError(f"{folder} holds another optimizer: expected {current}, got {saved['param_groups']}")
    for group, numbers in zip(train_step.optimizer.param_groups, saved["param_groups"], strict=True):
        for name, value in numbers.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) else value
    if train_step.scaler is not None and saved["scaler"]:
        train_step.scaler.load_state_dict(saved["scaler"])
    train_step.restore()


def _structure(groups: list[Any]) -> list[Any]:
    """Per group: name -> length of a list of numbers, -1 for a number, 0 for anything else; None: no dict."""
    return [
        {name: len(value) if _is_numbers(value) else -_is_number(value) for name, value in group.items()}
        if isinstance(group, dict)
        else None
        for group in groups
    ]
