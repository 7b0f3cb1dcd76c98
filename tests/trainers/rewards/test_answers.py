r"""Strings of answers: where they are found, how they are spelled, and that no input takes more than linear time."""

import random
import time

import pytest

from dppo_kernels.trainers.rewards.answers import (
    BOXED,
    differ,
    final_answer,
    gold_answer,
    has_words,
    is_formula,
    normalise,
    read,
    same,
)

LINES = [
    ("Answer: 34", "34"),
    ("so\nAnswer: $34$\n", "$34$"),
    ("ANSWER : 34", "34"),
    ("**Answer:** 34", "34"),
    ("**Answer**: 34", "34"),
    ("Answer: **34**", "34"),
    ("Answer: **34**.", "34"),
    ("**Final Answer: 34**", "34"),
    ("### Answer: `34`", "34"),
    (r"\textbf{Answer:} 34", "34"),
    ("Answer：34", "34"),
    ("Answer: 12\nAnswer: 13", "13"),
    ("Answer: 12\nAnswer: 13\nThis is what was asked.", "13"),
    ("Answer: 34\r\nbye", "34"),
    ("Answer: x^*", "x^*"),
    (r"Answer: $\boxed{34}$.", "34"),
    (r"Answer: \boxed{\frac{1}{2}} metres", r"\frac{1}{2}"),
    (r"Answer: \boxed{3} and \boxed{4}", "3, 4"),
    (r"\boxed{12} Answer: 34", "34"),
    ("Answer: \\boxed{\\begin{pmatrix}1\\\\\n2\\end{pmatrix}}", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}"),
]
NO_LINE = [
    "",
    "34",
    "The answer is 34",
    "answer 34",
    "Answer:",
    "Answer:\n34",
    "Answer: 12\nAnswer: \n",
    "Answer: **",
    "Answer: $$\n34\n$$",
]
BOXES = [
    (r"\boxed{34}", "34"),
    (r"$\boxed{ 34 }$", "34"),
    (r"\fbox{34}", "34"),
    (r"so \boxed{12}. Then it is clear that \boxed{34}", "34"),
    (r"\boxed{3}, \boxed{4}", "3, 4"),
    (r"\boxed{34} $\boxed{34}$", "34"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{34}}", "34"),
    (r"\boxed{34} and \boxed{35", "34"),
    (r"\boxed 7", "7"),
    (r"$\boxed 7$.", "7"),
    (r"\boxed 34. Done", "34"),
    ("Answer:\n\\boxed{34}", "34"),
    (r"\boxed{}", None),
    (r"\boxed", None),
    (r"\boxed{34", None),
    (r"\boxedtext{34}", None),
    ("}{" * 20, None),
]


@pytest.mark.parametrize(("text", "answer"), LINES)
def test_the_last_answer_line_counts(text: str, answer: str) -> None:
    assert final_answer(text, boxed="never") == final_answer(text) == answer


@pytest.mark.parametrize("text", NO_LINE)
def test_no_answer_line(text: str) -> None:
    assert final_answer(text, boxed="never") is None
    assert final_answer(text) is None
    assert final_answer(rf"\boxed{{5}} {text}") == "5"


@pytest.mark.parametrize(("text", "answer"), BOXES)
def test_a_box_counts_where_no_line_does(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer
    assert final_answer(text, boxed="never") is None


def test_strict_mode_takes_the_exact_last_box_of_the_last_hundred_characters() -> None:
    assert final_answer(r"Answer: 12 \boxed{1} \boxed{ 34 }", boxed="only") == " 34 "
    assert final_answer("Answer: 34", boxed="only") is None
    assert final_answer(r"\boxed{34}" + "." * 90, boxed="only") == "34"
    assert final_answer(r"\boxed{34}" + "." * 91, boxed="only", tail=300) is None


def test_only_the_tail_is_looked_at() -> None:
    assert final_answer("Answer: 34\n" + "." * 289) == "34"
    assert final_answer("Answer: 34\n" + "." * 290) is None
    assert final_answer("Answer: 34\n" + "." * 290, tail=301) == "34"


GSM8K = "Half of 48 is 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (GSM8K, "72"),
        ("We add.\n  ####  1,234 \n", "1,234"),
        ("#### 1\n#### 2", "2"),
        (r"Thus $x = \boxed{\frac{1}{2}}$, which \emph{was} asked.", r"\frac{1}{2}"),
        (r"\boxed{3} is wrong, so it is \boxed{4}.", "4"),
        (r"\boxed{34}", "34"),
        (" 34 ", "34"),
        ("x #### y", "x #### y"),  # not at the start of a line
        ("34\n####", "34\n####"),
        (r"\boxed{}", r"\boxed{}"),
    ],
)
def test_golds_that_are_worked_solutions(gold: str, answer: str) -> None:
    assert gold_answer(gold) == answer
    assert gold_answer(answer) == answer


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`boxed` must be one of"):
        final_answer("", boxed="sometimes")
    with pytest.raises(ValueError, match="`tail` must be at least 1, got 0"):
        final_answer("", tail=0)


