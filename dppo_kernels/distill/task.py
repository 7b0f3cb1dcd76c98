"""One call of a fused distillation loss, its result, and how many rows it works on at one time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels._tiling import DEFAULT_WORKSPACE_BYTES, MIN_ROWS, ROW_BLOCKS, TARGET_ROWS, balanced, kind_of
from dppo_kernels.distill.contract import loss_weights
from dppo_kernels.distill.kinds import Kind
from dppo_kernels.distill.reference import RowDivergence
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection


@dataclass(frozen=True)
class Task:
    """What is compared, what is wanted, and how it is computed."""

    student: Projection  # with the same temperature as the teacher
    teacher: Projection
    mask: Tensor  # bool [N]
    kind: Kind
    t_squared: bool
    with_entropy: bool
    with_agreement: bool
    needs: Needs
    chunk_rows: int

    def loss_weights(self) -> float | Tensor:
        """What rows' divergences are multiplied by: a number or [N]."""
        return loss_weights(self.student.temperature, self.t_squared)


@dataclass
class Result:
    """Weighted sum of the divergences, its gradients in the statistics' precision, and rows (0 where they do not count)."""

    loss_sum: Tensor  # scalar float64
    rows: RowDivergence
    gradients: Gradients

    @classmethod
    def empty(cls, task: Task) -> "Result":
        x = task.student
        rows = RowDivergence.zeros(task.mask, x.dtype, with_entropy=task.with_entropy, with_agreement=task.with_agreement)
        gradients = (
            torch.zeros_like(i, dtype=x.dtype, memory_format=torch.contiguous_format) if need and i is not None else None
            for i, need in zip(x.inputs(), task.needs, strict=True)
        )
        return cls(rows.divergence.new_zeros((), dtype=torch.float64), rows, Gradients(*gradients))


def pick_chunk_rows(
    n_rows: int, vocab: int, bytes_per_logit: int, workspace_bytes: int | None, device: torch.device, backend: str
) -> int:
    """Rows whose logits of both models exist at one time: what fits, in blocks of the kernels, and at least one block."""
    kind = kind_of(device)
    if workspace_bytes is None:
        workspace_bytes = 2 * DEFAULT_WORKSPACE_BYTES[kind]  # there are two models
    block = ROW_BLOCKS[kind] if backend == "triton" else 1
    fit = min(workspace_bytes // max(vocab * bytes_per_logit, 1), TARGET_ROWS[kind])
    rows = balanced(n_rows, max(fit // block * block, block, MIN_ROWS))
    return -(-rows // block) * block
