"""Options of probing and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..files import paths_as_text
from ..ops.attention import BACKENDS
from ..validate import check, check_at_least, check_choice, check_positive

POOLS = ("mean", "bands")
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "map")
HEADS = ("linear", "attentive")
LAYERS = ("last", "all")
CHOICES: dict[str, tuple[str, ...]] = {  # option -> its values
    "metric": METRICS,
    "pool": POOLS,
    "precision": ("auto", "fp32", "bf16"),
    "impl": ("auto", "torch", "triton"),
    "attention": ("auto", *BACKENDS),
    "head": HEADS,
    "layers": LAYERS,
}
# Learning rates, batch sizes, epochs (or updates, converted to epochs) and masks of the scripts that fine-tuned SSAST
# (arXiv 2110.09784, section 3), whose tasks and settings the paper adopts. Ours differ in the schedule (theirs falls
# in steps, or not at all), a stride of 16 frames between patches (theirs overlap by 6), the norm before the linear
# layer (over clips, theirs over a clip's values), and for KS2 a softmax over the classes.
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "esc50": {"lr": 1e-4, "head_lr_factor": 10.0, "epochs": 50, "batch_size": 48, "freq_mask": 24, "time_mask": 0.19},
    "ks2": {"lr": 2.5e-4, "epochs": 30, "batch_size": 128, "freq_mask": 48, "time_mask": 0.375, "mixup": 0.6},
    "audioset20k": {"lr": 5e-5, "epochs": 25, "batch_size": 12, "freq_mask": 48, "time_mask": 0.19, "mixup": 0.5},
    "audioset2m": {
        "lr": 1e-5,
        "epochs": 5,
        "batch_size": 12,
        "freq_mask": 48,
        "time_mask": 0.19,
        "mixup": 0.5,
        "balanced": True,
    },
    "ks1": {"lr": 1e-4, "epochs": 12, "batch_size": 32, "freq_mask": 0, "time_mask": 0.0, "clip_norm": 1.0},
    "voxceleb1": {
        "lr": 1e-4,
        "epochs": 9,
        "batch_size": 32,
        "freq_mask": 0,
        "time_mask": 0.0,
        "clip_norm": 1.0,
        "max_seconds": 8.0,
    },
    "iemocap": {"lr": 1e-4, "epochs": 90, "batch_size": 32, "freq_mask": 0, "time_mask": 0.0, "clip_norm": 1.0},
}


for _preset in FINETUNE_PRESETS.values():
    _preset |= {"layer_decay": 1.0, "weight_decay": 5e-7, "warmup": 0.05, "label_smoothing": 0.0}


@dataclass
class ProbeOptions:
    """Options of ``mae-ast-fast probe``, and of ``finetune`` too.

    Args:
        data: Manifest, .tsv or .csv, with the columns path, label, and split or fold.
        checkpoint: Pretrained model: a folder of this library (a run folder too), an official file, or a Hub
            repository.
        out: Run folder.
        root: Second folder for the manifest's paths, which are looked up in the manifest's folder first.
        multi_label: Clips may have several labels, and rows of one clip are merged. A ; in a label turns it on too, but
            merges nothing.
        metric: Reported metric, which also selects settings and checkpoints on the validation clips: accuracy,
            balanced_accuracy, macro_f1, or map (mean average precision). None: accuracy, or map with several labels.
            With folds, the mean over folds. With several labels, accuracy is the share of right answers to "has this
            clip this label?".
        folds: Only these folds, separated by commas. None: all.
        layer: Layer of the encoder, from 1. None: its output.
        pool: Input of the linear layer: mean, the mean of all tokens of a clip, as in the paper; or bands, the means
            of each frequency block side by side, which keep the spectrum.
        head: What is trained on frozen features: linear, or attentive, which pools tokens by learned attention first.
        layers: Layers that an attentive head sees: last, or all with learned weights.
        max_seconds: Longer clips are cut into windows of this length, in seconds. None: 10, or the encoder's longest
            clip if that is shorter.
        seed: Seed of all draws, from 0 to 4294967295.
        precision: fp32, bf16, or auto: bf16 if the device computes it natively, otherwise fp32.
        device: auto, cpu, cuda or cuda:N.
        impl: Implementation of the encoder's operations: auto, torch or triton.
        attention: Attention backend. auto chooses by device and precision.
        workers: Number of processes that decode audio, at least 1.
        cache: Folder for decoded audio. None: $MAE_AST_FAST_CACHE or the user's cache folder.

    Raises:
        ValueError: An option is out of its range.
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
    head: str = "linear"
    layers: str = "last"
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
        for name, choices in CHOICES.items():
            if name != "metric" or self.metric is not None:
                check_choice(self, name, choices)
        if self.layers == "all" and (self.head == "linear" or self.layer is not None):
            raise ValueError(
                f"layers=all needs head=attentive and no layer, got head={self.head} and layer={self.layer}"
            )
        if self.head == "attentive" and self.pool != "mean":
            raise ValueError(f"head=attentive pools by attention, got pool={self.pool}: leave pool out")
        check_at_least(self, "workers", least=1)
        if self.max_seconds is not None:
            check_positive(self, "max_seconds")
        check(self, "seed", expected=f"from 0 to {2**32 - 1}", holds=lambda seed: 0 <= seed < 2**32)


@dataclass
class FinetuneOptions(ProbeOptions):
    """Options of ``mae-ast-fast finetune``.

    Args:
        epochs: Passes over the training clips, at least 1. The best epoch on the validation clips is kept.
        batch_size: Clips per update, at least 2.
        lr: Peak learning rate of the encoder's last layer.
        layer_decay: Learning rate of each encoder layer relative to the layer above it, in (0, 1].
        head_lr_factor: Learning rate of the linear layer relative to lr.
        warmup: Share of the updates with a rising learning rate, in [0, 1]. It then falls to 0 as a cosine.
        weight_decay: Decoupled weight decay of matrices; vectors do not decay.
        clip_norm: Limit of the gradient norm.
        label_smoothing: Share of the target that is spread evenly over all classes, in [0, 1]. Only with one label per
            clip.
        mixup: Share of the clips into which another clip is mixed, with a weight from Beta(10, 10), in [0, 1].
        freq_mask: SpecAugment: maximum number of mel bins in the masked range of each clip.
        time_mask: SpecAugment: maximum share of a clip's frames in the masked range, in [0, 1].
        balanced: Draw clips so that all classes occur equally often.

    Raises:
        ValueError: An option is out of its range.
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
        check_at_least(self, "epochs", least=1)
        check_at_least(self, "batch_size", least=2)  # the norm is over the batch: one clip would become 0
        check_at_least(self, "weight_decay", "freq_mask", least=0)
        check_positive(self, "lr", "head_lr_factor", "clip_norm")
        check(
            self,
            "warmup",
            "label_smoothing",
            "mixup",
            "time_mask",
            expected="in [0, 1]",
            holds=lambda share: 0 <= share <= 1,
        )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"expected 0 < layer_decay <= 1, got {self.layer_decay}")
