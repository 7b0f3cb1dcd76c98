"""What samples of a policy are worth: rewards by two sets of discriminators, KL, validity, utility and privacy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dppo_kernels.trainers.compare.config import LEVELS, CompareConfig
from dppo_kernels.trainers.compare.task import Samples, Task, Weights
from dppo_kernels.trainers.rewards.tabular import hierarchical_reward
from dppo_kernels.trainers.tabular import Discriminators, Evaluator, TrainingOptions, serialise_rows

TOKEN_EPOCHS = 4  # of the others' for one of the token level, which is the slow one


def new_discriminators(task: Task, config: CompareConfig) -> Discriminators:
    epochs = config.discriminator_epochs
    options = TrainingOptions(epochs=epochs, token_epochs=-(-epochs // TOKEN_EPOCHS))
    return Discriminators(task.schema, options=options)


def fit_training(task: Task, config: CompareConfig, samples: Samples) -> Discriminators:
    """Those that both methods are trained on, as they are before the first round: they learn from the training rows."""
    found = new_discriminators(task, config)
    tuning, reporting = halves(task.split.tuning)
    found.fit(task.split.train, tuning, reporting, generated=samples.texts, seed=task.seed)
    return found


def fit_judge(task: Task, config: CompareConfig, samples: Sequence[Samples]) -> Discriminators:
    """Those that nothing is trained on: they learn from real rows that neither the policies nor the others learned from.

    When they stop, and their temperatures, are decided on the same tuning rows as those of the others.

    Args:
        samples: of the warm start and of each method, as many of each: of all of them together it draws at random.
    """
    found = new_discriminators(task, config)
    tuning, reporting = halves(task.split.tuning)
    texts = [text for part in samples for text in part.texts]
    found.fit(task.split.held_out, tuning, reporting, generated=texts, seed=task.seed + 1_000_003)
    return found


def halves(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every other different row, which are in random order, with all that are the same."""
    odd = rows.groupby(list(rows.columns), sort=False).ngroup() % 2 == 1
    return rows[~odd], rows[odd]


def rewards(discriminators: Discriminators, samples: Samples) -> dict[str, float | None]:
    """Mean and standard deviation of the hierarchical reward, the share of valid rows, and means of the levels over these."""
    scores = discriminators.score(samples.texts, samples.starts)
    reward = hierarchical_reward(scores.token, scores.sentence, scores.row, scores.features) * scores.valid
    features = np.mean(list(scores.features.values()), axis=0)
    levels = dict(zip(LEVELS, (scores.token, scores.sentence, scores.row, features), strict=True))
    found = {"reward": reward.mean(), "reward_std": reward.std(), "validity": scores.valid.mean()}
    by_level = {name: float(x[scores.valid].mean()) if scores.valid.any() else None for name, x in levels.items()}
    return {name: float(value) for name, value in found.items()} | by_level


def judged(judge: Discriminators, samples: Samples) -> dict[str, float | None]:
    """The same by the judge, its names with that prefix."""
    return {f"judge_{name}": value for name, value in rewards(judge, samples).items() if name != "validity"}


def real_rows(task: Task, discriminators: Discriminators, judge: Discriminators) -> dict[str, float | None]:
    """Rewards of the evaluation rows as text: what no policy can be expected to exceed."""
    rng = np.random.default_rng(task.seed)
    pairs = serialise_rows(task.schema, task.split.evaluation, rng)
    prompts = [prompt for prompt, _ in pairs]
    samples = Samples(prompts, [], [prompt + completion for prompt, completion in pairs])
    found = {**rewards(discriminators, samples), **judged(judge, samples)}
    return found | {f"{name}_if_valid": found[name] for name in ("reward", "judge_reward")}


def measure(
    task: Task,
    samples: Samples,
    weights: Weights,
    start: Weights,
    discriminators: Discriminators,
    judge: Discriminators,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """Everything, of fresh samples of the policy of these weights; None for what cannot be taken, and why in "reasons"."""
    kl = task.kl(samples, weights, start)
    lengths = [len(ids) for ids in samples.ids]
    return {
        **rewards(discriminators, samples),
        **judged(judge, samples),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std(ddof=1) / np.sqrt(len(kl))),
        "tokens": float(np.mean(lengths)),
        **evaluator.measure(samples.texts).as_dict(),
    }
