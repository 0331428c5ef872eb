"""The pretraining loop: data in, checkpoints, curves and pictures out; killed and started again, it goes on.

Every random draw is a function of the seed and of what is drawn for (epoch and clip for order, windows and masks; step
for dropout), so a run continued from a checkpoint computes what an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, corpus
from .atomic import write_json, write_whole
from .audio import find_audio
from .config import MAEASTConfig, SSASTConfig
from .data import Clips, batch_plan, load_batch, scan, split
from .evaluate import HeldOut, evaluate
from .fbank import HOP, SAMPLE_RATE, WINDOW, fbank, num_frames
from .figures import plot_loss, plot_reconstruction
from .model import MAEAST
from .options import FREE_OPTIONS, PretrainOptions, learning_rate, native_bf16
from .packing import real_tokens
from .ssast import SSAST
from .step import TrainStep

HELD_OUT_CLIPS = 64
SKIPPED_AT_MOST = 50  # updates in a row of fp16: halved as often, its scale is below any gradient
STATISTICS_WINDOWS = 200  # spread evenly over the first epoch; SSAST is normalised by their mean and deviation


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; says at which step, on which clips, and which checkpoint to go back to."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the run was saved and can go on."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {path}, the same command goes on from there")
        self.exit_code = 128 + number


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Runs pretraining, or goes on with the run in ``options.out``; returns what summary.json holds.

    Raises:
        ValueError: Unusable data or options, or the folder holds a run with other options.
        NonFiniteLoss: The loss became infinite or NaN.
        Stopped: SIGTERM or Ctrl-C arrived; the run was saved.
    """
    run = Path(options.out)
    name = options.device
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    _check_same_run(run, options)
    clips, train, held_out_clips, how = _open_data(options)
    trainer = Trainer(options, run, clips, train, device)
    held_out = _held_out(trainer.model, clips, held_out_clips, options)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "options.json", dataclasses.asdict(options))
    write_json(run / "data_report.json", clips.report)
    print(_headline(options, trainer, clips, len(train), len(held_out.names), how))
    trainer.train(held_out)
    return trainer.finish(held_out, how)


