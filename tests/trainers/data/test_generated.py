"""Generated problems: every answer is found again by other means than the generator's."""

import random
import re
from collections.abc import Callable
from fractions import Fraction

import pytest

pytest.importorskip("datasets", reason="the trl extra is not installed")

from datasets import Dataset

from dppo_kernels.trainers.data import CHARACTERS, generate_problems, generated, split_problems


def function(text: str) -> Callable[..., Fraction]:
    """An expression of x and y, in exact fractions; a number before an unknown multiplies it."""
    text = re.sub(r"(\d)([xy])", r"\1*\2", text).replace("^", "**")
    text = re.sub(r"(?<!\*\*)\b\d+", r"F(\g<0>)", text)
    return eval(f"lambda x=None, y=None: {text}", {"F": Fraction})


def residual(equation: str) -> Callable[..., Fraction]:
    left, right = equation.split("=")
    return function(f"({left}) - ({right})")


def system(first: str, second: str) -> dict[str, Fraction]:
    """Solution of two linear equations in x and y by Cramer's rule."""
    rows = []
    for equation in (first, second):
        f = residual(equation)
        constant = f(x=Fraction(0), y=Fraction(0))
        rows.append((f(x=Fraction(1), y=Fraction(0)) - constant, f(x=Fraction(0), y=Fraction(1)) - constant, -constant))
    (a, b, e), (c, d, f) = rows
    return {"x": (e * d - b * f) / (a * d - b * c), "y": (a * f - e * c) / (a * d - b * c)}


def solve(prompt: str) -> set[Fraction]:
    """All solutions; of equations in x alone, those among the integers below 120."""
    assert prompt.endswith("=")
    *conditions, asked = prompt.removesuffix("=").split(", ")
    if not conditions:
        return {function(asked)()}
    if "y" in prompt:
        return {system(*conditions)[asked]}
    equation, *positive = conditions
    assert (asked, positive) in (("x", []), ("x", ["x>0"]))
    f = residual(equation)
    candidates = (Fraction(x) for x in range(1 if positive else -120, 120) if x or "/x" not in equation)
    return {x for x in candidates if f(x=x) == 0}


@pytest.mark.parametrize(("kind", "size", "seed"), [("arithmetic", 3000, 0), ("arithmetic", 500, 5), ("algebra", 800, 1)])
def test_every_answer_is_the_only_right_one(kind: str, size: int, seed: int) -> None:
    for row in generate_problems(kind, size, seed):
        assert solve(row["prompt"]) == {Fraction(row["answer"])}, row
        assert str(Fraction(row["answer"])) == row["answer"]  # lowest terms, no sign before zero


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("27+35=", 62),
        ("2+3*4=", 14),
        ("9-2-3=", 4),
        ("1/2+1/3=", Fraction(5, 6)),
        ("3x+4=19, x=", 5),
        ("3/4=9/x, x=", 12),
        ("2x+3y=13, x-y=-1, y=", 3),
        ("x+y=12, x-y=4, x=", 8),
        ("x^2+3x=40, x>0, x=", 5),
        ("5x+6=2x, x=", -2),
    ],
)
def test_the_check_can_tell(prompt: str, answer: Fraction) -> None:
    assert solve(prompt) == {answer}


def capacity(kind: str) -> int:
    with pytest.raises(
        ValueError, match=rf"^`size` must be at most \d+, all there is of kind '{kind}'; got 100000000$"
    ) as error:
        generate_problems(kind, 10**8)
    return int(re.search(r"at most (\d+)", str(error.value))[1])


def test_all_problems_there_are_are_distinct_and_short() -> None:
    size = capacity("mixed")
    assert size == capacity("arithmetic") + capacity("algebra")
    with pytest.raises(ValueError, match=f"at most {size}"):
        generate_problems("mixed", size + 1)
    # Not through generate_problems: shuffling half a million takes most of its time.
    problems = [family.problem(index) for family in generated._KINDS["mixed"] for index in range(family.size)]
    prompts = {prompt for prompt, _ in problems}
    assert len(prompts) == len(problems) == size
    assert max(map(len, prompts)) <= 24
    assert set("".join(prompts)) | set("".join(answer for _, answer in problems)) <= set(CHARACTERS)


