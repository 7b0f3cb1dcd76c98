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
        # 23 rollouts an epoch would be many; 4 prompts of 4 rows make one optimiser step consume a quarter of an epoch.
        pytest.param(2, {"steps_per_generation": 4, "num_iterations": 1}, id="inside a window"),
        pytest.param(3, {"steps_per_generation": 2, "num_iterations": 3}, id="between iterations"),
        pytest.param(4, {"steps_per_generation": 2, "num_iterations": 1}, id="at a window's end"),
        pytest.param(13, {"steps_per_generation": 2, "num_iterations": 2}, id="second epoch, inside a window"),
        pytest.param(3, {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}, id="accumulation"),
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
    expected, losses = weights(whole), history(whole, "loss")
    checkpoint = tmp_path / "whole" / f"checkpoint-{save_at}"
    assert (checkpoint / "rollout_state_0.pt").is_file()
    resumed = run(make_trainer, model, start, tmp_path / "resumed", resume=str(checkpoint), **settings)
    assert resumed.state.global_step == save_at + 6
    for name, p in weights(resumed).items():
        assert torch.equal(p, expected[name]), name
    assert history(resumed, "loss")[-6:] == losses[-6:]
    for key in ("divergence/mean", "masked/all", "num_tokens"):
        assert history(resumed, key) == history(whole, key)


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


def test_a_checkpoint_of_another_world_size_drops_its_rollouts(make_trainer, model, tmp_path, caplog) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(make_trainer, model, start, tmp_path / "a", **settings)
    file = tmp_path / "a" / "checkpoint-2" / "rollout_state_0.pt"
    torch.save(torch.load(file) | {"world_size": 8}, file)
    with caplog.at_level("WARNING", logger="dppo_kernels.trainers.resume"):
        run(make_trainer, model, start, tmp_path / "b", resume=str(file.parent), **settings)
    assert "saved by 8 processes, this run has 1" in caplog.text


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
