"""Row-chunked torch implementation for logits that already exist: about a million of them are upcast at one time.

Rows that are ignored, or get no upstream gradient, are never read; their gradient rows are written as zeros.
"""

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._row_stats import RowStats, Upstream, logits_gradient, pick_columns
from dppo_kernels._tiling import chunks, pick_row_chunk


def token_logprobs_fwd(
    logits: Tensor,  # [A, B, V]
    ids: Tensor,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    ignore_index: int,
    outputs: frozenset[str],
) -> dict[str, Tensor]:
    """Outputs by name plus `row_max` and `log_sum`, for all N = A B rows."""
    n, vocab = ids.shape[0], logits.shape[2]
    rows = (ids != ignore_index).nonzero().squeeze(1)
    dtype = stat_dtype(logits.dtype)
    stats = RowStats(ids[rows], None if gather_ids is None else gather_ids[rows], outputs, dtype)
    for part in chunks(rows.shape[0], pick_row_chunk(vocab)):
        stats.update(part, 0, _scaled_rows(logits, rows[part], temperature, dtype))
    finished = stats.finish()
    return {name: value.new_zeros(n, *value.shape[1:]).index_copy_(0, rows, value) for name, value in finished.items()}


def token_logprobs_bwd(
    logits: Tensor,  # [A, B, V]
    ids: Tensor,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    upstream: Upstream,
    saved: dict[str, Tensor],  # row_max, log_sum, and entropy where it has an upstream gradient
    *,
    ignore_index: int,
    dlogits: Tensor,
) -> None:
    """Write ``dL/dlogits`` into `dlogits`, which may be `logits` itself."""
    dtype = stat_dtype(logits.dtype)
    rows, inactive = upstream.partition(ids != ignore_index)
    dlogits[_place(logits, inactive)] = 0
    for part in chunks(rows.shape[0], pick_row_chunk(logits.shape[2])):
        taken = rows[part]
        dz = logits_gradient(
            _scaled_rows(logits, taken, temperature, dtype),
            0,
            row_max=saved["row_max"][taken],
            log_sum=saved["log_sum"][taken],
            entropy=saved["entropy"][taken] if "entropy" in saved else None,
            ids=ids[taken],
            gather_ids=None if gather_ids is None else gather_ids[taken],
            upstream=upstream.take(taken, dtype),
        )
        if isinstance(temperature, Tensor):
            dz /= temperature[taken, None]
        elif temperature != 1.0:
            dz /= temperature
        dlogits[_place(logits, taken)] = dz.to(dlogits.dtype)


def topk_logprobs_fwd(
    logits: Tensor, sampled_ids: Tensor, k: int, temperature: float | Tensor, *, check_values: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids [N, K+1], logprobs [N, K+1], valid [N, K+1], sampled_logprobs [N], lse [N]."""
    n, vocab = logits.shape
    dtype = stat_dtype(logits.dtype)
    ids = sampled_ids.new_empty(n, k + 1)
    logprobs = logits.new_empty((n, k + 1), dtype=dtype)
    sampled_logprobs, lse = (logits.new_empty(n, dtype=dtype) for _ in range(2))
    every_row = torch.arange(n, device=logits.device)
    for part in chunks(n, pick_row_chunk(vocab)):
        z = _scaled_rows(logits[None], every_row[part], temperature, dtype)
        top, top_ids = _topk_lowest_id(z, k)
        sampled = sampled_ids[part, None]
        sampled_z = pick_columns(z, sampled, 0)
        if check_values:
            check_finite_maximum(top[:, 0], part.start)
        # Shifted by the maximum, the normaliser loses nothing when logits are large.
        row_max = top[:, :1]
        log_sum = (z - row_max).exp_().sum(1, keepdim=True).log()
        outside = ~(top_ids == sampled).any(1, keepdim=True)
        ids[part] = torch.cat([top_ids, torch.where(outside, sampled, -1)], 1)
        sampled_part = sampled_z - row_max - log_sum
        logprobs[part] = torch.cat([top - row_max - log_sum, torch.where(outside, sampled_part, 0.0)], 1)
        sampled_logprobs[part] = sampled_part.squeeze(1)
        lse[part] = (row_max + log_sum).squeeze(1)
    return ids, logprobs, ids >= 0, sampled_logprobs, lse


def check_finite_maximum(largest: Tensor, first_row: int) -> None:
    """Refuse rows whose largest logit is NaN (it sorts first), +inf, or -inf (nothing is possible)."""
    bad = ~largest.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"`logits` must have a finite maximum in every row; row {first_row + row} has {largest[row].item()}")


def _topk_lowest_id(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-K by (value descending, id ascending); `torch.topk` breaks ties in no particular order."""
    values, ids = z.topk(k, dim=1)
    # Which of the values tied with the K-th are in: the lowest ids. Only rows with more ties than places need a second look.
    kth = values[:, -1:]
    tied, places = z == kth, values == kth
    crowded = tied.sum(1) > places.sum(1)
    if bool(crowded.any()):
        columns = torch.arange(z.shape[1], device=z.device)
        lowest = columns.where(tied[crowded], z.shape[1]).topk(k, dim=1, largest=False, sorted=True).values
        rank = (places[crowded].cumsum(1) - 1).clamp_(min=0)
        ids[crowded] = torch.where(places[crowded], lowest.gather(1, rank), ids[crowded])
    ids = ids.sort(dim=1).values
    values, order = z.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _place(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into [A, B, V] of numbered rows."""
    blocks = logits.shape[1]
    return rows // blocks, rows % blocks


def _scaled_rows(logits: Tensor, rows: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor [R, V] of rows of ``logits / temperature`` in `dtype`; indexing copies, so the caller may overwrite it."""
    z = logits[_place(logits, rows)].to(dtype)
    if isinstance(temperature, Tensor):
        return z.div_(temperature[rows, None])
    return z if temperature == 1.0 else z.div_(temperature)
