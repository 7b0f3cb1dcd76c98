"""The mismatch of sampler and trainer on unchanged weights: measured, and acted on where it is too large."""

import math
from typing import Any

import pytest
import torch

from dppo_kernels import DIVERGENCES
from tests.trainers.conftest import history
from tests.trainers.fake_vllm import FakeEngine, install
from tests.trainers.test_dppo_trainer import Recording, full_logits

LOGGER = "dppo_kernels.trainers.mismatch"
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "score_inactive": True}


@pytest.fixture
def engine(monkeypatch, model) -> FakeEngine:
    return install(monkeypatch, FakeEngine(model))


def warnings_of(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_is_logged(make_trainer, engine, kind: str) -> None:
    """Against full distributions of trainer and sampler, which runs at 0.3 of the temperature."""
    engine.heat = 0.3
    trainer = make_trainer(
        Recording, divergence_type=kind, divergence_topk=3, max_steps=1, per_device_train_batch_size=16, temperature=0.9,
        steps_per_generation=1, num_iterations=1, **VLLM,
    )  # fmt: skip
    trainer.train()
    inputs, state = trainer.recorded[0]["inputs"], trainer.recorded[0]["state"]
    trainer.model.load_state_dict(state)
    active = inputs["completion_mask"].bool()
    with torch.no_grad():
        logits = full_logits(trainer.model, inputs)[active]
    sampled = inputs["completion_ids"][active][:, None]
    log_mu, log_pi = (torch.log_softmax(logits / (0.9 * heat), -1) for heat in (0.3, 1.0))
    mu, pi = (x.exp().gather(1, sampled).squeeze(1) for x in (log_mu, log_pi))
    gap = (mu - pi).abs()
    if kind.startswith("topk"):
        top = log_mu.topk(3).indices
        outside = ~(top == sampled).any(1, keepdim=True)
        columns = torch.cat([top, sampled], 1)
        kept = torch.cat([torch.ones_like(top, dtype=torch.bool), outside], 1)
        m, p = (x.exp().gather(1, columns) * kept for x in (log_mu, log_pi))
        m, p = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (m, p))
    else:
        m, p = torch.stack([mu, 1 - mu], 1), torch.stack([pi, 1 - pi], 1)
    tv = (m - p).abs().sum(1) / 2 if kind.endswith("tv") else gap
    kl = torch.where(m > 0, m * (m / p).log(), 0.0).sum(1) if kind.endswith("kl") else (mu / pi).log()
    for name, expected in {"tv": tv.mean(), "kl": kl.mean(), "prob_gap_mean": gap.mean(), "prob_gap_max": gap.max()}.items():
        assert history(trainer, f"engine_mismatch/{name}") == [pytest.approx(expected.item(), rel=1e-4)], name
    assert gap.mean() > 0.05


def test_a_cold_engine_warns_once_per_crossing(make_trainer, engine, caplog) -> None:
    engine.heat = 0.3
    settings = {"num_iterations": 1, "steps_per_generation": 1, "learning_rate": 1e-6, "max_steps": 3}
    with caplog.at_level("WARNING", logger=LOGGER):
        make_trainer(**settings, **VLLM).train()
    (message,) = warnings_of(caplog)
    assert "step 1 (train): on unchanged weights, sampler and trainer differ by 0." in message
    for cause in ("temperature", "top-p", "stale", "dropout", "bf16", "--logprobs-mode", "`mismatch_threshold`=0.05", "tv 0."):
        assert cause in message


def test_warnings_come_again_after_the_mean_was_below(make_trainer, caplog) -> None:
    from dppo_kernels.trainers.metrics import Reduced

    trainer = make_trainer()
    with caplog.at_level("WARNING", logger=LOGGER):
        for mean in (0.06, 0.2, 0.04, 0.05, 0.0501, math.nan):
            trainer.inspect_logged("train", {"fresh_prob_gap": Reduced(mean, mean)})
        trainer.inspect_logged("train", {})  # a window that reuses rollouts says nothing
        trainer.inspect_logged("eval", {"fresh_prob_gap": Reduced(0.3, 0.4)})
    found = [(text.split("by ")[1].split(" ")[0], "(eval)" in text) for text in warnings_of(caplog)]
    assert found == [("0.06", False), ("0.0501", False), ("0.3", True)]


def test_a_cold_engine_stops_the_run_if_asked_to(make_trainer, engine) -> None:
    engine.heat = 0.3
    trainer = make_trainer(mismatch_action="stop", num_iterations=1, max_steps=3, **VLLM)
    with pytest.raises(RuntimeError, match=r"differ by 0\.\d+ .* the engine samples at another temperature"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert history(trainer, "engine_mismatch/prob_gap_mean")  # logged before it stopped


def test_stale_weights_stop_the_run(make_trainer, engine, monkeypatch) -> None:
    monkeypatch.setattr(engine, "load", lambda weights: None)
    trainer = make_trainer(mismatch_action="stop", max_steps=3, **VLLM)
    with pytest.raises(RuntimeError, match="stale because a sync failed"):
        trainer.train()


def test_engines_that_agree_pass_and_none_is_off(make_trainer, engine, model, caplog) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    with caplog.at_level("WARNING", logger=LOGGER):
        make_trainer(mismatch_action="stop", mismatch_threshold=1e-5, **VLLM).train()  # and steps on changed weights
        model.load_state_dict(start)
        make_trainer(mismatch_action="stop", mismatch_threshold=1e-5).train()  # transformers
        engine.heat = 0.3
        make_trainer(mismatch_action="stop", mismatch_threshold=None, **VLLM).train()
    assert warnings_of(caplog) == []
