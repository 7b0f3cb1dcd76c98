"""One rank of `test_dapo_ddp.py`: one optimiser step on given completions, dynamic sampling with ranks out of balance, and
``dppo train``."""

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel

from dppo_kernels.trainers import DAPOConfig
from dppo_kernels.trainers.train import train
from tests.trainers import conftest
from tests.trainers.test_dynamic_sampling import CARRY, Answers, Recording, rows_of
from tests.trainers.test_train import MIXED, TINY

tokenizer = conftest.tokenizer.__wrapped__()


def given_completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Of very different lengths; a function of prompt and place in the group, so that every split trains on the same."""
    seen: Counter[str] = Counter()
    prompt_ids, completion_ids = [], []
    for prompt in prompts:
        place = seen[prompt]
        seen[prompt] += 1
        number = int(prompt.split("+")[0]) + 5 * place
        prompt_ids.append(tokenizer(prompt)["input_ids"])
        completion_ids.append([8 + (number * 7 + i * i) % 90 for i in range(1 + number % 6 * (place + 1) % 9)])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def by_length(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids) % 5) for ids in completion_ids]


def build(out: Path, reward: Any, data: Any, settings: dict[str, Any], **extra: Any) -> Recording:
    config = conftest.make_config.__wrapped__(out)(DAPOConfig, **settings)
    model = conftest.model.__wrapped__(tokenizer)
    return Recording(model, reward, config, train_dataset=data, processing_class=tokenizer, **extra)


def one_step(out: Path, rows: int, accumulation: int, filtered: bool) -> dict[str, Any]:
    """The gradient of one optimiser step of `rows * accumulation` completions a process."""
    settings = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "num_iterations": 1,
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation,
        "filter_groups_enable": filtered,
        "filter_groups_metric": "reward" if filtered else None,
        "entropy_coef": 0.05,
    }
    data = conftest.prompts.__wrapped__()
    trainer = build(out, by_length, data, settings, rollout_func=given_completions)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {
        "gradient": {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()},
        "tokens": [int(x["completion_mask"].sum()) for x in trainer.micro_batches],
        "step_tokens": [int(x["num_items_in_step"]) for x in trainer.micro_batches],
    }


# In every round of 12 prompts, five of the six groups of the first half are mixed, and one of the second half.
KINDS = [("hard" if i % 6 == 5 else "mixed") if i % 12 < 6 else ("mixed" if i % 6 == 2 else "easy") for i in range(72)]


def sampling(out: Path) -> dict[str, Any]:
    data = Dataset.from_dict({"prompt": [f"{i}=" for i in range(72)], "kind": KINDS, "row": list(range(72))})
    settings = {**CARRY, "shuffle_dataset": False, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    del settings["config_class"]

    def run(resume: str | None) -> tuple[Recording, Answers]:
        answers = Answers()
        trainer = build(out, answers, data, settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, answers

    trainer, answers = run(None)
    resumed, _ = run(str(out / "out" / "checkpoint-2"))
    logged = ("dapo/num_gen_batches", "dapo/frac_kept", "dapo/surplus", "reward/mean", "reward", "frac_reward_zero_std")
    return {
        "generated": answers.calls,
        "trained": [rows_of(trainer, batch) for batch in trainer.batches],
        "stale": [batch["stale"].view(-1, 4).all(1).tolist() for batch in trainer.batches],
        "items": [int(batch["num_items_in_batch"]) for batch in trainer.batches],
        "tokens": [int(batch["completion_mask"].sum()) for batch in trainer.batches],
        "logged": {name: conftest.history(trainer, name) for name in logged},
        "weights": {name: p.double().sum().item() for name, p in trainer.model.named_parameters()},
        "resumed_equal": all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters())),
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
    }


def one_rank_reports(out: Path) -> list[int]:
    """Accuracy is reported on the first rank alone: what the other one generates is of no use."""

    def answers(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
        right = [float(i % 4 < 2) for i in range(len(completions))]
        if torch.distributed.get_rank() == 0:
            log_extra("acc", right)
        return right

    data = Dataset.from_dict({"prompt": [f"{i}=" for i in range(40)]})
    settings = {
        "filter_groups_enable": True,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "num_iterations": 1,
        "max_steps": 1,
        "filter_gen_batch_size": 2,
        "shuffle_dataset": False,
    }
    trainer = build(out, answers, data, settings)
    trainer.train()
    return rows_of(trainer, trainer.batches[0])


def main(wrapper: str, out: Path) -> dict[str, Any]:
    steps = {name: one_step(out, 4, 2, name == "filtered") for name in ("plain", "filtered")}
    # The whole command: one rank makes the offline model, both train it, and one writes.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        options = ["--per_device_eval_batch_size", "16", "--output_dir", str(out / "cli")]
        train("dapo", ["--config", "cpu_quick_test", *TINY, *MIXED, *options])
    result = {"said": said.getvalue(), "world": torch.distributed.get_world_size(), "steps": steps, "sampling": sampling(out)}
    result["one_rank_reports"] = one_rank_reports(out)
    return result
