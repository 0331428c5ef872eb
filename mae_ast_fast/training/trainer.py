"""One pretraining run: the model, its updates, and its position in the data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints import load as checkpoint
from ..checkpoints import step_folder
from ..checkpoints.training import TrainingCheckpoints
from ..data.loader import BatchLoader
from ..data.shards import Batch, Shards
from ..data.statistics import log_mel_statistics
from ..devices import pick_precision, send
from ..files import write_json
from ..models import registry
from ..models.config import MAEASTConfig, SSASTConfig
from ..models.mae_ast import MAEAST
from ..models.ssast import SSAST
from ..ops.fbank import SAMPLE_RATE, frames_to_samples, num_frames
from .distributed import DistributedContext
from .evaluation import HeldOut, evaluate
from .figures import plot_loss, plot_reconstruction, training_unit
from .lifecycle import GracefulShutdown, Interrupted
from .metrics_log import MetricsLog, StepRecord, read_metrics
from .micro_batch import MicroBatch
from .options import PretrainOptions
from .schedule import learning_rate
from .step import StepMetrics, TrainStep
from .summary import PretrainSummary

MAX_SKIPPED = 50  # consecutive fp16 updates: after so many halvings the loss scale is too small for any gradient
FAULTS_LISTED = 1000  # unreadable clips named in summary.json; their count includes all


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN. The message names the step, the clips and the checkpoint to return to."""


class UpdateCounts(NamedTuple):
    """Numbers of an update that are summed over the processes.

    Attributes:
        clips: Clips.
        samples: Audio samples of the clips.
        faults: Clips that could not be read.
        tokens: Real tokens.
        rows: Rows computed, padding included.
        wait_seconds: Time spent waiting for data.
    """

    clips: float
    samples: float
    faults: float
    tokens: float
    rows: float
    wait_seconds: float


@dataclass
class PendingUpdate:
    """An update whose metrics are still on the device.

    Attributes:
        step: Number of the update, from 1.
        epoch: Epoch of the first stream of this process.
        lr: Learning rate.
        counts: Counts of this process.
        metrics: (5,) ``StepMetrics`` as one tensor on the device.
        clip_names: Names of this process's clips.
        faults: "name: reason" of each of its clips that could not be read.
    """

    step: int
    epoch: int
    lr: float
    counts: UpdateCounts
    metrics: Tensor
    clip_names: list[str]
    faults: list[str]


