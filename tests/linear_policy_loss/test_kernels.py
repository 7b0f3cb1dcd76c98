"""Triton kernels of the fused policy loss, in the interpreter and (marked gpu) on a device: values, poison, counts, bits."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import PRESETS, linear_policy_loss
from dppo_kernels.linear_logprobs import group_design, groups_triton
from dppo_kernels.linear_logprobs.groups_triton import GroupLauncher, fill_holes
from dppo_kernels.linear_policy_loss import triton_impl
from dppo_kernels.linear_policy_loss.task import Totals, coefficients
from tests.census import counted_kernels
from tests.linear_policy_loss.cases import VARIANTS, PolicyCase, policy_cases, run, with_options
from tests.linear_policy_loss.test_op import hold_to_reference
from tests.linear_policy_loss.test_work import captured

ON_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
)
DEVICES = [ON_CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETED = settings(max_examples=12)  # an example is about half a second
ROWS_16 = 16 * 64 * 4  # a workspace of 16 rows for a vocabulary of 53 in fp32: two chunks and more


@pytest.mark.parametrize("device", DEVICES)
@given(case=policy_cases(dtypes=(torch.float32, torch.bfloat16)))
@example(case=PolicyCase("gspo", b=3, t=11, softcap=5.0, bias=True, changes=VARIANTS[3], temperature="per_row"))
@example(case=PolicyCase("dppo_topk_kl", dtype=torch.bfloat16, temperature="per_row", bias=True, softcap=5.0))
@example(case=PolicyCase("dapo", dtype=torch.bfloat16, advantages="token", layout="strided"))
@INTERPRETED
def test_as_exact_as_torch(device: str, case: PolicyCase) -> None:
    # Sixteen rows at a time, so that there are several chunks.
    workspace = 16 * case.vocab * case.dtype.itemsize
    hold_to_reference(with_options(case, workspace_bytes=workspace), "triton", device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", [(), (*VARIANTS[2], *VARIANTS[3])], ids=["plain", "weighted KL and entropy bonus"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_row_kernel_computes_every_preset(device: str, preset: str, variant: tuple) -> None:
    """Loss, per-row log-prob and entropy, and every metric, against float64; token weights, far ratios and all."""
    case = PolicyCase(preset, b=4, t=9, changes=variant, weighted=True, scale=4.0)
    options = {"score_inactive": True, "with_entropy": True, "workspace_bytes": ROWS_16}
    ours, grads, rest = run(with_options(case, **options), torch.float32, "triton", device)
    exact, exact_grads, exact_rest = run(with_options(case, with_entropy=True), torch.float64, "reference")
    torch.testing.assert_close(ours["loss"].double(), exact["loss"], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), exact_grads[name], rtol=1e-4, atol=1e-5 * exact_grads[name].abs().max())
    for field in ("logprobs", "entropy"):
        found, expected = getattr(rest["aux"], field).cpu().double(), getattr(exact_rest["aux"], field)
        torch.testing.assert_close(found, expected * exact_rest["aux"].scored, rtol=1e-5, atol=1e-5)
    assert list(rest["stats"]) == list(exact_rest["stats"])
    for name, stat in exact_rest["stats"].items():
        for a, b in zip(rest["stats"][name], stat, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5, msg=f"{name}: {a} {b}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_an_improbable_token_is_projected_again_without_a_host_wait(device: str, preset: str) -> None:
    """Row 5's id has a log-prob of about -250: its block overflows, and is scaled by its maximum."""
    case = PolicyCase(preset, b=3, t=9, masked="none", changes=(("entropy_coef", 0.05),))
    hidden, weight, _ = case.leaves()
    weight[7] = 0
    weight[8] = 10 * hidden[0, 5]
    arguments = case.arguments()
    arguments["ids"][0, 5] = 7
    results = []
    for dtype, backend, place in ((torch.float32, "triton", device), (torch.float64, "reference", "cpu")):
        leaves = [x.to(place, dtype).requires_grad_() for x in (hidden, weight)]
        moved = {k: x.to(place) if isinstance(x, Tensor) else x for k, x in arguments.items()}
        loss, _, aux = linear_policy_loss(*leaves, **moved, backend=backend, return_aux=True)
        grads = torch.autograd.grad(loss, leaves)
        results.append([x.cpu().double() for x in (loss.detach(), aux.logprobs, aux.entropy, *grads)])
    assert results[0][1][0, 5] < -100
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["dppo_topk_tv", "dppo_topk_kl"])
def test_equal_certain_policies_do_not_diverge(device: str, preset: str) -> None:
    """Both give one token the probability 1; it is sampled in every other row."""
    weight = 3 * torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).to(device)
    certain = torch.arange(0, 40, 4, device=device)
    other = certain + 1
    ids = torch.where(torch.arange(10, device=device) % 2 == 0, certain, other)
    logprobs = torch.where(ids == certain, 0.0, -1e3)
    _, stats = linear_policy_loss(
        weight[::4].clone().requires_grad_(),
        weight,
        ids,
        logprobs,
        torch.ones(10, device=device),
        torch.ones(10, dtype=torch.bool, device=device),
        spec=PRESETS[preset],
        rollout_topk_ids=torch.stack([certain, other], 1),
        rollout_topk_logprobs=torch.tensor([0.0, -1e3], device=device).expand(10, 2),
        temperature=0.1,
        backend="triton",
    )
    assert stats["divergence"].max == 0


