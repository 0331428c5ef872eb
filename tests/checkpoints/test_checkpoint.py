"""Checkpoints of a training run: saving and loading, sharded or not, faults while writing, and untrusted files."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import pickle
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.checkpoints import step_folder, training
from mae_ast_fast.checkpoints.load import export, load_model
from mae_ast_fast.checkpoints.step_folder import training_checkpoints
from mae_ast_fast.checkpoints.training import TrainingCheckpoints

SIZES = {"embed_dim": 24, "num_heads": 2}
SMALL = MAEASTConfig(**SIZES, ffn_dim=36, encoder_layers=2, decoder_embed_dim=20, decoder_layers=1)
SSAST_SMALL = SSASTConfig(**SIZES, layers=1, input_frames=64, mask_patches=20)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {"step": 3, "epoch": 1, "batch": [4, 5], "seconds": 0.1, "note": "ü\n", "none": None}


def make(config: Any = SMALL, updates: int = 0, seed: int = 0, **options: Any) -> TrainStep:
    """A TrainStep after some updates."""
    torch.manual_seed(seed)
    if isinstance(config, dict):
        config = MAEASTConfig(**{**SMALL.to_dict(), **config})
    model = (MAEAST if isinstance(config, MAEASTConfig) else SSAST)(config)
    train_step = TrainStep(model.train(), **options)
    for step in range(updates):
        log_mel = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(step))
        train_step(log_mel, [64, 48], seed=step, clip_ids=torch.arange(2), lr=1e-3 * (step + 1))
    return train_step


def content(train_step: TrainStep) -> dict[str, Tensor]:
    """All tensors and numbers that a checkpoint must restore, unsharded."""
    tensors = dict(train_step.model.state_dict())
    for name, parameter in train_step.model.named_parameters():
        tensors |= {f"{name} {slot}": value for slot, value in train_step.optimizer.state[parameter].items()}
    unsharded = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    (group,) = train_step.optimizer.param_groups
    assert group["lr"] is train_step.lr, "the learning rate that __call__ fills"
    numbers = {name: torch.tensor(group[name]) for name in ("betas", "eps", "weight_decay")}
    return {name: tensor.detach().clone() for name, tensor in {**unsharded, **numbers, "lr": train_step.lr}.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def save(run: Path, train_step: TrainStep, *steps: int, keep: int = 3) -> Path:
    checkpoints = TrainingCheckpoints(run, keep)
    for step in steps:
        checkpoints.save(step, train_step, {**STATE, "step": step})
    path = checkpoints.finish()
    assert path == run / "checkpoints" / f"step-{steps[-1]:08d}"
    return path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("config", [SMALL, SSAST_SMALL], ids=["mae_ast", "ssast"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_load_restores_model_optimizer_and_state(tmp_path: Path, config: Any, precision: str) -> None:
    train_step = make(config, updates=3, precision=precision, weight_decay=0.3)
    if train_step.scaler is not None:
        train_step.scaler.update(512.0)
    checkpoints = TrainingCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest_valid() is None and checkpoints.load(train_step) is None and checkpoints.finish() is None
    assert not list(tmp_path.iterdir()), "nothing is made before the first save"
    checkpoints.save(3, train_step, STATE)
    path, expected = checkpoints.newest(), content(train_step)

    other = make(config, updates=1, seed=1, precision=precision, lr=7.0, betas=(0.5, 0.6), eps=1.0)
    fresh = make(config, seed=2, precision=precision)
    for loaded in (other, fresh):  # with a state of AdamW and without one
        addresses = {name: tensor.data_ptr() for name, tensor in loaded.model.state_dict().items()}
        reader = TrainingCheckpoints(tmp_path, keep=2)
        assert reader.latest_valid() == (path, config, STATE)
        assert reader.load(loaded) == (path, STATE)
        assert_equal(content(loaded), expected)
        assert addresses == {name: tensor.data_ptr() for name, tensor in loaded.model.state_dict().items()}
        assert loaded.optimizer.param_groups[0]["fused"] is True
        assert loaded.scaler is None or loaded.scaler.get_scale() == 512.0
    log_mel = torch.randn(2, 64, 128)
    metrics = []
    for step in (train_step, other, fresh):
        torch.manual_seed(0)  # for dropout
        metrics.append(step(log_mel, [64, 48], seed=9))
    assert metrics[0] == metrics[1] == metrics[2]
    assert_equal(content(other), content(train_step))
    assert_equal(content(fresh), content(train_step))


def test_save_later_changes_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, state = make(updates=1), {"step": 1, "list": [1]}
    expected, write = content(train_step), training._Writer.write_data

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(training._Writer, "write_data", slow)
    checkpoints = TrainingCheckpoints(tmp_path, 1)
    checkpoints.save(1, train_step, state)
    assert not training_checkpoints(tmp_path), "save does not wait for the disk"
    with torch.no_grad():
        for tensor in (
            *train_step.model.state_dict().values(),
            train_step.lr,
            *train_step.optimizer.state[train_step.model.mask_token].values(),
        ):
            tensor.zero_()
    state["list"].append(2)
    assert checkpoints.load(train_step)[1] == {"step": 1, "list": [1]}
    assert_equal(content(train_step), expected)


def test_save_keeps_only_newest_checkpoints(tmp_path: Path) -> None:
    train_step = make(updates=1)
    save(tmp_path, train_step, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(tmp_path, train_step, 3, keep=1)  # as a run does that could not read step 4
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(tmp_path, train_step, 5, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        TrainingCheckpoints(tmp_path, 0)


def test_save_same_step_replaces_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, make(updates=1), 1, keep=1)
    train_step = make(updates=2)
    save(tmp_path, train_step, 1, keep=1)
    other = make()
    TrainingCheckpoints(tmp_path, 1).load(other)
    assert_equal(content(other), content(train_step))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("config", [SMALL, SSAST_SMALL], ids=["mae_ast", "ssast"])
def test_export_training_checkpoint_writes_same_model(tmp_path: Path, config: Any) -> None:
    train_step = make(config, updates=1)
    path = save(tmp_path / "run", train_step, 1)
    expected = dict(train_step.model.state_dict())
    for source in (tmp_path / "run", path):
        model = load_model(source, impl="torch", attention="math", recompute="layer")
        assert model.config == config and not model.training
        assert (model.impl, model.attention, model.recompute) == ("torch", "math", "layer")
        assert_equal(dict(model.state_dict()), expected)
    export(path, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert_equal(dict(load_model(tmp_path / "out", recompute="gelu").state_dict()), expected)
    assert load_model(tmp_path / "out", recompute="gelu").recompute == "gelu"
    export(path, path)  # into the same folder as the shards: both stay readable
    assert_equal(dict(load_model(path).state_dict()), expected)
    assert TrainingCheckpoints(tmp_path / "run", 1).latest_valid().path == path


def test_save_tensor_in_state_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a state of plain values, got Object of type Tensor"):
        TrainingCheckpoints(tmp_path, 1).save(1, make(updates=1), {"loss": torch.zeros(())})


def test_load_other_model_or_optimizer_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, make(updates=1), 1)
    deeper, wider = {"encoder_layers": 3}, {"ffn_dim": 40}
    for config, message in (
        (deeper, r"holds another model: .*encoder.*2.* missing, nothing unexpected"),
        (wider, r"expected model\..* of \(40.*, got \(36"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingCheckpoints(tmp_path, 1).load(make(config))
    train_step = make()
    train_step.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": train_step.lr})
    with pytest.raises(ValueError, match=r"holds another optimizer: expected .*lr.*, got "):
        TrainingCheckpoints(tmp_path, 1).load(train_step)


# ---------------------------------------------------------------- several processes


class Phase(NamedTuple):
    """A call of ``run(rank, folder)`` in each of ``world_size`` processes."""

    world_size: int
    run: Callable[[int, Path], None]


def spawn(folder: Path, *phases: Phase) -> None:
    """Run the phases in turn, in the same processes, because starting a process takes seconds."""
    warm.spawn(_run_phases, (folder, phases), max(phase.world_size for phase in phases))


def _run_phases(rank: int, folder: Path, phases: tuple[Phase, ...]) -> None:
    torch.set_num_threads(1)
    for index, phase in enumerate(phases):
        if rank < phase.world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous{index}", rank=rank, world_size=phase.world_size
            )
        if rank < phase.world_size:
            phase.run(rank, folder)
        if rank < phase.world_size > 1:
            dist.destroy_process_group()


def save_sharded(rank: int, folder: Path) -> None:
    """Save, fail on a full disk in one of the processes, then skip a damaged checkpoint."""
    train_step = make(updates=2, parallel="fsdp")
    checkpoints = TrainingCheckpoints(folder / "two", 3)
    with torch.no_grad():
        train_step.model.eval()(torch.zeros(1, 64, 128))  # leaves weights unsharded, as an evaluation does
    train_step.model.train()
    checkpoints.save(2, train_step, STATE)
    expected = content(train_step)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
    train_step(torch.randn(2, 64, 128), seed=5)  # while it is being written
    path = checkpoints.finish()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(training, "crc32", full_disk)
        checkpoints.save(4, train_step, STATE)
        with pytest.raises(OSError, match=r"No space left on device.*step-00000004 could not be written by process 1"):
            checkpoints.finish()
    assert names(folder / "two") == [path.name]
    checkpoints.save(4, train_step, STATE)
    newest = checkpoints.finish()
    dist.barrier()
    if rank == 1:
        flip(newest / "shards" / "shard-00002-model-00001-of-00001.safetensors", -1)
    dist.barrier()
    assert checkpoints.load(train_step) == (path, STATE), "all processes load the same checkpoint"
    assert_equal(content(train_step), expected)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(newest)


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load_sharded(rank: int, folder: Path, *, parallel: str | None, sources: list[str], target: str | None) -> None:
    """Load the checkpoint of each source run into a new model, and save the last one in the run ``target``."""
    expected = torch.load(folder / "expected.pt")
    for source in sources:
        train_step = make(seed=1, parallel=parallel)
        assert TrainingCheckpoints(folder / source, 3).load(train_step)[1] == STATE
        assert_equal(content(train_step), expected)
    if target is not None:
        checkpoints = TrainingCheckpoints(folder / target, 3)
        checkpoints.save(3, train_step, STATE)
        checkpoints.finish()


def test_load_one_process_reads_checkpoint_of_two(tmp_path: Path) -> None:
    spawn(tmp_path, Phase(2, save_sharded))
    assert len(list((tmp_path / "two/checkpoints/step-00000002/shards").iterdir())) == 2
    load_sharded(0, tmp_path, parallel=None, sources=["two"], target=None)
    expected = torch.load(tmp_path / "expected.pt")
    weights = load_model(tmp_path / "two").state_dict()
    assert_equal(dict(weights), {name: expected[name] for name in weights})


@pytest.mark.ci
def test_load_any_number_of_processes_reads_any_checkpoint(tmp_path: Path) -> None:
    spawn(
        tmp_path,
        Phase(2, save_sharded),
        Phase(1, functools.partial(load_sharded, parallel=None, sources=["two"], target="one")),
        Phase(4, functools.partial(load_sharded, parallel="fsdp", sources=["one", "two"], target="four")),
        Phase(2, functools.partial(load_sharded, parallel="ddp", sources=["one", "two", "four"], target="ddp")),
        Phase(2, functools.partial(load_sharded, parallel="fsdp", sources=["one", "four", "ddp"], target=None)),
        Phase(1, functools.partial(load_sharded, parallel=None, sources=["four", "ddp"], target=None)),
    )
    sizes = [path.stat().st_size for path in (tmp_path / "ddp/checkpoints/step-00000003/shards").iterdir()]
    assert len(sizes) == 2 and max(sizes) < 2 * min(sizes), "tensors that both processes hold are written once"
    assert len(list((tmp_path / "four/checkpoints/step-00000003/shards").iterdir())) == 4


# ---------------------------------------------------------------- faults


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of the byte at ``offset``."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def shard(folder: Path) -> Path:
    return folder / "shards" / "shard-00001-model-00001-of-00001.safetensors"


def edit_state(folder: Path) -> None:
    path = folder / "trainer.json"
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 2'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    r"shards/shard-.* is damaged: expected the checksum \d+, got \d+": lambda p: flip(shard(p), -1),
    r"shards/.* checksum": lambda p: flip(shard(p), 20),
    r"shard-.*-00001.safetensors is damaged": lambda p: os.truncate(shard(p), shard(p).stat().st_size // 2),
    r"shard-00001-.* is damaged: expected the checksum \d+, got 0$": lambda p: os.truncate(shard(p), 0),
    r"\['shards/shard-00001.*'\] missing, none unexpected": lambda p: shard(p).unlink(),
    r"none missing, \['shards/b.safetensors'\] unexpected": lambda p: shutil.copy(shard(p), p / "shards/b.safetensors"),
    r"config.json is damaged": lambda p: flip(p / "config.json", 40),
    r"\['config.json'\] missing, none unexpected": lambda p: (p / "config.json").unlink(),
    r"trainer.json is damaged: expected the checksum": edit_state,
    r"trainer.json: Expecting value": lambda p: os.truncate(p / "trainer.json", 0),
    r"trainer.json: \[Errno 2\] No such file": lambda p: (p / "trainer.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_load_damaged_checkpoint_is_reported_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    train_step = make(updates=1)
    newest, expected = save(tmp_path, train_step, 1, 2), content(train_step)
    DAMAGES[message](newest)
    other = make(seed=1)
    assert TrainingCheckpoints(tmp_path, 2).load(other)[1]["step"] == 1
    assert_equal(content(other), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped a damaged checkpoint: step-00000002: ")
    raises_message = pytest.raises(ValueError, match=message)
    with raises_message:
        raise ValueError(line)
    if (newest / "trainer.json").exists():
        with raises_message:
            load_model(newest)
    shutil.rmtree(newest.with_name("step-00000001"))
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be read: step-00000002: "):
        TrainingCheckpoints(tmp_path, 2).latest_valid()


def reseal(folder: Path) -> None:
    """Recompute the checksums, as an attacker would."""
    path = folder / "trainer.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    files = [*(folder / "shards").glob("*.safetensors"), folder / "config.json"]
    content["files"] = {str(file.relative_to(folder)): step_folder.crc32(file) for file in files}
    path.write_text(json.dumps({"checksum": step_folder.checksum(content), **content}))


def test_load_missing_values_with_right_checksums_are_rejected(tmp_path: Path) -> None:
    """As if the file of one of several processes were missing."""
    folder = save(tmp_path, make(updates=1), 1)
    tensors = load_file(shard(folder))
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    name = "model.mask_token"
    tensors[name], offsets[name] = tensors[name][10:].clone(), {"saved_offsets": [10]}
    save_file(tensors, shard(folder), {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    reseal(folder)
    with pytest.raises(ValueError, match=r"expected the 20 values of model.mask_token, got 10"):
        TrainingCheckpoints(tmp_path, 1).load(make())
    with pytest.raises(ValueError, match=r"expected the 20 values of model.mask_token, got 10"):
        load_model(folder)


@pytest.mark.parametrize("fields", [{"ffn_dim": 2**60}, {"ffn_dim": 10**11}, {"encoder_layers": 10**9}])
def test_load_model_oversized_config_is_rejected(tmp_path: Path, fields: dict[str, int]) -> None:
    folder = save(tmp_path, make(updates=1), 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    reseal(folder)
    with pytest.raises(ValueError, match=r"holds (another model: (expected|.* has more layers)|no possible model)"):
        load_model(folder)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stage", ["data", "rest", "rename"])
def test_save_full_disk_keeps_previous_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    train_step = make(updates=1)
    save(tmp_path, train_step, 1, keep=1)
    expected = content(train_step)
    checkpoints = TrainingCheckpoints(tmp_path, 1)
    with monkeypatch.context() as patch:
        if stage == "rename":
            patch.setattr(training.os, "replace", no_space)
        else:
            patch.setattr(training, "crc32" if stage == "data" else "_fsync", no_space)
        checkpoints.save(2, train_step, STATE)
        with pytest.raises(OSError, match=r"No space left on device: .*step-00000002 could not be written") as error:
            checkpoints.finish()
    assert error.value.errno == errno.ENOSPC and names(tmp_path) == ["step-00000001"]
    assert checkpoints.finish() is None
    other = make(seed=1)
    assert checkpoints.load(other)[1]["step"] == 1
    assert_equal(content(other), expected)
    checkpoints.save(2, train_step, STATE)  # the disk has space again
    checkpoints.save(3, train_step, STATE)
    assert checkpoints.newest().name == "step-00000003" and names(tmp_path) == ["step-00000003"]


def test_save_file_size_limit_keeps_previous_checkpoints(tmp_path: Path) -> None:
    """The operating system sets the limit: the error comes from write()."""
    train_step = make(updates=1)
    size = shard(save(tmp_path, train_step, 1, keep=1)).stat().st_size
    checkpoints, limits = TrainingCheckpoints(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.save(2, train_step, STATE)  # a save that fails is reported by the next one
    checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        checkpoints.save(3, train_step, STATE)
        with pytest.raises(OSError, match=r"File too large: .*step-00000003 could not be written"):
            checkpoints.save(4, train_step, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000002"] and checkpoints.latest_valid().state == STATE


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from mae_ast_fast.checkpoints.training import TrainingCheckpoints
from test_checkpoint import LARGER, assert_equal, content, make

torch.set_num_threads(1)
root, case = Path(sys.argv[1]), sys.argv[2]
train_steps = {mark: make(LARGER if case == "timed" else {}, updates=mark) for mark in (1, 2)}
expected = {mark: content(train_step) for mark, train_step in train_steps.items()}
after = make(LARGER if case == "timed" else {})
start = TrainingCheckpoints(root / "start", 1)
start.save(1, train_steps[1], {"mark": 1})
start.finish()
run, countdown, rng = root / "run", 0, random.Random(0)

def count(event, arguments):
    global countdown
    if countdown > 0 and any(str(argument).startswith(str(run)) for argument in arguments):
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
marks, partial, killed = [], 0, True
while killed and len(marks) < (12 if case == "timed" else 1000):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(root / "start", run)
    if (child := os.fork()) == 0:
        checkpoints = TrainingCheckpoints(run, 1)
        countdown = 0 if case == "timed" else len(marks) + 1
        for step in {"new": [2], "again": [1], "timed": range(2, 10**6)}[case]:
            checkpoints.save(step, train_steps[2], {"mark": 2})
        checkpoints.finish()
        os._exit(0)
    if case == "timed":
        time.sleep(rng.uniform(0.0, 1.0))
        os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    partial += any(name.startswith(".partial") for name in os.listdir(run / "checkpoints"))
    mark = TrainingCheckpoints(run, 1).load(after)[1]["mark"]
    assert_equal(content(after), expected[mark])
    names = os.listdir(run / "checkpoints")
    assert not any(name.startswith(".") for name in names), names
    marks.append(mark)
assert case == "timed" or marks == sorted(marks) and not killed, marks
print(marks.count(1), marks.count(2), partial)
"""
LARGER = {"ffn_dim": 20_000}  # some 25 MB: the kill comes during writing


