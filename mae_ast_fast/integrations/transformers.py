"""MAE-AST in Hugging Face transformers: configuration, encoder, audio classifier and feature extractor, registered.

``import mae_ast_fast.hf`` makes AutoModel, AutoModelForAudioClassification and AutoFeatureExtractor read what
``export`` wrote, without trust_remote_code. Letters as in models/mae_ast.py: B clips, T frames, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import logging

from ..checkpoints.load import load_mae_ast
from ..downstream.classifier import MODEL_TYPE, NORM_EPS, AudioClassifier
from ..models.base import weight_dtype
from ..models.config import MAEASTConfig
from ..models.mae_ast import MAEAST, InputNorm, encoder_alone
from ..models.transformer import Positions, sinusoid
from ..ops.fbank import NUM_MEL_BINS, SAMPLE_RATE, WINDOW, fbank
from ..ops.packing import real_tokens

logger = logging.get_logger(__name__)

_FIELDS = [field.name for field in dataclasses.fields(MAEASTConfig)]


class MAEASTHFConfig(PreTrainedConfig):
    """The fields of ``MAEASTConfig``, by their own names and by transformers' (``hidden_size`` is ``embed_dim``).

    Its ``model_type`` is not that of this library's own folders, whose weights have other names.

    Args:
        position_table: Rows of a position table that is kept with the weights, as the paper's fp16 runs have one; None:
            positions are computed.
        layer: Features are those after this layer, from 1 on; None: the output of the encoder.
        **kwargs: Fields of ``MAEASTConfig`` (``decoder_layers`` is always 0), and those of every configuration in
            transformers: ``num_labels``, ``id2label``, ``problem_type``.

    Raises:
        ValueError: As ``MAEASTConfig``.
    """

    model_type = "mae_ast_fast"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embed_dim",
        "intermediate_size": "ffn_dim",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self, position_table: int | None = None, layer: int | None = None, pool: str = "mean", **kwargs: Any
    ) -> None:
        self.position_table, self.layer, self.pool = position_table, layer, pool
        given = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        for name, value in MAEASTConfig.from_dict({**given, "decoder_layers": 0}).to_dict().items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    @property
    def encoder(self) -> MAEASTConfig:
        """The configuration of the ``MAEAST`` inside."""
        return MAEASTConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


@dataclass
class MAEASTModelOutput(BaseModelOutput):
    """What ``MAEASTHFModel`` returns.

    Attributes:
        last_hidden_state: (B, L, D), rows that are no token 0.
        hidden_states: Where asked for, one (B, L, D) a layer, the first layer's first; the embeddings are not among
            them.
        token_mask: (B, L) bool, True where a clip has a token.
    """

    token_mask: Tensor | None = None


class MAEASTPreTrainedModel(PreTrainedModel):
    """What the two models share: how weights that no checkpoint holds begin."""

    config_class = MAEASTHFConfig
    base_model_prefix = "mae_ast"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _no_split_modules = ["Layer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also fills buffers: from_pretrained builds the model on the meta device, where tables have no values."""
        super()._init_weights(module)
        if isinstance(module, Positions):
            init.copy_(module.table, sinusoid(*module.table.shape, device=module.table.device))
        elif isinstance(module, InputNorm):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class MAEASTHFModel(MAEASTPreTrainedModel):
    """The encoder of MAE-AST; its features are those of ``MAEAST.extract_features``.

    In training the statistics of the input normalisation stay as they are.
    """

    def __init__(self, config: MAEASTHFConfig) -> None:
        super().__init__(config)
        self.model = MAEAST(config.encoder)
        if config.position_table is not None:
            table = sinusoid(config.position_table, config.embed_dim)
            self.model.encoder_positions.register_buffer("table", table, persistent=True)
        self.post_init()

    def train(self, mode: bool = True) -> MAEASTHFModel:
        super().train(mode)
        self.model.input_norm.eval()
        return self

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MAEASTModelOutput | tuple[Any, ...]:
        """Features of all tokens.

        Args:
            input_features: (B, T, F) log-mel, not normalised, as ``MAEASTFeatureExtractor`` gives them.
            attention_mask: (B, T), 1 for a clip's frames, 0 for what follows them; None: all 1.
            output_hidden_states: None: as the configuration says.
            return_dict: False: a tuple. None: as the configuration says.

        Raises:
            ValueError: As ``MAEAST.extract_features``; a mask of another shape, or with zeros before ones.
        """
        lengths = None if attention_mask is None else _frames(attention_mask, input_features)
        features = self.model.extract_features(input_features, lengths, self.config.layer)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = MAEASTModelOutput(
            last_hidden_state=features.last_hidden_state,
            hidden_states=tuple(features.hidden_states) if output_hidden_states else None,
            token_mask=real_tokens(features.lengths, features.last_hidden_state.shape[1]),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _frames(attention_mask: Tensor, input_features: Tensor) -> Tensor:
    """The clips' frames (B,) int64."""
    expected = tuple(input_features.shape[:2])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(f"attention_mask must be {expected}, got {tuple(attention_mask.shape)}")
    real = attention_mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("attention_mask must be ones, then zeros (padding on the right), got zeros before ones")
    return real.sum(1)


def _wants_dict(asked: bool | None, config: MAEASTHFConfig) -> bool:
    return bool(config.return_dict if asked is None else asked)


class MAEASTForAudioClassification(MAEASTPreTrainedModel):
    """The encoder, means over a clip's tokens by ``config.pool``, a norm and a linear layer (paper, section 4).

    The norm is over clips: in training a batch must have two at least (``dataloader_drop_last`` of the Trainer).
    """

    def __init__(self, config: MAEASTHFConfig) -> None:
        super().__init__(config)
        self.mae_ast = MAEASTHFModel(config)
        self.bands = config.encoder.grid_f if config.pool == "bands" else 1
        self.norm = nn.BatchNorm1d(self.bands * config.embed_dim, eps=NORM_EPS, affine=False)
        self.classifier = nn.Linear(self.norm.num_features, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (B, num_labels), and the loss where there are labels.

        Args:
            input_features: As of ``MAEASTHFModel``, like what is not listed.
            attention_mask: (B, T).
            labels: (B,) int64 class numbers for cross-entropy, or (B, num_labels) floats in [0, 1] for binary
                cross-entropy. ``config.problem_type`` says which; where it is None, the dtype does.
            output_hidden_states: As there.
            return_dict: As there.

        Raises:
            ValueError: As there.
        """
        encoded = self.mae_ast(input_features, attention_mask, output_hidden_states, return_dict=True)
        counts = encoded.token_mask.sum(1).clamp(min=1)[:, None, None] / self.bands
        blocks = encoded.last_hidden_state.float().unflatten(1, (-1, self.bands))
        pooled = (blocks.sum(1) / counts).flatten(1)  # rows that are no token are 0
        logits = self.classifier(self.norm(pooled.to(weight_dtype(self.classifier))))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class MAEASTFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to the log-mel features of ``fbank``, padded, with a mask of the real frames."""

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = NUM_MEL_BINS,
        sampling_rate: int = SAMPLE_RATE,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, padding: Any = True, **pad: Any
    ) -> BatchFeature:
        """Features of one clip or of several.

        Args:
            raw_speech: (samples,) of one clip, or a list of such, or (B, samples): floats in [-1, 1] or int16 PCM.
            sampling_rate: Of ``raw_speech``; None: taken to be 16 kHz, with a warning.
            padding: This and the following as ``SequenceFeatureExtractor.pad`` takes them.
            **pad: ``return_tensors``, ``max_length``, ``truncation``, ``pad_to_multiple_of``,
                ``return_attention_mask``.

        Returns:
            ``input_features`` (B, T, 128) float32 and ``attention_mask`` (B, T) int32.

        Raises:
            ValueError: Another sampling rate, a clip shorter than 25 ms, not such samples.
        """
        if sampling_rate is None:
            logger.warning(f"no sampling_rate was given: the samples are taken to be at {self.sampling_rate} Hz")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(f"sampling_rate must be {self.sampling_rate}, got {sampling_rate}: resample first")
        several = isinstance(raw_speech, list | tuple) and len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        several = several or (isinstance(raw_speech, np.ndarray | Tensor) and raw_speech.ndim == 2)
        clips = [torch.as_tensor(clip, device="cpu") for clip in (raw_speech if several else [raw_speech])]
        if wrong := [tuple(clip.shape) for clip in clips if clip.dim() != 1 or len(clip) < WINDOW]:
            raise ValueError(f"raw_speech must be clips (samples,) of at least {WINDOW} samples, got {wrong[0]}")
        clips = [clip.float() if clip.dtype == torch.float64 else clip for clip in clips]
        features, frames = fbank(pad_sequence(clips, batch_first=True), [len(clip) for clip in clips])
        rows = [clip[:count].numpy() for clip, count in zip(features, frames.tolist(), strict=True)]
        return self.pad(BatchFeature({"input_features": rows}), padding, **pad)


def load(checkpoint: str | os.PathLike[str]) -> MAEAST | AudioClassifier:
    """What ``export`` takes, from wherever it is: a classifier of finetune or probe, else a model.

    Raises:
        ValueError: As ``AudioClassifier.from_pretrained`` and ``checkpoint.load_mae_ast``.
    """
    config = Path(checkpoint) / "config.json"
    fields = json.loads(config.read_text()) if config.is_file() else None
    if isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE:
        return AudioClassifier.from_pretrained(checkpoint)
    return load_mae_ast(checkpoint, "export")


def export(model: MAEAST | AudioClassifier, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Writes a model for AutoModel, or a fine-tuned classifier for AutoModelForAudioClassification; fp32.

    What transformers makes of a recording, it makes of it whole: the windows of ``max_seconds`` in which the classifier
    takes a longer one stay here.

    Args:
        model: A model, of which the encoder is written, or a classifier as finetune and probe make it.
        folder: New, or without a model in it: config.json, model.safetensors and preprocessor_config.json.

    Returns:
        What was written, in evaluation mode.

    Raises:
        ValueError: ``folder`` already holds a model; the encoder is not a MAE-AST.
    """
    folder = Path(folder)
    if found := [name for name in ("config.json", "model.safetensors") if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(found)}: choose another folder")
    classifies = isinstance(model, AudioClassifier)
    encoder = model.encoder if classifies else model
    if not isinstance(encoder, MAEAST):
        raise ValueError(f"what is exported to transformers must be a MAE-AST, got {type(encoder).__name__}")
    encoder = encoder_alone(encoder)
    table = encoder.state_dict().get("encoder_positions.table")
    fields = {**encoder.config.to_dict(), "position_table": None if table is None else len(table)}
    if classifies:
        kind = "multi_label_classification" if model.multi_label else "single_label_classification"
        numbers = dict(enumerate(model.labels))
        fields |= {"id2label": numbers, "label2id": {name: n for n, name in numbers.items()}, "problem_type": kind}
        fields |= {"layer": model.layer, "pool": model.pool}
        exported = MAEASTForAudioClassification(MAEASTHFConfig(**fields))
        exported.norm.load_state_dict(model.norm.state_dict())
        exported.classifier.load_state_dict(model.head.state_dict())
    else:
        exported = MAEASTHFModel(MAEASTHFConfig(**fields))
    exported.base_model.model.load_state_dict(encoder.state_dict())
    exported.save_pretrained(folder)
    MAEASTFeatureExtractor().save_pretrained(folder)
    return exported.eval()


AutoConfig.register(MAEASTHFConfig.model_type, MAEASTHFConfig)
AutoModel.register(MAEASTHFConfig, MAEASTHFModel)
AutoModelForAudioClassification.register(MAEASTHFConfig, MAEASTForAudioClassification)
AutoFeatureExtractor.register(MAEASTHFConfig, MAEASTFeatureExtractor)
