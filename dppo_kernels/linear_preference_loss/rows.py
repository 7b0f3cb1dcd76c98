"""From [2P, T] or packed [N] arguments to rows in the order in which pairs are worked on, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels import _checks


@dataclass(frozen=True)
class Layout:
    """How rows of chosen and rejected sequences lie in the caller's tensors."""

    n_pairs: int
    length: int | None  # T of [2P, T]; None: packed [N]
    sequences: Tensor  # int64 [N], in working order

    @classmethod
    def of(cls, ids: Tensor, sequence_ids: Tensor | None, n_pairs: int | None) -> "Layout":
        """The layout of `ids`, checked.

        Raises:
            TypeError, ValueError: shapes that are neither, or arguments of one with the other.
        """
        if ids.dim() == 2:
            if sequence_ids is not None or n_pairs is not None:
                raise ValueError("`sequence_ids` and `n_pairs` are for packed `ids` [N], got [2P, T]")
            n, length = ids.shape
            if n % 2:
                raise ValueError(f"`ids` must be [2P, T], chosen then rejected: got {n} sequences")
            pairs = torch.arange(n // 2, device=ids.device)
            return cls(n // 2, length, torch.stack([pairs, pairs + n // 2], 1).reshape(-1).repeat_interleave(length))
        if ids.dim() != 1 or sequence_ids is None or n_pairs is None:
            raise ValueError(f"`ids` must be [2P, T], or [N] with `sequence_ids` and `n_pairs`; got {list(ids.shape)}")
        _checks.check_ids("sequence_ids", sequence_ids)
        _checks.check_shape("sequence_ids", sequence_ids, ids.shape, "that of `ids`")
        _checks.check_device("sequence_ids", sequence_ids, "ids", ids)
        _checks.check_count("n_pairs", n_pairs)
        if sequence_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # there, the op checks
            _checks.check_values(sequence_ids, None, None, 2 * n_pairs, None, ids_name="sequence_ids")
        return cls(n_pairs, None, sequence_ids.long())

    @property
    def unit(self) -> int:
        """Rows after which a pair is complete."""
        return self.sequences.shape[0] if self.length is None else max(2 * self.length, 1)

    def rows(self, values: Tensor) -> Tensor:
        """[2P, T, ...] or [N, ...] as rows, the sequences of a pair after each other."""
        if self.length is None:
            return values
        shape = values.shape[2:]
        return values.reshape(2, self.n_pairs, self.length, *shape).transpose(0, 1).reshape(self.sequences.shape[0], *shape)

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows [N] as the caller's tensors lie."""
        if self.length is None:
            return rows
        return rows.view(self.n_pairs, 2, self.length).transpose(0, 1).reshape(2 * self.n_pairs, self.length)
