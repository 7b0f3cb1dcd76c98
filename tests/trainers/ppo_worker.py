"""One rank of `test_ppo_ddp.py`: one update on given completions, for each way to hold the values; the whole of a short run."""

from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from dppo_kernels.trainers import DecoupledPPOConfig, PPOConfig
from tests.trainers import conftest
from tests.trainers.dapo_worker import by_length, given_completions
from tests.trainers.ppo_runs import RecordingDecoupled, RecordingPPO, value_model, value_weights

tokenizer = conftest.tokenizer.__wrapped__()
KINDS = ("own", "shared", "decoupled")


def build(out: Path, kind: str, settings: dict[str, Any], **extra: Any) -> Any:
    decoupled = kind == "decoupled"
    cls, config_class = (RecordingDecoupled, DecoupledPPOConfig) if decoupled else (RecordingPPO, PPOConfig)
    own = {"num_generations": 1, "num_iterations": 1, "steps_per_generation": None, "share_value_backbone": kind == "shared"}
    config = conftest.make_config.__wrapped__(out)(config_class, **{**own, **settings})
    values = None if kind == "shared" else value_model(len(tokenizer))
    model = conftest.model.__wrapped__(tokenizer)
    data = conftest.prompts.__wrapped__()
    return cls(model, by_length, config, train_dataset=data, processing_class=tokenizer, value_model=values, **extra)


def one_update(out: Path, kind: str, rows: int, accumulation: int) -> dict[str, Any]:
    """What two passes of one SGD step each change, in policy and values; rewards are whitened, and the coefficient adapts."""
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "whiten_rewards": True,
        "kl_coef": 0.1,
        "kl_target": 1.0,
        "vf_coef": 0.5 if kind != "decoupled" else 0.1,
        "entropy_coef": 0.05,
    }
    trainer = build(out, kind, settings, rollout_func=given_completions)
    before = {**conftest.weights(trainer), **{f"values.{n}": p for n, p in value_weights(trainer).items()}}
    trainer.train()
    after = {**conftest.weights(trainer), **{f"values.{n}": p for n, p in value_weights(trainer).items()}}
    names = (
        "objective/scores",
        "objective/kl",
        "objective/kl_coef",
        "value/explained_variance",
        "policy/approx_kl",
        "value/loss",
    )
    names += ("value/grad_norm", "policy/grad_norm")
    return {
        "change": {name: after[name] - p for name, p in before.items()},
        "logged": {name: conftest.history(trainer, name) for name in names},
        "coef": trainer.kl_controller.coef,
        "wrapped": isinstance(trainer._wrapped_values, DistributedDataParallel),
    }


def stops_together(out: Path) -> list[float]:
    """Early stopping is decided by the KL over both ranks."""
    settings = {
        "max_steps": 4,
        "num_ppo_epochs": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "target_kl": 1e-3,
    }
    trainer = build(out, "own", settings)
    trainer.train()
    return conftest.history(trainer, "policy/updated")


def main(wrapper: str, out: Path) -> dict[str, Any]:
    result = {kind: one_update(out, kind, 4, 2) for kind in KINDS}
    return {**result, "stops": stops_together(out)}
