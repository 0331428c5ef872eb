"""What a pretrained encoder is good for: a linear probe on its frozen features, or fine-tuning all of it (section 4).

Both take the mean of the encoder's tokens, normalise it and add a linear layer; they learn on the training clips of a
manifest, choose on its validation clips and are told by its test clips, once for each fold where there are folds. A run
leaves summary.json, predictions.csv, a classifier for ``mae-ast-fast predict``, and pictures.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import write_json, write_whole
from .classifier import NORM_EPS, AudioClassifier, pool_tokens
from .downstream import Run, Tested
from .fbank import HOP, SAMPLE_RATE, WINDOW, fbank
from .options import FinetuneOptions, ProbeOptions
from .tasks import Round

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)  # C of the probe: larger means less regularised
_SAVE_SECONDS = 300.0  # between two writings of where fine-tuning stands: what a stop may cost
_STATE = "state.safetensors"  # in the folder of a round
_NORM_CLIPS = 4096  # training clips at most that the norm's statistics begin with


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Logistic regression on the frozen encoder's features; returns what summary.json holds.

    Beside it stands the same on the mean log-mel spectrum of each clip, which no network has seen. Of a clip
    that is longer than ``max_seconds`` the features of its windows are averaged; ``predict`` averages probabilities.

    Raises:
        ValueError: Unusable data, options or checkpoint, or ``out`` holds a run of another kind.
    """
    run = Run(options, "probe")
    clips = sorted({i for part in run.rounds for x in (part.train, part.valid, part.test) for i in x})
    x = _features(run, clips)
    tested = [_fit_round(run, x, part, keep=not run.task.frame_level) for part in run.rounds]
    x = _log_mel(run, clips)
    log_mel = [_fit_round(run, x, part) for part in run.rounds]
    best = max(tested, key=lambda one: one.valid)
    if best.classifier is not None:
        best.classifier.save_pretrained(run.out)
    return run.report(tested, [], {"log_mel": log_mel})


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Trains the encoder and a linear layer, once for each fold; returns what summary.json holds.

    A run that was stopped goes on: folds that are done are kept, and the one that was begun goes on where it stood five
    minutes before the stop or later.

    Raises:
        ValueError: As ``probe``, or a frame-level task.
    """
    run = Run(options, "finetune")
    for part in run.rounds:
        if len(part.train) < 2:
            raise ValueError(f"expected at least two training clips with audio, {part.where} has {len(part.train)}")
    identity = run.identity()
    tested = [_finetune_round(run, part, identity) for part in run.rounds]
    best = max(tested, key=lambda one: one.valid)
    AudioClassifier.from_pretrained(run.folder(best.round)).save_pretrained(run.out)
    history = [row for one in tested for row in one.chosen["history"]]
    return run.report(tested, history, {})


# --------------------------------------------------------------------------------------------------------------- probe


def _features(run: Run, clips: Sequence[int]) -> np.ndarray:
    """(n, D) fp32 of all examples: the mean of a clip's tokens, or of those that cover a moment; 0 of other clips."""
    encoder = run.encoder
    kt, layer = encoder.config.patch_size[0], run.options.layer
    bands = encoder.config.grid_f if run.options.pool == "bands" else 1

    @torch.no_grad()
    def encode(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        with run.autocast():
            encoded = encoder.encode(*encoder.features(waveforms, lengths), layer)
        if not run.task.frame_level:
            return pool_tokens(encoded, len(waveforms), bands), 0
        blocks = int(encoded.block.max()) + 1
        moment = encoded.rows.clip * blocks + encoded.block
        return pool_tokens(encoded, len(waveforms) * blocks, bands, moment).unflatten(0, (-1, blocks)), kt

    return _gather(run, clips, encode, bands * encoder.config.embed_dim)


def _log_mel(run: Run, clips: Sequence[int]) -> np.ndarray:
    """(n, 128) fp32: the mean log-mel spectrum of each clip, or the spectrum at a moment."""
    num_mel_bins = run.encoder.config.num_mel_bins

    def spectrum(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        features, frames = fbank(waveforms, lengths)
        if run.task.frame_level:
            return features, 1
        real = torch.arange(features.shape[1], device=features.device) < frames[:, None]
        return torch.where(real[:, :, None], features, 0).sum(1) / frames[:, None], 0

    return _gather(run, clips, spectrum, num_mel_bins)


def _gather(
    run: Run, clips: Sequence[int], compute: Callable[[Tensor, Tensor], tuple[Tensor, int]], width: int
) -> np.ndarray:
    """Rows (n, width) of the examples of ``clips``, window after window; a clip of several is their mean, by length."""
    examples, task = run.examples, run.task
    found = np.zeros((len(examples.clip), width), np.float32)
    weight = np.zeros((len(found), 1), np.float32)
    done, began, shown = 0, time.perf_counter(), time.perf_counter()
    for waveforms, lengths, owners, starts in run.read(clips):
        x, frames_a_row = compute(waveforms, lengths)
        x, seconds = x.cpu().numpy(), lengths.cpu().numpy() / SAMPLE_RATE
        for row, clip, start, length in zip(x, owners, starts, seconds, strict=True):
            if not task.frame_level:
                found[clip] += row * length
                weight[clip] += length
                continue
            rows = examples.of_clips([clip])
            rows = rows[(examples.time[rows] >= start) & (examples.time[rows] < start + length)]
            frame = np.rint(((examples.time[rows] - start) * SAMPLE_RATE - WINDOW / 2) / HOP).astype(int)
            last = (int(length * SAMPLE_RATE) - WINDOW) // HOP
            found[rows] = row[np.clip(frame, 0, last) // frames_a_row]
            weight[rows] = 1.0
        done += len(owners)
        if (now := time.perf_counter()) - shown > 10.0:
            run.say(f"{done} windows, {done / (now - began):.0f} a second")
            shown = now
    return found / np.maximum(weight, 1e-9)


def _fit_round(run: Run, x: np.ndarray, part: Round, keep: bool = False) -> Tested:
    """Fits each penalty on the training examples, takes the best on the validation ones, tells of the test ones.

    Args:
        run: Whose examples.
        x: (n, D) their features.
        part: Which are for what.
        keep: Make a classifier of it, that is where ``x`` are the encoder's features of clips.
    """
    examples, multi_label = run.examples, run.task.multi_label
    train, valid, test = (examples.of_clips(clips) for clips in (part.train, part.valid, part.test))
    data = torch.from_numpy(x).to(run.device)
    targets = torch.from_numpy(examples.targets).to(run.device)
    mean, var = data[train].mean(0), data[train].var(0, correction=0)
    scaled = (data - mean) / (var + NORM_EPS).sqrt()  # as the classifier's norm does
    weight, bias = scaled.new_zeros(targets.shape[1], x.shape[1]), scaled.new_zeros(targets.shape[1])
    best: tuple[float, float, Tensor, Tensor] | None = None

    def told(rows: np.ndarray, w: Tensor, b: Tensor) -> np.ndarray:
        logits = F.linear(scaled[rows], w, b)
        return (logits.sigmoid() if multi_label else logits.softmax(1)).cpu().numpy()

    for penalty in PENALTIES:  # each starts where the last one ended
        weight, bias = fit_logistic(scaled[train], targets[train], penalty, multi_label, (weight, bias))
        value = run.score(told(valid, weight, bias), examples.targets[valid])
        if best is None or value > best[0]:
            best = (value, penalty, weight, bias)
    value, penalty, weight, bias = best
    classifier = None
    if keep:
        classifier = run.new_classifier(run.encoder)
        _set_norm(classifier, data[train])
        classifier.head.weight.data, classifier.head.bias.data = weight, bias
    return Tested(part, told(test, weight, bias), value, classifier, {"C": penalty})


def _set_norm(classifier: AudioClassifier, x: Tensor) -> None:
    """Statistics of rows (n, D), until training moves them."""
    classifier.norm.running_mean.copy_(x.mean(0))
    classifier.norm.running_var.copy_(x.var(0, correction=0))


def fit_logistic(
    x: Tensor, targets: Tensor, penalty: float, multi_label: bool, start: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logistic regression by L-BFGS: weights (C, D), biases (C,) that minimise the summed loss + |W|^2 / (2 penalty).

    Args:
        x: (n, D); the products are in fp64, in which the optimum can be told.
        targets: (n, C) bool.
        penalty: C, the inverse of the regularisation's strength.
        multi_label: A loss for each class by itself, else a softmax over them.
        start: Where to begin.
    """
    x, y = x.double(), targets.double()
    weight, bias = (tensor.double().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    classes = y.argmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight, bias)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        else:
            loss = F.cross_entropy(logits, classes, reduction="sum")
        loss = (loss + weight.square().sum() / (2 * penalty)) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().to(start[0].dtype), bias.detach().to(start[1].dtype)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def _finetune_round(run: Run, part: Round, identity: str) -> Tested:
    """Trains on a round's training clips; or reads what an earlier start of the run left of it."""
    folder = run.folder(part)
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
        if result["identity"] == identity and result["test"] == part.test:
            run.say(f"{folder} is done")
            (folder / _STATE).unlink(missing_ok=True)
            return Tested(part, np.load(folder / "probabilities.npy"), result["valid"], None, result["chosen"])
        run.say(f"{folder} is of other clips, labels or weights: trained anew")
    trainer = _Trainer(run, part, identity)
    valid, chosen = trainer.train()
    trainer.classifier.save_pretrained(folder)
    probabilities = run.probabilities(trainer.classifier, part.test)
    write_whole(folder / "probabilities.npy", lambda path: np.save(path, probabilities))
    write_json(folder / "result.json", {"identity": identity, "valid": valid, "chosen": chosen, "test": part.test})
    trainer.path.unlink(missing_ok=True)
    return Tested(part, probabilities, valid, None, chosen)


class _Trainer:
    """One round of fine-tuning. Draws depend on the seed, the epoch and the update alone, so that it can go on."""

    def __init__(self, run: Run, part: Round, identity: str) -> None:
        self.run, self.part, self.identity, self.options = run, part, identity, run.options
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
        self.best, self.best_weights = (-math.inf, 0), {}
        self.path = run.folder(part) / _STATE
        if not self._load():
            clips = part.train
            if len(clips) > _NORM_CLIPS:
                clips = random.Random(options.seed).sample(clips, _NORM_CLIPS)
            _set_norm(self.classifier, torch.from_numpy(_features(run, clips)[clips]))

    def train(self) -> tuple[float, dict[str, Any]]:
        """All epochs; the classifier is left as it was after the best one. Its score on the validation clips."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run, options, part = self.run, self.options, self.part
        where = f"fold {part.name}, " if part.name else ""
        before, began, saved = self.step, time.perf_counter(), time.perf_counter()
        metrics = run.out / "metrics.jsonl"
        known = metrics.read_text().splitlines() if metrics.exists() else []
        mark = f'{{"fold": {json.dumps(part.name)}, '  # of what a stopped start told of this fold, if to its end
        kept = [row for row in known if row.endswith("}") and not row.startswith(mark)]
        kept += [json.dumps(row) for row in self.history]
        write_whole(metrics, lambda path: path.write_text("".join(f"{row}\n" for row in kept)))
        bar = tqdm(total=self.steps, initial=before, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        events = SummaryWriter(run.out / "tensorboard" / run.folder(part).name, purge_step=len(self.history) + 1)
        with events, bar:
            while self.step < self.steps:
                epoch = self.step // self.batches + 1
                self.classifier.train()
                for clips in self._batches(epoch):
                    if time.perf_counter() - saved > _SAVE_SECONDS:
                        self._save()
                        saved = time.perf_counter()
                    self.total += self._update(clips)
                    self.step += 1
                    bar.update()
                loss = float(self.total) / self.batches
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss became {loss} in epoch {epoch} ({where}lr {options.lr:g}): try a smaller --lr"
                    )
                valid = run.score(run.probabilities(self.classifier, part.valid), run.examples.targets[part.valid])
                if valid > self.best[0]:
                    self.best = (valid, epoch)
                    self.best_weights = {k: v.detach().cpu().clone() for k, v in self.classifier.state_dict().items()}
                self.history.append({"fold": part.name, "epoch": epoch, "loss": loss, "valid": valid})
                self.total.zero_()
                events.add_scalar("loss", loss, epoch)
                events.add_scalar(f"valid/{run.metric}", valid, epoch)
                with open(metrics, "a") as file:
                    file.write(json.dumps(self.history[-1]) + "\n")
                spent = (time.perf_counter() - began) / (self.step - before)  # an update
                minutes, seconds = divmod(round(spent * (self.steps - self.step)), 60)
                rate = len(part.train) / self.batches / spent
                bar.write(
                    f"{where}epoch {epoch}/{options.epochs}: loss {loss:.4f}, validation {run.metric} {valid:.4f} "
                    f"(best {self.best[0]:.4f}), {rate:.1f} clips/s, ETA {minutes}:{seconds:02d}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
        self.classifier.load_state_dict(self.best_weights)
        return self.best[0], {"epoch": self.best[1], "history": self.history}

    def _save(self) -> None:
        """Writes where training stands."""
        tensors = {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
        told = {"step": self.step, "history": self.history, "best": self.best[1], "total": float(self.total)}
        told = {name: json.dumps(value) for name, value in told.items()}
        self.path.parent.mkdir(exist_ok=True)
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(self.path, lambda path: save_file(content, path, {"identity": self.identity, **told}))

    def _load(self) -> bool:
        """Goes on where an earlier start of the run was stopped; whether there is such a place."""
        if not self.path.is_file():
            return False
        try:
            content = load_file(self.path)
            with safe_open(self.path, "pt") as file:
                told = file.metadata()
        except Exception as error:  # safetensors' own exception class is not public
            self.run.say(f"{self.path} is damaged ({error}): {self.part.where} begins anew")
            return False
        if told.pop("identity") != self.identity:
            self.run.say(f"{self.path} is of other clips, labels or weights: {self.part.where} begins anew")
            return False
        parts: dict[str, dict[str, Tensor]] = {"classifier": {}, "best": {}, "optimizer": {}}
        for name, tensor in content.items():
            kind, _, name = name.partition(".")
            parts[kind][name] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            i, name = name.split(".")
            state.setdefault(int(i), {})[name] = tensor
        self.classifier.load_state_dict(parts["classifier"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        told = {name: json.loads(value) for name, value in told.items()}
        self.step, self.history, self.best_weights = told["step"], told["history"], parts["best"]
        self.total += told["total"]
        if told["best"]:
            self.best = (self.history[told["best"] - 1]["valid"], told["best"])
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
        """All random numbers that follow depend on the seed and on this alone."""
        self.rng.seed(f"{self.options.seed} {place}")
        self.generator.manual_seed(self.rng.getrandbits(62))
        torch.manual_seed(self.rng.getrandbits(62))

    def _update(self, clips: list[int]) -> Tensor:
        run, options = self.run, self.options
        self._draw_from(f"update {self.step}")
        windows = [run.audio.crop(i, run.max_seconds, self.rng) for i in clips]
        waveforms, lengths = run.audio.read(windows)
        waveforms, targets = mix(waveforms, self.targets[clips], options.mixup, self.generator)
        features, frames = self.classifier.encoder.features(waveforms.to(run.device), lengths.to(run.device))
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


def mix(waveforms: Tensor, targets: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup as in AST: into a share of the clips another one of the batch is mixed, waveforms and targets alike.

    Args:
        waveforms: (B, S) int16.
        targets: (B, C) fp32.
        share: In [0, 1].
        generator: Of the draws.

    Returns:
        fp32 waveforms, full scale 1, and targets.
    """
    clips = waveforms.float() / 32768.0
    if share == 0.0:
        return clips, targets
    mixed = torch.rand(len(clips), generator=generator) < share
    # Beta(10, 10) as the share of one of two sums of ten exponential variables
    sums = -torch.rand(2, 10, len(clips), generator=generator).clamp(min=1e-7).log().sum(1)
    own = torch.where(mixed, sums[0] / sums.sum(0), 1.0)[:, None]
    other = torch.randperm(len(clips), generator=generator)
    return own * clips + (1 - own) * clips[other], own * targets + (1 - own) * targets[other]


def spec_augment(
    features: Tensor, frames: Tensor, freq_mask: int, time_mask: float, fill: float, generator: torch.Generator
) -> Tensor:
    """Hides a stretch of mel bins and one of frames in each clip (SpecAugment, arXiv 1904.08779).

    Args:
        features: (B, T, F).
        frames: (B,) real frames of each clip.
        freq_mask: Bins at most.
        time_mask: Share of a clip's frames at most.
        fill: What stands in their place.
        generator: Of the draws, on the CPU.
    """
    clips, width, bins = features.shape
    draws = torch.rand(4, clips, 1, generator=generator).to(features.device)
    frames = frames[:, None]
    high = (draws[0] * (min(freq_mask, bins) + 1)).floor()
    low = (draws[1] * (bins - high + 1)).floor()
    long = (draws[2] * ((time_mask * frames).floor() + 1)).floor().clamp(max=frames - 1)
    start = (draws[3] * (frames - long + 1)).floor()
    f, t = torch.arange(bins, device=features.device), torch.arange(width, device=features.device)
    hidden = ((f >= low) & (f < low + high))[:, None, :] | ((t >= start) & (t < start + long))[:, :, None]
    return features.masked_fill(hidden, fill)
