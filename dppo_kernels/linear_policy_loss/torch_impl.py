"""Torch implementation of the fused policy loss: row chunks of exponentials, gradient GEMMs as soon as coefficients are known.

Token-level ratios: a chunk is scored, its coefficients are computed, and its gradient is accumulated while it is in the cache.
Sequence-level ratios: the same with groups of whole sequences; chunks that do not fit the slots are scored again.
Rows that need no score enter no GEMM; rows whose coefficient is 0 leave the chunk before the gradient GEMMs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._tiling import chunks
from dppo_kernels.linear_logprobs.exponentials import Exponentials, Scores, exponentials, gradient_operand
from dppo_kernels.linear_logprobs.gradient_gemms import accumulate_gradients
from dppo_kernels.linear_policy_loss.rows import RowLoss, row_loss
from dppo_kernels.linear_policy_loss.task import Result, Task


class Group(NamedTuple):
    """Rows whose coefficients become known together."""

    rows: Tensor  # [n] numbers of scored rows
    sequences: slice | None  # which sequences they are all the scored rows of


def linear_policy_loss_fwd(task: Task) -> Result:
    """Loss and gradients of the rows that have to be scored."""
    result = Result.empty(task)
    scored = task.scored.nonzero().squeeze(1)
    x, design = task.projection, task.design
    slots = [x.hidden.new_empty((design.chunk_rows, x.weight.shape[0]), dtype=x.dtype) for _ in range(design.slots)]
    for group in _groups(task, scored):
        _run_group(task, group, slots, result)
    return result


def _groups(task: Task, scored: Tensor) -> Iterator[Group]:
    """Chunks of rows, or runs of whole sequences that fit the slots (at least one sequence)."""
    design = task.design
    if design.name == "forward":
        for part in chunks(scored.shape[0], design.chunk_rows):
            yield Group(scored[part], None)
        return
    length = task.sequence_length
    counts = torch.bincount(scored // max(length, 1)).tolist() if scored.shape[0] else []
    first_row, first_sequence, n = 0, 0, 0
    for sequence, count in enumerate(counts):
        if n and n + count > design.slots * design.chunk_rows:
            yield Group(scored[first_row : first_row + n], slice(first_sequence, sequence))
            first_row, first_sequence, n = first_row + n, sequence, 0
        n += count
    if n:
        yield Group(scored[first_row:], slice(first_sequence, len(counts)))


def _run_group(task: Task, group: Group, slots: list[Tensor], result: Result) -> None:
    parts = chunks(group.rows.shape[0], task.design.chunk_rows)
    # Chunks beyond the slots take turns in the last one; what is there at the end need not be scored again.
    kept: dict[int, Exponentials] = {}
    scores = []
    for i, part in enumerate(parts):
        slot = min(i, len(slots) - 1)
        kept.pop(next((j for j in kept if min(j, len(slots) - 1) == slot), -1), None)
        rows = group.rows[part]
        topk_ids = None if task.rows.topk_ids is None else task.rows.topk_ids[rows]
        kept[i], logits = _exponentials(task, rows, slots[slot], topk_ids)
        scores.append(kept[i].scores(logits, topk_ids))
    whole = Scores(*(None if x[0] is None else torch.cat(x) for x in zip(*scores, strict=True)))  # type: ignore[arg-type]
    loss = _coefficients(task, group, whole)
    result.add(group.rows, whole, loss)
    # Last chunk first: its slot is where the others are scored again.
    for i in sorted(range(len(parts)), key=lambda i: (i not in kept, -i)):
        _add_gradient(task, group.rows[parts[i]], kept.get(i), slots[-1], whole, loss.dlogprobs, parts[i], result)


def _exponentials(task: Task, rows: Tensor, slot: Tensor, topk_ids: Tensor | None = None) -> tuple[Exponentials, Tensor | None]:
    return exponentials(
        task.projection.select(rows),
        task.rows.ids[rows],
        topk_ids,
        slot[: rows.shape[0]],
        with_entropy=task.with_entropy,
        fold_slope=task.entropy_weight is None,
    )


def _coefficients(task: Task, group: Group, scores: Scores) -> RowLoss:
    if group.sequences is None:
        chosen = task.rows.take(group.rows)
        return row_loss(chosen._replace(mask=torch.ones_like(chosen.mask)), scores, task.spec, task.entropy_weight)
    length = task.sequence_length
    first, last = group.sequences.start * length, group.sequences.stop * length
    places = group.rows - first
    scored = torch.zeros_like(task.rows.mask[first:last]).index_fill_(0, places, True)
    rows = task.rows.take(slice(first, last))._replace(mask=scored)
    loss = row_loss(rows, scores.spread(places, last - first), task.spec, task.entropy_weight, length)
    return loss._replace(dlogprobs=loss.dlogprobs[places])


def _add_gradient(
    task: Task,
    rows: Tensor,  # numbers of the chunk's rows
    e: Exponentials | None,  # theirs, if they were kept
    spare: Tensor,
    scores: Scores,  # of the group
    dlogprobs: Tensor,  # of the group
    part: slice,  # where the chunk is in the group
    result: Result,
) -> None:
    dlogprobs, entropy = dlogprobs[part], None if scores.entropy is None else scores.entropy[part]
    keep = torch.ones_like(dlogprobs, dtype=torch.bool) if task.entropy_weight is not None else dlogprobs != 0
    if not bool(keep.any()) or not any(task.needs):
        return
    if e is None:
        order = keep.nonzero().squeeze(1)
        e, _ = _exponentials(task, rows[order], spare)
    else:
        e, order = e.keep_rows(keep)
    rows = rows[order]
    x = task.projection.select(rows)
    operand, factor = gradient_operand(
        e, x, dlogprobs[order], None if entropy is None else entropy[order], task.entropy_weight, rows=rows.shape[0]
    )
    accumulate_gradients(x, rows, operand, factor[:, None], result.gradients)
