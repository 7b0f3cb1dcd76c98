"""Discriminators: what each level tells apart, what order and batch must not change, seeds, saving, rounds of a generator."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dppo_kernels.trainers.tabular import Discriminators, Scores, Split, Table, TrainingOptions
from dppo_kernels.trainers.tabular.negatives import add_noise, permute_columns
from tests.trainers.tabular.conftest import auc_of, write

QUICK = TrainingOptions(epochs=2, token_epochs=1, patience=2)


@pytest.fixture(scope="module")
def real_scores(fitted: Discriminators, cancer: Table, cancer_split: Split) -> Scores:
    return fitted.score(write(cancer.schema, cancer_split.held_out))


def quick(table: Table, split: Split, seed: int, generated: tuple[str, ...] = ()) -> Discriminators:
    discriminators = Discriminators(table.schema, options=QUICK, rows_per_epoch=32)
    parts = split.train.iloc[:60], split.tuning.iloc[:20], split.held_out.iloc[:20]
    discriminators.fit(*parts, generated=generated, seed=seed)
    return discriminators


def same(one: Scores, other: Scores) -> bool:
    levels = [(one.token, other.token), (one.sentence, other.sentence), (one.row, other.row)]
    levels += [(one.features[group], other.features[group]) for group in one.features]
    return all(np.array_equal(a, b) for a, b in levels)


def test_permuted_columns_are_told_apart(
    fitted: Discriminators, real_scores: Scores, cancer: Table, cancer_split: Split
) -> None:
    negatives = permute_columns(cancer.schema, cancer_split.held_out, np.random.default_rng(1))
    scores = fitted.score(write(cancer.schema, negatives.frame))
    assert auc_of(real_scores.row, scores.row) >= 0.95
    assert auc_of(real_scores.token, scores.token) >= 0.9
    assert auc_of(real_scores.features["size"], scores.features["size"]) >= 0.9  # radius, perimeter, area
    # Each value by itself is as good as a real one.
    assert 0.4 < auc_of(real_scores.sentence, scores.sentence) < 0.65


def test_sentences_tell_values_that_a_column_does_not_have(fitted: Discriminators, real_scores: Scores, cancer: Table) -> None:
    far = cancer.frame.assign(**{"mean area": 60.0, "mean texture": 90.0, "mean symmetry": -0.2})
    assert auc_of(real_scores.sentence, fitted.score(write(cancer.schema, far)).sentence) > 0.85


def test_tokens_of_replaced_values_score_lower(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    negatives = add_noise(cancer.schema, cancer_split.held_out, np.random.default_rng(2))

    def of_values(frame: pd.DataFrame, mask: np.ndarray) -> tuple[list[float], list[float]]:
        """Scores of the tokens of replaced and of other values."""
        texts = write(cancer.schema, frame)
        scores = fitted.score(texts, per_token=True)
        replaced, kept = [], []
        for text, tokens, spans, row in zip(texts, scores.tokens, scores.spans, mask, strict=True):
            column = 0
            for score, (start, stop) in zip(tokens, spans, strict=True):
                name = text[start:stop].strip()
                if name in cancer.schema.columns:
                    column = cancer.schema.columns.index(name)
                elif name not in ("is", ","):
                    (replaced if row[column] else kept).append(score)
        return replaced, kept

    real = of_values(cancer_split.held_out, np.zeros((len(cancer_split.held_out), 11), dtype=bool))[1]
    replaced, kept = of_values(negatives.frame, negatives.replaced)
    assert np.mean(replaced) < np.mean(kept) - 0.05
    assert np.mean(replaced) < np.mean(real) - 0.4
    assert auc_of(np.array(real), np.array(replaced)) > 0.85


def test_the_report(fitted: Discriminators, cancer: Table) -> None:
    report = fitted.report()
    assert list(report) == ["token", "sentence", "row", *(f"features/{group}" for group in cancer.groups)]
    aucs = {level: values["auc"] for level, values in report.items()}
    assert aucs["row"] > 0.93
    assert aucs["token"] > 0.8
    assert aucs["sentence"] > 0.6
    assert aucs["features/size"] > 0.9
    for values in report.values():
        assert 0 <= values["ece"] < 0.15
        assert 0.05 < values["temperature"] < 20
        assert values["epochs"] > 0


def test_order_is_nothing_to_all_but_tokens(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    rows = cancer_split.held_out
    one, other = (fitted.score(write(cancer.schema, rows, seed)) for seed in (1, 2))
    for a, b in [
        (one.row, other.row),
        (one.sentence, other.sentence),
        *((one.features[g], other.features[g]) for g in cancer.groups),
    ]:
        np.testing.assert_array_equal(a, b)
    assert (one.token != other.token).any()
    assert np.corrcoef(one.token, other.token)[0, 1] > 0.5


def test_a_text_scores_the_same_in_any_batch(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    texts = write(cancer.schema, cancer_split.held_out.iloc[:6])
    texts.append(texts[0][:40])
    together = fitted.score(texts)
    alone = [fitted.score([text]) for text in texts]
    np.testing.assert_allclose(together.token, [one.token[0] for one in alone], atol=1e-5)
    np.testing.assert_allclose(together.row, [one.row[0] for one in alone], atol=1e-5)


def test_what_is_no_row_scores_nothing_where_it_is_none(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    text = write(cancer.schema, cancer_split.held_out.iloc[:1])[0]
    clauses = text.split(", ")
    dropped = next(clause for clause in clauses if clause.startswith("mean area"))
    broken = [
        ", ".join(clause for clause in clauses if clause != dropped),
        text + ", " + dropped,
        text.replace(dropped, "mean area is 1e3"),
        text + ", so it is",
        "",
    ]
    scores = fitted.score([text, *broken])
    assert scores.valid.tolist() == [True] + [False] * 5
    assert scores.row[0] > 0
    assert not scores.row[1:].any()
    assert (scores.features["size"] > 0).tolist() == [True, False, True, False, True, False]
    assert (scores.features["form"] > 0).tolist() == [True] * 5 + [False]
    count = len(clauses)
    assert scores.sentence[2] == pytest.approx(scores.sentence[0] * count / (count + 1))
    assert scores.sentence[4] == pytest.approx(scores.sentence[0] * count / (count + 1))
    assert scores.sentence[5] == scores.token[5] == 0
    assert fitted.score([]).features["size"].shape == (0,)


def test_starts_leave_the_prompt_out(fitted: Discriminators, cancer: Table, cancer_split: Split) -> None:
    texts = write(cancer.schema, cancer_split.held_out.iloc[:5])
    starts = [text.index(",") + 1 for text in texts]
    scores = fitted.score(texts, starts, per_token=True)
    for mean, tokens in zip(scores.token, scores.tokens, strict=True):
        assert mean == pytest.approx(tokens[4:].mean(), abs=1e-6)  # diagnosis, is, benign and a comma
    with pytest.raises(ValueError, match="`starts` must have one place for each of 5 texts, got 4"):
        fitted.score(texts, starts[1:])


def test_seeds(cancer: Table, cancer_split: Split) -> None:
    texts = write(cancer.schema, cancer_split.held_out)
    before = torch.random.get_rng_state()
    one, other, third = (quick(cancer, cancer_split, seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.report() == other.report()
    assert same(one.score(texts), other.score(texts))
    assert not same(one.score(texts), third.score(texts))


def test_saved_loaded_and_sent_elsewhere(cancer: Table, cancer_split: Split, tmp_path: Path) -> None:
    texts = write(cancer.schema, cancer_split.held_out)
    discriminators = quick(cancer, cancer_split, 0, tuple(texts[:30]))
    discriminators.save(tmp_path / "kept")
    loaded, sent = Discriminators.load(tmp_path / "kept"), pickle.loads(pickle.dumps(discriminators))
    for copy in (loaded, sent):
        assert same(copy.score(texts), discriminators.score(texts))
        assert copy.report() == discriminators.report()
    # The next round is the same too: real rows and older texts came along.
    for one in (discriminators, loaded):
        one.update(texts[30:60], seed=1)
    assert same(loaded.score(texts), discriminators.score(texts))
    assert not same(sent.score(texts), discriminators.score(texts))


def around_the_mean(table: Table, frame: pd.DataFrame, factor: float, seed: int) -> list[str]:
    """A generator that has the joint structure and a wrong spread: rows move towards their class's mean, or away from it."""
    rows = frame.sample(frac=1, random_state=seed)
    numbers = rows[list(table.features)]
    means = numbers.groupby(rows[table.target]).transform("mean")
    moved = (means + factor * (numbers - means)).clip(lower=0)
    moved = moved.apply(lambda column: column.map(table.schema.numbers[column.name].round))
    return write(table.schema, rows.assign(**moved), seed)


