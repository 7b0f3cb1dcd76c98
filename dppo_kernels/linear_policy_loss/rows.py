"""Per-row inputs of a fused policy loss, which rows it has to score, and the row stage in torch: statistics to coefficients."""

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._packing import Sequences, sequence_sums, spread
from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.policy_spec import PolicyLossSpec
from dppo_kernels.surrogates import Tokens, gradient_on_logprobs, metric_names, token_losses


class PolicyRows(NamedTuple):
    """What the loss of each row depends on besides its log-probs; [N], `topk_*` [N, K]."""

    ids: Tensor
    mask: Tensor  # bool
    advantages: Tensor
    loss_weights: Tensor  # of every row's loss in the reduction
    anchor: Tensor | None
    ref_logprobs: Tensor | None
    token_weights: Tensor | None
    topk_ids: Tensor | None
    rollout_topk_logprobs: Tensor | None
    topk_valid: Tensor | None

    def take(self, rows: Tensor | slice) -> "PolicyRows":
        return PolicyRows(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def to_score(self, spec: PolicyLossSpec, sequences: Sequences | None, *, score_inactive: bool) -> Tensor:
        """Rows that the loss or its gradient depends on (all that count, if `score_inactive`): bool [N]."""
        if score_inactive or spec.scores_every_token:
            return self.mask
        active = self.mask & (self.advantages != 0)
        if self.token_weights is not None:
            active &= self.token_weights != 0
        if sequences is not None:  # one active token needs the ratio of its whole sequence
            return self.mask & spread(sequence_sums(active.float(), sequences) > 0, sequences, active.shape[0])
        return active


class RowLoss(NamedTuple):
    """The loss of some rows and what the gradient stage needs."""

    loss: Tensor  # scalar float64
    dlogprobs: Tensor  # [n]
    stats: dict[str, Stat]


def stat_names(spec: PolicyLossSpec, *, ref: bool, entropy: bool) -> tuple[str, ...]:
    """Names of `RowLoss.stats`, in order."""
    return (*metric_names(spec, ref=ref), *(("entropy",) if entropy else ()))


def row_loss(
    rows: PolicyRows, scores: Scores, spec: PolicyLossSpec, entropy_weight: Tensor | None, sequences: Sequences | None = None
) -> RowLoss:
    """Loss, coefficients and metrics of the rows that ``rows.mask`` says were scored.

    Args:
        scores: whatever they hold elsewhere changes nothing.
        entropy_weight: dL/dH of every scored row, if there is an entropy bonus.
        sequences: for a sequence-level ratio; rows are whole sequences then.
    """
    dtype = scores.logprobs.dtype

    def clean(values: Tensor) -> Tensor:
        return torch.where(rows.mask, values, 0.0).to(dtype)

    def optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values)

    mask = rows.mask
    tokens = Tokens(
        clean(scores.logprobs),
        clean(scores.logprobs if rows.anchor is None else rows.anchor),
        clean(rows.advantages),
        mask,
        optional(rows.token_weights),
        optional(rows.ref_logprobs),
        scores.gathered,
        rows.rollout_topk_logprobs,
        rows.topk_valid,
        sequences,
    )
    loss_weights = clean(rows.loss_weights)
    losses, metrics = token_losses(tokens, spec)
    dlogprobs = gradient_on_logprobs(tokens, loss_weights, metrics, spec)
    loss = torch.where(mask, losses * loss_weights, 0.0).sum(dtype=torch.float64)
    stats = {name: partial_sums(values, mask) for name, values in metrics.items()}
    if scores.entropy is not None:
        stats["entropy"] = partial_sums(scores.entropy, rows.mask)
        if entropy_weight is not None:
            loss = loss + entropy_weight * torch.where(rows.mask, scores.entropy, 0.0).sum(dtype=torch.float64)
    return RowLoss(loss, dlogprobs, stats)
