"""What the tests of PPO share: small runs, and trainers that keep what they saw."""

from typing import Any

import torch
from transformers import Qwen3ForSequenceClassification, Qwen3ForTokenClassification

from dppo_kernels.trainers import DecoupledPPOConfig, DecoupledPPOTrainer, PPOConfig, PPOTrainer
from tests.trainers import conftest

# Two epochs of two mini-batches of two micro-batches: four optimiser steps an update.
SETTINGS: dict[str, Any] = {
    "num_generations": 1,
    "num_iterations": 1,
    "steps_per_generation": None,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 8,
}
DECOUPLED = {"vf_learning_rate": 3e-3, "num_vf_epochs": 2, "vf_update_frequency": 2}


class Recording:
    """Mixed into a trainer: its rollouts, and the inputs of every micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rollouts: list[dict[str, Any]] = []
        self.micro_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        coef = self.kl_controller.coef
        output = super()._generate_and_score_completions(inputs)
        self.rollouts.append({**output, "scores": self._scores, "kl_coef": coef})
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.micro_batches.append(dict(inputs))
        return super()._compute_loss(model, inputs)


class RecordingPPO(Recording, PPOTrainer):
    pass


class RecordingDecoupled(Recording, DecoupledPPOTrainer):
    pass


def make_ppo(make_trainer: Any, decoupled: bool = False, **changes: Any) -> Any:
    """A trainer on the small model, with SETTINGS."""
    cls, config = (RecordingDecoupled, DecoupledPPOConfig) if decoupled else (RecordingPPO, PPOConfig)
    own = DECOUPLED if decoupled else {}
    return make_trainer(cls, config_class=config, **{**SETTINGS, **own, **changes})


def value_model(vocab: int, kind: type = Qwen3ForTokenClassification, seed: int = 7, **changes: Any) -> Any:
    """With a random head: values differ from token to token."""
    torch.manual_seed(seed)
    return kind(conftest.small_config(vocab, num_labels=1, **changes))


def reward_model(vocab: int) -> Qwen3ForSequenceClassification:
    return value_model(vocab, Qwen3ForSequenceClassification, seed=11)


def value_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.value_model.named_parameters()}
