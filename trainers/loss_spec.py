"""GRPO's loss options as a `PolicyLossSpec`."""

from typing import Any

from dppo_kernels import PRESETS, PolicyLossSpec

# GRPO's loss types that are one `PolicyLossSpec`; those of them that divide by the tokens of a whole optimiser step.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
STEP_NORMALISED = ("dapo", "cispo")


def grpo_spec(args: Any, *, epsilon_low: float, epsilon_high: float, beta: float, entropy_coef: float) -> PolicyLossSpec:
    """The loss of a GRPOConfig whose `loss_type` is one of `LOSS_TYPES`.

    Args:
        args: `loss_type`, `importance_sampling_level`, `delta`, `use_bias_correction_kl` and SAPO's temperatures are read.
        epsilon_low: these four, because a trainer and its config may disagree on them.
    """
    preset = PRESETS[args.loss_type]
    changes: dict[str, Any] = {
        "ratio_level": args.importance_sampling_level,
        "beta": beta,
        "kl_ratio_weighted": args.use_bias_correction_kl,
        "entropy_coef": entropy_coef,
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
    }
    if preset.surrogate == "clip":
        changes["ratio_cap"] = args.delta
    elif preset.surrogate == "sapo":
        changes |= {"sapo_temperature_pos": args.sapo_temperature_pos, "sapo_temperature_neg": args.sapo_temperature_neg}
    return preset.replace(**changes)
