"""Dynamic sampling in training: which groups are trained on, what is logged, and that nothing else changes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from dppo_kernels.trainers import DAPOConfig, DAPOTrainer
from dppo_kernels.trainers.sampling import PromptStream
from tests.trainers.conftest import history, weights
from tests.trainers.fake_vllm import FakeEngine, install

KINDS = ("mixed", "easy", "hard")
G = 4


@pytest.fixture
def problems() -> Dataset:
    """Prompts whose groups are all right, all wrong or mixed, whatever is answered."""
    kinds = [KINDS[(i * 7) % 5 % 3] for i in range(40)]
    return Dataset.from_dict({"prompt": [f"{i}=" for i in range(40)], "kind": kinds, "row": list(range(40))})


class Answers:
    """Reward function: +-1 by kind and place in the group; remembers every call."""

    __name__ = "answers"

    def __init__(self, *, reports: bool = True) -> None:
        self.calls: list[list[int]] = []  # dataset rows of the groups
        self.reports = reports

    def __call__(self, completions: list[str], kind: list[str], row: list[int], log_extra: Any = None, **_: Any) -> list[float]:
        self.calls.append(row[::G])
        accuracy = [float(k == "easy" or (k == "mixed" and i % G in (0, 2))) for i, k in enumerate(kind)]
        if self.reports:
            log_extra("acc", accuracy)
            log_extra("weight", [np.float32(a) for a in accuracy])  # as reward models give them
            # The shaped reward varies in every group, which is why it is not what groups are filtered by.
            return [2 * a - 1 - 0.1 * (i % G) for i, a in enumerate(accuracy)]
        return [2 * a - 1 for a in accuracy]


class Recording(DAPOTrainer):
    """Keeps every generation batch, and every micro-batch with the weights it was scored on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.shown: list[dict[str, list[Any]]] = []  # completions table at every batch
        self.micro_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(batch)
            cells = {**self._logs, **self._logs["rewards"], **self._logs["extra"]}
            self.shown.append({name: list(x) for name, x in cells.items() if not isinstance(x, dict)})
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        state = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.micro_batches.append({**inputs, "loss": loss.detach(), "state": state})
        return loss