@pytest.mark.parametrize(
    "case", ["new", pytest.param("again", marks=pytest.mark.long), pytest.param("timed", marks=pytest.mark.long)]
)
def test_save_killed_at_any_instant_leaves_old_or_new_checkpoint(tmp_path: Path, case: str) -> None:
    """Kill before each open, mkdir, rename and remove of a save; "timed" kills at any time."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    output, errors = tmp_path / "output", tmp_path / "errors"
    process = warm.Command(["-c", KILLS, str(tmp_path), case], output, errors, env=environment)
    assert process.wait(timeout=200) == 0, errors.read_text()
    old, new, partial = map(int, output.read_text().split())
    assert min(new, partial) > 2 and (case == "timed" or old > 10), output.read_text()


# ---------------------------------------------------------------- untrusted files


class Attack:
    """Pickles as a call that creates a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_attack_unsafe_loaders_execute_it(tmp_path: Path) -> None:
    """Checks the check: DCP's default storage and torch.load(weights_only=False) run the attack."""
    attack = pickle.dumps(Attack(tmp_path / "marker"))
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises((dcp.api.CheckpointException, TypeError, AttributeError)):
        dcp.load({"w": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "marker").rmdir()
    torch.save(Attack(tmp_path / "marker"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    (tmp_path / "marker").rmdir()


ATTACKED_FILES = [
    ".metadata",
    "shards/.metadata",
    "shards/__0_0.distcp",
    "__0_0.distcp",
    "trainer.pt",
    "trainer.json",
    "config.json",
    str(shard(Path())),
    "model.safetensors",
    "../../model.safetensors",
]


@pytest.mark.parametrize("file", ATTACKED_FILES)
def test_load_malicious_pickle_is_not_executed(tmp_path: Path, file: str) -> None:
    marker, run, saved = tmp_path / "marker", tmp_path / "run", tmp_path / "saved.pt"
    folder = save(run, make(updates=1), 1)
    torch.save({"model": Attack(marker)}, saved)
    reads = [
        lambda: TrainingCheckpoints(run, 1).load(make()),
        lambda: load_model(run),
        lambda: export(folder, tmp_path / "out"),
        lambda: MAEAST.from_pretrained(folder),
    ]
    for attack in (pickle.dumps(Attack(marker)), saved.read_bytes()):
        (folder / file).write_bytes(attack)
        for right_checksums in (False, True):
            if right_checksums and file != "trainer.json":
                reseal(folder)
            for read in reads:
                with contextlib.suppress(ValueError):
                    read()
                assert not marker.exists()
        saved.write_bytes(attack)
        for name in ("model.pt", "model.pth"):
            with pytest.raises(ValueError, match=r"model\.pt"):
                load_model(shutil.copy(saved, tmp_path / name))
            assert not marker.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def edits(draw: st.DrawFn, size: int) -> list[tuple[int, int, int | None]]:
    """Up to 8 edits of ``size`` bytes: (offset, 0 to change, 1 to remove or 2 to insert a byte, its value)."""
    edit = st.tuples(st.integers(0, size - 1), st.integers(0, 2), st.integers(0, 255))
    return draw(st.lists(edit, min_size=1, max_size=8))


def edited(data: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(data)
    for offset, operation, value in changes:
        offset = min(offset, len(data) - 1)
        if operation == 0:
            data[offset] = value
        elif operation == 1 and len(data) > 1:
            del data[offset]
        else:
            data.insert(offset, value)
    return bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TrainStep]]:
    run = tmp_path_factory.mktemp("fuzz")
    save(run, make(updates=1), 1)
    yield run, make()
    shutil.rmtree(run)


def fuzz(pristine: tuple[Path, TrainStep], data: st.DataObject, outcomes: Counter[str]) -> None:
    """Change one file of a checkpoint, often with right checksums: it is read or rejected by a ValueError."""
    run, train_step = pristine
    folder = run / "checkpoints" / "step-00000001"
    name = data.draw(st.sampled_from(["trainer.json", "config.json", str(shard(Path()))]))
    path = folder / name
    original, trainer = path.read_bytes(), (folder / "trainer.json").read_bytes()
    # Only the header of a shard is changed: any weights are valid.
    limit = len(original) if path.suffix == ".json" else 8 + int.from_bytes(original[:8], "little")
    operation = data.draw(st.sampled_from(["edit", "cut", "replace", "value"]))
    if operation == "cut":
        changed = original[: data.draw(st.integers(0, len(original)))]
    elif operation == "replace":
        changed = data.draw(st.binary(max_size=60))
    elif operation == "value" and path.suffix == ".json":
        content = json.loads(original)
        parent = content
        while isinstance(parent, dict) and parent:
            key = data.draw(st.sampled_from(sorted(parent)))
            if not isinstance(parent[key], dict) or data.draw(st.booleans()):
                parent[key] = data.draw(JSON)
                break
            parent = parent[key]
        changed = json.dumps(content).encode()
    else:
        changed = edited(original[:limit], data.draw(edits(limit))) + original[limit:]
    try:
        path.write_bytes(changed)
        right_checksums = data.draw(st.booleans())
        if right_checksums:
            try:
                trainer_content = json.loads((folder / "trainer.json").read_bytes())
                if name == "trainer.json":
                    trainer_content.pop("checksum", None)
                    trainer_content = {"checksum": step_folder.checksum(trainer_content), **trainer_content}
                    path.write_text(json.dumps(trainer_content))
                else:
                    reseal(folder)
            except (ValueError, AttributeError, RecursionError):
                pass  # the file is no longer JSON
        for read in (lambda: TrainingCheckpoints(run, 1).load(train_step), lambda: load_model(run)):
            try:
                read()
                outcomes["read"] += 1
            except ValueError as error:
                assert len(str(error)) < 100_000
                outcomes["rejected"] += 1
    finally:
        path.write_bytes(original)
        (folder / "trainer.json").write_bytes(trainer)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_load_fuzzed_files_are_read_or_rejected(pristine: tuple[Path, TrainStep], examples: int) -> None:
    outcomes: Counter[str] = Counter()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(max_examples=examples, deadline=None, suppress_health_check=checks, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(pristine, data, outcomes)

    run()
    assert min(outcomes["rejected"], outcomes["read"]) > examples // 100, outcomes
