"""Triton kernel of the value loss: loss, gradient and statistics in one read of the inputs.

    e = (v - R)^2,  e_c = (clamp(v, v_old - clip, v_old + clip) - R)^2,  loss = w / 2 sum max(e, e_c)
    dv = w (v - R), or 0 where e_c > e

Each program leaves the sums and maxima of its block, which are added in float64. Moves 4 + 1 bytes an input element of the mask
and each tensor (float32), writes 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._triton import INTERPRET, launch_on
from dppo_kernels.value_loss.reference import value_loss_fwd

BLOCK = 64 if INTERPRET else 1024
N_PARTIALS = 7  # sums of the loss, the error, clipped, the values; count; maxima of the error and the values


@triton.jit
def value_loss_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,  # bool
    weight_ptr,  # scalar
    dvalues_ptr,
    partials_ptr,  # [blocks, N_PARTIALS]
    N,
    clip,
    HAS_CLIP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    counted = tl.load(mask_ptr + offs_n, mask=offs_n < N, other=0) != 0
    value = tl.load(values_ptr + offs_n, mask=counted, other=0.0).to(tl.float32)
    target = tl.load(returns_ptr + offs_n, mask=counted, other=0.0).to(tl.float32)
    error = value - target
    squared = error * error
    larger = squared
    clipped = squared < 0.0
    if HAS_CLIP:
        old_value = tl.load(old_values_ptr + offs_n, mask=counted, other=0.0).to(tl.float32)
        clipped_error = tl.minimum(tl.maximum(value, old_value - clip), old_value + clip) - target
        clipped = clipped_error * clipped_error > squared
        larger = tl.where(clipped, clipped_error * clipped_error, squared)
    dvalues = tl.where(clipped, 0.0, error * tl.load(weight_ptr))
    tl.store(dvalues_ptr + offs_n, dvalues, mask=offs_n < N)
    partials_ptr += pid * 7
    tl.store(partials_ptr, tl.sum(larger, 0))
    tl.store(partials_ptr + 1, tl.sum(squared, 0))
    tl.store(partials_ptr + 2, tl.sum(clipped.to(tl.float32), 0))
    tl.store(partials_ptr + 3, tl.sum(value, 0))
    tl.store(partials_ptr + 4, tl.sum(counted.to(tl.float32), 0))
    tl.store(partials_ptr + 5, tl.max(tl.where(counted, squared, float("-inf")), 0))
    tl.store(partials_ptr + 6, tl.max(tl.where(counted, value, float("-inf")), 0))


def value_loss_triton(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    weight: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`value_loss_fwd` in float32."""
    n = mask.numel()
    if not n:
        return value_loss_fwd(values, old_values, returns, mask, weight, clip)
    dvalues = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    blocks = triton.cdiv(n, BLOCK)
    partials = dvalues.new_empty((blocks, N_PARTIALS))
    with launch_on(values.device):
        value_loss_kernel[(blocks,)](
            values.contiguous(),
            values if old_values is None else old_values.contiguous(),
            returns.contiguous(),
            mask.contiguous(),
            weight,
            dvalues,
            partials,
            n,
            0.0 if clip is None else clip,
            HAS_CLIP=clip is not None,
            BLOCK_N=BLOCK,
            num_warps=4,
        )
    loss, error, clipped, value, count = partials[:, :5].double().sum(0).unbind()
    largest_error, largest_value = partials[:, 5:].double().amax(0).unbind()
    any_clipped = torch.where(count > 0, (clipped > 0).double(), -torch.inf)
    packed = torch.stack([error, count, largest_error, clipped, count, any_clipped, value, count, largest_value]).view(3, 3)
    return (0.5 * weight * loss).to(weight.dtype), dvalues, packed