def test_a_kind_can_be_used_up() -> None:
    size = capacity("algebra")
    everything = generate_problems("algebra", size)
    assert len(set(everything["prompt"])) == size
    for row in everything.select(range(0, size, 200)):
        assert solve(row["prompt"]) == {Fraction(row["answer"])}, row


def test_difficulty_varies() -> None:
    def form(prompt: str) -> str:
        return re.sub(r"(?<![\^>])\d+", "n", prompt)

    arithmetic = generate_problems("arithmetic", 600)["prompt"]
    assert {"n+n=", "n*n=", "n-n=", "n/n+n/n=", "n/n*n/n=", "n+n*n=", "n-n+n=", "n*n*n="} <= set(map(form, arithmetic))
    assert {len(prompt) for prompt in arithmetic} >= {4, 5, 6, 8}
    algebra = generate_problems("algebra", 600)["prompt"]
    expected = {"x+n=n, x=", "nx=n, x=", "nx-n=n, x=", "nx+n=nx+n, x=", "n/n=x/n, x=", "x+y=n, x-y=n, y="}
    assert expected | {"nx+ny=n, x-y=n, x=", "x^2+nx=n, x>0, x="} <= set(map(form, algebra))
    mixed = [("x" in prompt) for prompt in generate_problems("mixed", 600)["prompt"]]
    assert 200 < sum(mixed) < 400
    assert 30 < sum(mixed[:100]) < 70  # shuffled


def test_the_same_arguments_give_the_same_problems() -> None:
    random.seed(0)
    state = random.getstate()
    first, second, other = (generate_problems("mixed", 300, seed) for seed in (7, 7, 8))
    assert first.column_names == ["prompt", "answer"]
    assert first.to_dict() == second.to_dict()
    assert first["prompt"][:] != other["prompt"][:]
    assert len(generate_problems()) == 2048
    assert [len(generate_problems("mixed", size)) for size in (1, 2, 13, 15)] == [1, 2, 13, 15]
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("geometry",),
            ValueError,
            r"`kind` must be one of 'addition', 'arithmetic', 'algebra', 'mixed', 'uneven'; got 'geometry'",
        ),
        (("mixed", 0), ValueError, r"`size` must be an int >= 1, got 0"),
        (("mixed", 10.0), TypeError, r"`size` must be an int, got float"),
        (("mixed", True), TypeError, r"`size` must be an int, got bool"),
        (("mixed", 10, -1), ValueError, r"`seed` must be an int >= 0, got -1"),
        (("mixed", 10, None), TypeError, r"`seed` must be an int, got NoneType"),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        generate_problems(*arguments)


def test_held_out_problems_are_disjoint_from_training() -> None:
    problems = generate_problems("mixed", 400, 3)
    training, held_out = split_problems(problems, 100)
    assert (len(training), len(held_out)) == (300, 100)
    assert set(training["prompt"]) | set(held_out["prompt"]) == set(problems["prompt"])
    order = {prompt: row for row, prompt in enumerate(problems["prompt"])}
    for part in (training, held_out):
        rows = [order[prompt] for prompt in part["prompt"]]
        assert rows == sorted(rows)
        assert [problems[row]["answer"] for row in rows] == part["answer"][:]
    assert split_problems(problems, 100)[1]["prompt"][:] == held_out["prompt"][:]
    assert split_problems(problems, 100, seed=1)[1]["prompt"][:] != held_out["prompt"][:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, r"`held_out` must be an int >= 1, got 0"),
        ((10,), ValueError, r"`held_out` must be less than the 10 rows of the dataset, got 10"),
        ((0.5,), TypeError, r"`held_out` must be an int, got float"),
        ((5, -1), ValueError, r"`seed` must be an int >= 0, got -1"),
    ],
)
def test_what_cannot_be_held_out_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        split_problems(generate_problems("mixed", 10), *arguments)


def test_only_a_dataset_is_split() -> None:
    with pytest.raises(TypeError, match=r"`dataset` must be a datasets.Dataset, got list"):
        split_problems(list(Dataset.from_dict({"prompt": ["1+1="]})), 1)
