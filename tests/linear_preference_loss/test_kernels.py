"""Triton kernels of the preference loss, in the interpreter and (marked gpu) on a device: values, poison, work, bits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import PreferenceSpec, linear_preference_loss
from dppo_kernels.linear_logprobs import group_design
from dppo_kernels.linear_logprobs.groups_triton import GroupLauncher
from tests.census import counted_kernels
from tests.linear_preference_loss.cases import SPECS, PreferenceCase, head, preference_cases, run
from tests.linear_preference_loss.test_op import hold_to_reference
from tests.numerics import bit_equal

ON_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
)
DEVICES = [ON_CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETED = settings(max_examples=6)  # an example is about a second
ROWS_16 = 16 * 64 * 4  # a workspace of 16 rows for a vocabulary of 53 in fp32
FEATURES = PreferenceCase(
    SPECS[-2], t=11, softcap=5.0, bias=True, lora=True, temperature="per_row", masked="prompt", packed=True
)


@pytest.mark.parametrize("device", DEVICES)
@given(case=preference_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
@example(case=FEATURES)
@example(case=PreferenceCase(SPECS[-1], dtype=torch.bfloat16, layout="strided", temperature="per_row"))
@example(case=PreferenceCase(SPECS[8], pairs=5, t=11, dtype=torch.bfloat16, masked="prompt", reference="same"))
@INTERPRETED
def test_as_exact_as_torch(device: str, case: PreferenceCase) -> None:
    # Sixteen rows at a time, so that there are several chunks and some are projected again.
    hold_to_reference(case, "triton", device, workspace_bytes=16 * case.vocab * case.dtype.itemsize)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sigmoid", "aot"])
def test_chunks_are_projected_again_only_where_rows_do_not_fit(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of 2 x 40 rows, of which the last 7 count: a pair is one chunk of 16, however long its prompts are."""
    monkeypatch.setattr(group_design, "TARGET_ROWS", {"cpu": 16, "cuda": 16})
    hidden, weight = torch.randn(4, 40, 8, device=device, requires_grad=True), torch.randn(53, 8, device=device)
    ids = torch.randint(0, 53, (4, 40), device=device)
    mask = torch.zeros(4, 40, dtype=torch.bool, device=device)
    mask[:, -7:] = True
    projected: list[slice] = []
    real = GroupLauncher.project
    monkeypatch.setattr(GroupLauncher, "project", lambda self, *x: projected.append(x[1]) or real(self, *x))
    arguments = {"spec": PreferenceSpec(name), "ref_logprobs": torch.zeros(4, device=device)}
    linear_preference_loss(hidden, weight, ids, mask, **arguments, backend="triton", workspace_bytes=16 * 64 * 4)
    rows_of_a_group = 14 if name == "sigmoid" else 28  # sorted pairs are one group, whose first chunk is projected again
    again = 0 if name == "sigmoid" else 16
    assert sum(part.stop - part.start for part in projected) == 28 + again
    assert projected[0] == slice(0, min(16, rows_of_a_group))


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_loss_is_exactly_log_2(device: str) -> None:
    case = PreferenceCase(PreferenceSpec(), pairs=5, t=11, reference="same", bias=True, poison=False)
    leaves = {name: x.to(device) for name, x in case.leaves().items()}
    reference = {"ref_hidden": leaves["hidden"], "ref_weight": leaves["weight"], "ref_bias": leaves["bias"]}
    rows = (leaves["hidden"], head(leaves), case.ids().to(device), case.mask().to(device))
    arguments = {"bias": leaves["bias"], "backend": "triton", "workspace_bytes": ROWS_16}
    loss, stats = linear_preference_loss(*rows, **reference, **arguments)
    assert loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
    assert stats["margins"].sum == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-5]])
def test_buffers_need_not_be_clean(device: str, spec: PreferenceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PreferenceCase(spec, pairs=2, t=9, bias=True, lora=True, masked="prompt")
    clean = run(case, torch.float32, "triton", device, workspace_bytes=ROWS_16)
    real = GroupLauncher.new

    def poisoned(self: GroupLauncher, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = real(self, shape, dtype)
        return buffer.fill_(torch.nan if dtype.is_floating_point else 10**6)

    monkeypatch.setattr(GroupLauncher, "new", poisoned)
    dirty = run(case, torch.float32, "triton", device, workspace_bytes=ROWS_16)
    again = run(case, torch.float32, "triton", device, workspace_bytes=ROWS_16)
    for found, *others in zip(clean[:2], dirty[:2], again[:2], strict=True):
        for name, value in found.items():
            assert all(bit_equal(value, other[name]) for other in others), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_elements_moved() -> None:
    """The head once per block of completion rows to project and once to dhidden; prompts and padding move nothing."""
    case = PreferenceCase(pairs=2, t=40, masked="prompt", poison=False, reference="given")
    leaves = {name: x.requires_grad_() for name, x in case.leaves().items()}
    mask = case.mask()
    rows = torch.stack([mask[:2].sum(1), mask[2:].sum(1)]).sum(0)  # of each pair
    hidden, weight = (leaves[name].detach().clone() for name in ("hidden", "weight"))
    call = (hidden.requires_grad_(), weight.requires_grad_(), case.ids(), mask)
    with counted_kernels(weight=weight) as work:
        linear_preference_loss(*call, ref_logprobs=torch.zeros(4), backend="triton", workspace_bytes=80 * 64 * 4)
    blocks = sum(-(-int(n) // 16) for n in rows)  # of the projection and of the dhidden GEMM in the interpreter
    vocab, width = weight.shape
    assert work.loaded["weight"] == 2 * blocks * vocab * width + int(mask.sum()) * width


@pytest.mark.gpu
def test_the_device_is_waited_for_once() -> None:
    """The counts of rows per pair are read; nothing else is."""
    case = PreferenceCase(pairs=4, t=64, poison=False, reference="given")
    leaves = {name: x.cuda().requires_grad_() for name, x in case.leaves().items()}
    rows = (case.ids().cuda(), case.mask().cuda())
    reference = torch.zeros(8, device="cuda")

    def step() -> None:
        loss, _ = linear_preference_loss(leaves["hidden"], leaves["weight"], *rows, ref_logprobs=reference)
        torch.autograd.grad(loss, list(leaves.values()))

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing" in str(w.message)]) == 1
