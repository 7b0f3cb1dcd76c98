"""The trainer's process of `test_gpu.py`: three steps with rollouts by a vLLM server."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.trainers import conftest
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits

MODEL, OUT, PORT, GROUP_PORT = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


config = conftest.make_config.__wrapped__(OUT)(
    use_cpu=False,
    use_vllm=True,
    vllm_mode="server",
    vllm_server_port=PORT,
    vllm_server_timeout=600.0,
    vllm_group_port=GROUP_PORT,
    divergence_type="topk_kl",
    divergence_topk=30,
    learning_rate=2e-2,
    steps_per_generation=1,
    num_iterations=1,
    max_steps=3,
    per_device_train_batch_size=16,
)
trainer = Recording(
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
    conftest.reward_length,
    config,
    train_dataset=conftest.prompts.__wrapped__(),
    processing_class=conftest.tokenizer.__wrapped__(),
)
trainer.train()
result = {
    "gaps": conftest.history(trainer, "engine_mismatch/prob_gap_max"),
    "loss_errors": [abs(r["loss"].item() - loss_from_full_logits(trainer, r)) for r in trainer.recorded],
}
(OUT / "result.json").write_text(json.dumps(result))
