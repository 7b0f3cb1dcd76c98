"""Corrupted real rows: what discriminators learn from beside the generator's own, and which cells were replaced."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dppo_kernels.trainers.tabular.schema import Schema

SHARE = 0.3  # of cells that are replaced, where not all are
NOISE = 1.0  # standard deviations


@dataclass(frozen=True)
class Negatives:
    """Corrupted rows. Rows that came out unchanged are left out; the index says which real row each was.

    replaced: bool [N, columns], in the order of the frame: True where the value differs from the real row's.
    """

    frame: pd.DataFrame
    replaced: np.ndarray


def permute_columns(schema: Schema, frame: pd.DataFrame, rng: np.random.Generator) -> Negatives:
    """Every column in an order of its own: right marginals, and nothing that holds a row together."""
    permuted = frame.apply(lambda column: rng.permutation(column.to_numpy()))
    return _changed(schema, frame, permuted)


def resample_cells(schema: Schema, frame: pd.DataFrame, rng: np.random.Generator, share: float = SHARE) -> Negatives:
    """Some cells drawn anew from their column."""
    drawn = frame.apply(lambda column: rng.choice(column.to_numpy(), len(column)))
    return _changed(schema, frame, frame.where(~_chosen(frame, share, rng), drawn))


def add_noise(
    schema: Schema, frame: pd.DataFrame, rng: np.random.Generator, share: float = SHARE, noise: float = NOISE
) -> Negatives:
    """Some numbers moved, and rounded as their column writes them; codes stay.

    They move by `noise` standard deviations of the column times a heavy-tailed variate: a little mostly, wildly sometimes.
    """
    numbers = frame[list(schema.features)]
    numbers = numbers.mask(numbers.isin(list(schema.special_values)))
    moved = numbers + rng.standard_t(2, size=numbers.shape) * noise * numbers.std(ddof=0).to_numpy()
    moved = moved.apply(lambda column: column.map(schema.numbers[column.name].round, na_action="ignore"))
    keep = ~_chosen(numbers, share, rng) | moved.isna()
    return _changed(schema, frame, frame.assign(**frame[list(schema.features)].where(keep, moved)))


def flip_special_codes(schema: Schema, frame: pd.DataFrame, rng: np.random.Generator, share: float = SHARE) -> Negatives:
    """Some numbers become special codes and some codes become numbers of their column.

    Raises:
        ValueError: the table has no special codes.
    """
    if not schema.special_values:
        raise ValueError("`schema` must have special values to flip, got none")
    features = frame[list(schema.features)]
    is_code = features.isin(list(schema.special_values))
    codes = pd.DataFrame(rng.choice(list(schema.special_values), features.shape), features.index, features.columns)
    numbers = features.mask(is_code).apply(
        lambda column: rng.choice(column.dropna(), len(column)) if column.notna().any() else column
    )
    flipped = codes.where(~is_code, numbers)
    keep = ~_chosen(features, share, rng) | flipped.isna()
    return _changed(schema, frame, frame.assign(**features.where(keep, flipped)))


@dataclass(frozen=True)
class Corruption:
    """A way to corrupt rows; `keeps_marginal` where a replaced value is by itself as good as a real one."""

    corrupt: Callable[[Schema, pd.DataFrame, np.random.Generator], Negatives]
    keeps_marginal: bool


CORRUPTIONS = {
    "permuted": Corruption(permute_columns, keeps_marginal=True),
    "resampled": Corruption(resample_cells, keeps_marginal=True),
    "noised": Corruption(add_noise, keeps_marginal=False),
    "flipped": Corruption(flip_special_codes, keeps_marginal=False),
}


def corruptions_for(schema: Schema) -> tuple[str, ...]:
    """Names of the corruptions that rows of this table can take."""
    return tuple(name for name in CORRUPTIONS if name != "flipped" or schema.special_values)


def _chosen(frame: pd.DataFrame, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which cells are replaced: each with probability `share`, and one of every row at least."""
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}")
    chosen = rng.random(frame.shape) < share
    chosen[np.arange(len(frame)), rng.integers(frame.shape[1], size=len(frame))] = True
    return chosen


def _changed(schema: Schema, real: pd.DataFrame, corrupted: pd.DataFrame) -> Negatives:
    columns = list(schema.columns)
    replaced = real[columns].to_numpy() != corrupted[columns].to_numpy()
    some = replaced.any(axis=1)
    return Negatives(corrupted.loc[some, columns], replaced[some])
