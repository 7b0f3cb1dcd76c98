"""Count, mean and centred sum of squares of what is counted, and the whitening made of them. Detached, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype

WHITENING_EPS = 1e-8


class Moments(NamedTuple):
    """Moments of a set of numbers. Those of several processes are one by `merge`, folded in the order of their ranks."""

    count: Tensor  # type: ignore[assignment]  # scalar; hides tuple.count
    mean: Tensor  # scalar, 0 if count is 0
    m2: Tensor  # scalar, sum of (x - mean)^2

    def variance(self, unbiased: bool = True) -> Tensor:
        """Scalar m2 / (count - 1), or m2 / count; 0 where one number or none was counted."""
        return self.m2 / (self.count - int(unbiased)).clamp(min=1)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together.

        Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        apart = other.mean - self.mean
        return Moments(count, self.mean + apart * share, self.m2 + other.m2 + apart.square() * self.count * share)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """`Moments` of the counted elements, in float64 and two passes.

    Args:
        x: [...] floating.
        mask: bool, shape of `x`, True = counts. NaN behind it changes nothing.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    _check(x, mask)
    wide = x.double()
    count = mask.sum().double()
    # Against one of the numbers first: where all are equal, m2 is exactly 0.
    anchor = torch.where(mask, wide, -torch.inf).amax().clamp(min=-torch.finfo(x.dtype).max) if x.numel() else count
    apart = torch.where(mask, wide - anchor, 0.0)
    mean = apart.sum() / count.clamp(min=1)
    m2 = torch.where(mask, apart - mean, 0.0).square().sum()
    return Moments(count, torch.where(count > 0, anchor + mean, 0.0), m2)


@torch.no_grad()
def whiten(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    *,
    shift_mean: bool = True,
    moments: Moments | None = None,
    eps: float = WHITENING_EPS,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` of what is counted, 0 elsewhere; the variance is the unbiased one.

    Of one counted element the variance is 0: it becomes 0 (its own value without `shift_mean`), not NaN.

    Args:
        x: [...] floating.
        mask: bool, shape of `x`, True = counts. NaN behind it changes nothing.
        shift_mean: False adds the mean again, so that only the scale changes.
        moments: replaces those of `x`, for processes that share theirs.
        eps: added to the variance.

    Returns:
        Shape of `x`, contiguous, float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: wrong dtype or shape, a negative `eps`.

    Source: TRL's `masked_whiten`.
    """
    _check(x, mask)
    _checks.check_not_negative("eps", eps)
    if moments is None:
        moments = masked_moments(x, mask)
    scaled = (x.double() - moments.mean) * whitening_scale(moments, eps)
    if not shift_mean:
        scaled = scaled + moments.mean
    return torch.where(mask, scaled, 0.0).to(stat_dtype(x.dtype)).contiguous()


def whitening_scale(moments: Moments, eps: float = WHITENING_EPS) -> Tensor:
    """Scalar that brings numbers of these moments to variance 1; 0 where they are all equal and `eps` is 0."""
    variance = moments.variance() + eps
    return torch.where(variance > 0, variance.rsqrt(), 0.0)


def merge_rows(partials: Tensor) -> Moments:
    """One `Moments` of those of every row, [B, 3], added up in the order of the rows."""
    counts, means, m2 = partials.double().unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return Moments(count, mean, m2.sum() + (counts * (means - mean).square()).sum())


def _check(x: Tensor, mask: Tensor) -> None:
    _checks.check_floating("x", x)
    _checks.check_mask("mask", mask)
    _checks.check_shape("mask", mask, x.shape, "that of `x`")
    _checks.check_device("mask", mask, "x", x)
