"""Configuration of the models MAE-AST and SSAST: sizes, masking and loss weights, with the papers' presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..ops.masking import MASKING_STRATEGIES
from ..validate import check, check_choice, check_positive_integers, is_integer, is_number

_SIZES = {  # name -> (embed_dim, ffn_dim, num_heads)
    "base": (768, 3072, 12),
    "small": (384, 1536, 6),
    "tiny": (192, 768, 3),
}
Count = TypeVar("Count", int, Tensor)

POSITIONS = ("sinusoid", "sinusoid_2d")

_PATCHES = {"patch": (16, 16), "frame": (2, 128)}


def _default_masking(grid_f: int) -> str:
    """Chunks need several frequency blocks; the paper's frame models mask at random (section 3.2)."""
    return "chunk" if grid_f > 1 else "random"


def _check_fields(cls: type, fields: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(names)):
        raise ValueError(f"unknown configuration fields {', '.join(unknown)}; known are {', '.join(names)}")


class PatchGrid:
    """What follows from the patch size of a configuration."""

    num_mel_bins: int
    patch_size: tuple[int, int]

    @property
    def grid_f(self) -> int:
        """Number of frequency blocks, which is the number of tokens per time block."""
        return self.num_mel_bins // self.patch_size[1]

    @property
    def patch_dim(self) -> int:
        """Values P per patch."""
        return self.patch_size[0] * self.patch_size[1]

    def num_tokens(self, num_frames: Count, *, count_partial: bool = False) -> Count:
        """Number of tokens of a clip, as an integer, or of several clips, as a tensor.

        Args:
            num_frames: Frames, >= 0.
            count_partial: Count a last time block that is not full. False: only whole patches count.
        """
        kt = self.patch_size[0]
        num_blocks = (num_frames + kt - 1) // kt if count_partial else num_frames // kt
        return num_blocks * self.grid_f

    def _check_patch_size(self) -> None:
        """Validate ``patch_size``, made a tuple, and ``num_mel_bins``."""
        if isinstance(self.patch_size, list):  # JSON and YAML bring lists
            object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check(
            self,
            "patch_size",
            expected="two positive integers (time, frequency)",
            holds=lambda size: (
                isinstance(size, tuple) and len(size) == 2 and all(is_integer(n) and n >= 1 for n in size)
            ),
        )
        check_positive_integers(self, "num_mel_bins")
        patch_bins = self.patch_size[1]
        check(
            self,
            "num_mel_bins",
            expected=f"a multiple of the patch's frequency extent {patch_bins}",
            holds=lambda num_bins: num_bins % patch_bins == 0,
        )


