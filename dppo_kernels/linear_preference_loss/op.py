"""Public `linear_preference_loss` and `linear_sequence_logprobs`, and their op ``dppo_kernels::linear_preference_loss``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._handover import register_hand_over
from dppo_kernels._lora import LoraWeight
from dppo_kernels._numerics import stat_dtype
from dppo_kernels._shard import VocabShard, check_ranks, encode, local_ids, summed
from dppo_kernels._tiling import TARGET_ROWS, chunks, kind_of
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_logprobs.group_design import Design, design_on
from dppo_kernels.linear_logprobs.groups import Coefficients, GroupTask
from dppo_kernels.linear_logprobs.op import pair, run_groups
from dppo_kernels.linear_logprobs.projection import Needs, Projection
from dppo_kernels.linear_preference_loss.call import Call, Head, Model
from dppo_kernels.linear_preference_loss.reference import IGNORED, score_rows_ref
from dppo_kernels.linear_preference_loss.task import Task
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.preference import number, pair_stats
from dppo_kernels.preference_spec import PreferenceSpec

if TYPE_CHECKING:  # not in builds of torch without it
    from torch.distributed import ProcessGroup

# What may be asked for per token besides log-probs.
TOKEN_OUTPUTS = ("entropy", "is_top1", "mean_logits")


class SequenceLogprobs(NamedTuple):
    """Log-probs of completions."""

    logprobs: Tensor  # float64 [2P] sums over tokens
    lengths: Tensor  # int64 [2P] tokens
    token_logprobs: Tensor  # shape of the ids; 0 behind the mask


class PreferenceAux(NamedTuple):
    """Per-sequence and per-token results, detached; what was not asked for is None."""

    logprobs: Tensor  # float64 [2P] of chosen, then rejected sequences, sums over tokens
    ref_logprobs: Tensor  # float64 [2P]
    lengths: Tensor  # int64 [2P] tokens
    token_logprobs: Tensor  # shape of the ids, like those that follow; 0 behind the mask
    entropy: Tensor | None  # nats
    is_top1: Tensor | None  # bool: no logit is above the token's. Of several that are equal, recomputing designs take the first
    mean_logits: Tensor | None  # mean over the vocabulary


def linear_preference_loss(
    hidden: Tensor,  # [2P, T, H] or [N, H]
    weight: Tensor | LoraWeight,  # [V, H]
    ids: Tensor,  # [2P, T] or [N]
    loss_mask: Tensor,  # [2P, T] or [N]
    *,
    spec: PreferenceSpec | None = None,
    ref_logprobs: Tensor | None = None,  # [2P]
    ref_hidden: Tensor | None = None,  # [2P, T, H_ref] or [N, H_ref]
    ref_weight: Tensor | LoraWeight | None = None,  # [V, H_ref]
    ref_bias: Tensor | None = None,  # [V]
    sequence_ids: Tensor | None = None,  # [N]
    n_pairs: int | None = None,
    denominator: float | Tensor | None = None,
    token_denominator: float | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    return_aux: bool = False,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    check_values: bool = False,
) -> Any:
    """`preference_loss` of chosen and rejected sequences from hidden states, with the gradient computed in the forward.

    Pairs are scored one group after the other; when all tokens of a group are scored, the derivative of the loss by each
    sequence's log-prob is known, and the gradient GEMMs follow while the group's exponentials exist: 6 NHV FLOPs (frozen head:
    4), 8 of what fits no workspace, and 2 for the reference where its hidden states are given. N counts completion tokens: rows
    behind the mask, prompts and padding, enter no GEMM, and nothing of size N x V exists. The backward scales the saved
    gradients by the incoming scalar, once: it refuses to run twice, and has no derivative.

    Args:
        hidden: [2P, T, H] hidden states of P chosen, then the P rejected sequences, already shifted: row t predicts
            ``ids[:, t]``. Or [N, H] rows of packed sequences in any order, with `sequence_ids`: sequences that share a prompt
            then hold its last row, which predicts the first token of both, twice. Packed rows are one group, whatever pairs
            they are of: what does not fit the workspace is projected again.
        weight: [V, H] lm_head, of hidden's dtype (under autocast: any), or a `LoraWeight`.
        ids: [2P, T] or [N] int32/int64 token ids; whatever stands behind the mask changes nothing.
        loss_mask: bool, shape of `ids`: True where the id is a token of the completion, its end token included.
        spec: the loss (default: DPO at beta 0.1).
        ref_logprobs: [2P] log-probs of the sequences under the reference, precomputed with the same `ld_alpha`
            (`linear_sequence_logprobs`). Or else the next two:
        ref_hidden: hidden states of the reference, which gets no gradient; another width than the policy's is fine.
        ref_weight: [V, H_ref] or a `LoraWeight`. Temperature, scale and soft-cap are the policy's.
        ref_bias: [V]
        sequence_ids: int64 [N] in [0, 2P), of packed rows: sequence i + P is the rejected one of pair i. The rows of a sequence
            are in their order.
        n_pairs: P, of packed rows.
        denominator: as in `preference_loss`, like the next.
        token_denominator: see there.
        bias: [V] lm_head bias.
        temperature: as in `linear_logprobs`.
        logit_scale: as in `linear_logprobs`.
        softcap: as in `linear_logprobs`.
        outputs: per token, any of "entropy", "is_top1", "mean_logits"; without a gradient. With a soft-cap "mean_logits" needs
            the logits themselves and the recomputing design.
        return_aux: also return per-sequence and per-token results.
        process_group: ranks among which the head is shared out along V, as in `linear_logprobs`; like the next two. The
            reference's head is shared out in the same way.
        vocab_start: the id of this rank's first row.
        vocab_size: V of all ranks together.
        workspace_bytes: bound of the exponentials that exist at one time (default 40 MiB on CPU, 512 MiB on CUDA); 0 works in
            tiles and recomputes the logits: 8 NHV. See `explain_linear_preference_loss`.
        backend: as in `linear_logprobs`.
        check_values: check the range of ids on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        ``(loss, stats)``, or ``(loss, stats, PreferenceAux)``. The loss is a float32 scalar (float64 for float64 inputs),
        differentiable in hidden, weight and bias. Stats are those of `preference_loss` over pairs, and over tokens "entropy",
        "mean_logits_chosen", "mean_logits_rejected" and "top1_chosen" where their outputs were asked for.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, id or option; no reference, or two.

    Source: DPO (2305.18290); gradient in the forward, Liger's fused linear losses (2410.10989).
    """
    spec = PreferenceSpec() if spec is None else spec
    place = (process_group, vocab_start, vocab_size)
    head = Head(bias, temperature, logit_scale, softcap, *place)
    call = Call.of(hidden, weight, ids, loss_mask, head, sequence_ids, n_pairs, backend)
    _check_outputs(outputs)
    _checks.check_workspace_bytes(workspace_bytes)
    ref = call.reference(ref_logprobs, ref_hidden, ref_weight, ref_bias, place)
    like = call.mask.new_empty(0, dtype=torch.float64)
    numbers = (number("denominator", denominator, like), number("token_denominator", token_denominator, like))
    task = call.task(spec, ref_logprobs, *numbers)
    if call.backend == "reference":
        task, loss, rows = _reference(call, task, ref, frozenset(outputs))
    else:
        task, loss, rows = _fused(call, task, ref, frozenset(outputs), workspace_bytes, check_values)
    sums = task.sequence_logprobs(slice(0, call.mask.shape[0]), rows["logprobs"])
    stats = pair_stats(task.pairs(sums), spec) | _token_stats(rows, task)
    if not return_aux:
        return loss, stats
    shaped = {name: call.layout.shaped(values) for name, values in rows.items()}
    per_sequence = (sums, task.reference(), task.lengths)
    return loss, stats, PreferenceAux(*per_sequence, shaped["logprobs"], *(shaped.get(name) for name in TOKEN_OUTPUTS))


@torch.no_grad()
def linear_sequence_logprobs(
    hidden: Tensor,  # [2P, T, H] or [N, H]
    weight: Tensor | LoraWeight,  # [V, H]
    ids: Tensor,  # [2P, T] or [N]
    loss_mask: Tensor,  # [2P, T] or [N]
    *,
    spec: PreferenceSpec | None = None,
    outputs: Sequence[str] = (),
    sequence_ids: Tensor | None = None,  # [N]
    n_pairs: int | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    check_values: bool = False,
) -> SequenceLogprobs:
    """Log-probs of the sequences of pairs, without a gradient: what `linear_preference_loss` takes as `ref_logprobs`. 2 NHV.

    The same rows are scored by the same operations as there, so that equal weights give equal bits and the first loss of a
    policy that is its own reference is exactly log 2: for that, `spec`, `outputs`, `workspace_bytes` and `backend` must be
    those of the loss, whose design they decide.

    Args:
        spec: the loss that they are for; its `ld_alpha` weighs tokens.
        outputs: what that loss is asked for. All others as in `linear_preference_loss`.

    Raises:
        TypeError, ValueError: as there.
    """
    head = Head(bias, temperature, logit_scale, softcap, process_group, vocab_start, vocab_size)
    call = Call.of(hidden, weight, ids, loss_mask, head, sequence_ids, n_pairs, backend)
    _checks.check_workspace_bytes(workspace_bytes)
    task = call.task(PreferenceSpec() if spec is None else spec, hidden.new_zeros(2 * call.layout.n_pairs, dtype=call.dtype))
    _check_outputs(outputs)
    # Nothing of it is returned, but where it needs the logits themselves, it decides the design.
    deciding = frozenset(outputs) & {"mean_logits"} if softcap is not None else frozenset()
    if call.backend == "reference":
        _, _, rows = _reference(call, task, None, deciding)
    else:
        _, _, rows = _fused(call, task, None, deciding, workspace_bytes, check_values)
    sums = task.sequence_logprobs(slice(0, call.mask.shape[0]), rows["logprobs"])
    return SequenceLogprobs(sums, task.lengths, call.layout.shaped(rows["logprobs"]))


def explain_linear_preference_loss(
    spec: PreferenceSpec | None = None,
    *,
    n_pairs: int,
    sequence_length: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> str:
    """Which design serves a call of `linear_preference_loss`, in words.

    Args:
        spec: the loss.
        n_pairs: P.
        sequence_length: T of [2P, T].
        vocab: V.
        dtype: of hidden and weight (under autocast: the autocast dtype).
        device: where they are.
        softcap: as in `linear_preference_loss`, like the rest.
        outputs: see there.
        workspace_bytes: see there.
        backend: see there.
    """
    spec, device = PreferenceSpec() if spec is None else spec, torch.device(device)
    name = _backend.resolve("linear_preference_loss", backend, device, dtype)
    if name == "reference":
        return "reference: autograd through linear_logprobs and preference_loss"
    _checks.check_workspace_bytes(workspace_bytes)
    n = 2 * n_pairs * sequence_length
    unit = n if spec.couples_pairs else 2 * sequence_length
    wanted = frozenset(outputs)
    return f"{name}: {_design(spec, n, unit, vocab, dtype, device, softcap, wanted, workspace_bytes, name).explain()}"


def _check_outputs(outputs: Sequence[str]) -> None:
    if isinstance(outputs, str):
        raise ValueError(f"`outputs` must be a sequence of names, got {outputs!r}")
    for output in outputs:
        _checks.check_choice("outputs", output, TOKEN_OUTPUTS)


def _token_stats(rows: dict[str, Tensor], task: Task) -> dict[str, Stat]:
    mask, chosen, stats = task.mask, task.sequences < task.n_pairs, {}
    if "entropy" in rows:
        stats["entropy"] = partial_sums(rows["entropy"], mask)
    if "mean_logits" in rows:
        stats["mean_logits_chosen"] = partial_sums(rows["mean_logits"], mask & chosen)
        stats["mean_logits_rejected"] = partial_sums(rows["mean_logits"], mask & ~chosen)
    if "is_top1" in rows:
        stats["top1_chosen"] = partial_sums(rows["is_top1"], mask & chosen)
    return stats


# Of both ways to run a call: the task with its reference, the loss, and detached rows by name.
_Run = tuple[Task, Tensor, dict[str, Tensor]]


def _reference(call: Call, task: Task, ref: Model | None, outputs: frozenset[str]) -> _Run:
    every = slice(0, call.mask.shape[0])
    if ref is not None:
        with torch.no_grad():
            logprobs = score_rows_ref(ref, call, frozenset()).logprobs
            assert logprobs is not None
            task = replace(task, ref_logprobs=task.sequence_logprobs(every, logprobs))
    scored = score_rows_ref(call.policy, call, outputs | ({"log_sum_sq_probs"} if task.spec.use_weighting else set()))
    assert scored.logprobs is not None
    loss = task.loss(scored.logprobs, scored.log_sum_sq_probs).to(call.dtype)
    return task, loss, {name: getattr(scored, name).detach() for name in ("logprobs", *outputs)}


def _fused(
    call: Call, task: Task, ref: Model | None, outputs: frozenset[str], workspace_bytes: int | None, check_values: bool
) -> _Run:
    inputs = call.policy.inputs
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    fixed = (None,) * 5 if ref is None else tuple(None if x is None else x.detach() for x in ref.inputs)
    loss, ref_logprobs, logprobs, *extra = torch.ops.dppo_kernels.linear_preference_loss(
        *inputs,
        *fixed,
        call.ids,
        call.mask,
        task.sequences,
        task.row_weights,
        task.lengths,
        task.ref_logprobs,
        task.denominator,
        task.token_denominator,
        call.row_temperature,
        call.temperature,
        call.logit_scale,
        call.softcap,
        call.policy.compute_dtype,
        call.policy.compute_dtype if ref is None else ref.compute_dtype,
        *encode(call.shard),
        *_encode(task.spec),
        task.n_pairs,
        call.layout.unit,
        ",".join(sorted(outputs)),
        workspace_bytes,
        needs,
        check_values,
        call.backend,
    )
    found = dict(zip(TOKEN_OUTPUTS, extra, strict=False))
    return replace(task, ref_logprobs=ref_logprobs), loss, {"logprobs": logprobs} | {name: found[name] for name in outputs}


def _design(
    spec: PreferenceSpec,
    n_rows: int,
    unit: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    softcap: float | None,
    outputs: frozenset[str],
    workspace_bytes: int | None,
    backend: str,
    shard: VocabShard | None = None,
) -> Design:
    """The same whether gradients are wanted or not: so are the bits of what is scored."""
    if spec.use_weighting:
        return Design("recompute", why="the weights of WPO need the sum of squared probabilities")
    if softcap is not None and "mean_logits" in outputs:
        return Design("recompute", why="mean logits under a soft-cap need the logits")
    return design_on(
        device,
        backend,
        dtype,
        n_rows=n_rows,
        longest_sequence=unit,
        vocab=vocab,
        needs_gradient=True,
        by_sequence=True,
        workspace_bytes=workspace_bytes,
        shard=shard,
    )


def _encode(spec: PreferenceSpec) -> tuple[str, list[float]]:
    """A spec as an op schema can take it; `ld_alpha` is in the rows' weights."""
    numbers = (spec.beta, spec.label_smoothing, spec.f_alpha_divergence_coef, spec.discopop_tau, spec.use_weighting)
    names = ",".join((spec.f_divergence_type, *spec.weighted_losses))
    return names, [*map(float, numbers), *spec.weighted_losses.values()]


