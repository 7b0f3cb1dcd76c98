"""Triton kernels that make a chunk of scaled exponentials, and their launches; formulas in `exponentials`.

    e_v = exp(z_v - c), 0 in the target's column;  R = sum e;  D = sum e (z - c)

A chunk [rows, COLS] of e in the inputs' dtype is written once, by the projection, and read by gradient GEMMs. Every program
writes the sums of its tile; a second stage merges them in a fixed order. Rows whose sum overflows (an id with log-prob below
-44) are flagged, and only their blocks are projected again, scaled by their maximum: no host wait.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._shard import Reduction, summed
from dppo_kernels._tiling import GradPlan
from dppo_kernels._tl import FINITE_MINUS_INF, project_tile, transform_logits
from dppo_kernels._triton import operand
from dppo_kernels.linear_logprobs.kernels import CompactRows
from dppo_kernels.linear_logprobs.kernels_gemm import ChunkGemms
from dppo_kernels.linear_logprobs.projection import Projection

LARGEST_SUM = tl.constexpr(2.0**64)
LARGEST_EXPONENT = math.log(LARGEST_SUM.value)
ROW_BLOCK = 32  # rows per program of a row stage: many small programs, it waits for loads


@triton.jit
def exponentials_kernel(
    hidden,  # pointer or descriptor of the compacted rows [N, H]
    weight,  # pointer or descriptor [V, H]
    bias_ptr,
    inverse_temperature_ptr,  # this and ids: [N] in compacted order
    ids_ptr,
    anchor_ptr,  # [rows of a chunk]
    count_ptr,
    redo_ptr,  # [row blocks]
    e_ptr,  # [rows of a chunk, COLS]
    max_ptr,  # this and the next two: [vocabulary blocks, rows of a chunk]
    rest_ptr,
    dot_ptr,
    first_row,
    chunk_rows,
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
    FOLD_SLOPE: tl.constexpr,
    ENTROPY: tl.constexpr,
    REDO: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    local_row, col = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_V
    row = first_row + local_row
    count = tl.load(count_ptr)
    wanted = row < count
    if REDO:
        wanted = wanted & (tl.load(redo_ptr + tl.program_id(0)) != 0)
    if wanted:
        offs_n, offs_v = row + tl.arange(0, BLOCK_N), col + tl.arange(0, BLOCK_V)
        local_n = local_row + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < count) & (local_n < chunk_rows)
        z = project_tile(
            hidden, weight, bias_ptr, low_hidden_ptr, low_weight_ptr, row, col, N, V, H, R, stride_weight_v, stride_weight_h,
            HAS_BIAS, LOW_RANK, DESCRIPTOR, UPCAST, BLOCK_N, BLOCK_V, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        inverse_temperature = tl.load(inverse_temperature_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
        z, slope = transform_logits(z, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        ids = tl.load(ids_ptr + offs_n, mask=mask_n, other=-1)
        # Neither the target nor a column beyond V counts: e is 0 there.
        counts = (offs_v[None, :] < V) & (offs_v[None, :] != ids[:, None])
        z = tl.where(counts, z, float("-inf"))
        anchor = tl.load(anchor_ptr + local_n, mask=mask_n, other=0.0)
        partial = tl.program_id(1).to(tl.int64) * chunk_rows + local_n
        if not REDO:
            tl.store(max_ptr + partial, tl.max(z, 1), mask=mask_n)
        z -= anchor[:, None]
        e = tl.exp(z)
        tl.store(rest_ptr + partial, tl.sum(e, 1), mask=mask_n)
        if ENTROPY:
            tl.store(dot_ptr + partial, tl.sum(e * tl.maximum(z, FINITE_MINUS_INF), 1), mask=mask_n)
        if HAS_SOFTCAP and FOLD_SLOPE:
            e *= slope
        # Rows beyond the count are read by the GEMMs as well.
        e = tl.where(mask_n[:, None] & counts, e, 0.0)
        place = local_n.to(tl.int64)[:, None] * COLS + offs_v[None, :]
        tl.store(e_ptr + place, e.to(e_ptr.dtype.element_ty), mask=offs_v[None, :] < COLS)


@triton.jit
def merge_sums_kernel(
    max_ptr,  # this and the next two: [vocabulary blocks, rows of a chunk]
    rest_ptr,
    dot_ptr,
    target_ptr,  # [N] logits of the ids, compacted order
    count_ptr,
    redo_ptr,  # [row blocks of the projection]
    anchor_ptr,  # this and the next three: [rows of a chunk]
    total_rest_ptr,
    total_dot_ptr,
    top_ptr,
    first_row,
    chunk_rows,
    n_blocks,
    ENTROPY: tl.constexpr,
    REDO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROJECTION_BLOCK_N: tl.constexpr,
):
    local_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    active = (local_n < chunk_rows) & (first_row + local_n < tl.load(count_ptr))
    if REDO:
        active = active & (tl.load(redo_ptr + local_n // PROJECTION_BLOCK_N, mask=active, other=0) != 0)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    rest, dot = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for block in range(n_blocks):
        place = tl.cast(block, tl.int64) * chunk_rows + local_n
        rest += tl.load(rest_ptr + place, mask=active, other=0.0)
        if ENTROPY:
            dot += tl.load(dot_ptr + place, mask=active, other=0.0)
        if not REDO:
            m = tl.maximum(m, tl.load(max_ptr + place, mask=active, other=float("-inf")))
    tl.store(total_rest_ptr + local_n, rest, mask=active)
    if ENTROPY:
        tl.store(total_dot_ptr + local_n, dot, mask=active)
    if not REDO:
        target = tl.load(target_ptr + first_row + local_n, mask=active, other=0.0)
        fits = rest <= LARGEST_SUM  # False for NaN
        tl.store(top_ptr + local_n, m, mask=active)
        tl.store(anchor_ptr + local_n, tl.where(fits, target, tl.maximum(m, target)), mask=active)
        # Every program that flags a block writes the same.
        tl.store(redo_ptr + local_n // PROJECTION_BLOCK_N, tl.full([BLOCK_N], 1, tl.int32), mask=active & (fits == 0))


@triton.jit
def scatter_rows_kernel(
    rows_ptr,  # fp32 [rows of a chunk, H] in moved order
    factor_ptr,  # [rows of a chunk] in moved order
    source_ptr,
    order_ptr,  # [N] the caller's row of each compacted row
    count_ptr,
    out_ptr,  # fp32 [N, H] in the caller's order
    first_row,
    H,
    BLOCK_H: tl.constexpr,
):
    row, offs_h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if row < tl.load(count_ptr):
        out = tl.load(order_ptr + first_row + tl.load(source_ptr + row)).to(tl.int64)
        values = tl.load(rows_ptr + row.to(tl.int64) * H + offs_h, mask=offs_h < H, other=0.0) * tl.load(factor_ptr + row)
        tl.store(out_ptr + out * H + offs_h, values, mask=offs_h < H)


class Sums(NamedTuple):
    """Of a chunk's rows; [chunk_rows] each. Neither R nor D nor the largest logit counts the target."""

    anchor: Tensor
    rest: Tensor
    dot: Tensor
    top: Tensor  # largest logit


