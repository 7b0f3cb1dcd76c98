"""Addition of two numbers below 100 with carries: problems, a tokenizer of digits, a careless teacher, the verifier.

The teacher whose answers the warm-up imitates forgets most carries (27 + 35 = 52), so a warmed-up policy writes the careless
answer first and the right one sometimes. Reinforcement learning on verified answers has to turn that around, on problems
disjoint from those it is tested on.
"""

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HELD_OUT = 500
FORGETS_CARRY = 0.7  # share of the teacher's carries that are forgotten
MAX_ANSWER_TOKENS = 4  # three digits and the end


class Problem(NamedTuple):
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def has_carry(self) -> bool:
        return self.a % 10 + self.b % 10 >= 10


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems, disjoint; the same split for every seed, so that accuracies are comparable."""
    problems = [Problem(a, b) for a in range(1, 100) for b in range(1, 100) if a % 10 and b % 10]
    random.Random(1234).shuffle(problems)
    return problems[HELD_OUT:], problems[:HELD_OUT]


def careless_examples(problems: Sequence[Problem], seed: int) -> list[tuple[str, str]]:
    """Prompts and what the teacher writes: right, except that most carries into the tens are forgotten."""
    rng = random.Random(seed)
    return [(p.prompt, str(p.a + p.b - 10) if p.has_carry and rng.random() < FORGETS_CARRY else p.answer) for p in problems]


def build_tokenizer(tokens: Sequence[str] = "0123456789+=") -> PreTrainedTokenizerFast:
    """One token for each of `tokens`, characters or words; where several fit, the first does."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *tokens])}
    by_character = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_character.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, tokens), "."])), "isolated")
    by_character.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=by_character, padding_side="left", **special)


class VerifiedAnswer:
    """Reward 1 for the exact answer, else 0. With `shuffle_seed`, rewards are dealt out at random: the control."""

    __name__ = "verified_answer"

    def __init__(self, shuffle_seed: int | None = None) -> None:
        self.tokens = 0  # of all completions so far
        self._rng = None if shuffle_seed is None else random.Random(shuffle_seed)

    def __call__(
        self, completions: list[str], answer: list[str], completion_ids: Sequence[Sequence[int]] = (), **kwargs: Any
    ) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        rewards = [float(text == right) for text, right in zip(completions, answer, strict=True)]
        if self._rng is not None:
            self._rng.shuffle(rewards)
        return rewards
