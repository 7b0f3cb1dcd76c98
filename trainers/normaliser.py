"""GRPO 1.16's normaliser of token-level losses."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def accumulation_steps(trainer: Any) -> int:
    """Micro-batches of the current optimiser step; 1 while evaluating, which accumulates nothing."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def tokens_per_window(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Active tokens of the generation batch, rescaled to one accumulation window of one process."""
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if not trainer.model.training:
        return tokens
    return tokens * accumulation_steps(trainer) / trainer.args.steps_per_generation
