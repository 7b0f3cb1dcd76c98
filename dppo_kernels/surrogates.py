"""Per-token policy losses and their gradient in closed form, on tensors that are clean behind the mask.

With x = logp - anchor clamped to +-20 and r = exp(x) (token level) or exp(masked mean of x over the sequence):

    clip        -min(min(r, ratio_cap) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo       -sg(min(r, epsilon_high)) A logp
    sapo        -A (4 / tau) sigmoid(tau (r - 1)),  tau by the sign of A
    divergence  -A sg(min(r, ratio_cap)) M logp,    M = trust_region_mask

plus beta * k3(ref). sg() is stop-gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._packing import Sequences, sequence_sums, spread
from dppo_kernels.divergence import divergence, trust_region_mask
from dppo_kernels.estimators import LOG_RATIO_LIMIT, kl_estimate, log_ratio
from dppo_kernels.policy_spec import PolicyLossSpec


class Tokens(NamedTuple):
    """What a token-level loss is a function of; [B, T] or [N] each, zeros behind the mask. Sequences of [N] must be said."""

    logprobs: Tensor
    anchor: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    token_weights: Tensor | None = None
    ref_logprobs: Tensor | None = None
    topk_logprobs: Tensor | None = None  # [..., K]
    rollout_topk_logprobs: Tensor | None = None
    topk_valid: Tensor | None = None  # bool
    sequences: Sequences | None = None  # of [N]

    def ratio(self, level: str) -> Tensor:
        """``pi / anchor``, one per token or the same for all tokens of a sequence."""
        x = log_ratio(self.logprobs, self.anchor)
        if level == "sequence":
            # Masked positions hold 0 in both, so they add nothing; every token of a sequence shares the ratio.
            return (self.sequence_sums(x) / self.sequence_lengths()).exp().expand_as(x)
        return x.exp()

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Of each sequence, as [B, 1] or at each of its tokens [N]."""
        if self.sequences is None:
            return values.sum(1, keepdim=True)
        return spread(sequence_sums(values, self.sequences), self.sequences, values.shape[0])

    def sequence_lengths(self) -> Tensor:
        """Active tokens, at least 1, as `sequence_sums` has them."""
        return self.sequence_sums(self.mask.to(self.logprobs.dtype)).clamp(min=1)


