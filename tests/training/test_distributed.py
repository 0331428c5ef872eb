"""Distributed training: 1, 2 and 4 processes make the same updates with the same clips."""

from __future__ import annotations

import copy
import functools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy import BF16_LOSS, PROCESSES, PROCESSES_WEIGHTS, max_rel
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from warm import spawn

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.training.distributed import DistributedContext, init_distributed
from mae_ast_fast.training.step import MicroBatch, StepMetrics

MICRO_BATCHES = 4  # per update, over all processes
ALONE = DistributedContext(0, 1, torch.device("cpu"))
OFF = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0)


def mae_ast(recompute: str = "none", **fields: Any) -> MAEAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 48, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 1}
    config = MAEASTConfig(num_mel_bins=32, patch_size=(8, 8), decoder_embed_dim=16, **{**sizes, **OFF, **fields})
    return MAEAST(config, recompute=recompute).train()


def ssast() -> SSAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
    return SSAST(SSASTConfig(**sizes, input_frames=80, mask_patches=20, objective="joint_two_pass")).train()


def make_micro_batches(step: int) -> list[MicroBatch]:
    """Micro-batches of an update, with different loudness, numbers of clips and lengths; some have no clips."""
    generator = torch.Generator().manual_seed(step)
    micro_batches, first_id = [], 0
    for index in range(MICRO_BATCHES):
        count = 0 if (step + index) % 5 == 1 else 1 + (2 * step + index) % 3
        frames = torch.randint(16, 81, (count,), generator=generator)
        x = torch.randn(count, int(frames.max()) if count else 0, 32, generator=generator) * (1 + index) - 4 * index
        clip_ids = torch.arange(first_id, first_id + count)
        micro_batches.append(MicroBatch(x, frames, seed=7, clip_ids=clip_ids, epoch=step))
        first_id += count
    return micro_batches


