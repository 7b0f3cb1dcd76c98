"""Torch implementation of losses of groups of rows: chunks of exponentials, gradient GEMMs as soon as coefficients are known.

Rows by themselves: a chunk is scored, its coefficients are computed, and its gradient is accumulated while it is in the cache.
By sequence: the same with groups of whole sequences; chunks that do not fit the slots are scored again.
Rows that need no score enter no GEMM; rows whose coefficient is 0 leave the chunk before the gradient GEMMs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._shard import pipelined
from dppo_kernels._tiling import chunks
from dppo_kernels.linear_logprobs.exponentials import Exponentials, Folding, Scores, gradient_operand
from dppo_kernels.linear_logprobs.gradient_gemms import accumulate_gradients
from dppo_kernels.linear_logprobs.groups import GroupResult, GroupTask, runs


class Group(NamedTuple):
    """Rows whose coefficients become known together."""

    rows: Tensor  # [n] numbers of scored rows
    span: slice  # of all rows: of the sequences that these are all the scored rows of


def run_groups(task: GroupTask) -> GroupResult:
    """Statistics and gradients of the rows that have to be scored."""
    task.check_chunked()
    result = GroupResult.empty(task)
    scored = task.scored.nonzero().squeeze(1)
    x, design = task.projection, task.design
    slots = [x.hidden.new_empty((design.chunk_rows, x.weight.shape[0]), dtype=x.dtype) for _ in range(design.slots)]
    by_row = task.bounds is None
    targets = None if x.shard is None else _targets(task, scored)

    # Sums of a chunk come in from other ranks while the next one is projected: rows by themselves then have two slots.
    def start(number: int, group: Group) -> "_Started":
        return _Started(task, group, slots[number % design.slots :][:1] if by_row else slots, targets)

    pipelined(_groups(task, scored), start, lambda _, started: started.finish(result), design.slots if by_row else 1)
    result.gradients = result.gradients.sum_over_ranks(x.shard)
    return result


def _groups(task: GroupTask, scored: Tensor) -> Iterator[Group]:
    """Chunks of rows, or runs of whole sequences that fit the slots (at least one sequence)."""
    design, bounds = task.design, task.bounds
    if bounds is None:
        everything = slice(0, task.ids.shape[0])
        for part in chunks(scored.shape[0], design.chunk_rows):
            yield Group(scored[part], everything)
        return
    units = torch.bucketize(scored, torch.tensor(bounds, device=scored.device), right=True) - 1
    counts = torch.bincount(units).tolist() if scored.shape[0] else []
    row = 0
    for first, last, n in runs(counts, design.slots * design.chunk_rows):
        yield Group(scored[row : row + n], slice(bounds[first], bounds[last]))
        row += n


class _Started:
    """A group whose chunks are projected; `finish` scores them and adds their gradients."""

    def __init__(self, task: GroupTask, group: Group, slots: list[Tensor], targets: "_Targets | None") -> None:
        self.task, self.group, self.slots, self.targets = task, group, slots, targets
        self.parts = chunks(group.rows.shape[0], task.design.chunk_rows)
        # Chunks beyond the slots take turns in the last one; what is there at the end need not be scored again.
        self.kept: dict[int, Exponentials] = {}
        self.scores: list[Scores] = []
        self.ahead: tuple[int, Folding] | None = None
        for i, part in enumerate(self.parts):
            slot = min(i, len(slots) - 1)
            if i >= len(slots):
                self._settle()
                self.kept.pop(i - 1)
            rows = group.rows[part]
            gather_ids = None if task.gather_ids is None else task.gather_ids[rows]
            target = None if targets is None else targets.of(rows)
            folding = _fold(task, rows, slots[slot], gather_ids, target)
            self._settle()
            self.ahead = i, folding

    def _settle(self) -> None:
        if self.ahead is None:
            return
        i, folding = self.ahead
        self.ahead = None
        self.kept[i], logits = folding.settle()
        self.scores.append(self.kept[i].scores(logits, folding.gather_ids))

    def finish(self, result: GroupResult) -> None:
        self._settle()
        task, group = self.task, self.group
        whole = Scores(*(None if x[0] is None else torch.cat(x) for x in zip(*self.scores, strict=True)))  # type: ignore[arg-type]
        dlogprobs = task.coefficients(group.span, group.rows - group.span.start, whole)
        result.add(group.rows, whole)
        if not any(task.needs):
            return
        # Last chunk first: its slot is where the others are scored again.
        for i in sorted(range(len(self.parts)), key=lambda i: (i not in self.kept, -i)):
            part = self.parts[i]
            rows, kept = group.rows[part], self.kept.get(i)
            _add_gradient(task, rows, kept, self.slots[-1], whole, dlogprobs, part, result, self.targets)


class _Targets(NamedTuple):
    """Logits of all rows' ids, [N], which ranks exchange at one time."""

    logits: Tensor
    slopes: Tensor | None

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.logits[rows], None if self.slopes is None else self.slopes[rows]


def _targets(task: GroupTask, scored: Tensor) -> _Targets:
    found = task.projection.select(scored).target_logits(task.ids[scored])
    n = task.ids.shape[0]
    return _Targets(*(None if x is None else x.new_zeros(n).index_copy_(0, scored, x) for x in found))  # type: ignore[arg-type]


def _fold(
    task: GroupTask,
    rows: Tensor,
    slot: Tensor,
    gather_ids: Tensor | None = None,
    target: tuple[Tensor, Tensor | None] | None = None,
) -> Folding:
    return Folding(
        task.projection.select(rows),
        task.ids[rows],
        gather_ids,
        slot[: rows.shape[0]],
        with_entropy=task.with_entropy,
        fold_slope=task.entropy_weight is None,
        with_top=task.with_top1,
        target=target,
    )


def _add_gradient(
    task: GroupTask,
    rows: Tensor,  # numbers of the chunk's rows
    e: Exponentials | None,  # theirs, if they were kept
    spare: Tensor,
    scores: Scores,  # of the group
    dlogprobs: Tensor,  # of the group
    part: slice,  # where the chunk is in the group
    result: GroupResult,
    targets: _Targets | None,
) -> None:
    dlogprobs, entropy = dlogprobs[part], None if scores.entropy is None else scores.entropy[part]
    keep = torch.ones_like(dlogprobs, dtype=torch.bool) if task.entropy_weight is not None else dlogprobs != 0
    if not bool(keep.any()):
        return
    if e is None:
        order = keep.nonzero().squeeze(1)
        target = None if targets is None else targets.of(rows[order])
        e, _ = _fold(task, rows[order], spare, target=target).settle()
    else:
        e, order = e.keep_rows(keep)
    rows = rows[order]
    x = task.projection.select(rows)
    operand, factor = gradient_operand(
        e, x, dlogprobs[order], None if entropy is None else entropy[order], task.entropy_weight, rows=rows.shape[0]
    )
    accumulate_gradients(x, rows, operand, factor[:, None], result.gradients)
