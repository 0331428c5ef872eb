"""The ops of bench_ops.py: inputs, columns, and the bytes or FLOP that each cannot do without.

Bytes: each input read once and each output written once; ``forward + backward`` adds what the backward reads and writes
by itself, unless one pass can make both. FLOP: of matrix products alone; a backward has twice as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import DEVICE, ON_GPU
from torch import Tensor

from mae_ast_fast import MAEASTConfig, ops
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops import attention, reference
from mae_ast_fast.ops.attention import flash
from mae_ast_fast.ops.masking import sample_mask
from mae_ast_fast.ops.packing import Packing, real_tokens

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZE = DTYPE.itemsize
MIXED = (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 1.6, 2.0)  # lengths of clips, in the mean 1
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """Where an op is measured; ``name`` says what differs from the base point."""

    name: str = "base point"
    preset: str = "patch_base" if ON_GPU else "patch_small"
    clips: int = 256 if ON_GPU else 8
    seconds: float = 10.0
    mixed: bool = False
    dropout: float = 0.0
    over: str = "targets"
    rows: str = "visible"
    sizes: dict[str, Any] = field(default_factory=dict)

    def toy(self) -> Point:
        sizes = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 64, "num_heads": 2}
        return replace(self, clips=2, seconds=2.0, sizes=sizes)


def packed(selected: Tensor) -> Packing:
    """The packing of a selection (B, L) on the CPU, whose sizes the host knows, on the device."""
    rows = Packing.of(selected)
    return replace(rows, clip=rows.clip.to(DEVICE), token=rows.token.to(DEVICE), cu_seqlens=rows.cu_seqlens.to(DEVICE))


class Clips:
    """A batch: log-mel, packings, and noise of any shape."""

    def __init__(self, point: Point) -> None:
        self.config = config = MAEASTConfig.preset(point.preset, **point.sizes)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        lengths = (MIXED if point.mixed else (1.0,)) * point.clips
        self.frames = torch.tensor([int(100 * point.seconds * length) - 2 for length in lengths[: point.clips]])
        self.tokens = self.frames // config.patch_size[0] * config.grid_f
        width = int(self.tokens.max())
        mask = sample_mask(config.masking, self.tokens, config.grid_f, config.mask_ratio, seed=0, max_tokens=width)
        real = real_tokens(self.tokens, width)
        self.mask = mask.to(DEVICE)
        self.visible, self.masked, self.every = map(packed, (real & ~mask, real & mask, real))

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=DEVICE) * scale).to(dtype)

    def parameters(self, *shape: int, scale: float = 1.0) -> Tensor:
        """As the model keeps them, in fp32."""
        return self.randn(*shape, scale=scale, dtype=torch.float32)


@dataclass
class Op:
    """Columns over the same inputs, without dropout.

    Attributes:
        columns: Functions of the inputs, by name.
        inputs: By the names that the functions know them by.
        unit: "bytes" or "FLOP".
        work: What the forward, and forward and backward, cannot do without.
        differentiable: Inputs whose gradients count.
        summed: Those whose gradient sums over rows.
        dot: Whether gradients go through dot products.
    """

    columns: dict[str, Function]
    inputs: dict[str, Tensor]
    unit: str
    work: tuple[int, ...]
    differentiable: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    dot: bool = False


def mean_loss(function: Callable[..., Any]) -> Function:
    """The mean of an op's losses of each row, which is what the original's loops come to."""

    def loss(**inputs: Tensor) -> Tensor:
        found = function(**inputs)
        return (found[0] if isinstance(found, tuple) else found).mean()

    return loss


def gather_patches(point: Point, clips: Clips) -> Op:
    """The visible and the masked patches; no backward, since log-mel has no gradient. Reads and writes each once."""
    size, mask = clips.config.patch_size, clips.mask
    features = clips.randn(len(clips.frames), int(clips.frames.max()), clips.config.num_mel_bins, dtype=torch.float32)
    mean, scale = torch.tensor([-6.0, 0.125], device=DEVICE)
    inputs = {"features": features * 4 - 6, "mean": mean, "scale": scale}
    inputs |= {
        name: torch.cat([getattr(clips.visible, name), getattr(clips.masked, name)]) for name in ("clip", "token")
    }
    real = real_tokens(clips.tokens, mask.shape[1]).to(DEVICE)

    def dtype(features: Tensor) -> torch.dtype:
        return torch.float64 if features.dtype == torch.float64 else DTYPE

    def plain(**x: Tensor) -> Tensor:
        return reference.gather_patches(**x, patch_size=size, dtype=dtype(x["features"]))

    def original(features: Tensor, mean: Tensor, scale: Tensor, clip: Tensor, token: Tensor) -> Tensor:
        patches = F.unfold(((features - mean) * scale)[:, None], size, stride=size).transpose(1, 2)
        visible, target = [], []
        for i in range(len(patches)):
            visible.append(patches[i][real[i] & ~mask[i]])
            target.append(patches[i][mask[i]])
        return torch.cat(visible + target).to(dtype(features))

    kernel = partial(ops.gather_patches, patch_size=size, dtype=DTYPE, impl="triton")
    columns = {"original": original, "reference": plain, "fast": kernel}
    rows = len(inputs["clip"])
    return Op(columns, inputs, "bytes", (rows * (clips.config.patch_dim * (4 + SIZE) + 16),))


def scatter_tokens(point: Point, clips: Clips) -> Op:
    """Decoder input with its LayerNorm. Forward: visible rows, indices and table in, all rows out; backward: the rows'
    gradients, visible rows, indices and table in again, the visible rows' gradients out."""
    every, mask, width = clips.every, clips.mask, clips.config.decoder_embed_dim
    hidden = mask[every.clip, every.token]
    inverse = torch.where(hidden, -1, (~hidden).cumsum(0) - 1)
    tokens = mask.shape[1]
    inputs = {
        "visible": clips.randn(len(clips.visible.clip), width),
        "mask_token": clips.parameters(width),
        "table": sinusoid(tokens, width).to(DEVICE),
        "token": every.token,
        "inverse": inverse,
        "weight": clips.parameters(width) + 1,
        "bias": clips.parameters(width),
    }
    real, counts = real_tokens(clips.tokens, tokens).to(DEVICE), clips.visible.counts.tolist()

    def original(
        visible: Tensor, mask_token: Tensor, table: Tensor, weight: Tensor, bias: Tensor, **_: Tensor
    ) -> Tensor:
        sequences = []
        for i, rows in enumerate(visible.split(counts)):
            sequence = mask_token.to(visible.dtype).repeat(tokens, 1)
            sequence[real[i] & ~mask[i]] = rows
            sequences.append((sequence + table.to(visible.dtype))[: int(clips.tokens[i])])
        return reference.layer_norm(torch.cat(sequences), weight, bias)

    kernel = partial(ops.scatter_tokens, impl="triton")
    rows, seen = len(every.clip) * width * SIZE, len(clips.visible.clip) * width * SIZE
    forward = rows + seen + 16 * len(every.clip) + 4 * tokens * width
    columns = {"original": original, "reference": reference.scatter_tokens, "fast": kernel}
    vectors = ("mask_token", "weight", "bias")
    return Op(columns, inputs, "bytes", (forward, 2 * forward + seen), ("visible", *vectors), vectors)


