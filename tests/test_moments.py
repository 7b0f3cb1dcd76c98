"""Moments that merge, and whitening."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import Moments, masked_moments, whiten


def numbers(shape: tuple[int, ...], seed: int, share: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Values with NaN behind the mask, and the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < share
    x = torch.randn(shape, generator=g) * 3 + 100 * torch.randn((), generator=g)
    return torch.where(mask, x, torch.nan).to(dtype), mask


SHARES = st.sampled_from([0.0, 0.1, 0.6, 1.0])


@given(st.integers(0, 40), st.integers(0, 2**20), SHARES)
def test_moments_are_those_of_what_counts(n: int, seed: int, share: float) -> None:
    x, mask = numbers((n,), seed, share)
    moments, kept = masked_moments(x, mask), x[mask].double()
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in moments)
    assert moments.count == len(kept)
    if len(kept):
        torch.testing.assert_close(moments.mean, kept.mean())
        torch.testing.assert_close(moments.variance(unbiased=False), kept.var(correction=0))
    if len(kept) > 1:
        torch.testing.assert_close(moments.variance(), kept.var())
    else:
        assert moments.variance() == moments.variance(unbiased=False) == 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**20), SHARES)
def test_merging_ranks_is_the_whole(sizes: list[int], seed: int, share: float) -> None:
    x, mask = numbers((sum(sizes),), seed, share)
    whole = masked_moments(x, mask)
    first, *others = [masked_moments(*part) for part in zip(x.split(sizes), mask.split(sizes), strict=True)]
    merged = first
    for other in others:
        merged = merged.merge(other)
    for found, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    every = torch.stack([torch.stack(tuple(m)) for m in (first, *others)])  # as ranks send them
    assert Moments(*every[0]) == first


def test_numbers_far_from_0_keep_their_variance() -> None:
    x = 1e6 + torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(masked_moments(x, torch.ones_like(x).bool()).variance(), x.var(), rtol=1e-9, atol=0)


@given(st.integers(0, 40), st.integers(0, 2**20), SHARES, st.sampled_from([torch.float32, torch.float64]))
def test_whitened(n: int, seed: int, share: float, dtype: torch.dtype) -> None:
    x, mask = numbers((n,), seed, share, dtype)
    white, kept = whiten(x, mask), whiten(x, mask, shift_mean=False)
    assert white.dtype == kept.dtype == dtype
    assert not white[~mask].any()
    assert not kept[~mask].any()
    if mask.sum() > 1:
        inside = x[mask].double()
        expected = (inside - inside.mean()) / (inside.var() + 1e-8).sqrt()
        torch.testing.assert_close(white[mask].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept[mask].double(), expected + inside.mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(white[mask].mean(), torch.zeros((), dtype=dtype), rtol=0, atol=1e-5)
    elif mask.sum() == 1:
        assert white[mask] == 0
        assert kept[mask] == x[mask]


def test_equal_numbers_become_0() -> None:
    mask = torch.ones(7, 5, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        x = torch.full((7, 5), 0.1, dtype=dtype)
        assert masked_moments(x, mask).m2 == 0
        for eps in (1e-8, 0.0):
            assert not whiten(x, mask, eps=eps).any()


def test_ranks_that_share_moments_whiten_as_one() -> None:
    x, mask = numbers((6, 20), 0, 0.6)
    shared = masked_moments(x[:2], mask[:2]).merge(masked_moments(x[2:], mask[2:]))
    parts = [whiten(x[rows], mask[rows], moments=shared) for rows in (slice(2), slice(2, None))]
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask), rtol=1e-6, atol=1e-6)


def test_detached() -> None:
    x = torch.randn(4, requires_grad=True)
    mask = torch.ones(4, dtype=torch.bool)
    assert not whiten(x, mask).requires_grad
    assert not any(value.requires_grad for value in masked_moments(x, mask))


def test_errors_name_the_argument() -> None:
    x, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    for function in (masked_moments, whiten):
        for arguments, kind, message in (
            ((x.long(), mask), TypeError, "`x` must have a floating-point dtype, got torch.int64"),
            ((x, x), TypeError, "`mask` must be a bool tensor"),
            ((x, mask[:2]), ValueError, "`mask` must have shape that of `x` = [3], got [2]"),
            ((x, mask.to("meta")), ValueError, "`mask` is on meta, but `x` is on cpu"),
        ):
            with pytest.raises(kind, match=re.escape(message)):
                function(*arguments)
    with pytest.raises(ValueError, match="`eps` must not be negative, got -1"):
        whiten(x, mask, eps=-1)
