"""Checkpoints: the paper's own (fairseq) in, ours in, and those of a training run, written so that none is half there.

A run folder holds ``model.safetensors`` and ``config.json`` of its last state, and ``checkpoints/step-N/`` with the
same two files beside ``trainer.pt``, which carries what a run needs to continue.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from . import fairseq
from .base import PretrainingModel
from .model import MAEAST
from .ssast import SSAST

MODELS: dict[str, type[MAEAST] | type[SSAST]] = {kind.model_type: kind for kind in (MAEAST, SSAST)}

_STEP = re.compile(r"step-(\d{8})")


def load_fairseq(path: str | os.PathLike[str], **init: Any) -> MAEAST:
    """Reads a checkpoint of the paper's own code, without fairseq and without executing anything from the file.

    Options, weights, normalisation statistics and, where present, the position table come from the file.

    Args:
        path: The ``.pt`` file.
        **init: ``impl`` and ``attention`` of the model.

    Raises:
        ValueError: No such checkpoint, unsupported options, or weights missing or unexpected, all listed.
    """
    checkpoint = fairseq.read_checkpoint(path)
    options = checkpoint.get("cfg") or checkpoint.get("args")
    if not options:
        raise ValueError(f"{path} holds no options: expected cfg or args, found {', '.join(sorted(checkpoint))}")
    return MAEAST.from_fairseq_state_dict(checkpoint["model"], options, **init)


def load_model(source: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """Reads a model from wherever it is: a folder, a run folder, an official file, or a Hub repository.

    Official files are those of MAE-AST, ``.pt``, and of SSAST, ``.pth``.

    Raises:
        ValueError: Nothing of the kind is there, with what was found instead.
    """
    path = Path(source)
    if path.is_file():
        return SSAST.from_official(path, **init) if path.suffix == ".pth" else load_fairseq(path, **init)
    if path.is_dir():
        if not (path / "config.json").is_file() and (steps := training_checkpoints(path)):
            path = steps[-1]
        return PretrainingModel.from_pretrained(path, **init)
    expected = "a folder with config.json and model.safetensors, or an official file (.pt of MAE-AST, .pth of SSAST)"
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) is not None
    if not is_hub_name or path.parent.is_dir():
        raise ValueError(f"no checkpoint at {source}: expected {expected}")
    try:
        return PretrainingModel.from_pretrained(str(source), **init)
    except OSError as error:
        raise ValueError(f"no checkpoint at {source}: neither {expected}, nor on the Hub ({error})") from None


def load_mae_ast(source: str | os.PathLike[str], purpose: str) -> MAEAST:
    """As ``load_model``, for what SSAST cannot be used for.

    Args:
        source: As there.
        purpose: What needs a MAE-AST, for the message.

    Raises:
        ValueError: As there, or it is an SSAST.
    """
    model = load_model(source)
    if not isinstance(model, MAEAST):
        raise ValueError(f"{purpose} needs a MAE-AST checkpoint, got {model.model_type}: {source}")
    return model


def training_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name)


def save_training(run: Path, step: int, model: MAEAST | SSAST, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the last ``keep``.

    It is written under another name, flushed to the disk and renamed, so that a process killed at any instant leaves
    either the whole of it or nothing that is taken for it.

    Args:
        run: Run folder.
        step: Updates done.
        model: Saved as model.safetensors and config.json.
        state: What else the run needs: tensors and plain values only.
        keep: Checkpoints to keep, at least 1.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial, final = folder / f".partial-{step:08d}", folder / f"step-{step:08d}"
    partial.mkdir()
    model.save_pretrained(partial)
    torch.save(state, partial / "trainer.pt")
    for path in partial.iterdir():
        _flush(path)
    if final.exists():  # a run that was killed after saving and before telling: the same step again
        _discard(final)
    os.replace(partial, final)
    _flush(folder)
    for old in training_checkpoints(run)[:-keep]:
        _discard(old)
    return final


def load_training(run: Path) -> tuple[Path, MAEAST | SSAST, dict[str, Any], list[str]] | None:
    """The newest checkpoint of a run that can be read: its path, model and state, and what was wrong with newer ones.

    None where the run has no checkpoint.

    Raises:
        ValueError: There are checkpoints, and none can be read.
    """
    found = training_checkpoints(run)
    damaged: list[str] = []
    for path in reversed(found):
        try:
            state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
            return path, PretrainingModel.from_pretrained(path), state, damaged
        except (ValueError, OSError, RuntimeError, EOFError, KeyError) as error:
            damaged.append(f"{path.name}: {error}".splitlines()[0])
    if damaged:
        raise ValueError(f"no checkpoint of {run} can be read: {'; '.join(damaged)}")
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Removes a checkpoint; under its own name it is either whole or gone."""
    doomed = path.with_name(f".partial-old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
