"""Compare the losses of the fast and the plain step over 200 updates on the same audio, seeds and masks.

python benchmarks/studies/convergence.py                      the default corpus, fetched once; or --data FOLDER
python benchmarks/studies/convergence.py --steps 20 --out c.json

The runs use ``mae-ast-fast pretrain`` with equal weights, batches, order and masks, and without dropout, whose draws
would differ:

    reference    impl="torch", attention="sdpa", fp32
    fast         "auto" on a CPU, impl="triton" on a GPU, in fp32: the effect of the implementation
    NAME bf16    the same in bf16: the effect of the precision, in the plain step and in the fast one

Every update's losses go to benchmarks/results/convergence_cpu.json (gpu on a GPU); report.py draws them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from conftest import pytest_benchmark_generate_commit_info, pytest_benchmark_generate_machine_info

from mae_ast_fast.files import write_json
from mae_ast_fast.training.metrics_log import read_metrics
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain

RESULTS = Path(__file__).parent.parent / "results"
NO_DROPOUT = dict.fromkeys(
    ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0
)
MODEL = {"embed_dim": 192, "encoder_layers": 4, "decoder_layers": 2, "norm_first": True}  # as in recipes/quick.yaml
METRICS = ("step", "loss", "loss_reconstruction", "loss_classification", "accuracy", "grad_norm")


def columns() -> dict[str, dict[str, str]]:
    """Options of each run."""
    fast = {"impl": "triton"} if torch.cuda.is_available() else {}
    return {
        "reference": {"impl": "torch", "attention": "sdpa", "precision": "fp32"},
        "fast": {**fast, "precision": "fp32"},
        "reference bf16": {"impl": "torch", "attention": "sdpa", "precision": "bf16"},
        "fast bf16": {**fast, "precision": "bf16"},
    }


def converge(data: str | None, steps: int, folder: Path) -> dict[str, Any]:
    """Run all columns; returns the content of the result file."""
    result: dict[str, Any] = {"steps": steps, "columns": {}}
    for name, run_options in columns().items():
        options = PretrainOptions(
            data=data,
            out=str(folder / name),
            steps=steps,
            batch_seconds=40.0,
            lr=1.5e-3,
            warmup_steps=max(1, steps // 10),
            model_args={**MODEL, **NO_DROPOUT},
            save_every=steps,
            evaluate_every=steps,
            **run_options,
        )
        summary = pretrain(options)
        rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if "loss" in row]
        result["columns"][name] = {
            "options": run_options,
            "precision": summary["precision"],
            "seconds": summary["train_seconds"],
            "clips_per_second": summary["clips_per_second"],
            "rows": [{key: row[key] for key in METRICS} for row in rows],
        }
        result["data"], result["model"] = summary["data"], summary["config"]
    result["machine_info"] = pytest_benchmark_generate_machine_info()
    result["commit_info"] = pytest_benchmark_generate_commit_info()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of audio (default: the default corpus)")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=RESULTS / f"convergence_{kind}.json", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = converge(arguments.data, arguments.steps, Path(folder))
    write_json(arguments.out, result)
    print(arguments.out)


if __name__ == "__main__":
    main()
