"""Group advantages: the properties, and TRL's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels import group_advantages

groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size), min_size=1, max_size=4)
)


@given(groups, st.floats(-5, 5), st.floats(0.5, 4))
def test_properties(rewards: list[list[float]], shift: float, factor: float) -> None:
    x = torch.tensor(rewards, dtype=torch.float64)
    size = x.shape[1]
    advantages = group_advantages(x.flatten(), size, eps=0.0).view_as(x)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(x), dtype=x.dtype), rtol=0, atol=1e-9)
    spread = x.std(1) > 1e-6
    torch.testing.assert_close(advantages.std(1)[spread], torch.ones(int(spread.sum()), dtype=x.dtype))
    moved = group_advantages((factor * x + shift).flatten(), size, eps=0.0).view_as(x)
    torch.testing.assert_close(moved[spread], advantages[spread], rtol=1e-6, atol=1e-6)
    centred = group_advantages(x.flatten(), size, scale=False).view_as(x)
    torch.testing.assert_close(centred, x - x.mean(1, keepdim=True))
    assert group_advantages(x.float().flatten(), size).dtype == torch.float32


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 64))
def test_equal_rewards_have_exactly_no_advantage(reward: float, size: int) -> None:
    """Rounding of a mean would leave tiny ones, and every token of the group would be trained on."""
    assert not group_advantages(torch.full((2 * size,), reward), size, eps=0.0).any()
    assert not group_advantages(torch.full((2 * size,), reward), size).any()


def test_unknown_rewards_are_left_out() -> None:
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 0.0, nan, nan, 3.0, nan, nan, nan, nan, nan, nan])
    advantages = group_advantages(rewards, 4, eps=0.0)
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages, torch.tensor([half, 0, -half, 0, *[0.0] * 8]))


def test_trl_computes_the_same() -> None:
    """Against its source for single groups of known rewards: mean, unbiased deviation, 1e-4."""
    utils = pytest.importorskip("trl.trainer.utils", reason="the trl extra is not installed")
    rewards = torch.randn(24)
    rewards[5] = torch.nan
    grouped = rewards.view(-1, 6)
    expected = (grouped - grouped.nanmean(1, keepdim=True)) / (utils.nanstd(grouped, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 6), expected.nan_to_num(0.0).flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": [1.0]}, TypeError, "`rewards` must be a torch.Tensor, got list"),
        ({"rewards": torch.ones(4, dtype=torch.long)}, TypeError, "`rewards` must"),
        ({"rewards": torch.ones(2, 2)}, ValueError, r"`rewards` must be \[B\], got \[2, 2\]"),
        ({"rewards": torch.ones(4), "group_size": 3}, ValueError, "must be an int that divides the 4 rewards, got 3"),
        ({"rewards": torch.ones(4), "group_size": 2.0}, ValueError, "got 2.0"),
        ({"rewards": torch.ones(4), "eps": -1.0}, ValueError, "`eps` must not be negative, got -1.0"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:

    with pytest.raises(error, match=message):
        group_advantages(**{"group_size": 2, **arguments})
