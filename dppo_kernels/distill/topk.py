"""Public `topk_distill_loss`: against a teacher of whom only the log-probs of some ids were recorded."""

from typing import Any

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._lora import LoraWeight, vocabulary
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.aggregate import aggregate
from dppo_kernels.distill.contract import DistillAux, check_loss_mask, finish_distill_loss, loss_weights
from dppo_kernels.distill.kinds import resolve_kind
from dppo_kernels.distill.reference import divergence_of_logprobs
from dppo_kernels.divergence import MIN_OTHER
from dppo_kernels.linear_logprobs.op import check_head, linear_logprobs

# A log-prob of an absent column; 0 times it is finite.
_ABSENT = -1e30
_IGNORED = -100


def topk_distill_loss(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor | LoraWeight,  # [V, H]
    teacher_ids: Tensor,  # [..., K]
    teacher_logprobs: Tensor,  # [..., K]
    loss_mask: Tensor,  # [...]
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    denominator: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    with_entropy: bool = False,
    return_aux: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    check_values: bool = False,
) -> Any:
    """`linear_distill_loss` over a teacher's recorded ids and one bucket for all others: for teachers that are not at hand.

    ``K + 1`` outcomes: the ids, with ``p_k`` and ``q_k``, and the rest, with ``1 - sum p_k`` and ``1 - sum q_k``. Merging
    outcomes lowers every one of these divergences: it is at most that of `linear_distill_loss`. The student's log-probs are
    those of `linear_logprobs`, whose backward this is: 8 NHV FLOPs with a trained head, 4 with a frozen one.

    Args:
        student_hidden: [B, T, H] or [N, H] hidden states, one per position that is distilled.
        student_weight: [V, H] lm_head of the student, or a `LoraWeight`.
        teacher_ids: [..., K] int32/int64 ids, distinct in every row; a negative one is padding.
        teacher_logprobs: [..., K] their log-probs under the teacher, at the temperature of the student's.
        loss_mask: bool [B, T] or [N], True = counts.
        kind: as in `linear_distill_loss`.
        beta: as in `linear_distill_loss`.
        temperature: T, divides the student's logits; a positive number, or a tensor of the mask's shape.
        t_squared: as in `linear_distill_loss`.
        denominator: as in `linear_distill_loss`.
        student_bias: [V] bias of the head.
        student_logit_scale: as in `linear_logprobs`.
        student_softcap: as in `linear_logprobs`.
        with_entropy: report the student's entropy, of which there is no gradient.
        return_aux: also return per-token results.
        workspace_bytes: as in `linear_logprobs`.
        backend: as in `linear_logprobs`.
        check_values: as in `linear_logprobs`.

    Returns:
        ``(loss, stats)``, or ``(loss, stats, DistillAux)``, as `linear_distill_loss`.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, id or option.

    Source: as of `linear_distill_loss`; the bucket is that of DPPO's top-K divergences (2602.04879), see `divergence`.
    """
    divergence = resolve_kind(kind, beta)
    check_loss_mask(loss_mask)
    lead = ("loss_mask", loss_mask.shape)
    head = (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    check_head(*head, lead=lead, prefix="student_")
    _checks.check_ids("teacher_ids", teacher_ids)
    _checks.check_floating("teacher_logprobs", teacher_logprobs)
    if teacher_ids.dim() != loss_mask.dim() + 1 or teacher_ids.shape[:-1] != loss_mask.shape or not teacher_ids.shape[-1]:
        raise ValueError(f"`teacher_ids` must be [*loss_mask.shape, K], got {list(teacher_ids.shape)}")
    _checks.check_shape("teacher_logprobs", teacher_logprobs, teacher_ids.shape, "that of `teacher_ids`")
    for argument, value in (("teacher_ids", teacher_ids), ("teacher_logprobs", teacher_logprobs), ("loss_mask", loss_mask)):
        _checks.check_device(argument, value, "student_hidden", student_hidden)
    if isinstance(temperature, Tensor) and temperature.dim():
        _checks.check_temperature(temperature, "loss_mask", loss_mask)
        temperature = torch.where(loss_mask, temperature, 1.0)
    present = (teacher_ids >= 0) & loss_mask[..., None]
    teacher_ids = torch.where(present, teacher_ids, -1)
    # Here, where the argument has this name; what is compiled is left to the op below.
    if (teacher_ids.device.type == "cpu" or check_values) and not torch.compiler.is_compiling():
        vocab, nothing = vocabulary(student_weight), teacher_ids.new_zeros(0)
        _checks.check_values(nothing, teacher_ids, None, vocab, None, gather_name="teacher_ids")
    scores = linear_logprobs(
        student_hidden,
        student_weight,
        torch.where(loss_mask, 0, _IGNORED),
        bias=student_bias,
        gather_ids=teacher_ids,
        temperature=temperature,
        logit_scale=student_logit_scale,
        softcap=student_softcap,
        ignore_index=_IGNORED,
        outputs=("entropy",) if with_entropy else (),
        workspace_bytes=workspace_bytes,
        backend=backend,
        check_values=check_values,
    )
    assert scores.gathered is not None
    # 1 - sum cancels: in double precision it is as exact as the log-probs are. K + 1 numbers per token, so it is cheap.
    log_q, log_p = (_with_other(x.double(), present) for x in (scores.gathered, teacher_logprobs.detach()))
    dtype = stat_dtype(scores.gathered.dtype)
    found = torch.where(loss_mask, divergence_of_logprobs(log_q, log_p, divergence), 0.0)
    weighted = found * loss_weights(temperature, t_squared)
    loss = aggregate(weighted, loss_mask, "token_mean", denominator=denominator).to(dtype)
    entropy = None if scores.entropy is None else scores.entropy.detach()
    return finish_distill_loss(loss, DistillAux(found.detach().to(dtype), entropy, None), loss_mask, return_aux)


def _with_other(logprobs: Tensor, present: Tensor) -> Tensor:
    """Log-probs [..., K + 1] of the columns, and of all other tokens together."""
    kept = torch.where(present, logprobs.clamp(min=_ABSENT), _ABSENT)
    other = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=MIN_OTHER).log()
    return torch.cat([kept, other], -1)
