"""Definition of the linear log-prob family in plain torch, any float dtype: the oracle every kernel is held to.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
    z = logit_scale * (h W^T + b) / temperature                                 (no softcap)

Autograd differentiates it, twice if asked. Row chunks are checkpointed, so that memory is one chunk of logits at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._tiling import chunks, pick_row_chunk


def linear_logprobs_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N]
    gather_ids: Tensor | None,  # [N, K]
    temperature: float | Tensor,  # scalar or [N]
    *,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    low_hidden: Tensor | None = None,  # [N, r]
    low_weight: Tensor | None = None,  # [V, r]: low_hidden @ low_weight^T is added to hidden @ weight^T
) -> dict[str, Tensor]:
    """Every output by name, each [N] (``gathered`` [N, K]); ignored rows are 0."""
    dtype = stat_dtype(hidden.dtype)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)

    def score(
        h: Tensor, low: Tensor | None, ids: Tensor, gather_ids: Tensor | None, temperature: float | Tensor
    ) -> dict[str, Tensor]:
        x = torch.nn.functional.linear(h.to(dtype), w, b)
        if low is not None and low_weight is not None:
            x = x + torch.nn.functional.linear(low.to(dtype), low_weight.to(dtype))
        z = logit_scale * x
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        return statistics_ref(z, ids, gather_ids, ignore_index=ignore_index)

    return by_row_chunks(score, (hidden, low_hidden, ids, gather_ids, temperature), pick_row_chunk(weight.shape[0]))


def by_row_chunks(score: Callable[..., dict[str, Tensor]], rowwise: tuple[Any, ...], size: int) -> dict[str, Tensor]:
    """``score(*rowwise)`` on `size` rows at a time, recomputed in the backward; what is no tensor is passed on whole."""
    parts = []
    for rows in chunks(rowwise[0].shape[0], size) or [slice(0, 0)]:
        args = [x[rows] if isinstance(x, Tensor) else x for x in rowwise]
        parts.append(checkpoint(score, *args, use_reentrant=False) if torch.is_grad_enabled() else score(*args))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def statistics_ref(z: Tensor, ids: Tensor, gather_ids: Tensor | None, *, ignore_index: int) -> dict[str, Tensor]:
    """Statistics of rows of final logits ``z [N, V]`` (temperature already applied)."""
    ignored = ids == ignore_index
    target = ids.masked_fill(ignored, 0).long()
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    finite_logp = logp.masked_fill(logp == -torch.inf, 0.0)  # 0 * -inf is NaN; lim p log p is 0
    out = {
        "logprobs": logp.gather(1, target[:, None]).squeeze(1),
        "lse": torch.logsumexp(z, -1),
        "entropy": -(p * finite_logp).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp.detach(), -1),
        "mean_logits": z.detach().mean(-1),
    }
    out = {name: value.masked_fill(ignored, 0.0) for name, value in out.items()}
    first_max = (z == z.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    out["is_top1"] = (first_max == target) & ~ignored
    if gather_ids is not None:
        gathered = logp.gather(1, gather_ids.clamp(min=0).long())
        out["gathered"] = gathered.masked_fill((gather_ids < 0) | ignored[:, None], 0.0)
    return out
