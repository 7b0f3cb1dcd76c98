"""Triton forward of the linear log-prob family: LSE partials, gathered dot products, and a fixed-order second stage.

    z = transform(h W^T + b);  per segment of V: m = max z, s = sum exp(z - m), optionally sum of e z, e^2, z and argmax
    lse = m + log s;  logprob_k = z_k - lse with z_k from a dot product of row and head row k, or m where it is clearly that

A program owns (row block, segment), walks the segment's tiles and keeps the statistics in fp32 registers; partials [S, N] are
merged in the order of segments. Neither tiles nor segments depend on N, so a row's bits do not depend on the batch it is in.
Programs that run together share a segment: a weight tile is read from device memory once per group of row blocks. Rows that
`ids` ignores are compacted away on the device, their count never reaches the host. FLOPs 2 NHV; saved: row_max, log_sum.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._row_stats import FINITE_MINUS_INF
from dppo_kernels._shard import ELSEWHERE, VocabShard, greatest, summed
from dppo_kernels._tiling import LsePlan, pick_lse_plan
from dppo_kernels._tl import fold_tile, merge_stats, nonpositive, project_tile, settle_on_max, transform_logits
from dppo_kernels._triton import INTERPRET, can_describe, capability, launch_on, operand, program_count
from dppo_kernels.linear_logprobs.projection import Projection

FINISH_ROWS = 32  # many small programs: the second stage waits for loads, not for arithmetic


@triton.jit
def compact_rows_kernel(
    source_ptr, order_ptr, count_ptr, out_ptr, H, stride_n, stride_h, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr
):
    row, offs_h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs_h < tl.where(row < tl.load(count_ptr), H, 0)  # rows beyond the count become zeros, whatever they hold
    source = tl.load(order_ptr + row).to(tl.int64) * stride_n + offs_h.to(tl.int64) * stride_h
    values = tl.load(source_ptr + source, mask=inside, other=0.0)
    if UPCAST:
        values = values.to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * H + offs_h, values.to(out_ptr.dtype.element_ty), mask=offs_h < H)


@triton.jit
def linear_lse_fwd_kernel(
    hidden,  # pointer or descriptor of the compacted rows [N, H]
    weight,  # pointer or descriptor [V, H]
    bias_ptr,
    inverse_temperature_ptr,
    count_ptr,
    max_ptr,  # this and the next five: [S, N]; those not asked for are not touched
    sum_ptr,
    dot_ptr,
    sum_sq_ptr,
    total_ptr,
    argmax_ptr,
    N,
    V,
    H,
    scale,
    softcap,
    stride_weight_v,
    stride_weight_h,
    low_hidden_ptr,  # compacted rows [N, R], contiguous like the next
    low_weight_ptr,  # [V, R]
    R,
    LOW_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SEGMENT_TILES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
):
    count = tl.load(count_ptr)
    n_blocks, n_segments = tl.cdiv(count, BLOCK_N), tl.cdiv(V, BLOCK_V * SEGMENT_TILES)
    for item in range(tl.program_id(0), n_blocks * n_segments, tl.num_programs(0)):
        first_block = item // (GROUP_BLOCKS * n_segments) * GROUP_BLOCKS
        group_size = min(n_blocks - first_block, GROUP_BLOCKS)
        within = item % (GROUP_BLOCKS * n_segments)
        segment = within // group_size
        row = (first_block + within % group_size) * BLOCK_N
        offs_n = row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < count
        inverse_temperature = tl.load(inverse_temperature_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        s, d, q, total = (
            tl.zeros([BLOCK_N], tl.float32),
            tl.zeros([BLOCK_N], tl.float32),
            tl.zeros([BLOCK_N], tl.float32),
            tl.zeros([BLOCK_N], tl.float32),
        )
        best = tl.zeros([BLOCK_N], tl.int32)
        first_tile = segment * SEGMENT_TILES
        for tile in range(first_tile, min(first_tile + SEGMENT_TILES, tl.cdiv(V, BLOCK_V))):
            col = tile * BLOCK_V
            offs_v = col + tl.arange(0, BLOCK_V)
            z = project_tile(
                hidden, weight, bias_ptr, low_hidden_ptr, low_weight_ptr, row, col, N, V, H, R,
                stride_weight_v, stride_weight_h, HAS_BIAS, LOW_RANK, DESCRIPTOR, UPCAST, BLOCK_N, BLOCK_V, BLOCK_H, BLOCK_R,
            )  # fmt: skip
            z, _ = transform_logits(z, scale, softcap, inverse_temperature, HAS_SOFTCAP)
            if TOTAL:
                total += tl.sum(tl.where(offs_v[None, :] < V, z, 0.0), 1)
            if col + BLOCK_V > V:  # the last tile only
                z = tl.where(offs_v[None, :] < V, z, float("-inf"))
            if ARGMAX:
                tile_max, tile_best = tl.max(z, 1, return_indices=True)
                best = tl.where(tile_max > m, col + tile_best, best)  # a tie stays with the lower id
            m, s, d, q = fold_tile(z, m, s, d, q, ENTROPY, SUM_SQ)
        out = segment.to(tl.int64) * N + offs_n
        tl.store(max_ptr + out, m, mask=mask_n)
        tl.store(sum_ptr + out, s, mask=mask_n)
        if ENTROPY:
            tl.store(dot_ptr + out, d, mask=mask_n)
        if SUM_SQ:
            tl.store(sum_sq_ptr + out, q, mask=mask_n)
        if TOTAL:
            tl.store(total_ptr + out, total, mask=mask_n)
        if ARGMAX:
            tl.store(argmax_ptr + out, best, mask=mask_n)


@triton.jit
def gather_dot_kernel(
    hidden_ptr,  # compacted rows [N, H]
    weight_ptr,
    bias_ptr,
    ids_ptr,  # [N, K] in the caller's order; < 0 = none
    inverse_temperature_ptr,
    order_ptr,
    count_ptr,
    out_ptr,  # [N, K] in compacted order
    K,
    H,
    scale,
    softcap,
    stride_weight_v,
    stride_weight_h,
    low_hidden_ptr,  # compacted rows [N, R], contiguous like the next
    low_weight_ptr,  # [V, R]
    R,
    LOW_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(count_ptr):
        offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + tl.load(order_ptr + row).to(tl.int64) * K + offs_k, mask=offs_k < K, other=-1).to(tl.int64)
        z = tl.zeros([BLOCK_K], tl.float32)
        for k in range(0, H, BLOCK_H):
            offs_h = k + tl.arange(0, BLOCK_H)
            h = tl.load(hidden_ptr + row.to(tl.int64) * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
            inside = (ids[:, None] >= 0) & (offs_h[None, :] < H)
            place = ids[:, None] * stride_weight_v + offs_h[None, :].to(tl.int64) * stride_weight_h
            w = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
            z += tl.sum(h[None, :] * w, 1)
        if LOW_RANK:
            for k in range(0, R, BLOCK_R):
                offs_r = k + tl.arange(0, BLOCK_R)
                h = tl.load(low_hidden_ptr + row.to(tl.int64) * R + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)
                inside = (ids[:, None] >= 0) & (offs_r[None, :] < R)
                place = ids[:, None] * R + offs_r[None, :]
                w = tl.load(low_weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
                z += tl.sum(h[None, :] * w, 1)
        if HAS_BIAS:
            z += tl.load(bias_ptr + ids, mask=ids >= 0, other=0.0).to(tl.float32)
        z, _ = transform_logits(z, scale, softcap, tl.load(inverse_temperature_ptr + row), HAS_SOFTCAP)
        tl.store(out_ptr + row.to(tl.int64) * K + offs_k, z, mask=offs_k < K)


@triton.jit
def linear_finish_kernel(
    max_ptr,
    sum_ptr,
    dot_ptr,
    sum_sq_ptr,
    total_ptr,
    argmax_ptr,
    z_ptr,  # [N, K]: the target's logit, then those of the gathered ids
    ids_ptr,  # [N, K]
    order_ptr,
    count_ptr,
    row_max_ptr,  # outputs, in the caller's order
    log_sum_ptr,
    lse_ptr,
    logprobs_ptr,
    entropy_ptr,
    log_sum_sq_ptr,
    mean_ptr,
    is_top1_ptr,
    gathered_ptr,  # [N, K - 1]
    N,
    V,
    K,
    n_segments,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    active = offs_n < tl.load(count_ptr)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s, d, q, total = (
        tl.zeros([BLOCK_N], tl.float32),
        tl.zeros([BLOCK_N], tl.float32),
        tl.zeros([BLOCK_N], tl.float32),
        tl.zeros([BLOCK_N], tl.float32),
    )
    best = tl.zeros([BLOCK_N], tl.int32)
    for segment in range(n_segments):
        place = tl.cast(segment, tl.int64) * N + offs_n
        m2 = tl.load(max_ptr + place, mask=active, other=0.0)
        s2 = tl.load(sum_ptr + place, mask=active, other=1.0)
        d2, q2 = d, q
        if ENTROPY:
            d2 = tl.load(dot_ptr + place, mask=active, other=0.0)
        if SUM_SQ:
            q2 = tl.load(sum_sq_ptr + place, mask=active, other=1.0)
        if TOTAL:
            total += tl.load(total_ptr + place, mask=active, other=0.0)
        if ARGMAX:
            best = tl.where(m2 > m, tl.load(argmax_ptr + place, mask=active, other=0), best)
        m, s, d, q = merge_stats(m, s, d, q, m2, s2, d2, q2, ENTROPY, SUM_SQ)
    log_sum = tl.log(s)
    row = tl.load(order_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    tl.store(row_max_ptr + row, tl.where(active, m, 0.0), mask=mask_n)
    tl.store(log_sum_ptr + row, tl.where(active, log_sum, 0.0), mask=mask_n)
    tl.store(lse_ptr + row, tl.where(active, m + log_sum, 0.0), mask=mask_n)
    target = settle_on_max(tl.load(z_ptr + offs_n.to(tl.int64) * K, mask=active, other=0.0), m, log_sum)
    tl.store(logprobs_ptr + row, tl.where(active, nonpositive((target - m) - log_sum), 0.0), mask=mask_n)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(active, log_sum - d / s, 0.0), mask=mask_n)
    if SUM_SQ:
        tl.store(log_sum_sq_ptr + row, tl.where(active, tl.log(q) - 2 * log_sum, 0.0), mask=mask_n)
    if TOTAL:
        tl.store(mean_ptr + row, tl.where(active, total / V, 0.0), mask=mask_n)
    if ARGMAX:
        tl.store(is_top1_ptr + row, active & (best == tl.load(ids_ptr + row * K, mask=mask_n, other=-1)), mask=mask_n)
    for k in range(1, K):
        z = settle_on_max(tl.load(z_ptr + offs_n.to(tl.int64) * K + k, mask=active, other=0.0), m, log_sum)
        wanted = active & (tl.load(ids_ptr + row * K + k, mask=mask_n, other=-1) >= 0)
        tl.store(gathered_ptr + row * (K - 1) + k - 1, tl.where(wanted, nonpositive((z - m) - log_sum), 0.0), mask=mask_n)


class CompactRows(NamedTuple):
    """Active rows first, in their order; how many there are stays on the device."""

    hidden: Tensor  # [N, H] in the compute dtype; zeros beyond the count
    order: Tensor  # [N] int64: the caller's row of each compacted row
    n_active: Tensor  # [1] int32
    inverse_temperature: Tensor  # [N] fp32
    low_rank: tuple[Tensor, Tensor] | None  # [N, r] like hidden, and the low-rank weight [V, r]; contiguous, rounded

    def low_rank_arguments(self) -> dict[str, Any]:
        """What a projecting kernel takes for them; its other pointers stand in where there are none."""
        if self.low_rank is None:
            nothing = {"low_hidden_ptr": self.hidden, "low_weight_ptr": self.hidden, "R": 0}
            return {**nothing, "LOW_RANK": False, "BLOCK_R": 16}
        hidden, weight = self.low_rank
        rank = weight.shape[1]
        operands = {"low_hidden_ptr": hidden, "low_weight_ptr": weight, "R": rank}
        return {**operands, "LOW_RANK": True, "BLOCK_R": rank_block(rank)}


def rank_block(rank: int) -> int:
    """Of a low-rank product: the least a matrix unit takes, and no more than a tile of the head's."""
    return min(32, max(16, triton.next_power_of_2(rank)))


