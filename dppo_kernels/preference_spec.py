"""What a preference loss is: a frozen, validated spec under the names of TRL's DPOConfig."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

from dppo_kernels import _checks

# Losses of the difference of two scores: the only ones an f-divergence other than the reverse KL has a meaning for.
MARGIN_LOSSES = ("sigmoid", "sigmoid_smoothed", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "discopop")
PREFERENCE_LOSSES = (
    *MARGIN_LOSSES,
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sft",
)
SORTING_LOSSES = ("aot", "aot_unpaired")  # a pair's loss depends on the other pairs
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class PreferenceSpec:
    """What `preference_loss` computes: ``sum_k loss_weights[k] * loss_type[k]``.

    Args:
        loss_type: names of `PREFERENCE_LOSSES`, or one. Those of TRL, and "sigmoid_smoothed" (cDPO; TRL's "sigmoid" ignores the
            label smoothing) and "ipo_sum" (IPO as in its paper, by sums over tokens; "ipo" divides by lengths, as TRL does).
        loss_weights: one per loss (default: 1 each).
        beta: strength of the pull to the reference, > 0.
        label_smoothing: chance that a label is flipped, in [0, 1]; of "sigmoid_smoothed", "robust", "exo_pair" (which needs
            it), "aot" and "aot_unpaired"; the others ignore it.
        f_divergence_type: divergence from the reference that scores are the derivative of; other than "reverse_kl" for losses
            of `MARGIN_LOSSES` and "sft" only.
        f_alpha_divergence_coef: alpha of "alpha_divergence".
        ld_alpha: in [0, 1]: weight of a sequence's tokens beyond the length of the pair's shorter one (LD-DPO). None: 1.
        discopop_tau: temperature of "discopop", > 0.
        use_weighting: weigh pairs by the policy's own normalised likelihood of them (WPO); not with losses that sort pairs.

    Raises:
        TypeError, ValueError: unknown names, numbers out of range, or a combination that means nothing.
        NotImplementedError: `use_weighting` with "aot" or "aot_unpaired", as in TRL.

    Source: DPO (2305.18290), cDPO (Mitchell 2023), IPO (2310.12036), hinge of RSO (2309.06657), EXO (2402.00856),
    NCA (2402.05369), robust DPO (2403.00409), BCO (2404.04656), SPPO (2405.00675), AOT (2406.05882), APO (2408.06266),
    DiscoPOP (2406.08414), f-DPO (2309.16240), LD-DPO (2409.06411), WPO (2406.11827).
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    discopop_tau: float = 0.05
    use_weighting: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str) or not isinstance(self.loss_type, tuple):
            names = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
            object.__setattr__(self, "loss_type", names)
        if not self.loss_type:
            raise ValueError("`loss_type` must name at least one loss, got none")
        for name in self.loss_type:
            _checks.check_choice("loss_type", name, PREFERENCE_LOSSES)
        if self.loss_weights is not None:
            object.__setattr__(self, "loss_weights", tuple(self.loss_weights))
            if len(self.loss_weights) != len(self.loss_type):
                raise ValueError(
                    f"`loss_weights` must hold one number per loss type, got {len(self.loss_weights)} for {self.loss_type}"
                )
            for weight in self.loss_weights:
                _checks.check_number("loss_weights", weight)
        _checks.check_positive("beta", self.beta)
        _checks.check_positive("discopop_tau", self.discopop_tau)
        _checks.check_number("f_alpha_divergence_coef", self.f_alpha_divergence_coef)
        _checks.check_fraction("label_smoothing", self.label_smoothing)
        if self.ld_alpha is not None:
            _checks.check_fraction("ld_alpha", self.ld_alpha)
        self._check_combinations()

    def _check_combinations(self) -> None:
        _checks.check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        allowed = (*MARGIN_LOSSES, "sft")
        if self.f_divergence_type != "reverse_kl" and not set(self.loss_type) <= set(allowed):
            raise ValueError(
                f"`f_divergence_type`={self.f_divergence_type!r} has a meaning for {', '.join(sorted(allowed))} only, got "
                f"`loss_type`={list(self.loss_type)}: there a term of the partition function does not cancel"
            )
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError(
                f"'exo_pair' needs `label_smoothing` in (0, 1), its paper recommends 1e-3; got {self.label_smoothing}"
            )
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            if self.label_smoothing == 0.5:
                raise ValueError("'robust' divides by 1 - 2 `label_smoothing`, got 0.5")
            warnings.warn(f"`label_smoothing` of 'robust' should be in [0, 0.5), got {self.label_smoothing}", stacklevel=4)
        if self.use_weighting and set(self.loss_type) & set(SORTING_LOSSES):
            raise NotImplementedError(
                f"`use_weighting` weighs pairs, and {' and '.join(SORTING_LOSSES)} sort chosen and rejected apart: got "
                f"`loss_type`={list(self.loss_type)}"
            )

    @property
    def weighted_losses(self) -> dict[str, float]:
        """Losses by name with their weights, those named twice added up."""
        totals: dict[str, float] = {}
        for name, weight in zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True):
            totals[name] = totals.get(name, 0.0) + weight
        return totals

    @property
    def couples_pairs(self) -> bool:
        """Whether the slope of a pair's loss depends on the other pairs."""
        return bool(set(self.loss_type) & set(SORTING_LOSSES))

    @property
    def needs_lengths(self) -> bool:
        return bool({"ipo", "sigmoid_norm", "sft"} & set(self.loss_type))

    def replace(self, **changes: Any) -> "PreferenceSpec":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)
