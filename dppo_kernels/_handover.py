"""Autograd of ops that compute the gradient in their forward: kept until the backward, scaled there, handed over once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def keep_gradients(ctx: Any, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> None:
    """For a `setup_context`: the op's last outputs are the gradients of its first inputs, in the order of both."""
    ctx.set_materialize_grads(False)  # or zeros as large as the head arrive in the backward
    ctx.dtypes = [None if x is None else x.dtype for x in inputs]
    ctx.traced = any(type(x) is not Tensor for x in gradients)
    if ctx.traced:
        ctx.save_for_backward(*gradients)
    else:  # what save_for_backward holds on to is copied, not handed over, when it becomes a leaf's `.grad`
        ctx.gradients = list(gradients)


def hand_over(ctx: Any, dloss: Tensor, op: str) -> list[Tensor | None]:
    """The kept gradients times the one that arrives at the loss; None for inputs that want none.

    Raises:
        RuntimeError: a second derivative is asked for, or the gradients a second time.
    """
    needed = ctx.needs_input_grad[: len(ctx.dtypes)]
    if ctx.traced:
        scaled = [x * dloss for x in ctx.saved_tensors]
        return [x.to(t) if need else None for x, t, need in zip(scaled, ctx.dtypes, needed, strict=True)]
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: compute its gradient without create_graph")
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError(f"{op} computed its gradient in the forward and has handed it over: backward runs once")
    given: list[Tensor | None] = []
    for dtype, need in zip(ctx.dtypes, needed, strict=True):
        gradient = gradients.pop(0)
        given.append(gradient.mul_(dloss).to(dtype) if need else None)
        del gradient
    return given


def register_hand_over(op: Any, name: str, n_trained: int = 5) -> None:
    """Autograd of an op that returns (loss, ..., gradients of its first `n_trained` inputs, which alone are trained)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.n_fixed = len(inputs) - n_trained
        keep_gradients(ctx, inputs[:n_trained], others[-n_trained:])

    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*hand_over(ctx, dloss, name), *(None,) * ctx.n_fixed)

    op.register_autograd(backward, setup_context=setup_context)
