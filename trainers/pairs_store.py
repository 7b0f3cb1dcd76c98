"""Pairs on disk: shards that are there whole or not at all, and a manifest that says what they are of.

Beside ``pairs.parquet`` lie ``pairs.shards/`` (one JSON file for each batch of prompts, and the manifest) and
``pairs.statistics.json``. A run that was killed finds its shards and goes on; one that is complete makes the same file again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from dppo_kernels.trainers.pairs_selection import PairStatistics, PromptOutcome


class ShardFolder:
    """The shards of one output file.

    Args:
        output_file: ends in .parquet.
        fingerprint: everything that determines the result, by name; values that JSON can hold.

    Raises:
        ValueError: the folder holds shards of another run, saying what differs; or the output is there without its folder.
    """

    def __init__(self, output_file: Path, fingerprint: Mapping[str, Any]) -> None:
        self.output_file = output_file
        self.folder = output_file.with_suffix(".shards")
        self.statistics_file = output_file.with_suffix(".statistics.json")
        self._fingerprint = json.dumps(fingerprint, indent=1)
        self._manifest = self.folder / "manifest.json"
        if self._manifest.exists():
            _check_same(self.folder, json.loads(self._manifest.read_text()), json.loads(self._fingerprint))
        elif output_file.exists():
            raise ValueError(
                f"`output_file` '{output_file}' exists, and '{self.folder}' does not say what it was made from: remove it or "
                "name another"
            )

    def read(self, index: int) -> list[PromptOutcome] | None:
        """A shard that an earlier run finished, or None."""
        try:
            text = self._shard(index).read_text()
        except FileNotFoundError:
            return None
        return [PromptOutcome.from_dict(outcome) for outcome in json.loads(text)]

    def write(self, index: int, outcomes: Sequence[PromptOutcome]) -> None:
        if not self._manifest.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._manifest, self._fingerprint.encode())
        _write(self._shard(index), json.dumps([asdict(outcome) for outcome in outcomes]).encode())

    def finish(self, pairs: Dataset, statistics: PairStatistics) -> None:
        """Write the dataset and its statistics; equal pairs give equal bytes."""
        # Through arrow rather than `to_parquet`: the schema says what the columns are and nothing about this process.
        table = pairs.with_format("arrow")[:].cast(pairs.features.arrow_schema)
        temporary = _temporary(self.output_file)
        pq.write_table(table, temporary)
        _write(self.statistics_file, json.dumps(statistics.as_dict(), indent=1).encode())
        os.replace(temporary, self.output_file)

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.json"


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"`output_file`: '{folder}' holds shards of another run: {'; '.join(differences)}. Remove the folder to start "
            "again, or name another file"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also where the machine stops."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
