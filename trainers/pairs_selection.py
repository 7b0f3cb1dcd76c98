"""Best and worst of each prompt's completions, and what a set of pairs is made of.

At several temperatures "chosen" goes with a low temperature, and with a length: a preference that a model can learn without
learning the reward. The statistics say how far. (Of equal rewards the first temperature takes part in the pair: where ties are
frequent, as with right and wrong answers, `reward_by_temperature` says more than who wins.)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Of differences between best and worst: from an edge up to the next one, the last without end.
GAP_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Candidate:
    """One completion of a prompt.

    Args:
        text: decoded, without special tokens.
        temperature: index of its temperature.
        tokens: how many were generated, the end token among them.
        truncated: whether the budget ended it, and no end token did.
        reward: None where it has none.
    """

    text: str
    temperature: int
    tokens: int
    truncated: bool
    reward: float | None = None


@dataclass(frozen=True)
class PromptOutcome:
    """What became of one prompt.

    Args:
        row: of the prompt in its dataset.
        completions: how many were generated.
        tokens: generated in all of them.
        truncated: how many of them the budget ended.
        unscored: how many have no reward. Truncated ones that are left out are not among them.
        rewards: of each, temperature by temperature; None without one, and for those left out.
        gap: between best and worst; None with fewer than two rewards.
        chosen, rejected: the pair, or None and None.
    """

    row: int
    completions: int
    tokens: int
    truncated: int
    unscored: int
    rewards: list[float | None]
    gap: float | None
    chosen: Candidate | None = None
    rejected: Candidate | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PromptOutcome":
        """The inverse of `dataclasses.asdict`."""
        pair = {name: values[name] and Candidate(**values[name]) for name in ("chosen", "rejected")}
        return cls(**{**values, **pair})


@dataclass(frozen=True)
class PairStatistics:
    """Counts over all prompts, the dropped ones among them.

    Args:
        prompts: how many there were.
        pairs: how many gave a pair.
        dropped_gap: prompts whose best and worst are too close.
        dropped_unscored: prompts with fewer than two rewards.
        completions: generated ones.
        generated_tokens: in all completions, end tokens included: the budget to compare methods at.
        unscored: completions without a reward.
        truncated: completions that the budget ended, left out or not.
        temperatures: those sampled at.
        reward_by_temperature: mean reward of all completions that have one, in pairs or not; None without any.
        chosen_by_temperature, rejected_by_temperature: pairs whose chosen (rejected) completion has each temperature.
        chosen_truncated, rejected_truncated: of the pairs.
        chosen_reward, rejected_reward: means over pairs; None without pairs, as below.
        chosen_tokens, rejected_tokens: mean lengths.
        gap_edges, gap_counts: histogram over prompts with two rewards, from an edge up to the next; the last has no end.
    """

    prompts: int
    pairs: int
    dropped_gap: int
    dropped_unscored: int
    completions: int
    generated_tokens: int
    unscored: int
    truncated: int
    temperatures: tuple[float, ...]
    reward_by_temperature: tuple[float | None, ...]
    chosen_by_temperature: tuple[int, ...]
    rejected_by_temperature: tuple[int, ...]
    chosen_truncated: int
    rejected_truncated: int
    chosen_reward: float | None
    rejected_reward: float | None
    chosen_tokens: float | None
    rejected_tokens: float | None
    gap_edges: tuple[float, ...]
    gap_counts: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and shares of pairs and of prompts (None without any)."""
        shares = {
            "chosen_share_by_temperature": [_share(n, self.pairs) for n in self.chosen_by_temperature],
            "rejected_share_by_temperature": [_share(n, self.pairs) for n in self.rejected_by_temperature],
            "dropped_gap_share": _share(self.dropped_gap, self.prompts),
            "dropped_unscored_share": _share(self.dropped_unscored, self.prompts),
            "truncated_share": _share(self.truncated, self.completions),
        }
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**values, **shares}

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"pairs      {self.pairs} of {self.prompts} prompts; dropped {_counted(self.dropped_gap, self.prompts)} with too "
            f"small a gap, {_counted(self.dropped_unscored, self.prompts)} with fewer than two rewards",
            f"generated  {self.generated_tokens} tokens in {self.completions} completions; {self.truncated} truncated, "
            f"{self.unscored} without a reward",
        ]
        ends = (*(f"-{edge:g}" for edge in self.gap_edges[1:]), "+")
        bins = [
            f"{edge:g}{end} in {_counted(count, sum(self.gap_counts))}"
            for edge, end, count in zip(self.gap_edges, ends, self.gap_counts, strict=True)
            if count
        ]
        if bins:
            lines.append(f"gaps       {', '.join(bins)}")
        if self.pairs:
            lines += [
                f"rewards    chosen {self.chosen_reward:.4g}, rejected {self.rejected_reward:.4g}; "
                f"tokens {self.chosen_tokens:.4g} and {self.rejected_tokens:.4g}",
                *(
                    f"T = {temperature:<6g} chosen in {chosen / self.pairs:.1%}, rejected in {rejected / self.pairs:.1%}"
                    for temperature, chosen, rejected in zip(
                        self.temperatures, self.chosen_by_temperature, self.rejected_by_temperature, strict=True
                    )
                ),
            ]
        return "\n".join(lines)


