"""PyTorch checkpoint files, read without executing anything from them.

A torch file is a zip of one pickle and raw tensor data. A pickle is a program: loading it calls whatever it names. The
pickle is therefore neither loaded nor restricted here, but parsed. ``_read_pickle`` walks its opcodes and builds dicts,
lists and numbers. Every class and every call becomes an inert ``_Object`` with the dotted name and the arguments.
Nothing named in the file is imported or called. torch's own loader is not used: it also runs TorchScript archives and
reads a legacy format. Only weights and options are read from disk, not the optimizer state, which is twice the size of
the weights.
"""

from __future__ import annotations

import math
import os
import pickletools
import reprlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Opcodes whose operand is the value.
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_MAX_NESTING = 64  # levels of the options; a real file has about ten


class _Object:
    """Inert description of a class, a function or the result of calling one, as a pickle names it.

    Attributes:
        name: Dotted name of the class or function.
        args: Arguments of the call; None: the class or function itself.
        state: Argument that unpickling would pass to ``__setstate__``.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}{'' if self.args is None else ' object'}, not loaded>"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the weights and options of a fairseq checkpoint. Nothing in the file is executed.

    Args:
        path: File written by ``torch.save`` (torch >= 1.6, the zip format). It holds a dict with ``model`` and, for its
            options, ``cfg`` or (older) ``args``: plain dicts, ``argparse.Namespace`` or OmegaConf containers.

    Returns:
        ``model``: official parameter name -> CPU tensor, in the file's dtype. ``cfg`` and ``args``, where the file has
        them: the options as plain dicts, lists and values. A value of any other class stays an inert object that
        shows its name; ``fairseq_config`` reports it if it needs it. The file's other entries are left out.

    Raises:
        ValueError: The file is no torch file, is damaged or holds no checkpoint, or weights are not plain tensors.
        OSError: The file cannot be opened.
    """
    return _read_file(path, _read_checkpoint)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file that holds a state dict alone, such as SSAST's. Nothing in the file is executed.

    Args:
        path: File written by ``torch.save(model.state_dict(), path)`` (torch >= 1.6, the zip format).

    Returns:
        Parameter name -> CPU tensor, in the file's dtype.

    Raises:
        ValueError: The file is no torch file, is damaged, or holds anything but plain tensors by name.
        OSError: The file cannot be opened.
    """

    def read(archive: zipfile.ZipFile) -> dict[str, Tensor]:
        root, content = _read_content(archive)
        return _read_weights(archive, root, content, "the file")

    return _read_file(path, read)


def _read_file(path: str | os.PathLike[str], read: Callable[[zipfile.ZipFile], dict[str, Any]]) -> dict[str, Any]:
    """Result of ``read`` on the archive at ``path``; its errors become ValueErrors that name the file."""
    try:
        with open(path, "rb") as file:
            try:
                _check_zip(file)
                with zipfile.ZipFile(file) as archive:
                    return read(archive)
            except (
                zipfile.BadZipFile,
                EOFError,
                NotImplementedError,
                OSError,
            ) as error:  # OSError: a seek outside the file
                raise ValueError(f"damaged file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _check_zip(file: Any) -> None:
    """Raise a ValueError that describes the file if it is no complete zip file."""
    head = file.read(16)
    if not head:
        raise ValueError("expected a torch checkpoint, found an empty file")
    if not zipfile.is_zipfile(file):
        if head.startswith(b"PK"):
            raise ValueError("expected a torch checkpoint, found a truncated zip file (its directory is missing)")
        if head.startswith(b"\x80"):
            raise ValueError(
                "expected a torch checkpoint in the zip format, found a bare pickle or a file of torch < 1.6; "
                "if it is a checkpoint, torch.load(weights_only=True) and torch.save it again"
            )
        raise ValueError(f"expected a torch checkpoint, found a file that begins with {head!r}")


def _read_content(archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The folder inside the archive (ends in "/"), and the value that its pickle describes."""
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = reprlib.repr(archive.namelist())
        raise ValueError(f"expected a torch checkpoint, found a zip file without one */data.pkl: {names}")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist():
        order = _read_record(archive, root + "byteorder").decode("ascii", "replace")
        if order != sys.byteorder:
            raise ValueError(f"expected {sys.byteorder}-endian data, found {order!r}")

    return root, _read_pickle(_read_record(archive, pickles[0]))


