"""One call of the fused policy loss: which rows it scores, and what scored rows contribute."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_policy_loss.rows import PolicyRows, RowLoss, row_loss, stat_names
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.policy_spec import PolicyLossSpec


@dataclass(frozen=True)
class Task:
    """What the loss is a function of besides log-probs."""

    rows: PolicyRows
    spec: PolicyLossSpec
    sequence_length: int  # rows per sequence
    entropy_weight: Tensor | None  # dL/dH of every scored row, if there is an entropy bonus
    with_entropy: bool
    score_inactive: bool

    @functools.cached_property
    def scored(self) -> Tensor:
        """Rows that enter a GEMM: bool [N]."""
        return self.rows.to_score(self.spec, self.sequence_length, score_inactive=self.score_inactive)

    @property
    def unit(self) -> int | None:
        """Rows whose coefficients become known together; None: each by itself."""
        return self.sequence_length if self.spec.ratio_level == "sequence" else None

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
    if places is not None and task.unit is None:
        rows = rows.take(places)
        scored = torch.ones_like(rows.mask)
    elif places is not None:
        scores = scores.spread(places, scored.shape[0])
    loss = row_loss(rows._replace(mask=scored), scores, task.spec, task.entropy_weight, task.unit)
    totals.add(loss)
    return loss.dlogprobs if places is None or task.unit is None else loss.dlogprobs[places]
