"""Muon with AdamW: against PyTorch's own, skipped updates, micro-batches, resumed runs, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_cuda.fixture import Run
from policy import MUON, assert_rounding
from torch import Tensor, nn

from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep
from mae_ast_fast.checkpoints.training import TrainingCheckpoints
from mae_ast_fast.training.micro_batch import MicroBatch
from mae_ast_fast.training.optimizer import MuonAdamW, orthogonalize
from mae_ast_fast.training.options import PretrainOptions

OFF = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0)
NUM_FRAMES = [48, 17, 33]
OPTIONS: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}


def build(**fields: Any) -> MAEAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 48, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 1}
    config = MAEASTConfig(num_mel_bins=32, patch_size=(8, 8), decoder_embed_dim=16, **{**sizes, **OFF, **fields})
    return MAEAST(config).train()


def log_mel(seed: int = 0, num_frames: list[int] = NUM_FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(num_frames), max(num_frames), 32, generator=generator) * 3 - 4


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Muon updates."""
    layers = [*model.encoder.layers.named_parameters(prefix="encoder"), *model.decoder.layers.named_parameters()]
    return {name: parameter for name, parameter in layers if parameter.dim() == 2}


def blocks_of(name: str, weight: Tensor, num_heads: int = 2) -> list[Tensor]:
    """The blocks of a weight that Muon takes as matrices: views of it."""
    if "qkv" in name:
        return [head for part in weight.chunk(3) for head in part.chunk(num_heads)]
    return list(weight.chunk(num_heads, dim=0 if "fc2" in name else 1))


