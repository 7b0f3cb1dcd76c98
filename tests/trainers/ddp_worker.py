"""One rank of `test_ddp.py`: trains, checks its own losses against full logits, and returns what the ranks must share."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.trainers import conftest
from tests.trainers.fake_vllm import LAUNCHED, FakeEngine, install
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits

tokenizer = conftest.tokenizer.__wrapped__()


def train(out: Path, kind: str, sampler: str, resume: str | None) -> Recording:
    model = conftest.model.__wrapped__(tokenizer)
    settings = {"divergence_type": kind, "divergence_topk": 3, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 3}
    if sampler != "transformers":
        install(pytest.MonkeyPatch(), FakeEngine(model))
        settings |= {"use_vllm": True, "vllm_mode": sampler}
    config = conftest.make_config.__wrapped__(out)(**settings)
    trainer = Recording(
        model,
        conftest.reward_length,
        config,
        train_dataset=conftest.prompts.__wrapped__(),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(wrapper: str, out: Path, kind: str, sampler: str) -> dict[str, Any]:
    LAUNCHED.update({name: os.environ.get(name) for name in LAUNCHED})  # this is a fork of a process that was no rank
    trainer = train(out, kind, sampler, None)
    resumed = train(out, kind, sampler, str(out / "out" / "checkpoint-3"))  # inside a rollout's window
    world = trainer.accelerator.num_processes
    errors = [abs(r["loss"].item() - world * loss_from_full_logits(trainer, r)) for r in trainer.recorded]
    return {
        "world": world,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "weights": {name: p.double().sum().item() for name, p in trainer.model.named_parameters()},
        "resumed_equal": all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters())),
        "loss_error": max(errors),
        "prompt_ids": trainer.recorded[0]["inputs"]["prompt_ids"].tolist(),
        "mismatch": max(conftest.history(trainer, "engine_mismatch/prob_gap_max")),
        "masked": conftest.history(trainer, "masked/all"),
        "logged_max": conftest.history(trainer, "divergence/max"),
        "local_max": [stats["divergence"].max.item() for stats in trainer.recorded_stats],
    }
