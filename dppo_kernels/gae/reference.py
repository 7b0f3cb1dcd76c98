"""The definition of generalised advantage estimation: a loop over time, backwards, vectorised over the batch."""

import torch
from torch import Tensor


def gae_ref(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    bootstrap: Tensor | None,  # [B]
    gamma: float,
    lam: float | Tensor,  # scalar or [B]
    lam_value: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """advantages, returns [B, T] in `dtype`. Masked positions are skipped: value and accumulators carry over them."""
    rewards, values = (torch.where(mask, x, 0.0).to(dtype) for x in (rewards, values))
    next_value = rewards.new_zeros(len(mask)) if bootstrap is None else bootstrap.to(dtype)
    advantage = torch.zeros_like(next_value)
    for_return = torch.zeros_like(next_value)
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    decay = gamma * lam
    decay_value = decay if lam_value is None else gamma * lam_value
    for t in reversed(range(mask.shape[1])):
        here, value = mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        advantage = torch.where(here, delta + decay * advantage, advantage)
        for_return = torch.where(here, delta + decay_value * for_return, for_return)
        next_value = torch.where(here, value, next_value)
        advantages[:, t] = torch.where(here, advantage, 0.0)
        returns[:, t] = torch.where(here, for_return + value, 0.0)
    return advantages, returns
