"""The products of a chunk that is made in torch: tiles of the head, and the gradient GEMMs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dppo_kernels._tiling import WEIGHT_TILE_ELEMENTS, chunks
from dppo_kernels.linear_logprobs.projection import Gradients, Projection


def weight_tiles(x: Projection) -> Iterator[tuple[slice, Tensor]]:
    """(columns, the head's rows there) in the precision products accumulate in: all at once, or copies of a bounded size."""
    vocab, width = x.weight.shape
    copied = x.weight.dtype != x.dtype or x.compute_dtype != x.dtype
    for cols in chunks(vocab, max(1, WEIGHT_TILE_ELEMENTS // max(width, 1)) if copied else vocab):
        yield cols, x.weight_columns(cols)


def accumulate_gradients(x: Projection, rows: Tensor, operand: Tensor, factor: Tensor, gradients: Gradients) -> None:
    """The gradient GEMMs of ``factor * operand`` [n, V]: 2 n HV for each trained input."""
    dhidden, dweight, dbias, dlow_hidden, dlow_weight = gradients
    every = slice(0, rows.shape[0])
    scaled = x.hidden_rows(every) * factor
    scaled_low = scaled if x.low_rank is None else x.low_hidden_rows(every) * factor
    dh = torch.zeros_like(scaled) if dhidden is not None else None
    dlow = torch.zeros_like(scaled_low) if dlow_hidden is not None else None
    for cols, w in weight_tiles(x):
        tile = operand[:, cols]
        if dh is not None:
            dh.addmm_(tile, w)
        if dweight is not None:
            dweight[cols].addmm_(tile.t(), scaled)
        if dbias is not None:
            dbias[cols].addmv_(tile.t(), factor.squeeze(1))
        if dlow is not None:
            dlow.addmm_(tile, x.low_weight_columns(cols))
        if dlow_weight is not None:
            dlow_weight[cols].addmm_(tile.t(), scaled_low)
    for out, sums in ((dhidden, dh), (dlow_hidden, dlow)):
        if out is not None and sums is not None:
            out[rows] = sums.mul_(factor)
