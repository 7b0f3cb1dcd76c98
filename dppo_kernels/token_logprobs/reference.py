"""Definitions for given logits, in plain torch: ``z = logits / temperature``."""

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels.linear_logprobs.reference import statistics_ref


def token_logprobs_ref(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N]
    gather_ids: Tensor | None,  # [N, K]
    temperature: float | Tensor,  # scalar or [N]
    *,
    ignore_index: int,
) -> dict[str, Tensor]:
    """Every output by name, each [N] (``gathered`` [N, K]); ignored rows are 0."""
    return statistics_ref(_scaled(logits, temperature), ids, gather_ids, ignore_index=ignore_index)


def topk_logprobs_ref(
    logits: Tensor,  # [N, V]
    sampled_ids: Tensor,  # [N]
    k: int,
    temperature: float | Tensor,  # scalar or [N]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, logprobs, valid [N, K+1], sampled_logprobs [N], lse [N]; a stable sort puts ties in order of id."""
    z = _scaled(logits, temperature)
    logp = torch.log_softmax(z, -1)
    order = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :k]
    sampled = sampled_ids[:, None].long()
    sampled_logprobs = logp.gather(1, sampled)
    outside = ~(order == sampled).any(1, keepdim=True)
    ids = torch.cat([order, torch.where(outside, sampled, -1)], 1)
    logprobs = torch.cat([logp.gather(1, order), torch.where(outside, sampled_logprobs, 0.0)], 1)
    return ids, logprobs, ids >= 0, sampled_logprobs.squeeze(1), torch.logsumexp(z, -1)


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    z = logits.to(stat_dtype(logits.dtype))
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
