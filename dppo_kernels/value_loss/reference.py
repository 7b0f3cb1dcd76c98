"""The definition of the value loss, and the same with its gradient written out."""

import torch
from torch import Tensor

from dppo_kernels.policy import Stat, partial_sums

METRICS = ("value_error", "value_clipped", "values")


def value_loss_ref(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    weight: Tensor,  # scalar, 1 / denominator
    clip: float | None,
) -> tuple[Tensor, dict[str, Stat]]:
    """Scalar loss and statistics of [...] tensors of one dtype; autograd differentiates it."""
    v, target, old = _clean(values, old_values, returns, mask)
    squared, clipped_squared = (v - target).square(), (_clamped(v, old, clip) - target).square()
    loss = 0.5 * weight * torch.maximum(squared, clipped_squared).sum()
    return loss, _stats(squared.detach(), clipped_squared.detach() > squared.detach(), v.detach(), mask)


def value_loss_fwd(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    weight: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient in `values`, and statistics as [METRICS, 3] in float64; all but those in the dtype of `weight`.

    Where the clipped error is the larger one, `values` are outside of the clip range and have no gradient; everywhere else,
    ties included, the gradient is that of the plain squared error.
    """
    dtype = weight.dtype
    v, target, old = _clean(values.to(dtype), None if old_values is None else old_values.to(dtype), returns.to(dtype), mask)
    error = v - target
    squared, clipped_squared = error.square(), (_clamped(v, old, clip) - target).square()
    clipped = clipped_squared > squared
    loss = 0.5 * weight * torch.maximum(squared, clipped_squared).sum()
    stats = _stats(squared, clipped, v, mask).values()
    packed = torch.stack([torch.stack([x.double() for x in stat]) for stat in stats])
    return loss, torch.where(clipped, 0.0, error * weight), packed


def _clean(values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v, target = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
    return v, target, v if old_values is None else torch.where(mask, old_values, 0.0)


def _clamped(v: Tensor, old: Tensor, clip: float | None) -> Tensor:
    return v if clip is None else torch.clamp(v, old - clip, old + clip)


def _stats(squared: Tensor, clipped: Tensor, v: Tensor, mask: Tensor) -> dict[str, Stat]:
    return {name: partial_sums(x, mask) for name, x in zip(METRICS, (squared, clipped, v), strict=True)}
