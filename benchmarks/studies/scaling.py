"""A simulation of data-parallel steps, fitted on 1 and 2 processes and tested on 4; docs/scaling.md uses it.

python benchmarks/studies/scaling.py --fit
    measures 1 and 2 processes (gloo, one thread each, a real model on noise), writes scaling_fit.json, and the
    prediction for 4 processes, scaling_prediction.json
python benchmarks/studies/scaling.py --measure      measures 4, writes scaling_measured.json; fails if a prediction is
                                                    wrong
python benchmarks/studies/scaling.py --data         sampler, FLAC, checkpoint: scaling_data.json
python benchmarks/studies/scaling_tables.py         the tables of docs/scaling.md from these files; --check only
                                                    compares

The model: each of n ranks computes forward and backward on its own batch. Gradients are sent in buckets during the
backward, in the order in which it fills them. A bucket is sent when the slowest rank has filled it and the previous one
has been sent. The update waits for the last bucket. If there are fewer processors than ranks, ranks take turns, and so
do their transfers if the processor moves the bytes (sockets); ``stolen`` is the share of a transfer that it spends.
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
MAX_ERROR = 0.25  # largest error of a prediction, relative to the measured time

MIB = 1 << 20
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # those of DistributedDataParallel
POINTS = {"patch_tiny, 1 clip": ("patch_tiny", 1), "patch_tiny, 4 clips": ("patch_tiny", 4)}
ROUNDS, WARM_UP, STEPS = 3, 3, 10
SECONDS = 10.0  # length of a clip
TRANSFERS = tuple(1 << power for power in range(12, 26, 2))  # bytes of the all-reduces for fitting the link
CUTS, CUTS_A_SHARD = 60_000, 1000  # number of cuts for timing the sampler
MAX_OTHER_PROCESSORS, MAX_ATTEMPTS = (
    0.15,
    2,
)  # processors that other processes may take from us during a round; attempts per round


# ---------------------------------------------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Step:
    """The work of a rank in a step, if it has a processor to itself.

    Attributes:
        forward: Seconds of the forward.
        backward: Seconds of the backward, which produces gradients at an even rate.
        update: Seconds of the optimizer's update.
        buckets: Bytes of each bucket, in the order in which the backward fills them.
        spread: Standard deviation of a rank's forward and backward time, relative to its mean.
    """

    forward: float
    backward: float
    update: float
    buckets: tuple[int, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class Link:
    """The connection between ranks.

    Attributes:
        hop: Latency of a message in seconds.
        rate: Bytes per second that a rank sends while it receives as many.
        tree: Whether all-reduces have the latency of a tree (NCCL between nodes) instead of a ring (gloo).
        stolen: Processor time of a transfer, as a share of its duration.
    """

    hop: float
    rate: float
    tree: bool = False
    stolen: float = 0.0


def buckets(num_bytes: int) -> tuple[int, ...]:
    """Sizes of DDP's buckets for ``num_bytes`` bytes of gradients."""
    remaining = num_bytes - min(num_bytes, FIRST_BUCKET)
    full, last = divmod(remaining, BUCKET)
    return (num_bytes - remaining, *[BUCKET] * full, *([last] if last else []))


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce: latencies, and 2 (n - 1) / n of the bytes through each rank's link."""
    if ranks == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(ranks)) if link.tree else 2 * (ranks - 1)
    return hops * link.hop + 2 * (ranks - 1) / ranks * size / link.rate


def simulate(step: Step, ranks: int, link: Link, processors: int | None = None, *, draws: int = 200) -> float:
    """Seconds of a step.

    Args:
        step: Work of one rank.
        ranks: Number of ranks.
        link: Connection between the ranks.
        processors: Number of processors. None: one per rank.
        draws: Number of random draws of the ranks' speeds; the result is their median.
    """
    processors = ranks if processors is None else min(processors, ranks)
    turns = ranks / processors
    lateness = np.exp(step.spread * np.random.default_rng(0).standard_normal((draws, ranks)))
    # Ranks on one processor take turns, so their times add up.
    slowest = np.stack([lateness[:, processor::processors].sum(1) for processor in range(processors)], 1).max(1)
    transfers = [turns * all_reduce_seconds(size, ranks, link) for size in step.buckets]
    forward_end = step.forward * slowest
    backward_end = forward_end + step.backward * slowest + link.stolen * sum(transfers)
    filled = np.cumsum(step.buckets) / sum(step.buckets)
    sent_at = np.zeros(draws)
    for share, transfer in zip(filled, transfers, strict=True):
        sent_at = (
            np.maximum(sent_at, forward_end + share * (backward_end - forward_end))
            + max(0.0, 1.0 - link.stolen) * transfer
        )
    return float(np.median(np.maximum(sent_at, backward_end))) + turns * step.update