def rows_of(trainer: Any, batch: dict[str, Any]) -> list[int]:
    """Dataset rows of the groups of a batch, blank rows left out."""
    texts = [
        trainer.processing_class.decode(ids[m.bool()]) for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    rows = [int(text.replace(" ", "").removesuffix("=")) for text in texts]
    real = [row for row, m in zip(rows, batch["completion_mask"], strict=True) if m.any()]
    assert all(len(set(real[i : i + G])) == 1 for i in range(0, len(real), G))
    return real[::G]


SETTINGS = {
    "config_class": DAPOConfig,
    "filter_groups_enable": True,
    "num_generations": G,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_iterations": 1,
    "max_steps": 3,
}  # 4 groups a batch, one optimiser step each


def test_a_batch_is_refilled_from_new_prompts(make_trainer, problems) -> None:
    answers = Answers()
    trainer = make_trainer(Recording, reward=answers, train_dataset=problems, log_completions=True, **SETTINGS)
    trainer.train()
    # The stream is TRL's permutation, drawn on and on; each batch takes the first four mixed groups of its rounds.
    stream = PromptStream(40, seed=3, shuffle=True)
    drawn_rows = list(itertools.chain(*answers.calls))
    assert drawn_rows == stream.take(len(drawn_rows))
    rounds = [int(n) for n in history(trainer, "dapo/num_gen_batches")]
    assert sum(rounds) == len(answers.calls) > 3
    calls = iter(answers.calls)
    kinds = problems["kind"][:]
    for step, (batch, n) in enumerate(zip(trainer.batches, rounds, strict=True)):
        by_round = [next(calls) for _ in range(n)]
        drawn = list(itertools.chain(*by_round))
        assert sum(kinds[row] == "mixed" for round_ in by_round[:-1] for row in round_) < 4  # the last round was needed
        mixed = [row for row in drawn if kinds[row] == "mixed"]
        assert rows_of(trainer, batch) == mixed[:4]
        assert history(trainer, "dapo/num_prompts")[step] == len(drawn)
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        expected = {
            "dapo/frac_kept": len(mixed) / len(drawn),
            "dapo/frac_all_correct": sum(kinds[row] == "easy" for row in drawn) / len(drawn),
            "dapo/frac_all_wrong": sum(kinds[row] == "hard" for row in drawn) / len(drawn),
            "dapo/surplus": len(mixed) - 4,
            "dapo/frac_filled": 1,
            "dapo/frac_stale": 0,
            "frac_reward_zero_std": 0,
            "reward/mean": -0.15,  # two of four are right in every trained group
        }
        for name, value in expected.items():
            assert history(trainer, name)[step] == pytest.approx(value, abs=1e-6), name
        right = sum({"easy": 1, "mixed": 0.5, "hard": 0}[kinds[row]] for row in drawn) / len(drawn)
        assert history(trainer, "reward")[step] == pytest.approx(2 * right - 1 - 0.15, abs=1e-6)
        assert history(trainer, "reward/mean_before_filter")[step] == history(trainer, "reward")[step]
        assert history(trainer, "rewards/answers/mean")[step] == history(trainer, "reward")[step]
        assert history(trainer, "completions/mean_length")[step] <= 6
    assert history(trainer, "dapo/prompt_epochs")[-1] == len(drawn_rows) / 40
    assert len({len(call) for call in answers.calls}) > 1  # the later rounds are smaller
    assert history(trainer, "num_tokens")[-1] == trainer.state.num_input_tokens_seen
    # The completions table shows what is trained on.
    shown = [int(prompt.removesuffix("=")) for prompt in trainer._logs["prompt"]]
    assert shown[::G] == rows_of(trainer, trainer.batches[-1])
    assert list(trainer._logs["extra"]["acc"]) == [1.0, 0.0] * 8
    assert len(trainer._logs["rewards"]["answers"]) == len(trainer._logs["advantages"]) == 16


def test_where_every_group_is_mixed_nothing_changes(make_trainer, model, problems) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    mixed = problems.map(lambda row: {"kind": "mixed"})
    settings = {**SETTINGS, "num_iterations": 2, "max_steps": 5}
    filtered = make_trainer(Recording, reward=Answers(), train_dataset=mixed, **settings)
    filtered.train()
    after = weights(filtered)
    assert history(filtered, "dapo/num_gen_batches") == [1, 1, 1]
    model.load_state_dict(start)
    plain = make_trainer(
        Recording, reward=Answers(), train_dataset=mixed, **{**settings, "filter_groups_enable": False}
    )  # fmt: skip
    plain.train()
    assert "dapo/num_gen_batches" not in set().union(*plain.state.log_history)
    for name, p in weights(plain).items():
        assert torch.equal(after[name], p), name
    for key in (
        "loss",
        "reward",
        "reward_std",
        "completions/mean_length",
        "clip_fraction",
        "num_tokens",
        "rewards/answers/std",
    ):
        assert history(filtered, key) == pytest.approx(history(plain, key), rel=1e-6), key


@pytest.mark.parametrize(
    ("metric", "reports", "kept"),
    [
        pytest.param(None, True, ("mixed",), id="reported accuracy"),
        pytest.param(None, False, ("mixed",), id="the only reward function"),
        pytest.param("answers", False, ("mixed",), id="a reward function"),
        pytest.param("reward", True, KINDS, id="the shaped reward"),
        pytest.param("answers", True, KINDS, id="a shaped reward function"),
    ],
)
def test_what_groups_are_filtered_by(make_trainer, problems, metric: str | None, reports: bool, kept: tuple[str, ...]) -> None:
    trainer = make_trainer(
        Recording, reward=Answers(reports=reports), train_dataset=problems, apply_overlong_penalty=True, overlong_buffer_len=3,
        filter_groups_metric=metric, **{**SETTINGS, "max_steps": 2},
    )  # fmt: skip
    trainer.train()
    rows = [row for batch in trainer.batches for row in rows_of(trainer, batch)]
    assert {problems["kind"][row] for row in rows} == set(kept)
    assert history(trainer, "frac_reward_zero_std") == [0, 0]


def test_an_unknown_metric_names_what_there_is(make_trainer, problems) -> None:
    def other(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = make_trainer(
        Recording, reward=[Answers(reports=False), other], train_dataset=problems, filter_groups_metric="f1", **SETTINGS
    )
    with pytest.raises(
        ValueError, match=r"no reward function reported a column `f1` .* name 'reward' or one of answers, other"
    ):
        trainer.train()
    trainer = make_trainer(Recording, reward=[Answers(reports=False), other], train_dataset=problems, **SETTINGS)
    with pytest.raises(ValueError, match="`filter_groups_metric`=None: no reward function reported a column `acc`"):
        trainer.train()


class TestExhausted:
    """Two rounds of two prompts hold fewer than four mixed groups."""

    SETTINGS = {**SETTINGS, "filter_gen_batch_size": 2, "max_filter_gen_batches": 2, "max_steps": 1, "shuffle_dataset": False}  # noqa: RUF012

    def test_error(self, make_trainer, problems) -> None:
        trainer = make_trainer(Recording, reward=Answers(), train_dataset=problems, **self.SETTINGS)
        with pytest.raises(RuntimeError, match=r"1 of 4 groups with mixed answers after 2 rounds"):
            trainer.train()

    @pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
    def test_train_on_what_is_there(self, make_trainer, model, problems, loss_type: str) -> None:
        """The loss, and so the gradient, is that of a batch which holds the found groups alone."""
        start = {name: p.clone() for name, p in model.state_dict().items()}
        settings = {**self.SETTINGS, "filter_exhausted": "train", "loss_type": loss_type, "optim": "sgd", "learning_rate": 0.3}
        trainer = make_trainer(Recording, reward=Answers(), train_dataset=problems, **settings)
        trainer.train()
        [batch] = trainer.batches
        assert rows_of(trainer, batch) == [0]
        assert len(batch["advantages"]) == 16
        assert history(trainer, "dapo/frac_filled") == [0.25]
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        after = weights(trainer)
        # The same completions in a batch of one group.
        real = {name: x[:G] for name, x in batch.items() if x.dim()}
        model.load_state_dict(start)
        alone = make_trainer(
            Replaying, reward=Answers(), train_dataset=problems,
            **{**settings, "filter_groups_enable": False, "per_device_train_batch_size": 2},
        )  # fmt: skip
        alone.replayed = {**real, "num_items_in_batch": batch["num_items_in_batch"]}
        alone.train()
        for name, p in weights(alone).items():
            torch.testing.assert_close(after[name], p, rtol=0, atol=1e-6, msg=name)
        assert any((p - start[name]).abs().max() > 1e-3 for name, p in after.items())
        assert history(trainer, "loss") == pytest.approx(history(alone, "loss"), abs=1e-6)

    def test_top_up(self, make_trainer, problems) -> None:
        trainer = make_trainer(
            Recording, reward=Answers(reports=False), train_dataset=problems, filter_exhausted="top_up", **self.SETTINGS
        )
        trainer.train()
        assert rows_of(trainer, trainer.batches[0]) == [0, 1, 2, 3]
        assert history(trainer, "dapo/frac_filled") == [1]
        assert history(trainer, "frac_reward_zero_std") == [0.75]

    def test_nothing_found(self, make_trainer, problems) -> None:
        hard = problems.map(lambda row: {"kind": "hard"})
        trainer = make_trainer(Recording, reward=Answers(), train_dataset=hard, filter_exhausted="train", **self.SETTINGS)
        with pytest.raises(RuntimeError, match=r"4 all wrong\): there is nothing to train on"):
            trainer.train()


class Replaying(DAPOTrainer):
    """Trains on given rows instead of generating."""

    replayed: dict[str, Any]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.replayed)


CARRY = {**SETTINGS, "filter_surplus": "carry", "filter_gen_batch_size": 12, "max_steps": 4}


@pytest.mark.parametrize("divergence", [None, "topk_tv"])
def test_surplus_is_carried_over_once_and_marked_stale(make_trainer, problems, divergence: str | None) -> None:
    changes = {"divergence_type": divergence, "divergence_topk": 3} if divergence else {}
    answers = Answers()
    trainer = make_trainer(Recording, reward=answers, train_dataset=problems, learning_rate=5e-2, **{**CARRY, **changes})
    trainer.train()
    kinds, waiting, calls = problems["kind"][:], [], iter(answers.calls)
    stale_seen = 0
    for step, batch in enumerate(trainer.batches):
        rounds = int(history(trainer, "dapo/num_gen_batches")[step])
        fresh = [row for _ in range(rounds) for row in next(calls) if kinds[row] == "mixed"]
        good = waiting + fresh
        assert rows_of(trainer, batch) == good[:4]
        stale = batch["stale"].view(-1, G).all(1).tolist()
        assert stale == [i < len(waiting) for i in range(4)]
        assert history(trainer, "dapo/frac_stale")[step] == sum(stale) / 4
        assert history(trainer, "dapo/surplus")[step] == len(good) - 4
        stale_seen += sum(stale)
        waiting = [row for row in good[4:] if row in fresh][:4]
        shown = trainer.shown[step]
        assert [int(prompt.removesuffix("=")) for prompt in shown["prompt"][::G]] == good[:4]
        assert shown["acc"] == shown["weight"] == [1.0, 0.0] * 8
        assert shown["answers"] == pytest.approx([1.0, -1.1, 0.8, -1.3] * 4)
    assert stale_seen > 2
    # A stale token's ratio is against the policy that wrote it, a fresh one's is 1.
    fresh_gap, stale_gap = [], []
    anchor = "old_per_token_logps" if divergence is None else "sampling_per_token_logps"
    for x in trainer.micro_batches:
        trainer.model.load_state_dict(x["state"])
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=torch.cat([x["prompt_mask"], x["completion_mask"]], 1)).logits
        logp = torch.log_softmax(logits[:, -x["completion_ids"].shape[1] - 1 : -1], -1)
        logp = logp.gather(2, x["completion_ids"][..., None]).squeeze(2)
        gap = ((logp - x[anchor]) * x["completion_mask"]).abs().amax(1)
        fresh_gap += gap[~x["stale"]].tolist()
        stale_gap += gap[x["stale"]].tolist()
    assert max(fresh_gap) < 1e-4
    assert min(stale_gap) > 1e-3
    if divergence:  # the mismatch of engines is watched on batches without stale rows only
        fresh_steps = sum(share == 0 for share in history(trainer, "dapo/frac_stale"))
        gaps = history(trainer, "engine_mismatch/prob_gap_max")
        assert len(gaps) == fresh_steps >= 1
        assert max(gaps) < 1e-5


