"""One real comparison on a small table: fair by construction, measured, reported, and not run again where it is done."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.compare import CompareConfig, measure, methods, run, run_compare
from dppo_kernels.trainers.compare.config import LEVELS, METHODS, WARM_START
from dppo_kernels.trainers.compare.methods import DPORun, PPORun
from dppo_kernels.trainers.compare.task import Samples, Task
from dppo_kernels.trainers.pairs import make_pairs
from dppo_kernels.trainers.rewards.tabular import HierarchicalReward
from dppo_kernels.trainers.tabular import Discriminators, load_table

SETTINGS: dict[str, Any] = {
    "target": "diagnosis",
    "seeds": 1,
    "rounds": 2,
    "total_steps": 8,
    "batch_size": 16,
    "mini_batches": 2,
    "eval_samples": 48,
    "warmup_steps": 250,
    "width": 32,
    "discriminator_epochs": 4,
    "learning_rate": 5e-4,
}


def write_small_table(path: Path) -> Path:
    """Three columns of the breast cancer table, whole numbers: rows of some twenty tokens."""
    frame = load_table("breast_cancer").frame
    columns = {"diagnosis": frame["diagnosis"], "radius": frame["mean radius"], "texture": frame["mean texture"]}
    small = frame.assign(**columns)[list(columns)]
    small.round({"radius": 0, "texture": 0}).astype({"radius": int, "texture": int}).to_csv(path, index=False)
    return path


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

    fit, update, evaluate, trainer = Discriminators.fit, Discriminators.update, measure.evaluate, methods.DPOTrainer

    def fitting(self: Any, *parts: Any, generated: Any = (), seed: int) -> None:
        watched.fitted.append(([set(part.index) for part in parts], list(generated)))
        fit(self, *parts, generated=generated, seed=seed)

    def updating(self: Any, generated: Any, seed: int) -> None:
        watched.updated.append(list(generated))
        update(self, generated, seed)

    def evaluating(schema: Any, texts: Any, train: Any, evaluation: Any, **options: Any) -> Any:
        watched.evaluated.append((set(train.index), set(evaluation.index)))
        return evaluate(schema, texts, train, evaluation, **options)

    def training(model: Any, reference: Any, *args: Any, **kwargs: Any) -> Any:
        watched.references.append({name: value.clone() for name, value in reference.state_dict().items()})
        return trainer(model, reference, *args, **kwargs)

    config = CompareConfig(data=str(write_small_table(folder / "small.csv")), output_dir=str(folder / "out"), **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        for cls in (DPORun, PPORun):
            patch.setattr(cls, "_round", watch(cls))
        patch.setattr(methods, "make_pairs", counting)
        patch.setattr(methods, "DPOTrainer", training)
        patch.setattr(Discriminators, "fit", fitting)
        patch.setattr(Discriminators, "update", updating)
        patch.setattr(measure, "evaluate", evaluating)
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
    assert len(watched.evaluated) == 3  # the warm start and both methods
    assert len(warm) == config.eval_samples
    assert shown[: len(warm)] == warm
    assert len(shown) == 3 * config.eval_samples


def test_discriminators_learn_from_both_and_from_no_text_that_is_measured(compared: tuple) -> None:
    _, config, watched = compared
    [texts] = watched.updated
    assert len(texts) == 2 * config.eval_samples
    both = [set(texts[: config.eval_samples]), set(texts[config.eval_samples :])]
    assert both[0] != both[1]
    learned = set(texts).union(*(generated for _, generated in watched.fitted))
    task = Task.build(config, 0)
    start = {name: value.clone() for name, value in watched.starts[0].items()}
    measured = [task.sample(start, config.eval_samples, place).texts for place in (0, run.FINAL)]
    again = task.sample(start, config.eval_samples, run.LEARNED).texts
    assert again == watched.fitted[0][1]
    # Texts are short here: some are written twice by chance.
    for found in measured:
        assert len(learned & set(found)) < len(set(found)) / 2


def test_a_seed_that_is_done_is_not_run_again(compared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    results, config, _ = compared

    def refuse(*args: Any) -> dict[str, Any]:
        raise AssertionError("run again")

    monkeypatch.setattr(run, "run_seed", refuse)
    assert run.run_seeds(config) == results["seeds"]
    other = CompareConfig(**{**vars(config), "beta": 0.2})
    with pytest.raises(AssertionError, match="run again"):
        run.run_seeds(other)


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