# ------------------------------------------------------------------------------------- measured: 1, 2, 4 processes


def run_rank(preset: str, clips: int, target: str) -> None:
    """Run one process of a round, started by torchrun. Rank 0 writes the samples of all ranks to ``target``."""
    import torch
    import torch.distributed as dist

    from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    config = MAEASTConfig.preset(preset, encoder_layerdrop=0.0)
    num_frames = round(100 * SECONDS)
    log_mel = torch.randn(clips, num_frames, config.num_mel_bins)
    calls: dict[str, Callable[[], object]] = {}
    models = {"alone": TrainStep(MAEAST(config, impl="torch").train())}
    if ranks > 1:
        models["together"] = TrainStep(MAEAST(config, impl="torch").train(), parallel="ddp")
    for name, update in models.items():
        calls[name] = lambda update=update: update(log_mel)
    for size in TRANSFERS if ranks > 1 else ():
        tensor = torch.ones(size // 4)
        calls[f"all-reduce {size}"] = lambda tensor=tensor: dist.all_reduce(tensor)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            start = time.perf_counter(), machine_seconds(), time.process_time()
        for name, call in calls.items():
            dist.barrier()
            call_start = time.perf_counter()
            call()
            if step >= WARM_UP:
                samples[name].append(time.perf_counter() - call_start)
    end = time.perf_counter(), machine_seconds(), time.process_time()
    wall, machine_work, process_seconds = (after - before for before, after in zip(start, end, strict=True))
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (samples, process_seconds))
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in models["alone"].model.parameters())
        round_result = {
            "parameters": parameters,
            "samples": {name: [rank_samples[name] for rank_samples, _ in gathered] for name in samples},
        }
        round_result["processors_of_others"] = (machine_work - sum(seconds for _, seconds in gathered)) / wall
        Path(target).write_text(json.dumps(round_result))
    dist.destroy_process_group()


def machine_seconds() -> float:
    """Seconds that all processors of this machine have worked since boot, for all processes."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure_round(ranks: int, preset: str, clips: int) -> dict[str, Any]:
    """Samples of a run. Repeats the run if other processes took its processors, up to ``MAX_ATTEMPTS`` times."""
    free = max(0, os.cpu_count() - ranks)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "samples.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            arguments = [__file__, "--rank-of", preset, str(clips), str(target)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            subprocess.run([sys.executable, *launcher, *arguments], check=True, env=environment)
            round_result = json.loads(target.read_text())
        other_processors = round_result["processors_of_others"]
        round_result |= {"attempt": attempt, "load_average": os.getloadavg()}
        print(
            f"{ranks} processes, {preset}, {clips} clips: other processes used {other_processors:.2f} processors",
            flush=True,
        )
        if other_processors <= free + MAX_OTHER_PROCESSORS:
            break
    return round_result


def median_of_slowest(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """Median over rounds of the median over steps of the slowest rank's seconds."""
    steps = [[max(ranks) for ranks in zip(*round_result["samples"][name], strict=True)] for round_result in rounds]
    return statistics.median(statistics.median(seconds) for seconds in steps)


