"""How far predicted probabilities are from what happens, and a temperature that brings them closer (arXiv 1706.04599)."""

import numpy as np
from scipy.optimize import minimize_scalar

BINS = 10


def fit_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The T in [1/20, 20] for which sigmoid(logits / T) has the least weighted log loss on these labels."""

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return np.average(np.logaddexp(0, scaled) - labels * scaled, weights=weights)

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int = BINS) -> float:
    """Distance between predicted and observed frequency in equally wide bins, averaged by the weight that falls in each."""
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=weights * (probabilities - labels), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())
