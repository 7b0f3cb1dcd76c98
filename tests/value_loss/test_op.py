"""The value loss: against autograd through the formula written out, its gradient, statistics, op and errors."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import value_loss
from tests.numerics import assert_as_exact_as_torch

every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])
op_backends = pytest.mark.parametrize("backend", ["torch"])


def batch(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32, share: float = 0.7) -> tuple[Tensor, ...]:
    """values (a leaf), old_values, returns with NaN behind the mask; the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < share
    tensors = (torch.where(mask, torch.randn(shape, generator=g), torch.nan).to(dtype) for _ in range(3))
    values, old_values, returns = tensors
    return values.requires_grad_(), old_values, returns, mask


def written_out(v: Tensor, old: Tensor, target: Tensor, mask: Tensor, clip: float | None, denominator: Any) -> Tensor:
    v, old, target = v[mask], old[mask], target[mask]
    losses = (v - target).square()
    if clip is not None:
        losses = torch.max(losses, (torch.clamp(v, old - clip, old + clip) - target).square())
    return 0.5 * losses.sum() / (max(int(mask.sum()), 1) if denominator is None else denominator)


SHAPES = st.sampled_from([(0,), (1,), (37,), (3, 20), (0, 4), (2, 0), (5, 1)])
CLIPS = st.sampled_from([None, 0.1, 0.5])


@every_backend
@given(SHAPES, st.integers(0, 2**20), st.sampled_from([0.0, 0.5, 1.0]), CLIPS, st.sampled_from([None, 7.5, torch.tensor(3)]))
def test_loss_gradient_and_statistics(backend: str, shape, seed: int, share: float, clip, denominator) -> None:
    values, old, returns, mask = batch(shape, seed, share=share)
    loss, stats = value_loss(values, old, returns, mask, clip=clip, denominator=denominator, backend=backend)
    upstream = torch.tensor(1.7)
    (gradient,) = torch.autograd.grad(loss, values, upstream)
    wide = values.detach().double().requires_grad_()
    exact = written_out(wide, old.double(), returns.double(), mask, clip, denominator)
    (expected,) = torch.autograd.grad(exact, wide, upstream.double()) if wide.numel() else (wide,)
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.where(mask, expected, 0.0), rtol=1e-5, atol=1e-6)
    assert not gradient[~mask].any()
    v, o, r = (x.detach()[mask].double() for x in (values, old, returns))
    errors = (v - r).square()
    clipped = torch.zeros_like(v) if clip is None else ((v.clamp(o - clip, o + clip) - r).square() > errors).double()
    for name, each in {"value_error": errors, "value_clipped": clipped, "values": v}.items():
        stat = stats[name]
        assert stat.count == len(each)
        torch.testing.assert_close(stat.sum.double(), each.sum(), rtol=1e-5, atol=1e-5)
        largest = each.max() if len(each) else torch.tensor(-torch.inf, dtype=torch.float64)
        torch.testing.assert_close(stat.max.double(), largest, rtol=1e-6, atol=1e-6)
    assert list(stats) == ["value_error", "value_clipped", "values"]


@op_backends
@given(st.integers(0, 2**20), CLIPS)
def test_as_exact_as_torch(backend: str, seed: int, clip: float | None) -> None:
    found, expected, exact = {}, {}, {}
    for out, name, dtype in (
        (found, backend, torch.float32),
        (expected, "reference", torch.float32),
        (exact, "reference", torch.float64),
    ):
        values, old, returns, mask = batch((4, 50), seed, dtype)
        out["loss"], _ = value_loss(values, old, returns, mask, clip=clip, backend=name)
        (out["dvalues"],) = torch.autograd.grad(out["loss"], values)
    for name in found:
        assert_as_exact_as_torch(name, found[name].detach(), expected[name].detach(), exact[name].detach())


def test_old_values_are_not_needed_without_a_clip() -> None:
    values, old, returns, mask = batch((4, 9))
    assert torch.equal(value_loss(values, None, returns, mask)[0], value_loss(values, old, returns, mask)[0])


@every_backend
def test_the_branches_of_the_gradient(backend: str) -> None:
    """Inside the range; outside and further from the return; outside with the larger error at the clip; at both its ends."""
    old = torch.zeros(5, dtype=torch.float64)
    values = torch.tensor([0.1, 1.0, 1.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, -1.0, 2.0, 3.0, -3.0], dtype=torch.float64)
    loss, stats = value_loss(values, old, returns, torch.ones(5).bool(), clip=0.5, denominator=1, backend=backend)
    loss.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 2.0, 0.0, -2.5, 2.5], dtype=torch.float64))
    assert stats["value_clipped"].sum == 1


def test_a_tie_outside_of_the_range_has_the_unclipped_gradient() -> None:
    values = torch.tensor([1.0], requires_grad=True)
    arguments = (torch.zeros(1), torch.tensor([0.75]), torch.ones(1).bool())  # 0.25 from both 1 and 0.5
    for backend, expected in (("torch", 0.25), ("reference", 0.125)):
        loss, stats = value_loss(values, *arguments, clip=0.5, backend=backend)
        assert torch.autograd.grad(loss, values)[0].item() == expected
        assert stats["value_clipped"].sum == 0