class Trainer:
    """State of one run: model, optimizer, and position in the data.

    Args:
        options: Options of the run.
        run: Run folder.
        shards: Training and held-out clips.
        dist_ctx: This process among those that train.

    Attributes:
        step: Updates done.
        train_seconds: Time spent on them, without checkpoints and evaluations.
        wait_seconds: Part of it spent waiting for data, mean over processes.
        audio_seconds: Audio trained on, of all processes, in seconds.
        cursors: Epoch and batch after the last update, for each data stream. Those of other processes are not updated.
        local_streams: The streams of this process.

    Raises:
        ValueError: The options do not fit the checkpoint, the data or the number of processes.
    """

    def __init__(self, options: PretrainOptions, run: Path, shards: Shards, dist_ctx: DistributedContext) -> None:
        self.options, self.run, self.shards, self.dist_ctx = options, run, shards, dist_ctx
        self.device = dist_ctx.device
        self.precision = pick_precision(options.precision, self.device)
        self.step = 0
        self.train_seconds = self.wait_seconds = self.audio_seconds = 0.0
        self.faults: list[str] = []
        self.fault_count = 0
        self.pending: list[PendingUpdate] = []
        self.consecutive_skips = 0  # fp16 updates with a gradient norm that is not finite
        self.log: MetricsLog | None = None

        torch.manual_seed(options.seed)
        self.checkpoints = TrainingCheckpoints(run, options.keep)
        saved = self.checkpoints.latest_valid()
        saved_micro_batches = dist_ctx.world_size if saved is None else saved.state["micro_batches"]
        self.micro_batches = options.micro_batches or saved_micro_batches
        model = self._new_model(None if saved is None else saved.config)
        if self.micro_batches % dist_ctx.world_size:
            raise ValueError(
                f"micro_batches must be a multiple of the {dist_ctx.world_size} processes, got {self.micro_batches}"
            )
        self.cursors = [(0, 0)] * self.micro_batches
        streams_per_process = self.micro_batches // dist_ctx.world_size
        first_stream = streams_per_process * dist_ctx.rank
        self.local_streams = slice(first_stream, first_stream + streams_per_process)
        check_min_seconds(model.config, options)
        self.model = model.to(self.device).train()
        self.train_step = TrainStep(
            self.model,
            options.lr,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
            precision=self.precision,
            compile=options.compile,
            graphs=options.graphs,
            parallel=options.parallel if dist_ctx.world_size > 1 else None,
            optimizer=options.optimizer,
        )
        if saved is not None:
            self._restore(saved.state)

    def _build(self, config: MAEASTConfig | SSASTConfig) -> MAEAST | SSAST:
        """A new model of the run's kind."""
        model_class: Any = registry.MODELS[self.options.model]
        options = self.options
        return model_class(config, impl=options.impl, attention=options.attention, recompute=options.recompute)

    def _restore(self, state: dict[str, Any]) -> None:
        """Load the newest checkpoint, whose state is ``state``."""
        if state["data"] != self.shards.identity:
            raise ValueError(
                f"the data of the run in {self.run} has changed since it started: expected {state['data']}, got "
                f"{self.shards.identity}; use another --out, or restore the data"
            )
        loaded = self.checkpoints.load(self.train_step)
        assert loaded is not None
        if self.dist_ctx.is_first:
            print(f"resuming from {loaded[0]}", flush=True)
        self.step, self.cursors = state["step"], [(epoch, batch) for epoch, batch in state["places"]]
        self.train_seconds, self.wait_seconds = state["seconds"], state["waited"]
        self.audio_seconds = state["audio_seconds"]
        self.faults, self.fault_count = state["faults"], state["fault_count"]

    def _new_model(self, saved_config: MAEASTConfig | SSASTConfig | None) -> MAEAST | SSAST:
        """The model at the start of this process.

        Args:
            saved_config: Configuration of the run's checkpoint. None: the run has none.
        """
        options = self.options
        if saved_config is not None:
            return self._build(saved_config)
        if options.init_from is not None:
            source = checkpoint.load_model(options.init_from)  # only its weights are used
            config = options.model_config(source.config)
            check_fits(source.config, config, options)
            model = self._build(config)
            model.load_state_dict(source.state_dict())
            return model
        config = options.model_config()
        if isinstance(config, SSASTConfig) and not {"mean", "std"} <= set(options.model_args):
            # Those of the first process: a clip that another one could not read must not make their models differ.
            statistics = log_mel_statistics(
                self.shards,
                batch_seconds=options.batch_seconds,
                max_seconds=options.max_seconds,
                min_seconds=options.min_seconds,
                seed=options.seed,
            )
            mean, std = self.dist_ctx.gather(statistics)[0]
            config = dataclasses.replace(config, **{"mean": mean, "std": std, **options.model_args})
        return self._build(config)

    def train(self, held_out: HeldOut) -> None:
        """Run the remaining updates.

        Args:
            held_out: Clips to evaluate on.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came; the run was saved.
            NonFiniteLoss: The loss became infinite or NaN.
        """
        options = self.options
        with contextlib.ExitStack() as stack:
            if self.dist_ctx.is_first:
                self.log = MetricsLog(self.run, self.step, options.steps)
                stack.callback(self.log.close)
            shutdown = stack.enter_context(GracefulShutdown())
            stack.callback(self.checkpoints.finish)
            loader = BatchLoader(
                self.shards,
                batch_seconds=options.batch_seconds / self.micro_batches,
                max_seconds=options.max_seconds,
                min_seconds=options.min_seconds,
                seed=options.seed,
                cursors=self.cursors,
                micro_batches=self.micro_batches,
                rank=self.dist_ctx.rank,
                world_size=self.dist_ctx.world_size,
                workers=options.loader_workers,
                pin_memory=self.device.type == "cuda",
            )
            batches = iter(loader)
            stack.callback(batches.close)
            self._interval_start = time.perf_counter()
            while self.step < options.steps:
                self._update(batches)
                if self.step % options.log_every == 0 or self.step == options.steps:
                    self._flush()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
                if self.step % options.evaluate_every == 0 and self.step < options.steps:
                    report = evaluate(self.model, held_out)  # in every process: a sharded model needs all of them
                    if self.log is not None:
                        self.log.write({"step": self.step, "held_out": report})
                if (signal_number := self.dist_ctx.maximum(shutdown.received or 0)) > 0:
                    self.save()
                    raise Interrupted(signal_number, self.checkpoints.finish())
                if not self.pending:  # exclude checkpointing and evaluation from the training clock
                    self._interval_start = time.perf_counter()

    def _update(self, batches: Iterator[tuple[Batch, tuple[int, int]]]) -> None:
        """Make one update; its metrics stay on the device until the next flush."""
        options = self.options
        micro_batches: list[MicroBatch] = []
        clip_names: list[str] = []
        faults: list[str] = []
        num_samples, wait_seconds = 0, 0.0
        for stream in range(self.micro_batches)[self.local_streams]:
            start = time.perf_counter()
            batch, self.cursors[stream] = next(batches)
            wait_seconds += time.perf_counter() - start
            log_mel, frames = self.model.features(send(batch.waveforms, self.device), batch.num_samples)
            # The paper's own strategy draws one mask per batch and ignores clip ids: every batch needs its own epoch.
            micro_batch_index = self.step * self.micro_batches + stream
            epoch = micro_batch_index if self.model.config.masking == "chunk_official" else batch.epoch
            micro_batches.append(MicroBatch(log_mel, frames, seed=options.seed, clip_ids=batch.ids, epoch=epoch))
            num_samples += int(batch.num_samples.sum())
            clip_names += batch.names
            faults += [f"{name}: {reason}" for name, reason in batch.faults]
        torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout depends on the step, so nothing is saved
        lr = learning_rate(self.step, options)
        tokens_before, rows_before = self.train_step.num_tokens, self.train_step.num_rows
        metrics = self.train_step.update(micro_batches, lr=lr)
        self.step += 1
        counts = UpdateCounts(
            clips=len(clip_names),
            samples=num_samples,
            faults=len(faults),
            tokens=self.train_step.num_tokens - tokens_before,
            rows=self.train_step.num_rows - rows_before,
            wait_seconds=wait_seconds,
        )
        pending = PendingUpdate(
            step=self.step,
            epoch=self.cursors[self.local_streams][0][0],
            lr=lr,
            counts=counts,
            metrics=torch.stack(metrics),
            clip_names=clip_names,
            faults=faults,
        )
        self.pending.append(pending)
        if self.log is not None:
            self.log.advance()

    def _flush(self) -> None:
        """Copy the metrics of the pending updates to the host, check them and write them."""
        if not self.pending:
            return
        records = self._gather_records()
        self._note_faults()
        self._check_finite(records)
        self.pending.clear()
        now = time.perf_counter()
        interval_seconds, self._interval_start = now - self._interval_start, now
        self.train_seconds += interval_seconds
        self.wait_seconds += sum(record.waited for record in records)
        for record in records:
            self.audio_seconds += record.audio_seconds
        if self.log is not None:
            self._write_records(self.log, records, interval_seconds)

    def _gather_records(self) -> list[StepRecord]:
        """The pending updates, with the counts of all processes."""
        local_counts = torch.tensor([update.counts for update in self.pending], dtype=torch.float64)
        global_counts = map(UpdateCounts._make, self.dist_ctx.sum(local_counts).tolist())
        return [
            StepRecord(
                step=update.step,
                epoch=update.epoch,
                lr=update.lr,
                clips=int(counts.clips),
                waited=round(counts.wait_seconds / self.dist_ctx.world_size, 4),
                faults=int(counts.faults),
                tokens=int(counts.tokens),
                rows=int(counts.rows),
                audio_seconds=int(counts.samples) / SAMPLE_RATE,
                **dict(zip(StepMetrics._fields, update.metrics.tolist(), strict=True)),
            )
            for update, counts in zip(self.pending, global_counts, strict=True)
        ]

    def _check_finite(self, records: list[StepRecord]) -> None:
        """Check the losses and gradient norms of the pending updates.

        With fp16 a norm that is not finite means that the loss scale was too large. It is halved for the next update.

        Raises:
            NonFiniteLoss: A loss is not finite, or a norm, with fp16 ``MAX_SKIPPED`` times in a row.
        """
        for index, record in enumerate(records):
            finite_norm = math.isfinite(record.grad_norm)
            skipped = self.precision == "fp16" and not finite_norm
            self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
            if not math.isfinite(record.loss) or not (finite_norm or self.consecutive_skips in range(1, MAX_SKIPPED)):
                if self.log is not None:
                    for finite_record in records[:index]:
                        self.log.write(finite_record.to_json())
                self._fail(record, self.pending[index].clip_names)

    def _write_records(self, log: MetricsLog, records: list[StepRecord], interval_seconds: float) -> None:
        """Write updates, which took ``interval_seconds`` together, to metrics.jsonl, and show the progress."""
        clips_per_second = sum(record.clips for record in records) / interval_seconds
        for record in records:
            log.write(record.to_json() | {"clips_per_second": round(clips_per_second, 2)})
        wait_share = min(1.0, sum(record.waited for record in records) / interval_seconds)
        last = records[-1]
        line = (
            f"loss {last.loss:.3f} (mse {last.loss_reconstruction:.3f}, nce {last.loss_classification:.3f}, "
            f"acc {last.accuracy:.3f})  {clips_per_second:.1f} clips/s, {wait_share:.0%} waiting for data"
        )
        log.progress(self.step, line, interval_seconds / len(records) * (self.options.steps - self.step))

    def _note_faults(self) -> None:
        """Report the clips that any process could not read since the last flush."""
        local_faults = [fault for update in self.pending for fault in update.faults]
        faults = [fault for process_faults in self.dist_ctx.gather(local_faults) for fault in process_faults]
        self.fault_count += len(faults)
        self.faults += faults[: FAULTS_LISTED - len(self.faults)]
        if faults and self.log is not None:
            rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            self.log.say(f"step {self.step}: skipped clips that cannot be read: {'; '.join(faults[:3])}{rest}")

    def _fail(self, record: StepRecord, clip_names: list[str]) -> None:
        """Raise NonFiniteLoss for an update with these clips in this process."""
        all_names = [name for process_names in self.dist_ctx.gather(clip_names) for name in process_names]
        checkpoints = step_folder.training_checkpoints(self.run)
        last_saved = (
            f"return to {checkpoints[-1]} (the same command does)" if checkpoints else "no checkpoint was saved before"
        )
        raise NonFiniteLoss(
            f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}; "
            f"clips: {', '.join(all_names)}; {last_saved}; try another --out with a lower --lr, with --precision fp32, "
            "or without these clips"
        )

    def save(self) -> None:
        """Start to write a checkpoint of the current step."""
        self._flush()
        local_cursors = self.cursors[self.local_streams]
        state = {
            "step": self.step,
            "places": [cursor for cursors in self.dist_ctx.gather(local_cursors) for cursor in cursors],
            "micro_batches": self.micro_batches,
            "seconds": self.train_seconds,
            "waited": self.wait_seconds,
            "audio_seconds": self.audio_seconds,
            "faults": self.faults,
            "fault_count": self.fault_count,
            "data": self.shards.identity,
        }
        self.checkpoints.save(self.step, self.train_step, state)

    def finish(self, held_out: HeldOut) -> dict[str, Any]:
        """Evaluate the finished run and write its outputs; returns the content of summary.json."""
        newest = self.checkpoints.newest()
        assert newest is not None
        model = checkpoint.export(newest, self.run, impl=self.options.impl, attention=self.options.attention)
        model = model.to(self.device)
        rows = read_metrics(self.run / "metrics.jsonl")
        steps = [row for row in rows if "loss" in row]
        summary = dataclasses.asdict(self._summarize(model, held_out, steps))
        write_json(self.run / "summary.json", summary)
        evaluations = [row for row in rows if "held_out" in row]
        evaluations.append({"step": self.step, "held_out": summary["held_out"]})
        plot_loss(steps, evaluations, self.run / "loss.png", unit=training_unit(model))
        plot_reconstruction(model, held_out.longest_of_each_kind(), self.run / "reconstruction.png")
        return summary

    def _summarize(self, model: MAEAST | SSAST, held_out: HeldOut, steps: list[dict[str, Any]]) -> PretrainSummary:
        """Evaluate the trained ``model``; ``steps`` are the updates' rows of metrics.jsonl."""
        report = evaluate(model, held_out)
        report_by_kind = {}
        for kind in sorted(set(held_out.kinds) - {""}):
            clips_of_kind = held_out.select([i for i, clip_kind in enumerate(held_out.kinds) if clip_kind == kind])
            report_by_kind[kind] = evaluate(model, clips_of_kind)
        num_tokens, num_rows = (sum(row.get(name, 0) for row in steps) for name in ("tokens", "rows"))
        data_report = self.shards.report
        seconds = max(self.train_seconds, 1e-9)
        return PretrainSummary(
            steps=self.step,
            model=model.model_type,
            config=model.config.to_dict(),
            parameters=sum(p.numel() for p in model.parameters()),
            device=str(self.device),
            processes=self.dist_ctx.world_size,
            parallel=self.options.parallel if self.dist_ctx.world_size > 1 else None,
            micro_batches=self.micro_batches,
            precision=self.precision,
            threads=torch.get_num_threads(),
            train_seconds=round(self.train_seconds, 1),
            audio_hours_seen=round(self.audio_seconds / 3600, 3),
            clips_per_second=round(sum(row["clips"] for row in steps) / seconds, 2),
            tokens_per_second=round(num_tokens / seconds, 1),
            padding_share=round(1.0 - num_tokens / num_rows, 4) if num_rows else 0.0,
            data_wait_share=round(self.wait_seconds / seconds, 4),
            final_loss=steps[-1]["loss"] if steps else None,
            held_out=report,
            held_out_by_kind=report_by_kind,
            held_out_split=data_report.get("split", ""),
            held_out_clips=held_out.names,
            train_clips=data_report.get("train"),
            data={
                "files": data_report.get("files"),
                "clips": data_report.get("clips"),
                "hours": round(data_report.get("hours", 0.0), 3),
                "skipped": {reason: finding["count"] for reason, finding in data_report.get("skipped", {}).items()},
                **{name: data_report.get(name, {}).get("count", 0) for name in ("silent", "clipped", "duplicate")},
                "unreadable_in_training": self.fault_count,
                "unreadable_names": self.faults,
                "unreadable_manifests": self.shards.faults,
            },
            torch=torch.__version__,
        )


