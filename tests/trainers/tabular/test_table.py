"""Tables: what is read, dropped and refused, how numbers are written, and rows by role."""

from pathlib import Path

import pandas as pd
import pytest

from dppo_kernels.trainers.tabular import Number, Schema, Split, Table, load_table, split_table
from dppo_kernels.trainers.tabular.table import HELOC_GROUPS
from tests.trainers.tabular.conftest import HELOC_EMPTY, HELOC_ROWS, write_heloc


def test_breast_cancer(cancer: Table) -> None:
    assert cancer.frame.shape == (569, 11)
    assert cancer.frame["diagnosis"].value_counts().to_dict() == {"benign": 357, "malignant": 212}
    assert sorted(column for group in cancer.groups.values() for column in group) == sorted(cancer.features)
    assert cancer.frame.loc[0, ["diagnosis", "mean radius", "mean area"]].tolist() == ["malignant", 17.99, 1001.0]
    assert cancer.schema.numbers["mean radius"] == Number(decimals=3, digits=4)


def test_heloc(heloc: Table) -> None:
    assert len(heloc.features) == 23
    assert (heloc.dropped_rows, len(heloc.frame)) == (HELOC_EMPTY, HELOC_ROWS - HELOC_EMPTY)
    assert heloc.schema.categories == ("Bad", "Good")
    assert heloc.special_values == {-9.0: "no record", -8.0: "no usable trades", -7.0: "condition not met"}
    assert heloc.groups == HELOC_GROUPS
    assert set(heloc.schema.numbers.values()) == {Number(decimals=0)}


def test_any_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n1.50,2,1\n-0.25,-9,0\n-9,-9,1\n")
    table = load_table(path, target="y", special_values={-9: "none"})
    assert table.dropped_rows == 1
    assert table.frame.to_dict("list") == {"y": ["1", "0"], "a": [1.5, -0.25], "b": [2.0, -9.0]}
    assert table.groups == {"all": ("a", "b")}
    assert table.schema.numbers["a"] == Number(decimals=2, digits=2)


