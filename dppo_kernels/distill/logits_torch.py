"""Torch implementation of the distillation loss of given logits: copies of a few rows at a time, both ways."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._row_stats import FINITE_MINUS_INF
from dppo_kernels._tiling import chunks, pick_row_chunk
from dppo_kernels.distill.kinds import Kind
from dppo_kernels.distill.reference import RowDivergence
from dppo_kernels.distill.rows import divergence_rows


def distill_loss_fwd(
    student: Tensor,  # [A, B, V]
    teacher: Tensor,
    mask: Tensor,  # [N]
    temperature: float | Tensor,
    kind: Kind,
    *,
    with_entropy: bool,
    with_agreement: bool,
) -> tuple[RowDivergence, Tensor]:
    """Rows (0 where they do not count), and nothing else."""
    asked = {"with_entropy": with_entropy, "with_agreement": with_agreement}
    whole = RowDivergence.zeros(mask, stat_dtype(student.dtype), **asked)
    for rows, z_s, z_t in _copies(student, teacher, mask, temperature):
        found = divergence_rows(z_s, z_t, kind, with_gradient=False, with_entropy=with_entropy, with_agreement=with_agreement)
        for out, values in zip(whole, found, strict=True):
            if out.shape[0]:
                out[rows] = values
    return whole, whole.divergence.new_empty(0)


def distill_loss_bwd(
    ddivergence: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float | Tensor,
    kind: Kind,
    saved: Tensor,
) -> Tensor:
    """dL/d(student logits), contiguous, in their dtype."""
    dstudent = torch.zeros_like(student, memory_format=torch.contiguous_format)
    flat = dstudent.view(mask.shape[0], student.shape[2])
    factors = ddivergence / temperature
    for rows, z_s, z_t in _copies(student, teacher, mask, temperature):
        divergence_rows(z_s, z_t, kind, with_gradient=True, with_entropy=False, with_agreement=False)
        flat[rows] = z_s.mul_(factors[rows, None]).to(flat.dtype)
    return dstudent


def _copies(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float | Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(numbers of rows that count, their final logits of both models) a few at a time; the copies may be overwritten."""
    counted = mask.nonzero().squeeze(1)
    dtype, width = stat_dtype(student.dtype), student.shape[1]
    for part in chunks(counted.shape[0], pick_row_chunk(student.shape[2])):
        rows = counted[part]
        divisor = temperature[rows, None] if isinstance(temperature, Tensor) else temperature
        z_s, z_t = (
            (x[rows // width, rows % width].to(dtype) / divisor).clamp_(min=FINITE_MINUS_INF) for x in (student, teacher)
        )
        yield rows, z_s, z_t
