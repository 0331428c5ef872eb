"""Fine-tuning: trains the encoder and a linear layer on labelled clips (paper, section 4).

The classifier takes the mean of the encoder's tokens, normalises it and applies a linear layer. It trains on the
training clips of a manifest, selects an epoch on the validation clips and reports the scores of the test clips. With
folds it does so once per fold. A run writes summary.json, predictions.csv, figures, and a classifier for
``mae-ast-fast predict``.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Iterator
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
from .augment import mixup, spec_augment
from .classifier import AudioClassifier
from .manifest import Fold
from .options import FinetuneOptions
from .probe import encoder_features, set_norm
from .run import STATE, FoldResult, Run

_SAVE_SECONDS = 300.0  # between two writings of where fine-tuning stands: what a stop may cost
_NORM_CLIPS = 4096  # training clips at most that the norm's statistics begin with


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Trains the encoder and a linear layer, once for each fold; returns what summary.json holds.

    A run that was stopped goes on: folds that are done are kept, and the one that was begun goes on where it was
    stopped; after a kill, where it stood five minutes and a pass over the validation clips before, or later.

    Raises:
        ValueError: As ``probe``, or a frame-level task.
        Stopped: SIGTERM or Ctrl-C arrived; the run was saved.
    """
    run = Run(options, "finetune")
    for part in run.rounds:
        if len(part.train) < 2:
            raise ValueError(f"expected at least two training clips with audio, {part.where} has {len(part.train)}")
    with run:
        tested = [_finetune_round(run, part) for part in run.rounds]
        best = max(tested, key=lambda one: one.valid)
        AudioClassifier.from_pretrained(run.folder(best.round)).save_pretrained(run.out)
        history = [row for one in tested for row in one.chosen["history"]]
        return run.report(tested, history, {})


# --------------------------------------------------------------------------------------------------------- fine-tuning


def _finetune_round(run: Run, part: Fold) -> FoldResult:
    """Trains on a round's training clips; or reads what an earlier start of the run left of it."""
    folder = run.folder(part)
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
        run.say(f"{folder} is done")
        run.earlier_seconds += result["seconds"]
        _forget(folder)
        return FoldResult(part, np.load(folder / "probabilities.npy"), result["valid"], None, result["chosen"])
    trainer = _Trainer(run, part)
    run.earlier_seconds += trainer.earlier_seconds
    valid, chosen = trainer.train()
    trainer.classifier.save_pretrained(folder)
    probabilities = run.probabilities(trainer.classifier, part.test)
    atomic_write(folder / "probabilities.npy", lambda path: np.save(path, probabilities))
    write_json(folder / "result.json", {"valid": valid, "chosen": chosen, "seconds": trainer.seconds})
    _forget(folder)
    return FoldResult(part, probabilities, valid, None, chosen)


def _forget(folder: Path) -> None:
    """Removes what a round would have gone on from, a half written one too."""
    for path in (folder / STATE, temp_path(folder / STATE)):
        path.unlink(missing_ok=True)


