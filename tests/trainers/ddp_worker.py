"""One rank of `test_ddp.py`: trains, checks its own losses against full logits, and prints what the ranks must share."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.trainers import conftest
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits

tokenizer = conftest.tokenizer.__wrapped__()
model = conftest.model.__wrapped__(tokenizer)
config = conftest.make_config.__wrapped__(Path(sys.argv[1]))(divergence_type=sys.argv[2], divergence_topk=3, learning_rate=2e-2)
trainer = Recording(
    model,
    conftest.reward_length,
    config,
    train_dataset=conftest.prompts.__wrapped__(),
    processing_class=tokenizer,
)
trainer.train()
world = trainer.accelerator.num_processes
errors = [abs(r["loss"].item() - world * loss_from_full_logits(trainer, r)) for r in trainer.recorded]
result = {
    "rank": trainer.accelerator.process_index,
    "world": world,
    "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
    "weights": {name: p.double().sum().item() for name, p in trainer.model.named_parameters()},
    "loss_error": max(errors),
    "prompt_ids": trainer.recorded[0]["inputs"]["prompt_ids"].tolist(),
    "masked": conftest.history(trainer, "masked/all"),
    "logged_max": conftest.history(trainer, "divergence/max"),
    "local_max": [stats["divergence"].max.item() for stats in trainer.recorded_stats],
}
Path(sys.argv[1], f"rank{result['rank']}.json").write_text(json.dumps(result))
torch.distributed.destroy_process_group()
