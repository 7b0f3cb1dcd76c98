"""Public `value_loss` and its custom op ``dppo_kernels::value_loss``."""

from typing import Any

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.aggregate import reduction_weights
from dppo_kernels.policy import Stat
from dppo_kernels.value_loss.reference import METRICS, value_loss_fwd, value_loss_ref


def value_loss(
    values: Tensor,  # [B, T] or [N]
    old_values: Tensor | None,  # [B, T] or [N]
    returns: Tensor,  # [B, T] or [N]
    mask: Tensor,  # [B, T] or [N]
    *,
    clip: float | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Stat]]:
    """Half the squared error of values against returns, optionally the larger of it and that of clipped values.

    ``1/2 sum max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) / denominator`` over what counts. The forward
    computes the gradient as well; the backward scales it. Where the clipped error is strictly larger the gradient is 0,
    everywhere else ``(v - R) / denominator``: at ties outside of the clip range autograd would halve it. There is no second
    derivative.

    Args:
        values: [B, T] or [N] floating; what the loss is differentiable in.
        old_values: shape of `values`, those of the rollout; needed with `clip`, else not read and may be None.
        returns: shape of `values`, see `gae`.
        mask: bool, shape of `values`, True = counts. Whatever stands behind it, NaN included, changes nothing.
        clip: positive width of the clip range; None is the plain squared error.
        denominator: positive number or scalar tensor that replaces the count of the call (at least 1), so that micro-batches
            and ranks that divide by the same number add up to the loss of the whole batch.
        backend: "auto" (default: "triton" on CUDA, else "torch"), "triton", "torch" or "reference"; also set by
            ``DPPO_KERNELS_BACKEND``. float64 runs on "torch".

    Returns:
        Scalar loss, float32 (float64 if an input is), and detached stats over what counts: "value_error" (squared, unclipped),
        "value_clipped" (share where the clipped error is strictly larger) and "values".

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, `clip` or `denominator`.

    Source: PPO as implemented by Baselines' ppo2 (1707.06347 has no clipping of values).
    """
    _checks.check_floating("values", values)
    if values.dim() not in (1, 2):
        raise ValueError(f"`values` must be [B, T] or [N], got {list(values.shape)}")
    _checks.check_mask("mask", mask)
    if clip is not None:
        _checks.check_positive("clip", clip)
        if old_values is None:
            raise ValueError(f"`clip` is {clip}: `old_values` are needed")
    else:
        old_values = None
    floating = {"returns": returns} if old_values is None else {"returns": returns, "old_values": old_values}
    for argument, value in floating.items():
        _checks.check_floating(argument, value)
    for argument, value in {**floating, "mask": mask}.items():
        _checks.check_shape(argument, value, values.shape, "that of `values`")
        _checks.check_device(argument, value, "values", values)
    dtype = values.dtype
    for value in floating.values():
        dtype = torch.promote_types(dtype, value.dtype)
    name = _backend.resolve("value_loss", backend, values.device, dtype)
    dtype = stat_dtype(dtype)
    weight = reduction_weights(mask, "token_mean", denominator=denominator, max_length=None, dtype=dtype)
    if name == "reference":
        old = None if old_values is None else old_values.detach().to(dtype)
        return value_loss_ref(values.to(dtype), old, returns.detach().to(dtype), mask, weight, clip)
    old_values = None if old_values is None else old_values.detach()
    loss, _, packed = torch.ops.dppo_kernels.value_loss(
        values, old_values, returns.detach(), mask, weight, None if clip is None else float(clip), name
    )
    return loss, {key: Stat(row[0], row[1].long(), row[2]) for key, row in zip(METRICS, packed.unbind(0), strict=True)}


@torch.library.custom_op("dppo_kernels::value_loss", mutates_args=())
def _op(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    weight: Tensor,
    clip: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient in the dtype of `weight`, and the statistics as [METRICS, 3]."""
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.value_loss.kernels import value_loss_triton

        return value_loss_triton(values, old_values, returns, mask, weight, clip)
    return value_loss_fwd(values, old_values, returns, mask, weight, clip)


@_op.register_fake
def _(values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    packed = weight.new_empty((len(METRICS), 3), dtype=torch.float64)
    return weight.new_empty(()), weight.new_empty(values.shape), packed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dvalues, packed = output
    ctx.mark_non_differentiable(dvalues, packed)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.traced = type(dvalues) is not Tensor
    ctx.save_for_backward(dvalues)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not ctx.traced:
        raise RuntimeError("value_loss has no second derivative: compute its gradient without create_graph")
    (dvalues,) = ctx.saved_tensors
    return (None if dloss is None else (dvalues * dloss).to(ctx.dtype), *(None,) * 6)


_op.register_autograd(_backward, setup_context=_setup_context)
