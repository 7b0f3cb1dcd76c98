"""KL controllers: the formula, its limits, and going on from a saved state."""

import pytest

from dppo_kernels.control import AdaptiveKLController, FixedKLController


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.1)
    controller.update(1e9, 10**6)
    assert controller.coef == 0.1
    other = FixedKLController(0.3)
    other.load_state_dict(controller.state_dict())
    assert other.coef == 0.1


def test_an_adaptive_coefficient_follows_its_target() -> None:
    """A KL that grows as the coefficient falls is steered to the target."""
    controller = AdaptiveKLController(1.0, target=6.0, horizon=1000)
    kl = 1.0 / controller.coef
    for _ in range(500):
        kl = 1.0 / controller.coef
        controller.update(kl, 100)
    assert kl == pytest.approx(6.0, rel=1e-3)
    resumed = AdaptiveKLController(0.5, target=6.0, horizon=1000)
    resumed.load_state_dict(controller.state_dict())
    for one in (controller, resumed):
        one.update(-3.0, 100)  # k1 may be negative
    assert resumed.coef == controller.coef
    zero = AdaptiveKLController(0.0, target=6.0, horizon=1000)
    zero.update(100.0, 100)
    assert zero.coef == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedKLController(-0.1), ValueError, "`coef` must not be negative, got -0.1"),
        (lambda: AdaptiveKLController(True, target=1.0, horizon=9), TypeError, "`coef` must be a number, got bool"),
        (lambda: AdaptiveKLController(0.1, target=0.0, horizon=9), ValueError, "`target` must be positive, got 0.0"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=0), ValueError, "`horizon` must be positive, got 0"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=9).update(float("nan"), 1), ValueError, "`kl` must be finite"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=9).update(1.0, 45), ValueError, "`horizon`=9 is too short"),
    ],
)
def test_what_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
