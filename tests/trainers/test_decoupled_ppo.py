"""Decoupled PPO: two optimisers on two schedules, each phase training its own model, and nothing else running."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers.conftest import history, weights
from tests.trainers.ppo_runs import make_ppo, value_model, value_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["cases"]
SCHEDULE = next(case for case in GOLDEN if case["id"] == "s0.decoupled_schedule")


class Rates(TrainerCallback):
    """Learning rate of the policy at every step, with its update."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = self.trainer.optimizer.param_groups[0]["lr"]
        self.rates.setdefault(self.trainer.update_count, []).append(rate)


def test_the_golden_schedule(make_trainer) -> None:
    """Phases, and both learning rates, of six updates; the policy's is the golden one at the first step of an update."""
    x, expected = SCHEDULE["inputs"], SCHEDULE["expected"]["value_scheduler_steps_on_value_updates_only"]
    rates = Rates()
    trainer = make_ppo(
        make_trainer,
        decoupled=True,
        num_ppo_epochs=x["num_ppo_epochs"],
        num_mini_batches=1,
        num_vf_epochs=x["num_vf_epochs"],
        vf_update_frequency=x["vf_update_frequency"],
        learning_rate=x["learning_rate"],
        vf_learning_rate=x["vf_learning_rate"],
        lr_scheduler_type="linear",
        max_steps=x["updates"] * x["num_ppo_epochs"],
        callbacks=[rates],
    )
    rates.trainer = trainer
    valued: dict[int, list[float]] = {}
    step = trainer._value_step

    def watched(micro_batches: list[Any]) -> None:
        valued.setdefault(trainer.update_count, []).append(trainer.value_optimizer.param_groups[0]["lr"])
        step(micro_batches)

    trainer._value_step = watched
    trainer.train()
    for update, policy_epochs, value_epochs, policy_rate, value_rate in expected:
        assert len(rates.rates[update]) == policy_epochs
        assert rates.rates[update][0] == pytest.approx(policy_rate, rel=1e-9)
        assert valued.get(update, []) == pytest.approx([value_rate] * value_epochs, rel=1e-9)
    # Skipped phases are logged as skipped.
    logs = [entry for entry in trainer.state.log_history if "value/updated" in entry]
    assert [entry["value/updated"] for entry in logs] == [0, 1, 0, 1, 0, 1]
    for entry in logs:
        assert ("value/loss" in entry) == ("value/learning_rate" in entry) == ("value/grad_norm" in entry)
        assert ("value/loss" in entry) == bool(entry["value/updated"])
    assert [entry["value/learning_rate"] for entry in logs if entry["value/updated"]] == pytest.approx(
        [row[4] for row in expected if row[4] is not None]
    )


