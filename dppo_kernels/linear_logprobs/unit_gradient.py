"""Frozen head: the gradient of every log-prob is saved in the forward, and the backward is gathers (torch implementation).

    dlogp_k/dh = s (a_k W_k - U),   U = sum_v p_v a_v W_v,   s = logit_scale / temperature,   a = 1 - tanh^2 (soft-cap) or 1
    dL/dh = s (sum_k g_k a_k W_k - A U),   A = sum_k g_k - g_lse

Where p is near 1 the two terms cancel, so U leaves out the ids that are picked (the target and the gathered ids), whose share
is put back with the digits of 1 - p: G_j the sum of gradients at id j, its row of the head is multiplied by

    c_j = G_j - A p_j = G_j (1 - p_j) - (A - G_j) p_j

FLOPs: 2 n HV for a chunk of exponentials, 2 n HV for U, none in the backward. Saved: U [N, H], and log-probs of the picked ids.
"""

import torch
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels._shard import pipelined, summed
from dppo_kernels._tiling import WEIGHT_TILE_ELEMENTS, balanced, chunks
from dppo_kernels.linear_logprobs.exponentials import Folding
from dppo_kernels.linear_logprobs.gradient_gemms import weight_tiles
from dppo_kernels.linear_logprobs.projection import Projection


def unit_gradient_fwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    *,
    ignore_index: int,
    with_entropy: bool,
    chunk_rows: int,
) -> dict[str, Tensor]:
    """Outputs, `row_max`, `log_sum`, `unit` [N, H] and `picked` [N, 1 + K] log-probs; rows that `ids` ignores are 0."""
    n, (vocab, width) = ids.shape[0], projection.weight.shape
    rows = (ids != ignore_index).nonzero().squeeze(1)
    # While a chunk's sums come in from other ranks, the next chunk is projected.
    n_slots = 1 if projection.shard is None else 2
    size = balanced(rows.shape[0], max(1, chunk_rows // n_slots))
    slots = [projection.hidden.new_empty((min(size, rows.shape[0]), vocab), dtype=projection.dtype) for _ in range(n_slots)]
    zeros = projection.hidden.new_zeros(n, dtype=projection.dtype)
    out = {name: zeros.clone() for name in ("logprobs", "lse", "row_max", "log_sum")}
    if with_entropy:
        out["entropy"] = zeros.clone()
    out["unit"] = zeros.new_zeros(n, width)
    out["picked"] = zeros.new_zeros(n, 1 + (0 if gather_ids is None else gather_ids.shape[1]))
    # Ranks exchange the logits of all rows' ids at one time.
    target = None if projection.shard is None else projection.select(rows).target_logits(ids[rows])

    def start(number: int, part: slice) -> Folding:
        chosen = rows[part]
        gathered_ids = None if gather_ids is None else gather_ids[chosen]
        slot = slots[number % n_slots][: chosen.shape[0]]
        of_part = None if target is None else (target[0][part], None if target[1] is None else target[1][part])
        x = projection.select(chosen)
        return Folding(x, ids[chosen], gathered_ids, slot, with_entropy=with_entropy, fold_slope=True, target=of_part)

    def finish(part: slice, folding: Folding) -> None:
        chosen, x, gathered_ids = rows[part], folding.x, folding.gather_ids
        e, gathered = folding.settle()
        scores, log_total = e.scores(gathered, gathered_ids), e.log_total()
        if gathered_ids is not None:
            here = x.holds(gathered_ids)  # the others, padding and ids of other ranks, leave what is there
            e.values.scatter_reduce_(1, torch.where(here, gathered_ids, 0), (~here).to(e.values.dtype), "prod")
        unit = torch.zeros_like(out["unit"][: chosen.shape[0]])
        for cols, w in weight_tiles(x):
            unit.addmm_(e.values[:, cols], w)
        out["unit"][chosen] = unit.div_(e.total()[:, None])
        out["logprobs"][chosen] = scores.logprobs
        out["row_max"][chosen], out["log_sum"][chosen] = e.anchor, log_total
        out["lse"][chosen] = e.anchor + log_total
        out["picked"][chosen, 0] = scores.logprobs
        if scores.entropy is not None:
            out["entropy"][chosen] = scores.entropy
        if scores.gathered is not None:
            out["picked"][chosen, 1:] = scores.gathered

    pipelined(chunks(rows.shape[0], size), start, finish, n_slots)
    if gather_ids is not None:
        out["gathered"] = out["picked"][:, 1:].clone()
    return out


def unit_gradient_bwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
    saved: dict[str, Tensor],  # unit, picked, row_max, log_sum
    *,
    ignore_index: int,
) -> Tensor:
    """Gradient of hidden in its own dtype; of the head only the rows of picked ids are read."""
    hidden, weight, dtype = projection.hidden, projection.weight, projection.dtype
    rows, _ = upstream.partition(ids != ignore_index)
    active, upstream = projection.select(rows), upstream.take(rows, dtype)
    picked_ids, gradients = picked_gradients(ids[rows], None if gather_ids is None else gather_ids[rows], upstream)
    logprobs = saved["picked"][rows]
    on_probs, _ = upstream.on_probs(picked_ids[:, 1:], None, logprobs[:, 0])
    at_id = torch.zeros_like(gradients)
    repeated = torch.zeros_like(picked_ids, dtype=torch.bool)
    for k in range(picked_ids.shape[1]):
        same = picked_ids == picked_ids[:, k, None]
        at_id += torch.where(same, gradients[:, k, None], 0.0)
        repeated[:, k + 1 :] |= same[:, k + 1 :]
    factor = (at_id + on_probs[:, None]) * logprobs.exp() - at_id * torch.expm1(logprobs)
    if projection.softcap is not None:
        z = logprobs + (saved["row_max"] + saved["log_sum"])[rows, None]
        factor *= 1 - active.bent(z, slice(None)).square()
    slopes = active.row_slopes(rows.shape[0])[:, None]
    here = projection.holds(picked_ids)
    factor = factor.masked_fill_(repeated | ~here, 0.0).mul_(slopes)
    on_unit = on_probs[:, None] * slopes
    picked_ids = torch.where(here, picked_ids, 0)
    sharded = projection.shard is not None
    dhidden = torch.zeros_like(hidden, dtype=dtype if sharded else None)  # rounded once, after the sum over ranks
    for part in chunks(rows.shape[0], max(1, WEIGHT_TILE_ELEMENTS // max(hidden.shape[1], 1))):
        gradient = saved["unit"][rows[part]].mul_(on_unit[part])
        for k in range(picked_ids.shape[1]):
            gradient.addcmul_(active.rounded(weight[picked_ids[part, k]]), factor[part, k, None])
        dhidden[rows[part]] = gradient.to(dhidden.dtype)
    return summed(projection.shard, dhidden)[0].to(hidden.dtype)


def picked_gradients(ids: Tensor, gather_ids: Tensor | None, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """(ids, gradients that arrive at their log-probs) [N, 1 + K] of the target and all gathered ids, 0 where none does."""
    like = next(grad for grad in upstream if grad is not None)
    first = like.new_zeros(ids.shape) if upstream.logprobs is None else upstream.logprobs
    if gather_ids is None:
        return ids[:, None], first[:, None]
    others = like.new_zeros(gather_ids.shape) if upstream.gathered is None else upstream.gathered
    return torch.cat([ids[:, None], gather_ids], 1), torch.cat([first[:, None], others], 1)