def _read_weights(archive: zipfile.ZipFile, root: str, weights: Any, source: str) -> dict[str, Tensor]:
    """The tensors that the dict ``weights`` describes, by name.

    Args:
        archive: Open zip file.
        root: Folder inside the archive.
        weights: Parameter name -> description of a tensor; anything else is an error.
        source: Name of ``weights`` in error messages.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"expected {source} to be a dict of tensors, found {describe(weights)}")
    storages: dict[str, Tensor] = {}  # several tensors may share one storage
    model = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"expected parameter names in {source}, found the key {reprlib.repr(name)}")
        model[name] = _read_tensor(archive, root, name, value, storages=storages)
    return model


def _read_checkpoint(archive: zipfile.ZipFile) -> dict[str, Any]:
    root, content = _read_content(archive)
    if not isinstance(content, dict):
        raise ValueError(f"expected a checkpoint (a dict with 'model'), found {describe(content)}")
    if "model" not in content:
        raise ValueError(f"expected a checkpoint (a dict with 'model'), found the keys {reprlib.repr(list(content))}")
    checkpoint: dict[str, Any] = {"model": _read_weights(archive, root, content["model"], "'model'")}
    for section in ("cfg", "args"):  # fairseq sets one of them to None
        options = _plain(content.get(section), {}, depth=0)
        if options is not None:
            if section == "args" and "cfg" in checkpoint and not isinstance(options, dict):
                continue  # files with cfg may hold another object here
            if not isinstance(options, dict):
                raise ValueError(f"expected {section!r} to hold options by name, found {describe(options)}")
            checkpoint[section] = options
    return checkpoint


def _read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:  # a compressed record could expand to any size
        raise ValueError(f"damaged file: expected a plain record, found the compressed or encrypted {name!r}")
    return archive.read(info)


def _read_pickle(data: bytes) -> Any:
    """The value that a pickle describes, with an ``_Object`` for every class, function, call and tensor storage.

    Covers the opcodes that ``pickle`` writes in protocols 2 to 5. Sets become lists, because hashing a file's values is
    unsafe: the hash of a deeply nested tuple overflows the C stack.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[int, Any] = {}
    operand: Any  # its type depends on the opcode

    def pop_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    try:
        for opcode, operand, _ in pickletools.genops(data):
            match opcode.name:
                case name if name in _NUMBERS or name in _STRINGS:
                    stack.append(operand)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "PROTO" | "FRAME":
                    pass
                case "BINPUT" | "LONG_BINPUT":
                    memo[operand] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[operand])
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    pop_mark()
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    if len(stack) < count:
                        raise IndexError
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    items = pop_mark()
                    stack.append(tuple(items))
                case "FROZENSET":
                    items = pop_mark()
                    stack.append(items)
                case "APPEND":
                    item = stack.pop()
                    _append_items(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items = pop_mark()
                    _append_items(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items = pop_mark()
                    _set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(_Object(operand.replace(" ", ".")))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_Object(f"{_check_name(module)}.{_check_name(attribute)}"))
                case "REDUCE" | "NEWOBJ":
                    args = stack.pop()
                    stack.append(_call_result(stack.pop(), args))
                case "NEWOBJ_EX":
                    keywords, args = stack.pop(), stack.pop()
                    stack.append(_call_result(stack.pop(), (args, keywords)))
                case "BINPERSID":
                    stack.append(_Object("persistent id", stack.pop()))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], _Object):  # otherwise the attributes of an OrderedDict
                        stack[-1].state = state
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"damaged pickle: torch.save does not write {name}")
    except (IndexError, KeyError) as error:  # an empty stack, an unknown memo entry
        raise ValueError("damaged pickle") from error
    raise ValueError("damaged pickle: no end")


def _check_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"damaged pickle: a class named by {describe(value)}")
    return value


def _call_result(function: Any, args: Any) -> Any:
    if not isinstance(function, _Object):
        raise ValueError(f"damaged pickle: it calls {describe(function)}")
    if function.name == "collections.OrderedDict" and args == ():
        return {}
    return _Object(function.name, args)


