"""The whole program under faults: processes that are killed, full disks, damaged data, readers that hang, signals.

Every run is compared with one of one process that nothing befell: the same losses, of the same clips, each update once.
What the parts do by themselves is tested with them; the results of the long tests are in docs/faults.md.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from policy import DECODER_BYTES, PROCESSES, PROCESSES_WEIGHTS, RSS_GROWTH, max_rel
from safetensors.torch import load_file
from toy_audio import write_gliding_tones

from mae_ast_fast import cli
from mae_ast_fast.checkpoints import step_folder
from mae_ast_fast.cli.parser import TRAIN_EXTRA
from mae_ast_fast.data.shards import Shards
from mae_ast_fast.training import trainer as trainer_module
from mae_ast_fast.training.lifecycle import Interrupted
from mae_ast_fast.training.metrics_log import read_metrics
from mae_ast_fast.training.options import PretrainOptions
from mae_ast_fast.training.pretrain import pretrain
from mae_ast_fast.training.trainer import Trainer

for library in TRAIN_EXTRA:
    pytest.importorskip(library)
soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RATE = 16000
STEPS = 20
SMALL = {"embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 2, "decoder_embed_dim": 32}
SMALL |= {"decoder_layers": 1, "dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "encoder_layerdrop": 0.0}

# The command, which notes what each update trains on and when it starts and ends; FAULT may be more code.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from mae_ast_fast import cli; from mae_ast_fast.training import pretrain; from mae_ast_fast.checkpoints import training
as resume

RANK, FOLDER = int(os.environ.get("RANK", "0")), Path(__file__).parent
NOTES = open(FOLDER / f"notes-{RANK}.jsonl", "a")
original = pretrain.Trainer._update

def note(**what):
    print(json.dumps({"pid": os.getpid(), "time": time.time(), **what}), file=NOTES, flush=True)

def before(trainer):
    pass

def update(trainer, batches):
    before(trainer)
    taken = []
    def spied():
        for batch, after in iter(lambda: next(batches), None):
            taken.append([batch.epoch, batch.ids.tolist()])
            yield batch, after
    original(trainer, spied())
    note(step=trainer.step, taken=taken)

pretrain.Trainer._update = update
FAULT
note(begin=True)
code = cli.main(["pretrain", *sys.argv[1:]])
note(end=code)
raise SystemExit(code)
"""

# A process kills itself before an update, once.
KILL = """
def before(trainer):
    if RANK == 1 and trainer.step == 11 and not (FOLDER / "killed").exists():
        (FOLDER / "killed").touch()
        note(killed=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""

# The write of the checkpoint of step 12 does not come to an end; those before are there.
STUCK_WRITE = """
write = resume._Writer.write_data
def stuck(writer, plan, planner):
    if writer.final.name.endswith("12"):
        writer.final.parent.joinpath("stuck").touch()
        time.sleep(600)
    return write(writer, plan, planner)
resume._Writer.write_data = stuck
"""

# Long enough for a signal to come in between.
SLOW = """
def before(trainer):
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gliding_tones(tmp_path_factory.mktemp("data") / "audio")


@pytest.fixture
def options(audio: Path, tmp_path: Path) -> PretrainOptions:
    return toy(audio, tmp_path / "run")


def toy(audio: Path, out: Path, **other: Any) -> PretrainOptions:
    given = {"steps": STEPS, "warmup_steps": 3, "batch_seconds": 24.0, "max_seconds": 3.0, "micro_batches": 4}
    given |= {"save_every": 4, "evaluate_every": 100, "log_every": 1, "precision": "fp32", "device": "cpu"}
    place = {"data": str(audio), "out": str(out), "cache": str(audio.parent / "cache"), "model_args": dict(SMALL)}
    return PretrainOptions(**{**place, **given, **other})


@dataclasses.dataclass
class Whole:
    """The run of one process that nothing befell: its rows, its weights, and what each update trained on."""

    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    taken: list[list[Any]]


