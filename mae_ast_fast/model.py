"""MAE-AST: a deep encoder over the visible tokens, a shallow decoder over all of them, two losses (arXiv 2203.16691).

Letters: B clips, T frames, F mel bins, L tokens a clip, N packed rows, D width, P values a patch, H heads. Between the
spectrogram and the losses everything is packed: rows of all clips one after another, nothing padded, nothing cropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import ops
from .atomic import write_whole
from .attention import check_backend
from .config import MAEASTConfig
from .masking import num_visible
from .ops import resolve_impl
from .packing import Packing, Sizes, real_tokens
from .transformer import RECOMPUTE, SITES, Execution, Positions, Stack, linear

MAX_TOKENS = 48_000  # the paper's position table; 16 minutes of audio for both models


@dataclass
class MAEASTOutput:
    """Losses and predictions of one batch. Rows run clip by clip, tokens ascending; sum M is their number.

    Where forward was given sizes rounded up, so many rows: those past sum M belong to no clip and mean nothing.

    Attributes:
        loss: Weighted total, a scalar; means over all masked tokens of the batch.
        loss_reconstruction: Mean squared error, unweighted; 0 where that objective is off.
        loss_classification: InfoNCE, unweighted; 0 where that objective is off.
        accuracy: Share of masked rows whose largest product is with their own target; 0 where InfoNCE is off.
        loss_per_clip: (B,) weighted total of each clip; 0 for a clip without visible or without masked tokens.
        pred_reconstruction: (sum M, P).
        pred_classification: (sum M, P).
        target: (sum M, P) normalised patches.
        mask: (B, L) bool, True = masked, as used: False past a clip's tokens.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    loss_per_clip: Tensor
    pred_reconstruction: Tensor
    pred_classification: Tensor
    target: Tensor
    mask: Tensor


@dataclass
class Features:
    """Encoder features of a batch; rows past ``lengths`` are exactly 0.

    Attributes:
        last_hidden_state: (B, L, D), output of the stack, or of the layer that was asked for.
        hidden_states: one (B, L, D) a layer, the first layer's first.
        lengths: (B,) int64 tokens of each clip.
    """

    last_hidden_state: Tensor
    hidden_states: list[Tensor]
    lengths: Tensor


class InputNorm(nn.Module):
    """Batch normalisation of the whole spectrogram as one channel, without affine, times 0.5.

    In training the statistics are those of the batch's real frames (the paper's code counts padded frames too); in
    evaluation the running ones, kept with momentum 0.1 and the unbiased variance. eps 1e-5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale such that (x - mean) * scale is normalised, for (B, T, F) features and (B,) frame counts."""
        if not self.training:
            return self.running_mean, 0.5 * (self.running_var + 1e-5).rsqrt()
        with torch.no_grad():
            dtype = torch.promote_types(features.dtype, torch.float32)
            valid = real_tokens(frames, features.shape[1])[:, :, None]
            total = frames.sum() * features.shape[2]
            count = total.clamp(min=1).to(dtype)
            mean = torch.where(valid, features, 0).sum(dtype=dtype) / count
            variance = torch.where(valid, features - mean, 0).square().sum(dtype=dtype) / count
            unbiased = variance * count / (count - 1).clamp(min=1)
            learned = (total > 0).to(dtype)  # a batch without a single frame teaches nothing
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), (0.1 * learned).to(self.running_mean.dtype))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), (0.1 * learned).to(self.running_var.dtype))
            self.num_batches_tracked += total > 0
            return mean, 0.5 * (variance + 1e-5).rsqrt()


