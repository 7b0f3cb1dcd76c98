"""Temperature, calibration error and AUC: values known by hand, and a temperature that is found again."""

import numpy as np
import pytest
import torch

from dppo_kernels.trainers.tabular.calibration import expected_calibration_error, fit_temperature
from dppo_kernels.trainers.tabular.training import Examples, auc, discriminator_bce


def test_the_temperature_that_labels_were_drawn_with_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20000) * 2
    for temperature in (0.4, 1.0, 3.0):
        labels = (rng.random(len(logits)) < 1 / (1 + np.exp(-logits / temperature))).astype(float)
        assert fit_temperature(logits, labels, np.ones(len(logits))) == pytest.approx(temperature, rel=0.08)


def test_weights_count_as_repetitions() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=200), (rng.random(200) < 0.5).astype(float)
    counts = rng.integers(1, 4, 200)
    repeated = fit_temperature(np.repeat(logits, counts), np.repeat(labels, counts), np.ones(counts.sum()))
    assert fit_temperature(logits, labels, counts.astype(float)) == pytest.approx(repeated, rel=1e-3)


def test_calibration_error_by_hand() -> None:
    probabilities, labels = np.array([0.05, 0.05, 0.95, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    # The first bin says 0.05 where half are real, the last 29/30 where all are.
    ones = np.ones(5)
    assert expected_calibration_error(probabilities, labels, ones) == pytest.approx((2 * 0.45 + 3 * (1 - 2.9 / 3)) / 5)
    only_first = np.array([1.0, 1.0, 0, 0, 0])
    assert expected_calibration_error(probabilities, labels, only_first) == pytest.approx(0.45)


def test_auc_and_classes_that_weigh_the_same() -> None:
    assert auc(np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1])) == 0.75
    assert auc(np.array([0.0, 1]), np.array([1.0, 1])) == 0.5
    labels = torch.tensor([1.0, 1, 1, 0, 0])
    judged = torch.tensor([True, True, True, True, False])
    weights = Examples({}, labels, judged, judged).weights()
    torch.testing.assert_close(weights, torch.tensor([2 / 3] * 3 + [2.0] * 2))
    logits = torch.tensor([1.0, -2, 0, 3, 9])
    real, synthetic = (torch.nn.functional.softplus(x).mean() for x in (-logits[:3], logits[3:4]))
    torch.testing.assert_close(discriminator_bce(logits, labels, weights * judged), (real + synthetic) / 2)
