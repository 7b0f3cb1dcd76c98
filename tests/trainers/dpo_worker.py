"""Two ranks of DPO under DDP, and the same steps on one process: ``torchrun -m tests.trainers.dpo_worker FOLDER``."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3ForCausalLM

from dppo_kernels.trainers import DPOConfig, DPOTrainer
from dppo_kernels.trainers.demo.task import build_tokenizer
from tests.trainers.conftest import history, small_config, weights


def trained(folder: Path, batch: int) -> tuple[Any, dict[str, Any]]:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small_config(len(tokenizer)))
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a + b + 1}{a}"} for a in range(8) for b in range(4)]
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 3}
    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        max_steps=4,
        logging_steps=2,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        **settings,
    )
    reference = Qwen3ForCausalLM(model.config)
    reference.load_state_dict({name: x + 0.02 * torch.randn_like(x) for name, x in model.state_dict().items()})
    trainer = DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    names = ("rewards/margins", "num_tokens", "grad_norm", "loss")
    found: dict[str, Any] = {name.removeprefix("rewards/"): history(trainer, name) for name in names}
    found["weights"] = [x for value in weights(trainer).values() for x in value.flatten().tolist()[::7]]
    return trainer, found


def main(folder: Path) -> None:
    trainer, found = trained(folder, 4)
    rank = trainer.accelerator.process_index
    found |= {"world": trainer.accelerator.num_processes, "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel)}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    del trainer  # before the group that its reducer uses: the other way round it may wait for ever
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
