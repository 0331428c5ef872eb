"""Processes that train together: 1, 2 and 4 of them make the same updates of the same clips."""

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

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.training.distributed import DistributedContext, world
from mae_ast_fast.training.step import MicroBatch, StepMetrics

PARTS = 4  # of every update
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


def clips(step: int) -> list[MicroBatch]:
    """The micro-batches of an update: of unequal loudness, of unequally many clips of unequal lengths, some of none."""
    generator = torch.Generator().manual_seed(step)
    parts, first = [], 0
    for place in range(PARTS):
        count = 0 if (step + place) % 5 == 1 else 1 + (2 * step + place) % 3
        frames = torch.randint(16, 81, (count,), generator=generator)
        x = torch.randn(count, int(frames.max()) if count else 0, 32, generator=generator) * (1 + place) - 4 * place
        parts.append(MicroBatch(x, frames, 7, torch.arange(first, first + count), step))
        first += count
    return parts


def one(parts: list[MicroBatch]) -> MicroBatch:
    """All clips of the parts in one."""
    longest = max(part.features.shape[1] for part in parts)
    x = [nn.functional.pad(part.features, (0, 0, 0, longest - part.features.shape[1])) for part in parts]
    ids = torch.cat([part.clip_ids for part in parts])
    return MicroBatch(torch.cat(x), torch.cat([part.lengths for part in parts]), 7, ids, parts[0].epoch)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Its state, gathered from all processes."""
    state = model.state_dict()
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


def steps_of(update: TrainStep, here: DistributedContext, steps: range, whole: bool = False) -> Tensor:
    """What updates tell, (steps, 5), of this process's micro-batches, or of one batch of all their clips."""
    own, told = PARTS // here.size, []
    for step in steps:
        parts = clips(step)
        torch.manual_seed(step)
        mine = [one(parts)] if whole else parts[here.rank * own : (here.rank + 1) * own]
        told.append(torch.stack(update.update(mine, lr=1e-3)))
    return torch.stack(told)


def run(
    model: nn.Module, here: DistributedContext, *, steps: int = 20, whole: bool = False, **how: Any
) -> dict[str, Any]:
    """What updates tell, the weights and statistics after them, and this process's number of tokens."""
    update = TrainStep(model, 1e-3, **how)
    told = steps_of(update, here, range(steps), whole)
    return {"told": told, "state": whole_state(update.model), "tokens": update.tokens}


# ------------------------------------------------------------------------------- what each of several processes does


def apart(here: DistributedContext) -> MAEAST:
    """A model whose weights and statistics differ from those of the first process."""
    model = mae_ast()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(here.rank)
    return model


def count_exchanges(here: DistributedContext) -> list[int]:
    """Gradient exchanges of each update."""
    update, counts, made = TrainStep(mae_ast(), parallel="ddp"), [], []

    def hook(state, bucket):  # DDP does not take annotations that are strings
        made.append(bucket.index())
        return allreduce_hook(state, bucket)

    update.forward.register_comm_hook(None, hook)
    for step in range(3):
        made.clear()
        steps_of(update, here, range(step, step + 1))
        counts.append(len(made))
    return counts


def find_unused(here: DistributedContext) -> str:
    model = mae_ast()
    model.left_out = nn.Linear(2, 2)
    with pytest.raises(ValueError) as caught:
        steps_of(TrainStep(model, parallel="ddp"), here, range(1))
    return str(caught.value)


def go_on(here: DistributedContext, parallel: str) -> list[Tensor]:
    """Numbers and weights of an update by a run and by two that were begun anew from its state."""
    whole = TrainStep(mae_ast(), 1e-3, parallel=parallel)
    steps_of(whole, here, range(2))
    with torch.no_grad():
        whole.model.eval()
        whole.model(clips(0)[0].features)  # an evaluation in between
        whole.model.train()
    weights, state = copy.deepcopy(get_state_dict(whole.model, whole.optimizer))
    own = copy.deepcopy(whole.state_dict())
    updates = [whole]
    for kind in ("checkpoint", "own"):
        model = mae_ast()
        with torch.no_grad():
            model.mask_token.zero_()
        update = TrainStep(model, 0.5, parallel=parallel)
        if kind == "checkpoint":
            set_state_dict(update.model, update.optimizer, model_state_dict=weights, optim_state_dict=state)
            update.restore()
        else:
            update.model.load_state_dict(weights)
            update.load_state_dict(own)
        (group,) = update.optimizer.param_groups
        assert group["lr"] is update.lr and update.lr == torch.tensor(1e-3) and group["fused"]
        updates.append(update)
    found = []
    for update in updates:
        told = steps_of(update, here, range(2, 3))
        found.append(torch.cat([told.flatten(), *(x.flatten() for x in whole_state(update.model).values())]))
    return found