def test_rounds_learn_the_new_generator_and_remember_the_old(
    fitted: Discriminators, cancer: Table, cancer_split: Split
) -> None:
    rows, test = cancer_split.train, cancer_split.evaluation
    first, second = ([around_the_mean(cancer, frame, factor, 3) for frame in (rows, test)] for factor in (0.3, 2.0))
    small = replace(cancer.schema, groups={"size": cancer.groups["size"]})  # as the row level is what is looked at
    discriminators = Discriminators(small, options=TrainingOptions(epochs=20, token_epochs=1))

    def aucs(scored: Discriminators) -> list[float]:
        real, *synthetic = (scored.score(texts).row for texts in (write(cancer.schema, test), first[1], second[1]))
        return [auc_of(real, scores) for scores in synthetic]

    # Rows near the mean look more real than real ones to who has seen corrupted rows only.
    assert aucs(fitted)[0] < 0.5
    discriminators.fit(rows, cancer_split.tuning, cancer_split.held_out, generated=first[0], seed=1)
    known, unknown = aucs(discriminators)
    assert known > 0.75
    discriminators.update(second[0], seed=1)
    remembered, learnt = aucs(discriminators)
    assert learnt > max(unknown + 0.03, 0.8)
    assert remembered > 0.75


def test_special_codes_and_one_column_groups(heloc: Table) -> None:
    parts = [heloc.frame.iloc[i::3] for i in range(3)]
    discriminators = Discriminators(heloc.schema, options=QUICK, rows_per_epoch=32)
    discriminators.fit(*parts, seed=0)
    scores = discriminators.score(write(heloc.schema, parts[2]))
    assert set(scores.features) == {"risk_estimate", "trade_history", "delinquency", "credit_utilization"}
    assert scores.valid.all()
    assert all(((values > 0) & (values < 1)).all() for values in (scores.token, scores.sentence, scores.row))


