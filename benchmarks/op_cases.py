"""The ops of bench_ops.py: inputs, columns, and the minimum bytes or FLOP of each.

Bytes: each input read once and each output written once; ``forward + backward`` adds what the backward reads and
writes, unless one pass can compute both. FLOP: those of matrix products only; a backward has twice as many.
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
from mae_ast_fast.kernels.common.case import Draw, OpCase
from mae_ast_fast.models.transformer import sinusoid
from mae_ast_fast.ops import attention, eager, reference
from mae_ast_fast.ops.attention import flash
from mae_ast_fast.ops.cases import implementation, op_cases, tensors_and_options
from mae_ast_fast.ops.dispatch import HAS_TRITON
from mae_ast_fast.ops.masking import sample_mask
from mae_ast_fast.ops.packing import Packing, real_tokens

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZE = DTYPE.itemsize
MIXED_LENGTH_RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 1.6, 2.0)  # clip lengths relative to their mean
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """Inputs on which an op is measured; ``name`` states the difference from the base point."""

    name: str = "base point"
    preset: str = "patch_base" if ON_GPU else "patch_small"
    clips: int = 256 if ON_GPU else 8
    seconds: float = 10.0
    mixed: bool = False
    dropout: float = 0.0
    softmax_over: str = "targets"
    packing: str = "visible"
    sizes: dict[str, Any] = field(default_factory=dict)

    def toy(self) -> Point:
        sizes = {"embed_dim": 32, "decoder_embed_dim": 32, "ffn_dim": 64, "num_heads": 2}
        return replace(self, clips=2, seconds=2.0, sizes=sizes)


def packed(selected: Tensor) -> Packing:
    """Packing of a selection (B, L), built on the CPU (so the host knows its sizes) and moved to the device."""
    packing = Packing.of(selected)
    return replace(
        packing, clip=packing.clip.to(DEVICE), token=packing.token.to(DEVICE), cu_seqlens=packing.cu_seqlens.to(DEVICE)
    )


class Clips:
    """A batch: frame counts, packings, and noise of any shape."""

    def __init__(self, point: Point) -> None:
        self.config = config = MAEASTConfig.preset(point.preset, **point.sizes)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        relative_lengths = (MIXED_LENGTH_RATIOS if point.mixed else (1.0,)) * point.clips
        self.num_frames = torch.tensor(
            [int(100 * point.seconds * relative_length) - 2 for relative_length in relative_lengths[: point.clips]]
        )
        self.num_tokens = self.num_frames // config.patch_size[0] * config.grid_f
        width = int(self.num_tokens.max())
        mask = sample_mask(config.masking, self.num_tokens, config.grid_f, config.mask_ratio, seed=0, max_tokens=width)
        real = real_tokens(self.num_tokens, width)
        self.mask = mask.to(DEVICE)
        self.visible, self.masked, self.tokens = map(packed, (real & ~mask, real & mask, real))

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=DEVICE) * scale).to(dtype)

    def parameters(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Noise in fp32, the dtype of the model's parameters."""
        return self.randn(*shape, scale=scale, dtype=torch.float32)


@dataclass
class Op:
    """Columns over the same inputs, without dropout.

    Attributes:
        columns: Name -> function of the inputs.
        inputs: Argument name -> tensor.
        unit: Unit of ``work``, "bytes" or "FLOP".
        work: Minimum work of the forward, and of forward and backward.
        differentiable: Names of inputs whose gradients are computed.
        summed_inputs: Names of inputs whose gradients are sums over rows.
        uses_products: Whether gradients go through matrix products.
    """

    columns: dict[str, Function]
    inputs: dict[str, Tensor]
    unit: str
    work: tuple[int, ...]
    differentiable: tuple[str, ...] = ()
    summed_inputs: tuple[str, ...] = ()
    uses_products: bool = False


def mean_loss(function: Callable[..., Any]) -> Function:
    """A function that returns the mean of an op's losses per row, as the original's loops do."""

    def loss(**inputs: Tensor) -> Tensor:
        output = function(**inputs)
        return (output[0] if isinstance(output, tuple) else output).mean()

    return loss


