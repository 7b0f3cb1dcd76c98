"""Losses of scored rows whose coefficients become known group by group: one call, its result, and the designs without chunks.

A group is a chunk of rows where the coefficient ``g = dL/dlogprob`` of a row depends on that row, and a run of whole sequences
where it depends on all rows of its sequence. Its rows are scored, a function gives their coefficients, and the gradient GEMMs
follow while the group's exponentials exist: 2 n1 HV and 4 n2 HV, over n1 rows that are scored and n2 of them with g != 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_logprobs.group_design import Design
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection

CHUNK_OUTPUTS = ("entropy", "is_top1")
_UNSCORED = -1  # stands for the ids of rows that enter no GEMM

# (a run of the caller's rows, which of them the scores are of, scores) -> g of the scores' rows. Without numbers of rows
# the scores are of the whole run, and whatever they hold of rows that were not scored must change nothing.
Coefficients = Callable[[slice, Tensor | None, Scores], Tensor]


@dataclass(frozen=True)
class GroupTask:
    """What is scored, what is wanted of it, and how it is computed."""

    projection: Projection
    ids: Tensor  # [N]
    scored: Tensor  # bool [N]: rows that enter a GEMM
    coefficients: Coefficients
    design: Design
    needs: Needs
    gather_ids: Tensor | None = None  # [N, K]
    # First rows of what has its coefficients known together (sequences, pairs), and the end; None: each row by itself.
    bounds: Sequence[int] | None = None
    entropy_weight: Tensor | None = None  # dL/dH of every scored row, if there is an entropy bonus
    counts: Sequence[int] | None = None  # scored rows of each sequence, if the host knows: groups hold as many as fit
    outputs: frozenset[str] = frozenset()  # besides log-probs, of `OUTPUTS`; designs in chunks have those of `CHUNK_OUTPUTS`

    def check_chunked(self) -> None:
        """Raises ValueError where a design in chunks is given outputs that it does not have."""
        if not self.outputs <= set(CHUNK_OUTPUTS):
            raise ValueError(f"design {self.design.name!r} has no {', '.join(sorted(self.outputs - set(CHUNK_OUTPUTS)))}")

    def rows_of_units(self) -> list[int]:
        """Scored rows of each unit between the bounds, or as many as there could be."""
        if self.counts is not None:
            return list(self.counts)
        assert self.bounds is not None, "rows by themselves have no units"
        return [stop - start for start, stop in pairwise(self.bounds)]

    @property
    def with_entropy(self) -> bool:
        return "entropy" in self.outputs

    @property
    def with_top1(self) -> bool:
        return "is_top1" in self.outputs


@dataclass
class GroupResult:
    """Per-row statistics, 0 where a row was not scored, and unscaled gradients in the statistics' precision."""

    rows: dict[str, Tensor]  # "logprobs" and the task's outputs, [N] each
    gradients: Gradients

    @property
    def logprobs(self) -> Tensor:
        return self.rows["logprobs"]

    @classmethod
    def empty(cls, task: GroupTask, *, with_gradients: bool = True) -> "GroupResult":
        x = task.projection
        zeros = x.hidden.new_zeros(x.hidden.shape[0], dtype=x.dtype)
        gradients = (
            torch.zeros_like(i, dtype=x.dtype, memory_format=torch.contiguous_format)
            if with_gradients and need and i is not None
            else None
            for i, need in zip(x.inputs(), task.needs, strict=True)
        )
        dtypes = {name: torch.bool if name == "is_top1" else x.dtype for name in ("logprobs", *sorted(task.outputs))}
        rows = {name: torch.zeros_like(zeros, dtype=dtype) for name, dtype in dtypes.items()}
        return cls(rows, Gradients(*gradients))

    def add(self, rows: Tensor, scores: Scores) -> None:
        for name, values in self.rows.items():
            values[rows] = getattr(scores, name)


def runs(counts: Sequence[int], capacity: int) -> Iterator[tuple[int, int, int]]:
    """(first, beyond the last, their rows) of consecutive sequences whose rows fit together; a longer one stands alone."""
    first, n = 0, 0
    for sequence, count in enumerate(counts):
        if n and n + count > capacity:
            yield first, sequence, n
            first, n = sequence, 0
        n += count
    if n:
        yield first, len(counts), n


def two_pass(task: GroupTask, score: Callable[..., dict[str, Tensor]], backward: Callable[..., Any]) -> GroupResult:
    """Designs "score" and "recompute" on an implementation of `linear_logprobs`: score all rows, recompute for the gradient."""
    result = GroupResult.empty(task, with_gradients=False)
    x = task.projection
    ids = torch.where(task.scored, task.ids, _UNSCORED)
    values = score(x, ids, task.gather_ids, ignore_index=_UNSCORED, outputs=task.outputs | {"logprobs"})
    result.rows = {name: values[name] for name in result.rows}
    found = {name: values[name] for name in Scores._fields if name in result.rows}
    dlogprobs = task.coefficients(slice(0, ids.shape[0]), None, Scores(**found, gathered=values.get("gathered")))
    if any(task.needs):
        dentropy = None if task.entropy_weight is None else torch.where(task.scored, task.entropy_weight.to(x.dtype), 0.0)
        saved = {"row_max": values["row_max"], "log_sum": values["log_sum"]}
        if dentropy is not None:
            saved["entropy"] = values["entropy"]
        unit = None
        if x.compute_dtype == torch.float16:
            # No loss scale has arrived yet: gradients near 1 / N would be rounded to float16's subnormals.
            largest = (
                dlogprobs.abs().amax() if dentropy is None else torch.maximum(dlogprobs.abs().amax(), dentropy.abs().amax())
            )
            unit = torch.exp2(largest.clamp(min=2.0**-60).log2().ceil() + 4)
            dlogprobs, dentropy = dlogprobs / unit, None if dentropy is None else dentropy / unit
        upstream = Upstream(dlogprobs, None, dentropy, None)
        gradients = backward(x, ids, None, upstream, saved, ignore_index=_UNSCORED, needs=task.needs)
        in_full = (None if g is None else g.to(x.dtype) for g in gradients)
        result.gradients = Gradients(*(g if g is None or unit is None else g.mul_(unit) for g in in_full))
    return result
