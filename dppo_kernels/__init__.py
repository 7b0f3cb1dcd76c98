"""Kernel-accelerated losses for LLM reinforcement learning and preference training.

Functions, not trainers: everything here takes tensors and returns tensors, knows no TRL and reads no config file. Importing
this package touches neither CUDA nor Triton. Trainers on TRL live in :mod:`dppo_kernels.trainers`.
"""

from pathlib import Path

from dppo_kernels._lora import LoraWeight
from dppo_kernels.advantages import group_advantages
from dppo_kernels.aggregate import REDUCTIONS, aggregate
from dppo_kernels.distill import (
    DISTILL_KINDS,
    DistillAux,
    distill_loss,
    explain_linear_distill_loss,
    linear_distill_loss,
    topk_distill_loss,
)
from dppo_kernels.divergence import DIVERGENCES, divergence, trust_region_mask
from dppo_kernels.estimators import kl_estimate, log_ratio
from dppo_kernels.gae import Gae, gae
from dppo_kernels.linear_logprobs import LinearLogprobs, explain_linear_logprobs, linear_logprobs
from dppo_kernels.linear_policy_loss import PolicyAux, explain_linear_policy_loss, linear_policy_loss
from dppo_kernels.linear_preference_loss import (
    PreferenceAux,
    SequenceLogprobs,
    explain_linear_preference_loss,
    linear_preference_loss,
    linear_sequence_logprobs,
)
from dppo_kernels.moments import Moments, masked_moments, whiten
from dppo_kernels.policy import Stat, policy_loss
from dppo_kernels.policy_spec import PRESETS, PolicyLossSpec
from dppo_kernels.preference import preference_loss, sequence_logprobs
from dppo_kernels.preference_spec import F_DIVERGENCES, PREFERENCE_LOSSES, PreferenceSpec
from dppo_kernels.returns import explained_variance, length_adaptive_lambda, token_rewards
from dppo_kernels.token_logprobs import TokenLogprobs, TopKLogprobs, token_logprobs, topk_logprobs
from dppo_kernels.value_loss import value_loss

__version__ = "0.1.0"

__all__ = [
    "DISTILL_KINDS",
    "DIVERGENCES",
    "F_DIVERGENCES",
    "PREFERENCE_LOSSES",
    "PRESETS",
    "REDUCTIONS",
    "DistillAux",
    "Gae",
    "LinearLogprobs",
    "LoraWeight",
    "Moments",
    "PolicyAux",
    "PolicyLossSpec",
    "PreferenceAux",
    "PreferenceSpec",
    "SequenceLogprobs",
    "Stat",
    "TokenLogprobs",
    "TopKLogprobs",
    "__version__",
    "aggregate",
    "distill_loss",
    "divergence",
    "explain_linear_distill_loss",
    "explain_linear_logprobs",
    "explain_linear_policy_loss",
    "explain_linear_preference_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "kl_estimate",
    "length_adaptive_lambda",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "log_ratio",
    "masked_moments",
    "policy_loss",
    "preference_loss",
    "sequence_logprobs",
    "token_logprobs",
    "token_rewards",
    "topk_distill_loss",
    "topk_logprobs",
    "trust_region_mask",
    "value_loss",
    "whiten",
]

# `trainers/` is a top-level folder of the repository but the package `dppo_kernels.trainers`: an install maps it with
# package-dir, a plain checkout needs its parent on the search path.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "trainers" / "__init__.py").is_file():
    __path__.append(str(_checkout))
del _checkout, Path
