"""GAE in plain torch without a loop over time: ``A_i = sum_{j >= i} f^(j - i) delta_j`` with f = gamma lambda.

What counts is moved together, so that nothing is skipped inside a row. Within a block of K steps the sum is a product with a
[K, K] triangular matrix of powers of f (one matrix, or one a row); between blocks a carry of [B] runs backwards, T / K times.
Products are in float64: matrix products in float32 are rounded to 16 bits under settings that others choose for their models.
Their order of addition may depend on the number of rows, so that the last bit of a row may depend on its batch.
"""

import torch
from torch import Tensor

BLOCK = 64
ROW_BLOCK = 32  # with a matrix per row, which is then a quarter of the size


def gae_fwd(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    bootstrap: Tensor | None,  # [B]
    gamma: float,
    lam: float | Tensor,  # scalar or [B]
    lam_value: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`gae_ref`, to rounding."""
    if not mask.numel():
        return (torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))  # type: ignore[return-value]
    lengths = mask.sum(1)
    longest, shortest = torch.stack(lengths.aminmax()[::-1]).tolist()
    whole = shortest == mask.shape[1]
    rowwise = any(isinstance(x, Tensor) for x in (lam, lam_value))
    block = ROW_BLOCK if rowwise else BLOCK
    padded = -(-longest // block) * block
    inside = torch.arange(padded, device=mask.device) < lengths[:, None]

    def pack(x: Tensor) -> Tensor:
        out = torch.zeros(inside.shape, dtype=torch.float64, device=mask.device)
        if whole:
            out[:, :longest] = x
            return out
        return out.masked_scatter_(inside, x[mask].double())

    def unpack(x: Tensor) -> Tensor:
        out = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return out.copy_(x[:, :longest]) if whole else out.masked_scatter_(mask, x[inside].to(dtype))

    r, v = pack(rewards), pack(values)
    next_values = torch.cat([v[:, 1:], v.new_zeros(len(v), 1)], 1)
    if bootstrap is not None and padded:
        next_values.scatter_(1, (lengths - 1).clamp(min=0)[:, None], bootstrap.double()[:, None])
    delta = torch.where(inside, r + gamma * next_values - v, 0.0)
    advantages = _discounted_sums(delta, gamma, lam, block)
    for_returns = advantages if lam_value is None else _discounted_sums(delta, gamma, lam_value, block)
    return unpack(advantages), unpack(for_returns + v)


def _discounted_sums(delta: Tensor, gamma: float, lam: float | Tensor, block: int) -> Tensor:
    """``out[:, i] = sum_{j >= i} (gamma lam)^(j - i) delta[:, j]``; the width of `delta` is a multiple of `block`."""
    steps = torch.arange(block, device=delta.device)
    ahead = steps[:, None] - steps  # j - i
    f = gamma * torch.as_tensor(lam, dtype=torch.float64, device=delta.device)[..., None]
    to_next = f ** (block - steps)  # [K] or [B, K]
    matrix = torch.where(ahead >= 0, f[..., None] ** ahead.clamp(min=0), 0.0)  # [K, K] or [B, K, K]
    out = delta.view(len(delta), -1, block) @ matrix
    carries = torch.zeros_like(out[:, :, 0])
    over_block = to_next[..., 0]
    for i in reversed(range(out.shape[1] - 1)):
        carries[:, i] = out[:, i + 1, 0] + over_block * carries[:, i + 1]
    return out.addcmul_(carries[:, :, None], to_next[..., None, :]).view(delta.shape)
