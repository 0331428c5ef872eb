"""Saved models: the files model.safetensors and config.json, in a folder or a Hub repository."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import atomic_write, read_json, write_json
from .config import MAEASTConfig, SSASTConfig

if TYPE_CHECKING:
    from .base import PretrainingModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"

Module = TypeVar("Module", bound=nn.Module)
Model = TypeVar("Model", bound="PretrainingModel")


def write_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write model.safetensors and config.json, each atomically; the folder is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(folder / WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def locate(source: str, name: str, **hub: Any) -> Path:
    """Path of a file of a saved model, which is downloaded if the model is on the Hub.

    Args:
        source: Folder, or name of a Hub repository.
        name: Name of the file.
        **hub: Options of ``huggingface_hub.hf_hub_download``, unused for a folder.

    Raises:
        ValueError: The folder lacks the file, or ``source`` is neither a folder nor the name of a repository.
    """
    if os.path.isdir(source):
        path = Path(source) / name
        if not path.is_file():
            raise ValueError(
                f"{source} is not a checkpoint folder: expected {name} in it, found {sorted(os.listdir(source))}"
            )
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source} is neither a folder nor the name of a Hub repository (owner/name)")
    return Path(hf_hub_download(source, name, **hub))


def read_config(path: Path, classes: Mapping[str, type[Model]]) -> tuple[type[Model], MAEASTConfig | SSASTConfig]:
    """Read config.json: the model's class and configuration.

    Args:
        path: The file.
        classes: Accepted classes by the ``model_type`` in the file.

    Raises:
        ValueError: The file is damaged, or of another model.
    """
    try:
        return parse_config(read_json(path), classes)
    except ValueError as error:
        names = " or ".join(model_class.__name__ for model_class in classes.values())
        raise ValueError(f"{path} is not a configuration of {names}: {error}") from None


def parse_config(
    fields: dict[str, Any], classes: Mapping[str, type[Model]]
) -> tuple[type[Model], MAEASTConfig | SSASTConfig]:
    """The model's class and configuration, from ``model_type`` and the configuration's fields.

    Raises:
        ValueError: The type is none of ``classes``, or a field is unknown or out of range.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type not in list(classes):  # in a list: a damaged value may be unhashable
        is_classifier = model_type == "audio_classifier"
        hint = " (use it with predict or with export --format transformers)" if is_classifier else ""
        raise ValueError(f"expected model_type {' or '.join(map(repr, classes))}, got {model_type!r:.80}{hint}")
    model_class = classes[model_type]
    return model_class, model_class.config_class.from_dict(fields)


def build_on_meta(build: Callable[[], Module], config: MAEASTConfig | SSASTConfig, num_tensors: int) -> Module:
    """Build a module on the meta device: shapes without memory. A damaged configuration may ask for any size.

    Args:
        build: Makes the module.
        config: Configuration of the model in it.
        num_tensors: Number of tensors in the file of its weights.

    Raises:
        ValueError: The configuration has more layers than the file has tensors.
        RuntimeError, TypeError: A size is too large for a tensor.
    """
    if max(value for name, value in config.to_dict().items() if name.endswith("layers")) > num_tensors:
        raise ValueError(f"{config} has more layers than the file has tensors ({num_tensors})")
    with torch.device("meta"):
        return build()


def read_model(path: Path, config: MAEASTConfig | SSASTConfig, build: Callable[..., Module], **init: Any) -> Module:
    """Build a module and load its weights, after a check of their shapes.

    Args:
        path: model.safetensors.
        config: Configuration of the model in the module.
        build: Makes the module.
        **init: Arguments of ``build``.

    Returns:
        The module, in evaluation mode.

    Raises:
        ValueError: The file is damaged, or weights and configuration do not fit. ``build``'s errors, too.
    """
    try:
        weights = load_file(path)
        expected = build_on_meta(build, config, len(weights)).state_dict()
        shapes = {name: (expected[name].shape, weights[name].shape) for name in expected if name in weights}
        if differing := [
            f"{name}: expected {tuple(shape)}, got {tuple(stored)}"
            for name, (shape, stored) in shapes.items()
            if stored != shape
        ]:
            raise ValueError("; ".join(differing))
    except Exception as error:  # safetensors' own exception class is not public
        raise ValueError(f"{path} is damaged or its weights do not fit config.json: {error}") from None
    module = build(**init)
    try:
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: weights do not fit config.json: {error}") from None
    return module.eval()