def gather_patches(point: Point, clips: Clips) -> Op:
    """Visible and masked patches, each read and written once. No backward, because log-mel has no gradient."""
    size, mask = clips.config.patch_size, clips.mask
    features = clips.randn(
        len(clips.num_frames), int(clips.num_frames.max()), clips.config.num_mel_bins, dtype=torch.float32
    )
    mean, scale = torch.tensor([-6.0, 0.125], device=DEVICE)
    inputs = {"features": features * 4 - 6, "mean": mean, "scale": scale}
    inputs |= {
        name: torch.cat([getattr(clips.visible, name), getattr(clips.masked, name)]) for name in ("clip", "token")
    }
    real = real_tokens(clips.num_tokens, mask.shape[1]).to(DEVICE)

    def output_dtype(features: Tensor) -> torch.dtype:
        return torch.float64 if features.dtype == torch.float64 else DTYPE

    def reference_dtype(**x: Tensor) -> Tensor:
        return reference.gather_patches(**x, patch_size=size, dtype=output_dtype(x["features"]))

    def original(*, features: Tensor, mean: Tensor, scale: Tensor, clip: Tensor, token: Tensor) -> Tensor:
        patches = F.unfold(((features - mean) * scale)[:, None], size, stride=size).transpose(1, 2)
        visible, target = [], []
        for i in range(len(patches)):
            visible.append(patches[i][real[i] & ~mask[i]])
            target.append(patches[i][mask[i]])
        return torch.cat(visible + target).to(output_dtype(features))

    kernel = partial(ops.gather_patches, patch_size=size, dtype=DTYPE, impl="triton")
    columns = {"original": original, "reference": reference_dtype, "fast": kernel}
    num_rows = len(inputs["clip"])
    return Op(columns, inputs, "bytes", (num_rows * (clips.config.patch_dim * (4 + SIZE) + 16),))


def scatter_tokens(point: Point, clips: Clips) -> Op:
    """Decoder input with its LayerNorm. The forward reads visible rows, indices and table, and writes all rows. The
    backward reads the rows' gradients, visible rows, indices and table, and writes the visible rows' gradients."""
    tokens, mask, width = clips.tokens, clips.mask, clips.config.decoder_embed_dim
    is_masked = mask[tokens.clip, tokens.token]
    ids_restore = torch.where(is_masked, -1, (~is_masked).cumsum(0) - 1)
    max_tokens = mask.shape[1]
    inputs = {
        "visible": clips.randn(len(clips.visible.clip), width),
        "mask_token": clips.parameters(width),
        "table": sinusoid(max_tokens, width).to(DEVICE),
        "token": tokens.token,
        "inverse": ids_restore,
        "weight": clips.parameters(width) + 1,
        "bias": clips.parameters(width),
    }
    real, counts = real_tokens(clips.num_tokens, max_tokens).to(DEVICE), clips.visible.counts.tolist()

    def original(
        *, visible: Tensor, mask_token: Tensor, table: Tensor, weight: Tensor, bias: Tensor, **_: Tensor
    ) -> Tensor:
        sequences = []
        for i, token_bytes in enumerate(visible.split(counts)):
            sequence = mask_token.to(visible.dtype).repeat(max_tokens, 1)
            sequence[real[i] & ~mask[i]] = token_bytes
            sequences.append((sequence + table.to(visible.dtype))[: int(clips.num_tokens[i])])
        return reference.layer_norm(torch.cat(sequences), weight, bias)

    kernel = partial(ops.scatter_tokens, impl="triton")
    token_bytes, visible_bytes = len(tokens.clip) * width * SIZE, len(clips.visible.clip) * width * SIZE
    forward = token_bytes + visible_bytes + 16 * len(tokens.clip) + 4 * max_tokens * width
    columns = {"original": original, "reference": eager.scatter_tokens, "fast": kernel}
    vectors = ("mask_token", "weight", "bias")
    return Op(columns, inputs, "bytes", (forward, 2 * forward + visible_bytes), ("visible", *vectors), vectors)


