"""Preference losses (DPO and its family) of the log-probs of whole sequences; the formulas are in `preference_formulas`."""

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.policy import Stat, partial_sums
from dppo_kernels.preference_formulas import Pairs, pair_losses
from dppo_kernels.preference_spec import SORTING_LOSSES, PreferenceSpec


def preference_loss(
    chosen_logprobs: Tensor,  # [P]
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    spec: PreferenceSpec | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    sft_logprobs: Tensor | None = None,
    pair_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    token_denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Stat]]:
    """Mean loss of P preference pairs, differentiable in the policy's log-probs, with partial sums of what is monitored.

    Args:
        chosen_logprobs: [P] log-probs of the chosen completions under the policy, sums over their tokens (`sequence_logprobs`).
        rejected_logprobs: [P] of the rejected ones.
        ref_chosen_logprobs: [P] under the reference, which gets no gradient. With the policy as it is at first, the loss of
            "sigmoid" is exactly log 2.
        ref_rejected_logprobs: [P]
        spec: the loss (default: DPO at beta 0.1).
        chosen_lengths: [P] numbers of completion tokens; needed by "ipo", "sigmoid_norm" and "sft".
        rejected_lengths: [P]
        sft_logprobs: [P] what "sft" is the mean over tokens of, if `chosen_logprobs` are weighted (LD-DPO). Default: those.
        pair_weights: [P] detached; multiplies the pairs' losses (WPO's weights).
        denominator: replaces the number of pairs, so that micro-batches and ranks that divide by the same number add up to the
            loss of the whole batch. (Not where pairs are sorted, nor in "sft" with `pair_weights`, whose mean it takes.)
        token_denominator: replaces the number of chosen tokens in "sft".

    Returns:
        Scalar loss in float32 (float64 for float64 inputs), and stats over pairs: "logprobs_chosen", "logprobs_rejected",
        "rewards_chosen" and "rewards_rejected" (beta times the log-ratio to the reference), "margins" (their difference) and
        "accuracies" (whether it is positive).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or lengths missing that `spec` needs.

    Source: DPO, Rafailov et al. (2305.18290); the family, see `PreferenceSpec`.
    """
    spec = PreferenceSpec() if spec is None else spec
    named = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    named |= {k: x for k, x in (("sft_logprobs", sft_logprobs), ("pair_weights", pair_weights)) if x is not None}
    for name, tensor in named.items():
        _checks.check_floating(name, tensor)
    if chosen_logprobs.dim() != 1:
        raise ValueError(f"`chosen_logprobs` must be [P], one sum per pair, got {list(chosen_logprobs.shape)}")
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    given: dict[str, Tensor | None] = {**named, **lengths}
    for name, value in given.items():
        if value is not None:
            _checks.check_tensor(name, value)
            _checks.check_shape(name, value, chosen_logprobs.shape, "[P] of `chosen_logprobs`")
            _checks.check_device(name, value, "chosen_logprobs", chosen_logprobs)
    if pair_weights is not None and set(spec.loss_type) & set(SORTING_LOSSES):
        raise ValueError(f"`pair_weights` weigh pairs, and `loss_type`={list(spec.loss_type)} sorts chosen and rejected apart")
    if spec.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"`loss_type`={list(spec.loss_type)} needs `chosen_lengths` and `rejected_lengths`")
    policy = [x.double() for x in (chosen_logprobs, rejected_logprobs)]
    reference = [x.detach().double() for x in (ref_chosen_logprobs, ref_rejected_logprobs)]
    at_least_one = [None if x is None else x.clamp(min=1).double() for x in (chosen_lengths, rejected_lengths)]
    pairs = Pairs(*policy, *reference, *at_least_one)
    normaliser = Normaliser.of(pairs, chosen_lengths, pair_weights, spec, denominator, token_denominator)
    sft = policy[0] if sft_logprobs is None else sft_logprobs.double()
    return normaliser.loss(pairs, sft, spec).to(stat_dtype(chosen_logprobs.dtype)), pair_stats(pairs, spec)


class Normaliser(NamedTuple):
    """What losses of pairs and of chosen tokens are multiplied by before they are added up; float64."""

    on_pairs: Tensor  # [P]
    on_tokens: Tensor  # scalar

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        chosen_lengths: Tensor | None,
        pair_weights: Tensor | None,
        spec: PreferenceSpec,
        denominator: float | Tensor | None,
        token_denominator: float | Tensor | None,
    ) -> "Normaliser":
        like = pairs.chosen.detach()
        weights = torch.ones_like(like) if pair_weights is None else pair_weights.detach().double()
        count = number("denominator", denominator, like)
        if count is None:
            count = like.new_full((), max(like.shape[0], 1))  # filled on the device: no copy that waits
        on_tokens = like.new_zeros(())
        if "sft" in spec.loss_type:
            tokens = number("token_denominator", token_denominator, like)
            if tokens is None:
                assert chosen_lengths is not None
                tokens = chosen_lengths.sum().clamp(min=1).double()
            mean_weight = 1.0 if pair_weights is None else weights.mean()
            on_tokens = spec.weighted_losses["sft"] * mean_weight / tokens
        return cls(weights / count, on_tokens)

    def loss(self, pairs: Pairs, sft_logprobs: Tensor, spec: PreferenceSpec) -> Tensor:
        """Scalar float64; `sft_logprobs` [P] are unweighted sums over the chosen tokens."""
        return (self.on_pairs * pair_losses(pairs, spec)).sum() - (self.on_tokens * sft_logprobs).sum()


