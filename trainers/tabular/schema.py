"""What a row of a table is made of: its columns, how their values are written, its special codes and feature groups."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

IS = " is "
AND = ", "

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?", re.ASCII)
_LONGEST = 40  # characters of a number; a policy in training writes anything


@dataclass(frozen=True)
class Number:
    """How a column writes its numbers: with at most `decimals`, and at most `digits` significant ones unless that is None."""

    decimals: int
    digits: int | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Number":
        """What it takes to write `values` exactly."""
        parts = [Decimal(repr(float(value))).normalize().as_tuple() for value in set(values)]
        decimals = max(0, max(-int(part.exponent) for part in parts))
        return cls(decimals, max(len(part.digits) for part in parts) if decimals else None)

    def round(self, value: float) -> float:
        if self.digits is not None:
            value = float(f"{value:.{self.digits}g}")
        return round(float(value), self.decimals) + 0.0  # no negative zero

    def write(self, value: float) -> str:
        # The shortest that is this number, not the digits that its binary fraction goes on with.
        written = f"{Decimal(repr(self.round(value))):f}"
        return written.rstrip("0").rstrip(".") if "." in written else written

    def read(self, text: str) -> float | None:
        """The number, or None where `text` is not how this column writes one: every number has one spelling."""
        if len(text) > _LONGEST or not _NUMBER.fullmatch(text) or self.write(float(text)) != text:
            return None
        return float(text)


@dataclass(frozen=True)
class Schema:
    """The columns of a table, without its rows.

    Args:
        target: the column of classes.
        categories: its values, sorted.
        numbers: the numeric columns, in the table's order, and how each is written.
        groups: feature groups by name, each at least one numeric column.
        special_values: numbers that stand for a reason why there is none, and the reason.

    Raises:
        ValueError: names that the text could not tell apart, fewer than two categories, or groups of unknown columns.
    """

    target: str
    categories: tuple[str, ...]
    numbers: Mapping[str, Number]
    groups: Mapping[str, tuple[str, ...]]
    special_values: Mapping[float, str]

    def __post_init__(self) -> None:
        if not self.numbers:
            raise ValueError("`numbers` must hold at least one column, got none")
        if self.target in self.numbers:
            raise ValueError(f"`target` must not be one of the numeric columns, got {self.target!r}")
        if len(self.categories) < 2:
            raise ValueError(f"`target` column {self.target!r} must have at least two classes, got {list(self.categories)}")
        for name in (*self.columns, *self.categories):
            if not name or name != name.strip() or IS in f"{name} " or "," in name or "\n" in name:
                raise ValueError(f"names of columns and classes must hold no comma, line break or {IS!r}, got {name!r}")
        if not self.groups:
            raise ValueError("`groups` must hold at least one group, got none")
        for group, columns in self.groups.items():
            unknown = [column for column in columns if column not in self.numbers]
            if unknown or not columns or len(set(columns)) != len(columns):
                raise ValueError(f"`groups`[{group!r}] must list distinct numeric columns, got {list(columns)}")

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.numbers)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, the target first."""
        return (self.target, *self.numbers)

    def write(self, column: str, value: Any) -> str:
        return str(value) if column == self.target else self.numbers[column].write(value)

    def read(self, column: str, text: str) -> float | str | None:
        """The value that `text` spells, or None where it spells none of this column."""
        if column == self.target:
            return text if text in self.categories else None
        return self.numbers[column].read(text)

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` takes it back."""
        return {
            "target": self.target,
            "categories": list(self.categories),
            "numbers": {column: [number.decimals, number.digits] for column, number in self.numbers.items()},
            "groups": {group: list(columns) for group, columns in self.groups.items()},
            "special_values": [[code, reason] for code, reason in self.special_values.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schema":
        return cls(
            target=values["target"],
            categories=tuple(values["categories"]),
            numbers={column: Number(*number) for column, number in values["numbers"].items()},
            groups={group: tuple(columns) for group, columns in values["groups"].items()},
            special_values={float(code): reason for code, reason in values["special_values"]},
        )