def add_layer_norm(point: Point, clips: Clips) -> Op:
    """In the decoder. The forward reads two tensors and writes one; the backward reads three and writes two."""
    num_rows, width = len(clips.tokens.clip), clips.config.decoder_embed_dim
    vectors = {name: clips.parameters(width) for name in ("weight", "bias", "branch_bias")}
    inputs = {"branch": clips.randn(num_rows, width), "residual": clips.randn(num_rows, width), **vectors}
    columns = {"reference": eager.add_layer_norm, "fast": partial(ops.add_layer_norm, impl="triton")}
    tensor_bytes = num_rows * width * SIZE
    return Op(columns, inputs, "bytes", (3 * tensor_bytes, 8 * tensor_bytes), tuple(inputs), tuple(vectors))


def bias_gelu(point: Point, clips: Clips) -> Op:
    """In the decoder. The forward reads one tensor and writes one; the backward reads two and writes one."""
    num_rows, width = len(clips.tokens.clip), clips.config.ffn_dim
    inputs = {"x": clips.randn(num_rows, width), "bias": clips.parameters(width)}
    columns = {"reference": eager.bias_gelu, "fast": partial(ops.bias_gelu, impl="triton")}
    tensor_bytes = num_rows * width * SIZE
    return Op(columns, inputs, "bytes", (2 * tensor_bytes, 5 * tensor_bytes), ("x", "bias"), ("bias",))


def feed_forward(point: Point, clips: Clips) -> Op:
    """In the decoder: two products forward, four backward."""
    num_rows, width, inner = len(clips.tokens.clip), clips.config.decoder_embed_dim, clips.config.ffn_dim
    inputs = {
        "x": clips.randn(num_rows, width),
        "w1": clips.parameters(inner, width, scale=width**-0.5),
        "b1": clips.parameters(inner),
        "w2": clips.parameters(width, inner, scale=inner**-0.5),
    }
    flop = 4 * num_rows * width * inner
    columns = {"reference": eager.feed_forward, "fast": partial(ops.feed_forward, impl="triton")}
    return Op(columns, inputs, "FLOP", (flop, 3 * flop), tuple(inputs), ("w1", "b1", "w2"), uses_products=True)


def _loss_inputs(clips: Clips, scale: float) -> tuple[dict[str, Tensor], list[int], int]:
    num_rows, width = len(clips.masked.clip), clips.config.patch_dim
    inputs = {"prediction": clips.randn(num_rows, width, scale=scale), "target": clips.randn(num_rows, width)}
    return inputs, clips.masked.counts.tolist(), width


def masked_mse(point: Point, clips: Clips) -> Op:
    """Reads both tensors; the backward writes one gradient, which the same pass can compute."""
    inputs, counts, width = _loss_inputs(clips, 1.0)

    def original(prediction: Tensor, target: Tensor) -> Tensor:
        accumulate_dtype = torch.promote_types(prediction.dtype, torch.float32)
        return F.mse_loss(prediction.to(accumulate_dtype), target.to(accumulate_dtype))

    kernel = mean_loss(partial(ops.masked_mse, impl="triton"))
    tensor_bytes = sum(counts) * width * SIZE
    columns = {"original": original, "reference": mean_loss(reference.masked_mse), "fast": kernel}
    return Op(columns, inputs, "bytes", (2 * tensor_bytes, 3 * tensor_bytes), ("prediction",))