def compact_rows(projection: Projection, active: Tensor, like: CompactRows | None = None) -> CompactRows:
    """Gather the rows of `hidden` where `active` [N]; reads no other row and does not wait for the device.

    `like` holds other hidden states of the same rows, whose order serves again.
    """
    n, compute_dtype = active.shape[0], projection.compute_dtype
    if like is None:
        order = torch.sort(active.to(torch.int8), descending=True, stable=True).indices
        count = active.sum(dtype=torch.int32).reshape(1)
    else:
        order, count = like.order, like.n_active

    def compact(source: Tensor) -> Tensor:
        # The kernel rounds to the compute dtype as it stores, except in the interpreter, which rounds bfloat16 wrongly.
        source = source.to(compute_dtype) if INTERPRET else source
        width = source.shape[1]
        compacted = source.new_empty((n, width), dtype=torch.float32 if INTERPRET else compute_dtype)
        block = min(1024, triton.next_power_of_2(max(width, 1)))
        if n:
            compact_rows_kernel[(n, triton.cdiv(width, block))](
                source, order, count, compacted, width, *source.stride(), UPCAST=INTERPRET, BLOCK_H=block
            )
        return compacted

    if isinstance(projection.temperature, Tensor):
        inverse_temperature = projection.temperature.float()[order].reciprocal()
    else:
        inverse_temperature = projection.hidden.new_full((n,), 1 / projection.temperature, dtype=torch.float32)
    low_rank = None
    if projection.low_rank is not None:
        low_hidden, low_weight = projection.low_rank
        low_rank = compact(low_hidden), low_weight.to(compute_dtype).contiguous()
    return CompactRows(compact(projection.hidden), order, count, inverse_temperature, low_rank)