def _decode(names: str, numbers: Sequence[float]) -> PreferenceSpec:
    f_divergence, *losses = names.split(",")
    beta, smoothing, alpha, tau, weighting, *weights = numbers
    return PreferenceSpec(
        tuple(losses),
        loss_weights=tuple(weights),
        beta=beta,
        label_smoothing=smoothing,
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=alpha,
        discopop_tau=tau,
        use_weighting=bool(weighting),
    )


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    sequences: Tensor,
    row_weights: Tensor,
    lengths: Tensor,
    ref_logprobs: Tensor | None,
    denominator: Tensor | None,
    token_denominator: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    ref_compute_dtype: torch.dtype,
    group_name: str,
    span: Sequence[int],
    spec_names: str,
    spec_numbers: Sequence[float],
    n_pairs: int,
    unit: int,
    outputs: str,
    workspace_bytes: int | None,
    needs: Sequence[bool],
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shard = VocabShard.decode(group_name, span)
    ids = torch.where(mask, ids, IGNORED)
    row_or_scalar = temperature if row_temperature is None else row_temperature
    transforms = (row_or_scalar, logit_scale, softcap)
    policy = Projection(hidden, weight, bias, *transforms, compute_dtype, pair(low_hidden, low_weight), shard)
    if hidden.device.type == "cpu" or check_values:
        known_temperature = None if row_temperature is None else torch.where(mask, row_temperature, 1.0)
        check_ranks(shard, mask.shape[0], hidden.device)
        _checks.check_values(ids, None, known_temperature, policy.vocab, IGNORED)
        _checks.check_values(sequences, None, None, 2 * n_pairs, None, ids_name="sequence_ids")
    ids, _, _ = local_ids(shard, ids, None, IGNORED)
    spec, wanted = _decode(spec_names, spec_numbers), frozenset(outputs.split(",")) - {""}
    n = mask.shape[0]
    unit = n if spec.couples_pairs else unit
    task = Task(sequences, mask, row_weights, lengths, n_pairs, spec, ref_logprobs, denominator, token_denominator)

    # The one read that waits for a device.
    counts = mask.view(-1, unit).sum(1).tolist() if backend == "triton" and n else None

    def design(dtype: torch.dtype) -> Design:
        arguments = (weight.shape[0], dtype, hidden.device, softcap, wanted, workspace_bytes, backend, shard)
        return _design(spec, n, unit, *arguments)

    def group(x: Projection, coefficients: Coefficients, design: Design, needs: Needs, outputs: frozenset[str]) -> GroupTask:
        return GroupTask(
            x, ids, mask, coefficients, design, needs, outputs=outputs, bounds=range(0, n + 1, max(unit, 1)), counts=counts
        )

    with torch.autocast(hidden.device.type, enabled=False):
        if ref_hidden is not None and ref_weight is not None:
            low_rank = pair(ref_low_hidden, ref_low_weight)
            reference = Projection(ref_hidden, ref_weight, ref_bias, *transforms, ref_compute_dtype, low_rank, shard)
            scoring = group(reference, _no_gradient, design(ref_compute_dtype), Needs(False, False, False), frozenset())
            logprobs = run_groups(scoring, backend).logprobs
            task = replace(task, ref_logprobs=task.sequence_logprobs(slice(0, n), logprobs))
        asked = wanted | ({"log_sum_sq_probs"} if spec.use_weighting else set())
        chosen = design(compute_dtype)
        from_head = {"mean_logits"} & asked if chosen.name != "recompute" else set()
        wanted_rows = group(policy, task.coefficients, chosen, Needs(*needs), frozenset(asked - from_head))
        result = run_groups(wanted_rows, backend)
        if from_head:
            result.rows["mean_logits"] = _mean_logits(policy, mask)
    empty = result.logprobs.new_empty(0)
    extra = (result.rows.get(name, torch.empty_like(empty, dtype=dtype)) for name, dtype in _token_dtypes(policy.dtype).items())
    return (  # type: ignore[return-value]
        task.loss(result.logprobs, result.rows.get("log_sum_sq_probs")).to(policy.dtype),
        task.reference().clone(),
        result.logprobs,
        *extra,
        *(empty.clone() if g is None else g for g in result.gradients),
    )


