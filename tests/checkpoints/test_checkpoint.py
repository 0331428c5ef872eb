"""Checkpoints of a run: what is saved comes back, sharded or not, and no fault leaves half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.checkpoints import step_folder
from mae_ast_fast.checkpoints import training as resume
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
    update = TrainStep(model.train(), **options)
    for step in range(updates):
        features = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(step))
        update(features, [64, 48], seed=step, clip_ids=torch.arange(2), lr=1e-3 * (step + 1))
    return update


def content(update: TrainStep) -> dict[str, Tensor]:
    """All that a checkpoint must bring back, unsharded."""
    tensors = {name: tensor for name, tensor in update.model.state_dict().items()}
    for name, parameter in update.model.named_parameters():
        tensors |= {f"{name} {slot}": value for slot, value in update.optimizer.state[parameter].items()}
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    (group,) = update.optimizer.param_groups
    assert group["lr"] is update.lr, "the rate that __call__ fills"
    numbers = {name: torch.tensor(group[name]) for name in ("betas", "eps", "weight_decay")}
    return {name: tensor.detach().clone() for name, tensor in {**whole, **numbers, "lr": update.lr}.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def save(run: Path, update: TrainStep, *steps: int, keep: int = 3) -> Path:
    checkpoints = TrainingCheckpoints(run, keep)
    for step in steps:
        checkpoints.save(step, update, {**STATE, "step": step})
    path = checkpoints.finish()
    assert path == run / "checkpoints" / f"step-{steps[-1]:08d}"
    return path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("config", [SMALL, SSAST_SMALL], ids=["mae_ast", "ssast"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_everything_comes_back(tmp_path: Path, config: Any, precision: str) -> None:
    update = make(config, updates=3, precision=precision, weight_decay=0.3)
    if update.scaler is not None:
        update.scaler.update(512.0)
    checkpoints = TrainingCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest_valid() is None and checkpoints.load(update) is None and checkpoints.finish() is None
    assert not list(tmp_path.iterdir()), "nothing is made before the first save"
    checkpoints.save(3, update, STATE)
    path, expected = checkpoints.newest(), content(update)

    other = make(config, updates=1, seed=1, precision=precision, lr=7.0, betas=(0.5, 0.6), eps=1.0)
    fresh = make(config, seed=2, precision=precision)
    for into in (other, fresh):  # with a state of AdamW and without one
        places = {name: tensor.data_ptr() for name, tensor in into.model.state_dict().items()}
        reader = TrainingCheckpoints(tmp_path, keep=2)
        assert reader.latest_valid() == (path, config, STATE)
        assert reader.load(into) == (path, STATE)
        assert_equal(content(into), expected)
        assert places == {name: tensor.data_ptr() for name, tensor in into.model.state_dict().items()}
        assert into.optimizer.param_groups[0]["fused"] is True
        assert into.scaler is None or into.scaler.get_scale() == 512.0
    features = torch.randn(2, 64, 128)
    told = []
    for each in (update, other, fresh):
        torch.manual_seed(0)  # of dropout
        told.append(each(features, [64, 48], seed=9))
    assert told[0] == told[1] == told[2]
    assert_equal(content(other), content(update))
    assert_equal(content(fresh), content(update))


def test_what_is_saved_is_of_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, state = make(updates=1), {"step": 1, "list": [1]}
    expected, write = content(update), resume._Writer.write_data

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(resume._Writer, "write_data", slow)
    checkpoints = TrainingCheckpoints(tmp_path, 1)
    checkpoints.save(1, update, state)
    assert not training_checkpoints(tmp_path), "save does not wait for the disk"
    with torch.no_grad():
        for tensor in (
            *update.model.state_dict().values(),
            update.lr,
            *update.optimizer.state[update.model.mask_token].values(),
        ):
            tensor.zero_()
    state["list"].append(2)
    assert checkpoints.load(update)[1] == {"step": 1, "list": [1]}
    assert_equal(content(update), expected)


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    update = make(updates=1)
    save(tmp_path, update, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(tmp_path, update, 3, keep=1)  # as a run does that could not read step 4
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(tmp_path, update, 5, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        TrainingCheckpoints(tmp_path, 0)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, make(updates=1), 1, keep=1)
    update = make(updates=2)
    save(tmp_path, update, 1, keep=1)
    other = make()
    TrainingCheckpoints(tmp_path, 1).load(other)
    assert_equal(content(other), content(update))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("config", [SMALL, SSAST_SMALL], ids=["mae_ast", "ssast"])
def test_model_and_export(tmp_path: Path, config: Any) -> None:
    update = make(config, updates=1)
    path = save(tmp_path / "run", update, 1)
    expected = dict(update.model.state_dict())
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
    export(path, path)  # beside the shards: both stay readable
    assert_equal(dict(load_model(path).state_dict()), expected)
    assert TrainingCheckpoints(tmp_path / "run", 1).latest_valid().path == path


def test_state_that_is_not_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a state of plain values, got Object of type Tensor"):
        TrainingCheckpoints(tmp_path, 1).save(1, make(updates=1), {"loss": torch.zeros(())})


def test_another_model_or_optimizer(tmp_path: Path) -> None:
    save(tmp_path, make(updates=1), 1)
    deeper, wider = {"encoder_layers": 3}, {"ffn_dim": 40}
    for config, words in (
        (deeper, r"of another model: .*encoder.*2.* missing, nothing unexpected"),
        (wider, r"expected model\..* of \(40.*, got \(36"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainingCheckpoints(tmp_path, 1).load(make(config))
    update = make()
    update.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": update.lr})
    with pytest.raises(ValueError, match=r"of another optimizer: expected .*lr.*, got "):
        TrainingCheckpoints(tmp_path, 1).load(update)


# ---------------------------------------------------------------- several processes


def spawn(folder: Path, *phases: tuple[Any, ...]) -> None:
    """Runs phases (number of processes, function, its arguments) one after another, in as many processes as any needs.

    One after another in the same processes, because starting one takes seconds.
    """
    multiprocessing.spawn(_run, (folder, phases), max(count for count, *_ in phases))


def _run(rank: int, folder: Path, phases: tuple[tuple[Any, ...], ...]) -> None:
    torch.set_num_threads(1)
    for index, (count, function, *arguments) in enumerate(phases):
        if rank < count > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous{index}", rank=rank, world_size=count
            )
        if rank < count:
            function(rank, folder, *arguments)
        if rank < count > 1:
            dist.destroy_process_group()


def save_sharded(rank: int, folder: Path) -> None:
    """Saves, then meets a full disk in one of the processes, then finds a damaged one."""
    update = make(updates=2, parallel="fsdp")
    checkpoints = TrainingCheckpoints(folder / "two", 3)
    with torch.no_grad():
        update.model.eval()(torch.zeros(1, 64, 128))  # leaves weights whole, as an evaluation does
    update.model.train()
    checkpoints.save(2, update, STATE)
    expected = content(update)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
    update(torch.randn(2, 64, 128), seed=5)  # while it is being written
    path = checkpoints.finish()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(resume, "crc32", full_disk)
        checkpoints.save(4, update, STATE)
        with pytest.raises(OSError, match=r"No space left on device.*step-00000004 could not be written by process 1"):
            checkpoints.finish()
    assert names(folder / "two") == [path.name]
    checkpoints.save(4, update, STATE)
    newest = checkpoints.finish()
    dist.barrier()
    if rank == 1:
        flip(newest / "shards" / "shard-00002-model-00001-of-00001.safetensors", -1)
    dist.barrier()
    assert checkpoints.load(update) == (path, STATE), "all take the same one"
    assert_equal(content(update), expected)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(newest)


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load_sharded(rank: int, folder: Path, parallel: str | None, sources: list[str], target: str | None) -> None:
    """Reads what others have written, each into another model, and writes it again."""
    expected = torch.load(folder / "expected.pt")
    for source in sources:
        update = make(seed=1, parallel=parallel)
        assert TrainingCheckpoints(folder / source, 3).load(update)[1] == STATE
        assert_equal(content(update), expected)
    if target is not None:
        checkpoints = TrainingCheckpoints(folder / target, 3)
        checkpoints.save(3, update, STATE)
        checkpoints.finish()


def test_two_processes_write_and_one_reads(tmp_path: Path) -> None:
    spawn(tmp_path, (2, save_sharded))
    assert len(list((tmp_path / "two/checkpoints/step-00000002/shards").iterdir())) == 2
    load_sharded(0, tmp_path, None, ["two"], None)
    expected = torch.load(tmp_path / "expected.pt")
    weights = load_model(tmp_path / "two").state_dict()
    assert_equal(dict(weights), {name: expected[name] for name in weights})


@pytest.mark.ci
def test_any_number_of_processes_reads_what_any_wrote(tmp_path: Path) -> None:
    spawn(
        tmp_path,
        (2, save_sharded),
        (1, load_sharded, None, ["two"], "one"),
        (4, load_sharded, "fsdp", ["one", "two"], "four"),
        (2, load_sharded, "ddp", ["one", "two", "four"], "ddp"),
        (2, load_sharded, "fsdp", ["one", "four", "ddp"], None),
        (1, load_sharded, None, ["four", "ddp"], None),
    )
    shares = [path.stat().st_size for path in (tmp_path / "ddp/checkpoints/step-00000003/shards").iterdir()]
    assert len(shares) == 2 and max(shares) < 2 * min(shares), "what both have is written once"
    assert len(list((tmp_path / "four/checkpoints/step-00000003/shards").iterdir())) == 4


# ---------------------------------------------------------------- faults


def flip(path: Path, place: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard(folder: Path) -> Path:
    return folder / "shards" / "shard-00001-model-00001-of-00001.safetensors"


def of_state(folder: Path) -> None:
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
    r"trainer.json is damaged: expected the checksum": of_state,
    r"trainer.json: Expecting value": lambda p: os.truncate(p / "trainer.json", 0),
    r"trainer.json: \[Errno 2\] No such file": lambda p: (p / "trainer.json").unlink(),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_one_is_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    update = make(updates=1)
    newest, expected = save(tmp_path, update, 1, 2), content(update)
    DAMAGES[words](newest)
    other = make(seed=1)
    assert TrainingCheckpoints(tmp_path, 2).load(other)[1]["step"] == 1
    assert_equal(content(other), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped a damaged checkpoint: step-00000002: ")
    match = pytest.raises(ValueError, match=words)
    with match:
        raise ValueError(line)
    if (newest / "trainer.json").exists():
        with match:
            load_model(newest)
    shutil.rmtree(newest.with_name("step-00000001"))
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be read: step-00000002: "):
        TrainingCheckpoints(tmp_path, 2).latest_valid()


def reseal(folder: Path) -> None:
    """Makes the checksums right again, as who wants to deceive would."""
    path = folder / "trainer.json"
    written = json.loads(path.read_text())
    del written["checksum"]
    files = [*(folder / "shards").glob("*.safetensors"), folder / "config.json"]
    written["files"] = {str(file.relative_to(folder)): step_folder.crc32(file) for file in files}
    path.write_text(json.dumps({"checksum": step_folder.checksum(written), **written}))


def test_a_hole_is_noticed_although_checksums_are_right(tmp_path: Path) -> None:
    """As if the file of one of several processes were missing."""
    folder = save(tmp_path, make(updates=1), 1)
    tensors = load_file(shard(folder))
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    name = "model.mask_token"
    tensors[name], offsets[name] = tensors[name][10:].clone(), {"saved_offsets": [10]}
    save_file(tensors, shard(folder), {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    reseal(folder)
    with pytest.raises(ValueError, match=r"10 of the 20 values of model.mask_token are there"):
        TrainingCheckpoints(tmp_path, 1).load(make())
    with pytest.raises(ValueError, match=r"10 of the 20 values of model.mask_token are there"):
        load_model(folder)


@pytest.mark.parametrize("fields", [{"ffn_dim": 2**60}, {"ffn_dim": 10**11}, {"encoder_layers": 10**9}])
def test_a_configuration_that_asks_for_too_much(tmp_path: Path, fields: dict[str, int]) -> None:
    folder = save(tmp_path, make(updates=1), 1)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **fields}))
    reseal(folder)
    with pytest.raises(ValueError, match=r"is of (another model: (expected|.* has more layers)|no possible model)"):
        load_model(folder)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["data", "rest", "rename"])
def test_a_full_disk_leaves_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    update = make(updates=1)
    save(tmp_path, update, 1, keep=1)
    expected = content(update)
    checkpoints = TrainingCheckpoints(tmp_path, 1)
    with monkeypatch.context() as patch:
        if place == "rename":
            patch.setattr(resume.os, "replace", no_space)
        else:
            patch.setattr(resume, "crc32" if place == "data" else "_flush", no_space)
        checkpoints.save(2, update, STATE)
        with pytest.raises(OSError, match=r"No space left on device: .*step-00000002 could not be written") as error:
            checkpoints.finish()
    assert error.value.errno == errno.ENOSPC and names(tmp_path) == ["step-00000001"]
    assert checkpoints.finish() is None
    other = make(seed=1)
    assert checkpoints.load(other)[1]["step"] == 1
    assert_equal(content(other), expected)
    checkpoints.save(2, update, STATE)  # there is space again
    checkpoints.save(3, update, STATE)
    assert checkpoints.newest().name == "step-00000003" and names(tmp_path) == ["step-00000003"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The limit is the system's own: the error comes from write()."""
    update = make(updates=1)
    size = shard(save(tmp_path, update, 1, keep=1)).stat().st_size
    checkpoints, limits = TrainingCheckpoints(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.save(2, update, STATE)  # the one that fails is reported by the next save
    checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        checkpoints.save(3, update, STATE)
        with pytest.raises(OSError, match=r"File too large: .*step-00000003 could not be written"):
            checkpoints.save(4, update, STATE)
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
updates = {mark: make(LARGER if case == "timed" else {}, updates=mark) for mark in (1, 2)}
expected = {mark: content(update) for mark, update in updates.items()}
after = make(LARGER if case == "timed" else {})
start = TrainingCheckpoints(root / "start", 1)
start.save(1, updates[1], {"mark": 1})
start.finish()
run, left, rng = root / "run", 0, random.Random(0)

def count(event, arguments):
    global left
    if left > 0 and any(str(argument).startswith(str(run)) for argument in arguments):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
seen, partial, killed = [], 0, True
while killed and len(seen) < (12 if case == "timed" else 1000):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(root / "start", run)
    if (child := os.fork()) == 0:
        checkpoints = TrainingCheckpoints(run, 1)
        left = 0 if case == "timed" else len(seen) + 1
        for step in {"new": [2], "again": [1], "timed": range(2, 10**6)}[case]:
            checkpoints.save(step, updates[2], {"mark": 2})
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
    seen.append(mark)
assert case == "timed" or seen == sorted(seen) and not killed, seen
print(seen.count(1), seen.count(2), partial)
"""
LARGER = {"ffn_dim": 20_000}  # some 25 MB: a kill comes while they are written


@pytest.mark.parametrize(
    "case", ["new", pytest.param("again", marks=pytest.mark.long), pytest.param("timed", marks=pytest.mark.long)]
)
def test_a_kill_at_any_instant_leaves_the_old_or_the_new_one(tmp_path: Path, case: str) -> None:
    """Before every open, mkdir, rename and remove of a save in turn, of a new step or of one again; and at any time."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    line = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path), case]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    old, new, partial = map(int, done.stdout.split())
    assert min(new, partial) > 2 and (case == "timed" or old > 10), done.stdout


# ---------------------------------------------------------------- untrusted files


class Attack:
    """Pickled: a call that makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_the_attack_is_a_real_one(tmp_path: Path) -> None:
    """The check itself: what DCP usually reads, and torch.load where it is told to, run it."""
    attack = pickle.dumps(Attack(tmp_path / "made"))
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises((dcp.api.CheckpointException, TypeError, AttributeError)):
        dcp.load({"w": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "made").rmdir()
    torch.save(Attack(tmp_path / "made"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    (tmp_path / "made").rmdir()


PLACES = [
    *(".metadata", "shards/.metadata", "shards/__0_0.distcp", "__0_0.distcp", "trainer.pt", "trainer.json"),
    *("config.json", str(shard(Path())), "model.safetensors", "../../model.safetensors"),
]


@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, place: str) -> None:
    made, run, saved = tmp_path / "made", tmp_path / "run", tmp_path / "saved.pt"
    folder = save(run, make(updates=1), 1)
    torch.save({"model": Attack(made)}, saved)
    reads = [
        lambda: TrainingCheckpoints(run, 1).load(make()),
        lambda: load_model(run),
        lambda: export(folder, tmp_path / "out"),
        lambda: MAEAST.from_pretrained(folder),
    ]
    for attack in (pickle.dumps(Attack(made)), saved.read_bytes()):
        (folder / place).write_bytes(attack)
        for right in (False, True):  # checksums
            if right and place != "trainer.json":
                reseal(folder)
            for read in reads:
                with contextlib.suppress(ValueError):
                    read()
                assert not made.exists()
        saved.write_bytes(attack)
        for name in ("model.pt", "model.pth"):
            with pytest.raises(ValueError, match=r"model\.pt"):
                load_model(shutil.copy(saved, tmp_path / name))
            assert not made.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def edits(draw: st.DrawFn, size: int) -> list[tuple[int, int, int | None]]:
    """Up to 8 bytes changed, removed or put in: place, how, with what."""
    one = st.tuples(st.integers(0, size - 1), st.integers(0, 2), st.integers(0, 255))
    return draw(st.lists(one, min_size=1, max_size=8))


def edited(data: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(data)
    for place, how, value in changes:
        place = min(place, len(data) - 1)
        if how == 0:
            data[place] = value
        elif how == 1 and len(data) > 1:
            del data[place]
        else:
            data.insert(place, value)
    return bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TrainStep]]:
    run = tmp_path_factory.mktemp("fuzz")
    save(run, make(updates=1), 1)
    yield run, make()
    shutil.rmtree(run)


def fuzz(pristine: tuple[Path, TrainStep], data: st.DataObject, outcomes: Counter[str]) -> None:
    """One file of a checkpoint changed, often with right checksums: it is read or refused by a ValueError."""
    run, update = pristine
    folder = run / "checkpoints" / "step-00000001"
    name = data.draw(st.sampled_from(["trainer.json", "config.json", str(shard(Path()))]))
    path = folder / name
    whole, trainer = path.read_bytes(), (folder / "trainer.json").read_bytes()
    # Of a shard the header: its weights may be anything.
    limit = len(whole) if path.suffix == ".json" else 8 + int.from_bytes(whole[:8], "little")
    how = data.draw(st.sampled_from(["edit", "cut", "replace", "value"]))
    if how == "cut":
        changed = whole[: data.draw(st.integers(0, len(whole)))]
    elif how == "replace":
        changed = data.draw(st.binary(max_size=60))
    elif how == "value" and path.suffix == ".json":
        content = json.loads(whole)
        where = content
        while isinstance(where, dict) and where:
            key = data.draw(st.sampled_from(sorted(where)))
            if not isinstance(where[key], dict) or data.draw(st.booleans()):
                where[key] = data.draw(JSON)
                break
            where = where[key]
        changed = json.dumps(content).encode()
    else:
        changed = edited(whole[:limit], data.draw(edits(limit))) + whole[limit:]
    try:
        path.write_bytes(changed)
        right = data.draw(st.booleans())
        if right:
            try:
                written = json.loads((folder / "trainer.json").read_bytes())
                if name == "trainer.json":
                    written.pop("checksum", None)
                    written = {"checksum": step_folder.checksum(written), **written}
                    path.write_text(json.dumps(written))
                else:
                    reseal(folder)
            except (ValueError, AttributeError, RecursionError):
                pass  # no JSON any more
        for read in (lambda: TrainingCheckpoints(run, 1).load(update), lambda: load_model(run)):
            try:
                read()
                outcomes["read"] += 1
            except ValueError as error:
                assert len(str(error)) < 100_000
                outcomes["refused"] += 1
    finally:
        path.write_bytes(whole)
        (folder / "trainer.json").write_bytes(trainer)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_any_files_are_read_or_refused(pristine: tuple[Path, TrainStep], examples: int) -> None:
    outcomes: Counter[str] = Counter()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(max_examples=examples, deadline=None, suppress_health_check=checks, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(pristine, data, outcomes)

    run()
    assert min(outcomes["refused"], outcomes["read"]) > examples // 100, outcomes
