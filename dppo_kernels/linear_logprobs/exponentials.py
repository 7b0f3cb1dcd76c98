"""A chunk of rows as scaled exponentials: from logits to log-probs, and from coefficients to the operand of gradient GEMMs.

    e_v = exp(z_v - c), c the logit of the row's id t;  R = sum_{v != t} e_v;  S = R + e_t
    logp = (z_t - c) - log S;   dL/dz_v = -(g / S) e_v  for v != t,   dL/dz_t = (g / S) R

With ``-R`` stored in column t, the gradient of a log-prob is the chunk times one factor per row, ``-g / S``: it scales rows of
the GEMMs' small operands, and the chunk itself is written once. No digits cancel where p is near 1, since R leaves e_t out.
Where the id is so improbable that R could overflow, c is the row's largest logit. An entropy gradient is no multiple of e: the
chunk is then rewritten as dL/dz. A soft-cap's derivative is multiplied into e after it was summed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_kernels._row_stats import FINITE_MINUS_INF, pick_columns
from dppo_kernels._shard import Reduction, greatest
from dppo_kernels._tiling import TILE_ELEMENTS, chunks
from dppo_kernels.linear_logprobs.gradient_gemms import weight_tiles
from dppo_kernels.linear_logprobs.projection import Projection

# Above it, e times an entry of the head could overflow; rows there are scaled by their largest logit instead.
LARGEST_SUM = 2.0**64


class Scores(NamedTuple):
    """Statistics of scored rows."""

    logprobs: Tensor  # [n]
    entropy: Tensor | None = None  # [n]
    gathered: Tensor | None = None  # [n, K] log-probs of ids that were asked for
    is_top1: Tensor | None = None  # bool [n]
    log_sum_sq_probs: Tensor | None = None  # [n], where logits are not kept

    def spread(self, places: Tensor, n: int) -> "Scores":
        """Among `n` rows, at `places`; zeros elsewhere."""
        return Scores(
            *(None if x is None else x.new_zeros(n, *x.shape[1:]).index_copy_(0, places, x) for x in self)  # type: ignore[arg-type]
        )


class Exponentials(NamedTuple):
    """Scaled exponentials of a chunk, zeros in the columns of `ids`, and what was summed over them."""

    values: Tensor  # [n, V]
    ids: Tensor  # [n]
    anchor: Tensor  # [n] c
    target: Tensor  # [n] z_t
    target_slope: Tensor | None  # [n] 1 - tanh^2 at t
    rest: Tensor  # [n] R
    dot: Tensor | None  # [n] sum_{v != t} e_v (z_v - c)
    top: Tensor | None = None  # [n] max_{v != t} z_v - c

    def total(self) -> Tensor:
        """S [n]."""
        return self.rest + (self.target - self.anchor).exp()

    def log_total(self) -> Tensor:
        """log S; log1p where e_t = 1, which keeps the digits of 1 - p."""
        return torch.where(self.target == self.anchor, self.rest.log1p(), self.total().log())

    def scores(self, gathered: Tensor | None, gather_ids: Tensor | None) -> Scores:
        """Log-probs and entropy; `gathered` holds the logits [n, K] of `gather_ids`, of which negative ones give 0."""
        log_total = self.log_total()
        above = self.target - self.anchor  # 0, or so low that it does not count
        entropy = None
        if self.dot is not None:
            dot = self.dot + above.exp() * above.clamp(min=FINITE_MINUS_INF)
            entropy = (log_total - dot / self.total()).clamp_(min=0.0)
        logprobs = None
        if gathered is not None and gather_ids is not None:
            logprobs = (gathered - self.anchor[:, None]) - log_total[:, None]
            logprobs = logprobs.clamp_(max=0.0).masked_fill_(gather_ids < 0, 0.0)
        is_top1 = None if self.top is None else above >= self.top
        return Scores((above - log_total).clamp_(max=0.0), entropy, logprobs, is_top1)

    def keep_rows(self, keep: Tensor) -> tuple["Exponentials", Tensor]:
        """The rows where `keep`, in place, and which rows [n2] they were: those at the end fill the holes before them."""
        count = int(keep.sum())
        order = torch.arange(count, device=keep.device)
        if count == keep.shape[0]:
            return self, order
        holes = (~keep[:count]).nonzero().squeeze(1)
        movers = keep[count:].nonzero().squeeze(1) + count
        order[holes] = movers
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.values[hole].copy_(self.values[mover])
        rest = (None if x is None else x[order] for x in self[1:])
        return Exponentials(self.values[:count], *rest), order  # type: ignore[arg-type]


class Folding:
    """Exponentials of all rows of `x` in `out` [n, V], whose sums over the ranks are on their way until it `settle`s.

    FLOPs 2 n HV. With an entropy ``e (z - c)`` is summed as well, with a top the largest logit is found, and to fold the slope
    is to multiply the derivative of a soft-cap into the values. `target`: `Projection.target_logits` of the ids, if known.
    """

    def __init__(
        self,
        x: Projection,
        ids: Tensor,
        gather_ids: Tensor | None,
        out: Tensor,
        *,
        with_entropy: bool,
        fold_slope: bool,
        with_top: bool = False,
        target: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.x, self.ids, self.gather_ids, self.out = x, ids, gather_ids, out
        self.options = (with_entropy, fold_slope, with_top)
        self.target, self.target_slope = x.target_logits(ids) if target is None else target
        self._start(self.target)

    def _start(self, anchor: Tensor) -> None:
        self.anchor = anchor
        rest, dot, self.top, gathered = _fold(self.x, self.ids, self.gather_ids, self.out, anchor, *self.options)
        self.sums = Reduction(self.x.shard, (rest, dot, gathered))

    def settle(self) -> tuple[Exponentials, Tensor | None]:
        """The exponentials, and the logits [n, K] of the ids to gather."""
        rest, dot, gathered = self.sums.wait()
        fits = rest <= LARGEST_SUM  # False for NaN
        if not bool(fits.all()):
            rows, x = slice(0, self.ids.shape[0]), self.x
            for cols, w in weight_tiles(x):
                x.logits(x.hidden_rows(rows), w, rows, cols, self.out[:, cols])
            (largest,) = greatest(x.shard, self.out.amax(1))
            self._start(torch.where(fits, self.target, largest))
            rest, dot, gathered = self.sums.wait()
        (top,) = greatest(self.x.shard, self.top)
        found = Exponentials(self.out, self.ids, self.anchor, self.target, self.target_slope, rest, dot, top)
        return found, gathered


def gradient_operand(
    e: Exponentials, x: Projection, dlogprobs: Tensor, entropy: Tensor | None, entropy_weight: Tensor | None, *, rows: int
) -> tuple[Tensor, Tensor]:
    """(matrix [n, V], factor [n]): ``dL/d(h W^T + b)`` is the factor times the matrix. Written over the exponentials.

    `x` holds the same rows; `entropy_weight` is dL/dH of every row, given if it is not 0 (`fold_slope` was off then).
    """
    slopes = x.row_slopes(rows)
    if entropy_weight is None or entropy is None:
        values = -e.rest if e.target_slope is None else -e.rest * e.target_slope
        put_column(e.values, e.ids, values)
        return e.values, -(dlogprobs / e.total()) * slopes
    log_total, total = e.log_total(), e.total()
    on_probs = (-dlogprobs / total)[:, None]
    on_logprobs = (-entropy_weight / total)[:, None]
    for cols in chunks(e.values.shape[1], max(1, TILE_ELEMENTS // max(rows, 1))):
        tile = e.values[:, cols]
        z = tile.log().clamp_(min=FINITE_MINUS_INF)
        logp_plus_entropy = z + (entropy - log_total)[:, None]
        tile *= on_probs + on_logprobs * logp_plus_entropy
        if x.softcap is not None:
            # Where e underflowed, z is not that of a soft-capped logit.
            tile *= 1 - x.bent(z + e.anchor[:, None], slice(None)).clamp_(-1.0, 1.0).square()
    logp = (e.target - e.anchor) - log_total
    p = logp.exp()
    at_target = dlogprobs * (e.rest / total) - entropy_weight * p * (logp.clamp(min=FINITE_MINUS_INF) + entropy)
    if e.target_slope is not None:
        at_target = at_target * e.target_slope
    put_column(e.values, e.ids, at_target)
    return e.values, slopes


def _fold(
    x: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    out: Tensor,
    anchor: Tensor,
    with_entropy: bool,
    fold_slope: bool,
    with_top: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(R, D, largest logit, logits of the ids to gather) of this rank's columns; the exponentials are in `out`."""
    n = ids.shape[0]
    rows = slice(0, n)
    h = x.hidden_rows(rows)
    rest = torch.zeros_like(anchor)
    dot = torch.zeros_like(anchor) if with_entropy else None
    top = torch.full_like(anchor, -torch.inf) if with_top else None
    gathered = None if gather_ids is None else anchor.new_zeros(gather_ids.shape)
    for cols, w in weight_tiles(x):
        x.logits(h, w, rows, cols, out[:, cols])
        if gathered is not None and gather_ids is not None:
            gathered += pick_columns(out[:, cols], gather_ids, cols.start)
        # Temporaries of a soft-cap or an entropy are as wide as what they are made of: in cache-sized pieces. Without them too:
        # sums in another order would be others, and what else is asked for must not change a log-prob.
        step = max(1, TILE_ELEMENTS // max(n, 1))
        for piece in chunks(cols.stop - cols.start, step):
            first = cols.start + piece.start
            tile = out[:, first : cols.start + piece.stop]
            slope = 1 - x.bent(tile, slice(None)).square() if fold_slope and x.softcap is not None else None
            tile -= anchor[:, None]
            put_column(tile, ids - first, -torch.inf)
            if top is not None:
                torch.maximum(top, tile.amax(1), out=top)
            if dot is None:
                tile.exp_()
            else:
                e = tile.exp()
                dot += tile.clamp_(min=FINITE_MINUS_INF).mul_(e).sum(1)
                tile.copy_(e)
            rest += tile.sum(1)
            if slope is not None:
                tile *= slope
    return rest, dot, top, gathered


def put_column(tile: Tensor, local: Tensor, values: Tensor | float) -> None:
    """``tile[r, local[r]] = values[r]`` where that column is in the tile."""
    inside = (local >= 0) & (local < tile.shape[1])
    columns = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, columns, torch.where(inside, values, tile.gather(1, columns).squeeze(1))[:, None])
