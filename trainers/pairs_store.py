"""Pairs on disk: shards that are there whole or not at all, and a manifest that says what they are of.

Beside ``pairs.parquet`` lie ``pairs.shards/`` (one JSON file for each batch of prompts, and the manifest) and
``pairs.statistics.json``. A run that was killed finds its shards and goes on; one that is complete makes the same file again.
A run locks the manifest while it lasts.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
from datasets import Dataset

from dppo_kernels.trainers.pairs_selection import PairStatistics, PromptOutcome

_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def opened_shards(output_file: Path, fingerprint: Mapping[str, Any]) -> Iterator["ShardFolder"]:
    """The shards of an output file, for one run at a time.

    Args:
        output_file: ends in .parquet.
        fingerprint: everything that determines the result, by name; values that JSON can hold.

    Raises:
        ValueError: another run has them open; they are of a run with another fingerprint, saying what differs; or shards or the
            output are there without a manifest.
    """
    store = ShardFolder(output_file)
    if output_file.exists() and not store.manifest.exists():
        raise _unknown(output_file, store.folder)
    store.folder.mkdir(parents=True, exist_ok=True)
    with store.manifest.open("a+b") as manifest:
        _lock(manifest, output_file)
        try:
            store.claim(manifest, fingerprint)
            yield store
        finally:
            with contextlib.suppress(OSError):  # where there are no locks
                fcntl.flock(manifest, fcntl.LOCK_UN)  # closing would leave it locked where child processes have it open


class ShardFolder:
    """The shards of one output file, see `opened_shards`."""

    def __init__(self, output_file: Path) -> None:
        self.output_file = output_file
        self.folder = output_file.with_suffix(".shards")
        self.manifest = self.folder / "manifest.json"
        self.statistics_file = output_file.with_suffix(".statistics.json")

    def claim(self, manifest: BinaryIO, fingerprint: Mapping[str, Any]) -> None:
        """Make sure that the manifest, which is locked, is this run's."""
        text = json.dumps(fingerprint, indent=1).encode()
        if not (self.output_file.exists() or any(self.folder.glob("shard-*.json"))):
            manifest.truncate(0)  # of a run that made nothing
            manifest.write(text)
            manifest.flush()
            os.fsync(manifest.fileno())
        else:
            manifest.seek(0)
            before = manifest.read()
            if not before:
                raise _unknown(self.folder, self.folder)
            _check_same(self.folder, json.loads(before), json.loads(text))
        for left in self.folder.glob("*.tmp"):  # by a run that was killed
            left.unlink()

    def read(self, index: int) -> list[PromptOutcome] | None:
        """A shard that an earlier run finished, or None."""
        try:
            text = self._shard(index).read_text()
        except FileNotFoundError:
            return None
        return [PromptOutcome.from_dict(outcome) for outcome in json.loads(text)]

    def write(self, index: int, outcomes: Sequence[PromptOutcome]) -> None:
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


def _lock(manifest: BinaryIO, output_file: Path) -> None:
    try:
        fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"`output_file` '{output_file}' is being made by another run, which has '{manifest.name}' locked"
        ) from None
    except OSError as reason:  # some network file systems
        _LOGGER.warning(
            "%s cannot be locked (%s): make sure that no other run writes to %s", manifest.name, reason, output_file
        )


def _unknown(path: Path, folder: Path) -> ValueError:
    return ValueError(
        f"`output_file`: '{path}' exists, and '{folder}' does not say what it was made from: remove it or name another file"
    )


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
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also where the machine stops."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