def add_layer_norm(point: Point, clips: Clips) -> Op:
    """In the decoder. Forward: two tensors in, one out; backward: its gradient and both in again, two gradients out."""
    rows, width = len(clips.every.clip), clips.config.decoder_embed_dim
    vectors = {name: clips.parameters(width) for name in ("weight", "bias", "branch_bias")}
    inputs = {"branch": clips.randn(rows, width), "residual": clips.randn(rows, width), **vectors}
    columns = {"reference": reference.add_layer_norm, "fast": partial(ops.add_layer_norm, impl="triton")}
    one = rows * width * SIZE
    return Op(columns, inputs, "bytes", (3 * one, 8 * one), tuple(inputs), tuple(vectors))


def bias_gelu(point: Point, clips: Clips) -> Op:
    """In the decoder. Forward: one tensor in, one out; backward: its gradient and the input in, one gradient out."""
    rows, width = len(clips.every.clip), clips.config.ffn_dim
    inputs = {"x": clips.randn(rows, width), "bias": clips.parameters(width)}
    columns = {"reference": reference.bias_gelu, "fast": partial(ops.bias_gelu, impl="triton")}
    one = rows * width * SIZE
    return Op(columns, inputs, "bytes", (2 * one, 5 * one), ("x", "bias"), ("bias",))


def feed_forward(point: Point, clips: Clips) -> Op:
    """In the decoder: two products forward, four backward."""
    rows, width, inner = len(clips.every.clip), clips.config.decoder_embed_dim, clips.config.ffn_dim
    inputs = {
        "x": clips.randn(rows, width),
        "w1": clips.parameters(inner, width, scale=width**-0.5),
        "b1": clips.parameters(inner),
        "w2": clips.parameters(width, inner, scale=inner**-0.5),
    }
    flop = 4 * rows * width * inner
    columns = {"reference": reference.feed_forward, "fast": partial(ops.feed_forward, impl="triton")}
    return Op(columns, inputs, "FLOP", (flop, 3 * flop), tuple(inputs), ("w1", "b1", "w2"), dot=True)