def select_pair(candidates: Sequence[Candidate], min_gap: float) -> tuple[float | None, Candidate | None, Candidate | None]:
    """Gap, best and worst of one prompt's candidates that have a reward; of equals, the first.

    The pair is there only where best - worst > `min_gap`, strictly; the gap is None with fewer than two rewards.
    """
    scored = [(c.reward, c) for c in candidates if c.reward is not None]
    if len(scored) < 2:
        return None, None, None
    high, best = max(scored, key=lambda x: x[0])
    low, worst = min(scored, key=lambda x: x[0])
    gap = high - low
    return (gap, best, worst) if gap > min_gap else (gap, None, None)


def pair_statistics(outcomes: Sequence[PromptOutcome], temperatures: Sequence[float]) -> PairStatistics:
    """Of all prompts, in any order."""
    chosen = [o.chosen for o in outcomes if o.chosen is not None]
    rejected = [o.rejected for o in outcomes if o.rejected is not None]
    gaps = [o.gap for o in outcomes if o.gap is not None]
    return PairStatistics(
        prompts=len(outcomes),
        pairs=len(chosen),
        dropped_gap=len(gaps) - len(chosen),
        dropped_unscored=len(outcomes) - len(gaps),
        completions=sum(o.completions for o in outcomes),
        generated_tokens=sum(o.tokens for o in outcomes),
        unscored=sum(o.unscored for o in outcomes),
        truncated=sum(o.truncated for o in outcomes),
        temperatures=tuple(temperatures),
        reward_by_temperature=tuple(_mean(_rewards_at(t, outcomes, len(temperatures))) for t in range(len(temperatures))),
        chosen_by_temperature=tuple(sum(c.temperature == t for c in chosen) for t in range(len(temperatures))),
        rejected_by_temperature=tuple(sum(c.temperature == t for c in rejected) for t in range(len(temperatures))),
        chosen_truncated=sum(c.truncated for c in chosen),
        rejected_truncated=sum(c.truncated for c in rejected),
        chosen_reward=_mean([c.reward for c in chosen if c.reward is not None]),
        rejected_reward=_mean([c.reward for c in rejected if c.reward is not None]),
        chosen_tokens=_mean([c.tokens for c in chosen]),
        rejected_tokens=_mean([c.tokens for c in rejected]),
        gap_edges=GAP_EDGES,
        gap_counts=tuple(
            sum(low <= gap < high for gap in gaps) for low, high in zip(GAP_EDGES, (*GAP_EDGES[1:], math.inf), strict=True)
        ),
    )


def _rewards_at(temperature: int, outcomes: Sequence[PromptOutcome], count: int) -> list[float]:
    return [
        reward
        for outcome in outcomes
        for i, reward in enumerate(outcome.rewards)
        if reward is not None and i * count // len(outcome.rewards) == temperature
    ]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _counted(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else f"{part}"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
