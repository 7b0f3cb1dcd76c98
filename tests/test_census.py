"""The work done equals the formulas: FLOPs of the torch path, elements that kernels move. And every kernel runs here."""

import importlib
import pkgutil

import pytest
import torch

import dppo_kernels
from dppo_kernels._row_stats import Upstream
from dppo_kernels._tiling import INTERPRETER_GRAD_PLAN, INTERPRETER_LSE_PLAN
from dppo_kernels.linear_logprobs import torch_impl
from dppo_kernels.linear_logprobs.projection import Projection
from tests.census import GemmFlops, counted_kernels, linear_inputs
from tests.strategies import IGNORE

N, V, H, K = 40, 203, 72, 5
NHV = N * H * V
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")


@pytest.mark.parametrize(
    ("needs", "expected"),
    [((True, True, False), 6), ((True, False, False), 4), ((False, True, False), 4), ((False, False, False), 2)],
)
@pytest.mark.parametrize("inactive", [0.0, 0.5])
def test_flops_of_the_torch_path(needs: tuple[bool, bool, bool], expected: int, inactive: float) -> None:
    """Forward 2 n1 HV; backward 2 n2 HV to recompute and 2 n2 HV for each trained input: 8 in all, 6 with a frozen head."""
    hidden, weight, ids, _ = linear_inputs(N, V, H, K)
    ids[:4] = IGNORE
    n1 = N - 4
    upstream = torch.ones(N)
    upstream[: 4 + int(inactive * n1)] = 0
    n2 = int((upstream != 0).sum())
    projection = Projection(hidden, weight, None, 1.0, 1.0, None, torch.float32)
    with GemmFlops() as forward:
        saved = torch_impl.linear_logprobs_fwd(projection, ids, None, ignore_index=IGNORE, outputs=frozenset(["logprobs"]))
    assert forward.flops == 2 * n1 * H * V
    with GemmFlops() as backward:
        grads = Upstream(upstream, None, None, None)
        torch_impl.linear_logprobs_bwd(projection, ids, None, grads, saved, ignore_index=IGNORE, needs=needs)
    assert backward.flops == expected * n2 * H * V


@interpreted
@pytest.mark.parametrize("inactive", [0, 17])
def test_elements_moved_by_the_linear_kernels(inactive: int) -> None:
    """Per block of active rows: the head once to score, once to recompute, once for dhidden. Dead rows move nothing."""
    from dppo_kernels.linear_logprobs import kernels, kernels_bwd

    hidden, weight, ids, gather_ids = linear_inputs(N, V, H, K)
    projection = Projection(hidden, weight, None, 1.0, 1.0, None, torch.float32)
    ids[:inactive] = IGNORE
    active = N - inactive
    blocks = -(-active // INTERPRETER_LSE_PLAN.block_n)
    with counted_kernels(hidden=hidden, weight=weight) as forward:
        saved = kernels.linear_logprobs_fwd(
            projection, ids, gather_ids, ignore_index=IGNORE, outputs=frozenset(["logprobs", "entropy"])
        )
    picked = active * (K + 1) * H
    assert forward.loaded == {"hidden": active * H, "weight": blocks * V * H + picked}
    assert not forward.stored

    upstream = Upstream(torch.ones(N), None, torch.ones(N), torch.ones(N, K))
    with counted_kernels(hidden=hidden, weight=weight) as backward:
        kernels_bwd.linear_logprobs_bwd(
            projection, ids, gather_ids, upstream, saved, ignore_index=IGNORE, needs=(True, True, False)
        )
    recompute = -(-active // INTERPRETER_GRAD_PLAN.block_n) * V * H
    to_dhidden = -(-active // INTERPRETER_GRAD_PLAN.gemm_m) * V * H
    assert backward.loaded == {"hidden": active * H, "weight": recompute + to_dhidden + picked}


@interpreted
@pytest.mark.parametrize("inplace", [False, True])
def test_elements_moved_by_the_logits_kernels(inplace: bool) -> None:
    """Logits of active rows are read once in each direction; every row of the gradient is written once."""
    from dppo_kernels.token_logprobs import kernels

    logits, (_, _, ids, gather_ids) = torch.randn(1, N, V), linear_inputs(N, V, H, K)
    dlogits = logits if inplace else torch.empty_like(logits)
    ids[:7] = IGNORE
    active = N - 7
    with counted_kernels(logits=logits) as forward:
        saved = kernels.token_logprobs_fwd(
            logits, ids, gather_ids, 1.0, ignore_index=IGNORE, outputs=frozenset(["logprobs", "entropy"])
        )
    assert forward.loaded == {"logits": active * (V + K + 1)}
    upstream = Upstream(torch.ones(N), None, torch.ones(N), torch.ones(N, K))
    with counted_kernels(logits=logits, dlogits=dlogits) as backward:
        kernels.token_logprobs_bwd(logits, ids, gather_ids, 1.0, upstream, saved, ignore_index=IGNORE, dlogits=dlogits)
    assert backward.loaded["logits"] == active * (V + K + 1)
    assert backward.stored["dlogits"] == N * V + active * (K + 1)


@interpreted
def test_every_kernel_runs_in_the_interpreter() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    kernels = set()
    for module in pkgutil.walk_packages(dppo_kernels.__path__[:1], "dppo_kernels."):
        if ".kernels" in module.name:
            found = vars(importlib.import_module(module.name)).items()
            kernels |= {name for name, x in found if isinstance(x, InterpretedFunction) and name.endswith("_kernel")}
    assert len(kernels) >= 10
    hidden, weight, ids, gather_ids = linear_inputs(N, V, H, K)
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.zeros(V))]
    with counted_kernels() as work:
        scores = dppo_kernels.linear_logprobs(*leaves[:2], ids, bias=leaves[2], backend="triton")
        torch.autograd.grad(scores.logprobs.sum(), leaves)
        dppo_kernels.linear_logprobs(leaves[0], weight.detach(), ids, backend="triton").logprobs.sum().backward()
        logits = torch.randn(N, V, requires_grad=True)
        dppo_kernels.token_logprobs(logits, ids, gather_ids=gather_ids, backend="triton").gathered.sum().backward()
        spec = dppo_kernels.PRESETS["dapo"].replace(entropy_coef=0.1)
        batch = (ids, torch.zeros(N), torch.ones(N), torch.ones(N, dtype=torch.bool))
        dppo_kernels.linear_policy_loss(*leaves[:2], *batch, spec=spec, bias=leaves[2], backend="triton")
        pairs = (leaves[0].view(2, N // 2, H), leaves[1], ids.view(2, -1), batch[3].view(2, -1))
        dppo_kernels.linear_preference_loss(*pairs, bias=leaves[2], ref_logprobs=torch.zeros(2), backend="triton")
        tokens = (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
        returns = dppo_kernels.gae(*tokens, backend="triton").returns
        other = dppo_kernels.distill_loss(logits, logits.detach(), batch[3], backend="triton")[0]
        other.backward()
        dppo_kernels.linear_distill_loss(*leaves[:2], hidden, weight, batch[3], student_bias=leaves[2], backend="triton")
        dppo_kernels.value_loss(tokens[0], None, returns, tokens[2], backend="triton")
    assert set(work.launches) == kernels
