"""What GRPO 1.16 divides its losses by, and the exact count of an optimiser step's tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Scalars of a micro-batch: tokens of its optimiser step over all processes, of completions and of what is distilled on.
STEP_TOKENS, STEP_DISTILLED = STEP_COUNTS = ("num_items_in_step", "num_distilled_in_step")


def accumulation_steps(trainer: Any) -> int:
    """Micro-batches of the current optimiser step; 1 while evaluating, which accumulates nothing."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def active_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """bool [B, T]: completion tokens that count, those of tools left out."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def whole_sequences(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, S] of prompts and completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def tokens_per_window(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Active tokens of the generation batch, rescaled to one accumulation window of one process."""
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if not trainer.model.training:
        return tokens
    return tokens * accumulation_steps(trainer) / trainer.args.steps_per_generation


def own_count(reduction: str, mask: Tensor, max_length: int) -> int | Tensor:
    """What one micro-batch [B, T] divides by where the loss is not normalised over the optimiser step."""
    if reduction == "token_mean":
        return mask.sum().clamp(min=1)
    return mask.shape[0] if reduction == "sequence_mean" else mask.shape[0] * max_length


def count_step_tokens(
    trainer: Any,
    micro_batches: Sequence[dict[str, Any]],
    name: str = STEP_TOKENS,
    tokens_of: Callable[[Mapping[str, Any]], Tensor] = active_tokens,
) -> None:
    """Tell every micro-batch of a rollout, under `name`, how many tokens its optimiser step has over all processes.

    Only where optimiser steps do not span several rollouts: the tokens of a rollout to come are unknown.
    """
    window = trainer.args.gradient_accumulation_steps
    if len(micro_batches) % window:
        return
    tokens = torch.stack([tokens_of(inputs).sum() for inputs in micro_batches])
    steps = trainer.accelerator.reduce(tokens, reduction="sum").view(-1, window).sum(1)
    for i, inputs in enumerate(micro_batches):
        inputs[name] = steps[i // window]


def tokens_per_step(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Active tokens of the optimiser step, for one process; `tokens_per_window` where a step spans several rollouts."""
    if STEP_TOKENS not in inputs:
        return tokens_per_window(trainer, inputs)
    return inputs[STEP_TOKENS].clamp(min=1.0) / trainer.accelerator.num_processes
