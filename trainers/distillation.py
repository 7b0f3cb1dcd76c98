"""A student compared with its teacher: from hidden states and heads, or from the logits of models that give their own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dppo_kernels import Stat, distill_loss, linear_distill_loss


def compare(
    student: Mapping[str, Any], teacher: Mapping[str, Any], loss_mask: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Stat]]:
    """`linear_distill_loss`, or `distill_loss` where one of the two has logits.

    Args:
        student: `hidden` [B, T, H], `weight` [V, H], `bias`, `logit_scale` and `softcap` of its head; or `logits` [B, T, V].
        teacher: the same.
        loss_mask: bool [B, T].
        options: of both losses.

    Raises:
        TypeError, ValueError: as the losses.
    """
    if "logits" in student or "logits" in teacher:
        return distill_loss(_logits(**student), _logits(**teacher), loss_mask, **options)
    sides = {f"{who}_{name}": x for who, side in (("student", student), ("teacher", teacher)) for name, x in side.items()}
    return linear_distill_loss(**sides, loss_mask=loss_mask, **options)


def own_logits(
    method: Callable[[Tensor, Tensor], Any], input_ids: Tensor, attention_mask: Tensor, length: int, vocab: int
) -> Tensor:
    """[B, T, V] before the last T = `length` positions, by a model's `get_student_logits` or `get_teacher_logits`.

    Raises:
        TypeError, ValueError: it returned something else than logits of every position over `vocab` tokens.
    """
    name, found = getattr(method, "__name__", "get_logits"), method(input_ids, attention_mask)
    if not isinstance(found, Tensor):
        raise TypeError(f"`{name}` must return a torch.Tensor, got {type(found).__name__}")
    expected = [*input_ids.shape, vocab]
    if list(found.shape) != expected:
        raise ValueError(f"`{name}` must return logits [B, S, V] = {expected}, got {list(found.shape)}")
    return found[:, -length - 1 : -1]


def _logits(
    logits: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    if logits is not None:
        return logits
    assert hidden is not None
    assert weight is not None
    z = linear(hidden, weight, bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
