"""Triton row kernel of the policy losses: everything between the row sums and the gradient GEMMs, in one pass over the rows.

Per row: log-probs of the sampled and the K gathered ids, entropy, ratio, divergence, trust-region mask or clip, KL to a
reference, loss, its derivative g by the log-prob, and the partial sums (sum, max) of every metric, in the order of
`surrogates.metric_names`. The formulas are those of `surrogates`. N rows are few: it computes in float64, in which
``1 - sum of kept probabilities`` and ``log(1 - p)`` need no care. Its torch twin is `rows.row_loss`.
"""

import triton
import triton.language as tl

from dppo_kernels._tl import nonpositive, settle_on_max
from dppo_kernels.linear_logprobs.kernels_rows import chunk_row, score_row, store_operands, store_scores

LOG_RATIO_LIMIT = tl.constexpr(20.0)  # estimators.LOG_RATIO_LIMIT
LOGPROB_CEILING = tl.constexpr(-1e-9)  # _numerics.LOGPROB_CEILING
MIN_OTHER = tl.constexpr(1e-12)  # divergence.MIN_OTHER


@triton.jit
def policy_row_kernel(
    z_ptr,  # [N, K1] logits of the id and the gathered ids, compacted order
    anchor_ptr,  # this and the next three: [rows of a chunk]
    rest_ptr,
    dot_ptr,
    top_ptr,
    order_ptr,
    inverse_temperature_ptr,  # [N] compacted order
    count_ptr,
    advantages_ptr,  # this and the next four: [N] in the caller's order
    weights_ptr,  # of the losses in the reduction
    anchor_logprobs_ptr,
    ref_ptr,
    token_weights_ptr,
    topk_ids_ptr,  # this and the next two: [N, K] in the caller's order
    rollout_topk_ptr,
    topk_valid_ptr,
    entropy_weight_ptr,  # [1] dL/dH
    logprobs_ptr,  # outputs [N] in the caller's order
    entropy_ptr,
    factor_ptr,  # this and the next five: [rows of a chunk]
    at_target_ptr,
    keep_ptr,
    on_probs_ptr,
    on_logprobs_ptr,
    offset_ptr,
    loss_ptr,  # [programs]
    stats_ptr,  # [programs, metrics, 2]
    first_row,
    first_program,
    chunk_rows,
    K1,
    scale,
    softcap,
    epsilon_low,
    epsilon_high,
    ratio_cap,
    sapo_pos,
    sapo_neg,
    beta,
    SURROGATE: tl.constexpr,  # of PolicyLossSpec
    DIVERGENCE: tl.constexpr,
    N_STATS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HAS_REF: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    HAS_TOKEN_WEIGHTS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    local_n, inside, active, place, row = chunk_row(order_ptr, count_ptr, first_row, chunk_rows, BLOCK_N)
    K = K1 - 1
    target, anchor, rest, e_target, total, log_total, logp, entropy = score_row(
        z_ptr, anchor_ptr, rest_ptr, dot_ptr, place * K1, local_n, active, ENTROPY, BLOCK_N
    )
    store_scores(logprobs_ptr, entropy_ptr, row, logp, entropy, active, ENTROPY)
    advantage = tl.load(advantages_ptr + row, mask=active, other=0.0).to(tl.float64)
    weight = tl.load(weights_ptr + row, mask=active, other=0.0).to(tl.float64)
    base = logp
    if HAS_ANCHOR:
        base = tl.load(anchor_logprobs_ptr + row, mask=active, other=0.0).to(tl.float64)
    x = logp - base
    x = tl.where(logp == base, 0.0, x)  # -inf - -inf
    ratio = tl.exp(tl.minimum(tl.maximum(x, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT))
    through = (tl.abs(x) <= LOG_RATIO_LIMIT).to(tl.float64)
    zero = tl.zeros([BLOCK_N], tl.float64)
    keep = zero + 1.0
    on_logp, on_ratio, loss = zero, zero, zero
    stats = stats_ptr + (first_program + tl.program_id(0)) * N_STATS * 2
    stat = 0
    if SURROGATE == "clip":
        low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        capped = ratio
        below_cap = zero + 1.0
        if HAS_CAP:
            capped = tl.minimum(ratio, ratio_cap)
            below_cap = (ratio <= ratio_cap).to(tl.float64)
        between = ((ratio >= low) & (ratio <= high)).to(tl.float64)
        first, second = capped * advantage, clipped * advantage
        loss = -tl.minimum(first, second)
        on_first = tl.where(first == second, 0.5, (first < second).to(tl.float64))
        on_ratio = -advantage * (on_first * below_cap + (1.0 - on_first) * between)
        clipped_low = ((ratio < low) & (advantage < 0)).to(tl.float64)
        clipped_high = ((ratio > high) & (advantage > 0)).to(tl.float64)
        keep = 1.0 - clipped_low - clipped_high
        stat = put(stats, stat, clipped_low, active)
        stat = put(stats, stat, clipped_high, active)
    elif SURROGATE == "cispo":
        on_logp = -tl.minimum(ratio, epsilon_high) * advantage
        loss = tl.where(on_logp == 0, 0.0, on_logp * logp)
        stat = put(stats, stat, (ratio > epsilon_high).to(tl.float64), active)
    elif SURROGATE == "sapo":
        tau = tl.where(advantage > 0, sapo_pos, sapo_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -advantage * (4.0 / tau) * gate
        on_ratio = -4.0 * advantage * gate * (1.0 - gate)
    else:
        if DIVERGENCE == "binary_tv":
            d = tl.abs(tl.exp(base) - tl.exp(logp))
        elif DIVERGENCE == "binary_kl":
            m = tl.exp(base)
            sampled = tl.where(m > 0, m * (base - logp), 0.0)
            others = (1.0 - m) * (log1mexp(base) - log1mexp(logp))
            d = tl.maximum(sampled + others, 0.0)
        else:
            other_m, other_p, gap, kept = zero + 1.0, zero + 1.0, zero, zero
            row_max = tl.maximum(anchor, tl.load(top_ptr + local_n, mask=active, other=0.0).to(tl.float64))
            log_sum = log_total - (row_max - anchor)
            for k in range(K):
                z = tl.load(z_ptr + place * K1 + 1 + k, mask=active, other=0.0).to(tl.float64)
                log_p = (settle_on_max(z, row_max, log_sum) - anchor) - log_total
                log_p = tl.where(tl.load(topk_ids_ptr + row * K + k, mask=active, other=-1) >= 0, nonpositive(log_p), 0.0)
                log_m = tl.load(rollout_topk_ptr + row * K + k, mask=active, other=0.0).to(tl.float64)
                m, p = tl.exp(log_m), tl.exp(log_p)
                if HAS_VALID:
                    valid = tl.load(topk_valid_ptr + row * K + k, mask=active, other=0).to(tl.int1)
                    m, p = tl.where(valid, m, 0.0), tl.where(valid, p, 0.0)
                gap += tl.abs(m - p)
                kept += tl.where(m > 0, m * (log_m - log_p), 0.0)
                other_m -= m
                other_p -= p
            other_m, other_p = tl.maximum(other_m, MIN_OTHER), tl.maximum(other_p, MIN_OTHER)
            if DIVERGENCE == "topk_tv":
                d = (gap + tl.abs(other_m - other_p)) / 2.0
            else:
                d = tl.maximum(kept + other_m * tl.log(other_m / other_p), 0.0)
        too_high = (advantage > 0) & (logp > base) & (d > epsilon_high)
        too_low = (advantage < 0) & (logp < base) & (d > epsilon_low)
        masked = (too_high | too_low).to(tl.float64)
        keep = 1.0 - masked
        stat = put(stats, stat, d, active)
        stat = put(stats, stat, masked, active)
        stat = put(stats, stat, tl.where(advantage > 0, masked, 0.0), active)
        stat = put(stats, stat, tl.where(advantage < 0, masked, 0.0), active)
        capped = ratio
        if HAS_CAP:
            capped = tl.minimum(ratio, ratio_cap)
            stat = put(stats, stat, (ratio > ratio_cap).to(tl.float64), active)
        on_logp = -advantage * capped * keep
        loss = tl.where(on_logp == 0, 0.0, on_logp * logp)
    stat = put(stats, stat, ratio, active)
    stat = put(stats, stat, ratio * ratio, active)
    stat = put(stats, stat, tl.abs(tl.exp(logp) - tl.exp(base)), active)
    stat = put(stats, stat, base - logp, active)
    stat = put(stats, stat, -advantage * ratio * keep, active)
    if HAS_TOKEN_WEIGHTS:
        token_weight = tl.load(token_weights_ptr + row, mask=active, other=0.0).to(tl.float64)
        loss, on_logp, on_ratio = loss * token_weight, on_logp * token_weight, on_ratio * token_weight
    if HAS_REF:
        y = logp - tl.load(ref_ptr + row, mask=active, other=0.0).to(tl.float64)
        bounded = tl.minimum(tl.maximum(y, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
        k3 = tl.exp(-bounded) - 1.0 + bounded
        slope = tl.where(tl.abs(y) <= LOG_RATIO_LIMIT, 1.0 - tl.exp(-bounded), 0.0)
        if KL_WEIGHTED:
            if KL:
                on_ratio += beta * k3
            slope *= ratio
            k3 *= ratio
        if KL:
            on_logp += beta * slope
            loss += beta * k3
        stat = put(stats, stat, k3, active)
    if ENTROPY:
        stat = put(stats, stat, entropy, active)
    g = weight * (on_logp + on_ratio * ratio * through)
    loss = weight * loss
    if ENTROPY_GRADIENT:
        loss += tl.load(entropy_weight_ptr).to(tl.float64) * entropy
    tl.store(loss_ptr + first_program + tl.program_id(0), tl.sum(tl.where(active, loss, 0.0), 0))
    store_operands(
        factor_ptr, at_target_ptr, keep_ptr, on_probs_ptr, on_logprobs_ptr, offset_ptr, entropy_weight_ptr,
        inverse_temperature_ptr, g, target, rest, e_target, total, log_total, logp, entropy, place, local_n, inside, active,
        scale, softcap, HAS_SOFTCAP, ENTROPY_GRADIENT, BLOCK_N,
    )  # fmt: skip


@triton.jit
def put(stats_ptr, stat, values, active):
    """Store sum and maximum of a metric over the active rows; the place of the next one."""
    tl.store(stats_ptr + 2 * stat, tl.sum(tl.where(active, values, 0.0), 0))
    tl.store(stats_ptr + 2 * stat + 1, tl.max(tl.where(active, values, float("-inf")), 0))
    return stat + 1


@triton.jit
def log1mexp(x):
    x = tl.minimum(x, LOGPROB_CEILING)
    return tl.log(1.0 - tl.exp(x))
