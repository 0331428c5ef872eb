"""Audio classifier: a pretrained encoder, the mean of its tokens, a norm and a linear layer (paper, section 4).

Instead of the mean, attention may pool the tokens (``AttentiveHead``). Letters as in models/mae_ast.py; C classes.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import audio
from ..files import atomic_write, read_json
from ..models import saved
from ..models.base import PretrainingModel, weight_dtype
from ..models.pooling import Encoded, pool_tokens
from ..models.registry import MODELS
from ..ops.fbank import SAMPLE_RATE, WINDOW, frames_to_samples
from .options import HEADS, LAYERS, POOLS

if TYPE_CHECKING:
    import numpy as np

MODEL_TYPE = "audio_classifier"
NORM_EPS = 1e-6
HEAD_DIM = 64  # width of an attention head that pools


class AttentiveHead(nn.Module):
    """Class scores from the tokens of clips: learned weights of the layers, attention pooling, a norm, a linear layer.

    The layers are weighted as in SUPERB (Yang et al. 2021, arXiv 2105.01051). In each attention head a learned query
    pools the values of a clip's tokens, as in attentive probes (Bardes et al. 2024, arXiv 2404.08471).

    Args:
        num_layers: K.
        width: D, of the tokens.
        num_labels: C.
    """

    def __init__(self, num_layers: int, width: int, num_labels: int) -> None:
        super().__init__()
        num_heads = max(1, width // HEAD_DIM)
        if width % num_heads:
            num_heads = 1
        self.layer_weights = nn.Parameter(torch.zeros(num_layers))
        self.query = nn.Parameter(0.02 * torch.randn(num_heads, width // num_heads))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width, eps=NORM_EPS, affine=False)
        self.linear = nn.Linear(width, num_labels)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, clip: Tensor, num_clips: int) -> Tensor:
        """Class scores (B, C).

        Args:
            states: (N, K, D) normalised features of the packed tokens.
            clip: (N,) int64 clip of each token.
            num_clips: B; every clip has tokens.
        """
        x = torch.einsum("nkd,k->nd", states, self.layer_weights.softmax(0))
        heads, head_dim = self.query.shape
        scores = (self.key(x).view(-1, heads, head_dim) * self.query).sum(2) / head_dim**0.5
        index = clip[:, None].expand_as(scores)
        highest = scores.new_full((num_clips, heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - highest[clip]).exp()
        values = weights[:, :, None] * self.value(x).view(-1, heads, head_dim)
        total = values.new_zeros(num_clips, heads, head_dim).index_add(0, clip, values)
        pooled = total / weights.new_zeros(num_clips, heads).index_add(0, clip, weights)[:, :, None]
        return self.linear(self.norm(pooled.flatten(1)))


def layer_states(encoded: Encoded, layers: str) -> Tensor:
    """Features (N, K, D) fp32 of tokens, each normalised over D.

    Args:
        encoded: Packed tokens of clips.
        layers: "last": the encoder's output alone, K = 1. "all": the output of each layer, the last as the encoder
            gives it.
    """
    states = [*encoded.states[:-1], encoded.x] if layers == "all" else [encoded.x]
    return torch.stack([F.layer_norm(state.float(), state.shape[1:]) for state in states], dim=1)


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
        head: ``"linear"``, or ``"attentive"``: an ``AttentiveHead`` in place of the mean and the linear layer.
        layers: Layers that an attentive head sees, ``"last"`` or ``"all"``.

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
        head: str = "linear",
        layers: str = "last",
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
        if head not in HEADS or layers not in LAYERS:
            raise ValueError(f"head must be in {HEADS} and layers in {LAYERS}, got {head!r} and {layers!r}")
        self.encoder, self.labels, self.multi_label = encoder, list(labels), multi_label
        self.max_seconds, self.layer, self.pool = max_seconds, layer, pool
        self.layers = layers
        self.num_bands = encoder.config.grid_f if pool == "bands" else 1
        self.head: nn.Linear | AttentiveHead
        if head == "attentive":
            num_layers = encoder.num_layers if layers == "all" else 1
            self.head = AttentiveHead(num_layers, encoder.config.embed_dim, len(labels))
            return
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
        if isinstance(self.head, AttentiveHead):
            with torch.autocast(features.device.type, enabled=False):
                states = layer_states(encoded, self.layers).to(weight_dtype(self.head))
                return self.head(states, encoded.packing.clip, len(features))
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
            **({"head": "attentive", "layers": self.layers} if isinstance(self.head, AttentiveHead) else {}),
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
