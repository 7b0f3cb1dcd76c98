"""The soft overlong penalty of DAPO (arXiv 2503.14476, eq. 13)."""

import math
from collections.abc import Callable, Sequence
from typing import Any


def soft_overlong_penalty(length: int, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to `max_length - buffer` tokens, then linear down to -factor at `max_length`, and -factor beyond."""
    excess = length - (max_length - buffer)
    return -factor * min(excess, buffer) / buffer if excess > 0 else 0.0


class SoftOverlongPenalty:
    """Reward function for TRL: the soft overlong penalty of every completion.

    An object rather than a closure: TRL may send reward functions to another process.

    Args:
        max_completion_length: the longest completion, in tokens, that is generated.
        buffer_len: over how many tokens below it the penalty grows, in [1, max_completion_length].
        factor: the full penalty, > 0.

    Raises:
        TypeError, ValueError: an argument outside what is said above.
    """

    __name__ = "overlong_penalty"

    def __init__(self, max_completion_length: int, buffer_len: int, factor: float = 1.0) -> None:
        for name, value in (("max_completion_length", max_completion_length), ("buffer_len", buffer_len)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r}")
        if not 1 <= buffer_len <= max_completion_length:
            raise ValueError(
                f"`buffer_len` must be in [1, max_completion_length], got {buffer_len} with "
                f"max_completion_length={max_completion_length}"
            )
        if not 0 < factor < math.inf:
            raise ValueError(f"`factor` must be positive and finite, got {factor}")
        self.max_completion_length = max_completion_length
        self.buffer_len = buffer_len
        self.factor = factor

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        penalties = [
            soft_overlong_penalty(len(ids), self.max_completion_length, self.buffer_len, self.factor) for ids in completion_ids
        ]
        if log_metric is not None and penalties:
            log_metric("overlong/frac", sum(penalty < 0 for penalty in penalties) / len(penalties))
            log_metric("overlong/mean_penalty", sum(penalties) / len(penalties))
        return penalties
