"""Rows as text, ``column is value, column is value`` (GReaT, arXiv 2210.06280), and exactly what a text says.

A prompt is the target's clause, so that no value of a real row stands in it; the completion is the other clauses, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dppo_kernels.trainers.tabular.schema import AND, IS, Schema

FAULTS = (
    *("unknown_column", "duplicate_column", "missing_column", "bad_number", "unknown_category"),
    *("no_clause", "trailing_junk"),
)


@dataclass(frozen=True)
class Clause:
    """One readable ``column is value`` of a text. Offsets are in characters; the value is text[value_start:stop]."""

    column: str
    value: float | str
    start: int
    value_start: int
    stop: int


@dataclass(frozen=True)
class Fault:
    kind: str  # one of FAULTS
    where: str  # the column or the piece of text


@dataclass(frozen=True)
class Parsed:
    """What a text says. A column that comes twice has its first value here, and a fault."""

    clauses: tuple[Clause, ...]
    faults: tuple[Fault, ...]

    @property
    def values(self) -> dict[str, float | str]:
        return {clause.column: clause.value for clause in reversed(self.clauses)}

    @property
    def valid(self) -> bool:
        return not self.faults


def serialise(schema: Schema, row: Mapping[str, Any], rng: np.random.Generator, *, target_first: bool = True) -> str:
    """A row as text, its columns in an order drawn from `rng`; the target's clause comes first unless told otherwise."""
    columns = schema.features if target_first else schema.columns
    shuffled = [columns[i] for i in rng.permutation(len(columns))]
    order = [schema.target, *shuffled] if target_first else shuffled
    return AND.join(f"{column}{IS}{schema.write(column, row[column])}" for column in order)


def serialise_rows(schema: Schema, frame: pd.DataFrame, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(prompt, completion) of every row, for supervised training; they concatenate to the row's text."""
    pairs = []
    for row in frame.to_dict("records"):
        prompt = prompt_for(schema, row[schema.target])
        pairs.append((prompt, serialise(schema, row, rng).removeprefix(prompt)))
    return pairs


def prompt_for(schema: Schema, category: str) -> str:
    """The start of a row of this class, such as ``diagnosis is benign,``; completions begin with a space.

    Raises:
        ValueError: a class that the table lacks.
    """
    if category not in schema.categories:
        raise ValueError(f"`category` must be one of {list(schema.categories)}, got {category!r}")
    return f"{schema.target}{IS}{category}{AND.rstrip()}"


def draw_prompts(schema: Schema, train: pd.DataFrame, count: int, rng: np.random.Generator) -> list[str]:
    """Prompts whose classes are drawn from the rows of `train`."""
    return [prompt_for(schema, category) for category in rng.choice(train[schema.target].to_numpy(), count)]


def parse(schema: Schema, text: str) -> Parsed:
    """Everything that `text` says and everything that is wrong with it; it never raises.

    A number counts only as its column writes it, so that a value has one spelling.
    """
    clauses: list[Clause] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    start = 0
    pieces = text.split(AND)
    for i, piece in enumerate(pieces):
        column, found, written = piece.partition(IS)
        if not found:
            faults.append(Fault("no_clause", piece))
        elif column not in schema.columns:
            faults.append(Fault("unknown_column", column))
        else:
            value = schema.read(column, written)
            if value is None and i == len(pieces) - 1 and (kept := _readable_start(schema, column, written)):
                faults.append(Fault("trailing_junk", written.removeprefix(kept)))
                written, value = kept, schema.read(column, kept)
            if value is None:
                faults.append(Fault("unknown_category" if column == schema.target else "bad_number", column))
            else:
                value_start = start + len(column) + len(IS)
                clauses.append(Clause(column, value, start, value_start, value_start + len(written)))
            if column in seen:
                faults.append(Fault("duplicate_column", column))
            seen.add(column)
        start += len(piece) + len(AND)
    faults += [Fault("missing_column", column) for column in schema.columns if column not in seen]
    return Parsed(tuple(clauses), tuple(faults))


def _readable_start(schema: Schema, column: str, written: str) -> str | None:
    """The longest start of `written` that is a value and that the rest does not continue, as ``.5`` continues ``1``."""
    for stop in range(min(len(written), 100) - 1, 0, -1):
        rest = written[stop:].removeprefix(".")
        if not (rest[:1].isalnum() and written[stop - 1].isalnum()) and schema.read(column, written[:stop]) is not None:
            return written[:stop]
    return None


def validity(schema: Schema, text: str) -> bool:
    """Whether `text` is a whole row: every column once, every value readable, nothing else."""
    return parse(schema, text).valid


def to_frame(schema: Schema, texts: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """(rows of the valid texts, which texts are valid as a bool array [N]); columns as in `schema.columns`."""
    parsed = [parse(schema, text) for text in texts]
    valid = np.array([one.valid for one in parsed], dtype=bool)
    frame = pd.DataFrame([one.values for one in parsed if one.valid], columns=list(schema.columns))
    return frame.astype({**dict.fromkeys(schema.features, float), schema.target: str}), valid
