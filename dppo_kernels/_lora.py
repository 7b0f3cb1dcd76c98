"""A LoRA lm_head: the frozen or trained base and its low-rank update, never added up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import autocast_dtype


@dataclass(frozen=True, eq=False)
class LoraWeight:
    """The head ``base + scale * b @ a``, passed as `weight`: ``h W^T = h base^T + (scale h a^T) b^T``, without the sum.

    Any of the three may require a gradient. Source: LoRA, Hu et al. (arXiv 2106.09685); `scale` is its ``alpha / r``.
    """

    base: Tensor  # [V, H]
    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float = 1.0

    def check(self, hidden: Tensor, prefix: str = "") -> None:
        """Raises TypeError or ValueError where `a`, `b` and `scale` do not fit the base or `hidden`."""
        weight, hidden_name = f"{prefix}weight", f"{prefix}hidden"
        for name, value in ((f"{weight}.a", self.a), (f"{weight}.b", self.b)):
            _checks.check_floating(name, value)
            _checks.check_device(name, value, hidden_name, hidden)
            if value.dtype != hidden.dtype and autocast_dtype(hidden.device) is None:
                raise TypeError(
                    f"`{hidden_name}` is {hidden.dtype} and `{name}` is {value.dtype}: cast one, or run under torch.autocast"
                )
        _checks.check_number(f"{weight}.scale", self.scale)
        vocab, width = self.base.shape
        rank = self.a.shape[0] if self.a.dim() else 0
        _checks.check_shape(f"{weight}.a", self.a, (rank, width), f"[r, H of `{weight}.base`]")
        _checks.check_shape(f"{weight}.b", self.b, (vocab, rank), f"[V of `{weight}.base`, r of `{weight}.a`]")
        if rank == 0:
            raise ValueError(f"`{weight}.a` must have at least one row, got shape [0, H]")


def vocabulary(weight: Tensor | LoraWeight) -> int:
    """V of a head."""
    return (weight.base if isinstance(weight, LoraWeight) else weight).shape[0]


def split_head(
    weight: Tensor | LoraWeight, hidden: Tensor, counted: Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(base [V, H], low-rank hidden [N, r], b [V, r]) of a head for `hidden` [N, H]; None where there is no LoRA.

    Rows that are not `counted` [N] are not read: whatever stands there would reach the gradient of `a`.
    """
    if not isinstance(weight, LoraWeight):
        return weight, None, None
    with torch.autocast(hidden.device.type, enabled=False):
        read = torch.where(counted[:, None], hidden, 0.0).to(compute_dtype)
        nothing = read.new_zeros(())
        low = torch.addmm(nothing, read, weight.a.to(compute_dtype).t(), beta=0, alpha=weight.scale)  # rounds once
    return weight.base, low, weight.b
