"""The breast cancer table that scikit-learn ships, its split, and a made-up CSV in the format of HELOC."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sklearn", reason="the tabular extra is not installed")

from sklearn.metrics import roc_auc_score

from dppo_kernels.trainers.tabular import Discriminators, Schema, Split, Table, load_table, serialise, split_table
from dppo_kernels.trainers.tabular.table import HELOC_GROUPS, HELOC_TARGET

HELOC_ROWS = 160
HELOC_EMPTY = 7


@pytest.fixture(scope="session")
def cancer() -> Table:
    return load_table("breast_cancer")


@pytest.fixture(scope="session")
def cancer_split(cancer: Table) -> Split:
    return split_table(cancer, seed=0)


def write_heloc(path: Path) -> Path:
    """Integers with a common cause, special codes in every tenth cell, and rows without any record."""
    rng = np.random.default_rng(5)
    columns = [column for group in HELOC_GROUPS.values() for column in group]
    risk = rng.normal(size=HELOC_ROWS)
    frame = pd.DataFrame(
        {c: np.round(40 + 12 * (risk + 0.5 * rng.normal(size=HELOC_ROWS))).clip(0) for c in columns}, dtype=int
    )
    frame = frame.mask(rng.random(frame.shape) < 0.1, pd.DataFrame(rng.choice([-8, -7], frame.shape), columns=columns))
    frame.iloc[:HELOC_EMPTY] = -9
    frame.insert(0, HELOC_TARGET, np.where(risk > 0, "Good", "Bad"))
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def heloc(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return load_table(write_heloc(tmp_path_factory.mktemp("tables") / "heloc.csv"))


@pytest.fixture(scope="session")
def fitted(cancer: Table, cancer_split: Split) -> Discriminators:
    """Discriminators at their default size; tests must not change them."""
    discriminators = Discriminators(cancer.schema)
    discriminators.fit(cancer_split.train, cancer_split.tuning, cancer_split.held_out, seed=0)
    return discriminators


def write(schema: Schema, frame: pd.DataFrame, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [serialise(schema, row, rng) for row in frame.to_dict("records")]


def auc_of(real: np.ndarray, synthetic: np.ndarray) -> float:
    return roc_auc_score([1] * len(real) + [0] * len(synthetic), [*real, *synthetic])
