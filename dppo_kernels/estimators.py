"""Single-sample estimators of log-ratios and KL divergences (Schulman, "Approximating KL divergence", 2020)."""

import torch
from torch import Tensor

from dppo_kernels import _checks

# exp() of it is finite in every dtype; the one place where a log-ratio is clamped.
LOG_RATIO_LIMIT = 20.0

KL_ESTIMATORS = ("k1", "k2", "k3")


def log_ratio(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """``log(pi / anchor)`` of the sampled tokens, clamped to +-20; differentiable inside the clamp.

    Args:
        logprobs: [...] log-probs of the policy, natural logarithm.
        anchor_logprobs: [...] log-probs of the policy the ratio is against.
    """
    return (logprobs - anchor_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_estimate(kind: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || ref), in nats, from tokens sampled from pi.

    With ``x = logprobs - ref_logprobs``: ``k1 = x`` (unbiased, any sign), ``k2 = x^2 / 2`` (biased, >= 0) and
    ``k3 = exp(-x) - 1 + x`` (unbiased, >= 0). Differentiable; `x` is clamped as in `log_ratio`.

    Args:
        kind: "k1", "k2" or "k3".
        logprobs: [...] log-probs of the policy.
        ref_logprobs: [...] log-probs of the reference.

    Raises:
        ValueError: unknown `kind` or different shapes.
    """
    _checks.check_choice("kind", kind, KL_ESTIMATORS)
    _checks.check_shape("ref_logprobs", ref_logprobs, logprobs.shape, "that of `logprobs`")
    x = log_ratio(logprobs, ref_logprobs)
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    return torch.expm1(-x) + x
