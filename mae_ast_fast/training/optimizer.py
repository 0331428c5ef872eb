"""The optimizers of pretraining: AdamW, or Muon for the matrices of the layers with AdamW for the rest.

Muon replaces a matrix's momentum by the nearest matrix whose singular values are all about 1 (K. Jordan et al. 2024).
The update is scaled so that it has the root mean square of AdamW's, so both take the same learning rate and weight
decay (J. Liu et al. 2025, arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..devices import native_bf16

OPTIMIZERS = ("adamw", "muon")
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, whose slope at 0 is steep
ITERATIONS = 5
RMS_OF_ADAMW = 0.2


class FusedAdamW(torch.optim.AdamW):
    """Fused AdamW with the two attributes that its kernel reads, tensors on the device.

    ``grad_scale`` divides the gradients. Where ``found_inf`` is 1, the update is skipped.
    """

    grad_scale: Tensor
    found_inf: Tensor


class MuonAdamW(FusedAdamW):
    """Muon on the weight matrices inside the transformer layers of a model, fused AdamW on the rest.

    Both read ``grad_scale`` and ``found_inf``, and the host never waits for them.

    Args:
        model: Its parameters ``*.layers.*`` with two dimensions get Muon. A ``qkv`` weight counts as three matrices.
        lr: Learning rate of both, a 0-d tensor on the device of the model.
        betas: Decay rates of AdamW's two running means, each in [0, 1).
        eps: Added to the denominator of AdamW's update.
        weight_decay: Decoupled weight decay of both, >= 0.
        momentum: Decay rate of Muon's momentum, in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
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
        num_matrices = [3 if name.endswith("qkv.weight") else 1 for name in named if is_matrix[name]]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for name, parameter in named.items() if not is_matrix[name]]},
            {"params": matrices, "momentum": momentum, "num_matrices": num_matrices},
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
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, int]]] = {}
        for parameter, count in zip(muon["params"], muon["num_matrices"], strict=True):
            if parameter.grad is not None:
                shape = parameter.shape[0] // count, parameter.shape[1]
                by_shape.setdefault(shape, []).append((parameter, count))
        for shape, counted in by_shape.items():
            self._step_matrices(counted, shape, muon)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's wants a step count in the state of every parameter

    def _step_matrices(
        self, counted: list[tuple[nn.Parameter, int]], shape: tuple[int, int], group: dict[str, Any]
    ) -> None:
        """Muon's update of parameters, each with its number of matrices, whose matrices have one shape."""
        parameters, counts = [parameter for parameter, _ in counted], [count for _, count in counted]
        momentum, lr = group["momentum"], group["lr"]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights = _split(parameters, counts)
        buffers = _split([self.state[parameter]["momentum_buffer"] for parameter in parameters], counts)
        grad = torch.stack(_split([cast(Tensor, parameter.grad) for parameter in parameters], counts))
        decay: Tensor | float = momentum
        if grad_scale is not None:
            grad = grad / grad_scale
        if found_inf is not None:  # a skipped update adds exactly nothing
            grad = torch.where(found_inf > 0, 0.0, grad)
            decay = torch.where(found_inf > 0, 1.0, momentum)
            lr = lr * (1 - found_inf)
        torch._foreach_mul_(buffers, decay)
        torch._foreach_add_(buffers, list((grad * (1 - momentum)).unbind()))
        update = orthogonalize(grad.lerp(torch.stack(buffers), momentum))  # Nesterov's momentum
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        update = update.float() * (-lr * (RMS_OF_ADAMW * max(shape) ** 0.5))
        torch._foreach_add_(weights, list(update.unbind()))


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Each tensor as ``count`` matrices, views of it."""
    return [matrix for tensor, count in zip(tensors, counts, strict=True) for matrix in tensor.chunk(count)]


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
    name: str, model: nn.Module, *, lr: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
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