def quartile_of_slowest(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """Lower quartile over the steps of all rounds of the slowest rank's seconds."""
    steps = [max(ranks) for round_result in rounds for ranks in zip(*round_result["samples"][name], strict=True)]
    return statistics.quantiles(steps, n=4)[0]


def mean_of_ranks(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """Median over rounds of the mean over ranks of a rank's median seconds."""
    return statistics.median(
        statistics.fmean(statistics.median(rank) for rank in round_result["samples"][name]) for round_result in rounds
    )


def spread(rounds: Sequence[dict[str, Any]], name: str) -> float:
    """Standard deviation of a step relative to its rank's median, from the quartiles, so outliers do not count."""
    values = [
        second / statistics.median(rank)
        for round_result in rounds
        for rank in round_result["samples"][name]
        for second in rank
    ]
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349


def fit(measured: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """Parameters of ``simulate`` for each point, from rounds of 1 and 2 processes.

    ``hop`` and ``rate`` are fitted to all-reduces of several sizes between 2 processes, by least squares of the
    relative error. ``contention`` is the slowdown of 2 processes that compute at the same time without communication.
    ``stolen`` is chosen so that the simulated step of 2 processes equals the measured one.
    """
    fitted = {}
    for point, rounds in measured.items():
        alone_rounds, pair_rounds = rounds["1"], rounds["2"]
        # The lower quartile, because interruptions of processes that wait for each other only add time.
        seconds = np.array([quartile_of_slowest(pair_rounds, f"all-reduce {size}") for size in TRANSFERS])
        # 2 ranks: two hops, and the bytes of the tensor. Division by the seconds gives relative errors.
        columns = np.stack([np.full(len(seconds), 2.0), np.array(TRANSFERS, float)], 1) / seconds[:, None]
        hop, seconds_per_byte = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
        alone = mean_of_ranks(alone_rounds, "alone")
        values = {
            "alone": alone,
            "contention": max(1.0, mean_of_ranks(pair_rounds, "alone") / alone),
            "spread": spread(pair_rounds, "alone"),
        }
        values |= {
            "hop": max(0.0, float(hop)),
            "rate": 1.0 / float(seconds_per_byte),
            "parameters": alone_rounds[0]["parameters"],
        }
        together = median_of_slowest(pair_rounds, "together")
        low, high = 0.0, 100.0
        for _ in range(60):
            values["stolen"] = (low + high) / 2
            low, high = (values["stolen"], high) if predict(values, 2, 2) < together else (low, values["stolen"])
        fitted[point] = values | {"together": together, "simulated": predict(values, 2, 2)}
    return fitted


def predict(fitted: dict[str, float], ranks: int, processors: int) -> float:
    """Seconds of a step of ``ranks`` processes on ``processors`` processors, from the parameters of ``fit``."""
    seconds = fitted["alone"] * fitted["contention"]
    step = Step(seconds / 3, seconds * 2 / 3, 0.0, buckets(4 * int(fitted["parameters"])), fitted["spread"])
    return simulate(step, ranks, Link(fitted["hop"], fitted["rate"], stolen=fitted["stolen"]), processors)


def errors(predicted: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """For each point: predicted and measured seconds of a step of 4 processes, and the relative error."""
    errors_by_point = {}
    for point, value in predicted["seconds"].items():
        seconds = median_of_slowest(rounds[point], "together")
        errors_by_point[point] = {"predicted": value, "measured": seconds, "error": value / seconds - 1.0}
    return errors_by_point


def circumstances() -> dict[str, Any]:
    """Machine and commit, as the other benchmarks record them."""
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from conftest import pytest_benchmark_generate_commit_info, pytest_benchmark_generate_machine_info

    torch.set_num_threads(1)
    return {
        "machine_info": pytest_benchmark_generate_machine_info(),
        "commit_info": pytest_benchmark_generate_commit_info(),
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def result(name: str) -> dict[str, Any] | None:
    """Content of a result file; None if it does not exist."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def run_fit() -> None:
    """Measure 1 and 2 processes in turns; write the fit and its prediction for 4."""
    machine = circumstances()
    measured: dict[str, Any] = {point: {"1": [], "2": []} for point in POINTS}
    for _ in range(ROUNDS):
        for point, (preset, clips) in POINTS.items():
            for ranks in (1, 2):
                measured[point][str(ranks)].append(measure_round(ranks, preset, clips))
    fitted, processors = fit(measured), os.cpu_count()
    write_result("scaling_fit.json", {**machine, "processors": processors, "fitted": fitted, "rounds": measured})
    seconds = {point: predict(values, 4, processors) for point, values in fitted.items()}
    write_result("scaling_prediction.json", {**machine, "processes": 4, "processors": processors, "seconds": seconds})
    print(json.dumps({"fitted": fitted, "predicted for 4": seconds}, indent=1))


def run_measure() -> int:
    """Measure 4 processes; returns 1 if a prediction is wrong."""
    predicted = result("scaling_prediction.json")
    if predicted is None:
        raise ValueError("expected benchmarks/results/scaling_prediction.json: run --fit first, and commit it")
    machine = circumstances()
    rounds: dict[str, Any] = {point: [] for point in POINTS}
    for _ in range(ROUNDS):
        for point, (preset, clips) in POINTS.items():
            rounds[point].append(measure_round(4, preset, clips))
    errors_by_point = errors(predicted, rounds)
    write_result("scaling_measured.json", {**machine, "processes": 4, "errors": errors_by_point, "rounds": rounds})
    print(json.dumps(errors_by_point, indent=1))
    return int(any(abs(values["error"]) > MAX_ERROR for values in errors_by_point.values()))


def run_data() -> None:
    """Measure the sampler's rate, the size ratio of FLAC, and size and time of a checkpoint of the base model."""
    machine = circumstances()
    with tempfile.TemporaryDirectory() as folder:
        facts = {
            **machine,
            **shard_facts(Path(folder)),
            **checkpoint_facts(Path(folder)),
            "load_average": os.getloadavg(),
        }
    write_result("scaling_data.json", facts)
    print(json.dumps(facts, indent=1))


def shard_facts(folder: Path) -> dict[str, float]:
    """Bytes of FLAC relative to PCM16, bytes per cut in a manifest, crops per second of the sampler on one core.

    The sampler runs on ``CUTS`` cuts of 10 s that differ from a recording's cut only in names, offsets and length.
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
    many_folder = folder / "many"
    many_folder.mkdir()
    for shard in range(CUTS // CUTS_A_SHARD):
        (many_folder / f"recording.{shard:06d}.tar").touch()
        path = many_folder / f"cuts.{shard:06d}.jsonl.gz"
        with gzip.open(path, "wt") as lines:
            for number in range(CUTS_A_SHARD):
                cut["id"] = cut["custom"]["name"] = f"{shard:06d}-{number:06d}"
                cut["custom"] |= {"split": "train", "offset": 512 + 321_024 * number}
                cut["recording"]["num_samples"] = 160_000
                lines.write(json.dumps(cut) + "\n")
    rates = []
    for epoch in range(3):
        batches = Shards(many_folder).batches(
            batch_seconds=2560.0, max_seconds=SECONDS, min_seconds=1.0, seed=0, epoch=epoch
        )
        start = time.process_time()
        rates.append(sum(map(len, batches)) / (time.process_time() - start))
    return {
        "flac_share": sizes["flac"] / sizes["wav"],
        "manifest_bytes": manifests / count,
        "sampler_windows_per_second": statistics.median(rates),
    }


def checkpoint_facts(folder: Path) -> dict[str, float]:
    """Bytes and seconds of a checkpoint of patch_base, written by one process to this machine's disk."""
    import torch

    from mae_ast_fast import MAEAST, MAEASTConfig, TrainStep
    from mae_ast_fast.checkpoints.training import TrainingCheckpoints

    update = TrainStep(MAEAST(MAEASTConfig.preset("patch_base", encoder_layerdrop=0.0)).train())
    update(torch.randn(1, 32, 128))
    checkpoints, held_seconds, total_seconds = TrainingCheckpoints(folder / "run", keep=1), [], []
    for step in range(1, 4):
        start = time.perf_counter()
        checkpoints.save(step, update, {})
        held_seconds.append(time.perf_counter() - start)
        path = checkpoints.finish()
        total_seconds.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "checkpoint_bytes": size,
        "checkpoint_holds_seconds": statistics.median(held_seconds),
        "checkpoint_seconds": statistics.median(total_seconds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    for name in ("fit", "measure", "data"):
        action.add_argument(f"--{name}", action="store_true")
    action.add_argument("--rank-of", nargs=3, metavar=("PRESET", "CLIPS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank_of:
        preset, clips, target = arguments.rank_of
        run_rank(preset, int(clips), target)
    elif arguments.fit:
        run_fit()
    elif arguments.measure:
        return run_measure()
    else:
        run_data()
    return 0


if __name__ == "__main__":
    sys.exit(main())
