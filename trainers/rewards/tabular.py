"""The reward of generated table rows: how real they look at four levels, and whether they are rows at all."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # scikit-learn is not needed to import rewards
    from dppo_kernels.trainers.tabular.discriminators import Discriminators

WEIGHTS = (0.2, 0.3, 0.3, 0.2)


def hierarchical_reward(
    token: Any, sentence: Any, row: Any, features: Mapping[str, Any], *, weights: Sequence[float] = WEIGHTS
) -> Any:
    """Weighted sum of the token, sentence and row score and of the mean over feature groups; of numbers or arrays [N].

    Raises:
        ValueError: no feature groups, or not four weights.
    """
    if not features:
        raise ValueError("`features` must hold a score for at least one group, got none")
    if len(weights) != 4:
        raise ValueError(f"`weights` must be four numbers (token, sentence, row, features), got {weights!r}")
    levels = (token, sentence, row, sum(features.values()) / len(features))
    return sum(weight * level for weight, level in zip(weights, levels, strict=True))


class HierarchicalReward:
    """Reward function for TRL: `hierarchical_reward` of prompt and completion, 0 where they are no whole row.

    Token scores are those of the completion. `log_metric` gets the means "tabular/token", "tabular/sentence", "tabular/row",
    "tabular/features/<group>" and "tabular/valid" over the completions.

    Args:
        discriminators: fitted; a later `update` of them changes this reward too.
        weights: of token, sentence, row and features, each >= 0.

    Raises:
        ValueError: weights other than what is said above.
    """

    __name__ = "hierarchical_reward"

    def __init__(self, discriminators: "Discriminators", weights: Sequence[float] = WEIGHTS) -> None:
        if len(weights) != 4 or not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"`weights` must be four finite numbers >= 0, got {weights!r}")
        self.discriminators = discriminators
        self.weights = tuple(weights)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        for name, texts in (("prompts", prompts), ("completions", completions)):
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"`{name}` must be strings, the two parts of a row's text; got {type(text).__name__}")
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores = self.discriminators.score(texts, [len(prompt) for prompt in prompts])
        if log_metric is not None and texts:
            levels = {name: getattr(scores, name) for name in ("token", "sentence", "row", "valid")}
            levels |= {f"features/{group}": values for group, values in scores.features.items()}
            for name, values in levels.items():
                log_metric(f"tabular/{name}", float(np.mean(values)))
        rewards = hierarchical_reward(scores.token, scores.sentence, scores.row, scores.features, weights=self.weights)
        return [float(reward) for reward in rewards * scores.valid]
