"""TRL's table of completions, filled with groups that were generated in several rounds, or for an earlier batch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

TableRows = dict[str, Any]  # TRL's columns: a list of cells each; "rewards" and "extra" are dicts of such columns


def cut_rows(table: Mapping[str, Any], first: int, count: int) -> TableRows:
    """Some rows of a round's table, of which columns may be empty."""

    def cut(cells: Any) -> Any:
        if isinstance(cells, dict):
            return {name: cut(column) for name, column in cells.items()}
        return cells[first : first + count]

    return cut(dict(table))


def dump_rows(rows: TableRows) -> str:
    """As JSON, which a checkpoint can hold whatever reward functions report: numbers stay numbers, other objects are texts."""
    return json.dumps(rows, default=lambda cell: cell.tolist() if hasattr(cell, "tolist") else str(cell))


def load_rows(dumped: str) -> TableRows:
    rows: TableRows = json.loads(dumped)
    return rows


def fill_table(table: Mapping[str, Any], groups: Sequence[TableRows]) -> None:
    """Put the rows of `groups` in the place of what TRL's table holds; a cell that a round did not report is None."""
    for name, cells in table.items():
        cells.clear()
        if not isinstance(cells, dict):
            for group in groups:
                cells.extend(group[name])
            continue
        for column in dict.fromkeys(column for group in groups for column in group[name]):
            for group in groups:
                cells[column].extend(group[name].get(column) or [None] * len(group["prompt"]))
