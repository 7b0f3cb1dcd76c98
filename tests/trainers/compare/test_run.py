"""One real comparison on a small table: fair by construction, measured, reported, and not run again where it is done."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.arguments import CONFIGS
from dppo_kernels.trainers.compare import CompareConfig, measure, methods, run, run_compare
from dppo_kernels.trainers.compare.config import LEVELS, METHODS, WARM_START
from dppo_kernels.trainers.compare.methods import DPORun, PPORun
from dppo_kernels.trainers.compare.task import Samples, Task
from dppo_kernels.trainers.pairs import make_pairs
from dppo_kernels.trainers.pairs_generation import TransformersSampler
from dppo_kernels.trainers.rewards.tabular import HierarchicalReward
from dppo_kernels.trainers.tabular import Discriminators, Scores, load_table

# What ships as `--config quick`, on a smaller table, which a smaller model must not yet know by heart: nothing would be left
# to tell its rows by.
QUICK = yaml.safe_load((CONFIGS / "compare" / "quick.yaml").read_text())
SETTINGS: dict[str, Any] = {**QUICK, "target": "diagnosis", "width": 32, "warmup_steps": 250, "learning_rate": 2e-3}


def write_small_table(path: Path) -> Path:
    """Three columns of the breast cancer table, whole numbers: rows of some twenty tokens."""
    frame = load_table("breast_cancer").frame
    columns = {"diagnosis": frame["diagnosis"], "radius": frame["mean radius"], "texture": frame["mean texture"]}
    small = frame.assign(**columns)[list(columns)]
    small.round({"radius": 0, "texture": 0}).astype({"radius": int, "texture": int}).to_csv(path, index=False)
    return path


def digest(weights: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(weights.items()):
        whole.update(name.encode() + value.numpy().tobytes())
    return whole.hexdigest()


class Watched:
    """What the runs were given and did, round by round."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []
        self.rewards: list[tuple[str, int, HierarchicalReward, list[float]]] = []
        self.pair_tokens: list[int] = []
        self.references: list[dict[str, torch.Tensor]] = []
        self.fitted: list[tuple[list[set[int]], list[str]]] = []  # rows of train, tuning and held-out; generated texts
        self.updated: list[list[str]] = []
        self.evaluated: list[tuple[set[int], set[int]]] = []  # rows of train and evaluation
        self.sampled: list[tuple[str, int, list[str]]] = []  # whose weights, the place, texts
        self.scored: list[list[str]] = []  # texts whose rewards are reported


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], CompareConfig, Watched]]:
    """The comparison, and what was watched of it."""
    folder, watched = tmp_path_factory.mktemp("compare"), Watched()
    probe: list[str] = []

    def watch(cls: type) -> Any:
        original = cls._round  # type: ignore[attr-defined]

        def watching(self: Any, index: int, reward: HierarchicalReward, tokens: int | None) -> Any:
            if index == 0:
                watched.starts.append({name: value.clone() for name, value in self.weights.items()})
            probe[:] = probe or [self.task.sample(self.start, 4, 5).texts[0]]
            watched.rewards.append((self.name, index, reward, reward(probe, [""])))
            return original(self, index, reward, tokens)

        return watching

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = make_pairs(*args, **kwargs)
        watched.pair_tokens.append(found[1].generated_tokens)
        return found

    fit, update, trainer = Discriminators.fit, Discriminators.update, methods.DPOTrainer
    evaluator, sample, rewards = run.Evaluator, Task.sample, measure.rewards

    def fitting(self: Any, *parts: Any, generated: Any = (), seed: int) -> None:
        watched.fitted.append(([set(part.index) for part in parts], list(generated)))
        fit(self, *parts, generated=generated, seed=seed)

    def updating(self: Any, generated: Any, seed: int) -> None:
        watched.updated.append(list(generated))
        update(self, generated, seed)

    def evaluating(schema: Any, train: Any, evaluation: Any, **options: Any) -> Any:
        watched.evaluated.append((set(train.index), set(evaluation.index)))
        return evaluator(schema, train, evaluation, **options)

    def sampling(self: Any, weights: Any, count: int, seed: int) -> Any:
        found = sample(self, weights, count, seed)
        watched.sampled.append((digest(weights), seed, found.texts))
        return found

    def scoring(discriminators: Any, samples: Samples) -> Any:
        watched.scored.append(samples.texts)
        return rewards(discriminators, samples)

    def training(model: Any, reference: Any, *args: Any, **kwargs: Any) -> Any:
        watched.references.append({name: value.clone() for name, value in reference.state_dict().items()})
        return trainer(model, reference, *args, **kwargs)

    config = CompareConfig(
        **{**SETTINGS, "data": str(write_small_table(folder / "small.csv")), "output_dir": str(folder / "out")}
    )
    with pytest.MonkeyPatch.context() as patch:
        for cls in (DPORun, PPORun):
            patch.setattr(cls, "_round", watch(cls))
        patch.setattr(methods, "make_pairs", counting)
        patch.setattr(methods, "DPOTrainer", training)
        patch.setattr(Discriminators, "fit", fitting)
        patch.setattr(Discriminators, "update", updating)
        patch.setattr(run, "Evaluator", evaluating)
        patch.setattr(Task, "sample", sampling)
        for module in (run, measure):
            patch.setattr(module, "rewards", scoring)
        yield run_compare(config, command="dppo compare"), config, watched