def check_fits(
    config: MAEASTConfig | SSASTConfig, wanted: MAEASTConfig | SSASTConfig, options: PretrainOptions
) -> None:
    """Check that the weights of the checkpoint in ``options.init_from`` fit the model of the run.

    Args:
        config: Configuration of the checkpoint.
        wanted: Configuration of the run.
        options: Options of the run.

    Raises:
        ValueError: Some size differs.
    """
    sizes = ["num_mel_bins", "patch_size", "embed_dim", "ffn_dim", "num_heads"]
    if isinstance(config, SSASTConfig):
        sizes += ["layers", "input_frames"]
    else:
        sizes += ["encoder_layers", "decoder_embed_dim", "decoder_layers", "norm_first", "has_projection"]
    differing = [
        f"{name} {getattr(config, name)} in the checkpoint, {getattr(wanted, name)} requested"
        for name in sizes
        if getattr(config, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(f"--init-from {options.init_from} does not fit: {'; '.join(differing)}")


def check_min_seconds(config: MAEASTConfig | SSASTConfig, options: PretrainOptions) -> None:
    """Check that the shortest clip has two tokens, one visible and one masked.

    Raises:
        ValueError: ``options.min_seconds`` is too small.
    """
    kt = config.patch_size[0]
    if config.num_tokens(num_frames(round(options.min_seconds * SAMPLE_RATE))) < 2:
        needed_seconds = frames_to_samples((1 if config.grid_f > 1 else 2) * kt) / SAMPLE_RATE
        raise ValueError(
            f"min_seconds must be at least {needed_seconds:g} for patches of {kt} frames x {config.patch_size[1]} "
            f"bins, got {options.min_seconds:g}"
        )
