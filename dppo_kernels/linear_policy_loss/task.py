"""One call of the fused policy loss and its result; and the designs that need no more than `linear_logprobs`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dppo_kernels._row_stats import Upstream
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection
from dppo_kernels.linear_policy_loss.design import Design
from dppo_kernels.linear_policy_loss.rows import PolicyRows, RowLoss, row_loss, stat_names
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.policy_spec import PolicyLossSpec

_UNSCORED = -1  # stands for the ids of rows that enter no GEMM


@dataclass(frozen=True)
class Task:
    """One call: what the loss is a function of, what is wanted, and how it is computed."""

    projection: Projection
    rows: PolicyRows
    spec: PolicyLossSpec
    design: Design
    sequence_length: int  # rows per sequence
    entropy_weight: Tensor | None  # dL/dH of every scored row, if there is an entropy bonus
    with_entropy: bool
    score_inactive: bool
    needs: Needs

    @functools.cached_property
    def scored(self) -> Tensor:
        """Rows that enter a GEMM: bool [N]."""
        return self.rows.to_score(self.spec, self.sequence_length, score_inactive=self.score_inactive)


@dataclass
class Result:
    """Loss, unscaled gradients in the statistics' precision, and per-row statistics (0 where a row was not scored)."""

    loss: Tensor  # scalar float64
    logprobs: Tensor  # [N]
    entropy: Tensor | None  # [N]
    gradients: Gradients
    stats: dict[str, Stat]

    @classmethod
    def empty(cls, task: Task, *, with_gradients: bool = True) -> "Result":
        x = task.projection
        zeros = x.hidden.new_zeros(x.hidden.shape[0], dtype=x.dtype)
        nothing = partial_sums(zeros[:0], task.rows.mask[:0])
        return cls(
            zeros.new_zeros((), dtype=torch.float64),
            zeros,
            zeros.clone() if task.with_entropy else None,
            Gradients(
                *(
                    torch.zeros_like(i, dtype=x.dtype, memory_format=torch.contiguous_format)
                    if with_gradients and need and i is not None
                    else None
                    for i, need in zip(x.inputs(), task.needs, strict=True)
                )
            ),
            dict.fromkeys(stat_names(task.spec, ref=task.rows.ref_logprobs is not None, entropy=task.with_entropy), nothing),
        )

    def add(self, rows: Tensor | slice, scores: Scores, loss: RowLoss) -> None:
        self.loss += loss.loss
        self.logprobs[rows] = scores.logprobs
        if self.entropy is not None and scores.entropy is not None:
            self.entropy[rows] = scores.entropy
        for name, stat in loss.stats.items():
            self.stats[name] = self.stats[name].merge(stat)


def two_pass_fwd(task: Task, score: Callable[..., dict[str, Tensor]], backward: Callable[..., Any]) -> Result:
    """Designs "score" and "recompute" on an implementation of `linear_logprobs`: score all rows, recompute for the gradient."""
    result = Result.empty(task, with_gradients=False)
    x, to_score = task.projection, task.scored
    ids = torch.where(to_score, task.rows.ids, _UNSCORED)
    outputs = frozenset(("logprobs", "entropy") if task.with_entropy else ("logprobs",))
    values = score(x, ids, task.rows.topk_ids, ignore_index=_UNSCORED, outputs=outputs)
    scores = Scores(values["logprobs"], values["entropy"] if task.with_entropy else None, values.get("gathered"))
    rows = task.rows._replace(mask=to_score)
    length = task.sequence_length if task.spec.ratio_level == "sequence" else None
    loss = row_loss(rows, scores, task.spec, task.entropy_weight, length)
    result.add(slice(None), scores, loss)
    if any(task.needs):
        dentropy = None if task.entropy_weight is None else torch.where(to_score, task.entropy_weight.to(x.dtype), 0.0)
        saved = {"row_max": values["row_max"], "log_sum": values["log_sum"]}
        if dentropy is not None:
            saved["entropy"] = values["entropy"]
        dlogprobs, unit = loss.dlogprobs, None
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
