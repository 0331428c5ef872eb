"""Base class of MAEAST and SSAST: construction, input checks, and saved models.

Letters as in mae_ast.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from .. import ops
from ..devices import send
from ..ops import resolve_impl
from ..ops.attention import check_backend
from ..ops.fbank import fbank
from ..ops.masking import num_visible
from ..ops.packing import TokenCounts, real_tokens
from . import saved
from .config import MAEASTConfig, SSASTConfig
from .layout import TokenLayout
from .pooling import Encoded
from .transformer import RECOMPUTE, ExecConfig, Positions, TransformerStack

Model = TypeVar("Model", bound="PretrainingModel")


def check_lengths(
    lengths: Sequence[int] | Tensor, num_clips: int, max_frames: int, check_values: bool = True
) -> Tensor:
    """Validate frame counts; returns them as (B,) int64, on their device or, from a list, on the CPU.

    Args:
        lengths: (B,) integers: real frames per clip.
        num_clips: Clips B.
        max_frames: Frames T, the largest value allowed.
        check_values: Check the values too. For lengths on a GPU the host then waits for it.

    Raises:
        ValueError: Not integers of that shape, or a value outside 0..T.
    """
    try:
        counts = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths must be integers ({num_clips},), got {lengths!r}") from error
    is_whole = not (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool)
    if counts.shape != (num_clips,) or not is_whole:
        raise ValueError(f"lengths must be integers ({num_clips},), got {counts.dtype} {tuple(counts.shape)}")
    counts = counts.long()  # in a narrow dtype T could overflow
    if check_values and (counts.min() < 0 or counts.max() > max_frames):
        raise ValueError(f"lengths must be between 0 and T={max_frames} frames, got {counts.tolist()}")
    return counts


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's weight, or of its first floating parameter; fp32 if it has none, as when quantised."""
    tensors = getattr(module, "weight", None), *module.parameters()
    return next((x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)


def frame_counts(num_clips: int, max_frames: int, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """Frame counts of the clips as integers; for lengths on a GPU the host waits for it.

    Args:
        num_clips: Clips B.
        max_frames: Frames T.
        lengths: (B,) real frames per clip, validated; None: all T.
    """
    if lengths is None:
        return [max_frames] * num_clips
    return lengths.tolist() if isinstance(lengths, Tensor) else [int(count) for count in lengths]


@functools.lru_cache
def max_token_counts(num_blocks: int, grid_f: int, mask_ratio: float, stride: int) -> tuple[int, int, int]:
    """The most visible, the most predicted, and the most visible and predicted tokens of any clip.

    Args:
        num_blocks: Time blocks of the longest clip, >= 0.
        grid_f: Frequency blocks.
        mask_ratio: Share of a clip's tokens that is masked, in (0, 1).
        stride: Every how many masked tokens one is predicted, >= 1.
    """
    num_tokens = [blocks * grid_f for blocks in range(num_blocks + 1)]
    visible = [num_visible(count, mask_ratio) for count in num_tokens]
    masked = [-(-(total - kept) // stride) for total, kept in zip(num_tokens, visible, strict=True)]
    return max(visible), max(masked), max(v + m for v, m in zip(visible, masked, strict=True))


def _materialize_positions(model: nn.Module, _: Any) -> None:
    """Compute position tables that ``load_state_dict(assign=True)`` left on the meta device."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, Positions) and module.is_computed and module.table.is_meta and device.type != "meta":
            module.materialize(device)


class PretrainingModel(nn.Module, ModelHubMixin, library_name="mae_ast_fast", license="apache-2.0", tags=["audio"]):
    """Base class of the models.

    A subclass defines ``patch_embed``, whose weight's dtype is the dtype of the stream without autocast, ``encoder``,
    ``forward_encoder`` and ``sample_mask``.

    Args:
        config: An instance of ``config_class``.
        impl: "auto", "torch" or "triton": the implementation of the operations.
        attention: "auto" or the name of an attention backend (ops/attention).
        recompute: "none", "gelu" or "layer": what the backward computes again instead of keeping it.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available, or the configuration is of
            another model.
    """

    config_class: ClassVar[type[MAEASTConfig] | type[SSASTConfig]]
    model_type: ClassVar[str]  # in config.json; also the name of the front end of ``fbank``
    num_class_tokens: ClassVar[int] = 0
    config: MAEASTConfig | SSASTConfig
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
        self.register_load_state_dict_post_hook(_materialize_positions)
        self.impl, self.attention, self.recompute = impl, attention, recompute

    @property
    def impl(self) -> str:
        """Implementation of the operations: "auto", "torch" or "triton". The setter checks as the constructor does."""
        return self._impl

    @impl.setter
    def impl(self, impl: str) -> None:
        # Report a missing GPU now to a caller who asked for kernels by name; for all others do not touch CUDA.
        resolve_impl(impl, "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
        self._impl = impl

    @property
    def attention(self) -> str:
        """Attention backend; the setter checks its name. A call checks what it can do on its device and dtype."""
        return self._attention

    @attention.setter
    def attention(self, attention: str) -> None:
        check_backend(attention)
        self._attention = attention

    @property
    def recompute(self) -> str:
        """What the backward computes again: "none", "gelu" or "layer". The setter checks as the constructor does."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        if recompute == "gelu" and self.config.activation_dropout > 0.0:
            rate = self.config.activation_dropout
            raise ValueError(f"recompute='gelu' needs activation_dropout=0, got {rate}: use recompute='layer'")
        self._recompute = recompute

    def features(
        self, waveforms: Tensor | Sequence[Tensor], lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input of ``forward``, from waveforms: log-mel of the model's own front end, passed through ``normalize``.

        Args:
            waveforms: (B, S) mono at 16 kHz, or a list of clips (S,), as ``fbank`` takes them.
            lengths: (B,) samples of each clip; None: all S.

        Returns:
            Features (B, T, 128) on the device of ``waveforms``, and the frames of each clip (B,) int64 on the device of
            ``lengths`` (on the CPU if ``lengths`` is None or a list), like those of ``fbank``.

        Raises:
            ValueError: As ``fbank``.
        """
        log_mel, num_frames = fbank(waveforms, lengths, frontend=self.model_type)
        return self.normalize(log_mel), num_frames

    def normalize(self, features: Tensor) -> Tensor:
        """Log-mel (B, T, F) to the input of ``forward``; unchanged if the model normalises its input itself."""
        return features

    def denormalize(self, features: Tensor) -> Tensor:
        """The inverse of ``normalize``: log-mel of any shape."""
        return features

    @property
    def mean_feature(self) -> float:
        """The input value of ``forward`` that the model's normalisation takes to 0."""
        return 0.0

    def input_stats(self, log_mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, 0-d or (1,), of the normalisation (x - mean) * scale that the model applies to its input.

        Args:
            log_mel: (B, T, F).
            num_frames: (B,) int64 real frames per clip.
        """
        return log_mel.new_zeros(()), log_mel.new_ones(())

    def normalized_patches(
        self,
        log_mel: Tensor,
        layout: TokenLayout,
        cfg: ExecConfig,
        *,
        input_stats: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised patches of the visible tokens (Nv, P), and of the masked ones (M, P), which are the targets.

        Args:
            log_mel: (B, T, F).
            layout: Layout of the batch.
            cfg: Dtype and implementation of this forward pass.
            input_stats: Mean and scale; None: those of the method ``input_stats``.
        """
        mean, scale = self.input_stats(log_mel, layout.num_frames) if input_stats is None else input_stats
        visible, masked = layout.visible, layout.masked
        patches, target = ops.gather_patches(
            log_mel,
            mean,
            scale,
            clip=torch.cat((visible.clip, masked.clip)),
            token=torch.cat((visible.token, masked.token)),
            patch_size=self.config.patch_size,
            dtype=cfg.dtype,
            impl=cfg.impl,
        ).split([len(visible.clip), len(masked.clip)])
        return patches, target.detach()  # targets are data, even if the features are learned

    def forward_encoder(
        self, patches: Tensor, layout: TokenLayout, cfg: ExecConfig, *, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode a batch; see the models."""
        raise NotImplementedError

    def sample_mask(
        self,
        frames: Tensor,
        width: int,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        clip_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Draw the masks of a batch; see the models."""
        raise NotImplementedError

    def _draw_mask(
        self,
        num_frames: Tensor,
        max_frames: int,
        *,
        generator: torch.Generator | None,
        seed: int | Tensor | None,
        clip_ids: Tensor | None,
        epoch: int,
    ) -> Tensor:
        """One mask (B, L) bool, True = masked; the arguments are those of ``sample_mask``."""
        config = self.config
        assert config.masking is not None  # set by the configuration's __post_init__
        # The kernel has only the strategies random and chunk.
        impl = self.impl if config.masking in ops.MASK_KERNEL_STRATEGIES else "torch"
        return ops.sample_mask(
            config.masking,
            config.num_tokens(num_frames),
            config.grid_f,
            config.mask_ratio,
            generator=generator,
            seed=seed,
            clip_ids=clip_ids,
            epoch=epoch,
            max_tokens=config.num_tokens(max_frames),
            impl=impl,
        )

    def encode(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Encode all tokens without a mask, for probing and fine-tuning.

        Args:
            features: (B, T, F), as for ``forward``.
            lengths: (B,) real frames of each clip; None: all T. A clip's last patch is filled up with zeros.
            layer: Last layer to run, counted from 1. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, or a layer that does not exist.
        """
        self._check_layer(layer)
        log_mel, layout = self._unmasked(features, lengths)
        cfg = self._exec_config(features.device)
        with torch.autocast(features.device.type, enabled=False):
            patches, _ = self.normalized_patches(log_mel, layout, cfg)
            x, states = self.forward_encoder(patches, layout, cfg, layer=layer)
        token, grid_f = layout.visible.token, self.config.grid_f
        return Encoded(x, states, packing=layout.visible, time_block=token // grid_f, frequency_block=token % grid_f)

    def _unmasked(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, TokenLayout]:
        """Log-mel (B, T', F) of whole patches, filled up with zeros, and its layout without masked tokens."""
        config = self.config
        num_frames = self._check(features, lengths)
        num_clips, max_frames = features.shape[:2]
        is_real_frame = real_tokens(num_frames, max_frames)[:, :, None]
        log_mel = F.pad(torch.where(is_real_frame, features, 0), (0, 0, 0, -max_frames % config.patch_size[0]))
        # A last time block that is not full counts, unless the model has no position for it.
        max_tokens = min(config.num_tokens(max_frames, count_partial=True), config.num_tokens(self.max_frames))
        host_frames = frame_counts(num_clips, max_frames, lengths)
        host_tokens = [min(config.num_tokens(frames, count_partial=True), max_tokens) for frames in host_frames]
        num_tokens = config.num_tokens(num_frames, count_partial=True).clamp(max=max_tokens)
        real = real_tokens(num_tokens, max_tokens)
        layout = TokenLayout.unmasked(num_frames, real, host_tokens, num_class_tokens=self.num_class_tokens)
        return log_mel, layout

    def _token_layouts(
        self,
        features: Tensor,
        lengths: Tensor | None,
        mask: Tensor | tuple[Tensor, Tensor] | None,
        *,
        generator: torch.Generator | None,
        sizes: TokenCounts | None,
    ) -> list[TokenLayout]:
        """The layout of a batch for each pass; the arguments are checked as ``forward`` describes them."""
        num_frames = self._check(features, lengths, check_values=sizes is None)
        max_frames, is_drawn = features.shape[1], mask is None
        num_tokens, max_tokens = self.config.num_tokens(num_frames), self.config.num_tokens(max_frames)
        if mask is None:
            masks = self.sample_mask(num_frames, max_frames, generator=generator)
        else:
            masks = self._check_masks(mask, num_tokens, max_tokens, check_values=sizes is None)
        real, stride = real_tokens(num_tokens, max_tokens), self._prediction_stride
        layouts = []
        for one_mask in (masks,) if isinstance(masks, Tensor) else masks:
            is_visible, is_masked = real & ~one_mask, real & one_mask
            if stride > 1:
                is_masked &= is_masked.cumsum(1) % stride == 1
            counts = sizes
            if counts is None:
                counts = self.exact_sizes(features, lengths, None if is_drawn else (is_visible, is_masked))
            layouts.append(
                TokenLayout.of(
                    num_frames,
                    is_visible,
                    is_masked,
                    counts,
                    num_class_tokens=self.num_class_tokens,
                    has_gaps=stride > 1,
                )
            )
        return layouts

    def _check_masks(
        self, mask: Any, num_tokens: Tensor, max_tokens: int, check_values: bool
    ) -> Tensor | tuple[Tensor, ...]:
        """The mask of each pass that a caller gave, as ``_check_mask`` returns it."""
        return self._check_mask(mask, num_tokens, max_tokens, check_values)

    @staticmethod
    def _check_mask(mask: Any, num_tokens: Tensor, max_tokens: int, check_values: bool) -> Tensor:
        """Validate a mask; returns it as (B, max_tokens) on the device of ``num_tokens``."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor (B, L), True = masked, got {got}")
        min_tokens = int(num_tokens.max()) if check_values else 0
        if mask.shape[0] != len(num_tokens) or mask.shape[1] < min_tokens:
            raise ValueError(
                f"mask must be ({len(num_tokens)}, L) with L >= {min_tokens}, the longest clip's tokens, got "
                f"{tuple(mask.shape)}"
            )
        return F.pad(send(mask, num_tokens.device)[:, :max_tokens], (0, max(0, max_tokens - mask.shape[1])))

    @property
    def num_layers(self) -> int:
        """Number of layers of the encoder."""
        return len(self.encoder.layers)

    @property
    def max_frames(self) -> int:
        """Largest number of frames T of a batch."""
        raise NotImplementedError

    @property
    def _prediction_stride(self) -> int:
        """Every how many masked tokens of a clip one is predicted, in the current mode."""
        return 1

    def sizes_of(self, lengths: Sequence[int]) -> TokenCounts:
        """Token counts of a batch whose masks ``forward`` draws, in the current mode (see ``prediction_stride``).

        Args:
            lengths: Real frames of each clip, on the host.
        """
        config, stride = self.config, self._prediction_stride
        num_tokens = [config.num_tokens(int(frames)) for frames in lengths]
        visible = [num_visible(count, config.mask_ratio) for count in num_tokens]
        masked = [-(-(total - kept) // stride) for total, kept in zip(num_tokens, visible, strict=True)]
        return TokenCounts.of(visible, masked)

    def largest_sizes(self, num_clips: int, max_frames: int, drawn: bool = True) -> TokenCounts:
        """Token counts that are upper bounds for every batch of at most this size, for any lengths.

        Args:
            num_clips: Clips B.
            max_frames: Frames T.
            drawn: Whether ``sample_mask`` draws the masks. False: a mask may hide any number of tokens.
        """
        config, stride = self.config, self._prediction_stride
        num_blocks, max_tokens = max_frames // config.patch_size[0], config.num_tokens(max_frames)
        visible, masked = max_tokens, -(-max_tokens // stride)
        if drawn:
            visible, masked, max_tokens = max_token_counts(num_blocks, config.grid_f, config.mask_ratio, stride)
        return TokenCounts(
            visible=num_clips * visible,
            masked=num_clips * masked,
            max_visible=visible,
            max_masked=masked,
            max_tokens=max_tokens,
            has_padding_rows=True,
        )

    def num_masked(self, num_frames: Tensor) -> Tensor:
        """Masked tokens (B,) int64 in the losses, under drawn masks, on the device of ``num_frames`` (B,) int64."""
        num_tokens = self.config.num_tokens(num_frames)
        return -(-(num_tokens - num_visible(num_tokens, self.config.mask_ratio)) // self._prediction_stride)

    def num_rows(self, num_frames: Tensor) -> Tensor:
        """Visible tokens and masked ones in the losses (B,), as ``num_masked``."""
        num_tokens = self.config.num_tokens(num_frames)
        if self._prediction_stride == 1:
            return num_tokens
        return num_visible(num_tokens, self.config.mask_ratio) + self.num_masked(num_frames)

    def _exec_config(self, device: torch.device) -> ExecConfig:
        """Resolve dtype and implementation; draw the seed of this forward's dropout if kernels need one."""
        config, dtype = self.config, self._compute_dtype(device)
        impl, _ = resolve_impl(self.impl, device, dtype)
        uses_kernels = impl == "triton" or self.attention == "short"
        rates = config.dropout, config.attention_dropout, config.activation_dropout, config.input_dropout
        needs_seed = self.training and uses_kernels and any(rates)
        seed = ops.draw_seed(device) if needs_seed else None
        return ExecConfig(impl, self.attention, seed, self.recompute, dtype=dtype)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the stream and of the matrix products: autocast's if it is on, otherwise that of the weights."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return weight_dtype(self.patch_embed)

    def exact_sizes(
        self,
        features: Tensor,
        lengths: Sequence[int] | Tensor | None,
        split: tuple[Tensor, Tensor] | None = None,
    ) -> TokenCounts:
        """Token counts of a batch, without padding rows; the host waits for a GPU only if the values are there.

        Args:
            features: (B, T, F).
            lengths: (B,) real frames of each clip; None: all T.
            split: Visible and masked tokens, (B, L) bool each, of masks that ``sample_mask`` did not draw.

        Raises:
            ValueError: No clip has both visible and masked tokens.
        """
        num_clips, max_frames = features.shape[:2]
        if split is None:
            sizes = self.sizes_of(frame_counts(num_clips, max_frames, lengths))
            has_loss = sizes.masked > 0  # a drawn mask leaves one token visible
        else:
            visible, masked = torch.stack(split).sum(2).tolist()
            sizes = TokenCounts.of(visible, masked)
            has_loss = any(v and m for v, m in zip(visible, masked, strict=True))
        if not has_loss:
            kt, kf = self.config.patch_size
            num_frames = frame_counts(num_clips, max_frames, lengths)
            got_masked = "" if split is None else f" and masked tokens {masked}"
            raise ValueError(
                f"no clip has both visible and masked tokens: clips need at least 2 patches of {kt} frames x {kf} "
                f"bins, of which the mask hides some, got frames {num_frames}{got_masked}"
            )
        return sizes

    def _check(self, features: Tensor, lengths: Tensor | None, check_values: bool = True) -> Tensor:
        """Validate features and lengths; returns the frame counts (B,) int64 on the device of ``features``."""
        bins = self.config.num_mel_bins
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[2] != bins:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, T, {bins}), got {got}")
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        num_clips, max_frames = features.shape[:2]
        if num_clips == 0:
            raise ValueError("features has no clips: B is 0")
        if lengths is None:
            return torch.full((num_clips,), max_frames, dtype=torch.long, device=features.device)
        return send(check_lengths(lengths, num_clips, max_frames, check_values), features.device)

    def _check_layer(self, layer: int | None) -> None:
        if layer is not None and (type(layer) is not int or not 1 <= layer <= self.num_layers):
            raise ValueError(f"layer must be an integer in 1..{self.num_layers}, got {layer!r}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **hub: Any) -> str | None:
        """Write model.safetensors and config.json, each atomically: a reader never sees half a file.

        Args:
            save_directory: Folder; it is made if it does not exist.
            **hub: ``push_to_hub`` (default False), ``repo_id`` (default: the folder's name), ``model_card_kwargs``, and
                the other options of ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Returns:
            The URL of the commit if the model was pushed to the Hub, otherwise None.
        """
        folder = Path(save_directory)
        saved.write_model(self, {"model_type": self.model_type, **self.config.to_dict()}, folder)
        if "model_card_kwargs" in hub:  # the mixin is about to upload the folder
            self.generate_model_card(**(hub["model_card_kwargs"] or {})).save(folder / "README.md")
        if hub.pop("push_to_hub", False):
            return self.push_to_hub(hub.pop("repo_id", None) or folder.name, **hub)
        return None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # keywords of its own instead of the mixin's **model_kwargs
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
        """Read a model from a folder of ``save_pretrained``, without a network, or from a Hub repository.

        Called on the base class it reads either model, by the type in config.json.

        Args:
            pretrained_model_name_or_path: Folder or repository name.
            impl: As in the constructor.
            attention: As in the constructor.
            recompute: As in the constructor.
            revision: Branch, tag or commit of the repository; None: its main branch. This and the following arguments
                are those of ``huggingface_hub.hf_hub_download``, and unused for a folder.
            cache_dir: Folder of the download cache; None: the Hub's default.
            force_download: Download again even if the file is in the cache.
            local_files_only: Use the cache only, never the network.
            token: Access token of the Hub; True: the saved one; None: the saved one if there is one.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: A file is missing or damaged, or weights and configuration do not fit; or as the constructor.
        """
        locate = functools.partial(
            saved.locate,
            os.fspath(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        classes = {model.model_type: model for model in (cls.__subclasses__() if cls is PretrainingModel else [cls])}
        model_class, config = saved.read_config(locate(saved.CONFIG), classes)
        build = functools.partial(model_class, config)
        options = {"impl": impl, "attention": attention, "recompute": recompute}
        return saved.read_model(locate(saved.WEIGHTS), config, build, **options)
