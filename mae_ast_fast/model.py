"""MAE-AST: a deep encoder over the visible tokens, a shallow decoder over all of them, two losses (arXiv 2203.16691).

Letters: B clips, T frames, F mel bins, L tokens a clip, N packed rows, D width, P values a patch, H heads. Between the
spectrogram and the losses everything is packed: rows of all clips one after another, nothing padded, nothing cropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import reference
from .attention import attention, choose_backend
from .config import MAEASTConfig
from .masking import sample_mask
from .packing import Packing, real_tokens, sinusoid

MAX_TOKENS = 48_000  # the paper's position table; 16 minutes of audio for both models


@dataclass
class MAEASTOutput:
    """Losses and predictions of one batch. Rows run clip by clip, tokens ascending; sum M is their number.

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


def resolve_impl(impl: str, device: torch.device | str) -> tuple[str, str]:
    """The implementation that ``impl`` ("auto", "torch" or "triton") stands for on a device, and the reason in words.

    Raises:
        ValueError: An unknown name, or an implementation that is not available.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be one of auto, torch, triton, got {impl!r}")
    if impl == "triton":
        raise ValueError("impl='triton' is not available: this version has no Triton kernel yet; use impl='torch'")
    return "torch", "asked for by name" if impl == "torch" else f"no Triton kernel exists yet ({device})"


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A Linear in the dtype of ``x``: the weights stay in their own (fp32 master weights, bf16 stream)."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


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


class Positions(nn.Module):
    """Fixed sinusoidal positions by token index.

    The table is computed, and kept out of checkpoints, unless one was loaded: the paper's fp16 runs carry a rounded
    table, and features only match with that one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("table", sinusoid(2048, dim), persistent=False)

    def forward(self, token: Tensor, num_tokens: int) -> Tensor:
        """Rows (N, D) of the table for token indices (N,), all below ``num_tokens``."""
        known = self.table.shape[0]
        if num_tokens > known:
            longer = sinusoid(num_tokens, self.dim, self.table.device).to(self.table.dtype)
            self.table = torch.cat((self.table, longer[known:]))
        return self.table[token]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (table := state_dict.get(prefix + "table")) is not None:
            if table.dim() != 2 or table.shape[1] != self.dim:
                raise ValueError(f"{prefix}table must be (tokens, {self.dim}), got {tuple(table.shape)}")
            self.register_buffer("table", torch.empty_like(table, device=self.table.device), persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Layer(nn.Module):
    """Transformer layer over packed rows: attention inside each clip, feed-forward with exact GELU."""

    def __init__(self, dim: int, config: MAEASTConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attn_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rows: Packing, backend: str) -> Tensor:
        """(N, D) -> (N, D)."""
        drop = self.config.dropout if self.training else 0.0
        if self.config.norm_first:
            x = x + F.dropout(self.attend(norm(x, self.attn_norm), rows, backend), drop, self.training)
            return x + F.dropout(self.feed_forward(norm(x, self.ffn_norm)), drop, self.training)
        attended = self.attend(x, rows, backend)
        x = reference.add_layer_norm(attended, x, self.attn_norm.weight, self.attn_norm.bias, drop)
        return reference.add_layer_norm(self.feed_forward(x), x, self.ffn_norm.weight, self.ffn_norm.bias, drop)

    def attend(self, x: Tensor, rows: Packing, backend: str) -> Tensor:
        """Self-attention and its output projection."""
        qkv = linear(x, self.qkv).unflatten(1, (3, self.config.num_heads, -1))
        drop = self.config.attention_dropout if self.training else 0.0
        return linear(attention(qkv, rows.cu_seqlens, rows.max_seqlen, drop, backend).flatten(1), self.out_proj)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Linear, GELU, Linear."""
        drop = self.config.activation_dropout if self.training else 0.0
        hidden = F.linear(x, self.fc1.weight.to(x.dtype))
        return linear(reference.bias_gelu(hidden, self.fc1.bias.to(x.dtype), drop), self.fc2)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """LayerNorm with fp32 statistics in the dtype of ``x``."""
    return reference.layer_norm(x, layer.weight, layer.bias)


class Stack(nn.Module):
    """Transformer stack. Post-norm: LayerNorm before the first layer; pre-norm: after the last."""

    def __init__(self, dim: int, num_layers: int, layerdrop: float, config: MAEASTConfig) -> None:
        super().__init__()
        self.layerdrop, self.dropout, self.norm_first = layerdrop, config.dropout, config.norm_first
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Layer(dim, config) for _ in range(num_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, rows: Packing, backend: str, layer: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output (N, D) and the output of each layer; with ``layer`` (from 1) both end at that layer."""
        if not self.norm_first:
            x = norm(x, self.norm)
        x = F.dropout(x, self.dropout, self.training)
        states = []
        for block in self.layers[:layer]:
            y = block(x, rows, backend)
            if self.training and self.layerdrop > 0.0:
                # A select, not a branch: every parameter is always used, and nothing waits for the device.
                y = torch.where(torch.rand((), device=x.device) < self.layerdrop, x, y)
            x = y
            states.append(x)
        if self.norm_first and layer is None:
            x = norm(x, self.norm)
        return x, states


class MAEAST(nn.Module, ModelHubMixin, library_name="mae_ast_fast", license="apache-2.0", tags=["audio"]):
    """Masked autoencoding audio spectrogram transformer.

    Args:
        config: Sizes, masking and loss weights.
        impl: "auto", "torch" or "triton": which implementation of the operations runs.
        attention: "auto" or the name of an attention backend (attention.py).

    Raises:
        ValueError: ``impl`` or ``attention`` is unknown or not available.
    """

    def __init__(self, config: MAEASTConfig, impl: str = "auto", attention: str = "auto") -> None:
        super().__init__()
        if not isinstance(config, MAEASTConfig):
            raise ValueError(f"config must be a MAEASTConfig, got {type(config).__name__}")
        resolve_impl(impl, "cpu")
        choose_backend(attention, "cpu")
        self.config, self.impl, self.attention = config, impl, attention
        width, decoder_width = config.embed_dim, config.decoder_embed_dim
        self.input_norm = InputNorm()
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.encoder_positions = Positions(width)
        self.encoder = Stack(width, config.encoder_layers, config.encoder_layerdrop, config)
        if config.decoder_layers:
            self.encoder_projection = nn.Linear(width, decoder_width) if config.has_projection else None
            self.mask_token = nn.Parameter(torch.rand(decoder_width))
            self.decoder_positions = Positions(decoder_width)
            self.decoder = Stack(decoder_width, config.decoder_layers, config.decoder_layerdrop, config)
            self.head = nn.Linear(decoder_width, 2 * config.patch_dim)  # reconstruction, then classification

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEASTOutput:
        """Masked pretraining losses (paper, section 2).

        Args:
            features: (B, T, F) log-mel, not normalised.
            lengths: (B,) real frames of each clip; None: all T. A clip's whole patches count, its tail frames do not.
            mask: (B, L) bool, True = masked, L at least the longest clip's tokens; entries past a clip's tokens are
                ignored, and clips may hide different counts. None draws one by ``config.masking``.
            generator: Source of that draw; None is torch's default.

        Raises:
            ValueError: Inputs of the wrong shape or dtype; no clip has both visible and masked tokens; an encoder
                alone (``decoder_layers=0``).
        """
        config = self.config
        if config.decoder_layers == 0:
            raise ValueError("this model is an encoder alone (decoder_layers=0): it extracts features, no losses")
        frames = self._check(features, lengths)
        tokens = frames // config.patch_size[0] * config.grid_f
        width = features.shape[1] // config.patch_size[0] * config.grid_f
        if mask is None:
            mask = sample_mask(
                config.masking, tokens, config.grid_f, config.mask_ratio, generator=generator, max_tokens=width
            )
        mask = self._check_mask(mask, tokens, width)
        real = real_tokens(tokens, width)
        every, visible, masked = Packing.of(real), Packing.of(real & ~mask), Packing.of(real & mask)
        contributes = (visible.counts > 0) & (masked.counts > 0)
        if not contributes.any():
            raise ValueError(
                "no clip has both visible and masked tokens: clips need at least 2 patches of "
                f"{config.patch_size[0]} frames x {config.patch_size[1]} bins, of which the mask hides some, got "
                f"frames {frames.tolist()} and masked tokens {masked.counts.tolist()}"
            )

        mean, scale = self.input_norm(features, frames)
        dtype = self._compute_dtype(features.device)
        with torch.autocast(features.device.type, enabled=False):
            gathered = reference.gather_patches(features, mean, scale, visible, config.patch_size)
            target = reference.gather_patches(features, mean, scale, masked, config.patch_size)
            x = self._encode(gathered.to(dtype), visible)[0]
            if self.encoder_projection is not None:
                x = linear(x, self.encoder_projection)
            positions = self.decoder_positions(every.token, width).to(dtype)
            is_masked = mask[every.clip, every.token]
            x = reference.scatter_tokens(x, self.mask_token.to(dtype), positions, is_masked)
            x, _ = self.decoder(x, every, self.attention)
            reconstruction, classification = linear(x[is_masked], self.head).split(config.patch_dim, dim=1)
            return self._losses(reconstruction, classification, target, mask, masked, contributes)

    def _losses(
        self, reconstruction: Tensor, classification: Tensor, target: Tensor, mask: Tensor, rows: Packing, used: Tensor
    ) -> MAEASTOutput:
        config = self.config
        dtype = torch.promote_types(torch.promote_types(target.dtype, reconstruction.dtype), torch.float32)
        weight = used[rows.clip].to(dtype)  # (N,): 0 where a clip adds none
        off = weight.new_zeros(weight.shape)
        mse = nce = hit = off
        if config.reconstruction_weight > 0.0:
            mse = reference.masked_mse(reconstruction, target, config.norm_pix_loss) * weight
        if config.classification_weight > 0.0:
            nce, hit = reference.info_nce(classification, target, rows.cu_seqlens, rows.max_seqlen)
            nce, hit = nce * weight, hit * weight
        count = weight.sum()
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
        with torch.autocast(features.device.type, enabled=False):
            patches = reference.gather_patches(features, mean, scale, every, config.patch_size)
            _, states = out = self._encode(patches.to(dtype), every, layer)

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(len(frames), width, x.shape[1]).index_put((every.clip, every.token), x)

        return Features(unpack(out[0]), [unpack(state) for state in states], tokens)

    def _encode(self, patches: Tensor, rows: Packing, layer: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Normalised patches (N, P) -> encoder output (N, D) and the layers' outputs."""
        x = F.dropout(linear(patches, self.patch_embed), self.config.input_dropout, self.training)
        longest = int(rows.token.max()) + 1 if rows.token.numel() else 0
        x = x + self.encoder_positions(rows.token, longest).to(x.dtype)
        return self.encoder(x, rows, self.attention, layer)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the stream and of the matrix products: autocast's where it is on, else that of the weights."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.patch_embed.weight.dtype

    def _check(self, features: Tensor, lengths: Tensor | None) -> Tensor:
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
        resolve_impl(self.impl, features.device)
        if lengths is None:
            return torch.full((batch,), width, dtype=torch.long, device=features.device)
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"lengths must be integers ({batch},), got {lengths!r}") from error
        is_whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (batch,) or not is_whole:
            raise ValueError(f"lengths must be integers ({batch},), got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.min() < 0 or lengths.max() > width:
            raise ValueError(f"lengths must be between 0 and T={width} frames, got {lengths.tolist()}")
        return lengths.to(features.device, torch.long)

    def _check_mask(self, mask: Tensor, tokens: Tensor, width: int) -> Tensor:
        """Validates a mask; returns it as (B, width), False past each clip's tokens."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor (B, L), True = masked, got {got}")
        longest = int(tokens.max())
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
        _replace(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        _replace(folder / "config.json", lambda path: path.write_text(config))
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


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place, then moves it there in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # safetensors makes files that nobody else can read, whatever the umask
    write(partial)
    partial.chmod(mode)
    os.replace(partial, path)
