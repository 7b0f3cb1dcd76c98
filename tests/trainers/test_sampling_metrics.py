"""Metrics of a batch that was generated in several rounds."""

import math

import pytest

from dppo_kernels.trainers.sampling_metrics import combine_metrics


def test_rounds_are_combined_by_what_each_metric_is_taken_over() -> None:
    def round_(mean: float, clipped: float, terminated: float, calls: float, failures: float) -> dict[str, list[float]]:
        return {
            "completions/mean_length": [mean],
            "completions/min_length": [mean],
            "completions/max_length": [mean],
            "completions/clipped_ratio": [clipped],
            "completions/mean_terminated_length": [terminated],
            "completions/min_terminated_length": [terminated],
            "tools/call_frequency": [calls],
            "tools/failure_frequency": [failures],
        }

    # 8 rows of which 2 ended, 4 rows of which none did (where TRL writes 0) and 4 rows that all did.
    rounds = [round_(6, 0.75, 3, 2, 0.5), round_(12, 1, 0, 0, 0), round_(9, 0, 9, 4, 0.25)]
    assert combine_metrics(rounds, [8, 4, 4]) == pytest.approx(
        {
            "completions/mean_length": (8 * 6 + 4 * 12 + 4 * 9) / 16,
            "completions/min_length": 6,
            "completions/max_length": 12,
            "completions/clipped_ratio": (8 * 0.75 + 4) / 16,
            "completions/mean_terminated_length": (2 * 3 + 4 * 9) / 6,
            "completions/min_terminated_length": 3,
            "tools/call_frequency": (8 * 2 + 4 * 4) / 16,
            "tools/failure_frequency": (16 * 0.5 + 16 * 0.25) / 32,
        }
    )
    assert combine_metrics(rounds[1:2], [4])["completions/mean_terminated_length"] == 0
    assert combine_metrics([{"sampling/gap": [math.nan]}, {"sampling/gap": [2.0]}], [4, 12]) == {"sampling/gap": 2.0}
    assert combine_metrics([], []) == {}
