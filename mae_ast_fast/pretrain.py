"""The pretraining loop: data in, checkpoints, curves and pictures out; killed and started again, it goes on.

Every random draw is a function of the seed and of what is drawn for (epoch and clip for order, windows and masks; step
for dropout), so a run continued from a checkpoint computes what an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, corpus
from .audio import find_audio
from .config import MAEASTConfig
from .data import Clips, batch_plan, load_batch, scan, split
from .evaluate import HeldOut, evaluate
from .fbank import SAMPLE_RATE, fbank
from .figures import plot_loss, plot_reconstruction
from .masking import sample_mask
from .model import MAEAST

HELD_OUT_CLIPS = 64
# Options that change neither what is computed nor in which order: a run may go on with others.
FREE_OPTIONS = ("out", "log_every", "save_every", "evaluate_every", "keep", "workers", "cache")


@dataclass
class PretrainOptions:
    """Options of ``mae-ast-fast pretrain``.

    Args:
        data: Folder of audio, fairseq .tsv manifest or audio file. None: the default corpus, real recordings from
            Debian packages, fetched once.
        out: Run folder. A run that was stopped there goes on.
        preset: Model sizes: {patch,frame}_{base,base_6layer,small,tiny}. None: those of --init-from, or patch_tiny.
        model_args: Model fields to set otherwise, as in MAEASTConfig: --model_args.mask_ratio 0.8
        init_from: Start from this checkpoint: a folder of ours or an official .pt file. A preset must have its sizes.
        steps: Updates of the whole run; the learning rate reaches 0 at the last.
        batch_seconds: Audio in a batch, in seconds: a token budget, not a clip count.
        max_seconds: Longer clips are cut into windows of at most this length.
        min_seconds: Shorter clips are skipped.
        lr: Peak learning rate. Paper: 1e-4.
        warmup_steps: Updates of linear warm-up from 0. Paper: 32,000.
        weight_decay: Decoupled, on all parameters.
        clip_norm: Gradient norm limit.
        seed: Seed of weights, data order, masks and dropout.
        precision: fp32, bf16, or auto: bf16 where the device computes it natively.
        device: cpu, cuda, or auto.
        impl: Implementation of the model's operations: auto, torch or triton.
        attention: Attention backend: auto or a name.
        log_every: Updates between two lines of progress, and between two checks that the loss is finite.
        save_every: Updates between two checkpoints.
        evaluate_every: Updates between two evaluations on held-out clips.
        keep: Checkpoints to keep.
        workers: Processes that decode audio.
        cache: Folder for fetched packages and decoded audio. None: $MAE_AST_FAST_CACHE or the user's cache folder.
    """

    data: str | None = None
    out: str = "runs/pretrain"
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    steps: int = 10_000
    batch_seconds: float = 160.0
    max_seconds: float = 10.0
    min_seconds: float = 0.4
    lr: float = 5e-4
    warmup_steps: int = 500
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    attention: str = "auto"
    log_every: int = 10
    save_every: int = 500
    evaluate_every: int = 1000
    keep: int = 2
    workers: int = 2
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "evaluate_every", "keep", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("batch_seconds", "max_seconds", "min_seconds", "lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"warmup_steps and weight_decay must be >= 0, got {self.warmup_steps} and {self.weight_decay}"
            )
        if not self.min_seconds <= self.max_seconds <= self.batch_seconds:
            raise ValueError(
                "expected min_seconds <= max_seconds <= batch_seconds, got "
                f"{self.min_seconds}, {self.max_seconds} and {self.batch_seconds}"
            )
        for name, allowed in (("precision", ("auto", "fp32", "bf16")), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.model_config()

    def model_config(self, source: MAEASTConfig | None = None) -> MAEASTConfig:
        """The model that preset and overrides describe; without a preset, ``source`` with the overrides."""
        if self.preset is None and source is not None:
            return MAEASTConfig.from_dict({**source.to_dict(), **self.model_args})
        return MAEASTConfig.preset(self.preset or "patch_tiny", **self.model_args)


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; says at which step, on which clips, and which checkpoint to go back to."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the run was saved and can go on."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {path}, the same command goes on from there")
        self.exit_code = 128 + number


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 matrix products natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public name before torch 2.15
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def learning_rate(step: int, options: PretrainOptions) -> float:
    """Rate of update ``step`` (from 0): linear from 0 at the first over the warm-up, then linear to 0 at ``steps``."""
    if step < options.warmup_steps:
        return options.lr * step / options.warmup_steps
    return options.lr * (options.steps - step) / max(1, options.steps - options.warmup_steps)


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
    _write_json(run / "data_report.json", clips.report)
    trainer = Trainer(options, run, clips, train, device)
    held_out = _held_out(trainer.model, clips, held_out_clips, options)
    print(_headline(options, trainer, clips, len(train), len(held_out.names), how))
    trainer.train(held_out)
    return trainer.finish(held_out, how)


class Trainer:
    """State of one run: model, optimizer, and the place in the data."""

    def __init__(
        self, options: PretrainOptions, run: Path, clips: Clips, train: np.ndarray, device: torch.device
    ) -> None:
        self.options, self.run, self.clips, self.train_clips, self.device = options, run, clips, train, device
        bf16 = options.precision == "bf16" or (options.precision == "auto" and native_bf16(device))
        self.precision = "bf16" if bf16 else "fp32"
        self.step = self.epoch = self.batch = 0
        self.seconds = self.audio_seconds = 0.0
        self.pending: list[tuple[dict[str, Any], Tensor, list[str]]] = []  # rows whose numbers are still on the device
        self.bar: Any = None
        self.events: Any = None

        torch.manual_seed(options.seed)
        found = checkpoint.load_training(run)
        init = {"impl": options.impl, "attention": options.attention}
        if found is not None:
            path, model, state, damaged = found
            for line in damaged:
                print(f"skipped a damaged checkpoint: {line}")
            print(f"going on from {path}")
            model.impl, model.attention = options.impl, options.attention
        elif options.init_from is not None:
            source = checkpoint.load_model(options.init_from, **init)
            config = options.model_config(source.config)
            _check_fits(source.config, config, options)
            model = MAEAST(config, **init)
            model.load_state_dict(source.state_dict())
        else:
            model = MAEAST(options.model_config(), **init)
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=options.weight_decay,
            fused=True,
        )
        if found is not None:
            if state["data"] != self._data_identity():
                raise ValueError(
                    f"the data of the run in {run} has changed since it started: expected {state['data']}, got "
                    f"{self._data_identity()}; use another --out, or restore the data"
                )
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            self.seconds, self.audio_seconds = state["seconds"], state["audio_seconds"]

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

    def _batches(self) -> Iterator[np.ndarray]:
        """The batches from the current place on, epoch after epoch."""
        options = self.options
        while True:
            plan = batch_plan(
                self.clips.samples[self.train_clips],
                options.batch_seconds,
                options.max_seconds,
                options.seed,
                self.epoch,
                options.min_seconds,
            )
            while self.batch < len(plan):
                self.batch += 1
                windows = plan[self.batch - 1].copy()
                windows[:, 0] = self.train_clips[windows[:, 0]]
                yield windows
            self.epoch, self.batch = self.epoch + 1, 0

    def _update(self, windows: np.ndarray) -> None:
        """One optimizer update; its numbers stay on the device until the next flush."""
        options, model = self.options, self.model
        config = model.config
        waveforms, lengths, ids, names = load_batch(self.clips, windows)
        features, frames = fbank(waveforms.to(self.device), lengths.to(self.device))
        tokens = frames // config.patch_size[0] * config.grid_f
        mask = sample_mask(
            config.masking,
            tokens,
            config.grid_f,
            config.mask_ratio,
            seed=options.seed,
            clip_ids=ids.to(self.device),
            # The paper's own strategy draws one mask a batch and ignores clip ids: every update needs another.
            epoch=self.step if config.masking == "chunk_official" else self.epoch,
        )
        torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout: a function of the step, nothing to save
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = model(features, frames, mask)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = float(lengths.sum()) / SAMPLE_RATE
        self.audio_seconds += seconds
        row = {"step": self.step, "epoch": self.epoch, "lr": rate, "clips": len(names), "audio_seconds": seconds}
        numbers = (out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy, norm)
        self.pending.append((row, torch.stack([number.detach().float() for number in numbers]), names))
        self.bar.update()

    def _flush(self) -> None:
        """Brings the numbers of the last updates to the host, checks and writes them."""
        if not self.pending:
            return
        rows, clips = [], 0
        for row, numbers, names in self.pending:
            loss, reconstruction, classification, accuracy, norm = numbers.tolist()
            if not math.isfinite(loss) or not math.isfinite(norm):
                self._fail(row["step"], loss, norm, names)
            row |= {
                "loss": loss,
                "loss_reconstruction": reconstruction,
                "loss_classification": classification,
                "accuracy": accuracy,
                "grad_norm": norm,
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
        back = f"go back to {saved[-1]}" if saved else "no checkpoint was saved before it"
        raise NonFiniteLoss(
            f"step {step}: loss {loss}, gradient norm {norm}; clips: {', '.join(names)}; {back} "
            "(the same command does), with a lower --lr or --precision fp32, or without these clips"
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
        partial = path.with_name(".metrics.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, path)

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        self._flush()
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "audio_seconds": self.audio_seconds,
            "optimizer": self.optimizer.state_dict(),
            "data": self._data_identity(),
        }
        return checkpoint.save_training(self.run, self.step, self.model, state, self.options.keep)

    def finish(self, held_out: HeldOut, how: str) -> dict[str, Any]:
        """Evaluates, draws and writes what a finished run leaves."""
        report = evaluate(self.model, held_out)
        by_kind = {}
        for kind in sorted(set(held_out.kinds) - {""}):
            part = held_out.select([i for i, k in enumerate(held_out.kinds) if k == kind])
            by_kind[kind] = evaluate(self.model, part)
        self.model._save_pretrained(self.run)
        rows = read_metrics(self.run / "metrics.jsonl")
        steps = [row for row in rows if "loss" in row]
        evaluations = [row for row in rows if "held_out" in row] + [{"step": self.step, "held_out": report}]
        plot_loss(steps, evaluations, self.run / "loss.png")
        plot_reconstruction(self.model, held_out.longest_of_each_kind(), self.run / "reconstruction.png")
        data = self.clips.report
        summary = {
            "steps": self.step,
            "config": self.model.config.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.device),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "train_seconds": round(self.seconds, 1),
            "audio_hours_seen": round(self.audio_seconds / 3600, 3),
            "clips_per_second": round(sum(row["clips"] for row in steps) / max(self.seconds, 1e-9), 2),
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
        _write_json(self.run / "summary.json", summary)
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
    """Refuses to go on with a run under options that would make it another one; records them for a new run."""
    path = run / "options.json"
    fields = dataclasses.asdict(options)
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in fields.items()
            if name not in FREE_OPTIONS and before.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{run} holds a run with other options ({'; '.join(differing)}): use the same options to go on, or "
                "another --out"
            )
    run.mkdir(parents=True, exist_ok=True)
    _write_json(path, fields)


def _check_fits(config: MAEASTConfig, wanted: MAEASTConfig, options: PretrainOptions) -> None:
    sizes = (
        "num_mel_bins", "patch_size", "embed_dim", "ffn_dim", "num_heads", "encoder_layers", "decoder_embed_dim",
        "decoder_layers", "norm_first", "has_projection",
    )  # fmt: skip
    differing = [
        f"{name} {getattr(config, name)} in the checkpoint, {getattr(wanted, name)} asked for"
        for name in sizes
        if getattr(config, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(f"--init-from {options.init_from} does not fit: {'; '.join(differing)}")


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


def _held_out(model: MAEAST, clips: Clips, indices: np.ndarray, options: PretrainOptions) -> HeldOut:
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
    features, frames = fbank(waveforms, lengths)
    return HeldOut.of(model, features, frames, names, [clips.entries[clip].kind for clip in chosen])


def _headline(options: PretrainOptions, trainer: Trainer, clips: Clips, train: int, held_out: int, how: str) -> str:
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    name = options.preset or options.init_from or "patch_tiny"
    return (
        f"{name}: {millions:.1f} M parameters, {trainer.precision} on {trainer.device} "
        f"({torch.get_num_threads()} threads); {clips.report['hours']:.2f} h in {clips.report['clips']} clips: "
        f"{train} to train, {held_out} to evaluate on ({how}); run folder {options.out}"
    )


def _flat(prefix: str, report: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{prefix}/{name}": value for name, value in report.items() if name != "baselines"}
    return flat | {f"{prefix}/baseline_{name}": value for name, value in report["baselines"].items()}


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
