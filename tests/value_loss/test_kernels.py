"""The Triton kernel of the value loss, in the interpreter and (marked gpu) on a device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import value_loss
from dppo_kernels.value_loss.kernels import value_loss_triton
from dppo_kernels.value_loss.reference import value_loss_fwd
from tests.linear_logprobs.test_kernels import DEVICES
from tests.numerics import assert_as_exact_as_torch
from tests.value_loss.test_op import CLIPS, batch

SHAPES = st.sampled_from([(0,), (1,), (37,), (3, 64), (5, 41)])  # blocks are of 64 in the interpreter


@pytest.mark.parametrize("device", DEVICES)
@given(SHAPES, st.integers(0, 2**20), st.sampled_from([0.0, 0.5, 1.0]), CLIPS)
@settings(max_examples=15)
def test_as_exact_as_torch(device: str, shape: tuple[int, ...], seed: int, share: float, clip: float | None) -> None:
    tensors = [x.detach() for x in batch(shape, seed, share=share)]
    weight = torch.tensor(0.01)
    found = value_loss_triton(*(x.to(device) for x in tensors), weight.to(device), clip)
    in_torch = value_loss_fwd(*tensors, weight, clip)
    exact = value_loss_fwd(*(x.double() if x.is_floating_point() else x for x in tensors), weight.double(), clip)
    for name, *values in zip(("loss", "dvalues", "stats"), found, in_torch, exact, strict=True):
        assert_as_exact_as_torch(name, *(x.cpu() for x in values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_through_the_op(device: str, clip: float | None) -> None:
    values, old, returns, mask = (x.to(device) for x in batch((3, 50), dtype=torch.bfloat16))
    values = values.detach().t().contiguous().t().requires_grad_()  # rows do not lie behind each other
    results = []
    for backend in ("triton", "torch", "triton"):
        loss, stats = value_loss(values, old, returns, mask, clip=clip, backend=backend)
        (gradient,) = torch.autograd.grad(loss, values)
        results.append([loss.detach(), gradient, *(x for stat in stats.values() for x in stat)])
    for ours, theirs, again in zip(*results, strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_the_device() -> None:
    n = (1 << 31) + 1000
    values, mask = torch.ones(n, device="cuda", dtype=torch.bfloat16), torch.zeros(n, device="cuda", dtype=torch.bool)
    mask[-1] = True
    loss, stats = value_loss(values.requires_grad_(), None, torch.zeros_like(values), mask, backend="triton")
    assert loss == 0.5
    assert stats["values"].count == 1
    gradient: Tensor = torch.autograd.grad(loss, values)[0]
    assert gradient[-1] == 1
    assert not gradient[:-1].any()