def merge(micro_batches: list[MicroBatch]) -> MicroBatch:
    """All clips in one batch."""
    max_frames = max(micro_batch.log_mel.shape[1] for micro_batch in micro_batches)
    padded = [
        nn.functional.pad(micro_batch.log_mel, (0, 0, 0, max_frames - micro_batch.log_mel.shape[1]))
        for micro_batch in micro_batches
    ]
    return MicroBatch(
        torch.cat(padded),
        torch.cat([micro_batch.num_frames for micro_batch in micro_batches]),
        seed=7,
        clip_ids=torch.cat([micro_batch.clip_ids for micro_batch in micro_batches]),
        epoch=micro_batches[0].epoch,
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, gathered from all processes."""
    state = model.state_dict()
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


def metrics_of(update: TrainStep, dist_ctx: DistributedContext, steps: range, merged: bool = False) -> Tensor:
    """Metrics (steps, 5) of updates with this process's micro-batches, or with one batch of all clips."""
    per_process, metrics = MICRO_BATCHES // dist_ctx.world_size, []
    for step in steps:
        micro_batches = make_micro_batches(step)
        torch.manual_seed(step)
        first = dist_ctx.rank * per_process
        local = [merge(micro_batches)] if merged else micro_batches[first : first + per_process]
        metrics.append(torch.stack(update.update(local, lr=1e-3)))
    return torch.stack(metrics)


def run(
    model: nn.Module, dist_ctx: DistributedContext, *, steps: int = 20, merged: bool = False, **options: Any
) -> dict[str, Any]:
    """Metrics of updates, the weights and statistics after them, and this process's number of tokens."""
    update = TrainStep(model, 1e-3, **options)
    metrics = metrics_of(update, dist_ctx, range(steps), merged)
    return {"metrics": metrics, "state": whole_state(update.model), "tokens": update.num_tokens}


# ------------------------------------------------------------------------------- cases that each process runs


def diverged(dist_ctx: DistributedContext) -> MAEAST:
    """A model whose weights and statistics differ from those of the first process."""
    model = mae_ast()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(dist_ctx.rank)
    return model


def count_exchanges(dist_ctx: DistributedContext) -> list[int]:
    """Gradient exchanges of each update."""
    update, counts, exchanged = TrainStep(mae_ast(), parallel="ddp"), [], []

    def hook(state, bucket):  # DDP does not take annotations that are strings
        exchanged.append(bucket.index())
        return allreduce_hook(state, bucket)

    update.loss_module.register_comm_hook(None, hook)
    for step in range(3):
        exchanged.clear()
        metrics_of(update, dist_ctx, range(step, step + 1))
        counts.append(len(exchanged))
    return counts


def find_unused(dist_ctx: DistributedContext) -> str:
    model = mae_ast()
    model.left_out = nn.Linear(2, 2)
    with pytest.raises(ValueError) as caught:
        metrics_of(TrainStep(model, parallel="ddp"), dist_ctx, range(1))
    return str(caught.value)


def resume(dist_ctx: DistributedContext, parallel: str) -> list[Tensor]:
    """Metrics and weights after an update: of an uninterrupted run, and of two that were resumed from its state."""
    whole = TrainStep(mae_ast(), 1e-3, parallel=parallel)
    metrics_of(whole, dist_ctx, range(2))
    with torch.no_grad():
        whole.model.eval()
        whole.model(make_micro_batches(0)[0].log_mel)  # an evaluation in between
        whole.model.train()
    weights, optimizer_state = copy.deepcopy(get_state_dict(whole.model, whole.optimizer))
    step_state = copy.deepcopy(whole.state_dict())
    updates = [whole]
    for source in ("checkpoint", "state_dict"):
        model = mae_ast()
        with torch.no_grad():
            model.mask_token.zero_()
        update = TrainStep(model, 0.5, parallel=parallel)
        if source == "checkpoint":
            set_state_dict(update.model, update.optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
            update.restore()
        else:
            update.model.load_state_dict(weights)
            update.load_state_dict(step_state)
        (group,) = update.optimizer.param_groups
        assert group["lr"] is update.lr and update.lr == torch.tensor(1e-3) and group["fused"]
        updates.append(update)
    results = []
    for update in updates:
        metrics = metrics_of(update, dist_ctx, range(2, 3))
        results.append(torch.cat([metrics.flatten(), *(x.flatten() for x in whole_state(update.model).values())]))
    return results


def update_without_clips(dist_ctx: DistributedContext) -> bool:
    update = TrainStep(mae_ast(), 1e-3, parallel="ddp")
    metrics_of(update, dist_ctx, range(1))
    before = copy.deepcopy((update.model.state_dict(), update.optimizer.state_dict()["state"]))
    metrics = update.update([MicroBatch(torch.zeros(0, 0, 32))] * 2)
    after = update.model.state_dict(), update.optimizer.state_dict()["state"]
    same = [torch.equal(after[0][name], value) for name, value in before[0].items()]
    same += [torch.equal(after[1][i][name], value) for i, saved in before[1].items() for name, value in saved.items()]
    return all(same) and all(metric.isnan() for metric in metrics)


def communicate(dist_ctx: DistributedContext) -> tuple[Any, ...]:
    values = torch.tensor([1 + dist_ctx.rank, 5], dtype=torch.float64)
    total = dist_ctx.sum(values)
    assert values.tolist() == [1 + dist_ctx.rank, 5]  # the caller's tensor stays unchanged
    return (
        dist_ctx.rank,
        dist_ctx.world_size,
        dist_ctx.is_first,
        total.tolist(),
        dist_ctx.maximum(-dist_ctx.rank),
        dist_ctx.gather(f"from {dist_ctx.rank}"),
    )


def compiled(dist_ctx: DistributedContext) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="eager")
    return run(mae_ast(encoder_layers=1), dist_ctx, steps=1, parallel="ddp", compile=True)


DROP = {"dropout": 0.1, "attention_dropout": 0.1, "encoder_layerdrop": 0.3}
CASES: dict[str, Callable[[DistributedContext], Any]] = {
    "ddp": lambda dist_ctx: run(diverged(dist_ctx), dist_ctx, parallel="ddp"),
    "fsdp": lambda dist_ctx: run(diverged(dist_ctx), dist_ctx, parallel="fsdp"),
    "ssast ddp": lambda dist_ctx: run(ssast(), dist_ctx, steps=6, parallel="ddp"),
    "ssast fsdp": lambda dist_ctx: run(ssast(), dist_ctx, steps=6, parallel="fsdp"),
    "dropout": lambda dist_ctx: run(mae_ast(**DROP), dist_ctx, steps=6, parallel="ddp"),
    "bf16 ddp": lambda dist_ctx: run(mae_ast(), dist_ctx, steps=6, precision="bf16", parallel="ddp"),
    "bf16 fsdp": lambda dist_ctx: run(mae_ast(), dist_ctx, steps=6, precision="bf16", parallel="fsdp"),
    "fp16": lambda dist_ctx: run(mae_ast(), dist_ctx, steps=6, precision="fp16", parallel="ddp"),
    "recompute": lambda dist_ctx: run(mae_ast(recompute="layer", **DROP), dist_ctx, steps=6, parallel="fsdp"),
    "exchanges": count_exchanges,
    "unused": find_unused,
    "resume ddp": lambda dist_ctx: resume(dist_ctx, "ddp"),
    "resume fsdp": lambda dist_ctx: resume(dist_ctx, "fsdp"),
    "no clips": update_without_clips,
    "communicate": communicate,
    "compiled": compiled,
}


def process(rank: int, world_size: int, folder: Path, *, port: int, cases: list[str]) -> None:
    """Run the cases in one of ``world_size`` processes, in the environment of torchrun, and save their results."""
    torch.set_num_threads(1)
    set_torchrun_environment(rank, world_size, port)
    with init_distributed("cpu", timeout_seconds=120) as dist_ctx:
        torch.save({name: CASES[name](dist_ctx) for name in cases}, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def set_torchrun_environment(rank: int, world_size: int, port: int) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})