@pytest.mark.parametrize("device", DEVICES)
def test_sequences_longer_than_the_slots_are_projected_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_design, "TARGET_ROWS", {"cpu": 16, "cuda": 16})
    case = with_options(PolicyCase("gspo", b=3, t=60), workspace_bytes=32 * 53 * 4)
    projected = []
    real = GroupLauncher.project
    monkeypatch.setattr(GroupLauncher, "project", lambda self, *x: projected.append(x[1]) or real(self, *x))
    hold_to_reference(case, "triton", device)
    assert len(projected) > 3 * 4  # four chunks a sequence in two slots


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("preset", "variant"), [("dapo", ()), ("gspo", ()), ("dppo_topk_tv", VARIANTS[3])])
def test_buffers_need_not_be_clean(device: str, preset: str, variant: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PolicyCase(preset, b=4, t=9, advantages="half", changes=variant, bias=True)
    case = with_options(case, workspace_bytes=ROWS_16, with_entropy=True)
    clean = run(case, torch.float32, "triton", device)
    real = GroupLauncher.new

    def poisoned(self, shape, dtype=torch.float32):
        buffer = real(self, shape, dtype)
        return buffer.fill_(torch.nan if dtype.is_floating_point else 10**6)

    monkeypatch.setattr(GroupLauncher, "new", poisoned)
    dirty = run(case, torch.float32, "triton", device)
    assert torch.equal(clean[0]["loss"], dirty[0]["loss"])
    for name, grad in clean[1].items():
        assert torch.equal(grad, dirty[1][name]), name
    assert torch.equal(clean[2]["aux"].logprobs, dirty[2]["aux"].logprobs)
    for name, stat in clean[2]["stats"].items():
        assert all(torch.equal(a, b) for a, b in zip(stat, dirty[2]["stats"][name], strict=True)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_descriptors_pointers_and_reruns_give_the_same_bits(device: str, preset: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no tensor memory accelerator")
    call = captured(PRESETS[preset], workspace_bytes=1 << 20)
    rows = call.task.rows._replace(**{k: x.to(device) for k, x in call.task.rows._asdict().items() if x is not None})
    projection = call.group.projection
    projection = replace(projection, hidden=projection.hidden.to(device), weight=projection.weight.to(device))
    task = replace(call.task, rows=rows)
    with torch.no_grad():
        runs = []
        for described in (True, False, True):
            totals = Totals.empty(task, torch.float32)
            changes = {"coefficients": functools.partial(coefficients, task, totals), "scored": task.scored, "ids": rows.ids}
            group = replace(call.group, projection=projection, **changes)
            if preset == "gspo":
                result = groups_triton.run_groups(group, descriptors=described)
            else:
                result = triton_impl.linear_policy_loss_fwd(task, group, totals, descriptors=described)
            runs.append((totals.loss, result.gradients))
    for other in runs[1:]:
        assert torch.equal(runs[0][0], other[0])
        for a, b in zip(runs[0][1], other[1], strict=True):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_holes_are_filled_from_the_end(device: str) -> None:
    for keep in ([1, 0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1]):
        flags = torch.tensor(keep, dtype=torch.int32, device=device)
        source, count = (x.tolist() for x in fill_holes(flags))
        kept = [i for i, flag in enumerate(keep) if flag]
        assert count == [len(kept)]
        assert sorted(source[: len(kept)]) == kept
        moved = [(to, row) for to, row in enumerate(source[: len(kept)]) if to != row]
        assert all(row >= len(kept) and not keep[to] for to, row in moved)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    case = PolicyCase("dppo_topk_tv", b=4, t=64)
    hidden, weight, _ = (None if x is None else x.cuda().requires_grad_() for x in case.leaves())
    arguments = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in case.arguments().items()}
    torch.autograd.grad(linear_policy_loss(hidden, weight, **arguments)[0], (hidden, weight))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(linear_policy_loss(hidden, weight, **arguments)[0], (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("active", [True, False])
def test_elements_moved(active: bool) -> None:
    """The head once per block of active rows to project and once to dhidden; rows without advantage move nothing."""
    changes = {} if active else {"advantages": torch.zeros(6)}
    call = captured(PRESETS["cispo"], workspace_bytes=1 << 20, **changes)
    n1, projection = int(call.task.scored.sum()), call.group.projection
    hidden, weight = (x.detach().clone() for x in (projection.hidden, projection.weight))
    group = replace(call.group, projection=replace(projection, hidden=hidden, weight=weight))
    vocab, width = weight.shape
    with torch.no_grad(), counted_kernels(hidden=hidden, weight=weight) as work:
        triton_impl.linear_policy_loss_fwd(call.task, group, call.totals)
    blocks = -(-n1 // 16)  # of the projection and of the dhidden GEMM in the interpreter
    assert work.loaded["hidden"] == n1 * width
    assert work.loaded["weight"] == 2 * blocks * vocab * width + n1 * width
    assert not work.stored
