"""What recording a rollout costs in memory, above what generating it needs anyway."""

import pytest

from tests.memory import linux_only, peak_mb

SETUP = """
import sys, tempfile
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from dppo_kernels.trainers import DPPOConfig, DPPOTrainer
from tests.trainers.conftest import small_config

torch.set_num_threads(2)
torch.manual_seed(0)
name, steps, batch = sys.argv[1], int(sys.argv[2]), 64
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
config = small_config(151936, hidden_size=8, num_hidden_layers=1, max_position_embeddings=512)
config.eos_token_id = None  # every completion has its full length
model = Qwen3ForCausalLM(config)
shared = dict(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=batch, num_generations=batch,
    max_completion_length=steps, report_to=[], disable_tqdm=True, gradient_checkpointing=False,
)
arguments = dict(
    reward_funcs=lambda completions, **_: [0.0] * len(completions), train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
    processing_class=tokenizer,
)
if name == "dppo":
    trainer = DPPOTrainer(model, args=DPPOConfig(**shared, divergence_type="topk_tv"), **arguments)
else:
    trainer = GRPOTrainer(model, args=GRPOConfig(**shared, top_k=0), **arguments)
trainer.generation_config.eos_token_id = None
trainer.eos_token_ids = []

def rollout():
    if name == "dppo":
        from dppo_kernels.trainers.rollout import RolloutStore
        trainer._rollout_store = RolloutStore(trainer.rollout_topk)
    completions, logprobs = trainer._generate_single_turn([[2]] * batch, None, {}, batch)
    assert {len(ids) for ids in completions} == {trainer.generation_config.max_new_tokens}
    return completions, logprobs

trainer.generation_config.max_new_tokens = 2
rollout()
trainer.generation_config.max_new_tokens = steps
"""
MEASURED = """
kept = 0
result = rollout()
"""


@linux_only
@pytest.mark.parametrize("steps", [32, pytest.param(256, marks=pytest.mark.long)])
def test_recording_needs_columns_not_logits(steps: int) -> None:
    """64 sequences over a vocabulary of 151936: all logits of 32 steps would be 1.2 GB, of 256 10 GB."""
    plain, recorded = (peak_mb(SETUP, MEASURED, name, steps) for name in ("grpo", "dppo"))
    print(f"\n{steps} steps: generation {plain:.0f} MB, recorded {recorded:.0f} MB")
    assert recorded < plain + 64
