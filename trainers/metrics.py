"""Exact reduction of metric partial sums over processes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator

from dppo_kernels import Stat


class Reduced(NamedTuple):
    """One metric over all processes; NaN where nothing was counted."""

    mean: float
    max: float


def reduce_stats(accelerator: Accelerator, stats: Mapping[str, Stat]) -> dict[str, Reduced]:
    """Sum, count and maximum over ranks, in two collectives and one transfer to the host."""
    sums = torch.stack([x.float() for stat in stats.values() for x in (stat.sum, stat.count)])
    maxima = torch.stack([stat.max.float() for stat in stats.values()])
    sums = accelerator.reduce(sums, reduction="sum").view(-1, 2)
    maxima = accelerator.gather(maxima).view(-1, len(stats)).amax(0)
    rows = torch.cat([sums, maxima[:, None]], 1).tolist()
    return {
        name: Reduced(total / count, maximum) if count else Reduced(math.nan, math.nan)
        for name, (total, count, maximum) in zip(stats, rows, strict=True)
    }
