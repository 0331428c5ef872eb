"""``triton_op``: one declaration gives an operation its custom op, fake, autograd and a short way for eager calls.

    @triton_op("bias_gelu", outputs=("y",))
    def forward(x, bias, seed, dropout, dropout_site): ...        # allocates the outputs, launches kernels

    @forward.gradients_of("x", "bias")
    def backward(dy, x, bias, seed, dropout, dropout_site): ...   # the gradients of x and bias

The parameters of ``backward`` say what is saved: those named like a parameter or an output of ``forward``. ``dy`` is
the gradient of the output ``y``. An output without such a parameter is not differentiable. Gradients are cast to the
dtype of their input.

Both functions become custom ops of torch.library, ``mae_ast_fast::bias_gelu`` and ``mae_ast_fast::bias_gelu_backward``.
Tracing sees these. Their fakes are the functions themselves: a launch does nothing on tensors without data. In eager
mode a call on plain tensors goes to the function directly, because a custom op costs the host much more time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def triton_op(name: str, *, outputs: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], TritonOp]:
    """Decorate the function that computes an operation.

    Args:
        name: Name of the custom op, below ``mae_ast_fast::``.
        outputs: Names of the results, which ``backward`` uses. Not needed without a backward.

    Returns:
        A decorator. The function's annotations give the custom op its schema.
    """
    return lambda function: TritonOp(name, function, outputs)


class TritonOp:
    """An operation that launches kernels, as a custom op with a short way for eager calls.

    Attributes:
        custom_op: What ``torch.library.custom_op`` returns.
        parameters: Names of the arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any], outputs: tuple[str, ...] = ()) -> None:
        self.name, self.function, self.outputs = name, function, outputs
        self.parameters = tuple(inspect.signature(function).parameters)
        self.custom_op = torch.library.custom_op(f"mae_ast_fast::{name}", function, mutates_args=())
        self.custom_op.register_fake(function)
        self._autograd: Any = None  # the autograd.Function of eager calls

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The results of the function; every argument by position or by keyword."""
        arguments += tuple([keywords[name] for name in self.parameters[len(arguments) :]])
        if torch.compiler.is_compiling() or _needs_dispatch(arguments):
            return self.custom_op(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self.function(*arguments)
        if self._autograd is None:  # the custom op raises when its result is differentiated
            return self.custom_op(*arguments)
        return self._autograd.apply(*arguments)

    def gradients_of(
        self, *inputs: str, unpack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    ) -> Callable[[Callable[..., Any]], TritonOp]:
        """Decorate the function that computes the gradients of these inputs, and register the op's autograd.

        Args:
            *inputs: Names of the inputs with a gradient, in the order of the results.
            unpack: Turns the function's results into one gradient per input. None: they are the gradients.
        """

        def decorate(function: Callable[..., Any]) -> TritonOp:
            self._backward = TritonOp(f"{self.name}_backward", function)
            self._differentiable, self._unpack = inputs, unpack
            known = (*self.parameters, *self.outputs)
            self._saved = [name for name in self._backward.parameters if name in known]
            self._incoming = [name for name in self._backward.parameters if name not in known]
            methods = {"forward": staticmethod(self._forward), "backward": staticmethod(self._gradients)}
            self._autograd = type(self.name, (torch.autograd.Function,), methods)
            self.custom_op.register_autograd(self._gradients, setup_context=self._setup)
            return self._backward

        return decorate

    def _forward(self, ctx: Any, *arguments: Any) -> Any:
        results = self.function(*arguments)
        self._setup(ctx, arguments, results)
        return results

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        named = zip(self.outputs, outputs, strict=True)
        ctx.mark_non_differentiable(*[x for name, x in named if f"d{name}" not in self._incoming])
        self.save(ctx, inputs, outputs)

    def _gradients(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        named = dict(zip(self.outputs, gradients, strict=True))
        return self.gradients(ctx, {name: named.get(name[1:]) for name in self._incoming})

    def save(self, ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        """Save in the context of an autograd.Function what ``gradients`` needs."""
        ctx.set_materialize_grads(False)
        values = dict(zip((*self.parameters, *self.outputs), (*inputs, *outputs), strict=True))
        saved = [values[name] for name in self._saved]
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in saved])
        ctx.constants = [None if isinstance(x, Tensor) else x for x in saved]
        ctx.dtypes = [None if values[name] is None else values[name].dtype for name in self._differentiable]

    def gradients(self, ctx: Any, incoming: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """One gradient per parameter, from what ``save`` saved.

        Args:
            ctx: Context of an autograd.Function.
            incoming: Gradients of the outputs, by the names of the backward's parameters.
        """
        pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
        saved = [tensor if constant is None else constant for tensor, constant in pairs]
        results = self._backward(**dict(zip(self._saved, saved, strict=True)), **incoming)
        results = results if isinstance(results, tuple) else (results,)
        if self._unpack:
            results = self._unpack(results)
        named = {
            name: None if dtype is None else x.to(dtype)
            for name, x, dtype in zip(self._differentiable, results, ctx.dtypes, strict=True)
        }
        return tuple([named.get(name) for name in self.parameters])


def _needs_dispatch(arguments: tuple[Any, ...]) -> bool:
    """Whether PyTorch's dispatcher must see the call: for a tracer, a mode, a transform or a subclass of tensors."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, Parameter) for x in arguments)
    )
