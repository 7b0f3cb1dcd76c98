"""Who is said to be higher follows from the numbers alone: exchanged numbers exchange the methods, equal ones show nothing."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from dppo_kernels.trainers.compare.conclusion import METRICS, Metric, compare, in_words, interval, paired

REWARD, TV, KL = Metric("reward", "reward", 1), Metric("tv", "marginal TV", -1), Metric("kl", "KL")
numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
maybe = st.none() | numbers


@st.composite
def two_methods(draw: st.DrawFn) -> tuple[dict, dict]:
    count = draw(st.integers(1, 5))
    names = [metric.name for metric in METRICS]
    first, second = ({name: draw(st.lists(maybe, min_size=count, max_size=count)) for name in names} for _ in range(2))
    return first, second


@given(two_methods())
def test_exchanged_numbers_exchange_the_methods(values: tuple[dict, dict]) -> None:
    first, second = values
    one, other = compare("DPO", first, "PPO", second), compare("DPO", second, "PPO", first)
    exchanged = {"DPO": "PPO", "PPO": "DPO", None: None}
    for a, b in zip(one, other, strict=True):
        assert a.winner == exchanged[b.winner]
        if a.difference is None:
            assert b.difference is None
        else:
            assert a.difference == -b.difference
        if a.winner is not None:
            names = b.sentence.replace("DPO", "*").replace("PPO", "DPO").replace("*", "PPO")
            assert a.sentence == names
    # Which is named first does not matter at all.
    assert sorted(f.sentence for f in one) == sorted(f.sentence for f in compare("PPO", second, "DPO", first))
    assert in_words(one) == in_words(compare("PPO", second, "DPO", first))


@given(two_methods())
def test_equal_numbers_show_no_difference_anywhere(values: tuple[dict, dict]) -> None:
    findings = compare("DPO", values[0], "PPO", values[0])
    assert all(finding.winner is None for finding in findings)
    assert all(finding.sentence.startswith("no difference shown in ") for finding in findings)
    assert in_words(findings) == f"No difference is shown in {', '.join(metric.title for metric in METRICS)}."


@given(st.lists(numbers, min_size=2, max_size=6), st.lists(numbers, min_size=6, max_size=6))
def test_a_difference_is_said_where_scipy_finds_one(first: list[float], rest: list[float]) -> None:
    second = rest[: len(first)]
    differences = [x - y for x, y in zip(first, second, strict=True)]
    assume(max(differences) - min(differences) > 1e-6 * max(map(abs, differences)))
    assume(max(map(abs, differences)) > 1e-5)  # rewards, shares and AUCs are near 1: less is rounding
    found = stats.ttest_1samp(differences, 0)
    assume(abs(found.pvalue - 0.05) > 1e-6)
    [finding] = compare("DPO", {"reward": first}, "PPO", {"reward": second}, [REWARD])
    low, high = found.confidence_interval(0.95)
    assert finding.difference is not None
    assert finding.difference.low == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert finding.difference.high == pytest.approx(high, rel=1e-6, abs=1e-9)
    assert (finding.winner is not None) == (found.pvalue < 0.05)


@pytest.mark.parametrize(
    ("metric", "verdict", "summary"),
    [
        (REWARD, ", which is better", "PPO is better in reward."),
        (TV, ", which is worse", "DPO is better in marginal TV."),
        (KL, "", "PPO is higher in KL."),
    ],
)
def test_words_of_a_one_sided_difference(metric: Metric, verdict: str, summary: str) -> None:
    lower, higher = [0.1, 0.2, 0.3], [1.1, 1.21, 1.29]
    findings = compare("DPO", {metric.name: lower}, "PPO", {metric.name: higher}, [metric])
    assert findings[0].winner == "PPO"
    # Differences 1, 1.01 and 0.99: mean 1, standard error 0.01 / sqrt(3), t of two degrees of freedom 4.303.
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert findings[0].sentence == f"PPO is higher than DPO in {metric.title} by 1 [{1 - half:.3g}, {1 + half:.3g}]{verdict}"
    assert in_words(findings) == summary


def test_a_wide_interval_shows_nothing() -> None:
    [finding] = compare("DPO", {"reward": [0.9, 0.5, 0.7]}, "PPO", {"reward": [0.1, 0.45, 0.2]}, [REWARD])
    assert finding.difference is not None
    assert finding.difference.mean == pytest.approx(0.45)
    assert finding.winner is None


def test_one_seed_has_no_interval_and_shows_nothing() -> None:
    [finding] = compare("DPO", {"reward": [1.0]}, "PPO", {"reward": [0.0]}, [REWARD])
    assert finding.winner is None
    assert finding.sentence == "no difference shown in reward: DPO minus PPO is 1 [no interval]"


def test_seeds_that_lack_a_number_are_left_out() -> None:
    assert paired([1.0, None, 3.0, 9.0], [0.0, 5.0, 2.0, None]) == interval([1.0, 1.0])
    assert paired([None], [1.0]) is None
    [finding] = compare("DPO", {"reward": [None]}, "PPO", {"reward": [1.0]}, [REWARD])
    assert finding.sentence == "no difference shown in reward: it could not be measured"


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.1 * 3, 0.3, 0.3]])
def test_differences_that_coincide_show_nothing(values: list[float]) -> None:
    """That two or three agree, by chance or since shares of few rows are coarse, does not say how far apart others would be."""
    found = interval(values)
    assert found is not None
    assert (found.low, found.high, found.sign) == (None, None, 0)


def test_rounding_is_no_difference() -> None:
    found = interval([0.1 * 3 - 0.3] * 3)
    assert found is not None
    assert (found.low, found.mean, found.high, found.sign) == (0.0, 0.0, 0.0, 0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="`differences` must be finite, got"):
        interval([math.nan, 1.0])
    with pytest.raises(ValueError, match="two methods, got 'DPO' twice"):
        compare("DPO", {"reward": [1.0]}, "DPO", {"reward": [1.0]}, [REWARD])
    with pytest.raises(ValueError, match="each of the 1 seeds of `first`, got 2"):
        compare("DPO", {"reward": [1.0]}, "PPO", {"reward": [1.0, 2.0]}, [REWARD])
