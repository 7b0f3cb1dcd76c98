"""Rewards per token, VAPO's lambda, explained variance."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels import explained_variance, gae, length_adaptive_lambda, token_rewards


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 2**20), st.sampled_from([0.0, 0.05]))
def test_rewards_land_on_the_last_token(rows: int, steps: int, seed: int, kl_coef: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, steps, generator=g) < torch.rand(rows, 1, generator=g)
    scores, kl = torch.randn(rows, generator=g), torch.where(mask, torch.randn(rows, steps, generator=g), torch.nan)
    scores[~mask.any(1)] = torch.nan  # goes nowhere
    rewards = token_rewards(scores, mask, kl=kl, kl_coef=kl_coef)
    assert rewards.shape == mask.shape
    assert not rewards[~mask].any()
    for row in range(rows):
        if not mask[row].any():
            continue
        last = int(mask[row].nonzero()[-1])
        expected = -kl_coef * kl[row][mask[row]]
        expected[-1] += scores[row]
        torch.testing.assert_close(rewards[row][mask[row]], expected)
        # With gamma 1 and lambda 1 every token's return is what is to come.
        assert rewards[row, last] == scores[row] - kl_coef * kl[row, last]
    if not kl_coef:
        assert torch.equal(rewards, token_rewards(scores, mask))
        whole = gae(rewards, torch.zeros_like(rewards), mask, lam=1.0).returns
        assert torch.equal(whole, torch.where(mask, scores[:, None], 0.0))


def test_rewards_keep_the_wider_dtype_and_no_graph() -> None:
    scores, mask = torch.ones(2, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    kl = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    assert token_rewards(scores, mask, kl=kl, kl_coef=0.1).dtype == torch.float64
    assert not token_rewards(scores, mask, kl=kl, kl_coef=0.1).requires_grad
    assert token_rewards(scores.bfloat16(), mask).dtype == torch.float32


def test_lambda_by_length() -> None:
    lam = length_adaptive_lambda(torch.tensor([0, 1, 20, 21, 40, 1000, 10**6]))
    torch.testing.assert_close(lam, torch.tensor([0, 0, 0, 1 - 1 / 1.05, 0.5, 0.98, 1 - 2e-5]), rtol=0, atol=1e-6)
    assert lam.dtype == torch.float32
    assert length_adaptive_lambda(torch.tensor([40.0], dtype=torch.float64), alpha=0.1).tolist() == [0.75]
    assert length_adaptive_lambda(torch.zeros(0, dtype=torch.long)).shape == (0,)


@given(st.integers(0, 30), st.integers(0, 2**20))
def test_explained_variance(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values, returns, mask = torch.randn(n, generator=g), torch.randn(n, generator=g), torch.rand(n, generator=g) < 0.7
    found = explained_variance(torch.where(mask, values, torch.nan), torch.where(mask, returns, torch.nan), mask)
    assert found.dtype == torch.float32
    assert found.dim() == 0
    if mask.sum() < 2:
        assert found.isnan()
        return
    v, r = values[mask].double(), returns[mask].double()
    expected = 1 - (r - v).square().mean() / r.var(unbiased=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert explained_variance(returns, returns, mask) == 1
    best_constant = r.mean().expand(n).float()
    torch.testing.assert_close(explained_variance(best_constant, returns, mask), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert explained_variance(best_constant + 1, returns, mask) < 0
    assert explained_variance(values, torch.full((n,), 0.1).double(), mask).isnan()


SCORES, MASK, FLAT = torch.ones(2), torch.ones(2, 3, dtype=torch.bool), torch.ones(3)
COUNTED = torch.ones(3, dtype=torch.bool)
ERRORS: list[tuple[Any, tuple, dict[str, Any], type[Exception], str]] = [
    (token_rewards, (SCORES.long(), MASK), {}, TypeError, "`scores` must have a floating-point dtype, got torch.int64"),
    (token_rewards, (SCORES, MASK.float()), {}, TypeError, "`mask` must be a bool tensor"),
    (token_rewards, (SCORES, COUNTED), {}, ValueError, "`mask` must be [B, T], got [3]"),
    (token_rewards, (FLAT, MASK), {}, ValueError, "`scores` must have shape [B] = [2], got [3]"),
    (token_rewards, (SCORES.to("meta"), MASK), {}, ValueError, "`scores` is on meta, but `mask` is on cpu"),
    (token_rewards, (SCORES, MASK), {"kl": MASK}, TypeError, "`kl` must have a floating-point dtype, got torch.bool"),
    (token_rewards, (SCORES, MASK), {"kl": FLAT}, ValueError, "`kl` must have shape that of `mask` = [2, 3], got [3]"),
    (token_rewards, (SCORES, MASK), {"kl": torch.ones(2, 3, device="meta")}, ValueError, "`kl` is on meta"),
    (token_rewards, (SCORES, MASK), {"kl_coef": 0.1}, ValueError, "`kl_coef` is 0.1: `kl` is needed"),
    (token_rewards, (SCORES, MASK), {"kl_coef": "0.1"}, TypeError, "`kl_coef` must be a number, got str"),
    (length_adaptive_lambda, ([3],), {}, TypeError, "`lengths` must be a torch.Tensor, got list"),
    (length_adaptive_lambda, (MASK,), {}, ValueError, "`lengths` must be [B], got [2, 3]"),
    (length_adaptive_lambda, (FLAT,), {"alpha": 0}, ValueError, "`alpha` must be positive, got 0"),
    (explained_variance, (COUNTED, FLAT, COUNTED), {}, TypeError, "`values` must have a floating-point dtype"),
    (explained_variance, (FLAT, COUNTED, COUNTED), {}, TypeError, "`returns` must have a floating-point dtype"),
    (explained_variance, (FLAT, FLAT, FLAT), {}, TypeError, "`mask` must be a bool tensor"),
    (explained_variance, (FLAT, SCORES, COUNTED), {}, ValueError, "`returns` must have shape that of `values` = [3], got [2]"),
    (explained_variance, (FLAT, FLAT, MASK), {}, ValueError, "`mask` must have shape that of `values` = [3], got [2, 3]"),
    (explained_variance, (FLAT, FLAT.to("meta"), COUNTED), {}, ValueError, "`returns` is on meta, but `values` is on cpu"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "kind", "message"), ERRORS, ids=[x[-1][:50] for x in ERRORS])
def test_errors_name_the_argument(function: Any, arguments: tuple, options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        function(*arguments, **options)