def test_each_phase_runs_and_moves_one_model(make_trainer, tokenizer) -> None:
    """Forwards and changes of weights, phase by phase; rollouts alone run both."""
    trainer = make_ppo(
        make_trainer, decoupled=True, vf_update_frequency=1, value_model=value_model(len(tokenizer)), max_steps=8
    )
    calls: list[str] = []
    phase = "rollout"
    trainer.model.model.register_forward_hook(lambda *_: calls.append(f"{phase}: policy"))
    trainer.value_model.register_forward_hook(lambda *_: calls.append(f"{phase}: value"))
    loss, values, rollout = trainer._compute_loss, trainer._train_values, trainer._generate_and_score_completions
    policy_before: dict[str, torch.Tensor] = {}

    def in_phase(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal phase
            phase, before = name, phase
            frozen = weights(trainer) if name == "value" else value_weights(trainer)
            result = function(*args)
            after = weights(trainer) if name == "value" else value_weights(trainer)
            assert all(torch.equal(p, after[n]) for n, p in frozen.items())
            phase = before
            return result

        return run

    trainer._compute_loss = in_phase("policy", loss)
    trainer._train_values = in_phase("value", values)
    trainer._generate_and_score_completions = in_phase("generation", rollout)
    before, policy_before = value_weights(trainer), weights(trainer)
    trainer.train()
    assert set(calls) == {"policy: policy", "value: value", "generation: policy", "generation: value"}
    assert calls.count("policy: policy") == 2 * 8  # micro-batches
    assert calls.count("value: value") == 2 * 2 * 4  # two updates of two epochs of four micro-batches
    assert any(not torch.equal(p, before[n]) for n, p in value_weights(trainer).items())
    assert any(not torch.equal(p, policy_before[n]) for n, p in weights(trainer).items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in trainer.value_model.parameters())


def test_the_value_step_is_that_of_the_formula(make_trainer, tokenizer) -> None:
    """One SGD step on a rollout of four micro-batches; its own clipping and weight decay."""
    values = value_model(len(tokenizer))
    start = {name: p.detach().clone() for name, p in values.named_parameters()}
    rate, decay, limit = 1e-2, 0.1, 0.5
    trainer = make_ppo(
        make_trainer,
        decoupled=True,
        value_model=values,
        optim="sgd",
        num_ppo_epochs=1,
        num_mini_batches=1,
        gradient_accumulation_steps=4,
        num_vf_epochs=1,
        vf_update_frequency=1,
        vf_learning_rate=rate,
        vf_weight_decay=decay,
        vf_max_grad_norm=limit,
        cliprange_value=None,
        max_steps=1,
    )
    trainer.train()
    after = {name: p.detach().clone() for name, p in values.named_parameters()}
    values.load_state_dict(start)
    values.zero_grad()
    [x] = trainer.rollouts
    mask = x["completion_mask"].bool()
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    found = trainer.value_model(ids, torch.cat([x["prompt_mask"], x["completion_mask"]], 1), mask.shape[1])
    torch.testing.assert_close(torch.where(mask, found, 0), x["old_values"], rtol=0, atol=1e-5)
    ((found - x["returns"]).square() / 2)[mask].mean().backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in values.parameters()]))
    assert norm > limit
    assert history(trainer, "value/grad_norm") == [pytest.approx(norm.item(), rel=1e-4)]
    assert history(trainer, "value/loss") == [pytest.approx(float((found - x["returns"]).square()[mask].mean() / 2), rel=1e-4)]
    decayed = set(trainer.get_decay_parameter_names(trainer.value_model.model))
    assert 0 < len(decayed) < len(start)
    for name, p in values.named_parameters():
        expected = start[name] - rate * (p.grad * limit / norm + decay * start[name] * (name in decayed))
        torch.testing.assert_close(after[name], expected, rtol=0, atol=2e-6, msg=name)


def test_values_are_pretrained_before_the_policy_moves(make_trainer) -> None:
    trainer = make_ppo(make_trainer, decoupled=True, vf_pretrain_updates=2, vf_update_frequency=3, max_steps=24)
    start = weights(trainer)
    seen: list[tuple[int, bool]] = []

    class Moves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((trainer.update_count, any(not torch.equal(p, start[n]) for n, p in weights(trainer).items())))

    trainer.add_callback(Moves())
    trainer.train()
    assert seen == [(u, u > 2) for u in range(1, 7) for _ in range(4)]
    assert history(trainer, "policy/updated") == [float(u > 2) for u, _ in seen]
    assert history(trainer, "value/updated") == [1, 1, 1, 0, 0, 1]
    assert len(trainer.micro_batches) == 4 * 4 * 2  # no forward of the policy's loss in the first two updates


@pytest.mark.parametrize(("keep", "rollouts"), [(False, [1, 1]), (True, [3, 3])])
def test_skipped_rollouts_are_kept_on_request(make_trainer, keep: bool, rollouts: list[int]) -> None:
    trainer = make_ppo(make_trainer, decoupled=True, vf_update_frequency=3, keep_skipped_rollouts=keep, max_steps=24)
    seen: list[list[list[dict[str, Any]]]] = []
    train = trainer._train_values
    trainer._train_values = lambda kept: seen.append(kept) or train(kept)
    trainer.train()
    assert [len(kept) for kept in seen] == rollouts
    first = 3 - rollouts[0]
    for i, kept in enumerate(seen):
        for j, rollout in enumerate(kept):
            ids = {tuple(row.tolist()) for x in rollout for row in x["completion_ids"]}
            assert ids == {tuple(row.tolist()) for row in trainer.rollouts[3 * i + first + j]["completion_ids"]}
    assert len(history(trainer, "value/loss")) == 2


def test_counting_value_updates(make_config) -> None:
    from dppo_kernels.trainers import DecoupledPPOConfig
    from tests.trainers.ppo_runs import SETTINGS

    for frequency in (1, 2, 3, 5):
        for pretrained in (0, 1, 4):
            config = make_config(
                DecoupledPPOConfig, **{**SETTINGS, "vf_update_frequency": frequency, "vf_pretrain_updates": pretrained}
            )
            for updates in range(12):
                expected = sum(config.is_value_update(u) for u in range(1, updates + 1))
                assert config.count_value_updates(updates) == expected
                assert [u for u in range(1, updates + 1) if config.is_value_update(u)] == [
                    u for u in range(1, updates + 1) if u <= pretrained or u % frequency == 0
                ]
