"""The whole program under faults: killed processes, full disks, damaged data, hanging readers, signals.

Every run is compared with a run of one process without faults: every update once, with the same clips and losses. The
tests of each module cover its own faults. The results of the long tests are in docs/faults.md.
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
from warm import Command

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

# The command, which also logs the clips of each update and when it starts and ends. FAULT is replaced by more code.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from mae_ast_fast import cli
from mae_ast_fast.checkpoints import training as resume
from mae_ast_fast.training import trainer as module

RANK, FOLDER = int(os.environ.get("RANK", "0")), Path(__file__).parent
NOTES = open(FOLDER / f"notes-{RANK}.jsonl", "a")
original = module.Trainer._update

def note(**fields):
    print(json.dumps({"pid": os.getpid(), "time": time.time(), **fields}), file=NOTES, flush=True)

def before(trainer):
    pass

def update(trainer, batches):
    before(trainer)
    clip_ids = []
    def recorded():
        for batch, cursor in iter(lambda: next(batches), None):
            clip_ids.append([batch.epoch, batch.ids.tolist()])
            yield batch, cursor
    original(trainer, recorded())
    note(step=trainer.step, clip_ids=clip_ids)

module.Trainer._update = update
FAULT
note(begin=True)
sys.argv.insert(1, "pretrain")
code = cli.main()
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

# Writing the checkpoint of step 12 never ends; earlier ones are complete.
STUCK_WRITE = """
write = resume._Writer.write_data
def stuck(writer, plan, planner):
    if writer.folder.name.endswith("12"):
        writer.folder.parent.joinpath("stuck").touch()
        time.sleep(600)
    return write(writer, plan, planner)
resume._Writer.write_data = stuck
"""

# Slow updates, so that a signal comes in between.
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
    values = {"steps": STEPS, "warmup_steps": 3, "batch_seconds": 24.0, "max_seconds": 3.0, "micro_batches": 4}
    values |= {"save_every": 4, "evaluate_every": 100, "log_every": 1, "precision": "fp32", "device": "cpu"}
    paths = {"data": str(audio), "out": str(out), "cache": str(audio.parent / "cache"), "model_args": dict(SMALL)}
    return PretrainOptions(**{**paths, **values, **other})


@dataclasses.dataclass
class Whole:
    """The run of one process without faults: its rows, its weights, and the epoch and clips of each micro-batch."""

    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    clip_ids: list[list[Any]]


@pytest.fixture(scope="module")
def whole(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    clip_ids, original = [], Trainer._update

    def update(trainer: Trainer, batches: Iterator[Any]) -> None:
        update_clip_ids = []

        def recorded() -> Iterator[Any]:
            for batch, cursor in iter(lambda: next(batches), None):
                update_clip_ids.append([batch.epoch, batch.ids.tolist()])
                yield batch, cursor

        original(trainer, recorded())
        clip_ids.append(update_clip_ids)

    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        pretrain(toy(audio, run))
    return Whole(steps_of(run), load_file(run / "model.safetensors"), clip_ids)


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def assert_same_run(run: Path, whole: Whole) -> None:
    """Check that a run made every update once, with the same clips, losses and final weights."""
    rows = steps_of(run)
    for name in ("step", "epoch", "clips", "tokens", "audio_seconds", "lr"):
        assert [row[name] for row in rows] == [row[name] for row in whole.rows], name
    for name in ("loss", "loss_reconstruction", "loss_classification", "accuracy", "grad_norm"):
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        expected = torch.tensor([row[name] for row in whole.rows], dtype=torch.float64)
        assert max_rel(values, expected) <= PROCESSES, name
    weights = load_file(run / "model.safetensors")
    assert weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        if not name.endswith("qkv.bias"):  # a part of it has gradient 0, which AdamW turns into steps of noise
            assert max_rel(weights[name], value) <= PROCESSES_WEIGHTS, name


def command(options: PretrainOptions, folder: Path, processes: int = 1, fault: str | None = None) -> list[str]:
    """The interpreter's arguments. With ``fault`` (may be empty) it runs DRIVER, in ``folder``."""
    (folder / "options.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
    program = ["-m", "mae_ast_fast", "pretrain"]
    if fault is not None:
        (folder / "driver.py").write_text(DRIVER.replace("FAULT", fault))
        program = [str(folder / "driver.py")]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start += ["--max-restarts", "2"] * (fault == KILL)
    return [*(start if processes > 1 else []), *program, "--config", str(folder / "options.yaml")]


def start(line: list[str], log: Path) -> Command | subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if "torch.distributed.run" not in line:
        return Command(line, log, env=environment)
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, *line], stdout=file, stderr=subprocess.STDOUT, env=environment)


