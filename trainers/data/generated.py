"""Generated problems with exact answers, short enough for small character-level models: no download, no data files."""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from datasets import Dataset

from dppo_kernels._checks import check_choice

CHARACTERS = "0123456789+-*/=^>, xy"  # all that prompts and answers are made of

_Problem = tuple[str, str]


class _Family(NamedTuple):
    """Problems of one form: `write` of every point of the grid `axes`. No two points of any families share a prompt."""

    write: Callable[..., _Problem]
    axes: tuple[Sequence[Any], ...]

    @property
    def size(self) -> int:
        return math.prod(map(len, self.axes))

    def problem(self, index: int) -> _Problem:
        point = []
        for axis in self.axes:
            index, position = divmod(index, len(axis))
            point.append(axis[position])
        return self.write(*point)


def generate_problems(kind: str = "mixed", size: int = 2048, seed: int = 0) -> Dataset:
    """Distinct problems of varying difficulty; the same ones, in the same order, for the same arguments.

    Seeds are not disjoint: hold problems out with `split_problems`.

    Args:
        kind: "addition" (of numbers below 100, the easiest), "arithmetic" (sums, differences and products of one or two
            operators, of numbers below 100 or of fractions),
            "algebra" (equations, proportions, systems and quadratics with one integer solution), "mixed" (both) or "uneven"
            (additions, and for a third products of two-digit numbers, which small models do not get right).
        size: number of problems, spread evenly over the forms that `kind` has as long as they last.
        seed: int >= 0.

    Returns:
        Columns `prompt` (such as ``27+35=`` or ``3x+4=19, x=``; at most 24 of `CHARACTERS`) and `answer`, both strings.

    Raises:
        ValueError: for an unknown kind, a negative seed, or a size that is not positive or more than `kind` has.
        TypeError: for a size or seed that is not an int.
    """
    check_choice("kind", kind, _KINDS)
    _check_int("size", size, least=1)
    _check_int("seed", seed, least=0)
    families = _KINDS[kind]
    capacity = sum(family.size for family in families)
    if size > capacity:
        raise ValueError(f"`size` must be at most {capacity}, all there is of kind {kind!r}; got {size}")
    rng = random.Random(seed)
    problems: list[_Problem] = []
    for left, family in zip(range(len(families), 0, -1), families, strict=True):
        share = min(family.size, (size - len(problems)) // left)
        problems += map(family.problem, rng.sample(range(family.size), share))
    rng.shuffle(problems)
    prompts, answers = zip(*problems, strict=True)
    return Dataset.from_dict({"prompt": prompts, "answer": answers})


def split_problems(dataset: Dataset, held_out: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(training, held-out) rows of a dataset, disjoint, each in the dataset's order.

    Args:
        dataset: its prompts must be distinct, as those of `load_prompts` and `generate_problems` are.
        held_out: number of rows to hold out, less than the dataset has.
        seed: int >= 0; the same seed holds out the same rows.

    Raises:
        ValueError: if `held_out` leaves one part without rows, or for a negative seed.
        TypeError: for arguments of another type.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a datasets.Dataset, got {type(dataset).__name__}")
    _check_int("held_out", held_out, least=1)
    _check_int("seed", seed, least=0)
    if held_out >= len(dataset):
        raise ValueError(f"`held_out` must be less than the {len(dataset)} rows of the dataset, got {held_out}")
    chosen = set(random.Random(seed).sample(range(len(dataset)), held_out))
    training = [row for row in range(len(dataset)) if row not in chosen]
    return dataset.select(training), dataset.select(sorted(chosen))


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}` must be an int >= {least}, got {value}")


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def _one_operator(a: int | Fraction, operator: str, b: int | Fraction) -> _Problem:
    return f"{a}{operator}{b}=", str(_OPERATORS[operator](a, b))


def _two_operators(a: int, first: str, b: int, second: str, c: int) -> _Problem:
    one, other = _OPERATORS[first], _OPERATORS[second]
    binds_right = second == "*" and first != "*"
    return f"{a}{first}{b}{second}{c}=", str(one(a, other(b, c)) if binds_right else other(one(a, b), c))


def _shifted(x: int, b: int) -> _Problem:
    return f"x{b:+}={x + b}, x=", str(x)


def _scaled(a: int, x: int) -> _Problem:
    return f"{a}x={a * x}, x=", str(x)


def _linear(a: int, b: int, x: int) -> _Problem:
    return f"{a}x{b:+}={a * x + b}, x=", str(x)


def _unknown_on_both_sides(right: int, more: int, b: int, x: int) -> _Problem:
    d = more * x + b
    return f"{right + more}x{b:+}={right}x{f'{d:+}' if d else ''}, x=", str(x)


def _proportion(fraction: Fraction, scale: int, unknown: str) -> _Problem:
    top, bottom = fraction.numerator * scale, fraction.denominator * scale
    if unknown == "top":
        return f"{fraction}=x/{bottom}, x=", str(top)
    return f"{fraction}={top}/x, x=", str(bottom)


def _sum_and_difference(x: int, y: int, unknown: str) -> _Problem:
    return f"x+y={x + y}, x-y={x - y}, {unknown}=", str(x if unknown == "x" else y)


def _system(a: int, b: int, x: int, y: int, unknown: str) -> _Problem:
    return f"{a}x+{b}y={a * x + b * y}, x-y={x - y}, {unknown}=", str(x if unknown == "x" else y)


def _quadratic(p: int, x: int) -> _Problem:
    # The other root is -(x + p), not positive.
    return f"x^2{f'+{p}x' if p else ''}={x * (x + p)}, x>0, x=", str(x)


_DIGITS = range(1, 10)
_TWO_DIGITS = range(10, 100)
_SIGNED = [b for b in range(-30, 31) if b]
_PROPER = [Fraction(a, b) for b in range(2, 10) for a in range(1, b) if math.gcd(a, b) == 1]

_ARITHMETIC = (
    _Family(_one_operator, (_DIGITS, "+-*", _DIGITS)),
    _Family(_one_operator, (_TWO_DIGITS, "+-*", _DIGITS)),
    _Family(_one_operator, (_TWO_DIGITS, "+-*", _TWO_DIGITS)),
    _Family(_one_operator, (_PROPER, "+-*", _PROPER)),
    _Family(_two_operators, (_DIGITS, "+-*", _DIGITS, "+-*", _DIGITS)),
    _Family(_two_operators, (_TWO_DIGITS, "+-", _TWO_DIGITS, "+-*", _DIGITS)),
)
_ALGEBRA = (
    _Family(_shifted, (range(1, 61), _SIGNED)),
    _Family(_scaled, (range(2, 13), range(-20, 21))),
    _Family(_linear, (range(2, 13), _SIGNED, range(-12, 13))),
    _Family(_unknown_on_both_sides, (range(2, 10), _DIGITS, range(1, 21), range(-9, 10))),
    _Family(_proportion, (_PROPER, range(2, 13), ("top", "bottom"))),
    _Family(_sum_and_difference, (range(1, 31), range(1, 31), "xy")),
    _Family(_system, (range(2, 6), range(2, 6), _DIGITS, _DIGITS, "xy")),
    _Family(_quadratic, (range(13), range(1, 21))),
)
_PRODUCTS = _Family(_one_operator, (_TWO_DIGITS, "*", _TWO_DIGITS))
_ADDITION = tuple(_Family(_one_operator, (_TWO_DIGITS, "+", second)) for second in (_DIGITS, _TWO_DIGITS))
# Small families first: what they lack is made up by larger ones.
_KINDS = {
    kind: sorted(families, key=lambda family: family.size)
    for kind, families in {
        "addition": _ADDITION,
        "arithmetic": _ARITHMETIC,
        "algebra": _ALGEBRA,
        "mixed": (*_ARITHMETIC, *_ALGEBRA),
        "uneven": (*_ADDITION, _PRODUCTS),
    }.items()
}
