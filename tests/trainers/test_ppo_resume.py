"""PPO: N + M updates in one run equal N, save, load, M, bit for bit; a run that is killed while it saves loses nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.conftest import history, weights
from tests.trainers.ppo_runs import make_ppo, value_model, value_weights

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    # Four steps an update: inside a pass, between two passes, at the end of an update.
    pytest.param(1, {}, id="coupled, inside a pass"),
    pytest.param(6, {"share_value_backbone": True}, id="shared backbone, between passes"),
    pytest.param(4, {"kl_target": 1.0, "kl_horizon": 100}, id="adaptive coefficient, at an update's end"),
    pytest.param(5, {"target_kl": 1e-3}, id="stopped early"),
    pytest.param(4, {"decoupled": True, "keep_skipped_rollouts": True, "vf_update_frequency": 2}, id="between value updates"),
    pytest.param(
        6, {"decoupled": True, "vf_update_frequency": 1, "vf_lr_scheduler_type": "linear"}, id="inside a policy phase"
    ),
    pytest.param(8, {"decoupled": True, "vf_update_frequency": 1}, id="after a value phase"),
    pytest.param(3, {"decoupled": True, "vf_pretrain_updates": 2}, id="inside the pretraining"),
]


def run(make_trainer: Any, model: Any, start: dict[str, torch.Tensor], out: Path, resume: Path | None, **changes: Any) -> Any:
    model.load_state_dict(start)
    values = {} if changes.get("share_value_backbone") else {"value_model": value_model(108)}
    trainer = make_ppo(make_trainer, output_dir=str(out), **values, **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize(("save_at", "settings"), CASES)
def test_resume_is_exact(make_trainer, model, prompts, tmp_path, save_at: int, settings: dict[str, Any]) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        **settings,
        "train_dataset": prompts.select(range(21)),  # two updates an epoch
        "max_steps": 16,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": save_at,
        "save_only_model": False,
    }
    whole = run(make_trainer, model, start, tmp_path / "whole", None, **settings)
    policy, values = weights(whole), value_weights(whole)
    resumed = run(make_trainer, model, start, tmp_path / "again", tmp_path / "whole" / f"checkpoint-{save_at}", **settings)
    assert resumed.state.global_step == 16
    assert resumed.update_count == whole.update_count == 4
    assert all(torch.equal(p, policy[name]) for name, p in weights(resumed).items())
    assert all(torch.equal(p, values[name]) for name, p in value_weights(resumed).items())
    names = [n for n in whole.state.log_history[0] if n.startswith(("policy/", "objective/"))] + ["loss"]
    names += ["value/loss", "value/grad_norm", "value/explained_variance", "value/updated", "value/learning_rate"]
    for name in names:
        assert history(resumed, name) == history(whole, name), name
    assert resumed.kl_controller.coef == whole.kl_controller.coef
    if settings.get("decoupled"):
        assert resumed.value_scheduler.last_epoch == whole.value_scheduler.last_epoch > 0
        for mine, other in zip(*(t.value_optimizer.state_dict()["state"].values() for t in (resumed, whole)), strict=True):
            assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(other[name])) for name, x in mine.items())


def test_a_checkpoint_of_another_trainer_is_refused(make_trainer, model, tmp_path) -> None:
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    ppo = make_ppo(make_trainer, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="checkpoint-2 holds no value_model: it is not a checkpoint of RecordingPPO"):
        ppo.train(resume_from_checkpoint=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.trainers import conftest, ppo_runs
from dppo_kernels.trainers import DecoupledPPOConfig

out, when = Path(sys.argv[1]), sys.argv[2]
tokenizer = conftest.tokenizer.__wrapped__()
config = conftest.make_config.__wrapped__(out)(
    DecoupledPPOConfig, **{**ppo_runs.SETTINGS, "vf_update_frequency": 1, "save_strategy": "steps", "save_steps": 4}
)
trainer = ppo_runs.RecordingDecoupled(
    conftest.model.__wrapped__(tokenizer), conftest.reward_length, config,
    train_dataset=conftest.prompts.__wrapped__(), processing_class=tokenizer,
)
if when != "never":
    owner, name = (os, "replace") if when == "before the rename" else (trainer, when)
    wrapped = getattr(owner, name)

    def killed(*args, **kwargs):
        if when != "before the rename":
            wrapped(*args, **kwargs)
        if trainer.state.global_step == 8 and (when != "before the rename" or "checkpoint-8" in str(args[0])):
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before the rename":
            wrapped(*args, **kwargs)

    setattr(owner, name, killed)
trainer.train(resume_from_checkpoint=len(sys.argv) > 3 or None)
print("ended", sum(p.double().sum().item() for p in trainer.model.parameters()),
      sum(p.double().sum().item() for p in trainer.value_model.parameters()))
"""


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_kill_in_the_middle_of_a_save(tmp_path) -> None:
    """The second save is killed at two moments; the first checkpoint is the last one there is, and leads to the same end."""
    whole = process(str(tmp_path / "whole"), "never")
    assert whole.returncode == 0, whole.stderr
    [end] = [line for line in whole.stdout.splitlines() if line.startswith("ended")]
    for i, when in enumerate(("save_model", "before the rename")):
        out = tmp_path / str(i)
        killed = process(str(out), when)
        assert killed.returncode == -signal.SIGKILL, (when, killed.stderr)
        left = sorted(path.name for path in (out / "out").glob("checkpoint-*"))
        assert left == ["checkpoint-4"], when
        assert any((out / "out" / "_unfinished").rglob("*.safetensors")), when
        resumed = process(str(out), "never", "resume")
        assert resumed.returncode == 0, resumed.stderr
        assert end in resumed.stdout.splitlines(), when
        assert not (out / "out" / "_unfinished").exists()
        assert sorted(path.name for path in (out / "out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_the_best_checkpoint_and_the_limit(make_trainer, tmp_path) -> None:
    """Paths in the state are where checkpoints lie in the end, and old ones are still deleted."""
    trainer = make_ppo(
        make_trainer,
        output_dir=str(tmp_path),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=[{"prompt": "1+1="}, {"prompt": "12+1="}],
        per_device_eval_batch_size=2,
        metric_for_best_model="eval_objective/scores",
        greater_is_better=True,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).parent == tmp_path
    assert Path(best).is_dir()
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(left) <= 2
    assert "checkpoint-8" in left
    assert Path(best).name in left
    assert '"best_model_checkpoint": "' + best in (tmp_path / "checkpoint-8" / "trainer_state.json").read_text()
