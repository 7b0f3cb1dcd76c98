"""Controllers of the KL coefficient: numbers that follow what is measured, saved with `state_dict`.

They hold Python floats and do the same arithmetic everywhere: processes that are told the same KL agree to the bit.
"""

from typing import Protocol

from dppo_kernels import _checks

ERROR_LIMIT = 0.2  # of the relative error that one update acts on


class KLController(Protocol):
    """Holds the coefficient that a KL penalty is multiplied by."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """Take in a measured KL.

        Args:
            kl: nats per completion, mean over the batch.
            n: completions it was measured on, over all processes.
        """

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on from here."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a `state_dict`."""


class FixedKLController:
    """A coefficient that stays.

    Args:
        coef: the coefficient, at least 0.

    Raises:
        TypeError, ValueError: a coefficient that is no finite number of at least 0.
    """

    def __init__(self, coef: float) -> None:
        _checks.check_not_negative("coef", coef)
        self.coef = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKLController:
    """Moves the coefficient in proportion to how far the measured KL is from a target.

    ``coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)``

    Args:
        coef: the first coefficient, at least 0. It stays positive as long as ``0.2 n < horizon``; 0 stays 0.
        target: nats per completion.
        horizon: completions over which a KL that is off by 20 % or more moves the coefficient by 20 %.

    Raises:
        TypeError, ValueError: an argument that is no finite number, or out of range. In `update`: a KL that is NaN or infinite,
            or a batch so large that the coefficient would become 0 or negative.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (1909.08593), section 2.2.
    """

    def __init__(self, coef: float, *, target: float, horizon: int) -> None:
        _checks.check_not_negative("coef", coef)
        _checks.check_positive("target", target)
        _checks.check_positive("horizon", horizon)
        self.coef, self.target, self.horizon = float(coef), float(target), horizon

    def update(self, kl: float, n: int) -> None:
        _checks.check_number("kl", kl)
        if ERROR_LIMIT * n >= self.horizon:
            raise ValueError(f"`horizon`={self.horizon} is too short for batches of {n}: it must exceed {ERROR_LIMIT * n:g}")
        error = min(max(kl / self.target - 1, -ERROR_LIMIT), ERROR_LIMIT)
        self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