def _mean_logits(x: Projection, mask: Tensor) -> Tensor:
    """Means [N] over the vocabulary of logits without a soft-cap, by the head's mean row; 0 behind the mask."""
    vocab = x.vocab

    def mean_row(weight: Tensor) -> Tensor:
        return weight.to(x.compute_dtype).sum(0, dtype=x.dtype) / vocab

    total = x.hidden.new_zeros(mask.shape, dtype=x.dtype)
    row, low_row = mean_row(x.weight), None if x.low_rank is None else mean_row(x.low_rank[1])
    for part in chunks(mask.shape[0], TARGET_ROWS[kind_of(mask.device)]):
        total[part] = x.hidden_rows(part) @ row
        if low_row is not None:
            total[part] += x.low_hidden_rows(part) @ low_row
    if x.bias is not None:
        total += x.bias.to(x.dtype).sum() / vocab
    (total,) = summed(x.shard, total)
    return torch.where(mask, total * x.row_slopes(mask.shape[0]), 0.0)


def _no_gradient(span: slice, places: Tensor | None, scores: Scores) -> Tensor:
    return torch.zeros_like(scores.logprobs)


def _token_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {name: torch.bool if name == "is_top1" else dtype for name in TOKEN_OUTPUTS}


_op = torch.library.custom_op("dppo_kernels::linear_preference_loss", _compute, mutates_args=())


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask, compute_dtype, n_pairs, outputs, needs = rest[6], rest[17], rest[23], rest[25], rest[27]
    dtype, wanted = stat_dtype(compute_dtype), outputs.split(",")
    rows = hidden.new_empty(mask.shape, dtype=dtype)
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return (
        rows.new_empty(()),
        rows.new_empty(2 * n_pairs, dtype=torch.float64),
        rows,
        *(rows.new_empty(mask.shape if name in wanted else 0, dtype=kind) for name, kind in _token_dtypes(dtype).items()),
        *(rows.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needs, strict=True)),
    )


register_hand_over(_op, "linear_preference_loss")
