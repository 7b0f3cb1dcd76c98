"""Generalised advantages and returns of B = N / 4 rows of T = 16 H steps (V means nothing here): C1 is [256, 4096].

In `gae` half of the steps count, at random; in `gae_full` all do, and the peer need not look. The floor is memory: rewards,
values and mask are read once, advantages and returns written once, 17 bytes a step in float32. TRL has no such function left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

GAMMA, LAMBDA = 1.0, 0.95


class Inputs(NamedTuple):
    rewards: Tensor  # [B, T]
    values: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    upstream: Tensor  # unused: no gradient flows


def ours(x: Inputs) -> Tensor:
    from dppo_kernels import gae

    return gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAMBDA).returns


def blocked(x: Inputs) -> Tensor:
    from dppo_kernels import gae

    return gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAMBDA, backend="torch").returns


def loop(x: Inputs) -> Tensor:
    """As PPO trainers write it, over the batch at once; masked steps are skipped."""
    rewards, values, mask = x.rewards, x.values, x.mask
    rewards, values = (y if y.dtype == torch.float64 else y.float() for y in (rewards, values))
    advantage, next_value, found = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = torch.where(here, delta + GAMMA * LAMBDA * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return torch.where(mask, advantages + values, 0.0)


def loop_over_all(x: Inputs) -> Tensor:
    """The same where every step counts."""
    rewards, values = (y if y.dtype == torch.float64 else y.float() for y in (x.rewards, x.values))
    advantage, next_value, found = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAMBDA * advantage
        next_value = values[:, t]
        found.append(advantage)
    return torch.stack(found[::-1], 1) + values


@dataclass(frozen=True)
class Variant:
    """See `Case`."""

    counted: float  # share of the steps
    peer: Callable[[Inputs], Tensor]
    MODES = ("forward",)
    MAX_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-5}  # noqa: RUF012
    MAX_GRADIENT_ERROR = dict.fromkeys(MAX_ERROR, 0.0)  # nothing is trained

    @property
    def PROVIDERS(self) -> dict[str, Callable[[Inputs], Tensor]]:
        return {"dppo_kernels": ours, "dppo_kernels in torch": blocked, "naive": self.peer}

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        rows, steps = shape.n // 4, 16 * shape.h
        rewards, values = (torch.randn(rows, steps, generator=g, device=device).to(dtype) for _ in range(2))
        mask = torch.rand(rows, steps, generator=g, device=device) < self.counted
        return Inputs(rewards, values, mask, rewards.new_empty(0))

    def rows(self, x: Inputs, n: int) -> Inputs:
        return Inputs(x.rewards[:n], x.values[:n], x.mask[:n], x.upstream)

    def exact(self, x: Inputs) -> Tensor:
        return loop(x)

    def work(self, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> tuple[float, str]:
        return 4.0 * shape.n * shape.h * (2 * dtype.itemsize + 1 + 8), "byte"

    def needs_bytes(self, shape: Shape, provider: str) -> int:
        return 0


VARIANTS = {"gae": Variant(0.5, loop), "gae_full": Variant(2.0, loop_over_all)}
