"""Online softmax statistics of rows whose logits arrive in vocabulary tiles.

Kept per row, relative to the running maximum ``m`` so that nothing cancels: ``s = sum exp(z - m)``,
``d = sum exp(z - m) * (z - m)``, ``q = sum exp(z - m)^2``, and the logits of the target and the gathered ids. Then

    lse = m + log s        logprob = (z_target - m) - log s        entropy = log s - d / s
    log_sum_sq_probs = log q - 2 log s

Both terms of the entropy are >= 0, so it never turns negative by rounding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._shard import VocabShard, greatest, summed

# Public names of optional outputs, in the order ops return them. The last three carry no gradient.
OUTPUTS = ("logprobs", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# exp() of it is 0 in every dtype, and 0 * it stays finite: stands in for -inf where a product follows.
FINITE_MINUS_INF = -1e30


class Upstream(NamedTuple):
    """Gradients that arrive at the differentiable outputs; None = not used by the loss."""

    logprobs: Tensor | None  # [N]
    lse: Tensor | None  # [N]
    entropy: Tensor | None  # [N]
    gathered: Tensor | None  # [N, K]

    def any_per_row(self, counted: Tensor) -> Tensor:
        """Which of the rows that count any gradient arrives at: bool [N]."""
        active = torch.zeros_like(counted)
        for grad in self:
            if grad is not None:
                active |= (grad != 0).any(-1) if grad.dim() == 2 else grad != 0
        return active & counted

    def on_probs(self, gather_ids: Tensor | None, entropy: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) [N], in the dtype of `like` [N]: away from the target and the gathered ids ``dL/dz = p (A + B log p)``."""
        a, b = torch.zeros_like(like), torch.zeros_like(like)
        if self.lse is not None:
            a += self.lse
        if self.logprobs is not None:
            a -= self.logprobs
        if self.gathered is not None and gather_ids is not None:
            a -= self.gathered.masked_fill(gather_ids < 0, 0.0).sum(1)
        if self.entropy is not None and entropy is not None:
            a -= self.entropy * entropy
            b -= self.entropy
        return a, b

    def picked(self, ids: Tensor, gather_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(ids, gradients) [N, 1 + K or fewer] of the log-probs that a gradient arrives at; None if it arrives at none."""
        columns: list[tuple[Tensor, Tensor]] = []
        if self.logprobs is not None:
            columns.append((ids[:, None], self.logprobs[:, None]))
        if self.gathered is not None and gather_ids is not None:
            columns.append((gather_ids, self.gathered))
        if not columns:
            return None
        all_ids, gradients = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
        return all_ids, gradients

    def partition(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the rows that count and that any gradient arrives at, and of all others; both ascending.

        One row-count read: the sort stays on the device, only the length of the first part comes to the host.
        """
        active = self.any_per_row(counted)
        order = torch.sort(active.to(torch.int8), descending=True, stable=True).indices
        count = int(active.sum())
        return order[:count], order[count:]

    def take(self, rows: Tensor, dtype: torch.dtype) -> "Upstream":
        return Upstream(*(None if grad is None else grad[rows].to(dtype) for grad in self))


class RowStats:
    """Accumulators for `ids.shape[0]` rows; `update` them tile by tile, then `finish`."""

    def __init__(self, ids: Tensor, gather_ids: Tensor | None, outputs: frozenset[str], dtype: torch.dtype) -> None:
        n, device = ids.shape[0], ids.device
        self.ids, self.gather_ids, self.outputs = ids, gather_ids, outputs
        self.max = torch.full((n,), -math.inf, dtype=dtype, device=device)
        self.sum = torch.zeros(n, dtype=dtype, device=device)
        self.target = torch.zeros(n, dtype=dtype, device=device)
        self.gathered = None if gather_ids is None else torch.zeros(gather_ids.shape, dtype=dtype, device=device)
        self.dot = torch.zeros_like(self.sum) if "entropy" in outputs else None
        self.sum_sq = torch.zeros_like(self.sum) if "log_sum_sq_probs" in outputs else None
        self.total = torch.zeros_like(self.sum) if "mean_logits" in outputs else None
        self.max_before_target = torch.full_like(self.max, -math.inf) if "is_top1" in outputs else None
        self.vocab = 0

    def update(self, rows: slice, start: int, z: Tensor) -> None:
        """Fold in ``z [rows, C]``, the logits of columns ``start .. start + C``; `z` is overwritten."""
        self.vocab = max(self.vocab, start + z.shape[1])
        self.target[rows] += pick_columns(z, self.ids[rows, None], start).squeeze(1)
        if self.gathered is not None and self.gather_ids is not None:
            self.gathered[rows] += pick_columns(z, self.gather_ids[rows], start)
        if self.total is not None:
            self.total[rows] += z.sum(1)
        if self.max_before_target is not None:
            columns = torch.arange(start, start + z.shape[1], device=z.device)
            before = z.masked_fill(columns >= self.ids[rows, None], -math.inf).amax(1)
            self.max_before_target[rows] = torch.maximum(self.max_before_target[rows], before)

        old_max, old_sum = self.max[rows], self.sum[rows]
        new_max = torch.maximum(old_max, z.amax(1))
        # A row that has seen only -inf has no maximum to be relative to yet; 0 keeps exp(-inf - 0) = 0.
        anchor = new_max.masked_fill(new_max == -math.inf, 0.0)
        shift = (old_max - anchor).clamp_(min=FINITE_MINUS_INF)
        rescale = shift.exp()
        z -= anchor[:, None]
        if self.dot is None:
            e = z.exp_()
        else:
            e = z.exp()
            tile_dot = z.clamp_(min=FINITE_MINUS_INF).mul_(e).sum(1)
            self.dot[rows] = rescale * (self.dot[rows] + shift * old_sum) + tile_dot
        self.sum[rows] = rescale * old_sum + e.sum(1)
        if self.sum_sq is not None:
            self.sum_sq[rows] = rescale.square() * self.sum_sq[rows] + e.square_().sum(1)
        self.max[rows] = new_max

    def merge_ranks(self, shard: VocabShard) -> None:
        """Make the accumulators of a shard's columns those of the whole vocabulary."""
        own, (self.max, self.max_before_target) = self.max, greatest(shard, self.max.clone(), self.max_before_target)
        anchor = self.max.masked_fill(self.max == -math.inf, 0.0)
        shift = (own - anchor).clamp_(min=FINITE_MINUS_INF)
        rescale = shift.exp()
        dot = None if self.dot is None else rescale * (self.dot + shift * self.sum)
        sum_sq = None if self.sum_sq is None else rescale.square() * self.sum_sq
        parts = (rescale * self.sum, dot, sum_sq, self.total, self.target, self.gathered)
        self.sum, self.dot, self.sum_sq, self.total, self.target, self.gathered = summed(shard, *parts)
        self.vocab = shard.vocab

    def finish(self) -> dict[str, Tensor]:
        """Outputs by name, plus `row_max` and `log_sum` (whose sum is the LSE) for the backward."""
        log_sum = self.sum.log()
        out = {"row_max": self.max, "log_sum": log_sum, "lse": self.max + log_sum}
        out["logprobs"] = (self.target - self.max) - log_sum
        if self.gathered is not None and self.gather_ids is not None:
            logprobs = (self.gathered - self.max[:, None]) - log_sum[:, None]
            out["gathered"] = logprobs.masked_fill_(self.gather_ids < 0, 0.0)
        if self.dot is not None:
            out["entropy"] = log_sum - self.dot / self.sum
        if self.sum_sq is not None:
            out["log_sum_sq_probs"] = self.sum_sq.log() - 2 * log_sum
        if self.total is not None:
            out["mean_logits"] = self.total / self.vocab
        if self.max_before_target is not None:
            # torch.argmax returns the first maximum: a tie with an earlier id is not top-1.
            out["is_top1"] = (self.target >= self.max) & (self.target > self.max_before_target)
        return out


def logits_gradient(
    z: Tensor,
    start: int,
    *,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
) -> Tensor:
    """``dL/dz`` of one tile, written over ``z [R, C]``; all other arguments hold the tile's R rows.

    With p = exp(z - lse):  dz = p * (g_lse - g_logprob - sum_k g_k) - g_H * p * (log p + H) + g at the target and gathered ids.
    """
    on_probs, on_logprobs = upstream.on_probs(gather_ids, entropy, row_max)
    z -= row_max[:, None]
    z -= log_sum[:, None]
    if upstream.entropy is not None and entropy is not None:
        p = z.exp()
        z.clamp_(min=FINITE_MINUS_INF).mul_(on_logprobs[:, None])
        z += on_probs[:, None]
        z *= p
    else:
        z.exp_().mul_(on_probs[:, None])
    if upstream.logprobs is not None:
        add_to_columns(z, ids[:, None], start, upstream.logprobs[:, None])
    if upstream.gathered is not None and gather_ids is not None:
        add_to_columns(z, gather_ids, start, upstream.gathered)
    return z


def pick_columns(z: Tensor, ids: Tensor, start: int) -> Tensor:
    """``z[r, ids[r, k] - start]`` where that column is in the tile, else 0: [R, K]."""
    local = ids - start
    inside = (local >= 0) & (local < z.shape[1])
    return z.gather(1, local.clamp(0, z.shape[1] - 1)).masked_fill_(~inside, 0.0)


def add_to_columns(z: Tensor, ids: Tensor, start: int, values: Tensor) -> None:
    """In place ``z[r, ids[r, k] - start] += values[r, k]`` where that column is in the tile; duplicates accumulate."""
    local = ids - start
    inside = (local >= 0) & (local < z.shape[1])
    z.scatter_add_(1, local.clamp(0, z.shape[1] - 1), values.masked_fill(~inside, 0.0))
