"""DPO on pairs that a model's own completions make, scored by a reward function of one's own.

    python examples/dpo/dpo.py --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \
        --max_completion_length 256 --learning_rate 1e-6 --output_dir outputs/dpo

On several GPUs: make the pairs first (`dppo pairs`), then `accelerate launch --multi_gpu --num_processes 8 -m
dppo_kernels.trainers.cli train dpo --dataset_name pairs.parquet ...`.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from dppo_kernels.trainers import DPOConfig, DPOTrainer, PairsConfig, make_pairs
from dppo_kernels.trainers.data import load_prompts


@dataclass
class Arguments:
    model_path: str
    dataset_name: str
    max_completion_length: int = 256


def brevity(completions: list[str], **columns: object) -> list[float]:
    """The shorter, the better: put your own here."""
    return [-float(len(text)) for text in completions]


def main() -> DPOTrainer:
    arguments, config = HfArgumentParser((Arguments, DPOConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Not in the checkpoint's dtype: small steps are lost in bf16 (`--bf16` computes in it).
    model = AutoModelForCausalLM.from_pretrained(arguments.model_path, dtype=torch.float32).to(config.device)
    prompts = load_prompts(arguments.dataset_name, with_answers=False)
    making = PairsConfig(
        max_completion_length=arguments.max_completion_length, output_file=f"{config.output_dir}/pairs.parquet"
    )
    pairs, statistics = make_pairs(model, tokenizer, prompts, brevity, making)
    print(statistics.summary())
    if not statistics.pairs:
        raise SystemExit(f"no prompt of {arguments.dataset_name} gave a pair: see the statistics above")
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(model, None, config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":
    main()
