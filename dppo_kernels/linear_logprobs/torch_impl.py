"""Tiled torch implementation of the linear log-prob family, with a recomputing backward.

Only one tile of logits (rows x vocabulary columns, in the statistics' precision) exists at a time. Saved for the backward: the
inputs, and per row the maximum, the log-sum relative to it and the entropy; if asked, the logits of the first rows as well.
Vocabulary tiles are the outer loop, so a weight tile is read (and upcast) once and a tile of ``dweight`` is accumulated in full
precision and rounded once. FLOPs: forward 2 NHV; backward 2 NHV recompute (not of rows whose logits were kept) + 2 NHV per
gradient of hidden and weight, over rows with upstream gradient only (a LoRA: the same with r in place of H, on top).
"""

import torch
from torch import Tensor

from dppo_kernels._row_stats import RowStats, Upstream, logits_gradient
from dppo_kernels._shard import summed
from dppo_kernels._tiling import chunks, matrix, pick_linear_tile
from dppo_kernels.linear_logprobs.projection import Gradients, Needs, Projection


def linear_logprobs_fwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    *,
    ignore_index: int,
    outputs: frozenset[str],
    keep_rows: int = 0,
) -> dict[str, Tensor]:
    """Outputs by name plus `row_max` and `log_sum`, for all N rows; rows that `ids` ignores never enter a GEMM and are 0.

    `keep_rows`: for how many of the first rows to score ``kept`` [keep_rows, V] holds the logits.
    """
    n = ids.shape[0]
    rows = (ids != ignore_index).nonzero().squeeze(1)
    active = projection.select(rows)
    stats = RowStats(ids[rows], None if gather_ids is None else gather_ids[rows], outputs, active.dtype)
    vocab = projection.weight.shape[0]
    tile = pick_linear_tile(rows.shape[0], *projection.weight.shape)
    buffer = active.hidden.new_empty(tile.rows * tile.cols, dtype=active.dtype)
    kept = active.hidden.new_empty((keep_rows, vocab), dtype=active.dtype)
    n_kept = min(keep_rows, rows.shape[0])
    for cols in chunks(vocab, tile.cols) if rows.shape[0] else ():
        w = active.weight_columns(cols)
        for part in _row_parts(n_kept, rows.shape[0], tile.rows):
            h = active.hidden_rows(part)
            z, _ = active.logits(h, w, part, cols, matrix(buffer, h.shape[0], w.shape[0]))
            if part.stop <= n_kept:
                kept[part, cols] = z
            stats.update(part, cols.start, z)
    if active.shard is not None and rows.shape[0]:
        stats.merge_ranks(active.shard)
    finished = stats.finish()
    out = {name: value.new_zeros(n, *value.shape[1:]).index_copy_(0, rows, value) for name, value in finished.items()}
    return {**out, "kept": kept} if keep_rows else out


