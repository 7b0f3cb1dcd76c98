"""Everything that determines a set of pairs, as far as it can be seen: a stopped run goes on only where it is the same."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from dppo_kernels.trainers.pairs_config import PairsConfig
from dppo_kernels.trainers.pairs_generation import Sampling
from dppo_kernels.trainers.pairs_scoring import RewardSum, reward_name
from dppo_kernels.trainers.pairs_text import TokenizedPrompt

# They say where results go and what room they are made in; the rest determines them.
_NOT_FINGERPRINTED = ("output_file", "vllm_gpu_memory_utilization")
_PLAIN = (str, int, float, bool, type(None))


def fingerprint_of(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    tokenized: Sequence[TokenizedPrompt],
    rewards: RewardSum,
    config: PairsConfig,
    sampling: Sampling,
    revision: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """By name, in values that JSON can hold."""
    packages = ("torch", "transformers", *(("vllm",) if config.use_vllm else ()))
    return {
        "model": path_digest(str(model), revision or "main") if config.use_vllm else module_digest(model),
        "dtype": (dtype or "auto") if config.use_vllm else None,  # a loaded model's weights have theirs
        "device": None if config.use_vllm else model.device.type,
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": digest_of([rows_digest(data), tokenized]),
        "rewards": [describe_reward(function) for function in rewards.functions],
        "versions": {package: _version(package) for package in packages},
        "eos_ids": sampling.eos_ids,
        **{name: value for name, value in vars(config).items() if name not in _NOT_FINGERPRINTED},
        "max_completion_length": sampling.max_tokens,
    }


def module_digest(model: Any) -> str:
    """Of a model's class, config and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def path_digest(model: str, revision: str) -> str:
    """Of the files of a model's folder, by name, size and time of change; of a hub id, with its revision and commit."""
    folder = Path(model)
    if not folder.is_dir():
        return digest_of([model, revision, _commit(model, revision)])
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest_of([str(folder.resolve()), stats])


def _commit(model: str, revision: str) -> str | None:
    """What a branch of a hub's repository is at; None where it cannot be found out."""
    try:
        config = cached_file(model, CONFIG_NAME, revision=revision)
    except OSError:
        return None
    return None if config is None else Path(config).parent.name  # the hub's cache has a folder for each commit


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
