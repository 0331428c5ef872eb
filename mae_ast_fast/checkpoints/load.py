"""Models from checkpoints: the paper's own (fairseq), ours, and those of a training run.

A run folder holds ``model.safetensors`` and ``config.json`` of its last state, and ``checkpoints/step-N/`` with the
state that resumes the run (checkpoints/training.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from ..models.base import PretrainingModel
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from . import fairseq_file
from .step_folder import load_weights, training_checkpoints


def load_fairseq(path: str | os.PathLike[str], **init: Any) -> MAEAST:
    """Read a checkpoint of the paper's own code, without fairseq and without executing anything from the file.

    Options, weights, normalisation statistics and, where present, the position table come from the file.

    Args:
        path: ``.pt`` file.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Returns:
        The model in fp32 on the CPU, in evaluation mode.

    Raises:
        ValueError: The file is no such checkpoint, an option is unsupported, or weights are missing or unexpected. The
            message lists all of them.
        OSError: The file cannot be opened.
    """
    checkpoint = fairseq_file.read_checkpoint(path)
    options = checkpoint.get("cfg") or checkpoint.get("args")
    if not options:
        raise ValueError(f"{path} holds no options: expected cfg or args, found {', '.join(sorted(checkpoint))}")
    return MAEAST.from_fairseq_state_dict(checkpoint["model"], options, **init)


def load_model(source: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """Read a model from a folder, a run folder, an official file or a Hub repository.

    Args:
        source: Folder with model.safetensors and config.json, run folder, ``step-N`` of a run, official file of MAE-AST
            (``.pt``) or SSAST (``.pth``), or ``owner/name`` on the Hub. A run folder whose last state is not written
            yet gives its newest checkpoint.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: ``source`` is none of these, or a file is damaged. The message says what was found instead.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ValueError(f"expected the folder of {path.name} and its config.json, got the file {source}")
        return SSAST.from_official(path, **init) if path.suffix == ".pth" else load_fairseq(path, **init)
    if path.is_dir():
        if not (path / "config.json").is_file() and (steps := training_checkpoints(path)):
            path = steps[-1]
        if (path / "trainer.json").is_file():
            return load_weights(path, **init)
        return _from_pretrained(path, **init)
    expected = "a folder with config.json and model.safetensors, or an official file (.pt of MAE-AST, .pth of SSAST)"
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) is not None
    if not is_hub_name or path.parent.is_dir():
        raise ValueError(f"no checkpoint at {source}: expected {expected}")
    try:
        return _from_pretrained(str(source), **init)
    except OSError as error:
        raise ValueError(f"no checkpoint at {source}: neither {expected}, nor on the Hub ({error})") from None


def _from_pretrained(source: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """``PretrainingModel.from_pretrained``, which returns the model that config.json names."""
    return cast("MAEAST | SSAST", PretrainingModel.from_pretrained(source, **init))


def load_mae_ast(source: str | os.PathLike[str], purpose: str) -> MAEAST:
    """Read a model as ``load_model`` does, and refuse SSAST.

    Args:
        source: Folder, file or name, as ``load_model`` takes it.
        purpose: Command or library that needs a MAE-AST, for the message.

    Raises:
        ValueError: As ``load_model``, or the model is an SSAST.
    """
    model = load_model(source)
    if not isinstance(model, MAEAST):
        raise ValueError(f"{purpose} needs a MAE-AST checkpoint, got {model.model_type}: {source}")
    return model


def export(source: str | os.PathLike[str], folder: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """Read a model as ``load_model`` does, write its model.safetensors and config.json, and return it.

    A checkpoint of a run is read without a process group, however many processes wrote it.

    Args:
        source: Folder, file or name, as ``load_model`` takes it.
        folder: Folder to write to, created if it does not exist.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: As ``load_model``.
    """
    model = load_model(source, **init)
    model.save_pretrained(folder)
    return model
