"""Pairs on disk: shards that are there whole or not at all, and a manifest that says what they are of.

Beside ``pairs.parquet`` lie ``pairs.shards/`` (one JSON file for each batch of prompts, and the manifest) and
``pairs.statistics.json``. A run that was killed finds its shards and goes on; one that is complete makes the same file again.
"""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset

from dppo_kernels.trainers.pairs_scoring import reward_name
from dppo_kernels.trainers.pairs_selection import PairStatistics, PromptOutcome

_PLAIN = (str, int, float, bool, type(None))


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


def module_digest(model: Any) -> str:
    """Of a model's class, config and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def path_digest(model: str) -> str:
    """Of the files of a model's folder, by name, size and time of change; of a hub id, its name."""
    folder = Path(model)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    stats = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest_of([str(folder.resolve()) if folder.is_dir() else model, stats])


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what makes tokens from texts and texts from tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for setting in ("padding", "truncation"):  # left over from its last call
        rules.pop(setting, None)
    return digest_of([rules, tokenizer.special_tokens_map, tokenizer.chat_template])


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def rows_digest(prompts: Dataset) -> str:
    """Of all columns."""
    digest = hashlib.sha256()
    for row in prompts.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def describe_reward(function: Callable[..., Any]) -> list[Any]:
    """Name, source and public plain settings: as much of a reward function as can be seen from outside."""
    if isinstance(function, functools.partial):
        return [*describe_reward(function.func), _plain(enumerate(function.args)), _plain(function.keywords.items())]
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = digest_of(inspect.getsource(named))
    except (OSError, TypeError):  # built in, or typed at a prompt
        source = None
    settings = getattr(getattr(function, "__self__", function), "__dict__", {})  # of a method, those of its object
    return [reward_name(function), f"{named.__module__}.{named.__qualname__}", source, _plain(settings.items())]


def _plain(items: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    return {str(name): value for name, value in items if not str(name).startswith("_") and isinstance(value, _PLAIN)}


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