SPELLINGS = [
    (
        "34",
        [
            "$34$",
            " 34. ",
            r"\$34",
            r"\(34\)",
            r"\[34\]",
            "x = 34",
            r"\boxed{34}",
            r"\text{34}",
            "+34",
            "34,",
            r"\approx 34",
            "€34",
        ],
    ),
    (
        "34",
        [
            "34 cm",
            r"34\text{ cm}",
            r"34\,\mathrm{m}",
            "34 m",
            r"34\text{ cm}^2",
            "34 square units",
            "34 miles per hour",
            "34 apples",
        ],
    ),
    (
        "34",
        [
            "34^\\circ",
            "34°",
            r"34^{\circ}",
            r"34^\circ\text{C}",
            "34 degrees",
            "34th",
            r"34^{\text{th}}",
            "2 · 17 = 34",
            "P(X=2)=34",
        ],
    ),
    ("1000", ["1,000", "1{,}000", r"1,\!000", r"1\,000", "1 000", "$1,000", r"\$1,000", "x=1,000"]),
    ("1234567.5", ["1,234,567.5", "1 234 567.5"]),
    ("(1000, 2)", ["(1,000, 2)", "(1000,2)", r"\left(1000, 2\right)", r"\big(1000,2\big)"]),
    ("3, 456", ["3, 456", "3 , 456"]),
    ("(1, 234)", ["(1,234)"]),
    ("1, 000, 2, 000", ["1,000,2,000"]),
    (r"\frac{1}{2}", [r"\frac12", r"\frac{1}2", r"\frac1{2}", r"\dfrac{1}{2}", r"\tfrac 1 2", "1/2", "1 / 2", "½"]),
    (r"-\frac{1}{2}", ["-1/2", "−1/2", r"-\frac12"]),
    (r"1\frac{1}{2}", ["1 1/2", r"1 \frac{1}{2}", "1½"]),
    (r"\frac{11}{2}", ["11/2"]),
    (r"\frac{1}{3}", [r"0.\overline{3}", r"0.\bar{3}", r".\overline{3}"]),
    (r"\frac{7}{6}", [r"1.1\overline{6}"]),
    (r"\sqrt{3}", [r"\sqrt3", "sqrt(3)", r"\sqrt(3)", "√3", r"\sqrt 3"]),
    (r"\sqrt{12}", ["√12", "sqrt(12)"]),
    (r"\frac{\pi}{2}", [r"\frac\pi2", r"\frac{π}{2}"]),
    ("0.5", [".5", "0.5."]),
    (r"1.5\times10^{3}", ["1.5e3", "1.5E+03"]),
    (r"50\%", ["50%", r"50\%", "50 %", "50 percent", r"50\text{ percent}"]),
    ("B", ["(B)", "B.", r"\text{(B)}", r"\textbf{(B)}", "[B]", "**B**".strip("*")]),
    ("Monday", [r"\text{Monday}", "Monday.", "'Monday'"]),
    ("x=3, y=4", ["x=3, y=4", "x = 3, y = 4"]),
    (r"x\le 34", [r"x \le 34", "x ≤ 34"]),
    ("x!=34", ["x != 34"]),
    ("7 million", ["7 million"]),
    ("3t", ["3t"]),
    (r"2\mathbf{v}".replace(r"\mathbf{v}", "v"), [r"2\mathbf{v}"]),
    ("", ["", ".", "$$", r"\text{}"]),
]


@pytest.mark.parametrize(("normal", "answer"), [(normal, answer) for normal, answers in SPELLINGS for answer in answers])
def test_spellings(normal: str, answer: str) -> None:
    assert normalise(answer) == normal
    assert normalise(normal) == normal


