"""Prompts and gold answers from files, folders, the hub or a generated set: two columns, and every prompt once.

DAPO-Math-17k (https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k) is published with about a hundred copies of
every prompt, 1.79 million rows. In memory there are the distinct prompts and one batch of rows.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape, glob
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from dppo_kernels._checks import check_choice
from dppo_kernels.trainers.data.generated import generate_problems
from dppo_kernels.trainers.rewards.answers import gold_answer

PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("reward_model", "answer", "solution")
# The form stands on a line of its own: quotes or backticks around it would be imitated, and end up in answers.
MATH_TEMPLATE = (
    "Work through the problem below step by step, and show every step. The last line of your reply gives the result, "
    "in this form and with nothing after it:\nAnswer: <the answer>\n\nProblem: {problem}"
)

_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "config.json")  # `datasets` does not read them as rows either
_PLACEHOLDER = "{problem}"
_GENERATED = re.compile(r"(addition|arithmetic|algebra|mixed|uneven)(:\d+){0,2}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ACCEPTED = (
    "an existing .parquet, .json or .jsonl file, a glob of them, a folder, a hub id 'owner/name', "
    "or addition, arithmetic, algebra, mixed or uneven with an optional size and seed such as 'mixed:4096:1'"
)
_BATCH = 10_000
# As they were written: 0.1 in float32 is not 0.10000000149011612.
_NARROW_FLOATS: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
_EXACT_FLOAT = 2**53  # from here on a float may stand for several integers
_LOGGER = logging.getLogger(__name__)

# A string, or a chat as (role, content) of each message: hashable, and the prompt can be made from it again.
_Prompt = str | tuple[tuple[str, str], ...]


class _Found(NamedTuple):
    """Of a distinct prompt: its answer (None where answers differ), its first row, and a hash of that row's further columns."""

    answer: str | None
    row: int
    further: int


