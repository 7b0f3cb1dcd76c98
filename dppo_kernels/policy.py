"""Token-level policy losses of the PPO family as one function of a frozen spec.

Per token, with x = logp - anchor clamped to +-20 and r = exp(x) (token level) or exp(masked mean of x over the sequence):

    clip        -min(min(r, ratio_cap) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo       -sg(min(r, epsilon_high)) A logp
    sapo        -A (4 / tau) sigmoid(tau (r - 1)),  tau by the sign of A
    divergence  -A sg(min(r, ratio_cap)) M logp,    M = trust_region_mask

plus beta * k3(ref) and minus entropy_coef * mean entropy. sg() is stop-gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.aggregate import REDUCTIONS, aggregate
from dppo_kernels.divergence import DIVERGENCES, divergence, trust_region_mask
from dppo_kernels.estimators import kl_estimate, log_ratio

SURROGATES = ("clip", "cispo", "sapo", "divergence")
RATIO_LEVELS = ("token", "sequence")

# DPPO paper (2602.04879), stability study: TV .15, KL .05, the same for binary and top-K.
DEFAULT_THRESHOLD = MappingProxyType({kind: 0.15 if kind.endswith("tv") else 0.05 for kind in DIVERGENCES})


class Stat(NamedTuple):
    """Detached partial sums of one metric, so that any reduction over micro-batches and ranks stays exact."""

    sum: Tensor  # scalar
    count: Tensor  # type: ignore[assignment]  # scalar; hides tuple.count
    max: Tensor  # scalar, -inf if count is 0

    @property
    def mean(self) -> Tensor:
        """Scalar mean; NaN if nothing was counted."""
        return self.sum / self.count


@dataclass(frozen=True)
class PolicyLossSpec:
    """What `policy_loss` computes. Start from `PRESETS` and change fields with `replace`.

    Args:
        surrogate: "clip", "cispo", "sapo" or "divergence".
        ratio_level: "token", or "sequence" for the length-normalised sequence ratio of GSPO (clip and sapo only).
        epsilon_low: where A < 0: lower clip width, or the divergence threshold.
        epsilon_high: where A > 0: upper clip width, or the divergence threshold; for cispo the absolute cap of the ratio.
        ratio_cap: cap of the unclipped ratio: TRL's `delta` (= dual clip) for "clip", DPPO's C for "divergence". None = no cap.
        divergence: which divergence the "divergence" surrogate measures, one of `DIVERGENCES`; None for the others.
        sapo_temperature_pos: tau where A > 0.
        sapo_temperature_neg: tau elsewhere.
        reduction: one of `REDUCTIONS`.
        beta: coefficient of the k3 KL to a reference.
        kl_ratio_weighted: multiply that KL by the ratio (unbiased off-policy; TRL's `use_bias_correction_kl`).
        entropy_coef: coefficient of the entropy bonus.

    Raises:
        ValueError: unknown names, widths or caps out of range, or a field the surrogate would ignore.
    """

    surrogate: str
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    ratio_cap: float | None = None
    divergence: str | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    reduction: str = "token_mean"
    beta: float = 0.0
    kl_ratio_weighted: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        _checks.check_choice("surrogate", self.surrogate, SURROGATES)
        _checks.check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        _checks.check_choice("reduction", self.reduction, REDUCTIONS)
        for name in ("epsilon_low", "epsilon_high", "sapo_temperature_pos", "sapo_temperature_neg"):
            _checks.check_positive(name, getattr(self, name))
        for name in ("beta", "entropy_coef"):
            _checks.check_number(name, getattr(self, name))
        if self.beta < 0:
            raise ValueError(f"`beta` must not be negative, got {self.beta}")
        if self.surrogate == "divergence":
            _checks.check_choice("divergence", self.divergence, DIVERGENCES)
        elif self.divergence is not None:
            raise ValueError(f"`divergence` is {self.divergence!r}, but surrogate {self.surrogate!r} measures none")
        if self.ratio_cap is not None:
            _checks.check_positive("ratio_cap", self.ratio_cap)
            if self.surrogate not in ("clip", "divergence"):
                raise ValueError(f"`ratio_cap` is {self.ratio_cap}, but surrogate {self.surrogate!r} ignores it")
        if self.ratio_level == "sequence" and self.surrogate not in ("clip", "sapo"):
            raise ValueError(f"surrogate {self.surrogate!r} is defined per token; `ratio_level` must be 'token'")

    @property
    def needs_topk(self) -> bool:
        """Whether the loss compares the rollout's top-K log-probs."""
        return self.divergence is not None and self.divergence.startswith("topk")

    def replace(self, **changes: Any) -> "PolicyLossSpec":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


def _dppo(kind: str) -> PolicyLossSpec:
    threshold = DEFAULT_THRESHOLD[kind]
    return PolicyLossSpec("divergence", divergence=kind, epsilon_low=threshold, epsilon_high=threshold, ratio_cap=20.0)


PRESETS: Mapping[str, PolicyLossSpec] = MappingProxyType(
    {
        "ppo": PolicyLossSpec("clip"),
        "grpo": PolicyLossSpec("clip", reduction="sequence_mean"),
        "bnpo": PolicyLossSpec("clip"),
        "dr_grpo": PolicyLossSpec("clip", reduction="fixed_length"),
        # dapo, cispo and dppo: the caller's `denominator` is the token count of the optimiser step over all ranks.
        "dapo": PolicyLossSpec("clip", epsilon_high=0.28),
        "gspo": PolicyLossSpec("clip", ratio_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4, reduction="sequence_mean"),
        "cispo": PolicyLossSpec("cispo", epsilon_high=5.0),
        "sapo": PolicyLossSpec("sapo", reduction="sequence_mean"),
        **{f"dppo_{kind}": _dppo(kind) for kind in DIVERGENCES},
    }
)


def policy_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor,
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
) -> tuple[Tensor, dict[str, Stat]]:
    """Policy loss of one micro-batch, differentiable in `logprobs` (and `entropy`), with metric partial sums.

    Args:
        logprobs: [B, T] or [N] log-probs of the sampled tokens under the policy being trained.
        anchor_logprobs: same shape; what the ratio is against: the rollout policy for DPPO, the trainer's old one for PPO.
        advantages: [B] (one per sequence), [B, T] or [N].
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
    topk = {"topk_logprobs": topk_logprobs, "rollout_topk_logprobs": rollout_topk_logprobs, "topk_valid": topk_valid}
    per_token_inputs = {"anchor_logprobs": anchor_logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs}
    advantages = _check_arguments(logprobs, advantages, loss_mask, spec, per_token_inputs, token_weights, topk)
    dtype = stat_dtype(logprobs.dtype)

    def clean(values: Tensor) -> Tensor:
        # Masking the inputs (not the outputs) keeps NaN behind the mask out of the values and of the gradients.
        return torch.where(loss_mask, values, 0.0).to(dtype)

    logp, anchor = clean(logprobs), clean(anchor_logprobs.detach())
    advantages = clean(advantages.detach().expand_as(logprobs))
    ratio = _ratio(logp, anchor, loss_mask, spec.ratio_level)
    if spec.surrogate == "clip":
        per_token, keep, metrics = _clip(ratio, advantages, spec)
    elif spec.surrogate == "cispo":
        per_token, keep, metrics = _cispo(ratio, advantages, logp, spec)
    elif spec.surrogate == "sapo":
        per_token, keep, metrics = _sapo(ratio, advantages, spec)
    else:
        per_token, keep, metrics = _divergence_masked(ratio, advantages, logp, anchor, spec, topk)

    metrics["ratio"] = ratio
    metrics["ratio_squared"] = ratio.square()
    metrics["prob_gap"] = (logp.exp() - anchor.exp()).abs()
    metrics["anchor_kl"] = anchor - logp
    metrics["surrogate"] = -advantages * ratio * keep
    if token_weights is not None:
        per_token = per_token * clean(token_weights.detach().expand_as(logprobs))
    if ref_logprobs is not None:
        ref_kl = kl_estimate("k3", logp, clean(ref_logprobs.detach()))
        if spec.kl_ratio_weighted:
            ref_kl = ref_kl * ratio
        per_token = per_token + spec.beta * ref_kl
        metrics["ref_kl"] = ref_kl
    loss = aggregate(per_token, loss_mask, spec.reduction, denominator=denominator, max_length=max_length)
    if entropy is not None:
        metrics["entropy"] = entropy
        if spec.entropy_coef:
            mean_entropy = aggregate(clean(entropy), loss_mask, "token_mean", denominator=entropy_denominator)
            loss = loss - spec.entropy_coef * mean_entropy
    return loss, {name: _stat(values, loss_mask) for name, values in metrics.items()}


# Per-token loss, which tokens keep the policy gradient, and metrics by name.
_Surrogate = tuple[Tensor, Tensor, dict[str, Tensor]]


def _clip(ratio: Tensor, advantages: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    capped = ratio if spec.ratio_cap is None else ratio.clamp(max=spec.ratio_cap)
    clipped = ratio.clamp(1 - spec.epsilon_low, 1 + spec.epsilon_high)
    low = (ratio < 1 - spec.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + spec.epsilon_high) & (advantages > 0)
    per_token = -torch.minimum(capped * advantages, clipped * advantages)
    return per_token, ~(low | high), {"clipped_low": low, "clipped_high": high}


def _cispo(ratio: Tensor, advantages: Tensor, logp: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    coefficient = -ratio.detach().clamp(max=spec.epsilon_high) * advantages
    keep = torch.ones_like(ratio, dtype=torch.bool)
    return _score_function(coefficient, logp), keep, {"ratio_above_cap": ratio > spec.epsilon_high}


def _sapo(ratio: Tensor, advantages: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    tau = torch.where(advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg).to(ratio.dtype)
    keep = torch.ones_like(ratio, dtype=torch.bool)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), keep, {}


def _divergence_masked(
    ratio: Tensor,
    advantages: Tensor,
    logp: Tensor,
    anchor: Tensor,
    spec: PolicyLossSpec,
    topk: dict[str, Tensor | None],
) -> _Surrogate:
    d = divergence(str(spec.divergence), logp, anchor, **topk)
    keep = trust_region_mask(d, logp, anchor, advantages, low=spec.epsilon_low, high=spec.epsilon_high)
    metrics = {
        "divergence": d,
        "masked": ~keep,
        "masked_positive": ~keep & (advantages > 0),
        "masked_negative": ~keep & (advantages < 0),
    }
    weight = ratio.detach()
    if spec.ratio_cap is not None:
        weight = weight.clamp(max=spec.ratio_cap)
        metrics["ratio_above_cap"] = ratio > spec.ratio_cap
    return _score_function(-advantages * weight * keep, logp), keep, metrics


def _score_function(coefficient: Tensor, logp: Tensor) -> Tensor:
    """``coefficient * logp``, with an exact 0 where the coefficient is 0 even if the token is impossible (logp = -inf)."""
    return torch.where(coefficient == 0, 0.0, coefficient * logp)


def _ratio(logp: Tensor, anchor: Tensor, mask: Tensor, level: str) -> Tensor:
    x = log_ratio(logp, anchor)
    if level == "sequence":
        # Masked positions hold 0 in both, so they add nothing; every token of a sequence shares the ratio.
        mean = x.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.exp().expand_as(x)
    return x.exp()


@torch.no_grad()
def _stat(values: Tensor, mask: Tensor) -> Stat:
    values = values.float()
    maximum = torch.where(mask, values, -torch.inf).flatten()
    maximum = torch.cat([maximum, maximum.new_full((1,), -torch.inf)]).max()
    return Stat(torch.where(mask, values, 0.0).sum(), mask.sum(), maximum)


def _check_arguments(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    spec: PolicyLossSpec,
    per_token_inputs: dict[str, Tensor | None],
    token_weights: Tensor | None,
    topk: dict[str, Tensor | None],
) -> Tensor:
    """Checks; returns the advantages as [B, 1], [B, T] or [N]."""
    if not isinstance(spec, PolicyLossSpec):
        raise TypeError(f"`spec` must be a PolicyLossSpec such as PRESETS['dapo'], got {type(spec).__name__}")
    _checks.check_floating("logprobs", logprobs)
    if logprobs.dim() not in (1, 2):
        raise ValueError(f"`logprobs` must be [B, T] or [N], got {list(logprobs.shape)}")
    if logprobs.dim() == 1 and (spec.ratio_level == "sequence" or spec.reduction != "token_mean"):
        raise ValueError(
            f"ratio_level={spec.ratio_level!r} with reduction={spec.reduction!r} needs [B, T] `logprobs`, "
            f"got {list(logprobs.shape)}"
        )
    _checks.check_mask("loss_mask", loss_mask)
    _checks.check_shape("loss_mask", loss_mask, logprobs.shape, "that of `logprobs`")
    for name, value in per_token_inputs.items():
        if value is not None:
            _checks.check_floating(name, value)
            _checks.check_shape(name, value, logprobs.shape, "that of `logprobs`")
    if token_weights is not None:
        _checks.check_floating("token_weights", token_weights)
        if token_weights.shape not in (logprobs.shape, (*logprobs.shape[:1], 1)):
            raise ValueError(f"`token_weights` must be {list(logprobs.shape)} or [B, 1], got {list(token_weights.shape)}")
    if spec.beta and per_token_inputs["ref_logprobs"] is None:
        raise ValueError(f"spec.beta is {spec.beta}: `ref_logprobs` is needed")
    if spec.entropy_coef and per_token_inputs["entropy"] is None:
        raise ValueError(f"spec.entropy_coef is {spec.entropy_coef}: `entropy` is needed")
    for name, value in topk.items():
        if value is not None and not spec.needs_topk:
            raise ValueError(f"`{name}` is given, but `spec` compares no top-K")
    _checks.check_floating("advantages", advantages)
    if advantages.dim() == 1 and logprobs.dim() == 2:
        _checks.check_shape("advantages", advantages, logprobs.shape[:1], "[B]")
        return advantages[:, None]
    _checks.check_shape("advantages", advantages, logprobs.shape, "[B] or that of `logprobs`")
    return advantages