@dataclass(frozen=True)
class MAEASTConfig(PatchGrid):
    """Sizes, masking and loss weights of a MAE-AST model (arXiv 2203.16691, sections 2 and 3).

    Args:
        num_mel_bins: Mel bins F of the log-mel spectrogram, >= 1, a multiple of the patch's frequency extent.
        patch_size: (time, frequency) extent of a token in frames and mel bins, each >= 1: (16, 16) for the patch model,
            (2, 128) for the frame model.
        embed_dim: Encoder width D, even and a multiple of ``num_heads``.
        ffn_dim: Hidden width of the feed-forward blocks in encoder and decoder, >= 1.
        num_heads: Attention heads in encoder and decoder, >= 1.
        encoder_layers: Layers over the visible tokens, >= 1.
        decoder_embed_dim: Decoder width, even and a multiple of ``num_heads``.
        decoder_layers: Layers over all tokens, >= 0. With 0 the model is only an encoder: it extracts features but
            cannot pretrain.
        norm_first: Pre-norm layers instead of the paper's post-norm.
        encoder_projection: Linear between encoder and decoder. None: only if their widths differ. False needs equal
            widths.
        dropout: Rate in [0, 1) after attention, after the feed-forward block and on the input of each stack.
        attention_dropout: Rate in [0, 1) on the attention probabilities.
        activation_dropout: Rate in [0, 1) after the GELU.
        input_dropout: Rate in [0, 1) on the projected patches.
        encoder_layerdrop: Probability in [0, 1) that an encoder layer is skipped in training.
        decoder_layerdrop: Probability in [0, 1) that a decoder layer is skipped in training.
        mask_ratio: Share of a clip's tokens that is masked, in (0, 1).
        masking: Strategy, a name in ``mae_ast_fast.ops.masking.MASKING_STRATEGIES``. None: "chunk" if there are several
            frequency blocks, "random" if there is one; the attribute then holds that name.
        reconstruction_weight: Weight of the mean squared error, >= 0. 0 switches it off.
        classification_weight: Weight of the InfoNCE loss, >= 0. 0 switches it off.
        norm_pix_loss: Reconstruct each patch normalised by its own mean and variance (He et al. 2022, section 4). Needs
            patches of at least 2 values.
        positions: "sinusoid", the paper's positions by token index, or "sinusoid_2d": half of the width for the time
            block and half for the frequency block, which needs widths that are multiples of 4. With one frequency block
            both are the same.
        prediction_stride: In training the decoder sees and predicts every n-th masked token of a clip, n >= 1 (partial
            reconstruction, Fu et al. 2024, arXiv 2401.14391). 1: all of them, as in the paper. In evaluation all.
        temperature: InfoNCE compares a prediction with the targets minus their own means, by the cosine over this
            temperature, > 0 (van den Oord et al. 2018; Chen et al. 2020, arXiv 2002.05709). Then loud patches do not
            win. None: by the product with the targets as they are, as in the paper.

    Raises:
        ValueError: A value is outside its range, or values contradict each other.
    """

    num_mel_bins: int = 128
    patch_size: tuple[int, int] = (16, 16)
    embed_dim: int = 768
    ffn_dim: int = 3072
    num_heads: int = 12
    encoder_layers: int = 12
    decoder_embed_dim: int = 768
    decoder_layers: int = 2
    norm_first: bool = False
    encoder_projection: bool | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    encoder_layerdrop: float = 0.05
    decoder_layerdrop: float = 0.0
    mask_ratio: float = 0.75
    masking: str | None = None
    reconstruction_weight: float = 10.0
    classification_weight: float = 1.0
    norm_pix_loss: bool = False
    positions: str = "sinusoid"
    prediction_stride: int = 1
    temperature: float | None = None

    def __post_init__(self) -> None:
        self._check_patch_size()
        self._check_layers()
        self._check_masking()
        check(
            self,
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "input_dropout",
            "encoder_layerdrop",
            "decoder_layerdrop",
            expected="in [0, 1)",
            holds=lambda rate: is_number(rate) and 0.0 <= rate < 1.0,
        )
        check(
            self,
            "reconstruction_weight",
            "classification_weight",
            expected="a finite number >= 0",
            holds=lambda weight: is_number(weight) and 0.0 <= weight < math.inf,
        )
        check(
            self,
            "temperature",
            expected="null or a finite number > 0",
            holds=lambda value: value is None or (is_number(value) and 0.0 < value < math.inf),
        )
        check(self, "norm_pix_loss", expected="true or false", holds=lambda flag: isinstance(flag, bool))
        if self.norm_pix_loss and self.patch_dim < 2:
            raise ValueError(f"norm_pix_loss needs patches of at least 2 values, got patch_size={self.patch_size}")
        if self.reconstruction_weight == 0.0 and self.classification_weight == 0.0:
            raise ValueError("reconstruction_weight and classification_weight are both 0: nothing to train")

    def _check_layers(self) -> None:
        check_positive_integers(self, "embed_dim", "ffn_dim", "num_heads", "encoder_layers", "decoder_embed_dim")
        check(self, "decoder_layers", expected="an integer >= 0", holds=lambda n: is_integer(n) and n >= 0)
        check(self, "norm_first", expected="true or false", holds=lambda flag: isinstance(flag, bool))
        check(
            self,
            "embed_dim",
            "decoder_embed_dim",
            expected=f"divisible by num_heads={self.num_heads}",
            holds=lambda width: width % self.num_heads == 0,
        )
        check(
            self,
            "embed_dim",
            "decoder_embed_dim",
            expected="even for the sinusoidal positions",
            holds=lambda width: width % 2 == 0,
        )
        check(
            self,
            "encoder_projection",
            expected="true, false or null",
            holds=lambda flag: isinstance(flag, bool | None),
        )
        check_choice(self, "positions", POSITIONS)
        if self.positions == "sinusoid_2d" and self.grid_f > 1:
            check(
                self,
                "embed_dim",
                "decoder_embed_dim",
                expected="a multiple of 4 for positions='sinusoid_2d'",
                holds=lambda width: width % 4 == 0,
            )
        if self.encoder_projection is False and self.embed_dim != self.decoder_embed_dim:
            raise ValueError(
                f"encoder_projection=False needs equal widths, got embed_dim={self.embed_dim} and "
                f"decoder_embed_dim={self.decoder_embed_dim}"
            )

    def _check_masking(self) -> None:
        """Validate ``mask_ratio``, ``prediction_stride`` and ``masking``, which gets its default here."""
        check_positive_integers(self, "prediction_stride")
        check(self, "mask_ratio", expected="in (0, 1)", holds=lambda ratio: is_number(ratio) and 0.0 < ratio < 1.0)
        if self.masking is None:
            object.__setattr__(self, "masking", _default_masking(self.grid_f))
        check_choice(self, "masking", MASKING_STRATEGIES)
        if self.grid_f == 1 and self.masking in ("chunk", "chunk_official", "frequency"):
            raise ValueError(
                f"masking={self.masking!r} needs several frequency blocks, but patch_size={self.patch_size} makes one "
                f"of {self.num_mel_bins} mel bins: use masking='random', 'span' or 'time'"
            )

    @property
    def has_projection(self) -> bool:
        """Whether there is a Linear between encoder and decoder."""
        if self.encoder_projection is None:
            return self.embed_dim != self.decoder_embed_dim
        return self.encoder_projection

    @classmethod
    def preset_names(cls) -> list[str]:
        """Names that ``preset`` accepts."""
        return [f"{patch}_{size}" for patch in _PATCHES for size in ("base", "base_6layer", "small", "tiny")]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MAEASTConfig:
        """The configuration of a named model; the base sizes are the paper's (section 3.2).

        Args:
            name: ``{patch,frame}_{base,base_6layer,small,tiny}``. base is 768 wide with 12 heads, small 384 with 6,
                tiny 192 with 3; all have 12 encoder layers (6 where the name says so) and 2 decoder layers.
            **overrides: Fields that replace those of the preset.

        Raises:
            ValueError: An unknown name or field, or the constructor's errors.
        """
        if name not in cls.preset_names():
            raise ValueError(f"preset must be one of {', '.join(cls.preset_names())}, got {name!r}")
        patch, size = name.split("_", 1)
        width, ffn_dim, num_heads = _SIZES[size.removesuffix("_6layer")]
        fields = {
            "patch_size": _PATCHES[patch],
            "embed_dim": width,
            "decoder_embed_dim": width,
            "ffn_dim": ffn_dim,
            "num_heads": num_heads,
            "encoder_layers": 6 if size.endswith("_6layer") else 12,
        }
        return cls.from_dict({**fields, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON or YAML; ``from_dict`` reads them back."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MAEASTConfig:
        """Build a configuration from a dict like that of ``to_dict``; missing fields take their defaults.

        Raises:
            ValueError: Unknown fields, which the message names, or the constructor's errors.
        """
        _check_fields(cls, fields)
        return cls(**fields)


SSAST_OBJECTIVES = ("joint", "joint_two_pass", "mpc", "mpg")


@dataclass(frozen=True)
class SSASTConfig(PatchGrid):
    """Sizes, masking and objective of an SSAST model (arXiv 2110.09784), the baseline.

    Args:
        patch_size: (time, frequency) extent of a token in frames and mel bins, each >= 1: (16, 16) for the patch model,
            (2, 128) for the frame model.
        embed_dim: Width D, a multiple of ``num_heads``; the feed-forward blocks are four times as wide.
        num_heads: Attention heads, >= 1.
        layers: Number of pre-norm layers, >= 1.
        input_frames: Frames of the longest clip, at least those of a patch. There are positions for its whole patches.
        num_mel_bins: Mel bins F of the log-mel spectrogram, >= 1, a multiple of the patch's frequency extent.
        mask_patches: Masked tokens of a clip of ``input_frames``, >= 1 and less than its tokens. In a shorter clip the
            same share is masked, rounded up, and never all: see ``mask_ratio``.
        objective: "joint": InfoNCE + 10 * MSE from one pass over one mask. "joint_two_pass": the same loss with one
            pass and mask per term, as in the official code. "mpc": InfoNCE alone. "mpg": MSE alone.
        mean: Mean of the log-mel values of the data; features are normalised as (x - mean) / (2 * std). The defaults of
            ``mean`` and ``std`` are those of the paper's AudioSet and LibriSpeech recipe.
        std: Standard deviation of the log-mel values of the data, > 0.

    Raises:
        ValueError: A value is outside its range, or values contradict each other.
    """

    patch_size: tuple[int, int] = (16, 16)
    embed_dim: int = 768
    num_heads: int = 12
    layers: int = 12
    input_frames: int = 1024
    num_mel_bins: int = 128
    mask_patches: int = 400
    objective: str = "joint"
    mean: float = -4.2677393
    std: float = 4.5689974

    # The shared transformer layers read these fields: SSAST has pre-norm and no dropout.
    norm_first: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.0
    attention_dropout: ClassVar[float] = 0.0
    activation_dropout: ClassVar[float] = 0.0
    input_dropout: ClassVar[float] = 0.0
    norm_pix_loss: ClassVar[bool] = False  # read by the evaluation of reconstructions

    def __post_init__(self) -> None:
        self._check_patch_size()
        check_positive_integers(self, "embed_dim", "num_heads", "layers", "input_frames", "mask_patches")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads={self.num_heads}, got {self.embed_dim}")
        if self.input_frames < self.patch_size[0]:
            raise ValueError(f"input_frames must hold a patch of {self.patch_size[0]} frames, got {self.input_frames}")
        if self.mask_patches >= self.num_patches:
            raise ValueError(
                f"mask_patches must be less than the {self.num_patches} patches of {self.input_frames} frames, got "
                f"{self.mask_patches}"
            )
        check_choice(self, "objective", SSAST_OBJECTIVES)
        check(self, "mean", expected="a finite number", holds=lambda mean: is_number(mean) and math.isfinite(mean))
        check(self, "std", expected="a finite number > 0", holds=lambda std: is_number(std) and 0.0 < std < math.inf)

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward blocks."""
        return 4 * self.embed_dim

    @property
    def grid_t(self) -> int:
        """Number of time blocks of a clip of ``input_frames``."""
        return self.input_frames // self.patch_size[0]

    @property
    def num_patches(self) -> int:
        """Number of tokens of a clip of ``input_frames``, without the class tokens."""
        return self.grid_t * self.grid_f

    @property
    def masking(self) -> str:
        """Masking strategy: "chunk" if there are several frequency blocks, "random" if there is one."""
        return _default_masking(self.grid_f)

    @property
    def mask_ratio(self) -> float:
        """Ratio for which ``masking.num_visible`` is L - ceil(mask_patches * L / num_patches) of L tokens.

        At least one token stays visible. The ratio is 1e-9 less than mask_patches / num_patches. With the exact
        quotient a rounding just below an integer would let the int() in ``num_visible`` drop a whole token.
        """
        return self.mask_patches / self.num_patches - 1e-9

    @property
    def reconstruction_weight(self) -> float:
        """Weight of the mean squared error in the loss."""
        return {"mpc": 0.0, "mpg": 1.0}.get(self.objective, 10.0)

    @property
    def classification_weight(self) -> float:
        """Weight of InfoNCE in the loss."""
        return 0.0 if self.objective == "mpg" else 1.0

    @classmethod
    def preset_names(cls) -> list[str]:
        """Names that ``preset`` accepts."""
        return [f"{patch}_{size}" for patch in _PATCHES for size in _SIZES]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SSASTConfig:
        """The configuration of a named model, sized as in the paper (section 3).

        Args:
            name: ``{patch,frame}_{base,small,tiny}``. base is 768 wide with 12 heads, small 384 with 6, tiny 192 with
                3; all have 12 layers and mask 400 of 512 tokens.
            **overrides: Fields that replace those of the preset.

        Raises:
            ValueError: An unknown name or field, or the constructor's errors.
        """
        if name not in cls.preset_names():
            raise ValueError(f"preset must be one of {', '.join(cls.preset_names())}, got {name!r}")
        patch, size = name.split("_")
        width, _, num_heads = _SIZES[size]
        return cls.from_dict({"patch_size": _PATCHES[patch], "embed_dim": width, "num_heads": num_heads, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON or YAML; ``from_dict`` reads them back."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SSASTConfig:
        """Build a configuration from a dict like that of ``to_dict``; missing fields take their defaults.

        Raises:
            ValueError: Unknown fields, which the message names, or the constructor's errors.
        """
        _check_fields(cls, fields)
        return cls(**fields)


CONFIGS: dict[str, type[MAEASTConfig] | type[SSASTConfig]] = {"mae_ast": MAEASTConfig, "ssast": SSASTConfig}