class MAEAST(nn.Module, ModelHubMixin, library_name="mae_ast_fast", license="apache-2.0", tags=["audio"]):
    """Masked autoencoding audio spectrogram transformer.

    Args:
        config: Sizes, masking and loss weights.
        impl: "auto", "torch" or "triton": which implementation of the operations runs. What has no kernel runs as
            plain PyTorch in either: matrix products, the residual connections of pre-norm layers, and mask sampling
            other than random and chunk.
        attention: "auto" or the name of an attention backend (attention.py).
        recompute: What the backward computes again instead of keeping it: "none", "gelu" (the output of the GELU, a
            fourth of a layer's memory) or "layer" (all inside a layer). Same results.

    Raises:
        ValueError: ``impl``, ``attention`` or ``recompute`` is unknown or not available.
    """

    def __init__(
        self, config: MAEASTConfig, impl: str = "auto", attention: str = "auto", recompute: str = "none"
    ) -> None:
        super().__init__()
        if not isinstance(config, MAEASTConfig):
            raise ValueError(f"config must be a MAEASTConfig, got {type(config).__name__}")
        # Only who asks for kernels by name is told at once that there is no GPU for them; nobody else touches CUDA.
        resolve_impl(impl, "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
        check_backend(attention)  # what the backend can do shows on the device and dtype of a call
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        if recompute == "gelu" and config.activation_dropout > 0.0:
            raise ValueError(
                f"recompute='gelu' needs activation_dropout=0, got {config.activation_dropout}: use recompute='layer'"
            )
        self.config, self.impl, self.attention, self.recompute = config, impl, attention, recompute
        width, decoder_width = config.embed_dim, config.decoder_embed_dim
        self.input_norm = InputNorm()
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.encoder_positions = Positions(width)
        self.encoder = Stack(width, config.encoder_layers, config.encoder_layerdrop, config, SITES)
        if config.decoder_layers:
            self.encoder_projection = nn.Linear(width, decoder_width) if config.has_projection else None
            self.mask_token = nn.Parameter(torch.rand(decoder_width))
            self.decoder_positions = Positions(decoder_width)
            site = SITES * (1 + config.encoder_layers)
            self.decoder = Stack(decoder_width, config.decoder_layers, config.decoder_layerdrop, config, site)
            self.head = nn.Linear(decoder_width, 2 * config.patch_dim)  # reconstruction, then classification

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        sizes: Sizes | None = None,
    ) -> MAEASTOutput:
        """Masked pretraining losses (paper, section 2).

        On a GPU the host waits for nothing where it knows the sizes of the batch: ``lengths`` is None or lies on the
        CPU and the mask is drawn here, or ``sizes`` is given.

        Args:
            features: (B, T, F) log-mel, not normalised.
            lengths: (B,) real frames of each clip; None: all T. A clip's whole patches count, its tail frames do not.
            mask: (B, L) bool, True = masked, L at least the longest clip's tokens; entries past a clip's tokens are
                ignored, and clips may hide different counts. None draws one by ``config.masking``.
            generator: Source of that draw; None is torch's default.
            sizes: Of ``sizes_of``, or ``sizes_of(...).bucket()``: then neither ``lengths`` nor ``mask`` is read on
                the host, all shapes follow from ``features`` and ``sizes``, and ``torch.compile`` and CUDA graphs take
                any batch that fits.

        Raises:
            ValueError: Inputs of the wrong shape or dtype; no clip has both visible and masked tokens (not looked for
                with ``sizes``: the losses are 0 then); an encoder alone (``decoder_layers=0``).
        """
        config = self.config
        if config.decoder_layers == 0:
            raise ValueError("this model is an encoder alone (decoder_layers=0): it extracts features, no losses")
        frames = self._check(features, lengths, values=sizes is None)
        tokens = frames // config.patch_size[0] * config.grid_f
        width = features.shape[1] // config.patch_size[0] * config.grid_f
        drawn = mask is None
        if drawn:
            mask = self.sample_mask(frames, features.shape[1], generator=generator)
        else:
            mask = self._check_mask(mask, tokens, width, values=sizes is None)
        real = real_tokens(tokens, width)
        seen, hidden = real & ~mask, real & mask
        if sizes is None:
            sizes = self._sizes(features, lengths, None if drawn else (seen, hidden))
        rows = sizes.visible + sizes.masked
        every = Packing.of(real, rows, sizes.most_tokens, sizes.exact)
        visible = Packing.of(seen, sizes.visible, sizes.most_visible, sizes.exact)
        masked = Packing.of(hidden, sizes.masked, sizes.most_masked, sizes.exact)

        mean, scale = self.input_norm(features, frames)
        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            clip, token = torch.cat((visible.clip, masked.clip)), torch.cat((visible.token, masked.token))
            gathered = ops.gather_patches(
                features, mean, scale, clip, token, config.patch_size, dtype=dtype, impl=run.impl
            )
            patches, target = gathered.split([len(visible.clip), len(masked.clip)])
            target = target.detach()  # what is to be predicted is data, also where features are learned
            x = self._encode(patches, visible, width, run)[0]
            if self.encoder_projection is not None:
                x = linear(x, self.encoder_projection)
            x = self._decode(x, mask, every, masked, run)
            predictions = linear(x, self.head).split(config.patch_dim, dim=1)
            return self._losses(*predictions, target, mask, visible, masked, run)

    def _losses(
        self,
        reconstruction: Tensor,
        classification: Tensor,
        target: Tensor,
        mask: Tensor,
        visible: Packing,
        rows: Packing,
        run: Execution,
    ) -> MAEASTOutput:
        config = self.config
        used = (visible.counts > 0) & (rows.counts > 0)  # (B,), whether a clip adds to the losses
        dtype = torch.promote_types(torch.promote_types(target.dtype, reconstruction.dtype), torch.float32)
        weight = (used[rows.clip] & rows.valid).to(dtype)  # (N,): 0 where a clip adds none
        off = weight.new_zeros(weight.shape)
        mse = nce = hit = off
        if config.reconstruction_weight > 0.0:
            mse = ops.masked_mse(reconstruction, target, config.norm_pix_loss, impl=run.impl) * weight
        if config.classification_weight > 0.0:
            nce, hit = ops.info_nce(classification, target, rows.cu_seqlens, rows.max_seqlen, impl=run.impl)
            nce, hit = torch.where(weight > 0, nce, 0), hit * weight  # of a clip without masked tokens it is undefined
        count = weight.sum().clamp(min=1)
        total = config.reconstruction_weight * mse + config.classification_weight * nce
        per_clip = off.new_zeros(used.shape[0]).index_add(0, rows.clip, total) / rows.counts.clamp(min=1)
        return MAEASTOutput(
            loss=total.sum() / count,
            loss_reconstruction=mse.sum() / count,
            loss_classification=nce.sum() / count,
            accuracy=hit.sum() / count,
            loss_per_clip=per_clip,
            pred_reconstruction=reconstruction,
            pred_classification=classification,
            target=target,
            mask=mask,
        )

    def extract_features(self, features: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Features:
        """Encoder features of all tokens, nothing masked (paper, section 4).

        A clip has ceil(frames / kt) * (F // kf) tokens whatever it is batched with; frames past its length count as
        0.0 before normalisation.

        Args:
            features: (B, T, F) log-mel, not normalised.
            lengths: (B,) real frames of each clip; None: all T.
            layer: Stop after this layer, counted from 1; its output is returned as it is. None: the whole encoder.

        Raises:
            ValueError: Inputs of the wrong shape or dtype, a layer that does not exist, more than 48,000 tokens.
        """
        config = self.config
        if layer is not None and (type(layer) is not int or not 1 <= layer <= config.encoder_layers):
            raise ValueError(f"layer must be an integer in 1..{config.encoder_layers}, got {layer!r}")
        frames = self._check(features, lengths)
        kt = config.patch_size[0]
        valid = real_tokens(frames, features.shape[1])[:, :, None]
        features = F.pad(torch.where(valid, features, 0), (0, 0, 0, -features.shape[1] % kt))
        tokens = (frames + kt - 1) // kt * config.grid_f
        width = features.shape[1] // kt * config.grid_f
        every = Packing.of(real_tokens(tokens, width))
        mean, scale = self.input_norm(features, frames)
        dtype = self._compute_dtype(features.device)
        run = self._execution(features.device, dtype)
        with torch.autocast(features.device.type, enabled=False):
            rows = every.clip, every.token, config.patch_size
            patches = ops.gather_patches(features, mean, scale, *rows, dtype=dtype, impl=run.impl)
            _, states = out = self._encode(patches, every, width, run, layer)

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(len(frames), width, x.shape[1]).index_put((every.clip, every.token), x)

        return Features(unpack(out[0]), [unpack(state) for state in states], tokens)

    def _encode(
        self, patches: Tensor, rows: Packing, width: int, run: Execution, layer: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Normalised patches (N, P) of clips of at most ``width`` tokens -> output (N, D), and that of every layer."""
        config, entrance = self.config, self.encoder.norm
        positions = self.encoder_positions(width)[rows.token].to(patches.dtype)
        if config.norm_first:
            x = F.dropout(linear(patches, self.patch_embed), config.input_dropout, self.training) + positions
        else:
            x = F.linear(patches, self.patch_embed.weight.to(patches.dtype))
            drop = config.input_dropout if self.training else 0.0
            parameters = entrance.weight, entrance.bias, self.patch_embed.bias
            x = ops.add_layer_norm(x, positions, *parameters, drop, run.seed, 0, impl=run.impl)
        return self.encoder(F.dropout(x, config.dropout, self.training), rows, run, layer)

    def _decode(self, visible: Tensor, mask: Tensor, every: Packing, masked: Packing, run: Execution) -> Tensor:
        """Encoded visible tokens (Nv, D) -> decoder output of the masked tokens (M, D)."""
        hidden = mask[every.clip, every.token]
        hidden = hidden | ~every.valid  # a row of no clip gets the mask token, and takes no gradient
        inverse = torch.where(hidden, -1, (~hidden).cumsum(0) - 1)
        table, entrance = self.decoder_positions(mask.shape[1]), self.decoder.norm
        norm = (None, None) if self.config.norm_first else (entrance.weight, entrance.bias)
        drop = self.config.dropout if self.training else 0.0
        place = self.mask_token, table, every.token, inverse
        x = ops.scatter_tokens(visible, *place, *norm, drop, run.seed, 1, run.impl)
        place = every.cu_seqlens[masked.clip] + masked.token  # a clip's row numbers are its token indices
        only = masked, torch.where(masked.valid, place, len(every.clip))
        return self.decoder(x, every, run, only=only)[0]

    def _execution(self, device: torch.device, dtype: torch.dtype) -> Execution:
        """Resolves the implementation, and draws the seed of this forward's dropout where kernels need one."""
        config = self.config
        impl, _ = resolve_impl(self.impl, device, dtype)
        kernels = impl == "triton" or self.attention == "short"
        rates = config.dropout, config.attention_dropout, config.activation_dropout, config.input_dropout
        drop = self.training and kernels and any(rates)
        seed = ops.draw_seed(device) if drop else None
        return Execution(impl, self.attention, seed, self.recompute)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the stream and of the matrix products: autocast's where it is on, else that of the weights."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.patch_embed.weight.dtype

    def sample_mask(
        self,
        frames: Tensor,
        width: int,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        clip_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Draws the masks of a batch by ``config.masking``: (B, L) bool, True = masked; see ``masking.sample_mask``.

        Args:
            frames: (B,) int64 real frames of each clip.
            width: Frames T of the batch.
            generator: This and the following as in ``masking.sample_mask``.
            seed: Excludes ``generator``.
            clip_ids: (B,) int64.
            epoch: Number of the pass over the data.
        """
        config = self.config
        kt, grid_f = config.patch_size[0], config.grid_f
        # The kernel knows the strategies random and chunk alone.
        impl = self.impl if config.masking in ops.MASK_KERNEL_STRATEGIES else "torch"
        draw = config.masking, frames // kt * grid_f, grid_f, config.mask_ratio, generator, seed, clip_ids, epoch
        return ops.sample_mask(*draw, max_tokens=width // kt * grid_f, impl=impl)

    def sizes_of(self, lengths: Sequence[int]) -> Sizes:
        """The sizes of a batch whose masks ``forward`` draws.

        Args:
            lengths: Real frames of each clip, on the host.
        """
        config = self.config
        tokens = [int(frames) // config.patch_size[0] * config.grid_f for frames in lengths]
        visible = [num_visible(count, config.mask_ratio) for count in tokens]
        return Sizes.of(visible, [count - v for count, v in zip(tokens, visible, strict=True)])

    def _sizes(self, features: Tensor, lengths: Tensor | None, given: tuple[Tensor, Tensor] | None) -> Sizes:
        """Exact sizes; the host waits for a GPU only where it cannot know them.

        Args:
            features: (B, T, F).
            lengths: (B,) real frames.
            given: Visible and masked tokens, (B, L) bool each, where the mask was not drawn here.
        """
        frames = [features.shape[1]] * features.shape[0] if lengths is None else lengths
        if given is None:
            sizes = self.sizes_of(frames if isinstance(frames, list) else torch.as_tensor(frames).tolist())
            alive = sizes.masked > 0  # a drawn mask leaves one token visible
        else:
            visible, masked = torch.stack(given).sum(2).tolist()
            sizes = Sizes.of(visible, masked)
            alive = any(v and m for v, m in zip(visible, masked, strict=True))
        if not alive:
            kt, kf = self.config.patch_size
            frames = frames if isinstance(frames, list) else torch.as_tensor(frames).tolist()
            hidden = "" if given is None else f" and masked tokens {masked}"
            raise ValueError(
                f"no clip has both visible and masked tokens: clips need at least 2 patches of {kt} frames x {kf} "
                f"bins, of which the mask hides some, got frames {frames}{hidden}"
            )
        return sizes

    def _check(self, features: Tensor, lengths: Tensor | None, values: bool = True) -> Tensor:
        """Validates the input of forward and extract_features; returns the frame counts (B,) int64."""
        bins = self.config.num_mel_bins
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[2] != bins:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, T, {bins}), got {got}")
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        batch, width = features.shape[:2]
        if batch == 0:
            raise ValueError("features has no clips: B is 0")
        tokens = -(-width // self.config.patch_size[0]) * self.config.grid_f
        if tokens > MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS} tokens a clip, got {tokens}: cut long recordings into chunks")
        if lengths is None:
            return torch.full((batch,), width, dtype=torch.long, device=features.device)
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"lengths must be integers ({batch},), got {lengths!r}") from error
        is_whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (batch,) or not is_whole:
            raise ValueError(f"lengths must be integers ({batch},), got {lengths.dtype} {tuple(lengths.shape)}")
        if values and (lengths.min() < 0 or lengths.max() > width):
            raise ValueError(f"lengths must be between 0 and T={width} frames, got {lengths.tolist()}")
        on_gpu = features.device.type == "cuda"  # a copy to the GPU must not wait; one from it must
        return lengths.to(features.device, torch.long, non_blocking=on_gpu)

    def _check_mask(self, mask: Tensor, tokens: Tensor, width: int, values: bool) -> Tensor:
        """Validates a mask; returns it as (B, width), False past each clip's tokens."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor (B, L), True = masked, got {got}")
        longest = int(tokens.max()) if values else 0
        if mask.shape[0] != len(tokens) or mask.shape[1] < longest:
            raise ValueError(
                f"mask must be ({len(tokens)}, L) with L >= {longest}, the longest clip's tokens, got "
                f"{tuple(mask.shape)}"
            )
        mask = F.pad(mask.to(tokens.device)[:, :width], (0, max(0, width - mask.shape[1])))
        return mask & real_tokens(tokens, width)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **hub: Any) -> str | None:
        """Writes model.safetensors and config.json, each in one step: a reader never sees half a file.

        Args:
            save_directory: Folder, made where it does not exist.
            **hub: ``push_to_hub``, ``repo_id`` and what else ``huggingface_hub.ModelHubMixin`` takes.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        config = json.dumps({"model_type": "mae_ast", **self.config.to_dict()}, indent=2) + "\n"
        write_whole(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        write_whole(folder / "config.json", lambda path: path.write_text(config))
        if "model_card_kwargs" in hub:  # the mixin is about to upload the folder
            self.generate_model_card(**(hub["model_card_kwargs"] or {})).save(folder / "README.md")
        if hub.pop("push_to_hub", False):
            return self.push_to_hub(hub.pop("repo_id", None) or folder.name, **hub)
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        impl: str = "auto",
        attention: str = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> MAEAST:
        """Reads a folder that ``save_pretrained`` wrote, without a network, or a Hub repository; in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder or repository name.
            impl: As in the constructor.
            attention: As in the constructor.
            revision: This and the following as ``huggingface_hub.hf_hub_download`` takes them; unused for a folder.
            cache_dir: Where downloads are kept.
            force_download: Download again.
            local_files_only: Never download.
            token: Of the Hub.

        Raises:
            ValueError: A file is missing or damaged, or weights and configuration do not fit.
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

        path = locate("config.json")
        try:
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, got {type(fields).__name__}")
            if (kind := fields.pop("model_type", None)) != "mae_ast":
                raise ValueError(f"expected model_type 'mae_ast', got {kind!r}")
            config = MAEASTConfig.from_dict(fields)
        except ValueError as error:  # that of the JSON reader among them
            raise ValueError(f"{path} is no configuration of MAE-AST: {error}") from None
        model = cls(config, impl=impl, attention=attention)
        path = locate("model.safetensors")
        try:
            model.load_state_dict(load_file(path))
        except Exception as error:  # safetensors' own exception class is not public
            raise ValueError(f"{path} is damaged or does not fit its config.json: {error}") from None
        return model.eval()

    @classmethod
    def from_fairseq_state_dict(cls, state_dict: dict[str, Tensor], cfg: dict[str, Any], **init: Any) -> MAEAST:
        """A model from the weights and options of the paper's own code (an fairseq checkpoint's ``model``, ``cfg``).

        Args:
            state_dict: Official parameter names to tensors.
            cfg: Official options: nested (``cfg["model"]`` and so on), flat, or with ``cfg/model/`` prefixes.
            **init: ``impl`` and ``attention``.

        Raises:
            ValueError: Missing or unexpected weights, all listed; an option that MAE-AST does not have.
        """
        from .fairseq import convert_state_dict, fairseq_config

        config = fairseq_config(cfg)
        model = cls(config, **init)
        model.load_state_dict(convert_state_dict(state_dict, config))
        return model.eval()
