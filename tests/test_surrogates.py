"""The closed-form gradient of every policy loss is what autograd finds."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dppo_kernels import PRESETS
from dppo_kernels.surrogates import Tokens, gradient_on_logprobs, token_losses
from tests.test_policy import SEEDS, inputs_of

VARIANTS = {
    "plain": {},
    "kl": {"beta": 0.1},
    "weighted kl": {"beta": 0.1, "kl_ratio_weighted": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
@given(seed=SEEDS, cap=st.sampled_from([None, 1.05, 1.5]), far=st.booleans(), weighted=st.booleans())
@example(seed=0, cap=1.05, far=True, weighted=True)
def test_gradient_is_that_of_autograd(name: str, variant: str, seed: int, cap: float | None, far: bool, weighted: bool) -> None:
    spec = PRESETS[name].replace(**VARIANTS[variant])
    if spec.surrogate in ("clip", "divergence"):
        spec = spec.replace(ratio_cap=cap)
    x = inputs_of(name, seed)
    mask = x["loss_mask"]
    g = torch.Generator().manual_seed(seed)
    logp = torch.where(mask, x["logprobs"].detach(), 0.0)
    if far:
        logp[:, 0] -= 50 * mask[:, 0]  # beyond the clamp of the log-ratio
    leaf = logp.requires_grad_()
    logp = torch.where(mask, leaf, 0.0)
    anchor = torch.where(mask, x["anchor_logprobs"], 0.0)
    anchor[:, 1] = logp.detach()[:, 1]  # ratio exactly 1
    advantages = torch.where(mask, x["advantages"][:, None], 0.0)
    ref = torch.where(mask, anchor + torch.randn(mask.shape, generator=g, dtype=anchor.dtype), 0.0) if spec.beta else None
    topk = {k: x.get(k) for k in ("topk_logprobs", "rollout_topk_logprobs", "topk_valid")}
    token_weights = torch.rand(mask.shape, generator=g, dtype=anchor.dtype) if weighted else None
    tokens = Tokens(logp, anchor, advantages, mask, token_weights, ref, **topk)
    loss_weights = torch.rand(mask.shape, generator=g, dtype=anchor.dtype) * mask
    losses, metrics = token_losses(tokens, spec)
    (expected,) = torch.autograd.grad((losses * loss_weights)[mask].sum() + 0 * leaf.sum(), leaf)
    found = gradient_on_logprobs(tokens, loss_weights, metrics, spec)
    torch.testing.assert_close(found, expected)