def complete(line: list[str], log: Path, code: int = 0) -> str:
    process = start(line, log)
    try:
        assert process.wait(timeout=120) == code, log.read_text()
    finally:
        process.kill()
    return log.read_text()


def wait_until(
    condition: Callable[[], Any], process: Command | subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, f"the process ended too early\n{log.read_text()}"
        assert time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.005)


def notes(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"notes-{rank}.jsonl"
    lines = path.read_text().split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines[:-1]]  # the text after the last newline may be incomplete


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# ------------------------------------------------------------------------------------------------- several processes


def test_epoch_contains_every_crop_once(whole: Whole, audio: Path) -> None:
    """Checks the run that the others are compared with."""
    (folder,) = [path for path in (audio.parent / "cache/shards").iterdir() if path.is_dir()]
    counts: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
    for epoch, ids in (micro_batch for update in whole.clip_ids for micro_batch in update):
        counts[epoch].update(ids)
    # Each micro-batch of an update has its own stream, which advances from epoch to epoch independently.
    complete_epochs = range(min(epoch for epoch, _ in whole.clip_ids[-1]))
    assert len(complete_epochs) > 3
    data = Shards(folder)
    for epoch in complete_epochs:
        crops = [
            crop
            for segment in data.segments("train")
            for crop in segment.crops(3 * RATE, round(0.4 * RATE), seed=0, epoch=epoch)
        ]
        assert counts[epoch] == collections.Counter(data.read(crops).ids.tolist())
        assert set(counts[epoch].values()) == {1}