@every_backend
@pytest.mark.parametrize("clip", [None, 0.3])
def test_gradcheck(backend: str, clip: float | None) -> None:
    values, old, returns, mask = batch((3, 4), dtype=torch.float64)
    clean = [torch.where(mask, x.detach(), 0.0) for x in (values, old, returns)]

    def loss(v: Tensor) -> Tensor:
        return value_loss(v, clean[1], clean[2], mask, clip=clip, backend=backend)[0]

    assert torch.autograd.gradcheck(loss, clean[0].requires_grad_())


def test_micro_batches_with_one_denominator_are_the_batch() -> None:
    values, old, returns, mask = batch((6, 11))
    whole, stats = value_loss(values, old, returns, mask, clip=0.2)
    parts = [
        value_loss(*(x[rows] for x in (values, old, returns, mask)), clip=0.2, denominator=mask.sum())
        for rows in (slice(2), slice(2, 6))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, stat in stats.items():
        merged = parts[0][1][name].merge(parts[1][1][name])
        torch.testing.assert_close(merged.mean, stat.mean)
        assert merged.max == stat.max


@op_backends
def test_dtypes(backend: str) -> None:
    values, old, returns, mask = batch((3, 8), dtype=torch.bfloat16)
    loss, _ = value_loss(values, old.float(), returns, mask, clip=0.2, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert values.grad is not None
    assert values.grad.dtype == torch.bfloat16


@op_backends
def test_nothing_but_values_has_a_gradient_and_there_is_no_second(backend: str) -> None:
    values, old, returns, mask = batch((3, 8))
    old.requires_grad_()
    returns.requires_grad_()
    loss, stats = value_loss(values, old, returns, mask, clip=0.2, backend=backend)
    assert not any(x.requires_grad for stat in stats.values() for x in stat)
    again = torch.autograd.grad(loss, values, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    assert values.grad is not None
    assert torch.equal(values.grad, again)
    assert old.grad is None
    assert returns.grad is None
    with pytest.raises(RuntimeError, match="value_loss has no second derivative"):
        torch.autograd.grad(loss, values, create_graph=True)


@op_backends
def test_zero_upstream_gives_an_exact_zero(backend: str) -> None:
    values, old, returns, mask = batch((3, 8))
    loss, _ = value_loss(values, old, returns, mask, clip=0.2, backend=backend)
    assert not torch.autograd.grad(loss, values, torch.zeros(()))[0].any()


@op_backends
@pytest.mark.parametrize("clip", [None, 0.2])
def test_opcheck(backend: str, clip: float | None) -> None:
    values, old, returns, mask = batch((3, 8))
    old_values = None if clip is None else old
    arguments = (values, old_values, returns, mask, torch.tensor(0.1), clip, backend)
    torch.library.opcheck(torch.ops.dppo_kernels.value_loss.default, arguments)


@op_backends
def test_gradients_are_contiguous_whatever_the_inputs_are(backend: str) -> None:
    values, *others = (x.detach().t().contiguous().t() for x in batch((3, 8)))
    *_, mask = others
    _, dvalues, _ = torch.ops.dppo_kernels.value_loss(values, *others, torch.tensor(0.1), 0.2, backend)
    assert dvalues.is_contiguous()
    assert not dvalues[~mask].any()


@op_backends
def test_compiled_equals_eager_in_one_graph(backend: str) -> None:
    values, old, returns, mask = batch((3, 8))

    def step(values: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = value_loss(values * 1, old, returns, mask, clip=0.2, backend=backend)
        return loss * 2, stats["value_error"].mean

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found, error), (expected, expected_error) = compiled(values), step(values)
    assert torch.equal(found, expected)
    assert torch.equal(error, expected_error)
    assert torch.equal(*(torch.autograd.grad(loss, values)[0] for loss in (found, expected)))


ONES, MASK = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"values": MASK}, TypeError, "`values` must have a floating-point dtype, got torch.bool"),
    ({"values": torch.ones(())}, ValueError, "`values` must be [B, T] or [N], got []"),
    ({"mask": ONES}, TypeError, "`mask` must be a bool tensor (True = counts), got torch.float32"),
    ({"mask": MASK[0]}, ValueError, "`mask` must have shape that of `values` = [2, 3], got [3]"),
    ({"returns": MASK}, TypeError, "`returns` must have a floating-point dtype, got torch.bool"),
    ({"returns": ONES[:1]}, ValueError, "`returns` must have shape that of `values` = [2, 3], got [1, 3]"),
    ({"returns": ONES.to("meta")}, ValueError, "`returns` is on meta, but `values` is on cpu"),
    ({"old_values": None}, ValueError, "`clip` is 0.2: `old_values` are needed"),
    ({"old_values": ONES.long()}, TypeError, "`old_values` must have a floating-point dtype, got torch.int64"),
    ({"old_values": ONES[0]}, ValueError, "`old_values` must have shape that of `values` = [2, 3], got [3]"),
    ({"clip": 0.0}, ValueError, "`clip` must be positive, got 0.0"),
    ({"clip": "0.2"}, TypeError, "`clip` must be a number, got str"),
    ({"denominator": -1.0}, ValueError, "`denominator` must be positive, got -1.0"),
    ({"denominator": torch.ones(2)}, ValueError, "`denominator` must be one number, got shape [2]"),
    ({"backend": "cpp"}, ValueError, "backend='cpp' cannot serve value_loss: this version has no cpp implementation of it"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"values": ONES, "old_values": ONES, "returns": ONES, "mask": MASK, "clip": 0.2} | change
    with pytest.raises(kind, match=re.escape(message)):
        value_loss(**arguments)
