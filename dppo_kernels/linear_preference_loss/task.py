"""One call of the fused preference loss: which sequences its rows are of, and the coefficients of scored rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels.linear_logprobs.exponentials import Scores
from dppo_kernels.preference import Normaliser, sum_by_sequence
from dppo_kernels.preference_formulas import Pairs, pair_slopes
from dppo_kernels.preference_spec import PreferenceSpec


@dataclass(frozen=True)
class Task:
    """What the loss is a function of besides the rows' log-probs."""

    sequences: Tensor  # int64 [N] in [0, 2P); i + P is the rejected one of pair i
    mask: Tensor  # bool [N]
    row_weights: Tensor  # [N] what rows count for in the log-prob of their sequence
    lengths: Tensor  # int64 [2P] tokens of every sequence
    n_pairs: int
    spec: PreferenceSpec
    ref_logprobs: Tensor | None  # float64 [2P]; None until the reference is scored
    denominator: Tensor | None = None
    token_denominator: Tensor | None = None

    def reference(self) -> Tensor:
        assert self.ref_logprobs is not None
        return self.ref_logprobs

    def sums(self, rows: Tensor | slice, values: Tensor) -> Tensor:
        """Sums [2P], in float64, of rows' values; whatever they hold behind the mask changes nothing."""
        return sum_by_sequence(self.sequences[rows], torch.where(self.mask[rows], values, 0.0).double(), self.n_pairs)

    def sequence_logprobs(self, rows: Tensor | slice, logprobs: Tensor) -> Tensor:
        """[2P], float64."""
        return self.sums(rows, logprobs * self.row_weights[rows])

    def pairs(self, sequence_logprobs: Tensor) -> Pairs:
        lengths = self.lengths.clamp(min=1).double()
        halves = (x.view(2, self.n_pairs) for x in (sequence_logprobs, self.reference(), lengths))
        return Pairs(*(half for both in halves for half in both))

    def normaliser(self, pairs: Pairs, pair_weights: Tensor | None) -> Normaliser:
        return Normaliser.of(
            pairs, self.lengths[: self.n_pairs], pair_weights, self.spec, self.denominator, self.token_denominator
        )

    def pair_weights(self, pairs: Pairs, rows: Tensor | slice, scores: Scores) -> Tensor | None:
        """WPO's [P]: how likely the policy itself is to write both, each token against ``sum_v p_v^2``."""
        if not self.spec.use_weighting:
            return None
        assert scores.log_sum_sq_probs is not None
        chosen, rejected = self.sums(rows, scores.logprobs - scores.log_sum_sq_probs).view(2, self.n_pairs)
        lengths = pairs.lengths()
        return (chosen / lengths[0]).exp() * (rejected / lengths[1]).exp()

    def loss(self, logprobs: Tensor, log_sum_sq_probs: Tensor | None = None) -> Tensor:
        """Scalar float64, of the scores [N] of all rows; differentiable in the log-probs, not through WPO's weights."""
        every = slice(0, self.mask.shape[0])
        pairs = self.pairs(self.sequence_logprobs(every, logprobs))
        detached = Scores(logprobs.detach(), log_sum_sq_probs=log_sum_sq_probs)
        normaliser = self.normaliser(pairs, self.pair_weights(pairs, every, detached))
        return normaliser.loss(pairs, self.sums(every, logprobs)[: self.n_pairs], self.spec)

    def coefficients(self, span: slice, places: Tensor | None, scores: Scores) -> Tensor:
        """`Coefficients` of rows of whole pairs. Pairs without rows among them are taken for 0 and not asked for."""
        rows: Tensor | slice = span if places is None else places + span.start
        pairs = self.pairs(self.sequence_logprobs(rows, scores.logprobs))
        normaliser = self.normaliser(pairs, self.pair_weights(pairs, rows, scores))
        on_sequences = torch.cat(pair_slopes(pairs, normaliser.on_pairs, self.spec))
        sequences = self.sequences[rows]
        on_rows = on_sequences[sequences] * self.row_weights[rows]
        on_rows -= normaliser.on_tokens * ((sequences < self.n_pairs) & self.mask[rows])
        return torch.where(self.mask[rows], on_rows, 0.0).to(scores.logprobs.dtype)