def _append_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, _Object):  # the items of a list of an unknown class are not needed
        raise ValueError(f"damaged pickle: it appends to {describe(target)}")


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("damaged pickle: a key without a value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A key of any other type is never looked up and must not be hashed.
            target[key if isinstance(key, (str, int, float, bytes, type(None))) else object()] = value
    elif not isinstance(target, _Object):
        raise ValueError(f"damaged pickle: it sets items of {describe(target)}")


def describe(value: Any) -> str:
    """Short text of a value for error messages: its class or function, its repr, or its type."""
    if isinstance(value, _Object):
        return f"the class or function {value.name}" if value.args is None else f"an object of {value.name}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


def _read_tensor(archive: zipfile.ZipFile, root: str, name: str, value: Any, *, storages: dict[str, Tensor]) -> Tensor:
    """Build one tensor of ``model`` from the arguments of torch's rebuild function.

    Args:
        archive: Open zip file.
        root: Folder inside the archive.
        name: Parameter name, for messages.
        value: Description of the tensor.
        storages: Storages read so far, by key; a new one is added.
    """
    is_parameter = isinstance(value, _Object) and value.name == "torch._utils._rebuild_parameter"
    tensor = value.args[0] if is_parameter and isinstance(value.args, tuple) and value.args else value
    if not isinstance(tensor, _Object) or tensor.name != "torch._utils._rebuild_tensor_v2":
        raise ValueError(f"expected model entry {name!r} to be a tensor, found {describe(tensor)}")
    damaged = f"damaged pickle: model entry {name!r}"
    try:
        storage, offset, size, stride = tensor.args[:4]
        tag, storage_type, key, _, numel = storage.args
        dtype = _STORAGE_DTYPES.get(storage_type.name)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(damaged) from error
    if dtype is None:
        raise ValueError(f"expected model entry {name!r} to be a plain tensor, found {describe(storage_type)}")
    if storage.name != "persistent id" or tag != "storage" or not isinstance(key, str):
        raise ValueError(damaged)
    if not (isinstance(size, tuple) and all(isinstance(n, int) and n >= 0 for n in (numel, offset, *size))):
        raise ValueError(damaged)
    if math.prod(size) > numel:  # a forged view could repeat a storage's values to any size
        raise ValueError(f"{damaged}: size {reprlib.repr(size)} of {numel} stored values")

    if key not in storages:
        try:
            data = _read_record(archive, f"{root}data/{key}")
        except KeyError as error:
            raise ValueError(f"damaged file: the data of model entry {name!r} is missing") from error
        storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    values = storages[key]
    if values.dtype != dtype or values.numel() != numel:
        raise ValueError(f"{damaged}: expected {numel} values {dtype}, found {values.numel()} values {values.dtype}")
    try:
        return torch.as_strided(values, size, stride, offset)
    except (RuntimeError, TypeError) as error:  # torch checks that the view stays inside the storage
        raise ValueError(f"{damaged}: {error}") from error


def _plain(value: Any, converted: dict[int, Any], *, depth: int) -> Any:
    """Options as plain dicts, lists and values.

    Args:
        value: A container or a value. Objects of other classes than Namespace and OmegaConf's stay as they are.
        converted: Identity of a container -> its result. A container that is referenced 2^n times is walked once.
        depth: Nesting level of ``value``.
    """
    if depth > _MAX_NESTING:
        raise ValueError(f"expected options, found values nested more than {_MAX_NESTING} deep")
    if not isinstance(value, (dict, list, tuple, _Object)):
        return value
    if id(value) in converted:
        return converted[id(value)]
    result: Any = value
    if isinstance(value, dict):
        result = {key: _plain(item, converted, depth=depth + 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = [_plain(item, converted, depth=depth + 1) for item in value]
    elif isinstance(value.state, dict):
        if value.name == "argparse.Namespace":
            result = _plain(value.state, converted, depth=depth + 1)
        elif value.name.startswith("omegaconf."):  # _parent closes a cycle, _metadata holds no options
            for attribute in ("_content", "_val"):
                if attribute in value.state:
                    result = _plain(value.state[attribute], converted, depth=depth + 1)
    converted[id(value)] = result
    return result
