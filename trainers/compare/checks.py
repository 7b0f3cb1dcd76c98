"""Signs of reward hacking: a policy that pleases its discriminators by something else than rows that are more real.

Each check compares a method with its warm start over seeds, says its numbers, and warns only where an interval shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppo_kernels.trainers.compare.conclusion import Interval, interval, paired
from dppo_kernels.trainers.compare.config import LEVELS

WARNING, NONE_SHOWN, UNKNOWN = "warning", "no sign", "undecided"
Values = Mapping[str, Sequence[float | None]]  # a number for each seed


@dataclass(frozen=True)
class Check:
    """verdict: WARNING, NONE_SHOWN, or UNKNOWN where an interval is missing; numbers: what it rests on, in words."""

    name: str
    verdict: str
    numbers: str

    @property
    def warns(self) -> bool:
        return self.verdict == WARNING


def check(method: Values, start: Values) -> list[Check]:
    """All checks of one method against the warm start; numbers of the same seeds in the same order.

    Raises:
        KeyError: a measure is missing.
        ValueError: other numbers of seeds.
    """
    change = {name: paired(method[name], start[name]) for name in method.keys() & start.keys()}
    # Of valid rows alone: in the rewards of all completions, more of them would hide what a policy does to its judges.
    reward, judge = change["reward_if_valid"], change["judge_reward_if_valid"]
    gains = (_gain(method, start, name) for name in ("reward_if_valid", "judge_reward_if_valid"))
    ahead = paired(*gains)
    levels = {name: change[name] for name in LEVELS}
    judged = {name: change[f"judge_{name}"] for name in LEVELS}
    closer = paired(method["too_close_share"], method["too_close_share_real"])
    copies = paired(method["copied_share"], method["copied_share_real"])
    nearer = paired(method["dcr"], method["dcr_real"])
    return [
        _verdict(
            "reward of valid rows up by the training discriminators, not by the judge",
            {"reward": reward, "judge": judge, "reward beyond the judge": ahead},
            _sign(reward) > 0 and (_sign(judge) < 0 or (_sign(judge) == 0 and _sign(ahead) > 0)),
        ),
        _verdict("levels apart: one up, another down (training discriminators)", levels, _apart(levels)),
        _verdict("levels apart: one up, another down (judge)", judged, _apart(judged)),
        _verdict(
            "rows nearer to training rows than real ones are (numbers beyond those of real ones)",
            {"share too close": closer, "share of copies": copies, "distance": nearer},
            _sign(closer) > 0 or _sign(copies) > 0 or _sign(nearer) < 0,
        ),
        _verdict(
            "diversity lost",
            {"distinct": change["distinct_share"], "spread": change["spread"]},
            _sign(change["distinct_share"]) < 0
            or (_sign(change["spread"]) < 0 and _sign(interval([x - 1 for x in method["spread"] if x is not None])) < 0),
        ),
        _verdict("fewer valid rows", {"valid": change["validity"]}, _sign(change["validity"]) < 0),
        _verdict("marginals further from real ones", {"TV": change["marginal_tv"]}, _sign(change["marginal_tv"]) > 0),
        _verdict(
            "correlations further from real ones",
            {"error": change["correlation_error"]},
            _sign(change["correlation_error"]) > 0,
        ),
        _verdict("less useful for training a classifier", {"TSTR AUC": change["utility"]}, _sign(change["utility"]) < 0),
    ]


def _gain(method: Values, start: Values, name: str) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(method[name], start[name], strict=True)]


def _verdict(name: str, numbers: Mapping[str, Interval | None], warns: bool) -> Check:
    known = all(value is not None and value.low is not None for value in numbers.values())
    shown = "; ".join(f"{title} {'not measured' if value is None else value}" for title, value in numbers.items())
    return Check(name, WARNING if warns else NONE_SHOWN if known else UNKNOWN, shown)


def _apart(levels: Mapping[str, Interval | None]) -> bool:
    signs = [_sign(value) for value in levels.values()]
    return max(signs) > 0 > min(signs)


def _sign(value: Interval | None) -> int:
    return 0 if value is None else value.sign
