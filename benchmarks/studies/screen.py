"""What pays in a short pretraining: one change at a time, judged by held-out clips and processor time.

python benchmarks/studies/screen.py              run every missing arm of ARMS, one thread each
python benchmarks/studies/screen.py --match muon run the missing arms with such names; two such runs side by side use
                                                 two cores best

Each arm trains the first command's model (recipes/quick.yaml before this study: four encoder and two decoder layers
of width 192) on the default corpus and is evaluated on the held-out clips of mae_ast_fast/training/yardstick.json. No
test clip of a task is read. benchmarks/results/screen.jsonl has a row per arm, and benchmarks/reports/report.py makes
the table of docs/recipes.md of them. Rows with a ``change`` were run with that change of the code, which was not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RESULTS = Path(__file__).resolve().parent.parent / "results" / "screen.jsonl"
MODEL_ARGS = {
    "encoder_layers": 4,
    "norm_first": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "input_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "positions": "sinusoid_2d",
}
OPTIONS = {"preset": "patch_tiny", "optimizer": "muon", "batch_seconds": 40.0, "lr": 1.5e-3, "loader_workers": 0}


def arm(steps: int, *, model_args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Options of an arm, with a sixteenth of its updates as warm-up."""
    return {
        **OPTIONS,
        "steps": steps,
        "warmup_steps": steps // 16,
        **options,
        "model_args": MODEL_ARGS | (model_args or {}),
    }


COSINE = {"temperature": 0.1}
HALF = {"decoder_layers": 1, "prediction_stride": 2}
RECIPE = COSINE | HALF | {"classification_weight": 3.0}  # recipes/quick.yaml
ARMS = {
    "AdamW": arm(800, optimizer="adamw"),
    "Muon": arm(800),
    "Muon, 1600 updates": arm(1600),
    "updates of 20 s": arm(1600, batch_seconds=20.0),
    "width 128": arm(800, model_args={"embed_dim": 128, "decoder_embed_dim": 128, "ffn_dim": 512, "num_heads": 4}),
    "one decoder layer": arm(800, model_args={"decoder_layers": 1}),
    "InfoNCE weight 0.3": arm(800, model_args={"classification_weight": 0.3}),
    "no InfoNCE": arm(800, model_args={"classification_weight": 0.0}),
    "cosine": arm(800, model_args=COSINE),
    "cosine, temperature 0.05": arm(800, model_args={"temperature": 0.05}),
    "cosine, weight 3": arm(800, model_args=COSINE | {"classification_weight": 3.0}),
    "cosine, rate 2.5e-3": arm(800, model_args=COSINE, lr=2.5e-3),
    "cosine, one decoder layer, half predicted, 1600 updates": arm(1600, model_args=COSINE | HALF),
    "cosine, one decoder layer, half predicted, updates of 20 s": arm(
        1600, model_args=COSINE | HALF, batch_seconds=20.0
    ),
    "new recipe, 1000 updates, rate 1.5e-3": arm(1000, model_args=RECIPE),
    "new recipe, 1000 updates, rate 4e-3": arm(1000, model_args=RECIPE, lr=4e-3),
    "new recipe, 1000 updates, rate 6e-3": arm(1000, model_args=RECIPE, lr=6e-3),
    "new recipe, 1000 updates, rate 4e-3, weight 10": arm(
        1000, model_args=RECIPE | {"classification_weight": 10.0}, lr=4e-3
    ),
    "new recipe, 2200 updates, rate 3e-3": arm(2200, model_args=RECIPE, lr=3e-3),
    "new recipe, 2200 updates, rate 6e-3": arm(2200, model_args=RECIPE, lr=6e-3),
    # Since then Muon takes blocks of the weights; rows before these were run with whole weights.
    "blocks, 2800 updates, rate 2.5e-3": arm(2800, model_args=RECIPE, lr=2.5e-3, warmup_steps=100),
    "blocks, 2800 updates, rate 4e-3": arm(2800, model_args=RECIPE, lr=4e-3, warmup_steps=100),
    "blocks, 1800 updates, rate 3e-3, width 256": arm(
        1800,
        model_args=RECIPE | {"embed_dim": 256, "decoder_embed_dim": 256, "ffn_dim": 1024, "num_heads": 4},
        lr=3e-3,
        warmup_steps=100,
    ),
    "blocks, 2000 updates, rate 4e-3, weight decay 0.2": arm(
        2000, model_args=RECIPE, lr=4e-3, warmup_steps=100, weight_decay=0.2
    ),
}


def run(name: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train one arm; return its row."""
    from mae_ast_fast.training.options import PretrainOptions
    from mae_ast_fast.training.pretrain import pretrain

    start = time.process_time()
    summary = pretrain(PretrainOptions(**options, out=str(out), save_every=10**6, evaluate_every=10**6))
    held_out = summary["held_out"]
    return {
        "arm": name,
        "options": options,
        "cpu_seconds": round(time.process_time() - start),
        "reconstruction_mse": held_out["reconstruction_mse"],
        "same_band_mse": held_out["baselines"]["mean_of_visible_same_band"],
        "accuracy": held_out["accuracy"],
        "effective_rank": held_out["effective_rank"],
        "mse_by_kind": {kind: report["reconstruction_mse"] for kind, report in summary["held_out_by_kind"].items()},
    }


def read() -> list[dict[str, Any]]:
    """The rows of the results file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="run only arms whose names match this regular expression")
    parser.add_argument("--out", type=Path, default=Path("runs/screen"), help="run folders (default: runs/screen)")
    arguments = parser.parse_args()
    for name, options in ARMS.items():
        if re.search(arguments.match, name) and name not in [row["arm"] for row in read()]:
            row = run(name, options, arguments.out / re.sub(r"\W+", "_", name))
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