def numbers_in(values: Any) -> Iterator[float]:
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers_in(value)
    elif isinstance(values, float):
        yield values


def test_it_is_measured_and_reported(compared: tuple) -> None:
    results, config, _ = compared
    out = Path(config.output_dir)
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    text = (out / "report.md").read_text()
    assert "No difference is shown in" in text  # of one seed
    assert all(math.isfinite(number) for number in numbers_in(results))
    [seed] = results["seeds"]
    start = seed[WARM_START]["measures"]
    assert start["validity"] > 0.3
    assert start["kl"] == 0
    for method in METHODS:
        found = seed["methods"][method]
        measures = found["measures"]
        assert found["steps"] == config.total_steps
        assert measures["kl"] != 0
        for name in ("reward", "judge_reward", "validity", *LEVELS, *(f"judge_{level}" for level in LEVELS)):
            assert 0 < measures[name] <= 1
        assert abs(measures["reward"] - start["reward"]) > 1e-4
        # Real rows that no policy has seen are more real, to the discriminators and to the judge.
        assert seed["real"]["reward"] > max(measures["reward"], start["reward"])
        assert seed["real"]["judge_reward"] > max(measures["judge_reward"], start["judge_reward"])
        assert measures["utility"] is not None
        assert found["seconds"] > 0
        assert len(found["rounds"]) == config.rounds
    for point in seed["methods"]["DPO"]["rounds"]:
        assert point["logged"]["pairs"] > 0
        assert point["logged"]["gap"] == pytest.approx(point["logged"]["chosen"] - point["logged"]["rejected"])
        assert point["logged"]["gap"] > config.min_gap
    assert all(0 < point["logged"]["reward"] < 1 for point in seed["methods"]["PPO"]["rounds"])


def test_both_generate_as_many_tokens(compared: tuple) -> None:
    results, config, watched = compared
    [seed] = results["seeds"]
    dpo, ppo = (seed["methods"][method] for method in METHODS)
    assert dpo["generated_tokens"] == sum(watched.pair_tokens)
    one_prompt = len(config.temperatures) * seed["completion_budget"]
    for ours, theirs in zip(dpo["rounds"], ppo["rounds"], strict=True):
        assert 0 <= theirs["generated_tokens"] - ours["generated_tokens"] < one_prompt
    completions = sum(config.completions_of(i) for i in range(config.rounds))
    assert completions <= ppo["generated_tokens"] <= completions * seed["completion_budget"]


def test_both_start_from_the_same_weights(compared: tuple) -> None:
    _, config, watched = compared
    first, second = watched.starts
    for weights in (second, *watched.references):  # which are what DPO's loss is relative to, in every round
        assert first.keys() == weights.keys()
        assert all(torch.equal(first[name], weights[name]) for name in first)
    assert len(watched.references) == config.rounds


def test_both_face_the_same_discriminators_in_every_round(compared: tuple) -> None:
    _, config, watched = compared
    assert len({id(reward) for _, _, reward, _ in watched.rewards}) == 1
    by_round = [{tuple(score) for _, index, _, score in watched.rewards if index == i} for i in range(config.rounds)]
    assert [len(scores) for scores in by_round] == [1, 1]  # the same for both
    assert by_round[0] != by_round[1]  # updated in between


def test_real_rows_have_one_use(compared: tuple) -> None:
    """The judge learns from rows that neither the policies nor the first discriminators saw; what is measured on, from none."""
    _, config, watched = compared
    (first, warm), (judge, shown) = watched.fitted
    split = Task.build(config, 0).split
    assert first[0] == set(split.train.index)
    assert judge[0] == set(split.held_out.index)
    for train, evaluation in watched.evaluated:
        assert train == first[0]
        assert evaluation == set(split.evaluation.index)
        assert not evaluation & set().union(*first, *judge)
    assert not judge[0] & set().union(*first)
    assert len(watched.evaluated) == 1  # what real rows measure is measured once
    assert len(warm) == config.eval_samples
    assert shown[: len(warm)] == warm
    assert len(shown) == 3 * config.eval_samples


def test_discriminators_learn_from_both_and_from_no_sample_that_is_measured(compared: tuple) -> None:
    """Of each text that one learns from, or that is measured: whose it is, and what it was sampled for."""
    _, config, watched = compared
    start = digest(watched.starts[0])
    found = {tuple(texts): (whose, place) for whose, place, texts in watched.sampled}
    assert len(found) == len(watched.sampled)  # no texts are there twice
    size, (_, warm), (_, shown), [updated] = config.eval_samples, *watched.fitted, watched.updated

    def origins(texts: list[str]) -> list[tuple[str, int]]:
        return [found[tuple(texts[i : i + size])] for i in range(0, len(texts), size)]

    assert origins(warm) == [(start, run.LEARNED)]
    assert [place for _, place in origins(updated)] == [run.LEARNED + 1] * 2
    assert [place for _, place in origins(shown)] == [run.LEARNED, *[run.LEARNED + config.rounds] * 2]
    for texts in (updated, shown):
        assert len({whose for whose, _ in origins(texts)}) == len(texts) // size  # of both methods, each once
    measured = [origins(texts)[0][1] for texts in watched.scored if tuple(texts) in found]
    assert set(measured) == {*range(config.rounds + 1), run.FINAL}


