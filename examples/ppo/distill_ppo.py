"""PPO of a student with a teacher and a reward model of one's own.

    python examples/ppo/distill_ppo.py \
        --student_path Qwen/Qwen2.5-0.5B-Instruct --teacher_path Qwen/Qwen2.5-1.5B-Instruct \
        --reward_model_path my-reward-model --dataset_name prompts.jsonl \
        --learning_rate 1e-5 --batch_size 64 --mini_batch_size 8 --output_dir outputs/distill-ppo

On several GPUs: accelerate launch --multi_gpu --num_processes 8 examples/ppo/distill_ppo.py ... Without own code:
`dppo train distill-ppo`, from flags and YAML files.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from dppo_kernels.control import ScoreProcessor
from dppo_kernels.trainers import DistillPPOConfig, DistillPPOTrainer
from dppo_kernels.trainers.data import load_prompts


@dataclass
class Arguments:
    student_path: str
    teacher_path: str
    reward_model_path: str
    dataset_name: str


class LogScores(ScoreProcessor):
    """`use_score_scaling`, `use_score_norm` and `score_clip` on a logarithmic scale, for a reward model with outliers."""

    def __call__(self, scores: torch.Tensor, *, update: bool = True) -> torch.Tensor:
        return super().__call__(scores.sign() * scores.abs().log1p(), update=update)


class MyTrainer(DistillPPOTrainer):
    """A set-up method is all there is to override; `_setup_optimizer`, `_setup_scheduler`, `_setup_early_stopping` likewise."""

    def _setup_score_processing(self) -> ScoreProcessor:
        return LogScores(scaling=self.args.use_score_scaling, norm=self.args.use_score_norm, clip=self.args.score_clip)


def main() -> DistillPPOTrainer:
    arguments, config = HfArgumentParser((Arguments, DistillPPOConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(arguments.student_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"dtype": torch.float32}  # not the checkpoint's: small steps are lost in bf16 (`--bf16` computes in it)
    trainer = MyTrainer(
        teacher=AutoModelForCausalLM.from_pretrained(arguments.teacher_path, **options),
        student=AutoModelForCausalLM.from_pretrained(arguments.student_path, **options),
        reward_model=AutoModelForSequenceClassification.from_pretrained(arguments.reward_model_path, num_labels=1, **options),
        config=config,
        train_dataset=load_prompts(arguments.dataset_name, with_answers=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":
    main()
