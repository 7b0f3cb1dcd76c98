"""Corrupted rows: what each corruption changes and leaves, that the mask tells exactly, and seeds."""

import numpy as np
import pandas as pd
import pytest

from dppo_kernels.trainers.tabular import CORRUPTIONS, Split, Table, corruptions_for, validity
from dppo_kernels.trainers.tabular.negatives import add_noise, flip_special_codes, permute_columns, resample_cells
from tests.trainers.tabular.conftest import write

CODES = (-9.0, -8.0, -7.0)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_masks_tell_what_was_replaced(kind: str, heloc: Table) -> None:
    real = heloc.frame
    negatives = CORRUPTIONS[kind].corrupt(heloc.schema, real, np.random.default_rng(0))
    assert list(negatives.frame.columns) == list(heloc.schema.columns)
    assert len(negatives.frame) > 0.9 * len(real)
    differs = negatives.frame.to_numpy() != real.loc[negatives.frame.index].to_numpy()
    np.testing.assert_array_equal(differs, negatives.replaced)
    assert differs.any(axis=1).all()
    assert all(validity(heloc.schema, text) for text in write(heloc.schema, negatives.frame))
    again = CORRUPTIONS[kind].corrupt(heloc.schema, real, np.random.default_rng(0))
    other = CORRUPTIONS[kind].corrupt(heloc.schema, real, np.random.default_rng(1))
    pd.testing.assert_frame_equal(again.frame, negatives.frame)
    assert not again.frame.equals(other.frame)


def test_permuted_columns_keep_every_value_and_no_correlation(cancer: Table) -> None:
    negatives = permute_columns(cancer.schema, cancer.frame, np.random.default_rng(0))
    assert len(negatives.frame) == len(cancer.frame)
    for column in cancer.schema.columns:
        assert sorted(negatives.frame[column]) == sorted(cancer.frame[column])
    assert cancer.frame["mean radius"].corr(cancer.frame["mean perimeter"]) > 0.99
    assert abs(negatives.frame["mean radius"].corr(negatives.frame["mean perimeter"])) < 0.15
    assert negatives.replaced[:, 1:].mean() > 0.95


def test_resampled_cells_come_from_their_column(cancer: Table) -> None:
    negatives = resample_cells(cancer.schema, cancer.frame, np.random.default_rng(0), share=0.2)
    assert 0.2 < negatives.replaced[:, 1:].mean() < 0.35  # and one of every row
    for column in cancer.schema.columns:
        assert set(negatives.frame[column]) <= set(cancer.frame[column])


def test_noise_is_in_the_scale_of_the_column_and_written_like_it(heloc: Table, cancer: Table) -> None:
    for table in (heloc, cancer):
        negatives = add_noise(table.schema, table.frame, np.random.default_rng(0), noise=0.5)
        real = table.frame.loc[negatives.frame.index]
        assert not negatives.replaced[:, 0].any()  # a class takes no noise
        for i, column in enumerate(table.features, start=1):
            number = table.schema.numbers[column]
            assert negatives.frame[column].map(lambda x, n=number: n.round(x) == x).all()
            kept = real[column].isin(table.special_values)
            assert not negatives.replaced[kept.to_numpy(), i].any()
            moved = (negatives.frame[column] - real[column])[negatives.replaced[:, i]]
            assert 0.2 < moved.abs().median() / real[column][~kept].std() < 0.8


def test_flips_go_both_ways(heloc: Table, cancer: Table) -> None:
    negatives = flip_special_codes(heloc.schema, heloc.frame, np.random.default_rng(0))
    real = heloc.frame.loc[negatives.frame.index, list(heloc.features)]
    was, is_now = real.isin(CODES).to_numpy(), negatives.frame[list(heloc.features)].isin(CODES).to_numpy()
    replaced = negatives.replaced[:, 1:]
    assert (was != is_now)[replaced].all()
    assert (replaced & was).any()
    assert (replaced & ~was).any()
    for column in heloc.features:
        assert set(negatives.frame[column]) <= {*heloc.frame[column], *CODES}
    assert corruptions_for(heloc.schema) == ("permuted", "resampled", "noised", "flipped")
    assert corruptions_for(cancer.schema) == ("permuted", "resampled", "noised")
    with pytest.raises(ValueError, match="must have special values to flip"):
        flip_special_codes(cancer.schema, cancer.frame, np.random.default_rng(0))


def test_bad_share(cancer_split: Split, cancer: Table) -> None:
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        resample_cells(cancer.schema, cancer_split.train, np.random.default_rng(0), share=0)
