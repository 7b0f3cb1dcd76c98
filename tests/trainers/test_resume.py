"""Training N + M steps, and N steps, save, load, M steps, give the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_kernels.trainers.resume import EpochRepeatSampler
from tests.trainers.conftest import history, weights


def run(make_trainer, model, start: dict[str, torch.Tensor], out: Path, *, resume: str | None = None, **changes: Any) -> Any:
    model.load_state_dict(start)
    trainer = make_trainer(output_dir=str(out), **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("save_at", "settings"),
    [
        pytest.param(2, {"steps_per_generation": 4, "num_iterations": 1}, id="inside a window"),
        pytest.param(3, {"steps_per_generation": 2, "num_iterations": 3}, id="between iterations"),
        pytest.param(4, {"steps_per_generation": 2, "num_iterations": 1}, id="at a window's end"),
        pytest.param(13, {"steps_per_generation": 2, "num_iterations": 2}, id="second epoch, inside a window"),
        pytest.param(3, {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param(3, {"steps_per_generation": 4, "num_iterations": 1, "logging_steps": 4}, id="inside a logging window"),
    ],
)
@pytest.mark.parametrize("kind", ["binary_tv", "topk_kl"])
def test_resume_is_exact(make_trainer, model, prompts, tmp_path, save_at: int, settings: dict[str, int], kind: str) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        **settings,
        "divergence_type": kind,
        "divergence_topk": 3,
        "train_dataset": prompts.select(range(5)),  # 10 to 20 micro-steps an epoch, so that several epochs pass
        "max_steps": save_at + 6,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": save_at,
    }
    whole = run(make_trainer, model, start, tmp_path / "whole", **settings)
    expected = weights(whole)
    checkpoint = tmp_path / "whole" / f"checkpoint-{save_at}"
    assert (checkpoint / "rollout_state_0.pt").is_file()
    resumed = run(make_trainer, model, start, tmp_path / "resumed", resume=str(checkpoint), **settings)
    assert resumed.state.global_step == save_at + 6
    for name, p in weights(resumed).items():
        assert torch.equal(p, expected[name]), name
    for key in ("loss", "divergence/mean", "divergence/max", "masked/all", "engine_mismatch/prob_gap_max", "num_tokens"):
        assert history(whole, key)
        assert history(resumed, key) == history(whole, key), key


def test_a_moving_reference_resumes_exactly(make_trainer, model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "start")  # TRL loads the reference model from the policy's path
    model.config._name_or_path = str(tmp_path / "start")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.5,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = run(make_trainer, model, start, tmp_path / "whole", **settings)
    expected, reference = weights(whole), {name: p.clone() for name, p in whole.ref_model.state_dict().items()}
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run(make_trainer, model, start, tmp_path / "resumed", resume=str(checkpoint), **settings)
    for name, p in weights(resumed).items():
        assert torch.equal(p, expected[name]), name
    for name, p in resumed.ref_model.state_dict().items():
        assert torch.equal(p, reference[name]), name
    assert any(not torch.equal(p, start[name]) for name, p in reference.items())
    assert history(resumed, "kl") == history(whole, "kl")


def test_a_checkpoint_of_stock_trl_resumes_with_a_warning(make_trainer, model, tmp_path, caplog) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(make_trainer, model, start, tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    (checkpoint / "rollout_state_0.pt").unlink()
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        trainer = run(make_trainer, model, start, tmp_path / "b", resume=str(checkpoint), **settings)
    assert "continues, but not exactly" in caplog.text
    assert trainer.state.global_step == 4


def test_a_checkpoint_with_other_settings_drops_its_rollouts(make_trainer, model, tmp_path, caplog) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    # One rollout serves 8 steps; every token is scored, so that every step has a divergence.
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 4, "score_inactive": True}
    run(make_trainer, model, start, tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    for changes, difference in (
        ({"steps_per_generation": 1}, "steps_per_generation 2 -> 1"),
        ({"divergence_type": "topk_tv", "divergence_topk": 3}, "divergence_topk 0 -> 3"),
        ({"temperature": 0.5}, "temperature 1.0 -> 0.5"),
    ):
        with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
            trainer = run(make_trainer, model, start, tmp_path / "b", resume=str(checkpoint), **{**settings, **changes})
        assert f"was saved with other settings ({difference}): a new rollout is generated" in caplog.text
        # The first step after the resume is on a rollout of its own weights.
        assert history(trainer, "divergence/max")[2] <= 1e-5

    file = checkpoint / "rollout_state_0.pt"
    state = torch.load(file)
    torch.save({**state, "signature": {**state["signature"], "processes": 8}}, file)
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        run(make_trainer, model, start, tmp_path / "c", resume=str(checkpoint), **settings)
    assert "(processes 8 -> 1)" in caplog.text


def test_a_buffer_without_reference_scores_is_dropped_where_beta_needs_them(make_trainer, model, tmp_path, caplog) -> None:
    model.save_pretrained(tmp_path / "start")
    model.config._name_or_path = str(tmp_path / "start")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 4}
    run(make_trainer, model, start, tmp_path / "a", **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        trainer = run(make_trainer, model, start, tmp_path / "b", resume=checkpoint, beta=0.1, **settings)
    assert "scores_reference 0 -> 1" in caplog.text
    assert history(trainer, "kl")


def test_training_twice_starts_over(make_trainer, model) -> None:
    trainer = make_trainer(max_steps=3)
    trainer.train()
    first = history(trainer, "divergence/max")
    trainer.train()
    again = history(trainer, "divergence/max")
    assert first[0] <= 1e-5
    assert again[0] <= 1e-5  # sampled anew by the weights that the first run left


@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_replays_the_stock_permutations(shuffle: bool) -> None:
    from trl.trainer.utils import RepeatSampler

    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "shuffle": shuffle, "seed": 7}
    stock, ours = RepeatSampler(range(10), **settings), EpochRepeatSampler(range(10), **settings)
    epochs = [list(stock) for _ in range(3)]
    for epoch in (2, 0, 1):
        ours.set_epoch(epoch)
        assert list(ours) == epochs[epoch]
        assert list(ours) == epochs[epoch]
    assert (epochs[0] != epochs[1]) == shuffle
