"""PPO with a teacher: N + M steps in one run equal N, save, load, M, bit for bit, moments of the scores included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.conftest import history, weights
from tests.trainers.distill_runs import make_distill
from tests.trainers.ppo_runs import value_model, value_weights

SCORES = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 1.5}
CASES = [
    # Four steps an update: inside a pass, between two passes, at the end of an update.
    pytest.param(5, {**SCORES, "target": 1.0, "horizon": 100}, id="inside a pass"),
    pytest.param(6, {**SCORES, "kd_data": "dataset"}, id="dataset, between passes"),
    pytest.param(
        8,
        {**SCORES, "early_stopping": True, "target_kl": 1e-3, "optimizer_name": "sgd", "optimizer_kwargs": {"momentum": 0.95}},
        id="at an update's end, stopped early",
    ),
]


def run(make_trainer: Any, model: Any, start: dict[str, torch.Tensor], out: Path, resume: Path | None, **changes: Any) -> Any:
    model.load_state_dict(start)
    trainer = make_distill(make_trainer, output_dir=str(out), value_model=value_model(108), **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize(("save_at", "settings"), CASES)
def test_resume_is_exact(make_trainer, model, prompts, tmp_path, save_at: int, settings: dict[str, Any]) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    few = prompts.select(range(21))  # two updates an epoch
    settings = {
        **settings,
        "train_dataset": few.add_column("completion", ["x" * (i % 5) for i in range(21)]),
        "max_steps": 12,
        "scheduler_name": "cosine",
        "scheduler_kwargs": {"num_warmup_steps": 2},
        "save_strategy": "steps",
        "save_steps": save_at,
        "save_only_model": False,
    }
    whole = run(make_trainer, model, start, tmp_path / "whole", None, **settings)
    student, values = weights(whole), value_weights(whole)
    resumed = run(make_trainer, model, start, tmp_path / "again", tmp_path / "whole" / f"checkpoint-{save_at}", **settings)
    assert resumed.state.global_step == 12
    assert resumed.update_count == 3
    assert all(torch.equal(p, student[name]) for name, p in weights(resumed).items())
    assert all(torch.equal(p, values[name]) for name, p in value_weights(resumed).items())
    logged = set().union(*whole.state.log_history)
    names = [n for n in logged if n.startswith(("policy/", "objective/", "distill/"))] + ["loss", "learning_rate"]
    assert len([n for n in names if n.startswith("distill/")]) == 4
    for name in names:
        assert history(resumed, name) == history(whole, name), name
    assert (0 in history(whole, "policy/updated")) == settings.get("early_stopping", False)
    assert resumed.kl_controller.coef == whole.kl_controller.coef
    assert resumed.score_processor.state_dict() == whole.score_processor.state_dict()
    assert whole.score_processor.moments.count == 24
