"""Host code of the GPU path on the fake GPU: it runs, waits for nothing, and captures only calls that CUDA allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_cuda.fixture import Run
from readme_code import first_screen

from mae_ast_fast.cli.parser import TRAIN_EXTRA

pytestmark = pytest.mark.ci  # a minute: PyTorch starts several times, and Triton compiles

README = """
import torch
from fake_cuda.measure import Measure, report
from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep, fbank

measured = {}
waveforms, samples = torch.randn(4, 32_000).clamp(-1, 1).cuda(), [32_000, 20_000, 26_000, 16_000]
for frontend in ("mae_ast", "ssast"):
    fbank(waveforms, lengths=samples, frontend=frontend)  # the first call sends its constants
    with Measure() as measured[f"fbank {frontend}"]:
        features, frames = fbank(waveforms, lengths=samples, frontend=frontend)
with Measure() as measured["fbank of whole clips"]:
    fbank(waveforms)
model = MAEAST(MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1, encoder_layerdrop=0.0)).cuda()
with Measure() as measured["forward"]:
    out = model(features, frames)
with Measure() as measured["backward"]:
    out.loss.backward()
gradients = sum(p.grad is not None for p in model.parameters())
with torch.no_grad():
    encoded = model.eval().extract_features(features, frames)
step = TrainStep(model.train(), lr=1e-4, precision="bf16")
for update in ("first", "update"):
    with Measure() as measured[update]:
        metrics = step(features, frames)
on_device = torch.as_tensor(frames).cuda()
with Measure() as measured["update of cuda lengths"]:
    step(features, on_device)
devices = [str(x.device) for x in (features, frames, *metrics)]
report(**measured, shape=list(encoded.last_hidden_state.shape), devices=devices,
       gradients=gradients, parameters=len(list(model.parameters())))
"""

STEP = """
import sys, torch
from fake_cuda.measure import Measure, report
from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.training.step import MicroBatch

measured = {}
for graphs in (False, True):
    if sys.argv[1] == "mae_ast":
        config = MAEASTConfig.preset("patch_tiny", encoder_layers=1, decoder_layers=1, encoder_layerdrop=0.0)
        model = MAEAST(config, impl="triton")
    else:
        model = SSAST(SSASTConfig.preset("patch_tiny", layers=1, input_frames=192, mask_patches=40), impl="triton")
    step = TrainStep(model.cuda().train(), precision="bf16", graphs=graphs)
    features = torch.randn(4, 192, 128).cuda()
    for index in range(4):
        with Measure() as measured["graphs" * graphs + str(index)]:
            step(features, [192, 100, 150, 128], lr=1e-4, seed=3, clip_ids=torch.arange(4) + index)
    if not graphs:
        for index in range(2):
            with Measure() as measured[f"micro_batches{index}"]:
                step.update([MicroBatch(features[:2], [192, 100]), MicroBatch(features[2:], [150, 128])], lr=1e-4)
report(**measured)
"""

PRETRAIN = """
import sys
from pathlib import Path
from fake_cuda.measure import Measure, report
from toy_audio import write_gliding_tones
from mae_ast_fast.training import trainer
from mae_ast_fast.cli import main

updates, update = [], trainer.Trainer._update

def measured(self, batches):
    with Measure() as measurement:
        update(self, batches)
    updates.append(measurement.numbers())

