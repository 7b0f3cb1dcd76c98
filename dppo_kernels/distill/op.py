"""Public `linear_distill_loss` and its custom op ``dppo_kernels::linear_distill_loss``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._handover import register_hand_over
from dppo_kernels._lora import LoraWeight, split_head, vocabulary
from dppo_kernels._numerics import compute_dtype_of, stat_dtype
from dppo_kernels._shard import VocabShard, check_ranks, encode, nominal_vocab, take_shard, whole_head
from dppo_kernels.aggregate import reduction_weights
from dppo_kernels.distill import torch_impl
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
from dppo_kernels.distill.reference import RowDivergence, linear_divergence_ref
from dppo_kernels.distill.task import Result, Task, pick_chunk_rows
from dppo_kernels.linear_logprobs.op import check_head, pair
from dppo_kernels.linear_logprobs.projection import Needs, Projection

if TYPE_CHECKING:  # not in builds of torch without it
    from torch.distributed import ProcessGroup

# What temporaries of a row take beside the logits of both models, in bytes a logit: the student's gradient in 16 bits, which
# kernels write for their GEMMs. The torch path writes it over the student's logits.
_GRADIENT_BYTES = {"torch": 0, "triton": 2}


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
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
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
        process_group: ranks among which both heads are shared out along V, in the same way; as in `linear_logprobs`, like the
            next two.
        vocab_start: the id of this rank's first row.
        vocab_size: V of all ranks together.
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
    check_loss_mask(loss_mask)
    lead = ("loss_mask", loss_mask.shape)
    place = (process_group, vocab_start, vocab_size)
    student_weight, student_bias, shard = take_shard(student_weight, student_bias, *place, prefix="student_")
    teacher_weight, teacher_bias, teacher_shard = take_shard(teacher_weight, teacher_bias, *place, prefix="teacher_")
    heads = {
        "student_": (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        "teacher_": (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
    }
    for prefix, head in heads.items():
        check_head(*head, lead=lead, prefix=prefix)
    sizes = [vocabulary(weight) for weight in (student_weight, teacher_weight)]
    check_vocabularies(("student_weight", "teacher_weight"), sizes)
    if shard != teacher_shard:
        raise ValueError("`teacher_weight` must be sharded as `student_weight` is")
    for argument, value in (("teacher_hidden", teacher_hidden), ("loss_mask", loss_mask)):
        _checks.check_device(argument, value, "student_hidden", student_hidden)
    _checks.check_temperature(temperature, *lead[:1], loss_mask)
    _checks.check_workspace_bytes(workspace_bytes)
    device = student_hidden.device
    student_dtype, teacher_dtype = (compute_dtype_of(x) for x in (student_hidden, teacher_hidden))
    check_precisions(("student_hidden", "teacher_hidden"), (student_dtype, teacher_dtype))
    dtype = stat_dtype(student_dtype)
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
        if device.type == "cpu":
            check_ranks(shard, mask.shape[0], device)
        base, student_bias, low_weight = whole_head(shard, base, student_bias, low_weight)
        with torch.no_grad():
            teacher_base, teacher_bias, teacher_low_weight = whole_head(shard, fixed[1], teacher_bias, fixed[3])
        rows, other_rows = (torch.where(mask[:, None], x, 0.0) for x in (rows, other_rows))  # NaN would reach the gradients
        row_or_scalar = scalar_temperature if row_temperature is None else row_temperature
        transforms = (row_or_scalar, student_logit_scale, student_softcap, student_dtype)
        student = Projection(rows, base, student_bias, *transforms, pair(low_hidden, low_weight))
        transforms = (row_or_scalar, teacher_logit_scale, teacher_softcap, teacher_dtype)
        low_rank = pair(fixed[2], teacher_low_weight)
        teacher = Projection(other_rows, teacher_base, teacher_bias, *transforms, low_rank)
        with torch.autocast(device.type, enabled=False):
            loss_sum, found = _reference(student, teacher, mask, divergence, t_squared)
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
            *encode(shard),
            name,
        )
        found = RowDivergence(*rows_found[:3])
    aux = aux_of(found, loss_mask.shape, with_entropy=with_entropy, with_agreement=with_agreement)
    return finish_distill_loss(loss_sum * weight, aux, loss_mask, return_aux)


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


def _reference(
    student: Projection, teacher: Projection, mask: Tensor, kind: Kind, t_squared: bool
) -> tuple[Tensor, RowDivergence]:
    """Sum of the loss in the order of the rows, and rows with 0 where they do not count."""
    found = RowDivergence(*(torch.where(mask, x, 0) for x in linear_divergence_ref(student, teacher, kind)))
    return (found.divergence * loss_weights(student.temperature, t_squared)).sum(), found


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
    group_name: str,
    span: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_row_temperature(row_temperature)
    shard = VocabShard.decode(group_name, span)
    if hidden.device.type == "cpu":
        check_ranks(shard, mask.shape[0], hidden.device)
    row_or_scalar = temperature if row_temperature is None else row_temperature
    scale, teacher_scale = logit_scales
    transforms = (row_or_scalar, scale, softcap, compute_dtype)
    teacher_transforms = (row_or_scalar, teacher_scale, teacher_softcap, teacher_compute_dtype)
    teacher_low = pair(teacher_low_hidden, teacher_low_weight)
    task = Task(
        Projection(hidden, weight, bias, *transforms, pair(low_hidden, low_weight), shard),
        Projection(teacher_hidden, teacher_weight, teacher_bias, *teacher_transforms, teacher_low, shard),
        mask,
        Kind(kind, beta),
        t_squared,
        with_entropy,
        with_agreement,
        Needs(*needs),
        _chunk_rows(
            mask.shape[0], nominal_vocab(shard, weight.shape[0]), compute_dtype, workspace_bytes, hidden.device, backend
        ),
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
    with_entropy, with_agreement, needs, *_ = rest[-6:]
    rows = hidden.new_empty(mask.shape, dtype=stat_dtype(compute_dtype))
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return (
        rows.new_empty(()),
        rows,
        rows.new_empty(mask.shape if with_entropy else 0),
        mask.new_empty(mask.shape if with_agreement else 0),
        *(rows.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needs, strict=True)),
    )


register_hand_over(_op, "linear_distill_loss")
