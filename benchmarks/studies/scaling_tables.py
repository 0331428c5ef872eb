"""Write the tables of docs/scaling.md: training the base model on 1 to 1,024 GPUs, by formulas and scaling.simulate.

python benchmarks/studies/scaling_tables.py          ``--check`` only compares

The tables depend only on the files in benchmarks/results and on ``ASSUMED``. Once a GPU result is committed (`make
gpu-full` writes gpu_ARCH_COMMIT_bench_step.json), its speed replaces the assumed one.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scaling import RESULTS, ROOT, SECONDS, Link, Step, all_reduce_seconds, buckets, result, simulate

PAGE = ROOT / "docs" / "scaling.md"

# Values that were not measured: value, unit, source.
ASSUMED = {
    "peak": (989.4e12, "FLOP/s", "NVIDIA H100 SXM datasheet: bf16 dense (1,979 with sparsity)"),
    "share": (0.25, "of the peak", "**assumption**, cautious: the share of it that a whole step reaches"),
    "memory": (80e9, "bytes", "the same datasheet"),
    "memory rate": (3.35e12, "bytes/s", "the same datasheet: HBM3"),
    "nvlink": (450e9, "bytes/s", "the same datasheet: NVLink 4, 900 GB/s, half of it each way"),
    "infiniband": (50e9, "bytes/s", "400 Gb/s: a port of NVIDIA ConnectX-7 (NDR InfiniBand)"),
    "ethernet": (12.5e9, "bytes/s", "100 Gb/s Ethernet, one port a node (IEEE 802.3)"),
    "nvme": (6.8e9, "bytes/s", "Samsung PM9A3 U.2 datasheet: sequential reads"),
    "disk": (1e9, "bytes/s", "**assumption**: what a checkpoint is written with, all processes together"),
    "link share": (0.8, "of a link", "**assumption**: what a collective or a reader gets of it"),
    "hop": (10e-6, "s", "**assumption**: latency of one message; Ethernet five times that"),
    "node": (8, "GPUs", "NVIDIA HGX H100"),
    "batch": (256, "clips a GPU", "the batch of this project's speed goal"),
    "least": (32, "clips a GPU", "**assumption**: a smaller batch takes as long, since launches bind"),
    "clip memory": (65e6, "bytes a clip", "this project's goal for activations of the base model, **not measured**"),
    "spread": (0.02, "of a step", "**assumption**: standard deviation between ranks (clip lengths, clocks)"),
    "failure": (50_676, "GPU hours", "a failure: 419 in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783, 3.3.4)"),
    "price": (3.0, "$ a GPU hour", "**assumption**: put your own here"),
}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
AUDIOSET, EPOCHS = 2_000_000, 32  # clips of 10 s; number of epochs of Audio-MAE (arXiv 2207.06405)
HOURS = 1_000_000
PCM = 32_000  # bytes per second of 16 kHz PCM16
GLOBAL_BATCH = 4096  # clips
MIN_EFFICIENCY = 0.9  # efficiency


def assumed(name: str) -> float:
    return ASSUMED[name][0]


@dataclass(frozen=True)
class Base:
    """The model of the tables, patch_base, on one GPU.

    Attributes:
        parameters: Number of parameters.
        flops: FLOPs of forward and backward per clip.
        clips: Clips per second.
        forward: Share of the forward in the time of forward and backward.
        source: Source of ``clips``.
    """

    parameters: int
    flops: float
    clips: float
    forward: float
    source: str

    @property
    def gradients(self) -> int:
        """Bytes of the fp32 gradients."""
        return 4 * self.parameters

    @property
    def update(self) -> float:
        """Seconds of AdamW, which reads weight, gradient and two moments and writes all but the gradient, in fp32."""
        return 28 * self.parameters / (assumed("link share") * assumed("memory rate"))

    def step(self, clips: float) -> Step:
        """A step with ``clips`` clips per GPU."""
        seconds = max(clips, assumed("least")) / self.clips - self.update
        return Step(
            forward=seconds * self.forward,
            backward=seconds * (1.0 - self.forward),
            update=self.update,
            buckets=buckets(self.gradients),
            spread=assumed("spread"),
        )


def _fast_column(name: str) -> dict[str, Any] | None:
    """``fast bf16`` of patch_base in a result of bench_step.py; None if it failed or was not measured."""
    cases = {case["param"]: case["extra_info"]["columns"] for case in result(name)["benchmarks"]}
    return cases.get("patch_base", {}).get("fast bf16")


@functools.cache
def base() -> Base:
    """The model with the speed of the latest GPU result in benchmarks/results or, without one, the assumed speed."""
    import torch

    from mae_ast_fast import MAEAST, MAEASTConfig

    with torch.device("meta"):
        parameters = sum(p.numel() for p in MAEAST(MAEASTConfig.preset("patch_base")).parameters())
    paths = sorted(RESULTS.glob("gpu_*_bench_step.json"), key=lambda path: path.stat().st_mtime)
    gpu_results = [path.name for path in paths if _fast_column(path.name) is not None]
    name = gpu_results[-1] if gpu_results else "step_cpu.json"
    step_result, column = result(name), _fast_column(name)
    flops = column["flops"] / column["clips"]
    if not gpu_results:
        clips = assumed("share") * assumed("peak") / flops
        return Base(parameters, flops, clips, 1 / 3, "assumed, no GPU was measured")
    clips = column["clips"] / statistics.median(column["seconds"])
    forward = statistics.median(stages["forward"] / sum(stages.values()) for stages in column["stages"])
    return Base(parameters, flops, clips, forward, f"measured on {step_result['machine_info']['processor']}: {name}")


def link(gpus: int, network: str) -> Link:
    """Connection of ``gpus`` GPUs: NVLink within a node, otherwise the node's share of the network."""
    node, share = assumed("node"), assumed("link share")
    if gpus <= node:
        return Link(assumed("hop"), share * assumed("nvlink"), tree=True)
    rates = {
        "8 x 400 Gb/s": min(node * assumed("infiniband"), assumed("nvlink")),
        "1 x 400 Gb/s": assumed("infiniband"),
        "1 x 100 Gb/s": assumed("ethernet"),
    }
    slow = 5.0 if network == "1 x 100 Gb/s" else 1.0
    return Link(slow * assumed("hop"), share * rates[network], tree=True)