@pytest.mark.parametrize("save_at", [1, 2, 3, 4])
@pytest.mark.parametrize("surplus", ["carry", "drop"])
def test_resume_is_exact(make_trainer, model, problems, tmp_path, save_at: int, surplus: str) -> None:
    """Saved between the two iterations on a batch and after them, in later epochs of the prompts, with groups waiting."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        **CARRY, "filter_surplus": surplus, "num_iterations": 2, "max_steps": save_at + 3, "learning_rate": 5e-3,
        "save_strategy": "steps", "save_steps": save_at,
    }  # fmt: skip

    def run(out: str, resume: str | None = None) -> tuple[Any, Answers]:
        model.load_state_dict(start)
        answers = Answers()
        trainer = make_trainer(Recording, reward=answers, train_dataset=problems, output_dir=str(tmp_path / out), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, answers

    whole, drawn = run("whole")
    expected = weights(whole)
    resumed, drawn_again = run("resumed", str(tmp_path / "whole" / f"checkpoint-{save_at}"))
    assert 0 < len(drawn_again.calls) < len(drawn.calls)
    assert drawn.calls[-len(drawn_again.calls) :] == drawn_again.calls
    for name, p in weights(resumed).items():
        assert torch.equal(p, expected[name]), name
    for key in ("loss", "reward/mean", "dapo/frac_stale", "dapo/prompt_epochs", "num_tokens"):
        assert history(resumed, key) == history(whole, key), key
    assert resumed.shown == whole.shown[-len(resumed.shown) :]
    assert history(whole, "dapo/prompt_epochs")[-1] > 0.5


def test_the_prompt_position_survives_other_settings(make_trainer, model, problems, tmp_path, caplog) -> None:
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = Answers()
    make_trainer(Recording, reward=first, train_dataset=problems, output_dir=str(tmp_path / "a"), **settings).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    second = Answers()
    trainer = make_trainer(
        Recording, reward=second, train_dataset=problems, output_dir=str(tmp_path / "b"),
        **{**settings, "max_steps": 3, "temperature": 0.9},
    )  # fmt: skip
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "temperature 1.0 -> 0.9" in caplog.text
    drawn = list(itertools.chain(*first.calls, *second.calls))
    assert drawn == PromptStream(40, seed=3, shuffle=True).take(len(drawn))
    # Another dataset has other prompts.
    third = Answers()
    settings |= {"max_steps": 3, "output_dir": str(tmp_path / "c")}
    trainer = make_trainer(Recording, reward=third, train_dataset=problems.select(range(30)), **settings)
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.dynamic_sampling"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "drew from 40 prompts, the dataset has 30" in caplog.text
    assert third.calls[0] == PromptStream(30, seed=3, shuffle=True).take(4)


FOURTHS = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {"filter_surplus": "drop"}, id="carried groups are not wanted any more"),
        pytest.param({"filter_surplus": "drop"}, {"filter_surplus": "carry"}, id="groups are carried from now on"),
        pytest.param(FOURTHS, {"gradient_accumulation_steps": 4}, id="accumulation"),
        pytest.param({}, {"use_vllm": True, "vllm_mode": "colocate"}, id="vLLM"),
    ],
)
def test_resume_with_other_settings_starts_a_new_rollout(
    make_trainer, model, problems, tmp_path, monkeypatch, caplog, before: dict[str, Any], after: dict[str, Any]
) -> None:
    settings = {**CARRY, "save_strategy": "steps", "save_steps": 1, "max_steps": 1, "output_dir": str(tmp_path)}
    trainer = make_trainer(Recording, reward=Answers(), train_dataset=problems, **{**settings, **before})
    trainer.train()
    assert bool(trainer._carried) == ("filter_surplus" not in before)
    if "use_vllm" in after:
        install(monkeypatch, FakeEngine(model))
    trainer = make_trainer(
        Recording, reward=Answers(), train_dataset=problems, **{**settings, **before, "max_steps": 3, **after}
    )
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        trainer.train(resume_from_checkpoint=True)
    assert "was saved with other settings" in caplog.text
    assert len(trainer.batches) == 2
    assert history(trainer, "dapo/frac_stale")[1] == 0
    if "use_vllm" in after:
        assert all("importance_sampling_ratio" in batch for batch in trainer.batches)
    for inputs in trainer.micro_batches:  # of the same optimiser step
        assert inputs["num_items_in_step"] == inputs["num_items_in_batch"]


def test_a_batch_of_carried_groups_alone(make_trainer, problems) -> None:
    mixed = problems.map(lambda row: {"kind": "mixed"})
    answers = Answers()
    trainer = make_trainer(Recording, reward=answers, train_dataset=mixed, **CARRY)
    trainer.train()
    assert len(answers.calls) == 2
    assert history(trainer, "dapo/num_gen_batches") == [1, 0, 1, 0]
    tokens = history(trainer, "num_tokens")
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]


def test_columns_of_the_table_that_some_rounds_report(make_trainer, problems) -> None:
    class Noting(Answers):
        def __call__(self, completions: list[str], *args: Any, log_extra: Any = None, **kwargs: Any) -> list[float]:
            rewards = super().__call__(completions, *args, log_extra=log_extra, **kwargs)
            if len(self.calls) % 2:
                log_extra("note", [len(self.calls)] * len(completions))
            return rewards

    trainer = make_trainer(Recording, reward=Noting(), train_dataset=problems, log_completions=True, **SETTINGS)
    trainer.train()
    notes = [shown["note"] for shown in trainer.shown if "note" in shown]
    assert any(None in column and any(column) for column in notes)
    assert {len(column) for column in notes} == {16}


def test_too_few_prompts_for_a_batch(make_trainer, problems) -> None:
    answers = Answers()
    trainer = make_trainer(Recording, reward=answers, train_dataset=problems.select(range(3)), **SETTINGS)
    with pytest.raises(ValueError, match="`train_dataset` has 3 prompts, fewer than the 4 of one rollout"):
        trainer.train()
    assert answers.calls == []


def test_a_second_run_starts_over(make_trainer, problems) -> None:
    answers = Answers()
    trainer = make_trainer(Recording, reward=answers, train_dataset=problems, **CARRY)
    trainer.train()
    n = len(answers.calls)
    trainer.train()
    assert answers.calls[n] == answers.calls[0]
    assert not trainer.batches[4]["stale"].any()


def test_training_ends_with_the_prompts_of_its_epochs(make_trainer, problems) -> None:
    answers = Answers()
    settings = {**SETTINGS, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100}
    trainer = make_trainer(Recording, reward=answers, train_dataset=problems, **settings)
    trainer.train()
    assert trainer.state.global_step < trainer.state.max_steps == 20  # what TRL would do without filtering
    epochs = history(trainer, "dapo/prompt_epochs")
    assert epochs[-2] < 2 <= epochs[-1]
    checkpoints = list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == [f"checkpoint-{trainer.state.global_step}"]
    # It is finished: an automatic restart trains no further, unless there is more to do.
    more = Answers()
    again = make_trainer(Recording, reward=more, train_dataset=problems, **settings)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, more.calls) == (trainer.state.global_step, [])
    again = make_trainer(Recording, reward=more, train_dataset=problems, **{**settings, "num_train_epochs": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step > trainer.state.global_step


def test_evaluation_is_not_filtered(make_trainer, problems) -> None:
    answers = Answers()
    trainer = make_trainer(
        Recording, reward=answers, train_dataset=problems, eval_dataset=problems.select(range(4)), per_device_eval_batch_size=8,
        eval_strategy="steps", eval_steps=1, **{**SETTINGS, "max_steps": 1},
    )  # fmt: skip
    trainer.train()
    assert sorted(itertools.chain(*answers.calls[-2:])) == [0, 1, 2, 3]
    assert len(history(trainer, "eval_reward/mean")) == 1


def test_vllm_rollouts_are_filtered_alike(make_trainer, model, problems, monkeypatch) -> None:
    for changes in ({"divergence_type": "topk_kl", "divergence_topk": 3}, {"vllm_importance_sampling_correction": True}):
        with monkeypatch.context() as patch:
            install(patch, FakeEngine(model))
            answers = Answers()
            trainer = make_trainer(
                Recording, reward=answers, train_dataset=problems, use_vllm=True, vllm_mode="colocate", **SETTINGS, **changes
            )
            trainer.train()
        kinds = problems["kind"][:]
        drawn = list(itertools.chain(*answers.calls))
        assert drawn == PromptStream(40, seed=3, shuffle=True).take(len(drawn))
        assert all(kinds[row] == "mixed" for batch in trainer.batches for row in rows_of(trainer, batch))
        assert max(history(trainer, "dapo/num_gen_batches")) > 1
        if "divergence_type" in changes:
            assert max(history(trainer, "engine_mismatch/prob_gap_max")) < 1e-5
        else:
            assert history(trainer, "sampling/importance_sampling_ratio/mean")[0] == pytest.approx(1, abs=1e-4)


def test_a_stream_of_unknown_length_is_refused(make_trainer, problems) -> None:
    stream = IterableDataset.from_generator(lambda: iter(problems))
    with pytest.raises(ValueError, match="refills from a dataset of known length, got an IterableDataset"):
        make_trainer(Recording, reward=Answers(), train_dataset=stream, **SETTINGS)
