"""Fine-tuning: trains the encoder and a linear layer on labelled clips (paper, section 4).

The classifier takes the mean of the encoder's tokens, normalises it and applies a linear layer. It trains on the
training clips of a manifest, selects an epoch on the validation clips and reports the scores of the test clips. With
folds it does so once per fold. A run writes summary.json, predictions.csv, figures, and a classifier for
``mae-ast-fast predict``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import atomic_write, temp_path, write_json
from ..training.lifecycle import GracefulShutdown, Interrupted
from ..training.metrics_log import MetricsLog, read_rows
from .augment import mixup, spec_augment
from .classifier import AudioClassifier
from .manifest import Fold
from .options import FinetuneOptions
from .probe import encoder_features, set_norm
from .report import write_report
from .run import STATE, FoldResult, Run
from .schedule import learning_rate

_SAVE_SECONDS = 300.0  # between two saves of the training state: the most that a kill costs
_NORM_CLIPS = 4096  # maximum number of training clips for the norm's initial statistics


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Train the encoder and a linear layer, once per fold; return the content of summary.json.

    A second call with the same options resumes an interrupted run. It keeps finished folds and resumes the unfinished
    one where it was stopped. After a kill it resumes from the last saved state. A kill costs at most five minutes of
    training and one pass over the validation clips.

    Raises:
        ValueError: As ``probe``, or the task is frame-level, or a fold has fewer than two training clips, or training
            diverged.
        Interrupted: SIGTERM or Ctrl-C arrived; the run was saved.
    """
    run = Run(options, "finetune")
    for fold in run.folds:
        if len(fold.train) < 2:
            count = len(fold.train)
            raise ValueError(f"expected at least two training clips with audio, {fold.display_name} has {count}")
    with run:
        results = [_finetune_fold(run, fold) for fold in run.folds]
        best = max(results, key=lambda result: result.valid_score)
        AudioClassifier.from_pretrained(run.folder(best.fold)).save_pretrained(run.out)
        history = [row for result in results for row in result.selected["history"]]
        return write_report(run, results, history=history)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def _finetune_fold(run: Run[FinetuneOptions], fold: Fold) -> FoldResult:
    """Train and test a fold, or read the result of an earlier start of the run."""
    folder = run.folder(fold)
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
        run.log(f"{folder} is done")
        run.earlier_seconds += result["seconds"]
        _remove_state(folder)
        return FoldResult(
            fold=fold,
            probabilities=np.load(folder / "probabilities.npy"),
            valid_score=result["valid"],
            selected=result["chosen"],
        )
    trainer = _Trainer(run, fold)
    run.earlier_seconds += trainer.earlier_seconds
    valid_score, selected = trainer.train()
    trainer.classifier.save_pretrained(folder)
    probabilities = run.probabilities(trainer.classifier, fold.test)
    atomic_write(folder / "probabilities.npy", lambda path: np.save(path, probabilities))
    write_json(folder / "result.json", {"valid": valid_score, "chosen": selected, "seconds": trainer.seconds})
    _remove_state(folder)
    return FoldResult(fold=fold, probabilities=probabilities, valid_score=valid_score, selected=selected)


def _remove_state(folder: Path) -> None:
    """Remove the training state of a fold, and a half-written one."""
    for path in (folder / STATE, temp_path(folder / STATE)):
        path.unlink(missing_ok=True)


@dataclass
class _Speed:
    """How often a start of the run has repeated something, and the seconds that this took."""

    count: int = 0
    seconds: float = 0.0

    def add(self, count: int, seconds: float) -> None:
        """Count further repetitions."""
        self.count += count
        self.seconds += seconds

    @property
    def mean_seconds(self) -> float:
        """Mean duration of a repetition in seconds."""
        return self.seconds / self.count


