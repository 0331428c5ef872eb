"""kernels/common/triton_op.py: eager calls skip torch.library, everything that PyTorch must see crosses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import randn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mae_ast_fast.kernels.masked_mse import backward, forward


class Seen(TorchDispatchMode):
    """Records the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass of tensors without a rule of its own."""


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the custom ops that were called."""
    called: list[str] = []
    for op in (forward, backward):

        def custom_op(*arguments: Any, op: Any = op, inner: Any = op.custom_op) -> Any:
            called.append(op.name)
            return inner(*arguments)

        monkeypatch.setattr(op, "custom_op", custom_op)
    return called


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return forward(prediction=prediction, target=target, norm_pix_loss=False, eps=1e-6)


def test_triton_op_eager_call_skips_custom_op(crossings: list[str]) -> None:
    prediction, target = torch.nn.Parameter(randn(3, 16)), randn(3, 16, seed=1)
    (gradient,) = torch.autograd.grad(loss(prediction, target).sum(), prediction)
    with torch.inference_mode():
        value = loss(prediction, target)
    assert crossings == [] and gradient.any() and value.all()


def test_triton_op_result_keeps_gradient_of_custom_op() -> None:
    prediction, target = randn(3, 16).requires_grad_(), randn(3, 16, seed=1)
    eager, registered = (op(prediction, target, True, 1e-6) for op in (forward, forward.custom_op))
    assert torch.equal(eager, registered)
    gradients = [torch.autograd.grad(x.sum(), prediction)[0] for x in (eager, registered)]
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls custom ops in a loop
@pytest.mark.parametrize("case", ["fake", "subclass", "transform"])
def test_triton_op_call_that_pytorch_must_see_crosses(case: str, crossings: list[str]) -> None:
    prediction, target = randn(3, 16), randn(3, 16, seed=1)
    if case == "fake":
        mode = FakeTensorMode()
        with mode:
            assert loss(mode.from_tensor(prediction), mode.from_tensor(target)).shape == (3,)
    elif case == "subclass":
        loss(prediction.as_subclass(Tagged), target)
    else:
        value = torch.func.vmap(loss)(prediction[None], target[None])
        assert torch.equal(value[0], forward.function(prediction, target, False, 1e-6))
    assert crossings == ["masked_mse"]


def test_triton_op_dispatch_mode_sees_custom_op() -> None:
    prediction, target = randn(3, 16).requires_grad_(), randn(3, 16, seed=1)
    with Seen() as seen:
        torch.autograd.grad(loss(prediction, target).sum(), prediction)
    assert "mae_ast_fast::masked_mse" in seen.names and "mae_ast_fast::masked_mse_backward" in seen.names


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_triton_op_trace_records_custom_op() -> None:
    prediction, target = randn(3, 16), randn(3, 16, seed=1)
    traced = torch.jit.trace(loss, (prediction, target), check_trace=False)
    assert "mae_ast_fast::masked_mse" in str(traced.graph)


def test_triton_op_second_derivative_raises() -> None:
    prediction, target = randn(3, 16).requires_grad_(), randn(3, 16, seed=1)
    (gradient,) = torch.autograd.grad(loss(prediction, target).sum(), prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_mse_backward"):
        torch.autograd.grad(gradient.sum(), prediction)


def test_triton_op_missing_argument_raises() -> None:
    with pytest.raises(KeyError, match="eps"):
        forward(randn(3, 16), randn(3, 16), norm_pix_loss=False)