def token_losses(x: Tokens, spec: PolicyLossSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of every token before reduction and entropy bonus, metrics by name); differentiable in ``x.logprobs``."""
    ratio = x.ratio(spec.ratio_level)
    per_token, keep, metrics = _SURROGATES[spec.surrogate](x, ratio, spec)
    metrics["ratio"] = ratio
    metrics["ratio_squared"] = ratio.square()
    metrics["prob_gap"] = (x.logprobs.exp() - x.anchor.exp()).abs()
    metrics["anchor_kl"] = x.anchor - x.logprobs
    metrics["surrogate"] = -x.advantages * ratio * keep
    if x.token_weights is not None:
        per_token = per_token * x.token_weights
    if x.ref_logprobs is not None:
        ref_kl = kl_estimate("k3", x.logprobs, x.ref_logprobs)
        if spec.kl_ratio_weighted:
            ref_kl = ref_kl * ratio
        per_token = per_token + spec.beta * ref_kl
        metrics["ref_kl"] = ref_kl
    return per_token, metrics


def metric_names(spec: PolicyLossSpec, *, ref: bool) -> tuple[str, ...]:
    """Names of the metrics that `token_losses` returns, in its order."""
    own = {"clip": ("clipped_low", "clipped_high"), "cispo": ("ratio_above_cap",), "sapo": ()}
    own["divergence"] = ("divergence", "masked", "masked_positive", "masked_negative")
    if spec.surrogate == "divergence" and spec.ratio_cap is not None:
        own["divergence"] += ("ratio_above_cap",)
    common = ("ratio", "ratio_squared", "prob_gap", "anchor_kl", "surrogate")
    return (*own[spec.surrogate], *common, *(("ref_kl",) if ref else ()))


@torch.no_grad()
def gradient_on_logprobs(x: Tokens, loss_weights: Tensor, metrics: dict[str, Tensor], spec: PolicyLossSpec) -> Tensor:
    """``d(sum_t loss_weights_t loss_t) / d logprobs``, what autograd finds through `token_losses` (which gave `metrics`)."""
    ratio = metrics["ratio"]
    on_logprob, on_ratio = _DERIVATIVES[spec.surrogate](x, ratio, metrics, spec)
    if x.token_weights is not None:
        on_logprob, on_ratio = on_logprob * x.token_weights, on_ratio * x.token_weights
    if x.ref_logprobs is not None and spec.beta:
        gap = log_ratio(x.logprobs, x.ref_logprobs)
        slope = -torch.expm1(-gap) * _inside(x.logprobs - x.ref_logprobs)
        if spec.kl_ratio_weighted:
            on_ratio = on_ratio + spec.beta * kl_estimate("k3", x.logprobs, x.ref_logprobs)
            slope = slope * ratio
        on_logprob = on_logprob + spec.beta * slope
    through_ratio = loss_weights * on_ratio * ratio
    if spec.ratio_level == "sequence":
        total = x.sequence_sums(torch.where(x.mask, through_ratio, 0.0))
        through_ratio = (total / x.sequence_lengths()).expand_as(ratio)
    gradient = loss_weights * on_logprob + through_ratio * _inside(x.logprobs - x.anchor)
    return torch.where(x.mask, gradient, 0.0)


# Per-token loss, which tokens keep the policy gradient, and metrics by name.
_Surrogate = tuple[Tensor, Tensor, dict[str, Tensor]]


def _clip(x: Tokens, ratio: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    first, second = _clip_terms(x, ratio, spec)
    low = (ratio < 1 - spec.epsilon_low) & (x.advantages < 0)
    high = (ratio > 1 + spec.epsilon_high) & (x.advantages > 0)
    return -torch.minimum(first, second), ~(low | high), {"clipped_low": low, "clipped_high": high}


def _cispo(x: Tokens, ratio: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    coefficient = -ratio.detach().clamp(max=spec.epsilon_high) * x.advantages
    keep = torch.ones_like(ratio, dtype=torch.bool)
    return _score_function(coefficient, x.logprobs), keep, {"ratio_above_cap": ratio > spec.epsilon_high}


def _sapo(x: Tokens, ratio: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    tau = _sapo_temperature(x, spec)
    keep = torch.ones_like(ratio, dtype=torch.bool)
    return -x.advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), keep, {}


def _divergence_masked(x: Tokens, ratio: Tensor, spec: PolicyLossSpec) -> _Surrogate:
    topk = {
        "topk_logprobs": x.topk_logprobs,
        "rollout_topk_logprobs": x.rollout_topk_logprobs,
        "topk_valid": x.topk_valid,
    }
    d = divergence(str(spec.divergence), x.logprobs, x.anchor, **topk)
    keep = trust_region_mask(d, x.logprobs, x.anchor, x.advantages, low=spec.epsilon_low, high=spec.epsilon_high)
    metrics = {
        "divergence": d,
        "masked": ~keep,
        "masked_positive": ~keep & (x.advantages > 0),
        "masked_negative": ~keep & (x.advantages < 0),
    }
    if spec.ratio_cap is not None:
        metrics["ratio_above_cap"] = ratio > spec.ratio_cap
    return _score_function(_divergence_coefficient(x, ratio, keep, spec), x.logprobs), keep, metrics


# Derivatives of the per-token loss by logp with the ratio held, and by the ratio.
_Derivatives = tuple[Tensor, Tensor]


def _clip_derivatives(x: Tokens, ratio: Tensor, metrics: dict[str, Tensor], spec: PolicyLossSpec) -> _Derivatives:
    first, second = _clip_terms(x, ratio, spec)
    below_cap = torch.ones_like(x.mask) if spec.ratio_cap is None else ratio <= spec.ratio_cap
    between = (ratio >= 1 - spec.epsilon_low) & (ratio <= 1 + spec.epsilon_high)
    # Where both terms are equal, each has half of the weight: autograd's subgradient of a minimum.
    on_first = torch.where(first == second, 0.5, (first < second).to(ratio.dtype))
    return torch.zeros_like(ratio), -x.advantages * (on_first * below_cap + (1 - on_first) * between)


def _cispo_derivatives(x: Tokens, ratio: Tensor, metrics: dict[str, Tensor], spec: PolicyLossSpec) -> _Derivatives:
    return -ratio.clamp(max=spec.epsilon_high) * x.advantages, torch.zeros_like(ratio)


def _sapo_derivatives(x: Tokens, ratio: Tensor, metrics: dict[str, Tensor], spec: PolicyLossSpec) -> _Derivatives:
    gate = torch.sigmoid(_sapo_temperature(x, spec) * (ratio - 1))
    return torch.zeros_like(ratio), -4 * x.advantages * gate * (1 - gate)


def _divergence_derivatives(x: Tokens, ratio: Tensor, metrics: dict[str, Tensor], spec: PolicyLossSpec) -> _Derivatives:
    return _divergence_coefficient(x, ratio, ~metrics["masked"], spec), torch.zeros_like(ratio)


_SURROGATES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "divergence": _divergence_masked}
_DERIVATIVES = {
    "clip": _clip_derivatives,
    "cispo": _cispo_derivatives,
    "sapo": _sapo_derivatives,
    "divergence": _divergence_derivatives,
}


def _clip_terms(x: Tokens, ratio: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    capped = ratio if spec.ratio_cap is None else ratio.clamp(max=spec.ratio_cap)
    clipped = ratio.clamp(1 - spec.epsilon_low, 1 + spec.epsilon_high)
    return capped * x.advantages, clipped * x.advantages


def _sapo_temperature(x: Tokens, spec: PolicyLossSpec) -> Tensor:
    return torch.where(x.advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg).to(x.logprobs.dtype)


def _divergence_coefficient(x: Tokens, ratio: Tensor, keep: Tensor, spec: PolicyLossSpec) -> Tensor:
    weight = ratio.detach()
    return -x.advantages * (weight if spec.ratio_cap is None else weight.clamp(max=spec.ratio_cap)) * keep


def _score_function(coefficient: Tensor, logp: Tensor) -> Tensor:
    """``coefficient * logp``, with an exact 0 where the coefficient is 0 even if the token is impossible (logp = -inf)."""
    return torch.where(coefficient == 0, 0.0, coefficient * logp)


def _inside(difference: Tensor) -> Tensor:
    """Where `log_ratio` of this difference lets a gradient through."""
    return difference.abs() <= LOG_RATIO_LIMIT