def number(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A normaliser that was given as a positive number or a tensor of one, of dtype and device of `like`."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`{name}` must be one number, got shape {list(value.shape)}")
        return value.detach().to(like.device, like.dtype).reshape(())
    _checks.check_positive(name, value)
    return like.new_full((), value)


@torch.no_grad()
def pair_stats(pairs: Pairs, spec: PreferenceSpec) -> dict[str, Stat]:
    """What is monitored of pairs."""
    rewards = [spec.beta * (policy - ref) for policy, ref in zip(pairs[:2], pairs[2:4], strict=True)]
    values = {
        "logprobs_chosen": pairs.chosen,
        "logprobs_rejected": pairs.rejected,
        "rewards_chosen": rewards[0],
        "rewards_rejected": rewards[1],
        "margins": rewards[0] - rewards[1],
        "accuracies": (rewards[0] > rewards[1]).double(),
    }
    every = torch.ones_like(pairs.chosen, dtype=torch.bool)
    return {name: partial_sums(value, every) for name, value in values.items()}


def sequence_logprobs(logprobs: Tensor, loss_mask: Tensor, *, ld_alpha: float | None = None) -> Tensor:
    """Log-probs of completions: per-token ones [2P, T] of chosen, then rejected sequences, summed over the mask to [2P].

    Args:
        logprobs: [2P, T] of the tokens that rows predict: ``logprobs[:, t]`` is of token t + 1 of the sequence.
        loss_mask: bool [2P, T], True where the predicted token is of the completion, its end token included; not where it is of
            the prompt or padding. Whatever stands behind it, NaN included, changes nothing.
        ld_alpha: weight of tokens beyond the length of the pair's shorter completion (LD-DPO, 2409.06411). None: 1.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or `ld_alpha` outside [0, 1].
    """
    _checks.check_floating("logprobs", logprobs)
    _checks.check_mask("loss_mask", loss_mask)
    if logprobs.dim() != 2 or logprobs.shape[0] % 2:
        raise ValueError(f"`logprobs` must be [2P, T], chosen then rejected, got {list(logprobs.shape)}")
    _checks.check_shape("loss_mask", loss_mask, logprobs.shape, "that of `logprobs`")
    n, length = logprobs.shape
    sequences = torch.arange(n, device=logprobs.device).repeat_interleave(length)
    weights = token_weights(sequences, loss_mask.reshape(-1), n // 2, ld_alpha, stat_dtype(logprobs.dtype))
    return (torch.where(loss_mask, logprobs, 0.0) * weights.view(n, length)).sum(1)


def token_weights(sequences: Tensor, mask: Tensor, n_pairs: int, ld_alpha: float | None, dtype: torch.dtype) -> Tensor:
    """What the log-prob of each row [N] counts for in that of its sequence: 0 behind the mask, else 1, or `ld_alpha` in a tail.

    Args:
        sequences: int64 [N] numbers of sequences in [0, 2P); sequence i + P is the rejected one of pair i.
        mask: bool [N]
        n_pairs: P.
    """
    weights = mask.to(dtype)
    if ld_alpha is None:
        return weights
    _checks.check_fraction("ld_alpha", ld_alpha)
    lengths = sequence_lengths(sequences, mask, n_pairs)
    shared = torch.minimum(*lengths.view(2, n_pairs)).repeat(2)
    # The place of each counted row within its sequence: rows are brought together by sequence, and counted from its first.
    order = torch.sort(sequences, stable=True).indices
    counted = mask[order].cumsum(0)
    before = lengths.cumsum(0) - lengths
    place = torch.empty_like(counted).scatter_(0, order, counted - before[sequences[order]])
    return torch.where(place > shared[sequences], ld_alpha * weights, weights)


def sequence_lengths(sequences: Tensor, mask: Tensor, n_pairs: int) -> Tensor:
    """Counted rows of every sequence, int64 [2P]."""
    return sum_by_sequence(sequences, mask.long(), n_pairs)


def sum_by_sequence(sequences: Tensor, values: Tensor, n_pairs: int) -> Tensor:
    """Sums [2P] of `values` [N], integers or float64; accumulating `index_put` has one order of summation on CUDA."""
    return values.new_zeros(2 * n_pairs).index_put_((sequences,), values, accumulate=True)