class _Trainer:
    """Fine-tuning of a fold. All draws depend on the seed, fold, epoch and step alone, so that it can resume.

    Args:
        run: Run that the fold belongs to.
        fold: Training and validation clips.
    """

    def __init__(self, run: Run[FinetuneOptions], fold: Fold) -> None:
        self.run, self.fold, self.options = run, fold, run.options
        options = self.options
        torch.manual_seed(options.seed)
        self.rng, self.generator = random.Random(), torch.Generator()
        self.classifier = run.build_classifier(copy.deepcopy(run.encoder)).to(run.device)
        # A single clip left over at the end of an epoch is skipped, because one clip has no variance.
        num_train, batch_size = len(fold.train), options.batch_size
        self.steps_per_epoch = num_train // batch_size + (num_train % batch_size > 1)
        self.num_steps = options.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.classifier, options), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.mask_value = self.classifier.encoder.mean_feature
        self.targets = torch.from_numpy(run.examples.targets).float()
        train_targets = run.examples.targets[fold.train]
        clips_per_class = np.maximum(train_targets.sum(0), 1)
        self.weights = torch.from_numpy((train_targets / clips_per_class).sum(1)) if options.balanced else None
        # Mutable state: steps done, sum of the losses of this epoch, a row per epoch, and the best epoch's weights.
        self.step, self.loss_sum = 0, torch.zeros((), device=run.device)
        self.history: list[dict[str, Any]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.start_time = self.save_time = time.perf_counter()
        self.earlier_seconds = 0.0  # of interrupted starts
        self.updates, self.validations = _Speed(), _Speed()
        self.path = run.folder(fold) / STATE
        if not self._load() and options.head == "linear":
            clips = fold.train
            if len(clips) > _NORM_CLIPS:
                clips = random.Random(options.seed).sample(clips, _NORM_CLIPS)
            set_norm(self.classifier, torch.from_numpy(encoder_features(run, clips)[clips]))

    def train(self) -> tuple[float, dict[str, Any]]:
        """Train all epochs and leave the classifier with the weights of the best one.

        Returns:
            The best epoch's validation score, and a dict with its ``epoch`` and the ``history`` of all epochs.
        """
        with contextlib.closing(self._open_log()) as log, GracefulShutdown() as shutdown:
            while self.step < self.num_steps:
                loss = self._train_epoch(log, shutdown)
                valid_score = self._validate()
                row = self._record_epoch(loss, valid_score)
                log.append(row, {"loss": loss, f"valid/{self.run.metric}": valid_score}, row["epoch"])
                log.say(self._progress())
                self._save_or_stop(shutdown)
        self.classifier.load_state_dict(self.best_weights)
        best = self._best()
        return best["valid"], {"epoch": best["epoch"], "history": self.history}

    def _open_log(self) -> MetricsLog:
        """Open the run's log. Drop this fold's rows, and write those of the epochs that need no repetition."""
        run, path = self.run, self.run.out / "metrics.jsonl"
        rows = read_rows(path) if path.is_file() else []
        return MetricsLog(
            run.out,
            self.step,
            self.num_steps,
            rows=[row for row in rows if row.get("fold") != self.fold.name] + self.history,
            curves=f"tensorboard/{run.folder(self.fold).name}",
            purge_from=len(self.history) + 1,
        )

    def _train_epoch(self, log: MetricsLog, shutdown: GracefulShutdown) -> float:
        """Do the remaining updates of an epoch; return the mean loss of all its updates."""
        start_step, start_time = self.step, time.perf_counter()
        self.classifier.train()
        for clips in self._batches(len(self.history) + 1):
            self._save_or_stop(shutdown)
            self.loss_sum += self._update(clips)
            self.step += 1
            log.advance()
        loss = self._mean_loss(self.steps_per_epoch)
        self.loss_sum.zero_()
        self.updates.add(self.step - start_step, time.perf_counter() - start_time)
        return loss

    def _validate(self) -> float:
        """Score of the validation clips."""
        run, clips, start_time = self.run, self.fold.valid, time.perf_counter()
        probabilities = run.probabilities(self.classifier, clips)
        if not np.isfinite(probabilities).all():
            self._fail("validation probabilities that are not finite")
        valid_score = run.score(probabilities, run.examples.targets[clips])
        self.validations.add(1, time.perf_counter() - start_time)
        return valid_score

    def _record_epoch(self, loss: float, valid_score: float) -> dict[str, Any]:
        """Add an epoch to the history, and keep its weights if it is the best one; return its row."""
        if valid_score > max((row["valid"] for row in self.history), default=-math.inf):
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.classifier.state_dict().items()}
        row = {"fold": self.fold.name, "epoch": len(self.history) + 1, "loss": loss, "valid": valid_score}
        self.history.append(row)
        return row

    def _progress(self) -> str:
        """Line for the terminal on the last epoch, with the speed and the estimated time left."""
        row, epochs = self.history[-1], self.options.epochs
        update_seconds = self.updates.mean_seconds
        seconds_left = update_seconds * (self.num_steps - self.step)
        seconds_left += self.validations.mean_seconds * (epochs - row["epoch"])
        minutes, seconds = divmod(round(seconds_left), 60)
        clips_per_second = len(self.fold.train) / self.steps_per_epoch / update_seconds
        return (
            f"{self._fold_prefix}epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, validation {self.run.metric} "
            f"{row['valid']:.4f} (best {self._best()['valid']:.4f}), {clips_per_second:.1f} clips/s, "
            f"ETA {minutes}:{seconds:02d}"
        )

    @property
    def seconds(self) -> float:
        """Duration of the fold so far in seconds, with interrupted starts."""
        return self.earlier_seconds + time.perf_counter() - self.start_time

    @property
    def _fold_prefix(self) -> str:
        return f"fold {self.fold.name}, " if self.fold.name else ""

    def _best(self) -> dict[str, Any]:
        """Row of the best epoch so far; of equal epochs the first."""
        return max(self.history, key=lambda row: row["valid"])

    def _mean_loss(self, num_steps: int) -> float:
        """Mean loss of the ``num_steps`` steps of this epoch.

        Raises:
            ValueError: The loss is not finite. The saved state is removed, because it leads there again.
        """
        loss = float(self.loss_sum) / max(1, num_steps)
        if not math.isfinite(loss):
            self._fail(f"the loss became {loss}")
        return loss

    def _fail(self, reason: str) -> NoReturn:
        """Remove the saved state and raise a ``ValueError`` that gives the reason and the learning rate."""
        _remove_state(self.path.parent)
        raise ValueError(
            f"{reason} in epoch {len(self.history) + 1} ({self._fold_prefix}lr {self.options.lr:g}): try a smaller --lr"
        )

    def _save_or_stop(self, shutdown: GracefulShutdown) -> None:
        """Save the state every ``_SAVE_SECONDS``, after the last step, and on a signal.

        Raises:
            Interrupted: A signal arrived.
        """
        done = self.step == self.num_steps  # a signal during the test must not lose the training
        if shutdown.received is None and not done and time.perf_counter() - self.save_time <= _SAVE_SECONDS:
            return
        saved = self._save()
        if shutdown.received is not None:
            raise Interrupted(shutdown.received, self.path if saved else None)

    def _save(self) -> bool:
        """Save the training state. Return False (and keep training) if the file cannot be written.

        Raises:
            ValueError: The loss is not finite.
        """
        self._mean_loss(self.step % self.steps_per_epoch)
        tensors = {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        progress: dict[str, Any] = {
            "step": self.step,
            "history": self.history,
            "total": float(self.loss_sum),
            "seconds": self.seconds,
            "checksum": _checksum(tensors),
        }
        self.save_time = time.perf_counter()
        try:
            self.path.parent.mkdir(exist_ok=True)
            atomic_write(self.path, lambda path: save_file(tensors, path, {"told": json.dumps(progress)}))
        except Exception as error:  # safetensors' own exception class is not public
            self.run.log(f"{self.path} cannot be written ({error}): if the run stops now, more than minutes are lost")
            return False
        return True

    def _load(self) -> bool:
        """Load the training state of an interrupted start. Return False if there is none, or a damaged one."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                progress = json.loads(file.metadata()["told"])
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            if progress["checksum"] != _checksum(tensors):
                raise ValueError("its checksum differs")
        except Exception as error:  # safetensors' own exception class is not public
            self.run.log(f"{self.path} is damaged ({error}): {self.fold.display_name} starts again")
            return False
        by_owner: dict[str, dict[str, Tensor]] = {"classifier": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            owner, _, name = name.partition(".")
            by_owner[owner][name] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in by_owner["optimizer"].items():
            i, name = name.split(".")
            state.setdefault(int(i), {})[name] = tensor
        self.classifier.load_state_dict(by_owner["classifier"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.history, self.best_weights = progress["step"], progress["history"], by_owner["best"]
        self.loss_sum += progress["total"]
        self.earlier_seconds = progress["seconds"]
        self.run.log(f"{self.fold.display_name} resumes after step {self.step} of {self.num_steps}")
        return True

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        """The remaining batches of an epoch, as indices of clips."""
        train, size = self.fold.train, self.options.batch_size
        self._reseed(f"epoch {epoch}")
        if self.weights is None:
            order = torch.randperm(len(train), generator=self.generator).tolist()
        else:
            order = torch.multinomial(self.weights, len(train), True, generator=self.generator).tolist()
        for start in range(self.step % self.steps_per_epoch * size, self.steps_per_epoch * size, size):
            yield [train[i] for i in order[start : start + size]]

    def _reseed(self, position: str) -> None:
        """Make the following draws depend on the seed, the fold and a position in the training alone."""
        self.rng.seed(f"{self.options.seed} {self.fold.name} {position}")
        self.generator.manual_seed(self.rng.getrandbits(62))
        torch.manual_seed(self.rng.getrandbits(62))

    def _update(self, clips: list[int]) -> Tensor:
        """Do one optimizer step on some clips; return the loss, a scalar on the run's device."""
        run, options = self.run, self.options
        self._reseed(f"update {self.step}")
        crops = [run.audio.crop(i, run.max_seconds, self.rng) for i in clips]
        waveforms, num_samples = run.audio.read(crops)
        waveforms, targets = mixup(waveforms, self.targets[clips], options.mixup, self.generator)
        log_mel, num_frames = self.classifier.encoder.features(waveforms.to(run.device), num_samples)
        log_mel = spec_augment(
            log_mel,
            num_frames,
            freq_mask=options.freq_mask,
            time_mask=options.time_mask,
            fill=self.mask_value,
            generator=self.generator,
        )
        lr = learning_rate(self.step, self.num_steps, peak=options.lr, warmup=options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        with run.autocast():
            logits = self.classifier(log_mel, num_frames)
        targets = targets.to(run.device)
        if run.task.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
        else:
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.classifier.parameters(), options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of names and contents, in the order of the names."""
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return checksum


def parameter_groups(classifier: AudioClassifier, options: FinetuneOptions) -> list[dict[str, Any]]:
    """AdamW's parameter groups with ``factor``, the learning rate relative to the peak rate, and ``weight_decay``.

    The encoder's last layer and everything after it have factor 1, its first layer ``layer_decay ** (layers - 1)``, and
    everything before the layers, such as the patch embedding, ``layer_decay ** layers``. The linear layer has
    ``head_lr_factor``. Vectors do not decay. Weights that the layers up to ``options.layer`` do not need are left out.
    """
    num_layers = options.layer or classifier.encoder.num_layers
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in classifier.named_parameters():
        depth = 0
        if name.startswith("head."):
            factor = options.head_lr_factor
        else:
            if name.startswith("encoder.encoder.layers."):
                depth = int(name.split(".")[3]) + 1
            elif name.startswith("encoder.encoder.norm.") and classifier.encoder.config.norm_first:
                depth = num_layers
            if depth > num_layers:
                continue
            factor = options.layer_decay ** (num_layers - depth)
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((factor, decay), {"params": [], "factor": factor, "weight_decay": decay})
        groups[factor, decay]["params"].append(parameter)
    return list(groups.values())
