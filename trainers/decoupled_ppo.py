"""PPO with decoupled policy and value optimisation: two optimisers, two schedulers, a policy phase and a value phase."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dppo_kernels import Stat
from dppo_kernels.trainers.normaliser import count_step_tokens
from dppo_kernels.trainers.ppo import PPOTrainer, shuffled_again, single
from dppo_kernels.trainers.ppo_config import DecoupledPPOConfig
from dppo_kernels.trainers.value_optimizer import make_value_optimizer, make_value_scheduler

# What a value phase reads of a rollout's micro-batches.
_VALUE_INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "old_values", "returns")


class DecoupledPPOTrainer(PPOTrainer):
    """PPOTrainer whose value model has an optimiser, a schedule and a phase of its own.

    Takes PPOTrainer's arguments; `args` is a `DecoupledPPOConfig`. An update is a rollout, the policy phase on it, then (where
    the configuration says so) the value phase, on the advantages and returns of that rollout; only the model that is being
    trained runs forward. The models must not share parameters.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    _name = "DecoupledPPO"
    _tag_names = ["trl", "ppo", "decoupled-ppo"]  # noqa: RUF012  (TRL's attribute, read-only)
    config_class: type[DecoupledPPOConfig] = DecoupledPPOConfig

    value_scheduler: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kept: list[list[dict[str, Any]]] = []  # rollouts since the last value phase
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = []
        return super().train(*args, **kwargs)

    # Optimiser

    def _optimize_values(self, optimizer: torch.optim.Optimizer) -> None:
        if self.value_optimizer is None:
            self.value_optimizer = make_value_optimizer(self, self.value_model)
            self.value_scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.args.fp16)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        updates = num_training_steps // (self.args.num_ppo_epochs * self.args.num_mini_batches)
        assert self.value_optimizer is not None  # made with the policy's
        self.value_scheduler = make_value_scheduler(self.args, self.value_optimizer, self.args.count_value_updates(updates))
        return scheduler

    # Phases

    def skips_policy(self) -> bool:
        # Before the first micro-step of an update, its rollout is not counted yet.
        update = self.update_count + self._is_first_step()
        return update <= self.args.vf_pretrain_updates

    def step_values(self) -> None:
        """Values are trained in a phase of their own."""

    def add_value_loss(self, loss: Tensor, scores: Any, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        return loss

    def after_step(self) -> None:
        if self._is_first_step():  # the step to come is another update's
            self._finish_update()

    def _finish_update(self) -> None:
        buffered: list[dict[str, Any]] = self._buffered_inputs or []
        rollout = [{name: inputs[name] for name in _VALUE_INPUTS if name in inputs} for inputs in buffered]
        due = self.args.is_value_update(self.update_count)
        metrics = self._metrics["train"]
        metrics["value/updated"].append(float(due))
        if due:
            metrics["value/learning_rate"].append(self.value_scheduler.get_last_lr()[0])
            self._train_values([*self._kept, rollout])
            self.value_scheduler.step()
            self._kept = []
        elif self.args.keep_skipped_rollouts:
            self._kept.append(rollout)

    def _train_values(self, rollouts: list[list[dict[str, Any]]]) -> None:
        for _ in range(self.args.num_vf_epochs):
            for rollout in rollouts:
                micro_batches = shuffled_again(rollout)
                count_step_tokens(self, micro_batches)
                size = self.args.gradient_accumulation_steps
                for first in range(0, len(micro_batches), size):
                    self._value_step(micro_batches[first : first + size])

    def _value_step(self, micro_batches: list[dict[str, Any]]) -> None:
        optimizer, scaler = self.value_optimizer, self.value_scaler
        assert optimizer is not None
        for i, inputs in enumerate(micro_batches):
            stats: dict[str, Stat] = {}
            last = i == len(micro_batches) - 1
            wrapped = self._wrapped_values
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else torch.enable_grad():
                loss = self.value_term(self._values_in_training(inputs), inputs, stats)
                scaler.scale(loss).backward()
            self.record(stats)
        scaler.unscale_(optimizer)
        limit = self.args.max_grad_norm if self.args.vf_max_grad_norm is None else self.args.vf_max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.value_model.parameters(), limit or float("inf"))
        self.record({"value_grad_norm": single(norm)})
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    # Checkpoints

    def value_optimizer_parts(self) -> dict[str, Any]:
        return {"optimizer": self.value_optimizer, "scheduler": self.value_scheduler, "scaler": self.value_scaler}

    def extra_resume_state(self) -> dict[str, Any]:
        return {**super().extra_resume_state(), "kept_rollouts": self._kept}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._kept = state["kept_rollouts"]
