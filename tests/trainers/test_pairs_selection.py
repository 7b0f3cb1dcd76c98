"""Best and worst, statistics and sums of rewards, on constructed values."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from dppo_kernels.trainers.pairs_scoring import RewardSum
from dppo_kernels.trainers.pairs_selection import GAP_EDGES, Candidate, PromptOutcome, pair_statistics, select_pair


def group(*rewards: float | None) -> list[Candidate]:
    return [Candidate(f"text {i}", i, tokens=3 + i, truncated=i == 2, reward=reward) for i, reward in enumerate(rewards)]


def outcome(row: int, *rewards: float | None, min_gap: float = 0.01) -> PromptOutcome:
    found = group(*rewards)
    return PromptOutcome(row, len(found), 20, 1, rewards.count(None), list(rewards), *select_pair(found, min_gap))


@pytest.mark.parametrize(
    ("rewards", "min_gap", "expected"),
    [
        ((0.5, 0.25), 0.25, (0.25, None, None)),  # exactly the gap: not above it
        ((0.5, 0.25), 0.125, (0.25, 0, 1)),
        ((0.25, 0.5), 0.125, (0.25, 1, 0)),
        ((0.0, 0.0, 0.0), 0.0, (0.0, None, None)),
        ((1.0, 3.0, 3.0, 1.0), 0.01, (2.0, 1, 0)),  # of equals, the first temperature
        ((None, 1.0, -1.0, None), 0.01, (2.0, 1, 2)),
        ((None, 5.0, None), 0.01, (None, None, None)),
        ((None, None), 0.01, (None, None, None)),
    ],
)
def test_the_pair_of_a_prompt(rewards: Any, min_gap: float, expected: tuple) -> None:
    gap, chosen, rejected = select_pair(group(*rewards), min_gap)
    assert (gap, chosen and chosen.temperature, rejected and rejected.temperature) == expected


def test_statistics_of_constructed_rewards() -> None:
    outcomes = [
        outcome(0, 4.0, 0.0, 1.0),  # 0.6 wins, 0.8 loses
        outcome(1, 2.0, 1.0, 1.0),  # 0.6 wins, 0.8 loses: the first of two
        outcome(2, 0.0, 1.0, 4.0),  # 1.2 wins, 0.6 loses
        outcome(3, 1.0, 1.0, 1.005),  # too close
        outcome(4, None, None, 7.0),  # nothing to compare with
        outcome(5, None, 0.25, 12.25),
    ]
    statistics = pair_statistics(outcomes, (0.6, 0.8, 1.2))
    assert (statistics.prompts, statistics.pairs, statistics.dropped_gap, statistics.dropped_unscored) == (6, 4, 1, 1)
    assert (statistics.completions, statistics.generated_tokens, statistics.unscored, statistics.truncated) == (18, 120, 3, 6)
    assert statistics.chosen_by_temperature == (2, 0, 2)
    assert statistics.rejected_by_temperature == (1, 3, 0)
    assert (statistics.chosen_truncated, statistics.rejected_truncated) == (2, 0)
    assert statistics.chosen_reward == (4 + 2 + 4 + 12.25) / 4
    assert statistics.rejected_reward == (0 + 1 + 0 + 0.25) / 4
    assert (statistics.chosen_tokens, statistics.rejected_tokens) == ((3 + 3 + 5 + 5) / 4, (4 + 4 + 3 + 4) / 4)
    assert statistics.reward_by_temperature == pytest.approx((7 / 4, 3.25 / 5, (1 + 1 + 4 + 1.005 + 7 + 12.25) / 6))
    # Gaps 4, 1, 4, 0.005 and 12.
    assert dict(zip(GAP_EDGES, statistics.gap_counts, strict=True)) == {
        **dict.fromkeys(GAP_EDGES, 0),
        0.0: 1,
        1.0: 1,
        2.0: 2,
        10.0: 1,
    }
    values = json.loads(json.dumps(statistics.as_dict()))
    assert values["chosen_share_by_temperature"] == [0.5, 0.0, 0.5]
    assert values["rejected_share_by_temperature"] == [0.25, 0.75, 0.0]
    assert (values["dropped_gap_share"], values["dropped_unscored_share"], values["truncated_share"]) == (1 / 6, 1 / 6, 1 / 3)
    assert "4 of 6 prompts; dropped 1" in statistics.summary()
    assert "T = 0.8    chosen in 0.0%, rejected in 75.0%" in statistics.summary()
    assert "dropped 1 (16.7%) with too small a gap, 1 (16.7%) with fewer than two rewards\n" in statistics.summary()
    assert "gaps       0-0.01 in 1 (20.0%), 1-2 in 1 (20.0%), 2-5 in 2 (40.0%), 10+ in 1 (20.0%)\n" in statistics.summary()


def test_several_samples_at_a_temperature_share_its_mean() -> None:
    statistics = pair_statistics([outcome(0, 1.0, 3.0, 10.0, 30.0)], (0.5, 1.0))
    assert statistics.reward_by_temperature == (2.0, 20.0)


def test_no_pairs_have_no_means() -> None:
    statistics = pair_statistics([outcome(0, 1.0, 1.0)], (0.6, 0.8))
    assert (statistics.chosen_reward, statistics.rejected_tokens) == (None, None)
    assert statistics.as_dict()["chosen_share_by_temperature"] == [None, None]
    assert "0 of 1 prompts" in statistics.summary()


def test_prompts_without_two_rewards_have_no_gaps() -> None:
    summary = pair_statistics([outcome(0, 1.0, None)], (0.6, 0.8)).summary()
    assert "1 (100.0%) with fewer than two rewards" in summary
    assert "gaps" not in summary
    assert pair_statistics([], (0.6, 0.8)).summary().startswith("pairs      0 of 0 prompts; dropped 0 with too small")


def test_outcomes_survive_json() -> None:
    for kept in (outcome(3, 0.1, 0.7, None), outcome(4, None, 1.0)):
        assert PromptOutcome.from_dict(json.loads(json.dumps(dataclasses.asdict(kept)))) == kept


def scores(values: list[Any]) -> Any:
    return lambda completions, **kwargs: values


def summed(functions: Any, weights: list[float] | None = None, groups: tuple[int, ...] = (0, 0, 1, 1)) -> list[float | None]:
    texts = [f"c{i}" for i in range(len(groups))]
    return RewardSum(functions, weights)(groups, ["p"] * len(groups), texts, [[1]] * len(groups), {})


def test_functions_are_summed_with_their_weights() -> None:
    assert summed([scores([1, 2, 3, 4]), scores([torch.tensor(1.0), 0, 0, 1])], [0.5, -2]) == [-1.5, 1, 1.5, 0]
    assert summed(scores([1, 2, 3, 4])) == [1, 2, 3, 4]


def test_what_lacks_a_reward_of_its_group_has_none() -> None:
    first, second = scores([1, None, 3, math.nan]), scores([10, 20, 30, 40])
    assert summed([first, second]) == [11, None, 33, None]
    assert summed(first) == [1, None, 3, None]


def test_a_function_that_scores_nothing_of_a_prompt_does_not_apply_to_it() -> None:
    assert summed([scores([1, 2, None, None]), scores([None, None, 30, 40])]) == [1, 2, 30, 40]
    assert summed(scores([None] * 4)) == [None] * 4


def test_functions_get_what_trl_gives_them() -> None:
    seen = []

    def reward(**kwargs: Any) -> list[float]:
        seen.append(kwargs)
        return [0.0, 0.0]

    columns = {"prompt": ["x", "x"], "completion": ["y", "y"], "answer": ["3", "4"]}
    RewardSum(reward)([0, 1], ["p", "q"], ["c", "d"], [[1], [2, 3]], columns)
    assert seen == [{"prompts": ["p", "q"], "completions": ["c", "d"], "completion_ids": [[1], [2, 3]], "answer": ["3", "4"]}]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "returned 1 rewards for 4 completions"),
        (None, TypeError, "must return a list of numbers, got NoneType"),
        ([1, 2, 3, "good"], TypeError, "must return numbers or None, got 'good'"),
        ([1, 2, 3, -math.inf], ValueError, "returned -inf: rewards must be finite"),
    ],
)
def test_what_functions_may_not_return(returned: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        summed(scores(returned))


@pytest.mark.parametrize(
    ("functions", "weights", "error", "message"),
    [
        ([], None, ValueError, "got none"),
        ("length", None, TypeError, "got str"),
        (torch.nn.Linear(1, 1), None, TypeError, "got Linear"),
        (len, [1.0, 2.0], ValueError, "a weight for each of 1 functions"),
        (len, ["1"], TypeError, "`reward_weights` must be a number"),
    ],
)
def test_what_is_no_reward(functions: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardSum(functions, weights)