class Trainer:
    """State of one run: model, optimizer, and the place in the data."""

    def __init__(
        self, options: PretrainOptions, run: Path, clips: Clips, train: np.ndarray, device: torch.device
    ) -> None:
        self.options, self.run, self.clips, self.train_clips, self.device = options, run, clips, train, device
        best = "bf16" if native_bf16(device) else "fp32"
        self.precision = best if options.precision == "auto" else options.precision
        self.step = self.epoch = self.batch = 0
        self.seconds = self.audio_seconds = 0.0
        self.pending: list[tuple[dict[str, Any], Tensor, list[str]]] = []  # rows whose numbers are still on the device
        self.saved: tuple[int, Path] | None = None
        self.skipped = 0  # updates in a row that fp16 left out
        self.bar: Any = None
        self.events: Any = None

        torch.manual_seed(options.seed)
        found = checkpoint.load_training(run)
        if found is not None:
            path, model, state, damaged = found
            for line in damaged:
                print(f"skipped a damaged checkpoint: {line}")
            print(f"going on from {path}")
            model.impl, model.attention = options.impl, options.attention
        else:
            model = self._new_model()
        _check_shortest(model.config, options)
        model.recompute = options.recompute
        self.model = model.to(device).train()
        self.update = TrainStep(
            self.model,
            options.lr,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
            precision=self.precision,
            compile=options.compile,
            graphs=options.graphs,
        )
        if found is not None:
            if state["data"] != self._data_identity():
                raise ValueError(
                    f"the data of the run in {run} has changed since it started: expected {state['data']}, got "
                    f"{self._data_identity()}; use another --out, or restore the data"
                )
            self.update.load_state_dict(state)
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            self.seconds, self.audio_seconds = state["seconds"], state["audio_seconds"]

    def _new_model(self) -> MAEAST | SSAST:
        """The model with which a run starts."""
        options = self.options
        init = {"impl": options.impl, "attention": options.attention}
        if options.init_from is not None:
            source = checkpoint.load_model(options.init_from, **init)
            config = options.model_config(source.config)
            _check_fits(source.config, config, options)
            model = type(source)(config, **init)
            model.load_state_dict(source.state_dict())
            return model
        config = options.model_config()
        if isinstance(config, SSASTConfig) and not {"mean", "std"} <= set(options.model_args):
            windows = np.concatenate(self._plan(0))
            few = np.linspace(0, len(windows) - 1, min(STATISTICS_WINDOWS, len(windows))).round().astype(np.int64)
            mean, std = log_mel_statistics(self.clips, windows[few])
            config = dataclasses.replace(config, **{"mean": mean, "std": std, **options.model_args})
        return checkpoint.MODELS[options.model](config, **init)

    def _data_identity(self) -> list[int]:
        return [len(self.train_clips), int(self.clips.samples[self.train_clips].sum())]

    def train(self, held_out: HeldOut) -> None:
        """Runs the remaining updates."""
        options = self.options
        self._truncate_metrics()
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.events = SummaryWriter(self.run / "tensorboard", purge_step=self.step)
        self.bar = tqdm(
            total=options.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        with _Signals() as signals, contextlib.closing(self.bar), contextlib.closing(self.events):
            self._began = time.perf_counter()
            batches = self._batches()
            while self.step < options.steps:
                self._update(next(batches))
                if self.step % options.log_every == 0 or self.step == options.steps:
                    self._flush()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
                if self.step % options.evaluate_every == 0 and self.step < options.steps:
                    self._log({"step": self.step, "held_out": evaluate(self.model, held_out)})
                if signals.received is not None:
                    raise Stopped(signals.received, self.save())
                if not self.pending:  # what was saved and evaluated since the flush is no training time
                    self._began = time.perf_counter()

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch: (clip, first sample, samples) of each window."""
        options = self.options
        samples = self.clips.samples[self.train_clips]
        lengths = options.batch_seconds, options.max_seconds
        plan = batch_plan(samples, *lengths, options.seed, epoch, options.min_seconds)
        return [np.column_stack((self.train_clips[windows[:, 0]], windows[:, 1:])) for windows in plan]

    def _batches(self) -> Iterator[np.ndarray]:
        """The batches from the current place on, epoch after epoch."""
        while True:
            plan = self._plan(self.epoch)
            while self.batch < len(plan):
                self.batch += 1
                yield plan[self.batch - 1]
            self.epoch, self.batch = self.epoch + 1, 0

    def _update(self, windows: np.ndarray) -> None:
        """One optimizer update; its numbers stay on the device until the next flush."""
        options = self.options
        waveforms, lengths, ids, names = load_batch(self.clips, windows)
        features, _ = self.model.features(self._to_device(waveforms), lengths)
        torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout: a function of the step, nothing to save
        rate, tokens, rows = learning_rate(self.step, options), self.update.tokens, self.update.rows
        # The paper's own strategy draws one mask a batch and ignores clip ids: every update needs another.
        epoch = self.step if self.model.config.masking == "chunk_official" else self.epoch
        draw = {"seed": options.seed, "clip_ids": self._to_device(ids), "epoch": epoch}
        numbers = self.update(features, num_frames(lengths), lr=rate, **draw)
        self.step += 1
        seconds = float(lengths.sum()) / SAMPLE_RATE
        self.audio_seconds += seconds
        row = {"step": self.step, "epoch": self.epoch, "lr": rate, "clips": len(names), "audio_seconds": seconds}
        row |= {"tokens": self.update.tokens - tokens, "rows": self.update.rows - rows}
        self.pending.append((row, torch.stack(numbers), names))
        self.bar.update()

    def _to_device(self, x: Tensor) -> Tensor:
        """Without waiting for it."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def _flush(self) -> None:
        """Brings the numbers of the last updates to the host, checks and writes them."""
        if not self.pending:
            return
        rows, clips = [], 0
        for row, numbers, names in self.pending:
            loss, reconstruction, classification, accuracy, norm = numbers.tolist()
            skipped = self.precision == "fp16" and not math.isfinite(norm)  # its scale was too large, and is halved
            self.skipped = self.skipped + 1 if skipped else 0
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.skipped in range(1, SKIPPED_AT_MOST)):
                for finite in rows:
                    self._log(finite)
                self._fail(row["step"], loss, norm, names)
            row |= {
                "loss": loss,
                "loss_reconstruction": reconstruction,
                "loss_classification": classification,
                "accuracy": accuracy,
                "grad_norm": None if skipped else norm,
            }
            rows.append(row)
            clips += row["clips"]
        self.pending.clear()
        now = time.perf_counter()
        spent, self._began = now - self._began, now
        self.seconds += spent
        rate = clips / spent
        eta = spent / len(rows) * (self.options.steps - self.step)
        for row in rows:
            self._log(row | {"clips_per_second": round(rate, 2)})
        last = rows[-1]
        line = (
            f"loss {last['loss']:.3f} (mse {last['loss_reconstruction']:.3f}, nce {last['loss_classification']:.3f}, "
            f"acc {last['accuracy']:.3f})  {rate:.1f} clips/s"
        )
        if self.bar.disable:
            minutes, seconds = divmod(round(eta), 60)
            print(f"step {self.step}/{self.options.steps}  {line}  ETA {minutes}:{seconds:02d}", flush=True)
        else:
            self.bar.set_postfix_str(line)

    def _fail(self, step: int, loss: float, norm: float, names: list[str]) -> None:
        saved = checkpoint.training_checkpoints(self.run)
        back = f"go back to {saved[-1]} (the same command does)" if saved else "no checkpoint was saved before it"
        raise NonFiniteLoss(
            f"step {step}: loss {loss}, gradient norm {norm}; clips: {', '.join(names)}; {back}; try another --out "
            "with a lower --lr, with --precision fp32, or without these clips"
        )

    def _log(self, row: dict[str, Any]) -> None:
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        values = row if "held_out" not in row else _flat("held_out", row["held_out"])
        for name, value in values.items():
            if isinstance(value, float):
                self.events.add_scalar(name, value, row["step"])
        if "held_out" in row:
            report = row["held_out"]
            baselines = ", ".join(f"{name} {value:.3f}" for name, value in report["baselines"].items())
            self.bar.write(
                f"step {row['step']}: held out mse {report['reconstruction_mse']:.3f} ({baselines}), "
                f"accuracy {report['accuracy']:.3f} (chance {report['chance']:.3f})",
                file=sys.stdout,
            )

    def _truncate_metrics(self) -> None:
        """Drops what was written after the checkpoint that the run goes on from."""
        path = self.run / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= self.step] if path.is_file() else []
        write_whole(path, lambda partial: partial.write_text("".join(json.dumps(row) + "\n" for row in kept)))

    def save(self) -> Path:
        """Writes a checkpoint of the current step, once."""
        self._flush()
        if self.saved is not None and self.saved[0] == self.step:
            return self.saved[1]
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "audio_seconds": self.audio_seconds,
            **self.update.state_dict(),
            "data": self._data_identity(),
        }
        self.saved = self.step, checkpoint.save_training(self.run, self.step, self.model, state, self.options.keep)
        return self.saved[1]

    def finish(self, held_out: HeldOut, how: str) -> dict[str, Any]:
        """Evaluates, draws and writes what a finished run leaves."""
        report = evaluate(self.model, held_out)
        by_kind = {}
        for kind in sorted(set(held_out.kinds) - {""}):
            part = held_out.select([i for i, k in enumerate(held_out.kinds) if k == kind])
            by_kind[kind] = evaluate(self.model, part)
        self.model.save_pretrained(self.run)
        written = read_metrics(self.run / "metrics.jsonl")
        steps = [row for row in written if "loss" in row]
        tokens, rows = (sum(row.get(name, 0) for row in steps) for name in ("tokens", "rows"))
        evaluations = [row for row in written if "held_out" in row] + [{"step": self.step, "held_out": report}]
        data = self.clips.report
        summary = {
            "steps": self.step,
            "model": self.model.model_type,
            "config": self.model.config.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.device),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "train_seconds": round(self.seconds, 1),
            "audio_hours_seen": round(self.audio_seconds / 3600, 3),
            "clips_per_second": round(sum(row["clips"] for row in steps) / max(self.seconds, 1e-9), 2),
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9), 1),
            "padding_share": round(1.0 - tokens / rows, 4) if rows else 0.0,
            "final_loss": steps[-1]["loss"] if steps else None,
            "held_out": report,
            "held_out_by_kind": by_kind,
            "held_out_split": how,
            "held_out_clips": held_out.names,
            "train_clips": len(self.train_clips),
            "train_hours": round(float(self.clips.samples[self.train_clips].sum()) / SAMPLE_RATE / 3600, 3),
            "data": {
                "files": data["files"],
                "clips": data["clips"],
                "hours": round(data["hours"], 3),
                "skipped": {reason: found["count"] for reason, found in data["skipped"].items()},
                **{name: data[name]["count"] for name in ("silent", "clipped", "duplicate")},
            },
            "torch": torch.__version__,
        }
        write_json(self.run / "summary.json", summary)
        plot_loss(steps, evaluations, self.run / "loss.png")
        plot_reconstruction(self.model, held_out.longest_of_each_kind(), self.run / "reconstruction.png")
        return summary


