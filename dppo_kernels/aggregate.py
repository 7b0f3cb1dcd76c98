"""The only reduction from tokens to a scalar."""

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels._packing import check_cu_seqlens, sequence_sums, spread

REDUCTIONS = ("token_mean", "sequence_mean", "fixed_length")


def aggregate(
    values: Tensor,
    mask: Tensor,
    reduction: str,
    *,
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
    denominator_name: str = "denominator",
) -> Tensor:
    """Reduce per-token values to a scalar; values behind the mask may be NaN.

    ``token_mean``: sum / active tokens. ``sequence_mean``: mean over sequences of each one's token mean (a sequence without
    active tokens counts as 0). ``fixed_length``: sum / (B * max_length), Dr.GRPO.

    Args:
        values: [B, T], or [N] (without `cu_seqlens` for ``token_mean`` only), or [B, 1] for one value per sequence of [B, T].
        mask: bool [B, T] or [N]; True = counts.
        reduction: one of `REDUCTIONS`.
        denominator: replaces the call's own count (active tokens; sequences B; B * max_length), so that micro-batches and ranks
            that divide by the same global number add up to the loss of the whole batch.
        max_length: tokens per sequence for ``fixed_length``.
        cu_seqlens: int [B + 1] offsets of sequences packed into [N]: sequence i begins at row ``cu_seqlens[i]``.
        denominator_name: what error messages call it.

    Raises:
        TypeError, ValueError: wrong mask dtype, shapes, reduction, or missing `max_length`.

    Source: the policy-loss table of GRPO (2402.03300), DAPO (2503.14476) and Dr.GRPO (2503.20783).
    """
    _checks.check_floating("values", values)
    _checks.check_mask("mask", mask)
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    if mask.dim() == 2 and values.shape == (mask.shape[0], 1):
        values = values.expand(mask.shape)
    _checks.check_shape("values", values, mask.shape, "that of `mask`")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "mask", mask)
    elif reduction != "token_mean" and mask.dim() != 2:
        raise ValueError(
            f"reduction {reduction!r} needs [B, T] values and mask, or [N] with `cu_seqlens`; got {list(mask.shape)}"
        )

    weights = reduction_weights(
        mask,
        reduction,
        denominator=denominator,
        max_length=max_length,
        cu_seqlens=cu_seqlens,
        dtype=stat_dtype(values.dtype),
        denominator_name=denominator_name,
    )
    return (torch.where(mask, values, 0.0) * weights).sum()


def reduction_weights(
    mask: Tensor,
    reduction: str,
    *,
    denominator: float | Tensor | None,
    max_length: int | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    denominator_name: str = "denominator",
) -> Tensor:
    """What every active token's value is multiplied by before the sum: [], or for ``sequence_mean`` [B, 1] or packed [N].

    Arguments as in `aggregate`, already checked except for the two normalisers.
    """
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"`{denominator_name}` must be one number, got shape {list(denominator.shape)}")
        denominator = denominator.reshape(())
    elif denominator is not None:
        _checks.check_positive(denominator_name, denominator)
    n_sequences = max(mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 1)
    if denominator is None:
        if reduction == "sequence_mean":
            denominator = n_sequences
        elif reduction == "token_mean":
            denominator = mask.sum().clamp(min=1)
        elif max_length is None:
            raise ValueError("reduction 'fixed_length' needs `max_length` or `denominator`")
        else:
            _checks.check_positive("max_length", max_length)
            denominator = n_sequences * max_length
    if isinstance(denominator, Tensor):
        weight = 1 / denominator.detach().to(mask.device, dtype)
    else:
        weight = torch.full((), 1 / denominator, dtype=dtype, device=mask.device)
    if reduction != "sequence_mean":
        return weight
    if cu_seqlens is None:
        return weight / mask.sum(1, keepdim=True).clamp(min=1)
    return spread(weight / sequence_sums(mask.to(dtype), cu_seqlens).clamp(min=1), cu_seqlens, mask.shape[0])
