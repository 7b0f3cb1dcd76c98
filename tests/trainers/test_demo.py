"""The demo's pieces: a verifier that cannot be cheated, disjoint problems, and the whole command on a tiny budget."""

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.demo import DemoConfig, run
from dppo_kernels.trainers.demo.task import Problem, VerifiedAnswer, build_tokenizer, careless_examples, split_problems
from dppo_kernels.trainers.demo.warmup import build_model, greedy_accuracy, warm_up


def test_training_and_held_out_problems_are_disjoint() -> None:
    training, held_out = split_problems()
    assert len(set(training)) == 7600
    assert len(set(held_out)) == 500
    assert not set(training) & set(held_out)
    assert split_problems() == (training, held_out)


def test_only_the_exact_answer_is_rewarded() -> None:
    verify = VerifiedAnswer()
    assert verify(["62", "52", "062", "62=", "", "6"], ["62"] * 6) == [1.0, 0, 0, 0, 0, 0]
    shuffled = VerifiedAnswer(shuffle_seed=0)(["62"] * 50 + ["52"] * 50, ["62"] * 100)
    assert sum(shuffled) == 50  # the same rewards,
    assert 10 < sum(shuffled[:50]) < 40  # dealt out at random


def test_the_teacher_forgets_carries_only() -> None:
    problems = split_problems()[0]
    examples = careless_examples(problems, seed=0)
    assert [prompt for prompt, _ in examples] == [p.prompt for p in problems]
    wrong = [(p, answer) for p, (_, answer) in zip(problems, examples, strict=True) if answer != p.answer]
    assert all(p.has_carry and int(answer) == p.a + p.b - 10 for p, answer in wrong)
    assert len(wrong) / sum(p.has_carry for p in problems) == pytest.approx(0.7, abs=0.03)


def test_tokens_are_characters() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(["27+35=", "1+1="], padding=True)["input_ids"]
    assert [len(row) for row in ids] == [6, 6]
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "1+1="


def test_greedy_accuracy_counts_what_the_model_writes() -> None:
    """A model that was taught two answers by heart gets those right and no other."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    known = [Problem(11, 12), Problem(23, 45)]
    assert greedy_accuracy(model, tokenizer, known) == 0
    losses = []
    examples = [(p.prompt, p.answer) for p in known]
    warm_up(model, tokenizer, examples, seed=0, steps=120, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.05 < losses[0]
    assert greedy_accuracy(model, tokenizer, known) == 1
    assert greedy_accuracy(model, tokenizer, [*known, Problem(88, 11), Problem(77, 22)]) == 0.5


def test_the_command_trains_every_method_and_writes_its_results(tmp_path, capsys) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--steps", "9", "--warmup_steps", "30", "--output_dir", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [r["method"] for r in results] == ["GRPO clip", "DPPO binary-TV", "DPPO top-K-TV"]
    for result in results:
        assert result["method"] in printed
        assert 0 <= result["accuracy_after"] <= 1
        assert len([entry for entry in result["history"] if "entropy" in entry]) == 9
        rewards = [entry["reward"] for entry in result["history"] if "reward" in entry]
        assert len(rewards) == 2  # one rollout serves eight steps
    dppo = results[1]["history"]
    assert dppo[0]["divergence/max"] <= 1e-5
    assert max(entry.get("divergence/max", 0) for entry in dppo) > 1e-5
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((out / "tensorboard").rglob("events.*"))) == 3


def test_runs_end_by_the_tokens_they_generated(tmp_path, monkeypatch) -> None:
    """GRPO against DAPO on one small rollout each: tokens of all rounds count, and accuracy is measured after it."""
    for name in ("GRPO", "DAPO"):
        monkeypatch.setitem(run.METHODS[name][2], "per_device_train_batch_size", 64)
    out = tmp_path / "demo"
    arguments = ["--methods", "GRPO", "DAPO", "--tokens", "500", "--warmup_steps", "150", "--output_dir", str(out)]
    assert cli.main(["demo", *arguments]) == 0
    grpo, dapo = json.loads((out / "results.json").read_text())
    for result in (grpo, dapo):
        assert result["history"][-1]["step"] == 8
        assert result["history"][-1]["tokens"] == result["tokens"] > 500
        assert result["history"][-1]["accuracy"] == result["accuracy_after"]
        assert sum("accuracy" in entry for entry in result["history"]) == 1
    assert grpo["tokens"] < dapo["tokens"]  # DAPO filtered some groups, and generated others
    assert dapo["history"][0]["frac_reward_zero_std"] == 0 < grpo["history"][0]["frac_reward_zero_std"]
    assert dapo["history"][0]["dapo/num_prompts"] > 32
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_methods_start_from_the_same_warmed_up_weights(tmp_path, monkeypatch) -> None:
    starts, train = [], run._train

    def recording(model, *rest):
        starts.append([p.detach().clone() for p in model.parameters()])
        return train(model, *rest)

    monkeypatch.setattr(run, "_train", recording)
    run.run_demo(DemoConfig(output_dir=str(tmp_path), steps=2, warmup_steps=5))
    assert len(starts) == 3
    cold = list(build_model(build_tokenizer(), seed=0).parameters())
    for start in starts:
        assert all(torch.equal(x, y) for x, y in zip(start, starts[0], strict=True))
        assert all(not torch.equal(x, y) for x, y in zip(start, cold, strict=True) if x.dim() == 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ["PPO"]}, "`methods` must be among 'GRPO clip'"), ({"seeds": 0}, "`seeds` must be at least 1, got 0")],
)
def test_bad_options(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoConfig(**changes)
