"""Advantages of completions against the other completions of their prompt."""

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4, unbiased: bool = True
) -> Tensor:
    """Each reward minus its group's mean, divided by the group's standard deviation plus `eps`.

    A reward of NaN is unknown: it is left out of its group's statistics and its advantage is 0. A group of which one reward is
    known has advantage 0.

    Args:
        rewards: [B], consecutive groups.
        group_size: G, completions per prompt; divides B.
        scale: divide by the standard deviation (GRPO, DAPO); False only centres (Dr.GRPO, DPPO).
        eps: TRL's 1e-4; verl's is 1e-6.
        unbiased: divide squares by G - 1, as TRL and verl do, or by G.

    Returns:
        [B], float32 (float64 for float64).

    Raises:
        TypeError, ValueError: rewards that are not floating [B], a group size that does not divide B, an `eps` below 0.

    Source: GRPO (2402.03300), eq. 4; Dr.GRPO (2503.20783); DAPO (2503.14476), eq. 9.
    """
    _checks.check_floating("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"`rewards` must be [B], got {list(rewards.shape)}")
    if type(group_size) is not int or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"`group_size` must be an int that divides the {len(rewards)} rewards, got {group_size!r}")
    _checks.check_not_negative("eps", eps)
    grouped = rewards.to(stat_dtype(rewards.dtype)).view(-1, group_size)
    known = ~grouped.isnan()
    count = known.sum(1, keepdim=True)
    # Against the largest first: rewards that are all equal then differ from their mean by exactly 0, and cost no GEMM later.
    largest = torch.where(known, grouped, -torch.inf).amax(1, keepdim=True)
    below = torch.where(known, grouped - largest, 0.0)
    centred = torch.where(known, below - below.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / (count - int(unbiased)).clamp(min=1)
        deviation = variance.sqrt() + eps
        centred = torch.where(deviation > 0, centred / deviation, 0.0)
    return centred.flatten()
