"""Texts as numbers: tokens, and the values of the clauses that can be read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import ShrunkCovariance
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dppo_kernels.trainers.tabular.schema import Schema
from dppo_kernels.trainers.tabular.text import Parsed, parse
from dppo_kernels.trainers.tabular.tokens import PAD, TextEncoder

FARTHEST = 8.0  # standard deviations: a policy in training writes any number
SHRINKAGE = 1e-3


@dataclass(frozen=True)
class Encoded:
    """Texts of one table. N texts, T tokens, C columns in the order of the schema, F features of a value."""

    ids: Tensor  # int64 [N, T]
    lengths: Tensor  # int64 [N], at least 1
    token_columns: Tensor  # int64 [N, T], C where a token is in no clause that can be read
    in_value: Tensor  # bool [N, T]
    values: Tensor  # float32 [N, C, F]
    present: Tensor  # bool [N, C]
    valid: Tensor  # bool [N]
    unreadable: Tensor  # int64 [N], pieces that are no clause, no value or a repetition
    spans: list[np.ndarray]  # int [T, 2] each

    @property
    def alone(self) -> Tensor:
        """float32 [N, C, F - 1]: values without what says how they go with others."""
        return self.values[:, :, :-1]

    @property
    def is_token(self) -> Tensor:
        """bool [N, T]; `lengths` says 1 of a text without tokens, which has none here."""
        return torch.arange(self.ids.shape[1]) < torch.tensor([len(spans) for spans in self.spans])[:, None]


class RowEncoder:
    """What the discriminators read of a text.

    Features of a value: how many standard deviations it is from its column's mean; whether it is a number; which special code;
    which class; and last, how many standard deviations it is from what the rest of its row lets expect, if columns were jointly
    normal. All are 0 where a column is missing.

    Args:
        schema: of the table.
        means, scales: [D], of the numbers and of an indicator for every class but the first.
        precision: [D, D], the inverse covariance of these when standardised.
    """

    def __init__(self, schema: Schema, means: np.ndarray, scales: np.ndarray, precision: np.ndarray) -> None:
        self.schema = schema
        self.means, self.scales, self.precision = means, scales, precision
        self.text = TextEncoder(schema)
        self.width = 3 + len(schema.special_values) + len(schema.categories)

    @classmethod
    def fit(cls, schema: Schema, frame: pd.DataFrame) -> "RowEncoder":
        """From real rows; special codes count as missing."""
        dimensions = joint_dimensions(schema, frame)
        scaler = StandardScaler().fit(dimensions)
        means, scales = np.nan_to_num(scaler.mean_), np.nan_to_num(scaler.scale_, nan=1.0)  # NaN: a column of codes alone
        standardised = np.nan_to_num((dimensions - means) / scales)
        # Little shrinkage: columns of real tables are nearly functions of others, which is what gives corrupted rows away.
        return cls(schema, means, scales, ShrunkCovariance(shrinkage=SHRINKAGE).fit(standardised).precision_)

    def encode_values(self, frame: pd.DataFrame) -> tuple[Tensor, Tensor]:
        """(values [N, C, F], present [N, C]) of rows, where NaN is missing."""
        numbers = frame[list(self.schema.features)].to_numpy(dtype=float)
        dimensions = joint_dimensions(self.schema, frame)
        standardised = np.nan_to_num((dimensions - self.means) / self.scales).clip(-FARTHEST, FARTHEST)
        surprise = (standardised @ self.precision / np.sqrt(np.diag(self.precision))).clip(-FARTHEST, FARTHEST)
        present = ~frame[list(self.schema.columns)].isna().to_numpy()
        is_number = ~np.isnan(dimensions[:, : numbers.shape[1]])
        classes = _classes(self.schema, frame)

        values = np.zeros((len(frame), len(self.schema.columns), self.width), dtype=np.float32)
        values[:, 1:, 0] = standardised[:, : numbers.shape[1]]
        values[:, 1:, 1] = is_number
        for i, code in enumerate(self.schema.special_values, start=2):
            values[:, 1:, i] = numbers == code
        values[:, 0, -1 - classes.shape[1] : -1] = classes
        values[:, 1:, -1] = surprise[:, : numbers.shape[1]] * is_number
        # The first class has no indicator of its own; of two classes, one indicator speaks for both.
        values[:, 0, -1] = surprise[np.arange(len(frame)), numbers.shape[1] + np.maximum(classes.argmax(1) - 1, 0)]
        values[:, 0, -1] *= present[:, 0]
        return torch.from_numpy(values), torch.from_numpy(present)

    def encode(self, texts: Sequence[str]) -> Encoded:
        parsed = [parse(self.schema, text) for text in texts]
        tokens = [self.text.encode(text) for text in texts]
        columns = {column: i for i, column in enumerate(self.schema.columns)}
        longest = max((len(ids) for ids, _ in tokens), default=1) or 1
        ids = np.full((len(texts), longest), PAD)
        token_columns = np.full((len(texts), longest), len(columns))
        in_value = np.zeros((len(texts), longest), dtype=bool)
        for row, (one, (row_ids, spans)) in enumerate(zip(parsed, tokens, strict=True)):
            ids[row, : len(row_ids)] = row_ids
            for clause in one.clauses:
                first, value, last = np.searchsorted(spans[:, 0], (clause.start - 1, clause.value_start, clause.stop))
                token_columns[row, first:last] = columns[clause.column]
                in_value[row, value:last] = True
        frame = pd.DataFrame([one.values for one in parsed], columns=list(self.schema.columns))
        values, present = self.encode_values(frame)
        return Encoded(
            ids=torch.from_numpy(ids),
            lengths=torch.tensor([max(1, len(row_ids)) for row_ids, _ in tokens], dtype=torch.long),
            token_columns=torch.from_numpy(token_columns),
            in_value=torch.from_numpy(in_value),
            values=values,
            present=present,
            valid=torch.tensor([one.valid for one in parsed], dtype=torch.bool),
            unreadable=torch.tensor([_count_unreadable(one) for one in parsed], dtype=torch.long),
            spans=[spans for _, spans in tokens],
        )


def _count_unreadable(parsed: Parsed) -> int:
    return sum(fault.kind != "missing_column" for fault in parsed.faults)  # which is no piece of the text


def _classes(schema: Schema, frame: pd.DataFrame) -> np.ndarray:
    """bool [N, classes]"""
    return frame[[schema.target]].to_numpy() == np.array(schema.categories, dtype=object)


def joint_dimensions(schema: Schema, frame: pd.DataFrame) -> np.ndarray:
    """Numbers and indicators of all classes but the first, NaN where there is none: [N, D]."""
    numbers = frame[list(schema.features)].astype(float)
    indicators = np.where(frame[[schema.target]].isna(), np.nan, _classes(schema, frame)[:, 1:])
    return np.concatenate([numbers.mask(numbers.isin(list(schema.special_values))), indicators], axis=1)