@pytest.mark.long
def test_run_of_four_processes_equals_one_process(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    complete(command(options, tmp_path, 4), tmp_path / "log")
    assert_same_run(Path(options.out), whole)
    summary = json.loads((Path(options.out) / "summary.json").read_text())
    assert summary["processes"] == 4 and summary["micro_batches"] == 4


@pytest.mark.ci
def test_run_with_killed_process_is_restarted_and_equals_whole_run(
    options: PretrainOptions, whole: Whole, tmp_path: Path
) -> None:
    """torchrun notices that one of two processes is gone and restarts both: no update is lost or repeated."""
    complete(command(options, tmp_path, 2, KILL), tmp_path / "log")
    assert_same_run(Path(options.out), whole)
    notes_of_rank = [notes(tmp_path, rank) for rank in range(2)]
    assert sum("killed" in note for note in notes_of_rank[1]) == 1
    for rank_notes, local_streams in zip(notes_of_rank, (slice(0, 2), slice(2, 4)), strict=True):
        assert sum("begin" in note for note in rank_notes) == 2
        last = {note["step"]: note["clip_ids"] for note in rank_notes if "step" in note}  # the one that counted
        assert [last[step] for step in range(1, STEPS + 1)] == [clip_ids[local_streams] for clip_ids in whole.clip_ids]
    began = [note["step"] for note in notes_of_rank[0] if "step" in note]
    assert began[:11] == list(range(1, 12)) and 4 < began[11] < 12, "from a checkpoint, not from the beginning"


@pytest.mark.ci
def test_run_of_two_then_four_then_one_process_equals_whole_run(
    options: PretrainOptions, whole: Whole, tmp_path: Path
) -> None:
    """Two, killed while they write a checkpoint; then four, stopped by SIGTERM as before a preemption; then one."""
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
    torchrun.wait(timeout=30)  # torchrun kills after this time
    assert torchrun.returncode != 0
    ends = [notes(tmp_path, rank)[-1] for rank in range(4)]
    assert [end.get("end") for end in ends] == [128 + signal.SIGTERM] * 4, log.read_text()
    assert "resuming from" in log.read_text() and "step-00000008" in log.read_text()
    assert not list((run / "checkpoints").glob(".partial-*"))
    stopped = steps_of(run)[-1]["step"]
    assert step_folder.training_checkpoints(run)[-1].name == f"step-{stopped:08d}" and 11 <= stopped < STEPS

    pretrain(options)
    assert_same_run(run, whole)


@pytest.mark.ci
def test_fsdp_run_of_two_processes_resumes_in_one(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
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


# One reader stops for good, and later another one is killed.
BAD_READERS = """
import functools, multiprocessing
from mae_ast_fast.data import loader
loader._POLL_SECONDS = 0.2
module.BatchLoader = functools.partial(module.BatchLoader, stall_seconds=1.0)
known_pids = set()
def before(trainer):
    if trainer.step in (6, 12):
        (pid,) = {child.pid for child in multiprocessing.active_children()} - known_pids
        known_pids.add(pid)
        os.kill(pid, signal.SIGSTOP if trainer.step == 6 else signal.SIGKILL)
        note(reader=pid)
"""

# The disk is full from update 11 on.
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
module.evaluate = late
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
def test_run_with_stopped_or_killed_readers_equals_whole_run(
    options: PretrainOptions, whole: Whole, tmp_path: Path
) -> None:
    log = complete(command(options, tmp_path, 1, BAD_READERS), tmp_path / "log")
    assert log.count("starting new workers") == 2
    assert_same_run(Path(options.out), whole)
    readers = [note["reader"] for note in notes(tmp_path, 0) if "reader" in note]
    assert len(readers) == 2 and all(gone(pid) for pid in readers), "no reader is left running"


@pytest.mark.ci
def test_run_with_full_disk_ends_and_resumes(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """Also with a SIGTERM in its last evaluation."""
    run = Path(options.out)
    log = complete(command(options, tmp_path, 1, FULL_DISK), tmp_path / "log", code=1)
    message = log.strip().splitlines()[-1]
    assert "error: " in message and "File too large" in message and str(run / "checkpoints/step-000000") in message
    assert "Traceback" not in log
    assert step_folder.training_checkpoints(run)[-1].name == "step-00000008"
    assert not list((run / "checkpoints").glob(".partial-*"))
    log = complete(command(options, tmp_path, 1, LATE_SIGTERM), tmp_path / "log", code=-signal.SIGTERM)
    assert "resuming from" in log and "step-00000008" in log
    assert step_folder.training_checkpoints(run)[-1].name == f"step-{STEPS:08d}"
    assert not (run / "summary.json").exists()
    pretrain(options)
    assert_same_run(run, whole)
    assert (run / "summary.json").exists()


@pytest.mark.ci
def test_prepare_after_sigterm_keeps_finished_shards(
    options: PretrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mae_ast_fast.data import prepare

    options = dataclasses.replace(options, cache=str(tmp_path / "cache"), steps=2)
    log = tmp_path / "log"
    process = start(command(options, tmp_path, 1, SLOW_PREPARE), log)

    def finished() -> list[Path]:
        return sorted((tmp_path / "cache/shards").glob("*.partial/results/[!.]*.json"))

    wait_until(lambda: len(finished()) >= 4, process, log)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    decoders = [int(pid) for children in threads for pid in children.read_text().split()]
    assert decoders
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == -signal.SIGTERM and not Path(options.out).exists()
    wait_until(lambda: all(map(gone, decoders)))
    before = {path.name for path in finished()}
    written = []
    monkeypatch.setattr(prepare, "_SHARD_BYTES", (60_000, 60_000))
    write = prepare._write_shard
    monkeypatch.setattr(
        prepare, "_write_shard", lambda plan, shard, **rest: written.append(shard) or write(plan, shard, **rest)
    )
    pretrain(options)
    assert not {f"{shard:06d}.json" for shard in written} & before and len(written) + len(before) > 20
    assert len(steps_of(Path(options.out))) == 2


def test_run_with_sigterm_in_evaluation_saves_and_resumes(
    options: PretrainOptions, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_run_with_damaged_shards_skips_and_names_clips(
    options: PretrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut and flipped shards and a flipped manifest: the run ends as usual and names what it left out."""
    from mae_ast_fast.data import prepare

    monkeypatch.setattr(prepare, "_SHARD_BYTES", (200_000, 200_000))
    folder = tmp_path / "shards"
    prepare.prepare_shards(options.data, folder, progress=False)
    data = Shards(folder)
    assert len(data.shards) > 8
    by_shard = collections.defaultdict(list)
    for segment in data.segments("train"):
        by_shard[segment.shard].append(segment)
    cut_shard, flipped_shard, lost_shard = [shard for shard in data.shards if len(by_shard[shard]) > 1][:3]
    cut_segment, flipped_segment = by_shard[cut_shard][-1], by_shard[flipped_shard][0]
    manifest = folder / f"cuts.{lost_shard.split('.')[1]}.jsonl.gz"
    original = Trainer._update

    def update(trainer: Trainer, batches: Any) -> None:
        if trainer.step == 3:
            os.truncate(folder / cut_shard, cut_segment.offset + cut_segment.num_bytes // 2)
            content = bytearray((folder / flipped_shard).read_bytes())
            content[flipped_segment.offset + flipped_segment.num_bytes // 2] ^= 16
            (folder / flipped_shard).write_bytes(content)
            content = bytearray(manifest.read_bytes())
            content[len(content) // 2] ^= 16
            manifest.write_bytes(content)
        original(trainer, batches)

    monkeypatch.setattr(Trainer, "_update", update)
    summary = pretrain(dataclasses.replace(options, data=str(folder)))
    assert summary["steps"] == STEPS and np.isfinite(summary["final_loss"])
    report = summary["data"]
    assert report["unreadable_in_training"] == len(report["unreadable_names"]) > 2
    named = {line.split(":")[0] for line in report["unreadable_names"]}
    assert named == {cut_segment.name, flipped_segment.name}
    reasons = {"cut short" if cut_segment.name in line else "damaged" for line in report["unreadable_names"]}
    assert len(reasons) == 2 and all(any(reason in line for reason in reasons) for line in report["unreadable_names"])
    assert list(report["unreadable_manifests"]) == [manifest.name]
    assert json.loads((Path(options.out) / "summary.json").read_text()) == summary
    assert sum(row["faults"] for row in steps_of(Path(options.out))) == report["unreadable_in_training"]


# ----------------------------------------------------------------------------------------------------- untrusted input


class Attack:
    """Unpickling it calls os.mkdir."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def run_command(options: PretrainOptions, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (folder / "options.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
    code = cli.main(["pretrain", "--config", str(folder / "options.yaml")])
    return code, capsys.readouterr().err


def test_pretrain_malicious_pickles_are_not_executed(
    options: PretrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In target of any file of a run and as --init-from: nothing is executed, and one line says why."""
    made = tmp_path / "made"
    attack = pickle.dumps(Attack(made))
    pickle.loads(attack)
    made.rmdir()  # the attack works
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
    targets = [path for path in (run / "checkpoints/step-00000004").glob("*.json")]
    targets += [shard, shard.with_name(".metadata"), run / "options.json", run / "metrics.jsonl", run / "config.json"]
    for target in targets:
        before = target.read_bytes() if target.exists() else None
        target.write_bytes(attack)
        code, errors = run_command(short, tmp_path, capsys)
        assert code in (0, 1) and "Traceback" not in errors and not made.exists(), target
        assert code == 0 or (errors.count("error:") == 1 and str(target) in errors), errors
        target.unlink(missing_ok=True)
        if before is not None:
            target.write_bytes(before)


def wav(num_samples: int, channels: int = 1, *, rate: int = RATE, stated_bytes: int | None = None) -> bytes:
    """The first seconds of a WAV file of silence, whose header may state more bytes than the file has."""
    size = 2 * num_samples * channels if stated_bytes is None else stated_bytes
    head = struct.pack("<4sI4s4sIHHI", b"RIFF", min(size + 36, 2**32 - 1), b"WAVE", b"fmt ", 16, 1, channels, rate)
    head += struct.pack("<IHH4sI", rate * channels * 2 % 2**32, channels * 2 % 2**16, 16, b"data", size)
    return head + bytes(2 * min(num_samples, 2 * RATE) * channels)


def prepare_and_measure_memory(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Exit code of the command, and peak memory of its decoding processes in bytes."""
    from mae_ast_fast.data import decoder as data

    peaks, close = [0], data.Decoder.close

    def record_and_close(decoder: data.Decoder) -> None:
        if decoder.process is not None:
            status = Path(f"/proc/{decoder.process.pid}/status").read_text()
            peaks.extend(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        close(decoder)

    with monkeypatch.context() as patch:
        patch.setattr(data.Decoder, "close", record_and_close)
        code = cli.main(["prepare", str(source), "--out", str(out), "--workers", "1", "--format", "flac"])
    return code, max(peaks)


def test_prepare_lying_headers_are_skipped_within_memory(
    audio: Path,
    options: PretrainOptions,
    tmp_path: Path,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each such file is skipped and named without more memory than a valid one takes; training runs without it."""
    code, usual_bytes = prepare_and_measure_memory(audio / "voice0", tmp_path / "usual", monkeypatch)
    assert code == 0 and usual_bytes > 0
    folder = tmp_path / "set"
    shutil.copytree(audio / "voice1", folder / "good")
    soundfile.write(folder / "768k.wav", 0.1 * np.sin(np.arange(768_000) / 100), 768_000)
    soundfile.write(folder / "stated.flac", np.zeros(RATE), RATE)
    head = bytearray((folder / "stated.flac").read_bytes())
    head[21:26] = bytes([head[21] | 0x0F, 255, 255, 255, 255])  # 2^36 - 1 samples: 49 days
    (folder / "stated.flac").write_bytes(head)
    lies = {"channels0.wav": wav(RATE, channels=0), "rate.wav": wav(RATE, rate=999), "rate0.wav": wav(RATE, rate=0)}
    lies |= {
        "long.wav": wav(RATE, stated_bytes=0x7FFF_0000 - 1),
        "channels.wav": wav(1, channels=65535, stated_bytes=2**31 - 2**17),
    }
    lies |= {"empty.wav": b"", "text.flac": b"fLaC" * 99}
    for name, content in lies.items():
        (folder / name).write_bytes(content)
    capsys.readouterr()
    code, peak_bytes = prepare_and_measure_memory(folder, tmp_path / "out", monkeypatch)
    errors = capsys.readouterr().err
    assert code == 0 and peak_bytes - usual_bytes < DECODER_BYTES
    report = json.loads((tmp_path / "out.report.json").read_text())
    reasons = {name: reason for reason, finding in report["skipped"].items() for name in finding["names"]}
    assert reasons.keys() == {*lies, "stated.flac"} and report["clips"] == 6
    assert set(reasons.values()) <= {"corrupt", "truncated", "empty file", "sample rate outside 1 kHz - 768 kHz"}
    assert all(f": {reason}: " in errors for reason in reasons.values()), errors
    summary = pretrain(dataclasses.replace(options, data=str(folder), cache=str(tmp_path / "cache"), steps=2))
    assert sum(summary["data"]["skipped"].values()) == len(reasons) and summary["data"]["clips"] == 6


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_prepare_ten_hour_file_stays_within_memory(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Ten hours of silence: a small FLAC file, or a sparse WAV file of 1.15 GB."""
    _, usual_bytes = prepare_and_measure_memory(audio / "voice0", tmp_path / "usual", monkeypatch)
    folder = tmp_path / "set"
    folder.mkdir()
    num_samples = 10 * 3600 * RATE
    if codec == "flac":
        with soundfile.SoundFile(folder / "ten.flac", "w", RATE, 1) as file:
            for _ in range(num_samples // 3_600_000):
                file.write(np.zeros(3_600_000, np.int16))
    else:
        (folder / "ten.wav").write_bytes(wav(0, stated_bytes=2 * num_samples))
        os.truncate(folder / "ten.wav", 44 + 2 * num_samples)
    soundfile.write(folder / "other.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    code, peak_bytes = prepare_and_measure_memory(folder, tmp_path / "out", monkeypatch)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - rss_before
    report = json.loads((tmp_path / "out.report.json").read_text())
    size = os.path.getsize(folder / f"ten.{codec}")
    print(f"{codec} of {size:,} bytes: decoder {usual_bytes:,} -> {peak_bytes:,} bytes, this process + {grown_bytes:,}")
    assert code == 0 and report["clips"] == 2 and report["pieces"] == 301 and not report["skipped"]
    assert max(peak_bytes - usual_bytes, grown_bytes) < DECODER_BYTES


# ----------------------------------------------------------------------------------------------------------- long runs


SOAK = """
def before(trainer):
    if trainer.step % 20 == 0:
        children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
        sizes = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in ["self", *children]]
        note(at=trainer.step, rss=sizes[0], readers=sum(sizes[1:]))
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "steps", "warm_up_steps"), [(1, 2000, 500), (2, 300, 100)])
def test_long_run_memory_does_not_grow(
    options: PretrainOptions, tmp_path: Path, processes: int, *, steps: int, warm_up_steps: int
) -> None:
    """About 800 epochs, with a checkpoint every 50 updates and an evaluation every 100."""
    options = dataclasses.replace(options, steps=steps, save_every=50, log_every=10)
    process = start(command(options, tmp_path, processes, SOAK), tmp_path / "log")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    for rank in range(processes):
        samples = [note for note in notes(tmp_path, rank) if note.get("at", 0) >= warm_up_steps]
        sampled_steps = [note["at"] for note in samples]
        for name in ("rss", "readers"):
            sizes = [note[name] for note in samples]
            slope = 1000 * np.polyfit(sampled_steps, sizes, 1)[0]
            print(f"process {rank} of {processes}, {name}: {sizes[0]:,} -> {sizes[-1]:,} bytes, {slope:+,.0f} / 1,000")
            assert slope / 1000 * (sampled_steps[-1] - sampled_steps[0]) < RSS_GROWTH, (name, sizes)


@pytest.mark.long
def test_run_on_disk_of_a_megabyte_ends_and_resumes(options: PretrainOptions, whole: Whole, tmp_path: Path) -> None:
    """A real full disk, if this user may mount one. Then the disk gets larger, and the run resumes."""
    run = Path(options.out)
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(run)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk here")
    try:
        log = complete(command(options, tmp_path, 1, ""), tmp_path / "log", code=1)
        message = log.strip().splitlines()[-1]
        # The checkpoint or the metrics, whichever is written first. (TensorBoard's thread reports an error too.)
        assert "error: " in message and "No space left on device" in message and str(run) in message, log
        assert len(step_folder.training_checkpoints(run)) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(run)], check=True)
        pretrain(options)
        assert_same_run(run, whole)
    finally:
        subprocess.run(["umount", str(run)], check=True)
