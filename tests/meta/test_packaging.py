"""The wheel and the source distribution: their content, and their installation outside the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
SMOKE = """
import pathlib, sys, torch, mae_ast_fast, mae_ast_fast.kernels
from mae_ast_fast import MAEAST, MAEASTConfig, fbank
from mae_ast_fast.cli import main
assert pathlib.Path(mae_ast_fast.__file__).is_relative_to(sys.argv[1]), mae_ast_fast.__file__
assert pathlib.Path(mae_ast_fast.kernels.__file__).is_relative_to(sys.argv[1])
log_mel, num_frames = fbank(torch.randn(2, 16000) / 10)
config = MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1)
MAEAST(config)(log_mel, num_frames).loss.backward()
assert main(["doctor", "--help"]) == 0
import mae_ast_fast.kernels.masked_mse
from mae_ast_fast.kernels.common.configs import TABLE
assert TABLE["masked_mse"][0] == ("sm_00", 256, 2, {"ROWS": 8, "num_warps": 2}), TABLE["masked_mse"]
from mae_ast_fast.data.corpus import default_clips
try:
    default_clips(sys.argv[1])
except ValueError as error:
    assert "asterisk" in str(error) or "package" in str(error), error
print("smoke test passed")
"""


TUNED = """{
  "launches": {
    "masked_mse": [{"max_width": 256, "max_element_size": 2, "launch": {"ROWS": 8, "num_warps": 2}}]
  },
  "epilogues": {}
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files and launches of a made-up architecture, built as a wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0")[:-1]:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (folder / "source/kernels/configs/sm_00.json").write_text(TUNED)
    subprocess.run([sys.executable, "-m", "build", "-o", folder / "dist", folder / "source"], check=True)
    return folder


def test_requirements_exclude_broken_torchaudio() -> None:
    (torchaudio,) = (
        requirement
        for requirement in map(Requirement, metadata.requires("mae-ast-fast"))
        if requirement.name == "torchaudio"
    )
    assert list(torchaudio.specifier.filter(["2.10.0", "2.11.0", "2.11.1", "2.12.0"])) == ["2.11.0"]


@pytest.mark.ci
def test_wheel_and_sdist_contain_package(built: Path) -> None:
    (wheel,) = (built / "dist").glob("mae_ast_fast-*.whl")
    (sdist,) = (built / "dist").glob("mae_ast_fast-*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.name for path in (ROOT / "mae_ast_fast").glob("*.py")}
    assert {f"mae_ast_fast/{name}" for name in modules} <= set(names)
    assert "mae_ast_fast/py.typed" in names, "type checkers then read the annotations"
    assert {"mae_ast_fast/kernels/__init__.py", "mae_ast_fast/data/assets/manifest.tsv.gz"} <= set(names)
    assert "mae_ast_fast/data/assets/tasks/esc14.tsv.gz" in names
    assert "mae_ast_fast/kernels/configs/sm_00.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "mae_ast_fast" in tops, f"only the package and its metadata, got {tops}"
    with tarfile.open(sdist) as archive:
        sdist_names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "setup.py",
        "pyproject.toml",
        "kernels/__init__.py",
        "kernels/configs/sm_00.json",
        "mae_ast_fast/models/mae_ast.py",
        "LICENSE",
    } <= sdist_names


@pytest.mark.ci
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_wheel_and_sdist_install_outside_checkout(built: Path, tmp_path: Path, pattern: str) -> None:
    (artefact,) = (built / "dist").glob(pattern)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", tmp_path / "site", artefact], check=True)
    process = subprocess.run(
        [sys.executable, "-c", SMOKE, str(tmp_path / "site")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0 and "smoke test passed" in process.stdout, process.stderr


def test_makefile_gpu_tests_name_one_file_each() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (names,) = re.findall(r"^GPU_TESTS = (.*)$", makefile, re.MULTILINE)
    found = {name: len(list((ROOT / "tests").rglob(f"test_{name}.py"))) for name in names.split()}
    assert len(found) > 20 and set(found.values()) == {1}, found
