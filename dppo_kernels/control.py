"""Numbers that follow what is measured, saved with `state_dict`: controllers of the KL coefficient, moments of the scores.

They hold Python floats and do the same arithmetic everywhere: processes that are told the same numbers agree to the bit.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dppo_kernels import _checks
from dppo_kernels.moments import Moments, masked_moments

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


class BatchMoments(NamedTuple):
    """Of the numbers that one `RunningMoments.update` took in."""

    mean: float  # 0 if there were none
    std: float  # unbiased; 0 of one number or none
    excluded: int  # how many were NaN or infinite, and left out


class RunningMoments:
    """Mean and standard deviation of all numbers so far.

    Source: the running scores of TRL 0.11's PPOTrainer, without their start at a count of 1e-24; batches are merged by Chan,
    Golub & LeVeque (1979).
    """

    def __init__(self) -> None:
        self._state = (0.0, 0.0, 0.0)  # count, mean, sum of (x - mean)^2

    def _moments(self) -> Moments:
        return Moments(*torch.tensor(self._state, dtype=torch.float64).unbind())

    @property
    def count(self) -> int:
        """Numbers so far."""
        return int(self._state[0])

    @property
    def mean(self) -> float:
        """Their mean; 0 before the first."""
        return self._state[1]

    @property
    def std(self) -> float:
        """Their unbiased standard deviation; 0 of one number or none."""
        return float(self._moments().variance().sqrt())

    def update(self, values: Tensor) -> BatchMoments:
        """Take in a batch; one read from its device.

        Args:
            values: [...] floating; NaN and infinities are left out, and counted.

        Raises:
            TypeError: no floating-point tensor.
        """
        _checks.check_floating("values", values)
        finite = values.isfinite()
        batch = Moments(*torch.stack([x.double() for x in masked_moments(values, finite)]).cpu().unbind())
        count, mean, m2 = torch.stack(self._moments().merge(batch)).tolist()
        self._state = (count, mean, m2)
        return BatchMoments(float(batch.mean), float(batch.variance().sqrt()), values.numel() - int(batch.count))

    def state_dict(self) -> dict[str, float]:
        return dict(zip(("count", "mean", "m2"), self._state, strict=True))

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._state = (state["count"], state["mean"], state["m2"])


class ScoreProcessor:
    """Scales, centres and clips scores by the moments of all scores so far, the batch at hand included.

    ``clip((s - mean) / std, -c, c)``, without the mean unless `norm`. Where `std` is 0 (one score so far, or all were equal)
    the scale is 1. What is NaN or infinite is no score: it becomes NaN and moves no moment.

    Args:
        scaling: divide by the standard deviation.
        norm: subtract the mean first; needs `scaling`.
        clip: c, positive. None = no clipping.

    Raises:
        TypeError, ValueError: a `clip` that is no positive number; `norm` without `scaling`, which would be ignored.

    Source: `use_score_scaling`, `use_score_norm` and `score_clip` of TRL 0.11's PPOTrainer.
    """

    def __init__(self, *, scaling: bool = False, norm: bool = False, clip: float | None = None) -> None:
        if norm and not scaling:
            raise ValueError("`norm` would be ignored without `scaling`: set both, or neither")
        if clip is not None:
            _checks.check_positive("clip", clip)
        self.scaling, self.norm, self.clip = scaling, norm, clip
        self.moments = RunningMoments()

    def __call__(self, scores: Tensor, *, update: bool = True) -> Tensor:
        """Processed scores.

        Args:
            scores: [B] floating, of all processes.
            update: let them move the moments first; False where scores are only measured.

        Raises:
            TypeError: no floating-point tensor.
        """
        _checks.check_floating("scores", scores)
        if update:
            self.moments.update(scores)
        processed = torch.where(scores.isfinite(), scores, torch.nan)
        if self.scaling:
            centred = processed.double() - (self.moments.mean if self.norm else 0.0)
            processed = (centred / (self.moments.std or 1.0)).to(scores.dtype)
        return processed if self.clip is None else processed.clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, float]:
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.moments.load_state_dict(state)