def nobody_has_clips(here: DistributedContext) -> bool:
    update = TrainStep(mae_ast(), 1e-3, parallel="ddp")
    steps_of(update, here, range(1))
    before = copy.deepcopy((update.model.state_dict(), update.optimizer.state_dict()["state"]))
    told = update.update([MicroBatch(torch.zeros(0, 0, 32))] * 2)
    after = update.model.state_dict(), update.optimizer.state_dict()["state"]
    same = [torch.equal(after[0][name], value) for name, value in before[0].items()]
    same += [torch.equal(after[1][i][name], value) for i, kept in before[1].items() for name, value in kept.items()]
    return all(same) and all(number.isnan() for number in told)


def tell(here: DistributedContext) -> tuple[Any, ...]:
    values = torch.tensor([1 + here.rank, 5], dtype=torch.float64)
    total = here.sum(values)
    assert values.tolist() == [1 + here.rank, 5]  # the caller's own stay
    return here.rank, here.size, here.first, total.tolist(), here.largest(-here.rank), here.gather(f"from {here.rank}")


def compiled(here: DistributedContext) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="eager")
    return run(mae_ast(encoder_layers=1), here, steps=1, parallel="ddp", compile=True)


DROP = {"dropout": 0.1, "attention_dropout": 0.1, "encoder_layerdrop": 0.3}
CASES: dict[str, Callable[[DistributedContext], Any]] = {
    "ddp": lambda here: run(apart(here), here, parallel="ddp"),
    "fsdp": lambda here: run(apart(here), here, parallel="fsdp"),
    "ssast ddp": lambda here: run(ssast(), here, steps=6, parallel="ddp"),
    "ssast fsdp": lambda here: run(ssast(), here, steps=6, parallel="fsdp"),
    "dropout": lambda here: run(mae_ast(**DROP), here, steps=6, parallel="ddp"),
    "bf16 ddp": lambda here: run(mae_ast(), here, steps=6, precision="bf16", parallel="ddp"),
    "bf16 fsdp": lambda here: run(mae_ast(), here, steps=6, precision="bf16", parallel="fsdp"),
    "fp16": lambda here: run(mae_ast(), here, steps=6, precision="fp16", parallel="ddp"),
    "recompute": lambda here: run(mae_ast(recompute="layer", **DROP), here, steps=6, parallel="fsdp"),
    "exchanges": count_exchanges,
    "unused": find_unused,
    "go on ddp": lambda here: go_on(here, "ddp"),
    "go on fsdp": lambda here: go_on(here, "fsdp"),
    "nobody": nobody_has_clips,
    "tell": tell,
    "compiled": compiled,
}


