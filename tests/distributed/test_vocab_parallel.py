"""Heads that are shared out over ranks: as exact as one process, over any cut, at the traffic that is documented."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.plan import PARTIALS
from dppo_kernels import PRESETS, _tiling, linear_distill_loss, linear_logprobs, linear_policy_loss, linear_preference_loss
from tests.distill.cases import DistillCase, distill_cases
from tests.distributed.gang import Gang
from tests.distributed.shards import Traffic, cut, hold, sharded
from tests.linear_policy_loss.cases import PolicyCase, policy_cases
from tests.linear_preference_loss.cases import SPECS, PreferenceCase, preference_cases
from tests.strategies import ScoringCase, scoring_cases
from tests.trainers.ranks import run_ranks

ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORKSPACES = (0, 16 * 123 * 8, 1 << 20)  # strict; sixteen rows of a whole head; everything
STRATEGIES = {
    "linear_logprobs": scoring_cases(dtypes=ALL),
    "linear_policy_loss": policy_cases(dtypes=ALL),
    "linear_preference_loss": preference_cases(dtypes=ALL),
    "distill": distill_cases(dtypes=ALL),
}
CUTS = st.sampled_from([("even", 0), ("uneven", 0), ("even", 3)])  # and rows of padding behind the last shard


@pytest.mark.parametrize("family", STRATEGIES)
@pytest.mark.parametrize("ranks", [2, 4])
@given(data=st.data())
def test_as_exact_as_torch(family: str, ranks: int, gangs: dict[int, Gang], data: st.DataObject) -> None:
    """The rule that one process is held to: no more than twice the error of torch in the same dtype."""
    case = data.draw(STRATEGIES[family])
    assume(case.vocab >= 2 * ranks)
    how, padding = data.draw(CUTS)
    gangs[ranks].run(hold, family, case, "torch", how, padding, {"workspace_bytes": data.draw(st.sampled_from(WORKSPACES))})


KERNEL_CASES = {
    "linear_logprobs": [
        ScoringCase(7, 33, 123, 4, torch.float32, 4.0, "contiguous", "per_row", "some", True, 5.0, 0.25, 3),
        ScoringCase(33, 8, 100, 1, torch.bfloat16, 30.0, "strided", "one", "none", False, None, 1.0, 4),
    ],
    "linear_policy_loss": [
        PolicyCase("dppo_topk_kl", vocab=123, bias=True, softcap=5.0, temperature="per_row"),
        PolicyCase("gspo", t=11, vocab=123, changes=(("entropy_coef", 0.05),)),
        PolicyCase("ppo", scale=30.0, temperature="cold", changes=(("beta", 0.1),)),  # ids whose sums overflow
    ],
    "linear_preference_loss": [
        PreferenceCase(SPECS[0], vocab=123, bias=True, softcap=5.0, lora=True),
        PreferenceCase(SPECS[-1], t=11, temperature="cold", scale=10.0),
    ],
    "distill": [
        DistillCase("jsd", 0.1, vocab=123, bias=True, lora="both", softcap=5.0),
        DistillCase("reverse_kl", scale=30.0, temperature="cold"),
        DistillCase("tv", bias=True, banned="both"),
    ],
}


@pytest.mark.parametrize(
    ("family", "case", "workspace"),
    [
        (family, case, workspace)
        for family, cases in KERNEL_CASES.items()
        for case in cases
        for workspace in ((0, 1 << 20) if family != "linear_logprobs" else (None,))  # whose case has none
    ],
)
def test_kernels_are_as_exact(family: str, case: Any, workspace: int | None, gangs: dict[int, Gang]) -> None:
    gangs[2].run(hold, family, case, "triton", "uneven", 0, {"workspace_bytes": workspace})


def _with_other_tiles(family: str, case: Any, workspace: int) -> None:
    """On the last rank blocks of rows are twice as large, as where a shard's address forbids descriptors."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            other = _tiling.INTERPRETER_GRAD_PLAN._replace(block_n=32, block_v=16)
            patch.setattr(_tiling, "INTERPRETER_GRAD_PLAN", other)
        hold(family, case, "triton", "uneven", 0, {"workspace_bytes": workspace})


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("linear_policy_loss", PolicyCase("ppo", b=3, t=7)),
        ("linear_policy_loss", PolicyCase("gspo", b=3, t=7)),
        ("distill", DistillCase("jsd", b=3, t=7)),
    ],
)
def test_tiles_may_differ_from_rank_to_rank(family: str, case: Any, gangs: dict[int, Gang]) -> None:
    """What is sent is of rows, not of blocks."""
    gangs[2].run(_with_other_tiles, family, case, 1 << 20)


# One process, in float32, and ranks that must agree with it.
V, H, K = 1003, 64, 3


