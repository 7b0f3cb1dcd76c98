"""Metrics as partial sums: accumulated over micro-batches, reduced over processes once per log, exact in both."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dppo_kernels import Stat

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases


class Reduced(NamedTuple):
    """One metric over all processes."""

    mean: float
    max: float


def reduce_stats(accelerator: Accelerator, stats: Mapping[str, Stat]) -> dict[str, Reduced]:
    """Mean and maximum over ranks, in two collectives and one transfer to the host; left out where nothing was counted."""
    sums = torch.stack([x.float() for stat in stats.values() for x in (stat.sum, stat.count)])
    maxima = torch.stack([stat.max.float() for stat in stats.values()])
    sums = accelerator.reduce(sums, reduction="sum").view(-1, 2)
    maxima = accelerator.gather(maxima).view(-1, len(stats)).amax(0)
    rows = torch.cat([sums, maxima[:, None]], 1).tolist()
    return {
        name: Reduced(total / count, maximum) for name, (total, count, maximum) in zip(stats, rows, strict=True) if count > 0
    }


class StatLoggingMixin(Host):
    """Put first in the bases. `record` stats at every micro-batch; they are logged under the names of `stat_metrics`."""

    stat_metrics: Mapping[str, tuple[str, str]]  # logged name -> (name of the stat, "mean" or "max")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stats: dict[str, dict[str, Stat]] = {"train": {}, "eval": {}}
        super().__init__(*args, **kwargs)

    def record(self, stats: Mapping[str, Stat]) -> None:
        """Add the stats of one micro-batch to those of the current logging window; no host sync."""
        window = self._stats["train" if self.model.training else "eval"]
        for name, stat in stats.items():
            window[name] = window[name].merge(stat) if name in window else stat

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        reduced: dict[str, Reduced] = {}
        if self._stats[mode]:
            reduced = reduce_stats(self.accelerator, self._stats[mode])
            for name, (stat, read) in self.stat_metrics.items():
                if stat in reduced and not math.isnan(getattr(reduced[stat], read)):
                    self._metrics[mode][name].append(getattr(reduced[stat], read))
            self._stats[mode] = {}
        super().log(logs, start_time)
        self.inspect_logged(mode, reduced)

    def inspect_logged(self, mode: str, reduced: Mapping[str, Reduced]) -> None:
        """Called after every log with the stats of its window over all processes; a subclass may stop the run here."""

    def extra_resume_state(self) -> dict[str, Any]:
        stats: dict[str, dict[str, tuple[Tensor, ...]]] = {
            mode: {name: tuple(stat) for name, stat in window.items()} for mode, window in self._stats.items()
        }
        return {**super().extra_resume_state(), "stats": stats}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._stats = {mode: {name: Stat(*x) for name, x in window.items()} for mode, window in state["stats"].items()}
