"""``dppo pairs``: preference pairs from a model, prompts and rewards, written to a file that TRL's DPOTrainer reads."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dppo_kernels.trainers.arguments import (
    MATH_REWARD,
    NO_REWARD,
    ArgumentParser,
    DataArguments,
    as_chat,
    split_config,
    texts_of,
)
from dppo_kernels.trainers.pairs import make_pairs
from dppo_kernels.trainers.pairs_config import PairsConfig
from dppo_kernels.trainers.pairs_scoring import RewardSum
from dppo_kernels.trainers.pairs_selection import PairStatistics
from dppo_kernels.trainers.pairs_text import TEMPLATE_COLUMNS


@dataclass
class PairsArguments(DataArguments):
    """`DataArguments` with the model, and what the budget comes from.

    Args:
        model_name_or_path: a folder or hub id of a causal LM. Needed.
        model_revision: of a hub id, model and tokenizer.
        dtype: of the weights: "auto", "float32", "bfloat16" or "float16".
        device: default: the first GPU, or the CPU where there is none. (vLLM takes what it finds.)
        without_answers: read no gold answers, for rewards that need none.
        budget_file: reference texts, one a line: the longest in tokens and an end token are the budget of completions, where
            `max_completion_length` is not given.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub id. Needed."})
    model_revision: str = field(default="main", metadata={"help": "Of a hub id."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Default: the first GPU, or the CPU."})
    without_answers: bool = field(default=False, metadata={"help": "Read no gold answers, for rewards that need none."})
    budget_file: str | None = field(default=None, metadata={"help": "Reference texts, one a line."})

    def budget_texts(self) -> list[str] | None:
        """The lines of `budget_file`."""
        return texts_of("budget_file", self.budget_file)

    def prompts_for(self, config: PairsConfig) -> Dataset:
        """The prompts with all columns that rewards, chat templates and pairs take."""
        columns = [name for name in config.extra_columns if self.without_answers or name != "answer"]
        prompts = self.prompts(not self.without_answers, columns, TEMPLATE_COLUMNS)
        return prompts.map(as_chat) if self.as_chat else prompts


def parse(arguments: Sequence[str]) -> tuple[PairsArguments, PairsConfig, list[Callable[..., Any]], Dataset]:
    """Settings from flags and ``--config`` with a YAML file; the reward functions and the prompts that they name.

    Exits with status 2 where they are not understood, not found or do not go together: before a model is loaded.
    """
    description = "Completions of prompts at several temperatures; the best and the worst by the reward are a pair."
    parser = ArgumentParser((PairsArguments, PairsConfig), prog="dppo pairs", description=description)
    try:
        data, config = parser.parse_args_and_config([part for argument in arguments for part in split_config(argument)])
    except (OSError, TypeError, ValueError) as reason:
        parser.error(str(reason))
    if data.model_name_or_path is None:
        parser.error("--model_name_or_path is needed: a folder or a hub id")
    if config.output_file is None:
        parser.error("--output_file is needed: a .parquet file")
    if (config.max_completion_length is None) == (data.budget_file is None):
        parser.error("one of --max_completion_length and --budget_file is needed")
    if data.budget_file is not None and not Path(data.budget_file).is_file():
        parser.error(f"--budget_file {data.budget_file}: no such file")
    if data.without_answers and MATH_REWARD in data.reward_funcs:
        parser.error(f"--without_answers: --reward_funcs {MATH_REWARD} compares with gold answers")
    if NO_REWARD in data.reward_funcs:
        parser.error(f"--reward_funcs {NO_REWARD}: pairs are chosen by a reward")
    if data.dtype not in ("auto", "float32", "bfloat16", "float16"):
        parser.error(f"--dtype must be auto, float32, bfloat16 or float16, got {data.dtype}")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        parser.error(f"WORLD_SIZE is {processes}: pairs are made by one process, so start it without a launcher")
    try:
        data.budget_texts()
        rewards = data.rewards()
        RewardSum(rewards, config.reward_weights)
        prompts = data.prompts_for(config)
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as reason:
        parser.error(str(reason))
    return data, config, rewards, prompts


def run_pairs(arguments: Sequence[str]) -> tuple[Dataset, PairStatistics]:
    """Make the pairs, say where they are and what they are made of."""
    data, config, rewards, prompts = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path, revision=data.model_revision)
    model = data.model_name_or_path if config.use_vllm else _load(data)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", total=len(prompts))
        pairs, statistics = make_pairs(
            model,
            tokenizer,
            prompts,
            rewards,
            config,
            budget_texts=data.budget_texts(),
            revision=data.model_revision if config.use_vllm else None,
            dtype=data.dtype if config.use_vllm else None,
            on_batch=lambda done: progress.update(task, completed=done),
        )
    print(statistics.summary())
    print(f"written to {config.output_file}")
    return pairs, statistics


def _load(data: PairsArguments) -> Any:
    model = AutoModelForCausalLM.from_pretrained(data.model_name_or_path, revision=data.model_revision, dtype=data.dtype)
    return model.to(data.device or ("cuda" if torch.cuda.is_available() else "cpu"))
