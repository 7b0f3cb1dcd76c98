"""Triton kernels of distillation: both models' logits, a row's divergence, and its gradient; formulas in `rows`.

    logits_kernel               z = transform(h W^T + b) in fp32, and per tile max z and sum exp(z - max)
    divergence_row_kernel       a program per row: normalisers, D, and the sums that the gradient is relative to
    divergence_gradient_kernel  a tile of a row: dL/d(h W^T + b), or dL/d(logits)

The last two serve logits that already exist as well: then a row's own pass finds its normalisers, and its temperature divides.
Partial maxima and sums are merged in the order of the vocabulary. Bytes a logit: 8 written and 16 read, and the gradient.
"""

import triton
import triton.language as tl

from dppo_kernels._tl import (
    FINITE_MINUS_INF,
    expm1_nonpositive,
    fold_tile,
    log1p_nonpositive,
    project_tile,
    transform_logits,
)

N_SAVED = tl.constexpr(5)  # of a row: max and log-sum of the student's logits and of the teacher's, and the gradient's centre


@triton.jit
def logits_kernel(
    hidden,  # pointer or descriptor of the compacted rows [N, H]
    weight,  # pointer or descriptor [V, H]
    bias_ptr,
    inverse_temperature_ptr,  # [N] in compacted order
    count_ptr,
    z_ptr,  # fp32 [rows of a chunk, COLS]
    max_ptr,  # this and the next: [rows of a chunk, vocabulary blocks]
    sum_ptr,
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
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    local_row, block = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    row, col = first_row + local_row, block * BLOCK_V
    count = tl.load(count_ptr)
    if row < count:
        z = project_tile(
            hidden, weight, bias_ptr, low_hidden_ptr, low_weight_ptr, row, col, N, V, H, R, stride_weight_v, stride_weight_h,
            HAS_BIAS, LOW_RANK, DESCRIPTOR, UPCAST, BLOCK_N, BLOCK_V, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        offs_n, offs_v = row + tl.arange(0, BLOCK_N), col + tl.arange(0, BLOCK_V)
        local_n = local_row + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < count) & (local_n < chunk_rows)
        inverse_temperature = tl.load(inverse_temperature_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
        z, _ = transform_logits(z, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        if HAS_BIAS:  # which may ban tokens; NaN stays
            z = tl.where(z < FINITE_MINUS_INF, FINITE_MINUS_INF, z)
        place = local_n.to(tl.int64)[:, None] * COLS + offs_v[None, :]
        tl.store(z_ptr + place, z, mask=mask_n[:, None] & (offs_v[None, :] < V))
        z = tl.where(offs_v[None, :] < V, z, FINITE_MINUS_INF)
        m = tl.max(z, 1)
        partial = local_n.to(tl.int64) * tl.num_programs(1) + block
        tl.store(max_ptr + partial, m, mask=mask_n)
        tl.store(sum_ptr + partial, tl.sum(tl.exp(z - m[:, None]), 1), mask=mask_n)


@triton.jit
def load_logits(row_ptr, offs_v, V, stride_v, inverse_temperature, TEMPERED: tl.constexpr):
    """Final logits of a row's tile in fp32, without -inf; columns beyond V are impossible."""
    z = tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
    if TEMPERED:
        z *= inverse_temperature
    return tl.where(z < FINITE_MINUS_INF, FINITE_MINUS_INF, z)


@triton.jit
def merge_partials(max_ptr, sum_ptr, row, n_blocks, BLOCK_P: tl.constexpr):
    """(max, log of the sum) of a row from those of its vocabulary blocks."""
    offs_p = tl.arange(0, BLOCK_P)
    place = row * n_blocks + offs_p
    maxima = tl.load(max_ptr + place, mask=offs_p < n_blocks, other=FINITE_MINUS_INF)
    m = tl.max(maxima, 0)
    sums = tl.load(sum_ptr + place, mask=offs_p < n_blocks, other=0.0)
    return m, tl.log(tl.sum(sums * tl.exp(maxima - m), 0))


@triton.jit
def normalise(row_ptr, V, stride_v, inverse_temperature, TEMPERED: tl.constexpr, BLOCK_V: tl.constexpr):
    """(max, log of the sum) of a row of logits."""
    m = tl.full([1], float("-inf"), tl.float32)
    s, d, q = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for col in range(0, V, BLOCK_V):
        z = load_logits(row_ptr, col + tl.arange(0, BLOCK_V), V, stride_v, inverse_temperature, TEMPERED)
        m, s, d, q = fold_tile(z[None, :], m, s, d, q, False, False)
    return tl.sum(m, 0), tl.sum(tl.log(s), 0)


@triton.jit
def to_mixture(u, beta):
    """(log(m / q), log(p / m)) for ``u = log(p / q)`` and the mixture m."""
    weight = tl.where(u > 0, 1 - beta, beta)
    a = log1p_nonpositive(weight * expm1_nonpositive(-tl.abs(u)))
    return tl.where(u > 0, u, 0.0) + a, tl.where(u > 0, 0.0, u) - a


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def divergence_row_kernel(
    student_ptr,  # [A, B, V]: row a * B + b
    teacher_ptr,
    max_ptr,  # this and the next three: [rows, vocabulary blocks], with PARTIALS
    sum_ptr,
    teacher_max_ptr,
    teacher_sum_ptr,
    inverse_temperature_ptr,  # [rows], with TEMPERED
    counted_ptr,  # bool [rows], unless COMPACTED
    order_ptr,  # this and the next, with COMPACTED: the caller's row of each compacted row, and how many count
    count_ptr,
    divergence_ptr,  # this and the next two in the caller's order
    entropy_ptr,
    agrees_ptr,
    saved_ptr,  # [rows, N_SAVED]
    first_row,
    B,
    V,
    n_blocks,
    n_teacher_blocks,
    beta,
    stride_a,
    stride_b,
    stride_v,
    stride_teacher_a,
    stride_teacher_b,
    stride_teacher_v,
    KIND: tl.constexpr,
    PARTIALS: tl.constexpr,
    COMPACTED: tl.constexpr,
    TEMPERED: tl.constexpr,
    ENTROPY: tl.constexpr,
    AGREEMENT: tl.constexpr,
    SHARDED: tl.constexpr,  # D and the centre are those of this rank's columns, to be added up
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out = row
    counts = first_row + row < tl.load(count_ptr) if COMPACTED else tl.load(counted_ptr + row) != 0
    if counts:
        if COMPACTED:
            out = tl.load(order_ptr + first_row + row).to(tl.int64)
        inverse_temperature = 1.0
        if TEMPERED:
            inverse_temperature = tl.load(inverse_temperature_ptr + row)
        student_ptr += row // B * stride_a + row % B * stride_b
        teacher_ptr += row // B * stride_teacher_a + row % B * stride_teacher_b
        if PARTIALS:
            m_s, log_sum_s = merge_partials(max_ptr, sum_ptr, row, n_blocks, BLOCK_P)
            m_t, log_sum_t = merge_partials(teacher_max_ptr, teacher_sum_ptr, row, n_teacher_blocks, BLOCK_P)
        else:
            m_s, log_sum_s = normalise(student_ptr, V, stride_v, inverse_temperature, TEMPERED, BLOCK_V)
            m_t, log_sum_t = normalise(teacher_ptr, V, stride_teacher_v, inverse_temperature, TEMPERED, BLOCK_V)
        first, second = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
        entropy, agreeing = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.int32)
        for col in range(0, V, BLOCK_V):
            offs_v = col + tl.arange(0, BLOCK_V)
            z_s = load_logits(student_ptr, offs_v, V, stride_v, inverse_temperature, TEMPERED)
            z_t = load_logits(teacher_ptr, offs_v, V, stride_teacher_v, inverse_temperature, TEMPERED)
            if AGREEMENT:
                agreeing |= ((z_s == m_s) & (z_t == m_t)).to(tl.int32)
            log_q, log_p = (z_s - m_s) - log_sum_s, (z_t - m_t) - log_sum_t
            q = tl.exp(log_q)
            if ENTROPY:
                entropy -= q * log_q
            if KIND == "reverse_kl":
                first += q * (log_q - log_p)
            else:
                p = tl.exp(log_p)
                if KIND == "forward_kl":
                    first += p * (log_p - log_q)
                elif KIND == "jsd":
                    student_ratio, teacher_ratio = to_mixture(log_p - log_q, beta)
                    first += p * teacher_ratio
                    second += q * student_ratio
                else:
                    first += tl.abs(q - p)
                    second += q * sign(q - p)
        divergence, centre = tl.sum(first, 0), tl.sum(second, 0)
        if KIND == "reverse_kl":
            centre = divergence
        elif KIND == "jsd":
            divergence = beta * divergence - (1 - beta) * centre
        elif KIND == "tv":
            divergence = divergence / 2
        if not SHARDED:
            divergence = tl.where(divergence < 0, 0.0, divergence)
        tl.store(divergence_ptr + out, divergence)
        if ENTROPY:
            tl.store(entropy_ptr + out, tl.sum(entropy, 0))
        if AGREEMENT:
            tl.store(agrees_ptr + out, tl.max(agreeing, 0) > 0)
        saved = saved_ptr + row * N_SAVED
        tl.store(saved, m_s)
        tl.store(saved + 1, log_sum_s)
        tl.store(saved + 2, m_t)
        tl.store(saved + 3, log_sum_t)
        tl.store(saved + 4, centre)


@triton.jit
def divergence_gradient_kernel(
    student_ptr,  # [A, B, V]: row a * B + b
    teacher_ptr,
    inverse_temperature_ptr,  # [rows], with TEMPERED or a soft-cap
    counted_ptr,  # bool [rows], unless COMPACTED
    count_ptr,  # with COMPACTED
    saved_ptr,  # [rows, N_SAVED]
    factor_ptr,  # [rows] what dD/dz is multiplied by
    out_ptr,  # [rows, COLS], zeros where a row does not count and beyond V
    first_row,
    B,
    V,
    COLS,
    beta,
    softcap,
    stride_a,
    stride_b,
    stride_v,
    stride_teacher_a,
    stride_teacher_b,
    stride_teacher_v,
    KIND: tl.constexpr,
    COMPACTED: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    counts = first_row + row < tl.load(count_ptr) if COMPACTED else tl.load(counted_ptr + row) != 0
    out = out_ptr + row * COLS + offs_v
    if counts:
        inverse_temperature = 1.0
        if TEMPERED or HAS_SOFTCAP:
            inverse_temperature = tl.load(inverse_temperature_ptr + row)
        z_s = load_logits(
            student_ptr + row // B * stride_a + row % B * stride_b, offs_v, V, stride_v, inverse_temperature, TEMPERED
        )
        z_t = load_logits(
            teacher_ptr + row // B * stride_teacher_a + row % B * stride_teacher_b,
            offs_v,
            V,
            stride_teacher_v,
            inverse_temperature,
            TEMPERED,
        )
        saved = saved_ptr + row * N_SAVED
        log_q = (z_s - tl.load(saved)) - tl.load(saved + 1)
        log_p = (z_t - tl.load(saved + 2)) - tl.load(saved + 3)
        centre = tl.load(saved + 4)
        q = tl.exp(log_q)
        if KIND == "forward_kl":
            dz = q - tl.exp(log_p)
        elif KIND == "reverse_kl":
            dz = q * ((log_q - log_p) - centre)
        elif KIND == "jsd":
            student_ratio, _ = to_mixture(log_p - log_q, beta)
            dz = q * (student_ratio - centre) * (beta - 1)
        else:
            dz = q * (sign(q - tl.exp(log_p)) - centre) / 2
        if HAS_SOFTCAP:
            bent = z_s / (inverse_temperature * softcap)
            dz *= 1 - bent * bent
        dz = tl.where(offs_v < V, dz * tl.load(factor_ptr + row), 0.0)
        tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=offs_v < COLS)
    else:
        tl.store(out, tl.zeros([BLOCK_V], out_ptr.dtype.element_ty), mask=offs_v < COLS)
