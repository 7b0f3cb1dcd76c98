"""Hidden rows and a head: what every implementation of the family takes, and the logit transform in torch."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._numerics import stat_dtype
from dppo_kernels._shard import VocabShard, summed
from dppo_kernels._tiling import WEIGHT_TILE_ELEMENTS, chunks


class Needs(NamedTuple):
    """Of which inputs a gradient is wanted."""

    hidden: bool
    weight: bool
    bias: bool
    low_hidden: bool = False
    low_weight: bool = False


class Gradients(NamedTuple):
    """Of the inputs, None where it was not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None

    def sum_over_ranks(self, shard: VocabShard | None) -> "Gradients":
        """With complete gradients of hidden states, to which the columns of each rank added their part."""
        hidden, low_hidden = (summed(shard, x)[0] for x in (self.hidden, self.low_hidden))
        return self._replace(hidden=hidden, low_hidden=low_hidden)


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
    low_rank: tuple[Tensor, Tensor] | None = None  # [N, r] and [V, r]: their product is added to hidden @ weight.T
    shard: VocabShard | None = None  # where the head is one of several ranks' shards: V is the shard's, ids are its columns

    @property
    def dtype(self) -> torch.dtype:
        return stat_dtype(self.compute_dtype)

    def inputs(self) -> tuple[Tensor | None, ...]:
        """What may be trained, in the order of `Gradients`."""
        return (self.hidden, self.weight, self.bias, *(self.low_rank or (None, None)))

    @property
    def vocab(self) -> int:
        """Ids there are, on all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    def holds(self, ids: Tensor) -> Tensor:
        """Which ids are columns here."""
        return (ids >= 0) & (ids < self.weight.shape[0])

    @property
    def narrow(self) -> bool:
        """Whether kernels that rebuild logits have more to keep in registers than products."""
        return self.softcap is not None or self.bias is not None

    def select(self, rows: Tensor) -> "Projection":
        """The same head over a subset of rows (no copy when it is all of them)."""
        if rows.shape[0] == self.hidden.shape[0]:
            return self
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        low_rank = None if self.low_rank is None else (self.low_rank[0][rows], self.low_rank[1])
        return replace(self, hidden=self.hidden[rows], temperature=temperature, low_rank=low_rank)

    def cut(self, rows: slice) -> "Projection":
        """The same head over consecutive rows, without a copy."""
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        low_rank = None if self.low_rank is None else (self.low_rank[0][rows], self.low_rank[1])
        return replace(self, hidden=self.hidden[rows], temperature=temperature, low_rank=low_rank)

    def rounded(self, x: Tensor) -> Tensor:
        """An input as it enters a product: rounded as autocast asks, in the precision products accumulate in."""
        return x.to(self.compute_dtype).to(self.dtype)

    def hidden_rows(self, rows: slice) -> Tensor:
        return self.rounded(self.hidden[rows])

    def weight_columns(self, cols: slice) -> Tensor:
        return self.rounded(self.weight[cols])

    def low_hidden_rows(self, rows: slice) -> Tensor:
        assert self.low_rank is not None
        return self.rounded(self.low_rank[0][rows])

    def low_weight_columns(self, cols: slice) -> Tensor:
        assert self.low_rank is not None
        return self.rounded(self.low_rank[1][cols])

    def logits(
        self, h: Tensor, w: Tensor, rows: slice, cols: slice, out: Tensor, *, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``z`` of one tile in `out` [rows, cols], and (asked for) ``1 - tanh^2`` where there is a soft-cap."""
        z = torch.mm(h, w.t(), out=out)
        if self.low_rank is not None:
            z.addmm_(self.low_hidden_rows(rows), self.low_weight_columns(cols).t())
        if self.bias is not None:
            z += self.bias[cols].to(self.dtype)
        return self._transform(z, rows, with_slope)

    def target_logits(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """``z`` [N] of the ids [N] by dot products, and ``1 - tanh^2`` where there is a soft-cap (of ids that are here)."""
        if self.shard is None:
            return self._logits_at(ids)
        target = self.hidden.new_empty(ids.shape, dtype=self.dtype)
        slope = None if self.softcap is None else torch.empty_like(target)
        for part in chunks(ids.shape[0], max(1, WEIGHT_TILE_ELEMENTS // max(self.hidden.shape[1], 1))):
            rows, here = self.cut(part), self.holds(ids[part])
            z, of_part = rows._logits_at(torch.where(here, ids[part], 0))
            target[part] = torch.where(here, z, 0.0)
            if slope is not None and of_part is not None:
                slope[part] = of_part
        return summed(self.shard, target)[0], slope

    def _logits_at(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.hidden_rows(slice(0, ids.shape[0]))
        z = (self.rounded(self.weight[ids]) * h).sum(1, keepdim=True)
        if self.low_rank is not None:
            z += (self.rounded(self.low_rank[1][ids]) * self.rounded(self.low_rank[0])).sum(1, keepdim=True)
        if self.bias is not None:
            z += self.bias[ids, None].to(self.dtype)
        z, slope = self._transform(z, slice(0, z.shape[0]), True)
        return z.squeeze(1), None if slope is None else slope.squeeze(1)

    def _transform(self, z: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
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

    def bent(self, z: Tensor, rows: slice) -> Tensor:
        """The tanh that the soft-cap made the logits `z` [rows, any] of."""
        assert self.softcap is not None
        temperature = self.temperature[rows, None] if isinstance(self.temperature, Tensor) else self.temperature
        return z * (temperature / self.softcap)

    def row_slopes(self, n: int) -> Tensor:
        """``logit_scale / temperature`` [n]: what is left of dz / d(h W^T + b) without a soft-cap."""
        if isinstance(self.temperature, Tensor):
            return (self.logit_scale / self.temperature).to(self.dtype)
        return self.hidden.new_full((n,), self.logit_scale / self.temperature, dtype=self.dtype)

    def gradient_to_projection(self, dz: Tensor, slope: Tensor | None, rows: slice) -> Tensor:
        """Chain ``dL/dz`` back to ``dL/d(h W^T + b)``, in place."""
        if slope is not None:
            dz *= slope
        if isinstance(self.temperature, Tensor):
            return dz.mul_((self.logit_scale / self.temperature[rows])[:, None])
        scale = self.logit_scale / self.temperature
        return dz if scale == 1.0 else dz.mul_(scale)