def start(world_size: int, folder: Path, cases: list[str]) -> list[dict[str, Any]]:
    """Results of the cases in each process."""
    run_process = functools.partial(process, port=free_port(), cases=cases)
    spawn(run_process, (world_size, folder), world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(2, tmp_path_factory.mktemp("two"), [name for name in CASES if name != "compiled"])


@functools.cache
def alone(model_name: str, merged: bool = False, **options: Any) -> dict[str, Any]:
    """The same updates in one process, with the same micro-batches or with one batch."""
    model = {"mae_ast": mae_ast, "ssast": ssast, "dropout": lambda: mae_ast(**DROP)}[model_name]()
    return run(model, ALONE, merged=merged, **options)


def assert_same(result: dict[str, Any], expected: dict[str, Any], weights: bool = True) -> None:
    for index, name in enumerate(StepMetrics._fields):
        difference = max_rel(result["metrics"][:, index], expected["metrics"][:, index])
        assert difference <= PROCESSES, f"{name}: {difference}"
    assert result["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        # The key part of a qkv bias has gradient 0, which AdamW turns into steps of noise.
        if weights and not name.endswith("qkv.bias"):
            assert max_rel(result["state"][name], value) <= PROCESSES_WEIGHTS, name


def assert_equal_in_all_processes(results: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        for other in results[1:]:
            assert torch.equal(other[name]["metrics"], results[0][name]["metrics"])
            for key, value in results[0][name]["state"].items():
                assert torch.equal(other[name]["state"][key], value), key


@pytest.mark.parametrize("model_name", ["mae_ast", "ssast"])
def test_update_of_micro_batches_equals_update_of_one_batch(model_name: str) -> None:
    steps = 20 if model_name == "mae_ast" else 6
    separate, merged = alone(model_name, steps=steps), alone(model_name, merged=True, steps=steps)
    assert_same(separate, merged, weights=model_name == "mae_ast")
    assert separate["tokens"] == merged["tokens"], "a micro-batch without clips has no tokens"
    assert separate["state"].get("input_norm.num_batches_tracked", steps) == steps


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_update_in_two_processes_equals_one_process(two_processes: list[dict[str, Any]], parallel: str) -> None:
    """The second process starts with other weights and statistics, which must have no effect."""
    assert_same(two_processes[0][parallel], alone("mae_ast", steps=20))
    assert_equal_in_all_processes(two_processes, [parallel])
    assert sum(result[parallel]["tokens"] for result in two_processes) == alone("mae_ast", steps=20)["tokens"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_update_of_ssast_in_two_processes_equals_one_process(
    two_processes: list[dict[str, Any]], parallel: str
) -> None:
    assert_same(two_processes[0][f"ssast {parallel}"], alone("ssast", steps=6), weights=False)
    assert_equal_in_all_processes(two_processes, [f"ssast {parallel}"])


@pytest.mark.parametrize("name", ["dropout", "recompute"])
def test_dropout_in_two_processes_equals_one_process(two_processes: list[dict[str, Any]], name: str) -> None:
    assert_same(two_processes[0][name], alone("dropout", steps=6))


def test_micro_batches_draw_different_dropout_and_advance_the_generator_once() -> None:
    micro_batch = make_micro_batches(0)[0]
    update = TrainStep(mae_ast(dropout=0.3), 0.0)
    inputs: list[Tensor] = []
    update.model.encoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    states = []
    for count in (2, 3):
        torch.manual_seed(3)
        update.update([micro_batch] * count)
        states.append(torch.get_rng_state())
    assert not torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[1], inputs[3])
    assert torch.equal(*states), "one draw per update for any number of micro-batches"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_update_in_half_precision_in_two_processes_equals_one_process(
    two_processes: list[dict[str, Any]], precision: str
) -> None:
    expected = alone("mae_ast", steps=6, precision=precision)["metrics"]
    first = alone("mae_ast", steps=20)["metrics"][0]
    for index in (0, 4):  # loss and gradient norm, without the scale of fp16
        assert max_rel(expected[0, index], first[index]) <= BF16_LOSS
    names = ["bf16 ddp", "bf16 fsdp"] if precision == "bf16" else ["fp16"]
    for name in names:
        assert_equal_in_all_processes(two_processes, [name])
        losses, expected_losses = two_processes[0][name]["metrics"][:, 0], expected[:, 0]
        # FSDP gathers LayerNorm's weights in bf16 too.
        assert max_rel(losses, expected_losses) <= (BF16_LOSS if name == "bf16 fsdp" else PROCESSES)


def test_ddp_exchanges_gradients_once_per_update(two_processes: list[dict[str, Any]]) -> None:
    assert two_processes[0]["exchanges"] == [2, 1, 1], "DDP builds its graph with one more before the first"


def test_ddp_parameter_without_gradient_is_named(two_processes: list[dict[str, Any]]) -> None:
    for result in two_processes:
        assert "left_out.weight, left_out.bias" in result["unused"] and "mask_token" not in result["unused"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_parallel_saved_state_continues_bit_exactly(two_processes: list[dict[str, Any]], parallel: str) -> None:
    for result in two_processes:
        whole, *others = result[f"resume {parallel}"]
        assert whole.isfinite().all() and all(torch.equal(whole, other) for other in others)


def test_update_without_any_clip_changes_nothing(two_processes: list[dict[str, Any]]) -> None:
    assert all(result["no clips"] for result in two_processes)


def test_distributed_context_sum_maximum_and_gather_combine_all_processes(two_processes: list[dict[str, Any]]) -> None:
    combined = [3.0, 10.0], 0, ["from 0", "from 1"]
    assert [result["communicate"] for result in two_processes] == [(0, 2, True, *combined), (1, 2, False, *combined)]
    assert communicate(ALONE) == (0, 1, True, [1.0, 5.0], 0, ["from 0"])


@pytest.mark.ci
def test_update_in_four_processes_equals_one_process(tmp_path: Path) -> None:
    cases = ["ddp", "fsdp", "ssast ddp", "dropout"]
    results = start(4, tmp_path, cases)
    for name in cases:
        model_name = name if name == "dropout" else "ssast" if "ssast" in name else "mae_ast"
        expected = alone(model_name, steps=20 if model_name == "mae_ast" else 6)
        assert_same(results[0][name], expected, weights=model_name != "ssast")
    assert_equal_in_all_processes(results, cases)


@pytest.mark.long
def test_compiled_update_in_two_processes_equals_one_process(tmp_path: Path) -> None:
    results = start(2, tmp_path, ["compiled"])
    assert_same(results[1]["compiled"], run(mae_ast(encoder_layers=1), ALONE, steps=1))


def test_init_distributed_single_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed("cpu") as dist_ctx:
        assert dist_ctx == ALONE and not dist.is_initialized()


def run_with_silent_process(rank: int, port: int, barrier: Any) -> None:
    set_torchrun_environment(rank, 2, port)
    barrier.wait()
    with init_distributed("cpu", timeout_seconds=3) as dist_ctx:
        if dist_ctx.is_first:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist_ctx.sum(torch.ones(1))
        else:
            time.sleep(5)


@pytest.mark.ci
def test_init_distributed_silent_process_times_out() -> None:
    barrier = torch.multiprocessing.get_context("forkserver").Barrier(2)
    spawn(run_with_silent_process, (free_port(), barrier), 2)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: TrainStep(mae_ast(), parallel="tp"), ["ddp, fsdp", "'tp'"]),
        (lambda: TrainStep(mae_ast(), parallel="ddp"), ["'ddp'", "torch.distributed"]),
        (lambda: TrainStep(mae_ast(), parallel="ddp", graphs=True), ["graphs", "parallel=None", "'ddp'"]),
        (lambda: TrainStep(mae_ast(), parallel="fsdp", precision="fp16"), ["fp32 and bf16", "fp16", "'ddp'"]),
        (lambda: TrainStep(mae_ast(), parallel="fsdp", compile=True), ["not compiled", "compile", "'ddp'"]),
        (lambda: TrainStep(mae_ast()).update([]), ["at least one micro-batch"]),
        (lambda: TrainStep(mae_ast())(torch.zeros(0, 16, 32)), ["at least one clip", "(0, 16, 32)"]),
    ],
)
def test_train_step_rejects_wrong_parallel_arguments(run: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_init_distributed_rejects_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK, got no LOCAL_RANK"), init_distributed("cpu"):
        pass
