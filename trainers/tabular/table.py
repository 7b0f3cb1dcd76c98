"""Tables of real rows, and which rows each part of a study may see."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from dppo_kernels.trainers.tabular.schema import Number, Schema

BREAST_CANCER_GROUPS = {
    "size": ("mean radius", "mean perimeter", "mean area"),
    "surface": ("mean texture", "mean smoothness"),
    "contour": ("mean compactness", "mean concavity", "mean concave points"),
    "form": ("mean symmetry", "mean fractal dimension"),
}

# FICO's home equity lines of credit (HELOC), by the column names of its CSV.
HELOC_TARGET = "RiskPerformance"
HELOC_GROUPS = {
    "risk_estimate": ("ExternalRiskEstimate",),
    "trade_history": (
        *("MSinceOldestTradeOpen", "MSinceMostRecentTradeOpen", "AverageMInFile", "NumSatisfactoryTrades"),
        *("NumTotalTrades", "NumTradesOpeninLast12M", "PercentInstallTrades"),
    ),
    "delinquency": (
        *("NumTrades60Ever2DerogPubRec", "NumTrades90Ever2DerogPubRec", "PercentTradesNeverDelq"),
        *("MSinceMostRecentDelq", "MaxDelq2PublicRecLast12M", "MaxDelqEver"),
    ),
    "credit_utilization": (
        *("MSinceMostRecentInqexcl7days", "NumInqLast6M", "NumInqLast6Mexcl7days", "NetFractionRevolvingBurden"),
        *("NetFractionInstallBurden", "NumRevolvingTradesWBalance", "NumInstallTradesWBalance"),
        *("NumBank2NatlTradesWHighUtilization", "PercentTradesWBalance"),
    ),
}
HELOC_SPECIAL_VALUES = {-9.0: "no record", -8.0: "no usable trades", -7.0: "condition not met"}

LEAST_ROWS = 20  # of a class: every part gets a few
LEAST_EVALUATED = 10  # rows, from which utility and privacy are estimated
# Shares of all rows; the rest is for evaluation.
TRAIN, TUNING, HELD_OUT = 0.5, 0.15, 0.15


@dataclass(frozen=True)
class Table:
    """Real rows: numeric features and one column of classes, columns in the order of `schema.columns`."""

    name: str
    frame: pd.DataFrame
    schema: Schema
    dropped_rows: int = 0  # which held special codes and nothing else

    @property
    def target(self) -> str:
        return self.schema.target

    @property
    def features(self) -> tuple[str, ...]:
        return self.schema.features

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        return self.schema.groups

    @property
    def special_values(self) -> Mapping[float, str]:
        return self.schema.special_values


@dataclass(frozen=True)
class Split:
    """Disjoint rows by role.

    train: what the generator imitates, and the real rows that discriminators learn from.
    tuning: when discriminators stop, and their temperatures. (In `dppo compare` half of them say how good they are.)
    held_out: how good discriminators are said to be. (There the judge learns from them.)
    evaluation: seen by the final measures of utility and privacy only.
    """

    train: pd.DataFrame
    tuning: pd.DataFrame
    held_out: pd.DataFrame
    evaluation: pd.DataFrame


def load_table(
    source: str | Path,
    *,
    target: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    special_values: Mapping[float, str] | None = None,
) -> Table:
    """Read a table.

    Args:
        source: "breast_cancer" is scikit-learn's, its ten means and the diagnosis; else the path of a CSV file with a header.
            A file with the columns of HELOC needs nothing else.
        target: the column of classes of a CSV; all others must be numeric.
        groups: its feature groups; by default one of all features.
        special_values: numbers that stand for a reason why there is none. Rows of nothing else are dropped and counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no or an unknown target, columns that are twice there, not numeric or with missing values, unknown
            columns in groups, or options for "breast_cancer".
    """
    if str(source) == "breast_cancer":
        if target is not None or groups is not None or special_values is not None:
            raise ValueError("`target`, `groups` and `special_values` are for CSV files, got them for 'breast_cancer'")
        data = load_breast_cancer(as_frame=True)
        frame = data.data[[column for columns in BREAST_CANCER_GROUPS.values() for column in columns]]
        frame = frame.assign(diagnosis=data.target.map(dict(enumerate(data.target_names))))
        return _make_table("breast_cancer", frame, "diagnosis", BREAST_CANCER_GROUPS, {})
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"`source` must be 'breast_cancer' or the path of a CSV file, got {str(source)!r}")
    names = pd.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True).iloc[0].fillna("").str.strip()
    duplicates = sorted(set(names[names.duplicated()]))  # pandas would rename them
    if duplicates:
        raise ValueError(f"{path.name} must have distinct columns, got {duplicates[0]!r} more than once")
    with path.open(newline="") as handle:
        for line, fields in enumerate(csv.reader(handle, skipinitialspace=True), 1):
            if fields and len(fields) != len(names):  # pandas would shift them, or fill them up
                raise ValueError(f"line {line} of {path.name} must have {len(names)} fields, got {len(fields)}")
    # A class may be spelled "None" or "NA".
    options = {"dtype": str, "skipinitialspace": True, "keep_default_na": False, "na_values": [""]}
    frame = pd.read_csv(path, header=0, names=list(names), index_col=False, **options)
    frame = frame.apply(lambda column: column.str.strip())
    heloc = {HELOC_TARGET, *sum(HELOC_GROUPS.values(), ())}
    if heloc < set(names) and special_values is None:
        raise ValueError(
            f"{path.name} has the columns of HELOC and {sorted(set(names) - heloc)}: remove these, with which its codes for "
            "missing values would be taken for numbers"
        )
    if target in (None, HELOC_TARGET) and heloc == set(names):
        target = HELOC_TARGET
        groups = HELOC_GROUPS if groups is None else groups
        special_values = HELOC_SPECIAL_VALUES if special_values is None else special_values
    if target is None:
        raise ValueError(f"`target` must name the column of classes of {path.name}, one of {list(names)}; got None")
    if target not in frame:
        raise ValueError(f"`target` must be a column of {path.name}, one of {list(names)}; got {target!r}")
    if groups is None:
        groups = {"all": [column for column in names if column != target]}
    return _make_table(path.stem, frame, target, groups, special_values or {})


def _make_table(
    name: str,
    frame: pd.DataFrame,
    target: str,
    groups: Mapping[str, Sequence[str]],
    special_values: Mapping[float, str],
) -> Table:
    features = [column for column in frame if column != target]
    for column in frame:
        if missing := int(frame[column].isna().sum()):
            raise ValueError(f"column {column!r} of {name} must have a value in every row, got {missing} without")
    for column in features:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        if not (readable := np.isfinite(numbers)).all():
            raise ValueError(f"column {column!r} of {name} must hold finite numbers, got {frame[column][~readable].iloc[0]!r}")
    # From strings, not from `to_numeric`, which may miss the last bit.
    frame = frame.astype({**dict.fromkeys(features, float), target: str})[[target, *features]]
    empty = frame[features].isin(list(special_values)).all(axis=1)
    frame = frame[~empty].reset_index(drop=True)
    if frame.empty:
        raise ValueError(f"{name} must have rows with values, got {int(empty.sum())} rows of special values alone")
    numbers = {column: Number.of(frame[column]) for column in features}
    for column, number in numbers.items():
        unreadable = frame[column][[number.read(number.write(value)) != value for value in frame[column]]]
        if len(unreadable):
            raise ValueError(
                f"column {column!r} of {name} must hold numbers of at most 40 characters, got {float(unreadable.iloc[0])!r}"
            )
    schema = Schema(
        target=target,
        categories=tuple(sorted(frame[target].unique())),
        numbers=numbers,
        groups={group: tuple(columns) for group, columns in groups.items()},
        special_values={float(code): reason for code, reason in special_values.items()},
    )
    return Table(name, frame, schema, int(empty.sum()))


def split_table(table: Table, seed: int) -> Split:
    """The rows of `table` by role, classes in about the same shares everywhere; about half of them for training.

    Rows that are the same stay together: a copy of a training row in another part would be taken for a real row like it.

    Raises:
        ValueError: a class has fewer than 20 different rows, or a part too few.
    """
    different = table.frame.drop_duplicates()
    counts = different[table.target].value_counts()
    if counts.min() < LEAST_ROWS:
        raise ValueError(
            f"every class must have at least {LEAST_ROWS} different rows, got {counts.min()} of {counts.idxmin()!r}"
        )

    def divide(rows: pd.DataFrame, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
        first, second = train_test_split(rows, train_size=share, stratify=rows[table.target], random_state=seed)
        return first, second

    train, rest = divide(different, TRAIN)
    tuning, rest = divide(rest, TUNING / (1 - TRAIN))
    held_out, evaluation = divide(rest, HELD_OUT / (1 - TRAIN - TUNING))
    same = table.frame.groupby(list(table.frame.columns), sort=False).ngroup()

    def with_copies(part: pd.DataFrame) -> pd.DataFrame:
        place = pd.Series(range(len(part)), index=same[part.index].to_numpy())
        rows = same[same.isin(place.index)].map(place).sort_values(kind="stable")
        return table.frame.loc[rows.index]

    parts = [with_copies(part) for part in (train, tuning, held_out, evaluation)]
    if len(parts[3]) < LEAST_EVALUATED:
        raise ValueError(
            f"the table must leave {LEAST_EVALUATED} rows for evaluation, got {len(parts[3])} of {len(table.frame)}"
        )
    return Split(*parts)
