"""What MAEAST and SSAST have in common: how they are built, what input they take, how they are saved and read.

Letters as in model.py.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import ops
from ..devices import send
from ..files import atomic_write, write_json
from ..ops import resolve_impl
from ..ops.attention import check_backend
from ..ops.fbank import fbank
from ..ops.masking import num_visible
from ..ops.packing import Packing, TokenCounts
from .config import MAEASTConfig, SSASTConfig
from .transformer import RECOMPUTE, ExecConfig, TransformerStack

Model = TypeVar("Model", bound="PretrainingModel")


@dataclass
class Encoded:
    """Features of clips of which nothing is masked, their tokens packed.

    Attributes:
        x: (N, D), the encoder's output, or that of the layer that was asked for.
        states: (N, D) of each layer, the first one's first.
        rows: Clip and token of each row.
        block: (N,) int64 time block of each row: patches of a block have the same frames and other mel bins.
        band: (N,) int64 frequency block of each row, 0 the lowest mel bins.
    """

    x: Tensor
    states: list[Tensor]
    rows: Packing
    block: Tensor
    band: Tensor


def check_lengths(lengths: Sequence[int] | Tensor, clips: int, longest: int, values: bool = True) -> Tensor:
    """The frame counts (B,), int64, of ``clips`` clips of at most ``longest`` frames, on the CPU or on their device.

    Args:
        lengths: What the caller gave.
        clips: B.
        longest: T.
        values: Look at the values too, for which the host waits where they are on a GPU.

    Raises:
        ValueError: No such integers.
    """
    try:
        lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths must be integers ({clips},), got {lengths!r}") from error
    is_whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if lengths.shape != (clips,) or not is_whole:
        raise ValueError(f"lengths must be integers ({clips},), got {lengths.dtype} {tuple(lengths.shape)}")
    lengths = lengths.long()  # in a narrow dtype T could overflow
    if values and (lengths.min() < 0 or lengths.max() > longest):
        raise ValueError(f"lengths must be between 0 and T={longest} frames, got {lengths.tolist()}")
    return lengths


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's weight, else of its first floating parameter; fp32 where it has none, as if quantised."""
    tensors = getattr(module, "weight", None), *module.parameters()
    return next((x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)


def listed_frames(clips: int, longest: int, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """The frame counts of ``clips`` clips as integers, for which the host waits where they are on a GPU.

    Args:
        clips: B.
        longest: T.
        lengths: (B,) real frames, checked; None: all T.
    """
    if lengths is None:
        return [longest] * clips
    return lengths.tolist() if isinstance(lengths, Tensor) else [int(count) for count in lengths]


@functools.lru_cache
def max_tokens(blocks: int, grid_f: int, mask_ratio: float) -> tuple[int, int]:
    """The most visible and the most masked tokens of a clip of at most so many time blocks."""
    tokens = [block * grid_f for block in range(blocks + 1)]
    visible = [num_visible(count, mask_ratio) for count in tokens]
    return max(visible), max(count - seen for count, seen in zip(tokens, visible, strict=True))


def write_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Writes model.safetensors and config.json, each in one step, into a folder that is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    write_json(folder / "config.json", config)


class PretrainingModel(nn.Module, ModelHubMixin, library_name="mae_ast_fast", license="apache-2.0", tags=["audio"]):
    """Base of the models. A subclass has ``patch_embed``, whose dtype is that of its computations.

    Args:
        config: Of the class ``config_class``.
        impl: "auto", "torch" or "triton".
        attention: "auto" or the name of an attention backend (attention.py).
        recompute: "none", "gelu" or "layer".

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available, or the configuration is of
            another model.
    """

    config_class: ClassVar[type[MAEASTConfig] | type[SSASTConfig]]
    model_type: ClassVar[str]  # in config.json; also the name of the front end in fbank.py
    patch_embed: nn.Linear
    encoder: TransformerStack

    def __init__(
        self,
        config: MAEASTConfig | SSASTConfig,
        impl: str = "auto",
        attention: str = "auto",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        self.config = config
        self.impl, self.attention, self.recompute = impl, attention, recompute

    @property
    def impl(self) -> str:
        """Implementation of the operations; setting it checks as the constructor does, likewise the two below."""
        return self._impl

    @impl.setter
    def impl(self, impl: str) -> None:
        # Only who asks for kernels by name is told at once that there is no GPU for them; nobody else touches CUDA.
        resolve_impl(impl, "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
        self._impl = impl

    @property
    def attention(self) -> str:
        """Attention backend. What it can do shows on the device and dtype of a call."""
        return self._attention

    @attention.setter
    def attention(self, attention: str) -> None:
        check_backend(attention)
        self._attention = attention

    @property
    def recompute(self) -> str:
        """What the backward computes again."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        if recompute == "gelu" and self.config.activation_dropout > 0.0:
            rate = self.config.activation_dropout
            raise ValueError(f"recompute='gelu' needs activation_dropout=0, got {rate}: use recompute='layer'")
        self._recompute = recompute

    def features(self, waveforms: Tensor, lengths: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """What ``forward`` takes, from waveforms: log-mel of the model's own front end, through ``normalize``.

        Args:
            waveforms: (B, S) mono at 16 kHz, as ``fbank`` takes them.
            lengths: (B,) samples of each clip; None: all S.

        Returns:
            Features (B, T, 128) on the device of ``waveforms`` and the clips' frames (B,), int64, on the device of
            ``lengths``, as of ``fbank``: on the CPU where ``lengths`` is None or a list.

        Raises:
            ValueError: As ``fbank``.
        """
        features, frames = fbank(waveforms, lengths, frontend=self.model_type)
        return self.normalize(features), frames

    def normalize(self, features: Tensor) -> Tensor:
        """Log-mel to what ``forward`` takes: unchanged where the model normalises by itself."""
        return features

    @property
    def mean_feature(self) -> float:
        """The feature that the model's normalisation takes to 0."""
        return 0.0

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Encodes all tokens, nothing masked: what probing and fine-tuning start from.

        Args:
            features: (B, T, F), as for ``forward``.
            lengths: (B,) real frames of each clip; None: all T. A clip's last patch is filled up with zeros.
            layer: Stop after this layer, counted from 1. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, a layer that does not exist.
        """
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return len(self.encoder.layers)

    @property
    def max_frames(self) -> int:
        """Most frames T of a batch."""
        raise NotImplementedError

    def sizes_of(self, lengths: Sequence[int]) -> TokenCounts:
        """The sizes of a batch whose masks ``forward`` draws.

        Args:
            lengths: Real frames of each clip, on the host.
        """
        config = self.config
        tokens = [int(frames) // config.patch_size[0] * config.grid_f for frames in lengths]
        visible = [num_visible(count, config.mask_ratio) for count in tokens]
        return TokenCounts.of(visible, [count - v for count, v in zip(tokens, visible, strict=True)])

    def largest_sizes(self, clips: int, longest: int, drawn: bool = True) -> TokenCounts:
        """Sizes that hold every batch of so many clips of at most so many frames, whatever their lengths.

        Args:
            clips: B.
            longest: T.
            drawn: The masks hide as many tokens of each clip as ``sample_mask`` does; False: any number.
        """
        config = self.config
        blocks = longest // config.patch_size[0]
        tokens = blocks * config.grid_f
        visible, masked = max_tokens(blocks, config.grid_f, config.mask_ratio) if drawn else (tokens, tokens)
        return TokenCounts(
            visible=clips * visible,
            masked=clips * masked,
            max_visible=visible,
            max_masked=masked,
            max_tokens=tokens,
            has_padding_rows=True,
        )

    def num_masked(self, frames: Tensor) -> Tensor:
        """Tokens that ``sample_mask`` hides of each clip (B,), int64, where ``frames`` (B,), int64, are."""
        tokens = frames // self.config.patch_size[0] * self.config.grid_f
        return tokens - num_visible(tokens, self.config.mask_ratio)

    def _execution(self, device: torch.device, dtype: torch.dtype) -> ExecConfig:
        """Resolves the implementation, and draws the seed of this forward's dropout where kernels need one."""
        config = self.config
        impl, _ = resolve_impl(self.impl, device, dtype)
        kernels = impl == "triton" or self.attention == "short"
        rates = config.dropout, config.attention_dropout, config.activation_dropout, config.input_dropout
        drop = self.training and kernels and any(rates)
        return ExecConfig(impl, self.attention, ops.draw_seed(device) if drop else None, self.recompute)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the stream and of the matrix products: autocast's where it is on, else that of the weights."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return weight_dtype(self.patch_embed)

    def exact_sizes(
        self,
        features: Tensor,
        lengths: Sequence[int] | Tensor | None,
        given: tuple[Tensor, Tensor] | None = None,
    ) -> TokenCounts:
        """Exact sizes; the host waits for a GPU only where it cannot know them.

        Args:
            features: (B, T, F).
            lengths: (B,) real frames.
            given: Visible and masked tokens, (B, L) bool each, where the mask was not drawn by ``config``.

        Raises:
            ValueError: No clip has both visible and masked tokens.
        """
        clips, longest = features.shape[:2]
        if given is None:
            sizes = self.sizes_of(listed_frames(clips, longest, lengths))
            alive = sizes.masked > 0  # a drawn mask leaves one token visible
        else:
            visible, masked = torch.stack(given).sum(2).tolist()
            sizes = TokenCounts.of(visible, masked)
            alive = any(v and m for v, m in zip(visible, masked, strict=True))
        if not alive:
            kt, kf = self.config.patch_size
            frames = listed_frames(clips, longest, lengths)
            hidden = "" if given is None else f" and masked tokens {masked}"
            raise ValueError(
                f"no clip has both visible and masked tokens: clips need at least 2 patches of {kt} frames x {kf} "
                f"bins, of which the mask hides some, got frames {frames}{hidden}"
            )
        return sizes

    def _check(self, features: Tensor, lengths: Tensor | None, values: bool = True) -> Tensor:
        """Validates features and lengths; returns the frame counts (B,) int64."""
        bins = self.config.num_mel_bins
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[2] != bins:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, T, {bins}), got {got}")
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        batch, width = features.shape[:2]
        if batch == 0:
            raise ValueError("features has no clips: B is 0")
        if lengths is None:
            return torch.full((batch,), width, dtype=torch.long, device=features.device)
        return send(check_lengths(lengths, batch, width, values), features.device)

    def _check_layer(self, layer: int | None) -> None:
        if layer is not None and (type(layer) is not int or not 1 <= layer <= self.num_layers):
            raise ValueError(f"layer must be an integer in 1..{self.num_layers}, got {layer!r}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **hub: Any) -> str | None:
        """Writes model.safetensors and config.json, each in one step: a reader never sees half a file.

        Args:
            save_directory: Folder, made where it does not exist.
            **hub: ``push_to_hub``, ``repo_id`` and what else ``huggingface_hub.ModelHubMixin`` takes.
        """
        folder = Path(save_directory)
        write_model(self, {"model_type": self.model_type, **self.config.to_dict()}, folder)
        if "model_card_kwargs" in hub:  # the mixin is about to upload the folder
            self.generate_model_card(**(hub["model_card_kwargs"] or {})).save(folder / "README.md")
        if hub.pop("push_to_hub", False):
            return self.push_to_hub(hub.pop("repo_id", None) or folder.name, **hub)
        return None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        impl: str = "auto",
        attention: str = "auto",
        recompute: str = "none",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Model:
        """Reads a folder that ``save_pretrained`` wrote, without a network, or a Hub repository; in evaluation mode.

        Called on the base class it reads either model, by the type that config.json names.

        Args:
            pretrained_model_name_or_path: Folder or repository name.
            impl: As in the constructor.
            attention: As in the constructor.
            recompute: As in the constructor.
            revision: This and the following as ``huggingface_hub.hf_hub_download`` takes them; unused for a folder.
            cache_dir: Where downloads are kept.
            force_download: Download again.
            local_files_only: Never download.
            token: Of the Hub.

        Raises:
            ValueError: A file is missing or damaged, or weights and configuration do not fit; or as the constructor.
        """
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        source = os.fspath(pretrained_model_name_or_path)

        if not os.path.isdir(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            raise ValueError(f"{source} is no folder, and no name of a Hub repository (owner/name)")

        def locate(name: str) -> Path:
            if not os.path.isdir(source):
                return Path(hf_hub_download(source, name, **hub))
            path = Path(source) / name
            if not path.is_file():
                raise ValueError(
                    f"{source} is no checkpoint: expected {name} in it, found {sorted(os.listdir(source))}"
                )
            return path

        kinds = {kind.model_type: kind for kind in (cls.__subclasses__() if cls is PretrainingModel else [cls])}
        path = locate("config.json")
        try:
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, got {type(fields).__name__}")
            if (name := fields.pop("model_type", None)) not in list(kinds):  # in a list, because it may be anything
                hint = " (predict, and export --format transformers, take it)" if name == "audio_classifier" else ""
                raise ValueError(f"expected model_type {' or '.join(map(repr, kinds))}, got {name!r}{hint}")
            config = kinds[name].config_class.from_dict(fields)
        except ValueError as error:  # that of the JSON reader among them
            names = " or ".join(kind.__name__ for kind in kinds.values())
            raise ValueError(f"{path} is no configuration of {names}: {error}") from None
        path = locate("model.safetensors")
        try:
            weights = load_file(path)
            # Before anything is allocated: who wrote the configuration may have asked for more than this machine has.
            if max(value for key, value in config.to_dict().items() if key.endswith("layers")) > len(weights):
                raise ValueError(f"{config} has more layers than the {len(weights)} tensors there")
            with torch.device("meta"):
                expected = kinds[name](config).state_dict()
            differing = [
                f"{key}: expected {tuple(shape)}, got {tuple(weights[key].shape)}"
                for key, shape in ((key, expected[key].shape) for key in expected if key in weights)
                if weights[key].shape != shape
            ]
            if differing:
                raise ValueError("; ".join(differing))
        except Exception as error:  # safetensors' own exception class is not public
            raise ValueError(f"{path} is damaged or does not fit its config.json: {error}") from None
        model = kinds[name](config, impl=impl, attention=attention, recompute=recompute)
        try:
            model.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit its config.json: {error}") from None
        return model.eval()
