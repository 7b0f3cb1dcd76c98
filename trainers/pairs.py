"""Preference pairs for DPO: completions at several temperatures, scored by a reward function; best and worst are kept."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dppo_kernels.trainers.pairs_config import PAIR_COLUMNS, PairsConfig
from dppo_kernels.trainers.pairs_fingerprint import fingerprint_of
from dppo_kernels.trainers.pairs_generation import (
    Sampler,
    Sampling,
    TransformersSampler,
    VLLMSampler,
    end_tokens,
    make_engine,
)
from dppo_kernels.trainers.pairs_scoring import RewardFunction, RewardSum
from dppo_kernels.trainers.pairs_selection import Candidate, PairStatistics, PromptOutcome, pair_statistics, select_pair
from dppo_kernels.trainers.pairs_store import ShardFolder, opened_shards
from dppo_kernels.trainers.pairs_text import TEMPLATE_COLUMNS, TokenizedPrompt, completion_texts, tokenized_prompts

_LOGGER = logging.getLogger(__name__)


def make_pairs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset | Sequence[Any],
    reward: RewardFunction | Sequence[RewardFunction],
    config: PairsConfig | None = None,
    *,
    budget_texts: Sequence[str] | None = None,
    engine: Any = None,
    revision: str | None = None,
    dtype: str | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[Dataset, PairStatistics]:
    """Generate, score and pair completions of prompts.

    With an `output_file`, a run that was stopped goes on where it was and writes the file that an uninterrupted one does, bit
    for bit, if its rewards depend on nothing but their arguments (and, with vLLM, if the engine's kernels do not round by what
    else is in a batch). Shards stay beside the file; remove them when it is no longer to be continued. What is seen of reward
    functions, to tell runs apart, says `describe_reward`.

    Args:
        model: a causal LM of transformers (or PEFT); with `use_vllm`, the path or hub id of one.
        tokenizer: its tokenizer.
        prompts: a dataset with a column `prompt`, of strings or of chats; or a list of them. A chat's pairs are lists of one
            message of the assistant, as TRL's DPOTrainer wants them. Columns `tools` and `chat_template_kwargs` are what each
            row's chat template gets, here and in that trainer, and stay with the pairs.
        reward: one or several functions with TRL's signature, see `RewardSum`; they get the other columns of `prompts`.
        config: default: `PairsConfig()`.
        budget_texts: what completions look like, such as the texts to imitate: the longest of them in tokens, and an end token,
            are the budget where `max_completion_length` is None.
        engine: a `vllm.LLM` of `model` to use with `use_vllm`; default: one is made.
        revision: of a hub id, with `use_vllm`: model and generation settings are of it. Default: "main".
        dtype: of the weights, with `use_vllm` and no `engine`, as vLLM names it. Default: "auto".
        on_batch: called after each batch with how many prompts are done.

    Returns:
        The pairs, in the order of the prompts that have one: prompt, chosen, rejected, chosen_reward, rejected_reward,
        chosen_temperature, rejected_temperature, and `extra_columns`, those of chat templates among them. And what they are
        made of, see `PairStatistics`.

    Raises:
        TypeError, ValueError: arguments outside what is said above, prompts too long for the model, or an output file whose
            folder of shards is in use, or of a run with another model, prompts, rewards or options.
        ImportError: `use_vllm` without vLLM.
    """
    config = config or PairsConfig()
    _check_model(model, config.use_vllm, engine, revision, dtype)
    data = _as_dataset(prompts, config.extra_columns)
    rewards = RewardSum(reward, config.reward_weights)
    sampling = _sampling(_generation_settings(model, revision), tokenizer, config, budget_texts)
    tokenized = tokenized_prompts(tokenizer, data)
    make_sampler = partial(_sampler, model, tokenized, sampling.max_tokens, config, engine, revision, dtype)
    # A vLLM engine takes long to start: not where nothing is left to do.
    sampler = None if config.use_vllm and engine is None else make_sampler()
    opened: AbstractContextManager[ShardFolder | None] = nullcontext()
    if config.output_file is not None:
        fingerprint = fingerprint_of(model, tokenizer, data, tokenized, rewards, config, sampling, revision, dtype)
        opened = opened_shards(Path(config.output_file), fingerprint)
    outcomes: list[PromptOutcome] = []
    with opened as store:
        for index, first in enumerate(range(0, len(data), config.batch_size)):
            shard = store.read(index) if store is not None else None
            if shard is None:
                sampler = sampler or make_sampler()
                rows = range(first, min(first + config.batch_size, len(data)))
                given = [tokenized[row] for row in rows]
                completions = sampler([prompt.ids for prompt in given], first, sampling)
                texts = [completion_texts(tokenizer, *group) for group in zip(given, completions, strict=True)]
                shard = _outcomes(data.select(rows), first, completions, texts, rewards, config, sampling)
                if store is not None:
                    store.write(index, shard)
            outcomes += shard
            on_batch(len(outcomes))
        statistics = pair_statistics(outcomes, config.temperatures)
        pairs = _pairs(data, outcomes, config)
        if store is not None:
            store.finish(pairs, statistics)
    _LOGGER.info("preference pairs\n%s", statistics.summary())
    if not statistics.pairs:
        _LOGGER.warning("no prompt gave a pair: rewards of its completions differ by no more than `min_gap`=%g", config.min_gap)
    return pairs, statistics


def completion_budget(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """Tokens of the longest of `texts`, and one for the end."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`budget_texts` must be a list of strings, and not empty, got {texts!r:.200}")
    return max(len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]) + 1


