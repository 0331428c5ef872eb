"""The folder of a training checkpoint, ``step-N``: its files, their checks, and reading them."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.registry import MODELS
from ..models.ssast import SSAST

SHARDS, TRAINER, CONFIG = "shards", "trainer.json", "config.json"

_STEP = re.compile(r"step-(\d{8})")


def training_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name)


class SavedState(NamedTuple):
    """A checkpoint whose files are all there and undamaged."""

    path: Path
    config: MAEASTConfig | SSASTConfig
    state: dict[str, Any]  # as it was given to ``TrainingCheckpoints.save``, through JSON


def load_weights(folder: Path, **init: Any) -> MAEAST | SSAST:
    """The model of a checkpoint, in evaluation mode; needs no process group, however many processes wrote it.

    Args:
        folder: ``step-N``.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: It is damaged.
    """
    config = check_folder(folder).config
    kind = next(kind for kind in MODELS.values() if kind.config_class is type(config))
    sizes = {name: size for name, size in tensor_sizes(folder).items() if name.startswith("model.")}
    # Before anything is allocated: who wrote the configuration may have asked for more than this machine has.
    if max(value for name, value in config.to_dict().items() if name.endswith("layers")) > len(sizes):
        raise ValueError(f"{folder} is of another model: {config} has more layers than the {len(sizes)} tensors there")
    try:
        with torch.device("meta"):
            expected = named_tensors(kind(config))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} is of no possible model: {error}") from error
    compare_tensors(folder, sizes, expected)
    model = kind(config, **init)
    read_tensors(folder, sizes, named_tensors(model), None)
    return model.eval()


def crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def checksum(content: dict[str, Any]) -> int:
    """Of values, not of how they are written."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def cause_of(error: CheckpointException) -> tuple[BaseException, str]:
    """What went wrong in which process; a full disk rather than what followed from it."""
    failures = sorted(error.failures.items(), key=lambda item: not isinstance(item[1][0], OSError))
    rank, (failure, _) = failures[0]
    return failure, f" by process {rank}" if rank else ""


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Weights and the optimizer's state by name: the tensors themselves, so that to read into them is to load."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:  # after state_dict(), which sharded the parameters that a forward left whole
        for name, parameter in model.named_parameters():
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{slot}"] = value
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected an object, got {type(content).__name__}")
    return content


def read_trainer(folder: Path) -> dict[str, Any]:
    content = _read_json(folder / TRAINER)
    try:
        expected, found = content.pop("checksum", None), checksum(content)
    except RecursionError as error:
        raise ValueError(f"{TRAINER}: {error}") from None
    if expected != found:
        raise ValueError(f"{TRAINER} is damaged: expected the checksum {expected!r}, got {found}")
    for name, kind in (("files", dict), ("param_groups", list), ("scaler", dict), ("state", dict)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{TRAINER}: expected {name}, a {kind.__name__}, got {content.get(name)!r:.80}")
    return content


def check_folder(folder: Path, part: int = 0, parts: int = 1) -> SavedState:
    """Reads the small files and the checksums of all, or of every ``parts``-th of them from ``part`` on.

    Raises:
        ValueError: A file is missing, unexpected or damaged.
        OSError: It cannot be read.
    """
    content = read_trainer(folder)
    files = content["files"]
    present = [*(folder / SHARDS).glob("*.safetensors"), *folder.glob(CONFIG)]
    found = {path.relative_to(folder).as_posix() for path in present}
    if found != set(files):
        missing, more = sorted(set(files) - found), sorted(found - set(files))
        raise ValueError(f"expected the files of {TRAINER}: {missing or 'none'} missing, {more or 'none'} unexpected")
    for name in sorted(files)[part::parts]:
        if files[name] != (crc := crc32(folder / name)):
            raise ValueError(f"{name} is damaged: expected the checksum {files[name]!r}, got {crc}")
    fields = _read_json(folder / CONFIG)
    if (model_type := fields.pop("model_type", None)) not in list(MODELS):  # in a list, because it may be anything
        raise ValueError(f"{CONFIG}: expected model_type {' or '.join(map(repr, MODELS))}, got {model_type!r:.80}")
    config = MODELS[model_type].config_class.from_dict(fields)
    return SavedState(folder, config, content["state"])


def tensor_sizes(folder: Path) -> dict[str, torch.Size]:
    """Names and sizes of the tensors of a checkpoint, all of whose values are there.

    Raises:
        ValueError: Some are not, or a file is not as ``_Writer`` makes it.
    """
    try:
        saved = HuggingFaceStorageReader(str(folder / SHARDS)).read_metadata().state_dict_metadata
        for name, tensor in saved.items():
            there, size = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
            if there != size:
                raise ValueError(f"{there} of the {size} values of {name} are there")
    except Exception as error:  # whatever a header with a right checksum and wrong content leads to
        raise ValueError(f"{folder} is damaged: {error!r}") from error
    return {name: tensor.size for name, tensor in saved.items()}


def compare_tensors(folder: Path, sizes: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    """Raises a ValueError where the tensors of a checkpoint are not those that are to be read."""
    missing, more = sorted(tensors.keys() - sizes.keys()), sorted(sizes.keys() - tensors.keys())
    if missing or more:
        raise ValueError(
            f"{folder} is of another model: {missing or 'nothing'} missing, {more or 'nothing'} unexpected"
        )
    for name, tensor in tensors.items():
        if tensor.shape != sizes[name]:
            got = f"expected {name} of {tuple(tensor.shape)}, got {tuple(sizes[name])}"
            raise ValueError(f"{folder} is of another model: {got}")


def read_tensors(folder: Path, sizes: dict[str, torch.Size], tensors: dict[str, Tensor], group: Any) -> None:
    """Reads a checkpoint that ``check_folder`` found whole, and whose tensors have these sizes, into those of a model.

    Raises:
        ValueError: They are not the same.
    """
    compare_tensors(folder, sizes, tensors)
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure, by = cause_of(error)
        raise ValueError(f"{folder} cannot be read{by}: {failure}") from error
