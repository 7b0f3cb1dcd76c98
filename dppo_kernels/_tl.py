"""Triton helpers that kernel families share: matrix tiles, the logit transform, the online fold of a tile into row statistics.

Statistics are those of `_row_stats.RowStats`: m = max z, s = sum exp(z - m), d = sum exp(z - m) (z - m), q = sum exp(z - m)^2.
"""

import triton
import triton.language as tl

# Stands in for -inf where a product follows: exp() of it is 0, and 0 times it is finite.
FINITE_MINUS_INF = tl.constexpr(-1e30)

# Of `settle_on_max`: what all logits but the largest add to exp(log_sum), if they add less than shows beside 1.
LEAST_OTHERS = tl.constexpr(1e-6)


@triton.jit
def load_tile(
    source,
    row,
    col,
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile at (row, col) of a matrix, zeros outside: `source` is a tensor descriptor, or a pointer with strides."""
    if DESCRIPTOR:
        tile = source.load([row, col])
    else:
        rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        cols = (col + tl.arange(0, BLOCK_COLS)).to(tl.int64)
        inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
        tile = tl.load(source + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=inside, other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def add_low_rank(
    z,
    low_hidden_ptr,  # compacted rows [N, R], contiguous
    low_weight_ptr,  # [V, R], contiguous
    row,
    col,
    N,
    V,
    R,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`z` plus the tile at (row, col) of the low-rank product."""
    BLOCK_N: tl.constexpr = z.shape[0]
    BLOCK_V: tl.constexpr = z.shape[1]
    for k in range(0, R, BLOCK_R):
        h = load_tile(low_hidden_ptr, row, k, N, R, R, 1, BLOCK_N, BLOCK_R, False, UPCAST)
        w = load_tile(low_weight_ptr, col, k, V, R, R, 1, BLOCK_V, BLOCK_R, False, UPCAST)
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z


@triton.jit
def project_tile(
    hidden,  # pointer or descriptor of the compacted rows [N, H]
    weight,  # pointer or descriptor [V, H]
    bias_ptr,
    low_hidden_ptr,
    low_weight_ptr,
    row,
    col,
    N,
    V,
    H,
    R,
    stride_weight_v,
    stride_weight_h,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``h W^T + b`` of the tile at (row, col), with a LoRA's product, in fp32."""
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if LOW_RANK:  # first: after the main loop, it would need registers beside the whole accumulator
        z = add_low_rank(z, low_hidden_ptr, low_weight_ptr, row, col, N, V, R, UPCAST, BLOCK_R)
    for k in range(0, H, BLOCK_H):
        h = load_tile(hidden, row, k, N, H, H, 1, BLOCK_N, BLOCK_H, DESCRIPTOR, UPCAST)
        w = load_tile(weight, col, k, V, H, stride_weight_v, stride_weight_h, BLOCK_V, BLOCK_H, DESCRIPTOR, UPCAST)
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    if HAS_BIAS:
        offs_v = col + tl.arange(0, BLOCK_V)
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def tanh(x):
    """Accurate in relative terms near 0 as well, where the exponential form cancels."""
    x2 = x * x
    small = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    large = 1 - 2 / (tl.exp(2 * tl.minimum(x, 20.0)) + 1)
    return tl.where(tl.abs(x) < 0.25, small, large)


@triton.jit
def transform_logits(projected, scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """(z, slope): ``z = softcap tanh(scale x / softcap) / temperature`` or ``scale x / temperature``, slope ``1 - tanh^2``."""
    slope = projected
    if HAS_SOFTCAP:
        bent = tanh(projected * (scale / softcap))
        slope = 1 - bent * bent
        z = bent * softcap
    else:
        z = projected * scale
    # Rounded here: a compiler fuses a product into a subtraction that follows, in one kernel and not in another, and then the
    # largest logit of a row is not the maximum that was saved.
    return tl.fma(z, inverse_temperature, 0.0), slope


@triton.jit
def fold_tile(z, m, s, d, q, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """Fold ``z [rows, cols]`` into (m, s, d, q); -inf entries count as impossible."""
    new_m = tl.maximum(m, tl.max(z, 1))
    # A row that has seen only -inf has no maximum to be relative to yet.
    anchor = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.maximum(m - anchor, FINITE_MINUS_INF)
    rescale = tl.exp(shift)
    z = z - anchor[:, None]
    e = tl.exp(z)
    if ENTROPY:
        d = rescale * (d + shift * s) + tl.sum(e * tl.maximum(z, FINITE_MINUS_INF), 1)
    if SUM_SQ:
        q = rescale * rescale * q + tl.sum(e * e, 1)
    s = rescale * s + tl.sum(e, 1)
    return new_m, s, d, q


@triton.jit
def merge_stats(m, s, d, q, m2, s2, d2, q2, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """Statistics of two sets of columns together."""
    new_m = tl.maximum(m, m2)
    anchor = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift, shift2 = tl.maximum(m - anchor, FINITE_MINUS_INF), tl.maximum(m2 - anchor, FINITE_MINUS_INF)
    rescale, rescale2 = tl.exp(shift), tl.exp(shift2)
    if ENTROPY:
        d = rescale * (d + shift * s) + rescale2 * (d2 + shift2 * s2)
    if SUM_SQ:
        q = rescale * rescale * q + rescale2 * rescale2 * q2
    return new_m, rescale * s + rescale2 * s2, d, q


@triton.jit
def settle_on_max(z, row_max, log_sum):
    """Picked logits, `row_max` for the one that is a row's largest.

    A dot product of its own rounds otherwise than the tile that gave `row_max`: where p is 1, p - 1 would be the difference.
    No other logit is above ``row_max + log(exp(log_sum) - 1)``: what is nearer to `row_max` than to that is the largest.
    """
    others = tl.maximum(tl.exp(log_sum) - 1, LEAST_OTHERS)
    return tl.where(z > row_max + tl.log(others) / 2, row_max, z)


@triton.jit
def nonpositive(x):
    """A log-prob that rounding pushed above 0, and NaN as it is."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def expm1_nonpositive(x):
    """``exp(x) - 1`` for x <= 0, accurate in relative terms near 0 as well."""
    t = tanh(x / 2)
    return 2 * t / (1 - t)


@triton.jit
def log1p_nonpositive(x):
    """``log(1 + x)`` for -1 <= x <= 0, accurate in relative terms near 0 as well."""
    s = x / (2 + x)
    s2 = s * s
    small = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9)))))
    return tl.where(x > -0.25, small, tl.log(1 + x))
