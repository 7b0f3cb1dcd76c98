"""GAE by the C++ extension: allocation is here, the loops in `csrc/cpu/`. Rows in parallel, accumulators in float64.

The floor is memory: 8 + 1 bytes a step are read and 8 written (float32).
"""

import torch
from torch import Tensor

from dppo_kernels.moments import merge_rows, whitening_scale


def gae_cpp(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    bootstrap: Tensor | None,  # [B]
    gamma: float,
    lam: float | Tensor,  # scalar or [B]
    lam_value: float | Tensor | None,
    dtype: torch.dtype,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """`gae_ref`, and the whitening of its advantages in place."""
    rewards, values, mask = rewards.to(dtype).contiguous(), values.to(dtype).contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    partials = values.new_empty((len(values), 3), dtype=torch.float64) if whiten else None
    end = None if bootstrap is None else bootstrap.double().contiguous()
    second = None if lam_value is None else _numbers(lam_value)
    torch.ops.dppo_kernels_C.gae(rewards, values, mask, end, gamma, _numbers(lam), second, advantages, returns, partials)
    if partials is not None:
        moments = merge_rows(partials)
        torch.ops.dppo_kernels_C.whiten(advantages, mask, moments.mean.item(), whitening_scale(moments).item())
    return advantages, returns


def _numbers(x: float | Tensor) -> Tensor:
    """[B] or [1], float64."""
    return torch.as_tensor(x, dtype=torch.float64).reshape(-1).contiguous()