def _outcomes(
    rows: Dataset,
    first_row: int,
    completions: Sequence[Sequence[list[int]]],
    texts: Sequence[Sequence[str]],
    rewards: RewardSum,
    config: PairsConfig,
    sampling: Sampling,
) -> list[PromptOutcome]:
    """Of one batch, scored in one call of each reward function."""
    candidates = [
        [
            Candidate(text, i // sampling.samples, len(ids), truncated=not ids or ids[-1] not in sampling.eos_ids)
            for i, (text, ids) in enumerate(zip(*group, strict=True))
        ]
        for group in zip(texts, completions, strict=True)
    ]
    places = [
        (row, i)
        for row, group in enumerate(candidates)
        for i, candidate in enumerate(group)
        if not (candidate.truncated and config.drop_truncated)
    ]
    prompts, owners = rows["prompt"][:], [row for row, _ in places]
    scores = rewards(
        owners,
        [prompts[row] for row in owners],
        [_answer(prompts[row], texts[row][i]) for row, i in places],
        [completions[row][i] for row, i in places],
        {name: [column[row] for row in owners] for name, column in rows[:].items()},
    )
    for (row, i), score in zip(places, scores, strict=True):
        candidates[row][i] = replace(candidates[row][i], reward=score)
    return [
        PromptOutcome(
            first_row + row,
            len(group),
            sum(c.tokens for c in group),
            sum(c.truncated for c in group),
            sum(c.reward is None and not (c.truncated and config.drop_truncated) for c in group),
            [c.reward for c in group],
            *select_pair(group, config.min_gap),
        )
        for row, group in enumerate(candidates)
    ]


def _pairs(data: Dataset, outcomes: Sequence[PromptOutcome], config: PairsConfig) -> Dataset:
    """Rows of the prompts that have a pair: one selection for all columns."""
    found = [(o.row, o.chosen, o.rejected) for o in outcomes if o.chosen is not None and o.rejected is not None]
    kept = data.select([row for row, _, _ in found])
    prompts = kept["prompt"][:]
    columns: dict[str, list[Any]] = {"prompt": prompts}
    sides_by_name = {"chosen": [best for _, best, _ in found], "rejected": [worst for _, _, worst in found]}
    for name, sides in sides_by_name.items():
        columns[name] = [_answer(prompt, side.text) for prompt, side in zip(prompts, sides, strict=True)]
        columns[f"{name}_reward"] = [side.reward for side in sides]
        columns[f"{name}_temperature"] = [config.temperatures[side.temperature] for side in sides]
    is_chat = not isinstance(data[0]["prompt"], str)
    further = [*config.extra_columns, *(name for name in TEMPLATE_COLUMNS if is_chat and name in data.column_names)]
    columns |= {name: kept[name][:] for name in further}
    completion = List({"role": Value("string"), "content": Value("string")}) if is_chat else Value("string")
    types = dict.fromkeys(PAIR_COLUMNS, Value("float64")) | {"chosen": completion, "rejected": completion}
    types |= {name: data.features[name] for name in ("prompt", *further)}
    return Dataset.from_dict({name: columns[name] for name in types}, features=Features(types))


def _answer(prompt: Any, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _as_dataset(prompts: Dataset | Sequence[Any], extra_columns: Sequence[str]) -> Dataset:
    data = prompts if isinstance(prompts, Dataset) else None
    if data is None:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"`prompts` must be a Dataset or a list of prompts, got {type(prompts).__name__}")
        data = Dataset.from_dict({"prompt": list(prompts)})
    missing = [name for name in ("prompt", *extra_columns) if name not in data.column_names]
    if missing:
        raise ValueError(f"`prompts` must have a column {missing[0]!r}; its columns are {', '.join(data.column_names)}")
    if not len(data):
        raise ValueError("`prompts` must not be empty")
    data = data.with_format(None)
    for row, prompt in enumerate(data["prompt"]):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) and "role" in m for m in prompt):
            raise ValueError(f"`prompts`: row {row} must hold a string or a list of messages, got {prompt!r:.200}")
        if prompt[-1]["role"] == "assistant":
            raise ValueError(f"`prompts`: row {row} ends with a message of the assistant, which completions would continue")
    return data


