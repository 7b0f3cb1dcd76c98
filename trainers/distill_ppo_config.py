"""Configuration of PPO with a teacher, under the option names of TRL's early PPOTrainer."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from dppo_kernels import DISTILL_KINDS, _checks
from dppo_kernels.trainers.ppo_config import PPOConfig

KD_DATA = ("rollouts", "dataset")
EARLY_STOPPING_KL = 1.0  # TRL 0.11's `target_kl`
_ADAMW = "adamw"  # whichever AdamW is transformers' default


@dataclass
class DistillPPOConfig(PPOConfig):
    """`PPOConfig` with a distillation loss, and with the option names and defaults of TRL 0.11's PPOConfig.

    Where PPOConfig has another name for an option, that one is derived and refused.

    Args:
        batch_size: completions of a rollout, per process: `mini_batch_size * gradient_accumulation_steps` or a multiple of it.
        mini_batch_size: completions of a micro-batch; an optimiser step has `gradient_accumulation_steps` of them.
        ppo_epochs: passes over a rollout.
        init_kl_coef: first coefficient of the KL in the rewards; the only one without `adap_kl_ctrl`. 0 = no KL, no reference.
        adap_kl_ctrl: steer the measured KL to `target` by the coefficient.
        target: nats per completion. (`target_kl` is early stopping's.)
        horizon: completions over which the controller moves by at most 20 %.
        early_stopping: once a mini-batch's KL from the rollout's policy exceeds `target_kl`, that step and the others of the
            rollout are not made.
        target_kl: nats per token. None = 1.0 with `early_stopping`.
        use_score_scaling: divide scores by the standard deviation of all scores so far.
        use_score_norm: subtract their mean first; needs `use_score_scaling`.
        score_clip: bound of the absolute score, after scaling. None = no clipping.
        optimizer_name: "adamw", or a name of transformers' `optim`; one optimiser trains student and value model.
        optimizer_kwargs: its keywords, such as ``{"betas": [0.9, 0.95], "weight_decay": 0.01}``; JSON on the command line.
        scheduler_name: "linear", "cosine", "constant" or another of transformers' `lr_scheduler_type`.
        scheduler_kwargs: of it: `num_warmup_steps`, and what the schedule itself takes; JSON on the command line.
        optimize_cuda_cache: empty CUDA's cache of free memory after every rollout and every update.
        kd_coef: coefficient of the distillation loss. 0 = none, only with `teacher_as_reference`.
        kd_kind: "forward_kl", "reverse_kl", "jsd" or "tv", see `linear_distill_loss`. The default asks that what the student
            writes be likely under the teacher, which fits the student's own rollouts.
        kd_beta: of "jsd".
        kd_temperature: T, divides both models' logits; independent of the sampling `temperature`.
        kd_t_squared: multiply by T^2, so that the size of the gradient depends little on T.
        kd_data: "rollouts": distil on what the student writes; "dataset": on the training rows' `completion` column.
        teacher_as_reference: the KL in the rewards is against the teacher.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.

    Source: Ziegler et al. 1909.08593 (adaptive KL); distillation 1503.02531, on own rollouts 2306.13649.
    """

    _DERIVED: ClassVar[dict[str, str]] = {
        "num_iterations": "ppo_epochs",
        "steps_per_generation": "batch_size",
        "generation_batch_size": "batch_size",
    }
    _HORIZON: ClassVar[str] = "horizon"

    learning_rate: float = field(default=1.41e-5, metadata={"help": "Of student and value model."})
    batch_size: int = field(default=128, metadata={"help": "Completions of a rollout, per process."})
    mini_batch_size: int = field(default=128, metadata={"help": "Completions of a micro-batch."})
    ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    init_kl_coef: float = field(default=0.2, metadata={"help": "First coefficient of the KL in the rewards."})
    adap_kl_ctrl: bool = field(default=True, metadata={"help": "Steer the KL to `target` by the coefficient."})
    target: float = field(default=6.0, metadata={"help": "Of adap_kl_ctrl: nats per completion."})
    horizon: int = field(default=10_000, metadata={"help": "Of adap_kl_ctrl: completions."})
    early_stopping: bool = field(default=False, metadata={"help": "Stop an update whose KL exceeds target_kl."})
    target_kl: float | None = field(
        default=None, metadata={"help": f"Of early_stopping: nats per token (default: {EARLY_STOPPING_KL})."}
    )
    use_score_scaling: bool = field(default=False, metadata={"help": "Divide scores by their running deviation."})
    use_score_norm: bool = field(default=False, metadata={"help": "Subtract their running mean first."})
    score_clip: float | None = field(default=None, metadata={"help": "Bound of the absolute score."})
    optimizer_name: str = field(default=_ADAMW, metadata={"help": f"{_ADAMW}, or a name of transformers' optim."})
    optimizer_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Its keywords, as JSON."})
    scheduler_name: str = field(
        default="linear", metadata={"help": f"One of {', '.join(kind.value for kind in SchedulerType)}."}
    )
    scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "num_warmup_steps, and what the schedule takes, as JSON."}
    )
    optimize_cuda_cache: bool = field(default=False, metadata={"help": "Empty CUDA's cache after rollouts and updates."})
    kd_coef: float = field(default=1.0, metadata={"help": "Coefficient of the distillation loss."})
    kd_kind: str = field(default="reverse_kl", metadata={"help": f"One of {', '.join(DISTILL_KINDS)}."})
    kd_beta: float = field(default=0.5, metadata={"help": "Of jsd."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits."})
    kd_t_squared: bool = field(default=True, metadata={"help": "Multiply by the temperature squared."})
    kd_data: str = field(default="rollouts", metadata={"help": f"One of {', '.join(KD_DATA)}."})
    teacher_as_reference: bool = field(default=False, metadata={"help": "The KL in the rewards is against the teacher."})

    _VALID_DICT_FIELDS = [*PPOConfig._VALID_DICT_FIELDS, "optimizer_kwargs", "scheduler_kwargs"]  # noqa: RUF012  (of transformers)

    def __post_init__(self) -> None:
        self._check_control()
        self._check_distillation()
        for name, (instead, value) in self._derive().items():
            if getattr(self, name) not in (_default(type(self), name), value):
                raise ValueError(
                    f"`{name}`={getattr(self, name)!r} is what {type(self).__name__} derives: set `{instead}` instead"
                )
            setattr(self, name, value)
        if self.early_stopping and self.target_kl is None:
            self.target_kl = EARLY_STOPPING_KL
        super().__post_init__()

    @property
    def optimizer_keywords(self) -> dict[str, Any]:
        """`optimizer_kwargs`, read."""
        return _keywords("optimizer_kwargs", self.optimizer_kwargs)

    @property
    def scheduler_keywords(self) -> dict[str, Any]:
        """`scheduler_kwargs`, read."""
        return _keywords("scheduler_kwargs", self.scheduler_kwargs)

    def _check_control(self) -> None:
        _checks.check_count("batch_size", self.batch_size, least=2)
        for name in ("mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "horizon"):
            _checks.check_count(name, getattr(self, name))
        step = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % step:
            raise ValueError(
                f"`batch_size`={self.batch_size} must be a multiple of the {step} completions of a step, `mini_batch_size` * "
                "`gradient_accumulation_steps`"
            )
        _checks.check_not_negative("init_kl_coef", self.init_kl_coef)
        for name in ("target", "target_kl", "score_clip"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        if self.init_kl_coef and self.beta:
            raise ValueError("`beta` would penalise the KL a second time: leave one of it and `init_kl_coef` at 0")
        if not (self.adap_kl_ctrl and self.init_kl_coef):
            why = "without `adap_kl_ctrl`" if self.init_kl_coef else "with `init_kl_coef`=0"
            self._refuse_unused(("target", "horizon"), why)
        if not self.early_stopping:
            self._refuse_unused(("target_kl",), "without `early_stopping`")
        if not self.use_score_scaling:
            self._refuse_unused(("use_score_norm",), "without `use_score_scaling`")
        _checks.check_choice("optimizer_name", self.optimizer_name, [_ADAMW, *(name.value for name in OptimizerNames)])
        if "lr" in self.optimizer_keywords:
            raise ValueError("`optimizer_kwargs` holds 'lr': set `learning_rate` instead")
        _checks.check_choice("scheduler_name", self.scheduler_name, [kind.value for kind in SchedulerType])
        unknown = {*self.scheduler_keywords} - {"num_warmup_steps"}
        if unknown and self.scheduler_name.startswith("constant"):
            raise ValueError(f"`scheduler_kwargs` holds {sorted(unknown)[0]!r}, which {self.scheduler_name!r} would ignore")

    def _check_distillation(self) -> None:
        _checks.check_not_negative("kd_coef", self.kd_coef)
        _checks.check_choice("kd_kind", self.kd_kind, DISTILL_KINDS)
        _checks.check_fraction("kd_beta", self.kd_beta)
        _checks.check_positive("kd_temperature", self.kd_temperature)
        _checks.check_choice("kd_data", self.kd_data, KD_DATA)
        if not self.kd_coef:
            if not self.teacher_as_reference:
                raise ValueError("`kd_coef`=0 without `teacher_as_reference` leaves nothing for a teacher to do: use PPOConfig")
            self._refuse_unused(("kd_kind", "kd_beta", "kd_temperature", "kd_t_squared", "kd_data"), "with `kd_coef`=0")
        if self.kd_kind != "jsd":
            self._refuse_unused(("kd_beta",), f"with `kd_kind`={self.kd_kind!r}")
        if self.kd_data == "dataset" and self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` drops the column `completion` that `kd_data`='dataset' reads")
        if self.teacher_as_reference and not self.init_kl_coef:
            raise ValueError("`teacher_as_reference` would be ignored with `init_kl_coef`=0: there is no KL in the rewards")
        if self.teacher_as_reference and self.sync_ref_model:
            raise ValueError("`sync_ref_model` would move the teacher, which `teacher_as_reference` makes the reference")

    def _derive(self) -> dict[str, tuple[str, Any]]:
        """PPOConfig's and transformers' options: what the user sets instead, and the value."""
        adaptive = self.adap_kl_ctrl and self.init_kl_coef > 0
        optimizer, schedule = dict(self.optimizer_keywords), dict(self.scheduler_keywords)
        warmup = schedule.pop("num_warmup_steps", 0)
        name = self.scheduler_name
        derived: dict[str, tuple[str, Any]] = {
            "per_device_train_batch_size": ("mini_batch_size", self.mini_batch_size),
            "num_mini_batches": (
                "batch_size",
                self.batch_size // (self.mini_batch_size * self.gradient_accumulation_steps),
            ),
            "num_ppo_epochs": ("ppo_epochs", self.ppo_epochs),
            "kl_coef": ("init_kl_coef", self.init_kl_coef),
            "kl_target": ("target", self.target if adaptive else None),
            "kl_horizon": ("horizon", self.horizon),
            "optim": ("optimizer_name", self.default_optim if self.optimizer_name == _ADAMW else self.optimizer_name),
            "optim_args": ("optimizer_kwargs", None),
            # transformers' "constant" knows no warm-up
            "lr_scheduler_type": ("scheduler_name", "constant_with_warmup" if name == "constant" and warmup else name),
            "lr_scheduler_kwargs": ("scheduler_kwargs", schedule or None),
        }
        if "num_warmup_steps" in self.scheduler_keywords:
            _checks.check_count("scheduler_kwargs['num_warmup_steps']", warmup, least=0)
            derived["warmup_steps"] = ("scheduler_kwargs", warmup)
        if "betas" in optimizer:
            derived |= {f"adam_beta{i + 1}": ("optimizer_kwargs", beta) for i, beta in enumerate(optimizer["betas"])}
        for keyword, option in (("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
            if keyword in optimizer:
                derived[option] = ("optimizer_kwargs", optimizer[keyword])
        return derived

    def _refuse_unused(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) != (default := _default(type(self), name)):
                raise ValueError(f"`{name}`={getattr(self, name)!r} would be ignored {why}: leave it at {default!r}")


def _default(config: type, name: str) -> Any:
    [found] = [f for f in fields(config) if f.name == name]
    return found.default


def _keywords(name: str, given: Any) -> dict[str, Any]:
    """A dict, which the command line gives as JSON, or nothing."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as reason:
            raise ValueError(f"`{name}` must be a dict or JSON of one, got {given!r}: {reason}") from None
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"`{name}` must be a dict or None, got {type(given).__name__}")
    return given or {}
