"""A simulation of data-parallel steps, fitted on 1 and 2 processes and held to 4; docs/scaling.md counts with it.

python benchmarks/studies/scaling.py --fit
    measures 1 and 2 processes (gloo, one thread each, a real model on noise), writes scaling_fit.json, and what follows
    from it for 4, scaling_prediction.json
python benchmarks/studies/scaling.py --measure      measures 4, writes scaling_measured.json; fails where a prediction
                                                    is off
python benchmarks/studies/scaling.py --data         sampler, FLAC, checkpoint: scaling_data.json
python benchmarks/studies/scaling_tables.py         the tables of docs/scaling.md from these files; --check only
                                                    compares

The model. Each of n ranks computes forward and backward on its own batch. Gradients go out in buckets, in the order in
which the backward fills them, one after another, beside it: a bucket leaves when the slowest rank has filled it and the
one before has gone. The update waits for the last. n ranks on fewer processors take turns on them, and so do their
transfers where the processor itself moves the bytes (sockets); ``stolen`` says how much of a transfer it pays.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALLOWED = 0.25  # of the measured time, by which a prediction may be off

MIB = 1 << 20
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # DistributedDataParallel's
POINTS = {"patch_tiny, 1 clip": ("patch_tiny", 1), "patch_tiny, 4 clips": ("patch_tiny", 4)}
ROUNDS, WARM_UP, STEPS = 3, 3, 10
SECONDS = 10.0  # of a clip
TRANSFERS = tuple(1 << power for power in range(12, 26, 2))  # bytes of the all-reduces that the link is fitted to
CUTS, CUTS_A_SHARD = 60_000, 1000  # that the sampler is timed on
QUIET, TRIES = 0.15, 2  # processors' worth that others may take from us while we measure; attempts at a round


# ---------------------------------------------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Step:
    """What a rank does in a step when it has a processor to itself.

    Attributes:
        forward: Seconds.
        backward: Seconds, in which gradients appear evenly.
        update: Seconds after the gradients are there.
        buckets: Bytes, in the order in which the backward fills them.
        spread: Standard deviation of a rank's forward and backward, over its mean.
    """

    forward: float
    backward: float
    update: float
    buckets: tuple[int, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Attributes:
        hop: Seconds of latency of a message.
        rate: Bytes a second that a rank sends while it receives as many.
        tree: Latencies of an all-reduce are those of a tree, as NCCL takes between nodes; else of a ring, as gloo.
        stolen: Processor time of a transfer, of its duration.
    """

    hop: float
    rate: float
    tree: bool = False
    stolen: float = 0.0


def buckets(size: int) -> tuple[int, ...]:
    """Sizes of DDP's buckets for so many bytes of gradients."""
    rest = size - min(size, FIRST_BUCKET)
    full, last = divmod(rest, BUCKET)
    return (size - rest, *[BUCKET] * full, *([last] if last else []))


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """Latencies, and 2 (n - 1) / n of the bytes through each rank's link."""
    if ranks == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(ranks)) if link.tree else 2 * (ranks - 1)
    return hops * link.hop + 2 * (ranks - 1) / ranks * size / link.rate


def simulate(step: Step, ranks: int, link: Link, processors: int | None = None, draws: int = 200) -> float:
    """Seconds of a step of ``ranks``, the median over draws of who is slow; ``processors``: None, one for each rank."""
    processors = ranks if processors is None else min(processors, ranks)
    turns = ranks / processors
    lateness = np.exp(step.spread * np.random.default_rng(0).standard_normal((draws, ranks)))
    # Ranks on one processor take turns, so that what the others do there counts too.
    busy = np.stack([lateness[:, place::processors].sum(1) for place in range(processors)], 1).max(1)
    transfers = [turns * all_reduce_seconds(size, ranks, link) for size in step.buckets]
    began = step.forward * busy
    ended = began + step.backward * busy + link.stolen * sum(transfers)
    filled = np.cumsum(step.buckets) / sum(step.buckets)
    sent = np.zeros(draws)
    for share, transfer in zip(filled, transfers, strict=True):
        sent = np.maximum(sent, began + share * (ended - began)) + max(0.0, 1.0 - link.stolen) * transfer
    return float(np.median(np.maximum(sent, ended))) + turns * step.update


