"""Which method is higher in what: paired differences over seeds, their intervals, and the words for them.

Pure functions of the two methods' numbers: with their numbers exchanged, the methods exchange places in the conclusion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-12  # differences that agree to it have no spread to take an interval from


@dataclass(frozen=True)
class Metric:
    """better: 1 where higher is better, -1 where lower is, 0 where it is neither by itself."""

    name: str
    title: str
    better: int = 0


METRICS = (
    Metric("reward", "reward (training discriminators)", 1),
    Metric("reward_if_valid", "reward of valid rows alone", 1),
    Metric("judge_reward", "judge reward", 1),
    Metric("judge_reward_if_valid", "judge reward of valid rows alone", 1),
    Metric("validity", "valid rows (share)", 1),
    Metric("kl", "KL to the warm start (nats)"),
    Metric("utility", "TSTR AUC", 1),
    Metric("marginal_tv", "marginal TV", -1),
    Metric("correlation_error", "correlation error", -1),
    Metric("dcr", "distance to the closest training row"),
    Metric("too_close_share", "rows too close to a training row (share)", -1),
    Metric("copied_share", "copies of training rows (share)", -1),
    Metric("distinct_share", "distinct rows (share)", 1),
    Metric("spread", "spread, as a multiple of the training rows'"),
)


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences and where it lies with 95 % confidence by Student's t.

    No bounds with fewer than two, or where they happen to coincide: that says nothing about how far apart others would be.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is on one side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        bounds = "no interval" if self.low is None or self.high is None else f"{self.low:.3g}, {self.high:.3g}"
        return f"{self.mean:.3g} [{bounds}]"

    def __neg__(self) -> "Interval":
        low, high = (None if bound is None else 0.0 - bound for bound in (self.high, self.low))
        return Interval(0.0 - self.mean, low, high, self.count)


@dataclass(frozen=True)
class Finding:
    """`winner` is the method that is higher, or None where no difference is shown; `difference` is first minus second."""

    metric: Metric
    first: str
    second: str
    difference: Interval | None  # None: no seed has both numbers
    winner: str | None
    sentence: str


def interval(differences: Sequence[float]) -> Interval | None:
    """Of paired differences; None of none.

    Raises:
        ValueError: a difference that is not finite.
    """
    values = np.array(differences, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"`differences` must be finite, got {list(differences)}")
    count = len(values)
    if count == 0:
        return None
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, None, None, count)
    if np.abs(values).max() <= ROUNDING:
        return Interval(0.0, 0.0, 0.0, count)
    if np.ptp(values) <= ROUNDING * max(1.0, abs(mean)):
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * float(stats.sem(values))
    return Interval(mean, mean - half, mean + half, count)


def paired(first: Sequence[float | None], second: Sequence[float | None]) -> Interval | None:
    """Of first minus second, over the seeds that have both.

    Raises:
        ValueError: other numbers of seeds, or a difference that is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"`second` must have a number for each of the {len(first)} seeds of `first`, got {len(second)}")
    return interval([x - y for x, y in zip(first, second, strict=True) if x is not None and y is not None])


def compare(
    first: str,
    first_values: Mapping[str, Sequence[float | None]],
    second: str,
    second_values: Mapping[str, Sequence[float | None]],
    metrics: Sequence[Metric] = METRICS,
) -> list[Finding]:
    """One finding a metric.

    Args:
        first, second: names of the methods.
        first_values, second_values: by metric, a number for each seed, in the same order of seeds; None where there is none.

    Raises:
        ValueError: two names that are the same, other numbers of seeds, or numbers that are not finite.
        KeyError: a metric is missing.
    """
    if first == second:
        raise ValueError(f"`first` and `second` must be two methods, got {first!r} twice")
    return [_finding(metric, first, first_values[metric.name], second, second_values[metric.name]) for metric in metrics]


def _finding(
    metric: Metric, first: str, first_values: Sequence[float | None], second: str, second_values: Sequence[float | None]
) -> Finding:
    difference = paired(first_values, second_values)
    if difference is None:
        return Finding(metric, first, second, None, None, f"no difference shown in {metric.title}: it could not be measured")
    if difference.sign == 0:
        # Said the same way whichever method is named first.
        names, shown = ((first, second), difference) if first < second else ((second, first), -difference)
        sentence = f"no difference shown in {metric.title}: {names[0]} minus {names[1]} is {shown}"
        return Finding(metric, first, second, difference, None, sentence)
    winner, loser, by = (first, second, difference) if difference.sign > 0 else (second, first, -difference)
    verdict = {1: ", which is better", -1: ", which is worse", 0: ""}[metric.better]
    sentence = f"{winner} is higher than {loser} in {metric.title} by {by}{verdict}"
    return Finding(metric, first, second, difference, winner, sentence)


def in_words(findings: Sequence[Finding]) -> str:
    """A few sentences from the findings: what each method is better and worse in, and what is not decided."""
    methods = sorted({name for finding in findings for name in (finding.first, finding.second)})
    sentences = []
    for method in methods:
        better = [f.metric.title for f in findings if f.winner is not None and f.metric.better and _is_better(f, method)]
        if better:
            sentences.append(f"{method} is better in {', '.join(better)}.")
    for finding in findings:
        if finding.winner is not None and not finding.metric.better:
            sentences.append(f"{finding.winner} is higher in {finding.metric.title}.")
    open_ = [finding.metric.title for finding in findings if finding.winner is None]
    if open_:
        sentences.append(f"No difference is shown in {', '.join(open_)}.")
    return " ".join(sentences)


def _is_better(finding: Finding, method: str) -> bool:
    return (finding.winner == method) == (finding.metric.better > 0)
