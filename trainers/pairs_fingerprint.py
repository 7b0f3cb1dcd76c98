"""Everything that determines a set of pairs, as far as it can be seen: a stopped run goes on only where it is the same."""

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from dppo_kernels import __version__
from dppo_kernels.trainers.pairs_config import PairsConfig
from dppo_kernels.trainers.pairs_generation import Sampling
from dppo_kernels.trainers.pairs_scoring import RewardSum, reward_name
from dppo_kernels.trainers.pairs_text import TokenizedPrompt

# They say where results go and what room they are made in; the rest determines them.
_NOT_FINGERPRINTED = ("output_file", "vllm_gpu_memory_utilization")
_PLAIN = (str, int, float, bool, type(None))
_LONGEST_SETTING = 200  # in characters of JSON; longer ones are digested
# Of an adapter: where it comes from, and whether it is to be trained.
_NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


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
    packages = ["torch", "transformers"]
    packages += ["vllm"] * config.use_vllm + ["peft"] * hasattr(model, "peft_config")
    return {
        "model": path_digest(str(model), revision or "main") if config.use_vllm else module_digest(model),
        "dtype": (dtype or "auto") if config.use_vllm else None,  # a loaded model's weights have theirs
        "device": None if config.use_vllm else model.device.type,
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": digest_of([rows_digest(data), tokenized]),
        "rewards": [describe_reward(function) for function in rewards.functions],
        "versions": {"dppo-kernels": __version__, **{package: _version(package) for package in packages}},
        "eos_ids": sampling.eos_ids,
        **{name: value for name, value in vars(config).items() if name not in _NOT_FINGERPRINTED},
        "max_completion_length": sampling.max_tokens,
    }


def module_digest(model: Any) -> str:
    """Of a model's class, config and weights, of its adapters, and of what decides how its results are rounded."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    parts = (model.config, model.config.get_text_config())
    kernels = [[getattr(part, name, None) for name in ("_attn_implementation", "_experts_implementation")] for part in parts]
    digest.update(digest_of([kernels, _adapters(model)]).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapters(model: Any) -> list[Any]:
    """PEFT's configs, and for each layer which of its adapters act and how much."""
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    known = {name: {k: v for k, v in config.items() if k not in _NOT_OF_ADAPTERS} for name, config in configs.items()}
    states = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    layers = [
        [name, *(getattr(module, state, None) for state in states)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # a method of whole models
    ]
    return [known, [vars(model).get(name) for name in ("active_adapter", "_adapters_disabled")], layers]


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
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_as_json).encode()).hexdigest()


def rows_digest(prompts: Dataset) -> str:
    """Of all columns."""
    digest = hashlib.sha256()
    for row in prompts.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def describe_reward(function: Callable[..., Any]) -> list[Any]:
    """Name, source and settings: as much of a reward function as can be seen from outside.

    Settings are its defaults, what it closes over and the attributes of its object. Names that begin with an underscore are
    taken for its state, which may change from call to call.
    """
    return _described(function, ())


def _described(function: Any, above: tuple[int, ...]) -> list[Any]:
    if isinstance(function, functools.partial):
        return [*_described(function.func, above), _seen(function.args, above), _seen(function.keywords, above)]
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = digest_of(inspect.getsource(named))
    except (OSError, TypeError):  # built in, or typed at a prompt
        source = None
    owner = function.__self__ if inspect.ismethod(function) else function
    code = getattr(function, "__func__", function)
    code = code if inspect.isfunction(code) else type(function).__call__
    defaults: list[Any] = []
    nonlocals: dict[str, Any] = {}
    if inspect.isfunction(code):
        defaults = [code.__defaults__, code.__kwdefaults__]
        for name, cell in zip(code.__code__.co_freevars, code.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not bound yet
                nonlocals[name] = cell.cell_contents
    settings = [_public(getattr(owner, "__dict__", {})), _public(nonlocals), defaults]
    return [reward_name(function), f"{named.__module__}.{named.__qualname__}", source, *(_seen(s, above) for s in settings)]


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _seen(value: Any, above: tuple[int, ...]) -> Any:
    """A setting in values that JSON can hold; of what is neither plain nor made of plain values, the class alone.

    Args:
        above: ids of the values that this one is a part of.
    """
    if isinstance(value, _PLAIN):
        return value
    named = value if isinstance(value, type) else type(value)
    kind = f"{named.__module__}.{named.__qualname__}"
    # Modules and tokenizers are callable, with a state of their own.
    if id(value) in above or isinstance(value, type | nn.Module | PreTrainedTokenizerBase):
        return kind
    above = (*above, id(value))
    found: Any
    if isinstance(value, Mapping):
        found = {str(name): _seen(part, above) for name, part in value.items()}
    elif isinstance(value, list | tuple):
        found = [_seen(part, above) for part in value]
    elif isinstance(value, set | frozenset):
        found = sorted((_seen(part, above) for part in value), key=digest_of)
    elif callable(value):
        found = _described(value, above)
    elif is_dataclass(value):
        found = [kind, {field.name: _seen(getattr(value, field.name), above) for field in fields(value)}]
    else:
        found = kind
    return found if len(json.dumps(found)) <= _LONGEST_SETTING else digest_of(found)


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)  # sets have no order to rely on


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
