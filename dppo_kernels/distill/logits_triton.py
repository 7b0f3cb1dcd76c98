"""The distillation loss of given logits on Triton kernels: any strides, nothing copied; rows that do not count are not read."""

from typing import Any

import torch
import triton
from torch import Tensor

from dppo_kernels._tiling import pick_comparison_plan
from dppo_kernels._triton import INTERPRET, capability, launch_on
from dppo_kernels.distill.kernels import N_SAVED, divergence_gradient_kernel, divergence_row_kernel
from dppo_kernels.distill.kinds import Kind
from dppo_kernels.distill.reference import RowDivergence


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
    """Rows (0 where they do not count), and what the backward needs of each: [N, 5]."""
    n, vocab = mask.shape[0], student.shape[2]
    whole = RowDivergence.zeros(mask, torch.float32, with_entropy=with_entropy, with_agreement=with_agreement)
    saved = whole.divergence.new_zeros((n, N_SAVED.value))
    block_v, num_warps = pick_comparison_plan(capability(student.device))
    if n:
        with launch_on(student.device):
            divergence_row_kernel[(n,)](
                student,
                teacher,
                *(saved,) * 4,
                _inverse(temperature, saved),
                mask,
                mask,
                mask,
                *whole,
                saved,
                0,
                student.shape[1],
                vocab,
                0,
                0,
                kind.beta,
                *student.stride(),
                *teacher.stride(),
                KIND=kind.name,
                PARTIALS=False,
                ENTROPY=with_entropy,
                AGREEMENT=with_agreement,
                SHARDED=False,
                BLOCK_P=1,
                **_GIVEN,
                BLOCK_V=block_v,
                num_warps=num_warps,
            )
    return whole, saved


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
    # Kernels of an interpreter round bfloat16 wrongly: torch does it there.
    stored = torch.float32 if INTERPRET else student.dtype
    dstudent = torch.empty_like(student, dtype=stored, memory_format=torch.contiguous_format)
    n, vocab = mask.shape[0], student.shape[2]
    block_v, num_warps = pick_comparison_plan(capability(student.device))
    inverse = _inverse(temperature, saved)
    if n:
        with launch_on(student.device):
            divergence_gradient_kernel[(n, triton.cdiv(vocab, block_v))](
                student,
                teacher,
                inverse,
                mask,
                mask,
                saved,
                ddivergence.float() * inverse,
                dstudent,
                0,
                student.shape[1],
                vocab,
                vocab,
                kind.beta,
                1.0,
                *student.stride(),
                *teacher.stride(),
                KIND=kind.name,
                HAS_SOFTCAP=False,
                **_GIVEN,
                BLOCK_V=block_v,
                num_warps=num_warps,
            )
    return dstudent.to(student.dtype)


_GIVEN: dict[str, Any] = {"COMPACTED": False, "TEMPERED": True}


def _inverse(temperature: float | Tensor, saved: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.float().reciprocal()
    return saved.new_full(saved.shape[:1], 1 / temperature)
