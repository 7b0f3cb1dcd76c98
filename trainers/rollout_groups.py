"""Groups of a rollout as tensors: cut out of GRPO's batches, handed to other processes, put together again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

Rows = dict[str, Tensor]  # tensors [rows, ...] of GRPO's batch; its scalars are left out

_PROMPT = ("prompt_ids", "prompt_mask")  # padded on the left
# What stands behind the mask; 0 elsewhere.
_PADDING = {"rollout_topk_ids": -1, "tool_mask": 1, "importance_sampling_ratio": 1.0}


def take_rows(batch: Mapping[str, Any], rows: slice, *, per_sequence: Sequence[str] = ()) -> Rows:
    """Some rows of a batch, without the columns that none of them uses.

    Args:
        per_sequence: names of [B, 1] tensors, which have no columns to leave out.
    """
    taken = {name: x[rows] for name, x in batch.items() if isinstance(x, Tensor) and x.dim()}
    used = taken["prompt_mask"].any(0)
    first = int(used.int().argmax()) if used.any() else len(used) - 1
    lengths = taken["completion_mask"].any(0).nonzero()
    width = int(lengths[-1]) + 1 if len(lengths) else 1
    for name, x in taken.items():
        if name in _PROMPT:
            taken[name] = x[:, first:]
        elif x.dim() > 1 and name not in per_sequence:
            taken[name] = x[:, :width]
    return taken


def concatenate(groups: Sequence[Rows], *, pad_token_id: int, per_sequence: Sequence[str] = ()) -> Rows:
    """Rows of all groups in one batch: prompts padded on the left, the rest on the right."""
    merged = {}
    for name in groups[0]:
        parts = [group[name] for group in groups]
        if parts[0].dim() > 1 and name not in per_sequence:
            width = max(x.shape[1] for x in parts)
            value = pad_token_id if name in ("prompt_ids", "completion_ids") else _PADDING.get(name, 0)
            parts = [_widen(x, width, value, left=name in _PROMPT) for x in parts]
        merged[name] = torch.cat(parts)
    return merged


def blank_rows(rows: Rows, count: int) -> Rows:
    """`count` rows that change nothing: a prompt without completion, without advantage."""
    blank = {name: x[:1].expand(count, *x.shape[1:]).clone() for name, x in rows.items()}
    for name in ("completion_mask", "advantages", "stale"):
        blank[name].zero_()
    return blank


def hand_over(mine: Mapping[int, Rows], takers: Sequence[int], owners: Sequence[int], process: int) -> dict[int, Rows]:
    """Give each group of the batch to the process that trains it; a collective where any group moves.

    Args:
        mine: groups that this process holds, by their place in the batch.
        takers: process that trains the group at each place; `owners`: process that holds it.

    Returns:
        Groups that this process trains, by place, on the device of its own; received ones on the CPU.
    """
    result = {place: mine[place] for place, taker in enumerate(takers) if taker == owners[place] == process}
    if all(taker == owner for taker, owner in zip(takers, owners, strict=True)):
        return result
    leaving = {place: rows for place, rows in mine.items() if takers[place] != process}
    sent = [(place, {name: x.cpu() for name, x in rows.items()}) for place, rows in leaving.items()]
    for place, rows in gather_object(sent):
        if takers[place] == process:
            result[place] = rows
    return result


def _widen(x: Tensor, width: int, value: Any, *, left: bool) -> Tensor:
    missing = width - x.shape[1]
    if not missing:
        return x
    sides = (missing, 0) if left else (0, missing)
    return pad(x, (*(0, 0) * (x.dim() - 2), *sides), value=value)
