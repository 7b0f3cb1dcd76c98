"""Triton row stages between a chunk's row sums and its gradient GEMMs: statistics of rows, and operands from coefficients.

    logp = (z_t - c) - log S,  S = R + e_t;   dL/d(h W^T + b) = factor * (e, with `at_target` in the target's column)

N rows are few: it computes in float64. Losses of single rows have a kernel of their own made of these parts; where coefficients
depend on other rows, `row_scores_kernel` comes before them and `row_operands_kernel` after. Formulas in `exponentials`.
"""

import triton
import triton.language as tl

from dppo_kernels._tl import nonpositive


@triton.jit
def row_scores_kernel(
    z_ptr,  # [N, K1] logits of the id and others, compacted order
    anchor_ptr,  # this and the next three: [rows of a chunk]
    rest_ptr,
    dot_ptr,
    top_ptr,
    order_ptr,
    count_ptr,
    logprobs_ptr,  # outputs [N] in the caller's order
    entropy_ptr,
    is_top1_ptr,
    first_row,
    chunk_rows,
    K1,
    ENTROPY: tl.constexpr,
    TOP1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    local_n, _, active, place, row = chunk_row(order_ptr, count_ptr, first_row, chunk_rows, BLOCK_N)
    target, _, _, _, _, _, logp, entropy = score_row(
        z_ptr, anchor_ptr, rest_ptr, dot_ptr, place * K1, local_n, active, ENTROPY, BLOCK_N
    )
    store_scores(logprobs_ptr, entropy_ptr, row, logp, entropy, active, ENTROPY)
    if TOP1:
        top = tl.load(top_ptr + local_n, mask=active, other=0.0)
        tl.store(is_top1_ptr + row, target.to(tl.float32) >= top, mask=active)


@triton.jit
def row_operands_kernel(
    dlogprobs_ptr,  # [N] g in the caller's order
    z_ptr,  # [N, K1] logits of the id and others, compacted order
    anchor_ptr,  # this and the next two: [rows of a chunk]
    rest_ptr,
    dot_ptr,
    order_ptr,
    inverse_temperature_ptr,  # [N] compacted order
    count_ptr,
    entropy_weight_ptr,  # [1] dL/dH
    factor_ptr,  # outputs [rows of a chunk]
    at_target_ptr,
    keep_ptr,
    on_probs_ptr,
    on_logprobs_ptr,
    offset_ptr,
    first_row,
    chunk_rows,
    K1,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    local_n, inside, active, place, row = chunk_row(order_ptr, count_ptr, first_row, chunk_rows, BLOCK_N)
    target, _, rest, e_target, total, log_total, logp, entropy = score_row(
        z_ptr, anchor_ptr, rest_ptr, dot_ptr, place * K1, local_n, active, ENTROPY, BLOCK_N
    )
    g = tl.load(dlogprobs_ptr + row, mask=active, other=0.0).to(tl.float64)
    store_operands(
        factor_ptr, at_target_ptr, keep_ptr, on_probs_ptr, on_logprobs_ptr, offset_ptr, entropy_weight_ptr,
        inverse_temperature_ptr, g, target, rest, e_target, total, log_total, logp, entropy, place, local_n, inside, active,
        scale, softcap, HAS_SOFTCAP, ENTROPY_GRADIENT, BLOCK_N,
    )  # fmt: skip


@triton.jit
def chunk_row(order_ptr, count_ptr, first_row, chunk_rows, BLOCK_N: tl.constexpr):
    """(row of the chunk, whether there is one, whether it is active, its place in compacted order, the caller's row)."""
    local_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local_n < chunk_rows
    active = inside & (first_row + local_n < tl.load(count_ptr))
    place = (first_row + local_n).to(tl.int64)
    return local_n, inside, active, place, tl.load(order_ptr + place, mask=active, other=0).to(tl.int64)


@triton.jit
def score_row(z_ptr, anchor_ptr, rest_ptr, dot_ptr, place, local_n, active, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr):
    """(z_t, c, R, e_t, S, log S, logp, entropy) of rows whose targets' logits are at `place`."""
    target = tl.load(z_ptr + place, mask=active, other=0.0).to(tl.float64)
    anchor = tl.load(anchor_ptr + local_n, mask=active, other=0.0).to(tl.float64)
    rest = tl.load(rest_ptr + local_n, mask=active, other=0.0).to(tl.float64)
    e_target = tl.exp(target - anchor)
    total = rest + e_target
    log_total = tl.log(total)
    logp = nonpositive((target - anchor) - log_total)
    entropy = tl.zeros([BLOCK_N], tl.float64)
    if ENTROPY:
        dot = tl.load(dot_ptr + local_n, mask=active, other=0.0).to(tl.float64)
        dot += tl.where(e_target > 0, e_target * (target - anchor), 0.0)
        entropy = tl.maximum(log_total - dot / total, 0.0)
    return target, anchor, rest, e_target, total, log_total, logp, entropy


@triton.jit
def store_scores(logprobs_ptr, entropy_ptr, row, logp, entropy, active, ENTROPY: tl.constexpr):
    tl.store(logprobs_ptr + row, logp.to(tl.float32), mask=active)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy.to(tl.float32), mask=active)


@triton.jit
def store_operands(
    factor_ptr, at_target_ptr, keep_ptr, on_probs_ptr, on_logprobs_ptr, offset_ptr, entropy_weight_ptr,
    inverse_temperature_ptr, g, target, rest, e_target, total, log_total, logp, entropy, place, local_n, inside, active,
    scale, softcap, HAS_SOFTCAP: tl.constexpr, ENTROPY_GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the gradient stage needs of the coefficients g; `keep` is 0 in rows without a gradient."""
    inverse_temperature = tl.load(inverse_temperature_ptr + place, mask=active, other=1.0).to(tl.float64)
    slope = tl.zeros([BLOCK_N], tl.float64) + 1.0
    if HAS_SOFTCAP:
        bent = target / (inverse_temperature * softcap)
        slope = 1.0 - bent * bent
    scaled = scale * inverse_temperature
    if ENTROPY_GRADIENT:
        entropy_weight = tl.load(entropy_weight_ptr).to(tl.float64)
        p = e_target / total
        finite_logp = tl.maximum(logp, -1e30)
        at_target = (g * (rest / total) - entropy_weight * p * (finite_logp + entropy)) * slope
        factor = scaled
        wanted = active
        tl.store(on_probs_ptr + local_n, (-g / total).to(tl.float32), mask=inside)
        tl.store(on_logprobs_ptr + local_n, (-entropy_weight / total).to(tl.float32), mask=inside)
        tl.store(offset_ptr + local_n, (entropy - log_total).to(tl.float32), mask=inside)
    else:
        at_target = -rest * slope
        factor = -(g / total) * scaled
        wanted = active & (g != 0)
    tl.store(factor_ptr + local_n, tl.where(wanted, factor, 0.0).to(tl.float32), mask=inside)
    tl.store(at_target_ptr + local_n, at_target.to(tl.float32), mask=inside)
    tl.store(keep_ptr + local_n, wanted.to(tl.int32), mask=inside)