# ------------------------------------------------------------------------------------- measured: 1, 2, 4 processes


def rank_of_a_run(preset: str, clips: int, target: str) -> None:
    """What each process of a round does; started by torchrun. The first writes all ranks' samples to ``target``."""
    import torch
    import torch.distributed as dist

    from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    config = MAEASTConfig.preset(preset, encoder_layerdrop=0.0)
    frames = round(100 * SECONDS)
    features = torch.randn(clips, frames, config.num_mel_bins)
    calls: dict[str, Callable[[], object]] = {}
    models = {"alone": TrainStep(MAEAST(config, impl="torch").train())}
    if ranks > 1:
        models["together"] = TrainStep(MAEAST(config, impl="torch").train(), parallel="ddp")
    for name, update in models.items():
        calls[name] = lambda update=update: update(features)
    for size in TRANSFERS if ranks > 1 else ():
        tensor = torch.ones(size // 4)
        calls[f"all-reduce {size}"] = lambda tensor=tensor: dist.all_reduce(tensor)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            start = time.perf_counter(), machine_seconds(), time.process_time()
        for name, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            call()
            if number >= WARM_UP:
                samples[name].append(time.perf_counter() - began)
    end = time.perf_counter(), machine_seconds(), time.process_time()
    wall, machine, own = (after - before for before, after in zip(start, end, strict=True))
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (samples, own))
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in models["alone"].model.parameters())
        told = {"parameters": parameters, "samples": {name: [each[name] for each, _ in gathered] for name in samples}}
        told["processors_of_others"] = (machine - sum(seconds for _, seconds in gathered)) / wall
        Path(target).write_text(json.dumps(told))
    dist.destroy_process_group()


def machine_seconds() -> float:
    """That all processors of this machine have worked so far, for whomever."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure_round(ranks: int, preset: str, clips: int) -> dict[str, Any]:
    """Samples of a run; again where others took processors that it wanted, at the last attempt whatever they did."""
    free = max(0, os.cpu_count() - ranks)
    for attempt in range(1, TRIES + 1):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "told.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            words = [__file__, "--rank-of", preset, str(clips), str(target)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            subprocess.run([sys.executable, *launcher, *words], check=True, env=environment)
            told = json.loads(target.read_text())
        others = told["processors_of_others"]
        told |= {"attempt": attempt, "load_average": os.getloadavg()}
        print(f"{ranks} processes, {preset}, {clips} clips: others kept {others:.2f} processors busy", flush=True)
        if others <= free + QUIET:
            break
    return told


def middle(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """The median over rounds of the median over steps of the slowest rank's seconds."""
    steps = [[max(ranks) for ranks in zip(*told["samples"][name], strict=True)] for told in rounds]
    return statistics.median(statistics.median(seconds) for seconds in steps)


