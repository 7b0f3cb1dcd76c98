"""Definition of the distillation losses in plain torch, any float dtype: the oracle every kernel is held to.

    p = softmax(z_teacher / T), q = softmax(z_student / T)
    forward_kl  KL(p || q)             reverse_kl  KL(q || p)             tv  1/2 sum |p - q|
    jsd         beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

Autograd differentiates it. Source: GKD (arXiv 2306.13649) for the generalised JSD; Hinton et al. (1503.02531) for T.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._row_stats import FINITE_MINUS_INF
from dppo_kernels._tiling import pick_row_chunk
from dppo_kernels.distill.kinds import Kind
from dppo_kernels.linear_logprobs.projection import Projection
from dppo_kernels.linear_logprobs.reference import by_row_chunks


class RowDivergence(NamedTuple):
    """Of every row."""

    divergence: Tensor  # [n]
    entropy: Tensor  # [n] of the student, nats, detached
    agrees: Tensor  # bool [n]: a likeliest token of the student is one of the teacher's

    @classmethod
    def zeros(cls, mask: Tensor, dtype: torch.dtype, *, with_entropy: bool, with_agreement: bool) -> "RowDivergence":
        """For the rows of `mask` [n]; what is not asked for is empty."""
        n, device = mask.shape[0], mask.device
        return cls(
            torch.zeros(n, dtype=dtype, device=device),
            torch.zeros(n if with_entropy else 0, dtype=dtype, device=device),
            torch.zeros(n if with_agreement else 0, dtype=torch.bool, device=device),
        )


def divergence_ref(student: Tensor, teacher: Tensor, kind: Kind) -> RowDivergence:
    """Of rows of final logits [n, V] (temperature already applied); the gradient goes to the student's alone."""
    # A token that is impossible for both counts for nothing.
    z_s, z_t = (z.clamp(min=FINITE_MINUS_INF) for z in (student, teacher.detach()))
    log_q, log_p = torch.log_softmax(z_s, -1), torch.log_softmax(z_t, -1)
    divergence = divergence_of_logprobs(log_q, log_p, kind)
    with torch.no_grad():
        entropy = -(log_q.exp() * log_q).sum(-1)
        agrees = ((z_s == z_s.amax(-1, keepdim=True)) & (z_t == z_t.amax(-1, keepdim=True))).any(-1)
    return RowDivergence(divergence, entropy, agrees)


def divergence_of_logprobs(log_q: Tensor, log_p: Tensor, kind: Kind) -> Tensor:
    """[...] of finite log-probs [..., V], the student's first."""
    if kind.name == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind.name == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind.name == "tv":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    log_m = torch.logaddexp(log_p + math.log(kind.beta), log_q + math.log1p(-kind.beta))
    of_teacher, of_student = ((log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q))
    return kind.beta * of_teacher + (1 - kind.beta) * of_student


def linear_divergence_ref(student: Projection, teacher: Projection, kind: Kind) -> RowDivergence:
    """Of all rows; chunks of rows are checkpointed, so that one chunk of both models' logits exists at a time."""
    dtype = stat_dtype(student.compute_dtype)

    def logits(x: Projection, hidden: Tensor, low: Tensor | None, temperature: float | Tensor) -> Tensor:
        z = torch.nn.functional.linear(hidden.to(dtype), x.weight.to(dtype), None if x.bias is None else x.bias.to(dtype))
        if low is not None and x.low_rank is not None:
            z = z + torch.nn.functional.linear(low.to(dtype), x.low_rank[1].to(dtype))
        z = x.logit_scale * z
        if x.softcap is not None:
            z = x.softcap * torch.tanh(z / x.softcap)
        return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    def score(
        h_s: Tensor, low_s: Tensor | None, h_t: Tensor, low_t: Tensor | None, temperature: float | Tensor
    ) -> dict[str, Tensor]:
        z_s, z_t = logits(student, h_s, low_s, temperature), logits(teacher, h_t, low_t, temperature)
        return divergence_ref(z_s, z_t, kind)._asdict()

    low_s, low_t = (None if x.low_rank is None else x.low_rank[0] for x in (student, teacher))
    rowwise = (student.hidden, low_s, teacher.hidden, low_t, student.temperature)
    return RowDivergence(**by_row_chunks(score, rowwise, pick_row_chunk(2 * student.weight.shape[0])))
