"""What importing the package may not do, each in a fresh process: load audio libraries or Triton, touch a GPU."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import mae_ast_fast

# Optional extras, and what the contract names. tqdm is not among them: huggingface_hub imports it.
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
    )  # integrations/transformers.py is transformers' classes
)

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"  # None: as if it were not installed
NO_GPU = """
import torch

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was asked for at import")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "init", "_lazy_init", "synchronize", "is_bf16_supported", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
torch.accelerator.is_available = torch.accelerator.current_accelerator = refuse
"""
STEP = """
import tempfile
import torch
from mae_ast_fast import MAEAST, MAEASTConfig, fbank

features, frames = fbank(torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]))
config = MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1)
model = MAEAST(config).train()
model(features, frames).loss.backward()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    MAEAST.from_pretrained(folder).extract_features(features, frames)
with torch.autocast("cpu", torch.bfloat16):
    model(features, frames)
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True, timeout=120
    )


def run(folder: Path, code: str) -> str:
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(tmp_path: Path, statements: str) -> set[str]:
    """The top-level modules that are loaded after the statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    return set(json.loads(run(tmp_path, code).splitlines()[-1]))


def test_the_package_loads_nothing_optional_and_no_gpu(tmp_path: Path) -> None:
    code = f"import mae_ast_fast\n{'import torch; assert not torch.cuda.is_initialized()'}"
    loaded = loaded_by(tmp_path, code)
    assert {"torch", "mae_ast_fast"} <= loaded
    assert not loaded & set(OPTIONAL)


def test_no_module_of_the_package_loads_anything_optional(tmp_path: Path) -> None:
    assert {
        "mae_ast_fast.models.mae_ast",
        "mae_ast_fast.training.pretrain",
        "mae_ast_fast.cli",
        "mae_ast_fast.data.decoder",
    } <= set(MODULES)
    loaded = loaded_by(tmp_path, "\n".join(f"import {name}" for name in MODULES))
    assert not loaded & set(OPTIONAL)


def test_import_does_not_ask_for_cuda(tmp_path: Path) -> None:
    imports = "\n".join(f"import {name}" for name in MODULES)
    run(tmp_path, f"{NO_GPU}\nimport mae_ast_fast\n{imports}")


def test_construction_does_not_ask_for_cuda(tmp_path: Path) -> None:
    run(tmp_path, f"{NO_GPU}\nfrom mae_ast_fast import *\nMAEAST(MAEASTConfig.preset('patch_tiny', encoder_layers=1))")


def test_import_and_a_training_step_work_without_the_optional_libraries(tmp_path: Path) -> None:
    run(tmp_path, BLOCK + "\n".join(f"import {name}" for name in MODULES) + STEP)


def test_the_block_blocks(tmp_path: Path) -> None:
    """The check itself: what it forbids cannot be imported or called under it."""
    for name in ("soundfile", "matplotlib.pyplot", "torchaudio"):
        done = python(f"{BLOCK}\nimport {name}", tmp_path)
        assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr and name in done.stderr
    done = python(f"{NO_GPU}\ntorch.cuda.is_available()", tmp_path)
    assert done.returncode != 0 and "CUDA was asked for" in done.stderr


def test_import_draws_no_random_number_and_sets_nothing(tmp_path: Path) -> None:
    """Only our own modules count: they are imported again, with all that they import loaded (huggingface_hub draws)."""
    code = """
import random, sys, numpy, torch, mae_ast_fast
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
import mae_ast_fast
assert state() == before
"""
    run(tmp_path, code)


def test_public_paths_are_attributes_after_import_of_the_package_alone(tmp_path: Path) -> None:
    code = """
import mae_ast_fast
assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoint.load_fairseq
assert mae_ast_fast.SSAST is mae_ast_fast.ssast.SSAST
import mae_ast_fast.checkpoint
assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoint.load_fairseq
"""
    run(tmp_path, code)


def test_names_of_the_package() -> None:
    names = ["MAEAST", "MAEASTConfig", "SSAST", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]
    assert sorted(mae_ast_fast.__all__) == names
    assert all(hasattr(mae_ast_fast, name) for name in mae_ast_fast.__all__)
    assert mae_ast_fast.load_fairseq is mae_ast_fast.checkpoints.load.load_fairseq
    assert [int(part) for part in mae_ast_fast.__version__.split(".")] >= [0, 1, 0]