def process(rank: int, size: int, port: int, folder: Path, cases: list[str]) -> None:
    """One of ``size`` processes, in the environment that torchrun makes; writes what the cases found."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with world("cpu", timeout=120) as here:
        torch.save({name: CASES[name](here) for name in cases}, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(size: int, folder: Path, cases: list[str]) -> list[dict[str, Any]]:
    """What each process found."""
    torch.multiprocessing.spawn(process, (size, free_port(), folder, cases), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(2, tmp_path_factory.mktemp("two"), [name for name in CASES if name != "compiled"])


@functools.cache
def alone(kind: str, whole: bool = False, **how: Any) -> dict[str, Any]:
    """The same updates by one process, of the same micro-batches or of one batch."""
    model = {"mae_ast": mae_ast, "ssast": ssast, "dropout": lambda: mae_ast(**DROP)}[kind]()
    return run(model, ALONE, whole=whole, **how)


def assert_same(found: dict[str, Any], expected: dict[str, Any], weights: bool = True) -> None:
    for index, name in enumerate(StepMetrics._fields):
        difference = max_rel(found["told"][:, index], expected["told"][:, index])
        assert difference <= PROCESSES, f"{name}: {difference}"
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        # The key part of a qkv bias has gradient 0, of which AdamW makes steps of noise.
        if weights and not name.endswith("qkv.bias"):
            assert max_rel(found["state"][name], value) <= PROCESSES_WEIGHTS, name


def assert_like_each_other(results: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        for other in results[1:]:
            assert torch.equal(other[name]["told"], results[0][name]["told"])
            for key, value in results[0][name]["state"].items():
                assert torch.equal(other[name]["state"][key], value), key


@pytest.mark.parametrize("kind", ["mae_ast", "ssast"])
def test_micro_batches_make_the_update_of_one_batch(kind: str) -> None:
    steps = 20 if kind == "mae_ast" else 6
    parts, whole = alone(kind, steps=steps), alone(kind, whole=True, steps=steps)
    assert_same(parts, whole, weights=kind == "mae_ast")
    assert parts["tokens"] == whole["tokens"], "a micro-batch without clips has no tokens"
    assert parts["state"].get("input_norm.num_batches_tracked", steps) == steps


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(two: list[dict[str, Any]], parallel: str) -> None:
    """Whatever weights and statistics the second one began with."""
    assert_same(two[0][parallel], alone("mae_ast", steps=20))
    assert_like_each_other(two, [parallel])
    assert sum(result[parallel]["tokens"] for result in two) == alone("mae_ast", steps=20)["tokens"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_ssast_as_one(two: list[dict[str, Any]], parallel: str) -> None:
    assert_same(two[0][f"ssast {parallel}"], alone("ssast", steps=6), weights=False)
    assert_like_each_other(two, [f"ssast {parallel}"])


@pytest.mark.parametrize("name", ["dropout", "recompute"])
def test_two_processes_draw_the_dropout_of_one(two: list[dict[str, Any]], name: str) -> None:
    assert_same(two[0][name], alone("dropout", steps=6))


def test_micro_batches_draw_other_dropout_and_leave_the_generator_alone() -> None:
    part = clips(0)[0]
    update = TrainStep(mae_ast(dropout=0.3), 0.0)
    seen: list[Tensor] = []
    update.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    states = []
    for parts in ([part, part], [part, part, part]):
        torch.manual_seed(3)
        update.update(parts)
        states.append(torch.get_rng_state())
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert torch.equal(*states), "one draw an update, however many micro-batches"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_processes_in_half_precision(two: list[dict[str, Any]], precision: str) -> None:
    expected = alone("mae_ast", steps=6, precision=precision)["told"]
    first = alone("mae_ast", steps=20)["told"][0]
    for number in (0, 4):  # loss and gradient norm, without the scale of fp16
        assert max_rel(expected[0, number], first[number]) <= BF16_LOSS
    names = ["bf16 ddp", "bf16 fsdp"] if precision == "bf16" else ["fp16"]
    for name in names:
        assert_like_each_other(two, [name])
        losses, of_one = two[0][name]["told"][:, 0], expected[:, 0]
        # FSDP gathers LayerNorm's weights in bf16 too.
        assert max_rel(losses, of_one) <= (BF16_LOSS if name == "bf16 fsdp" else PROCESSES)


def test_gradients_are_exchanged_once_an_update(two: list[dict[str, Any]]) -> None:
    assert two[0]["exchanges"] == [2, 1, 1], "and once before the first, for DDP to learn the graph"


def test_a_parameter_without_a_gradient_is_named(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert "left_out.weight, left_out.bias" in result["unused"] and "mask_token" not in result["unused"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_saved_state_goes_on_to_the_bit(two: list[dict[str, Any]], parallel: str) -> None:
    for result in two:
        whole, *others = result[f"go on {parallel}"]
        assert whole.isfinite().all() and all(torch.equal(whole, other) for other in others)


def test_an_update_without_any_clip_changes_nothing(two: list[dict[str, Any]]) -> None:
    assert all(result["nobody"] for result in two)


def test_what_processes_tell_each_other(two: list[dict[str, Any]]) -> None:
    both = [3.0, 10.0], 0, ["from 0", "from 1"]
    assert [result["tell"] for result in two] == [(0, 2, True, *both), (1, 2, False, *both)]
    assert tell(ALONE) == (0, 1, True, [1.0, 5.0], 0, ["from 0"])


@pytest.mark.ci
def test_four_processes_are_one(tmp_path: Path) -> None:
    cases = ["ddp", "fsdp", "ssast ddp", "dropout"]
    results = start(4, tmp_path, cases)
    for name in cases:
        kind = name if name == "dropout" else "ssast" if "ssast" in name else "mae_ast"
        expected = alone(kind, steps=20 if kind == "mae_ast" else 6)
        assert_same(results[0][name], expected, weights=kind != "ssast")
    assert_like_each_other(results, cases)


@pytest.mark.long
def test_two_processes_compile(tmp_path: Path) -> None:
    results = start(2, tmp_path, ["compiled"])
    assert_same(results[1]["compiled"], run(mae_ast(encoder_layers=1), ALONE, steps=1))


def test_a_process_started_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world("cpu") as here:
        assert here == ALONE and not dist.is_initialized()


def silent(rank: int, port: int, both: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    both.wait()
    with world("cpu", timeout=3) as here:
        if here.first:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                here.sum(torch.ones(1))
        else:
            time.sleep(5)


@pytest.mark.ci
def test_who_waits_for_a_silent_process_gives_up() -> None:
    both = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(silent, (free_port(), both), nprocs=2)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: TrainStep(mae_ast(), parallel="tp"), ["ddp, fsdp", "'tp'"]),
        (lambda: TrainStep(mae_ast(), parallel="ddp"), ["'ddp'", "torch.distributed"]),
        (lambda: TrainStep(mae_ast(), parallel="ddp", graphs=True), ["graphs", "parallel=None", "'ddp'"]),
        (lambda: TrainStep(mae_ast(), parallel="fsdp", precision="fp16"), ["fp32 and bf16", "fp16", "'ddp'"]),
        (lambda: TrainStep(mae_ast(), parallel="fsdp", compile=True), ["not compiled", "compile", "'ddp'"]),
        (lambda: TrainStep(mae_ast()).update([]), ["at least one part"]),
        (lambda: TrainStep(mae_ast())(torch.zeros(0, 16, 32)), ["at least one clip", "(0, 16, 32)"]),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_came(run: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK, got no LOCAL_RANK"), world("cpu"):
        pass
