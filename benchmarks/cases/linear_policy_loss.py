"""Policy loss from hidden states and the lm_head, forward and backward: ours, TRL, Liger, full logits, compiled full logits.

Variants of one loss differ by their inputs: DAPO's clipped loss with all rows active, with half of them at advantage 0, with a
frozen head; and DPPO's top-K TV loss. The anchor is the policy itself plus noise too small for clip or trust region, in any
precision, so that every row with an advantage carries gradient: the work is what `work` says it is.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import OURS, POLICY_LOSSES
from benchmarks.cases.linear_logprobs import KEEPS_LOGITS, needs_bytes, with_tf32
from benchmarks.shapes import Shape

K = 20
SEQUENCES = 8  # few and long: Liger works, and accumulates the head's gradient, sequence by sequence
NOISE = 0.05
UNFUSED = "dppo_kernels unfused"


class Inputs(NamedTuple):
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [B, T] sampled from the policy
    anchor: Tensor  # [B, T] log-probs
    advantages: Tensor  # [B]
    mask: Tensor  # bool [B, T]
    upstream: Tensor  # scalar
    topk_ids: Tensor | None  # [B, T, K + 1]: with these the loss is DPPO's
    topk_anchor: Tensor | None  # [B, T, K + 1] log-probs
    topk_valid: Tensor | None  # bool [B, T, K + 1]


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import linear_policy_loss

    topk = {"rollout_topk_ids": x.topk_ids, "rollout_topk_logprobs": x.topk_anchor, "topk_valid": x.topk_valid}
    return linear_policy_loss(x.hidden, x.weight, x.ids, x.anchor, x.advantages, x.mask, spec=_spec(x), **topk)[0]


def unfused(x: Inputs) -> Tensor:
    from dppo_kernels import linear_logprobs, policy_loss

    scores = linear_logprobs(x.hidden, x.weight, x.ids, gather_ids=x.topk_ids)
    topk = {"topk_logprobs": scores.gathered, "rollout_topk_logprobs": x.topk_anchor, "topk_valid": x.topk_valid}
    return policy_loss(scores.logprobs, x.anchor, x.advantages, x.mask, spec=_spec(x), **topk)[0]


def trl(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden = x.hidden.reshape(-1, x.hidden.shape[-1])
    arguments = (hidden, x.weight, None, x.ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    return clip_loss(ChunkedLogProbFunction.apply(*arguments)[0].view_as(x.ids), x)


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    spec = _spec(x)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=spec.epsilon_low, epsilon_high=spec.epsilon_high, loss_type="dapo"
    )
    return loss(x.hidden, x.weight, x.ids, x.mask, x.advantages, old_per_token_logps=x.anchor)[0]


def naive(x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.hidden, x.weight)
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    sampled = logprobs.gather(-1, x.ids[..., None]).squeeze(-1)
    if x.topk_ids is None:
        return clip_loss(sampled, x)
    return topk_tv_loss(sampled, logprobs.detach().gather(-1, x.topk_ids.clamp(min=0)), x)


@functools.cache
def _compiled_naive():  # type: ignore[no-untyped-def]
    return torch.compile(naive, dynamic=False)


def compiled(x: Inputs) -> Tensor:
    return _compiled_naive()(x)


def clip_loss(logprobs: Tensor, x: Inputs) -> Tensor:
    """DAPO's loss as TRL's GRPO trainer computes it."""
    spec, advantages = _spec(x), x.advantages[:, None]
    ratio = torch.exp(logprobs - x.anchor)
    clipped = torch.clamp(ratio, 1 - spec.epsilon_low, 1 + spec.epsilon_high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    return (per_token * x.mask).sum() / x.mask.sum().clamp(min=1.0)


def topk_tv_loss(logprobs: Tensor, topk_logprobs: Tensor, x: Inputs) -> Tensor:
    """DPPO's loss (arXiv 2602.04879, eq. 11-12) with the TV of the top K, the sampled token, and one bucket for all others."""
    spec, advantages = _spec(x), x.advantages[:, None]
    assert x.topk_anchor is not None
    p, m = (torch.where(x.topk_valid, log.exp(), 0.0) for log in (topk_logprobs, x.topk_anchor))
    other_p, other_m = ((1 - kept.sum(-1)).clamp(min=1e-12) for kept in (p, m))
    divergence = ((p - m).abs().sum(-1) + (other_p - other_m).abs()) / 2
    ratio = torch.exp(logprobs.detach() - x.anchor)
    leaves_up = (advantages > 0) & (ratio > 1) & (divergence > spec.epsilon_high)
    leaves_down = (advantages < 0) & (ratio < 1) & (divergence > spec.epsilon_low)
    per_token = -advantages * ratio.clamp(max=spec.ratio_cap) * ~(leaves_up | leaves_down) * logprobs
    return (per_token * x.mask).sum() / x.mask.sum().clamp(min=1.0)


