"""What the commands share: the parser, the options of data and rewards, and what these stand for."""

import importlib
import os
import sys
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import TrlParser

from dppo_kernels.trainers.data import MATH_TEMPLATE, load_prompts
from dppo_kernels.trainers.rewards import MathAnswerReward

MATH_REWARD, NO_REWARD = "math_answer", "none"

CONFIGS = Path(__file__).with_name("configs")  # shipped ones, in a folder per algorithm

# Other spellings of options, on the command line (by their dataclass) and in YAML files.
_ALIASES = {"entropy_coeff": "entropy_coef"}


@dataclass
class DataArguments:
    """Data and rewards.

    Args:
        dataset_name: a file, folder, glob, hub id or generated set, see `load_prompts`.
        dataset_config: configuration of a hub dataset.
        dataset_train_split: split that is used.
        dataset_limit: use the first prompts only.
        answer_column: column of gold answers, where it is not found by itself.
        prompt_template: "math" for `MATH_TEMPLATE`, or a text with one {problem}, put around each problem.
        as_chat: make plain prompts the user's message of a chat, for models with a chat template.
        reward_funcs: "math_answer", import paths of reward functions such as my_rewards.exact, or "none": no function, and so
            no gold answers are read.
        correct_reward: of "math_answer", for a right answer.
        wrong_reward: of "math_answer", for any other.
        boxed: of "math_answer": "fallback", "never" or "only", see `MathAnswerReward`.
        answer_time_limit: of "math_answer": seconds for one comparison.
    """

    dataset_name: str = field(default="mixed", metadata={"help": "File, folder, hub id or generated set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that is used."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first prompts only."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of gold answers (default: found by itself)."})
    prompt_template: str | None = field(default=None, metadata={"help": "'math', or a text with one {problem}."})
    as_chat: bool = field(default=False, metadata={"help": "Make plain prompts the user's message of a chat."})
    reward_funcs: list[str] = field(
        default_factory=lambda: [MATH_REWARD], metadata={"help": f"{MATH_REWARD}, import paths, or {NO_REWARD}."}
    )
    correct_reward: float = field(default=1.0, metadata={"help": f"Of {MATH_REWARD}."})
    wrong_reward: float = field(default=-1.0, metadata={"help": f"Of {MATH_REWARD}."})
    boxed: str = field(default="fallback", metadata={"help": f"Of {MATH_REWARD}: fallback, never or only."})
    answer_time_limit: float = field(default=5.0, metadata={"help": f"Of {MATH_REWARD}: seconds for one comparison."})

    def rewards(self) -> list[Callable[..., Any]]:
        """The reward functions, imported."""
        return [self._reward(name) for name in self.reward_funcs if name != NO_REWARD]

    def prompts(self, with_answers: bool, columns: Sequence[str] = (), optional_columns: Sequence[str] = ()) -> Dataset:
        """The prompts as they are in the data, before `as_chat`, and further columns."""
        return load_prompts(
            self.dataset_name,
            config=self.dataset_config,
            split=self.dataset_train_split,
            answer_column=self.answer_column,
            template=MATH_TEMPLATE if self.prompt_template == "math" else self.prompt_template,
            limit=self.dataset_limit,
            with_answers=with_answers,
            columns=columns,
            optional_columns=optional_columns,
        )

    def _reward(self, name: str) -> Callable[..., Any]:
        if name == MATH_REWARD:
            return MathAnswerReward(
                correct=self.correct_reward,
                wrong=self.wrong_reward,
                boxed=self.boxed,
                time_limit=self.answer_time_limit,
            )
        module, _, function = name.rpartition(".")
        if not module:
            raise ValueError(
                f"`reward_funcs` holds {name!r}: expected {MATH_REWARD!r} or an import path such as my_rewards.exact"
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # as `python` would, for a module beside the user
        return getattr(importlib.import_module(module), function)


def texts_of(option: str, path: str | None) -> list[str] | None:
    """The lines of a file that an option names, None without one.

    Raises:
        OSError, ValueError: there is none, or it holds no text.
    """
    if path is None:
        return None
    try:
        texts = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as reason:
        raise ValueError(f"`{option}` '{path}' must be text in UTF-8: {reason}") from reason
    if not any(text.strip() for text in texts):
        raise ValueError(f"`{option}` '{path}' must hold texts, one a line; it is empty")
    return texts


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """For `Dataset.map`: a plain prompt as the user's message of a chat."""
    prompt = row["prompt"]
    return {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}


class ArgumentParser(TrlParser):
    """TRL's, where options that may be None take no value to be switched on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            # Of options that may be None, such as --bf16, TRL's parser wants the value spelt out.
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        return super().set_defaults_with_config(**{_ALIASES.get(name, name): value for name, value in values.items()})


def split_config(argument: str) -> list[str]:
    """TRL's parser knows `--config FILE`, and not `--config=FILE`."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def shipped_configs(command: str) -> dict[str, Path]:
    """YAML files that come with the package for an algorithm or a command, by name."""
    return {path.stem: path for path in sorted((CONFIGS / command).glob("*.yaml"))}


def with_shipped_config(parser: PlainParser, arguments: Sequence[str], names: Mapping[str, Path]) -> list[str]:
    """`arguments`, where the value of `--config` is a file: one that is given, or a shipped one by its name.

    Exits with status 2 where it is neither.
    """
    found = [part for argument in arguments for part in split_config(argument)]
    if "--config" in found[:-1]:
        place = found.index("--config") + 1
        given = found[place]
        if not os.path.exists(given):
            if given not in names:
                parser.error(f"--config {given}: no such file, and none of the shipped ones: {', '.join(names)}")
            found[place] = str(names[given])
    return found
