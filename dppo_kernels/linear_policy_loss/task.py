"""One call of the fused policy loss: which rows it scores, and what scored rows contribute."""

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels._packing import Sequences
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_policy_loss.rows import PolicyRows, RowLoss, row_loss, stat_names
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.policy_spec import PolicyLossSpec


@dataclass(frozen=True)
class Task:
    """What the loss is a function of besides log-probs."""

    rows: PolicyRows
    spec: PolicyLossSpec
    bounds: Sequence[int] | None  # first rows of sequences and the end, where a ratio is of a sequence
    entropy_weight: Tensor | None  # dL/dH of every scored row, if there is an entropy bonus
    with_entropy: bool
    score_inactive: bool

    @functools.cached_property
    def scored(self) -> Tensor:
        """Rows that enter a GEMM: bool [N]."""
        sequences = self.sequences(slice(0, self.rows.mask.shape[0]))
        return self.rows.to_score(self.spec, sequences, score_inactive=self.score_inactive)

    def sequences(self, span: slice) -> Sequences | None:
        """Among consecutive rows, relative to the first; None where rows are by themselves."""
        if self.bounds is None or isinstance(self.bounds, range):
            return None if self.bounds is None else self.bounds.step
        first, last = bisect_left(self.bounds, span.start), bisect_right(self.bounds, span.stop)
        inside = [bound - span.start for bound in self.bounds[first:last]]
        return torch.tensor(inside, device=self.rows.mask.device)

    @property
    def stat_names(self) -> tuple[str, ...]:
        return stat_names(self.spec, ref=self.rows.ref_logprobs is not None, entropy=self.with_entropy)


@dataclass
class Totals:
    """Loss and metrics of the groups so far."""

    loss: Tensor  # scalar float64
    stats: dict[str, Stat]

    @classmethod
    def empty(cls, task: Task, dtype: torch.dtype) -> "Totals":
        mask = task.rows.mask
        nothing = partial_sums(torch.zeros_like(mask[:0], dtype=dtype), mask[:0])
        loss = torch.zeros((), dtype=torch.float64, device=mask.device)
        return cls(loss, dict.fromkeys(task.stat_names, nothing))

    def add(self, loss: RowLoss) -> None:
        self.loss += loss.loss
        for name, stat in loss.stats.items():
            self.stats[name] = self.stats[name].merge(stat)


def coefficients(task: Task, totals: Totals, span: slice, places: Tensor | None, scores: Scores) -> Tensor:
    """`Coefficients` of a policy loss, once its task and totals are bound: adds the group to the totals."""
    rows, scored = task.rows.take(span), task.scored[span]
    if places is not None and task.bounds is None:
        rows = rows.take(places)
        scored = torch.ones_like(rows.mask)
    elif places is not None:
        scores = scores.spread(places, scored.shape[0])
    loss = row_loss(rows._replace(mask=scored), scores, task.spec, task.entropy_weight, task.sequences(span))
    totals.add(loss)
    return loss.dlogprobs if places is None or task.bounds is None else loss.dlogprobs[places]
