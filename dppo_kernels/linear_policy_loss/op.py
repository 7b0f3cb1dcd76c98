"""Public `linear_policy_loss` and its custom op ``dppo_kernels::linear_policy_loss``."""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._handover import register_hand_over
from dppo_kernels._lora import LoraWeight, split_head
from dppo_kernels._numerics import compute_dtype_of, split_temperature, stat_dtype
from dppo_kernels._packing import read_offsets
from dppo_kernels._shard import VocabShard, arguments, check_ranks, encode, local_ids, take_shard
from dppo_kernels._tiling import DEFAULT_WORKSPACE_BYTES, kind_of
from dppo_kernels.aggregate import reduction_weights
from dppo_kernels.linear_logprobs.group_design import Design, design_on
from dppo_kernels.linear_logprobs.groups import GroupResult, GroupTask
from dppo_kernels.linear_logprobs.op import check_linear_arguments, pair, run_groups
from dppo_kernels.linear_logprobs.projection import Needs, Projection
from dppo_kernels.linear_policy_loss.reference import IGNORED, PolicyAux, linear_policy_loss_ref
from dppo_kernels.linear_policy_loss.rows import PolicyRows, stat_names
from dppo_kernels.linear_policy_loss.task import Task, Totals, coefficients
from dppo_kernels.policy import Stat, check_policy_arguments, partial_sums, per_token
from dppo_kernels.policy_spec import PolicyLossSpec

if TYPE_CHECKING:  # not in builds of torch without it
    from torch.distributed import ProcessGroup


