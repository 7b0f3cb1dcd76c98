"""Decoupled PPO with a policy, a reference, a reward model and a value model of one's own.

    python examples/ppo/decoupled_ppo.py \
        --model_name_or_path EleutherAI/pythia-1b-deduped --reward_model_path EleutherAI/pythia-160m \
        --dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style --dataset_train_split descriptiveness \
        --learning_rate 3e-6 --vf_learning_rate 1e-4 --output_dir outputs/pythia-1b-decoupled-ppo

On several GPUs: accelerate launch --multi_gpu --num_processes 8 examples/ppo/decoupled_ppo.py ... (one value model a process,
kept in step by DistributedDataParallel). `dppo train decoupled-ppo` does the same from flags and YAML files.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from dppo_kernels.trainers import DecoupledPPOConfig, DecoupledPPOTrainer
from dppo_kernels.trainers.data import load_prompts


@dataclass
class Arguments:
    model_name_or_path: str
    reward_model_path: str
    dataset_name: str
    dataset_train_split: str = "train"


def main() -> DecoupledPPOTrainer:
    arguments, config = HfArgumentParser((Arguments, DecoupledPPOConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"dtype": torch.float32}  # not the checkpoint's: small steps are lost in bf16 (`--bf16` computes in it)
    policy, scorer = arguments.model_name_or_path, arguments.reward_model_path
    trainer = DecoupledPPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, **options),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, **options),
        reward_model=AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1, **options),
        value_model=AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1, **options),
        args=config,
        train_dataset=load_prompts(arguments.dataset_name, split=arguments.dataset_train_split, with_answers=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(config.output_dir)  # the value model goes to its folder value_model
    return trainer


if __name__ == "__main__":
    main()
