"""Report the machine, the implementations that "auto" selects on it, and the largest batch. Base dependencies only."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from .. import __version__
from ..checkpoints.load import load_mae_ast
from ..models.config import MAEASTConfig
from ..models.mae_ast import MAEAST
from ..ops import functional, resolve_impl
from ..ops.attention import choose_backend
from ..ops.fbank import SAMPLE_RATE, num_frames
from .cores import usable_cores

OPERATIONS = tuple(name for name in functional.__all__ if callable(getattr(functional, name)))
PACKAGES = {  # distribution -> the extra that needs it
    "torch": "base",
    "triton": "base (Linux)",
    "numpy": "base",
    "safetensors": "base",
    "huggingface_hub": "base",
    "torchaudio": "train",
    "soundfile": "train",
    "soxr": "train",
    "lhotse": "train",
    "av": "train",
    "urllib3": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "jsonargparse": "train",
    "tqdm": "train",
    "matplotlib": "train",
    "transformers": "export --format transformers",
    "flash-attn": "flash",
}
CLIP_SECONDS = 10.0
BYTES_A_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments
# In addition to the activations that autograd saves, a step holds temporary buffers (4 % of the activations in a memory
# profile of a CPU step), and the C library's allocator holds memory that it cannot return. The estimate with this
# margin and reserve was 1 to 25 % above the peak resident memory of three steps, for tiny, small and base, 8 to 32
# clips, fp32 and bf16, with and without dropout (Linux, glibc). PyTorch's CUDA allocator wastes less; its margin is
# not measured.
MARGIN = {"cpu": 1.5, "cuda": 1.2}
RESERVE = 300e6  # bytes of the libraries' buffers after the first step: 200 MB measured on a CPU


def examine(preset: str = "patch_base", checkpoint: str | None = None) -> dict[str, Any]:
    """The whole report, as values that JSON can hold.

    Args:
        preset: Model sizes for the estimate of the largest batch, {patch,frame}_{base,small,tiny}.
        checkpoint: Checkpoint whose model is used instead of ``preset``.

    Raises:
        ValueError: The preset is unknown, or the checkpoint does not exist.
    """
    from ..training.options import PretrainOptions

    # The model of the pretrain command: its defaults override those of the preset.
    if checkpoint is None:
        MAEASTConfig.preset(preset)  # its error names no option that doctor lacks
        config = cast(MAEASTConfig, PretrainOptions(preset=preset).model_config())
    else:
        config = cast(MAEASTConfig, load_mae_ast(checkpoint, "doctor").config)
    devices, problems = cuda_devices()
    report: dict[str, Any] = {
        "mae_ast_fast": __version__,
        "packages": packages(),
        "machine": machine(),
        "memory": memory(),
        "cuda": {"built_for": torch.version.cuda or torch.version.hip, "devices": devices},
        "uses": {
            kind: choices(torch.device(kind), arch)
            for kind, arch in [("cuda", device["capability"]) for device in devices[:1]] + [("cpu", "cpu")]
        },
        "problems": problems,
    }
    kind = "cuda" if devices else "cpu"
    available = devices[0].get("free") if devices else report["memory"]["available"]
    report["training"] = {"model": checkpoint or preset, "dropout": config.dropout, "device": kind}
    try:
        report["training"] |= largest_batch(
            config, torch.device(kind), report["uses"][kind]["precision"]["choice"], available
        )
    except (RuntimeError, MemoryError) as error:  # a driver that fails in use, or no memory for two clips
        problems.append(f"the memory of a training step could not be measured on {kind}: {_first_line(error)}")
    return report


def packages() -> dict[str, str | None]:
    """Installed version of each package, None if it is missing. No package is imported."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def machine() -> dict[str, Any]:
    """Operating system, Python and processor."""
    from ..devices import native_bf16

    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "native_bf16": native_bf16(torch.device("cpu")),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory(root: Path = Path("/")) -> dict[str, Any]:
    """Main memory in bytes: ``total``, ``available`` to this process, ``limit`` of its control groups.

    ``available`` is the system's figure, but at most what the control groups of the process leave free. A value is None
    if it is unknown; ``limit`` also if there is none.

    Args:
        root: Folder that contains ``proc`` and ``sys``.
    """
    total = available = None
    with contextlib.suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    if total is None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS has only the total, Windows neither
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, free = _control_group(root)
    if free is not None:
        available = free if available is None else min(available, free)
    return {"total": total, "available": available, "limit": limit}


