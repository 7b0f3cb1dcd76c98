"""DPPOTrainer through the fused loss and without it: the same steps, and proof of which path trained."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dppo_kernels import DIVERGENCES
from dppo_kernels.trainers import scoring
from tests.trainers.conftest import history, weights


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often the model's forward computed a loss, and how often log-probs with a graph."""
    counted: Counter = Counter()

    def counting(name: str) -> Any:
        real = getattr(scoring, name)

        def wrapper(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counted[name, hidden.requires_grad and torch.is_grad_enabled()] += 1
            return real(hidden, *args, **kwargs)

        return wrapper

    for name in ("linear_policy_loss", "linear_logprobs"):
        monkeypatch.setattr(scoring, name, counting(name))
    return counted


def train_both(make_trainer: Any, model: Any, calls: Counter, **changes: Any) -> list[Any]:
    """[fused, unfused] trainers after training from the same weights; each took its own path only."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    trainers = []
    shared = {"optim": "sgd", "learning_rate": 0.3, "score_inactive": True, "max_steps": 4, **changes}
    for fused, path in ((True, "linear_policy_loss"), (False, "linear_logprobs")):
        model.load_state_dict(start)
        calls.clear()
        trainers.append(make_trainer(fused_loss=fused, **shared))
        trainers[-1].train()
        micro_batches = shared["max_steps"] * shared.get("gradient_accumulation_steps", 1)
        assert {call: n for call, n in calls.items() if call[1]} == {(path, True): micro_batches}
        trainers[-1].after = weights(trainers[-1])
    return trainers


def assert_equal_steps(fused: Any, unfused: Any) -> None:
    for key in ("loss", "grad_norm", "entropy", "ratio/mean", "prob_gap/mean", "divergence/max", "masked/all"):
        assert history(fused, key) == pytest.approx(history(unfused, key), rel=1e-5, abs=1e-6), key
    assert len(history(fused, "loss")) == 4
    for name, p in unfused.after.items():
        torch.testing.assert_close(fused.after[name], p, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_steps_equal_the_unfused_path(make_trainer, model, calls: Counter, kind: str) -> None:
    fused, unfused = train_both(make_trainer, model, calls, divergence_type=kind, divergence_topk=4, learning_rate=1.0)
    assert_equal_steps(fused, unfused)
    assert max(history(fused, "masked/all")) > 0


def test_accumulation_and_an_entropy_bonus_equal_the_unfused_path(make_trainer, model, calls: Counter) -> None:
    changes = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "entropy_coef": 0.02}
    assert_equal_steps(*train_both(make_trainer, model, calls, **changes))


def test_a_lora_policy_with_a_reference_equals_the_unfused_path(make_trainer, model, calls: Counter, monkeypatch) -> None:
    """The head is frozen: no gradient of it is made. The reference, of disabled adapters, is scored without a graph."""
    needed = []
    real = scoring.linear_policy_loss
    monkeypatch.setattr(
        scoring, "linear_policy_loss", lambda h, w, *a, **k: needed.append(w.requires_grad) or real(h, w, *a, **k)
    )
    losses = []
    for fused in (True, False):
        torch.manual_seed(0)
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.0)
        trainer = make_trainer(
            fused_loss=fused, peft_config=adapter, beta=0.05, score_inactive=True, learning_rate=0.05, optim="sgd"
        )  # fmt: skip
        trainer.train()
        losses.append(history(trainer, "loss"))
        trainer.model.unload()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert needed
    assert not any(needed)


def test_inactive_tokens_are_skipped_by_default(make_trainer, model, calls: Counter) -> None:
    """Rewards that are all alike in every second group: those completions have no advantage."""

    def half(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
        return [float(len(c)) if int(p.split("+")[0]) % 2 else 1.0 for c, p in zip(completions, prompts, strict=True)]

    start = {name: p.clone() for name, p in model.state_dict().items()}
    after = []
    for score_inactive in (False, True):
        model.load_state_dict(start)
        trainer = make_trainer(
            reward=half, score_inactive=score_inactive, per_device_train_batch_size=8, optim="sgd", learning_rate=0.3
        )  # fmt: skip
        trainer.train()
        after.append((weights(trainer), history(trainer, "unscored"), history(trainer, "loss")))
    (few, unscored, loss), (all_scored, none, loss_all) = after
    assert max(unscored) > 0.2
    assert not any(none)
    assert loss == pytest.approx(loss_all, abs=1e-6)
    for name, p in all_scored.items():
        torch.testing.assert_close(few[name], p, rtol=0, atol=1e-6, msg=name)


def test_selecting_tokens_by_entropy_needs_the_unfused_path(make_trainer, make_config, calls: Counter) -> None:
    with pytest.raises(ValueError, match="leave `fused_loss` at None"):
        make_config(top_entropy_quantile=0.5, fused_loss=True)
    make_trainer(top_entropy_quantile=0.5, max_steps=1).train()
    assert calls["linear_logprobs", True] == 1
    assert not calls["linear_policy_loss", True]


def test_trl_refuses_an_adapter_on_the_head(make_trainer, model) -> None:
    """So the trainers never see one; `linear_policy_loss` itself takes a `LoraWeight`."""
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_trainer(peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], r=4))


def test_a_compiled_model_has_the_same_loss(make_trainer, model, monkeypatch) -> None:
    for name in ("BACKEND", "MODE"):  # where transformers writes it for accelerate, and leaves it
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make_trainer(model=copy.deepcopy(model), max_steps=1, **compiled)
        trainer.train()
        losses.append(history(trainer, "loss"))
        assert (type(trainer.model_wrapped).__name__ == "OptimizedModule") == bool(compiled)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != 0
