"""The doctor command: memory counts, devices and the report, also with missing packages and a broken driver."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_ast_fast import MAEAST, MAEASTConfig
from mae_ast_fast.devices import native_bf16
from mae_ast_fast.ops import attention, resolve_impl
from mae_ast_fast.ops.cases import op_cases
from mae_ast_fast.tools import doctor
from mae_ast_fast.training.options import PretrainOptions

CONFIG = MAEASTConfig(embed_dim=32, ffn_dim=64, num_heads=2, encoder_layers=4, decoder_embed_dim=16, decoder_layers=1)
CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------- bytes of a step


class SavedTensorsStub(nn.Module):
    """A model whose backward pass needs only x (once, for two products), the result of exp, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = MAEASTConfig()
        self.weight, self.other = nn.Parameter(torch.ones(128)), nn.Parameter(torch.ones(128))
        self.register_buffer("table", torch.ones(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight + x * self.other + (self.weight * self.table).exp()).sum()


def test_count_saved_counts_each_storage_once_without_parameters():
    assert doctor.count_saved(SavedTensorsStub(), 3, "fp32") == 3 * 998 * 128 * 4 + 128 * 4


def test_count_saved_ignores_freed_storages():
    class Unused(SavedTensorsStub):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x + 1) + self.weight).sum()  # a sum needs nothing

    assert doctor.count_saved(Unused(), 3, "fp32") == 0


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("fp32", {"norm_first": True}),
        ("fp32", {"patch_size": (2, 128), "masking": "random", "encoder_layers": 1}),
    ],
)
def test_measure_activations_two_layers_match_whole_model(precision, fields):
    config = dataclasses.replace(CONFIG, **fields)
    kept, per_clip = doctor.measure_activations(config, CPU, precision)
    model = MAEAST(config).train()
    assert kept + 3 * per_clip == doctor.count_saved(model, 3, precision)


def test_largest_batch_follows_from_measured_bytes(monkeypatch):
    monkeypatch.setattr(doctor, "measure_activations", lambda config, device, precision: (10**7, 10**8))
    estimate = doctor.largest_batch(CONFIG, CPU, "fp32", None)
    assert estimate["clips"] is None
    parameters = sum(parameter.numel() for parameter in MAEAST(CONFIG).parameters())
    assert estimate["parameters"] == parameters
    assert estimate["bytes_per_clip"] == 10**8
    assert estimate["fixed_bytes"] == 16 * parameters + 10**7 + doctor.RESERVE
    exact_bytes = estimate["fixed_bytes"] + estimate["margin"] * 7 * estimate["bytes_per_clip"]
    assert doctor.largest_batch(CONFIG, CPU, "fp32", int(exact_bytes) + 1)["clips"] == 7
    assert doctor.largest_batch(CONFIG, CPU, "fp32", int(exact_bytes) - 1)["clips"] == 6
    assert doctor.largest_batch(CONFIG, CPU, "fp32", 1000)["clips"] == 0


# --------------------------------------------------------------------------------------------------------- memory


def write_file(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


MEMINFO = "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   5000 kB"


def test_memory_without_control_groups_is_meminfo(tmp_path):
    write_file(tmp_path, "proc/meminfo", MEMINFO)
    assert doctor.memory(tmp_path) == {"total": 8000 * 1024, "available": 5000 * 1024, "limit": None}


def test_memory_cgroup_v2_applies_tightest_limit(tmp_path):
    write_file(tmp_path, "proc/meminfo", MEMINFO)
    write_file(tmp_path, "proc/self/cgroup", "0::/outer/inner")
    groups = tmp_path / "sys/fs/cgroup"
    write_file(groups, "outer/inner/memory.max", "max")
    write_file(groups, "outer/inner/memory.current", 1_000_000)
    assert doctor.memory(tmp_path)["limit"] is None
    # The parent group's limit applies too; inactive file cache does not count as used.
    write_file(groups, "outer/memory.max", 3_000_000)
    write_file(groups, "outer/memory.current", 2_000_000)
    write_file(groups, "outer/memory.stat", "anon 1500000\ninactive_file 400000\nactive_file 7")
    assert doctor.memory(tmp_path) == {"total": 8000 * 1024, "available": 1_400_000, "limit": 3_000_000}
    write_file(groups, "outer/memory.max", 2_000_000_000)  # more than the machine's memory
    assert doctor.memory(tmp_path)["available"] == 5000 * 1024


def test_memory_cgroup_v1_in_container_applies_limit(tmp_path):
    write_file(tmp_path, "proc/meminfo", MEMINFO)
    write_file(tmp_path, "proc/self/cgroup", "11:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n0::/")
    groups = tmp_path / "sys/fs/cgroup/memory"  # the host's path does not exist here
    write_file(groups, "memory.limit_in_bytes", 2_000_000)
    write_file(groups, "memory.usage_in_bytes", 1_900_000)
    write_file(groups, "memory.stat", "cache 5\ninactive_file 7\ntotal_inactive_file 200000")
    assert doctor.memory(tmp_path) == {"total": 8000 * 1024, "available": 300_000, "limit": 2_000_000}
    write_file(groups, "memory.limit_in_bytes", 9223372036854771712)
    assert doctor.memory(tmp_path)["limit"] is None


def test_memory_unsupported_system_is_none(tmp_path, monkeypatch):
    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr(doctor.os, "sysconf", sysconf)  # macOS
    assert doctor.memory(tmp_path) == {"total": 4096000, "available": None, "limit": None}
    monkeypatch.delattr(doctor.os, "sysconf")  # Windows
    assert doctor.memory(tmp_path) == {"total": None, "available": None, "limit": None}


def test_memory_this_machine_is_plausible():
    memory = doctor.memory()
    if sys.platform == "linux":
        assert 0 < memory["available"] <= memory["total"]


# -------------------------------------------------------------------------------------------------------- devices


def test_cuda_devices_broken_driver_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def broken(index):
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert doctor.cuda_devices() == ([], ["CUDA does not work: CUDA error: unknown error"])

    def old_driver():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (11).\nMore.", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    devices, problems = doctor.cuda_devices()
    assert devices == []
    assert problems == ["CUDA: CUDA initialization: The NVIDIA driver on your system is too old (11)."]


class Properties:
    name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)