def test_texts_of_a_generator_that_writes_no_rows(cancer: Table, cancer_split: Split) -> None:
    junk = ["", "no row", "mean area is 3, mean area is 4", "diagnosis is benign, mean area is -1\n"] * 6
    discriminators = Discriminators(cancer.schema, target_first=False, options=QUICK, rows_per_epoch=32)
    discriminators.fit(cancer_split.train, cancer_split.tuning, cancer_split.held_out, generated=junk, seed=0)
    assert all(np.isfinite(value) for values in discriminators.report().values() for value in values.values())
    scores = discriminators.score(junk)
    assert not scores.row.any()
    assert not scores.valid.any()
    assert np.isfinite(scores.token).all()


def test_bad_input(cancer: Table, cancer_split: Split, fitted: Discriminators, tmp_path: Path) -> None:
    fresh = Discriminators(cancer.schema)
    for call in (lambda: fresh.score(["a"]), lambda: fresh.update(["a"], 0), fresh.report, lambda: fresh.save(tmp_path)):
        with pytest.raises(RuntimeError, match="must be fitted first"):
            call()
    train, tuning, held_out = cancer_split.train, cancer_split.tuning, cancer_split.held_out
    with pytest.raises(ValueError, match=r"`tuning` must have two rows or more of all columns, got 85 without \['mean area'\]"):
        fresh.fit(train, tuning.drop(columns="mean area"), held_out, seed=0)
    with pytest.raises(ValueError, match="`held_out` must have two rows or more of all columns, got 1 without"):
        fresh.fit(train, tuning, held_out.iloc[:1], seed=0)
    with pytest.raises(ValueError, match="`generated` must hold texts of the generator, got none"):
        fitted.update([], seed=0)
    with pytest.raises(TypeError, match="`generated` must hold strings, got dict"):
        fitted.update([{"content": "a"}], seed=0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`rows_per_epoch` must be at least 1, got 0"):
        Discriminators(cancer.schema, rows_per_epoch=0)
    with pytest.raises(ValueError, match="`patience` must be at least 1, got 0"):
        TrainingOptions(patience=0)
    with pytest.raises(TypeError, match=r"`batch` must be an int, got 2\.5"):
        TrainingOptions(batch=2.5)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="must hold saved discriminators"):
        Discriminators.load(tmp_path / "nothing")
