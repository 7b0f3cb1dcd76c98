"""Contract checks: every message names the argument, what it got and what was expected."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")


def check_floating(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, got {value.dtype}")


def check_ids(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{name}` must hold token ids as int64 or int32, got {value.dtype}")


def check_mask(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"`{name}` must be a bool tensor (True = counts), got {value.dtype}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {meaning} = {list(expected)}, got {list(value.shape)}")


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"`{name}` is on {value.device}, but `{like_name}` is on {like.device}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(repr(c) for c in choices)}; got {value!r}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}")


def check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}")


def check_fraction(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` must be an int of at least {least}, got {value!r}")


def check_workspace_bytes(value: object) -> None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"`workspace_bytes` must be an int >= 0, got {value!r}")


def check_temperature(temperature: float | Tensor, like_name: str, like: Tensor) -> None:
    """A positive number, or one per element of `like`."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return
    check_floating("temperature", temperature)
    if temperature.dim():
        check_shape("temperature", temperature, like.shape, f"one per row, {like_name}.shape")
    check_device("temperature", temperature, like_name, like)
    if temperature.requires_grad:
        raise ValueError("`temperature` is not differentiable: detach it")


def check_gather_ids(gather_ids: Tensor, ids: Tensor) -> None:
    check_ids("gather_ids", gather_ids)
    if gather_ids.shape[:-1] != ids.shape:
        raise ValueError(f"`gather_ids` must be [*ids.shape, K]; got {list(gather_ids.shape)} for ids {list(ids.shape)}")
    check_device("gather_ids", gather_ids, "ids", ids)


def check_values(
    ids: Tensor,
    gather_ids: Tensor | None,
    row_temperature: Tensor | None,
    vocab: int,
    ignore_index: int | None,
    *,
    ids_name: str = "ids",
    gather_name: str = "gather_ids",
) -> None:
    """Value checks, a host sync each on CUDA: ids in [0, vocab) or ignored, gather ids below vocab, temperatures positive."""
    bad = (ids < 0) | (ids >= vocab)
    if ignore_index is not None:
        bad &= ids != ignore_index
    _raise_first(ids_name, ids, bad, f"in [0, {vocab})" + ("" if ignore_index is None else f" or {ignore_index}"))
    if gather_ids is not None:
        _raise_first(gather_name, gather_ids, gather_ids >= vocab, f"below {vocab} (negative = padding)")
    if row_temperature is not None:
        check_row_temperature(row_temperature)


def check_row_temperature(temperature: Tensor) -> None:
    """A value check: see `check_values`."""
    _raise_first("temperature", temperature, ~(temperature > 0) | temperature.isinf(), "positive and finite")


def _raise_first(name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"`{name}` must be {expected}; got {values[where].item()} at index {list(where)}")


def check_logits(logits: Tensor, ids_name: str, ids: Tensor) -> None:
    """Floating logits [..., V] and integer ids [...] of one shape and device."""
    check_floating("logits", logits)
    check_ids(ids_name, ids)
    if logits.dim() != ids.dim() + 1 or logits.shape[:-1] != ids.shape:
        raise ValueError(f"`logits` must be [*{ids_name}.shape, V]; got {list(logits.shape)} for {ids_name} {list(ids.shape)}")
    check_device(ids_name, ids, "logits", logits)