def test_examine_gpu_is_listed_and_measured(fake_gpu, monkeypatch):
    measured = []
    monkeypatch.setattr(
        doctor,
        "measure_activations",
        lambda config, device, precision: measured.append((device, precision)) or (0, 10**8),
    )
    report = doctor.examine("patch_base")
    assert measured == [(torch.device("cuda"), "bf16")]
    assert report["cuda"]["devices"] == [
        {"name": "NVIDIA H100 80GB HBM3", "capability": "sm_90", "free": 70 * 10**9, "total": 80 * 10**9}
    ]
    training = report["training"]
    assert (training["device"], training["available_bytes"]) == ("cuda", 70 * 10**9)
    assert training["clips"] == int((70 * 10**9 - training["fixed_bytes"]) / (doctor.MARGIN["cuda"] * 10**8))
    text = doctor.to_text(report)
    assert "cuda:0 NVIDIA H100 80GB HBM3, sm_90, memory 80.00 GB, free 70.00 GB" in text
    assert list(report["uses"]) == ["cuda", "cpu"]


def test_examine_gpu_failing_in_use_is_reported(fake_gpu, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA error: device-side assert triggered\nand so on")

    monkeypatch.setattr(doctor, "measure_activations", fail)
    report = doctor.examine("patch_base")
    assert "clips" not in report["training"]
    assert report["problems"][-1].endswith("on cuda: CUDA error: device-side assert triggered")
    assert "device-side assert" in doctor.to_text(report)


# --------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    MAEAST(CONFIG).save_pretrained(folder)
    return str(folder)


def test_examine_reports_auto_choices(checkpoint):
    report = doctor.examine(checkpoint=checkpoint)
    uses = report["uses"]["cpu"]
    assert {*doctor.OPERATIONS} == {case.name for case in op_cases().values() if case.shapes}
    for name in doctor.OPERATIONS:
        choice, reason = resolve_impl("auto", CPU)
        assert uses["operations"][name] == {"choice": choice, "why": reason}
    choice, reason = attention.choose_backend("auto", CPU)
    assert uses["attention"] == {"choice": choice, "why": reason}
    assert uses["precision"]["choice"] == ("bf16" if native_bf16(CPU) else "fp32") == report["training"]["precision"]
    text = doctor.to_text(report)
    for name in (*doctor.OPERATIONS, "attention", "precision", *doctor.PACKAGES, checkpoint):
        assert f" {name}" in text
    assert json.loads(json.dumps(report)) == report


def test_examine_preset_uses_model_of_pretrain(monkeypatch):
    measured = []
    monkeypatch.setattr(
        doctor, "measure_activations", lambda config, device, precision: measured.append(config) or (0, 10**8)
    )
    report = doctor.examine("frame_tiny")
    assert measured == [PretrainOptions(preset="frame_tiny").model_config()]
    assert f"dropout {measured[0].dropout:g}, clips of 10 s" in doctor.to_text(report)


def test_packages_lists_every_dependency_and_transformers():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [re.match(r"[\w-]+", text)[0] for text in (*project["dependencies"], *extras["train"], *extras["flash"])]
    assert {*needed, "transformers"} == set(doctor.PACKAGES)


def test_examine_unknown_preset_names_no_option_of_pretrain():
    with pytest.raises(ValueError, match=r"^preset must be one of patch_base, .*frame_tiny, got 'foo'$"):
        doctor.examine("foo")


def test_packages_reports_installed_versions(monkeypatch):
    versions = doctor.packages()
    assert versions["torch"] == torch.__version__.split("+")[0]
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package-x", "train")
    monkeypatch.setattr(doctor, "measure_activations", lambda config, device, precision: (10**7, 10**8))
    report = doctor.examine("patch_tiny")
    assert report["packages"]["no-such-package-x"] is None
    text = doctor.to_text(report)
    assert "no-such-package-x missing" in text
    assert 'pip install "mae-ast-fast[train]"' in text


def test_to_text_unknown_memory_is_unknown(checkpoint, monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: {"total": None, "available": None, "limit": None})
    monkeypatch.setattr(doctor, "cuda_devices", lambda: ([], []))  # the memory of a GPU would be known
    text = doctor.to_text(doctor.examine(checkpoint=checkpoint))
    assert "memory unknown, available unknown" in text
    assert "fits             unknown" in text


def test_doctor_cli_runs_on_base_dependencies(checkpoint):
    blocked = (
        "torchaudio soundfile soxr av tensorboard jsonargparse matplotlib triton lhotse"  # huggingface_hub needs tqdm
    )
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked.split()!r}))  # None: as if not installed
from mae_ast_fast.cli import main
sys.exit(main(["doctor", "--json", "--checkpoint", {checkpoint!r}]))
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["training"]["bytes_per_clip"] > 0
