"""Distillation: divergences of a student from a teacher, from hidden states, logits or a teacher's recorded top K."""

from dppo_kernels.distill.contract import DistillAux
from dppo_kernels.distill.kinds import DISTILL_KINDS
from dppo_kernels.distill.logits_op import distill_loss
from dppo_kernels.distill.op import explain_linear_distill_loss, linear_distill_loss
from dppo_kernels.distill.topk import topk_distill_loss

__all__ = [
    "DISTILL_KINDS",
    "DistillAux",
    "distill_loss",
    "explain_linear_distill_loss",
    "linear_distill_loss",
    "topk_distill_loss",
]
