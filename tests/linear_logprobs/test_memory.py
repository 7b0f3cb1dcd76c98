"""Peak memory of the process, measured by the operating system, while scoring a vocabulary of 151936."""

import pytest
import torch

from dppo_kernels.linear_logprobs import torch_impl
from tests.census import LargestTensor
from tests.memory import linux_only, peak_mb

SETUP = """
import sys
import torch
from dppo_kernels import linear_logprobs

n, h, v, active = (int(x) for x in sys.argv[1:5])
dtype = getattr(torch, sys.argv[5])
warm = linear_logprobs(torch.randn(2, h, requires_grad=True), torch.randn(100, h), torch.zeros(2, dtype=torch.long))
warm.logprobs.sum().backward()
hidden, weight = (torch.randn(rows, h).to(dtype).requires_grad_() for rows in (n, v))
ids, gather_ids = torch.randint(0, v, (n,)), torch.randint(0, v, (n, 21))
ids[active:] = -100
"""
SCORE = """
out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, outputs=("logprobs", "entropy"))
(out.logprobs.sum() + out.entropy.sum() + out.gathered.sum()).backward()
kept = hidden.grad.nbytes + weight.grad.nbytes
"""


@linux_only
@pytest.mark.parametrize(
    ("n", "h", "v", "active", "dtype"),
    [
        pytest.param(4096, 64, 151936, 4096, "float32", id="full logits would be 2.5 GB"),
        # A few rows must not make a tile as wide as the vocabulary: its float32 head alone would be 622 MB.
        pytest.param(512, 1024, 151936, 4, "bfloat16", id="few active rows of a half-precision head"),
    ],
)
def test_scoring_peaks_under_400_mb_above_inputs_and_gradients(n: int, h: int, v: int, active: int, dtype: str) -> None:
    peak = peak_mb(SETUP, SCORE, n, h, v, active, dtype)
    print(f"peak above inputs and gradients: {peak:.0f} MB")
    assert 0 < peak < 400


def test_no_tensor_has_both_rows_and_vocabulary() -> None:
    n, h, v = 600, 4, 9000
    hidden, weight, ids = torch.randn(n, h), torch.randn(v, h), torch.randint(0, v, (n,))
    projection = torch_impl.Projection(hidden, weight, None, 1.0, 1.0, 5.0, torch.float32)
    grad = torch.randn(n)
    with LargestTensor() as largest:
        saved = torch_impl.linear_logprobs_fwd(
            projection, ids, None, ignore_index=-100, outputs=frozenset(["logprobs", "entropy", "is_top1"])
        )
        torch_impl.linear_logprobs_bwd(
            projection,
            ids,
            None,
            torch_impl.Upstream(grad, None, grad, None),
            saved,
            ignore_index=-100,
            needs=(True, True, False),
        )
    assert largest.nbytes < 4 * n * v / 4