class _Signals:
    """Takes note of SIGTERM and SIGINT; the loop ends the update that runs, saves and stops. A second one kills."""

    def __enter__(self) -> _Signals:
        self.received: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a killed process left half written is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _check_same_run(run: Path, options: PretrainOptions) -> None:
    """Refuses to go on with a run under options that would make it another one."""
    path = run / "options.json"
    if not path.is_file() or not checkpoint.training_checkpoints(run):
        return
    # An option that is younger than the run had its default then.
    before = {**dataclasses.asdict(PretrainOptions()), **json.loads(path.read_text())}
    differing = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in dataclasses.asdict(options).items()
        if name not in FREE_OPTIONS and before[name] != value
    ]
    if differing:
        raise ValueError(
            f"{run} holds a run with other options ({'; '.join(differing)}): use the same options to go on, or another "
            "--out"
        )


def _check_fits(
    config: MAEASTConfig | SSASTConfig, wanted: MAEASTConfig | SSASTConfig, options: PretrainOptions
) -> None:
    sizes = ["num_mel_bins", "patch_size", "embed_dim", "ffn_dim", "num_heads"]
    if isinstance(config, SSASTConfig):
        sizes += ["layers", "input_frames"]
    else:
        sizes += ["encoder_layers", "decoder_embed_dim", "decoder_layers", "norm_first", "has_projection"]
    differing = [
        f"{name} {getattr(config, name)} in the checkpoint, {getattr(wanted, name)} asked for"
        for name in sizes
        if getattr(config, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(f"--init-from {options.init_from} does not fit: {'; '.join(differing)}")


def _check_shortest(config: MAEASTConfig | SSASTConfig, options: PretrainOptions) -> None:
    """A clip needs two tokens, one to see and one to hide."""
    kt, grid_f = config.patch_size[0], config.grid_f
    frames = num_frames(round(options.min_seconds * SAMPLE_RATE))
    if frames // kt * grid_f < 2:
        needed = (WINDOW + ((1 if grid_f > 1 else 2) * kt - 1) * HOP) / SAMPLE_RATE
        raise ValueError(
            f"min_seconds must be at least {needed:g} for patches of {kt} frames x {config.patch_size[1]} bins, "
            f"got {options.min_seconds:g}"
        )


def log_mel_statistics(clips: Clips, windows: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all log-mel values of these windows, by SSAST's front end, to four decimals.

    Its recipe normalises by such statistics of the whole data set (arXiv 2110.09784, official code).

    Args:
        clips: Where the windows lie.
        windows: (N, 3): clip, first sample, samples.
    """
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(windows), 16):
        waveforms, lengths, _, _ = load_batch(clips, windows[start : start + 16])
        features, frames = fbank(waveforms, lengths, frontend="ssast")
        values = features[real_tokens(frames, features.shape[1])].double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / count
    return round(mean, 4), round(math.sqrt(max(0.0, squares / count - mean**2)), 4)


def _open_data(options: PretrainOptions) -> tuple[Clips, np.ndarray, np.ndarray, str]:
    """The clips, which of them train and which are held out, and how they were split."""
    cache = Path(options.cache) if options.cache else corpus.default_cache()
    if options.data is None:
        fetched = corpus.fetch(cache)
        entries, left_out = corpus.default_clips(fetched.cache, fetched.packages)
        clips = scan(entries, cache / "decoded", options.min_seconds, options.workers)
        clips.report |= {"corpus": left_out, "packages": fetched.packages, "missing_packages": fetched.missing}
        return clips, *corpus.held_out(clips.entries)
    clips = scan(find_audio(options.data), cache / "decoded", options.min_seconds, options.workers)
    return clips, *split(clips, seed=options.seed)


def _held_out(model: MAEAST | SSAST, clips: Clips, indices: np.ndarray, options: PretrainOptions) -> HeldOut:
    """Features and masks of the clips to evaluate on: the first ``max_seconds`` of each.

    As many of each kind, spread evenly over the names; none that is silent, and clips of at least 2 s where there are
    enough of them.
    """
    silent = set(clips.report["silent"]["names"])
    heard = np.array([clip for clip in indices if clips.entries[clip].name not in silent], dtype=np.int64)
    indices = heard if heard.size else indices
    samples = clips.samples[indices]
    indices = indices[samples >= min(2 * SAMPLE_RATE, np.quantile(samples, 0.5))]
    by_kind: dict[str, list[int]] = {}
    for clip in sorted(indices.tolist(), key=lambda clip: clips.entries[clip].name):
        by_kind.setdefault(clips.entries[clip].kind, []).append(clip)
    share = HELD_OUT_CLIPS // len(by_kind)
    chosen = [kind[round(i)] for kind in by_kind.values() for i in np.linspace(0, len(kind) - 1, min(share, len(kind)))]
    longest = round(options.max_seconds * SAMPLE_RATE)
    windows = np.array([(clip, 0, min(longest, clips.samples[clip])) for clip in chosen])
    waveforms, lengths, _, names = load_batch(clips, windows)
    features, frames = model.features(waveforms, lengths)
    return HeldOut.of(model, features, frames, names, [clips.entries[clip].kind for clip in chosen])


def _headline(options: PretrainOptions, trainer: Trainer, clips: Clips, train: int, held_out: int, how: str) -> str:
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    name = options.preset or options.init_from or "patch_tiny"
    return (
        f"{options.model} {name}: {millions:.1f} M parameters, {trainer.precision} on {trainer.device} "
        f"({torch.get_num_threads()} threads); {clips.report['hours']:.2f} h in {clips.report['clips']} clips: "
        f"{train} to train, {held_out} to evaluate on ({how}); run folder {options.out}"
    )


def _flat(prefix: str, report: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{prefix}/{name}": value for name, value in report.items() if name != "baselines"}
    return flat | {f"{prefix}/baseline_{name}": value for name, value in report["baselines"].items()}