def _control_group(root: Path) -> tuple[int | None, int | None]:
    """Lowest memory limit and least free memory of the control groups (versions 1 and 2) in bytes; None: no limit."""
    limits: list[int] = []
    free: list[int] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None, None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the group may be mounted at the root and the path missing: read the folders that exist.
        folder = mount / path.strip("/")
        for group in [folder, *folder.parents]:
            if mount not in (group, *group.parents):
                break
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                if limit < 1 << 60:  # version 1 writes "no limit" as a number near 2^63
                    limits.append(limit)
                    free.append(max(0, limit - used + _reclaimable(group / "memory.stat", names[2])))
    return min(limits, default=None), min(free, default=None)


def _reclaimable(path: Path, name: str) -> int:
    """Bytes of file cache that count as used but are freed on demand."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def cuda_devices() -> tuple[list[dict[str, Any]], list[str]]:
    """CUDA (or ROCm) devices that PyTorch finds, and problems in finding them. A broken driver raises nothing."""
    devices: list[dict[str, Any]] = []
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            for index in range(count):
                properties = torch.cuda.get_device_properties(index)
                free, total = torch.cuda.mem_get_info(index)
                capability = f"sm_{properties.major}{properties.minor}"
                devices.append({"name": properties.name, "capability": capability, "free": free, "total": total})
        except Exception as error:  # drivers raise any type; the report shows the message
            problems.append(f"CUDA does not work: {_first_line(error)}")
            devices = []
    problems += [f"CUDA: {_first_line(warning.message)}" for warning in caught]
    return devices, list(dict.fromkeys(problems))


def _first_line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def choices(device: torch.device, arch: str) -> dict[str, Any]:
    """What "auto" selects on a device, each with the reason: operations, attention, precision.

    ``epilogues`` tells whether impl="triton" computes GELU inside the matrix products on the architecture.
    """
    from ..devices import native_bf16
    from ..kernels.common.configs import epilogues

    def entry(selected: tuple[str, str]) -> dict[str, str]:
        choice, reason = selected
        return {"choice": choice, "why": reason}

    bf16 = native_bf16(device)
    return {
        "operations": {name: entry(resolve_impl("auto", device)) for name in OPERATIONS},
        "epilogues": entry(epilogues(arch)),
        "attention": entry(choose_backend("auto", device, dtype=torch.bfloat16 if bf16 else torch.float32)),
        "precision": {
            "choice": "bf16" if bf16 else "fp32",
            "why": f"{device} {'computes' if bf16 else 'does not compute'} bf16 products natively",
        },
    }


def largest_batch(config: MAEASTConfig, device: torch.device, precision: str, available: int | None) -> dict[str, Any]:
    """Number of 10-second clips that fit into a training step, from measured bytes.

    Args:
        config: The model.
        device: Device on which a few small steps are run.
        precision: "fp32" or "bf16".
        available: Free memory in bytes; None if unknown.

    Returns:
        ``precision``; ``parameters``; ``fixed_bytes`` (weights, gradients, AdamW, copies of the weights that a step
        keeps, and a reserve); ``bytes_per_clip`` that autograd saves; ``margin`` by which they are multiplied;
        ``available_bytes``; ``clips`` (None if the memory is unknown).
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MAEAST(config).parameters())
    kept, per_clip = measure_activations(config, device, precision)
    fixed = round(BYTES_A_PARAMETER * parameters + kept + RESERVE)
    margin = MARGIN[device.type]
    clips = None if available is None else max(0, int((available - fixed) / (margin * per_clip)))
    return {
        "precision": precision,
        "parameters": parameters,
        "fixed_bytes": fixed,
        "bytes_per_clip": per_clip,
        "margin": margin,
        "available_bytes": available,
        "clips": clips,
    }


