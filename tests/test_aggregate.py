"""The reduction: each mode by hand, global denominators, NaN behind the mask, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels import aggregate

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_by_hand() -> None:
    assert aggregate(VALUES, MASK, "token_mean").item() == pytest.approx((1 + 2 + 4) / 3)
    assert aggregate(VALUES, MASK, "sequence_mean").item() == pytest.approx((1.5 + 4) / 2)
    assert aggregate(VALUES, MASK, "fixed_length", max_length=10).item() == pytest.approx(7 / 20)
    assert aggregate(VALUES, MASK, "token_mean", denominator=14).item() == pytest.approx(0.5)
    assert aggregate(VALUES, MASK, "sequence_mean", denominator=torch.tensor(4.0)).item() == pytest.approx(5.5 / 4)
    assert aggregate(VALUES, MASK, "fixed_length", denominator=7).item() == pytest.approx(1.0)
    assert aggregate(VALUES[:, 0], MASK[:, 0], "token_mean").item() == pytest.approx(2.5)
    assert aggregate(torch.tensor([[2.0], [3.0]]), MASK, "sequence_mean").item() == pytest.approx(2.5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
def test_nothing_active_is_zero_and_nan_behind_the_mask_is_ignored(reduction: str) -> None:
    nothing = aggregate(VALUES, torch.zeros_like(MASK), reduction, max_length=3)
    assert nothing == 0
    poisoned = torch.where(MASK, VALUES, torch.nan).requires_grad_()
    clean = VALUES.clone().requires_grad_()
    a, b = (aggregate(x, MASK, reduction, max_length=3) for x in (poisoned, clean))
    assert a == b
    (grad,) = torch.autograd.grad(a, poisoned)
    assert torch.equal(grad, torch.autograd.grad(b, clean)[0])
    assert aggregate(VALUES[:0], MASK[:0], reduction, max_length=3) == 0


@given(st.sampled_from(["token_mean", "sequence_mean", "fixed_length"]), st.integers(0, 2**20), st.integers(1, 7))
def test_micro_batches_with_a_global_denominator_add_up(reduction: str, seed: int, cut: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=g) < 0.6
    denominator = {"token_mean": max(int(mask.sum()), 1), "sequence_mean": 8, "fixed_length": 8 * 5}[reduction]
    whole = aggregate(values, mask, reduction, max_length=5)
    parts = [
        aggregate(values[rows], mask[rows], reduction, denominator=denominator, max_length=5)
        for rows in (slice(0, cut), slice(cut, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        aggregate(VALUES, MASK, "mean")
    with pytest.raises(TypeError, match="`mask` must be a bool tensor"):
        aggregate(VALUES, MASK.float(), "token_mean")
    with pytest.raises(ValueError, match="`values` must have shape"):
        aggregate(VALUES[:, :2], MASK, "token_mean")
    with pytest.raises(ValueError, match=r"needs \[B, T\]"):
        aggregate(VALUES[0], MASK[0], "sequence_mean")
    with pytest.raises(ValueError, match="needs `max_length` or `denominator`"):
        aggregate(VALUES, MASK, "fixed_length")
    with pytest.raises(ValueError, match="`max_length` must be positive"):
        aggregate(VALUES, MASK, "fixed_length", max_length=0)