def test_muon_equals_torch_optim_muon_and_adamw() -> None:
    """Each block of a weight as a matrix of torch.optim.Muon, and all other parameters as AdamW."""
    model, other = build(), build()
    lr = torch.tensor(1e-2)
    ours = MuonAdamW(model, lr=lr, **OPTIONS)
    parts = {
        name: [nn.Parameter(block.detach().clone()) for block in blocks_of(name, weight)]
        for name, weight in matrices(other).items()
    }
    muon = torch.optim.Muon(
        [block for blocks in parts.values() for block in blocks],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    ids = {id(p) for p in matrices(other).values()}
    adamw = torch.optim.AdamW([p for p in other.parameters() if id(p) not in ids], lr=1e-2, **OPTIONS)
    assert len(ours.param_groups[1]["params"]) == len(ids) == 12
    for index in range(4):
        before = {name: [b.detach().clone() for b in blocks_of(name, p)] for name, p in matrices(model).items()}
        parts_before = {name: [block.detach().clone() for block in blocks] for name, blocks in parts.items()}
        set_gradients(model, index)
        set_gradients(other, index)
        for name, parameter in matrices(other).items():
            for block, grad in zip(parts[name], blocks_of(name, parameter.grad), strict=True):
                block.grad = grad
        ours.step()
        muon.step()
        adamw.step()
        for name, parameter in matrices(model).items():
            blocks = zip(blocks_of(name, parameter), before[name], parts[name], parts_before[name], strict=True)
            for number, (block, block_before, expected, expected_before) in enumerate(blocks):
                expected_update = expected - expected_before
                error = (block - block_before - expected_update).norm() / expected_update.norm()
                assert error <= MUON, f"block {number} of {name} in update {index}: {error:.1e}"
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        if id(expected) not in ids:
            assert_rounding(parameter, expected, name)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_orthogonalize_makes_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    x[0, 0] *= 10
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x).float()
    singular_values = (u.mT @ y @ v.mT).diagonal(dim1=1, dim2=2)
    assert ((singular_values > 0.5) & (singular_values < 1.3)).all(), singular_values
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def test_muon_grad_scale_divides_the_gradients() -> None:
    runs = []
    for scale in (1.0, 8.0):
        model = build()
        optimizer = MuonAdamW(model, lr=torch.tensor(1e-2), **OPTIONS)
        for index in range(2):
            set_gradients(model, index)
            for parameter in model.parameters():
                parameter.grad *= scale  # a power of two changes no digit
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        runs.append([*model.parameters(), *(optimizer.state[p]["momentum_buffer"] for p in matrices(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_muon_skips_updates_that_are_not_finite(precision: str) -> None:
    model = build()
    update = TrainStep(model, 1e-3, precision=precision, optimizer="muon")
    while not update(log_mel(), NUM_FRAMES).grad_norm.isfinite():  # fp16 first finds its scale
        pass
    state = {p: copy.deepcopy(value) for p, value in update.optimizer.state.items()}
    before = copy.deepcopy(list(model.parameters()))
    bad = log_mel()
    bad[1, 3] = float("nan")
    assert not update(bad, NUM_FRAMES).grad_norm.isfinite()
    assert all(torch.equal(p, expected) for p, expected in zip(model.parameters(), before, strict=True))
    for parameter, slots in state.items():
        assert all(torch.equal(update.optimizer.state[parameter][name], slots[name]) for name in slots)
    assert update(log_mel(1), NUM_FRAMES).grad_norm.isfinite()


def test_train_step_muon_learns_and_micro_batches_equal_one_batch() -> None:
    runs = []
    for sizes in ([3], [1, 2]):
        model = build()
        update = TrainStep(model, 3e-3, optimizer="muon")
        losses = []
        for index in range(12):
            parts = zip(log_mel(index % 2).split(sizes), torch.tensor(NUM_FRAMES).split(sizes), strict=True)
            ids = torch.arange(3).split(sizes)
            batches = [MicroBatch(x, n, seed=5, clip_ids=i) for (x, n), i in zip(parts, ids, strict=True)]
            losses.append(update.update(batches).loss)
        runs.append(torch.stack(losses))
    assert runs[0][-1] < 0.9 * runs[0][0]
    assert ((runs[0] - runs[1]).abs() / runs[0]).max() <= MUON  # one bf16 iteration apart


def test_train_step_muon_resumes_bit_for_bit(tmp_path: Any) -> None:
    update = TrainStep(build(), 1e-3, optimizer="muon")
    for index in range(3):
        update(log_mel(index), NUM_FRAMES, seed=index)
    checkpoints = TrainingCheckpoints(tmp_path, keep=1)
    checkpoints.save(3, update, {})
    checkpoints.finish()
    resumed = TrainStep(build(), 5e-3, optimizer="muon")
    TrainingCheckpoints(tmp_path, keep=1).load(resumed)
    for index in range(3, 6):
        losses = [step(log_mel(index), NUM_FRAMES, seed=index).loss for step in (update, resumed)]
        assert torch.equal(*losses)
    for expected, parameter in zip(update.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    with pytest.raises(ValueError, match="holds another optimizer"):
        TrainingCheckpoints(tmp_path, keep=1).load(TrainStep(build()))


def test_train_step_muon_state_dict_and_copies_continue_alike() -> None:
    update = TrainStep(build(), 1e-3, optimizer="muon")
    for index in range(2):
        update(log_mel(index), NUM_FRAMES, seed=index)
    loaded = TrainStep(copy.deepcopy(update.model), 5e-3, optimizer="muon")
    loaded.load_state_dict(copy.deepcopy(update.state_dict()))
    copied = copy.deepcopy(update)
    for index in range(2, 4):
        losses = [step(log_mel(index), NUM_FRAMES, seed=index).loss for step in (update, loaded, copied)]
        assert losses[0] == losses[1] == losses[2]
    for expected, *others in zip(*(step.model.parameters() for step in (update, loaded, copied)), strict=True):
        assert all(torch.equal(parameter, expected) for parameter in others)


def test_train_step_unknown_optimizer_or_muon_with_fsdp_raises() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        TrainStep(build(), optimizer="sgd")
    with pytest.raises(ValueError, match="splits the matrices that Muon needs whole"):
        TrainStep(build(), optimizer="muon", parallel="fsdp")
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        PretrainOptions(optimizer="sgd")
    with pytest.raises(ValueError, match="splits the matrices that muon needs whole"):
        PretrainOptions(optimizer="muon", parallel="fsdp")


LAUNCHES = """
import torch
from fake_cuda.measure import Measure, report
from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep

measured = {}
features = torch.randn(2, 192, 128).cuda()
for optimizer in ("adamw", "muon"):
    for graphs in (False, True):
        config = MAEASTConfig.preset("patch_tiny", encoder_layerdrop=0.0)
        model = MAEAST(config, impl="triton").cuda().train()
        step = TrainStep(model, precision="bf16", graphs=graphs, optimizer=optimizer)
        for index in range(3):
            with Measure() as measured[f"{optimizer} graphs" if graphs else optimizer]:
                step(features, [192, 100], lr=1e-4, seed=3)
report(**measured)
"""


@pytest.mark.ci
def test_muon_on_cuda_adds_few_launches_and_no_waits(fake_cuda: Run) -> None:
    measured = fake_cuda(LAUNCHES)
    assert 0 < measured["muon"]["launches"] - measured["adamw"]["launches"] <= 150
    for name in ("muon", "muon graphs"):
        assert (measured[name]["waits"], measured[name]["illegal"]) == ({}, {})
