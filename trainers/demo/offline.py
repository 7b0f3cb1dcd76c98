"""A small model made on this machine for generated problems, where no hub can be reached: `OFFLINE_MODEL` stands for it."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import set_seed

from dppo_kernels.trainers.data import CHARACTERS
from dppo_kernels.trainers.demo.task import build_tokenizer
from dppo_kernels.trainers.demo.warmup import build_model, warm_up

OFFLINE_MODEL = "offline"
WARMUP_STEPS = 600
FORGETS_TEN = 0.6  # share of the teacher's answers beyond 10 that are 10 short
EXPERT_WIDTH, EXPERT_STEPS = 128, 1000  # of a model that others are distilled from

_PREFIX = "Answer: "  # one token: the model has little to write


def careless_solutions(
    prompts: Sequence[str], answers: Sequence[str], seed: int, forgets: float = FORGETS_TEN
) -> list[tuple[str, str]]:
    """Prompts and what a careless teacher writes, in the line that a verifier reads: whole numbers are often 10 short.

    An imitator knows the right answer and mostly writes the wrong one, as a base model might: there is something to reinforce.
    """
    rng = random.Random(seed)
    return [(prompt, _PREFIX + _careless(answer, rng, forgets)) for prompt, answer in zip(prompts, answers, strict=True)]


def build_offline_model(
    folder: Path,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    seed: int = 0,
    steps: int = WARMUP_STEPS,
    expert: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Write a model and its tokenizer to `folder`: a Qwen3 of 200 thousand parameters that imitated the careless teacher.

    Args:
        folder: is made.
        prompts: what it learns from, of characters that its tokenizer knows.
        answers: the right ones.
        seed: of weights, teacher and order.
        steps: of supervised learning; `on_step` is called after each with its number and loss.
        expert: a wider model that imitates right answers, over the same tokens.

    Raises:
        ValueError: a prompt or answer holds a character without a token.
    """
    for text in (*prompts, *answers):
        unknown = set(text) - set(CHARACTERS)
        if unknown:
            raise ValueError(
                f"the offline model knows no {sorted(unknown)[0]!r}, which {text!r} holds: it is for generated sets"
            )
    set_seed(seed)
    tokenizer = build_tokenizer([_PREFIX, *CHARACTERS])
    model = build_model(tokenizer, seed, EXPERT_WIDTH) if expert else build_model(tokenizer, seed)
    solutions = careless_solutions(prompts, answers, seed, 0.0 if expert else FORGETS_TEN)
    warm_up(model, tokenizer, solutions, seed=seed, steps=steps, on_step=on_step)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _careless(answer: str, rng: random.Random, forgets: float) -> str:
    if not answer.isdigit() or int(answer) < 10 or rng.random() >= forgets:
        return answer
    return str(int(answer) - 10)
