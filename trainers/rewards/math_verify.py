"""The rule reward of math problems: a completion's final answer against the gold answer of its row."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dppo_kernels.trainers.rewards.answers import (
    BOXED,
    Reading,
    differ,
    final_answer,
    gold_answer,
    has_words,
    is_formula,
    read,
    same,
)
from dppo_kernels.trainers.rewards.verifier import Verdict, Verifier, require_math_verify

# What TRL passes to reward functions beside the columns of the dataset.
_NO_COLUMNS = ("prompts", "completion_ids", "trainer_state", "environments")


class MathAnswerReward:
    r"""Reward function for TRL: `correct` where the final answer equals the gold answer, else `wrong`.

    Equal strings, after normalisation, are equal; other answers are compared by math-verify in separate processes. Of a gold
    that is a worked solution, its last `####` line or `\boxed{}` counts. A row whose gold answer cannot be read has no reward
    (None), which TRL skips. Everything else that is not shown to be equal is wrong: no answer, one too long, one that cannot
    be read or whose comparison takes too long.

    `log_extra` gets the columns "acc" (1.0, 0.0 or None) and "extracted_answer", `log_metric` the shares "answers/correct",
    "answers/missing", "answers/too_long", "answers/unparseable", "answers/timeout" and "answers/gold_unparseable" of the
    completions.

    Args:
        correct, wrong: the rewards; (1, 0) is accuracy.
        boxed: "never" reads `Answer:` lines only; "fallback" takes a `\boxed{}` where there is none; "only" compares the exact
            content of the last `\boxed{}` in the last 100 characters with the exact gold string, without math-verify.
        column: the dataset's column of gold answers.
        tail: how many of a completion's last characters are looked at.
        time_limit: seconds for one comparison.
        max_answer_chars: longer answers are wrong.
        processes: how many compare at a time.

    Raises:
        ImportError: math-verify is missing, and `boxed` is not "only".
        ValueError: an argument outside what is said above.
    """

    __name__ = "math_answer"

    def __init__(
        self,
        *,
        correct: float = 1.0,
        wrong: float = -1.0,
        boxed: str = "fallback",
        column: str = "answer",
        tail: int = 300,
        time_limit: float = 5.0,
        max_answer_chars: int = 1000,
        processes: int = 2,
    ) -> None:
        if not (math.isfinite(correct) and math.isfinite(wrong) and wrong < correct):
            raise ValueError(f"`correct` must be above `wrong`, both finite, got {correct} and {wrong}")
        if boxed not in BOXED:
            raise ValueError(f"`boxed` must be one of {BOXED}, got {boxed!r}")
        for name, value in (("tail", tail), ("max_answer_chars", max_answer_chars)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if boxed != "only":
            require_math_verify()
        self.correct = correct
        self.wrong = wrong
        self.boxed = boxed
        self.column = column
        self.tail = tail
        self.max_answer_chars = max_answer_chars
        self._verifier = Verifier(processes, time_limit)

    def __call__(
        self,
        completions: Sequence[Any],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        golds = self._golds(len(completions), columns)
        answers = [final_answer(_text(c), boxed=self.boxed, tail=self.tail) for c in completions]
        too_long = [answer is not None and len(answer) > self.max_answer_chars for answer in answers]
        verdicts = self._verdicts(golds, [None if long else a for a, long in zip(answers, too_long, strict=True)])
        accuracies = [None if v == Verdict.GOLD_UNPARSEABLE else float(v == Verdict.EQUAL) for v in verdicts]
        if log_extra is not None:
            log_extra("acc", list(accuracies))
            log_extra("extracted_answer", list(answers))
        if log_metric is not None and answers:
            shares = {
                "correct": verdicts.count(Verdict.EQUAL),
                "missing": answers.count(None),
                "too_long": sum(too_long),
                "unparseable": verdicts.count(Verdict.UNPARSEABLE),
                "timeout": verdicts.count(Verdict.TIMEOUT) + verdicts.count(Verdict.ERROR),
                "gold_unparseable": verdicts.count(Verdict.GOLD_UNPARSEABLE),
            }
            for name, count in shares.items():
                log_metric(f"answers/{name}", count / len(answers))
        return [None if accuracy is None else self.correct if accuracy else self.wrong for accuracy in accuracies]

    def _golds(self, count: int, columns: dict[str, Any]) -> list[str | None]:
        if self.column not in columns:
            there = sorted(name for name in columns if name not in _NO_COLUMNS)
            raise ValueError(f"`column` is {self.column!r}, which the dataset lacks: it has {there}")
        golds = columns[self.column]
        if len(golds) != count:
            raise ValueError(f"column {self.column!r} has {len(golds)} gold answers for {count} completions")
        for gold in golds:
            if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
                raise TypeError(f"column {self.column!r} must hold strings or numbers, got {gold!r}")
        return [None if gold is None else str(gold) for gold in golds]

    def _verdicts(self, golds: Sequence[str | None], answers: Sequence[str | None]) -> list[Verdict | None]:
        """None where there is no answer to judge."""
        verdicts: list[Verdict | None] = []
        pairs = {}
        for i, (gold, answer) in enumerate(zip(golds, answers, strict=True)):
            settled: Verdict | tuple[str, str] | None = None
            if gold is None:
                settled = Verdict.GOLD_UNPARSEABLE
            elif answer is not None:
                settled = _exact(gold, answer) if self.boxed == "only" else self._settle(gold_answer(gold), answer)
            if isinstance(settled, tuple):
                pairs[i], settled = settled, None
            verdicts.append(settled)
        for i, verdict in zip(pairs, self._verifier.verify(list(pairs.values())), strict=True):
            verdicts[i] = verdict
        return verdicts

    def _settle(self, gold: str, answer: str) -> Verdict | tuple[str, str]:
        reading = read(gold)
        # A text of several lines, or of more characters than an answer may have, would make every answer wrong.
        if len(gold) > self.max_answer_chars or ("\n" in gold and has_words(reading.value)):
            return Verdict.GOLD_UNPARSEABLE
        return settle(reading, read(answer))


def settle(gold: Reading, answer: Reading) -> Verdict | tuple[str, str]:
    """The verdict where the strings alone give it, else the formulas to be compared."""
    if same(gold, answer):
        return Verdict.EQUAL
    if has_words(gold.value):
        return Verdict.DIFFERENT
    named = gold.name and answer.name and gold.name != answer.name
    formulas = (gold.equation, answer.equation) if named else (gold.value, answer.value)
    if not is_formula(formulas[0]):
        return Verdict.GOLD_UNPARSEABLE
    if not is_formula(formulas[1]):
        return Verdict.UNPARSEABLE
    return Verdict.DIFFERENT if differ(gold, answer) else formulas


def _exact(gold: str, answer: str) -> Verdict:
    return Verdict.EQUAL if gold == answer else Verdict.DIFFERENT


def _text(completion: Any) -> str:
    """The text of a completion: a string, or the content of the last message of a chat."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
