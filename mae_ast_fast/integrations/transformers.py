"""MAE-AST in Hugging Face transformers: configuration, encoder, audio classifier and feature extractor.

After ``import mae_ast_fast.hf``, AutoModel, AutoModelForAudioClassification and AutoFeatureExtractor read the folders
that ``export`` writes, without trust_remote_code. Shapes use B clips, T frames, F mel bins, L tokens, D width.
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
from ..models.mae_ast import MAEAST, InputNorm
from ..models.transformer import Positions
from ..ops.fbank import NUM_MEL_BINS, SAMPLE_RATE, WINDOW, fbank
from ..ops.packing import real_tokens

logger = logging.get_logger(__name__)

_FIELDS = [field.name for field in dataclasses.fields(MAEASTConfig)]


class MAEASTHFConfig(PreTrainedConfig):
    """The fields of ``MAEASTConfig``, by their own names and by transformers' (``hidden_size`` is ``embed_dim``).

    Its ``model_type`` differs from that of this library's own folders, whose weights have other names.

    Args:
        position_table: Rows of the position table that is stored with the weights, as for the paper's fp16 runs; None:
            positions are computed.
        layer: Layer whose output is the features, from 1 to ``encoder_layers``; None: the output of the encoder.
        pool: Pooling of the classifier: "mean" over all tokens of a clip, or "bands" for one mean per frequency block.
        **kwargs: Fields of ``MAEASTConfig`` (``decoder_layers`` is always 0), and of every configuration in
            transformers, such as ``num_labels``, ``id2label`` and ``problem_type``.

    Raises:
        ValueError: A field has an invalid value, as for ``MAEASTConfig``.
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
        fields = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        for name, value in MAEASTConfig.from_dict({**fields, "decoder_layers": 0}).to_dict().items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    @property
    def encoder(self) -> MAEASTConfig:
        """Configuration of the wrapped ``MAEAST``."""
        return MAEASTConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


@dataclass
class MAEASTModelOutput(BaseModelOutput):
    """Output of ``MAEASTHFModel``.

    Attributes:
        last_hidden_state: (B, L, D), zero in rows without a token.
        hidden_states: One (B, L, D) per layer from the first to the last, without the embeddings; None unless
            requested.
        token_mask: (B, L) bool, True where a clip has a token.
    """

    token_mask: Tensor | None = None