def _scored(frozen: bool, workspace: int | None, how: str) -> tuple[float, float, float]:
    """Largest errors of log-probs, of entropy and LSE, and of gradients (of their largest entry), against one process."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 40, H, generator=g), torch.randn(V, H, generator=g) / H**0.5 * 2
    ids, gather_ids = torch.randint(0, V, (2, 40), generator=g), torch.randint(-1, V, (2, 40, K), generator=g)
    found = []
    for function in (linear_logprobs, sharded(linear_logprobs, cut(V, dist.get_world_size(), how))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        outputs = ("logprobs", "entropy", "lse")
        out = function(h, w, ids, gather_ids=gather_ids, outputs=outputs, workspace_bytes=workspace)
        entropy = 0.0 if frozen else out.entropy.square().mean()
        (out.logprobs.sin().mean() + out.gathered.cos().mean() + out.lse.mean() + entropy).backward()
        if function is not linear_logprobs and w.grad is not None:
            dist.all_reduce(w.grad)
        found.append(([out.logprobs, out.gathered, out.entropy, out.lse], [x for x in (h.grad, w.grad) if x is not None]))
    (values, grads), (ours, our_grads) = found
    errors = [(a - b).abs().max().item() for a, b in zip(values, ours, strict=True)]
    of_grads = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(our_grads, grads, strict=True)]
    return max(errors[:2]), max(errors[2:]), max(of_grads)


@pytest.mark.parametrize("how", ["even", "uneven"])
@pytest.mark.parametrize(("frozen", "workspace"), [(False, None), (False, 1 << 20), (True, None)])
def test_one_process_and_ranks_agree(gang: Gang, frozen: bool, workspace: int | None, how: str) -> None:
    for of_logprobs, of_values, of_grads in gang.run(_scored, frozen, workspace, how):
        assert of_logprobs <= 1e-6
        assert of_values <= 2e-6  # entropy and LSE are about 7, whose float32 is 5e-7 wide
        assert of_grads <= 1e-5


def _traffic(vocab: int, loss: str, workspace: int | None, backend: str) -> tuple[list[int], list[int], bool]:
    """(sums, maxima, whether the results of all ranks have the same bits) of one call and its backward."""
    n, width = 48, 16
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, n // 4, width, generator=g), torch.randn(vocab, width, generator=g)
    ids = torch.randint(0, vocab, (4, n // 4), generator=g)
    cuts = cut(vocab, dist.get_world_size(), "even")
    options: dict[str, Any] = {"workspace_bytes": workspace, "backend": backend}
    traffic = Traffic()
    with traffic.counted():
        h, w = hidden.requires_grad_(), weight.requires_grad_(loss != "frozen")
        if loss in ("trained", "frozen"):
            out = sharded(linear_logprobs, cuts)(h, w, ids, gather_ids=ids[..., None].expand(-1, -1, K), **options)
            result = out.logprobs.sum() + out.gathered.sum()
        elif loss == "distill":
            mask = torch.ones_like(ids, dtype=torch.bool)
            result, _ = sharded(linear_distill_loss, cuts)(h, w, hidden.detach() + 1, weight.detach(), mask, **options)
        elif loss == "preference":
            mask = torch.ones_like(ids, dtype=torch.bool)
            result, _ = sharded(linear_preference_loss, cuts)(h, w, ids, mask, ref_logprobs=torch.zeros(4), **options)
        else:
            mask, advantages = torch.ones_like(ids, dtype=torch.bool), torch.randn(4, generator=g)
            result, _ = sharded(linear_policy_loss, cuts)(h, w, ids, None, advantages, mask, spec=PRESETS["ppo"], **options)
        result.backward()
    both = torch.cat([result.detach().reshape(1), h.grad.flatten()])
    every = [torch.empty_like(both) for _ in range(dist.get_world_size())]
    dist.all_gather(every, both)
    return traffic.sums, traffic.maxima, all(torch.equal(x, both) for x in every)


N_ROWS, WIDTH = 48, 16


@pytest.mark.parametrize(
    ("backend", "loss", "workspace", "per_row", "maxima"),
    [
        ("torch", "trained", None, 2 + K, 1),
        ("torch", "frozen", 1 << 20, 2 + K, 0),
        ("torch", "policy", 1 << 20, PARTIALS, 0),
        ("torch", "policy", 0, PARTIALS, 1),
        ("torch", "preference", 1 << 20, PARTIALS, 0),
        ("torch", "distill", 1 << 20, 4, 2),
        ("triton", "trained", None, 2 + K, 1),
        ("triton", "frozen", 1 << 20, 2 + K, 1),
        ("triton", "policy", 1 << 20, PARTIALS, 1),
        ("triton", "preference", 1 << 20, PARTIALS, 1),
        ("triton", "distill", 1 << 20, 4, 2),
    ],
)
def test_traffic_is_a_few_numbers_a_row(
    gangs: dict[int, Gang], backend: str, loss: str, workspace: int | None, per_row: int, maxima: int
) -> None:
    """As docs/scaling.md says: independent of V; besides the gradient of the hidden states, [N, H], once."""
    sizes = [(2, 101)] if backend == "triton" else [(ranks, vocab) for ranks in (2, 4) for vocab in (101, 1003)]
    for ranks, vocab in sizes:
        for sums, greatest, same in gangs[ranks].run(_traffic, vocab, loss, workspace, backend):
            assert sum(sums) == N_ROWS * (per_row + WIDTH)
            assert sum(greatest) == N_ROWS * maxima
            assert sums.count(N_ROWS * WIDTH) == 1
            assert same


def test_the_example_trains_on_two_processes() -> None:
    lines = [line for line in run_ranks("examples.vocab_parallel.train_head").splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.1
    assert all("25129 of 50257 rows" in line for line in lines)