def test_tiny_numbers_beside_large_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n123456.123,1\n1e-12,0\n")
    number = load_table(path, target="y").schema.numbers["a"]
    assert [number.read(number.write(value)) for value in (123456.123, 1e-12)] == [123456.123, 1e-12]


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("a,b\n1,2\n", None, "`target` must name the column of classes of t.csv"),
        ("a,b\n1,2\n", "c", "`target` must be a column of t.csv.*got 'c'"),
        ("a,a,y\n1,2,3\n", "y", "t.csv must have distinct columns, got 'a' more than once"),
        ("a,y\nred,1\nblue,0\n", "y", "column 'a' of t must hold finite numbers, got 'red'"),
        ("a,y\n1,1\ninf,0\n", "y", "column 'a' of t must hold finite numbers, got 'inf'"),
        ("a,y\n1,1\n,0\n", "y", "column 'a' of t must have a value in every row, got 1 without"),
        ("a,y\n1,1\n2,1\n", "y", r"at least two classes, got \['1'\]"),
        ("a,y\n1,1\n2,3,0\n", "y", "line 3 of t.csv must have 2 fields, got 3"),
        ("a,y\n1,1\n2\n", "y", "line 3 of t.csv must have 2 fields, got 1"),
        ("a,y\n1,1\n1e-45,0\n", "y", "column 'a' of t must hold numbers of at most 40 characters, got 1e-45"),
        ('"a is b",y\n1,1\n2,0\n', "y", "must hold no comma, line break or ' is ', got 'a is b'"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, target: str | None, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_table(path, target=target)


def test_other_bad_arguments(tmp_path: Path, cancer: Table) -> None:
    with pytest.raises(FileNotFoundError, match=r"'breast_cancer' or the path of a CSV file, got 'nowhere\.csv'"):
        load_table("nowhere.csv")
    with pytest.raises(ValueError, match="are for CSV files"):
        load_table("breast_cancer", target="y")
    path = write_heloc(tmp_path / "h.csv")
    with pytest.raises(ValueError, match=r"`groups`\['g'\] must list distinct numeric columns, got \['nothing'\]"):
        load_table(path, groups={"g": ["nothing"]})
    few = Table("few", cancer.frame.iloc[:30], cancer.schema)
    with pytest.raises(ValueError, match="every class must have at least 20 different rows, got"):
        split_table(few, seed=0)
    copies = Table(
        "copies", pd.concat([cancer.frame.iloc[:1]] * 30 + [cancer.frame[cancer.frame["diagnosis"] == "benign"]]), cancer.schema
    )
    with pytest.raises(ValueError, match="at least 20 different rows, got 1 of 'malignant'"):
        split_table(copies, seed=0)
    small = Table("small", cancer.frame.groupby("diagnosis").head(20).reset_index(drop=True), cancer.schema)
    with pytest.raises(ValueError, match="the table must leave 10 rows for evaluation, got"):
        split_table(small, seed=0)


@pytest.mark.parametrize(
    ("number", "value", "written"),
    [
        (Number(3, 4), 17.99, "17.99"),
        (Number(3, 4), 9.0294, "9.029"),
        (Number(3, 4), 9.99961, "10"),
        (Number(3, 4), 0.0, "0"),
        (Number(1, 4), 12345.6, "12350"),
        (Number(2, 3), -0.001, "0"),
        (Number(0), -9.0, "-9"),
        (Number(0), 1234.4, "1234"),
        (Number(12, 9), 123456.123, "123456.123"),
        (Number(12, 9), 1e-12, "0.000000000001"),
    ],
)
def test_numbers_are_written_as_their_column_writes_them(number: Number, value: float, written: str) -> None:
    assert number.write(value) == written
    assert number.read(written) == number.round(value)


@pytest.mark.parametrize("text", ["", "01", "1.", ".5", "1.50", "1.2345", "-0", "+1", "1e3", "nan", " 1", "1 ", "१", "1" * 60])
def test_a_number_has_one_spelling(text: str) -> None:
    assert Number(3, 4).read(text) is None


def test_rows_by_role_are_disjoint_and_stratified(cancer: Table, cancer_split: Split) -> None:
    parts = [cancer_split.train, cancer_split.tuning, cancer_split.held_out, cancer_split.evaluation]
    assert [len(part) for part in parts] == [284, 85, 85, 115]
    assert sorted(i for part in parts for i in part.index) == list(range(569))
    for part in parts:
        assert (part["diagnosis"] == "benign").mean() == pytest.approx(357 / 569, abs=0.01)
        pd.testing.assert_frame_equal(part, cancer.frame.loc[part.index])
    again, other = split_table(cancer, seed=0), split_table(cancer, seed=1)
    assert list(again.train.index) == list(cancer_split.train.index)
    assert set(other.train.index) != set(cancer_split.train.index)


def test_copies_of_a_row_stay_together(cancer: Table) -> None:
    """Whole numbers of two columns: most rows are there several times, and in one part each."""
    frame = cancer.frame[["diagnosis", "mean radius", "mean texture"]].round(0)
    schema = Schema(
        "diagnosis", cancer.schema.categories, dict.fromkeys(frame.columns[1:], Number(0)), {"a": tuple(frame.columns[1:])}, {}
    )
    split = split_table(Table("rounded", frame, schema), seed=0)
    parts = [split.train, split.tuning, split.held_out, split.evaluation]
    assert sorted(i for part in parts for i in part.index) == list(range(569))
    found = [set(part.itertuples(index=False, name=None)) for part in parts]
    assert sum(map(len, found)) == len(frame.drop_duplicates()) < 569
    assert 0.4 < len(split.train) / 569 < 0.6


def test_classes_may_be_spelled_as_pandas_spells_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n1,None\n2,NA \n")
    assert load_table(path, target="y").schema.categories == ("NA", "None")


def test_heloc_with_another_column_is_refused(tmp_path: Path) -> None:
    lines = write_heloc(tmp_path / "h.csv").read_text().splitlines()
    path = tmp_path / "more.csv"
    path.write_text("\n".join([f"{lines[0]},id", *(f"{line},{i}" for i, line in enumerate(lines[1:]))]))
    with pytest.raises(ValueError, match=r"has the columns of HELOC and \['id'\]: remove these"):
        load_table(path, target="RiskPerformance")


def test_a_schema_survives_json(cancer: Table, heloc: Table) -> None:
    import json

    for table in (cancer, heloc):
        assert Schema.from_dict(json.loads(json.dumps(table.schema.as_dict()))) == table.schema
