"""What a policy loss is: a frozen, validated spec, and the presets of the papers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from dppo_kernels import _checks
from dppo_kernels.aggregate import REDUCTIONS
from dppo_kernels.divergence import DIVERGENCES

SURROGATES = ("clip", "cispo", "sapo", "divergence")
RATIO_LEVELS = ("token", "sequence")

# DPPO paper (2602.04879), stability study: TV .15, KL .05, the same for binary and top-K.
DEFAULT_THRESHOLD = MappingProxyType({kind: 0.15 if kind.endswith("tv") else 0.05 for kind in DIVERGENCES})


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

    @property
    def scores_every_token(self) -> bool:
        """Whether tokens without an advantage matter too: for the KL to a reference or the entropy bonus."""
        return self.beta != 0 or self.entropy_coef != 0

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
