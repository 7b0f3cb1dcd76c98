"""Triton backward of the linear log-prob family: logits recomputed strip by strip, three GEMMs per strip.

    p = exp(z - lse);  dz = p (A + B log p) off the target and gathered ids, exact values written there, times dz/d(h W^T + b)
    dhidden = dz W;  dweight = dz^T hidden;  dbias = column sums of dz

A strip [rows, columns] of dz, in the inputs' dtype, is all that exists at one time. dhidden accumulates in fp32 over strips, a
strip of dweight over row chunks; both are rounded once. Only rows with upstream gradient take part: they are compacted on the
device, their count stays there. Every sum has a fixed order. FLOPs: 2 n HV a GEMM for n active rows; frozen inputs skip theirs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels._shard import VocabShard, summed
from dppo_kernels._tiling import GradPlan, chunks, pick_grad_plan
from dppo_kernels._tl import FINITE_MINUS_INF, load_tile, project_tile, settle_on_max, transform_logits
from dppo_kernels._triton import INTERPRET, can_describe, capability, descriptor_obstacle, launch_on, operand
from dppo_kernels.linear_logprobs.kernels import CompactRows, compact_rows, gather_logits
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection


@triton.jit
def linear_dlogits_kernel(
    hidden,  # pointer or descriptor of the compacted rows [N, H]
    weight,  # pointer or descriptor [V, H]
    bias_ptr,
    inverse_temperature_ptr,
    row_max_ptr,  # this and the next three: [N] in compacted order
    log_sum_ptr,
    on_probs_ptr,  # A
    on_logprobs_ptr,  # B
    count_ptr,
    dz_ptr,  # [rows of a chunk, COLS]
    first_row,
    first_col,
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
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    local_row, local_col = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_V
    row, col = first_row + local_row, first_col + local_col
    count = tl.load(count_ptr)
    if row < count:
        offs_n, offs_v = row + tl.arange(0, BLOCK_N), col + tl.arange(0, BLOCK_V)
        mask_n = offs_n < count
        z = project_tile(
            hidden, weight, bias_ptr, low_hidden_ptr, low_weight_ptr, row, col, N, V, H, R, stride_weight_v, stride_weight_h,
            HAS_BIAS, LOW_RANK, DESCRIPTOR, UPCAST, BLOCK_N, BLOCK_V, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        inverse_temperature = tl.load(inverse_temperature_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
        z, slope = transform_logits(z, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        row_max = tl.load(row_max_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        logp = (z - row_max) - tl.load(log_sum_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        dz = tl.exp(logp)
        factor = tl.load(on_probs_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        if ENTROPY:
            on_logprobs = tl.load(on_logprobs_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
            dz *= factor + on_logprobs * tl.maximum(logp, FINITE_MINUS_INF)
        else:
            dz *= factor
        if HAS_SOFTCAP:
            dz *= slope
        dz *= scale * inverse_temperature
        # Rows beyond the count and columns beyond V are read by the GEMMs below.
        dz = tl.where(mask_n[:, None] & (offs_v[None, :] < V), dz, 0.0)
        local_n = (local_row + tl.arange(0, BLOCK_N)).to(tl.int64)
        local_v = local_col + tl.arange(0, BLOCK_V)
        place = local_n[:, None] * COLS + local_v[None, :]
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=local_v[None, :] < COLS)


@triton.jit
def picked_gradient_kernel(
    z_ptr,  # [N, K] logits of the picked ids, compacted order
    ids_ptr,  # [N, K] in compacted order; < 0 = none
    upstream_ptr,  # [N, K] gradients that arrive at their log-probs
    inverse_temperature_ptr,
    row_max_ptr,
    log_sum_ptr,
    on_probs_ptr,
    on_logprobs_ptr,
    count_ptr,
    out_ptr,  # [N, K]
    K,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dL/d(h W^T + b) at the picked ids, in full precision: where p is near 1, ``g - p g`` would lose its digits in 16 bits."""
    row = tl.program_id(0)
    if row < tl.load(count_ptr):
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        place = row.to(tl.int64) * K
        ids = tl.load(ids_ptr + place + offs_k, mask=mask_k, other=-1)
        z = tl.load(z_ptr + place + offs_k, mask=mask_k & (ids >= 0), other=0.0)
        inverse_temperature, row_max = tl.load(inverse_temperature_ptr + row), tl.load(row_max_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        z = settle_on_max(z, row_max, log_sum)
        logp = (z - row_max) - log_sum
        dz = tl.exp(logp)
        if ENTROPY:
            dz *= tl.load(on_probs_ptr + row) + tl.load(on_logprobs_ptr + row) * tl.maximum(logp, FINITE_MINUS_INF)
        else:
            dz *= tl.load(on_probs_ptr + row)
        for k in range(K):  # an id may be picked more than once
            dz += tl.where(ids == tl.load(ids_ptr + place + k), tl.load(upstream_ptr + place + k), 0.0)
        if HAS_SOFTCAP:
            bent = z / (inverse_temperature * softcap)
            dz *= 1 - bent * bent
        tl.store(out_ptr + place + offs_k, dz * scale * inverse_temperature, mask=mask_k)


@triton.jit
def scatter_picked_kernel(
    picked_ptr, ids_ptr, count_ptr, dz_ptr, first_row, first_col, V, K, COLS: tl.constexpr, BLOCK_K: tl.constexpr
):
    local_row = tl.program_id(0)
    row = first_row + local_row
    if row < tl.load(count_ptr):
        offs_k = tl.arange(0, BLOCK_K)
        place = row.to(tl.int64) * K + offs_k
        local = tl.load(ids_ptr + place, mask=offs_k < K, other=-1) - first_col
        values = tl.load(picked_ptr + place, mask=offs_k < K, other=0.0)
        # Equal ids hold equal values, so the order of these stores does not matter.
        inside = (local >= 0) & (local < COLS) & (local + first_col < V)
        tl.store(dz_ptr + local_row.to(tl.int64) * COLS + local, values.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def accumulate_gemm_kernel(
    a,  # pointer or descriptor of dz [rows of a chunk, COLS]
    b,  # pointer or descriptor: weight [V, H] for dhidden, compacted hidden [N, H] for dweight
    sum_ptr,  # fp32 [N, H] for dhidden, [COLS, H] for dweight
    out_ptr,  # dweight [V, H], written with the last chunk
    count_ptr,
    first_row,
    first_col,
    chunk_rows,
    N,
    V,
    H,
    stride_b_k,
    stride_b_h,
    stride_out_v,
    stride_out_h,
    TRANSPOSED: tl.constexpr,  # False: dhidden = dz @ weight; True: dweight = dz^T @ hidden
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, h = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_H
    rows = tl.minimum(tl.maximum(tl.load(count_ptr) - first_row, 0), chunk_rows)
    cols = tl.minimum(V - first_col, COLS)
    if TRANSPOSED:
        limit_m, limit_k, first_k, n_b, first_sum = cols, rows, first_row, N, m
    else:
        limit_m, limit_k, first_k, n_b, first_sum = rows, cols, first_col, V, first_row + m
    wanted = m < limit_m
    if not FIRST and not LAST:
        wanted = wanted & (limit_k > 0)  # adding nothing need not read and write the sums
    if wanted:
        # 64-bit addresses of the tile's corner, 32-bit offsets within: the accumulator leaves few registers for more.
        offs_m, offs_h = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_H)[None, :]
        inside = (offs_m < limit_m - m) & (offs_h < H - h)
        sum_tile = sum_ptr + first_sum.to(tl.int64) * H + h + (offs_m * H + offs_h)
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        if not FIRST:
            acc = tl.load(sum_tile, mask=inside, other=0.0)
        for k in range(0, limit_k, BLOCK_K):
            if TRANSPOSED:
                x = tl.trans(load_tile(a, k, m, chunk_rows, COLS, COLS, 1, BLOCK_K, BLOCK_M, DESCRIPTOR, UPCAST))
            else:
                x = load_tile(a, m, k, chunk_rows, COLS, COLS, 1, BLOCK_M, BLOCK_K, DESCRIPTOR, UPCAST)
            y = load_tile(b, first_k + k, h, n_b, H, stride_b_k, stride_b_h, BLOCK_K, BLOCK_H, DESCRIPTOR, UPCAST)
            acc = tl.dot(x, y, acc, input_precision="ieee")
        if LAST:
            corner = (first_col + m).to(tl.int64) * stride_out_v + h.to(tl.int64) * stride_out_h
            out_tile = out_ptr + corner + offs_m.to(tl.int64) * stride_out_v + offs_h.to(tl.int64) * stride_out_h
            tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(sum_tile, acc, mask=inside)


@triton.jit
def column_sums_kernel(
    dz_ptr,
    weight_ptr,  # [rows of a chunk] what rows are multiplied by
    sum_ptr,
    count_ptr,
    first_row,
    first_col,
    chunk_rows,
    V,
    WEIGHTED: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.minimum(tl.load(count_ptr) - first_row, chunk_rows)
    local = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (local < COLS) & (first_col + local < V)
    total = tl.load(sum_ptr + first_col + local, mask=inside, other=0.0)
    for row in range(0, rows, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        place = offs_n[:, None].to(tl.int64) * COLS + local[None, :]
        dz = tl.load(dz_ptr + place, mask=(offs_n[:, None] < rows) & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            dz *= tl.load(weight_ptr + offs_n, mask=offs_n < rows, other=0.0)[:, None]
        total += tl.sum(dz, 0)
    tl.store(sum_ptr + first_col + local, total, mask=inside)


def linear_logprobs_bwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
    saved: dict[str, Tensor],  # row_max, log_sum, and entropy where it has an upstream gradient
    *,
    ignore_index: int,
    needs: tuple[bool, ...],  # as `Needs`
    plan: GradPlan | None = None,
    descriptors: bool | None = None,
) -> Gradients:
    """Gradients of the inputs in their own dtypes; rows without upstream gradient never enter a GEMM.

    `plan` and `descriptors` override what the device and the strides would choose.
    """
    wanted = Needs(*needs)
    hidden, bias, device = projection.hidden, projection.bias, projection.hidden.device
    weight = projection.weight.to(projection.compute_dtype)
    (n, width), vocab = hidden.shape, weight.shape[0]
    # Kernels of an interpreter round bfloat16 wrongly, so there everything stays in fp32 until torch rounds it.
    stored = torch.float32 if INTERPRET else weight.dtype
    dbias_sum = hidden.new_zeros(vocab, dtype=torch.float32) if wanted.bias and bias is not None else None
    if n == 0:
        inputs = zip(projection.inputs(), wanted, strict=True)
        return Gradients(*(torch.zeros_like(x) if need and x is not None else None for x, need in inputs))
    with launch_on(device):
        active = upstream.any_per_row(ids != ignore_index)
        rows = compact_rows(projection, active)
        coefficients = upstream.on_probs(gather_ids, saved.get("entropy"), saved["row_max"])
        per_row = tuple(x[rows.order] for x in (saved["row_max"], saved["log_sum"], *coefficients))
        picked_ids, picked = _picked_gradients(projection, weight, rows, ids, gather_ids, upstream, per_row)
        described = can_describe(device, rows.hidden, weight, wanted=descriptors)
        plan = plan or pick_grad_plan(capability(device), weight.dtype, described, narrow=projection.narrow)
        row_chunks, columns = chunks(n, plan.chunk_rows), chunks(vocab, plan.strip_cols)
        chunk_rows = min(n, plan.chunk_rows)
        make = functools.partial(_Product, plan=plan, described=described, n=n, shard=projection.shard)
        products = [make(projection.weight, weight, rows.hidden, wanted.hidden, wanted.weight)]
        if projection.low_rank is not None and rows.low_rank is not None:
            low_hidden, low_weight = rows.low_rank
            needs_low = wanted.low_hidden, wanted.low_weight
            products.append(make(projection.low_rank[1], low_weight, low_hidden, *needs_low))
        # Whole row blocks: the recomputation writes zeros behind the last row, which the GEMMs read.
        dz = hidden.new_empty((triton.cdiv(chunk_rows, plan.block_n) * plan.block_n, plan.strip_cols), dtype=stored)
        launch = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
        for cols in columns:
            for part in row_chunks:
                origin = (part.start, cols.start)
                grid = triton.cdiv(chunk_rows, plan.block_n), triton.cdiv(cols.stop - cols.start, plan.block_v)
                linear_dlogits_kernel[grid](
                    operand(rows.hidden, (plan.block_n, plan.block_h), described),
                    operand(weight, (plan.block_v, plan.block_h), described),
                    bias if bias is not None else weight,
                    rows.inverse_temperature,
                    *per_row,
                    rows.n_active,
                    dz,
                    *origin,
                    n,
                    vocab,
                    width,
                    projection.logit_scale,
                    projection.softcap or 1.0,
                    *weight.stride(),
                    HAS_BIAS=bias is not None,
                    HAS_SOFTCAP=projection.softcap is not None,
                    ENTROPY=upstream.entropy is not None,
                    BLOCK_N=plan.block_n,
                    BLOCK_V=plan.block_v,
                    BLOCK_H=plan.block_h,
                    DESCRIPTOR=described,
                    UPCAST=INTERPRET,
                    COLS=plan.strip_cols,
                    **rows.low_rank_arguments(),
                    **launch,
                )
                if picked is not None:
                    k = picked_ids.shape[1]
                    scatter_picked_kernel[(chunk_rows,)](
                        picked,
                        picked_ids,
                        rows.n_active,
                        dz,
                        *origin,
                        vocab,
                        k,
                        COLS=plan.strip_cols,
                        BLOCK_K=triton.next_power_of_2(k),
                        num_warps=1,
                    )
                for product in products:
                    product.accumulate(dz, rows.n_active, part, cols, chunk_rows)
                if dbias_sum is not None:
                    column_sums_kernel[(triton.cdiv(cols.stop - cols.start, 64),)](
                        dz,
                        dz,
                        dbias_sum,
                        rows.n_active,
                        *origin,
                        chunk_rows,
                        vocab,
                        WEIGHTED=False,
                        COLS=plan.strip_cols,
                        BLOCK_N=32,
                        BLOCK_V=64,
                    )
    dhidden, dweight = products[0].gradients(hidden, rows.order)
    dbias = None if dbias_sum is None or bias is None else dbias_sum.to(bias.dtype)
    low = products[1].gradients(projection.low_rank[0], rows.order) if projection.low_rank is not None else (None, None)
    return Gradients(dhidden, dweight, dbias, *low)


class _Product:
    """``hidden @ weight^T`` as a part of the logits (all of them, or a low-rank update), and the gradients of both."""

    def __init__(
        self,
        original: Tensor,  # the weight [V, width] as it was given
        weight: Tensor,  # in the compute dtype
        hidden: Tensor,  # [N, width] compacted
        needs_hidden: bool,
        needs_weight: bool,
        plan: GradPlan,
        described: bool,
        n: int,
        shard: VocabShard | None,
    ) -> None:
        self.original, self.weight, self.hidden, self.plan, self.n = original, weight, hidden, plan, n
        self.shard = shard
        width, device = weight.shape[1], weight.device
        self.described = described and all(descriptor_obstacle(device, x) is None for x in (weight, hidden))
        self.dhidden = torch.zeros((n, width), dtype=torch.float32, device=device) if needs_hidden else None
        self.dweight = torch.zeros_like(original, dtype=torch.float32 if INTERPRET else None) if needs_weight else None
        strip = plan.strip_cols if needs_weight and n > plan.chunk_rows else 0
        self.dweight_strip = torch.empty((strip, width), dtype=torch.float32, device=device)

    def accumulate(self, dz: Tensor, count: Tensor, part: slice, cols: slice, chunk_rows: int) -> None:
        """Add what a strip [rows of a chunk, columns] of dL/d(logits before the transform) gives."""
        plan, (vocab, width) = self.plan, self.weight.shape
        block_h = gemm_columns(plan, width)
        sizes = (count, part.start, cols.start, chunk_rows, self.n, vocab, width)
        common = {
            "DESCRIPTOR": self.described,
            "UPCAST": INTERPRET,
            "COLS": plan.strip_cols,
            "BLOCK_M": plan.gemm_m,
            "BLOCK_H": block_h,
            "BLOCK_K": plan.gemm_k,
            "num_warps": plan.num_warps,
            "num_stages": plan.num_stages,
        }
        if self.dhidden is not None:
            grid = triton.cdiv(chunk_rows, plan.gemm_m), triton.cdiv(width, block_h)
            accumulate_gemm_kernel[grid](
                operand(dz, (plan.gemm_m, plan.gemm_k), self.described),
                operand(self.weight, (plan.gemm_k, block_h), self.described),
                self.dhidden,
                self.dhidden,
                *sizes,
                *self.weight.stride(),
                0,
                0,
                TRANSPOSED=False,
                FIRST=cols.start == 0,
                LAST=False,
                **common,
            )
        if self.dweight is not None:
            grid = triton.cdiv(cols.stop - cols.start, plan.gemm_m), triton.cdiv(width, block_h)
            accumulate_gemm_kernel[grid](
                operand(dz, (plan.gemm_k, plan.gemm_m), self.described),
                operand(self.hidden, (plan.gemm_k, block_h), self.described),
                self.dweight_strip,
                self.dweight,
                *sizes,
                *self.hidden.stride(),
                *self.dweight.stride(),
                TRANSPOSED=True,
                FIRST=part.start == 0,
                LAST=part.stop == self.n,
                **common,
            )

    def gradients(self, hidden: Tensor, order: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of `hidden` [N, width] in the caller's order, and of the weight; in their own dtypes."""
        dhidden = None
        if self.dhidden is not None:
            (self.dhidden,) = summed(self.shard, self.dhidden)
            dhidden = torch.empty_like(hidden).index_copy_(0, order, self.dhidden.to(hidden.dtype))
        return dhidden, None if self.dweight is None else self.dweight.to(self.original.dtype)


def gemm_columns(plan: GradPlan, width: int) -> int:
    """Columns of an accumulating GEMM's tile; a low-rank update has few."""
    return min(plan.gemm_h, max(16, triton.next_power_of_2(width)))


def _picked_gradients(
    projection: Projection,
    weight: Tensor,
    rows: CompactRows,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
    per_row: tuple[Tensor, ...],  # row_max, log_sum, A, B
) -> tuple[Tensor, Tensor | None]:
    """Ids that log-prob gradients arrive at and all of ``dz`` there, [N, K] in compacted order; None if there are none."""
    picked_and_gradients = upstream.picked(ids, gather_ids)
    if picked_and_gradients is None:
        return ids, None
    original_ids, gradients = picked_and_gradients
    picked_ids, gradients = original_ids[rows.order], gradients[rows.order].float()
    z = gather_logits(projection, weight, rows, original_ids.contiguous())
    picked = torch.empty_like(z)
    n, k = z.shape
    picked_gradient_kernel[(n,)](
        z,
        picked_ids,
        gradients,
        rows.inverse_temperature,
        *per_row,
        rows.n_active,
        picked,
        k,
        projection.logit_scale,
        projection.softcap or 1.0,
        HAS_SOFTCAP=projection.softcap is not None,
        ENTROPY=upstream.entropy is not None,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=1,
    )
    return picked_ids, picked
