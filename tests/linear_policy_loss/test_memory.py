"""Peak memory of the process, measured by the operating system, of a policy loss and its gradients with a trained head."""

import functools

from tests.memory import linux_only, peak_mb

SETUP = """
import sys
import torch
from dppo_kernels import PRESETS, linear_policy_loss, policy_loss

def fused(hidden, weight, ids, *others):
    return linear_policy_loss(hidden, weight, ids, *others, spec=PRESETS["dapo"])[0]

def naive(hidden, weight, ids, *others):
    logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(1, ids[:, None]).squeeze(1)
    return policy_loss(logprobs, *others, spec=PRESETS["dapo"])[0]

def inputs(n, h, v):
    hidden, weight = (torch.randn(rows, h).requires_grad_() for rows in (n, v))
    return hidden, weight, torch.randint(0, v, (n,)), torch.full((n,), -10.0), torch.randn(n), torch.ones(n, dtype=torch.bool)

loss = {"fused": fused, "naive": naive}[sys.argv[1]]
loss(*inputs(2, 512, 100)).backward()
hidden, weight, *others = inputs(1024, 512, 32000)
"""
STEP = """
loss(hidden, weight, *others).backward()
kept = hidden.grad.nbytes + weight.grad.nbytes
"""


@functools.cache
def peak_of(design: str) -> float:
    peak = peak_mb(SETUP, STEP, design)
    print(f"{design}: peak above inputs and gradients {peak:.0f} MB")
    return peak


@linux_only
def test_the_fused_loss_peaks_under_64_mb_above_inputs_and_gradients() -> None:
    """A chunk of exponentials is 33 MB; one copy of the head's gradient, which must not be made, would be 66 MB."""
    assert 0 < peak_of("fused") < 64


@linux_only
def test_full_logits_need_four_times_as_much() -> None:
    assert peak_of("naive") > 4 * peak_of("fused")
