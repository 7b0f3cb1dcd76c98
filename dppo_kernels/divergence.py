"""Divergences between the rollout policy mu and the trained policy pi, and the trust-region mask built on them.

D compares mu -> pi: TV(mu, pi) or KL(mu || pi), from log-probs of the sampled token (binary) or of mu's top K and the sampled
token, with one bucket for all other tokens (top-K). Every one is a lower bound of the full-vocabulary divergence:
binary <= top-K <= full. Source: DPPO (arXiv 2602.04879), eq. 11-12 and appendix C.
"""

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import log1mexp, stat_dtype

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")

# Probability left for the "other" bucket when rounding made the kept ones sum to 1 or more.
MIN_OTHER = 1e-12


@torch.no_grad()
def divergence(
    kind: str,
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    topk_logprobs: Tensor | None = None,
    rollout_topk_logprobs: Tensor | None = None,
    topk_valid: Tensor | None = None,
) -> Tensor:
    """Per-token divergence D(mu, pi), detached.

    ``binary_tv``: ``|m - p|``. ``binary_kl``: ``m log(m/p) + (1-m) log((1-m)/(1-p))``. ``topk_tv``: ``sum |mu - pi| / 2`` and
    ``topk_kl``: ``sum mu log(mu/pi)`` over the kept ids and the bucket ``1 - sum(kept)``; nothing is renormalised.

    Args:
        kind: one of `DIVERGENCES`.
        logprobs: [...] log-probs of the sampled tokens under pi.
        rollout_logprobs: [...] the same under mu, at the same temperature.
        topk_logprobs: [..., K+1] log-probs under pi of *mu's* ids (top-K kinds; see `linear_logprobs(gather_ids=...)`).
        rollout_topk_logprobs: [..., K+1] the same under mu, sampled token included once (see `topk_logprobs`).
        topk_valid: bool [..., K+1]; columns that are False (padding, duplicates) count as absent. None = all valid.

    Returns:
        [...] D >= 0, in float32 (float64 for float64 inputs). Meaningless behind the caller's token mask.

    Raises:
        TypeError, ValueError: unknown kind, wrong dtypes or shapes, top-K arguments missing or superfluous.
    """
    _checks.check_choice("kind", kind, DIVERGENCES)
    _checks.check_floating("logprobs", logprobs)
    _checks.check_floating("rollout_logprobs", rollout_logprobs)
    _checks.check_shape("rollout_logprobs", rollout_logprobs, logprobs.shape, "that of `logprobs`")
    dtype = stat_dtype(torch.promote_types(logprobs.dtype, rollout_logprobs.dtype))
    if kind.startswith("binary"):
        topk = {"topk_logprobs": topk_logprobs, "rollout_topk_logprobs": rollout_topk_logprobs, "topk_valid": topk_valid}
        for name, value in topk.items():
            if value is not None:
                raise ValueError(f"`{name}` is given, but kind={kind!r} does not use it")
        log_p, log_m = logprobs.to(dtype), rollout_logprobs.to(dtype)
        return _binary_tv(log_m, log_p) if kind == "binary_tv" else _binary_kl(log_m, log_p)

    if topk_logprobs is None or rollout_topk_logprobs is None:
        raise ValueError(f"kind={kind!r} needs `topk_logprobs` and `rollout_topk_logprobs`")
    _checks.check_floating("topk_logprobs", topk_logprobs)
    _checks.check_floating("rollout_topk_logprobs", rollout_topk_logprobs)
    if topk_logprobs.shape[:-1] != logprobs.shape:
        raise ValueError(f"`topk_logprobs` must be [*logprobs.shape, K+1], got {list(topk_logprobs.shape)}")
    _checks.check_shape("rollout_topk_logprobs", rollout_topk_logprobs, topk_logprobs.shape, "that of `topk_logprobs`")
    if topk_valid is not None:
        _checks.check_mask("topk_valid", topk_valid)
        _checks.check_shape("topk_valid", topk_valid, topk_logprobs.shape, "that of `topk_logprobs`")
    # 1 - sum(kept) cancels: double precision keeps it as exact as the log-probs are. K+1 numbers per token, so it is cheap.
    log_m, log_p = _absent(rollout_topk_logprobs.double(), topk_valid), _absent(topk_logprobs.double(), topk_valid)
    m, p = log_m.exp(), log_p.exp()
    other_m, other_p = ((1 - x.sum(-1)).clamp(min=MIN_OTHER) for x in (m, p))
    if kind == "topk_tv":
        return (((m - p).abs().sum(-1) + (other_m - other_p).abs()) / 2).to(dtype)
    kept = torch.where(m > 0, m * (log_m - log_p), 0.0).sum(-1)
    return (kept + other_m * (other_m / other_p).log()).clamp(min=0.0).to(dtype)


@torch.no_grad()
def trust_region_mask(
    divergence: Tensor,
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """Which tokens keep their gradient: False where the update would push pi further out of the trust region.

    Dropped iff ``A > 0, pi > mu, D > high`` or ``A < 0, pi < mu, D > low`` (strict). A token being pushed back towards mu is
    never dropped. With ``D = |pi / mu - 1|`` this is exactly PPO's zero-gradient set.

    Args:
        divergence: [...] D of each token.
        logprobs: [...] log-probs of the sampled tokens under pi.
        rollout_logprobs: [...] the same under mu.
        advantages: [...], or [B, 1] where the others are [B, T].
        low: threshold where the advantage is negative.
        high: threshold where the advantage is positive.

    Returns:
        bool [...], True = keep.

    Raises:
        TypeError, ValueError: wrong shapes, thresholds not positive.

    Source: DPPO (arXiv 2602.04879), eq. 12.
    """
    for name, value in {"divergence": divergence, "logprobs": logprobs, "rollout_logprobs": rollout_logprobs}.items():
        _checks.check_floating(name, value)
        _checks.check_shape(name, value, logprobs.shape, "that of `logprobs`")
    _checks.check_floating("advantages", advantages)
    if logprobs.dim() != 2 or advantages.shape != (logprobs.shape[0], 1):
        _checks.check_shape("advantages", advantages, logprobs.shape, "that of `logprobs` or [B, 1]")
    _checks.check_positive("low", low)
    _checks.check_positive("high", high)
    too_high = (advantages > 0) & (logprobs > rollout_logprobs) & (divergence > high)
    too_low = (advantages < 0) & (logprobs < rollout_logprobs) & (divergence > low)
    return ~(too_high | too_low)


def _binary_tv(log_m: Tensor, log_p: Tensor) -> Tensor:
    return (log_m.exp() - log_p.exp()).abs()


def _binary_kl(log_m: Tensor, log_p: Tensor) -> Tensor:
    m, one_minus_m = log_m.exp(), -torch.expm1(log_m)
    sampled = torch.where(m > 0, m * (log_m - log_p), 0.0)
    others = one_minus_m * (log1mexp(log_m) - log1mexp(log_p))
    return (sampled + others).clamp(min=0.0)


def _absent(logprobs: Tensor, valid: Tensor | None) -> Tensor:
    return logprobs if valid is None else logprobs.masked_fill(~valid, -torch.inf)
