"""Public `linear_distill_loss` and its custom op ``dppo_kernels::linear_distill_loss``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._handover import hand_over, keep_gradients
from dppo_kernels._lora import LoraWeight, split_head
from dppo_kernels._numerics import autocast_dtype, split_temperature, stat_dtype
from dppo_kernels.aggregate import reduction_weights
from dppo_kernels.distill import torch_impl
from dppo_kernels.distill.kinds import Kind, resolve_kind
from dppo_kernels.distill.reference import RowDivergence, linear_divergence_ref
from dppo_kernels.distill.task import Result, Task, pick_chunk_rows
from dppo_kernels.linear_logprobs.op import check_head, pair
from dppo_kernels.linear_logprobs.projection import Needs, Projection
from dppo_kernels.policy import Stat, partial_sums

# What temporaries of a row take beside the logits of both models, in bytes a logit: the student's gradient in 16 bits, which
# kernels write for their GEMMs. The torch path writes it over the student's logits.
_GRADIENT_BYTES = {"torch": 0, "triton": 2}


class DistillAux(NamedTuple):
    """Per-token results, detached; 0 behind the mask. What was not asked for is None."""

    divergence: Tensor  # shape of the mask, nats; without T^2
    student_entropy: Tensor | None  # nats, at the temperature
    agrees: Tensor | None  # bool: the student's likeliest token is the teacher's


def linear_distill_loss(
    student_hidden: Tensor,  # [..., H_s]
    student_weight: Tensor | LoraWeight,  # [V, H_s]
    teacher_hidden: Tensor,  # [..., H_t]
    teacher_weight: Tensor | LoraWeight,  # [V, H_t]
    loss_mask: Tensor,  # [...]
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    denominator: float | Tensor | None = None,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    with_entropy: bool = False,
    with_agreement: bool = False,
    return_aux: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Divergence of a student from a teacher over the whole vocabulary, from hidden states, with the gradient in the forward.

    With ``p = softmax(z_teacher / T)`` and ``q = softmax(z_student / T)``: "forward_kl" is ``KL(p || q)``, "reverse_kl"
    ``KL(q || p)``, "tv" ``sum |p - q| / 2``, and "jsd" ``beta KL(p || m) + (1 - beta) KL(q || m)`` with
    ``m = beta p + (1 - beta) q``. Both models are projected and compared a chunk of rows at a time and the student's gradient
    GEMMs follow at once, so that nothing is projected twice: ``2 N V (3 H_s + H_t)`` FLOPs, ``2 N V (2 H_s + H_t)`` with a
    frozen student head. Nothing of size N x V exists; tokens behind the mask enter no GEMM. The backward scales the saved
    gradients by the incoming scalar, once: it refuses to run twice, and has no derivative.

    Args:
        student_hidden: [B, T, H_s] or [N, H_s] hidden states, one per position that is distilled.
        student_weight: [V, H_s] lm_head of the student, of its hidden's dtype (under autocast: any), or a `LoraWeight`.
        teacher_hidden: [B, T, H_t] or [N, H_t]; another width and another dtype than the student's are fine. The teacher gets
            no gradient.
        teacher_weight: [V, H_t] or a `LoraWeight`, over the same vocabulary.
        loss_mask: bool [B, T] or [N], True = counts. Whatever stands behind it, NaN included, changes nothing.
        kind: "forward_kl", "reverse_kl", "jsd" or "tv".
        beta: of "jsd", in [0, 1]; 0 is the forward KL and 1 the reverse KL, as GKD defines them (not the formula's limits, 0).
        temperature: T, a positive number or a tensor of the mask's shape (not differentiable); divides both models' logits.
        t_squared: multiply by T^2, so that the size of the gradient depends little on T.
        denominator: positive number or scalar tensor that replaces the call's count of tokens (at least 1), so that
            micro-batches and ranks that divide by the same number add up to the loss of the whole batch.
        student_bias: [V] bias of the head. -inf bans a token; one that both models ban counts for nothing.
        teacher_bias: [V]
        student_logit_scale: multiplies the student's logits, as in `linear_logprobs`.
        teacher_logit_scale: the teacher's.
        student_softcap: soft-cap of the student's logits, as in `linear_logprobs`.
        teacher_softcap: the teacher's.
        with_entropy: report the student's entropy, of which there is no gradient.
        with_agreement: report the share of tokens at which the student's likeliest token is the teacher's.
        return_aux: also return per-token results.
        workspace_bytes: bound of both models' logits that exist at one time (default 80 MiB on CPU, 1 GiB on CUDA); at least 16
            rows of them, on kernels a block of 128.
        backend: as in `linear_logprobs`.

    Returns:
        ``(loss, stats)``, or ``(loss, stats, DistillAux)``. The loss is a float32 scalar (float64 for float64 inputs),
        differentiable in the student's hidden states, weight and bias. Stats are "divergence" (without T^2) and on request
        "student_entropy" and "agreement".

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or option; vocabularies that differ.

    Source: Hinton et al. (1503.02531); GKD, Agarwal et al. (2306.13649) for the generalised JSD.
    """
    divergence = resolve_kind(kind, beta)
    _checks.check_mask("loss_mask", loss_mask)
    lead = ("loss_mask", loss_mask.shape)
    if loss_mask.dim() not in (1, 2):
        raise ValueError(f"`loss_mask` must be [B, T] or [N], got {list(loss_mask.shape)}")
    heads = {
        "student_": (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        "teacher_": (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
    }
    for prefix, head in heads.items():
        check_head(*head, lead=lead, prefix=prefix)
    own, other = (w.base.shape[0] if isinstance(w, LoraWeight) else w.shape[0] for w in (student_weight, teacher_weight))
    if own != other:
        raise ValueError(
            f"`student_weight` has a vocabulary of {own} and `teacher_weight` one of {other}: they must be over the same tokens"
        )
    for argument, value in (("teacher_hidden", teacher_hidden), ("loss_mask", loss_mask)):
        _checks.check_device(argument, value, "student_hidden", student_hidden)
    _checks.check_temperature(temperature, *lead[:1], loss_mask)
    _checks.check_workspace_bytes(workspace_bytes)
    device = student_hidden.device
    student_dtype, teacher_dtype = (_compute_dtype(x) for x in (student_hidden, teacher_hidden))
    dtype = stat_dtype(student_dtype)
    if stat_dtype(teacher_dtype) != dtype:
        raise TypeError(f"`student_hidden` is {student_dtype} and `teacher_hidden` is {teacher_dtype}: both or none in float64")
    name = _backend.resolve("linear_distill_loss", backend, device, student_dtype)
    weight = reduction_weights(loss_mask, "token_mean", denominator=denominator, max_length=None, dtype=dtype)
    mask = loss_mask.reshape(-1)
    row_temperature, scalar_temperature = split_counted_temperature(temperature, mask, dtype)
    rows = student_hidden.reshape(-1, student_hidden.shape[-1])
    with torch.no_grad():
        other_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        fixed = (other_rows, *split_head(teacher_weight, other_rows, mask, teacher_dtype))
    base, low_hidden, low_weight = split_head(student_weight, rows, mask, student_dtype)
    if name == "reference":
        check_row_temperature(row_temperature)
        rows, other_rows = (torch.where(mask[:, None], x, 0.0) for x in (rows, other_rows))  # NaN would reach the gradients
        row_or_scalar = scalar_temperature if row_temperature is None else row_temperature
        with torch.autocast(device.type, enabled=False):
            loss_sum, found = _reference(
                _projection(
                    rows,
                    (base, low_hidden, low_weight),
                    student_bias,
                    row_or_scalar,
                    student_logit_scale,
                    student_softcap,
                    student_dtype,
                ),
                _projection(
                    *(other_rows, fixed[1:], teacher_bias, row_or_scalar, teacher_logit_scale, teacher_softcap, teacher_dtype)
                ),
                mask,
                divergence,
                t_squared,
            )
    else:
        inputs = (rows, base, None if student_bias is None else student_bias.contiguous(), low_hidden, low_weight)
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
        loss_sum, *rows_found = torch.ops.dppo_kernels.linear_distill_loss(
            *inputs,
            fixed[0],
            fixed[1].detach(),
            None if teacher_bias is None else teacher_bias.detach().contiguous(),
            *(None if x is None else x.detach() for x in fixed[2:]),
            mask,
            row_temperature,
            scalar_temperature,
            [student_logit_scale, teacher_logit_scale],
            student_softcap,
            teacher_softcap,
            student_dtype,
            teacher_dtype,
            *divergence,
            t_squared,
            workspace_bytes,
            with_entropy,
            with_agreement,
            needs,
            name,
        )
        found = RowDivergence(*rows_found[:3])
    aux = DistillAux(
        found.divergence.detach().reshape(lead[1]),
        found.entropy.reshape(lead[1]) if with_entropy else None,
        found.agrees.reshape(lead[1]) if with_agreement else None,
    )
    return finish_distill_loss(loss_sum * weight, aux, loss_mask, return_aux)


def split_counted_temperature(temperature: float | Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """`split_temperature`, with 1 in rows that do not count: 0 times whatever stands there need not be 0."""
    row_temperature, scalar = split_temperature(temperature, mask.shape[0], dtype)
    return (None if row_temperature is None else torch.where(mask, row_temperature, 1.0)), scalar


def check_row_temperature(row_temperature: Tensor | None) -> None:
    """On CPU, where it costs no sync."""
    if row_temperature is not None and row_temperature.device.type == "cpu":
        _checks.check_row_temperature(row_temperature)


def finish_distill_loss(loss: Tensor, aux: DistillAux, loss_mask: Tensor, return_aux: bool) -> Any:
    """What distillation losses return."""
    values = {"divergence": aux.divergence, "student_entropy": aux.student_entropy, "agreement": aux.agrees}
    stats: dict[str, Stat] = {name: partial_sums(x, loss_mask) for name, x in values.items() if x is not None}
    return (loss, stats, aux) if return_aux else (loss, stats)


def explain_linear_distill_loss(
    *,
    n_rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> str:
    """How a call of `linear_distill_loss` is served, in words.

    Args:
        n_rows: tokens N that count.
        vocab: V.
        dtype: of the student's hidden states and weight (under autocast: the autocast dtype).
        device: where they are.
        workspace_bytes: as in `linear_distill_loss`.
        backend: as in `linear_distill_loss`.
    """
    device = torch.device(device)
    name = _backend.resolve("linear_distill_loss", backend, device, dtype)
    if name == "reference":
        return "reference: autograd through a chunk of rows of both models' logits at a time"
    _checks.check_workspace_bytes(workspace_bytes)
    rows = _chunk_rows(n_rows, vocab, dtype, workspace_bytes, device, name)
    return f"{name}: gradient in the forward, {rows} rows of both models' logits at a time: 2 n V (3 H_s + H_t) FLOPs"


def _chunk_rows(
    n_rows: int, vocab: int, dtype: torch.dtype, workspace_bytes: int | None, device: torch.device, backend: str
) -> int:
    bytes_per_logit = 2 * stat_dtype(dtype).itemsize + _GRADIENT_BYTES[backend]
    return pick_chunk_rows(n_rows, vocab, bytes_per_logit, workspace_bytes, device, backend)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    autocast = autocast_dtype(hidden.device)
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast


def _projection(
    hidden: Tensor,
    head: tuple[Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
) -> Projection:
    weight, *low_rank = head
    return Projection(hidden, weight, bias, temperature, logit_scale, softcap, compute_dtype, pair(*low_rank))


def _reference(
    student: Projection, teacher: Projection, mask: Tensor, kind: Kind, t_squared: bool
) -> tuple[Tensor, RowDivergence]:
    """Sum of the loss in the order of the rows, and rows with 0 where they do not count."""
    found = RowDivergence(*(torch.where(mask, x, 0) for x in linear_divergence_ref(student, teacher, kind)))
    temperature = student.temperature
    weights = temperature * temperature if t_squared else 1.0
    return (found.divergence * weights).sum(), found


@torch.library.custom_op("dppo_kernels::linear_distill_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_low_hidden: Tensor | None,
    teacher_low_weight: Tensor | None,
    mask: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scales: Sequence[float],
    softcap: float | None,
    teacher_softcap: float | None,
    compute_dtype: torch.dtype,
    teacher_compute_dtype: torch.dtype,
    kind: str,
    beta: float,
    t_squared: bool,
    workspace_bytes: int | None,
    with_entropy: bool,
    with_agreement: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_row_temperature(row_temperature)
    row_or_scalar = temperature if row_temperature is None else row_temperature
    head = (weight, low_hidden, low_weight)
    teacher_head = (teacher_weight, teacher_low_hidden, teacher_low_weight)
    scale, teacher_scale = logit_scales
    task = Task(
        _projection(hidden, head, bias, row_or_scalar, scale, softcap, compute_dtype),
        _projection(
            *(teacher_hidden, teacher_head, teacher_bias, row_or_scalar, teacher_scale, teacher_softcap, teacher_compute_dtype)
        ),
        mask,
        Kind(kind, beta),
        t_squared,
        with_entropy,
        with_agreement,
        Needs(*needs),
        _chunk_rows(mask.shape[0], weight.shape[0], compute_dtype, workspace_bytes, hidden.device, backend),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        result = _run(task, backend)
    empty = result.rows.divergence.new_empty(0)
    return (  # type: ignore[return-value]
        result.loss_sum.to(result.rows.divergence.dtype),
        *result.rows,
        *(empty.clone() if g is None else g for g in result.gradients),
    )


def _run(task: Task, backend: str) -> Result:
    if backend == "triton":  # imported here: the package works without Triton
        from dppo_kernels.distill import triton_impl

        return triton_impl.linear_distill_loss_fwd(task)
    return torch_impl.linear_distill_loss_fwd(task)


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask, compute_dtype = rest[5], rest[11]
    with_entropy, with_agreement, needs, _ = rest[-4:]
    rows = hidden.new_empty(mask.shape, dtype=stat_dtype(compute_dtype))
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return (
        rows.new_empty(()),
        rows,
        rows.new_empty(mask.shape if with_entropy else 0),
        mask.new_empty(mask.shape if with_agreement else 0),
        *(rows.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needs, strict=True)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    keep_gradients(ctx, inputs[:5], others[-5:])


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*hand_over(ctx, dloss, "linear_distill_loss"), *(None,) * 21)


_op.register_autograd(_backward, setup_context=_setup_context)
