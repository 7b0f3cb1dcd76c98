"""Policy losses of the PPO family as one function of a frozen spec; the formulas are in `surrogates`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels._packing import check_cu_seqlens, spread
from dppo_kernels.aggregate import aggregate
from dppo_kernels.policy_spec import PolicyLossSpec
from dppo_kernels.surrogates import Tokens, token_losses


class Stat(NamedTuple):
    """Detached partial sums of one metric, so that any reduction over micro-batches and ranks stays exact."""

    sum: Tensor  # scalar
    count: Tensor  # type: ignore[assignment]  # scalar; hides tuple.count
    max: Tensor  # scalar, -inf if count is 0

    @property
    def mean(self) -> Tensor:
        """Scalar mean; NaN if nothing was counted."""
        return self.sum / self.count

    def merge(self, other: "Stat") -> "Stat":
        """The statistics of both together."""
        return Stat(self.sum + other.sum, self.count + other.count, torch.maximum(self.max, other.max))


def policy_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    spec: PolicyLossSpec,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    rollout_topk_logprobs: Tensor | None = None,
    topk_valid: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Stat]]:
    """Policy loss of one micro-batch, differentiable in `logprobs` (and `entropy`), with metric partial sums.

    Args:
        logprobs: [B, T] or [N] log-probs of the sampled tokens under the policy being trained.
        anchor_logprobs: same shape; what the ratio is against: the rollout policy for DPPO, the trainer's old one for PPO.
            None: `logprobs` themselves (on-policy, ratio 1).
        advantages: [B] (one per sequence), [B, T] or [N]; [B] with [N] needs `cu_seqlens`, and is taken for [N] where B is N:
            [B, 1] never is.
        loss_mask: bool, shape of `logprobs`, True = counts. Whatever stands behind it, NaN included, changes nothing.
        spec: the loss, e.g. ``PRESETS["dppo_binary_tv"]``.
        entropy: shape of `logprobs`, nats; needed if ``spec.entropy_coef`` is not 0, else only reported.
        ref_logprobs: shape of `logprobs`; needed if ``spec.beta`` is not 0.
        topk_logprobs: [..., K+1] as in `divergence`, like the next two; needed by top-K divergences only.
        rollout_topk_logprobs: [..., K+1].
        topk_valid: bool [..., K+1].
        token_weights: shape of `logprobs` or [B, 1], detached; multiplies the surrogate (importance correction, selection).
        denominator: replaces the reduction's own count, see `aggregate`.
        entropy_denominator: replaces the call's count of active tokens in the mean entropy.
        max_length: for the "fixed_length" reduction.
        cu_seqlens: int [B + 1] offsets of sequences packed into [N], as in `aggregate`: what is per sequence then works on [N].

    Returns:
        Scalar loss, and stats by name, each over active tokens. Always "ratio", "ratio_squared", "prob_gap" (|pi - anchor|),
        "anchor_kl" (k1 of anchor || pi) and "surrogate" (-M r A, comparable across losses). By surrogate: "divergence",
        "masked", "masked_positive", "masked_negative" (by the sign of A, shares of all active tokens), "clipped_low",
        "clipped_high", "ratio_above_cap". "ref_kl" and "entropy" where their tensors are given.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or tensors missing that `spec` needs.

    Source: PPO 1707.06347, GRPO 2402.03300, DAPO 2503.14476, Dr.GRPO 2503.20783, GSPO 2507.18071, CISPO 2506.13585,
    SAPO 2511.20347, DPPO 2602.04879.
    """
    _checks.check_floating("logprobs", logprobs)
    per_token_inputs = {"anchor_logprobs": anchor_logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs}
    check_policy_arguments(("logprobs", logprobs), advantages, loss_mask, spec, per_token_inputs, token_weights, cu_seqlens)
    if spec.entropy_coef and entropy is None:
        raise ValueError(f"spec.entropy_coef is {spec.entropy_coef}: `entropy` is needed")
    topk = {"topk_logprobs": topk_logprobs, "rollout_topk_logprobs": rollout_topk_logprobs, "topk_valid": topk_valid}
    for name, value in topk.items():
        if value is not None and not spec.needs_topk:
            raise ValueError(f"`{name}` is given, but `spec` compares no top-K")
    dtype = stat_dtype(logprobs.dtype)

    def clean(values: Tensor) -> Tensor:
        # Masking the inputs (not the outputs) keeps NaN behind the mask out of the values and of the gradients.
        return torch.where(loss_mask, per_token(values, logprobs.shape, cu_seqlens), 0.0).to(dtype)

    def clean_constant(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values.detach())

    logp = clean(logprobs)
    tokens = Tokens(
        logp,
        clean((logprobs if anchor_logprobs is None else anchor_logprobs).detach()),
        clean(advantages.detach()),
        loss_mask,
        clean_constant(token_weights),
        clean_constant(ref_logprobs),
        **topk,
        sequences=cu_seqlens,
    )
    losses, metrics = token_losses(tokens, spec)
    loss = aggregate(losses, loss_mask, spec.reduction, denominator=denominator, max_length=max_length, cu_seqlens=cu_seqlens)
    if entropy is not None:
        metrics["entropy"] = entropy
        if spec.entropy_coef:
            mean_entropy = aggregate(
                clean(entropy),
                loss_mask,
                "token_mean",
                denominator=entropy_denominator,
                denominator_name="entropy_denominator",
            )
            loss = loss - spec.entropy_coef * mean_entropy
    return loss, {name: partial_sums(values, loss_mask) for name, values in metrics.items()}


def per_token(values: Tensor, shape: Sequence[int], cu_seqlens: Tensor | None = None) -> Tensor:
    """Values given per token or per sequence ([B] or [B, 1]), with this shape."""
    if cu_seqlens is not None and values.shape != torch.Size(shape):
        return spread(values.reshape(-1), cu_seqlens, shape[0])
    return (values[:, None] if values.dim() < len(shape) else values).expand(shape)


@torch.no_grad()
def partial_sums(values: Tensor, mask: Tensor) -> Stat:
    """The statistics of `values` [...] where `mask` [...]."""
    values = values.float()
    maximum = torch.where(mask, values, -torch.inf).flatten()
    maximum = torch.cat([maximum, maximum.new_full((1,), -torch.inf)]).max()
    return Stat(torch.where(mask, values, 0.0).sum(), mask.sum(), maximum)


def check_policy_arguments(
    tokens: tuple[str, Tensor],
    advantages: Tensor,
    loss_mask: Tensor,
    spec: PolicyLossSpec,
    per_token_inputs: dict[str, Tensor | None],
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Checks that policy losses share; `tokens` are name and value of the argument that the others follow."""
    name, shape = tokens[0], tokens[1].shape
    if not isinstance(spec, PolicyLossSpec):
        raise TypeError(f"`spec` must be a PolicyLossSpec such as PRESETS['dapo'], got {type(spec).__name__}")
    if len(shape) not in (1, 2):
        raise ValueError(f"`{name}` must be [B, T] or [N], got {list(shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, *tokens)
    elif len(shape) == 1 and (spec.ratio_level == "sequence" or spec.reduction != "token_mean"):
        raise ValueError(
            f"ratio_level={spec.ratio_level!r} with reduction={spec.reduction!r} needs [B, T] `{name}`, or [N] with "
            f"`cu_seqlens`; got {list(shape)}"
        )
    n_sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    meaning = f"that of `{name}`"
    _checks.check_mask("loss_mask", loss_mask)
    _checks.check_shape("loss_mask", loss_mask, shape, meaning)
    for argument, value in per_token_inputs.items():
        if value is not None:
            _checks.check_floating(argument, value)
            _checks.check_shape(argument, value, shape, meaning)
    if token_weights is not None:
        _checks.check_floating("token_weights", token_weights)
        if token_weights.shape not in (shape, (n_sequences, 1)):
            raise ValueError(f"`token_weights` must be {list(shape)} or [B, 1], got {list(token_weights.shape)}")
    if spec.beta and per_token_inputs["ref_logprobs"] is None:
        raise ValueError(f"spec.beta is {spec.beta}: `ref_logprobs` is needed")
    _checks.check_floating("advantages", advantages)
    if cu_seqlens is not None:
        if advantages.shape not in (shape, (n_sequences, 1)):
            _checks.check_shape("advantages", advantages, (n_sequences,), "[N], or [B] of `cu_seqlens`")
    elif advantages.dim() == 1 and len(shape) == 2:
        _checks.check_shape("advantages", advantages, shape[:1], "[B]")
    else:
        _checks.check_shape("advantages", advantages, shape, f"[B] or {meaning}")
