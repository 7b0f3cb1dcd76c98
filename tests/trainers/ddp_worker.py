"""One rank of `test_ddp.py`: trains, checks its own losses against full logits, and prints what the ranks must share."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.trainers import conftest
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits

OUT, KIND = Path(sys.argv[1]), sys.argv[2]
tokenizer = conftest.tokenizer.__wrapped__()


def train(resume: str | None) -> Recording:
    config = conftest.make_config.__wrapped__(OUT)(
        divergence_type=KIND, divergence_topk=3, learning_rate=2e-2, save_strategy="steps", save_steps=3
    )
    trainer = Recording(
        conftest.model.__wrapped__(tokenizer),
        conftest.reward_length,
        config,
        train_dataset=conftest.prompts.__wrapped__(),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


trainer = train(None)
resumed = train(str(OUT / "out" / "checkpoint-3"))  # inside a rollout's window
world = trainer.accelerator.num_processes
errors = [abs(r["loss"].item() - world * loss_from_full_logits(trainer, r)) for r in trainer.recorded]
result = {
    "rank": trainer.accelerator.process_index,
    "world": world,
    "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
    "weights": {name: p.double().sum().item() for name, p in trainer.model.named_parameters()},
    "resumed_equal": all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters())),
    "loss_error": max(errors),
    "prompt_ids": trainer.recorded[0]["inputs"]["prompt_ids"].tolist(),
    "masked": conftest.history(trainer, "masked/all"),
    "logged_max": conftest.history(trainer, "divergence/max"),
    "local_max": [stats["divergence"].max.item() for stats in trainer.recorded_stats],
}
Path(sys.argv[1], f"rank{result['rank']}.json").write_text(json.dumps(result))
torch.distributed.destroy_process_group()
