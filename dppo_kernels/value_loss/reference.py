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
    values, returns, mask = values.to(weight.dtype).contiguous(), returns.to(weight.dtype), mask.contiguous()
    error = torch.where(mask, values - returns, 0.0)
    squared = error.square()
    dvalues = error.mul_(weight)
    count = mask.sum().double()
    total, n_clipped = squared.sum(), torch.zeros_like(count)
    if old_values is not None and clip is not None:
        old_values = old_values.to(weight.dtype)
        clipped_squared = torch.clamp(values, old_values - clip, old_values + clip).sub_(returns).square_()
        clipped = clipped_squared.masked_fill_(~mask, 0.0) > squared
        dvalues.masked_fill_(clipped, 0.0)
        n_clipped = clipped.sum().double()
        total = torch.maximum(squared, clipped_squared).sum()
    summed = torch.stack([squared.sum().double(), n_clipped, torch.where(mask, values, 0.0).sum().double()])
    # What does not count is not above anything that does: a square, a share, a value.
    largest = [_max(squared), (n_clipped > 0).double(), _max(torch.where(mask, values, -torch.inf))]
    maxima = torch.where(count > 0, torch.stack(largest), -torch.inf)
    return 0.5 * weight * total, dvalues, torch.stack([summed, count.expand(3), maxima], 1)


def _max(x: Tensor) -> Tensor:
    return x.amax().double() if x.numel() else x.sum().double()


def _clean(values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v, target = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
    return v, target, v if old_values is None else torch.where(mask, old_values, 0.0)


def _clamped(v: Tensor, old: Tensor, clip: float | None) -> Tensor:
    return v if clip is None else torch.clamp(v, old - clip, old + clip)


def _stats(squared: Tensor, clipped: Tensor, v: Tensor, mask: Tensor) -> dict[str, Stat]:
    return {name: partial_sums(x, mask) for name, x in zip(METRICS, (squared, clipped, v), strict=True)}