NETWORKS = ("8 x 400 Gb/s", "1 x 400 Gb/s", "1 x 100 Gb/s")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def short(value: float) -> str:
    """Three significant digits, with thousands separators."""
    if value and abs(value) < 100:
        return f"{value:.3g}"
    return f"{float(f'{value:.3g}'):,.0f}"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    unit = min(4, int(math.log10(max(count, 1.0)) // 3))
    return f"{short(count / 1000**unit)} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{short(1e6 * seconds)} us"
    for name, unit in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit:
            return f"{short(seconds / unit)} {name}"
    return f"{short(seconds)} s" if seconds >= 1 else f"{short(1e3 * seconds)} ms"


def assumptions_table() -> str:
    def format_value(value: float, unit: str) -> str:
        if unit.startswith("bytes"):
            return size(value) + unit.removeprefix("bytes")
        if unit == "FLOP/s":
            return f"{value / 1e12:,g} TFLOP/s"
        return duration(value) if unit == "s" else f"{value:,g} {unit}"

    rows = [(name, format_value(value, unit), source) for name, (value, unit, source) in ASSUMED.items()]
    return table(("what", "value", "from"), rows)


def model_table() -> str:
    model = base()
    parameters = model.parameters
    speed_formula = f"{assumed('share'):g} of the peak / FLOPs" if "assumed" in model.source else "clips / seconds"
    rows = [
        ("parameters P", "counted", f"{parameters:,}"),
        ("gradients, fp32", "4 P", size(model.gradients)),
        ("buckets of them", "the first of 1 MiB, the others of 25 MiB", str(len(buckets(model.gradients)))),
        ("weights, gradients and AdamW's two moments, fp32", "16 P", size(16 * parameters)),
        ("checkpoint: weights and moments", "12 P", size(12 * parameters)),
        ("FLOPs of a clip, forward and backward", "counted (benchmarks/bench_step.py)", f"{model.flops / 1e9:.1f} G"),
        (f"clips/s of one GPU, {model.source}", speed_formula, short(model.clips)),
        ("audio a second of one GPU", f"{SECONDS:g} s a clip", duration(model.clips * SECONDS)),
        ("AdamW", "28 P bytes / (0.8 of the memory rate)", duration(model.update)),
    ]
    return table(("base model", "formula", ""), rows)


def throughput_table() -> str:
    """Weak scaling: the batch per GPU is constant."""
    model, batch = base(), assumed("batch")
    alone = simulate(model.step(batch), 1, link(1, NETWORKS[0]))
    rows = []
    for gpus in GPUS:
        cells = [f"{gpus:,}", f"{batch * gpus:,.0f}"]
        for network in NETWORKS:
            if gpus <= assumed("node") and network != NETWORKS[0]:
                cells.append("")
                continue
            connection = link(gpus, network)
            seconds = simulate(model.step(batch), gpus, connection)
            transfer_seconds = sum(all_reduce_seconds(bucket, gpus, connection) for bucket in buckets(model.gradients))
            share = f"{100 * alone / seconds:.0f} %"
            cells.append(
                f"{short(1e3 * transfer_seconds)} / {short(1e3 * seconds)} ms, {share}, {short(batch * gpus / seconds)}"
            )
        rows.append(cells)
    headings = ("GPUs", "clips an update", *(f"NVLink, then {network} a node" for network in NETWORKS))
    return table(headings, rows)


def strong_table() -> str:
    """Strong scaling: the clips per update are constant."""
    model, rows, alone = base(), [], 0.0
    for gpus in GPUS:
        clips_per_gpu = GLOBAL_BATCH / gpus
        micro_batches = max(1, math.ceil(clips_per_gpu / assumed("batch")))
        cells = [
            f"{gpus:,}",
            f"{clips_per_gpu:g}" if micro_batches == 1 else f"{micro_batches} x {clips_per_gpu / micro_batches:g}",
        ]
        for network in NETWORKS:
            if gpus <= assumed("node") and network != NETWORKS[0]:
                cells.append("")
                continue
            step = model.step(clips_per_gpu / micro_batches)
            last_seconds = simulate(step, gpus, link(gpus, network))
            seconds = last_seconds + (micro_batches - 1) * (step.forward + step.backward)
            alone = alone or seconds
            cells.append(
                f"{short(1e3 * seconds)} ms, {100 * alone / seconds / gpus:.0f} %, {short(GLOBAL_BATCH / seconds)}"
            )
        rows.append(cells)
    return table(("GPUs", "clips a GPU", *(f"NVLink, then {network} a node" for network in NETWORKS)), rows)


def cost_table() -> str:
    model, batch, rows = base(), assumed("batch"), []
    workloads = {"AudioSet": AUDIOSET * EPOCHS, "hours": HOURS * 3600 / SECONDS}
    for gpus in GPUS:
        rate = batch * gpus / simulate(model.step(batch), gpus, link(gpus, NETWORKS[1]))
        cells = [f"{gpus:,}", short(rate)]
        for clips in workloads.values():
            hours = clips / rate / 3600
            cells += [duration(3600 * hours), short(hours * gpus), f"{hours * gpus * assumed('price'):,.0f}"]
        rows.append(cells)
    headings = ["GPUs", "clips/s"]
    for name in (f"AudioSet, {EPOCHS} epochs", f"{HOURS / 1e6:g} M hours, once"):
        headings += [name, "GPU hours", "$"]
    return table(headings, rows)


def decoding(name: str) -> float:
    """Seconds of audio that one core decodes per second; the median of benchmarks/bench_data.py."""
    cases = {case["name"]: case["extra_info"] for case in result("data_cpu.json")["benchmarks"]}
    decode = cases["bench_decode"]
    return decode["audio_seconds"] / statistics.median(decode["columns"][name]["cpu_seconds"])


def formats() -> dict[str, tuple[float, str]]:
    """Format -> bytes per second of audio, and the column of bench_data.py that decodes it."""
    data = result("scaling_data.json")
    rates = {"PCM16": (float(PCM), "wav")}
    if data is not None:
        rates["FLAC"] = (PCM * data["flac_share"], "flac")
    return rates | {"Opus, 24 kb/s": (3000.0, "opus")}


def storage_table() -> str:
    model = base()
    audio = model.clips * SECONDS
    rows = []
    for name, (rate, column) in formats().items():
        bytes_per_second = audio * rate
        fed_gpus = [
            math.floor(assumed("link share") * assumed(source) / bytes_per_second)
            for source in ("nvme", "ethernet", "infiniband")
        ]
        cells = [
            name,
            f"{rate / 1000:.3g} kB",
            f"{size(bytes_per_second)}/s",
            f"{size(bytes_per_second * assumed('node'))}/s",
            f"{size(bytes_per_second * GPUS[-1])}/s",
        ]
        rows.append([*cells, *map(str, fed_gpus), short(audio / decoding(column))])
    headings = (
        "format",
        "a second of audio",
        "a GPU",
        "a node of 8",
        "1,024 GPUs",
        "GPUs that an NVMe drive feeds",
        "100 Gb/s",
        "400 Gb/s",
        "cores a GPU to decode",
    )
    return table(headings, rows)


def shards_table() -> str:
    datasets = {"AudioSet, 2 M clips of 10 s": AUDIOSET * SECONDS, "1 M hours": HOURS * 3600.0}
    rows = []
    for name, seconds in datasets.items():
        for codec, (rate, _) in formats().items():
            total = seconds * rate
            cells = [name, codec, size(total)]
            for shard in (256e6, 1e9, 4e9):
                cells.append(f"{math.ceil(total / shard):,}")
            rows.append(cells)
    return table(("data", "format", "bytes", "shards of 256 MB", "of 1 GB", "of 4 GB"), rows)


def memory_table() -> str:
    model = base()
    activations = assumed("batch") * assumed("clip memory")
    rows = []
    for gpus in (1, 8, 64, 1024):
        state, sharded_state = 16 * model.parameters, 16 * model.parameters / gpus
        rows.append(
            [
                f"{gpus:,}",
                size(state),
                size(sharded_state),
                size(activations),
                f"{100 * (state + activations) / assumed('memory'):.0f} %",
            ]
        )
    return table(
        (
            "GPUs",
            "DDP: state, its buckets are the gradients",
            "FSDP2: state",
            "activations of the batch",
            "DDP, of a GPU's memory",
        ),
        rows,
    )


def fsdp_table() -> str:
    parameters = base().parameters
    rows = [
        ("DDP", "all-reduce of fp32 gradients", "2 (n - 1) / n x 4 P", size(8 * parameters)),
        (
            "FSDP2, bf16",
            "two all-gathers in bf16, reduce-scatter in fp32",
            "(n - 1) / n x (2 + 2 + 4) P",
            size(8 * parameters),
        ),
        (
            "FSDP2, fp32",
            "two all-gathers and a reduce-scatter in fp32",
            "(n - 1) / n x (4 + 4 + 4) P",
            size(12 * parameters),
        ),
    ]
    return table(("", "an update", "bytes a GPU sends", "for many GPUs"), rows)


def checkpoint_table() -> str:
    model, data, rows = base(), result("scaling_data.json"), []
    write_seconds = 12 * model.parameters / assumed("disk")
    for gpus in (1, 8, 64, 512, 1024):
        failure_seconds = assumed("failure") / gpus * 3600
        interval = math.sqrt(2 * write_seconds * failure_seconds)
        lost = write_seconds / interval + interval / 2 / failure_seconds
        rows.append(
            [f"{gpus:,}", duration(failure_seconds), duration(write_seconds), duration(interval), f"{100 * lost:.2g} %"]
        )
    text = table(("GPUs", "to a failure", "to write", "best interval", "lost to writing and redoing"), rows)
    if data is not None:
        text += (
            f"\n\nMeasured here, one process, a busy machine's disk: {size(data['checkpoint_bytes'])} in "
            f"{duration(data['checkpoint_seconds'])}; an update waited {duration(data['checkpoint_holds_seconds'])}."
        )
    return text


def sampler_table() -> str:
    """Rate of a sampler compared with the need of a GPU; each sampler serves one stream."""
    data = result("scaling_data.json")
    if data is None:
        return "Not measured yet."
    model, rate = base(), data["sampler_windows_per_second"]
    rows = []
    total_seconds = HOURS * 3600
    for name, audio, seconds in (
        ("AudioSet", AUDIOSET * SECONDS, SECONDS),
        (f"{HOURS / 1e6:g} M hours", total_seconds, SECONDS),
        (f"{HOURS / 1e6:g} M hours", total_seconds, 3 * SECONDS),
    ):
        num_crops, needed_rate = audio / seconds, model.clips * SECONDS / seconds
        cells = [name, f"{seconds:g} s", f"{num_crops:,.0f}", size(num_crops * data["manifest_bytes"])]
        cells += [short(rate), short(needed_rate), f"{needed_rate / rate:.0%}"]
        rows.append([*cells, *(duration(num_crops / gpus / rate) for gpus in (8, 1024))])
    headings = ("data", "windows of", "windows", "manifests, if a cut is a window", "windows/s of a sampler")
    headings += ("windows/s that a GPU trains on", "of a core, a GPU", "to replay an epoch, 8 streams", "1,024 streams")
    return table(headings, rows)


def prediction_table() -> str:
    fitted, predicted, measured = (result(f"scaling_{name}.json") for name in ("fit", "prediction", "measured"))
    if fitted is None or predicted is None:
        return "Not measured yet."
    rows = []
    for point, values in fitted["fitted"].items():
        cells = [point, *(short(1e3 * values[name]) for name in ("alone", "together"))]
        cells += [
            f"{values['contention']:.2f}",
            f"{1e3 * values['hop']:.2g}",
            f"{values['rate'] / 1e9:.2g}",
            f"{values['stolen']:.2f}",
        ]
        cells.append(short(1e3 * predicted["seconds"][point]))
        if measured is not None:
            errors = measured["errors"][point]
            cells += [short(1e3 * errors["measured"]), f"{100 * errors['error']:+.0f} %"]
        else:
            cells += ["not yet", ""]
        rows.append(cells)
    headings = (
        "ms a step",
        "1 process",
        "2",
        "contention",
        "hop, ms",
        "GB/s",
        "stolen",
        "4, predicted",
        "4, measured",
        "prediction off by",
    )
    return table(headings, rows)


def summary() -> str:
    """Main results, most important first."""
    model, data, price = base(), result("scaling_data.json"), assumed("price")
    batch, node = assumed("batch"), int(assumed("node"))
    rate = batch * node / simulate(model.step(batch), node, link(node, NETWORKS[0]))
    audioset, hours = (clips / rate / 3600 * node for clips in (AUDIOSET * EPOCHS, HOURS * 3600 / SECONDS))
    min_batches = []
    for network in NETWORKS:
        for clips in (1 << power for power in range(5, 13)):
            alone, together = (simulate(model.step(clips), gpus, link(gpus, network)) for gpus in (1, 64))
            if alone / together >= MIN_EFFICIENCY:
                min_batches.append(f"{clips} with {network}")
                break
    lines = [
        f"The base model is small: {EPOCHS} epochs of AudioSet are {short(audioset)} GPU hours "
        f"(${audioset * price:,.0f}) on a node of {node}, a million hours once {short(hours)} (${hours * price:,.0f}). "
        "More GPUs buy a shorter wait.",
        f"A GPU trains on {duration(model.clips * SECONDS)} of audio a second, "
        f"{size(model.clips * SECONDS * PCM)} of PCM16: storage has to be built for that.",
        f"On 64 GPUs all-reduces cost less than {100 * (1 - MIN_EFFICIENCY):.0f} % of the time from so many clips "
        f"a GPU and update on: {', '.join(min_batches)} a node.",
        f"FSDP2 saves {size(16 * model.parameters * (1 - 1 / 64))} of a GPU's {size(assumed('memory'))}, and sends as "
        "many bytes in bf16: DDP is the mode for this model.",
    ]
    if data is not None:
        share = model.clips / data["sampler_windows_per_second"]
        lines.append(f"A GPU's own sampler takes {share:.0%} of a core with windows of {SECONDS:g} s.")
    return "\n".join(f"- {line}" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "assumptions": assumptions_table,
    "model": model_table,
    "throughput": throughput_table,
    "strong": strong_table,
    "cost": cost_table,
    "storage": storage_table,
    "shards": shards_table,
    "memory": memory_table,
    "fsdp": fsdp_table,
    "checkpoint": checkpoint_table,
    "sampler": sampler_table,
    "prediction": prediction_table,
}


def render(text: str) -> str:
    """The page with every marked table regenerated.

    Raises:
        ValueError: The page has no marks for a table.
    """
    for name, make in TABLES.items():
        marked = re.search(rf"<!-- scaling:{name} -->\n(.*?)<!-- /scaling -->", text, re.S)
        if marked is None:
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
        begin, end = marked.span(1)
        text = f"{text[:begin]}{make()}\n{text[end:]}"
    return text


def main() -> int:
    before = PAGE.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
