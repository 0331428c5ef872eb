"""The folder ``step-N`` of a training checkpoint: its files, how they are checked, and how they are read.

``import mae_ast_fast`` imports this file. ``torch.distributed.checkpoint`` takes more than a second to import, so the
functions that read tensors import it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..files import read_json
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.registry import MODELS
from ..models.saved import CONFIG, build_on_meta, read_config
from ..models.ssast import SSAST

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

SHARDS, TRAINER = "shards", "trainer.json"

_STEP = re.compile(r"step-(\d{8})")


def training_checkpoints(run: Path) -> list[Path]:
    """Folders of the complete checkpoints of the run folder ``run``, oldest first."""
    folder = run / "checkpoints"
    paths = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: path.name)


class SavedState(NamedTuple):
    """A checkpoint whose files are complete and undamaged."""

    path: Path
    config: MAEASTConfig | SSASTConfig
    state: dict[str, Any]  # the ``state`` of ``TrainingCheckpoints.save``, after a round trip through JSON


def load_weights(folder: Path, **init: Any) -> MAEAST | SSAST:
    """Read the model of a checkpoint, in evaluation mode.

    Needs no process group, however many processes wrote the checkpoint.

    Args:
        folder: ``step-N``.
        **init: ``impl``, ``attention`` and ``recompute`` of the model.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    config = check_folder(folder).config
    model_class: Callable[..., MAEAST | SSAST] = next(
        cls for cls in MODELS.values() if cls.config_class is type(config)
    )
    sizes = {name: size for name, size in tensor_sizes(folder).items() if name.startswith("model.")}
    try:
        expected = named_tensors(build_on_meta(functools.partial(model_class, config), config, len(sizes)))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} holds no possible model: {error}") from error
    compare_tensors(folder, sizes, expected)
    model = model_class(config, **init)
    read_tensors(folder, sizes, named_tensors(model), group=None)
    return model.eval()


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes, as an unsigned 32-bit integer."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def checksum(content: dict[str, Any]) -> int:
    """CRC-32 of the values of ``content``, whatever the order of keys and the layout of the file."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def cause_of(error: CheckpointException) -> tuple[BaseException, str]:
    """The exception that made a checkpoint fail, and `` by process N`` for the message (empty for process 0).

    An OSError such as a full disk wins over the failures that followed from it.
    """
    failures = sorted(error.failures.items(), key=lambda item: not isinstance(item[1][0], OSError))
    rank, (failure, _) = failures[0]
    return failure, f" by process {rank}" if rank else ""


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of model and optimizer by name.

    These are the tensors themselves, not copies: reading a checkpoint into them loads it.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    # After state_dict(): it shards the parameters that the last forward left whole.
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{slot}"] = value
    return tensors


def read_trainer(folder: Path) -> dict[str, Any]:
    """Content of ``trainer.json``: ``files``, ``param_groups``, ``scaler`` and ``state``.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        content = read_json(folder / TRAINER)
        expected, actual = content.pop("checksum", None), checksum(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{TRAINER}: {error}") from None
    if expected != actual:
        raise ValueError(f"{TRAINER} is damaged: expected the checksum {expected!r}, got {actual}")
    for name, value_type in (("files", dict), ("param_groups", list), ("scaler", dict), ("state", dict)):
        if not isinstance(content.get(name), value_type):
            raise ValueError(f"{TRAINER}: expected {name}, a {value_type.__name__}, got {content.get(name)!r:.80}")
    return content


def check_folder(folder: Path, rank: int = 0, world_size: int = 1) -> SavedState:
    """Read the JSON files of a checkpoint and compare the checksums of its files.

    Args:
        folder: ``step-N``.
        rank: Index of the calling process, in [0, ``world_size``).
        world_size: Number of processes that share the checksums: each process computes those of every
            ``world_size``-th file.

    Raises:
        ValueError: A file is missing, unexpected or damaged.
        OSError: A file cannot be read.
    """
    content = read_trainer(folder)
    checksums = content["files"]
    paths = [*(folder / SHARDS).glob("*.safetensors"), *folder.glob(CONFIG)]
    present = {path.relative_to(folder).as_posix() for path in paths}
    if present != set(checksums):
        missing, unexpected = sorted(set(checksums) - present), sorted(present - set(checksums))
        raise ValueError(
            f"expected the files that {TRAINER} lists: {missing or 'none'} missing, {unexpected or 'none'} unexpected"
        )
    for name in sorted(checksums)[rank::world_size]:
        if checksums[name] != (crc := crc32(folder / name)):
            raise ValueError(f"{name} is damaged: expected the checksum {checksums[name]!r}, got {crc}")
    _, config = read_config(folder / CONFIG, MODELS)
    return SavedState(folder, config, content["state"])


def tensor_sizes(folder: Path) -> dict[str, torch.Size]:
    """Name -> size of every tensor of a checkpoint, after a check that the shards hold all values of each.

    Raises:
        ValueError: Values are missing, or a file is not in the format that ``_Writer`` writes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    sizes: dict[str, torch.Size] = {}
    try:
        metadata = HuggingFaceStorageReader(str(folder / SHARDS)).read_metadata().state_dict_metadata
        for name, tensor in metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            num_stored, num_values = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
            if num_stored != num_values:
                raise ValueError(f"expected the {num_values} values of {name}, got {num_stored}")
            sizes[name] = tensor.size
    except Exception as error:  # a header with a right checksum and wrong content leads to any exception
        raise ValueError(f"{folder} is damaged: {error!r}") from error
    return sizes


def compare_tensors(folder: Path, sizes: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    """Check that a checkpoint holds the tensors to read, with their shapes.

    Args:
        folder: ``step-N``, for the message.
        sizes: Name -> size of the checkpoint's tensors.
        tensors: Name -> tensor to read into.

    Raises:
        ValueError: A tensor is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(tensors.keys() - sizes.keys()), sorted(sizes.keys() - tensors.keys())
    if missing or unexpected:
        raise ValueError(
            f"{folder} holds another model: {missing or 'nothing'} missing, {unexpected or 'nothing'} unexpected"
        )
    for name, tensor in tensors.items():
        if tensor.shape != sizes[name]:
            shapes = f"expected {name} of {tuple(tensor.shape)}, got {tuple(sizes[name])}"
            raise ValueError(f"{folder} holds another model: {shapes}")


def read_tensors(
    folder: Path, sizes: dict[str, torch.Size], tensors: dict[str, Tensor], *, group: dist.ProcessGroup | None
) -> None:
    """Read a checkpoint, checked by ``check_folder``, into the tensors of a model.

    Args:
        folder: ``step-N``.
        sizes: Name -> size of the checkpoint's tensors, from ``tensor_sizes``.
        tensors: Name -> tensor to fill in place, from ``named_tensors``.
        group: Processes that read together; None: this process alone.

    Raises:
        ValueError: The tensors differ in name or shape, or a file cannot be read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    compare_tensors(folder, sizes, tensors)
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure, process = cause_of(error)
        raise ValueError(f"{folder} cannot be read{process}: {failure}") from error