@pytest.fixture(scope="module")
def whole(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    taken, original = [], Trainer._update

    def update(trainer: Trainer, batches: Iterator[Any]) -> None:
        seen = []

        def spied() -> Iterator[Any]:
            for batch, after in iter(lambda: next(batches), None):
                seen.append([batch.epoch, batch.ids.tolist()])
                yield batch, after

        original(trainer, spied())
        taken.append(seen)

    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        pretrain(toy(audio, run))
    return Whole(steps_of(run), load_file(run / "model.safetensors"), taken)


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def assert_same_run(run: Path, whole: Whole, **bounds: float) -> None:
    """Every update once, of the same clips, with the same losses and the same weights after the last."""
    found = steps_of(run)
    for name in ("step", "epoch", "clips", "tokens", "audio_seconds", "lr"):
        assert [row[name] for row in found] == [row[name] for row in whole.rows], name
    for name in ("loss", "loss_reconstruction", "loss_classification", "accuracy", "grad_norm"):
        of_both = [torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (found, whole.rows)]
        assert max_rel(*of_both) <= PROCESSES, name
    weights = load_file(run / "model.safetensors")
    assert weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        if not name.endswith("qkv.bias"):  # a part of it has gradient 0, of which AdamW makes steps of noise
            assert max_rel(weights[name], value) <= PROCESSES_WEIGHTS, name


def command(options: PretrainOptions, folder: Path, processes: int = 1, fault: str | None = None) -> list[str]:
    """The command line; with ``fault`` ("": none) through DRIVER, in ``folder``."""
    (folder / "options.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
    program = ["-m", "mae_ast_fast", "pretrain"]
    if fault is not None:
        (folder / "driver.py").write_text(DRIVER.replace("FAULT", fault))
        program = [str(folder / "driver.py")]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start += ["--max-restarts", "2"] * (fault == KILL)
    return [sys.executable, *(start if processes > 1 else []), *program, "--config", str(folder / "options.yaml")]


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "wb") as file:
        return subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)


def complete(line: list[str], log: Path, code: int = 0) -> str:
    process = start(line, log)
    try:
        assert process.wait(timeout=120) == code, log.read_text()
    finally:
        process.kill()
    return log.read_text()


def wait_until(
    true: Callable[[], Any], process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process is None or process.poll() is None, f"it ended too early\n{log.read_text()}"
        assert time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.005)


def notes(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"notes-{rank}.jsonl"
    lines = path.read_text().split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines[:-1]]  # behind the last newline a line may be half written


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# ------------------------------------------------------------------------------------------------- several processes


def test_an_epoch_is_every_window_once(whole: Whole, audio: Path) -> None:
    """Of the run that the others are compared with."""
    (folder,) = [path for path in (audio.parent / "cache/shards").iterdir() if path.is_dir()]
    found: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
    for epoch, ids in (micro_batch for update in whole.taken for micro_batch in update):
        found[epoch].update(ids)
    # Each of an update's micro-batches goes from epoch to epoch by itself.
    complete_epochs = range(min(epoch for epoch, _ in whole.taken[-1]))
    assert len(complete_epochs) > 3
    data = Shards(folder)
    for epoch in complete_epochs:
        crops = [
            crop
            for segment in data.segments("train")
            for crop in segment.crops(3 * RATE, round(0.4 * RATE), seed=0, epoch=epoch)
        ]
        assert found[epoch] == collections.Counter(data.read(crops).ids.tolist())
        assert set(found[epoch].values()) == {1}


