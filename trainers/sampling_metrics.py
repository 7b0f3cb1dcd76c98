"""What dynamic sampling logs: one entry a training batch, however many rounds of generation it took."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from dppo_kernels.trainers.sampling import Collected, RefillRule, judge


def combine_metrics(rounds: Sequence[Mapping[str, Sequence[float]]], sizes: Sequence[int]) -> dict[str, float]:
    """GRPO's metrics of one batch from those of its rounds: the mean over rows, the least or the largest.

    Args:
        rounds: lists by name; `sizes`: their rows.
    """
    combined = {}
    for name in dict.fromkeys(name for metrics in rounds for name in metrics):
        weighted = [
            (x, _weight(name, metrics, size))
            for metrics, size in zip(rounds, sizes, strict=True)
            for x in metrics.get(name, ())
            if not math.isnan(x)
        ]
        # Where a round has nothing to take the mean of, TRL writes 0; so it is here where no round has.
        weighted = [pair for pair in weighted if pair[1] > 0] or [(x, 1.0) for x, _ in weighted]
        values = [x for x, _ in weighted]
        last = name.rsplit("/")[-1]
        if not values:
            combined[name] = math.nan
        elif last.startswith("min"):
            combined[name] = min(values)
        elif last.startswith("max"):
            combined[name] = max(values)
        else:
            combined[name] = sum(x * weight for x, weight in weighted) / sum(weight for _, weight in weighted)
    return combined


def _weight(name: str, metrics: Mapping[str, Sequence[float]], rows: int) -> float:
    """How much there is in a round of what a metric is taken over."""
    if name.endswith("_terminated_length"):
        return rows * (1 - metrics["completions/clipped_ratio"][0])
    if name == "tools/failure_frequency":
        return rows * metrics["tools/call_frequency"][0]
    return rows


def moments(name: str, values: Tensor) -> dict[str, float]:
    """Mean and sample standard deviation, NaN left out."""
    known = values[~values.isnan()]
    mean = known.mean().item() if known.numel() else math.nan
    return {f"{name}/mean": mean, f"{name}/std": known.std().item() if known.numel() > 1 else math.nan}


def generated_rewards(per_function: Tensor, rewards: Tensor, functions: Sequence[str]) -> dict[str, float]:
    """GRPO's reward metrics over all that was generated, so that they compare with a run without filtering.

    Args:
        per_function: [rows, functions]; `rewards`: [rows], their weighted sums; `functions`: names.
    """
    before = moments("reward", rewards)
    values = {"reward": before["reward/mean"], "reward_std": before["reward/std"]}
    values |= {f"{name}_before_filter": value for name, value in before.items()}
    for i, function in enumerate(functions):
        values |= moments(f"rewards/{function}", per_function[:, i])
    return values


def batch_metrics(collected: Collected, rule: RefillRule, trained: Tensor, epochs: float) -> dict[str, float]:
    """Metrics of the groups that are trained on, and of how they were found.

    Args:
        trained: [groups, G], their rewards.
        epochs: passes over the prompts so far.
    """
    flat = sum(verdict != "mixed" for verdict in judge(trained, trained))
    return {
        **moments("reward", trained),
        "frac_reward_zero_std": flat / len(trained),
        "dapo/num_gen_batches": collected.rounds,
        "dapo/num_prompts": collected.verdicts.total(),
        "dapo/frac_all_correct": collected.share("all_correct"),
        "dapo/frac_all_wrong": collected.share("all_wrong"),
        "dapo/frac_kept": collected.share("mixed"),
        "dapo/surplus": collected.surplus,
        "dapo/frac_filled": len(trained) / rule.need,
        "dapo/frac_stale": sum(group.round < 0 for group in collected.trained) / len(trained),
        "dapo/prompt_epochs": epochs,
    }
