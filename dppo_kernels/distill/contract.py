"""What the distillation losses check, how they weigh rows, and what they return."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels._numerics import split_temperature, stat_dtype
from dppo_kernels.distill.reference import RowDivergence
from dppo_kernels.policy import Stat, partial_sums


class DistillAux(NamedTuple):
    """Per-token results, detached; 0 behind the mask. What was not asked for is None."""

    divergence: Tensor  # shape of the mask, nats; without T^2
    student_entropy: Tensor | None  # nats, at the temperature
    agrees: Tensor | None  # bool: the student's likeliest token is the teacher's


def check_loss_mask(loss_mask: Tensor) -> None:
    _checks.check_mask("loss_mask", loss_mask)
    if loss_mask.dim() not in (1, 2):
        raise ValueError(f"`loss_mask` must be [B, T] or [N], got {list(loss_mask.shape)}")


def check_vocabularies(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Of student and teacher, by the arguments that have them."""
    if sizes[0] != sizes[1]:
        got = f"`{names[0]}` has a vocabulary of {sizes[0]} and `{names[1]}` one of {sizes[1]}"
        raise ValueError(f"{got}: they must be over the same tokens")


def check_precisions(names: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
    """Of student and teacher: one precision of statistics serves both."""
    if stat_dtype(dtypes[0]) != stat_dtype(dtypes[1]):
        raise TypeError(f"`{names[0]}` is {dtypes[0]} and `{names[1]}` is {dtypes[1]}: both or none in float64")


def split_counted_temperature(temperature: float | Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """`split_temperature`, with 1 in rows that do not count: 0 times whatever stands there need not be 0."""
    row_temperature, scalar = split_temperature(temperature, mask.shape[0], dtype)
    return (None if row_temperature is None else torch.where(mask, row_temperature, 1.0)), scalar


def check_row_temperature(row_temperature: Tensor | None) -> None:
    """On CPU, where it costs no sync."""
    if row_temperature is not None and row_temperature.device.type == "cpu":
        _checks.check_row_temperature(row_temperature)


def loss_weights(temperature: float | Tensor, t_squared: bool) -> float | Tensor:
    """What rows' divergences are multiplied by: a number, or one per row."""
    return temperature * temperature if t_squared else 1.0


def aux_of(rows: RowDivergence, shape: Sequence[int], *, with_entropy: bool, with_agreement: bool) -> DistillAux:
    """Rows in the shape of the mask."""
    return DistillAux(
        rows.divergence.detach().reshape(shape),
        rows.entropy.reshape(shape) if with_entropy else None,
        rows.agrees.reshape(shape) if with_agreement else None,
    )


def finish_distill_loss(loss: Tensor, aux: DistillAux, loss_mask: Tensor, return_aux: bool) -> Any:
    """What distillation losses return."""
    values = {"divergence": aux.divergence, "student_entropy": aux.student_entropy, "agreement": aux.agrees}
    stats: dict[str, Stat] = {name: partial_sums(x, loss_mask) for name, x in values.items() if x is not None}
    return (loss, stats, aux) if return_aux else (loss, stats)
