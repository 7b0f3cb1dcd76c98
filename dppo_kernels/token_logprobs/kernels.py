"""Triton kernels for logits that already exist: one read of them forward, one read and one write backward.

    m = max z, s = sum exp(z - m), optionally d = sum exp(z - m)(z - m), with z = logits / temperature
    dz = p (A + B log p) off the target and gathered ids; exact values written there

One program per row, any strides, int64 addresses; a row's bits do not depend on the batch. Ignored rows are not read, and in
the backward neither are rows without upstream gradient: their gradient is written as zeros. `dlogits` may be `logits` itself.
Saved for the backward: the logits, row_max, log_sum, and the entropy where it is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels._tiling import pick_row_plan
from dppo_kernels._tl import FINITE_MINUS_INF, fold_tile, nonpositive
from dppo_kernels._triton import capability, launch_on


@triton.jit
def token_logprobs_fwd_kernel(
    logits_ptr,
    ids_ptr,  # [N, K]: the target, then the gathered ids; < 0 = none
    counted_ptr,  # [N] bool
    inverse_temperature_ptr,  # [N]
    row_max_ptr,
    log_sum_ptr,
    lse_ptr,
    logprobs_ptr,
    entropy_ptr,
    gathered_ptr,  # [N, K - 1]
    B,
    V,
    K,
    stride_a,
    stride_b,
    stride_v,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row // B * stride_a + row % B * stride_b
    one = tl.arange(0, 1)
    offs_k = tl.arange(0, BLOCK_K)
    gathered_place = gathered_ptr + row * (K - 1) + offs_k - 1
    if tl.load(counted_ptr + row) != 0:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        m = tl.full([1], float("-inf"), tl.float32)
        s, d, q = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
        for col in range(0, V, BLOCK_V):
            offs_v = col + tl.arange(0, BLOCK_V)
            place = logits_ptr + offs_v.to(tl.int64) * stride_v
            z = tl.load(place, mask=offs_v < V, other=float("-inf")).to(tl.float32) * inverse_temperature
            m, s, d, q = fold_tile(z[None, :], m, s, d, q, ENTROPY, False)
        log_sum = tl.log(s)
        tl.store(row_max_ptr + row + one, m)
        tl.store(log_sum_ptr + row + one, log_sum)
        tl.store(lse_ptr + row + one, m + log_sum)
        if ENTROPY:
            tl.store(entropy_ptr + row + one, log_sum - d / s)
        ids = tl.load(ids_ptr + row * K + offs_k, mask=offs_k < K, other=-1).to(tl.int64)
        z = tl.load(logits_ptr + ids * stride_v, mask=ids >= 0, other=0.0).to(tl.float32) * inverse_temperature
        logprobs = tl.where(ids >= 0, nonpositive((z - m) - log_sum), 0.0)
        tl.store(logprobs_ptr + row + offs_k, logprobs, mask=offs_k == 0)
        tl.store(gathered_place, logprobs, mask=(offs_k > 0) & (offs_k < K))
    else:
        zero = tl.zeros([1], tl.float32)
        tl.store(row_max_ptr + row + one, zero)
        tl.store(log_sum_ptr + row + one, zero)
        tl.store(lse_ptr + row + one, zero)
        tl.store(logprobs_ptr + row + one, zero)
        if ENTROPY:
            tl.store(entropy_ptr + row + one, zero)
        tl.store(gathered_place, tl.zeros([BLOCK_K], tl.float32), mask=(offs_k > 0) & (offs_k < K))


@triton.jit
def token_logprobs_bwd_kernel(
    logits_ptr,
    dlogits_ptr,  # may be logits_ptr
    ids_ptr,  # [N, K] picked ids; < 0 = none
    upstream_ptr,  # [N, K] gradients that arrive at their log-probs
    active_ptr,  # [N] bool
    inverse_temperature_ptr,
    row_max_ptr,
    log_sum_ptr,
    on_probs_ptr,  # A
    on_logprobs_ptr,  # B
    B,
    V,
    K,
    stride_a,
    stride_b,
    stride_v,
    stride_out_a,
    stride_out_b,
    stride_out_v,
    ENTROPY: tl.constexpr,
    PICKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row // B * stride_a + row % B * stride_b
    dlogits_ptr += row // B * stride_out_a + row % B * stride_out_b
    if tl.load(active_ptr + row) != 0:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        row_max, log_sum = tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row)
        on_probs, on_logprobs = tl.load(on_probs_ptr + row), tl.load(on_logprobs_ptr + row)
        offs_k = tl.arange(0, BLOCK_K)
        if PICKED:
            ids = tl.load(ids_ptr + row * K + offs_k, mask=offs_k < K, other=-1).to(tl.int64)
            picked_z = tl.load(logits_ptr + ids * stride_v, mask=ids >= 0, other=0.0).to(tl.float32)
            picked_logp = (picked_z * inverse_temperature - row_max) - log_sum
            picked = tl.exp(picked_logp) * (on_probs + on_logprobs * tl.maximum(picked_logp, FINITE_MINUS_INF))
            for k in range(K):  # an id may be picked more than once
                picked += tl.where(ids == tl.load(ids_ptr + row * K + k), tl.load(upstream_ptr + row * K + k), 0.0)
            tl.debug_barrier()  # these logits are overwritten below, by other threads
        for col in range(0, V, BLOCK_V):
            offs_v = col + tl.arange(0, BLOCK_V)
            place = logits_ptr + offs_v.to(tl.int64) * stride_v
            z = tl.load(place, mask=offs_v < V, other=0.0).to(tl.float32)
            logp = (z * inverse_temperature - row_max) - log_sum
            dz = tl.exp(logp)
            if ENTROPY:
                dz *= on_probs + on_logprobs * tl.maximum(logp, FINITE_MINUS_INF)
            else:
                dz *= on_probs
            out = dlogits_ptr + offs_v.to(tl.int64) * stride_out_v
            tl.store(out, (dz * inverse_temperature).to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)
        if PICKED:
            tl.debug_barrier()  # after the tiles that the same places are in
            out = dlogits_ptr + ids * stride_out_v
            tl.store(out, (picked * inverse_temperature).to(dlogits_ptr.dtype.element_ty), mask=(offs_k < K) & (ids >= 0))
    else:
        for col in range(0, V, BLOCK_V):
            offs_v = col + tl.arange(0, BLOCK_V)
            out = dlogits_ptr + offs_v.to(tl.int64) * stride_out_v
            tl.store(out, tl.zeros([BLOCK_V], tl.float32).to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)


def token_logprobs_fwd(
    logits: Tensor,  # [A, B, V]
    ids: Tensor,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    ignore_index: int,
    outputs: frozenset[str],
) -> dict[str, Tensor]:
    """Outputs by name plus `row_max` and `log_sum`, for all N = A B rows."""
    n, (_, blocks, vocab) = ids.shape[0], logits.shape
    counted = ids != ignore_index
    all_ids = ids.masked_fill(~counted, -1)[:, None]
    if gather_ids is not None:
        all_ids = torch.cat([all_ids, gather_ids], 1)
    names = ("row_max", "log_sum", "lse", "logprobs", "entropy")
    out = {name: logits.new_empty(n, dtype=torch.float32) for name in names}
    gathered = logits.new_empty((n, all_ids.shape[1] - 1), dtype=torch.float32)
    if n:
        plan = pick_row_plan(capability(logits.device))
        with launch_on(logits.device):
            token_logprobs_fwd_kernel[(n,)](
                logits,
                all_ids,
                counted,
                _inverse_temperature(counted, temperature),
                *(out[name] for name in names),
                gathered,
                blocks,
                vocab,
                all_ids.shape[1],
                *logits.stride(),
                ENTROPY="entropy" in outputs,
                BLOCK_V=plan.block_v,
                BLOCK_K=triton.next_power_of_2(all_ids.shape[1]),
                num_warps=plan.num_warps,
            )
    return out if gather_ids is None else {**out, "gathered": gathered}


def token_logprobs_bwd(
    logits: Tensor,  # [A, B, V]
    ids: Tensor,
    gather_ids: Tensor | None,
    temperature: float | Tensor,
    upstream: Upstream,
    saved: dict[str, Tensor],  # row_max, log_sum, and entropy where it has an upstream gradient
    *,
    ignore_index: int,
    dlogits: Tensor,
) -> None:
    """Write ``dL/dlogits`` into `dlogits`, which may be `logits` itself."""
    n, (_, blocks, vocab) = ids.shape[0], logits.shape
    if n == 0:
        return
    picked = upstream.picked(ids, gather_ids)
    picked_ids, gradients = (ids[:, None], saved["row_max"]) if picked is None else picked
    plan = pick_row_plan(capability(logits.device))
    with launch_on(logits.device):
        token_logprobs_bwd_kernel[(n,)](
            logits,
            dlogits,
            picked_ids.contiguous(),
            gradients.float().contiguous(),
            upstream.any_per_row(ids != ignore_index),
            _inverse_temperature(ids, temperature),
            saved["row_max"],
            saved["log_sum"],
            *upstream.on_probs(gather_ids, saved.get("entropy"), saved["row_max"]),
            blocks,
            vocab,
            picked_ids.shape[1],
            *logits.stride(),
            *dlogits.stride(),
            ENTROPY=upstream.entropy is not None,
            PICKED=picked is not None,
            BLOCK_V=plan.block_v,
            BLOCK_K=triton.next_power_of_2(picked_ids.shape[1]),
            num_warps=plan.num_warps,
        )


def _inverse_temperature(rows: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.float().reciprocal()
    return rows.new_full(rows.shape, 1 / temperature, dtype=torch.float32)