def _check_model(model: Any, use_vllm: bool, engine: Any, revision: str | None, dtype: str | None) -> None:
    if use_vllm != isinstance(model, str | Path) or not (use_vllm or callable(getattr(model, "generate", None))):
        expected = "the path or hub id of a model, with `use_vllm=True`" if use_vllm else "a causal LM of transformers"
        raise TypeError(f"`model` must be {expected}, got {type(model).__name__}")
    for name, value in (("engine", engine), ("revision", revision), ("dtype", dtype)):
        if value is not None and not use_vllm:
            raise ValueError(f"`{name}` is for `use_vllm=True`")
    for name, value in (("revision", revision), ("dtype", dtype)):
        if not isinstance(value, str | None):
            raise TypeError(f"`{name}` must be a string or None, got {type(value).__name__}")
    if engine is not None and dtype is not None:
        raise ValueError(f"`dtype`={dtype!r} is for an engine that is made here: `engine` has one")


def _sampling(
    settings: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PairsConfig,
    budget_texts: Sequence[str] | None,
) -> Sampling:
    if (config.max_completion_length is None) == (budget_texts is None):
        raise ValueError(
            f"one of `max_completion_length` and `budget_texts` must be given, got {config.max_completion_length} and "
            f"{'none' if budget_texts is None else 'texts'}"
        )
    budget = config.max_completion_length
    if budget_texts is not None:
        budget = completion_budget(tokenizer, budget_texts)
    eos_ids = end_tokens(settings, tokenizer)
    if budget is None or not eos_ids:
        raise ValueError("`tokenizer` must have an end token, or the model declare one")
    return Sampling(
        temperatures=tuple(config.temperatures),
        samples=config.samples_per_temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        max_tokens=budget,
        eos_ids=eos_ids,
        seed=config.seed,
    )


def _generation_settings(model: Any, revision: str | None) -> GenerationConfig | None:
    if not isinstance(model, str | Path):
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(str(model), revision=revision or "main")
    except OSError:  # it has none
        return None


def _sampler(
    model: Any,
    prompts: Sequence[TokenizedPrompt],
    budget: int,
    config: PairsConfig,
    engine: Any,
    revision: str | None,
    dtype: str | None,
) -> Sampler:
    """One that takes prompts of these lengths."""
    sampler: Sampler
    if not config.use_vllm:
        sampler = TransformersSampler(model)
    elif engine is not None:
        sampler = VLLMSampler(engine)
    else:
        given = {"revision": revision, "tokenizer_revision": revision, "dtype": dtype}
        settings = {
            "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
            "max_model_len": config.vllm_max_model_length,
            "tensor_parallel_size": config.vllm_tensor_parallel_size,
            **{name: value for name, value in given.items() if value is not None},
        }
        sampler = VLLMSampler(make_engine(str(model), settings))
    lengths, context = [len(prompt.ids) for prompt in prompts], sampler.context_length
    longest = max(lengths)
    if context is not None and longest + budget > context:
        raise ValueError(
            f"`prompts`: row {lengths.index(longest)} has {longest} tokens, which with a completion of {budget} are more than "
            f"the {context} that the model takes"
        )
    return sampler