trainer.Trainer._update = measured
# These read back values that no kernel computed: the size of a mask, and a loss that may be NaN.
trainer.Trainer.finish = lambda *_: {}
trainer.Trainer._fail = lambda *_: None
folder = Path(sys.argv[1])
write_gliding_tones(folder / "audio")
fields = {"embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 1, "decoder_embed_dim": 32}
main([
    "pretrain", "--device", "cuda", "--steps", "3", "--batch_seconds", "8", "--max_seconds", "3", "--warmup_steps", "1",
    "--data", str(folder / "audio"), "--out", str(folder / "run"), "--cache", str(folder / "cache"), "--workers", "1",
    *(f"--model_args.{name}={value}" for name, value in {**fields, "decoder_layers": 1}.items()),
])
report(updates=updates)
"""


def assert_waits_for_nothing(measured: dict[str, Any]) -> None:
    assert (measured["waits"], measured["warned"], measured["illegal"]) == ({}, [], {})
    assert not [kinds for kinds in measured["copies"] if "pageable" in kinds], measured["copies"]


@pytest.fixture(scope="module")
def readme(fake_cuda: Run) -> dict[str, Any]:
    return fake_cuda(README)


@pytest.fixture(scope="module", params=["mae_ast", "ssast"])
def updates(request: pytest.FixtureRequest, fake_cuda: Run) -> dict[str, Any]:
    return fake_cuda(STEP, request.param)


def test_readme_lines_on_cuda_run(readme: dict[str, Any]) -> None:
    assert readme["shape"] == [4, 104, 192]
    assert readme["gradients"] == readme["parameters"]
    assert readme["devices"] == ["cuda:0", "cpu", *["cuda:0"] * 5]
    assert readme["forward"]["launches"] > 0 and readme["backward"]["launches"] > 0


def test_readme_first_screen_on_cuda_runs_as_written(fake_cuda: Run) -> None:
    code = first_screen("cuda") + "\nfrom fake_cuda.measure import report"
    code += "\nreport(shape=list(hidden.last_hidden_state.shape), devices=[str(x.device) for x in metrics])"
    assert fake_cuda(code) == {"shape": [4, 504, 768], "devices": ["cuda:0"] * 5}


def test_backward_on_cuda_waits_for_nothing(readme: dict[str, Any]) -> None:
    assert_waits_for_nothing(readme["backward"])


@pytest.mark.parametrize("call", ["fbank mae_ast", "fbank ssast", "fbank of whole clips"])
def test_fbank_on_cuda_with_host_lengths_waits_for_nothing(readme: dict[str, Any], call: str) -> None:
    assert readme[call]["launches"] > 0
    assert_waits_for_nothing(readme[call])


@pytest.mark.parametrize("call", ["update", "update of cuda lengths"])
def test_train_step_with_fbank_features_waits_for_nothing(readme: dict[str, Any], call: str) -> None:
    assert readme[call]["launches"] > 0
    assert_waits_for_nothing(readme[call])


def test_train_step_update_launches_triton_kernels_and_waits_for_nothing(updates: dict[str, Any]) -> None:
    for update in ("0", "1", "2", "3"):
        assert_waits_for_nothing(updates[update])
    assert any(name.startswith("triton: ") for name in updates["1"]["kernels"])
    assert updates["1"]["kernels"] == updates["2"]["kernels"] == updates["3"]["kernels"]


def test_train_step_update_of_two_micro_batches_waits_for_nothing(updates: dict[str, Any]) -> None:
    assert_waits_for_nothing(updates["micro_batches1"])
    assert updates["micro_batches1"]["launches"] > updates["1"]["launches"]


def test_train_step_graphs_record_without_illegal_calls(updates: dict[str, Any]) -> None:
    recording = updates["graphs1"]
    assert recording["illegal"] == {}
    assert sum(recording["captured"].values()) + recording["launches"] > updates["1"]["launches"]


def test_train_step_graphs_replay_in_few_launches(updates: dict[str, Any]) -> None:
    for update in ("graphs2", "graphs3"):
        replay = updates[update]
        assert_waits_for_nothing(replay)
        assert (replay["captured"], replay["kernels"]["graph"]) == ({}, 1)
        assert 10 * replay["launches"] < updates["1"]["launches"]


def test_pretrain_update_on_cuda_waits_for_nothing(fake_cuda: Run, tmp_path: Path) -> None:
    for library in TRAIN_EXTRA:
        pytest.importorskip(library)
    _, *updates = fake_cuda(PRETRAIN, str(tmp_path))["updates"]  # the first one sends fbank's constants
    assert len(updates) == 2
    for update in updates:
        assert update["launches"] > 0
        assert_waits_for_nothing(update)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
