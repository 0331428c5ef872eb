"""The examples for Slurm and Kubernetes: what can be told of them without a cluster."""

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
    """Every command in the examples that pretrains: where it stands -> its words from torchrun or sbatch on."""
    found = {}
    for path in sorted(EXAMPLES.rglob("*")):
        if path.is_dir():
            continue
        text = path.read_text().replace("\\\n", " ")
        for line in (line.lstrip("#> ") for line in text.splitlines()):
            if line.startswith("sbatch ") or ("torch.distributed.run" in line and " --out " in line):
                found[f"{path.relative_to(ROOT)}: {len(found)}"] = shlex.split(line, comments=True)
    documents = kubernetes()
    found["examples/kubernetes/pretrain.yaml"] = container(documents["Job"])["command"]
    return found


def kubernetes() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install 'mae-ast-fast[test]'")
    documents = yaml.safe_load_all((EXAMPLES / "kubernetes" / "pretrain.yaml").read_text())
    return {document["kind"]: document for document in documents}


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def option(words: list[str], name: str) -> str:
    """Of --name VALUE or --name=VALUE."""
    for place, word in enumerate(words):
        if word == f"--{name}":
            return words[place + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"no --{name} in {words}")


def test_every_option_of_pretrain_is_one() -> None:
    known = {field.name for field in dataclasses.fields(PretrainOptions)} | {"config"}
    told = commands()
    assert len(told) > 2
    for where, words in told.items():
        last = max(place for place, word in enumerate(words) if re.search(r"pretrain(\.sbatch)?$", word))
        given = [word[2:].partition("=")[0] for word in words[last + 1 :] if word.startswith("--")]
        assert given, where
        assert {name.partition(".")[0].replace("-", "_") for name in given} <= known, where


def test_every_option_of_torchrun_is_one() -> None:
    from torch.distributed.run import get_args_parser

    known = {word for action in get_args_parser()._actions for word in action.option_strings}
    script = SBATCH.read_text().replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "-m torch.distributed.run" in line)
    for words in (shlex.split(line), container(kubernetes()["Job"])["command"]):
        begin = words.index("torch.distributed.run") + 1
        own = words[begin : words.index("-m", begin)]
        assert len(own) >= 5
        assert {word.partition("=")[0] for word in own} <= known


def test_recipes_are_there() -> None:
    for words in commands().values():
        assert (ROOT / "recipes" / Path(option(words, "config")).name).is_file()


def test_scripts_parse() -> None:
    for path in EXAMPLES.rglob("*.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)


def test_the_pods_meet() -> None:
    documents = kubernetes()
    service, job = documents["Service"], documents["Job"]
    spec, pod, only = job["spec"], job["spec"]["template"]["spec"], container(job)
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert option(only["command"], "master-addr") == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    port = int(option(only["command"], "master-port"))
    assert [port] == [each["containerPort"] for each in only["ports"]] == [p["port"] for p in service["spec"]["ports"]]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == int(option(only["command"], "nnodes"))
    assert option(only["command"], "node-rank") == "$(JOB_COMPLETION_INDEX)"
    mounted = {mount["name"] for mount in only["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in [mount["mountPath"] for mount in only["volumeMounts"]]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy takes no other


def test_what_ends_a_run_leaves_time_to_save() -> None:
    job = kubernetes()["Job"]
    environment = {each["name"]: each["value"] for each in container(job)["env"]}
    patience = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert patience < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    script = SBATCH.read_text()
    notice = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", script, re.M)[1])
    assert int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script, re.M)[1]) < notice


@pytest.mark.parametrize(
    ("run", "requeued", "code"),
    [
        ("mkdir -p RUN/checkpoints/step-00000002; exit 1", True, 0),  # stopped: it got further
        ("exit 1", False, 1),  # it got no further
        ("mkdir -p RUN/checkpoints/step-00000002; touch RUN/summary.json", False, 0),  # finished
        ("mkdir -p RUN/checkpoints/step-00000002; touch RUN/summary.json; exit 1", False, 1),  # failed at the very end
    ],
)
def test_a_job_queues_itself_again_while_it_gets_further(tmp_path: Path, run: str, requeued: bool, code: int) -> None:
    before = tmp_path / "run" / "checkpoints" / "step-00000001"
    before.mkdir(parents=True)
    os.utime(before, (1, 1))
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "srun": f'echo "$@" > {tmp_path}/srun.txt\n' + run.replace("RUN", str(tmp_path / "run")),
        "scontrol": f'[ $1 = show ] && echo n1 && echo n2 || echo "$@" > {tmp_path}/requeued.txt',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    words = ["bash", SBATCH, "--steps", "9", "--out", tmp_path / "run"]
    done = subprocess.run(words, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    asked = tmp_path / "requeued.txt"
    assert (asked.read_text().split() if asked.exists() else None) == (["requeue", "7"] if requeued else None)
    told = (tmp_path / "srun.txt").read_text()
    assert "--rdzv-endpoint=n1:29500 --rdzv-id=7.0" in told
    assert told.endswith(f"pretrain --steps 9 --out {tmp_path / 'run'}\n")


def test_a_job_without_a_run_folder_is_refused() -> None:
    done = subprocess.run(["bash", SBATCH, "--steps", "9"], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected --out FOLDER" in done.stderr
