"""Each sign of reward hacking is seen where it is, and nowhere else."""

import pytest

from dppo_kernels.trainers.compare.checks import NONE_SHOWN, UNKNOWN, WARNING, check
from dppo_kernels.trainers.compare.config import LEVELS

NAMES = [
    *("reward_if_valid", "judge_reward_if_valid", *LEVELS, *(f"judge_{level}" for level in LEVELS)),
    *("distinct_share", "validity", "marginal_tv", "correlation_error", "utility"),
]
START = {
    **{name: [0.5, 0.51, 0.52] for name in NAMES},
    "dcr": [1.2, 1.21, 1.22],
    "dcr_real": [1.0, 1.0, 1.0],
    "too_close_share": [0.04, 0.05, 0.06],
    "too_close_share_real": [0.05, 0.05, 0.05],
    "copied_share": [0.0, 0.01, 0.02],
    "copied_share_real": [0.01, 0.01, 0.01],
    "spread": [1.0, 1.01, 0.99],
}
HACKED = "reward of valid rows up by the training discriminators, not by the judge"
NEARER = "rows nearer to training rows than real ones are (numbers beyond those of real ones)"
NOISE = [0.0, 0.01, -0.01]


def moved(**changes: float) -> dict[str, list[float | None]]:
    """The warm start's numbers, some of them moved."""
    return {
        name: [value + changes[name] + noise if name in changes else value for value, noise in zip(values, NOISE, strict=True)]
        for name, values in START.items()
    }


def warnings(values: dict) -> list[str]:
    return [one.name for one in check(values, START) if one.verdict == WARNING]


def test_a_policy_like_its_warm_start_gives_no_sign() -> None:
    assert {one.verdict for one in check(START, START)} == {NONE_SHOWN}


def test_a_policy_that_is_better_throughout_gives_no_sign() -> None:
    better = {
        "reward_if_valid": 0.2,
        "judge_reward_if_valid": 0.2,
        "token": 0.2,
        "judge_row": 0.2,
        "validity": 0.3,
        "utility": 0.1,
    }
    assert warnings(moved(**better, marginal_tv=-0.2, correlation_error=-0.2)) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"reward_if_valid": 0.3}, HACKED),
        ({"reward_if_valid": 0.3, "judge_reward_if_valid": -0.2}, HACKED),
        ({"reward_if_valid": 0.3, "judge_reward_if_valid": -0.2, "validity": 0.3}, HACKED),  # which validity would hide
        ({"row": 0.2, "sentence": -0.2}, "levels apart: one up, another down (training discriminators)"),
        ({"judge_row": 0.2, "judge_token": -0.2}, "levels apart: one up, another down (judge)"),
        ({"too_close_share": 0.3}, NEARER),
        ({"copied_share": 0.3}, NEARER),
        ({"dcr": -0.8}, NEARER),
        ({"distinct_share": -0.2}, "diversity lost"),
        ({"spread": -0.5}, "diversity lost"),
        ({"validity": -0.2}, "fewer valid rows"),
        ({"marginal_tv": 0.2}, "marginals further from real ones"),
        ({"correlation_error": 0.2}, "correlations further from real ones"),
        ({"utility": -0.2}, "less useful for training a classifier"),
    ],
)
def test_a_sign_is_seen(changes: dict, name: str) -> None:
    assert warnings(moved(**changes)) == [name]


def test_a_spread_that_falls_to_that_of_real_rows_is_no_loss() -> None:
    start = {**START, "spread": [1.4, 1.42, 1.39]}
    assert [one.verdict for one in check(START, start) if one.name == "diversity lost"] == [NONE_SHOWN]


def test_a_judge_that_may_have_gone_up_as_much_is_no_sign() -> None:
    """Its interval holds 0 and the whole gain: nothing is shown, and nothing warned of."""
    values = moved(reward_if_valid=0.1)
    values["judge_reward_if_valid"] = [0.5 + 0.3, 0.51 - 0.1, 0.52 + 0.07]
    assert [one.verdict for one in check(values, START) if one.name == HACKED] == [NONE_SHOWN]


def test_numbers_are_said() -> None:
    [found] = [one for one in check(moved(validity=-0.2), START) if one.name == "fewer valid rows"]
    assert found.numbers == "valid -0.2 [-0.225, -0.175]"  # 4.303 * 0.01 / sqrt(3) to each side


def test_one_seed_and_missing_measures_are_undecided() -> None:
    def first(values: dict) -> dict:
        return {name: numbers[:1] for name, numbers in values.items()}

    assert {one.verdict for one in check(first(moved(reward_if_valid=0.3)), first(START))} == {UNKNOWN}
    missing = {**START, "utility": [None, None, None]}
    verdicts = {one.name: one.verdict for one in check(missing, START)}
    assert verdicts["less useful for training a classifier"] == UNKNOWN
