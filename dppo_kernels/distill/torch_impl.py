"""Torch implementation of the fused distillation loss: row chunks of both models' logits, gradient GEMMs at once.

A chunk is projected by both models and compared in place; what was the student's logits is then their gradient and goes into
the GEMMs. FLOPs over the n rows that count: 2 n (H_s + H_t) V, and 2 n H_s V for each of the student's inputs that is trained.
"""

import functools

import torch
from torch import Tensor

from dppo_kernels._row_stats import FINITE_MINUS_INF
from dppo_kernels._tiling import chunks
from dppo_kernels.distill.rows import divergence_rows
from dppo_kernels.distill.task import Result, Task
from dppo_kernels.linear_logprobs.gradient_gemms import accumulate_gradients, weight_tiles
from dppo_kernels.linear_logprobs.projection import Projection


def linear_distill_loss_fwd(task: Task) -> Result:
    """Loss and gradients of the rows that count; no other row is read."""
    result = Result.empty(task)
    counted = task.mask.nonzero().squeeze(1)
    student, teacher = task.student, task.teacher
    wants_gradient = any(task.needs)
    slots = [student.hidden.new_empty((task.chunk_rows, student.weight.shape[0]), dtype=student.dtype) for _ in range(2)]
    for part in chunks(counted.shape[0], task.chunk_rows):
        rows = counted[part]
        x, y = student.select(rows), teacher.select(rows)
        z_s, z_t = _logits(x, slots[0]), _logits(y, slots[1])
        found = divergence_rows(
            z_s,
            z_t,
            task.kind,
            with_gradient=wants_gradient,
            with_entropy=task.with_entropy,
            with_agreement=task.with_agreement,
            slope=None if x.softcap is None else functools.partial(_slope, x),
            shard=x.shard,
        )
        weights = task.loss_weights()
        weights = weights[rows] if isinstance(weights, Tensor) else weights
        result.loss_sum += (found.divergence * weights).sum(dtype=torch.float64)
        for whole, values in zip(result.rows, found, strict=True):
            if whole.shape[0]:
                whole[rows] = values
        if wants_gradient:
            factor = x.row_slopes(rows.shape[0]) * weights
            accumulate_gradients(x, rows, z_s, factor[:, None], result.gradients)
    result.gradients = result.gradients.sum_over_ranks(student.shard)
    return result


def _slope(x: Projection, z: Tensor, rows: slice) -> Tensor:
    return 1 - x.bent(z, rows).square_()


def _logits(x: Projection, slot: Tensor) -> Tensor:
    """Final logits of all rows of `x`, in the slot."""
    n = x.hidden.shape[0]
    rows, z = slice(0, n), slot[:n]
    h = x.hidden_rows(rows)
    for cols, w in weight_tiles(x):
        x.logits(h, w, rows, cols, z[:, cols])
    # A head alone gives no -inf; a bias that bans tokens does.
    return z if x.bias is None else z.clamp_(min=FINITE_MINUS_INF)