def _losses(clips: Clips, scale: float) -> tuple[dict[str, Tensor], list[int], int]:
    rows, width = len(clips.masked.clip), clips.config.patch_dim
    inputs = {"prediction": clips.randn(rows, width, scale=scale), "target": clips.randn(rows, width)}
    return inputs, clips.masked.counts.tolist(), width


def masked_mse(point: Point, clips: Clips) -> Op:
    """Both tensors in; the backward writes one gradient, which one pass over them can make too."""
    inputs, counts, width = _losses(clips, 1.0)

    def original(prediction: Tensor, target: Tensor) -> Tensor:
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return F.mse_loss(prediction.to(wide), target.to(wide))

    kernel = mean_loss(partial(ops.masked_mse, impl="triton"))
    moved = sum(counts) * width * SIZE
    columns = {"original": original, "reference": mean_loss(reference.masked_mse), "fast": kernel}
    return Op(columns, inputs, "bytes", (2 * moved, 3 * moved), ("prediction",))


def info_nce(point: Point, clips: Clips) -> Op:
    """One product of a clip's rows forward, one backward (targets get no gradient)."""
    inputs, counts, width = _losses(clips, 0.1)  # of lengths that differ the original is a loop over clips
    rows = {"cu_seqlens": clips.masked.cu_seqlens, "max_seqlen": clips.masked.max_seqlen, "over": point.over}

    def original(prediction: Tensor, target: Tensor) -> Tensor:
        wide = torch.promote_types(prediction.dtype, torch.float32)
        if len(set(counts)) == 1:  # the paper crops clips to one length and takes them in one product
            p, t = (x.to(wide).view(len(counts), -1, width) for x in (prediction, target))
            products = p @ t.transpose(1, 2) if point.over == "targets" else t @ p.transpose(1, 2)
            return -F.log_softmax(products, dim=-1).diagonal(dim1=1, dim2=2).mean()
        losses = []
        for p, t in zip(prediction.to(wide).split(counts), target.to(wide).split(counts), strict=True):
            products = p @ t.transpose(0, 1) if point.over == "targets" else t @ p.transpose(0, 1)
            losses.append(-F.log_softmax(products, dim=-1).diagonal().sum())
        return torch.stack(losses).sum() / sum(counts)

    plain, kernel = partial(reference.info_nce, **rows), partial(ops.info_nce, **rows, impl="triton")
    flop = 2 * sum(count * count for count in counts) * width
    columns = {"original": original, "reference": mean_loss(plain), "fast": mean_loss(kernel)}
    return Op(columns, inputs, "FLOP", (flop, 2 * flop), ("prediction",), dot=True)


def attention_(point: Point, clips: Clips) -> Op:
    """Over the encoder's rows (``visible``) or the decoder's (``every``): two products forward, four backward."""
    packing = getattr(clips, point.rows)
    width, heads = clips.config.embed_dim, clips.config.num_heads
    where = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}
    columns: dict[str, Function] = {"reference": partial(reference.attention, **where)}
    for backend in ("sdpa", "clips", *(("short", *flash.FLASH) if ON_GPU else ())):
        fits = backend != "short" or max(packing.max_seqlen, width // heads) <= ops.SHORT
        there = backend not in flash.FLASH or not flash.problem(backend, DEVICE, DTYPE, point.dropout, width // heads)
        if fits and there and not (backend == "clips" and ON_GPU):
            columns[backend] = partial(attention.attention, **where, backend=backend)
    flop = 4 * int((packing.counts**2).sum()) * width
    inputs = {"qkv": clips.randn(len(packing.clip), 3, heads, width // heads)}
    return Op(columns, inputs, "FLOP", (flop, 3 * flop), ("qkv",), dot=True)


def points(*changes: dict[str, Any]) -> list[Point]:
    """The base point, the other size of the device, and the base point with each of these changes."""
    other = {"name": "32 clips", "clips": 32} if ON_GPU else {"name": "patch_base", "preset": "patch_base"}
    return [Point(**change) for change in ({}, other, *changes)]


MIXED_LENGTHS = {"name": "mixed lengths", "mixed": True}
DROPOUT = {"name": "dropout 0.1", "dropout": 0.1}
OPS: dict[str, tuple[Callable[[Point, Clips], Op], list[Point]]] = {
    "gather_patches": (gather_patches, points(MIXED_LENGTHS)),
    "scatter_tokens": (scatter_tokens, points(MIXED_LENGTHS)),
    "add_layer_norm": (add_layer_norm, points(DROPOUT)),
    "bias_gelu": (bias_gelu, points()),
    "feed_forward": (feed_forward, points()),
    "masked_mse": (masked_mse, points()),
    "info_nce": (info_nce, points(MIXED_LENGTHS, {"name": "over predictions", "over": "predictions"})),
    "attention": (attention_, points(MIXED_LENGTHS, DROPOUT, {"name": "decoder", "rows": "every"})),
}
