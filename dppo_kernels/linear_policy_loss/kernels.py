"""Triton kernels that make, compact and use a chunk of scaled exponentials; formulas in `exponentials`.

    e_v = exp(z_v - c), 0 in the target's column;  R = sum e;  D = sum e (z - c)

A chunk [rows, COLS] of e in the inputs' dtype is written once, by the projection, and read by the two gradient GEMMs of
`linear_logprobs`. Every program writes the sums of its tile; a second stage merges them in a fixed order. Rows whose sum
overflows (an id with log-prob below -44) are flagged, and only their blocks are projected again, scaled by their maximum: no
host wait. How many rows are active, and how many keep a gradient, stays on the device.
"""

import triton
import triton.language as tl

from dppo_kernels._tl import FINITE_MINUS_INF, load_tile, transform_logits

LARGEST_SUM = tl.constexpr(2.0**64)


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
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, H, BLOCK_H):
            h = load_tile(hidden, row, k, N, H, H, 1, BLOCK_N, BLOCK_H, DESCRIPTOR, UPCAST)
            w = load_tile(weight, col, k, V, H, stride_weight_v, stride_weight_h, BLOCK_V, BLOCK_H, DESCRIPTOR, UPCAST)
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
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
    anchor_ptr,  # this and the next two: [rows of a chunk]
    total_rest_ptr,
    total_dot_ptr,
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
        tl.store(anchor_ptr + local_n, tl.where(fits, target, tl.maximum(m, target)), mask=active)
        # Every program that flags a block writes the same.
        tl.store(redo_ptr + local_n // PROJECTION_BLOCK_N, tl.full([BLOCK_N], 1, tl.int32), mask=active & (fits == 0))


@triton.jit
def entropy_gradient_kernel(
    e_ptr,  # [rows of a chunk, COLS]; becomes dL/dz
    anchor_ptr,  # this and the next three: [rows of a chunk]
    on_probs_ptr,  # -g / S
    on_logprobs_ptr,  # -(dL/dH) / S
    offset_ptr,  # H - log S
    inverse_temperature_ptr,
    count_ptr,
    first_row,
    chunk_rows,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``dz = e (a + b (log e + H - log S))``, times the derivative of a soft-cap."""
    local_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    active = (local_n < chunk_rows) & (first_row + local_n < tl.load(count_ptr))
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = local_n.to(tl.int64)[:, None] * COLS + offs_v[None, :]
    inside = active[:, None] & (offs_v[None, :] < COLS)
    e = tl.load(e_ptr + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.maximum(tl.log(e), FINITE_MINUS_INF)
    on_logprobs = tl.load(on_logprobs_ptr + local_n, mask=active, other=0.0)[:, None]
    offset = tl.load(offset_ptr + local_n, mask=active, other=0.0)[:, None]
    dz = e * (tl.load(on_probs_ptr + local_n, mask=active, other=0.0)[:, None] + on_logprobs * (z + offset))
    if HAS_SOFTCAP:
        inverse_temperature = tl.load(inverse_temperature_ptr + first_row + local_n, mask=active, other=1.0)[:, None]
        bent = (z + tl.load(anchor_ptr + local_n, mask=active, other=0.0)[:, None]) / (inverse_temperature * softcap)
        dz = tl.where(e == 0, 0.0, dz * (1 - bent * bent))
    tl.store(e_ptr + place, dz.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit
def move_rows_kernel(e_ptr, source_ptr, count_ptr, COLS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Row d of the chunk becomes row ``source[d]``; rows move from beyond the count into holes before it, so none is lost."""
    row = tl.program_id(0)
    source = tl.load(source_ptr + row)
    if (row < tl.load(count_ptr)) & (source != row):
        offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        values = tl.load(e_ptr + source.to(tl.int64) * COLS + offs_v, mask=offs_v < COLS, other=0.0)
        tl.store(e_ptr + row.to(tl.int64) * COLS + offs_v, values, mask=offs_v < COLS)


@triton.jit
def scale_rows_kernel(
    hidden_ptr,  # [N, H] compacted rows
    e_ptr,  # [rows of a chunk, COLS], moved
    ids_ptr,  # [N] compacted order
    factor_ptr,  # this and the next two: [rows of a chunk], not moved
    at_target_ptr,
    source_ptr,
    count_ptr,
    out_ptr,  # [rows of a chunk, H]
    out_factor_ptr,  # [rows of a chunk]
    first_row,
    H,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Operands of the gradient GEMMs in moved order: hidden rows times their factor, the targets' columns of the chunk."""
    row, offs_h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    kept = row < tl.load(count_ptr)
    source = tl.load(source_ptr + row)
    factor = tl.load(factor_ptr + source)
    place = (first_row + source).to(tl.int64) * H + offs_h
    # Rows beyond the count become zeros: the GEMMs read whole blocks.
    values = tl.load(hidden_ptr + place, mask=offs_h < tl.where(kept, H, 0), other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row.to(tl.int64) * H + offs_h, values.to(out_ptr.dtype.element_ty), mask=offs_h < H)
    if (tl.program_id(1) == 0) & kept:
        tl.store(out_factor_ptr + row, factor)
        target = tl.load(ids_ptr + first_row + source)
        tl.store(e_ptr + row.to(tl.int64) * COLS + target, tl.load(at_target_ptr + source).to(e_ptr.dtype.element_ty))


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
