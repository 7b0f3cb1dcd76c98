"""The one tolerance rule: a kernel may be at most twice as wrong as torch in the same dtype."""

import torch
from torch import Tensor


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest deviation from the float64 reference; infinities must agree exactly."""
    value, exact = value.double(), exact.double()
    if value.shape != exact.shape:
        raise AssertionError(f"shape {list(value.shape)}, expected {list(exact.shape)}")
    same_infinity = torch.isinf(exact) & (value == exact)
    difference = torch.where(same_infinity, 0.0, (value - exact).abs())
    return difference.max().item() if difference.numel() else 0.0


def assert_as_exact_as_torch(name: str, value: Tensor, in_torch: Tensor, exact: Tensor, *, largest: float = 1.0) -> None:
    """``max|value - exact| <= 2 max|in_torch - exact| + 1e-6`` (NaN fails), the 1e-6 being relative to numbers above 1.

    `largest` is the largest intermediate the result is a function of (a logit, say). float32 holds 15 to 1e-6 only, and over
    the few rows of a case torch is sometimes luckier than its arithmetic.
    """
    assert value.dtype == in_torch.dtype, f"{name}: {value.dtype}, expected {in_torch.dtype}"
    finite = exact[exact.isfinite()].abs()
    unit = max(1.0, largest, finite.max().item() if finite.numel() else 0.0)
    ours, theirs = max_error(value, exact), max_error(in_torch, exact)
    bound = 2 * theirs + 1e-6 * unit
    assert ours <= bound, f"{name}: error {ours:.3e} > {bound:.3e}; torch in the same dtype has {theirs:.3e}"


def bit_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
