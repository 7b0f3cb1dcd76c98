"""DPPO with a real vLLM engine in the trainer's process: log-probs, weight syncs, losses and gradients."""

import os
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from dppo_kernels import DIVERGENCES
from tests.trainers.conftest import history, weights
from tests.trainers.test_dppo_trainer import Recording, full_logits, loss_of_logits
from tests.trainers.test_rollout import check_recorded_columns

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine")]

VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
CLOSE = 1e-4


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimiser step, as the optimiser gets it."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.kept.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def check_against_full_logits(trainer: Recording, gradients: list[dict[str, Tensor]]) -> None:
    assert len(trainer.recorded) == len(gradients)
    for record, kept in zip(trainer.recorded, gradients, strict=True):
        trainer.model.load_state_dict(record["state"])
        trainer.model.zero_grad()
        loss = loss_of_logits(full_logits(trainer.model, record["inputs"]), record["inputs"], trainer.args)
        assert record["loss"].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
        loss.backward()
        assert kept
        for name, p in trainer.model.named_parameters():
            assert (name in kept) == (p.grad is not None), name
            if name in kept:
                torch.testing.assert_close(kept[name], p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item() + 1e-7)


def sampled_gap(trainer: Recording, record: dict[str, Any]) -> float:
    """Largest difference of the engine's log-probs and those of the record's weights, over sampled tokens."""
    inputs = record["inputs"]
    trainer.model.load_state_dict(record["state"])
    with torch.no_grad():
        logits = full_logits(trainer.model, inputs)
    logp = torch.log_softmax(logits / trainer.temperature, -1).gather(2, inputs["completion_ids"][..., None]).squeeze(2)
    return (logp - inputs["sampling_per_token_logps"])[inputs["completion_mask"].bool()].abs().max().item()


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_losses_and_gradients_equal_full_logits(make_trainer, kind: str, peft: bool) -> None:
    """Three rollouts, each used for two optimiser steps; the second is off-policy."""
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    gradients = Gradients()
    trainer = make_trainer(
        Recording, divergence_type=kind, divergence_topk=3, temperature=0.8, learning_rate=0.1 if peft else 2e-2, max_steps=6,
        per_device_train_batch_size=16, steps_per_generation=1, num_iterations=2, max_grad_norm=0.0, callbacks=[gradients],
        mismatch_action="stop", mismatch_threshold=CLOSE, **VLLM, **({"peft_config": lora} if peft else {}),
    )  # fmt: skip
    trainer.train()
    fresh = trainer.recorded[::2]
    gaps = [sampled_gap(trainer, record) for record in fresh]
    print(f"{kind}: engine and trainer differ by {max(gaps):.1e}", end=" ")
    assert max(gaps) < CLOSE
    assert sampled_gap(trainer, trainer.recorded[1]) > 100 * CLOSE  # the steps are large: a stale engine would show
    if kind.startswith("topk"):
        for record in fresh:
            check_recorded_columns(trainer, record, 3, atol=CLOSE)
        injected = fresh[0]["inputs"]["rollout_topk_valid"][..., 3][fresh[0]["inputs"]["completion_mask"].bool()]
        assert 0 < injected.sum() < injected.numel()  # sampled tokens outside and inside the top K
    check_against_full_logits(trainer, gradients.kept)
    assert max(history(trainer, "divergence/max")) > 0.01


def test_a_skipped_sync_is_caught(make_trainer, monkeypatch) -> None:
    settings = {
        "learning_rate": 2e-2,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        **VLLM,
    }
    trainer = make_trainer(Recording, mismatch_threshold=None, **settings)
    sync, calls = trainer.vllm_generation.sync_weights, []

    def only_the_first() -> None:
        calls.append(trainer.state.global_step)
        if len(calls) == 1:
            sync()

    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", only_the_first)
    trainer.train()
    assert calls == [0, 1, 2]
    gaps = [sampled_gap(trainer, record) for record in trainer.recorded]
    assert gaps[0] < CLOSE
    assert min(gaps[1:]) > 100 * CLOSE
    stopped = make_trainer(mismatch_action="stop", score_inactive=True, mismatch_threshold=1e-3, **settings)
    sync, calls[:] = stopped.vllm_generation.sync_weights, []
    monkeypatch.setattr(stopped.vllm_generation, "sync_weights", only_the_first)
    with pytest.raises(RuntimeError, match="stale because a sync failed"):
        stopped.train()


def test_more_log_probs_than_the_engine_allows_by_default(make_trainer) -> None:
    trainer = make_trainer(
        Recording, divergence_type="topk_kl", divergence_topk=30, max_steps=1, per_device_train_batch_size=16, **VLLM
    )
    trainer.train()
    assert trainer.recorded[0]["inputs"]["rollout_topk_ids"].shape[-1] == 31
    check_recorded_columns(trainer, trainer.recorded[0], 30, atol=CLOSE)


def test_resume_continues_with_synced_weights(make_trainer, model, tmp_path) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        "divergence_type": "topk_tv",
        "divergence_topk": 3,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "score_inactive": True,
        **VLLM,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    expected = weights(whole)
    model.load_state_dict(start)
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert max(history(resumed, "engine_mismatch/prob_gap_max")) < CLOSE
    # The engine draws from torch's generator in this process, which a checkpoint holds.
    for name, p in weights(resumed).items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-5, msg=name)


def test_the_engine_runs_in_this_process(make_trainer) -> None:
    trainer = make_trainer(seed=5, **VLLM)
    assert torch.initial_seed() == 5  # the engine draws from this generator
    assert trainer.vllm_generation.llm.llm_engine.model_config.logprobs_mode == "processed_logprobs"
    assert os.environ["WORLD_SIZE"] == "1"
