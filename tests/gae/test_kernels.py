"""The Triton kernel of GAE against float64, in the interpreter and (marked gpu) on a device."""

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import gae, whiten
from dppo_kernels._tiling import pick_gae_plan
from dppo_kernels.gae.kernels import gae_triton
from tests.census import counted_kernels
from tests.gae.cases import GaeCase, gae_cases
from tests.linear_logprobs.test_kernels import DEVICES
from tests.numerics import assert_as_exact_as_torch

# An element costs the interpreter a millisecond in a scan; chunks are of 16 steps there.
INTERPRETED = settings(max_examples=8)
SMALL = {"steps": (0, 1, 15, 16, 17, 40), "max_rows": 3}
CASE = GaeCase(3, 40, "holes", 0.99, "rows", "rows", True, "strided", 1)


def run(case: GaeCase, device: str, dtype: torch.dtype = torch.float32, **options) -> tuple[Tensor, Tensor]:
    out = gae(*case.inputs(dtype, device), **case.options(torch.float32, device), backend="triton", **options)
    return out.advantages.cpu(), out.returns.cpu()


@pytest.mark.parametrize("device", DEVICES)
@given(case=gae_cases(**SMALL))
@example(case=CASE)
@INTERPRETED
def test_as_exact_as_a_loop_in_torch(device: str, case: GaeCase) -> None:
    in_torch = gae(*case.inputs(), **case.options(), backend="reference")
    exact = gae(*case.inputs(torch.float64), **case.options(torch.float64), backend="reference")
    for name, found in zip(("advantages", "returns"), run(case, device), strict=True):
        assert_as_exact_as_torch(name, found, getattr(in_torch, name), getattr(exact, name))


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_inputs(device: str) -> None:
    rewards, values, mask = CASE.inputs(torch.bfloat16)
    exact = gae(rewards.double(), values.double(), mask, **CASE.options(torch.float64), backend="reference")
    for found, expected in zip(run(CASE, device, torch.bfloat16), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whitened_advantages(device: str, offset: float) -> None:
    """Also far from 0, where sums of squares would lose the variance in float32."""
    rewards, values, mask = CASE.inputs()
    rewards = rewards + offset
    out = gae(*(x.to(device) for x in (rewards, values, mask)), lam=0.0, gamma=0.0, whiten=True, backend="triton")
    exact = whiten(rewards.double() - values.double(), mask)
    torch.testing.assert_close(out.advantages.cpu().double(), exact, rtol=1e-3, atol=2e-3 if offset else 1e-5)
    assert not out.advantages.cpu()[~mask].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch_and_whatever_is_masked_changes_nothing(device: str) -> None:
    inputs, options = CASE.inputs(device=device), CASE.options(device=device)
    whole, again = (gae(*inputs, **options, backend="triton") for _ in range(2))
    chosen = {name: x[1:2] if isinstance(x, Tensor) else x for name, x in options.items()}
    part = gae(*(x[1:2] for x in inputs), **chosen, backend="triton")
    rewards, values, mask = inputs
    clean = gae(torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), mask, **options, backend="triton")
    for found, rerun, row, unpoisoned in zip(whole, again, part, clean, strict=True):
        assert torch.equal(found, rerun)
        assert torch.equal(found[1:2], row)
        assert torch.equal(found, unpoisoned)


@pytest.mark.parametrize("device", DEVICES)
def test_every_element_is_written(device: str, monkeypatch) -> None:
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    arguments = (*CASE.inputs(device=device), None, 0.9, 0.9, None, torch.float32, True)
    assert all(x.isfinite().all() for x in gae_triton(*arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_elements_moved() -> None:
    """What does not count is not read; values are read once for themselves and once as the next one."""
    rewards, values, mask = (x.contiguous() for x in CASE.inputs())
    with counted_kernels(rewards=rewards, values=values, mask=mask) as work:
        gae_triton(rewards, values, mask, None, 1.0, 0.9, 0.8, torch.float32, False)
    counted, behind_the_first = int(mask.sum()), int(mask[:, 1:].sum())
    assert work.loaded == {"rewards": counted, "values": counted + behind_the_first, "mask": 2 * mask.numel() - len(mask)}
    assert work.launches == {"gae_kernel": 1}


def test_chunks_fit_the_row() -> None:
    for steps, block in ((1, 64), (64, 64), (65, 128), (1000, 1024), (65536, 1024)):
        plan = pick_gae_plan((9, 0), steps)
        assert plan.block_t == block
        assert plan.block_t >= 32 * plan.num_warps


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "steps"), [(2, 1 << 16), (3, 200_003), (5000, 300)])
def test_long_rows_on_the_device(rows: int, steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, steps, generator=g) for _ in range(2))
    mask = torch.rand(rows, steps, generator=g) < 0.9
    options = {"gamma": 0.999, "lam": 0.97, "lam_value": 1.0}
    out = gae(*(x.cuda() for x in (rewards, values, mask)), **options, backend="triton")
    exact = gae(rewards.double(), values.double(), mask, **options, backend="torch")
    for found, expected in zip(out, exact, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_more_than_2_to_the_31_steps_on_the_device() -> None:
    rows, steps = (1 << 15) + 3, 1 << 16
    ones = torch.ones(1, 1, device="cuda").expand(rows, steps)
    out = gae(ones, torch.zeros_like(ones[:1, :1]).expand(rows, steps), ones.bool()[:1].expand(rows, steps), lam=1.0)
    assert out.returns[-1, -3:].tolist() == [3.0, 2.0, 1.0]
    assert out.returns[-1, 0] == steps
