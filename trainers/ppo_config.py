"""Configuration of PPO, and of PPO with decoupled policy and value optimisation."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import SchedulerType

from dppo_kernels import DIVERGENCES, PRESETS, PolicyLossSpec, _checks
from dppo_kernels.control import AdaptiveKLController, FixedKLController, KLController
from dppo_kernels.estimators import KL_ESTIMATORS
from dppo_kernels.trainers.policy_config import PolicyConfig

# Inherited options that PPO has no use for.
_UNUSED = ("loss_type", "scale_rewards", "multi_objective_aggregation", "importance_sampling_level")


@dataclass
class PPOConfig(PolicyConfig):
    """`PolicyConfig` with PPO's options. Defaults are those of TRL's removed PPOTrainer where it had the option.

    A rollout has ``per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches`` completions a process and is
    used for ``num_ppo_epochs * num_mini_batches`` optimiser steps.

    Args:
        num_ppo_epochs: passes over a rollout; its completions are shuffled before each.
        num_mini_batches: optimiser steps of a pass.
        num_generations: completions per prompt; 1 is enough, as the baseline is the value model's.
        kl_coef: coefficient of the KL to the reference in the rewards; with `kl_target` the first one. 0 = no reference model.
        kl_estimator: "k1" (log-ratio), "k2" or "k3", see `kl_estimate`.
        kl_target: nats per completion that an adaptive controller steers the measured KL to. None = the coefficient is fixed.
        kl_horizon: completions over which the controller moves by at most 20 %.
        cliprange: clip width of the ratio; `epsilon` and `epsilon_high` set the two sides apart.
        cliprange_value: clip width of a value's change from the rollout's. None = no clipping.
        vf_coef: of the value loss, which is added to the policy's.
        gamma: discount per token.
        lam: lambda of the advantages.
        lam_value: lambda of the returns, the value model's targets. None = `lam`; 1.0 = Monte Carlo returns (VC-PPO).
        length_adaptive_alpha: lambda of the advantages is ``1 - 1 / (alpha * tokens)`` instead of `lam` (VAPO: 0.05).
        whiten_rewards: scale the spread of the token rewards around their mean to 1; the mean stays.
        whiten_advantages: centre advantages and divide them by their standard deviation, over the whole rollout.
        missing_eos_penalty: is subtracted from the score of completions without an end. None = nothing.
        target_kl: once a mini-batch's KL from the rollout's policy (k3, over all processes) exceeds it, that step and the
            others of the rollout are not made. None = all are made.
        share_value_backbone: a scalar head on the policy's hidden states instead of a value model.
        save_value_model: `save_model` writes the value model too, to the folder `value_model`.
        divergence_type: None for clipping; a divergence puts DPPO's trust region in its place.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.

    Source: PPO 1707.06347; its use on language models 1909.08593; VC-PPO 2503.01491; VAPO 2504.05118.
    """

    # Inherited options that PPO sets itself, by what the user sets instead.
    _DERIVED: ClassVar[dict[str, str]] = {
        "num_iterations": "num_ppo_epochs",
        "steps_per_generation": "num_mini_batches",
        "generation_batch_size": "num_mini_batches",
    }
    _HORIZON: ClassVar[str] = "kl_horizon"  # the option's name

    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps of a pass."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Completions per prompt of an evaluation."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Of the policy."})
    kl_coef: float = field(default=0.05, metadata={"help": "Of the KL to the reference in the rewards."})
    kl_estimator: str = field(default="k1", metadata={"help": f"One of {', '.join(KL_ESTIMATORS)}."})
    kl_target: float | None = field(default=None, metadata={"help": "Of an adaptive coefficient: nats per completion."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Of an adaptive coefficient: completions."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip width of the ratio."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Clip width of values. None = no clipping."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the advantages."})
    lam_value: float | None = field(default=None, metadata={"help": "Lambda of the returns (default: lam)."})
    length_adaptive_alpha: float | None = field(default=None, metadata={"help": "Lambda by length, as VAPO."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the spread of token rewards to 1."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Centre and scale advantages over a rollout."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken off where there is no end."})
    target_kl: float | None = field(default=None, metadata={"help": "KL at which the rest of a rollout is skipped."})
    share_value_backbone: bool = field(default=False, metadata={"help": "Value head on the policy's hidden states."})
    save_value_model: bool = field(default=True, metadata={"help": "`save_model` writes the value model too."})
    divergence_type: str | None = field(
        default=None, metadata={"help": f"DPPO's trust region instead of clipping: one of {', '.join(DIVERGENCES)}."}
    )

    def __post_init__(self) -> None:
        for name, instead in self._DERIVED.items():
            default = next(f.default for f in fields(type(self)) if f.name == name)
            if getattr(self, name) != default:
                raise ValueError(f"`{name}`={getattr(self, name)!r} is what PPO derives: set `{instead}` instead")
        for name in ("num_ppo_epochs", "num_mini_batches", "kl_horizon"):
            _checks.check_count(name, getattr(self, name))
        for name in ("cliprange", "cliprange_value", "kl_target", "length_adaptive_alpha", "target_kl"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        for name in ("gamma", "lam", "lam_value"):
            if getattr(self, name) is not None:
                _checks.check_fraction(name, getattr(self, name))
        for name in ("kl_coef", "vf_coef", "missing_eos_penalty"):
            if getattr(self, name) is not None:
                _checks.check_not_negative(name, getattr(self, name))
        _checks.check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.kl_coef and self.beta:
            raise ValueError("`beta` would penalise the KL to the reference a second time: leave one of it and `kl_coef` at 0")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("`kl_target` needs a `kl_coef` above 0 to start from")
        if self.target_kl is not None and self.fp16:
            raise ValueError("`target_kl` skips optimiser steps, which float16's loss scaling does not allow: use bf16")
        if self.missing_eos_penalty and self.mask_truncated_completions:
            raise ValueError("`mask_truncated_completions` masks what `missing_eos_penalty` would punish: choose one")
        self._refuse_ignored(_UNUSED if self.divergence_type is None else (*_UNUSED, "cliprange"))
        if self.num_generations is None:
            self.num_generations = 1
        self.num_iterations = self.num_ppo_epochs
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        asked = self.num_generations
        if asked == 1:
            # GRPO wants two at least, which divide the rollout; only its own advantages need them.
            self.num_generations = max(self.per_device_train_batch_size, self.steps_per_generation)
            if self.num_generations == 1:
                raise ValueError(
                    "a rollout of one completion per process has no spread to be whitened by: raise "
                    "`per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`"
                )
        super().__post_init__()
        self.num_generations = asked
        if self.kl_target is not None and 0.2 * self.generation_batch_size >= self.kl_horizon:
            raise ValueError(
                f"`{self._HORIZON}`={self.kl_horizon} is too short for rollouts of {self.generation_batch_size} completions: "
                "the coefficient could become 0"
            )

    def kl_controller(self) -> KLController:
        """The controller of `kl_coef` that these settings describe."""
        if self.kl_target is None:
            return FixedKLController(self.kl_coef)
        return AdaptiveKLController(self.kl_coef, target=self.kl_target, horizon=self.kl_horizon)

    def policy_loss_spec(self) -> PolicyLossSpec:
        spec = super().policy_loss_spec()
        if self.kl_coef:
            spec = spec.replace(beta=0.0)  # the KL is in the rewards
        if self.divergence_type is not None:
            return spec
        low = self.cliprange if self.epsilon is None else self.epsilon
        return PRESETS["ppo"].replace(
            epsilon_low=low,
            epsilon_high=low if self.epsilon_high is None else self.epsilon_high,
            ratio_cap=self.delta,
            beta=spec.beta,
            kl_ratio_weighted=spec.kl_ratio_weighted,
            entropy_coef=self.entropy_coef,
        )


@dataclass
class DecoupledPPOConfig(PPOConfig):
    """`PPOConfig` for two optimisers: a policy phase, then a value phase, on the same advantages and returns.

    Updates are counted from 1: update u has a value phase if u is a multiple of `vf_update_frequency` or one of the first
    `vf_pretrain_updates`. Its `num_vf_epochs * num_mini_batches` optimiser steps use one learning rate.

    Args:
        vf_learning_rate: of the value model. None = `learning_rate`.
        num_vf_epochs: passes over the rollout in a value phase.
        vf_update_frequency: rollouts per value phase.
        vf_pretrain_updates: first rollouts on which only the value model is trained, at every one of them.
        keep_skipped_rollouts: the value phase also trains on the rollouts since the last one, which it otherwise never sees.
        vf_lr_scheduler_type: None = `lr_scheduler_type`. The horizon is the number of value updates of the run.
        vf_lr_scheduler_kwargs: of it. None = `lr_scheduler_kwargs` where the type is the policy's.
        vf_lr_warmup_updates: warm-up of the learning rate, in value updates.
        vf_weight_decay: None = `weight_decay`.
        vf_max_grad_norm: None = `max_grad_norm`; 0 = no clipping.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.
    """

    vf_learning_rate: float | None = field(default=None, metadata={"help": "Of the value model (default: learning_rate)."})
    num_vf_epochs: int = field(default=1, metadata={"help": "Passes over the rollout in a value phase."})
    vf_update_frequency: int = field(default=1, metadata={"help": "Rollouts per value phase."})
    vf_pretrain_updates: int = field(default=0, metadata={"help": "First rollouts that train the value model only."})
    keep_skipped_rollouts: bool = field(default=False, metadata={"help": "Value phases train on skipped rollouts too."})
    vf_lr_scheduler_type: str | None = field(
        default=None, metadata={"help": f"Default: lr_scheduler_type. One of {', '.join(t.value for t in SchedulerType)}."}
    )
    vf_lr_scheduler_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Of it, as JSON."})
    vf_lr_warmup_updates: int = field(default=0, metadata={"help": "Warm-up of its learning rate, in value updates."})
    vf_weight_decay: float | None = field(default=None, metadata={"help": "Default: weight_decay."})
    vf_max_grad_norm: float | None = field(default=None, metadata={"help": "Default: max_grad_norm. 0 = no clipping."})

    _VALID_DICT_FIELDS = [*PPOConfig._VALID_DICT_FIELDS, "vf_lr_scheduler_kwargs"]  # noqa: RUF012  (of transformers: JSON on the command line)

    def __post_init__(self) -> None:
        if self.vf_learning_rate is not None:
            _checks.check_positive("vf_learning_rate", self.vf_learning_rate)
        for name in ("num_vf_epochs", "vf_update_frequency"):
            _checks.check_count(name, getattr(self, name))
        for name in ("vf_pretrain_updates", "vf_lr_warmup_updates"):
            _checks.check_count(name, getattr(self, name), least=0)
        for name in ("vf_weight_decay", "vf_max_grad_norm"):
            if getattr(self, name) is not None:
                _checks.check_not_negative(name, getattr(self, name))
        if self.vf_lr_scheduler_type is not None:
            _checks.check_choice("vf_lr_scheduler_type", self.vf_lr_scheduler_type, [t.value for t in SchedulerType])
        if self.share_value_backbone:
            raise ValueError("`share_value_backbone` cannot be decoupled: the value phase would train the policy's backbone")
        if self.vf_pretrain_updates and self.fp16:
            raise ValueError("`vf_pretrain_updates` skips policy steps, which float16's loss scaling does not allow: use bf16")
        self._refuse_ignored(("vf_coef",))
        super().__post_init__()

    def is_value_update(self, update: int) -> bool:
        """Whether update number `update` (from 1) has a value phase."""
        return update <= self.vf_pretrain_updates or update % self.vf_update_frequency == 0

    def count_value_updates(self, updates: int) -> int:
        """Value phases among the first `updates` updates."""
        pretrained = min(updates, self.vf_pretrain_updates)
        return pretrained + updates // self.vf_update_frequency - pretrained // self.vf_update_frequency
