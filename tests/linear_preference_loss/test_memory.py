"""Peak memory of the process, measured by the operating system, of DPO's loss and its gradients."""

import functools

import pytest

from tests.memory import linux_only, peak_mb

SETUP = """
import sys
import torch
from benchmarks.cases import load
from benchmarks.shapes import Shape

case = load("linear_preference_loss_metrics")
loss = {"ours": "dppo_kernels", "trl": "trl"}[sys.argv[1]]
case.PROVIDERS[loss](case.inputs(Shape(16, 512, 100), torch.float32, torch.device("cpu"))).backward()
x = case.inputs(Shape(2048, 512, 32000), torch.float32, torch.device("cpu"))
"""
STEP = """
case.PROVIDERS[loss](x).backward()
kept = x.hidden.grad.nbytes + x.weight.grad.nbytes
"""


@functools.cache
def peak_of(provider: str) -> float:
    peak = peak_mb(SETUP, STEP, provider)
    print(f"{provider}: peak above inputs and gradients {peak:.0f} MB")
    return peak


@linux_only
def test_it_peaks_under_90_mb_above_inputs_and_gradients() -> None:
    """42 MB are the workspace, 8 a copy of the hidden states; the head's gradient once more would be 66."""
    assert 0 < peak_of("ours") < 90


@linux_only
@pytest.mark.perf
def test_it_needs_no_more_than_trl() -> None:
    pytest.importorskip("trl", reason="compares with TRL's kernels")
    assert 0 < peak_of("ours") <= peak_of("trl")
