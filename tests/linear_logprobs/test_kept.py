"""A trained head with a workspace: kept logits change the work and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels import linear_logprobs
from dppo_kernels._row_stats import Upstream
from dppo_kernels.linear_logprobs import torch_impl
from dppo_kernels.linear_logprobs.projection import Projection
from tests.census import GemmFlops, linear_inputs
from tests.linear_logprobs.test_op import OUTPUTS, run
from tests.strategies import IGNORE, scoring_cases

N, V, H = 40, 203, 24


@given(scoring_cases(dtypes=(torch.float64,)), st.sampled_from([1, 5, 100]))
def test_gradients_are_those_of_recomputed_logits(case, rows: int) -> None:
    recomputed = run(case, torch.float64, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.linear_logprobs.test_op.linear_logprobs",
            lambda *x, **y: linear_logprobs(*x, **y, workspace_bytes=rows * case.vocab * 8),
        )
        kept = run(case, torch.float64, "torch")
    torch.testing.assert_close(kept, recomputed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [0, 1, 16, N])
def test_flops_of_kept_rows_are_six_of_others_eight(rows: int) -> None:
    """Every third row has no gradient: it was kept, and costs nothing more."""
    hidden, weight, ids, _ = linear_inputs(N, V, H, 1)
    ids[:4] = IGNORE
    x = Projection(hidden, weight, None, 1.0, 1.0, None, torch.float32)
    upstream = torch.ones(N)
    upstream[::3] = 0
    with GemmFlops() as forward:
        saved = torch_impl.linear_logprobs_fwd(
            x, ids, None, ignore_index=IGNORE, outputs=frozenset(["logprobs"]), keep_rows=rows
        )
    assert forward.flops == 2 * (N - 4) * H * V
    with GemmFlops() as backward:
        torch_impl.linear_logprobs_bwd(
            x, ids, None, Upstream(upstream, None, None, None), saved, ignore_index=IGNORE, needs=(True, True, False)
        )
    active = [n for n in range(4, N) if n % 3]
    recomputed = [n for n in active if n >= 4 + rows]
    assert backward.flops == (4 * len(active) + 2 * len(recomputed)) * H * V


def test_the_backward_can_run_again() -> None:
    hidden, weight, ids, gather_ids = linear_inputs(20, 40, 8, 3)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = linear_logprobs(*leaves, ids, gather_ids=gather_ids, outputs=OUTPUTS, softcap=4.0, workspace_bytes=7 * 40 * 4)
    loss = out.logprobs.sum() + out.gathered.sum() + out.entropy.sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_kept_fits_the_workspace() -> None:
    hidden, weight, ids, _ = linear_inputs(20, 40, 8, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_logprobs(hidden, weight.requires_grad_(), ids, workspace_bytes=7 * 40 * 4 + 3)
    assert [shape for shape in kept if len(shape) == 2 and shape[1] == 40] == [(7, 40)]
