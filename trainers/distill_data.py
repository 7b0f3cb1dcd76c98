"""Completions of a dataset, to distil on: the column `completion`, tokenised like the completions that are written."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COMPLETION = "completion"


def check_completions(dataset: Any) -> None:
    """Refuse a training set that lacks completions.

    Raises:
        ValueError: no column `completion`; a row without one, which is named.
    """
    if dataset is None or COMPLETION not in (dataset.column_names or ()):
        columns = [] if dataset is None else dataset.column_names
        raise ValueError(f"`kd_data`='dataset' needs a column {COMPLETION!r} in `train_dataset`, which has {columns}")
    if hasattr(dataset, "__len__"):
        for i, completion in enumerate(dataset[COMPLETION]):
            _text(completion, f"row {i} of `train_dataset`")


def tokenize_completions(rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and bool mask [B, T] of the rows' completions and the end after them, cut off after `length` tokens.

    Raises:
        ValueError: a row without a completion.
    """
    texts = [_text(row.get(COMPLETION), "a training row") for row in rows]
    ids = [[*row, tokenizer.eos_token_id][:length] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    width = max(map(len, ids))
    padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return torch.tensor(padded, device=device), torch.arange(width, device=device) < lengths[:, None]


def _text(completion: Any, where: str) -> str:
    """A string, or the content of a single assistant message."""
    if isinstance(completion, list) and len(completion) == 1 and completion[0].get("role") == "assistant":
        completion = completion[0]["content"]
    if not isinstance(completion, str):
        raise ValueError(f"{COMPLETION!r} must be a string or one assistant message, got {completion!r} in {where}")
    return completion
