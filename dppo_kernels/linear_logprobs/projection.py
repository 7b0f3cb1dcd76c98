"""Hidden rows and a head: what every implementation of the family takes, and the logit transform in torch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype


@dataclass(frozen=True)
class Projection:
    """Hidden rows and the head that turns them into logits."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float | Tensor  # scalar or [N]
    logit_scale: float
    softcap: float | None
    compute_dtype: torch.dtype  # inputs are rounded to it first (autocast); products accumulate in `dtype`

    @property
    def dtype(self) -> torch.dtype:
        return stat_dtype(self.compute_dtype)

    def select(self, rows: Tensor) -> "Projection":
        """The same head over a subset of rows (no copy when it is all of them)."""
        if rows.shape[0] == self.hidden.shape[0]:
            return self
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        return replace(self, hidden=self.hidden[rows], temperature=temperature)

    def hidden_rows(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.compute_dtype).to(self.dtype)

    def weight_columns(self, cols: slice) -> Tensor:
        return self.weight[cols].to(self.compute_dtype).to(self.dtype)

    def logits(
        self, h: Tensor, w: Tensor, rows: slice, cols: slice, buffer: Tensor, *, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``z`` of one tile in `buffer`, and (asked for) ``1 - tanh^2`` where there is a soft-cap."""
        z = buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
        torch.mm(h, w.t(), out=z)
        if self.bias is not None:
            z += self.bias[cols].to(self.dtype)
        slope = None
        if self.softcap is not None:
            z.mul_(self.logit_scale / self.softcap).tanh_()
            slope = 1 - z.square() if with_slope else None
            z *= self.softcap
        elif self.logit_scale != 1.0:
            z *= self.logit_scale
        if isinstance(self.temperature, Tensor):
            z /= self.temperature[rows, None]
        elif self.temperature != 1.0:
            z /= self.temperature
        return z, slope

    def gradient_to_projection(self, dz: Tensor, slope: Tensor | None, rows: slice) -> Tensor:
        """Chain ``dL/dz`` back to ``dL/d(h W^T + b)``, in place."""
        if slope is not None:
            dz *= slope
        if isinstance(self.temperature, Tensor):
            return dz.mul_((self.logit_scale / self.temperature[rows])[:, None])
        scale = self.logit_scale / self.temperature
        return dz if scale == 1.0 else dz.mul_(scale)
