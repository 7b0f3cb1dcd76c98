"""What a policy-gradient update with a value model needs around `gae`: rewards per token, lambdas, how good the values are."""

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.moments import Moments, masked_moments


@torch.no_grad()
def token_rewards(
    scores: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    *,
    kl: Tensor | None = None,  # [B, T]
    kl_coef: float = 0.0,
) -> Tensor:
    """Rewards per token: ``-kl_coef kl`` wherever a token counts, and the score at the last one of its row.

    Args:
        scores: [B] score of each whole sequence. Of a row without a token it goes nowhere.
        mask: bool [B, T], True = a token of the policy. Whatever stands behind it changes nothing.
        kl: [B, T] estimates of the KL to the reference, nats per token; see `kl_estimate`.
        kl_coef: their coefficient.

    Returns:
        [B, T], float32 (float64 if one of scores and kl is), 0 behind the mask, detached.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, `kl_coef` without `kl`.

    Source: Ziegler et al. (1909.08593), eq. 2; the score at the last token as in TRL up to 0.11. TRL's later PPOTrainer puts it
    one position behind where there is one.
    """
    _checks.check_floating("scores", scores)
    _checks.check_mask("mask", mask)
    _checks.check_number("kl_coef", kl_coef)
    if mask.dim() != 2:
        raise ValueError(f"`mask` must be [B, T], got {list(mask.shape)}")
    _checks.check_shape("scores", scores, mask.shape[:1], "[B]")
    _checks.check_device("scores", scores, "mask", mask)
    dtype = scores.dtype
    if kl is not None:
        _checks.check_floating("kl", kl)
        _checks.check_shape("kl", kl, mask.shape, "that of `mask`")
        _checks.check_device("kl", kl, "mask", mask)
        dtype = torch.promote_types(dtype, kl.dtype)
    elif kl_coef != 0:
        raise ValueError(f"`kl_coef` is {kl_coef}: `kl` is needed")
    dtype = stat_dtype(dtype)
    following = mask.sum(1, keepdim=True) - mask.cumsum(1)
    rewards = torch.where(mask & (following == 0), scores[:, None].to(dtype), 0.0)
    return rewards if kl is None else rewards - kl_coef * torch.where(mask, kl, 0.0).to(dtype)


@torch.no_grad()
def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """``1 - 1 / (alpha length)`` clamped to [0, 1]: lambda of the advantages, longer for longer responses.

    Up to ``1 / alpha`` tokens it is 0, also for an empty row; the paper does not say.

    Args:
        lengths: [B] counted tokens per row, integer or floating.
        alpha: positive.

    Returns:
        [B] float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: lengths that are not [B], an `alpha` that is not positive.

    Source: VAPO (2504.05118), eq. 8.
    """
    _checks.check_tensor("lengths", lengths)
    if lengths.dim() != 1:
        raise ValueError(f"`lengths` must be [B], got {list(lengths.shape)}")
    _checks.check_positive("alpha", alpha)
    return (1 - 1 / (alpha * lengths.to(stat_dtype(lengths.dtype)))).clamp(0, 1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - mean((values - returns)^2) / Var(returns)`` over what counts: 1 is perfect, 0 what the best constant reaches.

    A constant error counts as an error, so that it is below 0 for values that are worse than that constant. NaN where the
    returns do not vary or nothing counts.

    Args:
        values: [...] floating.
        returns: shape of `values`.
        mask: bool, shape of `values`, True = counts. NaN behind it changes nothing.

    Returns:
        Scalar float32 (float64 if one of values and returns is), detached.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.

    Source: TRL up to 0.11, with the biased variance in place of the unbiased one; scikit-learn calls it R^2.
    """
    _checks.check_floating("values", values)
    _checks.check_floating("returns", returns)
    _checks.check_mask("mask", mask)
    for name, value in {"returns": returns, "mask": mask}.items():
        _checks.check_shape(name, value, values.shape, "that of `values`")
        _checks.check_device(name, value, "values", values)
    errors, spread = masked_moments(returns.double() - values.double(), mask), masked_moments(returns, mask)
    return explained_by_moments(errors, spread).to(stat_dtype(torch.promote_types(values.dtype, returns.dtype)))


def explained_by_moments(errors: Moments, returns: Moments) -> Tensor:
    """`explained_variance` of the moments of errors and returns, which processes can share; scalar float64."""
    squared = errors.m2 + errors.count * errors.mean.square()
    return torch.where(returns.m2 > 0, 1 - squared / returns.m2, torch.nan)