def load_prompts(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    answer_column: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    with_answers: bool = True,
    columns: Sequence[str] = (),
    optional_columns: Sequence[str] = (),
) -> Dataset:
    """Load distinct prompts with their gold answers, or alone.

    Rows with the same prompt and answer are kept once, in order of first appearance. A prompt that comes with different
    answers is dropped: no verdict on it could be trusted.

    Args:
        source: a .parquet, .json or .jsonl file; a glob of files of one format; a folder of them, or one written by
            `save_to_disk`; a hub id "owner/name"; or a generated set, "addition", "arithmetic", "algebra", "mixed" or "uneven",
            with an optional size and seed, "mixed:4096:1" (see `generate_problems`). What exists on disk comes before names and
            ids.
        config: configuration of a hub dataset, such as "main" of openai/gsm8k.
        split: which split of a folder, a saved DatasetDict or a hub dataset. Everything else is one split, "train".
        answer_column: where the golds are. Default: the `ground_truth` of `reward_model` (a struct or JSON), else `answer`,
            else `solution`. The problems are in `prompt`, `problem` or `question`, the first that exists: strings, or chats
            as lists of messages of `role` and `content`.
        template: text to put around each problem, which goes where `{problem}` stands: around a string prompt, or around the
            content of a chat's last user message. `MATH_TEMPLATE` asks for what the verifier reads. Default: none.
        limit: at most so many prompts, the first ones.
        with_answers: False to read no golds, for rewards that need none: the column `answer` is then missing.
        columns: further ones to keep, as they are. Where rows with the same prompt differ in them, those of the first are kept,
            with a warning.
        optional_columns: the same, of those that exist.

    Returns:
        Columns `prompt` (strings or chats) and `answer`: strings without white space around them. Of a worked solution, only
        its result: what follows the last `####`, or the last `\\boxed{}`. Numbers are written in full and without trailing
        zeros: 34.0 as 34, 0.5 as 0.5. Then the further columns.

    Raises:
        ValueError: for a source that is none of these or cannot be read, missing columns, empty prompts, empty or null golds
            and golds that are neither strings nor exact numbers (the first such row is named), a template without exactly
            one `{problem}`, a limit below 1, a split that does not exist, or no prompt left.
        FileNotFoundError: for a path or glob that matches nothing.
        TypeError: for arguments of another type.
    """
    for name, value, optional in (
        ("source", source, False),
        ("config", config, True),
        ("split", split, False),
        ("answer_column", answer_column, True),
        ("template", template, True),
    ):
        if not (isinstance(value, str) or (optional and value is None)):
            raise TypeError(f"`{name}` must be a string{' or None' if optional else ''}, got {type(value).__name__}")
    for name, names in (("columns", columns), ("optional_columns", optional_columns)):
        if isinstance(names, str) or not (isinstance(names, Sequence) and all(isinstance(column, str) for column in names)):
            raise TypeError(f"`{name}` must be a list of strings, got {names!r:.200}")
    if template is not None and template.count(_PLACEHOLDER) != 1:
        raise ValueError(f"`template` must contain {_PLACEHOLDER} exactly once, got {template!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"`limit` must be an int or None, got {type(limit).__name__}")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be an int >= 1, got {limit}")
    if answer_column is not None and not with_answers:
        raise ValueError(f"`answer_column` {answer_column!r} would not be read: `with_answers` is False")
    made = ("prompt", "answer") if with_answers else ("prompt",)
    for name in (*columns, *optional_columns):
        if name in made:
            raise ValueError(f"`columns` holds {name!r}, which is there in any case")
    rows = load_rows(source, config, split)
    missing = [name for name in columns if name not in rows.features]
    if missing:
        raise ValueError(
            f"`source` {source!r} must have a column {missing[0]!r}; its columns are {', '.join(rows.column_names)}"
        )
    further = list(dict.fromkeys((*columns, *(name for name in optional_columns if name in rows.features))))
    distinct = _distinct(rows, source, answer_column, further) if with_answers else _distinct_prompts(rows, source, further)
    kept = list(islice(distinct.items(), limit))
    is_chat = isinstance(kept[0][0], tuple)
    if any(isinstance(prompt, tuple) != is_chat for prompt, _ in kept):
        raise ValueError(f"`source` {source!r} mixes prompts that are strings with prompts that are chats")
    message = {"role": Value("string"), "content": Value("string")}
    values: dict[str, Any] = {"prompt": [_filled(prompt, template) for prompt, _ in kept]}
    features: dict[str, Any] = {"prompt": List(message) if is_chat else Value("string")}
    if with_answers:
        values["answer"], features["answer"] = [found.answer for _, found in kept], Value("string")
    if further:
        first = rows.select_columns(further).with_format(None).select([found.row for _, found in kept])[:]
        values, features = {**values, **first}, {**features, **{name: rows.features[name] for name in further}}
    return Dataset.from_dict(values, features=Features(features))


def is_generated(source: str) -> bool:
    """Whether a source names a generated set, and nothing that exists on disk."""
    path = Path(source).expanduser()
    return not (path.exists() or glob(str(path), recursive=True)) and _GENERATED.fullmatch(source) is not None


def load_rows(source: str, config: str | None, split: str) -> Dataset:
    """A source of `load_prompts` as it is."""
    if not source:
        raise ValueError(f"`source` must be {_ACCEPTED}; got ''")
    path = Path(source).expanduser()
    is_local = path.exists() or _GENERATED.fullmatch(source) or glob(str(path), recursive=True)
    if config is not None and is_local:
        raise ValueError(f"`config` is for hub datasets, got {config!r} with `source` {source!r}")
    if path.is_dir():
        return _load_folder(path, split)
    if path.is_file():
        return _load_files([path], source, split)
    if _GENERATED.fullmatch(source):
        check_choice("split", split, ("train",))
        kind, *size_and_seed = source.split(":")
        return generate_problems(kind, *map(int, size_and_seed))
    if files := [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]:
        return _load_files(files, source, split)
    # Before the hub is asked: a request must not be the answer to a path that was mistyped.
    if source[0] in "./~" or source.count("/") > 1 or path.suffix in _FORMATS or any(c in source for c in "*?["):
        raise FileNotFoundError(f"`source` {source!r}: no such file or folder")
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"`source` must be {_ACCEPTED}; got {source!r}")
    return _read(source, source, name=config, split=split)


