"""The examples for Slurm and Kubernetes, tested without a cluster."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_ast_fast.training.options import PretrainOptions

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
SBATCH = EXAMPLES / "slurm" / "pretrain.sbatch"


def commands() -> dict[str, list[str]]:
    """Every pretraining command in the examples: location -> words of the command, from torchrun or sbatch on."""
    words_by_location = {}
    for path in sorted(EXAMPLES.rglob("*")):
        if path.is_dir():
            continue
        text = path.read_text().replace("\\\n", " ")
        for line in (line.lstrip("#> ") for line in text.splitlines()):
            if line.startswith("sbatch ") or ("torch.distributed.run" in line and " --out " in line):
                words_by_location[f"{path.relative_to(ROOT)}: {len(words_by_location)}"] = shlex.split(
                    line, comments=True
                )
    documents = kubernetes()
    words_by_location["examples/kubernetes/pretrain.yaml"] = container(documents["Job"])["command"]
    return words_by_location


def kubernetes() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install 'mae-ast-fast[test]'")
    documents = yaml.safe_load_all((EXAMPLES / "kubernetes" / "pretrain.yaml").read_text())
    return {document["kind"]: document for document in documents}


def container(job: dict[str, Any]) -> dict[str, Any]:
    (single_container,) = job["spec"]["template"]["spec"]["containers"]
    return single_container


def option(words: list[str], name: str) -> str:
    """Value of an option, written as --name VALUE or --name=VALUE."""
    for index, word in enumerate(words):
        if word == f"--{name}":
            return words[index + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"no --{name} in {words}")


def test_examples_use_valid_pretrain_options() -> None:
    valid = {field.name for field in dataclasses.fields(PretrainOptions)} | {"config"}
    words_by_location = commands()
    assert len(words_by_location) > 2
    for location, words in words_by_location.items():
        command_index = max(index for index, word in enumerate(words) if re.search(r"pretrain(\.sbatch)?$", word))
        names = [word[2:].partition("=")[0] for word in words[command_index + 1 :] if word.startswith("--")]
        assert names, location
        assert {name.partition(".")[0].replace("-", "_") for name in names} <= valid, location


def test_examples_use_valid_torchrun_options() -> None:
    from torch.distributed.run import get_args_parser

    valid = {word for action in get_args_parser()._actions for word in action.option_strings}
    script = SBATCH.read_text().replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "-m torch.distributed.run" in line)
    for words in (shlex.split(line), container(kubernetes()["Job"])["command"]):
        begin = words.index("torch.distributed.run") + 1
        torchrun_words = words[begin : words.index("-m", begin)]
        assert len(torchrun_words) >= 5
        assert {word.partition("=")[0] for word in torchrun_words} <= valid


def test_examples_use_existing_recipes() -> None:
    for words in commands().values():
        assert (ROOT / "recipes" / Path(option(words, "config")).name).is_file()


def test_sbatch_scripts_parse() -> None:
    for path in EXAMPLES.rglob("*.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)


def test_kubernetes_pods_share_service_and_mounts() -> None:
    documents = kubernetes()
    service, job = documents["Service"], documents["Job"]
    spec, pod, pod_container = job["spec"], job["spec"]["template"]["spec"], container(job)
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert option(pod_container["command"], "master-addr") == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    port = int(option(pod_container["command"], "master-port"))
    assert (
        [port]
        == [container_port["containerPort"] for container_port in pod_container["ports"]]
        == [service_port["port"] for service_port in service["spec"]["ports"]]
    )
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == int(option(pod_container["command"], "nnodes"))
    assert option(pod_container["command"], "node-rank") == "$(JOB_COMPLETION_INDEX)"
    mounted = {mount["name"] for mount in pod_container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in [mount["mountPath"] for mount in pod_container["volumeMounts"]]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it


def test_examples_shutdown_leaves_time_to_save() -> None:
    job = kubernetes()["Job"]
    environment = {variable["name"]: variable["value"] for variable in container(job)["env"]}
    shutdown_seconds = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert shutdown_seconds < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    script = SBATCH.read_text()
    signal_seconds = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", script, re.M)[1])
    assert int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script, re.M)[1]) < signal_seconds


@pytest.mark.parametrize(
    ("script_of_srun", "requeued", "code"),
    [
        ("mkdir -p RUN/checkpoints/step-00000002; exit 1", True, 0),  # stopped after progress
        ("exit 1", False, 1),  # no progress
        ("mkdir -p RUN/checkpoints/step-00000002; touch RUN/summary.json", False, 0),  # finished
        ("mkdir -p RUN/checkpoints/step-00000002; touch RUN/summary.json; exit 1", False, 1),  # failed at the very end
    ],
)
def test_sbatch_requeues_job_that_makes_progress(
    tmp_path: Path, script_of_srun: str, requeued: bool, code: int
) -> None:
    before = tmp_path / "run" / "checkpoints" / "step-00000001"
    before.mkdir(parents=True)
    os.utime(before, (1, 1))
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "srun": f'echo "$@" > {tmp_path}/srun.txt\n' + script_of_srun.replace("RUN", str(tmp_path / "run")),
        "scontrol": f'[ $1 = show ] && echo n1 && echo n2 || echo "$@" > {tmp_path}/requeued.txt',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = ["bash", SBATCH, "--steps", "9", "--out", tmp_path / "run"]
    process = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == code, process.stderr
    requeue_file = tmp_path / "requeued.txt"
    assert (requeue_file.read_text().split() if requeue_file.exists() else None) == (
        ["requeue", "7"] if requeued else None
    )
    srun_arguments = (tmp_path / "srun.txt").read_text()
    assert "--rdzv-endpoint=n1:29500 --rdzv-id=7.0" in srun_arguments
    assert srun_arguments.endswith(f"pretrain --steps 9 --out {tmp_path / 'run'}\n")


def test_sbatch_without_out_fails() -> None:
    process = subprocess.run(["bash", SBATCH, "--steps", "9"], check=False, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert "expected --out FOLDER" in process.stderr