def _row_parts(kept: int, rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, none of which holds both rows whose logits are kept and others.

    Forward and backward take the same: a GEMM of other rows rounds otherwise, and where p is 1 the difference of two logits
    that should be equal is all that p - 1 is.
    """
    return chunks(kept, size) + [slice(kept + part.start, kept + part.stop) for part in chunks(rows - kept, size)]


def linear_logprobs_bwd(
    projection: Projection,
    ids: Tensor,
    gather_ids: Tensor | None,
    upstream: Upstream,
    saved: dict[str, Tensor],  # row_max, log_sum, entropy where it has an upstream gradient, and kept if logits were
    *,
    ignore_index: int,
    needs: tuple[bool, ...],  # as `Needs`
) -> Gradients:
    """Gradients of the inputs in their own dtypes; rows without upstream gradient never enter a GEMM."""
    wanted = Needs(*needs)
    counted = ids != ignore_index
    rows, _ = upstream.partition(counted)
    n_rows, vocab = rows.shape[0], projection.weight.shape[0]
    active, dtype = projection.select(rows), projection.dtype
    hidden, weight, bias, low_hidden, low_weight = projection.inputs()
    assert hidden is not None
    assert weight is not None

    def row_sums(x: Tensor | None, need: bool) -> Tensor | None:
        return x.new_zeros((n_rows, x.shape[1]), dtype=dtype) if need and x is not None else None

    def by_column(x: Tensor | None, need: bool) -> Tensor | None:
        return torch.zeros_like(x) if need and x is not None else None

    dhidden_rows, dlow_rows = row_sums(hidden, wanted.hidden), row_sums(low_hidden, wanted.low_hidden)
    dweight, dbias = by_column(weight, wanted.weight), by_column(bias, wanted.bias)
    dlow_weight = by_column(low_weight, wanted.low_weight)

    upstream = upstream.take(rows, dtype)
    kept = saved.get("kept")
    per_row = {name: value[rows] for name, value in saved.items() if name != "kept"}
    row_ids, row_gather_ids = ids[rows], None if gather_ids is None else gather_ids[rows]
    tile = pick_linear_tile(n_rows, *weight.shape)
    buffer = hidden.new_empty(tile.rows * tile.cols, dtype=dtype)
    n_kept = 0
    if kept is not None:  # rows are in ascending order both here and in the forward: those whose logits were kept come first
        place = (counted.cumsum(0) - 1)[rows]
        n_kept = int((place < kept.shape[0]).sum())
    parts = _row_parts(n_kept, n_rows, tile.rows)
    for cols in chunks(vocab, tile.cols) if n_rows else ():
        w = active.weight_columns(cols)
        dw = torch.zeros_like(w) if dweight is not None else None
        db = w.new_zeros(w.shape[0]) if dbias is not None else None
        dlow = None if dlow_weight is None else dlow_weight.new_zeros(dlow_weight[cols].shape, dtype=dtype)
        for part in parts:
            h = active.hidden_rows(part)
            z = matrix(buffer, h.shape[0], w.shape[0])
            if kept is not None and part.stop <= n_kept:
                slope = None
                torch.index_select(kept[:, cols], 0, place[part], out=z)
                if active.softcap is not None:
                    slope = 1 - active.bent(z, part).square_()
            else:
                z, slope = active.logits(h, w, part, cols, z, with_slope=True)
            dz = logits_gradient(
                z,
                cols.start,
                row_max=per_row["row_max"][part],
                log_sum=per_row["log_sum"][part],
                entropy=per_row["entropy"][part] if "entropy" in per_row else None,
                ids=row_ids[part],
                gather_ids=None if row_gather_ids is None else row_gather_ids[part],
                upstream=Upstream(*(None if grad is None else grad[part] for grad in upstream)),
            )
            dz = active.gradient_to_projection(dz, slope, part)
            if dhidden_rows is not None:
                dhidden_rows[part].addmm_(dz, w)
            if dw is not None:
                dw.addmm_(dz.t(), h)
            if db is not None:
                db += dz.sum(0)
            if dlow_rows is not None:
                dlow_rows[part].addmm_(dz, active.low_weight_columns(cols))
            if dlow is not None:
                dlow.addmm_(dz.t(), active.low_hidden_rows(part))
        if dweight is not None and dw is not None:
            dweight[cols] = dw
        if dbias is not None and db is not None:
            dbias[cols] = db
        if dlow_weight is not None and dlow is not None:
            dlow_weight[cols] = dlow

    def spread(x: Tensor | None, values: Tensor | None) -> Tensor | None:
        if x is None or values is None:
            return None
        out = torch.zeros_like(x)
        out[rows] = values.to(x.dtype)
        return out

    dhidden_rows, dlow_rows = (summed(active.shard, x)[0] for x in (dhidden_rows, dlow_rows))  # together they would be copied
    return Gradients(spread(hidden, dhidden_rows), dweight, dbias, spread(low_hidden, dlow_rows), dlow_weight)