def _load_folder(folder: Path, split: str) -> Dataset:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):  # written by save_to_disk
        saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        check_choice("split", split, splits)
        return splits[split]
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in _FORMATS and path.is_file()]
    names = [name for name in names if name.name not in _NOT_DATA and not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise FileNotFoundError(f"`source` '{folder}': the folder holds no .parquet, .json or .jsonl file")
    _one_format(names, str(folder))
    return _read(str(folder.absolute()), str(folder), split=split)


def _load_files(files: list[Path], source: str, split: str) -> Dataset:
    check_choice("split", split, ("train",))
    names = [escape(str(file.absolute())) for file in files]  # `datasets` takes file names for globs
    return _read(_one_format(files, source), source, data_files={"train": names}, split="train")


def _one_format(files: list[Path], source: str) -> str:
    formats = {_FORMATS.get(file.suffix) for file in files}
    if None in formats:
        other = next(file for file in files if file.suffix not in _FORMATS)
        raise ValueError(f"`source` {source!r}: files must end in {', '.join(_FORMATS)}, got {other}")
    if len(formats) > 1:
        raise ValueError(f"`source` {source!r} must hold files of one format, got Parquet and JSON: name some with a glob")
    return _FORMATS[files[0].suffix]


def _read(path: str, source: str, **options: Any) -> Dataset:
    try:
        return datasets.load_dataset(path, **options)
    except (ValueError, DatasetGenerationError, StopIteration) as error:  # the last for an empty JSON file
        raise ValueError(f"`source` {source!r} cannot be read: {error.__cause__ or str(error) or 'it is empty'}") from error


def _distinct(dataset: Dataset, source: str, answer_column: str | None, further: list[str]) -> dict[_Prompt, _Found]:
    """Of each distinct prompt, in order of first appearance, without those of contradictory answers."""
    answers: dict[_Prompt, _Found] = {}
    bad, first_bad = 0, ""
    varied: dict[_Prompt, None] = {}
    prompt_column, gold_column, is_nested = _columns(dataset, source, answer_column)
    feature = dataset.features[gold_column]
    if is_nested and isinstance(feature, dict):
        feature = feature["ground_truth"]
    float_type = _NARROW_FLOATS.get(getattr(feature, "dtype", ""), np.float64)
    for row, (prompt, gold, others) in enumerate(_rows(dataset, [prompt_column, gold_column], further)):
        try:
            key, answer = _as_key(prompt), _as_answer(_ground_truth(gold) if is_nested else gold, float_type)
        except ValueError as reason:
            bad += 1
            first_bad = first_bad or f"row {row} (from 0): {reason}"
            continue
        found = answers.setdefault(key, _Found(answer, row, others))
        if found.answer != answer:
            answers[key] = found._replace(answer=None)
        if found.further != others:
            varied[key] = None
    if bad:
        raise ValueError(f"`source` {source!r}: {bad} of {len(dataset)} rows cannot be used; the first is {first_bad}")
    distinct = {prompt: found for prompt, found in answers.items() if found.answer is not None}
    if len(answers) < len(dataset):
        _LOGGER.info("%s: %d rows, %d distinct prompts", source, len(dataset), len(answers))
    if len(distinct) < len(answers):
        first = next(prompt for prompt, found in answers.items() if found.answer is None)
        dropped = len(answers) - len(distinct)
        _LOGGER.warning("%s: dropped %d prompts that come with different answers, such as %.200r", source, dropped, first)
    if not distinct:
        raise ValueError(f"`source` {source!r} has {len(dataset)} rows, and no prompt with a single answer among them")
    _warn_of_varied(source, further, [prompt for prompt in varied if prompt in distinct])
    return distinct


def _distinct_prompts(dataset: Dataset, source: str, further: list[str]) -> dict[_Prompt, _Found]:
    """Of each distinct prompt, in order of first appearance, with no answers."""
    names = [name for name in PROMPT_COLUMNS if name in dataset.features]
    if not names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"`source` {source!r} must have a column {' or '.join(PROMPT_COLUMNS)}; its columns are {columns}")
    distinct: dict[_Prompt, _Found] = {}
    varied: dict[_Prompt, None] = {}
    for row, (prompt, others) in enumerate(_rows(dataset, names[:1], further)):
        try:
            key = _as_key(prompt)
        except ValueError as reason:
            raise ValueError(f"`source` {source!r}: row {row} (from 0) cannot be used: {reason}") from None
        if distinct.setdefault(key, _Found("", row, others)).further != others:
            varied[key] = None
    if not distinct:
        raise ValueError(f"`source` {source!r} has no rows")
    _warn_of_varied(source, further, list(varied))
    return distinct


