"""One pretraining run: the model, its updates, and its place in the data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load as checkpoint
from ..checkpoints import step_folder
from ..checkpoints.training import TrainingCheckpoints
from ..data.loader import loader
from ..data.shards import Shards
from ..devices import pick_precision, send
from ..files import write_json
from ..models import registry
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.fbank import HOP, SAMPLE_RATE, WINDOW, num_frames
from .data import log_mel_statistics
from .distributed import DistributedContext
from .evaluation import HeldOut, evaluate
from .figures import plot_loss, plot_reconstruction
from .lifecycle import GracefulShutdown, Interrupted
from .metrics_log import MetricsLog, read_metrics
from .options import PretrainOptions
from .schedule import learning_rate
from .step import MicroBatch, TrainStep

SKIPPED_AT_MOST = 50  # updates in a row of fp16: halved as often, its scale is below any gradient
FAULTS_LISTED = 1000  # unreadable clips named in summary.json; their count is whole


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; says at which step, on which clips, and which checkpoint to go back to."""


class Trainer:
    """State of one run: model, optimizer, and the place in the data."""

    def __init__(self, options: PretrainOptions, run: Path, shards: Shards, peers: DistributedContext) -> None:
        self.options, self.run, self.shards, self.peers, self.device = options, run, shards, peers, peers.device
        self.precision = pick_precision(options.precision, self.device)
        self.step = 0  # updates done
        self.seconds = self.waited = self.audio_seconds = 0.0
        self.faults: list[str] = []
        self.fault_count = 0
        self.pending: list[tuple[dict[str, Any], Tensor, list[str], list[str]]] = []  # numbers are still on the device
        self.skipped = 0  # updates in a row that fp16 left out
        self.log: MetricsLog | None = None

        torch.manual_seed(options.seed)
        self.checkpoints = TrainingCheckpoints(run, options.keep)
        found = self.checkpoints.latest_valid()
        self.micro_batches = options.micro_batches or (peers.size if found is None else found.state["micro_batches"])
        model = self._new_model(None if found is None else found.config)
        if self.micro_batches % peers.size:
            raise ValueError(
                f"micro_batches must be a multiple of the {peers.size} processes, got {self.micro_batches}"
            )
        self.places = [(0, 0)] * self.micro_batches  # epoch and batch of each, behind the last update; own ones alone
        self.own = slice(*(self.micro_batches // peers.size * (peers.rank + end) for end in (0, 1)))
        check_shortest(model.config, options)
        self.model = model.to(self.device).train()
        self.updates = TrainStep(
            self.model,
            options.lr,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
            precision=self.precision,
            compile=options.compile,
            graphs=options.graphs,
            parallel=options.parallel if peers.size > 1 else None,
        )
        if found is not None:
            self._restore(found.state)

    @property
    def _init(self) -> dict[str, str]:
        """What the constructor of a model takes besides its configuration."""
        return {name: getattr(self.options, name) for name in ("impl", "attention", "recompute")}

    def _restore(self, state: dict[str, Any]) -> None:
        """Goes on where the newest checkpoint is."""
        if state["data"] != self.shards.identity:
            raise ValueError(
                f"the data of the run in {self.run} has changed since it started: expected {state['data']}, got "
                f"{self.shards.identity}; use another --out, or restore the data"
            )
        path, _ = self.checkpoints.load(self.updates)
        if self.peers.first:
            print(f"going on from {path}", flush=True)
        self.step, self.places = state["step"], [(epoch, batch) for epoch, batch in state["places"]]
        self.seconds, self.waited, self.audio_seconds = state["seconds"], state["waited"], state["audio_seconds"]
        self.faults, self.fault_count = state["faults"], state["fault_count"]

    def _new_model(self, resumed: MAEASTConfig | SSASTConfig | None) -> MAEAST | SSAST:
        """The model with which a run starts; ``resumed`` is the configuration of its checkpoint, where there is one."""
        options = self.options
        if resumed is not None:
            return registry.MODELS[options.model](resumed, **self._init)
        if options.init_from is not None:
            source = checkpoint.load_model(options.init_from)  # its weights alone count
            config = options.model_config(source.config)
            check_fits(source.config, config, options)
            model = type(source)(config, **self._init)
            model.load_state_dict(source.state_dict())
            return model
        config = options.model_config()
        if isinstance(config, SSASTConfig) and not {"mean", "std"} <= set(options.model_args):
            # One process's: a clip that another could not read must not make their models differ.
            mean, std = self.peers.gather(log_mel_statistics(self.shards, options))[0]
            config = dataclasses.replace(config, **{"mean": mean, "std": std, **options.model_args})
        return registry.MODELS[options.model](config, **self._init)

    def train(self, held_out: HeldOut) -> None:
        """Runs the remaining updates."""
        options = self.options
        with contextlib.ExitStack() as stack:
            if self.peers.first:
                self.log = MetricsLog(self.run, self.step, options.steps)
                stack.callback(self.log.close)
            signals = stack.enter_context(GracefulShutdown())
            stack.callback(self.checkpoints.finish)
            batches = loader(
                self.shards,
                batch_seconds=options.batch_seconds / self.micro_batches,
                max_seconds=options.max_seconds,
                min_seconds=options.min_seconds,
                seed=options.seed,
                cursors=self.places,
                micro_batches=self.micro_batches,
                rank=self.peers.rank,
                world_size=self.peers.size,
                workers=options.loader_workers,
                pin_memory=self.device.type == "cuda",
            )
            stack.callback(batches.close)
            self._began = time.perf_counter()
            while self.step < options.steps:
                self._update(batches)
                if self.step % options.log_every == 0 or self.step == options.steps:
                    self._flush()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
                if self.step % options.evaluate_every == 0 and self.step < options.steps:
                    report = evaluate(self.model, held_out)  # by all: a sharded model takes all of them
                    if self.log is not None:
                        self.log.row({"step": self.step, "held_out": report})
                if (number := self.peers.largest(signals.received or 0)) > 0:
                    self.save()
                    raise Interrupted(number, self.checkpoints.finish())
                if not self.pending:  # what was saved and evaluated since the flush is no training time
                    self._began = time.perf_counter()

    def _update(self, batches: Any) -> None:
        """One optimizer update; its numbers stay on the device until the next flush."""
        options = self.options
        parts, names, faults, samples, waited = [], [], [], 0, 0.0
        for lane in range(self.micro_batches)[self.own]:
            began = time.perf_counter()
            batch, self.places[lane] = next(batches)
            waited += time.perf_counter() - began
            features, frames = self.model.features(send(batch.waveforms, self.device), batch.num_samples)
            # The paper's own strategy draws one mask a batch and ignores clip ids: every batch needs another.
            number = self.step * self.micro_batches + lane
            epoch = number if self.model.config.masking == "chunk_official" else batch.epoch
            draw = {"seed": options.seed, "clip_ids": batch.ids, "epoch": epoch}
            parts.append(MicroBatch(features, frames, **draw))
            samples += int(batch.num_samples.sum())
            names += batch.names
            faults += [f"{name}: {reason}" for name, reason in batch.faults]
        torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout: a function of the step, nothing to save
        rate, tokens, rows = learning_rate(self.step, options), self.updates.tokens, self.updates.rows
        numbers = self.updates.update(parts, lr=rate)
        self.step += 1
        counts = {"clips": len(names), "samples": samples, "waited": waited, "faults": len(faults)}
        counts |= {"tokens": self.updates.tokens - tokens, "rows": self.updates.rows - rows}
        row = {"step": self.step, "epoch": self.places[self.own][0][0], "lr": rate, **counts}
        self.pending.append((row, torch.stack(numbers), names, faults))
        if self.log is not None:
            self.log.advance()

    def _flush(self) -> None:
        """Brings the numbers of the last updates to the host, checks and writes them."""
        if not self.pending:
            return
        summed = ("clips", "samples", "faults", "tokens", "rows", "waited")
        counts = torch.tensor([[float(row[name]) for name in summed] for row, *_ in self.pending], dtype=torch.float64)
        counts = self.peers.sum(counts).tolist()
        self._note_faults()
        rows, clips, waited = [], 0, 0.0
        for (row, numbers, names, _), of_all in zip(self.pending, counts, strict=True):
            row |= {name: int(count) for name, count in zip(summed[:-1], of_all[:-1], strict=True)}
            row["audio_seconds"] = row.pop("samples") / SAMPLE_RATE
            row["waited"] = round(of_all[-1] / self.peers.size, 4)
            loss, reconstruction, classification, accuracy, norm = numbers.tolist()
            skipped = self.precision == "fp16" and not math.isfinite(norm)  # its scale was too large, and is halved
            self.skipped = self.skipped + 1 if skipped else 0
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.skipped in range(1, SKIPPED_AT_MOST)):
                for finite in rows if self.log is not None else ():
                    self.log.row(finite)
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
            waited += row["waited"]
            self.audio_seconds += row["audio_seconds"]
        self.pending.clear()
        now = time.perf_counter()
        spent, self._began = now - self._began, now
        self.seconds += spent
        self.waited += waited
        if self.log is None:
            return
        rate = clips / spent
        for row in rows:
            self.log.row(row | {"clips_per_second": round(rate, 2)})
        last = rows[-1]
        line = (
            f"loss {last['loss']:.3f} (mse {last['loss_reconstruction']:.3f}, nce {last['loss_classification']:.3f}, "
            f"acc {last['accuracy']:.3f})  {rate:.1f} clips/s, {min(1.0, waited / spent):.0%} waiting for data"
        )
        self.log.progress(self.step, line, spent / len(rows) * (self.options.steps - self.step))

    def _note_faults(self) -> None:
        """Names the clips that could not be read since the last flush, by any process."""
        own = [fault for *_, faults in self.pending for fault in faults]
        found = [fault for faults in self.peers.gather(own) for fault in faults]
        self.fault_count += len(found)
        self.faults += found[: FAULTS_LISTED - len(self.faults)]
        if found and self.log is not None:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            self.log.say(f"step {self.step}: clips that cannot be read are left out: {'; '.join(found[:3])}{more}")

    def _fail(self, step: int, loss: float, norm: float, names: list[str]) -> None:
        names = [name for of_one in self.peers.gather(names) for name in of_one]
        saved = step_folder.training_checkpoints(self.run)
        back = f"go back to {saved[-1]} (the same command does)" if saved else "no checkpoint was saved before it"
        raise NonFiniteLoss(
            f"step {step}: loss {loss}, gradient norm {norm}; clips: {', '.join(names)}; {back}; try another --out "
            "with a lower --lr, with --precision fp32, or without these clips"
        )

    def save(self) -> None:
        """Begins to write a checkpoint of the current step, once."""
        self._flush()
        state = {
            "step": self.step,
            "places": [place for own in self.peers.gather(self.places[self.own]) for place in own],
            "micro_batches": self.micro_batches,
            "seconds": self.seconds,
            "waited": self.waited,
            "audio_seconds": self.audio_seconds,
            "faults": self.faults,
            "fault_count": self.fault_count,
            "data": self.shards.identity,
        }
        self.checkpoints.save(self.step, self.updates, state)

    def finish(self, held_out: HeldOut) -> dict[str, Any]:
        """Evaluates, draws and writes what a finished run leaves."""
        init = {"impl": self.options.impl, "attention": self.options.attention}
        model = checkpoint.export(self.checkpoints.newest(), self.run, **init).to(self.device)
        report = evaluate(model, held_out)
        by_kind = {}
        for kind in sorted(set(held_out.kinds) - {""}):
            part = held_out.select([i for i, k in enumerate(held_out.kinds) if k == kind])
            by_kind[kind] = evaluate(model, part)
        written = read_metrics(self.run / "metrics.jsonl")
        steps = [row for row in written if "loss" in row]
        tokens, rows = (sum(row.get(name, 0) for row in steps) for name in ("tokens", "rows"))
        evaluations = [row for row in written if "held_out" in row] + [{"step": self.step, "held_out": report}]
        data = self.shards.report
        seconds = max(self.seconds, 1e-9)
        summary = {
            "steps": self.step,
            "model": model.model_type,
            "config": model.config.to_dict(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": str(self.device),
            "processes": self.peers.size,
            "parallel": self.options.parallel if self.peers.size > 1 else None,
            "micro_batches": self.micro_batches,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "train_seconds": round(self.seconds, 1),
            "audio_hours_seen": round(self.audio_seconds / 3600, 3),
            "clips_per_second": round(sum(row["clips"] for row in steps) / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1.0 - tokens / rows, 4) if rows else 0.0,
            "data_wait_share": round(self.waited / seconds, 4),
            "final_loss": steps[-1]["loss"] if steps else None,
            "held_out": report,
            "held_out_by_kind": by_kind,
            "held_out_split": data.get("split", ""),
            "held_out_clips": held_out.names,
            "train_clips": data.get("train"),
            "data": {
                "files": data.get("files"),
                "clips": data.get("clips"),
                "hours": round(data.get("hours", 0.0), 3),
                "skipped": {reason: found["count"] for reason, found in data.get("skipped", {}).items()},
                **{name: data.get(name, {}).get("count", 0) for name in ("silent", "clipped", "duplicate")},
                "unreadable_in_training": self.fault_count,
                "unreadable_names": self.faults,
                "unreadable_manifests": self.shards.faults,
            },
            "torch": torch.__version__,
        }
        write_json(self.run / "summary.json", summary)
        plot_loss(steps, evaluations, self.run / "loss.png")
        plot_reconstruction(model, held_out.longest_of_each_kind(), self.run / "reconstruction.png")
        return summary


def check_fits(
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


def check_shortest(config: MAEASTConfig | SSASTConfig, options: PretrainOptions) -> None:
    """A clip needs two tokens, one to see and one to hide."""
    kt, grid_f = config.patch_size[0], config.grid_f
    frames = num_frames(round(options.min_seconds * SAMPLE_RATE))
    if frames // kt * grid_f < 2:
        needed = (WINDOW + ((1 if grid_f > 1 else 2) * kt - 1) * HOP) / SAMPLE_RATE
        raise ValueError(
            f"min_seconds must be at least {needed:g} for patches of {kt} frames x {config.patch_size[1]} bins, "
            f"got {options.min_seconds:g}"
        )