def gather_logits(projection: Projection, weight: Tensor, rows: CompactRows, ids: Tensor) -> Tensor:
    """Logits [N, K] of `ids` [N, K], compacted; 0 where an id is negative or not here, unset where a row is inactive."""
    n, k = ids.shape
    width = projection.hidden.shape[1]
    z = rows.hidden.new_empty((n, k), dtype=torch.float32)
    if projection.shard is not None:
        ids = torch.where(projection.holds(ids), ids, -1)
    block_k = min(16, triton.next_power_of_2(k))
    if n:
        gather_dot_kernel[(n, triton.cdiv(k, block_k))](
            rows.hidden,
            weight,
            projection.bias if projection.bias is not None else weight,
            ids,
            rows.inverse_temperature,
            rows.order,
            rows.n_active,
            z,
            k,
            width,
            projection.logit_scale,
            projection.softcap or 1.0,
            *weight.stride(),
            HAS_BIAS=projection.bias is not None,
            HAS_SOFTCAP=projection.softcap is not None,
            **rows.low_rank_arguments(),
            BLOCK_K=block_k,
            BLOCK_H=min(256, triton.next_power_of_2(max(width, 1))),
        )
    return z


def linear_logprobs_fwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    *,
    ignore_index: int,
    outputs: frozenset[str],
    plan: LsePlan | None = None,
    descriptors: bool | None = None,
) -> dict[str, Tensor]:
    """Outputs by name plus `row_max` and `log_sum`, for all N rows; rows that `ids` ignores never enter a GEMM and are 0.

    `plan` and `descriptors` override what the device and the strides would choose.
    """
    n = ids.shape[0]
    vocab, width = projection.weight.shape
    weight = projection.weight.to(projection.compute_dtype)
    device = projection.hidden.device
    counted = ids != ignore_index
    all_ids = ids.masked_fill(~counted, -1)[:, None]
    if gather_ids is not None:
        all_ids = torch.cat([all_ids, gather_ids], 1)

    def rowwise(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, dtype=dtype, device=device)

    asked = {name: name in outputs for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")}
    names = ("row_max", "log_sum", "lse", "logprobs", "entropy", "log_sum_sq_probs", "mean_logits")
    out = {name: rowwise() for name in names}
    out["is_top1"] = rowwise(torch.bool)
    if gather_ids is not None:
        out["gathered"] = torch.empty(gather_ids.shape, dtype=torch.float32, device=device)
    if n == 0:
        return out
    with launch_on(device):
        rows = compact_rows(projection, counted)
        (z,) = summed(projection.shard, gather_logits(projection, weight, rows, all_ids))
        described = can_describe(device, rows.hidden, weight, wanted=descriptors)
        plan = plan or pick_lse_plan(capability(device), weight.dtype, described)
        n_segments = triton.cdiv(vocab, plan.block_v * plan.segment_tiles)
        # max, sum, sum e z, sum e^2, sum z, argmax by segment; those not asked for are never touched.
        sizes = [(n_segments, n) if keep else (1,) for keep in (True, True, *asked.values())]
        dtypes = (*(torch.float32,) * 5, torch.int32)
        partials = [torch.empty(size, dtype=dtype, device=device) for size, dtype in zip(sizes, dtypes, strict=True)]
        flags = {
            "ENTROPY": asked["entropy"],
            "SUM_SQ": asked["log_sum_sq_probs"],
            "TOTAL": asked["mean_logits"],
            "ARGMAX": asked["is_top1"],
        }
        items = triton.cdiv(n, plan.block_n) * n_segments
        linear_lse_fwd_kernel[(min(program_count(device), items),)](
            operand(rows.hidden, (plan.block_n, plan.block_h), described),
            operand(weight, (plan.block_v, plan.block_h), described),
            projection.bias if projection.bias is not None else weight,
            rows.inverse_temperature,
            rows.n_active,
            *partials,
            n,
            vocab,
            width,
            projection.logit_scale,
            projection.softcap or 1.0,
            *weight.stride(),
            HAS_BIAS=projection.bias is not None,
            HAS_SOFTCAP=projection.softcap is not None,
            DESCRIPTOR=described,
            UPCAST=INTERPRET,
            BLOCK_N=plan.block_n,
            BLOCK_V=plan.block_v,
            BLOCK_H=plan.block_h,
            SEGMENT_TILES=plan.segment_tiles,
            GROUP_BLOCKS=plan.group_blocks,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            **rows.low_rank_arguments(),
            **flags,
        )
        top1 = None
        if projection.shard is not None:
            partials, top1 = merge_ranks(projection.shard, partials, all_ids[rows.order, 0], asked)
            n_segments, flags["ARGMAX"] = 1, False
        linear_finish_kernel[(triton.cdiv(n, FINISH_ROWS),)](
            *partials,
            z,
            all_ids,
            rows.order,
            rows.n_active,
            *(out[name] for name in (*names, "is_top1")),
            out.get("gathered", z),
            n,
            projection.vocab,
            all_ids.shape[1],
            n_segments,
            BLOCK_N=FINISH_ROWS,
            num_warps=1,
            **flags,
        )
        if top1 is not None:
            live = torch.arange(n, device=device) < rows.n_active
            out["is_top1"].index_copy_(0, rows.order, top1 & live)
    return out


def merge_ranks(
    shard: VocabShard, partials: list[Tensor], targets: Tensor, asked: dict[str, bool]
) -> tuple[list[Tensor], Tensor | None]:
    """(partials of one segment, the whole vocabulary; whether the target is the first of the largest logits [N])."""
    maxima, sums, dots, sums_sq, totals, best = partials
    own = maxima.amax(0)
    (largest,) = greatest(shard, own.clone())
    shift = (maxima - largest.masked_fill(largest == -torch.inf, 0.0)).clamp_(min=FINITE_MINUS_INF)
    rescale = shift.exp()
    top1 = None
    if asked["is_top1"]:
        segment = maxima.argmax(0, keepdim=True)  # the first of several that are equal
        here = (own == largest) & (best.gather(0, segment).squeeze(0) == targets)
        # A tie with a lower id, on a rank before the target's, takes it away again.
        top1 = here.to(sums.dtype) - ((own == largest) & (targets == ELSEWHERE)).to(sums.dtype)
    parts = (
        (rescale * sums).sum(0),
        (rescale * (dots + shift * sums)).sum(0) if asked["entropy"] else None,
        (rescale.square() * sums_sq).sum(0) if asked["log_sum_sq_probs"] else None,
        totals.sum(0) if asked["mean_logits"] else None,
        top1,
    )
    *merged, top1 = summed(shard, *parts)
    kept = [old if new is None else new for new, old in zip(merged, (sums, dots, sums_sq, totals), strict=True)]
    return [largest, *kept, best], None if top1 is None else top1 == 1
