"""KL controllers and running moments: the formulas, their limits, and going on from a saved state."""

import math

import pytest
import torch

from dppo_kernels.control import AdaptiveKLController, FixedKLController, RunningMoments, ScoreProcessor


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
        (
            lambda: RunningMoments().update(torch.arange(3)),
            TypeError,
            "`values` must have a floating-point dtype, got torch.int64",
        ),
        (lambda: RunningMoments().update([1.0]), TypeError, "`values` must be a torch.Tensor, got list"),
        (lambda: ScoreProcessor(norm=True), ValueError, "`norm` would be ignored without `scaling`"),
        (lambda: ScoreProcessor(clip=0.0), ValueError, "`clip` must be positive, got 0.0"),
        (lambda: ScoreProcessor()(torch.arange(3)), TypeError, "`scores` must have a floating-point dtype"),
    ],
)
def test_what_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_running_moments_are_those_of_all_numbers_so_far() -> None:
    """Also of numbers far from 0, where a sum of squares would lose them."""
    torch.manual_seed(0)
    seen, running = torch.empty(0, dtype=torch.float64), RunningMoments()
    assert (running.count, running.mean, running.std) == (0, 0.0, 0.0)
    for size in (1, 2, 7, 1, 300):
        batch = torch.randn(size, dtype=torch.float64) + 1e6
        seen = torch.cat([seen, batch])
        found = running.update(batch.view(1, -1))
        assert found.mean == pytest.approx(float(batch.mean()), rel=1e-12)
        assert found.std == pytest.approx(0.0 if size == 1 else float(batch.std()), rel=1e-6)
        assert found.excluded == 0
        assert running.count == len(seen)
        assert running.mean == pytest.approx(float(seen.mean()), rel=1e-12)
        assert running.std == pytest.approx(0.0 if len(seen) == 1 else float(seen.std()), rel=1e-6)
    resumed = RunningMoments()
    resumed.load_state_dict(running.state_dict())
    for one in (running, resumed):
        one.update(torch.tensor([0.5, -3.0]))
    assert resumed.state_dict() == running.state_dict()
    assert all(type(value) is float for value in running.state_dict().values())


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    running = RunningMoments()
    found = running.update(torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf]))
    assert found == (2.0, pytest.approx(2**0.5), 3)
    before = running.state_dict()
    assert running.update(torch.full((4,), math.nan)) == (0.0, 0.0, 4)
    assert running.update(torch.empty(0)) == (0.0, 0.0, 0)
    assert running.state_dict() == before


def test_processing_a_first_batch_of_one_and_constant_scores() -> None:
    """Without a deviation the scale is 1; centred scores are then 0."""
    processor = ScoreProcessor(scaling=True, norm=True)
    assert processor(torch.tensor([5.0])).tolist() == [0.0]
    assert processor(torch.tensor([5.0, 5.0])).tolist() == [0.0, 0.0]
    assert processor(torch.tensor([8.0])).tolist() == [pytest.approx((8 - 5.75) / 1.5)]  # 5, 5, 5, 8
    assert ScoreProcessor(scaling=True)(torch.tensor([5.0, 5.0])).tolist() == [5.0, 5.0]
    assert ScoreProcessor(scaling=True, clip=2.0)(torch.tensor([-5.0, -5.0])).tolist() == [-2.0, -2.0]


def test_scores_that_are_none_stay_none() -> None:
    for options in ({}, {"scaling": True}, {"scaling": True, "norm": True}, {"clip": 1.0}):
        processor = ScoreProcessor(**options)
        processed = processor(torch.tensor([1.0, math.nan, 4.0, math.inf]))
        assert processed.isnan().tolist() == [False, True, False, True]
        assert processor.moments.count == 2
    assert not ScoreProcessor(scaling=True, norm=True)(torch.full((3,), math.nan)).isfinite().any()


def test_scores_that_are_only_measured_move_nothing() -> None:
    processor = ScoreProcessor(scaling=True, norm=True, clip=1.5)
    processor(torch.tensor([0.0, 4.0]))
    before = processor.state_dict()
    assert processor(torch.tensor([2.0, 100.0]), update=False).tolist() == [0.0, 1.5]
    assert processor.state_dict() == before
    other = ScoreProcessor(scaling=True, norm=True, clip=1.5)
    other.load_state_dict(before)
    assert torch.equal(other(torch.tensor([1.0])), processor(torch.tensor([1.0])))
