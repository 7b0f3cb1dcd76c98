"""Utility and privacy of synthetic rows: copies, permuted columns, collapsed and hopeless generators, values known by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dppo_kernels.trainers.tabular import Evaluation, Number, Schema, Split, Table, evaluate
from dppo_kernels.trainers.tabular.evaluation import correlation_error, marginal_tv, utility
from dppo_kernels.trainers.tabular.negatives import permute_columns
from tests.trainers.tabular.conftest import write

SCHEMA = Schema("y", ("a", "b"), {"u": Number(1), "v": Number(1)}, {"all": ("u", "v")}, {-9.0: "none"})


def of(table: Table, split: Split, synthetic: pd.DataFrame | list[str], **options: str) -> Evaluation:
    return evaluate(table.schema, synthetic, split.train, split.evaluation, **options)


def test_real_rows_as_synthetic_ones(cancer: Table, cancer_split: Split) -> None:
    fresh = pd.concat([cancer_split.tuning, cancer_split.held_out])
    result = of(cancer, cancer_split, write(cancer.schema, fresh))
    assert (result.rows, result.invalid_share, result.copied_share, result.distinct_share) == (170, 0.0, 0.0, 1.0)
    assert result.utility > 0.97
    assert result.utility_real > 0.97
    assert result.utility_marginals < 0.75
    assert 0 < result.marginal_tv < 1.3 * result.marginal_tv_real < 0.2  # few rows in ten bins are never quite alike
    assert 0 < result.correlation_error < 1.5 * result.correlation_error_real < 0.15
    assert result.too_close_share < 0.12
    assert result.dcr == pytest.approx(result.dcr_real, rel=0.15)
    assert result.spread == pytest.approx(1, abs=0.1)
    assert result.reasons == {}


def test_copies_are_called_copies(cancer: Table, cancer_split: Split) -> None:
    result = of(cancer, cancer_split, cancer_split.train)
    assert (result.dcr, result.copied_share, result.too_close_share, result.marginal_tv) == (0, 1, 1, 0)
    assert result.correlation_error == pytest.approx(0, abs=1e-12)
    assert result.utility == result.utility_real
    assert result.spread == pytest.approx(1)


def test_real_rows_are_as_near_as_real_rows_are() -> None:
    """Of evaluation rows that are copies of training rows, all are as near as the nearest twentieth: at no distance at all."""
    steps = np.arange(20.0)
    train = pd.DataFrame({"y": ["a", "b"] * 10, "u": steps, "v": steps})
    evaluation = pd.concat([train.iloc[:15], train.iloc[15:].assign(u=steps[15:] + 0.5)])
    result = evaluate(SCHEMA, train, train, evaluation)
    assert (result.copied_share_real, result.too_close_share_real, result.dcr_real) == (0.75, 0.75, 0)
    assert (result.copied_share, result.too_close_share) == (1, 1)


def test_the_floor_is_a_mean_of_permutations(monkeypatch: pytest.MonkeyPatch, cancer: Table, cancer_split: Split) -> None:
    aucs = iter(np.linspace(0.2, 0.58, 20))
    monkeypatch.setattr(
        "dppo_kernels.trainers.tabular.evaluation.permute_columns", lambda *_: SimpleNamespace(frame="permuted")
    )
    monkeypatch.setattr(
        "dppo_kernels.trainers.tabular.evaluation.utility", lambda _, rows, *__: next(aucs) if isinstance(rows, str) else 0.9
    )
    result = of(cancer, cancer_split, [])
    assert (result.utility_marginals, result.utility_real) == (pytest.approx(0.39), 0.9)
    assert next(aucs, None) is None


def test_permuted_columns_have_marginals_and_nothing_else(cancer: Table, cancer_split: Split) -> None:
    permuted = permute_columns(cancer.schema, cancer_split.train, np.random.default_rng(9)).frame
    result = of(cancer, cancer_split, permuted)
    assert result.marginal_tv == pytest.approx(0, abs=1e-9)
    assert result.correlation_error > 0.3
    assert result.dcr > 1.5 * result.dcr_real
    assert result.utility < result.utility_real - 0.2


def test_a_collapsed_generator(cancer: Table, cancer_split: Split) -> None:
    one = cancer_split.train.iloc[[0]]
    text = write(cancer.schema, one)[0]
    result = of(cancer, cancer_split, [text] * 30 + ["mean area is 1"] * 10)
    assert (result.rows, result.invalid_share, result.copied_share, result.spread) == (30, 0.25, 1.0, 0.0)
    assert result.distinct_share == pytest.approx(1 / 30)
    assert result.marginal_tv > 0.7
    assert result.utility is None
    assert result.reasons == {"utility": f"synthetic rows of one class: {one['diagnosis'].iloc[0]!r}"}


@pytest.mark.parametrize("texts", [[], ["nothing"] * 5])
def test_too_few_rows_give_reasons_and_no_numbers(cancer: Table, cancer_split: Split, texts: list[str]) -> None:
    result = of(cancer, cancer_split, texts)
    assert result.invalid_share == (1.0 if texts else None)
    values = result.as_dict()
    unmeasured = (
        "utility",
        "marginal_tv",
        "correlation_error",
        "dcr",
        "too_close_share",
        "copied_share",
        "distinct_share",
        "spread",
    )
    assert all(values[name] is None for name in unmeasured)
    assert values["reasons"] == dict.fromkeys(unmeasured, "0 synthetic rows, fewer than 10")
    assert values["utility_real"] > 0.97
    assert json.loads(json.dumps(values)) == values


def test_total_variation_by_hand() -> None:
    real = pd.DataFrame({"y": ["a", "b"] * 10, "u": np.arange(20.0), "v": [-9.0] * 10 + [1.0] * 10})
    rows = pd.DataFrame({"y": ["a"] * 4, "u": [0.0, 0.0, 19.0, 99.0], "v": [-9.0, -9.0, -9.0, 1.0]})
    # Classes 1/2; numbers: half in the lowest and half in the highest tenth, 8/10; codes 3/4 against 1/2.
    assert marginal_tv(SCHEMA, rows, real) == pytest.approx((0.5 + 0.8 + 0.25) / 3)
    assert marginal_tv(SCHEMA, real, real) == 0


def test_correlations_by_hand() -> None:
    steps = np.arange(10.0)
    real = pd.DataFrame({"y": ["a", "b"] * 5, "u": steps, "v": steps})
    indicator = np.corrcoef(steps, np.arange(10) % 2)[0, 1]
    turned = real.assign(v=-steps + 9)
    assert correlation_error(SCHEMA, turned, real) == pytest.approx((2 + 2 * indicator) / 3)
    constant = real.assign(v=1.0)
    assert correlation_error(SCHEMA, constant, real) == pytest.approx((1 + indicator) / 3)
    coded = pd.concat([real, real.assign(v=-9.0)])
    assert correlation_error(SCHEMA, coded, real) == pytest.approx(0, abs=1e-12)


def test_utility_uses_codes_and_counts_missing_classes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.random(80) < 0.5
    rows = pd.DataFrame(
        {"y": np.where(codes, "a", "b"), "u": rng.normal(size=80), "v": np.where(codes, -9.0, rng.normal(size=80))}
    )
    for classifier in ("logistic", "boosting"):
        assert utility(SCHEMA, rows.iloc[:60], rows.iloc[60:], classifier) == 1
    three = Schema("y", ("a", "b", "c"), SCHEMA.numbers, SCHEMA.groups, SCHEMA.special_values)
    test = rows.iloc[60:].assign(y=np.where(np.arange(20) < 5, "c", rows["y"].iloc[60:]))
    others = utility(three, rows.iloc[:60], test)
    assert 0.5 < others < 1  # c gets 0 everywhere, an AUC of 1/2


def test_bad_input(cancer: Table, cancer_split: Split) -> None:
    with pytest.raises(ValueError, match=r"`classifier` must be one of \['logistic', 'boosting'\], got 'forest'"):
        of(cancer, cancer_split, [], classifier="forest")
    with pytest.raises(ValueError, match=r"`train` must have 10 rows of all columns and two classes, got 3 without \[\]"):
        evaluate(cancer.schema, [], cancer_split.train.iloc[:3], cancer_split.evaluation)
