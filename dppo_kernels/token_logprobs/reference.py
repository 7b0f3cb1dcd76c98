"""Definitions for given logits, in plain torch, chunked by rows: ``z = logits / temperature``."""

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._tiling import pick_row_chunk
from dppo_kernels.linear_logprobs.reference import by_row_chunks, statistics_ref


def token_logprobs_ref(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N]
    gather_ids: Tensor | None,  # [N, K]
    temperature: float | Tensor,  # scalar or [N]
    *,
    ignore_index: int,
) -> dict[str, Tensor]:
    """Every output by name, each [N] (``gathered`` [N, K]); ignored rows are 0."""

    def score(logits: Tensor, ids: Tensor, gather_ids: Tensor | None, temperature: float | Tensor) -> dict[str, Tensor]:
        return statistics_ref(_scaled(logits, temperature), ids, gather_ids, ignore_index=ignore_index)

    return by_row_chunks(score, (logits, ids, gather_ids, temperature), pick_row_chunk(logits.shape[1]))


def topk_logprobs_ref(
    logits: Tensor,  # [N, V]
    sampled_ids: Tensor,  # [N]
    k: int,
    temperature: float | Tensor,  # scalar or [N]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, logprobs, valid [N, K+1], sampled_logprobs [N], lse [N]; a stable sort puts ties in order of id."""

    def score(logits: Tensor, sampled_ids: Tensor, temperature: float | Tensor) -> dict[str, Tensor]:
        z = _scaled(logits, temperature)
        logp = torch.log_softmax(z, -1)
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :k]
        sampled = sampled_ids[:, None].long()
        sampled_logprobs = logp.gather(1, sampled)
        outside = ~(order == sampled).any(1, keepdim=True)
        return {
            "ids": torch.cat([order, torch.where(outside, sampled, -1)], 1),
            "logprobs": torch.cat([logp.gather(1, order), torch.where(outside, sampled_logprobs, 0.0)], 1),
            "sampled_logprobs": sampled_logprobs.squeeze(1),
            "lse": torch.logsumexp(z, -1),
        }

    out = by_row_chunks(score, (logits, sampled_ids, temperature), pick_row_chunk(logits.shape[1]))
    return out["ids"], out["logprobs"], out["ids"] >= 0, out["sampled_logprobs"], out["lse"]


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    z = logits.to(stat_dtype(logits.dtype))
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