class _Trainer:
    """One round of fine-tuning. Draws depend on the seed, fold, epoch and update alone, so that it can go on."""

    def __init__(self, run: Run, part: Fold) -> None:
        self.run, self.part, self.options = run, part, run.options
        options = self.options
        torch.manual_seed(options.seed)
        self.rng, self.generator = random.Random(), torch.Generator()
        self.classifier = run.new_classifier(copy.deepcopy(run.encoder)).to(run.device)
        # A clip that is left alone by an epoch's batches waits for the next one: one has no variance.
        self.batches = len(part.train) // options.batch_size + (len(part.train) % options.batch_size > 1)
        self.steps = options.epochs * self.batches
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.classifier, options), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.fill = self.classifier.encoder.mean_feature
        self.targets = torch.from_numpy(run.examples.targets).float()
        found = run.examples.targets[part.train]
        counts = np.maximum(found.sum(0), 1)
        self.weights = torch.from_numpy((found / counts).sum(1)) if options.balanced else None
        # What changes: updates made, the loss of this epoch's, what each epoch told, the best one and its weights.
        self.step, self.total = 0, torch.zeros((), device=run.device)
        self.history: list[dict[str, Any]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.began = self.saved = time.perf_counter()
        self.earlier_seconds = 0.0  # of starts that were stopped
        self.path = run.folder(part) / STATE
        if not self._load():
            clips = part.train
            if len(clips) > _NORM_CLIPS:
                clips = random.Random(options.seed).sample(clips, _NORM_CLIPS)
            set_norm(self.classifier, torch.from_numpy(encoder_features(run, clips)[clips]))

    def train(self) -> tuple[float, dict[str, Any]]:
        """All epochs; the classifier is left as it was after the best one. Its score on the validation clips."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run, part, epochs = self.run, self.part, self.options.epochs
        metrics = run.out / "metrics.jsonl"
        known = metrics.read_text().splitlines() if metrics.exists() else []
        mark = f'{{"fold": {json.dumps(part.name)}, '  # of what a stopped start told of this fold, if to its end
        kept = [row for row in known if row.endswith("}") and not row.startswith(mark)]
        kept += [json.dumps(row) for row in self.history]
        atomic_write(metrics, lambda path: path.write_text("".join(f"{row}\n" for row in kept)))
        first, epochs_before, learned, evaluated = self.step, len(self.history), 0.0, 0.0  # the last two are seconds
        begun = time.perf_counter()
        bar = tqdm(total=self.steps, initial=first, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        events = SummaryWriter(run.out / "tensorboard" / run.folder(part).name, purge_step=epochs_before + 1)
        with events, bar, GracefulShutdown() as signals:
            while self.step < self.steps:
                epoch = len(self.history) + 1
                self.classifier.train()
                for clips in self._batches(epoch):
                    self._pause(signals)
                    self.total += self._update(clips)
                    self.step += 1
                    bar.update()
                loss = self._mean_loss(self.batches)
                learned += time.perf_counter() - begun
                begun = time.perf_counter()
                found = run.probabilities(self.classifier, part.valid)
                if not np.isfinite(found).all():
                    self._lost("validation probabilities that are not finite")
                valid = run.score(found, run.examples.targets[part.valid])
                if valid > max((row["valid"] for row in self.history), default=-math.inf):
                    self.best_weights = {k: v.detach().cpu().clone() for k, v in self.classifier.state_dict().items()}
                self.history.append({"fold": part.name, "epoch": epoch, "loss": loss, "valid": valid})
                self.total.zero_()
                evaluated += time.perf_counter() - begun
                begun = time.perf_counter()
                events.add_scalar("loss", loss, epoch)
                events.add_scalar(f"valid/{run.metric}", valid, epoch)
                with open(metrics, "a") as file:
                    file.write(json.dumps(self.history[-1]) + "\n")
                update, evaluation = learned / (self.step - first), evaluated / (epoch - epochs_before)
                left = update * (self.steps - self.step) + evaluation * (epochs - epoch)
                minutes, seconds = divmod(round(left), 60)
                rate = len(part.train) / self.batches / update
                bar.write(
                    f"{self._where}epoch {epoch}/{epochs}: loss {loss:.4f}, validation {run.metric} {valid:.4f} "
                    f"(best {self._best()['valid']:.4f}), {rate:.1f} clips/s, ETA {minutes}:{seconds:02d}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
                self._pause(signals)
        self.classifier.load_state_dict(self.best_weights)
        best = self._best()
        return best["valid"], {"epoch": best["epoch"], "history": self.history}

    @property
    def seconds(self) -> float:
        """What this round has taken, stopped starts included."""
        return self.earlier_seconds + time.perf_counter() - self.began

    @property
    def _where(self) -> str:
        return f"fold {self.part.name}, " if self.part.name else ""

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=lambda row: row["valid"])  # the first of equal ones

    def _mean_loss(self, updates: int) -> float:
        """Of the updates of this epoch.

        Raises:
            ValueError: It is not finite; nothing is left to go on from.
        """
        loss = float(self.total) / max(1, updates)
        if not math.isfinite(loss):
            self._lost(f"the loss became {loss}")
        return loss

    def _lost(self, what: str) -> NoReturn:
        _forget(self.path.parent)
        raise ValueError(
            f"{what} in epoch {len(self.history) + 1} ({self._where}lr {self.options.lr:g}): try a smaller --lr"
        )

    def _pause(self, signals: GracefulShutdown) -> None:
        """Writes where training stands: now and then, at its end, and where a signal ends it."""
        done = self.step == self.steps  # and a test is to come that no signal shall waste
        if signals.received is None and not done and time.perf_counter() - self.saved <= _SAVE_SECONDS:
            return
        saved = self._save()
        if signals.received is not None:
            raise Interrupted(signals.received, self.path if saved else None)

    def _save(self) -> bool:
        """Whether it could be written; where not, the run goes on without."""
        self._mean_loss(self.step % self.batches)
        tensors = {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        told = {"step": self.step, "history": self.history, "total": float(self.total), "seconds": self.seconds}
        told["checksum"] = _checksum(tensors)
        self.saved = time.perf_counter()
        try:
            self.path.parent.mkdir(exist_ok=True)
            atomic_write(self.path, lambda path: save_file(tensors, path, {"told": json.dumps(told)}))
        except Exception as error:  # safetensors' own exception class is not public
            self.run.say(f"{self.path} cannot be written ({error}): a stop would cost more than minutes")
            return False
        return True

    def _load(self) -> bool:
        """Goes on where an earlier start of the run was stopped; whether there is such a place."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads(file.metadata()["told"])
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            if told["checksum"] != _checksum(tensors):
                raise ValueError("its checksum differs")
        except Exception as error:  # safetensors' own exception class is not public
            self.run.say(f"{self.path} is damaged ({error}): {self.part.where} begins anew")
            return False
        parts: dict[str, dict[str, Tensor]] = {"classifier": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, name = name.partition(".")
            parts[kind][name] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            i, name = name.split(".")
            state.setdefault(int(i), {})[name] = tensor
        self.classifier.load_state_dict(parts["classifier"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.history, self.best_weights = told["step"], told["history"], parts["best"]
        self.total += told["total"]
        self.earlier_seconds = told["seconds"]
        self.run.say(f"{self.part.where} goes on after update {self.step} of {self.steps}")
        return True

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        """Of an epoch those that are not done."""
        train, size = self.part.train, self.options.batch_size
        self._draw_from(f"epoch {epoch}")
        if self.weights is None:
            order = torch.randperm(len(train), generator=self.generator).tolist()
        else:
            order = torch.multinomial(self.weights, len(train), True, generator=self.generator).tolist()
        for start in range(self.step % self.batches * size, self.batches * size, size):
            yield [train[i] for i in order[start : start + size]]

    def _draw_from(self, place: str) -> None:
        """All random numbers that follow depend on the seed, the fold and this alone."""
        self.rng.seed(f"{self.options.seed} {self.part.name} {place}")
        self.generator.manual_seed(self.rng.getrandbits(62))
        torch.manual_seed(self.rng.getrandbits(62))

    def _update(self, clips: list[int]) -> Tensor:
        run, options = self.run, self.options
        self._draw_from(f"update {self.step}")
        windows = [run.audio.crop(i, run.max_seconds, self.rng) for i in clips]
        waveforms, lengths = run.audio.read(windows)
        waveforms, targets = mixup(waveforms, self.targets[clips], options.mixup, self.generator)
        features, frames = self.classifier.encoder.features(waveforms.to(run.device), lengths)
        features = spec_augment(features, frames, options.freq_mask, options.time_mask, self.fill, self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * _rate(self.step, self.steps, options)
        with run.autocast():
            logits = self.classifier(features, frames)
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
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), found))
    return found


def parameter_groups(classifier: AudioClassifier, options: FinetuneOptions) -> list[dict[str, Any]]:
    """AdamW's groups: ``factor`` of the rate falls from layer to layer, and vectors do not decay.

    The encoder's last layer and what comes after it have factor 1, its first one ``layer_decay ** (layers - 1)``, and
    what comes before that, such as the patch embedding, once more the decay. Weights that the layers below
    ``options.layer`` do not need are left out.
    """
    layers = options.layer or classifier.encoder.num_layers
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in classifier.named_parameters():
        depth = 0
        if name.startswith("head."):
            factor = options.head_lr_factor
        else:
            if name.startswith("encoder.encoder.layers."):
                depth = int(name.split(".")[3]) + 1
            elif name.startswith("encoder.encoder.norm.") and classifier.encoder.config.norm_first:
                depth = layers
            if depth > layers:
                continue
            factor = options.layer_decay ** (layers - depth)
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((factor, decay), {"params": [], "factor": factor, "weight_decay": decay})
        groups[factor, decay]["params"].append(parameter)
    return list(groups.values())


def _rate(step: int, steps: int, options: FinetuneOptions) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0."""
    warm = options.warmup * steps
    if step < warm:
        return options.lr * (step + 1) / (warm + 1)
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))
