"""Tokens of serialised rows: one for a column name, a connective, a class, a digit, a sign or a point."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dppo_kernels.trainers.tabular.schema import AND, IS, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNKNOWN = 0, 1


def vocabulary(schema: Schema) -> list[str]:
    """All tokens, longer ones first: where several fit, the longest counts.

    A column name has a token for the start of a text and one with the space that follows a comma: a prompt ends in the comma.
    """
    names = [f"{space}{column}" for column in schema.columns for space in ("", " ")]
    return sorted({*names, *schema.categories, IS, AND.rstrip(), *"0123456789.-"}, key=lambda token: (-len(token), token))


class TextEncoder:
    """Token ids and places in texts of one table; what is no token is unknown, character by character."""

    def __init__(self, schema: Schema) -> None:
        tokens = vocabulary(schema)
        self.size = len(tokens) + 2
        self._ids = {token: i for i, token in enumerate(tokens, start=2)}
        self._pattern = re.compile("|".join([*map(re.escape, tokens), "."]), re.DOTALL)

    def encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """(ids, spans int [T, 2]): token t is text[spans[t, 0]:spans[t, 1]]."""
        found = list(self._pattern.finditer(text))
        spans = np.array([match.span() for match in found], dtype=int).reshape(-1, 2)
        return [self._ids.get(match[0], UNKNOWN) for match in found], spans


def build_table_tokenizer(schema: Schema) -> "PreTrainedTokenizerFast":
    """The tokens of `vocabulary` for a language model, with ``<pad>``, ``<eos>`` and ``<unk>``."""
    from dppo_kernels.trainers.demo.task import build_tokenizer

    return build_tokenizer(vocabulary(schema))


def completion_budget(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", margin: int = 4) -> int:
    """How many tokens a completion may take: the longest of `texts`, its end token and `margin` more.

    Raises:
        ValueError: no texts, or a negative margin.
    """
    if not texts:
        raise ValueError("`texts` must hold at least one serialised row, got none")
    if margin < 0:
        raise ValueError(f"`margin` must be at least 0, got {margin}")
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return max(map(len, ids)) + 1 + margin
