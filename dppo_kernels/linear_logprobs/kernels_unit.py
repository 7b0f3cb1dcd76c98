"""Triton implementation of the unit gradient of a frozen head; formulas in `unit_gradient`.

Forward: chunk by chunk, exponentials, zeros at the picked ids, one product with the head; rows are compacted on the device and
their count stays there. Backward: one program per row and block of H gathers the picked rows of the head. FLOPs: 4 n HV in the
forward, none in the backward; each row reads (1 + K) H entries of the head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels._shard import pipelined, summed
from dppo_kernels._tiling import ROW_BLOCKS, GradPlan, chunks, kind_of
from dppo_kernels._tl import LEAST_OTHERS, expm1_nonpositive
from dppo_kernels._triton import INTERPRET, launch_on
from dppo_kernels.linear_logprobs.exponentials import Exponentials
from dppo_kernels.linear_logprobs.kernels import compact_rows, gather_logits
from dppo_kernels.linear_logprobs.kernels_bwd import scatter_picked_kernel
from dppo_kernels.linear_logprobs.kernels_exp import ChunkLauncher, Projecting, scatter_rows_kernel
from dppo_kernels.linear_logprobs.projection import Projection
from dppo_kernels.linear_logprobs.unit_gradient import picked_gradients

GATHER_TILE = 4096  # entries of the head a program holds


@triton.jit
def unit_gradient_kernel(
    unit_ptr,  # [N, H]
    weight_ptr,
    ids_ptr,  # this and the next two: [N, K] target and gathered ids; < 0 = none
    gradients_ptr,
    logprobs_ptr,
    on_probs_ptr,  # this and the next three: [N]
    lse_ptr,
    inverse_temperature_ptr,
    active_ptr,  # bool
    out_ptr,
    K,
    H,
    scale,
    softcap,
    stride_weight_v,
    stride_weight_h,
    stride_out_n,
    stride_out_h,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    gradient = tl.zeros([BLOCK_H], tl.float32)
    if tl.load(active_ptr + row):
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        ids = tl.load(ids_ptr + row * K + offs_k, mask=mask_k, other=-1)
        logp = tl.load(logprobs_ptr + row * K + offs_k, mask=mask_k, other=0.0)
        at_id = tl.zeros([BLOCK_K], tl.float32)
        counts = ids >= 0
        for k in range(K):  # an id may be picked more than once: the first occurrence stands for all
            same = ids == tl.load(ids_ptr + row * K + k)
            at_id += tl.where(same, tl.load(gradients_ptr + row * K + k), 0.0)
            counts = counts & ((same == 0) | (offs_k <= k))
        on_probs = tl.load(on_probs_ptr + row)
        slope = scale * tl.load(inverse_temperature_ptr + row)
        factor = ((at_id + on_probs) * tl.exp(logp) - at_id * expm1_nonpositive(logp)) * slope
        if HAS_SOFTCAP:
            bent = (logp + tl.load(lse_ptr + row)) / (tl.load(inverse_temperature_ptr + row) * softcap)
            factor *= 1 - bent * bent
        factor = tl.where(counts, factor, 0.0)
        place = ids.to(tl.int64)[:, None] * stride_weight_v + offs_h.to(tl.int64)[None, :] * stride_weight_h
        rows = tl.load(weight_ptr + place, mask=counts[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
        unit = tl.load(unit_ptr + row * H + offs_h, mask=mask_h, other=0.0)
        gradient = on_probs * slope * unit + tl.sum(factor[:, None] * rows, 0)
    out = row * stride_out_n + offs_h.to(tl.int64) * stride_out_h
    tl.store(out_ptr + out, gradient.to(out_ptr.dtype.element_ty), mask=mask_h)


def unit_gradient_fwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    *,
    ignore_index: int,
    with_entropy: bool,
    chunk_rows: int,
    plan: GradPlan | None = None,
    descriptors: bool | None = None,
) -> dict[str, Tensor]:
    """Outputs, `row_max`, `log_sum`, `unit` [N, H] and `picked` [N, 1 + K] log-probs; rows that `ids` ignores are 0.

    `plan` and `descriptors` override what the device and the strides would choose.
    """
    x, n, width = projection, ids.shape[0], projection.hidden.shape[1]
    counted = ids != ignore_index
    all_ids = ids.masked_fill(~counted, -1)[:, None]
    if gather_ids is not None:
        all_ids = torch.cat([all_ids, gather_ids], 1)
    unit = x.hidden.new_zeros((n, width), dtype=torch.float32)
    names = ("logprobs", "lse", "row_max", "log_sum", *(("entropy",) if with_entropy else ()))
    out = {name: unit.new_zeros(n) for name in names} | {"unit": unit, "picked": unit.new_zeros(all_ids.shape)}
    if n:
        with launch_on(x.hidden.device):
            # While a chunk's largest logits come in from other ranks, the next chunk is projected.
            n_slots = 1 if x.shard is None else 2
            if x.shard is not None:  # whole blocks: tiles may differ from rank to rank, and chunks must not
                block = ROW_BLOCKS[kind_of(x.hidden.device)]
                chunk_rows = max(chunk_rows // n_slots // block, 1) * block
            launcher = ChunkLauncher(x, chunk_rows, with_dot=with_entropy, fold_slope=True, plan=plan, descriptors=descriptors)
            size, slots = launcher.chunk_rows, [launcher.new_slot() for _ in range(n_slots)]
            rows = compact_rows(x, counted)
            (z,) = summed(x.shard, gather_logits(x, launcher.weight, rows, all_ids))
            picked_ids = all_ids[rows.order]
            k, target_ids, target = z.shape[1], picked_ids[:, 0].contiguous(), z[:, 0].contiguous()
            nothing, source = torch.zeros_like(z), torch.arange(size, device=z.device)
            sums = []

            def start(number: int, part: slice) -> Projecting:
                return Projecting(launcher, rows, target_ids, target, part, slots[number % len(slots)])

            def finish(part: slice, projecting: Projecting) -> None:
                of_chunk, slot = projecting.settle(), projecting.slot
                live = slice(0, part.stop - part.start)
                sums.append([x[live] for x in of_chunk])
                scatter_picked_kernel[(size,)](
                    nothing,
                    picked_ids,
                    rows.n_active,
                    slot,
                    part.start,
                    0,
                    launcher.vocab,
                    k,
                    COLS=launcher.cols,
                    BLOCK_K=triton.next_power_of_2(k),
                    num_warps=1,
                )
                count = (rows.n_active - part.start).clamp_(0, size)
                total = of_chunk.rest.clone()
                total[live] += (target[part] - of_chunk.anchor[live]).exp()
                block_h = min(1024, triton.next_power_of_2(width))
                scatter_rows_kernel[(size, triton.cdiv(width, block_h))](
                    launcher.rows_gradient(slot, launcher.weight, count),
                    total.reciprocal_(),
                    source,
                    rows.order,
                    count,
                    unit,
                    part.start,
                    width,
                    BLOCK_H=block_h,
                )

            pipelined(chunks(n, size), start, finish, n_slots)
            anchor, rest, dot, top = (torch.cat(x) for x in zip(*sums, strict=True))
            e_target = (target - anchor).exp()
            # The kernels' sums leave the target out.
            whole_dot = dot + torch.where(e_target > 0, e_target * (target - anchor), 0.0) if with_entropy else None
            e = Exponentials(slots[0], target_ids, anchor, target, None, rest, whole_dot)
            log_total, row_max = e.log_total(), torch.maximum(anchor, top)
            log_sum = log_total - (row_max - anchor)
            # As `settle_on_max` does: the target settles on its own logit, which is the anchor.
            half_way = row_max + torch.expm1(log_sum).clamp_(min=LEAST_OTHERS.value).log_() / 2
            z = torch.where(z > half_way[:, None], row_max[:, None], z)
            scores = e.scores(z[:, 1:], picked_ids[:, 1:])
            assert scores.gathered is not None
            found = {"logprobs": scores.logprobs, "lse": anchor + log_total, "row_max": row_max, "log_sum": log_sum}
            found["picked"] = torch.cat([scores.logprobs[:, None], scores.gathered], 1)
            if scores.entropy is not None:
                found["entropy"] = scores.entropy
            live_rows = torch.arange(n, device=z.device) < rows.n_active
            for name, value in found.items():
                wanted = live_rows if value.dim() == 1 else live_rows[:, None]
                out[name].index_copy_(0, rows.order, torch.where(wanted, value, 0.0))
    if gather_ids is not None:
        out["gathered"] = out["picked"][:, 1:].clone()
    return out


def unit_gradient_bwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
    saved: dict[str, Tensor],  # unit, picked, row_max, log_sum
    *,
    ignore_index: int,
) -> Tensor:
    """Gradient of hidden in its own dtype; of the head only the rows of picked ids are read."""
    hidden, (n, width) = projection.hidden, projection.hidden.shape
    # Kernels of an interpreter round bfloat16 wrongly: torch rounds what they store.
    in_full = INTERPRET or projection.shard is not None  # and sums over ranks are rounded once
    dhidden = torch.empty_like(hidden, dtype=torch.float32 if in_full else None)
    if n == 0:
        return dhidden.to(hidden.dtype)
    weight = projection.weight.to(projection.compute_dtype)
    active = upstream.any_per_row(ids != ignore_index)
    picked_ids, gradients = picked_gradients(ids, gather_ids, upstream)
    if projection.shard is not None:
        picked_ids = torch.where(projection.holds(picked_ids), picked_ids, -1)
    on_probs, _ = upstream.on_probs(gather_ids, None, saved["row_max"])
    if isinstance(projection.temperature, Tensor):
        inverse_temperature = projection.temperature.float().reciprocal()
    else:
        inverse_temperature = torch.full_like(on_probs, 1 / projection.temperature)
    k = picked_ids.shape[1]
    block_k = triton.next_power_of_2(k)
    block_h = min(triton.next_power_of_2(width), max(16, min(1024, GATHER_TILE // block_k)))
    with launch_on(hidden.device):
        unit_gradient_kernel[(n, triton.cdiv(width, block_h))](
            saved["unit"],
            weight,
            picked_ids.contiguous(),
            gradients.float().contiguous(),
            saved["picked"],
            on_probs,
            saved["row_max"] + saved["log_sum"],
            inverse_temperature,
            active,
            dhidden,
            k,
            width,
            projection.logit_scale,
            projection.softcap or 1.0,
            *weight.stride(),
            *dhidden.stride(),
            HAS_SOFTCAP=projection.softcap is not None,
            BLOCK_K=block_k,
            BLOCK_H=block_h,
        )
    return summed(projection.shard, dhidden)[0].to(hidden.dtype)
