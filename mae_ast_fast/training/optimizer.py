"""The optimizers of pretraining: AdamW, or Muon for the matrices of the layers with AdamW for the rest.

Muon replaces a matrix's momentum by the nearest matrix whose singular values are all about 1 (K. Jordan et al. 2024).
The update is scaled so that it has the root mean square of AdamW's, so both take the same learning rate and weight
decay (J. Liu et al. 2025, arXiv 2502.16982, section 2.2). Here the matrices are blocks of the weights, as wide or as
high as an attention head: a short pretraining learns as much as with whole weights, in less time (docs/recipes.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..devices import native_bf16
from ..models.base import PretrainingModel

OPTIMIZERS = ("adamw", "muon")
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, whose slope at 0 is steep
ITERATIONS = 5
RMS_OF_ADAMW = 0.2

Grid = tuple[int, int]  # blocks along the rows and along the columns of a weight


class FusedAdamW(torch.optim.AdamW):
    """Fused AdamW with the two attributes that its kernel reads, tensors on the device.

    ``grad_scale`` divides the gradients. Where ``found_inf`` is 1, the update is skipped.
    """

    grad_scale: Tensor
    found_inf: Tensor


class MuonAdamW(FusedAdamW):
    """Muon on the weight matrices inside the transformer layers of a model, fused AdamW on the rest.

    A matrix of Muon is a block of a weight: the rows of ``qkv`` that make the queries, keys or values of one head, the
    columns of ``out_proj`` that read one head, and as many columns of ``fc1`` and rows of ``fc2`` as a head has.
    Both optimizers read ``grad_scale`` and ``found_inf``, and the host never waits for them.

    Args:
        model: Its parameters ``*.layers.*`` with two dimensions get Muon.
        lr: Learning rate of both, a 0-d tensor on the device of the model.
        betas: Decay rates of AdamW's two running means, each in [0, 1).
        eps: Added to the denominator of AdamW's update.
        weight_decay: Decoupled weight decay of both, >= 0.
        momentum: Decay rate of Muon's momentum, in [0, 1).
    """

    def __init__(
        self,
        model: PretrainingModel,
        *,
        lr: Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float = MOMENTUM,
    ) -> None:
        named = dict(model.named_parameters())
        is_matrix = {name: ".layers." in f".{name}" and parameter.dim() == 2 for name, parameter in named.items()}
        matrices = [parameter for name, parameter in named.items() if is_matrix[name]]
        heads = model.config.num_heads
        grids = {"qkv": (3 * heads, 1), "out_proj": (1, heads), "fc1": (1, heads), "fc2": (heads, 1)}
        groups: list[dict[str, Any]] = [
            {"params": [parameter for name, parameter in named.items() if not is_matrix[name]]},
            {
                "params": matrices,
                "momentum": momentum,
                "grids": [grids[name.split(".")[-2]] for name in named if is_matrix[name]],
            },
        ]
        super().__init__(
            groups,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
            capturable=lr.is_cuda,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure
        """Make one update from the gradients; parameters without one keep their values."""
        adamw, muon = self.param_groups
        self.param_groups = [adamw]
        try:
            super().step()
        finally:
            self.param_groups = [adamw, muon]
        self._step_matrices(muon)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's wants a step count in the state of every parameter

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Muon's update of the group's weights that have a gradient."""
        momentum, lr, decay = group["momentum"], group["lr"], group["momentum"]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:  # a skipped update adds exactly nothing
            decay = torch.where(found_inf > 0, 1.0, momentum)
            lr = lr * (1 - found_inf)
        alike: dict[tuple[torch.Size, Grid], list[Tensor]] = {}
        for weight, grid in zip(group["params"], group["grids"], strict=True):
            if weight.grad is not None:
                alike.setdefault((weight.shape, grid), []).append(weight)
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        updated = list(itertools.chain.from_iterable(alike.values()))
        torch._foreach_mul_([self.state[weight]["momentum_buffer"] for weight in updated], decay)
        torch._foreach_mul_(updated, 1 - lr * group["weight_decay"])
        for (_, grid), weights in alike.items():
            grad = torch.stack([cast(Tensor, weight.grad) for weight in weights])
            if grad_scale is not None:
                grad = grad / grad_scale
            if found_inf is not None:
                grad = torch.where(found_inf > 0, 0.0, grad)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_add_(buffers, list(grad.unbind()), alpha=1 - momentum)
            blocks = to_blocks(grad.lerp(torch.stack(buffers), momentum), grid)  # Nesterov's momentum
            update = from_blocks(orthogonalize(blocks), grid).float()
            rms_of_adamw = RMS_OF_ADAMW * max(blocks.shape[1:]) ** 0.5
            torch._foreach_add_(weights, list((update * (-lr * rms_of_adamw)).unbind()))


def to_blocks(matrices: Tensor, grid: Grid) -> Tensor:
    """Matrices (n, rows, columns) cut into a grid of blocks each: (n * blocks, rows of a block, columns of a block)."""
    row_blocks, column_blocks = grid
    cut = matrices.unflatten(2, (column_blocks, -1)).unflatten(1, (row_blocks, -1))
    return cut.transpose(2, 3).flatten(0, 2)


def from_blocks(blocks: Tensor, grid: Grid) -> Tensor:
    """The matrices that ``to_blocks`` cut."""
    return blocks.unflatten(0, (-1, *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with the same singular vectors, and singular values between about 0.7 and 1.2.

    Five Newton-Schulz iterations, in bf16 where the device computes it natively, otherwise in fp32. A matrix of zeros
    stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if native_bf16(matrices.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):  # x = a x + b (x x^T) x + c (x x^T)^2 x, with the smaller of the two Gram matrices
        gram = x.mT @ x if is_tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if is_tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def make_optimizer(
    name: str, model: PretrainingModel, *, lr: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> FusedAdamW:
    """The optimizer "adamw" or "muon" of a model.

    Args:
        name: One of ``OPTIMIZERS``.
        model: The model, on its device.
        lr: Learning rate, a 0-d tensor on that device.
        betas: Decay rates of AdamW's two running means, each in [0, 1).
        eps: Added to the denominator of AdamW's update.
        weight_decay: Decoupled weight decay, >= 0.
    """
    if name == "muon":
        return MuonAdamW(model, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return FusedAdamW(
        model.parameters(),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=True,
        capturable=lr.is_cuda,
    )
