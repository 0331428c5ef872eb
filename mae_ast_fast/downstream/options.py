"""Options of probing and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..files import paths_as_text

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "map")
# Rates, batches, epochs (or updates, as epochs) and masks of the scripts with which SSAST was fine-tuned (arXiv
# 2110.09784, section 3), whose tasks and settings the paper takes over. What is ours: the schedule (theirs goes down in
# steps, or not at all), 16 frames from patch to patch (theirs overlap by 6), the norm before the linear layer (over
# clips, theirs over a clip's values), and for KS2 a softmax over the classes.
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "esc50": {"lr": 1e-4, "head_lr_factor": 10.0, "epochs": 50, "batch_size": 48, "freq_mask": 24, "time_mask": 0.19},
    "ks2": {"lr": 2.5e-4, "epochs": 30, "batch_size": 128, "freq_mask": 48, "time_mask": 0.375, "mixup": 0.6},
    "audioset20k": {"lr": 5e-5, "epochs": 25, "batch_size": 12, "freq_mask": 48, "time_mask": 0.19, "mixup": 0.5},
    "audioset2m": {
        **{"lr": 1e-5, "epochs": 5, "batch_size": 12, "freq_mask": 48, "time_mask": 0.19, "mixup": 0.5},
        "balanced": True,
    },
    "ks1": {"lr": 1e-4, "epochs": 12, "batch_size": 32, "freq_mask": 0, "time_mask": 0.0, "clip_norm": 1.0},
    "voxceleb1": {
        **{"lr": 1e-4, "epochs": 9, "batch_size": 32, "freq_mask": 0, "time_mask": 0.0, "clip_norm": 1.0},
        "max_seconds": 8.0,
    },
    "iemocap": {"lr": 1e-4, "epochs": 90, "batch_size": 32, "freq_mask": 0, "time_mask": 0.0, "clip_norm": 1.0},
}


for _given in FINETUNE_PRESETS.values():
    _given |= {"layer_decay": 1.0, "weight_decay": 5e-7, "warmup": 0.05, "label_smoothing": 0.0}


@dataclass
class ProbeOptions:
    """Options of ``mae-ast-fast probe``, and of ``finetune`` too.

    Args:
        data: Manifest, .tsv or .csv, with the columns path, label, and split or fold.
        checkpoint: The pretrained model: a folder of ours (a run folder too), an official file, or a Hub repository.
        out: Run folder.
        root: Folder of the audio that does not lie beside the manifest, where each path is looked for first.
        multi_label: Clips may have several labels. A ; in a label says so too.
        metric: What is reported, and by which settings and checkpoints are chosen on the validation clips: accuracy,
            balanced_accuracy, macro_f1, or map, that is mean average precision. None: accuracy, of several labels map.
            With folds the mean over them. Accuracy of several labels is the share of right answers to "has this clip
            this label?".
        folds: Only these folds, with commas. None: all.
        layer: Layer of the encoder, from 1 on. None: its output.
        pool: What the linear layer sees: mean, of all tokens of a clip, as in the paper; or bands, the means of each
            frequency block side by side, which tell spectra apart.
        max_seconds: Longer clips are taken in windows of this length. None: 10, or what the model takes.
        seed: Seed of all draws.
        precision: fp32, bf16, or auto: bf16 where the device computes it natively, else fp32.
        device: auto, cpu, cuda or cuda:N.
        impl: Implementation of the encoder's operations: auto, torch or triton.
        attention: Attention backend: auto or a name.
        workers: Processes that decode audio.
        cache: Folder for decoded audio. None: $MAE_AST_FAST_CACHE or the user's cache folder.
    """

    data: str
    checkpoint: str
    out: str
    root: str | None = None
    multi_label: bool = False
    metric: str | None = None
    folds: str | None = None
    layer: int | None = None
    pool: str = "mean"
    max_seconds: float | None = None
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    attention: str = "auto"
    workers: int = 2
    cache: str | None = None

    def __post_init__(self) -> None:
        paths_as_text(self, "data", "checkpoint", "out", "root", "cache")
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")


@dataclass
class FinetuneOptions(ProbeOptions):
    """Options of ``mae-ast-fast finetune``.

    Args:
        epochs: Passes over the training clips. The checkpoint is kept that was best on the validation clips.
        batch_size: Clips in an update.
        lr: Peak learning rate of the encoder's last layer.
        layer_decay: Each layer below has the rate of the one above it times this.
        head_lr_factor: The rate of the linear layer is lr times this.
        warmup: Share of the updates with a rising rate; it then falls to 0 as a cosine.
        weight_decay: Decoupled, on matrices.
        clip_norm: Gradient norm limit.
        label_smoothing: Share of the target that all classes get alike; with one label a clip.
        mixup: Share of the clips into which another one is mixed, at a weight of Beta(10, 10).
        freq_mask: SpecAugment: mel bins hidden at most, a stretch of them in each clip.
        time_mask: SpecAugment: share of each clip's frames hidden at most, a stretch of them.
        balanced: Draw clips so that all classes occur equally often.
    """

    epochs: int = 30
    batch_size: int = 16
    lr: float = 1e-3
    layer_decay: float = 0.75
    head_lr_factor: float = 1.0
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float = 5.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    freq_mask: int = 16
    time_mask: float = 0.15
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("epochs", 1), ("batch_size", 2)):  # a norm over one clip would leave nothing of it
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "head_lr_factor", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "mixup", "time_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1 or self.weight_decay < 0 or self.freq_mask < 0:
            raise ValueError(
                "expected 0 < layer_decay <= 1, weight_decay >= 0 and freq_mask >= 0, got "
                f"{self.layer_decay}, {self.weight_decay} and {self.freq_mask}"
            )
