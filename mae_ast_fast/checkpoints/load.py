"""Models out of checkpoints: the paper's own (fairseq), ours, and those of a training run.

A run folder holds ``model.safetensors`` and ``config.json`` of its last state, and ``checkpoints/step-N/`` with what a
run needs to go on (checkpoints/training.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..models.base import PretrainingModel
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from . import fairseq_file
from .step_folder import training_checkpoints


def load_fairseq(path: str | os.PathLike[str], **init: Any) -> MAEAST:
    """Reads a checkpoint of the paper's own code, without fairseq and without executing anything from the file.

    Options, weights, normalisation statistics and, where present, the position table come from the file.

    Args:
        path: The ``.pt`` file.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: No such checkpoint, unsupported options, or weights missing or unexpected, all listed.
    """
    checkpoint = fairseq_file.read_checkpoint(path)
    options = checkpoint.get("cfg") or checkpoint.get("args")
    if not options:
        raise ValueError(f"{path} holds no options: expected cfg or args, found {', '.join(sorted(checkpoint))}")
    return MAEAST.from_fairseq_state_dict(checkpoint["model"], options, **init)


def load_model(source: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """Reads a model from wherever it is: a folder, a run folder, an official file, or a Hub repository.

    Official files are those of MAE-AST, ``.pt``, and of SSAST, ``.pth``.

    Args:
        source: Folder, file or name.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: Nothing of the kind is there, with what was found instead.
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
            from .step_folder import load_weights

            return load_weights(path, **init)
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


def export(source: str | os.PathLike[str], folder: str | os.PathLike[str], **init: Any) -> MAEAST | SSAST:
    """Writes model.safetensors and config.json of whatever ``load_model`` reads, and returns the model.

    A checkpoint of a run is read without a process group, however many processes wrote it.

    Args:
        source: As of ``load_model``.
        folder: Folder, made where it does not exist.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: As ``load_model``.
    """
    model = load_model(source, **init)
    model.save_pretrained(folder)
    return model