def measure_activations(config: MAEASTConfig, device: torch.device, precision: str) -> tuple[int, int]:
    """Bytes that autograd saves for the backward pass of a step on 10-second clips: fixed, and per clip.

    Forward passes of two and four clips are run with one and with two encoder layers. Every further encoder layer saves
    as much as the second, so the others need not be run.
    """
    fits = []
    for layers in (1, 2):
        model = MAEAST(dataclasses.replace(config, encoder_layers=layers)).to(device).train()
        two_clips, four_clips = (count_saved(model, batch, precision) for batch in (2, 4))
        per_clip = (four_clips - two_clips) // 2
        fits.append((two_clips - 2 * per_clip, per_clip))
        del model
        gc.collect()
    with_one, with_two = fits
    extra_layers = config.encoder_layers - 1
    saved, saved_per_clip = (
        one_layer + extra_layers * (two_layers - one_layer)
        for one_layer, two_layers in zip(with_one, with_two, strict=True)
    )
    return saved, saved_per_clip


def count_saved(model: MAEAST, batch: int, precision: str) -> int:
    """Bytes that the forward pass saves for the backward pass: each storage once, without parameters and buffers."""
    device = next(model.parameters()).device
    parameter_storages = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    frames = int(num_frames(round(CLIP_SECONDS * SAMPLE_RATE)))
    log_mel = torch.randn(batch, frames, model.config.num_mel_bins, generator=generator).to(device)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        out = model(log_mel)  # kept until the count: another storage could reuse the address of a freed one
    total = sum(saved.values())
    del out
    return total


def to_text(report: dict[str, Any]) -> str:
    """The report as text."""
    host, cuda, memory_, training = (report[name] for name in ("machine", "cuda", "memory", "training"))
    lines = [f"mae-ast-fast {report['mae_ast_fast']}, Python {host['python']}", "", "Packages"]
    for name, version in report["packages"].items():
        lines.append(f"  {name:<16} {version or 'missing':<14} {PACKAGES[name]}")
    if any(version is None and PACKAGES[name] == "train" for name, version in report["packages"].items()):
        lines.append('  pretrain, features and reconstruct need the extra "train": pip install "mae-ast-fast[train]"')
    lines += [
        "",
        "Machine",
        f"  {host['os']}",
        f"  {host['cpu']}: {host['cores']} cores, {host['usable_cores']} usable, {host['torch_threads']} PyTorch "
        f"threads, bf16 {'native' if host['native_bf16'] else 'not native'}",
        f"  memory {_size(memory_['total'])}, available {_size(memory_['available'])}"
        + (f", limited to {_size(memory_['limit'])} by the control group" if memory_["limit"] else ""),
    ]
    for index, device in enumerate(cuda["devices"]):
        lines.append(
            f"  cuda:{index} {device['name']}, {device['capability']}, memory {_size(device['total'])}, "
            f"free {_size(device['free'])}"
        )
    if not cuda["devices"]:
        build = f"built for CUDA {cuda['built_for']}" if cuda["built_for"] else "built without CUDA"
        lines.append(f"  no CUDA device (PyTorch is {build})")
    for kind, uses in report["uses"].items():
        lines += ["", f"Used on {kind}"]
        entries = {**uses["operations"], **{name: uses[name] for name in ("epilogues", "attention", "precision")}}
        lines += [f"  {name:<16} {entry['choice']:<8} {entry['why']}" for name, entry in entries.items()]
    if "bytes_per_clip" in training:
        lines += ["", *_training_lines(training)]
    if report["problems"]:
        lines += ["", "Problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


def _training_lines(training: dict[str, Any]) -> list[str]:
    clips = training["clips"]
    if clips is None:
        fits = "unknown: this system does not report its available memory"
    elif clips == 0:
        fits = "not even one clip"
    else:
        fits = f"{clips} clips: --batch-seconds {round(clips * CLIP_SECONDS)}"
    return [
        f"Largest batch in training: {training['model']}, {training['precision']} on {training['device']}, "
        f"dropout {training['dropout']:g}, clips of {CLIP_SECONDS:g} s",
        f"  per clip         {_size(training['bytes_per_clip'])}, measured: activations that autograd saves",
        f"  fixed            {_size(training['fixed_bytes'])}: weights, gradients and AdamW of "
        f"{training['parameters'] / 1e6:.1f} M parameters, libraries",
        f"  available        {_size(training['available_bytes'])}",
        f"  fits             {fits}",
        f"                   (with a margin of {training['margin'] - 1:.0%} per clip for temporary buffers and the "
        "allocator)",
    ]


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