def test_parts_of_an_answer() -> None:
    assert read(r"\text{The area is } A = 5\text{ cm}^2") == ("", "5", "cm^2")
    assert read("f(x) = y = x^2") == ("f(x)", "x^2", "")
    assert read("2:30 p.m.") == read("2:30 PM") == ("", "2:30", "pm")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("34", "034"),
        ("34", "34.00"),
        ("50", "50%"),
        ("12.5%", "12.5"),
        ("x = 5", "5"),
        ("Yes", "yes"),
        ("a square", "square"),
        ("5 cm", "5"),
    ],
)
def test_equal_strings(gold: str, answer: str) -> None:
    assert same(read(gold), read(answer))
    assert same(read(answer), read(gold))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("0.5", "0.5%"),
        ("x = 5", "y = 5"),
        ("", ""),
        (".", "."),
        ("5 hours", "5 minutes"),
        ("listen", "silent"),
        ("3, 456", "3456"),
    ],
)
def test_unequal_strings(gold: str, answer: str) -> None:
    assert not same(read(gold), read(answer))
    assert not same(read(answer), read(gold))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("34", "35"),
        ("5 cm", "5 m"),
        ("1011_2", "1011_3"),
        (r"\{1,2\}", "(1,2)"),
        ("2", "2, 2"),
        ("34", "34 or 35"),
        ("34", "34; 35"),
    ],
)
def test_what_algebra_would_not_see(gold: str, answer: str) -> None:
    assert differ(read(gold), read(answer))


@pytest.mark.parametrize(
    "value", ["34", "x+1", r"\log_2 8", "1 or 2", "xyz", "abc", "2mgh", r"\sin x", r"\begin{pmatrix}1&2\end{pmatrix}"]
)
def test_formulas(value: str) -> None:
    assert is_formula(value)


@pytest.mark.parametrize("value", ["", "not 0", "3 4", "3{4}", "34}", "}{", "{34", "34 is wrong", "ACB", "infinitely many"])
def test_no_formulas(value: str) -> None:
    assert not is_formula(value)


def test_words() -> None:
    assert has_words("Monday")
    assert has_words(r"x \text{ for all } y")
    assert not has_words(r"\operatorname{R} \mathbb{Q} \begin{bmatrix} 1 \end{bmatrix} \text")


# Each repeats what some pattern begins with and never finishes.
PIECES = [
    *(
        "1",
        " ",
        "{",
        "}",
        "\\",
        "(",
        "=",
        "%",
        "1a",
        "1,",
        "1,000,",
        "1 000 ",
        "*",
        "Answer: ",
        "answer ",
        "\\boxed{",
        "\\boxed ",
        "\\boxed",
    ),
    *(
        "\\text{",
        "\\text{a}",
        "\\frac",
        "\\frac{",
        "sqrt(",
        "\\{",
        "\\begin{",
        "not ",
        ", ",
        "\\overline{1}",
        "\x00",
        "😀",
        "\ud800",
        "\n",
        "\n####",
        "\n \t",
    ),
]


def hostile(piece: str, length: int) -> str:
    return "1" + piece * (length // len(piece)) + "x"


def take(text: str) -> None:
    for boxed in BOXED:
        final_answer(text, boxed=boxed, tail=len(text))
    gold_answer(text)
    reading = read(text)
    is_formula(reading.value)
    same(reading, reading)
    differ(reading, read("34"))


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_strings_take_linear_time(piece: str) -> None:
    start = time.perf_counter()
    take(hostile(piece, 50_000))
    assert time.perf_counter() - start < 5  # seconds; 0.1 if linear, a minute if quadratic


@pytest.mark.parametrize("piece", ["1", "\\boxed{"])
def test_a_million_characters(piece: str) -> None:
    start = time.perf_counter()
    take(hostile(piece, 1_000_000))
    assert time.perf_counter() - start < 30


def test_any_mixture_of_pieces_is_taken() -> None:
    rng = random.Random(0)
    for _ in range(400):
        take(
            "".join(
                rng.choice([*PIECES, "34", "x", "^", "_", "-", "/", "\\sqrt", "cm", "$", "[", "]"])
                for _ in range(rng.randrange(1, 25))
            )
        )
