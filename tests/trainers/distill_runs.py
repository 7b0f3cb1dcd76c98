"""What the tests of PPO with a teacher share: small runs, a teacher of another width, and the loss from full logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3ForCausalLM

from dppo_kernels.trainers import DistillPPOConfig, DistillPPOTrainer
from tests.trainers import conftest
from tests.trainers.ppo_runs import Recording

# Two epochs of two mini-batches of two micro-batches: four optimiser steps an update.
SETTINGS: dict[str, Any] = {
    "num_generations": 1,
    "num_iterations": 1,
    "steps_per_generation": None,
    "batch_size": 8,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "max_steps": 8,
    "scheduler_name": "constant",
}


class RecordingDistill(Recording, DistillPPOTrainer):
    pass


def settings(**changes: Any) -> dict[str, Any]:
    """With the names that `conftest.make_config` sets, which are derived here."""
    found = {**SETTINGS, **changes}
    derived = {"per_device_train_batch_size": found["mini_batch_size"]}
    if "lr_scheduler_type" not in found:
        derived["lr_scheduler_type"] = "linear"
    return {**derived, **found}


def make_distill(make_trainer: Any, cls: type = RecordingDistill, **changes: Any) -> Any:
    """A trainer on the small model with a teacher of the same vocabulary, with SETTINGS."""
    changes.setdefault("teacher", teacher_model(108))
    return make_trainer(cls, config_class=DistillPPOConfig, **settings(**changes))


def teacher_model(vocab: int, seed: int = 5, **changes: Any) -> Qwen3ForCausalLM:
    """Wider than the student, and confident."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(conftest.small_config(vocab, **{"hidden_size": 48, **changes}))
    model.lm_head.weight.data *= 12
    return model.eval()


def scaled_teacher(vocab: int) -> GraniteForCausalLM:
    """Of another architecture, which divides its logits."""
    torch.manual_seed(6)
    sizes = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(
        vocab_size=vocab, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, logits_scaling=0.25, **sizes
    )
    return GraniteForCausalLM(config).eval()


def full_logits(model: Any, ids: Tensor, attention: Tensor, steps: int) -> Tensor:
    """[B, T, V] before the last `steps` positions, by the class's own forward."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = type(model).forward(model, ids, attention_mask=attention, position_ids=positions).logits
    return logits[:, -steps - 1 : -1].float()


def divergence_of(kind: str, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[B, T] from log-probs [B, T, V]."""
    q, p = student.exp(), teacher.exp()
    if kind == "tv":
        return (p - q).abs().sum(-1) / 2
    if kind == "forward_kl":
        return (p * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (q * (student - teacher)).sum(-1)
    m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (teacher - m)).sum(-1) + (1 - beta) * (q * (student - m)).sum(-1)
