"""Audio classifier: a pretrained encoder, the mean of its tokens, a norm and a linear layer (paper, section 4).

Letters as in models/mae_ast.py; C classes.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import audio
from ..files import atomic_write, read_json
from ..models import saved
from ..models.base import PretrainingModel, pool_tokens, weight_dtype
from ..models.registry import MODELS
from ..ops.fbank import SAMPLE_RATE, WINDOW, frames_to_samples
from .options import POOLS

if TYPE_CHECKING:
    import numpy as np

MODEL_TYPE = "audio_classifier"
NORM_EPS = 1e-6


class AudioClassifier(nn.Module):
    """Class scores of clips: a linear layer on the mean of the encoder's tokens, normalised over clips.

    The norm has no weights. After short pretraining the pooled features of two clips differ little and in few
    directions. Without the norm, the linear layer is slow to learn the other directions.

    Args:
        encoder: MAE-AST or SSAST. The parts that only pretraining uses are ignored.
        labels: Names of the C classes.
        multi_label: True: classes do not exclude each other, and probabilities are sigmoids. False: a softmax.
        max_seconds: Longer recordings are cut into windows of this length, in seconds.
        layer: Layer of the encoder, from 1, whose tokens are pooled. None: the encoder's output.
        pool: ``"mean"`` averages all tokens of a clip, as the paper does. ``"bands"`` averages the tokens of each
            frequency block separately and concatenates the means.

    Raises:
        ValueError: Fewer than two labels (one with ``multi_label``), a repeated label, ``max_seconds`` outside the
            range that the encoder takes, or an unknown ``layer`` or ``pool``.
    """

    def __init__(
        self,
        encoder: PretrainingModel,
        labels: list[str],
        *,
        multi_label: bool = False,
        max_seconds: float = 10.0,
        layer: int | None = None,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        if len(labels) < 2 - multi_label or len(set(labels)) != len(labels):
            raise ValueError(f"labels must be at least two different names, got {labels}")
        if not WINDOW / SAMPLE_RATE <= max_seconds <= max_clip_seconds(encoder):
            raise ValueError(
                f"max_seconds must be between {WINDOW / SAMPLE_RATE:g} and {max_clip_seconds(encoder):g} (the "
                f"encoder's longest clip), got {max_seconds:g}"
            )
        encoder._check_layer(layer)
        if pool not in POOLS:
            raise ValueError(f"pool must be {' or '.join(POOLS)}, got {pool!r}")
        self.encoder, self.labels, self.multi_label = encoder, list(labels), multi_label
        self.max_seconds, self.layer, self.pool = max_seconds, layer, pool
        self.num_bands = encoder.config.grid_f if pool == "bands" else 1
        self.norm = nn.BatchNorm1d(self.num_bands * encoder.config.embed_dim, eps=NORM_EPS, affine=False)
        self.head = nn.Linear(self.norm.num_features, len(labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> AudioClassifier:
        """Set the training mode, but keep the encoder's input norm on the statistics of pretraining."""
        super().train(mode)
        if isinstance(norm := getattr(self.encoder, "input_norm", None), nn.Module):
            norm.eval()
        return self

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class scores (B, C) before sigmoid or softmax.

        Args:
            features: (B, T, F) log-mel, as ``encoder.features`` returns it.
            lengths: (B,) real frames of each clip. None: all T.
        """
        encoded = self.encoder.encode(features, lengths, self.layer)
        pooled = pool_tokens(encoded, len(features), num_bands=self.num_bands)
        with torch.autocast(features.device.type, enabled=False):  # in bf16 many clips would have equal scores
            return self.head(self.norm(pooled.to(weight_dtype(self.head))))

    @torch.no_grad()
    def probabilities(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class probabilities (B, C) fp32.

        Args:
            waveforms: (B, S), as ``encoder.features`` takes them.
            lengths: (B,) samples of each clip. None: all S.
        """
        log_mel, num_frames = self.encoder.features(waveforms, lengths)
        logits = self(log_mel, num_frames).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def classify_file(self, path: str | os.PathLike[str]) -> Tensor:
        """Class probabilities (C,) fp32 of a recording of any length: the mean over windows, weighted by duration.

        Raises:
            audio.AudioError: The file cannot be decoded or is shorter than 25 ms.
        """
        device, total, num_samples = next(self.parameters()).device, torch.zeros(len(self.labels)), 0
        for window in _windows(audio.decode_blocks(path), round(self.max_seconds * SAMPLE_RATE)):
            if window.size >= WINDOW:
                total += window.size * self.probabilities(torch.from_numpy(window)[None].to(device))[0].cpu()
                num_samples += window.size
        if not num_samples:
            raise audio.AudioError(path, "shorter than 25 ms")
        return total / num_samples

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json; each file is replaced atomically."""
        config = {
            "model_type": MODEL_TYPE,
            "labels": self.labels,
            "multi_label": self.multi_label,
            "max_seconds": self.max_seconds,
            "layer": self.layer,
            "pool": self.pool,
            "encoder": {"model_type": self.encoder.model_type, **self.encoder.config.to_dict()},
        }
        saved.write_model(self, config, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **init: str) -> AudioClassifier:
        """Load what ``save_pretrained`` wrote, in evaluation mode.

        Args:
            folder: Folder of a classifier, or the run folder of a probe or of fine-tuning.
            **init: ``impl``, ``attention`` and ``recompute`` of the encoder.

        Raises:
            ValueError: The folder holds no classifier, or a damaged one.
        """
        folder = Path(folder)
        if not folder.exists():
            raise ValueError(f"no such folder: {folder} (mae-ast-fast finetune and probe write classifiers)")
        try:
            fields = read_json(folder / saved.CONFIG)
            if fields.pop("model_type", None) != MODEL_TYPE:
                raise ValueError(f"expected model_type {MODEL_TYPE!r}")
            encoder_class: Any
            encoder_class, config = saved.parse_config(fields.pop("encoder"), MODELS)

            def build(**options: str) -> AudioClassifier:
                return cls(encoder_class(config, **options), **fields)

            return saved.read_model(folder / saved.WEIGHTS, config, build, **init)
        except Exception as error:  # a damaged file leads to any exception
            raise ValueError(
                f"{folder} holds no classifier (mae-ast-fast finetune and probe write one): {error}"
            ) from error


def write_predictions(
    classifier: AudioClassifier, predictions: Sequence[tuple[str, Sequence[float]]], path: Path
) -> None:
    """Write a CSV file with the columns ``path``, ``pred`` and one ``prob_LABEL`` per class.

    Args:
        classifier: Classifier that made the predictions.
        predictions: (path, probabilities (C,)) of each file. ``pred`` is the class of the highest probability; of a
            multi-label classifier all classes with a probability of at least 0.5, joined by ``;``.
        path: File to write; its folder is created.
    """

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["path", "pred", *(f"prob_{label}" for label in classifier.labels)])
            for name, probabilities in predictions:
                predicted = [max(range(len(probabilities)), key=probabilities.__getitem__)]
                if classifier.multi_label:
                    predicted = [i for i, p in enumerate(probabilities) if p >= 0.5]
                pred = ";".join(classifier.labels[i] for i in predicted)
                table.writerow([name, pred, *(f"{p:.6g}" for p in probabilities)])

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def max_clip_seconds(encoder: PretrainingModel) -> float:
    """Duration in seconds of the longest clip that an encoder takes."""
    return frames_to_samples(encoder.max_frames) / SAMPLE_RATE


def _windows(blocks: Iterator[np.ndarray], num_samples: int) -> Iterator[np.ndarray]:
    """Cut a stream of samples into windows of ``num_samples``. The last window is shorter."""
    import numpy as np

    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while rest.size >= num_samples:
            yield rest[:num_samples]
            rest = rest[num_samples:]
    yield rest