def quick(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """The lower quartile of all rounds' steps, of the slowest rank's seconds."""
    steps = [max(ranks) for told in rounds for ranks in zip(*told["samples"][name], strict=True)]
    return statistics.quantiles(steps, n=4)[0]


def each_rank(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """The median over rounds of the mean over ranks of each one's median seconds."""
    return statistics.median(
        statistics.fmean(statistics.median(rank) for rank in told["samples"][name]) for told in rounds
    )


def spread(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """Standard deviation of a step around its rank's median, over that, from the quartiles: a hiccup is no spread."""
    values = [second / statistics.median(rank) for told in rounds for rank in told["samples"][name] for second in rank]
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349


def fit(measured: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """From rounds of 1 and 2 processes, what ``simulate`` needs, point by point.

    ``hop`` and ``rate`` from all-reduces of several sizes between 2, by least squares of the relative error;
    ``contention``, the slowdown of 2 that compute side by side and exchange nothing; ``stolen`` so that the simulated
    step of 2 is the measured one.
    """
    found = {}
    for point, rounds in measured.items():
        one, two = rounds["1"], rounds["2"]
        # The lower quartile: what comes between two processes that wait for each other only ever adds.
        seconds = np.array([quick(two, f"all-reduce {size}") for size in TRANSFERS])
        # Of 2 ranks: two hops, and as many bytes as the tensor has. Divided by the seconds: relative errors.
        columns = np.stack([np.full(len(seconds), 2.0), np.array(TRANSFERS, float)], 1) / seconds[:, None]
        hop, byte = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
        alone = each_rank(one, "alone")
        told = {"alone": alone, "contention": max(1.0, each_rank(two, "alone") / alone), "spread": spread(two, "alone")}
        told |= {"hop": max(0.0, float(hop)), "rate": 1.0 / float(byte), "parameters": one[0]["parameters"]}
        together = middle(two, "together")
        low, high = 0.0, 100.0
        for _ in range(60):
            told["stolen"] = (low + high) / 2
            low, high = (told["stolen"], high) if predict(told, 2, 2) < together else (low, told["stolen"])
        found[point] = told | {"together": together, "simulated": predict(told, 2, 2)}
    return found


def predict(fitted: dict[str, float], ranks: int, processors: int) -> float:
    """Seconds of a step of so many processes on so many processors, from what ``fit`` found."""
    seconds = fitted["alone"] * fitted["contention"]
    step = Step(seconds / 3, seconds * 2 / 3, 0.0, buckets(4 * int(fitted["parameters"])), fitted["spread"])
    return simulate(step, ranks, Link(fitted["hop"], fitted["rate"], stolen=fitted["stolen"]), processors)


def errors(predicted: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each point, predicted and measured seconds of a step of 4, and by how much of the latter they differ."""
    told = {}
    for point, value in predicted["seconds"].items():
        seconds = middle(rounds[point], "together")
        told[point] = {"predicted": value, "measured": seconds, "error": value / seconds - 1.0}
    return told


def circumstances() -> dict[str, Any]:
    """Machine and commit, as the other benchmarks record them."""
    import torch
    from conftest import pytest_benchmark_generate_commit_info, pytest_benchmark_generate_machine_info

    torch.set_num_threads(1)
    return {
        "machine_info": pytest_benchmark_generate_machine_info(),
        "commit_info": pytest_benchmark_generate_commit_info(),
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def result(name: str) -> dict[str, Any] | None:
    """A file of results; None: not measured yet."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def run_fit() -> None:
    """Measures 1 and 2 processes in turns; writes the fit and what it predicts for 4."""
    about = circumstances()
    measured: dict[str, Any] = {point: {"1": [], "2": []} for point in POINTS}
    for _ in range(ROUNDS):
        for point, settings in POINTS.items():
            for ranks in (1, 2):
                measured[point][str(ranks)].append(measure_round(ranks, *settings))
    found, processors = fit(measured), os.cpu_count()
    write_result("scaling_fit.json", {**about, "processors": processors, "fitted": found, "rounds": measured})
    seconds = {point: predict(values, 4, processors) for point, values in found.items()}
    write_result("scaling_prediction.json", {**about, "processes": 4, "processors": processors, "seconds": seconds})
    print(json.dumps({"fitted": found, "predicted for 4": seconds}, indent=1))


def run_measure() -> int:
    """Measures 4 processes; whether every prediction holds."""
    predicted = result("scaling_prediction.json")
    if predicted is None:
        raise ValueError("expected benchmarks/results/scaling_prediction.json: run --fit first, and commit it")
    about = circumstances()
    rounds: dict[str, Any] = {point: [] for point in POINTS}
    for _ in range(ROUNDS):
        for point, settings in POINTS.items():
            rounds[point].append(measure_round(4, *settings))
    told = errors(predicted, rounds)
    write_result("scaling_measured.json", {**about, "processes": 4, "errors": told, "rounds": rounds})
    print(json.dumps(told, indent=1))
    return int(any(abs(values["error"]) > ALLOWED for values in told.values()))


def run_data() -> None:
    """Rate of the sampler, share that FLAC leaves, size and time of a checkpoint of the base model."""
    about = circumstances()
    with tempfile.TemporaryDirectory() as folder:
        told = {**about, **shard_facts(Path(folder)), **checkpoint_facts(Path(folder)), "load_average": os.getloadavg()}
    write_result("scaling_data.json", told)
    print(json.dumps(told, indent=1))


def shard_facts(folder: Path) -> dict[str, float]:
    """Bytes of FLAC over those of PCM16, bytes of a cut in a manifest, windows a second of the sampler on one core.

    The sampler's are of ``CUTS`` cuts of 10 s that differ from those of the recordings by their names alone.
    """
    from mae_ast_fast.data.prepare import prepare_shards
    from mae_ast_fast.data.shards import Shards

    sizes = {}
    for codec in ("wav", "flac"):
        prepare_shards(ROOT / "tests" / "audio", folder / codec, codec=codec, progress=False)
        segments = [segment for split in ("train", "held_out") for segment in Shards(folder / codec).segments(split)]
        sizes[codec] = sum(segment.num_bytes for segment in segments) / sum(
            2 * segment.num_samples for segment in segments
        )
    paths = sorted((folder / "wav").glob("cuts.*.jsonl.gz"))
    manifests, count = sum(path.stat().st_size for path in paths), len(segments)
    with gzip.open(paths[0], "rt") as lines:
        cut = json.loads(next(lines))
    many = folder / "many"
    many.mkdir()
    for shard in range(CUTS // CUTS_A_SHARD):
        (many / f"recording.{shard:06d}.tar").touch()
        path = many / f"cuts.{shard:06d}.jsonl.gz"
        with gzip.open(path, "wt") as lines:
            for number in range(CUTS_A_SHARD):
                cut["id"] = cut["custom"]["name"] = f"{shard:06d}-{number:06d}"
                cut["custom"] |= {"split": "train", "offset": 512 + 321_024 * number}
                cut["recording"]["num_samples"] = 160_000
                lines.write(json.dumps(cut) + "\n")
    rates = []
    for epoch in range(3):
        batches = Shards(many).batches(batch_seconds=2560.0, max_seconds=SECONDS, min_seconds=1.0, seed=0, epoch=epoch)
        began = time.process_time()
        rates.append(sum(map(len, batches)) / (time.process_time() - began))
    return {
        "flac_share": sizes["flac"] / sizes["wav"],
        "manifest_bytes": manifests / count,
        "sampler_windows_per_second": statistics.median(rates),
    }


def checkpoint_facts(folder: Path) -> dict[str, float]:
    """A checkpoint of patch_base by one process on this machine's disk: bytes, and seconds."""
    import torch

    from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep
    from mae_ast_fast.checkpoints.training import TrainingCheckpoints

    update = TrainStep(MAEAST(MAEASTConfig.preset("patch_base", encoder_layerdrop=0.0)).train())
    update(torch.randn(1, 32, 128))
    checkpoints, held, whole = TrainingCheckpoints(folder / "run", keep=1), [], []
    for step in range(1, 4):
        began = time.perf_counter()
        checkpoints.save(step, update, {})
        held.append(time.perf_counter() - began)
        path = checkpoints.finish()
        whole.append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "checkpoint_bytes": size,
        "checkpoint_holds_seconds": statistics.median(held),
        "checkpoint_seconds": statistics.median(whole),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("fit", "measure", "data"):
        what.add_argument(f"--{name}", action="store_true")
    what.add_argument("--rank-of", nargs=3, metavar=("PRESET", "CLIPS", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.rank_of:
        preset, clips, target = given.rank_of
        rank_of_a_run(preset, int(clips), target)
    elif given.fit:
        run_fit()
    elif given.measure:
        return run_measure()
    else:
        run_data()
    return 0


if __name__ == "__main__":
    sys.exit(main())