def test_a_seed_that_is_done_is_not_run_again(compared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    results, config, _ = compared

    def refuse(*args: Any) -> dict[str, Any]:
        raise AssertionError("run again")

    monkeypatch.setattr(run, "run_seed", refuse)
    assert run.run_seeds(config) == results["seeds"]
    other = CompareConfig(**{**vars(config), "beta": 0.2})
    with pytest.raises(AssertionError, match="run again"):
        run.run_seeds(other)
    monkeypatch.setattr(run, "versions", lambda: {"sources": "others"})
    with pytest.raises(AssertionError, match="run again"):
        run.run_seeds(config)


def test_code_is_told_apart_by_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "compare" / "run.py"))
    (tmp_path / "code.py").write_text("a = 1")
    first = run.versions()
    (tmp_path / "code.py").write_text("a = 2")
    assert run.versions() != first
    assert run.commit() is None  # of another project's repository it says nothing


def test_halves_share_no_row() -> None:
    rows = pd.DataFrame({"a": [1, 1, 2, 3, 3, 3, 4, 2], "b": [0, 0, 0, 0, 0, 0, 0, 0]})
    one, other = measure.halves(rows)
    assert sorted([*one.index, *other.index]) == list(range(8))
    assert not set(one["a"]) & set(other["a"])
    assert len(set(one["a"])) == len(set(other["a"])) == 2


def test_levels_are_of_valid_rows() -> None:
    half = np.array([0.5, 0.25])
    scores = Scores(half, half, half, {"a": half, "b": half}, np.array([True, False]))
    found = measure.rewards(SimpleNamespace(score=lambda texts, starts: scores), Samples(["", ""], [], ["a", "b"]))
    assert [found[level] for level in LEVELS] == [0.5] * 4
    assert (found["reward"], found["validity"]) == (0.25, 0.5)
    none = replace(scores, valid=np.array([False, False]))
    found = measure.rewards(SimpleNamespace(score=lambda texts, starts: none), Samples(["", ""], [], ["a", "b"]))
    assert [found[level] for level in LEVELS] == [None] * 4


def test_seeds_are_sampled_with_noise_of_their_own(compared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, _ = compared
    seeds: list[int] = []

    def record(self: Any, prompts: Any, first: int, sampling: Any) -> list[list[list[int]]]:
        seeds.append(sampling.seed)
        return [[[0]] for _ in prompts]

    monkeypatch.setattr(TransformersSampler, "__call__", record)
    for seed in (0, 1):
        task = Task.build(config, seed)
        for place in (3, 4):
            task.sample(task.model().state_dict(), 2, place)
    assert len(set(seeds)) == 4


def test_a_warm_start_that_writes_no_rows_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_small_table(tmp_path / "small.csv")
    options = ["--target", "diagnosis", "--warmup_steps", "1", "--width", "8", "--eval_samples", "20"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", "--data", str(data), "--output_dir", str(tmp_path / "out"), *options])
    assert exit_info.value.code == 2
    assert "`warmup_steps`=1 must teach a model of `width`=8 to write whole rows" in capsys.readouterr().err


def test_the_kl_is_the_difference_of_log_probs(compared: tuple) -> None:
    _, config, _ = compared
    task = Task.build(config, 0)
    torch.manual_seed(1)
    weights = task.model().state_dict()
    moved = {name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()}
    samples = task.sample(moved, 5, 3)
    expected = []
    for prompt, completion in zip(samples.prompts, samples.ids, strict=True):
        start = task.tokenizer(prompt)["input_ids"]
        total = 0.0
        for sign, used in ((1, moved), (-1, weights)):
            logits = task.model(used)(input_ids=torch.tensor([start + completion])).logits[0].log_softmax(-1)
            total += sign * sum(logits[len(start) - 1 + t, token].item() for t, token in enumerate(completion))
        expected.append(total)
    assert task.kl(samples, moved, weights) == pytest.approx(expected, abs=1e-3)
    assert np.all(task.kl(samples, weights, weights) == 0)


def test_samples_are_of_the_same_prompts_for_both(compared: tuple) -> None:
    _, config, _ = compared
    task = Task.build(config, 0)
    first = task.model().state_dict()
    second = {name: value + 0.01 for name, value in first.items()}
    one, other = task.sample(first, 30, 7), task.sample(second, 30, 7)
    assert one.prompts == other.prompts
    assert one.prompts != task.sample(first, 30, 8).prompts
    assert set(one.prompts) == {"diagnosis is benign,", "diagnosis is malignant,"}  # nothing else of a real row
    assert isinstance(one, Samples)
    assert one.starts == [len(prompt) for prompt in one.prompts]
    assert all(len(ids) <= task.budget for ids in one.ids)
