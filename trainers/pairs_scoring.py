"""One reward for each completion, from one or several reward functions with TRL's signature."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from dppo_kernels._checks import check_number

RewardFunction = Callable[..., Any]

# What reward functions get beside the dataset's columns.
_OWN_NAMES = ("prompt", "prompts", "completion", "completions", "completion_ids")


class RewardSum:
    """Weighted sum of reward functions over groups of completions of the same prompt.

    TRL adds up whatever rewards a completion has. Here completions of a prompt are compared, and sums of different functions
    cannot be: a completion without one of the rewards that others of its group have gets none. A function that scores no
    completion of a prompt does not apply to that prompt, and is left out there.

    Args:
        functions: one, or several. Each is called as ``f(prompts=, completions=, completion_ids=, **columns)`` and returns a
            number or None for each completion. (TRL's trainers also pass their state and loggers; nobody trains here.)
        weights: as many as functions; None for 1 each.

    Raises:
        TypeError, ValueError: functions that cannot be called, other weights.
    """

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        self.functions = list(functions) if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]
        if not self.functions:
            raise ValueError("`reward` must be a reward function or several, got none")
        for function in self.functions:
            if not callable(function) or isinstance(function, nn.Module):
                raise TypeError(f"`reward` must hold functions with TRL's signature, got {type(function).__name__}")
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"`reward_weights` must hold a weight for each of {len(self.functions)} functions, got {weights}")
        for weight in self.weights:
            check_number("reward_weights", weight)

    def __call__(
        self,
        groups: Sequence[int],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float | None]:
        """Rewards of completions; `groups` says which belong together. All arguments have one entry for each completion.

        Raises:
            TypeError, ValueError: a function returned something else than a finite number or None for each.
        """
        if not completions:
            return []
        extra = {name: list(column) for name, column in columns.items() if name not in _OWN_NAMES}
        total: list[float | None] = [None] * len(completions)
        incomplete = set()
        for function, weight in zip(self.functions, self.weights, strict=True):
            returned = function(
                prompts=list(prompts), completions=list(completions), completion_ids=list(completion_ids), **extra
            )
            rewards = _as_rewards(function, returned, len(completions))
            applies = {group for group, reward in zip(groups, rewards, strict=True) if reward is not None}
            for i, reward in enumerate(rewards):
                if reward is not None:
                    total[i] = (total[i] or 0.0) + weight * reward
                elif groups[i] in applies:
                    incomplete.add(i)
        return [None if i in incomplete else reward for i, reward in enumerate(total)]


def reward_name(function: Any) -> str:
    """As TRL names it in its logs."""
    return getattr(function, "__name__", type(function).__name__)


def _as_rewards(function: RewardFunction, returned: Any, count: int) -> list[float | None]:
    name = reward_name(function)
    try:
        values = list(returned)
    except TypeError:
        raise TypeError(f"reward function {name!r} must return a list of numbers, got {type(returned).__name__}") from None
    if len(values) != count:
        raise ValueError(f"reward function {name!r} returned {len(values)} rewards for {count} completions")
    rewards: list[float | None] = []
    for value in values:
        try:
            reward = None if value is None else float(value)
        except (TypeError, ValueError):
            raise TypeError(f"reward function {name!r} must return numbers or None, got {value!r:.200}") from None
        if reward is not None and math.isinf(reward):
            raise ValueError(f"reward function {name!r} returned {reward}: rewards must be finite, or None")
        rewards.append(None if reward is None or math.isnan(reward) else reward)
    return rewards
