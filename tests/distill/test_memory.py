"""Peak memory of the process, measured by the operating system, of a divergence and the student's gradients."""

import functools

import pytest

from tests.memory import linux_only, peak_mb

SETUP = """
import sys
import torch
from dppo_kernels import linear_distill_loss

def ours(kind, hidden, weight, other, other_weight, mask):
    return linear_distill_loss(hidden, weight, other, other_weight, mask, kind=kind)[0]

def trl(kind, hidden, weight, other, other_weight, mask):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
    return ChunkedDivergenceFunction.apply(hidden, weight, None, other, other_weight, None, beta)[0].mean()

def inputs(n, h, t, v):
    hidden, weight = torch.randn(n, h).requires_grad_(), torch.randn(v, h).requires_grad_()
    return hidden, weight, torch.randn(n, t), torch.randn(v, t), torch.ones(n, dtype=torch.bool)

loss, kind = {"ours": ours, "trl": trl}[sys.argv[1]], sys.argv[2]
loss(kind, *inputs(2, 256, 384, 100)).backward()
hidden, weight, *others = inputs(512, 256, 384, 32000)
"""
STEP = """
loss(kind, hidden, weight, *others).backward()
kept = hidden.grad.nbytes + weight.grad.nbytes
"""


@functools.cache
def peak_of(provider: str, kind: str) -> float:
    peak = peak_mb(SETUP, STEP, provider, kind)
    print(f"{provider}, {kind}: peak above inputs and gradients {peak:.0f} MB")
    return peak


@linux_only
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_it_peaks_under_115_mb_above_inputs_and_gradients(kind: str) -> None:
    """84 MB are the workspace; one copy of the head's gradient, which must not be made, would be 33 MB more than the 96."""
    assert 0 < peak_of("ours", kind) < 115


@linux_only
@pytest.mark.perf
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_no_kind_needs_more_than_trls(kind: str) -> None:
    pytest.importorskip("trl", reason="compares with TRL's kernels")
    assert 0 < peak_of("ours", kind) <= peak_of("trl", kind)