@dataclass(frozen=True)
class Variant:
    """A case: the same providers on inputs of one kind."""

    half: bool = False  # of the sequences have advantage 0
    trains_head: bool = True
    topk: bool = False

    MODES: ClassVar = ("forward+backward",)
    MAX_ERROR: ClassVar = {torch.float32: 1e-4, torch.bfloat16: 1e-4}
    MAX_GRADIENT_ERROR: ClassVar = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

    @functools.cached_property
    def PROVIDERS(self) -> dict[str, Callable[[Inputs], Tensor]]:
        full_logits = {"naive": naive, "torch.compile": compiled}
        if self.topk:  # TRL and Liger gather no top-K log-probs
            return {OURS: ours, UNFUSED: unfused, **full_logits}
        return {OURS: ours, UNFUSED: unfused, "trl": trl, "liger": liger, "liger tf32": with_tf32(liger), **full_logits}

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(shape.n, shape.h, generator=g, device=device).to(dtype)
        weight = (4 / shape.h**0.5 * torch.randn(shape.v, shape.h, generator=g, device=device)).to(dtype)
        advantages = torch.randn(SEQUENCES, generator=g, device=device)
        if self.half:
            advantages[::2] = 0
        ids, anchor, topk = _rollout(hidden, weight, g, self.topk)
        lead = (SEQUENCES, shape.n // SEQUENCES)
        return Inputs(
            hidden.view(*lead, shape.h).requires_grad_(),
            weight.requires_grad_(self.trains_head),
            ids.view(lead),
            anchor.view(lead),
            advantages,
            torch.ones(lead, dtype=torch.bool, device=device),
            torch.ones((), device=device),
            *(None if part is None else part.view(*lead, -1) for part in topk),
        )

    def rows(self, x: Inputs, n: int) -> Inputs:
        """Of every sequence the first tokens."""

        def cut(per_token: Tensor | None) -> Tensor | None:
            return None if per_token is None else per_token[:, : max(1, n // SEQUENCES)]

        return Inputs(
            *(part if name in ("weight", "advantages", "upstream") else cut(part) for name, part in x._asdict().items())
        )

    def exact(self, x: Inputs) -> Tensor:
        return naive(x)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        """2 NHV a product: projection (again in the backward, unless logits or exponentials are kept) and a gradient each.

        Without an advantage a row needs no projection in our fused loss, and no gradient in either of ours.
        """
        active = 0.5 if self.half else 1.0
        scored = active if provider == OURS else 1.0
        carried = active if provider in (OURS, UNFUSED) else 1.0
        projected_again = provider not in (OURS, *KEEPS_LOGITS)
        products = scored + (projected_again + 1 + self.trains_head) * carried
        return 2 * products * shape.n * shape.h * shape.v, "flop"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return needs_bytes(shape, provider)


VARIANTS = dict(
    zip(POLICY_LOSSES, (Variant(), Variant(half=True), Variant(trains_head=False), Variant(topk=True)), strict=True)
)


def _spec(x: Inputs):  # type: ignore[no-untyped-def]
    from dppo_kernels import PRESETS

    return PRESETS["dapo" if x.topk_ids is None else "dppo_topk_tv"]


def _rollout(
    hidden: Tensor, weight: Tensor, g: torch.Generator, topk: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """What a sampler close to the policy records: ids, log-probs, and the top K with the sampled token injected."""
    from dppo_kernels import topk_logprobs

    recorded = []
    for rows in hidden.split(64):
        logits = rows.float() @ weight.float().t()
        ids = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(1)
        recorded.append((ids, topk_logprobs(logits, ids, K)))
    ids = torch.cat([part for part, _ in recorded])
    noise = NOISE * (2 * torch.rand(ids.shape, generator=g, device=ids.device) - 1)
    logprobs, top_ids, top_logprobs, valid = (
        torch.cat([getattr(top, name) for _, top in recorded]) for name in ("sampled_logprobs", "ids", "logprobs", "valid")
    )
    return ids, logprobs + noise, (top_ids, top_logprobs + noise[:, None], valid) if topk else (None, None, None)
