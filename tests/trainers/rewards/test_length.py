"""The soft overlong penalty: the published cases, its corners, what it reports."""

import json
import pickle
from pathlib import Path

import pytest

from dppo_kernels.trainers.rewards import SoftOverlongPenalty
from dppo_kernels.trainers.rewards.length import soft_overlong_penalty

CASES = json.loads((Path(__file__).parents[2] / "golden" / "golden.json").read_text())["cases"]
GOLDEN = next(case for case in CASES if case["id"] == "s3.overlong")


def test_published_cases() -> None:
    inputs = GOLDEN["inputs"]
    reward = SoftOverlongPenalty(inputs["L_max"], inputs["L_cache"], inputs["factor"])
    assert reward([[7] * n for n in inputs["lengths"]]) == GOLDEN["expected"]["paper"]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (84, 0.0), (85, -0.125), (92, -1.0), (100, -2.0), (101, -2.0), (10**9, -2.0)]
)
def test_linear_between_nothing_and_the_floor(length: int, expected: float) -> None:
    assert soft_overlong_penalty(length, 100, 16, factor=2.0) == expected


def test_no_negative_zero() -> None:
    assert str(soft_overlong_penalty(84, 100, 16)) == "0.0"


def test_the_buffer_may_be_everything() -> None:
    assert SoftOverlongPenalty(4, 4)([[], [1], [1] * 4]) == [0.0, -0.25, -1.0]


def test_metrics_are_over_the_whole_batch() -> None:
    logged = {}
    reward = SoftOverlongPenalty(10, 4)
    reward([[1] * n for n in (3, 6, 8, 10)], log_metric=logged.__setitem__, prompts=["p"] * 4, trainer_state=None)
    assert logged == {"overlong/frac": 0.5, "overlong/mean_penalty": -0.375}
    assert reward([], log_metric=logged.__setitem__) == []


def test_it_can_be_sent_to_another_process() -> None:
    reward = pickle.loads(pickle.dumps(SoftOverlongPenalty(10, 4, 0.5)))
    assert reward.__name__ == "overlong_penalty"
    assert reward([[1] * 9]) == [-0.375]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 0), ValueError, r"`buffer_len` must be in \[1, max_completion_length\], got 0"),
        ((10, 11), ValueError, "got 11 with max_completion_length=10"),
        ((10, 2.0), TypeError, "`buffer_len` must be an int, got 2.0"),
        ((10, True), TypeError, "`buffer_len` must be an int, got True"),
        ((None, 4), TypeError, "`max_completion_length` must be an int, got None"),
        ((10, 4, 0.0), ValueError, "`factor` must be positive and finite, got 0.0"),
        ((10, 4, float("nan")), ValueError, "`factor`"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftOverlongPenalty(*arguments)