def linear_policy_loss(
    hidden: Tensor,  # [B, T, H] or [N, H]
    weight: Tensor | LoraWeight,  # [V, H]
    ids: Tensor,  # [B, T] or [N]
    anchor_logprobs: Tensor | None,  # [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    loss_mask: Tensor,  # [B, T] or [N]
    *,
    spec: PolicyLossSpec,
    rollout_topk_ids: Tensor | None = None,  # [..., K+1]
    rollout_topk_logprobs: Tensor | None = None,  # [..., K+1]
    topk_valid: Tensor | None = None,  # [..., K+1]
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    score_inactive: bool = False,
    return_aux: bool = False,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    check_values: bool = False,
) -> Any:
    """``policy_loss(linear_logprobs(hidden, weight, ids))`` as one op whose forward computes the gradient as well.

    The coefficient of every log-prob is known as soon as its row is normalised, so the gradient GEMMs follow the projection
    chunk by chunk and nothing is projected twice: 6 NHV FLOPs instead of 8 (frozen head: 4 instead of 6). Tokens behind the
    mask, or without an advantage when there is neither KL nor entropy bonus, enter no GEMM; tokens that are clipped or masked
    by the trust region enter no gradient GEMM. Nothing of size N x V exists. The backward scales the saved gradients by the
    incoming scalar, once: it refuses to run twice, and has no derivative.

    Args:
        hidden: [B, T, H] or [N, H] hidden states, already shifted: row t predicts ``ids[t]``.
        weight: [V, H] lm_head, of hidden's dtype (under autocast: any; both are rounded to the autocast dtype), or a
            `LoraWeight`, whose sum with its update is never made.
        ids: [B, T] or [N] int32/int64 sampled token ids; whatever stands behind the mask changes nothing.
        anchor_logprobs: shape of `ids`; what the ratio is against. None: the policy itself (on-policy, ratio 1).
        advantages: [B] (one per sequence), [B, T] or [N]; [B] with [N] needs `cu_seqlens`, and is taken for [N] where B is N:
            [B, 1] never is.
        loss_mask: bool, shape of `ids`, True = counts.
        spec: the loss, e.g. ``PRESETS["dppo_topk_tv"]``.
        rollout_topk_ids: [..., K+1] the rollout's top-K ids, the sampled one injected (see `topk_logprobs`); with the next two
            for top-K divergences only. A negative id is padding.
        rollout_topk_logprobs: [..., K+1] their log-probs under the rollout policy.
        topk_valid: bool [..., K+1]; False = absent.
        ref_logprobs: shape of `ids`; needed if ``spec.beta`` is not 0.
        token_weights: shape of `ids` or [B, 1]; multiplies the surrogate.
        denominator: replaces the reduction's own count, see `aggregate`.
        entropy_denominator: replaces the call's count of active tokens in the mean entropy.
        max_length: for the "fixed_length" reduction.
        cu_seqlens: int32/int64 [B + 1] offsets of sequences packed into [N], as flash attention takes them, from 0 to N: ratios
            and reductions of sequences then work on [N].
        bias: [V] lm_head bias.
        temperature: positive number, or a tensor of the shape of `ids` (not differentiable).
        logit_scale: as in `linear_logprobs`.
        softcap: as in `linear_logprobs`.
        with_entropy: report the entropy even if ``spec.entropy_coef`` is 0.
        score_inactive: score every token that counts, so that statistics cover tokens without an advantage too (2 NHV more for
            those); loss and gradients are the same.
        return_aux: also return per-token log-probs and entropies.
        process_group: ranks among which the head is shared out along V, as in `linear_logprobs`; like the next two.
        vocab_start: the id of this rank's first row.
        vocab_size: V of all ranks together.
        workspace_bytes: bound of the exponentials that exist at one time, beside a few numbers per row and vocabulary tile
            (default 40 MiB on CPU, 512 MiB on CUDA); too little for a chunk of rows, or 0, works in tiles and recomputes the
            logits: 8 NHV. See `explain_linear_policy_loss`.
        backend: as in `linear_logprobs`.
        check_values: check the range of ids on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        ``(loss, stats)``, or ``(loss, stats, PolicyAux)``. The loss is a float32 scalar (float64 for float64 inputs),
        differentiable in hidden, weight and bias. Stats are those of `policy_loss` over the tokens that were scored, and
        "unscored": the share of active tokens that were not.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, id or option, or a tensor missing that `spec` needs.

    Source: gradient in the forward, Liger's fused linear losses (arXiv 2410.10989); losses, see `policy_loss`.
    """
    lead = ids.shape
    weight, bias, shard = take_shard(weight, bias, process_group, vocab_start, vocab_size)
    check_linear_arguments(hidden, weight, ids, bias, rollout_topk_ids, temperature, logit_scale, softcap)
    per_token_inputs = {"anchor_logprobs": anchor_logprobs, "ref_logprobs": ref_logprobs}
    check_policy_arguments(("ids", ids), advantages, loss_mask, spec, per_token_inputs, token_weights, cu_seqlens)
    _check_topk(spec, rollout_topk_ids, rollout_topk_logprobs, topk_valid)
    topk = {"rollout_topk_logprobs": rollout_topk_logprobs, "topk_valid": topk_valid}
    others = {"loss_mask": loss_mask, "advantages": advantages, "token_weights": token_weights, **per_token_inputs, **topk}
    for argument, value in others.items():
        if value is not None:
            _checks.check_device(argument, value, "hidden", hidden)
    if rollout_topk_ids is not None:
        known = rollout_topk_ids >= 0
        topk_valid = known if topk_valid is None else known & topk_valid
    _checks.check_workspace_bytes(workspace_bytes)
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_WORKSPACE_BYTES[kind_of(hidden.device)]
    compute_dtype = compute_dtype_of(hidden)
    name = _backend.resolve("linear_policy_loss", backend, hidden.device, compute_dtype)
    reports_entropy = with_entropy or spec.entropy_coef != 0
    if name == "reference":
        loss, stats, aux = linear_policy_loss_ref(
            hidden,
            weight,
            ids,
            anchor_logprobs,
            advantages,
            loss_mask,
            spec=spec,
            head={
                "bias": bias,
                "temperature": temperature,
                "logit_scale": logit_scale,
                "softcap": softcap,
                **arguments(shard),
            },
            topk=(rollout_topk_ids, rollout_topk_logprobs, topk_valid),
            with_entropy=reports_entropy,
            check_values=check_values,
            ref_logprobs=ref_logprobs,
            token_weights=token_weights,
            denominator=denominator,
            entropy_denominator=entropy_denominator,
            max_length=max_length,
            cu_seqlens=cu_seqlens,
        )
        return (loss, stats, aux) if return_aux else (loss, stats)

    dtype = stat_dtype(compute_dtype)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else per_token(values.detach(), lead, cu_seqlens).reshape(-1).to(dtype)

    def columns(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1, values.shape[-1])

    mask = loss_mask.reshape(-1)
    weights = reduction_weights(
        loss_mask, spec.reduction, denominator=denominator, max_length=max_length, dtype=dtype, cu_seqlens=cu_seqlens
    )
    entropy_weight = None
    if spec.entropy_coef:
        mean = reduction_weights(
            loss_mask,
            "token_mean",
            denominator=entropy_denominator,
            max_length=None,
            dtype=dtype,
            denominator_name="entropy_denominator",
        )
        entropy_weight = -spec.entropy_coef * mean
    row_temperature, scalar_temperature = split_temperature(temperature, mask.shape[0], dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    base, low_hidden, low_weight = split_head(weight, rows, mask, compute_dtype)
    inputs = (rows, base, None if bias is None else bias.contiguous(), low_hidden, low_weight)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    loss, logprobs, entropies, scored, packed, *_ = torch.ops.dppo_kernels.linear_policy_loss(
        *inputs,
        ids.reshape(-1).long(),
        mask,
        flat(advantages),
        weights.expand(lead).reshape(-1),
        flat(anchor_logprobs),
        flat(ref_logprobs),
        flat(token_weights),
        columns(None if rollout_topk_ids is None else rollout_topk_ids.long()),
        columns(rollout_topk_logprobs),
        columns(topk_valid),
        entropy_weight,
        row_temperature,
        cu_seqlens,
        scalar_temperature,
        logit_scale,
        softcap,
        compute_dtype,
        *_encode(spec),
        max(lead[1], 1) if len(lead) == 2 else 1,
        workspace_bytes,
        reports_entropy,
        score_inactive,
        needs,
        *encode(shard),
        check_values,
        name,
    )
    names = (*stat_names(spec, ref=ref_logprobs is not None, entropy=reports_entropy), "unscored")
    stats = {key: Stat(row[0], row[1].long(), row[2]) for key, row in zip(names, packed.unbind(0), strict=True)}
    aux = PolicyAux(logprobs.reshape(lead), entropies.reshape(lead) if reports_entropy else None, scored.reshape(lead))
    return (loss, stats, aux) if return_aux else (loss, stats)


def explain_linear_policy_loss(
    spec: PolicyLossSpec,
    *,
    n_rows: int,
    vocab: int,
    sequence_length: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    needs_gradient: bool = True,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> str:
    """Which design serves a call of `linear_policy_loss`, in words.

    Args:
        spec: the loss.
        n_rows: tokens N.
        vocab: V.
        sequence_length: T, for sequence-level ratios.
        dtype: of hidden and weight (under autocast: the autocast dtype).
        device: where they are.
        needs_gradient: whether any of hidden, weight and bias requires a gradient.
        workspace_bytes: as in `linear_policy_loss`.
        backend: as in `linear_policy_loss`.
    """
    device = torch.device(device)
    name = _backend.resolve("linear_policy_loss", backend, device, dtype)
    if name == "reference":
        return "reference: autograd through linear_logprobs and policy_loss"
    _checks.check_workspace_bytes(workspace_bytes)
    design = _design(spec, n_rows, sequence_length, vocab, dtype, device, needs_gradient, workspace_bytes, name)
    return f"{name}: {design.explain()}"


def _design(
    spec: PolicyLossSpec,
    n_rows: int,
    sequence_length: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_gradient: bool,
    workspace_bytes: int | None,
    backend: str,
    shard: VocabShard | None = None,
) -> Design:
    return design_on(
        device,
        backend,
        dtype,
        n_rows=n_rows,
        longest_sequence=sequence_length,
        vocab=vocab,
        needs_gradient=needs_gradient,
        by_sequence=spec.ratio_level == "sequence",
        workspace_bytes=workspace_bytes,
        shard=shard,
    )


def _encode(spec: PolicyLossSpec) -> tuple[str, list[float]]:
    """A spec as an op schema can take it."""
    names = f"{spec.surrogate},{spec.ratio_level},{spec.divergence or ''},{spec.reduction}"
    cap = math.inf if spec.ratio_cap is None else spec.ratio_cap
    sapo = (spec.sapo_temperature_pos, spec.sapo_temperature_neg)
    return names, [
        float(x)
        for x in (spec.epsilon_low, spec.epsilon_high, cap, *sapo, spec.beta, spec.kl_ratio_weighted, spec.entropy_coef)
    ]


def _decode(names: str, numbers: Sequence[float]) -> PolicyLossSpec:
    surrogate, ratio_level, kind, reduction = names.split(",")
    low, high, cap, positive, negative, beta, weighted, entropy_coef = numbers
    return PolicyLossSpec(
        surrogate,
        ratio_level=ratio_level,
        epsilon_low=low,
        epsilon_high=high,
        ratio_cap=None if math.isinf(cap) else cap,
        divergence=kind or None,
        sapo_temperature_pos=positive,
        sapo_temperature_neg=negative,
        reduction=reduction,
        beta=beta,
        kl_ratio_weighted=bool(weighted),
        entropy_coef=entropy_coef,
    )


@torch.library.custom_op("dppo_kernels::linear_policy_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    anchor: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    topk_ids: Tensor | None,
    rollout_topk_logprobs: Tensor | None,
    topk_valid: Tensor | None,
    entropy_weight: Tensor | None,
    row_temperature: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    spec_names: str,
    spec_numbers: Sequence[float],
    sequence_length: int,
    workspace_bytes: int,
    with_entropy: bool,
    score_inactive: bool,
    needs: Sequence[bool],
    group_name: str,
    span: Sequence[int],
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_or_scalar = temperature if row_temperature is None else row_temperature
    low_rank, shard = pair(low_hidden, low_weight), VocabShard.decode(group_name, span)
    projection = Projection(hidden, weight, bias, row_or_scalar, logit_scale, softcap, compute_dtype, low_rank, shard)
    if hidden.device.type == "cpu" or check_values:
        known = torch.where(mask, ids, IGNORED)
        known_topk = None if topk_ids is None else torch.where(mask[:, None], topk_ids, IGNORED)
        known_temperature = None if row_temperature is None else torch.where(mask, row_temperature, 1.0)
        check_ranks(shard, mask.shape[0], hidden.device)
        if cu_seqlens is not None:
            read_offsets(cu_seqlens, mask.shape[0])
        _checks.check_values(known, known_topk, known_temperature, projection.vocab, IGNORED, gather_name="rollout_topk_ids")
    spec = _decode(spec_names, spec_numbers)
    # Behind the mask may stand anything: it must not become a column of another rank's.
    ids, topk_ids, _ = local_ids(shard, torch.where(mask, ids, IGNORED), topk_ids, IGNORED)
    bounds: Sequence[int] | None = None
    if spec.ratio_level == "sequence":
        bounds = range(0, mask.shape[0] + 1, sequence_length)
        if cu_seqlens is not None:  # the one read that waits for a device
            bounds = read_offsets(cu_seqlens, mask.shape[0])
            sequence_length = max((b - a for a, b in pairwise(bounds)), default=1)
    sizes = (mask.shape[0], sequence_length, weight.shape[0])
    design = _design(spec, *sizes, compute_dtype, hidden.device, any(needs), workspace_bytes, backend, shard)
    rows = PolicyRows(
        ids,
        mask,
        advantages,
        loss_weights,
        anchor,
        ref_logprobs,
        token_weights,
        topk_ids,
        rollout_topk_logprobs,
        topk_valid,
    )
    task = Task(rows, spec, bounds, entropy_weight, with_entropy, score_inactive)
    totals = Totals.empty(task, projection.dtype)
    group = GroupTask(
        projection,
        ids,
        task.scored,
        functools.partial(coefficients, task, totals),
        design,
        Needs(*needs),
        gather_ids=topk_ids,
        bounds=bounds,
        entropy_weight=entropy_weight,
        outputs=frozenset(("entropy",) if with_entropy else ()),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        result = _run(task, group, totals, backend)
    totals.stats["unscored"] = partial_sums(mask & ~task.scored, mask)
    packed = torch.stack([torch.stack([x.double() for x in stat]) for stat in totals.stats.values()])
    empty = result.logprobs.new_empty(0)
    return (  # type: ignore[return-value]
        totals.loss.to(result.logprobs.dtype),
        result.logprobs,
        result.rows.get("entropy", empty),
        task.scored.clone(),  # may be the mask itself
        packed,
        *(empty.clone() if g is None else g for g in result.gradients),
    )


def _run(task: Task, group: GroupTask, totals: Totals, backend: str) -> GroupResult:
    if backend == "triton" and group.design.name == "forward":  # imported here: the package works without Triton
        from dppo_kernels.linear_policy_loss import triton_impl

        return triton_impl.linear_policy_loss_fwd(task, group, totals)
    return run_groups(group, backend)


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    compute_dtype, names, numbers, _, _, with_entropy, _, needs, *_ = rest[-12:]
    ref_logprobs = rest[3]
    dtype, spec = stat_dtype(compute_dtype), _decode(names, numbers)
    rows = hidden.new_empty(mask.shape, dtype=dtype)
    stats = (*stat_names(spec, ref=ref_logprobs is not None, entropy=with_entropy), "unscored")
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return (
        rows.new_empty(()),
        rows,
        rows.new_empty(mask.shape if with_entropy else 0),
        torch.empty_like(mask),
        rows.new_empty((len(stats), 3), dtype=torch.float64),
        *(rows.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needs, strict=True)),
    )


register_hand_over(_op, "linear_policy_loss")


def _check_topk(spec: PolicyLossSpec, ids: Tensor | None, logprobs: Tensor | None, valid: Tensor | None) -> None:
    given = {"rollout_topk_ids": ids, "rollout_topk_logprobs": logprobs, "topk_valid": valid}
    if not spec.needs_topk:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` is given, but `spec` compares no top-K")
        return
    if ids is None or logprobs is None:
        raise ValueError(f"divergence {spec.divergence!r} needs `rollout_topk_ids` and `rollout_topk_logprobs`")
    _checks.check_floating("rollout_topk_logprobs", logprobs)
    _checks.check_shape("rollout_topk_logprobs", logprobs, ids.shape, "that of `rollout_topk_ids`")
    if valid is not None:
        _checks.check_mask("topk_valid", valid)
        _checks.check_shape("topk_valid", valid, ids.shape, "that of `rollout_topk_ids`")
