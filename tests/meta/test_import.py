"""Importing the package must not load audio libraries or Triton, or use a GPU; each test runs in a new process."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import mae_ast_fast

# Libraries that the package must not load. tqdm is not among them, because huggingface_hub imports it.
OPTIONAL = [
    *("triton", "torchaudio", "lhotse", "soundfile", "soxr", "av", "matplotlib", "tensorboard", "jsonargparse"),
    *("fairseq", "timm", "flash_attn", "scipy", "pytest", "transformers", "torchmetrics", "s3prl"),
]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mae_ast_fast.__path__, "mae_ast_fast.")
    if ".kernels" not in module.name
    and not module.name.endswith(
        ("__main__", ".hf", ".integrations.transformers")
    )  # integrations/transformers.py subclasses transformers' classes
)

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"  # None: as if not installed
NO_GPU = """
import torch

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was queried at import")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "init", "_lazy_init", "synchronize", "is_bf16_supported", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
torch.accelerator.is_available = torch.accelerator.current_accelerator = refuse
"""
STEP = """
import tempfile
import torch
from mae_ast_fast import MAEAST, MAEASTConfig, fbank

log_mel, num_frames = fbank(torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]))
config = MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1)
model = MAEAST(config).train()
model(log_mel, num_frames).loss.backward()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    MAEAST.from_pretrained(folder).extract_features(log_mel, num_frames)
with torch.autocast("cpu", torch.bfloat16):
    model(log_mel, num_frames)
"""


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True, timeout=120
    )


def run_checked(folder: Path, code: str) -> str:
    process = run_python(code, folder)
    assert process.returncode == 0, process.stderr
    return process.stdout


def modules_loaded_by(tmp_path: Path, statements: str) -> set[str]:
    """Top-level modules that are loaded after the statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    return set(json.loads(run_checked(tmp_path, code).splitlines()[-1]))


def test_import_package_loads_nothing_optional_and_no_gpu(tmp_path: Path) -> None:
    code = "from mae_ast_fast import *\nimport torch; assert not torch.cuda.is_initialized()"
    loaded = modules_loaded_by(tmp_path, code)
    assert {"torch", "mae_ast_fast"} <= loaded
    assert not loaded & set(OPTIONAL)


def test_import_every_module_loads_nothing_optional(tmp_path: Path) -> None:
    assert {
        "mae_ast_fast.models.mae_ast",
        "mae_ast_fast.training.pretrain",
        "mae_ast_fast.cli",
        "mae_ast_fast.data.decoder",
    } <= set(MODULES)
    loaded = modules_loaded_by(tmp_path, "\n".join(f"import {name}" for name in MODULES))
    assert not loaded & set(OPTIONAL)


def test_import_package_alone_leaves_torch_unloaded(tmp_path: Path) -> None:
    """The command line sets a variable that PyTorch's OpenMP reads when it is loaded."""
    assert not modules_loaded_by(tmp_path, "import mae_ast_fast.cli") & {"torch", "numpy"}
    code = """
import mae_ast_fast
assert set(mae_ast_fast.__all__) <= set(dir(mae_ast_fast))
assert not hasattr(mae_ast_fast, "no_such_name")
assert mae_ast_fast.ops.masked_mse and "mae_ast_fast.models" not in __import__("sys").modules
assert mae_ast_fast.MAEAST is mae_ast_fast.models.mae_ast.MAEAST
"""
    run_checked(tmp_path, code)


def test_import_of_package_leaves_sharded_checkpoints_unloaded(tmp_path: Path) -> None:
    """torch.distributed.checkpoint brings 700 modules, sympy among them, and more than a second."""
    code = "from mae_ast_fast import *\nimport sys\n"
    code += "print('torch.distributed.checkpoint' in sys.modules, 'sympy' in sys.modules)"
    assert run_checked(tmp_path, code).split() == ["False", "False"]


def test_import_does_not_query_cuda(tmp_path: Path) -> None:
    imports = "\n".join(f"import {name}" for name in MODULES)
    run_checked(tmp_path, f"{NO_GPU}\nfrom mae_ast_fast import *\n{imports}")


def test_construction_does_not_query_cuda(tmp_path: Path) -> None:
    run_checked(
        tmp_path, f"{NO_GPU}\nfrom mae_ast_fast import *\nMAEAST(MAEASTConfig.preset('patch_tiny', encoder_layers=1))"
    )


def test_training_step_without_optional_libraries_works(tmp_path: Path) -> None:
    run_checked(tmp_path, BLOCK + "\n".join(f"import {name}" for name in MODULES) + STEP)


def test_block_prevents_imports_and_cuda_queries(tmp_path: Path) -> None:
    """The checks themselves: forbidden imports and calls fail."""
    for name in ("soundfile", "matplotlib.pyplot", "torchaudio"):
        process = run_python(f"{BLOCK}\nimport {name}", tmp_path)
        assert process.returncode != 0 and "ModuleNotFoundError" in process.stderr and name in process.stderr
    process = run_python(f"{NO_GPU}\ntorch.cuda.is_available()", tmp_path)
    assert process.returncode != 0 and "CUDA was queried" in process.stderr


def test_import_draws_no_random_number_and_changes_no_setting(tmp_path: Path) -> None:
    """Only our modules count: they are imported again after their dependencies (huggingface_hub draws numbers)."""
    code = """
import random, sys, numpy, torch
from mae_ast_fast import *
for name in [name for name in sys.modules if name.split(".")[0] == "mae_ast_fast"]:
    del sys.modules[name]
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.get_num_threads(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.is_grad_enabled(),
    )
before = state()
from mae_ast_fast import *
assert state() == before
"""
    run_checked(tmp_path, code)


def test_public_paths_are_attributes_after_import_of_package(tmp_path: Path) -> None:
    code = """
import mae_ast_fast
assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoint.load_fairseq
assert mae_ast_fast.SSAST is mae_ast_fast.ssast.SSAST
import mae_ast_fast.checkpoint
assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoint.load_fairseq
"""
    run_checked(tmp_path, code)


def test_package_exports_public_names() -> None:
    names = ["MAEAST", "MAEASTConfig", "SSAST", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]
    assert sorted(mae_ast_fast.__all__) == names
    assert all(hasattr(mae_ast_fast, name) for name in mae_ast_fast.__all__)
    assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoints.load.load_fairseq
    assert [int(part) for part in mae_ast_fast.__version__.split(".")] >= [0, 1, 0]