class ChunkLauncher(ChunkGemms):
    """Launches of one call that works on chunks of exponentials: `ChunkGemms`, and the partial sums."""

    def __init__(
        self,
        x: Projection,
        chunk_rows: int,
        *,
        with_dot: bool,
        fold_slope: bool,
        plan: GradPlan | None,
        descriptors: bool | None,
    ) -> None:
        super().__init__(x, chunk_rows, plan=plan, descriptors=descriptors)
        self.with_dot, self.fold_slope = with_dot, fold_slope
        self.partials = [self.new((self.cols // self.plan.block_v, self.chunk_rows)) for _ in range(3)]

    def new_slot(self) -> Tensor:
        """Room for a chunk of exponentials."""
        return self.new((self.chunk_rows, self.cols), self.stored)


class Projecting:
    """Exponentials of a chunk in `slot`, whose largest logits are on their way between ranks until it `settle`s.

    `ids` [N] and their logits `target` [N] are in compacted order.
    """

    def __init__(
        self, launcher: ChunkLauncher, rows: CompactRows, ids: Tensor, target: Tensor, part: slice, slot: Tensor
    ) -> None:
        self.launcher, self.rows, self.ids, self.target, self.part, self.slot = launcher, rows, ids, target, part, slot
        self.sums = Sums(*(launcher.new(launcher.chunk_rows) for _ in Sums._fields))
        self.sums.anchor[: part.stop - part.start] = target[part]
        row_blocks = launcher.chunk_rows // launcher.plan.block_n
        self.redo = torch.zeros(row_blocks, dtype=torch.int32, device=launcher.device)
        self._launch(again=False)
        # Of the part's rows alone: the rest of a block depends on tiles, which may differ from rank to rank.
        self.size, shard = part.stop - part.start, launcher.x.shard
        self.largest = None if shard is None else Reduction(shard, (self.sums.top[: self.size].clone(),), greatest=True)

    def settle(self) -> Sums:
        """The sums, of the whole vocabulary."""
        if self.largest is not None:
            self._agree()
        self._launch(again=True)
        if self.launcher.x.shard is not None:
            names = ("rest", "dot") if self.launcher.with_dot else ("rest",)
            parts = [getattr(self.sums, name)[: self.size] for name in names]
            for part, whole in zip(parts, summed(self.launcher.x.shard, *parts), strict=True):
                part.copy_(whole)
        return self.sums

    def _agree(self) -> None:
        """Anchors that all ranks share, wherever the largest logit is; which rows fit is decided by it alone."""
        assert self.largest is not None
        size = self.size
        (largest,) = self.largest.wait()
        target = self.target[self.part]
        fits = largest - target <= LARGEST_EXPONENT - math.log(self.launcher.x.vocab)  # False for NaN
        live = torch.arange(self.part.start, self.part.stop, device=target.device) < self.rows.n_active
        self.sums.top[:size] = largest
        self.sums.anchor[:size] = torch.where(fits, target, torch.maximum(largest, target))
        self.redo.zero_()
        block = torch.arange(size, device=target.device) // self.launcher.plan.block_n
        self.redo.index_put_((block,), (live & ~fits).int(), accumulate=True)

    def _launch(self, *, again: bool) -> None:
        launcher, rows, part = self.launcher, self.rows, self.part
        x, plan, sums, redo = launcher.x, launcher.plan, self.sums, self.redo
        row_blocks = launcher.chunk_rows // plan.block_n
        exponentials_kernel[(row_blocks, launcher.cols // plan.block_v)](
            operand(rows.hidden, (plan.block_n, plan.block_h), launcher.described),
            operand(launcher.weight, (plan.block_v, plan.block_h), launcher.described),
            x.bias if x.bias is not None else launcher.weight,
            rows.inverse_temperature,
            self.ids,
            sums.anchor,
            rows.n_active,
            redo,
            self.slot,
            *launcher.partials,
            part.start,
            launcher.chunk_rows,
            rows.hidden.shape[0],
            launcher.vocab,
            launcher.width,
            x.logit_scale,
            x.softcap or 1.0,
            *launcher.weight.stride(),
            **rows.low_rank_arguments(),
            HAS_BIAS=x.bias is not None,
            HAS_SOFTCAP=x.softcap is not None,
            FOLD_SLOPE=launcher.fold_slope,
            ENTROPY=launcher.with_dot,
            REDO=again,
            COLS=launcher.cols,
            BLOCK_N=plan.block_n,
            BLOCK_V=plan.block_v,
            BLOCK_H=plan.block_h,
            **launcher.tile,
            **launcher.launch,
        )
        merge_sums_kernel[(triton.cdiv(launcher.chunk_rows, ROW_BLOCK),)](
            *launcher.partials,
            self.target,
            rows.n_active,
            redo,
            *sums,
            part.start,
            launcher.chunk_rows,
            launcher.cols // plan.block_v,
            ENTROPY=launcher.with_dot,
            REDO=again,
            BLOCK_N=ROW_BLOCK,
            PROJECTION_BLOCK_N=plan.block_n,
            num_warps=1,
        )