class MAEASTPreTrainedModel(PreTrainedModel):
    """Base of the two models: initialises weights that no checkpoint holds."""

    config_class = MAEASTHFConfig
    base_model_prefix = "mae_ast"
    main_input_name = "input_features"
    input_modalities = "audio"
    _no_split_modules = ["PreNormLayer", "PostNormLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights, and buffers too: from_pretrained builds the model on the meta device, without values."""
        super()._init_weights(module)
        if isinstance(module, Positions):
            init.copy_(module.table, module.compute(len(module.table), module.table.device))
        elif isinstance(module, InputNorm):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class MAEASTHFModel(MAEASTPreTrainedModel):
    """The encoder of MAE-AST. Its features are those of ``MAEAST.extract_features``.

    In training mode the statistics of the input normalisation stay fixed.

    Args:
        config: Configuration; its ``encoder`` builds the ``MAEAST``.
    """

    def __init__(self, config: MAEASTHFConfig) -> None:
        super().__init__(config)
        self.model = MAEAST(config.encoder)
        if config.position_table is not None:
            table = self.model.encoder_positions.compute(config.position_table)
            self.model.encoder_positions.register_buffer("table", table, persistent=True)
        self.post_init()

    def train(self, mode: bool = True) -> MAEASTHFModel:
        """Set the mode as in ``nn.Module``; the input normalisation stays in evaluation mode."""
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
            input_features: (B, T, F) log-mel, not normalised, from ``MAEASTFeatureExtractor``.
            attention_mask: (B, T), 1 for real frames and 0 for the padding after them; None: all frames are real.
            output_hidden_states: Whether to return the output of each layer; None: as in the configuration.
            return_dict: Whether to return a ``MAEASTModelOutput``, not a tuple; None: as in the configuration.

        Raises:
            ValueError: ``input_features`` have the wrong shape or dtype, or ``attention_mask`` has another shape or
                zeros before ones.
        """
        num_frames = None if attention_mask is None else _num_frames(attention_mask, input_features)
        encoded = self.model.extract_features(input_features, num_frames, self.config.layer)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = MAEASTModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=tuple(encoded.hidden_states) if output_hidden_states else None,
            token_mask=real_tokens(encoded.lengths, encoded.last_hidden_state.shape[1]),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _num_frames(attention_mask: Tensor, input_features: Tensor) -> Tensor:
    """Real frames of each clip, (B,) int64.

    Raises:
        ValueError: ``attention_mask`` has another shape than (B, T), or zeros before ones.
    """
    expected = tuple(input_features.shape[:2])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(f"attention_mask must be {expected}, got {tuple(attention_mask.shape)}")
    is_real = attention_mask.bool()
    if (is_real[:, 1:] & ~is_real[:, :-1]).any():
        raise ValueError("attention_mask must be ones, then zeros (padding on the right), got zeros before ones")
    return is_real.sum(1)


def _wants_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    """``return_dict``, or the configuration's value if it is None."""
    return bool(config.return_dict if return_dict is None else return_dict)


class MAEASTForAudioClassification(MAEASTPreTrainedModel):
    """Audio classifier: encoder, pooling by ``config.pool``, batch norm and linear layer (paper, section 4).

    The norm is over clips, so a training batch needs at least two (``dataloader_drop_last`` of the Trainer).

    Args:
        config: Configuration; ``pool``, ``num_labels`` and ``problem_type`` set up the classifier.
    """

    def __init__(self, config: MAEASTHFConfig) -> None:
        super().__init__(config)
        self.mae_ast = MAEASTHFModel(config)
        self.bands = config.encoder.grid_f if config.pool == "bands" else 1
        self.norm = nn.BatchNorm1d(self.bands * config.embed_dim, eps=NORM_EPS, affine=False)
        num_labels = config.num_labels
        assert num_labels is not None  # transformers derives it from id2label
        self.classifier = nn.Linear(self.norm.num_features, num_labels)
        self.post_init()

    def forward(  # noqa: PLR0917 transformers' Trainer and pipelines fix the arguments
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (B, num_labels), and the loss if there are labels.

        Args:
            input_features: (B, T, F) log-mel, not normalised, from ``MAEASTFeatureExtractor``.
            attention_mask: (B, T), 1 for real frames and 0 for the padding after them; None: all frames are real.
            labels: (B,) int64 class indices for cross-entropy, or (B, num_labels) floats in [0, 1] for binary
                cross-entropy. ``config.problem_type`` selects the loss; if it is None, the dtype does.
            output_hidden_states: Whether to return the output of each layer; None: as in the configuration.
            return_dict: Whether to return a ``SequenceClassifierOutput``, not a tuple; None: as in the configuration.

        Raises:
            ValueError: As ``MAEASTHFModel.forward``.
        """
        encoded = self.mae_ast(input_features, attention_mask, output_hidden_states, return_dict=True)
        num_blocks = encoded.token_mask.sum(1).clamp(min=1)[:, None, None] / self.bands
        blocks = encoded.last_hidden_state.float().unflatten(1, (-1, self.bands))
        pooled = (blocks.sum(1) / num_blocks).flatten(1)  # rows without a token are 0
        logits = self.classifier(self.norm(pooled.to(weight_dtype(self.classifier))))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class MAEASTFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to padded log-mel features of ``fbank``, with a mask of the real frames.

    Args:
        feature_size: Mel bins, 128.
        sampling_rate: Sampling rate of the input, 16000 Hz.
        padding_value: Value of padded frames.
        **kwargs: Other arguments of ``SequenceFeatureExtractor``.
    """

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
            raw_speech: One clip (num_samples,), a list of clips, or (B, num_samples): floats in [-1, 1] or int16 PCM,
                each clip scaled by its own dtype.
            sampling_rate: Sampling rate of ``raw_speech`` in Hz; None: 16 kHz is assumed, with a warning.
            padding: Padding strategy, as ``SequenceFeatureExtractor.pad`` takes it.
            **pad: Other arguments of ``SequenceFeatureExtractor.pad``: ``return_tensors``, ``max_length``,
                ``truncation``, ``pad_to_multiple_of``, ``return_attention_mask``.

        Returns:
            ``input_features`` (B, T, 128) float32 and ``attention_mask`` (B, T) int32.

        Raises:
            ValueError: The sampling rate is not 16 kHz, a clip is shorter than 25 ms, or a clip is not 1-D.
        """
        if sampling_rate is None:
            logger.warning(f"no sampling_rate was given: {self.sampling_rate} Hz is assumed")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(f"sampling_rate must be {self.sampling_rate}, got {sampling_rate}: resample first")
        is_batch = isinstance(raw_speech, list | tuple) and len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        is_batch = is_batch or (isinstance(raw_speech, np.ndarray | Tensor) and raw_speech.ndim == 2)
        clips = [torch.as_tensor(clip, device="cpu") for clip in (raw_speech if is_batch else [raw_speech])]
        if wrong_shapes := [tuple(clip.shape) for clip in clips if clip.dim() != 1 or len(clip) < WINDOW]:
            raise ValueError(
                f"raw_speech must be clips (num_samples,) of at least {WINDOW} samples, got {wrong_shapes[0]}"
            )
        clips = [clip.float() if clip.dtype == torch.float64 else clip for clip in clips]
        log_mel, num_frames = fbank(clips)
        unpadded = [clip[:count].numpy() for clip, count in zip(log_mel, num_frames.tolist(), strict=True)]
        return self.pad(BatchFeature({"input_features": unpadded}), padding, **pad)


def load(checkpoint: str | os.PathLike[str]) -> MAEAST | AudioClassifier:
    """Read a model for ``export``.

    Args:
        checkpoint: Run folder of finetune or probe, or a checkpoint as ``checkpoint.load_model`` takes it.

    Returns:
        The classifier of finetune or probe, otherwise the MAE-AST.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or it is an SSAST.
    """
    path = Path(checkpoint) / "config.json"
    fields = json.loads(path.read_text()) if path.is_file() else None
    if isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE:
        return AudioClassifier.from_pretrained(checkpoint)
    return load_mae_ast(checkpoint, "export")


def export(model: MAEAST | AudioClassifier, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Write a model for AutoModel, or a fine-tuned classifier for AutoModelForAudioClassification, in fp32.

    The exported classifier classifies a recording as one clip. Splitting a long recording into windows of
    ``max_seconds`` is not exported.

    Args:
        model: Model whose encoder is written, or classifier of finetune or probe.
        folder: Folder for config.json, model.safetensors and preprocessor_config.json. It is created if it does not
            exist, and must not hold a model.

    Returns:
        The written transformers model, in evaluation mode.

    Raises:
        ValueError: ``folder`` already holds a model, or the encoder is not a MAE-AST.
    """
    folder = Path(folder)
    if present := [name for name in ("config.json", "model.safetensors") if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(present)}: choose another folder")
    pretrained = model.encoder if isinstance(model, AudioClassifier) else model
    if not isinstance(pretrained, MAEAST):
        raise ValueError(f"a model exported to transformers must be a MAE-AST, got {type(pretrained).__name__}")
    encoder = pretrained.encoder_only()
    table = encoder.state_dict().get("encoder_positions.table")
    fields = {**encoder.config.to_dict(), "position_table": None if table is None else len(table)}
    exported: MAEASTPreTrainedModel
    if isinstance(model, AudioClassifier):
        fields |= {
            "id2label": dict(enumerate(model.labels)),
            "label2id": {label: index for index, label in enumerate(model.labels)},
            "problem_type": "multi_label_classification" if model.multi_label else "single_label_classification",
            "layer": model.layer,
            "pool": model.pool,
        }
        exported = classifier = MAEASTForAudioClassification(MAEASTHFConfig(**fields))
        classifier.norm.load_state_dict(model.norm.state_dict())
        classifier.classifier.load_state_dict(model.head.state_dict())
        wrapper = classifier.mae_ast
    else:
        exported = wrapper = MAEASTHFModel(MAEASTHFConfig(**fields))
    wrapper.model.load_state_dict(encoder.state_dict())
    exported.save_pretrained(folder)
    MAEASTFeatureExtractor().save_pretrained(folder)
    return exported.eval()


AutoConfig.register(MAEASTHFConfig.model_type, MAEASTHFConfig)
AutoModel.register(MAEASTHFConfig, MAEASTHFModel)
AutoModelForAudioClassification.register(MAEASTHFConfig, MAEASTForAudioClassification)
AutoFeatureExtractor.register(MAEASTHFConfig, MAEASTFeatureExtractor)
