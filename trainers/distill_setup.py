"""The four set-up points of PPO with a teacher: each returns what training then uses, and may be overridden."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from dppo_kernels.control import ScoreProcessor
from dppo_kernels.trainers.distill_ppo_config import DistillPPOConfig
from dppo_kernels.trainers.sharding import is_sharded
from dppo_kernels.trainers.value_optimizer import optimizer_class, parameter_groups

if TYPE_CHECKING:
    from dppo_kernels.trainers.ppo import PPOTrainer as Host
else:
    Host = object  # a mixin: PPOTrainer comes after it in the bases


class DistillSetupMixin(Host):
    """Put before PPOTrainer in the bases; the trainer calls its set-up methods, and nothing else decides what they decide."""

    args: DistillPPOConfig
    score_processor: ScoreProcessor
    optimizer: Any
    lr_scheduler: Any

    def _setup_optimizer(self) -> torch.optim.Optimizer:
        """The one optimiser of student and value model: `optimizer_name` with `optimizer_kwargs`.

        Called once, when training starts. What it returns is wrapped by accelerate, saved and restored; parameters of the value
        model that it does not hold are added to it as further groups. With FSDP or DeepSpeed it is the student's alone, and the
        value model has one of its own, by `make_optimizer`.

        Raises:
            ValueError: keywords that the optimiser does not take; one that arranges parameters by itself.
        """
        return self.make_optimizer(self.model, *([] if is_sharded(self.accelerator) else [self.value_model]))

    def make_optimizer(self, *models: nn.Module) -> torch.optim.Optimizer:
        args = self.args
        kind, options = optimizer_class(self, args, models[0])
        given = args.optimizer_keywords
        taken = inspect.signature(kind).parameters
        unknown = sorted({*given} - {*taken})
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            raise ValueError(
                f"`optimizer_kwargs` holds {unknown[0]!r}, which {kind.__name__} does not take: {', '.join(taken)}"
            )
        groups = [group for model in models for group in parameter_groups(self, model, args.weight_decay)]
        return kind(groups, **{**options, **given})

    def _setup_scheduler(self, optimizer: torch.optim.Optimizer, num_training_steps: int) -> Any:
        """The schedule of the learning rate: `scheduler_name` with `scheduler_kwargs`, stepped after every optimiser step.

        Called when training starts, with what `_setup_optimizer` returned, as accelerate wrapped it, and the number of steps
        of the run. It is saved and restored.
        """
        args = self.args
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    def _setup_early_stopping(self) -> Callable[[float], bool] | None:
        """Which KL ends an update: a rule that says so of a mini-batch's KL from the rollout's policy, or None for never.

        Called once, in the constructor. The rule is asked before every optimiser step, with the mean k3 per token over all
        processes: where it says True, that step and the others of the rollout are not made. It must not depend on the process.
        """
        return super().make_stop_rule()  # `target_kl`, which is None without `early_stopping`

    def _setup_score_processing(self) -> ScoreProcessor:
        """What scores go through before they enter the rewards: `use_score_scaling`, `use_score_norm` and `score_clip`.

        Called in the constructor and again by `train`, which starts with no moments. It is called with the scores [B] of all
        processes, NaN where there is none, once a rollout, with ``update=False`` while evaluating; its `state_dict` is part of
        checkpoints.
        """
        args = self.args
        return ScoreProcessor(scaling=args.use_score_scaling, norm=args.use_score_norm, clip=args.score_clip)

    # Where they are used

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._setup_optimizer()
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = self._setup_scheduler(self.optimizer if optimizer is None else optimizer, num_training_steps)
            self._created_lr_scheduler = True  # transformers': a further train() makes another
        return self.lr_scheduler

    def make_stop_rule(self) -> Callable[[float], bool] | None:
        return self._setup_early_stopping()

    def process_scores(self, scores: Tensor) -> Tensor:
        return self.score_processor(scores, update=self.model.training)
