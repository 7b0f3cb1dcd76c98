"""KL estimators: expectations under the policy, gradients, the clamp."""

import pytest
import torch

from dppo_kernels import kl_estimate, log_ratio
from tests.strategies import probabilities


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    log_pi, log_ref = probabilities(20, 4, 0)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum(1)
    for kind in ("k1", "k3"):
        torch.testing.assert_close((log_pi.exp() * kl_estimate(kind, log_pi, log_ref)).sum(1), exact)
    assert (kl_estimate("k3", log_pi, log_ref) >= 0).all()
    assert (kl_estimate("k2", log_pi, log_ref) >= 0).all()


def test_gradients_vanish_at_the_reference() -> None:
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    for kind in ("k2", "k3"):
        (grad,) = torch.autograd.grad(kl_estimate(kind, logprobs, logprobs.detach()).sum(), logprobs)
        assert not grad.any()


def test_log_ratio_is_clamped_at_twenty() -> None:
    logprobs = torch.tensor([0.0, -60.0, -1.0], requires_grad=True)
    ratio = log_ratio(logprobs, torch.tensor([-60.0, 0.0, -2.0]))
    assert ratio.tolist() == [20.0, -20.0, 1.0]
    assert torch.autograd.grad(ratio.sum(), logprobs)[0].tolist() == [0.0, 0.0, 1.0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`kind` must be one of 'k1'"):
        kl_estimate("k4", torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="`ref_logprobs` must have shape"):
        kl_estimate("k1", torch.zeros(2), torch.zeros(3))