@pytest.mark.long
def test_four_processes_are_one(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    complete(command(options, tmp_path, 4), tmp_path / "log")
    assert_same_run(Path(options.out), whole)
    summary = json.loads((Path(options.out) / "summary.json").read_text())
    assert summary["processes"] == 4 and summary["micro_batches"] == 4


@pytest.mark.ci
def test_a_killed_process_and_the_run_goes_on(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """torchrun notices that one of two is gone, and starts both again: nothing lost, nothing twice."""
    complete(command(options, tmp_path, 2, KILL), tmp_path / "log")
    assert_same_run(Path(options.out), whole)
    found = [notes(tmp_path, rank) for rank in range(2)]
    assert sum("killed" in note for note in found[1]) == 1
    for of_rank, own in zip(found, (slice(0, 2), slice(2, 4)), strict=True):
        assert sum("begin" in note for note in of_rank) == 2
        last = {note["step"]: note["taken"] for note in of_rank if "step" in note}  # that which counted
        assert [last[step] for step in range(1, STEPS + 1)] == [taken[own] for taken in whole.taken]
    began = [note["step"] for note in found[0] if "step" in note]
    assert began[:11] == list(range(1, 12)) and 4 < began[11] < 12, "from a checkpoint, not from the beginning"


@pytest.mark.ci
def test_two_then_four_then_one(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """Two, all killed while they write a checkpoint; four, stopped by SIGTERM as before a preemption; one."""
    run, log = Path(options.out), tmp_path / "log"
    torchrun = start(command(options, tmp_path, 2, STUCK_WRITE), log)
    wait_until((run / "checkpoints/stuck").exists, torchrun, log)
    pids = [note["pid"] for rank in range(2) for note in notes(tmp_path, rank) if "begin" in note]
    torchrun.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    torchrun.wait()
    assert list((run / "checkpoints").glob(".partial-*12")) and steps_of(run)[-1]["step"] >= 12
    saved = [path.name for path in step_folder.training_checkpoints(run)]
    assert saved == ["step-00000004", "step-00000008"]

    (tmp_path / "checkpoints").mkdir()
    for rank in range(2):
        (tmp_path / f"notes-{rank}.jsonl").unlink()
    torchrun = start(command(options, tmp_path, 4, SLOW), log)
    wait_until(lambda: any(note.get("step", 0) >= 11 for note in notes(tmp_path, 0)), torchrun, log)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.wait(timeout=30)  # torchrun's own deadline, behind which it kills
    assert torchrun.returncode != 0
    ends = [notes(tmp_path, rank)[-1] for rank in range(4)]
    assert [end.get("end") for end in ends] == [128 + signal.SIGTERM] * 4, log.read_text()
    assert "going on from" in log.read_text() and "step-00000008" in log.read_text()
    assert not list((run / "checkpoints").glob(".partial-*"))
    stopped = steps_of(run)[-1]["step"]
    assert step_folder.training_checkpoints(run)[-1].name == f"step-{stopped:08d}" and 11 <= stopped < STEPS

    pretrain(options)
    assert_same_run(run, whole)


@pytest.mark.ci
def test_shares_of_two_processes_go_on_in_one(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    sharded, log = dataclasses.replace(options, parallel="fsdp"), tmp_path / "log"
    torchrun = start(command(sharded, tmp_path, 2, SLOW), log)
    wait_until(lambda: any(note.get("step", 0) >= 9 for note in notes(tmp_path, 0)), torchrun, log)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.wait(timeout=30)
    stopped = steps_of(Path(options.out))[-1]["step"]
    assert 9 <= stopped < STEPS
    pretrain(options)
    assert_same_run(Path(options.out), whole)


# ------------------------------------------------------------------------------------------------------- one process


# Of the readers one stops for good, and later another is killed.
BAD_READERS = """
import functools, multiprocessing
from mae_ast_fast.data import loader
loader._POLL_SECONDS = 0.2
pretrain.loader = functools.partial(pretrain.loader, stall_seconds=1.0)
seen = set()
def before(trainer):
    if trainer.step in (6, 12):
        (pid,) = {child.pid for child in multiprocessing.active_children()} - seen
        seen.add(pid)
        os.kill(pid, signal.SIGSTOP if trainer.step == 6 else signal.SIGKILL)
        note(reader=pid)
"""

# The disk is full from some update on.
FULL_DISK = """
import resource
def before(trainer):
    if trainer.step == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
"""

# SIGTERM while the finished run is evaluated.
LATE_SIGTERM = """
def late(*inputs):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
pretrain.evaluate = late
"""

SLOW_PREPARE = """
from mae_ast_fast.data import prepare
prepare._SHARD_BYTES = (60_000, 60_000)
write = prepare._write_shard
def slow(*arguments, **options):
    write(*arguments, **options)
    time.sleep(0.3)
prepare._write_shard = slow
"""


@pytest.mark.ci
def test_readers_that_stop_or_die(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    log = complete(command(options, tmp_path, 1, BAD_READERS), tmp_path / "log")
    assert log.count("starting new workers") == 2
    assert_same_run(Path(options.out), whole)
    readers = [note["reader"] for note in notes(tmp_path, 0) if "reader" in note]
    assert len(readers) == 2 and all(gone(pid) for pid in readers), "nothing stays behind"


@pytest.mark.ci
def test_a_full_disk_ends_the_run_and_then_it_goes_on(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """And a SIGTERM in its last evaluation."""
    run = Path(options.out)
    log = complete(command(options, tmp_path, 1, FULL_DISK), tmp_path / "log", code=1)
    message = log.strip().splitlines()[-1]
    assert "error: " in message and "File too large" in message and str(run / "checkpoints/step-000000") in message
    assert "Traceback" not in log
    assert step_folder.training_checkpoints(run)[-1].name == "step-00000008"
    assert not list((run / "checkpoints").glob(".partial-*"))
    log = complete(command(options, tmp_path, 1, LATE_SIGTERM), tmp_path / "log", code=-signal.SIGTERM)
    assert "going on from" in log and "step-00000008" in log
    assert step_folder.training_checkpoints(run)[-1].name == f"step-{STEPS:08d}"
    assert not (run / "summary.json").exists()
    pretrain(options)
    assert_same_run(run, whole)
    assert (run / "summary.json").exists()


@pytest.mark.ci
def test_sigterm_while_shards_are_made(
    options: PretrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mae_ast_fast.data import prepare

    options = dataclasses.replace(options, cache=str(tmp_path / "cache"), steps=2)
    log = tmp_path / "log"
    process = start(command(options, tmp_path, 1, SLOW_PREPARE), log)

    def done() -> list[Path]:
        return sorted((tmp_path / "cache/shards").glob("*.partial/results/[!.]*.json"))

    wait_until(lambda: len(done()) >= 4, process, log)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    decoders = [int(pid) for children in threads for pid in children.read_text().split()]
    assert decoders
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == -signal.SIGTERM and not Path(options.out).exists()
    wait_until(lambda: all(map(gone, decoders)))
    before = {path.name for path in done()}
    written = []
    monkeypatch.setattr(prepare, "_SHARD_BYTES", (60_000, 60_000))
    write = prepare._write_shard
    monkeypatch.setattr(
        prepare, "_write_shard", lambda plan, shard, **rest: written.append(shard) or write(plan, shard, **rest)
    )
    pretrain(options)
    assert not {f"{shard:06d}.json" for shard in written} & before and len(written) + len(before) > 20
    assert len(steps_of(Path(options.out))) == 2


def test_sigterm_in_an_evaluation(options: PretrainOptions, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer_module.evaluate

    def evaluate(*inputs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*inputs)

    options = dataclasses.replace(options, evaluate_every=6)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="step-00000006") as stopped:
            pretrain(options)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    pretrain(options)
    assert_same_run(Path(options.out), whole)


# ------------------------------------------------------------------------------------------------------ damaged data


def test_damage_while_training(options: PretrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and flipped shards, and a manifest: the run ends as usual and says what it had to do without."""
    from mae_ast_fast.data import prepare

    monkeypatch.setattr(prepare, "_SHARD_BYTES", (200_000, 200_000))
    folder = tmp_path / "shards"
    prepare.prepare_shards(options.data, folder, progress=False)
    data = Shards(folder)
    assert len(data.shards) > 8
    by_shard = collections.defaultdict(list)
    for segment in data.segments("train"):
        by_shard[segment.shard].append(segment)
    cut, flipped, lost = [shard for shard in data.shards if len(by_shard[shard]) > 1][:3]
    last, hurt = by_shard[cut][-1], by_shard[flipped][0]
    manifest = folder / f"cuts.{lost.split('.')[1]}.jsonl.gz"
    original = Trainer._update

    def update(trainer: Trainer, batches: Any) -> None:
        if trainer.step == 3:
            os.truncate(folder / cut, last.offset + last.num_bytes // 2)
            content = bytearray((folder / flipped).read_bytes())
            content[hurt.offset + hurt.num_bytes // 2] ^= 16
            (folder / flipped).write_bytes(content)
            content = bytearray(manifest.read_bytes())
            content[len(content) // 2] ^= 16
            manifest.write_bytes(content)
        original(trainer, batches)

    monkeypatch.setattr(Trainer, "_update", update)
    summary = pretrain(dataclasses.replace(options, data=str(folder)))
    assert summary["steps"] == STEPS and np.isfinite(summary["final_loss"])
    found = summary["data"]
    assert found["unreadable_in_training"] == len(found["unreadable_names"]) > 2
    named = {line.split(":")[0] for line in found["unreadable_names"]}
    assert named == {last.name, hurt.name}
    reasons = {"cut short" if last.name in line else "damaged" for line in found["unreadable_names"]}
    assert len(reasons) == 2 and all(any(reason in line for reason in reasons) for line in found["unreadable_names"])
    assert list(found["unreadable_manifests"]) == [manifest.name]
    assert json.loads((Path(options.out) / "summary.json").read_text()) == summary
    assert sum(row["faults"] for row in steps_of(Path(options.out))) == found["unreadable_in_training"]


# ----------------------------------------------------------------------------------------------------- untrusted input


class Attack:
    """Pickled: a call that makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def run_command(options: PretrainOptions, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (folder / "options.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
    code = cli.main(["pretrain", "--config", str(folder / "options.yaml")])
    return code, capsys.readouterr().err


def test_malicious_pickles(options: PretrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In place of any file of a run, and as what a run is to start from: nothing is executed, one line says why."""
    made = tmp_path / "made"
    attack = pickle.dumps(Attack(made))
    pickle.loads(attack)
    made.rmdir()  # it is a real one
    torch.save({"args": None, "cfg": {"model": {}}, "model": Attack(made)}, tmp_path / "saved.pt")
    for name in ("evil.pt", "evil.pth"):
        for content in (attack, (tmp_path / "saved.pt").read_bytes()):
            (tmp_path / name).write_bytes(content)
            evil = dataclasses.replace(options, init_from=str(tmp_path / name), model_args={})
            code, errors = run_command(evil, tmp_path, capsys)
            lines = [line for line in errors.splitlines() if "error:" in line]
            assert code == 1 and len(lines) == 1 and "Traceback" not in errors and not made.exists()
    run = Path(options.out)
    short = dataclasses.replace(options, steps=4, save_every=2)
    pretrain(short)
    (shard,) = (run / "checkpoints/step-00000004/shards").iterdir()
    places = [path for path in (run / "checkpoints/step-00000004").glob("*.json")]
    places += [shard, shard.with_name(".metadata"), run / "options.json", run / "metrics.jsonl", run / "config.json"]
    for place in places:
        before = place.read_bytes() if place.exists() else None
        place.write_bytes(attack)
        code, errors = run_command(short, tmp_path, capsys)
        assert code in (0, 1) and "Traceback" not in errors and not made.exists(), place
        assert code == 0 or (errors.count("error:") == 1 and str(place) in errors), errors
        place.unlink(missing_ok=True)
        if before is not None:
            place.write_bytes(before)


def wav(samples: int, channels: int = 1, rate: int = RATE, stated: int | None = None) -> bytes:
    """The beginning of a WAV file of silence: as a header may state more, so may what follows be less."""
    size = 2 * samples * channels if stated is None else stated
    head = struct.pack("<4sI4s4sIHHI", b"RIFF", min(size + 36, 2**32 - 1), b"WAVE", b"fmt ", 16, 1, channels, rate)
    head += struct.pack("<IHH4sI", rate * channels * 2 % 2**32, channels * 2 % 2**16, 16, b"data", size)
    return head + bytes(2 * min(samples, 2 * RATE) * channels)


def prepare_noting_memory(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The exit code of the command, and the most memory that a decoding process took, in bytes."""
    from mae_ast_fast.data import decoder as data

    peaks, close = [0], data.Decoder.close

    def noting(decoder: data.Decoder) -> None:
        if decoder.process is not None:
            status = Path(f"/proc/{decoder.process.pid}/status").read_text()
            peaks.extend(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        close(decoder)

    with monkeypatch.context() as patch:
        patch.setattr(data.Decoder, "close", noting)
        code = cli.main(["prepare", str(source), "--out", str(out), "--workers", "1", "--format", "flac"])
    return code, max(peaks)


def test_headers_that_lie(
    audio: Path, options: PretrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each such file is left out and named, within the memory that a good one takes; training goes on without."""
    code, usual = prepare_noting_memory(audio / "voice0", tmp_path / "usual", monkeypatch)
    assert code == 0 and usual > 0
    folder = tmp_path / "set"
    shutil.copytree(audio / "voice1", folder / "good")
    soundfile.write(folder / "768k.wav", 0.1 * np.sin(np.arange(768_000) / 100), 768_000)
    soundfile.write(folder / "stated.flac", np.zeros(RATE), RATE)
    head = bytearray((folder / "stated.flac").read_bytes())
    head[21:26] = bytes([head[21] | 0x0F, 255, 255, 255, 255])  # 2^36 - 1 samples: 49 days
    (folder / "stated.flac").write_bytes(head)
    lies = {"channels0.wav": wav(RATE, channels=0), "rate.wav": wav(RATE, rate=999), "rate0.wav": wav(RATE, rate=0)}
    lies |= {
        "long.wav": wav(RATE, stated=0x7FFF_0000 - 1),
        "channels.wav": wav(1, channels=65535, stated=2**31 - 2**17),
    }
    lies |= {"empty.wav": b"", "text.flac": b"fLaC" * 99}
    for name, content in lies.items():
        (folder / name).write_bytes(content)
    capsys.readouterr()
    code, peak = prepare_noting_memory(folder, tmp_path / "out", monkeypatch)
    errors = capsys.readouterr().err
    assert code == 0 and peak - usual < DECODER_BYTES
    report = json.loads((tmp_path / "out.report.json").read_text())
    found = {name: reason for reason, finding in report["skipped"].items() for name in finding["names"]}
    assert found.keys() == {*lies, "stated.flac"} and report["clips"] == 6
    assert set(found.values()) <= {"corrupt", "truncated", "empty file", "sample rate outside 1 kHz - 768 kHz"}
    assert all(f": {reason}: " in errors for reason in found.values()), errors
    summary = pretrain(dataclasses.replace(options, data=str(folder), cache=str(tmp_path / "cache"), steps=2))
    assert sum(summary["data"]["skipped"].values()) == len(found) and summary["data"]["clips"] == 6


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", ["flac", "wav"])
def test_ten_hours(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Of silence: as FLAC a small file, as WAV one of 1.15 GB of which the disk holds nothing."""
    _, usual = prepare_noting_memory(audio / "voice0", tmp_path / "usual", monkeypatch)
    folder = tmp_path / "set"
    folder.mkdir()
    samples = 10 * 3600 * RATE
    if form == "flac":
        with soundfile.SoundFile(folder / "ten.flac", "w", RATE, 1) as file:
            for _ in range(samples // 3_600_000):
                file.write(np.zeros(3_600_000, np.int16))
    else:
        (folder / "ten.wav").write_bytes(wav(0, stated=2 * samples))
        os.truncate(folder / "ten.wav", 44 + 2 * samples)
    soundfile.write(folder / "other.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    code, peak = prepare_noting_memory(folder, tmp_path / "out", monkeypatch)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - own
    report = json.loads((tmp_path / "out.report.json").read_text())
    size = os.path.getsize(folder / f"ten.{form}")
    print(f"{form} of {size:,} bytes: decoder {usual:,} -> {peak:,} bytes, this process + {grown:,}")
    assert code == 0 and report["clips"] == 2 and report["pieces"] == 301 and not report["skipped"]
    assert max(peak - usual, grown) < DECODER_BYTES


# ------------------------------------------------------------------------------------------------------ a long while


SOAK = """
def before(trainer):
    if trainer.step % 20 == 0:
        children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
        sizes = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in ["self", *children]]
        note(at=trainer.step, rss=sizes[0], readers=sum(sizes[1:]))
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "steps", "warmed"), [(1, 2000, 500), (2, 300, 100)])
def test_memory_does_not_grow(
    options: PretrainOptions, tmp_path: Path, processes: int, steps: int, warmed: int
) -> None:
    """Some 800 epochs, with a checkpoint every 50 updates and an evaluation every 100."""
    options = dataclasses.replace(options, steps=steps, save_every=50, log_every=10)
    process = start(command(options, tmp_path, processes, SOAK), tmp_path / "log")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    for rank in range(processes):
        found = [note for note in notes(tmp_path, rank) if note.get("at", 0) >= warmed]
        steps_then = [note["at"] for note in found]
        for name in ("rss", "readers"):
            sizes = [note[name] for note in found]
            slope = 1000 * np.polyfit(steps_then, sizes, 1)[0]
            print(f"process {rank} of {processes}, {name}: {sizes[0]:,} -> {sizes[-1]:,} bytes, {slope:+,.0f} / 1,000")
            assert slope / 1000 * (steps_then[-1] - steps_then[0]) < RSS_GROWTH, (name, sizes)


@pytest.mark.long
def test_a_disk_of_a_megabyte(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """A real full disk, where this user may mount one; then it gets larger, and the run goes on."""
    run = Path(options.out)
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(run)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk here")
    try:
        log = complete(command(options, tmp_path, 1, ""), tmp_path / "log", code=1)
        message = log.strip().splitlines()[-1]
        # Whichever write is first, of the checkpoint or of the metrics. (TensorBoard's thread complains too.)
        assert "error: " in message and "No space left on device" in message and str(run) in message, log
        assert len(step_folder.training_checkpoints(run)) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(run)], check=True)
        pretrain(options)
        assert_same_run(run, whole)
    finally:
        subprocess.run(["umount", str(run)], check=True)
