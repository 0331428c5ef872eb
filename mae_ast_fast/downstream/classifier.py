"""A classifier of audio: a pretrained encoder, the mean of its tokens, a norm and a linear layer (paper, section 4).

Letters as in models/mae_ast.py; C classes.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data import audio
from ..files import atomic_write
from ..models.base import Encoded, PretrainingModel, weight_dtype, write_model
from ..models.registry import MODELS
from ..ops.fbank import HOP, SAMPLE_RATE, WINDOW

if TYPE_CHECKING:
    import numpy as np

MODEL_TYPE = "audio_classifier"
POOLS = ("mean", "bands")
NORM_EPS = 1e-6


class AudioClassifier(nn.Module):
    """Class scores of clips: a linear layer on the mean of the encoder's tokens, normalised over clips.

    The norm has no weights. What an encoder that was pretrained for a short time tells of two clips differs in few
    directions and little: without it the linear layer takes long to see more than those.

    Args:
        encoder: MAE-AST or SSAST; what it needs for pretraining alone is not used.
        labels: Names of the C classes.
        multi_label: Classes do not exclude each other: probabilities are sigmoids, else a softmax.
        max_seconds: Longer recordings are taken in windows of this length.
        layer: Tokens after this layer of the encoder, from 1 on; None: its output.
        pool: mean, over all tokens of a clip (the paper's), or bands: over those of each frequency block by itself.

    Raises:
        ValueError: No two labels, one twice, windows that are longer than the encoder takes, or no such ``pool``.
    """

    def __init__(
        self,
        encoder: PretrainingModel,
        labels: list[str],
        multi_label: bool = False,
        max_seconds: float = 10.0,
        layer: int | None = None,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        if len(labels) < 2 - multi_label or len(set(labels)) != len(labels):
            raise ValueError(f"labels must be at least two different names, got {labels}")
        if not WINDOW / SAMPLE_RATE <= max_seconds <= longest_seconds(encoder):
            raise ValueError(
                f"max_seconds must be between {WINDOW / SAMPLE_RATE:g} and {longest_seconds(encoder):g} (what the "
                f"encoder takes), got {max_seconds:g}"
            )
        encoder._check_layer(layer)
        if pool not in POOLS:
            raise ValueError(f"pool must be {' or '.join(POOLS)}, got {pool!r}")
        self.encoder, self.labels, self.multi_label = encoder, list(labels), multi_label
        self.max_seconds, self.layer, self.pool = max_seconds, layer, pool
        self.bands = encoder.config.grid_f if pool == "bands" else 1
        self.norm = nn.BatchNorm1d(self.bands * encoder.config.embed_dim, eps=NORM_EPS, affine=False)
        self.head = nn.Linear(self.norm.num_features, len(labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> AudioClassifier:
        """As usual, but that the encoder keeps normalising its input by the statistics of its pretraining."""
        super().train(mode)
        if isinstance(norm := getattr(self.encoder, "input_norm", None), nn.Module):
            norm.eval()
        return self

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores (B, C) before sigmoid or softmax.

        Args:
            features: (B, T, F), as ``encoder.features`` makes them.
            lengths: (B,) real frames; None: all T.
        """
        pooled = pool_tokens(self.encoder.encode(features, lengths, self.layer), len(features), self.bands)
        with torch.autocast(features.device.type, enabled=False):  # bf16 scores would be equal for many clips
            return self.head(self.norm(pooled.to(weight_dtype(self.head))))

    @torch.no_grad()
    def probabilities(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, C) fp32, of waveforms as ``encoder.features`` takes them."""
        logits = self(*self.encoder.features(waveforms, lengths)).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def classify_file(self, path: str | os.PathLike[str]) -> Tensor:
        """Probabilities (C,) of a recording of any length: the mean over its windows, weighted by their length.

        Raises:
            audio.AudioError: The file gives no usable audio, or less than 25 ms.
        """
        device, total, samples = next(self.parameters()).device, torch.zeros(len(self.labels)), 0
        for window in _windows(audio.decode_blocks(path), round(self.max_seconds * SAMPLE_RATE)):
            if window.size >= WINDOW:
                total += window.size * self.probabilities(torch.from_numpy(window)[None].to(device))[0].cpu()
                samples += window.size
        if not samples:
            raise audio.AudioError(path, "shorter than 25 ms")
        return total / samples

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model.safetensors and config.json, each in one step."""
        config = {
            "model_type": MODEL_TYPE,
            "labels": self.labels,
            "multi_label": self.multi_label,
            "max_seconds": self.max_seconds,
            "layer": self.layer,
            "pool": self.pool,
            "encoder": {"model_type": self.encoder.model_type, **self.encoder.config.to_dict()},
        }
        write_model(self, config, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **init: str) -> AudioClassifier:
        """Reads what ``save_pretrained`` wrote, in evaluation mode.

        Args:
            folder: Also the folder of a fine-tuning run.
            **init: ``impl``, ``attention`` and ``recompute`` of the encoder.

        Raises:
            ValueError: There is no classifier, or it is damaged.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
                raise ValueError(f"expected model_type {MODEL_TYPE!r}")
            sizes = config.pop("encoder")
            kind = MODELS[sizes.pop("model_type")]
            weights = load_file(folder / "model.safetensors")
            with torch.device("meta"):  # sizes that lie must not take memory
                shapes = cls(kind(kind.config_class.from_dict(sizes)), **config).state_dict()
            if differing := [n for n in shapes if n not in weights or weights[n].shape != shapes[n].shape]:
                raise ValueError(f"weights do not fit (of another version?): {', '.join(differing[:5])}")
            model = cls(kind(kind.config_class.from_dict(sizes), **init), **config)
            model.load_state_dict(weights)
        except Exception as error:  # safetensors' own exception class is not public
            raise ValueError(
                f"{folder} holds no classifier (mae-ast-fast finetune or probe makes one): {error}"
            ) from error
        return model.eval()


def write_predictions(classifier: AudioClassifier, rows: Sequence[tuple[str, Sequence[float]]], path: Path) -> None:
    """Writes a CSV with the columns path, pred and prob_LABEL; of several labels those of at least a half."""

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["path", "pred", *(f"prob_{label}" for label in classifier.labels)])
            for name, found in rows:
                chosen = [max(range(len(found)), key=found.__getitem__)]
                if classifier.multi_label:
                    chosen = [i for i, p in enumerate(found) if p >= 0.5]
                pred = ";".join(classifier.labels[i] for i in chosen)
                table.writerow([name, pred, *(f"{p:.6g}" for p in found)])

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def longest_seconds(encoder: PretrainingModel) -> float:
    """The longest clip that an encoder takes."""
    return ((encoder.max_frames - 1) * HOP + WINDOW) / SAMPLE_RATE


def pool_tokens(encoded: Encoded, groups: int, bands: int = 1, group: Tensor | None = None) -> Tensor:
    """Means of tokens, (groups, bands * D) fp32: those of each frequency block side by side where there are several.

    Args:
        encoded: Tokens of clips.
        groups: Number of clips, or of what ``group`` numbers.
        bands: 1, or the model's frequency blocks.
        group: (N,) int64, what each token is averaged with; None: its clip.
    """
    place = encoded.packing.clip if group is None else group
    if bands > 1:
        place = place * bands + encoded.frequency_block
    x = encoded.x.float()
    total = x.new_zeros(groups * bands, x.shape[1]).index_add(0, place, x)
    count = x.new_zeros(len(total)).index_add(0, place, torch.ones_like(x[:, 0]))
    return (total / count.clamp(min=1)[:, None]).reshape(groups, -1)


def _windows(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """A stream of samples in windows of ``size``, the last one shorter."""
    import numpy as np

    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while rest.size >= size:
            yield rest[:size]
            rest = rest[size:]
    yield rest
