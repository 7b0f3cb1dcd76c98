"""Triton kernel of GAE: reverse associative scans over chunks of a row, with carries between chunks.

    n_t = first counted value behind t                 left by (value, counted); the later pair stands in where nothing counts
    A_t = d_t + c_t A_(t+1),  (d, c) = (delta_t, gamma lambda) where t counts, (0, 1) where not
        = b_t + c'_t A_end,   b = b_early + c_early b_late,  c' = c_early c_late

One program per row, any strides, int64 addresses; a row's bits do not depend on the batch. Each element is read once (values
twice, from cache) and written once. Moments of the row's advantages are taken chunk by chunk, merged as they come.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._tiling import pick_gae_plan
from dppo_kernels._triton import capability, launch_on
from dppo_kernels.moments import merge_rows, whiten


@triton.jit
def _first_counted(late_value, late_counted, early_value, early_counted):
    return tl.where(early_counted != 0, early_value, late_value), early_counted | late_counted


@triton.jit
def _affine(late_b, late_c, early_b, early_c):
    return early_b + early_c * late_b, early_c * late_c


@triton.jit
def discounted_sums(delta, counted, decay, carry):
    """(A of every step, A of the first one)."""
    b, c = tl.associative_scan((delta, tl.where(counted, decay, 1.0)), 0, _affine, reverse=True)
    a = b + c * carry
    return a, tl.sum(tl.where(tl.arange(0, a.shape[0]) == 0, a, 0.0), 0)


@triton.jit
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,  # bool
    bootstrap_ptr,  # [B]
    decay_ptr,  # [B] or [1]: gamma lambda
    decay_value_ptr,
    advantages_ptr,  # [B, T] contiguous
    returns_ptr,  # [B, T] contiguous
    moments_ptr,  # [B, 3]: count, mean, m2
    T,
    gamma,
    stride_rewards_b,
    stride_rewards_t,
    stride_values_b,
    stride_values_t,
    stride_mask_b,
    stride_mask_t,
    stride_decay,
    stride_decay_value,
    HAS_BOOTSTRAP: tl.constexpr,
    TWO: tl.constexpr,  # a decay of its own for the returns
    MOMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rewards_ptr += row * stride_rewards_b
    values_ptr += row * stride_values_b
    mask_ptr += row * stride_mask_b
    advantages_ptr += row * T
    returns_ptr += row * T
    decay = tl.load(decay_ptr + row * stride_decay)
    decay_value = tl.load(decay_value_ptr + row * stride_decay_value)
    first = tl.arange(0, BLOCK_T) == 0
    value_behind = 0.0
    if HAS_BOOTSTRAP:
        value_behind = tl.load(bootstrap_ptr + row)
    advantage_behind, return_behind = 0.0, 0.0
    count, mean, m2 = 0.0, 0.0, 0.0
    chunks = tl.cdiv(T, BLOCK_T)
    for i in range(chunks):
        t = (chunks - 1 - i) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        counted = tl.load(mask_ptr + t * stride_mask_t, mask=t < T, other=0) != 0
        reward = tl.load(rewards_ptr + t * stride_rewards_t, mask=counted, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t * stride_values_t, mask=counted, other=0.0).to(tl.float32)
        next_counted = tl.load(mask_ptr + (t + 1) * stride_mask_t, mask=t + 1 < T, other=0) != 0
        next_value = tl.load(values_ptr + (t + 1) * stride_values_t, mask=next_counted, other=0.0).to(tl.float32)
        following, found = tl.associative_scan((next_value, next_counted.to(tl.int32)), 0, _first_counted, reverse=True)
        following = tl.where(found != 0, following, value_behind)
        value_behind = tl.sum(tl.where(first, following, 0.0), 0)
        delta = tl.where(counted, reward + gamma * following - value, 0.0)
        advantage, advantage_behind = discounted_sums(delta, counted, decay, advantage_behind)
        for_return = advantage
        if TWO:
            for_return, return_behind = discounted_sums(delta, counted, decay_value, return_behind)
        advantage = tl.where(counted, advantage, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=t < T)
        tl.store(returns_ptr + t, tl.where(counted, for_return + value, 0.0), mask=t < T)
        if MOMENTS:
            here = tl.sum(counted.to(tl.float32), 0)
            mean_here = tl.sum(advantage, 0) / tl.maximum(here, 1.0)
            apart = tl.where(counted, advantage - mean_here, 0.0)
            share = here / tl.maximum(count + here, 1.0)
            m2 += tl.sum(apart * apart, 0) + (mean_here - mean) * (mean_here - mean) * count * share
            mean += (mean_here - mean) * share
            count += here
    if MOMENTS:
        tl.store(moments_ptr + row * 3, count)
        tl.store(moments_ptr + row * 3 + 1, mean)
        tl.store(moments_ptr + row * 3 + 2, m2)


def gae_triton(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    bootstrap: Tensor | None,  # [B]
    gamma: float,
    lam: float | Tensor,  # scalar or [B]
    lam_value: float | Tensor | None,
    dtype: torch.dtype,
    whiten_advantages: bool,
) -> tuple[Tensor, Tensor]:
    """`gae_ref` in float32, and the whitening of its advantages."""
    rows, steps = mask.shape
    advantages, returns = (values.new_empty((rows, steps), dtype=dtype) for _ in range(2))
    moments = values.new_empty((rows, 3), dtype=dtype)
    if mask.numel():
        decay = _per_row(gamma, lam, values)
        decay_value = decay if lam_value is None else _per_row(gamma, lam_value, values)
        plan = pick_gae_plan(capability(values.device), steps)
        with launch_on(values.device):
            gae_kernel[(rows,)](
                rewards,
                values,
                mask,
                values if bootstrap is None else bootstrap.to(dtype).contiguous(),
                decay,
                decay_value,
                advantages,
                returns,
                moments,
                steps,
                gamma,
                *rewards.stride(),
                *values.stride(),
                *mask.stride(),
                *decay.stride(),
                *decay_value.stride(),
                HAS_BOOTSTRAP=bootstrap is not None,
                TWO=lam_value is not None,
                MOMENTS=whiten_advantages,
                BLOCK_T=plan.block_t,
                num_warps=plan.num_warps,
            )
        if whiten_advantages:
            advantages = whiten(advantages, mask, moments=merge_rows(moments))
    return advantages, returns


def _per_row(gamma: float, lam: float | Tensor, like: Tensor) -> Tensor:
    """gamma lambda, float32 [B], with a stride of 0 if it is one number."""
    if isinstance(lam, Tensor):
        return gamma * lam.float()
    return like.new_full((1,), gamma * lam, dtype=torch.float32).expand(len(like))