def info_nce(point: Point, clips: Clips) -> Op:
    """One matrix product per clip in the forward and one in the backward (targets get no gradient)."""
    inputs, counts, width = _loss_inputs(clips, 0.1)  # for clips of unequal length the original loops over clips
    options = {"cu_seqlens": clips.masked.cu_seqlens, "max_seqlen": clips.masked.max_seqlen, "over": point.softmax_over}

    def original(prediction: Tensor, target: Tensor) -> Tensor:
        accumulate_dtype = torch.promote_types(prediction.dtype, torch.float32)
        if len(set(counts)) == 1:  # the paper crops clips to one length and computes one batched product
            p, t = (tensor.to(accumulate_dtype).view(len(counts), -1, width) for tensor in (prediction, target))
            products = p @ t.transpose(1, 2) if point.softmax_over == "targets" else t @ p.transpose(1, 2)
            return -F.log_softmax(products, dim=-1).diagonal(dim1=1, dim2=2).mean()
        losses = []
        for p, t in zip(
            prediction.to(accumulate_dtype).split(counts), target.to(accumulate_dtype).split(counts), strict=True
        ):
            products = p @ t.transpose(0, 1) if point.softmax_over == "targets" else t @ p.transpose(0, 1)
            losses.append(-F.log_softmax(products, dim=-1).diagonal().sum())
        return torch.stack(losses).sum() / sum(counts)

    reference_op, kernel = partial(eager.info_nce, **options), partial(ops.info_nce, **options, impl="triton")
    flop = 2 * sum(count * count for count in counts) * width
    columns = {"original": original, "reference": mean_loss(reference_op), "fast": mean_loss(kernel)}
    return Op(columns, inputs, "FLOP", (flop, 2 * flop), ("prediction",), uses_products=True)


def attention_op(point: Point, clips: Clips) -> Op:
    """Over the encoder's rows (``visible``) or the decoder's (``tokens``): two products forward, four backward."""
    packing = getattr(clips, point.packing)
    width, heads = clips.config.embed_dim, clips.config.num_heads
    boundaries = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}
    columns: dict[str, Function] = {"reference": partial(eager.attention, **boundaries)}
    for backend in ("sdpa", "clips", *(("short", *flash.FLASH) if ON_GPU else ())):
        fits = backend != "short" or max(packing.max_seqlen, width // heads) <= ops.SHORT
        available = backend not in flash.FLASH or not flash.problem(
            backend, DEVICE, DTYPE, dropout=point.dropout, head_dim=width // heads
        )
        if fits and available and not (backend == "clips" and ON_GPU):
            columns[backend] = partial(attention.attention, **boundaries, backend=backend)
    flop = 4 * int((packing.counts**2).sum()) * width
    inputs = {"qkv": clips.randn(len(packing.clip), 3, heads, width // heads)}
    return Op(columns, inputs, "FLOP", (flop, 3 * flop), ("qkv",), uses_products=True)


def points(*changes: dict[str, Any]) -> list[Point]:
    """The base point, a second size, and the base point with each of these changes."""
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
    "info_nce": (info_nce, points(MIXED_LENGTHS, {"name": "over predictions", "softmax_over": "predictions"})),
    "attention": (attention_op, points(MIXED_LENGTHS, DROPOUT, {"name": "decoder", "packing": "tokens"})),
}


def from_record(case: OpCase, point: Point, clips: Clips) -> Op:
    """An op without a function above, from its record: the decoder's rows, all inputs read and all results written.

    The backward reads inputs and the results' gradients, and writes the gradients of the inputs.
    """
    assert case.large is not None
    shape = case.large(len(clips.tokens.clip), clips.config.decoder_embed_dim)
    inputs, options = tensors_and_options({**case.make(Draw(DTYPE, DEVICE), shape), **case.variants[0]})
    plain, kernel = (implementation(case, impl, options) for impl in ("torch", "triton"))
    with torch.no_grad():
        output = plain(**inputs)
    read, gradients = (sum(x.nbytes for x in xs) for xs in (inputs.values(), (inputs[n] for n in case.differentiable)))
    work = (read + output.nbytes, 2 * (read + output.nbytes) + gradients)
    columns = {"reference": plain, "fast": kernel}
    return Op(columns, inputs, "bytes", work, case.differentiable, case.summed, uses_products=case.dot)


OPS |= {
    case.name: (partial(from_record, case), points())
    for case in (op_cases().values() if HAS_TRITON else ())
    if case.large is not None and case.name not in OPS
}
