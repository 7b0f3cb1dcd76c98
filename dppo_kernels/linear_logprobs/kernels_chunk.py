"""Triton kernels that turn a chunk of scaled exponentials into the operands of the gradient GEMMs; formulas in `exponentials`.

The chunk [rows, COLS] was written by `linear_logprobs.kernels_exp`. How many rows are active, and how many keep a gradient,
stays on the device.
"""

import triton
import triton.language as tl

from dppo_kernels._tl import FINITE_MINUS_INF


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
        if (target >= 0) & (target < COLS):  # ids are not checked on a device, and another rank may hold them
            tl.store(e_ptr + row.to(tl.int64) * COLS + target, tl.load(at_target_ptr + source).to(e_ptr.dtype.element_ty))
