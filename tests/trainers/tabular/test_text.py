"""Rows as text: an exact round trip for every row and order, every kind of fault, prompts, tokens."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels.trainers.tabular import (
    Fault,
    Split,
    Table,
    TextEncoder,
    build_table_tokenizer,
    completion_budget,
    draw_prompts,
    load_table,
    parse,
    prompt_for,
    serialise,
    serialise_rows,
    to_frame,
    validity,
)

CANCER = load_table("breast_cancer")


@given(row=st.integers(0, len(CANCER.frame) - 1), seed=st.integers(0, 2**32), target_first=st.booleans())
def test_a_row_is_read_back_exactly_in_any_order(row: int, seed: int, target_first: bool) -> None:
    values = CANCER.frame.iloc[row].to_dict()
    text = serialise(CANCER.schema, values, np.random.default_rng(seed), target_first=target_first)
    parsed = parse(CANCER.schema, text)
    assert parsed.valid
    assert parsed.values == values
    assert ", ".join(text[c.start : c.stop] for c in parsed.clauses) == text
    for clause in parsed.clauses:
        assert CANCER.schema.read(clause.column, text[clause.value_start : clause.stop]) == clause.value


@pytest.mark.parametrize("name", ["cancer", "heloc"])
def test_every_row_of_a_table_is_read_back(name: str, request: pytest.FixtureRequest) -> None:
    table = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    frame, valid = to_frame(table.schema, [serialise(table.schema, row, rng) for row in table.frame.to_dict("records")])
    assert valid.all()
    pd.testing.assert_frame_equal(frame, table.frame)


@given(st.text("diagnosis mean radius, 0123456789.-\n", max_size=200))
def test_any_text_is_parsed(text: str) -> None:
    parsed = parse(CANCER.schema, text)
    assert not parsed.valid
    assert all(text[c.value_start : c.stop] == CANCER.schema.write(c.column, c.value) for c in parsed.clauses)


def test_orders_differ_and_come_from_the_generator(cancer: Table) -> None:
    row = cancer.frame.iloc[0]
    texts = [serialise(cancer.schema, row, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("diagnosis is malignant, ") for text in texts)
    free = {serialise(cancer.schema, row, np.random.default_rng(s), target_first=False).split(" is ")[0] for s in range(30)}
    assert len(free) > 5


ROW = CANCER.frame.iloc[0].to_dict()
TEXT = ", ".join(f"{column} is {CANCER.schema.write(column, ROW[column])}" for column in CANCER.schema.columns)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (TEXT.replace("mean area is", "mean era is"), ("unknown_column", "mean era")),
        (TEXT + ", mean area is 1", ("duplicate_column", "mean area")),
        (TEXT.replace("mean area is 1001, ", ""), ("missing_column", "mean area")),
        (TEXT.replace("is 1001", "is 1001.00"), ("bad_number", "mean area")),
        (TEXT.replace("is 1001", "is many"), ("bad_number", "mean area")),
        (TEXT.replace("is malignant", "is mild"), ("unknown_category", "diagnosis")),
        (TEXT + ", and more", ("no_clause", "and more")),
        (TEXT + "\n", ("trailing_junk", "\n")),
        (TEXT + " is benign", ("trailing_junk", " is benign")),
        (TEXT + "9", ("bad_number", "mean fractal dimension")),
        (TEXT.replace(", ", ","), ("missing_column", "mean radius")),
        ("", ("no_clause", "")),
    ],
)
def test_faults(text: str, fault: tuple[str, str]) -> None:
    assert validity(CANCER.schema, TEXT)
    assert not validity(CANCER.schema, text)
    assert Fault(*fault) in parse(CANCER.schema, text).faults


def test_what_is_readable_of_a_faulty_text_is_kept() -> None:
    parsed = parse(CANCER.schema, "mean radius is 17.99, mean area is x, mean radius is 3, mean texture is 10.38.")
    assert parsed.values == {"mean radius": 17.99, "mean texture": 10.38}
    kinds = [fault.kind for fault in parsed.faults if fault.kind != "missing_column"]
    assert kinds == ["bad_number", "duplicate_column", "trailing_junk"]


def test_prompts_hold_a_class_and_nothing_else(cancer: Table, cancer_split: Split) -> None:
    prompts = draw_prompts(cancer.schema, cancer_split.train, 2000, np.random.default_rng(0))
    assert set(prompts) == {"diagnosis is benign,", "diagnosis is malignant,"}
    share = (cancer_split.train["diagnosis"] == "benign").mean()
    assert prompts.count("diagnosis is benign,") / 2000 == pytest.approx(share, abs=0.03)
    pairs = serialise_rows(cancer.schema, cancer_split.train, np.random.default_rng(0))
    assert {prompt for prompt, _ in pairs} == set(prompts)
    frame, valid = to_frame(cancer.schema, [prompt + completion for prompt, completion in pairs])
    assert valid.all()
    pd.testing.assert_frame_equal(frame, cancer_split.train.reset_index(drop=True))
    with pytest.raises(ValueError, match=r"`category` must be one of \['benign', 'malignant'\], got 'mild'"):
        prompt_for(cancer.schema, "mild")


@pytest.mark.parametrize("name", ["cancer", "heloc"])
def test_tokens(name: str, request: pytest.FixtureRequest) -> None:
    table = request.getfixturevalue(name)
    tokenizer, encoder = build_table_tokenizer(table.schema), TextEncoder(table.schema)
    pairs = serialise_rows(table.schema, table.frame.iloc[:20], np.random.default_rng(0))
    for prompt, completion in pairs:
        text = prompt + completion
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"] == ids
        # The discriminators' tokens are the generator's.
        own, spans = encoder.encode(text)
        assert [text[a:b] for a, b in spans] == [tokenizer.decode([i]) for i in ids]
        assert len(own) == len(ids)
        digits = sum(character in "0123456789.-" for clause in text.split(", ")[1:] for character in clause.split(" is ")[1])
        assert len(ids) == 4 * len(table.schema.columns) - 1 - len(table.features) + digits


def test_a_budget_holds_every_row(cancer: Table) -> None:
    tokenizer = build_table_tokenizer(cancer.schema)
    completions = [completion for _, completion in serialise_rows(cancer.schema, cancer.frame, np.random.default_rng(0))]
    longest = max(len(ids) for ids in tokenizer(completions)["input_ids"])
    assert completion_budget(completions, tokenizer, margin=3) == longest + 4 > 25
    with pytest.raises(ValueError, match="`texts` must hold at least one"):
        completion_budget([], tokenizer)
    with pytest.raises(ValueError, match="`margin` must be at least 0, got -1"):
        completion_budget(completions, tokenizer, margin=-1)
