"""Sequences packed one after the other into [N], without padding: row ``cu_seqlens[i]`` is the first of sequence i."""

from itertools import pairwise

import torch
from torch import Tensor

from dppo_kernels import _checks


def check_cu_seqlens(cu_seqlens: Tensor, name: str, rows: Tensor) -> None:
    """Raises TypeError or ValueError unless they are offsets [B + 1] into `rows` [N], which `name` names.

    On a CPU they are read; a compiled op reads them itself.
    """
    _checks.check_ids("cu_seqlens", cu_seqlens)
    if rows.dim() != 1:
        raise ValueError(f"`cu_seqlens` is of packed `{name}` [N], got {list(rows.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"`cu_seqlens` must be [B + 1] offsets, got shape {list(cu_seqlens.shape)}")
    _checks.check_device("cu_seqlens", cu_seqlens, name, rows)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        read_offsets(cu_seqlens, rows.shape[0])


def read_offsets(cu_seqlens: Tensor, n_rows: int) -> list[int]:
    """The offsets on the host; raises ValueError unless they rise from 0 to N."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != n_rows or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"`cu_seqlens` must rise from 0 to the {n_rows} packed rows, got {offsets}")
    return offsets


# Where sequences lie in [N]: their offsets, or how long all of them are.
Sequences = Tensor | int


def spread(values: Tensor, sequences: Sequences, n_rows: int) -> Tensor:
    """[N] from [B]: every row has the value of its sequence."""
    if not isinstance(sequences, Tensor):
        return values[:, None].expand(-1, sequences).reshape(-1)
    if not values.requires_grad:
        return values.repeat_interleave(sequences.diff(), output_size=n_rows)
    # The backward adds up rows one by one: in float32 that would lose digits over long sequences.
    return values.double().repeat_interleave(sequences.diff(), output_size=n_rows).to(values.dtype)


def sequence_sums(values: Tensor, sequences: Sequences) -> Tensor:
    """[B] from [N], differentiable, in the order of the rows; a sequence without rows has 0."""
    if isinstance(sequences, Tensor):
        # It adds up one by one.
        return torch.segment_reduce(values.double(), "sum", offsets=sequences, initial=0, unsafe=True).to(values.dtype)
    return values.view(-1, sequences).sum(1)