def _rows(dataset: Dataset, names: list[str], further: list[str]) -> Iterator[tuple[Any, ...]]:
    """Values of `names`, and a hash of those of `further`."""
    for batch in dataset.select_columns(list(dict.fromkeys((*names, *further)))).with_format(None).iter(_BATCH):
        hashes = [0] * len(batch[names[0]])
        if further:
            others = zip(*(batch[name] for name in further), strict=True)
            hashes = [hash(json.dumps(values, sort_keys=True, default=str)) for values in others]
        yield from zip(*(batch[name] for name in names), hashes, strict=True)


def _warn_of_varied(source: str, further: list[str], varied: Sequence[_Prompt]) -> None:
    if varied:
        text = "%s: %d prompts come with different %s, of which the first is kept, such as %.200r"
        _LOGGER.warning(text, source, len(varied), " or ".join(further), varied[0])


def _columns(dataset: Dataset, source: str, answer_column: str | None) -> tuple[str, str, bool]:
    """Names of the columns of prompts and golds, and whether the latter is a `reward_model` that the gold is taken from."""
    features = dataset.features
    prompts = [name for name in PROMPT_COLUMNS if name in features]
    golds = [name for name in (ANSWER_COLUMNS if answer_column is None else (answer_column,)) if name in features]
    reward_model = features.get("reward_model")
    if answer_column is None and isinstance(reward_model, dict) and "ground_truth" not in reward_model:
        golds.remove("reward_model")
    if not prompts or not golds:
        expected = "`reward_model` with ground_truth, or answer or solution" if answer_column is None else f"`{answer_column}`"
        raise ValueError(
            f"`source` {source!r} must have a column {' or '.join(PROMPT_COLUMNS)}, and {expected}; "
            f"its columns are {', '.join(dataset.column_names)}"
        )
    return prompts[0], golds[0], answer_column is None and golds[0] == "reward_model"


def _ground_truth(reward_model: Any) -> Any:
    if isinstance(reward_model, str):
        with suppress(json.JSONDecodeError):
            reward_model = json.loads(reward_model)
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise ValueError(f"`reward_model` must be a struct or JSON with ground_truth, got {reward_model!r:.200}")
    return reward_model["ground_truth"]


def _as_key(prompt: Any) -> _Prompt:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    if prompt is None or prompt == []:
        raise ValueError("the prompt is empty")
    if not isinstance(prompt, list):
        raise ValueError(f"the prompt must be a string or a list of messages, got {type(prompt).__name__}")
    chat = []
    text = ""
    for message in prompt:
        try:
            role, content = message["role"], message["content"]
        except (TypeError, KeyError):
            raise ValueError(f"messages must have role and content, got {message!r:.200}") from None
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ValueError(f"role and content of messages must be strings, got {message!r:.200}")
        if len(message) > 2 and any(value is not None for name, value in message.items() if name not in ("role", "content")):
            raise ValueError(f"messages must have nothing but role and content, got {message!r:.200}")
        if role == "user":
            text = content
        chat.append((role, content))
    if not text.strip():
        raise ValueError("the prompt is empty: its last user message has no text, or there is none")
    return tuple(chat)


def _as_answer(gold: Any, float_type: type[np.floating]) -> str:
    if isinstance(gold, str):
        if answer := gold_answer(gold):
            return answer
        raise ValueError("the answer is empty")
    if gold is None:
        raise ValueError("the answer is null")
    if isinstance(gold, bool) or not isinstance(gold, int | float):
        raise ValueError(f"the answer must be a string or a number, got {gold!r:.200}")
    if isinstance(gold, int):
        return str(gold)
    if not isfinite(gold) or abs(gold) >= _EXACT_FLOAT:
        raise ValueError(f"the answer must be exact, got the float {gold!r}")
    return str(int(gold)) if gold.is_integer() else np.format_float_positional(float_type(gold))


def _filled(prompt: _Prompt, template: str | None) -> str | list[dict[str, str]]:
    head, _, tail = (template or _PLACEHOLDER).partition(_PLACEHOLDER)
    if isinstance(prompt, str):
        return head + prompt + tail
    chat = [{"role": role, "content": content} for role, content in prompt]
    last = next(message for message in reversed(chat) if message["role"] == "user")
    last["content"] = head + last["content"] + tail
    return chat
