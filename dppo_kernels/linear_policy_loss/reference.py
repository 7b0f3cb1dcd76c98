"""Definition of the fused policy loss: `policy_loss` of what `linear_logprobs` scores, each in its own reference."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels._lora import LoraWeight
from dppo_kernels.linear_logprobs import linear_logprobs
from dppo_kernels.policy import Stat, partial_sums, policy_loss
from dppo_kernels.policy_spec import PolicyLossSpec

IGNORED = -100  # stands for ids behind the mask, whatever they are


class PolicyAux(NamedTuple):
    """Per-token results, detached; 0 where a token was not scored."""

    logprobs: Tensor  # shape of the ids
    entropy: Tensor | None  # nats
    scored: Tensor  # bool: tokens that entered the head's GEMM


def linear_policy_loss_ref(
    hidden: Tensor,  # [..., H]
    weight: Tensor | LoraWeight,
    ids: Tensor,
    anchor_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    spec: PolicyLossSpec,
    head: dict[str, Any],  # bias, temperature, logit_scale, softcap
    topk: tuple[Tensor | None, Tensor | None, Tensor | None],  # ids, log-probs, validity
    with_entropy: bool,
    check_values: bool,
    **options: Any,  # of `policy_loss`
) -> tuple[Tensor, dict[str, Stat], PolicyAux]:
    """Loss, stats over every token that counts, and per-token results; autograd differentiates it."""
    topk_ids, rollout_topk_logprobs, topk_valid = topk
    counted = loss_mask[..., None]
    scores = linear_logprobs(
        torch.where(counted, hidden, 0.0),  # NaN behind the mask would reach the head's gradient
        weight,
        ids.masked_fill(~loss_mask, IGNORED),
        gather_ids=None if topk_ids is None else topk_ids.masked_fill(~counted, IGNORED),
        ignore_index=IGNORED,
        outputs=("logprobs", "entropy") if with_entropy else ("logprobs",),
        backend="reference",
        check_values=check_values,
        **head,
    )
    assert scores.logprobs is not None
    loss, stats = policy_loss(
        scores.logprobs,
        anchor_logprobs,
        advantages,
        loss_mask,
        spec=spec,
        entropy=scores.entropy,
        topk_logprobs=scores.gathered,
        rollout_topk_logprobs=rollout_topk_logprobs,
        topk_valid=topk_valid,
        **options,
    )
    stats["unscored"] = partial_sums(torch.zeros_like(loss_mask), loss_mask)
    entropy = None if scores.entropy is None else scores.entropy.detach()
    return loss, stats, PolicyAux(scores.logprobs.detach(), entropy, loss_mask)
