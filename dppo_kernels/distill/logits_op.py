"""Public `distill_loss` and its custom ops ``dppo_kernels::distill_loss{,_backward}``: for logits that already exist."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.aggregate import reduction_weights
from dppo_kernels.distill import logits_torch
from dppo_kernels.distill.contract import (
    aux_of,
    check_loss_mask,
    check_precisions,
    check_row_temperature,
    check_vocabularies,
    finish_distill_loss,
    loss_weights,
    split_counted_temperature,
)
from dppo_kernels.distill.kinds import Kind, resolve_kind
from dppo_kernels.distill.reference import RowDivergence, divergence_ref
from dppo_kernels.token_logprobs.op import as_row_blocks


def distill_loss(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    loss_mask: Tensor,  # [...]
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    denominator: float | Tensor | None = None,
    with_entropy: bool = False,
    with_agreement: bool = False,
    return_aux: bool = False,
    backend: str | None = None,
) -> Any:
    """`linear_distill_loss` of logits that already exist; the gradient goes to the student's.

    Nothing of the size of the logits is kept between forward and backward but the logits themselves.

    Args:
        student_logits: [B, T, V] or [N, V]; -inf bans a token, and one that both models ban counts for nothing.
        teacher_logits: the same shape, detached; may have another dtype.
        loss_mask: bool [B, T] or [N], True = counts. Rows behind it are not read.
        kind: as in `linear_distill_loss`.
        beta: as in `linear_distill_loss`.
        temperature: as in `linear_distill_loss`.
        t_squared: as in `linear_distill_loss`.
        denominator: as in `linear_distill_loss`.
        with_entropy: as in `linear_distill_loss`.
        with_agreement: as in `linear_distill_loss`.
        return_aux: as in `linear_distill_loss`.
        backend: as in `token_logprobs`.

    Returns:
        ``(loss, stats)``, or ``(loss, stats, DistillAux)``, as `linear_distill_loss`.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or option; vocabularies that differ.

    Source: as of `linear_distill_loss`.
    """
    divergence = resolve_kind(kind, beta)
    check_loss_mask(loss_mask)
    names = ("student_logits", "teacher_logits")
    for argument, value in zip(names, (student_logits, teacher_logits), strict=True):
        _checks.check_floating(argument, value)
        if value.dim() != loss_mask.dim() + 1 or value.shape[:-1] != loss_mask.shape:
            raise ValueError(f"`{argument}` must be [*loss_mask.shape, V], got {list(value.shape)} for {list(loss_mask.shape)}")
    check_vocabularies(names, (student_logits.shape[-1], teacher_logits.shape[-1]))
    for argument, value in (("teacher_logits", teacher_logits), ("loss_mask", loss_mask)):
        _checks.check_device(argument, value, "student_logits", student_logits)
    _checks.check_temperature(temperature, "loss_mask", loss_mask)
    check_precisions(names, (student_logits.dtype, teacher_logits.dtype))
    dtype = stat_dtype(student_logits.dtype)
    name = _backend.resolve("distill_loss", backend, student_logits.device, student_logits.dtype)
    weight = reduction_weights(loss_mask, "token_mean", denominator=denominator, max_length=None, dtype=dtype)
    mask = loss_mask.reshape(-1)
    row_temperature, scalar_temperature = split_counted_temperature(temperature, mask, dtype)
    row_or_scalar = scalar_temperature if row_temperature is None else row_temperature
    if name == "reference":
        check_row_temperature(row_temperature)
        found = _reference(student_logits, teacher_logits, mask, row_or_scalar, divergence)
    else:
        found = RowDivergence(
            *torch.ops.dppo_kernels.distill_loss(
                *_row_blocks(student_logits, teacher_logits.detach()),
                mask,
                row_temperature,
                scalar_temperature,
                *divergence,
                with_entropy,
                with_agreement,
                name,
            )[:3]
        )
    weighted = found.divergence * loss_weights(row_or_scalar, t_squared)
    loss = weighted.sum(dtype=torch.float64).to(dtype) * weight
    aux = aux_of(found, loss_mask.shape, with_entropy=with_entropy, with_agreement=with_agreement)
    return finish_distill_loss(loss, aux, loss_mask, return_aux)


def _row_blocks(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [A, B, V] of one A and B; views."""
    blocks = as_row_blocks(student), as_row_blocks(teacher)
    return blocks if blocks[0].shape == blocks[1].shape else (student, teacher)  # [B, T, V], one of them not contiguous


def _reference(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float | Tensor, kind: Kind) -> RowDivergence:
    def rows(logits: Tensor) -> Tensor:
        flat = logits.reshape(mask.shape[0], logits.shape[-1]).to(stat_dtype(logits.dtype))
        known = torch.where(mask[:, None], flat, 0.0)  # NaN behind the mask would stay NaN in the gradient
        return known / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    return RowDivergence(*(torch.where(mask, x, 0) for x in divergence_ref(rows(student), rows(teacher), kind)))


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.distill import logits_triton

        return logits_triton
    return logits_torch


@torch.library.custom_op("dppo_kernels::distill_loss", mutates_args=())
def _forward_op(
    student: Tensor,  # [A, B, V]: row a * B + b of the N = A B rows
    teacher: Tensor,
    mask: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    kind: str,
    beta: float,
    with_entropy: bool,
    with_agreement: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, and what the backward of kernels needs of each: [N, 5], or nothing."""
    check_row_temperature(row_temperature)
    rows, saved = _implementation(backend).distill_loss_fwd(
        student,
        teacher,
        mask,
        temperature if row_temperature is None else row_temperature,
        Kind(kind, beta),
        with_entropy=with_entropy,
        with_agreement=with_agreement,
    )
    return (*rows, saved)


@_forward_op.register_fake
def _(student: Tensor, teacher: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with_entropy, with_agreement, backend = rest[-3:]
    n = mask.shape[0]
    divergence = student.new_empty(n, dtype=stat_dtype(student.dtype))
    return (
        divergence,
        divergence.new_empty(n if with_entropy else 0),
        mask.new_empty(n if with_agreement else 0),
        divergence.new_empty((n, 5) if backend == "triton" else 0),
    )


@torch.library.custom_op("dppo_kernels::distill_loss_backward", mutates_args=())
def _backward_op(
    ddivergence: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    row_temperature: Tensor | None,
    saved: Tensor,
    temperature: float,
    kind: str,
    beta: float,
    backend: str,
) -> Tensor:
    row_or_scalar = temperature if row_temperature is None else row_temperature
    arguments = (student, teacher, mask, row_or_scalar, Kind(kind, beta), saved)
    return _implementation(backend).distill_loss_bwd(ddivergence, *arguments)


@_backward_op.register_fake
def _(ddivergence: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, mask, row_temperature, temperature, kind, beta, _, _, backend = inputs
    _, entropy, agrees, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropy, agrees, saved)
    ctx.save_for_backward(student, teacher, mask, row_temperature, saved)
    ctx.scalars = (temperature, kind, beta, backend)


def _backward(ctx: Any, ddivergence: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dstudent = None
    if ddivergence is not None:
        arguments = (ddivergence.contiguous(), *ctx.saved_tensors, *ctx.scalars)
        dstudent = torch.ops.dppo_kernels.distill_loss_backward(*arguments)
    return (dstudent, *(None,) * 9)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
